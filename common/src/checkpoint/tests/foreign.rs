//! Directories that others wrote, in all the spellings we know of.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::supervised::SpecialTexts;

/// A foreign directory: config and tensors, nothing else.
struct Foreign {
    dir: TempDir,
    model: ModelConfig,
    tensors: Vec<(String, Vec<usize>, safetensors::Dtype, Vec<u8>)>,
}

impl Foreign {
    fn of(model: ModelConfig, state: &State) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = hf::config_json(&model, &SpecialTokens::default());
        fs::write(dir.path().join(CONFIG), config).unwrap();
        let tensor = |t: &crate::layout::TensorSpec| {
            let bytes = bytes_of(&state.params[t.range()]).to_vec();
            (
                t.name.clone(),
                t.shape.clone(),
                safetensors::Dtype::F32,
                bytes,
            )
        };
        let tensors = Layout::of(&model).tensors().iter().map(tensor).collect();
        Self {
            dir,
            model,
            tensors,
        }
    }

    fn push(&mut self, name: &str, shape: &[usize], value: f32) {
        let bytes = bytes_of(&vec![value; shape.iter().product()]).to_vec();
        self.tensors
            .push((name.into(), shape.to_vec(), safetensors::Dtype::F32, bytes));
    }

    fn write(&self, file: &str, take: impl Fn(&str) -> bool) {
        let chosen = self.tensors.iter().filter(|t| take(&t.0));
        let views = chosen.map(|(name, shape, dtype, bytes)| {
            let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap();
            (name.clone(), view)
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        fs::write(self.dir.path().join(file), bytes).unwrap();
    }

    fn read(&self) -> Result<Vec<f32>, CheckpointError> {
        self.write(WEIGHTS, |_| true);
        self.reopen()
    }

    fn reopen(&self) -> Result<Vec<f32>, CheckpointError> {
        let checkpoint = Checkpoint::open(self.dir.path())?;
        assert_eq!(checkpoint.model(), &self.model);
        checkpoint.weights().map(|w| w.params)
    }
}

#[test]
fn the_spellings_of_the_wild_are_read() {
    let gpt2 = model(Architecture::Gpt2, false);
    let state = State::of(&gpt2);
    let mut foreign = Foreign::of(gpt2, &state);
    for tensor in &mut foreign.tensors {
        tensor.0 = tensor.0.trim_start_matches("transformer.").to_owned();
    }
    foreign.push("h.0.attn.bias", &[1, 1, 16, 16], 1.0);
    foreign.push("h.0.attn.masked_bias", &[], -1e4);
    foreign.push("lm_head.weight", &[1000, 64], 1.0);
    foreign.push("h.1.attn.c_attn.bias", &[192], 0.0);
    assert_eq!(foreign.read().unwrap(), state.params);
    foreign.push("h.1.ln_1.bias", &[64], 0.5);
    let error = foreign.read().unwrap_err();
    assert!(matches!(error, CheckpointError::BiasNotZero { name, .. } if name == "h.1.ln_1.bias"));

    let state = State::of(&llama());
    let mut foreign = Foreign::of(llama(), &state);
    foreign.push("model.layers.0.self_attn.rotary_emb.inv_freq", &[8], 1.0);
    assert_eq!(foreign.read().unwrap(), state.params);
}

#[test]
fn half_precision_weights_become_f32() {
    let state = State::of(&llama());
    let mut foreign = Foreign::of(llama(), &state);
    let mut expected = state.params.clone();
    for (i, (name, _, dtype, bytes)) in foreign.tensors.iter_mut().enumerate() {
        let range = Layout::of(&llama()).get(name).unwrap().range();
        let values = &mut expected[range];
        let halves: Vec<u16> = if i % 2 == 0 {
            *dtype = safetensors::Dtype::F16;
            values
                .iter()
                .map(|v| half::f16::from_f32(*v).to_bits())
                .collect()
        } else {
            *dtype = safetensors::Dtype::BF16;
            values
                .iter()
                .map(|v| half::bf16::from_f32(*v).to_bits())
                .collect()
        };
        for (value, bits) in values.iter_mut().zip(&halves) {
            *value = if i % 2 == 0 {
                half::f16::from_bits(*bits).to_f32()
            } else {
                half::bf16::from_bits(*bits).to_f32()
            };
        }
        *bytes = halves.iter().flat_map(|b| b.to_le_bytes()).collect();
    }
    assert_eq!(foreign.read().unwrap(), expected);
    foreign.tensors[0].2 = safetensors::Dtype::I16;
    assert!(matches!(
        foreign.read(),
        Err(CheckpointError::WrongType { .. })
    ));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let state = State::of(&llama());
    let mut foreign = Foreign::of(llama(), &state);
    foreign.push("model.extra.weight", &[3], 1.0);
    let error = foreign.read().unwrap_err();
    assert!(
        matches!(error, CheckpointError::UnexpectedTensor { name, .. } if name == "model.extra.weight")
    );
    foreign.tensors.pop();
    let (name, mut shape, dtype, bytes) = foreign.tensors.remove(1);
    let error = foreign.read().unwrap_err();
    assert!(matches!(error, CheckpointError::MissingTensor { name: n, .. } if n == name));
    shape.insert(0, 1);
    foreign.tensors.push((name, shape, dtype, bytes));
    let error = foreign.read().unwrap_err().to_string();
    assert!(
        error.contains("has the shape [1, 64], the model calls for [64]"),
        "{error}"
    );
}

/// Writes two files and the index that says so, with `change` made to the index.
fn sharded(foreign: &Foreign, change: impl Fn(&mut std::collections::BTreeMap<String, String>)) {
    const FILES: [&str; 2] = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let place = |name: &str| FILES[usize::from(!name.contains("layers.0"))];
    for file in FILES {
        foreign.write(file, |name| place(name) == file);
    }
    let names = foreign.tensors.iter().map(|t| t.0.clone());
    let mut map = names
        .map(|name| (name.clone(), place(&name).into()))
        .collect();
    change(&mut map);
    let text = serde_json::json!({ "weight_map": map }).to_string();
    fs::write(foreign.dir.path().join(WEIGHTS_INDEX), text).unwrap();
}

#[test]
fn a_sharded_model_is_read() {
    let state = State::of(&llama());
    let mut foreign = Foreign::of(llama(), &state);
    sharded(&foreign, |_| {});
    assert_eq!(foreign.reopen().unwrap(), state.params);
    // What an index does not name may lie in its files, as with `transformers`, but must be of the model.
    sharded(&foreign, |map| {
        map.pop_first();
    });
    assert_eq!(foreign.reopen().unwrap(), state.params);
    foreign.push("model.extra.weight", &[3], 1.0);
    sharded(&foreign, |_| {});
    let error = foreign.reopen().unwrap_err();
    assert!(matches!(error, CheckpointError::UnexpectedTensor { .. }));
}

#[test]
fn shards_that_do_not_fit_their_index_are_named() {
    let foreign = Foreign::of(llama(), &State::of(&llama()));
    let error = |change: &dyn Fn(&mut std::collections::BTreeMap<String, String>)| {
        sharded(&foreign, change);
        foreign.reopen().unwrap_err().to_string()
    };
    let lost = "model-00003-of-00003.safetensors";
    let missing = error(&|map| {
        map.insert("model.norm.weight".into(), lost.into());
    });
    assert!(
        missing.contains(lost) && missing.contains("is missing"),
        "{missing}"
    );
    let misplaced = error(&|map| {
        let first = "model-00001-of-00002.safetensors";
        map.insert("model.norm.weight".into(), first.into());
    });
    let expected = "it places tensor `model.norm.weight` in `model-00001-of-00002.safetensors`, \
                    which does not hold it";
    assert!(misplaced.ends_with(expected), "{misplaced}");
    let one_shard = error(&|map| map.retain(|name, _| name.contains("layers.0")));
    assert!(
        one_shard.contains("has no tensor `lm_head.weight`"),
        "{one_shard}"
    );
    let outside = error(&|map| {
        map.insert("model.norm.weight".into(), "../x.safetensors".into());
    });
    assert!(
        outside.ends_with("`\"../x.safetensors\"` is not a plain file name"),
        "{outside}"
    );
}

#[test]
fn a_chat_template_is_read_where_others_put_it() {
    let model = llama();
    let foreign = Foreign::of(model.clone(), &State::of(&model));
    let put = |name: &str, text: &str| fs::write(foreign.dir.path().join(name), text).unwrap();
    let checkpoint = Checkpoint::open(foreign.dir.path()).unwrap();
    assert_eq!(checkpoint.chat_template().unwrap(), None);
    assert_eq!(checkpoint.special_texts().unwrap(), SpecialTexts::default());

    let config = r#"{"chat_template": "in the config", "eos_token": {"content": "</s>"}}"#;
    put(TOKENIZER_CONFIG, config);
    let template = |checkpoint: &Checkpoint| checkpoint.chat_template().unwrap();
    assert_eq!(template(&checkpoint).as_deref(), Some("in the config"));
    let texts = checkpoint.special_texts().unwrap();
    assert_eq!(texts.eos.as_deref(), Some("</s>"));
    put(CHAT_TEMPLATE, "in a file");
    assert_eq!(template(&checkpoint).as_deref(), Some("in a file"));

    foreign.write(WEIGHTS, |_| true);
    let target = foreign.dir.path().join("exported");
    export(foreign.dir.path(), &target).unwrap();
    let exported = Checkpoint::open(&target).unwrap();
    assert_eq!(template(&exported).as_deref(), Some("in a file"));

    put(TOKENIZER_CONFIG, r#"{"eos_token": 2}"#);
    let error = checkpoint.special_texts().unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("tokenizer_config.json` cannot be used"),
        "{error}"
    );
}

#[test]
fn our_checkpoints_carry_their_template() {
    let model = llama();
    let dir = tempfile::tempdir().unwrap();
    let state = State::of(&model);
    let mut meta = meta(model);
    meta.chat_template = Some("{{ messages }}".into());
    let target = dir.path().join("step-00000100");
    write_checkpoint(
        &target,
        meta,
        &state.params,
        &state.exp_avg,
        &state.exp_avg_sq,
    )
    .unwrap();
    let checkpoint = Checkpoint::open(&target).unwrap();
    let template = checkpoint.chat_template().unwrap();
    assert_eq!(template.as_deref(), Some("{{ messages }}"));
    fs::write(target.join(TOKENIZER_CONFIG), "{}").unwrap();
    assert!(matches!(
        Checkpoint::open(&target),
        Err(CheckpointError::WrongSize { .. })
    ));
}
