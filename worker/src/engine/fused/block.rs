//! One transformer block as a candle operation:
//! `x1 = x + drop(out(attention(qkv(norm1(x)))))`, `y = x1 + drop(down(act(up(norm2(x1)))))`.
//!
//! The weights are packed once for all rows, or, where all go through at once, a piece at a time on the way. Then
//! parts of a few samples each go through the whole block one beside the other, so that what one kernel leaves in the
//! cache the next one finds there, and threads meet only at the end. Sums over rows (the gradients of weights) follow
//! when all parts are done.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use cohort_common::spec::Architecture;
use rayon::prelude::*;

use super::cache::LayerCache;
use super::{Pass, elements, slice};
use crate::engine::ops::dropout::{Mask, Masks};
use crate::engine::ops::linear::Packed;
use crate::engine::ops::norm::Stats;
use crate::engine::ops::{activation, attention, cut, gemm, linear, norm, rope, simd};
use crate::engine::parameters::{self, Linear, Norm};

/// Block `layer` of a pass.
pub struct Block {
    pass: Arc<Pass>,
    layer: usize,
    /// Empty where they are computed again, and where nothing needs them.
    saved: Mutex<Option<Activations>>,
}

/// What backward needs of forward, besides x. Rows of all samples, in order.
pub struct Activations {
    pub norm1: Vec<f32>,
    pub stats1: Vec<Stats>,
    /// Packed rows, normalised and rotated where the model does that.
    pub qkv: Vec<f32>,
    /// Queries and keys before they were normalised; empty where they are not.
    pub raw_heads: Vec<f32>,
    pub head_stats: Vec<Stats>,
    pub log_sums: Vec<f32>,
    pub attended: Vec<f32>,
    pub x1: Vec<f32>,
    pub norm2: Vec<f32>,
    pub stats2: Vec<Stats>,
    pub up: Vec<f32>,
    pub activated: Vec<f32>,
}

/// The rows of a few samples on their way through a block.
struct Forward<'a> {
    first: usize,
    samples: usize,
    x: &'a [f32],
    y: &'a mut [f32],
    norm1: &'a mut [f32],
    stats1: &'a mut [Stats],
    qkv: &'a mut [f32],
    raw_heads: &'a mut [f32],
    head_stats: &'a mut [Stats],
    log_sums: &'a mut [f32],
    attended: &'a mut [f32],
    x1: &'a mut [f32],
    norm2: &'a mut [f32],
    stats2: &'a mut [Stats],
    up: &'a mut [f32],
    activated: &'a mut [f32],
}

/// The weights of a block, packed for one direction.
pub struct Weights<'a> {
    pub qkv: Packed<'a>,
    pub out: Packed<'a>,
    pub up: Packed<'a>,
    pub down: Packed<'a>,
}

/// The masks of the three places of a block where dropout draws; `None` where nothing is dropped.
pub struct BlockMasks {
    pub attention: Option<Vec<Mask>>,
    pub after_attention: Option<Vec<Mask>>,
    pub after_feed_forward: Option<Vec<Mask>>,
}

impl Block {
    pub fn new(pass: Arc<Pass>, layer: usize) -> Self {
        Self {
            pass,
            layer,
            saved: Mutex::new(None),
        }
    }
}

impl CustomOp1 for Block {
    fn name(&self) -> &'static str {
        "block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = elements(x, layout)?;
        let mut y = self.pass.fused.buffers.take(x.len());
        let activations = self.pass.block_forward(self.layer, x, &mut y, None);
        let fused = &self.pass.fused;
        let needed = self.pass.gradient.is_some() && self.layer >= fused.still;
        match needed && !fused.checkpointing {
            true => *self.saved.lock().expect("no panic while saving") = Some(activations),
            false => self.pass.recycle(activations),
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if self.layer < self.pass.fused.still {
            return Ok(None);
        }
        let saved = self.saved.lock().expect("no panic while saving").take();
        let saved = match (saved, self.pass.fused.checkpointing) {
            (Some(saved), _) => saved,
            (None, true) => slice(x, |x| self.pass.activations(self.layer, x))?,
            (None, false) => candle_core::bail!("backward of block {} ran twice", self.layer),
        };
        let dx = slice(x, |x| {
            slice(dy, |dy| self.pass.block_backward(self.layer, x, dy, &saved))
        })??;
        self.pass.recycle(saved);
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}

impl Pass {
    /// The activations of a block, computed again.
    fn activations(&self, layer: usize, x: &[f32]) -> Activations {
        let mut y = self.fused.buffers.take(x.len());
        let activations = self.block_forward(layer, x, &mut y, None);
        self.fused.buffers.give(y);
        activations
    }

    /// Gives the buffers back to the pool.
    pub fn recycle(&self, a: Activations) {
        for buffer in [
            a.norm1,
            a.qkv,
            a.raw_heads,
            a.log_sums,
            a.attended,
            a.x1,
            a.norm2,
            a.up,
            a.activated,
        ] {
            self.fused.buffers.give(buffer);
        }
    }

