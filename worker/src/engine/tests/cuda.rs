//! The GPU against the fused path, and against itself. Without a GPU there is nothing to compare: the tests say so and
//! pass, unless `COHORT_DEMAND_GPU` is set.

use cohort_common::spec::{LoraConfig, Precision};
use cohort_common::tree::Node;

use super::*;

/// An engine on the first GPU with the initial weights of [`engine`], if there is one.
fn on_gpu(model: &ModelConfig, precision: Precision) -> Option<Engine> {
    let train = TrainConfig {
        precision,
        ..train()
    };
    match Engine::new(model, Some(&train), DeviceChoice::Cuda(0), 2) {
        Ok(mut engine) => {
            engine.init(7).expect("initial weights");
            Some(engine)
        }
        Err(error) if std::env::var_os("COHORT_DEMAND_GPU").is_none() => {
            eprintln!("not checked, as there is no GPU: {error}");
            None
        }
        Err(error) => panic!("no GPU: {error}"),
    }
}

/// Every kind of model, and shapes that are wider than a block of threads.
fn shapes() -> Vec<(ModelConfig, usize)> {
    let wide = |architecture| ModelConfig {
        vocab_size: 1031,
        context: 300,
        hidden_size: 320,
        intermediate_size: 840,
        num_attention_heads: 5,
        num_key_value_heads: 5,
        ..model(architecture)
    };
    let small = models().into_iter().chain(classifiers());
    small
        .map(|model| (model, 41))
        .chain([
            (wide(Architecture::Llama), 290),
            (wide(Architecture::Gpt2), 300),
        ])
        .collect()
}

/// ‖a - b‖ / ‖b‖.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        let pairs = a.iter().zip(b);
        pairs.map(|(&a, &b)| of(a.into(), b.into())).sum()
    };
    (sum(&|a, b| (a - b).powi(2)) / sum(&|_, b| b * b)).sqrt()
}

fn assert_close(layout: &cohort_common::layout::Layout, a: &[f32], b: &[f32], bound: f64) {
    for tensor in layout.tensors() {
        let off = apart(&a[tensor.range()], &b[tensor.range()]);
        assert!(off <= bound, "{}: {off:e}", tensor.name);
    }
}

#[test]
fn the_gpu_agrees_with_the_fused_path() {
    for ((model, length), cut) in shapes()
        .into_iter()
        .flat_map(|shape| [(shape.clone(), false), (shape, true)])
    {
        let Some(mut gpu) = on_gpu(&model, Precision::F32) else {
            return;
        };
        let mut cpu = engine(&model, 2);
        let batch = if cut { packed } else { batch }(&model, 3, length);
        let logits = |engine: &mut Engine| engine.logits(&batch.inputs[..length]).expect("logits");
        assert!(apart(&logits(&mut gpu), &logits(&mut cpu)) < 2e-5);
        let ((loss, a), (expected, b)) = (gradient(&mut gpu, &batch), gradient(&mut cpu, &batch));
        assert!((loss / expected - 1.0).abs() < 1e-5, "{loss} {expected}");
        assert_close(cpu.layout(), &a, &b, 5e-5);
        let (a, b) = (gpu.score(&batch), cpu.score(&batch));
        let (a, b) = (a.expect("a score"), b.expect("a score"));
        assert!((a.sums.loss / b.sums.loss - 1.0).abs() < 1e-5);
        assert_eq!(a.confusion, b.confusion);
    }
}

#[test]
fn the_gpu_has_the_same_bits_each_time() {
    for precision in [Precision::F32, Precision::Bf16] {
        for (model, length) in shapes() {
            let batch = packed(&model, 3, length);
            let results = [0, 1, 2].map(|_| {
                let mut engine = on_gpu(&model, precision)?;
                let (loss, found) = gradient(&mut engine, &batch);
                let again = gradient(&mut engine, &batch);
                assert!((loss, found) == again, "{}", model.architecture);
                let update = first_update(0.02, 1e-3);
                engine.update(&again.1, update).expect("an update");
                Some((again, gradient(&mut engine, &batch), engine.state_hash()))
            });
            assert!(results[0] == results[1] && results[1] == results[2]);
        }
    }
}

