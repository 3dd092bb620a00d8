//! Causal grouped-query attention: `O = softmax(Q Kᵀ / sqrt(D)) V` per head, where several query heads may share one
//! key/value head (Ainslie et al., arXiv 2305.13245). Query row i, the last rows of the sequence, sees the keys up to
//! its own position, from the beginning of its segment on: samples that are packed into one row do not see each other.
//!
//! Q, K and V are read where they lie (packed rows), in blocks of query rows, so that no T x T matrix is ever stored:
//! forward keeps the logarithm of each row's sum of exponentials, backward recomputes the probabilities from it (the
//! scheme of FlashAttention, Dao et al., arXiv 2205.14135). With P the probabilities, M the dropout factors,
//! A = P∘M and d_i = Σ dO_i∘O_i:
//!
//! dV = Aᵀ dO,   dP = M∘(dO Vᵀ),   dS = P∘(dP - d),   dQ = dS K / sqrt(D),   dK = dSᵀ Q / sqrt(D)

use std::cell::RefCell;

use rayon::prelude::*;

use super::dropout::{Mask, Masks};
use super::gemm::{Aligned, Matrix, Panels, Precision, Shared, small};
use super::simd::{self, exp, simd_fn};

/// Query rows whose scores are alive at a time.
const BLOCK: usize = 24;

/// The sizes of one attention.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Sequences.
    pub samples: usize,
    /// Query rows of each sequence.
    pub queries: usize,
    /// Keys of each sequence; the queries are its last rows.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Shape {
    /// Query heads that share one key/value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of a row of Q and of O.
    pub fn width(&self) -> usize {
        self.heads * self.dim
    }

    /// Width of a packed row `[Q, K, V]`.
    pub fn packed(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// First mask element of row `row` of a head: rows are padded to a multiple of four.
    /// `sample` counts within its lane.
    fn mask_start(&self, sample: usize, head: usize, row: usize) -> u64 {
        let row = (sample * self.heads + head) * self.queries + row;
        (row * self.keys.next_multiple_of(4)) as u64
    }
}

/// Q, K and V: each starts at the first row's first head.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries, rows `q_stride` apart.
    pub q: &'a [f32],
    /// Distance between rows of `q`.
    pub q_stride: usize,
    /// Keys, rows `kv_stride` apart.
    pub k: &'a [f32],
    /// Values, rows `kv_stride` apart.
    pub v: &'a [f32],
    /// Distance between rows of `k` and of `v`.
    pub kv_stride: usize,
    /// For each query row the first key that it may see, `[samples, queries]`; empty where that is always the first.
    pub starts: &'a [u32],
}

impl<'a> Inputs<'a> {
    /// From packed rows `[Q, K, V]`, with the beginnings of their segments.
    pub fn packed(shape: Shape, rows: &'a [f32], starts: &'a [u32]) -> Self {
        let (q, kv, stride) = (shape.width(), shape.kv_heads * shape.dim, shape.packed());
        Self {
            q: rows,
            q_stride: stride,
            k: &rows[q..],
            v: &rows[q + kv..],
            kv_stride: stride,
            starts,
        }
    }

    /// The first key that a query row may see.
    fn first_key(&self, shape: Shape, sample: usize, row: usize) -> usize {
        let start = self.starts.get(sample * shape.queries + row);
        start.map_or(0, |&start| start as usize)
    }

    fn queries(
        &self,
        shape: Shape,
        sample: usize,
        head: usize,
        row: usize,
        rows: usize,
    ) -> Matrix<'a> {
        let start = (sample * shape.queries + row) * self.q_stride + head * shape.dim;
        Matrix::strided(&self.q[start..], rows, shape.dim, self.q_stride)
    }

    fn keys(&self, shape: Shape, sample: usize, group: usize, rows: usize) -> Matrix<'a> {
        let start = sample * shape.keys * self.kv_stride + group * shape.dim;
        Matrix::strided(&self.k[start..], rows, shape.dim, self.kv_stride)
    }

    fn values(&self, shape: Shape, sample: usize, group: usize, rows: usize) -> Matrix<'a> {
        let start = sample * shape.keys * self.kv_stride + group * shape.dim;
        Matrix::strided(&self.v[start..], rows, shape.dim, self.kv_stride)
    }
}

