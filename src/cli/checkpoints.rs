//! The verbs that use a trained model.

use std::path::PathBuf;

use clap::Args;

use super::common::{ConnectArgs, JsonArgs, threads};

/// How new text is drawn.
#[derive(Args, Clone, Debug)]
pub struct SamplingArgs {
    /// At most this many new tokens
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub max_tokens: usize,
    /// Above 1 wilder, below 1 tamer; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub temperature: f32,
    /// Draw among this many of the likeliest tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Draw among the fewest likeliest tokens that have this probability together
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Seed of the draws
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Arguments of `generate`.
#[derive(Args, Debug)]
#[command(after_help = "\
Prints the prompt and its continuation on stdout, and nothing else there. Without --prompt the prompt is read from
stdin if that is no terminal; an empty prompt begins a new document. The same seed gives the same text.

Examples:
  cohort generate --from books-1@best --prompt 'Once upon a time'
  cohort generate --from ./model-dir --adapter finetune-1@best --prompt 'Once upon a time'
  cohort generate --from ./model-dir --temperature 0 --max-tokens 50 < prompt.txt")]
pub struct GenerateArgs {
    /// The checkpoint: RUN, RUN@STEP, RUN@best, RUN@last, a directory in Hugging Face layout, or hf://OWNER/NAME
    #[arg(long, value_name = "CHECKPOINT")]
    pub from: String,
    /// Adapters to put on it: those of a run, or a directory in PEFT's layout
    #[arg(long, value_name = "RUN|DIR")]
    pub adapter: Option<String>,
    /// What to continue
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// How it is drawn.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// What computes: `auto`, `cpu` or `cuda:N`
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Compute threads [default: one per core]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub threads: Option<usize>,
    /// Where runs are looked up.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `chat`.
#[derive(Args, Debug)]
#[command(after_help = "\
Each line on stdin is a turn; its answer goes to stdout, and everything else to stderr. `/reset` begins a new
conversation, `/exit` or the end of the input ends this one.

The conversation is written with the chat template of the checkpoint, or, if it has none, with Cohort's own, which says
so. When it no longer fits into the model's context, its oldest turns are forgotten; the --system one stays. The same
seed and the same lines give the same answers.

Examples:
  cohort chat --from finetune-1@best
  cohort chat --from ./model-dir --system 'Answer in one sentence.' --temperature 0
  cohort chat --from ./model-dir < questions.txt > answers.txt")]
pub struct ChatArgs {
    /// The checkpoint: RUN, RUN@STEP, RUN@best, RUN@last, a directory in Hugging Face layout, or hf://OWNER/NAME
    #[arg(long, value_name = "CHECKPOINT")]
    pub from: String,
    /// Adapters to put on it: those of a run, or a directory in PEFT's layout
    #[arg(long, value_name = "RUN|DIR")]
    pub adapter: Option<String>,
    /// What the model is told before the first turn
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// How answers are drawn.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// What computes: `auto`, `cpu` or `cuda:N`
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Compute threads [default: one per core]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub threads: Option<usize>,
    /// Where runs are looked up.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `eval`.
#[derive(Args, Debug)]
#[command(after_help = "\
Each token but a document's first is scored once, in windows of the model's context, as in validation. Bits per byte
can be compared between models of different tokenizers. The model is computed in this process, or, with --local, by
several; the text is then scored in two halves, each beginning without what came before.

Examples:
  cohort eval --from books-1@best --text chapter.txt
  cohort eval --from books-1@best --text chapters/ --local 4
  cohort eval --from ./model-dir --text 'tests/*.jsonl' --json
  cohort eval --from gsm@best --sft gsm8k_test.jsonl
  cohort eval --from spam@best --classify test.jsonl")]
pub struct EvalArgs {
    /// The checkpoint: RUN, RUN@STEP, RUN@best, RUN@last, a directory in Hugging Face layout, or hf://OWNER/NAME
    #[arg(long, value_name = "CHECKPOINT")]
    pub from: String,
    /// Adapters to put on it: those of a run, or a directory in PEFT's layout
    #[arg(long, value_name = "RUN|DIR", conflicts_with = "local")]
    pub adapter: Option<String>,
    /// Files, directories and patterns to score
    #[arg(long, value_name = "PATH", required_unless_present_any = ["sft", "classify"], num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// Prompts with responses, or conversations, to score: what is learned in training counts
    #[arg(long, value_name = "JSONL", num_args = 1.., conflicts_with_all = ["text", "local"])]
    pub sft: Vec<PathBuf>,
    /// Labelled texts to score a classifier on: loss, accuracy, macro-F1, confusion table
    #[arg(long, value_name = "JSONL", num_args = 1.., conflicts_with_all = ["text", "sft", "local"])]
    pub classify: Vec<PathBuf>,
    /// The field of a JSON object, or the column of a table, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub text_field: String,
    /// Leave out text that cannot be read, and count it, instead of stopping
    #[arg(long)]
    pub skip_bad: bool,
    /// What computes: `auto`, `cpu` or `cuda:N`
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Compute threads [default: one per core]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub threads: Option<usize>,
    /// Start a private coordinator and N worker processes that score the text together
    #[arg(
        long,
        value_name = "N",
        conflicts_with_all = ["coordinator", "device"],
        value_parser = clap::value_parser!(u32).range(1..=1024),
        help_heading = "Place"
    )]
    pub local: Option<u32>,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Where runs are looked up.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `export`.
#[derive(Args, Debug)]
#[command(after_help = "\
The directory must not exist or be empty. `transformers` loads it as it is.

Examples:
  cohort export books-1@best ./books-hf
  cohort export books-1@2000 ./books-hf --coordinator http://HOST:7070 --token-file token")]
pub struct ExportArgs {
    /// The checkpoint: RUN, RUN@STEP, RUN@best, RUN@last, a directory, or hf://OWNER/NAME
    #[arg(value_name = "CHECKPOINT")]
    pub from: String,
    /// Where to
    #[arg(value_name = "DIR")]
    pub target: PathBuf,
    /// Where runs are looked up.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `merge`.
#[derive(Args, Debug)]
#[command(after_help = "\
Each weight W with an adapter becomes W + scale * B A. Before anything is written, the logits of the merged model are
compared with those of base and adapters; the largest difference is printed. What is written loads in `transformers` as
it is, and `--from` takes it like any other model. The weights are f32, whatever the base's are on disk.

Examples:
  cohort merge finetune-1@best -o ./merged
  cohort merge ./model-dir --adapter ./adapter-dir -o ./merged")]
pub struct MergeArgs {
    /// A run that trained adapters (RUN, RUN@STEP, RUN@best, RUN@last), or a directory; with --adapter the base
    #[arg(value_name = "CHECKPOINT")]
    pub from: String,
    /// Where to; the directory must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// The adapters: those of a run, or a directory in PEFT's layout
    #[arg(long, value_name = "RUN|DIR")]
    pub adapter: Option<String>,
    /// Compute threads [default: one per core]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub threads: Option<usize>,
    /// Where runs are looked up.
    #[command(flatten)]
    pub connect: ConnectArgs,
}
