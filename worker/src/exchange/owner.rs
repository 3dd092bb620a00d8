//! The slice of the gradient that this worker owns: where peers push to it, and what is told of it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use cohort_common::cluster::Keeper;
use cohort_common::cluster::worker::Report;
use cohort_common::exchange::{
    Exchange, ExchangeServer, ExchangeService, Host, Incoming, PushPull, Told,
};
use cohort_common::ids::{RunId, SessionId, Step};
use cohort_common::net::{self, Peer, Token};
use cohort_common::security::{Gate, Trust};
use cohort_proto::v1;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::metadata::MetadataMap;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};
use tracing::{debug, error, info};

use super::POISON;

/// What an exchange tells the worker's driver.
#[derive(Debug)]
pub enum Note {
    /// For the machine.
    Report(Report),
    /// Two copies of a node differ: one of the two machines computes wrongly, and the run must end.
    Mismatch {
        /// The step.
        step: Step,
        /// For people.
        message: String,
    },
}

/// Where peers push to this process, whatever it trains. Clones share it.
#[derive(Clone, Debug)]
pub struct Entrance {
    address: String,
    current: Arc<Mutex<Option<Arc<Owner>>>>,
}

impl Entrance {
    /// Serves on this listener for as long as the process lives. `address` is where peers find it. What they send must
    /// carry the token, if there is one; where the worker has a certificate, so must they.
    pub fn open(
        listener: TcpListener,
        address: SocketAddr,
        token: Option<Token>,
        trust: Option<&Trust>,
    ) -> Self {
        let entrance = Self {
            address: address.to_string(),
            current: Arc::default(),
        };
        let check = move |request: Request<()>| match &token {
            Some(token) if !token.admits(request.metadata().get("authorization")) => Err(
                Status::unauthenticated("this worker wants the cluster's token"),
            ),
            _ => {
                if let Some(peer) = request.extensions().get::<Peer>() {
                    peer.let_in();
                }
                Ok(request)
            }
        };
        let service = ExchangeServer::new(entrance.clone());
        let gate = trust
            .and_then(Trust::credential)
            .cloned()
            .map(Gate::of_worker);
        let incoming = net::connections(listener, gate);
        info!(%address, "other workers can push gradients here");
        tokio::spawn(async move {
            let served = net::server()
                .add_service(InterceptedService::new(service, check))
                .serve_with_incoming(incoming);
            if let Err(error) = served.await {
                error!(%error, "other workers cannot push gradients here any more");
            }
        });
        entrance
    }

    /// Where peers find it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on peers push to this owner, and to none before it.
    pub(super) fn lead_to(&self, owner: Arc<Owner>) {
        *self.current.lock().expect(POISON) = Some(owner);
    }
}

#[tonic::async_trait]
impl PushPull for Entrance {
    async fn push_pull(
        &self,
        metadata: &MetadataMap,
        incoming: Incoming,
    ) -> Result<mpsc::Receiver<Result<v1::Chunk, Status>>, Status> {
        let owner = self.current.lock().expect(POISON).clone();
        let owner = owner.ok_or_else(|| Status::unavailable("this worker trains nothing"))?;
        let exchange = owner.exchange.clone();
        let host: Arc<dyn Host> = owner;
        let service = ExchangeService { exchange, host };
        service.push_pull(metadata, incoming).await
    }
}

/// The slices of one exchange.
#[derive(Debug)]
pub(super) struct Owner {
    pub exchange: Arc<Exchange>,
    pub run: RunId,
    /// This worker's.
    pub session: SessionId,
    /// Who may push.
    peers: Mutex<BTreeSet<SessionId>>,
    closed: AtomicBool,
    notes: mpsc::Sender<Note>,
}

impl Owner {
    /// Where moments are divided, `keeper` says who keeps this worker's slice, too.
    pub fn new(
        run: RunId,
        session: SessionId,
        keeper: Option<&Keeper>,
        notes: mpsc::Sender<Note>,
    ) -> Self {
        let exchange = match keeper {
            None => Exchange::new(false),
            Some(keeper) => Exchange::divided(keeper.division.second_of(session)),
        };
        Self {
            exchange: Arc::new(exchange),
            run,
            session,
            peers: Mutex::default(),
            closed: AtomicBool::new(false),
            notes,
        }
    }

    /// These may push, and nobody else.
    pub fn admit(&self, peers: impl IntoIterator<Item = SessionId>) {
        *self.peers.lock().expect(POISON) = peers.into_iter().collect();
    }

    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// What has become of a node of this worker's own. Blocks the thread while the driver is behind.
    pub fn told(&self, told: Told) {
        if let Some(note) = note_of(told) {
            // A driver that is gone ends the process.
            let _ = self.notes.blocking_send(note);
        }
    }

    /// Tells the driver, from where nothing can be waited for. If it has not listened for a thousand notes, the coordinator
    /// will lose its patience and sum by itself.
    pub fn note(&self, report: Report) {
        if self.notes.try_send(Note::Report(report)).is_err() {
            debug!("the driver takes no notes");
        }
    }
}

#[tonic::async_trait]
impl Host for Owner {
    fn is_open(&self, session: SessionId) -> bool {
        let known = || self.peers.lock().expect(POISON).contains(&session);
        !self.closed.load(Ordering::Acquire) && known()
    }

    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    async fn tell(&self, told: Told) {
        if let Some(note) = note_of(told) {
            // A driver that is gone ends the process.
            let _ = self.notes.send(note).await;
        }
    }
}

fn note_of(told: Told) -> Option<Note> {
    Some(match told {
        Told::Delivered { step, lanes, .. } => Note::Report(Report::Held { step, lanes }),
        Told::Complete { step, digests, .. } => Note::Report(Report::SliceReady { step, digests }),
        // The stream ends with it, and the peer says that it does not reach this worker any more.
        Told::Broken { session, what } => {
            debug!(%session, what, "a peer's stream broke");
            return None;
        }
        Told::Mismatch { run, step, error } => Note::Mismatch {
            step,
            message: format!(
                "{error}; take the one away that you trust less, then `cohort resume {run}`"
            ),
        },
    })
}
