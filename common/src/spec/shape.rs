//! From a `[model]` table to a model shape: the defaults of each family and the shapes that cannot be built.

use super::bounds::{number, real, within};
use super::error::SpecError;
use super::file::ModelTable;
use super::{Architecture, ModelConfig};

/// Width of a head where nobody says otherwise.
pub(super) const HEAD_DIM: u64 = 64;

/// The shape that a table means; `vocab_size` stays 0.
pub(super) fn shape_of(table: &ModelTable) -> Result<ModelConfig, SpecError> {
    let architecture = table.architecture.unwrap_or(Architecture::Llama);
    let hidden = table.hidden_size.unwrap_or(384);
    within(
        "model.hidden_size",
        hidden,
        1..=65_536,
        "384 is the default",
    )?;
    if let Some(dim) = table.head_dim {
        within("model.head_dim", dim, 1..=1024, "64 is usual")?;
    }
    let heads = table
        .num_attention_heads
        .unwrap_or((hidden / table.head_dim.unwrap_or(HEAD_DIM)).max(1));
    let intermediate = table.intermediate_size.unwrap_or(match architecture {
        Architecture::Llama => llama_intermediate(hidden),
        Architecture::Gpt2 => 4 * hidden,
    });
    let layers = table.num_hidden_layers.unwrap_or(6);
    let context = table.context.unwrap_or(256);
    within(
        "model.num_hidden_layers",
        layers,
        1..=1024,
        "6 is the default",
    )?;
    within(
        "model.num_attention_heads",
        heads,
        1..=4096,
        "heads of 64 are usual",
    )?;
    within(
        "model.intermediate_size",
        intermediate,
        1..=1 << 20,
        "leave it out for the usual width",
    )?;
    within("model.context", context, 1..=1 << 20, "256 is the default")?;
    let model = ModelConfig {
        architecture,
        vocab_size: 0,
        context: context as usize,
        hidden_size: hidden as usize,
        num_hidden_layers: layers as usize,
        num_attention_heads: heads as usize,
        num_key_value_heads: kv_heads(table, architecture, heads)? as usize,
        // A width that follows from the others is not kept apart: the same shape is the same model.
        head_dim: (table.head_dim.map(|dim| dim as usize))
            .filter(|dim| dim * heads as usize != hidden as usize),
        attention_bias: table.attention_bias.unwrap_or(false),
        qk_norm: table.qk_norm.unwrap_or(false),
        intermediate_size: intermediate as usize,
        tie_word_embeddings: table.tie_word_embeddings.unwrap_or(true),
        bias: table.bias.unwrap_or(architecture == Architecture::Gpt2),
        dropout: table.dropout.unwrap_or(0.0) as f32,
        norm_eps: table.norm_eps.unwrap_or(1e-5) as f32,
        rope_theta: table.rope_theta.unwrap_or(10_000.0) as f32,
        rope_scaling: None,
        initializer_range: table.initializer_range.unwrap_or(0.02) as f32,
        labels: Vec::new(),
    };
    check_family(table, architecture)?;
    check_heads(&model, table.num_attention_heads.is_some())?;
    check_numbers(table)?;
    Ok(model)
}

/// Two thirds of the four-fold width, as SwiGLU has three matrices where others have two (Shazeer, arXiv 2002.05202),
/// rounded up to a multiple of 64.
pub(super) fn llama_intermediate(hidden: u64) -> u64 {
    (8 * hidden).div_ceil(3).next_multiple_of(64)
}

fn kv_heads(table: &ModelTable, architecture: Architecture, heads: u64) -> Result<u64, SpecError> {
    let kv = table.num_key_value_heads.unwrap_or(heads);
    if kv == 0 || !heads.is_multiple_of(kv) {
        return Err(SpecError::impossible(
            "model.num_key_value_heads",
            kv,
            format!("it must divide `model.num_attention_heads`, which is {heads}"),
            format!("take one of {}", divisors(heads)),
        ));
    }
    if architecture == Architecture::Gpt2 && kv != heads {
        return Err(SpecError::impossible(
            "model.num_key_value_heads",
            kv,
            format!("`gpt2` has as many as `model.num_attention_heads`, which is {heads}"),
            "remove it, or take `model.architecture = \"llama\"`",
        ));
    }
    Ok(kv)
}

