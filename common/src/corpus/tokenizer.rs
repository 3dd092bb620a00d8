//! The tokenizer as the rest of Cohort sees it: text to token ids and back, over a `tokenizer.json` that loads in any
//! other program as it is.
//!
//! Text is always encoded as text: an end-of-text token that is spelled out in a document does not end it. Nothing is
//! ever cut, padded, or wrapped in special tokens here; who needs those adds their ids. How tokenizers come to be is in
//! `train.rs`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::pieces::Cut;
use super::stretches::StretchCache;

/// The end-of-text token of the tokenizers that are made here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

const KNOWN_EOS: &[&str] = &[END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"];
const KNOWN_BOS: &[&str] = &["<s>", "<|begin_of_text|>", "<bos>"];

/// Which tokenizer a corpus is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerConfig {
    /// Byte-level BPE with GPT-2's pre-tokenization, trained on the training split.
    Bpe {
        /// Tokens in the vocabulary, the end-of-text token included; small corpora may give fewer.
        vocab_size: u32,
    },
    /// One token per distinct character of the corpus.
    Char,
    /// A given `tokenizer.json`.
    File {
        /// The file's content.
        json: Vec<u8>,
        /// Name of the end-of-text token; `None` looks for the well-known ones.
        eos: Option<String>,
    },
}

impl TokenizerConfig {
    /// A given `tokenizer.json`, read from `path`.
    pub fn from_file(path: &Path, eos: Option<String>) -> Result<Self, TokenizerError> {
        let json = std::fs::read(path).map_err(|source| TokenizerError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Self::File { json, eos })
    }
}

/// Why a tokenizer cannot be used, or cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("cannot read tokenizer `{path}`", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// Not a `tokenizer.json`.
    #[error("the tokenizer is not a valid `tokenizer.json`: {0}")]
    Invalid(String),
    /// Encoding would be random.
    #[error(
        "the tokenizer has BPE dropout `{0}`, so the same text would give other tokens each time; set it to null"
    )]
    Dropout(f64),
    /// No end-of-text token.
    #[error("the tokenizer has no token `{wanted}` to end documents with; name one that it has")]
    NoEos {
        /// What was looked for.
        wanted: String,
    },
    /// A vocabulary that does not even hold all bytes.
    #[error(
        "a BPE vocabulary of `{0}` tokens is too small: 256 bytes and the end-of-text token take 257"
    )]
    VocabTooSmall(u32),
    /// A character that a character tokenizer has never seen.
    #[error("character {character:?} (U+{code:04X}) is not in the tokenizer's vocabulary", code = u32::from(*character))]
    UnknownChar {
        /// The character.
        character: char,
    },
    /// A token id beyond the vocabulary.
    #[error("token id `{id}` is not below the vocabulary size `{vocab_size}`")]
    UnknownId {
        /// The id.
        id: u32,
        /// The vocabulary size.
        vocab_size: u32,
    },
    /// The library failed.
    #[error("the tokenizer failed: {0}")]
    Library(String),
}

