//! What listens from the beginning: first it answers that this coordinator stands by and which one leads, and once it leads, all
//! that a coordinator answers. Connections that were opened before stay.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use cohort_common::cluster::lease::Lease;
use cohort_common::net::LEADER_KEY;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request as Call, Response as Reply, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tower::ServiceExt;

use crate::access::{self, Access};

/// What one address answers. Cheap to clone.
#[derive(Clone)]
pub struct Front(Arc<Shared>);

struct Shared {
    /// All that a coordinator answers, once it leads.
    leading: OnceLock<Router>,
    /// What it answers to calls of gRPC until then.
    calls: Router,
    standing: Standing,
}

/// What is known while a coordinator stands by.
#[derive(Clone)]
struct Standing {
    access: Access,
    lease: watch::Receiver<Option<Lease>>,
    /// Where this one is reached: its own lease, of an earlier time, names nobody who leads.
    here: String,
    /// What it has of the store.
    follows: watch::Receiver<String>,
}

impl Front {
    /// What a coordinator answers that stands by.
    pub fn new(
        access: Access,
        here: String,
        lease: watch::Receiver<Option<Lease>>,
        follows: watch::Receiver<String>,
    ) -> Self {
        let standing = Standing {
            access: access.clone(),
            lease,
            here,
            follows,
        };
        let health = tonic::service::Routes::new(HealthServer::new(NotServing));
        let calls = health
            .into_axum_router()
            .fallback_service(Router::new().fallback(call).with_state(standing.clone()))
            .layer(from_fn_with_state(access, access::guard));
        Self(Arc::new(Shared {
            leading: OnceLock::new(),
            calls,
            standing,
        }))
    }

    /// From now on it answers this.
    pub fn lead(&self, routes: Router) {
        // Nobody leads twice in one process.
        let _ = self.0.leading.set(routes);
    }

    /// To be served.
    pub fn router(&self) -> Router {
        Router::new().fallback(answer).with_state(self.clone())
    }
}

async fn answer(State(front): State<Front>, request: Request) -> Response {
    let kind = request.headers().get(CONTENT_TYPE);
    let grpc = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    let routes = match front.0.leading.get() {
        Some(leading) => leading,
        None if grpc => &front.0.calls,
        None => return front.0.standing.page(request.uri().path()),
    };
    match routes.clone().oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

impl Standing {
    /// Where the coordinator is reached that leads, if one does.
    fn leader(&self) -> Option<(String, u64)> {
        let lease = self.lease.borrow();
        let lease = lease.as_ref().filter(|lease| !lease.released)?;
        (lease.url != self.here).then(|| (lease.url.clone(), lease.generation))
    }

    /// What it says of itself, for people.
    fn says(&self) -> String {
        let leads = match self.leader() {
            Some((url, generation)) => {
                format!("{url} leads, or did last (generation {generation})")
            }
            None => "nobody leads yet".into(),
        };
        let follows = self.follows.borrow();
        format!("this coordinator stands by; {leads}; {}", *follows)
    }

    /// What it answers to a browser, and to whoever watches over processes: it is alive, and not ready.
    fn page(&self, path: &str) -> Response {
        if path == "/healthz" {
            return "ok\n".into_response();
        }
        let says = match self.access.is_guarded() {
            // Whoever shows nothing is told no address.
            true => "this coordinator stands by, and another one leads".into(),
            false => self.says(),
        };
        (StatusCode::SERVICE_UNAVAILABLE, format!("{says}\n")).into_response()
    }
}

/// Any call.
async fn call(State(standing): State<Standing>) -> Response {
    let mut status = Status::unavailable(standing.says());
    let leader = standing.leader().map_or_else(String::new, |(url, _)| url);
    let leader = leader
        .parse()
        .unwrap_or_else(|_| "".parse().expect("it is empty"));
    status.metadata_mut().insert(LEADER_KEY, leader);
    status.into_http::<Body>()
}

/// The health of a coordinator that stands by: it cannot do the work of one.
struct NotServing;

fn not_serving() -> HealthCheckResponse {
    HealthCheckResponse {
        status: ServingStatus::NotServing.into(),
    }
}

#[tonic::async_trait]
impl Health for NotServing {
    async fn check(
        &self,
        _: Call<HealthCheckRequest>,
    ) -> Result<Reply<HealthCheckResponse>, Status> {
        Ok(Reply::new(not_serving()))
    }

    type WatchStream = ReceiverStream<Result<HealthCheckResponse, Status>>;

    async fn watch(&self, _: Call<HealthCheckRequest>) -> Result<Reply<Self::WatchStream>, Status> {
        Err(Status::unavailable(
            "this coordinator stands by; ask with Check, or watch the one that leads",
        ))
    }
}
