//! Copies to, and from, a directory that stands in for a store.

use std::fs;

use cohort_common::cluster::Limits;
use cohort_common::home::Home;
use cohort_common::traces::Traces;
use tempfile::TempDir;

mod standby;

use super::layout::StoredCorpus;
use super::upload::{Done, Job};
use super::*;
use crate::Topology;
use crate::notify::{Notices, NotifyConfig};
use crate::recover::tests::{checkpoint, ledger, state};
use crate::store::tests::new_run;
use crate::store::{CheckpointRow, EvalRow, RunStatus, Store, StoreHandle};

/// A coordinator's side of things, with a home of its own.
struct Side {
    home: Home,
    remote: Remote,
    cluster: Cluster,
}

impl Side {
    async fn open(directory: &TempDir, name: &str) -> Self {
        let home = Home::open(&directory.path().join(name)).unwrap();
        let (store, _) = StoreHandle::spawn(Store::open(&home.database()).unwrap());
        let (remote, reached) = Remote::open(&url(directory), &home).await.unwrap();
        assert!(reached);
        take_in(&remote, &store).await.unwrap();
        let (cluster, _driver) = Cluster::start(
            home.clone(),
            store,
            (Limits::default(), Topology::default()),
            Notices::start(NotifyConfig::default()),
            Traces::default(),
            Some(remote.clone()),
        );
        Self {
            home,
            remote,
            cluster,
        }
    }

    /// One with a run that has checkpoints of these steps.
    async fn with_run(directory: &TempDir, name: &str, steps: &[u64]) -> Self {
        let side = Self::open(directory, name).await;
        let last = *steps.last().unwrap();
        side.call(move |store| {
            store.create_run(&new_run("tiny-1"), 77)?;
            for entry in ledger(last) {
                store.append_entry(&run(), &entry)?;
            }
            store.record_eval(&run(), &eval())
        })
        .await;
        for &step in steps {
            side.checkpoint(step).await;
        }
        side
    }

    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> T {
        self.cluster.store().call(work).await.unwrap()
    }

    async fn checkpoint(&self, step: u64) {
        checkpoint(&self.home, step, Some(&ledger(step)));
        let opened =
            cohort_common::checkpoint::Checkpoint::open(&self.home.checkpoint(&run(), step));
        let opened = opened.unwrap();
        let row = CheckpointRow {
            step,
            path: opened.dir().display().to_string(),
            bytes: opened.manifest().unwrap().bytes(),
            val_loss: state(step).val_loss,
            state_hash: opened.run().unwrap().state_hash,
            time_ms: 1000 + step,
        };
        self.call(move |store| store.record_checkpoint(&run(), &row))
            .await;
    }

    /// What the run's retention does.
    async fn forget(&self, step: u64) {
        fs::remove_dir_all(self.home.checkpoint(&run(), step)).unwrap();
        self.call(move |store| store.delete_checkpoint(&run(), step))
            .await;
    }

    /// Copies what is missing.
    async fn follow(&self) -> Result<(), RemoteError> {
        while self.remote.follow(&self.cluster, &run()).await? == Done::More {}
        Ok(())
    }

    fn steps(&self) -> Vec<u64> {
        self.remote.describe(&run()).steps
    }
}

fn run() -> RunName {
    RunName::new("tiny-1").unwrap()
}

fn eval() -> EvalRow {
    EvalRow {
        step: 2,
        split: "validation".into(),
        loss: 0.1 + 0.2,
        bits_per_byte: None,
        weight: 3.0,
        bytes: 9,
        confusion: Vec::new(),
    }
}

fn url(directory: &TempDir) -> String {
    format!("file://{}/store", directory.path().display())
}

/// The files of the store below a place, by name.
fn stored(directory: &TempDir, below: &str) -> Vec<String> {
    names(&directory.path().join("store").join(below))
}

