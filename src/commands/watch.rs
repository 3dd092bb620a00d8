//! `cohort watch`: shows a run in the terminal while it trains. Where stdout is no terminal it prints lines, like
//! `cohort follow`.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Result, anyhow};

use super::follow;
use crate::cli::{FollowArgs, JsonArgs, WatchArgs};
use crate::context::Context;
use crate::facts;
use crate::output::Output;
use crate::watch;

/// Runs the verb.
pub async fn run(args: WatchArgs) -> Result<ExitCode> {
    let context = Context::of(&args.connect)?;
    let out = Output { json: false };
    let dumb = std::env::var("TERM").is_ok_and(|terminal| terminal == "dumb");
    if std::io::stdout().is_terminal() && !dumb {
        out.say(watch::run(context, args.run).await?);
        return Ok(ExitCode::SUCCESS);
    }
    let Some(mut client) = context.connect_if_running().await? else {
        let runs = cohort_coordinator::offline::runs(&context.home)?;
        let wanted = |run: &&cohort_common::api::RunInfo| {
            args.run.as_ref().is_none_or(|name| run.name == *name)
        };
        let run = runs.iter().rev().find(wanted);
        let run = run.ok_or_else(|| no_run(args.run.as_deref()))?;
        out.say(facts::run(run));
        return Ok(ExitCode::SUCCESS);
    };
    let active = client.cluster().await?.active;
    let run = match args.run.or(active) {
        Some(run) => run,
        None => {
            let newest = client.runs().await?.pop();
            newest.ok_or_else(|| no_run(None))?.name
        }
    };
    follow::run(FollowArgs {
        run,
        json: JsonArgs::default(),
        connect: args.connect,
    })
    .await
}

fn no_run(name: Option<&str>) -> anyhow::Error {
    match name {
        Some(name) => anyhow!("there is no run `{name}`; `cohort runs` lists them"),
        None => anyhow!("no runs yet; `cohort pretrain` makes one"),
    }
}