/// Fills `out`, `[samples * queries, heads * dim]`, and `log_sums`, `[samples, heads, queries]`.
pub fn forward(
    shape: Shape,
    out: &mut [f32],
    log_sums: &mut [f32],
    inputs: Inputs,
    masks: Option<Masks>,
) {
    assert_eq!(
        out.len(),
        shape.samples * shape.queries * shape.width(),
        "size of the output"
    );
    assert_eq!(
        log_sums.len(),
        shape.samples * shape.heads * shape.queries,
        "size of the log-sums"
    );
    let shared = Shared::new(out);
    log_sums
        .par_chunks_mut(shape.group() * shape.queries)
        .enumerate()
        .for_each(|(task, log_sums)| {
            SCRATCH.with_borrow_mut(|scratch| {
                let (sample, group) = (task / shape.kv_heads, task % shape.kv_heads);
                let keys = inputs.keys(shape, sample, group, shape.keys);
                let values = inputs.values(shape, sample, group, shape.keys);
                let Scratch { right, p, .. } = scratch;
                let [right_keys, right_values, ..] = right;
                let keys = pack(right_keys, keys.t());
                let values = pack(right_values, values);
                for (i, log_sums) in log_sums.chunks_exact_mut(shape.queries).enumerate() {
                    let head = group * shape.group() + i;
                    let masks = masks.map(|masks| masks.of(sample));
                    let place = (sample, head);
                    let operands = (inputs, &keys, &values);
                    forward_head(shape, shared, log_sums, operands, masks, place, p);
                }
            })
        });
}

/// Packs a right operand that several blocks of rows share.
fn pack<'a>(memory: &'a mut Aligned, b: Matrix) -> Panels<'a> {
    Panels::pack_here(
        memory.take(Panels::len(b.rows(), b.cols(), Precision::F32)),
        b,
    )
}

fn forward_head(
    shape: Shape,
    out: Shared,
    log_sums: &mut [f32],
    (inputs, keys, values): (Inputs, &Panels, &Panels),
    mask: Option<(Mask, usize)>,
    (sample, head): (usize, usize),
    scratch: &mut Vec<f32>,
) {
    let past = shape.keys - shape.queries;
    for (block, log_sums) in log_sums.chunks_mut(BLOCK).enumerate() {
        let (start, rows) = (block * BLOCK, log_sums.len());
        let seen = past + start + rows;
        scratch.resize(rows * seen, 0.0);
        let scores = &mut scratch[..rows * seen];
        let q = inputs.queries(shape, sample, head, start, rows);
        // SAFETY: `scores` holds the product and is borrowed alone.
        unsafe {
            small(
                scores.as_mut_ptr(),
                seen,
                q,
                &keys.columns_to(seen),
                shape.scale(),
                false,
            )
        };
        for (r, (row, log_sum)) in scores.chunks_exact_mut(seen).zip(log_sums).enumerate() {
            let (seen, later) = row.split_at_mut(past + start + r + 1);
            let first = inputs.first_key(shape, sample, start + r);
            let (earlier, seen) = seen.split_at_mut(first);
            *log_sum = softmax(seen);
            earlier.fill(0.0);
            later.fill(0.0);
            if let Some((mask, sample)) = mask {
                drop_row(mask, shape.mask_start(sample, head, start + r), row);
            }
        }
        let at = out.at((sample * shape.queries + start) * shape.width() + head * shape.dim);
        let a = Matrix::new(scores, rows, seen);
        // SAFETY: this task alone writes these rows of this head; `out` has room for them, as checked in `forward`.
        unsafe { small(at, shape.width(), a, &values.rows_to(seen), 1.0, false) };
    }
}

/// Softmax in place; returns the logarithm of the sum of exponentials.
fn softmax(row: &mut [f32]) -> f32 {
    let max = simd::max(row);
    let sum = simd::exp_in_place(row, max);
    simd::scale(row, 1.0 / sum);
    max + libm::logf(sum)
}

