//! What a coordinator that stands by does with the store: it enters into its own database what the leader writes there of runs
//! (`journal.rs`, checkpoints), again and again, and brings corpora and the newest checkpoints of runs that are under way. So
//! that when it leads, there is little left to fetch.
//!
//! The store is right where the two differ: entries of the ledger that are not those of the store, and checkpoints that the
//! store does not list, are taken out of this home. Only a home whose coordinator has led last, and nobody since, is not
//! mirrored: there the home is what is true.

use std::collections::{BTreeMap, BTreeSet, btree_map};

use bytes::Bytes;
use cohort_common::api::RunEvent;
use cohort_common::checkpoint::{FileEntry, remove_checkpoint};
use cohort_common::home::RunName;
use cohort_common::ledger::{Chain, Entry};
use cohort_common::order::Shares;
use cohort_common::spec::RunSpec;
use tracing::{debug, info, warn};

use super::layout::{self, StoredCheckpoint};
use super::running::{self, Part, Piece, StoredRun};
use super::{MAX_MANIFEST, Remote, RemoteError};
use crate::driver::now_ms;
use crate::plan::first_chain;
use crate::record::{record_event, step_row};
use crate::status::chain;
use crate::store::{CheckpointRow, NewRun, RunStatus, Store, StoreError, StoreHandle};

/// What is in the store, and how far it is entered here.
#[derive(Debug)]
pub struct Mirror {
    remote: Remote,
    store: StoreHandle,
    runs: BTreeMap<RunName, Followed>,
    /// Whether runs that this home knows are mirrored, too.
    all: bool,
    /// Whether one changed while it was last read.
    changed: bool,
}

/// A run that is followed.
#[derive(Clone, Debug, Default)]
struct Followed {
    document: Option<(Option<String>, StoredRun)>,
    checkpoints: BTreeMap<u64, StoredCheckpoint>,
    /// Pieces that are entered, with their generation.
    entered: BTreeSet<(u64, u64)>,
    /// The ledger is not to be continued from what is here.
    torn: bool,
}

/// What a listing shows of a run.
#[derive(Debug, Default)]
struct Listed {
    document: Option<Option<String>>,
    checkpoints: BTreeSet<u64>,
    pieces: BTreeSet<(u64, u64)>,
}

/// What is to be brought for a run that is under way.
#[derive(Clone, Debug)]
pub struct Wanted {
    run: RunName,
    spec: RunSpec,
    start: Vec<FileEntry>,
    newest: Option<u64>,
    older: Vec<u64>,
}

impl Mirror {
    /// Nothing is entered yet.
    pub fn new(remote: Remote, store: StoreHandle) -> Self {
        Self {
            remote,
            store,
            runs: BTreeMap::new(),
            all: true,
            changed: false,
        }
    }

    /// Whether all that was there at the last look is entered.
    pub fn is_whole(&self) -> bool {
        !self.changed && !self.runs.values().any(|run| run.torn)
    }

    /// Leaves the runs as they are that this home knows, or not.
    pub fn mirror_all(&mut self, all: bool) {
        self.all = all;
    }

    /// What is followed, for people.
    pub fn describe(&self) -> String {
        let under_way = self.runs.iter().filter(|(_, followed)| {
            let status = followed
                .document
                .as_ref()
                .map(|(_, doc)| doc.status.as_str());
            matches!(status, Some("queued" | "running"))
        });
        let names: Vec<&str> = under_way.map(|(run, _)| run.as_str()).collect();
        match (self.runs.len(), names.len()) {
            (0, _) => "the store has no runs yet".into(),
            (all, 0) => format!("it follows {all} runs of the store, none of which is under way"),
            (all, _) => format!(
                "it follows {all} runs of the store; under way: {}",
                names.join(", ")
            ),
        }
    }

