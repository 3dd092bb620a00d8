//! What a run reports while it goes: steps, validations, events. A replayed step overwrites its metrics.

use std::collections::BTreeMap;

use cohort_common::api::RunEvent;
use cohort_common::home::RunName;
use rusqlite::{Row, params};

use super::{EvalRow, EventRow, PointRow, SampleRow, StepRow, Store, StoreError, WorkerTimesRow};

impl Store {
    /// Records the metrics of a step.
    pub fn record_step(&self, run: &RunName, row: &StepRow) -> Result<(), StoreError> {
        self.execute(
            "INSERT OR REPLACE INTO steps (run, step, horizon, loss, grad_norm, learning_rate, tokens,
                 tokens_per_second, epoch, bits_per_byte, mfu, time_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            params![
                run.as_str(),
                row.step as i64,
                row.horizon as i64,
                row.loss,
                row.grad_norm,
                row.learning_rate,
                row.tokens as i64,
                row.tokens_per_second,
                row.epoch,
                row.bits_per_byte,
                row.mfu,
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
        let mut rows = Vec::new();
        self.each_step(run, after, limit, |row| rows.push(row))?;
        Ok(rows)
    }

    /// Hands `take` at most `limit` steps after step `after`, in order; `None` begins at the first. None of them says that
    /// it was skipped.
    pub fn each_step(
        &self,
        run: &RunName,
        after: Option<u64>,
        limit: u32,
        mut take: impl FnMut(StepRow),
    ) -> Result<(), StoreError> {
        let sql = format!(
            "SELECT {FIGURES} FROM steps s WHERE run = ?1 AND step > ?2 ORDER BY step LIMIT ?3"
        );
        let params = params![run.as_str(), after_step(after), limit];
        self.query(&sql, params, |row| {
            take(read_step(row, 0)?);
            Ok(())
        })?;
        Ok(())
    }

    /// Hands `take` what is drawn of the steps after step `after` and up to `upto`, in order; `None` begins at the first, or
    /// ends at the newest.
    pub fn each_point(
        &self,
        run: &RunName,
        after: Option<u64>,
        upto: Option<u64>,
        mut take: impl FnMut(PointRow),
    ) -> Result<(), StoreError> {
        let sql = "SELECT step, tokens, time_ms, loss, grad_norm, learning_rate, tokens_per_second, mfu FROM steps
                   WHERE run = ?1 AND step > ?2 AND step <= ?3 ORDER BY step";
        let upto = upto.map_or(i64::MAX, |step| step as i64);
        self.query(sql, params![run.as_str(), after_step(after), upto], |row| {
            take(PointRow {
                step: unsigned(row, 0)?,
                tokens: unsigned(row, 1)?,
                time_ms: unsigned(row, 2)?,
                loss: float(row, 3)?,
                grad_norm: float(row, 4)?,
                learning_rate: float(row, 5)?,
                tokens_per_second: float(row, 6)?,
                mfu: float(row, 7)?,
            });
            Ok(())
        })?;
        Ok(())
    }

    /// The metrics of the newest step.
    pub fn last_step(&self, run: &RunName) -> Result<Option<StepRow>, StoreError> {
        let sql = format!("SELECT {STEP} FROM steps s WHERE run = ?1 ORDER BY step DESC LIMIT 1");
        self.query_maybe(&sql, [run.as_str()], |row| read_step(row, 0))
    }

    /// The first of the newest `count` steps up to `to`; `None` where there is none.
    pub fn nth_last_step(
        &self,
        run: &RunName,
        to: u64,
        count: u64,
    ) -> Result<Option<u64>, StoreError> {
        let newest =
            "SELECT step FROM steps WHERE run = ?1 AND step <= ?2 ORDER BY step DESC LIMIT ?3";
        let sql = format!("SELECT min(step) FROM ({newest})");
        let count = count.min(i64::MAX as u64) as i64;
        let first = self.query_one(&sql, params![run.as_str(), to as i64, count], |row| {
            row.get::<_, Option<i64>>(0)
        });
        Ok(first?.map(|step| step as u64))
    }

    /// How many steps the run was planned to have when each step was committed, by step.
    pub fn horizons(&self, run: &RunName) -> Result<BTreeMap<u64, u64>, StoreError> {
        let sql = "SELECT step, horizon FROM steps WHERE run = ?1 AND horizon IS NOT NULL";
        let read = |row: &Row<'_>| Ok((unsigned(row, 0)?, unsigned(row, 1)?));
        Ok(self.query(sql, [run.as_str()], read)?.into_iter().collect())
    }

    /// Records what the model of a step wrote after one of the spec's prompts.
    pub fn record_sample(&self, run: &RunName, row: &SampleRow) -> Result<(), StoreError> {
        self.execute(
            "INSERT OR REPLACE INTO samples (run, step, prompt, prompt_text, text) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                run.as_str(),
                row.step as i64,
                row.prompt,
                row.prompt_text,
                row.text,
            ],
        )?;
        Ok(())
    }

    /// What the models of the newest `steps` steps with samples wrote, by step and prompt.
    pub fn samples(&self, run: &RunName, steps: u32) -> Result<Vec<SampleRow>, StoreError> {
        self.query(
            "SELECT step, prompt, prompt_text, text FROM samples WHERE run = ?1 AND step IN
                 (SELECT DISTINCT step FROM samples WHERE run = ?1 ORDER BY step DESC LIMIT ?2)
             ORDER BY step, prompt",
            params![run.as_str(), steps],
            |row| {
                Ok(SampleRow {
                    step: unsigned(row, 0)?,
                    prompt: row.get(1)?,
                    prompt_text: row.get(2)?,
                    text: row.get(3)?,
                })
            },
        )
    }

    /// Records how a worker's time went.
    pub fn record_worker_times(
        &self,
        run: &RunName,
        row: &WorkerTimesRow,
    ) -> Result<(), StoreError> {
        self.execute(
            "INSERT OR REPLACE INTO worker_times (run, worker, step, time_ms, host, device, tokens, compute_us,
                 exchange_us, wait_us, data_us)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
            params![
                run.as_str(),
                row.worker,
                row.step as i64,
                row.time_ms as i64,
                row.host,
                row.device,
                row.tokens as i64,
                row.compute_us as i64,
                row.exchange_us as i64,
                row.wait_us as i64,
                row.data_us as i64,
            ],
        )?;
        Ok(())
    }

