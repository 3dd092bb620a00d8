//! `cohort runs`: lists the runs.

use anyhow::Result;

use crate::cli::RunsArgs;
use crate::context::Context;
use crate::facts;

/// Runs the verb.
pub async fn run(args: RunsArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let runs = match context.connect_if_running().await? {
        Some(mut client) => client.runs().await?,
        None => cohort_coordinator::offline::runs(&context.home)?,
    };
    let out = args.json.output();
    if out.json {
        return runs.iter().try_for_each(|run| out.line(run));
    }
    match runs.is_empty() {
        true => out.say("no runs yet; `cohort pretrain` makes one"),
        false => out.say(facts::runs(&runs)),
    }
    Ok(())
}
