//! DiLoCo (Douillard et al., arXiv 2311.08105): each lane takes many steps by itself, and only what they come to is exchanged.
//!
//! A step of such a run is a *round*. From the weights θ of its start, each lane takes H inner steps of AdamW on its own
//! samples, to θₗ. Its contribution is the outer gradient wₗ · (θ − θₗ), with wₗ the weight of what it learned from; it
//! is summed along the tree like any gradient. By the mean Δ over Σ w follows one step of SGD with Nesterov's momentum:
//!
//! b ← μ b + Δ,   θ ← θ − η (Δ + μ b)
//!
//! So that a contribution depends on θ, the round and the lane alone, whoever computes it, inner moments begin at zero in
//! each round, in whose first steps learning rates ramp up ([`crate::schedule`]). The paper keeps those of each worker, which
//! would make the result depend on the cluster.

use serde::{Deserialize, Serialize};

use super::bounds::{real, within};
use super::error::SpecError;
use super::file::TrainTable;

/// When gradients are exchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SyncKind {
    /// After every step.
    #[default]
    Step,
    /// After a round of inner steps.
    Diloco,
}

/// How rounds of inner steps are taken.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diloco {
    /// Steps that a lane takes in a round; H.
    pub inner_steps: u32,
    /// Learning rate of the outer step; η.
    pub outer_learning_rate: f64,
    /// Nesterov's momentum of the outer step; μ.
    pub outer_momentum: f64,
}

/// Inner steps of a round, if nothing is said.
const INNER_STEPS: u64 = 50;

/// Outer steps, if nothing is said. The paper has 0.7 and 0.9, for hundreds of rounds: a momentum of 0.9 goes on for ten of
/// them, which a run of a few dozen never makes up for.
const OUTER_LEARNING_RATE: f64 = 1.0;
const OUTER_MOMENTUM: f64 = 0.5;

impl TrainTable {
    /// Optimizer steps in a step, before anything is checked: those of a round, or 1.
    pub(super) fn inner_steps_meant(&self) -> u64 {
        match self.sync.unwrap_or_default() {
            SyncKind::Step => 1,
            SyncKind::Diloco => self.inner_steps.unwrap_or(INNER_STEPS).max(1),
        }
    }
}

/// What a spec says of rounds.
pub(super) fn diloco_of(
    table: &TrainTable,
    notes: &mut Vec<String>,
) -> Result<Option<Diloco>, SpecError> {
    if table.sync.unwrap_or_default() == SyncKind::Step {
        let given = [
            table.inner_steps.map(|_| "inner_steps"),
            table.outer_learning_rate.map(|_| "outer_learning_rate"),
            table.outer_momentum.map(|_| "outer_momentum"),
        ];
        notes.extend(given.into_iter().flatten().map(|key| {
            format!("train.{key} has no effect: only `train.sync = \"diloco\"` uses it")
        }));
        return Ok(None);
    }
    let inner_steps = table.inner_steps.unwrap_or(INNER_STEPS);
    within(
        "train.inner_steps",
        inner_steps,
        1..=100_000,
        "50 is the default",
    )?;
    let rate = table.outer_learning_rate.unwrap_or(OUTER_LEARNING_RATE);
    real(
        "train.outer_learning_rate",
        rate,
        rate > 0.0 && rate <= 10.0,
        "it must lie above 0 and be at most 10",
        "1 is the default",
    )?;
    let momentum = table.outer_momentum.unwrap_or(OUTER_MOMENTUM);
    real(
        "train.outer_momentum",
        momentum,
        (0.0..1.0).contains(&momentum),
        "it must be 0 or more and below 1",
        "0.5 is the default",
    )?;
    Ok(Some(Diloco {
        inner_steps: inner_steps as u32,
        outer_learning_rate: rate,
        outer_momentum: momentum,
    }))
}
