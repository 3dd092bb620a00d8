//! Products of bfloat16 operands, summed in f32: the other precision.
//!
//! **The order of summation.** Operands are rounded to bfloat16 (to nearest, ties to even; numbers below the normal range
//! become zero). An element of the product is built of groups of [`GROUP`] terms, filled up with zeros at the end. Within
//! a group the even and the odd terms are summed apart, one after the other from zero; the two sums are added, and their
//! sum to the element, groups in order. Every step is rounded to f32, and what lies below the normal range then becomes zero.
//!
//! This is what Intel's AMX does (`TDPBF16PS`, Intel SDM volume 2), which computes a group of 16 x 16 elements in one
//! instruction. On other processors the same steps are taken one by one, to the same bits: with AVX-512 or AVX2 not much slower
//! than products of f32 are. (`VDPBF16PS` of AVX512-BF16 takes two of the steps at a time, but at a quarter of the rate of a fused
//! multiply-add on the Intel processor where it was measured.) Where a number is rounded to the least of the normal range itself
//! the steps do what AVX-512 and AVX2 do; AMX has not been tried there.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod group;

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use super::Matrix;
use super::kernel::PANEL;
use super::pack::Aligned;
use super::transpose::transpose;
#[cfg(target_arch = "x86_64")]
use crate::engine::ops::simd::{InstructionSet, instruction_set};
use crate::engine::ops::simd::{fma, simd_fn};

/// Terms of one group.
pub const GROUP: usize = 32;

/// Pairs of terms in a group; also the rows and the columns of a tile.
pub const TILE: usize = GROUP / 2;

/// Rows of the inner dimension in pairs, whole groups.
pub fn pairs(depth: usize) -> usize {
    depth.div_ceil(GROUP) * TILE
}

/// Two terms as they lie in memory, the first in the low half.
#[inline(always)]
fn pair(first: f32, second: f32) -> u32 {
    round(first) >> 16 | round(second) & 0xFFFF_0000
}

/// x rounded to bfloat16, in the high half.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000;
    let magnitude = bits & 0x7FFF_FFFF;
    let kept = if magnitude < 0x0080_0000 {
        bits & 0x8000_0000
    } else {
        rounded
    };
    // A NaN could round to infinity.
    if magnitude > 0x7F80_0000 {
        bits | 0x0040_0000
    } else {
        kept
    }
}

simd_fn! {
    /// Pairs of elements that lie one after the other; a last one alone is paired with zero.
    fn pair_neighbours(out: &mut [f32], row: &[f32]) {
        let (whole, rest) = row.as_chunks::<2>();
        for (out, [a, b]) in out.iter_mut().zip(whole) {
            *out = f32::from_bits(pair(*a, *b));
        }
        for (out, &a) in out[whole.len()..].iter_mut().zip(rest) {
            *out = f32::from_bits(pair(a, 0.0));
        }
    }
}

simd_fn! {
    /// Pairs of elements of two rows.
    fn pair_rows(out: &mut [f32], first: &[f32], second: &[f32]) {
        for ((out, &a), &b) in out.iter_mut().zip(first).zip(second) {
            *out = f32::from_bits(pair(a, b));
        }
    }
}

/// Packs columns of a right operand: `[panel][pair][64]`, filled up with zeros.
pub fn pack_panels(out: &mut [f32], b: Matrix) {
    let pairs = pairs(b.rows);
    for (j, out) in out.chunks_exact_mut(PANEL * pairs).enumerate() {
        let b = b.columns(j * PANEL, (b.cols - j * PANEL).min(PANEL));
        if b.col_stride == 1 {
            let none = [0.0; PANEL];
            for (p, out) in out.chunks_exact_mut(PANEL).enumerate() {
                let row = |p: usize| match p < b.rows {
                    true => &b.data[p * b.row_stride..][..b.cols],
                    false => &none[..b.cols],
                };
                let (own, rest) = out.split_at_mut(b.cols);
                pair_rows(own, row(2 * p), row(2 * p + 1));
                rest.fill(0.0);
            }
        } else {
            COLUMNS.with_borrow_mut(|columns| {
                let columns = columns.take(b.cols * pairs);
                let rows = columns.chunks_exact_mut(pairs).enumerate();
                rows.for_each(|(column, out)| {
                    let (own, rest) = out.split_at_mut(b.rows.div_ceil(2));
                    pair_neighbours(own, &b.data[column * b.col_stride..][..b.rows]);
                    rest.fill(0.0);
                });
                transpose(out, PANEL, Matrix::new(columns, b.cols, pairs));
            });
        }
    }
}

thread_local! {
    /// The columns of one panel in pairs. Borrowed while nothing else can run on the thread.
    static COLUMNS: RefCell<Aligned> = RefCell::default();
}

