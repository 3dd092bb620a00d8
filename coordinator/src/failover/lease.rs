//! The lease in the object store: asks what the pure machine wants to know, and tells everybody here up to when this process may
//! lead.

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cohort_common::cluster::lease::{Answer, Ask, Candidate, Elector, Fenced, Lease};
use cohort_objects::{Bucket, ObjectError, Version};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::{FailoverConfig, LEASE};
use crate::driver::now_ms;
use crate::status::chain;

/// Longest lease that is read, in bytes.
const MAX_LEASE: u64 = 64 << 10;
/// More than any generation: names of the ledger's pieces have ten digits for it.
const MOST_GENERATIONS: u64 = 10_000_000_000 - 1;
/// Shortest wait for an answer of the store.
const LEAST_PATIENCE: Duration = Duration::from_millis(200);

/// Milliseconds of a clock that nobody sets, and that goes on while the machine sleeps, where the system has one.
fn clock_ms() -> u64 {
    #[cfg(target_os = "linux")]
    {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
    }
    #[cfg(not(target_os = "linux"))]
    {
        use std::sync::LazyLock;
        use std::time::Instant;
        static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
        STARTED.elapsed().as_millis() as u64
    }
}

/// That this process leads, and up to when it may. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leadership(Arc<Held>);

#[derive(Debug)]
struct Held {
    lease: Lease,
    until_ms: AtomicU64,
    stopped: AtomicBool,
}

impl Leadership {
    /// Whether it may lead now. Whoever asks looks at the clock itself: this holds even if nobody renews.
    pub fn leads(&self) -> bool {
        clock_ms() < self.0.until_ms.load(Ordering::Acquire)
    }

    /// Whether it may commit now: it leads, and has not stopped to.
    pub fn commits(&self) -> bool {
        !self.0.stopped.load(Ordering::Acquire) && self.leads()
    }

    /// Commits no more from here on, as it is about to end.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::Release);
    }

    /// Which leader it is.
    pub fn generation(&self) -> u64 {
        self.0.lease.generation
    }

    /// The high half of its session numbers.
    pub fn epoch(&self) -> u64 {
        self.0.lease.epoch
    }

    /// One that leads for ever, for tests.
    #[cfg(test)]
    pub fn of(generation: u64) -> Self {
        let lease = Lease {
            holder: format!("test-{generation}"),
            home: "test".into(),
            url: "http://test".into(),
            generation,
            epoch: generation,
            lasts_ms: 1,
            renewals: 1,
            released: false,
        };
        Self(Arc::new(Held {
            lease,
            until_ms: AtomicU64::new(u64::MAX),
            stopped: AtomicBool::new(false),
        }))
    }
}

/// One coordinator's part in the election.
pub struct Election {
    bucket: Bucket,
    holder: String,
    elector: Elector<Version>,
    lasts: Duration,
    away: bool,
    /// The lease that lay there before this process took it.
    before: Option<Lease>,
    /// What lies in the store, for those who ask.
    seen: watch::Sender<Option<Lease>>,
}

impl Election {
    /// A coordinator that has not looked yet.
    pub fn new(bucket: Bucket, me: Candidate) -> Self {
        Self {
            bucket,
            lasts: Duration::from_millis(me.lasts_ms),
            holder: me.holder.clone(),
            elector: Elector::new(me),
            away: false,
            before: None,
            seen: watch::Sender::new(None),
        }
    }

    /// Where the newest lease is told that was seen.
    pub fn seen(&self) -> watch::Receiver<Option<Lease>> {
        self.seen.subscribe()
    }

    /// Follows the lease until it is this process's. Gives the lease of the leader before, too, if there was one.
    pub async fn win(&mut self) -> (Leadership, Option<Lease>) {
        loop {
            // Only a leader can be fenced; one whose answer came too late is tried again.
            match self.turn().await {
                Err(_) => continue,
                Ok(Some(pause)) => sleep(pause).await,
                Ok(None) => {}
            }
            let until_ms = self.elector.leads_until_ms();
            let lease = self.elector.lease().cloned();
            match (until_ms, lease) {
                (Some(until_ms), Some(lease)) => {
                    let held = Held {
                        lease,
                        until_ms: AtomicU64::new(until_ms),
                        stopped: AtomicBool::new(false),
                    };
                    return (Leadership(Arc::new(held)), self.before.take());
                }
                // One of its own, whose answer came too late, is nobody's.
                (_, lease) if lease.as_ref().is_some_and(|l| l.holder == self.holder) => {}
                (_, lease) => self.before = lease,
            }
        }
    }

