//! Sums contributions along the reduction tree, chunk by chunk. Used by whoever owns a slice of the gradient, which is a
//! contiguous range of its chunks: all of them for the coordinator in a star.
//!
//! A node of a chunk is set once, from a push or from its two children. Later copies are dropped, and a node and its
//! ancestor are never both added. Memory holds only what waits for a sibling, as it arrived or where it lies, plus the
//! slice's root: one segment, which is written once and sent from where it lies. Of chunks that others own, nodes can be summed
//! and passed on ([`Duty`]). `data.rs` has the ways in which a chunk
//! comes and how copies are compared, `digests.rs` what a commit wants to know, `nodes.rs` what is done to whole nodes.

mod data;
mod digests;
mod duty;
mod error;
mod nodes;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use bytes::Bytes;

use crate::floats::{add_bytes, add_stamped, bytes_of};
use crate::ids::{Lane, SessionId, Step};
use crate::layout::{CHUNK_LEN, chunk_count, chunk_range};
use crate::seal::checksum;
use crate::segment::{Part, Segment};
use crate::spec::Payload;
use crate::tree::{Node, Tree};
use data::{Check, Form, Stamp, Waiting};

pub use data::Data;
pub use digests::{ChunkDigest, RootDigests, RootTotals, squares_of, totals_of};
pub use duty::{Duty, Passed};
pub use error::OfferError;
pub use nodes::{NodeRounding, Rounding, add_all, encode, leaf, parent};

/// What a push did.
#[derive(Debug, Default, PartialEq)]
pub struct Offered {
    /// Whether this push finished the chunk: its root, or the last of what is passed on of it.
    pub chunk_complete: bool,
    /// Whether this push finished the last missing root of the slice.
    pub all_complete: bool,
    /// Lanes whose contribution is now held for every chunk for which it is pushed here.
    pub delivered: Vec<Lane>,
    /// What is to be passed on.
    pub passed: Option<Passed>,
}

impl Offered {
    /// Takes in what another push did, where nothing is passed on.
    pub fn join(&mut self, other: Self) {
        self.chunk_complete |= other.chunk_complete;
        self.all_complete |= other.all_complete;
        self.delivered.extend(other.delivered);
    }
}

/// The finished root of one chunk, as it travels.
#[derive(Clone, Debug)]
pub struct RootChunk {
    /// As the run's payload says.
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
    /// The run's seed, of which chance in rounding is made.
    pub seed: u64,
}

impl Shape {
    /// Bytes of a gradient in memory.
    pub fn bytes(self) -> usize {
        self.len * 4
    }

    /// Chunks of a gradient.
    pub fn chunks(self) -> usize {
        chunk_count(self.len)
    }

    /// How a step's nodes are rounded.
    pub fn rounding(self, step: Step) -> Rounding {
        Rounding::new(self.payload, self.seed, step)
    }
}

/// Elements that are summed at a time: what is done to them is done in the innermost cache.
const BLOCK: usize = 2048;

/// Where the root of a step is to lie.
pub type MakeRoot = Box<dyn Fn(usize) -> Arc<Segment> + Send + Sync>;

