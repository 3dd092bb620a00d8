//! Makes tokenizers from text: byte-level BPE (trained by the `tokenizers` crate) and one token per character. The same
//! text gives the same `tokenizer.json`, byte for byte.
//!
//! Of a text only the distinct stretches and how often each occurs are kept, so memory grows with the vocabulary of the
//! sample and not with its length.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;

use rayon::prelude::*;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::pieces::{Cut, Cutter};
use super::stretches::stretches;
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
    counts: Counts,
    cutter: Cutter,
}

/// How often each distinct stretch of the sample occurs.
#[derive(Default)]
struct Counts(HashMap<String, u64>);

impl Counts {
    fn add(&mut self, piece: &str) {
        for stretch in stretches(piece) {
            match self.0.get_mut(stretch) {
                Some(count) => *count += 1,
                None => drop(self.0.insert(stretch.to_string(), 1)),
            }
        }
    }
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
            counts: Counts::default(),
            cutter: Cutter::new(Cut::BeforeWhitespace),
        })
    }

    /// Adds text, which continues the text before it unless [`end_document`](Self::end_document) was called.
    pub fn add(&mut self, text: &str) {
        let (counts, share) = (&mut self.counts, &mut self.share);
        self.cutter.push(text, &mut |piece| {
            if share.takes(piece.len()) {
                counts.add(&piece);
            }
        });
    }

    /// Nothing that follows continues what came before.
    pub fn end_document(&mut self) {
        if let Some(piece) = self.cutter.finish()
            && self.share.takes(piece.len())
        {
            self.counts.add(&piece);
        }
    }

    /// Trains. Uses rayon's current pool; the result does not depend on its size.
    pub fn finish(mut self) -> Result<Tokenizer, TokenizerError> {
        self.end_document();
        let library = |error: tokenizers::Error| TokenizerError::Library(error.to_string());
        let trainer = bpe_trainer(self.vocab_size);
        let words = count_words(&self.counts.0).map_err(library)?;
        let words = words
            .into_iter()
            .map(|(word, count)| (word.into(), count))
            .collect();
        let mut model = BPE::default();
        let special = trainer.do_train(&words, &mut model).map_err(library)?;
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(gpt2()));
        tokenizer.with_decoder(Some(gpt2()));
        tokenizer.add_special_tokens(special).map_err(library)?;
        let json = tokenizer.to_string(false).map_err(library)?;
        Tokenizer::from_json(json.as_bytes(), Some(END_OF_TEXT))
    }
}

fn bpe_trainer(vocab_size: u32) -> BpeTrainer {
    BpeTrainer::builder()
        .vocab_size(vocab_size as usize)
        .min_frequency(MIN_FREQUENCY)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
}

/// How often each word, as pre-tokenization cuts them and in its letters for bytes, occurs in the stretches.
fn count_words(stretches: &HashMap<String, u64>) -> tokenizers::Result<HashMap<String, u64>> {
    let count = |mut words: HashMap<String, u64>, (stretch, &times): (&String, &u64)| {
        let mut text = PreTokenizedString::from(stretch.as_str());
        gpt2().pre_tokenize(&mut text)?;
        for (word, _, _) in text.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            *words.entry(word.to_string()).or_default() += times;
        }
        tokenizers::Result::Ok(words)
    };
    let merge = |mut all: HashMap<String, u64>, part: HashMap<String, u64>| {
        for (word, times) in part {
            *all.entry(word).or_default() += times;
        }
        tokenizers::Result::Ok(all)
    };
    stretches
        .par_iter()
        .try_fold(HashMap::new, count)
        .try_reduce(HashMap::new, merge)
}

/// GPT-2's pre-tokenization and its inverse.
fn gpt2() -> ByteLevel {
    ByteLevel::new(false, true, true)
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

    /// Counting by stretches gives the tokenizer that the library trains on the text itself.
    #[test]
    fn the_library_trains_the_same_tokenizer_on_the_whole_text() {
        let text = text_of_ties() + " it's  a\n\n a\tb 'll  \u{a0} the end.\r\n ünï 12a";
        let mut theirs = tokenizers::TokenizerBuilder::<
            BPE,
            tokenizers::NormalizerWrapper,
            _,
            ByteLevel,
            _,
        >::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(gpt2()))
        .with_post_processor(None)
        .with_decoder(Some(gpt2()))
        .build()
        .expect("build");
        let mut trainer = bpe_trainer(700);
        theirs
            .train(&mut trainer, [text.as_str()].into_iter())
            .expect("train");
        assert_eq!(train(&text, 700, 2), theirs.to_string(false).expect("json"));
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
        let counts = &training.counts.0;
        let mut taken: Vec<u32> = counts
            .keys()
            .filter_map(|key| key.trim().parse().ok())
            .collect();
        taken.sort_unstable();
        assert_eq!(taken.len() as u64 * 10, training.share.taken);
        assert!(
            taken.windows(2).all(|pair| pair[1] - pair[0] <= 11),
            "{taken:?}"
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
