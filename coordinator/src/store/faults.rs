//! What happened to the workers of a run, and who computed which lanes. Nothing of it decides a result: the ledger does not
//! know it.

use std::collections::BTreeMap;

use cohort_common::api::FaultTotal;
use cohort_common::home::RunName;
use rusqlite::{Row, params};

use super::metrics::unsigned;
use super::{AssignmentRow, AttemptRow, FaultRow, Store, StoreError};

/// Lanes in a range that is believed; no run has more.
const MAX_RANGE: u32 = 1 << 20;

impl Store {
    /// Records something that happened to a worker.
    pub fn record_fault(&self, run: &RunName, row: &FaultRow) -> Result<(), StoreError> {
        self.execute(
            "INSERT INTO faults (run, step, time_ms, kind, worker, text, delay_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                run.as_str(),
                row.step as i64,
                row.time_ms as i64,
                row.kind,
                row.worker,
                row.text,
                row.delay_ms.map(|ms| ms as i64)
            ],
        )?;
        Ok(())
    }

    /// The newest `limit` faults of a run, in the order in which they happened.
    pub fn faults(&self, run: &RunName, limit: u32) -> Result<Vec<FaultRow>, StoreError> {
        let mut rows = self.query(
            "SELECT step, time_ms, kind, worker, text, delay_ms FROM faults
             WHERE run = ?1 ORDER BY id DESC LIMIT ?2",
            params![run.as_str(), limit],
            |row| {
                Ok(FaultRow {
                    step: unsigned(row, 0)?,
                    time_ms: unsigned(row, 1)?,
                    kind: row.get(2)?,
                    worker: row.get(3)?,
                    text: row.get(4)?,
                    delay_ms: row.get::<_, Option<i64>>(5)?.map(|ms| ms as u64),
                })
            },
        )?;
        rows.reverse();
        Ok(rows)
    }

    /// How often something happened to the workers of a run, by kind.
    pub fn fault_totals(&self, run: &RunName) -> Result<Vec<FaultTotal>, StoreError> {
        self.query(
            "SELECT kind, count(*), coalesce(sum(delay_ms), 0) FROM faults
             WHERE run = ?1 GROUP BY kind ORDER BY kind",
            [run.as_str()],
            |row| {
                Ok(FaultTotal {
                    kind: row.get(0)?,
                    count: unsigned(row, 1)?,
                    delay_ms: unsigned(row, 2)?,
                })
            },
        )
    }

    /// Records which lanes each worker holds from the commit of `first_step` on. Writes only where that differs from the
    /// assignment before; a step that is computed again replaces what was recorded from it on.
    pub fn record_assignment(
        &self,
        run: &RunName,
        first_step: u64,
        generation: u64,
        lanes: &BTreeMap<String, Vec<u32>>,
    ) -> Result<(), StoreError> {
        let before = first_step.saturating_sub(1);
        self.execute(
            "DELETE FROM assignments WHERE run = ?1 AND first_step > ?2",
            params![run.as_str(), before as i64],
        )?;
        let held: BTreeMap<String, Vec<u32>> = self
            .assignment(run, before)?
            .into_iter()
            .map(|row| (row.worker, row.lanes))
            .collect();
        if held == *lanes {
            return Ok(());
        }
        for (worker, lanes) in lanes {
            self.execute(
                "INSERT INTO assignments (run, first_step, generation, worker, lanes)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    run.as_str(),
                    first_step as i64,
                    generation as i64,
                    worker,
                    lanes_text(lanes)
                ],
            )?;
        }
        Ok(())
    }

    /// The assignment that a step was committed with, by worker; empty if none is known.
    pub fn assignment(&self, run: &RunName, step: u64) -> Result<Vec<AssignmentRow>, StoreError> {
        let rows = self.query(
            "SELECT first_step, generation, worker, lanes FROM assignments
             WHERE run = ?1 AND first_step = (
                 SELECT max(first_step) FROM assignments WHERE run = ?1 AND first_step <= ?2
             ) ORDER BY worker",
            params![run.as_str(), step as i64],
            read_assignment,
        )?;
        let parse = |(row, text): (AssignmentRow, String)| {
            let what = || format!("an assignment of run `{run}`");
            let lanes = parse_lanes(&text)
                .ok_or_else(|| self.unreadable(what(), format!("`{text}` are no lanes")))?;
            Ok(AssignmentRow { lanes, ..row })
        };
        rows.into_iter().map(parse).collect()
    }

    /// Records who was given lanes of a step that more than one worker was given.
    pub fn record_attempts(&self, run: &RunName, rows: &[AttemptRow]) -> Result<(), StoreError> {
        for row in rows {
            self.execute(
                "INSERT INTO attempts (run, step, lane, worker, outcome) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    run.as_str(),
                    row.step as i64,
                    row.lane,
                    row.worker,
                    row.outcome
                ],
            )?;
        }
        Ok(())
    }

    /// The attempts of a step, in the order in which they were recorded.
    pub fn attempts(&self, run: &RunName, step: u64) -> Result<Vec<AttemptRow>, StoreError> {
        self.query(
            "SELECT step, lane, worker, outcome FROM attempts WHERE run = ?1 AND step = ?2 ORDER BY id",
            params![run.as_str(), step as i64],
            |row| {
                Ok(AttemptRow {
                    step: unsigned(row, 0)?,
                    lane: row.get(1)?,
                    worker: row.get(2)?,
                    outcome: row.get(3)?,
                })
            },
        )
    }

    /// Forgets who computed what after a step.
    pub(super) fn truncate_assignments(&self, run: &RunName, step: u64) -> Result<(), StoreError> {
        for (table, column) in [("assignments", "first_step"), ("attempts", "step")] {
            let sql = format!("DELETE FROM {table} WHERE run = ?1 AND {column} > ?2");
            self.execute(&sql, params![run.as_str(), step as i64])?;
        }
        Ok(())
    }
}

