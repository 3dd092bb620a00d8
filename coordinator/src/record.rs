//! What the coordinator writes down of a run while it trains: ledger, metrics, events, checkpoints. The machine decides,
//! this records; every line goes to the store, from which all who watch read.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use cohort_common::api::{
    AnomalyEvent, CheckpointInfo, Classes, EvalEvent, FinishedEvent, RunEvent, RunFacts, SampleInfo,
};
use cohort_common::checkpoint::{CheckpointMeta, RunState, remove_checkpoint};
use cohort_common::cluster::Scores;
use cohort_common::cluster::events::{Change, StepRecord};
use cohort_common::cluster::{Anomaly, Event, RunPlan};
use cohort_common::hf::SpecialTokens;
use cohort_common::home::RunName;
use cohort_common::ids::{RunId, Step};
use cohort_common::ledger::Entry;
use cohort_common::order::Shares;
use cohort_common::spec::RunSpec;
use cohort_common::traces::StepTrace;
use tracing::{error, warn};

use crate::driver::{Cluster, now_ms};
use crate::happenings::fault_of;
use crate::samples::{Prompts, sample_row};
use crate::store::{Appended, CheckpointRow, EvalRow, Receipt, RunStatus, StepRow, Store};

/// What a split's loss is averaged over, and the bytes of text behind it, for bits per byte.
#[derive(Clone, Copy, Debug)]
pub struct SplitFacts {
    /// Tokens that are scored; of a classification, samples.
    pub scored: u64,
    /// Their bytes of text; of a classification, none.
    pub bytes: Option<u64>,
}

/// A run that trains or waits, and what is needed to record it.
pub struct RunRecord {
    /// The run's name.
    pub name: RunName,
    /// What the machine carries out.
    pub plan: RunPlan,
    /// Facts of the splits of text in the plan, by index.
    pub splits: Vec<SplitFacts>,
    /// What it writes after, if anything.
    pub prompts: Option<Prompts>,
    /// Samples in one epoch.
    pub epoch_samples: u64,
    /// Which samples are of the run's own corpus.
    pub shares: Shares,
    /// What does not change while it trains.
    pub facts: RunFacts,
    /// Content of `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// The chat template that its checkpoints carry.
    pub chat_template: Option<String>,
    /// Where the weights lie that adapters stand beside, in a run that trains adapters.
    pub base: Option<std::path::PathBuf>,
    /// Ids for generation.
    pub tokens: SpecialTokens,
    /// The checkpoints on disk, oldest first.
    pub checkpoints: Vec<CheckpointInfo>,
    /// Checkpoints on disk that the workers have not vouched for yet.
    pub written: BTreeMap<Step, CheckpointInfo>,
    /// The last validation of each split, by label.
    pub evals: BTreeMap<String, EvalEvent>,
    /// When the run was taken up.
    pub started: Instant,
    /// The ledger entry that is on its way to the disk.
    pub pending: Option<Receipt<Appended>>,
    /// Whether the user pauses it: then a stop makes it rest as paused.
    pub pausing: bool,
    /// What the processors of the workers that train it can do together; `None` where that is not known.
    pub peak_flops: Option<f64>,
}

/// A checkpoint that has reached the disk.
pub struct CheckpointDone {
    /// The run.
    pub run: RunId,
    /// The checkpoint.
    pub info: CheckpointInfo,
    /// The hash of its state.
    pub state_hash: [u8; 32],
}

impl RunRecord {
    fn tokens_at(&self, step: Step) -> u64 {
        let spec = &self.plan.spec;
        step * spec.tokens_per_step()
    }

    fn run(&self) -> String {
        self.name.to_string()
    }

    /// Writes to the store without waiting for the disk.
    pub(crate) async fn write(
        &self,
        cluster: &Cluster,
        request: impl FnOnce(&Store) -> Result<(), crate::store::StoreError> + Send + 'static,
    ) {
        match cluster.store().submit(request).await {
            // An error of the disk shows up again, and stops the run, when the ledger is written.
            Ok(receipt) => drop(receipt),
            Err(error) => error!(run = %self.name, %error, "cannot write to the store"),
        }
    }

