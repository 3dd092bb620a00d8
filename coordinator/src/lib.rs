//! Cohort's coordinator: it owns the cluster's decisions (through the pure machine in `cohort_common::cluster`), sums
//! the gradients of a star, and keeps runs, ledgers, corpora and checkpoints in its home directory. It never computes a
//! model and knows no candle.

mod audit;
mod corpora;
mod data;
mod driver;
pub mod exchange;
mod figures;
mod happenings;
mod history;
mod ledger;
pub mod offline;
mod plan;
mod query;
mod record;
mod recover;
mod runs;
mod service;
mod session;
mod status;
pub mod store;
mod system;
mod trace;
mod view;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use cohort_common::cluster::Limits;
use cohort_common::home::{Home, HomeError};
use cohort_common::net::{self, Token};
use cohort_common::traces::Traces;
use cohort_common::wire::MAX_MESSAGE;
use cohort_proto::v1::client_server::ClientServer;
use cohort_proto::v1::data_server::DataServer;
use cohort_proto::v1::exchange_server::ExchangeServer;
use cohort_proto::v1::workers_server::WorkersServer;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Status};
use tracing::info;

use crate::driver::Cluster;
use crate::store::{Store, StoreError, StoreHandle};

/// How a coordinator is set up.
#[derive(Debug)]
pub struct Config {
    /// The directory for everything it keeps.
    pub home: PathBuf,
    /// What every call must carry, if anything.
    pub token: Option<Token>,
    /// Deadlines.
    pub limits: Limits,
    /// Where traces of steps go, if anywhere.
    pub traces: Traces,
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

/// Serves until `shutdown` completes. Takes the home's lock, publishes its own address there, takes in runs that the
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
    let (cluster, driver) = Cluster::start(home, store, config.limits, config.traces.clone());
    runs::take_up(&cluster).await;
    let url = format!("http://{}", listener.local_addr()?);
    lock.publish(&url)?;
    info!(url, home = %config.home.display(), "listening");
    let served = tokio::select! {
        served = route(cluster, config, listener, shutdown) => served,
        ended = driver => Err(Error::Driver(ended.err().map_or_else(String::new, |e| e.to_string()))),
    };
    // The store closes when its last handle is gone; whatever was recorded is then on disk.
    drop(thread);
    served
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
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let token = config.token;
    let check = move |request: Request<()>| match &token {
        Some(token) if !token.admits(request.metadata().get("authorization")) => {
            Err(Status::unauthenticated(
                "the coordinator wants a token that this call does not carry; give --token-file or COHORT_TOKEN",
            ))
        }
        _ => Ok(request),
    };
    macro_rules! guarded {
        ($server:ident, $service:expr) => {
            tonic::service::interceptor::InterceptedService::new(
                $server::new($service)
                    .max_decoding_message_size(MAX_MESSAGE)
                    .max_encoding_message_size(MAX_MESSAGE),
                check.clone(),
            )
        };
    }
    let limits = config.limits;
    let sessions = session::WorkersService {
        cluster: cluster.clone(),
        limits,
    };
    let exchange = exchange::ExchangeService {
        exchange: cluster.exchange().clone(),
        host: Arc::new(cluster.clone()),
    };
    let data = data::DataService {
        cluster: cluster.clone(),
    };
    let client = service::ClientService { cluster };
    // `serve_with_incoming` leaves the sockets as they are, so delays are switched off here.
    let incoming = TcpListenerStream::new(listener).map(|stream| {
        let stream = stream?;
        stream.set_nodelay(true)?;
        Ok::<_, std::io::Error>(stream)
    });
    let server = net::server()
        .add_service(guarded!(WorkersServer, sessions))
        .add_service(guarded!(ExchangeServer, exchange))
        .add_service(guarded!(DataServer, data))
        .add_service(guarded!(ClientServer, client))
        .serve_with_incoming(incoming);
    // Streams of workers and followers never end by themselves, so there is nothing to wait for: they are cut.
    tokio::select! {
        served = server => Ok(served?),
        () = shutdown => Ok(()),
    }
}
