//! What clients and the coordinator say to each other, as JSON inside the gRPC messages of `client.proto`, and the
//! events that `--json` prints. Scripts rely on these names: fields are added, never renamed.

mod anomaly;
mod audit;
mod corpora;
mod evals;
mod metrics;
mod view;

use serde::{Deserialize, Serialize};

pub use anomaly::AnomalyEvent;
pub use audit::{AuditReport, ReplayReport};
pub use corpora::{
    CorpusHead, CorpusInfo, CountedCorpus, HeadRequest, PrepareCorpus, PrepareEvent, SourceRef,
    SplitInfo, TokenizerRef,
};
pub use evals::{Classes, EvalEvent};
pub use metrics::{MetricsRequest, StepMetrics};
pub use view::{
    Band, ClusterView, ControlView, FaultTotal, History, HistoryRequest, RunFacts, RunSummary,
    RunView, SampleInfo, SystemView, TimeSplit, TimelineEntry, WorkerView,
};

use crate::security::Role;
use crate::spec::RunSpec;

/// Something that happened to a run. `--json` prints one a line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum RunEvent {
    /// It waits for its turn.
    Queued {
        /// The run.
        run: String,
        /// 1 is next.
        place: usize,
    },
    /// It is first in line and waits for workers.
    Waiting {
        /// The run.
        run: String,
        /// Workers that are there.
        have: usize,
        /// Workers that it asks for.
        need: u32,
    },
    /// Workers are getting its state.
    Loading {
        /// The run.
        run: String,
        /// How many.
        workers: usize,
        /// Updates that the state has seen.
        step: u64,
    },
    /// It trains.
    Training {
        /// The run.
        run: String,
        /// On how many workers.
        workers: usize,
    },
    /// A step is committed.
    Step(StepEvent),
    /// A committed step is out of the ordinary.
    Anomaly(AnomalyEvent),
    /// A validation is complete.
    Eval(EvalEvent),
    /// A checkpoint is on disk.
    Checkpoint {
        /// The run.
        run: String,
        #[serde(flatten)]
        /// The checkpoint.
        checkpoint: CheckpointInfo,
    },
    /// In plain words.
    Note {
        /// The run.
        run: String,
        /// The words.
        text: String,
    },
    /// What the model of a step writes after one of the spec's prompts.
    Sample(SampleInfo),
    /// A worker that took part is gone.
    WorkerLost {
        /// The run.
        run: String,
        /// The worker.
        worker: String,
        /// The step that was in flight, or the state's step between two.
        step: u64,
        /// Why, in plain words.
        reason: String,
    },
    /// Lanes that were lost or late were computed by others, and the step is committed.
    Redone {
        /// The run.
        run: String,
        /// The step.
        step: u64,
        /// Who had them.
        worker: String,
        /// Why they were given away, in plain words.
        reason: String,
        /// The lanes.
        lanes: Vec<u32>,
        /// Who computed them.
        by: Vec<String>,
        /// How much later the step was committed than the other lanes were complete.
        delay_ms: u64,
    },
    /// A worker that joined in mid-run takes part from the next step on.
    WorkerJoined {
        /// The run.
        run: String,
        /// The worker.
        worker: String,
        /// The state's step.
        step: u64,
        /// Updates that it replayed to get there.
        replayed: u64,
    },
    /// A worker that was asked to go has handed over.
    WorkerLeft {
        /// The run.
        run: String,
        /// The worker.
        worker: String,
        /// The state's step.
        step: u64,
    },
    /// It rests, with a checkpoint, until it is resumed.
    Paused {
        /// The run.
        run: String,
        /// Where it stands.
        step: u64,
        /// Why, where nobody asked for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// All steps are done.
    Finished(Box<FinishedEvent>),
    /// It was stopped and can be resumed.
    Stopped {
        /// The run.
        run: String,
        /// Where it stands.
        step: u64,
    },
    /// It was cancelled.
    Cancelled {
        /// The run.
        run: String,
    },
    /// It cannot go on.
    Failed {
        /// The run.
        run: String,
        /// Why, and what to do.
        error: String,
    },
}

impl RunEvent {
    /// Whether the run rests after this event.
    pub fn is_last(&self) -> bool {
        matches!(
            self,
            Self::Finished(_)
                | Self::Stopped { .. }
                | Self::Paused { .. }
                | Self::Cancelled { .. }
                | Self::Failed { .. }
        )
    }

