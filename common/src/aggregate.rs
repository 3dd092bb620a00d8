//! Sums contributions along the reduction tree, chunk by chunk. Used by whoever owns a slice of the gradient: the
//! coordinator in a star, a worker that is alone, later the owners of a sharded exchange.
//!
//! A node of a chunk is set once, from a push or from its two children. Later copies are dropped, and a node and its
//! ancestor are never both added. Memory holds only what waits for a sibling, plus the finished chunks.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use thiserror::Error;

use crate::ids::{Lane, SessionId};
use crate::layout::{chunk_count, chunk_range};
use crate::tree::{Node, Tree};

/// Why a push was refused. Each means a broken or hostile peer; the state is unchanged.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OfferError {
    /// The node is not part of the run's tree.
    #[error("{node} is not a node of the tree over {lanes} lanes")]
    NoSuchNode {
        /// What was pushed.
        node: Node,
        /// Lanes of the run.
        lanes: u32,
    },
    /// The chunk lies outside the gradient.
    #[error("chunk {index} lies outside the {chunks} chunks of this gradient")]
    NoSuchChunk {
        /// What was pushed.
        index: usize,
        /// Chunks of the gradient.
        chunks: usize,
    },
    /// The payload has the wrong size.
    #[error("chunk {index} has {found} bytes where {expected} were expected")]
    WrongLength {
        /// The chunk.
        index: usize,
        /// Bytes that were pushed.
        found: usize,
        /// Bytes of this chunk.
        expected: usize,
    },
    /// Two workers computed different bits for the same node.
    #[error(
        "workers {first} and {second} disagree on the gradient of {node} (chunk {index}); one of the two machines computes wrongly"
    )]
    Mismatch {
        /// The chunk.
        index: usize,
        /// The node.
        node: Node,
        /// Who pushed it first.
        first: SessionId,
        /// Who pushed it again.
        second: SessionId,
    },
}

/// What is remembered of a push, so that a copy can be compared long after the first has been summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// CRC-32 of the data.
    pub check: u32,
    /// Who pushed it.
    pub from: SessionId,
}

/// What a push did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Offered {
    /// Whether this push finished the chunk's root.
    pub chunk_complete: bool,
    /// Whether this push finished the last missing chunk.
    pub all_complete: bool,
    /// Lanes whose contribution is now held for every chunk.
    pub delivered: Vec<Lane>,
}

/// The finished root of one chunk.
#[derive(Clone, Debug)]
pub struct RootChunk {
    /// f32 little-endian.
    pub data: Bytes,
    /// Σ x² in f64, elements in order.
    pub sum_of_squares: f64,
    /// BLAKE3 of `data`.
    pub hash: [u8; 32],
    /// CRC-32 of `data`.
    pub check: u32,
}

