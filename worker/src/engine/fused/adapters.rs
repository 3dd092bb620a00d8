//! Low-rank adapters (Hu et al., arXiv 2106.09685) beside the linear layers of a block: `y += s · B A drop(x)`.
//!
//! Backward: with `u = s · dy B`, `dx += drop(u A)`, `dA = uᵀ drop(x)`, `dB = s · dyᵀ (A drop(x))`. What is as narrow as the
//! rank is computed again in backward, not kept.

use super::Pass;
use crate::engine::ops::{linear, simd};
use crate::engine::parameters::{Adapter, Linear};

/// The rows of some samples: the first sample, and how many.
type Samples = (usize, usize);

impl Pass {
    /// Adds what the adapters of a layer make of `x` to `y`, both rows of some samples.
    pub fn adapt(&self, layer: &Linear, y: &mut [f32], x: &[f32], samples: Samples) {
        for adapter in &layer.adapters {
            let (shape_b, b) = (adapter.b.0, &self.params[adapter.b.1.clone()]);
            let dropped = self.dropped(adapter, x, samples);
            let narrow = self.narrow(adapter, dropped.as_deref().unwrap_or(x));
            let mut wide = self.take(narrow.len() / shape_b.inputs * shape_b.outputs);
            linear::forward(shape_b, &mut wide, &narrow, b, None, None);
            self.add_columns(adapter, y, layer.shape.outputs, &wide);
            self.give_all([wide, narrow], dropped);
        }
    }

    /// Adds the gradient through the adapters of a layer to `dx`, from that of its output.
    pub fn adapt_backward(&self, layer: &Linear, dx: &mut [f32], dy: &[f32], samples: Samples) {
        for adapter in &layer.adapters {
            let (shape_a, a) = (adapter.a.0, &self.params[adapter.a.1.clone()]);
            let dwide = self.columns(adapter, dy, layer.shape.outputs);
            let dnarrow = self.narrow_gradient(adapter, &dwide);
            let mut through = self.take(dx.len());
            linear::backward_input(shape_a, &mut through, &dnarrow, a);
            self.drop_rows(adapter, &mut through, samples);
            simd::add(dx, &through);
            self.give_all([dwide, dnarrow, through], None);
        }
    }

    /// Takes the gradients of the adapters of a layer, from all rows of its input and of its output's gradient.
    pub fn adapter_gradients(&self, layer: &Linear, x: &[f32], dy: &[f32]) {
        for adapter in &layer.adapters {
            let dropped = self.dropped(adapter, x, (0, self.samples));
            let x = dropped.as_deref().unwrap_or(x);
            let narrow = self.narrow(adapter, x);
            let dwide = self.columns(adapter, dy, layer.shape.outputs);
            let dnarrow = self.narrow_gradient(adapter, &dwide);
            let mut gradient = self.gradient();
            let ((shape_a, a), (shape_b, b)) = (adapter.a.clone(), adapter.b.clone());
            let (lanes, fresh) = (&self.lanes, self.fresh);
            linear::backward_weight(shape_a, &mut gradient[a], x, &dnarrow, lanes, fresh);
            linear::backward_weight(shape_b, &mut gradient[b], &narrow, &dwide, lanes, fresh);
            drop(gradient);
            self.give_all([narrow, dwide, dnarrow], dropped);
        }
    }

    /// `A x`, `[rows, rank]`.
    fn narrow(&self, adapter: &Adapter, x: &[f32]) -> Vec<f32> {
        let (shape, a) = (adapter.a.0, &self.params[adapter.a.1.clone()]);
        let mut narrow = self.take(x.len() / shape.inputs * shape.outputs);
        linear::forward(shape, &mut narrow, x, a, None, None);
        narrow
    }

    /// `s · dy B`, `[rows, rank]`, from the scaled gradient of the adapter's columns.
    fn narrow_gradient(&self, adapter: &Adapter, dwide: &[f32]) -> Vec<f32> {
        let (shape, b) = (adapter.b.0, &self.params[adapter.b.1.clone()]);
        let mut dnarrow = self.take(dwide.len() / shape.outputs * shape.inputs);
        linear::backward_input(shape, &mut dnarrow, dwide, b);
        dnarrow
    }

    /// The adapter's columns of `dy`, scaled, `[rows, outputs]`.
    fn columns(&self, adapter: &Adapter, dy: &[f32], width: usize) -> Vec<f32> {
        let columns = adapter.columns.clone();
        let mut own = self.take(dy.len() / width * columns.len());
        let rows = own
            .chunks_exact_mut(columns.len())
            .zip(dy.chunks_exact(width));
        for (own, row) in rows {
            own.copy_from_slice(&row[columns.clone()]);
        }
        simd::scale(&mut own, self.fused.adapter_scale);
        own
    }

    /// Adds `wide`, scaled, to the adapter's columns of `y`.
    fn add_columns(&self, adapter: &Adapter, y: &mut [f32], width: usize, wide: &[f32]) {
        let (columns, scale) = (adapter.columns.clone(), self.fused.adapter_scale);
        let rows = y
            .chunks_exact_mut(width)
            .zip(wide.chunks_exact(columns.len()));
        for (row, wide) in rows {
            for (y, wide) in row[columns.clone()].iter_mut().zip(wide) {
                *y += scale * wide;
            }
        }
    }

    /// A copy of `x` with some elements dropped; `None` where nothing is.
    fn dropped(&self, adapter: &Adapter, x: &[f32], samples: Samples) -> Option<Vec<f32>> {
        self.masks_of(adapter.place, self.fused.adapter_dropout)?;
        let mut dropped = self.take(x.len());
        dropped.copy_from_slice(x);
        self.drop_rows(adapter, &mut dropped, samples);
        Some(dropped)
    }

    /// Drops elements of rows that go into an adapter, or of their gradient.
    fn drop_rows(&self, adapter: &Adapter, rows: &mut [f32], (first, samples): Samples) {
        let masks = self.masks_of(adapter.place, self.fused.adapter_dropout);
        if let Some(masks) = self.masks_from(&masks, first) {
            masks.apply(rows, rows.len() / samples);
        }
    }

    fn take(&self, len: usize) -> Vec<f32> {
        self.fused.buffers.take(len)
    }

    fn give_all<const N: usize>(&self, buffers: [Vec<f32>; N], more: Option<Vec<f32>>) {
        for buffer in buffers.into_iter().chain(more) {
            self.fused.buffers.give(buffer);
        }
    }
}
