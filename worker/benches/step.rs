//! Speed of one training step (forward, backward, update) in tokens per second: the median over steps.
//!
//! ```text
//! cargo bench -p cohort-worker --bench step [-- [MODEL] [--threads N] [--seconds S]]
//! ```
//!
//! MODEL is `a`, `b-llama`, `b-gpt2` or `c`; without one, all but `c` run. `bench/step_pytorch.py` does the same in PyTorch.

use std::time::{Duration, Instant};

use cohort_common::rng::philox;
use cohort_common::spec::{Architecture, ModelConfig, ScheduleKind, TrainConfig};
use cohort_worker::engine::{Batch, DeviceChoice, Engine, Site, Update};

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
        "b-llama" => Architecture::Llama,
        _ => Architecture::Gpt2,
    };
    let (layers, heads, hidden, context, samples, vocab) = match name {
        "a" => (4, 4, 128, 64, 12, 65),
        "c" => (12, 12, 768, 256, 1, 50_257),
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
        intermediate_size: if name == "b-llama" { 1024 } else { 4 * hidden },
        tie_word_embeddings: true,
        bias: name == "c",
        dropout: 0.0,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        initializer_range: 0.02,
    };
    Case {
        name,
        model,
        samples,
    }
}

fn train() -> TrainConfig {
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
        seed: 1,
        eval_every: 0,
        eval_samples: 0,
        min_workers: 1,
    }
}

fn batch(case: &Case) -> Batch {
    let length = case.model.context;
    let elements = case.samples * length;
    let token = |i: usize| philox(1, [i as u32, 0, 0, 0])[0] % case.model.vocab_size as u32;
    Batch {
        inputs: (0..elements).map(token).collect(),
        targets: (1..=elements).map(token).collect(),
        weights: vec![1.0; elements],
        samples: case.samples,
        length,
    }
}

/// Median seconds per step, and of those the seconds of the update.
fn measure(case: &Case, threads: usize, budget: Duration) -> (f64, f64) {
    let (train, batch) = (train(), batch(case));
    let mut engine =
        Engine::new(&case.model, Some(&train), DeviceChoice::Cpu, threads).expect("an engine");
    engine.init(1).expect("initial weights");
    let mut gradient = vec![0.0; engine.layout().len()];
    let (mut steps, mut updates) = (Vec::new(), Vec::new());
    let start = Instant::now();
    let mut step = 0;
    while steps.len() < 5 || start.elapsed() < budget {
        step += 1;
        let begin = Instant::now();
        gradient.fill(0.0);
        let site = Site {
            seed: 1,
            step,
            lane: 0,
            micro_batch: 0,
        };
        let sums = engine
            .accumulate(&batch, site, &mut gradient)
            .expect("a gradient");
        let middle = Instant::now();
        let update = Update {
            step,
            scale: 1.0 / sums.weight,
            learning_rate: 1e-3,
        };
        engine.update(&gradient, update).expect("an update");
        steps.push(begin.elapsed().as_secs_f64());
        updates.push(middle.elapsed().as_secs_f64());
    }
    (median(steps), median(updates))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo test` runs benches without an argument, to see that they still work.
    if args.is_empty() {
        measure(&case("a"), 1, Duration::ZERO);
        return;
    }
    let option = |name: &str, default: f64| -> f64 {
        let position = args.iter().position(|arg| arg == name);
        let value = position.and_then(|at| args.get(at + 1));
        value.map_or(default, |text| text.parse().expect("a number"))
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = option("--threads", cores as f64) as usize;
    let seconds = option("--seconds", 5.0);
    let all = ["a", "b-llama", "b-gpt2", "c"];
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
        let (step, update) = measure(&case, threads, Duration::from_secs_f64(seconds));
        let tokens = (case.samples * case.model.context) as f64;
        println!(
            "{:8} {:9.0} tokens/s  {:8.2} ms per step, of which update {:.2} ms; {:.1} GFLOP/s; {threads} threads",
            case.name,
            tokens / step,
            step * 1e3,
            update * 1e3,
            tokens * case.model.flops_per_token() / step / 1e9,
        );
    }
}
