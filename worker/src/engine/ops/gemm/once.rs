//! A product whose right operand is used but once, such as a weight of a single pass: whoever needs a few columns of it packs
//! them right before all rows take them, so that they are read from memory once and from the second cache by the kernel;
//! and asks for the next while the kernel computes, so that nobody waits for memory.

use std::cell::RefCell;

use rayon::prelude::*;

use super::kernel::{self, Operands, PANEL, ROWS};
use super::transpose::LINE;
use super::{Aligned, DEPTH, Matrix, Shared, for_all_threads, pack, scratch};

/// Elements of a left operand that are packed at a time, unless its rows are many.
const LEFT: usize = 1 << 19;

/// Rows of a left operand that take all columns of a panel before the next rows do: they stay in the second cache with it.
const BLOCK_ROWS: usize = 32 * ROWS;

/// Rows after which the next few lines of the right operand are asked for.
const FETCH_EVERY: usize = 2 * ROWS;

thread_local! {
    /// The part of a right operand that is being used. Never borrowed while other tasks may run on the thread.
    static RIGHT: RefCell<Aligned> = RefCell::default();
}

/// `out = a b`, or `out += a b` if `add`, in full precision; `out` is row-major without gaps. Runs on the threads of the
/// current pool.
pub fn multiply(out: &mut [f32], a: Matrix, b: Matrix, add: bool) {
    let (rows, depth, cols) = (a.rows, b.rows, b.cols);
    assert_eq!(a.cols, depth, "inner sizes differ");
    assert_eq!(out.len(), rows * cols, "size of the product");
    if out.is_empty() {
        return;
    }
    let padded = rows.next_multiple_of(ROWS);
    let deep = (LEFT / padded / DEPTH).max(1) * DEPTH;
    let out = Shared::new(out);
    for start in (0..depth).step_by(deep) {
        let deep = deep.min(depth - start);
        let (a, b) = (a.columns(start, deep), b.rows_of(start, deep));
        scratch(padded * deep, |left| {
            for (block, left) in left.chunks_mut(padded * DEPTH).enumerate() {
                pack_block(left, a.columns(block * DEPTH, left.len() / padded));
            }
            let product = Product {
                out,
                rows,
                left,
                b,
                add: add || start > 0,
            };
            product.on_all_threads();
        });
    }
}

/// Packs a block of a left operand, on all threads.
fn pack_block(left: &mut [f32], a: Matrix) {
    let each = 8 * ROWS;
    let tasks = left.par_chunks_mut(each * a.cols).enumerate();
    tasks.for_each(|(task, left)| {
        let first = task * each;
        pack::pack_left(left, a.rows_of(first, each.min(a.rows - first)));
    });
}

/// A product whose left operand is packed: `[block][tile][depth of the block][6]`.
struct Product<'a> {
    out: Shared,
    rows: usize,
    left: &'a [f32],
    b: Matrix<'a>,
    add: bool,
}

impl Product<'_> {
    fn on_all_threads(&self) {
        let across = self.b.cols.div_ceil(PANEL);
        // Where columns are few, tasks share them, and each packs them for its rows.
        let blocks = for_all_threads().div_ceil(across);
        let blocks = blocks.min(self.rows.div_ceil(8 * ROWS));
        let rows = self.rows.div_ceil(blocks).next_multiple_of(ROWS);
        let tasks = self.rows.div_ceil(rows) * across;
        (0..tasks).into_par_iter().with_max_len(1).for_each(|task| {
            let (first, panel) = (task / across * rows, task % across);
            RIGHT.with_borrow_mut(|right| {
                self.columns(first, rows.min(self.rows - first), panel * PANEL, right);
            });
        });
    }

    /// Rows from `first` on, and the columns of the panel that begins at `column`.
    fn columns(&self, first: usize, rows: usize, column: usize, right: &mut Aligned) {
        let wide = PANEL.min(self.b.cols - column);
        let b = self.b.columns(column, wide);
        for start in (0..b.rows).step_by(DEPTH) {
            let depth = DEPTH.min(b.rows - start);
            let right = right.take(depth * PANEL);
            pack::pack_panels(right, b.rows_of(start, depth));
            let next = start + depth;
            let next = match next < b.rows {
                true => b.rows_of(next, DEPTH.min(b.rows - next)),
                // The thread's next task is likely to be the one beside this.
                false => {
                    let column = (column + PANEL).min(self.b.cols);
                    let beside = self.b.columns(column, PANEL.min(self.b.cols - column));
                    beside.rows_of(0, DEPTH.min(b.rows))
                }
            };
            self.block((first, rows), (column, wide), start, right, next);
        }
    }

    /// One block of the inner dimension, which begins at `start`, with its packed columns.
    fn block(
        &self,
        (first, rows): (usize, usize),
        (column, wide): (usize, usize),
        start: usize,
        right: &[f32],
        next: Matrix,
    ) {
        let depth = right.len() / PANEL;
        let strip = kernel::strip();
        let padded = self.rows.next_multiple_of(ROWS);
        let left =
            &self.left[padded * start + first * depth..][..rows.next_multiple_of(ROWS) * depth];
        let mut ahead = 0..contiguous(next).0;
        let each = ahead
            .len()
            .div_ceil(wide.div_ceil(strip) * rows.div_ceil(FETCH_EVERY));
        for block in (0..rows).step_by(BLOCK_ROWS) {
            let block = block..(block + BLOCK_ROWS).min(rows);
            for at in (0..wide).step_by(strip) {
                for row in block.clone().step_by(FETCH_EVERY) {
                    let o = Operands {
                        depth,
                        a: left[row * depth..].as_ptr(),
                        a_tile: ROWS * depth,
                        a_row: 1,
                        a_col: ROWS,
                        b: right[at * depth..].as_ptr(),
                        b_strip: 0,
                        scale: 1.0,
                    };
                    let to = self.out.at((first + row) * self.b.cols + column + at);
                    let (rows, cols) = (FETCH_EVERY.min(block.end - row), strip.min(wide - at));
                    let add = self.add || start > 0;
                    // SAFETY: whole tiles and strips are packed; this task's rows and columns of `out` are its own, and inside it.
                    unsafe { kernel::panel(o, rows, cols, to, self.b.cols, add) };
                    ahead.by_ref().take(each).for_each(|run| fetch(next, run));
                }
            }
        }
    }
}

/// How many contiguous pieces a matrix has, elements of one, and from one to the next.
fn contiguous(b: Matrix) -> (usize, usize, usize) {
    match b.col_stride {
        1 => (b.rows, b.cols, b.row_stride),
        _ => (b.cols, b.rows, b.col_stride),
    }
}

/// Asks for a contiguous piece, for the second cache: the first is full of what is being used.
fn fetch(_b: Matrix, _piece: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let (_, len, stride) = contiguous(_b);
        for at in (_piece * stride..).step_by(LINE).take(len.div_ceil(LINE)) {
            // SAFETY: a hint; it may point anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(_b.data.as_ptr().wrapping_add(at).cast()) };
        }
    }
}