    pub(crate) async fn event(&self, cluster: &Cluster, event: RunEvent) {
        let name = self.name.clone();
        self.write(cluster, move |store| record_event(store, &name, &event))
            .await;
        cluster.note(&self.name);
        cluster.announce();
    }

    /// A sentence for people.
    pub async fn note(&self, cluster: &Cluster, text: String) {
        let run = self.run();
        self.event(cluster, RunEvent::Note { run, text }).await;
    }

    /// A step was out of the ordinary.
    pub async fn unusual(&self, cluster: &Cluster, anomaly: &Anomaly) {
        let event = AnomalyEvent::of(self.run(), anomaly);
        warn!(run = %self.name, "{}", event.text);
        self.event(cluster, RunEvent::Anomaly(event)).await;
    }

    /// Waits until the newest ledger entry is on disk.
    pub async fn durable(&mut self) -> Result<(), String> {
        match self.pending.take() {
            None => Ok(()),
            Some(receipt) => receipt.await.map(|_| ()).map_err(|e| e.to_string()),
        }
    }

    /// Records a committed step: its ledger entry, its metrics, its event. Does not wait for the disk; the next
    /// commit does.
    pub async fn committed(
        &mut self,
        cluster: &Cluster,
        step: &StepRecord,
        trace: Option<StepTrace>,
    ) -> Option<Event> {
        let entry = step.entry.clone();
        let new = self.tokens_at(entry.step) - self.tokens_at(entry.step - 1);
        let speed = |millis: u64| new as f64 * 1000.0 / millis.max(1) as f64;
        let own = self.shares.of_first(entry.first_position + entry.samples)[0];
        let row = StepRow {
            // Unknown where another coordinator led the step.
            tokens_per_second: step.millis.map_or(0.0, speed),
            epoch: own as f64 / self.epoch_samples as f64,
            mfu: self.mfu(step.millis.map(speed)),
            ..step_row(&self.plan.spec, &self.facts, &entry, now_ms(), own)
        };
        let workers = step.workers as u32;
        let name = self.name.clone();
        let receipt = cluster
            .store()
            .submit(move |store| {
                let traced = trace.map(|trace| (trace, SystemTime::now()));
                let appended = store.append_entry(&name, &entry)?;
                store.record_step(&name, &row)?;
                store.set_progress(&name, row.step)?;
                store.set_workers(&name, workers)?;
                // The event only names the step: its metrics are kept once.
                store.record_event(Some(&name), row.time_ms, "step", &row.step.to_string())?;
                if let Some((trace, start)) = traced {
                    trace.child("store", start, SystemTime::now(), Vec::new());
                }
                Ok(appended)
            })
            .await;
        match receipt {
            Ok(receipt) => self.pending = Some(receipt),
            Err(error) => return Some(self.broken(error.to_string())),
        }
        cluster.note(&self.name);
        cluster.announce_step();
        None
    }

    /// The share of what the workers' processors can do that goes into the model at this speed.
    fn mfu(&self, tokens_per_second: Option<f64>) -> Option<f64> {
        let done = tokens_per_second? * self.facts.flops_per_token;
        Some(done / self.peak_flops?).filter(|share| *share > 0.0)
    }

    fn broken(&self, error: String) -> Event {
        let run = self.plan.run.clone();
        Event::RunBroken { run, error }
    }

