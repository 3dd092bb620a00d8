//! What a run will take, said before it is begun: figures that can be checked, bytes that the wire really carries, and
//! the plan beside what the run has taken.

use std::fmt::Write;

use insta::assert_snapshot;
use serde_json::Value;

use crate::support::cluster::{Cluster, RUN};
use crate::support::{Scene, text, words};

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("`{value}` is no number"))
}

/// What the wire carries with so many workers.
fn wire(plan: &Value, workers: u64) -> &Value {
    let all = plan["wire"].as_array().expect("a list");
    let found = all.iter().find(|wire| wire["workers"] == workers);
    found.expect("it is planned for so many")
}

fn plan(scene: &Scene, line: &str) -> Value {
    scene.events(&format!("plan {line}")).remove(0)
}

#[test]
fn a_plan_needs_neither_coordinator_nor_home() {
    let scene = Scene::new();
    let plan = plan(&scene, "spec.toml --corpus text.txt --no-measure");
    // 32 wide and 300 tokens; two blocks of 32 x (32 + 16 + 16 + 32) + 3 x 32 x 64 and two norms; one norm.
    let (embedding, blocks) = (300 * 32, 2 * (32 * 96 + 3 * 32 * 64 + 64) + 32);
    let parameters = &plan["parameters"];
    assert_eq!(parameters["non_embedding"], blocks);
    assert_eq!(parameters["total"], embedding + blocks);
    assert_eq!(parameters["trained"], parameters["total"]);
    // 12 steps of 6 lanes x 2 micro-batches x 2 samples of 32 tokens.
    assert_eq!(plan["tokens"], 12 * 24 * 32);
    let matrices = number(&parameters["total"]) - 5.0 * 32.0;
    let attention = 12.0 * 2.0 * 32.0 * 32.0;
    assert_eq!(number(&plan["flops_per_token"]), 6.0 * matrices + attention);
    let samples = number(&plan["corpus"]["samples"]);
    assert_eq!(number(&plan["epochs"]), 12.0 * 24.0 / samples);
    assert_eq!(plan["corpus"]["estimated"], false);
    let gradient = 4 * (embedding + blocks);
    assert_eq!(wire(&plan, 1)["sent"], 0);
    assert_eq!(wire(&plan, 2)["sent"], 2 * gradient);
    assert_eq!(wire(&plan, 6)["coordinator_sent"], 6 * gradient);
    // Every 4 of 12 steps; two and the best stay.
    assert_eq!(plan["checkpoints"]["total"], 3 * 3 * gradient);
    assert_eq!(plan["measured"], Value::Null);
    assert_eq!(plan["estimates"], Value::Array(Vec::new()));

    let kept = std::fs::read_dir(scene.path("home")).expect("a home");
    let kept: Vec<_> = kept
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert_eq!(kept, ["plans"], "nothing but the plan is left behind");
    let said = text(&scene.run("plan --preset tiny --no-measure").stdout);
    assert!(said.contains("speed       not measured"), "{said}");
    assert!(!said.contains("tokens/s"), "{said}");
}

#[test]
fn times_follow_from_a_measurement() {
    let scene = Scene::new();
    let line = "--preset tiny --corpus text.txt --threads 1 --bandwidth";
    let plan = plan(&scene, &format!("{line} 0.5"));
    let speed = &plan["measured"];
    assert!(number(&speed["passes"]) > 1.0, "{speed}");
    let (gradient, update) = (
        number(&speed["gradient_seconds"]),
        number(&speed["update_seconds"]),
    );
    let estimates = plan["estimates"].as_array().expect("a list");
    assert_eq!(estimates.len(), 3, "1, 2 and 4 workers");
    for estimate in estimates {
        let workers = number(&estimate["workers"]);
        let busy = number(&wire(&plan, workers as u64)["coordinator_sent"]);
        let exchange = busy / (0.5e9 / 8.0);
        let step = gradient / workers + update + exchange;
        assert!((number(&estimate["step_seconds"]) / step - 1.0).abs() < 1e-9);
        assert!(number(&estimate["seconds"]) > 200.0 * step);
        let speed = number(&plan["tokens_per_step"]) / step;
        assert!((number(&estimate["tokens_per_second"]) / speed - 1.0).abs() < 1e-9);
    }
}

