//! The run spec: a complete, validated description of one pretraining or finetuning run. Two runs with equal specs
//! and equal corpora have equal results, on any cluster.

use serde::{Deserialize, Serialize};

use super::layers::LayerRates;
use super::{
    Diloco, LoraConfig, MixtureConfig, ModelConfig, SampleConfig, WatchdogAction, WatchdogConfig,
};
use crate::floats::{
    block_len, bytes_of, floats_of, from_bf16, from_int4, from_int8, to_bf16, to_int4, to_int8,
};
use crate::layout::Layout;

/// Why a run exists. The loop is the same; data, start and defaults differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunKind {
    /// From random weights.
    Pretrain,
    /// From the weights of a checkpoint.
    Finetune,
    /// No step at all: scores a text with the weights of a checkpoint.
    Eval,
}

/// Shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to the minimum (Loshchilov and Hutter, arXiv 1608.03983).
    Cosine,
    /// A straight line from the peak to the minimum.
    Linear,
    /// Warm-up, stable, decay: the peak until the last `decay_steps`, then a straight line (Hu et al., arXiv 2404.06395).
    Wsd,
    /// The peak throughout.
    Constant,
}

/// What the operands of matrix products are rounded to. Weights, moments and sums stay in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Nothing.
    #[default]
    F32,
    /// bfloat16, to nearest.
    Bf16,
}

impl Precision {
    /// Whether nothing is rounded.
    pub(super) fn is_f32(&self) -> bool {
        *self == Self::F32
    }
}

/// What a node of the reduction tree is rounded to, and how it travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Payload {
    /// Not at all; four bytes for each element.
    #[default]
    F32,
    /// To the nearest bfloat16; two bytes for each element.
    Bf16,
    /// At random, to a neighbour among the multiples of a scale that a block has in common; a byte for each element, and
    /// one for each block.
    Int8,
    /// The same with half a byte for each element.
    Int4,
}

impl Payload {
    /// Whether nothing is rounded.
    pub(super) fn is_f32(&self) -> bool {
        *self == Self::F32
    }

    /// Bytes of so many elements on the wire.
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            Self::F32 => elements * 4,
            Self::Bf16 => elements * 2,
            Self::Int8 => block_len(8, elements),
            Self::Int4 => block_len(4, elements),
        }
    }

    /// Values of a node as they travel, little-endian. They are rounded already, so that nothing is lost.
    pub fn to_wire(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => bytes_of(values).to_vec(),
            Self::Bf16 => to_bf16(values),
            Self::Int8 => to_int8(values),
            Self::Int4 => to_int4(values),
        }
    }

    /// What [`to_wire`](Self::to_wire) has written of so many elements.
    ///
    /// # Panics
    /// If these are not the [`bytes`](Self::bytes) of so many elements.
    pub fn from_wire(self, data: &[u8], elements: usize) -> Vec<f32> {
        assert_eq!(data.len(), self.bytes(elements));
        match self {
            Self::F32 => floats_of(data),
            Self::Bf16 => from_bf16(data),
            Self::Int8 => from_int8(data, elements),
            Self::Int4 => from_int4(data, elements),
        }
    }
}

/// Everything that decides an optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Logical data-parallel shards; fixed for the life of the run.
    pub lanes: u32,
    /// Samples in one forward and backward.
    pub micro_batch: u32,
    /// Micro-batches that a lane runs per step, in order.
    pub accumulate: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Learning rate at the end of the schedule.
    pub min_learning_rate: f64,
    /// Steps of linear warm-up from zero.
    pub warmup_steps: u64,
    /// Shape after warm-up.
    pub schedule: ScheduleKind,
    /// Length of the final decay of `wsd`, in steps.
    pub decay_steps: u64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub eps: f64,
    /// Decoupled weight decay; applied to matrices only.
    pub weight_decay: f64,
    /// Bound on the global gradient norm; 0 turns clipping off.
    pub grad_clip: f64,
    /// What the operands of matrix products are rounded to. Runs of before there was a choice do not say it.
    #[serde(default)]
    pub precision: Precision,
    /// What sums of gradients are rounded to. Runs of before there was a choice do not say it.
    #[serde(default)]
    pub payload: Payload,
    /// How each lane steps by itself between exchanges; absent is not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diloco: Option<Diloco>,
    /// Whether a block's activations are computed again for its backward, instead of kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gradient_checkpointing: bool,
    /// Seed of the initial weights, the sample order and dropout.
    pub seed: u64,
    /// Steps between validations; 0 validates only at the start and the end.
    pub eval_every: u64,
    /// Bound on the samples of one validation; 0 scores the whole split.
    pub eval_samples: u64,
    /// The embeddings and this many of the lowest blocks stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_layers: Option<u32>,
    /// Factor of the learning rate from each layer to the one below it; absent is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_decay: Option<f64>,
    /// Steps after which each layer below the head begins to learn, top down; absent is at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfreeze_every: Option<u64>,
    /// Share of the training samples that are used, the first of the corpus; absent is all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_share: Option<f64>,
    /// Share of the samples that are taken from the corpus of the run that this one starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<f64>,
    /// Validations without a new best loss after which the run ends; absent is never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<u32>,
    /// How much the loss on the base's validation text may rise, in nats, before the run ends; absent is at will.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_forgetting: Option<f64>,
    /// Tokens of one sample, at most the model's context; absent is the context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
    /// Workers that must be there before the run starts.
    pub min_workers: u32,
}

