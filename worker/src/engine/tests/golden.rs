//! Golden values of PyTorch and transformers; `worker/golden/make.py` makes them and says what they are.

use std::path::Path;

use cohort_common::layout::Layout;
use safetensors::SafeTensors;

use super::*;
use crate::engine::Update;
use crate::engine::optim::{AdamW, Moments};

pub(super) struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    pub fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("golden")
            .join(format!("{name}.safetensors"));
        Self {
            bytes: std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())),
        }
    }

    fn words(&self, name: &str) -> Vec<[u8; 4]> {
        let file = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        let data = file
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"))
            .data()
            .to_vec();
        data.as_chunks::<4>().0.to_vec()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.words(name)
            .into_iter()
            .map(f32::from_le_bytes)
            .collect()
    }

    pub fn tokens(&self, name: &str) -> Vec<u32> {
        self.words(name)
            .into_iter()
            .map(u32::from_le_bytes)
            .collect()
    }

    /// The model as we describe it; where transformers has described it, too, that must mean the same.
    pub fn model(&self) -> ModelConfig {
        let (_, metadata) = SafeTensors::read_metadata(&self.bytes).expect("a safetensors header");
        let metadata = metadata.metadata().as_ref().expect("metadata");
        let model = serde_json::from_str(&metadata["model"]).expect("a model config");
        if let Some(config) = metadata.get("config") {
            let (imported, _) = cohort_common::hf::parse_config(config).expect("a config.json");
            assert_eq!(imported, model);
        }
        model
    }

    pub fn params(&self, layout: &Layout) -> Vec<f32> {
        layout
            .tensors()
            .iter()
            .flat_map(|t| self.floats(&format!("w.{}", t.name)))
            .collect()
    }
}

pub(super) fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1.0f32, |a, b| a.max(b.abs()));
    for (i, (x, y)) in got.iter().zip(expected).enumerate() {
        assert!(
            (x - y).abs() <= tolerance * scale,
            "{what}[{i}] is {x}, expected {y}"
        );
    }
}

fn check(name: &str, composite: bool) {
    let golden = Golden::open(name);
    let model = golden.model();
    let mut engine = Engine::with_path(
        (&model, None),
        Some(&train()),
        candle_core::Device::Cpu,
        2,
        composite,
    )
    .expect("an engine");
    let params = golden.params(engine.layout());
    engine.load(&params, None).expect("weights");
    let (inputs, targets, weights) = (
        golden.tokens("inputs"),
        golden.tokens("targets"),
        golden.floats("weights"),
    );
    let length = inputs.len() / 2;
    let logits = engine.logits(&inputs[..length]).expect("logits");
    assert_close("logits", &logits, &golden.floats("logits"), 1e-5);

    let batch = Batch {
        inputs,
        targets,
        weights,
        starts: Vec::new(),
        samples: 2,
        length,
    };
    let loss = golden.floats("loss");
    assert_close(
        "score",
        &[engine.score(&batch).expect("a score").sums.loss as f32],
        &loss,
        1e-6,
    );
    let (got, gradient) = gradient(&mut engine, &batch);
    assert_close("loss", &[got as f32], &loss, 1e-6);
    for tensor in engine.layout().tensors() {
        let part = &gradient[tensor.range()];
        let norm = part.iter().map(|x| x * x).sum::<f32>().sqrt();
        let expected = golden.floats(&format!("norm.{}", tensor.name));
        assert_close(&tensor.name, &[norm], &expected, 1e-5);
        let first = golden.floats(&format!("first.{}", tensor.name));
        assert_close(
            &tensor.name,
            &part[..first.len()],
            &first,
            1e-5 * expected[0].max(1.0),
        );
    }
}

#[test]
fn models_agree_with_pytorch() {
    for name in [
        "llama_tied",
        "llama_untied",
        "llama3_rope",
        "llama_linear_rope",
        "mistral",
        "qwen2_tied",
        "qwen2_untied",
        "qwen3_tied",
        "qwen3_untied",
        "gpt2_bias",
        "gpt2_plain",
    ] {
        check(name, false);
        check(name, true);
    }
}

#[test]
fn adamw_agrees_with_pytorch() {
    let golden = Golden::open("adamw");
    for (name, weight_decay) in [("matrix", 0.1), ("vector", 0.0)] {
        let mut params = golden.floats(name);
        let mut moments = Moments::zeros(params.len());
        // A model's layout decays its matrices; here one tensor stands alone.
        let adamw = AdamW::whole(
            &TrainConfig {
                weight_decay,
                ..train()
            },
            params.len(),
        );
        for step in 1..=5u64 {
            let gradient = golden.floats(&format!("grad.{name}.{step}"));
            let update = Update {
                step,
                count: step,
                scale: 0.25,
                learning_rate: 0.01 / (step as f64).sqrt(),
            };
            adamw.update(&mut params, &mut moments, &gradient, 0, update);
        }
        assert_close(
            name,
            &params,
            &golden.floats(&format!("after.{name}")),
            1e-6,
        );
        assert_close(
            name,
            &moments.exp_avg,
            &golden.floats(&format!("exp_avg.{name}")),
            1e-6,
        );
        assert_close(
            name,
            &moments.exp_avg_sq,
            &golden.floats(&format!("exp_avg_sq.{name}")),
            1e-6,
        );
    }
}
