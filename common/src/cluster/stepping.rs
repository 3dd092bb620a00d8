//! A step: lanes are given out, redone when their worker is lost or late, and committed when everything is there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::aggregate::RootTotals;
use crate::cluster::coordinator::Machine;
use crate::cluster::events::{
    Action, Change, Happening, LeftReason, RedoReason, Redone, StepRecord,
};
use crate::cluster::messages::{LaneSums, ToWorker};
use crate::cluster::run::{Active, Phase, Recovery, StepInFlight};
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::lanes;
use crate::ledger::{Entry, state_hash_due};
use crate::schedule::learning_rate;
use crate::tree::Tree;

/// An assignment is changed for speed only if the slowest worker's time falls below this share of what it was.
const WORTHWHILE: f64 = 0.85;

/// Steps between two thoughts about speed.
const RETHINK: Step = 16;

/// A lane is late when its worker needs this much longer for it than usual, plus a grace of [`LATE_MS`].
const LATE: f64 = 2.0;

/// Below this nothing is late.
const LATE_MS: f64 = 100.0;

/// A lane's time counts at most this much more than the mean so far: a process that was frozen is not slow.
const OUTLIER: f64 = 4.0;

impl Machine {
    fn flight(&mut self, run: &RunId, step: Step) -> Option<&mut StepInFlight> {
        match &mut self.active_as(run)?.phase {
            Phase::Stepping(flight) if flight.step == step => Some(flight),
            _ => None,
        }
    }

    pub(super) fn learn_speed(&mut self, session: SessionId, micros: u64) {
        let member = self.members.get_mut(&session).expect("it spoke");
        let found = (micros as f64).max(1.0);
        let mean = member.lane_micros.get_or_insert(found);
        *mean += (found.min(*mean * OUTLIER) - *mean) / 4.0;
    }

    /// Whose lanes are whose, if anything has changed that makes another assignment better.
    fn assign(&mut self, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        let lanes = active.plan.spec.train.lanes;
        let members = &self.members;
        let ready: Vec<_> = active
            .ready
            .iter()
            .map(|s| (*s, members[s].lane_micros))
            .collect();
        let same = active.assignment.keys().eq(active.ready.iter());
        if same && active.step < active.assigned_at + RETHINK {
            return;
        }
        active.assigned_at = active.step;
        let fresh: BTreeMap<SessionId, BTreeSet<Lane>> = lanes::assign(lanes, &ready)
            .into_iter()
            .map(|(session, range)| (session, range.collect()))
            .collect();
        let time = |assignment: &BTreeMap<SessionId, BTreeSet<Lane>>| {
            let of = |(s, micros): &(SessionId, Option<f64>)| {
                assignment.get(s).map_or(0, BTreeSet::len) as f64 * micros.unwrap_or(0.0)
            };
            ready.iter().map(of).fold(0.0, f64::max)
        };
        if same && time(&fresh) > WORTHWHILE * time(&active.assignment) {
            return;
        }
        active.generation += 1;
        active.assignment = fresh;
        let given = active.assignment.iter();
        out.push(Action::Assigned {
            run: active.plan.run.clone(),
            step: active.step + 1,
            generation: active.generation,
            lanes: given
                .map(|(s, l)| (*s, l.iter().copied().collect()))
                .collect(),
        });
    }

