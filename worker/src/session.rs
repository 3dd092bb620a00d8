//! One session with a coordinator: register, presenting what is still in memory, then obey until the connection ends or
//! falls silent.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use cohort_common::cluster::silence::{Silence, SilenceLimits};
use cohort_common::cluster::worker::WorkerEvent;
use cohort_common::cluster::{FromWorker, Holding, ToWorker};
use cohort_common::figures::Figures;
use cohort_common::ids::SessionId;
use cohort_common::net::{self, Credentials};
use cohort_common::seal::{Opener, Sealer};
use cohort_common::security::Whom;
use cohort_common::wire::{self, MAX_MESSAGE};
use cohort_proto::v1;
use cohort_proto::v1::workers_client::WorkersClient;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tracing::info;

use crate::data::DataClient;
use crate::driver::{Driver, Ended, Link};
use crate::{Config, Error, engine, join, peak, tokenizing};

/// Messages to the coordinator that may wait.
const OUTBOX: usize = 4096;

/// How long the coordinator may take to say welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(20);

/// How long it may take until the coordinator hears what it does not wait for. What goes out together with something else costs
/// next to nothing, and a message by itself wakes four threads on its way.
const LATE: Duration = Duration::from_millis(50);

/// What the worker says of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    device: String,
    fingerprint: String,
    threads: u32,
    peak_flops: f64,
    /// Where other workers can push gradients to it, if they can.
    pub listens: Option<String>,
    /// Which site it is of, if it was told.
    site: Option<String>,
}

impl Identity {
    /// Opens the device once to learn its name, its numerics and how fast it is.
    pub fn of(config: &Config) -> Result<Self, Error> {
        let (device, fingerprint) = engine::describe_device(config.device)?;
        let peak_flops = peak::measure(config.device, config.threads)?;
        info!(
            device,
            gflops = (peak_flops / 1e9).round(),
            "measured a matrix product"
        );
        Ok(Self {
            device,
            fingerprint,
            threads: engine::thread_count(config.threads) as u32,
            peak_flops,
            listens: None,
            site: config.site.clone(),
        })
    }

    fn register(&self, holding: Option<Holding>) -> v1::Register {
        v1::Register {
            version: env!("CARGO_PKG_VERSION").into(),
            host: hostname(),
            pid: std::process::id(),
            device: self.device.clone(),
            threads: self.threads,
            fingerprint: self.fingerprint.clone(),
            holding: holding.map(wire::holding_to),
            peak_flops: self.peak_flops,
            listens: self.listens.clone().unwrap_or_default(),
            site: self.site.clone().unwrap_or_default(),
        }
    }
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .or_else(|_| std::env::var("HOSTNAME"))
        .unwrap_or_else(|_| "unknown".into())
}

/// Serves one session. Returns only with the reason why it ended.
pub async fn serve(
    config: &Config,
    url: &str,
    identity: &Identity,
    driver: &mut Driver,
    leave: &mut watch::Receiver<bool>,
) -> Result<Infallible, Ended> {
    join::still_good(config)?;
    let connect = || net::connect(url, config.trust.as_ref(), Whom::Coordinator);
    let channel = connect().await.map_err(Error::from)?;
    let data_channel = connect().await.map_err(Error::from)?;
    let credentials = Credentials {
        token: config.token.clone(),
        trust: config.trust.clone(),
        ..Credentials::default()
    };
    let mut client = WorkersClient::with_interceptor(channel, credentials.clone())
        .max_decoding_message_size(MAX_MESSAGE);
    let (out, outgoing) = mpsc::channel(OUTBOX);
    let mut sealer = Sealer::default();
    let mut opener = Opener::default();
    let kind = Some(v1::from_worker::Kind::Register(
        identity.register(driver.holding()),
    ));
    let first = sealer.frame(&v1::FromWorker { kind });
    out.send(first).await.expect("the receiver is right here");
    let opened = client.session(ReceiverStream::new(outgoing));
    let opened = tokio::time::timeout(WELCOME_TIMEOUT, opened).await;
    let opened = opened.map_err(|_| Error::Session("no welcome came".into()))?;
    let mut incoming = opened.map_err(ended)?.into_inner();
    let welcome = welcome(&mut incoming, &mut opener).await?;
    driver.heed(welcome.generation)?;
    info!(
        session = welcome.session as u32,
        coordinator = welcome.version,
        url,
        "joined"
    );
    let credentials = Credentials {
        session: Some(welcome.session),
        ..credentials
    };
    let (broken, mut breaks) = mpsc::channel(1);
    let mut session = Session {
        sealer,
        out,
        silence: Silence::new(SilenceLimits::default(), 0),
        beat: at_least_10(welcome.heartbeat_ms),
        heartbeat: at_least_10(welcome.heartbeat_ms),
        last_said: tokio::time::Instant::now(),
        late: Vec::new(),
        started: Instant::now(),
        last_beat: Instant::now(),
    };
    let (channel, carried) = (data_channel.clone(), credentials.clone());
    let tokenizing = tokenizing::serve(channel, carried, identity.threads, driver.idle());
    // It ends with the session.
    let mut beside = JoinSet::new();
    beside.spawn(tokenizing);
    let said = driver.up(Link {
        name: SessionId(welcome.session).to_string(),
        data: DataClient::new(data_channel, credentials.clone()),
        coordinator: url.to_owned(),
        credentials,
        broken,
    });
    session.say(said)?;
    let mut beat = tokio::time::interval(session.beat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let said = tokio::select! {
            biased;
            message = incoming.next() => {
                session.heard();
                let frame = match message {
                    None => return Err(closed("the coordinator closed the connection").into()),
                    Some(Err(status)) => return Err(ended(status)),
                    Some(Ok(frame)) => frame,
                };
                match opener.frame::<v1::ToWorker>(frame) {
                    Ok(Some(message)) => match wire::to_worker_from(message) {
                        Ok(ToWorker::Ping { heartbeat_ms }) => {
                            session.heartbeat = at_least_10(heartbeat_ms);
                            Vec::new()
                        }
                        Ok(message) => driver.handle(WorkerEvent::Told(message)),
                        Err(error) => return Err(Error::Refused(error.to_string()).into()),
                    },
                    Ok(None) => Vec::new(),
                    Err(error) => return Err(closed(&error.to_string()).into()),
                }
            }
            reason = breaks.recv() => {
                let reason = reason.unwrap_or_else(|| "it was closed".into());
                return Err(closed(&format!("the exchange broke: {reason}")).into());
            }
            said = driver.next() => said,
            () = tokio::time::sleep_until(session.due()) => match session.say_late()? {
                true => Vec::new(),
                false => vec![FromWorker::Heartbeat],
            },
            _ = beat.tick() => {
                session.check_silence()?;
                Vec::new()
            }
            changed = leave.changed() => {
                // The sender is gone only when the process ends.
                let _ = changed;
                driver.handle(WorkerEvent::LeaveRequested)
            }
        };
        session.say(said)?;
        session.tell(driver.figures())?;
    }
}

