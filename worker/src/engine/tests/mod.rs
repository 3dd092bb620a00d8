//! Tests of the whole engine: against PyTorch, against the composite path, against itself with other threads.

mod adapters;
#[cfg(feature = "cuda")]
mod cuda;
mod finetuned;
mod golden;
mod interchange;
mod interchange_adapters;
mod stories;
mod training;
mod whole;

use cohort_common::rng::philox;
use cohort_common::spec::{
    Architecture, ModelConfig, Payload, RopeScaling, ScheduleKind, TrainConfig,
};

use super::{Batch, DeviceChoice, Engine, Gradient, Site, Update};
use cohort_common::tree::Node;

const SITE: Site = Site {
    seed: 7,
    step: 3,
    lane: 1,
    micro_batch: 2,
};

pub(crate) fn model(architecture: Architecture) -> ModelConfig {
    let llama = architecture == Architecture::Llama;
    ModelConfig {
        architecture,
        vocab_size: 83,
        context: 48,
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: if llama { 2 } else { 4 },
        intermediate_size: 72,
        tie_word_embeddings: !llama,
        bias: !llama,
        dropout: 0.0,
        norm_eps: 1e-5,
        head_dim: None,
        attention_bias: false,
        qk_norm: false,
        rope_theta: 10_000.0,
        rope_scaling: None,
        initializer_range: 0.2,
        labels: Vec::new(),
    }
}

/// Like Qwen2: biases of queries, keys and values. The frequencies are stretched besides.
fn qwen2() -> ModelConfig {
    ModelConfig {
        attention_bias: true,
        rope_scaling: Some(RopeScaling::Llama3 {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 32,
        }),
        ..model(Architecture::Llama)
    }
}

/// Like Qwen3: queries and keys are normalised, and heads are wider than their share.
fn qwen3() -> ModelConfig {
    ModelConfig {
        head_dim: Some(12),
        qk_norm: true,
        tie_word_embeddings: true,
        ..model(Architecture::Llama)
    }
}

/// One model of each kind: both architectures, tied and untied, with and without bias, with and without dropout; the
/// biases, norms and widths of heads that only some models have.
fn models() -> Vec<ModelConfig> {
    let (llama, gpt2) = (model(Architecture::Llama), model(Architecture::Gpt2));
    vec![
        ModelConfig {
            tie_word_embeddings: true,
            num_key_value_heads: 1,
            ..llama.clone()
        },
        llama,
        qwen2(),
        qwen3(),
        ModelConfig {
            bias: false,
            ..gpt2.clone()
        },
        ModelConfig {
            dropout: 0.3,
            ..gpt2.clone()
        },
        gpt2,
    ]
}

/// One classifier of each architecture.
fn classifiers() -> Vec<ModelConfig> {
    let classifier = |architecture| ModelConfig {
        labels: ["ham", "spam", "other"].map(str::to_owned).to_vec(),
        ..model(architecture)
    };
    vec![
        classifier(Architecture::Llama),
        classifier(Architecture::Gpt2),
    ]
}

pub(crate) fn train() -> TrainConfig {
    TrainConfig {
        steps: 10,
        lanes: 1,
        micro_batch: 3,
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
        precision: Default::default(),
        payload: Payload::F32,
        diloco: None,
        gradient_checkpointing: false,
        seed: 7,
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

fn engine(model: &ModelConfig, threads: usize) -> Engine {
    let mut engine =
        Engine::new(model, Some(&train()), DeviceChoice::Cpu, threads).expect("an engine");
    engine.init(7).expect("initial weights");
    engine
}

/// The same model on the composite path.
fn composite(model: &ModelConfig) -> Engine {
    let device = candle_core::Device::Cpu;
    let shape = (model, None);
    let mut engine = Engine::with_path(shape, Some(&train()), device, 2, true).expect("an engine");
    engine.init(7).expect("initial weights");
    engine
}

/// The same batch, each sample cut into segments of several lengths.
fn packed(model: &ModelConfig, samples: usize, length: usize) -> Batch {
    let mut batch = batch(model, samples, length);
    let mut start = 0;
    for r in 0..samples * length {
        let place = r % length;
        if place == 0 || (place - start) > philox(12, [r as u32, 0, 0, 0])[0] as usize % 9 {
            start = place;
        }
        batch.starts.push(start as u32);
    }
    batch
}

fn batch(model: &ModelConfig, samples: usize, length: usize) -> Batch {
    let draw = |stream: u32, i: usize| philox(11, [i as u32, stream, 0, 0])[0] as usize;
    let bounds = [model.vocab_size, model.outputs()];
    let tokens = |stream: u32| {
        (0..samples * length)
            .map(|i| (draw(stream, i) % bounds[stream as usize]) as u32)
            .collect()
    };
    Batch {
        inputs: tokens(0),
        targets: tokens(1),
        weights: (0..samples * length)
            .map(|i| (draw(2, i) % 3) as f32 * 0.5)
            .collect(),
        starts: Vec::new(),
        samples,
        length,
    }
}

/// The first update.
fn first_update(scale: f64, learning_rate: f64) -> Update {
    Update {
        step: 1,
        count: 1,
        scale,
        learning_rate,
    }
}

fn gradient(engine: &mut Engine, batch: &Batch) -> (f64, Vec<f32>) {
    let mut gradient = Gradient::default();
    let sums = engine
        .accumulate(batch, SITE, &mut gradient)
        .expect("a gradient");
    (sums.loss, gradient.to_vec())
}

/// What an engine says to be complete while backward goes on must be what the gradient has in the end, in one pass and when
/// a second micro-batch is added; and there must be more of it after each block, and all of it in the end.
fn complete_early(engine: &mut Engine, batch: &Batch) {
    let blocks = engine.model().num_hidden_layers;
    let mut gradient = Gradient::default();
    for fresh in [true, false] {
        let mut told: Vec<Vec<f32>> = Vec::new();
        let mut tell = |gradient: &Gradient, complete: usize| {
            told.push(gradient[..complete].to_vec());
        };
        let (node, lane) = (Node::leaf(SITE.lane), [(batch, SITE)]);
        match fresh {
            true => {
                let found = engine.gradient_telling(node, &lane, &mut gradient, Some(&mut tell));
                found.expect("a gradient");
            }
            false => {
                let found = engine.accumulate_telling(batch, SITE, &mut gradient, Some(&mut tell));
                found.expect("a gradient");
            }
        }
        assert_eq!(told.len(), blocks + 1);
        assert!(told.pop().is_some_and(|all| all == gradient[..]));
        let mut before = 0;
        for part in told {
            assert!(part.len() > before && part.len() <= gradient.len());
            assert!(part == gradient[..part.len()], "{before}..{}", part.len());
            before = part.len();
        }
    }
}
