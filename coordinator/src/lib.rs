//! Cohort's coordinator: it owns the cluster's decisions (through the pure machine in `cohort_common::cluster`), sums
//! the gradients of a star, and keeps runs, ledgers, corpora and checkpoints in its home directory. It never computes a
//! model and knows no candle.

pub mod access;
mod actions;
mod audit;
mod corpora;
mod data;
mod drain;
mod driver;
mod failover;
mod fetched;
mod figures;
mod following;
mod happenings;
mod health;
mod history;
mod join;
mod ledger;
mod metrics;
mod notify;
pub mod offline;
mod plan;
pub mod prometheus;
mod query;
mod readers;
mod record;
mod recover;
mod remote;
mod runs;
mod samples;
mod service;
mod serving;
mod session;
mod slices;
mod status;
pub mod store;
mod system;
mod tensorboard;
mod tokenizing;
mod trace;
mod view;
mod web;

use std::future::{Future, pending};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cohort_common::cluster::Limits;
use cohort_common::home::{Home, HomeError};
use cohort_common::security::{Gate, SecurityError};
use cohort_common::traces::Traces;
use tokio::net::TcpListener;
use tonic::Status;
use tracing::info;

use crate::access::Access;
use crate::driver::Cluster;
use crate::failover::{Front, Standby, Taken};
use crate::notify::Notices;
use crate::remote::Remote;
use crate::serving::{Door, Place, route, serve_at};
use crate::store::{Store, StoreError, StoreHandle};
use crate::tensorboard::Exporter;

pub use crate::failover::FailoverConfig;
pub use crate::notify::NotifyConfig;

/// How a coordinator is set up.
#[derive(Debug)]
pub struct Config {
    /// The directory for everything it keeps.
    pub home: PathBuf,
    /// What guards it. Where it can tell workers by certificates, all connections are private.
    pub access: Access,
    /// How long certificates last.
    pub certificate_life: Duration,
    /// Deadlines.
    pub limits: Limits,
    /// How long a run may take to be checkpointed when the process is asked to end.
    pub grace: Duration,
    /// Who sums gradients.
    pub exchange: Topology,
    /// Where the page is served besides the coordinator's own address.
    pub http: Option<TcpListener>,
    /// Where event files for TensorBoard are kept up to date, if anywhere.
    pub tensorboard: Option<PathBuf>,
    /// Who is told what becomes of runs.
    pub notify: NotifyConfig,
    /// The URL of the object store that checkpoints and corpora are copied to, if there is one.
    pub store: Option<String>,
    /// How it takes part where other coordinators share that store and stand by, if they do.
    pub failover: Option<FailoverConfig>,
    /// Where traces of steps go, if anywhere.
    pub traces: Traces,
}

/// Who sums the gradients of a run that several workers train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Topology {
    /// The coordinator, in memory that is shared, where a worker is on its host; else the workers, a slice each, as long as
    /// all of them reach each other; else the coordinator.
    #[default]
    Auto,
    /// The coordinator.
    Star,
    /// The workers, a slice each, as long as all of them reach each other. No memory is shared.
    Sharded,
}

/// Why a coordinator cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The home directory.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Keys and certificates.
    #[error(transparent)]
    Security(#[from] SecurityError),
    /// The network.
    #[error("cannot serve")]
    Serve(#[from] tonic::transport::Error),
    /// The listener.
    #[error("cannot tell where the coordinator listens")]
    Listener(#[from] std::io::Error),
    /// The driver is gone.
    #[error(
        "the coordinator contradicted itself and stopped ({0}); start it again, its runs go on, and report the log"
    )]
    Driver(String),
    /// It may not lead any more.
    #[error(
        "this coordinator leads no more: {0}; it has committed nothing since, and its workers go to whoever leads"
    )]
    Fenced(String),
    /// An answer for people.
    #[error("{0}")]
    Answer(String),
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Answer(status.message().to_owned())
    }
}

