//! Final norm, output projection and cross-entropy as one candle operation. The logits of a large vocabulary are made
//! a few rows at a time and turned into their own gradient at once, so they are never all alive: when training,
//! forward already adds the gradient of the head and keeps that of x for backward.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::embed::TokenRows;
use super::{Pass, elements};
use crate::engine::ops::cross_entropy;
use crate::engine::ops::gemm::{self, Matrix};
use crate::engine::ops::lanes::Lanes;
use crate::engine::ops::linear::{self, WeightOrder};
use crate::engine::{Scores, Sums};
use cohort_common::spec::{LOGITS_ALIVE, ModelConfig};
use cohort_common::tree::Node;

/// What the rows are scored against.
pub struct Targets {
    /// The token after each input.
    pub tokens: Vec<u32>,
    /// Its weight.
    pub weights: Vec<f32>,
}

/// `Σ w·nll` of x, as a scalar whose gradient is 1.
pub struct Head {
    pass: Arc<Pass>,
    targets: Targets,
    sums: Arc<Mutex<Vec<Sums>>>,
    dx: Mutex<Option<Vec<f32>>>,
}

impl Head {
    /// The operation, and where it will leave the sums of each lane in full precision.
    pub fn new(pass: Arc<Pass>, targets: Targets) -> (Self, Arc<Mutex<Vec<Sums>>>) {
        let sums = Arc::new(Mutex::default());
        let head = Self {
            pass,
            targets,
            sums: sums.clone(),
            dx: Mutex::new(None),
        };
        (head, sums)
    }
}

impl CustomOp1 for Head {
    fn name(&self) -> &'static str {
        "head"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = elements(x, layout)?;
        let pass = &*self.pass;
        let (norm, buffers) = (&pass.fused.parameters.norm, &pass.fused.buffers);
        let mut hidden = buffers.take(x.len());
        let mut stats = vec![[0.0; 2]; pass.rows()];
        pass.norm_forward(norm, &mut hidden, &mut stats, x);
        let mut dhidden = buffers.take(hidden.len());
        let losses = project(pass, &hidden, &self.targets, Some(&mut dhidden), &mut []);
        let mut dx = buffers.take(x.len());
        dx.fill(0.0);
        let mut partials = buffers.take(pass.partials(norm, pass.samples));
        pass.norm_backward(norm, &mut dx, &mut partials, (&dhidden, x, &stats));
        pass.norm_gradient(norm, &partials);
        for buffer in [hidden, dhidden, partials] {
            buffers.give(buffer);
        }
        *self.dx.lock().expect("no panic while saving") = Some(dx);
        let sums = pass.lanes.each().map(|(rows, _)| Sums {
            loss: losses[rows.clone()].iter().sum(),
            weight: self.targets.weights[rows]
                .iter()
                .map(|&w| f64::from(w))
                .sum(),
        });
        let sums: Vec<Sums> = sums.collect();
        let loss = sums.iter().map(|sums| sums.loss).sum::<f64>() as f32;
        *self.sums.lock().expect("no panic while saving") = sums;
        Ok((CpuStorage::F32(vec![loss]), Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, _loss: &Tensor, _one: &Tensor) -> Result<Option<Tensor>> {
        match self.dx.lock().expect("no panic while saving").take() {
            Some(dx) => Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)),
            None => candle_core::bail!("backward of the head ran twice"),
        }
    }
}

fn shape(pass: &Pass) -> linear::Shape {
    let m = &pass.fused.model;
    linear::Shape {
        inputs: m.hidden_size,
        outputs: m.outputs(),
        order: WeightOrder::OutputsFirst,
        precision: pass.fused.precision,
    }
}

