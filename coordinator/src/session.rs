//! The control service of workers: one stream is one session.

use std::time::Duration;

use cohort_common::cluster::events::LeftReason;
use cohort_common::cluster::{Event, Limits, ToWorker};
use cohort_common::ids::SessionId;
use cohort_common::seal::{Opener, Sealer};
use cohort_common::security::TokenId;
use cohort_common::wire::{self, Heard};
use cohort_proto::v1;
use cohort_proto::v1::workers_server::Workers;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
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
            heartbeat_ms: self.limits.silence.heartbeat_ms() as u32,
            version: env!("CARGO_PKG_VERSION").into(),
            generation: self.cluster.leadership().map_or(0, Leadership::generation),
        };
        let cluster = self.cluster.clone();
        let beat = Duration::from_millis(self.limits.silence.heartbeat_ms());
        tokio::spawn(talk(welcome, messages, beat, stay, out));
        tokio::spawn(async move {
            let reason = listen(&cluster, session, incoming, opener).await;
            cluster.send(Event::Left { session, reason }).await;
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
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

/// Sends a worker its messages, and signs of life between them.
async fn talk(
    welcome: v1::Welcome,
    mut messages: Outbox,
    beat: Duration,
    stay: Stay,
    out: mpsc::Sender<Result<v1::Frame, Status>>,
) {
    let mut sealer = Sealer::default();
    let kind = Some(v1::to_worker::Kind::Welcome(welcome));
    let ping = wire::to_worker(&ToWorker::Ping);
    let mut beat = tokio::time::interval(beat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next = Ok(v1::ToWorker { kind });
    loop {
        let sealed = next.map(|message| sealer.frame(&message));
        let last = sealed.is_err();
        if out.send(sealed).await.is_err() || last {
            return;
        }
        next = tokio::select! {
            biased;
            message = messages.recv() => match message {
                Some(message) => message,
                None => return,
            },
            _ = beat.tick() => stay.check().map(|()| ping.clone()),
        };
    }
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
        let message: v1::FromWorker = match opener.frame(frame) {
            Ok(Some(message)) => message,
            Ok(None) => continue,
            Err(error) => return LeftReason::Protocol(error.to_string()),
        };
        match wire::heard_from(message) {
            Ok(Heard::Said(message)) => cluster.send(Event::Said { session, message }).await,
            Ok(Heard::Figures(figures)) => {
                cluster.command(Command::Figures { session, figures }).await;
            }
            Err(error) => return LeftReason::Protocol(error.to_string()),
        }
    }
    LeftReason::ConnectionClosed
}
