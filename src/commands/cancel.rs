//! `cohort cancel`: ends a run for good.

use anyhow::Result;

use crate::cli::RunArgs;
use crate::context::Context;

/// Runs the verb.
pub async fn run(args: RunArgs) -> Result<()> {
    let out = args.json.output();
    let mut client = Context::of(&args.connect)?.connect().await?;
    let run = client.cancel(&args.run).await?;
    out.line(&run)?;
    out.say(format!(
        "{} ends at the next step boundary, after step {} or so; its checkpoints stay (`cohort rm {}` deletes them)",
        run.name, run.step, run.name
    ));
    Ok(())
}
