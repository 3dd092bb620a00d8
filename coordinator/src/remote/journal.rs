//! What a leader writes to the store while runs train, so that a coordinator that stands by can go on with all of it: of each
//! run what it is and how it stands, and its ledger, in pieces (`running.rs`).
//!
//! Nothing that trains waits for it: a run that has changed is noted, one task writes what is new of the noted ones, and the
//! driver is told up to which step a ledger is in the store. What is not there yet the workers keep.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use cohort_common::cluster::Event;
use cohort_common::home::RunName;
use cohort_common::ids::RunId;
use cohort_common::ledger::Entry;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::layout::FORMAT;
use super::running::{self, Part, Piece, StoredRun};
use super::upload::corpora_of;
use super::{Remote, RemoteError};
use crate::driver::Cluster;
use crate::status::chain;
use crate::store::{EvalRow, RunRow, Store, StoreError};

/// The shortest time between two pieces of a run's ledger.
const INTERVAL: Duration = Duration::from_millis(300);
/// The longest; it grows with the pieces that are there.
const LONGEST_INTERVAL: Duration = Duration::from_secs(5);
/// The pause after an error; each further one is twice as long, up to a lease's length.
const PAUSE: Duration = Duration::from_millis(250);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// Entries in a piece, at most.
const ENTRIES: u32 = 2048;
/// Lanes of all its entries, at most: each is some 50 bytes of JSON, and a piece is read at once.
const LANES: u32 = 1 << 18;
/// How long whoever submits a run waits until the store knows it.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is to be written, and what is there.
#[derive(Debug, Default)]
pub(super) struct Journal {
    /// Runs that have changed.
    noted: Mutex<BTreeSet<RunName>>,
    wake: Notify,
    /// Grows with each run that was written.
    written: watch::Sender<u64>,
    there: Mutex<BTreeMap<RunName, There>>,
    /// Held by whoever writes or deletes.
    work: tokio::sync::Mutex<()>,
}

/// What is in the store of a run, as far as this leader has written it.
#[derive(Clone, Debug, Default)]
struct There {
    /// BLAKE3 of its document.
    document: Option<[u8; 32]>,
    /// The end of the ledger there, and the hash of its entry; `None` before the first piece.
    end: Option<(u64, [u8; 32])>,
    /// The last steps of the pieces, by number.
    pieces: BTreeMap<u64, u64>,
    /// The number of the next one.
    next: u64,
    /// Whether those of earlier leaders are deleted.
    swept: bool,
}

/// What is new of a run.
struct New {
    row: RunRow,
    facts: Option<cohort_common::api::RunFacts>,
    evals: Vec<EvalRow>,
    after: u64,
    /// The hash of the entry of that step.
    head: [u8; 32],
    entries: Vec<Entry>,
    /// Whether there are more.
    more: bool,
}

impl Journal {
    fn noted(&self) -> MutexGuard<'_, BTreeSet<RunName>> {
        self.noted.lock().expect("no panic under this lock")
    }

    fn there(&self) -> MutexGuard<'_, BTreeMap<RunName, There>> {
        self.there.lock().expect("no panic under this lock")
    }
}

impl Remote {
    /// A run has changed: what is new is written to the store, if others stand by.
    pub fn note(&self, run: &RunName) {
        if self.leadership().is_some() && self.0.journal.noted().insert(run.clone()) {
            self.0.journal.wake.notify_one();
        }
    }

    /// Waits until the store knows a run that was noted, but not for long. Without others that stand by, there is nothing to wait
    /// for.
    pub async fn noted(&self, run: &RunName) {
        if self.leadership().is_none() {
            return;
        }
        self.note(run);
        let mut written = self.0.journal.written.subscribe();
        let known = async {
            let is_there = || {
                let there = self.0.journal.there();
                there.get(run).is_some_and(|there| there.document.is_some())
            };
            while !is_there() {
                if written.changed().await.is_err() {
                    return;
                }
            }
        };
        if timeout(PATIENCE, known).await.is_err() {
            warn!(%run, "the store does not know this run yet; it is lost if this machine is");
        }
    }

    /// Has nothing written of any run for as long as the answer lives.
    pub async fn unwritten(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.0.journal.work.lock().await
    }

