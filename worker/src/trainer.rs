//! The trainer: the one thread that owns the engine. It takes jobs in order, computes lanes and sums them along the
//! reduction tree, and applies commits. No weight changes before a commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use bytes::Bytes;
use cohort_common::aggregate::{add_all, totals_of};
use cohort_common::checkpoint::bytes_of;
use cohort_common::cluster::FromWorker;
use cohort_common::cluster::messages::{Commit, LaneSums};
use cohort_common::ids::{Lane, RunId, Step};
use cohort_common::lanes;
use cohort_common::layout::CHUNK_LEN;
use cohort_common::spec::{RunKind, RunSpec};
use cohort_common::tree::{Node, Tree};
use cohort_common::wire::{self, MAX_PIECE};
use cohort_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::error;

use crate::Config;
use crate::data::{DataClient, RunData};
use crate::engine::{DeviceChoice, Engine, EngineError, Site, State, Update};
use crate::exchange::ExchangeClient;
use crate::state::Fetched;

/// Pieces of a snapshot that wait for the connection.
const PIECES: usize = 4;

/// What the trainer is told.
pub enum Job {
    /// Get a run into memory.
    Load(Box<Load>),
    /// Compute lanes of a step.
    Compute {
        /// The step.
        step: Step,
        /// The lanes, ascending.
        lanes: Vec<Lane>,
        /// Whether the root stays here.
        sole_owner: bool,
    },
    /// Apply a step.
    Commit(Commit),
    /// Score units of a split.
    Evaluate {
        /// The state's step.
        step: Step,
        /// The split.
        split: u32,
        /// The units, ascending.
        units: Vec<u32>,
    },
    /// Copy the state of this step and upload it.
    Snapshot(Step),
    /// Forget the run.
    Unload,
}

/// A run to load.
pub struct Load {
    /// The run.
    pub run: RunId,
    /// What is trained.
    pub spec: Arc<RunSpec>,
    /// Updates that the state has seen.
    pub step: Step,
    /// The state.
    pub state: Fetched,
    /// The text.
    pub data: RunData,
    /// The way to the owners.
    pub exchange: ExchangeClient,
    /// Set when the run is over for this worker.
    pub cancelled: Arc<AtomicBool>,
}

/// Why a job was not done.
enum Stop {
    /// The run is over here; nobody waits for the result.
    Cancelled,
    /// The run cannot go on.
    Failed(String),
}

impl From<String> for Stop {
    fn from(error: String) -> Self {
        Self::Failed(error)
    }
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// The thread's state.
pub struct Trainer {
    device: DeviceChoice,
    threads: usize,
    out: mpsc::Sender<v1::FromWorker>,
    client: DataClient,
    run: Option<Loaded>,
}

/// The run in memory.
struct Loaded {
    run: RunId,
    spec: Arc<RunSpec>,
    step: Step,
    engine: Engine,
    data: RunData,
    exchange: ExchangeClient,
    cancelled: Arc<AtomicBool>,
    own_root: Option<Vec<f32>>,
    /// What this worker has pushed for the step in flight.
    pushed: Vec<Arc<Vec<f32>>>,
    /// Buffers of one gradient each, to be used again.
    free: Vec<Vec<f32>>,
    out: mpsc::Sender<v1::FromWorker>,
}

impl Trainer {
    /// A trainer without a run.
    pub fn new(config: &Config, out: mpsc::Sender<v1::FromWorker>, client: DataClient) -> Self {
        Self {
            device: config.device,
            threads: config.threads,
            out,
            client,
            run: None,
        }
    }

    /// Takes jobs until there are no more.
    pub fn run(mut self, jobs: Receiver<Job>) {
        for job in jobs {
            match job {
                Job::Load(load) => self.load(*load),
                Job::Unload => self.run = None,
                job => self.work(job),
            }
        }
    }

    fn load(&mut self, load: Load) {
        self.run = None;
        let (run, step) = (load.run.clone(), load.step);
        match self.open(load) {
            Ok(loaded) => {
                loaded.say(FromWorker::Loaded { run, step });
                self.run = Some(loaded);
            }
            Err(message) => {
                let failed = FromWorker::Failed { run, step, message };
                let _ = self.out.blocking_send(wire::from_worker(failed));
            }
        }
    }

