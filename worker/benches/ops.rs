//! Micro-benchmarks of the engine's operations, forward and backward together, each beside the same from candle's own
//! operations, and beside what the machine can do at most.
//!
//! ```text
//! cargo bench -p cohort-worker --bench ops [-- FILTER]
//! ```
//!
//! The shapes are those of model B of `BENCHMARKS.md`: 4 samples of 256 tokens, 384 wide, 6 heads, 4096 tokens. The
//! throughput of products is in floating-point operations, that of all else in bytes that must be read and written at
//! least; so `limit/multiply-add` bounds the first and `limit/copy` the second.

use std::hint::black_box;

use candle_core::{D, DType, Device, Tensor, Var};
use cohort_common::tree::Node;
use cohort_worker::engine::ops::attention::{self, Inputs, Saved};
use cohort_worker::engine::ops::gemm::Precision;
use cohort_worker::engine::ops::lanes::Lanes;
use cohort_worker::engine::ops::linear::{self, WeightOrder};
use cohort_worker::engine::ops::{activation, cross_entropy, embedding, norm};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use rayon::prelude::*;

/// The allocator of the `cohort` binary, so that candle's side has it too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SAMPLES: usize = 4;
const LENGTH: usize = 256;
const ROWS: usize = SAMPLES * LENGTH;
const WIDTH: usize = 384;
const HEADS: usize = 6;
const DIM: usize = WIDTH / HEADS;
const INNER: usize = 1024;
const VOCAB: usize = 4096;
const EPS: f32 = 1e-5;

/// Numbers that look random, between -1 and 1.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn tokens() -> Vec<u32> {
    (0..ROWS as u32)
        .map(|i| i * 2_654_435 % VOCAB as u32)
        .collect()
}

fn var(data: &[f32], shape: &[usize]) -> Var {
    let tensor = Tensor::from_slice(data, shape, &Device::Cpu).expect("the shape fits");
    Var::from_tensor(&tensor).expect("a leaf")
}

/// Times a composite of candle's: forward, then backward to all of its leaves.
fn composite(
    group: &mut BenchmarkGroup<'_, WallTime>,
    forward: impl Fn() -> candle_core::Result<Tensor>,
) {
    group.bench_function("candle", |b| {
        b.iter(|| {
            let y = forward().expect("the shapes fit");
            black_box(
                y.sum_all()
                    .and_then(|y| y.backward())
                    .expect("it has a gradient"),
            )
        })
    });
}

fn bytes_of(floats: usize) -> Throughput {
    Throughput::Bytes(4 * floats as u64)
}

fn linear_layer(c: &mut Criterion) {
    let (x, w, dy) = (
        numbers(ROWS * WIDTH, 1),
        numbers(WIDTH * INNER, 2),
        numbers(ROWS * INNER, 3),
    );
    let lanes = Lanes::of(Node::leaf(0), ROWS);
    let mut group = c.benchmark_group("linear");
    // y = x W, dx = dy Wᵀ, dW = xᵀ dy.
    group.throughput(Throughput::Elements((3 * 2 * ROWS * WIDTH * INNER) as u64));
    for precision in [Precision::F32, Precision::Bf16] {
        let shape = linear::Shape {
            inputs: WIDTH,
            outputs: INNER,
            order: WeightOrder::OutputsFirst,
            precision,
        };
        let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), w.clone());
        group.bench_function(format!("{precision:?}").to_lowercase(), |b| {
            b.iter(|| {
                linear::forward(shape, &mut y, &x, &w, None, None);
                linear::backward_input(shape, &mut dx, &dy, &w);
                linear::backward_weight(shape, &mut dw, &x, &dy, &lanes, true);
            })
        });
    }
    let (x, w) = (var(&x, &[ROWS, WIDTH]), var(&w, &[INNER, WIDTH]));
    composite(&mut group, || x.matmul(&w.t()?));
    group.finish();
}

