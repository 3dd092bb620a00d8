//! Whether a coordinator can do its work, for whoever starts and stops processes: asked by gRPC (the protocol of
//! `grpc.health.v1`) and by HTTP (`web/health.rs`), with the same answer. Nobody needs a token for it, so a look is shared
//! by all who ask within a moment, and there are only so many who watch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cohort_common::exchange::ExchangeServer;
use cohort_proto::v1;
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::driver::{Cluster, Command};
use crate::store::Store;

/// How long driver and database may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long an answer is good.
const FRESH: Duration = Duration::from_millis(500);

/// Between looks for those who watch.
const LOOK: Duration = Duration::from_secs(1);

/// Watchers at a time, at most.
const WATCHERS: usize = 64;

/// Whether the coordinator can do its work.
pub struct Readiness {
    cluster: Cluster,
    ending: AtomicBool,
    last: Mutex<Option<(Instant, Result<(), String>)>>,
}

impl Readiness {
    /// Of a coordinator that has just started.
    pub fn new(cluster: Cluster) -> Self {
        Self {
            cluster,
            ending: AtomicBool::new(false),
            last: Mutex::default(),
        }
    }

    /// The process is about to end: it is not ready any more.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// Why the coordinator cannot do its work, if it cannot: the driver must answer, and the database must be readable.
    pub async fn look(&self) -> Result<(), String> {
        if self.ending.load(Ordering::Acquire) {
            return Err("it is about to end".into());
        }
        let mut last = self.last.lock().await;
        if let Some((at, found)) = &*last
            && at.elapsed() < FRESH
        {
            return found.clone();
        }
        let look = async {
            self.cluster.ask(Command::Describe).await?;
            self.cluster.read(Store::last_event).await?;
            Ok::<_, Status>(())
        };
        let found = match timeout(PATIENCE, look).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
        };
        *last = Some((Instant::now(), found.clone()));
        found
    }

    async fn status(&self) -> ServingStatus {
        match self.look().await {
            Ok(()) => ServingStatus::Serving,
            Err(_) => ServingStatus::NotServing,
        }
    }
}

/// Serves [`Health`].
pub struct HealthService {
    readiness: Arc<Readiness>,
    places: Arc<Semaphore>,
}

impl HealthService {
    /// Of a coordinator.
    pub fn new(readiness: Arc<Readiness>) -> Self {
        Self {
            readiness,
            places: Arc::new(Semaphore::new(WATCHERS)),
        }
    }
}

/// Whether there is such a service. All are as ready as the coordinator; no name means the coordinator.
fn is_known(service: &str) -> bool {
    use v1::{client_server, data_server, join_server, tokenize_server, workers_server};
    [
        "",
        client_server::ClientServer::<()>::NAME,
        data_server::DataServer::<()>::NAME,
        ExchangeServer::<()>::NAME,
        join_server::JoinServer::<()>::NAME,
        tokenize_server::TokenizeServer::<()>::NAME,
        workers_server::WorkersServer::<()>::NAME,
    ]
    .contains(&service)
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = &request.get_ref().service;
        match is_known(service) {
            true => Ok(Response::new(answer(self.readiness.status().await))),
            false => Err(Status::not_found(format!(
                "there is no service `{service}`"
            ))),
        }
    }

    type WatchStream = ReceiverStream<Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let known = is_known(&request.get_ref().service);
        let place = self.places.clone().try_acquire_owned();
        let place = place.map_err(|_| {
            Status::resource_exhausted(format!("{WATCHERS} watch already; ask with Check"))
        })?;
        let readiness = self.readiness.clone();
        let (out, outgoing) = mpsc::channel(1);
        tokio::spawn(async move {
            let _place = place;
            let mut told = None;
            loop {
                let status = match known {
                    true => readiness.status().await,
                    false => ServingStatus::ServiceUnknown,
                };
                if told.replace(status) != Some(status)
                    && out.send(Ok(answer(status))).await.is_err()
                {
                    return;
                }
                if timeout(LOOK, out.closed()).await.is_ok() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_have_the_names_of_their_paths() {
        assert!(is_known("") && is_known("cohort.v1.Workers"));
        assert!(!is_known("Workers") && !is_known("grpc.health.v1.Health"));
    }
}
