//! The progress of the one run that is training: its plan, its phase, and the bookkeeping of what is in flight.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::aggregate::RootTotals;
use crate::cluster::agreement::Votes;
use crate::cluster::division::{Digests, Division};
use crate::cluster::events::Redone;
use crate::cluster::hands::Hands;
use crate::cluster::messages::{Commit, Found, LaneSums, Proof, StateSource};
use crate::cluster::sharing::{Introduced, Ownership, Patience};
use crate::cluster::verdict::{Losses, Verdict, may_end_early};
use crate::cluster::watchdog::{History, Pause};
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::layout::CHUNK_LEN;
use crate::ledger::{Chain, Entry, state_hash_due};
use crate::schedule::gradient_scale;
use crate::spec::RunSpec;

/// Entries of committed steps that are kept in any case, so that a worker which comes back can prove its state.
const PROOFS: Step = 8;

/// What validations do with the state, cut into units that are handed out, redone and put together like lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalSplit {
    /// Name in events: `validation`, `base_validation`, `samples`.
    pub label: String,
    /// Number of units.
    pub units: u32,
    /// It is due at each so-manieth validation, and at the start and the end; 0 is at these only.
    pub every: u64,
    /// What is done with each unit.
    pub work: EvalWork,
}

/// What is done with the units of a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvalWork {
    /// Text is scored.
    Score {
        /// Fingerprint of the corpus.
        corpus: String,
        /// Which part of it.
        split: String,
        /// Windows in one unit; the last unit may have fewer.
        windows: u32,
    },
    /// The model writes after prompts, one in each unit, as the run's spec says.
    Write {
        /// The prompts.
        prompts: Vec<Prompt>,
        /// Tokens that end what is written.
        ends: Vec<u32>,
    },
}

/// What a model writes after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Tokens that are written, at most.
    pub most: u32,
}

impl EvalSplit {
    /// Whether it has a loss.
    pub fn scores(&self) -> bool {
        matches!(self.work, EvalWork::Score { .. })
    }
}

/// The label of a run's own validation.
pub const OWN_SPLIT: &str = "validation";
/// The label of the validation of the run that a run started from.
pub const BASE_SPLIT: &str = "base_validation";
/// The label of what a run writes after its prompts.
pub const SAMPLES_SPLIT: &str = "samples";

/// What the machine must know to carry a run from where it stands to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct RunPlan {
    /// The run.
    pub run: RunId,
    /// What is trained.
    pub spec: Arc<RunSpec>,
    /// What validations score, and what is written then.
    pub splits: Arc<[EvalSplit]>,
    /// The newest state on disk.
    pub source: StateSource,
    /// The ledger up to that state.
    pub chain: Chain,
    /// The newest entries of the ledger, ascending; they may be younger than the state on disk.
    pub recent: Vec<Arc<Entry>>,
    /// Workers that trained the run when it was last seen, and may come back with a younger state; 0 if none can.
    pub expected: usize,
    /// Roots of committed steps that the coordinator may hold for workers that catch up, at least 2.
    pub retain: Step,
    /// Chunks of the gradient.
    pub chunks: u32,
    /// What its validations have found, those younger than that state included: workers may bring back a younger one.
    pub losses: Losses,
    /// What its ledger says of the steps so far, those younger than that state included.
    pub history: History,
    /// The step up to which its ledger is known to outlive the coordinator's machine; `None` where it is only ever on that
    /// machine's disk.
    pub shipped: Option<Step>,
}

impl RunPlan {
    /// Bytes of a gradient as it is sent, its last chunk counted as a whole one.
    pub(super) fn gradient_bytes(&self) -> u64 {
        let elements = self.chunks as usize * CHUNK_LEN;
        self.spec.train.payload.bytes(elements) as u64
    }
}

/// Where the active run is.
#[derive(Debug)]
pub(super) enum Phase {
    /// Not enough workers yet, or those that may come back are waited for.
    Gathering,
    /// These sessions are getting the state of the boundary.
    Loading(BTreeSet<SessionId>),
    /// A step is in flight.
    Stepping(StepInFlight),
    /// A validation is in flight.
    Evaluating(EvalInFlight),
    /// Waits for the checkpoint of this boundary, for this reason.
    Snapshotting(SnapshotReason),
    /// Waits for a worker that is catching up: no more roots can be held for it.
    Yielding,
    /// Waits for workers that divide the moments among them to reach each other.
    Linking {
        /// Since when.
        since_ms: u64,
    },
}

