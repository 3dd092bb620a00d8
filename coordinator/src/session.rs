//! The control service of workers: one stream is one session.

use std::time::Duration;

use cohort_common::cluster::coordinator::LeftReason;
use cohort_common::cluster::{Event, Limits};
use cohort_common::ids::SessionId;
use cohort_common::wire;
use cohort_proto::v1;
use cohort_proto::v1::workers_server::Workers;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::driver::{Cluster, Command};

/// How long a new connection may take to say who it is.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves [`Workers`].
pub struct WorkersService {
    /// The cluster.
    pub cluster: Cluster,
    /// Decides the heartbeat.
    pub limits: Limits,
}

#[tonic::async_trait]
impl Workers for WorkersService {
    type SessionStream = ReceiverStream<Result<v1::ToWorker, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut incoming = request.into_inner();
        let register = first_message(&mut incoming).await?;
        let info = wire::member_from(register);
        let join = |reply| Command::Join { info, reply };
        let (session, mut messages) = self.cluster.ask(join).await?;
        let (out, outgoing) = mpsc::channel(1);
        let welcome = v1::Welcome {
            session: session.0,
            heartbeat_ms: (self.limits.silence_ms / 5).max(100) as u32,
            version: env!("CARGO_PKG_VERSION").into(),
        };
        let cluster = self.cluster.clone();
        tokio::spawn(async move {
            let kind = Some(v1::to_worker::Kind::Welcome(welcome));
            let mut next = Some(Ok(v1::ToWorker { kind }));
            while let Some(message) = next {
                if out.send(message).await.is_err() {
                    break;
                }
                next = messages.recv().await;
            }
        });
        tokio::spawn(async move {
            let reason = listen(&cluster, session, incoming).await;
            cluster.send(Event::Left { session, reason }).await;
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

async fn first_message(incoming: &mut Streaming<v1::FromWorker>) -> Result<v1::Register, Status> {
    let first = tokio::time::timeout(REGISTER_TIMEOUT, incoming.next()).await;
    let Ok(Some(first)) = first else {
        return Err(Status::deadline_exceeded("no Register came"));
    };
    let Some(v1::from_worker::Kind::Register(register)) = first?.kind else {
        return Err(Status::invalid_argument(
            "the first message must be Register",
        ));
    };
    if register.protocol != wire::PROTOCOL {
        return Err(Status::failed_precondition(format!(
            "this worker (cohort {}) speaks protocol {}, the coordinator (cohort {}) speaks {}; run the same version of cohort on both",
            register.version,
            register.protocol,
            env!("CARGO_PKG_VERSION"),
            wire::PROTOCOL
        )));
    }
    Ok(register)
}

async fn listen(
    cluster: &Cluster,
    session: SessionId,
    mut incoming: Streaming<v1::FromWorker>,
) -> LeftReason {
    while let Some(Ok(message)) = incoming.next().await {
        match wire::from_worker_from(message) {
            Ok(message) => cluster.send(Event::Said { session, message }).await,
            Err(error) => return LeftReason::Protocol(error.to_string()),
        }
    }
    LeftReason::ConnectionClosed
}