/// A tokenizer, ready to encode and decode. Cheap to share behind an `Arc`; all methods take `&self`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: String,
    fingerprint: String,
    eos: u32,
    bos: Option<u32>,
    unknown: Option<u32>,
    /// Special tokens, the longest spelling first.
    special: Vec<(String, u32)>,
    vocab_size: u32,
    characters: Option<HashMap<char, u32>>,
    cut: Cut,
    caches: Mutex<Vec<StretchCache>>, // as many as there ever were threads encoding at once
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("fingerprint", &self.fingerprint)
            .field("vocab_size", &self.vocab_size)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads a `tokenizer.json`. `eos` names the end-of-text token; `None` takes the first of `<|endoftext|>`, `</s>`,
    /// `<|end_of_text|>`, `<eos>` that is there.
    pub fn from_json(json: &[u8], eos: Option<&str>) -> Result<Self, TokenizerError> {
        let invalid = |error: String| TokenizerError::Invalid(error);
        let json = std::str::from_utf8(json).map_err(|error| invalid(error.to_string()))?;
        let tree: serde_json::Value =
            serde_json::from_str(json).map_err(|error| invalid(error.to_string()))?;
        if let Some(dropout) = tree["model"]["dropout"].as_f64().filter(|p| *p > 0.0) {
            return Err(TokenizerError::Dropout(dropout));
        }
        let mut inner = tokenizers::Tokenizer::from_bytes(json.as_bytes())
            .map_err(|error| invalid(error.to_string()))?;
        inner
            .with_truncation(None)
            .map_err(|error| invalid(error.to_string()))?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);
        let first = |names: &[&str]| names.iter().find_map(|name| inner.token_to_id(name));
        let eos_names = eos.map_or(KNOWN_EOS.to_vec(), |name| vec![name]);
        let eos = first(&eos_names).ok_or_else(|| TokenizerError::NoEos {
            wanted: eos_names.join("`, `"),
        })?;
        let vocab = inner.get_vocab(true);
        let largest = vocab.values().max().copied().unwrap_or(0);
        let unknown = tree["model"]["unk_token"]
            .as_str()
            .and_then(|name| inner.token_to_id(name));
        Ok(Self {
            bos: first(KNOWN_BOS),
            special: special_tokens(&tree),
            unknown,
            vocab_size: largest
                .checked_add(1)
                .ok_or_else(|| invalid(format!("token id `{largest}`")))?,
            characters: character_table(&tree, &vocab),
            cut: Cut::of_tokenizer(&tree),
            fingerprint: blake3::hash(json.as_bytes()).to_hex().to_string(),
            json: json.to_string(),
            eos,
            inner,
            caches: Mutex::default(),
        })
    }

    /// Loads a `tokenizer.json` whose end-of-text token is known by its id, as a corpus index or a model's config has it.
    pub fn from_json_with_eos_id(json: &[u8], eos: u32) -> Result<Self, TokenizerError> {
        let tree: serde_json::Value = serde_json::from_slice(json)
            .map_err(|error| TokenizerError::Invalid(error.to_string()))?;
        let added = tree["added_tokens"].as_array().into_iter().flatten();
        let from_added = added
            .filter(|token| token["id"] == eos)
            .find_map(|token| token["content"].as_str());
        let vocab = tree["model"]["vocab"].as_object().into_iter().flatten();
        let from_vocab = vocab
            .filter(|(_, id)| **id == eos)
            .map(|(token, _)| token.as_str());
        let name = from_added
            .into_iter()
            .chain(from_vocab)
            .next()
            .ok_or_else(|| TokenizerError::NoEos {
                wanted: format!("id {eos}"),
            })?;
        Self::from_json(json, Some(name))
    }

    /// Token ids of `text`, without any special tokens.
    ///
    /// # Errors
    /// A character tokenizer names the first character that it does not know.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if let Some(table) = &self.characters {
            let id = |character| {
                table
                    .get(&character)
                    .copied()
                    .ok_or(TokenizerError::UnknownChar { character })
            };
            return text.chars().map(id).collect();
        }
        if self.cut != Cut::BeforeWhitespace {
            return self.encode_with_library(text);
        }
        let lock = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cache = lock().pop().unwrap_or_default();
        let mut ids = Vec::with_capacity(text.len() / 3);
        cache.encode(text, &mut ids, |stretch| self.encode_with_library(stretch))?;
        lock().push(cache);
        Ok(ids)
    }

    /// Token ids of a text in which special tokens are meant where they are spelled out, as in a rendered chat template.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        let mut rest = text;
        while let Some((at, token, id)) = self.first_special(rest) {
            if at > 0 {
                ids.extend(self.encode(&rest[..at])?);
            }
            ids.push(id);
            rest = &rest[at + token.len()..];
        }
        if !rest.is_empty() {
            ids.extend(self.encode(rest)?);
        }
        Ok(ids)
    }

    /// Token ids of a text that a model is to go on with. Models from elsewhere expect their begin of text before it; ours
    /// have seen documents after the end of another, which stands for an empty text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode(text)?;
        match self.bos {
            Some(begin) => ids.insert(0, begin),
            None if ids.is_empty() => ids.push(self.eos),
            None => {}
        }
        Ok(ids)
    }

    /// The first special token that is spelled out in `text`: its place, its spelling and its id.
    pub fn first_special(&self, text: &str) -> Option<(usize, &str, u32)> {
        let places = self.special.iter().filter_map(|(token, id)| {
            let at = text.find(token.as_str())?;
            Some((at, token.as_str(), *id))
        });
        // Of two at one place the longer one comes first in the list.
        places.min_by_key(|(at, ..)| *at)
    }

    /// The spelling of a token.
    pub fn spelling(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    fn encode_with_library(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| TokenizerError::Library(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out. Bytes that are not valid UTF-8 come out as U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.decode_ids(ids, true)
    }

    /// The text of `ids` with special tokens spelled out, for people who look at data.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.decode_ids(ids, false)
    }

    fn decode_ids(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        if let Some(&id) = ids.iter().find(|&&id| id >= self.vocab_size) {
            return Err(TokenizerError::UnknownId {
                id,
                vocab_size: self.vocab_size,
            });
        }
        self.inner
            .decode(ids, skip_special)
            .map_err(|error| TokenizerError::Library(error.to_string()))
    }

    /// The id of a token by its exact spelling, special or not.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Id of the token that ends documents.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Id of the token that begins sequences, where the vocabulary has a well-known one. Corpora do not use it; models
    /// from elsewhere may expect it before a prompt.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Id of the token that stands for what the vocabulary cannot express, where there is one.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    /// One more than the largest token id: the rows that an embedding needs.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// The `tokenizer.json`, byte for byte as it was given or made.
    pub fn to_json(&self) -> &str {
        &self.json
    }

    /// BLAKE3 of [`to_json`](Self::to_json), in hex.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Where a text may be cut so that its pieces encode to the same tokens as the whole.
    pub fn cut(&self) -> Cut {
        self.cut
    }
}

