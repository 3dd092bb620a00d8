//! Every step of a run as it is kept, for files and for other programs.

use serde::{Deserialize, Serialize};

/// Asks for the steps of a run, each as it is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsRequest {
    /// The run.
    pub run: String,
    /// The first step that is wanted; absent for the first of all.
    pub from: Option<u64>,
    /// The last step that is wanted; absent for the newest.
    pub to: Option<u64>,
    /// How many of the newest of them; absent for all.
    pub last: Option<u64>,
}

/// A step with all that is kept of it, to the bit. What is absent is not known, or not finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step, from 1.
    pub step: u64,
    /// Steps of the whole run, as it was planned then.
    pub steps: Option<u64>,
    /// Passes over the training split so far.
    pub epoch: f64,
    /// Tokens of the whole run so far.
    pub tokens: u64,
    /// When the step was committed, in milliseconds since the epoch.
    pub time_ms: u64,
    /// Mean loss over the step's scored tokens, in nats.
    pub loss: Option<f64>,
    /// The same per byte of text, in bits.
    pub bits_per_byte: Option<f64>,
    /// Norm of the mean gradient before clipping.
    pub grad_norm: Option<f64>,
    /// Learning rate of the update.
    pub learning_rate: Option<f64>,
    /// Speed of the cluster.
    pub tokens_per_second: Option<f64>,
    /// Model FLOPs utilisation.
    pub mfu: Option<f64>,
}