fn drop_row(mask: Mask, start: u64, row: &mut [f32]) {
    let mut factors = [0.0; 256];
    for (i, part) in row.chunks_mut(factors.len()).enumerate() {
        let factors = &mut factors[..part.len()];
        mask.factors(start + (i * 256) as u64, factors);
        simd::multiply(part, factors);
    }
}

/// What forward read and made, for backward.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Packed rows `[Q, K, V]`, rotated where the model rotates.
    pub packed: &'a [f32],
    /// The output.
    pub out: &'a [f32],
    /// The log-sums.
    pub log_sums: &'a [f32],
    /// The masks of forward.
    pub masks: Option<Masks<'a>>,
    /// The beginnings of segments, as forward had them.
    pub starts: &'a [u32],
}

/// Fills `dpacked`, the gradient of the packed rows (queries = keys), from `dout`.
pub fn backward(shape: Shape, dpacked: &mut [f32], dout: &[f32], saved: Saved) {
    assert_eq!(shape.queries, shape.keys, "backward needs whole sequences");
    assert_eq!(
        dpacked.len(),
        shape.samples * shape.queries * shape.packed(),
        "size of the gradient"
    );
    let shared = Shared::new(dpacked);
    let inputs = Inputs::packed(shape, saved.packed, saved.starts);
    (0..shape.samples * shape.kv_heads)
        .into_par_iter()
        .for_each(|task| {
            SCRATCH.with_borrow_mut(|scratch| {
                let (sample, group) = (task / shape.kv_heads, task % shape.kv_heads);
                let Scratch { right, p, ds } = scratch;
                let [keys_t, values_t, keys, rest @ ..] = right;
                let k = inputs.keys(shape, sample, group, shape.keys);
                let v = inputs.values(shape, sample, group, shape.keys);
                let packed = (&pack(keys_t, k.t()), &pack(values_t, v.t()), &pack(keys, k));
                for i in 0..shape.group() {
                    let head = group * shape.group() + i;
                    let place = (sample, head, i == 0);
                    backward_head(shape, shared, dout, saved, place, packed, (rest, p, ds));
                }
            })
        });
}

thread_local! {
    /// What one task needs. Nothing in a task hands work to other threads, so it is never borrowed twice.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    /// Packed right operands.
    right: [Aligned; 5],
    /// Scores, then P or A, `[rows, keys]`.
    p: Vec<f32>,
    /// dO Vᵀ, then dS, `[rows, keys]`.
    ds: Vec<f32>,
}

