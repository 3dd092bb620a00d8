//! The home directory: everything that a coordinator or a worker writes lies below it. Also the names that lead there:
//! of runs, and of checkpoints as a user refers to them.
//!
//! ```text
//! cohort.db                             runs, ledgers, metrics (the coordinator's store)
//! corpora/                              prepared corpora
//! files/                                raw files that clients sent or URLs named, by BLAKE3
//! fetched/                              downloads under way, and notes of what was fetched
//! runs/RUN/checkpoints/step-00000100/   checkpoints
//! worker/                               a worker's cache
//! plans/                                plans of runs, kept by the command line
//! logs/                                 logs of processes started here
//! security/                             the authority and the tokens of a cluster (`cohort init`)
//! lock                                  held by the coordinator that writes here
//! ```
//!
//! Where the home is by default is the command line's decision, not made here.

mod lock;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::checkpoint::{directory_name, hex};

pub use lock::{Holder, HomeLock};

/// Name of the directory in a home that has the authority and the tokens of a cluster.
pub const SECURITY: &str = "security";

/// The file of a worker's cache with its certificate.
pub const IDENTITY: &str = "identity.json";

/// Longest name of a run, in bytes.
pub const MAX_RUN_NAME: usize = 64;

/// What can be wrong with a home directory.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// It does not exist, and only reading was asked for.
    #[error("there is no home directory `{}`; nothing was trained there yet, or `--home` names another", .0.display())]
    Missing(PathBuf),
    /// It cannot be created or written.
    #[error("cannot write to the home directory: `{}`; choose another with `--home` or `COHORT_HOME`", path.display())]
    Unwritable {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another coordinator works there.
    #[error(
        "the home directory `{}` is in use by {holder}; stop it, talk to it with `--coordinator`, or choose another with `--home`",
        path.display()
    )]
    Locked {
        /// The home directory.
        path: PathBuf,
        /// Who holds it.
        holder: Holder,
    },
}

/// A home directory and the paths below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    root: PathBuf,
}

impl Home {
    /// Opens a home directory for writing; creates what is missing.
    pub fn open(root: &Path) -> Result<Self, HomeError> {
        let home = Self {
            root: std::path::absolute(root).unwrap_or_else(|_| root.to_owned()),
        };
        for directory in [
            home.corpora(),
            home.files(),
            home.runs(),
            home.worker(),
            home.logs(),
        ] {
            fs::create_dir_all(&directory).map_err(unwritable(&directory))?;
        }
        Ok(home)
    }

    /// Opens an existing home directory for reading; writes nothing.
    pub fn open_read_only(root: &Path) -> Result<Self, HomeError> {
        match root.is_dir() {
            true => Ok(Self {
                root: root.to_owned(),
            }),
            false => Err(HomeError::Missing(root.to_owned())),
        }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The coordinator's database.
    pub fn database(&self) -> PathBuf {
        self.root.join("cohort.db")
    }

    /// Prepared corpora.
    pub fn corpora(&self) -> PathBuf {
        self.root.join("corpora")
    }

    /// Raw files that clients sent or URLs named.
    pub fn files(&self) -> PathBuf {
        self.root.join("files")
    }

    /// Downloads under way, and notes of what was fetched.
    pub fn fetched(&self) -> PathBuf {
        self.root.join("fetched")
    }

    /// A raw file by its BLAKE3.
    pub fn file(&self, blake3: &[u8; 32]) -> PathBuf {
        self.files().join(hex::encode(blake3))
    }

    /// The authority and the tokens of a cluster.
    pub fn security(&self) -> PathBuf {
        self.root.join(SECURITY)
    }

    /// All runs.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// One run.
    pub fn run(&self, run: &RunName) -> PathBuf {
        self.runs().join(run.as_str())
    }

    /// The checkpoints of a run.
    pub fn checkpoints(&self, run: &RunName) -> PathBuf {
        self.run(run).join("checkpoints")
    }

    /// The checkpoint of a run at a step.
    pub fn checkpoint(&self, run: &RunName, step: u64) -> PathBuf {
        self.checkpoints(run).join(directory_name(step))
    }

    /// A worker's cache.
    pub fn worker(&self) -> PathBuf {
        self.root.join("worker")
    }

    /// Logs of processes started here.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }
}

fn unwritable(path: &Path) -> impl FnOnce(io::Error) -> HomeError {
    let path = path.to_owned();
    move |source| HomeError::Unwritable { path, source }
}

/// A valid name of a run: safe as a directory name and on a command line.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunName(String);

/// Why a name of a run is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` cannot be the name of a run; use 1 to {MAX_RUN_NAME} of the characters `a-z A-Z 0-9 . _ -`, with a letter or digit first and last"
)]
pub struct RunNameError(String);

