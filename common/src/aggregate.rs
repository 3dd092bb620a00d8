//! Sums contributions along the reduction tree, chunk by chunk. Used by whoever owns a slice of the gradient: the
//! coordinator in a star, a worker that is alone, later the owners of a sharded exchange.
//!
//! A node of a chunk is set once, from a push or from its two children. Later copies are dropped, and a node and its
//! ancestor are never both added. Memory holds only what waits for a sibling, as it arrived or where it lies, plus the
//! root: one segment, which is written once and sent from where it lies.

mod error;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;

use crate::floats::{
    add, add_bytes, add_stamped, bytes_of, from_bf16, round_to_bf16, stamp, sum_of_squares, to_bf16,
};
use crate::ids::{Lane, SessionId};
use crate::layout::{CHUNK_LEN, chunk_count, chunk_range};
use crate::seal::checksum;
use crate::segment::{Part, Segment};
use crate::spec::Payload;
use crate::tree::{Node, Tree};

pub use error::OfferError;

/// What is remembered of a push, so that a copy can be compared long after the first has been summed.
#[derive(Clone, Debug)]
struct Stamp {
    check: Check,
    from: SessionId,
}

/// What a chunk is known by.
#[derive(Clone, Debug)]
enum Check {
    /// CRC-32 of it as it travelled.
    Crc(u32),
    /// It lies here, and is not summed yet.
    Of(Part),
    /// The [`stamp`] of what lay somewhere, taken with the sum.
    Stamp(u64),
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

impl Offered {
    /// Takes in what another push did.
    pub fn join(&mut self, other: Self) {
        self.chunk_complete |= other.chunk_complete;
        self.all_complete |= other.all_complete;
        self.delivered.extend(other.delivered);
    }
}

/// One chunk of a node.
#[derive(Clone, Debug)]
pub enum Data {
    /// As it travels.
    Wire {
        /// Little-endian: f32, or bf16 where that is the payload.
        data: Bytes,
        /// CRC-32 of `data`, which was compared.
        check: u32,
    },
    /// f32 where the worker left it. It stays as it is until the step is committed: until its last root is complete.
    Shared(Part),
}

/// The finished root of one chunk, as it travels.
#[derive(Clone, Debug)]
pub struct RootChunk {
    /// Little-endian: f32, or bf16 where that is the payload.
    pub data: Bytes,
    /// CRC-32 of `data`.
    pub check: u32,
}

/// What is summed in a step of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Lanes.
    pub lanes: u32,
    /// Elements of a gradient.
    pub len: usize,
    /// What nodes are rounded to.
    pub payload: Payload,
}

impl Shape {
    /// Bytes of a gradient in memory.
    pub fn bytes(self) -> usize {
        self.len * 4
    }
}

/// Elements that are summed at a time: what is done to them is done in the innermost cache.
const BLOCK: usize = 2048;

/// Where the root of a step is to lie.
pub type MakeRoot = Box<dyn Fn(usize) -> Arc<Segment> + Send + Sync>;

/// The sums of one step. Safe to share between the streams that feed it; sums are taken outside the locks.
pub struct Aggregator {
    tree: Tree,
    len: usize,
    payload: Payload,
    chunks: Vec<Mutex<ChunkState>>,
    progress: Mutex<Progress>,
    /// Made when there is something to sum: a step that its sole owner sums costs nothing here.
    root: OnceLock<Arc<Segment>>,
    make_root: MakeRoot,
}

impl fmt::Debug for Aggregator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aggregator")
            .field("tree", &self.tree)
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct ChunkState {
    waiting: HashMap<Node, Waiting>,
    stamps: HashMap<Node, Stamp>,
    covered: Vec<bool>,
    /// Somebody writes the root, or has written it.
    claimed: bool,
    root: Option<Arc<Finished>>,
}

/// A summand.
#[derive(Debug)]
enum Waiting {
    Wire(Bytes),
    Shared(Part),
    Sum(Vec<f32>),
}

