//! `cohort worker`: computes for a coordinator until it is asked to end, and hands over then.

use std::time::Duration;

use anyhow::Result;
use cohort_common::home::Home;
use cohort_common::traces::WORKER;
use tokio::task::JoinSet;

use crate::cli::WorkerArgs;
use crate::context::{self, WORKER_TOKEN};
use crate::local::{end_at_the_next_signal, interrupt, parent_gone};
use crate::traces;

/// Runs the verb.
pub async fn run(args: WorkerArgs) -> Result<()> {
    let home = context::home(&args.home)?;
    let secret = context::secret(&args.token)?;
    let coordinators = context::worker_places(&args.coordinator, &home, secret.as_ref());
    let token = context::token_for(coordinators.first(), secret.as_ref(), &home, WORKER_TOKEN)?;
    let traces = traces::open(&args.observe, WORKER)?;
    let config = cohort_worker::Config {
        coordinators,
        token,
        trust: None,
        device: args.device.parse()?,
        threads: args.threads.unwrap_or(0),
        cache: Home::open(&home)?.worker(),
        shared_memory: !args.no_shared_memory,
        entrance: args.exchange_listen,
        site: args.site,
        grace: Duration::from_secs_f64(args.grace),
        traces: traces.clone(),
    };
    // A task of the runtime: on the main thread every message would go through one more thread.
    let mut work = JoinSet::new();
    work.spawn(cohort_worker::run(config, asked_to_end()));
    let worked = tokio::select! {
        ended = work.join_next() => match ended.expect("it was just spawned") {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        },
        // Nobody is left to hand over to.
        () = parent_gone(), if args.exit_with_parent => Ok(()),
    };
    traces::finish(traces).await;
    Ok(worked?)
}

/// Completes at the first signal; the second ends the process at once.
async fn asked_to_end() {
    interrupt().await;
    tokio::spawn(end_at_the_next_signal());
}
