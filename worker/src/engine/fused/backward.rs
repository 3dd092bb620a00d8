//! A block's way back: the gradient of its input, part by part as in [`super::block`], then those of its weights.

use cohort_common::spec::Architecture;
use rayon::prelude::*;

use super::Pass;
use super::block::{Activations, BlockMasks, Weights};
use crate::engine::ops::dropout::Mask;
use crate::engine::ops::norm::Stats;
use crate::engine::ops::{activation, attention, cut, linear, norm, rope, simd};
use crate::engine::parameters::{self, Linear, Norm};

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
    head_partials: Vec<f32>,
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
    head_partials: &'a mut [f32],
    dx: &'a mut [f32],
    partials1: &'a mut [f32],
    partials2: &'a mut [f32],
}

impl Pass {
    /// Takes the gradients of the block's weights, and returns that of x.
    pub fn block_backward(
        &self,
        layer: usize,
        x: &[f32],
        dy: &[f32],
        saved: &Activations,
    ) -> Vec<f32> {
        let (buffers, block) = (&self.fused.buffers, &self.fused.parameters.blocks[layer]);
        let masks = self.block_masks(layer);
        let where_dropped = |masks: &Option<Vec<Mask>>| masks.as_ref().map_or(0, |_| dy.len());
        let mut g = Gradients {
            ddown: buffers.take(where_dropped(&masks.after_feed_forward)),
            dup: buffers.take(saved.up.len()),
            dx1: buffers.take(dy.len()),
            dout: buffers.take(where_dropped(&masks.after_attention)),
            dqkv: buffers.take(saved.qkv.len()),
            head_partials: buffers.take(self.head_partials(block, self.samples)),
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
        self.linear_gradients([
            (&block.down, &saved.activated, ddown),
            (&block.up, &saved.norm2, &g.dup),
            (&block.out, &saved.attended, dout),
            (&block.qkv, &saved.norm1, &g.dqkv),
        ]);
        self.norm_gradient(&block.norm2, &g.partials2);
        if let Some(norms) = &block.head_norms {
            self.head_norm_gradient(norms, &g.head_partials);
        }
        self.norm_gradient(&block.norm1, &g.partials1);
        for buffer in [
            g.ddown,
            g.dup,
            g.dx1,
            g.dout,
            g.dqkv,
            g.head_partials,
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
        let mut head_partials = &mut g.head_partials[..];
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
                head_partials: cut(&mut head_partials, self.head_partials(block, samples)),
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
        let samples = (part.first, part.samples);
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
                self.adapt_backward(&block.down, part.dup, ddown, samples);
                activation::gelu_backward(part.dup, &saved.up[own(&saved.up)]);
            }
            Architecture::Llama => {
                let mut dactivated = buffers.take(rows * inner);
                weights.down.backward(&mut dactivated, ddown);
                self.adapt_backward(&block.down, &mut dactivated, ddown, samples);
                part.dup.copy_from_slice(&saved.up[own(&saved.up)]);
                activation::swiglu_backward(part.dup, &dactivated, inner);
                buffers.give(dactivated);
            }
        }
        let mut dnorm = buffers.take(rows * self.width());
        weights.up.backward(&mut dnorm, part.dup);
        self.adapt_backward(&block.up, &mut dnorm, part.dup, samples);
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
        let mut dattended = buffers.take(rows * self.attention_width());
        weights.out.backward(&mut dattended, dout);
        self.adapt_backward(&block.out, &mut dattended, dout, samples);
        let shape = self.attention_shape(part.samples, self.length);
        let forward = attention::Saved {
            packed: &saved.qkv[own(&saved.qkv)],
            out: &saved.attended[own(&saved.attended)],
            log_sums: &saved.log_sums[own(&saved.log_sums)],
            masks: self.masks_from(&masks.attention, part.first),
            starts: self.starts_of(row..row + rows),
        };
        attention::backward(shape, part.dqkv, &dattended, forward);
        self.rotate(rope::Turn::Backward, part.dqkv, shape, (0, forward.starts));
        if let Some(norms) = &block.head_norms {
            let heads = self.normalised_heads(block);
            let stats = &saved.head_stats[row * heads..(row + rows) * heads];
            let kept = (&saved.raw_heads[own(&saved.raw_heads)], stats);
            self.normalise_heads_backward(norms, shape, part.dqkv, part.head_partials, kept);
        }
        weights.qkv.backward(&mut dnorm, part.dqkv);
        self.adapt_backward(&block.qkv, &mut dnorm, part.dqkv, samples);
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

    /// Takes the gradients of weights and biases: of each layer x and dy of all rows.
    fn linear_gradients(&self, layers: [(&Linear, &Vec<f32>, &[f32]); 4]) {
        for (l, x, dy) in layers {
            self.adapter_gradients(l, x, dy);
        }
        // A block is trained whole, or frozen whole.
        if !self.trains(&layers[0].0.weight) {
            return;
        }
        let mut gradient = self.gradient();
        for (l, _, dy) in layers {
            if let Some(bias) = &l.bias {
                linear::backward_bias(&mut gradient[bias.clone()], dy, &self.lanes, self.fresh);
            }
        }
        let weights = layers.map(|(l, ..)| l.weight.clone());
        let weights = gradient.get_disjoint_mut(weights);
        let weights = weights.expect("the weights of a block do not overlap");
        weights
            .into_par_iter()
            .zip(layers)
            .for_each(|(dw, (l, x, dy))| {
                linear::backward_weight(l.shape, dw, x, dy, &self.lanes, self.fresh);
            });
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

    /// Adds partial sums, each as long as `sums`, as many for each sample, to the lanes' sum in `sums`.
    pub fn sum_partials(&self, sums: &mut [f32], partials: &[f32]) {
        let lane = partials.len() / self.lanes.count();
        let rows_per_lane = self.lanes.rows_per_lane();
        self.lanes.sum(sums, self.fresh, |rows, own| {
            let width = own.len();
            let partials = &partials[rows.start / rows_per_lane * lane..][..lane];
            partials
                .chunks_exact(width)
                .for_each(|part| simd::add(own, part));
        });
    }

    /// Takes the gradients of the norm's weights.
    pub fn norm_gradient(&self, n: &Norm, partials: &[f32]) {
        if !self.trains(&n.weight) {
            return;
        }
        let width = self.width();
        let mut gradient = self.gradient();
        // Weight and bias are summed as one vector, then put where they belong.
        let both = width * if n.bias.is_some() { 2 } else { 1 };
        let mut sums = vec![0.0; both];
        sums[..width].copy_from_slice(&gradient[n.weight.clone()]);
        if let Some(bias) = &n.bias {
            sums[width..].copy_from_slice(&gradient[bias.clone()]);
        }
        self.sum_partials(&mut sums, partials);
        gradient[n.weight.clone()].copy_from_slice(&sums[..width]);
        if let Some(bias) = &n.bias {
            gradient[bias.clone()].copy_from_slice(&sums[width..]);
        }
    }
}
