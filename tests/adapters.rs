//! Finetuning on samples, with adapters and with labels: from a base to one merged model, to the same bits on any cluster,
//! and what is said of inputs that cannot be used.

use std::fmt::Write;
use std::fs;

use insta::assert_snapshot;
use serde_json::Value;

use crate::support::cluster::Cluster;
use crate::support::{Scene, text, words};

const BASE: &str = "pretrain spec.toml --corpus text.txt --set model.context=64 --set train.steps=60 --local 2 --name base";
const GREEDY: &str = "--prompt the --max-tokens 12 --temperature 0 --threads 1";

/// A scene with a base model, prompts with responses, and labelled texts.
fn scene() -> Scene {
    let scene = Scene::new();
    scene.finished(BASE);
    let (pairs, labelled) = samples(160);
    scene.write("pairs.jsonl", &pairs);
    scene.write("labelled.jsonl", &labelled);
    scene
}

/// So many lines of each kind.
fn samples(count: usize) -> (String, String) {
    let (mut pairs, mut labelled) = (String::new(), String::new());
    let text = words(5, 7 * count);
    let mut all = text.split_whitespace();
    for n in 0..count {
        let mut next = |count: usize| {
            let words: Vec<&str> = all.by_ref().take(count).collect();
            words.join(" ")
        };
        let (prompt, response) = (next(2), next(1 + n % 4));
        writeln!(
            pairs,
            r#"{{"prompt": "{prompt}", "response": "{response}"}}"#
        )
        .expect("a line");
        let label = if prompt.contains('a') { "ham" } else { "spam" };
        writeln!(
            labelled,
            r#"{{"text": "{prompt} {response}", "label": "{label}"}}"#
        )
        .expect("a line");
    }
    (pairs, labelled)
}

fn hash(event: &Value) -> &Value {
    &event["state_hash"]
}

