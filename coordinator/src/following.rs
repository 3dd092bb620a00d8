//! Who follows a run: its events, old and new, as they come. Looks at the store take the processor from those who train, who
//! may be on the same machine; steps, of which there may be many a second, are looked at together.

use std::time::Duration;

use cohort_common::api::NumberedEvent;
use cohort_common::home::RunName;
use cohort_common::wire::json;
use cohort_proto::v1;
use tokio::sync::watch::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use crate::driver::{Cluster, Counts};
use crate::query;
use crate::status::failed;
use crate::store::Store;

/// Events in one look at the store.
const EVENTS: u32 = 512;

/// Between two looks for nothing but steps.
const STEPS: Duration = Duration::from_millis(100);

/// Sends a run's events, old and new, until the run rests.
pub async fn send_events(
    cluster: &Cluster,
    name: RunName,
    mut after: u64,
    out: &mpsc::Sender<Result<v1::Json, Status>>,
) -> Result<(), Status> {
    let mut news = cluster.events();
    loop {
        let known = *news.borrow_and_update();
        let rested = Instant::now() + STEPS;
        let wanted = name.clone();
        let look = move |store: &Store| {
            let rests = !query::is_under_way(store.run(&wanted)?.status.as_str());
            Ok((rests, store.events(Some(&wanted), after, EVENTS)?))
        };
        let (rests, rows) = cluster.read_settled(look).await?;
        let full = rows.len() == EVENTS as usize;
        for row in rows {
            after = row.id;
            let event = serde_json::from_str(&row.text).map_err(failed)?;
            let event = NumberedEvent { id: row.id, event };
            if out.send(Ok(json(&event))).await.is_err() {
                return Ok(());
            }
        }
        if full {
            continue;
        }
        if rests {
            return Ok(());
        }
        let changed = tokio::select! {
            changed = next_look(&mut news, known, rested) => changed,
            () = out.closed() => return Ok(()),
        };
        if changed.is_err() {
            return Ok(());
        }
    }
}

/// Waits for something that a follower does not know yet: for steps not before it has rested.
async fn next_look(
    news: &mut watch::Receiver<Counts>,
    known: Counts,
    rested: Instant,
) -> Result<(), RecvError> {
    let mut others = news.clone();
    tokio::select! {
        other = others.wait_for(|now| now.others != known.others) => other.map(drop),
        step = async {
            sleep_until(rested).await;
            news.changed().await
        } => step,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a follower, that has known nothing and rests for so long, looks again within some time once this has happened.
    async fn looks(rest: Duration, within: Duration, what: fn(&mut Counts)) -> bool {
        let sender = watch::Sender::<Counts>::default();
        let mut news = sender.subscribe();
        let known = *news.borrow_and_update();
        sender.send_modify(what);
        let rested = Instant::now() + rest;
        let looks = tokio::time::timeout(within, next_look(&mut news, known, rested));
        looks.await.is_ok_and(|looks| looks.is_ok())
    }

    #[tokio::test]
    async fn steps_wait_for_each_other_and_nothing_else_waits() {
        const HOUR: Duration = Duration::from_secs(3600);
        const MINUTE: Duration = Duration::from_secs(60);
        let moment = Duration::from_millis(20);
        assert!(!looks(HOUR, moment, |counts| counts.steps += 1).await);
        assert!(looks(HOUR, MINUTE, |counts| counts.others += 1).await);
        assert!(looks(Duration::ZERO, MINUTE, |counts| counts.steps += 1).await);
    }

    #[tokio::test]
    async fn a_coordinator_that_ends_is_not_followed_any_more() {
        let (sender, mut news) = watch::channel(Counts::default());
        let known = *news.borrow_and_update();
        drop(sender);
        let rested = Instant::now();
        assert!(next_look(&mut news, known, rested).await.is_err());
    }
}
