//! What can go wrong with a corpus, in one place: bad input files, tokenizers that do not fit, torn directories, disks.
//!
//! Messages name the thing, the value, the bound and the next step. The cause, where there is one, is the error's source
//! and not part of its text, so that a chain of causes prints nothing twice.

use std::io;
use std::path::{Path, PathBuf};

use super::select::BadSelection;
use super::source::TEXT_EXTENSIONS;
use super::split::SplitError;
use super::tokenizer::TokenizerError;

/// Any failure of preparing, opening or reading a corpus.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// One source file, or one line of it, is not usable text.
    #[error("{0}; repair it, or leave such input out with `--skip-bad`")]
    BadInput(BadInput),
    /// A pattern or path was given that names no file at all.
    #[error("`{0}` names no file; check the spelling")]
    NoSuchInput(String),
    /// A directory holds nothing that is taken from directories.
    #[error(
        "directory `{0}` holds no text files (taken are: {known}, each also .gz, .zst, .bz2 or .xz); name the files one by one",
        known = TEXT_EXTENSIONS.join(", ")
    )]
    NoTextInDirectory(String),
    /// A line of a manifest cannot be used.
    #[error("`{manifest}` line {line} {reason}")]
    BadManifest {
        /// The manifest.
        manifest: String,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A glob cannot be parsed.
    #[error("`{pattern}` is not a valid pattern: {reason}")]
    BadPattern {
        /// The pattern as given.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// After everything that was skipped, nothing is left.
    #[error("the corpus is empty: all of its {skipped} inputs were skipped; the first: {first}")]
    Empty {
        /// How many inputs were skipped.
        skipped: u64,
        /// The first of them and why.
        first: String,
    },
    /// A selection leaves nothing.
    #[error(
        "no document stays: of {documents}, all are left out: {reasons}; loosen what is asked of them"
    )]
    NothingStays {
        /// Documents that were looked at.
        documents: u64,
        /// Why they were left out, with counts.
        reasons: String,
    },
    /// An option of the selection is out of bounds.
    #[error(transparent)]
    Selection(#[from] BadSelection),
    /// A file changed while it was being read.
    #[error("`{0}` changed while it was being read; prepare the corpus again")]
    SourceChanged(String),
    /// An option of the request is out of bounds.
    #[error("`{option}` is `{value}`, but must be {bound}")]
    BadOption {
        /// The option's name in a spec.
        option: &'static str,
        /// The value it has.
        value: String,
        /// The bound it breaks.
        bound: &'static str,
    },
    /// No split into train and validation exists.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A document cannot be written in the tokenizer's vocabulary.
    #[error("cannot tokenize `{document}`")]
    Tokenize {
        /// The document's name.
        document: String,
        /// What the tokenizer says.
        source: TokenizerError,
    },
    /// A file of the corpus is damaged.
    #[error("`{path}` is damaged: {reason}; remove the corpus and prepare it again", path = path.display())]
    Damaged {
        /// The damaged file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// An index, from disk or from the network, does not hold together.
    #[error("the corpus index is not valid: {0}")]
    BadIndex(String),
    /// No corpus of this fingerprint is here.
    #[error("no corpus `{0}` is here; `cohort corpus ls` lists those that are")]
    Unknown(String),
    /// Several corpora answer to this name.
    #[error("`{text}` means several corpora; give one of the fingerprints {candidates}")]
    Ambiguous {
        /// What was asked for.
        text: String,
        /// The beginnings of their fingerprints.
        candidates: String,
    },
    /// Too few tokens for a single sample.
    #[error(
        "the {split} split has {tokens} tokens, but one sample of context {context} takes {needed}; \
         give more text or a shorter context"
    )]
    TooShort {
        /// Which split.
        split: &'static str,
        /// Tokens it has.
        tokens: u64,
        /// Tokens of context asked for.
        context: usize,
        /// Tokens one sample takes.
        needed: u64,
    },
    /// A chat template that cannot be used.
    #[error("{0}")]
    Template(String),
    /// A side of a supervised corpus without a sample.
    #[error(
        "the {split} split has no sample: {dropped} were dropped since they are too long, {skipped} lines were skipped; \
         give more samples or another `corpus.validation`"
    )]
    NoSamples {
        /// Which split.
        split: &'static str,
        /// Samples of it that were too long.
        dropped: u64,
        /// Lines that were left out.
        skipped: u64,
    },
    /// Rows of another length than the model's samples.
    #[error(
        "corpus `{corpus}` was packed into rows of {row} tokens, but the run's samples have {context}; prepare it again, \
         the run does so by itself where it is given the files"
    )]
    OtherRow {
        /// The corpus.
        corpus: String,
        /// Tokens of its rows.
        row: usize,
        /// Tokens of the run's samples.
        context: usize,
    },
    /// A read beyond the end of a split.
    #[error("{what} `{index}` does not exist: there are {len}")]
    OutOfRange {
        /// What was asked for: sample, window, document, shard.
        what: &'static str,
        /// Its number.
        index: u64,
        /// How many there are.
        len: u64,
    },
    /// Reading failed.
    #[error("cannot read `{path}`", path = path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Writing failed: a full disk, a missing permission.
    #[error("cannot write `{path}`", path = path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
}

