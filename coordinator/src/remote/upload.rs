//! Copies to the store, one thing at a time and each in its turn: corpora that were prepared, and of each run the newest
//! checkpoint that is missing, until none is. What is to be done follows from what is there and what is not, so nothing is lost
//! when the coordinator or the store dies in the middle.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cohort_common::api::RunEvent;
use cohort_common::checkpoint::{FileEntry, MANIFEST, Manifest, RUN, RunState, hex, is_plain_name};
use cohort_common::home::RunName;
use cohort_common::spec::RunSpec;
use tokio::time::sleep;
use tracing::{info, warn};

use super::layout::{self, FORMAT, Record, StoredCheckpoint, StoredCorpus};
use super::{InStore, Remote, RemoteError, hash_file, restore};
use crate::data::start_directory;
use crate::driver::Cluster;
use crate::record::record_event;
use crate::status::chain;
use crate::store::{CheckpointRow, RunRow, Store, StoreError};

/// The pause after an error; each further one is twice as long, up to the longest.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// What there is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Job {
    /// Runs of the store that this home does not know are to be looked for.
    TakeIn,
    /// A corpus may be missing there.
    Corpus(String),
    /// Something of a run may be missing there.
    Run(RunName),
}

/// What became of a job.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// All of it is done.
    All,
    /// There is more to do.
    More,
}

/// Copies until it is stopped.
pub async fn run(remote: Remote, cluster: Cluster) {
    let mut pause = PAUSE;
    loop {
        let Some(job) = remote.next() else {
            remote.0.rest.notify_one();
            remote.0.wake.notified().await;
            continue;
        };
        let Some(done) = remote.undisturbed(remote.work(&cluster, &job)).await else {
            // What was under way comes again, where it is still wanted.
            remote.settle(&job, &Ok(Done::More));
            continue;
        };
        let failed = remote.settle(&job, &done);
        match done {
            Ok(_) => {
                pause = PAUSE;
                if let Job::Run(run) = &job {
                    remote.tell(&cluster, run, None).await;
                }
            }
            Err(error) => {
                let text = chain(&error);
                warn!(error = text, "cannot copy to the store; it is tried again");
                if let Job::Run(run) = &job {
                    remote.tell(&cluster, run, Some(text)).await;
                }
            }
        }
        if failed {
            // What comes meanwhile waits for the same store.
            tokio::select! {
                () = sleep(pause) => {}
                () = remote.0.hurry.notified() => {}
            }
            pause = (pause * 2).min(LONGEST);
        }
    }
}

