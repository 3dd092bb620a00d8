//! Gradients that simulated workers sum themselves: links from each worker to each owner, slices, and roots. A chunk is an
//! element here.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::RUN;
use super::trainer::{Effect, LEN};
use super::world::{Direction, Next, Up, World};
use crate::aggregate::{Aggregator, ChunkDigest, Data, Duty, Passed as Gathered, Shape, encode};
use crate::cluster::events::Event;
use crate::cluster::links::Link as Speed;
use crate::cluster::messages::{Owners, Peer, Shares};
use crate::cluster::worker::Report;
use crate::floats::floats_of;
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::segment::Segment;
use crate::spec::Payload;
use crate::tree::{Node, Tree};

/// What a worker has of steps that workers sum.
#[derive(Default)]
pub(super) struct Sharing {
    /// Whom it may push to.
    peers: Vec<Peer>,
    /// The links to them, by session.
    links: BTreeMap<SessionId, u64>,
    /// Who owns what, by step.
    shares: BTreeMap<Step, Shares>,
    /// What it has pushed and not applied.
    pushed: Vec<(Step, Node, Vec<f32>)>,
    /// Its own slices.
    slices: BTreeMap<Step, Slice>,
    /// Pushes for slices that it does not know of yet.
    early: Vec<(SessionId, Step, Part)>,
    /// Roots of steps of which it does not know yet whether it hands them on.
    unasked: Vec<(Step, usize, Vec<f32>)>,
    /// The newest parameters that it has published.
    published: Vec<Published>,
    /// Roots that are on their way.
    roots: BTreeMap<Step, Vec<Option<f32>>>,
}

/// Parameters of a slice, and who needs them not.
#[derive(Clone)]
struct Published {
    step: Step,
    first: u32,
    params: Vec<f32>,
    not_to: Option<SessionId>,
}

/// Elements of a node, from the first on.
#[derive(Clone)]
pub(super) struct Part {
    node: Node,
    first: usize,
    values: Vec<f32>,
}

/// A slice that a worker owns, and what it gathers.
struct Slice {
    duty: Duty,
    far: BTreeMap<SessionId, Range<usize>>,
    /// Of the elements of the duty.
    sums: Vec<Aggregator>,
    /// For how many elements each lane is held.
    held: BTreeMap<Lane, usize>,
    complete: BTreeSet<usize>,
}

/// One direction to push, the other for roots.
pub(super) struct Link {
    from: usize,
    to: usize,
    sessions: (SessionId, SessionId),
    pushes: Direction,
    roots: Direction,
    /// Both ends know of it.
    open: bool,
}

/// What goes over a link.
#[derive(Clone)]
pub(super) enum Passed {
    /// What the owner sums, or who gathers it.
    Push(Step, Part),
    /// Elements of the root, from the first on.
    Root(Step, usize, Vec<f32>),
    /// New parameters, from the first on.
    Params(Step, u32, Vec<f32>),
}

impl World {
    /// Whether a link's end is held up, and until when.
    pub(super) fn link_blocked(&self, link: u64, next: &Next) -> u64 {
        let Some(link) = self.links.get(&link) else {
            return 0;
        };
        let cut = self.workers[link.from]
            .cut_until
            .max(self.workers[link.to].cut_until);
        let end = match next {
            Next::Dialled(_) | Next::Passed(_, _, Passed::Push(..)) => link.to,
            _ => link.from,
        };
        cut.max(self.workers[end].frozen_until)
    }

    /// A worker is told what is new of those whom it may push to.
    pub(super) fn introduced(&mut self, w: usize, gone: &[SessionId], peers: Vec<Peer>) {
        let sharing = &mut self.workers[w].sharing;
        let named = |session| peers.iter().any(|peer| peer.session == session);
        sharing
            .peers
            .retain(|p| !gone.contains(&p.session) && !named(p.session));
        sharing.peers.extend(peers.iter().cloned());
        let links = gone.iter().filter_map(|session| sharing.links.get(session));
        let links: Vec<u64> = links.copied().collect();
        links.into_iter().for_each(|link| self.close_link(link));
        for peer in peers {
            let linked = self.workers[w].sharing.links.contains_key(&peer.session);
            if peer.address.is_some() && !linked {
                self.dial(w, peer.session);
            }
        }
        self.tell_reach(w);
    }

