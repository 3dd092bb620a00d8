//! Several coordinators on one store: the machine of the one that leads is lost, stands still, or loses the store, and the run
//! goes on to the bits of an undisturbed one.

use std::fs;
use std::sync::OnceLock;

use serde_json::Value;

use crate::support::http::Http;
use crate::support::s3::{Mood, S3};
use crate::support::signal::{self, Signal};
use crate::support::{Process, Scene, finished, look, text};

const STORE: &str = "--store s3://bucket/cohort --failover";
const TRAIN: &str =
    "pretrain spec.toml --corpus text.txt --set checkpoint.every=40 --set train.eval_every=25";
/// Steps of a run that has no leader for a while.
const STEPS: usize = 600;
/// Steps of one that keeps its leader, and is still under way when a lease has run out.
const MANY_STEPS: usize = 1000;
const RUN: &str = "kept";

fn scene(s3: &S3) -> Scene {
    let mut scene = Scene::new();
    s3.for_scene(&mut scene);
    scene
}

fn train(steps: usize) -> String {
    format!("{TRAIN} --set train.steps={steps}")
}

/// What an undisturbed run ends with.
fn undisturbed(steps: usize) -> Value {
    let end = Scene::new().finished(&format!("{} --local 1 --name whole", train(steps)));
    end["state_hash"].clone()
}

/// That of a run without a leader for a while.
fn expected() -> &'static Value {
    static EXPECTED: OnceLock<Value> = OnceLock::new();
    EXPECTED.get_or_init(|| undisturbed(STEPS))
}

fn submit(scene: &Scene, steps: usize, rest: &str) {
    let line = train(steps);
    scene.run(&format!("{line} --name {RUN} --detach {rest}"));
}

/// A coordinator on a home of its own.
fn coordinator(scene: &Scene, home: &str, lease: f64) -> (Process, String) {
    scene.coordinator(&format!("{STORE} --lease {lease} --home {home}"))
}

/// Waits until a coordinator leads; gives its generation.
fn leads(process: &mut Process) -> u64 {
    let line = process.wait_for("this coordinator leads now");
    let digits = line.split("generation=").nth(1).expect("its generation");
    let digits = digits.split(|c: char| !c.is_ascii_digit()).next();
    digits.expect("split gives one").parse().expect("a number")
}

fn worker(scene: &Scene, urls: &str, name: &str) -> Process {
    scene.start(&format!(
        "worker --coordinator {urls} --threads 1 --home {name}"
    ))
}

fn run_of(scene: &Scene, urls: &str) -> Value {
    let runs = scene.events(&format!("runs --coordinator {urls}"));
    let found = runs.into_iter().find(|run| run["name"] == RUN);
    found.unwrap_or(Value::Null)
}

/// Waits until so many steps are committed; gives how many are.
fn wait_for_step(scene: &Scene, urls: &str, step: u64) -> u64 {
    look("a step", || {
        run_of(scene, urls)["step"].as_u64().filter(|s| *s >= step)
    })
}

/// What is told of the run where it ends, from the moment on at which its leader took over.
fn end(scene: &Scene, urls: &str) -> Vec<Value> {
    let events = scene.events(&format!("follow {RUN} --coordinator {urls}"));
    finished(&events);
    events
}

/// The step of the state with which workers came back.
fn came_back(events: &[Value]) -> Option<u64> {
    let texts = events.iter().filter_map(|event| event["text"].as_str());
    let mut found = texts.filter_map(|text| text.split("came back with the state of step ").nth(1));
    let digits = found.next()?.split(';').next()?;
    digits.parse().ok()
}

