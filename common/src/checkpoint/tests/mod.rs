//! Checkpoints written, damaged in every way we can think of, and read.

mod foreign;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;

use super::*;
use crate::hf::{self, SpecialTokens};
use crate::layout::{CHUNK_LEN, Layout};
use crate::spec::{
    Architecture, CheckpointConfig, ModelConfig, Payload, RunKind, RunSpec, ScheduleKind,
    TrainConfig,
};

fn model(architecture: Architecture, bias: bool) -> ModelConfig {
    ModelConfig {
        architecture,
        vocab_size: 1000,
        context: 16,
        hidden_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        intermediate_size: 96,
        tie_word_embeddings: true,
        bias,
        dropout: 0.0,
        norm_eps: 1e-5,
        head_dim: None,
        attention_bias: false,
        qk_norm: false,
        rope_theta: 10_000.0,
        rope_scaling: None,
        initializer_range: 0.02,
        labels: Vec::new(),
    }
}

pub(super) fn llama() -> ModelConfig {
    ModelConfig {
        num_key_value_heads: 2,
        tie_word_embeddings: false,
        ..model(Architecture::Llama, false)
    }
}

fn spec(model: ModelConfig) -> RunSpec {
    RunSpec {
        kind: RunKind::Pretrain,
        model,
        train: TrainConfig {
            steps: 200,
            lanes: 8,
            micro_batch: 2,
            accumulate: 1,
            learning_rate: 0.1 + 0.2,
            min_learning_rate: 1e-4,
            warmup_steps: 10,
            schedule: ScheduleKind::Cosine,
            decay_steps: 0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            grad_clip: 1.0,
            precision: Default::default(),
            payload: Payload::F32,
            diloco: None,
            gradient_checkpointing: false,
            seed: u64::MAX,
            eval_every: 50,
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
        },
        checkpoint: CheckpointConfig {
            every: 100,
            keep: 2,
        },
        corpus: "c0ffee".into(),
        mixture: None,
        start: None,
        lora: None,
        samples: None,
        watchdog: None,
    }
}

fn meta(model: ModelConfig) -> CheckpointMeta {
    CheckpointMeta {
        tokens: SpecialTokens {
            bos: None,
            eos: vec![0],
        },
        tokenizer: br#"{"added_tokens": [{"id": 0, "content": "<|end|>"}]}"#.to_vec(),
        chat_template: None,
        base: None,
        run: RunState {
            run: "tiny-1".into(),
            spec: spec(model),
            step: 100,
            samples: 1600,
            tokens: 25_600,
            val_loss: Some(1.0 / 3.0),
            ledger_head: [3; 32],
            state_hash: [0; 32],
        },
        ledger: b"{\"step\":1}\n{\"step\":2}\n".to_vec(),
    }
}

struct State {
    params: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

impl State {
    fn of(model: &ModelConfig) -> Self {
        let len = Layout::of(model).len();
        let buffer = |k: u64| -> Vec<f32> {
            let value = |i: u64| ((i * k) % 10_007) as f32 / 5_000.0 - 1.0;
            (0..len as u64).map(value).collect()
        };
        Self {
            params: buffer(7919),
            exp_avg: buffer(104_729),
            exp_avg_sq: buffer(31),
        }
    }

    fn hash(&self) -> [u8; 32] {
        state_hash(&self.params, &self.exp_avg, &self.exp_avg_sq)
    }

    fn write(&self, target: &Path, model: &ModelConfig) -> PathBuf {
        write_checkpoint(
            target,
            meta(model.clone()),
            &self.params,
            &self.exp_avg,
            &self.exp_avg_sq,
        )
        .unwrap()
    }
}

fn written(model: &ModelConfig) -> (TempDir, PathBuf, State) {
    let dir = tempfile::tempdir().unwrap();
    let state = State::of(model);
    let path = state.write(&dir.path().join("runs").join(directory_name(100)), model);
    (dir, path, state)
}

/// Everything that a reader does.
fn read_all(path: &Path) -> Result<(), CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    checkpoint.tokenizer()?;
    checkpoint.verify()?;
    Ok(())
}

#[test]
fn the_models_span_several_chunks() {
    assert!(Layout::of(&llama()).len() > 2 * CHUNK_LEN);
}

#[test]
fn a_checkpoint_is_read_back() {
    for model in [
        llama(),
        model(Architecture::Gpt2, true),
        model(Architecture::Gpt2, false),
    ] {
        let (_dir, path, state) = written(&model);
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.model(), &model);
        assert_eq!(checkpoint.tokens().eos, [0]);
        let mut run = meta(model.clone()).run;
        run.state_hash = state.hash();
        assert_eq!(checkpoint.run(), Some(&run));
        assert_eq!(checkpoint.tokenizer().unwrap(), meta(model).tokenizer);
        assert_eq!(checkpoint.weights().unwrap().params, state.params);
        let moments = checkpoint.moments().unwrap().unwrap();
        assert_eq!(
            (moments.exp_avg, moments.exp_avg_sq),
            (state.exp_avg, state.exp_avg_sq)
        );
        let manifest = checkpoint.manifest().unwrap();
        assert_eq!(checkpoint.verify().unwrap(), manifest.bytes());
        assert_eq!(
            checkpoint.weights_hash().unwrap(),
            manifest.file(WEIGHTS).unwrap().blake3
        );
    }
}

