//! The read model of runs (`cohort_common::api::RunView`, `History`), from the database and the corpora. Everything that
//! shows a run to a person asks here; the cluster's part of the model comes from the driver.

use cohort_common::api::{
    AnomalyEvent, CheckpointInfo, EvalEvent, History, HistoryRequest, RunEvent, RunFacts, RunInfo,
    RunSummary, RunView, SampleInfo, StepEvent, TimelineEntry,
};
use cohort_common::home::{Home, RunName};
use cohort_common::spec::{RunSpec, counted, human_bytes};
use tonic::Status;

use crate::data::open_corpus;
use crate::driver::{Cluster, Command};
use crate::plan::facts_of;
use crate::query;
use crate::samples::sample_info;
use crate::status::invalid;
use crate::store::{EventRow, RunStatus, Store, StoreError};

/// Entries of a timeline, at most.
const TIMELINE: u32 = 1000;

/// Kinds of events, besides steps, that a timeline leaves out: they are curves and samples of their own.
const NOT_TOLD: [&str; 2] = ["eval", "sample"];

/// Steps whose samples are shown, at most.
const SAMPLED_STEPS: u32 = 64;

/// Steps over which the present speed is averaged.
const SPEED_OVER: u64 = 20;

/// A run of a coordinator that is running.
pub async fn live(cluster: &Cluster, name: RunName) -> Result<RunView, Status> {
    let home = cluster.home().clone();
    let look = move |store: &Store| run(store, &name, |spec| corpus_facts(&home, spec));
    let mut view = cluster.read(look).await?;
    let cluster = cluster.ask(Command::View).await?;
    view.info.queue_place = query::place(&cluster.queued, &view.info.name);
    Ok(view)
}

/// The steps of a run of a coordinator that is running.
pub async fn history(cluster: &Cluster, request: HistoryRequest) -> Result<History, Status> {
    let name = RunName::new(&request.run).map_err(invalid)?;
    let shared = cluster.clone();
    let look = move |store: &Store| {
        store.run(&name)?;
        shared.histories().history(store, &name, &request)
    };
    cluster.read(look).await
}

/// All runs of a coordinator that is running, the newest first.
pub async fn summaries(cluster: &Cluster) -> Result<Vec<RunSummary>, Status> {
    let mut summaries = cluster.read(Store::summaries).await?;
    let queued = cluster.ask(Command::View).await?.queued;
    for summary in &mut summaries {
        summary.queue_place = query::place(&queued, &summary.name);
    }
    Ok(summaries)
}

/// A run. `facts` finds what is known of it where the database does not say.
pub fn run(
    store: &Store,
    name: &RunName,
    facts: impl FnOnce(&RunSpec) -> RunFacts,
) -> Result<RunView, StoreError> {
    let info = query::run(store, name)?;
    let facts = match store.facts(name)? {
        Some(facts) => facts,
        None => facts(&info.spec),
    };
    let timeline = store.newest_events(name, &NOT_TOLD, TIMELINE)?;
    let samples = store.samples(name, SAMPLED_STEPS)?;
    let eta_seconds = eta(store, name, &info)?;
    Ok(RunView {
        facts,
        timeline: timeline.into_iter().filter_map(told).collect(),
        samples: samples
            .into_iter()
            .map(|row| sample_info(name, row))
            .collect(),
        eta_seconds,
        fault_totals: store.fault_totals(name)?,
        info,
    })
}

/// What is known of a run whose facts were not kept: what its corpus tells, if that is here.
pub fn corpus_facts(home: &Home, spec: &RunSpec) -> RunFacts {
    match open_corpus(home, &spec.corpus) {
        Ok(corpus) => facts_of(spec, &corpus, Vec::new()),
        Err(_) => RunFacts {
            parameters: spec.parameters(),
            trained: spec.layout().len() as u64,
            flops_per_token: spec.flops_per_token(),
            ..RunFacts::default()
        },
    }
}

/// Seconds until the last step, validations and pauses between the newest steps included.
fn eta(store: &Store, name: &RunName, info: &RunInfo) -> Result<Option<f64>, StoreError> {
    if info.status != RunStatus::Running.as_str() || info.step == 0 {
        return Ok(None);
    }
    let after = info.step.saturating_sub(SPEED_OVER + 1);
    let newest = store.steps(name, Some(after), SPEED_OVER as u32 + 1)?;
    let (Some(first), Some(last)) = (newest.first(), newest.last()) else {
        return Ok(None);
    };
    let steps = last.step.saturating_sub(first.step);
    let left = info.spec.train.steps.saturating_sub(last.step);
    let seconds = last.time_ms.saturating_sub(first.time_ms) as f64 / 1000.0;
    Ok((steps > 0).then(|| left as f64 * seconds / steps as f64))
}

/// An event in the words of a timeline; `None` for one that cannot be read.
pub fn told(row: EventRow) -> Option<TimelineEntry> {
    let event: RunEvent = serde_json::from_str(&row.text).ok()?;
    let worker = match &event {
        RunEvent::WorkerLost { worker, .. }
        | RunEvent::WorkerJoined { worker, .. }
        | RunEvent::WorkerLeft { worker, .. }
        | RunEvent::Redone { worker, .. } => Some(worker.clone()),
        _ => None,
    };
    let cost_ms = match &event {
        RunEvent::Redone { delay_ms, .. } => Some(*delay_ms),
        _ => None,
    };
    Some(TimelineEntry {
        id: row.id,
        time_ms: row.time_ms,
        step: step_of(&event),
        kind: row.kind,
        text: words(&event),
        worker,
        cost_ms,
    })
}

