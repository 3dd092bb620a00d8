//! Steps whose gradient the workers sum themselves, a slice each: who owns what, what they have said, and when that is
//! given up.
//!
//! Slices are only a faster way through a step. They are used where every worker can push to every owner, nobody joins
//! and nobody is late; and such a step is committed only when every worker has the whole root, so that nobody needs
//! anything of it afterwards. If an owner is lost, or cut off from another worker, or takes too long, the coordinator
//! **collects** the step: everybody pushes what it has computed to the coordinator, which sums it as in any other step.
//! The sums are the same. Where moments are divided among the workers (`dividing.rs`), the coordinator cannot do that: then
//! the step is given up, and begins again when they are divided anew.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::aggregate::{ChunkDigest, RootTotals};
use crate::cluster::coordinator::Machine;
use crate::cluster::events::{Action, LeftReason};
use crate::cluster::hands::Hands;
use crate::cluster::links::{self, Whole};
use crate::cluster::messages::{Owners, Peer, Share, Shares, ToWorker};
use crate::cluster::run::Phase;
use crate::ids::{Lane, RunId, SessionId, Step};

/// Steps that the coordinator sums after one that the workers could not.
const PAUSE: Step = 16;

/// Chunks of a slice, at most: their digests come in one message.
pub(super) const MOST_CHUNKS: usize = 65_536;

/// Workers that own a slice, at most. Each has a link from every other one.
pub(super) const MOST_OWNERS: usize = 64;

/// Workers of a run whose gradient workers sum, at most. Each owner tells the coordinator of each one's lanes; beyond this
/// that is more than the coordinator would have to do itself for a gradient.
pub(super) const MOST_SHARERS: usize = 256;

/// How long owners may take for their first slices.
const FIRST_MS: u64 = 10_000;

/// What is added to twice the usual time.
const GRACE_MS: u64 = 500;

/// Who sums the gradient of a step in flight.
#[derive(Debug)]
pub(super) enum Ownership {
    /// The coordinator.
    Star,
    /// This worker, which is alone.
    Alone(SessionId),
    /// These workers, a slice each.
    Shares(Box<Slices>),
}

/// The slices of a step, and what is known of them.
#[derive(Debug)]
pub(super) struct Slices {
    shares: Shares,
    /// Lanes that each owner holds.
    held: BTreeMap<SessionId, BTreeSet<Lane>>,
    /// Of the roots.
    digests: BTreeMap<SessionId, Vec<ChunkDigest>>,
    /// Workers that have the whole root.
    rooted: BTreeSet<SessionId>,
    /// When something was last heard of it.
    heard_ms: u64,
}

impl Slices {
    fn new(shares: Shares, now: u64) -> Self {
        Self {
            held: shares
                .slices
                .iter()
                .map(|s| (s.session, BTreeSet::new()))
                .collect(),
            shares,
            digests: BTreeMap::new(),
            rooted: BTreeSet::new(),
            heard_ms: now,
        }
    }

    fn chunks(&self, owner: SessionId) -> Option<&Range<u32>> {
        let mut slices = self.shares.slices.iter();
        let share = slices.find(|share| share.session == owner)?;
        Some(&share.chunks)
    }

    /// The whole root's, once everybody has it.
    fn totals(&self, ready: &BTreeSet<SessionId>) -> Option<RootTotals> {
        let of = |share: &Share| self.digests.get(&share.session);
        let digests: Option<Vec<_>> = self.shares.slices.iter().map(of).collect();
        let digests = digests.filter(|_| ready.is_subset(&self.rooted))?;
        Some(RootTotals::of(
            &digests.into_iter().flatten().copied().collect::<Vec<_>>(),
        ))
    }
}

impl Ownership {
    /// As a worker is told.
    pub fn told(&self) -> Owners {
        match self {
            Self::Star => Owners::Coordinator,
            Self::Alone(_) => Owners::Alone,
            Self::Shares(slices) => Owners::Shares(slices.shares.clone()),
        }
    }
}

/// How long owners may take from when all lanes are computed, or from when they were last heard of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    ms: u64,
    /// Until this step is done, the coordinator sums.
    star_until: Step,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            ms: FIRST_MS,
            star_until: 0,
        }
    }
}