#[test]
fn from_adapters_to_one_model() {
    let scene = scene();
    let tuned = scene.finished(
        "finetune --from base --sft pairs.jsonl --lora 4 --set train.steps=8 --set train.learning_rate=0.01 --local 2 --name tuned",
    );
    assert_eq!(tuned["step"], 8);
    let writes = |from: &str| {
        text(
            &scene
                .run(&format!("generate --from {from} {GREEDY}"))
                .stdout,
        )
    };
    let adapted = writes("tuned");
    assert_ne!(adapted, writes("base"), "the adapters do something");

    scene.run("export tuned ./adapter");
    scene.run("export base ./base");
    let said = text(&scene.run("merge tuned -o ./merged --threads 1").stdout);
    assert!(
        said.contains("tuned@8 with its adapters (rank 4, alpha 8"),
        "{said}"
    );
    let apart = said
        .split("at most ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let apart: f32 = apart
        .and_then(|number| number.parse().ok())
        .expect("a number");
    assert!(apart < 1e-4, "{said}");
    for file in [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        assert!(scene.path("merged").join(file).exists(), "{file}");
    }
    assert!(!scene.path("merged/adapter_config.json").exists());
    assert_eq!(writes("./merged"), adapted);

    // The base with the adapters beside it, by directory and by run.
    assert_eq!(writes("./base --adapter ./adapter"), adapted);
    assert_eq!(writes("base --adapter tuned@8"), adapted);
    scene.run("merge ./base --adapter ./adapter -o ./again");
    let weights =
        |name: &str| fs::read(scene.path(name).join("model.safetensors")).expect("weights");
    assert!(weights("again") == weights("merged"));
    let template = |name: &str| {
        let config = fs::read_to_string(scene.path(name).join("tokenizer_config.json"));
        let config: Value = serde_json::from_str(&config.expect("it is there")).expect("JSON");
        config["chat_template"].clone()
    };
    assert_eq!(template("again"), template("adapter"));
    let loss = |from: &str| {
        let scored = scene.events(&format!("eval --from {from} --text text.txt --threads 1"));
        scored.last().expect("an event")["loss"]
            .as_f64()
            .expect("a loss")
    };
    assert!((loss("./merged") - loss("./base --adapter tuned")).abs() < 1e-4);
    let next = "finetune --from ./merged --sft pairs.jsonl --lora 2 --set train.steps=2 --local 1";
    assert_eq!(scene.finished(next)["step"], 2);

    let merge = |line: &str| scene.fails(&format!("merge {line}"));
    assert_snapshot!(merge("tuned -o ./merged"), @r"
    error: `./merged` already exists; choose another place or remove it
    ");
    assert_snapshot!(merge("base -o ./other"), @r"
    error: base@60 has no adapters, so there is nothing to merge

    hint: name a run that trained some (`cohort finetune --lora RANK`), or give them with `--adapter RUN|DIR`
    ");
    assert_snapshot!(merge("./merged --adapter ./base -o ./other"), @r"
    error: the adapters ./base cannot be put on the base

    Caused by:
      `./base` holds no adapters: there is no `adapter_config.json`
    ");
    let said = merge("tuned --adapter ./adapter -o ./other");
    assert!(said.contains("has adapters of its own"), "{said}");
    let wide = BASE.replace(
        "--name base",
        "--name wide --set model.intermediate_size=80",
    );
    scene.finished(&wide.replace("steps=60", "steps=4"));
    let said = scene.fails(&format!(
        "generate --from wide --adapter ./adapter {GREEDY}"
    ));
    assert_snapshot!(said, @r"
    error: the adapters ./adapter cannot be put on the base

    Caused by:
      tensor `base_model.model.model.layers.1.mlp.down_proj.lora_A.weight` in `./adapter/adapter_model.safetensors` has the shape [4, 64], the model calls for [4, 80]
    ");
    assert!(!scene.path("other").exists());
    let again = "finetune --from tuned --sft pairs.jsonl --lora 4 --local 1";
    assert_snapshot!(scene.fails(again), @r"
    error: tuned@8 is a base model with adapters; make one model of them first: `cohort merge tuned@8 -o DIR`, then `--from DIR`
    ");
}

/// Trains on one worker, on two, and on one that is killed and three that go on.
fn same_bits(scene: &Scene, line: &str) -> Value {
    let long =
        format!("finetune --from base {line} --set train.steps=120 --set checkpoint.every=4");
    let one = scene.finished(&format!("{long} --local 1 --name one"));
    let two = scene.finished(&format!("{long} --local 2 --new --name two"));
    assert_eq!(hash(&two), hash(&one));
    let mut killed = scene.start(&format!("{long} --local 1 --new --name cut --json"));
    killed.wait_for_step(9);
    killed.kill();
    let resumed = scene.finished(&format!("{long} --local 3 --name cut"));
    assert_eq!(resumed["run"], "cut");
    assert_eq!(hash(&resumed), hash(&one));
    one
}

#[test]
fn adapters_have_the_same_bits_on_any_cluster() {
    let scene = scene();
    let dropout = "--lora 4 --set lora.dropout=0.1";
    let plain = same_bits(&scene, &format!("--sft pairs.jsonl {dropout}"));
    scene.run("verify two");
    let whole =
        scene.finished("finetune --from base --sft pairs.jsonl --set train.steps=4 --local 1");
    assert_ne!(hash(&whole), hash(&plain));
}

#[test]
fn classifiers_have_the_same_bits_on_any_cluster() {
    let scene = scene();
    same_bits(&scene, "--classify labelled.jsonl");
    scene.run("verify two");
    scene.run("export one ./classifier");
    let config = fs::read_to_string(scene.path("classifier/config.json")).expect("a config");
    assert!(
        config.contains("LlamaForSequenceClassification"),
        "{config}"
    );
    for verb in ["generate --prompt the", "chat", "eval --text text.txt"] {
        let said = scene.fails(&format!("{verb} --from one"));
        assert!(
            said.contains("one@120 is a classifier of 2 labels (ham, spam)"),
            "{said}"
        );
    }
}

#[test]
fn samples_that_cannot_be_used_are_named() {
    let scene = scene();
    let dir = scene.path("").display().to_string();
    let fails = |line: &str| {
        let said = scene.fails(&format!("finetune --from base --local 1 {line}"));
        said.replace(&dir, "[DIR]/")
    };
    scene.write(
        "outside.jsonl",
        "{\"text\": \"the tree\", \"label\": \"ham\"}\n{\"text\": \"a root\", \"label\": \"eggs\"}\n",
    );
    assert_snapshot!(fails(r#"--classify outside.jsonl --set corpus.labels=["ham","spam"]"#), @r"
    error: `[DIR]/outside.jsonl` line 2 has the label `eggs`, which is not among `ham`, `spam`; repair it, or leave such input out with `--skip-bad`
    ");
    let long = "the tree ".repeat(60);
    scene.write(
        "long.jsonl",
        &format!("{{\"prompt\": \"the\", \"response\": \"tree\"}}\n{{\"prompt\": \"{long}\", \"response\": \"sums\"}}\n"),
    );
    let said = fails("--sft long.jsonl");
    assert!(
        said.starts_with("error: `[DIR]/long.jsonl` line 2 is a sample of ")
            && said.contains("at most 64 fit; shorten it, give the model a longer context"),
        "{said}"
    );
    scene.write(
        "silent.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"the tree\"}]}\n",
    );
    assert_snapshot!(fails("--sft silent.jsonl"), @r"
    error: `silent.jsonl` line 1 has no turn of `assistant` or `gpt` in `messages`, so there is nothing to learn from it; repair it, or leave such input out with `--skip-bad`
    ");
    assert_snapshot!(fails("--sft pairs.jsonl --lora 0"), @r"
    error: `lora.rank` is 0, but it must lie between 1 and 32; 8 or 16 suits most
    ");
    assert_snapshot!(fails(r#"--sft pairs.jsonl --lora 4 --set lora.target_modules=["c_attn"]"#), @r#"
    error: `lora.target_modules` is c_attn, but a block of `llama` has the linear layers q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; name some of them, or "all-linear"
    "#);
    let said = scene.fails("eval --from base --text pairs.jsonl");
    assert!(
        said.contains(
            "`pairs.jsonl` line 1 has no text field `text`; its fields are `prompt`, `response`"
        ),
        "{said}"
    );
    for usage in ["--lora x", "--sft pairs.jsonl --classify labelled.jsonl"] {
        let output = scene
            .cohort(&format!("finetune --from base --local 1 {usage}"))
            .output();
        assert_eq!(
            output.expect("the binary runs").status.code(),
            Some(2),
            "{usage}"
        );
    }
}

/// Bytes that a worker sends and gets in a step: all of a run's, what it starts from and ends with included, over its
/// steps.
fn bytes_per_step(flags: &str) -> [f64; 2] {
    const STEPS: u64 = 220;
    let scene = Scene::new();
    let (pairs, _) = samples(160);
    scene.write("pairs.jsonl", &pairs);
    scene.finished(
        "pretrain --preset tiny --corpus text.txt --set train.steps=2 --local 1 --name base",
    );
    let mut cluster = Cluster::start(&scene, 2);
    let line = format!(
        "finetune --from base --sft pairs.jsonl {flags} --set train.steps={STEPS} --set train.min_workers=2 --set train.eval_every=0 --set checkpoint.every=0"
    );
    // The second worker sends its gradients; the first shares memory with the coordinator.
    let carried = |cluster: &Cluster<'_>| cluster.workers[1].proxy.carried();
    let before = carried(&cluster);
    cluster.submit(&line);
    cluster.finish();
    let after = carried(&cluster);
    [0, 1].map(|way| (after[way] - before[way]) as f64 / STEPS as f64)
}

#[test]
fn adapters_take_a_tenth_of_the_bytes_on_the_wire() {
    let (full, adapters) = (bytes_per_step(""), bytes_per_step("--lora 4"));
    println!("bytes per step, sent and got: full {full:?}, adapters {adapters:?}");
    for way in [0, 1] {
        assert!(full[way] > 10.0 * adapters[way], "{full:?} {adapters:?}");
    }
}
