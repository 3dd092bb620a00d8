//! From the fields of each family's config to a model. What a field means where it is absent differs from family to
//! family; the defaults are those of the classes of `transformers`.

use serde_json::Value;

use super::HfError;
use super::fields::Fields;
use super::rope;
use crate::spec::{Architecture, ModelConfig};

// Bounds that keep every product of sizes inside 64 bits, far above any real model.
pub(super) const MAX_ROWS: usize = 1 << 28;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;

/// The families that are read. All but `Gpt2` become a model of [`Architecture::Llama`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gpt2,
}

/// Class, `model_type`, family.
const FAMILIES: &[(&str, &str, Family)] = &[
    ("LlamaForCausalLM", "llama", Family::Llama),
    ("MistralForCausalLM", "mistral", Family::Mistral),
    ("Qwen2ForCausalLM", "qwen2", Family::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Family::Qwen3),
    ("GPT2LMHeadModel", "gpt2", Family::Gpt2),
];

/// The model that a config describes.
pub fn parse(f: &Fields) -> Result<ModelConfig, HfError> {
    let family = family(f)?;
    f.only("quantization_config", "null", Value::is_null)?;
    f.only_false("is_encoder_decoder")?;
    f.only_false("add_cross_attention")?;
    f.only("pruned_heads", "{}", |v| {
        v.as_object().is_some_and(|heads| heads.is_empty())
    })?;
    let model = match family {
        Family::Gpt2 => gpt2(f),
        _ => llama(f, family),
    }?;
    Ok(ModelConfig {
        labels: labels(f)?,
        ..model
    })
}

/// What the name of a class that classifies sequences ends with, in place of that of a language model.
const CLASSIFIER: &str = "ForSequenceClassification";

/// The name of the language model's class that goes with a class.
fn language_model(class: &str) -> String {
    match class.strip_suffix(CLASSIFIER) {
        Some("GPT2") => "GPT2LMHeadModel".into(),
        Some(family) => format!("{family}ForCausalLM"),
        None => class.into(),
    }
}

/// The labels of a classifier in the order of their numbers; none of a language model.
fn labels(f: &Fields) -> Result<Vec<String>, HfError> {
    let class = f.get("architectures").and_then(|a| a.get(0));
    let classifies = class
        .and_then(Value::as_str)
        .is_some_and(|class| class.ends_with(CLASSIFIER));
    if !classifies {
        return Ok(Vec::new());
    }
    f.only("problem_type", "\"single_label_classification\"", |v| {
        v == "single_label_classification"
    })?;
    let expected = "an object from the numbers 0, 1, … to two labels at least";
    let invalid = || f.invalid("id2label", expected);
    let Some(by_id) = f.get("id2label") else {
        // The default of `transformers`.
        return Ok(vec!["LABEL_0".into(), "LABEL_1".into()]);
    };
    let by_id = by_id.as_object().ok_or_else(invalid)?;
    let label = |id: usize| by_id.get(&id.to_string()).and_then(Value::as_str);
    let labels: Option<Vec<String>> = (0..by_id.len())
        .map(|id| label(id).map(String::from))
        .collect();
    let labels = labels
        .filter(|labels| labels.len() > 1)
        .ok_or_else(invalid)?;
    // One model must not have one label under two numbers: it could not be told which is meant.
    let distinct: std::collections::BTreeSet<_> = labels.iter().collect();
    match distinct.len() == labels.len() {
        true => Ok(labels),
        false => Err(f.invalid("id2label", "different labels")),
    }
}

/// The class that is named, which must go with the type that is named.
fn family(f: &Fields) -> Result<Family, HfError> {
    let class = f.get("architectures").map(|a| a.get(0).unwrap_or(a));
    let kind = f.get("model_type");
    let named = class.or(kind).ok_or_else(|| f.missing("architectures"))?;
    let known = named.as_str().and_then(|name| {
        let mut families = FAMILIES.iter();
        families.find(|(class_of, type_of, _)| match class {
            Some(_) => language_model(name) == *class_of,
            None => name == *type_of,
        })
    });
    let Some((class, type_of, family)) = known else {
        let name = named.as_str().map(str::to_owned);
        return Err(HfError::Architecture(
            name.unwrap_or_else(|| named.to_string()),
        ));
    };
    match kind {
        Some(kind) if kind != type_of => {
            Err(f.invalid("model_type", format!("`{type_of}`, which `{class}` is of")))
        }
        _ => Ok(*family),
    }
}

