//! The coordinator's side of the gradient exchange: it owns every slice. Workers push tree nodes under credits; each
//! finished root chunk goes back to all of them at once. What is held is what waits for a sibling, within the window
//! of credits, and the roots of the newest steps.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cohort_common::aggregate::{Aggregator, OfferError, Stamp};
use cohort_common::cluster::Event;
use cohort_common::cluster::events::LeftReason;
use cohort_common::ids::{RunId, SessionId, Step};
use cohort_common::net::EXCHANGE_BEAT;
use cohort_common::seal::{Opener, Sealer};
use cohort_common::tree::{Node, Tree};
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use crate::driver::Cluster;

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

/// A worker's stream for one state of a run.
struct Stream {
    cluster: Cluster,
    run: RunId,
    session: SessionId,
    number: u64,
}

/// Serves one worker's stream: what it pushes is summed, finished roots are sent to it. Returns the stream to it.
pub fn serve(
    cluster: Cluster,
    run: RunId,
    session: SessionId,
    incoming: Streaming<v1::Chunk>,
) -> mpsc::Receiver<Result<v1::Chunk, Status>> {
    let (out, outgoing) = mpsc::channel(OUTBOX);
    let stream = Stream {
        number: cluster.exchange().enter(session),
        cluster,
        run,
        session,
    };
    tokio::spawn(async move {
        if let Err(status) = stream.receive(incoming, &out).await {
            // The receiver is gone if the worker is: then nobody needs the reason.
            let _ = out.send(Err(status)).await;
        }
    });
    outgoing
}

impl Stream {
    /// Whether what comes from here still counts.
    fn check(&self) -> Result<(), Status> {
        let refused = Status::failed_precondition;
        if !self.cluster.is_open(self.session) {
            return Err(refused("this session has ended; register again"));
        }
        match self.cluster.exchange().is_newest(self.session, self.number) {
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
                        self.cluster.clone(),
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
        self.cluster.send(Event::Left { session, reason }).await;
        Err(status)
    }

    async fn push(&self, chunk: v1::NodeChunk) -> Result<(), Status> {
        let (cluster, run, step) = (&self.cluster, &self.run, chunk.step);
        // A step that is not held has been committed, or its run has ended: the push came too late to matter.
        let Some(held) = cluster.exchange().get(run, step) else {
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
                cluster.send(Event::RunBroken { run, error }).await;
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
            cluster.send(Event::Delivered { run, step, lanes }).await;
        }
        if offered.all_complete {
            let totals = held.sums.totals().expect("every root is complete");
            let run = run.clone();
            cluster
                .send(Event::RootComplete { run, step, totals })
                .await;
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
    cluster: Cluster,
    run: RunId,
    after: Step,
    out: mpsc::Sender<Result<v1::Chunk, Status>>,
) {
    let mut opened = cluster.exchange().opened.subscribe();
    let mut done = after;
    let mut way = Way {
        sealer: Sealer::default(),
        out,
    };
    loop {
        opened.mark_unchanged();
        while let Some(held) = cluster.exchange().next_after(&run, done) {
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
