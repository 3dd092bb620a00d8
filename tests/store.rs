//! Data in an object store: text that is fetched from one, checkpoints and corpora that outlive the machine in one, with a
//! store that fails now and then.

use serde_json::Value;

use crate::support::hub::{Hub, Model};
use crate::support::s3::{Mood, S3, SECRET};
use crate::support::signal::{self, Signal};
use crate::support::{Process, Scene, finished, look, text, words};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";
const STORE: &str = "--store s3://bucket/cohort";

/// A scene whose processes find the store.
fn scene(s3: &S3) -> Scene {
    let mut scene = Scene::new();
    s3.for_scene(&mut scene);
    scene
}

fn worker(scene: &Scene, url: &str) -> Process {
    scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ))
}

/// The last event of a preparation.
fn prepared(scene: &Scene, line: &str) -> Value {
    let events = scene.events(&format!("corpus prepare {line} --vocab-size 300"));
    events.last().expect("a corpus").clone()
}

fn run(scene: &Scene, url: &str, name: &str) -> Value {
    let runs = scene.events(&format!("runs --coordinator {url}"));
    let found = runs.into_iter().find(|run| run["name"] == name);
    found.unwrap_or(Value::Null)
}

/// Waits until a run's newest checkpoint of at least that step is in the store.
fn wait_for_copy(scene: &Scene, url: &str, name: &str, step: u64) {
    look("a copy of the checkpoint", || {
        let stored = run(scene, url, name)["stored"].clone();
        let steps = stored["steps"].as_array().cloned().unwrap_or_default();
        steps.iter().find(|s| s.as_u64() >= Some(step)).cloned()
    });
}

#[test]
fn text_in_a_store_gives_the_same_corpus_as_on_disk() {
    let s3 = S3::serve();
    let scene = scene(&s3);
    std::fs::create_dir(scene.path("books")).expect("a directory");
    for (name, seed) in [("a.txt", 1), ("b.md", 2), ("c d.txt", 3)] {
        let content = words(seed, 4000);
        s3.put(&format!("bucket/books/{name}"), content.clone());
        scene.write(&format!("books/{name}"), &content);
    }
    s3.put("bucket/books/picture.png", "no text");
    let (_coordinator, url) = scene.coordinator("");
    let local = prepared(&scene, &format!("books/ --coordinator {url}"));
    s3.mood(Mood::Faulty(3));
    let fetched = prepared(&scene, &format!("s3://bucket/books/ --coordinator {url}"));
    assert_eq!(fetched["fingerprint"], local["fingerprint"]);
    assert!(s3.faults() > 0);
    // What was fetched before is not fetched again.
    s3.mood(Mood::Well);
    s3.asked();
    prepared(
        &scene,
        &format!("s3://bucket/books/*.txt --coordinator {url}"),
    );
    let asked = s3.asked();
    assert!(
        !asked
            .iter()
            .any(|asked| asked.starts_with("GET bucket/books/")),
        "{asked:?}"
    );
    let missing = scene.fails(&format!(
        "corpus prepare s3://bucket/nothing/ --coordinator {url}"
    ));
    assert!(
        missing.contains("there is no `s3://bucket/nothing/`"),
        "{missing}"
    );
    s3.mood(Mood::Away);
    let away = scene.fails(&format!(
        "corpus prepare s3://bucket/books/ --coordinator {url}"
    ));
    assert!(
        away.contains("503 Service Unavailable") && !away.contains(SECRET),
        "{away}"
    );
}