fn llama(f: &Fields, family: Family) -> Result<ModelConfig, HfError> {
    let swish = |v: &Value| matches!(v.as_str(), Some("silu" | "swish"));
    f.only("hidden_act", "\"silu\"", swish)?;
    f.only_number("attention_dropout", 0.0)?;
    f.only_false("mlp_bias")?;
    // Qwen2 has biases of queries, keys and values without saying so; elsewhere the field means one of the output, too.
    match family {
        Family::Qwen2 => f.only_true("attention_bias")?,
        _ => f.only_false("attention_bias")?,
    }
    let context = f.size("max_position_embeddings", MAX_ROWS)?;
    let layers = f.size("num_hidden_layers", MAX_LAYERS)?;
    full_attention(f, family, context, layers)?;
    let hidden_size = f.size("hidden_size", MAX_WIDTH)?;
    let heads = f.size("num_attention_heads", MAX_WIDTH)?;
    let (rope_theta, rope_scaling) = rope::parse(f)?;
    Ok(ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: f.size("vocab_size", MAX_ROWS)?,
        context,
        hidden_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads(f, family, heads)?,
        head_dim: head_dim(f, family, hidden_size, heads)?,
        attention_bias: family == Family::Qwen2,
        qk_norm: family == Family::Qwen3,
        intermediate_size: f.size("intermediate_size", MAX_WIDTH)?,
        tie_word_embeddings: f.flag_or("tie_word_embeddings", false)?,
        bias: false,
        dropout: 0.0,
        norm_eps: f.positive_or("rms_norm_eps", 1e-6)?,
        rope_theta,
        rope_scaling,
        initializer_range: f.positive_or("initializer_range", 0.02)?,
        labels: Vec::new(),
    })
}

/// Every token must see all tokens before it.
fn full_attention(
    f: &Fields,
    family: Family,
    context: usize,
    layers: usize,
) -> Result<(), HfError> {
    f.only("layer_types", "\"full_attention\" in every layer", |v| {
        let types = v.as_array();
        types.is_some_and(|t| t.len() == layers && t.iter().all(|t| t == "full_attention"))
    })?;
    let no_window = format!("null, or at least max_position_embeddings ({context}),");
    let is_wide = |v: &Value| v.as_u64().is_some_and(|window| window >= context as u64);
    match family {
        // A window that is not used may have any width.
        Family::Qwen2 | Family::Qwen3 => {
            f.only_false("use_sliding_window")?;
            f.only_false("use_mrope")?;
            f.get("sliding_window");
            f.get("max_window_layers");
            Ok(())
        }
        // The class has a window of 4096 where the config does not say `null`.
        Family::Mistral if !f.has("sliding_window") && context > 4096 => {
            Err(f.missing("sliding_window"))
        }
        _ => f.only("sliding_window", &no_window, is_wide),
    }
}

fn kv_heads(f: &Fields, family: Family, heads: usize) -> Result<usize, HfError> {
    let absent = match family {
        _ if f.has("num_key_value_heads") => heads,
        Family::Mistral => 8,
        Family::Qwen2 | Family::Qwen3 => 32,
        Family::Llama | Family::Gpt2 => heads,
    };
    let kv = f.size_or("num_key_value_heads", MAX_WIDTH, absent)?;
    f.divides("num_key_value_heads", kv, heads, "num_attention_heads")?;
    Ok(kv)
}

/// The width of a head where it is not its share of the hidden size.
fn head_dim(
    f: &Fields,
    family: Family,
    hidden: usize,
    heads: usize,
) -> Result<Option<usize>, HfError> {
    let given = match f.get("head_dim") {
        Some(_) => Some(f.size("head_dim", MAX_WIDTH)?),
        None if family == Family::Qwen3 => Some(128),
        None => None,
    };
    let Some(dim) = given.filter(|dim| dim * heads != hidden) else {
        f.divides("num_attention_heads", heads, hidden, "hidden_size")?;
        return match (hidden / heads).is_multiple_of(2) {
            true => Ok(None),
            false => Err(f.invalid("num_attention_heads", "heads of an even width")),
        };
    };
    match dim.is_multiple_of(2) {
        true => Ok(Some(dim)),
        false => Err(f.invalid("head_dim", "an even width")),
    }
}

fn gpt2(f: &Fields) -> Result<ModelConfig, HfError> {
    // Three names of the same tanh approximation; "gelu" is another function.
    let gelu = |v: &Value| {
        matches!(
            v.as_str(),
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast")
        )
    };
    f.only("activation_function", "\"gelu_new\"", gelu)?;
    f.only_true("scale_attn_weights")?;
    f.only_false("scale_attn_by_inverse_layer_idx")?;
    f.only_true("tie_word_embeddings")?;
    let dropout = f.probability_or("resid_pdrop", 0.1)?;
    for field in ["embd_pdrop", "attn_pdrop"] {
        if f.probability_or(field, 0.1)? != dropout {
            return Err(f.invalid(field, format!("the same as resid_pdrop, {dropout}")));
        }
    }
    let hidden_size = f.size("n_embd", MAX_WIDTH)?;
    let heads = f.size("n_head", MAX_WIDTH)?;
    f.divides("n_head", heads, hidden_size, "n_embd")?;
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
        rope_theta: rope::DEFAULT_THETA,
        rope_scaling: None,
        initializer_range: f.positive_or("initializer_range", 0.02)?,
        labels: Vec::new(),
    })
}
