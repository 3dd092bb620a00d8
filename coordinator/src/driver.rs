//! The driver: one task owns the cluster's machine, feeds it events and carries out its actions. Whatever waits (disk,
//! network) happens elsewhere and comes back as an event.

mod cluster;
mod describe;
mod host;

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use cohort_common::aggregate::Shape;
use cohort_common::api::{ClusterInfo, ClusterView, SystemView};
use cohort_common::checkpoint::CheckpointMeta;
use cohort_common::cluster::events::{LeftReason, MemberInfo};
use cohort_common::cluster::{Action, Event, Holding, Machine, ToWorker};
use cohort_common::figures::Figures;
use cohort_common::home::RunName;
use cohort_common::ids::{RunId, SessionId, Step};
use cohort_common::wire;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;
use tracing::{error, info, warn};

use crate::figures::{Book, TimesDue};
use crate::record::{CheckpointDone, RunRecord};
use crate::trace::StepSpans;

pub use cluster::{Cluster, Counts};

/// Events that may wait for the driver; more make their senders wait.
const QUEUE: usize = 1024;

/// Messages that may wait for one worker. A worker that lets more pile up is lost.
const OUTBOX: usize = 256;

/// The way to a worker: encoded messages, and at last the reason why there will be no more.
pub type Outbox = mpsc::Receiver<Result<Bytes, Status>>;

/// What the driver is asked.
pub enum Command {
    /// Something happened.
    Event(Event),
    /// A worker asks to join; the answer is its session and its messages.
    Join {
        /// What it says of itself.
        info: MemberInfo,
        /// Floating-point operations a second of its processor, if it has measured.
        peak_flops: Option<f64>,
        /// What it still has in memory.
        holding: Option<Holding>,
        /// Where the answer goes.
        reply: oneshot::Sender<(SessionId, Outbox)>,
    },
    /// A worker says what it did with its time.
    Figures {
        /// Who.
        session: SessionId,
        /// What.
        figures: Figures,
    },
    /// A run is queued, with what is needed to record it.
    Submit(Box<RunRecord>),
    /// What a checkpoint of this run at this step holds besides the state.
    CheckpointMeta {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// Where the answer goes; `None` if no such checkpoint is expected.
        reply: oneshot::Sender<Option<CheckpointMeta>>,
    },
    /// A checkpoint is durable.
    CheckpointDone(Box<CheckpointDone>),
    /// How the cluster is.
    Describe(oneshot::Sender<ClusterInfo>),
    /// A run is to be checkpointed and to go on.
    Checkpoint {
        /// The run.
        run: RunId,
        /// Where the answer goes: the step of its state now; `None` if it neither trains nor waits for workers.
        reply: oneshot::Sender<Option<Step>>,
    },
    /// What a person sees of the cluster.
    View(oneshot::Sender<ClusterView>),
    /// A run is to be checkpointed and to rest until it is resumed.
    Pause {
        /// The run.
        run: RunId,
        /// Where the answer goes: whether the run trains or waits here.
        reply: oneshot::Sender<bool>,
    },
}

/// Milliseconds since the epoch, for records that people read.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |t| t.as_millis() as u64)
}

struct Driver {
    cluster: Cluster,
    machine: Machine,
    tick: Duration,
    outboxes: HashMap<SessionId, mpsc::Sender<Result<Bytes, Status>>>,
    runs: HashMap<RunId, RunRecord>,
    started: Instant,
    started_ms: u64,
    joined_ms: HashMap<SessionId, u64>,
    figures: Book,
    system: watch::Receiver<SystemView>,
    spans: StepSpans,
    next_session: u64,
    /// It may not lead any more: nothing is told to anybody.
    fenced: bool,
}

