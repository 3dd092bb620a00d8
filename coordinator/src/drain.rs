//! How a coordinator ends that is asked to: the run that trains is checkpointed first, if that can be done within the time
//! that it has. Without that nothing would be wrong, as long as its workers live: they keep the state and wait for the next
//! coordinator. But where machines are taken away, they often go together.

use std::time::Duration;

use cohort_common::home::RunName;
use tokio::time::timeout;
use tonic::Status;
use tracing::{info, warn};

use crate::actions;
use crate::driver::{Cluster, Command};

/// Brings what the active run has computed to the disk; takes at most `grace`.
pub async fn drain(cluster: &Cluster, grace: Duration) {
    match timeout(grace, keep(cluster)).await {
        Ok(Ok(Some(step))) => info!(step, "the run is checkpointed"),
        Ok(Ok(None)) => {}
        Ok(Err(status)) => warn!(why = status.message(), "the run is not checkpointed"),
        Err(_) => warn!(
            grace_s = grace.as_secs_f64(),
            "the run was not checkpointed in time; it goes on from its newest checkpoint, or where its workers are"
        ),
    }
}

/// Checkpoints the run that trains, if there is one with a state that is not on disk; gives the step.
async fn keep(cluster: &Cluster) -> Result<Option<u64>, Status> {
    let now = cluster.ask(Command::Describe).await?;
    let Some(active) = now.active.filter(|_| !now.workers.is_empty()) else {
        return Ok(None);
    };
    let name = RunName::new(&active).map_err(|error| Status::internal(error.to_string()))?;
    let run = actions::describe(cluster, name.clone()).await?;
    if run.checkpoints.iter().any(|c| c.step >= run.step) || run.step == 0 {
        return Ok(None);
    }
    info!(
        run = active,
        step = run.step,
        "asked to end: checkpointing the run first"
    );
    let run = actions::checkpoint(cluster, name).await?;
    Ok(run.checkpoints.last().map(|c| c.step))
}
