//! The read model: what a person sees of a cluster and of a run. Web page, terminal, Prometheus and files all show
//! these values, so that no two of them can disagree.

use serde::{Deserialize, Serialize};

use super::RunInfo;
use crate::corpus::Baselines;

/// A cluster at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterView {
    /// Version of the coordinator's binary.
    pub version: String,
    /// Its home directory, on its machine.
    pub home: String,
    /// The moment, in milliseconds since the epoch.
    pub now_ms: u64,
    /// When the coordinator was started, in milliseconds since the epoch.
    pub started_ms: u64,
    /// The workers, in the order in which they joined.
    pub workers: Vec<WorkerView>,
    /// The run that trains or waits for workers.
    pub active: Option<String>,
    /// The runs behind it, in order.
    pub queued: Vec<String>,
    /// The coordinator's machine.
    pub system: SystemView,
}

/// A worker, and what it did in the last seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerView {
    /// Its name in messages, such as `w3`.
    pub name: String,
    /// Its host.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// What computes, such as `cpu` or `cuda:0`.
    pub device: String,
    /// Threads that compute.
    pub threads: u32,
    /// Lanes that it holds in the step in flight.
    pub lanes: usize,
    /// When it joined, in milliseconds since the epoch.
    pub joined_ms: u64,
    /// Tokens that it computed, a second; absent before it has computed any.
    pub tokens_per_second: Option<f64>,
    /// How its time went.
    pub times: Option<TimeSplit>,
    /// Why the others wait for it, in words; absent for all but a straggler.
    pub straggler: Option<String>,
    /// Floating-point operations that its processor does in a second, as it measured with a matrix product when it started.
    pub peak_flops: Option<f64>,
    /// Part of that which went into the model.
    pub mfu: Option<f64>,
    /// Memory that its process has in use.
    pub rss_bytes: Option<u64>,
    /// Cores that its process keeps busy.
    pub cores: Option<f64>,
    /// Bytes of gradients and roots that it sent, a second; none where memory is shared.
    pub sent_per_second: Option<f64>,
    /// The same, received.
    pub received_per_second: Option<f64>,
    /// Bytes a second that its line takes in its slower direction, as measured with the other workers of the run that trains.
    pub line_bytes_per_second: Option<u64>,
    /// There and back to the nearest of them, in milliseconds.
    pub line_rtt_ms: Option<f64>,
}

/// Shares of a worker's time; their sum is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TimeSplit {
    /// It computed: lanes, updates, validations.
    pub compute: f64,
    /// It sent sums or received roots, and computed nothing.
    pub exchange: f64,
    /// It had nothing to do: others computed.
    pub wait: f64,
    /// It waited for text.
    pub data: f64,
}

/// The machine of a process; absent figures are those that the platform does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SystemView {
    /// Cores of the machine.
    pub cpus: Option<u32>,
    /// Processes that want a core, averaged over a minute.
    pub load: Option<f64>,
    /// Cores that the coordinator's process keeps busy.
    pub cores: Option<f64>,
    /// Memory that it has in use.
    pub rss_bytes: Option<u64>,
    /// Memory of the machine that is free or can be freed.
    pub memory_available_bytes: Option<u64>,
    /// Memory of the machine.
    pub memory_bytes: Option<u64>,
    /// Free bytes of the disk with the home directory.
    pub disk_free_bytes: Option<u64>,
    /// All bytes of that disk.
    pub disk_bytes: Option<u64>,
    /// What went over the workers' control connections.
    #[serde(default)]
    pub control: ControlView,
}

/// What went over the control connections of all workers since the coordinator was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ControlView {
    /// Messages to workers.
    pub messages_sent: u64,
    /// Their bytes, before they are framed.
    pub bytes_sent: u64,
    /// Messages from workers.
    pub messages_received: u64,
    /// Their bytes.
    pub bytes_received: u64,
}

/// A run as a row of a list; figures that are not known are absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Its name.
    pub name: String,
    /// A word: `queued`, `running`, `paused`, `interrupted`, `finished`, `failed`, `cancelled`.
    pub status: String,
    /// A word: `pretrain`, `finetune`, `eval`.
    pub kind: String,
    /// Committed steps.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Mean loss of the last step, in nats.
    pub loss: Option<f64>,
    /// The last validation loss, in nats.
    pub val_loss: Option<f64>,
    /// Speed of the last step.
    pub tokens_per_second: Option<f64>,
    /// Parameters of the model.
    pub parameters: Option<u64>,
    /// When it was submitted, in milliseconds since the epoch.
    pub created_ms: u64,
    /// When it ended.
    pub finished_ms: Option<u64>,
    /// Its place in the queue; 1 is next.
    pub queue_place: Option<usize>,
    /// What it started from, as the user named it.
    pub parent: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

