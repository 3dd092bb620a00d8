//! The coordinator at scale: real gRPC sessions through the real binary. One process is `cohort coordinator`, another holds N
//! real workers as tasks, each with its connections, its state and its trainer's thread, and a run with a lane for each of
//! them trains a model of a few thousand weights. What is measured is what the coordinator takes for a step.
//!
//! ```text
//! cargo bench --bench scale [-- [--workers 10,100,1000] [--lanes each] [--steps 60] [--json FILE]]
//! ```
//!
//! - CPU time and memory of the coordinator's process, from `/proc`, over the steps after the first few;
//! - latency: from the moment when the last worker has computed its lane to the moment when the last one has applied the
//!   commit. Workers and coordinator share this machine's cores, so that is more than it would be elsewhere;
//! - messages and their bytes on the control connections, from the coordinator's own counters (`/metrics`).
//!
//! Without any argument 20 workers make 60 steps, which is a test that all this still works.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cohort_common::net::Places;
use cohort_common::process;
use cohort_common::traces::Traces;
use cohort_worker::engine::DeviceChoice;
use cohort_worker::{Config, EntranceAddress};
use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The allocator of the `cohort` binary, so that the figures are the product's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The binary that is measured, built with this file.
const COHORT: &str = env!("CARGO_BIN_EXE_cohort");

/// Steps before those that count.
const WARM: u64 = 5;

/// A model of two thousand weights, in one chunk.
const SPEC: &str = r#"
[model]
architecture = "llama"
hidden_size = 8
num_hidden_layers = 1
num_attention_heads = 1
num_key_value_heads = 1
intermediate_size = 16
context = 8

[corpus]
split = "tail"

[tokenizer]
kind = "char"

[train]
micro_batch = 1
accumulate = 1
eval_every = 0
eval_samples = 1

[checkpoint]
every = 0
"#;

/// Options, and what the parent tells its child.
const NAMES: [&str; 6] = [
    "--workers",
    "--lanes",
    "--steps",
    "--json",
    "--url",
    "--cache",
];

fn main() {
    process::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Cargo adds `--bench` where it benchmarks; where it tests, there are names of tests at most.
    let known = |a: &String| a == "--bench" || NAMES.contains(&a.as_str());
    let tiny = !arguments.iter().any(known);
    let mut named: BTreeMap<&str, &str> = BTreeMap::new();
    let mut rest = arguments.iter().filter(|a| !tiny && *a != "--bench");
    while let Some(name) = rest.next() {
        assert!(
            known(name),
            "`{name}` is no option; the options are {NAMES:?}"
        );
        let value = rest.next();
        named.insert(
            name,
            value.unwrap_or_else(|| panic!("{name} wants a value")),
        );
    }
    if let Some(url) = named.get("--url") {
        return workers(url, named["--workers"], Path::new(named["--cache"]));
    }
    let usual = if tiny {
        ("20", "60")
    } else {
        ("10,100,1000", "60")
    };
    let counts = named.get("--workers").unwrap_or(&usual.0).split(',');
    let steps: u64 = number(named.get("--steps").unwrap_or(&usual.1));
    let fixed = named.get("--lanes").filter(|lanes| **lanes != "each");
    println!(
        "{:>8} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>9}",
        "workers",
        "lanes",
        "step ms",
        "p50 ms",
        "p99 ms",
        "cpu ms",
        "us/worker",
        "messages",
        "KB",
        "RSS MB",
        "KB/worker"
    );
    let mut rows = Vec::new();
    for count in counts {
        let lanes = fixed.unwrap_or(&count);
        rows.push(measure(number(count), number(lanes), steps));
    }
    if let Some(file) = named.get("--json") {
        let text = format!("{:#}\n", json!({ "rows": rows }));
        std::fs::write(file, text).expect("the file can be written");
    }
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    let parsed = text.trim().parse();
    parsed.unwrap_or_else(|_| panic!("`{text}` is no number"))
}

/// A child that does not outlive this process.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the coordinator's process has used and said at one moment.
struct Look {
    at: Instant,
    /// Steps that were committed: whoever is told of them hears it later.
    step: u64,
    cpu_us: f64,
    rss: f64,
    messages: f64,
    bytes: f64,
}

impl Look {
    fn at(pid: u32, url: &str) -> Self {
        let read = |file: &str| {
            std::fs::read_to_string(format!("/proc/{pid}/{file}")).expect("the coordinator lives")
        };
        let stat = read("stat");
        let (_, fields) = stat.rsplit_once(')').expect("a name in brackets");
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let ticks: f64 = number::<f64>(fields[11]) + number::<f64>(fields[12]);
        let status = read("status");
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let rss = rss.and_then(|line| line.split_whitespace().next());
        let page = metrics(url);
        let sum = |name: &str| -> f64 {
            let of = page.lines().filter(|line| line.starts_with(name));
            of.map(|line| number::<f64>(line.rsplit_once(' ').expect("a sample").1))
                .sum()
        };
        Self {
            at: Instant::now(),
            step: sum("cohort_run_step{") as u64,
            // A hundred ticks a second on every Linux there is.
            cpu_us: ticks * 1e4,
            rss: number::<f64>(rss.expect("a line of it")) * 1024.0,
            messages: sum("cohort_control_messages_total"),
            bytes: sum("cohort_control_bytes_total"),
        }
    }
}

