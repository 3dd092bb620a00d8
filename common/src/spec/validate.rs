//! From a spec as typed to a spec as meant: fills every default and refuses what no run can have. What is only known
//! once the corpus is prepared, the vocabulary's size and the corpus fingerprint, comes last, in [`SpecMeant::run_spec`].
//!
//! This file reads no file and knows no corpus; whether the paths exist is found by whoever reads them.

use serde::{Deserialize, Serialize};

use super::bounds::{
    MAX_LANES, MAX_STEPS, MAX_VOCAB, check_memory, check_numbers, check_steps, number, small,
    within,
};
use super::depth;
use super::diloco::diloco_of;
use super::error::SpecError;
use super::file::{
    CheckpointTable, CorpusTable, SpecFile, SplitKind, TokenizerKind, TokenizerTable, TrainTable,
};
use super::lora::{LoraConfig, lora_of};
use super::mixture::{MixtureOptions, mixture_of};
use super::options::{
    data_share, forgetting, freeze_layers, layer_decay, max_length, patience, replay, selection_of,
    supervised_of, unfreeze_every,
};
use super::samples::SampleConfig;
use super::shape::shape_of;
use super::watchdog::{WatchdogConfig, watchdog_of};
use super::{
    CheckpointConfig, ModelConfig, RunKind, RunSpec, ScheduleKind, StartPoint, TrainConfig,
};
use crate::corpus::{Objective, Selection, SupervisedConfig, TooLong};

/// 256 bytes and the end of text.
const MIN_BPE_VOCAB: u64 = 257;

/// The text of a run and how it is split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusOptions {
    /// Files, directories and globs; may still be empty, see [`CorpusOptions::require_paths`].
    pub paths: Vec<String>,
    /// The field of a JSON line that holds the text.
    pub text_field: String,
    /// Share of the text that is held out, in (0, 1).
    pub validation: f64,
    /// How the held-out text is chosen.
    pub split: SplitKind,
    /// Skip files that cannot be read as text.
    pub skip_bad: bool,
    /// How lines become samples; `None` is plain text.
    pub supervised: Option<SupervisedOptions>,
    /// Which documents stay.
    pub selection: Selection,
}

/// How the lines of a supervised corpus become samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SupervisedOptions {
    /// What is learned.
    pub objective: Objective,
    /// What becomes of samples that are too long.
    pub too_long: TooLong,
    /// Whether short samples share a sequence.
    pub packing: bool,
    /// The labels that may occur; empty is those that do.
    pub labels: Vec<String>,
    /// The field of the text, where it has no usual name.
    pub text_field: Option<String>,
    /// The field of the label, where it has no usual name.
    pub label_field: Option<String>,
}

impl SupervisedOptions {
    /// For samples of at most `row` tokens, and conversations in that template.
    pub fn config(&self, row: usize, template: Option<String>) -> SupervisedConfig {
        SupervisedConfig {
            objective: self.objective,
            row,
            packing: self.packing,
            too_long: self.too_long,
            template,
            labels: self.labels.clone(),
            text_field: self.text_field.clone(),
            label_field: self.label_field.clone(),
        }
    }
}

impl CorpusOptions {
    /// An error where no text is named at all.
    pub fn require_paths(&self) -> Result<(), SpecError> {
        if self.paths.is_empty() {
            return Err(SpecError::Missing {
                key: "corpus.paths".into(),
                why: "there is no text to train on".into(),
                next: "pass `--corpus PATH` or set it in the spec".into(),
            });
        }
        Ok(())
    }
}

/// How text becomes tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum TokenizerChoice {
    /// Byte-level BPE trained on the corpus.
    Bpe {
        /// Tokens of the vocabulary.
        vocab_size: usize,
    },
    /// One token for each character of the corpus.
    Char,
    /// A given `tokenizer.json`.
    File {
        /// Where it lies.
        path: String,
    },
    /// The tokenizer of the checkpoint that is finetuned.
    Inherited,
}