impl Waiting {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Wire(data) => data,
            Self::Shared(part) => part.as_ref(),
            Self::Sum(sum) => bytes_of(sum),
        }
    }
}

/// What is known of a chunk's root.
#[derive(Debug)]
struct Finished {
    digest: ChunkDigest,
    /// Made for the first who wants it.
    wire: OnceLock<RootChunk>,
}

/// What a commit wants to know of a chunk's root.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChunkDigest {
    /// Σ x² over the chunk.
    pub sum_of_squares: f64,
    /// BLAKE3 of the chunk's bytes.
    pub hash: [u8; 32],
}

#[derive(Debug)]
struct Progress {
    missing_per_lane: Vec<usize>,
    complete: Vec<bool>,
    leading: usize,
    missing: usize,
}

impl Aggregator {
    /// An empty aggregation over `lanes` lanes of gradients of `len` elements, in memory of this process.
    pub fn new(lanes: u32, len: usize) -> Self {
        let private = |bytes| Arc::new(Segment::private(bytes));
        let shape = Shape {
            lanes,
            len,
            payload: Payload::F32,
        };
        Self::with_root(shape, Box::new(private))
    }

    /// An empty aggregation whose root lies in a segment of at least as many bytes as asked for, which nobody reads.
    pub fn with_root(shape: Shape, make_root: MakeRoot) -> Self {
        let Shape {
            lanes,
            len,
            payload,
        } = shape;
        let chunks = chunk_count(len);
        Self {
            tree: Tree::new(lanes),
            len,
            payload,
            chunks: (0..chunks).map(|_| Mutex::default()).collect(),
            progress: Mutex::new(Progress {
                missing_per_lane: vec![chunks; lanes as usize],
                complete: vec![false; chunks],
                leading: 0,
                missing: chunks,
            }),
            root: OnceLock::new(),
            make_root,
        }
    }

    /// The segment of the root.
    pub fn segment(&self) -> &Arc<Segment> {
        self.root.get_or_init(|| (self.make_root)(self.len * 4))
    }

    /// Whether others can read the root where it lies.
    pub fn is_shared(&self) -> bool {
        self.root.get().is_some_and(|root| root.address().is_some())
    }

