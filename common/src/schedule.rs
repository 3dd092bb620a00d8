//! The learning rate of every step: linear warm-up, then the shape of the spec.
//!
//! The convention is nanoGPT's (`get_lr` in `train.py`), whose iterations count from 0 while our steps count from 1,
//! so that step `s` is iteration `s - 1`:
//!
//! - warm-up gives `peak * s / (warmup_steps + 1)` in steps `1 ..= warmup_steps`, so no step is wasted on a rate of 0
//!   and the peak is first reached in step `warmup_steps + 1`;
//! - decay has come `(s - 1 - warmup_steps) / (steps - warmup_steps)` of its way, so the minimum would be reached in
//!   step `steps + 1`, which is not run; the last step stays a hair above it.
//!
//! Pure: the same numbers on every machine, because the cosine is `libm`'s. This file does not know the optimizer.

use crate::spec::{ScheduleKind, TrainConfig};

/// A round's ramp is so much of it.
const RAMP: u32 = 5;

/// The learning rate of a step; steps count from 1. Beyond the planned end it is what the schedule ends with.
///
/// # Panics
///
/// On step 0, which does not exist.
pub fn learning_rate(train: &TrainConfig, step: u64) -> f64 {
    assert!(step >= 1, "steps count from 1");
    rate_at(train, step - 1, 1)
}

/// The learning rate of an inner step of a round; rounds count from 1, their inner steps from 0. The shape is that of all
/// inner steps of the run, in a row, and each round ramps up to it: as its moments begin at zero, AdamW's first steps go by
/// what single gradients say, and are the longest of all, were they not made shorter.
///
/// # Panics
///
/// On step 0, which does not exist.
pub fn inner_learning_rate(train: &TrainConfig, step: u64, inner: u32) -> f64 {
    assert!(step >= 1, "steps count from 1");
    let each = train.inner_steps();
    let rate = rate_at(
        train,
        (step - 1) * u64::from(each) + u64::from(inner),
        u64::from(each),
    );
    let ramp = each / RAMP;
    if inner + 1 >= ramp {
        return rate;
    }
    rate * f64::from(inner + 1) / f64::from(ramp)
}

/// The rate of an iteration, where each step of the schedule has so many.
fn rate_at(train: &TrainConfig, iteration: u64, each: u64) -> f64 {
    let (peak, floor) = (train.learning_rate, train.min_learning_rate);
    let [steps, warmup, decay] =
        [train.steps, train.warmup_steps, train.decay_steps].map(|steps| steps * each);
    if iteration < warmup {
        return peak * (iteration + 1) as f64 / (warmup + 1) as f64;
    }
    let share_left = match train.schedule {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Cosine => {
            let done = progress(iteration, warmup, steps);
            0.5 * (1.0 + libm::cos(std::f64::consts::PI * done))
        }
        ScheduleKind::Linear => 1.0 - progress(iteration, warmup, steps),
        ScheduleKind::Wsd => {
            let decay_from = steps.saturating_sub(decay);
            1.0 - progress(iteration, decay_from.max(warmup), steps)
        }
    };
    floor + share_left * (peak - floor)
}

/// How far `iteration` has come from `start` (0) to `end` (1), clamped to both.
fn progress(iteration: u64, start: u64, end: u64) -> f64 {
    if iteration >= end {
        return 1.0;
    }
    if iteration <= start {
        return 0.0;
    }
    (iteration - start) as f64 / (end - start) as f64
}

/// What a step's summed gradient is multiplied with: the mean over its Σ weight, clipped by the global norm of that mean
/// (Pascanu et al., arXiv 1211.5063): scaled to `grad_clip` where it is longer. An outer gradient, of a round, is not
/// clipped: those of its inner steps were.
pub fn gradient_scale(train: &TrainConfig, grad_norm: f64, weight: f64) -> f64 {
    match train.diloco {
        Some(_) => 1.0 / weight,
        None => clipped_scale(train, grad_norm, weight),
    }
}

