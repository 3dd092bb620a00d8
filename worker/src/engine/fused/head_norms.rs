//! The norms of query and key heads inside a block: where their weights, what they keep and their sums over rows lie.

use super::Pass;
use crate::engine::ops::{attention, head_norm, norm::Stats};
use crate::engine::parameters::{Block, HeadNorms};

impl Pass {
    /// Normalised heads of each row; 0 where the block has no such norms.
    pub fn normalised_heads(&self, block: &Block) -> usize {
        let m = &self.fused.model;
        let heads = m.num_attention_heads + m.num_key_value_heads;
        block.head_norms.as_ref().map_or(0, |_| heads)
    }

    /// Normalises the heads of packed rows, and keeps what backward needs of each.
    pub fn normalise_heads(
        &self,
        n: &HeadNorms,
        shape: attention::Shape,
        packed: &mut [f32],
        (raw, stats): (&mut [f32], &mut [Stats]),
    ) {
        let (eps, weights) = (self.fused.model.norm_eps, &self.params[n.weights.clone()]);
        head_norm::forward(shape, eps, packed, raw, stats, weights);
    }

    /// Elements of the partial sums of some samples.
    pub fn head_partials(&self, block: &Block, samples: usize) -> usize {
        let sample = head_norm::partials(self.fused.model.head_dim(), self.length);
        block.head_norms.as_ref().map_or(0, |_| samples * sample)
    }

    /// Takes the gradient in `dpacked` through the norms, and leaves partial sums for [`Self::head_norm_gradient`].
    pub fn normalise_heads_backward(
        &self,
        n: &HeadNorms,
        shape: attention::Shape,
        dpacked: &mut [f32],
        partials: &mut [f32],
        (raw, stats): (&[f32], &[Stats]),
    ) {
        let weights = &self.params[n.weights.clone()];
        head_norm::backward(shape, dpacked, partials, raw, stats, weights);
    }

    /// Takes the gradients of the norms' weights.
    pub fn head_norm_gradient(&self, n: &HeadNorms, partials: &[f32]) {
        if self.trains(&n.weights) {
            self.sum_partials(&mut self.gradient()[n.weights.clone()], partials);
        }
    }
}
