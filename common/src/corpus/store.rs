//! The directory of corpora: `<directory>/<fingerprint>/` holds one each (`corpus.json`, `tokenizer.json`, shards), and
//! `<directory>/requests/<key>` remembers which request gave which: the fingerprint, and on a second line what the request's
//! selection came to.
//!
//! A corpus gets its name by a rename, when everything in it is durable, so a directory with a fingerprint for a name is
//! complete; anything else never counts as a corpus. There is no lock here: the owner of the home directory holds one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::CorpusError;
use super::index::CorpusIndex;
use super::names;
use super::reader::{LocalShards, SampleReader};
use super::select::SelectionSummary;
use super::shard::{MappedShard, verify_file, write_durably};
use super::split::Split;
use super::tokenizer::Tokenizer;

/// The index's file name.
pub const INDEX_FILE: &str = "corpus.json";
/// The tokenizer's file name.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
const REQUESTS: &str = "requests";
const UNFINISHED: &str = ".unfinished-";

/// A complete corpus on this machine's disk.
#[derive(Clone, Debug)]
pub struct Corpus {
    directory: PathBuf,
    index: CorpusIndex,
    /// What it is called besides the index's name.
    names: Vec<String>,
}

impl Corpus {
    /// Opens the corpus in `directory`: the index must hold together, the tokenizer must be the index's, and every shard
    /// must be there with the right size and header. Contents are hashed by [`verify`](Self::verify).
    pub fn open(directory: &Path) -> Result<Self, CorpusError> {
        let path = directory.join(INDEX_FILE);
        let json = std::fs::read(&path).map_err(CorpusError::read(&path))?;
        let index = CorpusIndex::from_json(&json)
            .map_err(|error| CorpusError::damaged(&path, error.to_string()))?;
        let corpus = Self {
            directory: directory.to_path_buf(),
            index,
            names: names::further(directory),
        };
        corpus.tokenizer_json()?;
        for split in Split::ALL {
            for entry in &corpus.index.split(split).shards {
                MappedShard::open(&corpus.shard_path(&entry.file), entry)?;
            }
        }
        Ok(corpus)
    }

    /// Hashes every shard; the first that is damaged is named.
    pub fn verify(&self) -> Result<(), CorpusError> {
        self.tokenizer_json()?;
        for split in Split::ALL {
            for entry in &self.index.split(split).shards {
                verify_file(&self.shard_path(&entry.file), entry)?;
            }
        }
        Ok(())
    }

    /// The index.
    pub fn index(&self) -> &CorpusIndex {
        &self.index
    }

    /// Whether that is one of its names.
    pub fn is_called(&self, name: &str) -> bool {
        self.index.name == name || self.names.iter().any(|known| known == name)
    }

    /// Lets it be found by that name, too, from now on.
    ///
    /// # Errors
    /// It cannot be written down.
    pub(super) fn call(&mut self, name: &str) -> Result<(), CorpusError> {
        self.names = names::add(self, name)?;
        Ok(())
    }

    /// Where it lies.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a shard lies.
    pub fn shard_path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    /// Puts a file beside the shards, whole or not at all. It is no part of the corpus.
    pub(super) fn put(&self, file: &str, content: &[u8]) -> Result<(), CorpusError> {
        let temporary = self.directory.join(format!(".{file}-{}", unique()));
        let path = self.directory.join(file);
        write_durably(&temporary, content)?;
        std::fs::rename(&temporary, &path).map_err(CorpusError::write(&path))
    }

    /// The content of `tokenizer.json`, checked against the index.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>, CorpusError> {
        let path = self.directory.join(TOKENIZER_FILE);
        let json = std::fs::read(&path).map_err(CorpusError::read(&path))?;
        if blake3::hash(&json).to_hex().as_str() != self.index.tokenizer.fingerprint {
            return Err(CorpusError::damaged(
                &path,
                "it is not the tokenizer that the index names",
            ));
        }
        Ok(json)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, CorpusError> {
        Ok(Tokenizer::from_json_with_eos_id(
            &self.tokenizer_json()?,
            self.index.tokenizer.eos,
        )?)
    }

    /// A reader of one side of the split.
    pub fn reader(&self, split: Split) -> SampleReader {
        let side = self.index.split(split);
        let shards = Arc::new(LocalShards::new(&self.directory, side));
        SampleReader::new(split, &self.index, shards)
    }