    /// Tries to reach a peer.
    pub(super) fn dial(&mut self, w: usize, peer: SessionId) {
        let worker = &mut self.workers[w];
        let Some(session) = worker.session.filter(|_| worker.alive) else {
            return;
        };
        let sharing = &mut worker.sharing;
        let Some(known) = sharing.peers.iter().find(|p| p.session == peer) else {
            return;
        };
        if sharing.links.contains_key(&peer) {
            return;
        }
        let Some(address) = &known.address else {
            return;
        };
        let to = address.parse().expect("a worker's number");
        self.next_link += 1;
        let link = self.next_link;
        sharing.links.insert(peer, link);
        self.links.insert(
            link,
            Link {
                from: w,
                to,
                sessions: (session, peer),
                pushes: Direction::default(),
                roots: Direction::default(),
                open: false,
            },
        );
        let delay = self.latency();
        self.after(delay, Next::Dialled(link));
    }

    /// The peer answers, or does not.
    pub(super) fn dialled(&mut self, link: u64) {
        let Some(found) = self.links.get(&link) else {
            return;
        };
        let there = &self.workers[found.to];
        match there.alive && there.session == Some(found.sessions.1) {
            true => {
                let delay = self.latency();
                self.after(delay, Next::Linked(link));
            }
            false => self.close_link(link),
        }
    }

    pub(super) fn linked(&mut self, link: u64) {
        let Some(found) = self.links.get_mut(&link) else {
            return;
        };
        found.open = true;
        let (from, to, peer) = (found.from, found.to, found.sessions.1);
        for published in self.workers[to].sharing.published.clone() {
            self.send_params(link, &published);
        }
        let speed = Speed {
            rtt_micros: 1 + self.draw(100),
            bytes_per_second: 1 + self.draw(1_000),
        };
        let load = self.workers[from].load;
        self.report(from, load, Report::Link { peer, link: speed });
        self.tell_reach(from);
    }

    /// Sends new parameters to whoever needs them.
    pub(super) fn publish(&mut self, w: usize, effects: Vec<Effect>) {
        for effect in effects {
            let Effect::Publish(step, slice, params, not_to) = effect else {
                unreachable!("only these are published");
            };
            let worker = &mut self.workers[w];
            let own = worker.trainer.keeper.as_ref().map(|keeper| keeper.session);
            let published = Published {
                step,
                first: slice.start,
                params,
                not_to,
            };
            let newest = &mut worker.sharing.published;
            newest.retain(|other| other.step == step);
            newest.push(published.clone());
            let ours = |l: &Link| l.to == w && Some(l.sessions.1) == own;
            let links = self.links.iter().filter(|(_, l)| ours(l));
            for link in links.map(|(n, _)| *n).collect::<Vec<_>>() {
                self.send_params(link, &published);
            }
        }
    }

    fn send_params(&mut self, link: u64, published: &Published) {
        let to = self.links.get(&link).map(|l| l.sessions.0);
        if to.is_some() && to != published.not_to {
            let (step, first) = (published.step, published.first);
            self.pass(link, Passed::Params(step, first, published.params.clone()));
        }
    }

    fn close_link(&mut self, link: u64) {
        let Some(gone) = self.links.remove(&link) else {
            return;
        };
        self.after(
            1,
            Next::Unlinked(gone.from, gone.sessions.0, gone.sessions.1, link),
        );
    }

    /// A worker finds a link broken.
    pub(super) fn unlinked(&mut self, w: usize, own: SessionId, peer: SessionId, link: u64) {
        let worker = &mut self.workers[w];
        if !worker.alive || worker.session != Some(own) {
            return;
        }
        if worker.sharing.links.get(&peer) == Some(&link) {
            worker.sharing.links.remove(&peer);
            self.tell_reach(w);
            let pause = 100 + self.draw(200);
            self.after(pause, Next::Redial(w, peer));
        }
    }

