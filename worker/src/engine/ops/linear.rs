//! The linear layer: `y = x W + b`, with W stored as `[inputs, outputs]` (GPT-2's `Conv1D`) or `[outputs, inputs]`
//! (`torch.nn.Linear`). Backward: `dx = dy Wᵀ`, `dW += xᵀ dy`, `db += Σ_rows dy`.

use rayon::prelude::*;

use super::gemm::{Matrix, Panels, for_all_threads, gradient, matmul, multiply};
use super::lanes::Lanes;
use super::{ROW_BLOCK, simd};

/// How the weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightOrder {
    /// `[inputs, outputs]`.
    InputsFirst,
    /// `[outputs, inputs]`.
    OutputsFirst,
}

/// The sizes of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Width of a row of x.
    pub inputs: usize,
    /// Width of a row of y.
    pub outputs: usize,
    /// Order of the weight.
    pub order: WeightOrder,
}

impl Shape {
    /// The weight as an `[inputs, outputs]` matrix.
    fn weight<'a>(&self, weight: &'a [f32]) -> Matrix<'a> {
        match self.order {
            WeightOrder::InputsFirst => Matrix::new(weight, self.inputs, self.outputs),
            WeightOrder::OutputsFirst => Matrix::new(weight, self.outputs, self.inputs).t(),
        }
    }
}

/// A weight in panels, for the products of one direction.
pub struct Packed<'a> {
    shape: Shape,
    panels: Panels<'a>,
    /// Tasks of one product, roughly.
    tasks: usize,
}

impl Shape {
    /// Elements of a packed weight, in either direction.
    pub fn packed_len(&self) -> usize {
        Panels::len(self.inputs, self.outputs).max(Panels::len(self.outputs, self.inputs))
    }

    /// Packs the weight for [`Packed::forward`].
    pub fn pack<'a>(self, out: &'a mut [f32], weight: &[f32]) -> Packed<'a> {
        let out = &mut out[..Panels::len(self.inputs, self.outputs)];
        let panels = Panels::pack(out, self.weight(weight));
        Packed {
            shape: self,
            panels,
            tasks: for_all_threads(),
        }
    }

    /// Packs the weight for [`Packed::backward`].
    pub fn pack_backward<'a>(self, out: &'a mut [f32], weight: &[f32]) -> Packed<'a> {
        let out = &mut out[..Panels::len(self.outputs, self.inputs)];
        let panels = Panels::pack(out, self.weight(weight).t());
        Packed {
            shape: self,
            panels,
            tasks: for_all_threads(),
        }
    }
}

impl Packed<'_> {
    /// The same weight for products that run `parts` at a time, beside each other.
    pub fn shared_by(self, parts: usize) -> Self {
        let tasks = self.tasks.div_ceil(parts);
        Self { tasks, ..self }
    }

    /// `y = x W + b (+ residual)`: x is `[rows, inputs]`, y and the residual are `[rows, outputs]`.
    pub fn forward(
        &self,
        y: &mut [f32],
        x: &[f32],
        bias: Option<&[f32]>,
        residual: Option<&[f32]>,
    ) {
        let Shape {
            inputs, outputs, ..
        } = self.shape;
        let add = fill(y, outputs, bias, residual);
        let x = Matrix::new(x, x.len() / inputs, inputs);
        multiply(y, outputs, x, &self.panels, add, self.tasks);
    }

    /// `dx = dy Wᵀ`.
    pub fn backward(&self, dx: &mut [f32], dy: &[f32]) {
        let Shape {
            inputs, outputs, ..
        } = self.shape;
        let dy = Matrix::new(dy, dy.len() / outputs, outputs);
        multiply(dx, inputs, dy, &self.panels, false, self.tasks);
    }
}

/// [`Packed::forward`] with a weight that is packed on the way, a piece at a time.
pub fn forward(
    shape: Shape,
    y: &mut [f32],
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
) {
    let add = fill(y, shape.outputs, bias, residual);
    let x = Matrix::new(x, x.len() / shape.inputs, shape.inputs);
    matmul(y, x, shape.weight(weight), add);
}

