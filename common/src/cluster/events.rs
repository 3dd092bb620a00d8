//! What happens to the coordinator's machine, what it orders, and the reasons it gives.

use std::fmt;
use std::sync::Arc;

use crate::aggregate::RootTotals;
use crate::cluster::messages::{FromWorker, Holding, Scores, ToWorker};
use crate::cluster::run::RunPlan;
use crate::cluster::watchdog::{Anomaly, Pause};
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::ledger::Entry;

/// What is known of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberInfo {
    /// Host name, for people.
    pub host: String,
    /// Process id, for people.
    pub pid: u32,
    /// Device that computes.
    pub device: String,
    /// Threads that compute.
    pub threads: u32,
    /// What decides the bits of a result.
    pub fingerprint: String,
    /// Where others can push gradients to it, if they can.
    pub listens: Option<String>,
    /// Which site it is of, if it was told.
    pub site: Option<String>,
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftReason {
    /// The connection closed.
    ConnectionClosed,
    /// Nothing was heard within the deadline.
    Silent {
        /// How long.
        for_ms: u64,
    },
    /// It computes with other bits than the cluster.
    Fingerprint {
        /// Its fingerprint.
        found: String,
        /// The cluster's.
        expected: String,
    },
    /// Its state is not that of the others.
    Deviated {
        /// The step after which it differs.
        step: Step,
    },
    /// It could not get the state of a run.
    Unable(String),
    /// It asked to go.
    Farewell,
    /// It did not keep up with its messages, or broke the protocol.
    Protocol(String),
}

impl fmt::Display for LeftReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConnectionClosed => f.write_str("connection closed"),
            Self::Silent { for_ms } => write!(f, "silent for {for_ms} ms"),
            Self::Fingerprint { found, expected } => write!(
                f,
                "its numerics `{found}` differ from the cluster's `{expected}`, so its results would differ; use one build on one kind of processor"
            ),
            Self::Deviated { step } => write!(
                f,
                "its state after step {step} differs from that of the others: its machine computes or remembers wrongly"
            ),
            Self::Unable(what) => write!(f, "it cannot take part: {what}"),
            Self::Farewell => f.write_str("it was asked to go and has handed over"),
            Self::Protocol(what) => f.write_str(what),
        }
    }
}

/// What happens to the machine.
#[derive(Clone, Debug)]
pub enum Event {
    /// A worker asks to join.
    Joined {
        /// Its session, never used before.
        session: SessionId,
        /// What it says of itself.
        info: MemberInfo,
        /// What it still has in memory.
        holding: Option<Holding>,
    },
    /// A worker said something.
    Said {
        /// Who.
        session: SessionId,
        /// What.
        message: FromWorker,
    },
    /// These workers gave a sign of life, and said nothing else.
    Heard(Vec<SessionId>),
    /// A session ended.
    Left {
        /// Who.
        session: SessionId,
        /// Why.
        reason: LeftReason,
    },
    /// Time passes.
    Tick,
    /// A run is queued.
    Submitted(RunPlan),
    /// A run is to end for good.
    Cancelled(RunId),
    /// A run is to be checkpointed and stopped.
    StopRequested(RunId),
    /// A run is to be checkpointed at the next boundary where that is possible, and to go on.
    CheckpointRequested(RunId),
    /// The entries of a run's ledger up to this step are where they outlive this machine.
    Shipped {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
    },
    /// The coordinator's exchange holds every chunk of these lanes.
    Delivered {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// The lanes.
        lanes: Vec<Lane>,
    },
    /// The coordinator's exchange holds the whole root.
    RootComplete {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// Norm and hash.
        totals: RootTotals,
    },
    /// A checkpoint is on disk.
    CheckpointWritten {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// The hash of the state that was written.
        state_hash: [u8; 32],
    },
    /// A checkpoint could not be written, for a reason that another worker would not mend.
    CheckpointFailed {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// For people.
        error: String,
    },
    /// A checkpoint's upload broke off; another can be asked for.
    CheckpointLost {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
    },
    /// The driver cannot carry a run on.
    RunBroken {
        /// The run.
        run: RunId,
        /// For people.
        error: String,
    },
}