    fn tell_reach(&mut self, w: usize) {
        let open = |link: &u64| self.links.get(link).is_some_and(|link| link.open);
        let worker = &self.workers[w];
        let links = worker.sharing.links.iter();
        let peers = links
            .filter(|(_, link)| open(link))
            .map(|(s, _)| *s)
            .collect();
        let load = worker.load;
        self.report(w, load, Report::Reaches { peers });
    }

    /// What belongs to an earlier state or session is gone, at both ends.
    pub(super) fn leave_exchange(&mut self, w: usize) {
        let ends = |link: &Link| link.from == w || link.to == w;
        let links: Vec<u64> = self
            .links
            .iter()
            .filter(|(_, l)| ends(l))
            .map(|(n, _)| *n)
            .collect();
        links.into_iter().for_each(|link| self.close_link(link));
        self.workers[w].sharing = Sharing::default();
    }

    /// A worker hears who owns a step.
    pub(super) fn owned(&mut self, w: usize, step: Step, owners: &Owners) {
        let Owners::Shares(shares) = owners else {
            return;
        };
        let tree = Tree::new(self.lanes);
        let worker = &mut self.workers[w];
        if worker.sharing.shares.insert(step, shares.clone()).is_some() {
            return;
        }
        let own = worker.session.expect("it has heard something");
        let Some(duty) = shares.duty(own, tree) else {
            if worker.trainer.keeper.is_some() {
                // It keeps nothing, so it has all that it needs.
                self.take_root(w, step, 0, &[]);
            }
            return;
        };
        let slice = Slice {
            far: shares.far(own),
            sums: duty.chunks.clone().map(|i| sums(tree, &duty, i)).collect(),
            duty,
            held: BTreeMap::new(),
            complete: BTreeSet::new(),
        };
        worker.sharing.slices.insert(step, slice);
        let unasked = std::mem::take(&mut worker.sharing.unasked);
        for (from, step, part) in std::mem::take(&mut worker.sharing.early) {
            self.take_part(w, from, step, part);
        }
        for (step, first, part) in unasked {
            self.relay(w, step, first, &part);
        }
    }

    /// A worker pushes a node to whoever owns its step.
    pub(super) fn push(&mut self, w: usize, step: Step, node: Node, sum: Vec<f32>) {
        let sharing = &mut self.workers[w].sharing;
        sharing.pushed.push((step, node, sum.clone()));
        let Some(shares) = sharing.shares.get(&step).cloned() else {
            return self.send_up(w, Up::Push(step, node, sum));
        };
        for share in shares.takers(node) {
            let part = Part {
                node,
                first: share.range().start,
                values: sum[share.range()].to_vec(),
            };
            self.push_part(w, share.session, step, part);
        }
    }

    fn push_part(&mut self, w: usize, to: SessionId, step: Step, part: Part) {
        if Some(to) == self.workers[w].session {
            self.take_part(w, to, step, part);
        } else if let Some(&link) = self.workers[w].sharing.links.get(&to) {
            self.pass(link, Passed::Push(step, part));
        }
    }

    /// The coordinator owns a step from now on.
    pub(super) fn collected(&mut self, w: usize, step: Step) {
        let sharing = &mut self.workers[w].sharing;
        sharing.shares.remove(&step);
        let again: Vec<_> = sharing
            .pushed
            .iter()
            .filter(|(s, ..)| *s == step)
            .cloned()
            .collect();
        for (step, node, sum) in again {
            self.send_up(w, Up::Push(step, node, sum));
        }
    }

    pub(super) fn forget_shared(&mut self, w: usize, through: Step) {
        let sharing = &mut self.workers[w].sharing;
        sharing.shares.retain(|step, _| *step > through);
        sharing.slices.retain(|step, _| *step > through);
        sharing.roots.retain(|step, _| *step > through);
        sharing.pushed.retain(|(step, ..)| *step > through);
        sharing.early.retain(|(_, step, ..)| *step > through);
        sharing.unasked.retain(|(step, ..)| *step > through);
    }