fn metrics(url: &str) -> String {
    let address = url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).expect("the coordinator listens");
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it takes it");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("it answers");
    page
}

/// Trains a run on so many workers, and says what its steps cost.
fn measure(workers: u32, lanes: u32, steps: u64) -> Value {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| directory.path().join(name);
    let warm = if steps > 2 * WARM { WARM } else { 0 };
    let letter = |i: u64| char::from(b'a' + (i * i % 23) as u8);
    let text: String = (0..40_000).map(letter).collect();
    std::fs::write(path("text.txt"), text).expect("a file is written");
    std::fs::write(path("spec.toml"), SPEC).expect("a file is written");
    let cohort = |line: &str| {
        let mut command = Command::new(COHORT);
        command
            .args(line.split_whitespace())
            .current_dir(directory.path())
            .env_remove("COHORT_COORDINATOR")
            .env_remove("COHORT_TOKEN")
            .env("COHORT_LOG", "warn,cohort_coordinator=info")
            .env("COHORT_HOME", path("home"))
            .stdin(Stdio::null());
        command
    };
    let mut coordinator = cohort("coordinator --listen 127.0.0.1:0");
    let coordinator = coordinator
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut coordinator = Process(coordinator);
    let mut log = BufReader::new(coordinator.0.stderr.take().expect("it is piped")).lines();
    let url = log.by_ref().find_map(|line| {
        let line = line.expect("text");
        let at = line.find("http://")?;
        let url = line[at..].split([' ', '"', ',']).next()?;
        Some(url.trim_end_matches('/').to_owned())
    });
    let url = url.expect("it says where it listens");
    // What it says is read, so that it never has to wait for that.
    std::thread::spawn(move || log.map_while(Result::ok).for_each(drop));
    let pid = coordinator.0.id();
    let before = Look::at(pid, &url);

    let mut child = Command::new(std::env::current_exe().expect("this file has a name"));
    child.args(["--url", &url, "--workers", &workers.to_string(), "--cache"]);
    let child = child
        .arg(path("cache"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = Process(child.spawn().expect("a process can be started"));
    let mut times = BufReader::new(child.0.stdout.take().expect("it is piped"));

    let run = format!(
        "pretrain spec.toml --corpus text.txt --json --coordinator {url} --set train.lanes={lanes} --set train.steps={steps} --set train.min_workers={}",
        workers.min(lanes)
    );
    let mut run = Process(
        cohort(&run)
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts"),
    );
    let events = BufReader::new(run.0.stdout.take().expect("it is piped"));
    let (mut first, mut last, mut finished) = (None, None, false);
    for line in events.lines() {
        let event: Value = serde_json::from_str(&line.expect("text")).expect("JSON");
        match event["event"].as_str() {
            Some("step") => {
                let step = event["step"].as_u64().expect("a number");
                if step == warm + 1 {
                    first = Some(Look::at(pid, &url));
                }
                // The last checkpoint is no part of a step.
                if step == steps - 1 {
                    last = Some(Look::at(pid, &url));
                }
            }
            Some("finished") => finished = true,
            _ => {}
        }
    }
    assert!(finished, "the run did not finish");
    let first = first.expect("a first step");
    let last = last.expect("a last step");
    let (from, to) = (first.step, last.step);
    assert!(
        from < to,
        "{steps} steps are too few: at the look at step {} all {to} were made",
        warm + 1
    );
    // The workers end when nobody speaks to them any more.
    drop(child.0.stdin.take());
    let mut said = String::new();
    times.read_to_string(&mut said).expect("it says its times");
    let times: Vec<(u64, f64)> = said
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(step, ms)| (number(step), number(ms)))
        .collect();
    let mut latencies: Vec<f64> = times
        .iter()
        .filter(|(step, _)| *step > from && *step <= to)
        .map(|(_, ms)| *ms)
        .collect();
    latencies.sort_by(f64::total_cmp);
    assert_eq!(latencies.len() as u64, to - from, "a step was not seen");
    let quantile = |q: f64| latencies[((latencies.len() - 1) as f64 * q).round() as usize];
    let count = (to - from) as f64;
    let messages = (last.messages - first.messages) / count;
    // From each worker its lane and that it applied the commit, and to each the commit; fewer could not be right.
    assert!(
        messages >= f64::from(3 * workers),
        "{messages} messages in a step of {workers} workers"
    );
    let row = json!({
        "workers": workers,
        "lanes": lanes,
        "steps": to - from,
        "step_ms": (last.at - first.at).as_secs_f64() * 1e3 / count,
        "latency_p50_ms": quantile(0.5),
        "latency_p99_ms": quantile(0.99),
        "cpu_ms_per_step": (last.cpu_us - first.cpu_us) / 1e3 / count,
        "messages_per_step": messages,
        "bytes_per_step": (last.bytes - first.bytes) / count,
        "rss_bytes": last.rss,
        "rss_per_worker_bytes": (last.rss - before.rss) / f64::from(workers),
    });
    let of = |name: &str| row[name].as_f64().expect("a number");
    println!(
        "{workers:>8} {lanes:>6} {:>9.1} {:>9.1} {:>9.1} {:>9.2} {:>9.1} {:>9.0} {:>9.1} {:>8.0} {:>9.0}",
        of("step_ms"),
        of("latency_p50_ms"),
        of("latency_p99_ms"),
        of("cpu_ms_per_step"),
        of("cpu_ms_per_step") * 1e3 / f64::from(workers),
        of("messages_per_step"),
        of("bytes_per_step") / 1e3,
        of("rss_bytes") / 1e6,
        of("rss_per_worker_bytes") / 1e3,
    );
    row
}

/// When the last worker had computed a lane of each step, and when the last one had applied it.
#[derive(Clone, Default)]
struct Times(Arc<Mutex<BTreeMap<u64, [Option<Instant>; 2]>>>);

/// The step of an event, and whether it is about a lane or a commit.
#[derive(Default)]
struct Event {
    step: Option<u64>,
    kind: Option<usize>,
}

impl Visit for Event {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "step" {
            self.step = Some(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.kind = ["computed a lane", "applied"]
                .iter()
                .position(|m| format!("{value:?}") == *m);
        }
    }
}

impl<S: tracing::Subscriber> Layer<S> for Times {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut seen = Event::default();
        event.record(&mut seen);
        if let (Some(step), Some(kind)) = (seen.step, seen.kind) {
            let mut steps = self.0.lock().expect("no panic under this lock");
            steps.entry(step).or_default()[kind] = Some(Instant::now());
        }
    }
}

