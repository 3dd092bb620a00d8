//! Runs that lie in the home directory and that the database does not know: a damaged database was moved away, and a new
//! one is empty. Each is taken in again from its checkpoints. What only the database knew (metrics, events, the steps
//! after the newest checkpoint) is lost; the steps are computed again.
//!
//! Corpora need nothing of this kind: their directories are all there is to know about them.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;
use std::time::UNIX_EPOCH;

use cohort_common::api::{FinishedEvent, RunEvent};
use cohort_common::checkpoint::{Checkpoint, LEDGER, RunState, hex, list_checkpoints};
use cohort_common::home::{Home, RunName};
use cohort_common::ledger::Entry;
use tracing::{error, info, warn};

use crate::data::blocking;
use crate::driver::now_ms;
use crate::plan::first_chain;
use crate::record::record_event;
use crate::remote::Record;
use crate::status::failed;
use crate::store::{CheckpointRow, NewRun, RunStatus, Store, StoreError, StoreHandle};

/// Takes in the runs that the store does not know. One that cannot be taken in is left as it is, and logged.
pub async fn take_in(home: &Home, store: &StoreHandle) {
    let mut names: Vec<RunName> = fs::read_dir(home.runs())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| RunName::new(entry.file_name().to_str()?).ok())
        .collect();
    names.sort();
    for name in names {
        let wanted = name.clone();
        let known = store.call(move |s| s.run(&wanted).map(|_| ())).await;
        if !matches!(known, Err(StoreError::UnknownRun(_))) {
            continue;
        }
        let directory = home.clone();
        let wanted = name.clone();
        let found = blocking(move || find(&directory, &wanted).map_err(failed)).await;
        let taken = match found {
            Ok(None) => continue,
            Ok(Some(found)) => store
                .call(move |s| found.record(s, now_ms()))
                .await
                .map_err(|error| error.to_string()),
            Err(status) => Err(status.message().to_owned()),
        };
        match taken {
            Ok(()) => info!(run = %name, "taken in again from its checkpoints"),
            Err(error) => error!(run = %name, error, "cannot take this run in again"),
        }
    }
}

/// A run, as its checkpoints know it.
pub struct Found {
    /// Its name.
    pub name: RunName,
    /// Where the newest checkpoint that is intact stood.
    pub state: RunState,
    /// All that can be opened, oldest first.
    pub checkpoints: Vec<CheckpointRow>,
    /// The ledger up to the state, or why there is none.
    pub ledger: Result<Vec<Entry>, String>,
    /// What else was known of it.
    pub record: Record,
    /// Where all this was found, for people.
    pub from: &'static str,
}

/// Reads the checkpoints of a run; `None` if it has none.
fn find(home: &Home, name: &RunName) -> Result<Option<Found>, String> {
    let listed = list_checkpoints(&home.checkpoints(name)).map_err(|error| error.to_string())?;
    if listed.is_empty() {
        return Ok(None);
    }
    let mut open = Vec::new();
    for (step, path) in listed {
        match open_checkpoint(&path, step) {
            Ok(checkpoint) => open.push(checkpoint),
            Err(error) => warn!(run = %name, step, error, "left out a damaged checkpoint"),
        }
    }
    let intact = open.iter().rev().find(|(checkpoint, state)| {
        let verified = checkpoint.verify();
        if let Err(error) = &verified {
            warn!(run = %name, step = state.step, %error, "the checkpoint is damaged");
        }
        verified.is_ok()
    });
    let Some((newest, state)) = intact else {
        return Err("all its checkpoints are damaged".into());
    };
    Ok(Some(Found {
        name: name.clone(),
        state: state.clone(),
        ledger: read_ledger(newest.dir(), state),
        checkpoints: open.iter().map(|(c, state)| row(c, state)).collect(),
        record: Record::default(),
        from: "its checkpoints",
    }))
}

fn open_checkpoint(path: &Path, step: u64) -> Result<(Checkpoint, RunState), String> {
    let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
    match checkpoint.run().cloned() {
        Some(state) if state.step == step => Ok((checkpoint, state)),
        Some(state) => Err(format!("it is of step {}", state.step)),
        None => Err("it does not say which run it is of".into()),
    }
}

fn row(checkpoint: &Checkpoint, state: &RunState) -> CheckpointRow {
    CheckpointRow {
        step: state.step,
        path: checkpoint.dir().display().to_string(),
        bytes: checkpoint.manifest().map_or(0, |m| m.bytes()),
        val_loss: state.val_loss,
        state_hash: state.state_hash,
        time_ms: written_ms(checkpoint.dir()),
    }
}