/// Serves until `shutdown` completes and the run that trains is checkpointed. Takes the home's lock for the rest of the process's
/// life, publishes its own address there, takes in runs that the database does not know, and takes up those that were under way;
/// where other coordinators share its store, it does the latter when it leads.
pub async fn serve(
    config: Config,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let home = Home::open(&config.home)?;
    let mut lock = home.lock()?;
    remove_unfinished(&home)?;
    let store = Store::open(&home.database())?;
    let (store, thread) = StoreHandle::spawn(store);
    recover::take_in(&home, &store).await;
    let remote = match &config.store {
        // What is there is looked at as soon as it is known who leads.
        Some(url) if config.failover.is_some() => Some(Remote::new(url, &home)?),
        Some(url) => Some(open_remote(url, &home, &store).await?),
        None => None,
    };
    let gate = match &config.access {
        Access::Cluster(security) => Some(Gate::of_coordinator(
            security.clone(),
            config.certificate_life,
            access::now,
        )?),
        Access::Open | Access::Shared(_) => None,
    };
    let scheme = if gate.is_some() { "https" } else { "http" };
    let url = format!("{scheme}://{}", listener.local_addr()?);
    let page = match &config.http {
        Some(http) => http.local_addr()?,
        None => listener.local_addr()?,
    };
    let path = config.home.clone();
    let mut publish = || -> Result<(), Error> {
        lock.publish(&url)?;
        info!(url, home = %path.display(), "listening");
        info!("watch it at {}", page_at(scheme, page));
        Ok(())
    };
    let place = Place { listener, gate };
    let served = match config.failover.clone() {
        None => {
            let began = Began {
                home,
                store,
                remote,
                leadership: None,
            };
            lead(began, config, Door::Place(place), publish, shutdown).await
        }
        Some(failover) => {
            publish()?;
            let began = (home, store, remote);
            stand_by(began, failover, config, place, shutdown).await
        }
    };
    // The store closes when its last handle is gone; whatever was recorded is then on disk.
    drop(thread);
    // The lock ends with the process: a thread that still removes or writes files may outlive this function, and whoever
    // comes next must not meet it.
    lock.withdraw();
    std::mem::forget(lock);
    served
}

/// What a coordinator has when it begins to lead.
struct Began {
    home: Home,
    store: StoreHandle,
    remote: Option<Remote>,
    /// That it leads, where others stand by.
    leadership: Option<Taken>,
}

/// Stands by until it leads, and leads until it may not any more.
async fn stand_by(
    (home, store, remote): (Home, StoreHandle, Option<Remote>),
    failover: FailoverConfig,
    mut config: Config,
    place: Place,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let remote = remote.ok_or_else(|| Error::Answer(NO_STORE.into()))?;
    if remote.bucket().is_directory() {
        return Err(Error::Answer(format!(
            "`{}` is a directory, and which coordinator leads is decided by conditional writes of an object store, which directories \
             do not have, least of all on a network file system; use `s3://`, `gs://` or `az://`, or leave `--failover` out",
            remote.url()
        )));
    }
    let here = &failover.url;
    let standby = Standby::new(&failover, remote.clone(), store.clone());
    let front = || {
        let (seen, follows) = (standby.seen(), standby.follows());
        Front::new(config.access.clone(), here.clone(), seen, follows)
    };
    let (main, page) = (front(), config.http.as_ref().map(|_| front()));
    let serving = serve_at(place.listener, main.router(), place.gate.clone());
    let http = config.http.take();
    let serving_page = async {
        match (http, &page) {
            (Some(listener), Some(page)) => {
                serve_at(listener, page.router(), place.gate.clone()).await
            }
            _ => pending().await,
        }
    };
    let door = Door::Front(main.clone(), page.clone());
    let work = async {
        tokio::pin!(shutdown);
        let taken = tokio::select! {
            taken = standby.lead() => taken?,
            () = &mut shutdown => return Ok(()),
        };
        remote.lead(taken.leadership.clone());
        let began = Began {
            home,
            store,
            remote: Some(remote),
            leadership: Some(taken),
        };
        lead(began, config, door, || Ok(()), shutdown).await
    };
    tokio::select! {
        served = serving => served,
        served = serving_page => served,
        worked = work => worked,
    }
}