    /// Records a validation.
    pub async fn evaluated(
        &mut self,
        cluster: &Cluster,
        step: Step,
        split: u32,
        Scores { sums, confusion }: Scores,
    ) -> Option<Event> {
        let label = self.plan.splits[split as usize].label.clone();
        if sums.weight <= 0.0 || !sums.loss.is_finite() {
            let (loss, weight) = (sums.loss, sums.weight);
            return Some(self.broken(format!(
                "the {label} split at step {step} has a loss sum of {loss} over {weight} tokens; the weights have lost their meaning (a lower train.learning_rate from an earlier checkpoint helps), or that text is empty"
            )));
        }
        let facts = self.splits[split as usize];
        let loss = sums.loss / sums.weight;
        // Bits per token times tokens per byte of the whole split: also right where only part of it was scored.
        let bits = loss / std::f64::consts::LN_2 * facts.scored as f64;
        let bits_per_byte = facts.bytes.map(|bytes| bits / bytes as f64);
        let event = EvalEvent {
            run: self.run(),
            step,
            split: label.clone(),
            loss,
            bits_per_byte,
            tokens: sums.weight as u64,
            classes: Classes::of(&self.plan.spec.model.labels, &confusion),
        };
        let row = EvalRow {
            step,
            split: label.clone(),
            loss,
            bits_per_byte,
            weight: sums.weight,
            bytes: facts.bytes.unwrap_or(0),
            confusion,
        };
        self.evals.insert(label, event.clone());
        let name = self.name.clone();
        self.write(cluster, move |store| {
            store.record_eval(&name, &row)?;
            record_event(store, &name, &RunEvent::Eval(event))
        })
        .await;
        cluster.note(&self.name);
        cluster.announce();
        None
    }

    /// Records what the model of a step has written.
    pub async fn sampled(&self, cluster: &Cluster, step: Step, written: &[Vec<u32>]) {
        let Some(prompts) = &self.prompts else { return };
        let texts = match prompts.texts(written) {
            Ok(texts) => texts,
            Err(error) => {
                let text = format!("what was written at step {step} cannot be decoded: {error}");
                return self.note(cluster, text).await;
            }
        };
        let samples = texts.into_iter().zip(0..);
        let samples: Vec<SampleInfo> = samples
            .map(|((prompt, text), index)| SampleInfo {
                run: self.run(),
                step,
                index,
                prompt,
                text,
            })
            .collect();
        let name = self.name.clone();
        self.write(cluster, move |store| {
            for sample in samples {
                store.record_sample(&name, &sample_row(&sample))?;
                record_event(store, &name, &RunEvent::Sample(sample))?;
            }
            Ok(())
        })
        .await;
        cluster.note(&self.name);
        cluster.announce();
    }

    /// What a checkpoint of this step holds besides the state. The ledger and its head are filled in by whoever writes
    /// it.
    pub fn checkpoint_meta(&self, step: Step) -> Option<CheckpointMeta> {
        let spec = (*self.plan.spec).clone();
        let run = RunState {
            run: self.run(),
            step,
            samples: step * spec.train.samples_per_step(),
            tokens: self.tokens_at(step),
            val_loss: self.val_loss(step),
            ledger_head: [0; 32],
            state_hash: [0; 32],
            spec,
        };
        Some(CheckpointMeta {
            tokens: self.tokens.clone(),
            tokenizer: self.tokenizer.clone(),
            chat_template: self.chat_template.clone(),
            run,
            ledger: Vec::new(),
            base: self.base.clone(),
        })
    }

    fn val_loss(&self, step: Step) -> Option<f64> {
        let eval = self.evals.get("validation").filter(|e| e.step == step)?;
        Some(eval.loss)
    }

    /// Records a checkpoint that the workers vouch for, and deletes those that the spec does not keep.
    pub async fn checkpoint_good(&mut self, cluster: &Cluster, step: Step) {
        let Some(info) = self.written.remove(&step) else {
            return;
        };
        let row = checkpoint_row(&info, now_ms());
        self.checkpoints.retain(|c| c.step != step);
        self.checkpoints.push(info.clone());
        let surplus = surplus(&self.checkpoints, self.plan.spec.checkpoint.keep as usize);
        self.checkpoints.retain(|c| !surplus.contains(&c.step));
        let event = RunEvent::Checkpoint {
            run: self.run(),
            checkpoint: info,
        };
        let name = self.name.clone();
        let steps = surplus.clone();
        self.write(cluster, move |store| {
            store.record_checkpoint(&name, &row)?;
            for step in steps {
                store.delete_checkpoint(&name, step)?;
            }
            record_event(store, &name, &event)
        })
        .await;
        for step in surplus {
            let path = cluster.home().checkpoint(&self.name, step);
            tokio::task::spawn_blocking(move || {
                if let Err(error) = remove_checkpoint(&path) {
                    error!(path = %path.display(), %error, "cannot delete an old checkpoint");
                }
            });
        }
        if let Some(remote) = cluster.remote() {
            remote.changed(&self.name);
        }
        cluster.note(&self.name);
        cluster.announce();
    }

