//! Matrix products on the CPU: a thin, checked face of the `gemm` crate, with products that add to what is there
//! (`beta = 1`), so that a weight's gradient is accumulated where it belongs without a copy.
//!
//! The bits of a product do not depend on the number of threads (a test below).

use gemm::Parallelism;

/// A matrix of f32 somewhere in a slice: element (r, c) is `data[r * row_stride + c * col_stride]`.
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
}

/// Where threads come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone: for products inside a parallel loop.
    One,
    /// All threads of the current rayon pool.
    Pool,
}

/// `out = scale * a b`, or `out += scale * a b` if `accumulate`. `out` is row-major without gaps.
pub fn matmul(
    out: &mut [f32],
    a: Matrix,
    b: Matrix,
    scale: f32,
    accumulate: bool,
    threads: Threads,
) {
    assert_eq!(
        out.len(),
        a.rows * b.cols,
        "the product has {} x {} elements",
        a.rows,
        b.cols
    );
    // SAFETY: `out` is exclusively borrowed and holds rows * cols elements without gaps.
    unsafe { matmul_into(out.as_mut_ptr(), b.cols, a, b, scale, accumulate, threads) }
}

/// [`matmul`] into rows that lie `stride` elements apart, starting at `out`.
///
/// # Safety
///
/// For each of the `a.rows` rows, `b.cols` elements from `out + row * stride` on must be valid for reads and writes,
/// initialised if `accumulate`, and used by nobody else during the call.
pub unsafe fn matmul_into(
    out: *mut f32,
    stride: usize,
    a: Matrix,
    b: Matrix,
    scale: f32,
    accumulate: bool,
    threads: Threads,
) {
    assert_eq!(a.cols, b.rows, "inner sizes differ");
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::Pool => match rayon::current_num_threads() {
            1 => Parallelism::None,
            n => Parallelism::Rayon(n),
        },
    };
    // SAFETY: `Matrix` checked that its elements lie in its slice; the caller answers for `out`.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out,
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0f32,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::{pool, random};

    #[test]
    fn products_agree_with_the_definition_in_every_orientation() {
        let (m, n, k) = (7, 5, 11);
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let transposed: Vec<f32> = (0..n * k).map(|i| b[(i % k) * n + i / k]).collect();
        let mut expected = vec![1.0f32; m * n];
        for r in 0..m {
            for c in 0..n {
                expected[r * n + c] +=
                    0.5 * (0..k).map(|i| a[r * k + i] * b[i * n + c]).sum::<f32>();
            }
        }
        for right in [Matrix::new(&b, k, n), Matrix::new(&transposed, n, k).t()] {
            let mut out = vec![1.0f32; m * n];
            matmul(
                &mut out,
                Matrix::new(&a, m, k),
                right,
                0.5,
                true,
                Threads::One,
            );
            for (x, y) in out.iter().zip(&expected) {
                assert!((x - y).abs() < 1e-5, "{x} {y}");
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        for (m, n, k) in [
            (768, 384, 128),
            (128, 512, 768),
            (96, 65, 128),
            (65, 128, 300),
            (1000, 200, 333),
        ] {
            let (a, b) = (random(m * k, 3), random(k * n, 4));
            let run = |threads| {
                let mut out = vec![0.25; m * n];
                pool(threads).install(|| {
                    matmul(
                        &mut out,
                        Matrix::new(&a, k, m).t(),
                        Matrix::new(&b, k, n),
                        1.0,
                        true,
                        Threads::Pool,
                    );
                });
                out
            };
            let one = run(1);
            for threads in [2, 3, 5] {
                assert!(one == run(threads), "{m} {n} {k} with {threads} threads");
            }
        }
    }
}