impl Driver {
    /// Until nobody has anything to say any more, or this process may not lead.
    async fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        let mut tick = tokio::time::interval(self.tick);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let command = tokio::select! {
                command = queue.recv() => match command {
                    Some(command) => command,
                    None => return,
                },
                _ = tick.tick() => {
                    let heard = self.cluster.take_heard();
                    self.handle(Event::Heard(heard)).await;
                    Command::Event(Event::Tick)
                }
            };
            self.fenced |= !self.cluster.may_commit();
            if self.fenced {
                return;
            }
            self.obey(command).await;
        }
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Event(event) => self.handle(event).await,
            Command::Join {
                info,
                peak_flops,
                holding,
                reply,
            } => self.join(info, peak_flops, holding, reply).await,
            Command::Figures { session, figures } => {
                let due = self.figures.heard(session, figures, Instant::now());
                self.write_times(due).await;
            }
            Command::Submit(record) => {
                let plan = record.plan.clone();
                self.runs.insert(plan.run.clone(), *record);
                self.handle(Event::Submitted(plan)).await;
            }
            Command::CheckpointMeta { run, step, reply } => {
                let meta = self.runs.get(&run).and_then(|r| r.checkpoint_meta(step));
                let _ = reply.send(meta);
            }
            Command::CheckpointDone(done) => {
                let (run, step) = (done.run.clone(), done.info.step);
                let state_hash = done.state_hash;
                let wanted = self.machine.is_writing(&run, step);
                if let Some(record) = self.runs.get_mut(&run) {
                    record.written.insert(step, done.info);
                    if !wanted && record.checkpoints.iter().all(|c| c.step != step) {
                        // It came too late: nobody vouches for it any more.
                        record.drop_checkpoint(&self.cluster, step);
                    }
                }
                self.handle(Event::CheckpointWritten {
                    run,
                    step,
                    state_hash,
                })
                .await;
            }
            Command::Describe(reply) => {
                let _ = reply.send(self.describe());
            }
            Command::Checkpoint { run, reply } => {
                let _ = reply.send(self.machine.step_of(&run));
                self.handle(Event::CheckpointRequested(run)).await;
            }
            Command::View(reply) => {
                let _ = reply.send(self.view());
            }
            Command::Pause { run, reply } => {
                let record = self.runs.get_mut(&run);
                let _ = reply.send(record.is_some());
                if let Some(record) = record {
                    record.pausing = true;
                    self.handle(Event::StopRequested(run)).await;
                }
            }
        }
    }

    async fn join(
        &mut self,
        info: MemberInfo,
        peak_flops: Option<f64>,
        holding: Option<Holding>,
        reply: oneshot::Sender<(SessionId, Outbox)>,
    ) {
        let session = SessionId(self.next_session);
        self.next_session += 1;
        let (sender, outbox) = mpsc::channel(OUTBOX);
        info!(worker = %session, host = info.host, device = info.device, threads = info.threads, "joined");
        self.outboxes.insert(session, sender);
        self.joined_ms.insert(session, now_ms());
        self.figures
            .joined(session, &info, peak_flops, Instant::now());
        self.cluster.sessions().insert(session);
        if reply.send((session, outbox)).is_ok() {
            self.handle(Event::Joined {
                session,
                info,
                holding,
            })
            .await;
        } else {
            self.forget(session).await;
        }
    }

    /// Writes down how workers' time went. A row that cannot be written is lost, and nothing else.
    async fn write_times(&self, due: impl IntoIterator<Item = TimesDue>) {
        for TimesDue { run, row } in due {
            let Ok(name) = RunName::new(run.as_str()) else {
                continue;
            };
            let write = self
                .cluster
                .store()
                .submit(move |store| store.record_worker_times(&name, &row));
            drop(write.await);
        }
    }

    async fn forget(&mut self, session: SessionId) {
        let due = self.figures.left(session, Instant::now());
        self.write_times(due).await;
        self.outboxes.remove(&session);
        self.joined_ms.remove(&session);
        self.cluster.sessions().remove(&session);
        self.cluster.exchange().forget(session);
    }

    async fn handle(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            if let Event::Left { session, .. } = &event {
                self.forget(*session).await;
            }
            self.spans.event();
            if let Event::RootComplete { run, step, .. } = &event {
                let began = || self.cluster.exchange().began(run, *step);
                self.spans.summed(run, *step, began);
            }
            let now = self.started.elapsed().as_millis() as u64;
            for action in self.machine.handle(now, event) {
                events.extend(self.act(action).await);
            }
        }
    }

    /// Carries out one action. Gives the events that follow from it.
    async fn act(&mut self, action: Action) -> Vec<Event> {
        match action {
            Action::Send { session, message } => self.send(&[session], message).await,
            Action::SendAll { sessions, message } => self.send(&sessions, message).await,
            action => self.carry_out(action).await.into_iter().collect(),
        }
    }

    /// Carries out an action that is no message.
    async fn carry_out(&mut self, action: Action) -> Option<Event> {
        if let Some((run, step)) = action.progress() {
            self.cluster.notices().progress(run.as_str(), step);
        }
        match action {
            Action::Send { .. } | Action::SendAll { .. } => unreachable!("handled by the caller"),
            Action::Close { session, reason } => {
                warn!(worker = %session, %reason, "session closed");
                if let Some(outbox) = self.outboxes.get(&session) {
                    let text = format!("the coordinator ended this session: {reason}");
                    let status = match reason {
                        // A worker of other numerics need not come back,
                        LeftReason::Fingerprint { .. } => Status::failed_precondition(text),
                        // one that was asked to go may,
                        LeftReason::Farewell => Status::cancelled(text),
                        // and one whose state is wrong must not bring it along.
                        LeftReason::Deviated { .. } => Status::data_loss(text),
                        _ => Status::aborted(text),
                    };
                    let _ = outbox.try_send(Err(status));
                }
                self.forget(session).await;
                None
            }
            Action::OpenStep { run, step } => {
                let spec = &self.runs.get(&run)?.plan.spec;
                let shape = Shape {
                    lanes: spec.train.lanes,
                    len: spec.gradient_len(),
                    payload: spec.train.payload,
                    seed: spec.train.seed,
                };
                let all = 0..shape.chunks();
                self.cluster.exchange().open(&run, step, shape, all);
                None
            }
            Action::ReleaseRoots { run, through } => {
                self.cluster.exchange().release(&run, through);
                None
            }
            Action::Committed(step) => {
                let trace = self.spans.committed(&step);
                let record = self.runs.get_mut(&step.run)?;
                record.committed(&self.cluster, &step, trace).await
            }
            Action::Assigned {
                run,
                step,
                generation,
                lanes,
            } => {
                let peak = self.figures.peak_of(lanes.iter().map(|(s, _)| *s));
                let record = self.runs.get_mut(&run)?;
                record.peak_flops = peak;
                record
                    .assigned(&self.cluster, step, generation, lanes)
                    .await;
                None
            }
            Action::Withdraw { run, after } => {
                let record = self.runs.get_mut(&run)?;
                record.withdraw(&self.cluster, after).await
            }
            Action::CheckpointGood { run, step } => {
                let record = self.runs.get_mut(&run)?;
                record.checkpoint_good(&self.cluster, step).await;
                None
            }
            Action::DropCheckpoint { run, step } => {
                let record = self.runs.get_mut(&run)?;
                record.drop_checkpoint(&self.cluster, step);
                None
            }
            Action::Happened { run, what } => {
                let record = self.runs.get(&run)?;
                info!(%run, ?what, "about a worker");
                record.happened(&self.cluster, what).await;
                None
            }
            Action::Evaluated {
                run,
                step,
                split,
                scores,
            } => {
                let record = self.runs.get_mut(&run)?;
                record.evaluated(&self.cluster, step, split, scores).await
            }
            Action::Sampled { run, step, written } => {
                let record = self.runs.get(&run)?;
                record.sampled(&self.cluster, step, &written).await;
                None
            }
            Action::Unusual { run, anomaly } => {
                let record = self.runs.get(&run)?;
                record.unusual(&self.cluster, &anomaly).await;
                None
            }
            Action::Changed { run, change } => {
                info!(%run, ?change, "run changed");
                if change.rests() {
                    let due = self.figures.rests(&run, Instant::now());
                    self.write_times(due).await;
                }
                let record = self.runs.get_mut(&run)?;
                if record.changed(&self.cluster, change).await {
                    self.runs.remove(&run);
                }
                None
            }
            Action::Note { run, text } => {
                info!(run = run.as_ref().map(RunId::as_str), "{text}");
                let record = run.and_then(|run| self.runs.get_mut(&run))?;
                record.note(&self.cluster, text).await;
                None
            }
        }
    }

    /// Sends a message, which is encoded once. Gives the events that follow from it: the ends of sessions.
    async fn send(&mut self, sessions: &[SessionId], message: ToWorker) -> Vec<Event> {
        if let ToWorker::Commit { run, .. } = &message
            && let Some(record) = self.runs.get_mut(run)
            && let Err(error) = record.durable().await
        {
            error!(%run, %error, "the ledger cannot be written");
            let run = run.clone();
            return vec![Event::RunBroken { run, error }];
        }
        // The disk may have taken its time. What comes behind a commit that is not sent is not sent either.
        if matches!(message, ToWorker::Commit { .. }) {
            self.fenced |= !self.cluster.may_commit();
        }
        if self.fenced {
            return Vec::new();
        }
        if let ToWorker::Compute { run, step, .. } = &message {
            self.spans.computing(run, *step);
        }
        let body = wire::to_worker_body(&wire::to_worker(&message));
        let lost = |session: &SessionId| {
            let outbox = self.outboxes.get(session)?;
            let reason = match outbox.try_send(Ok(body.clone())).err()? {
                TrySendError::Full(_) => {
                    LeftReason::Protocol(format!("{OUTBOX} messages wait for it"))
                }
                TrySendError::Closed(_) => LeftReason::ConnectionClosed,
            };
            let session = *session;
            Some(Event::Left { session, reason })
        };
        sessions.iter().filter_map(lost).collect()
    }
}