/// The names in a directory, in order; none if there is no such directory.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn checkpoints_are_copied_newest_first_and_follow_the_runs_retention() {
    let directory = tempfile::tempdir().unwrap();
    let side = Side::with_run(&directory, "a", &[2, 5]).await;
    assert_eq!(
        side.remote.follow(&side.cluster, &run()).await.unwrap(),
        Done::More
    );
    assert_eq!(side.steps(), [5]);
    side.follow().await.unwrap();
    assert_eq!(side.steps(), [2, 5]);
    let objects = stored(&directory, "runs/tiny-1/objects");
    side.checkpoint(7).await;
    side.forget(2).await;
    side.follow().await.unwrap();
    assert_eq!(
        stored(&directory, "runs/tiny-1/checkpoints"),
        ["step-00000005.json", "step-00000007.json"]
    );
    let after = stored(&directory, "runs/tiny-1/objects");
    // What only the first one had is gone, what it shared is not: run, ledger, manifest are its own, weights are the same.
    let gone = objects.iter().filter(|object| !after.contains(object));
    assert_eq!(gone.count(), 3, "{objects:?} {after:?}");
    let empty = Side::open(&directory, "b").await;
    for step in [5, 7] {
        // Both who ask for it at a time get it.
        let name = run();
        let bring = || empty.remote.bring_checkpoint(&name, step);
        let (one, other) = tokio::join!(bring(), bring());
        one.and(other).unwrap();
        assert!(empty.home.checkpoint(&run(), step).is_dir());
    }
}

#[tokio::test]
async fn what_is_known_of_the_store_does_not_outlive_a_deletion_that_fails() {
    let directory = tempfile::tempdir().unwrap();
    let side = Side::with_run(&directory, "a", &[2, 5]).await;
    side.follow().await.unwrap();
    side.checkpoint(7).await;
    side.forget(2).await;
    // A manifest that nobody understands: the sweep ends there.
    let stuck = "runs/tiny-1/checkpoints/step-00000009.json";
    let stuck = directory.path().join("store").join(stuck);
    fs::write(&stuck, "no manifest").unwrap();
    let error = side.follow().await.unwrap_err();
    assert!(
        error.to_string().contains("cannot be understood"),
        "{error}"
    );
    let before = stored(&directory, "runs/tiny-1/objects");
    // The manifest is gone and nothing is surplus any more, but what it had is still to go.
    fs::remove_file(&stuck).unwrap();
    side.follow().await.unwrap();
    let after = stored(&directory, "runs/tiny-1/objects");
    assert_eq!(before.len() - after.len(), 3, "{before:?} {after:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn what_is_left_of_a_run_is_not_taken_for_all_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let side = Side::with_run(&directory, "a", &[2, 5]).await;
    side.follow().await.unwrap();
    // The manifests can be listed; what else there is cannot, as a link leads around in a circle.
    let link = directory.path().join("store/runs/tiny-1/circle");
    std::os::unix::fs::symlink(".", &link).unwrap();
    side.remote.remove_run(&run()).await.unwrap_err();
    assert!(stored(&directory, "runs/tiny-1/checkpoints").is_empty());
    fs::remove_file(&link).unwrap();
    // The run is still here, so it is there again in the end.
    side.follow().await.unwrap();
    assert_eq!(
        stored(&directory, "runs/tiny-1/checkpoints"),
        ["step-00000002.json", "step-00000005.json"]
    );
}

#[tokio::test]
async fn what_is_deleted_is_not_copied_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let side = Side::with_run(&directory, "a", &[2]).await;
    let endless = side.remote.undisturbed(std::future::pending::<()>());
    let remover = async {
        // As soon as the other one waits.
        tokio::task::yield_now().await;
        let _alone = side.remote.alone().await;
        assert!(side.remote.0.work.try_lock().is_err());
    };
    let (given_up, ()) = tokio::join!(endless, remover);
    assert_eq!(given_up, None);
    let job = Job::Run(run());
    let done = side
        .remote
        .undisturbed(side.remote.work(&side.cluster, &job));
    assert_eq!(done.await.unwrap().unwrap(), Done::All);
    assert_eq!(side.steps(), [2]);
}

