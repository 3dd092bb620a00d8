//! What a worker pushes: chunks of nodes, as bytes or as places in its memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use rayon::prelude::*;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::{Code, Status};
use tracing::info;

use super::host::check_open;
use super::params::send_params;
use super::roots::{Lent, Way, send_roots};
use super::{Exchange, Host, Incoming, MEASURING, StepSums, Told, WINDOW};
use crate::aggregate::{Data, OfferError, Offered};
use crate::ids::{RunId, SessionId, Step};
use crate::layout::{CHUNK_LEN, chunk_range};
use crate::seal::{Opener, Sealer};
use crate::segment::{Part, Segment};
use crate::tree::Node;
use crate::wire;

/// Bytes of a worker's segment, at most. It is address space; memory is what the worker uses of it.
const MAX_SEGMENT: u64 = 4 << 40;

/// Chunks of a push for which a core is worth being woken: a millisecond of work.
const PER_CORE: usize = 8;

/// A worker's stream for one state of a run.
pub(super) struct Stream {
    pub(super) exchange: Arc<Exchange>,
    pub(super) host: Arc<dyn Host>,
    pub(super) run: RunId,
    pub(super) session: SessionId,
    pub(super) number: u64,
    pub(super) shared: Option<Shared>,
}

/// What a stream between two processes of one host has.
pub(super) struct Shared {
    /// The worker's nodes.
    nodes: Arc<Segment>,
    /// The roots that it reads.
    lent: Arc<Lent>,
}

impl Stream {
    /// Whether what comes from here still counts.
    fn check(&self) -> Result<(), Status> {
        check_open(&*self.host, self.session)?;
        match self.exchange.is_newest(self.session, self.number) {
            true => Ok(()),
            false => Err(Status::failed_precondition(
                "this stream was replaced by a newer one",
            )),
        }
    }

