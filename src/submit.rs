//! What every run goes through: a cluster to run on, a submission, and watching until the run rests.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use cohort_common::api::{FinishedEvent, RunEvent, Submit, Submitted};
use cohort_common::spec::{RunKind, RunSpec};
use tokio::sync::mpsc;

use crate::cli::{ConnectArgs, LocalArgs, NotifyArgs, SubmitArgs};
use crate::client::{Client, Events};
use crate::context::Context;
use crate::facts;
use crate::failure::hinted;
use crate::follow::{Progress, summary};
use crate::local::{self, LocalCluster, Options};
use crate::output::Output;

/// How long the end of a process may lag behind the end of its connection.
const EXPLANATION: Duration = Duration::from_millis(500);
/// How long another coordinator may take to lead: longer than most leases last.
const TAKEOVER: Duration = Duration::from_secs(180);
/// Between two looks for it.
const LOOK: Duration = Duration::from_millis(500);
/// Signals within this time are one.
const SAME_INTERRUPT: Duration = Duration::from_millis(100);
/// Exit code of a command that was interrupted, as shells know it.
const INTERRUPTED: u8 = 130;

/// A coordinator to work with: a private one with its workers, or one that stands.
pub struct Session {
    /// The connection.
    pub client: Client,
    /// Where text goes.
    pub out: Output,
    cluster: Option<LocalCluster>,
    workers: Option<u32>,
    /// Where another coordinator may take over, if there are several.
    others: Option<Context>,
}

/// The only line of a run that is left alone.
#[derive(serde::Serialize)]
struct Detached<'a> {
    event: &'static str,
    #[serde(flatten)]
    submitted: &'a Submitted,
}

/// What became of a run that was submitted.
pub struct Launched {
    /// For the shell.
    pub code: ExitCode,
    /// The run, if it has finished.
    pub finished: Option<String>,
}

/// How a run came to rest, or was left.
pub enum Rest {
    /// All steps are done.
    Finished(Box<FinishedEvent>),
    /// It was stopped and can be resumed.
    Stopped(u64),
    /// It was paused, perhaps by its watchdog for this reason, and can be resumed.
    Paused(u64, Option<String>),
    /// It was cancelled.
    Cancelled,
    /// It cannot go on.
    Failed(String),
    /// The user has left; the run goes on.
    Left,
}

impl Session {
    /// Connects, after starting a private cluster if one is asked for.
    pub async fn open(
        connect: &ConnectArgs,
        local: &LocalArgs,
        notify: &NotifyArgs,
        out: Output,
    ) -> Result<Self> {
        let context = Context::of(connect)?;
        let Some(workers) = local.local else {
            if notify.is_given() {
                return Err(hinted(
                    "only a coordinator that this command starts can be told whom to notify",
                    "give these flags to `cohort coordinator` or `cohort local`, or add `--local N`",
                ));
            }
            let client = context.connect().await?;
            let several = context.running().is_some_and(|places| !places.is_single());
            return Ok(Self {
                client,
                out,
                cluster: None,
                workers: None,
                others: several.then_some(context),
            });
        };
        let options = Options {
            home: context.home.clone(),
            listen: "127.0.0.1:0".into(),
            workers,
            threads: local.threads,
            optimizer: local.optimizer,
            secret: context.secret.clone(),
            http: None,
            private: true,
            tensorboard: None,
            notify: notify.arguments(),
            variables: Vec::new(),
        };
        let cluster = LocalCluster::start(&options).await?;
        let threads = options.threads.unwrap_or_else(|| local::share(workers));
        out.say(format!(
            "cluster     workers: {workers}, threads of each: {threads}, home {}",
            context.home.display()
        ));
        out.say(format!("watch it at {}", cluster.page()));
        if !cluster.set_aside().is_empty() {
            let runs = cluster.set_aside().join(", ");
            out.say(format!(
                "unfinished  {runs}; the same command again or `--resume` goes on"
            ));
        }
        Ok(Self {
            client: context.connect_to(cluster.url()).await?,
            out,
            cluster: Some(cluster),
            workers: Some(workers),
            others: None,
        })
    }

