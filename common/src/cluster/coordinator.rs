//! The coordinator's state machine: members, the queue of runs, and the progress of the run that trains. It is pure:
//! `handle(now, event)` changes the state and returns what must be done; sockets, files, clocks and threads belong to
//! the driver around it.
//!
//! A run alternates between boundaries and steps. At a boundary every ready worker has the same state; validations,
//! checkpoints and joins happen there (`boundary`). Within a step, lanes of a lost or late worker are given to others at
//! once (`stepping`). Members that have no state, or an older one, catch up beside it (`joining`), and hashes of the
//! state are compared (`agreement`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::cluster::division::Division;
use crate::cluster::events::{Action, Change, Event, Happening, LeftReason, MemberInfo};
use crate::cluster::links::{Line, Link};
use crate::cluster::messages::{FromWorker, Holding, ToWorker};
use crate::cluster::run::{Active, Phase, RunPlan};
use crate::cluster::silence::{Silence, SilenceLimits};
#[cfg(test)]
use crate::ids::Lane;
use crate::ids::{RunId, SessionId, Step};

/// Workers and lanes that are looked at for each event, to see that the state contradicts itself nowhere.
const LOOKED_AT: usize = 64;

/// Bounds that the machine keeps.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a worker may say nothing.
    pub silence: SilenceLimits,
    /// How long workers that may come back with a younger state than that on disk are waited for.
    pub recover_ms: u64,
    /// Time between two ticks.
    pub tick_ms: u64,
    /// Whether workers that reach each other may sum the gradient themselves, a slice each.
    pub shares: bool,
    /// Whether workers that reach each other divide the optimizer's moments among them. Needs `shares`.
    pub divides: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            silence: SilenceLimits::default(),
            recover_ms: 4_000,
            tick_ms: 50,
            shares: true,
            divides: false,
        }
    }
}

/// A worker, as the machine sees it.
#[derive(Clone, Debug)]
pub struct Member {
    /// What it said of itself.
    pub info: MemberInfo,
    pub(super) holding: Option<Holding>,
    pub(super) silence: Silence,
    /// The state that it has said to have, of the active run.
    pub(super) applied: Option<Step>,
    /// Time it takes for a lane: a moving mean that outliers cannot carry away.
    pub(super) lane_micros: Option<f64>,
    /// The newest step of which it has told a lane, and for how long it told none, in that step or lately: lanes that
    /// share a pass come together.
    pub(super) pause: (Step, u64),
    /// Whom it can push gradients to, in the active run.
    pub(super) reaches: BTreeSet<SessionId>,
    /// What the ways to and from others showed of its line, in the active run.
    pub line: Line,
    /// The ways to workers on other hosts.
    pub(super) ways: BTreeMap<SessionId, Link>,
    pub(super) leaving: bool,
}