#[test]
fn what_fails_goes_behind_the_rest() {
    let mut state = State::default();
    let jobs = ["a", "b"].map(|name| Job::Run(RunName::new(name).unwrap()));
    for job in jobs.iter().chain(&jobs) {
        state.add(job.clone());
    }
    let first = state.due.pop_front().unwrap();
    state.add(first);
    assert_eq!(state.due, [jobs[1].clone(), jobs[0].clone()]);
}

#[tokio::test]
async fn a_corpus_lies_there_by_content() {
    let directory = tempfile::tempdir().unwrap();
    let side = Side::open(&directory, "a").await;
    let other = Side::open(&directory, "b").await;
    let write = |side: &Side, name: &str, content: &str| {
        let corpus = side.home.corpora().join("ab12");
        fs::create_dir_all(&corpus).unwrap();
        fs::write(corpus.join(name), content).unwrap();
    };
    // The same corpus under two names: what is in its index differs.
    for (side, index) in [(&side, "ours"), (&other, "theirs")] {
        write(side, "corpus.json", index);
        write(side, "train-00000.shard", "shard");
    }
    side.remote.copy_corpus("ab12").await.unwrap();
    let manifest = directory.path().join("store/corpora/ab12/manifest.json");
    fs::remove_file(&manifest).unwrap();
    // A torn upload, which another home goes on with.
    let objects = || stored(&directory, "corpora/ab12/objects");
    let shard = blake3::hash(b"shard").to_hex().to_string();
    assert!(objects().contains(&shard));
    let sent = directory
        .path()
        .join("store/corpora/ab12/objects")
        .join(&shard);
    let time = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let before = time(&sent);
    other.remote.copy_corpus("ab12").await.unwrap();
    assert_eq!(time(&sent), before);
    assert_eq!(objects().len(), 3);
    let manifest = StoredCorpus::parse(&fs::read(&manifest).unwrap()).unwrap();
    for file in manifest.files {
        let content = fs::read(other.home.corpora().join("ab12").join(file.name)).unwrap();
        assert_eq!(file.blake3, *blake3::hash(&content).as_bytes());
        assert!(objects().contains(&hex::encode(&file.blake3)));
    }
    side.remote.remove_corpus("ab12").await.unwrap();
    assert!(objects().is_empty());
}

#[tokio::test]
async fn an_empty_home_gets_the_run_back_to_the_bit() {
    let directory = tempfile::tempdir().unwrap();
    let side = Side::with_run(&directory, "a", &[2, 5]).await;
    side.follow().await.unwrap();
    let empty = Side::open(&directory, "b").await;
    let (row, rows, entries, evals) = empty
        .call(|store| {
            let run = run();
            let entries = store.entries(&run, 1, 99)?;
            Ok((
                store.run(&run)?,
                store.checkpoints(&run)?,
                entries,
                store.evals(&run, None)?,
            ))
        })
        .await;
    assert_eq!(
        (row.status, row.step, row.created_ms),
        (RunStatus::Interrupted, 5, 77)
    );
    assert_eq!(rows.len(), 2);
    assert_eq!(entries, ledger(5));
    assert_eq!(evals, [eval()]);
    assert!(!empty.home.checkpoint(&run(), 5).exists());
    assert!(note(&empty.home.run(&run()), 2).is_file());
    empty
        .remote
        .bring_back(&run(), &state(5).spec, Some(5), true)
        .await
        .unwrap();
    for name in names(&side.home.checkpoint(&run(), 5)) {
        let read = |home: &Home| fs::read(home.checkpoint(&run(), 5).join(&name)).unwrap();
        assert!(read(&side.home) == read(&empty.home), "{name}");
    }
}