fn norms(c: &mut Criterion) {
    let (x, w, dy) = (
        numbers(ROWS * WIDTH, 1),
        numbers(WIDTH, 2),
        numbers(ROWS * WIDTH, 3),
    );
    for (name, kind) in [
        ("rms-norm", norm::Kind::Rms),
        ("layer-norm", norm::Kind::Layer),
    ] {
        let mut group = c.benchmark_group(name);
        // x and y; x, dy and dx, which is added to.
        group.throughput(bytes_of(6 * ROWS * WIDTH));
        let (mut y, mut dx) = (x.clone(), vec![0.0; x.len()]);
        let mut stats = vec![norm::Stats::default(); ROWS];
        let mut partials = vec![0.0; SAMPLES * norm::partial_len(WIDTH, LENGTH, false)];
        group.bench_function("fused", |b| {
            b.iter(|| {
                norm::forward(kind, EPS, &mut y, &mut stats, &x, &w, None);
                let dims = (LENGTH, false);
                norm::backward(kind, &mut dx, &mut partials, &dy, &x, &stats, &w, dims);
            })
        });
        let (x, w) = (var(&x, &[ROWS, WIDTH]), var(&w, &[WIDTH]));
        composite(&mut group, || {
            let centred = match kind {
                norm::Kind::Rms => x.as_tensor().clone(),
                norm::Kind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
            };
            let square = centred.sqr()?.mean_keepdim(D::Minus1)?;
            let r = (square + f64::from(EPS))?.sqrt()?;
            centred.broadcast_div(&r)?.broadcast_mul(&w)
        });
        group.finish();
    }
}