    /// What happened to workers, and what it cost, in plain words; `None` for other events.
    pub fn membership(&self) -> Option<String> {
        Some(match self {
            Self::WorkerLost {
                worker,
                step,
                reason,
                ..
            } => format!("worker {worker} lost at step {step} ({reason})"),
            Self::Redone {
                step,
                worker,
                reason,
                lanes,
                by,
                delay_ms,
                ..
            } => {
                let lanes: Vec<String> = lanes.iter().map(u32::to_string).collect();
                format!(
                    "step {step}: lanes {} of {worker} ({reason}) redone by {}; step delayed {:.2} s",
                    lanes.join(","),
                    by.join(","),
                    *delay_ms as f64 / 1000.0
                )
            }
            Self::WorkerJoined {
                worker,
                step,
                replayed,
                ..
            } => format!("worker {worker} joined at step {step}, after replaying {replayed} steps"),
            Self::WorkerLeft { worker, step, .. } => {
                format!("worker {worker} left at step {step}, as it was asked to")
            }
            _ => return None,
        })
    }

    /// The event's word, as in its JSON.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Queued { .. } => "queued",
            Self::Waiting { .. } => "waiting",
            Self::Loading { .. } => "loading",
            Self::Training { .. } => "training",
            Self::Step(_) => "step",
            Self::Anomaly(_) => "anomaly",
            Self::Eval(_) => "eval",
            Self::Checkpoint { .. } => "checkpoint",
            Self::Note { .. } => "note",
            Self::Sample(_) => "sample",
            Self::WorkerLost { .. } => "worker_lost",
            Self::Redone { .. } => "redone",
            Self::WorkerJoined { .. } => "worker_joined",
            Self::WorkerLeft { .. } => "worker_left",
            Self::Paused { .. } => "paused",
            Self::Finished(_) => "finished",
            Self::Stopped { .. } => "stopped",
            Self::Cancelled { .. } => "cancelled",
            Self::Failed { .. } => "failed",
        }
    }
}

/// A committed step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepEvent {
    /// The run.
    pub run: String,
    /// The step, from 1.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Mean loss over the step's scored tokens, in nats. NaN, in JSON `null`, where it is not finite and the step was
    /// skipped.
    #[serde(with = "anomaly::maybe_nan")]
    pub loss: f64,
    /// Norm of the mean gradient before clipping; likewise.
    #[serde(with = "anomaly::maybe_nan")]
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Tokens of the whole run so far.
    pub tokens: u64,
    /// Speed of this step.
    pub tokens_per_second: f64,
    /// Passes over the training split so far.
    pub epoch: f64,
    /// Whether the watchdog kept the update from the weights.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// The loss per byte of text, in bits; absent where a token has no bytes of its own, as in a classification.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Model FLOPs utilisation: the part of what the workers' processors can do, as each measured when it started, that
    /// went into the model. Absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinishedEvent {
    /// The run.
    pub run: String,
    /// The last step.
    pub step: u64,
    /// Mean loss of the last step; absent for a run without steps.
    pub train_loss: Option<f64>,
    /// Last validation loss, in nats per token.
    pub val_loss: Option<f64>,
    /// The same in bits per byte.
    pub val_bits_per_byte: Option<f64>,
    /// Tokens trained on in the whole run.
    pub tokens: u64,
    /// Time since the run was taken up, validations and checkpoints included.
    pub seconds: f64,
    /// Tokens trained on since then, over that time; absent for a run without steps.
    pub tokens_per_second: Option<f64>,
    /// Hash over all parameters and moments, in hex; absent for a run without steps.
    pub state_hash: Option<String>,
    /// The last checkpoint's directory; absent for a run without steps.
    pub checkpoint: Option<String>,
}

/// An event with its place in the coordinator's record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NumberedEvent {
    /// Grows with every event.
    pub id: u64,
    /// The event.
    pub event: RunEvent,
}

/// A checkpoint on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Updates that the state has seen.
    pub step: u64,
    /// Its directory, on the coordinator's machine.
    pub path: String,
    /// Size of all its files.
    pub bytes: u64,
    /// Validation loss at this step, in nats per token.
    pub val_loss: Option<f64>,
    /// Hash over all parameters and moments, in hex.
    pub state_hash: String,
}

