//! The object store that outlives this machine (`--store`): checkpoints and corpora are copied to it while training goes on,
//! and a coordinator on an empty machine takes runs up from it.
//!
//! The home stays what is true while the machine lives; nothing here ever waits for the store while a run trains. The store
//! follows: `upload.rs` compares what a run keeps at home with what the store has, and copies the newest that is missing,
//! until nothing is; `keep.rs` deletes what the run does not keep any more; `restore.rs` is the way back. `layout.rs` * says
//! what lies where. A star marks what is pure.
//!
//! A run has one owner: the home that last took it up. Another one stops copying when it sees that, and does not take the run up
//! where the store is ahead of what it has.

mod journal;
mod keep;
mod layout;
mod mirror;
mod restore;
mod running;
/// Size and BLAKE3 of a file.
fn hash_file(path: &Path) -> std::io::Result<(u64, [u8; 32])> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(path)?)?;
    Ok((hasher.count(), hasher.finalize().into()))
}

#[cfg(test)]
mod tests;
mod upload;

pub use layout::Record;
pub use mirror::Mirror;
pub use restore::{note, take_in};

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use cohort_common::api::StoredInfo;
use cohort_common::checkpoint::hex;
use cohort_common::cluster::lease::Lease;
use cohort_common::home::{Home, RunName};
use cohort_objects::{Bucket, Location, ObjectError};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use self::journal::Journal;
use self::layout::{FORMAT, MARKER, ManifestError, Marker, Owner};
use self::upload::Job;
use crate::Error;
use crate::driver::Cluster;
use crate::failover::Leadership;
use crate::status::chain;
use crate::store::StoreError;

/// Longest manifest that is read, in bytes.
const MAX_MANIFEST: u64 = 64 << 20;
/// How long a URL that was signed for a worker can be used.
const SIGNED: Duration = Duration::from_secs(3600);
/// How long what is still to be copied may take when the coordinator ends.
const GRACE: Duration = Duration::from_secs(20);
/// How long the last news of runs may take then, where others stand by.
const LAST_NEWS: Duration = Duration::from_secs(5);
/// The owner of a run that belongs to whoever leads of several coordinators.
const LEADER: &str = "leader";

/// A coordinator's object store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Remote(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bucket: Bucket,
    home: Home,
    /// The id of this home among those that write to the store.
    id: String,
    state: Mutex<State>,
    /// Held by whoever copies or deletes.
    work: tokio::sync::Mutex<()>,
    /// Somebody wants to delete: what is being copied is to be given up.
    interrupted: Notify,
    /// There is something to do.
    wake: Notify,
    /// There is nothing to do any more.
    rest: Notify,
    /// There is little time left: no pause is too short now.
    hurry: Notify,
    /// That this process leads, where several coordinators share the store.
    leadership: OnceLock<Leadership>,
    journal: Journal,
}

/// What is known, and what is to be done.
#[derive(Debug, Default)]
struct State {
    runs: BTreeMap<RunName, InStore>,
    /// Runs and corpora of which something may be missing there, each once. What is not done goes to the end, so that nothing
    /// that fails for good stands before the others.
    due: VecDeque<Job>,
    /// Corpora that are there.
    corpora: BTreeSet<String>,
    /// Whether runs of the store that this home does not know have been looked for.
    taken_in: bool,
    /// Something is being copied.
    busy: bool,
}

impl State {
    /// Something is to be done, after what is to be done already.
    fn add(&mut self, job: Job) {
        if !self.due.contains(&job) {
            self.due.push_back(job);
        }
    }

    /// Whether nothing is being copied, and nothing is to be.
    fn is_idle(&self) -> bool {
        !self.busy && self.due.is_empty()
    }
}

/// What is known of a run in the store.
#[derive(Debug, Default)]
struct InStore {
    /// Its checkpoints there, once they were listed.
    steps: Option<BTreeSet<u64>>,
    /// One more may be there: nobody has seen what became of its manifest.
    unsure: bool,
    /// Contents may be there that no checkpoint refers to any more.
    unswept: bool,
    /// Contents there, once they were listed.
    objects: Option<BTreeMap<String, u64>>,
    /// What its start directory holds; it does not change.
    start: Option<Vec<cohort_common::checkpoint::FileEntry>>,
    /// What it starts from, and its corpora, are there.
    furnished: bool,
    /// Checkpoints that are to be copied.
    waiting: usize,
    /// Why they are not.
    problem: Option<String>,
}

