//! What a validation found, as clients see it.

use serde::{Deserialize, Serialize};

/// A validation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalEvent {
    /// The run.
    pub run: String,
    /// Updates that the state has seen.
    pub step: u64,
    /// Which text: `validation`, or `base_validation` for that of the run a finetuning started from.
    pub split: String,
    /// Mean loss over the scored tokens, in nats.
    pub loss: f64,
    /// The same per byte of text, in bits: comparable between tokenizers. Absent for a classification.
    pub bits_per_byte: Option<f64>,
    /// Tokens that were scored; samples of a classification.
    pub tokens: u64,
    /// How well a classifier tells its labels apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes: Option<Classes>,
}

/// How well a classifier tells its labels apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Classes {
    /// Share of the samples that were given their own label.
    pub accuracy: f64,
    /// Mean over the labels that occur of F1 = 2 TP / (2 TP + FP + FN).
    pub macro_f1: f64,
    /// The labels.
    pub labels: Vec<String>,
    /// For each label, how many of its samples were given each label.
    pub confusion: Vec<Vec<u64>>,
}

impl Classes {
    /// From counts, row by row; `None` where there are none.
    pub fn of(labels: &[String], confusion: &[u64]) -> Option<Self> {
        let n = labels.len();
        let all: u64 = confusion.iter().sum();
        if n == 0 || confusion.len() != n * n || all == 0 {
            return None;
        }
        let at = |label: usize, given: usize| confusion[label * n + given] as f64;
        let right: f64 = (0..n).map(|i| at(i, i)).sum();
        let f1 = |i: usize| {
            let own: f64 = (0..n).map(|given| at(i, given)).sum();
            let given: f64 = (0..n).map(|label| at(label, i)).sum();
            (own + given > 0.0).then(|| 2.0 * at(i, i) / (own + given))
        };
        let f1: Vec<f64> = (0..n).filter_map(f1).collect();
        Some(Self {
            accuracy: right / all as f64,
            macro_f1: f1.iter().sum::<f64>() / f1.len() as f64,
            labels: labels.to_vec(),
            confusion: confusion.chunks_exact(n).map(<[u64]>::to_vec).collect(),
        })
    }
}
