//! Matrix products of f32 on the CPU.
//!
//! **The order of summation.** Element (i, j) of a product is built of blocks of [`DEPTH`] terms. Within a block the
//! terms are added one after the other, each by one fused multiply-add, beginning with zero; then the block is added
//! to the element, blocks in order. That is the whole rule. It knows nothing of the other rows and columns, of tiles,
//! threads, caches or the width of a vector. So a row's result is the same in any company, which lets lanes share
//! their products; and every processor with a fused multiply-add gives the same bits. Those without round the product
//! and the sum apart.
//!
//! A gradient of a weight is a sum over the rows of several lanes: [`gradient`] takes it lane by lane, each as if it
//! were alone, and adds the lanes along the reduction tree while the pieces are still in the cache.

mod bf16;
mod kernel;
mod once;
mod pack;
#[cfg(test)]
mod tests;
mod transpose;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Mutex;

pub use cohort_common::spec::Precision;
use rayon::prelude::*;

pub use self::bf16::has_amx;
use self::kernel::{Operands, PANEL, ROWS};
pub use self::pack::{Aligned, Panels};
use super::lanes::Lanes;

/// Terms that are summed before they are added to an element.
pub const DEPTH: usize = 256;

/// Rows of a left operand that one task takes at most: with [`DEPTH`] columns they fill a part of the second cache.
const TASK_ROWS: usize = 192;

/// Elements from which on a right operand of [`matmul`] does not stay in the second cache.
const LARGE: usize = 1 << 17;

/// Elements of a right operand in bfloat16 that are packed at a time, if it need not be packed whole.
const PACKED: usize = 1 << 20;

/// Rows of a gradient's sum whose right operand is packed at a time.
const GRADIENT_ROWS: usize = 8 * DEPTH;

/// Rows of a packed right operand of `depth` rows.
fn packed_rows(precision: Precision, depth: usize) -> usize {
    match precision {
        Precision::F32 => depth,
        Precision::Bf16 => bf16::pairs(depth),
    }
}

/// A matrix of f32 somewhere in a slice: element (r, c) is `data[r * row_stride + c * col_stride]`, and one of the
/// strides is 1.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows are `stride` elements apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || (rows - 1) * stride + cols <= data.len(),
            "a {rows} x {cols} matrix with stride {stride} does not fit {} elements",
            data.len()
        );
        Self {
            data,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// A row-major matrix without gaps.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transpose; moves nothing.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `count` rows from `first` on.
    pub fn rows_of(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows beyond the matrix");
        Self {
            data: &self.data[(first * self.row_stride).min(self.data.len())..],
            rows: count,
            ..self
        }
    }

    /// `count` columns from `first` on.
    pub fn columns(self, first: usize, count: usize) -> Self {
        self.t().rows_of(first, count).t()
    }
}

/// `out = a b`, or `out += a b` if `add`; `out` is row-major without gaps. Runs on the threads of the current pool, and packs
/// both operands on the way.
pub fn matmul(out: &mut [f32], a: Matrix, b: Matrix, add: bool, precision: Precision) {
    let (depth, cols) = (b.rows, b.cols);
    if precision == Precision::F32 && depth * cols >= LARGE {
        return once::multiply(out, a, b, add);
    }
    assert_eq!(a.cols, depth, "inner sizes differ");
    // A piece of the right operand at a time: first along the inner dimension, then along the columns.
    let rows = GRADIENT_ROWS.min(depth);
    let width = (PACKED / rows).next_multiple_of(PANEL).min(cols);
    scratch(Panels::len(rows, width, precision), |packed| {
        for start in (0..depth).step_by(rows) {
            let deep = rows.min(depth - start);
            let (a, b) = (a.columns(start, deep), b.rows_of(start, deep));
            for first in (0..cols).step_by(width) {
                let wide = width.min(cols - first);
                let part = &mut packed[..Panels::len(deep, wide, precision)];
                let panels = Panels::pack(part, b.columns(first, wide), precision);
                let add = add || start > 0;
                multiply(&mut out[first..], cols, a, &panels, add, for_all_threads());
            }
        }
    });
}

