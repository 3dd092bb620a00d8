//! The routes without a socket: who is let in, what is refused and how, and the live stream.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::header::{ETAG, SET_COOKIE};
use axum::http::{Method, Request};
use cohort_common::api::RunEvent;
use cohort_common::cluster::Limits;
use cohort_common::home::Home;
use cohort_common::net::Token;
use cohort_common::traces::Traces;
use serde_json::Value;
use tempfile::TempDir;
use tokio_stream::StreamExt;
use tonic::codegen::Service;

use super::*;
use crate::Topology;
use crate::notify::{Notices, NotifyConfig};
use crate::record::record_event;
use crate::store::tests::{name, new_run};
use crate::store::{RunStatus, StepRow, Store, StoreHandle};

const TOKEN: &str = "0123456789abcdef";

/// A coordinator that knows one run, `tiny-1`, and no worker.
struct Scene {
    cluster: Cluster,
    router: Router,
    _home: TempDir,
}

impl Scene {
    async fn new(token: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(dir.path()).unwrap();
        let store = Store::open(&home.database()).unwrap();
        store.create_run(&new_run("tiny-1"), 1000).unwrap();
        let finished = RunStatus::Finished;
        store
            .set_status(&name("tiny-1"), finished, None, 2000)
            .unwrap();
        let (store, _thread) = StoreHandle::spawn(store);
        let (cluster, _driver) = Cluster::start(
            home,
            store,
            (Limits::default(), Topology::default()),
            Notices::start(NotifyConfig::default()),
            Traces::default(),
            None,
        );
        let readiness = Arc::new(Readiness::new(cluster.clone()));
        let access = match token {
            Some(token) => Access::Shared(Token::new(token).unwrap()),
            None => Access::Open,
        };
        Self {
            router: router(cluster.clone(), access, readiness),
            cluster,
            _home: dir,
        }
    }

