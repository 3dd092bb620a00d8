//! The trainer: the one thread that owns the engine. It takes jobs in order, computes lanes and sums them along the
//! reduction tree, and applies commits. No weight changes before a commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use cohort_common::aggregate::totals_of;
use cohort_common::checkpoint::bytes_of;
use cohort_common::cluster::FromWorker;
use cohort_common::cluster::messages::{Commit, LaneSums};
use cohort_common::ids::{Lane, RunId, Step};
use cohort_common::lanes;
use cohort_common::spec::RunSpec;
use cohort_common::tree::{Node, Tree};
use cohort_common::wire::{self, MAX_PIECE};
use cohort_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::error;

use crate::Config;
use crate::data::{DataClient, RunData};
use crate::engine::{DeviceChoice, Engine, State, Update};
use crate::exchange::ExchangeClient;
use crate::lanes::{Stop, Work};
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
        let engine = load.state.engine(&load.spec, self.device, self.threads)?;
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

    fn node(&mut self, step: Step, node: Node) -> Result<Vec<f32>, Stop> {
        let (run, out, cancelled) = (&self.run, &self.out, &self.cancelled);
        let mut work = Work {
            train: &self.spec.train,
            data: &self.data,
            engine: &mut self.engine,
            free: &mut self.free,
            go_on: &|| match cancelled.load(Ordering::Acquire) {
                true => Err(Stop::Cancelled),
                false => Ok(()),
            },
            done: &mut |lane, sums, time| {
                let done = FromWorker::LaneDone {
                    run: run.clone(),
                    step,
                    lane,
                    sums,
                    micros: time.as_micros() as u64,
                };
                // As in `say`.
                let _ = out.blocking_send(wire::from_worker(done));
            },
        };
        work.node(step, node)
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
