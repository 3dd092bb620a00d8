//! Hugging Face's `config.json` and `generation_config.json`: written so that `transformers` loads our checkpoints as
//! they are, read so that theirs load here. **Pure.**
//!
//! Read are `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `GPT2LMHeadModel`. A
//! field that would change the mathematics and that the engine does not know is refused by name; so is every field that
//! is neither known nor in the list of those that only matter elsewhere (`use_cache`, `transformers_version`, …).
//!
//! Parts, in reading order: `families` (from the fields of each family to a model), `rope` (rotary positions), `harmless`
//! (what is ignored), `fields` (reads a field with an error that names it), `write` (the other way).

mod families;
mod fields;
mod harmless;
mod rope;
mod write;

use serde_json::Value;

use self::fields::Fields;
pub use self::write::{config_json, generation_config_json, tokenizer_config_json};
use crate::spec::ModelConfig;

/// Token ids that generation needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin of text.
    pub bos: Option<u32>,
    /// Any of these ends a text.
    pub eos: Vec<u32>,
}

/// Why a `config.json` cannot be used. Each names the field; one of an inner object is written `rope_scaling.factor`.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// Not JSON.
    #[error("not valid JSON")]
    Json(#[from] serde_json::Error),
    /// JSON, but no object.
    #[error("not a JSON object")]
    NotAnObject,
    /// A model that Cohort does not build.
    #[error(
        "architecture `{0}` is not supported; `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `GPT2LMHeadModel` are"
    )]
    Architecture(String),
    /// A field without a usable default is missing.
    #[error("field `{0}` is missing")]
    Missing(String),
    /// A field of the wrong type or out of range.
    #[error("field `{field}` is `{value}`; expected {expected}")]
    Invalid {
        /// Name of the field.
        field: String,
        /// Its value, as JSON.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// A field that changes the mathematics in a way that the engine does not implement.
    #[error(
        "field `{field}` is `{value}`, which changes the model in a way that is not supported; only {expected} is"
    )]
    Unsupported {
        /// Name of the field.
        field: String,
        /// Its value, as JSON.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// A field that may or may not change the mathematics.
    #[error(
        "field `{field}` is not known to this version and might change the model; if it does not, remove it from the file"
    )]
    Unknown {
        /// Name of the field.
        field: String,
    },
}

/// Reads a `config.json`: the model's shape and its special tokens.
pub fn parse_config(text: &str) -> Result<(ModelConfig, SpecialTokens), HfError> {
    let value: Value = serde_json::from_str(text)?;
    let fields = Fields::of(value.as_object().ok_or(HfError::NotAnObject)?);
    let model = families::parse(&fields)?;
    let tokens = fields.special_tokens()?;
    fields.refuse_unknown(harmless::is_harmless)?;
    Ok((model, tokens))
}

/// Reads the special tokens of a `config.json` or a `generation_config.json`.
pub fn parse_special_tokens(text: &str) -> Result<SpecialTokens, HfError> {
    let value: Value = serde_json::from_str(text)?;
    Fields::of(value.as_object().ok_or(HfError::NotAnObject)?).special_tokens()
}

#[cfg(test)]
mod tests;
