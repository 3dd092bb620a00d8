//! The part of the coordinator's machine that carries the active run from boundary to boundary: steps, validations,
//! checkpoints, and what happens to each of them when a worker is lost.

use std::collections::{BTreeMap, BTreeSet};

use crate::aggregate::RootTotals;
use crate::cluster::coordinator::{Action, Change, Machine, StepRecord};
use crate::cluster::messages::{Commit, LaneSums, StateSource, ToWorker};
use crate::cluster::run::{Active, EvalInFlight, Phase, SnapshotReason, StepInFlight};
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::lanes;
use crate::schedule::{gradient_scale, learning_rate};
use crate::tree::Tree;

impl Machine {
    fn active_as(&mut self, run: &RunId) -> Option<&mut Active> {
        self.active.as_mut().filter(|a| a.plan.run == *run)
    }

    fn flight(&mut self, run: &RunId, step: Step) -> Option<&mut StepInFlight> {
        match &mut self.active_as(run)?.phase {
            Phase::Stepping(flight) if flight.step == step => Some(flight),
            _ => None,
        }
    }

    pub(super) fn loaded(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        let Phase::Loading(waiting) = &mut active.phase else {
            return;
        };
        if step != active.step || !waiting.remove(&session) {
            return;
        }
        active.ready.insert(session);
        if waiting.is_empty() {
            self.start_training(now, out);
        } else {
            self.members.get_mut(&session).expect("it spoke").applied = step;
        }
    }

    fn start_training(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_ref().expect("a run is loading");
        if active.ready.is_empty() {
            return self.fall_back(now, out);
        }
        for session in &active.ready {
            let member = self.members.get_mut(session).expect("ready members exist");
            member.applied = active.step;
        }
        let workers = active.ready.len();
        let run = active.plan.run.clone();
        let change = Change::Training { workers };
        out.push(Action::Changed { run, change });
        self.at_boundary(now, out);
    }

    /// Does the next thing that the boundary owes, or starts the next step.
    fn at_boundary(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        if active.ready.is_empty() {
            return self.fall_back(now, out);
        }
        if let Some(split) = active.boundary.evals.pop() {
            return self.start_eval(now, split, out);
        }
        let at_end = active.at_end();
        let run = active.plan.run.clone();
        let step = active.step;
        let saved = active.durable.step() == step;
        if active.stop_requested && !at_end {
            if saved {
                return self.end_run(now, &run, Change::Stopped { step }, out);
            }
            return self.snapshot_and_wait(SnapshotReason::Stop, out);
        }
        if at_end && !saved {
            return self.snapshot_and_wait(SnapshotReason::Final, out);
        }
        if active.boundary.checkpoint && !saved {
            if active.writing.is_some() {
                active.phase = Phase::Snapshotting(SnapshotReason::Backlog);
                return;
            }
            self.request_snapshot(out);
        }
        self.after_checkpoint(now, out);
    }

    fn after_checkpoint(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        if active.at_end() {
            let change = Change::Finished {
                step: active.step,
                train_loss: active.last_loss,
                tokens: active.tokens,
            };
            let run = active.plan.run.clone();
            return self.end_run(now, &run, change, out);
        }
        if self.members.len() > active.ready.len() {
            if active.durable.step() == active.step {
                return self.load_members(out);
            }
            return self.snapshot_and_wait(SnapshotReason::Join, out);
        }
        self.start_step(now, out);
    }

    /// Asks a worker for the state of this boundary, unless that is under way.
    fn request_snapshot(&mut self, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        active.boundary.checkpoint = false;
        let donor = *active.ready.first().expect("someone has the state");
        active.writing = Some((active.step, donor));
        let message = ToWorker::Snapshot {
            run: active.plan.run.clone(),
            step: active.step,
        };
        out.push(Action::Send {
            session: donor,
            message,
        });
    }

    fn snapshot_and_wait(&mut self, reason: SnapshotReason, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        match active.writing {
            None => self.request_snapshot(out),
            Some((step, _)) if step == active.step => {}
            Some(_) => {
                active.phase = Phase::Snapshotting(SnapshotReason::Backlog);
                return;
            }
        }
        let active = self.active.as_mut().expect("a run is at a boundary");
        active.phase = Phase::Snapshotting(reason);
    }

