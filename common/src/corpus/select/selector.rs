//! Takes the documents of a corpus in order and decides which stay.
//!
//! Documents are judged in batches, in parallel; what earlier documents decide is asked in order. Memory is one batch, and
//! for each document one byte and, without duplicates, about 30 bytes for the hash of its text; near duplicates add what
//! `clusters.rs` says.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;

use rayon::prelude::*;

use super::clusters::{Signatures, Signed};
use super::minhash::{Signature, shingles};
use super::rules::Rules;
use super::{Dropped, LOOKED_AT_BYTES, Reason, Selection, SelectionSummary, beginning};
use crate::corpus::encode::Routed;
use crate::corpus::objective::texts_of;
use crate::corpus::{CorpusError, SupervisedConfig};
use crate::supervised::Record;

/// Text that is judged at a time, for each thread of rayon's current pool.
const BATCH_BYTES_PER_THREAD: usize = 2 << 20;
/// What a document weighs in memory besides its text.
const DOCUMENT_OVERHEAD: usize = 96;
/// Between the parts of a sample, where its identity is concerned: a character that is neither white space nor text.
const PART: &str = "\u{1f}";

/// The decision about all documents.
pub struct Selected {
    /// For each document whether it is left out.
    pub dropped: Vec<bool>,
    /// Characters of the documents that stay.
    pub chars: u64,
    /// Their UTF-8 bytes.
    pub bytes: u64,
    /// What was asked for, and what came of it.
    pub summary: SelectionSummary,
}

/// A selection under way.
pub struct Selector<'a> {
    selection: &'a Selection,
    supervised: Option<&'a SupervisedConfig>,
    rules: Rules,
    /// Identities of the documents that were met.
    met: HashSet<u128>,
    signatures: Option<Signatures>,
    open: Document,
    batch: Vec<Document>,
    batch_bytes: usize,
    batch_limit: usize,
    selected: Selected,
    counts: [(u64, u64); Reason::ALL.len()],
}

/// One document, as far as it is held.
#[derive(Default)]
struct Document {
    /// Its text, or the beginning of it.
    head: String,
    chars: u64,
    bytes: u64,
    /// Of a document that is longer than what is held, the identity so far.
    identity: Option<Identity>,
}

/// What a document says by itself.
struct Judged<'a> {
    said: Cow<'a, str>,
    reason: Option<Reason>,
    identity: u128,
}

impl<'a> Selector<'a> {
    /// Of a selection that has been checked. Signatures go into files in `directory`.
    pub fn new(
        selection: &'a Selection,
        supervised: Option<&'a SupervisedConfig>,
        directory: &Path,
    ) -> Result<Self, CorpusError> {
        let threshold = selection.threshold();
        let signatures = threshold.map(|threshold| Signatures::create(directory, threshold));
        Ok(Self {
            selection,
            supervised,
            rules: Rules::new(selection),
            met: HashSet::new(),
            signatures: signatures.transpose()?,
            open: Document::default(),
            batch: Vec::new(),
            batch_bytes: 0,
            batch_limit: BATCH_BYTES_PER_THREAD * rayon::current_num_threads(),
            selected: Selected {
                dropped: Vec::new(),
                chars: 0,
                bytes: 0,
                summary: SelectionSummary {
                    options: selection.clone(),
                    documents: 0,
                    bytes: 0,
                    dropped: Vec::new(),
                },
            },
            counts: [(0, 0); Reason::ALL.len()],
        })
    }