#[test]
fn the_leaders_machine_is_lost_and_a_standby_goes_on_with_what_the_workers_have() {
    let expected = expected();
    let s3 = S3::serve();
    let scene = scene(&s3);
    let (mut first, a) = coordinator(&scene, "a", 2.0);
    assert_eq!(leads(&mut first), 1);
    let (mut second, b) = coordinator(&scene, "b", 2.0);
    second.wait_for("standing by");
    let both = format!("{a},{b}");
    let _workers = [worker(&scene, &both, "w1"), worker(&scene, &both, "w2")];
    // Whoever asks the one that stands by is led to the other.
    submit(&scene, STEPS, &format!("--coordinator {b}"));
    let asked = Http::new(&b);
    let ready = asked.get("/readyz");
    assert_eq!(ready.status, 503, "{}", ready.text);
    assert!(ready.text.contains(&format!("{a} leads")), "{}", ready.text);
    assert_eq!(asked.get("/healthz").status, 200);
    let step = wait_for_step(&scene, &both, 60);
    let status = text(
        &scene
            .run(&format!("status {RUN} --coordinator {both}"))
            .stdout,
    );
    assert!(
        status.contains(&format!("coordinator {a}: leads")),
        "{status}"
    );
    assert!(
        status.contains(&format!("coordinator {b}: this coordinator stands by")),
        "{status}"
    );
    first.kill();
    fs::remove_dir_all(scene.path("a")).expect("its machine is gone");
    assert_eq!(leads(&mut second), 2);
    let events = end(&scene, &both);
    assert_eq!(&finished(&events)["state_hash"], expected);
    // Nothing was computed again but the step in flight.
    assert!(came_back(&events) >= Some(step), "{step}: {events:?}");
    scene.run(&format!("verify {RUN} --coordinator {both}"));
    // The curve has all steps, and the validations are there.
    let steps = scene.events(&format!("metrics {RUN} --coordinator {b}"));
    assert_eq!(steps.len(), STEPS);
}

#[test]
fn workers_and_leader_are_lost_and_the_newest_checkpoint_goes_on() {
    let expected = expected();
    let s3 = S3::serve();
    let scene = scene(&s3);
    // The store fails now and then, also behind the deed.
    s3.mood(Mood::Faulty(9));
    let (mut first, a) = coordinator(&scene, "a", 4.0);
    leads(&mut first);
    let (mut second, b) = coordinator(&scene, "b", 4.0);
    second.wait_for("standing by");
    let both = format!("{a},{b}");
    let mut lost = worker(&scene, &both, "w1");
    submit(&scene, STEPS, &format!("--coordinator {both}"));
    wait_for_step(&scene, &both, 100);
    look("a checkpoint in the store", || {
        let stored = run_of(&scene, &both)["stored"]["steps"].clone();
        stored
            .as_array()
            .is_some_and(|steps| !steps.is_empty())
            .then_some(())
    });
    lost.kill();
    first.kill();
    fs::remove_dir_all(scene.path("a")).expect("its machine is gone");
    leads(&mut second);
    let _other = worker(&scene, &both, "w2");
    let events = end(&scene, &b);
    assert_eq!(&finished(&events)["state_hash"], expected);
    scene.run(&format!("verify {RUN} --coordinator {b}"));
    assert!(s3.faults() > 0);
}

#[test]
fn a_leader_that_stood_still_commits_no_more_and_stands_by() {
    let expected = expected();
    let s3 = S3::serve();
    let scene = scene(&s3);
    let (mut first, a) = coordinator(&scene, "a", 2.0);
    leads(&mut first);
    let (mut second, b) = coordinator(&scene, "b", 2.0);
    second.wait_for("standing by");
    let both = format!("{a},{b}");
    let mut working = worker(&scene, &both, "w1");
    submit(&scene, STEPS, &format!("--coordinator {both}"));
    wait_for_step(&scene, &both, 40);
    signal::send(first.pid(), Signal::Stop);
    assert_eq!(leads(&mut second), 2);
    working.wait_until("a session with the new leader", |line| {
        line.contains("joined") && line.contains(&b)
    });
    signal::send(first.pid(), Signal::Continue);
    first.wait_for("this coordinator leads no more");
    // The same process, anew.
    first.wait_for("standing by");
    // And back again: now the other machine is lost.
    wait_for_step(&scene, &b, 120);
    second.kill();
    fs::remove_dir_all(scene.path("b")).expect("its machine is gone");
    assert_eq!(leads(&mut first), 3);
    let events = end(&scene, &both);
    assert_eq!(&finished(&events)["state_hash"], expected);
    scene.run(&format!("verify {RUN} --coordinator {both}"));
}

#[test]
fn a_leader_without_its_store_is_fenced_and_comes_back() {
    let expected = undisturbed(MANY_STEPS);
    let s3 = S3::serve();
    let scene = scene(&s3);
    let (mut only, url) = coordinator(&scene, "a", 2.0);
    leads(&mut only);
    let _worker = worker(&scene, &url, "w1");
    submit(&scene, MANY_STEPS, &format!("--coordinator {url}"));
    wait_for_step(&scene, &url, 40);
    s3.mood(Mood::Away);
    let why = only.wait_for("this coordinator leads no more");
    assert!(why.contains("was not renewed"), "{why}");
    s3.mood(Mood::Well);
    assert_eq!(leads(&mut only), 2);
    let events = end(&scene, &url);
    assert_eq!(finished(&events)["state_hash"], expected);
    scene.run(&format!("verify {RUN} --coordinator {url}"));
}

