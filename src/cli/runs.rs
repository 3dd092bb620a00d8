//! The verbs that look at runs, corpora and presets, or remove them.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::common::{ConnectArgs, JsonArgs};
use super::corpus::{CorpusHeadArgs, CorpusStatsArgs, SelectionArgs};

/// Arguments of `runs`.
#[derive(Args, Debug)]
#[command(
    after_help = "Without a running coordinator the runs of the home directory are listed.

Examples:
  cohort runs
  cohort runs --json | jq .name"
)]
pub struct RunsArgs {
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `status` and `cancel`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  cohort status tiny-1
  cohort cancel tiny-1")]
pub struct RunArgs {
    /// The run
    pub run: String,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `follow`.
#[derive(Args, Debug)]
#[command(after_help = "Ctrl-C leaves the run training.

Examples:
  cohort follow tiny-1
  cohort follow tiny-1 --json > events.jsonl      all its events, from the first")]
pub struct FollowArgs {
    /// The run
    pub run: String,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `watch`.
#[derive(Args, Debug)]
#[command(
    after_help = "Without a name it shows the run that trains, or else the newest. Leaving it never stops a run. Where stdout is no terminal it prints lines, like `cohort follow`. NO_COLOR=1 takes the colours away.
Where no coordinator runs, it shows what the home directory has of the run.

Keys: q leaves, ? shows all keys.

Examples:
  cohort watch
  cohort watch tiny-1 --coordinator http://HOST:7070 --token-file token"
)]
pub struct WatchArgs {
    /// The run
    pub run: Option<String>,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `rm`.
#[derive(Args, Debug)]
#[command(after_help = "Says what would be deleted, and asks.

Examples:
  cohort rm tiny-1
  cohort rm tiny-1 --yes")]
pub struct RemoveArgs {
    /// The run
    pub run: String,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `presets`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  cohort presets
  cohort presets small > spec.toml      save one, to change it")]
pub struct PresetsArgs {
    /// Print this one as TOML
    pub name: Option<String>,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
}

/// Arguments of `corpus`.
#[derive(Args, Debug)]
pub struct CorpusArgs {
    /// What to do with corpora.
    #[command(subcommand)]
    pub verb: CorpusVerb,
}

/// The verbs of corpora.
#[derive(Debug, Subcommand)]
pub enum CorpusVerb {
    /// Turn text into a corpus: tokens in shards, split into training and validation
    Prepare(CorpusPrepareArgs),
    /// List the corpora
    Ls(CorpusListArgs),
    /// Show a corpus: documents, tokens, shards, fingerprint, a decoded sample
    Show(CorpusShowArgs),
    /// Show the first documents of a corpus, decoded
    Head(CorpusHeadArgs),
    /// Count what is in a corpus: lengths of documents, frequent tokens, shares of sources, what was left out
    Stats(CorpusStatsArgs),
    /// Delete a corpus that no unfinished run needs
    Rm(CorpusRemoveArgs),
}

/// Arguments of `corpus prepare`.
#[derive(Args, Debug)]
#[command(
    after_help = "Text, and rows of .jsonl, .json, .csv, .tsv, .parquet, .arrow or .wet; also packed as .gz, .zst, .bz2 or .xz.
`pretrain --corpus` prepares what it needs; a corpus of the same text and options is used again.

Examples:
  cohort corpus prepare books/ --name books
  cohort corpus prepare data.jsonl.zst --text-field content --vocab-size 8192
  cohort corpus prepare web/ --dedup near --min-chars 200 --language en,de
  cohort corpus prepare 'data/*.parquet' @more.txt     tables; files that a manifest names
  cohort corpus prepare 'coordinator:/data/*.txt' --spec spec.toml
  cohort corpus prepare 's3://BUCKET/books/*.jsonl.zst' hf://datasets/OWNER/NAME"
)]
pub struct CorpusPrepareArgs {
    /// Files, directories, patterns, `@MANIFEST`, URLs (s3, gs, az, https, hf); `coordinator:PATH` lies on the coordinator's
    /// machine
    #[arg(required = true)]
    pub paths: Vec<String>,
    /// Name for people [default: that of the first path]
    #[arg(long)]
    pub name: Option<String>,
    /// Take the options from the `corpus` and `tokenizer` tables of this spec
    #[arg(long, value_name = "SPEC.toml")]
    pub spec: Option<PathBuf>,
    /// Train BPE with this many tokens [default: 4096]
    #[arg(long, value_name = "N")]
    pub vocab_size: Option<u64>,
    /// Use this tokenizer.json
    #[arg(long, value_name = "FILE", conflicts_with = "vocab_size")]
    pub tokenizer: Option<String>,
    /// One token for each character
    #[arg(long = "char", conflicts_with_all = ["vocab_size", "tokenizer"])]
    pub characters: bool,
    /// The field of a JSON object, or the column of a table, that holds the text [default: text]
    #[arg(long, value_name = "NAME")]
    pub text_field: Option<String>,
    /// Share of the text that is held out [default: 0.1]
    #[arg(long, value_name = "SHARE")]
    pub validation: Option<f64>,
    /// Leave out text that cannot be read, and count it, instead of stopping
    #[arg(long)]
    pub skip_bad: bool,
    /// Which documents stay.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `corpus ls`.
#[derive(Args, Debug)]
pub struct CorpusListArgs {
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `corpus show`.
#[derive(Args, Debug)]
pub struct CorpusShowArgs {
    /// Its fingerprint, the beginning of it, or its name
    pub corpus: String,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `corpus rm`.
#[derive(Args, Debug)]
pub struct CorpusRemoveArgs {
    /// Its fingerprint, the beginning of it, or its name
    pub corpus: String,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `pause`.
#[derive(Args, Debug)]
#[command(
    after_help = "The run is checkpointed at the next step boundary. It stays paused, even when the coordinator is started again, until `cohort resume` takes it up. One that waits in the queue is paused at once.

Examples:
  cohort pause tiny-1
  cohort resume tiny-1"
)]
pub struct PauseArgs {
    /// The run
    pub run: String,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `checkpoint`.
#[derive(Args, Debug)]
#[command(
    after_help = "The run goes on. The checkpoint is of the next step boundary where the workers can vouch for their state, and changes no
weight and no entry of the ledger. A state that is on disk already is not written again.

Examples:
  cohort checkpoint tiny-1
  cohort generate --from tiny-1@last --prompt 'Once upon a time'"
)]
pub struct CheckpointArgs {
    /// The run
    pub run: String,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `resume`.
#[derive(Args, Debug)]
#[command(
    after_help = "Takes up a run that is paused, interrupted, failed or cancelled, on a coordinator that runs, and leaves.
Behind other runs it waits in the queue. Without a standing coordinator, or to give a run more steps, use `--resume` of the verb that made it.

Examples:
  cohort resume tiny-1
  cohort follow tiny-1
  cohort pretrain --resume tiny-1 --local 2"
)]
pub struct ResumeArgs {
    /// The run
    pub run: String,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}
