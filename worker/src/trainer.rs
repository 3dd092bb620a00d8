//! The trainer: the one thread that owns the engine. It takes jobs in order, computes lanes and sums them along the
//! reduction tree, and applies commits. No weight changes before a commit, but in a lane's round, which puts them back. What it has
//! computed for the next step stays until the commit, so that it can be delivered again in another session.

mod divided;
mod listening;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use cohort_common::checkpoint::bytes_of;
use cohort_common::cluster::Keeper;
use cohort_common::cluster::messages::{Commit, Found, LaneSums};
use cohort_common::cluster::worker::Report;
use cohort_common::ids::{Lane, RunId, Step};
use cohort_common::lanes;
use cohort_common::layout::chunks_range;
use cohort_common::spec::{Payload, RunSpec};
use cohort_common::tree::{Node, Tree};
use cohort_common::wire::MAX_PIECE;
use cohort_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::error;

use crate::Config;
use crate::data::{DataClient, RunData, Unit};
use crate::engine::{DeviceChoice, Engine, Gradient, State, Update};
use crate::evaluation;
use crate::exchange::{ExchangeClient, Root};
use crate::figures::{Doing, Meter};
use crate::kept::{self, Kept};
use crate::lanes::{Hooks, Stop, Work};
use crate::state::Fetched;
use divided::kept_error;
use listening::{Listener, Staying};

/// Pieces of a snapshot that wait for the connection.
const PIECES: usize = 4;

/// What the trainer is told.
pub enum Job {
    /// Get a run into memory.
    Load(Box<Load>),
    /// Keep the run, and go on with this exchange.
    Attach(ExchangeClient),
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
    /// Score units of a split, or write after its prompts.
    Evaluate {
        /// The session that wants it.
        session: u64,
        /// The state's step.
        step: Step,
        /// The split.
        split: u32,
        /// The units, ascending.
        units: Vec<u32>,
    },
    /// Copy the state of this step and upload it.
    Snapshot {
        /// The step.
        step: Step,
        /// Where moments are divided: these slices of it.
        slices: Option<Vec<Range<u32>>>,
        /// Where to.
        client: Box<DataClient>,
    },
    /// Send what the exchange was asked to serve.
    Serve,
    /// Forget the run.
    Unload,
}

/// A run to load.
pub struct Load {
    /// Tells the reports about this state from those about an earlier one.
    pub load: u64,
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
    /// What the driver wants at once, before the jobs in the queue are done.
    pub signals: Arc<Signals>,
    /// Which moments are kept here, if not all.
    pub keeper: Option<Keeper>,
    /// Whether what is computed for the next step stays.
    pub lanes_stay: bool,
}

/// What the driver says past the queue.
#[derive(Default)]
pub struct Signals {
    /// The run is over here.
    pub cancelled: AtomicBool,
    /// Steps up to here are committed: their lanes need not be computed any more.
    pub committed: AtomicU64,
    /// Counts sessions: what an earlier one wanted scored nobody waits for.
    pub session: AtomicU64,
    skipped: Mutex<BTreeSet<(Step, Lane)>>,
}

impl Signals {
    /// Others have computed these lanes.
    pub fn skip(&self, step: Step, lanes: impl IntoIterator<Item = Lane>) {
        self.skipped().extend(lanes.into_iter().map(|l| (step, l)));
    }

    /// These lanes are wanted here after all.
    pub fn want(&self, step: Step, lanes: &[Lane]) {
        self.skipped()
            .retain(|(s, lane)| *s != step || !lanes.contains(lane));
    }

    /// What was said about steps after this one counts no more.
    pub fn reset(&self, step: Step) {
        self.committed.store(step, Ordering::Release);
        self.skipped().clear();
    }

    fn forget(&self, step: Step) {
        self.skipped().retain(|(s, _)| *s > step);
    }

    fn skips(&self, step: Step, lane: Lane) -> bool {
        self.skipped().contains(&(step, lane))
    }

    fn skipped(&self) -> MutexGuard<'_, BTreeSet<(Step, Lane)>> {
        self.skipped.lock().expect("no panic under this lock")
    }
}

/// The way back to the driver: a report, and the load that it is about.
pub type Reports = mpsc::Sender<(u64, Report)>;

/// The thread's state.
pub struct Trainer {
    device: DeviceChoice,
    threads: usize,
    /// Where files may be kept.
    cache: PathBuf,
    out: Reports,
    meter: Arc<Meter>,
    run: Option<Loaded>,
}

