//! What a loss is worth: the losses of models that are counted, not trained, on the same tokens as a validation's.
//!
//! - *uniform*: every token is as likely as any other, ln V;
//! - *unigram*: the frequencies of the training split;
//! - *n-gram*: an interpolated model with the smoothing that became known as Witten-Bell (Witten and Bell 1991, "The
//!   zero-frequency problem", method C; interpolated as in Chen and Goodman 1998): of c(h) tokens that followed the
//!   context h in training, of T(h) kinds,
//!
//! ```text
//! p(w | h) = (c(h, w) + T(h) p(w | h')) / (c(h) + T(h))
//! ```
//!
//! where h' is h without its first token, and below the empty context lies the uniform 1/V. A context ends where its
//! document begins, and so does what is counted: in text every token but the first of a document, in samples the tokens
//! that are learned, as they weigh in a validation. For a classification the tokens are labels and there is no context,
//! so its unigram is the loss of always answering with the training split's frequencies.
//!
//! Nothing is looked up: both sides' n-grams are sorted and merged, order by order. So memory is an integer of 128 bits
//! for each token that is counted and two for each that is scored, and the result depends on nothing but the tokens.
//!
//! They are made once for a corpus and kept beside its shards, in a file that is no part of its fingerprint.

use std::f64::consts::LN_2;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::CorpusError;
use super::objective::Objective;
use super::split::Split;
use super::store::Corpus;

/// The file's name.
pub const BASELINE_FILE: &str = "baseline.json";
/// The version of the file, and of how its numbers are made.
const VERSION: u32 = 1;
/// Tokens of the longest n-gram.
const ORDERS: usize = 5;
/// Bits of one token in a packed n-gram: vocabularies are at most 2^20.
const BITS: u32 = 25;
/// Training tokens that are counted at most: a few seconds, and less than 250 MB.
const COUNTED: u64 = 1 << 22;
/// Validation tokens that are scored at most.
const SCORED: u64 = 1 << 20;

/// Losses on the validation split of models that are counted, in nats per scored token (of a classification, per sample).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baselines {
    /// Of knowing nothing: the logarithm of the number of tokens, or of labels.
    pub uniform: f64,
    /// Of the training split's frequencies; absent where nothing is scored.
    pub unigram: Option<f64>,
    /// Of the best n-gram model; absent for a classification, and where nothing is scored.
    pub ngram: Option<NgramScore>,
}

/// An n-gram model and its loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NgramScore {
    /// Tokens of its n-grams: the order from 1 to 5 with the least loss.
    pub order: u32,
    /// Nats per scored token.
    pub loss: f64,
    /// The same per byte of text.
    pub bits_per_byte: Option<f64>,
    /// Tokens of the training split that were read, its first.
    pub counted: u64,
    /// Tokens of the training split.
    pub of: u64,
    /// Tokens of the validation split that were scored.
    pub scored: u64,
}

/// What is on disk.
#[derive(Serialize, Deserialize)]
struct Kept {
    version: u32,
    baselines: Baselines,
}

/// The baselines that are kept beside a corpus. `None` if there are none, or none that this build understands.
///
/// # Errors
/// The file is there and cannot be read.
pub fn baselines(corpus: &Corpus) -> Result<Option<Baselines>, CorpusError> {
    let path = corpus.directory().join(BASELINE_FILE);
    let json = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        json => json.map_err(CorpusError::read(&path))?,
    };
    let kept = serde_json::from_slice::<Kept>(&json).ok();
    Ok(kept
        .filter(|kept| kept.version == VERSION)
        .map(|kept| kept.baselines))
}

/// The baselines of a corpus; makes and keeps them where there are none. `progress` gets parts done of parts in all.
/// Runs on the calling thread and on rayon's current pool. Only for the owner of the corpus's directory.
///
/// # Errors
/// A shard cannot be read, or the file cannot be written.
pub fn keep_baselines(
    corpus: &Corpus,
    progress: &dyn Fn(u64, u64),
) -> Result<Baselines, CorpusError> {
    if let Some(kept) = baselines(corpus)? {
        return Ok(kept);
    }
    let baselines = compute_baselines(corpus, progress)?;
    let version = VERSION;
    let json = serde_json::to_vec_pretty(&Kept { version, baselines });
    corpus.put(BASELINE_FILE, &json.expect("numbers serialise"))?;
    Ok(baselines)
}