/// Leads: serves until `shutdown` completes and the run that trains is checkpointed, or until it may lead no more. `publish` is
/// done when it is about to answer.
async fn lead(
    began: Began,
    config: Config,
    door: Door,
    publish: impl FnOnce() -> Result<(), Error>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let Began {
        home,
        store,
        remote,
        leadership,
    } = began;
    let notices = Notices::start(config.notify.clone());
    let traces = config.traces.clone();
    let (cluster, mut driver) = Cluster::start(
        home,
        store,
        (config.limits, config.exchange),
        notices.clone(),
        traces,
        remote.clone(),
    );
    let exporter = exporter(&cluster, config.tensorboard.as_deref())?;
    runs::take_up(&cluster).await;
    let uploader = match &remote {
        Some(remote) => Some(remote.start(&cluster).await),
        None => None,
    };
    publish()?;
    let (leadership, mut keeper) = match leadership {
        Some(Taken { leadership, keeper }) => (Some(leadership), Some(keeper)),
        None => (None, None),
    };
    let fenced = async {
        match &mut keeper {
            Some(keeper) => keeper.fenced().await,
            None => pending().await,
        }
    };
    let served = tokio::select! {
        biased;
        why = fenced => return Err(Error::Fenced(why)),
        served = route(cluster.clone(), config, door, shutdown) => served,
        ended = &mut driver => match ended {
            // It looks at the clock itself, and may be faster.
            Ok(()) => return Err(Error::Fenced("the lease was not renewed in time".into())),
            Err(error) => Err(Error::Driver(error.to_string())),
        },
    };
    if let Some(exporter) = exporter {
        exporter.finish().await;
    }
    if let Some(leadership) = &leadership {
        leadership.stop();
        // Nothing is committed behind what is written last.
        if !driver.is_finished() {
            let _ = driver.await;
        }
    }
    if let Some(uploader) = uploader {
        uploader.finish(&cluster).await;
    }
    if let Some(keeper) = keeper {
        keeper.release().await;
    }
    notices.close().await;
    served
}

/// What is said to whoever wants others to stand by without a store.
const NO_STORE: &str = "coordinators that stand by for each other need an object store in common: add `--store s3://BUCKET/PREFIX` \
                        (or gs, az), the same for each";

/// Opens the object store, and takes in what only it knows. One that cannot be reached is tried again later.
async fn open_remote(url: &str, home: &Home, store: &StoreHandle) -> Result<Remote, Error> {
    let (remote, reached) = Remote::open(url, home).await?;
    if reached && let Err(error) = remote::take_in(&remote, store).await {
        let error = status::chain(&error);
        tracing::warn!(
            error,
            "cannot see which runs the store has; it is tried again"
        );
    }
    Ok(remote)
}

/// The page's address for a browser on this machine.
fn page_at(scheme: &str, mut address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    format!("{scheme}://{address}/")
}

/// Starts whoever keeps event files for TensorBoard up to date, if that is wanted.
fn exporter(cluster: &Cluster, directory: Option<&Path>) -> Result<Option<Exporter>, Error> {
    let start = |directory: &Path| {
        Exporter::start(cluster.clone(), directory.to_owned()).map_err(|error| {
            Error::Answer(format!(
                "cannot make the directory `{}` for TensorBoard: {error}; choose another with `--tensorboard`",
                directory.display()
            ))
        })
    };
    directory.map(start).transpose()
}

/// Deletes what a coordinator that was killed has left half-written. Only the holder of the lock may.
fn remove_unfinished(home: &Home) -> Result<(), Error> {
    let answer = |error: &dyn std::fmt::Display| Error::Answer(error.to_string());
    let mut removed = cohort_common::corpus::remove_unfinished(&home.corpora())
        .map_err(|error| answer(&error))?;
    for entry in std::fs::read_dir(home.runs())
        .into_iter()
        .flatten()
        .flatten()
    {
        let checkpoints = entry.path().join("checkpoints");
        removed += cohort_common::checkpoint::remove_unfinished(&checkpoints)
            .map_err(|error| answer(&error))?;
    }
    if removed > 0 {
        info!(removed, "deleted what was left half-written");
    }
    Ok(())
}
