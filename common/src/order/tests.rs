//! The contract of the order: a bijection per epoch, local, and different for every seed and epoch.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::spec::{Payload, ScheduleKind};

fn train(lanes: u32, micro_batch: u32, accumulate: u32) -> TrainConfig {
    TrainConfig {
        steps: 10,
        lanes,
        micro_batch,
        accumulate,
        learning_rate: 1e-3,
        min_learning_rate: 1e-4,
        warmup_steps: 0,
        schedule: ScheduleKind::Constant,
        decay_steps: 0,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        grad_clip: 1.0,
        precision: Default::default(),
        payload: Payload::F32,
        diloco: None,
        gradient_checkpointing: false,
        seed: 1,
        eval_every: 0,
        eval_samples: 0,
        freeze_layers: None,
        layer_decay: None,
        unfreeze_every: None,
        data_share: None,
        replay: None,
        early_stopping_patience: None,
        max_forgetting: None,
        max_length: None,
        min_workers: 1,
    }
}

fn epoch_of(order: &Order, epoch: u64) -> Vec<u64> {
    let start = epoch * order.samples();
    (start..start + order.samples())
        .map(|p| {
            let at = order.sample(p);
            assert_eq!(at.epoch, epoch);
            at.index
        })
        .collect()
}

proptest! {
    #[test]
    fn every_epoch_holds_every_sample_once(
        seed: u64, samples in 1u64..3_000, block in 1u64..400, epoch in 0u64..1_000,
    ) {
        let order = Order::new(seed, samples, block);
        let mut seen = epoch_of(&order, epoch);
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..samples).collect::<Vec<_>>());
    }

    /// Steps straddle epochs whenever the number of samples is no multiple of the batch.
    #[test]
    fn steps_walk_each_epoch_exactly_once(
        seed: u64, samples in 1u64..300, block in 1u64..64,
        lanes in 1u32..9, micro_batch in 1u32..5, accumulate in 1u32..4,
    ) {
        let order = Order::new(seed, samples, block);
        let train = train(lanes, micro_batch, accumulate);
        let steps = (2 * samples).div_ceil(train.samples_per_step());
        let mut walked = Vec::new();
        for step in 0..steps {
            for lane in 0..lanes {
                walked.extend(order.positions(step, lane, &train));
            }
        }
        prop_assert_eq!(&walked, &(0..steps * train.samples_per_step()).collect::<Vec<_>>());
        for epoch in 0..2 {
            let seen: HashSet<u64> = walked.iter().map(|&p| order.sample(p))
                .filter(|at| at.epoch == epoch).map(|at| at.index).collect();
            prop_assert_eq!(seen.len() as u64, samples);
        }
    }

    /// Consecutive positions, up to a window's length, lie in two windows; each of their blocks is cut by the rotation
    /// into at most two stored blocks, and the one that wraps around the end of the corpus into three.
    #[test]
    fn neighbouring_positions_touch_few_blocks(
        seed: u64, samples in 1u64..20_000, block in 1u64..200, start: u64,
    ) {
        let order = Order::new(seed, samples, block);
        let start = start % (3 * samples);
        let length = (WINDOW_BLOCKS * block).min(samples - start % samples);
        let touched: HashSet<u64> = (start..start + length)
            .map(|p| order.sample(p).index / order.block())
            .collect();
        prop_assert!(touched.len() as u64 <= 2 * 2 * WINDOW_BLOCKS + 1, "{} blocks", touched.len());
    }

    #[test]
    fn huge_corpora_stay_in_range(seed: u64, samples in 1u64.., block in 1u64.., position: u64) {
        let at = Order::new(seed, samples, block).sample(position);
        prop_assert!(at.index < samples);
        prop_assert_eq!(at.epoch, position / samples);
    }

    #[test]
    fn permute_is_a_bijection(key: u64, size in 1u64..500) {
        let image: HashSet<u64> = (0..size).map(|x| permute(key, USE_BLOCKS, size, x)).collect();
        prop_assert_eq!(image.len() as u64, size);
        prop_assert!(image.iter().all(|&y| y < size));
    }

    #[test]
    fn ceil_sqrt_is_the_smallest_cover(n: u64) {
        let root = u128::from(ceil_sqrt(n));
        prop_assert!(root * root >= u128::from(n));
        prop_assert!(root == 0 || (root - 1) * (root - 1) < u128::from(n));
    }
}

#[test]
fn seeds_and_epochs_give_different_orders() {
    let order = Order::new(1, 1_000, 64);
    let first = epoch_of(&order, 0);
    assert_eq!(first, epoch_of(&Order::new(1, 1_000, 64), 0));
    for other in [epoch_of(&order, 1), epoch_of(&Order::new(2, 1_000, 64), 0)] {
        let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!(same < 20, "{same} of 1000 places hold the same sample");
    }
}

#[test]
fn the_order_is_pinned() {
    let order = Order::new(1337, 100, 10);
    let head: Vec<u64> = (0..8).map(|p| order.sample(p).index).collect();
    insta::assert_compact_debug_snapshot!(head, @"[66, 60, 52, 17, 56, 19, 51, 50]");
}

/// Over many seeds every sample is equally likely at a given position: chi-squared with 49 degrees of freedom, whose
/// 99.9 % quantile is 85.4.
#[test]
fn positions_are_uniform_over_seeds() {
    let (samples, seeds) = (50u64, 20_000u64);
    for position in [0, 7, 49] {
        let mut counts = vec![0u64; samples as usize];
        for seed in 0..seeds {
            let order = Order::new(seed, samples, 6);
            counts[order.sample(position).index as usize] += 1;
        }
        let expected = (seeds / samples) as f64;
        let chi2: f64 = counts
            .iter()
            .map(|&c| (c as f64 - expected).powi(2) / expected)
            .sum();
        assert!(chi2 < 85.4, "position {position}: {chi2}");
    }
}

/// The Feistel network alone, on domains so small that its weakness would show: each of the `size` images of 0 and
/// each ordered pair of images of (0, 1) is about equally likely.
#[test]
fn small_permutations_are_balanced() {
    for size in [2u64, 3, 4, 5, 7] {
        let keys = 40_000u64;
        let mut pairs = vec![0f64; (size * size) as usize];
        for key in 0..keys {
            let a = permute(key, USE_WINDOW, size, 0);
            let b = permute(key, USE_WINDOW, size, 1);
            pairs[(a * size + b) as usize] += 1.0;
        }
        let expected = keys as f64 / (size * (size - 1)) as f64;
        for (at, &count) in pairs.iter().enumerate() {
            let (a, b) = (at as u64 / size, at as u64 % size);
            let off = count / expected;
            assert!(
                a == b || (0.8..1.2).contains(&off),
                "size {size}: ({a}, {b}) {off}"
            );
        }
    }
}
