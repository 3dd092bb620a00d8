//! What happens to the work of workers that are lost or late: others compute it in the same step. And to a run that has
//! lost them all.

use std::collections::BTreeMap;

use crate::cluster::coordinator::{Machine, Member};
use crate::cluster::events::{Action, Change, LeftReason, RedoReason, Redone};
use crate::cluster::messages::ToWorker;
use crate::cluster::run::{Active, Phase, Recovery};
use crate::cluster::sharing::{Introduced, Ownership};
use crate::ids::{Lane, SessionId, Step};
use crate::lanes;

/// A lane is late when its worker is silent this much longer than usual, plus a grace of [`LATE_MS`].
const LATE: f64 = 2.0;

/// Below this nothing is late.
const LATE_MS: f64 = 100.0;

impl Machine {
    /// Takes a lost session out of the active run; its work goes to the others.
    pub(super) fn lose(
        &mut self,
        now: u64,
        session: SessionId,
        applied: Option<Step>,
        why: LeftReason,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active.as_mut() else {
            return;
        };
        let applied_before = active.needs(session, applied);
        active.advanced(applied_before, None);
        let was_ready = active.ready.remove(&session);
        if active.joiners.remove(&session).is_some() {
            // What it said of its state was about one that nobody has any more.
            for votes in active.votes.values_mut() {
                votes.forget(session);
            }
        }
        active.kept.remove(&session);
        let was_donor = active.donates(session);
        if was_donor {
            active.writing = None;
            active.boundary.checkpoint = true;
        }
        if let Phase::Loading(waiting) = &mut active.phase {
            active.broken |= active.division.is_some();
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
            // It may be the one that everybody yields to, or whose upload everybody waits for.
            if was_donor || matches!(active.phase, Phase::Yielding) {
                self.go_on_waiting(now, out);
            }
            return;
        }
        if active.ready.is_empty() {
            return self.fall_back(now, out);
        }
        if active.division.is_some() {
            return self.break_up(now, Some(session), out);
        }
        match active.phase {
            Phase::Stepping(_) => self.redo_lanes(session, why, out),
            Phase::Evaluating(_) => self.redo_units(session, out),
            _ => self.at_boundary(now, out),
        }
        self.settle(now, out);
    }

    fn redo_lanes(&mut self, lost: SessionId, why: LeftReason, out: &mut Vec<Action>) {
        self.collect(out);
        let active = self.active.as_mut().expect("a step is in flight");
        let Phase::Stepping(flight) = &mut active.phase else {
            unreachable!("called with a step in flight");
        };
        // A lane that was late is with somebody else already.
        let missing = flight.hands.leave(lost);
        if missing.is_empty() {
            return;
        }
        // Whoever is not even with this step has nothing to do, but would come to it last.
        let members = &self.members;
        let behind = |s: &SessionId| members[s].applied.is_none_or(|a| a + 1 < active.step);
        let in_time = flight.hands.by_load().filter(|s| !behind(s));
        let mut takers: Vec<SessionId> = in_time.take(missing.len()).collect();
        if takers.is_empty() {
            takers.extend(flight.hands.by_load().take(missing.len()));
        }
        let moves = lanes::reassign(&missing, takers);
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
        if matches!(flight.owners, Ownership::Alone(_)) {
            return;
        }
        let idle = |s: &&SessionId| flight.awaited(**s).next().is_none();
        let mut idle: Vec<SessionId> = active.ready.iter().filter(idle).copied().collect();
        if idle.is_empty() || idle.len() == active.ready.len() {
            return;
        }
        let known = active.ready.iter().filter_map(|s| members[s].lane_micros);
        let Some(usual) = median(known.collect()) else {
            return;
        };
        let millis = |s: &SessionId| members[s].lane_micros.unwrap_or(usual) / 1000.0;
        idle.sort_by(|a, b| millis(a).total_cmp(&millis(b)).then(a.cmp(b)));
        // Each lane that one worker alone has, and how long its worker will still need for it.
        let mut late: Vec<(f64, SessionId, Lane)> = Vec::new();
        for owner in &active.ready {
            let alone = |lane: &Lane| flight.hands.holders(*lane).len() == 1;
            let open = flight.awaited(*owner).filter(alone);
            let since = now.saturating_sub(flight.last_done_ms[owner]) as f64;
            // Lanes that share a pass are told together, when all are done.
            let usual = millis(owner).max(members[owner].pause.1 as f64);
            let overdue = since > LATE * usual + LATE_MS;
            for (place, lane) in open.enumerate() {
                let left = (place + 1) as f64 * millis(owner) - since;
                match (overdue, place) {
                    (true, _) => late.push((f64::MAX, *owner, lane)),
                    // The first is being computed: unless it is overdue, nobody is faster.
                    (false, 0) => {}
                    (false, _) => late.push((left, *owner, lane)),
                }
            }
        }
        // The last first: their owner would come to them last.
        late.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, b.2).cmp(&(b.1, a.2))));
        let mut late = late.into_iter();
        let take = |taker: SessionId| {
            let (left, owner, lane) = late.next()?;
            let worthwhile = left > LATE * millis(&taker) + LATE_MS;
            worthwhile.then_some((owner, taker, lane))
        };
        let moves: Vec<(SessionId, SessionId, Lane)> = idle.into_iter().map_while(take).collect();
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
        let leaving = |(s, m): (&SessionId, &Member)| m.leaving.then_some(*s);
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
        let lost = active.last_workers.saturating_sub(active.ready.len());
        active.return_to_durable();
        active.recovery = Some(Recovery {
            until_ms: now + self.limits.recover_ms,
            expected: lost.max(1),
            here: self.members.len(),
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
        self.assigned_to.clear();
        self.introduced = Introduced::default();
        self.sites = None;
        self.slowest = None;
        self.division = None;
        self.broken = false;
        self.digested.clear();
        self.phase = Phase::Gathering;
        self.enter_boundary();
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
            flight.hands.give(session, lanes.iter().copied());
            flight.moved.extend(&lanes);
            let message = ToWorker::Compute {
                run: self.plan.run.clone(),
                step: flight.step,
                generation: self.generation,
                lanes,
                owners: flight.owners.told(),
            };
            out.push(Action::Send { session, message });
        }
        let mut known = flight.redone.iter_mut();
        match known.rfind(|r| r.from == from && r.reason == reason) {
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
    pub(super) fn redone(&mut self, now: u64) -> Vec<Redone> {
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
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
