//! One transformer block as a candle operation:
//! `x1 = x + drop(out(attention(qkv(norm1(x)))))`, `y = x1 + drop(down(act(up(norm2(x1)))))`.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use cohort_common::spec::Architecture;
use rayon::prelude::*;

use super::cache::LayerCache;
use super::{Pass, elements, slice};
use crate::engine::ops::dropout::Mask;
use crate::engine::ops::norm::Stats;
use crate::engine::ops::{ROW_BLOCK, activation, attention, linear, norm, rope, simd};
use crate::engine::parameters::{Linear, Norm};

/// Block `layer` of a pass.
pub struct Block {
    pass: Arc<Pass>,
    layer: usize,
    saved: Mutex<Option<Activations>>,
}

/// What backward needs of forward, besides x.
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

/// The three places of a block where dropout draws.
#[derive(Clone, Copy)]
enum Place {
    Attention,
    AfterAttention,
    AfterFeedForward,
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
        let mut y = vec![0.0; x.len()];
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

    /// The dropout mask of one place; `None` where nothing is dropped.
    fn mask(&self, layer: usize, place: Place) -> Option<Mask> {
        self.site.and_then(|site| {
            Mask::new(
                site,
                1 + 3 * layer + place as usize,
                self.fused.model.dropout,
            )
        })
    }

