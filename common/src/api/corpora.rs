//! Corpora, as clients ask for them and see them.

use serde::{Deserialize, Serialize};

use crate::corpus::{
    Baselines, CorpusStats, HeadDocument, Selection, SelectionSummary, Split, Supervised,
    SupervisedConfig,
};

/// Asks for a corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrepareCorpus {
    /// For people.
    pub name: String,
    /// Where the text is.
    pub sources: Vec<SourceRef>,
    /// Key of the text in JSON lines.
    pub text_field: String,
    /// Part of the text that is kept for validation.
    pub validation: f64,
    /// `auto`, `document` or `tail`.
    pub split: String,
    /// Leave out what cannot be read instead of stopping.
    pub skip_bad: bool,
    /// How text becomes tokens.
    pub tokenizer: TokenizerRef,
    /// Take JSON lines as supervised samples; absent for plain text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervised: Option<SupervisedConfig>,
    /// Which documents stay.
    #[serde(default, skip_serializing_if = "Selection::is_empty")]
    pub selection: Selection,
}

/// Text for a corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceRef {
    /// Files, directories and globs on the coordinator's machine.
    Paths(Vec<String>),
    /// What a URL names, fetched by the coordinator. Credentials are in its environment.
    Url(String),
    /// A file in the coordinator's content store.
    Uploaded {
        /// The file's name where it came from.
        name: String,
        /// BLAKE3 of its content, in hex.
        hash: String,
        /// Files of one group stay on one side of the split.
        group: Option<String>,
    },
    /// A file on the coordinator's machine, with a group.
    Grouped {
        /// The file's name in messages.
        name: String,
        /// Where it lies.
        path: String,
        /// Files of one group stay on one side of the split.
        group: String,
    },
}

/// A tokenizer to train or to take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerRef {
    /// Byte-level BPE, trained on the training split.
    Bpe {
        /// Size of the vocabulary.
        vocab_size: u32,
    },
    /// One token for each character.
    Char,
    /// A given `tokenizer.json`.
    Json(String),
    /// A given `tokenizer.json` whose token at the end of texts is known.
    Known {
        /// The file's content.
        json: String,
        /// The spelling of that token.
        eos: String,
    },
    /// That of a corpus at the coordinator, by its fingerprint.
    Corpus(String),
}

/// Progress of a preparation, or its result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrepareEvent {
    /// It goes on.
    Progress {
        /// What is being done.
        stage: String,
        /// Bytes of text done in this stage.
        done: u64,
        /// Bytes of text in this stage; 0 if not known.
        total: u64,
    },
    /// It is done.
    Done(Box<CorpusInfo>),
}

/// A corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusInfo {
    /// Hash over all that decides its tokens.
    pub fingerprint: String,
    /// For people.
    pub name: String,
    /// Rows that a model's embedding needs.
    pub vocab_size: usize,
    /// Hash of the tokenizer.
    pub tokenizer: String,
    /// The training part.
    pub train: SplitInfo,
    /// The validation part.
    pub validation: SplitInfo,
    /// Bytes of its shards.
    pub bytes_on_disk: u64,
    /// What was left out, and why.
    pub skipped: Vec<String>,
    /// Whether it had been prepared before.
    pub reused: bool,
    /// The beginning of its training text, decoded; only when one corpus is shown.
    pub sample: Option<String>,
    /// What is learned from it, and its counts; absent for plain text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervised: Option<Supervised>,
    /// What filters and the search for duplicates left out; absent where none was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selection: Option<SelectionSummary>,
    /// Losses of models that are counted, to compare a loss with; absent where none are kept beside the corpus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baselines: Option<Baselines>,
}

/// One part of a corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitInfo {
    /// Documents.
    pub documents: u64,
    /// Tokens.
    pub tokens: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Shards.
    pub shards: usize,
}

/// Asks for the first documents of a corpus; the answer is a [`CorpusHead`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadRequest {
    /// Its fingerprint, the beginning of it, or its name.
    pub corpus: String,
    /// The side.
    pub split: Split,
    /// How many documents; at most 1,000 come.
    pub documents: u64,
    /// Characters of each; of all together at most 512 KiB come.
    pub chars: u64,
}

/// The first documents of a corpus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorpusHead {
    /// For people.
    pub name: String,
    /// Hash over all that decides its tokens.
    pub fingerprint: String,
    /// The side.
    pub split: Split,
    /// Documents that this side has.
    pub of: u64,
    /// The first of them.
    pub documents: Vec<HeadDocument>,
}

/// What is in a corpus, and what it took to count it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CountedCorpus {
    /// What is in it.
    #[serde(flatten)]
    pub stats: CorpusStats,
    /// Bytes of shards that were read.
    pub read_bytes: u64,
    /// Seconds that took.
    pub seconds: f64,
}
