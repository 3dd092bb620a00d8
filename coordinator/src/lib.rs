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
mod fetched;
mod figures;
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
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::from_fn_with_state;
use cohort_common::cluster::Limits;
use cohort_common::exchange::{ExchangeServer, ExchangeService};
use cohort_common::home::{Home, HomeError};
use cohort_common::net;
use cohort_common::security::{Gate, SecurityError};
use cohort_common::traces::Traces;
use cohort_common::wire::MAX_MESSAGE;
use cohort_proto::v1::client_server::ClientServer;
use cohort_proto::v1::data_server::DataServer;
use cohort_proto::v1::join_server::JoinServer;
use cohort_proto::v1::tokenize_server::TokenizeServer;
use cohort_proto::v1::workers_server::WorkersServer;
use tokio::net::TcpListener;
use tonic::Status;
use tonic::service::Routes;
use tonic_health::pb::health_server::HealthServer;
use tracing::info;

use crate::access::Access;
use crate::driver::Cluster;
use crate::health::{HealthService, Readiness};
use crate::notify::Notices;
use crate::remote::Remote;
use crate::store::{Store, StoreError, StoreHandle};
use crate::tensorboard::Exporter;

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
    /// An answer for people.
    #[error("{0}")]
    Answer(String),
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Answer(status.message().to_owned())
    }
}

/// Serves until `shutdown` completes and the run that trains is checkpointed. Takes the home's lock for the rest of the process's life, publishes its own address there, takes in runs that the
/// database does not know, and takes up those that were under way.
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
        Some(url) => Some(open_remote(url, &home, &store).await?),
        None => None,
    };
    let notices = Notices::start(config.notify.clone());
    let traces = config.traces.clone();
    let (cluster, driver) = Cluster::start(
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
    lock.publish(&url)?;
    info!(url, home = %config.home.display(), "listening");
    let page = match &config.http {
        Some(http) => http.local_addr()?,
        None => listener.local_addr()?,
    };
    info!("watch it at {}", page_at(scheme, page));
    let served = tokio::select! {
        served = route(cluster, config, listener, gate, shutdown) => served,
        ended = driver => Err(Error::Driver(ended.err().map_or_else(String::new, |e| e.to_string()))),
    };
    if let Some(exporter) = exporter {
        exporter.finish().await;
    }
    if let Some(uploader) = uploader {
        uploader.finish().await;
    }
    notices.close().await;
    // The store closes when its last handle is gone; whatever was recorded is then on disk.
    drop(thread);
    // The lock ends with the process: a thread that still removes or writes files may outlive this function, and whoever
    // comes next must not meet it.
    lock.withdraw();
    std::mem::forget(lock);
    served
}

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

async fn route(
    cluster: Cluster,
    config: Config,
    listener: TcpListener,
    gate: Option<Gate>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    macro_rules! bounded {
        ($server:ident, $service:expr) => {
            $server::new($service)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE)
        };
    }
    let access = config.access;
    let limits = config.limits;
    let sessions = session::WorkersService {
        cluster: cluster.clone(),
        access: access.clone(),
        limits,
    };
    let join = join::JoinService {
        access: access.clone(),
        life: config.certificate_life,
    };
    let exchange = ExchangeService {
        exchange: cluster.exchange().clone(),
        host: Arc::new(cluster.clone()),
    };
    let data = data::DataService {
        cluster: cluster.clone(),
        slices: Arc::default(),
    };
    let tokenize = tokenizing::TokenizeService {
        cluster: cluster.clone(),
    };
    let client = service::ClientService {
        cluster: cluster.clone(),
        access: access.clone(),
    };
    let readiness = Arc::new(Readiness::new(cluster.clone()));
    let web = web::router(cluster.clone(), access.clone(), readiness.clone());
    let routes = Routes::from(axum::Router::new())
        .add_service(HealthServer::new(HealthService::new(readiness.clone())))
        .add_service(JoinServer::new(join))
        .add_service(bounded!(WorkersServer, sessions))
        .add_service(ExchangeServer::new(exchange))
        .add_service(bounded!(DataServer, data))
        .add_service(bounded!(TokenizeServer, tokenize))
        .add_service(bounded!(ClientServer, client));
    let routes = routes
        .into_axum_router()
        .route_layer(from_fn_with_state(access, access::guard));
    // What stands around the web's routes, and bounds them, does not stand around gRPC's.
    let routes = web::only_http2(routes).merge(web.clone());
    let server = net::server()
        .accept_http1(true)
        .add_routes(routes.into())
        .serve_with_incoming(net::connections(listener, gate.clone()));
    let web = async {
        match config.http {
            None => pending().await,
            Some(listener) => {
                let server = net::server().accept_http1(true).add_routes(web.into());
                server
                    .serve_with_incoming(net::connections(listener, gate))
                    .await
            }
        }
    };
    let ended = async {
        shutdown.await;
        readiness.end();
        drain::drain(&cluster, config.grace).await;
    };
    // Streams of workers and followers never end by themselves, so there is nothing to wait for: they are cut.
    tokio::select! {
        served = server => Ok(served?),
        served = web => Ok(served?),
        () = ended => Ok(()),
    }
}