    /// Elements of the gradient.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
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
        let finished = lock(self.chunks.get(index)?).root.clone()?;
        let make = || {
            let range = chunk_range(index, self.len);
            let part = Part::new(self.segment(), range.start as u64 * 4, range.len() * 4);
            let part = part.expect("chunks lie inside");
            let data: Bytes = match self.payload {
                Payload::F32 => Bytes::from_owner(part),
                Payload::Bf16 => to_bf16(part.floats()).into(),
            };
            let check = checksum(&data);
            RootChunk { data, check }
        };
        Some(finished.wire.get_or_init(make).clone())
    }

    /// Adds one chunk of one node that `from` pushed.
    pub fn offer(
        &self,
        node: Node,
        index: usize,
        data: Data,
        from: SessionId,
    ) -> Result<Offered, OfferError> {
        self.check(node, index, &data)?;
        let mut state = lock(&self.chunks[index]);
        self.compare(&mut state, index, node, &data, from)?;
        let newly: Vec<Lane> = state.cover(self.tree.root().size, node);
        if newly.is_empty() {
            return Ok(Offered::default());
        }
        state.waiting.retain(|held, _| !node.contains(*held));
        drop(state);
        let summand = match data {
            Data::Shared(part) => Waiting::Shared(part),
            Data::Wire { data, .. } => match self.payload {
                Payload::F32 => Waiting::Wire(data),
                Payload::Bf16 => Waiting::Sum(from_bf16(&data)),
            },
        };
        let root = self.climb(node, index, summand);
        Ok(self.advance(index, &newly, root))
    }

    /// Two copies of a node must be the same. The first is remembered.
    fn compare(
        &self,
        state: &mut ChunkState,
        index: usize,
        node: Node,
        data: &Data,
        from: SessionId,
    ) -> Result<(), OfferError> {
        let Some(first) = state.stamps.get(&node) else {
            let check = match data {
                Data::Wire { check, .. } => Check::Crc(*check),
                Data::Shared(part) => Check::Of(part.clone()),
            };
            state.stamps.insert(node, Stamp { check, from });
            return Ok(());
        };
        let shared = matches!(first.check, Check::Of(_)) || matches!(data, Data::Shared(_));
        // Once a step is complete, what was shared for it may be overwritten, and says nothing any more.
        if self.same(&first.check, data) || shared && lock(&self.progress).missing == 0 {
            return Ok(());
        }
        Err(OfferError::Mismatch {
            index,
            node,
            first: first.from,
            second: from,
        })
    }

    fn same(&self, first: &Check, second: &Data) -> bool {
        let travelling = |part: &Part| match self.payload {
            Payload::F32 => checksum(part.as_ref()),
            Payload::Bf16 => checksum(&to_bf16(part.floats())),
        };
        match (first, second) {
            (Check::Crc(first), Data::Wire { check, .. }) => first == check,
            (Check::Crc(first), Data::Shared(part)) => *first == travelling(part),
            (Check::Of(part), Data::Wire { check, .. }) => travelling(part) == *check,
            (Check::Of(first), Data::Shared(second)) => first.as_ref() == second.as_ref(),
            (Check::Stamp(first), Data::Shared(part)) => *first == stamp(part.as_ref(), 0),
            (Check::Stamp(first), Data::Wire { data, .. }) => match self.payload {
                Payload::F32 => *first == stamp(data, 0),
                Payload::Bf16 => *first == stamp(bytes_of(&from_bf16(data)), 0),
            },
        }
    }

    fn check(&self, node: Node, index: usize, data: &Data) -> Result<(), OfferError> {
        if !self.tree.has(node) {
            let lanes = self.tree.root().size;
            return Err(OfferError::NoSuchNode { node, lanes });
        }
        let chunks = self.chunks.len();
        if index >= chunks {
            return Err(OfferError::NoSuchChunk { index, chunks });
        }
        let elements = chunk_range(index, self.len).len();
        let (found, expected) = match data {
            Data::Wire { data, .. } => (data.len(), elements * self.payload.bytes()),
            Data::Shared(part) => (part.as_ref().len(), elements * 4),
        };
        match found == expected {
            true => Ok(()),
            false => Err(OfferError::WrongLength {
                index,
                found,
                expected,
            }),
        }
    }

    /// Sums upwards for as long as the sibling is there. Returns whether the root is now complete.
    fn climb(&self, mut node: Node, index: usize, mut sum: Waiting) -> bool {
        let root = self.tree.root();
        while let Some(family) = self.tree.family(node) {
            let mut state = lock(&self.chunks[index]);
            let Some(sibling) = state.waiting.remove(&family.sibling) else {
                // An ancestor that was pushed meanwhile covers this node: then nobody will ask for it.
                state.waiting.insert(node, sum);
                return false;
            };
            drop(state);
            let summands = [(node, &sum), (family.sibling, &sibling)];
            node = family.parent;
            if node == root {
                return self.finish(index, |out| self.add(index, out, summands));
            }
            let mut out = vec![0.0; chunk_range(index, self.len).len()];
            self.add(index, &mut out, summands);
            sum = Waiting::Sum(out);
        }
        self.finish(index, |out| {
            bytemuck::cast_slice_mut(out).copy_from_slice(sum.bytes());
        })
    }

    /// `out` = the sum, rounded; and the stamps of what is shared are taken on the way.
    fn add(&self, index: usize, out: &mut [f32], summands: [(Node, &Waiting); 2]) {
        let shared = summands.map(|(_, summand)| matches!(summand, Waiting::Shared(_)));
        let [a, b] = summands.map(|(_, summand)| summand.bytes());
        let mut stamps = [0u64; 2];
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let at = block * BLOCK;
            let bytes = at * 4..(at + out.len()) * 4;
            let (a, b) = (&a[bytes.clone()], &b[bytes]);
            if shared == [false; 2] {
                add_bytes(out, a, b);
            } else {
                let (of_a, of_b) = add_stamped(out, a, b, at);
                stamps = [stamps[0].wrapping_add(of_a), stamps[1].wrapping_add(of_b)];
            }
            round(self.payload, out);
        }
        if shared == [false; 2] {
            return;
        }
        let mut state = lock(&self.chunks[index]);
        let nodes = summands.iter().zip(shared).zip(stamps);
        for ((&(node, _), _), found) in nodes.filter(|((_, shared), _)| *shared) {
            if let Some(stamp) = state.stamps.get_mut(&node) {
                stamp.check = Check::Stamp(found);
            }
        }
    }

    /// Writes a chunk of the root, unless somebody else does. Returns whether it is complete now.
    fn finish(&self, index: usize, write: impl FnOnce(&mut [f32])) -> bool {
        let mut state = lock(&self.chunks[index]);
        state.waiting.clear();
        if std::mem::replace(&mut state.claimed, true) {
            return false;
        }
        drop(state);
        // SAFETY: the segment was made for this root, which nobody reads before it is complete; the claim was ours.
        let out = unsafe { self.segment().floats_mut(chunk_range(index, self.len)) };
        write(out);
        let digest = ChunkDigest::of(out);
        lock(&self.chunks[index]).root = Some(Arc::new(Finished {
            digest,
            wire: OnceLock::new(),
        }));
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
        let digest = |chunk: &Mutex<ChunkState>| Some(lock(chunk).root.as_ref()?.digest);
        let digests: Option<Vec<ChunkDigest>> = self.chunks.iter().map(digest).collect();
        digests.map(|digests| RootTotals::of(&digests))
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

impl ChunkDigest {
    /// That of a chunk's root.
    pub fn of(chunk: &[f32]) -> Self {
        Self {
            sum_of_squares: sum_of_squares(chunk),
            hash: *blake3::hash(bytes_of(chunk)).as_bytes(),
        }
    }
}

/// The totals of a root that one worker holds whole: the same numbers that an [`Aggregator`] finds.
pub fn totals_of(root: &[f32]) -> RootTotals {
    use rayon::prelude::*;
    let chunks: Vec<ChunkDigest> = root.par_chunks(CHUNK_LEN).map(ChunkDigest::of).collect();
    RootTotals::of(&chunks)
}

/// `sum += other` for whole gradients, on rayon's current pool.
pub fn add_all(sum: &mut [f32], other: &[f32]) {
    parent(Payload::F32, sum, other);
}

/// f32 values as little-endian bytes.
pub fn encode(values: &[f32]) -> Bytes {
    Bytes::copy_from_slice(bytes_of(values))
}

/// What every node of the tree is rounded to, whether it travels or not.
fn round(payload: Payload, node: &mut [f32]) {
    match payload {
        Payload::F32 => {}
        Payload::Bf16 => round_to_bf16(node),
    }
}

/// Makes a lane's gradient a leaf of the tree, on rayon's current pool.
pub fn leaf(payload: Payload, gradient: &mut [f32]) {
    use rayon::prelude::*;
    if payload != Payload::F32 {
        let chunks = gradient.par_chunks_mut(CHUNK_LEN);
        chunks.for_each(|chunk| round(payload, chunk));
    }
}

/// Makes a node of the tree its sibling's and its own sum, the parent: `node += sibling`. On rayon's current pool.
pub fn parent(payload: Payload, node: &mut [f32], sibling: &[f32]) {
    use rayon::prelude::*;
    assert_eq!(node.len(), sibling.len());
    let chunks = node
        .par_chunks_mut(CHUNK_LEN)
        .zip(sibling.par_chunks(CHUNK_LEN));
    chunks.for_each(|(node, sibling)| {
        add(node, sibling);
        round(payload, node);
    });
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .expect("no thread panics while it holds this lock")
}

#[cfg(test)]
mod tests;