    /// Looks once, and enters what is new.
    pub async fn refresh(&mut self) -> Result<(), RemoteError> {
        let mut listed: BTreeMap<RunName, Listed> = BTreeMap::new();
        for meta in self.remote.bucket().list(layout::RUNS).await? {
            let Some((run, part)) = running::parse(&meta.name) else {
                continue;
            };
            let run = listed.entry(run).or_default();
            match part {
                Part::Document => run.document = Some(meta.version),
                Part::Checkpoint(step) => drop(run.checkpoints.insert(step)),
                Part::Piece(generation, number) => drop(run.pieces.insert((generation, number))),
            }
        }
        self.changed = false;
        for (run, listed) in &listed {
            match self.follow(run, listed).await {
                Ok(()) => {}
                // Whatever was listed is deleted when something newer is there: the next look sees that.
                Err(RemoteError::Object(error)) if error.is_missing() => {
                    debug!(%run, error = chain(&error), "changed while it was read");
                    self.changed = true;
                    self.runs.entry(run.clone()).or_default();
                }
                Err(RemoteError::Object(error)) if error.is_transient() => return Err(error.into()),
                Err(error) => {
                    warn!(%run, error = chain(&error), "cannot follow this run in the store");
                    self.runs.entry(run.clone()).or_default().torn = true;
                }
            }
        }
        self.runs.retain(|run, _| listed.contains_key(run));
        Ok(())
    }

    async fn follow(&mut self, run: &RunName, listed: &Listed) -> Result<(), RemoteError> {
        let mut known = self.runs.get(run).cloned().unwrap_or_default();
        if known.torn {
            known.entered.clear();
        }
        if let Some(version) = &listed.document
            && known.document.as_ref().map(|(known, _)| known) != Some(version)
        {
            let name = running::document(run);
            let json = self.json(&name).await?;
            let document = StoredRun::parse(&json);
            let document = document.map_err(|source| self.remote.unusable(&name, source))?;
            known.document = Some((version.clone(), document));
        }
        known
            .checkpoints
            .retain(|step, _| listed.checkpoints.contains(step));
        for &step in &listed.checkpoints {
            if let btree_map::Entry::Vacant(unknown) = known.checkpoints.entry(step) {
                let name = layout::checkpoint(run, step);
                unknown.insert(self.remote.checkpoint_manifest(&name).await?);
            }
        }
        let newest = known.entered.last().copied();
        let mut pieces = Vec::new();
        // One that stands before what is entered is of a leader that should not have written it any more.
        for &(generation, number) in listed.pieces.iter().filter(|at| Some(**at) > newest) {
            let name = running::piece(run, generation, number);
            let json = self.json(&name).await?;
            let piece: Result<Piece, _> = layout::parse(&json);
            pieces.push(piece.map_err(|source| self.remote.unusable(&name, source))?);
            known.entered.insert((generation, number));
        }
        known.entered = known.entered.into_iter().next_back().into_iter().collect();
        self.enter(run, &mut known, pieces).await?;
        self.runs.insert(run.clone(), known);
        Ok(())
    }

    async fn json(&self, name: &str) -> Result<Bytes, RemoteError> {
        Ok(self.remote.bucket().read(name, MAX_MANIFEST).await?)
    }

