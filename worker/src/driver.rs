//! The worker's driver: turns the coordinator's messages into jobs for the trainer thread, in their order, and fetches
//! beforehand whatever a job needs from the network.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use cohort_common::cluster::{EvalSplit, FromWorker, StateSource, ToWorker};
use cohort_common::ids::RunId;
use cohort_common::layout::Layout;
use cohort_common::net::{self, Credentials};
use cohort_common::spec::RunSpec;
use cohort_common::wire;
use cohort_proto::v1;
use tokio::sync::mpsc;

use crate::data::{DataClient, RunData};
use crate::exchange::ExchangeClient;
use crate::trainer::{Job, Load, Trainer};
use crate::{Config, Error, state};

/// Jobs that may wait for the trainer.
const JOBS: usize = 1024;

/// What a session needs to work.
pub struct Driver {
    config: Config,
    credentials: Credentials,
    data: DataClient,
    out: mpsc::Sender<v1::FromWorker>,
    jobs: std::sync::mpsc::SyncSender<Job>,
    trainer: Option<JoinHandle<()>>,
    run: Option<Attached>,
}

/// The run that is loaded or being loaded.
struct Attached {
    run: RunId,
    /// Set when the run is over for this worker: whatever it computes for it can stop.
    cancelled: Arc<AtomicBool>,
    exchange: ExchangeClient,
}

impl Driver {
    /// Starts the trainer thread and opens the connection for data.
    pub async fn start(
        config: Config,
        credentials: Credentials,
        out: mpsc::Sender<v1::FromWorker>,
    ) -> Result<Self, Error> {
        let channel = net::connect(&config.coordinator).await?;
        let data = DataClient::new(channel, credentials.clone());
        let (jobs, queue) = std::sync::mpsc::sync_channel(JOBS);
        let trainer = Trainer::new(&config, out.clone(), data.clone());
        let thread = std::thread::Builder::new()
            .name("trainer".into())
            .spawn(move || trainer.run(queue))
            .expect("a thread can be started");
        Ok(Self {
            config,
            credentials,
            data,
            out,
            jobs,
            trainer: Some(thread),
            run: None,
        })
    }

    /// Carries out one message, or queues it for the trainer.
    pub async fn obey(&mut self, message: ToWorker) {
        match message {
            ToWorker::Load {
                run,
                spec,
                source,
                splits,
            } => {
                self.detach();
                if let Err(error) = self.load(&run, spec, source, &splits).await {
                    self.fail(run, source.step(), error).await;
                }
            }
            ToWorker::Compute {
                run,
                step,
                lanes,
                sole_owner,
                ..
            } if self.has(&run) => self.queue(Job::Compute {
                step,
                lanes,
                sole_owner,
            }),
            ToWorker::Commit { run, commit } if self.has(&run) => self.queue(Job::Commit(commit)),
            ToWorker::Evaluate {
                run,
                step,
                split,
                units,
            } if self.has(&run) => self.queue(Job::Evaluate { step, split, units }),
            ToWorker::Snapshot { run, step } if self.has(&run) => self.queue(Job::Snapshot(step)),
            ToWorker::Unload { run } if self.has(&run) => self.detach(),
            // About a run that is not loaded here any more.
            _ => {}
        }
    }

    fn has(&self, run: &RunId) -> bool {
        self.run.as_ref().is_some_and(|a| a.run == *run)
    }

    /// The queue is far longer than a run can fill it: the coordinator is never more than a step ahead.
    fn queue(&self, job: Job) {
        // A trainer that is gone has said why.
        let _ = self.jobs.send(job);
    }

    fn detach(&mut self) {
        if let Some(attached) = self.run.take() {
            attached.cancelled.store(true, Ordering::Release);
            attached.exchange.close();
            self.queue(Job::Unload);
        }
    }

    async fn load(
        &mut self,
        run: &RunId,
        spec: Arc<RunSpec>,
        source: StateSource,
        splits: &[EvalSplit],
    ) -> Result<(), String> {
        let data = RunData::open(&self.data, &self.config.cache, &spec, splits).await?;
        let state = state::fetch(&self.data, &self.config.cache, run, source).await?;
        let credentials = Credentials {
            run: Some(run.as_str().into()),
            ..self.credentials.clone()
        };
        let channel = net::connect(&self.config.coordinator)
            .await
            .map_err(|error| error.to_string())?;
        let len = Layout::of(&spec.model).len();
        let exchange = ExchangeClient::open(channel, credentials, spec.train.lanes, len).await?;
        let cancelled = Arc::new(AtomicBool::new(false));
        self.run = Some(Attached {
            run: run.clone(),
            cancelled: cancelled.clone(),
            exchange: exchange.clone(),
        });
        self.queue(Job::Load(Box::new(Load {
            run: run.clone(),
            spec,
            step: source.step(),
            state,
            data,
            exchange,
            cancelled,
        })));
        Ok(())
    }

    async fn fail(&self, run: RunId, step: u64, message: String) {
        let message = FromWorker::Failed { run, step, message };
        let _ = self.out.send(wire::from_worker(message)).await;
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.detach();
        let (closed, _) = std::sync::mpsc::sync_channel(1);
        drop(std::mem::replace(&mut self.jobs, closed));
        // The thread ends by itself once it sees that it is cancelled; waiting here would block the runtime.
        drop(self.trainer.take());
    }
}
