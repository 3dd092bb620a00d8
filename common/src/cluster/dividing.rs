//! Moments that are divided among the workers: who keeps which, and what happens when that changes.
//!
//! While moments are divided, every step is a shared one, of slices that stay the same. A commit is given out as soon as both
//! holders of each slice have its root, and the next one only when everybody has all new parameters. Whoever keeps a slice
//! matters, so nobody joins or leaves beside the others. Instead everybody gets the state of a boundary **anew**: the holders
//! upload their slices, which is an ordinary checkpoint, and all load it under another division. Lanes that were computed for
//! the next step stay.
//!
//! If a worker is lost, the second holder of its slice sends what the others have not got of its parameters, so that all of
//! them reach the boundary; the step in flight is given up, and begins again after that. If both holders of a slice are lost,
//! the newest state on disk has to do. A checkpoint that is due is made of slices, too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::cluster::coordinator::Machine;
use crate::cluster::division::{Digests, Division};
use crate::cluster::events::{Action, LeftReason};
use crate::cluster::messages::ToWorker;
use crate::cluster::run::{Active, Phase, SnapshotReason};
use crate::cluster::sharing::{self, MOST_OWNERS, MOST_SHARERS};
use crate::ids::{RunId, SessionId, Step};
use crate::ledger::Entry;
use crate::spec::RunKind;

/// How long workers that divide moments among them may take to reach each other.
const LINK_MS: u64 = 10_000;

/// Steps between two attempts to divide anew for joiners, after a checkpoint could not be written.
const RETRY: Step = 50;

/// Chunks of a slice, at most: the digests of two come in one message.
const MOST_CHUNKS: u32 = sharing::MOST_CHUNKS as u32 / 2;

impl Machine {
    /// Why these workers have to keep all moments each, if they have to.
    fn whole_because(&self, sessions: &BTreeSet<SessionId>) -> Option<String> {
        let active = self.active.as_ref().expect("a run is active");
        let spec = &active.plan.spec;
        let silent = |s: &&SessionId| self.members[*s].info.listens.is_none();
        if sessions.len() < 2 {
            return Some("there is one worker".into());
        }
        if spec.kind == RunKind::Eval {
            return Some("the run trains nothing".into());
        }
        if spec.train.diloco.is_some() {
            return Some("the run takes rounds, whose lanes need all of them".into());
        }
        if spec.gradient_len() < spec.layout().len() {
            return Some("some of its layers are frozen".into());
        }
        if active.plan.chunks < 2 {
            return Some("the model is too small to be divided".into());
        }
        let owners = sessions.len().min(MOST_OWNERS) as u32;
        if active.plan.chunks / owners >= MOST_CHUNKS {
            return Some(format!("a slice would have more than {MOST_CHUNKS} chunks"));
        }
        if sessions.len() > MOST_SHARERS {
            return Some(format!("there are more than {MOST_SHARERS} workers"));
        }
        if let Some(worker) = sessions.iter().find(silent) {
            return Some(format!("worker {worker} cannot be reached by the others"));
        }
        let apart = active.undivided.as_ref() == Some(sessions);
        apart.then(|| "the workers did not reach each other in time".into())
    }

    /// How these workers are to divide the moments among them, if they are. Tells people when that changes.
    pub(super) fn divide(
        &mut self,
        sessions: &BTreeSet<SessionId>,
        out: &mut Vec<Action>,
    ) -> Option<Division> {
        if !self.limits.divides {
            return None;
        }
        let whole = self.whole_because(sessions);
        let active = self.active.as_mut().expect("a run is active");
        let said = whole.clone().unwrap_or_default();
        let text = match &whole {
            Some(why) => format!("each worker keeps all moments of the optimizer: {why}"),
            None => format!(
                "the moments of the optimizer are divided among {} workers",
                sessions.len()
            ),
        };
        if active.whole_said.replace(said.clone()).as_ref() != Some(&said) || whole.is_none() {
            let run = Some(active.plan.run.clone());
            out.push(Action::Note { run, text });
        }
        match whole {
            Some(_) => None,
            None => Division::among(sessions, active.plan.chunks, MOST_OWNERS),
        }
    }

    /// How moments are divided among workers that have come back with the same step. Those that fit no others are left out;
    /// `None` if nobody is left who has some of the moments.
    pub(super) fn divided_still(
        &self,
        held: &mut Vec<(Arc<Entry>, SessionId)>,
    ) -> Option<Option<Division>> {
        let keeper = |session: &SessionId| {
            let holding = self.members[session].holding.as_ref();
            holding.and_then(|h| h.keeper.clone())
        };
        let before = keeper(&held.first()?.1).map(|k| k.division);
        held.retain(|(_, s)| keeper(s).map(|k| k.division) == before);
        let Some(before) = before else {
            return Some(None);
        };
        let name = |(_, s): &(Arc<Entry>, SessionId)| Some((keeper(s)?.session, *s));
        let names: BTreeMap<SessionId, SessionId> = held.iter().filter_map(name).collect();
        let division = before.renamed(&names);
        let back = held.iter().map(|(_, s)| *s).collect();
        division.is_covered_by(&back).then_some(Some(division))
    }

    /// Whether everybody is to get the state of this boundary anew.
    pub(super) fn regroups(&mut self) -> bool {
        let active = self.active.as_ref().expect("a run is at a boundary");
        if active.broken {
            return true;
        }
        let failed = active.snapshot_failed;
        if !self.limits.divides || failed.is_some_and(|at| active.step < at + RETRY) {
            return false;
        }
        let could = active.division.is_none() && self.whole_because(&active.ready).is_none();
        let wished = could || !active.joiners.is_empty();
        let active = self.active.as_mut().expect("a run is at a boundary");
        let hashed = active.division.is_some() || active.hashed.contains(&active.step);
        // Workers that keep everything must have hashed the state, so that they can vouch for it: one more step.
        active.hash_next = wished && !hashed;
        wished && (hashed || active.saved())
    }

