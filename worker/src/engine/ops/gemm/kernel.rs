//! The innermost loops: a few rows of a result, up to a strip wide, kept in registers while the inner dimension runs.
//!
//! Each instruction set has its own tile, but all compute an element in the same way (see [`super`]), so the choice is
//! one of speed alone.

use std::mem::MaybeUninit;

use crate::engine::ops::simd::{InstructionSet, fma, instruction_set};

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Columns of a packed panel: one strip of the widest kernel, or several.
pub const PANEL: usize = 64;

/// Rows of the largest tile.
pub const ROWS: usize = 6;

/// How far ahead a right operand that does not stay in the first cache is fetched, in rows.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8;

/// Vectors in a row of the widest tile: with AVX-512, and otherwise.
const WIDE: usize = 4;
const NARROW: usize = 2;

/// Columns of a right operand that lie side by side: as many as the widest tile of this processor has. All rows of one
/// strip are read, tile after tile, before the next strip's, so that a strip of a few vectors stays in the first cache.
pub fn strip() -> usize {
    match instruction_set() {
        InstructionSet::Avx512 => WIDE * 16,
        InstructionSet::Avx2 | InstructionSet::Baseline => NARROW * 8,
    }
}

/// Where the operands of one panel lie: element (i, p) of tile t of the left one at `a + t * a_tile + i * a_row + p * a_col`,
/// one of the last two steps being 1; row p of strip s of the right one at `b + s * b_strip + p * strip()`, its columns
/// adjacent and readable up to a whole vector.
#[derive(Clone, Copy)]
pub struct Operands {
    pub depth: usize,
    pub a: *const f32,
    pub a_tile: usize,
    pub a_row: usize,
    pub a_col: usize,
    pub b: *const f32,
    pub b_strip: usize,
    pub scale: f32,
}

