//! What a person does to a run: pause, resume, cancel, stop. The same for all who ask, by gRPC or by HTTP; each answers
//! with the run as it is afterwards.

use std::time::Duration;

use cohort_common::api::{RunEvent, RunInfo, StoredInfo};
use cohort_common::cluster::Event;
use cohort_common::home::RunName;
use cohort_common::ids::RunId;
use tonic::Status;

use crate::driver::{Cluster, Command, now_ms};
use crate::record::record_event;
use crate::status::{failed, refused, store_status};
use crate::store::RunStatus;
use crate::{query, runs};

/// How long whoever asks for a checkpoint waits for it.
const CHECKPOINT_DEADLINE: Duration = Duration::from_secs(300);

/// A run as it is now.
pub async fn describe(cluster: &Cluster, name: RunName) -> Result<RunInfo, Status> {
    let mut info = cluster
        .read_settled(move |store| query::run(store, &name))
        .await?;
    let queued = cluster.ask(Command::Describe).await?.queued;
    info.queue_place = query::place(&queued, &info.name);
    info.stored = stored(cluster, &info.name);
    Ok(info)
}

/// What of a run is in the object store, if there is one.
pub fn stored(cluster: &Cluster, run: &str) -> Option<StoredInfo> {
    let name = RunName::new(run).ok()?;
    Some(cluster.remote()?.describe(&name))
}

/// Checkpoints a run, lets it rest until it is resumed, and waits for that.
pub async fn pause(cluster: &Cluster, name: RunName) -> Result<RunInfo, Status> {
    let info = describe(cluster, name.clone()).await?;
    if !query::is_under_way(&info.status) {
        let go_on = match info.status == RunStatus::Finished.as_str() {
            true => String::new(),
            false => format!("; `cohort resume {name}` goes on with it"),
        };
        return Err(refused(format!(
            "run `{name}` rests already: it is {}{go_on}",
            info.status
        )));
    }
    let run = RunId::new(name.as_str());
    let pause = |reply| Command::Pause { run, reply };
    if !cluster.ask(pause).await? {
        return Err(refused(format!(
            "run `{name}` is being queued just now; try again"
        )));
    }
    let info = rested(cluster, name.clone()).await?;
    match info.status == RunStatus::Paused.as_str() {
        true => Ok(info),
        false => Err(refused(format!(
            "run `{name}` came to its end before it could be paused: it is {}",
            info.status
        ))),
    }
}

/// Goes on with a run that rests, from its newest checkpoint.
pub async fn resume(cluster: &Cluster, name: RunName) -> Result<RunInfo, Status> {
    runs::resume_as_it_is(cluster, &name).await?;
    describe(cluster, name).await
}

/// Ends a run for good, and waits for that.
pub async fn cancel(cluster: &Cluster, name: RunName) -> Result<RunInfo, Status> {
    let info = describe(cluster, name.clone()).await?;
    if query::is_under_way(&info.status) {
        let run = RunId::new(name.as_str());
        cluster.send(Event::Cancelled(run)).await;
        return rested(cluster, name).await;
    }
    if info.status == RunStatus::Finished.as_str() {
        return Err(refused(format!("run `{name}` has finished")));
    }
    let rested = name.clone();
    let cancelled = cluster.store().call(move |store| {
        let run = name.to_string();
        store.set_status(&name, RunStatus::Cancelled, None, now_ms())?;
        record_event(store, &name, &RunEvent::Cancelled { run })
    });
    cancelled.await.map_err(store_status)?;
    cluster.note(&rested);
    cluster.announce();
    describe(cluster, rested).await
}

/// Checkpoints a run and stops it, and waits for that. A run that rests stays as it is.
pub async fn stop(cluster: &Cluster, name: RunName) -> Result<RunInfo, Status> {
    let info = describe(cluster, name.clone()).await?;
    if !query::is_under_way(&info.status) {
        return Ok(info);
    }
    let run = RunId::new(name.as_str());
    cluster.send(Event::StopRequested(run)).await;
    rested(cluster, name).await
}

/// Makes a checkpoint of a run that goes on training, and waits for it for a while.
pub async fn checkpoint(cluster: &Cluster, name: RunName) -> Result<RunInfo, Status> {
    let info = describe(cluster, name.clone()).await?;
    if !query::is_under_way(&info.status) {
        return Err(refused(format!(
            "run `{name}` rests: it is {}, and its newest checkpoint is all there is of it",
            info.status
        )));
    }
    let run = RunId::new(name.as_str());
    let checkpoint = |reply| Command::Checkpoint { run, reply };
    let Some(step) = cluster.ask(checkpoint).await? else {
        return Err(refused(format!(
            "run `{name}` waits in the queue: there is nothing of it that is not on disk"
        )));
    };
    let saved = until(cluster, name.clone(), |info| {
        info.checkpoints.iter().any(|c| c.step >= step.max(1))
    });
    match tokio::time::timeout(CHECKPOINT_DEADLINE, saved).await {
        Ok(info) => info,
        Err(_) => Err(refused(format!(
            "run `{name}` has not been checkpointed within {} s: its step takes longer, it waits for workers, or the disk is full (`cohort status {name}`); the checkpoint is still due",
            CHECKPOINT_DEADLINE.as_secs()
        ))),
    }
}

/// Waits until a run rests.
async fn rested(cluster: &Cluster, name: RunName) -> Result<RunInfo, Status> {
    until(cluster, name, |_| false).await
}

/// Waits until a run is as it should be, or rests.
async fn until(
    cluster: &Cluster,
    name: RunName,
    done: impl Fn(&RunInfo) -> bool,
) -> Result<RunInfo, Status> {
    let mut news = cluster.events();
    loop {
        let info = describe(cluster, name.clone()).await?;
        if done(&info) || !query::is_under_way(&info.status) {
            return Ok(info);
        }
        news.changed().await.map_err(failed)?;
    }
}
