//! What the processes of a cluster tell of their work: how the workers' time goes, how much of their processors the model
//! gets, and logs that machines read.

use cohort_common::api::{ClusterView, WorkerView};
use cohort_common::wire;
use cohort_proto::v1::Empty;
use cohort_proto::v1::client_client::ClientClient;
use serde_json::Value;

use crate::support::{Scene, look};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt --new";

/// What the coordinator shows of its cluster.
fn view(url: &str) -> ClusterView {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let reply = runtime.block_on(async {
        let client = ClientClient::connect(url.to_owned()).await;
        let mut client = client.expect("the coordinator answers");
        client.view_cluster(Empty {}).await
    });
    let reply = reply.expect("a view").into_inner();
    wire::from_json(&reply).expect("a view is JSON")
}

#[test]
fn a_view_says_how_the_workers_time_goes() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let worker = || {
        scene.start(&format!(
            "worker --coordinator {url} --threads 1 --home cache"
        ))
    };
    let (_one, _two) = (worker(), worker());
    let mut run = scene.start(&format!(
        "{TRAIN} --set train.steps=100000 --set checkpoint.every=0 --set train.min_workers=2 --coordinator {url} --name long --json"
    ));
    run.wait_for_step(5);
    let busy = |w: &WorkerView| w.tokens_per_second > Some(0.0) && w.lanes > 0;
    let seen = look("two workers at work", || {
        let seen = view(&url);
        (seen.workers.len() == 2 && seen.workers.iter().all(busy)).then_some(seen)
    });
    for worker in &seen.workers {
        let times = worker.times.expect("it works");
        let sum = times.compute + times.exchange + times.wait + times.data;
        assert!((sum - 1.0).abs() < 1e-9, "{times:?}");
        assert!(times.compute > 0.0 && times.data > 0.0, "{times:?}");
        // Two processes of one host share memory: nothing is sent.
        assert_eq!(worker.sent_per_second, None);
        assert!(worker.peak_flops > Some(1e6), "{worker:?}");
        let share = worker.mfu.expect("both are known");
        assert!(share > 0.0 && share < 2.0, "{share}");
        if cfg!(target_os = "linux") {
            assert!(worker.rss_bytes > Some(1 << 20), "{worker:?}");
            assert!(worker.cores > Some(0.0), "{worker:?}");
        }
    }
    let system = look("the coordinator's machine", || {
        let system = view(&url).system;
        system.disk_bytes.is_some().then_some(system)
    });
    assert!(system.disk_free_bytes <= system.disk_bytes);
    assert!(system.cpus > Some(0));
    scene.run(&format!("cancel long --coordinator {url}"));
}

#[test]
fn what_the_workers_did_is_kept_with_the_run() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let worker = || {
        scene.start(&format!(
            "worker --coordinator {url} --threads 1 --home cache --no-shared-memory"
        ))
    };
    let (_one, _two) = (worker(), worker());
    let events = scene.events(&format!(
        "{TRAIN} --set train.min_workers=2 --coordinator {url} --name kept"
    ));
    let shares: Vec<f64> = events
        .iter()
        .filter(|event| event["event"] == "step")
        .map(|step| step["mfu"].as_f64().expect("each step has it"))
        .collect();
    assert_eq!(shares.len(), 12);
    assert!(shares.iter().all(|share| *share > 0.0), "{shares:?}");
    // The last figures come when a worker has unloaded the run.
    let tokens = 12 * 6 * 2 * 2 * 32;
    let database = scene.path("home").join("cohort.db");
    let kept = look("rows of both workers", || {
        let database = rusqlite::Connection::open(&database).expect("the database is there");
        let sum = "SELECT count(DISTINCT worker), sum(tokens), min(compute_us), sum(exchange_us) FROM worker_times WHERE run = 'kept'";
        let read = |row: &rusqlite::Row<'_>| -> rusqlite::Result<[Option<i64>; 4]> {
            Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?])
        };
        let found = database.query_row(sum, [], read).expect("a sum");
        let all = found[0] == Some(2) && found[1] >= Some(tokens);
        all.then_some(found)
    });
    // A lane that is late may be computed twice, but hardly all of them.
    assert!(kept[1] < Some(2 * tokens), "{kept:?}");
    assert!(kept[2] > Some(0), "each has computed: {kept:?}");
    assert!(kept[3] > Some(0), "gradients were sent: {kept:?}");
}

#[test]
fn logs_are_json_for_whoever_wants_that() {
    let scene = Scene::new();
    let object = |line: &str| -> Value {
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
    };
    let (mut coordinator, url) = scene.coordinator("--log-format json");
    let format = ("COHORT_LOG_FORMAT", "json");
    let line = format!("worker --coordinator {url} --threads 1 --home cache");
    let mut worker = scene.start_with(&line, format);
    let joined = object(&worker.wait_for("\"joined\""));
    assert_eq!(joined["level"], "INFO");
    assert_eq!(joined["url"], url.as_str(), "fields lie beside the message");
    assert!(joined["timestamp"].is_string() && joined["target"].is_string());
    let told = object(&coordinator.wait_for("\"joined\""));
    assert_eq!(told["device"], "cpu");
    for line in coordinator
        .printed()
        .lines()
        .chain(worker.printed().lines())
    {
        assert!(object(line).is_object());
    }
    let said = scene.cohort("coordinator --log-format xml").output();
    assert_eq!(said.expect("the binary runs").status.code(), Some(2));
}
