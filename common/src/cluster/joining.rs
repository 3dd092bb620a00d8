//! How members get the state of a run: all at once before it starts, and one by one beside the others while it trains.
//!
//! A joiner is given a state on disk and every commit since, replays them with roots that the owner has kept for it, and
//! gets lanes when a hash of its state equals that of the others. A worker that comes back with a state in memory
//! replays only what it missed. When all workers were lost, or the coordinator was, those that come back with the
//! youngest state carry the run on.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::cluster::coordinator::{Machine, Member};
use crate::cluster::division::{Division, Keeper};
use crate::cluster::events::{Action, Change, Happening, StepRecord};
use crate::cluster::links::Line;
use crate::cluster::messages::{Holding, LoadState, StateSource, ToWorker};
use crate::cluster::run::{Active, Joiner, Phase, Recovery, StepInFlight};
use crate::cluster::sharing::{Introduced, Ownership};
use crate::ids::{RunId, SessionId, Step};
use crate::ledger::{Chain, Entry};

/// Steps between two attempts to get a state for joiners, after one failed.
const RETRY: Step = 50;

impl Machine {
    /// A new member, while a run is under way: it starts to catch up.
    pub(super) fn enlist(&mut self, session: SessionId, out: &mut Vec<Action>) {
        let member = &self.members[&session];
        let Some(active) = self.active.as_mut() else {
            return;
        };
        if matches!(active.phase, Phase::Gathering) {
            return;
        }
        let held = member.holding.as_ref();
        let held = held.and_then(|h| active.proven(h)).map(|e| e.step);
        // Where moments are divided, everybody loads the same state at the next boundary.
        let divides = self.limits.divides || active.division.is_some();
        match held.filter(|&from| !divides && active.can_replay(from)) {
            Some(from) => {
                active.replay(session, StateSource::Held(from), out);
                // From now on it changes.
                self.members.get_mut(&session).expect("it joined").holding = None;
            }
            None => {
                active.joiners.insert(session, Joiner::Waiting);
            }
        }
    }

    /// Gets states to members that wait for one. Only `between` two steps can a new one be asked for.
    pub(super) fn serve_joiners(&mut self, between: bool, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is active");
        if self.limits.divides || active.division.is_some() {
            return;
        }
        let waits = |(s, j): (&SessionId, &Joiner)| (*j == Joiner::Waiting).then_some(*s);
        let waiting: Vec<SessionId> = active.joiners.iter().filter_map(waits).collect();
        if waiting.is_empty() {
            return;
        }
        if active.can_replay(active.durable.source.step()) {
            for session in waiting {
                active.replay(session, active.durable.source, out);
                self.members.get_mut(&session).expect("it waits").holding = None;
            }
            return;
        }
        // A snapshot is taken where the workers' hashes can vouch for it.
        let hashed = active.hashed.contains(&active.step);
        let soon_again = active
            .snapshot_failed
            .is_some_and(|at| active.step < at + RETRY);
        if between && active.writing.is_none() && hashed && !soon_again {
            self.request_snapshot(out);
        }
    }

    /// Members whose state is proven equal take part from now on.
    pub(super) fn admit(&mut self, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        let step = active.step;
        let arrived: Vec<(SessionId, Step)> = active
            .joiners
            .iter()
            .filter_map(|(&session, joiner)| match *joiner {
                Joiner::Replaying {
                    from,
                    verified: true,
                } => {
                    let applied = self.members[&session].applied?;
                    (applied + 1 >= step).then_some((session, from))
                }
                _ => None,
            })
            .collect();
        for (session, from) in arrived {
            active.joiners.remove(&session);
            active.ready.insert(session);
            for votes in active.votes.values_mut() {
                votes.admit(session);
            }
            let run = active.plan.run.clone();
            let what = Happening::Joined {
                session,
                step,
                replayed: step - from,
            };
            out.push(Action::Happened { run, what });
        }
    }

    /// Lets the owner forget the roots that nobody needs any more. Says whether there were some.
    pub(super) fn release(&mut self, out: &mut Vec<Action>) -> bool {
        let Some(active) = self.active.as_mut() else {
            return false;
        };
        if active.slowest.is_some() {
            return false;
        }
        let applied = |s: &SessionId| self.members[s].applied;
        let ready = active.ready.iter().map(|s| applied(s).unwrap_or(0));
        let joiners = active.joiners.keys();
        let joiners = joiners.filter_map(|s| active.needs(*s, applied(s)));
        let (mut needed, mut count) = (Step::MAX, 0);
        for step in ready.chain(joiners) {
            match step.cmp(&needed) {
                Ordering::Less => (needed, count) = (step, 1),
                Ordering::Equal => count += 1,
                Ordering::Greater => {}
            }
        }
        if count == 0 {
            needed = active.step;
        }
        active.slowest = Some((needed, count));
        let through = needed.min(active.step);
        // What was summed here before the workers summed themselves may still be held.
        let held = active.opened.take_if(|opened| *opened <= through);
        let newly = through > active.released || held.is_some();
        if newly {
            active.released = active.released.max(through);
            let run = active.plan.run.clone();
            out.push(Action::ReleaseRoots { run, through });
        }
        newly
    }

