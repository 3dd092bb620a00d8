//! What leaves Cohort as files: metrics, pictures, comparisons, event files for TensorBoard, the database.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cohort_common::tensorboard::{Item, read};
use serde_json::Value;

use crate::support::{Process, Scene, look, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";

/// A scene with two runs that differ in their learning rate.
fn scene() -> Scene {
    let scene = Scene::new();
    scene.finished(&format!("{TRAIN} --local 2 --name a"));
    let other = "--set train.learning_rate=0.02 --set train.min_learning_rate=0.002";
    scene.finished(&format!("{TRAIN} {other} --local 1 --name b"));
    scene
}

fn stdout(scene: &Scene, line: &str) -> String {
    text(&scene.run(line).stdout)
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// The points of each curve that count, as TensorBoard finds them, and whether one was there twice.
fn curves(directory: &Path) -> (BTreeMap<String, Vec<(u64, f32)>>, bool) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.sort();
    let mut curves: BTreeMap<String, Vec<(u64, f32)>> = BTreeMap::new();
    let mut doubled = false;
    for file in files {
        let take = |item| match item {
            Item::Scalar {
                tag, step, value, ..
            } => {
                let points = curves.entry(tag).or_default();
                doubled |= points.iter().any(|(known, _)| *known == step);
                points.push((step, value));
            }
            Item::Restart { step } => curves
                .values_mut()
                .for_each(|points| points.retain(|(at, _)| *at < step)),
            Item::Text { .. } => {}
        };
        read(&file, take).expect("the file can be read");
    }
    (curves, doubled)
}

/// Waits until a directory has the curve of the training loss up to a step.
fn wait_for_curve(directory: &Path, step: u64) {
    look(&format!("step {step} of the curves"), || {
        let (curves, _) = curves(directory);
        let (last, _) = *curves.get("train/loss")?.last()?;
        (last >= step).then_some(())
    });
}

#[test]
fn metrics_are_the_same_in_every_form_with_and_without_a_coordinator() {
    let scene = scene();
    let csv = stdout(&scene, "metrics a --csv");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(
        lines[0],
        "step,steps,epoch,tokens,time_ms,loss,bits_per_byte,grad_norm,learning_rate,tokens_per_second,mfu"
    );
    assert_eq!(lines.len(), 1 + 12);
    let rows: Vec<Value> = stdout(&scene, "metrics a --json")
        .lines()
        .map(json)
        .collect();
    for (row, line) in rows.iter().zip(&lines[1..]) {
        let cells: Vec<&str> = line.split(',').collect();
        for (cell, key) in [
            (5, "loss"),
            (6, "bits_per_byte"),
            (7, "grad_norm"),
            (8, "learning_rate"),
        ] {
            let number: f64 = cells[cell].parse().expect("a number");
            assert_eq!(Some(number), row[key].as_f64(), "{line}");
        }
    }
    let evals = stdout(&scene, "metrics a --evals --csv");
    let steps: Vec<&str> = evals
        .lines()
        .map(|l| l.split(',').next().expect("one"))
        .collect();
    assert_eq!(steps, ["step", "0", "6", "12"]);
    assert_eq!(
        stdout(&scene, "metrics a --csv --from 3 --to 5")
            .lines()
            .count(),
        1 + 3
    );
    let newest = stdout(&scene, "metrics a --json --last 2");
    assert_eq!(
        newest
            .lines()
            .map(|l| json(l)["step"].clone())
            .collect::<Vec<_>>(),
        [11, 12]
    );
    let table = stdout(&scene, "metrics a");
    assert!(
        table.starts_with("step  steps") && table.lines().count() == 13,
        "{table}"
    );

    let (_coordinator, _url) = scene.coordinator("");
    assert_eq!(stdout(&scene, "metrics a --csv"), csv);
    let told = stdout(&scene, "follow a --json");
    let events: Vec<Value> = told.lines().map(json).collect();
    for row in &rows {
        let same = |event: &&Value| event["event"] == "step" && event["step"] == row["step"];
        let event = events.iter().find(same).expect("the step's event");
        for key in ["loss", "grad_norm", "tokens", "steps"] {
            assert_eq!(event[key], row[key], "{row}");
        }
    }
    let said = scene.fails("metrics nobody --csv");
    assert!(said.contains("there is no run `nobody`"), "{said}");
}

#[test]
fn runs_are_compared_and_drawn() {
    let scene = scene();
    let report = stdout(&scene, "compare a b -o both.svg");
    let has = |wanted: &[&str]| {
        let mut lines = report.lines();
        let found = lines.any(|line| line.split_whitespace().collect::<Vec<_>>() == wanted);
        assert!(found, "{wanted:?}: {report}");
    };
    has(&["train.learning_rate", "0.01", "0.02"]);
    has(&["status", "finished", "finished"]);
    has(&["loss", "up", "to", "step", "a", "b"]);
    assert!(
        report.contains("\nvalidation loss ") && report.contains("\nstate "),
        "{report}"
    );
    assert!(!report.contains("train.lanes"), "{report}");
    assert!(stdout(&scene, "compare a b --all").contains("train.lanes"));
    let compared = scene.events("compare a b").remove(0);
    assert_eq!(
        compared["spec"]["train.learning_rate"],
        serde_json::json!([0.01, 0.02])
    );
    assert_eq!(compared["losses"].as_array().map(Vec::len), Some(8));
    let drawn = fs::read_to_string(scene.path("both.svg")).expect("it was drawn");
    assert!(
        drawn.contains("b validation") && drawn.contains("a, b</text>"),
        "{drawn}"
    );

    scene.run("plot a --metric loss --metric grad-norm -o a.png --log --x tokens --smooth 0.5");
    let png = fs::read(scene.path("a.png")).expect("it was drawn");
    let size = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().expect("four bytes"));
    assert_eq!((&png[1..4], size(16), size(20)), (&b"PNG"[..], 1920, 2160));
    scene.run("plot a b -o time.svg --x time --from 3 --to 9 --baselines");
    let drawn = fs::read_to_string(scene.path("time.svg")).expect("it was drawn");
    assert!(
        drawn.contains("seconds</text>") && drawn.contains(">uniform"),
        "{drawn}"
    );

    for (line, reason) in [
        ("plot a -o loss.pdf", "give it the ending `.svg` or `.png`"),
        ("plot nobody -o loss.svg", "there is no run `nobody`"),
        ("plot a --from 99 -o loss.svg", "there is no loss to draw"),
        ("compare a nobody", "there is no run `nobody`"),
        ("compare a b -o both", "give it the ending `.svg` or `.png`"),
        (
            "plot a -o nowhere/loss.svg",
            "cannot write `nowhere/loss.svg`",
        ),
    ] {
        let said = scene.fails(line);
        assert!(said.contains(reason), "{line}: {said}");
    }
    let output = scene
        .cohort("plot a --metric lost -o a.svg")
        .output()
        .expect("it runs");
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(2) && said.contains("grad-norm"),
        "{said}"
    );
}

