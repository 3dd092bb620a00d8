//! What coordinator and workers say to each other, as domain types. `wire` turns them into protobuf and back.

use std::ops::Range;
use std::sync::Arc;

use crate::aggregate::{ChunkDigest, RootTotals};
use crate::cluster::EvalSplit;
use crate::cluster::division::{Digests, Keeper};
use crate::cluster::links::Link;
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::ledger::Entry;
use crate::spec::RunSpec;

/// Where the state of a run comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateSource {
    /// Random weights from the spec's seed.
    Seed,
    /// The weights that a finetuning run starts from, with zero moments.
    Start,
    /// The run's own checkpoint of this step.
    Checkpoint(Step),
    /// What the worker itself still holds in memory from an earlier session.
    Held(Step),
}

impl StateSource {
    /// Updates that this state has seen.
    pub fn step(self) -> Step {
        match self {
            Self::Seed | Self::Start => 0,
            Self::Checkpoint(step) | Self::Held(step) => step,
        }
    }
}

/// Who sums the gradient in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owners {
    /// The coordinator.
    Coordinator,
    /// The worker that is told, which is alone: nothing travels.
    Alone,
    /// Workers, a slice each.
    Shares(Shares),
}

/// Who sums what of a gradient. Clones share it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Who owns what: in index order the whole gradient, of two workers at least.
    pub slices: Arc<[Share]>,
    /// Where workers that are near each other add up first what goes to others: all sites, of two at least. Else there is none,
    /// and everybody pushes to the owners.
    pub sites: Arc<[Site]>,
}

/// Slices, and no sites.
impl From<Arc<[Share]>> for Shares {
    fn from(slices: Arc<[Share]>) -> Self {
        let sites = Arc::new([]);
        Self { slices, sites }
    }
}

/// Workers that are near each other, in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// All of them.
    pub workers: Vec<SessionId>,
    /// Lanes that were theirs when the step began, ascending.
    pub lanes: Vec<Range<Lane>>,
    /// Who of them sums these lanes of which chunks: in index order the whole gradient. Each gathers the slice that it owns, too.
    pub gathers: Vec<Share>,
}

/// A part of the gradient that is one worker's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The worker.
    pub session: SessionId,
    /// Its chunks.
    pub chunks: Range<u32>,
}

impl Share {
    /// Its chunks, as indices.
    pub fn range(&self) -> Range<usize> {
        self.chunks.start as usize..self.chunks.end as usize
    }
}

/// Another worker of a run, which may push.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its session.
    pub session: SessionId,
    /// Where it can be pushed to, such as `10.0.0.7:40123`, if it can.
    pub address: Option<String>,
}

/// A state that a worker is to get.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadState {
    /// The run.
    pub run: RunId,
    /// What is trained.
    pub spec: Arc<RunSpec>,
    /// Where the state comes from.
    pub source: StateSource,
    /// What validations score.
    pub splits: Arc<[EvalSplit]>,
    /// Which moments this worker keeps, where they are divided; else all.
    pub keeper: Option<Keeper>,
    /// Whether lanes that it has computed for the step after this state are still good.
    pub lanes_stay: bool,
}

/// From the coordinator to one worker.
#[derive(Clone, Debug, PartialEq)]
pub enum ToWorker {
    /// Get a run's state and answer [`FromWorker::Loaded`].
    Load(LoadState),
    /// Compute lanes of the step after the state's; none, where this worker only owns a slice.
    Compute {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// Version of the assignment.
        generation: u64,
        /// The lanes, ascending.
        lanes: Vec<Lane>,
        /// Who sums the gradient.
        owners: Owners,
    },
    /// The coordinator sums this step from now on: everything that was computed for it is pushed there.
    Collect {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
    },
    /// What is new of the others that train the run: who may push here, and who can be pushed to. Answered by
    /// [`FromWorker::Reaches`], now and whenever it changes.
    Peers {
        /// The run.
        run: RunId,
        /// Those that are there no more.
        gone: Vec<SessionId>,
        /// Those that are new, or can be pushed to from now on.
        peers: Vec<Peer>,
    },
    /// Others have computed these lanes: what is not begun need not be.
    Skip {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// The lanes, ascending.
        lanes: Vec<Lane>,
    },
    /// Apply a step's root, or pass over it where the entry says so.
    Commit {
        /// The run.
        run: RunId,
        /// How.
        commit: Commit,
    },
    /// Score units of a split, or write after its prompts.
    Evaluate {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// Index of the split.
        split: u32,
        /// Units, ascending.
        units: Vec<u32>,
    },
    /// Copy the state and upload it.
    Snapshot {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// Where moments are divided: the slices that this worker is to upload, perhaps none. It says
        /// [`FromWorker::Digested`], too.
        slices: Option<Vec<Range<u32>>>,
    },
    /// The owner of a slice is lost: its second holder sends the parameters to whoever has not got them.
    Serve {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// The slice.
        chunks: Range<u32>,
    },
    /// Forget the run.
    Unload {
        /// The run.
        run: RunId,
    },
    /// The coordinator is alive.
    Ping {
        /// Time between two signs of life, from now on.
        heartbeat_ms: u32,
    },
}

/// The decision that makes a step count.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    /// What the worker keeps of the ledger's entry, to present it when it comes back.
    pub proof: Proof,
    /// Factor of the root gradient: clip / Σ weight.
    pub scale: f64,
    /// Updates that the state has seen once this commit is applied: the optimizer's count. A step that the entry says to
    /// skip is none.
    pub updates: u64,
    /// Whether the state after the update is to be hashed.
    pub hash_state: bool,
    /// The entries up to this step are where they outlive the coordinator; the later ones are kept for it.
    pub safe: Step,
}

