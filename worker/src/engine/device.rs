//! Which device the engine computes on.

use std::str::FromStr;

use candle_core::Device;

use super::error::{EngineError, Result};

/// A device as a user names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device if this build and machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of that number.
    Cuda(usize),
}

impl DeviceChoice {
    /// Opens the device.
    pub(super) fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            // A build with CUDA may run where there is no GPU.
            Self::Auto if candle_core::utils::cuda_is_available() => {
                Ok(gpu(0).unwrap_or(Device::Cpu))
            }
            Self::Auto => Ok(Device::Cpu),
            Self::Cuda(index) if !candle_core::utils::cuda_is_available() => {
                Err(EngineError::NoCuda(index))
            }
            Self::Cuda(index) => {
                gpu(index).map_err(|source| EngineError::OpenCuda { index, source })
            }
        }
    }
}

/// Opens a GPU.
fn gpu(index: usize) -> candle_core::Result<Device> {
    let device = Device::new_cuda(index)?;
    #[cfg(feature = "cuda")]
    super::composite::prepare_gpu(device.as_cuda_device()?)?;
    Ok(device)
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = EngineError;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| EngineError::UnknownDevice(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for choice in [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(3)] {
            assert_eq!(
                choice
                    .to_string()
                    .parse::<DeviceChoice>()
                    .expect("a device"),
                choice
            );
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:x", "CPU"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_plain_build_says_that_it_has_no_cuda() {
        let error = DeviceChoice::Cuda(0).open().expect_err("no CUDA");
        assert_eq!(
            error.to_string(),
            "this build has no CUDA, so `cuda:0` cannot be used; build with `--features cuda`, or use `--device cpu`"
        );
    }
}
