//! What a lane is: its micro-batches in order, one gradient, one pair of sums. And what a node of the reduction tree
//! is: the sum of its children. The trainer and a replay compute both here, so that they can only agree.
//!
//! Who gets the results is the caller's business.

use std::time::{Duration, Instant};

use cohort_common::aggregate::add_all;
use cohort_common::cluster::messages::LaneSums;
use cohort_common::ids::{Lane, Step};
use cohort_common::layout::CHUNK_LEN;
use cohort_common::spec::TrainConfig;
use cohort_common::tree::Node;

use crate::data::RunData;
use crate::engine::{Batch, Engine, EngineError, Site};

/// Why work was not done.
pub enum Stop {
    /// The run is over here; nobody waits for the result.
    Cancelled,
    /// The run cannot go on.
    Failed(String),
}

impl From<String> for Stop {
    fn from(error: String) -> Self {
        Self::Failed(error)
    }
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// What it takes to compute lanes of a run.
pub struct Work<'a> {
    /// The run's steps.
    pub train: &'a TrainConfig,
    /// The run's text.
    pub data: &'a RunData,
    /// The state before the step.
    pub engine: &'a mut Engine,
    /// Buffers of one gradient each, to be used again.
    pub free: &'a mut Vec<Vec<f32>>,
    /// Asked between micro-batches.
    pub go_on: &'a dyn Fn() -> Result<(), Stop>,
    /// Hears of each lane: its sums, and how long it took.
    pub done: &'a mut dyn FnMut(Lane, LaneSums, Duration),
}

impl Work<'_> {
    /// The gradient of a node of the tree: its children's sum, left plus right.
    pub fn node(&mut self, step: Step, node: Node) -> Result<Vec<f32>, Stop> {
        let Some((left, right)) = node.children() else {
            return self.lane(step, node.first);
        };
        let mut sum = self.node(step, left)?;
        let other = self.node(step, right)?;
        self.engine.install(|| add_all(&mut sum, &other));
        self.free.push(other);
        Ok(sum)
    }

    fn lane(&mut self, step: Step, lane: Lane) -> Result<Vec<f32>, Stop> {
        let started = Instant::now();
        let batches = self.data.lane(self.train, step, lane)?;
        let mut gradient = self.free.pop().unwrap_or_default();
        gradient.fill(0.0);
        let mut sums = LaneSums::default();
        for ((batch, samples), micro_batch) in batches.iter().zip(0u32..) {
            (self.go_on)()?;
            let site = Site {
                seed: self.train.seed,
                step,
                lane,
                micro_batch,
            };
            let found = self.engine.accumulate(batch, site, &mut gradient)?;
            if !found.loss.is_finite() {
                return Err(Stop::Failed(format!(
                    "the loss of lane {lane}, micro-batch {micro_batch} is {} (samples {samples:?} of the training split); lower train.learning_rate, or look at these samples",
                    found.loss
                )));
            }
            sums.loss += found.loss;
            sums.weight += found.weight;
        }
        self.check_finite(lane, &gradient, &batches)?;
        (self.done)(lane, sums, started.elapsed());
        Ok(gradient)
    }

    fn check_finite(
        &self,
        lane: Lane,
        gradient: &[f32],
        batches: &[(Batch, Vec<u64>)],
    ) -> Result<(), Stop> {
        use rayon::prelude::*;
        let bad = self.engine.install(|| {
            gradient
                .par_chunks(CHUNK_LEN)
                .position_first(|chunk| !chunk.iter().fold(true, |ok, x| ok & x.is_finite()))
        });
        let Some(chunk) = bad else { return Ok(()) };
        let at = chunk * CHUNK_LEN;
        let tensors = self.engine.layout().tensors();
        let tensor = tensors.iter().find(|t| {
            let range = t.range();
            range.end > at && gradient[range].iter().any(|x| !x.is_finite())
        });
        let name = tensor.map_or("a parameter", |t| t.name.as_str());
        let samples: Vec<u64> = batches.iter().flat_map(|(_, s)| s.clone()).collect();
        Err(Stop::Failed(format!(
            "the gradient of `{name}` in lane {lane} is not finite (samples {samples:?} of the training split); lower train.learning_rate, or look at these samples"
        )))
    }
}
