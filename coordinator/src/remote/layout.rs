//! What lies where in an object store, and what its manifests say. **Pure**.
//!
//! ```text
//! cohort.json                              whose format this is
//! runs/RUN/owner.json                      the home that writes this run
//! runs/RUN/objects/BLAKE3                  files of its checkpoints and of what it starts from, by content
//! runs/RUN/checkpoints/step-00000100.json  a checkpoint: it counts when this is there, which is written last
//! corpora/FINGERPRINT/objects/BLAKE3       shards, index, tokenizer, by content
//! corpora/FINGERPRINT/manifest.json        a corpus: it counts when this is there, which is written last
//! ```
//!
//! Nothing is shared between runs, so that deleting what one does not need any more cannot touch another. A corpus has no owner:
//! homes that have it under names of their own may write it at a time, and whichever manifest is there, its contents are.

use cohort_common::api::RunFacts;
use cohort_common::checkpoint::{
    FileEntry, RunState, directory_name, is_plain_name, parse_directory_name,
};
use cohort_common::home::RunName;
use serde::{Deserialize, Serialize};

use crate::store::EvalRow;

/// Version of the layout that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// The object that says whose format this is.
pub const MARKER: &str = "cohort.json";

/// Below this are all runs.
pub const RUNS: &str = "runs/";

/// What [`MARKER`] says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// Version of the layout.
    pub format: u32,
}

/// Who writes a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The id of its home.
    pub home: String,
}

/// A checkpoint in the store: enough to list its run, and to bring it back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredCheckpoint {
    /// Version of the layout.
    pub format: u32,
    /// Where the run stood.
    pub state: RunState,
    /// What only the database knows of the run, and what it needs to go on.
    pub record: Record,
    /// When the checkpoint was made, in milliseconds since the epoch.
    pub time_ms: u64,
    /// The files of its directory.
    pub files: Vec<FileEntry>,
    /// The files of the directory that the run starts from, if it has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub start: Vec<FileEntry>,
}

/// What a run's rows say. Its ledger is among the checkpoint's files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When it was submitted, in milliseconds since the epoch.
    pub created_ms: u64,
    /// What it started from, as the user named it.
    pub parent: Option<String>,
    /// What does not change while it trains.
    pub facts: Option<RunFacts>,
    /// Its validations up to the checkpoint: they decide which checkpoint is the best, and may end a run early.
    pub evals: Vec<EvalRow>,
}

/// A corpus in the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredCorpus {
    /// Version of the layout.
    pub format: u32,
    /// The files of its directory.
    pub files: Vec<FileEntry>,
}

/// Why a manifest is not used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not of this form.
    #[error("it cannot be understood: {0}")]
    Json(#[from] serde_json::Error),
    /// From a newer build.
    #[error(
        "its format {0} is newer than this build of cohort, which reads up to {FORMAT}; update cohort"
    )]
    Newer(u64),
    /// A name that could lead out of a directory.
    #[error("`{0}` is no plain file name")]
    Name(String),
}

impl StoredCheckpoint {
    /// Reads a manifest, and looks at its names.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        let stored: Self = parse(json)?;
        check_names(stored.files.iter().chain(&stored.start))?;
        Ok(stored)
    }

    /// The objects that must be there for it.
    pub fn objects(&self) -> impl Iterator<Item = &FileEntry> {
        self.files.iter().chain(&self.start)
    }

    /// Bytes of the checkpoint.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

impl StoredCorpus {
    /// Reads a manifest, and looks at its names.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        let stored: Self = parse(json)?;
        check_names(stored.files.iter())?;
        Ok(stored)
    }
}

/// JSON of this format, or of none that is newer.
pub fn parse<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, ManifestError> {
    let value: serde_json::Value = serde_json::from_slice(json)?;
    match value["format"].as_u64() {
        Some(format) if format > u64::from(FORMAT) => Err(ManifestError::Newer(format)),
        _ => Ok(serde_json::from_value(value)?),
    }
}

