//! Texts on their way to tokens: in batches, here or on other machines. What is encoded where changes no token; the batches
//! come back in the order in which they were begun.

use std::sync::Arc;

use rayon::prelude::*;

use super::tokenizer::{Tokenizer, TokenizerError};

/// Text that is encoded here at a time, for each thread of rayon's current pool.
const BYTES_PER_THREAD: usize = 1 << 20;

/// The tokens of each text of a batch, in order; or the number of the first text that has none, and why.
pub type Tokens = Result<Vec<Vec<u32>>, (usize, TokenizerError)>;

/// Encodes batches of texts.
pub trait BatchEncoder: Sync {
    /// Bytes of text that make a batch.
    fn batch_bytes(&self) -> usize;

    /// Batches that are begun before the oldest is waited for. It may change at any time.
    fn width(&self) -> usize;

    /// Begins with a batch.
    fn begin(&self, tokenizer: &Arc<Tokenizer>, texts: Vec<String>) -> Box<dyn PendingBatch + '_>;
}

/// A batch that was begun.
pub trait PendingBatch {
    /// Blocks until it is encoded.
    fn wait(self: Box<Self>) -> Tokens;
}

/// Encodes on this machine, on rayon's current pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Here;

impl BatchEncoder for Here {
    fn batch_bytes(&self) -> usize {
        BYTES_PER_THREAD * rayon::current_num_threads()
    }

    fn width(&self) -> usize {
        0
    }

    fn begin(&self, tokenizer: &Arc<Tokenizer>, texts: Vec<String>) -> Box<dyn PendingBatch> {
        Box::new(Lazily(tokenizer.clone(), texts))
    }
}

/// A batch that is encoded when somebody waits for it.
struct Lazily(Arc<Tokenizer>, Vec<String>);

impl PendingBatch for Lazily {
    fn wait(self: Box<Self>) -> Tokens {
        let Self(tokenizer, texts) = *self;
        encode_batch(&tokenizer, &texts)
    }
}

/// Encodes texts on rayon's current pool.
pub fn encode_batch(tokenizer: &Tokenizer, texts: &[String]) -> Tokens {
    let encoded: Vec<_> = texts
        .par_iter()
        .map(|text| tokenizer.encode(text))
        .collect();
    let numbered = encoded.into_iter().enumerate();
    numbered
        .map(|(number, tokens)| tokens.map_err(|error| (number, error)))
        .collect()
}