    fn open(&self, load: Load) -> Result<Loaded, String> {
        let train = (load.spec.kind != RunKind::Eval).then_some(&load.spec.train);
        let describe = |error: EngineError| error.to_string();
        let mut engine =
            Engine::new(&load.spec.model, train, self.device, self.threads).map_err(describe)?;
        match &load.state {
            Fetched::Seed => engine.init(load.spec.train.seed).map_err(describe)?,
            Fetched::Files(files) => {
                let flat = files.read()?;
                let moments = flat.moments.as_ref().filter(|_| train.is_some());
                let moments = moments.map(|(m, v)| (m.as_slice(), v.as_slice()));
                engine.load(&flat.params, moments).map_err(describe)?;
            }
        }
        Ok(Loaded {
            run: load.run,
            spec: load.spec,
            step: load.step,
            engine,
            data: load.data,
            exchange: load.exchange,
            cancelled: load.cancelled,
            own_root: None,
            pushed: Vec::new(),
            free: Vec::new(),
            out: self.out.clone(),
        })
    }

    fn work(&mut self, job: Job) {
        let Some(loaded) = &mut self.run else { return };
        let step = loaded.step;
        let done = match job {
            Job::Compute {
                step,
                lanes,
                sole_owner,
            } => loaded.compute(step, &lanes, sole_owner),
            Job::Commit(commit) => loaded.commit(commit),
            Job::Evaluate { step, split, units } => loaded.evaluate(step, split, &units),
            Job::Snapshot(step) => {
                loaded.snapshot(step, &self.client);
                Ok(())
            }
            Job::Load(_) | Job::Unload => unreachable!("handled by the caller"),
        };
        match done {
            Ok(()) => {}
            Err(Stop::Cancelled) => self.run = None,
            Err(Stop::Failed(message)) => {
                error!(step, message, "the run cannot go on");
                let run = loaded.run.clone();
                loaded.say(FromWorker::Failed { run, step, message });
                self.run = None;
            }
        }
    }
}

impl Loaded {
    fn say(&self, message: FromWorker) {
        // A connection that is gone ends the session; nobody waits for the message then.
        let _ = self.out.blocking_send(wire::from_worker(message));
    }

    fn check_cancelled(&self) -> Result<(), Stop> {
        match self.cancelled.load(Ordering::Acquire) {
            true => Err(Stop::Cancelled),
            false => Ok(()),
        }
    }

    fn compute(&mut self, step: Step, lanes: &[Lane], sole_owner: bool) -> Result<(), Stop> {
        if step != self.step + 1 {
            let at = self.step;
            return Err(Stop::Failed(format!("asked for step {step} at step {at}")));
        }
        let tree = Tree::new(self.spec.train.lanes);
        for range in lanes::ranges(lanes) {
            for node in tree.cover(range) {
                let sum = self.node(step, node)?;
                if sole_owner && node == tree.root() {
                    self.own(step, sum);
                } else {
                    let sum = Arc::new(sum);
                    self.pushed.push(sum.clone());
                    self.exchange.push(step, node, sum);
                }
            }
        }
        if let Some(&lane) = lanes.first() {
            self.data.prefetch(&self.spec.train, step, lane);
        }
        Ok(())
    }

    fn own(&mut self, step: Step, root: Vec<f32>) {
        let totals = self.engine.install(|| totals_of(&root));
        self.own_root = Some(root);
        let run = self.run.clone();
        self.say(FromWorker::RootReady { run, step, totals });
    }

    /// The gradient of a node of the tree: its children's sum, left plus right.
    fn node(&mut self, step: Step, node: Node) -> Result<Vec<f32>, Stop> {
        let Some((left, right)) = node.children() else {
            return self.lane(step, node.first);
        };
        let mut sum = self.node(step, left)?;
        let other = self.node(step, right)?;
        self.engine.install(|| add_all(&mut sum, &other));
        self.free.push(other);
        Ok(sum)
    }