    /// Writes what is new of runs until it is stopped.
    pub(super) async fn keep_journal(self, cluster: Cluster) {
        let runs = cluster.read(|store| store.runs()).await;
        for run in runs.unwrap_or_default() {
            if !run.status.has_ended() {
                self.note(&run.name);
            }
        }
        let mut pause = PAUSE;
        loop {
            let noted = std::mem::take(&mut *self.0.journal.noted());
            if noted.is_empty() {
                self.0.journal.wake.notified().await;
                continue;
            }
            let mut interval = INTERVAL;
            let mut failed = false;
            for run in noted {
                match self.write_new(&cluster, &run).await {
                    Ok(pieces) => {
                        let grown = Duration::from_millis(pieces as u64);
                        interval = interval.max(grown.min(LONGEST_INTERVAL));
                        self.0.journal.written.send_modify(|n| *n += 1);
                    }
                    Err(error) => {
                        if !failed {
                            warn!(%run, error = chain(&error), "cannot write to the store what is new of runs; it is tried again");
                        }
                        failed = true;
                        self.0.journal.noted().insert(run);
                    }
                }
            }
            match failed {
                true => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                false => {
                    pause = PAUSE;
                    sleep(interval).await;
                }
            }
        }
    }

    /// Writes all that is new before the coordinator ends, as far as that goes at once.
    pub async fn finish_journal(&self, cluster: &Cluster) {
        let mut runs = std::mem::take(&mut *self.0.journal.noted());
        // Whoever wrote them may have been stopped in the middle.
        runs.extend(self.0.journal.there().keys().cloned());
        for run in runs {
            if let Err(error) = self.write_new(cluster, &run).await {
                warn!(%run, error = chain(&error), "the store does not have the newest of this run");
            }
        }
    }

    /// Writes what is new of a run. Says how many pieces of its ledger are there.
    pub(super) async fn write_new(
        &self,
        cluster: &Cluster,
        run: &RunName,
    ) -> Result<usize, RemoteError> {
        let _work = self.unwritten().await;
        loop {
            let there = self.0.journal.there().get(run).cloned().unwrap_or_default();
            let base = self.base(run).await?;
            let Some(new) = read_new(cluster, run, &there, base).await? else {
                // It was removed.
                self.0.journal.there().remove(run);
                return Ok(0);
            };
            let more = new.more;
            let there = self.write(run, there, new).await?;
            let (end, pieces) = (there.end, there.pieces.len());
            self.0.journal.there().insert(run.clone(), there);
            if let Some((step, _)) = end {
                let run = RunId::new(run.as_str());
                cluster.send(Event::Shipped { run, step }).await;
            }
            if !more {
                self.sweep_pieces(run, base).await?;
                return Ok(pieces);
            }
        }
    }

    /// The newest checkpoint that is in the store: its ledger is there with it.
    async fn base(&self, run: &RunName) -> Result<u64, RemoteError> {
        let steps = self.steps(run).await?;
        Ok(steps.last().copied().unwrap_or(0))
    }

    async fn write(&self, run: &RunName, mut there: There, new: New) -> Result<There, RemoteError> {
        let leadership = self.leadership().ok_or(RemoteError::Fenced)?;
        let may = || match leadership.leads() {
            true => Ok(()),
            false => Err(RemoteError::Fenced),
        };
        let taken_back = there.end.is_some_and(|(end, _)| new.after < end);
        let first = there.end.is_none() && !new.row.status.has_ended();
        if !new.entries.is_empty() || taken_back || first {
            let last = new.entries.last();
            let step = last.map_or(new.after, |entry| entry.step);
            let hash = last.map_or(new.head, Entry::hash);
            let piece = Piece {
                format: FORMAT,
                after: new.after,
                entries: new.entries,
            };
            may()?;
            let name = running::piece(run, leadership.generation(), there.next);
            let json = serde_json::to_vec(&piece).expect("plain data");
            // A number is used once, whatever becomes of the write: its answer may be lost after the deed.
            there.pieces.insert(there.next, step);
            there.next += 1;
            self.0.journal.there().insert(run.clone(), there.clone());
            self.bucket().write(&name, json).await?;
            there.end = Some((step, hash));
        }
        let Some(start) = self.furnished(&new.row) else {
            return Ok(there);
        };
        let document = StoredRun::of(&self.0.id, new.row, new.facts, new.evals, start);
        let json = serde_json::to_vec(&document).expect("plain data");
        let hash = *blake3::hash(&json).as_bytes();
        if there.document != Some(hash) {
            may()?;
            self.bucket().write(&running::document(run), json).await?;
            there.document = Some(hash);
        }
        Ok(there)
    }