/// Why something is not copied, or not brought back.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The store.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// Something in the store cannot be used.
    #[error("`{url}` cannot be used: {source}")]
    Manifest {
        /// What.
        url: String,
        /// Why.
        source: ManifestError,
    },
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Something of this home.
    #[error("{0}")]
    Local(String),
    /// Somebody else writes this run.
    #[error(
        "run `{run}` belongs to another coordinator in the store `{url}`, which took it up last; `cohort resume {run}` here \
         takes it over, once it does not train there any more"
    )]
    Taken {
        /// The run.
        run: RunName,
        /// The store.
        url: String,
    },
    /// Another coordinator may lead.
    #[error("this coordinator may not lead any more, and writes nothing to the store")]
    Fenced,
    /// Somebody else has trained this run further than this home knows.
    #[error(
        "another coordinator has brought run `{run}` to step {there} in the store `{url}`, and this home knows it up to step \
         {here} only; start a coordinator on an empty home with this store, and resume it there"
    )]
    Ahead {
        /// The run.
        run: RunName,
        /// The store.
        url: String,
        /// The newest checkpoint there.
        there: u64,
        /// The newest that this home knows; 0 if it knows none.
        here: u64,
    },
}

impl Remote {
    /// The store that a URL names. Asks nobody yet.
    ///
    /// # Errors
    /// A URL that names no store.
    pub fn new(url: &str, home: &Home) -> Result<Self, Error> {
        let answer = |error: &dyn std::error::Error| Error::Answer(chain(error));
        let location = Location::parse(url).map_err(|error| answer(&error))?;
        let bucket = Bucket::open(&location).map_err(|error| answer(&error))?;
        let id = home_id(home).map_err(|error| {
            Error::Answer(format!(
                "cannot write to `{}`: {error}",
                home.root().display()
            ))
        })?;
        Ok(Self(Arc::new(Shared {
            bucket,
            home: home.clone(),
            id,
            state: Mutex::default(),
            work: tokio::sync::Mutex::default(),
            interrupted: Notify::new(),
            wake: Notify::new(),
            rest: Notify::new(),
            hurry: Notify::new(),
            leadership: OnceLock::new(),
            journal: Journal::default(),
        })))
    }

    /// Opens the store that a URL names, and makes sure that it can be used: by reading, or writing, whose format it has.
    ///
    /// # Errors
    /// A URL that names no store, a store that refuses, one of a newer build. That it cannot be reached now is none; the answer
    /// says whether it can.
    pub async fn open(url: &str, home: &Home) -> Result<(Self, bool), Error> {
        let answer = |error: &dyn std::error::Error| Error::Answer(chain(error));
        let remote = Self::new(url, home)?;
        match remote.check_format().await {
            Ok(()) => {
                info!(
                    url = remote.url(),
                    "checkpoints and corpora are copied to the store"
                );
                Ok((remote, true))
            }
            Err(RemoteError::Object(error)) if error.is_transient() => {
                let error = chain(&error);
                warn!(error, "the store cannot be reached; it is tried again");
                Ok((remote, false))
            }
            Err(error) => Err(answer(&error)),
        }
    }

    async fn check_format(&self) -> Result<(), RemoteError> {
        let read = || self.bucket().read(MARKER, MAX_MANIFEST);
        let found = match read().await {
            Err(error) if error.is_missing() => {
                let ours = serde_json::to_vec(&Marker { format: FORMAT }).expect("plain data");
                if self.bucket().create(MARKER, ours).await? {
                    return Ok(());
                }
                // Somebody else was faster.
                read().await?
            }
            found => found?,
        };
        let marker: Result<Marker, _> = layout::parse(&found);
        marker
            .map(|_| ())
            .map_err(|source| self.unusable(MARKER, source))
    }

    fn unusable(&self, name: &str, source: ManifestError) -> RemoteError {
        let url = self.bucket().url(name);
        RemoteError::Manifest { url, source }
    }

    /// Where it is, for people.
    pub fn url(&self) -> String {
        self.0.bucket.url("")
    }

    /// The id of this home among those that write to the store.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Whether nobody knows more of the runs than this home: it is the one that led last, and had entered what those before it
    /// wrote.
    pub fn knows_all(&self, last: &Lease) -> bool {
        let entered = fs::read_to_string(entered(self.home()));
        let generation = entered.ok().and_then(|text| text.trim().parse().ok());
        last.home == self.0.id && generation == Some(last.generation)
    }