impl Patience {
    /// A step went well, and took so long from its last lane to its commit.
    fn learn(&mut self, took_ms: u64) {
        // The longest lately.
        self.ms = (2 * took_ms + GRACE_MS).max(self.ms / 2);
    }

    /// It was too short, as it seems.
    fn exhausted(&mut self) {
        self.ms = self.ms.saturating_mul(2);
    }
}

/// Who was told of whom, so that they can push to each other: everybody of the owners, and the owners of everybody.
#[derive(Debug, Default)]
pub(super) struct Introduced {
    all: BTreeSet<SessionId>,
    /// Those that may own a slice.
    owners: BTreeSet<SessionId>,
}

impl Introduced {
    /// Whether nobody was told of anybody.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Who is to be told of whom now. Whoever was an owner stays one.
    fn next(&self, ready: &BTreeSet<SessionId>, listens: impl Fn(&SessionId) -> bool) -> Self {
        if ready.len() > MOST_SHARERS {
            return Self::default();
        }
        let mut owners: BTreeSet<SessionId> = self.owners.intersection(ready).copied().collect();
        let more = ready
            .iter()
            .filter(|s| !self.owners.contains(s) && listens(s));
        let room = MOST_OWNERS - owners.len();
        owners.extend(more.take(room).copied());
        match owners.len() {
            0 | 1 => Self::default(),
            _ => Self {
                all: ready.clone(),
                owners,
            },
        }
    }

    /// Of whom a worker has been told.
    fn known_to(&self, session: SessionId) -> impl Iterator<Item = SessionId> {
        let all = self.owners.contains(&session).then_some(&self.all);
        let owners = self.all.contains(&session).then_some(&self.owners);
        let known = all.or(owners).into_iter().flatten().copied();
        known.filter(move |other| *other != session)
    }
}

impl Machine {
    /// Tells workers what is new of each other, if the ready ones are others than before.
    pub(super) fn introduce(&mut self, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        if !self.limits.shares || active.introduced.all == active.ready {
            return;
        }
        let members = &self.members;
        let address = |session: &SessionId| members[session].info.listens.clone();
        let listens = |session: &SessionId| members[session].info.listens.is_some();
        let next = active.introduced.next(&active.ready, listens);
        let before = std::mem::replace(&mut active.introduced, next);
        active.sites = None;
        let next = &active.introduced;
        if before.is_empty() && next.is_empty() {
            return;
        }
        for &session in &active.ready {
            let knew: BTreeSet<SessionId> = before.known_to(session).collect();
            let knows: BTreeSet<SessionId> = next.known_to(session).collect();
            let new = |s: &&SessionId| {
                let promoted = next.owners.contains(s) && !before.owners.contains(s);
                promoted || !knew.contains(s)
            };
            let peer = |session: &SessionId| Peer {
                session: *session,
                address: address(session).filter(|_| next.owners.contains(session)),
            };
            let peers: Vec<Peer> = knows.iter().filter(new).map(peer).collect();
            let gone: Vec<SessionId> = knew.difference(&knows).copied().collect();
            if peers.is_empty() && gone.is_empty() {
                continue;
            }
            let run = active.plan.run.clone();
            let message = ToWorker::Peers { run, gone, peers };
            out.push(Action::Send { session, message });
        }
    }

    /// Who owns the gradient in the next step, whose lanes are in these hands.
    pub(super) fn choose_owners(&self, now: u64, hands: &Hands) -> Ownership {
        let active = self.active.as_ref().expect("a run is at a boundary");
        if let Some(division) = &active.division {
            let shares = division.shares().clone();
            return Ownership::Shares(Box::new(Slices::new(shares.into(), now)));
        }
        if !active.joiners.is_empty() {
            return Ownership::Star;
        }
        if active.ready.len() == 1 {
            return Ownership::Alone(*active.ready.first().expect("one is there"));
        }
        let in_time = |s: &SessionId| {
            self.members[s]
                .applied
                .is_some_and(|a| a + 1 >= active.step)
        };
        let candidates = &active.introduced.owners;
        let waits = active.step < active.patience.star_until;
        if candidates.is_empty() || waits || !active.ready.iter().all(in_time) {
            return Ownership::Star;
        }
        let mut reached: BTreeMap<SessionId, usize> = candidates.iter().map(|s| (*s, 0)).collect();
        for from in &active.ready {
            for to in self.members[from].reaches.iter().filter(|to| *to != from) {
                reached.entry(*to).and_modify(|count| *count += 1);
            }
        }
        let others = active.ready.len() - 1;
        let by_all = |(session, count): (SessionId, usize)| (count == others).then_some(session);
        let chunks = active.plan.chunks as usize;
        let owners = reached.into_iter().filter_map(by_all);
        // A small model has no slice for everybody.
        let owners: Vec<SessionId> = owners.take(chunks).collect();
        if owners.len() < 2 {
            return Ownership::Star;
        }
        let shares = self.two_levels(&owners, hands);
        let shares = shares.unwrap_or_else(|| self.one_level(owners));
        let too_long = |share: &Share| share.chunks.len() > MOST_CHUNKS;
        match shares.slices.iter().any(too_long) {
            true => Ownership::Star,
            false => Ownership::Shares(Box::new(Slices::new(shares, now))),
        }
    }

