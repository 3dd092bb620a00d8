//! A step: lanes are given out, redone when their worker is lost or late, and committed when everything is there.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::aggregate::RootTotals;
use crate::cluster::coordinator::Machine;
use crate::cluster::events::{Action, Change, Happening, StepRecord};
use crate::cluster::hands::Hands;
use crate::cluster::messages::{LaneSums, Owners, ToWorker};
use crate::cluster::run::{Active, Phase, StepInFlight};
use crate::cluster::sharing::Ownership;
use crate::cluster::watchdog::Anomaly;
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::lanes;
use crate::ledger::{Entry, state_hash_due};
use crate::schedule::learning_rate;
use crate::tree::Tree;

/// An assignment is changed for speed only if the slowest worker's time falls below this share of what it was.
const WORTHWHILE: f64 = 0.85;

/// Steps between two thoughts about speed.
const RETHINK: Step = 16;

/// Steps after which it is forgotten how fast a worker was that has had no lane since: it is given one again. Its first
/// one may have been slow because it fetched samples.
const FORGOTTEN: Step = 8 * RETHINK;

/// A lane's time counts at most this much more than the mean so far: a process that was frozen is not slow.
const OUTLIER: f64 = 4.0;

impl Machine {
    /// The step in flight, if it is this one.
    pub(super) fn flight(&mut self, run: &RunId, step: Step) -> Option<&mut StepInFlight> {
        match &mut self.active_as(run)?.phase {
            Phase::Stepping(flight) if flight.step == step => Some(flight),
            _ => None,
        }
    }

    pub(super) fn learn_speed(&mut self, session: SessionId, micros: u64) {
        let found = (micros as f64).max(1.0);
        let forgotten = self.lane_time(session).is_none();
        let member = self.members.get_mut(&session).expect("it spoke");
        let again = forgotten && member.lane_micros.is_some();
        if forgotten {
            member.lane_micros = None;
        }
        let mean = member.lane_micros.get_or_insert(found);
        *mean += (found.min(*mean * OUTLIER) - *mean) / 4.0;
        if let Some(active) = self.active.as_mut().filter(|_| again) {
            // It was given a lane to see how fast it is now: one step tells.
            active.assigned_at = active.step.saturating_sub(RETHINK);
        }
    }

    /// Time that a lane takes on a worker, if it has computed one lately.
    pub(super) fn lane_time(&self, session: SessionId) -> Option<f64> {
        let member = self.members.get(&session)?;
        let step = self.active.as_ref().map_or(0, |active| active.step);
        let lately = member.pause.0 + FORGOTTEN >= step;
        member.lane_micros.filter(|_| lately)
    }

    /// Whose lanes are whose, if anything has changed that makes another assignment better.
    fn assign(&mut self, out: &mut Vec<Action>) {
        let speed = |s: SessionId| (s, self.lane_time(s));
        let ready: Vec<_> = self.by_site().into_iter().map(speed).collect();
        let active = self.active.as_mut().expect("a run is at a boundary");
        let lanes = active.plan.spec.train.lanes;
        let same = active.assignment.len() == ready.len()
            && active.assigned_to.iter().eq(ready.iter().map(|(s, _)| s));
        if same && active.step < active.assigned_at + RETHINK {
            return;
        }
        active.assigned_at = active.step;
        let fresh = lanes::assign(lanes, &ready);
        let time = |assignment: &BTreeMap<SessionId, Range<Lane>>| {
            let of = |(s, micros): &(SessionId, Option<f64>)| {
                assignment.get(s).map_or(0, Range::len) as f64 * micros.unwrap_or(0.0)
            };
            ready.iter().map(of).fold(0.0, f64::max)
        };
        if same && time(&fresh) > WORTHWHILE * time(&active.assignment) {
            return;
        }
        active.generation += 1;
        active.assignment = fresh;
        active.assigned_to = ready.iter().map(|(s, _)| *s).collect();
        let given = active.assignment.iter();
        out.push(Action::Assigned {
            run: active.plan.run.clone(),
            step: active.step + 1,
            generation: active.generation,
            lanes: given.map(|(s, l)| (*s, l.clone().collect())).collect(),
        });
    }

