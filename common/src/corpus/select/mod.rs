//! Which documents of a corpus stay: filters of length, language and quality, and the removal of duplicates. Off unless
//! asked for.
//!
//! In reading order: `rules` * (what a filter says of a text), `language` * (which language it is in), `minhash` * (how
//! alike two texts are, estimated from signatures), `clusters` (which documents are near duplicates of each other),
//! `selector` (takes the documents in order and decides).
//!
//! A decision depends on the documents, their order and the options, and on nothing else: not on threads, names or
//! places. What was left out is counted by its reason and kept in the corpus's index.

mod clusters;
mod language;
mod minhash;
mod rules;
mod selector;

use serde::{Deserialize, Serialize};

pub(super) use selector::{Selected, Selector};

/// The version of what decides which documents stay, besides the options. It is a part of a request's key.
pub(super) const SELECTION_VERSION: u32 = 1;

/// Bytes at the beginning of a document that the filters of language and quality, and the search for near duplicates,
/// look at. Lengths and exact duplicates go by the whole document.
pub const LOOKED_AT_BYTES: usize = 16 << 20;

/// Which documents stay. Nothing is asked for by default, and then every document does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selection {
    /// Fewest characters of a document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_chars: Option<u64>,
    /// Most characters of a document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_chars: Option<u64>,
    /// Languages that may occur, as codes of two or three letters (ISO 639-1 or 639-3); empty is any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub languages: Vec<String>,
    /// How sure of its language one must be, from 0 to 1; absent is [`DEFAULT_CONFIDENCE`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language_confidence: Option<f64>,
    /// Largest share of lines that repeat an earlier one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_repeated_lines: Option<f64>,
    /// Most hash signs, and most ellipses, per word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_symbols: Option<f64>,
    /// Least and largest mean length of a word, in characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub word_length: Option<[f64; 2]>,
    /// Least share of words with a letter in them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_alphabetic: Option<f64>,
    /// Which duplicates are left out; the first of them in order stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dedup: Option<Dedup>,
    /// The Jaccard similarity from which on two documents are near duplicates; absent is [`DEFAULT_THRESHOLD`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dedup_threshold: Option<f64>,
}

/// Which documents are duplicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dedup {
    /// Those of the same text, but for white space.
    Exact,
    /// Those, and those of nearly the same words.
    Near,
}

/// See [`Selection::language_confidence`].
pub const DEFAULT_CONFIDENCE: f64 = 0.5;
/// See [`Selection::dedup_threshold`].
pub const DEFAULT_THRESHOLD: f64 = 0.8;
/// Thresholds below this would need so many bands that most pairs of documents are compared.
const MIN_THRESHOLD: f64 = 0.5;

/// An option that no selection can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`corpus.{key}` is {value}, but {bound}; {next}")]
pub struct BadSelection {
    /// The option's name, without its table.
    pub key: &'static str,
    /// The value it has.
    pub value: String,
    /// The bound it breaks.
    pub bound: String,
    /// What to do.
    pub next: &'static str,
}

impl Selection {
    /// Whether every document stays.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// How sure of its language one must be.
    pub fn confidence(&self) -> f64 {
        self.language_confidence.unwrap_or(DEFAULT_CONFIDENCE)
    }

    /// The similarity of near duplicates, where those are left out.
    pub fn threshold(&self) -> Option<f64> {
        let near = self.dedup == Some(Dedup::Near);
        near.then(|| self.dedup_threshold.unwrap_or(DEFAULT_THRESHOLD))
    }

