//! The one background task of the dashboard: looks at the cluster and the run each second, follows the run's events in
//! between, comes back to a coordinator that was started again, and carries out what the keys ask for.
//!
//! Where no coordinator runs it reads the home directory instead, once for each thing that is looked at.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use cohort_common::api::{History, HistoryRequest, NumberedEvent, RunEvent, RunInfo, RunView};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::state::{Action, Link, Look, News};
use crate::client::Events;
use crate::context::Context;
use crate::source::Source;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// A coordinator that takes longer to answer counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// The list of runs is looked at with every look while it is open, and else once in so many.
const RUNS_EVERY: u64 = 5;

/// The feed of a dashboard.
pub struct Feed {
    /// Finds a coordinator.
    pub context: Context,
    /// Where data come from; absent while a coordinator is gone.
    pub source: Option<Source>,
    /// What is looked at.
    pub look: watch::Receiver<Look>,
    /// What is to be done.
    pub asks: mpsc::Receiver<(Action, String)>,
    /// Where news go.
    pub news: mpsc::Sender<News>,
}

/// What the feed remembers between two looks.
#[derive(Default)]
struct Seen {
    /// The run's events, while it is under way.
    events: Option<Events>,
    /// The last event that is known.
    event: u64,
    /// The run, and the look and the step of the history that was fetched last.
    history: Option<(Look, u64)>,
    /// What a home directory was read for last.
    home: Option<Look>,
    /// The run that was looked at last.
    run: Option<String>,
    /// Looks so far.
    looks: u64,
}

