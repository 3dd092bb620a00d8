//! Tells the world outside what becomes of runs: a command of the operator's, or a webhook. It hears when a run finishes,
//! fails, is paused by its watchdog, makes no progress for some time, and when it moves on after that.
//!
//! Everything happens in the background, in order, from bounded queues and within bounded time, and no failure here
//! touches a run. Only the operator says what is called, with flags of the coordinator: a spec, which a client writes,
//! cannot name a command.

mod deliver;
mod watch;

use std::time::{Duration, Instant};

use cohort_common::api::RunEvent;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::warn;

use self::deliver::Delivery;
use self::watch::Watch;

/// News that may wait to be looked at.
const QUEUE: usize = 1024;
/// Notices that may wait to be delivered.
const BACKLOG: usize = 64;
/// How long the notices that wait may take when the coordinator ends. A private cluster gives its processes 10 s.
const DRAIN: Duration = Duration::from_secs(8);

/// Who is told, and when.
#[derive(Clone, Debug, Default)]
pub struct NotifyConfig {
    /// A command for `sh -c`.
    pub command: Option<String>,
    /// An address that takes the notice in a POST.
    pub webhook: Option<String>,
    /// How long an active run may make no progress.
    pub stall_after: Duration,
}

/// What a notice is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Finished,
    Failed,
    Paused,
    Stalled,
    Moving,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Paused => "paused",
            Self::Stalled => "stalled",
            Self::Moving => "moving",
        }
    }
}

/// What is told, as JSON.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
struct Notice {
    event: Kind,
    run: String,
    step: u64,
    text: String,
    time_ms: u64,
}

/// What is heard of runs.
enum News {
    Event(RunEvent),
    Progress { run: String, step: u64 },
    Close(oneshot::Sender<()>),
}

/// The way to whoever is told. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Notices(Option<mpsc::Sender<News>>);

impl Notices {
    /// Starts to listen, if there is somebody to tell.
    pub fn start(config: NotifyConfig) -> Self {
        if config.command.is_none() && config.webhook.is_none() {
            return Self::default();
        }
        let (news, heard) = mpsc::channel(QUEUE);
        let (notices, waiting) = mpsc::channel(BACKLOG);
        let watch = Watch::new(config.stall_after);
        let delivery = tokio::spawn(Delivery::of(config).run(waiting));
        tokio::spawn(listen(watch, heard, notices, delivery));
        Self(Some(news))
    }

    /// Something has become of a run.
    pub(crate) fn event(&self, event: &RunEvent) {
        let Some(news) = &self.0 else { return };
        if news.try_send(News::Event(event.clone())).is_err() {
            warn!(
                event = event.kind(),
                "too much happens at once: nobody is told of this"
            );
        }
    }

    /// A run has moved.
    pub(crate) fn progress(&self, run: &str, step: u64) {
        let Some(news) = &self.0 else { return };
        // Where the queue is full, there is progress in it.
        let run = run.to_owned();
        let _ = news.try_send(News::Progress { run, step });
    }

    /// Waits until the notices so far are delivered, but not for ever.
    pub async fn close(self) {
        let Some(news) = self.0 else { return };
        let (done, wait) = oneshot::channel();
        let closing = async {
            if news.send(News::Close(done)).await.is_ok() {
                let _ = wait.await;
            }
        };
        if tokio::time::timeout(DRAIN, closing).await.is_err() {
            warn!("the coordinator ends; whoever should be told of its last news was too slow");
        }
    }
}

/// Turns news into notices until there is none any more.
async fn listen(
    mut watch: Watch,
    mut heard: mpsc::Receiver<News>,
    notices: mpsc::Sender<Notice>,
    delivery: JoinHandle<()>,
) {
    let tell = |notice: Notice| {
        if let Err(error) = notices.try_send(notice) {
            warn!(%error, "{BACKLOG} notices wait already: this one is left out");
        }
    };
    let done = loop {
        let due = watch.next_stall();
        let news = tokio::select! {
            news = heard.recv() => news,
            () = sleep_until(due) => {
                watch.stalls(Instant::now()).into_iter().for_each(tell);
                continue;
            }
        };
        match news {
            None => break None,
            Some(News::Close(done)) => break Some(done),
            Some(News::Progress { run, step }) => {
                watch.progress(Instant::now(), &run, step).map(tell);
            }
            Some(News::Event(event)) => {
                watch.event(Instant::now(), &event).map(tell);
            }
        }
    };
    drop(notices);
    let _ = delivery.await;
    if let Some(done) = done {
        let _ = done.send(());
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
