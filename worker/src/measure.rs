//! How fast this machine computes a run's steps, measured for a few seconds with the real engine at the run's real shape,
//! on random tokens. Nothing is kept, and nothing but the clock comes out.
//!
//! A step may take longer than there is time for. So single passes are timed, those that a worker with all lanes makes,
//! and a step is as many of them as it has.

use std::time::{Duration, Instant};

use cohort_common::aggregate::{Rounding, parent};
use cohort_common::rng::philox;
use cohort_common::spec::{RunSpec, Speed};
use cohort_common::tree::{Node, Tree};

use crate::engine::{
    Batch, DeviceChoice, Engine, EngineError, Gradient, Site, Update, describe_device, thread_count,
};

/// Times each part at most so often.
const MOST: usize = 50;
/// Shares of the time for passes, for updates, and for scoring.
const SHARES: [f64; 3] = [0.6, 0.2, 0.2];

/// Measures the parts of a step for about `budget`; each once at least, however long that takes. `threads` is the number of
/// compute threads; 0 takes one per core.
///
/// # Errors
/// The device cannot be opened, or the model cannot be computed on it.
pub fn measure(
    spec: &RunSpec,
    device: DeviceChoice,
    threads: usize,
    budget: Duration,
) -> Result<Speed, EngineError> {
    let threads = thread_count(threads);
    let train = &spec.train;
    let lora = spec.lora.as_ref();
    let mut engine = Engine::adapted(&spec.model, lora, Some(train), device, threads)?;
    engine.init(train.seed)?;
    let node = pass(&engine, spec);
    let batches: Vec<Batch> = node.lanes().map(|lane| batch(spec, lane)).collect();
    let [of_passes, of_updates, of_scores] = SHARES.map(|share| budget.mul_f64(share));

    let mut gradient = Gradient::default();
    let (pass_seconds, passes) = typical(of_passes, || {
        let site = |lane| Site {
            seed: train.seed,
            step: 1,
            lane,
            micro_batch: 0,
        };
        let lanes: Vec<_> = batches
            .iter()
            .zip(node.lanes())
            .map(|(batch, lane)| (batch, site(lane)))
            .collect();
        engine.gradient(node, &lanes, &mut gradient).map(drop)
    })?;
    let sibling = gradient.to_vec();
    let rounding = Rounding::new(train.payload, train.seed, 1).of(node);
    let (sum_seconds, _) = typical(Duration::ZERO, || {
        engine.install(|| parent(rounding, &mut gradient, &sibling));
        Ok(())
    })?;
    let mut step = 0;
    let (update_seconds, _) = typical(of_updates, || {
        step += 1;
        let update = Update {
            step,
            count: step,
            scale: 1e-3,
            learning_rate: train.learning_rate,
        };
        // Of a round nearly all updates are inner ones; elsewhere it is the same.
        engine.inner_update(&gradient, update)
    })?;
    let (score_seconds, _) = typical(of_scores, || engine.score(&batches[0]).map(drop))?;

    let nodes = f64::from(train.lanes) / f64::from(node.size);
    let inner = f64::from(train.inner_steps());
    let of_a_node = match train.diloco {
        Some(_) => inner * (f64::from(train.accumulate) * pass_seconds + update_seconds),
        None => f64::from(train.accumulate) * pass_seconds,
    };
    let gradient_seconds = nodes * of_a_node + (nodes - 1.0).max(0.0) * sum_seconds;
    Ok(Speed {
        device: describe_device(device)?.0,
        threads: threads as u32,
        gradient_seconds,
        update_seconds,
        score_seconds: score_seconds / batches[0].inputs.len() as f64,
        passes: passes as u32,
    })
}

/// The lanes that share a pass, as a worker's do.
fn pass(engine: &Engine, spec: &RunSpec) -> Node {
    let train = &spec.train;
    let rows = train.micro_batch as usize * spec.sample_length();
    let alone = train.lanes_go_alone();
    let mut node = Tree::new(train.lanes).root();
    while let Some((left, _)) = node.children() {
        if !alone && engine.shares(rows, node.size as usize) {
            break;
        }
        node = left;
    }
    node
}

