//! What a user asks for: the typed TOML of a spec, and the run spec that the rest trusts.
//!
//! The way of a spec: text and overrides ([`SpecSource`]) → typed tables ([`SpecFile`]) → what is meant
//! ([`SpecMeant`], defaults filled, impossible values refused) → [`RunSpec`], once the corpus is known.

mod bounds;
mod depth;
mod diloco;
mod error;
mod file;
mod finetune;
mod identity;
mod layers;
mod lora;
mod memory;
mod mixture;
mod model;
mod options;
mod plan;
mod preset;
mod run;
mod samples;
mod shape;
mod suggest;
#[cfg(test)]
mod tests;
mod validate;
mod watchdog;

pub use bounds::{
    MAX_LANES, MAX_MICRO_BATCH_TOKENS, MAX_SAMPLES_PER_STEP, MAX_STEPS, MAX_VOCAB, MAX_WORKER_BYTES,
};
pub use diloco::{Diloco, SyncKind};
pub use error::{Place, SpecError};
pub use file::{
    CheckpointTable, CorpusTable, LoraTable, MixedTable, MixtureTable, ModelTable, ObjectiveKind,
    PhaseTable, SamplesTable, SpecFile, SpecSource, SplitKind, TokenizerKind, TokenizerTable,
    TrainTable, WatchdogTable,
};
pub use finetune::FinetuneBase;
pub use layers::LayerRates;
pub use lora::{LoraConfig, linear_modules};
pub use memory::{
    LOGITS_ALIVE, MemoryEstimate, SHARED_TOKENS, counted, human_bytes, human_count, human_flops,
    memory_per_worker,
};
pub use mixture::{
    MixedCorpus, MixedOptions, MixtureConfig, MixtureOptions, MixturePhase, MixtureWeights,
};
pub use model::{Architecture, ModelConfig, RopeScaling};
pub use plan::{
    CheckpointBytes, CorpusSize, Estimate, Parameters, Plan, Speed, StateBytes, Validations, Wire,
    worker_counts,
};
pub use preset::{PRESETS, Preset};
pub use run::{
    CheckpointConfig, Payload, Precision, RunKind, RunSpec, ScheduleKind, StartPoint, TrainConfig,
};
pub use samples::{MAX_PROMPT_BYTES, MAX_PROMPTS, MAX_SAMPLE_TOKENS, SampleConfig};
pub use validate::{CorpusFacts, CorpusOptions, SpecMeant, SupervisedOptions, TokenizerChoice};
pub use watchdog::{WatchdogAction, WatchdogConfig};
