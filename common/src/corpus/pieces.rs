//! Cuts a document into pieces that encode to the same tokens as the whole, so that a document of any size is encoded in
//! bounded memory and in parallel.
//!
//! GPT-2's pre-tokenization matches, from left to right and without looking behind,
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. No alternative matches a character that
//! is not white space and then one that is, so a match always ends between the two, and what follows is matched as if it
//! were the start. What comes before is matched as if it were the end, too: the only look ahead stands after white space,
//! and there the piece ends without any. Hence a cut between a character that is not white space and one that is changes
//! no token. (A cut *after* white space would: the last space of a run belongs to the word that follows.)

use super::stretches::may_cut;
use super::train::ANY_CHARACTER;

/// A piece is cut at the first opportunity from this many bytes on.
pub const PIECE_BYTES: usize = 64 << 10;

/// Where a text may be cut without changing its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Between any two characters: each is encoded by itself.
    Anywhere,
    /// Before white space that follows something else: GPT-2's pre-tokenization.
    BeforeWhitespace,
    /// Nowhere that is known to be safe: documents are encoded as a whole, in memory of many times their size.
    Never,
}

impl Cut {
    /// What is known to be safe for a tokenizer, from its `tokenizer.json`.
    pub(super) fn of_tokenizer(tree: &serde_json::Value) -> Self {
        let added = tree["added_tokens"].as_array();
        let text_only =
            added.is_none_or(|tokens| tokens.iter().all(|token| token["special"] == true));
        if !tree["normalizer"].is_null() || !text_only {
            return Self::Never;
        }
        let pre_tokenizer = &tree["pre_tokenizer"];
        let gpt2 = pre_tokenizer["type"] == "ByteLevel"
            && pre_tokenizer["add_prefix_space"] == false
            && pre_tokenizer["use_regex"] != false;
        let characters = pre_tokenizer["type"] == "Split"
            && pre_tokenizer["pattern"]["Regex"] == ANY_CHARACTER
            && pre_tokenizer["behavior"] == "Isolated";
        match () {
            () if gpt2 => Self::BeforeWhitespace,
            () if characters => Self::Anywhere,
            () => Self::Never,
        }
    }
}

/// Collects text and gives it out in pieces of about [`PIECE_BYTES`].
#[derive(Debug)]
pub struct Cutter {
    cut: Cut,
    piece_bytes: usize,
    buffer: String,
    searched: usize, // no cut lies before this byte
}

impl Cutter {
    /// A cutter for tokenizers that may be cut at `cut`.
    pub fn new(cut: Cut) -> Self {
        Self::with_piece_bytes(cut, PIECE_BYTES)
    }

    /// The same, with pieces of another size.
    pub fn with_piece_bytes(cut: Cut, piece_bytes: usize) -> Self {
        Self {
            cut,
            piece_bytes,
            buffer: String::new(),
            searched: 0,
        }
    }

    /// Adds text; sends each complete piece to `emit`.
    pub fn push(&mut self, mut text: &str, emit: &mut dyn FnMut(String)) {
        while !text.is_empty() {
            let room = match self.piece_bytes.saturating_sub(self.buffer.len()) {
                0 => self.piece_bytes,
                room => room,
            };
            let (now, later) = text.split_at(char_boundary_from(text, room));
            self.buffer.push_str(now);
            text = later;
            if self.buffer.len() < self.piece_bytes {
                continue;
            }
            match self.last_cut() {
                Some(at) => {
                    let rest = self.buffer.split_off(at);
                    emit(std::mem::replace(&mut self.buffer, rest));
                    self.searched = 0;
                }
                None => self.searched = self.buffer.len(),
            }
        }
    }

    /// Ends the document; returns what is left, if anything.
    pub fn finish(&mut self) -> Option<String> {
        self.searched = 0;
        (!self.buffer.is_empty()).then(|| std::mem::take(&mut self.buffer))
    }

    fn last_cut(&self) -> Option<usize> {
        match self.cut {
            Cut::Never => None,
            Cut::Anywhere => Some(self.buffer.len()),
            Cut::BeforeWhitespace => (self.searched.max(1)..self.buffer.len())
                .rev()
                .find(|&at| may_cut(&self.buffer, at)),
        }
    }
}