/// The run in memory.
struct Loaded {
    load: u64,
    run: RunId,
    spec: Arc<RunSpec>,
    step: Step,
    engine: Engine,
    /// The moments that are kept here, if they are divided.
    kept: Option<Kept>,
    data: RunData,
    exchange: ExchangeClient,
    signals: Arc<Signals>,
    /// The root of the next step, if this worker owns it alone.
    own_root: Option<Arc<Gradient>>,
    computed: Computed,
    /// Buffers of one gradient each, to be used again.
    free: Vec<Gradient>,
    /// Whether others read the nodes of the next step.
    lends: bool,
    /// The root of the next step, if it stays here.
    staying: Staying,
    out: Reports,
}

/// What there is of the next step.
#[derive(Default)]
struct Computed {
    nodes: Vec<(Node, Arc<Gradient>)>,
    lanes: BTreeMap<Lane, (LaneSums, u64)>,
}

impl Trainer {
    /// A trainer without a run.
    pub fn new(config: &Config, out: Reports, meter: Arc<Meter>) -> Self {
        Self {
            device: config.device,
            threads: config.threads,
            cache: config.cache.clone(),
            out,
            meter,
            run: None,
        }
    }

    /// Takes jobs until there are no more.
    pub fn run(mut self, jobs: Receiver<Job>) {
        for job in jobs {
            self.meter.switch(Doing::Computing);
            match job {
                Job::Load(load) => self.load(*load),
                Job::Unload => self.run = None,
                job => self.work(job),
            }
            self.meter.switch(Doing::Nothing);
        }
    }

    fn fail(&mut self, step: Step, message: String, only_here: bool) {
        error!(step, message, "the run cannot go on here");
        if let Some(loaded) = self.run.take() {
            loaded.say(Report::Failed {
                step,
                message,
                only_here,
            });
        }
    }

    fn load(&mut self, load: Load) {
        let same = |before: &Loaded| {
            load.lanes_stay && (&before.run, before.step) == (&load.run, load.step)
        };
        let before = self.run.take().filter(same);
        let computed = before.map(|before| before.computed).unwrap_or_default();
        let (number, step) = (load.load, load.step);
        let opened = self.open(load, computed).and_then(|mut loaded| {
            loaded.say_loaded()?;
            Ok(loaded)
        });
        match opened {
            Ok(loaded) => self.run = Some(loaded),
            Err(message) => {
                let failed = Report::Failed {
                    step,
                    message,
                    only_here: true,
                };
                let _ = self.out.blocking_send((number, failed));
            }
        }
    }

    fn open(&self, load: Load, computed: Computed) -> Result<Loaded, String> {
        let (device, threads) = (self.device, self.threads);
        let (engine, kept) = match &load.keeper {
            None => (load.state.engine(&load.spec, device, threads)?, None),
            Some(keeper) => {
                let len = load.spec.layout().len();
                let stretches = kept::elements(keeper, len);
                let state = load.state.divided(&load.spec, device, threads, &stretches);
                let (engine, moments) = state?;
                let kept = Kept::new(keeper, len, moments, &self.cache);
                (engine, Some(kept.map_err(|error| kept_error(&error))?))
            }
        };
        Ok(Loaded {
            load: load.load,
            run: load.run,
            spec: load.spec,
            step: load.step,
            engine,
            kept,
            data: load.data,
            exchange: load.exchange,
            signals: load.signals,
            own_root: None,
            computed,
            free: Vec::new(),
            lends: false,
            staying: Staying::default(),
            out: self.out.clone(),
        })
    }

    fn work(&mut self, job: Job) {
        let Some(loaded) = &mut self.run else { return };
        let step = loaded.step;
        let done = match job {
            Job::Attach(exchange) => {
                loaded.exchange = exchange;
                loaded.say_loaded().map_err(Stop::Unable)
            }
            Job::Compute {
                step,
                lanes,
                sole_owner,
            } => loaded.compute(step, &lanes, sole_owner),
            Job::Commit(commit) => loaded.commit(&commit),
            Job::Evaluate {
                session,
                step,
                split,
                units,
            } => loaded.evaluate(session, step, split, &units),
            Job::Snapshot {
                step,
                slices,
                client,
            } => loaded.snapshot(step, slices, &client),
            Job::Serve => {
                loaded.serve();
                Ok(())
            }
            Job::Load(_) | Job::Unload => unreachable!("handled by the caller"),
        };
        match done {
            Ok(()) | Err(Stop::Obsolete) => {}
            Err(Stop::Cancelled) => self.run = None,
            Err(Stop::Failed(message)) => self.fail(step, message, false),
            Err(Stop::Unable(message)) => self.fail(step, message, true),
        }
    }
}

