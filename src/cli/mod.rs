//! What can be typed: one clap struct per verb, nothing else. What the words mean is decided in `commands`.

mod audit;
mod checkpoints;
mod cluster;
mod common;
mod corpus;
mod files;
mod machine;
mod plan;
mod runs;
mod security;
mod train;

use clap::{Parser, Subcommand};

pub use audit::{LedgerArgs, VerifyArgs};
pub use checkpoints::{ChatArgs, EvalArgs, ExportArgs, GenerateArgs, MergeArgs, SamplingArgs};
pub use cluster::{CoordinatorArgs, ExchangeArg, Insecure, LocalClusterArgs, WorkerArgs};
pub use common::{
    ConnectArgs, HomeArgs, JsonArgs, LocalArgs, LogFormat, NotifyArgs, ObserveArgs, OptimizerArg,
    TokenArgs,
};
pub use corpus::{CorpusHeadArgs, CorpusStatsArgs, DedupKind, SelectionArgs, Side};
pub use files::{Axis, CompareArgs, Metric, MetricsArgs, PlotArgs};
pub use machine::{CompletionsArgs, DoctorArgs, ManArgs};
pub use plan::PlanArgs;
pub use runs::{
    CheckpointArgs, CorpusArgs, CorpusListArgs, CorpusPrepareArgs, CorpusRemoveArgs,
    CorpusShowArgs, CorpusVerb, FollowArgs, PauseArgs, PresetsArgs, RemoveArgs, ResumeArgs,
    RunArgs, RunsArgs, WatchArgs,
};
pub use security::{
    InitArgs, TokenCreateArgs, TokenListArgs, TokenRevokeArgs, TokenVerb, TokenVerbArgs,
};
pub use train::{FinetuneArgs, PretrainArgs, PreviewArgs, QuickstartArgs, SpecArgs, SubmitArgs};

const EXAMPLES: &str = "\
Examples:
  cohort quickstart                                    train and finetune a small model on this machine, offline
  cohort pretrain --preset tiny --corpus books/ --local 2
  cohort finetune --from RUN@best --corpus tales/ --local 2
  cohort finetune --from RUN@best --sft chat.jsonl --lora 16 --local 2
  cohort generate --from RUN@best --prompt 'Once upon a time'

Several machines:
  cohort init                                          on one of them; prints the line that starts workers
  cohort coordinator --listen 0.0.0.0:7070             there, encrypted
  cohort pretrain spec.toml --corpus books/            there, too

`cohort VERB --help` has examples for each verb. Set COHORT_LOG=info (or debug) to see what happens inside.";

/// Trains language models on whatever machines you have, with results that never depend on the cluster.
#[derive(Debug, Parser)]
#[command(name = "cohort", version, after_help = EXAMPLES, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// One verb per action.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Pretrain and finetune a small model on this machine, from raw text to generated text, without any download
    Quickstart(QuickstartArgs),
    /// Train a model from random weights
    Pretrain(PretrainArgs),
    /// Train a model further from a checkpoint, on another corpus
    Finetune(FinetuneArgs),
    /// Continue a prompt with the text of a model
    Generate(GenerateArgs),
    /// Talk with a model, line by line
    Chat(ChatArgs),
    /// Score a text with a model: loss, perplexity, bits per byte
    Eval(EvalArgs),
    /// Write a checkpoint as a Hugging Face directory
    Export(ExportArgs),
    /// Make one model of a base and its adapters, as a Hugging Face directory
    Merge(MergeArgs),
    /// List the runs
    Runs(RunsArgs),
    /// Show a run: its figures, validations, checkpoints, and what happened to its workers
    Status(RunArgs),
    /// Show runs beside each other: what differs in their specs, and what came of it
    Compare(CompareArgs),
    /// Draw the curves of runs, as SVG or PNG
    Plot(PlotArgs),
    /// Print every step of a run with all its figures, or write them for TensorBoard
    Metrics(MetricsArgs),
    /// Print the ledger of a run: a JSON line for each committed step
    Ledger(LedgerArgs),
    /// Check a run: its ledger, its samples, its checkpoints; with --replay, compute steps again
    Verify(VerifyArgs),
    /// Come back to a run and watch it until it rests
    Follow(FollowArgs),
    /// Watch a run and its workers in the terminal: curves, speed, what happened; keys pause, resume or cancel it
    Watch(WatchArgs),
    /// End a run for good; its checkpoints stay
    Cancel(RunArgs),
    /// Delete a run with its files
    Rm(RemoveArgs),
    /// Prepare, list, show and remove corpora
    Corpus(CorpusArgs),
    /// List the recipes that come with Cohort
    Presets(PresetsArgs),
    /// Show samples as the model will see them, with what is learned marked, and count what cannot be used
    Preview(PreviewArgs),
    /// Say what a run will take before it is begun, or compare that with what it has taken
    Plan(PlanArgs),
    /// Serve: keep runs, corpora and checkpoints, and lead the workers
    Coordinator(CoordinatorArgs),
    /// Join a coordinator and compute for it
    Worker(WorkerArgs),
    /// Make a cluster that others can join: an authority for certificates, and the first tokens
    Init(InitArgs),
    /// Make, list and revoke the tokens of a cluster
    Token(TokenVerbArgs),
    /// Run a standing cluster on this machine until Ctrl-C
    Local(LocalClusterArgs),
    /// Write a checkpoint of a run now; it goes on
    Checkpoint(CheckpointArgs),
    /// Checkpoint a run and let it rest, so that its workers are free for the next one
    Pause(PauseArgs),
    /// Go on with a run that rests, from its newest checkpoint
    Resume(ResumeArgs),
    /// Look whether this machine is fit to train on, and say what to do
    Doctor(DoctorArgs),
    /// Print a script that completes commands in a shell
    Completions(CompletionsArgs),
    /// Write manual pages
    Man(ManArgs),
}