fn causal_attention(c: &mut Criterion) {
    let shape = attention::Shape {
        samples: SAMPLES,
        queries: LENGTH,
        keys: LENGTH,
        heads: HEADS,
        kv_heads: HEADS,
        dim: DIM,
    };
    let packed = numbers(ROWS * shape.packed(), 1);
    let dout = numbers(ROWS * WIDTH, 2);
    let mut group = c.benchmark_group("attention");
    // Two products of forward and five of backward, over the half that is not masked.
    group.throughput(Throughput::Elements(
        (7 * 2 * SAMPLES * HEADS * LENGTH * LENGTH * DIM / 2) as u64,
    ));
    let (mut out, mut dpacked) = (dout.clone(), packed.clone());
    let mut log_sums = vec![0.0; SAMPLES * HEADS * LENGTH];
    group.bench_function("fused", |b| {
        b.iter(|| {
            let inputs = Inputs::packed(shape, &packed, &[]);
            attention::forward(shape, &mut out, &mut log_sums, inputs, None);
            let saved = Saved {
                packed: &packed,
                out: &out,
                log_sums: &log_sums,
                masks: None,
                starts: &[],
            };
            attention::backward(shape, &mut dpacked, &dout, saved);
        })
    });
    let heads = |seed| var(&numbers(ROWS * WIDTH, seed), &[SAMPLES, HEADS, LENGTH, DIM]);
    let (q, k, v) = (heads(1), heads(2), heads(3));
    let mask: Vec<f32> = (0..LENGTH * LENGTH)
        .map(|i| {
            if i % LENGTH > i / LENGTH {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    let mask = Tensor::from_slice(&mask, (LENGTH, LENGTH), &Device::Cpu).expect("it fits");
    composite(&mut group, || {
        let scores = (q.matmul(&k.t()?.contiguous()?)? / (DIM as f64).sqrt())?;
        let scores = scores.broadcast_add(&mask)?;
        candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)
    });
    group.finish();
}

fn activations(c: &mut Criterion) {
    let packed = numbers(ROWS * 2 * INNER, 1);
    let dg = numbers(ROWS * INNER, 2);
    let mut group = c.benchmark_group("swiglu");
    // Gate, up and g; the same with their gradients.
    group.throughput(bytes_of(8 * ROWS * INNER));
    let mut g = dg.clone();
    let mut gradient = packed.clone();
    group.bench_function("fused", |b| {
        b.iter(|| {
            activation::swiglu(&mut g, &packed, INNER);
            // Backward writes over what it reads; what comes of that does not matter here.
            activation::swiglu_backward(&mut gradient, &dg, INNER);
        })
    });
    let (gate, up) = (
        var(&dg, &[ROWS, INNER]),
        var(&packed[..ROWS * INNER], &[ROWS, INNER]),
    );
    composite(&mut group, || gate.silu()?.mul(&up));
    group.finish();

    let mut group = c.benchmark_group("gelu");
    group.throughput(bytes_of(5 * ROWS * INNER));
    let mut d = dg.clone();
    let u = numbers(ROWS * INNER, 3);
    group.bench_function("fused", |b| {
        b.iter(|| {
            activation::gelu(&mut g, &u);
            activation::gelu_backward(&mut d, &u);
        })
    });
    let u = var(&u, &[ROWS, INNER]);
    composite(&mut group, || u.gelu());
    group.finish();
}

fn loss(c: &mut Criterion) {
    let logits = numbers(ROWS * VOCAB, 1);
    let targets = tokens();
    let weights = vec![1.0; ROWS];
    let mut losses = vec![0.0; ROWS];
    let mut group = c.benchmark_group("cross-entropy");
    // The logits are read, and their gradient takes their place.
    group.throughput(bytes_of(2 * ROWS * VOCAB));
    let mut z = logits.clone();
    group.bench_function("fused", |b| {
        b.iter(|| cross_entropy::forward(&mut z, VOCAB, &targets, &weights, &mut losses, true))
    });
    let z = var(&logits, &[ROWS, VOCAB]);
    let targets = Tensor::new(targets, &Device::Cpu).expect("a vector");
    composite(&mut group, || candle_nn::loss::cross_entropy(&z, &targets));
    group.finish();
}

fn embeddings(c: &mut Criterion) {
    let table = numbers(VOCAB * WIDTH, 1);
    let dx = numbers(ROWS * WIDTH, 2);
    let tokens = tokens();
    let mut group = c.benchmark_group("embedding");
    // Rows are read and written; their gradients are read and added.
    group.throughput(bytes_of(5 * ROWS * WIDTH));
    let (mut x, mut dtable) = (dx.clone(), table.clone());
    group.bench_function("fused", |b| {
        b.iter(|| {
            embedding::forward(&mut x, &tokens, WIDTH, &table, None, LENGTH, (0, &[]));
            embedding::backward_tokens(&mut dtable, &tokens, WIDTH, &dx);
        })
    });
    let table = var(&table, &[VOCAB, WIDTH]);
    let ids = Tensor::new(tokens, &Device::Cpu).expect("a vector");
    composite(&mut group, || {
        table.index_select(&ids, 0)?.to_dtype(DType::F32)
    });
    group.finish();
}

/// What the machine does at most, by plain loops over all threads.
fn limits(c: &mut Criterion) {
    const ROUNDS: usize = 1 << 16;
    const CHAINS: usize = 16 * 12;
    let mut group = c.benchmark_group("limit");
    let threads = rayon::current_num_threads();
    group.throughput(Throughput::Elements((2 * ROUNDS * CHAINS * threads) as u64));
    group.bench_function("multiply-add", |b| {
        b.iter(|| {
            let sums = (0..threads)
                .into_par_iter()
                .map(|i| multiply_add(ROUNDS, i as f32));
            black_box(sums.sum::<f32>())
        })
    });
    let from = numbers(1 << 24, 1);
    let mut to = from.clone();
    group.throughput(bytes_of(2 * from.len()));
    group.bench_function("copy", |b| {
        b.iter(|| {
            let chunks = to.par_chunks_mut(1 << 16).zip(from.par_chunks(1 << 16));
            chunks.for_each(|(to, from)| to.copy_from_slice(from));
            black_box(&mut to);
        })
    });
    group.finish();
}

/// Independent chains of multiply-adds, as many as fill the registers of the widest instruction set that is there.
fn multiply_add(rounds: usize, seed: f32) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512(rounds: usize, seed: f32) -> f32 {
            chains::<12, 16>(rounds, seed)
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(rounds: usize, seed: f32) -> f32 {
            chains::<12, 8>(2 * rounds, seed)
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has it.
            return unsafe { avx512(rounds, seed) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has them.
            return unsafe { avx2(rounds, seed) };
        }
    }
    chains::<12, 4>(4 * rounds, seed)
}

#[inline(always)]
fn chains<const CHAINS: usize, const WIDTH: usize>(rounds: usize, seed: f32) -> f32 {
    let (factor, summand) = (black_box(0.999), black_box(seed));
    let mut sums = [[seed; WIDTH]; CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            for sum in sum {
                *sum = sum.mul_add(factor, summand);
            }
        }
    }
    sums.iter().flatten().sum()
}

criterion_group!(
    benches,
    limits,
    linear_layer,
    causal_attention,
    norms,
    activations,
    loss,
    embeddings
);
criterion_main!(benches);