#[test]
fn a_dataset_of_the_hub_is_fetched_once() {
    let files = [
        ("README.md", words(9, 10)),
        ("data/a.txt", words(1, 4000)),
        ("data/b.txt", words(2, 4000)),
    ];
    let dataset = Model {
        files: files
            .map(|(name, text)| (name.into(), text.into_bytes()))
            .into(),
        token: Some("hf_secret".into()),
    };
    let hub = Hub::serve([("ada/books", dataset)]);
    let mut scene = Scene::new();
    for (name, value) in [
        ("HF_ENDPOINT", hub.url.clone()),
        ("HF_HOME", scene.path("hf").display().to_string()),
        ("HF_TOKEN", "hf_secret".into()),
    ] {
        scene.environment.push((name.into(), value));
    }
    let (_coordinator, url) = scene.coordinator("");
    let all = prepared(
        &scene,
        &format!("hf://datasets/ada/books --coordinator {url}"),
    );
    scene.write("a.txt", &words(1, 4000));
    scene.write("b.txt", &words(2, 4000));
    let local = prepared(&scene, &format!("a.txt b.txt --coordinator {url}"));
    assert_eq!(all["fingerprint"], local["fingerprint"]);
    hub.asked();
    let one = prepared(
        &scene,
        &format!("hf://datasets/ada/books/data/a.txt --coordinator {url}"),
    );
    assert_ne!(one["fingerprint"], all["fingerprint"]);
    let asked = hub.asked();
    let whole = asked.iter().filter(|path| path.contains("/data/b.txt"));
    assert_eq!(whole.count(), 0, "{asked:?}");
    let nobody = scene.fails(&format!(
        "corpus prepare hf://datasets/ada/none --coordinator {url}"
    ));
    assert!(nobody.contains("`hf://datasets/ada/none`"), "{nobody}");
}

#[test]
fn everything_is_killed_and_an_empty_home_goes_on_to_the_same_bits() {
    let long = format!("{TRAIN} --set train.steps=120 --set checkpoint.every=10");
    let undisturbed = Scene::new();
    let expected = undisturbed.finished(&format!("{long} --local 1 --name whole"));

    let s3 = S3::serve();
    let first = scene(&s3);
    s3.mood(Mood::Faulty(4));
    let (mut coordinator, url) = first.coordinator(STORE);
    let mut working = worker(&first, &url);
    first.run(&format!("{long} --coordinator {url} --name cut --detach"));
    wait_for_copy(&first, &url, "cut", 20);
    coordinator.kill();
    working.kill();
    drop(first);

    // Nothing is left but the store.
    let second = scene(&s3);
    let (_coordinator, url) = second.coordinator(STORE);
    // At once, or when a store that was disturbed is asked again.
    let found = look("the run of the store", || {
        Some(run(&second, &url, "cut")).filter(|run| run["status"] == "interrupted")
    });
    let step = found["step"].as_u64().expect("a step");
    assert!((20..120).contains(&step), "{found}");
    let _worker = worker(&second, &url);
    second.run(&format!("resume cut --coordinator {url}"));
    let events = second.events(&format!("follow cut --coordinator {url}"));
    assert_eq!(finished(&events)["state_hash"], expected["state_hash"]);
    assert!(s3.faults() > 0);
    second.run(&format!("verify cut --coordinator {url}"));
    // What the store has in the end is what the run keeps.
    wait_for_copy(&second, &url, "cut", 120);
    look("the retention of the store", || {
        let stored = run(&second, &url, "cut");
        let of = |list: &Value| -> Vec<Value> {
            let list = list.as_array().expect("a list").iter();
            list.map(|item| item.get("step").unwrap_or(item).clone())
                .collect()
        };
        let same = of(&stored["stored"]["steps"]) == of(&stored["checkpoints"]);
        same.then_some(())
    });
    let names = s3.names().join("\n");
    assert!(!names.contains("step-00000020.json"), "{names}");
    // A deletion that is cut off, or whose answer is lost, is asked for again.
    s3.mood(Mood::Faulty(2));
    let before = s3.faults();
    second.run(&format!("rm cut --yes --coordinator {url}"));
    assert!(!s3.names().iter().any(|name| name.contains("/runs/cut/")));
    assert!(s3.faults() > before + 4);
}

#[test]
fn training_goes_on_while_the_store_is_away() {
    let s3 = S3::serve();
    let scene = scene(&s3);
    let (mut coordinator, url) = scene.coordinator(STORE);
    let _worker = worker(&scene, &url);
    s3.mood(Mood::Away);
    let line = format!("{TRAIN} --coordinator {url} --name alone");
    let events = scene.events(&line);
    assert_eq!(finished(&events)["step"], 12);
    assert_eq!(
        run(&scene, &url, "alone")["stored"]["steps"],
        serde_json::json!([])
    );
    // It is back, and gets what it missed before the coordinator ends.
    s3.mood(Mood::Well);
    signal::send(coordinator.pid(), Signal::Terminate);
    coordinator.wait();
    let printed = coordinator.printed();
    assert!(!printed.contains(SECRET), "{printed}");
    let names = s3.names().join("\n");
    assert!(
        names.contains("runs/alone/checkpoints/step-00000012.json"),
        "{names}\n{printed}"
    );
}

