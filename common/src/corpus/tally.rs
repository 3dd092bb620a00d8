//! From which file how much of a corpus came: counted while it is encoded, kept beside the shards.
//!
//! The table is for people. It is no part of the corpus's fingerprint: the same text in other files is the same corpus.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::CorpusError;
use super::shard::write_durably;
use super::source::SourceFile;
use super::split::Split;
use super::store::Corpus;

/// The table's file name.
pub const SOURCES_FILE: &str = "sources.json";
/// The version of the file.
const VERSION: u32 = 1;
/// Files that are listed one by one; what is further on is put together.
const LISTED: usize = 100_000;

/// How much text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextCounts {
    /// Documents, or samples.
    pub documents: u64,
    /// UTF-8 bytes of the text; of samples, of what is learned.
    pub bytes: u64,
    /// Tokens; of samples, without what fills rows up.
    pub tokens: u64,
}

impl TextCounts {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            documents: self.documents + other.documents,
            bytes: self.bytes + other.bytes,
            tokens: self.tokens + other.tokens,
        }
    }
}

/// What came of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCounts {
    /// Its name.
    pub name: String,
    /// Its group, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// On the training side.
    pub train: TextCounts,
    /// On the validation side.
    pub validation: TextCounts,
}

impl SourceCounts {
    /// On one side.
    pub fn side(&self, split: Split) -> TextCounts {
        match split {
            Split::Train => self.train,
            Split::Validation => self.validation,
        }
    }
}

/// The files of a corpus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceTable {
    version: u32,
    /// Whether the documents of a side follow each other in the order of the files. Samples in rows do not.
    pub in_order: bool,
    /// The files, in order.
    pub sources: Vec<SourceCounts>,
    /// How many more files there were.
    pub others: u64,
}

impl SourceTable {
    /// The table that is kept beside a corpus; `None` if there is none, or none that this build understands.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn of(corpus: &Corpus) -> Result<Option<Self>, CorpusError> {
        let path = corpus.directory().join(SOURCES_FILE);
        let json = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            json => json.map_err(CorpusError::read(&path))?,
        };
        let kept = serde_json::from_slice::<Self>(&json).ok();
        Ok(kept.filter(|table| table.version == VERSION))
    }

    /// The file of each document of a side, in order, as far as that is known.
    pub fn files_of_documents(&self, split: Split) -> impl Iterator<Item = &str> {
        let known = self.sources.iter().filter(|_| self.in_order);
        known.flat_map(move |source| {
            let documents = source.side(split).documents as usize;
            std::iter::repeat_n(source.name.as_str(), documents)
        })
    }
}

/// Counts under way, by the number of the file and the side.
#[derive(Default)]
pub(super) struct Tally(Vec<[TextCounts; 2]>);

impl Tally {
    /// The counts of a file on a side.
    pub fn of(&mut self, file: usize, side: usize) -> &mut TextCounts {
        if self.0.len() <= file {
            self.0.resize(file + 1, Default::default());
        }
        &mut self.0[file][side]
    }

    /// Writes the table of `files` into the directory of a corpus that is being made.
    pub fn write(
        mut self,
        directory: &Path,
        files: &[SourceFile],
        in_order: bool,
    ) -> Result<(), CorpusError> {
        self.0.resize(files.len(), Default::default());
        let counted = files.iter().zip(self.0);
        let sources = counted.take(LISTED).map(|(file, [train, validation])| {
            let (name, group) = (file.name.clone(), file.group.clone());
            SourceCounts {
                name,
                group,
                train,
                validation,
            }
        });
        let table = SourceTable {
            version: VERSION,
            in_order,
            sources: sources.collect(),
            others: files.len().saturating_sub(LISTED) as u64,
        };
        let json = serde_json::to_vec_pretty(&table).expect("counts serialize");
        write_durably(&directory.join(SOURCES_FILE), &json)
    }
}