/// Counts and scores, and keeps nothing. See [`keep_baselines`].
///
/// # Errors
/// A shard cannot be read.
pub fn compute_baselines(
    corpus: &Corpus,
    progress: &dyn Fn(u64, u64),
) -> Result<Baselines, CorpusError> {
    let index = corpus.index();
    let supervised = index.supervised.as_ref();
    let classifies = supervised.is_some_and(|s| s.objective == Objective::Classify);
    let (words, orders) = match supervised.filter(|_| classifies) {
        Some(supervised) => (supervised.labels.len(), 1),
        None => (index.tokenizer.vocab_size as usize, ORDERS),
    };
    let parts = orders as u64 + 1;
    progress(0, parts);
    let train = Text::read(corpus, Split::Train, COUNTED)?;
    let validation = Text::read(corpus, Split::Validation, SCORED)?;
    progress(1, parts);
    let told = |order: usize| progress(order as u64 + 1, parts);
    let losses = losses(&train, &validation, (words, orders), &told);
    let uniform = libm::log(words as f64);
    let scored = validation.scored();
    if scored == 0 {
        return Ok(Baselines {
            uniform,
            unigram: None,
            ngram: None,
        });
    }
    let best = losses.iter().enumerate();
    let best = best.min_by(|a, b| a.1.total_cmp(b.1));
    let (place, &loss) = best.expect("there is an order at least");
    let tokens_per_byte = |bytes| index.scored(Split::Validation) as f64 / bytes as f64;
    let ngram = NgramScore {
        order: place as u32 + 1,
        loss,
        bits_per_byte: index
            .scored_bytes(Split::Validation)
            .map(|bytes| loss / LN_2 * tokens_per_byte(bytes)),
        counted: train.tokens.len() as u64,
        of: index.train.tokens,
        scored,
    };
    Ok(Baselines {
        uniform,
        unigram: Some(losses[0]),
        ngram: (!classifies).then_some(ngram),
    })
}

/// The first tokens of one side.
struct Text {
    tokens: Vec<u32>,
    /// For each token how many of its document stand before it, as far as contexts reach.
    history: Vec<u8>,
    /// Whether it is counted, or scored.
    learned: Vec<bool>,
}

impl Text {
    fn read(corpus: &Corpus, split: Split, most: u64) -> Result<Self, CorpusError> {
        let reader = corpus.reader(split);
        let range = 0..reader.tokens().min(most);
        let mut tokens = Vec::with_capacity(range.end as usize);
        reader.copy(range.clone(), &mut tokens)?;
        let learned = reader.learned(range.clone())?;
        let mut begins = vec![false; tokens.len()];
        reader.for_each_start(range, &mut |start| begins[start as usize] = true)?;
        Ok(Self::new(tokens, &begins, learned))
    }

    /// Of tokens, where documents begin, and which are learned.
    fn new(tokens: Vec<u32>, begins: &[bool], mut learned: Vec<bool>) -> Self {
        let mut history = Vec::with_capacity(tokens.len());
        let mut before = 0;
        for (begins, learned) in begins.iter().zip(&mut learned) {
            before = if *begins { 0 } else { before + 1 };
            // Nothing before the first token of a document could predict it.
            *learned &= before > 0;
            history.push(before.min(ORDERS - 1) as u8);
        }
        Self {
            tokens,
            history,
            learned,
        }
    }

    fn scored(&self) -> u64 {
        self.learned.iter().filter(|learned| **learned).count() as u64
    }

    /// The n-grams of an order, each with the place of its last token: in one integer, so that they sort by context.
    fn grams(&self, order: usize) -> impl Iterator<Item = (u128, usize)> + '_ {
        let places = (0..self.tokens.len())
            .filter(move |&at| self.learned[at] && usize::from(self.history[at]) + 1 >= order);
        let pack = |gram: u128, &token: &u32| gram << BITS | u128::from(token);
        places.map(move |at| {
            let gram = self.tokens[at + 1 - order..=at].iter();
            (gram.fold(0, pack), at)
        })
    }

    /// The mean loss of its tokens, where those are as likely as that.
    fn loss(&self, likely: &[f64]) -> f64 {
        let scored = likely.iter().zip(&self.learned);
        let sum: f64 = scored
            .filter(|(_, learned)| **learned)
            .map(|(likely, _)| -libm::log(*likely))
            .sum();
        sum / self.scored() as f64
    }
}

/// The loss of each order from 1 on, of that many words.
fn losses(
    train: &Text,
    validation: &Text,
    (words, orders): (usize, usize),
    done: &dyn Fn(usize),
) -> Vec<f64> {
    let mut likely = vec![1.0 / words as f64; validation.tokens.len()];
    let each = (1..=orders).map(|order| {
        raise(train, validation, order, &mut likely);
        done(order);
        validation.loss(&likely)
    });
    each.collect()
}

/// From the probabilities of the order below to those of `order`. Where a context has never been seen, or is longer than
/// its document, they stay.
fn raise(train: &Text, validation: &Text, order: usize, likely: &mut [f64]) {
    let mut seen: Vec<u128> = train.grams(order).map(|(gram, _)| gram).collect();
    let mut wanted: Vec<(u128, usize)> = validation.grams(order).collect();
    seen.par_sort_unstable();
    wanted.par_sort_unstable();
    let context = |gram: u128| gram >> BITS;
    let same = |a: &u128, b: &u128| context(*a) == context(*b);
    let mut groups = seen.chunk_by(same).peekable();
    for asked in wanted.chunk_by(|a, b| same(&a.0, &b.0)) {
        let here = context(asked[0].0);
        while groups.next_if(|g| context(g[0]) < here).is_some() {}
        let Some(group) = groups.next_if(|g| context(g[0]) == here) else {
            continue;
        };
        let kinds = group.chunk_by(|a, b| a == b).count() as f64;
        let mut words = group.chunk_by(|a, b| a == b).peekable();
        for &(gram, at) in asked {
            while words.next_if(|word| word[0] < gram).is_some() {}
            let word = words.peek().filter(|word| word[0] == gram);
            let count = word.map_or(0, |word| word.len()) as f64;
            likely[at] = (count + kinds * likely[at]) / (group.len() as f64 + kinds);
        }
    }
}

#[cfg(test)]
mod tests;
