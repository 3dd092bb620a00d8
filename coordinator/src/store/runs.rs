//! Runs: entering, finding, following their life.

use cohort_common::api::RunFacts;
use cohort_common::home::{MAX_RUN_NAME, RunName};
use cohort_common::spec::RunSpec;
use rusqlite::{ErrorCode, Row, params};

use super::{NewRun, RunRow, RunStatus, Store, StoreError};

/// Columns of [`read`], in its order.
const COLUMNS: &str = "name, kind, spec_json, identity, status, created_ms, started_ms, finished_ms, step, error, parent, workers";

/// A row as the database has it.
struct Raw {
    name: String,
    spec_json: String,
    status: String,
    identity: String,
    created_ms: i64,
    started_ms: Option<i64>,
    finished_ms: Option<i64>,
    step: i64,
    error: Option<String>,
    parent: Option<String>,
    workers: u32,
}

fn read(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok(Raw {
        name: row.get(0)?,
        spec_json: row.get(2)?,
        identity: row.get(3)?,
        status: row.get(4)?,
        created_ms: row.get(5)?,
        started_ms: row.get(6)?,
        finished_ms: row.get(7)?,
        step: row.get(8)?,
        error: row.get(9)?,
        parent: row.get(10)?,
        workers: row.get(11)?,
    })
}