    /// The first `max_tokens` tokens from the beginning of document `document` on, decoded, with special tokens spelled
    /// out, for people who look at data.
    pub fn preview(
        &self,
        split: Split,
        document: u64,
        max_tokens: usize,
    ) -> Result<String, CorpusError> {
        let side = self.index.split(split);
        let mut before = 0;
        for entry in &side.shards {
            if document < before + entry.documents {
                let shard = MappedShard::open(&self.shard_path(&entry.file), entry)?;
                let begin = entry.first_token + shard.start((document - before) as usize) as u64;
                let end = begin.saturating_add(max_tokens as u64).min(side.tokens);
                let mut tokens = Vec::new();
                self.reader(split).copy(begin..end, &mut tokens)?;
                return Ok(self.tokenizer()?.decode_with_special(&tokens)?);
            }
            before += entry.documents;
        }
        Err(CorpusError::OutOfRange {
            what: "document",
            index: document,
            len: side.documents,
        })
    }
}

/// What is in a directory of corpora.
#[derive(Debug, Default)]
pub struct Listing {
    /// The corpora, by fingerprint.
    pub corpora: Vec<Corpus>,
    /// Directories that are named like corpora and cannot be opened, each with the reason.
    pub broken: Vec<(PathBuf, CorpusError)>,
}

/// Lists the corpora in `directory`; a directory that does not exist has none.
pub fn list(directory: &Path) -> Result<Listing, CorpusError> {
    let mut listing = Listing::default();
    for name in names_in(directory)?
        .into_iter()
        .filter(|name| is_fingerprint(name))
    {
        let path = directory.join(name);
        match Corpus::open(&path) {
            Ok(corpus) => listing.corpora.push(corpus),
            Err(error) => listing.broken.push((path, error)),
        }
    }
    Ok(listing)
}

/// Opens the corpus that `text` means: a fingerprint, the beginning of one (at least 4 characters), or one of its names. A
/// name that several have, or an ambiguous beginning, is an error that lists them.
pub fn find(directory: &Path, text: &str) -> Result<Corpus, CorpusError> {
    if is_fingerprint(text) && directory.join(text).is_dir() {
        return Corpus::open(&directory.join(text));
    }
    let mut found = list(directory)?.corpora;
    found.retain(|corpus| {
        corpus.is_called(text) || (text.len() >= 4 && corpus.index.fingerprint.starts_with(text))
    });
    if found.len() > 1 {
        let names: Vec<&str> = found
            .iter()
            .map(|corpus| &corpus.index.fingerprint[..16])
            .collect();
        return Err(CorpusError::Ambiguous {
            text: text.to_string(),
            candidates: names.join(", "),
        });
    }
    found
        .pop()
        .ok_or_else(|| CorpusError::Unknown(text.to_string()))
}

/// Deletes a corpus, whole or broken, and forgets the requests that gave it. Returns the bytes of the files deleted.
pub fn remove(directory: &Path, fingerprint: &str) -> Result<u64, CorpusError> {
    let path = directory.join(fingerprint);
    if !is_fingerprint(fingerprint) || !path.is_dir() {
        return Err(CorpusError::Unknown(fingerprint.to_string()));
    }
    let requests = directory.join(REQUESTS);
    for key in names_in(&requests)? {
        let link = requests.join(key);
        let target = std::fs::read_to_string(&link).unwrap_or_default();
        if target.lines().next().map(str::trim) == Some(fingerprint) {
            std::fs::remove_file(&link).map_err(CorpusError::write(&link))?;
        }
    }
    let mut bytes = 0;
    for name in names_in(&path)? {
        let file = path.join(name);
        bytes += file.metadata().map_err(CorpusError::read(&file))?.len();
    }
    let doomed = unfinished_path(directory);
    std::fs::rename(&path, &doomed).map_err(CorpusError::write(&path))?;
    std::fs::remove_dir_all(&doomed).map_err(CorpusError::write(&doomed))?;
    Ok(bytes)
}

/// Deletes what a process that died has left behind. Only for the owner of the directory, before it prepares anything.
/// Returns how many directories that were.
pub fn remove_unfinished(directory: &Path) -> Result<usize, CorpusError> {
    let mut removed = 0;
    for name in names_in(directory)?
        .into_iter()
        .filter(|name| name.starts_with(UNFINISHED))
    {
        let path = directory.join(name);
        std::fs::remove_dir_all(&path).map_err(CorpusError::write(&path))?;
        removed += 1;
    }
    if directory.is_dir() {
        super::kept::tidy(directory).map_err(CorpusError::write(directory))?;
    }
    Ok(removed)
}