    /// Checks every option.
    ///
    /// # Errors
    /// The first that is out of its bounds, or says something of another one that is not there.
    pub fn check(&self) -> Result<(), BadSelection> {
        let bad = |key, value: String, bound: String, next| {
            Err(BadSelection {
                key,
                value,
                bound,
                next,
            })
        };
        if let (Some(min), Some(max)) = (self.min_chars, self.max_chars)
            && min > max
        {
            let bound = format!("`corpus.max_chars` is {max}, so no document would stay");
            return bad("min_chars", min.to_string(), bound, "lower it");
        }
        for (key, given, next) in [
            (
                "language_confidence",
                self.language_confidence,
                "0.5 is the default",
            ),
            (
                "max_repeated_lines",
                self.max_repeated_lines,
                "0.3 is usual",
            ),
            ("max_symbols", self.max_symbols, "0.1 is usual"),
            ("min_alphabetic", self.min_alphabetic, "0.8 is usual"),
        ] {
            if let Some(value) = given.filter(|value| !(0.0..=1.0).contains(value)) {
                return bad(
                    key,
                    value.to_string(),
                    "it must lie between 0 and 1".into(),
                    next,
                );
            }
        }
        if let Some([least, most]) = self.word_length
            && !(0.0 <= least && least <= most && most.is_finite())
        {
            let bound = "it must be two numbers of characters, the smaller first".into();
            return bad(
                "word_length",
                format!("[{least}, {most}]"),
                bound,
                "[3, 10] is usual",
            );
        }
        self.check_languages()?;
        if let Some(threshold) = self.dedup_threshold {
            let value = threshold.to_string();
            if self.dedup != Some(Dedup::Near) {
                let bound = "it says something of near duplicates only".into();
                let next = "remove it, or set `corpus.dedup` to \"near\"";
                return bad("dedup_threshold", value, bound, next);
            }
            if !(MIN_THRESHOLD..=1.0).contains(&threshold) {
                let bound = format!("it must lie between {MIN_THRESHOLD} and 1");
                return bad("dedup_threshold", value, bound, "0.8 is the default");
            }
        }
        Ok(())
    }

    fn check_languages(&self) -> Result<(), BadSelection> {
        if self.languages.is_empty() && self.language_confidence.is_some() {
            return Err(BadSelection {
                key: "language_confidence",
                value: self.confidence().to_string(),
                bound: "it says something of `corpus.languages` only".into(),
                next: "remove it, or name languages",
            });
        }
        match self
            .languages
            .iter()
            .find(|code| language::parse(code).is_none())
        {
            None => Ok(()),
            Some(code) => Err(BadSelection {
                key: "languages",
                value: format!("\"{code}\""),
                bound: format!("it must be one of {}", language::codes()),
                next: "three letters of ISO 639-3 do as well",
            }),
        }
    }
}

/// Why a document was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Fewer characters than `min_chars`.
    TooShort,
    /// More characters than `max_chars`.
    TooLong,
    /// Too many lines that repeat an earlier one.
    RepeatedLines,
    /// Too many hash signs and ellipses.
    Symbols,
    /// Words that are too short or too long on average.
    WordLength,
    /// Too few words with a letter.
    NotAlphabetic,
    /// Of another language, or of none that can be told.
    Language,
    /// The text of an earlier document, but for white space.
    ExactDuplicate,
    /// Nearly the words of an earlier document.
    NearDuplicate,
}

impl Reason {
    /// All, in the order in which they are asked for: what a document is left out for is the first that holds.
    pub const ALL: [Self; 9] = [
        Self::TooShort,
        Self::TooLong,
        Self::RepeatedLines,
        Self::Symbols,
        Self::WordLength,
        Self::NotAlphabetic,
        Self::Language,
        Self::ExactDuplicate,
        Self::NearDuplicate,
    ];
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TooShort => "too short",
            Self::TooLong => "too long",
            Self::RepeatedLines => "lines that repeat",
            Self::Symbols => "too many symbols",
            Self::WordLength => "words of unusual length",
            Self::NotAlphabetic => "words without letters",
            Self::Language => "another language",
            Self::ExactDuplicate => "exact duplicates",
            Self::NearDuplicate => "near duplicates",
        })
    }
}

/// What was left out for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The reason.
    pub reason: Reason,
    /// Documents, or samples.
    pub documents: u64,
    /// Their text in UTF-8 bytes.
    pub bytes: u64,
}

/// What was asked for, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelectionSummary {
    /// The options.
    pub options: Selection,
    /// Documents that were looked at.
    pub documents: u64,
    /// Their text in UTF-8 bytes.
    pub bytes: u64,
    /// What was left out, by reason, in the order of [`Reason::ALL`]; reasons without a document are absent.
    pub dropped: Vec<Dropped>,
}

impl SelectionSummary {
    /// Documents that were left out.
    pub fn dropped_documents(&self) -> u64 {
        self.dropped.iter().map(|dropped| dropped.documents).sum()
    }
}

/// At most `bytes` bytes of the beginning of a text.
fn beginning(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests;
