//! Cohort's worker: it joins a coordinator, computes the lanes it is given, takes part in the exchange, and applies what
//! is committed. Tensors belong to one trainer thread; everything that waits for the network runs on tokio beside it.

mod data;
mod driver;
mod elsewhere;
pub mod engine;
mod entrance;
mod evaluation;
pub mod exchange;
mod figures;
mod join;
mod kept;
mod lanes;
mod measure;
mod observe;
mod peak;
mod replay;
mod session;
mod state;
mod tokenizing;
mod trace;
mod trainer;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use cohort_common::net::{ConnectError, Credentials, Places, StandsBy, Token};
use cohort_common::security::{SecurityError, Trust};
use cohort_common::traces::Traces;
use driver::Driver;
use engine::{DeviceChoice, EngineError};
use exchange::Entrance;
use tokio::sync::watch;
use tracing::{info, warn};

pub use measure::measure;
pub use replay::{Replay, replay};

/// How a worker is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the coordinators listen of which one leads, such as `http://host:7070`.
    pub coordinators: Places,
    /// What every call carries, if anything. Where the cluster is encrypted, it gets the worker a certificate instead.
    pub token: Option<Token>,
    /// By what the cluster is known, and the worker to it, once it has come in.
    pub trust: Option<Trust>,
    /// What computes.
    pub device: DeviceChoice,
    /// Threads that compute; 0 takes one per core.
    pub threads: usize,
    /// Directory for shards and states.
    pub cache: PathBuf,
    /// Whether gradients may stay in shared memory where the coordinator is on this host.
    pub shared_memory: bool,
    /// Where other workers can push gradients to it.
    pub entrance: EntranceAddress,
    /// Which site it is of; workers of one are near each other. Else the coordinator finds out.
    pub site: Option<String>,
    /// How long handing over may take when the process is asked to end.
    pub grace: Duration,
    /// Where traces of steps go, if anywhere.
    pub traces: Traces,
}

/// Where other workers can push gradients to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntranceAddress {
    /// At the address by which this machine reaches the coordinator, at a free port.
    Auto,
    /// Here; an address without a host is completed like that.
    At(SocketAddr),
    /// Nowhere.
    Nowhere,
}

/// Why a worker ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The coordinator does not want it.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// The coordinator has as many workers as it can have.
    #[error("the coordinator has no room for this worker: {0}")]
    Full(String),
    /// It has no certificate, and nothing that would get it one.
    #[error(
        "{0} is encrypted, and this worker has no certificate of that cluster yet; start it once with a token of `cohort init` or `cohort token create --role worker`, in COHORT_TOKEN or with --token-file"
    )]
    NoIdentity(String),
    /// Keys and certificates.
    #[error(transparent)]
    Security(SecurityError),
    /// The device or the model.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The cache directory.
    #[error("cannot write to the cache `{path}`: {source}; choose another with `--home`", path = path.display())]
    Cache {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The address for other workers.
    #[error(
        "cannot listen on {address} for other workers: {source}; choose another with `--exchange-listen`, or `none`"
    )]
    Entrance {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The address for other workers is open to everybody.
    #[error(
        "refusing to listen on {0} for other workers without a token: everybody who reaches it could change what is trained; give the coordinator and all workers one with `--token-file`, or use `--exchange-listen none`"
    )]
    OpenEntrance(SocketAddr),
    /// Another coordinator leads, or none.
    #[error("{}", .0.says)]
    StandsBy(StandsBy),
    /// The connection broke.
    #[error("the session ended: {0}")]
    Session(String),
    /// Steps that cannot be computed again.
    #[error("the replay stopped: {0}")]
    Replay(String),
}