/// Why training stands until a checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SnapshotReason {
    /// The last one of the run.
    Final,
    /// The run is to stop or to pause.
    Stop,
    /// All workers were asked to go.
    Farewell,
    /// It is due and the one before is still being written.
    Backlog,
    /// Everybody is to load it: the moments are divided anew.
    Regroup,
}

/// A state on disk.
#[derive(Clone, Debug)]
pub(super) struct Durable {
    pub source: StateSource,
    pub chain: Chain,
}

/// A checkpoint on its way to the disk.
#[derive(Clone, Debug)]
pub(super) struct Writing {
    pub step: Step,
    /// Who uploads it, or a part of it.
    pub donors: BTreeSet<SessionId>,
    /// The ledger up to it.
    pub chain: Chain,
    /// The hash of what is on disk, once it is.
    pub written: Option<[u8; 32]>,
}

/// A member without lanes that is on its way to the state of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Joiner {
    /// It waits for a state that it can load.
    Waiting,
    /// It gets the state of this step and every commit since.
    Replaying {
        from: Step,
        /// Whether a hash of its state after all replayed steps equals that of the others.
        verified: bool,
    },
}

/// Workers that may come back with a younger state than that on disk are waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recovery {
    pub until_ms: u64,
    /// How many may come.
    pub expected: usize,
    /// Members that were there already, and do not hold it.
    pub here: usize,
}

/// The active run.
#[derive(Debug)]
pub(super) struct Active {
    pub plan: RunPlan,
    pub phase: Phase,
    /// Committed steps.
    pub step: Step,
    /// The ledger up to `step`.
    pub chain: Chain,
    /// The end of the ledger; it may be younger than `step`, when steps are replayed.
    pub ledger: Chain,
    /// The newest state on disk.
    pub durable: Durable,
    pub writing: Option<Writing>,
    /// What is still to do at this boundary.
    pub boundary: Boundary,
    /// Workers whose state is that of `step` once they have worked off their messages.
    pub ready: BTreeSet<SessionId>,
    /// Who of them keeps which moments; everybody all of them, where they are not divided.
    pub division: Option<Division>,
    /// The moments are to be divided anew at this boundary: somebody who keeps some is lost, or does not reach another.
    pub broken: bool,
    /// The state after the next step is to be hashed, as the moments are to be divided there.
    pub hash_next: bool,
    /// Workers among which they are not divided, as these did not reach each other.
    pub undivided: Option<BTreeSet<SessionId>>,
    /// Why they are not divided, as people were last told; empty where they are.
    pub whole_said: Option<String>,
    /// What workers have found of the parts of the state that they keep, by step.
    pub digested: BTreeMap<Step, BTreeMap<SessionId, Digests>>,
    /// Members on their way there.
    pub joiners: BTreeMap<SessionId, Joiner>,
    pub recovery: Option<Recovery>,
    /// Ready workers of the last step.
    pub last_workers: usize,
    /// Commits that joiners may need, and entries that prove a state, with what workers are given of them.
    pub recent: BTreeMap<Step, (Arc<Entry>, Proof)>,
    /// The coordinator holds the roots of the steps after this one.
    pub released: Step,
    /// What the slowest of those who need roots have applied, and how many there are of them; `None` where that has to be
    /// counted anew.
    pub slowest: Option<(Step, usize)>,
    /// The newest step whose sums the coordinator was told to get ready for, as long as it may hold it.
    pub opened: Option<Step>,
    /// Who was told of whom, so that they can push to each other.
    pub introduced: Introduced,
    /// Which of the ready workers are near each other; `None` where that has to be found out anew.
    pub sites: Option<Vec<Vec<SessionId>>>,
    /// How many workers sum the gradient, each a slice, and in how many sites, as people were last told.
    pub sharers_said: (usize, usize),
    /// How long owners of slices may take.
    pub patience: Patience,
    /// The hashes that workers found, by step.
    pub votes: BTreeMap<Step, Votes>,
    /// Steps whose states the workers were asked to hash.
    pub hashed: BTreeSet<Step>,
    /// The hash of a step's state is disputed: nothing is committed until it is settled.
    pub disputed: Option<Step>,
    /// Times that the state was disputed without a majority.
    pub stalemates: u32,
    /// Who has which lanes when nothing happens.
    pub assignment: BTreeMap<SessionId, Range<Lane>>,
    /// Version of the assignment.
    pub generation: u64,
    /// The step at which the assignment was last thought over.
    pub assigned_at: Step,
    /// In which order workers were given lanes then.
    pub assigned_to: Vec<SessionId>,
    /// Lanes of the next step that workers had computed when they came back.
    pub kept: BTreeMap<SessionId, BTreeSet<Lane>>,
    pub stop_requested: bool,
    /// Whether workers with lanes were asked to go.
    pub leaving: bool,
    /// Workers that were there when people were last told that more are waited for.
    pub waiting_said: Option<usize>,
    /// The step at which a state for joiners could not be written.
    pub snapshot_failed: Option<Step>,
    pub last_loss: f64,
    /// What the validations so far have found.
    pub losses: Losses,
    /// What the steps so far were like.
    pub history: History,
    /// See [`RunPlan::shipped`].
    pub shipped: Option<Step>,
}

