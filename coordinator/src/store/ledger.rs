//! The ledger: one entry per committed step, appended and compared, never changed.

use cohort_common::cluster::History;
use cohort_common::home::RunName;
use cohort_common::ledger::{Chain, Entry};
use cohort_common::spec::WatchdogConfig;
use rusqlite::params;

use super::{Store, StoreError};

/// What appending an entry did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// The step is new.
    New,
    /// The step was replayed after a resume and equals its entry.
    Same,
}

/// A step, and its entry, or why that cannot be read.
pub type ReadEntry = (u64, Result<Entry, StoreError>);

impl Store {
    /// Appends the entry of a step. An entry that is there already must be the same to the bit; a new one must follow
    /// the last. (What the first of a run follows, its genesis, is the caller's to know.)
    pub fn append_entry(&self, run: &RunName, entry: &Entry) -> Result<Appended, StoreError> {
        if let Some(recorded) = self.entry(run, entry.step)? {
            return match recorded.difference(entry) {
                None => Ok(Appended::Same),
                Some(difference) => Err(StoreError::LedgerConflict {
                    run: run.to_string(),
                    step: entry.step,
                    field: difference.field,
                    recorded: difference.ours,
                    offered: difference.theirs,
                }),
            };
        }
        match self.last_entry(run)? {
            None => {
                self.run(run)?;
            }
            Some(last) => Chain::after(&last)
                .push(entry)
                .map_err(|source| StoreError::Chain {
                    run: run.to_string(),
                    source,
                })?,
        }
        self.execute(
            "INSERT INTO ledger (run, step, first_position, samples, loss_sum, weight, grad_norm, learning_rate, hash, entry, skipped)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
            params![
                run.as_str(),
                entry.step as i64,
                entry.first_position as i64,
                entry.samples as i64,
                entry.loss_sum,
                entry.weight,
                entry.grad_norm,
                entry.learning_rate,
                entry.hash(),
                entry.encode(),
                entry.skipped
            ],
        )?;
        Ok(Appended::New)
    }

    /// The entry of a step.
    pub fn entry(&self, run: &RunName, step: u64) -> Result<Option<Entry>, StoreError> {
        let sql = "SELECT step, hash, entry FROM ledger WHERE run = ?1 AND step = ?2";
        let row = self.query_maybe(sql, params![run.as_str(), step as i64], read)?;
        row.map(|row| self.parse_entry(run, row)).transpose()
    }

    /// The entry of the newest committed step.
    pub fn last_entry(&self, run: &RunName) -> Result<Option<Entry>, StoreError> {
        let sql = "SELECT step, hash, entry FROM ledger WHERE run = ?1 ORDER BY step DESC LIMIT 1";
        let row = self.query_maybe(sql, [run.as_str()], read)?;
        row.map(|row| self.parse_entry(run, row)).transpose()
    }

    /// At most `limit` entries of steps from `first_step` on, in order.
    pub fn entries(
        &self,
        run: &RunName,
        first_step: u64,
        limit: u32,
    ) -> Result<Vec<Entry>, StoreError> {
        let sql = "SELECT step, hash, entry FROM ledger WHERE run = ?1 AND step >= ?2 ORDER BY step LIMIT ?3";
        let rows = self.query(sql, params![run.as_str(), first_step as i64, limit], read)?;
        rows.into_iter()
            .map(|row| self.parse_entry(run, row))
            .collect()
    }

    /// What later steps of a run are judged by: as many applied steps as its watchdog looks at before each of the states
    /// that it may go on from, the steps after the last of these, and all that were skipped.
    pub fn history(
        &self,
        run: &RunName,
        watchdog: &WatchdogConfig,
        states: [u64; 2],
    ) -> Result<History, StoreError> {
        let mut history = History::default();
        let newest = states.into_iter().max().unwrap_or_default();
        for entry in self.entries(run, newest + 1, u32::MAX)? {
            history.push(&entry);
        }
        for state in states {
            let (mut through, mut missing) = (state, watchdog.window);
            while missing > 0 && through > 0 {
                let page = self.entries_back(run, through, watchdog.window as u32)?;
                let Some(last) = page.last() else { break };
                through = last.step - 1;
                for entry in &page {
                    missing = missing.saturating_sub(u64::from(!entry.skipped));
                    history.push(entry);
                }
            }
        }
        if watchdog.action.skips() {
            for step in self.skipped_steps(run)? {
                history.push_skipped(step);
            }
        }
        Ok(history)
    }

