//! What the store holds, row by row. Times are milliseconds since the epoch, losses nats per token.

use cohort_common::api::{RunFacts, StepEvent};
use cohort_common::home::RunName;
use cohort_common::spec::{RunKind, RunSpec};
use serde::{Deserialize, Serialize};

/// Where a run is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunStatus {
    /// Waits for its turn.
    Queued,
    /// Trains, or waits for workers.
    Running,
    /// Held by the user.
    Paused,
    /// Its coordinator ended before it did.
    Interrupted,
    /// Done.
    Finished,
    /// Ended by an error.
    Failed,
    /// Ended by the user.
    Cancelled,
}

impl RunStatus {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Queued,
        Self::Running,
        Self::Paused,
        Self::Interrupted,
        Self::Finished,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The word in the database, in messages and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Interrupted => "interrupted",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Reads what [`RunStatus::as_str`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == text)
    }

    /// Whether the run will do no more step by itself.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Finished | Self::Failed | Self::Cancelled)
    }

    /// Whether the same command again goes on with this run instead of making another.
    pub fn is_unfinished(self) -> bool {
        !matches!(self, Self::Finished | Self::Cancelled)
    }
}

impl std::fmt::Display for RunStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What it takes to enter a run.
#[derive(Clone, Debug, PartialEq)]
pub struct NewRun {
    /// Its name.
    pub name: RunName,
    /// What it does.
    pub spec: RunSpec,
    /// Equal for runs that the same command would make.
    pub identity: String,
    /// The checkpoint that it starts from, as the user named it.
    pub parent: Option<String>,
    /// What does not change while it trains, where it is known.
    pub facts: Option<RunFacts>,
}

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunRow {
    /// Its name.
    pub name: RunName,
    /// Pretraining or finetuning.
    pub kind: RunKind,
    /// What it does.
    pub spec: RunSpec,
    /// Equal for runs that the same command would make.
    pub identity: String,
    /// Where it is in its life.
    pub status: RunStatus,
    /// When it was submitted.
    pub created_ms: u64,
    /// When it first ran.
    pub started_ms: Option<u64>,
    /// When it ended.
    pub finished_ms: Option<u64>,
    /// Committed optimizer steps.
    pub step: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// The checkpoint that it starts from, as the user named it.
    pub parent: Option<String>,
    /// Workers that trained it when its newest step was committed; 0 before the first.
    pub workers: u32,
}

/// The metrics of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepRow {
    /// The step.
    pub step: u64,
    /// Steps of the whole run, as it was planned then; 0 where that is not known.
    pub horizon: u64,
    /// Mean training loss.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Tokens of the whole run so far.
    pub tokens: u64,
    /// Speed of the cluster.
    pub tokens_per_second: f64,
    /// Passes over the training split so far; 0 where that is not known.
    pub epoch: f64,
    /// Loss per byte of text, in bits.
    pub bits_per_byte: Option<f64>,
    /// Model FLOPs utilisation.
    pub mfu: Option<f64>,
    /// When the step was committed.
    pub time_ms: u64,
    /// Whether its update was left out. The ledger keeps that.
    pub skipped: bool,
}

/// What is drawn of a step; what is not known is not a number.
#[derive(Clone, Copy, Debug)]
pub struct PointRow {
    /// The step.
    pub step: u64,
    /// Tokens of the whole run so far.
    pub tokens: u64,
    /// When it was committed, in milliseconds since the epoch.
    pub time_ms: u64,
    /// Mean loss, in nats.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Speed of the cluster.
    pub tokens_per_second: f64,
    /// Model FLOPs utilisation.
    pub mfu: f64,
}

impl StepRow {
    /// The event that tells of the step.
    pub fn event(self, run: String) -> StepEvent {
        StepEvent {
            run,
            step: self.step,
            steps: self.horizon,
            loss: self.loss,
            grad_norm: self.grad_norm,
            learning_rate: self.learning_rate,
            tokens: self.tokens,
            tokens_per_second: self.tokens_per_second,
            epoch: self.epoch,
            bits_per_byte: self.bits_per_byte,
            mfu: self.mfu,
            skipped: self.skipped,
        }
    }
}

