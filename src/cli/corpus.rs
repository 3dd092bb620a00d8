//! What can be typed of the contents of corpora: which documents stay, and what is looked at.

use clap::{Args, ValueEnum};

use super::common::{ConnectArgs, JsonArgs};

/// Which documents of a corpus stay.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Which documents stay")]
pub struct SelectionArgs {
    /// Leave out duplicates of earlier documents: those of the same text but for white space, or those of nearly the same words, too
    #[arg(long, value_enum, value_name = "KIND")]
    pub dedup: Option<DedupKind>,
    /// The similarity from which on documents are near duplicates, from 0.5 to 1 [default: 0.8]
    #[arg(long, value_name = "SHARE")]
    pub dedup_threshold: Option<f64>,
    /// Leave out documents of fewer characters
    #[arg(long, value_name = "N")]
    pub min_chars: Option<u64>,
    /// Leave out documents of more characters
    #[arg(long, value_name = "N")]
    pub max_chars: Option<u64>,
    /// Leave out documents of other languages than these, such as `en,de`
    #[arg(long = "language", value_name = "CODE", value_delimiter = ',')]
    pub languages: Vec<String>,
}

/// Which duplicates are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DedupKind {
    /// The same text, but for white space
    Exact,
    /// Also nearly the same words
    Near,
}

/// Arguments of `corpus head`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort corpus head books
  cohort corpus head books -n 20 --split validation --chars 200")]
pub struct CorpusHeadArgs {
    /// Its fingerprint, the beginning of it, or its name
    pub corpus: String,
    /// How many documents
    #[arg(long = "lines", short = 'n', value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub documents: u64,
    /// Which side
    #[arg(long, value_enum, default_value_t = Side::Train)]
    pub split: Side,
    /// Characters of each document that are shown
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub chars: u64,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// A side of the split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// What is trained on
    Train,
    /// What is held out
    Validation,
}

/// Arguments of `corpus stats`.
#[derive(Args, Debug)]
#[command(after_help = "\
Reads every shard.

Examples:
  cohort corpus stats books
  cohort corpus stats books --json | jq .train.lengths.median")]
pub struct CorpusStatsArgs {
    /// Its fingerprint, the beginning of it, or its name
    pub corpus: String,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}
