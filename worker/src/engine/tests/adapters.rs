//! Adapters: the two paths against each other, finite differences, threads, lanes that share a pass, merged weights.

use cohort_common::checkpoint::{Loaded, merge};
use cohort_common::layout::Layout;
use cohort_common::spec::LoraConfig;
use cohort_common::tree::Node;

use super::*;

fn lora(architecture: Architecture, dropout: f32) -> LoraConfig {
    let targets: &[&str] = match architecture {
        Architecture::Llama => &["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        Architecture::Gpt2 => &["c_attn", "c_proj", "c_fc"],
    };
    LoraConfig {
        rank: 3,
        alpha: 5.0,
        dropout,
        rslora: dropout > 0.0,
        target_modules: targets.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// Adapters on each kind of model, with and without dropout of their own.
fn cases() -> Vec<(ModelConfig, LoraConfig)> {
    let all = models().into_iter().chain(classifiers());
    let with = |(index, model): (usize, ModelConfig)| {
        let dropout = if index % 2 == 0 { 0.0 } else { 0.2 };
        let lora = lora(model.architecture, dropout);
        (model, lora)
    };
    all.enumerate().map(with).collect()
}

/// An engine with a random model and random adapters behind no zeros.
fn adapted(model: &ModelConfig, lora: &LoraConfig, threads: usize, plain: bool) -> Engine {
    let device = candle_core::Device::Cpu;
    let shape = (model, Some(lora));
    let engine = Engine::with_path(shape, Some(&train()), device, threads, plain);
    let mut engine = engine.expect("an engine");
    let params = params(model, engine.layout());
    engine.load(&params, None).expect("weights");
    engine
}

fn params(model: &ModelConfig, layout: &Layout) -> Vec<f32> {
    let base = engine(model, 1);
    let mut params = vec![0.0; layout.total()];
    for (index, tensor) in layout.tensors().iter().chain(layout.frozen()).enumerate() {
        let values = &mut params[tensor.range()];
        match base.layout().get(&tensor.name) {
            Some(of_base) => values.copy_from_slice(&base.params()[of_base.range()]),
            None => values.iter_mut().enumerate().for_each(|(i, value)| {
                let word = philox(13, [i as u32, index as u32, 0, 0])[0];
                *value = (word >> 8) as f32 / 16_777_216.0 * 0.4 - 0.2;
            }),
        }
    }
    params
}

#[test]
fn the_paths_agree_and_only_adapters_have_gradients() {
    for (model, lora) in cases() {
        let batch = packed(&model, 3, 23);
        let (mut fused, mut plain) = (
            adapted(&model, &lora, 2, false),
            adapted(&model, &lora, 2, true),
        );
        let ((loss, a), (plain_loss, b)) =
            (gradient(&mut fused, &batch), gradient(&mut plain, &batch));
        assert!(
            (loss / plain_loss - 1.0).abs() < 1e-5,
            "{loss} {plain_loss}"
        );
        assert_eq!(a.len(), fused.layout().len());
        assert!(a.len() < fused.layout().total());
        for tensor in fused.layout().tensors() {
            let (a, b) = (&a[tensor.range()], &b[tensor.range()]);
            let norm = b.iter().map(|x| x * x).sum::<f32>().sqrt();
            let apart = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
            assert!(norm > 0.0, "{}", tensor.name);
            assert!(apart.sum::<f32>().sqrt() <= 2e-5 * norm, "{}", tensor.name);
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for (model, lora) in cases() {
        let mut engine = adapted(&model, &lora, 2, false);
        let batch = batch(&model, 2, 19);
        let (_, gradient) = gradient(&mut engine, &batch);
        let params = engine.all_params().to_vec();
        for tensor in engine.layout().clone().tensors() {
            let by_size = |&a: &usize, &b: &usize| gradient[a].abs().total_cmp(&gradient[b].abs());
            let index = tensor.range().max_by(by_size).expect("an element");
            let mut loss = |delta: f32| {
                let mut moved = params.clone();
                moved[index] += delta;
                engine.load(&moved, None).expect("weights");
                let sums = engine.accumulate(&batch, SITE, &mut Gradient::default());
                sums.expect("a loss").loss
            };
            let step = 2e-3;
            let expected = (loss(step) - loss(-step)) / f64::from(2.0 * step);
            let got = f64::from(gradient[index]);
            let bound = 0.02 * (0.1 + expected.abs());
            assert!(
                (got - expected).abs() < bound,
                "{}: {got} {expected}",
                tensor.name
            );
        }
    }
}

#[test]
fn what_is_complete_early_changes_no_more() {
    for (model, lora) in cases() {
        let mut engine = adapted(&model, &lora, 2, false);
        complete_early(&mut engine, &batch(&model, 2, 16));
    }
}

#[test]
fn neither_threads_nor_company_change_a_bit() {
    for (model, lora) in cases() {
        let batches: Vec<Batch> = (0..3)
            .map(|lane| {
                let mut batch = packed(&model, 2, 21);
                let vocab = model.vocab_size as u32;
                let turn = |t: &mut u32| *t = (*t * 7 + lane) % vocab;
                batch.inputs.iter_mut().for_each(turn);
                batch
            })
            .collect();
        let run = |threads: usize| {
            let mut engine = adapted(&model, &lora, threads, false);
            let lane = |lane: u32| (&batches[lane as usize], Site { lane, ..SITE });
            let mut together = Gradient::default();
            let node = Node { first: 0, size: 3 };
            let lanes: Vec<_> = node.lanes().map(lane).collect();
            engine
                .gradient(node, &lanes, &mut together)
                .expect("a gradient");
            let alone = node.lanes().map(|at| {
                let mut gradient = Gradient::default();
                let one = engine.gradient(Node::leaf(at), &[lane(at)], &mut gradient);
                one.expect("a gradient");
                gradient.to_vec()
            });
            let [a, b, c]: [Vec<f32>; 3] = alone.collect::<Vec<_>>().try_into().expect("three");
            let sum = |i: usize| (a[i] + b[i]) + c[i];
            assert!((0..a.len()).all(|i| sum(i) == together[i]), "{model:?}");
            together.to_vec()
        };
        assert!(run(1) == run(2));
    }
}

#[test]
fn an_update_leaves_the_model_behind_the_adapters_alone() {
    let (model, lora) = cases().remove(1);
    let mut engine = adapted(&model, &lora, 2, false);
    let before = engine.all_params().to_vec();
    let (_, gradient) = gradient(&mut engine, &batch(&model, 2, 19));
    let update = first_update(0.1, 1e-2);
    engine.update(&gradient, update).expect("an update");
    let trained = engine.layout().len();
    assert_eq!(engine.all_params()[trained..], before[trained..]);
    assert_ne!(engine.params(), &before[..trained]);
    assert_eq!(engine.snapshot().params.len(), trained);
}

#[test]
fn merged_weights_give_the_logits_of_base_and_adapters() {
    for (model, lora) in cases() {
        let mut apart = adapted(&model, &lora, 2, false);
        let loaded = Loaded {
            layout: apart.layout().clone(),
            params: apart.all_params().to_vec(),
            missing: Vec::new(),
        };
        let mut together = Engine::new(&model, None, DeviceChoice::Cpu, 2).expect("an engine");
        let merged = merge(&model, &lora, &loaded);
        together.load(&merged, None).expect("weights");
        let mut base = engine(&model, 2);
        let tokens = batch(&model, 1, 40).inputs;
        let logits = |engine: &mut Engine| engine.logits(&tokens).expect("logits");
        let (a, b, base) = (logits(&mut apart), logits(&mut together), logits(&mut base));
        let largest = a.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let furthest = |b: &[f32]| {
            let pairs = a.iter().zip(b).map(|(a, b)| (a - b).abs());
            pairs.fold(0.0, f32::max) / largest
        };
        assert!(furthest(&b) < 1e-5, "{model:?}: {}", furthest(&b));
        assert!(furthest(&base) > 1e-2, "{model:?}: {}", furthest(&base));
    }
}
