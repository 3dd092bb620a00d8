//! Generation one token at a time: keys and values of the tokens so far are kept, so that a new token costs one row.

use std::sync::Arc;

use super::{Fused, head};
use crate::engine::ops::attention::{Inputs, Shape};

/// Keys and values of one block, rotated where the model rotates.
pub struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
    rows: usize,
}

impl LayerCache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Appends the keys and values of packed rows.
    pub fn push(&mut self, packed: &[f32], shape: Shape) {
        let (q, kv) = (shape.width(), shape.kv_heads * shape.dim);
        for row in packed.chunks_exact(shape.packed()) {
            self.keys.extend_from_slice(&row[q..q + kv]);
            self.values.extend_from_slice(&row[q + kv..]);
            self.rows += 1;
        }
    }

    /// Queries of packed rows against all keys and values.
    pub fn inputs<'a>(&'a self, packed: &'a [f32], shape: Shape) -> Inputs<'a> {
        Inputs {
            q: packed,
            q_stride: shape.packed(),
            k: &self.keys,
            v: &self.values,
            kv_stride: shape.kv_heads * shape.dim,
            starts: &[],
        }
    }
}

/// Keys and values of all blocks for one sequence.
pub struct Cache {
    layers: Vec<LayerCache>,
}

impl Fused {
    /// An empty cache.
    pub fn cache(&self) -> Cache {
        let empty = || LayerCache {
            keys: Vec::new(),
            values: Vec::new(),
            rows: 0,
        };
        Cache {
            layers: self.parameters.blocks.iter().map(|_| empty()).collect(),
        }
    }

    /// Feeds `tokens`, which follow those in the cache, and returns the logits after the last one.
    pub fn extend(
        self: &Arc<Self>,
        params: &Arc<Vec<f32>>,
        cache: &mut Cache,
        tokens: &[u32],
    ) -> Vec<f32> {
        let start = cache.len();
        assert!(
            !tokens.is_empty() && start + tokens.len() <= self.model.context,
            "tokens beyond the context"
        );
        let pass = self.sequence(params, tokens);
        let mut x = self.buffers.take(tokens.len() * pass.width());
        let mut y = self.buffers.take(x.len());
        pass.embed(&mut x, start);
        for (layer, cache) in cache.layers.iter_mut().enumerate() {
            let activations = pass.block_forward(layer, &x, &mut y, Some(cache));
            pass.recycle(activations);
            std::mem::swap(&mut x, &mut y);
        }
        let logits = head::logits(&pass, &x[(tokens.len() - 1) * pass.width()..]);
        self.buffers.give(x);
        self.buffers.give(y);
        logits
    }
}

impl Cache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::len)
    }
}