/// The first place from byte `at` on where `text` can be split.
pub(super) fn char_boundary_from(text: &str, at: usize) -> usize {
    (at..text.len())
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::tokenizer::Tokenizer;
    use crate::corpus::train::{BpeTraining, char_tokenizer};
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static BPE: LazyLock<Tokenizer> = LazyLock::new(|| {
        let mut training = BpeTraining::new(400).expect("vocab size");
        training.add("a a  b\n\nb  aa'sa 's''s 12 a1 .. .a\r\n\r\n a\t\t.  \n a. a.\n ü\u{a0}ü \u{2003}x the thethe the.\n");
        training.add("a\nb a\r\nb ab ab  ab\n\n\nab ab'll 'll a'll 1 1 11 a' 'a \u{85}a  \u{85} a");
        training.finish().expect("train")
    });

    fn pieces(cut: Cut, text: &str, piece_bytes: usize, feed: usize) -> Vec<String> {
        let mut cutter = Cutter::with_piece_bytes(cut, piece_bytes);
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(char_boundary_from(rest, feed));
            cutter.push(now, &mut |piece| pieces.push(piece));
            rest = later;
        }
        pieces.extend(cutter.finish());
        pieces
    }

    #[test]
    fn a_text_without_cuts_stays_whole_and_one_with_cuts_does_not() {
        let word = "x".repeat(1000);
        assert_eq!(
            pieces(Cut::BeforeWhitespace, &word, 10, 7),
            std::slice::from_ref(&word)
        );
        assert_eq!(pieces(Cut::Never, "a b c d e f", 2, 3), ["a b c d e f"]);
        assert_eq!(
            pieces(Cut::BeforeWhitespace, "aa bb cc", 5, 100),
            ["aa", " bb", " cc"]
        );
    }

    #[test]
    fn only_known_pre_tokenizers_are_cut() {
        assert_eq!(BPE.cut(), Cut::BeforeWhitespace);
        assert_eq!(char_tokenizer("ab".chars()).cut(), Cut::Anywhere);
        let prefix = BPE
            .to_json()
            .replace("\"add_prefix_space\":false", "\"add_prefix_space\":true");
        assert_eq!(
            Tokenizer::from_json(prefix.as_bytes(), None)
                .expect("load")
                .cut(),
            Cut::Never
        );
        let added = BPE
            .to_json()
            .replace("\"special\":true", "\"special\":false");
        assert_eq!(
            Tokenizer::from_json(added.as_bytes(), None)
                .expect("load")
                .cut(),
            Cut::Never
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn pieces_encode_to_the_tokens_of_the_whole(
            text in "([ \\n\\r\\t]|[ab1.'ü\u{a0}\u{2003}\u{85}漢]|'s|'ll| {2,4}|\\n\\n|\\PC){0,80}",
            piece_bytes in 1usize..40,
            feed in 1usize..50,
        ) {
            let plain = tokenizers::Tokenizer::from_bytes(BPE.to_json()).expect("load");
            let whole = plain.encode(text.as_str(), false).expect("encode").get_ids().to_vec();
            let pieces = pieces(BPE.cut(), &text, piece_bytes, feed);
            prop_assert_eq!(pieces.concat(), text);
            let encoded: Vec<u32> = pieces.iter().flat_map(|piece| BPE.encode(piece).expect("encode")).collect();
            prop_assert_eq!(encoded, whole);
        }

        #[test]
        fn characters_are_cut_anywhere(text in "[ab\\n €😀]{0,80}", piece_bytes in 1usize..20, feed in 1usize..30) {
            let tokenizer = char_tokenizer("ab\n €😀".chars());
            let pieces = pieces(tokenizer.cut(), &text, piece_bytes, feed);
            let encoded: Vec<u32> = pieces.iter().flat_map(|piece| tokenizer.encode(piece).expect("encode")).collect();
            prop_assert_eq!(encoded, tokenizer.encode(&text).expect("encode"));
        }
    }
}
