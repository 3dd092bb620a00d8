//! The CPU path. The residual stream is a candle tensor, and each part of the model (embedding, block, head) is one
//! candle operation with a backward of its own; inside, the kernels of `ops` run one after the other on pooled
//! buffers.
//!
//! Weights are no candle variables here: they are slices of the flat buffer, and an operation's backward adds their
//! gradients to the flat gradient itself, in the order in which the layout keeps them (a block is one contiguous
//! bucket that is complete when its backward returns). For the same reason the operations are not recorded in candle's
//! graph but on a [`tape::Tape`], which calls their backwards one by one: activations are freed on the way, and
//! candle's `zeros + add` for every gradient, on a thread pool of its own that spins, is left out.

mod block;
mod buffers;
mod cache;
mod embed;
mod head;
mod tape;

use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{CpuStorage, Storage, Tensor};
use cohort_common::layout::Layout;
use cohort_common::spec::{Architecture, ModelConfig};

use self::buffers::Buffers;
use self::tape::Tape;

use super::error::Result;
use super::ops::{norm, rope};
use super::parameters::Parameters;
use super::{Batch, Site, Sums};

/// What stays the same from one micro-batch to the next.
pub struct Fused {
    model: ModelConfig,
    parameters: Parameters,
    rope: Option<rope::Table>,
    buffers: Buffers,
}

impl Fused {
    /// Prepares the CPU path of a model.
    pub fn new(model: &ModelConfig, layout: &Layout) -> Result<Self> {
        let parameters = Parameters::new(model, layout)?;
        let rope = (model.architecture == Architecture::Llama)
            .then(|| rope::Table::new(model.rope_theta, model.head_dim(), model.context));
        Ok(Self {
            model: model.clone(),
            parameters,
            rope,
            buffers: Buffers::default(),
        })
    }

    fn norm_kind(&self) -> norm::Kind {
        match self.model.architecture {
            Architecture::Llama => norm::Kind::Rms,
            Architecture::Gpt2 => norm::Kind::Layer,
        }
    }

    /// Adds the gradient of `Σ w·nll` to `gradient`, which comes back also after an error.
    pub fn accumulate(
        self: &Arc<Self>,
        params: &Arc<Vec<f32>>,
        batch: &Batch,
        site: Site,
        gradient: &mut Vec<f32>,
    ) -> Result<Sums> {
        let pass = Arc::new(Pass {
            fused: self.clone(),
            params: params.clone(),
            tokens: batch.inputs.clone(),
            samples: batch.samples,
            length: batch.length,
            site: Some(site),
            gradient: Some(Mutex::new(std::mem::take(gradient))),
        });
        let result = pass.forward_backward(batch);
        *gradient = std::mem::take(&mut *pass.gradient());
        result
    }

    /// The sums of a batch, without dropout and without gradient.
    pub fn score(self: &Arc<Self>, params: &Arc<Vec<f32>>, batch: &Batch) -> Result<Sums> {
        let pass = self.inference(params, &batch.inputs, batch.samples, batch.length);
        let x = pass.blocks(&mut Tape::new(false))?;
        Ok(slice(&x, |x| head::score(&pass, x, batch))?)
    }

    /// Logits of one sequence, `[tokens, vocab]`.
    pub fn logits(self: &Arc<Self>, params: &Arc<Vec<f32>>, tokens: &[u32]) -> Result<Vec<f32>> {
        let pass = self.inference(params, tokens, 1, tokens.len());
        let x = pass.blocks(&mut Tape::new(false))?;
        Ok(slice(&x, |x| head::logits(&pass, x))?)
    }

    fn inference(
        self: &Arc<Self>,
        params: &Arc<Vec<f32>>,
        tokens: &[u32],
        samples: usize,
        length: usize,
    ) -> Arc<Pass> {
        Arc::new(Pass {
            fused: self.clone(),
            params: params.clone(),
            tokens: tokens.to_vec(),
            samples,
            length,
            site: None,
            gradient: None,
        })
    }
}

/// One forward, and one backward if there is a gradient to add to. Shared by the operations of its graph.
struct Pass {
    fused: Arc<Fused>,
    params: Arc<Vec<f32>>,
    tokens: Vec<u32>,
    samples: usize,
    length: usize,
    /// Where dropout draws its numbers; `None` drops nothing.
    site: Option<Site>,
    gradient: Option<Mutex<Vec<f32>>>,
}

impl Pass {
    fn rows(&self) -> usize {
        self.samples * self.length
    }

    fn width(&self) -> usize {
        self.fused.model.hidden_size
    }

    fn gradient(&self) -> MutexGuard<'_, Vec<f32>> {
        let gradient = self
            .gradient
            .as_ref()
            .expect("only a training pass has a gradient");
        // A panic elsewhere must not hide the first error behind a second one.
        gradient
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn forward_backward(self: &Arc<Self>, batch: &Batch) -> Result<Sums> {
        let mut tape = Tape::new(true);
        let x = self.blocks(&mut tape)?;
        let (op, sums) = head::Head::new(self.clone(), batch);
        let loss = tape.apply(x, op)?;
        tape.backward(loss)?;
        let sums = *sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Ok(sums)
    }

    /// The residual stream after the last block.
    fn blocks(self: &Arc<Self>, tape: &mut Tape) -> Result<Tensor> {
        let anchor = Tensor::zeros(1, candle_core::DType::F32, &candle_core::Device::Cpu)?;
        let mut x = tape.apply(anchor, embed::Embed::new(self.clone()))?;
        for layer in 0..self.fused.parameters.blocks.len() {
            x = tape.apply(x, block::Block::new(self.clone(), layer))?;
        }
        Ok(x)
    }
}

/// Calls `f` with the elements of a contiguous CPU tensor of f32.
fn slice<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(elements(storage, layout)?)),
        _ => candle_core::bail!("the fused path computes on the CPU alone"),
    }
}

/// The elements of a contiguous operand.
fn elements<'a>(
    storage: &'a CpuStorage,
    layout: &candle_core::Layout,
) -> candle_core::Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => candle_core::bail!("the fused path takes contiguous tensors, got {layout:?}"),
    }
}
