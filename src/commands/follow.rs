//! `cohort follow`: comes back to a run.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{FollowArgs, LocalArgs, NotifyArgs};
use crate::submit::Session;

/// Runs the verb.
pub async fn run(args: FollowArgs) -> Result<ExitCode> {
    let out = args.json.output();
    let mut session = Session::open(
        &args.connect,
        &LocalArgs::default(),
        &NotifyArgs::default(),
        out,
    )
    .await?;
    let info = session.client.run(&args.run).await?;
    let rest = session.watch(&info.name, 0, info.step).await?;
    session.conclude(&info.name, &info.spec, rest).await
}