/// What a boundary still owes.
#[derive(Debug, Default)]
pub(super) struct Boundary {
    /// Splits whose turn it is, last first.
    pub evals: Vec<u32>,
    /// Whether a checkpoint is due.
    pub checkpoint: bool,
    /// Why the watchdog pauses the run here.
    pub pause: Option<Pause>,
}

/// A step between its announcement and its commit.
#[derive(Debug)]
pub(super) struct StepInFlight {
    pub step: Step,
    /// Lanes that each session was given; those that are not settled are open.
    pub hands: Hands,
    pub owners: Ownership,
    /// What is known of each lane, and who found it.
    pub sums: Vec<Option<(LaneSums, SessionId)>>,
    /// Lanes of which that is not known yet.
    pub unknown: usize,
    /// Of each lane, whether it is where it is summed.
    pub delivered: Vec<bool>,
    pub root: Option<RootTotals>,
    pub started_ms: u64,
    /// When the last lane was first computed, or another one before it.
    pub computed_ms: u64,
    /// When each session last finished a lane, or was given the first.
    pub last_done_ms: BTreeMap<SessionId, u64>,
    /// When the last lane that was not given away was settled.
    pub undisturbed_ms: u64,
    /// Lanes that were given away.
    pub redone: Vec<Redone>,
    pub moved: BTreeSet<Lane>,
}

impl StepInFlight {
    /// Whether a lane needs nobody any more: its gradient is where it is summed, and its sums are known.
    pub fn settled(&self, lane: Lane) -> bool {
        self.delivered[lane as usize] && self.sums[lane as usize].is_some()
    }

    /// Whether a lane that a session has is waited for. What an owner of a slice has not got yet is its affair, once it is
    /// computed.
    fn is_awaited(&self, lane: Lane) -> bool {
        !matches!(self.owners, Ownership::Shares(_)) || self.sums[lane as usize].is_none()
    }

    /// Lanes of a session that are waited for, ascending.
    pub fn awaited(&self, session: SessionId) -> impl Iterator<Item = Lane> {
        let open = self.hands.open_of(session);
        open.filter(|lane| self.is_awaited(*lane))
    }

    /// Notes that a lane may be settled, and when, unless it was given away.
    pub fn note_settled(&mut self, lane: Lane, now: u64) {
        if !self.settled(lane) {
            return;
        }
        self.hands.close(lane);
        if !self.moved.contains(&lane) {
            self.undisturbed_ms = self.undisturbed_ms.max(now);
        }
    }

    /// Whether nothing is missing for the commit.
    pub fn complete(&self) -> Option<RootTotals> {
        self.root.filter(|_| self.unknown == 0)
    }
}

/// A validation between its announcement and its sum.
#[derive(Debug)]
pub(super) struct EvalInFlight {
    pub split: u32,
    /// Units that each session was given; those that are not found are open.
    pub hands: Hands,
    pub found: Vec<Option<Found>>,
    /// Units that are not found yet.
    pub missing: usize,
}

