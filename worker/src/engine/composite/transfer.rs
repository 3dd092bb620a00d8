//! Values on their way between the flat host buffers and tensors of f32, straight into the memory that is there already.

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Storage, Tensor, bail};

/// The way to a device and back.
pub struct Transfer {
    #[cfg(feature = "cuda")]
    staging: Option<super::cuda::Staging>,
}

impl Transfer {
    /// Prepares what the way needs.
    pub fn new(_device: &Device) -> Result<Self> {
        Ok(Self {
            #[cfg(feature = "cuda")]
            staging: match _device {
                Device::Cuda(device) => Some(super::cuda::Staging::new(device)?),
                _ => None,
            },
        })
    }

    /// Overwrites a contiguous tensor, which is as long.
    pub fn write(&self, values: &[f32], tensor: &Tensor) -> Result<()> {
        tensor.inplace_op1(&Write { way: self, values })
    }

    /// Hands each part of a tensor to `take`, with the part of `out`, which is as long, that it is for.
    pub fn read(
        &self,
        tensor: &Tensor,
        out: &mut [f32],
        take: impl Fn(&mut [f32], &[f32]) + Sync,
    ) -> Result<()> {
        let tensor = tensor.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let (from, to) = range(layout, out.len())?;
        match (&*storage, self) {
            (Storage::Cpu(CpuStorage::F32(source)), _) => take(out, &source[from..to]),
            #[cfg(feature = "cuda")]
            (
                Storage::Cuda(storage),
                Self {
                    staging: Some(staging),
                },
            ) => {
                let source = storage.as_cuda_slice::<f32>()?;
                staging.read(&source.slice(from..to), out, take)?;
            }
            _ => bail!("a tensor to read is not of f32, or on another device"),
        }
        Ok(())
    }
}

fn range(layout: &Layout, len: usize) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some((from, to)) if to - from == len => Ok((from, to)),
        _ => bail!("{len} values for a tensor of {:?}", layout.shape()),
    }
}

struct Write<'a> {
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    way: &'a Transfer,
    values: &'a [f32],
}

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (from, to) = range(layout, self.values.len())?;
        match storage {
            CpuStorage::F32(values) => values[from..to].copy_from_slice(self.values),
            _ => bail!("a tensor to overwrite is not of f32"),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> Result<()> {
        let (from, to) = range(layout, self.values.len())?;
        let Some(staging) = &self.way.staging else {
            bail!("a tensor to overwrite is on another device")
        };
        let values = storage.as_cuda_slice_mut::<f32>()?;
        staging.write(self.values, &mut values.slice_mut(from..to))
    }
}
