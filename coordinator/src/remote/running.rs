//! What a coordinator writes to the store of a run between its checkpoints, where others stand by: what the run is, and its
//! ledger in small pieces that never change. **Pure**.
//!
//! ```text
//! runs/RUN/run.json                        what it is and how it stands; written anew when that changes
//! runs/RUN/ledger/GENERATION-NUMBER.json   a piece of its ledger
//! ```
//!
//! A piece says after which step its entries follow, and what others say of later steps is void by it: so steps that were
//! taken back need no deletion. Pieces count in the order of their names, the leader's generation first. What a leader
//! writes that should not lead any more stands before all that its successor writes. The first piece of a generation follows
//! a checkpoint that is in the store, or nothing; so older generations are not needed for it.

use cohort_common::api::RunFacts;
use cohort_common::checkpoint::FileEntry;
use cohort_common::home::RunName;
use cohort_common::ledger::Entry;
use cohort_common::spec::RunSpec;
use serde::{Deserialize, Serialize};

use super::layout::{ManifestError, RUNS, run};
use crate::store::{EvalRow, RunRow};

/// A run that a coordinator has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredRun {
    /// Version of the layout.
    pub format: u32,
    /// The home of the coordinator that wrote this.
    pub home: String,
    /// What it does.
    pub spec: RunSpec,
    /// How it stands: a word of [`crate::store::RunStatus`].
    pub status: String,
    /// Why it failed.
    pub error: Option<String>,
    /// When it was submitted, in milliseconds since the epoch.
    pub created_ms: u64,
    /// What it started from, as the user named it.
    pub parent: Option<String>,
    /// What does not change while it trains.
    pub facts: Option<RunFacts>,
    /// Workers that trained it when its newest step was committed.
    pub workers: u32,
    /// Its validations so far.
    pub evals: Vec<EvalRow>,
    /// The files of the directory that it starts from, if it has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub start: Vec<FileEntry>,
}

/// A piece of a ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// Version of the layout.
    pub format: u32,
    /// The step after which it goes on: what is known of later steps from pieces before is void.
    pub after: u64,
    /// Entries of the steps after it, without a gap.
    pub entries: Vec<Entry>,
}

impl StoredRun {
    /// From JSON.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        let stored: Self = super::layout::parse(json)?;
        super::layout::check_names(stored.start.iter())?;
        Ok(stored)
    }

    /// A run of the database.
    pub fn of(
        home: &str,
        row: RunRow,
        facts: Option<RunFacts>,
        evals: Vec<EvalRow>,
        start: Vec<FileEntry>,
    ) -> Self {
        Self {
            format: super::layout::FORMAT,
            home: home.into(),
            spec: row.spec,
            status: row.status.to_string(),
            error: row.error,
            created_ms: row.created_ms,
            parent: row.parent,
            facts,
            workers: row.workers,
            evals,
            start,
        }
    }
}

/// What a run is.
pub fn document(name: &RunName) -> String {
    format!("{}run.json", run(name))
}

/// The pieces of a run's ledger.
pub fn pieces(name: &RunName) -> String {
    format!("{}ledger/", run(name))
}

/// A piece of a run's ledger.
pub fn piece(name: &RunName, generation: u64, number: u64) -> String {
    format!("{}{generation:010}-{number:010}.json", pieces(name))
}

/// What an object of a run is, as far as a coordinator follows it that stands by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// [`StoredRun`].
    Document,
    /// The manifest of a checkpoint of this step.
    Checkpoint(u64),
    /// [`Piece`], of this generation and number.
    Piece(u64, u64),
}

/// The run and the part of an object's name.
pub fn parse(name: &str) -> Option<(RunName, Part)> {
    if let Some((run, step)) = super::layout::parse_checkpoint(name) {
        return Some((run, Part::Checkpoint(step)));
    }
    let mut words = name.strip_prefix(RUNS)?.split('/');
    let run = RunName::new(words.next()?).ok()?;
    let part = match (words.next()?, words.next(), words.next()) {
        ("run.json", None, None) => Part::Document,
        ("ledger", Some(file), None) => {
            let (generation, number) = file.strip_suffix(".json")?.split_once('-')?;
            let digits = |text: &str| {
                let plain = text.len() == 10 && text.bytes().all(|b| b.is_ascii_digit());
                plain.then(|| text.parse().ok()).flatten()
            };
            Part::Piece(digits(generation)?, digits(number)?)
        }
        _ => return None,
    };
    Some((run, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_are_of() {
        let run = RunName::new("tiny-1").unwrap();
        let name = piece(&run, 3, 12);
        assert_eq!(name, "runs/tiny-1/ledger/0000000003-0000000012.json");
        assert_eq!(parse(&name), Some((run.clone(), Part::Piece(3, 12))));
        assert!(name < piece(&run, 4, 1));
        assert_eq!(parse(&document(&run)), Some((run.clone(), Part::Document)));
        let checkpoint = super::super::layout::checkpoint(&run, 100);
        assert_eq!(parse(&checkpoint), Some((run, Part::Checkpoint(100))));
        for other in [
            "runs/tiny-1/owner.json",
            "runs/tiny-1/ledger/3-12.json",
            "runs/tiny-1/ledger/0000000003-0000000012",
            "runs/tiny-1/ledger/x/0000000003-0000000012.json",
            "runs/../run.json",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