    pub(super) fn checkpoint_written(
        &mut self,
        now: u64,
        run: &RunId,
        step: Step,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        if active.writing.is_some_and(|(s, _)| s == step) {
            active.writing = None;
        }
        if active.durable.step() < step || active.durable.step() == 0 {
            active.durable = StateSource::Checkpoint(step);
        }
        if matches!(active.phase, Phase::Snapshotting(_)) {
            self.at_boundary(now, out);
        }
    }

    pub(super) fn checkpoint_failed(
        &mut self,
        now: u64,
        run: &RunId,
        step: Step,
        error: String,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        if active.writing.is_none_or(|(s, _)| s != step) {
            return;
        }
        active.writing = None;
        let text = format!(
            "the checkpoint of step {step} could not be written: {error}; make room on the disk, then resume the run"
        );
        match active.phase {
            Phase::Snapshotting(SnapshotReason::Backlog) => {
                let run = Some(run.clone());
                out.push(Action::Note { run, text });
                self.at_boundary(now, out);
            }
            Phase::Snapshotting(_) => self.end_run(now, run, Change::Failed { error: text }, out),
            _ => out.push(Action::Note {
                run: Some(run.clone()),
                text,
            }),
        }
    }

    pub(super) fn checkpoint_lost(
        &mut self,
        now: u64,
        run: &RunId,
        step: Step,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        if active.writing.is_some_and(|(s, _)| s == step) {
            active.writing = None;
            active.boundary.checkpoint = true;
            if matches!(active.phase, Phase::Snapshotting(_)) {
                self.at_boundary(now, out);
            }
        }
    }

    fn start_step(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        let lanes = active.plan.spec.train.lanes;
        let step = active.step + 1;
        let run = active.plan.run.clone();
        let ready: Vec<SessionId> = active.ready.iter().copied().collect();
        let sole_owner = (ready.len() == 1).then(|| ready[0]);
        active.generation += 1;
        if sole_owner.is_none() {
            let run = run.clone();
            out.push(Action::OpenStep { run, step });
        }
        let mut assigned = BTreeMap::new();
        for (session, range) in lanes::assign(lanes, &ready) {
            let lanes: Vec<Lane> = range.collect();
            let message = ToWorker::Compute {
                run: run.clone(),
                step,
                generation: active.generation,
                lanes: lanes.clone(),
                sole_owner: sole_owner.is_some(),
            };
            out.push(Action::Send { session, message });
            assigned.insert(session, lanes.into_iter().collect());
        }
        active.phase = Phase::Stepping(StepInFlight {
            step,
            assigned,
            sole_owner,
            sums: vec![None; lanes as usize],
            delivered: BTreeSet::new(),
            root: None,
            started_ms: now,
        });
    }

    pub(super) fn lane_done(
        &mut self,
        now: u64,
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
        let same = |a: LaneSums| {
            a.loss.to_bits() == sums.loss.to_bits() && a.weight.to_bits() == sums.weight.to_bits()
        };
        if slot.is_some_and(|known| !same(known)) {
            let error = format!(
                "step {step}: two workers disagree on the loss of lane {lane}; one of the machines computes wrongly"
            );
            return self.end_run(now, run, Change::Failed { error }, out);
        }
        *slot = Some(sums);
        self.try_commit(now, out);
    }

