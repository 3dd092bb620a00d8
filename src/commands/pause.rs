//! `cohort pause`: checkpoints a run and lets it rest until it is resumed.

use anyhow::Result;

use crate::cli::PauseArgs;
use crate::context::Context;

/// Runs the verb.
pub async fn run(args: PauseArgs) -> Result<()> {
    let out = args.json.output();
    let mut client = Context::of(&args.connect)?.connect().await?;
    let run = client.pause(&args.run).await?;
    out.line(&run)?;
    out.say(format!(
        "{} is paused at step {}; `cohort resume {}` goes on with it",
        run.name, run.step, run.name
    ));
    Ok(())
}
