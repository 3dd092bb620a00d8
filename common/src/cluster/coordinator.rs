//! The coordinator's state machine: members, the queue of runs, and the progress of the run that trains. It is pure:
//! `handle(now, event)` changes the state and returns what must be done; sockets, files, clocks and threads belong to
//! the driver around it.
//!
//! A run alternates between boundaries and steps. At a boundary every ready worker has the same state; validations,
//! checkpoints and joins happen there. Within a step, lanes of a lost worker are given to the survivors at once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use crate::aggregate::RootTotals;
use crate::cluster::messages::{FromWorker, LaneSums, StateSource, ToWorker};
use crate::cluster::run::{Active, Phase, RunPlan};
use crate::ids::{Lane, RunId, SessionId, Step};

/// Bounds that the machine keeps.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A worker that says nothing for this long is lost.
    pub silence_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { silence_ms: 15_000 }
    }
}

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
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftReason {
    /// The connection closed.
    ConnectionClosed,
    /// Nothing was heard within the deadline.
    Silent {
        /// The deadline.
        after_ms: u64,
    },
    /// It computes with other bits than the cluster.
    Fingerprint {
        /// Its fingerprint.
        found: String,
        /// The cluster's.
        expected: String,
    },
    /// It did not keep up with its messages, or broke the protocol.
    Protocol(String),
}

impl fmt::Display for LeftReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConnectionClosed => f.write_str("connection closed"),
            Self::Silent { after_ms } => write!(f, "silent for {after_ms} ms"),
            Self::Fingerprint { found, expected } => write!(
                f,
                "its numerics `{found}` differ from the cluster's `{expected}`, so its results would differ; use one build on one kind of processor"
            ),
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
    },
    /// A worker said something.
    Said {
        /// Who.
        session: SessionId,
        /// What.
        message: FromWorker,
    },
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
    /// The owner holds every chunk of these lanes.
    Delivered {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// The lanes.
        lanes: Vec<Lane>,
    },
    /// The owner holds the whole root.
    RootComplete {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// Norm and hash.
        totals: RootTotals,
    },
    /// A checkpoint is durable.
    CheckpointWritten {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
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
    /// Every ready worker has applied the steps up to here: their roots may go.
    ReleaseRoots {
        /// The run.
        run: RunId,
        /// Newest step that nobody needs.
        through: Step,
    },
    /// Record a committed step.
    Committed(StepRecord),
    /// Record a validation.
    Evaluated {
        /// The run.
        run: RunId,
        /// The state's step.
        step: Step,
        /// Index of the split.
        split: u32,
        /// What it found.
        sums: LaneSums,
    },
    /// Tell people and the store what became of a run.
    Changed {
        /// The run.
        run: RunId,
        /// What.
        change: Change,
    },
    /// Tell people.
    Note {
        /// The run it is about, if any.
        run: Option<RunId>,
        /// In plain words.
        text: String,
    },
}

/// A committed step, as recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRecord {
    /// The run.
    pub run: RunId,
    /// The step.
    pub step: Step,
    /// What each lane found.
    pub lanes: Vec<LaneSums>,
    /// Σ over all scored tokens.
    pub sums: LaneSums,
    /// Norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// BLAKE3 over the root's chunks.
    pub root_hash: [u8; 32],
    /// From the announcement to the commit.
    pub millis: u64,
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
        /// Tokens trained on since the run was taken up.
        tokens: f64,
    },
    /// It was stopped and can be resumed.
    Stopped {
        /// Where it stands.
        step: Step,
    },
    /// It was cancelled.
    Cancelled,
    /// It cannot go on.
    Failed {
        /// For people.
        error: String,
    },
}

/// A worker, as the machine sees it.
#[derive(Clone, Debug)]
pub struct Member {
    /// What it said of itself.
    pub info: MemberInfo,
    last_heard_ms: u64,
    pub(super) applied: Step,
}

/// The coordinator's state.
#[derive(Debug, Default)]
pub struct Machine {
    limits: Limits,
    pub(super) members: BTreeMap<SessionId, Member>,
    queue: VecDeque<RunPlan>,
    pub(super) active: Option<Active>,
}

impl Machine {
    /// A cluster without members or runs.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// The members, by session.
    pub fn members(&self) -> &BTreeMap<SessionId, Member> {
        &self.members
    }

    /// Lanes that a session holds in the step in flight.
    pub fn lanes_of(&self, session: SessionId) -> usize {
        match self.active.as_ref().map(|a| &a.phase) {
            Some(Phase::Stepping(step)) => step.assigned.get(&session).map_or(0, BTreeSet::len),
            _ => 0,
        }
    }

