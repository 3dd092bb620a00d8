//! What `ledger` and `verify` say of a run: of a whole one in numbers, of a changed one what was changed.

use std::path::PathBuf;

use cohort_common::ledger::Entry;
use rusqlite::{Connection, params};
use serde_json::Value;

use crate::support::{Scene, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";

/// A scene with a finished run `base`; gives its last checkpoint, too.
fn trained() -> (Scene, PathBuf) {
    let scene = Scene::new();
    let done = scene.finished(&format!("{TRAIN} --local 1 --name base"));
    let checkpoint = done["checkpoint"].as_str().expect("a path").into();
    (scene, checkpoint)
}

/// The numbers of `verify --json`, without contradiction.
fn verified(scene: &Scene, flags: &str) -> Vec<Value> {
    let lines = scene.events(&format!("verify base {flags}"));
    assert_eq!(lines[0]["event"], "verify");
    assert_eq!(lines[0]["contradictions"], 0, "{}", lines[0]);
    lines
}

fn database(scene: &Scene) -> Connection {
    Connection::open(scene.path("home").join("cohort.db")).expect("the database is there")
}

#[test]
fn a_whole_run_is_verified_in_numbers() {
    let (scene, checkpoint) = trained();
    let report = &verified(&scene, "")[0];
    for (field, value) in [
        ("step", 12),
        ("entries", 12),
        ("lanes", 12 * 6),
        ("samples", 12 * 24),
        ("earlier_horizon", 0),
    ] {
        assert_eq!(report[field], value, "{field}: {report}");
    }
    let number = |field: &str| report[field].as_u64().expect("a number");
    let walked = number("epochs") * number("epoch_samples") + number("partial_samples");
    assert_eq!(walked, 12 * 24, "{report}");
    assert!(number("checkpoints") >= 2, "{report}");
    assert_eq!(number("checkpoint_ledgers"), number("checkpoints"));
    assert_eq!(report["notes"], serde_json::json!([]));

    let said = text(&scene.run("verify base").stdout);
    for words in [
        "base, finished at step 12",
        "72, 6 in a step",
        "no contradiction",
    ] {
        assert!(said.contains(words), "{said}");
    }
    // The ledger that a checkpoint of the end carries is the one that is printed.
    let printed = text(&scene.run("ledger base").stdout);
    let carried = std::fs::read_to_string(checkpoint.join("ledger.jsonl"));
    assert_eq!(printed, carried.expect("the checkpoint has a ledger"));
    scene.run("export base out");
    assert!(!scene.path("out/ledger.jsonl").exists());

    let unknown = scene.fails("verify nobody");
    assert!(unknown.contains("there is no run `nobody`"), "{unknown}");
    let unknown = scene.fails("ledger nobody");
    assert!(unknown.contains("there is no run `nobody`"), "{unknown}");
    let beyond = scene.fails("verify base --replay 13");
    assert!(beyond.contains("12 committed steps"), "{beyond}");
}

#[test]
fn a_coordinator_says_the_same_and_steps_are_replayed() {
    let (scene, _) = trained();
    // From the checkpoint of step 8, with a private coordinator.
    let lines = verified(&scene, "--replay 10 --threads 1");
    assert_eq!(lines[1]["event"], "replay");
    assert_eq!(lines[1]["contradiction"], Value::Null);
    assert_eq!(
        (&lines[1]["from"], &lines[1]["steps"]),
        (&8.into(), &2.into())
    );
    let offline = text(&scene.run("ledger base").stdout);
    let (_coordinator, _) = scene.coordinator("");
    assert_eq!(verified(&scene, "")[0], lines[0]);
    assert_eq!(text(&scene.run("ledger base").stdout), offline);
    // From the seed: checkpoints before step 3 there are none.
    let lines = verified(&scene, "--replay 3");
    assert_eq!(
        (&lines[1]["from"], &lines[1]["steps"]),
        (&0.into(), &3.into())
    );
    let unknown = scene.fails("verify nobody");
    assert!(unknown.contains("there is no run `nobody`"), "{unknown}");
}

#[test]
fn a_flipped_byte_in_a_checkpoint_is_a_contradiction() {
    let (scene, checkpoint) = trained();
    let moments = checkpoint.join("optimizer.safetensors");
    let mut bytes = std::fs::read(&moments).expect("the moments are there");
    let last = bytes.len() - 5;
    bytes[last] ^= 1;
    std::fs::write(&moments, bytes).expect("the moments can be written");
    let said = scene.fails("verify base");
    assert!(
        said.starts_with("error: ") && said.contains("optimizer.safetensors"),
        "{said}"
    );
}

#[test]
fn a_changed_entry_is_a_contradiction() {
    let (scene, _) = trained();
    let database = database(&scene);
    let read = |step: i64| -> Vec<u8> {
        let sql = "SELECT entry FROM ledger WHERE run = 'base' AND step = ?1";
        database
            .query_row(sql, [step], |row| row.get(0))
            .expect("an entry")
    };
    let write = |entry: &[u8], hash: &[u8], step: i64| {
        let sql = "UPDATE ledger SET entry = ?1, hash = ?2 WHERE run = 'base' AND step = ?3";
        let changed = database.execute(sql, params![entry, hash, step]);
        assert_eq!(changed.expect("an entry is changed"), 1);
    };
    let original = read(5);
    let entry = Entry::decode(&original).expect("an entry");
    let mut changed = original.clone();
    changed[24] ^= 1;
    write(&changed, &entry.hash(), 5);
    let said = scene.fails("verify base");
    assert!(said.contains("step 5 of run `base`"), "{said}");

    let forged = Entry {
        loss_sum: entry.loss_sum + 1.0,
        ..entry.clone()
    };
    write(&forged.encode(), &forged.hash(), 5);
    let said = scene.fails("verify base");
    assert!(said.contains("step 5 has the loss_sum"), "{said}");

    // With a whole ledger that was made up from step 12 on, only computing helps.
    write(&original, &entry.hash(), 5);
    let last = Entry::decode(&read(12)).expect("an entry");
    let forged = Entry {
        grad_norm: last.grad_norm + 1.0,
        ..last
    };
    write(&forged.encode(), &forged.hash(), 12);
    let checkpoints = scene.path("home/runs/base/checkpoints");
    std::fs::remove_dir_all(checkpoints.join("step-00000012")).expect("it is there");
    let forgotten = "DELETE FROM checkpoints WHERE run = 'base' AND step = 12";
    assert_eq!(database.execute(forgotten, []).expect("it is listed"), 1);
    verified(&scene, "");
    let said = scene.fails("verify base --replay 12 --threads 1");
    assert!(
        said.contains("step 12 was committed with the grad_norm"),
        "{said}"
    );
}

#[test]
fn clusters_of_any_size_write_the_same_ledger() {
    let scene = Scene::new();
    scene.finished(&format!("{TRAIN} --local 1 --name one"));
    scene.finished(&format!("{TRAIN} --local 3 --new --name three"));
    let one = scene.run("ledger one").stdout;
    assert_eq!(text(&one), text(&scene.run("ledger three").stdout));
    assert_eq!(text(&one).lines().count(), 12);
}

#[test]
fn a_run_that_was_given_more_steps_is_whole() {
    let (scene, _) = trained();
    scene.finished("pretrain --resume base --set train.steps=16 --local 2");
    let report = &verified(&scene, "--replay 14")[0];
    assert_eq!(report["entries"], 16);
    let earlier = report["earlier_horizon"].as_u64().expect("a number");
    assert!((1..=12).contains(&earlier), "{report}");
}
