//! The life of a run: paused, resumed, taken in again.

use std::path::Path;

use serde_json::Value;

use crate::support::{Process, Scene, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";

fn event(line: &str) -> Value {
    serde_json::from_str(line).expect("an event")
}

/// What `status` knows of a run.
fn status(scene: &Scene, run: &str) -> Value {
    scene.events(&format!("status {run}")).remove(0)
}

fn worker(scene: &Scene, url: &str) -> Process {
    scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ))
}

#[test]
fn a_paused_run_rests_until_it_is_resumed_to_the_same_bits() {
    let scene = Scene::new();
    let long = format!("{TRAIN} --set train.steps=300 --set checkpoint.every=0");
    let expected = scene.finished(&format!("{long} --local 1 --name whole"));
    let (mut coordinator, url) = scene.coordinator("");
    let first = worker(&scene, &url);
    let mut run = scene.start(&format!("{long} --new --name cut --json"));
    run.wait_for_step(10);
    let said = text(&scene.run("pause cut").stdout);
    assert!(said.contains("cut is paused at step"), "{said}");
    assert!(said.contains("`cohort resume cut` goes on"), "{said}");
    let paused = event(&run.wait_for("\"paused\""));
    let step = paused["step"].as_u64().expect("a step");
    assert!((10..300).contains(&step), "{paused}");
    assert_eq!(run.wait(), Some(130), "{}", run.printed());
    let said = scene.fails("pause cut");
    assert!(said.contains("rests already: it is paused"), "{said}");

    // Its worker is free, and a following of it ends.
    scene.finished(&format!("{TRAIN} --name other"));
    let mut follow = scene.start("follow cut");
    follow.wait_for("`cohort resume cut` goes on");
    assert_eq!(follow.wait(), Some(130));

    coordinator.kill();
    drop(first);
    let said = scene.fails("resume cut");
    assert!(
        said.contains("which is paused") && said.contains("`cohort pretrain --resume cut --local"),
        "{said}"
    );
    let (_coordinator, url) = scene.coordinator("");
    let _worker = worker(&scene, &url);
    let info = status(&scene, "cut");
    assert_eq!(
        (&info["status"], info["step"].as_u64()),
        (&Value::from("paused"), Some(step))
    );

    let said = text(&scene.run("resume cut").stdout);
    assert!(said.contains(&format!("from step {step}")), "{said}");
    let mut follow = scene.start("follow cut --json");
    let last = event(&follow.wait_for("\"finished\""));
    assert_eq!(last["state_hash"], expected["state_hash"]);
    let said = scene.fails("resume cut");
    assert!(said.contains("has finished its 300 steps"), "{said}");
}

#[test]
fn a_checkpoint_now_changes_neither_the_weights_nor_the_ledger() {
    let scene = Scene::new();
    let long = format!("{TRAIN} --set train.steps=300 --set checkpoint.every=0");
    let expected = scene.finished(&format!("{long} --local 1 --name whole"));
    let (_coordinator, url) = scene.coordinator("");
    let _worker = worker(&scene, &url);
    let _other = worker(&scene, &url);
    let mut run = scene.start(&format!("{long} --new --name saved --json"));
    run.wait_for_step(10);
    scene.run(&format!("{TRAIN} --detach --new --name next"));
    let said = scene.fails("checkpoint next");
    assert!(said.contains("waits in the queue"), "{said}");
    let info = scene.events("checkpoint saved").remove(0);
    // The second worker may have joined by one of its own.
    let newest = info["checkpoints"].as_array().and_then(|all| all.last());
    let step = newest.expect("one")["step"].as_u64().expect("a step");
    assert!((10..300).contains(&step), "{info}");
    assert_eq!(info["status"], "running");
    let said = text(&scene.run("checkpoint saved").stdout);
    assert!(said.contains("saved has a checkpoint of step"), "{said}");
    scene.run(&format!(
        "generate --from saved@{step} --prompt the --max-tokens 4"
    ));
    let end = event(&run.wait_for("\"finished\""));
    assert_eq!(end["state_hash"], expected["state_hash"]);
    let ledger = |run: &str| text(&scene.run(&format!("ledger {run}")).stdout);
    assert_eq!(ledger("saved"), ledger("whole"));
    let report = scene.events("verify saved").remove(0);
    assert_eq!(report["contradictions"], 0, "{report}");
    let said = scene.fails("checkpoint saved");
    assert!(said.contains("rests: it is finished"), "{said}");
    let said = scene.fails("checkpoint nobody");
    assert!(said.contains("there is no run `nobody`"), "{said}");
}

