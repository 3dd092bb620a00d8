//! Values on their way between host and GPU, by pinned memory, which the GPU reads and writes at the full speed of its
//! bus: two buffers take turns, so that one is copied here while the other travels.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaView, CudaViewMut, PinnedHostSlice,
};
use candle_core::{CudaDevice, Result};
use rayon::prelude::*;

/// Values of a buffer.
const LEN: usize = 4 << 20;

/// Values that one thread copies at a time.
const PART: usize = 64 << 10;

/// The two buffers of a device.
pub struct Staging {
    device: CudaDevice,
    buffers: Mutex<[Buffer; 2]>,
}

struct Buffer {
    memory: PinnedHostSlice<f32>,
    /// The end of its last travel.
    travel: Option<CudaEvent>,
}

impl Buffer {
    /// Waits until it has arrived.
    fn settled(&mut self) -> Result<&mut [f32]> {
        if let Some(travel) = self.travel.take() {
            travel.synchronize().w()?;
        }
        self.memory.as_mut_slice().w()
    }
}

impl Staging {
    /// Takes pinned memory of 32 MiB.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let buffer = || -> Result<Buffer> {
            Ok(Buffer {
                // SAFETY: what is read of a buffer was written before.
                memory: unsafe { stream.context().alloc_pinned_with_flags(LEN, 0) }.w()?,
                travel: None,
            })
        };
        Ok(Self {
            device: device.clone(),
            buffers: Mutex::new([buffer()?, buffer()?]),
        })
    }

    /// Hands each part of `values` to `take`, with the part of `out`, which is as long, that it is for.
    pub fn read(
        &self,
        values: &CudaView<f32>,
        out: &mut [f32],
        take: impl Fn(&mut [f32], &[f32]) + Sync,
    ) -> Result<()> {
        let stream = self.device.cuda_stream();
        let mut buffers = self.buffers();
        let (len, count) = (out.len(), out.len().div_ceil(LEN));
        let mut chunks = out.chunks_mut(LEN);
        for index in 0..=count {
            if index < count {
                let (from, to) = (index * LEN, len.min((index + 1) * LEN));
                let buffer = &mut buffers[index % 2];
                let free = &mut buffer.settled()?[..to - from];
                stream.memcpy_dtoh(&values.slice(from..to), free).w()?;
                buffer.travel = Some(stream.record_event(None).w()?);
            }
            if index > 0 {
                let arrived = &*buffers[(index - 1) % 2].settled()?;
                let chunk = chunks.next().expect("as many as were sent");
                let parts = chunk.par_chunks_mut(PART).zip(arrived.par_chunks(PART));
                parts.for_each(|(out, values)| take(out, &values[..out.len()]));
            }
        }
        Ok(())
    }

    /// Copies `values` to `out`, which is as long.
    pub fn write(&self, values: &[f32], out: &mut CudaViewMut<f32>) -> Result<()> {
        let stream = self.device.cuda_stream();
        let mut buffers = self.buffers();
        for (index, chunk) in values.chunks(LEN).enumerate() {
            let buffer = &mut buffers[index % 2];
            let free = &mut buffer.settled()?[..chunk.len()];
            let parts = free.par_chunks_mut(PART).zip(chunk.par_chunks(PART));
            parts.for_each(|(free, values)| free.copy_from_slice(values));
            let from = index * LEN;
            let mut out = out.slice_mut(from..from + chunk.len());
            stream.memcpy_htod(&*free, &mut out).w()?;
            buffer.travel = Some(stream.record_event(None).w()?);
        }
        Ok(())
    }

    fn buffers(&self) -> MutexGuard<'_, [Buffer; 2]> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Memory that still travels is not given back. An error has been told to whoever sent it, or ends the device.
        for buffer in self.buffers().iter_mut() {
            let _ = buffer.settled();
        }
    }
}
