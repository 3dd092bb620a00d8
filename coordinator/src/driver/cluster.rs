//! The way to the driver, and what all services share beside it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cohort_common::cluster::{Event, Limits, Machine};
use cohort_common::exchange::Exchange;
use cohort_common::home::{Home, RunName};
use cohort_common::ids::SessionId;
use cohort_common::traces::Traces;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tonic::Status;

use super::{Command, Driver, QUEUE, now_ms};
use crate::Topology;
use crate::failover::Leadership;
use crate::figures::Book;
use crate::history::Histories;
use crate::notify::Notices;
use crate::readers::Readers;
use crate::remote::Remote;
use crate::store::StoreHandle;
use crate::system::watch_system;
use crate::tokenizing::Tokenizing;
use crate::trace::StepSpans;

/// Messages and their bytes on the control connections of all workers, since the start.
#[derive(Debug, Default)]
pub struct Traffic {
    /// To the workers.
    pub sent: Flow,
    /// From them.
    pub received: Flow,
}

/// One direction.
#[derive(Debug, Default)]
pub struct Flow {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl Flow {
    /// Counts a message.
    pub fn count(&self, bytes: usize) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Messages, and their bytes.
    pub fn read(&self) -> (u64, u64) {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (read(&self.messages), read(&self.bytes))
    }
}

/// Events of runs since the start. Steps may come many a second; whoever follows them need not look at each by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Committed steps.
    pub steps: u64,
    /// All others.
    pub others: u64,
}

/// The way to the driver and to what all services share. Cheap to clone.
#[derive(Clone)]
pub struct Cluster(Arc<Shared>);

struct Shared {
    commands: mpsc::Sender<Command>,
    exchange: Arc<Exchange>,
    home: Home,
    store: StoreHandle,
    notices: Notices,
    sessions: std::sync::Mutex<HashSet<SessionId>>,
    /// Workers that gave a sign of life, and said nothing else, since the last tick.
    heard: std::sync::Mutex<BTreeSet<SessionId>>,
    traffic: Traffic,
    /// Changed whenever a run has a new event, so that followers look.
    events: watch::Sender<Counts>,
    histories: Histories,
    readers: Readers,
    remote: Option<Remote>,
    tokenizing: Tokenizing,
}

impl Cluster {
    /// Starts the driver. The task ends by a panic: then the machine has found that it contradicts itself, and
    /// nothing may go on from such a state. Or it ends because this process may not lead any more.
    pub fn start(
        home: Home,
        store: StoreHandle,
        (limits, topology): (Limits, Topology),
        notices: Notices,
        traces: Traces,
        remote: Option<Remote>,
    ) -> (Self, JoinHandle<()>) {
        let (commands, queue) = mpsc::channel(QUEUE);
        let cluster = Self(Arc::new(Shared {
            commands,
            exchange: Arc::new(Exchange::new(topology != Topology::Sharded)),
            readers: Readers::new(home.database()),
            tokenizing: Tokenizing::default(),
            home,
            store,
            notices,
            sessions: std::sync::Mutex::default(),
            heard: std::sync::Mutex::default(),
            traffic: Traffic::default(),
            events: watch::Sender::default(),
            histories: Histories::default(),
            remote,
        }));
        let second = || SystemTime::now().duration_since(UNIX_EPOCH);
        let boot = match cluster.leadership() {
            Some(leadership) => leadership.epoch(),
            None => second().map_or(0, |t| t.as_secs()),
        };
        let driver = Driver {
            cluster: cluster.clone(),
            machine: Machine::new(Limits {
                shares: topology != Topology::Star,
                ..limits
            }),
            tick: Duration::from_millis(limits.tick_ms),
            outboxes: HashMap::new(),
            runs: HashMap::new(),
            started: Instant::now(),
            started_ms: now_ms(),
            joined_ms: HashMap::new(),
            figures: Book::default(),
            system: watch_system(cluster.home().root().to_owned()),
            spans: StepSpans::new(traces),
            next_session: (boot << 32) + 1,
            fenced: false,
        };
        let task = tokio::spawn(driver.run(queue));
        (cluster, task)
    }

    /// The sums of the steps in flight.
    pub fn exchange(&self) -> &Arc<Exchange> {
        &self.0.exchange
    }

    /// The home directory.
    pub fn home(&self) -> &Home {
        &self.0.home
    }

    /// The store.
    pub fn store(&self) -> &StoreHandle {
        &self.0.store
    }

    /// Who is told what becomes of runs.
    pub(crate) fn notices(&self) -> &Notices {
        &self.0.notices
    }

    /// The steps of the runs that somebody looks at.
    pub fn histories(&self) -> &Histories {
        &self.0.histories
    }

    /// The object store that outlives this machine, if there is one.
    pub fn remote(&self) -> Option<&Remote> {
        self.0.remote.as_ref()
    }

    /// That this process leads, where several coordinators stand by for each other.
    pub(crate) fn leadership(&self) -> Option<&Leadership> {
        self.0.remote.as_ref()?.leadership()
    }

    /// Whether a commit may be sent now.
    pub(crate) fn may_commit(&self) -> bool {
        self.leadership().is_none_or(Leadership::commits)
    }

    /// A run has changed: those who stand by are to know.
    pub(crate) fn note(&self, run: &RunName) {
        if let Some(remote) = self.remote() {
            remote.note(run);
        }
    }

    /// Batches of text for workers.
    pub(crate) fn tokenizing(&self) -> &Tokenizing {
        &self.0.tokenizing
    }

    /// Connections for looks at the store.
    pub(crate) fn readers(&self) -> &Readers {
        &self.0.readers
    }

    /// Wakes up whenever a run has a new event.
    pub fn events(&self) -> watch::Receiver<Counts> {
        self.0.events.subscribe()
    }

    pub(crate) fn announce(&self) {
        self.0.events.send_modify(|counts| counts.others += 1);
    }

    pub(crate) fn announce_step(&self) {
        self.0.events.send_modify(|counts| counts.steps += 1);
    }

    /// Hands an event to the driver. After the driver has ended nobody needs it.
    pub async fn send(&self, event: Event) {
        self.command(Command::Event(event)).await;
    }

    /// Hands a command to the driver.
    pub async fn command(&self, command: Command) {
        let _ = self.0.commands.send(command).await;
    }

    /// Asks the driver.
    pub async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.command(command(reply)).await;
        answer
            .await
            .map_err(|_| Status::unavailable("the coordinator is shutting down"))
    }

    /// Notes a sign of life. The driver hears of all of them together.
    pub fn beat(&self, session: SessionId) {
        self.heard().insert(session);
    }

    pub(super) fn take_heard(&self) -> Vec<SessionId> {
        std::mem::take(&mut *self.heard()).into_iter().collect()
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, BTreeSet<SessionId>> {
        let heard = self.0.heard.lock();
        heard.expect("no thread panics while it holds this lock")
    }

    /// What went over the control connections.
    pub fn traffic(&self) -> &Traffic {
        &self.0.traffic
    }

    /// Workers that are there.
    pub fn workers(&self) -> usize {
        self.sessions().len()
    }

    pub(super) fn sessions(&self) -> std::sync::MutexGuard<'_, HashSet<SessionId>> {
        let sessions = self.0.sessions.lock();
        sessions.expect("no thread panics while it holds this lock")
    }
}