/// First and last pause between attempts to reach the coordinator again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Works until `shutdown` completes and the work is handed over, or the coordinator refuses. Where the coordinator is
/// lost, it is looked for again, and what is in memory goes on. The first connection must succeed, so that a wrong
/// address is noticed at once.
pub async fn run(
    mut config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    std::fs::create_dir_all(&config.cache).map_err(|source| Error::Cache {
        path: config.cache.clone(),
        source,
    })?;
    join::enter(&mut config).await?;
    let entrance = entrance::open(&config).await?;
    let mut identity = session::Identity::of(&config)?;
    identity.listens = entrance.as_ref().map(|e| e.address().to_owned());
    let (asked, leave) = watch::channel(false);
    let grace = config.grace;
    tokio::select! {
        ended = keep_working(config, &identity, entrance, leave) => ended,
        () = async {
            shutdown.await;
            info!("asked to end: handing over");
            asked.send_replace(true);
            tokio::time::sleep(grace).await;
            warn!(grace_s = grace.as_secs_f64(), "not handed over in time; leaving");
        } => Ok(()),
    }
}

async fn keep_working(
    config: Config,
    identity: &session::Identity,
    entrance: Option<Entrance>,
    mut leave: watch::Receiver<bool>,
) -> Result<(), Error> {
    let mut driver = Driver::start(config.clone(), entrance);
    let mut pause = BACKOFF.0;
    let mut joined = false;
    // Where a coordinator that stands by has said that another leads.
    let mut hint = None;
    loop {
        let end = match leader(&config, hint.take()).await {
            Ok(url) => {
                let Err(end) =
                    session::serve(&config, &url, identity, &mut driver, &mut leave).await;
                end
            }
            Err(error) => Error::from(error).into(),
        };
        driver.down(end.forget).await;
        if *leave.borrow() {
            return Ok(());
        }
        match end.error {
            Error::Session(reason) => {
                warn!(reason, "session ended; joining again");
                joined = true;
                pause = BACKOFF.0;
            }
            Error::StandsBy(by) => {
                info!(says = by.says, "waiting for the coordinator that leads");
                joined = true;
                // At once to one that was just named, but not in a circle.
                pause = match by.leader {
                    Some(_) => BACKOFF.0,
                    None => (pause * 2).min(BACKOFF.1),
                };
                hint = by.leader;
            }
            Error::Connect(error @ ConnectError::NobodyLeads(_)) => {
                info!(%error, "waiting for a coordinator that leads");
                joined = true;
                pause = (pause * 2).min(BACKOFF.1);
            }
            Error::Connect(error) if joined => {
                info!(%error, "waiting for the coordinator");
                pause = (pause * 2).min(BACKOFF.1);
            }
            // Perhaps the place that it had before is not free yet.
            Error::Full(reason) if joined => {
                info!(reason, "waiting for a place at the coordinator");
                pause = (pause * 2).min(BACKOFF.1);
            }
            error => return Err(error),
        }
        let rest = tokio::time::sleep(pause.mul_f64(jitter()));
        tokio::pin!(rest);
        loop {
            tokio::select! {
                () = &mut rest => break,
                // Nobody is there to hear it, but the state may change.
                _ = driver.next() => {}
                changed = leave.changed() => {
                    let _ = changed;
                    return Ok(());
                }
            }
        }
    }
}

/// Where the coordinator is that leads: the only one that is named, or that another has named, or the one that says so.
async fn leader(config: &Config, hint: Option<String>) -> Result<String, ConnectError> {
    if let Some(hint) = hint {
        return Ok(hint);
    }
    if config.coordinators.is_single() {
        return Ok(config.coordinators.first().to_owned());
    }
    let credentials = Credentials {
        token: config.token.clone(),
        trust: config.trust.clone(),
        ..Credentials::default()
    };
    let found = config.coordinators.leader(&credentials).await?;
    Ok(found.url)
}

/// Between 0.5 and 1.5, different for each process and moment: spreads reconnections. No result depends on it.
fn jitter() -> f64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |t| t.subsec_nanos());
    let counter = [now, std::process::id(), 0, 0];
    0.5 + f64::from(cohort_common::rng::unit_f32(
        cohort_common::rng::philox(0, counter)[0],
    ))
}
