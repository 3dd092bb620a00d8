//! What a coordinator does until it leads: it looks at the lease, and follows the store.

use std::time::Duration;

use cohort_common::api::RunEvent;
use cohort_common::cluster::lease::{Candidate, Lease};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{info, warn};

use super::FailoverConfig;
use super::lease::{Election, Keeper, Leadership};
use crate::Error;
use crate::record::record_event;
use crate::remote::{Mirror, Remote, RemoteError};
use crate::status::chain;
use crate::store::{RunStatus, StoreHandle};

/// Between two looks at what a leader writes of runs.
const LOOK: Duration = Duration::from_secs(1);
/// So many events, as a power of two, may a leader record in a second on average without meeting the numbers of the next.
const EVENTS_OF_A_SECOND: u32 = 20;
/// Looks, at most, at runs that were being written while they were read.
const TORN: u32 = 3;
/// Between two tries, where the store does not answer.
const RETRY: Duration = Duration::from_millis(500);

/// A coordinator that does not lead yet.
pub struct Standby {
    election: Election,
    remote: Remote,
    store: StoreHandle,
    here: String,
    follows: watch::Sender<String>,
}

/// The lead was taken.
pub struct Taken {
    /// That it leads.
    pub leadership: Leadership,
    /// Who renews the lease.
    pub keeper: Keeper,
}

impl Standby {
    /// One that has not looked yet.
    pub fn new(config: &FailoverConfig, remote: Remote, store: StoreHandle) -> Self {
        let me = Candidate {
            holder: config.holder.clone(),
            was: config.was.clone(),
            home: remote.id().to_owned(),
            url: config.url.clone(),
            lasts_ms: config.lease.as_millis() as u64,
        };
        Self {
            election: Election::new(remote.bucket().clone(), me),
            remote,
            store,
            here: config.url.clone(),
            follows: watch::Sender::new("it has not looked at the store yet".into()),
        }
    }

    /// Where the newest lease is told that was seen.
    pub fn seen(&self) -> watch::Receiver<Option<Lease>> {
        self.election.seen()
    }

    /// Where it tells what it follows.
    pub fn follows(&self) -> watch::Receiver<String> {
        self.follows.subscribe()
    }

    /// Stands by until it leads, and has entered all that the leader before has written.
    pub async fn lead(mut self) -> Result<Taken, Error> {
        let seen = self.election.seen();
        let follower = Follower {
            mirror: Mirror::new(self.remote.clone(), self.store.clone()),
            remote: self.remote.clone(),
            seen: seen.clone(),
            told: None,
            follows: self.follows,
        };
        let (stop, stopped) = watch::channel(false);
        let following = tokio::spawn(follower.run(stopped));
        let (leadership, before) = self.election.win().await;
        let generation = leadership.generation();
        info!(generation, url = self.here, "this coordinator leads now");
        let keeper = self.election.keep(leadership.clone());
        stop.send_replace(true);
        let mut mirror = joined(following).await?;
        // Nobody has led since this home did.
        let home_is_true = before
            .as_ref()
            .is_some_and(|before| self.remote.knows_all(before));
        mirror.mirror_all(!home_is_true);
        let mut torn = 0;
        loop {
            match mirror.refresh().await {
                Ok(()) if mirror.is_whole() || torn == TORN => break,
                Ok(()) => torn += 1,
                Err(error) => warn!(
                    error = chain(&error),
                    "cannot see yet which runs the store has"
                ),
            }
            if !leadership.leads() {
                return Err(Error::Fenced(
                    "the lease was not renewed while it took over".into(),
                ));
            }
            sleep(RETRY).await;
        }
        if !home_is_true && before.is_some() {
            let aside = mirror.set_aside_unknown().await;
            for run in aside.map_err(|error| failed(&error))? {
                warn!(%run, "set aside: the store does not know this run");
            }
        }
        let before = before.filter(|_| !home_is_true);
        prepare(&self.store, &leadership, self.here, before).await?;
        let noted = self.remote.note_entered(generation);
        noted.map_err(|error| failed(&error))?;
        Ok(Taken { leadership, keeper })
    }
}

/// Numbers events behind those of the leader before, and says in those of the runs that are under way who leads.
async fn prepare(
    store: &StoreHandle,
    leadership: &Leadership,
    here: String,
    before: Option<Lease>,
) -> Result<(), Error> {
    let first = leadership.epoch() << EVENTS_OF_A_SECOND;
    let generation = leadership.generation();
    let noted = store.call(move |store| {
        store.number_events_from(first)?;
        let Some(before) = before else { return Ok(()) };
        for row in store.runs()? {
            if !matches!(row.status, RunStatus::Queued | RunStatus::Running) {
                continue;
            }
            let run = row.name.to_string();
            let text = format!(
                "{here} leads now (generation {generation}), after {}; its ledger of this run ends at step {}",
                before.url, row.step
            );
            record_event(store, &row.name, &RunEvent::Note { run, text })?;
        }
        Ok(())
    });
    Ok(noted.await?)
}

async fn joined(following: JoinHandle<Mirror>) -> Result<Mirror, Error> {
    let ended = following.await;
    ended.map_err(|error| Error::Answer(format!("following the store has ended: {error}")))
}

fn failed(error: &RemoteError) -> Error {
    Error::Answer(chain(error))
}

/// Follows the store, while another one leads.
struct Follower {
    mirror: Mirror,
    remote: Remote,
    seen: watch::Receiver<Option<Lease>>,
    /// Whom it has told of.
    told: Option<u64>,
    follows: watch::Sender<String>,
}

impl Follower {
    /// Until it is stopped.
    async fn run(mut self, mut stopped: watch::Receiver<bool>) -> Mirror {
        let mut away = false;
        loop {
            let lease = self.seen.borrow().clone();
            // Once it leads, the newest is its own.
            if let Some(lease) = lease.filter(|_| !*stopped.borrow()) {
                self.tell(&lease);
                let other = !self.remote.knows_all(&lease);
                if other {
                    let looked = tokio::select! {
                        looked = self.look() => looked,
                        _ = stopped.wait_for(|stopped| *stopped) => return self.mirror,
                    };
                    match looked {
                        Ok(()) => away = false,
                        Err(error) if !std::mem::replace(&mut away, true) => {
                            warn!(
                                error = chain(&error),
                                "cannot follow the store; it is tried again"
                            );
                        }
                        Err(_) => {}
                    }
                }
            }
            tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => return self.mirror,
                () = sleep(LOOK) => {}
            }
        }
    }

    fn tell(&mut self, lease: &Lease) {
        if self.told.replace(lease.generation) != Some(lease.generation) {
            info!(
                leader = lease.url,
                generation = lease.generation,
                "standing by; the lease lasts {} ms",
                lease.lasts_ms
            );
        }
    }

    async fn look(&mut self) -> Result<(), RemoteError> {
        self.mirror.refresh().await?;
        self.follows.send_replace(self.mirror.describe());
        let mut failed = Ok(());
        for wanted in self.mirror.wanted() {
            // One that cannot be brought does not keep the others back.
            failed = failed.and(self.remote.bring(&wanted).await);
        }
        failed
    }
}