/// Threads that compute yield to those that talk. A worker has a machine of its own; here a thousand share a few cores, and
/// each of them would wait for a thousand others before it can say that it lives.
#[cfg(target_os = "linux")]
fn give_way() {
    use rustix::process::{Pid, setpriority_process};
    const LEAST: i32 = 19;
    let mut seen = BTreeSet::new();
    loop {
        for task in std::fs::read_dir("/proc/self/task").into_iter().flatten() {
            let Ok(task) = task else { continue };
            let id = task.file_name().to_str().and_then(|id| id.parse().ok());
            let Some(thread) = id.and_then(Pid::from_raw) else {
                continue;
            };
            if !seen.insert(task.file_name()) {
                continue;
            }
            // One that has ended has no name, and does nothing any more.
            let name = std::fs::read_to_string(task.path().join("comm"));
            if name.is_ok_and(|name| !name.starts_with("tokio")) {
                let _ = setpriority_process(Some(thread), LEAST);
            }
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Holds so many workers until the parent ends them, and says how long each step's commit took.
fn workers(url: &str, count: &str, cache: &Path) {
    process::open_files();
    let times = Times::default();
    let only = Targets::new().with_target("cohort_worker::driver", LevelFilter::TRACE);
    tracing_subscriber::registry()
        .with(times.clone().with_filter(only))
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime starts");
    let config = Config {
        coordinators: Places::new([url.to_owned()]).expect("it is one"),
        token: None,
        trust: None,
        device: DeviceChoice::Cpu,
        threads: 1,
        cache: cache.to_owned(),
        shared_memory: false,
        site: None,
        entrance: EntranceAddress::Nowhere,
        grace: Duration::ZERO,
        traces: Traces::default(),
    };
    for _ in 0..number(count) {
        let config = config.clone();
        runtime.spawn(async move {
            let ended = cohort_worker::run(config, std::future::pending()).await;
            eprintln!("a worker ended: {ended:?}");
            std::process::exit(1);
        });
    }
    #[cfg(target_os = "linux")]
    std::thread::spawn(give_way);
    // Until the parent has nothing more to say.
    let _ = std::io::stdin().read(&mut [0]);
    let steps = times.0.lock().expect("no panic under this lock");
    for (step, times) in &*steps {
        if let [Some(computed), Some(applied)] = times {
            println!(
                "{step} {}",
                applied.saturating_duration_since(*computed).as_secs_f64() * 1e3
            );
        }
    }
    std::io::stdout().flush().expect("somebody reads");
    // Threads of trainers wait for jobs that do not come.
    std::process::exit(0);
}
