//! Makes tokenizers from text: byte-level BPE (trained by the `tokenizers` crate) and one token per character. The same
//! text gives the same `tokenizer.json`, byte for byte.
//!
//! Which text is looked at is decided by the caller; here it is only bounded by memory: a BPE sample is held whole.

use std::collections::BTreeSet;
use std::fmt::Write;

use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

use super::pieces::{Cut, Cutter};
use super::tokenizer::{END_OF_TEXT, Tokenizer, TokenizerError};

/// The pattern that isolates characters, in a form that every regular expression engine behind `tokenizers` reads alike.
pub(super) const ANY_CHARACTER: &str = r"[\s\S]";

/// Bytes and end-of-text: the smallest BPE vocabulary.
pub const MIN_BPE_VOCAB: u32 = 257;

/// A pair of tokens seen less often than this is not worth a token of its own.
const MIN_FREQUENCY: u64 = 2;

/// Collects text and trains a byte-level BPE tokenizer on it, with GPT-2's pre-tokenization and `<|endoftext|>` as
/// token 0.
pub struct BpeTraining {
    vocab_size: u32,
    share: Share,
    pieces: Vec<String>,
    cutter: Cutter,
}

/// Which pieces of a text are looked at: evenly spread ones, about `sample` bytes out of `total`.
struct Share {
    sample: u64,
    total: u64,
    seen: u64,
    taken: u64,
}

impl Share {
    fn takes(&mut self, bytes: usize) -> bool {
        let takes = self.sample >= self.total
            || u128::from(self.taken) * u128::from(self.total)
                <= u128::from(self.seen) * u128::from(self.sample);
        self.seen += bytes as u64;
        self.taken += if takes { bytes as u64 } else { 0 };
        takes
    }
}

impl BpeTraining {
    /// Training of at most `vocab_size` tokens, at least [`MIN_BPE_VOCAB`], on all text that is added.
    pub fn new(vocab_size: u32) -> Result<Self, TokenizerError> {
        Self::on_sample(vocab_size, u64::MAX, 0)
    }

    /// The same, but of `total_bytes` of text about `sample_bytes` are kept and looked at: pieces spread evenly.
    pub fn on_sample(
        vocab_size: u32,
        sample_bytes: u64,
        total_bytes: u64,
    ) -> Result<Self, TokenizerError> {
        if vocab_size < MIN_BPE_VOCAB {
            return Err(TokenizerError::VocabTooSmall(vocab_size));
        }
        Ok(Self {
            vocab_size,
            share: Share {
                sample: sample_bytes,
                total: total_bytes,
                seen: 0,
                taken: 0,
            },
            pieces: Vec::new(),
            cutter: Cutter::new(Cut::BeforeWhitespace),
        })
    }

    /// Adds text, which continues the text before it unless [`end_document`](Self::end_document) was called.
    pub fn add(&mut self, text: &str) {
        let (pieces, share) = (&mut self.pieces, &mut self.share);
        self.cutter.push(text, &mut |piece| {
            if share.takes(piece.len()) {
                pieces.push(piece);
            }
        });
    }

    /// Nothing that follows continues what came before.
    pub fn end_document(&mut self) {
        let rest = self.cutter.finish();
        self.pieces
            .extend(rest.filter(|piece| self.share.takes(piece.len())));
    }

    /// Trains. Uses rayon's current pool; the result does not depend on its size.
    pub fn finish(mut self) -> Result<Tokenizer, TokenizerError> {
        self.end_document();
        let library = |error: tokenizers::Error| TokenizerError::Library(error.to_string());
        let mut trainer = BpeTrainer::builder()
            .vocab_size(self.vocab_size as usize)
            .min_frequency(MIN_FREQUENCY)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let bytes = ByteLevel::new(false, true, true);
        let mut tokenizer =
            TokenizerBuilder::<BPE, tokenizers::NormalizerWrapper, _, ByteLevel, _>::new()
                .with_model(BPE::default())
                .with_normalizer(None)
                .with_pre_tokenizer(Some(bytes))
                .with_post_processor(None)
                .with_decoder(Some(ByteLevelDecoder::new(false, true, true)))
                .build()
                .map_err(library)?;
        tokenizer
            .train(&mut trainer, self.pieces.into_iter())
            .map_err(library)?;
        let json = tokenizer.to_string(false).map_err(library)?;
        Tokenizer::from_json(json.as_bytes(), Some(END_OF_TEXT))
    }
}