/// The sums of one step. Safe to share between the streams that feed it; sums are taken outside the locks.
#[derive(Debug)]
pub struct Aggregator {
    tree: Tree,
    len: usize,
    chunks: Vec<Mutex<ChunkState>>,
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct ChunkState {
    waiting: HashMap<Node, Vec<f32>>,
    stamps: HashMap<Node, Stamp>,
    covered: Vec<bool>,
    root: Option<RootChunk>,
}

#[derive(Debug)]
struct Progress {
    missing_per_lane: Vec<usize>,
    complete: Vec<bool>,
    leading: usize,
    missing: usize,
}

impl Aggregator {
    /// An empty aggregation over `lanes` lanes of gradients of `len` elements.
    pub fn new(lanes: u32, len: usize) -> Self {
        let chunks = chunk_count(len);
        Self {
            tree: Tree::new(lanes),
            len,
            chunks: (0..chunks).map(|_| Mutex::default()).collect(),
            progress: Mutex::new(Progress {
                missing_per_lane: vec![chunks; lanes as usize],
                complete: vec![false; chunks],
                leading: 0,
                missing: chunks,
            }),
        }
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Number of chunks, counted from the first, whose roots are all complete.
    pub fn leading(&self) -> usize {
        lock(&self.progress).leading
    }

    /// The finished root of a chunk, if it is finished.
    pub fn root(&self, index: usize) -> Option<RootChunk> {
        lock(self.chunks.get(index)?).root.clone()
    }

    /// Adds one chunk of one node. `data` is f32 little-endian.
    pub fn offer(
        &self,
        node: Node,
        index: usize,
        data: &[u8],
        stamp: Stamp,
    ) -> Result<Offered, OfferError> {
        self.check(node, index, data)?;
        let mut state = lock(&self.chunks[index]);
        let known = *state.stamps.entry(node).or_insert(stamp);
        if known.check != stamp.check {
            let (first, second) = (known.from, stamp.from);
            return Err(OfferError::Mismatch {
                index,
                node,
                first,
                second,
            });
        }
        let newly: Vec<Lane> = state.cover(self.tree.root().size, node);
        if newly.is_empty() {
            return Ok(Offered::default());
        }
        state.waiting.retain(|held, _| !node.contains(*held));
        drop(state);
        let root = self.climb(node, index, decode(data));
        Ok(self.advance(index, &newly, root))
    }

    fn check(&self, node: Node, index: usize, data: &[u8]) -> Result<(), OfferError> {
        if !self.tree.has(node) {
            let lanes = self.tree.root().size;
            return Err(OfferError::NoSuchNode { node, lanes });
        }
        let chunks = self.chunks.len();
        if index >= chunks {
            return Err(OfferError::NoSuchChunk { index, chunks });
        }
        let expected = chunk_range(index, self.len).len() * 4;
        if data.len() != expected {
            return Err(OfferError::WrongLength {
                index,
                found: data.len(),
                expected,
            });
        }
        Ok(())
    }

    /// Sums upwards for as long as the sibling is there. Returns whether the root is now complete.
    fn climb(&self, mut node: Node, index: usize, mut sum: Vec<f32>) -> bool {
        while let Some(family) = self.tree.family(node) {
            let mut state = lock(&self.chunks[index]);
            let Some(sibling) = state.waiting.remove(&family.sibling) else {
                // An ancestor that was pushed meanwhile covers this node: then nobody will ask for it.
                state.waiting.insert(node, sum);
                return false;
            };
            drop(state);
            // Addition commutes to the bit, so the sum may be taken into either buffer.
            add(&mut sum, &sibling);
            node = family.parent;
        }
        let root = finish(&sum);
        let mut state = lock(&self.chunks[index]);
        state.waiting.clear();
        if state.root.is_some() {
            return false;
        }
        state.root = Some(root);
        true
    }

    fn advance(&self, index: usize, newly: &[Lane], root: bool) -> Offered {
        let mut progress = lock(&self.progress);
        let mut offered = Offered::default();
        for &lane in newly {
            let missing = &mut progress.missing_per_lane[lane as usize];
            *missing -= 1;
            if *missing == 0 {
                offered.delivered.push(lane);
            }
        }
        if root {
            progress.complete[index] = true;
            progress.missing -= 1;
            while progress.complete.get(progress.leading) == Some(&true) {
                progress.leading += 1;
            }
            offered.chunk_complete = true;
            offered.all_complete = progress.missing == 0;
        }
        offered
    }

    /// The sums over all chunks, in index order; `None` until every root is complete.
    pub fn totals(&self) -> Option<RootTotals> {
        let mut hasher = blake3::Hasher::new();
        let mut sum_of_squares = 0.0;
        for chunk in &self.chunks {
            let state = lock(chunk);
            let root = state.root.as_ref()?;
            hasher.update(&root.hash);
            sum_of_squares += root.sum_of_squares;
        }
        Some(RootTotals {
            sum_of_squares,
            hash: *hasher.finalize().as_bytes(),
        })
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

/// The totals of a root that one worker holds whole: the same numbers that an [`Aggregator`] finds.
pub fn totals_of(root: &[f32]) -> RootTotals {
    use rayon::prelude::*;
    let chunks: Vec<RootChunk> = (0..chunk_count(root.len()))
        .into_par_iter()
        .map(|index| {
            let mut chunk = finish(&root[chunk_range(index, root.len())]);
            chunk.data = Bytes::new();
            chunk
        })
        .collect();
    let mut hasher = blake3::Hasher::new();
    let mut sum_of_squares = 0.0;
    for chunk in &chunks {
        hasher.update(&chunk.hash);
        sum_of_squares += chunk.sum_of_squares;
    }
    RootTotals {
        sum_of_squares,
        hash: *hasher.finalize().as_bytes(),
    }
}

/// `sum += other`, element by element.
pub fn add(sum: &mut [f32], other: &[f32]) {
    assert_eq!(sum.len(), other.len());
    for (a, b) in sum.iter_mut().zip(other) {
        *a += b;
    }
}

/// [`add`] for whole gradients, on rayon's current pool.
pub fn add_all(sum: &mut [f32], other: &[f32]) {
    use rayon::prelude::*;
    assert_eq!(sum.len(), other.len());
    let len = crate::layout::CHUNK_LEN;
    let chunks = sum.par_chunks_mut(len).zip(other.par_chunks(len));
    chunks.for_each(|(sum, other)| add(sum, other));
}

/// f32 values as little-endian bytes.
pub fn encode(values: &[f32]) -> Bytes {
    let mut out = Vec::with_capacity(values.len() * 4);
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    out.into()
}

/// Little-endian bytes as f32 values; a rest of less than four bytes is left out.
pub fn decode(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

impl ChunkState {
    /// Marks the lanes of `node` as covered and returns those that were not. If only some are new, the others'
    /// contributions are replaced: `node` is the better cover.
    fn cover(&mut self, lanes: u32, node: Node) -> Vec<Lane> {
        if self.covered.is_empty() {
            self.covered = vec![false; lanes as usize];
        }
        let covered = &mut self.covered;
        let newly = node.lanes().filter(|&l| !covered[l as usize]).collect();
        node.lanes().for_each(|l| covered[l as usize] = true);
        newly
    }
}

fn finish(sum: &[f32]) -> RootChunk {
    let data = encode(sum);
    RootChunk {
        sum_of_squares: sum.iter().map(|&x| f64::from(x) * f64::from(x)).sum(),
        hash: *blake3::hash(&data).as_bytes(),
        check: crc32fast::hash(&data),
        data,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .expect("no thread panics while it holds this lock")
}
