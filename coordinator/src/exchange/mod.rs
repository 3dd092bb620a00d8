//! The coordinator's side of the gradient exchange: it owns every slice. Workers push tree nodes under credits; each
//! finished root chunk goes back to all of them at once. What is held is what waits for a sibling, within the window
//! of credits, and the roots of the newest steps.
//!
//! A worker on the same host need not send its gradients: it says where they lie in its memory, and reads the root where
//! it lies here. Order, numbers and sums are the same. `stream.rs` is what comes from a worker, `roots.rs` what goes to
//! it.
//!
//! What the exchange needs of the coordinator around it is the trait [`Host`], so that a benchmark can drive it without.

mod roots;
mod stream;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::SystemTime;

use cohort_common::aggregate::{Aggregator, Data, OfferError, Offered, Shape};
use cohort_common::cluster::Event;
use cohort_common::ids::{RunId, SessionId, Step};
use cohort_common::segment::Segment;
use cohort_common::tree::{Node, Tree};
use cohort_common::wire::{RUN_KEY, SESSION_KEY, run_id};
use cohort_proto::v1;
use cohort_proto::v1::exchange_server::Exchange as Service;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::status::{invalid, refused};
use stream::Stream;

/// Chunks that workers may be ahead of the slowest, at most.
const WINDOW: usize = 32;

/// Messages that wait for one slow receiver.
const OUTBOX: usize = 4;

/// Segments for roots that wait to be used again, at most.
const IDLE: usize = 3;

/// The steps whose sums are held.
#[derive(Debug)]
pub struct Exchange {
    steps: Mutex<BTreeMap<(RunId, Step), Arc<StepSums>>>,
    opened: watch::Sender<()>,
    /// The newest stream of each session: a worker that loads a state anew opens another, and what is still on its way
    /// in the one before is of a state that counts no more.
    streams: Mutex<BTreeMap<SessionId, u64>>,
    roots: Arc<Roots>,
}

/// The sums of one step, and how far its roots are complete.
#[derive(Debug)]
struct StepSums {
    step: Step,
    root: Node,
    sums: Aggregator,
    leading: watch::Sender<usize>,
    /// When its first chunk came.
    began: OnceLock<SystemTime>,
}

impl StepSums {
    /// Adds a chunk of a node.
    fn offer(
        &self,
        node: Node,
        index: usize,
        data: Data,
        from: SessionId,
    ) -> Result<Offered, OfferError> {
        self.began.get_or_init(SystemTime::now);
        let offered = self.sums.offer(node, index, data, from)?;
        if offered.chunk_complete {
            let leading = self.sums.leading();
            self.leading.send_if_modified(|at| {
                let grows = leading > *at;
                *at = leading.max(*at);
                grows
            });
        }
        Ok(offered)
    }
}

/// Segments for roots. Fresh memory is slow, so those that nobody reads any more are used again.
#[derive(Debug, Default)]
struct Roots(Mutex<Vec<Arc<Segment>>>);

impl Roots {
    fn take(&self, bytes: usize) -> Arc<Segment> {
        let mut held = self.0.lock().expect(POISON);
        let idle = |segment: &Arc<Segment>| Arc::strong_count(segment) == 1;
        held.retain(|segment| !idle(segment) || !segment.is_burnt() && segment.len() == bytes);
        if let Some(found) = held.iter().find(|segment| idle(segment)) {
            return found.clone();
        }
        // Where memory cannot be shared, the root is sent to everybody.
        let fresh = Segment::shared(bytes).unwrap_or_else(|_| Segment::private(bytes));
        let fresh = Arc::new(fresh);
        held.push(fresh.clone());
        fresh
    }

    /// Gives memory back: most of what is idle, or all of it.
    fn trim(&self, keep: usize) {
        let mut kept = 0;
        self.0.lock().expect(POISON).retain(|segment| {
            let idle = Arc::strong_count(segment) == 1;
            kept += usize::from(idle);
            !idle || kept <= keep
        });
    }
}

impl Default for Exchange {
    fn default() -> Self {
        Self {
            steps: Mutex::default(),
            opened: watch::Sender::new(()),
            streams: Mutex::default(),
            roots: Arc::default(),
        }
    }
}

const POISON: &str = "no thread panics while it holds this lock";

