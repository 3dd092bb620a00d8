//! The worker's driver: feeds the machine with what the coordinator says and the trainer reports, and carries out its
//! orders. Whatever has to be fetched from the network before a job can begin is fetched beside it, and the jobs that
//! follow wait for it. The driver outlives sessions, and so does the state that the trainer holds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cohort_common::aggregate::Shape;
use cohort_common::cluster::worker::{Order, Report, WorkerEvent, WorkerMachine};
use cohort_common::cluster::{FromWorker, Holding, Keeper, LoadState, Owners};
use cohort_common::figures::Figures;
use cohort_common::ids::{Lane, RunId, Step};
use cohort_common::net::{self, Credentials};
use cohort_common::process;
use cohort_common::security::Whom;
use cohort_common::spec::RunSpec;
use tokio::sync::{mpsc, watch};
use tracing::trace;

use crate::data::{DataClient, RunData};
use crate::exchange::{Entrance, ExchangeClient, Note, Observer, Setup, Sharing};
use crate::figures::Meter;
use crate::trace::Spans;
use crate::trainer::{Job, Load, Signals, Trainer};
use crate::{Config, Error, state};

/// Reports that may wait for the driver; more make the trainer wait.
const REPORTS: usize = 1024;

/// Time between two reports of figures.
const FIGURES: Duration = Duration::from_secs(1);

/// What a session lends to the driver.
pub struct Link {
    /// The worker's name in this session, for people.
    pub name: String,
    /// Where the coordinator is.
    pub coordinator: String,
    /// What calls of this session carry.
    pub credentials: Credentials,
    /// Bulk data.
    pub data: DataClient,
    /// Where an exchange says that it broke.
    pub broken: mpsc::Sender<String>,
}

/// How long a worker without a session waits for parameters that are under way between the workers.
const DETACHED: Duration = Duration::from_secs(3);

/// Something that was fetched, or why not: for a load, of a step.
type Fetch = (u64, Step, Result<Job, String>);

/// The driver.
pub struct Driver {
    config: Config,
    /// Where peers push to this process, if they can.
    entrance: Option<Entrance>,
    machine: WorkerMachine,
    jobs: std::sync::mpsc::Sender<Job>,
    reports: mpsc::Receiver<(u64, Report)>,
    fetched: mpsc::Receiver<Fetch>,
    fetches: mpsc::Sender<Fetch>,
    /// Jobs that wait for what is being fetched.
    waiting: Option<VecDeque<Job>>,
    run: Option<Attached>,
    /// Whether there is none.
    idle: watch::Sender<bool>,
    link: Option<Link>,
    sessions: u64,
    /// The highest generation of a coordinator that it has worked for.
    generation: u64,
    sharing: Sharing,
    meter: Arc<Meter>,
    /// Figures that are to be said.
    figures: Vec<Figures>,
    figures_at: Instant,
}

/// The run that is loaded or being loaded.
struct Attached {
    load: u64,
    run: RunId,
    spec: Arc<RunSpec>,
    signals: Arc<Signals>,
    exchange: Option<ExchangeClient>,
    /// What the exchange tells, that is open or being opened.
    notes: mpsc::Receiver<Note>,
    /// Whether moments are divided among the workers.
    divided: bool,
}

impl Driver {
    /// Starts the trainer's thread.
    pub fn start(config: Config, entrance: Option<Entrance>) -> Self {
        let (jobs, queue) = std::sync::mpsc::channel();
        let (out, reports) = mpsc::channel(REPORTS);
        let (fetches, fetched) = mpsc::channel(4);
        let meter = Arc::<Meter>::default();
        let trainer = Trainer::new(&config, out, meter.clone());
        std::thread::Builder::new()
            .name("trainer".into())
            .spawn(move || trainer.run(queue))
            .expect("a thread can be started");
        Self {
            sharing: Sharing::new(config.shared_memory),
            config,
            entrance,
            machine: WorkerMachine::default(),
            jobs,
            reports,
            fetched,
            fetches,
            waiting: None,
            run: None,
            idle: watch::Sender::new(true),
            link: None,
            sessions: 0,
            generation: 0,
            meter,
            figures: Vec::new(),
            figures_at: Instant::now(),
        }
    }

