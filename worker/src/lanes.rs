//! What a lane is: its micro-batches in order, one gradient, one pair of sums. And what a node of the reduction tree
//! is: the sum of its children. The trainer and a replay compute both here, so that they can only agree.
//!
//! Who gets the results is the caller's business.

use std::time::{Duration, Instant};

use cohort_common::aggregate::{Rounding, leaf, parent, squares_of};
use cohort_common::cluster::messages::LaneSums;
use cohort_common::floats::are_finite;
use cohort_common::ids::{Lane, Step};
use cohort_common::layout::{CHUNK_LEN, in_complete_chunks};
use cohort_common::schedule::{clipped_scale, inner_learning_rate};
use cohort_common::spec::TrainConfig;
use cohort_common::tree::Node;

use crate::data::RunData;
use crate::engine::{Batch, Engine, EngineError, Gradient, Progress, Site, Sums, Update};

/// Why work was not done.
pub enum Stop {
    /// The run is over here; nobody waits for the result.
    Cancelled,
    /// The step is committed, so nobody needs its lanes any more.
    Obsolete,
    /// The run cannot go on.
    Failed(String),
    /// This worker cannot go on, but another may be able to: its text cannot be fetched or read.
    Unable(String),
}

impl From<String> for Stop {
    fn from(error: String) -> Self {
        Self::Unable(error)
    }
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// What the caller has to say while lanes are computed, and what it hears.
pub trait Hooks: Send {
    /// Asked between micro-batches: an error ends the work.
    fn go_on(&self) -> Result<(), Stop> {
        Ok(())
    }

    /// Whether somebody else has computed this lane; asked before it is begun.
    fn skips(&self, _lane: Lane) -> bool {
        false
    }

    /// Whether the sum of a node inside this one is known already.
    fn keeps_part(&self, _node: Node) -> bool {
        false
    }

    /// The sum of a node that is known already.
    fn kept(&mut self, _node: Node) -> Option<Gradient> {
        None
    }

    /// A node is complete whose sibling is not, because a lane of it was skipped: it goes out by itself.
    fn part(&mut self, _node: Node, _sum: Gradient) {}

    /// So many elements of a node's gradient, from the first on, are finite and what they will be but for rounding, while the rest is
    /// computed; and at last all. Not told where what is not finite is tolerated, as that changes all of it.
    fn progress(&mut self, _node: Node, _gradient: &Gradient, _complete: usize) {}

    /// The lanes of a node are computed in one pass, which took so long.
    fn computed(&mut self, _node: Node, _time: Duration) {}

    /// Memory for another gradient.
    fn buffer(&mut self) -> Gradient {
        Gradient::default()
    }

    /// Lanes of one pass are computed: what they found, and how long each took.
    fn done(&mut self, lanes: &[(Lane, LaneSums)], time: Duration);
}

/// What it takes to compute lanes of a run.
pub struct Work<'a> {
    /// The run's steps.
    pub train: &'a TrainConfig,
    /// Whether a lane that is not finite is a result, as the run's watchdog skips its step, and no reason to stop.
    pub tolerant: bool,
    /// The run's text.
    pub data: &'a RunData,
    /// The state before the step.
    pub engine: &'a mut Engine,
    /// Buffers of one gradient each, to be used again.
    pub free: &'a mut Vec<Gradient>,
    /// The caller's part.
    pub hooks: &'a mut dyn Hooks,
}