/// An address of this machine that is not its loopback's, if it has one.
fn outer_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: the system only says which address it would use.
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

#[test]
fn workers_elsewhere_read_shards_from_the_store() {
    let Some(address) = outer_address() else {
        println!("skipped: this machine has no address but its loopback's");
        return;
    };
    let s3 = S3::serve();
    let scene = scene(&s3);
    let (_coordinator, url) = scene.coordinator_at(address, &format!("{STORE} --insecure open"));
    prepared(
        &scene,
        &format!("text.txt --spec spec.toml --coordinator {url}"),
    );
    look("the corpus in the store", || {
        let mut names = s3.names().into_iter();
        names.find(|name| name.contains("/corpora/") && name.ends_with("manifest.json"))
    });
    s3.asked();
    let mut worker = scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache --exchange-listen none"
    ));
    let line = format!("{TRAIN} --coordinator {url}");
    let last = scene.finished(&format!("{line} --name near"));
    let shards = |s3: &S3| {
        let asked = s3.asked().into_iter();
        asked
            .filter(|asked| asked.starts_with("GET") && asked.contains("/corpora/"))
            .filter(|asked| asked.contains("/objects/"))
            .count()
    };
    assert!(shards(&s3) > 0);
    // Without it the coordinator gives them, and the run is the same.
    worker.kill();
    s3.mood(Mood::Away);
    let _other = scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home other --exchange-listen none"
    ));
    let again = scene.finished(&format!("{line} --new --name far"));
    assert_eq!(again["state_hash"], last["state_hash"]);
}

#[test]
fn a_run_that_was_taken_over_is_not_written_any_more() {
    let s3 = S3::serve();
    let first = scene(&s3);
    let (mut coordinator, url) = first.coordinator(STORE);
    let mut working = worker(&first, &url);
    let line = format!("{TRAIN} --set train.steps=2000 --set checkpoint.every=20");
    first.run(&format!("{line} --coordinator {url} --name ours --detach"));
    wait_for_copy(&first, &url, "ours", 20);
    coordinator.kill();
    working.kill();
    let ours = s3.content("bucket/cohort/runs/ours/owner.json");
    let second = scene(&s3);
    let (_other, other) = second.coordinator(STORE);
    second.run(&format!("resume ours --coordinator {other}"));
    let owner = || s3.content("bucket/cohort/runs/ours/owner.json");
    let theirs = owner();
    assert!(theirs.is_some() && theirs != ours, "it was taken over");
    // The first one comes back, and does not train what another trains.
    let (mut back, url) = first.coordinator(STORE);
    let found = run(&first, &url, "ours");
    assert_eq!(found["status"], "failed", "{found}");
    let error = text(found["error"].as_str().expect("a reason").as_bytes());
    assert!(error.contains("belongs to another coordinator"), "{error}");
    // Nor does it write to what another writes.
    assert_eq!(owner(), theirs);
    back.kill();
}

/// The same with a server of somebody else's, where python3 has it.
#[test]
fn an_s3_server_from_elsewhere_agrees() {
    let python = |arguments: &[&str]| {
        let mut command = std::process::Command::new("python3");
        command.args(arguments).output()
    };
    if !python(&["-c", "import moto.server, boto3"]).is_ok_and(|done| done.status.success()) {
        println!("skipped: python3 has no moto (pip install 'moto[server]')");
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/store.py");
    let done = python(&[script, env!("CARGO_BIN_EXE_cohort")]).expect("python3 runs");
    let (out, err) = (text(&done.stdout), text(&done.stderr));
    assert!(done.status.success(), "{out}{err}");
    let report: Value = serde_json::from_str(&out).expect("a report");
    assert_eq!(report["same_bits"], true, "{report}");
    assert!(report["faults"].as_u64() > Some(0), "{report}");
}
