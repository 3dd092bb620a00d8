//! The coordinator's side of the gradient exchange: it owns every slice. Workers push tree nodes under credits; each
//! finished root chunk goes back to all of them at once. What is held is what waits for a sibling, within the window
//! of credits, and the roots of the newest steps.
//!
//! What it needs of the coordinator around it is the trait [`Host`], so that a benchmark can drive it without one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cohort_common::aggregate::{Aggregator, OfferError, Stamp};
use cohort_common::cluster::Event;
use cohort_common::cluster::events::LeftReason;
use cohort_common::ids::{RunId, SessionId, Step};
use cohort_common::net::EXCHANGE_BEAT;
use cohort_common::seal::{Opener, Sealer};
use cohort_common::tree::{Node, Tree};
use cohort_common::wire::{RUN_KEY, SESSION_KEY, run_id};
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use cohort_proto::v1::exchange_server::Exchange as Service;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::status::{invalid, refused};

/// Chunks that workers may be ahead of the slowest, at most.
const WINDOW: usize = 32;

/// Messages that wait for one slow receiver.
const OUTBOX: usize = 4;

/// The steps whose sums are held.
#[derive(Debug)]
pub struct Exchange {
    steps: Mutex<BTreeMap<(RunId, Step), Arc<StepSums>>>,
    opened: watch::Sender<()>,
    /// The newest stream of each session: a worker that loads a state anew opens another, and what is still on its way
    /// in the one before is of a state that counts no more.
    streams: Mutex<BTreeMap<SessionId, u64>>,
}

/// The sums of one step, and how far its roots are complete.
#[derive(Debug)]
struct StepSums {
    step: Step,
    lanes: u32,
    sums: Aggregator,
    leading: watch::Sender<usize>,
}

impl Default for Exchange {
    fn default() -> Self {
        Self {
            steps: Mutex::default(),
            opened: watch::Sender::new(()),
            streams: Mutex::default(),
        }
    }
}

impl Exchange {
    /// Gets ready to sum gradients of `len` elements over `lanes` lanes.
    pub fn open(&self, run: &RunId, step: Step, lanes: u32, len: usize) {
        let sums = StepSums {
            step,
            lanes,
            sums: Aggregator::new(lanes, len),
            leading: watch::Sender::new(0),
        };
        self.lock().insert((run.clone(), step), Arc::new(sums));
        self.opened.send_replace(());
    }

    /// Forgets the steps of a run up to and including `through`.
    pub fn release(&self, run: &RunId, through: Step) {
        self.lock()
            .retain(|(held, step), _| held != run || *step > through);
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
        let mut streams = self.streams.lock().expect("as in `lock`");
        let number = streams.entry(session).or_default();
        *number += 1;
        *number
    }

    fn is_newest(&self, session: SessionId, number: u64) -> bool {
        let streams = self.streams.lock().expect("as in `lock`");
        streams.get(&session) == Some(&number)
    }

