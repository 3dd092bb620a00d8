//! When two runs are the same run, and how a run introduces itself.

use std::fmt::Write;

use serde::Serialize;

use super::bounds::number;
use super::memory::{human_bytes, human_count, memory_per_worker};
use super::{
    Diloco, LoraConfig, MixturePhase, ModelConfig, Payload, Precision, RunKind, RunSpec,
    ScheduleKind, StartPoint, TrainConfig, WatchdogConfig,
};

/// Everything that decides the weights after every step, in a fixed order.
#[derive(Serialize)]
struct Identity<'a> {
    kind: RunKind,
    model: &'a ModelConfig,
    steps: u64,
    lanes: u32,
    micro_batch: u32,
    accumulate: u32,
    learning_rate: f64,
    min_learning_rate: f64,
    warmup_steps: u64,
    schedule: ScheduleKind,
    decay_steps: u64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    grad_clip: f64,
    // Left out where it is what it always was, so that older runs are still found.
    #[serde(skip_serializing_if = "Precision::is_f32")]
    precision: Precision,
    #[serde(skip_serializing_if = "Payload::is_f32")]
    payload: Payload,
    #[serde(skip_serializing_if = "Option::is_none")]
    diloco: Option<Diloco>,
    seed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    freeze_layers: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer_decay: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unfreeze_every: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_share: Option<f64>,
    // The share, and of which corpus.
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<(f64, Option<&'a str>)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_length: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lora: Option<&'a LoraConfig>,
    // Where it skips updates: to be told of a step changes no weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    watchdog: Option<&'a WatchdogConfig>,
    corpus: &'a str,
    // What, and how much of it. Its names change no weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    mixture: Option<(Vec<&'a str>, &'a [MixturePhase])>,
    start: Option<&'a str>,
}

impl RunSpec {
    /// BLAKE3, in hex, of everything that decides the weights: the same command again finds its unfinished run by it.
    ///
    /// Left out, because no weight depends on them:
    ///
    /// - `checkpoint`: writing state does not change it;
    /// - `eval_every`, `eval_samples`, `samples`: validating and writing only read the weights;
    /// - `min_workers`: the result does not depend on the cluster;
    /// - `gradient_checkpointing`: what is computed again has the same bits;
    /// - a watchdog that only tells;
    /// - of `start`, the name that the user gave and the base corpus: the weights are known by their hash.
    ///
    /// `steps` is in: it is the horizon of the schedule, so another number means other rates from the warm-up on.
    pub fn identity(&self) -> String {
        let bytes = serde_json::to_vec(&self.identity_fields())
            .expect("plain numbers and strings serialise");
        blake3::hash(&bytes).to_hex().to_string()
    }

