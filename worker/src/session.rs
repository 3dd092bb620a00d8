//! One session with a coordinator: register, then obey until the connection ends.

use std::convert::Infallible;
use std::time::Duration;

use cohort_common::cluster::FromWorker;
use cohort_common::net::{self, Credentials};
use cohort_common::wire::{self, MAX_MESSAGE};
use cohort_proto::v1;
use cohort_proto::v1::workers_client::WorkersClient;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tracing::info;

use crate::driver::Driver;
use crate::{Config, Error, engine};

/// Messages to the coordinator that may wait.
const OUTBOX: usize = 256;

/// How long the coordinator may take to say welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(20);

/// What the worker says of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    device: String,
    fingerprint: String,
    threads: u32,
}

impl Identity {
    /// Opens the device once to learn its name and its numerics.
    pub fn of(config: &Config) -> Result<Self, Error> {
        let (device, fingerprint) = engine::describe_device(config.device)?;
        Ok(Self {
            device,
            fingerprint,
            threads: engine::thread_count(config.threads) as u32,
        })
    }

    fn register(&self) -> v1::Register {
        v1::Register {
            protocol: wire::PROTOCOL,
            version: env!("CARGO_PKG_VERSION").into(),
            host: hostname(),
            pid: std::process::id(),
            device: self.device.clone(),
            threads: self.threads,
            fingerprint: self.fingerprint.clone(),
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
pub async fn serve(config: &Config, identity: &Identity) -> Result<Infallible, Error> {
    let channel = net::connect(&config.coordinator).await?;
    let credentials = Credentials {
        token: config.token.clone(),
        ..Credentials::default()
    };
    let mut client = WorkersClient::with_interceptor(channel, credentials.clone())
        .max_decoding_message_size(MAX_MESSAGE);
    let (out, outgoing) = mpsc::channel(OUTBOX);
    let kind = Some(v1::from_worker::Kind::Register(identity.register()));
    let first = v1::FromWorker { kind };
    out.send(first).await.expect("the receiver is right here");
    let response = client.session(ReceiverStream::new(outgoing)).await;
    let mut incoming = response.map_err(ended)?.into_inner();
    let welcome = welcome(&mut incoming).await?;
    info!(
        session = welcome.session as u32,
        coordinator = welcome.version,
        url = config.coordinator,
        "joined"
    );
    let heart = tokio::spawn(beat(out.clone(), welcome.heartbeat_ms));
    let credentials = Credentials {
        session: Some(welcome.session),
        ..credentials
    };
    let driver = Driver::start(config.clone(), credentials, out).await?;
    let reason = obey(driver, incoming).await;
    heart.abort();
    Err(reason)
}

async fn obey(mut driver: Driver, mut incoming: Streaming<v1::ToWorker>) -> Error {
    loop {
        let message = match incoming.next().await {
            None => return Error::Session("the coordinator closed the connection".into()),
            Some(Err(status)) => return ended(status),
            Some(Ok(message)) => message,
        };
        match wire::to_worker_from(message) {
            Ok(message) => driver.obey(message).await,
            Err(error) => return Error::Refused(error.to_string()),
        }
    }
}

async fn welcome(incoming: &mut Streaming<v1::ToWorker>) -> Result<v1::Welcome, Error> {
    let first = tokio::time::timeout(WELCOME_TIMEOUT, incoming.next()).await;
    let first = first.map_err(|_| Error::Session("no welcome came".into()))?;
    let first = first
        .ok_or_else(|| Error::Session("the coordinator closed the connection".into()))?
        .map_err(ended)?;
    match first.kind {
        Some(v1::to_worker::Kind::Welcome(welcome)) => Ok(welcome),
        other => Err(Error::Refused(format!("it began with {other:?}"))),
    }
}

/// Says that the process is alive, whatever the trainer is doing.
async fn beat(out: mpsc::Sender<v1::FromWorker>, every_ms: u32) {
    let mut interval = tokio::time::interval(Duration::from_millis(u64::from(every_ms.max(10))));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if out
            .send(wire::from_worker(FromWorker::Heartbeat))
            .await
            .is_err()
        {
            return;
        }
    }
}

/// Whether the end of a session is worth another try.
fn ended(status: Status) -> Error {
    let message = status.message().to_owned();
    match status.code() {
        Code::FailedPrecondition | Code::Unauthenticated | Code::InvalidArgument => {
            Error::Refused(message)
        }
        _ => Error::Session(message),
    }
}