    /// This home has entered all that the leaders before this one wrote.
    pub fn note_entered(&self, generation: u64) -> Result<(), RemoteError> {
        let path = entered(self.home());
        let written = write_file(&path, generation.to_string().as_bytes());
        written.map_err(|error| {
            RemoteError::Local(format!("cannot write `{}`: {error}", path.display()))
        })
    }

    /// That this process leads, if several coordinators share the store and it does.
    pub fn leadership(&self) -> Option<&Leadership> {
        self.0.leadership.get()
    }

    /// This process leads the coordinators that share the store.
    pub fn lead(&self, leadership: Leadership) {
        // Nobody leads twice in one process.
        let _ = self.0.leadership.set(leadership);
    }

    pub(crate) fn bucket(&self) -> &Bucket {
        &self.0.bucket
    }

    fn home(&self) -> &Home {
        &self.0.home
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no panic under this lock")
    }

    /// Something of a run has changed at home.
    pub fn changed(&self, run: &RunName) {
        self.state().add(Job::Run(run.clone()));
        self.0.wake.notify_one();
    }

    /// A corpus has been prepared.
    pub fn prepared(&self, fingerprint: &str) {
        self.state().add(Job::Corpus(fingerprint.into()));
        self.0.wake.notify_one();
    }

    /// Has nothing copied or deleted for as long as the answer lives, but by whoever holds it. A copy that is under way is given
    /// up, and comes again afterwards, if it is still to be made.
    pub async fn alone(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.0.interrupted.notify_waiters();
        self.0.work.lock().await
    }

    /// What of a run is there, as far as that is known.
    pub fn describe(&self, run: &RunName) -> StoredInfo {
        let state = self.state();
        let known = state.runs.get(run);
        let steps = known.and_then(|known| known.steps.as_ref());
        StoredInfo {
            steps: steps.into_iter().flatten().copied().collect(),
            waiting: known.map_or(0, |known| known.waiting),
            problem: known.and_then(|known| known.problem.clone()),
        }
    }

    /// A URL by which somebody without credentials can read a file of a corpus for a while, if it is there. `hash` is its BLAKE3,
    /// in hex.
    pub async fn place(&self, fingerprint: &str, hash: &str) -> Option<String> {
        if !self.state().corpora.contains(fingerprint) {
            return None;
        }
        let name = layout::corpus_object(fingerprint, hash);
        match self.bucket().sign(&name, SIGNED).await {
            Ok(url) => url.map(Into::into),
            Err(error) => {
                warn!(
                    error = chain(&error),
                    "cannot sign a URL; the coordinator gives the shard itself"
                );
                None
            }
        }
    }

