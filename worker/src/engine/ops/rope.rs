//! Rotary positions (Su et al., arXiv 2104.09864) in Hugging Face's half-split convention: in each head of width D,
//! elements i and i + D/2 are rotated by the angle `position * theta^(-2i/D)`. Backward rotates the other way.

use rayon::prelude::*;

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
    /// The table for `context` positions of heads of width `dim`.
    pub fn new(theta: f32, dim: usize, context: usize) -> Self {
        let half = dim / 2;
        let frequency =
            |i: usize| (1.0 / libm::pow(f64::from(theta), (2 * i) as f64 / dim as f64)) as f32;
        let mut rows = Vec::with_capacity(context * dim);
        for position in 0..context {
            let angle = |i| f64::from(position as f32 * frequency(i));
            rows.extend((0..half).map(|i| libm::cos(angle(i)) as f32));
            rows.extend((0..half).map(|i| libm::sin(angle(i)) as f32));
        }
        Self { half, rows }
    }

    /// Cosines and sines of one position.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let dim = 2 * self.half;
        self.rows[position * dim..(position + 1) * dim].split_at(self.half)
    }
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