/// What a session keeps while it is open.
struct Session {
    sealer: Sealer,
    out: mpsc::Sender<v1::Frame>,
    silence: Silence,
    /// Time between two looks at the silence.
    beat: Duration,
    /// How long this worker may say nothing.
    heartbeat: Duration,
    last_said: tokio::time::Instant,
    /// What nobody waits for, and since when it is there: it goes out with the next that somebody does.
    late: Vec<(tokio::time::Instant, v1::FromWorker)>,
    started: Instant,
    last_beat: Instant,
}

impl Session {
    /// Queues messages. A queue that is full means that the coordinator does not take any.
    fn say(&mut self, messages: Vec<FromWorker>) -> Result<(), Error> {
        for message in messages {
            if let FromWorker::Applied {
                state_hash: None, ..
            } = message
            {
                let now = tokio::time::Instant::now();
                self.late.push((now, wire::from_worker(message)));
            } else {
                self.say_late()?;
                self.send(&wire::from_worker(message))?;
            }
        }
        Ok(())
    }

    /// Queues what could wait. Says whether there was anything.
    fn say_late(&mut self) -> Result<bool, Error> {
        let late = std::mem::take(&mut self.late);
        for (_, message) in &late {
            self.send(message)?;
        }
        Ok(!late.is_empty())
    }

    /// Queues figures.
    fn tell(&mut self, figures: Vec<Figures>) -> Result<(), Error> {
        for figures in figures {
            self.send(&wire::figures_to(&figures))?;
        }
        Ok(())
    }

    /// When something has to be said, whatever it is.
    fn due(&self) -> tokio::time::Instant {
        let beat = self.last_said + self.heartbeat;
        let oldest = self.late.first();
        oldest.map_or(beat, |(since, _)| beat.min(*since + LATE))
    }

    fn send(&mut self, message: &v1::FromWorker) -> Result<(), Error> {
        self.last_said = tokio::time::Instant::now();
        let sent = self.out.try_send(self.sealer.frame(message));
        sent.map_err(|_| closed(&format!("{OUTBOX} messages wait for the coordinator")))
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn heard(&mut self) {
        self.silence.heard(self.now_ms());
    }

    /// A coordinator that says nothing for too long is gone. While this process stood still it could not hear.
    fn check_silence(&mut self) -> Result<(), Error> {
        let missed = self.last_beat.elapsed().saturating_sub(self.beat);
        self.last_beat = Instant::now();
        if missed > 4 * self.beat {
            self.silence.forgive(missed.as_millis() as u64);
        }
        match self.silence.exceeded(self.now_ms()) {
            Some(silent) => Err(closed(&format!(
                "the coordinator was silent for {silent} ms"
            ))),
            None => Ok(()),
        }
    }
}

fn at_least_10(ms: u32) -> Duration {
    Duration::from_millis(u64::from(ms.max(10)))
}

fn closed(reason: &str) -> Error {
    Error::Session(reason.into())
}

async fn welcome(
    incoming: &mut Streaming<v1::Frame>,
    opener: &mut Opener,
) -> Result<v1::Welcome, Ended> {
    let first = tokio::time::timeout(WELCOME_TIMEOUT, incoming.next()).await;
    let first = first.map_err(|_| Error::Session("no welcome came".into()))?;
    let first = first
        .ok_or_else(|| closed("the coordinator closed the connection"))?
        .map_err(ended)?;
    let first: Option<v1::ToWorker> = opener.frame(first).map_err(|e| closed(&e.to_string()))?;
    match first.and_then(|m| m.kind) {
        Some(v1::to_worker::Kind::Welcome(welcome)) => Ok(welcome),
        other => Err(Error::Refused(format!("it began with {other:?}")).into()),
    }
}

/// Whether the end of a session is worth another try, and with what.
fn ended(status: Status) -> Ended {
    let message = status.message().to_owned();
    if let Some(by) = net::standing_by(&status) {
        return Error::StandsBy(by).into();
    }
    let error = match status.code() {
        Code::FailedPrecondition | Code::Unauthenticated | Code::InvalidArgument => {
            Error::Refused(message)
        }
        Code::ResourceExhausted => Error::Full(message),
        _ => Error::Session(message),
    };
    Ended {
        error,
        forget: status.code() == Code::DataLoss,
    }
}