    /// Waits for the next thing that happens on this side, and takes it in. Says what is to be said.
    pub async fn next(&mut self) -> Vec<FromWorker> {
        tokio::select! {
            report = self.reports.recv() => {
                let (load, report) = report.expect("the trainer lives as long as the driver");
                let mut said = self.did(load, report);
                // What goes out together costs as much as one of them.
                while let Ok((load, report)) = self.reports.try_recv() {
                    said.extend(self.did(load, report));
                }
                said
            }
            fetch = self.fetched.recv() => {
                let (load, step, fetched) = fetch.expect("the sender is right here");
                self.take(load, step, fetched)
            }
            note = next_note(&mut self.run) => self.noted(note),
        }
    }

    fn did(&mut self, load: u64, report: Report) -> Vec<FromWorker> {
        match &report {
            Report::LanesDone { step, lanes, .. } => {
                for (lane, _) in lanes {
                    trace!(step, lane, "computed a lane");
                }
            }
            Report::Applied { step, .. } => trace!(step, "applied"),
            _ => {}
        }
        self.handle(WorkerEvent::Did { load, report })
    }

    /// What an exchange tells of slices.
    fn noted(&mut self, note: Note) -> Vec<FromWorker> {
        let run = self.run.as_ref().expect("its exchange told it");
        match note {
            Note::Report(report) => {
                let load = run.load;
                self.handle(WorkerEvent::Did { load, report })
            }
            // Nothing is lost here, but the run must not go on.
            Note::Mismatch { step, message } => vec![FromWorker::Failed {
                run: run.run.clone(),
                step,
                message,
                only_here: false,
            }],
        }
    }

    /// Takes in an event. Says what is to be said.
    pub fn handle(&mut self, event: WorkerEvent) -> Vec<FromWorker> {
        let orders = self.machine.handle(event);
        self.obey(orders)
    }

    /// Works for this coordinator, unless it has already worked for one that leads after it. A generation of 0 is that of
    /// a coordinator for which none stands by.
    ///
    /// # Errors
    /// If the coordinator should not lead any more, and does not know that yet.
    pub fn heed(&mut self, generation: u64) -> Result<(), Error> {
        if generation > 0 && generation < self.generation {
            return Err(Error::Session(format!(
                "the coordinator has generation {generation}, and this worker has worked for generation {} already; if its \
                 lease was deleted from the store, start this worker again",
                self.generation
            )));
        }
        self.generation = self.generation.max(generation);
        Ok(())
    }

    /// A session is open.
    pub fn up(&mut self, link: Link) -> Vec<FromWorker> {
        self.link = Some(link);
        self.meter.begin();
        self.figures.clear();
        self.figures_at = Instant::now();
        self.handle(WorkerEvent::Up)
    }

    /// The figures that are to be said: about one a second, and those of the moments at which a run came or went.
    pub fn figures(&mut self) -> Vec<Figures> {
        if self.figures_at.elapsed() >= FIGURES {
            self.note_figures();
        }
        std::mem::take(&mut self.figures)
    }

    fn note_figures(&mut self) {
        self.figures_at = Instant::now();
        let run = self.run.as_ref().map(|run| {
            let step = run.signals.committed.load(Ordering::Acquire);
            (run.run.clone(), step)
        });
        self.figures.push(Figures {
            run,
            counters: self.meter.read(),
            usage: process::usage(),
        });
    }

    /// The session has ended. The state stays, unless it was found to be wrong.
    pub async fn down(&mut self, forget: bool) {
        self.link = None;
        self.handle(WorkerEvent::Down);
        if forget {
            let orders = self.machine.forget();
            self.obey(orders);
        }
        let late = tokio::time::sleep(DETACHED);
        tokio::pin!(late);
        while !self.machine.settled() {
            tokio::select! {
                _ = self.next() => {}
                () = &mut late, if self.exchange().is_some() => self.close_exchange(),
            }
        }
    }

    /// What comes by the way to the owners is not wanted any more.
    fn close_exchange(&mut self) {
        if let Some(exchange) = self.run.as_mut().and_then(|run| run.exchange.take()) {
            exchange.close();
        }
    }

    /// Whether there is nothing to train.
    pub fn idle(&self) -> watch::Receiver<bool> {
        self.idle.subscribe()
    }

    /// What the next session presents.
    pub fn holding(&self) -> Option<Holding> {
        self.machine.holding()
    }

