//! Health by gRPC, and how a coordinator ends that is asked to.

use cohort_common::net::{self, Token};
use cohort_common::security::Whom;
use cohort_proto::v1;
use cohort_proto::v1::client_client::ClientClient;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::http::Http;
use crate::support::signal::{self, Signal};
use crate::support::{DEADLINE, Process, Scene};

const TRAIN: &str =
    "pretrain spec.toml --corpus text.txt --set train.eval_every=0 --set checkpoint.every=10000";

fn asked(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.into(),
    }
}

async fn check(channel: &Channel, service: &str) -> Result<ServingStatus, Status> {
    let reply = HealthClient::new(channel.clone())
        .check(asked(service))
        .await?;
    Ok(reply.get_ref().status())
}

#[tokio::test]
async fn anybody_may_ask_whether_a_coordinator_serves_and_nothing_else() {
    let scene = Scene::new();
    scene.run("init --name localhost");
    let (_coordinator, url) = scene.coordinator("");
    let token = std::fs::read_to_string(scene.path("home/security/operator.token"));
    let token = Token::new(&token.expect("a token")).expect("a token");
    // The fingerprint alone: no call carries the token.
    let channel = net::connect(&url, token.trust().as_ref(), Whom::Coordinator).await;
    let channel = channel.expect("it answers");
    for service in ["", "cohort.v1.Workers", "cohort.v1.Client"] {
        let status = check(&channel, service).await;
        assert_eq!(status.expect(service), ServingStatus::Serving, "{service}");
    }
    let unknown = check(&channel, "cohort.v1.Nothing").await;
    assert_eq!(unknown.expect_err("no such service").code(), Code::NotFound);
    let runs = ClientClient::new(channel.clone())
        .list_runs(v1::Empty {})
        .await;
    assert_eq!(runs.expect_err("no token").code(), Code::Unauthenticated);
    let unknown = HealthClient::new(channel)
        .watch(asked("cohort.v1.Nothing"))
        .await;
    let first = unknown.expect("a stream").into_inner().message().await;
    let first = first.expect("a message").expect("a message");
    assert_eq!(first.status(), ServingStatus::ServiceUnknown);
}

fn worker(scene: &Scene, url: &str, home: &str) -> Process {
    let mut worker = scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home {home}"
    ));
    worker.wait_for("joined");
    worker
}

#[test]
fn a_coordinator_that_is_asked_to_end_checkpoints_its_run_and_another_machine_goes_on() {
    let train = format!("{TRAIN} --name run --set train.steps=300");
    let scene = Scene::new();
    let undisturbed = scene.finished(&format!("{train} --local 1 --home alone"));

    let (mut coordinator, url) = scene.coordinator("");
    let mut first = worker(&scene, &url, "w1");
    let mut run = scene.start(&format!("{train} --json --coordinator {url}"));
    run.wait_for_step(10);
    signal::send(coordinator.pid(), Signal::Terminate);
    assert_eq!(coordinator.wait(), Some(0));
    let said = coordinator.printed();
    assert!(said.contains("the run is checkpointed"), "{said}");
    // The worker, and what it has in memory, goes with the machine.
    first.kill();
    run.kill();
    let kept = scene.path("home/runs/run/checkpoints");
    let kept: Vec<_> = std::fs::read_dir(kept).expect("there are some").collect();
    assert_eq!(kept.len(), 1, "{kept:?}");

    let (_coordinator, url) = scene.coordinator("");
    let _second = worker(&scene, &url, "w2");
    let end = scene.finished("follow run");
    assert_eq!(end["state_hash"], undisturbed["state_hash"]);
    let ledger = scene.run("ledger run").stdout;
    let alone = scene.run("ledger run --home alone").stdout;
    assert!(ledger == alone, "no step is lost or made twice");
}

#[tokio::test]
async fn whoever_watches_sees_that_it_is_about_to_end() {
    let scene = Scene::new();
    let (mut coordinator, url) = scene.coordinator("--grace 3600");
    let worker = worker(&scene, &url, "w1");
    let mut run = scene.start(&format!(
        "{TRAIN} --json --coordinator {url} --set train.steps=100000"
    ));
    run.wait_for_step(5);
    // Nobody can give a checkpoint.
    signal::send(worker.pid(), Signal::Stop);
    let channel = net::connect(&url, None, Whom::Coordinator)
        .await
        .expect("it answers");
    let watch = HealthClient::new(channel).watch(asked("")).await;
    let mut watch = watch.expect("a stream").into_inner();
    let first = watch
        .message()
        .await
        .expect("a message")
        .expect("a message");
    assert_eq!(first.status(), ServingStatus::Serving);
    signal::send(coordinator.pid(), Signal::Terminate);
    let next = tokio::time::timeout(DEADLINE, watch.message()).await;
    let next = next
        .expect("in time")
        .expect("a message")
        .expect("a message");
    assert_eq!(next.status(), ServingStatus::NotServing);
    let http = Http::new(&url);
    assert_eq!(http.get("/healthz").status, 200);
    let ready = http.get("/readyz");
    assert_eq!(ready.status, 503);
    assert!(ready.error().contains("about to end"), "{}", ready.text);
    // Once more, and it waits for nothing.
    signal::send(coordinator.pid(), Signal::Terminate);
    assert_eq!(coordinator.wait(), Some(130));
    signal::send(worker.pid(), Signal::Continue);
}
