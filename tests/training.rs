//! Training from raw text to generated text, and the first law: the result does not depend on the cluster.

use serde_json::Value;

use crate::support::{Scene, finished, real_data, text, words};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";

fn hash(event: &Value) -> String {
    event["state_hash"]
        .as_str()
        .expect("a state hash")
        .to_owned()
}

#[test]
fn any_number_of_workers_and_threads_gives_the_same_bits() {
    let scene = Scene::new();
    let one = scene.finished(&format!("{TRAIN} --local 1"));
    let hash_of = |flags: &str| hash(&scene.finished(&format!("{TRAIN} --new {flags}")));
    assert_eq!(hash_of("--local 2"), hash(&one));
    assert_eq!(hash_of("--local 4"), hash(&one));
    assert_eq!(hash_of("--local 1 --threads 3"), hash(&one));
    let again = "--set train.gradient_checkpointing=true";
    assert_eq!(hash_of(&format!("--local 2 {again}")), hash(&one));
    // Other lanes are another run: another order of summation.
    assert_ne!(
        hash_of("--local 2 --set train.lanes=12 --set train.accumulate=1"),
        hash(&one)
    );
    assert_eq!(one["step"], 12);
    assert_eq!(one["tokens"], 12 * 6 * 4 * 32);
}

#[test]
fn frozen_layers_travel_nowhere_and_the_bits_are_the_same_on_any_cluster() {
    let scene = Scene::new();
    let frozen = format!("{TRAIN} --new --set train.freeze_layers=1");
    let one = scene.finished(&format!("{frozen} --local 1"));
    let two = scene.finished(&format!("{frozen} --local 2"));
    assert_eq!(hash(&two), hash(&one));
    // With activations computed again, and layers that learn later, too.
    let more = "--set train.unfreeze_every=3 --set train.gradient_checkpointing=true";
    let one = scene.finished(&format!("{frozen} {more} --local 1"));
    let three = scene.finished(&format!("{frozen} {more} --local 3"));
    assert_eq!(hash(&three), hash(&one));
}

#[test]
fn a_round_of_one_lane_comes_to_what_as_many_steps_do() {
    let scene = Scene::new();
    let set = |name: &str, flags: &str| {
        let flags = format!("--set train.lanes=1 --set train.warmup_steps=0 {flags}");
        let last = scene.finished(&format!("{TRAIN} --local 1 --name {name} {flags}"));
        last["val_loss"].as_f64().expect("a loss")
    };
    // An outer step of rate 1 without momentum goes to where the lane has come.
    let rounds =
        "--set train.sync=diloco --set train.outer_learning_rate=1 --set train.outer_momentum=0";
    let plain = set("plain", "--set train.steps=6");
    let one = set(
        "one",
        &format!("{rounds} --set train.steps=1 --set train.inner_steps=6"),
    );
    assert!((one - plain).abs() < 1e-5, "{one} is not {plain}");
    // Moments begin anew in each round.
    let two = set(
        "two",
        &format!("{rounds} --set train.steps=2 --set train.inner_steps=3"),
    );
    assert!((two - plain).abs() > 1e-4, "{two} is {plain}");
    // A replay computes rounds again, with their chance.
    let rounded = format!("{rounds} --set train.lanes=3 --set train.payload=int8");
    set(
        "three",
        &format!("{rounded} --set train.steps=3 --set train.inner_steps=2"),
    );
    let replayed = &scene.events("verify three --replay 2 --threads 1")[0];
    assert_eq!(replayed["contradictions"], 0, "{replayed}");
}

#[test]
fn processors_of_different_width_train_together_to_the_same_bits() {
    let scene = Scene::new();
    // In bf16 the wide one has an instruction for what the narrow one does step by step, where it has AMX.
    for precision in ["f32", "bf16"] {
        let spec = format!("{TRAIN} --new --set train.precision={precision}");
        let one = scene.finished(&format!("{spec} --local 1"));
        let (_coordinator, url) = scene.coordinator("");
        let worker = |width| {
            let line = format!("worker --coordinator {url} --threads 1 --home {width}");
            scene.start_with(&line, ("COHORT_INSTRUCTION_SET", width))
        };
        let mut workers = [worker("avx512"), worker("avx2")];
        workers
            .iter_mut()
            .for_each(|worker| drop(worker.wait_for("joined")));
        let two = scene.finished(&format!(
            "{spec} --coordinator {url} --set train.min_workers=2"
        ));
        assert_eq!(hash(&two), hash(&one), "{precision}");
    }
}

