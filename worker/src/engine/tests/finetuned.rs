//! Golden values of what finetuning adds: packed samples of which a part is trained, classifiers, adapters as peft saves
//! them. transformers computed each sample by itself; `worker/golden/make_finetuned.py` says how.

use std::path::Path;

use cohort_common::checkpoint::adapter::{Adapter, file_name_of};
use cohort_common::layout::Layout;
use cohort_common::spec::LoraConfig;

use super::golden::{Golden, assert_close};
use super::*;

/// Tokens of a packed row.
const ROW: usize = 14;

/// The second sample of the first row, whose logits are there.
const SECOND: std::ops::Range<usize> = 6..11;

fn batch_of(golden: &Golden) -> Batch {
    let inputs = golden.tokens("inputs");
    Batch {
        samples: inputs.len() / ROW,
        length: ROW,
        inputs,
        targets: golden.tokens("targets"),
        weights: golden.floats("weights"),
        starts: golden.tokens("starts"),
    }
}

/// Loss and gradients of the packed rows against those of the samples; `name_of` is what the file calls a tensor.
fn check(
    golden: &Golden,
    lora: Option<&LoraConfig>,
    params: &[f32],
    name_of: impl Fn(&cohort_common::layout::TensorSpec) -> String,
) {
    let model = golden.model();
    let batch = batch_of(golden);
    let trained = batch.weights.iter().sum::<f32>();
    for composite in [false, true] {
        let device = candle_core::Device::Cpu;
        let shape = (&model, lora);
        let engine = Engine::with_path(shape, Some(&train()), device, 2, composite);
        let mut engine = engine.expect("an engine");
        engine.load(params, None).expect("weights");
        let expected = golden.floats("logits");
        let logits = engine.logits(&batch.inputs[SECOND]).expect("logits");
        // A classifier is asked after the last token alone.
        let from = logits.len() - expected.len();
        assert_close("logits", &logits[from..], &expected, 1e-5);
        let loss = golden.floats("loss");
        let sums = engine.score(&batch).expect("a score").sums;
        assert_close("score", &[sums.loss as f32], &loss, 1e-6);
        assert_eq!(sums.weight as f32, trained);
        let (got, gradient) = gradient(&mut engine, &batch);
        assert_close("loss", &[got as f32], &loss, 1e-6);
        for tensor in engine.layout().tensors() {
            let name = name_of(tensor);
            let part = &gradient[tensor.range()];
            let norm = part.iter().map(|x| x * x).sum::<f32>().sqrt();
            let expected = golden.floats(&format!("norm.{name}"));
            assert_close(&name, &[norm], &expected, 1e-5);
            let first = golden.floats(&format!("first.{name}"));
            let bound = 1e-5 * expected[0].max(1.0);
            assert_close(&name, &part[..first.len()], &first, bound);
        }
    }
}

fn check_whole(name: &str) {
    let golden = Golden::open(name);
    let params = golden.params(&Layout::of(&golden.model()));
    check(&golden, None, &params, |tensor| tensor.name.clone());
}

#[test]
fn packed_samples_have_the_gradients_of_samples_alone() {
    check_whole("sft_llama");
    check_whole("sft_gpt2");
}

#[test]
fn classifiers_agree_with_transformers() {
    check_whole("classify_llama");
    check_whole("classify_gpt2");
}

#[test]
fn adapters_agree_with_peft() {
    for name in ["lora_llama", "lora_gpt2", "rslora_llama", "rslora_gpt2"] {
        let golden = Golden::open(name);
        let model = golden.model();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("golden")
            .join(name);
        let adapter = Adapter::open(&dir, &model).unwrap_or_else(|e| panic!("{name}: {e}"));
        let lora = adapter.lora();
        assert_eq!(lora.rslora, name.starts_with("rslora"), "{name}");
        let layout = Layout::adapted(&model, Some(lora));
        let mut params = vec![0.0; layout.total()];
        for tensor in layout.frozen() {
            let values = golden.floats(&format!("w.{}", tensor.name));
            params[tensor.range()].copy_from_slice(&values);
        }
        let read = adapter.read(&layout, &mut params);
        let read = read.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(read.len(), layout.tensors().len(), "{name}");
        check(&golden, Some(lora), &params, file_name_of);
    }
}
