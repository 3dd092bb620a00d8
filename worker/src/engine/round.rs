//! A round: a lane that steps by itself, and the outer step that ends it, which is SGD with Nesterov's momentum (Sutskever et
//! al., ICML 2013), in place over the flat buffers and in the order of operations of `torch.optim.SGD`:
//!
//! b = μ b + g,   p -= η (g + μ b),   with g = scale · root gradient

use std::sync::Arc;

use cohort_common::spec::Diloco;
use rayon::prelude::*;

use super::ops::simd::{fma, simd_fn};
use super::optim::Moments;
use super::{Engine, EngineError, Gradient, Result};

/// Elements in one task.
const BLOCK: usize = 64 * 1024;

/// What a round begins with, kept while a lane takes inner steps.
pub struct RoundStart {
    params: Arc<Vec<f32>>,
    moments: Moments,
}

impl Engine {
    /// Lets a lane step by itself, with moments of zero, until [`end_lane`](Self::end_lane).
    pub fn begin_lane(&mut self) -> Result<RoundStart> {
        let params = self.params.clone();
        let len = self.layout.len();
        let optimizer = self.optimizer.as_mut().ok_or(EngineError::InferenceOnly)?;
        let mut inner = optimizer
            .spare
            .take()
            .unwrap_or_else(|| Moments::zeros(len));
        for moments in [&mut inner.exp_avg, &mut inner.exp_avg_sq] {
            moments.fill(0.0);
        }
        let moments = std::mem::replace(&mut optimizer.moments, inner);
        Ok(RoundStart { params, moments })
    }

    /// Takes the engine back to where a round began, and overwrites `grad` with the lane's outer gradient:
    /// `weight · (θ − θₗ)`.
    pub fn end_lane(&mut self, start: RoundStart, weight: f64, grad: &mut Gradient) -> Result<()> {
        let optimizer = self.optimizer.as_mut().ok_or(EngineError::InferenceOnly)?;
        optimizer.spare = Some(std::mem::replace(&mut optimizer.moments, start.moments));
        let lane = std::mem::replace(&mut self.params, start.params);
        grad.fit(self.gradient_len);
        let (params, weight) = (&self.params, weight as f32);
        self.pool
            .install(|| difference(grad, params, &lane, weight));
        self.upload()
    }
}

/// One outer step; what has no gradient stays as it is.
pub(super) fn outer_update(
    params: &mut [f32],
    momentum: &mut [f32],
    root: &[f32],
    scale: f64,
    diloco: Diloco,
) {
    let tasks = params
        .par_chunks_mut(BLOCK)
        .zip(momentum.par_chunks_mut(BLOCK))
        .zip(root.par_chunks(BLOCK));
    let factors = Factors {
        scale: scale as f32,
        rate: diloco.outer_learning_rate as f32,
        momentum: diloco.outer_momentum as f32,
    };
    tasks.for_each(|((p, b), g)| update_piece(p, b, g, factors));
}

/// `out = weight · (from - to)`, for as many elements as it has.
fn difference(out: &mut [f32], from: &[f32], to: &[f32], weight: f32) {
    let tasks = out
        .par_chunks_mut(BLOCK)
        .zip(from.par_chunks(BLOCK))
        .zip(to.par_chunks(BLOCK));
    tasks.for_each(|((out, from), to)| difference_piece(out, from, to, weight));
}

#[derive(Clone, Copy)]
struct Factors {
    scale: f32,
    rate: f32,
    momentum: f32,
}

simd_fn! {
    fn update_piece(p: &mut [f32], b: &mut [f32], g: &[f32], f: Factors) {
        for ((p, b), &g) in p.iter_mut().zip(b).zip(g) {
            let g = g * f.scale;
            *b = fma::<FMA>(f.momentum, *b, g);
            *p = fma::<FMA>(-f.rate, fma::<FMA>(f.momentum, *b, g), *p);
        }
    }
}

simd_fn! {
    fn difference_piece(out: &mut [f32], from: &[f32], to: &[f32], weight: f32) {
        for ((out, from), to) in out.iter_mut().zip(from).zip(to) {
            *out = weight * (from - to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are PyTorch's:
    ///
    /// ```python
    /// import torch
    /// p = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    /// sgd = torch.optim.SGD([p], lr=0.7, momentum=0.9, nesterov=True)
    /// for g in [[0.1, -0.2, 0.0], [0.3, 0.1, -1.0], [-0.2, 0.05, 0.25]]:
    ///     p.grad = torch.tensor(g); sgd.step(); print(p.tolist())
    /// ```
    #[test]
    fn steps_are_those_of_pytorch() {
        let diloco = Diloco {
            inner_steps: 1,
            outer_learning_rate: 0.7,
            outer_momentum: 0.9,
        };
        let (mut p, mut b) = ([1.0, -2.0, 0.5], [0.0; 3]);
        let steps = [
            ([0.1, -0.2, 0.0], GOLDEN[0]),
            ([0.3, 0.1, -1.0], GOLDEN[1]),
            ([-0.2, 0.05, 0.25], GOLDEN[2]),
        ];
        for (g, expected) in steps {
            // A gradient of eight tokens.
            let root: Vec<f32> = g.iter().map(|g| 8.0 * g).collect();
            outer_update(&mut p, &mut b, &root, 0.125, diloco);
            for (p, expected) in p.iter().zip(expected) {
                assert!((p - expected).abs() < 1e-6, "{p} is not {expected}");
            }
        }
    }

    const GOLDEN: [[f32; 3]; 3] = [
        [0.867, -1.734, 0.5],
        [0.4113, -1.7536, 1.83],
        [0.45617, -1.77474, 2.0645],
    ];
}
