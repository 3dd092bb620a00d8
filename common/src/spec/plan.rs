//! What a run will take, before it is begun: parameters, memory, operations, bytes on the wire and on the disk; and,
//! with a measured speed, time. **Pure.**
//!
//! The model of time is simple, so that it can be checked. A step on n workers takes
//!
//! ```text
//! gradient · (lanes of the worker that has most / lanes) + update + bytes over the coordinator's link / bandwidth
//! ```
//!
//! where the bytes are those of the busier direction, as links carry both at once, and all workers share the one of the
//! coordinator. Workers are taken to be as fast as the one that was measured, and nothing overlaps. To the steps come the
//! validations, whose samples are spread over the workers. What is not in it: what it takes to load, to write
//! checkpoints, and whatever goes wrong.

use serde::{Deserialize, Serialize};

use super::RunSpec;
use super::memory::memory_per_worker;
use crate::corpus::share_of;
use crate::ids::SessionId;
use crate::lanes::assign;
use crate::layout::Layout;
use crate::order::Shares;
use crate::tree::Tree;

/// Bytes of an f32.
const F32: u64 = 4;

/// What a run will take, whatever it runs on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Parameters.
    pub parameters: Parameters,
    /// Memory of one worker, in bytes.
    pub memory: StateBytes,
    /// Floating-point operations for each token that is trained on.
    pub flops_per_token: f64,
    /// Floating-point operations of all steps.
    pub flops: f64,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens of one step.
    pub tokens_per_step: u64,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Tokens of all steps for each parameter; about 20 make the most of a compute budget (Hoffmann et al., arXiv
    /// 2203.15556).
    pub tokens_per_parameter: f64,
    /// Passes over the training split; absent where no corpus is known.
    pub epochs: Option<f64>,
    /// The corpus; absent where none is named.
    pub corpus: Option<CorpusSize>,
    /// Checkpoints.
    pub checkpoints: CheckpointBytes,
    /// Validations.
    pub validations: Validations,
    /// Gradients on the wire, for several numbers of workers.
    pub wire: Vec<Wire>,
}

/// Numbers of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// All, adapters included.
    pub total: u64,
    /// Those that have a gradient.
    pub trained: u64,
    /// All without the embeddings of tokens and positions. A head counts where it has weights of its own.
    pub non_embedding: u64,
}

/// Memory of one worker, in bytes: an estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateBytes {
    /// Of all parameters.
    pub parameters: u64,
    /// Of one gradient.
    pub gradients: u64,
    /// Of AdamW's two moments.
    pub moments: u64,
    /// Of the activations of the largest pass.
    pub activations: u64,
    /// In all.
    pub total: u64,
}

/// How much text there is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusSize {
    /// Tokens of the training split.
    pub tokens: u64,
    /// Samples of the training split, at the run's length.
    pub samples: u64,
    /// Samples of the validation split, at the run's length.
    pub validation_samples: u64,
    /// Bytes of its shards.
    pub bytes: u64,
    /// Whether these are estimates from the size of the files.
    pub estimated: bool,
}

/// What checkpoints take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointBytes {
    /// Checkpoints that are written.
    pub written: u64,
    /// Checkpoints that stay at most: the newest, and the best.
    pub kept: u64,
    /// Of one: what is trained, with its moments.
    pub each: u64,
    /// Of those that stay.
    pub total: u64,
}

/// What is validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Validations {
    /// How often.
    pub count: u64,
    /// Tokens of each; 0 where no corpus is known and nothing bounds it.
    pub tokens_each: u64,
}

/// The exchange of one step: payload alone, without what frames it. A worker that is alone sends nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wire {
    /// Workers.
    pub workers: u32,
    /// Lanes of the worker that has most.
    pub lanes: u32,
    /// Bytes that the worker with most nodes of the tree sends: its nodes.
    pub sent: u64,
    /// Bytes that each worker gets: the root.
    pub received: u64,
    /// Bytes that the coordinator gets of all workers.
    pub coordinator_received: u64,
    /// Bytes that the coordinator sends to all workers.
    pub coordinator_sent: u64,
}

/// How fast one worker is, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// What computes.
    pub device: String,
    /// Compute threads.
    pub threads: u32,
    /// Seconds for the gradients of all lanes of a step.
    pub gradient_seconds: f64,
    /// Seconds for the update.
    pub update_seconds: f64,
    /// Seconds to score one token.
    pub score_seconds: f64,
    /// Forward and backward passes that were timed.
    pub passes: u32,
}

impl Speed {
    /// Seconds of a step on one worker.
    pub fn step_seconds(&self) -> f64 {
        self.gradient_seconds + self.update_seconds
    }
}

