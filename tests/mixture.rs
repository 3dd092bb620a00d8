//! Several corpora in one run: shares that change, each sample once, and the same bits on any cluster.

use serde_json::Value;

use crate::support::cluster::{Cluster, Reference};
use crate::support::{Scene, finished, text, words};

const MIXTURE: &str = r#"
[mixture]
weight = 3

[[mixture.corpora]]
name = "tales"
paths = "tales.txt"
weight = 1

[[mixture.corpora]]
paths = ["more/one.txt", "more/two.txt"]
weight = 2

[[mixture.schedule]]
step = 9
weights = [0, 1, 1]
"#;

fn scene() -> Scene {
    let scene = Scene::new();
    std::fs::create_dir(scene.path("more")).expect("a directory");
    scene.write("tales.txt", &words(7, 5_000));
    scene.write("more/one.txt", &words(8, 3_000));
    scene.write("more/two.txt", &words(9, 3_000));
    let spec = std::fs::read_to_string(scene.path("spec.toml")).expect("the scene has one");
    scene.write("mixed.toml", &format!("{spec}{MIXTURE}"));
    scene
}

const TRAIN: &str = "pretrain mixed.toml --corpus text.txt --set train.steps=24";

/// The note of a verification that speaks of a corpus: samples taken of it.
fn samples_of(report: &Value, what: &str) -> u64 {
    let notes = report["notes"].as_array().expect("notes");
    let note = notes
        .iter()
        .filter_map(Value::as_str)
        .find(|note| note.contains(what));
    let note = note.unwrap_or_else(|| panic!("{what}: {report}"));
    let number = note.split(' ').next().expect("it begins with a number");
    number.parse().expect("a number")
}

#[test]
fn a_mixture_has_its_shares_and_the_same_bits_on_any_cluster() {
    let scene = scene();
    let events = scene.events(&format!("{TRAIN} --name mixed --local 1"));
    let last = finished(&events).clone();
    let mut splits: Vec<&str> = events
        .iter()
        .filter_map(|event| event["split"].as_str())
        .collect();
    splits.sort_unstable();
    splits.dedup();
    assert_eq!(splits, ["one_validation", "tales_validation", "validation"]);

    // Of 9 steps half the samples are the run's own, and a sixth tales; of the other 15 none, and half.
    let report = scene.events("verify mixed");
    let report = report.last().expect("a report");
    assert_eq!(report["contradictions"], 0, "{report}");
    let own = report["samples"].as_u64().expect("samples");
    let (tales, more) = (samples_of(report, "`tales`"), samples_of(report, "`one`"));
    let all = own + tales + more;
    let per_step = all / 24;
    assert_eq!(all, per_step * 24, "{own} {tales} {more}");
    assert_eq!(own, per_step * 9 / 2);
    assert_eq!(tales, per_step * 9 / 6 + per_step * 15 / 2);

    // The same command on two workers.
    let other = self::scene();
    let again = other.finished(&format!("{TRAIN} --local 2"));
    assert_eq!(again["state_hash"], last["state_hash"]);
}

#[cfg(unix)]
#[test]
fn a_mixture_survives_kills() {
    let scene = scene();
    let reference = Reference::of(&scene, TRAIN, 2);
    let other = self::scene();
    let mut cluster = Cluster::start(&other, 2);
    cluster.submit(TRAIN);
    cluster.wait_for_step(5);
    cluster.kill_coordinator();
    cluster.restart_coordinator();
    cluster.wait_for_step(11);
    cluster.workers[0].kill();
    cluster.finish();
    assert_eq!(reference.differences(&cluster), Vec::<String>::new());
}

#[test]
fn what_is_mixed_in_by_a_flag_needs_a_weight_and_text() {
    let scene = scene();
    let fails = |flags: &str| {
        scene.fails(&format!(
            "pretrain spec.toml --corpus text.txt --local 1 {flags}"
        ))
    };
    let said = fails("--mix tales.txt");
    assert!(
        said.contains("`--mix tales.txt` is no path with a weight"),
        "{said}"
    );
    let said = fails("--mix nowhere.txt=1");
    assert!(said.contains("nowhere.txt"), "{said}");
    let said = fails("--mix tales.txt=1 --mix tales.txt=2");
    assert!(said.contains("give each corpus another `name`"), "{said}");
    // The plan counts what is of the run's own corpus.
    let epochs = |flags: &str| {
        let output = scene.run(&format!("plan spec.toml --corpus text.txt --json {flags}"));
        let plan: Value =
            serde_json::from_str(text(&output.stdout).lines().last().expect("a plan"))
                .expect("JSON");
        plan["epochs"].as_f64().unwrap_or_else(|| panic!("{plan}"))
    };
    let (alone, mixed) = (epochs(""), epochs("--mix tales.txt=3"));
    assert!((mixed / alone - 0.25).abs() < 0.02, "{mixed} of {alone}");
}
