//! `cohort checkpoint`: writes a checkpoint of a run that goes on.

use anyhow::{Result, bail};

use crate::cli::CheckpointArgs;
use crate::context::Context;

/// Runs the verb.
pub async fn run(args: CheckpointArgs) -> Result<()> {
    let out = args.json.output();
    let mut client = Context::of(&args.connect)?.connect().await?;
    let run = client.checkpoint(&args.run).await?;
    let Some(newest) = run.checkpoints.last() else {
        bail!(
            "run `{}` has ended without a checkpoint: it is {}",
            run.name,
            run.status
        );
    };
    out.line(&run)?;
    out.say(format!(
        "{} has a checkpoint of step {} in {}; `--from {}@{}` names it",
        run.name, newest.step, newest.path, run.name, newest.step
    ));
    Ok(())
}
