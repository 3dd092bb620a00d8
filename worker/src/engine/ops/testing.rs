//! Helpers of the kernels' tests: random rows, thread pools, finite differences.

use cohort_common::rng::normal_pair;

/// `len` standard normal numbers.
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u32)
        .map(|i| normal_pair(seed, [i, 0, 0, 0])[0])
        .collect()
}

/// A rayon pool of that many threads.
pub fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("a thread pool")
}

/// Compares `gradient` of `loss` at `x` with central differences in every `stride`-th element.
pub fn check_gradient(x: &[f32], gradient: &[f32], stride: usize, loss: impl Fn(&[f32]) -> f64) {
    const STEP: f32 = 1e-2;
    assert_eq!(x.len(), gradient.len());
    for i in (0..x.len()).step_by(stride) {
        let at = |delta: f32| {
            let mut moved = x.to_vec();
            moved[i] += delta;
            loss(&moved)
        };
        let expected = (at(STEP) - at(-STEP)) / f64::from(2.0 * STEP);
        let got = f64::from(gradient[i]);
        assert!(
            (got - expected).abs() < 5e-3 * (1.0 + expected.abs()),
            "element {i}: gradient {got}, finite difference {expected}"
        );
    }
}

/// Σ weight·value in f64: a scalar loss whose gradient with respect to `value` is `weight`.
pub fn weigh(value: &[f32], weight: &[f32]) -> f64 {
    value
        .iter()
        .zip(weight)
        .map(|(&v, &w)| f64::from(v) * f64::from(w))
        .sum()
}
