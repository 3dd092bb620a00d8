//! Hugging Face's `config.json` and `generation_config.json`: written so that `transformers` loads our checkpoints as
//! they are, read so that theirs load here. **Pure.**
//!
//! A field that would change the mathematics and that the engine does not know is refused by name; fields that only
//! matter elsewhere (`use_cache`, `transformers_version`, …) are ignored.

use serde_json::{Map, Value, json};

use crate::spec::{Architecture, ModelConfig};

/// Token ids that generation needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin of text.
    pub bos: Option<u32>,
    /// Any of these ends a text.
    pub eos: Vec<u32>,
}

/// Why a `config.json` cannot be used. Each names the field.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// Not JSON.
    #[error("not valid JSON")]
    Json(#[from] serde_json::Error),
    /// JSON, but no object.
    #[error("not a JSON object")]
    NotAnObject,
    /// A model that Cohort does not build.
    #[error("architecture `{0}` is not supported; `LlamaForCausalLM` and `GPT2LMHeadModel` are")]
    Architecture(String),
    /// A field without a usable default is missing.
    #[error("field `{0}` is missing")]
    Missing(&'static str),
    /// A field of the wrong type or out of range.
    #[error("field `{field}` is `{value}`; expected {expected}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
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
        field: &'static str,
        /// Its value, as JSON.
        value: String,
        /// What would be accepted.
        expected: &'static str,
    },
}

/// The `config.json` of a model.
pub fn config_json(model: &ModelConfig, tokens: &SpecialTokens) -> String {
    let mut config = match model.architecture {
        Architecture::Llama => json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": model.context,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_hidden_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_key_value_heads,
            "head_dim": model.head_dim(),
            "intermediate_size": model.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": number(model.norm_eps),
            "rope_theta": number(model.rope_theta),
            "rope_scaling": null,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "mlp_bias": false,
            "pretraining_tp": 1,
        }),
        Architecture::Gpt2 => json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": model.context,
            "n_ctx": model.context,
            "n_embd": model.hidden_size,
            "n_layer": model.num_hidden_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.intermediate_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": number(model.norm_eps),
            "embd_pdrop": number(model.dropout),
            "attn_pdrop": number(model.dropout),
            "resid_pdrop": number(model.dropout),
            "scale_attn_weights": true,
            "bias": model.bias,
        }),
    };
    let fields = config.as_object_mut().expect("an object");
    fields.insert("vocab_size".into(), json!(model.vocab_size));
    fields.insert(
        "tie_word_embeddings".into(),
        json!(model.tie_word_embeddings),
    );
    fields.insert("initializer_range".into(), number(model.initializer_range));
    fields.insert("torch_dtype".into(), json!("float32"));
    fields.insert("use_cache".into(), json!(true));
    insert_tokens(fields, tokens);
    pretty(&config)
}

/// The `generation_config.json` of a model.
pub fn generation_config_json(tokens: &SpecialTokens) -> String {
    let mut fields = Map::new();
    insert_tokens(&mut fields, tokens);
    pretty(&Value::Object(fields))
}

/// The `tokenizer_config.json` beside a `tokenizer.json`: tells `transformers` to take the tokenizer as it is.
/// `tokenizer` is the content of `tokenizer.json`; the special tokens' texts are looked up in it. `chat_template` is the
/// template that the model was trained with, if it was.
pub fn tokenizer_config_json(
    model: &ModelConfig,
    tokens: &SpecialTokens,
    tokenizer: &[u8],
    chat_template: Option<&str>,
) -> String {
    let tokenizer: Value = serde_json::from_slice(tokenizer).unwrap_or(Value::Null);
    let text_of = |id: u32| -> Value {
        let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
        let token = added
            .into_iter()
            .find(|t| t["id"].as_u64() == Some(id.into()));
        token.map_or(Value::Null, |t| t["content"].clone())
    };
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.context,
        "clean_up_tokenization_spaces": false,
        "bos_token": tokens.bos.map_or(Value::Null, text_of),
        "eos_token": tokens.eos.first().map_or(Value::Null, |id| text_of(*id)),
    });
    if let Some(template) = chat_template {
        config["chat_template"] = template.into();
    }
    pretty(&config)
}

/// Reads a `config.json`: the model's shape and its special tokens.
pub fn parse_config(text: &str) -> Result<(ModelConfig, SpecialTokens), HfError> {
    let value: Value = serde_json::from_str(text)?;
    let fields = Fields(value.as_object().ok_or(HfError::NotAnObject)?);
    fields.only("quantization_config", "null", Value::is_null)?;
    let model = match fields.architecture()? {
        Architecture::Llama => parse_llama(&fields)?,
        Architecture::Gpt2 => parse_gpt2(&fields)?,
    };
    Ok((model, fields.special_tokens()?))
}