impl Exchange {
    /// Gets ready to sum the gradients of a step.
    pub fn open(&self, run: &RunId, step: Step, shape: Shape) {
        let roots = self.roots.clone();
        let sums = StepSums {
            step,
            root: Tree::new(shape.lanes).root(),
            sums: Aggregator::with_root(shape, Box::new(move |bytes| roots.take(bytes))),
            leading: watch::Sender::new(0),
            began: OnceLock::new(),
        };
        self.lock().insert((run.clone(), step), Arc::new(sums));
        self.opened.send_replace(());
    }

    /// Forgets the steps of a run up to and including `through`.
    pub fn release(&self, run: &RunId, through: Step) {
        let mut steps = self.lock();
        steps.retain(|(held, step), _| held != run || *step > through);
        let keep = if steps.is_empty() { 0 } else { IDLE };
        drop(steps);
        self.roots.trim(keep);
    }

    /// When the first chunk of a step came that is held.
    pub fn began(&self, run: &RunId, step: Step) -> Option<SystemTime> {
        self.get(run, step)?.began.get().copied()
    }

    fn get(&self, run: &RunId, step: Step) -> Option<Arc<StepSums>> {
        self.lock().get(&(run.clone(), step)).cloned()
    }

    fn next_after(&self, run: &RunId, step: Step) -> Option<Arc<StepSums>> {
        let from = (run.clone(), step + 1);
        let to = (run.clone(), Step::MAX);
        self.lock().range(from..=to).next().map(|(_, s)| s.clone())
    }

    /// Makes a stream the newest of its session.
    fn enter(&self, session: SessionId) -> u64 {
        let mut streams = self.streams.lock().expect(POISON);
        let number = streams.entry(session).or_default();
        *number += 1;
        *number
    }

    fn is_newest(&self, session: SessionId, number: u64) -> bool {
        let streams = self.streams.lock().expect(POISON);
        streams.get(&session) == Some(&number)
    }

    /// Forgets a session that has ended.
    pub fn forget(&self, session: SessionId) {
        self.streams.lock().expect(POISON).remove(&session);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(RunId, Step), Arc<StepSums>>> {
        self.steps.lock().expect(POISON)
    }
}

/// What the exchange asks and tells the coordinator around it.
#[tonic::async_trait]
pub trait Host: Send + Sync {
    /// Whether a session is open.
    fn is_open(&self, session: SessionId) -> bool;

    /// Something happened.
    async fn tell(&self, event: Event);
}

/// The session that a worker's call belongs to, and whether it is still open.
pub(crate) fn session_of(host: &dyn Host, metadata: &MetadataMap) -> Result<SessionId, Status> {
    let session = metadata
        .get(SESSION_KEY)
        .and_then(|v| v.to_str().ok()?.parse().ok())
        .map(SessionId)
        .ok_or_else(|| Status::unauthenticated("only workers in a session may call this"))?;
    match host.is_open(session) {
        true => Ok(session),
        false => Err(refused("this session has ended; register again")),
    }
}

/// Serves the exchange.
pub struct ExchangeService {
    /// The sums.
    pub exchange: Arc<Exchange>,
    /// Who is told of them.
    pub host: Arc<dyn Host>,
}

#[tonic::async_trait]
impl Service for ExchangeService {
    type PushPullStream = ReceiverStream<Result<v1::Chunk, Status>>;

    /// What a worker pushes is summed; finished roots are sent to it.
    async fn push_pull(
        &self,
        request: Request<Streaming<v1::Chunk>>,
    ) -> Result<Response<Self::PushPullStream>, Status> {
        let session = session_of(&*self.host, request.metadata())?;
        let run = request.metadata().get(RUN_KEY);
        let run = run.and_then(|v| v.to_str().ok()).unwrap_or_default();
        let (out, outgoing) = mpsc::channel(OUTBOX);
        let mut stream = Stream {
            number: self.exchange.enter(session),
            exchange: self.exchange.clone(),
            host: self.host.clone(),
            run: run_id(run).map_err(invalid)?,
            session,
            shared: None,
        };
        tokio::spawn(async move {
            if let Err(status) = stream.receive(request.into_inner(), &out).await {
                // The receiver is gone if the worker is: then nobody needs the reason.
                let _ = out.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}
