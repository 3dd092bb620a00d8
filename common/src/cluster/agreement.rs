//! Hashes of the state are compared: between workers, with what is on disk, and with those of whoever joins. A mismatch
//! is never averaged over. The deviating worker is named and taken out; what may have been made from its gradients since
//! the newest checkpoint that all agreed on is withdrawn and made again.

use std::collections::{BTreeMap, BTreeSet};

use crate::cluster::coordinator::Machine;
use crate::cluster::events::{Action, Change, LeftReason};
use crate::cluster::run::{Active, Joiner, Phase};
use crate::ids::{RunId, SessionId, Step};

/// Disputes without a majority that a run survives.
const STALEMATES: u32 = 3;

impl Machine {
    /// A worker has applied a commit.
    pub(super) fn applied(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        state_hash: Option<[u8; 32]>,
        out: &mut Vec<Action>,
    ) {
        let Some(active) = self.active.as_mut().filter(|a| a.plan.run == *run) else {
            return;
        };
        let joins = active.joiners.contains_key(&session);
        if !joins && !active.ready.contains(&session) {
            return;
        }
        // Of a state that was left for an older one; nothing else has steps that are not committed.
        if step > active.step {
            return;
        }
        let member = self.members.get_mut(&session).expect("it spoke");
        let before = member.applied.replace(step);
        let before = active.needs(session, before);
        active.advanced(before, active.needs(session, Some(step)));
        self.vote(session, step, state_hash);
        if state_hash.is_some() && !self.judge(now, step, out) {
            return;
        }
        let released = self.release(out);
        self.settle(now, out);
        let yielding = |a: &Active| matches!(a.phase, Phase::Yielding);
        let divided = |a: &Active| a.division.is_some();
        if released && self.active.as_ref().is_some_and(yielding) {
            self.at_boundary(now, out);
        } else if self.active.as_ref().is_some_and(divided) {
            // The next commit may have waited for it.
            self.try_commit(now, out);
        }
    }

    pub(super) fn vote(&mut self, session: SessionId, step: Step, hash: Option<[u8; 32]>) {
        let active = self.active.as_mut().expect("a run is active");
        if let Some(hash) = hash {
            let joins = active.joiners.contains_key(&session);
            active
                .votes
                .entry(step)
                .or_default()
                .add(session, hash, joins);
        }
    }

    /// Compares the hashes of a step. Says whether the run can go on; if not, what follows is under way.
    pub(super) fn judge(&mut self, now: u64, step: Step, out: &mut Vec<Action>) -> bool {
        let active = self.active.as_mut().expect("a run is active");
        let Some(votes) = active.votes.get_mut(&step) else {
            return true;
        };
        if votes.differ {
            let joins = |s: &SessionId| active.joiners.contains_key(s);
            let all = votes.by.iter().map(|(s, h)| (*s, *h));
            let voted: BTreeMap<SessionId, [u8; 32]> = all.filter(|(s, _)| !joins(s)).collect();
            let all = active.ready.iter().all(|s| voted.contains_key(s));
            active.disputed = Some(step);
            if all {
                self.resolve(now, step, voted, out);
            }
            return false;
        }
        for (session, agrees) in votes.compare() {
            let active = self.active.as_mut().expect("a run is active");
            if agrees {
                if let Some(Joiner::Replaying { verified, .. }) = active.joiners.get_mut(&session) {
                    *verified = true;
                }
                continue;
            }
            let reason = LeftReason::Deviated { step };
            self.expel(now, session, reason, out);
        }
        true
    }

    /// All have said what they have, and it is not the same.
    fn resolve(
        &mut self,
        now: u64,
        step: Step,
        votes: BTreeMap<SessionId, [u8; 32]>,
        out: &mut Vec<Action>,
    ) {
        let active = self.active.as_mut().expect("a run is active");
        let run = active.plan.run.clone();
        let mut camps: BTreeMap<[u8; 32], Vec<SessionId>> = BTreeMap::new();
        for (session, hash) in votes.iter().filter(|(s, _)| active.ready.contains(s)) {
            camps.entry(*hash).or_default().push(*session);
        }
        let voters = camps.values().map(Vec::len).sum::<usize>();
        let majority = camps.iter().find(|(_, camp)| 2 * camp.len() > voters);
        let deviating: Vec<SessionId> = match majority {
            Some((hash, _)) => {
                let others = camps.iter().filter(|(h, _)| *h != hash);
                others.flat_map(|(_, camp)| camp.clone()).collect()
            }
            None => camps.values().flatten().copied().collect(),
        };
        let names: Vec<String> = deviating.iter().map(ToString::to_string).collect();
        let names = match names.is_empty() {
            true => "a worker that is gone".into(),
            false => names.join(", "),
        };
        let back = active.durable.source.step();
        let verdict = match majority {
            Some(_) => format!("{names} deviates from the others and is taken out"),
            None => format!("{names} disagree, and no majority tells who is right"),
        };
        if majority.is_none() {
            active.stalemates += 1;
        }
        if active.stalemates >= STALEMATES {
            let error = format!(
                "step {step}: {verdict}, again; one of these machines computes or remembers wrongly: take the one away that you trust less, then `cohort resume {run}`"
            );
            return self.end_run(now, &run, Change::Failed { error }, out);
        }
        let text = format!(
            "the states after step {step} are not the same: {verdict}; steps {} to {step} may be made from wrong gradients and are made again from the state of step {back}",
            back + 1
        );
        let through = active.now_at();
        if let Some(writing) = &active.writing {
            // Whatever it holds, nobody vouches for it.
            let step = writing.step;
            let run = run.clone();
            out.push(Action::DropCheckpoint { run, step });
        }
        active.last_workers -= deviating.len().min(active.last_workers);
        active.return_to_durable();
        active.recovery = None;
        active.recent.retain(|s, _| *s <= back);
        active.history.withdraw(back);
        active.ledger = active.chain.clone();
        active.shipped = active.shipped.map(|step| step.min(back));
        out.push(Action::Note {
            run: Some(run.clone()),
            text,
        });
        out.push(Action::ReleaseRoots {
            run: run.clone(),
            through,
        });
        out.push(Action::Withdraw { run, after: back });
        for member in self.members.values_mut() {
            member.holding = None;
        }
        if deviating.len() < voters {
            for session in deviating {
                let reason = LeftReason::Deviated { step };
                self.expel(now, session, reason, out);
            }
        }
        self.poke(now, out);
    }