    fn obey(&mut self, orders: Vec<Order>) -> Vec<FromWorker> {
        let mut say = Vec::new();
        for order in orders {
            match order {
                Order::Say(message) => say.push(message),
                Order::Load { load, state } => self.load(load, state),
                Order::Attach { step, keeper, .. } => self.attach(step, keeper),
                Order::Compute {
                    step,
                    lanes,
                    owners,
                } => self.compute(step, lanes, &owners),
                Order::Collect { step } => {
                    if let Some(exchange) = self.exchange() {
                        exchange.collect(step);
                    }
                }
                Order::Peers { gone, peers } => {
                    if let Some(exchange) = self.exchange() {
                        exchange.introduce(&gone, peers);
                    }
                }
                Order::Skip { step, lanes } => {
                    if let Some(run) = &self.run {
                        run.signals.skip(step, lanes);
                    }
                }
                Order::Commit(commit) => {
                    if let Some(run) = &self.run {
                        let step = commit.step();
                        run.signals.committed.fetch_max(step, Ordering::AcqRel);
                    }
                    self.queue(Job::Commit(commit));
                }
                Order::Evaluate { step, split, units } => {
                    let session = self.sessions;
                    self.queue(Job::Evaluate {
                        session,
                        step,
                        split,
                        units,
                    });
                }
                Order::Snapshot { step, slices } => {
                    if let Some(link) = &self.link {
                        let client = Box::new(link.data.clone());
                        self.queue(Job::Snapshot {
                            step,
                            slices,
                            client,
                        });
                    }
                }
                Order::Serve { step, chunks } => {
                    if let Some(exchange) = self.exchange() {
                        // The trainer may be waiting for others' parameters; else it hears of it in its turn.
                        exchange.serve(step, chunks);
                        self.queue(Job::Serve);
                    }
                }
                Order::Detach => self.detach(),
                Order::Unload => self.unload(),
            }
        }
        say
    }

    /// The exchange of the run, if it is open.
    fn exchange(&self) -> Option<&ExchangeClient> {
        self.run.as_ref()?.exchange.as_ref()
    }

    fn compute(&mut self, step: Step, lanes: Vec<Lane>, owners: &Owners) {
        if let Some(run) = &self.run {
            run.signals.want(step, &lanes);
        }
        if let Some(exchange) = self.exchange() {
            exchange.own(step, owners);
        }
        self.queue(Job::Compute {
            step,
            lanes,
            sole_owner: *owners == Owners::Alone,
        });
    }

    /// Hands a job to the trainer, or lets it wait behind what is being fetched.
    fn queue(&mut self, job: Job) {
        match &mut self.waiting {
            Some(waiting) => waiting.push_back(job),
            // A trainer that is gone has said why.
            None => drop(self.jobs.send(job)),
        }
    }

    fn detach(&mut self) {
        self.sessions += 1;
        if let Some(run) = &mut self.run {
            run.signals.session.store(self.sessions, Ordering::Release);
            run.notes.close();
            // Where moments are divided, what belongs to a commit is still under way between the workers.
            if !run.divided {
                self.close_exchange();
            }
        }
        // An exchange that is being opened is of a session that has ended; commits behind it are given up.
        for job in self.waiting.take().into_iter().flatten() {
            drop(self.jobs.send(job));
        }
    }

    fn unload(&mut self) {
        if self.run.is_some() {
            // What was done in the run up to now,
            self.note_figures();
        }
        if let Some(run) = self.run.take() {
            // and that nothing more will be.
            self.note_figures();
            run.signals.cancelled.store(true, Ordering::Release);
            if let Some(exchange) = run.exchange {
                exchange.close();
            }
        }
        self.idle.send_replace(true);
        self.waiting = None;
        drop(self.jobs.send(Job::Unload));
    }

    /// Carries out [`Order::Load`].
    fn load(&mut self, load: u64, state: LoadState) {
        self.close_exchange();
        let LoadState {
            run,
            spec,
            source,
            splits,
            keeper,
            lanes_stay,
        } = state;
        let Some(link) = &self.link else { return };
        let signals = Arc::new(Signals::default());
        signals.session.store(self.sessions, Ordering::Release);
        signals.reset(source.step());
        let (data, cache) = (link.data.clone(), self.config.cache.clone());
        let (opening, notes) = self.opening(&run, &spec, source.step(), keeper.clone());
        self.run = Some(Attached {
            load,
            run: run.clone(),
            spec: spec.clone(),
            signals: signals.clone(),
            exchange: None,
            notes,
            divided: keeper.is_some(),
        });
        self.idle.send_replace(false);
        self.waiting = Some(VecDeque::new());
        self.note_figures();
        let meter = self.meter.clone();
        let step = source.step();
        let fetches = self.fetches.clone();
        tokio::spawn(async move {
            let fetch = async {
                // Subscribed first: no root is missed while the state is on its way.
                let exchange = opening.await?;
                Ok(Job::Load(Box::new(Load {
                    load,
                    data: RunData::open(&data, &cache, &spec, &splits, meter).await?,
                    state: state::fetch(&data, &cache, &run, source).await?,
                    run,
                    spec,
                    step,
                    exchange,
                    signals,
                    keeper,
                    lanes_stay,
                })))
            };
            let _ = fetches.send((load, step, fetch.await)).await;
        });
    }

