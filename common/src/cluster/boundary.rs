//! What happens between two steps: validations (`evaluating.rs`), stops, checkpoints, members that come and go, and at
//! last the next step.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::cluster::coordinator::Machine;
use crate::cluster::events::{Action, Change, LeftReason};
use crate::cluster::messages::{StateSource, ToWorker};
use crate::cluster::run::{Active, Phase, SnapshotReason, Writing};
use crate::ids::{RunId, SessionId, Step};

impl Machine {
    /// Does the next thing that the boundary owes, or starts the next step.
    pub(super) fn at_boundary(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        if active.ready.is_empty() {
            return self.fall_back(now, out);
        }
        if let Some(split) = active.boundary.evals.pop() {
            return self.start_eval(now, split, out);
        }
        let at_end = active.at_end();
        let saved = active.saved();
        // A snapshot is taken only where the workers hash their states and can vouch for it. Where that is not so, a
        // stop or a checkpoint waits for the next boundary, which is.
        let hashed = active.hashed.contains(&active.step);
        if active.stop_requested && !at_end && saved {
            let (run, step) = (active.plan.run.clone(), active.step);
            return self.end_run(now, &run, Change::Stopped { step }, out);
        }
        if active.stop_requested && !at_end && hashed {
            return self.snapshot_and_wait(SnapshotReason::Stop, out);
        }
        if let Some(reason) = active.boundary.pause.filter(|_| !at_end) {
            if saved {
                let (run, step) = (active.plan.run.clone(), active.step);
                return self.end_run(now, &run, Change::Paused { step, reason }, out);
            }
            if hashed {
                return self.snapshot_and_wait(SnapshotReason::Stop, out);
            }
        }
        if at_end && !saved {
            return self.snapshot_and_wait(SnapshotReason::Final, out);
        }
        if active.boundary.checkpoint && !saved && hashed {
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
            };
            let run = active.plan.run.clone();
            return self.end_run(now, &run, change, out);
        }
        self.admit(out);
        if !self.let_go(now, out) {
            return;
        }
        if self.regroups() {
            return self.regroup(out);
        }
        self.serve_joiners(true, out);
        self.active
            .as_mut()
            .expect("a run is at a boundary")
            .slowest = None;
        self.release(out);
        let active = self.active.as_mut().expect("a run is at a boundary");
        if active.step - active.released >= active.plan.retain {
            active.phase = Phase::Yielding;
            return;
        }
        self.start_step(now, out);
    }

    /// Lets the workers go that were asked to. Says whether there is somebody left to go on with.
    fn let_go(&mut self, now: u64, out: &mut Vec<Action>) -> bool {
        let active = self.active.as_mut().expect("a run is at a boundary");
        let leaving = |s: &SessionId| self.members[s].leaving;
        let (going, staying): (Vec<_>, Vec<_>) =
            active.ready.iter().copied().partition(|s| leaving(s));
        if going.is_empty() {
            active.leaving = false;
            return true;
        }
        active.leaving = true;
        if staying.is_empty() && !active.saved() {
            if !active.hashed.contains(&active.step) {
                // One more step, whose state they can vouch for.
                return true;
            }
            self.snapshot_and_wait(SnapshotReason::Farewell, out);
            return false;
        }
        if active.division.is_some() && !active.saved() {
            // What those who go keep has to be somewhere.
            self.snapshot_and_wait(SnapshotReason::Regroup, out);
            return false;
        }
        active.broken |= active.division.take().is_some();
        let mut last = false;
        for session in going {
            let active = self.active.as_mut().expect("a run is at a boundary");
            if active.donates(session) && !staying.is_empty() {
                // It stays to upload, without lanes.
                active.ready.remove(&session);
                continue;
            }
            last = active.ready.len() == 1;
            active.phase = Phase::Snapshotting(SnapshotReason::Farewell);
            active.ready.remove(&session);
            self.expel(now, session, LeftReason::Farewell, out);
        }
        if last {
            self.fall_back(now, out);
        }
        !last
    }

    /// Asks a worker for the state of this boundary.
    pub(super) fn request_snapshot(&mut self, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        active.boundary.checkpoint = false;
        // One that stays, if there is one.
        let leaving = |s: &&SessionId| self.members[*s].leaving;
        let donor = active.ready.iter().min_by_key(leaving);
        let donor = *donor.expect("someone has the state");
        let asked = match &active.division {
            None => BTreeMap::from([(donor, None)]),
            Some(division) => {
                // All of them hash what they keep, so that they can vouch for it.
                active.hashed.insert(active.step);
                let mut donors = division.donors(&active.ready).expect("nothing is lost");
                let slices = |s: &SessionId| (*s, Some(donors.remove(s).unwrap_or_default()));
                active.ready.iter().map(slices).collect()
            }
        };
        let gives = |(s, slices): (&SessionId, &Option<Vec<Range<u32>>>)| {
            let all = slices.is_none();
            (all || slices.iter().flatten().next().is_some()).then_some(*s)
        };
        active.writing = Some(Writing {
            step: active.step,
            donors: asked.iter().filter_map(gives).collect(),
            chain: active.chain.clone(),
            written: None,
        });
        for (session, slices) in asked {
            let message = ToWorker::Snapshot {
                run: active.plan.run.clone(),
                step: active.step,
                slices,
            };
            out.push(Action::Send { session, message });
        }
    }

    pub(super) fn snapshot_and_wait(&mut self, reason: SnapshotReason, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        match &active.writing {
            None => self.request_snapshot(out),
            Some(writing) if writing.step == active.step => {}
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
        state_hash: [u8; 32],
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        let due = active.writing.as_mut().filter(|w| w.step == step);
        let Some(writing) = due else { return };
        writing.written = Some(state_hash);
        self.settle(now, out);
    }

    /// The state on disk is what the workers agree on: from here the run can go on if all is lost.
    pub(super) fn checkpoint_good(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a checkpoint was settled");
        let writing = active.writing.take().expect("a checkpoint was settled");
        let step = writing.step;
        active.durable.source = StateSource::Checkpoint(step);
        active.durable.chain = writing.chain;
        let run = active.plan.run.clone();
        out.push(Action::CheckpointGood { run, step });
        self.dismiss_donors(now, &writing.donors, out);
        self.serve_joiners(false, out);
        self.go_on_waiting(now, out);
    }

    /// Goes on where training stands until something is written, or until somebody has caught up.
    pub(super) fn go_on_waiting(&mut self, now: u64, out: &mut Vec<Action>) {
        let waits = |a: &Active| {
            let phase = &a.phase;
            matches!(
                phase,
                Phase::Snapshotting(_) | Phase::Yielding | Phase::Linking { .. }
            )
        };
        if self.active.as_ref().is_some_and(waits) {
            self.at_boundary(now, out);
        }
    }

    /// Workers that only stayed to upload may go.
    pub(super) fn dismiss_donors(
        &mut self,
        now: u64,
        donors: &BTreeSet<SessionId>,
        out: &mut Vec<Action>,
    ) {
        for donor in donors {
            let active = self.active.as_ref().expect("a run is active");
            let waits = |m: &crate::cluster::coordinator::Member| m.leaving;
            if !active.ready.contains(donor) && self.members.get(donor).is_some_and(waits) {
                self.expel(now, *donor, LeftReason::Farewell, out);
            }
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
        let Some(writing) = active.writing.take_if(|w| w.step == step) else {
            return;
        };
        active.snapshot_failed = Some(active.step);
        let text = format!(
            "the checkpoint of step {step} could not be written: {error}; make room on the disk, then resume the run"
        );
        let reason = match active.phase {
            Phase::Snapshotting(reason) => Some(reason),
            _ => None,
        };
        // What is divided can go on being so, unless it must be divided anew.
        let can_wait = |reason: SnapshotReason| match reason {
            SnapshotReason::Regroup => !active.broken && !active.leaving,
            reason => reason == SnapshotReason::Backlog,
        };
        match reason.filter(|reason| !can_wait(*reason)) {
            None => {
                let run = Some(run.clone());
                out.push(Action::Note { run, text });
                self.dismiss_donors(now, &writing.donors, out);
                self.go_on_waiting(now, out);
            }
            Some(_) => self.end_run(now, run, Change::Failed { error: text }, out),
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
        // One that is on disk already is not lost any more.
        let open = |w: &mut Writing| w.step == step && w.written.is_none();
        let Some(writing) = active.writing.take_if(open) else {
            return;
        };
        active.boundary.checkpoint = true;
        self.dismiss_donors(now, &writing.donors, out);
        self.go_on_waiting(now, out);
    }

    /// The donor says that it could not upload.
    pub(super) fn snapshot_lost(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        out: &mut Vec<Action>,
    ) {
        if self.active_as(run).is_some_and(|a| a.donates(session)) {
            self.checkpoint_lost(now, run, step, out);
        }
    }
}

impl Active {
    /// Whether a session is uploading the state.
    pub(super) fn donates(&self, session: SessionId) -> bool {
        let donor = |w: &Writing| w.donors.contains(&session) && w.written.is_none();
        self.writing.as_ref().is_some_and(donor)
    }

    /// The step that is in flight, or the state's between two.
    pub(super) fn now_at(&self) -> Step {
        match &self.phase {
            Phase::Stepping(flight) => flight.step,
            _ => self.step,
        }
    }
}