/// Refuses names that lead out of a directory.
pub fn check_names<'a>(
    mut files: impl Iterator<Item = &'a FileEntry>,
) -> Result<(), ManifestError> {
    match files.find(|file| !is_plain_name(&file.name)) {
        Some(file) => Err(ManifestError::Name(file.name.clone())),
        None => Ok(()),
    }
}

/// All that is of a run.
pub fn run(run: &RunName) -> String {
    format!("{RUNS}{run}/")
}

/// Who writes a run.
pub fn owner(run: &RunName) -> String {
    format!("{RUNS}{run}/owner.json")
}

/// The contents of a run.
pub fn objects(run: &RunName) -> String {
    format!("{RUNS}{run}/objects/")
}

/// One content of a run.
pub fn object(run: &RunName, blake3: &[u8; 32]) -> String {
    let hash = cohort_common::checkpoint::hex::encode(blake3);
    format!("{RUNS}{run}/objects/{hash}")
}

/// The manifests of a run.
pub fn checkpoints(run: &RunName) -> String {
    format!("{RUNS}{run}/checkpoints/")
}

/// The manifest of a checkpoint.
pub fn checkpoint(run: &RunName, step: u64) -> String {
    format!("{}{}.json", checkpoints(run), directory_name(step))
}

/// The run and the step of a manifest's name.
pub fn parse_checkpoint(name: &str) -> Option<(RunName, u64)> {
    let mut parts = name.strip_prefix(RUNS)?.split('/');
    let run = RunName::new(parts.next()?).ok()?;
    let (Some("checkpoints"), Some(file), None) = (parts.next(), parts.next(), parts.next()) else {
        return None;
    };
    let step = parse_directory_name(file.strip_suffix(".json")?)?;
    Some((run, step))
}

/// All that is of a corpus.
pub fn corpus(fingerprint: &str) -> String {
    format!("corpora/{fingerprint}/")
}

/// The contents of a corpus.
pub fn corpus_objects(fingerprint: &str) -> String {
    format!("corpora/{fingerprint}/objects/")
}

/// One content of a corpus, by its BLAKE3 in hex.
pub fn corpus_object(fingerprint: &str, hash: &str) -> String {
    format!("corpora/{fingerprint}/objects/{hash}")
}

/// The manifest of a corpus.
pub fn corpus_manifest(fingerprint: &str) -> String {
    format!("corpora/{fingerprint}/manifest.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_are_of() {
        let run = RunName::new("tiny-1").unwrap();
        let name = checkpoint(&run, 100);
        assert_eq!(name, "runs/tiny-1/checkpoints/step-00000100.json");
        assert_eq!(parse_checkpoint(&name), Some((run.clone(), 100)));
        for other in [
            "runs/tiny-1/owner.json",
            "runs/tiny-1/checkpoints/x/step-00000100.json",
            "runs/../checkpoints/step-00000100.json",
            "runs/tiny-1/checkpoints/step-100.json",
        ] {
            assert_eq!(parse_checkpoint(other), None, "{other}");
        }
        assert_eq!(
            object(&run, &[0xab; 32]),
            format!("runs/tiny-1/objects/{}", "ab".repeat(32))
        );
    }

    #[test]
    fn a_manifest_of_a_newer_build_or_with_a_strange_name_is_refused() {
        let newer = StoredCorpus::parse(br#"{"format": 2, "what": "ever"}"#).unwrap_err();
        assert!(newer.to_string().contains("format 2 is newer"), "{newer}");
        let file = |name: &str| FileEntry {
            name: name.into(),
            bytes: 1,
            blake3: [0; 32],
        };
        let manifest = |name: &str| {
            let stored = StoredCorpus {
                format: FORMAT,
                files: vec![file(name)],
            };
            StoredCorpus::parse(&serde_json::to_vec(&stored).unwrap())
        };
        assert!(manifest("x.shard").is_ok());
        assert!(matches!(manifest("../x"), Err(ManifestError::Name(_))));
    }
}
