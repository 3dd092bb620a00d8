//! The index of a corpus (`corpus.json`): what it is made of and the fingerprint that names it. It carries its own proof:
//! whoever gets an index, from disk or from the network, recomputes the fingerprint from what it says.
//!
//! Directories of corpora are in `store.rs`.

use serde::{Deserialize, Serialize};

use super::error::CorpusError;
use super::objective::Objective;
use super::reader::{samples, windows};
use super::select::SelectionSummary;
use super::shard::{ShardEntry, file_bytes, shard_file_name, token_width};
use super::split::{Split, SplitConfig, SplitPlan};

/// The version of the index and of everything that decides tokens besides the request.
pub const FORMAT_VERSION: u32 = 1;

/// What every version of the index has.
#[derive(Deserialize)]
struct Versioned {
    format: u32,
}

/// A prepared corpus, all but its tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusIndex {
    /// [`FORMAT_VERSION`].
    pub format: u32,
    /// BLAKE3 over everything that decides the tokens, in hex: the name of the corpus.
    pub fingerprint: String,
    /// What people call it. Not part of the fingerprint.
    pub name: String,
    /// The tokenizer, whose `tokenizer.json` lies beside the index.
    pub tokenizer: TokenizerSummary,
    /// The training side.
    pub train: SplitIndex,
    /// The validation side.
    pub validation: SplitIndex,
    /// How it was asked for.
    pub options: OptionsSummary,
    /// What it was made of.
    pub sources: SourceSummary,
    /// What was left out.
    pub skipped: SkippedSummary,
    /// What a selection left out, and why; absent where none was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selection: Option<SelectionSummary>,
    /// What is learned from it, and how it is cut; absent for plain text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervised: Option<Supervised>,
}

/// A corpus of samples of which only some tokens are learned, packed into rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supervised {
    /// What is learned.
    pub objective: Objective,
    /// Tokens of a row: what counts as one sample in training.
    pub row: usize,
    /// The labels of a classification, in the order of their numbers; empty otherwise.
    pub labels: Vec<String>,
    /// The chat template that conversations were rendered with, if there were any.
    pub template: Option<String>,
    /// On the training side.
    pub train: SampleCounts,
    /// On the validation side.
    pub validation: SampleCounts,
}

/// How many samples a side has, and what became of those that are longer than a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleCounts {
    /// Samples.
    pub samples: u64,
    /// Tokens of samples, without what fills rows up.
    pub tokens: u64,
    /// Tokens that are learned; for a classification, samples.
    pub trained: u64,
    /// UTF-8 bytes of what is learned; 0 for a classification.
    pub trained_bytes: u64,
    /// Samples that were cut to a row's length.
    pub truncated: u64,
    /// Samples that were dropped, since they are longer than a row.
    pub dropped: u64,
}

impl Supervised {
    /// The counts of one side.
    pub fn counts(&self, split: Split) -> &SampleCounts {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }
}

/// A corpus's tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerSummary {
    /// BLAKE3 of `tokenizer.json`, in hex.
    pub fingerprint: String,
    /// One more than the largest token id.
    pub vocab_size: u32,
    /// The token that ends each document.
    pub eos: u32,
}

/// One side of the split.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitIndex {
    /// Tokens, one end-of-text per document included.
    pub tokens: u64,
    /// Documents.
    pub documents: u64,
    /// UTF-8 bytes of the text, for bits per byte.
    pub bytes: u64,
    /// Tokens that stand for what the vocabulary cannot express; 0 for tokenizers that can express everything.
    pub unknown_tokens: u64,
    /// The shards, in order.
    pub shards: Vec<ShardEntry>,
}

/// The options of the request that people may want to see again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptionsSummary {
    /// `bpe`, `char` or `file`.
    pub tokenizer: String,
    /// The field of `.jsonl` lines.
    pub text_field: String,
    /// The split as asked for.
    pub split: SplitConfig,
    /// The split as decided.
    pub plan: SplitPlan,
    /// Tokens per shard.
    pub shard_tokens: u64,
}

/// What a corpus was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSummary {
    /// Files that were read.
    pub files: u64,
    /// Their size in bytes, as they were.
    pub bytes: u64,
    /// The names of the first few.
    pub names: Vec<String>,
}

