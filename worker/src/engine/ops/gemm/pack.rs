//! Operands in the order in which the kernels read them.

use super::kernel::{PANEL, ROWS, strip};
use super::transpose::{LINE, transpose, transpose_tile};
use super::{Matrix, Precision, bf16, packed_rows};
use rayon::prelude::*;

/// A right operand in panels of 64 columns, each in strips that suit the kernel: `[panel][strip][depth][columns of a strip]`,
/// the last strip in use filled up with zeros; or in bfloat16 `[panel][pair of terms][64]`.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    data: &'a [f32],
    /// Rows from one panel to the next.
    stride: usize,
    /// Columns that lie side by side.
    strip: usize,
    pub precision: Precision,
    pub depth: usize,
    pub cols: usize,
}

/// Memory that is aligned to whole cache lines, so that no vector straddles two.
#[derive(Default)]
pub struct Aligned(Vec<f32>);

impl Aligned {
    /// `len` elements with whatever they were.
    pub fn take(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() < len + LINE {
            self.0.resize(len + LINE, 0.0);
        }
        let start = self.0.as_ptr().align_offset(64).min(LINE);
        &mut self.0[start..start + len]
    }
}

impl<'a> Panels<'a> {
    /// Elements that a packed `[depth, cols]` operand takes.
    pub fn len(depth: usize, cols: usize, precision: Precision) -> usize {
        packed_rows(precision, depth) * cols.next_multiple_of(PANEL)
    }

    /// Packs `b` into `out` in full precision, on the calling thread.
    pub fn pack_here(out: &'a mut [f32], b: Matrix) -> Self {
        Self::pack_by(out, b, Precision::F32, pack_panels)
    }

    /// Packs `b` into `out`, on all threads.
    pub fn pack(out: &'a mut [f32], b: Matrix, precision: Precision) -> Self {
        Self::pack_by(out, b, precision, |out, b| {
            // Several panels to a task, so that long rows are read in long pieces.
            let rows = packed_rows(precision, b.rows).max(1);
            let tasks = out.par_chunks_mut(4 * PANEL * rows).enumerate();
            tasks.for_each(|(task, out)| {
                let first = 4 * task * PANEL;
                let b = b.columns(first, (b.cols - first).min(4 * PANEL));
                match precision {
                    Precision::F32 => pack_panels(out, b),
                    Precision::Bf16 => bf16::pack_panels(out, b),
                }
            });
        })
    }

    fn pack_by(
        out: &'a mut [f32],
        b: Matrix,
        precision: Precision,
        pack: impl FnOnce(&mut [f32], Matrix),
    ) -> Self {
        let (depth, cols) = (b.rows, b.cols);
        assert_eq!(
            out.len(),
            Self::len(depth, cols, precision),
            "room for the panels"
        );
        pack(out, b);
        Self {
            data: out,
            stride: packed_rows(precision, depth),
            strip: match precision {
                Precision::F32 => strip(),
                Precision::Bf16 => PANEL,
            },
            precision,
            depth,
            cols,
        }
    }

    /// The first `count` rows of the inner dimension alone; in full precision.
    pub fn rows_to(&self, count: usize) -> Panels<'a> {
        assert!(self.precision == Precision::F32 && count <= self.depth);
        Panels {
            depth: count,
            ..*self
        }
    }

    /// The first `count` columns alone.
    pub fn columns_to(&self, count: usize) -> Panels<'a> {
        Panels {
            cols: count.min(self.cols),
            ..*self
        }
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.cols.div_ceil(PANEL)
    }

    /// Where row `row` of panel `index` begins in its first strip, and how many columns the panel has.
    pub fn at(&self, index: usize, row: usize) -> (*const f32, usize) {
        let rest = &self.data[index * self.stride * PANEL + row * self.strip..];
        (rest.as_ptr(), (self.cols - index * PANEL).min(PANEL))
    }

    /// Elements from one strip to the next.
    pub fn strip_len(&self) -> usize {
        self.stride * self.strip
    }
}

/// Packs panels in full precision, on the calling thread.
pub fn pack_panels(out: &mut [f32], b: Matrix) {
    let strip = strip();
    if b.col_stride == 1 {
        // The usual widths as constants: such a copy is a few moves.
        return match strip {
            LINE => copy_rows::<LINE>(out, b),
            _ => copy_rows::<PANEL>(out, b),
        };
    }
    let firsts = (0..b.cols).step_by(strip);
    for (first, out) in firsts.zip(out.chunks_exact_mut(strip * b.rows)) {
        let columns = b.columns(first, (b.cols - first).min(strip));
        transpose(out, strip, columns.t());
    }
}

/// Rows of `b`, cut into strips.
fn copy_rows<const STRIP: usize>(out: &mut [f32], b: Matrix) {
    let (depth, out) = (b.rows, out.as_chunks_mut::<STRIP>().0);
    for p in 0..depth {
        let (whole, rest) = b.data[p * b.row_stride..][..b.cols].as_chunks();
        for (j, part) in whole.iter().enumerate() {
            out[j * depth + p] = *part;
        }
        if !rest.is_empty() {
            let (own, beyond) = out[whole.len() * depth + p].split_at_mut(rest.len());
            own.copy_from_slice(rest);
            beyond.fill(0.0);
        }
    }
}

/// Packs rows of a left operand: `[tile][depth][6]`, the last tile filled up with whatever was there.
pub fn pack_left(out: &mut [f32], a: Matrix) {
    let depth = a.cols;
    for (tile, out) in out.chunks_exact_mut(ROWS * depth).enumerate() {
        let part = a.rows_of(tile * ROWS, (a.rows - tile * ROWS).min(ROWS));
        match part.col_stride {
            1 => transpose_tile(out, part),
            _ => {
                assert_eq!(
                    part.row_stride, 1,
                    "columns are contiguous where rows are not"
                );
                for (p, out) in out.chunks_exact_mut(ROWS).enumerate() {
                    let from = &part.data[p * part.col_stride..][..part.rows];
                    // A whole tile is copied by a few moves, without a call.
                    match (out.first_chunk_mut::<ROWS>(), from.first_chunk::<ROWS>()) {
                        (Some(out), Some(from)) => *out = *from,
                        _ => out[..from.len()].copy_from_slice(from),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_left_operand_lies_column_by_column_in_tiles() {
        for (rows, cols, stride) in [(6, 16, 16), (13, 37, 40), (12, 64, 64), (5, 3, 9)] {
            let data: Vec<f32> = (0..rows * stride).map(|i| i as f32).collect();
            let a = Matrix::strided(&data, rows, cols, stride);
            let mut out = vec![-1.0; rows.next_multiple_of(ROWS) * cols];
            pack_left(&mut out, a);
            for (row, p) in (0..rows).flat_map(|row| (0..cols).map(move |p| (row, p))) {
                let found = out[(row / ROWS * cols + p) * ROWS + row % ROWS];
                assert_eq!(found, data[row * stride + p], "{rows} x {cols}: {row}, {p}");
            }
        }
    }
}
