//! Several processes: lost workers, queues, tokens, hostile bytes.

use std::io::Write;
use std::net::TcpStream;

use crate::support::{Scene, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";

#[test]
fn a_worker_that_is_killed_changes_no_bit() {
    let scene = Scene::new();
    let long =
        format!("{TRAIN} --set train.steps=300 --set checkpoint.every=0 --set train.min_workers=3");
    let expected = scene.finished(&format!("{long} --local 3 --name whole"));
    let (_coordinator, url) = scene.coordinator("");
    let worker = || {
        scene.start(&format!(
            "worker --coordinator {url} --threads 1 --home cache"
        ))
    };
    let mut first = worker();
    let mut workers = [worker(), worker()];
    let mut run = scene.start(&format!(
        "{long} --coordinator {url} --new --name cut --json"
    ));
    run.wait_for_step(10);
    workers[0].kill();
    run.wait_for_step(20);
    // One more joins, and another goes.
    let _late = worker();
    run.wait_for_step(30);
    first.kill();
    let last = run.wait_for("\"finished\"");
    let last: serde_json::Value = serde_json::from_str(&last).expect("an event");
    assert_eq!(last["state_hash"], expected["state_hash"]);
    assert!(
        run.printed().contains("(connection closed)"),
        "{}",
        run.printed()
    );
    assert_eq!(run.wait(), Some(0));
}

#[test]
fn a_coordinator_that_is_killed_takes_its_runs_up_again() {
    let scene = Scene::new();
    let long = format!("{TRAIN} --set train.steps=300");
    let expected = scene.finished(&format!("{long} --local 1 --name whole"));
    let (mut coordinator, url) = scene.coordinator("");
    let _worker = scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ));
    let mut run = scene.start(&format!(
        "{long} --coordinator {url} --new --name cut --json"
    ));
    run.wait_for_step(10);
    coordinator.kill();
    let port = url.rsplit(':').next().expect("a port");
    let mut again = scene.start(&format!("coordinator --listen 127.0.0.1:{port}"));
    again.wait_for("http://");
    let mut follow = scene.start(&format!("follow cut --coordinator {url} --json"));
    let last = follow.wait_for("\"finished\"");
    let last: serde_json::Value = serde_json::from_str(&last).expect("an event");
    assert_eq!(last["state_hash"], expected["state_hash"]);
}

#[test]
fn a_run_waits_in_the_queue_and_can_be_cancelled() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let submit = |name: &str| {
        scene.run(&format!(
            "{TRAIN} --coordinator {url} --detach --new --name {name}"
        ))
    };
    submit("one");
    submit("two");
    let status = |name: &str| {
        let output = scene.run(&format!("status {name} --coordinator {url}"));
        text(&output.stdout) + &text(&output.stderr)
    };
    assert!(status("two").contains("queue"), "{}", status("two"));
    scene.run(&format!("cancel one --coordinator {url}"));
    assert!(status("one").contains("cancelled"), "{}", status("one"));
    scene.run(&format!("cancel two --coordinator {url}"));
    scene.run(&format!("rm two --yes --coordinator {url}"));
    let runs = text(&scene.run(&format!("runs --coordinator {url}")).stdout);
    assert!(runs.contains("one") && !runs.contains("two"), "{runs}");
}

#[test]
fn a_token_is_wanted_from_everybody() {
    let scene = Scene::new();
    scene.write("token", "0123456789abcdef0123456789abcdef");
    scene.write("wrong", "fedcba9876543210fedcba9876543210");
    let (_coordinator, url) = scene.coordinator("--token-file token");
    let refused = |line: &str| {
        let said = scene.fails(line);
        assert!(said.contains("token"), "{said}");
    };
    refused(&format!("runs --coordinator {url}"));
    refused(&format!("runs --coordinator {url} --token-file wrong"));
    refused(&format!("worker --coordinator {url} --home cache"));
    scene.run(&format!("runs --coordinator {url} --token-file token"));
}

#[test]
fn garbage_on_the_wire_does_not_disturb_anybody() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let address = url.trim_start_matches("http://");
    let mut state = 7u32;
    for length in [1, 24, 100, 5_000, 70_000] {
        let garbage: Vec<u8> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        let mut stream = TcpStream::connect(address).expect("the coordinator listens");
        // The coordinator may hang up before it has read it all.
        let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        let _ = stream.write_all(&garbage);
    }
    scene.run(&format!("runs --coordinator {url}"));
}

#[test]
fn two_coordinators_do_not_share_a_home() {
    let scene = Scene::new();
    let (coordinator, _) = scene.coordinator("");
    let output = scene
        .cohort("coordinator --listen 127.0.0.1:0")
        .output()
        .expect("the binary runs");
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    let holder = coordinator.child.id().to_string();
    assert!(said.contains(&holder), "{said}");
}
