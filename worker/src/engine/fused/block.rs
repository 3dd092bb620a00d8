//! One transformer block as a candle operation:
//! `x1 = x + drop(out(attention(qkv(norm1(x)))))`, `y = x1 + drop(down(act(up(norm2(x1)))))`.
//!
//! The weights are packed once for all rows. Then parts of a few samples each go through the whole block one beside the
//! other, so that what one kernel leaves in the cache the next one finds there, and threads meet only at the end. Sums
//! over rows (the gradients of weights) follow when all parts are done.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use cohort_common::spec::Architecture;
use rayon::prelude::*;

use super::cache::LayerCache;
use super::{Pass, elements, slice};
use crate::engine::ops::dropout::{Mask, Masks};
use crate::engine::ops::linear::Packed;
use crate::engine::ops::norm::Stats;
use crate::engine::ops::{activation, attention, gemm, linear, norm, rope, simd};
use crate::engine::parameters::{self, Linear, Norm};

/// Block `layer` of a pass.
pub struct Block {
    pass: Arc<Pass>,
    layer: usize,
    saved: Mutex<Option<Activations>>,
}

/// What backward needs of forward, besides x. Rows of all samples, in order.
pub struct Activations {
    norm1: Vec<f32>,
    stats1: Vec<Stats>,
    /// Packed rows, rotated where the model rotates.
    qkv: Vec<f32>,
    log_sums: Vec<f32>,
    attended: Vec<f32>,
    x1: Vec<f32>,
    norm2: Vec<f32>,
    stats2: Vec<Stats>,
    up: Vec<f32>,
    activated: Vec<f32>,
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
    log_sums: &'a mut [f32],
    attended: &'a mut [f32],
    x1: &'a mut [f32],
    norm2: &'a mut [f32],
    stats2: &'a mut [Stats],
    up: &'a mut [f32],
    activated: &'a mut [f32],
}

/// The gradients that the sums over rows are made of. Rows of all samples, in order.
struct Gradients {
    /// Of what the last product gave: dy without what was dropped; empty where nothing is.
    ddown: Vec<f32>,
    dup: Vec<f32>,
    /// Of x1.
    dx1: Vec<f32>,
    /// dx1 without what was dropped; empty where nothing is.
    dout: Vec<f32>,
    dqkv: Vec<f32>,
    dx: Vec<f32>,
    partials1: Vec<f32>,
    partials2: Vec<f32>,
}

/// The rows of a few samples on their way back.
struct Backward<'a> {
    first: usize,
    samples: usize,
    dy: &'a [f32],
    ddown: &'a mut [f32],
    dup: &'a mut [f32],
    dx1: &'a mut [f32],
    dout: &'a mut [f32],
    dqkv: &'a mut [f32],
    dx: &'a mut [f32],
    partials1: &'a mut [f32],
    partials2: &'a mut [f32],
}

/// The weights of a block, packed for one direction.
struct Weights<'a> {
    qkv: Packed<'a>,
    out: Packed<'a>,
    up: Packed<'a>,
    down: Packed<'a>,
}

/// The masks of the three places of a block where dropout draws; `None` where nothing is dropped.
struct BlockMasks {
    attention: Option<Vec<Mask>>,
    after_attention: Option<Vec<Mask>>,
    after_feed_forward: Option<Vec<Mask>>,
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
        match self.pass.gradient {
            Some(_) => *self.saved.lock().expect("no panic while saving") = Some(activations),
            None => self.pass.recycle(activations),
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let saved = self.saved.lock().expect("no panic while saving").take();
        let Some(saved) = saved else {
            candle_core::bail!("backward of block {} ran twice", self.layer);
        };
        let dx = slice(x, |x| {
            slice(dy, |dy| self.pass.block_backward(self.layer, x, dy, &saved))
        })??;
        self.pass.recycle(saved);
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}

/// Cuts `len` elements off the front.
fn cut<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (front, back) = std::mem::take(rest).split_at_mut(len);
    *rest = back;
    front
}

impl Pass {
    /// Gives the buffers back to the pool.
    pub fn recycle(&self, a: Activations) {
        for buffer in [
            a.norm1,
            a.qkv,
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

    fn block_masks(&self, layer: usize) -> BlockMasks {
        BlockMasks {
            attention: self.masks(1 + 3 * layer),
            after_attention: self.masks(2 + 3 * layer),
            after_feed_forward: self.masks(3 + 3 * layer),
        }
    }

    /// The masks of samples from `first` on.
    fn masks_from<'a>(&self, masks: &'a Option<Vec<Mask>>, first: usize) -> Option<Masks<'a>> {
        masks.as_ref().map(|lanes| Masks {
            lanes,
            samples: self.samples_per_lane(),
            first,
        })
    }

