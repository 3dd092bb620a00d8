//! RMSNorm over each query head and each key head of packed rows `[Q, K, V]`, before they are rotated (Henry et al.,
//! arXiv 2010.04245, as Qwen3 has it). All query heads share one weight, all key heads another, each as wide as a head.
//! The formulas are those of [`super::norm`].

use rayon::prelude::*;

use super::attention::Shape;
use super::norm::{self, Kind, Stats, partial_len};
use super::{ROW_BLOCK, cut};

/// What of a packed row is normalised: query and key heads, and how wide they are together.
#[derive(Clone, Copy)]
struct Heads {
    query: usize,
    key: usize,
    dim: usize,
}

impl Heads {
    fn of(shape: Shape) -> Self {
        Self {
            query: shape.heads,
            key: shape.kv_heads,
            dim: shape.dim,
        }
    }

    fn count(self) -> usize {
        self.query + self.key
    }

    fn width(self) -> usize {
        self.count() * self.dim
    }
}

/// Normalises the query and key heads of `packed` in place. Keeps for backward what they were in `raw`,
/// `[rows, (heads + kv_heads) * dim]`, and `stats`, one for each head. `weights` are the factors of queries, then those
/// of keys.
pub fn forward(
    shape: Shape,
    eps: f32,
    packed: &mut [f32],
    raw: &mut [f32],
    stats: &mut [Stats],
    weights: &[f32],
) {
    let heads = Heads::of(shape);
    let (width, stride) = (heads.width(), shape.packed());
    let (query_weight, key_weight) = weights.split_at(heads.dim);
    packed
        .par_chunks_mut(ROW_BLOCK * stride)
        .zip(raw.par_chunks_mut(ROW_BLOCK * width))
        .zip(stats.par_chunks_mut(ROW_BLOCK * heads.count()))
        .for_each(|((packed, raw), stats)| {
            let rows = packed
                .chunks_exact_mut(stride)
                .zip(raw.chunks_exact_mut(width))
                .zip(stats.chunks_exact_mut(heads.count()));
            for ((row, raw), stats) in rows {
                let row = &mut row[..width];
                raw.copy_from_slice(row);
                let (q, k) = row.split_at_mut(heads.query * heads.dim);
                let (raw_q, raw_k) = raw.split_at(q.len());
                let (stats_q, stats_k) = stats.split_at_mut(heads.query);
                norm::forward_rows(Kind::Rms, eps, q, stats_q, raw_q, query_weight, &[]);
                norm::forward_rows(Kind::Rms, eps, k, stats_k, raw_k, key_weight, &[]);
            }
        });
}

/// Elements of the partial sums of one sample of `length` rows.
pub fn partials(dim: usize, length: usize) -> usize {
    partial_len(2 * dim, length, false)
}

/// Turns the gradient of normalised query and key heads in `dpacked` into that of what they were. For each sample of
/// `shape.queries` rows it leaves partial sums of the weights' gradients in `sums`, one row for each [`ROW_BLOCK`] rows.
pub fn backward(
    shape: Shape,
    dpacked: &mut [f32],
    sums: &mut [f32],
    raw: &[f32],
    stats: &[Stats],
    weights: &[f32],
) {
    let heads = Heads::of(shape);
    let (width, stride, length) = (heads.width(), shape.packed(), shape.queries);
    dpacked
        .par_chunks_mut(length * stride)
        .zip(sums.par_chunks_mut(partials(heads.dim, length)))
        .zip(raw.par_chunks(length * width))
        .zip(stats.par_chunks(length * heads.count()))
        .for_each(|(((dpacked, sums), raw), stats)| {
            dpacked
                .par_chunks_mut(ROW_BLOCK * stride)
                .zip(sums.par_chunks_mut(2 * heads.dim))
                .zip(raw.par_chunks(ROW_BLOCK * width))
                .zip(stats.par_chunks(ROW_BLOCK * heads.count()))
                .for_each(|(((dpacked, sums), raw), stats)| {
                    sums.fill(0.0);
                    let mut dy = vec![0.0; width];
                    let rows = dpacked
                        .chunks_exact_mut(stride)
                        .zip(raw.chunks_exact(width))
                        .zip(stats.chunks_exact(heads.count()));
                    for ((row, raw), stats) in rows {
                        backward_row(heads, &mut row[..width], &mut dy, sums, raw, stats, weights);
                    }
                });
        });
}

