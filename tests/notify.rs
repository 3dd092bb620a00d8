//! Who is told what becomes of runs: a command of the operator's, and a webhook.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::Value;

use crate::support::{DEADLINE, Scene, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";

#[test]
fn a_command_is_told_before_a_private_cluster_ends() {
    let scene = Scene::new();
    let script = scene.path("notify.sh");
    scene.write(
        "notify.sh",
        "#!/bin/sh\ncat >> notices.jsonl\necho $COHORT_EVENT $COHORT_RUN >> words.txt\nexit 3\n",
    );
    let mode = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(&script, mode).expect("it may be run");
    // That it fails does no harm to the run.
    let command = format!("--notify-command={}", script.display());
    let end = scene.finished(&format!("{TRAIN} --local 1 --name told {command}"));
    let read = |name: &str| std::fs::read_to_string(scene.path(name)).unwrap_or_default();
    let (notices, words) = (read("notices.jsonl"), read("words.txt"));
    let notice: Value = serde_json::from_str(&notices).expect("one line of JSON");
    assert_eq!(notice["event"], "finished");
    assert_eq!(
        (&notice["run"], &notice["step"]),
        (&"told".into(), &end["step"])
    );
    let said = notice["text"].as_str().expect("a text");
    assert!(said.contains("finished after step 12"), "{said}");
    assert!(notice["time_ms"].as_u64() > Some(1 << 40), "{notice}");
    assert_eq!(words, "finished told\n");
    let log = read("home/logs/coordinator.log");
    assert!(log.contains("the command was not told"), "{log}");
}

#[test]
fn only_a_coordinator_can_be_told_whom_to_notify() {
    let scene = Scene::new();
    let (_coordinator, _) = scene.coordinator("");
    let said = scene.fails(&format!("{TRAIN} --notify-command=true"));
    assert!(said.contains("`cohort coordinator`"), "{said}");
    let output = scene.cohort("coordinator --stall-after 5").output();
    let said = text(&output.expect("the binary runs").stderr);
    assert!(said.contains("--notify-command"), "{said}");
    let output = scene
        .cohort("coordinator --notify-webhook ftp://x")
        .output();
    let said = text(&output.expect("the binary runs").stderr);
    assert!(said.contains("http://"), "{said}");
    scene.write("spec.toml", "[watchdog]\nnotify_command = \"true\"\n");
    let said = scene.fails(TRAIN);
    assert!(
        said.contains("unknown key `watchdog.notify_command`"),
        "{said}"
    );
}

/// A server that refuses the first request and takes the others; gives what it took.
fn hooks() -> (String, Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let (sender, notices) = channel();
    std::thread::spawn(move || {
        for (n, stream) in listener.incoming().flatten().enumerate() {
            let taken = (n > 0).then_some(&sender);
            if answer(stream, taken).is_none() {
                return;
            }
        }
    });
    (format!("http://{address}/hook"), notices)
}

/// Reads a request and answers it; `None` where nobody wants to know any more.
fn answer(stream: TcpStream, taken: Option<&Sender<Value>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let (mut length, mut line) = (0, String::new());
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let status = match taken {
        Some(_) => "204 No Content",
        None => "503 Service Unavailable",
    };
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    reader.get_mut().write_all(head.as_bytes()).ok()?;
    match taken {
        Some(taken) => taken
            .send(serde_json::from_slice(&body).expect("JSON"))
            .ok(),
        None => Some(()),
    }
}

/// The next notice of a kind. Stalls of a slow machine may lie between.
fn next(notices: &Receiver<Value>, kind: &str) -> Value {
    loop {
        let notice = notices.recv_timeout(DEADLINE).expect("somebody is told");
        if notice["event"] == kind {
            return notice;
        }
        let passing = ["stalled", "moving"].iter().any(|k| notice["event"] == *k);
        assert!(passing, "{notice} in place of {kind}");
    }
}

#[test]
fn a_webhook_hears_of_stalls_ends_and_pauses() {
    let scene = Scene::new();
    let (hook, notices) = hooks();
    let (_coordinator, url) =
        scene.coordinator(&format!("--notify-webhook={hook} --stall-after=2"));
    // There is no worker yet.
    scene.run(&format!("{TRAIN} --detach --name first"));
    let first = notices.recv_timeout(DEADLINE).expect("somebody is told");
    assert_eq!(first["event"], "stalled");
    let said = first["text"].as_str().expect("a text");
    assert!(said.contains("0 of 1 are there"), "{said}");
    let _worker = scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ));
    let moving = next(&notices, "moving");
    assert_eq!(moving["run"], "first");
    assert_eq!(next(&notices, "finished")["step"], 12);

    scene.run(&format!(
        "{TRAIN} --set train.steps=60 --set watchdog.sigma=0.8 --set watchdog.window=20 --set watchdog.action=pause --detach --new --name second"
    ));
    let paused = next(&notices, "paused");
    assert_eq!(paused["run"], "second");
    let said = paused["text"].as_str().expect("a text");
    assert!(said.contains("`cohort resume second` goes on"), "{said}");
    // What a user asks for is no news.
    scene.run("cancel second");
    scene.run(&format!("{TRAIN} --detach --new --name third"));
    assert_eq!(next(&notices, "finished")["run"], "third");
}