impl Work<'_> {
    /// The gradient of a node of the tree: its children's sum, left plus right. `None` if a lane of it was skipped;
    /// then what there is of it has gone out in parts.
    pub fn node(&mut self, step: Step, node: Node) -> Result<Option<Gradient>, Stop> {
        if let Some(kept) = self.hooks.kept(node) {
            return Ok(Some(kept));
        }
        let skipped = node.lanes().any(|lane| self.hooks.skips(lane));
        if !skipped && self.shares(node) && !self.hooks.keeps_part(node) {
            return self.together(step, node).map(Some);
        }
        let Some((left, right)) = node.children() else {
            return match (skipped, self.train.diloco) {
                (true, _) => Ok(None),
                (false, None) => self.lane(step, node.first).map(Some),
                (false, Some(_)) => self.round(step, node.first).map(Some),
            };
        };
        let first = self.node(step, left)?;
        let second = self.node(step, right)?;
        match (first, second) {
            (Some(mut sum), Some(other)) => {
                let rounding = self.rounding(step).of(node);
                self.engine.install(|| parent(rounding, &mut sum, &other));
                self.free.push(other);
                return Ok(Some(sum));
            }
            (Some(sum), None) => self.hooks.part(left, sum),
            (None, Some(sum)) => self.hooks.part(right, sum),
            (None, None) => {}
        }
        Ok(None)
    }

    fn rounding(&self, step: Step) -> Rounding {
        Rounding::new(self.train.payload, self.train.seed, step)
    }

    /// Whether the lanes of a node share one pass.
    fn shares(&self, node: Node) -> bool {
        let length = self.train.max_length.unwrap_or(self.engine.model().context);
        let rows = self.train.micro_batch as usize * length;
        !self.train.lanes_go_alone() && self.engine.shares(rows, node.size as usize)
    }

    fn together(&mut self, step: Step, node: Node) -> Result<Gradient, Stop> {
        let started = Instant::now();
        self.hooks.go_on()?;
        let lanes: Result<Vec<_>, String> = node
            .lanes()
            .map(|lane| self.data.lane(self.train, step, lane))
            .collect();
        let batches: Vec<_> = lanes?.into_iter().flatten().collect();
        let micro_batches: Vec<_> = batches
            .iter()
            .zip(node.lanes())
            .map(|((batch, _), lane)| (batch, self.site(step, lane, 0)))
            .collect();
        let mut gradient = self.buffer();
        let (hooks, mut finite) = (&mut *self.hooks, Finite::default());
        let mut tell = |gradient: &Gradient, complete| {
            hooks.progress(node, gradient, finite.look(gradient, complete));
        };
        let tells = !self.tolerant;
        let progress: Option<Progress<'_>> = if tells { Some(&mut tell) } else { None };
        let found = self
            .engine
            .gradient_telling(node, &micro_batches, &mut gradient, progress)?;
        if !self.tolerant {
            for ((lane, sums), (_, samples)) in node.lanes().zip(&found).zip(&batches) {
                check_loss(sums, lane, 0, samples)?;
            }
        }
        let found: Vec<LaneSums> = found.iter().map(|s| lane_sums(s.loss, s.weight)).collect();
        self.check_finite(node, &mut gradient, finite, &found, &batches)?;
        let time = started.elapsed();
        self.hooks.computed(node, time);
        let lanes: Vec<_> = node.lanes().zip(found).collect();
        self.hooks.done(&lanes, time / node.size);
        Ok(gradient)
    }

    fn buffer(&mut self) -> Gradient {
        let used = self.free.pop();
        used.unwrap_or_else(|| self.hooks.buffer())
    }

    fn site(&self, step: Step, lane: Lane, micro_batch: u32) -> Site {
        Site {
            seed: self.train.seed,
            step,
            lane,
            micro_batch,
        }
    }

    fn lane(&mut self, step: Step, lane: Lane) -> Result<Gradient, Stop> {
        let started = Instant::now();
        let batches = self.data.lane(self.train, step, lane)?;
        let mut gradient = self.buffer();
        let tells = !self.tolerant;
        let (sums, finite) = self.micro_batches((step, lane), 0, &batches, &mut gradient, tells)?;
        self.complete((step, lane), started, sums, (gradient, finite), &batches)
    }

    /// Sums the gradients of micro-batches in order, of which the first has this number in its lane. The exchange hears how
    /// much is complete, if it is told; this is known to be finite then.
    fn micro_batches(
        &mut self,
        (step, lane): (Step, Lane),
        first: u32,
        batches: &[(Batch, Vec<u64>)],
        gradient: &mut Gradient,
        tells: bool,
    ) -> Result<(LaneSums, Finite), Stop> {
        let (mut sums, mut finite) = (LaneSums::default(), Finite::default());
        for (number, (batch, samples)) in batches.iter().enumerate() {
            self.hooks.go_on()?;
            let micro_batch = first + number as u32;
            let site = self.site(step, lane, micro_batch);
            let (node, hooks) = (Node::leaf(lane), &mut *self.hooks);
            let mut tell = |gradient: &Gradient, complete| {
                hooks.progress(node, gradient, finite.look(gradient, complete));
            };
            let last = number + 1 == batches.len();
            let progress: Option<Progress<'_>> = if last && tells { Some(&mut tell) } else { None };
            let found = match number {
                0 => self
                    .engine
                    .gradient_telling(node, &[(batch, site)], gradient, progress)?[0],
                _ => self
                    .engine
                    .accumulate_telling(batch, site, gradient, progress)?,
            };
            if !self.tolerant {
                check_loss(&found, lane, micro_batch, samples)?;
            }
            sums.loss += found.loss;
            sums.weight += found.weight;
        }
        Ok((sums, finite))
    }

    /// A round of a lane: its inner steps, each by its own gradient, and what they come to.
    fn round(&mut self, step: Step, lane: Lane) -> Result<Gradient, Stop> {
        let started = Instant::now();
        let batches = self.data.lane(self.train, step, lane)?;
        let start = self.engine.begin_lane()?;
        let mut gradient = self.buffer();
        let found = self.inner_steps((step, lane), &batches, &mut gradient);
        // Whatever has come of it, the engine goes back to where the round began.
        let weight = found.as_ref().map_or(0.0, |sums| sums.weight);
        self.engine.end_lane(start, weight, &mut gradient)?;
        let gradient = (gradient, Finite::default());
        self.complete((step, lane), started, found?, gradient, &batches)
    }

    fn inner_steps(
        &mut self,
        (step, lane): (Step, Lane),
        batches: &[(Batch, Vec<u64>)],
        gradient: &mut Gradient,
    ) -> Result<LaneSums, Stop> {
        let mut sums = LaneSums::default();
        let mut count = 0;
        let each = self.train.accumulate;
        for (inner, batches) in (0..).zip(batches.chunks(each as usize)) {
            let first = inner * each;
            let (found, _) = self.micro_batches((step, lane), first, batches, gradient, false)?;
            sums.loss += found.loss;
            sums.weight += found.weight;
            // A micro-batch may have nothing to learn from.
            if found.weight == 0.0 {
                continue;
            }
            count += 1;
            let norm = self.engine.install(|| squares_of(gradient)).sqrt() / found.weight;
            if !norm.is_finite() {
                let finite = Finite::default();
                self.check_finite(Node::leaf(lane), gradient, finite, &[found], batches)?;
            }
            let update = Update {
                step,
                count,
                scale: clipped_scale(self.train, norm, found.weight),
                learning_rate: inner_learning_rate(self.train, step, inner),
            };
            self.engine.inner_update(gradient, update)?;
        }
        Ok(sums)
    }

    /// Makes a lane's gradient a leaf of the tree, and says that it is there.
    fn complete(
        &mut self,
        (step, lane): (Step, Lane),
        started: Instant,
        sums: LaneSums,
        (mut gradient, finite): (Gradient, Finite),
        batches: &[(Batch, Vec<u64>)],
    ) -> Result<Gradient, Stop> {
        let sums = lane_sums(sums.loss, sums.weight);
        self.check_finite(Node::leaf(lane), &mut gradient, finite, &[sums], batches)?;
        let rounding = self.rounding(step).of(Node::leaf(lane));
        self.engine.install(|| leaf(rounding, &mut gradient));
        let time = started.elapsed();
        self.hooks.computed(Node::leaf(lane), time);
        self.hooks.done(&[(lane, sums)], time);
        Ok(gradient)
    }

    /// Refuses a gradient that is not finite. Where the run tolerates it, it becomes NaN throughout, and so does that of a
    /// loss which is not finite: then the sum is the same NaN whoever adds what to it, in whichever order.
    fn check_finite(
        &self,
        node: Node,
        gradient: &mut [f32],
        finite: Finite,
        found: &[LaneSums],
        batches: &[(Batch, Vec<u64>)],
    ) -> Result<(), Stop> {
        let bad = match finite.0 == gradient.len() {
            true => None,
            false => self.engine.install(|| finite.first_that_is_not(gradient)),
        };
        if self.tolerant {
            if bad.is_some() || found.iter().any(|sums| !sums.loss.is_finite()) {
                gradient.fill(f32::NAN);
            }
            return Ok(());
        }
        let Some(at) = bad else { return Ok(()) };
        let tensors = self.engine.layout().tensors();
        let tensor = tensors.iter().find(|t| {
            let range = t.range();
            range.end > at && gradient[range].iter().any(|x| !x.is_finite())
        });
        let name = tensor.map_or("a parameter", |t| t.name.as_str());
        let samples: Vec<u64> = batches.iter().flat_map(|(_, s)| s.clone()).collect();
        Err(Stop::Failed(format!(
            "the gradient of `{name}` in {node} is not finite (samples {samples:?} of the training split); lower train.learning_rate, or look at these samples"
        )))
    }
}