    fn lane(&mut self, step: Step, lane: Lane) -> Result<Vec<f32>, Stop> {
        let started = Instant::now();
        let train = &self.spec.train;
        let batches = self.data.lane(train, step, lane)?;
        let mut gradient = self.free.pop().unwrap_or_default();
        gradient.fill(0.0);
        let mut sums = LaneSums::default();
        for ((batch, samples), micro_batch) in batches.iter().zip(0u32..) {
            self.check_cancelled()?;
            let site = Site {
                seed: train.seed,
                step,
                lane,
                micro_batch,
            };
            let found = self.engine.accumulate(batch, site, &mut gradient)?;
            if !found.loss.is_finite() {
                return Err(Stop::Failed(format!(
                    "the loss of lane {lane}, micro-batch {micro_batch} is {} (samples {samples:?} of the training split); lower train.learning_rate, or look at these samples",
                    found.loss
                )));
            }
            sums.loss += found.loss;
            sums.weight += found.weight;
        }
        self.check_finite(lane, &gradient, &batches)?;
        self.say(FromWorker::LaneDone {
            run: self.run.clone(),
            step,
            lane,
            sums,
            micros: started.elapsed().as_micros() as u64,
        });
        Ok(gradient)
    }

    fn check_finite(
        &self,
        lane: Lane,
        gradient: &[f32],
        batches: &[(crate::engine::Batch, Vec<u64>)],
    ) -> Result<(), Stop> {
        use rayon::prelude::*;
        let bad = self.engine.install(|| {
            gradient
                .par_chunks(CHUNK_LEN)
                .position_first(|chunk| !chunk.iter().fold(true, |ok, x| ok & x.is_finite()))
        });
        let Some(chunk) = bad else { return Ok(()) };
        let at = chunk * CHUNK_LEN;
        let tensors = self.engine.layout().tensors();
        let tensor = tensors.iter().find(|t| {
            let range = t.range();
            range.end > at && gradient[range].iter().any(|x| !x.is_finite())
        });
        let name = tensor.map_or("a parameter", |t| t.name.as_str());
        let samples: Vec<u64> = batches.iter().flat_map(|(_, s)| s.clone()).collect();
        Err(Stop::Failed(format!(
            "the gradient of `{name}` in lane {lane} is not finite (samples {samples:?} of the training split); lower train.learning_rate, or look at these samples"
        )))
    }

    fn commit(&mut self, commit: Commit) -> Result<(), Stop> {
        let step = commit.step;
        let root = match self.own_root.take() {
            Some(root) => root,
            None => self.exchange.root(step).ok_or(Stop::Cancelled)?,
        };
        let update = Update {
            step,
            scale: commit.scale,
            learning_rate: commit.learning_rate,
        };
        self.engine.update(&root, update)?;
        self.step = step;
        self.exchange.applied(step);
        self.free.push(root);
        let pushed = self.pushed.drain(..);
        self.free
            .extend(pushed.filter_map(|sum| Arc::try_unwrap(sum).ok()));
        // More would only be needed for a deeper tree than this step had.
        self.free.truncate(4);
        let run = self.run.clone();
        self.say(FromWorker::Applied { run, step });
        Ok(())
    }

    fn evaluate(&mut self, step: Step, split: u32, units: &[u32]) -> Result<(), Stop> {
        for &unit in units {
            self.check_cancelled()?;
            let mut sums = LaneSums::default();
            for batch in self.data.unit(split, unit)? {
                let found = self.engine.score(&batch)?;
                sums.loss += found.loss;
                sums.weight += found.weight;
            }
            let run = self.run.clone();
            self.say(FromWorker::UnitDone {
                run,
                step,
                split,
                unit,
                sums,
            });
        }
        Ok(())
    }

    /// Copies the state and uploads it in the background.
    fn snapshot(&self, step: Step, client: &DataClient) {
        let state = self.engine.snapshot();
        let (pieces, stream) = mpsc::channel(PIECES);
        let run = self.run.as_str().to_owned();
        client
            .runtime()
            .spawn(async move { send_state(run, step, state, pieces).await });
        let client = client.clone();
        client.runtime().clone().spawn(async move {
            if let Err(error) = client.upload(ReceiverStream::new(stream)).await {
                // The coordinator knows: it has the other end of the stream.
                error!(step, error, "a snapshot could not be uploaded");
            }
        });
    }
}

async fn send_state(run: String, step: Step, state: State, out: mpsc::Sender<v1::StatePiece>) {
    use v1::state_piece::Kind;
    let header = Kind::Header(v1::StateHeader { run, step });
    let send = async |kind| out.send(v1::StatePiece { kind: Some(kind) }).await.is_ok();
    if !send(header).await {
        return;
    }
    for buffer in [&state.params, &state.exp_avg, &state.exp_avg_sq] {
        for piece in bytes_of(buffer).chunks(MAX_PIECE) {
            if !send(Kind::Data(Bytes::copy_from_slice(piece))).await {
                return;
            }
        }
    }
}