impl TokenizerChoice {
    /// The size of the vocabulary, as far as it can be told before the corpus is read: an estimate for memory and size.
    pub fn assumed_vocab(&self) -> usize {
        match self {
            Self::Bpe { vocab_size } => *vocab_size,
            Self::Char => 65,
            Self::File { .. } | Self::Inherited => 50_257,
        }
    }
}

/// What a spec needs to know of its corpus.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CorpusFacts {
    /// Rows that an embedding needs.
    pub vocab_size: usize,
    /// The corpus's fingerprint.
    pub fingerprint: String,
    /// The labels of a classification; empty otherwise.
    pub labels: Vec<String>,
}

/// A spec as meant: complete but for the vocabulary and the corpus.
#[derive(Clone, Debug, PartialEq)]
pub struct SpecMeant {
    /// Pretraining or finetuning.
    pub kind: RunKind,
    /// The shape. Its `vocab_size` is 0 until [`SpecMeant::run_spec`], except where a checkpoint decides it.
    pub model: ModelConfig,
    /// The text.
    pub corpus: CorpusOptions,
    /// Other corpora that are trained on, too.
    pub mixture: Option<MixtureOptions>,
    /// The tokenizer.
    pub tokenizer: TokenizerChoice,
    /// The optimizer steps.
    pub train: TrainConfig,
    /// The checkpoints.
    pub checkpoint: CheckpointConfig,
    /// Adapters in place of the weights.
    pub lora: Option<LoraConfig>,
    /// What is written while it trains.
    pub samples: Option<SampleConfig>,
    /// Steps out of the ordinary.
    pub watchdog: WatchdogConfig,
    /// What was derived, inherited or overridden, one line each, to be shown before the run starts.
    pub notes: Vec<String>,
}

impl SpecMeant {
    /// The complete spec, once the corpus is prepared; of corpora that are mixed in, only the shares are known. A tokenizer with more tokens than the checkpoint that is
    /// finetuned has embeddings is an error; fewer are fine, as many published models pad.
    pub fn run_spec(
        self,
        corpus: CorpusFacts,
        start: Option<StartPoint>,
    ) -> Result<RunSpec, SpecError> {
        let vocab_size = corpus.vocab_size;
        within(
            "tokenizer.vocab_size",
            vocab_size as u64,
            1..=MAX_VOCAB,
            "take another tokenizer",
        )?;
        let mut model = self.model;
        if model.vocab_size == 0 {
            model.vocab_size = vocab_size;
        } else if vocab_size > model.vocab_size {
            return Err(SpecError::impossible(
                "tokenizer.vocab_size",
                vocab_size,
                format!("the checkpoint embeds {} tokens", model.vocab_size),
                "finetune with the tokenizer that the checkpoint was trained with",
            ));
        }
        model.labels = corpus.labels;
        check_memory(&model, &self.train)?;
        Ok(RunSpec {
            kind: self.kind,
            model,
            train: self.train,
            checkpoint: self.checkpoint,
            corpus: corpus.fingerprint,
            mixture: self.mixture.as_ref().map(MixtureOptions::assumed),
            start,
            lora: self.lora,
            samples: self.samples,
            watchdog: Some(self.watchdog),
        })
    }

    /// Tokens of one sample.
    pub fn sample_length(&self) -> usize {
        self.train.max_length.unwrap_or(self.model.context)
    }

    /// The shape with the vocabulary that is to be expected, for estimates.
    pub fn assumed_model(&self) -> ModelConfig {
        let mut model = self.model.clone();
        if model.vocab_size == 0 {
            model.vocab_size = self.tokenizer.assumed_vocab();
        }
        model
    }
}

