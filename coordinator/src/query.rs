//! What clients ask about runs and checkpoints. The same answers come from a running coordinator's store and, read-only,
//! from a home directory without one.

use std::path::Path;

use cohort_common::api::{CheckpointInfo, FaultInfo, Resolved, RunInfo};
use cohort_common::home::{CheckpointRef, RunName, Which};
use tonic::Status;

use crate::driver::Cluster;
use crate::runs::{checkpoint_info, eval_event};
use crate::samples::sample_info;
use crate::status::{chain, invalid, missing, refused};
use crate::store::{FaultRow, RunRow, RunStatus, Store, StoreError};

/// Steps whose samples are in the description of a run.
const SAMPLED_STEPS: u32 = 1;

/// Faults in the description of a run.
const FAULTS: u32 = 20;

/// All runs, oldest first.
pub fn runs(store: &Store) -> Result<Vec<RunInfo>, StoreError> {
    let rows = store.runs()?;
    rows.into_iter().map(|row| describe(store, row)).collect()
}

/// One run.
pub fn run(store: &Store, name: &RunName) -> Result<RunInfo, StoreError> {
    describe(store, store.run(name)?)
}

fn describe(store: &Store, row: RunRow) -> Result<RunInfo, StoreError> {
    let name = row.name.clone();
    let last_step = store.last_step(&name)?;
    let last_step = last_step.map(|step| step.event(name.to_string()));
    let evals = store.evals(&name, None)?;
    let checkpoints = store.checkpoints(&name)?;
    let faults = store.faults(&name, FAULTS)?;
    let samples = store.samples(&name, SAMPLED_STEPS)?;
    Ok(RunInfo {
        name: name.to_string(),
        status: row.status.to_string(),
        step: row.step,
        parent: row.parent,
        error: row.error,
        created_ms: row.created_ms,
        finished_ms: row.finished_ms,
        queue_place: None,
        workers: row.workers,
        last_step,
        evals: evals
            .into_iter()
            .map(|e| eval_event(&name, &row.spec.model.labels, e))
            .collect(),
        spec: row.spec,
        checkpoints: checkpoints.into_iter().map(checkpoint_info).collect(),
        faults: faults.into_iter().map(fault_info).collect(),
        samples: samples
            .into_iter()
            .map(|row| sample_info(&name, row))
            .collect(),
        stored: None,
    })
}

fn fault_info(row: FaultRow) -> FaultInfo {
    FaultInfo {
        time_ms: row.time_ms,
        step: row.step,
        kind: row.kind,
        worker: row.worker,
        text: row.text,
        delay_ms: row.delay_ms,
    }
}

/// Which checkpoint a reference means.
pub fn find(store: &Store, reference: &str) -> Result<Resolved, Status> {
    let parsed: CheckpointRef = reference.parse().map_err(invalid)?;
    let CheckpointRef::Run { run: name, which } = parsed else {
        let what = format!("`{reference}` is a directory or a model of the hub, not a run");
        return Err(invalid(what));
    };
    let info = run(store, &name).map_err(missing)?;
    let checkpoint = pick(&info, which)?;
    Ok(Resolved {
        run: info.name.clone(),
        checkpoint,
        spec: info.spec,
    })
}

fn pick(info: &RunInfo, which: Which) -> Result<CheckpointInfo, Status> {
    let all = &info.checkpoints;
    let found = match which {
        Which::Last => all.last(),
        Which::Best => all
            .iter()
            .filter(|c| c.val_loss.is_some())
            .min_by(|a, b| {
                a.val_loss
                    .unwrap_or(f64::MAX)
                    .total_cmp(&b.val_loss.unwrap_or(f64::MAX))
            })
            .or(all.last()),
        Which::Step(step) => all.iter().find(|c| c.step == step),
    };
    found.cloned().ok_or_else(|| {
        let steps: Vec<String> = all.iter().map(|c| c.step.to_string()).collect();
        let have = match steps.is_empty() {
            true => "it has none yet".to_owned(),
            false => format!("it has those of the steps {}", steps.join(", ")),
        };
        missing(format!(
            "run `{}` has no such checkpoint; {have}",
            info.name
        ))
    })
}

/// [`find`], in a running coordinator, which brings it back from its object store if it is only there.
pub async fn resolve(cluster: &Cluster, reference: &str) -> Result<Resolved, Status> {
    let reference = reference.to_owned();
    let look = move |store: &Store| Ok(find(store, &reference));
    let found = cluster.read_settled(look).await??;
    if let Some(remote) = cluster.remote()
        && !Path::new(&found.checkpoint.path).is_dir()
    {
        let run = RunName::new(&found.run).map_err(invalid)?;
        let brought = remote.bring_checkpoint(&run, found.checkpoint.step).await;
        brought.map_err(|error| refused(chain(&error)))?;
    }
    Ok(found)
}

/// A run's place in the queue; 1 is next.
pub fn place(queue: &[String], run: &str) -> Option<usize> {
    queue.iter().position(|queued| queued == run).map(|i| i + 1)
}

/// Whether a run still needs its files.
pub fn is_under_way(status: &str) -> bool {
    [RunStatus::Queued, RunStatus::Running]
        .iter()
        .any(|s| s.as_str() == status)
}