impl Store {
    /// Enters a run as queued.
    pub fn create_run(&self, run: &NewRun, time_ms: u64) -> Result<(), StoreError> {
        let spec_json = spec_json(&run.spec);
        let kind = serde_json::to_value(run.spec.kind).expect("a kind is a word");
        let facts_json = run
            .facts
            .as_ref()
            .map(|facts| serde_json::to_string(facts).expect("facts are plain data"));
        let values = params![
            run.name.as_str(),
            kind.as_str(),
            spec_json,
            run.identity,
            RunStatus::Queued.as_str(),
            time_ms as i64,
            run.parent,
            facts_json
        ];
        let inserted = self.execute(
            "INSERT INTO runs (name, kind, spec_json, identity, status, created_ms, parent, facts_json)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            values,
        );
        match inserted {
            Err(StoreError::Sql { source, .. })
                if source.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) =>
            {
                Err(StoreError::RunExists(run.name.to_string()))
            }
            other => other.map(|_| ()),
        }
    }

    /// All runs, the oldest first.
    pub fn runs(&self) -> Result<Vec<RunRow>, StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM runs ORDER BY created_ms, name");
        self.parse_all(self.query(&sql, [], read)?)
    }

    /// One run.
    pub fn run(&self, name: &RunName) -> Result<RunRow, StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM runs WHERE name = ?1");
        let raw = self.query_maybe(&sql, [name.as_str()], read)?;
        self.parse(raw.ok_or_else(|| StoreError::UnknownRun(name.to_string()))?)
    }

    /// The newest run of this identity that the same command would go on with.
    pub fn find_unfinished(&self, identity: &str) -> Result<Option<RunRow>, StoreError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM runs WHERE identity = ?1 ORDER BY created_ms DESC, rowid DESC"
        );
        let rows = self.parse_all(self.query(&sql, [identity], read)?)?;
        Ok(rows.into_iter().find(|r| r.status.is_unfinished()))
    }

    /// What is known of a run from its submission on; `None` for a run of an earlier version, or one whose database was
    /// lost.
    pub fn facts(&self, name: &RunName) -> Result<Option<RunFacts>, StoreError> {
        let sql = "SELECT facts_json FROM runs WHERE name = ?1";
        let json: Option<String> = self
            .query_maybe(sql, [name.as_str()], |row| row.get(0))?
            .flatten();
        let parse = |json: String| {
            serde_json::from_str(&json)
                .map_err(|error| self.unreadable(format!("the facts of run `{name}`"), error))
        };
        json.map(parse).transpose()
    }

    /// Queues a run, unless its status is no longer `was`: then somebody else was faster. Says whether it did.
    pub fn claim(&self, name: &RunName, was: RunStatus, time_ms: u64) -> Result<bool, StoreError> {
        if self.run(name)?.status != was {
            return Ok(false);
        }
        self.set_status(name, RunStatus::Queued, None, time_ms)?;
        Ok(true)
    }

    /// Moves a run to another status. The first `running` sets when it started, an end when it finished; `error` is
    /// kept only with `failed`.
    pub fn set_status(
        &self,
        name: &RunName,
        status: RunStatus,
        error: Option<&str>,
        time_ms: u64,
    ) -> Result<(), StoreError> {
        let error = error.filter(|_| status == RunStatus::Failed);
        let started = (status == RunStatus::Running).then_some(time_ms as i64);
        let finished = status.has_ended().then_some(time_ms as i64);
        let changed = self.execute(
            "UPDATE runs SET status = ?2, error = ?3, started_ms = coalesce(started_ms, ?4), finished_ms = ?5
             WHERE name = ?1",
            params![name.as_str(), status.as_str(), error, started, finished],
        )?;
        self.expect_run(name, changed)
    }

    /// Sets the number of committed steps; it never goes down.
    pub fn set_progress(&self, name: &RunName, step: u64) -> Result<(), StoreError> {
        let sql = "UPDATE runs SET step = max(step, ?2) WHERE name = ?1";
        let changed = self.execute(sql, params![name.as_str(), step as i64])?;
        self.expect_run(name, changed)
    }

    /// Sets how many workers trained a run when its newest step was committed.
    pub fn set_workers(&self, name: &RunName, workers: u32) -> Result<(), StoreError> {
        let sql = "UPDATE runs SET workers = ?2 WHERE name = ?1";
        let changed = self.execute(sql, params![name.as_str(), workers])?;
        self.expect_run(name, changed)
    }

    /// Replaces what a run does: more steps than planned, for example.
    pub fn set_spec(
        &self,
        name: &RunName,
        spec: &RunSpec,
        identity: &str,
    ) -> Result<(), StoreError> {
        let sql = "UPDATE runs SET spec_json = ?2, identity = ?3 WHERE name = ?1";
        let changed = self.execute(sql, params![name.as_str(), spec_json(spec), identity])?;
        self.expect_run(name, changed)
    }

    /// Forgets what a run committed after a step: its ledger, metrics, validations and assignments from there on. Only for
    /// a run that goes on from that step with another horizon. What happened to its workers stays, as its events do.
    pub fn truncate(&self, name: &RunName, step: u64) -> Result<(), StoreError> {
        for table in ["ledger", "steps", "evals", "samples"] {
            let sql = format!("DELETE FROM {table} WHERE run = ?1 AND step > ?2");
            self.execute(&sql, params![name.as_str(), step as i64])?;
        }
        self.truncate_assignments(name, step)?;
        let sql = "UPDATE runs SET step = ?2 WHERE name = ?1";
        let changed = self.execute(sql, params![name.as_str(), step as i64])?;
        self.expect_run(name, changed)
    }

    /// Deletes a run and all that is known about it. Its files are the caller's.
    pub fn delete_run(&self, name: &RunName) -> Result<(), StoreError> {
        let changed = self.execute("DELETE FROM runs WHERE name = ?1", [name.as_str()])?;
        self.expect_run(name, changed)
    }

    /// The next free name `<stem>-N`; N grows past every run there is.
    pub fn next_run_name(&self, stem: &RunName) -> Result<RunName, StoreError> {
        let names: Vec<String> = self.query("SELECT name FROM runs", [], |row| row.get(0))?;
        let number = |name: &String| -> Option<u64> {
            name.strip_prefix(stem.as_str())?
                .strip_prefix('-')?
                .parse()
                .ok()
        };
        let next = names
            .iter()
            .filter_map(number)
            .max()
            .unwrap_or(0)
            .saturating_add(1);
        let suffix = format!("-{next}");
        let keep = stem.as_str().len().min(MAX_RUN_NAME - suffix.len());
        let name = format!("{}{suffix}", &stem.as_str()[..keep]);
        Ok(RunName::new(&name).expect("a valid stem and a number make a valid name"))
    }

    pub(super) fn expect_run(&self, name: &RunName, changed: usize) -> Result<(), StoreError> {
        match changed {
            0 => Err(StoreError::UnknownRun(name.to_string())),
            _ => Ok(()),
        }
    }

    fn parse_all(&self, rows: Vec<Raw>) -> Result<Vec<RunRow>, StoreError> {
        rows.into_iter().map(|raw| self.parse(raw)).collect()
    }

    fn parse(&self, raw: Raw) -> Result<RunRow, StoreError> {
        let what = || format!("a run `{}`", raw.name);
        let spec: RunSpec =
            serde_json::from_str(&raw.spec_json).map_err(|e| self.unreadable(what(), e))?;
        let status = RunStatus::parse(&raw.status)
            .ok_or_else(|| self.unreadable(what(), format!("unknown status `{}`", raw.status)))?;
        Ok(RunRow {
            name: RunName::new(&raw.name).map_err(|e| self.unreadable(what(), e))?,
            kind: spec.kind,
            spec,
            identity: raw.identity,
            status,
            created_ms: raw.created_ms as u64,
            started_ms: raw.started_ms.map(|t| t as u64),
            finished_ms: raw.finished_ms.map(|t| t as u64),
            step: raw.step as u64,
            error: raw.error,
            parent: raw.parent,
            workers: raw.workers,
        })
    }
}

