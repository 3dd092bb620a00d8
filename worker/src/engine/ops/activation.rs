//! The activations between the two products of a feed-forward layer.
//!
//! GELU, tanh form (`gelu_new`; Hendrycks and Gimpel, arXiv 1606.08415): with z = sqrt(2/π) (u + 0.044715 u³),
//! g = u (1 + tanh z) / 2 = u σ(2z), and dg/du = σ + u σ (1 - σ) 2 dz/du.
//!
//! SwiGLU (Shazeer, arXiv 2002.05202) from a packed row `[gate, up]`: g = gate σ(gate) up.

use rayon::prelude::*;

use super::ROW_BLOCK;
use super::simd::{fma, sigmoid, simd_fn};

const CUBIC: f32 = 0.044_715;
const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
/// Elements in one task of an elementwise loop.
const BLOCK: usize = 16 * 1024;

/// `g = gelu(u)`, elementwise.
pub fn gelu(g: &mut [f32], u: &[f32]) {
    g.par_chunks_mut(BLOCK)
        .zip(u.par_chunks(BLOCK))
        .for_each(|(g, u)| gelu_block(g, u));
}

simd_fn! {
    fn gelu_block(g: &mut [f32], u: &[f32]) {
        for (g, &u) in g.iter_mut().zip(u) {
            let z = TWICE_SQRT_2_OVER_PI * u * fma::<FMA>(CUBIC, u * u, 1.0);
            *g = u * sigmoid::<FMA>(z);
        }
    }
}

/// Replaces the gradient of g by that of u.
pub fn gelu_backward(d: &mut [f32], u: &[f32]) {
    d.par_chunks_mut(BLOCK)
        .zip(u.par_chunks(BLOCK))
        .for_each(|(d, u)| gelu_backward_block(d, u));
}

simd_fn! {
    fn gelu_backward_block(d: &mut [f32], u: &[f32]) {
        for (d, &u) in d.iter_mut().zip(u) {
            let square = u * u;
            let s = sigmoid::<FMA>(TWICE_SQRT_2_OVER_PI * u * fma::<FMA>(CUBIC, square, 1.0));
            let slope = TWICE_SQRT_2_OVER_PI * fma::<FMA>(3.0 * CUBIC, square, 1.0);
            *d *= s * fma::<FMA>(u * (1.0 - s), slope, 1.0);
        }
    }
}

/// g `[rows, inner]` from packed `[rows, 2 * inner]`.
pub fn swiglu(g: &mut [f32], packed: &[f32], inner: usize) {
    g.par_chunks_mut(ROW_BLOCK * inner)
        .zip(packed.par_chunks(ROW_BLOCK * 2 * inner))
        .for_each(|(g, packed)| swiglu_rows(g, packed, inner));
}

simd_fn! {
    fn swiglu_rows(g: &mut [f32], packed: &[f32], inner: usize) {
        for (g, row) in g.chunks_exact_mut(inner).zip(packed.chunks_exact(2 * inner)) {
            let (gate, up) = row.split_at(inner);
            for ((g, &gate), &up) in g.iter_mut().zip(gate).zip(up) {
                *g = gate * sigmoid::<FMA>(gate) * up;
            }
        }
    }
}

/// The gradient of the packed rows, written over them, from the gradient of g.
pub fn swiglu_backward(packed: &mut [f32], dg: &[f32], inner: usize) {
    packed
        .par_chunks_mut(ROW_BLOCK * 2 * inner)
        .zip(dg.par_chunks(ROW_BLOCK * inner))
        .for_each(|(packed, dg)| swiglu_backward_rows(packed, dg, inner));
}

simd_fn! {
    fn swiglu_backward_rows(packed: &mut [f32], dg: &[f32], inner: usize) {
        for (row, dg) in packed.chunks_exact_mut(2 * inner).zip(dg.chunks_exact(inner)) {
            let (gate, up) = row.split_at_mut(inner);
            for ((gate, up), &dg) in gate.iter_mut().zip(up).zip(dg) {
                let s = sigmoid::<FMA>(*gate);
                let silu = *gate * s;
                let slope = fma::<FMA>(silu, 1.0 - s, s);
                *gate = dg * *up * slope;
                *up = dg * silu;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::{check_gradient, random, weigh};

    #[test]
    fn gelu_agrees_with_its_tanh_form() {
        let u: Vec<f32> = (-600..600).map(|i| i as f32 * 0.01).collect();
        let mut g = vec![0.0; u.len()];
        gelu(&mut g, &u);
        for (&u, &g) in u.iter().zip(&g) {
            let x = f64::from(u);
            let expected = 0.5
                * x
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            assert!(
                (f64::from(g) - expected).abs() < 1e-6,
                "{u}: {g} {expected}"
            );
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (rows, inner) = (5, 7);
        let (u, dg) = (random(rows * inner, 1), random(rows * inner, 2));
        let mut du = dg.clone();
        gelu_backward(&mut du, &u);
        check_gradient(&u, &du, 1, |u| {
            let mut g = vec![0.0; u.len()];
            gelu(&mut g, u);
            weigh(&g, &dg)
        });

        let packed = random(rows * 2 * inner, 3);
        let mut dpacked = packed.clone();
        swiglu_backward(&mut dpacked, &dg, inner);
        check_gradient(&packed, &dpacked, 1, |packed| {
            let mut g = vec![0.0; rows * inner];
            swiglu(&mut g, packed, inner);
            weigh(&g, &dg)
        });
    }
}