    /// Takes the next part of the text.
    pub fn push(&mut self, routed: Routed<'_>) -> Result<(), CorpusError> {
        match routed {
            Routed::Begin(..) => {}
            Routed::Text(text) => {
                // A line of samples is understood as a whole.
                let most = match self.supervised {
                    Some(_) => usize::MAX,
                    None => LOOKED_AT_BYTES,
                };
                self.open.push(text, most);
            }
            Routed::End => {
                let document = std::mem::take(&mut self.open);
                self.batch_bytes += document.head.len() + DOCUMENT_OVERHEAD;
                self.batch.push(document);
                if self.batch_bytes >= self.batch_limit {
                    self.flush()?;
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CorpusError> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        let mut judged: Vec<Judged<'_>> = batch.par_iter().map(|d| self.judge(d)).collect();
        if self.selection.dedup.is_some() {
            for judged in judged.iter_mut().filter(|judged| judged.reason.is_none()) {
                if !self.met.insert(judged.identity) {
                    judged.reason = Some(Reason::ExactDuplicate);
                }
            }
        }
        let near = self.signatures.is_some();
        let signature = |judged: &Judged<'_>| {
            let mut found = Vec::new();
            if near && judged.reason.is_none() {
                shingles(&judged.said, &mut found);
            }
            Signature::of(&found)
        };
        let signatures: Vec<_> = judged.par_iter().map(signature).collect();
        for ((document, judged), signature) in batch.iter().zip(&judged).zip(signatures) {
            self.take(document, judged.reason, signature)?;
        }
        Ok(())
    }

    fn judge<'d>(&self, document: &'d Document) -> Judged<'d> {
        let line = document.head.as_str();
        // The scan has understood the line.
        let record = self.supervised.and_then(|config| config.record(line).ok());
        let (said, chars) = match &record {
            None => (Cow::Borrowed(line), document.chars),
            Some(record) => {
                let texts: Vec<&str> = texts_of(record).collect();
                let said = texts.join("\n");
                let chars = said.chars().count() as u64;
                (Cow::Owned(said), chars)
            }
        };
        let reason = self.rules.judge(&said, chars);
        let asked = self.selection.dedup.is_some() && reason.is_none();
        let identity = match (&document.identity, &record) {
            _ if !asked => 0,
            (Some(identity), _) => identity.finish(),
            (None, Some(record)) => Identity::of(&spelled_out(record)),
            (None, None) => Identity::of(line),
        };
        Judged {
            said,
            reason,
            identity,
        }
    }

    /// Writes down what becomes of the next document, as far as it is known.
    fn take(
        &mut self,
        document: &Document,
        reason: Option<Reason>,
        signature: Option<Signature>,
    ) -> Result<(), CorpusError> {
        let number = self.selected.dropped.len() as u64;
        self.selected.summary.documents += 1;
        self.selected.summary.bytes += document.bytes;
        self.selected.dropped.push(reason.is_some());
        match reason {
            Some(reason) => self.count(reason, document.bytes),
            None => {
                self.selected.chars += document.chars;
                self.selected.bytes += document.bytes;
            }
        }
        if let (Some(signatures), Some(signature)) = (&mut self.signatures, signature) {
            let signed = Signed {
                document: number,
                chars: document.chars,
                bytes: document.bytes,
            };
            signatures.push(signed, &signature)?;
        }
        Ok(())
    }

    fn count(&mut self, reason: Reason, bytes: u64) {
        let count = &mut self.counts[reason as usize];
        *count = (count.0 + 1, count.1 + bytes);
    }

    /// The decision, once all documents have come.
    pub fn finish(mut self) -> Result<Selected, CorpusError> {
        self.flush()?;
        self.met = HashSet::new();
        if let Some(signatures) = self.signatures.take() {
            for signed in signatures.near_duplicates()? {
                self.selected.dropped[signed.document as usize] = true;
                self.selected.chars -= signed.chars;
                self.selected.bytes -= signed.bytes;
                self.count(Reason::NearDuplicate, signed.bytes);
            }
        }
        let counted = Reason::ALL.into_iter().zip(self.counts);
        self.selected.summary.dropped = counted
            .filter(|(_, (documents, _))| *documents > 0)
            .map(|(reason, (documents, bytes))| Dropped {
                reason,
                documents,
                bytes,
            })
            .collect();
        Ok(self.selected)
    }
}

impl Document {
    /// More of its text, of which at most `most` bytes are held.
    fn push(&mut self, text: &str, most: usize) {
        self.chars += text.chars().count() as u64;
        self.bytes += text.len() as u64;
        if let Some(identity) = &mut self.identity {
            identity.update(text);
            return;
        }
        let room = most - self.head.len();
        let (held, rest) = text.split_at(beginning(text, room).len());
        self.head.push_str(held);
        if !rest.is_empty() {
            let mut identity = Identity::new();
            identity.update(&self.head);
            identity.update(rest);
            self.identity = Some(identity);
        }
    }
}