fn step_of(event: &RunEvent) -> Option<u64> {
    match event {
        RunEvent::Step(StepEvent { step, .. })
        | RunEvent::Eval(EvalEvent { step, .. })
        | RunEvent::Sample(SampleInfo { step, .. })
        | RunEvent::Anomaly(AnomalyEvent { step, .. })
        | RunEvent::Loading { step, .. }
        | RunEvent::WorkerLost { step, .. }
        | RunEvent::Redone { step, .. }
        | RunEvent::WorkerJoined { step, .. }
        | RunEvent::WorkerLeft { step, .. }
        | RunEvent::Paused { step, .. }
        | RunEvent::Stopped { step, .. } => Some(*step),
        RunEvent::Checkpoint { checkpoint, .. } => Some(checkpoint.step),
        RunEvent::Finished(end) => Some(end.step),
        RunEvent::Queued { .. }
        | RunEvent::Waiting { .. }
        | RunEvent::Training { .. }
        | RunEvent::Note { .. }
        | RunEvent::Cancelled { .. }
        | RunEvent::Failed { .. } => None,
    }
}

fn words(event: &RunEvent) -> String {
    match event {
        RunEvent::Queued { place, .. } => format!("queued, place {place}"),
        RunEvent::Waiting { have, need, .. } => {
            format!("waits for workers: {have} of {need} are there")
        }
        RunEvent::Loading { workers, step, .. } => {
            format!(
                "the state of step {step} is loaded on {}",
                counted(*workers, "worker")
            )
        }
        RunEvent::Training { workers, .. } => {
            format!("trains on {}", counted(*workers, "worker"))
        }
        RunEvent::Checkpoint { checkpoint, .. } => checkpoint_words(checkpoint),
        RunEvent::Note { text, .. } | RunEvent::Anomaly(AnomalyEvent { text, .. }) => text.clone(),
        RunEvent::Paused { step, reason, .. } => match reason {
            Some(reason) => reason.clone(),
            None => format!("paused at step {step}"),
        },
        RunEvent::Stopped { step, .. } => format!("stopped after step {step}"),
        RunEvent::Cancelled { .. } => "cancelled".into(),
        RunEvent::Failed { error, .. } => format!("failed: {error}"),
        RunEvent::Finished(end) => format!("finished after step {}", end.step),
        RunEvent::Step(_) | RunEvent::Eval(_) | RunEvent::Sample(_) => String::new(),
        RunEvent::WorkerLost { .. }
        | RunEvent::Redone { .. }
        | RunEvent::WorkerJoined { .. }
        | RunEvent::WorkerLeft { .. } => event.membership().unwrap_or_default(),
    }
}

fn checkpoint_words(checkpoint: &CheckpointInfo) -> String {
    let loss = checkpoint
        .val_loss
        .map_or(String::new(), |loss| format!(", validation loss {loss:.4}"));
    format!(
        "checkpoint of step {}, {}{loss}",
        checkpoint.step,
        human_bytes(checkpoint.bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::record_event;
    use crate::store::StepRow;
    use crate::store::tests::{name, store_with_run};

    fn step(step: u64) -> StepRow {
        StepRow {
            step,
            horizon: 200,
            loss: 2.0,
            grad_norm: 1.0,
            learning_rate: 0.1,
            tokens: 10 * step,
            tokens_per_second: 20.0,
            epoch: 0.5,
            bits_per_byte: Some(1.5),
            mfu: Some(0.4),
            time_ms: 1000 + 500 * step,
            skipped: false,
        }
    }

    #[test]
    fn a_run_is_shown_with_its_timeline_and_the_time_that_it_needs() {
        let (_dir, store) = store_with_run("tiny-1");
        let run_name = name("tiny-1");
        let run_text = || "tiny-1".to_owned();
        store
            .set_status(&run_name, RunStatus::Running, None, 1)
            .unwrap();
        for n in 1..=100 {
            store.record_step(&run_name, &step(n)).unwrap();
            store
                .record_event(Some(&run_name), 1, "step", &n.to_string())
                .unwrap();
            store.set_progress(&run_name, n).unwrap();
        }
        for event in [
            RunEvent::Note {
                run: run_text(),
                text: "words".into(),
            },
            RunEvent::Redone {
                run: run_text(),
                step: 41,
                worker: "w2".into(),
                reason: "lost".into(),
                lanes: vec![4],
                by: vec!["w1".into()],
                delay_ms: 250,
            },
        ] {
            record_event(&store, &run_name, &event).unwrap();
        }
        let facts = RunFacts {
            corpus: "books".into(),
            ..RunFacts::default()
        };
        let view = run(&store, &run_name, |_| facts.clone()).unwrap();
        assert_eq!(view.facts, facts);
        // 100 of 200 steps of half a second are left.
        assert_eq!(view.eta_seconds, Some(50.0));
        let last = view.info.last_step.unwrap();
        assert_eq!((last.step, last.mfu), (100, Some(0.4)));
        let told: Vec<_> = view
            .timeline
            .iter()
            .map(|entry| (entry.kind.as_str(), entry.step, entry.cost_ms))
            .collect();
        assert_eq!(
            told,
            [("note", None, None), ("redone", Some(41), Some(250))]
        );
        assert!(view.timeline[1].text.contains("redone by w1"));
    }
}