    /// At most `limit` entries of steps up to `last_step`, the newest first.
    fn entries_back(
        &self,
        run: &RunName,
        last_step: u64,
        limit: u32,
    ) -> Result<Vec<Entry>, StoreError> {
        let sql = "SELECT step, hash, entry FROM ledger WHERE run = ?1 AND step <= ?2 ORDER BY step DESC LIMIT ?3";
        let rows = self.query(sql, params![run.as_str(), last_step as i64, limit], read)?;
        rows.into_iter()
            .map(|row| self.parse_entry(run, row))
            .collect()
    }

    /// Steps that were committed without their update, by the flags in their entries.
    fn skipped_steps(&self, run: &RunName) -> Result<Vec<u64>, StoreError> {
        let sql = "SELECT step FROM ledger WHERE run = ?1 AND substr(entry, 89, 1) IN (x'02', x'03') ORDER BY step";
        self.query(sql, [run.as_str()], |row| Ok(row.get::<_, i64>(0)? as u64))
    }

    /// As [`Store::entries`], but what cannot be read is an error of its own step only.
    pub fn entries_one_by_one(
        &self,
        run: &RunName,
        first_step: u64,
        limit: u32,
    ) -> Result<Vec<ReadEntry>, StoreError> {
        let sql = "SELECT step, hash, entry FROM ledger WHERE run = ?1 AND step >= ?2 ORDER BY step LIMIT ?3";
        let rows = self.query(sql, params![run.as_str(), first_step as i64, limit], read)?;
        let each = |row: (i64, Vec<u8>, Vec<u8>)| (row.0 as u64, self.parse_entry(run, row));
        Ok(rows.into_iter().map(each).collect())
    }

    fn parse_entry(
        &self,
        run: &RunName,
        row: (i64, Vec<u8>, Vec<u8>),
    ) -> Result<Entry, StoreError> {
        let (step, hash, encoded) = row;
        let what = || format!("a ledger entry of step {step} of run `{run}`");
        let entry =
            Entry::decode(&encoded).ok_or_else(|| self.unreadable(what(), "it is no entry"))?;
        match entry.step == step as u64 && entry.hash()[..] == hash[..] {
            true => Ok(entry),
            false => Err(self.unreadable(what(), "its hash is another: it was changed or damaged")),
        }
    }
}

fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<(i64, Vec<u8>, Vec<u8>)> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
}

#[cfg(test)]
mod tests {
    use cohort_common::cluster::messages::LaneSums;
    use cohort_common::ledger::{ChainError, genesis};
    use cohort_common::spec::WatchdogAction;

    use super::super::tests::{name, store_with_run};
    use super::*;

    fn entry(step: u64, previous: [u8; 32]) -> Entry {
        Entry {
            step,
            first_position: (step - 1) * 16,
            samples: 16,
            lanes: vec![LaneSums {
                loss: 0.1 + 0.2,
                weight: 1024.0,
            }],
            loss_sum: 0.1 + 0.2,
            weight: 1024.0,
            grad_norm: f64::INFINITY,
            learning_rate: -0.0,
            root_hash: [step as u8; 32],
            state_hash_before: Some([9; 32]),
            skipped: false,
            previous,
        }
    }