#[test]
fn gpt2_with_dropout_gives_the_same_bits_on_lanes_that_are_no_power_of_two() {
    let scene = Scene::new();
    let gpt2 = "--set model.architecture=gpt2 --set model.num_key_value_heads=4 --set model.dropout=0.1 --set train.lanes=5 --set train.steps=6";
    let one = scene.finished(&format!("{TRAIN} {gpt2} --local 1"));
    let three = scene.finished(&format!("{TRAIN} {gpt2} --local 3 --new"));
    assert_eq!(hash(&one), hash(&three));
}

#[test]
fn a_killed_run_is_resumed_by_the_same_command_to_the_same_bits() {
    let scene = Scene::new();
    let long = format!("{TRAIN} --set train.steps=300 --set checkpoint.every=4");
    let expected = hash(&scene.finished(&format!("{long} --local 2 --name whole")));
    let mut killed = scene.start(&format!("{long} --local 1 --new --name cut --json"));
    killed.wait_for_step(9);
    killed.kill();
    // The cluster of a killed command ends by itself; its lock on the home is then free.
    let resumed = scene.finished(&format!("{long} --local 3 --threads 2 --name cut"));
    assert_eq!(resumed["run"], "cut");
    assert_eq!(hash(&resumed), expected);
}

#[test]
fn a_finished_run_goes_on_to_more_steps() {
    let scene = Scene::new();
    let flat = format!("{TRAIN} --set train.schedule=constant --set train.warmup_steps=2");
    let whole = scene.finished(&format!(
        "{flat} --set train.steps=16 --name whole --local 1"
    ));
    let first = scene.finished(&format!(
        "{flat} --set train.steps=10 --name parts --local 2"
    ));
    assert_ne!(hash(&first), hash(&whole));
    let rest = scene.finished("pretrain --resume parts --set train.steps=16 --local 1");
    assert_eq!(rest["step"], 16);
    assert_eq!(hash(&rest), hash(&whole));
}

#[test]
fn from_text_to_finetuned_text() {
    let scene = Scene::new();
    scene.write("tales.txt", &words(9, 6_000));
    let base = scene.finished(&format!("{TRAIN} --local 2 --name base"));
    let losses = scene.events(
        "finetune --from base@best --corpus tales.txt --set train.steps=8 --local 2 --name tuned",
    );
    let split = |name: &str| -> Vec<f64> {
        let evals = losses
            .iter()
            .filter(|e| e["event"] == "eval" && e["split"] == name);
        evals.map(|e| e["loss"].as_f64().expect("a loss")).collect()
    };
    assert!(split("validation").len() >= 2, "{losses:?}");
    assert_eq!(split("base_validation").len(), 2, "{losses:?}");
    let tuned = finished(&losses);
    assert_ne!(hash(tuned), hash(&base));

    let generate = "generate --from tuned --prompt the --max-tokens 12 --temperature 0 --threads 1";
    let once = text(&scene.run(generate).stdout);
    assert!(!once.trim().is_empty());
    assert_eq!(
        once,
        text(&scene.run(generate).stdout),
        "greedy text is the same each time"
    );

    scene.run("export tuned@last out");
    for file in [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    ] {
        assert!(scene.path("out").join(file).exists(), "{file}");
    }
    let exported = "generate --from ./out --prompt the --max-tokens 12 --temperature 0 --threads 1";
    assert_eq!(text(&scene.run(exported).stdout), once);
    let scored = scene.events("eval --from tuned --text tales.txt");
    let loss = scored.last().expect("an event")["loss"]
        .as_f64()
        .expect("a loss");
    assert!(loss.is_finite() && loss > 0.0);
    let spread = scene.events("eval --from tuned --text tales.txt --local 3");
    let score = spread.last().expect("an event");
    assert!(
        (score["loss"].as_f64().expect("a loss") - loss).abs() < 0.02,
        "{score}"
    );
    assert_eq!(score["bytes"], scored.last().expect("an event")["bytes"]);

    // From a directory in Hugging Face layout, too.
    let again = "finetune --from ./out --corpus tales.txt --set train.steps=4 --set train.lanes=2 --set train.micro_batch=2 --local 1";
    assert_eq!(scene.finished(again)["step"], 4);
}

