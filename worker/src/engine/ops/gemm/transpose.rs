//! Copies that turn rows into columns: most of what it costs to pack operands.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::kernel::ROWS;
use super::{Matrix, Shared};
#[cfg(target_arch = "x86_64")]
use crate::engine::ops::simd::{InstructionSet, instruction_set};

/// Elements that are finished before the next are begun: a cache line's worth.
pub const LINE: usize = 16;

/// Elements of a register of AVX2.
#[cfg(target_arch = "x86_64")]
const HALF: usize = LINE / 2;

/// `out[p * width + i] = a[i][p]` for a matrix of contiguous rows; what is left of each `width` is set to zero where
/// `a` has fewer rows.
pub fn transpose(out: &mut [f32], width: usize, a: Matrix) {
    assert!(a.col_stride == 1 && a.rows <= width && out.len() == a.cols * width);
    if a.rows < width {
        out.fill(0.0);
    }
    #[cfg(target_arch = "x86_64")]
    let (out, a) = match squares(a.rows) {
        Some((side, squares)) => {
            let whole = a.cols / side * side;
            let (most, rest) = out.split_at_mut(whole * width);
            // SAFETY: the processor has the instructions.
            unsafe { squares(most, width, a.columns(0, whole)) };
            (rest, a.columns(whole, a.cols - whole))
        }
        None => (out, a),
    };
    let shared = Shared::new(out);
    // Four rows at a time; the last four overlap those before them.
    let quads = || {
        (0..a.rows / 4 * 4)
            .step_by(4)
            .chain((!a.rows.is_multiple_of(4) && a.rows > 4).then(|| a.rows - 4))
    };
    let singles = if a.rows < 4 { 0..a.rows } else { 0..0 };
    for start in (0..a.cols).step_by(LINE) {
        let end = (start + LINE).min(a.cols);
        for i in quads() {
            let mut p = start;
            #[cfg(target_arch = "x86_64")]
            while p + 4 <= end {
                let from = &a.data[i * a.row_stride + p..];
                assert!(
                    from.len() >= 3 * a.row_stride + 4 && (p + 3) * width + i + 4 <= a.cols * width
                );
                // SAFETY: four elements of four rows on both sides, as just checked; every x86-64 has SSE.
                unsafe { quad(shared.at(p * width + i), width, from.as_ptr(), a.row_stride) };
                p += 4;
            }
            for p in p..end {
                for i in i..i + 4 {
                    // SAFETY: inside `out`; nobody else writes there.
                    unsafe { *shared.at(p * width + i) = a.data[i * a.row_stride + p] };
                }
            }
        }
        for i in singles.clone() {
            for p in start..end {
                // SAFETY: inside `out`; nobody else writes there.
                unsafe { *shared.at(p * width + i) = a.data[i * a.row_stride + p] };
            }
        }
    }
}

/// [`transpose`] of whole squares: its side, and how it is done.
#[cfg(target_arch = "x86_64")]
type Squares = (usize, unsafe fn(&mut [f32], usize, Matrix));

/// The best that this processor has for so many rows.
#[cfg(target_arch = "x86_64")]
fn squares(rows: usize) -> Option<Squares> {
    match instruction_set() {
        InstructionSet::Avx512 if rows.is_multiple_of(LINE) => Some((LINE, squares_of_16)),
        InstructionSet::Avx2 if rows.is_multiple_of(HALF) => Some((HALF, squares_of_8)),
        _ => None,
    }
}

/// Of four rows and within every four columns: column 0, 1, 2 and 3. (Closures would be calls here.)
#[cfg(target_arch = "x86_64")]
macro_rules! fours {
    ($rows:expr, $pd:ident, $ps:ident, $low_ps:ident, $high_ps:ident, $low_pd:ident, $high_pd:ident) => {{
        let [a, b, c, d] = $rows;
        let (low, low2) = ($pd($low_ps(a, b)), $pd($low_ps(c, d)));
        let (high, high2) = ($pd($high_ps(a, b)), $pd($high_ps(c, d)));
        [
            $ps($low_pd(low, low2)),
            $ps($high_pd(low, low2)),
            $ps($low_pd(high, high2)),
            $ps($high_pd(high, high2)),
        ]
    }};
}