/// A row whose lanes are still text.
fn read_assignment(row: &Row<'_>) -> rusqlite::Result<(AssignmentRow, String)> {
    let assignment = AssignmentRow {
        first_step: unsigned(row, 0)?,
        generation: unsigned(row, 1)?,
        worker: row.get(2)?,
        lanes: Vec::new(),
    };
    Ok((assignment, row.get(3)?))
}

/// Ascending lanes as text: `0-3,5`.
fn lanes_text(lanes: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &lane in lanes {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(lane) => *last = lane,
            _ => ranges.push((lane, lane)),
        }
    }
    let texts = ranges.into_iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    texts.collect::<Vec<_>>().join(",")
}

/// Reads what [`lanes_text`] wrote.
fn parse_lanes(text: &str) -> Option<Vec<u32>> {
    let mut lanes = Vec::new();
    for range in text.split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last.checked_sub(first)? >= MAX_RANGE {
            return None;
        }
        lanes.extend(first..=last);
    }
    Some(lanes)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{name, new_run, store_with_run};
    use super::*;

    fn fault(step: u64) -> FaultRow {
        FaultRow {
            step,
            time_ms: 1000 + step,
            kind: "redone".into(),
            worker: "w2".into(),
            text: format!("step {step}: lanes 3 of w2 redone by w1"),
            delay_ms: (step > 1).then_some(250),
        }
    }

    fn lanes(of: &[(&str, &[u32])]) -> BTreeMap<String, Vec<u32>> {
        of.iter()
            .map(|(worker, lanes)| ((*worker).to_owned(), lanes.to_vec()))
            .collect()
    }

    fn attempt(step: u64, worker: &str, outcome: &str) -> AttemptRow {
        AttemptRow {
            step,
            lane: 3,
            worker: worker.into(),
            outcome: outcome.into(),
        }
    }

    #[test]
    fn the_newest_faults_are_kept_by_run_and_go_with_it() {
        let (_dir, store) = store_with_run("tiny-1");
        store.create_run(&new_run("tiny-2"), 1).unwrap();
        let (one, two) = (name("tiny-1"), name("tiny-2"));
        for step in 1..=4 {
            store.record_fault(&one, &fault(step)).unwrap();
        }
        store.record_fault(&two, &fault(9)).unwrap();
        assert_eq!(store.faults(&one, 2).unwrap(), [fault(3), fault(4)]);
        assert_eq!(store.faults(&one, 99).unwrap().len(), 4);
        store.truncate(&one, 2).unwrap();
        assert_eq!(store.faults(&one, 99).unwrap().len(), 4);
        store.delete_run(&one).unwrap();
        assert_eq!(store.faults(&one, 99).unwrap(), []);
        assert_eq!(store.faults(&two, 99).unwrap(), [fault(9)]);
        assert!(store.record_fault(&one, &fault(1)).is_err());
    }

    #[test]
    fn an_assignment_is_written_when_it_changes() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        let both = lanes(&[("w1", &[0, 1, 2, 3]), ("w2", &[4, 5])]);
        let alone = lanes(&[("w1", &[0, 1, 2, 3, 4, 5])]);
        let first_of = |step| store.assignment(&run, step).unwrap()[0].first_step;
        for (step, generation, held) in [
            (1, 1, &both),
            (2, 1, &both),
            (3, 2, &alone),
            (4, 2, &alone),
            (5, 3, &both),
        ] {
            store
                .record_assignment(&run, step, generation, held)
                .unwrap();
        }
        assert_eq!([1, 2, 3, 4, 5, 9].map(first_of), [1, 1, 3, 3, 5, 5]);
        let rows = store.assignment(&run, 2).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(
            (rows[1].worker.as_str(), &rows[1].lanes[..]),
            ("w2", &[4, 5][..])
        );
        assert_eq!(store.assignment(&run, 0).unwrap(), []);
        // Step 4 is computed again, by both: what was known from there on is void.
        store.record_assignment(&run, 4, 1, &both).unwrap();
        assert_eq!([3, 4, 9].map(first_of), [3, 4, 4]);
    }

    #[test]
    fn who_computed_what_goes_with_the_steps_and_with_the_run() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        let held = lanes(&[("w1", &[0])]);
        store.record_assignment(&run, 1, 1, &held).unwrap();
        store
            .record_assignment(&run, 5, 2, &lanes(&[("w2", &[0])]))
            .unwrap();
        let five = [attempt(5, "w1", "lost"), attempt(5, "w2", "redone")];
        store.record_attempts(&run, &five).unwrap();
        store
            .record_attempts(&run, &[attempt(2, "w1", "late")])
            .unwrap();
        assert_eq!(store.attempts(&run, 5).unwrap(), five);
        store.truncate(&run, 4).unwrap();
        assert_eq!(store.attempts(&run, 5).unwrap(), []);
        assert_eq!(store.attempts(&run, 2).unwrap().len(), 1);
        assert_eq!(store.assignment(&run, 9).unwrap()[0].worker, "w1");
        store.delete_run(&run).unwrap();
        assert_eq!(store.assignment(&run, 9).unwrap(), []);
        assert_eq!(store.attempts(&run, 2).unwrap(), []);
    }

    #[test]
    fn lanes_are_written_as_ranges() {
        for (lanes, text) in [
            (vec![], ""),
            (vec![7], "7"),
            (vec![0, 1, 2, 3, 5], "0-3,5"),
            (vec![0, 2, 3, u32::MAX], "0,2-3,4294967295"),
        ] {
            assert_eq!(lanes_text(&lanes), text);
            assert_eq!(parse_lanes(text), Some(lanes));
        }
        for damaged in ["1-x", "5-3", "0-4294967295"] {
            assert_eq!(parse_lanes(damaged), None);
        }
    }
}
