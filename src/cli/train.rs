//! The verbs that train.

use std::path::PathBuf;

use clap::Args;

use super::common::{ConnectArgs, JsonArgs, LocalArgs, NotifyArgs};

/// Where a spec comes from.
#[derive(Args, Clone, Debug, Default)]
pub struct SpecArgs {
    /// Text to train on: files, directories, patterns, URLs (s3, gs, az, https, hf); `coordinator:PATH` lies on the
    /// coordinator's machine
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub corpus: Vec<String>,
    /// Prompts with responses, or conversations, to train on: files of JSON lines, tables
    #[arg(long, value_name = "JSONL", num_args = 1.., conflicts_with = "corpus")]
    pub sft: Vec<String>,
    /// Labelled texts to classify: files of JSON lines, tables
    #[arg(long, value_name = "JSONL", num_args = 1.., conflicts_with_all = ["corpus", "sft"])]
    pub classify: Vec<String>,
    /// Mix in other text, so many times as often as the run's own: `--mix tales/=0.5`; may be repeated
    #[arg(long, value_name = "PATH=WEIGHT", conflicts_with = "classify")]
    pub mix: Vec<String>,
    /// Change a value of the spec, such as `train.steps=500`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Leave out text that cannot be read, and count it, instead of stopping
    #[arg(long)]
    pub skip_bad: bool,
}

