//! Adapters and classifiers there and back, as `interchange.rs` does it with models: what `peft` saves must give its
//! logits here, and what is exported or merged must be what the engine computes with.

use std::fs;
use std::path::Path;

use cohort_common::checkpoint::{Checkpoint, export, merge, write_checkpoint, write_model};
use cohort_common::spec::LoraConfig;

use super::interchange::{meta, opened, other_side, read_logits, trained, write_logits};
use super::*;

/// Writes what an engine has trained as a checkpoint; `base` is where the weights behind adapters lie.
fn checkpoint(target: &Path, engine: &Engine, lora: Option<&LoraConfig>, base: Option<&Path>) {
    let mut meta = meta(engine.model());
    meta.run.spec.lora = lora.cloned();
    meta.base = base.map(Path::to_owned);
    let moments = vec![0.0; engine.layout().len()];
    write_checkpoint(target, meta, engine.params(), &moments, &moments).expect("a checkpoint");
}

/// Adapters that are not zero on the weights of `base`, and, of a classifier, a head of its own.
fn adapted(base: &Engine, model: &ModelConfig, lora: &LoraConfig) -> Engine {
    let mut engine =
        Engine::adapted(model, Some(lora), None, DeviceChoice::Cpu, 2).expect("an engine");
    let mut params = engine.all_params().to_vec();
    let layout = engine.layout().clone();
    for tensor in layout.tensors() {
        for index in tensor.range() {
            params[index] = 0.2 * libm::sinf(1.7 * index as f32);
        }
    }
    for tensor in layout.frozen() {
        let of_base = base.layout().get(&tensor.name).expect("the base has it");
        params[tensor.range()].copy_from_slice(&base.params()[of_base.range()]);
    }
    engine.load(&params, None).expect("weights");
    engine
}

