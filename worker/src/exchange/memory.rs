//! Where gradients lie: nodes in a segment that the owner reads, roots in buffers of this process or in the owner's
//! segment.

use std::collections::VecDeque;
use std::ops::{Deref, Range};
use std::sync::Arc;

use cohort_common::aggregate::Shape;
use cohort_common::floats::{bytes_of, copy_out};
use cohort_common::ids::Step;
use cohort_common::layout::chunk_range;
use cohort_common::segment::{Address, Part, Segment, Slot, Slots};
use cohort_common::spec::Payload;
use tracing::debug;

use crate::engine::Gradient;

/// Nodes of a step that can be shared; more are sent. A contiguous range of lanes rarely has more.
const SLOTS: usize = 16;

/// Elements of a gradient of which little is still in a core's caches when all of it has come.
const LARGE: usize = 2 << 20;

/// Segments of the owner that are kept mapped.
const MAPPED: usize = 4;

/// A slot for each node. It is address space: memory is only what nodes have used.
pub(super) struct NodeMemory {
    slots: Arc<Slots>,
    /// The owner's segments, newest last: mapping memory anew costs more than summing it.
    owners: VecDeque<(Address, Arc<Segment>)>,
}

impl NodeMemory {
    /// `None` where memory cannot be shared.
    pub(super) fn new(shape: Shape) -> Option<Self> {
        let segment = Segment::shared(Slots::room(shape.len, SLOTS)?)
            .inspect_err(|error| debug!(%error, "no memory to share: gradients are sent"))
            .ok()?;
        Some(Self {
            slots: Slots::of(segment, shape.len),
            owners: VecDeque::new(),
        })
    }

    pub(super) fn address(&self) -> Option<&Address> {
        self.slots.segment().address()
    }

    /// Memory for a gradient that the owner will read where it is computed.
    pub(super) fn buffer(&self) -> Option<Gradient> {
        self.slots.take().map(Gradient::from)
    }

    /// Whether a gradient lies in one of the slots.
    pub(super) fn has(&self, gradient: &Gradient) -> bool {
        gradient.slot().is_some_and(|slot| slot.is_of(&self.slots))
    }

    /// Where the owner reads what is complete of a gradient, if it lies in a slot. The rest is still written; what is told
    /// to be complete must stay, until the step is committed.
    pub(super) fn lies(&self, gradient: &Gradient) -> Option<Place> {
        let here = gradient.slot().filter(|slot| slot.is_of(&self.slots))?;
        Some(Place {
            offset: here.offset(),
            copy: None,
        })
    }

    /// Where the owner reads a node of this step from now on: where it lies already, or in a slot that it is copied to.
    pub(super) fn place(&self, step: Step, node: &Gradient) -> Option<Place> {
        if let Some(here) = self.lies(node) {
            node.slot().expect("it lies in one").lend(step);
            return Some(here);
        }
        let copy = self.slots.take()?;
        copy.lend(step);
        Some(Place {
            offset: copy.offset(),
            copy: Some(Arc::new(copy)),
        })
    }

    /// Nobody reads the nodes of steps up to this one any more: what the owner holds of them is summed, or is not needed.
    pub(super) fn free(&self, through: Step) {
        self.slots.release(through);
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

/// Where the owner reads a node.
#[derive(Clone)]
pub(super) struct Place {
    /// In bytes.
    pub offset: usize,
    /// The slot that it is copied to, if it does not lie there. Nobody else gets it while something is copied.
    pub copy: Option<Arc<Slot>>,
}

impl Place {
    /// Copies chunks of a node there, unless they are there.
    pub(super) fn publish(&self, data: &[f32], chunks: Range<usize>) {
        let Some(slot) = &self.copy else { return };
        for index in chunks {
            let range = chunk_range(index, data.len());
            // SAFETY: each chunk of the node is copied once, before the owner hears of it.
            let out = unsafe { slot.part_mut(range.clone()) };
            copy_out(out, bytes_of(&data[range]));
        }
    }
}

/// The root of a step.
#[derive(Debug)]
pub enum Root {
    /// Summed by this worker alone.
    Own(Arc<Gradient>),
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

/// A root, or parameters, on their way.
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
    /// To be sent: the chunks that are `due`. What a buffer that is used again holds of them is overwritten before all are
    /// here; memory of the others is not touched.
    pub(super) fn sent(spare: Option<Vec<f32>>, shape: Shape, due: impl Fn(usize) -> bool) -> Self {
        let fits = spare.filter(|spare| spare.len() == shape.len);
        let have: Vec<bool> = (0..shape.chunks()).map(|index| !due(index)).collect();
        Self::Sent {
            data: fits.unwrap_or_else(|| vec![0.0; shape.len]),
            missing: have.iter().filter(|have| !**have).count(),
            have,
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

    /// Takes in a chunk, unless it is there or the root lies elsewhere. Says whether the root is whole now, and was not.
    pub(super) fn take(&mut self, payload: Payload, index: usize, chunk: &[u8]) -> bool {
        let Self::Sent {
            data,
            have,
            missing,
        } = self
        else {
            return false;
        };
        if std::mem::replace(&mut have[index], true) {
            return false;
        }
        let large = data.len() >= LARGE;
        let range = chunk_range(index, data.len());
        let out = &mut data[range];
        match payload {
            Payload::F32 if large => copy_out(out, chunk),
            Payload::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(chunk),
            payload => out.copy_from_slice(&payload.from_wire(chunk, out.len())),
        }
        *missing -= 1;
        *missing == 0
    }
}