impl SpecFile {
    /// The pretraining run that is meant. Says nothing about whether the corpus exists.
    pub fn validate(&self) -> Result<SpecMeant, SpecError> {
        let mut file = self.clone();
        let tokenizer = tokenizer_of(&file.tokenizer)?;
        let notes = depth::derive(&mut file, tokenizer.assumed_vocab())?;
        let model = shape_of(&file.model)?;
        file.meant(RunKind::Pretrain, model, tokenizer, notes)
    }

    /// Fills what is left to default once shape and tokenizer are known.
    pub(super) fn meant(
        &self,
        kind: RunKind,
        model: ModelConfig,
        tokenizer: TokenizerChoice,
        mut notes: Vec<String>,
    ) -> Result<SpecMeant, SpecError> {
        let train = train_of(&self.train, &mut notes)?;
        let corpus = corpus_of(&self.corpus)?;
        let meant = SpecMeant {
            kind,
            samples: SampleConfig::of(&self.samples, &corpus)?,
            mixture: mixture_of(&self.mixture)?,
            corpus,
            checkpoint: checkpoint_of(&self.checkpoint, &train)?,
            lora: lora_of(&self.lora, &model)?,
            watchdog: watchdog_of(&self.watchdog)?,
            model,
            tokenizer,
            train,
            notes,
        };
        check_memory(&meant.assumed_model(), &meant.train)?;
        let (layers, frozen) = (meant.model.num_hidden_layers, meant.train.freeze_layers);
        if let Some(frozen) = frozen.filter(|frozen| *frozen as usize > layers) {
            return Err(SpecError::impossible(
                "train.freeze_layers",
                frozen,
                format!("the model has {layers} blocks"),
                "freeze fewer; the head always learns, unless it is tied to the embedding",
            ));
        }
        let classifies = matches!(
            &meant.corpus.supervised,
            Some(supervised) if supervised.objective == Objective::Classify
        );
        if let Some(mixture) = meant.mixture.as_ref().filter(|_| classifies) {
            return Err(SpecError::impossible(
                "mixture.corpora",
                mixture.corpora.len(),
                "a classifier has one set of labels",
                "put all labelled texts into `corpus.paths`",
            ));
        }
        Ok(meant)
    }
}

fn tokenizer_of(table: &TokenizerTable) -> Result<TokenizerChoice, SpecError> {
    let default = if table.path.is_some() {
        TokenizerKind::File
    } else {
        TokenizerKind::Bpe
    };
    let kind = table.kind.unwrap_or(default);
    if let (Some(path), TokenizerKind::Bpe | TokenizerKind::Char) = (&table.path, kind) {
        return Err(SpecError::impossible(
            "tokenizer.path",
            format!("\"{path}\""),
            "the kind is not `file`",
            "remove `tokenizer.kind`, or the path",
        ));
    }
    if let (Some(size), TokenizerKind::Char | TokenizerKind::File) = (table.vocab_size, kind) {
        return Err(SpecError::impossible(
            "tokenizer.vocab_size",
            size,
            "only `bpe` takes one; the others have the size that they have",
            "remove it",
        ));
    }
    match kind {
        TokenizerKind::Char => Ok(TokenizerChoice::Char),
        TokenizerKind::Bpe => {
            let size = table.vocab_size.unwrap_or(4096);
            let next = "256 of them are the bytes; 4096 suits a small model";
            within(
                "tokenizer.vocab_size",
                size,
                MIN_BPE_VOCAB..=MAX_VOCAB,
                next,
            )?;
            Ok(TokenizerChoice::Bpe {
                vocab_size: size as usize,
            })
        }
        TokenizerKind::File => match &table.path {
            Some(path) => Ok(TokenizerChoice::File { path: path.clone() }),
            None => Err(SpecError::Missing {
                key: "tokenizer.path".into(),
                why: "the kind is `file`".into(),
                next: "name a tokenizer.json".into(),
            }),
        },
    }
}