#[test]
fn the_safetensors_crate_opens_ours() {
    let model = model(Architecture::Gpt2, false);
    let (_dir, path, state) = written(&model);
    let bytes = fs::read(path.join(WEIGHTS)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for spec in Layout::of(&model).tensors() {
        let tensor = file.tensor(&spec.name).unwrap();
        assert_eq!(tensor.shape(), spec.shape);
        assert_eq!(tensor.data(), bytes_of(&state.params[spec.range()]));
    }
    for bias in ["transformer.ln_f.bias", "transformer.h.1.attn.c_attn.bias"] {
        assert!(
            file.tensor(bias).unwrap().data().iter().all(|b| *b == 0),
            "{bias}"
        );
    }
    let bytes = fs::read(path.join(OPTIMIZER)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let spec = Layout::of(&model)
        .get("transformer.wpe.weight")
        .unwrap()
        .clone();
    let name = "exp_avg_sq.transformer.wpe.weight";
    assert_eq!(
        file.tensor(name).unwrap().data(),
        bytes_of(&state.exp_avg_sq[spec.range()])
    );
}

#[test]
fn a_stream_cut_anywhere_writes_the_same_files() {
    let model = model(Architecture::Gpt2, false);
    let (dir, path, state) = written(&model);
    let whole = fs::read_to_string(path.join(MANIFEST)).unwrap();
    let stream: Vec<u8> = [&state.params, &state.exp_avg, &state.exp_avg_sq]
        .iter()
        .flat_map(|b| bytes_of(b).to_vec())
        .collect();
    for cut in [4093, 300_001] {
        let target = dir.path().join(format!("cut-{cut}"));
        let mut writer = CheckpointWriter::create(&target, meta(model.clone())).unwrap();
        assert_eq!(writer.state_bytes(), stream.len() as u64);
        for piece in stream.chunks(cut) {
            writer.write(piece).unwrap();
        }
        writer.finish(Some(state.hash())).unwrap();
        assert_eq!(fs::read_to_string(target.join(MANIFEST)).unwrap(), whole);
    }
}

#[test]
fn a_flipped_byte_in_any_file_is_detected_and_named() {
    let (_dir, path, _) = written(&llama());
    for entry in fs::read_dir(&path).unwrap() {
        let file = entry.unwrap().path();
        let original = fs::read(&file).unwrap();
        for at in [0, 9, original.len() / 2, original.len() - 1] {
            let mut damaged = original.clone();
            damaged[at] ^= 1;
            fs::write(&file, damaged).unwrap();
            let error = read_all(&path).unwrap_err().to_string();
            let name = file.display().to_string();
            assert!(error.contains(&name), "byte {at} of {name}: {error}");
        }
        fs::write(&file, original).unwrap();
    }
    read_all(&path).unwrap();
}

#[test]
fn a_truncated_or_missing_file_is_named() {
    let (_dir, path, _) = written(&llama());
    for entry in fs::read_dir(&path).unwrap() {
        let file = entry.unwrap().path();
        let name = file.display().to_string();
        let original = fs::read(&file).unwrap();
        for len in [0, 7, original.len() - 1] {
            fs::write(&file, &original[..len]).unwrap();
            let error = read_all(&path).unwrap_err().to_string();
            assert!(error.contains(&name), "{name} cut to {len}: {error}");
        }
        fs::remove_file(&file).unwrap();
        let error = read_all(&path).unwrap_err();
        assert!(
            matches!(&error, CheckpointError::MissingFile(f) if *f == file),
            "{error}"
        );
        fs::write(&file, original).unwrap();
    }
}

#[test]
fn the_ledger_is_read_back_and_may_be_absent_in_an_earlier_build() {
    let (_dir, path, _) = written(&llama());
    let lines = Checkpoint::open(&path).unwrap().ledger().unwrap().unwrap();
    assert_eq!(
        io::read_to_string(lines).unwrap().into_bytes(),
        meta(llama()).ledger
    );
    // As a build wrote it that knew no ledger.
    let mut manifest = verify_files(&path).unwrap();
    manifest.files.retain(|file| file.name != LEDGER);
    fs::write(path.join(MANIFEST), manifest.to_json()).unwrap();
    fs::remove_file(path.join(LEDGER)).unwrap();
    read_all(&path).unwrap();
    assert!(Checkpoint::open(&path).unwrap().ledger().unwrap().is_none());
}

#[test]
fn an_unfinished_checkpoint_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join(directory_name(100));
    let mut writer = CheckpointWriter::create(&target, meta(llama())).unwrap();
    writer.write(&[0; 1000]).unwrap();
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_crash_before_the_rename_leaves_no_visible_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join(directory_name(100));
    let writer = CheckpointWriter::create(&target, meta(llama())).unwrap();
    // A process that is killed runs no destructors.
    std::mem::forget(writer);
    assert_eq!(list_checkpoints(dir.path()).unwrap(), []);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(remove_unfinished(dir.path()).unwrap(), 1);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_state_of_another_length_or_hash_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join(directory_name(100));
    let model = llama();
    let state = State::of(&model);
    let writer = || {
        let mut writer = CheckpointWriter::create(&target, meta(model.clone())).unwrap();
        for buffer in [&state.params, &state.exp_avg, &state.exp_avg_sq] {
            writer.write(bytes_of(buffer)).unwrap();
        }
        writer
    };
    let short = CheckpointWriter::create(&target, meta(model.clone())).unwrap();
    assert!(matches!(
        short.finish(None),
        Err(CheckpointError::WrongLength { found: 0, .. })
    ));
    assert!(matches!(
        writer().write(&[0]),
        Err(CheckpointError::WrongLength { .. })
    ));
    let error = writer().finish(Some([1; 32])).unwrap_err();
    assert!(
        matches!(error, CheckpointError::WrongState { .. }),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_same_state_may_be_written_again_and_another_may_not() {
    let model = llama();
    let (_dir, path, mut state) = written(&model);
    assert_eq!(state.write(&path, &model), path);
    fs::write(path.join(OPTIMIZER), "torn").unwrap();
    state.write(&path, &model);
    read_all(&path).unwrap();
    state.params[0] += 1.0;
    let again = write_checkpoint(
        &path,
        meta(model),
        &state.params,
        &state.exp_avg,
        &state.exp_avg_sq,
    );
    assert!(matches!(again, Err(CheckpointError::Exists(p)) if p == path));
    read_all(&path).unwrap();
}

#[test]
fn the_same_state_may_come_twice_at_once() {
    let model = llama();
    let state = State::of(&model);
    for _ in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join(directory_name(100));
        let at_once = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            let write = || {
                at_once.wait();
                state.write(&target, &model)
            };
            let writers: Vec<_> = (0..4).map(|_| scope.spawn(write)).collect();
            for writer in writers {
                assert_eq!(writer.join().unwrap(), target);
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        read_all(&target).unwrap();
    }
}

#[test]
fn checkpoints_are_listed_by_step() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "step-00000200",
        "step-00000100",
        ".unfinished-step-00000300-1-0",
        "notes",
    ] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let steps: Vec<u64> = list_checkpoints(dir.path())
        .unwrap()
        .iter()
        .map(|c| c.0)
        .collect();
    assert_eq!(steps, [100, 200]);
    assert_eq!(list_checkpoints(&dir.path().join("nothing")).unwrap(), []);
}

#[test]
fn an_export_is_a_hugging_face_directory() {
    let (dir, path, state) = written(&llama());
    let target = dir.path().join("exported");
    fs::create_dir(&target).unwrap();
    assert_eq!(export(&path, &target).unwrap().len(), 5);
    let exported = Checkpoint::open(&target).unwrap();
    assert!(exported.manifest().is_none() && exported.run().is_none());
    assert_eq!(exported.weights().unwrap().params, state.params);
    assert_eq!(exported.moments().unwrap(), None);
    assert!(matches!(
        export(&path, &target),
        Err(CheckpointError::Exists(_))
    ));
    let mut damaged = fs::read(path.join(WEIGHTS)).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(path.join(WEIGHTS), damaged).unwrap();
    let other = dir.path().join("other");
    assert!(matches!(
        export(&path, &other),
        Err(CheckpointError::WrongHash { .. })
    ));
    assert!(!other.exists());
}

#[test]
fn what_is_no_checkpoint_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = dir.path().join("nothing");
    assert!(
        matches!(Checkpoint::open(&nothing), Err(CheckpointError::NoDirectory(p)) if p == nothing)
    );
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::MissingFile(p) if p == dir.path().join(CONFIG)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_as_weights_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), len: Option<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let config = hf::config_json(&llama(), &SpecialTokens::default());
        fs::write(dir.path().join(CONFIG), config).unwrap();
        let mut content = bytes;
        if let Some(len) = len {
            content.splice(0..0, u64::from(len).to_le_bytes());
        }
        fs::write(dir.path().join(WEIGHTS), content).unwrap();
        prop_assert!(Checkpoint::open(dir.path()).unwrap().weights().is_err());
    }
}