fn check_heads(model: &ModelConfig, given: bool) -> Result<(), SpecError> {
    let (hidden, heads) = (model.hidden_size, model.num_attention_heads);
    if let Some(dim) = model.head_dim {
        return match dim % 2 {
            0 => Ok(()),
            _ => Err(SpecError::impossible(
                "model.head_dim",
                dim,
                "rotary positions turn pairs, so it must be even",
                format!("{} or {} would do", dim - 1, dim + 1),
            )),
        };
    }
    if !hidden.is_multiple_of(heads) {
        let origin = if given { "" } else { " (heads of 64)" };
        return Err(SpecError::impossible(
            "model.hidden_size",
            hidden,
            format!(
                "it must be a multiple of `model.num_attention_heads`, which is {heads}{origin}"
            ),
            format!(
                "{} or {} would do",
                hidden / heads * heads,
                hidden.next_multiple_of(heads)
            ),
        ));
    }
    if model.architecture == Architecture::Llama && !model.head_dim().is_multiple_of(2) {
        return Err(SpecError::impossible(
            "model.num_attention_heads",
            heads,
            format!(
                "a head would be {} wide, and rotary positions turn pairs",
                model.head_dim()
            ),
            format!("heads must divide {} into even widths", hidden),
        ));
    }
    Ok(())
}

/// What one family has and the other has not.
fn check_family(table: &ModelTable, architecture: Architecture) -> Result<(), SpecError> {
    let refuse = |key: &str, value: String, bound: &str, next: &str| {
        Err(SpecError::impossible(key, value, bound, next))
    };
    let to_gpt2 = "remove it, or take `model.architecture = \"gpt2\"`";
    let to_llama = "remove it, or take `model.architecture = \"llama\"`";
    match architecture {
        Architecture::Llama => {
            if table.bias == Some(true) {
                return refuse(
                    "model.bias",
                    "true".into(),
                    "`llama` has no biases but those of `model.attention_bias`",
                    to_gpt2,
                );
            }
            if table.attention_bias == Some(true) && table.qk_norm == Some(true) {
                return refuse(
                    "model.qk_norm",
                    "true".into(),
                    "no model of Hugging Face's has it together with `model.attention_bias`",
                    "remove one of the two",
                );
            }
            if let Some(dropout) = table.dropout.filter(|d| *d != 0.0) {
                return refuse(
                    "model.dropout",
                    number(dropout),
                    "`llama` has no dropout",
                    to_gpt2,
                );
            }
        }
        Architecture::Gpt2 => {
            if table.tie_word_embeddings == Some(false) {
                let bound = "`gpt2` always ties its head to the embedding";
                return refuse("model.tie_word_embeddings", "false".into(), bound, to_llama);
            }
            if let Some(theta) = table.rope_theta {
                let bound = "`gpt2` learns its positions and rotates nothing";
                return refuse("model.rope_theta", number(theta), bound, to_llama);
            }
            if let Some(dim) = table.head_dim {
                let bound = "`gpt2` cuts `model.hidden_size` into heads";
                return refuse("model.head_dim", dim.to_string(), bound, to_llama);
            }
            for (key, given) in [
                ("model.attention_bias", table.attention_bias),
                ("model.qk_norm", table.qk_norm),
            ] {
                if given == Some(true) {
                    let bound = "it is of `llama` alone; `gpt2` has `model.bias`";
                    return refuse(key, "true".into(), bound, to_llama);
                }
            }
        }
    }
    Ok(())
}

fn check_numbers(table: &ModelTable) -> Result<(), SpecError> {
    let dropout = table.dropout.unwrap_or(0.0);
    let bound = "it must be at least 0 and below 1";
    // As `f32`, because that is what the model takes: a value just below 1 would become 1.
    real(
        "model.dropout",
        dropout,
        (0.0..1.0).contains(&(dropout as f32)),
        bound,
        "0.1 or 0.2 are usual",
    )?;
    for (key, value, most, next) in [
        ("model.norm_eps", table.norm_eps, 1.0, "1e-5 is usual"),
        ("model.rope_theta", table.rope_theta, 1e30, "10000 is usual"),
        (
            "model.initializer_range",
            table.initializer_range,
            10.0,
            "0.02 is usual",
        ),
    ] {
        let Some(value) = value else { continue };
        let single = value as f32;
        let holds = single.is_normal() && single > 0.0 && value <= most;
        let bound = format!(
            "it must be above 0, at most {}, and fit 32 bits",
            number(most)
        );
        real(key, value, holds, &bound, next)?;
    }
    Ok(())
}

fn divisors(n: u64) -> String {
    let all: Vec<String> = (1..=n)
        .filter(|d| n.is_multiple_of(*d))
        .map(|d| d.to_string())
        .collect();
    all.join(", ")
}
