//! The verbs that write the figures of runs: for people, for files, for other programs.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::common::{ConnectArgs, JsonArgs};

/// Arguments of `compare`.
#[derive(Args, Debug)]
#[command(after_help = "\
Losses at marks are means over the steps since the mark before. Where a step has as many tokens in every run, marks are steps, else tokens.

Examples:
  cohort compare books-1 books-2
  cohort compare books-1 books-2 books-3 --json
  cohort compare books-1 books-2 -o compare.svg")]
pub struct CompareArgs {
    /// The runs
    #[arg(value_name = "RUN", required = true, num_args = 2..)]
    pub runs: Vec<String>,
    /// Show what is the same in all specs, too
    #[arg(long)]
    pub all: bool,
    /// Also draw the losses into this file: .svg or .png
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `plot`.
#[derive(Args, Debug)]
#[command(after_help = "\
Where more steps are shown than fit, a point is their mean, and a band goes from the lowest to the highest.

Examples:
  cohort plot books-1 -o loss.svg
  cohort plot books-1 books-2 -o loss.png --x tokens --log
  cohort plot books-1 --metric loss --metric grad-norm -o run.svg --from 100 --smooth 0.9")]
pub struct PlotArgs {
    /// The runs
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<String>,
    /// The file: .svg or .png
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// What is drawn; more than one become panels below each other
    #[arg(long, value_enum, default_values_t = [Metric::Loss])]
    pub metric: Vec<Metric>,
    /// What it is drawn over
    #[arg(long = "x", value_enum, value_name = "AXIS", default_value_t = Axis::Step)]
    pub axis: Axis,
    /// Make the vertical axis logarithmic
    #[arg(long)]
    pub log: bool,
    /// The first step that is drawn
    #[arg(long, value_name = "STEP")]
    pub from: Option<u64>,
    /// The last step that is drawn
    #[arg(long, value_name = "STEP")]
    pub to: Option<u64>,
    /// Weight of the past in a moving average, from 0 up to 1
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0, value_parser = weight)]
    pub smooth: f64,
    /// Draw what counting alone would lose: uniform, unigram, n-gram
    #[arg(long)]
    pub baselines: bool,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `metrics`.
#[derive(Args, Debug)]
#[command(after_help = "\
Without a format the newest steps are shown, for people. docs/metrics.md describes the columns.

Examples:
  cohort metrics books-1
  cohort metrics books-1 --csv > steps.csv
  cohort metrics books-1 --json | jq .loss
  cohort metrics books-1 --evals --csv
  cohort metrics books-1 --tensorboard board      then: tensorboard --logdir board")]
pub struct MetricsArgs {
    /// The run
    pub run: String,
    /// Print CSV, with a heading
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
    /// Write event files for TensorBoard, validations included, into a sub-directory of this one; points that are there already are not doubled
    #[arg(long, value_name = "DIR", conflicts_with_all = ["json", "csv", "evals", "from", "to", "last"])]
    pub tensorboard: Option<PathBuf>,
    /// Print validations instead of steps
    #[arg(long)]
    pub evals: bool,
    /// The first step that is wanted
    #[arg(long, value_name = "STEP")]
    pub from: Option<u64>,
    /// The last step that is wanted
    #[arg(long, value_name = "STEP")]
    pub to: Option<u64>,
    /// Only the newest N of them [default: 20 for people, all for files]
    #[arg(long, value_name = "N")]
    pub last: Option<u64>,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// What can be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Metric {
    /// Training loss and validations
    Loss,
    /// Gradient norm before clipping
    GradNorm,
    /// Learning rate
    LearningRate,
    /// Speed of the cluster
    TokensPerSecond,
    /// Model FLOPs utilisation
    Mfu,
}

/// What curves are drawn over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Axis {
    /// Optimizer steps
    Step,
    /// Tokens of the whole run
    Tokens,
    /// Time since the first step that is shown, pauses included
    Time,
}

/// A weight of the past.
fn weight(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(weight) if (0.0..1.0).contains(&weight) => Ok(weight),
        _ => Err("expected a number from 0 up to, but not including, 1".into()),
    }
}
