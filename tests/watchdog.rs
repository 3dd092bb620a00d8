//! Steps out of the ordinary: the same ones on any cluster, and what becomes of them.

use serde_json::Value;

use crate::support::{Scene, finished, text};

/// Sixty steps, whose checkpoints all stay, and a watchdog that finds much that is ordinary.
const TRAIN: &str = "pretrain spec.toml --corpus text.txt --set train.steps=60 --set train.eval_every=30 \
                     --set checkpoint.every=10 --set checkpoint.keep=99 --set watchdog.sigma=0.8 --set watchdog.window=20";

/// Exit code of a command whose run rests unfinished.
const RESTS: i32 = 130;

fn ledger(scene: &Scene, run: &str) -> String {
    text(&scene.run(&format!("ledger {run}")).stdout)
}

/// The steps that were skipped.
fn skipped(scene: &Scene, run: &str) -> Vec<u64> {
    let lines = ledger(scene, run);
    let entries = lines.lines().map(serde_json::from_str);
    let entries = entries.map(|entry: Result<Value, _>| entry.expect("an entry"));
    let skipped = entries.filter(|entry| entry["skipped"] == true);
    skipped.filter_map(|entry| entry["step"].as_u64()).collect()
}

/// The steps of some kind of event.
fn steps(events: &[Value], of: impl Fn(&Value) -> bool) -> Vec<u64> {
    let found = events.iter().filter(|event| of(event));
    found.filter_map(|event| event["step"].as_u64()).collect()
}

/// Runs a command whose run comes to rest unfinished; gives its events and what it said.
fn rests(scene: &Scene, line: &str) -> (Vec<Value>, String) {
    let output = scene.cohort(&format!("{line} --json")).output();
    let output = output.expect("the binary runs");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(RESTS), "`{line}`: {said}");
    let events = text(&output.stdout);
    let events = events.lines().map(serde_json::from_str);
    (
        events.map(|event| event.expect("JSON lines")).collect(),
        said,
    )
}

#[test]
fn updates_are_skipped_alike_on_any_cluster_and_where_the_run_pauses_each_time() {
    let scene = Scene::new();
    let run = |name: &str, action: &str, workers: u32| {
        scene.events(&format!(
            "{TRAIN} --set watchdog.action={action} --local {workers} --new --name {name}"
        ))
    };
    let one = run("one", "skip", 1);
    let two = run("two", "skip", 2);
    let state = &finished(&one)["state_hash"];
    assert_eq!(state, &finished(&two)["state_hash"]);
    assert_eq!(ledger(&scene, "one"), ledger(&scene, "two"));
    let passed = skipped(&scene, "one");
    assert!(!passed.is_empty(), "{}", ledger(&scene, "one"));
    let told = |event: &Value| event["event"] == "anomaly" && event["action"] == "skip";
    assert_eq!(steps(&one, told), passed);
    let step = |event: &Value| event["event"] == "step" && event["skipped"] == true;
    assert_eq!(steps(&one, step), passed);

    let report = scene.events("verify one").remove(0);
    assert_eq!(report["skipped"], passed.len(), "{report}");
    assert_eq!(report["contradictions"], 0, "{report}");
    // Two checkpoints lie before the last step that was skipped, so the updates before it are counted, too.
    let beyond = passed[passed.len() - 1] + 1;
    let replayed = scene.events(&format!("verify one --replay {}", beyond.min(60)));
    assert_eq!(replayed[1]["contradiction"], Value::Null, "{}", replayed[1]);

    // To be told changes nothing: another ledger, other weights.
    let told = run("told", "tell", 1);
    assert!(!steps(&told, |event| event["event"] == "anomaly").is_empty());
    assert!(skipped(&scene, "told").is_empty());
    assert_ne!(&finished(&told)["state_hash"], state);

    // The same skips, with a pause after each.
    let mut line = format!("{TRAIN} --set watchdog.action=pause --local 1 --new --name rests");
    for at in passed.iter().filter(|step| **step < 60) {
        let (events, said) = rests(&scene, &line);
        let last = events.last().expect("a last event");
        assert_eq!(
            (&last["event"], &last["step"]),
            (&"paused".into(), &(*at).into())
        );
        let reason = format!("the watchdog paused the run: step {at} was out of the ordinary");
        assert!(last["reason"].as_str().expect("a reason").contains(&reason));
        assert!(said.contains(&reason), "{said}");
        line = format!("pretrain --resume rests --local {}", 1 + at % 2);
    }
    let end = scene.finished(&line);
    assert_eq!(&end["state_hash"], state);
    assert_eq!(skipped(&scene, "rests"), passed);
    let report = scene.events("verify rests").remove(0);
    assert_eq!(report["contradictions"], 0, "{report}");
    let info = scene.events("status rests").remove(0);
    assert_eq!(info["status"], "finished");
}

/// A model with so large a gain before its head that losses are finite and gradients are not.
fn overflowing(scene: &Scene) {
    scene.finished("pretrain spec.toml --corpus text.txt --local 1 --name base");
    scene.run("export base hf");
    let path = scene.path("hf").join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("the weights are there");
    let (length, rest) = bytes.split_at_mut(8);
    let length = u64::from_le_bytes((&*length).try_into().expect("8 bytes")) as usize;
    let (header, data) = rest.split_at_mut(length);
    let header: Value = serde_json::from_slice(header).expect("a header");
    let offset = |i: usize| header["model.norm.weight"]["data_offsets"][i].as_u64();
    let range = offset(0).expect("a number") as usize..offset(1).expect("a number") as usize;
    for gain in data[range].chunks_exact_mut(4) {
        gain.copy_from_slice(&1e38_f32.to_le_bytes());
    }
    std::fs::write(&path, bytes).expect("the weights are written");
}

#[test]
fn steps_that_are_not_finite_are_skipped_until_a_whole_window_was() {
    let scene = Scene::new();
    overflowing(&scene);
    let line = |action: &str, name: &str, workers: u32| {
        format!(
            "finetune --from ./hf --corpus text.txt --set train.lanes=6 --set train.micro_batch=2 --set train.steps=60 \
             --set watchdog.window=20 --set watchdog.action={action} --local {workers} --new --name {name}"
        )
    };
    let said = scene.fails(&line("tell", "told", 1));
    assert!(said.contains("is not finite"), "{said}");
    for (name, workers) in [("one", 1), ("two", 2)] {
        let (events, said) = rests(&scene, &line("skip", name, workers));
        let anomalies = steps(&events, |event| event["event"] == "anomaly");
        assert_eq!(anomalies, Vec::from_iter(1..=20));
        let step = events.iter().find(|event| event["event"] == "step");
        assert_eq!(step.expect("a step")["grad_norm"], Value::Null);
        assert!(said.contains("the last 20 steps up to step 20"), "{said}");
        let report = scene.events(&format!("verify {name} --replay 20"));
        assert_eq!(report[0]["contradictions"], 0, "{}", report[0]);
        assert_eq!(report[1]["contradiction"], Value::Null, "{}", report[1]);
    }
    assert_eq!(ledger(&scene, "one"), ledger(&scene, "two"));
    // It may try another window.
    let (_, said) = rests(&scene, "finetune --resume one --local 1");
    assert!(said.contains("the last 40 steps up to step 40"), "{said}");
}
