//! The verbs that look whether a run is what it says.

use clap::Args;

use super::common::{ConnectArgs, JsonArgs, threads};

/// Arguments of `ledger`.
#[derive(Args, Debug)]
#[command(after_help = "\
One JSON line for each committed step, hashes in hex. Two runs of equal specs and equal corpora print the same bytes,
whatever cluster computed them. Without a running coordinator the home directory is read.

Examples:
  cohort ledger books-1 > books-1.jsonl
  cohort ledger books-1 | jq -r '[.step, .loss_sum / .weight] | @tsv'")]
pub struct LedgerArgs {
    /// The run
    pub run: String,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `verify`.
#[derive(Args, Debug)]
#[command(after_help = "\
Reads the run's ledger and all its checkpoints in full: every step once and chained to the one before, every lane in
its sums, every sample once in an epoch, every file and state as its hashes say. --replay also computes: all steps from
the newest checkpoint before STEP up to STEP, and compares lanes, sums, norm and gradient with the ledger, to the bit.
A contradiction is printed on stderr, and the exit code is 1. Nothing is changed.

Examples:
  cohort verify books-1
  cohort verify books-1 --replay 1250
  cohort verify books-1 --json | jq .entries")]
pub struct VerifyArgs {
    /// The run
    pub run: String,
    /// Compute the steps up to this one again
    #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u64).range(1..))]
    pub replay: Option<u64>,
    /// What computes a replay: `auto`, `cpu` or `cuda:N`
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Compute threads of a replay [default: one per core]
    #[arg(long, value_name = "T", value_parser = threads, requires = "replay")]
    pub threads: Option<usize>,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}
