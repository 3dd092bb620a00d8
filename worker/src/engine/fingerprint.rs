//! The numerics fingerprint: equal strings mean equal bits.

use candle_core::Device;

use super::error::Result;
use super::ops::gemm::Precision;
use super::ops::linear::{self, Shape, WeightOrder};
use super::ops::{cross_entropy, simd};

/// Version, system, device, arithmetic, and a digest of probe products: what no list of features would show. Processors
/// that have a fused multiply-add agree with each other, whatever the width of their vectors and the size of their
/// caches; those without form a class of their own. Of a GPU it has the model, the version of cuBLAS and products of its
/// own, but not its number, besides what the processor, which updates and adds, would say.
pub fn fingerprint(device: &Device) -> Result<String> {
    let place = match device {
        Device::Cpu => "cpu".to_string(),
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => super::composite::gpu_fingerprint(gpu)?,
        device => format!("{:?}", device.location()).to_lowercase(),
    };
    Ok(format!(
        "cohort-{} {}-{} {place} {} {}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        std::env::consts::ARCH,
        simd::instruction_set().arithmetic(),
        probe()
    ))
}

/// Eight hex digits over the bits of a few deep products and exponentials.
fn probe() -> String {
    let mut hasher = blake3::Hasher::new();
    for (rows, inputs, outputs) in [(96, 2048, 96), (8, 1024, 130), (256, 300, 17)] {
        let values = |len: usize| {
            (0..len)
                .map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 509.0)
                .collect::<Vec<f32>>()
        };
        for order in [WeightOrder::InputsFirst, WeightOrder::OutputsFirst] {
            let mut y = vec![0.0; rows * outputs];
            let shape = Shape {
                inputs,
                outputs,
                order,
                precision: Precision::F32,
            };
            linear::forward(
                shape,
                &mut y,
                &values(rows * inputs),
                &values(inputs * outputs),
                None,
                None,
            );
            y.chunks_exact_mut(outputs).for_each(cross_entropy::softmax);
            y.iter().for_each(|y| {
                hasher.update(&y.to_le_bytes());
            });
        }
    }
    hasher.finalize().to_hex()[..8].to_string()
}