    /// Takes a checkpoint for good once every worker that could vouch for it has, and none contradicts.
    pub(super) fn settle(&mut self, now: u64, out: &mut Vec<Action>) {
        let Some(active) = self.active.as_mut() else {
            return;
        };
        let Some(writing) = &active.writing else {
            return;
        };
        let (step, Some(written)) = (writing.step, writing.written) else {
            return;
        };
        if active.disputed.is_some() {
            return;
        }
        let votes = active.votes.get(&step);
        let voted = |s: &SessionId| votes.is_some_and(|v| v.by.contains_key(s));
        let applied = |s: &SessionId| self.members[s].applied.is_some_and(|a| a >= step);
        // Where moments are divided, they are asked for their votes with the snapshot.
        let divided = active.division.is_some();
        let open = |s: &SessionId| !voted(s) && (divided || !applied(s));
        if active.hashed.contains(&step) && active.ready.iter().any(open) {
            return;
        }
        match active.agreed(step) {
            Some(agreed) if agreed == written => self.checkpoint_good(now, out),
            _ => {
                let run = active.plan.run.clone();
                let donors = writing.donors.clone();
                active.writing = None;
                active.boundary.checkpoint = true;
                let text = format!(
                    "the checkpoint of step {step} is not what the workers hold, or nobody is left to vouch for it; another is written"
                );
                out.push(Action::DropCheckpoint {
                    run: run.clone(),
                    step,
                });
                let run = Some(run);
                out.push(Action::Note { run, text });
                self.dismiss_donors(now, &donors, out);
                self.go_on_waiting(now, out);
            }
        }
    }
}

impl Active {
    /// The hash of a step's state, if a worker with lanes has said it.
    pub(super) fn agreed(&self, step: Step) -> Option<[u8; 32]> {
        self.votes.get(&step)?.agreed
    }
}

/// What is said of one step's state. Each vote is compared once, when it comes.
#[derive(Debug, Default)]
pub(super) struct Votes {
    by: BTreeMap<SessionId, [u8; 32]>,
    /// What the first worker with lanes has said.
    agreed: Option<[u8; 32]>,
    /// Another one has said something else.
    differ: bool,
    /// Joiners that are not compared yet.
    joining: BTreeSet<SessionId>,
}

impl Votes {
    fn add(&mut self, session: SessionId, hash: [u8; 32], joins: bool) {
        self.by.insert(session, hash);
        match joins {
            true => drop(self.joining.insert(session)),
            false => self.count(hash),
        }
    }

    /// What all workers with lanes have said, where it is made anew of what they have found.
    pub fn replace(&mut self, votes: BTreeMap<SessionId, [u8; 32]>) {
        *self = Self::default();
        for (session, hash) in votes {
            self.add(session, hash, false);
        }
    }

    fn count(&mut self, hash: [u8; 32]) {
        self.differ |= *self.agreed.get_or_insert(hash) != hash;
    }

    /// A joiner has lanes from now on.
    pub fn admit(&mut self, session: SessionId) {
        if self.joining.remove(&session) {
            self.count(self.by[&session]);
        }
    }

    /// A joiner is gone.
    pub fn forget(&mut self, session: SessionId) {
        self.by.remove(&session);
        self.joining.remove(&session);
    }

    /// The joiners that can be compared now, and whether they agree.
    fn compare(&mut self) -> Vec<(SessionId, bool)> {
        let Some(agreed) = self.agreed else {
            return Vec::new();
        };
        let joining = std::mem::take(&mut self.joining);
        let agrees = |session: SessionId| (session, self.by[&session] == agreed);
        joining.into_iter().map(agrees).collect()
    }
}
