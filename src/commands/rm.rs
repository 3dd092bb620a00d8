//! `cohort rm`: deletes a run with its files, after saying what that is.

use anyhow::{Result, bail};
use cohort_common::api::Removed;
use cohort_common::spec::human_bytes;

use crate::cli::RemoveArgs;
use crate::context::Context;
use crate::output::confirmed;

/// Runs the verb.
pub async fn run(args: RemoveArgs) -> Result<()> {
    let out = args.json.output();
    let mut client = Context::of(&args.connect)?.connect().await?;
    let doomed = client.remove_run(&args.run, true).await?;
    if !args.yes {
        let question = format!("delete run {}?", describe(&doomed));
        if out.json || !confirmed(&question)? {
            bail!(
                "nothing was deleted: run {}; `--yes` deletes it without asking",
                describe(&doomed)
            );
        }
    }
    let removed = client.remove_run(&args.run, false).await?;
    out.line(&removed)?;
    out.say(format!("deleted run {}", describe(&removed)));
    Ok(())
}

fn describe(removed: &Removed) -> String {
    let (name, files) = (&removed.name, removed.files);
    format!("{name} ({files} files, {})", human_bytes(removed.bytes))
}