/// As [`matmul`], with a right operand that is packed already and rows of `out` that lie `stride` apart, in about `tasks`
/// tasks.
pub fn multiply(out: &mut [f32], stride: usize, a: Matrix, b: &Panels, add: bool, tasks: usize) {
    assert_eq!(a.cols, b.depth, "inner sizes differ");
    assert!(
        a.rows == 0 || (a.rows - 1) * stride + b.cols <= out.len(),
        "the product has {} x {} elements",
        a.rows,
        b.cols
    );
    let out = Shared::new(out);
    let (rows, panels) = task_size(a.rows, b.count(), tasks);
    let across = b.count().div_ceil(panels);
    let tasks = a.rows.div_ceil(rows) * across;
    (0..tasks).into_par_iter().for_each(|task| {
        let (first, panel) = (task / across * rows, task % across * panels);
        let a = a.rows_of(first, rows.min(a.rows - first));
        let panels = panel..(panel + panels).min(b.count());
        let to = out.at(first * stride + panel * PANEL);
        LEFT.with_borrow_mut(|left| {
            // SAFETY: the tasks' pieces of `out` are disjoint and lie inside it, as checked above.
            unsafe { product(to, stride, a, b, panels, 1.0, add, left) }
        });
    });
}

/// A product on the calling thread, into rows that lie `stride` elements apart: for small products in a parallel loop.
///
/// # Safety
///
/// For each of the `a.rows` rows, `b.cols` elements from `out + row * stride` on must be valid for reads and writes,
/// initialised if `add`, and used by nobody else during the call.
pub unsafe fn small(out: *mut f32, stride: usize, a: Matrix, b: &Panels, scale: f32, add: bool) {
    assert_eq!(a.cols, b.depth, "inner sizes differ");
    LEFT.with_borrow_mut(|left| {
        // SAFETY: the caller's promise.
        unsafe { product(out, stride, a, b, 0..b.count(), scale, add, left) }
    });
}

/// `out = Σ xᵀ dy` over rows, taken lane by lane and added along the tree; without `fresh`, added to `out`, which takes
/// a single lane. x is `[rows, m]`, dy `[rows, n]`, `out` `[m, n]`.
pub fn gradient(
    out: &mut [f32],
    x: Matrix,
    dy: Matrix,
    lanes: &Lanes,
    fresh: bool,
    precision: Precision,
) {
    assert_eq!(x.rows, lanes.rows(), "rows of the lanes");
    assert_eq!(out.len(), x.cols * dy.cols, "size of the gradient");
    if let Some(rows) = lanes.alone() {
        assert_eq!(x.rows, dy.rows, "rows of both operands");
        for start in (0..rows).step_by(GRADIENT_ROWS) {
            let deep = GRADIENT_ROWS.min(rows - start);
            let (x, dy) = (x.rows_of(start, deep), dy.rows_of(start, deep));
            scratch(Panels::len(deep, dy.cols, precision), |packed| {
                let stride = dy.cols;
                let packed = Panels::pack(packed, dy, precision);
                let add = !fresh || start > 0;
                multiply(out, stride, x.t(), &packed, add, for_all_threads());
            });
        }
        return;
    }
    assert!(fresh, "only a single lane is added to what is there");
    gradient_keeping(out, x, dy, lanes, Kept::default(), precision);
}

/// Rows of a gradient whose parts of each lane are wanted besides their sum.
#[derive(Default)]
pub struct Kept<'a> {
    /// Which, ascending.
    pub rows: &'a [u32],
    /// Where each lane's part goes, `[lanes, rows, n]`.
    pub parts: &'a mut [f32],
}

