//! The worker's side of the gradient exchange: pushes the tree nodes it holds, chunk by chunk and under credits, and
//! collects the root. The nodes stay here until the commit, so that they can be pushed again.
//!
//! With an owner on the same host the nodes are computed in memory that both see, or copied there, and the root is read
//! where the owner has it (`memory.rs`). `stream.rs` is the traffic.

mod memory;
mod stream;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use cohort_common::aggregate::Shape;
use cohort_common::ids::Step;
use cohort_common::layout::chunk_count;
use cohort_common::net::Credentials;
use cohort_common::seal::Sealer;
use cohort_common::tree::{Node, Tree};
use cohort_common::wire::{self, MAX_MESSAGE};
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use cohort_proto::v1::exchange_client::ExchangeClient as GrpcClient;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tracing::debug;

use crate::engine::Gradient;
pub use crate::observe::Observer;
use crate::trace::Open;
pub use memory::Root;
use memory::{Arriving, NodeMemory, Place};

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
    state: Mutex<State>,
    /// Something can be sent.
    sendable: Notify,
    /// A root is complete, or none will be.
    received: Condvar,
    /// Nobody wants what comes any more.
    closing: Notify,
}

#[derive(Default)]
struct State {
    /// Nodes that are not yet pushed whole.
    pending: Vec<Pending>,
    /// Chunks below this index may be pushed, by step.
    credits: BTreeMap<Step, usize>,
    /// Each with the span that ends when it is whole.
    roots: BTreeMap<Step, (Arriving, Option<Open>)>,
    /// Buffers for roots that are sent.
    spare: Vec<Vec<f32>>,
    /// Where nodes lie that the owner reads; offered until it says that it shares.
    memory: Option<NodeMemory>,
    shares: bool,
    /// Steps up to here are applied.
    applied: Step,
    /// The owner should know that.
    done: bool,
    closed: bool,
}

struct Pending {
    step: Step,
    node: Node,
    data: Arc<Gradient>,
    next: usize,
    /// The span from here until it is sent.
    span: Option<Open>,
    /// Where the owner reads it, if it does.
    place: Option<Place>,
}

impl ExchangeClient {
    /// Opens the stream of a run; it gets the roots of the steps after `after`. Says on `broken` why it ended, unless it
    /// was closed here.
    pub async fn open(
        channel: Channel,
        credentials: Credentials,
        shape: Shape,
        after: Step,
        sharing: Sharing,
        observer: Observer,
        broken: mpsc::Sender<String>,
    ) -> Result<Self, String> {
        let (out, outgoing) = mpsc::channel(OUTBOX);
        let mut sealer = Sealer::default();
        let memory = sharing.offered().then(|| NodeMemory::new(shape)).flatten();
        let segment = memory.as_ref().and_then(NodeMemory::address);
        let segment = segment.map(wire::segment_to);
        let open = sealer.chunk(Kind::Open(v1::Open { after, segment }));
        out.send(open).await.expect("the receiver is right here");
        let mut client = GrpcClient::with_interceptor(channel, credentials)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let response = client.push_pull(ReceiverStream::new(outgoing)).await;
        let incoming = response.map_err(|s| s.message().to_owned())?.into_inner();
        let shared = Arc::new(Shared {
            root: Tree::new(shape.lanes).root(),
            shape,
            chunks: chunk_count(shape.len),
            sharing,
            observer,
            state: Mutex::new(State {
                applied: after,
                memory,
                ..State::default()
            }),
            sendable: Notify::new(),
            received: Condvar::new(),
            closing: Notify::new(),
        });
        tokio::spawn(stream::send(shared.clone(), sealer, out));
        tokio::spawn(stream::receive(shared.clone(), incoming, broken));
        Ok(Self(Arc::new(Handle(shared))))
    }

    fn shared(&self) -> &Shared {
        &self.0.0
    }

    /// Who sees what is done.
    pub fn observer(&self) -> &Observer {
        &self.shared().observer
    }

    /// Memory for a gradient that the owner will read where it is computed, if it shares this host's memory.
    pub fn buffer(&self) -> Option<Gradient> {
        let state = self.shared().lock();
        let memory = state.memory.as_ref().filter(|_| state.shares);
        memory?.buffer()
    }

    /// Whether memory for a gradient is such as [`Self::buffer`] would give now.
    pub fn suits(&self, gradient: &Gradient) -> bool {
        let state = self.shared().lock();
        match state.memory.as_ref().filter(|_| state.shares) {
            Some(memory) => memory.has(gradient),
            None => gradient.slot().is_none(),
        }
    }

    /// Pushes a node as soon as credits allow.
    pub fn push(&self, step: Step, node: Node, data: Arc<Gradient>) {
        let pending = Pending {
            step,
            node,
            data,
            next: 0,
            span: self.observer().spans.begin(step),
            place: None,
        };
        self.shared().lock().pending.push(pending);
        self.shared().sendable.notify_one();
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
        state.pending.retain(|p| p.step > step);
        state.credits.retain(|s, _| *s > step);
        state.roots.retain(|s, _| *s > step);
        self.shared().observe_roots(&state);
        if let Some(memory) = &state.memory {
            memory.free(step);
        }
        state.done = state.shares;
        drop(state);
        self.shared().sendable.notify_one();
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
        self.lock().closed = true;
        self.observer.meter.sending(false);
        self.observer.meter.receiving(false);
        self.received.notify_all();
        self.sendable.notify_one();
        self.closing.notify_one();
    }

    /// Notes whether a root is on its way.
    fn observe_roots(&self, state: &State) {
        let arriving = state.roots.values().any(|(root, _)| !root.is_whole());
        self.observer.meter.receiving(arriving);
    }

    /// The owner has said whether it shares memory.
    fn settle_sharing(&self, state: &mut State) {
        if !state.shares && state.memory.take().is_some() {
            debug!("the owner is not on this host: gradients are sent");
        }
    }
}
