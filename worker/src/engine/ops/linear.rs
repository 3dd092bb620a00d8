//! The linear layer: `y = x W + b`, with W stored as `[inputs, outputs]` (GPT-2's `Conv1D`) or `[outputs, inputs]`
//! (`torch.nn.Linear`). Backward: `dx = dy Wᵀ`, `dW += xᵀ dy`, `db += Σ_rows dy`.

use rayon::prelude::*;

use super::gemm::{Matrix, Panels, Precision, for_all_threads, gradient, matmul, multiply};
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
    /// What its products round operands to.
    pub precision: Precision,
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

/// A weight for the products of one direction.
pub struct Packed<'a> {
    shape: Shape,
    weight: Weight<'a>,
    /// Tasks of one product, roughly.
    tasks: usize,
}

enum Weight<'a> {
    /// For any number of products.
    Packed(Panels<'a>),
    /// Packed on the way, a piece at a time.
    Plain(Matrix<'a>),
}

impl Shape {
    /// Elements of a weight that is packed for `parts` products beside each other, in either direction.
    pub fn packed_len(&self, parts: usize) -> usize {
        if packed_on_the_way(parts) {
            return 0;
        }
        Panels::len(self.inputs, self.outputs, self.precision).max(Panels::len(
            self.outputs,
            self.inputs,
            self.precision,
        ))
    }

    /// Packs the weight into `out` for [`Packed::forward`], for `parts` products that run beside each other.
    pub fn pack<'a>(self, out: &'a mut [f32], weight: &'a [f32], parts: usize) -> Packed<'a> {
        self.packed(out, self.weight(weight), parts)
    }

    /// Packs the weight into `out` for [`Packed::backward`], for `parts` products that run beside each other.
    pub fn pack_backward<'a>(
        self,
        out: &'a mut [f32],
        weight: &'a [f32],
        parts: usize,
    ) -> Packed<'a> {
        self.packed(out, self.weight(weight).t(), parts)
    }

    fn packed<'a>(self, out: &'a mut [f32], weight: Matrix<'a>, parts: usize) -> Packed<'a> {
        let weight = match packed_on_the_way(parts) {
            true => Weight::Plain(weight),
            false => {
                let out = &mut out[..Panels::len(weight.rows(), weight.cols(), self.precision)];
                Weight::Packed(Panels::pack(out, weight, self.precision))
            }
        };
        Packed {
            shape: self,
            weight,
            tasks: for_all_threads().div_ceil(parts),
        }
    }
}

/// Whether a weight need not be packed before it is used: a single product does that better by itself.
fn packed_on_the_way(parts: usize) -> bool {
    parts == 1
}

impl Packed<'_> {
    /// `out = a w`, or `out += a w` if `add`; `out` has `cols` columns.
    fn multiply(&self, out: &mut [f32], cols: usize, a: Matrix, add: bool) {
        match &self.weight {
            Weight::Packed(panels) => multiply(out, cols, a, panels, add, self.tasks),
            Weight::Plain(weight) => matmul(out, a, *weight, add, self.shape.precision),
        }
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
        self.multiply(y, outputs, x, add);
    }

    /// `dx = dy Wᵀ`.
    pub fn backward(&self, dx: &mut [f32], dy: &[f32]) {
        let Shape {
            inputs, outputs, ..
        } = self.shape;
        let dy = Matrix::new(dy, dy.len() / outputs, outputs);
        self.multiply(dx, inputs, dy, false);
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
    matmul(y, x, shape.weight(weight), add, shape.precision);
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
    matmul(dx, dy, shape.weight(weight).t(), false, shape.precision);
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
        WeightOrder::InputsFirst => gradient(dw, x, dy, lanes, fresh, shape.precision),
        WeightOrder::OutputsFirst => gradient(dw, dy, x, lanes, fresh, shape.precision),
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
                precision: Precision::F32,
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
    fn a_weight_that_is_packed_on_the_way_gives_the_same_bits() {
        for precision in [Precision::F32, Precision::Bf16] {
            let shape = Shape {
                inputs: 300,
                outputs: 3600,
                order: WeightOrder::OutputsFirst,
                precision,
            };
            assert_eq!(shape.packed_len(1), 0);
            let (x, w) = (random(7 * 300, 1), random(300 * 3600, 2));
            let dy = random(7 * 3600, 3);
            let [on_the_way, before] = [1, 2].map(|parts| {
                let mut packed = vec![0.0; shape.packed_len(parts)];
                let (mut y, mut dx) = (vec![f32::NAN; 7 * 3600], vec![f32::NAN; 7 * 300]);
                shape
                    .pack(&mut packed, &w, parts)
                    .forward(&mut y, &x, None, None);
                shape
                    .pack_backward(&mut packed, &w, parts)
                    .backward(&mut dx, &dy);
                (y, dx)
            });
            assert!(on_the_way == before, "{precision:?}");
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
                    precision: Precision::F32,
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
