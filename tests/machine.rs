//! `cohort doctor` on this machine and towards a coordinator, completions and manual pages.

use std::net::TcpListener;
use std::process::Command;

use serde_json::Value;

use crate::support::{Scene, text};

/// What `cohort doctor` finds, and its exit code. `token` is in its environment.
fn doctor(scene: &Scene, flags: &str, token: &str) -> (Vec<Value>, Option<i32>) {
    let mut command = scene.cohort(&format!("doctor --json {flags}"));
    let output = command
        .env("COHORT_TOKEN", token)
        .output()
        .expect("the binary runs");
    let lines = text(&output.stdout);
    let found: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("stdout is JSON lines"))
        .collect();
    assert!(!found.is_empty(), "{}", text(&output.stderr));
    (found, output.status.code())
}

fn finding<'a>(found: &'a [Value], check: &str) -> &'a Value {
    let found = found.iter().find(|finding| finding["check"] == check);
    found.unwrap_or_else(|| panic!("nothing is said of `{check}`"))
}

fn problems(found: &[Value]) -> Vec<&Value> {
    found
        .iter()
        .filter(|finding| finding["level"] == "problem")
        .collect()
}

#[test]
fn a_machine_is_looked_at_and_left_as_it_was() {
    let scene = Scene::new();
    let (found, code) = doctor(&scene, "--listen 127.0.0.1:0", "");
    for check in [
        "processor",
        "cores",
        "memory",
        "open files",
        "shared memory",
        "gpu",
        "home",
        "disk space",
    ] {
        finding(&found, check);
    }
    assert_eq!((problems(&found), code), (vec![], Some(0)));
    assert!(!scene.path("home").exists());

    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    let (found, code) = doctor(&scene, &format!("--listen {address}"), "");
    assert_eq!(code, Some(1));
    let port = finding(&found, "port");
    assert_eq!(port["level"], "problem");
    assert!(
        port["text"].as_str().expect("a text").contains("in use"),
        "{port}"
    );

    drop(taken);
    let (found, code) = doctor(&scene, &format!("--coordinator http://{address}"), "");
    assert_eq!(code, Some(1));
    assert_eq!(problems(&found), [finding(&found, "coordinator")]);
}

#[test]
fn the_way_to_a_coordinator_is_looked_at_by_whoever_may_come_in() {
    let scene = Scene::new();
    scene.run("init --name localhost");
    let (_coordinator, url) = scene.coordinator("");
    let (found, code) = doctor(&scene, "", "");
    assert_eq!((problems(&found), code), (vec![], Some(0)));
    for check in [
        "coordinator",
        "round trip",
        "throughput",
        "clock",
        "token",
        "tokens",
    ] {
        assert_ne!(finding(&found, check)["level"], "problem", "{check}");
    }
    let says = |found: &[Value], check: &str, what: &str| {
        let text = finding(found, check)["text"]
            .as_str()
            .expect("a text")
            .to_owned();
        assert!(text.contains(what), "{check}: {text}");
    };
    says(&found, "token", "lets in an operator, until it is revoked");
    says(&found, "throughput", "in each direction");
    let address = url.trim_start_matches("https://");
    let (found, code) = doctor(&scene, &format!("--listen {address}"), "");
    assert_eq!((problems(&found), code), (vec![], Some(0)));
    says(&found, "port", "works on this home");

    let create = |flags: &str| {
        text(&scene.run(&format!("token create {flags}")).stdout)
            .trim()
            .to_owned()
    };
    let elsewhere = format!("--home elsewhere --coordinator {url}");
    let worker = create("--role worker");
    let (found, code) = doctor(&scene, &elsewhere, &worker);
    assert_eq!((problems(&found), code), (vec![], Some(0)));
    says(&found, "token", "lets in a worker, for another ");
    says(&found, "throughput", "in each direction");
    let id = worker.split('_').nth(2).expect("a token's name");
    scene.run(&format!("token revoke {id}"));
    let (found, code) = doctor(&scene, &elsewhere, &worker);
    assert_eq!(code, Some(1));
    assert_eq!(problems(&found), [finding(&found, "token")]);
    says(&found, "token", "was revoked");
    let (found, code) = doctor(&scene, &elsewhere, "");
    assert_eq!(code, Some(1));
    says(
        &found,
        "coordinator",
        "nothing here says by which authority",
    );
}

#[test]
fn a_worker_that_is_in_looks_with_its_certificate() {
    let scene = Scene::new();
    scene.run("init --name localhost");
    let (_coordinator, url) = scene.coordinator("");
    let token = text(&scene.run("token create --role worker").stdout);
    let line =
        format!("worker --coordinator {url} --threads 1 --home elsewhere --exchange-listen none");
    let mut worker = scene.start_with(&line, ("COHORT_TOKEN", token.trim()));
    worker.wait_for("joined");
    let (found, code) = doctor(&scene, &format!("--home elsewhere --coordinator {url}"), "");
    assert_eq!((problems(&found), code), (vec![], Some(0)));
    let certificate = finding(&found, "certificate")["text"]
        .as_str()
        .expect("a text");
    assert!(
        certificate.contains("is renewed by itself"),
        "{certificate}"
    );
    let token = finding(&found, "token")["text"].as_str().expect("a text");
    assert!(token.contains("lets in a worker"), "{token}");
}

#[test]
fn shells_understand_the_completions() {
    let scene = Scene::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = text(&scene.run(&format!("completions {shell}")).stdout);
        assert!(
            script.contains("quickstart") && script.contains("exchange-listen"),
            "{shell}"
        );
        scene.write(shell, &script);
    }
    for (shell, flag) in [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")] {
        match Command::new(shell)
            .arg(flag)
            .arg(scene.path(shell))
            .output()
        {
            Ok(output) => assert!(output.status.success(), "{shell}: {}", text(&output.stderr)),
            Err(_) => eprintln!("skipped: there is no {shell}"),
        }
    }
    // What somebody who types `cohort wor` and a tab gets.
    let complete = "source ./bash; COMP_WORDS=(cohort wor); COMP_CWORD=1; _cohort cohort wor cohort; echo \"${COMPREPLY[*]}\"";
    let directory = scene.path("");
    if let Ok(output) = Command::new("bash")
        .args(["-c", complete])
        .current_dir(directory)
        .output()
    {
        assert_eq!(
            text(&output.stdout).trim(),
            "worker",
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn each_verb_has_a_manual_page() {
    let scene = Scene::new();
    scene.run("man --out pages");
    for page in [
        "cohort.1",
        "cohort-worker.1",
        "cohort-token-create.1",
        "cohort-doctor.1",
    ] {
        let path = scene.path("pages").join(page);
        let content = std::fs::read_to_string(&path).expect(page);
        assert!(
            content.contains(".TH cohort") && content.contains(".SH NAME"),
            "{page}"
        );
        match Command::new("mandoc")
            .args(["-T", "lint", "-W", "error"])
            .arg(&path)
            .output()
        {
            Ok(output) => assert!(output.status.success(), "{page}: {}", text(&output.stdout)),
            Err(_) => eprintln!("skipped: there is no mandoc"),
        }
    }
    let worker = std::fs::read_to_string(scene.path("pages/cohort-worker.1")).expect("a page");
    assert!(worker.contains("grace"), "{worker}");
}