fn backward_row(
    heads: Heads,
    row: &mut [f32],
    dy: &mut [f32],
    mut sums: &mut [f32],
    raw: &[f32],
    stats: &[Stats],
    weights: &[f32],
) {
    dy.copy_from_slice(row);
    row.fill(0.0);
    let (q, k) = row.split_at_mut(heads.query * heads.dim);
    let (dy_q, dy_k) = dy.split_at(q.len());
    let (raw_q, raw_k) = raw.split_at(q.len());
    let (stats_q, stats_k) = stats.split_at(heads.query);
    let (weight_q, weight_k) = weights.split_at(heads.dim);
    let sums_q = cut(&mut sums, heads.dim);
    let none = &mut [];
    norm::backward_rows(Kind::Rms, q, sums_q, none, dy_q, raw_q, stats_q, weight_q);
    norm::backward_rows(Kind::Rms, k, sums, none, dy_k, raw_k, stats_k, weight_k);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::simd;
    use crate::engine::ops::testing::{check_gradient, random, weigh};

    const EPS: f32 = 1e-5;
    const SHAPE: Shape = Shape {
        samples: 2,
        queries: 70,
        keys: 70,
        heads: 3,
        kv_heads: 1,
        dim: 6,
    };

    fn run(packed: &[f32], weights: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<Stats>) {
        let mut packed = packed.to_vec();
        let rows = packed.len() / SHAPE.packed();
        let mut raw = vec![f32::NAN; rows * 4 * SHAPE.dim];
        let mut stats = vec![[f32::NAN; 2]; rows * 4];
        forward(SHAPE, EPS, &mut packed, &mut raw, &mut stats, weights);
        (packed, raw, stats)
    }

    #[test]
    fn queries_and_keys_are_normalised_and_values_left_alone() {
        let packed = random(140 * SHAPE.packed(), 1);
        let weights = random(2 * SHAPE.dim, 2);
        let (out, ..) = run(&packed, &weights);
        for (head, (y, x)) in out.chunks(6).zip(packed.chunks(6)).enumerate() {
            let weight = match head % 5 {
                0..3 => &weights[..6],
                3 => &weights[6..],
                _ => {
                    assert_eq!(y, x);
                    continue;
                }
            };
            let square = x.iter().map(|x| x * x).sum::<f32>() / 6.0;
            for i in 0..6 {
                let expected = weight[i] * x[i] / (square + EPS).sqrt();
                assert!((y[i] - expected).abs() < 1e-5, "{} {expected}", y[i]);
            }
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let packed = random(140 * SHAPE.packed(), 1);
        let (weights, dy) = (random(2 * SHAPE.dim, 2), random(packed.len(), 3));
        let (_, raw, stats) = run(&packed, &weights);
        let mut dpacked = dy.clone();
        let mut sums = vec![f32::NAN; 2 * partials(SHAPE.dim, SHAPE.queries)];
        backward(SHAPE, &mut dpacked, &mut sums, &raw, &stats, &weights);
        let mut dweights = vec![0.0; weights.len()];
        for part in sums.chunks_exact(weights.len()) {
            simd::add(&mut dweights, part);
        }
        check_gradient(&packed, &dpacked, 11, |x| weigh(&run(x, &weights).0, &dy));
        check_gradient(&weights, &dweights, 1, |w| weigh(&run(&packed, w).0, &dy));
    }
}