impl Loaded {
    fn say(&self, report: Report) {
        // A driver that is gone ends the process.
        let _ = self.out.blocking_send((self.load, report));
    }

    fn say_loaded(&mut self) -> Result<(), String> {
        let state_hash = self.hash()?;
        self.say(Report::Loaded {
            step: self.step,
            state_hash,
        });
        Ok(())
    }

    /// The hash of the state. Where moments are divided there is none: what there is of it is told.
    fn hash(&mut self) -> Result<Option<[u8; 32]>, String> {
        let Some(kept) = &mut self.kept else {
            return Ok(self.engine.state_hash());
        };
        let digests = kept.digests(&self.engine).map_err(|e| kept_error(&e))?;
        let step = self.step;
        self.say(Report::Digested { step, digests });
        Ok(None)
    }

    fn compute(&mut self, step: Step, lanes: &[Lane], sole_owner: bool) -> Result<(), Stop> {
        if step != self.step + 1 {
            // A session that has ended wanted it.
            return Ok(());
        }
        self.lends = !sole_owner;
        let suits = |free: &Gradient| match self.lends {
            true => self.exchange.suits(free),
            false => free.slot().is_none(),
        };
        self.free.retain(suits);
        let tree = Tree::new(self.spec.train.lanes);
        for range in lanes::ranges(lanes) {
            for node in tree.cover(range) {
                let stays = sole_owner && node == tree.root();
                if let Some(sum) = self.node(step, node, stays)? {
                    match stays {
                        true => self.own(step, sum),
                        false => self.exchange.push(step, node, sum),
                    }
                }
            }
        }
        if let Some(&lane) = lanes.first() {
            self.data.prefetch(&self.spec.train, step, lane);
        }
        Ok(())
    }

    fn own(&mut self, step: Step, root: Arc<Gradient>) {
        let Staying { found, digests } = std::mem::take(&mut self.staying);
        let totals = match digests.known(root.len()) == root.len() {
            true => digests.totals(&root),
            false => self.engine.install(|| digests.totals(&root)),
        };
        self.own_root = Some(root);
        if let Some(found) = found {
            self.say(found);
        }
        self.say(Report::RootReady { step, totals });
    }

    /// The sum of a node, computed or kept from before. Where it stays here, what its lanes have found may not be said yet.
    fn node(&mut self, step: Step, node: Node, stays: bool) -> Result<Option<Arc<Gradient>>, Stop> {
        self.staying = Staying::default();
        let mut listener = Listener {
            load: self.load,
            step,
            out: &self.out,
            signals: &self.signals,
            computed: &mut self.computed,
            exchange: &self.exchange,
            node,
            lends: self.lends,
            staying: stays.then_some(&mut self.staying),
            rounds: self.spec.train.payload != Payload::F32,
            tokens: self.spec.tokens_per_step() / u64::from(self.spec.train.lanes),
        };
        listener.go_on()?;
        if let Some((_, sum)) = listener.computed.nodes.iter().find(|(n, _)| *n == node) {
            let sum = sum.clone();
            listener.say_lanes(node);
            return Ok(Some(sum));
        }
        let mut work = Work {
            train: &self.spec.train,
            tolerant: self.spec.skips(),
            data: &self.data,
            engine: &mut self.engine,
            free: &mut self.free,
            hooks: &mut listener,
        };
        let Some(sum) = work.node(step, node)? else {
            return Ok(None);
        };
        let sum = Arc::new(sum);
        self.computed.nodes.push((node, sum.clone()));
        Ok(Some(sum))
    }

    fn commit(&mut self, commit: &Commit) -> Result<(), Stop> {
        if self.kept.is_some() {
            return self.commit_kept(commit);
        }
        let step = commit.step();
        let own = self.own_root.take();
        let observer = self.exchange.observer();
        let meter = &observer.meter;
        let root = match (self.step + 1 == step, own) {
            (false, _) => None,
            (true, Some(root)) => Some(Root::Own(root)),
            (true, None) => meter.during(Doing::Nothing, || self.exchange.root(step)),
        };
        let Some(root) = root else {
            // The session ended before the root was here. The next one brings it again.
            self.say(Report::GaveUp { step });
            return Ok(());
        };
        let span = observer.spans.begin(step);
        if !commit.proof.skipped {
            self.engine.update(&root, update_of(commit))?;
        }
        meter.updated();
        if let Some(span) = span {
            span.end("update");
        }
        let own = match root {
            Root::Own(root) => Some(root),
            root => {
                self.exchange.reuse(root);
                None
            }
        };
        self.applied(commit, own)
    }