    pub(super) fn start_step(&mut self, now: u64, out: &mut Vec<Action>) {
        self.assign(out);
        let active = self.active.as_mut().expect("a run is at a boundary");
        let lanes = active.plan.spec.train.lanes;
        let step = active.step + 1;
        let run = active.plan.run.clone();
        let alone = active.ready.len() == 1 && active.joiners.is_empty();
        let sole_owner = active.ready.first().copied().filter(|_| alone);
        if sole_owner.is_none() {
            let run = run.clone();
            out.push(Action::OpenStep { run, step });
        }
        let members = &self.members;
        let behind = |s: &SessionId| members[s].applied.is_none_or(|a| a + 1 < active.step);
        let late: Vec<SessionId> = active.ready.iter().copied().filter(behind).collect();
        let assigned = active.first_assignment(&late);
        for (&session, lanes) in &assigned {
            if lanes.is_empty() {
                continue;
            }
            let message = ToWorker::Compute {
                run: run.clone(),
                step,
                generation: active.generation,
                lanes: lanes.iter().copied().collect(),
                sole_owner: sole_owner.is_some(),
            };
            out.push(Action::Send { session, message });
        }
        active.last_workers = active.ready.len();
        active.phase = Phase::Stepping(StepInFlight {
            step,
            last_done_ms: assigned.keys().map(|s| (*s, now)).collect(),
            assigned,
            sole_owner,
            sums: vec![None; lanes as usize],
            delivered: BTreeSet::new(),
            root: None,
            started_ms: now,
            undisturbed_ms: now,
            redone: Vec::new(),
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
        flight.last_done_ms.insert(session, now);
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
            None => *slot = Some((sums, session)),
        }
        flight.note_settled(lane, now);
        self.spare(run, step, &[lane], out);
        self.try_commit(now, out);
    }

    pub(super) fn delivered(
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
        flight.delivered.extend(lanes);
        for &lane in lanes {
            flight.note_settled(lane, now);
        }
        self.spare(run, step, lanes, out);
    }

    /// Tells the others that have settled lanes that they need not compute them.
    fn spare(&mut self, run: &RunId, step: Step, lanes: &[Lane], out: &mut Vec<Action>) {
        let Some(flight) = self.flight(run, step) else {
            return;
        };
        for &lane in lanes.iter().filter(|&&l| flight.settled(l)) {
            let found_by = flight.sums[lane as usize].map(|(_, by)| by);
            for session in flight.holders(lane).filter(|s| Some(*s) != found_by) {
                let message = ToWorker::Skip {
                    run: run.clone(),
                    step,
                    lanes: vec![lane],
                };
                out.push(Action::Send { session, message });
            }
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
        let sole = |f: &mut StepInFlight| f.sole_owner == Some(session);
        if self.flight(run, step).is_some_and(sole) {
            self.root_complete(now, run, step, totals, out);
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
        if let Some(flight) = self.flight(run, step) {
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
        let entry = Arc::new(active.entry_of(flight, root));
        let run = active.plan.run.clone();
        let finite = entry.grad_norm.is_finite() && entry.loss_sum.is_finite();
        if !finite || entry.weight <= 0.0 {
            let error = format!(
                "step {}: the loss is {}, the gradient norm {} and the number of scored tokens {}; each must be finite and the last above zero (lower train.learning_rate, or look at the data)",
                entry.step, entry.loss_sum, entry.grad_norm, entry.weight
            );
            return self.end_run(now, &run, Change::Failed { error }, out);
        }
        let millis = Some(now.saturating_sub(flight.started_ms));
        let sole = flight.sole_owner.is_some();
        let redone = active.redone(now);
        let hash_state = active.hash_wanted(entry.step);
        let commit = active.commit_of(&entry, hash_state);
        for session in active.followers() {
            let message = ToWorker::Commit {
                run: run.clone(),
                commit: commit.clone(),
            };
            out.push(Action::Send { session, message });
        }
        active.record(&entry);
        if hash_state {
            active.hashed.insert(entry.step);
        }
        active.kept.clear();
        if sole {
            active.released = active.step;
        }
        active.last_loss = entry.loss();
        active.enter_boundary();
        out.push(Action::Committed(StepRecord {
            run: run.clone(),
            entry,
            millis,
            workers: active.last_workers,
        }));
        for redone in redone {
            let run = run.clone();
            let what = Happening::Redone(redone);
            out.push(Action::Happened { run, what });
        }
        self.at_boundary(now, out);
    }

    /// Takes a lost session out of the active run; its work goes to the others.
    pub(super) fn lose(
        &mut self,
        now: u64,
        session: SessionId,
        why: LeftReason,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active.as_mut() else {
            return;
        };
        let was_ready = active.ready.remove(&session);
        active.joiners.remove(&session);
        active.kept.remove(&session);
        if active.donates(session) {
            active.writing = None;
            active.boundary.checkpoint = true;
        }
        if let Phase::Loading(waiting) = &mut active.phase {
            waiting.remove(&session);
            if waiting.is_empty() {
                self.start_training(now, out);
            }
            return;
        }
        if matches!(active.phase, Phase::Gathering) {
            return;
        }
        if let Some(step) = active.disputed.filter(|_| !active.ready.is_empty()) {
            // Perhaps only this one had not said yet what it has.
            self.judge(now, step, out);
            if self.active.as_ref().is_none_or(|a| a.disputed.is_none()) {
                return;
            }
        }
        self.release(out);
        let active = self.active.as_ref().expect("a run is active");
        if !was_ready {
            // It may be the one that everybody yields to.
            if matches!(active.phase, Phase::Yielding) {
                self.at_boundary(now, out);
            }
            return;
        }
        if active.ready.is_empty() {
            return self.fall_back(now, out);
        }
        match active.phase {
            Phase::Stepping(_) => self.redo_lanes(session, why, out),
            Phase::Evaluating(_) => self.redo_units(session, out),
            _ => self.at_boundary(now, out),
        }
        self.settle(now, out);
    }

    fn redo_lanes(&mut self, lost: SessionId, why: LeftReason, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a step is in flight");
        let Phase::Stepping(flight) = &mut active.phase else {
            unreachable!("called with a step in flight");
        };
        let open = flight.open_lanes(lost);
        flight.assigned.remove(&lost);
        // A lane that was late is with somebody else already.
        let alone = |l: &Lane| flight.holders(*l).next().is_none();
        let missing: Vec<Lane> = open.into_iter().filter(alone).collect();
        if missing.is_empty() {
            return;
        }
        let loads: Vec<_> = active
            .ready
            .iter()
            .map(|s| (*s, flight.open_lanes(*s).len()))
            .collect();
        let moves = lanes::reassign(&missing, &loads);
        active.give(lost, RedoReason::Lost(why), moves, out);
    }

    /// Gives lanes that are late to workers that have nothing to do. Looked at when time passes, not with every lane.
    pub(super) fn hedge(&mut self, now: u64, out: &mut Vec<Action>) {
        let members = &self.members;
        let Some(active) = self.active.as_mut() else {
            return;
        };
        let Phase::Stepping(flight) = &active.phase else {
            return;
        };
        if flight.sole_owner.is_some() {
            return;
        }
        let known = active.ready.iter().filter_map(|s| members[s].lane_micros);
        let Some(usual) = median(known.collect()) else {
            return;
        };
        let millis = |s: &SessionId| members[s].lane_micros.unwrap_or(usual) / 1000.0;
        let idle = |s: &&SessionId| flight.open_lanes(**s).is_empty();
        let mut idle: Vec<SessionId> = active.ready.iter().filter(idle).copied().collect();
        idle.sort_by(|a, b| millis(a).total_cmp(&millis(b)).then(a.cmp(b)));
        let mut moves: Vec<(SessionId, SessionId, Lane)> = Vec::new();
        for taker in idle {
            let candidates = active.ready.iter().filter_map(|owner| {
                let mut open = flight.open_lanes(*owner);
                open.retain(|l| flight.holders(*l).count() == 1);
                open.retain(|l| !moves.iter().any(|(_, _, taken)| taken == l));
                // The last of them is the one that its owner would come to last.
                let lane = open.pop()?;
                let since = now.saturating_sub(flight.last_done_ms[owner]) as f64;
                let ahead = (open.len() + 1) as f64 * millis(owner);
                let overdue = since > LATE * millis(owner) + LATE_MS;
                let slower = !open.is_empty() && ahead - since > LATE * millis(&taker) + LATE_MS;
                let left = if overdue { f64::MAX } else { ahead - since };
                (overdue || slower).then_some((left, *owner, lane))
            });
            let worst = candidates.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
            if let Some((_, owner, lane)) = worst {
                moves.push((owner, taker, lane));
            }
        }
        for (owner, taker, lane) in moves {
            let moves = BTreeMap::from([(taker, vec![lane])]);
            active.give(owner, RedoReason::Late, moves, out);
            if let Phase::Stepping(flight) = &mut active.phase {
                flight.last_done_ms.insert(taker, now);
            }
        }
    }

    /// Every worker that had the state is gone: those that come back with it are waited for, then the newest state on
    /// disk has to do.
    pub(super) fn fall_back(&mut self, now: u64, out: &mut Vec<Action>) {
        let leaving =
            |(s, m): (&SessionId, &crate::cluster::coordinator::Member)| m.leaving.then_some(*s);
        let leaving: Vec<SessionId> = self.members.iter().filter_map(leaving).collect();
        let active = self.active.as_mut().expect("a run lost its workers");
        let run = active.plan.run.clone();
        if active.stop_requested {
            // Nobody need wait for workers in order to stop.
            let step = active.durable.source.step();
            return self.end_run(now, &run, Change::Stopped { step }, out);
        }
        let from = active.step;
        let through = active.now_at();
        active.return_to_durable();
        active.recovery = Some(Recovery {
            until_ms: now + self.limits.recover_ms,
            expected: active.last_workers.max(1),
        });
        if from > active.step {
            let text = format!(
                "no worker holds the state of step {from} any more; if none comes back with it, the run goes on from step {}",
                active.step
            );
            out.push(Action::Note {
                run: Some(run.clone()),
                text,
            });
        } else {
            active.recovery = None;
        }
        out.push(Action::ReleaseRoots { run, through });
        for session in leaving {
            self.expel(now, session, LeftReason::Farewell, out);
        }
        self.poke(now, out);
    }
}

impl Active {
    /// Back to the newest state on disk, without workers.
    pub(super) fn return_to_durable(&mut self) {
        self.step = self.durable.source.step();
        self.chain = self.durable.chain.clone();
        self.released = self.step;
        self.writing = None;
        self.ready.clear();
        self.joiners.clear();
        self.kept.clear();
        self.votes.clear();
        self.hashed.clear();
        self.disputed = None;
        self.assignment.clear();
        self.phase = Phase::Gathering;
        self.enter_boundary();
    }

    /// The lanes of a new step: those of the assignment, but whoever came back with computed lanes keeps them, and whoever
    /// is more than a step behind gets none.
    fn first_assignment(&self, late: &[SessionId]) -> BTreeMap<SessionId, BTreeSet<Lane>> {
        let mut assigned = self.assignment.clone();
        if late.len() < self.ready.len() {
            for session in late {
                let lanes = assigned.insert(*session, BTreeSet::new());
                let lanes: Vec<Lane> = lanes.into_iter().flatten().collect();
                let in_time = assigned.iter().filter(|(s, _)| !late.contains(s));
                let loads: Vec<_> = in_time.map(|(s, l)| (*s, l.len())).collect();
                for (taker, lanes) in lanes::reassign(&lanes, &loads) {
                    assigned.entry(taker).or_default().extend(lanes);
                }
            }
        }
        let mut claimed = BTreeSet::new();
        let kept = self.kept.iter().filter(|(s, _)| self.ready.contains(s));
        for (&session, lanes) in kept {
            for &lane in lanes.iter().filter(|l| claimed.insert(**l)) {
                for others in assigned.values_mut() {
                    others.remove(&lane);
                }
                assigned.entry(session).or_default().insert(lane);
            }
        }
        assigned
    }

    /// Gives lanes of the step in flight to more workers.
    fn give(
        &mut self,
        from: SessionId,
        reason: RedoReason,
        moves: BTreeMap<SessionId, Vec<Lane>>,
        out: &mut Vec<Action>,
    ) {
        let Phase::Stepping(flight) = &mut self.phase else {
            unreachable!("called with a step in flight");
        };
        let given: Vec<(Lane, SessionId)> = moves
            .iter()
            .flat_map(|(s, lanes)| lanes.iter().map(|l| (*l, *s)))
            .collect();
        for (session, lanes) in moves {
            flight
                .assigned
                .entry(session)
                .or_default()
                .extend(lanes.iter().copied());
            let message = ToWorker::Compute {
                run: self.plan.run.clone(),
                step: flight.step,
                generation: self.generation,
                lanes,
                sole_owner: false,
            };
            out.push(Action::Send { session, message });
        }
        let known = flight.redone.iter_mut();
        let same = known
            .filter(|r| r.from == from && r.reason == reason)
            .next_back();
        match same {
            Some(redone) => redone.lanes.extend(given),
            None => flight.redone.push(Redone {
                step: flight.step,
                from,
                reason,
                lanes: given,
                delay_ms: 0,
            }),
        }
    }

    /// What was given away in the step in flight, and what it cost.
    fn redone(&mut self, now: u64) -> Vec<Redone> {
        let Phase::Stepping(flight) = &mut self.phase else {
            return Vec::new();
        };
        let delay_ms = now.saturating_sub(flight.undisturbed_ms);
        let mut redone = std::mem::take(&mut flight.redone);
        for each in &mut redone {
            each.lanes.sort_unstable();
            each.delay_ms = delay_ms;
        }
        redone
    }

    /// The ledger's entry of a complete step. Pure arithmetic along the tree.
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
            previous: self.chain.head(),
        }
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