impl TrainConfig {
    /// Samples that one optimizer step consumes.
    pub fn samples_per_step(&self) -> u64 {
        u64::from(self.lanes) * self.samples_per_lane()
    }

    /// Samples that one lane consumes per step.
    pub fn samples_per_lane(&self) -> u64 {
        u64::from(self.inner_steps()) * u64::from(self.accumulate) * u64::from(self.micro_batch)
    }

    /// Whether no two lanes share a pass: several micro-batches fill the machine, a pass that adds along the tree does not
    /// round on the way, and lanes may step by themselves.
    pub fn lanes_go_alone(&self) -> bool {
        self.accumulate > 1 || !self.payload.is_f32() || self.diloco.is_some()
    }

    /// What its steps are called.
    pub fn step_word(&self) -> &'static str {
        match self.diloco {
            Some(_) => "round",
            None => "step",
        }
    }

    /// Optimizer steps that each lane takes by itself in a step: those of a round, or 1.
    pub fn inner_steps(&self) -> u32 {
        self.diloco.map_or(1, |diloco| diloco.inner_steps)
    }
}

/// When checkpoints are written and how many stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0 writes one only at the end.
    pub every: u64,
    /// How many of the newest stay; the best by validation loss stays besides.
    pub keep: u32,
}

/// A complete run, as the coordinator and the workers trust it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// Pretraining or finetuning.
    pub kind: RunKind,
    /// The model's shape, vocabulary included.
    pub model: ModelConfig,
    /// The optimizer steps.
    pub train: TrainConfig,
    /// The checkpoints.
    pub checkpoint: CheckpointConfig,
    /// Fingerprint of the corpus that is trained on.
    pub corpus: String,
    /// Corpora besides it. Runs of before there were mixtures do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixture: Option<MixtureConfig>,
    /// Where the weights start, if not from the seed.
    pub start: Option<StartPoint>,
    /// Adapters that are trained in place of the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// What is written while it trains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<SampleConfig>,
    /// Steps out of the ordinary. Runs of before there was a watchdog have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<WatchdogConfig>,
}

impl RunSpec {
    /// Tokens of one sample.
    pub fn sample_length(&self) -> usize {
        self.train.max_length.unwrap_or(self.model.context)
    }

    /// The fingerprints of the corpora that are trained on: the run's own, what is mixed in, and last what is replayed.
    pub fn training_corpora(&self) -> Vec<&str> {
        let mixed = self.mixture.iter().flat_map(|mixture| &mixture.corpora);
        let mixed = mixed.map(|mixed| mixed.corpus.as_str());
        let own = std::iter::once(self.corpus.as_str());
        own.chain(mixed).chain(self.replayed_corpus()).collect()
    }

    /// The fingerprint of the corpus that the run's start was trained on, if that is known.
    pub fn base_corpus(&self) -> Option<&str> {
        self.start.as_ref()?.base_corpus.as_deref()
    }

    /// The fingerprint of the corpus that is replayed.
    pub fn replayed_corpus(&self) -> Option<&str> {
        self.train.replay?;
        self.base_corpus()
    }

    /// The watchdog, where it looks at all.
    pub fn watched(&self) -> Option<&WatchdogConfig> {
        let watchdog = self.watchdog.as_ref();
        watchdog.filter(|w| w.action != WatchdogAction::Off)
    }

    /// Whether a step out of the ordinary is committed without its update.
    pub fn skips(&self) -> bool {
        self.watched().is_some_and(|w| w.action.skips())
    }

    /// Floating-point operations of a training step for one token: [`ModelConfig::flops_per_token`]. With adapters, the
    /// gradients of the weights that stay as they are need not be computed, a third of the 6 operations of each.
    pub fn flops_per_token(&self) -> f64 {
        let whole = self.model.flops_per_token();
        match self.lora {
            None => whole,
            Some(_) => {
                let (layout, length) = (self.layout(), self.sample_length());
                let attention = 12 * self.model.num_hidden_layers * self.model.attention_width();
                let frozen = whole - (attention * self.model.context) as f64;
                frozen * 2.0 / 3.0 + 6.0 * layout.len() as f64 + (attention * length) as f64
            }
        }
    }

    /// Elements of a gradient: of the parameters that are trained, without layers that are frozen for the whole run.
    pub fn gradient_len(&self) -> usize {
        let layout = self.layout();
        match LayerRates::of(&self.model, &self.train) {
            Some(rates) => rates.gradient_len(&layout),
            None => layout.len(),
        }
    }

    /// Where each parameter lies, and which are trained.
    pub fn layout(&self) -> Layout {
        Layout::adapted(&self.model, self.lora.as_ref())
    }
}

/// The checkpoint that a finetuning run starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartPoint {
    /// What the user named: `RUN@STEP`, or the directory.
    pub source: String,
    /// BLAKE3 of the checkpoint's `model.safetensors`, in hex: the identity of the weights.
    pub weights: String,
    /// Fingerprint of the corpus that the checkpoint was trained on, scored again at the end; absent for a foreign checkpoint.
    pub base_corpus: Option<String>,
}