impl Remote {
    /// The next thing to do.
    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        state.busy = true;
        if !state.taken_in {
            return Some(Job::TakeIn);
        }
        let job = state.due.pop_front();
        state.busy = job.is_some();
        job
    }

    /// Does some work when nobody else copies or deletes; `None` if somebody wants to meanwhile ([`Remote::alone`]).
    pub(super) async fn undisturbed<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        // Before the lock, so that nobody who asks for it is missed.
        let interrupted = self.0.interrupted.notified();
        let _work = self.0.work.lock().await;
        tokio::select! {
            biased;
            () = interrupted => None,
            done = work => Some(done),
        }
    }

    /// Does what there is to do.
    pub(super) async fn work(&self, cluster: &Cluster, job: &Job) -> Result<Done, RemoteError> {
        match job {
            Job::TakeIn => {
                // The store may have been away when it was opened.
                self.check_format().await?;
                restore::take_in(self, cluster.store()).await?;
            }
            Job::Corpus(fingerprint) => self.copy_corpus(fingerprint).await?,
            Job::Run(run) => return self.follow(cluster, run).await,
        }
        Ok(Done::All)
    }

    /// Puts what is not done behind the rest. Says whether that is for an error that may pass.
    fn settle(&self, job: &Job, done: &Result<Done, RemoteError>) -> bool {
        let again = match done {
            Ok(Done::All) => false,
            Ok(Done::More) => true,
            // Nothing changes that before somebody resumes the run.
            Err(RemoteError::Taken { .. } | RemoteError::Fenced) => false,
            Err(_) => true,
        };
        let mut state = self.state();
        match job {
            Job::TakeIn => state.taken_in = !again,
            Job::Corpus(_) | Job::Run(_) if again => state.add(job.clone()),
            Job::Corpus(_) | Job::Run(_) => {}
        }
        state.busy = false;
        again && done.is_err()
    }

    /// Writes down that a run's copy fails, or that it goes on, when that changes.
    async fn tell(&self, cluster: &Cluster, run: &RunName, problem: Option<String>) {
        let before = {
            let mut state = self.state();
            let known = state.runs.entry(run.clone()).or_default();
            std::mem::replace(&mut known.problem, problem.clone())
        };
        let text = match (&before, &problem) {
            (None, Some(why)) => {
                format!("the store does not have the newest of this run: {why}; training goes on")
            }
            (Some(_), None) => "the store follows this run again".to_owned(),
            _ => return,
        };
        let name = run.clone();
        let note = RunEvent::Note {
            run: run.to_string(),
            text,
        };
        let written = cluster
            .store()
            .call(move |store| record_event(store, &name, &note));
        match written.await {
            Ok(()) => cluster.announce(),
            Err(error) => warn!(%run, %error, "cannot write that down"),
        }
    }

    /// Copies the newest checkpoint of a run that is missing, and deletes there what the run does not keep.
    pub(super) async fn follow(
        &self,
        cluster: &Cluster,
        run: &RunName,
    ) -> Result<Done, RemoteError> {
        let wanted = run.clone();
        let read = move |store: &Store| {
            let row = store.run(&wanted)?;
            Ok((row, store.checkpoints(&wanted)?))
        };
        let (row, rows) = match cluster.store().call(read).await {
            Ok(found) => found,
            Err(StoreError::UnknownRun(_)) => return Ok(Done::All),
            Err(error) => return Err(error.into()),
        };
        if self.leadership().is_some() {
            self.furnish(&row).await?;
        }
        let there = self.steps(run).await?;
        let is_here = |row: &&CheckpointRow| self.home().checkpoint(run, row.step).is_dir();
        let missing = rows.iter().filter(|row| !there.contains(&row.step));
        let missing: Vec<&CheckpointRow> = missing.filter(is_here).collect();
        self.known(run, |known| known.waiting = missing.len());
        let Some(newest) = missing.last() else {
            self.keep(run, &rows).await?;
            return Ok(Done::All);
        };
        self.own(run).await?;
        for fingerprint in corpora_of(&row.spec) {
            self.copy_corpus(&fingerprint).await?;
        }
        let copied = self.copy_checkpoint(cluster, &row, newest).await?;
        if copied {
            self.known(run, |known| known.waiting = missing.len() - 1);
            self.keep(run, &rows).await?;
        }
        Ok(match missing.len() > 1 || !copied {
            true => Done::More,
            false => Done::All,
        })
    }

    /// Copies what a run reads and starts from, before it has a checkpoint: others stand by that would have to go on with it.
    async fn furnish(&self, run: &RunRow) -> Result<(), RemoteError> {
        let name = &run.name;
        if run.status.has_ended() || self.known(name, |known| known.furnished) {
            return Ok(());
        }
        self.own(name).await?;
        for fingerprint in corpora_of(&run.spec) {
            self.copy_corpus(&fingerprint).await?;
        }
        let directory = start_directory(self.home(), name);
        for entry in self.start_files(run).await? {
            let path = directory.join(&entry.name);
            let file = File::open(&path).map_err(|error| local(&path, &error))?;
            self.copy_file(name, &entry, (&path, file)).await?;
        }
        self.known(name, |known| known.furnished = true);
        self.note(name);
        Ok(())
    }

    /// Changes what is known of a run.
    pub(super) fn known<T>(&self, run: &RunName, change: impl FnOnce(&mut InStore) -> T) -> T {
        change(self.state().runs.entry(run.clone()).or_default())
    }

    /// The checkpoints that the store has of a run; it is asked once, and when a manifest may or may not be there.
    pub(super) async fn steps(&self, run: &RunName) -> Result<BTreeSet<u64>, RemoteError> {
        let known = |known: &mut InStore| known.steps.clone().filter(|_| !known.unsure);
        if let Some(steps) = self.known(run, known) {
            return Ok(steps);
        }
        let steps = self.listed_steps(run).await?;
        self.known(run, |known| {
            (known.steps, known.unsure) = (Some(steps.clone()), false);
        });
        Ok(steps)
    }

    /// Copies a checkpoint; it counts when its manifest is there. Says whether it was still here.
    async fn copy_checkpoint(
        &self,
        cluster: &Cluster,
        run: &RunRow,
        row: &CheckpointRow,
    ) -> Result<bool, RemoteError> {
        let (name, step) = (&run.name, row.step);
        let directory = self.home().checkpoint(name, step);
        // Open files stay readable when the run deletes the checkpoint meanwhile.
        let opened = {
            let directory = directory.clone();
            blocking(move || open_checkpoint(&directory)).await?
        };
        let Some((state, mut files)) = opened else {
            return Ok(false);
        };
        let start = self.start_files(run).await?;
        let start_directory = start_directory(self.home(), name);
        for entry in &start {
            let path = start_directory.join(&entry.name);
            let file = File::open(&path).map_err(|error| local(&path, &error))?;
            files.push((entry.clone(), path, file));
        }
        let manifest = StoredCheckpoint {
            format: FORMAT,
            state,
            record: record_of(cluster, run, step).await?,
            time_ms: row.time_ms,
            files: files[..files.len() - start.len()]
                .iter()
                .map(|(entry, ..)| entry.clone())
                .collect(),
            start,
        };
        let mut sent = 0;
        for (entry, path, file) in files {
            sent += self.copy_file(name, &entry, (&path, file)).await?;
        }
        // Somebody may have taken the run over while this took its time.
        self.own(name).await?;
        let json = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
        self.known(name, |known| known.unsure = true);
        self.bucket()
            .write(&layout::checkpoint(name, step), json)
            .await?;
        self.known(name, |known| known.unsure = false);
        self.remember(name, &manifest)?;
        self.known(name, |known| {
            known.steps.as_mut().map(|steps| steps.insert(step))
        });
        info!(run = %name, step, sent, "the checkpoint is in the store");
        // Its ledger is there with it.
        self.note(name);
        cluster.announce();
        Ok(true)
    }

    /// Copies a content that is not there. Says how many bytes that were.
    async fn copy_file(
        &self,
        run: &RunName,
        entry: &FileEntry,
        file: (&Path, File),
    ) -> Result<u64, RemoteError> {
        let object = layout::object(run, &entry.blake3);
        if self.known(run, |known| known.objects.is_none()) {
            let objects = self.listed_objects(&layout::objects(run)).await?;
            self.known(run, |known| known.objects = Some(objects));
        }
        let has = |known: &mut InStore| {
            let objects = known.objects.as_ref();
            objects.and_then(|objects| objects.get(&object)) == Some(&entry.bytes)
        };
        if self.known(run, has) {
            return Ok(0);
        }
        self.bucket().put(&object, file, &entry.blake3).await?;
        // Unless that was forgotten meanwhile: then it is listed anew.
        self.known(run, |known| {
            let objects = known.objects.as_mut();
            objects.map(|objects| objects.insert(object, entry.bytes))
        });
        Ok(entry.bytes)
    }

    /// What a run starts from, hashed once.
    async fn start_files(&self, run: &RunRow) -> Result<Vec<FileEntry>, RemoteError> {
        if let Some(files) = self.known(&run.name, |known| known.start.clone()) {
            return Ok(files);
        }
        let directory = start_directory(self.home(), &run.name);
        let files = match run.spec.start.is_some() && directory.is_dir() {
            true => blocking(move || entries(&directory)).await?,
            false => Vec::new(),
        };
        self.known(&run.name, |known| known.start = Some(files.clone()));
        Ok(files)
    }

    /// Copies a corpus that is not there; it counts when its manifest is there. What an upload has left that was torn is not
    /// sent again.
    pub(super) async fn copy_corpus(&self, fingerprint: &str) -> Result<(), RemoteError> {
        if self.state().corpora.contains(fingerprint) {
            return Ok(());
        }
        let name = layout::corpus_manifest(fingerprint);
        if self.bucket().head(&name).await?.is_none() {
            let directory = self.home().corpora().join(fingerprint);
            if !directory.is_dir() {
                // It was removed; whoever needs it prepares it again.
                return Ok(());
            }
            let listed = directory.clone();
            let files = blocking(move || entries(&listed)).await?;
            let below = layout::corpus_objects(fingerprint);
            let there = self.listed_objects(&below).await?;
            for entry in &files {
                let object = layout::corpus_object(fingerprint, &hex::encode(&entry.blake3));
                if there.get(&object) == Some(&entry.bytes) {
                    continue;
                }
                let path = directory.join(&entry.name);
                let file = File::open(&path).map_err(|error| local(&path, &error))?;
                let put = self.bucket().put(&object, (&path, file), &entry.blake3);
                put.await?;
            }
            let manifest = StoredCorpus {
                format: FORMAT,
                files,
            };
            let json = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
            self.bucket().write(&name, json).await?;
            info!(fingerprint, "the corpus is in the store");
        }
        self.state().corpora.insert(fingerprint.into());
        Ok(())
    }
}