fn spec_json(spec: &RunSpec) -> String {
    serde_json::to_string(spec).expect("a spec is plain data")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{name, new_run, spec, store_with_run};
    use super::*;

    #[test]
    fn a_run_is_read_back_to_the_bit() {
        let (_dir, store) = store_with_run("tiny-1");
        let row = store.run(&name("tiny-1")).unwrap();
        assert_eq!(row.spec, spec());
        assert_eq!(
            (row.status, row.created_ms, row.step),
            (RunStatus::Queued, 1000, 0)
        );
        assert!(
            matches!(store.create_run(&new_run("tiny-1"), 1), Err(StoreError::RunExists(n)) if n == "tiny-1")
        );
        assert!(
            matches!(store.run(&name("other")), Err(StoreError::UnknownRun(n)) if n == "other")
        );
    }

    #[test]
    fn a_life_of_a_run() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        store
            .set_status(&run, RunStatus::Running, None, 2000)
            .unwrap();
        store.set_progress(&run, 7).unwrap();
        store.set_progress(&run, 5).unwrap();
        store
            .set_status(&run, RunStatus::Interrupted, None, 2500)
            .unwrap();
        assert_eq!(store.run(&run).unwrap().status, RunStatus::Interrupted);
        store
            .set_status(&run, RunStatus::Running, None, 3000)
            .unwrap();
        store
            .set_status(&run, RunStatus::Failed, Some("loss is NaN"), 4000)
            .unwrap();
        let row = store.run(&run).unwrap();
        assert_eq!(
            (row.started_ms, row.finished_ms, row.step),
            (Some(2000), Some(4000), 7)
        );
        assert_eq!(row.error.as_deref(), Some("loss is NaN"));
        store
            .set_status(&run, RunStatus::Queued, None, 5000)
            .unwrap();
        let row = store.run(&run).unwrap();
        assert_eq!((row.finished_ms, row.error), (None, None));
        store.delete_run(&run).unwrap();
        assert!(matches!(
            store.delete_run(&run),
            Err(StoreError::UnknownRun(_))
        ));
    }

    #[test]
    fn the_newest_unfinished_run_of_an_identity_is_found() {
        let (_dir, store) = store_with_run("tiny-1");
        store.create_run(&new_run("tiny-2"), 2000).unwrap();
        store.create_run(&new_run("tiny-3"), 3000).unwrap();
        store
            .set_status(&name("tiny-3"), RunStatus::Finished, None, 4000)
            .unwrap();
        let found = store.find_unfinished("identity").unwrap().unwrap();
        assert_eq!(found.name, name("tiny-2"));
        assert_eq!(store.find_unfinished("other").unwrap(), None);
    }

    #[test]
    fn free_names_are_numbered_on() {
        let (_dir, store) = store_with_run("tiny-1");
        let next = |stem: &str| store.next_run_name(&name(stem)).unwrap();
        assert_eq!(next("tiny"), name("tiny-2"));
        store.create_run(&new_run("tiny-9"), 1).unwrap();
        store.create_run(&new_run("tiny-x"), 1).unwrap();
        assert_eq!(next("tiny"), name("tiny-10"));
        assert_eq!(next("small"), name("small-1"));
        assert_eq!(next(&"x".repeat(64)).as_str().len(), 64);
    }
}
