//! The two paths against each other, every parameter's gradient, finite differences, threads, generation.

use cohort_common::tree::Node;

use super::*;
use crate::engine::{EngineError, Sampling, Sums, generate};

#[test]
fn the_fused_path_agrees_with_the_composite_path_dropout_included() {
    let all = models().into_iter().chain(classifiers());
    for (model, cut) in all.flat_map(|model| [(model.clone(), false), (model, true)]) {
        let batch = if cut { packed } else { batch }(&model, 3, 41);
        let (mut fused, mut plain) = (engine(&model, 2), composite(&model));
        let (a, b) = (
            fused.logits(&batch.inputs[..41]),
            plain.logits(&batch.inputs[..41]),
        );
        for (a, b) in a.expect("logits").iter().zip(&b.expect("logits")) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
        let ((loss, gradient_a), (plain_loss, gradient_b)) =
            (gradient(&mut fused, &batch), gradient(&mut plain, &batch));
        assert!(
            (loss / plain_loss - 1.0).abs() < 1e-5,
            "{loss} {plain_loss}"
        );
        for tensor in fused.layout().tensors() {
            let (a, b) = (&gradient_a[tensor.range()], &gradient_b[tensor.range()]);
            let norm = b.iter().map(|x| x * x).sum::<f32>().sqrt();
            let apart = a
                .iter()
                .zip(b)
                .map(|(a, b)| (a - b).powi(2))
                .sum::<f32>()
                .sqrt();
            assert!(apart <= 2e-5 * norm, "{}: {apart} of {norm}", tensor.name);
        }
    }
}