/// A micro-batch of random tokens, all of which are learned; of a classifier, the last of each sample is, with a label.
fn batch(spec: &RunSpec, lane: u32) -> Batch {
    let (samples, length) = (spec.train.micro_batch as usize, spec.sample_length());
    let elements = samples * length;
    let classifies = spec.model.classifies();
    let random = |place: usize, below: usize| {
        let [random, ..] = philox(spec.train.seed, [place as u32, lane, 0, 0]);
        random % below as u32
    };
    let learned = |place: usize| !classifies || place % length == length - 1;
    Batch {
        inputs: (0..elements)
            .map(|place| random(place, spec.model.vocab_size))
            .collect(),
        targets: (1..=elements)
            .map(|place| random(place, spec.model.outputs()))
            .collect(),
        weights: (0..elements)
            .map(|place| f32::from(u8::from(learned(place))))
            .collect(),
        starts: Vec::new(),
        samples,
        length,
    }
}

/// The median of the seconds that some work takes, without its first time, which finds cold caches and fresh memory; and
/// how often it was done.
fn typical(
    budget: Duration,
    mut work: impl FnMut() -> Result<(), EngineError>,
) -> Result<(f64, usize), EngineError> {
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.is_empty() || times.len() < MOST && begin.elapsed() < budget {
        let begin = Instant::now();
        work()?;
        times.push(begin.elapsed().as_secs_f64());
    }
    let count = times.len();
    if count > 1 {
        times.remove(0);
    }
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], count))
}

#[cfg(test)]
mod tests {
    use cohort_common::spec::{CorpusFacts, Preset};

    use super::*;

    fn measured(set: &[&str]) -> (RunSpec, Node) {
        let mut source = Preset::find("tiny")
            .and_then(|preset| preset.source())
            .expect("a preset");
        set.iter()
            .for_each(|assignment| source.set(assignment).expect("an assignment"));
        let meant = source.into_file().and_then(|file| file.validate());
        let facts = CorpusFacts {
            vocab_size: 300,
            ..CorpusFacts::default()
        };
        let spec = meant.and_then(|meant| meant.run_spec(facts, None));
        let spec = spec.expect("a spec");
        let speed = measure(&spec, DeviceChoice::Cpu, 1, Duration::ZERO).expect("a speed");
        assert_eq!(
            (speed.passes, speed.threads, speed.device.as_str()),
            (1, 1, "cpu")
        );
        for seconds in [
            speed.gradient_seconds,
            speed.update_seconds,
            speed.score_seconds,
        ] {
            assert!(seconds > 0.0 && seconds < 60.0, "{speed:?}");
        }
        let train = Some(&spec.train);
        let engine = Engine::new(&spec.model, train, DeviceChoice::Cpu, 1).expect("an engine");
        let node = pass(&engine, &spec);
        (spec, node)
    }

    #[test]
    fn passes_are_those_of_a_worker() {
        let small = [
            "model.context=16",
            "train.micro_batch=1",
            "train.accumulate=1",
            "train.lanes=6",
        ];
        assert_eq!(measured(&small).1.size, 6);
        for alone in ["train.accumulate=2", "train.payload=bf16"] {
            assert_eq!(measured(&[&small[..], &[alone]].concat()).1.size, 1);
        }
    }

    #[test]
    fn adapters_and_classifiers_can_be_measured() {
        let (spec, _) = measured(&["lora.rank=2"]);
        assert!(spec.lora.is_some());
        let mut spec = spec;
        spec.model.labels = vec!["a".into(), "b".into()];
        let speed = measure(&spec, DeviceChoice::Cpu, 1, Duration::ZERO);
        assert!(speed.expect("a speed").gradient_seconds > 0.0);
    }
}