#[test]
fn a_leader_that_is_asked_to_end_gives_its_lease_back() {
    let s3 = S3::serve();
    let scene = scene(&s3);
    // Longer than any test may take: nobody waits for it to run out.
    let (mut first, a) = coordinator(&scene, "a", 600.0);
    leads(&mut first);
    let (mut second, b) = coordinator(&scene, "b", 600.0);
    second.wait_for("standing by");
    let both = format!("{a},{b}");
    let _worker = worker(&scene, &both, "w1");
    submit(&scene, 400, &format!("--coordinator {both}"));
    wait_for_step(&scene, &both, 10);
    signal::send(first.pid(), Signal::Terminate);
    assert_eq!(leads(&mut second), 2);
    first.wait();
    assert!(
        first.printed().contains("the lease is given back"),
        "{}",
        first.printed()
    );
    finished(&end(&scene, &both));
    // Nobody stands by for the last one, so its lease is given back to nobody.
    signal::send(second.pid(), Signal::Terminate);
    second.wait();
}

#[test]
fn in_an_encrypted_cluster_both_have_its_authority() {
    let s3 = S3::serve();
    let scene = scene(&s3);
    scene.run("init --home a");
    let security = scene.path("a/security");
    fs::create_dir_all(scene.path("b/security")).expect("a directory");
    for entry in fs::read_dir(&security).expect("it was made") {
        let entry = entry.expect("an entry");
        let target = scene.path("b/security").join(entry.file_name());
        fs::copy(entry.path(), target).expect("a copy");
    }
    let (mut first, a) = coordinator(&scene, "a", 2.0);
    assert!(a.starts_with("https://"), "{a}");
    leads(&mut first);
    let (mut second, b) = coordinator(&scene, "b", 2.0);
    second.wait_for("standing by");
    let both = format!("{a},{b}");
    let token = security.join("worker.token");
    let token = format!("--token-file {}", token.display());
    let _worker = scene.start(&format!(
        "worker --coordinator {both} --threads 1 --home w1 {token}"
    ));
    let operator = format!("--token-file {}", security.join("operator.token").display());
    submit(&scene, STEPS, &format!("--coordinator {both} {operator}"));
    let step = |least: u64| {
        look("a step", || {
            let runs = scene.events(&format!("runs --coordinator {both} {operator}"));
            runs.iter()
                .find(|run| run["step"].as_u64() >= Some(least))
                .cloned()
        })
    };
    step(20);
    let operator_b = format!(
        "--token-file {}",
        scene.path("b/security/operator.token").display()
    );
    first.kill();
    leads(&mut second);
    let runs = scene.events(&format!("runs --coordinator {b} {operator_b}"));
    let before = runs[0]["step"].as_u64().expect("a step");
    let goes_on = look("a step of the second", || {
        let runs = scene.events(&format!("runs --coordinator {b} {operator_b}"));
        runs[0]["step"].as_u64().filter(|step| *step > before)
    });
    assert!(goes_on > 20);
}

#[test]
fn failover_is_refused_where_it_cannot_be() {
    let scene = Scene::new();
    let refused = |line: &str, code: i32| {
        let output = scene.cohort(&format!("coordinator --listen 127.0.0.1:0 {line}"));
        let output = { output }.output().expect("the binary runs");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        said
    };
    let without = refused("--failover", 2);
    assert!(without.contains("--store"), "{without}");
    let directory = format!(
        "--failover --store file://{}",
        scene.path("store").display()
    );
    let directory = refused(&directory, 1);
    assert!(
        directory.contains("is a directory") && directory.contains("s3://"),
        "{directory}"
    );
    let short = refused("--failover --store s3://bucket/x --lease 0.1", 2);
    assert!(short.contains("seconds from 1 to 600"), "{short}");
    let other = refused(
        "--failover --store s3://bucket/x --advertise https://host:7070",
        1,
    );
    assert!(
        other.contains("not encrypted") && other.contains("http"),
        "{other}"
    );
    let alone = refused("--store s3://bucket/x --lease 5", 2);
    assert!(alone.contains("--failover"), "{alone}");
}