/// The coordinator and who is with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Version of its binary.
    pub version: String,
    /// Its home directory, on its machine.
    pub home: String,
    /// The workers.
    pub workers: Vec<WorkerInfo>,
    /// The run that trains or waits for workers.
    pub active: Option<String>,
    /// The runs behind it, in order.
    pub queued: Vec<String>,
}

/// Whom a coordinator takes a caller for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whoami {
    /// Version of the coordinator's binary.
    pub version: String,
    /// What the coordinator's clock says, in milliseconds since the epoch.
    pub time_ms: u64,
    /// What the caller may do; `None` where nobody is told apart, and all may do everything.
    pub role: Option<Role>,
    /// The name of the token by which it came in.
    pub token: Option<String>,
    /// When that token ends, in seconds since the epoch, if it does.
    pub expires: Option<u64>,
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// Its name in messages, such as `w3`.
    pub name: String,
    /// Its host.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// What computes.
    pub device: String,
    /// Threads that compute.
    pub threads: u32,
    /// Lanes that it holds in the step in flight.
    pub lanes: usize,
}

/// A run and its figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// Its name.
    pub name: String,
    /// A word: `queued`, `running`, `paused`, `interrupted`, `finished`, `failed`, `cancelled`.
    pub status: String,
    /// Committed steps.
    pub step: u64,
    /// What it does.
    pub spec: RunSpec,
    /// What it started from, as the user named it.
    pub parent: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// When it was submitted, in milliseconds since the epoch.
    pub created_ms: u64,
    /// When it ended.
    pub finished_ms: Option<u64>,
    /// Its place in the queue; 1 is next.
    pub queue_place: Option<usize>,
    /// Workers that trained it when its newest step was committed; 0 before the first.
    #[serde(default)]
    pub workers: u32,
    /// The last committed step.
    pub last_step: Option<StepEvent>,
    /// Its validations.
    pub evals: Vec<EvalEvent>,
    /// Its checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointInfo>,
    /// What happened to its workers: the newest of it, oldest first.
    #[serde(default)]
    pub faults: Vec<FaultInfo>,
    /// What its newest state with samples wrote, by prompt.
    #[serde(default)]
    pub samples: Vec<SampleInfo>,
    /// What of it is in the coordinator's object store; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<StoredInfo>,
}

/// What of a run is in an object store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredInfo {
    /// The steps of its checkpoints there, oldest first.
    pub steps: Vec<u64>,
    /// Checkpoints that are still to be copied.
    pub waiting: usize,
    /// Why copying fails at present.
    pub problem: Option<String>,
}

/// Something that happened to a worker of a run, or that a run made good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultInfo {
    /// When, in milliseconds since the epoch.
    pub time_ms: u64,
    /// The step in flight, or the state's step between two.
    pub step: u64,
    /// The event's word: `worker_lost`, `redone`, `worker_joined`, `worker_left`.
    pub kind: String,
    /// The worker.
    pub worker: String,
    /// In plain words.
    pub text: String,
    /// How much later the step was committed because of it, where that is known.
    pub delay_ms: Option<u64>,
}

/// Queues a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Submit {
    /// What it does.
    pub spec: RunSpec,
    /// The name the user gave it.
    pub name: Option<String>,
    /// What its name begins with otherwise.
    pub stem: String,
    /// Go on with this run.
    pub resume: Option<String>,
    /// Make another even if an equal one is unfinished.
    pub fresh: bool,
    /// The checkpoint that it starts from, as the user named it.
    pub parent: Option<String>,
    /// Where the start weights are.
    pub start: Option<StartFiles>,
    /// What of the spec was derived, inherited or set by default, a line each, for people.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// Where the coordinator finds the weights that a run starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartFiles {
    /// A checkpoint in its home: `RUN@STEP`.
    Checkpoint(String),
    /// Files that were uploaded: name and BLAKE3 in hex.
    Uploaded(Vec<(String, String)>),
}

/// The answer to a submission.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Submitted {
    /// The run's name.
    pub run: String,
    /// The step it goes on from, if it was there before.
    pub resumed_at: Option<u64>,
    /// The last event before this submission: follow from here.
    pub after: u64,
}

/// A checkpoint, found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resolved {
    /// The run.
    pub run: String,
    /// The checkpoint.
    pub checkpoint: CheckpointInfo,
    /// What the run does.
    pub spec: RunSpec,
}

/// What was, or would be, deleted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Removed {
    /// The thing's name.
    pub name: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// Files on disk.
    pub files: u64,
}
