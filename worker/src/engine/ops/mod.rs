//! The kernels of the CPU path: one file per operation, each with its forward and its backward over plain slices.
//! They know nothing of candle, of layers or of the flat buffers; `fused` puts them together.
//!
//! **Invariant:** no kernel's result depends on the number of threads. Rows are independent, and a sum over rows is
//! taken over fixed blocks whose partial sums are added in index order.

pub mod activation;
pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod gemm;
pub mod head_norm;
pub mod lanes;
pub mod linear;
pub mod norm;
pub mod rope;
pub mod simd;
#[cfg(test)]
pub mod testing;

/// Rows in one block of a parallel loop and of a sum over rows. A constant: it decides the order of summation.
pub const ROW_BLOCK: usize = 64;

/// The position of row r: its distance from the beginning of its segment, which `starts` names within each sample of
/// `length` rows; without `starts` a sample is one segment.
pub fn position(r: usize, length: usize, starts: &[u32]) -> usize {
    r % length - starts.get(r).map_or(0, |&start| start as usize)
}

/// Cuts `len` elements off the front.
pub fn cut<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (front, back) = std::mem::take(rest).split_at_mut(len);
    *rest = back;
    front
}