impl RunName {
    /// Checks a name.
    pub fn new(name: &str) -> Result<Self, RunNameError> {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        let inner = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        match edge(name.chars().next())
            && edge(name.chars().last())
            && name.chars().all(inner)
            && name.len() <= MAX_RUN_NAME
        {
            true => Ok(Self(name.to_owned())),
            false => Err(RunNameError(name.to_owned())),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RunName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RunName {
    type Err = RunNameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

impl TryFrom<String> for RunName {
    type Error = RunNameError;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::new(&name)
    }
}

impl From<RunName> for String {
    fn from(name: RunName) -> Self {
        name.0
    }
}

/// Which checkpoint of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The newest.
    Last,
    /// The one with the lowest validation loss.
    Best,
    /// The one after that many steps.
    Step(u64),
}

/// A checkpoint as a user refers to it: `RUN` (the newest), `RUN@last`, `RUN@best`, `RUN@STEP`, a model of the Hugging
/// Face hub, which begins with `hf://`, or a directory, which has another `/` in it or begins with `.` or `~`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckpointRef {
    /// A checkpoint of a run.
    Run {
        /// The run.
        run: RunName,
        /// Which of its checkpoints.
        which: Which,
    },
    /// A directory in Hugging Face layout, which may be a checkpoint.
    Directory(PathBuf),
    /// A model of the Hugging Face hub.
    Hub(HubModel),
}

/// `hf://OWNER/NAME`, or `hf://OWNER/NAME@REVISION` with a branch, a tag or a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    /// Whose model it is.
    pub owner: String,
    /// What the owner calls it.
    pub name: String,
    /// Which state of it; the newest if nobody says.
    pub revision: Option<String>,
}

/// How references to the hub begin.
const HUB: &str = "hf://";

impl HubModel {
    /// From what follows `hf://`. Names are such that neither a path nor an address can be made to lead elsewhere.
    fn parse(text: &str) -> Option<Self> {
        let word = |text: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
            !text.is_empty()
                && !text.starts_with('.')
                && text.len() <= 96
                && text.bytes().all(plain)
        };
        let (model, revision) = match text.split_once('@') {
            Some((model, revision)) => (model, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = model.split_once('/')?;
        let revision_holds = revision.is_none_or(|revision| revision.split('/').all(word));
        (word(owner) && word(name) && revision_holds).then(|| Self {
            owner: owner.into(),
            name: name.into(),
            revision: revision.map(str::to_owned),
        })
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{HUB}{}/{}", self.owner, self.name)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

/// Why a reference to a checkpoint cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointRefError {
    /// What comes before `@` is no name of a run.
    #[error("`{reference}` names no checkpoint; for a directory write `./{reference}`")]
    Run {
        /// What was typed.
        reference: String,
        /// Why.
        source: RunNameError,
    },
    /// What comes after `hf://` is no model.
    #[error(
        "`{0}` names no model of the hub; write `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`"
    )]
    Hub(String),
    /// What comes after `@` is nothing known.
    #[error("`{0}` names no checkpoint: after `@` comes a step, `best` or `last`")]
    Which(String),
}

impl FromStr for CheckpointRef {
    type Err = CheckpointRefError;

