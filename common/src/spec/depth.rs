//! The one dial: `model.depth = d` derives the shape of a `llama` and the recipe to train it, and says what it derived.
//!
//! The shape keeps the ratio of width to depth at 64 and the heads at 64. The recipe follows two published laws for a
//! compute budget C of floating-point operations:
//!
//! - tokens = 20 per parameter (Hoffmann et al., arXiv 2203.15556);
//! - batch = 0.292 C^0.3271 tokens and peak rate = 0.3118 C^-0.1250 (DeepSeek LLM, arXiv 2401.02954, section 3.1).
//!
//! A key that the spec gives wins over what the dial would derive, and the note says so.

use std::fmt::Debug;

use super::bounds::{shown, within};
use super::error::SpecError;
use super::file::{ModelTable, SpecFile, TrainTable};
use super::shape::{HEAD_DIM, llama_intermediate, shape_of};
use super::{Architecture, ModelConfig};
use crate::layout::Layout;

/// Tokens of one forward and backward that suit a CPU and do not starve a GPU.
const MICRO_BATCH_TOKENS: u64 = 2048;
/// The laws were fitted far above the size of our smallest models; beyond this rate those diverge.
const HIGHEST_RATE: f64 = 3e-3;

/// Fills what `model.depth` derives and the spec does not give. Returns one line for each key; none without the dial.
pub(super) fn derive(file: &mut SpecFile, vocab_size: usize) -> Result<Vec<String>, SpecError> {
    let Some(depth) = file.model.depth else {
        return Ok(Vec::new());
    };
    within(
        "model.depth",
        depth,
        1..=64,
        "6 makes a model of about 12 million parameters",
    )?;
    let architecture = file.model.architecture.unwrap_or(Architecture::Llama);
    if architecture != Architecture::Llama {
        return Err(SpecError::impossible(
            "model.depth",
            depth,
            format!("the dial is for `llama`, and the architecture is `{architecture}`"),
            "give the sizes one by one, or remove `model.architecture`",
        ));
    }
    if let Some(layers) = file.model.num_hidden_layers.filter(|l| *l != depth) {
        return Err(SpecError::impossible(
            "model.depth",
            depth,
            format!("`model.num_hidden_layers` is {layers}"),
            "remove one of the two",
        ));
    }
    let mut notes = Notes {
        depth,
        lines: Vec::new(),
    };
    derive_shape(&mut file.model, &mut notes);
    let mut model = shape_of(&file.model)?;
    model.vocab_size = vocab_size;
    derive_recipe(&mut file.train, &model, &mut notes);
    Ok(notes.lines)
}

fn derive_shape(table: &mut ModelTable, notes: &mut Notes) {
    let depth = notes.depth;
    notes.fill(
        "model.num_hidden_layers",
        &mut table.num_hidden_layers,
        depth,
        "",
    );
    let hidden = notes.fill(
        "model.hidden_size",
        &mut table.hidden_size,
        64 * depth,
        "64 per layer",
    );
    let width = table.head_dim.unwrap_or(HEAD_DIM).max(1);
    let heads = (hidden / width).max(1);
    let heads = notes.fill(
        "model.num_attention_heads",
        &mut table.num_attention_heads,
        heads,
        &format!("heads of {width}"),
    );
    // Grouping only depths that have fitting divisors would make some deeper models smaller.
    notes.fill(
        "model.num_key_value_heads",
        &mut table.num_key_value_heads,
        heads,
        "one per head",
    );
    let inner = llama_intermediate(hidden);
    notes.fill(
        "model.intermediate_size",
        &mut table.intermediate_size,
        inner,
        "8/3 of the width",
    );
    let context = match depth {
        0..8 => 256,
        8..12 => 512,
        _ => 1024,
    };
    notes.fill("model.context", &mut table.context, context, "");
}

fn derive_recipe(table: &mut TrainTable, model: &ModelConfig, notes: &mut Notes) {
    let parameters = Layout::of(model).len() as f64;
    let tokens = 20.0 * parameters;
    let compute = model.flops_per_token() * tokens;
    let batch = 0.292 * libm::pow(compute, 0.3271);
    let rate = two_digits(0.3118 * libm::pow(compute, -0.125)).min(HIGHEST_RATE);
    notes.fill(
        "train.learning_rate",
        &mut table.learning_rate,
        rate,
        "0.3118 C^-0.125",
    );

    let lanes = notes.fill("train.lanes", &mut table.lanes, 8, "").max(1);
    let context = model.context as u64;
    let per_lane = power_of_two_near(batch / context as f64 / lanes as f64);
    let micro = (MICRO_BATCH_TOKENS / context).clamp(1, per_lane);
    let micro = notes
        .fill(
            "train.micro_batch",
            &mut table.micro_batch,
            micro,
            "about 2,048 tokens",
        )
        .max(1);
    let why = format!("a batch near {batch:.0} tokens, 0.292 C^0.3271");
    let accumulate = (per_lane / micro).max(1);
    let accumulate = notes
        .fill("train.accumulate", &mut table.accumulate, accumulate, &why)
        .max(1);

    let per_step = [lanes, micro, accumulate, context, table.inner_steps_meant()]
        .iter()
        .fold(1.0, |product, &x| product * x as f64);
    let steps = libm::ceil(tokens / per_step) as u64;
    let steps = notes.fill(
        "train.steps",
        &mut table.steps,
        steps,
        "20 tokens per parameter",
    );
    let warmup = (steps / 50).clamp(10, 2000).min(steps);
    notes.fill(
        "train.warmup_steps",
        &mut table.warmup_steps,
        warmup,
        "a fiftieth of the steps",
    );
}

struct Notes {
    depth: u64,
    lines: Vec<String>,
}

impl Notes {
    /// Fills an empty slot and says so; returns what the slot holds now.
    fn fill<T: Copy + Debug + PartialEq>(
        &mut self,
        key: &str,
        slot: &mut Option<T>,
        derived: T,
        why: &str,
    ) -> T {
        let depth = self.depth;
        let now = shown(derived);
        let reason = if why.is_empty() {
            String::new()
        } else {
            format!(": {why}")
        };
        let line = match *slot {
            Some(given) if given != derived => {
                format!(
                    "{key} = {} (given; depth {depth} would derive {now})",
                    shown(given)
                )
            }
            Some(given) => format!("{key} = {} (given)", shown(given)),
            None => format!("{key} = {now} (from depth {depth}{reason})"),
        };
        self.lines.push(line);
        *slot.get_or_insert(derived)
    }
}

fn power_of_two_near(x: f64) -> u64 {
    let exponent = libm::round(libm::log2(x.max(1.0))) as u32;
    1 << exponent.min(16)
}

fn two_digits(x: f64) -> f64 {
    format!("{x:.1e}")
        .parse()
        .expect("a formatted number parses")
}