#[test]
fn a_flipped_byte_in_a_checkpoint_is_named() {
    let scene = Scene::new();
    let done = scene.finished(&format!("{TRAIN} --local 1 --name base"));
    let weights = std::path::Path::new(done["checkpoint"].as_str().expect("a path"))
        .join("model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("the weights are there");
    let last = bytes.len() - 9;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).expect("the weights can be written");
    let said = scene.fails("generate --from base --prompt the");
    assert!(said.contains("model.safetensors"), "{said}");
    let said = scene.fails("pretrain --resume base --set train.steps=20 --local 1");
    assert!(
        said.contains("damaged") && said.contains("model.safetensors"),
        "{said}"
    );
}

#[test]
fn a_checkpoint_without_one_of_its_files_is_named() {
    let scene = Scene::new();
    let done = scene.finished(&format!("{TRAIN} --local 1 --name base"));
    let checkpoint = std::path::PathBuf::from(done["checkpoint"].as_str().expect("a path"));
    std::fs::remove_file(checkpoint.join("optimizer.safetensors")).expect("the file is there");
    let said = scene.fails("pretrain --resume base --set train.steps=20 --local 1");
    assert!(said.contains("optimizer.safetensors"), "{said}");
    assert!(said.contains("to go on from the one before"), "{said}");
}

#[test]
fn a_tokenizer_that_does_not_fit_the_model_is_refused() {
    let scene = Scene::new();
    scene.finished(&format!("{TRAIN} --local 1 --name small"));
    scene.finished(&format!(
        "{TRAIN} --set tokenizer.vocab_size=400 --set train.steps=4 --local 1 --name large"
    ));
    scene.run("export small out");
    scene.run("export large other");
    std::fs::copy(
        scene.path("other/tokenizer.json"),
        scene.path("out/tokenizer.json"),
    )
    .expect("the tokenizer can be replaced");
    let said = scene.fails("finetune --from ./out --corpus text.txt --local 1");
    assert!(said.contains("tokens, but its model embeds only"), "{said}");
}

/// A limit on the size of files stands in for a full disk: writing fails in the middle of a checkpoint.
#[test]
#[cfg(unix)]
fn a_full_disk_is_named_and_loses_nothing() {
    let scene = Scene::new();
    let wide = "--set model.hidden_size=96 --set model.intermediate_size=128 --set train.steps=4 --set checkpoint.every=0 --set train.eval_every=0";
    let line = format!("{TRAIN} {wide} --local 1 --name tight");
    let limited = format!(
        "trap '' XFSZ; ulimit -f 900; exec {} {line}",
        env!("CARGO_BIN_EXE_cohort")
    );
    let output = std::process::Command::new("bash")
        .args(["-c", &limited])
        .current_dir(scene.path("."))
        .env("COHORT_HOME", scene.path("home"))
        .stdin(std::process::Stdio::null())
        .output()
        .expect("bash runs");
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(
        said.contains("the checkpoint of step 4 could not be written"),
        "{said}"
    );
    assert!(
        said.contains("optimizer.safetensors") && said.contains("make room on the disk"),
        "{said}"
    );
    let whole = scene.finished(&line);
    assert_eq!(whole["step"], 4);
}

#[test]
fn weights_that_are_not_finite_stop_the_run_and_name_the_step() {
    let scene = Scene::new();
    scene.finished(&format!("{TRAIN} --local 1 --name base"));
    scene.run("export base out");
    let weights = scene.path("out").join("model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("the weights are there");
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).expect("the weights can be written");
    let line = "finetune --from ./out --corpus text.txt --set train.steps=4 --local 1";
    let said = scene.fails(line);
    assert!(said.contains("step 0") && said.contains("NaN"), "{said}");
}

#[test]
fn a_real_model_tells_its_known_story() {
    let Some(model) = real_data("models/stories260K-hf") else {
        return;
    };
    let scene = Scene::new();
    let line = format!(
        "generate --from {} --prompt Once --max-tokens 40 --temperature 0",
        model.display()
    );
    let story = text(&scene.run(&line).stdout);
    assert!(
        story.starts_with("Once upon a time, there was a little girl named Lily."),
        "{story}"
    );
    scene.write("story.txt", "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.");
    let scored = scene.events(&format!("eval --from {} --text story.txt", model.display()));
    let loss = scored.last().expect("an event")["loss"]
        .as_f64()
        .expect("a loss");
    assert!(loss > 0.2 && loss < 2.5, "{loss}");
}