/// What the driver must do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send a message to a worker.
    Send {
        /// To whom.
        session: SessionId,
        /// What.
        message: ToWorker,
    },
    /// Send one message to many workers.
    SendAll {
        /// To whom.
        sessions: Vec<SessionId>,
        /// What.
        message: ToWorker,
    },
    /// End a session: its messages are refused from now on.
    Close {
        /// Whose.
        session: SessionId,
        /// Why.
        reason: LeftReason,
    },
    /// Get ready to sum a step's contributions.
    OpenStep {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
    },
    /// Nobody needs the roots of the steps up to here any more.
    ReleaseRoots {
        /// The run.
        run: RunId,
        /// Newest step that nobody needs.
        through: Step,
    },
    /// The lanes are given out anew, from this step on.
    Assigned {
        /// The run.
        run: RunId,
        /// The first step.
        step: Step,
        /// Version of the assignment.
        generation: u64,
        /// Who has which lanes.
        lanes: Vec<(SessionId, Vec<Lane>)>,
    },
    /// Record a committed step.
    Committed(StepRecord),
    /// Take the entries after this step back: what they were made from may be wrong.
    Withdraw {
        /// The run.
        run: RunId,
        /// The newest step that stays.
        after: Step,
    },
    /// Delete a checkpoint that is not what the workers hold.
    DropCheckpoint {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
    },
    /// Record a checkpoint: it is on disk, and its state is the one that the workers agree on.
    CheckpointGood {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
    },
    /// Record a validation.
    Evaluated {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// Index of the split.
        split: u32,
        /// What it found.
        scores: Scores,
    },
    /// Record what the model of a step has written after the prompts of a split.
    Sampled {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// The tokens after each prompt.
        written: Vec<Vec<u32>>,
    },
    /// Tell people that a step was out of the ordinary.
    Unusual {
        /// The run.
        run: RunId,
        /// What, and what becomes of the step.
        anomaly: Anomaly,
    },
    /// Tell people and the store what became of a run.
    Changed {
        /// The run.
        run: RunId,
        /// What.
        change: Change,
    },
    /// Tell people and the store what happened to a worker of a run, and what it cost.
    Happened {
        /// The run.
        run: RunId,
        /// What.
        what: Happening,
    },
    /// Tell people.
    Note {
        /// The run it is about, if any.
        run: Option<RunId>,
        /// In plain words.
        text: String,
    },
}

impl Action {
    /// The run that has moved, and where to, if this says that one has.
    pub fn progress(&self) -> Option<(&RunId, Step)> {
        match self {
            Self::Committed(record) => Some((&record.run, record.entry.step)),
            Self::Evaluated { run, step, .. } | Self::CheckpointGood { run, step } => {
                Some((run, *step))
            }
            _ => None,
        }
    }
}

/// A committed step, as recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRecord {
    /// The run.
    pub run: RunId,
    /// What the ledger keeps.
    pub entry: Arc<Entry>,
    /// From the announcement to the commit; `None` if another coordinator committed it.
    pub millis: Option<u64>,
    /// Workers that train the run.
    pub workers: usize,
}

/// What happened to a worker of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Happening {
    /// It is gone.
    Lost {
        /// Who.
        session: SessionId,
        /// The step in flight, or the state's.
        step: Step,
        /// Why.
        reason: LeftReason,
    },
    /// Its lanes were computed by others.
    Redone(Redone),
    /// It takes part from the next step on.
    Joined {
        /// Who.
        session: SessionId,
        /// The state's step.
        step: Step,
        /// Updates that it replayed.
        replayed: u64,
    },
    /// It was asked to go, and has handed over.
    Left {
        /// Who.
        session: SessionId,
        /// The state's step.
        step: Step,
    },
}

/// Lanes that were computed by others than those who had them.
#[derive(Clone, Debug, PartialEq)]
pub struct Redone {
    /// The step.
    pub step: Step,
    /// Who had them.
    pub from: SessionId,
    /// Why they were given away.
    pub reason: RedoReason,
    /// Each lane and who got it, in the order of giving.
    pub lanes: Vec<(Lane, SessionId)>,
    /// How much later the step was committed than the other lanes were complete.
    pub delay_ms: u64,
}

/// Why lanes were given to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedoReason {
    /// Their worker was lost.
    Lost(LeftReason),
    /// An idle worker could have them sooner.
    Late,
}

impl RedoReason {
    /// One word, for tables.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Lost(_) => "lost",
            Self::Late => "late",
        }
    }
}

impl fmt::Display for RedoReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(reason) => reason.fmt(f),
            Self::Late => f.write_str("late"),
        }
    }
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// It is in the queue; 1 is next.
    Queued {
        /// Its place.
        place: usize,
    },
    /// It is first in line and waits for workers.
    Waiting {
        /// Workers that are there.
        have: usize,
        /// Workers that it asks for.
        need: u32,
    },
    /// Workers are getting its state.
    Loading {
        /// How many.
        workers: usize,
        /// The state's step.
        step: Step,
    },
    /// It trains.
    Training {
        /// On how many workers.
        workers: usize,
    },
    /// All steps are done and checkpointed.
    Finished {
        /// The last step.
        step: Step,
        /// Mean loss of the last step.
        train_loss: f64,
    },
    /// It was stopped and can be resumed.
    Stopped {
        /// Where it stands.
        step: Step,
    },
    /// The watchdog lets it rest until it is resumed.
    Paused {
        /// Where it stands.
        step: Step,
        /// Why.
        reason: Pause,
    },
    /// It was cancelled.
    Cancelled,
    /// It cannot go on.
    Failed {
        /// For people.
        error: String,
    },
}

impl Change {
    /// Whether the run does nothing more for now.
    pub fn rests(&self) -> bool {
        match self {
            Self::Queued { .. }
            | Self::Waiting { .. }
            | Self::Loading { .. }
            | Self::Training { .. } => false,
            Self::Finished { .. }
            | Self::Stopped { .. }
            | Self::Paused { .. }
            | Self::Cancelled
            | Self::Failed { .. } => true,
        }
    }
}
