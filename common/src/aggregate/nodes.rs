//! What is done to whole nodes of the tree, by whoever computes them.

use bytes::Bytes;
use rayon::prelude::*;

use crate::floats::{add, bytes_of, round_to_bf16};
use crate::layout::CHUNK_LEN;
use crate::spec::Payload;

/// `sum += other` for whole gradients, on rayon's current pool.
pub fn add_all(sum: &mut [f32], other: &[f32]) {
    parent(Payload::F32, sum, other);
}

/// f32 values as little-endian bytes.
pub fn encode(values: &[f32]) -> Bytes {
    Bytes::copy_from_slice(bytes_of(values))
}

/// What every node of the tree is rounded to, whether it travels or not.
pub(super) fn round(payload: Payload, node: &mut [f32]) {
    match payload {
        Payload::F32 => {}
        Payload::Bf16 => round_to_bf16(node),
    }
}

/// Makes a lane's gradient a leaf of the tree, on rayon's current pool.
pub fn leaf(payload: Payload, gradient: &mut [f32]) {
    if payload != Payload::F32 {
        let chunks = gradient.par_chunks_mut(CHUNK_LEN);
        chunks.for_each(|chunk| round(payload, chunk));
    }
}

/// Makes a node of the tree its sibling's and its own sum, the parent: `node += sibling`. On rayon's current pool.
pub fn parent(payload: Payload, node: &mut [f32], sibling: &[f32]) {
    assert_eq!(node.len(), sibling.len());
    let chunks = node
        .par_chunks_mut(CHUNK_LEN)
        .zip(sibling.par_chunks(CHUNK_LEN));
    chunks.for_each(|(node, sibling)| {
        add(node, sibling);
        round(payload, node);
    });
}
