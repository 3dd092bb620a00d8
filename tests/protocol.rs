//! Peers that speak another version of the protocol, or do not speak as they should.

use cohort_common::protocol::{PROTOCOL, PROTOCOL_KEY, Speaker};
use cohort_common::seal::Sealer;
use cohort_proto::v1;
use cohort_proto::v1::client_client::ClientClient;
use cohort_proto::v1::workers_client::WorkersClient;
use cohort_proto::v1::workers_server::{Workers, WorkersServer};
use tokio::net::TcpListener;
use tokio_stream::iter;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::support::{Scene, text};

/// A request of somebody who speaks this version, if any.
fn request<T>(message: T, version: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(version) = version {
        let value: MetadataValue<_> = version.parse().expect("a value of a header");
        request.metadata_mut().insert(PROTOCOL_KEY, value);
    }
    request
}

fn register() -> v1::FromWorker {
    let register = v1::Register {
        version: "9.9.9".into(),
        ..v1::Register::default()
    };
    v1::FromWorker {
        kind: Some(v1::from_worker::Kind::Register(register)),
    }
}

/// What a coordinator answers to a worker's first message.
async fn answer(
    url: &str,
    message: v1::FromWorker,
    version: Option<&str>,
) -> Result<Option<v1::Frame>, Status> {
    let message = Sealer::default().frame(&message);
    let mut client = WorkersClient::connect(url.to_owned())
        .await
        .expect("the coordinator listens");
    let session = client.session(request(iter([message]), version)).await?;
    session.into_inner().message().await
}

/// This build's version with a first and second number that differ by so much.
fn version(major: i64, minor: i64) -> String {
    let number = |own: u32, more: i64| u32::try_from(i64::from(own) + more).unwrap_or(0);
    let (major, minor) = (number(PROTOCOL.major, major), number(PROTOCOL.minor, minor));
    format!("{major}.{minor} 9.9.9")
}

#[tokio::test]
async fn a_worker_one_minor_version_away_works_and_one_of_another_major_is_told_who_is_old() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    for near in [version(0, 0), version(0, 1), version(0, -1)] {
        let welcome = answer(&url, register(), Some(&near)).await;
        assert!(welcome.expect(&near).is_some(), "{near}");
    }
    for (far, side) in [
        (version(-1, 0), "on this machine"),
        (version(1, 0), "on the coordinator's machine"),
    ] {
        let refused = answer(&url, register(), Some(&far)).await.expect_err(&far);
        assert_eq!(refused.code(), Code::FailedPrecondition);
        let said = refused.message();
        let numbers = far.split(' ').next().expect("a first word");
        let own = PROTOCOL.to_string();
        for word in [numbers, "9.9.9", &*own, side] {
            assert!(said.contains(word), "`{word}` is not in: {said}");
        }
    }
    let refused = answer(&url, register(), None)
        .await
        .expect_err("no version");
    assert!(refused.message().contains("older than 7.0"), "{refused}");
}

#[tokio::test]
async fn a_client_of_another_version_is_told_who_is_old() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let mut client = ClientClient::connect(url).await.expect("it listens");
    for near in [None, Some(version(0, 1)), Some(version(0, -1))] {
        let runs = client
            .list_runs(request(v1::Empty {}, near.as_deref()))
            .await;
        assert!(runs.is_ok(), "{near:?}");
    }
    for (far, side) in [
        (version(-1, 0), "on this machine"),
        (version(1, 0), "on the coordinator's machine"),
    ] {
        let refused = client.list_runs(request(v1::Empty {}, Some(&far))).await;
        let refused = refused.expect_err("another major version");
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains(side), "{refused}");
    }
}

/// A coordinator of another major version, as it answers a call of this one.
struct Other;

#[tonic::async_trait]
impl Workers for Other {
    type SessionStream = ReceiverStream<Result<v1::Frame, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::Frame>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let said = request.metadata().get(PROTOCOL_KEY);
        let said = said.and_then(|said| said.to_str().ok());
        let mut newer = Speaker::here();
        newer.protocol.major += 1;
        newer.build = "9.9.9".into();
        match cohort_common::protocol::admit(said, &newer) {
            Ok(_) => Err(Status::internal("it should not be admitted")),
            Err(mismatch) => Err(Status::failed_precondition(mismatch.to_string())),
        }
    }
}

#[tokio::test]
async fn a_worker_that_meets_a_newer_coordinator_says_so_and_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let server = tonic::transport::Server::builder().add_service(WorkersServer::new(Other));
    let _serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let scene = Scene::new();
    let line = format!("worker --coordinator {url} --threads 1 --exchange-listen none");
    let ends = move || scene.cohort(&line).output().expect("the binary runs");
    let output = tokio::task::spawn_blocking(ends).await.expect("it ends");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("the coordinator's cohort 9.9.9") && said.contains("on this machine"),
        "{said}"
    );
}

#[tokio::test]
async fn a_session_begins_with_register() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let refused = answer(&url, v1::FromWorker { kind: None }, Some(&version(0, 0))).await;
    assert_eq!(
        refused.expect_err("no Register").code(),
        Code::InvalidArgument
    );
}
