//! The control service of workers: one stream is one session.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cohort_common::cluster::events::LeftReason;
use cohort_common::cluster::silence::SilenceLimits;
use cohort_common::cluster::{Event, FromWorker, Limits, ToWorker};
use cohort_common::ids::SessionId;
use cohort_common::seal::{Opener, Sealer};
use cohort_common::security::TokenId;
use cohort_common::wire::{self, Heard};
use cohort_proto::v1;
use cohort_proto::v1::workers_server::Workers;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::access::{Access, Caller};
use crate::driver::{Cluster, Command, Outbox};
use crate::failover::Leadership;
use crate::status::invalid;

/// How long a new connection may take to say who it is.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves [`Workers`].
pub struct WorkersService {
    /// The cluster.
    pub cluster: Cluster,
    /// Decides whether a worker may stay.
    pub access: Access,
    /// Decides the heartbeat.
    pub limits: Limits,
    /// What bounds the number of workers.
    pub room: Room,
}

#[tonic::async_trait]
impl Workers for WorkersService {
    type SessionStream = ReceiverStream<Result<v1::Frame, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::Frame>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let stay = Stay {
            access: self.access.clone(),
            token: match request.extensions().get::<Caller>() {
                Some(Caller::Worker(token)) => Some(*token),
                _ => None,
            },
        };
        let mut incoming = request.into_inner();
        let mut opener = Opener::default();
        let mut register = first_message(&mut incoming, &mut opener).await?;
        let holding = register.holding.take().map(wire::holding_from).transpose();
        let holding = holding.map_err(invalid)?;
        let place = self.room.enter()?;
        let peak_flops = wire::peak_from(&register);
        let info = wire::member_from(register);
        let join = |reply| Command::Join {
            info,
            peak_flops,
            holding,
            reply,
        };
        let (session, messages) = self.cluster.ask(join).await?;
        let (out, outgoing) = mpsc::channel(1);
        let welcome = v1::Welcome {
            session: session.0,
            heartbeat_ms: self.beat().as_millis() as u32,
            version: env!("CARGO_PKG_VERSION").into(),
            generation: self.cluster.leadership().map_or(0, Leadership::generation),
        };
        let cluster = self.cluster.clone();
        let talking = Talking {
            cluster: self.cluster.clone(),
            limits: self.limits.silence,
            stay,
        };
        tokio::spawn(talking.talk(welcome, messages, out));
        tokio::spawn(async move {
            let reason = listen(&cluster, session, incoming, opener).await;
            drop(place);
            cluster.send(Event::Left { session, reason }).await;
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

impl WorkersService {
    /// Time between two signs of life, as long as there are as many workers as now.
    fn beat(&self) -> Duration {
        let workers = self.cluster.workers();
        Duration::from_millis(self.limits.silence.heartbeat_ms_of(workers))
    }
}

/// By what a worker may stay.
struct Stay {
    access: Access,
    /// The token by which it came in, if workers are told apart.
    token: Option<TokenId>,
}

impl Stay {
    /// Whether nobody has taken back what let the worker in.
    fn check(&self) -> Result<(), Status> {
        let Some(token) = self.token else {
            return Ok(());
        };
        let stays = self.access.still_admits(token);
        stays.map_err(|refusal| Status::unauthenticated(refusal.to_string()))
    }
}

/// One worker's side of the conversation that goes out.
struct Talking {
    cluster: Cluster,
    limits: SilenceLimits,
    stay: Stay,
}

impl Talking {
    fn heartbeat_ms(&self) -> u64 {
        self.limits.heartbeat_ms_of(self.cluster.workers())
    }

    /// Sends a worker its messages, and signs of life where there are none for a while.
    async fn talk(
        self,
        welcome: v1::Welcome,
        mut messages: Outbox,
        out: mpsc::Sender<Result<v1::Frame, Status>>,
    ) {
        let mut sealer = Sealer::default();
        let kind = Some(v1::to_worker::Kind::Welcome(welcome));
        let mut next = Ok(wire::to_worker_body(&v1::ToWorker { kind }));
        let mut checked = Instant::now();
        loop {
            if let Ok(body) = &next {
                self.cluster.traffic().sent.count(body.len());
            }
            let sealed = next.map(|body| sealer.body(body));
            let last = sealed.is_err();
            if out.send(sealed).await.is_err() || last {
                return;
            }
            let heartbeat_ms = self.heartbeat_ms();
            let beat = Duration::from_millis(heartbeat_ms);
            next = tokio::select! {
                biased;
                message = messages.recv() => match message {
                    Some(message) => message,
                    None => return,
                },
                () = tokio::time::sleep(beat) => {
                    let heartbeat_ms = heartbeat_ms as u32;
                    Ok(wire::to_worker_body(&wire::to_worker(&ToWorker::Ping { heartbeat_ms })))
                }
            };
            if checked.elapsed() >= beat {
                checked = Instant::now();
                next = self.stay.check().and(next);
            }
        }
    }
}

/// How many workers may be there at a time: each has connections, and each of these is a file that is open.
#[derive(Clone, Debug)]
pub struct Room {
    files: usize,
    places: Arc<Semaphore>,
}

/// Connections of a worker: what is said, bulk data, gradients.
const CONNECTIONS: usize = 3;

/// Open files that are not for workers' connections: the database, corpora, clients and strangers.
const OTHER_FILES: usize = 160;

impl Room {
    /// That of a process that may have so many files open.
    pub fn new(files: usize) -> Self {
        let most = most_workers(files);
        let places = Arc::new(Semaphore::new(most));
        Self { files, places }
    }

    /// A place, until it is dropped with the connection.
    fn enter(&self) -> Result<OwnedSemaphorePermit, Status> {
        let full = |_| {
            let (files, most) = (self.files, most_workers(self.files));
            Status::resource_exhausted(format!(
                "this coordinator has as many workers as it can have, {most}: each takes {CONNECTIONS} connections, and it may have {files} files open; raise that limit where it is started (`ulimit -n`, or `LimitNOFILE=` of systemd) and start it again"
            ))
        };
        self.places.clone().try_acquire_owned().map_err(full)
    }
}

fn most_workers(files: usize) -> usize {
    let most = files.saturating_sub(OTHER_FILES) / CONNECTIONS;
    most.clamp(1, Semaphore::MAX_PERMITS)
}

async fn first_message(
    incoming: &mut Streaming<v1::Frame>,
    opener: &mut Opener,
) -> Result<v1::Register, Status> {
    let first = tokio::time::timeout(REGISTER_TIMEOUT, incoming.next()).await;
    let Ok(Some(first)) = first else {
        return Err(Status::deadline_exceeded("no Register came"));
    };
    let first: Option<v1::FromWorker> = opener.frame(first?).map_err(invalid)?;
    let Some(v1::from_worker::Kind::Register(register)) = first.and_then(|m| m.kind) else {
        return Err(Status::invalid_argument(
            "the first message must be Register",
        ));
    };
    Ok(register)
}

async fn listen(
    cluster: &Cluster,
    session: SessionId,
    mut incoming: Streaming<v1::Frame>,
    mut opener: Opener,
) -> LeftReason {
    while let Some(Ok(frame)) = incoming.next().await {
        cluster.traffic().received.count(frame.body.len());
        let message: v1::FromWorker = match opener.frame(frame) {
            Ok(Some(message)) => message,
            Ok(None) => continue,
            Err(error) => return LeftReason::Protocol(error.to_string()),
        };
        match wire::heard_from(message) {
            Ok(Heard::Said(FromWorker::Heartbeat)) => cluster.beat(session),
            Ok(Heard::Said(message)) => cluster.send(Event::Said { session, message }).await,
            Ok(Heard::Figures(figures)) => {
                cluster.beat(session);
                cluster.command(Command::Figures { session, figures }).await;
            }
            Err(error) => return LeftReason::Protocol(error.to_string()),
        }
    }
    LeftReason::ConnectionClosed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_for_whom_there_are_no_files_are_told_what_to_do() {
        let room = Room::new(1024);
        let mut there: Vec<_> = (0..288).map(|_| room.enter().unwrap()).collect();
        let status = room.enter().unwrap_err();
        let text = status.message();
        assert!(text.contains("as it can have, 288: each"), "{text}");
        assert!(
            text.contains("1024 files") && text.contains("ulimit -n"),
            "{text}"
        );
        // One may always come, and a system without a bound has none.
        assert!(Room::new(0).enter().is_ok());
        assert!(Room::new(usize::MAX).enter().is_ok());
        there.pop();
        assert!(room.enter().is_ok());
    }
}
