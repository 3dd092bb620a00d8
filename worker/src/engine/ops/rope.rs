//! Rotary positions (Su et al., arXiv 2104.09864) in Hugging Face's half-split convention: in each head of width D,
//! elements i and i + D/2 are rotated by the angle `position * theta^(-2i/D)`. Backward rotates the other way.

use rayon::prelude::*;

use cohort_common::spec::{ModelConfig, RopeScaling};

use super::simd::simd_fn;
use super::{ROW_BLOCK, position};

/// Cosines and sines of all positions.
#[derive(Clone, Debug)]
pub struct Table {
    half: usize,
    /// Per position: `half` cosines, then `half` sines.
    rows: Vec<f32>,
}

impl Table {
    /// The table of a model.
    pub fn of(model: &ModelConfig) -> Self {
        let mut frequencies = frequencies(model.rope_theta, model.head_dim());
        if let Some(scaling) = model.rope_scaling {
            frequencies
                .iter_mut()
                .for_each(|f| *f = scaled(*f, scaling));
        }
        Self::with(&frequencies, model.context)
    }

    /// The table for `context` positions of heads of width `dim`, without scaling.
    #[cfg(test)]
    pub fn new(theta: f32, dim: usize, context: usize) -> Self {
        Self::with(&frequencies(theta, dim), context)
    }

    fn with(frequencies: &[f32], context: usize) -> Self {
        let half = frequencies.len();
        let mut rows = Vec::with_capacity(context * 2 * half);
        for position in 0..context {
            let angles = || {
                frequencies
                    .iter()
                    .map(|frequency| f64::from(position as f32 * frequency))
            };
            rows.extend(angles().map(|angle| libm::cos(angle) as f32));
            rows.extend(angles().map(|angle| libm::sin(angle) as f32));
        }
        Self { half, rows }
    }

    /// Cosines and sines of one position.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let dim = 2 * self.half;
        self.rows[position * dim..(position + 1) * dim].split_at(self.half)
    }
}

fn frequencies(theta: f32, dim: usize) -> Vec<f32> {
    let frequency =
        |i: usize| (1.0 / libm::pow(f64::from(theta), (2 * i) as f64 / dim as f64)) as f32;
    (0..dim / 2).map(frequency).collect()
}

/// A frequency as `transformers` scales it (`modeling_rope_utils.py`).
fn scaled(frequency: f32, scaling: RopeScaling) -> f32 {
    let plain = f64::from(frequency);
    let scaled = match scaling {
        RopeScaling::Linear { factor } => plain / f64::from(factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
            // How often the wave fits into the context of pretraining.
            let waves =
                f64::from(original_max_position_embeddings) * plain / (2.0 * std::f64::consts::PI);
            let kept = ((waves - low) / (high - low)).clamp(0.0, 1.0);
            kept * plain + (1.0 - kept) * plain / f64::from(factor)
        }
    };
    scaled as f32
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Forward.
    Forward,
    /// Backward: the gradient of the unrotated vector.
    Backward,
}

/// Rotates the first `heads` heads of each row in place. Rows are `stride` apart; row r has the position [`position`],
/// `start` further on.
pub fn rotate(
    table: &Table,
    turn: Turn,
    rows: &mut [f32],
    stride: usize,
    heads: usize,
    length: usize,
    (start, starts): (usize, &[u32]),
) {
    rows.par_chunks_mut(ROW_BLOCK * stride)
        .enumerate()
        .for_each(|(block, rows)| {
            for (r, row) in rows.chunks_exact_mut(stride).enumerate() {
                let (cos, sin) = table.at(start + position(block * ROW_BLOCK + r, length, starts));
                let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
                rotate_row(&mut row[..heads * 2 * table.half], cos, sin, sign);
            }
        });
}

simd_fn! {
    fn rotate_row(row: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for head in row.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (x, y, s) = (*a, *b, s * sign);
                *a = x * c - y * s;
                *b = y * c + x * s;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::random;

    #[test]
    fn turning_back_restores_the_rows_and_leaves_the_rest_alone() {
        let table = Table::new(10_000.0, 8, 16);
        let rows = random(6 * 30, 1);
        let mut turned = rows.clone();
        rotate(&table, Turn::Forward, &mut turned, 30, 3, 3, (4, &[]));
        assert_ne!(rows[..24], turned[..24]);
        assert_eq!(rows[24..30], turned[24..30]);
        rotate(&table, Turn::Backward, &mut turned, 30, 3, 3, (4, &[]));
        assert!(rows.iter().zip(&turned).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn scaling_keeps_short_waves_and_stretches_long_ones() {
        let plain = frequencies(500_000.0, 128);
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let with = |scaling| -> Vec<f32> { plain.iter().map(|f| scaled(*f, scaling)).collect() };
        let stretched = with(llama3);
        assert_eq!(plain[..29], stretched[..29]);
        assert!((35..64).all(|i| (stretched[i] * 8.0 / plain[i] - 1.0).abs() < 1e-6));
        // transformers: ROPE_INIT_FUNCTIONS["llama3"] for Llama 3.1 8B, elements 29 and 32.
        for (i, expected) in [(29, 0.002_166_570_6), (32, 0.000_524_846)] {
            assert!(
                (stretched[i] / expected - 1.0).abs() < 1e-6,
                "{}",
                stretched[i]
            );
        }
        let linear = with(RopeScaling::Linear { factor: 4.0 });
        assert!(plain.iter().zip(linear).all(|(p, l)| p / 4.0 == l));
    }

    #[test]
    fn products_of_rotated_vectors_depend_on_the_distance_alone() {
        let table = Table::new(100.0, 8, 16);
        let (q, k) = (random(8, 1), random(8, 2));
        let product = |at_q, at_k| {
            let (mut q, mut k) = (q.clone(), k.clone());
            rotate(&table, Turn::Forward, &mut q, 8, 1, 1, (at_q, &[]));
            rotate(&table, Turn::Forward, &mut k, 8, 1, 1, (at_k, &[]));
            q.iter().zip(&k).map(|(q, k)| q * k).sum::<f32>()
        };
        assert!((product(5, 2) - product(12, 9)).abs() < 1e-5);
    }
}