    /// Who writes a run, if somebody does.
    async fn owner(&self, run: &RunName) -> Result<Option<Owner>, RemoteError> {
        let name = layout::owner(run);
        match self.bucket().read(&name, MAX_MANIFEST).await {
            Ok(json) => {
                let owner = serde_json::from_slice(&json);
                let owner = owner.map_err(|error| self.unusable(&name, error.into()))?;
                Ok(Some(owner))
            }
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Who writes a run: this home, or whoever leads of several coordinators.
    fn ours(&self) -> Owner {
        let home = match self.leadership() {
            Some(_) => LEADER.to_owned(),
            None => self.0.id.clone(),
        };
        Owner { home }
    }

    /// Makes sure that nobody else may lead.
    fn check_lead(&self) -> Result<(), RemoteError> {
        match self.leadership().is_none_or(Leadership::leads) {
            true => Ok(()),
            false => Err(RemoteError::Fenced),
        }
    }

    /// Makes sure that this home writes a run: nobody else does.
    async fn own(&self, run: &RunName) -> Result<(), RemoteError> {
        self.check_lead()?;
        let ours = self.ours();
        let json = serde_json::to_vec(&ours).expect("plain data");
        let found = match self.owner(run).await? {
            // It was this home's alone before others stood by.
            Some(owner) if owner.home == self.0.id && owner != ours => {
                self.bucket().write(&layout::owner(run), json).await?;
                Some(ours.clone())
            }
            Some(owner) => Some(owner),
            None => match self.bucket().create(&layout::owner(run), json).await? {
                true => return Ok(()),
                false => self.owner(run).await?,
            },
        };
        match found == Some(ours) {
            true => Ok(()),
            false => Err(RemoteError::Taken {
                run: run.clone(),
                url: self.url(),
            }),
        }
    }

    /// Makes sure that this home may take a run over: that nobody else has trained it further than this home knows. What it
    /// lacks would be deleted, as checkpoints that the run does not keep.
    async fn check_newest(&self, run: &RunName, newest: Option<u64>) -> Result<(), RemoteError> {
        let known = |owner: Owner| owner == self.ours() || owner.home == self.0.id;
        if self.owner(run).await?.is_none_or(known) {
            return Ok(());
        }
        let there = self.listed_steps(run).await?.last().copied();
        match there {
            Some(there) if Some(there) > newest => Err(RemoteError::Ahead {
                run: run.clone(),
                url: self.url(),
                there,
                here: newest.unwrap_or(0),
            }),
            _ => Ok(()),
        }
    }

    /// Makes this home the one that writes a run.
    async fn take_over(&self, run: &RunName) -> Result<(), RemoteError> {
        let ours = self.ours();
        let found = self.owner(run).await?;
        if found.as_ref().is_some_and(|owner| *owner != ours) {
            let json = serde_json::to_vec(&ours).expect("plain data");
            self.bucket().write(&layout::owner(run), json).await?;
            // The other one may have written and deleted since this home looked.
            self.known(run, |known| (known.steps, known.objects) = (None, None));
            info!(%run, "taken over from another coordinator");
        }
        Ok(())
    }

    /// The steps of a run's checkpoints that are in the store now.
    async fn listed_steps(&self, run: &RunName) -> Result<BTreeSet<u64>, RemoteError> {
        let listed = self.bucket().list(&layout::checkpoints(run)).await?;
        let steps = listed
            .iter()
            .filter_map(|meta| layout::parse_checkpoint(&meta.name));
        Ok(steps.map(|(_, step)| step).collect())
    }

    /// The contents below a prefix that are in the store now, with their sizes.
    async fn listed_objects(&self, prefix: &str) -> Result<BTreeMap<String, u64>, RemoteError> {
        let listed = self.bucket().list(prefix).await?.into_iter();
        Ok(listed.map(|meta| (meta.name, meta.bytes)).collect())
    }

    /// Starts to copy. What is missing of all runs is found out at once.
    pub async fn start(&self, cluster: &Cluster) -> Uploader {
        let runs = cluster.store().call(|store| store.runs()).await;
        for run in runs.unwrap_or_default() {
            self.state().add(Job::Run(run.name));
        }
        let remote = self.clone();
        let task = tokio::spawn(upload::run(remote.clone(), cluster.clone()));
        let journal = self.leadership().map(|_| {
            let remote = self.clone();
            tokio::spawn(remote.keep_journal(cluster.clone()))
        });
        Uploader {
            remote,
            task,
            journal,
        }
    }
}

/// The task that copies.
pub struct Uploader {
    remote: Remote,
    task: JoinHandle<()>,
    journal: Option<JoinHandle<()>>,
}

impl Uploader {
    /// Waits until everything is copied, but not for ever, and ends.
    pub async fn finish(self, cluster: &Cluster) {
        self.remote.0.hurry.notify_one();
        let idle = async {
            loop {
                let rest = self.remote.0.rest.notified();
                if self.remote.state().is_idle() {
                    return;
                }
                rest.await;
            }
        };
        if tokio::time::timeout(GRACE, idle).await.is_err() {
            warn!(
                url = self.remote.url(),
                "the coordinator ends, and the store does not have everything yet; the rest is copied when it starts again"
            );
        }
        self.task.abort();
        let _ = self.task.await;
        if let Some(journal) = self.journal {
            journal.abort();
            let _ = journal.await;
            let last = self.remote.finish_journal(cluster);
            if tokio::time::timeout(LAST_NEWS, last).await.is_err() {
                warn!("the coordinator ends, and the store does not have the newest of all runs");
            }
        }
    }
}

/// The id of a home, made when it is first asked for.
fn home_id(home: &Home) -> std::io::Result<String> {
    let path = home.root().join("id");
    if let Ok(id) = fs::read_to_string(&path) {
        return Ok(id.trim().to_owned());
    }
    let mut bytes = [0; 32];
    let random = SystemRandom::new().fill(&mut bytes);
    random.map_err(|_| std::io::Error::other("the system gives no random bytes"))?;
    let id = hex::encode(&bytes)[..32].to_owned();
    write_file(&path, id.as_bytes())?;
    Ok(id)
}

/// Where a home says as which leader it has entered all that those before it wrote.
fn entered(home: &Home) -> PathBuf {
    home.root().join("entered")
}

/// Writes a file, whole or not at all.
fn write_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    fs::write(&temporary, content)?;
    fs::File::open(&temporary)?.sync_all()?;
    fs::rename(temporary, path)
}
