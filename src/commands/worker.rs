//! `cohort worker`: computes for a coordinator until Ctrl-C.

use anyhow::Result;
use cohort_common::home::Home;

use crate::cli::WorkerArgs;
use crate::context;
use crate::local::shutdown;

/// Runs the verb.
pub async fn run(args: WorkerArgs) -> Result<()> {
    let home = context::home(&args.home)?;
    let coordinator = context::worker_url(args.coordinator.as_deref(), &home)?;
    let secret = context::secret(&args.token)?;
    let config = cohort_worker::Config {
        coordinator,
        token: secret.map(|secret| secret.token),
        device: args.device.parse()?,
        threads: args.threads.unwrap_or(0),
        cache: Home::open(&home)?.worker(),
    };
    cohort_worker::run(config, shutdown(args.exit_with_parent)).await?;
    Ok(())
}
