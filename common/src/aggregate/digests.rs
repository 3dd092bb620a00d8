//! What a commit needs to know of a root: digests of its chunks, and the totals that follow from them.

use rayon::prelude::*;

use crate::floats::{bytes_of, sum_of_squares};
use crate::layout::{CHUNK_LEN, in_complete_chunks};

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

/// Digests of a root that one worker holds whole, from its first chunk on. They can be taken while what follows is computed, when
/// the chunks are still in the cache. All on rayon's current pool.
#[derive(Debug, Default)]
pub struct RootDigests(Vec<ChunkDigest>);

impl RootDigests {
    /// Takes those of chunks that are new among so many elements, which do not change any more.
    pub fn look(&mut self, root: &[f32], complete: usize) {
        let new = self.known(root.len())..in_complete_chunks(complete, root.len());
        if !new.is_empty() {
            let chunks = root[new].par_chunks(CHUNK_LEN);
            self.0.par_extend(chunks.map(ChunkDigest::of));
        }
    }

    /// Elements of a root of `len` that have been looked at.
    pub fn known(&self, len: usize) -> usize {
        len.min(self.0.len() * CHUNK_LEN)
    }

    /// The totals of the root, which is complete: the same numbers that an [`Aggregator`](super::Aggregator) finds.
    pub fn totals(mut self, root: &[f32]) -> RootTotals {
        self.look(root, root.len());
        RootTotals::of(&self.0)
    }
}

/// Σ x² over a gradient, chunks combined in index order. On rayon's current pool.
pub fn squares_of(gradient: &[f32]) -> f64 {
    let chunks = gradient.par_chunks(CHUNK_LEN).map(sum_of_squares);
    chunks.collect::<Vec<f64>>().iter().sum()
}

/// The totals of a complete root.
pub fn totals_of(root: &[f32]) -> RootTotals {
    RootDigests::default().totals(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_that_grows_comes_to_the_totals_of_the_whole() {
        let root: Vec<f32> = (0..3 * CHUNK_LEN + 7).map(|i| i as f32 - 1e5).collect();
        let mut grown = RootDigests::default();
        for complete in [
            5,
            CHUNK_LEN - 1,
            CHUNK_LEN,
            CHUNK_LEN + 9,
            3 * CHUNK_LEN + 2,
        ] {
            // What is not complete may still change.
            let mut so_far = root.clone();
            so_far[complete..].fill(f32::NAN);
            grown.look(&so_far, complete);
            assert_eq!(grown.0.len(), complete / CHUNK_LEN);
            assert!(grown.known(root.len()) < root.len());
        }
        let mut whole = RootDigests::default();
        whole.look(&root, root.len());
        assert_eq!(whole.known(root.len()), root.len());
        assert_eq!(whole.totals(&root), grown.totals(&root));
    }
}
