//! What each fault costs: how long until it is noticed, how much later the step in flight is committed, what is computed
//! again; and that no bit of the result and no line of the ledger is another.
//!
//! Every row is a test, on small steps. `table` measures the same rows on steps that take long enough for the figures to
//! mean something, and writes them to a page:
//!
//! ```sh
//! COHORT_FAULTS_TABLE=docs/faults.md cargo test --test integration faults::table -- --nocapture
//! ```

mod damage;
mod network;
mod processes;
mod table;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::Scene;
use crate::support::cluster::{Cluster, Event, Reference};

/// Workers of an undisturbed run, and of most others at their beginning.
const WORKERS: usize = 3;
/// The step after which things go wrong; a checkpoint is written by then.
const WARM: u64 = 12;

/// The run that is disturbed.
struct Bench {
    /// Width of the model.
    width: u32,
    /// Its layers.
    layers: u32,
    /// Tokens of a sample.
    context: u32,
    /// Steps of the run.
    steps: u64,
    /// About half the bytes of a gradient.
    half: u64,
    /// KiB of a file that hold the weights of a checkpoint, but not its moments.
    limit: u32,
    reference: OnceLock<Reference>,
}

/// For the tests.
static QUICK: Bench = Bench {
    width: 128,
    layers: 2,
    context: 32,
    steps: 44,
    half: 600_000,
    limit: 2_000,
    reference: OnceLock::new(),
};

/// For the table.
static FULL: Bench = Bench {
    width: 256,
    layers: 2,
    context: 64,
    steps: 90,
    half: 2_000_000,
    limit: 7_000,
    reference: OnceLock::new(),
};

impl Bench {
    fn scene(&self) -> Scene {
        let Self {
            width,
            layers,
            context,
            steps,
            ..
        } = self;
        let scene = Scene::new();
        scene.write(
            "spec.toml",
            &format!(
                "model = {{ architecture = 'llama', hidden_size = {width}, num_hidden_layers = {layers}, \
                 num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = {}, context = {context} }}\n\
                 corpus.split = 'tail'\n\
                 tokenizer = {{ kind = 'bpe', vocab_size = 300 }}\n\
                 train = {{ steps = {steps}, lanes = 6, micro_batch = 2, accumulate = 2, learning_rate = 0.001, \
                 warmup_steps = 5, eval_every = 0, eval_samples = 16 }}\n\
                 checkpoint = {{ every = 10, keep = 3 }}\n",
                2 * width
            ),
        );
        scene
    }

    fn reference(&self) -> &Reference {
        let make = || Reference::of(&self.scene(), TRAIN, WORKERS);
        self.reference.get_or_init(make)
    }

    /// A moment in the middle of computing, if it is spent after a step's event.
    fn moment(&self) -> Duration {
        self.reference().median / 4
    }

    /// Lets time pass, but not so much that the run would be over before what was disturbed is put right.
    fn hold(&self, cluster: &mut Cluster<'_>, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until && cluster.step() < self.steps * 3 / 4 && !cluster.rests() {
            cluster.run_for(Duration::from_millis(20).min(until - Instant::now()));
        }
    }

    /// Disturbs a run once it is warm, and measures what that did to it. `disturb` gives the time in which it acted.
    fn disturbed(&self, disturb: impl FnOnce(&mut Cluster<'_>) -> Span) -> Measured {
        // The undisturbed run comes first, not while this one runs.
        self.reference();
        let scene = self.scene();
        let mut cluster = Cluster::start(&scene, WORKERS);
        cluster.submit(&format!("{TRAIN} --new"));
        cluster.wait_for_step(WARM);
        let span = disturb(&mut cluster);
        cluster.finish();
        let end = cluster.events.last().expect("it is finished").at;
        assert!(span.from < end, "the run was over before the fault");
        self.measure(&cluster, span)
    }

    fn measure(&self, cluster: &Cluster<'_>, span: Span) -> Measured {
        let median = self.reference().median;
        let delay = span.longest_step(&cluster.events).saturating_sub(median);
        let differences = self.reference().differences(cluster);
        Measured {
            detect_ms: span.detected(&cluster.events),
            delay_ms: Some(delay.as_millis() as u64),
            redone: redone(&cluster.events),
            bits_equal: differences.is_empty(),
            differences,
            note: String::new(),
        }
    }
}

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";

/// What a fault did.
#[derive(Debug)]
struct Measured {
    /// Time until the run said that a worker is lost, if one is.
    detect_ms: Option<u64>,
    /// How much longer than an undisturbed step the longest step took that the fault met.
    delay_ms: Option<u64>,
    /// What was computed again.
    redone: String,
    /// Whether the state, every step and the ledger are those of an undisturbed run.
    bits_equal: bool,
    /// Where they are not.
    differences: Vec<String>,
    /// What a reader should know.
    note: String,
}

impl Measured {
    fn noted(self, note: impl Into<String>) -> Self {
        Self {
            note: note.into(),
            ..self
        }
    }
}

/// The time in which a fault acts.
#[derive(Clone, Copy)]
struct Span {
    from: Instant,
    to: Instant,
}