    /// Sends a request with headers, each written like `name: value`.
    async fn send(&self, line: &str, headers: &[&str], body: &str) -> Response {
        let (method, path) = line.split_once(' ').unwrap();
        let mut request = Request::builder()
            .method(method.parse::<Method>().unwrap())
            .uri(path);
        if headers.iter().all(|header| !header.starts_with("host")) {
            request = request.header("host", "127.0.0.1:7070");
        }
        for header in headers {
            let (name, value) = header.split_once(": ").unwrap();
            request = request.header(name, value);
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        self.router.clone().call(request).await.unwrap()
    }

    async fn status(&self, line: &str, headers: &[&str]) -> u16 {
        self.send(line, headers, "").await.status().as_u16()
    }

    /// The error of a request that is refused.
    async fn error(&self, line: &str, headers: &[&str]) -> (u16, String) {
        let response = self.send(line, headers, "").await;
        let status = response.status().as_u16();
        assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
        let body: Value = serde_json::from_str(&text(response).await).unwrap();
        (status, body["error"].as_str().unwrap().to_owned())
    }

    async fn record(&self, event: RunEvent) {
        let record = move |store: &Store| record_event(store, &name("tiny-1"), &event);
        self.cluster.store().call(record).await.unwrap();
        self.cluster.announce();
    }

    async fn steps(&self, steps: std::ops::RangeInclusive<u64>) {
        let record = move |store: &Store| {
            for step in steps {
                let row = StepRow {
                    step,
                    horizon: 5000,
                    loss: 2.0,
                    grad_norm: 1.0,
                    learning_rate: 0.1,
                    tokens: step,
                    tokens_per_second: 1.0,
                    epoch: 0.0,
                    bits_per_byte: None,
                    mfu: None,
                    skipped: false,
                    time_ms: step,
                };
                store.record_step(&name("tiny-1"), &row)?;
                store.record_event(Some(&name("tiny-1")), step, "step", &step.to_string())?;
            }
            Ok(())
        };
        self.cluster.store().call(record).await.unwrap();
        self.cluster.announce();
    }
}

async fn text(response: Response) -> String {
    let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[tokio::test]
async fn a_token_is_asked_for_where_there_is_one() {
    let scene = Scene::new(Some(TOKEN)).await;
    let bearer = format!("authorization: Bearer {TOKEN}");
    let guarded = [
        "GET /api/cluster",
        "GET /api/runs",
        "GET /api/runs/tiny-1",
        "GET /api/runs/tiny-1/history",
        "GET /api/live",
        "GET /metrics",
        "POST /api/runs/tiny-1/resume",
    ];
    for line in guarded {
        let (status, error) = scene.error(line, &["x-cohort: 1"]).await;
        assert_eq!(status, 401, "{line}");
        assert!(error.contains("authorization: Bearer TOKEN"), "{error}");
        for wrong in ["Bearer 0123456789abcdeg", TOKEN, "Bearer", ""] {
            let header = format!("authorization: {wrong}");
            assert_eq!(
                scene.status(line, &["x-cohort: 1", &header]).await,
                401,
                "{line}"
            );
        }
        let status = scene.status(line, &["x-cohort: 1", &bearer]).await;
        let expected = if line.starts_with("GET") { 200 } else { 409 };
        assert_eq!(status, expected, "{line}");
    }
    for line in [
        "GET /",
        "GET /runs/x",
        "GET /compare?run=a",
        "GET /page/app.js",
        "GET /healthz",
        "GET /readyz",
    ] {
        assert_eq!(
            scene.status(line, &["host: example.org"]).await,
            200,
            "{line}"
        );
    }
}

#[tokio::test]
async fn a_session_begins_with_the_token_and_ends_when_asked() {
    let scene = Scene::new(Some(TOKEN)).await;
    let session = async |headers: &[&str]| -> Value {
        let response = scene.send("GET /api/session", headers, "").await;
        serde_json::from_str(&text(response).await).unwrap()
    };
    let before = session(&[]).await;
    assert_eq!(
        (&before["required"], &before["signed_in"]),
        (&true.into(), &false.into())
    );
    let body = format!("{{\"token\":\"{TOKEN}\"}}");
    let response = scene
        .send("POST /api/session", &["x-cohort: 1"], &body)
        .await;
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    let set = response.headers()[SET_COOKIE].to_str().unwrap();
    for word in ["HttpOnly", "SameSite=Strict", "Path=/"] {
        assert!(set.contains(word), "{set}");
    }
    let cookie = format!("cookie: {}", set.split(';').next().unwrap());
    assert_eq!(session(&[&cookie]).await["signed_in"], true);
    assert_eq!(scene.status("GET /api/cluster", &[&cookie]).await, 200);
    let longer = cookie.replace("cohort_session=1", "cohort_session=2");
    assert_eq!(scene.status("GET /api/cluster", &[&longer]).await, 401);
    let out = scene
        .send("DELETE /api/session", &["x-cohort: 1"], "")
        .await;
    let set = out.headers()[SET_COOKIE].to_str().unwrap();
    assert!(
        set.starts_with("cohort_session=;") && set.contains("Max-Age=0"),
        "{set}"
    );
}

#[tokio::test]
async fn wrong_tokens_are_refused_and_then_not_even_looked_at() {
    let scene = Scene::new(Some(TOKEN)).await;
    let right = format!("{{\"token\":\"{TOKEN}\"}}");
    let sign_in = async |body: &str| {
        let response = scene
            .send("POST /api/session", &["x-cohort: 1"], body)
            .await;
        response.status().as_u16()
    };
    assert_eq!(sign_in("{").await, 400);
    assert_eq!(sign_in(&"x".repeat(5000)).await, 413);
    for _ in 0..10 {
        assert_eq!(sign_in("{\"token\":\"wrong\"}").await, 401);
    }
    assert_eq!(sign_in(&right).await, 429);
}

#[tokio::test]
async fn without_a_token_only_own_names_are_answered_to() {
    let scene = Scene::new(None).await;
    for host in ["localhost:7070", "127.0.0.1:7070", "[::1]:7070"] {
        assert_eq!(
            scene
                .status("GET /api/cluster", &[&format!("host: {host}")])
                .await,
            200
        );
    }
    for line in [
        "GET /api/cluster",
        "GET /",
        "GET /metrics",
        "GET /api/session",
        "GET /api/live",
    ] {
        let (status, error) = scene.error(line, &["host: evil.example"]).await;
        assert_eq!(status, 403, "{line}");
        assert!(
            error.contains("evil.example") && error.contains("--token-file"),
            "{error}"
        );
    }
    assert_eq!(
        scene.status("GET /healthz", &["host: 10.0.0.7:7070"]).await,
        200
    );
}

#[tokio::test]
async fn nothing_is_changed_for_a_page_of_another_origin() {
    for token in [None, Some(TOKEN)] {
        let scene = Scene::new(token).await;
        let bearer = format!("authorization: Bearer {TOKEN}");
        let line = "POST /api/runs/tiny-1/resume";
        let at = "host: localhost:7070";
        let tries: [(&[&str], u16); 7] = [
            (&[], 403),
            (&["x-cohort: 0"], 403),
            (&["x-cohort: 1", "origin: http://evil.example"], 403),
            (&["x-cohort: 1", "origin: null"], 403),
            (&["x-cohort: 1", "origin: http://localhost:7071"], 403),
            (&["x-cohort: 1", "origin: http://localhost:7070"], 409),
            (&["x-cohort: 1"], 409),
        ];
        for (headers, expected) in tries {
            let headers = [&[at, bearer.as_str()], headers].concat();
            assert_eq!(scene.status(line, &headers).await, expected, "{headers:?}");
        }
        // No preflight is ever granted.
        let asks = [
            "origin: http://evil.example",
            "access-control-request-method: POST",
            &bearer,
        ];
        let response = scene
            .send(&line.replace("POST", "OPTIONS"), &asks, "")
            .await;
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
        let granted = |headers: &HeaderMap| headers.contains_key("access-control-allow-origin");
        assert!(!granted(response.headers()));
    }
}

#[tokio::test]
async fn every_answer_is_hardened_and_files_are_kept_by_browsers() {
    let scene = Scene::new(None).await;
    for line in [
        "GET /",
        "GET /page/app.js",
        "GET /nope",
        "GET /api/cluster",
        "POST /api/cluster",
    ] {
        let response = scene.send(line, &[], "").await;
        let headers = response.headers();
        assert_eq!(headers["x-content-type-options"], "nosniff", "{line}");
        assert_eq!(headers["referrer-policy"], "no-referrer", "{line}");
        let policy = headers["content-security-policy"].to_str().unwrap();
        assert!(
            policy.starts_with("default-src 'none'; script-src 'self'; "),
            "{policy}"
        );
    }
    let first = scene.send("GET /page/app.js", &[], "").await;
    assert_eq!(
        first.headers()[CONTENT_TYPE],
        "text/javascript; charset=utf-8"
    );
    assert_eq!(first.headers()[CACHE_CONTROL], "no-cache");
    let tag = first.headers()[ETAG].to_str().unwrap().to_owned();
    let again = format!("if-none-match: \"x\", W/{tag}");
    assert_eq!(scene.status("GET /page/app.js", &[&again]).await, 304);
    assert_eq!(scene.status("GET /page/style.css", &[&again]).await, 200);
    let cluster = scene.send("GET /api/cluster", &[], "").await;
    assert_eq!(cluster.headers()[CACHE_CONTROL], "no-store");
}

#[tokio::test]
async fn what_cannot_be_asked_for_is_refused_by_name() {
    let scene = Scene::new(None).await;
    let refused: [(&str, u16, &str); 17] = [
        ("GET /nope", 404, "/nope"),
        ("GET /api/nope", 404, "/api/nope"),
        ("GET /page/nope.js", 404, "nope.js"),
        ("GET /page/../app.js", 404, "../app.js"),
        ("GET /page/..%2f..%2fCargo.toml", 404, "Cargo.toml"),
        ("GET /page//etc/passwd", 404, "/etc/passwd"),
        ("GET /api/runs/other", 404, "other"),
        ("GET /api/runs/other/history", 404, "other"),
        ("GET /api/live?run=other", 404, "other"),
        ("GET /api/runs/..%2f..", 400, "../.."),
        ("GET /api/runs/tiny-1/history?points=many", 400, "`many`"),
        ("GET /api/runs/tiny-1/history?points=0", 400, "`0`"),
        ("GET /api/runs/tiny-1/history?from=-1", 400, "`-1`"),
        ("GET /api/runs/tiny-1/history?from=1&from=2", 400, "`from`"),
        ("GET /api/runs/tiny-1/history?form=1", 400, "`form`"),
        ("POST /api/cluster", 405, "POST"),
        ("GET /api/runs/tiny-1/pause", 405, "GET"),
    ];
    for (line, expected, named) in refused {
        let (status, error) = scene.error(line, &["x-cohort: 1"]).await;
        assert_eq!(status, expected, "{line}: {error}");
        assert!(error.contains(named), "{line}: {error}");
    }
    let runs = (0..17).map(|_| "run=tiny-1").collect::<Vec<_>>().join("&");
    let (status, error) = scene.error(&format!("GET /api/live?{runs}"), &[]).await;
    assert_eq!((status, error.contains("17 runs")), (400, true));
    let (status, error) = scene.error("GET /api/live", &["last-event-id: x"]).await;
    assert_eq!((status, error.contains("`x`")), (400, true));
    let changes = ["pause", "resume", "cancel"].map(|verb| format!("POST /api/runs/tiny-1/{verb}"));
    for line in changes {
        let (status, error) = scene.error(&line, &["x-cohort: 1"]).await;
        assert_eq!(
            (status, error.contains("finished")),
            (409, true),
            "{line}: {error}"
        );
    }
    let grpc = ["content-type: application/grpc"];
    let unknown = scene.send("POST /cohort.v9.Client/Nope", &grpc, "").await;
    assert_eq!(unknown.headers()["grpc-status"], "12");
}

/// Reads a stream until a message has come whose name is `until`; gives all messages and the last id.
async fn read(body: Body, until: &str) -> (Vec<(String, Value)>, u64) {
    let mut stream = body.into_data_stream();
    let mut seen = String::new();
    let ended = format!("event: {until}\n");
    while !(seen.contains(&ended) && seen.contains("id: ")) {
        let piece = tokio::time::timeout(Duration::from_secs(60), stream.next()).await;
        let piece = piece
            .expect("a piece in time")
            .expect("the stream goes on")
            .unwrap();
        seen += std::str::from_utf8(&piece).unwrap();
    }
    let field = |message: &str, name: &str| {
        let line = message.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::to_owned)
    };
    let messages = seen.split_terminator("\n\n");
    let id = messages.clone().filter_map(|m| field(m, "id: ")).last();
    let named = messages.filter_map(|message| {
        let data = field(message, "data: ")?;
        Some((
            field(message, "event: ")?,
            serde_json::from_str(&data).unwrap(),
        ))
    });
    (named.collect(), id.unwrap().parse().unwrap())
}

fn note(text: &str) -> RunEvent {
    RunEvent::Note {
        run: "tiny-1".into(),
        text: text.into(),
    }
}

#[tokio::test]
async fn what_happens_arrives_and_what_was_missed_is_told() {
    let scene = Scene::new(None).await;
    scene.record(note("before")).await;
    let response = scene.send("GET /api/live?run=tiny-1", &[], "").await;
    assert_eq!(response.headers()[CONTENT_TYPE], "text/event-stream");
    scene.steps(1..=3).await;
    let (messages, last) = read(response.into_body(), "steps").await;
    let names: Vec<&str> = messages.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..2], ["cluster", "runs"]);
    assert_eq!(messages[1].1[0]["name"], "tiny-1");
    let (_, steps) = messages.iter().find(|(name, _)| name == "steps").unwrap();
    assert_eq!(
        (&steps[2]["step"], &steps[2]["time_ms"]),
        (&3.into(), &3.into())
    );

    scene.steps(4..=5).await;
    scene.record(note("while away")).await;
    let line = "GET /api/live?run=tiny-1";
    let back = format!("last-event-id: {last}");
    let (messages, last) = read(scene.send(line, &[&back], "").await.into_body(), "timeline").await;
    let told: Vec<(&str, &Value)> = messages[2..].iter().map(|(n, v)| (n.as_str(), v)).collect();
    assert_eq!(told[0].0, "steps");
    assert_eq!(told[0].1.as_array().unwrap().len(), 2);
    assert_eq!(
        (told[1].0, &told[1].1["entry"]["text"]),
        ("timeline", &"while away".into())
    );

    scene.steps(6..=600).await;
    for id in [last, 1_000_000] {
        let back = format!("last-event-id: {id}");
        let (messages, _) = read(scene.send(line, &[&back], "").await.into_body(), "reload").await;
        assert_eq!(
            messages[2],
            ("reload".into(), serde_json::json!({"run": "tiny-1"}))
        );
    }
}

#[tokio::test]
async fn a_flood_of_steps_becomes_a_word_of_it() {
    let scene = Scene::new(None).await;
    let response = scene.send("GET /api/live?run=tiny-1", &[], "").await;
    scene.steps(1..=4000).await;
    let (messages, _) = read(response.into_body(), "reload").await;
    assert!(messages.iter().all(|(name, _)| name != "steps"));
}

#[tokio::test]
async fn live_streams_are_limited_and_places_come_back() {
    let scene = Scene::new(None).await;
    let mut open = Vec::new();
    for _ in 0..live::STREAMS {
        open.push(scene.send("GET /api/live", &[], "").await);
        assert_eq!(open.last().unwrap().status(), StatusCode::OK);
    }
    let (status, error) = scene.error("GET /api/live", &[]).await;
    assert_eq!((status, error.contains("64 live streams")), (503, true));
    drop(open);
    let again = async {
        while scene.status("GET /api/live", &[]).await != 200 {
            tokio::task::yield_now().await;
        }
    };
    let again = tokio::time::timeout(Duration::from_secs(60), again).await;
    again.expect("the places are free again");
}