/// Reads the special tokens of a `config.json` or a `generation_config.json`.
pub fn parse_special_tokens(text: &str) -> Result<SpecialTokens, HfError> {
    let value: Value = serde_json::from_str(text)?;
    Fields(value.as_object().ok_or(HfError::NotAnObject)?).special_tokens()
}

fn parse_llama(f: &Fields) -> Result<ModelConfig, HfError> {
    let swish = |v: &Value| matches!(v.as_str(), Some("silu" | "swish"));
    f.only("hidden_act", "\"silu\"", swish)?;
    f.only("attention_bias", "false", is_false)?;
    f.only("mlp_bias", "false", is_false)?;
    f.only("sliding_window", "null", Value::is_null)?;
    f.only("rope_scaling", "null", is_default_rope)?;
    f.only("rope_parameters", "the default rope", is_default_rope)?;
    f.only("partial_rotary_factor", "1", |v| v.as_f64() == Some(1.0))?;
    let hidden_size = f.size("hidden_size", MAX_WIDTH)?;
    let num_attention_heads = f.size("num_attention_heads", MAX_WIDTH)?;
    let model = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: f.size("vocab_size", MAX_ROWS)?,
        context: f.size("max_position_embeddings", MAX_ROWS)?,
        hidden_size,
        num_hidden_layers: f.size("num_hidden_layers", MAX_LAYERS)?,
        num_attention_heads,
        num_key_value_heads: f.size_or("num_key_value_heads", MAX_WIDTH, num_attention_heads)?,
        head_dim: None,
        attention_bias: false,
        qk_norm: false,
        intermediate_size: f.size("intermediate_size", MAX_WIDTH)?,
        tie_word_embeddings: f.flag_or("tie_word_embeddings", false)?,
        bias: false,
        dropout: 0.0,
        norm_eps: f.positive_or("rms_norm_eps", 1e-6)?,
        rope_theta: f.rope_theta()?,
        rope_scaling: None,
        initializer_range: f.positive_or("initializer_range", 0.02)?,
        labels: Vec::new(),
    };
    f.divides("num_attention_heads", hidden_size, "hidden_size")?;
    f.divides(
        "num_key_value_heads",
        num_attention_heads,
        "num_attention_heads",
    )?;
    if f.size_or("head_dim", MAX_WIDTH, model.head_dim())? != model.head_dim() {
        return Err(f.invalid(
            "head_dim",
            format!("hidden_size / num_attention_heads = {}", model.head_dim()),
        ));
    }
    if !model.head_dim().is_multiple_of(2) {
        return Err(f.invalid("num_attention_heads", "heads of an even width"));
    }
    Ok(model)
}

fn parse_gpt2(f: &Fields) -> Result<ModelConfig, HfError> {
    // Three names of the same tanh approximation; "gelu" is another function.
    let gelu = |v: &Value| {
        matches!(
            v.as_str(),
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast")
        )
    };
    f.only("activation_function", "\"gelu_new\"", gelu)?;
    f.only("scale_attn_weights", "true", |v| v == &Value::Bool(true))?;
    f.only("scale_attn_by_inverse_layer_idx", "false", is_false)?;
    f.only("add_cross_attention", "false", is_false)?;
    f.only("tie_word_embeddings", "true", |v| v == &Value::Bool(true))?;
    let dropout = f.probability_or("resid_pdrop", 0.1)?;
    for field in ["embd_pdrop", "attn_pdrop"] {
        if f.probability_or(field, 0.1)? != dropout {
            return Err(f.invalid(field, format!("the same as resid_pdrop, {dropout}")));
        }
    }
    let hidden_size = f.size("n_embd", MAX_WIDTH)?;
    let heads = f.size("n_head", MAX_WIDTH)?;
    f.divides("n_head", hidden_size, "n_embd")?;
    Ok(ModelConfig {
        architecture: Architecture::Gpt2,
        vocab_size: f.size("vocab_size", MAX_ROWS)?,
        context: f.size("n_positions", MAX_ROWS)?,
        hidden_size,
        num_hidden_layers: f.size("n_layer", MAX_LAYERS)?,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: None,
        attention_bias: false,
        qk_norm: false,
        intermediate_size: f.size_or("n_inner", MAX_WIDTH, 4 * hidden_size)?,
        tie_word_embeddings: true,
        bias: f.flag_or("bias", true)?,
        dropout,
        norm_eps: f.positive_or("layer_norm_epsilon", 1e-5)?,
        rope_theta: DEFAULT_ROPE_THETA,
        rope_scaling: None,
        initializer_range: f.positive_or("initializer_range", 0.02)?,
        labels: Vec::new(),
    })
}

// Bounds that keep every product of sizes inside 64 bits, far above any real model.
const MAX_ROWS: usize = 1 << 28;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;

const DEFAULT_ROPE_THETA: f32 = 10_000.0;

