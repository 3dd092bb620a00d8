//! The CPU path. The residual stream is a candle tensor, and each part of the model (embedding, block, head) is one
//! candle operation with a backward of its own; inside, the kernels of `ops` run one after the other on pooled
//! buffers.
//!
//! Weights are no candle variables here: they are slices of the flat buffer, and an operation's backward adds their
//! gradients to the flat gradient itself, in the order in which the layout keeps them (a block is one contiguous
//! bucket that is complete when its backward returns). For the same reason the operations are not recorded in candle's
//! graph but on a [`tape::Tape`], which calls their backwards one by one: activations are freed on the way, and
//! candle's `zeros + add` for every gradient, on a thread pool of its own that spins, is left out.
//!
//! Lanes that one worker computes share a pass (`ops/lanes.rs`): rows do not depend on their company, and sums over rows
//! are taken lane by lane and added along the reduction tree, to the bits of lanes computed alone.

mod adapters;
mod backward;
mod block;
mod buffers;
mod cache;
mod embed;
mod head;
mod head_norms;
mod tape;

use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{CpuStorage, Storage, Tensor};
use cohort_common::layout::Layout;
use cohort_common::spec::{Architecture, LOGITS_ALIVE, LoraConfig, ModelConfig, SHARED_TOKENS};
use cohort_common::tree::Node;

use self::buffers::Buffers;
use self::embed::TokenRows;
pub use self::head::{count, empty_confusion};
use self::tape::Tape;

use super::error::Result;
use super::ops::dropout::Mask;
use super::ops::gemm::Precision;
use super::ops::lanes::Lanes;
use super::ops::{norm, rope};
use super::parameters::Parameters;
use super::{Batch, Gradient, Progress, Scores, Site, Sums};

/// Rows that one thread takes through a block at a time.
const PART_ROWS: usize = 256;

/// What stays the same from one micro-batch to the next.
pub struct Fused {
    model: ModelConfig,
    precision: Precision,
    checkpointing: bool,
    parameters: Parameters,
    rope: Option<rope::Table>,
    buffers: Buffers,
    /// Elements of the flat buffer that are trained; the rest behind them has no gradient.
    trained: usize,
    /// The lowest blocks of which nothing is trained, nor anything below them: backward ends above them.
    still: usize,
    /// How many of them are complete once backward has passed a block.
    complete_after: Vec<usize>,
    adapter_scale: f32,
    adapter_dropout: f32,
}

impl Fused {
    /// Prepares the CPU path of a model; `layout` has the adapters of `lora`. With `checkpointing`, a block's activations
    /// are computed again for its backward. Parameters beyond `gradient_len` have no gradient.
    pub fn new(
        model: &ModelConfig,
        layout: &Layout,
        gradient_len: usize,
        lora: Option<&LoraConfig>,
        (precision, checkpointing): (Precision, bool),
    ) -> Result<Self> {
        let parameters = Parameters::new(model, layout, precision)?;
        let rope = (model.architecture == Architecture::Llama).then(|| rope::Table::of(model));
        Ok(Self {
            model: model.clone(),
            precision,
            checkpointing,
            parameters,
            rope,
            buffers: Buffers::default(),
            still: match lora {
                Some(_) => 0,
                None => (0..model.num_hidden_layers)
                    .take_while(|&block| layout.complete_after(block) > gradient_len)
                    .count(),
            },
            trained: gradient_len,
            complete_after: (0..model.num_hidden_layers)
                .map(|block| layout.complete_after(block).min(gradient_len))
                .collect(),
            adapter_scale: lora.map_or(0.0, LoraConfig::scale),
            adapter_dropout: lora.map_or(0.0, |lora| lora.dropout),
        })
    }

    fn norm_kind(&self) -> norm::Kind {
        match self.model.architecture {
            Architecture::Llama => norm::Kind::Rms,
            Architecture::Gpt2 => norm::Kind::Layer,
        }
    }

    /// Whether lanes of `rows` rows each may share one pass: few enough rows to sum their gradients in the cache, and
    /// to have all logits alive. More would gain nothing, as the products are large already.
    pub fn shares(&self, rows: usize, lanes: usize) -> bool {
        let all = rows * lanes;
        all <= SHARED_TOKENS && all * self.model.outputs() <= LOGITS_ALIVE
    }

