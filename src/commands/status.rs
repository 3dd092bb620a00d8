//! `cohort status`: shows a run.

use anyhow::Result;

use crate::cli::RunArgs;
use crate::context::Context;
use crate::facts;

/// Runs the verb.
pub async fn run(args: RunArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let run = match context.connect_if_running().await? {
        Some(mut client) => client.run(&args.run).await?,
        None => cohort_coordinator::offline::run(&context.home, &args.run)?,
    };
    let out = args.json.output();
    match out.json {
        true => out.line(&run),
        false => {
            out.say(facts::run(&run));
            Ok(())
        }
    }
}