impl Span {
    /// A moment.
    fn at(moment: Instant) -> Self {
        Self {
            from: moment,
            to: moment,
        }
    }

    /// From then until now.
    fn since(from: Instant) -> Self {
        Self {
            from,
            to: Instant::now(),
        }
    }

    /// From then to the run's end.
    fn rest(from: Instant) -> Self {
        Self {
            from,
            to: from + Duration::from_secs(3_600),
        }
    }

    fn detected(self, events: &[Event]) -> Option<u64> {
        let lost = |e: &&Event| {
            let said = e.json["text"].as_str().unwrap_or_default();
            e.at >= self.from && (e.is("worker_lost") || e.is("note") && said.contains(" lost: "))
        };
        let event = events.iter().find(lost)?;
        Some((event.at - self.from).as_millis() as u64)
    }

    /// The longest time between two new steps that this time touches. A step that is taken again is none.
    fn longest_step(self, events: &[Event]) -> Duration {
        let mut longest = Duration::ZERO;
        let mut last: Option<(u64, Instant)> = None;
        for event in events {
            let Some(step) = event.step() else { continue };
            if let Some((before, at)) = last {
                if step <= before {
                    continue;
                }
                if event.at >= self.from && at <= self.to {
                    longest = longest.max(event.at - at);
                }
            }
            last = Some((step, event.at));
        }
        longest
    }
}

/// Lanes that others computed again, and steps that were taken again.
fn redone(events: &[Event]) -> String {
    let lanes: usize = events
        .iter()
        .filter(|event| event.is("redone"))
        .map(|event| event.json["lanes"].as_array().map_or(0, Vec::len))
        .sum();
    let steps: Vec<u64> = events.iter().filter_map(Event::step).collect();
    let again = steps.len() as u64
        - steps
            .iter()
            .max()
            .copied()
            .unwrap_or(0)
            .min(steps.len() as u64);
    match (lanes, again) {
        (0, 0) => "0".into(),
        (lanes, 0) => format!("{lanes} lanes"),
        (0, steps) => format!("{steps} steps"),
        (lanes, steps) => format!("{lanes} lanes, {steps} steps"),
    }
}

/// Asserts what holds for every row.
fn check(measure: fn(&Bench) -> Measured) {
    let begin = Instant::now();
    let measured = measure(&QUICK);
    eprintln!("{:.1} s: {measured:?}", begin.elapsed().as_secs_f64());
    assert!(measured.bits_equal, "{:#?}", measured.differences);
}

/// The text of a `failed` event.
fn failure(event: &Value) -> String {
    assert_eq!(event["event"], "failed", "{event}");
    event["error"].as_str().unwrap_or_default().to_owned()
}

/// The rows of the table, each a test as well.
macro_rules! rows {
    ($($module:ident::$row:ident: $fault:literal;)*) => {
        const ROWS: &[(&str, fn(&Bench) -> Measured)] = &[$(($fault, $module::$row)),*];

        mod exact {
            $(
                #[test]
                fn $row() {
                    super::check(super::$module::$row);
                }
            )*
        }
    };
}

rows! {
    processes::killed_while_computing: "SIGKILL of a worker while it computes";
    processes::killed_while_sending: "SIGKILL of a worker while it sends its gradient";
    processes::killed_while_receiving: "SIGKILL of a worker while it receives the root";
    processes::stopped_for_a_second: "SIGSTOP of a worker for 1 s";
    processes::stopped_for_ever: "SIGSTOP of a worker for ever";
    processes::all_killed_but_one: "SIGKILL of all workers but one";
    processes::all_killed: "SIGKILL of all workers; new ones start";
    processes::joined: "a worker joins in mid-run";
    processes::left: "a worker leaves (SIGTERM)";
    processes::ten_came_and_went: "ten joins and leaves in random order";
    processes::coordinator_killed_idle: "SIGKILL of the coordinator while a run waits for workers";
    processes::coordinator_killed_aggregating: "SIGKILL of the coordinator while it sums";
    processes::coordinator_killed_committing: "SIGKILL of the coordinator after a commit, three times";
    processes::coordinator_killed_writing: "SIGKILL of the coordinator while it writes a checkpoint";
    processes::everything_killed: "SIGKILL of everything; resumed on two workers";
    processes::slow: "a worker that is ten times slower for a while";
    network::slow_link: "a slow link that stalls for 200 ms now and then";
    network::healed: "a partition that heals after 5 s";
    network::half_open: "a half-open connection";
    network::cut: "all connections of a worker are cut";
    network::truncated: "a message is truncated";
    network::stretch_lost: "a stretch of bytes is missing";
    network::gradient_corrupted: "a bit of a gradient is flipped on its way";
    network::root_corrupted: "a bit of the root is flipped on its way";
    network::forged: "stale and duplicated messages of somebody else";
    damage::disk_full: "the coordinator's disk is full";
    damage::shard: "a bit of a shard is flipped in the coordinator's corpus";
    damage::cached_shard: "a bit of a shard is flipped in a worker's cache";
    damage::checkpoint: "a bit of a checkpoint is flipped";
    damage::database: "a bit of the database is flipped";
}