#[test]
fn what_is_planned_for_the_wire_is_what_it_carries() {
    const STEPS: u64 = 220;
    let scene = Scene::new();
    // With one lane each nothing depends on who is faster.
    let line = format!(
        "--preset tiny --corpus text.txt --set train.lanes=2 --set train.steps={STEPS} --set train.min_workers=2 --set train.eval_every=0 --set checkpoint.every=0"
    );
    let planned = plan(&scene, &format!("{line} --no-measure"));
    let mut cluster = Cluster::start(&scene, 2);
    // The second worker sends its gradients; the first shares memory with the coordinator.
    let before = cluster.workers[1].proxy.carried();
    cluster.submit(&format!("pretrain {line}"));
    cluster.finish();
    let after = cluster.workers[1].proxy.carried();
    let wire = wire(&planned, 2);
    for (way, name) in [(0, "sent"), (1, "received")] {
        let carried = (after[way] - before[way]) as f64 / STEPS as f64;
        let planned = number(&wire[name]);
        println!("{name} per step: planned {planned}, carried {carried}");
        assert!((carried / planned - 1.0).abs() < 0.1, "{carried} {planned}");
    }
    // A coordinator that runs is asked.
    let found = plan(&scene, &format!("--against {RUN}"));
    assert_eq!(
        (&found["kept"], &found["measured"]),
        (&true.into(), &false.into())
    );
    assert_eq!(found["workers"], 2);
    assert_eq!(found["planned"]["tokens"], found["actual"]["tokens"]);
    assert_eq!(found["planned"]["tokens_per_second"], Value::Null);
    let ratio = number(&found["actual"]["checkpoint_bytes"])
        / number(&found["planned"]["checkpoint_bytes"]);
    assert!((1.0..1.2).contains(&ratio), "{found}");
}

#[test]
fn a_run_is_compared_with_its_plan() {
    let scene = Scene::new();
    let line = "spec.toml --corpus text.txt";
    plan(&scene, &format!("{line} --threads 1"));
    scene.finished(&format!("pretrain {line} --local 2 --name small"));
    let found = plan(&scene, "--against small");
    assert_eq!(
        (&found["kept"], &found["measured"]),
        (&true.into(), &true.into())
    );
    let (planned, actual) = (&found["planned"], &found["actual"]);
    for name in ["steps", "tokens"] {
        assert_eq!(planned[name], actual[name]);
    }
    for name in ["tokens_per_second", "step_seconds", "seconds"] {
        assert!(
            number(&planned[name]) > 0.0 && number(&actual[name]) > 0.0,
            "{found}"
        );
    }
    let baselines = &found["baselines"];
    assert!((number(&baselines["uniform"]) - 300f64.ln()).abs() < 1e-9);
    assert!(
        number(&baselines["ngram"]["loss"]) < number(&baselines["unigram"]),
        "{found}"
    );
    assert!(number(&found["val_loss"]) > 0.0);
    let said = text(&scene.run("plan --against small").stdout);
    assert!(
        said.contains("actual / planned") && said.contains("by counting alone: uniform 5.70"),
        "{said}"
    );
    let shown = scene.events("corpus show text").remove(0);
    assert_eq!(&shown["baselines"], baselines);

    // Nobody has planned this one; and baselines that are gone are made again.
    let fingerprint = shown["fingerprint"].as_str().expect("text");
    let file = scene.path(&format!("home/corpora/{fingerprint}/baseline.json"));
    std::fs::remove_file(&file).expect("they are kept there");
    scene.finished(&format!(
        "pretrain {line} --set train.steps=4 --local 1 --name other"
    ));
    let found = plan(&scene, "--against other");
    assert_eq!(found["kept"], false);
    assert_eq!(found["planned"]["steps"], 4);
    assert_eq!(found["planned"]["seconds"], Value::Null);
    assert_eq!(&found["baselines"], baselines);
    let said = text(&scene.run("plan --against other").stdout);
    assert!(said.contains("no plan was kept for this run"), "{said}");
}