    /// Everybody pushes to these owners.
    fn one_level(&self, owners: Vec<SessionId>) -> Shares {
        let plan = &self.active.as_ref().expect("a run is at a boundary").plan;
        let whole = Whole {
            workers: self.active.as_ref().expect("as before").ready.len(),
            chunks: plan.chunks,
            bytes: plan.gradient_bytes(),
        };
        let slices = links::slices(&self.speeds(&owners), whole);
        let share = |(session, chunks)| Share { session, chunks };
        let owned = owners.into_iter().zip(slices);
        let owned = owned.filter(|(_, slice)| !slice.is_empty());
        let slices: Arc<[Share]> = owned.map(share).collect();
        slices.into()
    }

    /// Tells people when others sum the gradient than before.
    pub(super) fn note_owners(&mut self, owners: &Ownership, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a run is at a boundary");
        let shares = match owners {
            Ownership::Shares(slices) => Some(&slices.shares),
            Ownership::Star | Ownership::Alone(_) => None,
        };
        let said = shares.map_or((0, 0), |s| (s.slices.len(), s.sites.len()));
        if said == std::mem::replace(&mut active.sharers_said, said) {
            return;
        }
        let text = match shares {
            None => "the coordinator sums the gradients again".into(),
            Some(shares) => format!(
                "the workers reach each other: {} of them sum a slice of the gradient each{}",
                shares.slices.len(),
                shares.how_cut(active.plan.chunks)
            ),
        };
        let run = Some(active.plan.run.clone());
        out.push(Action::Note { run, text });
    }

    /// The slices of the step in flight, if it is this one and has some.
    fn slices(&mut self, run: &RunId, step: Step) -> Option<&mut Slices> {
        match &mut self.flight(run, step)?.owners {
            Ownership::Shares(slices) => Some(slices),
            Ownership::Star | Ownership::Alone(_) => None,
        }
    }

    /// An owner holds lanes.
    pub(super) fn slice_held(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        lanes: &[Lane],
        out: &mut Vec<Action>,
    ) {
        let Some(flight) = self.flight(run, step) else {
            return;
        };
        let known = 0..flight.sums.len() as u32;
        let Some(slices) = self.slices(run, step) else {
            return;
        };
        let Some(held) = slices.held.get_mut(&session) else {
            return;
        };
        held.extend(lanes.iter().filter(|lane| known.contains(lane)));
        slices.heard_ms = now;
        let everywhere = |lane: &&Lane| slices.held.values().all(|held| held.contains(lane));
        let lanes: Vec<Lane> = lanes.iter().filter(everywhere).copied().collect();
        self.lanes_delivered(now, run, step, &lanes, out);
    }

    /// An owner has its root.
    pub(super) fn slice_ready(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        digests: Vec<ChunkDigest>,
        out: &mut Vec<Action>,
    ) {
        let Some(slices) = self.slices(run, step) else {
            return;
        };
        let Some(chunks) = slices.chunks(session) else {
            return;
        };
        if chunks.len() != digests.len() {
            let found = digests.len();
            let what = format!("it told {found} digests of the chunks {chunks:?}");
            return self.expel(now, session, LeftReason::Protocol(what), out);
        }
        slices.heard_ms = now;
        slices.digests.insert(session, digests);
        self.complete_slices(now, run, step, out);
    }

