//! The operations of training as formulas of candle's own operations: what the kernels of the CPU and of the GPU are
//! compared with.

use candle_core::{D, Result, Tensor};
use cohort_common::spec::Precision;

use super::super::ops::norm;
use super::{Places, Table};

/// `x W` of `[rows, inputs]` with W `[inputs, outputs]`, or `x Wᵀ` with W `[outputs, inputs]`. Always in single precision.
pub fn product(x: &Tensor, w: &Tensor, transposed: bool, _: Precision) -> Result<Tensor> {
    match transposed {
        true => x.matmul(&w.t()?),
        false => x.matmul(w),
    }
}

/// The rows `ids` of a table `[rows, width]`; `rows` are the same ids.
pub fn embedding(table: &Tensor, ids: &Tensor, _rows: &[u32]) -> Result<Tensor> {
    table.index_select(ids, 0)
}

/// `x + b` for each row.
pub fn bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.broadcast_add(bias)
}

/// RMSNorm or LayerNorm of each row, times `weight`.
pub fn norm(x: &Tensor, weight: &Tensor, kind: norm::Kind, eps: f32) -> Result<Tensor> {
    let centred = match kind {
        norm::Kind::Rms => x.clone(),
        norm::Kind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
    };
    let square = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normal = centred.broadcast_div(&(square + f64::from(eps))?.sqrt()?)?;
    normal.broadcast_mul(weight)
}

/// Attention of queries, keys and values, `[samples, heads, length, dim]` each: softmax of the scores times `scale`, over
/// the keys that a query may see, times `factors` of dropout.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    places: &Places,
    scale: f32,
    factors: Option<&Tensor>,
) -> Result<Tensor> {
    let scores = (q.matmul(&k.t()?)? * f64::from(scale))?.broadcast_add(&places.hidden)?;
    let exps = scores
        .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
        .exp()?;
    let mut p = exps.broadcast_div(&exps.sum_keepdim(D::Minus1)?)?;
    if let Some(factors) = factors {
        p = (p * factors)?;
    }
    p.matmul(v)
}

/// Rotary embedding of `[samples, heads, length, dim]`.
pub fn rotate(x: &Tensor, places: &Places, table: &Table) -> Result<Tensor> {
    let (samples, _, length, dim) = x.dims4()?;
    let half = dim / 2;
    let turns = |table: &Tensor| {
        let rows = table.index_select(&places.positions, 0)?;
        rows.reshape((samples, 1, length, half))
    };
    let (cos, sin) = (turns(&table.cos)?, turns(&table.sin)?);
    let (a, b) = (
        x.narrow(D::Minus1, 0, half)?,
        x.narrow(D::Minus1, half, half)?,
    );
    let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[low, high], D::Minus1)?.contiguous()
}

/// `silu(gate) · up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    (gate / (gate.neg()?.exp()? + 1.0)?)? * up
}

/// GELU by tanh.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    let z = ((x + (x.powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
    (x * 0.5)? * (z.tanh()? + 1.0)?
}

/// `weight · nll` of each row of logits `[rows, outputs]`.
pub fn losses(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sums = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let nll = (log_sums - shifted.gather(&targets.unsqueeze(1)?, 1)?)?;
    nll.squeeze(1)?.mul(weights)
}
