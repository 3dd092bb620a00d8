//! What a leader writes between checkpoints, and what whoever stands by makes of it.

use cohort_common::cluster::lease::Lease;

use super::*;
use crate::failover::Leadership;
use crate::remote::mirror::Mirror;
use crate::remote::running::StoredRun;

/// A leader's side, with a run of so many steps and no checkpoint.
async fn leader(directory: &TempDir, name: &str, generation: u64, steps: u64) -> Side {
    let side = Side::open(directory, name).await;
    side.remote.lead(Leadership::of(generation));
    side.call(move |store| {
        store.create_run(&new_run("tiny-1"), 77)?;
        store.set_status(&run(), RunStatus::Running, None, 78)?;
        store.set_workers(&run(), 3)?;
        for entry in ledger(steps) {
            store.append_entry(&run(), &entry)?;
        }
        store.record_eval(&run(), &eval())
    })
    .await;
    side.furnish().await;
    side
}

impl Side {
    /// As if its corpus had been copied.
    async fn furnish(&self) {
        for corpus in upload::corpora_of(&new_run("tiny-1").spec) {
            self.remote.state().corpora.insert(corpus);
        }
        self.follow().await.unwrap();
    }

    async fn write(&self) {
        self.remote.write_new(&self.cluster, &run()).await.unwrap();
    }
}

fn lease(generation: u64) -> Lease {
    Lease {
        holder: "h".into(),
        home: "x".into(),
        url: "http://h".into(),
        generation,
        epoch: 1,
        lasts_ms: 1000,
        renewals: 1,
        released: false,
    }
}

/// Whoever stands by, on a home of its own.
struct Other {
    mirror: Mirror,
    store: StoreHandle,
}

impl Other {
    async fn open(directory: &TempDir, name: &str) -> Self {
        let home = Home::open(&directory.path().join(name)).unwrap();
        let (store, _) = StoreHandle::spawn(Store::open(&home.database()).unwrap());
        let (remote, _) = Remote::open(&url(directory), &home).await.unwrap();
        Self {
            mirror: Mirror::new(remote, store.clone()),
            store,
        }
    }

    async fn entries(&mut self) -> Vec<cohort_common::ledger::Entry> {
        self.mirror.refresh().await.unwrap();
        self.call(|store| store.entries(&run(), 1, 99)).await
    }

    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> T {
        self.store.call(work).await.unwrap()
    }
}

#[tokio::test]
async fn a_run_is_followed_step_by_step() {
    let directory = tempfile::tempdir().unwrap();
    let leader = leader(&directory, "a", 1, 3).await;
    leader.write().await;
    let mut other = Other::open(&directory, "b").await;
    assert_eq!(other.entries().await, ledger(3));
    let row = other.call(|store| store.run(&run())).await;
    assert_eq!(
        (row.status, row.step, row.workers),
        (RunStatus::Running, 3, 3)
    );
    assert_eq!(
        other.call(|store| store.evals(&run(), None)).await,
        [eval()]
    );
    assert!(other.mirror.describe().contains("under way: tiny-1"));
    // More steps, and a checkpoint: pieces up to it are deleted.
    leader
        .call(|store| {
            for entry in &ledger(5)[3..] {
                store.append_entry(&run(), entry)?;
            }
            store.set_status(&run(), RunStatus::Paused, None, 79)
        })
        .await;
    leader.write().await;
    assert_eq!(stored(&directory, "runs/tiny-1/ledger").len(), 2);
    assert_eq!(other.entries().await, ledger(5));
    leader.checkpoint(5).await;
    leader.follow().await.unwrap();
    leader.write().await;
    assert_eq!(stored(&directory, "runs/tiny-1/ledger").len(), 1);
    // One that begins now has it from the checkpoint.
    let mut late = Other::open(&directory, "c").await;
    assert_eq!(late.entries().await, ledger(5));
    let row = late.call(|store| store.run(&run())).await;
    assert_eq!((row.status, row.step), (RunStatus::Paused, 5));
    let checkpoints = late.call(|store| store.checkpoints(&run())).await;
    assert_eq!(checkpoints.len(), 1);
}

