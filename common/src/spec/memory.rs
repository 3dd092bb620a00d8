//! What a worker needs, roughly: parameters, optimizer state and activations. An estimate to plan with before a run,
//! not an account of what the engine allocates.

use super::{Architecture, ModelConfig, TrainConfig};
use crate::layout::Layout;

/// Tokens of one pass that several lanes share, at most: its products are as fast as larger ones, and a weight's operands
/// still fit into the cache.
pub const SHARED_TOKENS: usize = 2048;

/// Logits of one pass that are alive at a time, at most. Part of the order of summation: another number is another run.
pub const LOGITS_ALIVE: usize = 1 << 23;

/// Bytes for each parameter: itself, its gradient and two moments, in 32 bits each.
const BYTES_PER_PARAMETER: u64 = 16;

/// The same of a lane that steps by itself: its weights and its two moments.
const BYTES_PER_INNER_PARAMETER: u64 = 12;

/// Memory of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of parameters, gradients and moments.
    pub state_bytes: u64,
    /// Bytes of the activations of one pass.
    pub activation_bytes: u64,
}

impl MemoryEstimate {
    /// Bytes in all.
    pub fn total_bytes(&self) -> u64 {
        self.state_bytes.saturating_add(self.activation_bytes)
    }
}

/// Tokens of the largest pass of a worker that has all lanes: one micro-batch, or as many lanes as may share.
fn tokens_of_a_pass(model: &ModelConfig, train: &TrainConfig) -> usize {
    let lane = (train.micro_batch as usize).saturating_mul(length_of(model, train));
    let bound = SHARED_TOKENS.min(LOGITS_ALIVE / model.outputs().max(1));
    let lanes = match train.lanes_go_alone() {
        true => 1,
        false => (bound / lane.max(1)).clamp(1, train.lanes.max(1) as usize),
    };
    lane.saturating_mul(lanes)
}

/// Tokens of one sample.
fn length_of(model: &ModelConfig, train: &TrainConfig) -> usize {
    train.max_length.unwrap_or(model.context)
}

/// The memory of a worker that computes one pass at a time.
pub fn memory_per_worker(model: &ModelConfig, train: &TrainConfig) -> MemoryEstimate {
    let parameters = Layout::of(model).len() as u64;
    let hidden = model.hidden_size as f64;
    let inner = model.intermediate_size as f64;
    let kv = (model.num_key_value_heads * model.head_dim()) as f64;
    // Values kept per token and layer: norms, projections, attention's output, residuals, and the feed-forward's
    // inner values; then one row of attention weights per head, where a device keeps them; and the logits with their
    // gradient.
    let inner_values = match model.architecture {
        Architecture::Llama => 4.0,
        Architecture::Gpt2 => 2.0,
    };
    let attention = (model.num_attention_heads * length_of(model, train)) as f64;
    // Queries and attention's output are as wide as all heads together; unnormalised queries and keys are kept besides.
    let width = model.attention_width() as f64;
    let heads = 2.0 * width + 2.0 * kv + if model.qk_norm { width + kv } else { 0.0 };
    let layer = 5.0 * hidden + heads + inner_values * inner + attention;
    let blocks = model.num_hidden_layers as f64;
    let kept = match train.gradient_checkpointing {
        // The input of each block, and one block's activations at a time.
        true => blocks * hidden + layer,
        false => blocks * layer,
    };
    let per_token = kept + 2.0 * model.outputs() as f64;
    let tokens = tokens_of_a_pass(model, train) as f64;
    MemoryEstimate {
        parameters,
        state_bytes: parameters.saturating_mul(match train.diloco {
            Some(_) => BYTES_PER_PARAMETER + BYTES_PER_INNER_PARAMETER,
            None => BYTES_PER_PARAMETER,
        }),
        // A cast from float saturates.
        activation_bytes: (4.0 * tokens * per_token) as u64,
    }
}

/// Bytes in the largest unit that leaves at least one, such as `1.5 GB` (powers of 1000).
pub fn human_bytes(bytes: u64) -> String {
    scaled(bytes, &["bytes", "kB", "MB", "GB", "TB", "PB", "EB"], " ")
}

/// A number of things, such as `1 worker` or `3 workers`.
pub fn counted(number: usize, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    }
}

/// A count with a unit, such as `124.4M`.
pub fn human_count(count: u64) -> String {
    scaled(count, &["", "k", "M", "B", "T", "P", "E"], "")
}

/// A number of floating-point operations in the largest unit that leaves at least one, such as `17.8 MFLOP`.
pub fn human_flops(mut flops: f64) -> String {
    const UNITS: [&str; 9] = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"];
    let mut unit = 0;
    while flops >= 999.95 && unit + 1 < UNITS.len() {
        flops /= 1000.0;
        unit += 1;
    }
    format!("{flops:.1} {}FLOP", UNITS[unit])
}

fn scaled(value: u64, units: &[&str], space: &str) -> String {
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= 999.95 && unit + 1 < units.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{value}{space}{}", units[0]),
        _ => format!("{scaled:.1}{space}{}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(human_bytes(12), "12 bytes");
        assert_eq!(human_bytes(1_500_000_000), "1.5 GB");
        assert_eq!(human_bytes(999_999_999), "1.0 GB");
        assert_eq!(human_bytes(u64::MAX), "18.4 EB");
        assert_eq!(human_count(124_439_808), "124.4M");
        assert_eq!(human_count(7), "7");
        assert_eq!(
            (counted(1, "worker"), counted(0, "worker")),
            ("1 worker".into(), "0 workers".into())
        );
        assert_eq!(human_flops(884_736.0), "884.7 kFLOP");
        assert_eq!(human_flops(2.5e21), "2.5 ZFLOP");
    }
}