    pub(super) fn start_step(&mut self, now: u64, out: &mut Vec<Action>) {
        self.introduce(out);
        if !self.is_linked() {
            let active = self.active.as_mut().expect("a run is at a boundary");
            let since_ms = match active.phase {
                Phase::Linking { since_ms } => since_ms,
                _ => now,
            };
            active.phase = Phase::Linking { since_ms };
            return;
        }
        self.find_sites();
        self.assign(out);
        let active = self.active.as_ref().expect("a run is at a boundary");
        let members = &self.members;
        let behind = |s: &SessionId| members[s].applied.is_none_or(|a| a + 1 < active.step);
        let late: BTreeSet<SessionId> = active.ready.iter().copied().filter(behind).collect();
        let hands = active.first_assignment(&late);
        let owners = self.choose_owners(now, &hands);
        self.note_owners(&owners, out);
        let active = self.active.as_mut().expect("a run is at a boundary");
        let lanes = active.plan.spec.train.lanes;
        let step = active.step + 1;
        let run = active.plan.run.clone();
        if matches!(owners, Ownership::Star) {
            let run = run.clone();
            active.opened = Some(step);
            out.push(Action::OpenStep { run, step });
        }
        let told = owners.told();
        for (session, lanes) in hands.all() {
            if lanes.is_empty() && !matches!(told, Owners::Shares(_)) {
                continue;
            }
            let message = ToWorker::Compute {
                run: run.clone(),
                step,
                generation: active.generation,
                lanes,
                owners: told.clone(),
            };
            out.push(Action::Send { session, message });
        }
        active.last_workers = active.ready.len();
        active.phase = Phase::Stepping(StepInFlight {
            step,
            last_done_ms: active.ready.iter().map(|s| (*s, now)).collect(),
            hands,
            owners,
            sums: vec![None; lanes as usize],
            unknown: lanes as usize,
            delivered: vec![false; lanes as usize],
            root: None,
            started_ms: now,
            computed_ms: now,
            undisturbed_ms: now,
            redone: Vec::new(),
            moved: BTreeSet::new(),
        });
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn lane_done(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        lane: Lane,
        sums: LaneSums,
        out: &mut Vec<Action>,
    ) {
        let Some(flight) = self.flight(run, step) else {
            return;
        };
        let Some(slot) = flight.sums.get_mut(lane as usize) else {
            return;
        };
        let last = flight.last_done_ms.insert(session, now);
        let pause = now.saturating_sub(last.unwrap_or(now));
        let same = |a: LaneSums| {
            a.loss.to_bits() == sums.loss.to_bits() && a.weight.to_bits() == sums.weight.to_bits()
        };
        match *slot {
            Some((known, other)) if !same(known) => {
                let error = format!(
                    "step {step}: workers {other} and {session} disagree on the loss of lane {lane} ({} and {}); one of the two machines computes wrongly: take the one away that you trust less, then `cohort resume {run}`",
                    known.loss, sums.loss
                );
                return self.end_run(now, run, Change::Failed { error }, out);
            }
            Some(_) => {}
            None => {
                *slot = Some((sums, session));
                flight.unknown -= 1;
                flight.computed_ms = now;
            }
        }
        flight.note_settled(lane, now);
        if let Some(member) = self.members.get_mut(&session) {
            let (of, longest) = member.pause;
            // A step in which lanes were given away, and so computed one by one, says little.
            let known = if of == step { longest } else { longest * 3 / 4 };
            member.pause = (step, pause.max(known));
        }
        self.spare(run, step, &[lane], out);
        self.try_commit(now, out);
    }

    /// The coordinator's exchange holds lanes.
    pub(super) fn delivered(
        &mut self,
        now: u64,
        run: &RunId,
        step: Step,
        lanes: &[Lane],
        out: &mut Vec<Action>,
    ) {
        let star = |f: &mut StepInFlight| matches!(f.owners, Ownership::Star);
        if self.flight(run, step).is_some_and(star) {
            self.lanes_delivered(now, run, step, lanes, out);
        }
    }

    /// Every owner holds these lanes.
    pub(super) fn lanes_delivered(
        &mut self,
        now: u64,
        run: &RunId,
        step: Step,
        lanes: &[Lane],
        out: &mut Vec<Action>,
    ) {
        let Some(flight) = self.flight(run, step) else {
            return;
        };
        for &lane in lanes {
            if let Some(delivered) = flight.delivered.get_mut(lane as usize) {
                *delivered = true;
                flight.note_settled(lane, now);
            }
        }
        self.spare(run, step, lanes, out);
    }

    /// Tells the others that have settled lanes that they need not compute them.
    fn spare(&mut self, run: &RunId, step: Step, lanes: &[Lane], out: &mut Vec<Action>) {
        let Some(flight) = self.flight(run, step) else {
            return;
        };
        let mut skips: BTreeMap<SessionId, Vec<Lane>> = BTreeMap::new();
        let settled = |lane: &&Lane| flight.settled(**lane);
        let settled: BTreeSet<Lane> = lanes.iter().filter(settled).copied().collect();
        for lane in settled {
            let found_by = flight.sums[lane as usize].map(|(_, by)| by);
            let holders = flight.hands.holders(lane).iter().copied();
            let others: Vec<SessionId> = holders.filter(|s| Some(*s) != found_by).collect();
            for session in others {
                if matches!(flight.owners, Ownership::Shares(_)) {
                    // If the owners are lost, whoever was told to skip it cannot be relied on.
                    flight.hands.take(session, lane);
                }
                skips.entry(session).or_default().push(lane);
            }
        }
        for (session, lanes) in skips {
            let message = ToWorker::Skip {
                run: run.clone(),
                step,
                lanes,
            };
            out.push(Action::Send { session, message });
        }
    }

    pub(super) fn root_ready(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        totals: RootTotals,
        out: &mut Vec<Action>,
    ) {
        let alone = |f: &&mut StepInFlight| matches!(f.owners, Ownership::Alone(s) if s == session);
        if let Some(flight) = self.flight(run, step).filter(alone) {
            flight.root = Some(totals);
            self.try_commit(now, out);
        }
    }

    pub(super) fn root_complete(
        &mut self,
        now: u64,
        run: &RunId,
        step: Step,
        totals: RootTotals,
        out: &mut Vec<Action>,
    ) {
        let star = |f: &&mut StepInFlight| matches!(f.owners, Ownership::Star);
        if let Some(flight) = self.flight(run, step).filter(star) {
            flight.root = Some(totals);
            self.try_commit(now, out);
        }
    }

    pub(super) fn try_commit(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a step is in flight");
        if active.disputed.is_some() {
            return;
        }
        let Phase::Stepping(flight) = &active.phase else {
            return;
        };
        let Some(root) = flight.complete() else {
            return;
        };
        let members = &self.members;
        let applied = |s: &SessionId| members[s].applied == Some(active.step);
        if active.division.is_some() && !active.ready.iter().all(applied) {
            // Parameters of the step before may still be on their way, and so may the votes on it.
            return;
        }
        let mut entry = active.entry_of(flight, root);
        let run = active.plan.run.clone();
        let tolerated = entry.is_finite() || active.plan.spec.skips();
        if !tolerated || entry.weight <= 0.0 {
            let error = format!(
                "step {}: the loss is {}, the gradient norm {} and the number of scored tokens {}; each must be finite and the last above zero (lower train.learning_rate, or look at the data)",
                entry.step, entry.loss_sum, entry.grad_norm, entry.weight
            );
            return self.end_run(now, &run, Change::Failed { error }, out);
        }
        let millis = Some(now.saturating_sub(flight.started_ms));
        let here = matches!(flight.owners, Ownership::Star);
        let redone = active.redone(now);
        let anomaly = active.judge(&entry);
        entry.skipped = anomaly.as_ref().is_some_and(|a| a.action.skips());
        let entry = Arc::new(entry);
        active.record(&entry);
        let hash_state = active.hash_wanted(entry.step);
        let commit = active.commit_of(&entry, &active.recent[&entry.step].1, hash_state);
        let brief = commit.proof.entry.is_none();
        let told = Action::SendAll {
            sessions: active.followers(),
            message: ToWorker::Commit {
                run: run.clone(),
                commit,
            },
        };
        if hash_state {
            active.hashed.insert(entry.step);
        }
        active.kept.clear();
        if !here {
            active.released = active.step;
        }
        active.last_loss = entry.loss();
        active.enter_boundary();
        let record = Action::Committed(StepRecord {
            run: run.clone(),
            entry,
            millis,
            workers: active.last_workers,
        });
        // What is recorded before a commit goes out is durable then. What nobody could bring back has to be.
        match brief {
            true => out.extend([record, told]),
            false => out.extend([told, record]),
        }
        if let Some(anomaly) = anomaly {
            let run = run.clone();
            out.push(Action::Unusual { run, anomaly });
        }
        for redone in redone {
            let run = run.clone();
            let what = Happening::Redone(redone);
            out.push(Action::Happened { run, what });
        }
        self.at_boundary(now, out);
    }
}

impl Active {
    /// The lanes of a new step: those of the assignment, but whoever came back with computed lanes keeps them, and whoever
    /// is more than a step behind gets none.
    fn first_assignment(&self, late: &BTreeSet<SessionId>) -> Hands {
        let lanes = self.plan.spec.train.lanes;
        let everybody_is_late = late.len() == self.ready.len();
        let mut takers: Vec<Option<SessionId>> = vec![None; lanes as usize];
        let mut in_time: Vec<(usize, SessionId)> = Vec::new();
        for (session, range) in &self.assignment {
            if everybody_is_late || !late.contains(session) {
                in_time.push((range.len(), *session));
                takers[range.start as usize..range.end as usize].fill(Some(*session));
            }
        }
        let left: Vec<Lane> = (0..lanes)
            .filter(|l| takers[*l as usize].is_none())
            .collect();
        in_time.sort_unstable();
        let in_time = in_time.into_iter().map(|(_, session)| session);
        for (taker, lanes) in lanes::reassign(&left, in_time) {
            lanes
                .into_iter()
                .for_each(|l| takers[l as usize] = Some(taker));
        }
        let mut claimed = BTreeSet::new();
        let kept = self.kept.iter().filter(|(s, _)| self.ready.contains(s));
        for (&session, kept) in kept {
            for &lane in kept.range(..lanes).filter(|l| claimed.insert(**l)) {
                takers[lane as usize] = Some(session);
            }
        }
        let mut hands = Hands::new(lanes);
        self.ready
            .iter()
            .for_each(|session| hands.give(*session, []));
        for (lane, taker) in (0..lanes).zip(takers) {
            hands.give(taker.expect("somebody is ready"), [lane]);
        }
        hands
    }

