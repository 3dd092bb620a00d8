//! The coordinator by HTTP, asked as a browser or a script asks: figures, the live stream, actions, and who may not.

use std::time::Duration;

use serde_json::Value;

use crate::support::http::{Http, raw};
use crate::support::{Process, Scene, on_a_quiet_machine};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt --detach --name run";

/// How soon a page must know that a worker is lost.
const SOON: Duration = Duration::from_secs(2);

/// Steps that no test waits for the end of.
const LONG: &str = "--set train.steps=100000 --set checkpoint.every=0 --set train.eval_every=1000";

fn worker(scene: &Scene, url: &str) -> Process {
    let mut worker = scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ));
    worker.wait_for("joined");
    worker
}

fn is_entry(kind: &str) -> impl Fn(&Value) -> bool {
    let kind = kind.to_owned();
    move |data| data["entry"]["kind"] == kind.as_str()
}

#[test]
fn a_run_is_seen_while_it_trains_and_afterwards() {
    let scene = Scene::new();
    let (mut coordinator, url) = scene.coordinator("");
    coordinator.wait_for(&format!("watch it at {url}/"));
    let http = Http::new(&url);
    assert_eq!(http.get("/healthz").text, "ok\n");
    assert_eq!(http.get("/readyz").text, "ok\n");
    assert_eq!(http.get("/api/runs").json(), Value::Array(Vec::new()));
    scene.run(TRAIN);
    let mut live = http.live("?run=run", None);
    let _worker = worker(&scene, &url);
    let mut next = 1;
    live.wait_for("steps", |steps| {
        for step in steps.as_array().expect("a list") {
            assert_eq!(step["step"], next);
            assert!(step["time_ms"].as_u64() > Some(0));
            next += 1;
        }
        next > 12
    });
    live.wait_for("eval", |eval| eval["step"] == 12);
    live.wait_for("timeline", is_entry("finished"));
    live.wait_for("runs", |runs| runs[0]["status"] == "finished");

    let run = http.get("/api/runs/run").json();
    assert_eq!(run["info"]["status"], "finished");
    assert_eq!(
        run["facts"]["parameters"],
        http.get("/api/runs").json()[0]["parameters"]
    );
    let history = http.get("/api/runs/run/history?from=3&points=5").json();
    assert_eq!(
        (&history["rows"], &history["step"][4]),
        (&10.into(), &12.into())
    );
    let cluster = http.get("/api/cluster").json();
    assert_eq!(cluster["workers"].as_array().map(Vec::len), Some(1));
    assert!(http.get("/metrics").text.contains("cohort_build_info{"));
    assert!(http.get("/runs/run").text.contains("/page/app.js"));
    assert_eq!(http.get("/api/runs/other").status, 404);
}

#[test]
fn a_lost_worker_is_told_of_at_once() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let http = Http::new(&url);
    let mut first = worker(&scene, &url);
    let _second = worker(&scene, &url);
    scene.run(&format!("{TRAIN} {LONG} --set train.min_workers=2"));
    let mut live = http.live("?run=run", None);
    live.wait_for("steps", |_| true);
    let killed = std::time::Instant::now();
    first.kill();
    let (told, lost) = live.wait_for("timeline", is_entry("worker_lost"));
    let after = told.duration_since(killed);
    eprintln!("told of it after {} ms: {lost}", after.as_millis());
    assert!(
        after < on_a_quiet_machine(SOON),
        "told of it after {} ms",
        after.as_millis()
    );
    assert!(lost["entry"]["worker"].is_string() && lost["run"] == "run");
    live.wait_for("cluster", |cluster| {
        cluster["workers"].as_array().map(Vec::len) == Some(1)
    });
}

#[test]
fn a_run_is_paused_resumed_and_cancelled() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let http = Http::new(&url);
    let _worker = worker(&scene, &url);
    scene.run(&format!("{TRAIN} {LONG}"));
    let mut live = http.live("?run=run", None);
    live.wait_for("steps", |_| true);
    let paused = http.post("/api/runs/run/pause", "").json();
    assert_eq!(paused["status"], "paused");
    assert_eq!(paused["checkpoints"][0]["step"], paused["step"]);
    live.wait_for("timeline", is_entry("paused"));
    let again = http.post("/api/runs/run/pause", "");
    assert_eq!(again.status, 409);
    assert!(again.error().contains("rests already"), "{}", again.text);

    let resumed = http.post("/api/runs/run/resume", "");
    assert_eq!(resumed.status, 200, "{}", resumed.text);
    live.wait_for("steps", |_| true);
    assert_eq!(http.post("/api/runs/run/resume", "").status, 409);
    let cancelled = http.post("/api/runs/run/cancel", "").json();
    assert_eq!(cancelled["status"], "cancelled");
    live.wait_for("runs", |runs| runs[0]["status"] == "cancelled");
    assert_eq!(http.post("/api/runs/other/cancel", "").status, 404);
    let foreign = Http::new(&url).with("origin", "http://evil.example");
    assert_eq!(foreign.post("/api/runs/run/resume", "").status, 403);
}

