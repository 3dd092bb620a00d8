//! Networks that are slow, silent, or wrong.

use std::time::{Duration, Instant};

use cohort_common::net::Credentials;
use cohort_common::seal::{Opener, Sealer, checksum};
use cohort_common::wire::{RUN_KEY, SESSION_KEY};
use cohort_proto::v1;
use cohort_proto::v1::exchange_client::ExchangeClient;
use cohort_proto::v1::workers_client::WorkersClient;
use cohort_worker::engine::{DeviceChoice, describe_device};
use tokio::sync::mpsc;
use tokio_stream::iter;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use super::processes::{BYTES, VICTIM};
use super::{Bench, Measured, Span};
use crate::support::cluster::{Cluster, RUN};
use crate::support::proxy::{Deed, Direction};

pub fn slow_link(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        // Both ways of a gradient take half a second each.
        let rate = 4 * bench.half;
        cluster.workers[VICTIM]
            .proxy
            .slow(Duration::from_millis(20), rate);
        for _ in 0..4 {
            cluster.run_for(Duration::from_millis(600));
            cluster.workers[VICTIM].proxy.stall();
            cluster.run_for(Duration::from_millis(200));
            let proxy = &cluster.workers[VICTIM].proxy;
            proxy.pass();
            proxy.slow(Duration::from_millis(20), rate);
        }
        cluster.workers[VICTIM].proxy.pass();
        Span::since(at)
    })
}

pub fn healed(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        cluster.workers[VICTIM].proxy.stall();
        bench.hold(cluster, Duration::from_secs(5));
        cluster.workers[VICTIM].proxy.pass();
        Span::since(at)
    })
}

pub fn half_open(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        cluster.workers[VICTIM].proxy.stall();
        Span::at(at)
    })
}

pub fn cut(bench: &Bench) -> Measured {
    let measured = bench.disturbed(|cluster| {
        let at = Instant::now();
        let proxy = &cluster.workers[VICTIM].proxy;
        proxy.refuse();
        proxy.cut();
        cluster.run_for(Duration::from_millis(500));
        cluster.workers[VICTIM].proxy.pass();
        Span::at(at)
    });
    measured.noted("new ones are refused for half a second")
}

/// Does something to a byte in the middle of a gradient.
fn damaged(bench: &Bench, way: Direction, deed: Deed) -> Measured {
    bench.disturbed(|cluster| {
        let proxy = &cluster.workers[VICTIM].proxy;
        proxy.at(way, bench.half, deed);
        Span::at(proxy.wait_for_deed(BYTES))
    })
}

pub fn truncated(bench: &Bench) -> Measured {
    damaged(bench, Direction::Up, Deed::Truncate)
}

pub fn stretch_lost(bench: &Bench) -> Measured {
    damaged(bench, Direction::Up, Deed::Drop(1_000))
}

pub fn gradient_corrupted(bench: &Bench) -> Measured {
    damaged(bench, Direction::Up, Deed::Flip)
}

pub fn root_corrupted(bench: &Bench) -> Measured {
    damaged(bench, Direction::Down, Deed::Flip)
}

/// A process that registers, leaves, and still pushes; and one that claims results for lanes that it was not given.
pub fn forged(bench: &Bench) -> Measured {
    bench.disturbed(|cluster| {
        let at = Instant::now();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(forge(cluster));
        Span::since(at)
    })
}

async fn forge(cluster: &Cluster<'_>) {
    let url = cluster.url();
    let (session, said, mut sealer) = register(&url).await;
    let step = cluster.step() + 1;
    for _ in 0..2 {
        // Twice, and its own again: none of its lanes were given to it.
        for lane in 0..6 {
            let done = v1::LaneDone {
                run: RUN.into(),
                step,
                lane,
                loss: 1e9,
                weight: 1.0,
                ..v1::LaneDone::default()
            };
            // The coordinator may have hung up on it.
            let done = sealer.frame(&message(v1::from_worker::Kind::LaneDone(done)));
            let _ = said.send(done).await;
        }
    }
    drop(said);
    let refused = push(&url, session, step).await;
    let status = refused.expect_err("the session has ended");
    assert!(status.message().contains("session"), "{status}");
    let refused = push(&url, u64::MAX, step).await;
    refused.expect_err("there never was such a session");
}

fn message(kind: v1::from_worker::Kind) -> v1::FromWorker {
    v1::FromWorker { kind: Some(kind) }
}

/// Registers as a worker that could compute here; gives the session and the way to speak in it.
async fn register(url: &str) -> (u64, mpsc::Sender<v1::Frame>, Sealer) {
    let (device, fingerprint) = describe_device(DeviceChoice::Cpu).expect("there is a CPU");
    let register = v1::Register {
        version: "rogue".into(),
        host: "rogue".into(),
        device,
        threads: 1,
        fingerprint,
        ..v1::Register::default()
    };
    let channel = tonic::transport::Endpoint::from_shared(url.to_owned())
        .expect("an address")
        .connect()
        .await
        .expect("it listens");
    let mut client = WorkersClient::with_interceptor(channel, Credentials::default());
    let (said, heard) = mpsc::channel(64);
    let mut sealer = Sealer::default();
    let register = sealer.frame(&message(v1::from_worker::Kind::Register(register)));
    said.send(register).await.expect("there is room");
    let answer = client.session(ReceiverStream::new(heard)).await;
    let mut answer = answer.expect("it is admitted").into_inner();
    let first = answer
        .message()
        .await
        .expect("a message")
        .expect("an answer");
    let first: Option<v1::ToWorker> = Opener::default().frame(first).expect("a whole frame");
    match first.and_then(|m| m.kind) {
        Some(v1::to_worker::Kind::Welcome(welcome)) => (welcome.session, said, sealer),
        other => panic!("it began with {other:?}"),
    }
}

/// Pushes zeros as lane 0 of a step until it is refused.
async fn push(url: &str, session: u64, step: u64) -> Result<(), tonic::Status> {
    let mut client = ExchangeClient::connect(url.to_owned())
        .await
        .expect("it listens");
    let data = vec![0; 4 * 65_536];
    let node = v1::NodeChunk {
        step,
        first: 0,
        size: 1,
        index: 0,
        check: checksum(&data),
        data: data.into(),
    };
    let mut sealer = Sealer::default();
    let open = sealer.chunk(v1::chunk::Kind::Open(v1::Open::default()));
    let node = sealer.chunk(v1::chunk::Kind::Node(node));
    let mut request = Request::new(iter([open, node]));
    request.metadata_mut().insert(SESSION_KEY, session.into());
    request
        .metadata_mut()
        .insert(RUN_KEY, RUN.parse().expect("a plain name"));
    let mut answer = client.push_pull(request).await?.into_inner();
    while answer.message().await?.is_some() {}
    Ok(())
}
