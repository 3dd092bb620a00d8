//! The coordinator's side of the gradient exchange: it owns every slice. Workers push tree nodes under credits; each
//! finished root chunk goes back to all of them at once. What is held is what waits for a sibling, within the window
//! of credits, and the roots of the newest steps.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cohort_common::aggregate::Aggregator;
use cohort_common::cluster::Event;
use cohort_common::ids::{RunId, Step};
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

    /// The newest step that is open for a run; 0 if there is none.
    fn newest(&self, run: &RunId) -> Step {
        let range = (run.clone(), 0)..=(run.clone(), Step::MAX);
        self.lock()
            .range(range)
            .next_back()
            .map_or(0, |((_, s), _)| *s)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(RunId, Step), Arc<StepSums>>> {
        self.steps
            .lock()
            .expect("no thread panics while it holds this lock")
    }
}

/// Serves one worker's stream: what it pushes is summed, finished roots are sent to it. Returns the stream to it.
pub fn serve(
    cluster: Cluster,
    run: RunId,
    alive: impl Fn() -> bool + Send + 'static,
    incoming: Streaming<v1::Chunk>,
) -> mpsc::Receiver<Result<v1::Chunk, Status>> {
    let (out, outgoing) = mpsc::channel(OUTBOX);
    let after = cluster.exchange().newest(&run);
    tokio::spawn(send_roots(cluster.clone(), run.clone(), after, out.clone()));
    tokio::spawn(async move {
        if let Err(status) = receive(&cluster, &run, alive, incoming).await {
            // The receiver is gone if the worker is: then nobody needs the reason.
            let _ = out.send(Err(status)).await;
        }
    });
    outgoing
}

async fn receive(
    cluster: &Cluster,
    run: &RunId,
    alive: impl Fn() -> bool,
    mut incoming: Streaming<v1::Chunk>,
) -> Result<(), Status> {
    while let Some(chunk) = incoming.next().await {
        // An error here is a connection that closed; the session notices by itself.
        let Ok(chunk) = chunk else { return Ok(()) };
        if !alive() {
            return Err(Status::failed_precondition(
                "this session has ended; register again",
            ));
        }
        let Some(Kind::Node(node)) = chunk.kind else {
            return Err(Status::invalid_argument("only node chunks are pushed"));
        };
        push(cluster, run, node).await?;
    }
    Ok(())
}

async fn push(cluster: &Cluster, run: &RunId, chunk: v1::NodeChunk) -> Result<(), Status> {
    let step = chunk.step;
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
    let offered = match held.sums.offer(node, chunk.index as usize, &chunk.data) {
        Ok(offered) => offered,
        Err(error @ cohort_common::aggregate::OfferError::Mismatch { .. }) => {
            let error = format!("step {step}: {error}");
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

async fn send_roots(
    cluster: Cluster,
    run: RunId,
    after: Step,
    out: mpsc::Sender<Result<v1::Chunk, Status>>,
) {
    let mut opened = cluster.exchange().opened.subscribe();
    let mut done = after;
    loop {
        opened.mark_unchanged();
        while let Some(held) = cluster.exchange().next_after(&run, done) {
            done = held.step;
            if send_step(&held, &out).await.is_none() {
                return;
            }
        }
        tokio::select! {
            changed = opened.changed() => if changed.is_err() { return },
            () = out.closed() => return,
        }
    }
}

/// Sends one step's credits and roots as they are completed. `None` when the receiver is gone.
async fn send_step(held: &StepSums, out: &mpsc::Sender<Result<v1::Chunk, Status>>) -> Option<()> {
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
        send(out, Kind::Credit(credit)).await?;
        while sent < ready {
            let chunk = held.sums.root(sent).expect("leading roots are complete");
            let node = v1::NodeChunk {
                step: held.step,
                first: root.first,
                size: root.size,
                index: sent as u32,
                data: chunk.data,
            };
            send(out, Kind::Node(node)).await?;
            sent += 1;
        }
        if sent == chunks {
            return Some(());
        }
        tokio::select! {
            changed = leading.changed() => changed.ok()?,
            () = out.closed() => return None,
        }
    }
}

async fn send(out: &mpsc::Sender<Result<v1::Chunk, Status>>, kind: Kind) -> Option<()> {
    let chunk = v1::Chunk { kind: Some(kind) };
    out.send(Ok(chunk)).await.ok()
}