/// How long a run will take on so many workers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Workers.
    pub workers: u32,
    /// Seconds of a step.
    pub step_seconds: f64,
    /// Of these, seconds of the exchange.
    pub exchange_seconds: f64,
    /// Tokens per second, between validations.
    pub tokens_per_second: f64,
    /// Seconds of the run, validations included.
    pub seconds: f64,
}

impl Plan {
    /// The plan of a run, for these numbers of workers.
    pub fn of(spec: &RunSpec, corpus: Option<CorpusSize>, workers: &[u32]) -> Self {
        let parameters = Parameters::of(spec);
        let tokens_per_step = spec.tokens_per_step();
        let tokens = tokens_per_step.saturating_mul(spec.train.steps);
        let flops_per_token = spec.flops_per_token();
        Self {
            parameters,
            memory: StateBytes::of(spec, &parameters),
            flops_per_token,
            flops: flops_per_token * tokens as f64,
            steps: spec.train.steps,
            tokens_per_step,
            tokens,
            tokens_per_parameter: tokens as f64 / parameters.total as f64,
            epochs: corpus.as_ref().map(|corpus| epochs(spec, corpus)),
            checkpoints: CheckpointBytes::of(spec, &parameters),
            validations: Validations::of(spec, corpus.as_ref()),
            wire: workers.iter().map(|&n| Wire::of(spec, n)).collect(),
            corpus,
        }
    }

    /// How long the run takes, for each number of workers of the plan, at so many bytes per second of each direction of the
    /// coordinator's link.
    pub fn estimates(&self, spec: &RunSpec, speed: &Speed, bandwidth: f64) -> Vec<Estimate> {
        let each = self.wire.iter().map(|wire| {
            let share = f64::from(wire.lanes) / f64::from(spec.train.lanes);
            let busier = wire.coordinator_received.max(wire.coordinator_sent);
            let exchange_seconds = busier as f64 / bandwidth;
            let step_seconds =
                speed.gradient_seconds * share + speed.update_seconds + exchange_seconds;
            let scored = self.validations.count as f64 * self.validations.tokens_each as f64;
            let validations = scored * speed.score_seconds / f64::from(wire.workers);
            Estimate {
                workers: wire.workers,
                step_seconds,
                exchange_seconds,
                tokens_per_second: self.tokens_per_step as f64 / step_seconds,
                seconds: step_seconds * self.steps as f64 + validations,
            }
        });
        each.collect()
    }
}

/// 1, 2, 4, 8 and so on, up to as many workers as can have a lane.
pub fn worker_counts(lanes: u32) -> Vec<u32> {
    let powers = std::iter::successors(Some(1u32), |n| n.checked_mul(2));
    let mut counts: Vec<u32> = powers.take_while(|n| *n < lanes).collect();
    counts.push(lanes);
    counts
}

impl Parameters {
    fn of(spec: &RunSpec) -> Self {
        let layout = spec.layout();
        let embeddings = Layout::of(&spec.model)
            .tensors()
            .iter()
            .filter(|tensor| {
                let ends = ["embed_tokens.weight", "wte.weight", "wpe.weight"];
                ends.iter().any(|end| tensor.name.ends_with(end))
            })
            .map(|tensor| tensor.len() as u64)
            .sum::<u64>();
        let total = layout.total() as u64;
        Self {
            total,
            trained: layout.len() as u64,
            non_embedding: total - embeddings,
        }
    }
}

impl StateBytes {
    /// In all, on each of so many workers that divide the moments among them. What each keeps for another is on its disk.
    pub fn divided(&self, workers: u64) -> u64 {
        self.total - self.moments + self.moments.div_ceil(workers)
    }

    fn of(spec: &RunSpec, parameters: &Parameters) -> Self {
        let activations = memory_per_worker(&spec.model, &spec.train).activation_bytes;
        // A lane that steps by itself has weights, those behind adapters included, and moments of its own.
        let copies = if spec.train.diloco.is_some() { 2 } else { 1 };
        let gradients = F32 * parameters.trained;
        let (parameters, moments) = (copies * F32 * parameters.total, copies * 2 * gradients);
        Self {
            parameters,
            gradients,
            moments,
            activations,
            total: (parameters + gradients + moments).saturating_add(activations),
        }
    }
}

impl CheckpointBytes {
    fn of(spec: &RunSpec, parameters: &Parameters) -> Self {
        let written = match spec.checkpoint.every {
            0 => 1,
            every => spec.train.steps.div_ceil(every),
        };
        let kept = written.min(u64::from(spec.checkpoint.keep) + 1);
        let each = 3 * F32 * parameters.trained;
        Self {
            written,
            kept,
            each,
            total: kept.saturating_mul(each),
        }
    }
}

