//! Links to the other workers of a run that own slices. A link that breaks is opened again; each change is told to the
//! coordinator, which sums by itself where a worker does not reach an owner.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use cohort_common::cluster::Peer;
use cohort_common::cluster::worker::Report;
use cohort_common::exchange::{Incoming, push_pull};
use cohort_common::ids::SessionId;
use cohort_common::net;
use cohort_common::seal::{Opener, Sealer};
use cohort_common::security::Whom;
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tracing::debug;

use super::measure::Way;
use super::outgoing::Outlet;
use super::stream::send;
use super::{OUTBOX, Shared, State};

/// First and last pause between attempts to reach a peer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// A peer.
#[derive(Default)]
pub(super) struct Known {
    /// Where it can be pushed to, until somebody does.
    address: Option<String>,
    /// What keeps the link to it.
    task: Option<AbortHandle>,
}

impl Drop for Known {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Shared {
    /// What is new of the peers. Links to those that are gone are given up.
    pub(super) fn introduce(self: &Arc<Self>, gone: &[SessionId], peers: Vec<Peer>) {
        let mut state = self.lock();
        for session in gone {
            state.known.remove(session);
            state.outlets.remove(&Some(*session));
        }
        for peer in peers {
            let known = state.known.entry(peer.session).or_default();
            if known.task.is_none() {
                known.address = peer.address;
            }
        }
        self.owner.admit(state.known.keys().copied());
        self.dial(&mut state);
        self.tell_reach(&state);
    }

    /// Opens links to peers that have none, unless gradients stay in memory that the coordinator reads.
    pub(super) fn dial(self: &Arc<Self>, state: &mut State) {
        if state.memory.is_some() || state.closed {
            return;
        }
        for (session, known) in &mut state.known {
            if let Some(address) = known.address.take() {
                let task = self
                    .runtime
                    .spawn(keep_link(self.clone(), *session, address));
                known.task = Some(task.abort_handle());
            }
        }
    }

    fn tell_reach(&self, state: &State) {
        let peers: Vec<SessionId> = state.outlets.keys().copied().flatten().collect();
        debug!(peers = peers.len(), "reached");
        self.owner.note(Report::Reaches { peers });
    }

    /// Opens a link and uses it until it breaks.
    async fn use_link(
        self: &Arc<Self>,
        peer: SessionId,
        address: &str,
    ) -> Result<Infallible, String> {
        let trust = self.credentials.trust.as_ref();
        let scheme = if trust.is_some() { "https" } else { "http" };
        let channel = net::connect(&format!("{scheme}://{address}"), trust, Whom::Worker)
            .await
            .map_err(|error| error.to_string())?;
        let (out, outgoing) = mpsc::channel(OUTBOX);
        let incoming = push_pull(channel, &self.credentials, outgoing).await;
        let mut incoming = incoming.map_err(|s| s.message().to_owned())?;
        let (mut sealer, mut opener) = (Sealer::default(), Opener::default());
        let way = Way {
            sealer: &mut sealer,
            out: &out,
            opener: &mut opener,
            incoming: &mut incoming,
        };
        let link = way.measure(&self.measuring).await?;
        debug!(%peer, ?link, "measured");
        if let Some(link) = link {
            self.owner.note(Report::Link { peer, link });
        }
        let after = self.lock().applied;
        let segment = None;
        let open = sealer.chunk(Kind::Open(v1::Open { after, segment }));
        if out.send(open).await.is_err() {
            return Err("it takes nothing any more".into());
        }
        {
            let mut state = self.lock();
            state.outlets.insert(Some(peer), Outlet::default());
            self.tell_reach(&state);
        }
        let sending = send(self.clone(), Some(peer), sealer, out);
        let reason = tokio::select! {
            () = sending => "it takes nothing any more".into(),
            reason = self.take_from(peer, opener, incoming) => reason,
        };
        let mut state = self.lock();
        state.outlets.remove(&Some(peer));
        self.tell_reach(&state);
        Err(reason)
    }

    /// Takes in what a peer sends; ends with the reason why no more will come.
    async fn take_from(
        &self,
        peer: SessionId,
        mut opener: Opener,
        mut incoming: Incoming,
    ) -> String {
        loop {
            let chunk = match incoming.next().await {
                None => return "it closed the link".into(),
                Some(Err(status)) => return status.message().to_owned(),
                Some(Ok(chunk)) => chunk,
            };
            let taken = match opener.chunk(chunk) {
                Ok(Some(Kind::Credit(credit))) => {
                    self.credit(Some(peer), &credit);
                    Ok(())
                }
                Ok(Some(Kind::Node(node))) => self.take(&node).map(|()| self.relay(node)),
                Ok(Some(Kind::Params(chunk))) => self.take_params(&chunk),
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = taken {
                return error;
            }
        }
    }
}

async fn keep_link(shared: Arc<Shared>, peer: SessionId, address: String) {
    let mut pause = BACKOFF.0;
    loop {
        let before = std::time::Instant::now();
        let Err(reason) = shared.use_link(peer, &address).await;
        debug!(%peer, address, reason, "not linked");
        // One that held for a while is tried again at once.
        pause = match before.elapsed() > BACKOFF.1 {
            true => BACKOFF.0,
            false => (pause * 2).min(BACKOFF.1),
        };
        tokio::time::sleep(pause).await;
    }
}
