//! Speed of one training step (forward, backward, update) in tokens per second: the median over steps.
//!
//! ```text
//! cargo bench -p cohort-worker --bench step -- [MODEL…] [--device D] [--threads N] [--seconds S] [--lanes L] [--bf16] [--gradient-checkpointing] [--as-a-run] [--json]
//! cargo bench -p cohort-worker --bench step -- lanes [--tokens T,…] [--threads N] [--seconds S] [--json]
//! cargo bench -p cohort-worker --bench step -- price [--threads N] [--seconds S]
//! ```
//!
//! MODEL is `a`, `b-llama`, `b-llama-8`, `b-gpt2`, `c` or `gpt2`; without one, all but the last two run. `--lanes` spreads the batch over so many lanes.
//! `--as-a-run` takes the gradient's norm and clips by it, as runs do and nothing else here, and the median over twenty
//! stretches, as what runs tell of single steps is too coarse.
//! `bench/step_pytorch.py` does the same in PyTorch, and `bench/run.py engine` compares the two.
//!
//! `lanes` compares eight lanes with one lane of the same tokens, by the tokens in a lane (`--tokens`). `price` shows what being safe costs without a fault,
//! against a step of the `small` preset.

use std::time::{Duration, Instant};

use cohort_common::aggregate::squares_of;
use cohort_common::rng::philox;
use cohort_common::schedule::clipped_scale;
use cohort_common::spec::{
    Architecture, ModelConfig, Payload, Precision, ScheduleKind, TrainConfig,
};
use cohort_common::tree::Node;
use cohort_worker::engine::{Batch, DeviceChoice, Engine, Gradient, Site, Update};

/// The allocator of the `cohort` binary, so that the figures are the product's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A model and the size of its batches.
struct Case {
    name: &'static str,
    model: ModelConfig,
    samples: usize,
}

fn case(name: &'static str) -> Case {
    let architecture = match name {
        "b-llama" | "b-llama-8" => Architecture::Llama,
        _ => Architecture::Gpt2,
    };
    let (layers, heads, hidden, context, samples, vocab) = match name {
        "a" => (4, 4, 128, 64, 12, 65),
        "c" => (12, 12, 768, 256, 1, 50_257),
        // What a GPU takes at a time.
        "gpt2" => (12, 12, 768, 1024, 8, 50_257),
        // The `small` preset with one sample in each of its lanes.
        "b-llama-8" => (6, 6, 384, 256, 8, 4096),
        _ => (6, 6, 384, 256, 4, 4096),
    };
    let model = ModelConfig {
        architecture,
        vocab_size: vocab,
        context,
        hidden_size: hidden,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        intermediate_size: if architecture == Architecture::Llama {
            1024
        } else {
            4 * hidden
        },
        tie_word_embeddings: true,
        bias: matches!(name, "c" | "gpt2"),
        dropout: 0.0,
        norm_eps: 1e-5,
        head_dim: None,
        attention_bias: false,
        qk_norm: false,
        rope_theta: 10_000.0,
        rope_scaling: None,
        initializer_range: 0.02,
        labels: Vec::new(),
    };
    Case {
        name,
        model,
        samples,
    }
}

/// How a step is computed.
#[derive(Clone, Copy, Default)]
struct How {
    precision: Precision,
    gradient_checkpointing: bool,
    /// Whether the gradient is clipped by its norm, and speed is told by stretches.
    as_a_run: bool,
}

fn train(how: How) -> TrainConfig {
    TrainConfig {
        steps: 1,
        lanes: 1,
        micro_batch: 1,
        accumulate: 1,
        learning_rate: 1e-3,
        min_learning_rate: 1e-4,
        warmup_steps: 0,
        schedule: ScheduleKind::Constant,
        decay_steps: 0,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        grad_clip: 1.0,
        precision: how.precision,
        payload: Payload::F32,
        diloco: None,
        gradient_checkpointing: how.gradient_checkpointing,
        seed: 1,
        eval_every: 0,
        eval_samples: 0,
        freeze_layers: None,
        layer_decay: None,
        unfreeze_every: None,
        data_share: None,
        replay: None,
        early_stopping_patience: None,
        max_forgetting: None,
        max_length: None,
        min_workers: 1,
    }
}

