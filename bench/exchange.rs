//! Speed of one all-reduce over the product's own exchange: GB/s = bytes of one gradient / time from the push of a node
//! to the whole root, the median over steps. The coordinator's service, the worker's client, the connection between
//! them and the checks are those of `cohort`; the coordinator and each worker are a process of their own.
//!
//! ```text
//! cargo bench --bench exchange [-- [--megabytes 1,10,100] [--workers 2,4] [--over grpc,grpc-bf16,grpc-int8,grpc-int4,sharded,memory] [--seconds S] [--json FILE]]
//! python bench/allreduce_gloo.py [--megabytes 1,10,100] [--workers 2,4] [--seconds S] [--json FILE]
//! ```
//!
//! Over `memory` workers and coordinator find out that they share a host; over `grpc` they are told not to, and
//! `grpc-bf16`, `grpc-int8` and `grpc-int4` send a half, a quarter and an eighth of the bytes (GB/s counts those of f32 all the same). `sharded` is over gRPC, too, but the workers
//! own the gradient, a slice each, and push to each other.
//!
//! The second command measures PyTorch's gloo and a plain ring over TCP in the same way. Without any argument a tiny
//! gradient is summed, which is a test that this file still works.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use cohort_common::aggregate::{Shape, leaf, parent};
use cohort_common::cluster::worker::Report;
use cohort_common::cluster::{Owners, Peer, Share as Slice};
use cohort_common::exchange::{Exchange, ExchangeServer, ExchangeService, Host, Told};
use cohort_common::ids::{RunId, SessionId, Step};
use cohort_common::net::{self, Credentials};
use cohort_common::security::Whom;
use cohort_common::spec::Payload;
use cohort_common::tree::{Node, Tree};
use cohort_worker::engine::Gradient;
use cohort_worker::exchange::{Entrance, ExchangeClient, Note, Observer, Setup, Sharing};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::Request;
use tonic::service::interceptor::InterceptedService;

/// The allocator of the `cohort` binary, so that the figures are the product's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const RUN: &str = "bench";
/// Steps before those that count.
const WARM: usize = 3;
/// Steps that count, at least and at most.
const STEPS: (usize, usize) = (5, 200);

/// Options, and what the parent tells its children.
const NAMES: [&str; 9] = [
    "--megabytes",
    "--workers",
    "--over",
    "--seconds",
    "--json",
    "--len",
    "--steps",
    "--rank",
    "--url",
];

/// What to measure.
struct Options {
    megabytes: Vec<f64>,
    workers: Vec<u32>,
    over: Vec<String>,
    seconds: f64,
    json: Option<String>,
}

/// One process.
enum Role {
    Parent(Options),
    Coordinator(Shape),
    Worker(Share),
}

/// A worker's part.
struct Share {
    rank: u32,
    shape: Shape,
    url: String,
    steps: usize,
    over: String,
}

fn main() {
    cohort_common::process::keep_freed_memory();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime starts");
    match role() {
        Role::Parent(options) => measure_all(&options),
        Role::Coordinator(shape) => runtime.block_on(coordinator(shape)),
        Role::Worker(share) => worker(&runtime, &share),
    }
}