/// [`transpose`] of 16 x 16 elements at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn squares_of_16(out: &mut [f32], width: usize, a: Matrix) {
    assert!(a.rows <= width && out.len() == a.cols * width && a.col_stride == 1);
    for (start, out) in (0..a.cols)
        .step_by(LINE)
        .zip(out.chunks_exact_mut(width * LINE))
    {
        for first in (0..a.rows).step_by(LINE) {
            let mut fours = [[_mm512_setzero_ps(); 4]; 4];
            for (quad, columns) in fours.iter_mut().enumerate() {
                let mut rows = [_mm512_setzero_ps(); 4];
                for (row, values) in rows.iter_mut().enumerate() {
                    let row = first + 4 * quad + row;
                    let from = &a.data[row * a.row_stride + start..][..LINE];
                    // SAFETY: a line's worth.
                    *values = unsafe { _mm512_loadu_ps(from.as_ptr()) };
                }
                *columns = fours!(
                    rows,
                    _mm512_castps_pd,
                    _mm512_castpd_ps,
                    _mm512_unpacklo_ps,
                    _mm512_unpackhi_ps,
                    _mm512_unpacklo_pd,
                    _mm512_unpackhi_pd
                );
            }
            for column in 0..4 {
                let [a, b, c, d] = [
                    fours[0][column],
                    fours[1][column],
                    fours[2][column],
                    fours[3][column],
                ];
                let even = [
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d),
                ];
                let odd = [
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d),
                ];
                let columns = [
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(even[0], even[1]),
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(odd[0], odd[1]),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(even[0], even[1]),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(odd[0], odd[1]),
                ];
                for (group, values) in columns.into_iter().enumerate() {
                    let to = &mut out[(4 * group + column) * width + first..][..LINE];
                    // SAFETY: a line's worth.
                    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), values) };
                }
            }
        }
    }
}

/// [`transpose`] of 8 x 8 elements at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn squares_of_8(out: &mut [f32], width: usize, a: Matrix) {
    assert!(a.rows <= width && out.len() == a.cols * width && a.col_stride == 1);
    for (start, out) in (0..a.cols)
        .step_by(HALF)
        .zip(out.chunks_exact_mut(width * HALF))
    {
        for first in (0..a.rows).step_by(HALF) {
            let mut fours = [[_mm256_setzero_ps(); 4]; 2];
            for (quad, columns) in fours.iter_mut().enumerate() {
                let mut rows = [_mm256_setzero_ps(); 4];
                for (row, values) in rows.iter_mut().enumerate() {
                    let row = first + 4 * quad + row;
                    let from = &a.data[row * a.row_stride + start..][..HALF];
                    // SAFETY: half a line's worth.
                    *values = unsafe { _mm256_loadu_ps(from.as_ptr()) };
                }
                *columns = fours!(
                    rows,
                    _mm256_castps_pd,
                    _mm256_castpd_ps,
                    _mm256_unpacklo_ps,
                    _mm256_unpackhi_ps,
                    _mm256_unpacklo_pd,
                    _mm256_unpackhi_pd
                );
            }
            for column in 0..4 {
                let (a, b) = (fours[0][column], fours[1][column]);
                let columns = [
                    _mm256_permute2f128_ps::<0x20>(a, b),
                    _mm256_permute2f128_ps::<0x31>(a, b),
                ];
                for (group, values) in columns.into_iter().enumerate() {
                    let to = &mut out[(4 * group + column) * width + first..][..HALF];
                    // SAFETY: half a line's worth.
                    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), values) };
                }
            }
        }
    }
}

/// [`transpose`] of a tile of a left operand.
pub fn transpose_tile(out: &mut [f32], a: Matrix) {
    #[cfg(target_arch = "x86_64")]
    let (out, a) = match six_rows().filter(|_| a.rows == ROWS) {
        Some((columns, six_rows)) => {
            let whole = a.cols / columns * columns;
            let (most, rest) = out.split_at_mut(whole * ROWS);
            // SAFETY: the processor has the instructions.
            unsafe { six_rows(most, a.columns(0, whole)) };
            (rest, a.columns(whole, a.cols - whole))
        }
        None => (out, a),
    };
    transpose(out, ROWS, a);
}

/// [`transpose`] of whole tiles: its columns at a time, and how it is done.
#[cfg(target_arch = "x86_64")]
type SixRows = (usize, unsafe fn(&mut [f32], Matrix));

/// The best that this processor has.
#[cfg(target_arch = "x86_64")]
fn six_rows() -> Option<SixRows> {
    match instruction_set() {
        InstructionSet::Avx512 => Some((LINE, six_rows_of_16)),
        InstructionSet::Avx2 => Some((HALF, six_rows_of_8)),
        InstructionSet::Baseline => None,
    }
}