/// When a checkpoint was written, as far as the file system knows.
fn written_ms(directory: &Path) -> u64 {
    let modified = fs::metadata(directory.join(cohort_common::checkpoint::MANIFEST))
        .and_then(|meta| meta.modified())
        .ok();
    let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Reads and checks the ledger in a checkpoint: its chain is whole and ends where the checkpoint says.
pub fn read_ledger(directory: &Path, state: &RunState) -> Result<Vec<Entry>, String> {
    let mut chain = first_chain(&state.spec);
    let mut entries = Vec::new();
    if state.step == 0 {
        return Ok(entries);
    }
    let path = directory.join(LEDGER);
    let none = || "the checkpoint holds no ledger".to_owned();
    let file = fs::File::open(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => none(),
        _ => format!("cannot read `{}`: {error}", path.display()),
    })?;
    let damaged = |what: String| format!("`{}` is damaged: {what}", path.display());
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|error| damaged(error.to_string()))?;
        let entry = Entry::from_json_line(&line).map_err(|error| damaged(error.to_string()))?;
        chain
            .push(&entry)
            .map_err(|error| damaged(error.to_string()))?;
        entries.push(entry);
    }
    if entries.is_empty() {
        return Err(none());
    }
    match chain.next_step() == state.step + 1 && chain.head() == state.ledger_head {
        true => Ok(entries),
        false => Err(damaged(format!(
            "it does not end with the entry of step {}",
            state.step
        ))),
    }
}

impl Found {
    /// Enters the run with all that is known of it.
    pub fn record(self, store: &Store, now_ms: u64) -> Result<(), StoreError> {
        let name = &self.name;
        let record = &self.record;
        let first = self.checkpoints.first().map_or(now_ms, |c| c.time_ms);
        let created = match record.created_ms {
            0 => first,
            created => created,
        };
        let ended = self.checkpoints.last().map_or(now_ms, |c| c.time_ms);
        let new = NewRun {
            name: name.clone(),
            spec: self.state.spec.clone(),
            identity: self.state.spec.identity(),
            parent: record.parent.clone(),
            facts: record.facts.clone(),
        };
        store.create_run(&new, created)?;
        store.set_progress(name, self.state.step)?;
        for checkpoint in &self.checkpoints {
            store.record_checkpoint(name, checkpoint)?;
        }
        for entry in self.ledger.iter().flatten() {
            store.append_entry(name, entry)?;
        }
        for eval in &record.evals {
            store.record_eval(name, eval)?;
        }
        let run = name.to_string();
        let text = format!(
            "taken in again from {}: the database did not know it",
            self.from
        );
        record_event(store, name, &RunEvent::Note { run, text })?;
        let (status, event) = self.rests();
        let error = match &event {
            RunEvent::Failed { error, .. } => Some(error.as_str()),
            _ => None,
        };
        store.set_status(name, status, error, ended)?;
        record_event(store, name, &event)
    }

    /// How the run rests: at its end; or to be resumed; or unable to go on without its ledger.
    fn rests(&self) -> (RunStatus, RunEvent) {
        let (run, step) = (self.name.to_string(), self.state.step);
        if step >= self.state.spec.train.steps {
            let event = RunEvent::Finished(Box::new(self.finished()));
            return (RunStatus::Finished, event);
        }
        match &self.ledger {
            Ok(_) => (RunStatus::Interrupted, RunEvent::Stopped { run, step }),
            Err(reason) => {
                let error = format!(
                    "the database with its ledger is gone, and the checkpoint of step {step} does not bring it back: \
                     {reason}; so it cannot go on, but its checkpoints can be used: `cohort finetune --from {run}`"
                );
                (RunStatus::Failed, RunEvent::Failed { run, error })
            }
        }
    }

