//! Products of bfloat16 operands, summed in f32: the other precision.
//!
//! **The order of summation.** Operands are rounded to bfloat16 (to nearest, ties to even; numbers below the normal range
//! become zero). An element of the product is built of groups of [`GROUP`] terms, filled up with zeros at the end. Within
//! a group the even and the odd terms are summed apart, one after the other from zero; the two sums are added, and their
//! sum to the element, groups in order. Every step is rounded to f32, and what would leave the normal range becomes zero.
//!
//! This is what Intel's AMX does (`TDPBF16PS`, Intel SDM volume 2), which computes a group of 16 x 16 elements in one
//! instruction. On other processors the same steps are taken one by one, to the same bits.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use super::Matrix;
use super::kernel::PANEL;
use super::pack::{Aligned, transpose};
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

/// `c = a b` or `c += a b` for at most 32 rows, packed by [`pack_left`], and the columns of one panel; rows of c lie `step`
/// apart.
///
/// # Safety
///
/// `a` must hold two tiles of `groups` groups, one after the other, and `b` as many groups of a panel; the elements of c
/// must be writable, initialised if `add`, and nobody else's.
pub unsafe fn panel(
    groups: usize,
    a: *const f32,
    b: *const f32,
    (rows, cols): (usize, usize),
    c: *mut f32,
    step: usize,
    add: bool,
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
            square(groups, a, b.add(first), to, to_step, add);
            if !whole {
                for row in 0..rows {
                    c.add(row * step)
                        .copy_from_nonoverlapping(to.add(row * SIDE), width);
                }
            }
        }
    }
}

/// 32 rows and 32 columns.
unsafe fn square(groups: usize, a: *const f32, b: *const f32, c: *mut f32, step: usize, add: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if has_amx() {
            return amx::square(groups, a, b, c, step, add);
        }
        one_by_one(groups, a, b, c, step, add);
    }
}

/// Whether the processor has the instruction, and the system lets this process use it.
pub fn has_amx() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            use crate::engine::ops::simd::{InstructionSet, instruction_set};
            instruction_set() == InstructionSet::Avx512 && amx::available()
        }
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        false
    })
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use super::TILE;

    pub fn available() -> bool {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        // Older compilers call this unsafe.
        #[allow(unused_unsafe)]
        // SAFETY: every x86-64 has the instruction; an unknown leaf gives zeros.
        let features = unsafe { std::arch::x86_64::__cpuid_count(7, 0).edx };
        features & BF16 != 0 && features & TILES != 0 && permitted()
    }

    /// Asks the system for the tile registers' state, which is large and only saved for those who ask.
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: a system call that touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }

    /// The layout of `LDTILECFG`: eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        column_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIG: Config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        column_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// # Safety
    ///
    /// As for [`super::panel`], for 32 rows and columns, on a processor that [`available`] has said yes to.
    pub unsafe fn square(
        groups: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        step: usize,
        add: bool,
    ) {
        let tile = TILE * TILE;
        // SAFETY: the caller vouches for the memory. The tile registers are configured, used and released here.
        unsafe {
            let below = c.add(TILE * step);
            std::arch::asm!(
                "ldtilecfg [{config}]",
                "test {add:e}, {add:e}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {step}]",
                "tileloadd tmm1, [{c} + {step} + 64]",
                "tileloadd tmm2, [{below} + {step}]",
                "tileloadd tmm3, [{below} + {step} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "tileloadd tmm4, [{a} + {a_step}]",
                "tileloadd tmm6, [{b} + {b_step}]",
                "tileloadd tmm7, [{b} + {b_step} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a2} + {a_step}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 1024",
                "add {a2}, 1024",
                "add {b}, 4096",
                "dec {groups}",
                "jnz 3b",
                "tilestored [{c} + {step}], tmm0",
                "tilestored [{c} + {step} + 64], tmm1",
                "tilestored [{below} + {step}], tmm2",
                "tilestored [{below} + {step} + 64], tmm3",
                "tilerelease",
                config = in(reg) &raw const CONFIG,
                add = in(reg) u32::from(add),
                c = in(reg) c,
                below = in(reg) below,
                step = in(reg) step * 4,
                a = inout(reg) a => _,
                a2 = inout(reg) a.add(groups * tile) => _,
                a_step = in(reg) 64usize,
                b = inout(reg) b => _,
                b_step = in(reg) 256usize,
                groups = inout(reg) groups => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
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

/// The steps of the module's head, one by one.
unsafe fn one_by_one(
    groups: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    step: usize,
    add: bool,
) {
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
        for (p, &pair) in left.iter().enumerate() {
            let low = f32::from_bits(pair.to_bits() << 16);
            let high = f32::from_bits(pair.to_bits() & 0xFFFF_0000);
            let row: &[f32; 2 * TILE] = right[p * PANEL..].first_chunk().expect("a whole row");
            for i in 0..2 * TILE {
                let bits = row[i].to_bits();
                // The products are exact, so it does not matter whether they are rounded.
                even[i] = flush(fma::<FMA>(low, f32::from_bits(bits << 16), even[i]));
                odd[i] = flush(fma::<FMA>(high, f32::from_bits(bits & 0xFFFF_0000), odd[i]));
            }
        }
        for i in 0..2 * TILE {
            sums[i] = flush(flush(sums[i]) + flush(even[i] + odd[i]));
        }
    }
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

    #[test]
    fn the_instruction_and_its_steps_give_the_same_bits() {
        if !has_amx() {
            return;
        }
        for (groups, size) in [(1, 1.0), (3, 1.0), (12, 1e-20), (5, 1e-18)] {
            let pairs = groups * TILE;
            let scaled =
                |len, seed| -> Vec<f32> { random(len, seed).iter().map(|x| x * size).collect() };
            let (rows, columns) = (scaled(32 * 2 * pairs, 1), scaled(32 * 2 * pairs, 2));
            let mut a = vec![0.0; left_len(32, 2 * pairs)];
            pack_left(&mut a, Matrix::new(&rows, 32, 2 * pairs));
            let mut b = vec![0.0; pairs * PANEL];
            pack_panels(&mut b, Matrix::new(&columns, 2 * pairs, 32));
            for add in [false, true] {
                let before: Vec<f32> = scaled(32 * 40, 3).iter().map(|x| x * size).collect();
                let (mut one, mut other) = (before.clone(), before);
                // SAFETY: the buffers hold 32 rows and columns of `groups` groups.
                unsafe {
                    square(groups, a.as_ptr(), b.as_ptr(), one.as_mut_ptr(), 40, add);
                    one_by_one(groups, a.as_ptr(), b.as_ptr(), other.as_mut_ptr(), 40, add);
                }
                let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
                assert!(
                    bits(&one) == bits(&other),
                    "{groups} groups of size {size:e}, {add}"
                );
            }
        }
    }
}