    /// Attends over whole sequences, or after the rows of a cache.
    fn attention_shape(&self, keys: usize) -> attention::Shape {
        let m = &self.fused.model;
        attention::Shape {
            samples: self.samples,
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
        let rows = self.rows();

        let (norm1, stats1) = self.norm_forward(&block.norm1, x);
        let mut qkv = self.linear_forward(&block.qkv, &norm1);
        let mut attended = buffers.take(rows * self.width());
        let log_sums = self.attend(layer, &mut qkv, &mut attended, cache);
        let mut x1 = buffers.take(x.len());
        self.add_to_residual(
            &block.out,
            &mut x1,
            &attended,
            x,
            self.mask(layer, Place::AfterAttention),
        );

        let (norm2, stats2) = self.norm_forward(&block.norm2, &x1);
        let up = self.linear_forward(&block.up, &norm2);
        let mut activated = buffers.take(rows * block.down.shape.inputs);
        match self.fused.model.architecture {
            Architecture::Llama => activation::swiglu(&mut activated, &up, block.down.shape.inputs),
            Architecture::Gpt2 => activation::gelu(&mut activated, &up),
        }
        self.add_to_residual(
            &block.down,
            y,
            &activated,
            &x1,
            self.mask(layer, Place::AfterFeedForward),
        );
        Activations {
            norm1,
            stats1,
            qkv,
            log_sums,
            attended,
            x1,
            norm2,
            stats2,
            up,
            activated,
        }
    }

    /// The normalised rows and what backward needs of each.
    pub fn norm_forward(&self, n: &Norm, x: &[f32]) -> (Vec<f32>, Vec<Stats>) {
        let mut y = self.fused.buffers.take(x.len());
        let mut stats = vec![[0.0; 2]; x.len() / self.width()];
        let bias = n.bias.clone().map(|range| &self.params[range]);
        let weight = &self.params[n.weight.clone()];
        norm::forward(
            self.fused.norm_kind(),
            self.fused.model.norm_eps,
            &mut y,
            &mut stats,
            x,
            weight,
            bias,
        );
        (y, stats)
    }

    /// `x W + b` in a pooled buffer.
    fn linear_forward(&self, l: &Linear, x: &[f32]) -> Vec<f32> {
        let mut y = self
            .fused
            .buffers
            .take(x.len() / l.shape.inputs * l.shape.outputs);
        let bias = l.bias.clone().map(|range| &self.params[range]);
        linear::forward(
            l.shape,
            &mut y,
            x,
            &self.params[l.weight.clone()],
            bias,
            None,
        );
        y
    }

    /// `y = residual + drop(x W + b)`.
    fn add_to_residual(
        &self,
        l: &Linear,
        y: &mut [f32],
        x: &[f32],
        residual: &[f32],
        mask: Option<Mask>,
    ) {
        let bias = l.bias.clone().map(|range| &self.params[range]);
        let weight = &self.params[l.weight.clone()];
        match mask {
            None => linear::forward(l.shape, y, x, weight, bias, Some(residual)),
            Some(mask) => {
                let width = l.shape.outputs;
                linear::forward(l.shape, y, x, weight, bias, None);
                mask.apply(y);
                y.par_chunks_mut(ROW_BLOCK * width)
                    .zip(residual.par_chunks(ROW_BLOCK * width))
                    .for_each(|(y, residual)| simd::add(y, residual));
            }
        }
    }

    /// Rotates `qkv` where the model rotates, fills `out`, and returns the log-sums.
    fn attend(
        &self,
        layer: usize,
        qkv: &mut [f32],
        out: &mut [f32],
        cache: Option<&mut LayerCache>,
    ) -> Vec<f32> {
        let past = cache.as_ref().map_or(0, |cache| cache.len());
        let shape = self.attention_shape(past + self.length);
        if let Some(table) = &self.fused.rope {
            let heads = shape.heads + shape.kv_heads;
            rope::rotate(
                table,
                rope::Turn::Forward,
                qkv,
                shape.packed(),
                heads,
                self.length,
                past,
            );
        }
        let mut log_sums = self
            .fused
            .buffers
            .take(shape.samples * shape.heads * shape.queries);
        let inputs = attention::Inputs::packed(shape, qkv);
        match cache {
            None => attention::forward(
                shape,
                out,
                &mut log_sums,
                inputs,
                self.mask(layer, Place::Attention),
            ),
            Some(cache) => {
                cache.push(qkv, shape);
                attention::forward(shape, out, &mut log_sums, cache.inputs(qkv, shape), None);
            }
        }
        log_sums
    }

    /// Adds the gradients of the block's weights, and returns that of x.
    fn block_backward(&self, layer: usize, x: &[f32], dy: &[f32], saved: &Activations) -> Vec<f32> {
        let (buffers, block) = (&self.fused.buffers, &self.fused.parameters.blocks[layer]);
        let mut dx = dy.to_vec();

        let dactivated = self.backward_from_residual(
            &block.down,
            dy,
            &saved.activated,
            self.mask(layer, Place::AfterFeedForward),
        );
        let dup = match self.fused.model.architecture {
            Architecture::Gpt2 => {
                let mut d = dactivated;
                activation::gelu_backward(&mut d, &saved.up);
                d
            }
            Architecture::Llama => {
                let mut d = buffers.take(saved.up.len());
                d.copy_from_slice(&saved.up);
                activation::swiglu_backward(&mut d, &dactivated, block.down.shape.inputs);
                buffers.give(dactivated);
                d
            }
        };
        let dnorm2 = self.linear_backward(&block.up, &dup, &saved.norm2);
        self.norm_backward(&block.norm2, &mut dx, &dnorm2, &saved.x1, &saved.stats2);
        buffers.give(dup);
        buffers.give(dnorm2);

        let dattended = self.backward_from_residual(
            &block.out,
            &dx,
            &saved.attended,
            self.mask(layer, Place::AfterAttention),
        );
        let dqkv = self.attend_backward(layer, &dattended, saved);
        let dnorm1 = self.linear_backward(&block.qkv, &dqkv, &saved.norm1);
        self.norm_backward(&block.norm1, &mut dx, &dnorm1, x, &saved.stats1);
        for buffer in [dattended, dqkv, dnorm1] {
            buffers.give(buffer);
        }
        dx
    }

    /// The gradient of the packed rows before rotation.
    fn attend_backward(&self, layer: usize, dout: &[f32], saved: &Activations) -> Vec<f32> {
        let shape = self.attention_shape(self.length);
        let mut dqkv = self.fused.buffers.take(saved.qkv.len());
        let forward = attention::Saved {
            packed: &saved.qkv,
            out: &saved.attended,
            log_sums: &saved.log_sums,
            mask: self.mask(layer, Place::Attention),
        };
        attention::backward(shape, &mut dqkv, dout, forward);
        if let Some(table) = &self.fused.rope {
            let heads = shape.heads + shape.kv_heads;
            rope::rotate(
                table,
                rope::Turn::Backward,
                &mut dqkv,
                shape.packed(),
                heads,
                self.length,
                0,
            );
        }
        dqkv
    }

    /// [`Self::linear_backward`] behind the mask of [`Self::add_to_residual`].
    fn backward_from_residual(
        &self,
        l: &Linear,
        dy: &[f32],
        x: &[f32],
        mask: Option<Mask>,
    ) -> Vec<f32> {
        let Some(mask) = mask else {
            return self.linear_backward(l, dy, x);
        };
        let mut masked = self.fused.buffers.take(dy.len());
        masked.copy_from_slice(dy);
        mask.apply(&mut masked);
        let dx = self.linear_backward(l, &masked, x);
        self.fused.buffers.give(masked);
        dx
    }

    /// Adds the gradients of the weight and the bias, and returns that of x.
    fn linear_backward(&self, l: &Linear, dy: &[f32], x: &[f32]) -> Vec<f32> {
        let mut gradient = self.gradient();
        if let Some(bias) = &l.bias {
            linear::backward_bias(&mut gradient[bias.clone()], dy);
        }
        linear::backward_weight(l.shape, &mut gradient[l.weight.clone()], x, dy);
        drop(gradient);
        let mut dx = self.fused.buffers.take(x.len());
        linear::backward_input(l.shape, &mut dx, dy, &self.params[l.weight.clone()]);
        dx
    }

    /// Adds the gradients of the norm's weights, and that of x to `dx`.
    pub fn norm_backward(&self, n: &Norm, dx: &mut [f32], dy: &[f32], x: &[f32], stats: &[Stats]) {
        let mut gradient = self.gradient();
        let weight = &self.params[n.weight.clone()];
        let kind = self.fused.norm_kind();
        match &n.bias {
            None => norm::backward(
                kind,
                dx,
                &mut gradient[n.weight.clone()],
                None,
                dy,
                x,
                stats,
                weight,
            ),
            Some(bias) => {
                let [dw, db] = gradient
                    .get_disjoint_mut([n.weight.clone(), bias.clone()])
                    .expect("weight and bias do not overlap");
                norm::backward(kind, dx, dw, Some(db), dy, x, stats, weight);
            }
        }
    }
}