    // Every field is named, so that a new one does not compile before it is decided whether it belongs.
    fn identity_fields(&self) -> Identity<'_> {
        let Self {
            kind,
            model,
            train,
            checkpoint: _,
            corpus,
            mixture,
            start,
            lora,
            samples: _,
            watchdog,
        } = self;
        let TrainConfig {
            steps,
            lanes,
            micro_batch,
            accumulate,
            learning_rate,
            min_learning_rate,
            warmup_steps,
            schedule,
            decay_steps,
            beta1,
            beta2,
            eps,
            weight_decay,
            grad_clip,
            precision,
            payload,
            diloco,
            gradient_checkpointing: _,
            seed,
            eval_every: _,
            eval_samples: _,
            freeze_layers,
            layer_decay,
            unfreeze_every,
            data_share,
            replay,
            // They end a run early, but change no weight before.
            early_stopping_patience: _,
            max_forgetting: _,
            max_length,
            min_workers: _,
        } = *train;
        Identity {
            kind: *kind,
            model,
            steps,
            lanes,
            micro_batch,
            accumulate,
            learning_rate,
            min_learning_rate,
            warmup_steps,
            schedule,
            decay_steps,
            beta1,
            beta2,
            eps,
            weight_decay,
            grad_clip,
            precision,
            payload,
            diloco,
            seed,
            freeze_layers,
            layer_decay,
            unfreeze_every,
            data_share,
            replay: replay
                .map(|share| (share, start.as_ref().and_then(|s| s.base_corpus.as_deref()))),
            max_length,
            lora: lora.as_ref(),
            watchdog: watchdog.as_ref().filter(|w| w.action.skips()),
            corpus,
            mixture: mixture.as_ref().map(|mixture| {
                let corpora = mixture.corpora.iter();
                let fingerprints = corpora.map(|mixed| mixed.corpus.as_str());
                (fingerprints.collect(), &mixture.phases[..])
            }),
            start: start.as_ref().map(
                |StartPoint {
                     source: _,
                     weights,
                     base_corpus: _,
                 }| weights.as_str(),
            ),
        }
    }

    /// Number of parameters.
    pub fn parameters(&self) -> u64 {
        crate::layout::Layout::of(&self.model).len() as u64
    }

    /// Tokens that one optimizer step consumes.
    pub fn tokens_per_step(&self) -> u64 {
        self.train.samples_per_step() * self.sample_length() as u64
    }

    /// Number of parameters that are trained: all, or those of the adapters.
    pub fn trained_parameters(&self) -> u64 {
        self.layout().len() as u64
    }

    /// The run in a few lines, for a person; ends with a newline.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        self.describe_to(&mut text)
            .expect("writing to a string succeeds");
        text
    }

    fn describe_to(&self, out: &mut String) -> std::fmt::Result {
        let (m, t) = (&self.model, &self.train);
        let word = t.step_word();
        let kind = match self.kind {
            RunKind::Pretrain => "pretrain",
            RunKind::Finetune => "finetune",
            RunKind::Eval => "eval",
        };
        writeln!(
            out,
            "{kind} {}, {} parameters",
            m.architecture,
            human_count(self.parameters())
        )?;
        if let Some(start) = &self.start {
            writeln!(out, "  start       {}", start.source)?;
        }
        writeln!(
            out,
            "  model       {} layers, {} wide, {} heads{} ({} key/value), feed-forward {}, context {}, vocabulary {}",
            m.num_hidden_layers,
            m.hidden_size,
            m.num_attention_heads,
            m.head_dim.map_or(String::new(), |dim| format!(" of {dim}")),
            m.num_key_value_heads,
            m.intermediate_size,
            m.context,
            m.vocab_size
        )?;
        let attention = [
            m.attention_bias.then(|| "with biases".to_owned()),
            m.qk_norm.then(|| "queries and keys normalised".to_owned()),
            m.rope_scaling.map(|scaling| format!("rotary {scaling}")),
        ];
        let attention: Vec<String> = attention.into_iter().flatten().collect();
        if !attention.is_empty() {
            writeln!(out, "  attention   {}", attention.join("; "))?;
        }
        if m.classifies() {
            writeln!(out, "  labels      {}", m.labels.join(", "))?;
        }
        if let Some(lora) = &self.lora {
            let trained = human_count(self.trained_parameters());
            writeln!(
                out,
                "  lora        {lora}: {trained} parameters are trained"
            )?;
        }
        let layers = [
            t.freeze_layers
                .map(|n| format!("the embeddings and {n} blocks frozen")),
            t.layer_decay
                .map(|d| format!("each learns at {} of the rate above it", number(d))),
            t.unfreeze_every
                .map(|n| format!("one more learns every {n} {word}s, top down")),
        ];
        let layers: Vec<String> = layers.into_iter().flatten().collect();
        if !layers.is_empty() {
            writeln!(out, "  layers      {}", layers.join("; "))?;
        }
        if let Some(share) = t.data_share {
            writeln!(
                out,
                "  data        the first {} of the training samples",
                number(share)
            )?;
        }
        if let Some(mixture) = &self.mixture {
            writeln!(out, "  mixture     {mixture}")?;
        }
        if let Some(share) = t.replay {
            writeln!(
                out,
                "  replay      {} of the samples are the base's",
                number(share)
            )?;
        }
        if let Some(most) = t.max_forgetting {
            writeln!(
                out,
                "  forgetting  ends the run where the base's loss has risen by {}",
                number(most)
            )?;
        }
        if let Some(patience) = t.early_stopping_patience {
            writeln!(
                out,
                "  patience    ends after {patience} validations without a new best"
            )?;
        }
        if let Some(watchdog) = &self.watchdog
            && *watchdog != WatchdogConfig::default()
        {
            writeln!(out, "  watchdog    {watchdog}")?;
        }
        if let Some(length) = t.max_length {
            writeln!(out, "  samples     of {length} tokens")?;
        }
        writeln!(
            out,
            "  step        {} lanes x {} micro-batches x {} samples = {} tokens",
            t.lanes,
            t.accumulate,
            t.micro_batch,
            self.tokens_per_step() / u64::from(t.inner_steps())
        )?;
        if let Some(diloco) = t.diloco {
            writeln!(
                out,
                "  sync        DiLoCo: rounds of {} such steps in each lane by itself, of {} tokens; rate {}, momentum {}",
                diloco.inner_steps,
                self.tokens_per_step(),
                number(diloco.outer_learning_rate),
                number(diloco.outer_momentum)
            )?;
        }
        let tokens = self.tokens_per_step().saturating_mul(t.steps);
        writeln!(
            out,
            "  length      {} {word}s, {} tokens, seed {}",
            t.steps,
            human_count(tokens),
            t.seed
        )?;
        writeln!(out, "  rate        {}", self.describe_rate())?;
        let clip = if t.grad_clip > 0.0 {
            format!("clip {}", number(t.grad_clip))
        } else {
            "no clipping".into()
        };
        writeln!(
            out,
            "  optimizer   AdamW, betas {} and {}, eps {}, weight decay {}, {clip}",
            number(t.beta1),
            number(t.beta2),
            number(t.eps),
            number(t.weight_decay)
        )?;
        if t.precision == Precision::Bf16 {
            writeln!(
                out,
                "  precision   bf16 products, f32 sums, weights and moments"
            )?;
        }
        let rounded = match t.payload {
            Payload::F32 => None,
            Payload::Bf16 => Some("bf16"),
            Payload::Int8 => Some("8 bits in blocks, by seeded chance,"),
            Payload::Int4 => Some("4 bits in blocks, by seeded chance,"),
        };
        if let Some(rounded) = rounded {
            writeln!(
                out,
                "  gradients   rounded to {rounded} wherever they are added"
            )?;
        }
        let share = match t.eval_samples {
            0 => "the whole split".to_string(),
            n => format!("at most {n} samples"),
        };
        writeln!(
            out,
            "  validation  {}, {share}",
            every(t.eval_every, word, "at the start and the end")
        )?;
        if let Some(samples) = &self.samples {
            writeln!(out, "  samples     {samples}")?;
        }
        let kept = format!("the last {} and the best stay", self.checkpoint.keep);
        writeln!(
            out,
            "  checkpoints {}, {kept}",
            every(self.checkpoint.every, word, "at the end")
        )?;
        let memory = memory_per_worker(m, t);
        writeln!(
            out,
            "  memory      about {} per worker ({} state, {} activations)",
            human_bytes(memory.total_bytes()),
            human_bytes(memory.state_bytes),
            human_bytes(memory.activation_bytes)
        )?;
        writeln!(out, "  corpus      {}", self.corpus)
    }

    fn describe_rate(&self) -> String {
        let t = &self.train;
        let word = t.step_word();
        let (peak, floor) = (number(t.learning_rate), number(t.min_learning_rate));
        let shape = match t.schedule {
            ScheduleKind::Constant => format!("{peak} throughout"),
            ScheduleKind::Cosine => format!("{peak} to {floor} along a cosine"),
            ScheduleKind::Linear => format!("{peak} to {floor} along a line"),
            ScheduleKind::Wsd => {
                format!(
                    "{peak}, and to {floor} in the last {} {word}s",
                    t.decay_steps
                )
            }
        };
        format!("{shape}, {} {word}s of warm-up", t.warmup_steps)
    }
}

fn every(steps: u64, word: &str, otherwise: &str) -> String {
    match steps {
        0 => otherwise.into(),
        1 => format!("every {word}"),
        n => format!("every {n} {word}s"),
    }
}
