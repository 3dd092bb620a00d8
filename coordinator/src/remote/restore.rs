//! The way back: runs that the store has and this home does not know are entered with what their manifests say, and cost no
//! more than that. Their checkpoints and corpora come when somebody goes on with them.
//!
//! Everything is hashed when it comes in. A directory gets its name when all of it is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cohort_common::checkpoint::{Checkpoint, FileEntry, LEDGER, hex};
use cohort_common::corpus::Corpus;
use cohort_common::home::RunName;
use cohort_common::ledger::Entry;
use cohort_common::spec::RunSpec;
use cohort_objects::{Download, ObjectError, Source};
use tokio::task::JoinSet;
use tracing::{error, info};

use super::layout::{self, StoredCheckpoint, StoredCorpus};
use super::upload::{blocking, corpora_of, local};
use super::{MAX_MANIFEST, Remote, RemoteError, hash_file, write_file};
use crate::data::start_directory;
use crate::driver::now_ms;
use crate::fetched::alone;
use crate::recover::{Found, read_ledger};
use crate::store::{CheckpointRow, StoreError, StoreHandle};

/// Downloads at a time.
const AT_A_TIME: usize = 4;

/// Enters the runs of the store that the database does not know. One that cannot be entered is logged.
pub async fn take_in(remote: &Remote, store: &StoreHandle) -> Result<(), RemoteError> {
    let mut runs: BTreeMap<RunName, BTreeSet<u64>> = BTreeMap::new();
    for meta in remote.bucket().list(layout::RUNS).await? {
        if let Some((run, step)) = layout::parse_checkpoint(&meta.name) {
            runs.entry(run).or_default().insert(step);
        }
    }
    for (run, steps) in runs {
        let wanted = run.clone();
        let known = store.call(move |s| s.run(&wanted).map(|_| ())).await;
        if !matches!(known, Err(StoreError::UnknownRun(_))) {
            continue;
        }
        match remote.take_in_one(store, &run, &steps).await {
            Ok(()) => {}
            Err(RemoteError::Object(error)) if error.is_transient() => return Err(error.into()),
            Err(error) => {
                let error = crate::status::chain(&error);
                error!(%run, error, "cannot take this run in from the store");
            }
        }
    }
    remote.state().taken_in = true;
    Ok(())
}

impl Remote {
    /// Enters a run with those of its checkpoints that are still there.
    async fn take_in_one(
        &self,
        store: &StoreHandle,
        run: &RunName,
        steps: &BTreeSet<u64>,
    ) -> Result<(), RemoteError> {
        let mut checkpoints = Vec::new();
        for &step in steps {
            let name = layout::checkpoint(run, step);
            let stored = match self.checkpoint_manifest(&name).await {
                // Whoever writes the run has deleted it since it was listed.
                Err(RemoteError::Object(error)) if error.is_missing() => continue,
                stored => stored?,
            };
            if stored.state.run != run.as_str() || stored.state.step != step {
                let (of, at) = (&stored.state.run, stored.state.step);
                return Err(RemoteError::Local(format!(
                    "the store has a manifest for step {step} of `{run}` that is of step {at} of `{of}`"
                )));
            }
            checkpoints.push(stored);
        }
        let Some(newest) = checkpoints.last() else {
            return Ok(());
        };
        let ledger = self.ledger(run, newest).await?;
        for stored in &checkpoints {
            self.remember(run, stored)?;
        }
        let newest = newest.clone();
        let read = checkpoints.iter().map(|stored| stored.state.step);
        let read: BTreeSet<u64> = read.collect();
        let rows = checkpoints
            .iter()
            .map(|stored| self.row(run, stored))
            .collect();
        let found = Found {
            name: run.clone(),
            state: newest.state,
            checkpoints: rows,
            ledger,
            record: newest.record,
            from: "the store",
        };
        store.call(move |s| found.record(s, now_ms())).await?;
        self.known(run, |known| known.steps = Some(read));
        info!(%run, "taken in from the store");
        Ok(())
    }

    pub(super) fn row(&self, run: &RunName, stored: &StoredCheckpoint) -> CheckpointRow {
        CheckpointRow {
            step: stored.state.step,
            path: self
                .home()
                .checkpoint(run, stored.state.step)
                .display()
                .to_string(),
            bytes: stored.bytes(),
            val_loss: stored.state.val_loss,
            state_hash: stored.state.state_hash,
            time_ms: stored.time_ms,
        }
    }

    /// Leaves a note that a checkpoint is in the store, for who looks at this home without a coordinator.
    pub(super) fn remember(
        &self,
        run: &RunName,
        stored: &StoredCheckpoint,
    ) -> Result<(), RemoteError> {
        let path = note(&self.home().run(run), stored.state.step);
        let directory = path.parent().expect("it was joined");
        fs::create_dir_all(directory).map_err(|error| local(directory, &error))?;
        let written = write_file(&path, format!("{}\n", self.url()).as_bytes());
        written.map_err(|error| local(&path, &error))
    }

