//! The worker's side of the gradient exchange: pushes the tree nodes it holds, chunk by chunk and under credits, and
//! collects the root. The nodes stay here until the commit, so that they can be pushed again.
//!
//! The owner is the coordinator, or in some steps each worker of a slice (`owner.rs`, and `peers.rs` for the links
//! between them; `params.rs` for parameters that come in the place of roots; `gathering.rs` where workers that are near each
//! other add up first what goes to others). With a coordinator on the same host the nodes are computed in memory that both see, or copied there,
//! and the root is read where the owner has it (`memory.rs`). `outgoing.rs` has what waits to be sent, `stream.rs` is the
//! traffic.

mod gathering;
mod measure;
mod memory;
mod outgoing;
mod owner;
mod params;
mod peers;
mod stream;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use cohort_common::aggregate::{RootChunk, Shape};
use cohort_common::cluster::worker::Report;
use cohort_common::cluster::{Keeper, Owners, Peer, Shares};
use cohort_common::exchange::push_pull;
use cohort_common::floats::bytes_of;
use cohort_common::ids::{RunId, SessionId, Step};
use cohort_common::layout::{CHUNK_LEN, chunk_count};
use cohort_common::net::Credentials;
use cohort_common::seal::Sealer;
use cohort_common::spec::Payload;
use cohort_common::tree::{Node, Tree};
use cohort_common::wire;
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use tokio::runtime::Handle as Runtime;
use tokio::sync::{Notify, mpsc};
use tonic::transport::Channel;
use tracing::debug;

use crate::engine::Gradient;
pub use crate::observe::Observer;
use crate::trace::Open;
pub use memory::Root;
use memory::{Arriving, NodeMemory};
use outgoing::{Content, EARLY, Early, Outlet};
use owner::Owner;
pub use owner::{Entrance, Note};
pub use params::Arrived;
use params::Params;
use peers::Known;

/// Chunks on their way out that may wait for the connection.
const OUTBOX: usize = 4;

/// Buffers for roots that wait to be used again, at most.
const SPARE: usize = 2;

/// Whether this process offers to share memory. Clones share it: once it has failed, nobody tries again.
#[derive(Clone, Debug)]
pub struct Sharing(Arc<AtomicBool>);

impl Sharing {
    /// As the user wants it.
    pub fn new(wanted: bool) -> Self {
        Self(Arc::new(AtomicBool::new(wanted)))
    }