    /// How the workers' time went, by worker and step.
    pub fn worker_times(&self, run: &RunName) -> Result<Vec<WorkerTimesRow>, StoreError> {
        self.query(
            "SELECT worker, step, time_ms, host, device, tokens, compute_us, exchange_us, wait_us, data_us
             FROM worker_times WHERE run = ?1 ORDER BY worker, step",
            [run.as_str()],
            |row| {
                Ok(WorkerTimesRow {
                    worker: row.get(0)?,
                    step: unsigned(row, 1)?,
                    time_ms: unsigned(row, 2)?,
                    host: row.get(3)?,
                    device: row.get(4)?,
                    tokens: unsigned(row, 5)?,
                    compute_us: unsigned(row, 6)?,
                    exchange_us: unsigned(row, 7)?,
                    wait_us: unsigned(row, 8)?,
                    data_us: unsigned(row, 9)?,
                })
            },
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

    /// Numbers the events to come from here on, at least: behind those of another database.
    pub fn number_events_from(&self, id: u64) -> Result<(), StoreError> {
        self.execute(
            "INSERT INTO sqlite_sequence (name, seq) SELECT 'events', 0
             WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'events')",
            [],
        )?;
        let sql = "UPDATE sqlite_sequence SET seq = max(seq, ?1) WHERE name = 'events'";
        self.execute(sql, [id as i64])?;
        Ok(())
    }

    /// Id of the newest event; 0 before the first.
    pub fn last_event(&self) -> Result<u64, StoreError> {
        let sql = "SELECT coalesce(max(id), 0) FROM events";
        let ids = self.query(sql, [], |row| unsigned(row, 0))?;
        Ok(ids.into_iter().next().unwrap_or_default())
    }

    /// At most `limit` events with an id above `after`, in order: of a run, or all. A step's event has the metrics that the
    /// step has now; that of a step which was taken back is left out.
    pub fn events(
        &self,
        run: Option<&RunName>,
        after: u64,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let of_run = if run.is_some() {
            "e.run = ?1"
        } else {
            "?1 IS NULL"
        };
        let sql = format!(
            "SELECT e.id, e.run, e.time_ms, e.kind, e.text, {STEP} FROM events e
             LEFT JOIN steps s ON e.kind = 'step' AND s.run = e.run AND s.step = CAST(e.text AS INTEGER)
             WHERE {of_run} AND e.id > ?2 AND (e.kind != 'step' OR s.step IS NOT NULL) ORDER BY e.id LIMIT ?3"
        );
        let params = params![run.map(RunName::as_str), after as i64, limit];
        self.query(&sql, params, read_event)
    }

    /// The newest events of a run that are no steps and none of `without`, oldest first.
    pub fn newest_events(
        &self,
        run: &RunName,
        without: &[&str],
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let words: Vec<String> = without.iter().map(|word| format!("'{word}'")).collect();
        // The index `events_told` is of those that are no steps.
        let sql = format!(
            "SELECT id, run, time_ms, kind, text FROM events
             WHERE run = ?1 AND kind != 'step' AND kind NOT IN ({}) ORDER BY id DESC LIMIT ?2",
            words.join(",")
        );
        let read = |row: &Row<'_>| {
            Ok(EventRow {
                id: unsigned(row, 0)?,
                run: row.get(1)?,
                time_ms: unsigned(row, 2)?,
                kind: row.get(3)?,
                text: row.get(4)?,
            })
        };
        let mut rows = self.query(&sql, params![run.as_str(), limit], read)?;
        rows.reverse();
        Ok(rows)
    }
}