/// What a corpus leaves out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedSummary {
    /// Files and lines left out.
    pub count: u64,
    /// The first of them, each with its reason.
    pub first: Vec<String>,
}

impl SkippedSummary {
    /// How many are listed with their reasons.
    pub const LISTED: usize = 100;

    pub(super) fn add(&mut self, bad: &super::error::BadInput) {
        self.count += 1;
        if self.first.len() < Self::LISTED {
            self.first.push(bad.to_string());
        }
    }

    /// Adds what follows.
    pub(super) fn append(&mut self, more: Self) {
        self.count += more.count;
        let room = Self::LISTED.saturating_sub(self.first.len());
        self.first.extend(more.first.into_iter().take(room));
    }
}

impl CorpusIndex {
    /// One side of the split.
    pub fn split(&self, split: Split) -> &SplitIndex {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    /// Samples of the training side at `context` tokens each: what training walks over.
    ///
    /// # Errors
    /// [`CorpusError::TooShort`] if there is not one, [`CorpusError::OtherRow`] if rows have another length.
    pub fn samples(&self, context: usize) -> Result<u64, CorpusError> {
        let tokens = self.train.tokens;
        match self.row(context)? {
            Some(row) => Ok(tokens / row as u64),
            None => samples(Split::Train, tokens, context),
        }
    }

    /// Pieces of one side of at most `context` tokens: what a validation scores.
    ///
    /// # Errors
    /// [`CorpusError::OtherRow`] if rows have another length.
    pub fn windows(&self, split: Split, context: usize) -> Result<u64, CorpusError> {
        let tokens = self.split(split).tokens;
        Ok(match self.row(context)? {
            Some(row) => tokens / row as u64,
            None => windows(tokens, context),
        })
    }

    /// The length of a row, which must be `context`; `None` for plain text, which has no rows.
    fn row(&self, context: usize) -> Result<Option<usize>, CorpusError> {
        match &self.supervised {
            Some(supervised) if supervised.row != context => Err(CorpusError::OtherRow {
                corpus: self.name.clone(),
                row: supervised.row,
                context,
            }),
            supervised => Ok(supervised.as_ref().map(|s| s.row)),
        }
    }

    /// What the loss of one side is averaged over: its learned tokens, or its classified samples.
    pub fn scored(&self, split: Split) -> u64 {
        let side = self.split(split);
        match &self.supervised {
            Some(supervised) => supervised.counts(split).trained,
            None => side.tokens,
        }
    }

    /// UTF-8 bytes of what is scored, for bits per byte; `None` where that says nothing.
    pub fn scored_bytes(&self, split: Split) -> Option<u64> {
        let bytes = match &self.supervised {
            Some(supervised) => supervised.counts(split).trained_bytes,
            None => self.split(split).bytes,
        };
        Some(bytes).filter(|bytes| *bytes > 0)
    }

    /// Size of the shards in bytes.
    pub fn shard_bytes(&self) -> u64 {
        Split::ALL
            .iter()
            .flat_map(|&split| &self.split(split).shards)
            .map(|shard| shard.bytes)
            .sum()
    }

    /// Reads an index and checks that it holds together. Nothing in it is trusted before.
    pub fn from_json(json: &[u8]) -> Result<Self, CorpusError> {
        let bad = |error: serde_json::Error| CorpusError::BadIndex(error.to_string());
        // What else is there may be of another form.
        let Versioned { format } = serde_json::from_slice(json).map_err(bad)?;
        if format > FORMAT_VERSION {
            return Err(CorpusError::BadIndex(format!(
                "its format `{format}` is newer than this build of cohort, which reads up to `{FORMAT_VERSION}`; update cohort"
            )));
        }
        let index: Self = serde_json::from_slice(json).map_err(bad)?;
        index.validate()?;
        Ok(index)
    }

    /// The index as it is stored and sent.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("an index serializes")
    }

