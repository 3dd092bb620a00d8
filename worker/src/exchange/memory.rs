//! Where gradients lie: nodes in a segment that the owner reads, roots in buffers of this process or in the owner's
//! segment.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Deref, Range};
use std::sync::Arc;

use cohort_common::aggregate::Shape;
use cohort_common::floats::{copy_out, from_bf16};
use cohort_common::ids::Step;
use cohort_common::layout::chunk_range;
use cohort_common::segment::{Address, Part, Segment};
use cohort_common::spec::Payload;
use tracing::debug;

/// Nodes of a step that can be shared; more are sent. A contiguous range of lanes rarely has more.
const SLOTS: usize = 16;

/// Slots begin at pages.
const PAGE: usize = 4096;

/// Segments of the owner that are kept mapped.
const MAPPED: usize = 4;

/// A segment with a slot for each node. It is address space: memory is only what nodes have used.
pub(super) struct NodeMemory {
    segment: Arc<Segment>,
    slot_bytes: usize,
    free: Vec<usize>,
    used: BTreeMap<Step, Vec<usize>>,
    /// The owner's segments, newest last: mapping memory anew costs more than summing it.
    owners: VecDeque<(Address, Arc<Segment>)>,
}

impl NodeMemory {
    /// `None` where memory cannot be shared.
    pub(super) fn new(shape: Shape) -> Option<Self> {
        let slot_bytes = shape.bytes().next_multiple_of(PAGE);
        let segment = slot_bytes.checked_mul(SLOTS).map(Segment::shared)?;
        let segment = segment
            .inspect_err(|error| debug!(%error, "no memory to share: gradients are sent"))
            .ok()?;
        Some(Self {
            segment: Arc::new(segment),
            slot_bytes,
            free: (0..SLOTS).rev().collect(),
            used: BTreeMap::new(),
            owners: VecDeque::new(),
        })
    }

    pub(super) fn address(&self) -> Option<&Address> {
        self.segment.address()
    }

    pub(super) fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// A slot for a node of this step, as its place in bytes.
    pub(super) fn slot(&mut self, step: Step) -> Option<usize> {
        let slot = self.free.pop()?;
        self.used.entry(step).or_default().push(slot);
        Some(slot * self.slot_bytes)
    }

    /// Nobody reads the nodes of steps up to this one any more: what the owner holds of them is summed, or is not needed.
    pub(super) fn free(&mut self, through: Step) {
        while let Some(entry) = self.used.first_entry().filter(|e| *e.key() <= through) {
            self.free.extend(entry.remove());
        }
    }

    /// The owner's segment of that address.
    pub(super) fn owners(&mut self, address: Address) -> std::io::Result<Arc<Segment>> {
        if let Some((_, known)) = self.owners.iter().find(|(known, _)| *known == address) {
            return Ok(known.clone());
        }
        let segment = Arc::new(Segment::open(&address, address.bytes)?);
        self.owners.push_back((address, segment.clone()));
        if self.owners.len() > MAPPED {
            self.owners.pop_front();
        }
        Ok(segment)
    }
}

/// Copies chunks of a node into its slot.
pub(super) fn publish(segment: &Segment, slot: usize, data: &[f32], chunks: Range<usize>) {
    for index in chunks {
        let range = chunk_range(index, data.len());
        let start = slot / 4 + range.start;
        // SAFETY: the segment is of this process; a slot belongs to one node, of which each chunk is copied once, before
        // the owner hears of it.
        let out = unsafe { segment.floats_mut(start..start + range.len()) };
        copy_out(out, &data[range]);
    }
}

/// The root of a step.
#[derive(Debug)]
pub enum Root {
    /// Summed by this worker alone.
    Own(Arc<Vec<f32>>),
    /// Sent by the owner.
    Sent(Vec<f32>),
    /// Where the owner has it.
    Lent(Part),
}

impl Deref for Root {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Own(root) => root,
            Self::Sent(root) => root,
            Self::Lent(part) => part.floats(),
        }
    }
}

/// A root that is on its way.
pub(super) enum Arriving {
    /// Chunk by chunk.
    Sent {
        data: Vec<f32>,
        have: Vec<bool>,
        missing: usize,
    },
    /// Where the owner has it, whole.
    Lent(Arc<Segment>),
}

impl Arriving {
    /// A root to be sent. What a buffer that is used again holds is overwritten before the root is whole.
    pub(super) fn sent(spare: Option<Vec<f32>>, shape: Shape, chunks: usize) -> Self {
        let fits = spare.filter(|spare| spare.len() == shape.len);
        Self::Sent {
            data: fits.unwrap_or_else(|| vec![0.0; shape.len]),
            have: vec![false; chunks],
            missing: chunks,
        }
    }

    pub(super) fn is_whole(&self) -> bool {
        match self {
            Self::Sent { missing, .. } => *missing == 0,
            Self::Lent(_) => true,
        }
    }

    /// The root, once it is whole.
    pub(super) fn root(self, shape: Shape) -> Option<Root> {
        match self {
            Self::Sent { data, .. } => Some(Root::Sent(data)),
            Self::Lent(segment) => Part::new(&segment, 0, shape.bytes()).map(Root::Lent),
        }
    }

    /// Takes in a chunk that was sent. An error if the root is not sent.
    pub(super) fn take(
        &mut self,
        payload: Payload,
        index: usize,
        chunk: &[u8],
    ) -> Result<(), String> {
        let Self::Sent {
            data,
            have,
            missing,
        } = self
        else {
            return Err("a chunk of a root that is shared was sent".into());
        };
        if !std::mem::replace(&mut have[index], true) {
            let range = chunk_range(index, data.len());
            let out = &mut data[range];
            match payload {
                Payload::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(chunk),
                Payload::Bf16 => out.copy_from_slice(&from_bf16(chunk)),
            }
            *missing -= 1;
        }
        Ok(())
    }
}