impl Commit {
    /// The step.
    pub fn step(&self) -> Step {
        self.proof.step
    }
}

/// Lanes of the largest run whose entries go to every worker as they are. An entry grows with the lanes, and so would what
/// a coordinator sends in a step with the square of the cluster.
pub const WHOLE_ENTRIES: usize = 256;

/// What shows that a state is of a run: the ledger's entry of the last step that it has seen, or what stands for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Proof {
    /// The step.
    pub step: Step,
    /// The entry's hash.
    pub hash: [u8; 32],
    /// Learning rate of its update.
    pub learning_rate: f64,
    /// Whether its update is passed over.
    pub skipped: bool,
    /// All of it, in runs of at most [`WHOLE_ENTRIES`] lanes: it goes out before it is durable, and a worker brings it to a
    /// coordinator that has lost it. Of larger runs it is durable before anybody hears of the step.
    pub entry: Option<Arc<Entry>>,
}

impl Proof {
    /// What workers are given of an entry.
    pub fn of(entry: &Arc<Entry>) -> Self {
        let whole = entry.lanes.len() <= WHOLE_ENTRIES;
        Self {
            step: entry.step,
            hash: entry.hash(),
            learning_rate: entry.learning_rate,
            skipped: entry.skipped,
            entry: whole.then(|| entry.clone()),
        }
    }
}

/// What a worker still has in memory when it registers again.
#[derive(Clone, Debug, PartialEq)]
pub struct Holding {
    /// The run.
    pub run: RunId,
    /// Of the last step that its state has seen.
    pub proof: Proof,
    /// Entries of steps before that one, ascending and without a gap up to it: those that may not have outlived the
    /// coordinator.
    pub earlier: Vec<Arc<Entry>>,
    /// Lanes of the next step whose gradients it has computed, ascending.
    pub lanes: Vec<Lane>,
    /// Which moments it keeps, if not all.
    pub keeper: Option<Keeper>,
}

/// From a worker to the coordinator. All but `Heartbeat` and `Leaving` are about the run in `run`.
#[derive(Clone, Debug, PartialEq)]
pub enum FromWorker {
    /// The process is alive.
    Heartbeat,
    /// The process was asked to end, and wants to hand over.
    Leaving,
    /// The state is in memory.
    Loaded {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// The state's hash; `None` where there are no moments, or only a part of them.
        state_hash: Option<[u8; 32]>,
    },
    /// A lane is computed.
    LaneDone {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// The lane.
        lane: Lane,
        /// What it found.
        sums: LaneSums,
        /// Time it took, in microseconds.
        micros: u64,
    },
    /// A sole owner has the root.
    RootReady {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// Norm and hash.
        totals: RootTotals,
    },
    /// The peers to which this worker can push now.
    Reaches {
        /// The run.
        run: RunId,
        /// Their sessions.
        peers: Vec<SessionId>,
    },
    /// How fast the way to a peer is.
    Link {
        /// The run.
        run: RunId,
        /// The peer.
        peer: SessionId,
        /// What was measured.
        link: Link,
    },
    /// An owner holds these lanes for every chunk of its slice.
    Held {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// The lanes.
        lanes: Vec<Lane>,
    },
    /// An owner has the root of its slice.
    SliceReady {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// Those of its chunks, in index order.
        digests: Vec<ChunkDigest>,
    },
    /// This worker has every slice's root.
    RootHeld {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
    },
    /// What a worker that keeps a part of the moments has found of its state. Comes before it says that the state is loaded
    /// or the commit applied.
    Digested {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// What it has found.
        digests: Digests,
    },
    /// A commit is applied.
    Applied {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// The hash of the state, if it was asked for.
        state_hash: Option<[u8; 32]>,
    },
    /// A unit is scored, or written.
    UnitDone {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// Index of the split.
        split: u32,
        /// The unit.
        unit: u32,
        /// What it found.
        found: Found,
    },
    /// The state of this step could not be uploaded.
    SnapshotLost {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
    },
    /// The run cannot go on here.
    Failed {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// For people.
        message: String,
        /// Whether another worker may be able to: a file could not be fetched, a disk is full.
        only_here: bool,
    },
}

/// Sums over scored tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LaneSums {
    /// Σ weight · negative log-likelihood, in nats.
    pub loss: f64,
    /// Σ weight.
    pub weight: f64,
}

/// What a unit of a split gave.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// Of text: its scores.
    Scores(Scores),
    /// Of a prompt: the tokens that follow it.
    Written(Vec<u32>),
}

/// What scoring a unit, or a whole validation, found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// Loss and weight.
    pub sums: LaneSums,
    /// Of a classifier: samples by label (rows) and by the label they were given (columns), row by row; else empty.
    pub confusion: Vec<u64>,
}

impl Scores {
    /// Takes in those of the next unit, in unit order.
    pub fn add(&mut self, other: &Self) {
        self.sums.loss += other.sums.loss;
        self.sums.weight += other.sums.weight;
        let longer = self.confusion.len().max(other.confusion.len());
        self.confusion.resize(longer, 0);
        for (sum, count) in self.confusion.iter_mut().zip(&other.confusion) {
            *sum = sum.saturating_add(*count);
        }
    }
}
