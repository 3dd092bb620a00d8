//! Opening the database: pragmas, the check that it is ours and intact, and its versions.

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::{Store, StoreError};

/// Marks a SQLite file as Cohort's: "Chrt".
const APPLICATION_ID: i64 = 0x4368_7274;

/// One script per schema version: script `i` takes a database from version `i` to `i + 1`. Never edit one that was
/// released; append another.
const MIGRATIONS: [&str; 4] = [VERSION_1, VERSION_2, VERSION_3, VERSION_4];

const VERSION_1: &str = "
    CREATE TABLE runs (
        name TEXT PRIMARY KEY NOT NULL,
        kind TEXT NOT NULL,
        spec_json TEXT NOT NULL,
        identity TEXT NOT NULL,
        status TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        started_ms INTEGER,
        finished_ms INTEGER,
        step INTEGER NOT NULL DEFAULT 0,
        error TEXT,
        parent TEXT
    ) STRICT;
    CREATE INDEX runs_by_identity ON runs (identity);

    -- `entry` is the canonical encoding and what counts; the other columns are for people with sqlite3.
    CREATE TABLE ledger (
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        step INTEGER NOT NULL,
        first_position INTEGER NOT NULL,
        samples INTEGER NOT NULL,
        loss_sum REAL,
        weight REAL,
        grad_norm REAL,
        learning_rate REAL,
        hash BLOB NOT NULL,
        entry BLOB NOT NULL,
        PRIMARY KEY (run, step)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE steps (
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        step INTEGER NOT NULL,
        loss REAL,
        grad_norm REAL,
        learning_rate REAL,
        tokens INTEGER NOT NULL,
        tokens_per_second REAL,
        time_ms INTEGER NOT NULL,
        PRIMARY KEY (run, step)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE evals (
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        step INTEGER NOT NULL,
        split TEXT NOT NULL,
        loss REAL,
        bits_per_byte REAL,
        weight REAL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (run, step, split)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run TEXT REFERENCES runs (name) ON DELETE CASCADE,
        time_ms INTEGER NOT NULL,
        kind TEXT NOT NULL,
        text TEXT NOT NULL
    ) STRICT;
    CREATE INDEX events_by_run ON events (run, id);

    CREATE TABLE attempts (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        step INTEGER NOT NULL,
        lane INTEGER NOT NULL,
        worker TEXT NOT NULL,
        outcome TEXT NOT NULL
    ) STRICT;
    CREATE INDEX attempts_by_step ON attempts (run, step);

    CREATE TABLE checkpoints (
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        step INTEGER NOT NULL,
        path TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        val_loss REAL,
        state_hash BLOB NOT NULL,
        time_ms INTEGER NOT NULL,
        PRIMARY KEY (run, step)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE corpora (
        fingerprint TEXT PRIMARY KEY NOT NULL,
        name TEXT NOT NULL,
        json TEXT NOT NULL,
        time_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
";

/// What happened to workers, and who computed what.
const VERSION_2: &str = "
    -- Workers that trained the run when its newest step was committed; 0 before the first.
    ALTER TABLE runs ADD COLUMN workers INTEGER NOT NULL DEFAULT 0;

    -- Who holds which lanes from `first_step` on, until the next rows. `lanes` is like `0-3,5`.
    CREATE TABLE assignments (
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        first_step INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        worker TEXT NOT NULL,
        lanes TEXT NOT NULL,
        PRIMARY KEY (run, first_step, worker)
    ) STRICT, WITHOUT ROWID;

    -- `attempts` of version 1 has rows only for lanes that more than one worker was given in a step.

    CREATE TABLE faults (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        step INTEGER NOT NULL,
        time_ms INTEGER NOT NULL,
        kind TEXT NOT NULL,
        worker TEXT NOT NULL,
        text TEXT NOT NULL,
        delay_ms INTEGER
    ) STRICT;
    CREATE INDEX faults_by_run ON faults (run, id);
";

const VERSION_3: &str = "
    -- Of a classifier: samples by label and by the label they were given, row by row, as a list in JSON.
    ALTER TABLE evals ADD COLUMN confusion TEXT;
";

/// What the web page and its kin show; a step's metrics are kept once, and its event only names it.
const VERSION_4: &str = "
    -- Steps of the whole run, as it was planned when the step was committed.
    ALTER TABLE steps ADD COLUMN horizon INTEGER;
    -- Passes over the training split.
    ALTER TABLE steps ADD COLUMN epoch REAL;
    ALTER TABLE steps ADD COLUMN bits_per_byte REAL;
    -- Model FLOPs utilisation, from 0 to 1.
    ALTER TABLE steps ADD COLUMN mfu REAL;

    CREATE TEMP TABLE told AS
        SELECT run, json_extract(text, '$.step') AS step, json_extract(text, '$.steps') AS horizon,
               json_extract(text, '$.epoch') AS epoch
        FROM events WHERE kind = 'step';
    CREATE INDEX temp.told_by_step ON told (run, step);
    UPDATE steps SET
        horizon = (SELECT horizon FROM told WHERE told.run = steps.run AND told.step = steps.step LIMIT 1),
        epoch = (SELECT epoch FROM told WHERE told.run = steps.run AND told.step = steps.step LIMIT 1);
    DROP TABLE told;
    -- The text of a step's event is the number of the step from here on.
    UPDATE events SET text = json_extract(text, '$.step') WHERE kind = 'step';

    -- `cohort_common::api::RunFacts` as JSON: what does not change while a run trains.
    ALTER TABLE runs ADD COLUMN facts_json TEXT;

    -- Whether the step's update was left out.
    ALTER TABLE ledger ADD COLUMN skipped INTEGER NOT NULL DEFAULT 0;

    -- A run has an event for each step; whoever wants the others must not read past a million of those.
    CREATE INDEX events_told ON events (run, id) WHERE kind != 'step';

    -- What the model of a step writes after the prompts of the spec.
    CREATE TABLE samples (
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        step INTEGER NOT NULL,
        prompt INTEGER NOT NULL,
        -- A run that goes on may have other prompts.
        prompt_text TEXT NOT NULL,
        text TEXT NOT NULL,
        PRIMARY KEY (run, step, prompt)
    ) STRICT, WITHOUT ROWID;

    -- How a worker's time went, in microseconds, over the steps up to this one since its row before.
    CREATE TABLE worker_times (
        run TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
        worker TEXT NOT NULL,
        step INTEGER NOT NULL,
        time_ms INTEGER NOT NULL,
        host TEXT NOT NULL,
        device TEXT NOT NULL,
        tokens INTEGER NOT NULL,
        compute_us INTEGER NOT NULL,
        exchange_us INTEGER NOT NULL,
        wait_us INTEGER NOT NULL,
        data_us INTEGER NOT NULL,
        PRIMARY KEY (run, worker, step)
    ) STRICT, WITHOUT ROWID;
";

/// The schema version of this build.
pub const SCHEMA_VERSION: i64 = MIGRATIONS.len() as i64;

/// How long to wait for another process that holds the database for a moment.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

impl Store {
    /// Opens the database for reading and writing; creates or upgrades it as needed. The caller holds the home's lock.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let sql = StoreError::sql(path);
        let store = Self::on(Connection::open(path).map_err(&sql)?, path)?;
        let version = store.check_identity()?;
        // A commit is on the disk when it returns; readers never wait for the writer.
        store.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;",
        )?;
        store.check_integrity()?;
        store.migrate(version)?;
        Ok(store)
    }

    /// Opens an existing database for reading; needs no lock, and works beside a coordinator.
    pub fn open_read_only(path: &Path) -> Result<Self, StoreError> {
        if !path.is_file() {
            return Err(StoreError::Missing(path.to_owned()));
        }
        let mut store = Self::connect_read_only(path, false)?;
        // Beside its file SQLite wants one for shared memory. Where that cannot be made nobody can be writing either.
        if let Err(StoreError::Sql { .. }) = store.check_identity()
            && !path.with_extension("db-wal").exists()
        {
            store = Self::connect_read_only(path, true)?;
        }
        match store.check_identity()? {
            version if version < SCHEMA_VERSION => Err(StoreError::Unreadable {
                path: path.to_owned(),
                what: format!("schema version {version}"),
                reason: "start a coordinator on this home once, it upgrades the database"
                    .to_owned(),
            }),
            _ => Ok(store),
        }
    }

    fn connect_read_only(path: &Path, immutable: bool) -> Result<Self, StoreError> {
        let sql = StoreError::sql(path);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
        let connection = match immutable {
            false => Connection::open_with_flags(path, flags),
            true => Connection::open_with_flags(immutable_uri(path), flags),
        };
        Self::on(connection.map_err(&sql)?, path)
    }

    fn on(connection: Connection, path: &Path) -> Result<Self, StoreError> {
        // Statements stay as they were prepared, whatever is bound to them: without this, those with a range are prepared
        // again for each use.
        connection
            .busy_timeout(BUSY_TIMEOUT)
            .and_then(|()| connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true))
            .map_err(StoreError::sql(path))?;
        Ok(Self {
            connection,
            path: path.to_owned(),
        })
    }

    /// Refuses what is not ours or newer than this build. Returns the schema version, 0 for an empty database.
    fn check_identity(&self) -> Result<i64, StoreError> {
        let version = self.pragma("user_version")?;
        let application = self.pragma("application_id")?;
        let tables: i64 =
            self.query_one("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if application != APPLICATION_ID && (tables > 0 || application != 0) {
            return Err(StoreError::Foreign(self.path.clone()));
        }
        if version > SCHEMA_VERSION {
            return Err(StoreError::Newer {
                path: self.path.clone(),
                found: version,
                supported: SCHEMA_VERSION,
            });
        }
        Ok(version)
    }

    fn check_integrity(&self) -> Result<(), StoreError> {
        let found: String = self.query_one("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        match found.as_str() {
            "ok" => Ok(()),
            _ => Err(StoreError::Corrupt {
                path: self.path.clone(),
                reason: found,
            }),
        }
    }

    fn migrate(&self, version: i64) -> Result<(), StoreError> {
        for (from, script) in MIGRATIONS.iter().enumerate().skip(version as usize) {
            let to = from + 1;
            self.execute_batch(&format!(
                "BEGIN; {script}; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {to}; COMMIT;"
            ))?;
        }
        Ok(())
    }

    fn pragma(&self, name: &str) -> Result<i64, StoreError> {
        self.query_one(&format!("PRAGMA {name}"), [], |row| row.get(0))
    }
}

/// A name by which SQLite reads a file without touching anything beside it.
fn immutable_uri(path: &Path) -> String {
    let mut uri = "file:".to_owned();
    for byte in path.to_string_lossy().bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
                uri.push(byte.into())
            }
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri + "?immutable=1"
}

#[cfg(test)]
mod tests;