fn special_tokens(tree: &serde_json::Value) -> Vec<(String, u32)> {
    let added = tree["added_tokens"].as_array().into_iter().flatten();
    let special = added.filter(|token| token["special"] == true);
    let named = special.filter_map(|token| {
        let id = token["id"].as_u64().and_then(|id| u32::try_from(id).ok())?;
        let content = token["content"].as_str().filter(|text| !text.is_empty())?;
        Some((content.to_owned(), id))
    });
    let mut tokens: Vec<_> = named.collect();
    tokens.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.cmp(b)));
    tokens
}

/// The table of a character tokenizer as `train.rs` makes it; `None` for every other tokenizer.
fn character_table(
    tree: &serde_json::Value,
    vocab: &HashMap<String, u32>,
) -> Option<HashMap<char, u32>> {
    let is_character = tree["model"]["type"] == "WordLevel"
        && tree["normalizer"].is_null()
        && tree["decoder"]["type"] == "Fuse"
        && tree["pre_tokenizer"]["type"] == "Split"
        && tree["pre_tokenizer"]["pattern"]["Regex"] == super::train::ANY_CHARACTER
        && tree["pre_tokenizer"]["behavior"] == "Isolated"
        && vocab.len()
            == 1 + tree["model"]["vocab"]
                .as_object()?
                .keys()
                .filter(|k| k.chars().count() == 1)
                .count();
    is_character.then(|| {
        vocab
            .iter()
            .filter_map(|(token, &id)| {
                let mut characters = token.chars();
                let first = characters.next()?;
                characters.next().is_none().then_some((first, id))
            })
            .collect()
    })
}

/// Turns token ids into text one at a time, for generation: gives out only complete characters.
#[derive(Debug, Default)]
pub struct StreamDecoder {
    ids: Vec<u32>,
    given: usize, // bytes of the decoded `ids` that were given out
}

impl StreamDecoder {
    /// Beyond this many ids the window is shortened, so that a token costs the same at any length.
    const WINDOW: usize = 16;

