//! What a run reports while it goes: steps, validations, events. A replayed step overwrites its metrics.

use cohort_common::home::RunName;
use rusqlite::{Row, params};

use super::{EvalRow, EventRow, StepRow, Store, StoreError};

impl Store {
    /// Records the metrics of a step.
    pub fn record_step(&self, run: &RunName, row: &StepRow) -> Result<(), StoreError> {
        self.execute(
            "INSERT OR REPLACE INTO steps (run, step, loss, grad_norm, learning_rate, tokens, tokens_per_second, time_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                run.as_str(),
                row.step as i64,
                row.loss,
                row.grad_norm,
                row.learning_rate,
                row.tokens as i64,
                row.tokens_per_second,
                row.time_ms as i64
            ],
        )?;
        Ok(())
    }

    /// At most `limit` steps after step `after`, in order; `None` begins at the first.
    pub fn steps(
        &self,
        run: &RunName,
        after: Option<u64>,
        limit: u32,
    ) -> Result<Vec<StepRow>, StoreError> {
        self.query(
            "SELECT step, loss, grad_norm, learning_rate, tokens, tokens_per_second, time_ms FROM steps
             WHERE run = ?1 AND step > ?2 ORDER BY step LIMIT ?3",
            params![run.as_str(), after_step(after), limit],
            read_step,
        )
    }

    /// The metrics of the newest step.
    pub fn last_step(&self, run: &RunName) -> Result<Option<StepRow>, StoreError> {
        self.query_maybe(
            "SELECT step, loss, grad_norm, learning_rate, tokens, tokens_per_second, time_ms FROM steps
             WHERE run = ?1 ORDER BY step DESC LIMIT 1",
            [run.as_str()],
            read_step,
        )
    }

    /// Records a validation.
    pub fn record_eval(&self, run: &RunName, row: &EvalRow) -> Result<(), StoreError> {
        let confusion = serde_json::to_string(&row.confusion).expect("numbers serialise");
        let confusion = (!row.confusion.is_empty()).then_some(confusion);
        self.execute(
            "INSERT OR REPLACE INTO evals (run, step, split, loss, bits_per_byte, weight, bytes, confusion)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                run.as_str(),
                row.step as i64,
                row.split,
                row.loss,
                row.bits_per_byte,
                row.weight,
                row.bytes as i64,
                confusion
            ],
        )?;
        Ok(())
    }

    /// All validations after step `after`, in order; `None` begins at the first.
    pub fn evals(&self, run: &RunName, after: Option<u64>) -> Result<Vec<EvalRow>, StoreError> {
        self.query(
            "SELECT step, split, loss, bits_per_byte, weight, bytes, confusion FROM evals
             WHERE run = ?1 AND step > ?2 ORDER BY step, split",
            params![run.as_str(), after_step(after)],
            |row| {
                Ok(EvalRow {
                    step: unsigned(row, 0)?,
                    split: row.get(1)?,
                    loss: float(row, 2)?,
                    bits_per_byte: row.get(3)?,
                    weight: float(row, 4)?,
                    bytes: unsigned(row, 5)?,
                    confusion: counts(row.get::<_, Option<String>>(6)?)?,
                })
            },
        )
    }

    /// Records an event, of a run or of the cluster. Returns its id.
    pub fn record_event(
        &self,
        run: Option<&RunName>,
        time_ms: u64,
        kind: &str,
        text: &str,
    ) -> Result<u64, StoreError> {
        let run = run.map(RunName::as_str);
        self.execute(
            "INSERT INTO events (run, time_ms, kind, text) VALUES (?1, ?2, ?3, ?4)",
            params![run, time_ms as i64, kind, text],
        )?;
        Ok(self.connection.last_insert_rowid() as u64)
    }

    /// Id of the newest event; 0 before the first.
    pub fn last_event(&self) -> Result<u64, StoreError> {
        let sql = "SELECT coalesce(max(id), 0) FROM events";
        let ids = self.query(sql, [], |row| unsigned(row, 0))?;
        Ok(ids.into_iter().next().unwrap_or_default())
    }

    /// The newest event of a run of some kind.
    pub fn last_event_of(&self, run: &RunName, kind: &str) -> Result<Option<String>, StoreError> {
        let sql = "SELECT text FROM events WHERE run = ?1 AND kind = ?2 ORDER BY id DESC LIMIT 1";
        self.query_maybe(sql, params![run.as_str(), kind], |row| row.get(0))
    }

    /// At most `limit` events with an id above `after`, in order: of a run, or all.
    pub fn events(
        &self,
        run: Option<&RunName>,
        after: u64,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        self.query(
            "SELECT id, run, time_ms, kind, text FROM events
             WHERE (?1 IS NULL OR run = ?1) AND id > ?2 ORDER BY id LIMIT ?3",
            params![run.map(RunName::as_str), after as i64, limit],
            |row| {
                Ok(EventRow {
                    id: unsigned(row, 0)?,
                    run: row.get(1)?,
                    time_ms: unsigned(row, 2)?,
                    kind: row.get(3)?,
                    text: row.get(4)?,
                })
            },
        )
    }
}