    pub(super) fn delivered(&mut self, run: &RunId, step: Step, lanes: &[Lane]) {
        if let Some(flight) = self.flight(run, step) {
            flight.delivered.extend(lanes);
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

    fn try_commit(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a step is in flight");
        let Phase::Stepping(flight) = &active.phase else {
            return;
        };
        let Some(root) = flight.complete() else {
            return;
        };
        let record = active.decide(flight, root, now);
        let run = active.plan.run.clone();
        let finite = record.grad_norm.is_finite() && record.sums.loss.is_finite();
        if !finite || record.sums.weight <= 0.0 {
            let error = format!(
                "step {}: the loss is {}, the gradient norm {} and the number of scored tokens {}; each must be finite and the last above zero (lower train.learning_rate, or look at the data)",
                record.step, record.sums.loss, record.grad_norm, record.sums.weight
            );
            return self.end_run(now, &run, Change::Failed { error }, out);
        }
        let commit = active.commit_of(&record);
        for &session in &active.ready {
            let message = ToWorker::Commit {
                run: run.clone(),
                commit,
            };
            out.push(Action::Send { session, message });
        }
        active.step = record.step;
        active.last_loss = record.sums.loss / record.sums.weight;
        active.tokens += record.sums.weight;
        active.enter_boundary();
        out.push(Action::Committed(record));
        self.at_boundary(now, out);
    }

    pub(super) fn applied(
        &mut self,
        session: SessionId,
        run: &RunId,
        step: Step,
        out: &mut Vec<Action>,
    ) {
        if self.active_as(run).is_none() {
            return;
        }
        let slowest = |machine: &Self| {
            let ready = &machine.active.as_ref().expect("checked above").ready;
            ready.iter().map(|s| machine.members[s].applied).min()
        };
        let before = slowest(self);
        self.members.get_mut(&session).expect("it spoke").applied = step;
        let after = slowest(self);
        if let Some(through) = after.filter(|_| after > before) {
            let run = run.clone();
            out.push(Action::ReleaseRoots { run, through });
        }
    }

    fn start_eval(&mut self, now: u64, split: u32, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        let units = active.plan.splits[split as usize].units;
        if units == 0 {
            return self.at_boundary(now, out);
        }
        let ready: Vec<SessionId> = active.ready.iter().copied().collect();
        let mut assigned = BTreeMap::new();
        for (session, range) in lanes::assign(units, &ready) {
            let units: Vec<u32> = range.collect();
            active.send_units(session, split, &units, out);
            assigned.insert(session, units.into_iter().collect());
        }
        active.phase = Phase::Evaluating(EvalInFlight {
            split,
            assigned,
            sums: vec![None; units as usize],
        });
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn unit_done(
        &mut self,
        now: u64,
        run: &RunId,
        step: Step,
        split: u32,
        unit: u32,
        sums: LaneSums,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        let at = active.step;
        let Phase::Evaluating(eval) = &mut active.phase else {
            return;
        };
        if step != at || eval.split != split {
            return;
        }
        let Some(slot) = eval.sums.get_mut(unit as usize) else {
            return;
        };
        *slot = Some(sums);
        for units in eval.assigned.values_mut() {
            units.remove(&unit);
        }
        let Some(done) = eval.sums.iter().copied().collect::<Option<Vec<_>>>() else {
            return;
        };
        // In unit order, in f64: the same bits whoever scored which unit.
        let sums = done.iter().fold(LaneSums::default(), |a, b| LaneSums {
            loss: a.loss + b.loss,
            weight: a.weight + b.weight,
        });
        let run = run.clone();
        out.push(Action::Evaluated {
            run,
            step,
            split,
            sums,
        });
        self.at_boundary(now, out);
    }

    /// Takes a lost session out of the active run; its work goes to the survivors.
    pub(super) fn lose(&mut self, now: u64, session: SessionId, out: &mut Vec<Action>) {
        let Some(active) = self.active.as_mut() else {
            return;
        };
        let was_ready = active.ready.remove(&session);
        if active.writing.is_some_and(|(_, donor)| donor == session) {
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
        if matches!(active.phase, Phase::Gathering) || !was_ready {
            return;
        }
        if active.ready.is_empty() {
            return self.fall_back(now, out);
        }
        match active.phase {
            Phase::Stepping(_) => self.redo_lanes(session, out),
            Phase::Evaluating(_) => self.redo_units(session, out),
            _ => self.at_boundary(now, out),
        }
    }

    fn redo_lanes(&mut self, lost: SessionId, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a step is in flight");
        let Phase::Stepping(flight) = &mut active.phase else {
            unreachable!("called with a step in flight");
        };
        let missing = flight.open_lanes(lost);
        flight.assigned.remove(&lost);
        if missing.is_empty() {
            return;
        }
        let loads: Vec<_> = active
            .ready
            .iter()
            .map(|s| (*s, flight.open_lanes(*s).len()))
            .collect();
        active.generation += 1;
        for (session, lanes) in lanes::reassign(&missing, &loads) {
            let run = active.plan.run.clone();
            let text = format!(
                "step {}: lanes {lanes:?} of {lost} go to {session}",
                flight.step
            );
            out.push(Action::Note {
                run: Some(run.clone()),
                text,
            });
            flight
                .assigned
                .entry(session)
                .or_default()
                .extend(lanes.iter().copied());
            let message = ToWorker::Compute {
                run,
                step: flight.step,
                generation: active.generation,
                lanes,
                sole_owner: false,
            };
            out.push(Action::Send { session, message });
        }
    }

    fn redo_units(&mut self, lost: SessionId, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a validation is in flight");
        let Phase::Evaluating(eval) = &mut active.phase else {
            unreachable!("called with a validation in flight");
        };
        let missing: Vec<u32> = eval
            .assigned
            .remove(&lost)
            .unwrap_or_default()
            .into_iter()
            .collect();
        let loads: Vec<_> = active
            .ready
            .iter()
            .map(|s| (*s, eval.assigned.get(s).map_or(0, BTreeSet::len)))
            .collect();
        let split = eval.split;
        let moves = lanes::reassign(&missing, &loads);
        for (session, units) in &moves {
            eval.assigned.entry(*session).or_default().extend(units);
        }
        for (session, units) in moves {
            active.send_units(session, split, &units, out);
        }
    }

    /// Every worker that had the state is gone: back to the newest state that is on disk.
    fn fall_back(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run lost its workers");
        let run = active.plan.run.clone();
        let from = active.step;
        active.step = active.durable.step();
        active.writing = None;
        active.ready.clear();
        active.phase = Phase::Gathering;
        active.enter_boundary();
        let to = active.step;
        let text = format!(
            "no worker holds the state of step {from} any more; going on from step {to} when workers are there"
        );
        out.push(Action::Note {
            run: Some(run.clone()),
            text,
        });
        let through = from + 1;
        out.push(Action::ReleaseRoots { run, through });
        self.poke(now, out);
    }
}

impl Active {
    /// What the commit of a complete step records. Pure arithmetic along the tree.
    fn decide(&self, flight: &StepInFlight, root: RootTotals, now: u64) -> StepRecord {
        let train = &self.plan.spec.train;
        let tree = Tree::new(train.lanes);
        let lane = |f: fn(LaneSums) -> f64| -> Vec<f64> {
            let done = |s: &Option<LaneSums>| f(s.expect("the step is complete"));
            flight.sums.iter().map(done).collect()
        };
        let sums = LaneSums {
            loss: tree.sum(&lane(|s| s.loss)),
            weight: tree.sum(&lane(|s| s.weight)),
        };
        StepRecord {
            run: self.plan.run.clone(),
            step: flight.step,
            lanes: flight.sums.iter().flatten().copied().collect(),
            sums,
            grad_norm: root.sum_of_squares.sqrt() / sums.weight,
            learning_rate: learning_rate(train, flight.step),
            root_hash: root.hash,
            millis: now.saturating_sub(flight.started_ms),
        }
    }

    fn commit_of(&self, record: &StepRecord) -> Commit {
        let train = &self.plan.spec.train;
        Commit {
            step: record.step,
            scale: gradient_scale(train, record.grad_norm, record.sums.weight),
            learning_rate: record.learning_rate,
        }
    }

    fn send_units(&self, session: SessionId, split: u32, units: &[u32], out: &mut Vec<Action>) {
        if units.is_empty() {
            return;
        }
        let message = ToWorker::Evaluate {
            run: self.plan.run.clone(),
            step: self.step,
            split,
            units: units.to_vec(),
        };
        out.push(Action::Send { session, message });
    }
}
