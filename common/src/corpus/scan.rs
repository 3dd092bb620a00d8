//! What the first reading of the text finds: keys for the split, lengths, distinct characters, and what cannot be used.
//!
//! A file counts as a whole or not at all: one that turns out to be bad at its end leaves nothing behind.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::error::CorpusError;
use super::index::SkippedSummary;
use super::prepare::PrepareRequest;
use super::select::{Selected, SelectionSummary};
use super::source::SourceFile;
use super::split::KeyHasher;
use super::text::Event;
use super::tokenizer::TokenizerConfig;

/// What the first reading of the text has found.
#[derive(Default)]
pub(super) struct Scan {
    /// One split key per document, in order.
    pub keys: Vec<u64>,
    /// Characters of text.
    pub chars: u64,
    /// UTF-8 bytes of text.
    pub bytes: u64,
    /// The distinct characters, if the tokenizer needs them.
    pub characters: BTreeSet<char>,
    /// For each file, whether it can be used.
    pub usable: Vec<bool>,
    /// What cannot be used.
    pub skipped: SkippedSummary,
    /// For each document whether a selection leaves it out; empty without one.
    pub dropped: Vec<bool>,
    /// What the selection came to.
    pub selection: Option<SelectionSummary>,
}

/// What the scan of one file has found; counts only if the whole file can be used.
pub(super) struct FileScan {
    keys: Vec<u64>,
    chars: u64,
    bytes: u64,
    characters: Option<CharacterSet>,
    skipped: SkippedSummary,
    skip_bad: bool,
    group_key: Option<u64>,
    content: Option<KeyHasher>,
}

impl FileScan {
    /// A scan at the start of `file`.
    pub fn new(request: &PrepareRequest, file: &SourceFile) -> Self {
        Self {
            keys: Vec::new(),
            chars: 0,
            bytes: 0,
            characters: matches!(request.tokenizer, TokenizerConfig::Char)
                .then(CharacterSet::default),
            skipped: SkippedSummary::default(),
            skip_bad: request.skip_bad,
            group_key: file.group.as_deref().map(KeyHasher::of_group),
            content: None,
        }
    }

    /// Takes the next event of the file.
    pub fn take(&mut self, event: Event<'_>) -> Result<(), CorpusError> {
        match event {
            Event::Start(_) => self.content = Some(KeyHasher::of_content()),
            Event::Text(text) => {
                self.bytes += text.len() as u64;
                self.chars += text.chars().count() as u64;
                if let Some(content) = &mut self.content {
                    content.update(text);
                }
                if let Some(characters) = &mut self.characters {
                    characters.add(text);
                }
            }
            Event::End => {
                let content = self.content.take().map_or(0, |content| content.finish());
                self.keys.push(self.group_key.unwrap_or(content));
            }
            Event::Bad(bad) if self.skip_bad => self.skipped.add(&bad),
            Event::Bad(bad) => return Err(CorpusError::BadInput(bad)),
        }
        Ok(())
    }
}

impl Scan {
    /// Adds a file that can be used.
    pub fn merge(&mut self, file: FileScan) {
        self.keys.extend(file.keys);
        self.chars += file.chars;
        self.bytes += file.bytes;
        self.characters.extend(
            file.characters
                .into_iter()
                .flat_map(CharacterSet::into_chars),
        );
        self.skipped.append(file.skipped);
        self.usable.push(true);
    }

    /// From here on only what a selection has left counts.
    ///
    /// # Errors
    /// [`CorpusError::NothingStays`].
    pub fn select(&mut self, selected: Selected) -> Result<(), CorpusError> {
        let summary = &selected.summary;
        if summary.dropped_documents() == summary.documents {
            let reasons = summary.dropped.iter();
            let reasons = reasons.map(|d| format!("{} ({})", d.reason, d.documents));
            return Err(CorpusError::NothingStays {
                documents: summary.documents,
                reasons: reasons.collect::<Vec<_>>().join(", "),
            });
        }
        self.chars = selected.chars;
        self.bytes = selected.bytes;
        self.dropped = selected.dropped;
        self.selection = Some(selected.summary);
        Ok(())
    }

    /// The split keys of the documents that stay.
    pub fn kept_keys(&self) -> Cow<'_, [u64]> {
        if self.dropped.is_empty() {
            return Cow::Borrowed(&self.keys);
        }
        let kept = self.keys.iter().zip(&self.dropped);
        kept.filter(|(_, dropped)| !**dropped)
            .map(|(key, _)| *key)
            .collect()
    }
}

/// The distinct characters of a text, quick for ASCII.
struct CharacterSet {
    ascii: [bool; 128],
    others: BTreeSet<char>,
}

impl Default for CharacterSet {
    fn default() -> Self {
        Self {
            ascii: [false; 128],
            others: BTreeSet::new(),
        }
    }
}

impl CharacterSet {
    fn add(&mut self, text: &str) {
        for character in text.chars() {
            match self.ascii.get_mut(character as usize) {
                Some(seen) => *seen = true,
                None => {
                    self.others.insert(character);
                }
            }
        }
    }

    fn into_chars(self) -> impl Iterator<Item = char> {
        let ascii = (0u8..128)
            .filter(move |&byte| self.ascii[byte as usize])
            .map(char::from);
        ascii.chain(self.others)
    }
}