    /// The files that a run starts from, if they and its corpora are in the store. Nothing there refers to what is not.
    fn furnished(&self, row: &RunRow) -> Option<Vec<cohort_common::checkpoint::FileEntry>> {
        let corpora = corpora_of(&row.spec);
        let state = self.state();
        let all = corpora.iter().all(|corpus| state.corpora.contains(corpus));
        let start = state.runs.get(&row.name)?;
        (all && start.furnished)
            .then(|| start.start.clone())
            .flatten()
    }

    /// Deletes the pieces that nobody needs any more: those of earlier leaders, and those up to a checkpoint that is there.
    async fn sweep_pieces(&self, run: &RunName, base: u64) -> Result<(), RemoteError> {
        let Some(leadership) = self.leadership() else {
            return Ok(());
        };
        let there = self.0.journal.there().get(run).cloned().unwrap_or_default();
        let mut doomed = Vec::new();
        if !there.swept {
            for meta in self.bucket().list(&running::pieces(run)).await? {
                if let Some((_, Part::Piece(generation, _))) = running::parse(&meta.name)
                    && generation < leadership.generation()
                {
                    doomed.push((None, meta.name));
                }
            }
        }
        // The newest stays: it says where the ledger ends.
        let newest = there.pieces.keys().last().copied();
        for (&number, &last) in &there.pieces {
            if last <= base && Some(number) != newest {
                let name = running::piece(run, leadership.generation(), number);
                doomed.push((Some(number), name));
            }
        }
        for (number, name) in doomed {
            if !leadership.leads() {
                return Err(RemoteError::Fenced);
            }
            self.bucket().delete(&name).await?;
            if let (Some(number), Some(there)) = (number, self.0.journal.there().get_mut(run)) {
                there.pieces.remove(&number);
            }
        }
        if let Some(there) = self.0.journal.there().get_mut(run) {
            there.swept = true;
        }
        Ok(())
    }

    /// Forgets what was written of a run, as it is deleted.
    pub(super) fn forget_journal(&self, run: &RunName) {
        self.0.journal.there().remove(run);
    }
}

/// What is new of a run; `None` if there is no such run. `base` is where its ledger begins for a leader that has written nothing
/// yet, or where it was taken back.
async fn read_new(
    cluster: &Cluster,
    run: &RunName,
    there: &There,
    base: u64,
) -> Result<Option<New>, RemoteError> {
    let (name, end) = (run.clone(), there.end);
    let look = move |store: &Store| {
        let row = match store.run(&name) {
            Err(StoreError::UnknownRun(_)) => return Ok(None),
            row => row?,
        };
        let newest = store.last_entry(&name)?;
        let last = newest.as_ref().map_or(0, |entry| entry.step);
        let lanes = newest.map_or(1, |entry| entry.lanes.len().max(1) as u32);
        let same = match end {
            Some((0, _)) => true,
            Some((step, hash)) => store.entry(&name, step)?.is_some_and(|e| e.hash() == hash),
            None => false,
        };
        // What is taken back lies behind the newest good checkpoint, which is in the store or will be.
        let good = store.checkpoints(&name)?;
        let good = good.iter().rev().find(|row| row.step <= last);
        let after = match (same, end) {
            (true, Some((step, _))) => step,
            (_, None) => base.min(last),
            (false, Some((step, _))) => good.map_or(0, |row| row.step).min(base).min(step),
        };
        let entries = store.entries(&name, after + 1, (LANES / lanes).clamp(1, ENTRIES))?;
        let more = entries.last().is_some_and(|entry| entry.step < last);
        Ok(Some(New {
            facts: store.facts(&name)?,
            evals: store.evals(&name, None)?,
            row,
            after,
            head: store
                .entry(&name, after)?
                .map_or([0; 32], |entry| entry.hash()),
            entries,
            more,
        }))
    };
    let found = cluster.read(look).await;
    found.map_err(|status| RemoteError::Local(status.message().to_owned()))
}
