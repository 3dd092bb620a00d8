//! What is new, for all who watch: one task reads the new events once, twice a second at most and only while somebody
//! watches, puts them into words once, and hands the same bytes to every watcher. So a run does not feel how many watch it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cohort_common::api::{ClusterView, SystemView};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};
use tonic::Status;
use tracing::warn;

use super::message::{of_event, of_rows};
use crate::driver::{Cluster, Command, Counts};
use crate::store::{EventRow, Store};
use crate::view;

/// Time between two looks: the eye wants no more, and each look makes every page draw.
const BEAT: Duration = Duration::from_millis(500);

/// Time between two descriptions of the cluster, or of all runs, at least.
const DESCRIBED: Duration = Duration::from_secs(1);

/// Time between two descriptions of a cluster in which nothing happens, at most.
const UNCHANGED: Duration = Duration::from_secs(5);

/// Bytes of lists of runs that a watcher is sent, a second.
const LIST_BYTES: usize = 64 << 10;

/// Events that are read in one look. Of more than that, nobody can draw each.
const EVENTS: u32 = 2048;

/// Looks that a watcher may be behind.
const BACKLOG: usize = 32;

/// Watchers that may wait to be let in.
const WAITING: usize = 64;

/// The way to the task.
pub struct Feed {
    asks: mpsc::Sender<oneshot::Sender<Welcome>>,
}

/// What a watcher begins with.
pub struct Welcome {
    /// The newest event that everything after this does not have.
    pub position: u64,
    /// The cluster and all runs, as messages.
    pub now: Bytes,
    /// What is new from here on.
    pub news: broadcast::Receiver<Arc<News>>,
}

/// What one look has found.
#[derive(Default)]
pub struct News {
    /// The newest event that it has.
    pub position: u64,
    /// Messages for all: the cluster, all runs.
    pub all: Bytes,
    /// Messages for those who watch a run, by run.
    pub of_runs: BTreeMap<String, Bytes>,
    /// Whether there was more than can be told: then the histories of all runs are to be asked for anew.
    pub missed: bool,
}

impl Feed {
    /// Starts the task. It ends with the coordinator.
    pub fn start(cluster: Cluster) -> Self {
        let (asks, waiting) = mpsc::channel(WAITING);
        tokio::spawn(serve(cluster, waiting));
        Self { asks }
    }

    /// Begins to watch.
    pub async fn watch(&self) -> Result<Welcome, Status> {
        let gone = || {
            Status::unavailable(
                "the coordinator is shutting down, or cannot read its database; try again",
            )
        };
        let (reply, welcome) = oneshot::channel();
        self.asks.send(reply).await.map_err(|_| gone())?;
        welcome.await.map_err(|_| gone())
    }
}

async fn serve(cluster: Cluster, mut asks: mpsc::Receiver<oneshot::Sender<Welcome>>) {
    // Nobody watches yet: nothing is read.
    while let Some(first) = asks.recv().await {
        match Looker::start(&cluster).await {
            Ok(looker) => looker.run(first, &mut asks).await,
            // Whoever asked learns of it, and may ask again.
            Err(status) => warn!(error = status.message(), "nobody can watch"),
        }
    }
}

/// What is remembered from look to look while somebody watches.
struct Looker<'a> {
    cluster: &'a Cluster,
    changes: watch::Receiver<Counts>,
    sender: broadcast::Sender<Arc<News>>,
    position: u64,
    shown: ClusterView,
    shown_at: Instant,
    asked_at: Instant,
    cluster_message: String,
    runs_message: String,
    runs_at: Instant,
    /// Whether something has happened since all runs were listed.
    runs_stale: bool,
}

impl<'a> Looker<'a> {
    async fn start(cluster: &'a Cluster) -> Result<Self, Status> {
        let changes = cluster.events();
        let position = cluster.read_settled(Store::last_event).await?;
        let shown = cluster.ask(Command::View).await?;
        let runs = view::summaries(cluster).await?;
        Ok(Self {
            cluster,
            changes,
            sender: broadcast::Sender::new(BACKLOG),
            position,
            cluster_message: of_event("cluster", &shown),
            shown,
            shown_at: Instant::now(),
            asked_at: Instant::now(),
            runs_message: of_event("runs", &runs),
            runs_at: Instant::now(),
            runs_stale: false,
        })
    }

