//! The worker's side of the gradient exchange: pushes the tree nodes it holds, chunk by chunk and under credits, and
//! collects the root. The nodes stay here until the commit, so that they can be pushed again.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use cohort_common::aggregate::encode;
use cohort_common::ids::Step;
use cohort_common::layout::{chunk_count, chunk_range};
use cohort_common::net::{Credentials, EXCHANGE_BEAT};
use cohort_common::seal::{Opener, Sealer, checksum};
use cohort_common::tree::{Node, Tree};
use cohort_common::wire::MAX_MESSAGE;
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use cohort_proto::v1::exchange_client::ExchangeClient as GrpcClient;
use tokio::sync::{Notify, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// Chunks on their way out that may wait for the connection.
const OUTBOX: usize = 4;

/// The exchange of one run. Clones share it.
#[derive(Clone)]
pub struct ExchangeClient(Arc<Shared>);

struct Shared {
    root: Node,
    len: usize,
    state: Mutex<State>,
    /// Something can be sent.
    sendable: Notify,
    /// A root is complete, or none will be.
    received: Condvar,
}

#[derive(Default)]
struct State {
    /// Nodes that are not yet pushed whole.
    pending: Vec<Pending>,
    /// Chunks below this index may be pushed, by step.
    credits: BTreeMap<Step, usize>,
    roots: BTreeMap<Step, Root>,
    /// Steps up to here are applied.
    applied: Step,
    closed: bool,
}

struct Pending {
    step: Step,
    node: Node,
    data: Arc<Vec<f32>>,
    next: usize,
}

struct Root {
    data: Vec<f32>,
    have: Vec<bool>,
    missing: usize,
}

impl ExchangeClient {
    /// Opens the stream of a run; it gets the roots of the steps after `after`. Says on `broken` why it ended, unless it
    /// was closed here.
    pub async fn open(
        channel: Channel,
        credentials: Credentials,
        lanes: u32,
        len: usize,
        after: Step,
        broken: mpsc::Sender<String>,
    ) -> Result<Self, String> {
        let (out, outgoing) = mpsc::channel(OUTBOX);
        let mut sealer = Sealer::default();
        let open = sealer.chunk(Kind::Open(v1::Open { after }));
        out.send(open).await.expect("the receiver is right here");
        let mut client = GrpcClient::with_interceptor(channel, credentials)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let response = client.push_pull(ReceiverStream::new(outgoing)).await;
        let incoming = response.map_err(|s| s.message().to_owned())?.into_inner();
        let shared = Arc::new(Shared {
            root: Tree::new(lanes).root(),
            len,
            state: Mutex::new(State {
                applied: after,
                ..State::default()
            }),
            sendable: Notify::new(),
            received: Condvar::new(),
        });
        tokio::spawn(send(shared.clone(), sealer, out));
        tokio::spawn(receive(shared.clone(), incoming, broken));
        Ok(Self(shared))
    }

    /// Pushes a node as soon as credits allow.
    pub fn push(&self, step: Step, node: Node, data: Arc<Vec<f32>>) {
        let pending = Pending {
            step,
            node,
            data,
            next: 0,
        };
        self.0.lock().pending.push(pending);
        self.0.sendable.notify_one();
    }

    /// Waits for the root of a step; blocks the thread. `None` if the exchange ended.
    pub fn root(&self, step: Step) -> Option<Vec<f32>> {
        let mut state = self.0.lock();
        loop {
            if state.roots.get(&step).is_some_and(|root| root.missing == 0) {
                return state.roots.remove(&step).map(|root| root.data);
            }
            if state.closed {
                return None;
            }
            state = self.0.received.wait(state).expect(POISON);
        }
    }

    /// Forgets a step that is applied. Gives back a buffer that can be used again.
    pub fn applied(&self, step: Step) {
        let mut state = self.0.lock();
        state.applied = step;
        state.pending.retain(|p| p.step > step);
        state.credits.retain(|s, _| *s > step);
        state.roots.retain(|s, _| *s > step);
    }

    /// Ends the exchange; whoever waits for a root is told.
    pub fn close(&self) {
        self.0.close();
    }
}

const POISON: &str = "no thread panics while it holds this lock";

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(POISON)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.received.notify_all();
        self.sendable.notify_one();
    }

    /// The next chunk that may be sent, lowest index first: redone lanes catch up before anything else goes on.
    fn next_chunk(&self) -> Option<v1::NodeChunk> {
        let (step, node, data, index) = {
            let mut state = self.lock();
            let State {
                pending, credits, ..
            } = &mut *state;
            let below = |p: &Pending| credits.get(&p.step).copied().unwrap_or(0);
            let ready = pending.iter_mut().filter(|p| p.next < below(p));
            let best = ready.min_by_key(|p| (p.step, p.next))?;
            let found = (best.step, best.node, best.data.clone(), best.next);
            best.next += 1;
            let chunks = chunk_count(self.len);
            pending.retain(|p| p.next < chunks);
            found
        };
        let data = encode(&data[chunk_range(index, self.len)]);
        Some(v1::NodeChunk {
            step,
            first: node.first,
            size: node.size,
            index: index as u32,
            check: checksum(&data),
            data,
        })
    }

    fn take(&self, chunk: v1::NodeChunk) -> Result<(), String> {
        let node = Node {
            first: chunk.first,
            size: chunk.size,
        };
        let index = chunk.index as usize;
        if node != self.root || index >= chunk_count(self.len) {
            return Err(format!("chunk {index} of {node} is not a part of the root"));
        }
        let range = chunk_range(index, self.len);
        if chunk.data.len() != range.len() * 4 {
            let bytes = chunk.data.len();
            return Err(format!("chunk {index} of the root has {bytes} bytes"));
        }
        let mut state = self.lock();
        if chunk.step <= state.applied {
            return Ok(());
        }
        let root = state.roots.entry(chunk.step).or_insert_with(|| Root {
            data: vec![0.0; self.len],
            have: vec![false; chunk_count(self.len)],
            missing: chunk_count(self.len),
        });
        if !std::mem::replace(&mut root.have[index], true) {
            for (value, bytes) in root.data[range].iter_mut().zip(chunk.data.chunks_exact(4)) {
                *value = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
            }
            root.missing -= 1;
            if root.missing == 0 {
                self.received.notify_all();
            }
        }
        Ok(())
    }
}

