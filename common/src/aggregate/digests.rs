//! What a commit needs to know of a root: digests of its chunks, and the totals that follow from them.

use crate::floats::{bytes_of, sum_of_squares};
use crate::layout::CHUNK_LEN;

/// What a commit wants to know of a chunk's root.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChunkDigest {
    /// Σ x² over the chunk.
    pub sum_of_squares: f64,
    /// BLAKE3 of the chunk's bytes.
    pub hash: [u8; 32],
}

impl ChunkDigest {
    /// That of a chunk's root.
    pub fn of(chunk: &[f32]) -> Self {
        Self {
            sum_of_squares: sum_of_squares(chunk),
            hash: *blake3::hash(bytes_of(chunk)).as_bytes(),
        }
    }
}

/// What the commit needs to know of a complete root.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RootTotals {
    /// Σ x² over the root, chunks combined in index order.
    pub sum_of_squares: f64,
    /// BLAKE3 over the hashes of the chunks.
    pub hash: [u8; 32],
}

impl RootTotals {
    /// Those of a root, from the digests of its chunks in index order.
    pub fn of(chunks: &[ChunkDigest]) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut sum_of_squares = 0.0;
        for chunk in chunks {
            hasher.update(&chunk.hash);
            sum_of_squares += chunk.sum_of_squares;
        }
        Self {
            sum_of_squares,
            hash: *hasher.finalize().as_bytes(),
        }
    }
}

/// The totals of a root that one worker holds whole: the same numbers that an [`Aggregator`](super::Aggregator) finds.
pub fn totals_of(root: &[f32]) -> RootTotals {
    use rayon::prelude::*;
    let chunks: Vec<ChunkDigest> = root.par_chunks(CHUNK_LEN).map(ChunkDigest::of).collect();
    RootTotals::of(&chunks)
}