/// As [`gradient`], of several lanes and from the start, and fills `kept`.
pub fn gradient_keeping(
    out: &mut [f32],
    x: Matrix,
    dy: Matrix,
    lanes: &Lanes,
    kept: Kept,
    precision: Precision,
) {
    assert!(
        x.rows == dy.rows && x.rows == lanes.rows(),
        "rows of the lanes"
    );
    assert_eq!(out.len(), x.cols * dy.cols, "size of the gradient");
    let parts = lanes.count() * kept.rows.len() * dy.cols;
    assert_eq!(kept.parts.len(), parts, "room for what is kept");
    let size = Panels::len(lanes.rows_per_lane(), dy.cols, precision);
    scratch(size * lanes.count(), |packed| {
        let deep = lanes.rows_per_lane();
        let pack = |(lane, packed)| Panels::pack(packed, dy.rows_of(lane * deep, deep), precision);
        let each = packed.par_chunks_exact_mut(size).enumerate();
        let dy: Vec<Panels> = each.map(pack).collect();
        along_the_tree(out, x.t(), &dy, lanes, kept);
    });
}

/// `dy` has one operand for each lane.
fn along_the_tree(out: &mut [f32], x: Matrix, dy: &[Panels], lanes: &Lanes, kept: Kept) {
    let (stride, count, shared) = (dy[0].cols, dy[0].count(), Shared::new(out));
    let (kept, parts) = (kept.rows, Shared::new(kept.parts));
    let (rows, panels) = task_size(x.rows, count, for_all_threads());
    // The partial sums of one task stay in the cache.
    let (rows, panels) = (rows.min(48), panels.min(16));
    let across = count.div_ceil(panels);
    let tasks = x.rows.div_ceil(rows) * across;
    (0..tasks).into_par_iter().for_each(|task| {
        let (first, panel) = (task / across * rows, task % across * panels);
        let x = x.rows_of(first, rows.min(x.rows - first));
        let panels = panel..(panel + panels).min(count);
        let (width, cols) = (
            panels.len() * PANEL,
            (stride - panel * PANEL).min(panels.len() * PANEL),
        );
        let size = x.rows * width;
        let place = |row: usize| kept.partition_point(|&kept| (kept as usize) < row);
        let here = place(first)..place(first + x.rows);
        PARTIAL.with_borrow_mut(|partial| {
            LEFT.with_borrow_mut(|left| {
                let stack = partial.take(size * lanes.depth());
                lanes.reduce(stack, size, |lane, rows, part| {
                    let (to, x) = (part.as_mut_ptr(), x.columns(rows.start, rows.len()));
                    let panels = panels.clone();
                    // SAFETY: `part` holds these rows of whole panels.
                    unsafe { product(to, width, x, &dy[lane], panels, 1.0, false, left) };
                    for index in here.clone() {
                        let own = &part[(kept[index] as usize - first) * width..][..cols];
                        let to = parts.at((lane * kept.len() + index) * stride + panel * PANEL);
                        // SAFETY: this task's columns of a row that is its own.
                        unsafe { to.copy_from_nonoverlapping(own.as_ptr(), cols) };
                    }
                });
                for (row, sum) in stack[..size].chunks_exact(width).enumerate() {
                    let to = shared.at((first + row) * stride + panel * PANEL);
                    // SAFETY: this task's piece of `out`, which no other task touches.
                    unsafe { to.copy_from_nonoverlapping(sum.as_ptr(), cols) };
                }
            });
        });
    });
}

/// Tasks that keep every thread of the current pool busy to the end.
pub fn for_all_threads() -> usize {
    match rayon::current_num_threads() {
        1 => 1,
        threads => 4 * threads,
    }
}

/// Rows and panels of one task: about as many tasks as are wanted, and none so large that its operands leave the cache.
fn task_size(rows: usize, panels: usize, wanted: usize) -> (usize, usize) {
    let blocks = rows
        .div_ceil(TASK_ROWS)
        .max(wanted.min(rows.div_ceil(8 * ROWS)));
    let across = wanted.div_ceil(blocks).min(panels.div_ceil(2)).max(1);
    (
        rows.div_ceil(blocks).next_multiple_of(ROWS).max(ROWS),
        panels.div_ceil(across).max(1),
    )
}