/// `c = scale * a b` or `c += scale * a b` for some rows, in tiles of [`ROWS`], and at most [`PANEL`] columns, rows of c
/// `step` apart.
///
/// # Safety
///
/// All elements named by `o` must be readable; those of c writable, initialised if `add`, and nobody else's.
#[inline]
pub unsafe fn panel(o: Operands, rows: usize, cols: usize, c: *mut f32, step: usize, add: bool) {
    debug_assert!(cols <= PANEL && (o.a_row == 1 || o.a_col == 1));
    // SAFETY: the caller's promise; the processor was found to have the instructions.
    unsafe {
        match instruction_set() {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => avx512(o, rows, cols, c, step, add),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => avx2(o, rows, cols, c, step, add),
            _ => strips::<Portable, NARROW>(o, rows, cols, c, step, add),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
unsafe fn avx512(o: Operands, rows: usize, cols: usize, c: *mut f32, step: usize, add: bool) {
    // SAFETY: the caller's promise.
    unsafe { strips::<__m512, WIDE>(o, rows, cols, c, step, add) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(o: Operands, rows: usize, cols: usize, c: *mut f32, step: usize, add: bool) {
    // SAFETY: the caller's promise.
    unsafe { strips::<__m256, NARROW>(o, rows, cols, c, step, add) }
}

/// A register of f32. Every method needs the instructions of its type, and memory for `LEN` elements.
trait Vector: Copy {
    const LEN: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self * x + sum`, rounded once where the processor can.
    unsafe fn fma(self, x: Self, sum: Self) -> Self;
    unsafe fn fetch(_from: *const f32) {}
}

#[cfg(target_arch = "x86_64")]
macro_rules! register {
    ($type:ty, $len:literal, $splat:ident, $load:ident, $store:ident, $fma:ident) => {
        impl Vector for $type {
            const LEN: usize = $len;
            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                // SAFETY: the trait's terms.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the trait's terms.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: the trait's terms.
                unsafe { $store(to, self) }
            }
            #[inline(always)]
            unsafe fn fma(self, x: Self, sum: Self) -> Self {
                // SAFETY: the trait's terms.
                unsafe { $fma(self, x, sum) }
            }
            #[inline(always)]
            unsafe fn fetch(from: *const f32) {
                // SAFETY: a hint; it may point anywhere.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
register!(
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_fmadd_ps
);
#[cfg(target_arch = "x86_64")]
register!(
    __m256,
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_fmadd_ps
);

/// What the compiler makes of plain arrays.
#[derive(Clone, Copy)]
struct Portable([f32; 8]);

impl Vector for Portable {
    const LEN: usize = 8;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's terms.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's terms.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, x: Self, sum: Self) -> Self {
        use crate::engine::ops::simd::BASELINE_FMA;
        let mut out = sum.0;
        for ((out, a), b) in out.iter_mut().zip(self.0).zip(x.0) {
            *out = fma::<BASELINE_FMA>(a, b, *out);
        }
        Self(out)
    }
}

/// Cuts a panel into strips of `NV` vectors, and these into tiles.
#[inline(always)]
unsafe fn strips<V: Vector, const NV: usize>(
    o: Operands,
    rows: usize,
    cols: usize,
    c: *mut f32,
    step: usize,
    add: bool,
) {
    for first in (0..cols).step_by(NV * V::LEN) {
        let wide = (cols - first).min(NV * V::LEN);
        for row in (0..rows).step_by(ROWS) {
            // SAFETY: the caller's promise.
            unsafe {
                let o = Operands {
                    a: o.a.add(row / ROWS * o.a_tile),
                    b: o.b.add(first / (NV * V::LEN) * o.b_strip),
                    ..o
                };
                let c = c.add(row * step + first);
                tile::<V, NV>(o, ROWS.min(rows - row), wide, c, step, add);
            }
        }
    }
}

/// A tile of at most [`ROWS`] rows and `NV` vectors. Columns that do not fill a vector go through memory of their own.
#[inline(always)]
unsafe fn tile<V: Vector, const NV: usize>(
    o: Operands,
    rows: usize,
    cols: usize,
    c: *mut f32,
    step: usize,
    add: bool,
) {
    let whole = cols.is_multiple_of(V::LEN);
    let mut own = MaybeUninit::<[f32; ROWS * PANEL]>::uninit();
    // SAFETY: within the tile that the caller vouches for; the right operand's last vector is readable whole.
    unsafe {
        let (to, to_step) = match whole {
            true => (c, step),
            false => (own.as_mut_ptr().cast::<f32>(), NV * V::LEN),
        };
        if !whole {
            to.write_bytes(0, ROWS * to_step);
        }
        if !whole && add {
            for row in 0..rows {
                to.add(row * to_step)
                    .copy_from_nonoverlapping(c.add(row * step), cols);
            }
        }
        let vectors = cols.div_ceil(V::LEN);
        let mut done = 0;
        while done < vectors {
            let n = match vectors - done {
                left if left >= NV => NV,
                left if left >= 2 => 2,
                _ => 1,
            };
            let o = Operands {
                b: o.b.add(done * V::LEN),
                ..o
            };
            let to = to.add(done * V::LEN);
            match n {
                2 => part::<V, 2, NV>(o, rows, to, to_step, add),
                1 => part::<V, 1, NV>(o, rows, to, to_step, add),
                _ => part::<V, NV, NV>(o, rows, to, to_step, add),
            }
            done += n;
        }
        if !whole {
            for row in 0..rows {
                c.add(row * step)
                    .copy_from_nonoverlapping(to.add(row * to_step), cols);
            }
        }
    }
}

/// Cuts the rows of a tile into parts of a few sizes: each size is code of its own.
#[inline(always)]
unsafe fn part<V: Vector, const N: usize, const NV: usize>(
    o: Operands,
    rows: usize,
    c: *mut f32,
    step: usize,
    add: bool,
) {
    let mut done = 0;
    while done < rows {
        // SAFETY: the caller's promise.
        unsafe {
            let o = Operands {
                a: o.a.add(done * o.a_row),
                ..o
            };
            let c = c.add(done * step);
            done += match (rows - done, o.a_col == 1) {
                (6.., true) => run::<V, 6, N, NV, true>(o, c, step, add),
                (6.., false) => run::<V, 6, N, NV, false>(o, c, step, add),
                (3.., true) => run::<V, 3, N, NV, true>(o, c, step, add),
                (3.., false) => run::<V, 3, N, NV, false>(o, c, step, add),
                (_, true) => run::<V, 1, N, NV, true>(o, c, step, add),
                (_, false) => run::<V, 1, N, NV, false>(o, c, step, add),
            };
        }
    }
}

/// `M` rows and `N` vectors of a strip of `NV`; returns the rows. `BY_ROWS`: the left operand's rows are contiguous; else
/// its columns are.
#[inline(always)]
unsafe fn run<V: Vector, const M: usize, const N: usize, const NV: usize, const BY_ROWS: bool>(
    o: Operands,
    c: *mut f32,
    step: usize,
    add: bool,
) -> usize {
    // SAFETY: the caller vouches for every element that is touched; prefetches may point anywhere.
    unsafe {
        for row in 0..M {
            for vector in 0..N {
                V::fetch(c.wrapping_add(row * step + vector * V::LEN));
            }
        }
        let mut sums = [[V::splat(0.0); N]; M];
        let mut b = o.b;
        // Three rows to a pointer: addresses of the form base, base + step, base + 2 step are free.
        let mut a = [o.a, o.a.wrapping_add(3 * o.a_row)];
        for _ in 0..o.depth {
            let mut right = [V::splat(0.0); N];
            for (j, right) in right.iter_mut().enumerate() {
                *right = V::load(b.add(j * V::LEN));
                #[cfg(target_arch = "x86_64")]
                if NV * V::LEN == PANEL {
                    V::fetch(b.wrapping_add(j * V::LEN + AHEAD * PANEL));
                }
            }
            for i in 0..M {
                let left = V::splat(match BY_ROWS {
                    true => *a[i / 3].wrapping_add(i % 3 * o.a_row),
                    false => *a[0].add(i),
                });
                for j in 0..N {
                    sums[i][j] = left.fma(right[j], sums[i][j]);
                }
            }
            for a in &mut a {
                *a = a.wrapping_add(o.a_col);
            }
            b = b.wrapping_add(NV * V::LEN);
        }
        let scale = V::splat(o.scale);
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                let at = c.add(i * step + j * V::LEN);
                let before = match add {
                    true => V::load(at),
                    false => V::splat(0.0),
                };
                sum.fma(scale, before).store(at);
            }
        }
    }
    M
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::random;

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn instruction_sets_give_the_same_bits() {
        if instruction_set() != InstructionSet::Avx512 {
            return;
        }
        for depth in [1, 7, 256] {
            let (a, before) = (random(12 * depth, 1), random(12 * PANEL, 3));
            let b = random(depth * PANEL, 2);
            // The same columns in strips of 16.
            let mut strips = Vec::new();
            for first in (0..PANEL).step_by(16) {
                b.chunks_exact(PANEL)
                    .for_each(|row| strips.extend(&row[first..first + 16]));
            }
            for (rows, cols) in
                (1..=2 * ROWS).flat_map(|rows| [1, 8, 17, 33, 64].map(|cols| (rows, cols)))
            {
                for add in [false, true] {
                    for (a_tile, a_row, a_col) in [(6 * depth, depth, 1), (6 * depth, 1, 6)] {
                        let o = Operands {
                            depth,
                            a: a.as_ptr(),
                            a_tile,
                            a_row,
                            a_col,
                            b: b.as_ptr(),
                            b_strip: 0,
                            scale: 0.3,
                        };
                        let in_strips = Operands {
                            b: strips.as_ptr(),
                            b_strip: 16 * depth,
                            ..o
                        };
                        let (mut wide, mut narrow) = (before.clone(), before.clone());
                        // SAFETY: the buffers hold whole tiles, and the processor has both instruction sets.
                        unsafe {
                            avx512(o, rows, cols, wide.as_mut_ptr(), PANEL, add);
                            avx2(in_strips, rows, cols, narrow.as_mut_ptr(), PANEL, add);
                        }
                        assert!(wide == narrow, "{rows} x {cols}, depth {depth}");
                    }
                }
            }
        }
    }
}