/// The coordinator's state.
#[derive(Debug, Default)]
pub struct Machine {
    pub(super) limits: Limits,
    pub(super) members: BTreeMap<SessionId, Member>,
    queue: VecDeque<RunPlan>,
    pub(super) active: Option<Active>,
    last_tick_ms: Option<u64>,
    /// Events since everybody was last looked at.
    unchecked: usize,
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
            Some(Phase::Stepping(step)) => step.hands.count(session),
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
            Event::Joined {
                session,
                info,
                holding,
            } => self.join(now_ms, session, info, holding, &mut out),
            Event::Said { session, message } => {
                // Messages of an ended session are refused: the process may believe that it is still a member.
                if let Some(member) = self.members.get_mut(&session) {
                    member.silence.heard(now_ms);
                    self.said(now_ms, session, message, &mut out);
                }
            }
            Event::Heard(sessions) => {
                for session in sessions {
                    if let Some(member) = self.members.get_mut(&session) {
                        member.silence.heard(now_ms);
                    }
                }
            }
            Event::Left { session, reason } => self.leave(now_ms, session, reason, &mut out),
            Event::Tick => self.tick(now_ms, &mut out),
            Event::Submitted(plan) => self.submit(now_ms, plan, &mut out),
            Event::Cancelled(run) => self.end_run(now_ms, &run, Change::Cancelled, &mut out),
            Event::StopRequested(run) => self.request_stop(now_ms, &run, &mut out),
            Event::CheckpointRequested(run) => self.request_checkpoint(&run),
            Event::Shipped { run, step } => {
                if let Some(active) = self.active_as(&run) {
                    // It may be of steps that were withdrawn meanwhile.
                    active.shipped = active.shipped.max(Some(step.min(active.step)));
                }
            }
            Event::Delivered { run, step, lanes } => {
                self.delivered(now_ms, &run, step, &lanes, &mut out);
            }
            Event::RootComplete { run, step, totals } => {
                self.root_complete(now_ms, &run, step, totals, &mut out);
            }
            Event::CheckpointWritten {
                run,
                step,
                state_hash,
            } => self.checkpoint_written(now_ms, &run, step, state_hash, &mut out),
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
        self.check();
        out
    }

    /// Checks what must hold after every event. A look at everybody takes as long as there are workers and lanes, so in a
    /// large cluster it is taken after as many events as make it worth its time.
    fn check(&mut self) {
        self.unchecked += 1;
        let active = self.active.as_ref();
        let lanes = active.map_or(0, |a| a.plan.spec.train.lanes as usize);
        if self.unchecked >= (self.members.len() + lanes) / LOOKED_AT {
            self.unchecked = 0;
            self.check_invariants();
        }
    }

    fn join(
        &mut self,
        now: u64,
        session: SessionId,
        info: MemberInfo,
        holding: Option<Holding>,
        out: &mut Vec<Action>,
    ) {
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
            holding,
            silence: Silence::new(self.limits.silence, now),
            applied: None,
            lane_micros: None,
            pause: (0, 0),
            reaches: BTreeSet::new(),
            line: Line::default(),
            ways: BTreeMap::new(),
            leaving: false,
        };
        let fresh = self.members.insert(session, member).is_none();
        assert!(fresh, "session {session} was used twice");
        self.enlist(session, out);
        self.poke(now, out);
    }

    fn said(&mut self, now: u64, session: SessionId, said: FromWorker, out: &mut Vec<Action>) {
        match said {
            FromWorker::Heartbeat => {}
            FromWorker::Leaving => self.dismiss(now, session, out),
            FromWorker::Loaded {
                run,
                step,
                state_hash,
            } => self.loaded(now, session, &run, step, state_hash, out),
            FromWorker::LaneDone {
                run,
                step,
                lane,
                sums,
                micros,
            } => {
                self.learn_speed(session, micros);
                self.lane_done(now, session, &run, step, lane, sums, out);
            }
            FromWorker::RootReady { run, step, totals } => {
                self.root_ready(now, session, &run, step, totals, out);
            }
            FromWorker::Reaches { run, peers } => self.reaches(now, session, &run, peers, out),
            FromWorker::Link { run, peer, link } => self.linked(session, &run, peer, link),
            FromWorker::Held { run, step, lanes } => {
                self.slice_held(now, session, &run, step, &lanes, out);
            }
            FromWorker::SliceReady { run, step, digests } => {
                self.slice_ready(now, session, &run, step, digests, out);
            }
            FromWorker::RootHeld { run, step } => self.root_held(now, session, &run, step, out),
            FromWorker::Digested { run, step, digests } => {
                self.digested(now, session, &run, step, digests, out);
            }
            FromWorker::Applied {
                run,
                step,
                state_hash,
            } => self.applied(now, session, &run, step, state_hash, out),
            FromWorker::UnitDone {
                run,
                step,
                split,
                unit,
                found,
            } => self.unit_done(now, session, (&run, step, split), unit, found, out),
            FromWorker::SnapshotLost { run, step } => {
                self.snapshot_lost(now, session, &run, step, out);
            }
            FromWorker::Failed {
                run,
                step,
                message,
                only_here,
            } => self.failed(now, session, &run, step, message, only_here, out),
        }
    }

    /// A worker cannot go on. Where another may be able to, it only takes itself out.
    #[allow(clippy::too_many_arguments)]
    fn failed(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        message: String,
        only_here: bool,
        out: &mut Vec<Action>,
    ) {
        let spared = |a: &Active| {
            let loads = match &a.phase {
                Phase::Loading(waiting) => waiting.iter().any(|s| *s != session),
                _ => false,
            };
            let others = loads || a.ready.iter().any(|s| *s != session);
            others && (only_here || a.joiners.contains_key(&session))
        };
        if self.active_as(run).is_some_and(|a| spared(a)) {
            let reason = LeftReason::Unable(message);
            return self.expel(now, session, reason, out);
        }
        let error = format!("step {step}, worker {session}: {message}");
        self.end_run(now, run, Change::Failed { error }, out);
    }

    /// Ends a session from this side.
    pub(super) fn expel(
        &mut self,
        now: u64,
        session: SessionId,
        reason: LeftReason,
        out: &mut Vec<Action>,
    ) {
        out.push(Action::Close {
            session,
            reason: reason.clone(),
        });
        self.leave(now, session, reason, out);
    }

    fn leave(&mut self, now: u64, session: SessionId, why: LeftReason, out: &mut Vec<Action>) {
        let Some(member) = self.members.remove(&session) else {
            return;
        };
        if let Some(active) = &self.active {
            let run = active.plan.run.clone();
            let what = match why {
                LeftReason::Farewell => Happening::Left {
                    session,
                    step: active.step,
                },
                _ => Happening::Lost {
                    session,
                    step: active.now_at(),
                    reason: why.clone(),
                },
            };
            out.push(Action::Happened { run, what });
        }
        self.lose(now, session, member.applied, why, out);
    }

    /// A worker was asked to go: it gives its work back at the next boundary, or at once if it has none.
    fn dismiss(&mut self, now: u64, session: SessionId, out: &mut Vec<Action>) {
        let member = self.members.get_mut(&session).expect("it spoke");
        member.leaving = true;
        let busy = |a: &Active| a.ready.contains(&session) || a.donates(session);
        if let Some(active) = &mut self.active {
            active.leaving |= active.ready.contains(&session);
        }
        if !self.active.as_ref().is_some_and(busy) {
            self.expel(now, session, LeftReason::Farewell, out);
        }
    }

    fn tick(&mut self, now: u64, out: &mut Vec<Action>) {
        self.forgive_own_pause(now);
        let silent = |(s, m): (&SessionId, &Member)| Some((*s, m.silence.exceeded(now)?));
        let silent: Vec<_> = self.members.iter().filter_map(silent).collect();
        for (session, for_ms) in silent {
            self.expel(now, session, LeftReason::Silent { for_ms }, out);
        }
        self.hedge(now, out);
        self.hurry(now, out);
        self.wait_for_links(now, out);
        self.poke(now, out);
    }

    /// If this process itself stood still, nobody was silent.
    fn forgive_own_pause(&mut self, now: u64) {
        let last = self.last_tick_ms.replace(now).unwrap_or(now);
        let missed = (now - last).saturating_sub(self.limits.tick_ms);
        if missed > 4 * self.limits.tick_ms {
            for member in self.members.values_mut() {
                member.silence.forgive(missed);
            }
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
            for member in self.members.values_mut() {
                member.applied = None;
                member.holding = None;
                member.pause = (0, 0);
                member.reaches.clear();
                member.line = Line::default();
                member.ways.clear();
            }
            out.push(Action::SendAll {
                sessions: self.members.keys().copied().collect(),
                message: ToWorker::Unload { run: run.clone() },
            });
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
        let leaving = |(s, m): (&SessionId, &Member)| m.leaving.then_some(*s);
        let leaving: Vec<SessionId> = self.members.iter().filter_map(leaving).collect();
        for session in leaving {
            self.expel(now, session, LeftReason::Farewell, out);
        }
        self.poke(now, out);
    }

    fn request_stop(&mut self, now: u64, run: &RunId, out: &mut Vec<Action>) {
        match &mut self.active {
            Some(active) if active.plan.run == *run => {
                active.stop_requested = true;
                let idle = matches!(active.phase, Phase::Gathering);
                let step = active.durable.source.step();
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

    /// Makes a checkpoint due. A state that is on disk, or on its way there, need not be written again.
    fn request_checkpoint(&mut self, run: &RunId) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        let here = active.step;
        let underway = active.writing.as_ref().is_some_and(|w| w.step == here);
        active.boundary.checkpoint |= here == 0 || !(active.saved() || underway);
    }

    /// Starts what can be started: the next run, or the gathering one.
    pub(super) fn poke(&mut self, now: u64, out: &mut Vec<Action>) {
        if self.active.is_none()
            && let Some(plan) = self.queue.pop_front()
        {
            self.active = Some(Active::new(plan, now, self.limits.recover_ms));
        }
        let gathering = |a: &Active| matches!(a.phase, Phase::Gathering);
        if self.active.as_ref().is_some_and(gathering) {
            self.gather(now, out);
        }
    }

    pub(super) fn active_as(&mut self, run: &RunId) -> Option<&mut Active> {
        self.active.as_mut().filter(|a| a.plan.run == *run)
    }

    /// Where the state of a run stands, if it trains or waits for workers.
    pub fn step_of(&self, run: &RunId) -> Option<Step> {
        let active = self.active.as_ref().filter(|a| a.plan.run == *run);
        active.map(|a| a.step)
    }

    /// Whether a checkpoint of this step is waited for.
    pub fn is_writing(&self, run: &RunId, step: Step) -> bool {
        let active = self.active.as_ref().filter(|a| a.plan.run == *run);
        active
            .and_then(|a| a.writing.as_ref())
            .is_some_and(|w| w.step == step)
    }

    /// Whether moments are divided among workers.
    #[cfg(test)]
    pub(super) fn is_divided(&self) -> bool {
        self.active.as_ref().is_some_and(|a| a.division.is_some())
    }

    /// How it stands, in a few lines for the failure of a test.
    #[cfg(test)]
    pub(super) fn summary(&self) -> String {
        let Some(active) = &self.active else {
            return format!("no run; members {:?}", self.members.keys());
        };
        let phase = match &active.phase {
            Phase::Gathering => "gathering".into(),
            Phase::Loading(waiting) => format!("loading on {waiting:?}"),
            Phase::Stepping(flight) => {
                let lanes = 0..flight.sums.len() as u32;
                let silent = |l: &Lane| flight.sums[*l as usize].is_none();
                let silent: Vec<Lane> = lanes.clone().filter(silent).collect();
                let open: Vec<Lane> = lanes.filter(|l| !flight.settled(*l)).collect();
                format!(
                    "stepping, owned by {:?}, root {}, open {open:?}, without sums {silent:?}, of {:?}, disputed {:?}",
                    flight.owners,
                    flight.root.is_some(),
                    flight.hands,
                    active.disputed,
                )
            }
            Phase::Evaluating(eval) => format!("evaluating {:?}", eval.hands),
            Phase::Snapshotting(reason) => format!("snapshotting for {reason:?}"),
            Phase::Yielding => "yielding".into(),
            Phase::Linking { since_ms } => format!("linking since {since_ms}"),
        };
        let applied: Vec<_> = self.members.iter().map(|(s, m)| (s, m.applied)).collect();
        format!(
            "run {} at step {}, {phase}; ready {:?}; divided {:?}, broken {}; joiners {:?}; writing {:?}; released {}; applied {applied:?}",
            active.plan.run,
            active.step,
            active.ready,
            active.division.as_ref().map(|d| d.shares()),
            active.broken,
            active.joiners,
            active.writing.as_ref().map(|w| (w.step, &w.donors)),
            active.released,
        )
    }

    /// What must hold after every event.
    fn check_invariants(&self) {
        let Some(active) = &self.active else { return };
        let members = |s: &SessionId| self.members.contains_key(s);
        assert!(active.ready.iter().all(members), "a ready session is gone");
        assert!(active.joiners.keys().all(members), "a joiner is gone");
        let both = |s: &SessionId| active.ready.contains(s);
        assert!(!active.joiners.keys().any(both), "ready and joining");
        assert!(active.released <= active.step, "a root went too early");
        assert_eq!(active.chain.next_step(), active.step + 1);
        match &active.phase {
            Phase::Gathering => assert!(active.ready.is_empty() && active.joiners.is_empty()),
            Phase::Loading(waiting) => assert!(waiting.iter().all(members)),
            Phase::Stepping(flight) => {
                assert_eq!(flight.step, active.step + 1, "one step at a time");
                let lost = flight.hands.lost().find(|lane| !flight.settled(*lane));
                assert!(lost.is_none(), "lane {} is lost", lost.unwrap_or_default());
                let unknown = flight.sums.iter().filter(|sums| sums.is_none()).count();
                assert_eq!(flight.unknown, unknown, "lanes were counted wrongly");
                let sound = |d: &Division| !active.broken && d.is_whole_in(&active.ready);
                assert!(
                    active.division.as_ref().is_none_or(sound),
                    "a slice is lost"
                );
            }
            Phase::Evaluating(_)
            | Phase::Snapshotting(_)
            | Phase::Yielding
            | Phase::Linking { .. } => {
                assert!(!active.ready.is_empty());
            }
        }
    }
}