    /// Looks until nobody watches any more.
    async fn run(
        mut self,
        first: oneshot::Sender<Welcome>,
        asks: &mut mpsc::Receiver<oneshot::Sender<Welcome>>,
    ) {
        self.welcome(first);
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.sender.receiver_count() > 0 {
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => self.welcome(ask),
                    None => return,
                },
                _ = beat.tick() => match self.look().await {
                    Ok(None) => {}
                    Ok(Some(news)) => drop(self.sender.send(Arc::new(news))),
                    Err(status) => {
                        // They come back, and go on from where they were.
                        warn!(error = status.message(), "the live streams end");
                        return;
                    }
                }
            }
        }
    }

    fn welcome(&self, ask: oneshot::Sender<Welcome>) {
        let welcome = Welcome {
            position: self.position,
            now: format!("{}{}", self.cluster_message, self.runs_message).into(),
            news: self.sender.subscribe(),
        };
        // It may have gone meanwhile.
        let _ = ask.send(welcome);
    }

    /// Time between two lists of all runs: longer where they are many, so that a watcher is sent no flood.
    fn between_lists(&self) -> Duration {
        DESCRIBED.max(DESCRIBED * (self.runs_message.len() / LIST_BYTES) as u32)
    }

    async fn look(&mut self) -> Result<Option<News>, Status> {
        let mut news = News::default();
        if self.changes.has_changed().unwrap_or(false) {
            self.changes.mark_unchanged();
            self.read(&mut news).await?;
            self.runs_stale = true;
        }
        let mut all = String::new();
        if self.asked_at.elapsed() >= DESCRIBED {
            all += &self.describe_cluster().await?;
        }
        if self.runs_stale && self.runs_at.elapsed() >= self.between_lists() {
            all += &self.describe_runs().await?;
        }
        let nothing = all.is_empty() && news.of_runs.is_empty() && !news.missed;
        news.all = all.into();
        news.position = self.position;
        Ok((!nothing).then_some(news))
    }

    /// Reads the events after those that are known.
    async fn read(&mut self, news: &mut News) -> Result<(), Status> {
        let after = self.position;
        let look = move |store: &Store| {
            // In this order: whatever is written in between is among the events, or comes next time.
            let last = store.last_event()?;
            Ok((last, store.events(None, after, EVENTS + 1)?))
        };
        let (last, rows) = self.cluster.read_settled(look).await?;
        if rows.len() > EVENTS as usize {
            self.position = last;
            news.missed = true;
            return Ok(());
        }
        // Events of steps that were taken back are not among the rows.
        self.position = rows.last().map_or(last, |row| row.id.max(last));
        let mut by_run: BTreeMap<String, Vec<EventRow>> = BTreeMap::new();
        for row in rows {
            if let Some(run) = row.run.clone() {
                by_run.entry(run).or_default().push(row);
            }
        }
        let told = by_run.into_iter().map(|(run, rows)| {
            let messages = of_rows(&run, rows);
            (run, Bytes::from(messages))
        });
        news.of_runs = told.collect();
        Ok(())
    }

    /// The cluster, if it has changed or was not shown for a while.
    async fn describe_cluster(&mut self) -> Result<String, Status> {
        self.asked_at = Instant::now();
        let now = self.cluster.ask(Command::View).await?;
        let still = |view: &ClusterView| ClusterView {
            now_ms: 0,
            system: SystemView::default(),
            ..view.clone()
        };
        if still(&now) == still(&self.shown) && self.shown_at.elapsed() < UNCHANGED {
            return Ok(String::new());
        }
        self.cluster_message = of_event("cluster", &now);
        self.shown = now;
        self.shown_at = Instant::now();
        Ok(self.cluster_message.clone())
    }

    /// All runs, if anything about them has changed.
    async fn describe_runs(&mut self) -> Result<String, Status> {
        self.runs_stale = false;
        self.runs_at = Instant::now();
        let message = of_event("runs", &view::summaries(self.cluster).await?);
        if message == self.runs_message {
            return Ok(String::new());
        }
        self.runs_message.clone_from(&message);
        Ok(message)
    }
}