#[test]
fn a_queued_run_is_paused_at_once_and_queues_again() {
    let scene = Scene::new();
    let (_coordinator, _) = scene.coordinator("");
    for name in ["one", "two"] {
        scene.run(&format!("{TRAIN} --detach --new --name {name}"));
    }
    let said = scene.fails("resume two");
    assert!(said.contains("waits in the queue already"), "{said}");
    let said = scene.fails("resume one");
    assert!(said.contains("under way already"), "{said}");
    let info = scene.events("pause two").remove(0);
    assert_eq!(
        (&info["status"], &info["step"]),
        (&"paused".into(), &0.into())
    );
    let said = text(&scene.run("resume two").stdout);
    assert!(said.contains("waits in the queue, place 1"), "{said}");
    // A run that waits for workers can be paused, too; the next one then waits for them.
    scene.run("pause one");
    assert_eq!(status(&scene, "one")["status"], "paused");
    assert_eq!(status(&scene, "two")["status"], "running");
    scene.run("cancel one");
    assert_eq!(status(&scene, "one")["status"], "cancelled");
    let said = scene.fails("pause nobody");
    assert!(said.contains("there is no run `nobody`"), "{said}");
}

/// Makes a database unreadable, with all that lies beside it.
fn damage(database: &Path) {
    for beside in ["db-wal", "db-shm"] {
        let _ = std::fs::remove_file(database.with_extension(beside));
    }
    std::fs::write(database, "no page of a database ".repeat(900)).expect("it can be written");
}

#[test]
fn a_damaged_database_is_moved_away_and_runs_are_taken_in_again() {
    let scene = Scene::new();
    let done = scene.finished(&format!("{TRAIN} --local 1 --name done"));
    // It stands at step 8 of 12: its last checkpoint is gone.
    let cut = scene.finished(&format!("{TRAIN} --local 1 --new --name cut"));
    let last = Path::new(cut["checkpoint"].as_str().expect("a path")).to_owned();
    std::fs::remove_dir_all(&last).expect("the checkpoint is there");

    let database = scene.path("home").join("cohort.db");
    damage(&database);
    let said = scene.fails("coordinator --listen 127.0.0.1:0");
    let advice = format!("`mv {0} {0}.damaged`", database.display());
    assert!(
        said.contains("is damaged") && said.contains(&advice),
        "{said}"
    );
    let away = database.with_extension("db.damaged");
    std::fs::rename(&database, away).expect("the database is moved");

    let (mut coordinator, _) = scene.coordinator("");
    let listed = text(&scene.run("runs").stdout);
    assert!(
        listed.contains("done") && listed.contains("cut"),
        "{listed}"
    );
    let info = status(&scene, "done");
    assert_eq!(
        (&info["status"], &info["step"]),
        (&"finished".into(), &12.into())
    );
    assert_eq!(info["checkpoints"][1]["state_hash"], done["state_hash"]);
    scene.run("generate --from done --prompt the --max-tokens 4");
    let info = status(&scene, "cut");
    assert_eq!(info["step"], 8);
    scene.run("generate --from cut@8 --prompt the --max-tokens 4");

    let ledger = last.with_file_name("step-00000008").join("ledger.jsonl");
    if ledger.exists() {
        assert_eq!(info["status"], "interrupted");
        coordinator.kill();
        let again = scene.finished("pretrain --resume cut --local 1");
        assert_eq!(again["state_hash"], done["state_hash"]);
    } else {
        assert_eq!(info["status"], "failed");
        let said = scene.fails("resume cut");
        assert!(said.contains("it cannot go on from there"), "{said}");
    }
}
