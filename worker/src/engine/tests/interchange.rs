//! Directories in Hugging Face layout, there and back: what the engine exports must be what it computes with, and what
//! `transformers` saves must give its logits here. `worker/golden/interchange.py` is the other side of both.

use std::fs;
use std::path::{Path, PathBuf};

use cohort_common::checkpoint::{Checkpoint, CheckpointMeta, RunState, export, write_checkpoint};
use cohort_common::hf::SpecialTokens;
use cohort_common::spec::{CheckpointConfig, RunKind, RunSpec};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::*;

/// Where `interchange.py` reads and writes. Its checks are left out where it is not set.
pub(super) fn other_side() -> Option<PathBuf> {
    std::env::var_os("COHORT_INTERCHANGE").map(PathBuf::from)
}

/// Name of the file beside a model with its tokens and their logits.
const LOGITS: &str = "logits.safetensors";

/// An engine whose vectors, too, are neither 0 nor 1 throughout.
pub(super) fn trained(model: &ModelConfig) -> Engine {
    let mut engine = engine(model, 2);
    let mut params = engine.params().to_vec();
    let layout = engine.layout().clone();
    for tensor in layout.tensors().iter().filter(|t| !t.decays()) {
        for index in tensor.range() {
            params[index] += 0.2 * libm::sinf(index as f32);
        }
    }
    engine.load(&params, None).expect("weights");
    engine
}

pub(super) fn meta(model: &ModelConfig) -> CheckpointMeta {
    CheckpointMeta {
        tokens: SpecialTokens::default(),
        tokenizer: b"{}".to_vec(),
        run: RunState {
            run: "tiny-1".into(),
            spec: RunSpec {
                kind: RunKind::Pretrain,
                model: model.clone(),
                train: train(),
                checkpoint: CheckpointConfig { every: 10, keep: 1 },
                corpus: "c0ffee".into(),
                mixture: None,
                start: None,
                lora: None,
                samples: None,
                watchdog: None,
            },
            step: 10,
            samples: 30,
            tokens: 1440,
            val_loss: None,
            ledger_head: [3; 32],
            state_hash: [0; 32],
        },
        ledger: Vec::new(),
        chat_template: None,
        base: None,
    }
}

pub(super) fn write_logits(directory: &Path, tokens: &[u32], logits: &[f32]) {
    let tokens: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    let count = tokens.len() / 4;
    let shape = vec![count, logits.len() / count];
    let logits: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tokens = TensorView::new(Dtype::I32, vec![count], &tokens).expect("tokens");
    let logits = TensorView::new(Dtype::F32, shape, &logits).expect("logits");
    let views = [("tokens", tokens), ("logits", logits)];
    let bytes = safetensors::serialize(views, None).expect("a safetensors file");
    fs::write(directory.join(LOGITS), bytes).expect("writable");
}

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> {
    bytes.as_chunks::<4>().0.iter().copied()
}

pub(super) fn read_logits(directory: &Path) -> (Vec<u32>, Vec<f32>) {
    let bytes = fs::read(directory.join(LOGITS)).expect("logits");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let data = |name| file.tensor(name).expect("the tensor").data();
    (
        words(data("tokens")).map(u32::from_le_bytes).collect(),
        words(data("logits")).map(f32::from_le_bytes).collect(),
    )
}

/// An engine with the weights of a checkpoint.
pub(super) fn opened(checkpoint: Checkpoint) -> Engine {
    let (model, lora) = (checkpoint.model(), checkpoint.lora());
    let weights = checkpoint.weights();
    let weights = weights.unwrap_or_else(|e| panic!("{}: {e}", checkpoint.dir().display()));
    let mut engine = Engine::adapted(model, lora, None, DeviceChoice::Cpu, 2).expect("an engine");
    engine.load(&weights.params, None).expect("weights");
    engine
}

fn opened_at(directory: &Path) -> Engine {
    let checkpoint = Checkpoint::open(directory);
    opened(checkpoint.unwrap_or_else(|e| panic!("{}: {e}", directory.display())))
}

#[test]
fn exported_models_are_read_back_and_give_the_same_logits() {
    let temporary = tempfile::tempdir().expect("a directory");
    let root = other_side().map_or(temporary.path().to_owned(), |dir| dir.join("exported"));
    for (index, model) in models().iter().enumerate() {
        let mut engine = trained(model);
        let checkpoint = temporary.path().join(format!("checkpoint-{index}"));
        let moments = vec![0.0; engine.layout().len()];
        write_checkpoint(
            &checkpoint,
            meta(model),
            engine.params(),
            &moments,
            &moments,
        )
        .expect("a checkpoint");
        let target = root.join(format!("{}-{index}", model.architecture));
        export(&checkpoint, &target).expect("an export");
        let tokens = batch(model, 1, 40).inputs;
        let logits = engine.logits(&tokens).expect("logits");
        let mut again = opened_at(&target);
        assert_eq!(again.model(), model);
        assert!(
            again.logits(&tokens).expect("logits") == logits,
            "{model:?}"
        );
        write_logits(&target, &tokens, &logits);
    }
}

#[test]
fn models_that_transformers_saved_give_its_logits() {
    let Some(root) = other_side() else {
        eprintln!("skipped: worker/golden/interchange.py runs this");
        return;
    };
    let entries = fs::read_dir(root.join("saved")).expect("what interchange.py saves");
    let mut directories: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    directories.sort();
    for directory in directories {
        let (tokens, expected) = read_logits(&directory);
        let logits = opened_at(&directory).logits(&tokens).expect("logits");
        assert_eq!(logits.len(), expected.len());
        let apart = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        let largest = apart.fold(0.0f32, f32::max);
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        println!("saved {name}: largest difference {largest:.1e}");
        assert!(largest < 1e-4, "{name}: {largest}");
    }
}