    /// The ledger up to a checkpoint, or why there is none.
    pub(super) async fn ledger(
        &self,
        run: &RunName,
        stored: &StoredCheckpoint,
    ) -> Result<Result<Vec<Entry>, String>, RemoteError> {
        let directory = self.home().fetched().join(format!("ledger-{run}"));
        let ledger = stored.files.iter().filter(|file| file.name == LEDGER);
        let files = ledger.map(|file| (layout::object(run, &file.blake3), file.clone()));
        self.fetch(files.collect(), &directory).await?;
        let state = stored.state.clone();
        let read = blocking(move || {
            let read = read_ledger(&directory, &state);
            fs::remove_dir_all(&directory).map_err(|error| local(&directory, &error))?;
            Ok(read)
        });
        read.await
    }

    /// Brings back what a run needs to go on: its corpora, what it starts from, and its newest checkpoint. What is here stays.
    /// With `take_over`, this home is the one that writes the run from now on; without, it must be already. `newest` is the
    /// newest checkpoint that this home knows; where the store has a newer one of somebody else's, the run is not taken over.
    pub async fn bring_back(
        &self,
        run: &RunName,
        spec: &RunSpec,
        newest: Option<u64>,
        take_over: bool,
    ) -> Result<(), RemoteError> {
        if take_over {
            self.check_newest(run, newest).await?;
        }
        self.bring_corpora(spec).await?;
        // Whoever takes the lead goes on with what it has brought already: its workers have something younger.
        let some = |step| self.home().checkpoint(run, step).is_dir();
        // The newest may still be on its way here; one that is much older would be a long way back without them.
        let newest_two = |steps: BTreeSet<u64>| steps.into_iter().rev().take(2);
        let enough = self.leadership().is_some() && newest_two(self.steps(run).await?).any(some);
        if let Some(step) = newest.filter(|_| !enough) {
            self.bring_checkpoint(run, step).await?;
        }
        let owned = match take_over {
            true => self.take_over(run).await,
            // One that is not there yet has no owner.
            false if self.owner(run).await?.is_some() => self.own(run).await,
            false => Ok(()),
        };
        self.changed(run);
        owned
    }

    /// Brings a checkpoint back that is not here, with what its run starts from.
    pub async fn bring_checkpoint(&self, run: &RunName, step: u64) -> Result<(), RemoteError> {
        let target = self.home().checkpoint(run, step);
        let _alone = alone(&target).await;
        if target.is_dir() {
            return Ok(());
        }
        let name = layout::checkpoint(run, step);
        let stored = match self.checkpoint_manifest(&name).await {
            Err(RemoteError::Object(error)) if error.is_missing() => return Ok(()),
            stored => stored?,
        };
        self.bring_start(run, &stored.start).await?;
        let staged = beside(&target);
        self.fetch(named(run, &stored.files), &staged).await?;
        let whole = staged.clone();
        blocking(move || {
            let verified = Checkpoint::open(&whole).and_then(|checkpoint| checkpoint.verify());
            verified
                .map(|_| ())
                .map_err(|error| unusable(&whole, &error))
        })
        .await?;
        publish(&staged, &target)?;
        info!(%run, step, "brought back from the store");
        Ok(())
    }

    /// Brings back what a run starts from, if that is anything and is not here.
    pub(super) async fn bring_start(
        &self,
        run: &RunName,
        files: &[FileEntry],
    ) -> Result<(), RemoteError> {
        let start = start_directory(self.home(), run);
        let _alone = alone(&start).await;
        if !files.is_empty() && !start.is_dir() {
            let staged = beside(&start);
            self.fetch(named(run, files), &staged).await?;
            publish(&staged, &start)?;
        }
        Ok(())
    }

    /// Brings the corpora back that a run reads and that are not here, if the store has them.
    pub async fn bring_corpora(&self, spec: &RunSpec) -> Result<(), RemoteError> {
        for fingerprint in corpora_of(spec) {
            self.bring_corpus(&fingerprint).await?;
        }
        Ok(())
    }