impl Validations {
    fn of(spec: &RunSpec, corpus: Option<&CorpusSize>) -> Self {
        // At the start, in between, and at the end.
        let count = match spec.train.eval_every {
            0 => 2,
            every => 1 + spec.train.steps.div_ceil(every),
        };
        let there = corpus.map(|corpus| corpus.validation_samples);
        let samples = match (spec.train.eval_samples, there) {
            (0, there) => there.unwrap_or(0),
            (most, there) => most.min(there.unwrap_or(most)),
        };
        Self {
            count,
            tokens_each: samples.saturating_mul(spec.sample_length() as u64),
        }
    }
}

fn epochs(spec: &RunSpec, corpus: &CorpusSize) -> f64 {
    let samples = share_of(corpus.samples.max(1), spec.train.data_share) as f64;
    let walked = spec
        .train
        .samples_per_step()
        .saturating_mul(spec.train.steps);
    Shares::of(spec).of_first(walked)[0] as f64 / samples
}

impl Wire {
    /// What a step sends over the wire on so many equal workers. More workers than lanes have no more than the lanes.
    fn of(spec: &RunSpec, workers: u32) -> Self {
        let lanes = spec.train.lanes;
        let equal: Vec<_> = (1..=u64::from(workers.clamp(1, lanes)))
            .map(|n| (SessionId(n), None))
            .collect();
        let ranges = assign(lanes, &equal);
        let most = ranges.values().map(|range| range.len()).max();
        let lanes_of_most = most.expect("there is a worker") as u32;
        if workers <= 1 {
            return Self {
                workers,
                lanes: lanes_of_most,
                sent: 0,
                received: 0,
                coordinator_received: 0,
                coordinator_sent: 0,
            };
        }
        let gradient = spec.train.payload.bytes(spec.gradient_len()) as u64;
        let tree = Tree::new(lanes);
        let sent = ranges
            .into_values()
            .map(|range| tree.cover(range).len() as u64 * gradient);
        let sent: Vec<u64> = sent.collect();
        Self {
            workers,
            lanes: lanes_of_most,
            sent: sent.iter().copied().max().expect("there is a worker"),
            received: gradient,
            coordinator_received: sent.iter().sum(),
            coordinator_sent: gradient * u64::from(workers),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{CorpusFacts, Preset, SpecSource};

    fn spec(preset: &str, set: &[&str]) -> RunSpec {
        let mut source: SpecSource = Preset::find(preset)
            .and_then(|preset| preset.source())
            .expect("a preset");
        set.iter()
            .for_each(|assignment| source.set(assignment).expect("an assignment"));
        let meant = source.into_file().and_then(|file| file.validate());
        let facts = CorpusFacts {
            vocab_size: 50_257,
            ..CorpusFacts::default()
        };
        meant
            .and_then(|meant| meant.run_spec(facts, None))
            .expect("a spec")
    }

    fn size(samples: u64) -> CorpusSize {
        CorpusSize {
            tokens: 64 * samples,
            samples,
            validation_samples: 10,
            bytes: 128 * samples,
            estimated: false,
        }
    }

    #[test]
    fn gpt2_has_the_parameters_that_it_is_known_for() {
        let plan = Plan::of(&spec("gpt2", &[]), None, &[1]);
        assert_eq!(plan.parameters.total, 124_439_808);
        assert_eq!(plan.parameters.trained, 124_439_808);
        // nanoGPT counts 123.65 M without positions; without tokens as well it is 85.06 M.
        assert_eq!(plan.parameters.non_embedding, 85_056_000);
        assert_eq!(plan.memory.moments, 8 * 124_439_808);
        let whole = plan.memory;
        let parts = whole.parameters + whole.gradients + whole.moments + whole.activations;
        assert_eq!(whole.total, parts);
        assert_eq!(plan.checkpoints.each, 12 * 124_439_808);
    }

    #[test]
    fn lanes_that_do_not_divide_cost_the_largest_share_and_more_nodes() {
        let spec = spec("tiny", &["train.lanes=6"]);
        let gradient = 4 * spec.trained_parameters();
        let plan = Plan::of(&spec, None, &[1, 2, 4, 6]);
        let wire: Vec<_> = plan
            .wire
            .iter()
            .map(|w| (w.lanes, w.sent / gradient, w.received / gradient))
            .collect();
        // Two workers have lanes 0-2 and 3-5: of the tree over 4 + 2 lanes that is 0-1 and 2, and 3 and 4-5.
        assert_eq!(wire, [(6, 0, 0), (3, 2, 1), (2, 1, 1), (1, 1, 1)]);
        assert_eq!(plan.wire[1].coordinator_received, 4 * gradient);
        assert_eq!(plan.wire[1].coordinator_sent, 2 * gradient);
        assert_eq!(plan.wire[3].coordinator_sent, 6 * gradient);
        let half = Plan::of(
            &self::spec("tiny", &["train.lanes=6", "train.payload=bf16"]),
            None,
            &[2],
        );
        assert_eq!(half.wire[0].sent, gradient);
    }

    #[test]
    fn a_round_costs_memory_and_its_steps_and_travels_once() {
        let plain = Plan::of(&spec("tiny", &[]), None, &[2]);
        let rounds = ["train.sync=diloco", "train.inner_steps=5"];
        let round = Plan::of(&spec("tiny", &rounds), None, &[2]);
        assert_eq!(round.tokens_per_step, 5 * plain.tokens_per_step);
        assert_eq!(round.wire[0].sent, plain.wire[0].sent);
        let kept = |plan: &Plan| plan.memory.total - plan.memory.activations;
        let trained = 4 * spec("tiny", &[]).trained_parameters();
        assert_eq!(kept(&round), kept(&plain) + 3 * trained);
    }

    #[test]
    fn what_stays_frozen_does_not_travel() {
        let sent = |set: &[&str]| Plan::of(&spec("tiny", set), None, &[2]).wire[0].sent;
        let embeddings = 4 * Layout::of(&spec("tiny", &[]).model)
            .tensors()
            .last()
            .unwrap()
            .len();
        let without = sent(&["train.freeze_layers=0"]);
        // Each of two workers sends half of the lanes' tree, which is one gradient.
        assert_eq!(sent(&[]) - without, embeddings as u64);
        assert!(sent(&["train.freeze_layers=1"]) < without);
        // Layers that learn later travel from the start.
        assert_eq!(sent(&["train.unfreeze_every=10"]), sent(&[]));
    }

    #[test]
    fn only_adapters_travel_and_are_kept() {
        let spec = spec("tiny", &["lora.rank=4"]);
        let plan = Plan::of(&spec, None, &[2]);
        assert!(plan.parameters.trained * 10 < plan.parameters.total);
        assert_eq!(plan.wire[0].received, 4 * plan.parameters.trained);
        assert_eq!(plan.checkpoints.each, 12 * plan.parameters.trained);
        assert_eq!(plan.memory.parameters, 4 * plan.parameters.total);
    }

    #[test]
    fn activations_that_are_computed_again_need_no_memory() {
        let plan = |set: &[&str]| Plan::of(&spec("gpt2", set), None, &[1]).memory.activations;
        assert!(2 * plan(&["train.gradient_checkpointing=true"]) < plan(&[]));
    }

    #[test]
    fn time_is_what_the_model_says() {
        let set = [
            "train.steps=100",
            "train.lanes=8",
            "train.eval_every=30",
            "train.eval_samples=0",
            "checkpoint.every=30",
            "checkpoint.keep=2",
        ];
        let spec = spec("tiny", &set);
        let plan = Plan::of(&spec, Some(size(800)), &worker_counts(8));
        assert_eq!(plan.checkpoints.written, 4);
        assert_eq!(plan.checkpoints.kept, 3);
        // At the start, at 30, 60, 90, and at the end.
        assert_eq!(plan.validations.count, 5);
        let length = spec.sample_length() as u64;
        assert_eq!(plan.validations.tokens_each, 10 * length);
        let samples = spec.train.samples_per_step() * 100;
        assert_eq!(plan.epochs, Some(samples as f64 / 800.0));
        let speed = Speed {
            device: "cpu".into(),
            threads: 1,
            gradient_seconds: 0.8,
            update_seconds: 0.1,
            score_seconds: 1e-3,
            passes: 1,
        };
        let gradient = 4.0 * spec.trained_parameters() as f64;
        let estimates = plan.estimates(&spec, &speed, 2.0 * gradient);
        let expected = [
            (1, 0.9),
            (2, 0.4 + 0.1 + 1.0),
            (4, 0.2 + 0.1 + 2.0),
            (8, 4.2),
        ];
        for (estimate, (workers, seconds)) in estimates.iter().zip(expected) {
            assert_eq!(estimate.workers, workers);
            assert!(
                (estimate.step_seconds - seconds).abs() < 1e-9,
                "{estimate:?}"
            );
            let validations = 5.0 * 10.0 * length as f64 * 1e-3 / f64::from(workers);
            let whole = 100.0 * seconds + validations;
            assert!((estimate.seconds - whole).abs() < 1e-6, "{estimate:?}");
            let speed = plan.tokens_per_step as f64 / seconds;
            assert!((estimate.tokens_per_second - speed).abs() < 1e-6 * speed);
        }
    }

    #[test]
    fn workers_double_until_each_has_one_lane() {
        assert_eq!(worker_counts(1), [1]);
        assert_eq!(worker_counts(6), [1, 2, 4, 6]);
        assert_eq!(worker_counts(8), [1, 2, 4, 8]);
    }
}