/// Sets each row of y to the bias, the residual's row, or their sum; `false` if there is neither.
fn fill(y: &mut [f32], outputs: usize, bias: Option<&[f32]>, residual: Option<&[f32]>) -> bool {
    if bias.is_none() && residual.is_none() {
        return false;
    }
    let block = ROW_BLOCK * outputs;
    y.par_chunks_mut(block).enumerate().for_each(|(index, y)| {
        if let Some(residual) = residual {
            y.copy_from_slice(&residual[index * block..index * block + y.len()]);
        }
        let Some(bias) = bias else { return };
        for row in y.chunks_exact_mut(outputs) {
            match residual {
                Some(_) => simd::add(row, bias),
                None => row.copy_from_slice(bias),
            }
        }
    });
    true
}

/// `dx = dy Wᵀ`, with a weight that is packed on the way.
pub fn backward_input(shape: Shape, dx: &mut [f32], dy: &[f32], weight: &[f32]) {
    let dy = Matrix::new(dy, dy.len() / shape.outputs, shape.outputs);
    matmul(dx, dy, shape.weight(weight).t(), false);
}

/// `dW = xᵀ dy` over the lanes' rows, in the weight's own order; added to what is there without `fresh`.
pub fn backward_weight(
    shape: Shape,
    dw: &mut [f32],
    x: &[f32],
    dy: &[f32],
    lanes: &Lanes,
    fresh: bool,
) {
    let x = Matrix::new(x, lanes.rows(), shape.inputs);
    let dy = Matrix::new(dy, lanes.rows(), shape.outputs);
    match shape.order {
        WeightOrder::InputsFirst => gradient(dw, x, dy, lanes, fresh),
        WeightOrder::OutputsFirst => gradient(dw, dy, x, lanes, fresh),
    }
}

/// `db = Σ_rows dy` over the lanes' rows; added to what is there without `fresh`.
pub fn backward_bias(db: &mut [f32], dy: &[f32], lanes: &Lanes, fresh: bool) {
    let width = db.len();
    lanes.sum(db, fresh, |rows, db| {
        for row in dy[rows.start * width..rows.end * width].chunks_exact(width) {
            simd::add(db, row);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::{check_gradient, random, weigh};
    use cohort_common::tree::Node;

    const ROWS: usize = 70;

    #[test]
    fn gradients_agree_with_finite_differences_in_both_orders() {
        for order in [WeightOrder::InputsFirst, WeightOrder::OutputsFirst] {
            let shape = Shape {
                inputs: 6,
                outputs: 9,
                order,
            };
            let (x, w, b) = (random(ROWS * 6, 1), random(54, 2), random(9, 3));
            let (residual, dy) = (random(ROWS * 9, 4), random(ROWS * 9, 5));
            let loss = |x: &[f32], w: &[f32], b: &[f32]| {
                let mut y = vec![f32::NAN; ROWS * 9];
                forward(shape, &mut y, x, w, Some(b), Some(&residual));
                weigh(&y, &dy)
            };
            let (mut dx, mut dw, mut db) = (
                vec![f32::NAN; x.len()],
                vec![0.0; w.len()],
                vec![0.0; b.len()],
            );
            backward_input(shape, &mut dx, &dy, &w);
            let lanes = Lanes::of(Node::leaf(0), ROWS);
            backward_weight(shape, &mut dw, &x, &dy, &lanes, true);
            backward_bias(&mut db, &dy, &lanes, true);
            check_gradient(&x, &dx, 17, |x| loss(x, &w, &b));
            check_gradient(&w, &dw, 5, |w| loss(&x, w, &b));
            check_gradient(&b, &db, 1, |b| loss(&x, &w, b));
        }
    }

    #[test]
    fn the_two_orders_are_transposes_of_each_other() {
        let (x, w) = (random(ROWS * 4, 1), random(12, 2));
        let transposed: Vec<f32> = (0..12).map(|i| w[(i % 4) * 3 + i / 4]).collect();
        let run = |order, w: &[f32]| {
            let mut y = vec![0.0; ROWS * 3];
            forward(
                Shape {
                    inputs: 4,
                    outputs: 3,
                    order,
                },
                &mut y,
                &x,
                w,
                None,
                None,
            );
            y
        };
        let (a, b) = (
            run(WeightOrder::InputsFirst, &w),
            run(WeightOrder::OutputsFirst, &transposed),
        );
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}