/// [`gradient_scale`] of a step that is taken by what is clipped: any, but an outer one.
pub fn clipped_scale(train: &TrainConfig, grad_norm: f64, weight: f64) -> f64 {
    let bound = train.grad_clip;
    let clip = if bound > 0.0 && grad_norm > bound {
        bound / grad_norm
    } else {
        1.0
    };
    clip / weight
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::Payload;

    fn train(schedule: ScheduleKind, steps: u64, warmup_steps: u64) -> TrainConfig {
        TrainConfig {
            steps,
            lanes: 1,
            micro_batch: 1,
            accumulate: 1,
            learning_rate: 1e-3,
            min_learning_rate: 1e-4,
            warmup_steps,
            schedule,
            decay_steps: 20,
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

    #[track_caller]
    fn check(train: &TrainConfig, expected: &[(u64, f64)]) {
        for &(step, rate) in expected {
            let found = learning_rate(train, step);
            assert!(
                (found - rate).abs() < 1e-12,
                "step {step}: {found} != {rate}"
            );
        }
    }

    /// From nanoGPT's own function: `learning_rate, min_lr, warmup_iters, lr_decay_iters = 1e-3, 1e-4, 100, 2000` and
    /// `[get_lr(it) for it in (0, 99, 100, 1050, 1999)]`; 1050 is half way, where the cosine is 0.
    #[test]
    fn cosine_is_nanogpts() {
        check(
            &train(ScheduleKind::Cosine, 2000, 100),
            &[
                (1, 1e-3 / 101.0),
                (100, 1e-3 * 100.0 / 101.0),
                (101, 1e-3),
                (1051, 5.5e-4),
                // 1e-4 + 0.5 * (1 + cos(pi * 1899 / 1900)) * 9e-4, with cos(pi - x) = -1 + x^2 / 2 - x^4 / 24
                (2000, 1.000_006_151_5e-4),
                (2001, 1e-4),
                (9999, 1e-4),
            ],
        );
    }

    #[test]
    fn linear_is_a_straight_line() {
        check(
            &train(ScheduleKind::Linear, 110, 10),
            &[
                (5, 1e-3 * 5.0 / 11.0),
                (11, 1e-3),
                (61, 5.5e-4),
                (110, 1e-4 + 9e-6),
                (111, 1e-4),
            ],
        );
    }

    #[test]
    fn wsd_is_stable_until_its_last_steps() {
        check(
            &train(ScheduleKind::Wsd, 100, 10),
            &[
                (10, 1e-3 * 10.0 / 11.0),
                (11, 1e-3),
                (81, 1e-3),
                (82, 1e-3 - 9e-4 / 20.0),
                (91, 5.5e-4),
                (100, 1e-4 + 9e-4 / 20.0),
                (101, 1e-4),
            ],
        );
    }

    #[test]
    fn wsd_without_a_decay_keeps_the_peak_to_the_end() {
        let mut train = train(ScheduleKind::Wsd, 100, 0);
        train.decay_steps = 0;
        check(&train, &[(1, 1e-3), (50, 1e-3), (100, 1e-3), (101, 1e-4)]);
    }

    #[test]
    fn constant_keeps_the_peak() {
        check(
            &train(ScheduleKind::Constant, 100, 0),
            &[(1, 1e-3), (100, 1e-3), (1000, 1e-3)],
        );
    }

    #[test]
    fn each_round_ramps_up_to_the_schedule() {
        let mut train = train(ScheduleKind::Constant, 3, 0);
        train.diloco = Some(crate::spec::Diloco {
            inner_steps: 20,
            outer_learning_rate: 1.0,
            outer_momentum: 0.5,
        });
        for step in 1..=3 {
            let rates: Vec<f64> = (0..20)
                .map(|inner| inner_learning_rate(&train, step, inner))
                .collect();
            assert_eq!(rates[..4], [0.25e-3, 0.5e-3, 0.75e-3, 1e-3]);
            assert!(rates[4..].iter().all(|&rate| rate == 1e-3));
        }
        // A round is too short for one.
        train.diloco.as_mut().unwrap().inner_steps = 9;
        assert_eq!(inner_learning_rate(&train, 1, 0), 1e-3);
    }

    proptest! {
        #[test]
        fn rates_stay_between_zero_and_the_peak(
            kind in prop::sample::select(vec![
                ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Wsd, ScheduleKind::Constant,
            ]),
            steps in 1u64..200, warmup in 0u64..200, decay in 0u64..300, step in 1u64..400,
        ) {
            let train = TrainConfig { decay_steps: decay, ..train(kind, steps, warmup.min(steps)) };
            let rate = learning_rate(&train, step);
            prop_assert!(rate > 0.0 && rate <= 1e-3 * (1.0 + 1e-12), "{rate}");
            if step > train.warmup_steps {
                prop_assert!(rate >= 1e-4 * (1.0 - 1e-12), "{rate}");
                prop_assert!(learning_rate(&train, step + 1) <= rate * (1.0 + 1e-12));
            }
        }
    }
}