    fn pass(&mut self, number: u64, passed: Passed) {
        let arrival = self.now + self.latency();
        let Some(link) = self.links.get_mut(&number) else {
            return;
        };
        let direction = match passed {
            Passed::Push(..) => &mut link.pushes,
            Passed::Root(..) | Passed::Params(..) => &mut link.roots,
        };
        let place = direction.out.number();
        direction.last = direction.last.max(arrival);
        let arrival = direction.last;
        self.deliver(arrival, Next::Passed(number, place, passed));
    }

    /// Something arrives over a link.
    pub(super) fn passed(&mut self, number: u64, place: u64, passed: Passed) {
        let Some(link) = self.links.get_mut(&number) else {
            return;
        };
        let direction = match passed {
            Passed::Push(..) => &mut link.pushes,
            Passed::Root(..) | Passed::Params(..) => &mut link.roots,
        };
        match direction.incoming.accept(place) {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => return self.close_link(number),
        }
        let (from, to, (sender, _)) = (link.from, link.to, link.sessions);
        match passed {
            Passed::Push(step, part) => self.take_part(to, sender, step, part),
            Passed::Root(step, first, part) => {
                self.relay(from, step, first, &part);
                self.take_root(from, step, first, &part);
            }
            Passed::Params(step, first, part) => {
                let worker = &mut self.workers[from];
                let state = worker.trainer.state.as_ref();
                if worker.alive && state.is_some_and(|state| state.step < step) {
                    worker.trainer.take_params(step, first, &part);
                    self.wake(from);
                }
            }
        }
    }

    /// An owner, or who gathers, takes in a part of a node.
    fn take_part(&mut self, w: usize, from: SessionId, step: Step, part: Part) {
        let run = RunId::new(RUN);
        let worker = &mut self.workers[w];
        let load = worker.load;
        let applied = worker.trainer.state.as_ref().map_or(0, |s| s.step);
        let Some(slice) = worker.sharing.slices.get_mut(&step) else {
            if step > applied {
                worker.sharing.early.push((from, step, part));
            }
            return;
        };
        let mut lanes = Vec::new();
        let mut new = false;
        let mut gathered: Vec<(usize, Gathered)> = Vec::new();
        for (i, value) in (part.first..).zip(part.values) {
            let data = encode(&[value]);
            let check = crc32fast::hash(&data);
            let sums = &slice.sums[i - slice.duty.chunks.start];
            let offered = match sums.offer(part.node, 0, Data::Wire { data, check }, from) {
                Ok(offered) => offered,
                Err(error) => {
                    let error = error.to_string();
                    return self.event(Event::RunBroken { run, error });
                }
            };
            for lane in offered.delivered {
                let held = slice.held.entry(lane).or_default();
                *held += 1;
                lanes.extend((*held == slice.duty.chunks_of(lane)).then_some(lane));
            }
            if offered.all_complete {
                slice.complete.insert(i);
                new = slice.complete.len() == slice.duty.owned.len();
            }
            if let Some(passed) = offered.passed {
                sums.passed_on(0);
                gathered.push((i, passed));
            }
        }
        let (first, far) = (slice.duty.owned.start, slice.far.clone());
        let root = new.then(|| slice.root());
        let shares = worker.sharing.shares.get(&step).cloned();
        for (index, gathered) in gathered {
            // The coordinator may have collected the step meanwhile.
            let Some(owner) = shares.as_ref().and_then(|shares| shares.owner(index)) else {
                continue;
            };
            let part = Part {
                node: gathered.node,
                first: index,
                values: floats_of(&gathered.sum),
            };
            self.push_part(w, owner, step, part);
        }
        if !lanes.is_empty() {
            self.report(w, load, Report::Held { step, lanes });
        }
        let Some(root) = root else { return };
        let digests = root.iter().map(|x| ChunkDigest::of(&[*x])).collect();
        self.report(w, load, Report::SliceReady { step, digests });
        let own = self.workers[w].session;
        let keeper = self.workers[w].trainer.keeper.clone();
        let second = keeper
            .as_ref()
            .and_then(|k| k.division.second_of(k.session));
        let wants = |l: &Link| keeper.is_none() || Some(l.sessions.0) == second;
        let ours = |l: &Link| l.to == w && Some(l.sessions.1) == own && wants(l);
        let all = first..first + root.len();
        let part = |l: &Link| far.get(&l.sessions.0).unwrap_or(&all).clone();
        let links: Vec<(u64, Range<usize>)> = self
            .links
            .iter()
            .filter(|(_, l)| ours(l))
            .map(|(n, l)| (*n, part(l)))
            .collect();
        for (link, part) in links.into_iter().filter(|(_, part)| !part.is_empty()) {
            let values = root[part.start - first..part.end - first].to_vec();
            self.pass(link, Passed::Root(step, part.start, values));
        }
        self.take_root(w, step, first, &root);
    }