/// Elements of a packed left operand.
pub fn left_len(rows: usize, depth: usize) -> usize {
    rows.next_multiple_of(2 * TILE) * pairs(depth)
}

/// Packs rows of a left operand: `[tile][group][16 rows][16 pairs]`, filled up with zeros.
pub fn pack_left(out: &mut [f32], a: Matrix) {
    let groups = pairs(a.cols) / TILE;
    let mut columns = [0.0f32; TILE * TILE];
    for (index, out) in out.chunks_exact_mut(TILE * TILE).enumerate() {
        let (row, group) = (index / groups * TILE, index % groups);
        let (rows, first) = (a.rows.saturating_sub(row).min(TILE), group * GROUP);
        let depth = (a.cols - first).min(GROUP);
        if rows < TILE || depth < GROUP {
            out.fill(0.0);
        }
        if rows == 0 {
            continue;
        }
        let part = a.rows_of(row, rows).columns(first, depth);
        if part.col_stride == 1 {
            for (row, out) in out.chunks_exact_mut(TILE).enumerate().take(rows) {
                pair_neighbours(out, &part.data[row * part.row_stride..][..depth]);
            }
        } else {
            let none = [0.0; TILE];
            for (p, columns) in columns.chunks_exact_mut(TILE).enumerate() {
                let column = |p: usize| match p < depth {
                    true => &part.data[p * part.col_stride..][..rows],
                    false => &none[..rows],
                };
                pair_rows(&mut columns[..rows], column(2 * p), column(2 * p + 1));
            }
            transpose(out, TILE, Matrix::new(&columns, TILE, TILE));
        }
    }
}

/// Packed operands: two tiles of `groups` groups, one after the other, and as many groups of a panel.
#[derive(Clone, Copy)]
pub struct Operands {
    pub groups: usize,
    pub a: *const f32,
    pub b: *const f32,
}

/// Where a product goes: its rows lie `step` apart, and hold what it is added to if `add`.
#[derive(Clone, Copy)]
pub struct Target {
    pub c: *mut f32,
    pub step: usize,
    pub add: bool,
}

/// `c = a b` or `c += a b` for at most 32 rows, packed by [`pack_left`], and the columns of one panel.
///
/// # Safety
///
/// The operands must hold what [`Operands`] says; the elements of c must be writable, initialised if `add`, and nobody else's.
pub unsafe fn panel(operands: Operands, size: (usize, usize), target: Target) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if has_amx() {
            return in_squares(amx::square, operands, size, target);
        }
        #[cfg(target_arch = "x86_64")]
        match instruction_set() {
            InstructionSet::Avx512 => return avx512::panel(operands, size, target),
            InstructionSet::Avx2 => return avx2::panel(operands, size, target),
            InstructionSet::Baseline => {}
        }
        in_squares(one_by_one, operands, size, target);
    }
}

/// What computes 32 rows and 32 columns.
type Square = unsafe fn(Operands, Target);

/// [`panel`], 32 columns at a time.
///
/// # Safety
///
/// As for [`panel`], on a processor that `square` can be computed on.
unsafe fn in_squares(
    square: Square,
    operands: Operands,
    (rows, cols): (usize, usize),
    Target { c, step, add }: Target,
) {
    const SIDE: usize = 2 * TILE;
    for first in (0..cols).step_by(SIDE) {
        let width = (cols - first).min(SIDE);
        let mut own = MaybeUninit::<[f32; SIDE * SIDE]>::uninit();
        let whole = rows == SIDE && width == SIDE;
        // SAFETY: the caller's promise; what is not a whole tile goes through memory of its own.
        unsafe {
            let c = c.add(first);
            let (to, to_step) = match whole {
                true => (c, step),
                false => (own.as_mut_ptr().cast::<f32>(), SIDE),
            };
            if !whole {
                to.write_bytes(0, SIDE * SIDE);
            }
            if !whole && add {
                for row in 0..rows {
                    to.add(row * SIDE)
                        .copy_from_nonoverlapping(c.add(row * step), width);
                }
            }
            let b = operands.b.add(first);
            let target = Target {
                c: to,
                step: to_step,
                add,
            };
            square(Operands { b, ..operands }, target);
            if !whole {
                for row in 0..rows {
                    c.add(row * step)
                        .copy_from_nonoverlapping(to.add(row * SIDE), width);
                }
            }
        }
    }
}

/// Whether the processor has the instruction, and the system lets this process use it.
pub fn has_amx() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            instruction_set() == InstructionSet::Avx512 && amx::available()
        }
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        false
    })
}

/// Zero where the number lies below the normal range.
#[inline(always)]
fn flush(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7F80_0000 == 0 {
        bits & 0x8000_0000
    } else {
        bits
    })
}