    /// Ends a private cluster.
    pub async fn close(self) {
        if let Some(cluster) = self.cluster {
            cluster.end().await;
        }
    }

    /// A run on a private cluster waits for all its workers; never for more than it has lanes.
    pub fn adapt(&self, spec: &mut RunSpec) {
        if let Some(workers) = self.workers {
            spec.train.min_workers = workers.min(spec.train.lanes);
        }
    }

    /// Submits a run, and watches it unless it is to be left alone.
    pub async fn launch(&mut self, submit: Submit, detach: bool) -> Result<Launched> {
        self.out.say(submit.spec.describe());
        let submitted = self.submit(&submit).await?;
        if detach {
            self.out.line(&Detached {
                event: "submitted",
                submitted: &submitted,
            })?;
            self.out.say(come_back(&submitted.run));
            return Ok(Launched {
                code: ExitCode::SUCCESS,
                finished: None,
            });
        }
        let rest = self.watch(&submitted.run, submitted.after, 0).await?;
        let finished = matches!(rest, Rest::Finished(_)).then(|| submitted.run.clone());
        let code = self.conclude(&submitted.run, &submit.spec, rest).await?;
        Ok(Launched { code, finished })
    }

    /// Submits a run and says what became of it.
    pub async fn submit(&mut self, submit: &Submit) -> Result<Submitted> {
        let submitted = self.client.submit(submit).await?;
        self.out.say(match submitted.resumed_at {
            Some(step) if submit.resume.is_some() => {
                format!("run         {}, goes on from step {step}", submitted.run)
            }
            Some(step) => format!(
                "run         {}, unfinished with this spec and corpus, goes on from step {step} (`--new` starts another)",
                submitted.run
            ),
            None => format!("run         {}", submitted.run),
        });
        Ok(submitted)
    }

    /// Shows the events of a run after one of them until it rests. Steps up to `old` are history.
    ///
    /// Ctrl-C leaves the run alone on a coordinator that stands. On a private one it stops the run after a checkpoint;
    /// again, it ends everything at once.
    pub async fn watch(&mut self, run: &str, after: u64, old: u64) -> Result<Rest> {
        let mut events = self.client.follow(run, after).await?;
        let mut progress = Progress::new(old);
        let mut interrupts = interrupts();
        let mut stopping = false;
        let mut rest = None;
        let mut seen = after;
        loop {
            tokio::select! {
                event = events.next_of_run() => {
                    let numbered = match event {
                        Ok(Some(numbered)) => numbered,
                        // Whatever has become of the coordinator, what was waited for is known.
                        _ if rest.is_some() => break,
                        Ok(None) if self.others.is_none() => break,
                        lost => match self.come_back(run, seen, &progress).await {
                            Some(found) => {
                                events = found;
                                continue;
                            }
                            None => match lost {
                                Err(error) => return Err(self.explain(error).await),
                                Ok(_) => break,
                            },
                        },
                    };
                    seen = numbered.id;
                    self.out.line(&numbered.event)?;
                    progress.show(&numbered.event);
                    rest = rest_of(numbered.event).or(rest);
                }
                loss = next_loss(self.cluster.as_mut()) => progress.print(&loss?),
                _ = interrupts.recv() => {
                    if self.cluster.is_none() {
                        progress.clear();
                        return Ok(Rest::Left);
                    }
                    if stopping {
                        progress.clear();
                        eprintln!("ended at once; the last checkpoint is kept");
                        // The children see the closed pipe.
                        std::process::exit(INTERRUPTED.into());
                    }
                    stopping = true;
                    progress.print("stopping at the next step, with a checkpoint; Ctrl-C again ends at once");
                    self.client.stop(run).await?;
                }
            }
        }
        progress.clear();
        rest.ok_or_else(|| anyhow!("the coordinator ended the events of {run} before the run did"))
    }