fn read_step(row: &Row<'_>) -> rusqlite::Result<StepRow> {
    Ok(StepRow {
        step: unsigned(row, 0)?,
        loss: float(row, 1)?,
        grad_norm: float(row, 2)?,
        learning_rate: float(row, 3)?,
        tokens: unsigned(row, 4)?,
        tokens_per_second: float(row, 5)?,
        time_ms: unsigned(row, 6)?,
    })
}

/// A step number below the first that is wanted.
fn after_step(after: Option<u64>) -> i64 {
    after.map_or(-1, |step| step as i64)
}

/// SQLite has no unsigned numbers; ours stay below 2^63.
pub(super) fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    Ok(row.get::<_, i64>(column)? as u64)
}

/// SQLite keeps NaN as NULL.
fn float(row: &Row<'_>, column: usize) -> rusqlite::Result<f64> {
    Ok(row.get::<_, Option<f64>>(column)?.unwrap_or(f64::NAN))
}

/// The counts that [`Store::record_eval`] wrote.
fn counts(json: Option<String>) -> rusqlite::Result<Vec<u64>> {
    let parsed = serde_json::from_str(json.as_deref().unwrap_or("[]"));
    parsed.map_err(|error| {
        let kind = rusqlite::types::Type::Text;
        rusqlite::Error::FromSqlConversionFailure(6, kind, Box::new(error))
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{name, new_run, store_with_run};
    use super::*;

    fn step(step: u64) -> StepRow {
        StepRow {
            step,
            loss: 0.1 + 0.2,
            grad_norm: 1.5,
            learning_rate: 1e-3,
            tokens: 1024 * step,
            tokens_per_second: 20_000.0,
            time_ms: 1000 + step,
        }
    }

    #[test]
    fn steps_are_followed_and_replays_overwrite() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        for s in 0..5 {
            store.record_step(&run, &step(s)).unwrap();
        }
        assert_eq!(store.steps(&run, None, 2).unwrap(), [step(0), step(1)]);
        assert_eq!(store.steps(&run, Some(3), 10).unwrap(), [step(4)]);
        let again = StepRow {
            tokens_per_second: 1.0,
            ..step(4)
        };
        store.record_step(&run, &again).unwrap();
        assert_eq!(store.last_step(&run).unwrap(), Some(again));
        store
            .record_step(
                &run,
                &StepRow {
                    loss: f64::NAN,
                    ..step(5)
                },
            )
            .unwrap();
        assert!(store.last_step(&run).unwrap().unwrap().loss.is_nan());
    }

    #[test]
    fn validations_and_events_are_kept_by_run_and_go_with_it() {
        let (_dir, store) = store_with_run("tiny-1");
        store.create_run(&new_run("tiny-2"), 1).unwrap();
        let (one, two) = (name("tiny-1"), name("tiny-2"));
        let eval = EvalRow {
            step: 50,
            split: "validation".into(),
            loss: 2.0,
            bits_per_byte: Some(1.5),
            confusion: vec![5, 1, 0, 7],
            weight: 4096.0,
            bytes: 9000,
        };
        store.record_eval(&one, &eval).unwrap();
        assert_eq!(store.evals(&one, None).unwrap(), [eval]);
        assert_eq!(store.evals(&one, Some(50)).unwrap(), []);
        let first = store
            .record_event(Some(&one), 7, "started", "run started")
            .unwrap();
        let second = store
            .record_event(None, 8, "worker_joined", "worker w1 joined")
            .unwrap();
        store
            .record_event(Some(&two), 9, "started", "run started")
            .unwrap();
        assert!(second > first);
        assert_eq!(store.events(None, first, 10).unwrap().len(), 2);
        assert_eq!(store.events(Some(&one), 0, 10).unwrap().len(), 1);
        store.delete_run(&one).unwrap();
        assert_eq!(store.evals(&one, None).unwrap(), []);
        assert_eq!(store.events(None, 0, 10).unwrap().len(), 2);
    }

    #[test]
    fn nothing_is_recorded_for_a_run_that_is_not_there() {
        let (_dir, store) = store_with_run("tiny-1");
        assert!(store.record_step(&name("other"), &step(1)).is_err());
    }
}