impl Active {
    pub fn new(plan: RunPlan, now: u64, recover_ms: u64) -> Self {
        let known = |entry: &Arc<Entry>| (entry.step, (entry.clone(), Proof::of(entry)));
        let recent: BTreeMap<Step, (Arc<Entry>, Proof)> = plan.recent.iter().map(known).collect();
        let newest = recent.last_key_value().map(|(_, e)| Chain::after(&e.0));
        let ledger = newest.unwrap_or_else(|| plan.chain.clone());
        let mut active = Self {
            phase: Phase::Gathering,
            step: plan.source.step(),
            chain: plan.chain.clone(),
            ledger,
            durable: Durable {
                source: plan.source,
                chain: plan.chain.clone(),
            },
            writing: None,
            boundary: Boundary::default(),
            ready: BTreeSet::new(),
            division: None,
            broken: false,
            hash_next: false,
            undivided: None,
            whole_said: None,
            digested: BTreeMap::new(),
            joiners: BTreeMap::new(),
            recovery: (plan.expected > 0).then(|| Recovery {
                until_ms: now + recover_ms,
                expected: plan.expected,
                here: 0,
            }),
            last_workers: 0,
            recent,
            released: plan.source.step(),
            slowest: None,
            opened: None,
            introduced: Introduced::default(),
            sites: None,
            sharers_said: (0, 0),
            patience: Patience::default(),
            votes: BTreeMap::new(),
            hashed: BTreeSet::new(),
            disputed: None,
            stalemates: 0,
            assignment: BTreeMap::new(),
            generation: 0,
            assigned_at: 0,
            assigned_to: Vec::new(),
            kept: BTreeMap::new(),
            stop_requested: false,
            leaving: false,
            waiting_said: None,
            snapshot_failed: None,
            last_loss: f64::NAN,
            losses: plan.losses.clone(),
            history: plan.history.clone(),
            shipped: plan.shipped,
            plan,
        };
        active.enter_boundary();
        active
    }

    /// Whether the state stands at the last step.
    pub fn at_end(&self) -> bool {
        self.step >= self.plan.spec.train.steps || self.verdict().is_some()
    }

    /// Whether what validations have found ends the run here.
    pub fn verdict(&self) -> Option<Verdict> {
        self.losses.verdict(&self.plan.spec.train, self.step)
    }

    /// Remembers what a validation of this boundary has found.
    pub fn learn(&mut self, split: u32, loss: f64) {
        let losses = match self.plan.splits[split as usize].label.as_str() {
            OWN_SPLIT => &mut self.losses.own,
            BASE_SPLIT => &mut self.losses.base,
            _ => return,
        };
        losses.insert(self.step, loss);
        // Steps that were withdrawn count no more.
        losses.retain(|step, _| *step <= self.step);
    }

    /// Whether a split's turn has come at a validation between the first and the last step.
    fn turn_of(&self, split: &EvalSplit) -> bool {
        let validation = self.step / self.plan.spec.train.eval_every.max(1);
        split.every > 0 && validation.is_multiple_of(split.every)
    }

    /// Whether a validation is due between the first and the last step.
    fn eval_due(&self, step: Step) -> bool {
        let every = self.plan.spec.train.eval_every;
        every > 0 && step.is_multiple_of(every)
    }

    /// Whether what a validation would have found between the state on disk and that of `step` decides when the run ends, and
    /// is not known: a coordinator is gone that had not told anybody. From the state on disk on it is found again.
    pub fn lacks_validation(&self, step: Step) -> bool {
        let own = self.plan.splits.iter().any(|s| s.label == OWN_SPLIT);
        let between = self.durable.source.step() + 1..step;
        own && may_end_early(&self.plan.spec.train) && { between }
            .any(|s| self.eval_due(s) && !self.losses.own.contains_key(&s))
    }

    /// Whether the state of this boundary is on disk.
    pub fn saved(&self) -> bool {
        self.durable.source.step() == self.step
    }