/// The fields of a config, read with an error that names them. An absent field and `null` are the same, as they are
/// to `transformers`.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    fn invalid(&self, field: &'static str, expected: impl Into<String>) -> HfError {
        HfError::Invalid {
            field,
            value: self.0.get(field).unwrap_or(&Value::Null).to_string(),
            expected: expected.into(),
        }
    }

    /// An absent field is fine: it means the usual mathematics.
    fn only(
        &self,
        field: &'static str,
        expected: &'static str,
        ok: impl Fn(&Value) -> bool,
    ) -> Result<(), HfError> {
        match self.get(field) {
            Some(value) if !ok(value) => Err(HfError::Unsupported {
                field,
                value: value.to_string(),
                expected,
            }),
            _ => Ok(()),
        }
    }

    fn architecture(&self) -> Result<Architecture, HfError> {
        let named = self.get("architectures").and_then(|a| a.get(0));
        match named.or(self.get("model_type")).and_then(Value::as_str) {
            Some("LlamaForCausalLM" | "llama") => Ok(Architecture::Llama),
            Some("GPT2LMHeadModel" | "gpt2") => Ok(Architecture::Gpt2),
            Some(other) => Err(HfError::Architecture(other.to_owned())),
            None => Err(HfError::Missing("architectures")),
        }
    }

    fn size(&self, field: &'static str, max: usize) -> Result<usize, HfError> {
        let value = self.get(field).ok_or(HfError::Missing(field))?.as_u64();
        match value.and_then(|v| usize::try_from(v).ok()) {
            Some(size) if (1..=max).contains(&size) => Ok(size),
            _ => Err(self.invalid(field, format!("a whole number from 1 to {max}"))),
        }
    }

    fn size_or(&self, field: &'static str, max: usize, default: usize) -> Result<usize, HfError> {
        self.get(field)
            .map_or(Ok(default), |_| self.size(field, max))
    }

    fn flag_or(&self, field: &'static str, default: bool) -> Result<bool, HfError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.invalid(field, "true or false")),
        }
    }

    fn positive_or(&self, field: &'static str, default: f32) -> Result<f32, HfError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        match value.as_f64().map(|v| v as f32) {
            Some(v) if v.is_finite() && v > 0.0 => Ok(v),
            _ => Err(self.invalid(field, "a positive number")),
        }
    }

    fn probability_or(&self, field: &'static str, default: f32) -> Result<f32, HfError> {
        let Some(value) = self.get(field) else {
            return Ok(default);
        };
        match value.as_f64().map(|v| v as f32) {
            Some(v) if (0.0..1.0).contains(&v) => Ok(v),
            _ => Err(self.invalid(field, "a probability from 0 to below 1")),
        }
    }

    /// Newer versions of `transformers` keep it in `rope_parameters`.
    fn rope_theta(&self) -> Result<f32, HfError> {
        match self.get("rope_parameters").and_then(Value::as_object) {
            Some(rope) if rope.contains_key("rope_theta") => {
                Fields(rope).positive_or("rope_theta", DEFAULT_ROPE_THETA)
            }
            _ => self.positive_or("rope_theta", DEFAULT_ROPE_THETA),
        }
    }

    fn divides(&self, field: &'static str, whole: usize, name: &str) -> Result<(), HfError> {
        let part = self.size_or(field, MAX_WIDTH, 1)?;
        match whole.is_multiple_of(part) {
            true => Ok(()),
            false => Err(self.invalid(field, format!("a divisor of {name}, which is {whole}"))),
        }
    }

    fn token(&self, field: &'static str, value: &Value) -> Result<u32, HfError> {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| self.invalid(field, "a token id"))
    }

    fn special_tokens(&self) -> Result<SpecialTokens, HfError> {
        let bos = self.get("bos_token_id");
        Ok(SpecialTokens {
            bos: bos.map(|v| self.token("bos_token_id", v)).transpose()?,
            eos: match self.get("eos_token_id") {
                None => Vec::new(),
                Some(Value::Array(ids)) => {
                    let ids = ids.iter().map(|v| self.token("eos_token_id", v));
                    ids.collect::<Result<_, _>>()?
                }
                Some(id) => vec![self.token("eos_token_id", id)?],
            },
        })
    }
}

fn is_false(value: &Value) -> bool {
    value == &Value::Bool(false)
}

fn is_default_rope(value: &Value) -> bool {
    let kind = value.get("rope_type").or(value.get("type"));
    value.is_null() || (value.is_object() && kind.is_none_or(|k| k == "default"))
}

fn insert_tokens(fields: &mut Map<String, Value>, tokens: &SpecialTokens) {
    let eos = match tokens.eos.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    fields.insert("bos_token_id".into(), json!(tokens.bos));
    fields.insert("eos_token_id".into(), eos);
}

/// The shortest decimal that reads back as this f32, not the digits of the f64 nearest to it.
fn number(value: f32) -> Value {
    json!(
        value
            .to_string()
            .parse::<f64>()
            .expect("a float prints as a number")
    )
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("plain data") + "\n"
}

#[cfg(test)]
mod tests;