/// Columns of [`read_step`], in its order, of a table that is called `s`.
pub(super) const STEP: &str = "s.step, s.horizon, s.loss, s.grad_norm, s.learning_rate, s.tokens, s.tokens_per_second, s.epoch,
    s.bits_per_byte, s.mfu, s.time_ms,
    (SELECT l.skipped FROM ledger l WHERE l.run = s.run AND l.step = s.step)";

/// The same without a look at the ledger, which takes its time where all steps are read.
const FIGURES: &str = "s.step, s.horizon, s.loss, s.grad_norm, s.learning_rate, s.tokens, s.tokens_per_second, s.epoch,
    s.bits_per_byte, s.mfu, s.time_ms, 0";

fn read_event(row: &Row<'_>) -> rusqlite::Result<EventRow> {
    let run: Option<String> = row.get(1)?;
    let kind: String = row.get(3)?;
    let text = match (kind.as_str(), &run) {
        ("step", Some(run)) => {
            let event = RunEvent::Step(read_step(row, 5)?.event(run.clone()));
            serde_json::to_string(&event).expect("events are JSON")
        }
        _ => row.get(4)?,
    };
    Ok(EventRow {
        id: unsigned(row, 0)?,
        run,
        time_ms: unsigned(row, 2)?,
        kind,
        text,
    })
}

pub(super) fn read_step(row: &Row<'_>, first: usize) -> rusqlite::Result<StepRow> {
    let known = |column: usize| row.get::<_, Option<f64>>(first + column);
    Ok(StepRow {
        step: unsigned(row, first)?,
        horizon: row.get::<_, Option<i64>>(first + 1)?.unwrap_or(0) as u64,
        loss: float(row, first + 2)?,
        grad_norm: float(row, first + 3)?,
        learning_rate: float(row, first + 4)?,
        tokens: unsigned(row, first + 5)?,
        tokens_per_second: float(row, first + 6)?,
        epoch: known(7)?.unwrap_or(0.0),
        bits_per_byte: known(8)?,
        mfu: known(9)?,
        time_ms: unsigned(row, first + 10)?,
        skipped: row.get::<_, Option<bool>>(first + 11)?.unwrap_or(false),
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
            horizon: 9,
            loss: 0.1 + 0.2,
            grad_norm: 1.5,
            learning_rate: 1e-3,
            tokens: 1024 * step,
            tokens_per_second: 20_000.0,
            epoch: 0.25,
            bits_per_byte: Some(2.0),
            mfu: None,
            time_ms: 1000 + step,
            skipped: false,
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

    #[test]
    fn samples_keep_their_prompts_and_the_newest_are_found() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        let row = |step, prompt, prompt_text: &str| SampleRow {
            step,
            prompt,
            prompt_text: prompt_text.into(),
            text: format!("after {step}"),
        };
        let rows = [
            row(0, 0, "a"),
            row(0, 1, "b"),
            row(5, 0, "a"),
            row(9, 0, "c"),
        ];
        for row in rows.iter().rev() {
            store.record_sample(&run, row).unwrap();
        }
        assert_eq!(store.samples(&run, 9).unwrap(), rows);
        assert_eq!(store.samples(&run, 2).unwrap(), rows[2..]);
        // What is written again takes the place of what was.
        let again = row(9, 0, "a");
        store.record_sample(&run, &again).unwrap();
        assert_eq!(store.samples(&run, 1).unwrap(), [again]);
        store.truncate(&run, 5).unwrap();
        assert_eq!(store.samples(&run, 1).unwrap(), rows[2..3]);
    }
}