/// A run with everything but the history of its steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunView {
    /// Its figures, spec, validations and checkpoints.
    pub info: RunInfo,
    /// What does not change while it trains.
    pub facts: RunFacts,
    /// What happened to it, without steps and validations: the newest of it, oldest first.
    pub timeline: Vec<TimelineEntry>,
    /// What its prompts gave: the newest of it, by step and prompt.
    pub samples: Vec<SampleInfo>,
    /// Time until its last step at the present speed; absent where it does not train.
    pub eta_seconds: Option<f64>,
    /// How often something happened to its workers, by kind.
    #[serde(default)]
    pub fault_totals: Vec<FaultTotal>,
}

/// How often something of one kind happened to the workers of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultTotal {
    /// The event's word, such as `worker_lost`.
    pub kind: String,
    /// How often.
    pub count: u64,
    /// How much later steps were committed because of it, all together.
    pub delay_ms: u64,
}

/// What is known of a run from its submission on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunFacts {
    /// What of the spec was derived, inherited or set by default, a line each.
    pub notes: Vec<String>,
    /// Parameters of the model.
    pub parameters: u64,
    /// Those that are trained.
    pub trained: u64,
    /// Floating-point operations of a training step for one token.
    pub flops_per_token: f64,
    /// For people: the corpus' name.
    pub corpus: String,
    /// Tokens of the training split.
    pub train_tokens: u64,
    /// Samples of one epoch.
    pub epoch_samples: u64,
    /// Bytes of text in a token of the training split, on average; absent in a classification.
    pub bytes_per_token: Option<f64>,
    /// What counting alone would lose on the validation split, to be drawn beside the loss.
    pub baselines: Option<Baselines>,
}

/// Something that happened to a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimelineEntry {
    /// Its number; grows.
    pub id: u64,
    /// When, in milliseconds since the epoch.
    pub time_ms: u64,
    /// The step at which; absent before the first.
    pub step: Option<u64>,
    /// The event's word, such as `worker_lost`.
    pub kind: String,
    /// In plain words.
    pub text: String,
    /// The worker that it is about.
    pub worker: Option<String>,
    /// How much later a step was committed because of it, where that is known.
    pub cost_ms: Option<u64>,
}

/// What the model of a step writes after a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleInfo {
    /// The run.
    pub run: String,
    /// Updates that the model has seen.
    pub step: u64,
    /// The prompt's place in the spec, from 0.
    pub index: u32,
    /// The prompt.
    pub prompt: String,
    /// What follows it.
    pub text: String,
}

/// Asks for the history of a run's steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryRequest {
    /// The run.
    pub run: String,
    /// The first step that is wanted; absent for the first of all.
    pub from: Option<u64>,
    /// The last step that is wanted; absent for the newest.
    pub to: Option<u64>,
    /// How many points at most. More steps than that are put together.
    pub points: usize,
}

/// The history of a run's steps, point by point; all lists are of the same length. A point stands for one step or for
/// several that follow each other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// The run.
    pub run: String,
    /// Steps that were asked for and are there.
    pub rows: u64,
    /// Each point's last step.
    pub step: Vec<u64>,
    /// Tokens of the whole run after it.
    pub tokens: Vec<u64>,
    /// When it was committed, in milliseconds since the epoch.
    pub time_ms: Vec<u64>,
    /// Mean loss, in nats.
    pub loss: Band,
    /// Gradient norm before clipping.
    pub grad_norm: Band,
    /// Learning rate.
    pub learning_rate: Band,
    /// Speed of the cluster.
    pub tokens_per_second: Band,
    /// Model FLOPs utilisation.
    pub mfu: Band,
}

/// One metric's values; `None` where it is not known or not finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Band {
    /// Means over each point's steps.
    pub mean: Vec<Option<f32>>,
    /// The lowest; empty where every point is one step.
    pub min: Vec<Option<f32>>,
    /// The highest; empty where every point is one step.
    pub max: Vec<Option<f32>>,
}