    pub(super) async fn receive(
        &mut self,
        mut incoming: Incoming,
        out: &mpsc::Sender<Result<v1::Chunk, Status>>,
    ) -> Result<(), Status> {
        let mut opener = Opener::default();
        // Echoes are sent here until the stream is opened, and everything else by the task that has the sealer then.
        let mut sealer = Some(Sealer::default());
        let mut turn = None;
        while let Some(chunk) = incoming.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(status) if is_unreadable(&status) => {
                    self.check()?;
                    return self.broken(status.message().to_owned()).await;
                }
                // A connection that closed; the session notices by itself.
                Err(_) => return Ok(()),
            };
            self.check()?;
            let kind = match opener.chunk(chunk) {
                Ok(Some(kind)) => kind,
                Ok(None) => continue,
                Err(error) => return self.broken(error.to_string()).await,
            };
            match (kind, &mut sealer) {
                (Kind::Probe(v1::Probe { number, .. }), Some(sealer)) => {
                    if turn.is_none() {
                        let lock = self.exchange.measuring.clone().lock_owned();
                        // Whoever waits for longer is not measured.
                        turn = timeout(MEASURING, lock).await.ok();
                    }
                    let echo = sealer.chunk(Kind::Echo(v1::Echo { number }));
                    // One that is gone is noticed at the other end of the stream.
                    let _ = out.send(Ok(echo)).await;
                }
                (Kind::Open(open), Some(own)) => {
                    self.shared = open.segment.as_ref().and_then(|s| self.share(s));
                    let lent = self.shared.as_ref().map(|shared| shared.lent.clone());
                    let way = Way::new(self.session, lent, std::mem::take(own), out.clone());
                    let exchange = self.exchange.clone();
                    tokio::spawn(send_params(exchange, self.session, open.after, way.clone()));
                    let (exchange, run) = (self.exchange.clone(), self.run.clone());
                    tokio::spawn(send_roots(exchange, run, open.after, way));
                    (sealer, turn) = (None, None);
                }
                (Kind::Node(node), None) => self.push(node).await?,
                (Kind::SharedNode(node), None) => self.push_shared(node).await?,
                (Kind::Done(done), _) => {
                    if let Some(shared) = &self.shared {
                        shared.lent.give_back(done.through);
                    }
                }
                (Kind::Alive(_), _) => {}
                _ => return Err(Status::invalid_argument("only node chunks are pushed")),
            }
        }
        Ok(())
    }

    /// Opens the worker's memory; `None` where it is on another host, or another user's, or where nothing is shared.
    fn share(&self, segment: &v1::Segment) -> Option<Shared> {
        if !self.exchange.roots.shares {
            return None;
        }
        let worker = self.session;
        let opened = wire::segment_from(segment)
            .map_err(|error| error.to_string())
            .and_then(|a| Segment::open(&a, MAX_SEGMENT).map_err(|error| error.to_string()));
        match opened {
            Ok(nodes) => {
                info!(%worker, "on this host: gradients stay in shared memory");
                Some(Shared {
                    nodes: Arc::new(nodes),
                    lent: Arc::default(),
                })
            }
            Err(reason) => {
                info!(%worker, reason, "not on this host, as it seems: gradients are sent");
                None
            }
        }
    }

    /// What this worker pushes cannot be relied on: its session ends, and others do its work.
    async fn broken(&self, what: String) -> Result<(), Status> {
        let session = self.session;
        let status = Status::data_loss(format!("in the exchange, {what}"));
        self.host.tell(Told::Broken { session, what }).await;
        Err(status)
    }

    /// The step of a push, if it is held; it has begun now. One that is not has been committed, or its run has ended: the
    /// push came too late to matter.
    fn held(&self, step: Step, node: Node, last: u32) -> Result<Option<Arc<StepSums>>, Status> {
        let Some(held) = self.exchange.get(&self.run, step) else {
            return Ok(None);
        };
        // What is shared takes no memory here, so all of it may be pushed at once. What was granted once stays granted:
        // the leading chunks only grow.
        let below = match &self.shared {
            Some(_) => held.sums.chunks().end,
            None => held.sums.leading() + WINDOW,
        };
        if last as usize >= below {
            return Err(Status::resource_exhausted(format!(
                "chunk {last} of {node}, step {step}, was pushed with credit below {below}"
            )));
        }
        held.began.get_or_init(|| self.host.now());
        Ok(Some(held))
    }

    async fn push(&self, chunk: v1::NodeChunk) -> Result<(), Status> {
        let node = Node {
            first: chunk.first,
            size: chunk.size,
        };
        let Some(held) = self.held(chunk.step, node, chunk.index)? else {
            return Ok(());
        };
        let data = Data::Wire {
            data: chunk.data,
            check: chunk.check,
        };
        let offered = held.offer(node, chunk.index as usize, data, self.session);
        self.offered(&held, offered).await
    }

    async fn push_shared(&self, chunks: v1::SharedNode) -> Result<(), Status> {
        let Some(shared) = &self.shared else {
            return Err(invalid("no memory is shared with this worker"));
        };
        let node = Node {
            first: chunks.first,
            size: chunks.size,
        };
        let Some(last) = chunks.below.checked_sub(1).filter(|l| *l >= chunks.index) else {
            return Err(invalid("a push without chunks"));
        };
        let Some(held) = self.held(chunks.step, node, last)? else {
            return Ok(());
        };
        let (nodes, sums, from) = (shared.nodes.clone(), held.clone(), self.session);
        // Some megabytes at a time: too long for a thread that others wait for.
        let summing = tokio::task::spawn_blocking(move || {
            let offer = |index: usize| {
                let bytes = chunk_range(index, sums.sums.len()).len() * 4;
                let start = (index * CHUNK_LEN * 4) as u64;
                let start = chunks.offset.checked_add(start);
                let part = start.and_then(|start| Part::new(&nodes, start, bytes));
                let part = part.ok_or(OfferError::Outside { index, node })?;
                sums.offer(node, index, Data::Shared(part), from)
            };
            in_parallel(chunks.index as usize..chunks.below as usize, offer)
        });
        let offered = summing.await.expect("sums do not panic");
        self.offered(&held, offered).await
    }

    /// Tells what a push did.
    async fn offered(
        &self,
        held: &StepSums,
        offered: Result<Offered, OfferError>,
    ) -> Result<(), Status> {
        for told in held.told(offered).map_err(invalid)? {
            self.host.tell(told).await;
        }
        Ok(())
    }
}

/// Whether what came is no message, as [`Incoming`] says it: the connection stands, and what follows is lost.
fn is_unreadable(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument | Code::Unimplemented | Code::ResourceExhausted | Code::DataLoss
    )
}

/// Offers chunks, many of them on several cores, nearly in order: roots go out from the first chunk on.
fn in_parallel(
    chunks: Range<usize>,
    offer: impl Fn(usize) -> Result<Offered, OfferError> + Sync,
) -> Result<Offered, OfferError> {
    let next = AtomicUsize::new(chunks.start);
    let some = |_| {
        let mut all = Offered::default();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= chunks.end {
                return Ok(all);
            }
            all.join(offer(index)?);
        }
    };
    let join = |mut all: Offered, more| {
        all.join(more);
        Ok(all)
    };
    let threads = rayon::current_num_threads().min(chunks.len() / PER_CORE);
    if threads <= 1 {
        return some(0);
    }
    (0..threads)
        .into_par_iter()
        .map(some)
        .try_reduce(Offered::default, join)
}

/// The worker asked for something that cannot be.
pub(super) fn invalid(error: impl ToString) -> Status {
    Status::invalid_argument(error.to_string())
}