    /// The gradient of `Σ w·nll` of each micro-batch, summed along the tree of `node`, in `gradient`; the sums of each.
    /// With `fresh` the gradient is begun, else one lane's is added to. It comes back also after an error. `progress` hears
    /// how much of it is complete while backward goes on.
    pub fn gradient(
        self: &Arc<Self>,
        params: &Arc<Vec<f32>>,
        node: Node,
        micro_batches: &[(&Batch, Site)],
        gradient: &mut Gradient,
        fresh: bool,
        progress: Option<Progress<'_>>,
    ) -> Result<Vec<Sums>> {
        let (first, _) = micro_batches.first().expect("a node has a lane");
        let join = |part: fn(&Batch) -> &[u32]| -> Vec<u32> {
            let parts = micro_batches.iter().flat_map(|(batch, _)| part(batch));
            parts.copied().collect()
        };
        let pass = Arc::new(Pass {
            fused: self.clone(),
            params: params.clone(),
            tokens: join(|batch| &batch.inputs),
            starts: starts(micro_batches),
            samples: first.samples * micro_batches.len(),
            length: first.length,
            lanes: Lanes::of(node, first.samples * first.length),
            sites: micro_batches.iter().map(|(_, site)| *site).collect(),
            gradient: Some(Mutex::new(std::mem::take(gradient))),
            fresh,
            rows_of_tokens: Mutex::default(),
        });
        let weights = micro_batches.iter().flat_map(|(batch, _)| &batch.weights);
        let targets = head::Targets {
            tokens: join(|batch| &batch.targets),
            weights: weights.copied().collect(),
        };
        let result = pass.forward_backward(targets, progress);
        *gradient = std::mem::take(&mut *pass.gradient());
        result
    }

    /// The sums of a batch, without dropout and without gradient.
    pub fn score(self: &Arc<Self>, params: &Arc<Vec<f32>>, batch: &Batch) -> Result<Scores> {
        let (rows, starts) = ((batch.samples, batch.length), &batch.starts);
        let pass = self.inference(params, rows, &batch.inputs, starts);
        let x = pass.blocks(&mut Tape::new(&self.buffers, false))?;
        let targets = head::Targets {
            tokens: batch.targets.clone(),
            weights: batch.weights.clone(),
        };
        let scores = slice(&x, |x| head::score(&pass, x, &targets))?;
        tape::recycle(&self.buffers, x)?;
        Ok(scores)
    }

    /// Logits of one sequence, `[tokens, vocab]`.
    pub fn logits(self: &Arc<Self>, params: &Arc<Vec<f32>>, tokens: &[u32]) -> Result<Vec<f32>> {
        let pass = self.sequence(params, tokens);
        let x = pass.blocks(&mut Tape::new(&self.buffers, false))?;
        Ok(slice(&x, |x| head::logits(&pass, x))?)
    }

    /// One sequence, that is one segment.
    fn sequence(self: &Arc<Self>, params: &Arc<Vec<f32>>, tokens: &[u32]) -> Arc<Pass> {
        self.inference(params, (1, tokens.len()), tokens, &[])
    }

    fn inference(
        self: &Arc<Self>,
        params: &Arc<Vec<f32>>,
        (samples, length): (usize, usize),
        tokens: &[u32],
        starts: &[u32],
    ) -> Arc<Pass> {
        Arc::new(Pass {
            fused: self.clone(),
            params: params.clone(),
            tokens: tokens.to_vec(),
            starts: starts.to_vec(),
            samples,
            length,
            lanes: Lanes::of(Node::leaf(0), samples * length),
            sites: Vec::new(),
            gradient: None,
            fresh: false,
            rows_of_tokens: Mutex::default(),
        })
    }
}

