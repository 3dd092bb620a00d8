//! Vectorised elementary functions in portable Rust. A kernel is written once, over fixed-size arrays that the
//! compiler turns into vectors, and compiled three times (baseline, AVX2, AVX-512); the best one that the processor
//! has is chosen at run time. No libc function is called, so results depend on the instruction set alone.

use std::sync::OnceLock;

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// What every processor of the target has.
    Baseline,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, VL, BW and DQ.
    Avx512,
}

impl InstructionSet {
    /// What decides the bits of a result: whether a product and a sum are rounded once or twice.
    pub fn arithmetic(self) -> &'static str {
        match self {
            Self::Baseline if !BASELINE_FMA => "separate-multiply-add",
            _ => "fused-multiply-add",
        }
    }
}

/// Names the instruction set to compute with, instead of the best: `avx512`, `avx2` or `baseline`. One that the processor
/// lacks is passed over. For comparisons: `avx2` and `avx512` give the same bits.
const CHOICE: &str = "COHORT_INSTRUCTION_SET";

/// The instruction set that is computed with: the best that this processor has, or the one that is named by
/// `COHORT_INSTRUCTION_SET`.
#[inline]
pub fn instruction_set() -> InstructionSet {
    static CHOSEN: OnceLock<InstructionSet> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let best = best();
        match std::env::var(CHOICE).as_deref() {
            Ok("baseline") => InstructionSet::Baseline,
            Ok("avx2") if best == InstructionSet::Avx512 => InstructionSet::Avx2,
            _ => best,
        }
    })
}

fn best() -> InstructionSet {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
        let avx512 = std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512vl")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512dq");
        match (avx2, avx512) {
            (true, true) => InstructionSet::Avx512,
            (true, false) => InstructionSet::Avx2,
            _ => InstructionSet::Baseline,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    InstructionSet::Baseline
}

/// Whether the baseline of this target has a fused multiply-add.
pub const BASELINE_FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

/// Partial sums of a reduction over one row: wide enough for four AVX2 or two AVX-512 registers.
pub const LANES: usize = 32;

/// Defines a function whose body is compiled for each instruction set. Inside the body, the constant `FMA` says
/// whether a fused multiply-add is one instruction; pass it on to the helpers of this module.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::extra_unused_type_parameters, clippy::too_many_arguments)]
            fn portable<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    portable::<true>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    portable::<true>($($arg),*)
                }
                use $crate::engine::ops::simd::InstructionSet;
                match $crate::engine::ops::simd::instruction_set() {
                    // SAFETY: the processor was just found to have the features.
                    InstructionSet::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the processor was just found to have the features.
                    InstructionSet::Avx2 => return unsafe { avx2($($arg),*) },
                    InstructionSet::Baseline => {}
                }
            }
            portable::<{ $crate::engine::ops::simd::BASELINE_FMA }>($($arg),*)
        }
    };
}
pub(crate) use simd_fn;

/// `a * b + c`, fused where that is one instruction.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `a * b + c` as the kernels of this processor compute it.
#[cfg(test)]
pub fn fma_as_the_kernels(a: f32, b: f32, c: f32) -> f32 {
    match instruction_set() {
        InstructionSet::Baseline => fma::<BASELINE_FMA>(a, b, c),
        _ => a.mul_add(b, c),
    }
}

/// Below this e^x is taken for 0. It would vanish beside e^0 anyhow; and what is made of so small a number, times a probability or a
/// gradient, is soon too small for a normal float, which many processors are slow with.
const VANISHES: f32 = -60.0;

/// e^x to about two units in the last place; inputs below -60 give 0, above 88.3 about 2e38; NaN stays.
/// Range reduction and polynomial of Cephes' `expf`.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    let vanishes = x < VANISHES;
    let x = x.clamp(-87.3, 88.3);
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = fma::<FMA>(n, -0.693_359_4, x);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    p = fma::<FMA>(p, r, 1.398_199_9e-3);
    p = fma::<FMA>(p, r, 8.333_452e-3);
    p = fma::<FMA>(p, r, 4.166_579_6e-2);
    p = fma::<FMA>(p, r, 1.666_666_5e-1);
    p = fma::<FMA>(p, r, 0.5);
    p = fma::<FMA>(p, r * r, r) + 1.0;
    let exponent = shifted
        .to_bits()
        .wrapping_sub(MAGIC.to_bits())
        .wrapping_add(127);
    let y = p * f32::from_bits(exponent << 23);
    if vanishes { 0.0 } else { y }
}

/// 1 / (1 + e^-x); 0 for inputs below -60.
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    let y = 1.0 / (1.0 + exp::<FMA>(-x));
    if x < VANISHES { 0.0 } else { y }
}