fn role() -> Role {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Cargo adds `--bench` where it benchmarks; where it tests, there are names of tests at most.
    let known = |a: &String| a == "--bench" || NAMES.contains(&a.as_str());
    let tiny = !arguments.iter().any(known);
    let mut options = Options {
        // In shared memory one message, and two of which the first is summed on several cores.
        megabytes: if tiny {
            vec![0.6, 10.0]
        } else {
            vec![1.0, 10.0, 100.0]
        },
        workers: if tiny { vec![2] } else { vec![2, 4] },
        over: [
            "grpc",
            "grpc-bf16",
            "grpc-int8",
            "grpc-int4",
            "sharded",
            "memory",
        ]
        .map(String::from)
        .to_vec(),
        seconds: if tiny { 0.0 } else { 3.0 },
        json: None,
    };
    let mut named: BTreeMap<&str, &str> = BTreeMap::new();
    let mut rest = arguments.iter().filter(|_| !tiny);
    while let Some(name) = rest.next() {
        if name != "--bench" {
            let value = rest
                .next()
                .unwrap_or_else(|| panic!("{name} wants a value"));
            named.insert(name, value);
        }
    }
    let number = |name: &str| named.get(name).map(|value| parse::<usize>(name, value));
    if let Some(len) = number("--len") {
        let workers = number("--workers").expect("given by the parent") as u32;
        let over = named["--over"].to_owned();
        let shape = Shape {
            lanes: workers,
            len,
            payload: match over.split_once('-') {
                Some((_, "bf16")) => Payload::Bf16,
                Some((_, "int8")) => Payload::Int8,
                Some((_, "int4")) => Payload::Int4,
                _ => Payload::F32,
            },
            seed: 1,
        };
        return match named.get("--url") {
            None => Role::Coordinator(shape),
            Some(url) => Role::Worker(Share {
                rank: number("--rank").expect("given by the parent") as u32,
                steps: number("--steps").expect("given by the parent"),
                shape,
                url: (*url).to_owned(),
                over,
            }),
        };
    }
    for (name, value) in named {
        match name {
            "--megabytes" => options.megabytes = list(name, value),
            "--workers" => options.workers = list(name, value),
            "--over" => options.over = list(name, value),
            "--seconds" => options.seconds = parse(name, value),
            "--json" => options.json = Some(value.to_owned()),
            _ => panic!("`{name}` is no option; the options are {NAMES:?}"),
        }
    }
    Role::Parent(options)
}

fn parse<T: std::str::FromStr>(name: &str, value: &str) -> T {
    let parsed = value.parse();
    parsed.unwrap_or_else(|_| panic!("{name} {value}: not a number"))
}

fn list<T: std::str::FromStr>(name: &str, value: &str) -> Vec<T> {
    value.split(',').map(|one| parse(name, one)).collect()
}

fn measure_all(options: &Options) {
    let mut results = Vec::new();
    println!(
        "{:>9} {:>8} {:>8} {:>10} {:>8}",
        "over", "MB", "workers", "ms", "GB/s"
    );
    for &megabytes in &options.megabytes {
        for &workers in &options.workers {
            for over in &options.over {
                let len = (megabytes * 1e6 / 4.0) as usize;
                // About as many steps as fit at 1 GB/s.
                let fit = options.seconds * 1e3 / megabytes;
                let steps = (fit as usize).clamp(STEPS.0, STEPS.1) + WARM;
                let mut times = measure(workers, len, steps, over);
                times.sort_by(f64::total_cmp);
                let median = times[times.len() / 2];
                let speed = len as f64 * 4.0 / median / 1e9;
                println!(
                    "{over:>9} {megabytes:>8} {workers:>8} {:>10.2} {speed:>8.2}",
                    median * 1e3
                );
                results.push(json!({
                    "what": over,
                    "megabytes": megabytes,
                    "workers": workers,
                    "median_s": median,
                    "min_s": times[0],
                    "max_s": times[times.len() - 1],
                    "gb_per_s": speed,
                }));
            }
        }
    }
    if let Some(file) = &options.json {
        let all = json!({ "what": "cohort", "machine": machine(), "results": results });
        std::fs::write(file, format!("{all:#}\n")).expect("the file can be written");
    }
}

fn machine() -> Value {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split(": ").nth(1));
    json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cohort": env!("CARGO_PKG_VERSION"),
    })
}

/// A child that does not outlive this process.
struct Process(Child);

