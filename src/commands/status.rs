//! `cohort status`: shows a run.

use anyhow::Result;

use crate::cli::RunArgs;
use crate::context::Context;
use crate::facts;

/// Runs the verb.
pub async fn run(args: RunArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let out = args.json.output();
    let run = match context.connect_if_running().await? {
        Some(mut client) => {
            for (url, says) in context.survey(&client).await {
                out.say(format!("coordinator {url}: {says}"));
            }
            client.run(&args.run).await?
        }
        None => cohort_coordinator::offline::run(&context.home, &args.run)?,
    };
    match out.json {
        true => out.line(&run),
        false => {
            out.say(facts::run(&run));
            Ok(())
        }
    }
}
