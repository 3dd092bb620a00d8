//! Initial weights, and that training learns.

use super::*;
use cohort_common::tree::Node;

use crate::engine::Update;

#[test]
fn initial_weights_depend_on_seed_and_name_alone() {
    for model in models() {
        let (mut a, b) = (engine(&model, 1), engine(&model, 3));
        assert_eq!(a.state_hash(), b.state_hash());
        let before = a.state_hash();
        a.init(8).expect("initial weights");
        assert_ne!(before, a.state_hash());
    }
}

#[test]
fn initial_weights_have_the_right_spread() {
    let model = ModelConfig {
        initializer_range: 0.02,
        labels: Vec::new(),
        ..model(Architecture::Gpt2)
    };
    let engine = engine(&model, 2);
    for tensor in engine.layout().tensors() {
        let values = &engine.params()[tensor.range()];
        let square =
            values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / values.len() as f64;
        let expected = match tensor.name.as_str() {
            name if name.ends_with(".bias") => 0.0,
            name if name.contains("ln_") => 1.0,
            name if name.ends_with("c_proj.weight") => 0.02 / (2.0 * 2.0f64).sqrt(),
            _ => 0.02,
        };
        assert!(
            (square.sqrt() - expected).abs() <= 0.1 * expected,
            "{}: {}",
            tensor.name,
            square.sqrt()
        );
    }
}

#[test]
fn both_paths_learn_a_batch_by_heart() {
    for architecture in [Architecture::Llama, Architecture::Gpt2] {
        let model = ModelConfig {
            initializer_range: 0.02,
            labels: Vec::new(),
            ..model(architecture)
        };
        let batch = batch(&model, 3, 16);
        for mut engine in [engine(&model, 2), composite(&model)] {
            let mut losses = Vec::new();
            for step in 1..=40 {
                let mut gradient = Gradient::default();
                let sums = engine
                    .accumulate(&batch, Site { step, ..SITE }, &mut gradient)
                    .expect("a gradient");
                losses.push(sums.loss / sums.weight);
                let update = Update {
                    step,
                    count: step,
                    scale: 1.0 / sums.weight,
                    learning_rate: 1e-2,
                };
                engine.update(&gradient, update).expect("an update");
            }
            assert!((losses[0] - 83f64.ln()).abs() < 0.2, "{}", losses[0]);
            assert!(losses[39] < 0.5 * losses[0], "{} {}", losses[0], losses[39]);
        }
    }
}

#[test]
fn a_loaded_state_goes_on_to_the_bit() {
    let model = model(Architecture::Llama);
    let batch = batch(&model, 2, 16);
    let step = |engine: &mut Engine, step| {
        let mut gradient = Gradient::default();
        engine
            .accumulate(&batch, Site { step, ..SITE }, &mut gradient)
            .expect("a gradient");
        engine
            .update(
                &gradient,
                Update {
                    step,
                    count: step,
                    scale: 0.1,
                    learning_rate: 1e-3,
                },
            )
            .expect("an update");
    };
    let mut first = engine(&model, 2);
    step(&mut first, 1);
    let state = first.snapshot();
    let mut second = Engine::new(&model, Some(&train()), DeviceChoice::Cpu, 1).expect("an engine");
    second
        .load(&state.params, Some((&state.exp_avg, &state.exp_avg_sq)))
        .expect("a state");
    assert_eq!(first.state_hash(), second.state_hash());
    step(&mut first, 2);
    step(&mut second, 2);
    assert_eq!(first.state_hash(), second.state_hash());
    assert_ne!(first.snapshot(), state);
}

#[test]
fn a_step_that_was_skipped_leaves_no_trace() {
    for model in models() {
        let batch = batch(&model, 2, 16);
        let site = Site { step: 1, ..SITE };
        let node = Node::leaf(SITE.lane);
        // Updates are counted, steps are not: the bias correction is that of the second update.
        let trained = |steps: [u64; 2], buffer: Vec<f32>| {
            let mut buffer = Gradient::from(buffer);
            let mut engine = engine(&model, 2);
            for (step, count) in steps.into_iter().zip(1..) {
                engine
                    .gradient(node, &[(&batch, site)], &mut buffer)
                    .expect("a gradient");
                let update = Update {
                    step,
                    count,
                    scale: 0.1,
                    learning_rate: 1e-3,
                };
                engine.update(&buffer, update).expect("an update");
            }
            engine.state_hash()
        };
        let plain = trained([1, 2], Vec::new());
        assert_eq!(plain, trained([1, 3], Vec::new()));
        // Nor does what a gradient that was not finite left in a buffer.
        let len = engine(&model, 1).layout().len();
        assert_eq!(plain, trained([1, 2], vec![f32::NAN; len]));
    }
}

#[test]
fn frozen_layers_stay_and_lower_layers_learn_slower() {
    for model in models() {
        let batch = batch(&model, 2, 16);
        let moved = |train: &TrainConfig| {
            let engine = Engine::new(&model, Some(train), DeviceChoice::Cpu, 1);
            let mut engine = engine.expect("an engine");
            engine.init(7).expect("initial weights");
            let before = engine.params().to_vec();
            let mut grad = Gradient::default();
            let site = Site { step: 1, ..SITE };
            engine
                .accumulate(&batch, site, &mut grad)
                .expect("a gradient");
            let update = Update {
                step: 1,
                count: 1,
                scale: 0.1,
                learning_rate: 1e-3,
            };
            engine.update(&grad, update).expect("an update");
            let moved = |block: usize| {
                let of = |name: &str| {
                    name.contains(&format!("layers.{block}."))
                        || name.contains(&format!("h.{block}."))
                };
                let tensors = engine.layout().tensors().iter().filter(|t| of(&t.name));
                let ranges = tensors.flat_map(|t| t.range());
                ranges
                    .map(|i| f64::from(engine.params()[i] - before[i]).abs())
                    .sum::<f64>()
            };
            [moved(0), moved(1)]
        };
        let plain = train();
        let both = moved(&plain);
        let frozen = moved(&TrainConfig {
            freeze_layers: Some(1),
            ..plain.clone()
        });
        assert_eq!(frozen[0], 0.0);
        assert_eq!(frozen[1], both[1]);
        let decayed = moved(&TrainConfig {
            layer_decay: Some(0.5),
            ..plain.clone()
        });
        let ratios = [decayed[0] / both[0], decayed[1] / both[1]];
        assert!((ratios[0] - 0.25).abs() < 0.01, "{ratios:?}");
        assert!((ratios[1] - 0.5).abs() < 0.01, "{ratios:?}");
    }
}