    /// Enters what is new of a run.
    async fn enter(
        &self,
        run: &RunName,
        known: &mut Followed,
        pieces: Vec<Piece>,
    ) -> Result<(), RemoteError> {
        let wanted = run.clone();
        let here = self.store.call(move |s| s.run(&wanted)).await;
        let known_here = match here {
            Ok(_) => true,
            Err(StoreError::UnknownRun(_)) => false,
            Err(error) => return Err(error.into()),
        };
        if known_here && !self.all {
            return Ok(());
        }
        let Some((_, document)) = known.document.clone() else {
            // A run of a coordinator for which nobody stood by: its checkpoints are all there is, and `take_in` enters it.
            return Ok(());
        };
        // What is newest here need not be asked for again.
        let base = match known.checkpoints.last_key_value() {
            Some((_, newest)) if self.lacks(run, newest).await? => {
                match self.remote.ledger(run, newest).await? {
                    Ok(entries) => entries,
                    Err(why) => return Err(RemoteError::Local(why)),
                }
            }
            _ => Vec::new(),
        };
        let rows = known.checkpoints.values();
        let rows: Vec<CheckpointRow> = rows.map(|stored| self.remote.row(run, stored)).collect();
        let name = run.clone();
        let entered = self.store.call(move |store| {
            if !known_here {
                let new = NewRun {
                    name: name.clone(),
                    identity: document.spec.identity(),
                    spec: document.spec.clone(),
                    parent: document.parent.clone(),
                    facts: document.facts.clone(),
                };
                store.create_run(&new, document.created_ms)?;
            }
            let whole = enter_ledger(store, &name, &document, base, &pieces)?;
            enter_rest(store, &name, &document, &rows)?;
            Ok(whole)
        });
        known.torn = !entered.await?;
        for stored in known.checkpoints.values() {
            self.remote.remember(run, stored)?;
        }
        let steps = known.checkpoints.keys().copied().collect();
        self.remote.known(run, |known| known.steps = Some(steps));
        if known.torn {
            info!(%run, "the ledger in the store has a gap, as it is being written; it is read again");
        }
        Ok(())
    }

    /// Whether the ledger here does not lead up to a checkpoint.
    async fn lacks(&self, run: &RunName, stored: &StoredCheckpoint) -> Result<bool, RemoteError> {
        let (name, step, head) = (run.clone(), stored.state.step, stored.state.ledger_head);
        let look = move |store: &Store| match store.entry(&name, step) {
            Ok(entry) => Ok(entry.is_none_or(|entry| entry.hash() != head)),
            Err(error) => Err(error),
        };
        Ok(step > 0 && self.store.call(look).await?)
    }

    /// What is to be brought here for the runs that are under way.
    pub fn wanted(&self) -> Vec<Wanted> {
        let under_way = self.runs.iter().filter_map(|(run, followed)| {
            let (_, document) = followed.document.as_ref()?;
            let resting = !matches!(document.status.as_str(), "queued" | "running");
            (!resting).then(|| {
                let mut steps = followed.checkpoints.keys().copied();
                let newest = steps.next_back();
                Wanted {
                    run: run.clone(),
                    spec: document.spec.clone(),
                    start: document.start.clone(),
                    newest,
                    older: steps.collect(),
                }
            })
        });
        under_way.collect()
    }

    /// Lets the runs rest of which the store knows nothing: they were deleted there, or had not reached it when their machine was
    /// lost. Says which.
    pub async fn set_aside_unknown(&self) -> Result<Vec<RunName>, RemoteError> {
        let there: BTreeSet<RunName> = self.runs.keys().cloned().collect();
        let set_aside = self.store.call(move |store| {
            let mut aside = Vec::new();
            for row in store.runs()? {
                let under_way = matches!(row.status, RunStatus::Queued | RunStatus::Running);
                if there.contains(&row.name) || !under_way {
                    continue;
                }
                let (name, step, run) = (&row.name, row.step, row.name.to_string());
                store.set_status(name, RunStatus::Interrupted, None, now_ms())?;
                let text = format!(
                    "another coordinator has led since, and the store does not know this run: it was deleted, or had not \
                     reached the store; `cohort resume {run}` goes on with what is here"
                );
                record_event(store, name, &RunEvent::Note { run: run.clone(), text })?;
                record_event(store, name, &RunEvent::Stopped { run, step })?;
                aside.push(row.name);
            }
            Ok(aside)
        });
        Ok(set_aside.await?)
    }
}