/// Projects normalised rows and scores them, as many at a time as may be alive; returns the loss of each. With
/// `dhidden`, also fills it and begins the gradient of the head; without, counts what rows were taken for, see [`count`].
fn project(
    pass: &Pass,
    hidden: &[f32],
    targets: &Targets,
    mut dhidden: Option<&mut [f32]>,
    confusion: &mut [u64],
) -> Vec<f64> {
    let (shape, width) = (shape(pass), pass.width());
    let range = pass.fused.parameters.head.clone();
    let head = &pass.params[range.clone()];
    let rows = targets.tokens.len();
    let chunk = (LOGITS_ALIVE / shape.outputs).clamp(1, rows);
    let mut losses = vec![0.0f64; rows];
    let mut logits = pass.fused.buffers.take(chunk * shape.outputs);
    for start in (0..rows).step_by(chunk) {
        let rows = start..(start + chunk).min(rows);
        let columns = rows.start * width..rows.end * width;
        let hidden = &hidden[columns.clone()];
        let logits = &mut logits[..rows.len() * shape.outputs];
        linear::forward(shape, logits, hidden, head, None, None);
        cross_entropy::forward(
            logits,
            shape.outputs,
            &targets.tokens[rows.clone()],
            &targets.weights[rows.clone()],
            &mut losses[rows.clone()],
            dhidden.is_some(),
        );
        let Some(dhidden) = dhidden.as_deref_mut() else {
            count(
                confusion,
                logits,
                &targets.tokens[rows.clone()],
                &targets.weights[rows],
            );
            continue;
        };
        linear::backward_input(shape, &mut dhidden[columns], logits, head);
        if !pass.trains(&range) {
            continue;
        }
        let whole = rows.len() == pass.rows();
        let part = Lanes::of(Node::leaf(0), rows.len());
        let lanes = if whole { &pass.lanes } else { &part };
        let fresh = pass.fresh && rows.start == 0;
        let dw = &mut pass.gradient()[range.clone()];
        let embedding = &pass.fused.parameters.embedding;
        let mut apart =
            (lanes.count() > 1 && pass.trains(embedding)).then(|| TokenRows::begin(pass));
        match &mut apart {
            Some(apart) if *embedding == range => {
                let hidden = Matrix::new(hidden, rows.len(), width);
                let logits = Matrix::new(logits, rows.len(), shape.outputs);
                let kept = apart.kept();
                gemm::gradient_keeping(dw, logits, hidden, lanes, kept, shape.precision);
            }
            _ => linear::backward_weight(shape, dw, hidden, logits, lanes, fresh),
        }
        *pass.rows_of_tokens.lock().expect("no panic while saving") = apart;
    }
    pass.fused.buffers.give(logits);
    losses
}

/// The sums of rows that left the last block.
pub fn score(pass: &Pass, x: &[f32], targets: &Targets) -> Scores {
    let hidden = normalised(pass, x);
    let mut confusion = empty_confusion(&pass.fused.model);
    let losses = project(pass, &hidden, targets, None, &mut confusion);
    pass.fused.buffers.give(hidden);
    Scores {
        sums: Sums {
            loss: losses.iter().sum(),
            weight: targets.weights.iter().map(|&w| f64::from(w)).sum(),
        },
        confusion,
    }
}

/// A table without a sample: of a classifier labels by labels, of a language model none.
pub fn empty_confusion(model: &ModelConfig) -> Vec<u64> {
    vec![0; model.labels.len() * model.labels.len()]
}

/// Counts in `confusion`, unless it is empty, each row that counts: by its target, and by the largest of its logits.
pub fn count(confusion: &mut [u64], logits: &[f32], targets: &[u32], weights: &[f32]) {
    if confusion.is_empty() {
        return;
    }
    let labels = logits.len() / targets.len();
    let rows = logits.chunks_exact(labels).zip(targets).zip(weights);
    for ((row, &target), _) in rows.filter(|(_, weight)| **weight != 0.0) {
        let best = (0..labels).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        confusion[target as usize * labels + best] += 1;
    }
}

/// The logits of rows that left the last block.
pub fn logits(pass: &Pass, x: &[f32]) -> Vec<f32> {
    let hidden = normalised(pass, x);
    let mut logits = vec![0.0; x.len() / pass.width() * pass.fused.model.outputs()];
    linear::forward(
        shape(pass),
        &mut logits,
        &hidden,
        &pass.params[pass.fused.parameters.head.clone()],
        None,
        None,
    );
    pass.fused.buffers.give(hidden);
    logits
}

fn normalised(pass: &Pass, x: &[f32]) -> Vec<f32> {
    let mut hidden = pass.fused.buffers.take(x.len());
    let mut stats = vec![[0.0; 2]; x.len() / pass.width()];
    pass.norm_forward(&pass.fused.parameters.norm, &mut hidden, &mut stats, x);
    hidden
}