/// Random samples for each lane.
fn batches(case: &Case, lanes: usize) -> Vec<Batch> {
    let length = case.model.context;
    let samples = case.samples / lanes;
    assert!(
        samples * lanes == case.samples,
        "{} samples for {lanes} lanes",
        case.samples
    );
    let elements = samples * length;
    let token = |i: usize| philox(1, [i as u32, 0, 0, 0])[0] % case.model.vocab_size as u32;
    let lane = |lane: usize| Batch {
        inputs: (0..elements).map(|i| token(lane * elements + i)).collect(),
        targets: (1..=elements).map(|i| token(lane * elements + i)).collect(),
        weights: vec![1.0; elements],
        starts: Vec::new(),
        samples,
        length,
    };
    (0..lanes).map(lane).collect()
}

/// What an engine computes on.
#[derive(Clone, Copy)]
struct Place {
    device: DeviceChoice,
    threads: usize,
}

/// An engine on its way through steps.
struct Training {
    engine: Engine,
    batches: Vec<Batch>,
    gradient: Gradient,
    /// By what the gradient is clipped.
    clip: Option<TrainConfig>,
    step: u64,
}

impl Training {
    fn new(case: &Case, lanes: usize, place: Place, how: How) -> Self {
        let train = train(how);
        let engine = Engine::new(&case.model, Some(&train), place.device, place.threads);
        let mut engine = engine.expect("an engine");
        engine.init(1).expect("initial weights");
        Self {
            engine,
            batches: batches(case, lanes),
            gradient: Gradient::default(),
            clip: how.as_a_run.then_some(train),
            step: 0,
        }
    }

    /// The gradient of a node as a worker takes it: lanes together where they can be, else added along the tree.
    fn node(&mut self, node: Node, gradient: &mut Gradient) -> f64 {
        let rows = self.batches[0].samples * self.batches[0].length;
        if !self.engine.shares(rows, node.size as usize)
            && let Some((left, right)) = node.children()
        {
            let mut other = Gradient::default();
            let weight = self.node(left, gradient) + self.node(right, &mut other);
            self.engine
                .install(|| cohort_common::aggregate::add_all(gradient, &other));
            return weight;
        }
        let site = |lane| Site {
            seed: 1,
            step: self.step,
            lane,
            micro_batch: 0,
        };
        let lanes: Vec<_> = node
            .lanes()
            .map(|lane| (&self.batches[lane as usize], site(lane)))
            .collect();
        let sums = self
            .engine
            .gradient(node, &lanes, gradient)
            .expect("a gradient");
        sums.iter().map(|sums| sums.weight).sum()
    }

    /// By what the update multiplies the gradient.
    fn scale(&self, gradient: &[f32], weight: f64) -> f64 {
        let Some(train) = &self.clip else {
            return 1.0 / weight;
        };
        let squares = self.engine.install(|| squares_of(gradient));
        clipped_scale(train, squares.sqrt() / weight, weight)
    }

    /// One step: its seconds, and of those the update's.
    fn step(&mut self) -> (f64, f64) {
        let begin = Instant::now();
        self.step += 1;
        let root = Node {
            first: 0,
            size: self.batches.len() as u32,
        };
        let mut gradient = std::mem::take(&mut self.gradient);
        let weight = self.node(root, &mut gradient);
        let middle = Instant::now();
        let update = Update {
            step: self.step,
            count: self.step,
            scale: self.scale(&gradient, weight),
            learning_rate: 1e-3,
        };
        self.engine.update(&gradient, update).expect("an update");
        self.gradient = gradient;
        (
            begin.elapsed().as_secs_f64(),
            middle.elapsed().as_secs_f64(),
        )
    }
}