fn corpus_of(table: &CorpusTable) -> Result<CorpusOptions, SpecError> {
    let validation = table.validation.unwrap_or(0.1);
    if !(validation > 0.0 && validation < 1.0) {
        return Err(SpecError::impossible(
            "corpus.validation",
            number(validation),
            "it must lie between 0 and 1, both excluded",
            "0.1 holds out a tenth",
        ));
    }
    Ok(CorpusOptions {
        paths: table.paths.clone().unwrap_or_default(),
        text_field: table.text_field.clone().unwrap_or_else(|| "text".into()),
        validation,
        split: table.split.unwrap_or(SplitKind::Auto),
        skip_bad: table.skip_bad.unwrap_or(false),
        supervised: supervised_of(table)?,
        selection: selection_of(table)?,
    })
}

fn checkpoint_of(
    table: &CheckpointTable,
    train: &TrainConfig,
) -> Result<CheckpointConfig, SpecError> {
    let keep = table.keep.unwrap_or(3);
    within(
        "checkpoint.keep",
        keep,
        1..=1_000_000,
        "the best one stays besides",
    )?;
    Ok(CheckpointConfig {
        every: table.every.unwrap_or(train.eval_every),
        keep: keep as u32,
    })
}

fn train_of(table: &TrainTable, notes: &mut Vec<String>) -> Result<TrainConfig, SpecError> {
    let steps = table.steps.unwrap_or(1000);
    let lanes = table.lanes.unwrap_or(8);
    let learning_rate = table.learning_rate.unwrap_or(1e-3);
    let schedule = table.schedule.unwrap_or(ScheduleKind::Cosine);
    let decay_steps = match schedule {
        ScheduleKind::Wsd => table.decay_steps.unwrap_or(steps / 5),
        _ => {
            if let Some(unused) = table.decay_steps {
                notes.push(format!(
                    "train.decay_steps = {unused} has no effect: only `wsd` uses it"
                ));
            }
            0
        }
    };
    within("train.steps", steps, 1..=MAX_STEPS, "1000 is the default")?;
    within(
        "train.lanes",
        lanes,
        1..=MAX_LANES,
        "8 is the default, and any number of workers shares them",
    )?;
    let diloco = diloco_of(table, notes)?;
    // A round is long.
    let least = if diloco.is_some() { 1 } else { 50 };
    let train = TrainConfig {
        steps,
        lanes: lanes as u32,
        micro_batch: small("train.micro_batch", table.micro_batch, 4)?,
        accumulate: small("train.accumulate", table.accumulate, 1)?,
        learning_rate,
        min_learning_rate: table.min_learning_rate.unwrap_or(learning_rate / 10.0),
        warmup_steps: table.warmup_steps.unwrap_or((steps / 20).min(2000)),
        schedule,
        decay_steps,
        beta1: table.beta1.unwrap_or(0.9),
        beta2: table.beta2.unwrap_or(0.95),
        eps: table.eps.unwrap_or(1e-8),
        weight_decay: table.weight_decay.unwrap_or(0.1),
        grad_clip: table.grad_clip.unwrap_or(1.0),
        precision: table.precision.unwrap_or_default(),
        payload: table.payload.unwrap_or_default(),
        diloco,
        gradient_checkpointing: table.gradient_checkpointing.unwrap_or_default(),
        seed: table.seed.unwrap_or(1337),
        eval_every: table.eval_every.unwrap_or((steps / 10).clamp(least, 1000)),
        eval_samples: table.eval_samples.unwrap_or(1024),
        freeze_layers: freeze_layers(table.freeze_layers)?,
        layer_decay: layer_decay(table.layer_decay)?,
        unfreeze_every: unfreeze_every(table.unfreeze_every)?,
        data_share: data_share(table.data_share)?,
        replay: replay(table.replay)?,
        early_stopping_patience: patience(table.early_stopping_patience)?,
        max_forgetting: forgetting(table.max_forgetting)?,
        max_length: max_length(table.max_length)?,
        min_workers: small("train.min_workers", table.min_workers, 1)?,
    };
    check_numbers(&train)?;
    check_steps(&train)?;
    Ok(train)
}