    /// Where there are several coordinators, goes on with the events of a run at the one that leads next; `None` where there are not,
    /// or none leads in time.
    async fn come_back(&mut self, run: &str, after: u64, progress: &Progress) -> Option<Events> {
        let context = self.others.as_ref()?;
        progress.print("the coordinator is lost; looking for the one that leads next");
        let look = async {
            loop {
                if let Ok(mut client) = context.connect().await
                    && let Ok(events) = client.follow(run, after).await
                {
                    return (client, events);
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let (client, events) = tokio::time::timeout(TAKEOVER, look).await.ok()?;
        progress.print(&format!("{} leads now", client.url()));
        self.client = client;
        Some(events)
    }

    /// If a private coordinator has died, that is the better explanation of a lost connection.
    async fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let loss = next_loss(self.cluster.as_mut());
        match tokio::time::timeout(EXPLANATION, loss).await {
            Ok(Err(death)) => death,
            _ => error,
        }
    }

    /// Says how a run came to rest, and makes an exit code of it.
    pub async fn conclude(&mut self, run: &str, spec: &RunSpec, rest: Rest) -> Result<ExitCode> {
        match rest {
            Rest::Finished(end) => {
                self.out.say(summary(&end));
                if spec.kind == RunKind::Finetune {
                    self.out
                        .say(facts::gained_and_lost(&self.client.run(run).await?));
                }
            }
            Rest::Cancelled => self
                .out
                .say(format!("{run} was cancelled; its checkpoints stay")),
            Rest::Left => self.out.say(format!("left {run}; {}", come_back(run))),
            Rest::Failed(error) => {
                return Err(anyhow!(error)).with_context(|| format!("run `{run}` failed"));
            }
            Rest::Paused(step, reason) if self.workers.is_none() => {
                self.say_reason(reason);
                self.out.say(format!(
                    "{run} is paused at step {step}; `cohort resume {run}` goes on with it"
                ));
                return Ok(ExitCode::from(INTERRUPTED));
            }
            Rest::Stopped(step) => return Ok(self.stopped(run, spec, step)),
            Rest::Paused(step, reason) => {
                self.say_reason(reason);
                return Ok(self.stopped(run, spec, step));
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    fn say_reason(&self, reason: Option<String>) {
        if let Some(reason) = reason {
            self.out.say(reason);
        }
    }

    /// How a run that rests is gone on with.
    fn stopped(&self, run: &str, spec: &RunSpec, step: u64) -> ExitCode {
        let verb = facts::kind(spec.kind);
        let place = self
            .workers
            .map_or(String::new(), |n| format!(" --local {n}"));
        self.out.say(format!(
            "{run} has stopped after step {step}; `cohort {verb} --resume {run}{place}` goes on"
        ));
        ExitCode::from(INTERRUPTED)
    }
}

/// What a submission says besides the spec.
pub fn submission(spec: RunSpec, args: &SubmitArgs, stem: String) -> Submit {
    Submit {
        spec,
        name: args.name.clone(),
        stem,
        resume: None,
        fresh: args.new,
        parent: None,
        start: None,
        notes: Vec::new(),
    }
}

/// Each Ctrl-C from now on. One right after another is the same one, told to a process and to its group.
fn interrupts() -> mpsc::Receiver<()> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            local::interrupt().await;
            if sender.send(()).await.is_err() {
                break;
            }
            tokio::time::sleep(SAME_INTERRUPT).await;
        }
    });
    receiver
}

async fn next_loss(cluster: Option<&mut LocalCluster>) -> Result<String> {
    match cluster {
        Some(cluster) => cluster.next_loss().await,
        None => std::future::pending().await,
    }
}

/// How a run rests after an event.
fn rest_of(event: RunEvent) -> Option<Rest> {
    Some(match event {
        RunEvent::Finished(end) => Rest::Finished(end),
        RunEvent::Stopped { step, .. } => Rest::Stopped(step),
        RunEvent::Paused { step, reason, .. } => Rest::Paused(step, reason),
        RunEvent::Cancelled { .. } => Rest::Cancelled,
        RunEvent::Failed { error, .. } => Rest::Failed(error),
        _ => return None,
    })
}

fn come_back(run: &str) -> String {
    format!("`cohort follow {run}` comes back to it, `cohort cancel {run}` ends it")
}