#[test]
fn lanes_that_the_gpu_adds_up_have_the_bits_of_lanes_added_here() {
    let model = model(Architecture::Llama);
    let Some(mut engine) = on_gpu(&model, Precision::F32) else {
        return;
    };
    let batches: Vec<Batch> = [37, 41, 43, 47, 48]
        .map(|length| batch(&model, 2, length))
        .into_iter()
        .map(|batch| Batch {
            length: 37,
            inputs: batch.inputs[..74].to_vec(),
            targets: batch.targets[..74].to_vec(),
            weights: batch.weights[..74].to_vec(),
            ..batch
        })
        .collect();
    let lanes: Vec<_> = (0..5)
        .map(|lane| (&batches[lane as usize], Site { lane, ..SITE }))
        .collect();
    let root = Node { first: 0, size: 5 };
    assert!(engine.shares(74, 5));
    let mut together = Gradient::default();
    let sums = engine.gradient(root, &lanes, &mut together).expect("a sum");
    let mut alone = |node: Node| {
        let lanes = &lanes[node.first as usize..][..1];
        let mut gradient = Gradient::default();
        let found = engine.gradient(node, lanes, &mut gradient);
        assert_eq!(found.expect("a gradient")[0], sums[node.first as usize]);
        gradient.to_vec()
    };
    fn sum(node: Node, alone: &mut dyn FnMut(Node) -> Vec<f32>) -> Vec<f32> {
        let Some((left, right)) = node.children() else {
            return alone(node);
        };
        let (mut left, right) = (sum(left, alone), sum(right, alone));
        cohort_common::aggregate::add_all(&mut left, &right);
        left
    }
    assert!(together[..] == sum(root, &mut alone));
}

#[test]
fn bf16_on_the_gpu_is_as_near_to_f32_as_on_the_cpu() {
    for (model, length) in shapes() {
        let batch = batch(&model, 3, length);
        let Some(mut on_gpu) = on_gpu(&model, Precision::Bf16) else {
            return;
        };
        let train = TrainConfig {
            precision: Precision::Bf16,
            ..train()
        };
        let on_cpu = Engine::new(&model, Some(&train), DeviceChoice::Cpu, 2);
        let mut on_cpu = on_cpu.expect("an engine");
        on_cpu.init(7).expect("initial weights");
        let [gpu, cpu, exact] = [&mut on_gpu, &mut on_cpu, &mut engine(&model, 2)]
            .map(|engine| gradient(engine, &batch));
        assert!((gpu.0 / cpu.0 - 1.0).abs() < 1e-2, "{} {}", gpu.0, cpu.0);
        let [off, bound] = [&gpu, &cpu].map(|found| apart(&found.1, &exact.1));
        assert!(off > bound / 4.0 && off < bound * 2.0, "{off} {bound}");
    }
}

#[test]
fn adapters_on_the_gpu_agree_with_the_fused_path() {
    for (model, _) in shapes() {
        let name = match model.architecture {
            Architecture::Llama => "q_proj",
            Architecture::Gpt2 => "c_attn",
        };
        let lora = LoraConfig {
            rank: 3,
            alpha: 5.0,
            dropout: 0.2,
            rslora: true,
            target_modules: vec![name.into()],
        };
        let make = |device| Engine::adapted(&model, Some(&lora), Some(&train()), device, 2);
        if on_gpu(&model, Precision::F32).is_none() {
            return;
        }
        let (mut gpu, mut cpu) = (
            make(DeviceChoice::Cuda(0)).expect("an engine"),
            make(DeviceChoice::Cpu).expect("an engine"),
        );
        let value = |i: usize| (philox(13, [i as u32, 0, 0, 0])[0] >> 8) as f32 / 4e7 - 0.2;
        let params: Vec<f32> = (0..cpu.layout().total()).map(value).collect();
        for engine in [&mut gpu, &mut cpu] {
            engine.load(&params, None).expect("weights");
        }
        let batch = packed(&model, 3, 41);
        let ((loss, a), (expected, b)) = (gradient(&mut gpu, &batch), gradient(&mut cpu, &batch));
        assert!((loss / expected - 1.0).abs() < 1e-5, "{loss} {expected}");
        assert_close(cpu.layout(), &a, &b, 1e-4);
    }
}

#[test]
fn a_gpus_fingerprint_tells_its_kind_and_not_its_number() {
    let Some(engine) = on_gpu(&model(Architecture::Llama), Precision::F32) else {
        return;
    };
    let print = engine.fingerprint();
    assert!(print.contains(" cuda:"), "{print}");
    let again = on_gpu(&model(Architecture::Gpt2), Precision::F32).expect("a GPU");
    assert_eq!(print, again.fingerprint());
}
