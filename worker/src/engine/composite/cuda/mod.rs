//! The operations of training on a GPU: kernels of our own (`kernels.cu`, compiled when this crate is built) and cuBLAS,
//! as candle operations with a backward. Each computes what its namesake in [`super::plain`] says; everything that lies
//! between them is candle's.
//!
//! **Invariant:** bits depend on shapes and on the GPU's kind alone. No kernel adds with atomics.

mod fingerprint;
mod kernel;
mod product;
mod staging;

pub use fingerprint::fingerprint;
pub use product::product;
pub use staging::Staging;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::{CudaDevice, Result, Tensor};

use super::super::ops::norm;
use super::{Places, Table};
use kernel::{Blocks, Kernel, Params, node};

/// Makes a GPU ready to train: memory that was freed is kept for the next step, as the driver would give it back at each
/// wait and map it anew; and as all work goes to one stream, nobody notes which tensor waits for which.
pub fn prepare(gpu: &CudaDevice) -> Result<()> {
    let stream = gpu.cuda_stream();
    // SAFETY: the device is open, and the attribute is a u64. One stream does everything in order.
    unsafe {
        let pool = result::device::get_default_mem_pool(stream.context().cu_device()).w()?;
        let mut keep = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast()).w()?;
        gpu.disable_event_tracking();
    }
    Ok(())
}

/// [`super::plain::embedding`].
pub fn embedding(table: &Tensor, ids: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let params = matrix(table)?;
    let device = table.device();
    // The rows of each id, one id after the other: what adds up in one row of the table.
    let mut ends = vec![0u32; params.rows as usize + 1];
    rows.iter().for_each(|&id| ends[id as usize + 1] += 1);
    for id in 1..ends.len() {
        ends[id] += ends[id - 1];
    }
    let mut next = ends.clone();
    let mut order = vec![0u32; rows.len()];
    for (row, &id) in (0u32..).zip(rows) {
        order[next[id as usize] as usize] = row;
        next[id as usize] += 1;
    }
    let ends = Tensor::from_vec(ends, params.rows as usize + 1, device)?;
    let order = Tensor::from_vec(order, rows.len(), device)?;
    let out = table.detach().index_select(ids, 0)?;
    node("embedding", &[table], out, move |args, g| {
        let kernel = Kernel::new("embedding_backward", args[0], Blocks::Rows, params);
        Ok(vec![kernel.run(&[g, &ends, &order])?])
    })
}

/// [`super::plain::bias`].
pub fn bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let params = matrix(x)?;
    let out = Kernel::new("bias_forward", x, Blocks::Elements, params).run(&[x, bias])?;
    node("bias", &[x, bias], out, move |args, g| {
        let sums = Kernel::new("column_sums", args[1], Blocks::Columns, params);
        Ok(vec![g.clone(), sums.run(&[g])?])
    })
}

/// [`super::plain::norm`].
pub fn norm(x: &Tensor, weight: &Tensor, kind: norm::Kind, eps: f32) -> Result<Tensor> {
    let params = Params {
        a: i32::from(kind == norm::Kind::Layer),
        x: eps,
        ..matrix(x)?
    };
    let rows = params.rows as usize;
    let stats = Kernel::of_shape("norm_stats", (rows, 2), Blocks::Rows, params).run(&[x])?;
    let kernel = Kernel::new("norm_forward", x, Blocks::Rows, params);
    let out = kernel.run(&[x, weight, &stats])?;
    node("norm", &[x, weight], out, move |args, g| {
        let (x, weight) = (args[0], args[1]);
        let dx = Kernel::new("norm_backward", x, Blocks::Rows, params);
        let dw = Kernel::new("norm_weight", weight, Blocks::Columns, params);
        Ok(vec![
            dx.run(&[x, weight, &stats, g])?,
            dw.run(&[x, &stats, g])?,
        ])
    })
}