    /// Keeps the run; only the way to the owners is opened anew.
    fn attach(&mut self, step: Step, keeper: Option<Keeper>) {
        self.close_exchange();
        let Some(run) = &self.run else { return };
        run.signals.reset(step);
        let load = run.load;
        let (name, spec) = (run.run.clone(), run.spec.clone());
        let (opening, notes) = self.opening(&name, &spec, step, keeper);
        if let Some(run) = &mut self.run {
            run.notes = notes;
        }
        self.waiting = Some(VecDeque::new());
        let fetches = self.fetches.clone();
        tokio::spawn(async move {
            let opened = opening.await.map(Job::Attach);
            let _ = fetches.send((load, step, opened)).await;
        });
    }

    /// Opens an exchange. What an earlier one has still to tell nobody hears.
    fn opening(
        &self,
        run: &RunId,
        spec: &RunSpec,
        after: Step,
        keeper: Option<Keeper>,
    ) -> (
        impl Future<Output = Result<ExchangeClient, String>> + Send + use<>,
        mpsc::Receiver<Note>,
    ) {
        let link = self.link.as_ref().expect("a session is open");
        let credentials = Credentials {
            run: Some(run.as_str().into()),
            ..link.credentials.clone()
        };
        let broken = link.broken.clone();
        let url = link.coordinator.clone();
        let sharing = self.sharing.clone();
        let observer = Observer {
            meter: self.meter.clone(),
            spans: Spans::new(&self.config.traces, run, link.name.clone()),
        };
        let shape = Shape {
            lanes: spec.train.lanes,
            len: spec.gradient_len(),
            payload: spec.train.payload,
            seed: spec.train.seed,
        };
        let entrance = self.entrance.clone();
        let (notes, told) = mpsc::channel(REPORTS);
        let opening = async move {
            let channel = net::connect(&url, credentials.trust.as_ref(), Whom::Coordinator).await;
            let channel = channel.map_err(|error| error.to_string())?;
            let setup = Setup {
                channel,
                credentials,
                shape,
                after,
                sharing,
                observer,
                broken,
                entrance,
                notes,
                keeper,
            };
            ExchangeClient::open(setup).await
        };
        (opening, told)
    }

    /// What was fetched goes to the trainer, and what waited for it follows.
    fn take(&mut self, load: u64, step: Step, fetched: Result<Job, String>) -> Vec<FromWorker> {
        let current = self.run.as_ref().is_some_and(|r| r.load == load);
        let Some(waiting) = self.waiting.take_if(|_| current) else {
            // Of a session or a run that has ended.
            if let Ok(Job::Attach(exchange)) = fetched {
                exchange.close();
            }
            return Vec::new();
        };
        match fetched {
            Ok(job) => {
                let exchange = match &job {
                    Job::Load(load) => load.exchange.clone(),
                    Job::Attach(exchange) => exchange.clone(),
                    _ => unreachable!("only these are fetched"),
                };
                if let Some(run) = &mut self.run {
                    run.exchange = Some(exchange);
                }
                for job in std::iter::once(job).chain(waiting) {
                    drop(self.jobs.send(job));
                }
                Vec::new()
            }
            Err(message) => {
                let report = Report::Failed {
                    step,
                    message,
                    only_here: true,
                };
                self.handle(WorkerEvent::Did { load, report })
            }
        }
    }
}

/// The next that the exchange of a run tells. Never ends where there is none.
async fn next_note(run: &mut Option<Attached>) -> Note {
    let note = match run {
        Some(run) => run.notes.recv().await,
        None => None,
    };
    match note {
        Some(note) => note,
        None => std::future::pending().await,
    }
}

/// Why a session ended, and whether what the worker holds may be brought along.
pub struct Ended {
    /// Why.
    pub error: Error,
    /// Whether the state was found to be wrong.
    pub forget: bool,
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self {
            error,
            forget: false,
        }
    }
}