/// What the model of a step wrote after one of the spec's prompts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SampleRow {
    /// After that many steps.
    pub step: u64,
    /// The prompt's place in the spec of then.
    pub prompt: u32,
    /// The prompt.
    pub prompt_text: String,
    /// What was written.
    pub text: String,
}

/// How a worker's time went over some steps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WorkerTimesRow {
    /// The worker.
    pub worker: String,
    /// The last of the steps.
    pub step: u64,
    /// When that was committed.
    pub time_ms: u64,
    /// Its host.
    pub host: String,
    /// What computes.
    pub device: String,
    /// Tokens that it computed.
    pub tokens: u64,
    /// Microseconds of computing.
    pub compute_us: u64,
    /// Microseconds of sending and receiving, while nothing was computed.
    pub exchange_us: u64,
    /// Microseconds without anything to do.
    pub wait_us: u64,
    /// Microseconds of waiting for text.
    pub data_us: u64,
}

/// A validation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRow {
    /// After that many steps.
    pub step: u64,
    /// Which text: `validation`, …
    pub split: String,
    /// Mean loss.
    pub loss: f64,
    /// Loss per byte of text, in bits: comparable between tokenizers.
    pub bits_per_byte: Option<f64>,
    /// Tokens that were scored.
    pub weight: f64,
    /// Bytes of text that were scored.
    pub bytes: u64,
    /// Of a classifier: samples by label and by the label they were given, row by row; else empty.
    pub confusion: Vec<u64>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EventRow {
    /// Grows with every event.
    pub id: u64,
    /// The run that it concerns, if it concerns one.
    pub run: Option<String>,
    /// When.
    pub time_ms: u64,
    /// A word for scripts, such as `worker_lost`.
    pub kind: String,
    /// The event as JSON (`cohort_common::api::RunEvent`).
    pub text: String,
}

/// Something that happened to a worker of a run, or that a run made good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FaultRow {
    /// The step in flight, or the state's step between two.
    pub step: u64,
    /// When.
    pub time_ms: u64,
    /// The event's word: `worker_lost`, `redone`, `worker_joined`, `worker_left`.
    pub kind: String,
    /// The worker.
    pub worker: String,
    /// In plain words.
    pub text: String,
    /// How much later a step was committed because of it, where that is known.
    pub delay_ms: Option<u64>,
}

/// The lanes of a worker from a step on, until the assignment changes. Not part of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AssignmentRow {
    /// The first step that was committed with it.
    pub first_step: u64,
    /// Its version, within one life of the coordinator.
    pub generation: u64,
    /// The worker.
    pub worker: String,
    /// Its lanes, ascending.
    pub lanes: Vec<u32>,
}

/// Who was given a lane of a step, and what became of it, where that was more than one worker. Not part of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AttemptRow {
    /// The step.
    pub step: u64,
    /// The lane.
    pub lane: u32,
    /// The worker.
    pub worker: String,
    /// A word: `done`, `lost`, …
    pub outcome: String,
}

/// A checkpoint on disk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointRow {
    /// After that many steps.
    pub step: u64,
    /// Its directory, as it was given to the store.
    pub path: String,
    /// Size of all its files.
    pub bytes: u64,
    /// Validation loss at this step, if there was a validation.
    pub val_loss: Option<f64>,
    /// Hash over all parameters and moments.
    #[serde(with = "cohort_common::checkpoint::hex")]
    pub state_hash: [u8; 32],
    /// When it was written.
    pub time_ms: u64,
}

/// A prepared corpus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CorpusRow {
    /// Hash of its content.
    pub fingerprint: String,
    /// What the user called it.
    pub name: String,
    /// Whatever else is known about it.
    pub json: String,
    /// When it was prepared.
    pub time_ms: u64,
}