#[test]
fn every_parameter_has_a_gradient() {
    for model in models().into_iter().chain(classifiers()) {
        for mut engine in [engine(&model, 2), composite(&model)] {
            let (_, gradient) = gradient(&mut engine, &batch(&model, 4, model.context));
            for tensor in engine.layout().tensors() {
                let part = &gradient[tensor.range()];
                let zeros = part.iter().filter(|x| **x == 0.0).count();
                // Rows of tokens that do not occur have none in an untied embedding.
                let untied = model.classifies() && tensor.name.contains("wte");
                let bound = if untied || tensor.name.contains("embed_tokens") {
                    part.len() / 2
                } else {
                    part.len() / 50
                };
                assert!(
                    zeros <= bound,
                    "{}: {zeros} of {} are zero",
                    tensor.name,
                    part.len()
                );
            }
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for model in models().into_iter().chain(classifiers()) {
        let mut engine = engine(&model, 2);
        let batch = packed(&model, 2, 19);
        let (_, gradient) = gradient(&mut engine, &batch);
        let params = engine.params().to_vec();
        for tensor in engine.layout().clone().tensors() {
            // The element with the largest gradient: there the difference is best conditioned.
            let largest = tensor
                .range()
                .max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs()));
            let index = largest.expect("an element");
            let mut loss = |delta: f32| {
                let mut moved = params.clone();
                moved[index] += delta;
                engine.load(&moved, None).expect("weights");
                engine
                    .accumulate(&batch, SITE, &mut Gradient::default())
                    .expect("a loss")
                    .loss
            };
            let step = 2e-3;
            let expected = (loss(step) - loss(-step)) / f64::from(2.0 * step);
            let got = f64::from(gradient[index]);
            assert!(
                (got - expected).abs() < 0.02 * (0.1 + expected.abs()),
                "{}: {got} {expected}",
                tensor.name
            );
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for model in models() {
        let wide = ModelConfig {
            hidden_size: 96,
            intermediate_size: 260,
            vocab_size: 301,
            ..model
        };
        let batch = packed(&wide, 5, 37);
        let run = |threads| {
            let mut engine = engine(&wide, threads);
            let result = gradient(&mut engine, &batch);
            let scale = 1.0 / 50.0;
            let update = first_update(scale, 1e-3);
            engine.update(&result.1, update).expect("an update");
            (
                result,
                engine.score(&batch).expect("a score"),
                engine.state_hash(),
            )
        };
        let one = run(1);
        for threads in [2, 3, 5] {
            assert!(one == run(threads), "{threads} threads");
        }
    }
}

#[test]
fn activations_that_are_computed_again_have_the_same_bits() {
    for model in models().into_iter().chain(classifiers()) {
        // Masks are drawn again, too.
        let dropout = match model.architecture {
            Architecture::Gpt2 => 0.2,
            Architecture::Llama => 0.0,
        };
        let model = ModelConfig { dropout, ..model };
        let again = TrainConfig {
            gradient_checkpointing: true,
            ..train()
        };
        let mut again = Engine::new(&model, Some(&again), DeviceChoice::Cpu, 2).expect("an engine");
        again.init(7).expect("initial weights");
        let mut kept = engine(&model, 2);
        // The second time in buffers that were used before.
        for batch in [batch(&model, 3, 19), packed(&model, 3, 19)] {
            assert!(
                gradient(&mut again, &batch) == gradient(&mut kept, &batch),
                "{model:?}"
            );
        }
    }
}

#[test]
fn layers_that_stay_frozen_have_no_gradient_and_the_others_the_one_they_have_anyhow() {
    for model in models() {
        let frozen = TrainConfig {
            freeze_layers: Some(1),
            ..train()
        };
        let device = candle_core::Device::Cpu;
        let with_path = |composite: bool| {
            let shape = (&model, None);
            let engine = Engine::with_path(shape, Some(&frozen), device.clone(), 2, composite);
            let mut engine = engine.expect("an engine");
            engine.init(7).expect("initial weights");
            engine
        };
        for (mut part, mut whole) in [
            (with_path(false), engine(&model, 2)),
            (with_path(true), composite(&model)),
        ] {
            let batch = packed(&model, 3, 19);
            let ((loss, gradient), (expected, of_all)) =
                (gradient(&mut part, &batch), gradient(&mut whole, &batch));
            assert_eq!(loss, expected);
            assert!(gradient == of_all[..gradient.len()]);
            let tensors = part.layout().tensors().iter();
            let without: Vec<_> = tensors.filter(|t| t.offset >= gradient.len()).collect();
            let is_low = |name: &str| {
                ["layers.0.", "h.0.", "embed", "wte", "wpe"]
                    .iter()
                    .any(|low| name.contains(low))
            };
            assert!(
                !without.is_empty() && without.iter().all(|t| is_low(&t.name)),
                "{without:?}"
            );
            let before = part.params().to_vec();
            let update = first_update(0.1, 1e-3);
            part.update(&gradient, update).expect("an update");
            let (learned, still) = part.params().split_at(gradient.len());
            assert!(still == &before[gradient.len()..] && learned != &before[..gradient.len()]);
        }
    }
}

#[test]
fn gradients_add_up_over_micro_batches() {
    let model = model(Architecture::Llama);
    let mut engine = engine(&model, 2);
    let batch = batch(&model, 2, 16);
    let (_, once) = gradient(&mut engine, &batch);
    let mut twice = Gradient::from(once.clone());
    engine
        .accumulate(&batch, SITE, &mut twice)
        .expect("a gradient");
    assert!(
        once.iter()
            .zip(twice.iter())
            .all(|(a, b)| (2.0 * a - b).abs() <= 1e-4 * (1.0 + a.abs()))
    );
}

#[test]
fn lanes_that_share_a_pass_have_the_bits_of_lanes_alone() {
    for model in models().into_iter().chain(classifiers()) {
        let engine = &mut engine(&model, 2);
        let batches: Vec<Batch> = (0..5)
            .map(|lane| {
                let cut = lane % 2 == 1;
                let mut batch = if cut { packed } else { batch }(&model, 2, 21);
                let vocab = model.vocab_size as u32;
                batch
                    .inputs
                    .iter_mut()
                    .for_each(|t| *t = (*t * 7 + lane) % vocab);
                batch
            })
            .collect();
        let lane = |lane: u32| (&batches[lane as usize], Site { lane, ..SITE });
        fn sum(engine: &mut Engine, node: Node, batches: &[Batch]) -> Vec<f32> {
            let Some((left, right)) = node.children() else {
                let lane = node.first;
                let mut gradient = Gradient::default();
                let alone = [(&batches[lane as usize], Site { lane, ..SITE })];
                engine
                    .gradient(node, &alone, &mut gradient)
                    .expect("a gradient");
                return gradient.to_vec();
            };
            let mut total = sum(engine, left, batches);
            let other = sum(engine, right, batches);
            total.iter_mut().zip(other).for_each(|(a, b)| *a += b);
            total
        }
        for node in [Node { first: 0, size: 5 }, Node { first: 2, size: 2 }] {
            let together: Vec<_> = node.lanes().map(lane).collect();
            let mut shared = Gradient::from(vec![f32::NAN; 3]);
            let sums = engine
                .gradient(node, &together, &mut shared)
                .expect("a gradient");
            let alone = sum(engine, node, &batches);
            assert!(shared[..] == alone, "{node} of {model:?}");
            for (at, sums) in node.lanes().zip(sums) {
                let mut gradient = Gradient::default();
                let single = engine.gradient(Node::leaf(at), &[lane(at)], &mut gradient);
                assert_eq!(single.expect("a gradient"), [sums]);
            }
        }
    }
}

#[test]
fn what_is_complete_early_changes_no_more() {
    for model in models().into_iter().chain(classifiers()) {
        complete_early(&mut engine(&model, 2), &batch(&model, 2, 16));
    }
}

#[test]
fn packed_samples_train_as_if_they_were_alone() {
    let lengths = [7, 1, 20, 13];
    let length: usize = lengths.iter().sum();
    for model in models().into_iter().chain(classifiers()) {
        // Masks are drawn by place, and places differ.
        if model.dropout > 0.0 {
            continue;
        }
        let mut engine = engine(&model, 2);
        let mut whole = batch(&model, 1, length);
        let (mut loss, mut expected) = (0.0, Gradient::default());
        let mut first = 0;
        for size in lengths {
            let own = first..first + size;
            let starts = std::iter::repeat_n(first as u32, size);
            whole.starts.extend(starts);
            let alone = Batch {
                inputs: whole.inputs[own.clone()].to_vec(),
                targets: whole.targets[own.clone()].to_vec(),
                weights: whole.weights[own].to_vec(),
                starts: Vec::new(),
                samples: 1,
                length: size,
            };
            let sums = engine.accumulate(&alone, SITE, &mut expected);
            loss += sums.expect("a loss").loss;
            first += size;
        }
        let (packed, gradient) = gradient(&mut engine, &whole);
        assert!((packed / loss - 1.0).abs() < 1e-6, "{packed} {loss}");
        let apart = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
        let apart: f64 = gradient.iter().zip(expected.iter()).map(apart).sum();
        let norm: f64 = expected.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!(apart.sqrt() < 1e-5 * norm.sqrt(), "{apart} {norm}");
    }
}

#[test]
fn dropout_depends_on_the_site_and_scoring_has_none() {
    let model = ModelConfig {
        dropout: 0.3,
        ..model(Architecture::Gpt2)
    };
    let mut engine = engine(&model, 2);
    let batch = batch(&model, 2, 16);
    let mut loss = |site| {
        engine
            .accumulate(&batch, site, &mut Gradient::default())
            .expect("a loss")
            .loss
    };
    assert_eq!(loss(SITE), loss(SITE));
    assert_ne!(loss(SITE), loss(Site { lane: 2, ..SITE }));
    let score = engine.score(&batch).expect("a score");
    assert_eq!(score, engine.score(&batch).expect("a score"));
}

#[test]
fn unscored_tokens_have_no_say() {
    let model = model(Architecture::Llama);
    let mut engine = engine(&model, 2);
    let mut batch = batch(&model, 2, 16);
    let before = gradient(&mut engine, &batch);
    for (target, weight) in batch.targets.iter_mut().zip(&batch.weights) {
        if *weight == 0.0 {
            *target = u32::MAX;
        }
    }
    assert!(before == gradient(&mut engine, &batch));
    batch.weights.fill(0.0);
    let (loss, gradient) = gradient(&mut engine, &batch);
    assert_eq!(loss, 0.0);
    assert!(gradient.iter().all(|x| *x == 0.0));
    assert_eq!(engine.score(&batch).expect("a score").sums, Sums::default());
}

#[test]
fn generating_with_the_cache_equals_generating_without() {
    for model in models() {
        let mut engine = engine(&model, 2);
        let prompt = [3, 1, 4, 1, 5];
        let sampling = Sampling {
            max_tokens: 40,
            temperature: 0.0,
            top_k: None,
            top_p: None,
            seed: 0,
        };
        let mut seen = Vec::new();
        let text = generate(&mut engine, &prompt, &sampling, None, &mut |token| {
            seen.push(token);
            true
        });
        let text = text.expect("a text");
        assert_eq!(text, seen);
        let mut whole = prompt.to_vec();
        for token in text {
            let logits = engine.logits(&whole).expect("logits");
            let last = &logits[logits.len() - model.vocab_size..];
            let best = (0..last.len())
                .max_by(|&a, &b| last[a].total_cmp(&last[b]))
                .expect("a token");
            assert_eq!(best as u32, token);
            whole.push(token);
        }
    }
}

#[test]
fn generation_stops_where_it_is_told_and_goes_beyond_the_context() {
    let model = model(Architecture::Gpt2);
    let mut engine = engine(&model, 2);
    let long = Sampling {
        max_tokens: 130,
        temperature: 1.0,
        top_k: Some(50),
        top_p: Some(0.95),
        seed: 3,
    };
    let text = generate(&mut engine, &[1], &long, None, &mut |_| true).expect("a text");
    assert_eq!(text.len(), 130);
    assert_eq!(
        text,
        generate(&mut engine, &[1], &long, None, &mut |_| true).expect("a text")
    );
    let end = text[20];
    let first = text
        .iter()
        .position(|&token| token == end)
        .expect("the token");
    let stopped = generate(&mut engine, &[1], &long, Some(end), &mut |_| true).expect("a text");
    assert_eq!(stopped, text[..first]);
    let mut left = 5;
    let short = generate(&mut engine, &[1], &long, None, &mut |_| {
        left -= 1;
        left > 0
    });
    assert_eq!(short.expect("a text"), text[..5]);
}

#[test]
fn bad_requests_are_refused_before_anything_changes() {
    let model = model(Architecture::Llama);
    let mut engine = engine(&model, 1);
    let good = batch(&model, 2, 8);
    let state = engine.snapshot();
    let mut refused = |batch: &Batch| {
        let mut grad = Gradient::default();
        let error = engine
            .accumulate(batch, SITE, &mut grad)
            .expect_err("a refusal")
            .to_string();
        assert!(grad.is_empty());
        error
    };
    assert_eq!(
        refused(&Batch {
            inputs: vec![83; 16],
            ..good.clone()
        }),
        "bad batch: token 83 is outside the vocabulary of 83"
    );
    assert_eq!(
        refused(&Batch {
            samples: 3,
            ..good.clone()
        }),
        "bad batch: 3 samples of 8 tokens need 24 elements, got 16 inputs, 16 targets and 16 weights"
    );
    assert_eq!(
        refused(&Batch { length: 49, ..good }),
        "bad batch: 2 samples of 49 tokens for a context of 48"
    );
    let update = first_update(1.0, 1.0);
    assert!(matches!(
        engine.update(&[0.0; 3], update),
        Err(EngineError::Length { got: 3, .. })
    ));
    assert_eq!(engine.snapshot(), state);
    let mut inference = Engine::new(&model, None, DeviceChoice::Cpu, 1).expect("an engine");
    let root = vec![0.0; inference.layout().len()];
    assert!(matches!(
        inference.update(&root, update),
        Err(EngineError::InferenceOnly)
    ));
}

#[test]
fn the_fingerprint_is_the_same_for_every_number_of_threads() {
    let model = model(Architecture::Llama);
    let (a, b) = (
        engine(&model, 1).fingerprint(),
        engine(&model, 3).fingerprint(),
    );
    assert_eq!(a, b);
    assert!(a.starts_with("cohort-") && a.contains(" cpu "), "{a}");
}

#[test]
fn an_engine_may_move_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Engine>();
}