    /// A decoder at the start of a text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next id; returns the text that is complete now, perhaps empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids)?;
        let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        let new = text
            .get(self.given..complete)
            .unwrap_or_default()
            .to_string();
        self.given = self.given.max(complete);
        if complete == text.len() && self.ids.len() > Self::WINDOW {
            self.ids.drain(..self.ids.len() - 1);
            self.given = tokenizer.decode(&self.ids)?.len();
        }
        Ok(new)
    }

    /// Ends the text; returns what was held back, with U+FFFD for bytes that never became a character.
    pub fn finish(self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let text = tokenizer.decode(&self.ids)?;
        Ok(text.get(self.given..).unwrap_or_default().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::train::{BpeTraining, char_tokenizer};
    use proptest::prelude::*;

    pub(crate) const SAMPLE: &str = "The cat sat on the mat, and the cat's hat was on the mat. 123 + 456 = 579!\n\
        Ünïcödé €uro 漢字 😀\n\n  indented\ttabs\r\nand the end of the cat.";

    fn bpe() -> Tokenizer {
        let mut training = BpeTraining::new(300).expect("vocab size");
        training.add(SAMPLE);
        training.finish().expect("train")
    }

    #[test]
    fn bpe_has_the_end_of_text_at_zero_and_round_trips() {
        let tokenizer = bpe();
        assert_eq!(tokenizer.eos(), 0);
        assert!(tokenizer.vocab_size() > 257 && tokenizer.vocab_size() <= 300);
        let ids = tokenizer.encode(SAMPLE).expect("encode");
        assert!(ids.len() < SAMPLE.len());
        assert_eq!(tokenizer.decode(&ids).expect("decode"), SAMPLE);
    }

    #[test]
    fn a_spelled_out_end_of_text_is_text() {
        let characters = char_tokenizer(END_OF_TEXT.chars());
        for tokenizer in [bpe(), characters] {
            let text = "<|endoftext|>";
            let ids = tokenizer.encode(text).expect("encode");
            assert!(!ids.contains(&tokenizer.eos()), "{ids:?}");
            assert_eq!(tokenizer.decode(&ids).expect("decode"), text);
            assert_eq!(tokenizer.decode(&[tokenizer.eos()]).expect("decode"), "");
            assert_eq!(
                tokenizer
                    .decode_with_special(&[tokenizer.eos()])
                    .expect("decode"),
                text
            );
        }
    }

    #[test]
    fn an_unknown_character_is_named() {
        let tokenizer = char_tokenizer("abc".chars());
        let error = tokenizer.encode("abd").expect_err("unknown");
        assert_eq!(
            error.to_string(),
            "character 'd' (U+0064) is not in the tokenizer's vocabulary"
        );
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_refused() {
        let tokenizer = char_tokenizer("abc".chars());
        let error = tokenizer.decode(&[1, 4]).expect_err("beyond");
        assert_eq!(
            error.to_string(),
            "token id `4` is not below the vocabulary size `4`"
        );
    }

    #[test]
    fn given_tokenizers_are_checked() {
        let invalid = Tokenizer::from_json(b"{}", None).expect_err("invalid");
        assert!(matches!(invalid, TokenizerError::Invalid(_)));
        let json = char_tokenizer("ab".chars()).to_json().to_string();
        let named = Tokenizer::from_json(json.as_bytes(), Some("<end>")).expect_err("no eos");
        assert!(named.to_string().contains("no token `<end>`"), "{named}");
        let other = json.replace(END_OF_TEXT, "<stop>");
        assert!(matches!(
            Tokenizer::from_json(other.as_bytes(), None),
            Err(TokenizerError::NoEos { .. })
        ));
        assert_eq!(
            Tokenizer::from_json(other.as_bytes(), Some("<stop>"))
                .expect("load")
                .eos(),
            0
        );
        let dropout = bpe()
            .to_json()
            .replace("\"dropout\":null", "\"dropout\":0.1");
        assert!(matches!(
            Tokenizer::from_json(dropout.as_bytes(), None),
            Err(TokenizerError::Dropout(_))
        ));
    }

    #[test]
    fn truncation_in_a_given_file_does_not_lose_text() {
        let truncation = r#""truncation":{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0}"#;
        let json = bpe().to_json().replace("\"truncation\":null", truncation);
        let tokenizer = Tokenizer::from_json(json.as_bytes(), None).expect("load");
        assert!(tokenizer.encode(SAMPLE).expect("encode").len() > 2);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// What a character tokenizer's table does is what the plain library does with its file.
        #[test]
        fn the_plain_library_agrees_about_characters(text in "[ab\\n\\r\\t €漢😀'<|>.]{0,60}") {
            let tokenizer = char_tokenizer("ab\n\r\t €漢😀'<|>.".chars());
            let plain = tokenizers::Tokenizer::from_bytes(tokenizer.to_json()).expect("load");
            let ids = tokenizer.encode(&text).expect("encode");
            let theirs = plain.encode(text.as_str(), false).expect("encode");
            prop_assert_eq!(&ids[..], theirs.get_ids());
            prop_assert_eq!(&plain.decode(&ids, true).expect("decode"), &text);
            prop_assert_eq!(tokenizer.decode(&ids).expect("decode"), text);
        }

        #[test]
        fn streaming_gives_the_same_text_in_complete_characters(text in "\\PC{0,80}") {
            let tokenizer = bpe();
            let ids = tokenizer.encode(&text).expect("encode");
            let mut stream = StreamDecoder::new();
            let mut streamed = String::new();
            for id in ids {
                let new = stream.push(&tokenizer, id).expect("push");
                prop_assert!(!new.contains(char::REPLACEMENT_CHARACTER) || text.contains(char::REPLACEMENT_CHARACTER));
                streamed.push_str(&new);
            }
            streamed.push_str(&stream.finish(&tokenizer).expect("finish"));
            prop_assert_eq!(streamed, text);
        }

        /// Random ids, as an untrained model emits them, never panic and give what decoding at once gives.
        #[test]
        fn streaming_random_ids_gives_the_same_text(ids in prop::collection::vec(0u32..265, 0..60)) {
            let tokenizer = bpe();
            let mut stream = StreamDecoder::new();
            let mut streamed = String::new();
            for &id in &ids {
                streamed.push_str(&stream.push(&tokenizer, id).expect("push"));
            }
            streamed.push_str(&stream.finish(&tokenizer).expect("finish"));
            prop_assert_eq!(streamed, tokenizer.decode(&ids).expect("decode"));
        }
    }
}