    /// Gets the state of this boundary to all members, divided among them.
    pub(super) fn regroup(&mut self, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        if !active.saved() {
            return self.snapshot_and_wait(SnapshotReason::Regroup, out);
        }
        let stays = self.members.iter().filter(|(_, m)| !m.leaving);
        let mut all: BTreeSet<SessionId> = stays.map(|(s, _)| *s).collect();
        if all.is_empty() {
            all = active.ready.clone();
        }
        active.ready.clear();
        active.joiners.clear();
        let source = active.durable.source;
        let division = self.divide(&all, out);
        self.load(all, source, division, out);
    }

    /// A worker is lost, or does not reach another: the moments are divided anew at the boundary before the step in flight.
    pub(super) fn break_up(&mut self, now: u64, lost: Option<SessionId>, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("moments are divided");
        active.broken = true;
        if !active.is_sound() {
            return self.fall_back(now, out);
        }
        active.serve(lost, out);
        let steps: Vec<Step> = active.digested.keys().copied().collect();
        for step in steps {
            // Perhaps only this one had not said yet what it has.
            self.tally(step);
            if !self.judge(now, step, out) {
                return;
            }
        }
        let active = self.active.as_mut().expect("moments are divided");
        match (&active.phase, lost) {
            (Phase::Evaluating(_), Some(lost)) => self.redo_units(lost, out),
            (Phase::Evaluating(_) | Phase::Loading(_) | Phase::Gathering, _) => {}
            _ => {
                active.keep_lanes();
                self.at_boundary(now, out);
            }
        }
        self.settle(now, out);
    }

    /// Workers did not get each other's slices in time: they keep all moments from now on.
    pub(super) fn give_up_dividing(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("moments are divided");
        active.undivided = Some(active.ready.clone());
        self.break_up(now, None, out);
    }

    /// Whether whoever keeps moments is reached by all others.
    pub(super) fn is_linked(&self) -> bool {
        let active = self.active.as_ref().expect("a run is at a boundary");
        let Some(division) = &active.division else {
            return true;
        };
        let reached = |owner: SessionId| {
            let reaches = |from: &SessionId| self.members[from].reaches.contains(&owner);
            let mut others = active.ready.iter().filter(|from| **from != owner);
            others.all(reaches)
        };
        division.shares().iter().all(|share| reached(share.session))
    }

    /// Links that are not there after a while are not waited for.
    pub(super) fn wait_for_links(&mut self, now: u64, out: &mut Vec<Action>) {
        let since = match self.active.as_ref().map(|a| &a.phase) {
            Some(Phase::Linking { since_ms }) => *since_ms,
            _ => return,
        };
        if now.saturating_sub(since) > LINK_MS {
            self.give_up_dividing(now, out);
        }
    }

    /// A worker says what it has found of its state.
    pub(super) fn digested(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        digests: Digests,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        let Some(division) = &active.division else {
            return;
        };
        let loads = matches!(&active.phase, Phase::Loading(waiting) if waiting.contains(&session));
        if !loads && !active.ready.contains(&session) || step > active.step {
            return;
        }
        let kept = division.kept(session).into_iter().flatten();
        let due: usize = kept.map(|slice| slice.len()).sum();
        let found = digests.kept.len();
        if found != due {
            let what = format!("it told {found} digests of the {due} chunks that it keeps");
            return self.expel(now, session, LeftReason::Protocol(what), out);
        }
        let of_step = active.digested.entry(step).or_default();
        of_step.insert(session, digests);
        if loads {
            return;
        }
        self.tally(step);
        if self.judge(now, step, out) {
            self.settle(now, out);
        }
    }

    /// Makes votes on the whole state of what all workers have found of their parts.
    pub(super) fn tally(&mut self, step: Step) {
        let active = self.active.as_mut().expect("a run is active");
        let (Some(division), Some(found)) = (&active.division, active.digested.get(&step)) else {
            return;
        };
        let of_ready = active
            .ready
            .iter()
            .map(|s| Some((*s, found.get(s)?.clone())));
        let Some(found) = of_ready.collect::<Option<BTreeMap<_, _>>>() else {
            return;
        };
        if let Some(votes) = division.votes(&found) {
            active.votes.entry(step).or_default().replace(votes);
        }
    }
}

impl Active {
    /// Whether the state of this boundary can be had from somebody, or from the disk.
    pub(super) fn is_sound(&self) -> bool {
        let covered = |d: &Division| d.is_covered_by(&self.ready);
        self.saved() || self.division.as_ref().is_none_or(covered)
    }

    /// Has the parameters sent that a lost worker may not have sent.
    fn serve(&self, lost: Option<SessionId>, out: &mut Vec<Action>) {
        let slice = || {
            let (lost, division) = (lost?, self.division.as_ref()?);
            let second = division.second_of(lost)?;
            let [own, _] = division.kept(lost)?;
            self.ready.contains(&second).then_some((second, own))
        };
        if let Some((session, chunks)) = slice() {
            let message = ToWorker::Serve {
                run: self.plan.run.clone(),
                step: self.step,
                chunks,
            };
            out.push(Action::Send { session, message });
        }
    }

    /// Gives the step in flight up, if there is one; who has computed which lanes stays known.
    fn keep_lanes(&mut self) {
        let Phase::Stepping(flight) = &self.phase else {
            return;
        };
        for (lane, sums) in (0..).zip(&flight.sums) {
            if let Some((_, by)) = sums {
                self.kept.entry(*by).or_default().insert(lane);
            }
        }
    }
}