    /// Deletes a checkpoint that is not what the workers hold.
    pub fn drop_checkpoint(&mut self, cluster: &Cluster, step: Step) {
        self.written.remove(&step);
        let path = cluster.home().checkpoint(&self.name, step);
        // At once, before it can be asked for again; it is a handful of files.
        // It is not there if its upload had not come to an end.
        if let Err(error) = remove_checkpoint(&path) {
            error!(path = %path.display(), %error, "cannot delete a checkpoint");
        }
    }

    /// Takes back what was committed after a step.
    pub async fn withdraw(&mut self, cluster: &Cluster, after: Step) -> Option<Event> {
        if let Err(error) = self.durable().await {
            return Some(self.broken(error));
        }
        let name = self.name.clone();
        let withdrawn = cluster.store().call(move |s| s.truncate(&name, after));
        match withdrawn.await {
            Ok(()) => {
                cluster.note(&self.name);
                None
            }
            Err(error) => Some(self.broken(error.to_string())),
        }
    }

    /// Records what became of the run. Says whether the run rests now.
    pub async fn changed(&mut self, cluster: &Cluster, change: Change) -> bool {
        let (status, event) = self.describe(change).await;
        let rests = event.is_last();
        let (name, told) = (self.name.clone(), event.clone());
        let time = now_ms();
        let error = match &event {
            RunEvent::Failed { error, .. } => Some(error.clone()),
            _ => None,
        };
        self.write(cluster, move |store| {
            store.set_status(&name, status, error.as_deref(), time)?;
            record_event(store, &name, &event)
        })
        .await;
        // Whoever is told finds it in the store.
        cluster.notices().event(&told);
        cluster.note(&self.name);
        cluster.announce();
        rests
    }

    async fn describe(&mut self, change: Change) -> (RunStatus, RunEvent) {
        let run = self.run();
        match change {
            Change::Queued { place } => (RunStatus::Queued, RunEvent::Queued { run, place }),
            Change::Waiting { have, need } => {
                (RunStatus::Running, RunEvent::Waiting { run, have, need })
            }
            Change::Loading { workers, step } => {
                (RunStatus::Running, RunEvent::Loading { run, workers, step })
            }
            Change::Training { workers } => {
                (RunStatus::Running, RunEvent::Training { run, workers })
            }
            Change::Stopped { step } if self.pausing => {
                (RunStatus::Paused, paused(run, step, None))
            }
            Change::Stopped { step } => (RunStatus::Interrupted, RunEvent::Stopped { run, step }),
            Change::Paused { step, reason } => {
                let text = format!(
                    "{reason}; look at its events `anomaly` and at the data of these steps; `cohort resume {run}` goes on as it is"
                );
                (RunStatus::Paused, paused(run, step, Some(text)))
            }
            Change::Cancelled => (RunStatus::Cancelled, RunEvent::Cancelled { run }),
            Change::Failed { error } => (RunStatus::Failed, RunEvent::Failed { run, error }),
            Change::Finished {
                step, train_loss, ..
            } => match self.durable().await {
                Ok(()) => {
                    let event = self.finished(step, train_loss);
                    (RunStatus::Finished, RunEvent::Finished(Box::new(event)))
                }
                Err(error) => (RunStatus::Failed, RunEvent::Failed { run, error }),
            },
        }
    }