#[test]
fn a_whole_run_is_written_for_tensorboard_once() {
    let scene = scene();
    let said = stdout(&scene, "metrics a --tensorboard board");
    assert!(said.starts_with("12 new steps in "), "{said}");
    let directory = scene.path("board").join("a");
    let (found, _) = curves(&directory);
    let rows: Vec<Value> = stdout(&scene, "metrics a --json")
        .lines()
        .map(json)
        .collect();
    let losses: Vec<(u64, f32)> = rows
        .iter()
        .map(|row| {
            (
                row["step"].as_u64().expect("a step"),
                row["loss"].as_f64().expect("a loss") as f32,
            )
        })
        .collect();
    assert_eq!(found["train/loss"], losses);
    let validations: Vec<u64> = found["validation/loss"]
        .iter()
        .map(|(step, _)| *step)
        .collect();
    assert_eq!(validations, [0, 6, 12]);
    let said = stdout(&scene, "metrics a --tensorboard board");
    assert!(said.starts_with("0 new steps in "), "{said}");
    let (again, doubled) = curves(&directory);
    assert_eq!((again, doubled), (found, false));
    scene.write("file", "");
    let said = scene.fails("metrics a --tensorboard file");
    assert!(said.contains("cannot write event files to"), "{said}");
}

fn worker(scene: &Scene, url: &str) -> Process {
    scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ))
}

#[test]
fn a_coordinator_keeps_event_files_up_to_date_and_goes_on_after_it_was_killed() {
    let scene = Scene::new();
    let (mut coordinator, url) = scene.coordinator("--tensorboard board");
    let first = worker(&scene, &url);
    let long = "--set train.steps=300 --set checkpoint.every=20 --set train.eval_every=50";
    let mut run = scene.start(&format!("{TRAIN} {long} --name live --json"));
    run.wait_for_step(30);
    let directory = scene.path("board").join("live");
    wait_for_curve(&directory, 20);
    coordinator.kill();
    drop((first, run));

    let (_coordinator, url) = scene.coordinator("--tensorboard board");
    let _worker = worker(&scene, &url);
    let mut follow = scene.start("follow live --json");
    follow.wait_for("\"finished\"");
    wait_for_curve(&directory, 300);
    let (curves, _) = curves(&directory);
    let steps: Vec<u64> = curves["train/loss"].iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, (1..=300).collect::<Vec<_>>());
    let rows: Vec<Value> = stdout(&scene, "metrics live --json")
        .lines()
        .map(json)
        .collect();
    let kept: Vec<f32> = rows
        .iter()
        .map(|row| row["loss"].as_f64().expect("a loss") as f32)
        .collect();
    let shown: Vec<f32> = curves["train/loss"].iter().map(|(_, loss)| *loss).collect();
    assert_eq!(shown, kept);
    let files = fs::read_dir(&directory).expect("the directory").count();
    assert!(files >= 2, "a new file for each process: {files}");
}

#[test]
fn a_local_cluster_keeps_event_files_too() {
    let scene = Scene::new();
    let flags = "--workers 1 --threads 1 --listen 127.0.0.1:0 --tensorboard board";
    let mut cluster = scene.start(&format!("local {flags}"));
    cluster.wait_for("Ctrl-C ends the cluster");
    scene.finished(&format!("{TRAIN} --name one"));
    wait_for_curve(&scene.path("board").join("one"), 12);
}

#[test]
fn a_directory_that_cannot_be_made_is_said_before_anything_trains() {
    let scene = Scene::new();
    scene.write("file", "");
    let said = scene.fails("coordinator --listen 127.0.0.1:0 --tensorboard file/board");
    assert!(
        said.contains("choose another with `--tensorboard`"),
        "{said}"
    );
}

#[test]
fn the_database_can_be_read_by_others_while_a_run_trains() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let _worker = worker(&scene, &url);
    let mut run = scene.start(&format!("{TRAIN} --set train.steps=200 --name live --json"));
    run.wait_for_step(5);
    let path = scene.path("home").join("cohort.db");
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let database = rusqlite::Connection::open_with_flags(path, flags).expect("it can be opened");
    let sql = "SELECT count(*), min(loss) FROM steps WHERE run = 'live'";
    let (steps, loss): (i64, f64) = database
        .query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))
        .expect("it can be read");
    assert!(steps >= 5 && loss.is_finite());
    assert!(database.execute("DELETE FROM runs", []).is_err());
    run.wait_for("\"finished\"");
}