/// Defines [`transpose`] of whole tiles, a register of columns at a time.
#[cfg(target_arch = "x86_64")]
macro_rules! six_rows {
    (
        $name:ident, $feature:literal, $columns:expr, $load:ident, $zero:ident, $pd:ident, $ps:ident,
        $low_ps:ident, $high_ps:ident, $low_pd:ident, $high_pd:ident, $shuffle:ident::<$control:literal>,
        $extract:ident::<$($four:literal),*>
    ) => {
        #[target_feature(enable = $feature)]
        fn $name(out: &mut [f32], a: Matrix) {
            assert!(a.rows == ROWS && a.col_stride == 1);
            for (start, out) in (0..a.cols)
                .step_by($columns)
                .zip(out.chunks_exact_mut(ROWS * $columns))
            {
                let mut rows = [$zero(); ROWS];
                for (row, values) in rows.iter_mut().enumerate() {
                    let from = &a.data[row * a.row_stride + start..][..$columns];
                    // SAFETY: a register's worth.
                    *values = unsafe { $load(from.as_ptr()) };
                }
                let [a, b, c, d, e, f] = rows;
                // Neighbours in a column as one element of 64 bits: columns 0 and 1 of every four, and then 2 and 3.
                let pairs = [
                    [$pd($low_ps(a, b)), $pd($low_ps(c, d)), $pd($low_ps(e, f))],
                    [$pd($high_ps(a, b)), $pd($high_ps(c, d)), $pd($high_ps(e, f))],
                ];
                for (half, [u, v, w]) in pairs.into_iter().enumerate() {
                    // Of each four columns, six elements in the order in which they are to lie.
                    let pieces = [$low_pd(u, v), $shuffle::<$control>(w, u), $high_pd(v, w)];
                    for (place, piece) in pieces.into_iter().enumerate() {
                        let piece = $ps(piece);
                        let fours = [$($extract::<$four>(piece)),*];
                        for (quad, four) in fours.into_iter().enumerate() {
                            let to = &mut out[(4 * quad + 2 * half) * ROWS + 4 * place..][..4];
                            // SAFETY: four elements.
                            unsafe { _mm_storeu_ps(to.as_mut_ptr(), four) };
                        }
                    }
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
six_rows!(
    six_rows_of_16,
    "avx512f",
    LINE,
    _mm512_loadu_ps,
    _mm512_setzero_ps,
    _mm512_castps_pd,
    _mm512_castpd_ps,
    _mm512_unpacklo_ps,
    _mm512_unpackhi_ps,
    _mm512_unpacklo_pd,
    _mm512_unpackhi_pd,
    _mm512_shuffle_pd::<0b1010_1010>,
    _mm512_extractf32x4_ps::<0, 1, 2, 3>
);
#[cfg(target_arch = "x86_64")]
six_rows!(
    six_rows_of_8,
    "avx2",
    HALF,
    _mm256_loadu_ps,
    _mm256_setzero_ps,
    _mm256_castps_pd,
    _mm256_castpd_ps,
    _mm256_unpacklo_ps,
    _mm256_unpackhi_ps,
    _mm256_unpacklo_pd,
    _mm256_unpackhi_pd,
    _mm256_shuffle_pd::<0b1010>,
    _mm256_extractf128_ps::<0, 1>
);

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn quad(to: *mut f32, width: usize, from: *const f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let [a, b, c, d] = [0, 1, 2, 3].map(|row| _mm_loadu_ps(from.add(row * stride)));
        let (low, high) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let (low2, high2) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        _mm_storeu_ps(to, _mm_movelh_ps(low, low2));
        _mm_storeu_ps(to.add(width), _mm_movehl_ps(low2, low));
        _mm_storeu_ps(to.add(2 * width), _mm_movelh_ps(high, high2));
        _mm_storeu_ps(to.add(3 * width), _mm_movehl_ps(high2, high));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transpose_is_one_and_zero_beside() {
        for (rows, cols, width, stride) in [
            (16, 16, 16, 16),
            (64, 35, 64, 40),
            (8, 20, 16, 21),
            (32, 48, 64, 48),
            (3, 20, 6, 21),
            (61, 17, 64, 17),
        ] {
            let data: Vec<f32> = (1..=rows * stride).map(|i| i as f32).collect();
            let mut out = vec![-1.0; width * cols];
            transpose(&mut out, width, Matrix::strided(&data, rows, cols, stride));
            for (p, i) in (0..cols).flat_map(|p| (0..width).map(move |i| (p, i))) {
                let expected = if i < rows { data[i * stride + p] } else { 0.0 };
                assert_eq!(out[p * width + i], expected, "{rows} x {cols}: {i}, {p}");
            }
        }
    }
}