impl Feed {
    /// Brings news until nobody wants any.
    pub async fn run(mut self) {
        let mut seen = Seen::default();
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let look_now = tokio::select! {
                _ = ticks.tick() => true,
                changed = self.look.changed() => match changed {
                    Ok(()) => true,
                    Err(_) => return,
                },
                ask = self.asks.recv() => match ask {
                    Some((action, run)) => {
                        self.act(action, run);
                        false
                    }
                    None => return,
                },
                event = next_event(&mut seen.events) => match self.happened(event, &mut seen).await {
                    Ok(look_now) => look_now,
                    Err(Gone) => return,
                },
            };
            if look_now && self.look(&mut seen).await.is_err() {
                return;
            }
        }
    }

    /// Looks once. What goes wrong with that is news, too.
    async fn look(&mut self, seen: &mut Seen) -> Result<(), Gone> {
        let look = self.look.borrow_and_update().clone();
        if !matches!(self.source, Some(Source::Live(_))) {
            self.find_coordinator(seen).await;
        }
        let looked = timeout(PATIENCE, self.see(&look, seen)).await;
        let looked = looked.unwrap_or_else(|_| {
            let seconds = PATIENCE.as_secs();
            Err(anyhow!("no answer within {seconds} s"))
        });
        seen.looks += 1;
        match looked {
            Ok(news) => {
                for piece in news {
                    self.tell(piece).await?;
                }
                Ok(())
            }
            Err(error) => self.lose(error, seen).await,
        }
    }

    /// A coordinator that runs now is better than what was there. Where none runs any more, the home directory has what
    /// it has left.
    async fn find_coordinator(&mut self, seen: &mut Seen) {
        let found = timeout(PATIENCE, self.context.connect_if_running()).await;
        match found {
            Ok(Ok(Some(client))) => {
                self.source = Some(Source::Live(Box::new(client)));
                *seen = Seen::default();
            }
            Ok(Ok(None)) if self.source.is_none() => {
                self.source = Some(Source::Home(self.context.home.clone()));
                *seen = Seen::default();
            }
            _ => {}
        }
    }

    /// What there is to see.
    async fn see(&mut self, look: &Look, seen: &mut Seen) -> Result<Vec<News>> {
        let mut news = Vec::new();
        let rests = matches!(self.source, Some(Source::Home(_)));
        if self.source.is_none() || (rests && seen.home.as_ref() == Some(look)) {
            return Ok(news);
        }
        seen.home = rests.then(|| look.clone());
        let mut active = None;
        if let Source::Live(client) = self.source()? {
            let cluster = client.view_cluster().await?;
            active = cluster.active.clone();
            news.push(News::Cluster(Box::new(cluster)));
        }
        news.insert(0, News::Link(link(self.source()?)));
        let mut name = look.run.clone().or(active);
        if look.runs || name.is_none() || seen.looks.is_multiple_of(RUNS_EVERY) {
            let runs = self.source()?.runs().await?;
            name = name.or_else(|| runs.last().map(|run| run.name.clone()));
            news.push(News::Runs(runs));
        }
        let Some(name) = name else {
            return Ok(news);
        };
        if seen.run.as_ref() != Some(&name) {
            seen.run = Some(name.clone());
            seen.events = None;
            seen.event = 0;
            seen.history = None;
        }
        let view = match self.source()?.view(&name).await {
            Ok(view) => view,
            // Whoever answers this has refused the other for a reason: somebody has deleted the run.
            Err(error) if self.source()?.runs().await.is_ok() => {
                news.push(News::Told(error.to_string()));
                return Ok(news);
            }
            Err(error) => return Err(error),
        };
        let step = view.info.last_step.as_ref().map_or(0, |step| step.step);
        self.follow(&view, seen).await?;
        news.push(News::Run(Box::new(view)));
        if seen.history.as_ref() != Some(&(look.clone(), step)) {
            let history = self.history(&name, look, step).await?;
            news.push(News::History(Box::new(history)));
            seen.history = Some((look.clone(), step));
        }
        Ok(news)
    }

    async fn history(&mut self, run: &str, look: &Look, step: u64) -> Result<History> {
        let request = HistoryRequest {
            run: run.into(),
            from: Some(step - (step >> look.zoom)).filter(|from| *from > 0),
            to: None,
            points: look.points,
        };
        self.source()?.history(&request).await
    }

    fn source(&mut self) -> Result<&mut Source> {
        let gone = || anyhow!("the coordinator is gone");
        self.source.as_mut().ok_or_else(gone)
    }

    /// Follows a run that is under way, from its newest event that is known.
    async fn follow(&mut self, view: &RunView, seen: &mut Seen) -> Result<()> {
        let Some(Source::Live(client)) = &mut self.source else {
            return Ok(());
        };
        let last = view.timeline.last().map_or(0, |entry| entry.id);
        seen.event = seen.event.max(last);
        let under_way = matches!(view.info.status.as_str(), "running" | "queued");
        if under_way && seen.events.is_none() {
            seen.events = Some(client.follow(&view.info.name, seen.event).await?);
        }
        Ok(())
    }

    /// Takes an event in; tells whether it is worth a look.
    async fn happened(
        &mut self,
        event: Result<Option<NumberedEvent>>,
        seen: &mut Seen,
    ) -> Result<bool, Gone> {
        let Ok(Some(numbered)) = event else {
            // The run rests, or the coordinator is gone: the next look tells.
            seen.events = None;
            return Ok(false);
        };
        seen.event = numbered.id;
        match numbered.event {
            RunEvent::Step(step) => {
                self.tell(News::Step(step)).await?;
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// The coordinator does not answer any more.
    async fn lose(&mut self, error: anyhow::Error, seen: &mut Seen) -> Result<(), Gone> {
        let why = format!("{error:#}");
        seen.events = None;
        self.source = None;
        self.tell(News::Link(Link::Lost(why))).await
    }

    /// Does something to a run, beside everything else.
    fn act(&mut self, action: Action, run: String) {
        let Some(Source::Live(client)) = &self.source else {
            return;
        };
        let (mut client, news) = (client.clone(), self.news.clone());
        tokio::spawn(async move {
            let done = match action {
                Action::Pause => client.pause(&run).await,
                Action::Checkpoint => client.checkpoint(&run).await,
                Action::Resume => client.resume(&run).await,
                Action::Cancel => client.cancel(&run).await,
            };
            let done = done.with_context(|| format!("cannot {} {run}", action.verb()));
            let told = match done {
                Ok(info) => came_of(action, &info),
                Err(error) => format!("{error:#}"),
            };
            // Whoever asked may have left.
            let _ = news.send(News::Told(told)).await;
        });
    }

    async fn tell(&self, news: News) -> Result<(), Gone> {
        self.news.send(news).await.map_err(|_| Gone)
    }
}

/// Where what a source tells comes from.
pub fn link(source: &Source) -> Link {
    match source {
        Source::Live(_) => Link::Live,
        Source::Home(home) => Link::Home(home.display().to_string()),
    }
}

/// Nobody wants news any more.
struct Gone;

async fn next_event(events: &mut Option<Events>) -> Result<Option<NumberedEvent>> {
    match events {
        Some(events) => events.next_of_run().await,
        None => std::future::pending().await,
    }
}

fn came_of(action: Action, run: &RunInfo) -> String {
    let name = &run.name;
    match (action, run.queue_place) {
        (Action::Pause, _) => format!("{name} is paused at step {}; u goes on with it", run.step),
        (Action::Checkpoint, _) => {
            let step = run
                .checkpoints
                .last()
                .map_or(0, |checkpoint| checkpoint.step);
            format!("{name} has a checkpoint of step {step}")
        }
        (Action::Resume, Some(place)) => format!("{name} waits in the queue, place {place}"),
        (Action::Resume, None) => format!("{name} goes on"),
        (Action::Cancel, _) => format!("{name} is cancelled; its checkpoints stay"),
    }
}