    fn validate(&self) -> Result<(), CorpusError> {
        let bad = |reason: String| Err(CorpusError::BadIndex(reason));
        if self.format != FORMAT_VERSION {
            return bad(format!(
                "its format is `{}`, but this build reads `{FORMAT_VERSION}`; prepare it again",
                self.format
            ));
        }
        if self.tokenizer.eos >= self.tokenizer.vocab_size {
            return bad(format!(
                "eos `{}` is not below {}",
                self.tokenizer.eos, self.tokenizer.vocab_size
            ));
        }
        if let Some(supervised) = &self.supervised {
            let row = supervised.row as u64;
            let whole = |split| row > 0 && self.split(split).tokens.is_multiple_of(row);
            let classifies = supervised.objective == Objective::Classify;
            let fits = classifies != supervised.labels.is_empty()
                && supervised.labels.len() <= self.tokenizer.vocab_size as usize;
            if !Split::ALL.into_iter().all(whole) || !fits {
                return bad(format!(
                    "its rows of `{row}` tokens or its labels do not fit"
                ));
            }
        }
        for split in Split::ALL {
            self.validate_split(split)?;
        }
        let fingerprint = self.compute_fingerprint();
        if fingerprint != self.fingerprint {
            return bad(format!(
                "it calls itself `{}`, but its content is `{fingerprint}`",
                self.fingerprint
            ));
        }
        Ok(())
    }

    fn validate_split(&self, split: Split) -> Result<(), CorpusError> {
        let side = self.split(split);
        let width = token_width(self.tokenizer.vocab_size);
        let (mut tokens, mut documents) = (0u64, 0u64);
        for (index, shard) in side.shards.iter().enumerate() {
            let fits = shard.file == shard_file_name(split, index)
                && shard.tokens > 0
                && shard.first_token == tokens
                && shard.documents <= shard.tokens
                && file_bytes(
                    shard.tokens,
                    shard.documents,
                    width,
                    self.supervised.is_some(),
                ) == Some(shard.bytes);
            if !fits {
                return Err(CorpusError::BadIndex(format!(
                    "{split} shard `{index}` does not follow from its neighbours"
                )));
            }
            tokens = tokens.saturating_add(shard.tokens);
            documents = documents.saturating_add(shard.documents);
        }
        if (tokens, documents) != (side.tokens, side.documents) || tokens == 0 {
            return Err(CorpusError::BadIndex(format!(
                "the {split} split says {} tokens and {} documents, but its shards have {tokens} and {documents}",
                side.tokens, side.documents
            )));
        }
        Ok(())
    }

    /// BLAKE3, in hex, over everything that decides the tokens and how they are scored.
    pub fn compute_fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("cohort corpus fingerprint");
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        text(&self.format.to_string());
        text(&self.tokenizer.fingerprint);
        text(&format!(
            "{} {}",
            self.tokenizer.vocab_size, self.tokenizer.eos
        ));
        if let Some(supervised) = &self.supervised {
            text(&format!("{:?} {}", supervised.objective, supervised.row));
            supervised.labels.iter().for_each(|label| text(label));
        }
        for split in Split::ALL {
            let side = self.split(split);
            text(&format!(
                "{} {} {} {}",
                side.tokens,
                side.documents,
                side.bytes,
                side.shards.len()
            ));
            side.shards.iter().for_each(|shard| text(&shard.hash));
        }
        hasher.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::{BadInput, Problem};
    use super::*;

    #[test]
    fn of_what_is_skipped_the_first_are_listed() {
        let some = |file: &str, count| {
            let mut skipped = SkippedSummary::default();
            let bad = BadInput {
                file: file.into(),
                place: None,
                problem: Problem::Empty,
            };
            (0..count).for_each(|_| skipped.add(&bad));
            skipped
        };
        let mut all = some("a", 60);
        all.append(some("b", 1000));
        all.append(some("c", 1));
        assert_eq!((all.count, all.first.len()), (1061, SkippedSummary::LISTED));
        assert_eq!(all.first[60], "`b` is empty");
    }

    #[test]
    fn an_index_of_a_newer_build_is_refused_whatever_else_is_in_it() {
        let refused = CorpusIndex::from_json(br#"{"format":2,"shards":"of another form"}"#);
        let error = refused.unwrap_err().to_string();
        assert!(
            error.contains("its format `2` is newer than this build of cohort, which reads up to `1`; update cohort"),
            "{error}"
        );
    }
}