#[test]
fn a_reader_goes_on_where_it_was_after_the_coordinator_was_killed() {
    let scene = Scene::new();
    let (mut coordinator, url) = scene.coordinator("");
    let http = Http::new(&url);
    scene.run(&format!("{TRAIN} --set train.steps=400"));
    let mut live = http.live("?run=run", None);
    let first = worker(&scene, &url);
    let mut seen = 0;
    let last_of = |steps: &Value| steps.as_array().and_then(|all| all.last().cloned());
    let (_, steps) = live.wait_for("steps", |_| true);
    seen = last_of(&steps)
        .and_then(|step| step["step"].as_u64())
        .unwrap_or(seen);
    // What comes after that may be read or not before the end: it is asked for again.
    let last = live.last;
    coordinator.kill();
    drop(first);
    live.wait_for_end();

    let (_coordinator, url) = scene.coordinator("");
    let _worker = worker(&scene, &url);
    let mut live = Http::new(&url).live("?run=run", last);
    // Steps after the newest checkpoint are made again, so that some come twice; none is left out.
    live.wait_for("steps", |steps| {
        for step in steps.as_array().expect("a list") {
            let step = step["step"].as_u64().expect("a number");
            assert!(step <= seen + 1, "{step} after {seen}");
            seen = seen.max(step);
        }
        seen >= 400
    });
    live.wait_for("timeline", is_entry("finished"));
}

#[test]
fn only_who_has_the_token_is_answered() {
    let scene = Scene::new();
    scene.write("token", "0123456789abcdef0123456789abcdef\n");
    scene.write("wrong", "0123456789abcdef0123456789abcdee\n");
    let flags = "--token-file token --http 127.0.0.1:0";
    let (mut coordinator, url) = scene.coordinator(flags);
    let line = coordinator.wait_for("watch it at http://");
    let at = line.split("watch it at ").nth(1).expect("an address");
    let page = at.trim_end_matches('/').to_owned();
    assert_ne!(page, url, "a place of its own");
    for url in [&url, &page] {
        let http = Http::new(url);
        assert_eq!(http.get("/").status, 200);
        assert_eq!(http.get("/api/session").json()["required"], true);
        for path in ["/api/cluster", "/api/runs/x", "/metrics", "/api/live"] {
            let refused = http.get(path);
            assert_eq!(refused.status, 401, "{path}");
            assert!(refused.error().contains("token"), "{}", refused.text);
        }
        let wrong = r#"{"token":"0123456789abcdef0123456789abcdee"}"#;
        assert_eq!(http.post("/api/session", wrong).status, 401);
        let token = r#"{"token":"0123456789abcdef0123456789abcdef"}"#;
        let entered = http.post("/api/session", token);
        assert_eq!(entered.status, 204);
        let cookie = entered.cookie.expect("a cookie");
        let inside = Http::new(url).with("cookie", &cookie);
        assert_eq!(inside.get("/api/cluster").status, 200);
        assert_eq!(inside.post("/api/runs/run/cancel", "").status, 404);
        inside.live("", None).wait_for("cluster", |_| true);
    }
    let said = scene.fails(&format!("runs --coordinator {page} --token-file token"));
    assert!(said.contains(&page), "no gRPC there: {said}");
    let said = scene.fails("runs --token-file wrong");
    assert!(said.contains("token"), "{said}");
    let said = scene.fails("coordinator --listen 127.0.0.1:0 --http 0.0.0.0:0 --home other");
    assert!(
        said.contains("refusing to listen on 0.0.0.0:0 without a token"),
        "{said}"
    );
}

#[test]
fn what_is_no_request_of_ours_is_refused() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let status = |bytes: &[u8]| {
        let said = raw(&url, bytes);
        said.split(' ').nth(1).unwrap_or_default().to_owned()
    };
    let close = "connection: close\r\n\r\n";
    // A page of another origin could send such a call unasked, if it were read.
    let call = format!(
        "POST /cohort.v1.Client/ListRuns HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\
         {close}\0\0\0\0\0"
    );
    assert_eq!(status(call.as_bytes()), "505");
    let foreign = format!("GET /api/cluster HTTP/1.1\r\nhost: evil.example\r\n{close}");
    assert_eq!(status(foreign.as_bytes()), "403");
    let climbing = format!("GET /page/../../etc/passwd HTTP/1.1\r\nhost: localhost\r\n{close}");
    assert_eq!(status(climbing.as_bytes()), "404");
    let nameless = format!("GET /api/cluster HTTP/1.1\r\n{close}");
    assert_eq!(status(nameless.as_bytes()), "403");
    let long = format!(
        "GET /{} HTTP/1.1\r\nhost: localhost\r\n{close}",
        "x".repeat(70_000)
    );
    assert_eq!(status(long.as_bytes()), "414");
    let headers = "x: y\r\n".repeat(200);
    let many = format!("GET / HTTP/1.1\r\nhost: localhost\r\n{headers}{close}");
    assert_eq!(status(many.as_bytes()), "431");
    assert_eq!(status(b"nonsense\r\n\r\n"), "400");
    // After all that it still answers.
    assert_eq!(Http::new(&url).get("/api/cluster").status, 200);
}