/// Adds one head's part; the first head of a group starts dK and dV. Blocks go from the last to the first: the last
/// one touches every key, so it may write where the others add.
fn backward_head(
    shape: Shape,
    dpacked: Shared,
    dout: &[f32],
    saved: Saved,
    (sample, head, first): (usize, usize, bool),
    (keys_t, values_t, keys): (&Panels, &Panels, &Panels),
    (right, p, ds): (&mut [Aligned; 2], &mut Vec<f32>, &mut Vec<f32>),
) {
    let inputs = Inputs::packed(shape, saved.packed, saved.starts);
    let mask = saved.masks.map(|masks| masks.of(sample));
    let (group, length, dim, width) = (
        head / shape.group(),
        shape.queries,
        shape.dim,
        shape.width(),
    );
    let [packed_q, packed_dout] = right;
    let log_sums = &saved.log_sums[(sample * shape.heads + head) * length..][..length];
    let row_at = |row: usize| (sample * length + row) * shape.packed();
    let dk = row_at(0) + width + group * dim;
    let dv = dk + shape.kv_heads * dim;
    let blocks = length.div_ceil(BLOCK);
    for block in (0..blocks).rev() {
        let start = block * BLOCK;
        let rows = BLOCK.min(length - start);
        let seen = start + rows;
        p.resize(rows * seen, 0.0);
        ds.resize(rows * seen, 0.0);
        let (p, ds) = (&mut p[..rows * seen], &mut ds[..rows * seen]);

        let q = inputs.queries(shape, sample, head, start, rows);
        let at_out = (sample * length + start) * width + head * dim;
        let dout_rows = Matrix::strided(&dout[at_out..], rows, dim, width);
        // SAFETY: `p` and `ds` hold the products and are borrowed alone.
        unsafe {
            small(
                p.as_mut_ptr(),
                seen,
                q,
                &keys_t.columns_to(seen),
                shape.scale(),
                false,
            );
            small(
                ds.as_mut_ptr(),
                seen,
                dout_rows,
                &values_t.columns_to(seen),
                1.0,
                false,
            );
        }
        for r in 0..rows {
            let at = at_out + r * width;
            let d = simd::dot(&dout[at..at + dim], &saved.out[at..at + dim]);
            let (p, ds) = (
                &mut p[r * seen..(r + 1) * seen],
                &mut ds[r * seen..(r + 1) * seen],
            );
            let own = start + r + 1;
            let first = inputs.first_key(shape, sample, start + r);
            for row in [&mut *p, &mut *ds] {
                row[..first].fill(0.0);
                row[own..].fill(0.0);
            }
            let seen = first..own;
            match mask {
                None => backward_row(&mut p[seen.clone()], &mut ds[seen], log_sums[start + r], d),
                Some((mask, sample)) => {
                    let mask_start = shape.mask_start(sample, head, start + r);
                    drop_row(mask, mask_start, &mut ds[..own]);
                    backward_row(&mut p[seen.clone()], &mut ds[seen], log_sums[start + r], d);
                    drop_row(mask, mask_start, &mut p[..own]);
                }
            }
        }
        let (p, ds) = (Matrix::new(p, rows, seen), Matrix::new(ds, rows, seen));
        let add = !(first && block + 1 == blocks);
        let (stride, scale) = (shape.packed(), shape.scale());
        let (q, dout_rows) = (pack(packed_q, q), pack(packed_dout, dout_rows));
        // SAFETY: dQ of this head, and dK and dV of its group, belong to this task alone; `dpacked` has room for
        // whole sequences, as checked in `backward`; dK and dV are complete before anything is added to them.
        unsafe {
            small(dpacked.at(dv), stride, p.t(), &dout_rows, 1.0, add);
            small(dpacked.at(dk), stride, ds.t(), &q, scale, add);
            let dq = dpacked.at(row_at(start) + head * dim);
            small(dq, stride, ds, &keys.rows_to(seen), scale, false);
        }
    }
}