    pub(super) fn gather(&mut self, now: u64, out: &mut Vec<Action>) {
        if !self.recovered(now, out) {
            return;
        }
        let active = self.active.as_mut().expect("a run is gathering");
        let need = active.plan.spec.train.min_workers.max(1);
        let stays = |m: &&Member| !m.leaving;
        let have = self.members.values().filter(stays).count();
        let run = active.plan.run.clone();
        if have < need as usize {
            if active.waiting_said.replace(have) != Some(have) {
                let change = Change::Waiting { have, need };
                out.push(Action::Changed { run, change });
            }
            return;
        }
        active.waiting_said = None;
        active.recovery = None;
        let all: BTreeSet<SessionId> = self.members.keys().copied().collect();
        let source = active.durable.source;
        let division = self.divide(&all, out);
        self.load(all, source, division, out);
    }

    /// Looks for workers that have come back with a state younger than that on disk, and carries the run on with them.
    /// Says whether there is nobody to wait for, so that the state on disk has to do.
    fn recovered(&mut self, now: u64, out: &mut Vec<Action>) -> bool {
        let active = self.active.as_mut().expect("a run is gathering");
        let waits = |r: &Recovery| now < r.until_ms && self.members.len() < r.expected + r.here;
        if active.recovery.as_ref().is_some_and(waits) {
            return false;
        }
        let on_disk = active.durable.source.step();
        let members = &self.members;
        let mut held: Vec<(Arc<Entry>, SessionId)> = members
            .iter()
            .filter_map(|(s, m)| Some((active.proven(m.holding.as_ref()?)?, *s)))
            .filter(|(entry, _)| entry.step >= on_disk && !active.lacks_validation(entry.step))
            .collect();
        let youngest = held.iter().map(|(entry, _)| entry.step).max();
        if let Some(recovery) = active.recovery {
            let back = match youngest {
                Some(_) => held.len(),
                None => members.len().saturating_sub(recovery.here),
            };
            if now < recovery.until_ms && back < recovery.expected {
                return false;
            }
        }
        let Some(step) = youngest else {
            return true;
        };
        held.retain(|(entry, _)| entry.step == step);
        let Some(division) = self.divided_still(&mut held) else {
            // Nobody has all of it: the state on disk has to do.
            return true;
        };
        let active = self.active.as_mut().expect("a run is gathering");
        let entry = held[0].0.clone();
        let holding = members[&held[0].1].holding.as_ref();
        active.recovery = None;
        active.waiting_said = None;
        // Their commits were given out, but their entries did not outlive the coordinator: the workers bring them back.
        for missing in active.missing(holding.expect("it was found by it")) {
            out.push(Action::Committed(StepRecord {
                run: active.plan.run.clone(),
                entry: missing.clone(),
                millis: None,
                workers: held.len(),
            }));
            active.ledger = Chain::after(&missing);
            active.know(&missing);
            active.remember(&missing);
        }
        active.chain = Chain::after(&entry);
        active.step = step;
        active.released = step;
        active.last_loss = entry.loss();
        active.enter_boundary();
        let sessions: BTreeSet<SessionId> = held.into_iter().map(|(_, s)| s).collect();
        for session in &sessions {
            let holding = self.members[session].holding.as_ref();
            let lanes = holding.expect("it was found by it").lanes.iter().copied();
            active.kept.insert(*session, lanes.collect());
        }
        let text = format!(
            "{} workers came back with the state of step {step}; the run goes on from there",
            sessions.len()
        );
        let run = Some(active.plan.run.clone());
        out.push(Action::Note { run, text });
        self.load(sessions, StateSource::Held(step), division, out);
        false
    }

    /// Gives these members a state; the others get one beside them.
    pub(super) fn load(
        &mut self,
        sessions: BTreeSet<SessionId>,
        source: StateSource,
        division: Option<Division>,
        out: &mut Vec<Action>,
    ) {
        let active = self.active.as_mut().expect("a run is active");
        let lost = |d: &Division| !self.limits.divides || !d.is_whole_in(&sessions);
        active.broken = division.as_ref().is_some_and(lost);
        active.division = division;
        active.digested.clear();
        active.introduced = Introduced::default();
        active.sites = None;
        let run = active.plan.run.clone();
        let change = Change::Loading {
            workers: sessions.len(),
            step: active.step,
        };
        out.push(Action::Changed { run, change });
        for (session, member) in &mut self.members {
            member.applied = None;
            member.reaches.clear();
            member.line = Line::default();
            member.ways.clear();
            if sessions.contains(session) {
                member.holding = None;
                out.push(active.load_message(*session, source));
            } else if !member.leaving {
                active.joiners.insert(*session, Joiner::Waiting);
            }
        }
        // Whoever loads a state hashes it.
        active.hashed.insert(active.step);
        active.phase = Phase::Loading(sessions);
    }

