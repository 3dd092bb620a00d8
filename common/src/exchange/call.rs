//! The call `cohort.v1.Exchange/PushPull` at both of its ends, below tonic's codecs (`body.rs` says why).

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use cohort_proto::v1;
use http::header::{CONTENT_TYPE, HeaderValue, TE};
use http::{Method, StatusCode, Uri, Version};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::metadata::{GRPC_CONTENT_TYPE, MetadataMap};
use tonic::server::NamedService;
use tonic::service::Interceptor;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tower::{Service, ServiceExt};

use super::body::{End, Incoming, Outgoing};
use crate::net::Credentials;

const PUSH_PULL: &str = "/cohort.v1.Exchange/PushPull";

/// What answers a call.
#[tonic::async_trait]
pub trait PushPull: Send + Sync + 'static {
    /// Takes what comes in, and gives what goes out. An error that goes out is the last.
    ///
    /// # Errors
    /// If the call is refused.
    async fn push_pull(
        &self,
        metadata: &MetadataMap,
        incoming: Incoming,
    ) -> Result<mpsc::Receiver<Result<v1::Chunk, Status>>, Status>;
}

/// Serves the exchange.
#[derive(Debug)]
pub struct ExchangeServer<S>(Arc<S>);

impl<S> ExchangeServer<S> {
    /// Calls are answered by this.
    pub fn new(service: S) -> Self {
        Self(Arc::new(service))
    }
}

impl<S> Clone for ExchangeServer<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> NamedService for ExchangeServer<S> {
    const NAME: &'static str = "cohort.v1.Exchange";
}

impl<S: PushPull> Service<http::Request<Body>> for ExchangeServer<S> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move {
            let answer = answer(&*service, request).await;
            Ok(answer.unwrap_or_else(Status::into_http))
        })
    }
}

async fn answer(
    service: &impl PushPull,
    request: http::Request<Body>,
) -> Result<http::Response<Body>, Status> {
    let (parts, body) = request.into_parts();
    if parts.uri.path() != PUSH_PULL {
        let what = format!("`{}` is no call of this service", parts.uri.path());
        return Err(Status::unimplemented(what));
    }
    let metadata = MetadataMap::from_headers(parts.headers);
    let chunks = service.push_pull(&metadata, Incoming::new(body)).await?;
    let body = Outgoing::body(ReceiverStream::new(chunks), End::Callee);
    let mut response = http::Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    Ok(response)
}

/// Calls whoever serves the exchange at the other end of a channel.
///
/// # Errors
/// If it refuses, or does not answer.
pub async fn push_pull(
    channel: Channel,
    credentials: &Credentials,
    outgoing: mpsc::Receiver<v1::Chunk>,
) -> Result<Incoming, Status> {
    let carried = credentials.clone().call(Request::new(()))?;
    let chunks = ReceiverStream::new(outgoing).map(Ok);
    let mut request = http::Request::new(Outgoing::body(chunks, End::Caller));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(PUSH_PULL);
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = carried.into_parts().0.into_headers();
    let headers = request.headers_mut();
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers.insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    let response = channel.oneshot(request).await;
    let response = response.map_err(|error| Status::from_error(error.into()))?;
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != Code::Ok => return Err(status),
        _ if response.status() == StatusCode::OK => {}
        _ => {
            let what = format!("the answer is HTTP {}, not gRPC", response.status());
            return Err(Status::unavailable(what));
        }
    }
    Ok(Incoming::new(response.into_body()))
}