    /// A worker has every slice's root.
    pub(super) fn root_held(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        step: Step,
        out: &mut Vec<Action>,
    ) {
        if let Some(slices) = self.slices(run, step) {
            slices.heard_ms = now;
            slices.rooted.insert(session);
            self.complete_slices(now, run, step, out);
        }
    }

    fn complete_slices(&mut self, now: u64, run: &RunId, step: Step, out: &mut Vec<Action>) {
        let ready = self.active_as(run).map_or(0, |active| active.ready.len());
        // Before that somebody has not got it all.
        let all =
            |s: &&mut Slices| s.digests.len() == s.shares.slices.len() && s.rooted.len() >= ready;
        if self.slices(run, step).filter(all).is_none() {
            return;
        }
        let ready = self.active_as(run).map(|active| active.ready.clone());
        let slices = self.slices(run, step);
        let totals = slices.zip(ready).and_then(|(s, ready)| s.totals(&ready));
        let Some(flight) = self.flight(run, step).filter(|_| totals.is_some()) else {
            return;
        };
        flight.root = totals;
        let took = now.saturating_sub(flight.computed_ms);
        let active = self.active.as_mut().expect("a step is in flight");
        active.patience.learn(took);
        self.try_commit(now, out);
    }

    /// What a worker reaches has changed.
    pub(super) fn reaches(
        &mut self,
        now: u64,
        session: SessionId,
        run: &RunId,
        peers: Vec<SessionId>,
        out: &mut Vec<Action>,
    ) {
        if self.active_as(run).is_none() {
            return;
        }
        let member = self.members.get_mut(&session).expect("it spoke");
        member.reaches = peers.into_iter().collect();
        let reaches = &member.reaches;
        let active = self.active.as_ref().expect("checked");
        if matches!(active.phase, Phase::Linking { .. }) {
            return self.go_on_waiting(now, out);
        }
        let Phase::Stepping(flight) = &active.phase else {
            return;
        };
        let Ownership::Shares(slices) = &flight.owners else {
            return;
        };
        let cut_off = |share: &Share| share.session != session && !reaches.contains(&share.session);
        if active.ready.contains(&session) && slices.shares.slices.iter().any(cut_off) {
            match active.division {
                Some(_) => self.break_up(now, None, out),
                None => self.collect(out),
            }
        }
    }

    /// Owners that take too long are not waited for.
    pub(super) fn hurry(&mut self, now: u64, out: &mut Vec<Action>) {
        let Some(active) = self.active.as_mut() else {
            return;
        };
        let Phase::Stepping(flight) = &active.phase else {
            return;
        };
        let Ownership::Shares(slices) = &flight.owners else {
            return;
        };
        let computed = flight.unknown == 0;
        // A root that everybody has waits for something else.
        let waits = computed && flight.root.is_none();
        let since = flight.computed_ms.max(slices.heard_ms);
        if waits && now.saturating_sub(since) > active.patience.ms {
            if active.division.is_some() {
                active.patience.exhausted();
                return self.give_up_dividing(now, out);
            }
            let step = flight.step;
            let text = format!(
                "step {step}: after {} ms not every worker had every slice; the coordinator sums the gradients, up to step {}",
                active.patience.ms,
                step + PAUSE
            );
            active.patience.exhausted();
            active.patience.star_until = step + PAUSE;
            active.sharers_said = (0, 0);
            let run = Some(active.plan.run.clone());
            out.push(Action::Note { run, text });
            self.collect(out);
        }
    }

    /// Makes the coordinator the owner of the step in flight, if workers are.
    pub(super) fn collect(&mut self, out: &mut Vec<Action>) {
        let active = self.active.as_mut().expect("a step is in flight");
        let Phase::Stepping(flight) = &mut active.phase else {
            return;
        };
        if !matches!(flight.owners, Ownership::Shares(_)) {
            return;
        }
        flight.owners = Ownership::Star;
        flight.delivered.fill(false);
        flight.hands.reopen();
        flight.root = None;
        let (run, step) = (active.plan.run.clone(), flight.step);
        active.opened = Some(step);
        out.push(Action::OpenStep {
            run: run.clone(),
            step,
        });
        out.push(Action::SendAll {
            sessions: active.ready.iter().copied().collect(),
            message: ToWorker::Collect { run, step },
        });
    }
}