/// What makes two samples the same: the words, who says them, and the label. White space at the ends of a part is none
/// of it.
fn spelled_out(record: &Record) -> String {
    let parts: Vec<&str> = match record {
        Record::Conversation(messages) => {
            let turns = messages.iter();
            turns
                .flat_map(|turn| [turn.role.name(), turn.content.trim()])
                .collect()
        }
        Record::Pair { prompt, response } => vec![prompt.trim(), response.trim()],
        Record::Labelled { text, label } => vec![text.trim(), label.trim()],
    };
    parts.join(PART)
}

/// 128 bits of BLAKE3 over a text in which every run of white space (Unicode's) is one space, and none stands at the
/// ends: copies differ in line ends, in how lines are wrapped and in what a program leaves at the end of a file, and a text
/// that differs in nothing else teaches nothing else. Case and punctuation count.
struct Identity {
    hasher: blake3::Hasher,
    /// Whether white space came last.
    gap: bool,
    /// Whether anything came that is none.
    begun: bool,
}

impl Identity {
    fn new() -> Self {
        Self {
            hasher: blake3::Hasher::new_derive_key("cohort corpus selection: document identity, 1"),
            gap: false,
            begun: false,
        }
    }

    fn of(text: &str) -> u128 {
        let mut identity = Self::new();
        identity.update(text);
        identity.finish()
    }

    fn update(&mut self, text: &str) {
        let mut normal = String::with_capacity(text.len() + 1);
        for word in text.split_inclusive(char::is_whitespace) {
            let bare = word.trim_end();
            if !bare.is_empty() {
                if self.gap && self.begun {
                    normal.push(' ');
                }
                normal.push_str(bare);
                self.begun = true;
            }
            self.gap = bare.len() < word.len();
        }
        self.hasher.update(normal.as_bytes());
    }

    fn finish(&self) -> u128 {
        let hash = self.hasher.finalize();
        u128::from_le_bytes(hash.as_bytes()[..16].try_into().expect("sixteen bytes"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_identity_of_a_text_is_that_of_its_words(text in "[ab \n\r\u{a0}€]{0,12}", cut in 0usize..12) {
            let words: Vec<&str> = text.split_whitespace().collect();
            prop_assert_eq!(Identity::of(&text), Identity::of(&words.join(" ")));
            let (a, b) = text.split_at(beginning(&text, cut).len());
            let mut parts = Identity::new();
            parts.update(a);
            parts.update(b);
            prop_assert_eq!(parts.finish(), Identity::of(&text));
        }

        #[test]
        fn a_long_document_is_the_same_as_a_short_one(parts in prop::collection::vec("[ab €\n]{1,6}", 1..6), most in 1usize..20) {
            let mut document = Document::default();
            parts.iter().for_each(|part| document.push(part, most));
            let text = parts.concat();
            prop_assert_eq!((document.bytes, document.chars), (text.len() as u64, text.chars().count() as u64));
            prop_assert!(document.head.len() <= most && text.starts_with(&document.head));
            match &document.identity {
                Some(identity) => prop_assert_eq!(identity.finish(), Identity::of(&text)),
                None => prop_assert_eq!(&document.head, &text),
            }
        }
    }

    #[test]
    fn identities_of_samples_know_who_speaks() {
        let config = SupervisedConfig::new(crate::corpus::Objective::Sft, 8);
        let of = |line: &str| Identity::of(&spelled_out(&config.record(line).expect("a record")));
        let pair = of("{\"prompt\": \"a\", \"response\": \"b  c\"}");
        assert_eq!(
            pair,
            of("{\"response\": \"b c\\n\", \"id\": 7, \"prompt\": \"a\"}")
        );
        assert_ne!(pair, of("{\"prompt\": \"a b\", \"response\": \"c\"}"));
    }
}
