//! What finetuning gains and loses: the report, runs that end early, samples of the base's text mixed in, previews.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Scene, finished, text, words};

const BASE: &str =
    "pretrain spec.toml --corpus text.txt --set train.steps=12 --local 2 --name base";

/// A scene with a base model and another text.
fn scene() -> Scene {
    let scene = Scene::new();
    scene.finished(BASE);
    scene.write("other.txt", &words(9, 4000));
    scene
}

#[test]
fn the_report_compares_with_scratch_and_with_less_data() {
    let scene = scene();
    let events = scene.events(
        "finetune --from base --corpus other.txt --set train.steps=6 --set train.eval_every=3 --shares 1,0.5 --prompt the \
         --report ./told --local 2 --name tales",
    );
    assert_eq!(finished(&events)["event"], "finished");
    let report = events.last().expect("events");
    assert_eq!(
        (&report["event"], &report["run"]),
        (&json!("transfer"), &json!("tales"))
    );
    let runs = report["runs"].as_array().expect("runs");
    let told: Vec<_> = runs
        .iter()
        .map(|run| json!([run["run"], run["start"], run["data_share"]]))
        .collect();
    assert_eq!(
        told,
        [
            json!(["tales", "pretrained", 1.0]),
            json!(["tales-scratch", "scratch", 1.0]),
            json!(["tales-50", "pretrained", 0.5]),
            json!(["tales-scratch-50", "scratch", 0.5]),
        ]
    );
    for run in runs {
        assert_eq!(run["losses"].as_array().map(Vec::len), Some(3), "{run}");
    }
    assert_eq!(runs[0]["base_losses"].as_array().map(Vec::len), Some(3));
    assert_eq!(report["samples"][0]["prompt"], "the");
    let read = |name: &str| fs::read(scene.path("told").join(name)).expect("it was written");
    assert!(read("transfer.png").starts_with(b"\x89PNG"));
    assert!(read("transfer.svg").starts_with(b"<svg"));
    let file: Value = serde_json::from_slice(&read("transfer.json")).expect("JSON");
    assert_eq!(file["runs"], report["runs"]);
    let words = String::from_utf8(read("transfer.txt")).expect("text");
    assert!(
        words.contains("  scratch  ") && words.contains("  base  "),
        "{words}"
    );
}

#[test]
fn a_run_that_forgets_too_much_ends_at_the_same_step_on_any_cluster() {
    let scene = scene();
    let ends = |workers: u32| {
        let events = scene.events(&format!(
            "finetune --from base --corpus other.txt --set train.steps=20 --set train.eval_every=2 \
             --set train.learning_rate=0.3 --max-forgetting 0.5 --local {workers} --name forgets-{workers} --new"
        ));
        let said = events.iter().any(|event| {
            let text = event["text"].as_str().unwrap_or_default();
            event["event"] == "note" && text.contains("train.max_forgetting")
        });
        assert!(said, "{events:?}");
        let end = finished(&events);
        (end["step"].as_u64(), end["state_hash"].clone())
    };
    let one = ends(1);
    assert!(one.0 < Some(20), "{one:?}");
    assert_eq!(one, ends(2));
    // Without patience a run goes on; with it, one that gets no better ends.
    let tired = scene.finished(
        "finetune --from base --corpus other.txt --set train.steps=20 --set train.eval_every=2 --set train.learning_rate=0.3 \
         --set train.early_stopping_patience=2 --local 1 --name tired",
    );
    assert!(tired["step"].as_u64() < Some(20), "{tired}");
}

#[test]
fn replayed_samples_are_the_same_on_any_cluster_and_are_verified() {
    let scene = scene();
    let tune = |workers: u32| {
        scene.finished(&format!(
            "finetune --from base --corpus other.txt --set train.steps=5 --replay 0.3 --local {workers} --name r{workers} --new"
        ))["state_hash"]
            .clone()
    };
    let one = tune(1);
    assert_eq!(one, tune(2));
    let without = scene.finished(
        "finetune --from base --corpus other.txt --set train.steps=5 --local 1 --name without",
    );
    assert_ne!(one, without["state_hash"]);
    let said = text(&scene.run("verify r2 --replay 3").stdout);
    assert!(said.contains("replayed from the base's corpus"), "{said}");
    assert!(said.contains("no contradiction"), "{said}");
}

