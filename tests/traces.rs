//! Traces of steps: a collector in this process gets spans from a coordinator and its workers.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::support::{DEADLINE, Scene, text};

/// A span, and who sent it.
#[derive(Clone, Debug)]
struct Span {
    service: String,
    trace: Vec<u8>,
    id: Vec<u8>,
    parent: Vec<u8>,
    name: String,
    start: u64,
    end: u64,
    run: String,
    step: i64,
    worker: String,
}

/// The text of an attribute; empty where there is none.
fn word(attributes: &[KeyValue], key: &str) -> String {
    match value(attributes, key) {
        Some(Value::StringValue(text)) => text,
        _ => String::new(),
    }
}

fn value(attributes: &[KeyValue], key: &str) -> Option<Value> {
    let found = attributes.iter().find(|a| a.key == key)?;
    let AnyValue { value } = found.value.clone()?;
    value
}

struct Collector(std::sync::Mutex<std::sync::mpsc::Sender<Span>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for from in request.into_inner().resource_spans {
            let resource = from.resource.unwrap_or_default();
            let service = word(&resource.attributes, "service.name");
            for span in from.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let step = match value(&span.attributes, "cohort.step") {
                    Some(Value::IntValue(step)) => step,
                    _ => -1,
                };
                let span = Span {
                    service: service.clone(),
                    run: word(&span.attributes, "cohort.run"),
                    worker: word(&span.attributes, "cohort.worker"),
                    step,
                    trace: span.trace_id,
                    id: span.span_id,
                    parent: span.parent_span_id,
                    name: span.name,
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                };
                // A test that is over needs no more of them.
                let _ = self.0.lock().expect("no panic here").send(span);
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Starts a collector on a free port; gives its address and what it gets. It ends with the process.
fn collector() -> (SocketAddr, Receiver<Span>) {
    let (spans, got) = channel();
    let (told, address) = channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("it listens");
            told.send(address).expect("the test waits");
            let service = TraceServiceServer::new(Collector(std::sync::Mutex::new(spans)));
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .expect("it serves");
        });
    });
    (address.recv().expect("it listens"), got)
}

/// The spans up to the moment at which they hold what is wanted.
fn wait(got: &Receiver<Span>, what: &str, mut holds: impl FnMut(&[Span]) -> bool) -> Vec<Span> {
    let deadline = Instant::now() + DEADLINE;
    let mut spans = Vec::new();
    while !holds(&spans) {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(span) = got.recv_timeout(left) else {
            panic!(
                "not in time: {what}; {} spans came: {spans:#?}",
                spans.len()
            );
        };
        spans.push(span);
    }
    spans
}

/// The spans of a step.
fn of(spans: &[Span], step: i64) -> Vec<&Span> {
    spans.iter().filter(|span| span.step == step).collect()
}

#[test]
fn a_step_is_one_trace_across_the_coordinator_and_its_workers() {
    let (address, got) = collector();
    let scene = Scene::new();
    let flags = format!("--otlp http://{address} --otlp-every 4");
    let (_coordinator, url) = scene.coordinator(&flags);
    let worker = || {
        scene.start(&format!(
            "worker --coordinator {url} --threads 1 --home cache {flags} --no-shared-memory"
        ))
    };
    let (_one, _two) = (worker(), worker());
    scene.finished(&format!(
        "pretrain spec.toml --corpus text.txt --new --set train.min_workers=2 --name traced --coordinator {url}"
    ));
    let names = |span: &Span, name: &str| span.name.starts_with(name);
    let spans = wait(&got, "all spans of step 8", |spans| {
        let step = of(spans, 8);
        let count = |name: &str| step.iter().filter(|s| names(s, name)).count();
        ["step", "sum", "commit", "store"]
            .iter()
            .all(|n| count(n) == 1)
            && ["update", "receive root"].iter().all(|n| count(n) == 2)
            && ["lane", "send lane"].iter().all(|n| count(n) >= 2)
    });
    let step = of(&spans, 8);
    let root = step.iter().find(|s| s.name == "step").expect("it came");
    assert_eq!(root.parent, Vec::<u8>::new());
    assert_eq!(root.service, "cohort-coordinator");
    assert!(root.end > root.start);
    for span in &step {
        assert_eq!(span.trace, root.trace, "{span:?}");
        assert_eq!(span.run, "traced");
        assert!(span.end >= span.start, "{span:?}");
        if span.id != root.id {
            assert_eq!(span.parent, root.id, "{span:?}");
        }
        let of_worker = span.service == "cohort-worker";
        assert_eq!(span.worker.is_empty(), !of_worker, "{span:?}");
    }
    let ids: BTreeSet<_> = step.iter().map(|span| &span.id).collect();
    assert_eq!(ids.len(), step.len(), "ids differ");
    let workers: BTreeSet<_> = step.iter().map(|span| span.worker.as_str()).collect();
    assert_eq!(workers, BTreeSet::from(["", "w1", "w2"]));
    // Others are of other traces, and of steps that are traced.
    assert!(spans.iter().all(|span| span.step % 4 == 0), "{spans:#?}");
    let same = |span: &&Span| (span.step == 8) != (span.trace == root.trace);
    assert!(!spans.iter().any(|span| same(&span)));
}

#[test]
fn a_collector_that_is_not_there_changes_nothing() {
    let scene = Scene::new();
    let plain = scene.finished("pretrain spec.toml --corpus text.txt --new --local 2");
    // A port that was free a moment ago.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = gone.local_addr().expect("it has one");
    drop(gone);
    let mut command = scene.cohort("pretrain spec.toml --corpus text.txt --new --local 2 --json");
    command.env("COHORT_OTLP", format!("http://{address}"));
    command.env("COHORT_OTLP_EVERY", "1");
    let output = command.output().expect("the binary runs");
    let events = text(&output.stdout);
    let finished = events.lines().find(|line| line.contains("\"finished\""));
    let finished: serde_json::Value =
        serde_json::from_str(finished.expect("it finishes")).expect("an event");
    assert_eq!(finished["state_hash"], plain["state_hash"]);
    for name in ["coordinator", "worker-1", "worker-2"] {
        let log = scene.path("home").join("logs").join(format!("{name}.log"));
        let log = std::fs::read_to_string(log).expect("it has logged");
        let said = log.matches("does not take traces").count();
        assert_eq!(said, 1, "{name} says it once:\n{log}");
    }
}

#[test]
fn an_address_that_is_none_is_refused() {
    let scene = Scene::new();
    let said = scene.fails("coordinator --listen 127.0.0.1:0 --otlp https://localhost:4317");
    assert!(
        said.contains("`https://localhost:4317` is no address of a collector"),
        "{said}"
    );
    let said = scene.fails("worker --coordinator http://127.0.0.1:1 --otlp collector");
    assert!(said.contains("http://127.0.0.1:4317"), "{said}");
}