/// [`super::plain::attention`].
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    places: &Places,
    scale: f32,
    factors: Option<&Tensor>,
) -> Result<Tensor> {
    let (samples, heads, length, _) = q.dims4()?;
    let params = Params {
        rows: int(samples * heads * length)?,
        cols: int(length)?,
        a: int(heads)?,
        x: scale,
        ..Params::default()
    };
    let starts = places.starts.clone();
    let softmax = move |name, like: &Tensor| Kernel::new(name, like, Blocks::Rows, params);
    let (seen_q, seen_k, seen_v) = (q.detach(), k.detach(), v.detach());
    let scores = seen_q.matmul(&seen_k.t()?)?;
    let p = softmax("softmax_forward", &scores).run(&[&scores, &starts])?;
    drop(scores);
    let factors = factors.cloned();
    let dropped = |p: &Tensor, factors: &Option<Tensor>| match factors {
        Some(factors) => p * factors,
        None => Ok(p.clone()),
    };
    let out = dropped(&p, &factors)?.matmul(&seen_v)?;
    node("attention", &[q, k, v], out, move |args, g| {
        let (q, k, v) = (args[0], args[1], args[2]);
        let g = g.contiguous()?;
        let dv = dropped(&p, &factors)?.t()?.matmul(&g)?;
        let dp = dropped(&g.matmul(&v.t()?)?, &factors)?;
        let ds = softmax("softmax_backward", &p).run(&[&p, &starts, &dp])?;
        Ok(vec![ds.matmul(k)?, ds.t()?.matmul(q)?, dv])
    })
}

/// [`super::plain::rotate`].
pub fn rotate(x: &Tensor, places: &Places, table: &Table) -> Result<Tensor> {
    let (_, heads, length, _) = x.dims4()?;
    let params = Params {
        a: int(heads)?,
        b: int(length)?,
        ..matrix(x)?
    };
    let turns = [
        places.positions.clone(),
        table.cos.clone(),
        table.sin.clone(),
    ];
    let turn = move |x: &Tensor, sign| {
        let params = Params { x: sign, ..params };
        let [positions, cos, sin] = &turns;
        Kernel::new("rotate", x, Blocks::Pairs, params).run(&[x, positions, cos, sin])
    };
    let out = turn(x, 1.0)?;
    node("rotate", &[x], out, move |_, g| Ok(vec![turn(g, -1.0)?]))
}

/// [`super::plain::gelu`].
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    let params = elements(x)?;
    let out = Kernel::new("gelu_forward", x, Blocks::Elements, params).run(&[x])?;
    node("gelu", &[x], out, move |args, g| {
        let kernel = Kernel::new("gelu_backward", g, Blocks::Elements, params);
        Ok(vec![kernel.run(&[args[0], g])?])
    })
}

/// [`super::plain::swiglu`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let params = elements(gate)?;
    let kernel = Kernel::new("swiglu_forward", gate, Blocks::Elements, params);
    let out = kernel.run(&[gate, up])?;
    node("swiglu", &[gate, up], out, move |args, g| {
        let kernel = |name| Kernel::new(name, g, Blocks::Elements, params);
        Ok(vec![
            kernel("swiglu_gate").run(&[args[0], args[1], g])?,
            kernel("swiglu_up").run(&[args[0], g])?,
        ])
    })
}

/// [`super::plain::losses`].
pub fn losses(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let params = matrix(logits)?;
    let (targets, weights) = (targets.clone(), weights.clone());
    let rows = params.rows as usize;
    let kernel = Kernel::of_shape("loss_forward", rows, Blocks::Rows, params);
    let out = kernel.run(&[logits, &targets, &weights])?;
    node("losses", &[logits], out, move |args, g| {
        let kernel = Kernel::new("loss_backward", args[0], Blocks::Rows, params);
        Ok(vec![kernel.run(&[args[0], &targets, &weights, g])?])
    })
}

/// A tensor as rows of its last dimension.
fn matrix(x: &Tensor) -> Result<Params> {
    let cols = x.dims().last().copied().unwrap_or(1);
    Ok(Params {
        rows: int(x.elem_count() / cols)?,
        cols: int(cols)?,
        ..Params::default()
    })
}

/// A tensor as so many elements.
fn elements(x: &Tensor) -> Result<Params> {
    Ok(Params {
        rows: int(x.elem_count())?,
        cols: 1,
        ..Params::default()
    })
}

fn int(n: usize) -> Result<i32> {
    n.try_into().map_err(|_| {
        candle_core::Error::Msg(format!(
            "{n} elements in one tensor, but a kernel takes {} at most; use a smaller `train.micro_batch`",
            i32::MAX
        ))
    })
}
