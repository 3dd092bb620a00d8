//! What a worker keeps for a coordinator.

use super::*;
use crate::ledger::{Chain, genesis};

const RUN: &str = "tiny-1";

fn entries(count: u64) -> Vec<Arc<Entry>> {
    let mut chain = Chain::new(1, 0, genesis(b"x"));
    let next = |step| {
        let entry = Entry {
            step,
            first_position: chain.next_position(),
            samples: 4,
            lanes: vec![LaneSums::default(); 8],
            loss_sum: 1.0,
            weight: 1.0,
            grad_norm: 1.0,
            learning_rate: 1.0,
            root_hash: [0; 32],
            state_hash_before: None,
            skipped: false,
            previous: chain.head(),
        };
        chain.push(&entry).unwrap();
        Arc::new(entry)
    };
    (1..=count).map(next).collect()
}

/// A worker that has applied these entries, of which those up to `safe` are safe.
fn worker(entries: &[Arc<Entry>], safe: impl Fn(Step) -> Step) -> WorkerMachine {
    let run = RunId::new(RUN);
    let held = Held {
        run: run.clone(),
        loading: false,
        step: entries[0].step - 1,
        proof: None,
        earlier: VecDeque::new(),
        safe: 0,
        lanes: BTreeSet::new(),
        commits: VecDeque::new(),
        keeper: None,
    };
    let mut machine = WorkerMachine {
        run: Some(held),
        ..WorkerMachine::default()
    };
    for entry in entries {
        let commit = Commit {
            proof: Proof::of(entry),
            scale: 1.0,
            updates: entry.step,
            hash_state: false,
            safe: safe(entry.step),
        };
        let run = run.clone();
        machine.handle(WorkerEvent::Told(ToWorker::Commit { run, commit }));
        let report = Report::Applied {
            step: entry.step,
            state_hash: None,
        };
        machine.handle(WorkerEvent::Did { load: 0, report });
    }
    machine
}

fn kept(machine: &WorkerMachine) -> Vec<Step> {
    let holding = machine.holding().unwrap();
    let earlier = holding.earlier.iter().map(|e| e.step);
    earlier.chain([holding.proof.step]).collect()
}

#[test]
fn entries_are_kept_until_they_are_safe() {
    let entries = entries(9);
    assert_eq!(kept(&worker(&entries, |step| step - 1)), [9]);
    assert_eq!(kept(&worker(&entries, |_| 6)), [7, 8, 9]);
    assert_eq!(kept(&worker(&entries[3..], |_| 0)), [4, 5, 6, 7, 8, 9]);
}

#[test]
fn what_is_kept_has_a_bound() {
    let entries = entries(6_000);
    let kept = kept(&worker(&entries, |_| 0));
    let most = MOST_KEPT / entries[0].encoded_len();
    assert_eq!((kept.len(), kept.last()), (most + 1, Some(&6_000)));
}