/// A tokenizer with one token for each distinct character of `characters`: ids in order of the code points from 1 on,
/// after `<|endoftext|>` as token 0.
pub fn char_tokenizer(characters: impl IntoIterator<Item = char>) -> Tokenizer {
    let distinct: BTreeSet<char> = characters.into_iter().collect();
    let quote = |text: &str| serde_json::to_string(text).expect("strings serialize");
    let end = quote(END_OF_TEXT);
    let mut vocab = format!("{end}:0");
    for (index, character) in distinct.iter().enumerate() {
        let _ = write!(
            vocab,
            ",{}:{}",
            quote(character.encode_utf8(&mut [0; 4])),
            index + 1
        );
    }
    // Written by hand, so that the bytes do not depend on the order in which a JSON library keeps its keys. A word-level
    // model without its unknown token fails on unknown characters, where a BPE model would drop them without a word.
    let json = format!(
        concat!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{{"id":0,"content":{end},"#,
            r#""single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}],"#,
            r#""normalizer":null,"pre_tokenizer":{{"type":"Split","pattern":{{"Regex":{any}}},"#,
            r#""behavior":"Isolated","invert":false}},"post_processor":null,"decoder":{{"type":"Fuse"}},"#,
            r#""model":{{"type":"WordLevel","vocab":{{{vocab}}},"unk_token":"<unk>"}}}}"#,
        ),
        end = end,
        any = quote(ANY_CHARACTER),
        vocab = vocab,
    );
    Tokenizer::from_json(json.as_bytes(), Some(END_OF_TEXT)).expect("a tokenizer made here loads")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(text: &str, vocab_size: u32, threads: usize) -> String {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("pool");
        pool.install(|| {
            let mut training = BpeTraining::new(vocab_size).expect("vocab size");
            training.add(text);
            training.finish().expect("train").to_json().to_string()
        })
    }

    /// A text with many pairs of equal frequency, where an order taken from a hash map would show.
    fn text_of_ties() -> String {
        let mut text = String::new();
        for i in 0..3000u32 {
            let word = i.wrapping_mul(2_654_435_761) >> 12;
            let _ = write!(text, "{word:x} {:x} ", word.rotate_left(9));
        }
        text
    }

    #[test]
    fn the_same_text_gives_the_same_bytes_for_any_number_of_threads() {
        let text = text_of_ties();
        let first = train(&text, 1500, 1);
        for threads in [1, 2, 5] {
            assert!(train(&text, 1500, threads) == first, "{threads} threads");
        }
    }

    #[test]
    fn a_vocabulary_below_the_bytes_is_refused() {
        assert!(matches!(
            BpeTraining::new(256),
            Err(TokenizerError::VocabTooSmall(256))
        ));
        let mut training = BpeTraining::new(257).expect("vocab size");
        training.add("some text");
        assert_eq!(training.finish().expect("train").vocab_size(), 257);
    }

    #[test]
    fn a_sample_is_spread_over_the_text() {
        let mut training = BpeTraining::on_sample(300, 1000, 10_000).expect("vocab size");
        for i in 0..1000 {
            training.add(&format!("{i:>10}"));
            training.end_document();
        }
        assert!(
            (1000..=1010).contains(&training.share.taken),
            "{}",
            training.share.taken
        );
        assert_eq!(training.pieces.len() as u64 * 10, training.share.taken);
        assert!(
            training.pieces[50]
                .trim()
                .parse::<u32>()
                .is_ok_and(|i| (480..520).contains(&i))
        );
    }

    #[test]
    fn characters_are_numbered_in_order_after_the_end_of_text() {
        let tokenizer = char_tokenizer("hello\n".chars());
        assert_eq!(tokenizer.vocab_size(), 6);
        assert_eq!(tokenizer.encode("\nehlo").expect("encode"), [1, 2, 3, 4, 5]);
        assert_eq!(
            char_tokenizer("lo\nehhh".chars()).to_json(),
            tokenizer.to_json()
        );
    }
}
