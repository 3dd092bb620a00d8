//! What is done to whole nodes of the tree, by whoever computes them.

use bytes::Bytes;
use rayon::prelude::*;

use crate::floats::{add, bytes_of, round_to_bf16, round_to_int4, round_to_int8};
use crate::ids::Step;
use crate::layout::CHUNK_LEN;
use crate::rng::{derive_key, philox};
use crate::spec::Payload;
use crate::tree::Node;

/// `sum += other` for whole gradients, on rayon's current pool.
pub fn add_all(sum: &mut [f32], other: &[f32]) {
    parent(NodeRounding::NONE, sum, other);
}

/// f32 values as little-endian bytes.
pub fn encode(values: &[f32]) -> Bytes {
    Bytes::copy_from_slice(bytes_of(values))
}

/// What the nodes of a step are rounded to, whether they travel or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounding {
    payload: Payload,
    key: u64,
    step: Step,
}

impl Rounding {
    /// Of a step of a run with this seed.
    pub fn new(payload: Payload, seed: u64, step: Step) -> Self {
        let key = derive_key(seed, "rounding");
        Self { payload, key, step }
    }

    /// What they are rounded to.
    pub fn payload(self) -> Payload {
        self.payload
    }

    /// How this node is rounded: where chance decides, it is a function of seed, step, node and place alone.
    pub fn of(self, node: Node) -> NodeRounding {
        let step = [self.step as u32, (self.step >> 32) as u32];
        let [low, high, ..] = philox(self.key, [step[0], step[1], node.first, node.size]);
        NodeRounding {
            payload: self.payload,
            key: u64::from(high) << 32 | u64::from(low),
        }
    }
}

/// How one node is rounded.
#[derive(Clone, Copy, Debug)]
pub struct NodeRounding {
    payload: Payload,
    key: u64,
}

impl NodeRounding {
    /// Not at all.
    const NONE: Self = Self {
        payload: Payload::F32,
        key: 0,
    };

    /// Rounds elements of the node, of which the first has this place in the gradient: a multiple of
    /// [`BLOCK`](crate::floats::BLOCK).
    pub fn round(self, values: &mut [f32], place: usize) {
        match self.payload {
            Payload::F32 => {}
            Payload::Bf16 => round_to_bf16(values),
            Payload::Int8 => round_to_int8(values, self.key, place),
            Payload::Int4 => round_to_int4(values, self.key, place),
        }
    }
}

/// Makes a lane's gradient a leaf of the tree, on rayon's current pool.
pub fn leaf(rounding: NodeRounding, gradient: &mut [f32]) {
    if rounding.payload != Payload::F32 {
        let chunks = gradient.par_chunks_mut(CHUNK_LEN).enumerate();
        chunks.for_each(|(index, chunk)| rounding.round(chunk, index * CHUNK_LEN));
    }
}

/// Makes a node of the tree its sibling's and its own sum, the parent, which is rounded like this: `node += sibling`. On
/// rayon's current pool.
pub fn parent(rounding: NodeRounding, node: &mut [f32], sibling: &[f32]) {
    assert_eq!(node.len(), sibling.len());
    let chunks = node
        .par_chunks_mut(CHUNK_LEN)
        .zip(sibling.par_chunks(CHUNK_LEN))
        .enumerate();
    chunks.for_each(|(index, (node, sibling))| {
        add(node, sibling);
        rounding.round(node, index * CHUNK_LEN);
    });
}