/// Median seconds per step, and of those the seconds of the update. Of a run: the median over twenty stretches.
fn measure(case: &Case, lanes: usize, place: Place, budget: Duration, how: How) -> (f64, f64) {
    let mut training = Training::new(case, lanes, place, how);
    let (mut steps, mut updates) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while steps.len() < 5 || start.elapsed() < budget {
        let (step, update) = training.step();
        steps.push(step);
        updates.push(update);
    }
    let mean = |stretch: &[f64]| stretch.iter().sum::<f64>() / stretch.len() as f64;
    let steps = match how.as_a_run {
        true => {
            let each = (steps.len() / 20).max(1);
            steps.chunks_exact(each).map(mean).collect()
        }
        false => steps,
    };
    (median(steps), median(updates))
}

/// Eight lanes against one lane of the same tokens, step by step in turn, by the number of tokens in a lane.
fn compare_lanes(tokens: &[usize], place: Place, budget: Duration, json: bool) {
    for &tokens in tokens {
        let mut case = case("b-llama");
        case.model.context = case.model.context.min(tokens);
        case.samples = 8 * tokens / case.model.context;
        let mut trainings = [1, 8].map(|lanes| Training::new(&case, lanes, place, How::default()));
        let mut ratios = Vec::new();
        let start = Instant::now();
        while ratios.len() < 5 || start.elapsed() < budget {
            let [one, eight] = &mut trainings;
            let (one, _) = one.step();
            let (eight, _) = eight.step();
            ratios.push(eight / one);
        }
        let (steps, ratio) = (ratios.len(), median(ratios));
        match json {
            true => println!("{{\"tokens\": {tokens}, \"ratio\": {ratio}, \"steps\": {steps}}}"),
            false => println!(
                "8 lanes of {tokens} tokens take {ratio:.3} of the time of one lane of {}",
                8 * tokens
            ),
        }
    }
}

/// The most memory that this process has had, in MB.
fn peak_megabytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.map_or(f64::NAN, |kib| kib * 1024.0 / 1e6)
}