    /// Brings a corpus back that is not here, if the store has it.
    async fn bring_corpus(&self, fingerprint: &str) -> Result<(), RemoteError> {
        let target = self.home().corpora().join(fingerprint);
        let hexadecimal = fingerprint.bytes().all(|b| b.is_ascii_hexdigit());
        let _alone = alone(&target).await;
        if target.is_dir() || !hexadecimal || fingerprint.is_empty() {
            return Ok(());
        }
        let name = layout::corpus_manifest(fingerprint);
        let json = match self.bucket().read(&name, MAX_MANIFEST).await {
            Err(error) if error.is_missing() => return Ok(()),
            json => json?,
        };
        let stored = StoredCorpus::parse(&json).map_err(|source| self.unusable(&name, source))?;
        let files = stored.files.into_iter().map(|file| {
            let hash = hex::encode(&file.blake3);
            (layout::corpus_object(fingerprint, &hash), file)
        });
        let staged = beside(&target);
        self.fetch(files.collect(), &staged).await?;
        let (whole, expected) = (staged.clone(), fingerprint.to_owned());
        blocking(move || {
            let corpus = Corpus::open(&whole).map_err(|error| unusable(&whole, &error))?;
            match corpus.index().fingerprint == expected {
                true => Ok(()),
                false => Err(RemoteError::Local(format!(
                    "the store has corpus {} under the name of {expected}",
                    corpus.index().fingerprint
                ))),
            }
        })
        .await?;
        publish(&staged, &target)?;
        self.state().corpora.insert(fingerprint.into());
        info!(fingerprint, "corpus brought back from the store");
        Ok(())
    }

    /// Fetches objects into a directory, each under a file's name and checked against its hash. What is there stays, and what
    /// was cut off goes on.
    async fn fetch(
        &self,
        files: Vec<(String, FileEntry)>,
        directory: &Path,
    ) -> Result<(), RemoteError> {
        fs::create_dir_all(directory).map_err(|error| local(directory, &error))?;
        let mut waiting = files.into_iter();
        let mut under_way = JoinSet::new();
        loop {
            while under_way.len() < AT_A_TIME
                && let Some((object, file)) = waiting.next()
            {
                let (remote, path) = (self.clone(), directory.join(&file.name));
                under_way.spawn(async move { remote.fetch_one(&object, &file, &path).await });
            }
            match under_way.join_next().await {
                Some(done) => done.map_err(|error| RemoteError::Local(error.to_string()))??,
                None => return Ok(()),
            }
        }
    }

    async fn fetch_one(
        &self,
        object: &str,
        file: &FileEntry,
        path: &Path,
    ) -> Result<(), RemoteError> {
        let here = path.to_owned();
        if blocking(move || hash(&here)).await? == Some(file.blake3) {
            return Ok(());
        }
        let url = self.bucket().url(object);
        let Some(meta) = self.bucket().head(object).await? else {
            let reason = String::new();
            return Err(ObjectError::Missing { url, reason }.into());
        };
        let part = path.with_file_name(format!(".part-{}", file.name));
        let download = Download::find(Source::Object(self.bucket().clone(), meta)).await?;
        let fetched = download.to_file(&part, &|_| {}).await?;
        if fetched.hash != file.blake3 {
            fs::remove_file(&part).map_err(|error| local(&part, &error))?;
            return Err(ObjectError::Damaged {
                url,
                found: hex::encode(&fetched.hash),
                expected: hex::encode(&file.blake3),
            }
            .into());
        }
        fs::rename(&part, path).map_err(|error| local(path, &error))
    }
}

/// Contents of a run, by the names of their objects.
fn named(run: &RunName, files: &[FileEntry]) -> Vec<(String, FileEntry)> {
    let named = files.iter();
    let named = named.map(|file| (layout::object(run, &file.blake3), file.clone()));
    named.collect()
}

/// BLAKE3 of a file; `None` if there is none.
fn hash(path: &Path) -> Result<Option<[u8; 32]>, RemoteError> {
    match hash_file(path) {
        Ok((_, hash)) => Ok(Some(hash)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(local(path, &error)),
    }
}

/// Where a home's note lies that a checkpoint is in a store.
pub fn note(run: &Path, step: u64) -> PathBuf {
    run.join("stored").join(format!("{step}"))
}

/// The directory beside another one in which it is put together. What is in it is complete, or named as a part, so it is
/// used again after a crash; its name is none that readers look at.
fn beside(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".from-store-{name}"))
}

/// What does not fit together, though each file is what the store says. It is fetched again next time.
fn unusable(staged: &Path, error: &dyn std::error::Error) -> RemoteError {
    // What cannot be deleted either is said next time.
    drop(fs::remove_dir_all(staged));
    RemoteError::Local(crate::status::chain(error))
}

/// Gives a directory its name.
fn publish(staged: &Path, target: &Path) -> Result<(), RemoteError> {
    let renamed = fs::rename(staged, target);
    renamed.map_err(|error| local(target, &error))?;
    // So that the name is on the disk, where the system can do that.
    #[cfg(unix)]
    if let Some(parent) = target.parent() {
        let synced = fs::File::open(parent).and_then(|directory| directory.sync_all());
        synced.map_err(|error| local(parent, &error))?;
    }
    Ok(())
}