#[test]
fn finetuning_is_planned_from_its_checkpoint() {
    let scene = Scene::new();
    scene.finished("pretrain spec.toml --corpus text.txt --set model.context=64 --set train.steps=2 --local 1 --name base");
    let mut pairs = String::new();
    for word in words(3, 200).split_whitespace() {
        writeln!(pairs, r#"{{"prompt": "{word}", "response": "the {word}"}}"#).expect("a line");
    }
    scene.write("pairs.jsonl", &pairs);
    let line = "--from base --sft pairs.jsonl --set lora.rank=4";
    let planned = plan(&scene, &format!("{line} --threads 1"));
    assert_eq!(planned["spec"]["kind"], "finetune");
    let trained = number(&planned["parameters"]["trained"]);
    assert!(
        trained < 0.5 * number(&planned["parameters"]["total"]),
        "{planned}"
    );
    assert_eq!(number(&wire(&planned, 2)["received"]), 4.0 * trained);
    assert_eq!(number(&planned["checkpoints"]["each"]), 12.0 * trained);
    scene.finished(&format!("finetune {line} --local 1 --name tuned"));
    let found = plan(&scene, "--against tuned");
    assert_eq!(
        (&found["kept"], &found["measured"]),
        (&true.into(), &true.into())
    );
}

#[test]
fn a_long_text_that_nobody_has_prepared_is_estimated() {
    let scene = Scene::new();
    scene.write("long.txt", &words(1, 900_000));
    let planned = plan(&scene, "--preset tiny --corpus long.txt --no-measure");
    assert_eq!(planned["corpus"]["estimated"], true);
    assert_eq!(
        planned["assumed"].as_array().map(Vec::len),
        Some(1),
        "{planned}"
    );
    // Tokens of 2.5 bytes, but for the tenth that validates.
    let bytes = std::fs::metadata(scene.path("long.txt"))
        .expect("a file")
        .len() as f64;
    let tokens = number(&planned["corpus"]["tokens"]);
    assert!(
        (tokens / (0.9 * bytes / 2.5) - 1.0).abs() < 0.01,
        "{planned}"
    );
}

#[test]
fn what_cannot_be_planned_is_named() {
    let scene = Scene::new();
    let fails = |line: &str| {
        let said = scene.fails(&format!("plan {line}"));
        said.replace(&scene.path("").display().to_string(), "[DIR]/")
    };
    assert_snapshot!(fails("--against nobody"), @r"
    error: there is no home directory `[DIR]/home`; nothing was trained there yet, or `--home` names another
    ");
    assert_snapshot!(fails("spec.toml --corpus absent.txt"), @r"
    error: `absent.txt` names no file; check the spelling
    ");
    assert_snapshot!(fails("--preset huge"), @r"
    error: there is no preset `huge`; there are tiny, shakespeare-quick, nanogpt-shakespeare-cpu, shakespeare-cpu, small, gpt2
    ");
    assert_snapshot!(fails("--preset tiny --device gpu"), @r"
    error: unknown device `gpu`; use `auto`, `cpu` or `cuda:N`
    ");
    scene.write("short.txt", "a few words");
    assert_snapshot!(fails("--preset tiny --corpus short.txt --no-measure"), @r"
    error: the train split has 10 tokens, but one sample of context 64 takes 65; give more text or a shorter context
    ");
    for usage in [
        "--preset tiny --bandwidth 0",
        "--preset tiny --no-measure --threads 2",
        "spec.toml --against small",
    ] {
        let output = scene.cohort(&format!("plan {usage}")).output();
        assert_eq!(
            output.expect("the binary runs").status.code(),
            Some(2),
            "{usage}"
        );
    }
    assert!(!scene.path("home").exists(), "nothing is kept");
}