#[tokio::test]
async fn steps_that_are_taken_back_are_taken_back_there_too() {
    let directory = tempfile::tempdir().unwrap();
    let leader = leader(&directory, "a", 1, 6).await;
    leader.write().await;
    let mut other = Other::open(&directory, "b").await;
    assert_eq!(other.entries().await.len(), 6);
    leader.call(|store| store.truncate(&run(), 4)).await;
    leader.write().await;
    assert_eq!(other.entries().await, ledger(4));
    let mut late = Other::open(&directory, "c").await;
    assert_eq!(late.entries().await, ledger(4));
}

#[tokio::test]
async fn what_a_former_leader_still_writes_does_not_count() {
    let directory = tempfile::tempdir().unwrap();
    let former = leader(&directory, "a", 1, 3).await;
    former.write().await;
    let next = leader(&directory, "b", 2, 6).await;
    next.write().await;
    // It has taken steps back that the other goes on from.
    former.call(|store| store.truncate(&run(), 1)).await;
    former.write().await;
    let mut other = Other::open(&directory, "c").await;
    assert_eq!(other.entries().await, ledger(6));
    assert_eq!(other.entries().await, ledger(6));
}

#[tokio::test]
async fn a_home_that_comes_back_takes_over_what_the_store_says() {
    let directory = tempfile::tempdir().unwrap();
    let next = leader(&directory, "a", 2, 4).await;
    next.write().await;
    let mut back = Other::open(&directory, "b").await;
    // It had steps that nobody else has, and a run that has never reached the store.
    back.call(|store| {
        store.create_run(&new_run("tiny-1"), 77)?;
        for entry in ledger(7) {
            store.append_entry(&run(), &entry)?;
        }
        store.create_run(&new_run("tiny-2"), 78)
    })
    .await;
    assert_eq!(back.entries().await, ledger(4));
    let aside = back.mirror.set_aside_unknown().await.unwrap();
    assert_eq!(aside, [RunName::new("tiny-2").unwrap()]);
    let row = back
        .call(|store| store.run(&RunName::new("tiny-2").unwrap()))
        .await;
    assert_eq!(row.status, RunStatus::Interrupted);
    // Where nobody else has led since, the home is what is true.
    let mut own = Other::open(&directory, "c").await;
    own.mirror.mirror_all(false);
    own.call(|store| store.create_run(&new_run("tiny-1"), 77))
        .await;
    assert_eq!(own.entries().await, []);
}

#[tokio::test]
async fn events_are_numbered_behind_those_of_another_database() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("cohort.db")).unwrap();
    store.number_events_from(1 << 40).unwrap();
    let first = store.record_event(None, 1, "x", "y").unwrap();
    assert_eq!(first, (1 << 40) + 1);
    store.number_events_from(5).unwrap();
    assert_eq!(store.record_event(None, 1, "x", "y").unwrap(), first + 1);
}

#[tokio::test]
async fn a_home_that_has_not_entered_what_others_wrote_does_not_know_all() {
    let directory = TempDir::new().unwrap();
    let side = Side::open(&directory, "a").await;
    let last = |home: &str, generation| Lease {
        home: home.into(),
        ..lease(generation)
    };
    let id = side.remote.id().to_owned();
    // It has won a lease, and nothing more.
    assert!(!side.remote.knows_all(&last(&id, 3)));
    side.remote.note_entered(3).unwrap();
    assert!(side.remote.knows_all(&last(&id, 3)));
    assert!(!side.remote.knows_all(&last(&id, 4)));
    assert!(!side.remote.knows_all(&last("another", 3)));
}

#[test]
fn a_run_whose_files_lead_out_of_its_directory_is_refused() {
    let stored = |name: &str| {
        serde_json::json!({
            "format": 1, "home": "x", "spec": new_run("tiny-1").spec, "status": "running", "error": null, "created_ms": 1,
            "parent": null, "facts": null, "workers": 1, "evals": [],
            "start": [{ "name": name, "bytes": 1, "blake3": "0".repeat(64) }],
        })
    };
    let parse = |name| StoredRun::parse(stored(name).to_string().as_bytes());
    assert!(parse("config.json").is_ok());
    for name in ["../../x", "/etc/x", "a/b"] {
        let error = parse(name).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}
