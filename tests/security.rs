//! A cluster with an authority: who comes in, who is told why not, and what somebody on the way sees.

use std::time::Instant;

use serde_json::Value;

use crate::support::proxy::Proxy;
use crate::support::{DEADLINE, Process, Scene, finished, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";
const TOKEN: &str = "COHORT_TOKEN";

/// A scene whose home has an authority.
fn initialised() -> Scene {
    let scene = Scene::new();
    scene.run("init --name localhost");
    scene
}

/// A new token, as it is printed.
fn token(scene: &Scene, flags: &str) -> String {
    let output = scene.run(&format!("token create {flags}"));
    text(&output.stdout).trim().to_owned()
}

fn id(token: &str) -> &str {
    token.split('_').nth(2).expect("a token's name")
}

/// Runs a command with a token; it must fail with exit code 1. Gives what it said.
fn refused(scene: &Scene, line: &str, token: &str) -> String {
    let mut command = scene.cohort(line);
    let output = command.env(TOKEN, token).output().expect("the binary runs");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "`cohort {line}`: {said}");
    said
}

fn worker(scene: &Scene, url: &str, home: &str, token: &str) -> Process {
    let line = format!(
        "worker --coordinator {url} --threads 1 --home {home} --no-shared-memory --exchange-listen none"
    );
    match token {
        "" => scene.start(&line),
        token => scene.start_with(&line, (TOKEN, token)),
    }
}

/// Trains with two workers behind a proxy; gives the last event, and what the proxy has overheard.
fn overheard(scene: &Scene, url: &str, token: &str) -> (Value, Vec<u8>) {
    let (scheme, address) = url.split_once("://").expect("an address");
    let proxy = Proxy::new(address);
    proxy.eavesdrop();
    let through = proxy.url().replace("http", scheme);
    let mut workers = ["w1", "w2"].map(|home| worker(scene, &through, home, token));
    workers
        .iter_mut()
        .for_each(|worker| drop(worker.wait_for("joined")));
    let events = scene.events(&format!("{TRAIN} --new --set train.min_workers=2"));
    (finished(&events).clone(), proxy.overheard())
}

fn contains(bytes: &[u8], word: &str) -> bool {
    bytes
        .windows(word.len())
        .any(|window| window == word.as_bytes())
}

#[test]
fn a_cluster_is_made_and_joined_and_nobody_on_the_way_reads_anything() {
    let scene = initialised();
    // The run's spec goes to each worker as JSON.
    const WORD: &str = "hidden_size";
    let plain = {
        let (_coordinator, url) = scene.coordinator("--insecure open");
        assert!(url.starts_with("http://"), "{url}");
        let (plain, heard) = overheard(&scene, &url, "");
        assert!(contains(&heard, WORD), "what is not encrypted can be read");
        plain
    };
    let (_coordinator, url) = scene.coordinator("");
    assert!(url.starts_with("https://"), "{url}");
    let token = token(&scene, "--role worker");
    let (private, heard) = overheard(&scene, &url, &token);
    assert_eq!(private["state_hash"], plain["state_hash"]);
    assert!(heard.len() > 100_000, "{}", heard.len());
    for word in [
        WORD,
        "cohort.v1",
        token.split('_').nth(3).expect("a secret"),
    ] {
        assert!(!contains(&heard, word), "{word}");
    }
    // A worker that was there before has a certificate, and needs no token.
    worker(&scene, &url, "w1", "").wait_for("joined");
}

#[test]
fn who_may_not_come_in_is_told_why() {
    let scene = initialised();
    let (_coordinator, url) = scene.coordinator("");
    let at = |verb: &str| format!("{verb} --coordinator {url} --home elsewhere");
    let said = scene.fails(&at("worker"));
    assert!(
        said.contains("this worker has no certificate of that cluster yet"),
        "{said}"
    );
    let said = scene.fails(&at("runs"));
    assert!(
        said.contains("nothing here says by which authority"),
        "{said}"
    );

    let viewer = token(&scene, "--role viewer --note Ada");
    let seen = scene.cohort(&at("runs")).env(TOKEN, &viewer).output();
    assert!(seen.expect("the binary runs").status.success());
    for (verb, why) in [
        (
            "cancel run",
            "of a viewer does not allow `Cancel`; that needs one of an operator",
        ),
        (
            "pretrain spec.toml --corpus text.txt",
            "of a viewer does not allow",
        ),
        ("worker", "is one of a viewer, and this is a worker"),
    ] {
        let said = refused(&scene, &at(verb), &viewer);
        assert!(said.contains(why), "{verb}: {said}");
    }
    let worker = token(&scene, "--role worker");
    let said = refused(&scene, &at("runs"), &worker);
    assert!(said.contains("that needs one of a viewer"), "{said}");

    // The token's own words change nothing.
    let promoted = viewer.replace("viewer", "operator");
    let said = refused(&scene, &at("cancel run"), &promoted);
    assert!(said.contains("of a viewer does not allow"), "{said}");

    let other = Scene::new();
    other.run("init");
    let foreign = token(&other, "--role worker");
    let said = refused(&scene, &at("worker"), &foreign);
    assert!(
        said.contains("it belongs to another cluster than this token"),
        "{said}"
    );

    scene.run(&format!("token revoke {}", id(&worker)));
    let said = refused(&scene, &at("worker"), &worker);
    assert!(said.contains("was revoked"), "{said}");
    let brief = token(&scene, "--role worker --expires 1s");
    let deadline = Instant::now() + DEADLINE;
    // It may be good for a moment; then a worker comes in, and is ended with its process.
    let said = loop {
        let said = refused(&scene, &at("runs"), &brief);
        if said.contains("expired") {
            break refused(&scene, &at("worker"), &brief);
        }
        assert!(Instant::now() < deadline, "{said}");
    };
    assert!(
        said.contains("has expired") && said.contains("ask for a new one"),
        "{said}"
    );

    let plain = url.replace("https", "http");
    let said = refused(
        &scene,
        &format!("runs --coordinator {plain} --home elsewhere"),
        &viewer,
    );
    assert!(said.contains("use `https://` instead"), "{said}");
    let line = format!("worker --coordinator {plain} --home elsewhere");
    let said = refused(&scene, &line, &brief);
    assert!(said.contains("use `https://` instead"), "{said}");
    let cut = &viewer[..viewer.len() - 3];
    let said = refused(&scene, &at("runs"), cut);
    assert!(said.contains("copy it again, whole"), "{said}");

    let listed = text(&scene.run("token ls").stdout);
    for state in ["revoked", "expired", "Ada"] {
        assert!(listed.contains(state), "{listed}");
    }
    assert!(!listed.contains(viewer.split('_').nth(3).expect("a secret")));
}