/// One product on one thread.
///
/// # Safety
///
/// As for [`small`], for the columns of `panels` alone; `out` is where the first of them begins. Where a panel is not
/// full, only its own columns are touched.
#[allow(clippy::too_many_arguments)]
unsafe fn product(
    out: *mut f32,
    stride: usize,
    a: Matrix,
    b: &Panels,
    panels: Range<usize>,
    scale: f32,
    add: bool,
    left: &mut Aligned,
) {
    if b.precision == Precision::Bf16 {
        assert!(scale == 1.0, "only full precision has a factor");
        // SAFETY: the caller's promise.
        return unsafe { product_bf16(out, stride, a, b, panels, add, left) };
    }
    for start in (0..a.cols).step_by(DEPTH) {
        let depth = DEPTH.min(a.cols - start);
        let a = a.columns(start, depth);
        // With few panels a row is not used often enough to be worth its packing.
        let packed = (panels.len() > 4).then(|| {
            let left = left.take(a.rows.next_multiple_of(ROWS) * depth);
            pack::pack_left(left, a);
            &*left
        });
        let (from, a_tile, a_row, a_col) = match packed {
            Some(left) => (left, ROWS * depth, 1, ROWS),
            None => (a.data, ROWS * a.row_stride, a.row_stride, a.col_stride),
        };
        for panel in panels.clone() {
            let (right, cols) = b.at(panel, start);
            let o = Operands {
                depth,
                a: from.as_ptr(),
                a_tile,
                a_row,
                a_col,
                b: right,
                b_strip: b.strip_len(),
                scale,
            };
            // SAFETY: the left operand's elements lie in its slice, the right one's in whole panels, and the caller
            // answers for `out`.
            unsafe {
                let to = out.add((panel - panels.start) * PANEL);
                kernel::panel(o, a.rows, cols, to, stride, add || start > 0);
            }
        }
    }
}

/// [`product`] in bfloat16, with a factor of 1.
unsafe fn product_bf16(
    out: *mut f32,
    stride: usize,
    a: Matrix,
    b: &Panels,
    panels: Range<usize>,
    add: bool,
    left: &mut Aligned,
) {
    let pairs = bf16::pairs(a.cols);
    let packed = left.take(bf16::left_len(a.rows, a.cols));
    bf16::pack_left(packed, a);
    for panel in panels.clone() {
        let (right, cols) = b.at(panel, 0);
        for row in (0..a.rows).step_by(2 * bf16::TILE) {
            let from = packed[row * pairs..].as_ptr();
            let rows = (a.rows - row).min(2 * bf16::TILE);
            // SAFETY: whole tiles and panels are packed, and the caller answers for `out`.
            unsafe {
                let to = out.add(row * stride + (panel - panels.start) * PANEL);
                let operands = bf16::Operands {
                    groups: pairs / bf16::TILE,
                    a: from,
                    b: right,
                };
                let target = bf16::Target {
                    c: to,
                    step: stride,
                    add,
                };
                bf16::panel(operands, (rows, cols), target);
            }
        }
    }
}

thread_local! {
    /// A packed left operand, and partial sums. Never borrowed while other tasks may run on the thread.
    static LEFT: RefCell<Aligned> = RefCell::default();
    static PARTIAL: RefCell<Aligned> = RefCell::default();
}

/// Memory for packed right operands, which outlive the switch to another task.
static SCRATCH: Mutex<Vec<Aligned>> = Mutex::new(Vec::new());

/// Calls `f` with `len` elements of scratch memory.
pub fn scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let free = || {
        SCRATCH
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    };
    let mut memory = free().pop().unwrap_or_default();
    let result = f(memory.take(len));
    free().push(memory);
    result
}

/// A mutable slice that tasks of one parallel loop share, each writing places of its own.
#[derive(Clone, Copy)]
pub struct Shared {
    pointer: *mut f32,
    len: usize,
}

// SAFETY: a plain pointer; whoever writes through it promises disjointness (see `at`).
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Shares `data` for as long as the borrow lasts; the caller keeps the borrow alive around the loop.
    pub fn new(data: &mut [f32]) -> Self {
        Self {
            pointer: data.as_mut_ptr(),
            len: data.len(),
        }
    }

    /// A pointer to element `offset`. Dereferencing it is sound only where no other task uses the same element.
    pub fn at(self, offset: usize) -> *mut f32 {
        assert!(offset < self.len, "element {offset} of {}", self.len);
        // SAFETY: inside the allocation, as just checked.
        unsafe { self.pointer.add(offset) }
    }
}
