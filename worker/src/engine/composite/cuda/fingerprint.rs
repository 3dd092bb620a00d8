//! What decides the bits of a GPU's results.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys;
use candle_core::{CudaDevice, Device, Result, Tensor};
use cohort_common::spec::Precision;

use super::super::super::ops::norm;

/// The GPU's model, the version of cuBLAS, and eight hex digits over the bits of a few products and sums.
pub fn fingerprint(gpu: &CudaDevice) -> Result<String> {
    let stream = gpu.cuda_stream();
    let context = stream.context();
    let name = context.name().w()?.to_lowercase().replace(' ', "-");
    let (major, minor) = context.compute_capability().w()?;
    let mut version = 0;
    // SAFETY: the handle is the device's own, and the version is written before the call returns.
    let status = unsafe { sys::cublasGetVersion_v2(*gpu.cublas_handle().handle(), &mut version) };
    status.result().w()?;
    let probe = probe(&Device::Cuda(gpu.clone()))?;
    Ok(format!(
        "cuda:{name}-{major}.{minor}:cublas-{version}:{probe}"
    ))
}

fn probe(device: &Device) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for (rows, inputs, outputs) in [(96, 2048, 96), (8, 1024, 130), (256, 300, 17)] {
        let values = |rows: usize, cols: usize| {
            let value = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) / 509.0;
            Tensor::from_iter((0..rows * cols).map(value), device)?.reshape((rows, cols))
        };
        let (x, w) = (values(rows, inputs)?, values(inputs, outputs)?);
        let ones = Tensor::ones(outputs, x.dtype(), device)?;
        for precision in [Precision::F32, Precision::Bf16] {
            let y = super::product(&x, &w, false, precision)?;
            let y = super::norm(&y, &ones, norm::Kind::Layer, 1e-5)?;
            for value in super::gelu(&y)?.flatten_all()?.to_vec1::<f32>()? {
                hasher.update(&value.to_le_bytes());
            }
        }
    }
    Ok(hasher.finalize().to_hex()[..8].to_string())
}