/// What `sum + a b`, rounded, comes to: zero if that is the least normal number, and would have been less with an exponent of
/// any size. This is how processors round whose arithmetic knows no smaller numbers.
fn at_the_edge(a: f32, b: f32, sum: f32, rounded: f32) -> f32 {
    // Half a step below the least normal number, if there were one more bit.
    let least = f64::from(f32::MIN_POSITIVE) * (1.0 - 2f64.powi(-25));
    let exact = f64::from(a) * f64::from(b) + f64::from(sum);
    match rounded.abs() == f32::MIN_POSITIVE && exact.abs() < least {
        true => 0f32.copysign(rounded),
        false => rounded,
    }
}

/// The steps of the module's head, one by one.
unsafe fn one_by_one(Operands { groups, a, b }: Operands, Target { c, step, add }: Target) {
    const SIDE: usize = 2 * TILE;
    // SAFETY: the caller vouches for two tiles of the left operand and `groups` groups of a panel's row, of which the
    // last need not reach the panel's end.
    let (a, b) = unsafe {
        let rows = (groups * TILE - 1) * PANEL + SIDE;
        (
            std::slice::from_raw_parts(a, 2 * groups * TILE * TILE),
            std::slice::from_raw_parts(b, rows),
        )
    };
    for row in 0..SIDE {
        let tile = &a[row / TILE * groups * TILE * TILE..];
        let mut sums = [0.0f32; SIDE];
        // SAFETY: a row of c.
        let c = unsafe { std::slice::from_raw_parts_mut(c.add(row * step), SIDE) };
        if add {
            sums.copy_from_slice(c);
        }
        for group in 0..groups {
            let left = &tile[(group * TILE + row % TILE) * TILE..][..TILE];
            add_group(&mut sums, left, &b[group * TILE * PANEL..]);
        }
        c.copy_from_slice(&sums);
    }
}

simd_fn! {
    fn add_group(sums: &mut [f32; 2 * TILE], left: &[f32], right: &[f32]) {
        let (mut even, mut odd) = ([0.0f32; 2 * TILE], [0.0f32; 2 * TILE]);
        let mut edge = [false; 2 * TILE];
        for (p, &pair) in left.iter().enumerate() {
            let (low, high) = apart(pair);
            let row: &[f32; 2 * TILE] = right[p * PANEL..].first_chunk().expect("a whole row");
            for i in 0..2 * TILE {
                let (even_right, odd_right) = apart(row[i]);
                // The products are exact, so it does not matter whether they are rounded.
                even[i] = flush(fma::<FMA>(low, even_right, even[i]));
                odd[i] = flush(fma::<FMA>(high, odd_right, odd[i]));
                edge[i] |= even[i].abs() == f32::MIN_POSITIVE;
                edge[i] |= odd[i].abs() == f32::MIN_POSITIVE;
            }
        }
        if edge.contains(&true) {
            (even, odd) = terms_at_the_edge::<FMA>(left, right);
        }
        for i in 0..2 * TILE {
            sums[i] = flush(flush(sums[i]) + flush(even[i] + odd[i]));
        }
    }
}

/// Both terms of a pair.
#[inline(always)]
fn apart(pair: f32) -> (f32, f32) {
    let bits = pair.to_bits();
    (
        f32::from_bits(bits << 16),
        f32::from_bits(bits & 0xFFFF_0000),
    )
}