    fn finished(&self, step: Step, train_loss: f64) -> FinishedEvent {
        let last = self.checkpoints.last();
        let eval = self.evals.get("validation");
        let seconds = self.started.elapsed().as_secs_f64();
        let trained = self.tokens_at(step) - self.tokens_at(self.plan.source.step());
        FinishedEvent {
            run: self.run(),
            step,
            train_loss: train_loss.is_finite().then_some(train_loss),
            val_loss: eval.map(|e| e.loss),
            val_bits_per_byte: eval.and_then(|e| e.bits_per_byte),
            tokens: self.tokens_at(step),
            seconds,
            tokens_per_second: (trained > 0).then(|| trained as f64 / seconds),
            state_hash: last.map(|c| c.state_hash.clone()),
            checkpoint: last.map(|c| c.path.clone()),
        }
    }
}

/// What an entry of the ledger says of a step: all that is shown of it but how fast it was. `own` are the samples of the run's own
/// corpus up to its end.
pub fn step_row(
    spec: &RunSpec,
    facts: &RunFacts,
    entry: &Entry,
    time_ms: u64,
    own: u64,
) -> StepRow {
    let loss = entry.loss();
    let bits = loss / std::f64::consts::LN_2;
    StepRow {
        step: entry.step,
        horizon: spec.train.steps,
        loss,
        grad_norm: entry.grad_norm,
        learning_rate: entry.learning_rate,
        tokens: entry.step * spec.tokens_per_step(),
        tokens_per_second: 0.0,
        epoch: own as f64 / facts.epoch_samples.max(1) as f64,
        bits_per_byte: facts.bytes_per_token.map(|bytes| bits / bytes),
        mfu: None,
        time_ms,
        skipped: entry.skipped,
    }
}

fn paused(run: String, step: Step, reason: Option<String>) -> RunEvent {
    RunEvent::Paused { run, step, reason }
}

/// The steps of the checkpoints that go: all but the newest `keep` and the best by validation loss.
fn surplus(checkpoints: &[CheckpointInfo], keep: usize) -> Vec<Step> {
    let best = checkpoints
        .iter()
        .filter_map(|c| Some((c.val_loss?, c.step)))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, step)| step);
    let old = checkpoints.len().saturating_sub(keep.max(1));
    checkpoints[..old]
        .iter()
        .map(|c| c.step)
        .filter(|step| Some(*step) != best)
        .collect()
}

/// Writes an event to the store, where followers read it; what happened to workers also becomes a fault of the run.
pub fn record_event(
    store: &Store,
    name: &RunName,
    event: &RunEvent,
) -> Result<(), crate::store::StoreError> {
    let json = serde_json::to_string(event).expect("events are JSON");
    let time = now_ms();
    store.record_event(Some(name), time, event.kind(), &json)?;
    match fault_of(event, time) {
        Some(fault) => store.record_fault(name, &fault),
        None => Ok(()),
    }
}

fn checkpoint_row(info: &CheckpointInfo, time_ms: u64) -> CheckpointRow {
    CheckpointRow {
        step: info.step,
        path: info.path.clone(),
        bytes: info.bytes,
        val_loss: info.val_loss,
        state_hash: cohort_common::checkpoint::hex::decode(&info.state_hash)
            .expect("made by hex::encode"),
        time_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(step: Step, val_loss: f64) -> CheckpointInfo {
        CheckpointInfo {
            step,
            path: String::new(),
            bytes: 0,
            val_loss: Some(val_loss),
            state_hash: String::new(),
        }
    }

    #[test]
    fn the_newest_and_the_best_stay() {
        let all = [
            checkpoint(10, 2.0),
            checkpoint(20, 1.0),
            checkpoint(30, 1.5),
            checkpoint(40, 1.2),
        ];
        assert_eq!(surplus(&all, 2), [10]);
        assert_eq!(surplus(&all, 1), [10, 30]);
        assert_eq!(surplus(&all, 9), [] as [Step; 0]);
        assert_eq!(surplus(&all, 0), [10, 30]);
    }
}
