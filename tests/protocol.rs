//! Workers that do not speak as they should.

use cohort_common::seal::Sealer;
use cohort_proto::v1;
use cohort_proto::v1::workers_client::WorkersClient;
use tokio_stream::iter;
use tonic::Code;

use crate::support::Scene;

fn register(protocol: u32) -> v1::FromWorker {
    let register = v1::Register {
        protocol,
        version: "9.9.9".into(),
        ..v1::Register::default()
    };
    v1::FromWorker {
        kind: Some(v1::from_worker::Kind::Register(register)),
    }
}

async fn first_answer(url: &str, message: v1::FromWorker) -> Result<(), tonic::Status> {
    let message = Sealer::default().frame(&message);
    let mut client = WorkersClient::connect(url.to_owned())
        .await
        .expect("the coordinator listens");
    let mut stream = client.session(iter([message])).await?.into_inner();
    stream.message().await.map(|_| ())
}

#[tokio::test]
async fn another_protocol_version_is_refused_with_both_versions() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let refused = first_answer(&url, register(999))
        .await
        .expect_err("another protocol");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let said = refused.message();
    assert!(
        said.contains("999") && said.contains("9.9.9") && said.contains("same version"),
        "{said}"
    );
}

#[tokio::test]
async fn a_session_begins_with_register() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let refused = first_answer(&url, v1::FromWorker { kind: None }).await;
    assert_eq!(
        refused.expect_err("no Register").code(),
        Code::InvalidArgument
    );
}
