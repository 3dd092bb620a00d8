//! What a coordinator answers, and where: all services of gRPC and the page, at one address, and the page at another one if that is
//! wanted.

use std::future::{Future, pending};
use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use cohort_common::exchange::{ExchangeServer, ExchangeService};
use cohort_common::net;
use cohort_common::process;
use cohort_common::security::Gate;
use cohort_common::wire::MAX_MESSAGE;
use cohort_proto::v1::client_server::ClientServer;
use cohort_proto::v1::data_server::DataServer;
use cohort_proto::v1::join_server::JoinServer;
use cohort_proto::v1::tokenize_server::TokenizeServer;
use cohort_proto::v1::workers_server::WorkersServer;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic_health::pb::health_server::HealthServer;

use crate::driver::Cluster;
use crate::failover::Front;
use crate::health::{HealthService, Readiness};
use crate::{Config, Error, access, data, drain, join, service, session, tokenizing, web};

/// Where a coordinator listens.
pub struct Place {
    /// Its socket.
    pub listener: TcpListener,
    /// What makes connections private, if they are.
    pub gate: Option<Gate>,
}

/// How what a coordinator answers gets to those who ask.
pub enum Door {
    /// It listens from now on.
    Place(Place),
    /// It listens already, here and where only the page is served.
    Front(Front, Option<Front>),
}

/// Answers until `shutdown` completes and the run that trains is checkpointed.
pub async fn route(
    cluster: Cluster,
    config: Config,
    door: Door,
    shutdown: impl Future<Output = ()> + Send,
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
        room: session::Room::new(process::open_files()),
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
    let routes = Routes::from(Router::new())
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
    let (server, page) = match door {
        Door::Place(Place { listener, gate }) => {
            let page = config.http.map(|listener| (listener, web, gate.clone()));
            (Some((listener, routes, gate)), page)
        }
        Door::Front(front, page) => {
            front.lead(routes);
            if let Some(page) = page {
                page.lead(web);
            }
            (None, None)
        }
    };
    let server = serve_maybe(server);
    let web = serve_maybe(page);
    let ended = async {
        shutdown.await;
        readiness.end();
        drain::drain(&cluster, config.grace).await;
    };
    // Streams of workers and followers never end by themselves, so there is nothing to wait for: they are cut.
    tokio::select! {
        served = server => served,
        served = web => served,
        () = ended => Ok(()),
    }
}

/// Serves, if there is something to be served.
async fn serve_maybe(what: Option<(TcpListener, Router, Option<Gate>)>) -> Result<(), Error> {
    match what {
        Some((listener, routes, gate)) => serve_at(listener, routes, gate).await,
        None => pending().await,
    }
}

/// Serves until the process ends.
pub async fn serve_at(
    listener: TcpListener,
    routes: Router,
    gate: Option<Gate>,
) -> Result<(), Error> {
    let server = net::server().accept_http1(true).add_routes(routes.into());
    let served = server.serve_with_incoming(net::connections(listener, gate));
    Ok(served.await?)
}
