//! The linear layer: `y = x W + b`, with W stored as `[inputs, outputs]` (GPT-2's `Conv1D`) or `[outputs, inputs]`
//! (`torch.nn.Linear`). Backward: `dx = dy Wᵀ`, `dW += xᵀ dy`, `db += Σ_rows dy`.

use rayon::prelude::*;

use super::ROW_BLOCK;
use super::matmul::{Matrix, Threads, matmul};
use super::simd;

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

/// `y = x W + b (+ residual)`: x is `[rows, inputs]`, y and the residual are `[rows, outputs]`.
pub fn forward(
    shape: Shape,
    y: &mut [f32],
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
) {
    let rows = x.len() / shape.inputs;
    let start = match (bias, residual) {
        (None, None) => false,
        (bias, residual) => {
            fill(y, shape.outputs, bias, residual);
            true
        }
    };
    matmul(
        y,
        Matrix::new(x, rows, shape.inputs),
        shape.weight(weight),
        1.0,
        start,
        Threads::Pool,
    );
}

/// Sets each row of y to the bias, the residual's row, or their sum.
fn fill(y: &mut [f32], outputs: usize, bias: Option<&[f32]>, residual: Option<&[f32]>) {
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
}

/// `dx = dy Wᵀ`.
pub fn backward_input(shape: Shape, dx: &mut [f32], dy: &[f32], weight: &[f32]) {
    let rows = dy.len() / shape.outputs;
    matmul(
        dx,
        Matrix::new(dy, rows, shape.outputs),
        shape.weight(weight).t(),
        1.0,
        false,
        Threads::Pool,
    );
}

/// `dW += xᵀ dy`, in the weight's own order.
pub fn backward_weight(shape: Shape, dw: &mut [f32], x: &[f32], dy: &[f32]) {
    let rows = dy.len() / shape.outputs;
    let (x, dy) = (
        Matrix::new(x, rows, shape.inputs),
        Matrix::new(dy, rows, shape.outputs),
    );
    match shape.order {
        WeightOrder::InputsFirst => matmul(dw, x.t(), dy, 1.0, true, Threads::Pool),
        WeightOrder::OutputsFirst => matmul(dw, dy.t(), x, 1.0, true, Threads::Pool),
    }
}

/// `db += Σ_rows dy`.
pub fn backward_bias(db: &mut [f32], dy: &[f32]) {
    let width = db.len();
    let partials: Vec<Vec<f32>> = dy
        .par_chunks(ROW_BLOCK * width)
        .map(|block| {
            let mut sum = vec![0.0; width];
            block
                .chunks_exact(width)
                .for_each(|row| simd::add(&mut sum, row));
            sum
        })
        .collect();
    for partial in &partials {
        simd::add(db, partial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::testing::{check_gradient, random, weigh};

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
            backward_weight(shape, &mut dw, &x, &dy);
            backward_bias(&mut db, &dy);
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