    /// Hands on what another owner has sent of a root, if that is gathered here.
    fn relay(&mut self, w: usize, step: Step, first: usize, part: &[f32]) {
        let sharing = &mut self.workers[w].sharing;
        let Some(slice) = sharing.slices.get(&step) else {
            if !sharing.shares.contains_key(&step) {
                sharing.unasked.push((step, first, part.to_vec()));
            }
            return;
        };
        let (duty, far) = (slice.duty.clone(), slice.far.clone());
        let own = self.workers[w].session;
        let near =
            |l: &Link| l.to == w && Some(l.sessions.1) == own && !far.contains_key(&l.sessions.0);
        let links = self.links.iter().filter(|(_, l)| near(l));
        let links: Vec<u64> = links.map(|(n, _)| *n).collect();
        for (index, value) in (first..).zip(part) {
            if !duty.chunks.contains(&index) || duty.owned.contains(&index) {
                continue;
            }
            for link in &links {
                self.pass(*link, Passed::Root(step, index, vec![*value]));
            }
        }
    }

    /// A worker takes in a slice's root.
    fn take_root(&mut self, w: usize, step: Step, first: usize, part: &[f32]) {
        let worker = &mut self.workers[w];
        let (alive, load) = (worker.alive, worker.load);
        if !alive || worker.trainer.roots.contains_key(&step) {
            return;
        }
        let root = worker
            .sharing
            .roots
            .entry(step)
            .or_insert_with(|| vec![None; LEN]);
        for (known, value) in root[first..].iter_mut().zip(part) {
            *known = Some(*value);
        }
        let keeper = worker.trainer.keeper.as_ref();
        let due = |i: u32| keeper.is_none_or(|keeper| keeper.keeps(i));
        let of = |(i, part): (u32, &Option<f32>)| part.or((!due(i)).then_some(f32::NAN));
        if let Some(root) = (0..).zip(root.iter()).map(of).collect() {
            worker.trainer.roots.insert(step, root);
            self.report(w, load, Report::RootHeld { step });
            self.wake(w);
        }
    }
}

impl Slice {
    fn root(&self) -> Vec<f32> {
        let first = self.duty.chunks.start;
        let of = |i: usize| self.sums[i - first].root(0).expect("complete");
        let roots = self.duty.owned.clone().map(of);
        roots.map(|root| floats_of(&root.data)[0]).collect()
    }
}

/// Of one element of a worker's duty.
fn sums(tree: Tree, duty: &Duty, index: usize) -> Aggregator {
    let shape = Shape {
        lanes: tree.root().size,
        len: 1,
        payload: Payload::F32,
        seed: 0,
    };
    let owned = usize::from(duty.owned.contains(&index));
    let duty = Duty {
        chunks: 0..1,
        owned: 0..owned,
        passes: duty.passes.clone(),
    };
    let private = |bytes| Arc::new(Segment::private(bytes));
    Aggregator::with_root(shape, 0, duty, Box::new(private))
}
