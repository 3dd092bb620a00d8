//! The bounds of a run: every number has one, so that arithmetic further down cannot overflow and a typing error is
//! found before anything is allocated.

use std::ops::RangeInclusive;

use super::error::SpecError;
use super::memory::{human_bytes, memory_per_worker};
use super::{ModelConfig, TrainConfig};

/// Most lanes of a run. Every entry of its ledger has a line for each.
pub const MAX_LANES: u64 = 16_384;
/// Most tokens in one forward and backward.
pub const MAX_MICRO_BATCH_TOKENS: u64 = 1 << 26;
/// Most samples in one optimizer step.
pub const MAX_SAMPLES_PER_STEP: u64 = 1 << 31;
/// Most optimizer steps; with [`MAX_SAMPLES_PER_STEP`] every position of a run fits 64 bits.
pub const MAX_STEPS: u64 = 1 << 31;
/// Largest vocabulary.
pub const MAX_VOCAB: u64 = 1 << 20;
/// Bytes beyond which a worker is taken for a typing error rather than a machine: 4 TiB.
pub const MAX_WORKER_BYTES: u64 = 4 << 40;

pub(super) fn check_numbers(train: &TrainConfig) -> Result<(), SpecError> {
    let rates = "1e-3 suits a small model, 1e-4 a large one";
    let lr = train.learning_rate;
    real(
        "train.learning_rate",
        lr,
        lr > 0.0 && lr <= 1.0,
        "it must be above 0 and at most 1",
        rates,
    )?;
    let min = train.min_learning_rate;
    let bound = format!(
        "it must lie between 0 and `train.learning_rate`, which is {}",
        number(lr)
    );
    real(
        "train.min_learning_rate",
        min,
        (0.0..=lr).contains(&min),
        &bound,
        "leave it out for a tenth of the peak",
    )?;
    for (key, beta, next) in [
        ("train.beta1", train.beta1, "0.9 is usual"),
        ("train.beta2", train.beta2, "0.95 is usual"),
    ] {
        real(
            key,
            beta,
            (0.0..1.0).contains(&beta),
            "it must be at least 0 and below 1",
            next,
        )?;
    }
    let (eps, decay, clip) = (train.eps, train.weight_decay, train.grad_clip);
    real(
        "train.eps",
        eps,
        eps > 0.0 && eps < 1.0,
        "it must lie between 0 and 1, both excluded",
        "1e-8 is usual",
    )?;
    real(
        "train.weight_decay",
        decay,
        (0.0..=1.0).contains(&decay),
        "it must lie between 0 and 1",
        "0.1 is usual",
    )?;
    real(
        "train.grad_clip",
        clip,
        clip >= 0.0 && clip.is_finite(),
        "it must be 0 or more and finite",
        "1.0 is usual, 0 turns clipping off",
    )
}

pub(super) fn check_steps(train: &TrainConfig) -> Result<(), SpecError> {
    let steps = train.steps;
    if train.warmup_steps > steps {
        return Err(SpecError::impossible(
            "train.warmup_steps",
            train.warmup_steps,
            format!("the run has only {steps} steps"),
            "leave it out for a twentieth of the steps, or raise `train.steps`",
        ));
    }
    if train.decay_steps > steps - train.warmup_steps {
        return Err(SpecError::impossible(
            "train.decay_steps",
            train.decay_steps,
            format!(
                "after warm-up the run has only {} steps",
                steps - train.warmup_steps
            ),
            "leave it out for a fifth of the steps, or raise `train.steps`",
        ));
    }
    if train.min_workers > train.lanes {
        return Err(SpecError::impossible(
            "train.min_workers",
            train.min_workers,
            format!("there are only {} lanes to share", train.lanes),
            "raise `train.lanes`, or wait for fewer workers",
        ));
    }
    if train.samples_per_step() > MAX_SAMPLES_PER_STEP {
        return Err(SpecError::impossible(
            "train.accumulate",
            train.accumulate,
            format!(
                "a step would take {} samples, and the most is {MAX_SAMPLES_PER_STEP}",
                train.samples_per_step()
            ),
            match train.diloco {
                None => "lower `train.lanes`, `train.accumulate` or `train.micro_batch`",
                Some(_) => {
                    "lower `train.lanes`, `train.accumulate`, `train.micro_batch` or `train.inner_steps`"
                }
            },
        ));
    }
    Ok(())
}

pub(super) fn check_memory(model: &ModelConfig, train: &TrainConfig) -> Result<(), SpecError> {
    let length = train.max_length.unwrap_or(model.context);
    if length > model.context {
        return Err(SpecError::impossible(
            "train.max_length",
            length,
            format!("the model attends over {} tokens", model.context),
            "lower it, or leave it out for samples of the whole context",
        ));
    }
    let tokens = u64::from(train.micro_batch) * length as u64;
    if tokens > MAX_MICRO_BATCH_TOKENS {
        return Err(SpecError::impossible(
            "train.micro_batch",
            train.micro_batch,
            format!(
                "with samples of {length} that is {tokens} tokens at once, and the most is {MAX_MICRO_BATCH_TOKENS}"
            ),
            "lower it and raise `train.accumulate`, which costs no memory",
        ));
    }
    let memory = memory_per_worker(model, train);
    if memory.state_bytes > MAX_WORKER_BYTES {
        return Err(SpecError::impossible(
            "model.hidden_size",
            model.hidden_size,
            format!(
                "with {} layers that makes {} parameters, and every worker would need {} for them",
                model.num_hidden_layers,
                memory.parameters,
                human_bytes(memory.state_bytes)
            ),
            "make the model smaller",
        ));
    }
    if memory.activation_bytes > MAX_WORKER_BYTES {
        return Err(SpecError::impossible(
            "train.micro_batch",
            train.micro_batch,
            format!(
                "with samples of {length} every worker would need {} for activations",
                human_bytes(memory.activation_bytes)
            ),
            "lower it and raise `train.accumulate`, which costs no memory",
        ));
    }
    Ok(())
}

pub(super) fn small(key: &str, given: Option<u64>, default: u32) -> Result<u32, SpecError> {
    let value = given.unwrap_or(u64::from(default));
    within(key, value, 1..=65_536, &format!("{default} is the default"))?;
    Ok(value as u32)
}

/// A whole number inside its bounds, or the error that names both.
pub(super) fn within(
    key: &str,
    value: u64,
    range: RangeInclusive<u64>,
    next: &str,
) -> Result<(), SpecError> {
    if range.contains(&value) {
        return Ok(());
    }
    let bound = format!("it must lie between {} and {}", range.start(), range.end());
    Err(SpecError::impossible(key, value, bound, next))
}

/// A real number that satisfies its condition, or the error that names the bound. NaN satisfies none.
pub(super) fn real(
    key: &str,
    value: f64,
    holds: bool,
    bound: &str,
    next: &str,
) -> Result<(), SpecError> {
    if holds {
        return Ok(());
    }
    Err(SpecError::impossible(key, number(value), bound, next))
}

/// A number as a spec would write it: `0.1`, `1e-8`, `3`.
pub(super) fn number(value: f64) -> String {
    // Twelve digits: what a division left behind the fifteenth is of no interest to anybody.
    let rounded: f64 = format!("{value:.11e}").parse().unwrap_or(value);
    shown(rounded)
}

/// [`number`] for numbers of any type.
pub(super) fn shown<T: std::fmt::Debug>(value: T) -> String {
    let text = format!("{value:?}");
    match text.strip_suffix(".0") {
        Some(whole) => whole.into(),
        None => text,
    }
}
