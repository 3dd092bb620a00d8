//! Matrix products for their own sake, to find out what a device can do. They are those that training consists of: on the
//! CPU by the engine's own kernel, elsewhere by candle. Whoever asks has the clock.

use candle_core::{DType, Device, Tensor};
use cohort_common::spec::Precision;

use super::device::DeviceChoice;
use super::error::{EngineError, Result};
use super::ops::gemm::{Aligned, Matrix, Panels, for_all_threads, multiply};

/// Rows of the left operand for each thread.
const ROWS: usize = 192;

/// Columns of both operands on the CPU: what a small model's layers have, and what fits a cache.
const COLS: usize = 512;

/// Rows and columns on other devices: enough for all of a large GPU.
const SQUARE: usize = 4096;

/// Takes one product after the other for as long as `next` says so; it is asked before the first and after each, when the
/// product is complete. Gives the floating-point operations of one.
pub fn products(
    device: DeviceChoice,
    threads: usize,
    next: impl FnMut() -> bool + Send,
) -> Result<f64> {
    match device.open()? {
        Device::Cpu => on_cpu(threads, next),
        device => on(&device, SQUARE, next),
    }
}

fn on_cpu(threads: usize, mut next: impl FnMut() -> bool + Send) -> Result<f64> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("peak-{index}"))
        .build()
        .map_err(|source| EngineError::Threads { threads, source })?;
    let rows = ROWS * pool.current_num_threads();
    let operands = [vec![0.5f32; rows * COLS], vec![0.25; COLS * COLS]];
    let mut out = vec![0.0; rows * COLS];
    pool.install(|| {
        let mut packed = Aligned::default();
        let packed = packed.take(Panels::len(COLS, COLS, Precision::F32));
        let a = Matrix::new(&operands[0], rows, COLS);
        let b = Matrix::new(&operands[1], COLS, COLS);
        let b = Panels::pack(packed, b, Precision::F32);
        while next() {
            multiply(&mut out, COLS, a, &b, false, for_all_threads());
        }
    });
    Ok(2.0 * (rows * COLS * COLS) as f64)
}

fn on(device: &Device, size: usize, mut next: impl FnMut() -> bool) -> Result<f64> {
    let a = Tensor::ones((size, size), DType::F32, device)?;
    let b = Tensor::ones((size, size), DType::F32, device)?;
    device.synchronize()?;
    while next() {
        let product = a.matmul(&b)?;
        device.synchronize()?;
        drop(product);
    }
    Ok(2.0 * (size as f64).powi(3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_products_are_taken_as_are_asked_for() {
        let mut asked = 0;
        let found = products(DeviceChoice::Cpu, 2, || {
            asked += 1;
            asked <= 3
        });
        assert_eq!(asked, 4);
        assert_eq!(found.expect("it computes"), 2.0 * 384.0 * 512.0 * 512.0);
    }

    #[test]
    fn the_other_devices_path_counts_alike() {
        let mut asked = 0;
        let found = on(&Device::Cpu, 64, || {
            asked += 1;
            asked <= 2
        });
        assert_eq!(asked, 3);
        assert_eq!(found.expect("it computes"), 2.0 * 64f64.powi(3));
    }
}