impl Process {
    fn start(arguments: &[(&str, &str)]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this file has a name"));
        for (name, value) in arguments {
            command.args([name, value]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Self(command.spawn().expect("a process can be started"))
    }

    fn output(&mut self) -> BufReader<ChildStdout> {
        BufReader::new(self.0.stdout.take().expect("it is piped"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Seconds of each step, as the first worker saw them.
fn measure(workers: u32, len: usize, steps: usize, over: &str) -> Vec<f64> {
    let (count, len, steps) = (workers.to_string(), len.to_string(), steps.to_string());
    let mut coordinator =
        Process::start(&[("--len", &len), ("--workers", &count), ("--over", over)]);
    let mut url = String::new();
    coordinator
        .output()
        .read_line(&mut url)
        .expect("it says where it listens");
    let start = |rank: u32| {
        Process::start(&[
            ("--len", &len),
            ("--workers", &count),
            ("--steps", &steps),
            ("--rank", &rank.to_string()),
            ("--url", url.trim()),
            ("--over", over),
        ])
    };
    let mut processes: Vec<Process> = (0..workers).map(start).collect();
    let mut outputs: Vec<_> = processes.iter_mut().map(Process::output).collect();
    // Each says where it can be pushed to, and is told of all.
    let mut addresses = String::new();
    for output in &mut outputs {
        output.read_line(&mut addresses).expect("it says where");
    }
    for process in &mut processes {
        let input = process.0.stdin.as_mut().expect("it is piped");
        write!(input, "{addresses}").expect("it listens");
    }
    let mut said = String::new();
    outputs[0]
        .read_to_string(&mut said)
        .expect("it says its times");
    for process in &mut processes {
        let status = process.0.wait().expect("it ends");
        assert!(status.success(), "a worker failed");
    }
    let times: Vec<f64> = said.split_whitespace().map(|t| parse("time", t)).collect();
    times[WARM..].to_vec()
}

/// Stands for the coordinator: opens a step when the one before is complete.
struct Steps {
    exchange: Arc<Exchange>,
    shape: Shape,
}

#[tonic::async_trait]
impl Host for Steps {
    fn is_open(&self, _: SessionId) -> bool {
        true
    }

    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    async fn tell(&self, told: Told) {
        match told {
            Told::Complete { run, step, .. } => {
                // Whoever pushed has applied the step before.
                self.exchange.release(&run, step - 1);
                let all = 0..self.shape.chunks();
                self.exchange.open(&run, step + 1, self.shape, all);
            }
            Told::Delivered { .. } => {}
            told => panic!("{told:?}"),
        }
    }
}

async fn coordinator(shape: Shape) {
    let exchange = Arc::new(Exchange::default());
    exchange.open(&RunId::new(RUN), 1, shape, 0..shape.chunks());
    let host = Arc::new(Steps {
        exchange: exchange.clone(),
        shape,
    });
    let service = ExchangeServer::new(ExchangeService { exchange, host });
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    println!("http://{}", listener.local_addr().expect("it is bound"));
    let known = |request: Request<()>| {
        if let Some(peer) = request.extensions().get::<net::Peer>() {
            peer.let_in();
        }
        Ok(request)
    };
    let served = net::server()
        .add_service(InterceptedService::new(service, known))
        .serve_with_incoming(net::connections(listener, None));
    let parent_gone = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0]));
    tokio::select! {
        served = served => served.expect("it serves"),
        _ = parent_gone => {}
    }
}

/// A gradient that differs from worker to worker.
fn gradient(rank: u32, shape: Shape) -> Vec<f32> {
    let value = |i: usize| ((i * 37 + rank as usize * 101) % 1009) as f32 * 0.37 - 150.0;
    let mut gradient = (0..shape.len).map(value).collect::<Vec<f32>>();
    // What has been rounded once stays so, whatever the step.
    leaf(shape.rounding(1).of(Node::leaf(rank)), &mut gradient);
    gradient
}

/// What the exchange must find.
fn sum(step: Step, node: Node, shape: Shape) -> Vec<f32> {
    let Some((left, right)) = node.children() else {
        return gradient(node.first, shape);
    };
    let mut both = sum(step, left, shape);
    let right = sum(step, right, shape);
    parent(shape.rounding(step).of(node), &mut both, &right);
    both
}

/// Reads where the workers can be pushed to, and makes each the owner of a slice if that is what is measured.
fn owners(share: &Share, client: &ExchangeClient) -> Owners {
    let count = share.shape.lanes;
    let lines = std::io::stdin().lines().take(count as usize);
    let addresses: Vec<String> = lines.map(|line| line.expect("an address")).collect();
    if share.over != "sharded" {
        return Owners::Coordinator;
    }
    let session = |rank: u32| SessionId(u64::from(rank) + 1);
    let others = (0..count).filter(|rank| *rank != share.rank);
    let peer = |rank: u32| Peer {
        session: session(rank),
        address: Some(addresses[rank as usize].clone()),
    };
    client.introduce(&[], others.map(peer).collect());
    let chunks = share.shape.chunks() as u32;
    let cut = |rank: u32| chunks * rank / count;
    let slice = |rank: u32| Slice {
        session: session(rank),
        chunks: cut(rank)..cut(rank + 1),
    };
    let slices: Arc<[Slice]> = (0..count).map(slice).collect();
    Owners::Shares(slices.into())
}

fn worker(runtime: &tokio::runtime::Runtime, share: &Share) {
    let Share { rank, shape, .. } = *share;
    let (broken, _reasons) = tokio::sync::mpsc::channel(1);
    let (notes, mut told) = tokio::sync::mpsc::channel(1024);
    let sharing = Sharing::new(share.over == "memory");
    let client = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let entrance = Entrance::open(listener, address, None, None);
        println!("{address}");
        let credentials = Credentials {
            session: Some(u64::from(rank) + 1),
            run: Some(RUN.into()),
            ..Credentials::default()
        };
        let channel = net::connect(&share.url, None, Whom::Coordinator)
            .await
            .expect("the coordinator is there");
        let setup = Setup {
            keeper: None,
            channel,
            credentials,
            shape,
            after: 0,
            sharing,
            observer: Observer::default(),
            broken,
            entrance: Some(entrance),
            notes,
        };
        let opened = ExchangeClient::open(setup).await;
        opened.expect("the exchange opens")
    });
    let owners = owners(share, &client);
    if matches!(owners, Owners::Shares(_)) {
        let all = shape.lanes as usize - 1;
        let linked = |note: Note| matches!(note, Note::Report(Report::Reaches { peers }) if peers.len() == all);
        while !linked(told.blocking_recv().expect("the exchange is open")) {}
    }
    std::thread::spawn(move || while told.blocking_recv().is_some() {});
    let own: Arc<Gradient> = Arc::new(gradient(rank, shape).into());
    let mut times = Vec::new();
    for step in 1..=share.steps as Step {
        // As an engine would, straight into the memory that is shared, if there is such. Otherwise the gradient stays where
        // it is, as that of an all-reduce does: to fill it is not what is measured.
        let node = match client.buffer() {
            Some(mut buffer) => {
                buffer.copy_from_slice(&own);
                Arc::new(buffer)
            }
            None => own.clone(),
        };
        let began = Instant::now();
        client.own(step, &owners);
        client.push(step, Node::leaf(rank), node.clone());
        let root = client.root(step).expect("the exchange goes on");
        times.push(began.elapsed());
        if step == 1 || step == share.steps as Step {
            let expected = sum(step, Tree::new(shape.lanes).root(), shape);
            assert!(expected[..] == root[..], "step {step}: a wrong root");
        }
        client.reuse(root);
        // Whoever pushed for this step has the root of the one before; of this one perhaps not yet.
        client.applied(match owners {
            Owners::Shares(_) => step - 1,
            _ => step,
        });
    }
    if rank == 0 {
        let seconds: Vec<String> = times.iter().map(|t| t.as_secs_f64().to_string()).collect();
        println!("{}", seconds.join(" "));
    }
    client.close();
}