    /// The run that trains or waits for workers.
    pub fn active_run(&self) -> Option<&RunId> {
        self.active.as_ref().map(|a| &a.plan.run)
    }

    /// The runs that wait for their turn, in order.
    pub fn queued(&self) -> impl Iterator<Item = &RunId> {
        self.queue.iter().map(|plan| &plan.run)
    }

    /// Takes in one event and says what to do. `now_ms` never decreases.
    pub fn handle(&mut self, now_ms: u64, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Joined { session, info } => self.join(now_ms, session, info, &mut out),
            Event::Said { session, message } => {
                // Messages of an ended session are refused: the process may believe that it is still a member.
                if let Some(member) = self.members.get_mut(&session) {
                    member.last_heard_ms = now_ms;
                    self.said(now_ms, session, message, &mut out);
                }
            }
            Event::Left { session, reason } => self.leave(now_ms, session, reason, &mut out),
            Event::Tick => self.tick(now_ms, &mut out),
            Event::Submitted(plan) => self.submit(now_ms, plan, &mut out),
            Event::Cancelled(run) => self.end_run(now_ms, &run, Change::Cancelled, &mut out),
            Event::StopRequested(run) => self.request_stop(now_ms, &run, &mut out),
            Event::Delivered { run, step, lanes } => self.delivered(&run, step, &lanes),
            Event::RootComplete { run, step, totals } => {
                self.root_complete(now_ms, &run, step, totals, &mut out);
            }
            Event::CheckpointWritten { run, step } => {
                self.checkpoint_written(now_ms, &run, step, &mut out);
            }
            Event::CheckpointFailed { run, step, error } => {
                self.checkpoint_failed(now_ms, &run, step, error, &mut out);
            }
            Event::CheckpointLost { run, step } => {
                self.checkpoint_lost(now_ms, &run, step, &mut out);
            }
            Event::RunBroken { run, error } => {
                self.end_run(now_ms, &run, Change::Failed { error }, &mut out);
            }
        }
        self.check_invariants();
        out
    }

    fn join(&mut self, now: u64, session: SessionId, info: MemberInfo, out: &mut Vec<Action>) {
        if let Some(other) = self.members.values().next()
            && other.info.fingerprint != info.fingerprint
        {
            let reason = LeftReason::Fingerprint {
                found: info.fingerprint,
                expected: other.info.fingerprint.clone(),
            };
            out.push(Action::Close { session, reason });
            return;
        }
        let member = Member {
            info,
            last_heard_ms: now,
            applied: 0,
        };
        let fresh = self.members.insert(session, member).is_none();
        assert!(fresh, "session {session} was used twice");
        self.poke(now, out);
    }

    fn said(&mut self, now: u64, session: SessionId, said: FromWorker, out: &mut Vec<Action>) {
        match said {
            FromWorker::Heartbeat => {}
            FromWorker::Loaded { run, step } => self.loaded(now, session, &run, step, out),
            FromWorker::LaneDone {
                run,
                step,
                lane,
                sums,
                ..
            } => self.lane_done(now, &run, step, lane, sums, out),
            FromWorker::RootReady { run, step, totals } => {
                self.root_ready(now, session, &run, step, totals, out);
            }
            FromWorker::Applied { run, step } => self.applied(session, &run, step, out),
            FromWorker::UnitDone {
                run,
                step,
                split,
                unit,
                sums,
            } => self.unit_done(now, &run, step, split, unit, sums, out),
            FromWorker::Failed { run, step, message } => {
                let error = format!("step {step}, worker {session}: {message}");
                self.end_run(now, &run, Change::Failed { error }, out);
            }
        }
    }

    fn leave(&mut self, now: u64, session: SessionId, why: LeftReason, out: &mut Vec<Action>) {
        if self.members.remove(&session).is_none() {
            return;
        }
        let run = self.active.as_ref().map(|active| active.plan.run.clone());
        let text = format!("worker {session} lost: {why}");
        out.push(Action::Note { run, text });
        self.lose(now, session, out);
    }

    fn tick(&mut self, now: u64, out: &mut Vec<Action>) {
        let after_ms = self.limits.silence_ms;
        let silent: Vec<SessionId> = self
            .members
            .iter()
            .filter(|(_, m)| now.saturating_sub(m.last_heard_ms) > after_ms)
            .map(|(&s, _)| s)
            .collect();
        for session in silent {
            let reason = LeftReason::Silent { after_ms };
            out.push(Action::Close {
                session,
                reason: reason.clone(),
            });
            self.leave(now, session, reason, out);
        }
    }

    fn submit(&mut self, now: u64, plan: RunPlan, out: &mut Vec<Action>) {
        let run = plan.run.clone();
        self.queue.push_back(plan);
        if self.active.is_some() {
            let place = self.queue.len();
            let change = Change::Queued { place };
            out.push(Action::Changed { run, change });
        }
        self.poke(now, out);
    }

    /// Ends a run, whether it trains or waits. Unknown runs are left alone: they ended before.
    pub(super) fn end_run(&mut self, now: u64, run: &RunId, why: Change, out: &mut Vec<Action>) {
        let was_active = self.active_run() == Some(run);
        let queued = self.queue.len();
        self.queue.retain(|plan| plan.run != *run);
        if !was_active && queued == self.queue.len() {
            return;
        }
        if was_active {
            let active = self.active.take().expect("the run is active");
            for session in self.members.keys().copied() {
                let message = ToWorker::Unload { run: run.clone() };
                out.push(Action::Send { session, message });
            }
            out.push(Action::ReleaseRoots {
                run: run.clone(),
                through: active.step + 1,
            });
        }
        let run = run.clone();
        out.push(Action::Changed { run, change: why });
        for (plan, place) in self.queue.iter().zip(1usize..) {
            let run = plan.run.clone();
            let change = Change::Queued { place };
            out.push(Action::Changed { run, change });
        }
        self.poke(now, out);
    }

    fn request_stop(&mut self, now: u64, run: &RunId, out: &mut Vec<Action>) {
        match &mut self.active {
            Some(active) if active.plan.run == *run => {
                active.stop_requested = true;
                let idle = matches!(active.phase, Phase::Gathering);
                let step = active.durable.step();
                if idle {
                    self.end_run(now, run, Change::Stopped { step }, out);
                }
            }
            _ => {
                let step = self
                    .queue
                    .iter()
                    .find(|plan| plan.run == *run)
                    .map_or(0, |plan| plan.source.step());
                self.end_run(now, run, Change::Stopped { step }, out);
            }
        }
    }

    /// Starts what can be started: the next run, or the gathering one.
    pub(super) fn poke(&mut self, now: u64, out: &mut Vec<Action>) {
        if self.active.is_none()
            && let Some(plan) = self.queue.pop_front()
        {
            self.active = Some(Active::new(plan));
        }
        let gathering = |a: &Active| matches!(a.phase, Phase::Gathering);
        if self.active.as_ref().is_some_and(gathering) {
            self.gather(now, out);
        }
    }

    fn gather(&mut self, _now: u64, out: &mut Vec<Action>) {
        let have = self.members.len();
        let active = self.active.as_mut().expect("a run is gathering");
        let need = active.plan.spec.train.min_workers.max(1);
        let run = active.plan.run.clone();
        if have < need as usize {
            let change = Change::Waiting { have, need };
            out.push(Action::Changed { run, change });
            return;
        }
        self.load_members(out);
    }

    /// Gives every member that is not ready the durable state, which must be that of the boundary.
    pub(super) fn load_members(&mut self, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is active");
        assert_eq!(active.durable.step(), active.step);
        let sessions: Vec<SessionId> = self
            .members
            .keys()
            .copied()
            .filter(|s| !active.ready.contains(s))
            .collect();
        let run = active.plan.run.clone();
        let change = Change::Loading {
            workers: sessions.len(),
            step: active.step,
        };
        out.push(Action::Changed {
            run: run.clone(),
            change,
        });
        for &session in &sessions {
            let message = ToWorker::Load {
                run: run.clone(),
                spec: active.plan.spec.clone(),
                source: active.durable,
                splits: active.plan.splits.clone(),
            };
            out.push(Action::Send { session, message });
        }
        active.phase = Phase::Loading(sessions.into_iter().collect());
    }

    /// The state that a worker can load now, and the step at which it stands.
    pub fn durable(&self) -> Option<StateSource> {
        self.active.as_ref().map(|active| active.durable)
    }

    /// What must hold after every event.
    fn check_invariants(&self) {
        let Some(active) = &self.active else { return };
        let members = |s: &SessionId| self.members.contains_key(s);
        assert!(active.ready.iter().all(members), "a ready session is gone");
        match &active.phase {
            Phase::Gathering => assert!(active.ready.is_empty()),
            Phase::Loading(waiting) => assert!(waiting.iter().all(members)),
            Phase::Stepping(flight) => {
                assert_eq!(flight.step, active.step + 1, "one step at a time");
                let lanes = active.plan.spec.train.lanes;
                let held = |lane| flight.assigned.values().any(|l| l.contains(&lane));
                for lane in 0..lanes {
                    assert!(flight.settled(lane) || held(lane), "lane {lane} is lost");
                }
            }
            Phase::Evaluating(_) | Phase::Snapshotting(_) => assert!(!active.ready.is_empty()),
        }
    }
}