simd_fn! {
    /// Scores to probabilities, and `ds` from dP to `P∘(dP - d)`.
    fn backward_row(p: &mut [f32], ds: &mut [f32], log_sum: f32, d: f32) {
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp::<FMA>(*p - log_sum);
            *ds = *p * (*ds - d);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Site;
    use crate::engine::ops::testing::{check_gradient, pool, random, weigh};

    const SHAPE: Shape = Shape {
        samples: 2,
        queries: 37,
        keys: 37,
        heads: 4,
        kv_heads: 2,
        dim: 8,
    };

    fn run(shape: Shape, packed: &[f32], masks: Option<Masks>) -> (Vec<f32>, Vec<f32>) {
        run_segments(shape, packed, masks, &[])
    }

    fn run_segments(
        shape: Shape,
        packed: &[f32],
        masks: Option<Masks>,
        starts: &[u32],
    ) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![f32::NAN; shape.samples * shape.queries * shape.width()];
        let mut log_sums = vec![f32::NAN; shape.samples * shape.heads * shape.queries];
        forward(
            shape,
            &mut out,
            &mut log_sums,
            Inputs::packed(shape, packed, starts),
            masks,
        );
        (out, log_sums)
    }

    fn gradient(packed: &[f32], dout: &[f32], masks: Option<Masks>) -> Vec<f32> {
        gradient_segments(packed, dout, masks, &[])
    }

    fn gradient_segments(
        packed: &[f32],
        dout: &[f32],
        masks: Option<Masks>,
        starts: &[u32],
    ) -> Vec<f32> {
        let (out, log_sums) = run_segments(SHAPE, packed, masks, starts);
        let mut dpacked = vec![f32::NAN; packed.len()];
        backward(
            SHAPE,
            &mut dpacked,
            dout,
            Saved {
                packed,
                out: &out,
                log_sums: &log_sums,
                masks,
                starts,
            },
        );
        dpacked
    }

    #[test]
    fn forward_agrees_with_the_definition() {
        let (s, stride) = (SHAPE, SHAPE.packed());
        let packed = random(s.samples * s.queries * stride, 1);
        let (out, _) = run(s, &packed, None);
        for (sample, head, i) in [(0, 0, 0), (0, 3, 36), (1, 1, 20), (1, 2, 33)] {
            let row = |r: usize, at: usize| {
                &packed[(sample * s.queries + r) * stride + at * s.dim..][..s.dim]
            };
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let scores: Vec<f32> = (0..=i)
                .map(|j| (dot(row(i, head), row(j, 4 + head / 2)) / (s.dim as f32).sqrt()).exp())
                .collect();
            let sum: f32 = scores.iter().sum();
            for d in 0..s.dim {
                let expected = (0..=i)
                    .map(|j| scores[j] / sum * row(j, 6 + head / 2)[d])
                    .sum::<f32>();
                let got = out[(sample * s.queries + i) * s.width() + head * s.dim + d];
                assert!((got - expected).abs() < 1e-5, "{got} {expected}");
            }
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences_with_and_without_dropout() {
        let packed = random(SHAPE.samples * SHAPE.queries * SHAPE.packed(), 1);
        let dout = random(SHAPE.samples * SHAPE.queries * SHAPE.width(), 2);
        let site = Site {
            seed: 1,
            step: 1,
            lane: 0,
            micro_batch: 0,
        };
        let lanes = [0, 1].map(|lane| Mask::new(Site { lane, ..site }, 0, 0.3).expect("a mask"));
        let masks = Masks {
            lanes: &lanes,
            samples: 1,
            first: 0,
        };
        let segments = segments(&[&[37], &[3, 30, 4]]);
        for (masks, starts) in [
            (None, &[][..]),
            (Some(masks), &[]),
            (None, &segments),
            (Some(masks), &segments),
        ] {
            let dpacked = gradient_segments(&packed, &dout, masks, starts);
            check_gradient(&packed, &dpacked, 41, |packed| {
                weigh(&run_segments(SHAPE, packed, masks, starts).0, &dout)
            });
        }
    }

    /// The beginnings of segments of these lengths, for each sample.
    fn segments(samples: &[&[usize]]) -> Vec<u32> {
        let mut starts = Vec::new();
        for lengths in samples {
            let mut start = 0;
            for &length in *lengths {
                starts.extend(std::iter::repeat_n(start as u32, length));
                start += length;
            }
        }
        starts
    }

    #[test]
    fn segments_do_not_see_each_other() {
        let shape = Shape {
            samples: 1,
            ..SHAPE
        };
        let packed = random(shape.queries * shape.packed(), 7);
        let lengths = [5, 1, 26, 5];
        let (out, _) = run_segments(shape, &packed, None, &segments(&[&lengths]));
        let mut row = 0;
        for length in lengths {
            let alone = Shape {
                queries: length,
                keys: length,
                ..shape
            };
            let own = row * shape.packed()..(row + length) * shape.packed();
            let (expected, _) = run(alone, &packed[own], None);
            let got = &out[row * shape.width()..][..expected.len()];
            assert!(got.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6));
            row += length;
        }
    }

    #[test]
    fn the_last_rows_alone_give_what_they_give_in_the_whole() {
        let shape = Shape {
            samples: 1,
            ..SHAPE
        };
        let packed = random(shape.queries * shape.packed(), 5);
        let (whole, _) = run(shape, &packed, None);
        let tail = Shape {
            queries: 5,
            ..shape
        };
        let skipped = (shape.queries - 5) * shape.packed();
        let all = Inputs::packed(shape, &packed, &[]);
        let (mut out, mut log_sums) = (vec![0.0; 5 * tail.width()], vec![0.0; 5 * tail.heads]);
        forward(
            tail,
            &mut out,
            &mut log_sums,
            Inputs {
                q: &packed[skipped..],
                ..all
            },
            None,
        );
        let expected = &whole[whole.len() - out.len()..];
        assert!(out.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let packed = random(SHAPE.samples * SHAPE.queries * SHAPE.packed(), 1);
        let dout = random(SHAPE.samples * SHAPE.queries * SHAPE.width(), 2);
        let run = |threads| pool(threads).install(|| gradient(&packed, &dout, None));
        let one = run(1);
        assert!(one == run(2) && one == run(3));
    }
}
