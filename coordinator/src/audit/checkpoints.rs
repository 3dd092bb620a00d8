//! The checkpoints of a run against their manifests, their states, the ledger and the database.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::Path;

use cohort_common::checkpoint::{Checkpoint, LEDGER, Manifest, RunState, hex, list_checkpoints};
use cohort_common::home::Which;
use cohort_common::ledger::Entry;

use super::{Audit, RESTORE};
use crate::plan::first_chain;
use crate::remote::note;
use crate::status::chain;
use crate::store::{CheckpointRow, StoreError};

/// What to do about a checkpoint that belongs to something else.
const DELETE: &str = "it is not of this run as its ledger has it; delete the directory, or restore the database it belongs to";

impl Audit<'_> {
    /// Reads all checkpoints in full.
    pub(super) fn checkpoints(&mut self, rows: Vec<CheckpointRow>) -> Result<(), StoreError> {
        let mut rows: BTreeMap<u64, CheckpointRow> =
            rows.into_iter().map(|row| (row.step, row)).collect();
        let found = match list_checkpoints(&self.home.checkpoints(self.run)) {
            Ok(found) => found,
            Err(error) => {
                self.contradiction(chain(&error));
                return Ok(());
            }
        };
        for (step, path) in found {
            let row = rows.remove(&step);
            match self.checkpoint(step, &path, row.as_ref()) {
                Ok(()) => {}
                // Deleted meanwhile, as older ones are.
                Err(_) if self.live && !path.exists() => {}
                Err(text) => self.contradiction(text),
            }
        }
        for step in rows.into_keys() {
            if self.live
                && self
                    .store
                    .checkpoint(self.run, Which::Step(step))?
                    .is_none()
            {
                continue;
            }
            if let Ok(store) = std::fs::read_to_string(note(&self.home.run(self.run), step)) {
                self.report.notes.push(format!(
                    "the checkpoint of step {step} is not here, but in the store {}",
                    store.trim()
                ));
                continue;
            }
            let path = self.home.checkpoint(self.run, step);
            self.contradiction(format!(
                "the database lists a checkpoint of step {step}, but there is no directory `{}`; restore it from a backup",
                path.display()
            ));
        }
        Ok(())
    }

    fn checkpoint(
        &mut self,
        step: u64,
        path: &Path,
        row: Option<&CheckpointRow>,
    ) -> Result<(), String> {
        let checkpoint = Checkpoint::open(path).map_err(|error| chain(&error))?;
        let bytes = checkpoint.verify().map_err(|error| chain(&error))?;
        self.report.checkpoints += 1;
        self.report.checkpoint_bytes += bytes;
        let place = path.display();
        let (Some(manifest), Some(state)) = (checkpoint.manifest(), checkpoint.run()) else {
            return Err(format!("`{place}` has no `run.json`; {DELETE}"));
        };
        self.compare_state(step, path, manifest, state)?;
        match row {
            Some(row) => compare_row(path, manifest, row)?,
            None if self.live => {}
            None => self.report.notes.push(format!(
                "the database does not list the checkpoint `{place}`: its coordinator was killed while one was written or deleted; a run goes on from it all the same"
            )),
        }
        self.compare_ledger(step, path, &checkpoint)
    }

    fn compare_state(
        &mut self,
        step: u64,
        path: &Path,
        manifest: &Manifest,
        state: &RunState,
    ) -> Result<(), String> {
        let place = path.display();
        if state.run != self.run.as_str() || state.step != step || manifest.step != step {
            return Err(format!(
                "`{place}` says that it is step {} of run `{}`, its manifest says step {}; {DELETE}",
                state.step, state.run, manifest.step
            ));
        }
        let head = match self.known.get(&step) {
            Some(known) => Some(known.hash),
            None if step == 0 => Some(first_chain(&self.spec).head()),
            // It was committed after the ledger was read.
            None if self.live && step >= self.report.step => return Ok(()),
            None => None,
        };
        let Some(head) = head else {
            return Err(format!(
                "`{place}` is of step {step}, but the ledger has no entry for it; {RESTORE}"
            ));
        };
        if state.ledger_head != head {
            return Err(format!(
                "`{place}` has the ledger_head `{}`, but the ledger's entry of step {step} has the hash `{}`; {DELETE}",
                hex::encode(&state.ledger_head),
                hex::encode(&head)
            ));
        }
        let after = self.known.get(&(step + 1));
        if let Some(recorded) = after.and_then(|known| known.state_hash_before) {
            if recorded != manifest.state_hash {
                return Err(format!(
                    "`{place}` has the state_hash `{}`, but the ledger's entry of step {} has `{}` as state_hash_before; {DELETE}",
                    hex::encode(&manifest.state_hash),
                    step + 1,
                    hex::encode(&recorded)
                ));
            }
            self.report.state_hashes += 1;
        }
        Ok(())
    }

    /// The ledger that the checkpoint carries is the beginning of the run's.
    fn compare_ledger(
        &mut self,
        step: u64,
        path: &Path,
        checkpoint: &Checkpoint,
    ) -> Result<(), String> {
        let opened = checkpoint.ledger().map_err(|error| chain(&error))?;
        let Some(lines) = opened else {
            return Ok(());
        };
        let place = path.join(LEDGER);
        let place = place.display();
        let mut count = 0;
        for line in lines.lines() {
            let line = line.map_err(|error| format!("cannot read `{place}`: {error}"))?;
            count += 1;
            let entry = Entry::from_json_line(&line).map_err(|error| {
                format!("line {count} of `{place}` is no entry: {error}; {DELETE}")
            })?;
            if entry.step != count || entry.to_json_line() != line {
                return Err(format!(
                    "line {count} of `{place}` is not the entry of step {count} as it is written; {DELETE}"
                ));
            }
            self.compare_line(&entry, count, &format!("line {count} of `{place}`"))?;
        }
        if count != step {
            return Err(format!(
                "`{place}` has {count} entries, but its checkpoint is of step {step}; {DELETE}"
            ));
        }
        self.report.checkpoint_ledgers += 1;
        Ok(())
    }

    fn compare_line(&self, entry: &Entry, step: u64, place: &str) -> Result<(), String> {
        let Some(known) = self.known.get(&step) else {
            return match self.live && step > self.report.step {
                true => Ok(()),
                false => Err(format!(
                    "{place} has step {step}, but the ledger cannot be read there; {RESTORE}"
                )),
            };
        };
        if known.hash == entry.hash() {
            return Ok(());
        }
        let recorded = self.store.entry(self.run, step).ok().flatten();
        let (field, here, there) = match recorded.and_then(|r| entry.difference(&r)) {
            Some(difference) => (difference.field, difference.ours, difference.theirs),
            None => ("hash", hex::encode(&entry.hash()), hex::encode(&known.hash)),
        };
        Err(format!(
            "{place} has the {field} {here} of step {step}, but the ledger has {there}; {RESTORE}"
        ))
    }
}

fn compare_row(path: &Path, manifest: &Manifest, row: &CheckpointRow) -> Result<(), String> {
    let place = path.display();
    if row.state_hash != manifest.state_hash {
        return Err(format!(
            "`{place}` has the state_hash `{}`, but the database lists it with `{}`; {DELETE}",
            hex::encode(&manifest.state_hash),
            hex::encode(&row.state_hash)
        ));
    }
    match row.bytes == manifest.bytes() {
        true => Ok(()),
        false => Err(format!(
            "`{place}` has {} bytes, but the database lists it with {}; {DELETE}",
            manifest.bytes(),
            row.bytes
        )),
    }
}