    /// Calls `work` with the weights of a block, packed by `pack`.
    fn with_weights<R>(
        &self,
        block: &parameters::Block,
        pack: for<'a> fn(linear::Shape, &'a mut [f32], &[f32]) -> Packed<'a>,
        work: impl FnOnce(&Weights) -> R,
    ) -> R {
        let linears = [&block.qkv, &block.out, &block.up, &block.down];
        let sizes = linears.map(|l| l.shape.packed_len());
        gemm::scratch(sizes.iter().sum(), |mut memory| {
            let pieces = sizes.map(|size| cut(&mut memory, size));
            let [qkv, out, up, down] = pieces;
            let parts = self.samples.div_ceil(self.part_samples());
            let pack = |l: &Linear, to| {
                let weight = &self.params[l.weight.clone()];
                pack(l.shape, to, weight).shared_by(parts)
            };
            work(&Weights {
                qkv: pack(&block.qkv, qkv),
                out: pack(&block.out, out),
                up: pack(&block.up, up),
                down: pack(&block.down, down),
            })
        })
    }

    fn bias(&self, l: &Linear) -> Option<&[f32]> {
        l.bias.clone().map(|range| &self.params[range])
    }

    /// Attention over whole sequences, or after the rows of a cache.
    fn attention_shape(&self, samples: usize, keys: usize) -> attention::Shape {
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
            log_sums: rows_of(heads),
            attended: rows_of(self.width()),
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
        let widths = [qkv.len(), log_sums.len(), up.len(), activated.len()].map(|len| len / rows);
        let [qkv_width, heads, up_width, inner] = widths;
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
                log_sums: cut(&mut log_sums, rows * heads),
                attended: cut(&mut attended, wide),
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
        let dropped = self.masks_from(&masks.attention, part.first);
        self.attend(
            part.samples,
            part.qkv,
            part.attended,
            part.log_sums,
            dropped,
            cache,
        );
        let dropped = self.masks_from(&masks.after_attention, part.first);
        let bias = self.bias(&block.out);
        self.add_to_residual(&weights.out, part.x1, part.attended, bias, part.x, dropped);

        self.norm_forward(&block.norm2, part.norm2, part.stats2, part.x1);
        weights
            .up
            .forward(part.up, part.norm2, self.bias(&block.up), None);
        match self.fused.model.architecture {
            Architecture::Llama => {
                activation::swiglu(part.activated, part.up, block.down.shape.inputs)
            }
            Architecture::Gpt2 => activation::gelu(part.activated, part.up),
        }
        let dropped = self.masks_from(&masks.after_feed_forward, part.first);
        let bias = self.bias(&block.down);
        self.add_to_residual(
            &weights.down,
            part.y,
            part.activated,
            bias,
            part.x1,
            dropped,
        );
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
        weight: &Packed,
        y: &mut [f32],
        x: &[f32],
        bias: Option<&[f32]>,
        residual: &[f32],
        masks: Option<Masks>,
    ) {
        match masks {
            None => weight.forward(y, x, bias, Some(residual)),
            Some(masks) => {
                weight.forward(y, x, bias, None);
                masks.apply(y, self.length * self.width());
                simd::add(y, residual);
            }
        }
    }

    /// Rotates `qkv` where the model rotates, and fills `out` and the log-sums.
    fn attend(
        &self,
        samples: usize,
        qkv: &mut [f32],
        out: &mut [f32],
        log_sums: &mut [f32],
        masks: Option<Masks>,
        cache: Option<&mut LayerCache>,
    ) {
        let past = cache.as_ref().map_or(0, |cache| cache.len());
        let shape = self.attention_shape(samples, past + self.length);
        self.rotate(rope::Turn::Forward, qkv, shape, past);
        let inputs = attention::Inputs::packed(shape, qkv);
        match cache {
            None => attention::forward(shape, out, log_sums, inputs, masks),
            Some(cache) => {
                cache.push(qkv, shape);
                attention::forward(shape, out, log_sums, cache.inputs(qkv, shape), None);
            }
        }
    }

    fn rotate(&self, turn: rope::Turn, packed: &mut [f32], shape: attention::Shape, start: usize) {
        if let Some(table) = &self.fused.rope {
            let heads = shape.heads + shape.kv_heads;
            rope::rotate(
                table,
                turn,
                packed,
                shape.packed(),
                heads,
                self.length,
                start,
            );
        }
    }

    /// Takes the gradients of the block's weights, and returns that of x.
    fn block_backward(&self, layer: usize, x: &[f32], dy: &[f32], saved: &Activations) -> Vec<f32> {
        let (buffers, block) = (&self.fused.buffers, &self.fused.parameters.blocks[layer]);
        let masks = self.block_masks(layer);
        let where_dropped = |masks: &Option<Vec<Mask>>| masks.as_ref().map_or(0, |_| dy.len());
        let mut g = Gradients {
            ddown: buffers.take(where_dropped(&masks.after_feed_forward)),
            dup: buffers.take(saved.up.len()),
            dx1: buffers.take(dy.len()),
            dout: buffers.take(where_dropped(&masks.after_attention)),
            dqkv: buffers.take(saved.qkv.len()),
            dx: buffers.take(dy.len()),
            partials1: buffers.take(self.partials(&block.norm1, self.samples)),
            partials2: buffers.take(self.partials(&block.norm2, self.samples)),
        };
        self.with_weights(block, linear::Shape::pack_backward, |weights| {
            let parts = self.backward_parts(block, dy, &mut g);
            parts.into_par_iter().for_each(|part| {
                self.part_backward(block, weights, &masks, x, saved, part);
            });
        });
        let ddown = if g.ddown.is_empty() { dy } else { &g.ddown };
        let dout = if g.dout.is_empty() { &g.dx1 } else { &g.dout };
        self.linear_gradient(&block.down, &saved.activated, ddown);
        self.linear_gradient(&block.up, &saved.norm2, &g.dup);
        self.norm_gradient(&block.norm2, &g.partials2);
        self.linear_gradient(&block.out, &saved.attended, dout);
        self.linear_gradient(&block.qkv, &saved.norm1, &g.dqkv);
        self.norm_gradient(&block.norm1, &g.partials1);
        for buffer in [
            g.ddown,
            g.dup,
            g.dx1,
            g.dout,
            g.dqkv,
            g.partials1,
            g.partials2,
        ] {
            buffers.give(buffer);
        }
        g.dx
    }

    fn backward_parts<'a>(
        &self,
        block: &parameters::Block,
        dy: &'a [f32],
        g: &'a mut Gradients,
    ) -> Vec<Backward<'a>> {
        let per_part = self.part_samples();
        let (mut ddown, mut dup, mut dx1) = (&mut g.ddown[..], &mut g.dup[..], &mut g.dx1[..]);
        let (mut dout, mut dqkv, mut dx) = (&mut g.dout[..], &mut g.dqkv[..], &mut g.dx[..]);
        let (mut partials1, mut partials2) = (&mut g.partials1[..], &mut g.partials2[..]);
        let part = |first: usize| {
            let samples = per_part.min(self.samples - first);
            let (rows, wide) = (samples * self.length, samples * self.length * self.width());
            let (drops1, drops2) = (dout.len().min(wide), ddown.len().min(wide));
            Backward {
                first,
                samples,
                dy: &dy[first * self.length * self.width()..][..wide],
                ddown: cut(&mut ddown, drops2),
                dup: cut(&mut dup, rows * block.up.shape.outputs),
                dx1: cut(&mut dx1, wide),
                dout: cut(&mut dout, drops1),
                dqkv: cut(&mut dqkv, rows * block.qkv.shape.outputs),
                dx: cut(&mut dx, wide),
                partials1: cut(&mut partials1, self.partials(&block.norm1, samples)),
                partials2: cut(&mut partials2, self.partials(&block.norm2, samples)),
            }
        };
        (0..self.samples).step_by(per_part).map(part).collect()
    }

    fn part_backward(
        &self,
        block: &parameters::Block,
        weights: &Weights,
        masks: &BlockMasks,
        x: &[f32],
        saved: &Activations,
        part: Backward,
    ) {
        let buffers = &self.fused.buffers;
        let (row, rows) = (part.first * self.length, part.samples * self.length);
        let sample = self.length * self.width();
        // The part's rows of something that has them all.
        let own = |all: &[f32]| {
            let width = all.len() / self.rows();
            row * width..(row + rows) * width
        };

        let ddown = match self.masks_from(&masks.after_feed_forward, part.first) {
            None => part.dy,
            Some(masks) => {
                part.ddown.copy_from_slice(part.dy);
                masks.apply(part.ddown, sample);
                part.ddown
            }
        };
        let inner = block.down.shape.inputs;
        match self.fused.model.architecture {
            Architecture::Gpt2 => {
                weights.down.backward(part.dup, ddown);
                activation::gelu_backward(part.dup, &saved.up[own(&saved.up)]);
            }
            Architecture::Llama => {
                let mut dactivated = buffers.take(rows * inner);
                weights.down.backward(&mut dactivated, ddown);
                part.dup.copy_from_slice(&saved.up[own(&saved.up)]);
                activation::swiglu_backward(part.dup, &dactivated, inner);
                buffers.give(dactivated);
            }
        }
        let mut dnorm = buffers.take(rows * self.width());
        weights.up.backward(&mut dnorm, part.dup);
        part.dx1.copy_from_slice(part.dy);
        let x1 = &saved.x1[own(&saved.x1)];
        let stats = &saved.stats2[row..row + rows];
        self.norm_backward(&block.norm2, part.dx1, part.partials2, (&dnorm, x1, stats));

        let dout = match self.masks_from(&masks.after_attention, part.first) {
            None => &*part.dx1,
            Some(masks) => {
                part.dout.copy_from_slice(part.dx1);
                masks.apply(part.dout, sample);
                part.dout
            }
        };
        let mut dattended = buffers.take(rows * self.width());
        weights.out.backward(&mut dattended, dout);
        let shape = self.attention_shape(part.samples, self.length);
        let forward = attention::Saved {
            packed: &saved.qkv[own(&saved.qkv)],
            out: &saved.attended[own(&saved.attended)],
            log_sums: &saved.log_sums[own(&saved.log_sums)],
            masks: self.masks_from(&masks.attention, part.first),
        };
        attention::backward(shape, part.dqkv, &dattended, forward);
        self.rotate(rope::Turn::Backward, part.dqkv, shape, 0);
        weights.qkv.backward(&mut dnorm, part.dqkv);
        part.dx.copy_from_slice(part.dx1);
        let stats = &saved.stats1[row..row + rows];
        self.norm_backward(
            &block.norm1,
            part.dx,
            part.partials1,
            (&dnorm, &x[own(x)], stats),
        );
        buffers.give(dnorm);
        buffers.give(dattended);
    }

    /// Takes the gradients of the weight and the bias: x and dy of all rows.
    fn linear_gradient(&self, l: &Linear, x: &[f32], dy: &[f32]) {
        let mut gradient = self.gradient();
        if let Some(bias) = &l.bias {
            linear::backward_bias(&mut gradient[bias.clone()], dy, &self.lanes, self.fresh);
        }
        let dw = &mut gradient[l.weight.clone()];
        linear::backward_weight(l.shape, dw, x, dy, &self.lanes, self.fresh);
    }

    /// Elements of a norm's partial sums over some samples.
    pub fn partials(&self, n: &Norm, samples: usize) -> usize {
        samples * norm::partial_len(self.width(), self.length, n.bias.is_some())
    }

    /// Adds the gradient through the norm to `dx`, and leaves partial sums for [`Self::norm_gradient`]. `(dy, x, stats)`.
    pub fn norm_backward(
        &self,
        n: &Norm,
        dx: &mut [f32],
        partials: &mut [f32],
        (dy, x, stats): (&[f32], &[f32], &[Stats]),
    ) {
        let (kind, weight) = (self.fused.norm_kind(), &self.params[n.weight.clone()]);
        let samples = (self.length, n.bias.is_some());
        norm::backward(kind, dx, partials, dy, x, stats, weight, samples);
    }

    /// Takes the gradients of the norm's weights.
    pub fn norm_gradient(&self, n: &Norm, partials: &[f32]) {
        let (width, samples) = (self.width(), self.samples_per_lane());
        let lane = self.partials(n, samples);
        let rows_per_lane = self.lanes.rows_per_lane();
        let mut gradient = self.gradient();
        // Weight and bias are summed as one vector, then put where they belong.
        let both = width * if n.bias.is_some() { 2 } else { 1 };
        let mut sums = vec![0.0; both];
        sums[..width].copy_from_slice(&gradient[n.weight.clone()]);
        if let Some(bias) = &n.bias {
            sums[width..].copy_from_slice(&gradient[bias.clone()]);
        }
        self.lanes.sum(&mut sums, self.fresh, |rows, own| {
            let partials = &partials[rows.start / rows_per_lane * lane..][..lane];
            partials
                .chunks_exact(both)
                .for_each(|part| simd::add(own, part));
        });
        gradient[n.weight.clone()].copy_from_slice(&sums[..width]);
        if let Some(bias) = &n.bias {
            gradient[bias.clone()].copy_from_slice(&sums[width..]);
        }
    }
}
