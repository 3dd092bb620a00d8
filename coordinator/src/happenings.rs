//! What is written down of a run's workers: who has which lanes, who is lost, who joins and leaves, whose lanes others
//! computed, and what that cost. It is a table beside the ledger, which knows no workers.

use cohort_common::api::RunEvent;
use cohort_common::cluster::events::Happening;
use cohort_common::ids::{Lane, SessionId, Step};

use crate::driver::Cluster;
use crate::record::RunRecord;
use crate::store::{AttemptRow, FaultRow, Store};

impl RunRecord {
    /// Records who has which lanes from a step on.
    pub async fn assigned(
        &self,
        cluster: &Cluster,
        step: Step,
        generation: u64,
        lanes: Vec<(SessionId, Vec<Lane>)>,
    ) {
        // Of workers without lanes there may be many.
        let lanes = lanes.into_iter().filter(|(_, lanes)| !lanes.is_empty());
        let lanes = lanes.map(|(s, l)| (s.to_string(), l)).collect();
        let name = self.name.clone();
        let record = move |s: &Store| s.record_assignment(&name, step, generation, &lanes);
        self.write(cluster, record).await;
    }

    /// Records what happened to a worker, and tells people.
    pub async fn happened(&self, cluster: &Cluster, what: Happening) {
        let run = self.name.to_string();
        let event = match what {
            Happening::Lost {
                session,
                step,
                reason,
            } => RunEvent::WorkerLost {
                run,
                worker: session.to_string(),
                step,
                reason: reason.to_string(),
            },
            Happening::Joined {
                session,
                step,
                replayed,
            } => RunEvent::WorkerJoined {
                run,
                worker: session.to_string(),
                step,
                replayed,
            },
            Happening::Left { session, step } => RunEvent::WorkerLeft {
                run,
                worker: session.to_string(),
                step,
            },
            Happening::Redone(redone) => {
                let attempt = |worker: SessionId, lane: Lane, outcome: &str| AttemptRow {
                    step: redone.step,
                    lane,
                    worker: worker.to_string(),
                    outcome: outcome.into(),
                };
                let word = redone.reason.word();
                let rows: Vec<AttemptRow> = redone
                    .lanes
                    .iter()
                    .flat_map(|(l, by)| [attempt(redone.from, *l, word), attempt(*by, *l, "done")])
                    .collect();
                let name = self.name.clone();
                self.write(cluster, move |s| s.record_attempts(&name, &rows))
                    .await;
                let mut by: Vec<SessionId> = redone.lanes.iter().map(|(_, by)| *by).collect();
                by.sort_unstable();
                by.dedup();
                RunEvent::Redone {
                    run,
                    step: redone.step,
                    worker: redone.from.to_string(),
                    reason: redone.reason.to_string(),
                    lanes: redone.lanes.iter().map(|(l, _)| *l).collect(),
                    by: by.iter().map(ToString::to_string).collect(),
                    delay_ms: redone.delay_ms,
                }
            }
        };
        self.event(cluster, event).await;
    }
}

/// The fault that an event about workers is; `None` for other events.
pub fn fault_of(event: &RunEvent, time_ms: u64) -> Option<FaultRow> {
    let (worker, step, delay_ms) = match event {
        RunEvent::WorkerLost { worker, step, .. }
        | RunEvent::WorkerJoined { worker, step, .. }
        | RunEvent::WorkerLeft { worker, step, .. } => (worker, *step, None),
        RunEvent::Redone {
            worker,
            step,
            delay_ms,
            ..
        } => (worker, *step, Some(*delay_ms)),
        _ => return None,
    };
    Some(FaultRow {
        step,
        time_ms,
        kind: event.kind().to_owned(),
        worker: worker.clone(),
        text: event.membership()?,
        delay_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::record_event;

    #[test]
    fn events_about_workers_are_faults_too() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("cohort.db")).unwrap();
        let new = crate::store::tests::new_run("tiny-1");
        store.create_run(&new, 1).unwrap();
        let run = || "tiny-1".to_owned();
        let events = [
            RunEvent::Training {
                run: run(),
                workers: 2,
            },
            RunEvent::WorkerLost {
                run: run(),
                worker: "w2".into(),
                step: 41,
                reason: "connection closed".into(),
            },
            RunEvent::Redone {
                run: run(),
                step: 41,
                worker: "w2".into(),
                reason: "lost".into(),
                lanes: vec![4, 5],
                by: vec!["w1".into()],
                delay_ms: 250,
            },
            RunEvent::WorkerJoined {
                run: run(),
                worker: "w3".into(),
                step: 50,
                replayed: 9,
            },
            RunEvent::WorkerLeft {
                run: run(),
                worker: "w3".into(),
                step: 60,
            },
        ];
        for event in &events {
            record_event(&store, &new.name, event).unwrap();
        }
        assert_eq!(store.events(Some(&new.name), 0, 9).unwrap().len(), 5);
        let faults = store.faults(&new.name, 9).unwrap();
        let facts: Vec<_> = faults
            .iter()
            .map(|f| (f.kind.as_str(), f.worker.as_str(), f.step, f.delay_ms))
            .collect();
        assert_eq!(
            facts,
            [
                ("worker_lost", "w2", 41, None),
                ("redone", "w2", 41, Some(250)),
                ("worker_joined", "w3", 50, None),
                ("worker_left", "w3", 60, None),
            ]
        );
        assert_eq!(Some(&faults[1].text), events[2].membership().as_ref());
    }
}