#[tokio::test]
async fn what_was_torn_is_not_seen_and_what_was_damaged_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let side = Side::with_run(&directory, "a", &[2, 5]).await;
    side.follow().await.unwrap();
    let store = directory.path().join("store/runs/tiny-1");
    // An upload that did not come to its manifest.
    fs::remove_file(store.join("checkpoints/step-00000005.json")).unwrap();
    let empty = Side::open(&directory, "b").await;
    assert_eq!(empty.call(|store| Ok(store.run(&run())?.step)).await, 2);
    // A content that is another one.
    let largest = stored(&directory, "runs/tiny-1/objects").into_iter();
    let largest = largest.max_by_key(|name| {
        fs::metadata(store.join("objects").join(name))
            .unwrap()
            .len()
    });
    let largest = store.join("objects").join(largest.unwrap());
    let mut bytes = fs::read(&largest).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&largest, bytes).unwrap();
    let error = empty.remote.bring_checkpoint(&run(), 2).await.unwrap_err();
    assert!(
        error.to_string().contains("is damaged: its BLAKE3 is"),
        "{error}"
    );
    assert!(!empty.home.checkpoint(&run(), 2).exists());
}

#[tokio::test]
async fn only_its_owner_writes_a_run() {
    let directory = tempfile::tempdir().unwrap();
    let first = Side::with_run(&directory, "a", &[2]).await;
    first.follow().await.unwrap();
    let second = Side::open(&directory, "b").await;
    // Nothing may be deleted that another home writes.
    let refused = second.remote.remove_run(&run()).await.unwrap_err();
    assert!(matches!(refused, RemoteError::Taken { .. }));
    second
        .remote
        .bring_back(&run(), &state(2).spec, Some(2), true)
        .await
        .unwrap();
    first.checkpoint(5).await;
    let error = first.follow().await.unwrap_err();
    assert!(matches!(error, RemoteError::Taken { .. }), "{error}");
    assert_eq!(
        stored(&directory, "runs/tiny-1/checkpoints"),
        ["step-00000002.json"]
    );
    let back = first
        .remote
        .bring_back(&run(), &state(2).spec, Some(5), false)
        .await;
    assert!(matches!(back, Err(RemoteError::Taken { .. })));
    // Another one knows the run as it is now, and then its owner goes on and keeps nothing of that.
    let standby = Side::open(&directory, "c").await;
    second.checkpoint(7).await;
    second.forget(2).await;
    second.follow().await.unwrap();
    // Neither takes it over: its newest checkpoint would be deleted, as one that the run does not keep.
    let spec = state(2).spec;
    for (side, here) in [(&first, 5), (&standby, 2)] {
        let name = run();
        let back = side.remote.bring_back(&name, &spec, Some(here), true);
        let error = back.await.unwrap_err();
        let ahead = matches!(error, RemoteError::Ahead { there: 7, .. });
        assert!(ahead, "{error}");
        let known = format!("knows it up to step {here} only");
        assert!(error.to_string().contains(&known), "{error}");
    }
    second.follow().await.unwrap();
    assert_eq!(
        stored(&directory, "runs/tiny-1/checkpoints"),
        ["step-00000007.json"]
    );
    second.remote.remove_run(&run()).await.unwrap();
    assert!(stored(&directory, "runs/tiny-1/objects").is_empty());
}

#[tokio::test]
async fn a_store_of_a_newer_build_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("store")).unwrap();
    fs::write(
        directory.path().join("store/cohort.json"),
        r#"{"format": 2}"#,
    )
    .unwrap();
    let home = Home::open(&directory.path().join("a")).unwrap();
    let error = Remote::open(&url(&directory), &home)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("its format 2 is newer than this build"),
        "{error}"
    );
    // So is one that could not be asked when the coordinator started.
    let later = tempfile::tempdir().unwrap();
    let side = Side::open(&later, "a").await;
    fs::write(later.path().join("store/cohort.json"), r#"{"format": 2}"#).unwrap();
    let error = side
        .remote
        .work(&side.cluster, &Job::TakeIn)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("its format 2 is newer than this build"),
        "{error}"
    );
    let error = Remote::open("https://host/x", &home)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("it is no object store"), "{error}");
}