impl Remote {
    /// Brings what a run needs that is under way, as far as it is in the store.
    pub async fn bring(&self, wanted: &Wanted) -> Result<(), RemoteError> {
        self.bring_corpora(&wanted.spec).await?;
        if !wanted.start.is_empty() {
            self.bring_start(&wanted.run, &wanted.start).await?;
        }
        let Some(newest) = wanted.newest else {
            return Ok(());
        };
        self.bring_checkpoint(&wanted.run, newest).await?;
        let target = self.home().checkpoint(&wanted.run, newest);
        for step in wanted.older.iter().filter(|_| target.is_dir()) {
            // One that is older need not be here as well: it can be brought when somebody asks for it.
            let path = self.home().checkpoint(&wanted.run, *step);
            if path.is_dir() {
                let removed = remove_checkpoint(&path);
                removed.map_err(|error| RemoteError::Local(error.to_string()))?;
            }
        }
        Ok(())
    }
}

/// Enters the ledger up to a checkpoint, if it is given, and what pieces say of the steps after that. Says whether all of it
/// fitted together.
fn enter_ledger(
    store: &Store,
    name: &RunName,
    document: &StoredRun,
    base: Vec<Entry>,
    pieces: &[Piece],
) -> Result<bool, StoreError> {
    let floor = base.last().map_or(0, |entry| entry.step);
    for entry in &base {
        append(store, name, document, entry)?;
    }
    for piece in pieces {
        let last = store.last_entry(name)?.map_or(0, |entry| entry.step);
        let after = piece.after.max(floor);
        if last < piece.after {
            return Ok(false);
        }
        if last > after && piece.entries.is_empty() {
            store.truncate(name, after)?;
        }
        for entry in piece.entries.iter().filter(|entry| entry.step > floor) {
            append(store, name, document, entry)?;
        }
        if let Some(end) = piece.entries.last()
            && store
                .last_entry(name)?
                .is_some_and(|last| last.step > end.step)
            && end.step >= floor
        {
            store.truncate(name, end.step)?;
        }
    }
    Ok(true)
}

/// Appends an entry; where this home has another one for its step, that and what follows it goes.
fn append(
    store: &Store,
    name: &RunName,
    document: &StoredRun,
    entry: &Entry,
) -> Result<(), StoreError> {
    match store.entry(name, entry.step)? {
        Some(known) if known.hash() == entry.hash() => return Ok(()),
        Some(_) => store.truncate(name, entry.step - 1)?,
        None => {}
    }
    if store.last_entry(name)?.is_none() {
        let mut first: Chain = first_chain(&document.spec);
        first.push(entry).map_err(|source| StoreError::Chain {
            run: name.to_string(),
            source,
        })?;
    }
    store.append_entry(name, entry)?;
    if let Some(facts) = &document.facts {
        let own = Shares::of(&document.spec).of_first(entry.first_position + entry.samples)[0];
        store.record_step(name, &step_row(&document.spec, facts, entry, now_ms(), own))?;
    }
    store.set_progress(name, entry.step)
}

/// Enters how a run stands, its validations and its checkpoints.
fn enter_rest(
    store: &Store,
    name: &RunName,
    document: &StoredRun,
    rows: &[CheckpointRow],
) -> Result<(), StoreError> {
    let here = store.run(name)?;
    if here.spec != document.spec {
        store.set_spec(name, &document.spec, &document.spec.identity())?;
    }
    store.set_workers(name, document.workers)?;
    if let Some(status) = RunStatus::parse(&document.status)
        && (here.status != status || here.error != document.error)
    {
        store.set_status(name, status, document.error.as_deref(), now_ms())?;
    }
    let known = store.evals(name, None)?;
    for eval in document.evals.iter().filter(|eval| !known.contains(eval)) {
        store.record_eval(name, eval)?;
    }
    let kept: BTreeSet<u64> = rows.iter().map(|row| row.step).collect();
    let known = store.checkpoints(name)?;
    for row in known.iter().filter(|row| !kept.contains(&row.step)) {
        store.delete_checkpoint(name, row.step)?;
    }
    for row in rows {
        if !known.iter().any(|known| known.step == row.step) {
            store.record_checkpoint(name, row)?;
        }
    }
    Ok(())
}
