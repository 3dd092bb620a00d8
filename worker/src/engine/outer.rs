//! The outer step of a round: SGD with Nesterov's momentum (Sutskever et al., ICML 2013), in place over the flat buffers and
//! in the order of operations of `torch.optim.SGD`:
//!
//! b = μ b + g,   p -= η (g + μ b),   with g = scale · root gradient

use cohort_common::spec::Diloco;
use rayon::prelude::*;

use super::ops::simd::{fma, simd_fn};

/// Elements in one task.
const BLOCK: usize = 64 * 1024;

/// One outer step; what has no gradient stays as it is.
pub fn update(params: &mut [f32], momentum: &mut [f32], root: &[f32], scale: f64, diloco: Diloco) {
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
pub fn difference(out: &mut [f32], from: &[f32], to: &[f32], weight: f32) {
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
            update(&mut p, &mut b, &root, 0.125, diloco);
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