    /// Whether a step that is about to be committed is out of the ordinary.
    fn judge(&self, entry: &Entry) -> Option<Anomaly> {
        self.history.judge(self.plan.spec.watched()?, entry)
    }

    /// The ledger's entry of a complete step, not yet judged. Pure arithmetic along the tree.
    fn entry_of(&self, flight: &StepInFlight, root: RootTotals) -> Entry {
        let train = &self.plan.spec.train;
        let tree = Tree::new(train.lanes);
        let done = |s: &Option<(LaneSums, SessionId)>| s.expect("the step is complete").0;
        let lanes: Vec<LaneSums> = flight.sums.iter().map(done).collect();
        let sum = |f: fn(&LaneSums) -> f64| tree.sum(&lanes.iter().map(f).collect::<Vec<_>>());
        let (loss_sum, weight) = (sum(|s| s.loss), sum(|s| s.weight));
        let before = flight.step - 1;
        let state_hash_before = state_hash_due(flight.step).then(|| {
            self.agreed(before)
                .expect("whoever computed a lane has hashed")
        });
        Entry {
            step: flight.step,
            first_position: self.chain.next_position(),
            samples: train.samples_per_step(),
            lanes,
            loss_sum,
            weight,
            grad_norm: root.sum_of_squares.sqrt() / weight,
            learning_rate: learning_rate(train, flight.step),
            root_hash: root.hash,
            state_hash_before,
            skipped: false,
            previous: self.chain.head(),
        }
        .canonical()
    }
}
