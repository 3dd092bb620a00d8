//! Final norm, output projection and cross-entropy as one candle operation. The logits of a large vocabulary are made
//! a few rows at a time and turned into their own gradient at once, so they are never all alive: when training,
//! forward already adds the gradient of the head and keeps that of x for backward.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::{Pass, elements};
use crate::engine::ops::cross_entropy;
use crate::engine::ops::linear::{self, WeightOrder};
use crate::engine::{Batch, Sums};

/// Logits alive at a time, in elements. A constant: it decides the order of the sums over rows.
const ALIVE: usize = 1 << 23;

/// `Σ w·nll` of x, as a scalar whose gradient is 1.
pub struct Head {
    pass: Arc<Pass>,
    targets: Vec<u32>,
    weights: Vec<f32>,
    sums: Arc<Mutex<Sums>>,
    dx: Mutex<Option<Vec<f32>>>,
}

impl Head {
    /// The operation, and where it will leave the sums in full precision.
    pub fn new(pass: Arc<Pass>, batch: &Batch) -> (Self, Arc<Mutex<Sums>>) {
        let sums = Arc::new(Mutex::new(Sums::default()));
        let head = Self {
            pass,
            targets: batch.targets.clone(),
            weights: batch.weights.clone(),
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
        let norm = &pass.fused.parameters.norm;
        let (hidden, stats) = pass.norm_forward(norm, x);
        let mut dhidden = pass.fused.buffers.take(hidden.len());
        let sums = project(
            pass,
            &hidden,
            &self.targets,
            &self.weights,
            Some(&mut dhidden),
        );
        let mut dx = vec![0.0; x.len()];
        pass.norm_backward(norm, &mut dx, &dhidden, x, &stats);
        pass.fused.buffers.give(hidden);
        pass.fused.buffers.give(dhidden);
        *self.dx.lock().expect("no panic while saving") = Some(dx);
        *self.sums.lock().expect("no panic while saving") = sums;
        Ok((CpuStorage::F32(vec![sums.loss as f32]), Shape::from(())))
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
        outputs: m.vocab_size,
        order: WeightOrder::OutputsFirst,
    }
}

/// Projects normalised rows and scores them, a chunk of rows at a time. With `dhidden`, also fills it and adds the
/// gradient of the head.
fn project(
    pass: &Pass,
    hidden: &[f32],
    targets: &[u32],
    weights: &[f32],
    mut dhidden: Option<&mut [f32]>,
) -> Sums {
    let (shape, width) = (shape(pass), pass.width());
    let range = pass.fused.parameters.head.clone();
    let head = &pass.params[range.clone()];
    let chunk = (ALIVE / shape.outputs).max(1);
    let mut losses = vec![0.0f64; targets.len()];
    let mut logits = pass
        .fused
        .buffers
        .take(chunk.min(targets.len()) * shape.outputs);
    for start in (0..targets.len()).step_by(chunk) {
        let rows = start..(start + chunk).min(targets.len());
        let columns = rows.start * width..rows.end * width;
        let hidden = &hidden[columns.clone()];
        let logits = &mut logits[..rows.len() * shape.outputs];
        linear::forward(shape, logits, hidden, head, None, None);
        let losses = &mut losses[rows.clone()];
        let (targets, weights) = (&targets[rows.clone()], &weights[rows]);
        cross_entropy::forward(
            logits,
            shape.outputs,
            targets,
            weights,
            losses,
            dhidden.is_some(),
        );
        if let Some(dhidden) = dhidden.as_deref_mut() {
            linear::backward_input(shape, &mut dhidden[columns], logits, head);
            linear::backward_weight(shape, &mut pass.gradient()[range.clone()], hidden, logits);
        }
    }
    pass.fused.buffers.give(logits);
    Sums {
        loss: losses.iter().sum(),
        weight: weights.iter().map(|&w| f64::from(w)).sum(),
    }
}

/// The sums of rows that left the last block.
pub fn score(pass: &Pass, x: &[f32], batch: &Batch) -> Sums {
    let (hidden, _) = pass.norm_forward(&pass.fused.parameters.norm, x);
    let sums = project(pass, &hidden, &batch.targets, &batch.weights, None);
    pass.fused.buffers.give(hidden);
    sums
}

/// The logits of rows that left the last block.
pub fn logits(pass: &Pass, x: &[f32]) -> Vec<f32> {
    let (hidden, _) = pass.norm_forward(&pass.fused.parameters.norm, x);
    let mut logits = vec![0.0; x.len() / pass.width() * pass.fused.model.vocab_size];
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