    pub(super) fn loaded(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        state_hash: Option<[u8; 32]>,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active_as(run) else {
            return;
        };
        if let Some(Joiner::Replaying { from, .. }) = active.joiners.get(&session) {
            if *from == step {
                self.members.get_mut(&session).expect("it spoke").applied = Some(step);
            }
            return;
        }
        let at = active.step;
        let Phase::Loading(waiting) = &mut active.phase else {
            return;
        };
        if step != at || !waiting.remove(&session) {
            return;
        }
        let last = waiting.is_empty();
        active.ready.insert(session);
        let member = self.members.get_mut(&session).expect("it spoke");
        member.applied = Some(step);
        // Links of before are gone, whatever was said of them since.
        member.reaches.clear();
        self.vote(session, step, state_hash);
        self.tally(step);
        if last {
            self.start_training(now, out);
        }
    }

    pub(super) fn start_training(&mut self, now: u64, out: &mut Vec<Action>) {
        let active = self.active.as_ref().expect("a run is loading");
        if active.ready.is_empty() {
            return self.fall_back(now, out);
        }
        if !active.is_sound() {
            return self.fall_back(now, out);
        }
        let workers = active.ready.len();
        let run = active.plan.run.clone();
        let change = Change::Training { workers };
        out.push(Action::Changed { run, change });
        let step = active.step;
        if self.judge(now, step, out) {
            self.at_boundary(now, out);
        }
    }
}

impl Active {
    /// The entry of the state that a worker holds, if it can be shown to be of this run.
    pub(super) fn proven(&self, holding: &Holding) -> Option<Arc<Entry>> {
        let proof = &holding.proof;
        if holding.run != self.plan.run {
            return None;
        }
        if let Some((entry, known)) = self.recent.get(&proof.step) {
            return (known.hash == proof.hash).then(|| entry.clone());
        }
        let last = self.missing(holding).pop()?;
        (last.hash() == proof.hash).then_some(last)
    }

    /// The newest step whose root a member that is not ready, or is, needs no more; `None` if it needs none that is held.
    pub(super) fn needs(&self, session: SessionId, applied: Option<Step>) -> Option<Step> {
        match self.joiners.get(&session) {
            Some(Joiner::Replaying { from, .. }) => Some(applied.unwrap_or(*from).max(*from)),
            Some(Joiner::Waiting) => {
                let useful = self.writing.as_ref().map(|w| w.step);
                useful.filter(|step| *step >= self.released)
            }
            None => self.ready.contains(&session).then(|| applied.unwrap_or(0)),
        }
    }

    /// What somebody needs has changed. Whoever was not among the slowest is of no concern.
    pub(super) fn advanced(&mut self, before: Option<Step>, after: Option<Step>) {
        if before == after {
            return;
        }
        self.slowest = match self.slowest {
            Some((step, count)) if Some(step) == before && count > 1 => Some((step, count - 1)),
            Some((step, _)) if Some(step) == before => None,
            other => other,
        };
    }

    /// The entries up to that of a holding's state that follow the ledger's end in an unbroken chain; none if they do not, or
    /// if the ledger has them.
    fn missing(&self, holding: &Holding) -> Vec<Arc<Entry>> {
        let mut chain = self.ledger.clone();
        let entries = holding.earlier.iter().chain(&holding.proof.entry);
        let beyond = entries.filter(|entry| entry.step >= self.ledger.next_step());
        let beyond: Vec<Arc<Entry>> = beyond.cloned().collect();
        match beyond.iter().all(|entry| chain.push(entry).is_ok()) {
            true => beyond,
            false => Vec::new(),
        }
    }

    /// Whether the owner holds the roots, and this machine the entries, of all steps after this one.
    pub(super) fn can_replay(&self, from: Step) -> bool {
        let entries = || (from + 1..=self.step).all(|s| self.recent.contains_key(&s));
        // The root of a step that workers own does not reach the coordinator.
        let here = |f: &StepInFlight| matches!(f.owners, Ownership::Star);
        let elsewhere = matches!(&self.phase, Phase::Stepping(f) if !here(f));
        from >= self.released && from <= self.step && !elsewhere && entries()
    }

    /// Gives a member a state and all commits since.
    fn replay(&mut self, session: SessionId, source: StateSource, out: &mut Vec<Action>) {
        let from = source.step();
        out.push(self.load_message(session, source));
        // Entries of steps that are to be made again may lie beyond.
        for (_, (entry, proof)) in self.recent.range(from + 1..) {
            if entry.step > self.step {
                break;
            }
            let message = ToWorker::Commit {
                run: self.plan.run.clone(),
                commit: self.commit_of(entry, proof, true),
            };
            out.push(Action::Send { session, message });
        }
        let verified = false;
        self.joiners
            .insert(session, Joiner::Replaying { from, verified });
    }

    fn load_message(&self, session: SessionId, source: StateSource) -> Action {
        let load = LoadState {
            run: self.plan.run.clone(),
            spec: self.plan.spec.clone(),
            source,
            splits: self.plan.splits.clone(),
            keeper: self
                .division
                .clone()
                .map(|division| Keeper { division, session }),
            lanes_stay: self.kept.contains_key(&session),
        };
        let message = ToWorker::Load(load);
        Action::Send { session, message }
    }
}