/// One forward, and one backward if there is a gradient to add to. Shared by the operations of its graph.
struct Pass {
    fused: Arc<Fused>,
    params: Arc<Vec<f32>>,
    tokens: Vec<u32>,
    /// Where the segment of each row begins; empty where samples are not cut into segments.
    starts: Vec<u32>,
    samples: usize,
    length: usize,
    /// Whose rows lie where.
    lanes: Lanes,
    /// Where dropout draws its numbers, per lane; empty drops nothing.
    sites: Vec<Site>,
    gradient: Option<Mutex<Gradient>>,
    /// Whether the gradient is begun here; else one lane's is added to.
    fresh: bool,
    /// What the head leaves for the embedding where several lanes share the pass.
    rows_of_tokens: Mutex<Option<TokenRows>>,
}

impl Pass {
    fn rows(&self) -> usize {
        self.samples * self.length
    }

    fn width(&self) -> usize {
        self.fused.model.hidden_size
    }

    /// Width of a row that leaves attention.
    fn attention_width(&self) -> usize {
        self.fused.model.attention_width()
    }

    /// The beginnings of the segments of some rows; empty where there are none.
    fn starts_of(&self, rows: std::ops::Range<usize>) -> &[u32] {
        self.starts.get(rows).unwrap_or_default()
    }

    fn gradient(&self) -> MutexGuard<'_, Gradient> {
        let gradient = self
            .gradient
            .as_ref()
            .expect("only a training pass has a gradient");
        // A panic elsewhere must not hide the first error behind a second one.
        gradient
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn forward_backward(
        self: &Arc<Self>,
        targets: head::Targets,
        mut progress: Option<Progress<'_>>,
    ) -> Result<Vec<Sums>> {
        let mut tape = Tape::new(&self.fused.buffers, true);
        let x = self.blocks(&mut tape)?;
        let (op, sums) = head::Head::new(self.clone(), targets);
        let loss = tape.apply(x, op)?;
        // The chain: the embedding, the blocks, the head.
        let blocks = 1..=self.fused.complete_after.len();
        tape.backward(loss, |place| {
            if let Some(progress) = progress.as_mut().filter(|_| blocks.contains(&place)) {
                progress(&self.gradient(), self.fused.complete_after[place - 1]);
            }
        })?;
        if let Some(progress) = progress {
            progress(&self.gradient(), self.fused.trained);
        }
        let mut sums = sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Ok(std::mem::take(&mut *sums))
    }

    /// Whether parameters are trained. Those that stand together are, or none of them is.
    fn trains(&self, parameters: &std::ops::Range<usize>) -> bool {
        parameters.end <= self.fused.trained
    }

    /// The dropout masks of one place, one per lane; `None` where nothing is dropped.
    fn masks(&self, place: usize) -> Option<Vec<Mask>> {
        self.masks_of(place, self.fused.model.dropout)
    }

    /// The masks of a place with another probability.
    fn masks_of(&self, place: usize, probability: f32) -> Option<Vec<Mask>> {
        let sites = self.sites.iter();
        let masks = sites.map(|&site| Mask::new(site, place, probability));
        masks
            .collect::<Option<Vec<_>>>()
            .filter(|masks| !masks.is_empty())
    }

    /// Samples of each lane.
    fn samples_per_lane(&self) -> usize {
        self.samples / self.lanes.count()
    }

    /// Cuts the samples into parts that go through a block one beside the other, each on rows that stay in the cache.
    /// Nothing but speed depends on the cut.
    fn part_samples(&self) -> usize {
        let threads = rayon::current_num_threads();
        let even = self
            .samples
            .div_ceil(if threads > 1 { 2 * threads } else { 1 });
        (PART_ROWS / self.length).clamp(1, even.max(1))
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

/// The beginnings of the segments of all lanes; empty if no lane has any.
fn starts(micro_batches: &[(&Batch, Site)]) -> Vec<u32> {
    let batches = || micro_batches.iter().map(|(batch, _)| batch);
    if batches().all(|batch| batch.starts.is_empty()) {
        return Vec::new();
    }
    let mut starts = Vec::new();
    for batch in batches() {
        match batch.starts.is_empty() {
            true => starts.resize(starts.len() + batch.inputs.len(), 0),
            false => starts.extend_from_slice(&batch.starts),
        }
    }
    starts
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
