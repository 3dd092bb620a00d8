//! One file per verb.

mod cancel;
mod chat;
mod checkpoint;
mod compare;
mod completions;
mod contents;
mod coordinator;
mod corpus;
mod doctor;
mod eval;
mod eval_local;
mod eval_samples;
mod export;
mod finetune;
mod follow;
mod generate;
mod init;
mod ledger;
mod local;
mod man;
mod merge;
mod metrics;
mod pause;
mod plan;
mod plan_against;
mod plot;
mod presets;
mod pretrain;
mod preview;
mod quickstart;
mod resume;
mod rm;
mod runs;
mod status;
mod token;
mod transfer;
mod verify;
mod watch;
mod worker;

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::Verb;

/// Runs a verb.
pub async fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Quickstart(args) => quickstart::run(args).await,
        Verb::Pretrain(args) => pretrain::run(args).await,
        Verb::Finetune(args) => finetune::run(args).await,
        Verb::Generate(args) => done(generate::run(args).await),
        Verb::Chat(args) => done(chat::run(args).await),
        Verb::Eval(args) => done(eval::run(args).await),
        Verb::Export(args) => done(export::run(args).await),
        Verb::Merge(args) => done(merge::run(args).await),
        Verb::Runs(args) => done(runs::run(args).await),
        Verb::Status(args) => done(status::run(args).await),
        Verb::Compare(args) => done(compare::run(args).await),
        Verb::Plot(args) => done(plot::run(args).await),
        Verb::Metrics(args) => done(metrics::run(args).await),
        Verb::Ledger(args) => done(ledger::run(args).await),
        Verb::Verify(args) => done(verify::run(args).await),
        Verb::Follow(args) => follow::run(args).await,
        Verb::Watch(args) => watch::run(args).await,
        Verb::Cancel(args) => done(cancel::run(args).await),
        Verb::Rm(args) => done(rm::run(args).await),
        Verb::Corpus(args) => done(corpus::run(args.verb).await),
        Verb::Presets(args) => done(presets::run(&args)),
        Verb::Preview(args) => done(preview::run(args).await),
        Verb::Plan(args) => done(plan::run(args).await),
        Verb::Coordinator(args) => done(coordinator::run(args).await),
        Verb::Worker(args) => done(worker::run(args).await),
        Verb::Init(args) => done(init::run(args)),
        Verb::Token(args) => done(token::run(args.verb)),
        Verb::Local(args) => done(local::run(args).await),
        Verb::Checkpoint(args) => done(checkpoint::run(args).await),
        Verb::Pause(args) => done(pause::run(args).await),
        Verb::Resume(args) => done(resume::verb(args).await),
        Verb::Doctor(args) => doctor::run(args).await,
        Verb::Completions(args) => done(completions::run(&args)),
        Verb::Man(args) => done(man::run(&args)),
    }
}

fn done(result: Result<()>) -> Result<ExitCode> {
    result.map(|()| ExitCode::SUCCESS)
}