fn lora(model: &ModelConfig, rslora: bool) -> LoraConfig {
    let targets = cohort_common::spec::linear_modules(model.architecture);
    LoraConfig {
        rank: 3,
        alpha: 5.0,
        dropout: 0.0,
        rslora,
        target_modules: targets.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// Logits of one text, as its tokens and theirs.
fn logits(engine: &mut Engine) -> (Vec<u32>, Vec<f32>) {
    let tokens = batch(engine.model(), 1, 40).inputs;
    let logits = engine.logits(&tokens).expect("logits");
    (tokens, logits)
}

#[test]
fn adapters_are_exported_read_back_and_merged() {
    let temporary = tempfile::tempdir().expect("a directory");
    let root = other_side().unwrap_or(temporary.path().to_owned());
    for (index, model) in models().iter().enumerate() {
        // A classifier's adapters stand on a language model.
        for labels in [0, 3] {
            let base = trained(model);
            let model = ModelConfig {
                labels: ["ham", "spam", "other"][..labels]
                    .iter()
                    .map(|label| (*label).to_owned())
                    .collect(),
                dropout: 0.0,
                ..model.clone()
            };
            let name = format!("{}-{index}-{labels}", model.architecture);
            let at = |place: &str| temporary.path().join(format!("{place}-{name}"));
            let lora = lora(&model, index % 2 == 0);
            checkpoint(&at("base"), &base, None, None);
            let mut engine = adapted(&base, &model, &lora);
            checkpoint(&at("run"), &engine, Some(&lora), Some(&at("base")));
            let (tokens, expected) = logits(&mut engine);

            let target = root.join("exported-adapters").join(&name);
            export(&at("base"), &target.join("base")).expect("an export");
            export(&at("run"), &target.join("adapter")).expect("an export");
            write_logits(&target, &tokens, &expected);
            let run = Checkpoint::open(&at("run")).expect("a checkpoint");
            let mut again = opened(run.clone());
            assert!(again.logits(&tokens).expect("logits") == expected, "{name}");
            // The export of an adapter does not say what a classifier's labels are; its run does.
            let adapter = match labels {
                0 => target.join("adapter"),
                _ => at("run"),
            };
            let put =
                Checkpoint::open(&target.join("base")).and_then(|base| base.with_adapter(&adapter));
            let mut put = opened(put.unwrap_or_else(|e| panic!("{name}: {e}")));
            assert!(put.logits(&tokens).expect("logits") == expected, "{name}");

            let merged = merge(&model, &lora, &run.weights().expect("weights"));
            let place = if labels == 0 {
                "exported"
            } else {
                "exported-classifiers"
            };
            let target = root.join(place).join(format!("merged-{name}"));
            write_model(&target, &run, &merged).expect("a model");
            let mut whole = opened(Checkpoint::open(&target).expect("a model"));
            let (tokens, expected) = logits(&mut whole);
            write_logits(&target, &tokens, &expected);
        }
    }
}

#[test]
fn exported_classifiers_give_the_same_logits() {
    let temporary = tempfile::tempdir().expect("a directory");
    let root = other_side().unwrap_or(temporary.path().to_owned());
    for model in classifiers() {
        let mut engine = trained(&model);
        let from = temporary.path().join(model.architecture.to_string());
        checkpoint(&from, &engine, None, None);
        let target = root
            .join("exported-classifiers")
            .join(model.architecture.to_string());
        export(&from, &target).expect("an export");
        let (tokens, expected) = logits(&mut engine);
        let mut again = opened(Checkpoint::open(&target).expect("an export"));
        assert!(again.logits(&tokens).expect("logits") == expected);
        write_logits(&target, &tokens, &expected);
    }
}

#[test]
fn adapters_that_peft_saved_give_its_logits() {
    let Some(root) = other_side() else {
        eprintln!("skipped: worker/golden/interchange.py runs this");
        return;
    };
    let entries = fs::read_dir(root.join("saved-adapters")).expect("what interchange.py saves");
    for entry in entries {
        let directory = entry.expect("an entry").path();
        let (tokens, expected) = read_logits(&directory);
        let base = Checkpoint::open(&directory.join("base"));
        let put = base.and_then(|base| base.with_adapter(&directory.join("adapter")));
        let mut engine = opened(put.unwrap_or_else(|e| panic!("{}: {e}", directory.display())));
        let logits = engine.logits(&tokens).expect("logits");
        let pairs = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        let largest = pairs.fold(0.0f32, f32::max);
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        println!("saved adapters {name}: largest difference {largest:.1e}");
        assert_eq!(logits.len(), expected.len());
        assert!(largest < 1e-4, "{name}: {largest}");
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_tensor_and_shape() {
    let temporary = tempfile::tempdir().expect("a directory");
    let at = |name: &str| temporary.path().join(name);
    let model = model(Architecture::Llama);
    let lora = lora(&model, false);
    let base = trained(&model);
    checkpoint(&at("base"), &base, None, None);
    let engine = adapted(&base, &model, &lora);
    checkpoint(&at("run"), &engine, Some(&lora), Some(&at("base")));
    let wide = ModelConfig {
        intermediate_size: 80,
        ..model
    };
    checkpoint(&at("wide"), &trained(&wide), None, None);
    let put = |base: &str, adapter: &str| {
        let put = Checkpoint::open(&at(base))
            .expect("a base")
            .with_adapter(&at(adapter));
        put.expect_err("it does not fit").to_string()
    };
    let said = put("wide", "run");
    assert!(
        said.contains("tensor `base_model.model.model.layers.1.mlp.down_proj.lora_A.weight`")
            && said.contains("has the shape [3, 72]")
            && said.contains("[3, 80]"),
        "{said}"
    );
    assert!(put("run", "run").contains("has adapters of its own"));
    assert!(put("base", "wide").contains("holds no adapters"));
    assert!(put("base", "nowhere").contains("no such directory"));
    // A byte that has changed is found before it is believed.
    let file = at("run").join("adapter_model.safetensors");
    let mut bytes = fs::read(&file).expect("the adapters");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(&file, bytes).expect("writable");
    assert!(put("base", "run").contains("is damaged"));
}