/// How many elements of a gradient are known to be finite, from the first on, in chunks that are complete.
#[derive(Clone, Copy, Debug, Default)]
struct Finite(usize);

impl Finite {
    /// Looks at what is new of so many elements that are complete, while they are in the cache.
    fn look(&mut self, gradient: &[f32], complete: usize) -> usize {
        let whole = in_complete_chunks(complete, gradient.len());
        if whole > self.0 {
            self.0 = self.first_that_is_not(&gradient[..whole]).unwrap_or(whole);
        }
        self.0
    }

    /// Where the first chunk begins that is not finite, of those that are not known to be.
    fn first_that_is_not(self, gradient: &[f32]) -> Option<usize> {
        use rayon::prelude::*;
        let bad = gradient[self.0..]
            .par_chunks(CHUNK_LEN)
            .position_first(|chunk| !are_finite(chunk));
        bad.map(|chunk| self.0 + chunk * CHUNK_LEN)
    }
}

/// Sums of a lane; a loss that is not finite is always the same NaN.
fn lane_sums(loss: f64, weight: f64) -> LaneSums {
    let loss = if loss.is_finite() { loss } else { f64::NAN };
    LaneSums { loss, weight }
}

fn check_loss(sums: &Sums, lane: Lane, micro_batch: u32, samples: &[u64]) -> Result<(), Stop> {
    match sums.loss {
        loss if loss.is_finite() => Ok(()),
        loss => Err(Stop::Failed(format!(
            "the loss of lane {lane}, micro-batch {micro_batch} is {loss} (samples {samples:?} of the training split); lower train.learning_rate, or look at these samples"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_found_wherever_it_is() {
        let mut gradient = vec![1.0f32; 3 * CHUNK_LEN + 7];
        let mut finite = Finite::default();
        assert_eq!(finite.look(&gradient, CHUNK_LEN - 1), 0);
        assert_eq!(finite.look(&gradient, CHUNK_LEN + 5), CHUNK_LEN);
        assert_eq!(finite.first_that_is_not(&gradient), None);
        for (at, bad) in [
            (3 * CHUNK_LEN + 6, f32::NAN),
            (2 * CHUNK_LEN, f32::INFINITY),
        ] {
            gradient[at] = bad;
            let chunk = at / CHUNK_LEN * CHUNK_LEN;
            assert_eq!(finite.first_that_is_not(&gradient), Some(chunk));
            assert_eq!(Finite::default().first_that_is_not(&gradient), Some(chunk));
        }
        let mut clean = Finite::default();
        assert_eq!(
            clean.look(&[1.0; CHUNK_LEN + 3], CHUNK_LEN + 3),
            CHUNK_LEN + 3
        );
        // What follows is not told to be finite, however much is complete.
        assert_eq!(finite.look(&gradient, gradient.len()), 2 * CHUNK_LEN);
        assert_eq!(finite.look(&gradient, gradient.len()), 2 * CHUNK_LEN);
    }
}