/// The corpus that the request `key` has given before, if it is still whole; with what the request's own selection came to.
pub(super) fn by_request(directory: &Path, key: &str) -> Option<Corpus> {
    let link = std::fs::read_to_string(directory.join(REQUESTS).join(key)).ok()?;
    let mut lines = link.lines().map(str::trim);
    let fingerprint = lines.next().filter(|line| is_fingerprint(line))?;
    let mut corpus = Corpus::open(&directory.join(fingerprint)).ok()?;
    // Requests of before there was this line have the corpus's.
    if let Some(selection) = lines.next() {
        corpus.index.selection = serde_json::from_str(selection).ok()?;
    }
    Some(corpus)
}

/// A directory that is deleted again unless it becomes a corpus.
pub(super) struct Unfinished {
    parent: PathBuf,
    path: PathBuf,
}

impl Unfinished {
    pub fn create(parent: &Path) -> Result<Self, CorpusError> {
        let path = unfinished_path(parent);
        std::fs::create_dir_all(&path).map_err(CorpusError::write(&path))?;
        Ok(Self {
            parent: parent.to_path_buf(),
            path,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Completes the corpus: index and tokenizer beside the shards, everything durable, then the name. A whole corpus of
    /// the same fingerprint that is there already stays, and has the selection of `index` in memory; a broken one is
    /// replaced. Says, too, whether there was a whole one.
    pub fn publish(
        self,
        index: &CorpusIndex,
        tokenizer: &Tokenizer,
        key: &str,
    ) -> Result<(Corpus, bool), CorpusError> {
        write_durably(
            &self.path.join(TOKENIZER_FILE),
            tokenizer.to_json().as_bytes(),
        )?;
        write_durably(&self.path.join(INDEX_FILE), index.to_json().as_bytes())?;
        sync_directory(&self.path)?;
        let target = self.parent.join(&index.fingerprint);
        let existing = target.is_dir().then(|| Corpus::open(&target));
        let (mut corpus, was_there) = match existing {
            Some(Ok(corpus)) => (corpus, true),
            Some(Err(_)) => {
                remove(&self.parent, &index.fingerprint)?;
                (self.rename_to(&target)?, false)
            }
            None => (self.rename_to(&target)?, false),
        };
        corpus.index.selection.clone_from(&index.selection);
        let selection = index.selection.as_ref();
        remember(&self.parent, key, &index.fingerprint, selection)?;
        Ok((corpus, was_there))
    }

    fn rename_to(&self, target: &Path) -> Result<Corpus, CorpusError> {
        std::fs::rename(&self.path, target).map_err(CorpusError::write(target))?;
        sync_directory(&self.parent)?;
        Corpus::open(target)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After a rename nothing is there; after an error the error is what counts.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn remember(
    directory: &Path,
    key: &str,
    fingerprint: &str,
    selection: Option<&SelectionSummary>,
) -> Result<(), CorpusError> {
    let requests = directory.join(REQUESTS);
    std::fs::create_dir_all(&requests).map_err(CorpusError::write(&requests))?;
    let temporary = requests.join(format!(".{key}-{}", unique()));
    let selection = serde_json::to_string(&selection).expect("counts serialise");
    let content = format!("{fingerprint}\n{selection}");
    write_durably(&temporary, content.as_bytes())?;
    let link = requests.join(key);
    std::fs::rename(&temporary, &link).map_err(CorpusError::write(&link))
}

fn is_fingerprint(name: &str) -> bool {
    name.len() == 64
        && name
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Names unlike those of any other thread or living process.
fn unique() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        "{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

fn unfinished_path(directory: &Path) -> PathBuf {
    directory.join(format!("{UNFINISHED}{}", unique()))
}

/// The names in a directory, sorted; none if it does not exist.
fn names_in(directory: &Path) -> Result<Vec<String>, CorpusError> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(CorpusError::read(directory))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(CorpusError::read(directory))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// Makes the names in a directory durable, where the platform lets one open directories.
fn sync_directory(path: &Path) -> Result<(), CorpusError> {
    if cfg!(unix) {
        File::open(path)
            .and_then(|directory| directory.sync_all())
            .map_err(CorpusError::write(path))?;
    }
    Ok(())
}