    fn finished(&self) -> FinishedEvent {
        let last = self.ledger.iter().flatten().next_back();
        let path = self.checkpoints.iter().find(|c| c.step == self.state.step);
        FinishedEvent {
            run: self.name.to_string(),
            step: self.state.step,
            train_loss: last.map(Entry::loss).filter(|loss| loss.is_finite()),
            val_loss: self.state.val_loss,
            val_bits_per_byte: None,
            tokens: self.state.tokens,
            seconds: 0.0,
            tokens_per_second: None,
            state_hash: Some(hex::encode(&self.state.state_hash)),
            checkpoint: path.map(|c| c.path.clone()),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use cohort_common::checkpoint::{CheckpointMeta, write_checkpoint};
    use cohort_common::cluster::messages::LaneSums;
    use cohort_common::home::Which;
    use tempfile::TempDir;

    use super::*;
    use crate::store::tests::new_run;

    /// A home with an empty database.
    fn scene() -> (TempDir, Home, Store, RunName) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(dir.path()).unwrap();
        let store = Store::open(&home.database()).unwrap();
        (dir, home, store, RunName::new("tiny-1").unwrap())
    }

    /// The state of the run after that many steps.
    pub fn state(step: u64) -> RunState {
        let spec = new_run("tiny-1").spec;
        RunState {
            run: "tiny-1".into(),
            step,
            samples: 16 * step,
            tokens: 1024 * step,
            val_loss: Some(1.0 / (step + 1) as f64),
            ledger_head: ledger(step).last().map_or([0; 32], Entry::hash),
            state_hash: [0; 32],
            spec,
        }
    }

    /// Its ledger up to that step.
    pub fn ledger(steps: u64) -> Vec<Entry> {
        let mut chain = first_chain(&new_run("tiny-1").spec);
        let entry = |step: u64| {
            let entry = Entry {
                step,
                first_position: chain.next_position(),
                samples: 16,
                lanes: vec![LaneSums {
                    loss: 8.0,
                    weight: 4.0,
                }],
                loss_sum: 8.0,
                weight: 4.0,
                grad_norm: 1.0,
                learning_rate: 0.1,
                root_hash: [step as u8; 32],
                state_hash_before: None,
                skipped: false,
                previous: chain.head(),
            };
            chain.push(&entry).unwrap();
            entry
        };
        (1..=steps).map(entry).collect()
    }

    /// Writes a checkpoint of that step.
    pub fn checkpoint(home: &Home, step: u64, entries: Option<&[Entry]>) {
        let state = state(step);
        let zeros = vec![0.0; state.spec.layout().len()];
        let lines = entries.iter().flat_map(|e| e.iter());
        let lines: Vec<String> = lines.map(|e| e.to_json_line() + "\n").collect();
        let meta = CheckpointMeta {
            tokens: Default::default(),
            tokenizer: b"{}".to_vec(),
            chat_template: None,
            base: None,
            run: state,
            ledger: lines.concat().into_bytes(),
        };
        let target = home.checkpoint(&RunName::new("tiny-1").unwrap(), step);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        write_checkpoint(&target, meta, &zeros, &zeros, &zeros).unwrap();
    }

    fn take(home: &Home, store: &Store, name: &RunName) {
        let found = find(home, name).unwrap().expect("it has checkpoints");
        found.record(store, 1).unwrap();
    }

    #[test]
    fn a_run_is_taken_in_with_its_ledger() {
        let (_dir, home, store, name) = scene();
        assert!(find(&home, &name).unwrap().is_none());
        checkpoint(&home, 2, Some(&ledger(2)));
        checkpoint(&home, 5, Some(&ledger(5)));
        take(&home, &store, &name);
        let row = store.run(&name).unwrap();
        assert_eq!((row.status, row.step), (RunStatus::Interrupted, 5));
        assert_eq!(row.identity, state(5).spec.identity());
        assert_eq!(store.entries(&name, 1, 99).unwrap(), ledger(5));
        let best = store.checkpoint(&name, Which::Best).unwrap().unwrap();
        assert_eq!((best.step, store.checkpoints(&name).unwrap().len()), (5, 2));
        let last = store.events(Some(&name), 0, 99).unwrap().pop().unwrap();
        assert_eq!(last.kind, "stopped");
    }

    #[test]
    fn a_run_without_its_ledger_cannot_go_on_and_says_so() {
        let (_dir, home, store, name) = scene();
        checkpoint(&home, 3, None);
        take(&home, &store, &name);
        let row = store.run(&name).unwrap();
        assert_eq!((row.status, row.step), (RunStatus::Failed, 3));
        let error = row.error.unwrap();
        assert!(error.contains("step 3 does not bring it back: the checkpoint holds no ledger"));
        assert_eq!(store.checkpoints(&name).unwrap().len(), 1);
    }

    #[test]
    fn a_ledger_that_does_not_fit_its_checkpoint_is_not_believed() {
        let (_dir, home, _store, name) = scene();
        let mut changed = ledger(3);
        changed[1].loss_sum += 1.0;
        for wrong in [&ledger(2)[..], &ledger(3)[1..], &changed] {
            checkpoint(&home, 3, Some(wrong));
            let found = find(&home, &name).unwrap().unwrap();
            assert!(found.ledger.unwrap_err().contains("is damaged"));
            fs::remove_dir_all(home.checkpoint(&name, 3)).unwrap();
        }
    }

    #[test]
    fn a_damaged_checkpoint_does_not_hide_the_one_before() {
        let (_dir, home, store, name) = scene();
        checkpoint(&home, 2, Some(&ledger(2)));
        checkpoint(&home, 5, Some(&ledger(5)));
        let weights = home.checkpoint(&name, 5).join("model.safetensors");
        let mut bytes = fs::read(&weights).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&weights, bytes).unwrap();
        take(&home, &store, &name);
        assert_eq!(store.run(&name).unwrap().step, 2);
        fs::remove_file(home.checkpoint(&name, 2).join("model.safetensors")).unwrap();
        let error = find(&home, &name).err().unwrap();
        assert_eq!(error, "all its checkpoints are damaged");
    }

    #[test]
    fn a_run_at_its_end_is_finished_with_or_without_its_ledger() {
        let (_dir, home, store, name) = scene();
        let steps = state(0).spec.train.steps;
        checkpoint(&home, steps, None);
        take(&home, &store, &name);
        let row = store.run(&name).unwrap();
        assert_eq!((row.status, row.step), (RunStatus::Finished, steps));
        let last = store.events(Some(&name), 0, 99).unwrap().pop().unwrap();
        assert_eq!(last.kind, "finished");
    }
}
