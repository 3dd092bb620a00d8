//! The ways of a gradient: through memory that both ends see, or over the network. No bit depends on them.

use crate::support::cluster::{Cluster, Reference};
use crate::support::signal::Signal;
use crate::support::{Process, Scene};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt --set train.steps=60";
/// A model with more than one chunk.
const WIDE: &str = "--set model.hidden_size=128 --set model.intermediate_size=256";
/// What the coordinator logs where a gradient stays.
const SHARED: &str = "gradients stay in shared memory";

/// A worker.
fn worker(scene: &Scene, url: &str, flags: &str) -> Process {
    scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache {flags}"
    ))
}

/// Trains on workers of these flags. Gives the last event, and what the coordinator logged.
fn train(set: &str, flags: &[&str]) -> (serde_json::Value, String) {
    let scene = Scene::new();
    let (mut coordinator, url) = scene.coordinator("");
    let mut workers: Vec<Process> = flags.iter().map(|f| worker(&scene, &url, f)).collect();
    for worker in &mut workers {
        worker.wait_for("joined");
    }
    let last = scene.finished(&format!(
        "{TRAIN} {set} --coordinator {url} --set train.min_workers={}",
        flags.len()
    ));
    let log = coordinator.tail(1_000);
    (last, log)
}

#[cfg(target_os = "linux")]
#[test]
fn workers_find_out_that_they_share_a_host_and_it_changes_no_bit() {
    let (shared, log) = train("", &["", ""]);
    assert_eq!(log.matches(SHARED).count(), 2, "{log}");
    let (sent, log) = train("", &["--no-shared-memory", "--no-shared-memory"]);
    assert!(!log.contains(SHARED), "{log}");
    let (mixed, log) = train("", &["", "--no-shared-memory", ""]);
    assert_eq!(log.matches(SHARED).count(), 2, "{log}");
    for other in [sent, mixed] {
        assert_eq!(other["state_hash"], shared["state_hash"]);
    }
}

#[test]
fn in_no_mode_does_the_result_depend_on_the_cluster() {
    let (exact, _) = train("", &[""]);
    for mode in [
        "--set train.payload=bf16",
        "--set train.payload=int8",
        "--set train.payload=int4",
        "--set train.sync=diloco --set train.inner_steps=2",
    ] {
        let (alone, _) = train(mode, &[""]);
        for flags in [
            &["", ""][..],
            &["--no-shared-memory"; 3][..],
            &["", "--no-shared-memory"],
        ] {
            let (several, _) = train(mode, flags);
            let hashes = [&several, &alone].map(|run| &run["state_hash"]);
            assert_eq!(hashes[0], hashes[1], "{mode} {flags:?}");
        }
        assert_ne!(exact["state_hash"], alone["state_hash"]);
    }
}

#[test]
fn a_worker_listens_for_others_only_where_that_is_safe() {
    let scene = Scene::new();
    let line = "worker --coordinator http://127.0.0.1:9 --home cache --exchange-listen";
    let open = scene.fails(&format!("{line} 0.0.0.0:0"));
    assert!(open.contains("for other workers without a token"), "{open}");
    // What cannot be read is clap's, which ends with 2.
    let output = scene.cohort(&format!("{line} nonsense")).output();
    let output = output.expect("the binary runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("expected `auto`, `none`"), "{said}");
}

/// Trains on so many workers, which sum a slice each; one is killed, another stands still. People are told what `said` makes of
/// the number of workers that are left.
#[cfg(unix)]
fn owners_fail(
    set: &str,
    workers: usize,
    sites: &'static [&'static str],
    said: impl Fn(usize) -> String,
) {
    let line = format!("{TRAIN} --set train.eval_every=0 --set train.steps=160 {WIDE} {set}");
    let reference = Reference::of(&Scene::new(), &line, 1);
    let scene = Scene::new();
    let mut cluster = Cluster::start_in(&scene, workers, "--exchange sharded", sites);
    cluster.submit(&format!("{line} --new"));
    let all = said(workers);
    cluster.wait_until("all own slices", |c| c.told(&all) == 1);
    let begun = cluster.step();
    cluster.wait_for_step(begun + 5);
    cluster.workers[0].kill();
    // The step that it dies in is the coordinator's, and those that follow are the others'.
    let others = said(workers - 1);
    cluster.wait_until("the others own slices", |c| c.told(&others) == 1);
    let begun = cluster.step();
    cluster.wait_for_step(begun + 5);
    // One that stands still is late at first, then silent; nobody waits for it.
    cluster.workers[1].signal(Signal::Stop);
    let late = "not every worker had every slice; the coordinator sums";
    cluster.wait_until("the coordinator sums", |c| c.told(late) == 1);
    let stopped = cluster.step();
    cluster.wait_for_step(stopped + 3);
    cluster.workers[1].signal(Signal::Continue);
    cluster.finish();
    let differences = reference.differences(&cluster);
    assert!(differences.is_empty(), "{differences:#?}");
}

#[cfg(unix)]
#[test]
fn workers_own_slices_and_the_coordinator_takes_over_from_those_that_fail() {
    owners_fail("", 3, &[], |workers| format!("{workers} of them sum"));
}

#[cfg(unix)]
#[test]
fn sites_add_up_first_and_the_coordinator_takes_over_from_those_that_fail() {
    let said = |workers| {
        format!("{workers} of them sum a slice of the gradient each; they are in 2 sites")
    };
    owners_fail("--set train.payload=int8", 4, &["north", "south"], said);
}

#[cfg(unix)]
#[test]
fn a_worker_may_die_while_its_memory_is_read() {
    let scene = Scene::new();
    let line = format!("{TRAIN} --set train.eval_every=0");
    let reference = Reference::of(&scene, &line, 3);
    let scene = Scene::new();
    let mut cluster = Cluster::start(&scene, 3);
    cluster.submit(&format!("{line} --new"));
    cluster.wait_for_step(10);
    // The first shares memory, and so does its successor.
    cluster.workers[0].kill();
    cluster.add_worker();
    cluster.add_worker();
    cluster.wait_for_step(30);
    cluster.workers[4].kill();
    cluster.finish();
    let differences = reference.differences(&cluster);
    assert!(differences.is_empty(), "{differences:#?}");
}
