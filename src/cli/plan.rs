//! The verb that looks ahead.

use std::path::PathBuf;

use clap::Args;

use super::common::{ConnectArgs, JsonArgs, threads};
use super::train::SpecArgs;

/// Arguments of `plan`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort plan --preset small --corpus books/
  cohort plan spec.toml --corpus books/ --threads 4 --bandwidth 10
  cohort plan spec.toml --no-measure --json
  cohort plan --from books-1@best --corpus tales/ --set lora.rank=8
  cohort plan --against small-1

Nothing is trained and no coordinator is needed. Speed is measured here for a few seconds, and workers are taken to be as
fast. The plan is kept in the home directory, so that `--against RUN` can compare it with what the run has taken.")]
pub struct PlanArgs {
    /// The spec, in TOML
    #[arg(value_name = "SPEC.toml", conflicts_with = "preset")]
    pub spec: Option<PathBuf>,
    /// A spec that comes with Cohort
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// The checkpoint that a finetuning run would start from
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "preset")]
    pub from: Option<String>,
    /// Compare what was planned with what this run has taken so far
    #[arg(long, value_name = "RUN", conflicts_with_all = ["spec", "preset", "from", "corpus", "sft", "classify", "set", "skip_bad", "no_measure", "device", "threads", "bandwidth"])]
    pub against: Option<String>,
    /// Do not measure how fast this machine is: no times
    #[arg(long, conflicts_with_all = ["device", "threads"])]
    pub no_measure: bool,
    /// What computes: `auto`, `cpu` or `cuda:N` [default: auto]
    #[arg(long)]
    pub device: Option<String>,
    /// Compute threads of a worker [default: one per core]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub threads: Option<usize>,
    /// What the coordinator's link carries in each direction, in gigabits per second [default: 1]
    #[arg(long, value_name = "GBIT", value_parser = bandwidth)]
    pub bandwidth: Option<f64>,
    /// The spec.
    #[command(flatten)]
    pub text: SpecArgs,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Where plans, checkpoints and runs are.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Gigabits per second.
fn bandwidth(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(gigabits) if (1e-6..=1e6).contains(&gigabits) => Ok(gigabits),
        _ => Err("expected gigabits per second, from 0.000001 to 1000000".into()),
    }
}
