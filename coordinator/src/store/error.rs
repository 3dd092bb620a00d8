//! What can go wrong with the store, each with the database, the run or the field.

use std::path::{Path, PathBuf};

use cohort_common::ledger::ChainError;
use rusqlite::ErrorCode;

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file is no intact SQLite database.
    #[error(
        "the database `{path}` is damaged: {reason}; move it away (`mv {path} {path}.damaged`) and start again: runs that have checkpoints are taken in again from them",
        path = path.display()
    )]
    Corrupt {
        /// The database file.
        path: PathBuf,
        /// What SQLite found.
        reason: String,
    },
    /// A database, but not one of Cohort's.
    #[error("`{}` is a database of another program; choose another home with `--home`", .0.display())]
    Foreign(PathBuf),
    /// Written by a newer build.
    #[error(
        "the database `{}` has schema version {found}, this build of cohort knows up to {supported}; update cohort",
        path.display()
    )]
    Newer {
        /// The database file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The newest version of this build.
        supported: i64,
    },
    /// There is no database to read.
    #[error(
        "there is no database `{}`; nothing was trained in this home yet, or it was moved away: a coordinator that starts here takes runs in again from their checkpoints",
        .0.display()
    )]
    Missing(PathBuf),
    /// No space left.
    #[error("the disk is full: cannot write to the database `{}`; free some space", .0.display())]
    Full(PathBuf),
    /// Anything else that SQLite reports.
    #[error("cannot use the database `{}`", path.display())]
    Sql {
        /// The database file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
    /// A row that this build cannot read.
    #[error("the database `{}` holds {what} that cannot be read: {reason}", path.display())]
    Unreadable {
        /// The database file.
        path: PathBuf,
        /// Which row.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A step was computed again and came out differently.
    #[error(
        "step {step} of run `{run}` was committed with {field} `{recorded}` and now came out as `{offered}`: \
         a machine computes differently; nothing was changed"
    )]
    LedgerConflict {
        /// The run.
        run: String,
        /// The step.
        step: u64,
        /// First field that differs.
        field: &'static str,
        /// Its value in the ledger.
        recorded: String,
        /// Its value in the entry that was offered.
        offered: String,
    },
    /// An entry that does not follow the last one.
    #[error("the ledger of run `{run}` does not go on like this")]
    Chain {
        /// The run.
        run: String,
        /// The contradiction.
        source: ChainError,
    },
    /// No run of that name.
    #[error("there is no run `{0}`; `cohort runs` lists them")]
    UnknownRun(String),
    /// The name is taken.
    #[error("there is a run `{0}` already; choose another `--name`, or go on with `--resume {0}`")]
    RunExists(String),
    /// The write was done, but the transaction around it could not be made durable.
    #[error("a change was not saved: {0}")]
    NotDurable(String),
    /// More requests than the queue holds.
    #[error("the store has more requests than it can hold; try again")]
    Busy,
    /// The thread of the store has ended.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// For `map_err` on an operation on the database at `path`.
    pub(super) fn sql(path: &Path) -> impl Fn(rusqlite::Error) -> Self + '_ {
        |source| {
            let path = path.to_owned();
            match source.sqlite_error_code() {
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Corrupt {
                    path,
                    reason: source.to_string(),
                },
                Some(ErrorCode::DiskFull) => Self::Full(path),
                _ => Self::Sql { path, source },
            }
        }
    }

    /// The error and its causes in one line.
    pub(super) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}