async fn send(shared: Arc<Shared>, mut sealer: Sealer, out: mpsc::Sender<v1::Chunk>) {
    loop {
        if shared.lock().closed {
            return;
        }
        let kind = match shared.next_chunk() {
            Some(chunk) => Kind::Node(chunk),
            None => tokio::select! {
                () = shared.sendable.notified() => continue,
                () = tokio::time::sleep(EXCHANGE_BEAT) => Kind::Alive(v1::Empty {}),
            },
        };
        // A connection that is gone is noticed at the other end of the stream.
        if out.send(sealer.chunk(kind)).await.is_err() {
            return;
        }
    }
}

async fn receive(
    shared: Arc<Shared>,
    mut incoming: Streaming<v1::Chunk>,
    broken: mpsc::Sender<String>,
) {
    let reason = shared.receive(&mut incoming).await;
    if !shared.lock().closed {
        // If nobody listens the session has ended, too.
        let _ = broken.try_send(reason);
    }
    shared.close();
}

impl Shared {
    /// Takes in what comes; ends with the reason why no more will.
    async fn receive(&self, incoming: &mut Streaming<v1::Chunk>) -> String {
        let mut opener = Opener::default();
        loop {
            let chunk = match incoming.next().await {
                None => return "the owner closed the exchange".into(),
                Some(Err(status)) => return status.message().to_owned(),
                Some(Ok(chunk)) => chunk,
            };
            match opener.chunk(chunk) {
                Ok(Some(Kind::Credit(credit))) => {
                    let mut state = self.lock();
                    if credit.step > state.applied {
                        let held = state.credits.entry(credit.step).or_default();
                        *held = (*held).max(credit.below as usize);
                    }
                    drop(state);
                    self.sendable.notify_one();
                }
                Ok(Some(Kind::Node(node))) => {
                    if let Err(error) = self.take(node) {
                        return format!("the owner sent nonsense: {error}");
                    }
                }
                Ok(Some(Kind::Open(_) | Kind::Alive(_)) | None) => {}
                Err(error) => return error.to_string(),
            }
        }
    }
}
