//! Initial weights, from the engine's own random numbers: element i of a tensor is a function of (seed, name, i).
//!
//! Matrices are normal with the model's standard deviation; those that write into the residual stream get
//! 1/sqrt(2 layers) of it (GPT-2, Radford et al., 2019). Norm weights are 1, biases 0. Of an adapter, A is uniform in
//! ±1/sqrt(inputs) and B is 0, as in PEFT: at first it changes nothing.

use cohort_common::layout::{Layout, TensorSpec};
use cohort_common::rng::{derive_key, normal_pair, philox};
use cohort_common::spec::ModelConfig;
use rayon::prelude::*;

/// Elements in one task; even, since numbers come in pairs.
const BLOCK: usize = 16 * 1024;

/// Fills those trained tensors of `params` that `chosen` says, for `seed`.
pub fn init(
    params: &mut [f32],
    model: &ModelConfig,
    layout: &Layout,
    seed: u64,
    chosen: &dyn Fn(&TensorSpec) -> bool,
) {
    for tensor in layout.tensors().iter().filter(|t| chosen(t)) {
        let values = &mut params[tensor.range()];
        let key = derive_key(seed, &tensor.name);
        if tensor.name.ends_with(".lora_B.weight") {
            values.fill(0.0);
        } else if tensor.name.ends_with(".lora_A.weight") {
            fill_uniform(values, key, 1.0 / (tensor.shape[1] as f32).sqrt());
        } else if tensor.decays() {
            fill_normal(values, key, standard_deviation(model, tensor));
        } else {
            values.fill(if tensor.name.ends_with(".bias") {
                0.0
            } else {
                1.0
            });
        }
    }
}

/// Numbers in [-bound, bound), 24 random bits each.
fn fill_uniform(values: &mut [f32], key: u64, bound: f32) {
    for (counter, four) in values.chunks_mut(4).enumerate() {
        let words = philox(key, [counter as u32, (counter >> 32) as u32, 0, 0]);
        for (value, word) in four.iter_mut().zip(words) {
            *value = bound * ((word >> 8) as f32 / 8_388_608.0 - 1.0);
        }
    }
}

fn standard_deviation(model: &ModelConfig, tensor: &TensorSpec) -> f32 {
    let residual = ["o_proj.weight", "down_proj.weight", "c_proj.weight"];
    match residual.iter().any(|end| tensor.name.ends_with(end)) {
        true => model.initializer_range / (2.0 * model.num_hidden_layers as f32).sqrt(),
        false => model.initializer_range,
    }
}

fn fill_normal(values: &mut [f32], key: u64, deviation: f32) {
    values
        .par_chunks_mut(BLOCK)
        .enumerate()
        .for_each(|(block, values)| {
            let first = (block * BLOCK / 2) as u64;
            for (i, pair) in values.chunks_mut(2).enumerate() {
                let counter = first + i as u64;
                let numbers = normal_pair(key, [counter as u32, (counter >> 32) as u32, 0, 0]);
                for (value, number) in pair.iter_mut().zip(numbers) {
                    *value = deviation * number;
                }
            }
        });
}