    /// The state has seen a commit.
    fn applied(&mut self, commit: &Commit, own: Option<Arc<Gradient>>) -> Result<(), Stop> {
        let step = commit.step();
        self.step = step;
        self.exchange.applied(step);
        self.signals.forget(step);
        let state_hash = match commit.hash_state {
            true => self.hash()?,
            false => None,
        };
        self.say(Report::Applied { step, state_hash });
        let computed = std::mem::take(&mut self.computed).nodes;
        let buffers = computed.into_iter().map(|(_, sum)| sum).chain(own);
        let own = buffers.filter_map(|sum| Arc::try_unwrap(sum).ok());
        self.free.extend(own.filter(Gradient::can_be_used_again));
        // More would only be needed for a deeper tree than this step had.
        self.free.truncate(4);
        Ok(())
    }

    fn evaluate(
        &mut self,
        session: u64,
        step: Step,
        split: u32,
        units: &[u32],
    ) -> Result<(), Stop> {
        for &unit in units {
            wanted(&self.signals, session)?;
            if step != self.step {
                return Err(Stop::Obsolete);
            }
            let found = match self.data.unit(split, unit)? {
                Unit::Score(batches) => {
                    Found::Scores(evaluation::score(&mut self.engine, &batches)?)
                }
                Unit::Write(prompt, ends) => {
                    let config = self.spec.samples.as_ref();
                    let config = config.ok_or_else(|| "this run has no prompts".to_owned())?;
                    let seed = evaluation::seed_of(self.spec.train.seed, step, unit);
                    let mut go_on = || wanted(&self.signals, session);
                    let engine = &mut self.engine;
                    let written =
                        evaluation::write(engine, config, seed, prompt, ends, &mut go_on)?;
                    Found::Written(written)
                }
            };
            self.say(Report::UnitDone {
                step,
                split,
                unit,
                found,
            });
        }
        Ok(())
    }

    /// Copies the state, or slices of it, and uploads them in the background.
    fn snapshot(
        &mut self,
        step: Step,
        slices: Option<Vec<Range<u32>>>,
        client: &DataClient,
    ) -> Result<(), Stop> {
        if step != self.step {
            // The commit before it was given up with its session.
            return Ok(());
        }
        let Some(slices) = slices else {
            self.upload(None, self.engine.snapshot(), client);
            return Ok(());
        };
        self.hash()?;
        let Some(kept) = &mut self.kept else {
            return Ok(());
        };
        let len = self.engine.params().len();
        let mut copies = Vec::new();
        for chunks in slices {
            let Some(slice) = chunks_range(&chunks, len) else {
                continue;
            };
            let copy = kept.copy(&self.engine, &slice);
            let copy = copy.map_err(|error| kept_error(&error))?;
            copies.extend(copy.map(|state| (chunks, state)));
        }
        for (chunks, state) in copies {
            self.upload(Some(chunks), state, client);
        }
        Ok(())
    }

    fn upload(&self, slice: Option<Range<u32>>, state: State, client: &DataClient) {
        let step = self.step;
        let (pieces, stream) = mpsc::channel(PIECES);
        let slice = slice.unwrap_or_default();
        let header = v1::StateHeader {
            run: self.run.as_str().to_owned(),
            step,
            first: slice.start,
            below: slice.end,
        };
        client
            .runtime()
            .spawn(async move { send_state(header, state, pieces).await });
        let client = client.clone();
        let (out, load) = (self.out.clone(), self.load);
        client.runtime().clone().spawn(async move {
            if let Err(error) = client.upload(ReceiverStream::new(stream)).await {
                error!(step, error, "a snapshot could not be uploaded");
                // The coordinator may not even have seen its beginning.
                let _ = out.send((load, Report::SnapshotLost { step })).await;
            }
        });
    }
}

/// How a commit is applied.
fn update_of(commit: &Commit) -> Update {
    Update {
        step: commit.step(),
        count: commit.updates,
        scale: commit.scale,
        learning_rate: commit.proof.learning_rate,
    }
}

/// Whether a session still waits for its units.
fn wanted(signals: &Signals, session: u64) -> Result<(), Stop> {
    if signals.cancelled.load(Ordering::Acquire) {
        return Err(Stop::Cancelled);
    }
    match signals.session.load(Ordering::Acquire) == session {
        true => Ok(()),
        false => Err(Stop::Obsolete),
    }
}

async fn send_state(header: v1::StateHeader, state: State, out: mpsc::Sender<v1::StatePiece>) {
    use v1::state_piece::Kind;
    let header = Kind::Header(header);
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