impl CorpusError {
    pub(super) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Read { path, source }
    }

    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Write { path, source }
    }

    pub(super) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_path_buf(),
            reason: reason.into(),
        }
    }
}

/// Where in a file a document lies; counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file of one document per line, its lines.
    Line(u64),
    /// In a table, the rows below its head.
    Row(u64),
    /// In an archive of the web, the records that are text.
    Record(u64),
}

impl Place {
    /// The number alone.
    pub fn number(self) -> u64 {
        match self {
            Self::Line(number) | Self::Row(number) | Self::Record(number) => number,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Line(number) => write!(f, "line {number}"),
            Self::Row(number) => write!(f, "row {number}"),
            Self::Record(number) => write!(f, "record {number}"),
        }
    }
}

/// An input that cannot be used: the file, the place where it has several documents, and what is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{file}`{at} {problem}", at = place.map(|p| format!(" {p}")).unwrap_or_default())]
pub struct BadInput {
    /// The file's display name.
    pub file: String,
    /// Where in the file; `None` is the file as a whole.
    pub place: Option<Place>,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with an input; completes a sentence that starts with the file's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// There is no such file.
    #[error("does not exist")]
    Missing,
    /// A pipe, a device.
    #[error("is no ordinary file, and a corpus is read several times; write it into a file")]
    NotAFile,
    /// No text in it.
    #[error("is empty")]
    Empty,
    /// Not text.
    #[error("is binary: it has a NUL byte at byte {0}")]
    Binary(u64),
    /// Text of another encoding.
    #[error("is not UTF-8: byte {0} begins no valid character")]
    NotUtf8(u64),
    /// A line that is not a JSON object.
    #[error("is not a JSON object: {0}")]
    BadJson(String),
    /// A JSON object without the text.
    #[error("has no text field `{field}`; its fields are {present}")]
    NoField {
        /// The field looked for.
        field: String,
        /// Those that are there.
        present: String,
    },
    /// The field is there, but is not a string.
    #[error("has a field `{0}` that is not a string")]
    NotAString(String),
    /// A table without the column of the text.
    #[error("has no column `{column}`; its columns are {present}")]
    NoColumn {
        /// The column looked for.
        column: String,
        /// Those that are there.
        present: String,
    },
    /// The column is there, but does not hold text.
    #[error("has a column `{0}` that does not hold text")]
    NotAText(String),
    /// A row with another number of cells than the head.
    #[error("has {found} cells, and the head of the table names {expected} columns")]
    Cells {
        /// Cells of the row.
        found: usize,
        /// Columns of the head.
        expected: usize,
    },
    /// A cell of text of another encoding.
    #[error("is not UTF-8 in column `{0}`")]
    CellNotUtf8(String),
    /// More text than the limit allows.
    #[error("holds more than {0} bytes of text, the limit")]
    TooLarge(u64),
    /// Unpacks to more than any text does.
    #[error(
        "unpacks to more than {0} times its size, which is no text; if it is meant, unpack it and name what comes out"
    )]
    Bomb(u64),
    /// Several files in one, where one file is needed.
    #[error("is an archive of files; unpack it, and name the directory")]
    Archive,
    /// No rows, where those are needed.
    #[error(
        "holds no records (as .jsonl, .json, .csv, .tsv, .parquet and .arrow do), which supervised samples are read from"
    )]
    NoRecords,
    /// A line that is no sample of the objective.
    #[error("{0}")]
    Record(String),
    /// A sample that is longer than a row.
    #[error(
        "is a sample of {tokens} tokens, and at most {row} fit; shorten it, give the model a longer context, or set \
         `corpus.too_long` to \"drop\" or \"truncate\""
    )]
    TooLong {
        /// Its tokens.
        tokens: usize,
        /// Tokens of a row.
        row: usize,
    },
    /// A sample without anything to learn.
    #[error("has no token to learn{0}")]
    NothingTrained(&'static str),
    /// A label that is not among those that may occur.
    #[error("has the label `{label}`, which is not among {known}")]
    UnknownLabel {
        /// The label.
        label: String,
        /// The labels that may occur.
        known: String,
    },
    /// Text that a tokenizer would take for a special token.
    #[error(
        "spells out the special token `{0}` in its text, which would end or begin a turn; take it out"
    )]
    SpecialInText(String),
    /// Text that the vocabulary cannot express.
    #[error("cannot be tokenized: {0}")]
    Untokenizable(String),
    /// The operating system or the decompressor refuses.
    #[error("cannot be read: {0}")]
    Unreadable(String),
}