    /// Asks what is to be asked; else says how long it is until something is.
    async fn turn(&mut self) -> Result<Option<Duration>, Fenced> {
        let now = clock_ms();
        self.elector.check(now)?;
        let Some(ask) = self.elector.ask(now, now_ms() / 1000) else {
            let until = self.elector.leads_until_ms().unwrap_or(u64::MAX);
            let next = self.elector.due_ms().min(until);
            let pause = next.saturating_sub(now).max(1);
            return Ok(Some(Duration::from_millis(pause)));
        };
        let patience = (self.lasts / 4).max(LEAST_PATIENCE);
        let answer = match timeout(patience, perform(&self.bucket, ask)).await {
            Ok(Ok(answer)) => {
                if std::mem::take(&mut self.away) {
                    info!("the store answers again");
                }
                answer
            }
            Ok(Err(error)) => self.lost(chain(&error)),
            Err(_) => self.lost(format!("no answer within {} ms", patience.as_millis())),
        };
        let answered = self.elector.answer(clock_ms(), answer);
        if let Some(lease) = self.elector.lease() {
            self.seen.send_if_modified(|seen| {
                let newer = seen.as_ref() != Some(lease);
                if newer {
                    *seen = Some(lease.clone());
                }
                newer
            });
        }
        answered.map(|()| None)
    }

    fn lost(&mut self, error: String) -> Answer<Version> {
        if !std::mem::replace(&mut self.away, true) {
            warn!(
                error,
                "the store does not answer about the lease; it is asked again"
            );
        }
        Answer::Unknown
    }

    /// Renews the lease for as long as the process leads, beside everything else.
    pub fn keep(self, leadership: Leadership) -> Keeper {
        let (release, released) = oneshot::channel();
        Keeper {
            task: tokio::spawn(keep(self, leadership, released)),
            release,
        }
    }

    async fn release(&mut self) {
        let Some(ask) = self.elector.release() else {
            return;
        };
        match timeout(self.lasts / 4, perform(&self.bucket, ask)).await {
            Ok(Ok(Answer::Written(_))) => info!("the lease is given back"),
            _ => warn!(
                "the lease cannot be given back; whoever stands by waits until it has run out"
            ),
        }
    }
}

/// Whether its numbers can be counted on from.
fn is_sound(lease: &Lease) -> bool {
    let lasts = 1..=FailoverConfig::LONGEST.as_millis() as u64;
    lasts.contains(&lease.lasts_ms)
        && lease.generation < MOST_GENERATIONS
        && lease.epoch < u64::from(u32::MAX)
        && lease.renewals < u64::MAX
}

async fn perform(bucket: &Bucket, ask: Ask<Version>) -> Result<Answer<Version>, ObjectError> {
    match ask {
        Ask::Read => {
            let Some((json, version)) = bucket.read_version(LEASE, MAX_LEASE).await? else {
                return Ok(Answer::Found(None));
            };
            let lease: Lease =
                serde_json::from_slice(&json).map_err(|error| ObjectError::Unusable {
                    url: bucket.url(LEASE),
                    reason: format!("it is no lease: {error}"),
                })?;
            if !is_sound(&lease) {
                return Err(ObjectError::Unusable {
                    url: bucket.url(LEASE),
                    reason: "its numbers are none that a coordinator writes; delete it when no coordinator runs".into(),
                });
            }
            Ok(Answer::Found(Some((lease, version))))
        }
        Ask::Write { lease, over } => {
            let json = serde_json::to_vec_pretty(&lease).expect("plain data");
            let written = bucket.replace(LEASE, json, over).await?;
            Ok(written.map_or(Answer::Refused, Answer::Written))
        }
    }
}

/// The task that renews a lease.
pub struct Keeper {
    task: JoinHandle<Option<Fenced>>,
    release: oneshot::Sender<()>,
}

impl Keeper {
    /// Completes when this process may lead no more, with the reason.
    pub async fn fenced(&mut self) -> String {
        match (&mut self.task).await {
            Ok(Some(fenced)) => fenced.to_string(),
            Ok(None) => "the lease was given back".into(),
            Err(error) => error.to_string(),
        }
    }

    /// Gives the lease back, as nothing is committed any more.
    pub async fn release(self) {
        // If it has ended already, there is nothing to give back.
        let _ = self.release.send(());
        let _ = self.task.await;
    }
}

async fn keep(
    mut election: Election,
    leadership: Leadership,
    released: oneshot::Receiver<()>,
) -> Option<Fenced> {
    let mut asked_back = pin!(async {
        if released.await.is_err() {
            // Nobody will ask any more.
            pending::<()>().await;
        }
    });
    loop {
        let turn = election.turn().await;
        let until = election.elector.leads_until_ms().unwrap_or(0);
        leadership.0.until_ms.store(until, Ordering::Release);
        let pause = match turn {
            Err(fenced) => return Some(fenced),
            Ok(pause) => pause.unwrap_or_default(),
        };
        if timeout(pause, &mut asked_back).await.is_ok() {
            leadership.0.until_ms.store(0, Ordering::Release);
            election.release().await;
            return None;
        }
    }
}