#[test]
fn a_revoked_worker_has_to_leave_and_the_run_goes_on() {
    let scene = initialised();
    let (_coordinator, url) = scene.coordinator("");
    let tokens = ["--role worker", "--role worker"].map(|flags| token(&scene, flags));
    let mut first = worker(&scene, &url, "w1", &tokens[0]);
    let mut second = worker(&scene, &url, "w2", &tokens[1]);
    first.wait_for("joined");
    second.wait_for("joined");
    let mut run = scene.start(&format!(
        "{TRAIN} --json --set train.steps=400 --set train.eval_every=0 --set train.min_workers=2"
    ));
    run.wait_for_step(5);
    scene.run(&format!("token revoke {}", id(&tokens[0])));
    assert_eq!(first.wait(), Some(1));
    assert!(
        first.printed().contains("was revoked"),
        "{}",
        first.printed()
    );
    run.wait_for("\"finished\"");
    assert_eq!(run.wait(), Some(0));
}

#[test]
fn certificates_are_renewed_while_everything_goes_on() {
    let scene = initialised();
    // So short that the first one ends within the test: some seconds.
    let life = "--certificate-hours 0.002";
    let (mut coordinator, url) = scene.coordinator(life);
    let token = token(&scene, "--role worker");
    let mut renewed = worker(&scene, &url, "w1", &token);
    renewed.wait_for("joined");
    for _ in 0..3 {
        renewed.wait_for("the certificate is renewed");
    }
    // Three are over: the worker that comes back shows a later one, and so does the coordinator.
    coordinator.kill();
    let address = url.trim_start_matches("https://");
    let line = format!("coordinator --listen {address} {life}");
    let mut coordinator = scene.start(&line);
    coordinator.wait_for("listening");
    renewed.wait_for("joined");
    let end = scene.finished(TRAIN);
    assert_eq!(end["step"], 12);
}

#[test]
fn a_home_is_made_a_cluster_once() {
    let scene = initialised();
    let said = scene.fails("init");
    assert!(
        said.contains("holds the authority of a cluster already"),
        "{said}"
    );
    scene.run("init --if-needed");
    let automatic = Scene::new();
    automatic.run("init --if-needed --worker-token join.token");
    let given = std::fs::read_to_string(automatic.path("join.token")).expect("a token");
    assert!(given.starts_with("cohort_worker_"), "{given}");
    let said = scene.fails("token revoke 00000000");
    assert!(said.contains("there is no token `00000000`"), "{said}");
    scene.write("token", "0123456789abcdef");
    let said = scene.fails("coordinator --listen 127.0.0.1:0 --token-file token");
    assert!(
        said.contains("has an authority whose tokens have roles"),
        "{said}"
    );
    let said = scene.fails("token ls --home elsewhere");
    assert!(said.contains("elsewhere"), "{said}");
    std::fs::write(scene.path("home/security/authority.key"), "damaged").expect("written");
    let said = scene.fails("coordinator --listen 127.0.0.1:0");
    assert!(said.contains("authority.key` is damaged"), "{said}");
    let other = Scene::new();
    let said = other.fails("init --name http://x");
    assert!(said.contains("no host name"), "{said}");
}

/// `bench/hosts.py` checks by itself that the state is that of a local run, and that who listens on the bridge reads nothing
/// of what is encrypted and something of what is not.
#[cfg(target_os = "linux")]
#[test]
fn three_hosts_train_to_the_bits_of_one_and_nobody_between_them_reads_anything() {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/hosts.py");
    let run = std::process::Command::new("python3")
        .arg(script)
        .args(["--cohort", env!("CARGO_BIN_EXE_cohort")])
        .args(["--rounds", "1", "--steps", "6", "--hidden", "32"])
        .output();
    let output = match run {
        Ok(output) if output.status.code() != Some(77) => output,
        _ => return eprintln!("skipped: no python3, or no right to make network namespaces"),
    };
    let (said, failed) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}{failed}");
    assert!(said.contains("readable: nothing"), "{said}");
}