/// Sum of the partial sums, in one fixed order.
#[inline(always)]
pub fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Σ f(i) over `0..len` with [`LANES`] partial sums: element i goes to partial sum i mod LANES.
#[inline(always)]
pub fn sum_by(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = len - len % LANES;
    let mut start = 0;
    while start < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
        start += LANES;
    }
    for (lane, sum) in lanes.iter_mut().enumerate().take(len - whole) {
        *sum += f(whole + lane);
    }
    fold(lanes)
}

simd_fn! {
    /// The largest element; -inf for an empty slice. NaN elements are passed over.
    pub fn max(row: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = row.as_chunks::<LANES>();
        for chunk in whole {
            for (best, &x) in lanes.iter_mut().zip(chunk) {
                *best = if x > *best { x } else { *best };
            }
        }
        for (best, &x) in lanes.iter_mut().zip(rest) {
            *best = if x > *best { x } else { *best };
        }
        lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
}

simd_fn! {
    /// Replaces each x by e^(x - `shift`) and returns the sum of the results.
    pub fn exp_in_place(row: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0.0; LANES];
        let (whole, rest) = row.as_chunks_mut::<LANES>();
        for chunk in whole {
            for (sum, x) in lanes.iter_mut().zip(chunk) {
                *x = exp::<FMA>(*x - shift);
                *sum += *x;
            }
        }
        for (sum, x) in lanes.iter_mut().zip(rest) {
            *x = exp::<FMA>(*x - shift);
            *sum += *x;
        }
        fold(lanes)
    }
}

simd_fn! {
    /// `row *= factor`.
    pub fn scale(row: &mut [f32], factor: f32) {
        for x in row {
            *x *= factor;
        }
    }
}

simd_fn! {
    /// `sum += row`.
    pub fn add(sum: &mut [f32], row: &[f32]) {
        for (s, &x) in sum.iter_mut().zip(row) {
            *s += x;
        }
    }
}

simd_fn! {
    /// `sum *= row`.
    pub fn multiply(sum: &mut [f32], row: &[f32]) {
        for (s, &x) in sum.iter_mut().zip(row) {
            *s *= x;
        }
    }
}

simd_fn! {
    /// Σ a·b.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let (a, b) = (&a[..a.len().min(b.len())], &b[..a.len().min(b.len())]);
        let mut lanes = [0.0; LANES];
        let ((aw, ar), (bw, br)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for (x, y) in aw.iter().zip(bw) {
            for i in 0..LANES {
                lanes[i] = fma::<FMA>(x[i], y[i], lanes[i]);
            }
        }
        for (i, (x, y)) in ar.iter().zip(br).enumerate() {
            lanes[i] = fma::<FMA>(*x, *y, lanes[i]);
        }
        fold(lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_exact_value() {
        let xs: Vec<f32> = (-6_000..=8_800).map(|i| i as f32 * 0.01).collect();
        let mut ys = xs.clone();
        exp_in_place(&mut ys, 0.0);
        for (x, y) in xs.iter().zip(&ys) {
            let exact = f64::from(*x).exp();
            let error = (f64::from(*y) / exact - 1.0).abs();
            assert!(error < 3e-7, "exp({x}) = {y}, off by {error}");
        }
    }

    #[test]
    fn what_vanishes_is_zero_and_never_a_denormal() {
        let mut row = vec![-60.1, -87.0, -90.0, -1e30, f32::NEG_INFINITY];
        assert_eq!(exp_in_place(&mut row, 0.0), 0.0);
        for x in [-60.1, -87.0, -90.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(sigmoid::<BASELINE_FMA>(x), 0.0);
        }
        assert!(sigmoid::<BASELINE_FMA>(-60.0).is_normal());
        assert!(sigmoid::<BASELINE_FMA>(f32::NAN).is_nan());
        assert_eq!(sigmoid::<BASELINE_FMA>(70.0), 1.0);
    }

    #[test]
    fn nan_is_not_hidden() {
        let mut row = vec![0.0, f32::NAN, 1.0];
        assert!(exp_in_place(&mut row, 0.0).is_nan());
        assert!(row[1].is_nan());
    }

    #[test]
    fn reductions_take_every_element_at_every_length() {
        for len in 0..100 {
            let row: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let ones = vec![1.0; len];
            let sum = (len * len.saturating_sub(1) / 2) as f32;
            assert_eq!(dot(&row, &ones), sum);
            assert_eq!(sum_by(len, |i| row[i]), sum);
            if len > 0 {
                assert_eq!(max(&row), (len - 1) as f32);
            }
        }
    }
}