    pub fn block_masks(&self, layer: usize) -> BlockMasks {
        BlockMasks {
            attention: self.masks(1 + 3 * layer),
            after_attention: self.masks(2 + 3 * layer),
            after_feed_forward: self.masks(3 + 3 * layer),
        }
    }

    /// The masks of samples from `first` on.
    pub fn masks_from<'a>(&self, masks: &'a Option<Vec<Mask>>, first: usize) -> Option<Masks<'a>> {
        masks.as_ref().map(|lanes| Masks {
            lanes,
            samples: self.samples_per_lane(),
            first,
        })
    }

    /// Calls `work` with the weights of a block, packed by `pack`.
    pub fn with_weights<R>(
        &self,
        block: &parameters::Block,
        pack: for<'a> fn(linear::Shape, &'a mut [f32], &'a [f32], usize) -> Packed<'a>,
        work: impl FnOnce(&Weights) -> R,
    ) -> R {
        let linears = [&block.qkv, &block.out, &block.up, &block.down];
        let parts = self.samples.div_ceil(self.part_samples());
        let sizes = linears.map(|l| l.shape.packed_len(parts));
        gemm::scratch(sizes.iter().sum(), |mut memory| {
            let pieces = sizes.map(|size| cut(&mut memory, size));
            let packed = linears.into_par_iter().zip(pieces).map(|(l, to)| {
                let weight = &self.params[l.weight.clone()];
                pack(l.shape, to, weight, parts)
            });
            let packed: Vec<Packed> = packed.collect();
            let [qkv, out, up, down] = packed.try_into().ok().expect("four weights");
            work(&Weights { qkv, out, up, down })
        })
    }

    fn bias(&self, l: &Linear) -> Option<&[f32]> {
        l.bias.clone().map(|range| &self.params[range])
    }

    /// Attention over whole sequences, or after the rows of a cache.
    pub fn attention_shape(&self, samples: usize, keys: usize) -> attention::Shape {
        let m = &self.fused.model;
        attention::Shape {
            samples,
            queries: self.length,
            keys,
            heads: m.num_attention_heads,
            kv_heads: m.num_key_value_heads,
            dim: m.head_dim(),
        }
    }

    /// Fills `y` and returns what backward needs. With a cache, the rows follow those that the cache holds.
    pub fn block_forward(
        &self,
        layer: usize,
        x: &[f32],
        y: &mut [f32],
        cache: Option<&mut LayerCache>,
    ) -> Activations {
        let (buffers, block) = (&self.fused.buffers, &self.fused.parameters.blocks[layer]);
        let (rows, heads) = (self.rows(), self.fused.model.num_attention_heads);
        let rows_of = |width: usize| buffers.take(rows * width);
        let mut a = Activations {
            norm1: rows_of(self.width()),
            stats1: vec![[0.0; 2]; rows],
            qkv: rows_of(block.qkv.shape.outputs),
            raw_heads: rows_of(self.normalised_heads(block) * self.fused.model.head_dim()),
            head_stats: vec![[0.0; 2]; rows * self.normalised_heads(block)],
            log_sums: rows_of(heads),
            attended: rows_of(self.attention_width()),
            x1: rows_of(self.width()),
            norm2: rows_of(self.width()),
            stats2: vec![[0.0; 2]; rows],
            up: rows_of(block.up.shape.outputs),
            activated: rows_of(block.down.shape.inputs),
        };
        let masks = self.block_masks(layer);
        self.with_weights(block, linear::Shape::pack, |weights| {
            let mut parts = self.forward_parts(x, y, &mut a, rows);
            match cache {
                None => parts.into_par_iter().for_each(|part| {
                    self.part_forward(block, weights, &masks, part, None);
                }),
                Some(cache) => {
                    let part = parts.pop().expect("one sequence is one part");
                    self.part_forward(block, weights, &masks, part, Some(cache));
                }
            }
        });
        a
    }

    fn forward_parts<'a>(
        &self,
        x: &'a [f32],
        y: &'a mut [f32],
        a: &'a mut Activations,
        rows: usize,
    ) -> Vec<Forward<'a>> {
        let per_part = self.part_samples();
        let (mut y, mut stats1, mut stats2) = (y, &mut a.stats1[..], &mut a.stats2[..]);
        let (mut norm1, mut qkv, mut log_sums) =
            (&mut a.norm1[..], &mut a.qkv[..], &mut a.log_sums[..]);
        let (mut attended, mut x1, mut norm2) =
            (&mut a.attended[..], &mut a.x1[..], &mut a.norm2[..]);
        let (mut up, mut activated) = (&mut a.up[..], &mut a.activated[..]);
        let (mut raw_heads, mut head_stats) = (&mut a.raw_heads[..], &mut a.head_stats[..]);
        let widths = [qkv.len(), log_sums.len(), up.len(), activated.len()].map(|len| len / rows);
        let [qkv_width, heads, up_width, inner] = widths;
        let [raw_width, normalised] = [raw_heads.len(), head_stats.len()].map(|len| len / rows);
        let part = |first: usize| {
            let samples = per_part.min(self.samples - first);
            let (rows, wide) = (samples * self.length, samples * self.length * self.width());
            Forward {
                first,
                samples,
                x: &x[first * self.length * self.width()..][..wide],
                y: cut(&mut y, wide),
                norm1: cut(&mut norm1, wide),
                stats1: cut(&mut stats1, rows),
                qkv: cut(&mut qkv, rows * qkv_width),
                raw_heads: cut(&mut raw_heads, rows * raw_width),
                head_stats: cut(&mut head_stats, rows * normalised),
                log_sums: cut(&mut log_sums, rows * heads),
                attended: cut(&mut attended, rows * self.attention_width()),
                x1: cut(&mut x1, wide),
                norm2: cut(&mut norm2, wide),
                stats2: cut(&mut stats2, rows),
                up: cut(&mut up, rows * up_width),
                activated: cut(&mut activated, rows * inner),
            }
        };
        (0..self.samples).step_by(per_part).map(part).collect()
    }

    fn part_forward(
        &self,
        block: &parameters::Block,
        weights: &Weights,
        masks: &BlockMasks,
        part: Forward,
        cache: Option<&mut LayerCache>,
    ) {
        self.norm_forward(&block.norm1, part.norm1, part.stats1, part.x);
        weights
            .qkv
            .forward(part.qkv, part.norm1, self.bias(&block.qkv), None);
        let samples = (part.first, part.samples);
        self.adapt(&block.qkv, part.qkv, part.norm1, samples);
        if let Some(norms) = &block.head_norms {
            let shape = self.attention_shape(part.samples, self.length);
            let kept = (part.raw_heads, part.head_stats);
            self.normalise_heads(norms, shape, part.qkv, kept);
        }
        let dropped = self.masks_from(&masks.attention, part.first);
        self.attend(
            (part.first, part.samples),
            part.qkv,
            part.attended,
            part.log_sums,
            dropped,
            cache,
        );
        let dropped = self.masks_from(&masks.after_attention, part.first);
        let out = (&block.out, &weights.out, samples);
        self.add_to_residual(out, part.x1, part.attended, part.x, dropped);

        self.norm_forward(&block.norm2, part.norm2, part.stats2, part.x1);
        weights
            .up
            .forward(part.up, part.norm2, self.bias(&block.up), None);
        self.adapt(&block.up, part.up, part.norm2, samples);
        match self.fused.model.architecture {
            Architecture::Llama => {
                activation::swiglu(part.activated, part.up, block.down.shape.inputs)
            }
            Architecture::Gpt2 => activation::gelu(part.activated, part.up),
        }
        let dropped = self.masks_from(&masks.after_feed_forward, part.first);
        let down = (&block.down, &weights.down, samples);
        self.add_to_residual(down, part.y, part.activated, part.x1, dropped);
    }

    /// Normalises rows, and keeps what backward needs of each.
    pub fn norm_forward(&self, n: &Norm, y: &mut [f32], stats: &mut [Stats], x: &[f32]) {
        let (kind, eps) = (self.fused.norm_kind(), self.fused.model.norm_eps);
        let bias = n.bias.clone().map(|range| &self.params[range]);
        norm::forward(kind, eps, y, stats, x, &self.params[n.weight.clone()], bias);
    }

    /// `y = residual + drop(x W + b)`.
    fn add_to_residual(
        &self,
        (layer, weight, samples): (&Linear, &Packed, (usize, usize)),
        y: &mut [f32],
        x: &[f32],
        residual: &[f32],
        masks: Option<Masks>,
    ) {
        let bias = self.bias(layer);
        match masks {
            None => {
                weight.forward(y, x, bias, Some(residual));
                self.adapt(layer, y, x, samples);
            }
            Some(masks) => {
                weight.forward(y, x, bias, None);
                self.adapt(layer, y, x, samples);
                masks.apply(y, self.length * self.width());
                simd::add(y, residual);
            }
        }
    }

    /// Rotates `qkv` where the model rotates, and fills `out` and the log-sums.
    fn attend(
        &self,
        (first, samples): (usize, usize),
        qkv: &mut [f32],
        out: &mut [f32],
        log_sums: &mut [f32],
        masks: Option<Masks>,
        cache: Option<&mut LayerCache>,
    ) {
        let past = cache.as_ref().map_or(0, |cache| cache.len());
        let shape = self.attention_shape(samples, past + self.length);
        let starts = self.starts_of(first * self.length..(first + samples) * self.length);
        self.rotate(rope::Turn::Forward, qkv, shape, (past, starts));
        let inputs = attention::Inputs::packed(shape, qkv, starts);
        match cache {
            None => attention::forward(shape, out, log_sums, inputs, masks),
            Some(cache) => {
                cache.push(qkv, shape);
                attention::forward(shape, out, log_sums, cache.inputs(qkv, shape), None);
            }
        }
    }

    pub fn rotate(
        &self,
        turn: rope::Turn,
        packed: &mut [f32],
        shape: attention::Shape,
        places: (usize, &[u32]),
    ) {
        if let Some(table) = &self.fused.rope {
            let heads = shape.heads + shape.kv_heads;
            rope::rotate(
                table,
                turn,
                packed,
                shape.packed(),
                heads,
                self.length,
                places,
            );
        }
    }
}
