//! A real checkpoint: Karpathy's stories260K in Hugging Face layout, where the test data is at hand.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::*;
use crate::engine::{Sampling, generate};

/// `$COHORT_TEST_DATA`, or `../shared/data` beside the workspace.
fn data() -> PathBuf {
    match std::env::var_os("COHORT_TEST_DATA") {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"),
    }
}

fn load(directory: &Path) -> Option<Engine> {
    let config = std::fs::read_to_string(directory.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&config).expect("config.json");
    let size = |key: &str| {
        config[key]
            .as_u64()
            .unwrap_or_else(|| panic!("config.json has no `{key}`")) as usize
    };
    let model = ModelConfig {
        vocab_size: size("vocab_size"),
        context: size("max_position_embeddings"),
        hidden_size: size("hidden_size"),
        num_hidden_layers: size("num_hidden_layers"),
        num_attention_heads: size("num_attention_heads"),
        num_key_value_heads: size("num_key_value_heads"),
        intermediate_size: size("intermediate_size"),
        tie_word_embeddings: config["tie_word_embeddings"].as_bool().unwrap_or(false),
        norm_eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-5) as f32,
        ..model(Architecture::Llama)
    };
    let bytes = std::fs::read(directory.join("model.safetensors")).expect("model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("model.safetensors");
    let mut engine = Engine::new(&model, None, DeviceChoice::Cpu, 2).expect("an engine");
    let mut params = Vec::new();
    for spec in engine.layout().tensors() {
        let view = file.tensor(&spec.name).expect("the tensor");
        assert_eq!(
            (view.dtype(), view.shape()),
            (Dtype::F32, spec.shape.as_slice()),
            "{}",
            spec.name
        );
        params.extend(
            view.data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes)),
        );
    }
    engine.load(&params, None).expect("weights");
    Some(engine)
}

/// Token strings by id, with `▁` for a space, of a `tokenizer.json` whose model has a vocabulary.
fn vocabulary(directory: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(directory.join("tokenizer.json")).expect("tokenizer.json");
    let json: serde_json::Value = serde_json::from_str(&text).expect("tokenizer.json");
    let vocab = json["model"]["vocab"].as_object().expect("a vocabulary");
    let mut tokens = vec![String::new(); vocab.len()];
    for (token, id) in vocab {
        tokens[id.as_u64().expect("an id") as usize] = token.replace('▁', " ");
    }
    tokens
}

#[test]
fn stories260k_tells_its_story() {
    let directory = data().join("models/stories260K-hf");
    let Some(mut engine) = load(&directory) else {
        eprintln!(
            "skipped: no {}; set COHORT_TEST_DATA to the folder that holds models/",
            directory.display()
        );
        return;
    };
    let sampling = Sampling {
        max_tokens: 120,
        temperature: 0.0,
        top_k: None,
        top_p: None,
        seed: 0,
    };
    let tokens = generate(&mut engine, &[1], &sampling, Some(2), &mut |_| true).expect("a story");
    let vocabulary = vocabulary(&directory);
    let story: String = tokens
        .iter()
        .map(|&token| vocabulary[token as usize].as_str())
        .collect();
    assert!(
        story
            .trim_start()
            .starts_with("Once upon a time, there was a little girl named Lily."),
        "{story}"
    );

    let length = tokens.len() - 1;
    let batch = Batch {
        inputs: tokens[..length].to_vec(),
        targets: tokens[1..].to_vec(),
        weights: vec![1.0; length],
        starts: Vec::new(),
        samples: 1,
        length,
    };
    let sums = engine.score(&batch).expect("a score").sums;
    let loss = sums.loss / sums.weight;
    assert!(
        (0.1..1.2).contains(&loss),
        "its own story costs {loss} nats per token"
    );
}
