//! Moments of the optimizer that are divided among the workers: the same bits, whoever is lost.

use crate::support::Scene;
use crate::support::cluster::{Cluster, Event, Reference};

/// Several chunks, so that each worker keeps another slice, and no checkpoint to fall back to before the end.
const TRAIN: &str = "pretrain spec.toml --corpus text.txt --set train.eval_every=0 --set train.steps=80 --set checkpoint.every=0 \
    --set model.hidden_size=128 --set model.intermediate_size=256";
const SHARDED: &str = "--optimizer sharded";

/// Waits until the moments are divided among so many, and for some steps more.
fn divided(cluster: &mut Cluster<'_>, workers: usize, times: usize) {
    let what = format!("the moments of the optimizer are divided among {workers} workers");
    cluster.wait_until(&what, |cluster| cluster.told(&what) >= times);
    let begun = cluster.step();
    cluster.wait_for_step(begun + 5);
}

/// Whether no step was committed twice.
fn nothing_again(cluster: &Cluster<'_>) -> bool {
    let steps: Vec<u64> = cluster.events.iter().filter_map(Event::step).collect();
    steps.is_sorted_by(|a, b| a < b)
}

#[cfg(unix)]
#[test]
fn moments_are_divided_and_whoever_keeps_some_may_die() {
    let reference = Reference::of(&Scene::new(), TRAIN, 1);
    let scene = Scene::new();
    let mut cluster = Cluster::start_with(&scene, 3, SHARDED);
    cluster.submit(&format!("{TRAIN} --new"));
    divided(&mut cluster, 3, 1);
    cluster.workers[0].kill();
    divided(&mut cluster, 2, 1);
    cluster.add_worker();
    divided(&mut cluster, 3, 2);
    cluster.workers[1].leave();
    divided(&mut cluster, 2, 2);
    cluster.kill_coordinator();
    cluster.restart_coordinator();
    let begun = cluster.step();
    cluster.wait_for_step(begun + 5);
    cluster.finish();
    let differences = reference.differences(&cluster);
    assert!(differences.is_empty(), "{differences:#?}");
    assert!(nothing_again(&cluster));
}

#[cfg(unix)]
#[test]
fn a_slice_that_is_lost_with_both_its_holders_is_made_again() {
    let line = TRAIN.replace("checkpoint.every=0", "checkpoint.every=10");
    let reference = Reference::of(&Scene::new(), &line, 1);
    let scene = Scene::new();
    let mut cluster = Cluster::start_with(&scene, 3, SHARDED);
    cluster.submit(&format!("{line} --new"));
    divided(&mut cluster, 3, 1);
    cluster.wait_for_step(14);
    cluster.workers[1].kill();
    cluster.workers[2].kill();
    cluster.add_worker();
    cluster.finish();
    let differences = reference.differences(&cluster);
    assert!(differences.is_empty(), "{differences:#?}");
}

#[test]
fn where_moments_cannot_be_divided_the_run_says_why() {
    let scene = Scene::new();
    let refused =
        scene.fails("coordinator --listen 127.0.0.1:0 --exchange star --optimizer sharded");
    assert!(refused.contains("leave one of the two out"), "{refused}");
    let (_coordinator, url) = scene.coordinator(SHARDED);
    let line = format!("worker --coordinator {url} --threads 1 --home cache");
    let flags = ["", "--exchange-listen none"];
    let mut workers = flags.map(|flag| scene.start(&format!("{line} {flag}")));
    for worker in &mut workers {
        worker.wait_for("joined");
    }
    let events = scene.events(&format!(
        "{TRAIN} --set train.steps=5 --set train.min_workers=2 --coordinator {url}"
    ));
    let texts: Vec<&str> = events.iter().filter_map(|e| e["text"].as_str()).collect();
    let why = |text: &&&str| text.contains("cannot be reached by the others");
    assert_eq!(texts.iter().filter(why).count(), 1, "{texts:?}");
}