/// The sums of one step over a slice of the gradient. Chunks are named by their index in the whole gradient. Safe to
/// share between the streams that feed it; sums are taken outside the locks.
pub struct Aggregator {
    tree: Tree,
    len: usize,
    rounding: Rounding,
    duty: Duty,
    /// Those of the duty.
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
            .field("duty", &self.duty)
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

/// What is known of a chunk's root.
#[derive(Debug)]
struct Finished {
    digest: ChunkDigest,
    /// CRC-32 of its f32, if they are to travel.
    check: Option<u32>,
    /// Made for the first who wants it.
    wire: OnceLock<RootChunk>,
}

#[derive(Debug)]
struct Progress {
    missing_per_lane: Vec<usize>,
    /// For each chunk, what is not finished: its root, or nodes to be passed on.
    open: Vec<usize>,
    /// Index of the first chunk of which something is not.
    leading: usize,
    /// Roots.
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
            seed: 0,
        };
        Self::with_root(shape, 0, 0..shape.chunks(), Box::new(private))
    }

    /// An empty aggregation in a step, of what is this worker's to sum: a slice, or more. The slice's root lies in a segment of at
    /// least as many bytes as asked for, which nobody reads. A slice without chunks has nothing to wait for, and nothing is ever
    /// said of it.
    ///
    /// # Panics
    /// If the chunks lie outside the gradient, or the slice outside the chunks.
    pub fn with_root(shape: Shape, step: Step, duty: impl Into<Duty>, make_root: MakeRoot) -> Self {
        let Shape { lanes, len, .. } = shape;
        let duty: Duty = duty.into();
        duty.check(shape.chunks());
        let open: Vec<usize> = duty.chunks.clone().map(|i| duty.ends_of(i)).collect();
        let leading = open.iter().position(|open| *open > 0);
        let held_of = |lane| duty.chunks_of(lane);
        Self {
            tree: Tree::new(lanes),
            len,
            rounding: shape.rounding(step),
            chunks: duty.chunks.clone().map(|_| Mutex::default()).collect(),
            progress: Mutex::new(Progress {
                missing_per_lane: (0..lanes).map(held_of).collect(),
                leading: duty.chunks.start + leading.unwrap_or(open.len()),
                open,
                missing: duty.owned.len(),
            }),
            duty,
            root: OnceLock::new(),
            make_root,
        }
    }

    /// The segment of the slice's root, which begins with the slice's first element.
    pub fn segment(&self) -> &Arc<Segment> {
        self.root.get_or_init(|| {
            let [start, end] = [self.duty.owned.start, self.duty.owned.end].map(|i| i * CHUNK_LEN);
            (self.make_root)((end.min(self.len) - start.min(self.len)) * 4)
        })
    }

    /// Where a chunk lies in the slice's root, in elements.
    fn place(&self, index: usize) -> Range<usize> {
        let first = self.duty.owned.start * CHUNK_LEN;
        let range = chunk_range(index, self.len);
        range.start - first..range.end - first
    }

    fn payload(&self) -> Payload {
        self.rounding.payload()
    }

    fn form(&self, index: usize) -> Form {
        Form {
            payload: self.payload(),
            elements: chunk_range(index, self.len).len(),
        }
    }

    fn chunk(&self, index: usize) -> MutexGuard<'_, ChunkState> {
        lock(&self.chunks[index - self.duty.chunks.start])
    }

    /// Whether others can read the root where it lies.
    pub fn is_shared(&self) -> bool {
        self.root.get().is_some_and(|root| root.address().is_some())
    }

    /// Elements of the whole gradient.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The chunks whose roots are summed here.
    pub fn slice(&self) -> Range<usize> {
        self.duty.owned.clone()
    }

    /// The chunks that are pushed here.
    pub fn chunks(&self) -> Range<usize> {
        self.duty.chunks.clone()
    }

    /// Index of the first chunk that is not finished: whose root is not complete, or of which something is still to be passed
    /// on. One past the last when all are.
    pub fn leading(&self) -> usize {
        lock(&self.progress).leading
    }

    /// The finished root of a chunk, if it is finished.
    pub fn root(&self, index: usize) -> Option<RootChunk> {
        let index = Some(index).filter(|index| self.duty.owned.contains(index))?;
        let finished = self.chunk(index).root.clone()?;
        let make = || {
            let part = self.part(index);
            let data: Bytes = match self.payload() {
                Payload::F32 => Bytes::from_owner(part),
                payload => payload.to_wire(part.floats()).into(),
            };
            let check = finished.check.unwrap_or_else(|| checksum(&data));
            RootChunk { data, check }
        };
        Some(finished.wire.get_or_init(make).clone())
    }

    /// The f32 of a chunk's root, if it is finished.
    pub fn values(&self, index: usize) -> Option<Part> {
        let index = Some(index).filter(|index| self.duty.owned.contains(index))?;
        self.chunk(index).root.as_ref()?;
        Some(self.part(index))
    }

    fn part(&self, index: usize) -> Part {
        let range = self.place(index);
        let part = Part::new(self.segment(), range.start as u64 * 4, range.len() * 4);
        part.expect("chunks lie inside")
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
        let mut state = self.chunk(index);
        self.compare(&mut state, index, node, &data, from)?;
        let newly: Vec<Lane> = state.cover(self.tree.root().size, node);
        if newly.is_empty() {
            return Ok(Offered::default());
        }
        if newly.len() < node.size as usize {
            // Parts of it that wait are in it once more.
            state.waiting.retain(|held, _| !node.contains(*held));
        }
        drop(state);
        let summand = Waiting::new(data, self.form(index));
        let (ends, passed) = match self.climb(node, index, summand) {
            Climbed::Waits => (false, None),
            Climbed::Root => (true, None),
            // It is finished when it has gone.
            Climbed::Passes(passed) => (false, Some(passed)),
        };
        let offered = self.advance(index, &newly, ends);
        Ok(Offered { passed, ..offered })
    }

    /// Something of a chunk was passed on: it need not be held up here any longer.
    ///
    /// # Panics
    /// If nothing of it was to be passed on.
    pub fn passed_on(&self, index: usize) -> Offered {
        self.advance(index, &[], true)
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
                // Nobody will sum it, so it need not be held.
                Data::Here(_) if state.covers(node) => Check::Stamp(data.stamp(self.form(index))),
                data => Check::new(data),
            };
            state.stamps.insert(node, Stamp { check, from });
            return Ok(());
        };
        let shared = matches!(first.check, Check::Of(_)) || matches!(data, Data::Shared(_));
        // Once a step is complete, what was shared for it may be overwritten, and says nothing any more.
        if first.check.matches(data, self.form(index))
            || shared && lock(&self.progress).missing == 0
        {
            return Ok(());
        }
        Err(OfferError::Mismatch {
            index,
            node,
            first: first.from,
            second: from,
        })
    }

    fn check(&self, node: Node, index: usize, data: &Data) -> Result<(), OfferError> {
        if !self.tree.has(node) {
            let lanes = self.tree.root().size;
            return Err(OfferError::NoSuchNode { node, lanes });
        }
        let chunks = chunk_count(self.len);
        if index >= chunks {
            return Err(OfferError::NoSuchChunk { index, chunks });
        }
        if !self.duty.chunks.contains(&index) {
            let slice = self.chunks();
            return Err(OfferError::NotOwned { index, slice });
        }
        if !self.duty.takes(node, index) {
            return Err(OfferError::NotNear { index, node });
        }
        let (found, expected) = data.sizes(self.form(index));
        match found == expected {
            true => Ok(()),
            false => Err(OfferError::WrongLength {
                index,
                found,
                expected,
            }),
        }
    }

    /// Sums upwards for as long as the sibling is there.
    fn climb(&self, mut node: Node, index: usize, mut sum: Waiting) -> Climbed {
        let root = self.tree.root();
        loop {
            if self.duty.passes(node, index) {
                let sum = sum.into_bytes();
                return Climbed::Passes(Passed { node, index, sum });
            }
            let Some(family) = self.tree.family(node) else {
                break;
            };
            let mut state = self.chunk(index);
            let Some(sibling) = state.waiting.remove(&family.sibling) else {
                // An ancestor that was pushed meanwhile may cover this node: then nobody will ask for it, and where the
                // root is being written nobody holds it either.
                if !state.claimed {
                    state.waiting.insert(node, sum);
                }
                return Climbed::Waits;
            };
            drop(state);
            let summands = [(node, &sum), (family.sibling, &sibling)];
            node = family.parent;
            if node == root && self.duty.owned.contains(&index) {
                return self.finish(index, |out| self.add(index, node, out, summands));
            }
            let mut out = vec![0.0; chunk_range(index, self.len).len()];
            self.add(index, node, &mut out, summands);
            sum = Waiting::Sum(out);
        }
        self.finish(index, |out| {
            bytemuck::cast_slice_mut(out).copy_from_slice(sum.bytes());
        })
    }

    /// `out` = the sum, rounded as `node`; and the stamps of what did not travel are taken on the way.
    fn add(&self, index: usize, node: Node, out: &mut [f32], summands: [(Node, &Waiting); 2]) {
        let rounding = self.rounding.of(node);
        let first = chunk_range(index, self.len).start;
        let stamped = summands.map(|(_, summand)| summand.wants_stamp());
        let [a, b] = summands.map(|(_, summand)| summand.bytes());
        let mut stamps = [0u64; 2];
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let at = block * BLOCK;
            let bytes = at * 4..(at + out.len()) * 4;
            let (a, b) = (&a[bytes.clone()], &b[bytes]);
            if stamped == [false; 2] {
                add_bytes(out, a, b);
            } else {
                let (of_a, of_b) = add_stamped(out, a, b, at);
                stamps = [stamps[0].wrapping_add(of_a), stamps[1].wrapping_add(of_b)];
            }
            rounding.round(out, first + at);
        }
        if stamped == [false; 2] {
            return;
        }
        let mut state = self.chunk(index);
        let nodes = summands.iter().zip(stamped).zip(stamps);
        for ((&(node, _), _), found) in nodes.filter(|((_, stamped), _)| *stamped) {
            if let Some(stamp) = state.stamps.get_mut(&node) {
                stamp.check = Check::Stamp(found);
            }
        }
    }

    /// Writes a chunk of the root, unless somebody else does.
    fn finish(&self, index: usize, write: impl FnOnce(&mut [f32])) -> Climbed {
        let mut state = self.chunk(index);
        state.waiting.clear();
        if std::mem::replace(&mut state.claimed, true) {
            return Climbed::Waits;
        }
        drop(state);
        // SAFETY: the segment was made for this root, which nobody reads before it is complete; the claim was ours.
        let out = unsafe { self.segment().floats_mut(self.place(index)) };
        write(out);
        let digest = ChunkDigest::of(out);
        // Taken while it is in the cache.
        let travels = self.payload() == Payload::F32 && !self.is_shared();
        let check = travels.then(|| checksum(bytes_of(out)));
        let mut state = self.chunk(index);
        state.root = Some(Arc::new(Finished {
            digest,
            check,
            wire: OnceLock::new(),
        }));
        let stamps = state.stamps.values_mut();
        stamps.for_each(|stamp| stamp.check.let_go());
        Climbed::Root
    }

    /// `ends` says whether the root is complete now, or something was passed on.
    fn advance(&self, index: usize, newly: &[Lane], ends: bool) -> Offered {
        let mut progress = lock(&self.progress);
        let mut offered = Offered::default();
        for &lane in newly {
            let missing = &mut progress.missing_per_lane[lane as usize];
            *missing -= 1;
            if *missing == 0 {
                offered.delivered.push(lane);
            }
        }
        if ends {
            let first = self.duty.chunks.start;
            let open = &mut progress.open[index - first];
            *open -= 1;
            offered.chunk_complete = *open == 0;
            while progress.open.get(progress.leading - first) == Some(&0) {
                progress.leading += 1;
            }
            if self.duty.owned.contains(&index) {
                progress.missing -= 1;
                offered.all_complete = progress.missing == 0;
            }
        }
        offered
    }

    /// What is to be known of the slice's chunks, in index order; `None` until every root is complete.
    pub fn digests(&self) -> Option<Vec<ChunkDigest>> {
        let digest = |index| Some(self.chunk(index).root.as_ref()?.digest);
        self.slice().map(digest).collect()
    }

    /// The sums over all chunks of the slice, in index order; `None` until every root is complete.
    pub fn totals(&self) -> Option<RootTotals> {
        self.digests().map(|digests| RootTotals::of(&digests))
    }
}

/// What has become of a summand.
enum Climbed {
    /// It waits for its sibling, or nobody needs it.
    Waits,
    /// The root is complete with it.
    Root,
    /// A node is complete that is to be passed on.
    Passes(Passed),
}

impl ChunkState {
    /// Whether every lane of `node` is covered.
    fn covers(&self, node: Node) -> bool {
        let covered = |lane: Lane| self.covered.get(lane as usize) == Some(&true);
        node.lanes().all(covered)
    }

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .expect("no thread panics while it holds this lock")
}

#[cfg(test)]
mod tests;
