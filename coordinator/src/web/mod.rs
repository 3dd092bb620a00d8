//! The coordinator by HTTP: the page, what it shows as JSON, the live stream, actions, metrics and health. It is served
//! on the port of gRPC, and, where one is asked for, on another. `docs/http.md` has every route.
//!
//! Nothing here decides anything or keeps anything: figures come from `view.rs`, actions are those of `actions.rs`, which
//! gRPC has too.

mod api;
mod assets;
mod auth;
mod error;
mod feed;
mod health;
mod live;
mod message;
mod query;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{StatusCode, Version};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::sync::Semaphore;
use tonic::Status;

use self::auth::Auth;
use self::error::Failure;
use self::feed::Feed;
use crate::access::Access;
use crate::driver::Cluster;
use crate::health::Readiness;

/// Bytes of a request's body, at most: a token and its frame.
const MAX_BODY: usize = 4096;

/// What a browser may do with what is served here: show the page's own files, and ask its own origin.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What the handlers share.
pub(crate) struct Web {
    cluster: Cluster,
    auth: Auth,
    feed: Feed,
    readiness: Arc<Readiness>,
    /// Places of live streams.
    streams: Arc<Semaphore>,
}

/// All routes of a cluster that is guarded so.
pub fn router(cluster: Cluster, access: Access, readiness: Arc<Readiness>) -> Router {
    let web = Arc::new(Web {
        feed: Feed::start(cluster.clone()),
        auth: Auth::new(access),
        streams: Arc::new(Semaphore::new(live::STREAMS)),
        readiness,
        cluster,
    });
    let guarded = Router::new()
        .route("/api/cluster", get(api::cluster))
        .route("/api/runs", get(api::runs))
        .route("/api/runs/{name}", get(api::run))
        .route("/api/runs/{name}/history", get(api::history))
        .route("/api/runs/{name}/pause", post(api::pause))
        .route("/api/runs/{name}/resume", post(api::resume))
        .route("/api/runs/{name}/cancel", post(api::cancel))
        .route("/api/runs/{name}/checkpoint", post(api::checkpoint))
        .route("/api/live", get(live::live))
        .route("/metrics", get(api::metrics))
        .layer(from_fn_with_state(web.clone(), auth::require_token));
    let session = get(auth::session)
        .post(auth::sign_in)
        .delete(auth::sign_out);
    let open = Router::new()
        .route("/", get(assets::page))
        .route("/runs/{name}", get(assets::page))
        .route("/compare", get(assets::page))
        .route("/page/{*file}", get(assets::file))
        .route("/api/session", session);
    guarded
        .merge(open)
        .layer(from_fn_with_state(web.clone(), auth::require_own_name))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn(harden))
        .with_state(web)
}

/// Adds to every answer what keeps a browser from doing more with it than showing it.
async fn harden(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    let fresh = HeaderValue::from_static("no-store");
    headers.entry(CACHE_CONTROL).or_insert(fresh);
    response
}

async fn unknown(request: Request) -> Response {
    if is_grpc(request.headers()) {
        let text = format!("this coordinator does not know {}", request.uri().path());
        return Status::unimplemented(text).into_http::<Body>();
    }
    Failure::missing(format!(
        "there is nothing at `{}`; docs/http.md lists what there is",
        request.uri().path()
    ))
    .into_response()
}

async fn wrong_method(request: Request) -> Failure {
    Failure::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!(
            "`{}` cannot be asked for with {}; the header `allow` says with what",
            request.uri().path(),
            request.method()
        ),
    )
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Routes of gRPC, closed to HTTP/1: no client of gRPC speaks it, but a page of another origin could.
pub fn only_http2(routes: Router) -> Router {
    routes.route_layer(from_fn(async |request: Request, next: Next| {
        if request.version() >= Version::HTTP_2 {
            return next.run(request).await;
        }
        let text = "calls of gRPC come by HTTP/2; what HTTP/1 can ask for is in docs/http.md";
        Failure::new(StatusCode::HTTP_VERSION_NOT_SUPPORTED, text).into_response()
    }))
}