/// The corpora that a run reads.
pub(super) fn corpora_of(spec: &RunSpec) -> Vec<String> {
    let all = spec.training_corpora().into_iter();
    let all = all.chain(spec.base_corpus());
    let all: BTreeSet<&str> = all.collect();
    all.into_iter().map(str::to_owned).collect()
}

async fn record_of(cluster: &Cluster, run: &RunRow, step: u64) -> Result<Record, RemoteError> {
    let name = run.name.clone();
    let read = move |store: &Store| Ok((store.facts(&name)?, store.evals(&name, None)?));
    let (facts, mut evals) = cluster.store().call(read).await?;
    evals.retain(|eval| eval.step <= step);
    Ok(Record {
        created_ms: run.created_ms,
        parent: run.parent.clone(),
        facts,
        evals,
    })
}

/// Files of a checkpoint and where they lie, opened so that they stay while it is copied.
type OpenFiles = Vec<(FileEntry, PathBuf, File)>;

/// The files of a checkpoint, each open; `None` if it is not there any more.
fn open_checkpoint(directory: &Path) -> Result<Option<(RunState, OpenFiles)>, RemoteError> {
    let is_gone =
        |error: &io::Error| error.kind() == io::ErrorKind::NotFound && !directory.is_dir();
    let open = |name: &str| {
        let path = directory.join(name);
        match File::open(&path) {
            Err(error) if is_gone(&error) => Ok(None),
            file => file.map(Some).map_err(|error| local(&path, &error)),
        }
    };
    let read = |name: &str| {
        let path = directory.join(name);
        match fs::read(&path) {
            Err(error) if is_gone(&error) => Ok(None),
            content => content.map(Some).map_err(|error| local(&path, &error)),
        }
    };
    let (Some(manifest), Some(state)) = (read(MANIFEST)?, read(RUN)?) else {
        return Ok(None);
    };
    let damaged = |name: &str, error: &dyn std::fmt::Display| {
        RemoteError::Local(format!(
            "`{}` is damaged: {error}",
            directory.join(name).display()
        ))
    };
    let text = String::from_utf8_lossy(&manifest);
    let parsed = Manifest::parse(&text).map_err(|error| damaged(MANIFEST, &error))?;
    let state = serde_json::from_slice(&state).map_err(|error| damaged(RUN, &error))?;
    let own = FileEntry {
        name: MANIFEST.into(),
        bytes: manifest.len() as u64,
        blake3: *blake3::hash(&manifest).as_bytes(),
    };
    let mut files = Vec::new();
    for entry in parsed.files.into_iter().chain([own]) {
        match open(&entry.name)? {
            Some(file) => {
                let path = directory.join(&entry.name);
                files.push((entry, path, file));
            }
            None => return Ok(None),
        }
    }
    Ok(Some((state, files)))
}

/// The files of a directory, hashed.
fn entries(directory: &Path) -> Result<Vec<FileEntry>, RemoteError> {
    let mut found = Vec::new();
    let listed = fs::read_dir(directory).map_err(|error| local(directory, &error))?;
    for entry in listed {
        let entry = entry.map_err(|error| local(directory, &error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        if !is_plain_name(&name) || !path.is_file() {
            continue;
        }
        let (bytes, blake3) = hash_file(&path).map_err(|error| local(&path, &error))?;
        found.push(FileEntry {
            name,
            bytes,
            blake3,
        });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

pub(super) fn local(path: &Path, error: &dyn std::fmt::Display) -> RemoteError {
    RemoteError::Local(format!("`{}`: {error}", path.display()))
}

/// Runs file work on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RemoteError> + Send + 'static,
) -> Result<T, RemoteError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| RemoteError::Local(error.to_string()))?
}
