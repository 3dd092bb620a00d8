//! RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm (Ba et al., arXiv 1607.06450) over the rows of x.
//!
//! RMSNorm:   y = w x r,             r = 1 / sqrt(mean(x²) + eps)
//! LayerNorm: y = w (x - m) r + b,   m = mean(x), r = 1 / sqrt(mean((x - m)²) + eps)
//!
//! Backward, with g = w dy and n = (x - m) r (m = 0 for RMSNorm):
//! RMSNorm:   dx += r (g - n mean(g n))
//! LayerNorm: dx += r (g - mean(g) - n mean(g n))
//! dw += Σ_rows dy n,   db += Σ_rows dy

use rayon::prelude::*;

use super::ROW_BLOCK;
use super::simd::{simd_fn, sum_by};

/// Which of the two norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Without mean and bias.
    Rms,
    /// With mean, and with a bias where one is given.
    Layer,
}

/// What backward needs of each row: `[mean, r]`.
pub type Stats = [f32; 2];

/// Normalises each row of `x` into `y`; fills `stats`, one per row.
pub fn forward(
    kind: Kind,
    eps: f32,
    y: &mut [f32],
    stats: &mut [Stats],
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
) {
    let width = weight.len();
    let block = ROW_BLOCK * width;
    y.par_chunks_mut(block)
        .zip(x.par_chunks(block))
        .zip(stats.par_chunks_mut(ROW_BLOCK))
        .for_each(|((y, x), stats)| {
            forward_rows(kind, eps, y, stats, x, weight, bias.unwrap_or(&[]))
        });
}

simd_fn! {
    /// [`forward`] in one thread.
    pub fn forward_rows(kind: Kind, eps: f32, y: &mut [f32], stats: &mut [Stats], x: &[f32], weight: &[f32], bias: &[f32]) {
        let width = weight.len();
        let scale = 1.0 / width as f32;
        for ((y, x), stat) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(stats) {
            let mean = match kind {
                Kind::Rms => 0.0,
                Kind::Layer => sum_by(width, |i| x[i]) * scale,
            };
            let square = sum_by(width, |i| (x[i] - mean) * (x[i] - mean));
            let r = 1.0 / (square * scale + eps).sqrt();
            *stat = [mean, r];
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                *y = (x - mean) * r * w;
            }
            for (y, &b) in y.iter_mut().zip(bias) {
                *y += b;
            }
        }
    }
}

/// Elements of the partial sums of one sample of `length` rows.
pub fn partial_len(width: usize, length: usize, bias: bool) -> usize {
    length.div_ceil(ROW_BLOCK) * width * if bias { 2 } else { 1 }
}

/// Adds the gradient through the norm to `dx`. For each sample of `length` rows it leaves partial sums of dw (and db)
/// in `partials`, one row of dw (and db) for each [`ROW_BLOCK`] rows.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    kind: Kind,
    dx: &mut [f32],
    partials: &mut [f32],
    dy: &[f32],
    x: &[f32],
    stats: &[Stats],
    weight: &[f32],
    (length, bias): (usize, bool),
) {
    let width = weight.len();
    let (sample, block) = (length * width, ROW_BLOCK * width);
    dx.par_chunks_mut(sample)
        .zip(partials.par_chunks_mut(partial_len(width, length, bias)))
        .zip(dy.par_chunks(sample))
        .zip(x.par_chunks(sample))
        .zip(stats.par_chunks(length))
        .for_each(|((((dx, partials), dy), x), stats)| {
            dx.par_chunks_mut(block)
                .zip(partials.par_chunks_mut(if bias { 2 * width } else { width }))
                .zip(dy.par_chunks(block))
                .zip(x.par_chunks(block))
                .zip(stats.par_chunks(ROW_BLOCK))
                .for_each(|((((dx, partial), dy), x), stats)| {
                    partial.fill(0.0);
                    let (dw, db) = partial.split_at_mut(width);
                    backward_rows(kind, dx, dw, db, dy, x, stats, weight);
                });
        });
}

simd_fn! {
    /// Adds the gradient through the norm to `dx`, and the sums over these rows to `dw` and `db`; in one thread.
    pub fn backward_rows(
        kind: Kind, dx: &mut [f32], dw: &mut [f32], db: &mut [f32],
        dy: &[f32], x: &[f32], stats: &[Stats], weight: &[f32],
    ) {
        let width = weight.len();
        let scale = 1.0 / width as f32;
        for (((dx, dy), x), &[mean, r]) in dx
            .chunks_exact_mut(width)
            .zip(dy.chunks_exact(width))
            .zip(x.chunks_exact(width))
            .zip(stats)
        {
            let mean_g = match kind {
                Kind::Rms => 0.0,
                Kind::Layer => sum_by(width, |i| dy[i] * weight[i]) * scale,
            };
            let mean_gn = sum_by(width, |i| dy[i] * weight[i] * ((x[i] - mean) * r)) * scale;
            for i in 0..width {
                let n = (x[i] - mean) * r;
                dx[i] += r * (dy[i] * weight[i] - mean_g - n * mean_gn);
                dw[i] += dy[i] * n;
            }
            for (db, &dy) in db.iter_mut().zip(dy) {
                *db += dy;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::simd;
    use crate::engine::ops::testing::{check_gradient, random, weigh};

    const EPS: f32 = 1e-5;

    fn run(kind: Kind, x: &[f32], w: &[f32], b: Option<&[f32]>) -> (Vec<f32>, Vec<Stats>) {
        let (mut y, mut stats) = (
            vec![f32::NAN; x.len()],
            vec![[f32::NAN; 2]; x.len() / w.len()],
        );
        forward(kind, EPS, &mut y, &mut stats, x, w, b);
        (y, stats)
    }

    #[test]
    fn forward_agrees_with_the_formula() {
        let (rows, width) = (67, 37);
        let (x, w, b) = (random(rows * width, 1), random(width, 2), random(width, 3));
        for kind in [Kind::Rms, Kind::Layer] {
            let (y, _) = run(kind, &x, &w, Some(&b));
            for (y, x) in y.chunks(width).zip(x.chunks(width)) {
                let mean = if kind == Kind::Rms {
                    0.0
                } else {
                    x.iter().sum::<f32>() / width as f32
                };
                let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / width as f32;
                for i in 0..width {
                    let expected = w[i] * (x[i] - mean) / (square + EPS).sqrt() + b[i];
                    assert!((y[i] - expected).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (rows, width) = (66, 10);
        let (x, w, b, dy) = (
            random(rows * width, 1),
            random(width, 2),
            random(width, 3),
            random(rows * width, 4),
        );
        for kind in [Kind::Rms, Kind::Layer] {
            let (_, stats) = run(kind, &x, &w, Some(&b));
            let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; width], vec![0.0; width]);
            let mut partials = vec![f32::NAN; partial_len(width, rows, true)];
            backward(
                kind,
                &mut dx,
                &mut partials,
                &dy,
                &x,
                &stats,
                &w,
                (rows, true),
            );
            for part in partials.chunks_exact(2 * width) {
                simd::add(&mut dw, &part[..width]);
                simd::add(&mut db, &part[width..]);
            }
            check_gradient(&x, &dx, 7, |x| weigh(&run(kind, x, &w, Some(&b)).0, &dy));
            check_gradient(&w, &dw, 1, |w| weigh(&run(kind, &x, w, Some(&b)).0, &dy));
            check_gradient(&b, &db, 1, |b| weigh(&run(kind, &x, &w, Some(b)).0, &dy));
        }
    }
}