    /// Whether a checkpoint of `step` is due by the spec.
    pub fn checkpoint_due(&self, step: Step) -> bool {
        let every = self.plan.spec.checkpoint.every;
        let regular = every > 0 && step.is_multiple_of(every);
        step > 0 && (step >= self.plan.spec.train.steps || regular)
    }

    /// Whether the state after `step` is to be hashed: for the ledger, for a checkpoint, for whoever joins.
    pub fn hash_wanted(&self, step: Step) -> bool {
        state_hash_due(step + 1)
            || self.checkpoint_due(step)
            || (may_end_early(&self.plan.spec.train) && self.eval_due(step))
            || self.boundary.checkpoint
            || self.stop_requested
            || self.pause(step).is_some()
            || self.leaving
            || self.hash_next
            || !self.joiners.is_empty()
    }

    /// Why the watchdog pauses the run where its state stands at `step`.
    fn pause(&self, step: Step) -> Option<Pause> {
        self.history.pause(self.plan.spec.watched()?, step)
    }

    /// Computes what this boundary owes. A state that came from a checkpoint owes nothing: validations precede the
    /// checkpoint of their boundary, so its figures are recorded.
    pub fn enter_boundary(&mut self) {
        let have = self.step > 0 && self.saved();
        let at_start = self.step == 0;
        let end = self.at_end();
        let due = self.eval_due(self.step);
        self.boundary.evals = self
            .plan
            .splits
            .iter()
            .enumerate()
            .filter(|(_, split)| !have && (at_start || end || (due && self.turn_of(split))))
            .map(|(i, _)| i as u32)
            .rev()
            .collect();
        self.boundary.checkpoint |= !have && self.checkpoint_due(self.step);
        // A run that was resumed goes on.
        self.boundary.pause = self.pause(self.step).filter(|_| !have);
    }

    /// Takes a step into the ledger. What it was is known only when it is new.
    pub fn record(&mut self, entry: &Arc<Entry>) {
        self.chain
            .push(entry)
            .expect("the entry was made to follow");
        if entry.step >= self.ledger.next_step() {
            self.ledger = self.chain.clone();
        }
        self.know(entry);
        self.remember(entry);
        self.step = entry.step;
        self.forget();
    }

    /// Keeps an entry for whoever may need it.
    pub fn know(&mut self, entry: &Arc<Entry>) {
        let known = (entry.clone(), Proof::of(entry));
        self.recent.insert(entry.step, known);
    }

    /// Takes an entry of the ledger into what later steps are judged by.
    pub fn remember(&mut self, entry: &Entry) {
        if self.plan.spec.watched().is_some() {
            self.history.push(entry);
        }
    }

    /// Forgets the proofs and votes that nobody can need any more.
    fn forget(&mut self) {
        let floor = self.released.min(self.step.saturating_sub(PROOFS));
        self.recent.retain(|step, _| *step > floor);
        if let Some(watchdog) = self.plan.spec.watched() {
            let durable = self.durable.source.step();
            self.history.forget(watchdog, durable, floor);
        }
        let writing = self.writing.as_ref().map_or(Step::MAX, |w| w.step);
        let old = self.step.saturating_sub(PROOFS).min(writing);
        self.votes.retain(|step, _| *step >= old);
        self.digested.retain(|step, _| *step >= old);
        self.hashed.retain(|step| *step >= old);
    }

    /// Members that get commits: those with lanes, and those that catch up.
    pub fn followers(&self) -> Vec<SessionId> {
        let replaying =
            |(s, j): (&SessionId, &Joiner)| matches!(j, Joiner::Replaying { .. }).then_some(*s);
        let joiners = self.joiners.iter().filter_map(replaying);
        self.ready.iter().copied().chain(joiners).collect()
    }

    /// The commit of a step that is in the ledger.
    pub fn commit_of(&self, entry: &Entry, proof: &Proof, hash_state: bool) -> Commit {
        let train = &self.plan.spec.train;
        Commit {
            proof: proof.clone(),
            scale: gradient_scale(train, entry.grad_norm, entry.weight),
            updates: self.history.updates(entry.step),
            hash_state,
            // The entry before is on this machine's disk, which is as good as it gets where nothing is shipped.
            safe: self.shipped.unwrap_or(Step::MAX).min(entry.step - 1),
        }
    }
}
