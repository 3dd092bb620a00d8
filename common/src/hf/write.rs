//! Configs as `transformers` reads them, in the fields that its versions 4 and 5 both know.

use serde_json::{Map, Value, json};

use super::SpecialTokens;
use crate::spec::{Architecture, ModelConfig, RopeScaling};

/// The `config.json` of a model.
pub fn config_json(model: &ModelConfig, tokens: &SpecialTokens) -> String {
    let mut config = match model.architecture {
        Architecture::Llama => llama(model),
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
    insert_labels(fields, model);
    pretty(&config)
}

/// Makes the config one of a sequence classifier, if the model is one. No pad token is named: whoever scores several
/// texts at once has to choose one that ends none of them.
fn insert_labels(fields: &mut Map<String, Value>, model: &ModelConfig) {
    if !model.classifies() {
        return;
    }
    let class = fields["architectures"][0].as_str().unwrap_or_default();
    let family = class
        .trim_end_matches("ForCausalLM")
        .trim_end_matches("LMHeadModel");
    let class = format!("{family}ForSequenceClassification");
    let numbered = || model.labels.iter().enumerate();
    let by_id: Map<_, _> = numbered()
        .map(|(id, label)| (id.to_string(), json!(label)))
        .collect();
    let by_label: Map<_, _> = numbered()
        .map(|(id, label)| (label.clone(), json!(id)))
        .collect();
    fields.insert("architectures".into(), json!([class]));
    fields.insert("id2label".into(), by_id.into());
    fields.insert("label2id".into(), by_label.into());
    fields.insert("pad_token_id".into(), Value::Null);
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

/// The class that has all that the model has, and no more.
fn llama(model: &ModelConfig) -> Value {
    let (class, kind) = match (model.qk_norm, model.attention_bias) {
        (true, _) => ("Qwen3ForCausalLM", "qwen3"),
        (false, true) => ("Qwen2ForCausalLM", "qwen2"),
        (false, false) => ("LlamaForCausalLM", "llama"),
    };
    let mut config = json!({
        "architectures": [class],
        "model_type": kind,
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
        "rope_scaling": model.rope_scaling.map(rope_scaling),
        "attention_dropout": 0.0,
    });
    let fields = match kind {
        "llama" => json!({"attention_bias": false, "mlp_bias": false, "pretraining_tp": 1}),
        "qwen2" => json!({"use_sliding_window": false, "sliding_window": null}),
        _ => json!({"attention_bias": false, "use_sliding_window": false, "sliding_window": null}),
    };
    let own = fields.as_object().expect("an object").clone();
    config.as_object_mut().expect("an object").extend(own);
    config
}

fn rope_scaling(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({
            "rope_type": "linear",
            "factor": number(factor),
        }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": number(factor),
            "low_freq_factor": number(low_freq_factor),
            "high_freq_factor": number(high_freq_factor),
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
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