/// The sums of the even and of the odd terms of a group, where one of them was rounded to the least normal number.
#[cold]
fn terms_at_the_edge<const FMA: bool>(
    left: &[f32],
    right: &[f32],
) -> ([f32; 2 * TILE], [f32; 2 * TILE]) {
    let add = |a, b, sum| at_the_edge(a, b, sum, flush(fma::<FMA>(a, b, sum)));
    let (mut even, mut odd) = ([0.0f32; 2 * TILE], [0.0f32; 2 * TILE]);
    for (p, &pair) in left.iter().enumerate() {
        let (low, high) = apart(pair);
        for i in 0..2 * TILE {
            let (even_right, odd_right) = apart(right[p * PANEL + i]);
            even[i] = add(low, even_right, even[i]);
            odd[i] = add(high, odd_right, odd[i]);
        }
    }
    (even, odd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::random;

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even() {
        let cases = [
            (1.0, 1.0),
            (f32::from_bits(0x3F80_8000), 1.0),
            (f32::from_bits(0x3F81_8000), f32::from_bits(0x3F82_0000)),
            (f32::from_bits(0x3F80_8001), f32::from_bits(0x3F81_0000)),
            (1e-40, 0.0),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
        ];
        for (x, expected) in cases {
            assert_eq!(f32::from_bits(round(x)), expected, "{x:e}");
        }
        assert!(f32::from_bits(round(f32::NAN)).is_nan());
        assert!(f32::from_bits(round(f32::from_bits(0x7F80_0001))).is_nan());
    }

    /// 32 rows, and so many columns of at most a panel, of this many terms, packed.
    fn packed(terms: usize, rows: &[f32], columns: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut a = vec![0.0; left_len(32, terms)];
        pack_left(&mut a, Matrix::new(rows, 32, terms));
        let mut b = vec![0.0; pairs(terms) * PANEL];
        let count = columns.len() / terms;
        pack_panels(&mut b, Matrix::new(columns, terms, count));
        (a, b)
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    /// `[32, columns]` by each way that this processor has; the steps one by one come first.
    fn by_each_way(
        (a, b): &(Vec<f32>, Vec<f32>),
        (rows, cols): (usize, usize),
        before: &[f32],
        add: bool,
    ) -> Vec<(&'static str, Vec<f32>)> {
        let operands = Operands {
            groups: b.len() / PANEL / TILE,
            a: a.as_ptr(),
            b: b.as_ptr(),
        };
        let (size, step) = ((rows, cols), before.len() / rows);
        let fill = |way: &dyn Fn(Target)| {
            let mut filled = before.to_vec();
            let c = filled.as_mut_ptr();
            way(Target { c, step, add });
            filled
        };
        // SAFETY: `packed` has made the operands, `before` has the rows, and only ways are taken that there are.
        let square = |square| fill(&|to| unsafe { in_squares(square, operands, size, to) });
        let mut found = vec![("one by one", square(one_by_one))];
        #[cfg(target_arch = "x86_64")]
        if instruction_set() != InstructionSet::Baseline {
            // SAFETY: as above.
            let narrow = fill(&|to| unsafe { avx2::panel(operands, size, to) });
            found.push(("AVX2", narrow));
        }
        #[cfg(target_arch = "x86_64")]
        if instruction_set() == InstructionSet::Avx512 {
            // SAFETY: as above.
            let wide = fill(&|to| unsafe { avx512::panel(operands, size, to) });
            found.push(("AVX-512", wide));
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if has_amx() {
            found.push(("AMX", square(amx::square)));
        }
        found
    }

    #[test]
    fn instructions_and_their_steps_give_the_same_bits() {
        for (groups, size) in [(1, 1.0), (3, 1.0), (12, 1e-20), (5, 1e-18), (7, 2e-19)] {
            let terms = groups * GROUP;
            let scaled =
                |len, seed| -> Vec<f32> { random(len, seed).iter().map(|x| x * size).collect() };
            let operands = packed(terms, &scaled(32 * terms, 1), &scaled(PANEL * terms, 2));
            for (rows, cols) in [(32, 64), (32, 32), (31, 63), (5, 33), (1, 1), (8, 16)] {
                let before: Vec<f32> = scaled(rows * 70, 3).iter().map(|x| x * size).collect();
                for add in [false, true] {
                    let found = by_each_way(&operands, (rows, cols), &before, add);
                    for (name, c) in &found[1..] {
                        assert!(
                            bits(c) == bits(&found[0].1),
                            "{name}, {groups} groups of size {size:e}, {rows} x {cols}, {add}"
                        );
                    }
                }
            }
        }
    }

    /// The least normal number, less a little: more than a quarter of what its last bit is worth, it is gone.
    #[test]
    fn what_is_rounded_to_the_edge_of_the_normal_range_is_rounded_alike() {
        let least = f32::MIN_POSITIVE;
        // 2^-126 by the first even term, and then less 2^-149 / 8, / 4, / 2 and the whole of it, and a little more than a quarter.
        let part = |by: i32| 2f32.powi(by);
        let cases = [
            (part(-74), part(-78), least),
            (part(-74), part(-77), least),
            (part(-74), part(-77) * 1.0078125, 0.0),
            (part(-74), part(-76), 0.0),
            (part(-74), part(-75), 0.0),
        ];
        for (left, right, expected) in cases {
            let (mut rows, mut columns) = (vec![0.0; 32 * GROUP], vec![0.0; GROUP * 32]);
            (rows[0], columns[0]) = (part(-63), part(-63));
            (rows[2], columns[2 * 32]) = (-left, right);
            let operands = packed(GROUP, &rows, &columns);
            let found = by_each_way(&operands, (32, 32), &[0.0; 32 * 32], false);
            // No processor with AMX was there to be asked.
            for (name, c) in found.iter().filter(|(name, _)| *name != "AMX") {
                assert_eq!(c[0], expected, "{name}, {right:e}");
            }
        }
    }
}
