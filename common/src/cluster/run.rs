//! The progress of the one run that is training: its plan, its phase, and the bookkeeping of a step in flight.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::aggregate::RootTotals;
use crate::cluster::messages::{LaneSums, StateSource};
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::spec::RunSpec;

/// A split that validations score, cut into units that are handed out, redone and summed like lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalSplit {
    /// Fingerprint of the corpus.
    pub corpus: String,
    /// Which part of it.
    pub split: String,
    /// Name in events: `validation`, `base_validation`.
    pub label: String,
    /// Number of units.
    pub units: u32,
    /// Windows in one unit; the last unit may have fewer.
    pub windows: u32,
    /// Whether it is scored at the start and the end only.
    pub ends_only: bool,
}

/// What the machine must know to carry a run from where it stands to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct RunPlan {
    /// The run.
    pub run: RunId,
    /// What is trained.
    pub spec: Arc<RunSpec>,
    /// What validations score.
    pub splits: Arc<[EvalSplit]>,
    /// Where the state comes from at first.
    pub source: StateSource,
}

/// Where the active run is.
#[derive(Debug)]
pub(super) enum Phase {
    /// Not enough workers yet.
    Gathering,
    /// These sessions are loading the state of the boundary.
    Loading(BTreeSet<SessionId>),
    /// A step is in flight.
    Stepping(StepInFlight),
    /// A validation is in flight.
    Evaluating(EvalInFlight),
    /// Waits for the checkpoint of this boundary, for this reason.
    Snapshotting(SnapshotReason),
}

/// Why training stands until a checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SnapshotReason {
    /// The last one of the run.
    Final,
    /// The user stops the run.
    Stop,
    /// Workers that joined need it.
    Join,
    /// It is due and the one before is still being written.
    Backlog,
}

/// The active run.
#[derive(Debug)]
pub(super) struct Active {
    pub plan: RunPlan,
    pub phase: Phase,
    /// Committed steps.
    pub step: Step,
    /// Where a worker that has no state can get one: the newest checkpoint, or the start.
    pub durable: StateSource,
    /// The checkpoint that is being written: its step and the worker that uploads it.
    pub writing: Option<(Step, SessionId)>,
    /// What is still to do at this boundary.
    pub boundary: Boundary,
    /// Workers whose state is that of `step` once they have worked off their messages.
    pub ready: BTreeSet<SessionId>,
    /// Version of the assignment.
    pub generation: u64,
    pub stop_requested: bool,
    pub last_loss: f64,
    pub tokens: f64,
}

/// What a boundary still owes.
#[derive(Debug, Default)]
pub(super) struct Boundary {
    /// Splits to score, last first.
    pub evals: Vec<u32>,
    /// Whether a checkpoint is due.
    pub checkpoint: bool,
}

/// A step between its announcement and its commit.
#[derive(Debug)]
pub(super) struct StepInFlight {
    pub step: Step,
    /// Lanes that each session was given.
    pub assigned: BTreeMap<SessionId, BTreeSet<Lane>>,
    pub sole_owner: Option<SessionId>,
    pub sums: Vec<Option<LaneSums>>,
    pub delivered: BTreeSet<Lane>,
    pub root: Option<RootTotals>,
    pub started_ms: u64,
}

impl StepInFlight {
    /// Whether a lane needs nobody any more: the owner holds its gradient, and its sums are known.
    pub fn settled(&self, lane: Lane) -> bool {
        self.delivered.contains(&lane) && self.sums[lane as usize].is_some()
    }

    /// Lanes of a session that are not settled, ascending.
    pub fn open_lanes(&self, session: SessionId) -> Vec<Lane> {
        let lanes = self.assigned.get(&session).into_iter().flatten();
        lanes.copied().filter(|&l| !self.settled(l)).collect()
    }

    /// Whether nothing is missing for the commit.
    pub fn complete(&self) -> Option<RootTotals> {
        self.root.filter(|_| self.sums.iter().all(Option::is_some))
    }
}

/// A validation between its announcement and its sum.
#[derive(Debug)]
pub(super) struct EvalInFlight {
    pub split: u32,
    pub assigned: BTreeMap<SessionId, BTreeSet<u32>>,
    pub sums: Vec<Option<LaneSums>>,
}

impl Active {
    pub fn new(plan: RunPlan) -> Self {
        let mut active = Self {
            phase: Phase::Gathering,
            step: plan.source.step(),
            durable: plan.source,
            writing: None,
            boundary: Boundary::default(),
            ready: BTreeSet::new(),
            generation: 0,
            stop_requested: false,
            last_loss: f64::NAN,
            tokens: 0.0,
            plan,
        };
        active.enter_boundary();
        active
    }

    /// Whether the state stands at the last step.
    pub fn at_end(&self) -> bool {
        self.step >= self.plan.spec.train.steps
    }

    /// Computes what this boundary owes. A state that came from a checkpoint owes nothing: validations precede the
    /// checkpoint of their boundary, so its figures are recorded.
    pub fn enter_boundary(&mut self) {
        let have = self.step > 0 && self.durable.step() == self.step;
        let train = &self.plan.spec.train;
        let at_start = self.step == 0;
        let end = self.at_end();
        let due = train.eval_every > 0 && self.step.is_multiple_of(train.eval_every);
        self.boundary.evals = self
            .plan
            .splits
            .iter()
            .enumerate()
            .filter(|(_, split)| !have && (at_start || end || (due && !split.ends_only)))
            .map(|(i, _)| i as u32)
            .rev()
            .collect();
        let every = self.plan.spec.checkpoint.every;
        let checkpoint_due = end || (every > 0 && self.step.is_multiple_of(every));
        self.boundary.checkpoint |= !have && !at_start && checkpoint_due;
    }
}