    fn from_str(reference: &str) -> Result<Self, Self::Err> {
        if let Some(model) = reference.strip_prefix(HUB) {
            let model = HubModel::parse(model);
            return model
                .map(Self::Hub)
                .ok_or_else(|| CheckpointRefError::Hub(reference.to_owned()));
        }
        if reference.starts_with(['.', '~']) || reference.contains(['/', '\\']) {
            return Ok(Self::Directory(reference.into()));
        }
        let (run, which) = match reference.split_once('@') {
            None => (reference, Which::Last),
            Some((run, "last")) => (run, Which::Last),
            Some((run, "best")) => (run, Which::Best),
            Some((run, step)) if step.bytes().all(|b| b.is_ascii_digit()) => match step.parse() {
                Ok(step) => (run, Which::Step(step)),
                Err(_) => return Err(CheckpointRefError::Which(reference.to_owned())),
            },
            Some(_) => return Err(CheckpointRefError::Which(reference.to_owned())),
        };
        match RunName::new(run) {
            Ok(run) => Ok(Self::Run { run, which }),
            Err(source) => Err(CheckpointRefError::Run {
                reference: reference.to_owned(),
                source,
            }),
        }
    }
}

impl fmt::Display for CheckpointRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::Hub(model) => write!(f, "{model}"),
            Self::Run { run, which } => match which {
                Which::Last => write!(f, "{run}@last"),
                Which::Best => write!(f, "{run}@best"),
                Which::Step(step) => write!(f, "{run}@{step}"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
        for name in ["a", "tiny-1", "Run_2.b", &"x".repeat(64)] {
            assert!(RunName::new(name).is_ok(), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a\\b",
            "-a",
            "a.",
            "a b",
            "é",
            "a@1",
            "a\0",
            &"x".repeat(65),
        ] {
            let error = RunName::new(name).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with(&format!("`{name}` cannot be"))
            );
        }
    }

    #[test]
    fn references_are_read_as_documented() {
        let run = |run: &str, which| {
            Ok(CheckpointRef::Run {
                run: RunName::new(run).unwrap(),
                which,
            })
        };
        assert_eq!("tiny-1".parse(), run("tiny-1", Which::Last));
        assert_eq!("tiny-1@last".parse(), run("tiny-1", Which::Last));
        assert_eq!("tiny-1@best".parse(), run("tiny-1", Which::Best));
        assert_eq!("tiny-1@0100".parse(), run("tiny-1", Which::Step(100)));
        for path in ["./tiny", "/models/x@1", "a/b", "~/m", ".."] {
            assert_eq!(path.parse(), Ok(CheckpointRef::Directory(path.into())));
        }
        let hub = |owner: &str, name: &str, revision: Option<&str>| {
            Ok(CheckpointRef::Hub(HubModel {
                owner: owner.into(),
                name: name.into(),
                revision: revision.map(str::to_owned),
            }))
        };
        for (text, expected) in [
            ("hf://a/b", hub("a", "b", None)),
            ("hf://A-1/b.c_d@v1.0", hub("A-1", "b.c_d", Some("v1.0"))),
            ("hf://a/b@refs/pr/1", hub("a", "b", Some("refs/pr/1"))),
        ] {
            let parsed: Result<CheckpointRef, _> = text.parse();
            assert_eq!(parsed, expected);
            assert_eq!(parsed.unwrap().to_string(), text);
        }
        for text in [
            "hf://",
            "hf://gpt2",
            "hf://a/",
            "hf://a/b/c",
            "hf://a/..",
            "hf://a/b@",
            "hf://a/b@../x",
            "hf://a/b c",
            "hf://a/b?x",
        ] {
            let parsed: Result<CheckpointRef, _> = text.parse();
            assert_eq!(parsed, Err(CheckpointRefError::Hub(text.into())));
        }
        for text in ["", "@best", "a b"] {
            let parsed: Result<CheckpointRef, _> = text.parse();
            assert!(
                matches!(parsed, Err(CheckpointRefError::Run { .. })),
                "{text}"
            );
        }
        for text in [
            "a@",
            "a@first",
            "a@-1",
            "a@+1",
            "a@99999999999999999999999",
            "a@1@2",
        ] {
            let parsed: Result<CheckpointRef, _> = text.parse();
            assert_eq!(parsed, Err(CheckpointRefError::Which(text.into())));
        }
    }

    #[test]
    fn an_unwritable_home_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Home::open(&file).unwrap_err();
        assert!(
            error.to_string().contains(&file.display().to_string()),
            "{error}"
        );
        let missing = Home::open_read_only(&dir.path().join("nothing")).unwrap_err();
        assert!(matches!(missing, HomeError::Missing(_)));
    }
}