    /// Forgets a session that has ended.
    pub fn forget(&self, session: SessionId) {
        self.streams.lock().expect("as in `lock`").remove(&session);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(RunId, Step), Arc<StepSums>>> {
        self.steps
            .lock()
            .expect("no thread panics while it holds this lock")
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
        let stream = Stream {
            number: self.exchange.enter(session),
            exchange: self.exchange.clone(),
            host: self.host.clone(),
            run: run_id(run).map_err(invalid)?,
            session,
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

/// A worker's stream for one state of a run.
struct Stream {
    exchange: Arc<Exchange>,
    host: Arc<dyn Host>,
    run: RunId,
    session: SessionId,
    number: u64,
}

impl Stream {
    /// Whether what comes from here still counts.
    fn check(&self) -> Result<(), Status> {
        if !self.host.is_open(self.session) {
            return Err(refused("this session has ended; register again"));
        }
        match self.exchange.is_newest(self.session, self.number) {
            true => Ok(()),
            false => Err(refused("this stream was replaced by a newer one")),
        }
    }

    async fn receive(
        &self,
        mut incoming: Streaming<v1::Chunk>,
        out: &mpsc::Sender<Result<v1::Chunk, Status>>,
    ) -> Result<(), Status> {
        let mut opener = Opener::default();
        let mut roots = None;
        while let Some(chunk) = incoming.next().await {
            // An error here is a connection that closed; the session notices by itself.
            let Ok(chunk) = chunk else { return Ok(()) };
            self.check()?;
            let kind = match opener.chunk(chunk) {
                Ok(Some(kind)) => kind,
                Ok(None) => continue,
                Err(error) => return self.broken(error.to_string()).await,
            };
            match kind {
                Kind::Open(open) if roots.is_none() => {
                    let sending = send_roots(
                        self.exchange.clone(),
                        self.run.clone(),
                        open.after,
                        out.clone(),
                    );
                    roots = Some(tokio::spawn(sending));
                }
                Kind::Node(node) if roots.is_some() => self.push(node).await?,
                Kind::Alive(_) => {}
                _ => return Err(Status::invalid_argument("only node chunks are pushed")),
            }
        }
        Ok(())
    }

    /// What this worker pushes cannot be relied on: its session ends, and others do its work.
    async fn broken(&self, what: String) -> Result<(), Status> {
        let reason = LeftReason::Protocol(format!("in the exchange, {what}"));
        let session = self.session;
        let status = Status::data_loss(reason.to_string());
        self.host.tell(Event::Left { session, reason }).await;
        Err(status)
    }

    async fn push(&self, chunk: v1::NodeChunk) -> Result<(), Status> {
        let (host, run, step) = (&self.host, &self.run, chunk.step);
        // A step that is not held has been committed, or its run has ended: the push came too late to matter.
        let Some(held) = self.exchange.get(run, step) else {
            return Ok(());
        };
        // What was granted once stays granted: the leading chunks only grow.
        let below = held.sums.leading() + WINDOW;
        if chunk.index as usize >= below {
            let index = chunk.index;
            let text = format!("chunk {index} of step {step} was pushed with credit below {below}");
            return Err(Status::resource_exhausted(text));
        }
        let node = Node {
            first: chunk.first,
            size: chunk.size,
        };
        let stamp = Stamp {
            check: chunk.check,
            from: self.session,
        };
        let offered = match held
            .sums
            .offer(node, chunk.index as usize, &chunk.data, stamp)
        {
            Ok(offered) => offered,
            Err(error @ OfferError::Mismatch { .. }) => {
                let error = format!(
                    "step {step}: {error}; take the one away that you trust less, then `cohort resume {run}`"
                );
                let run = run.clone();
                host.tell(Event::RunBroken { run, error }).await;
                return Ok(());
            }
            Err(error) => return Err(Status::invalid_argument(error.to_string())),
        };
        if offered.chunk_complete {
            let leading = held.sums.leading();
            held.leading.send_if_modified(|at| {
                let grows = leading > *at;
                *at = leading.max(*at);
                grows
            });
        }
        if !offered.delivered.is_empty() {
            let run = run.clone();
            let lanes = offered.delivered;
            host.tell(Event::Delivered { run, step, lanes }).await;
        }
        if offered.all_complete {
            let totals = held.sums.totals().expect("every root is complete");
            let run = run.clone();
            host.tell(Event::RootComplete { run, step, totals }).await;
        }
        Ok(())
    }
}

/// The way to a worker.
struct Way {
    sealer: Sealer,
    out: mpsc::Sender<Result<v1::Chunk, Status>>,
}

async fn send_roots(
    exchange: Arc<Exchange>,
    run: RunId,
    after: Step,
    out: mpsc::Sender<Result<v1::Chunk, Status>>,
) {
    let mut opened = exchange.opened.subscribe();
    let mut done = after;
    let mut way = Way {
        sealer: Sealer::default(),
        out,
    };
    loop {
        opened.mark_unchanged();
        while let Some(held) = exchange.next_after(&run, done) {
            done = held.step;
            if way.send_step(&held).await.is_none() {
                return;
            }
        }
        tokio::select! {
            changed = opened.changed() => if changed.is_err() { return },
            () = way.out.closed() => return,
            () = tokio::time::sleep(EXCHANGE_BEAT) => if way.alive().await.is_none() { return },
        }
    }
}

impl Way {
    /// Sends one step's credits and roots as they are completed. `None` when the receiver is gone.
    async fn send_step(&mut self, held: &StepSums) -> Option<()> {
        let mut leading = held.leading.subscribe();
        let root = Tree::new(held.lanes).root();
        let chunks = held.sums.chunks();
        let mut sent = 0;
        loop {
            let ready = *leading.borrow_and_update();
            let below = (ready + WINDOW).min(chunks);
            let credit = v1::Credit {
                step: held.step,
                below: below as u32,
            };
            self.send(Kind::Credit(credit)).await?;
            while sent < ready {
                let chunk = held.sums.root(sent).expect("leading roots are complete");
                let node = v1::NodeChunk {
                    step: held.step,
                    first: root.first,
                    size: root.size,
                    index: sent as u32,
                    check: chunk.check,
                    data: chunk.data,
                };
                self.send(Kind::Node(node)).await?;
                sent += 1;
            }
            if sent == chunks {
                return Some(());
            }
            tokio::select! {
                changed = leading.changed() => changed.ok()?,
                () = self.out.closed() => return None,
                () = tokio::time::sleep(EXCHANGE_BEAT) => self.alive().await?,
            }
        }
    }

    async fn alive(&mut self) -> Option<()> {
        self.send(Kind::Alive(v1::Empty {})).await
    }

    async fn send(&mut self, kind: Kind) -> Option<()> {
        let chunk = self.sealer.chunk(kind);
        self.out.send(Ok(chunk)).await.ok()
    }
}