/// How a run is submitted and watched.
#[derive(Args, Clone, Debug, Default)]
pub struct SubmitArgs {
    /// Name of the run [default: one is made up]
    #[arg(long)]
    pub name: Option<String>,
    /// Start another run even where an unfinished one of the same spec and corpus could be resumed
    #[arg(long)]
    pub new: bool,
    /// Submit, print the run's name, and leave; `cohort follow RUN` comes back
    #[arg(long, conflicts_with = "local")]
    pub detach: bool,
    /// Let the model write a little after this text at every validation, to see it learn; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub sample_prompt: Vec<String>,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// A cluster for this command.
    #[command(flatten)]
    pub local: LocalArgs,
    /// Whom it tells.
    #[command(flatten)]
    pub notify: NotifyArgs,
    /// Or one that stands.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `pretrain`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort pretrain --preset tiny --corpus books/ --local 2
  cohort pretrain spec.toml --corpus 'books/*.txt.gz' --set train.steps=5000 --detach
  cohort pretrain --resume tiny-1 --set train.steps=1000 --local 4

The same command again goes on with its unfinished run. `cohort presets` lists the presets; `cohort presets NAME`
prints one, to be saved and changed. Ctrl-C leaves a run on a standing coordinator training; with --local it
checkpoints the run and ends, and a second Ctrl-C ends at once.")]
pub struct PretrainArgs {
    /// The spec, in TOML
    #[arg(value_name = "SPEC.toml", conflicts_with = "preset")]
    pub spec: Option<PathBuf>,
    /// A spec that comes with Cohort
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Go on with this run; `--set train.steps=N` may give it more steps
    #[arg(long, value_name = "RUN", conflicts_with_all = ["spec", "preset", "corpus", "sft", "classify", "new", "name", "skip_bad"])]
    pub resume: Option<String>,
    /// The spec.
    #[command(flatten)]
    pub text: SpecArgs,
    /// The submission.
    #[command(flatten)]
    pub submit: SubmitArgs,
}

/// Arguments of `finetune`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort finetune --from books-1@best --corpus tales/ --local 2
  cohort finetune spec.toml --from ./llama-hf --corpus tales/ --set train.learning_rate=1e-5
  cohort finetune --from books-1@best --sft gsm8k.jsonl --lora 16 --local 2
  cohort finetune --from books-1@best --classify spam.jsonl --local 2
  cohort finetune --from hf://HuggingFaceTB/SmolLM2-135M --corpus tales/ --local 2
  cohort finetune --resume finetune-1 --local 2

Model, tokenizer and context come from the checkpoint; each value that is inherited or overridden is printed.")]
pub struct FinetuneArgs {
    /// The spec, in TOML; every key may be absent
    #[arg(value_name = "SPEC.toml")]
    pub spec: Option<PathBuf>,
    /// The checkpoint: RUN, RUN@STEP, RUN@best, RUN@last, a directory in Hugging Face layout, or hf://OWNER/NAME
    #[arg(long, value_name = "CHECKPOINT", required_unless_present = "resume")]
    pub from: Option<String>,
    /// Train adapters of this rank in place of the weights; `--set lora.alpha=…` and the like say more
    #[arg(long, value_name = "RANK")]
    pub lora: Option<u64>,
    /// Take this share of the samples from the text that the checkpoint was trained on, against forgetting it
    #[arg(long, value_name = "SHARE")]
    pub replay: Option<f64>,
    /// End the run where the loss on the checkpoint's own validation text has risen by more than this
    #[arg(long, value_name = "NATS")]
    pub max_forgetting: Option<f64>,
    /// Train the same model on the same data from random weights as well, and report what the checkpoint was worth
    #[arg(long, conflicts_with = "detach")]
    pub against_scratch: bool,
    /// Compare with the same from scratch on these shares of the training data, such as `1,0.3,0.1`
    #[arg(long, value_name = "SHARE", value_delimiter = ',', conflicts_with = "detach", value_parser = share)]
    pub shares: Vec<f64>,
    /// What the checkpoint and the result write a little after, for the report; may be repeated [default: the first words
    /// of the text]
    #[arg(long, value_name = "TEXT", conflicts_with = "detach")]
    pub prompt: Vec<String>,
    /// Where the report goes [default: `reports/RUN` in the home directory]
    #[arg(long, value_name = "DIR", conflicts_with = "detach")]
    pub report: Option<PathBuf>,
    /// Go on with this run; `--set train.steps=N` may give it more steps
    #[arg(long, value_name = "RUN", conflicts_with_all = ["spec", "from", "corpus", "sft", "classify", "lora", "replay", "max_forgetting", "against_scratch", "shares", "prompt", "report", "new", "name", "skip_bad"])]
    pub resume: Option<String>,
    /// The spec.
    #[command(flatten)]
    pub text: SpecArgs,
    /// The submission.
    #[command(flatten)]
    pub submit: SubmitArgs,
}

/// Arguments of `preview`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort preview --from books-1@best --sft gsm8k.jsonl
  cohort preview spec.toml --samples 10
  cohort preview --from ./llama-hf --sft chat.jsonl --set corpus.too_long=drop --json

Nothing is trained and nothing is kept. What is learned is green, or stands in [[brackets]] where there are no colours.")]
pub struct PreviewArgs {
    /// The spec, in TOML; every key may be absent
    #[arg(value_name = "SPEC.toml")]
    pub spec: Option<PathBuf>,
    /// The checkpoint whose tokenizer, template and context are meant [default: those of the spec]
    #[arg(long, value_name = "CHECKPOINT")]
    pub from: Option<String>,
    /// Sequences to show; short samples share one
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub samples: u64,
    /// Whether to use colours [default: where stdout is a terminal and NO_COLOR is not set]
    #[arg(long, value_name = "true|false")]
    pub color: Option<bool>,
    /// The spec.
    #[command(flatten)]
    pub text: SpecArgs,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Where checkpoints of runs are.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// A share of the training data.
fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("a share is above 0, and at most 1".into()),
    }
}

/// Arguments of `quickstart`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort quickstart
  cohort quickstart --minutes 10 --workers 4
  cohort quickstart --corpus books/ --finetune-corpus tales/

Without --corpus the text is the Rust source code of the crates that cargo has fetched to build Cohort, and for
finetuning their Markdown files. Nothing is downloaded.")]
pub struct QuickstartArgs {
    /// Text to pretrain on [default: the Rust sources of Cohort's dependencies]
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub corpus: Vec<String>,
    /// Text to finetune on [default: the Markdown files of Cohort's dependencies]
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub finetune_corpus: Vec<String>,
    /// Worker processes [default: 2]
    #[arg(
        long,
        visible_alias = "local",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1024),
        conflicts_with = "coordinator"
    )]
    pub workers: Option<u32>,
    /// Compute threads of each local worker [default: its share of the cores]
    #[arg(long, value_name = "T", conflicts_with = "coordinator", value_parser = super::common::threads)]
    pub threads: Option<usize>,
    /// Minutes of pretraining; become a number of steps, which is printed
    #[arg(long, default_value_t = 2.0)]
    pub minutes: f64,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// A cluster that stands.
    #[command(flatten)]
    pub connect: ConnectArgs,
}