#[test]
fn a_preview_marks_what_is_learned_and_counts_what_is_not_usable() {
    let scene = scene();
    scene.write(
        "chat.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a b\"}, {\"role\": \"assistant\", \"content\": \"c\"}]}\n\
         {\"messages\": [{\"role\": \"user\", \"content\": \"nobody answers\"}]}\n\
         {\"prompt\": \"d\", \"response\": \"e\"}\n",
    );
    let shown = text(&scene.run("preview --from base --sft chat.jsonl").stdout);
    assert!(shown.contains("line 2 has no turn"), "{shown}");
    assert!(shown.contains("[[c") || shown.contains("[[e"), "{shown}");
    let lines = text(
        &scene
            .run("preview --from base --sft chat.jsonl --json")
            .stdout,
    );
    let first: Value = serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    assert_eq!(first["stretches"][0]["learned"], false);
    assert_eq!(first["stretches"][1]["learned"], true);
}

#[test]
fn samples_are_scored_as_a_validation_scores_them() {
    let scene = scene();
    let line = |n: usize| {
        let label = if n.is_multiple_of(3) { "spam" } else { "ham" };
        format!(
            "{{\"text\": \"{} {}\", \"label\": \"{label}\"}}\n",
            words(n as u32, 3).trim(),
            n % 3
        )
    };
    scene.write("labelled.jsonl", &(0..120).map(line).collect::<String>());
    let events = scene.events(
        "finetune --from base --classify labelled.jsonl --set train.steps=4 --set corpus.validation=0.9 --set train.eval_samples=0 \
         --local 1 --name tells",
    );
    let validated = events
        .iter()
        .rfind(|e| e["event"] == "eval" && e["step"] == 4);
    let counted = |event: &Value| {
        let rows = event["classes"]["confusion"]
            .as_array()
            .expect("a table")
            .clone();
        let all: u64 = rows
            .iter()
            .flat_map(|r| r.as_array().expect("a row").clone())
            .filter_map(|n| n.as_u64())
            .sum();
        all
    };
    let validated = validated.expect("a validation");
    let scored = scene.events("eval --from tells --classify labelled.jsonl");
    let scored = scored.last().expect("an event");
    assert_eq!(counted(scored), 120);
    assert_eq!(
        counted(validated),
        validated["tokens"].as_u64().expect("a count")
    );
    assert!(
        (scored["loss"].as_f64().expect("a loss") - validated["loss"].as_f64().expect("a loss"))
            .abs()
            < 0.2
    );
    let said = scene.fails("eval --from base --classify labelled.jsonl");
    assert!(
        said.contains("is a language model and has no labels"),
        "{said}"
    );

    let pairs: String = (0..40)
        .map(|n| {
            format!(
                "{{\"prompt\": \"{}\", \"response\": \"{}\"}}\n",
                words(n, 2).trim(),
                words(n + 50, 2).trim()
            )
        })
        .collect();
    scene.write("pairs.jsonl", &pairs);
    let scored = scene.events("eval --from base --sft pairs.jsonl");
    let scored = scored.last().expect("an event");
    assert_eq!(scored["samples"], 40);
    assert!(
        scored["loss"].as_f64() > Some(0.0) && scored["scored"].as_u64() > Some(40),
        "{scored}"
    );
    scene.write("bad.jsonl", "{\"prompt\": \"a\", \"response\": \"\"}\n");
    let said = scene.fails("eval --from base --sft bad.jsonl");
    assert!(said.contains("bad.jsonl` line 1"), "{said}");
}