    fn offered(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn give_up(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// The exchange of one run. Clones share it; it ends with the last.
#[derive(Clone)]
pub struct ExchangeClient(Arc<Handle>);

/// What the tasks of the stream do not have: a stream that nobody uses must not speak, as a newer one has its place.
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct Shared {
    root: Node,
    shape: Shape,
    chunks: usize,
    sharing: Sharing,
    observer: Observer,
    credentials: Credentials,
    /// What this worker owns.
    owner: Arc<Owner>,
    /// Whose roots it needs, where moments are divided; else all.
    keeper: Option<Keeper>,
    runtime: Runtime,
    /// Held while a way to a peer is measured.
    measuring: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    /// A root is complete, or none will be.
    received: Condvar,
    /// Nobody wants what comes any more.
    closing: Notify,
}

#[derive(Default)]
struct State {
    /// The ways out that are open: to the coordinator, and to peers.
    outlets: BTreeMap<Option<SessionId>, Outlet>,
    /// What was pushed in steps that are not applied.
    nodes: Vec<(Step, Node, Arc<Gradient>)>,
    /// What was handed out of a node before it was whole.
    early: Option<Early>,
    /// Who owns the steps that the coordinator does not.
    shares: BTreeMap<Step, Shares>,
    /// Roots that came from peers before it was said who owns their step.
    unasked: Vec<(Step, usize, RootChunk)>,
    /// The other workers of the run.
    known: BTreeMap<SessionId, Known>,
    /// Each with the span that ends when it is whole.
    roots: BTreeMap<Step, (Arriving, Option<Open>)>,
    /// Buffers for roots that are sent.
    spare: Vec<Vec<f32>>,
    /// Where moments are divided.
    params: Params,
    /// Where nodes lie that the owner reads; offered until it says that it shares.
    memory: Option<NodeMemory>,
    lends: bool,
    /// Steps up to here are applied.
    applied: Step,
    /// The owner should know that.
    done: bool,
    closed: bool,
}

/// What an exchange is opened with.
pub struct Setup {
    /// To the coordinator.
    pub channel: Channel,
    /// Of a session and a run.
    pub credentials: Credentials,
    /// What is summed.
    pub shape: Shape,
    /// Roots of the steps after this one are wanted.
    pub after: Step,
    /// Whether memory is offered to a coordinator on this host.
    pub sharing: Sharing,
    /// Who sees what is done.
    pub observer: Observer,
    /// Where the stream says why it ended, unless it was closed here.
    pub broken: mpsc::Sender<String>,
    /// Where peers push to this process, if they can.
    pub entrance: Option<Entrance>,
    /// What is told of slices.
    pub notes: mpsc::Sender<Note>,
    /// Which moments this worker keeps, if not all.
    pub keeper: Option<Keeper>,
}

impl ExchangeClient {
    /// Opens the stream of a run.
    ///
    /// # Errors
    /// Why the coordinator does not take it, for people.
    pub async fn open(setup: Setup) -> Result<Self, String> {
        let Setup {
            channel,
            credentials,
            shape,
            after,
            sharing,
            observer,
            broken,
            entrance,
            notes,
            keeper,
        } = setup;
        let run = RunId::new(credentials.run.as_deref().unwrap_or_default());
        let session = SessionId(credentials.session.unwrap_or_default());
        let owner = Arc::new(Owner::new(run, session, keeper.as_ref(), notes));
        if let Some(entrance) = &entrance {
            entrance.lead_to(owner.clone());
        }
        let (out, outgoing) = mpsc::channel(OUTBOX);
        let mut sealer = Sealer::default();
        // Whoever divides moments sums by itself.
        let lends = sharing.offered() && keeper.is_none();
        let memory = lends.then(|| NodeMemory::new(shape)).flatten();
        let segment = memory.as_ref().and_then(NodeMemory::address);
        let segment = segment.map(wire::segment_to);
        let open = sealer.chunk(Kind::Open(v1::Open { after, segment }));
        out.send(open).await.expect("the receiver is right here");
        let incoming = push_pull(channel, &credentials, outgoing).await;
        let incoming = incoming.map_err(|s| s.message().to_owned())?;
        let shared = Arc::new(Shared {
            root: Tree::new(shape.lanes).root(),
            shape,
            chunks: chunk_count(shape.len),
            sharing,
            observer,
            credentials,
            owner,
            keeper,
            runtime: Runtime::current(),
            measuring: tokio::sync::Mutex::default(),
            state: Mutex::new(State {
                outlets: BTreeMap::from([(None, Outlet::default())]),
                applied: after,
                memory,
                ..State::default()
            }),
            received: Condvar::new(),
            closing: Notify::new(),
        });
        // The exchange is a part of this.
        let own = Arc::downgrade(&shared);
        let keep = move |step, index, root: &[f32]| {
            if let Some(shared) = own.upgrade() {
                shared.keep(step, index, Payload::F32, bytes_of(root));
            }
        };
        shared.owner.exchange.give_roots_to(keep);
        tokio::spawn(stream::send(shared.clone(), None, sealer, out));
        tokio::spawn(stream::receive(shared.clone(), incoming, broken));
        Ok(Self(Arc::new(Handle(shared))))
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// Who sees what is done.
    pub fn observer(&self) -> &Observer {
        &self.shared().observer
    }

    /// Memory for a gradient that the owner will read where it is computed, if it shares this host's memory.
    pub fn buffer(&self) -> Option<Gradient> {
        let state = self.shared().lock();
        let memory = state.memory.as_ref().filter(|_| state.lends);
        memory?.buffer()
    }

    /// Whether memory for a gradient is such as [`Self::buffer`] would give now.
    pub fn suits(&self, gradient: &Gradient) -> bool {
        let state = self.shared().lock();
        match state.memory.as_ref().filter(|_| state.lends) {
            Some(memory) => memory.has(gradient),
            None => gradient.slot().is_none(),
        }
    }

    /// These other workers train the run, too, or are found elsewhere than before; and those that are gone do not any more.
    pub fn introduce(&self, gone: &[SessionId], peers: Vec<Peer>) {
        self.shared().introduce(gone, peers);
    }

    /// Says who owns a step; one that nobody speaks of is the coordinator's. This worker's own slice is summed from here on.
    pub fn own(&self, step: Step, owners: &Owners) {
        let Owners::Shares(shares) = owners else {
            return;
        };
        let shared = self.shared();
        let mut state = shared.lock();
        if step <= state.applied || state.closed || state.shares.contains_key(&step) {
            return;
        }
        state.shares.insert(step, shares.clone());
        let owner = &shared.owner;
        let duty = shares.duty(owner.session, Tree::new(shared.shape.lanes));
        if let Some(duty) = duty.filter(|duty| duty.chunks.end <= shared.chunks) {
            match shares.sites.is_empty() {
                true => {
                    let exchange = &owner.exchange;
                    exchange.open(&owner.run, step, shared.shape, duty.owned);
                }
                false => shared.gather(step, duty, shares.far(owner.session)),
            }
        } else if shared.keeper.is_some() {
            // It keeps nothing, so it has every root that it needs.
            let root = shared.arriving_root(None);
            state.roots.insert(step, (root, None));
            owner.note(Report::RootHeld { step });
            shared.received.notify_all();
        }
        let whole = |(root, _): &(Arriving, _)| root.is_whole();
        if shared.keeper.is_none() && state.roots.get(&step).is_some_and(whole) {
            owner.note(Report::RootHeld { step });
        }
        shared.relay_unasked(&mut state, step);
    }

    /// Makes the coordinator the owner of a step: what was pushed elsewhere goes there as well.
    pub fn collect(&self, step: Step) {
        let shared = self.shared();
        let mut state = shared.lock();
        if state.shares.remove(&step).is_none() {
            return;
        }
        let peers = state.outlets.iter_mut().filter(|(to, _)| to.is_some());
        peers.for_each(|(_, outlet)| outlet.pending.retain(|p| p.step != step));
        let again: Vec<_> = state
            .nodes
            .iter()
            .filter(|n| n.0 == step)
            .cloned()
            .collect();
        for (step, node, data) in again {
            let data = Content::Whole(data);
            shared.hand_out(&mut state, None, (step, node, data), 0..shared.chunks);
        }
        // What was handed out of a node that is not whole went elsewhere, too.
        state.early = None;
    }

    /// Pushes what is complete of a node while the rest is computed: so many elements, from the first on.
    pub fn push_early(&self, step: Step, node: Node, gradient: &Gradient, complete: usize) {
        let shared = self.shared();
        let Some((from, place)) = shared.early(step, node, gradient) else {
            return;
        };
        let chunks = from..complete / CHUNK_LEN;
        if chunks.len() < EARLY {
            return;
        }
        let data = match place {
            Some(_) => Content::Lent,
            None => Content::Part(shared.copy((step, node), gradient, chunks.clone())),
        };
        let mut state = shared.lock();
        // The coordinator may have collected the step meanwhile: then all of it begins again.
        if state.closed || state.early_chunks(step, node) != from {
            return;
        }
        state.early = Some(Early {
            step,
            node,
            chunks: chunks.end,
        });
        shared.hand_round(&mut state, (step, node, data), chunks, place);
    }

    /// Pushes a node to whoever owns the step, as soon as credits allow.
    pub fn push(&self, step: Step, node: Node, data: Arc<Gradient>) {
        let shared = self.shared();
        let mut state = shared.lock();
        if state.closed {
            return;
        }
        state.nodes.push((step, node, data.clone()));
        let chunks = state.early_chunks(step, node)..shared.chunks;
        state.early = None;
        shared.hand_round(&mut state, (step, node, Content::Whole(data)), chunks, None);
    }

    /// Waits for the root of a step; blocks the thread. `None` if the exchange ended.
    pub fn root(&self, step: Step) -> Option<Root> {
        let mut state = self.shared().lock();
        loop {
            let whole = state.roots.get(&step).is_some_and(|(r, _)| r.is_whole());
            if whole {
                return state.roots.remove(&step)?.0.root(self.shared().shape);
            }
            if state.closed {
                return None;
            }
            state = self.shared().received.wait(state).expect(POISON);
        }
    }

    /// Forgets a step that is applied. Its root must not be read any more.
    pub fn applied(&self, step: Step) {
        let mut state = self.shared().lock();
        state.applied = step;
        for outlet in state.outlets.values_mut() {
            outlet.pending.retain(|p| p.step > step);
            outlet.credits.retain(|s, _| *s > step);
        }
        state.nodes.retain(|(s, ..)| *s > step);
        state.shares.retain(|s, _| *s > step);
        state.roots.retain(|s, _| *s > step);
        state.unasked.retain(|(s, ..)| *s > step);
        state.params.applied(step);
        self.shared().observe_roots(&state);
        if let Some(memory) = &state.memory {
            memory.free(step);
        }
        state.done = state.lends;
        wake(&state, None);
        drop(state);
        let owner = &self.shared().owner;
        owner.exchange.release(&owner.run, step);
    }

    /// Takes a root back that is not needed any more, to use its buffer again.
    pub fn reuse(&self, root: Root) {
        if let Root::Sent(buffer) = root {
            let mut state = self.shared().lock();
            state.spare.push(buffer);
            state.spare.truncate(SPARE);
        }
    }

    /// Ends the exchange; whoever waits for a root is told.
    pub fn close(&self) {
        self.shared().close();
    }
}

const POISON: &str = "no thread panics while it holds this lock";

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(POISON)
    }

    fn close(&self) {
        self.owner.close();
        let mut state = self.lock();
        state.closed = true;
        state.known.clear();
        state.outlets.keys().for_each(|to| wake(&state, *to));
        state.nodes.clear();
        drop(state);
        self.observer.meter.sending(false);
        self.observer.meter.receiving(false);
        self.received.notify_all();
        self.closing.notify_one();
    }

    /// A root, of which nothing has come yet.
    fn arriving_root(&self, spare: Option<Vec<f32>>) -> Arriving {
        let keeper = self.keeper.as_ref();
        Arriving::sent(spare, self.shape, |index| {
            keeper.is_none_or(|keeper| keeper.keeps(index as u32))
        })
    }

    /// Notes whether a root is on its way.
    fn observe_roots(&self, state: &State) {
        let arriving = state.roots.values().any(|(root, _)| !root.is_whole());
        self.observer.meter.receiving(arriving);
    }

    /// The coordinator has said whether it shares memory.
    fn settle_sharing(self: &Arc<Self>) {
        let mut state = self.lock();
        if !state.lends && state.memory.take().is_some() {
            debug!("the coordinator shares no memory: gradients are sent");
            self.dial(&mut state);
        }
    }
}

/// Something can be sent on a way out.
fn wake(state: &State, to: Option<SessionId>) {
    if let Some(outlet) = state.outlets.get(&to) {
        outlet.sendable.notify_one();
    }
}