    #[test]
    fn entries_are_kept_to_the_bit_and_compared() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        assert_eq!(store.last_entry(&run).unwrap(), None);
        let one = entry(1, genesis(b"identity"));
        let two = entry(2, one.hash());
        for entry in [&one, &two] {
            assert_eq!(store.append_entry(&run, entry).unwrap(), Appended::New);
            assert_eq!(store.append_entry(&run, entry).unwrap(), Appended::Same);
        }
        assert_eq!(
            store.last_entry(&run).unwrap().unwrap().encode(),
            two.encode()
        );
        assert_eq!(
            store.entries(&run, 1, 10).unwrap(),
            [one.clone(), two.clone()]
        );
        assert_eq!(store.entries(&run, 2, 10).unwrap(), [two]);
        let mut other = one;
        other.loss_sum = 0.3;
        let error = store.append_entry(&run, &other).unwrap_err().to_string();
        assert!(
            error.contains(
                "step 1 of run `tiny-1` was committed with loss_sum `0.30000000000000004 (bits 3fd3333333333334)` \
                 and now came out as `0.3 (bits 3fd3333333333333)`"
            ),
            "{error}"
        );
    }

    #[test]
    fn later_steps_are_judged_by_what_is_read_as_by_the_whole_ledger() {
        let (_dir, store) = store_with_run("tiny-1");
        let watchdog = WatchdogConfig {
            action: WatchdogAction::Skip,
            window: 20,
            ..WatchdogConfig::default()
        };
        let mut whole = History::default();
        let mut previous = genesis(b"tiny");
        let mut of = |step: u64| {
            let mut entry = entry(step, previous);
            entry.grad_norm = 1.0 + (step % 7) as f64;
            entry.skipped = step == 2 || (40..70).contains(&step) || step == 98;
            previous = entry.hash();
            entry
        };
        // One transaction: the disk is not what is tested.
        store.hold().unwrap();
        for step in 1..=100 {
            let entry = of(step);
            whole.push(&entry);
            store.append_entry(&name("tiny-1"), &entry).unwrap();
        }
        store.release().unwrap();
        let read = store.history(&name("tiny-1"), &watchdog, [72, 92]).unwrap();
        assert_ne!(read, whole, "no more is read than is needed");
        for step in [72, 92, 95, 100] {
            assert_eq!(read.updates(step), whole.updates(step));
            for norm in [4.0, 15.0, 17.0, 19.0, 30.0] {
                let mut next = entry(step + 1, [0; 32]);
                next.grad_norm = norm;
                let judged = |history: &History| history.judge(&watchdog, &next);
                assert_eq!(judged(&read), judged(&whole));
            }
        }
        let sql = "SELECT count(*) FROM ledger WHERE skipped = 1";
        let counts = store.query(sql, [], |row| row.get::<_, i64>(0)).unwrap();
        assert_eq!(counts, [32]);
    }

    #[test]
    fn what_does_not_follow_is_refused() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        let one = entry(1, [0; 32]);
        store.append_entry(&run, &one).unwrap();
        let gap = store.append_entry(&run, &entry(3, one.hash()));
        assert!(matches!(
            gap,
            Err(StoreError::Chain {
                source: ChainError::Gap { expected: 2, .. },
                ..
            })
        ));
        let broken = store.append_entry(&run, &entry(2, [1; 32]));
        assert!(matches!(
            broken,
            Err(StoreError::Chain {
                source: ChainError::BrokenLink { .. },
                ..
            })
        ));
        assert!(matches!(
            store.append_entry(&name("other"), &one),
            Err(StoreError::UnknownRun(_))
        ));
    }

    #[test]
    fn a_changed_entry_is_noticed() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        store.append_entry(&run, &entry(1, [0; 32])).unwrap();
        let forged = Entry {
            loss_sum: 0.0,
            ..entry(1, [0; 32])
        };
        store
            .execute("UPDATE ledger SET entry = ?1", [forged.encode()])
            .unwrap();
        let error = store.last_entry(&run).unwrap_err().to_string();
        assert!(
            error.contains("ledger entry of step 1 of run `tiny-1`"),
            "{error}"
        );
    }
}