/// What a step of the `small` preset costs on one worker of several, and what of that is the price of being safe:
/// checksums of what travels, the hash of the root, the hash of the state, the ledger's entry, signs of life.
fn price(place: Place, budget: Duration) {
    const LANES: f64 = 8.0;
    let case = case("b-llama");
    let (step, update) = measure(&case, 1, place, budget, How::default());
    let step = LANES * (step - update) + update;
    let train = train(How::default());
    let mut engine =
        Engine::new(&case.model, Some(&train), place.device, place.threads).expect("an engine");
    engine.init(1).expect("initial weights");
    let root: Vec<f32> = engine.params().to_vec();
    let bytes = cohort_common::aggregate::encode(&root);
    let time = |work: &mut dyn FnMut()| {
        let once = |work: &mut dyn FnMut()| {
            let begin = Instant::now();
            work();
            begin.elapsed().as_secs_f64()
        };
        median((0..9).map(|_| once(work)).collect())
    };
    // A worker pushes about one gradient in a step and receives one root; each is read once for its checksum.
    let checks = 2.0
        * time(&mut || {
            std::hint::black_box(cohort_common::seal::checksum(&bytes));
        });
    let root_hash = time(&mut || {
        engine.install(|| cohort_common::aggregate::totals_of(&root));
    });
    let every = cohort_common::ledger::STATE_HASH_EVERY as f64;
    let state_hash = time(&mut || {
        std::hint::black_box(engine.state_hash());
    }) / every;
    let entry = cohort_common::ledger::Entry {
        step: 1,
        first_position: 0,
        samples: 32,
        lanes: vec![Default::default(); LANES as usize],
        loss_sum: 1.0,
        weight: 1.0,
        grad_norm: 1.0,
        learning_rate: 1.0,
        root_hash: [0; 32],
        state_hash_before: None,
        skipped: false,
        previous: [0; 32],
    };
    let ledger = time(&mut || {
        std::hint::black_box(entry.hash());
    });
    let mut sealer = cohort_common::seal::Sealer::default();
    let ping = cohort_common::wire::to_worker(&cohort_common::cluster::ToWorker::Ping {
        heartbeat_ms: 250,
    });
    // Four each way in a second.
    let beats = 8.0 * step * time(&mut || drop(sealer.frame(&ping)));
    println!(
        "a step of 8 lanes: {:.0} ms on {} with {} threads",
        step * 1e3,
        place.device,
        place.threads
    );
    let parts = [
        ("checksums", checks),
        ("root hash", root_hash),
        ("state hash", state_hash),
        ("ledger entry", ledger),
        ("signs of life", beats),
    ];
    for (name, seconds) in parts {
        println!(
            "{name:14} {:8.3} ms  {:.3} %",
            seconds * 1e3,
            100.0 * seconds / step
        );
    }
    let all: f64 = parts.iter().map(|(_, s)| s).sum();
    println!(
        "{:14} {:8.3} ms  {:.3} %",
        "in all",
        all * 1e3,
        100.0 * all / step
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    cohort_common::process::keep_freed_memory();
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test` runs benches without an argument, to see that they still work.
    if args.is_empty() {
        let place = Place {
            device: DeviceChoice::Cpu,
            threads: 1,
        };
        let how = How {
            precision: Precision::Bf16,
            gradient_checkpointing: true,
            as_a_run: true,
        };
        measure(&case("a"), 4, place, Duration::ZERO, how);
        return;
    }
    let given_for = |name: &str| {
        let position = args.iter().position(|arg| arg == name);
        position.and_then(|at| args.get(at + 1))
    };
    let option = |name: &str, default: f64| -> f64 {
        given_for(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let device = given_for("--device").map_or("cpu", |device| device);
    let place = Place {
        device: device.parse().expect("a device"),
        threads: option("--threads", cores as f64) as usize,
    };
    let seconds = option("--seconds", 5.0);
    let lanes = option("--lanes", 1.0) as usize;
    let given = |flag: &str| args.iter().any(|arg| arg == flag);
    let how = How {
        precision: match given("--bf16") {
            true => Precision::Bf16,
            false => Precision::F32,
        },
        gradient_checkpointing: given("--gradient-checkpointing"),
        as_a_run: given("--as-a-run"),
    };
    let json = given("--json");
    if args.iter().any(|arg| arg == "lanes") {
        let tokens = given_for("--tokens").map_or("64,128,256,512,1024", |tokens| tokens);
        let tokens: Vec<usize> = tokens
            .split(',')
            .map(|one| one.parse().expect("a number"))
            .collect();
        return compare_lanes(&tokens, place, Duration::from_secs_f64(seconds), json);
    }
    if args.iter().any(|arg| arg == "price") {
        return price(place, Duration::from_secs_f64(seconds));
    }
    let all = ["a", "b-llama", "b-gpt2", "c", "b-llama-8", "gpt2"];
    let named: Vec<_> = all
        .into_iter()
        .filter(|name| args.iter().any(|arg| arg == name))
        .collect();
    for name in if named.is_empty() {
        all[..3].to_vec()
    } else {
        named
    } {
        let case = case(name);
        let budget = Duration::from_secs_f64(seconds);
        let (step, update) = measure(&case, lanes, place, budget, how);
        let tokens = (case.samples * case.model.context) as f64;
        let (speed, gigaflops) = (
            tokens / step,
            tokens * case.model.flops_per_token() / step / 1e9,
        );
        let (name, peak) = (case.name, peak_megabytes());
        if json {
            println!(
                "{{\"model\": \"{name}\", \"tokens_per_s\": {speed}, \"step_ms\": {}, \"gflops\": {gigaflops}, \"peak_mb\": {peak}}}",
                step * 1e3
            );
            continue;
        }
        println!(
            "{name:8} {speed:9.0} tokens/s  {:8.2} ms per step, of which update {:.2} ms; {gigaflops:.1} GFLOP/s; {device}, {} threads; peak {peak:.0} MB",
            step * 1e3,
            update * 1e3,
            place.threads,
        );
    }
}
