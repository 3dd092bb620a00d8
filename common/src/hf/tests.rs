//! Configs as they are found, and as we write them.

use serde_json::json;

use super::*;
use crate::spec::{Architecture, RopeScaling};

mod published;

const STORIES: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 64,
    "initializer_range": 0.02, "intermediate_size": 172, "max_position_embeddings": 512,
    "mlp_bias": false, "model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 5,
    "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "float32",
    "use_cache": true, "vocab_size": 512
}"#;

const GPT2: &str = r#"{
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257
}"#;

fn with(text: &str, field: &str, value: Value) -> String {
    let mut config: Value = serde_json::from_str(text).unwrap();
    config[field] = value;
    config.to_string()
}

#[test]
fn stories260k_is_read() {
    let (model, tokens) = parse_config(STORIES).unwrap();
    assert_eq!(model.head_dim(), 8);
    assert_eq!(model.norm_eps, 1e-5);
    assert_eq!(crate::layout::Layout::of(&model).len(), 260_032);
    assert_eq!((tokens.bos, tokens.eos), (Some(1), vec![2]));
}

#[test]
fn gpt2_is_read() {
    let (model, _) = parse_config(GPT2).unwrap();
    assert_eq!(crate::layout::Layout::of(&model).len(), 124_439_808);
    assert_eq!((model.bias, model.dropout), (true, 0.1));
}

#[test]
fn what_is_written_is_read_back() {
    let tokens = SpecialTokens {
        bos: None,
        eos: vec![3, 4],
    };
    let published = published::READ.iter().map(|(_, text, _)| *text);
    for text in [STORIES, GPT2].into_iter().chain(published) {
        let (model, _) = parse_config(text).unwrap();
        for (norm_eps, bias) in [(1e-5, true), (1.234_567_9e-6, false)] {
            let model = ModelConfig {
                norm_eps,
                bias: bias && model.architecture == Architecture::Gpt2,
                ..model.clone()
            };
            let written = config_json(&model, &tokens);
            assert_eq!(parse_config(&written).unwrap(), (model, tokens.clone()));
        }
    }
    let generation = generation_config_json(&tokens);
    assert_eq!(parse_special_tokens(&generation).unwrap(), tokens);
}

#[test]
fn floats_are_written_as_people_write_them() {
    let (model, tokens) = parse_config(STORIES).unwrap();
    let written: Value = serde_json::from_str(&config_json(&model, &tokens)).unwrap();
    assert_eq!(written["rms_norm_eps"], json!(1e-5));
}

#[test]
fn what_would_change_the_mathematics_is_refused_by_name() {
    let llama = [
        ("rope_interleaved", json!(true)),
        ("partial_rotary_factor", json!(0.5)),
        ("attention_dropout", json!(0.1)),
        (
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
        ),
        ("model_type", json!("mistral")),
        ("pruned_heads", json!({"0": [1]})),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("sliding_window", json!(256)),
        ("hidden_act", json!("gelu")),
        ("head_dim", json!(7)),
        ("num_key_value_heads", json!(3)),
        ("num_attention_heads", json!(64)),
        ("vocab_size", json!(u64::MAX)),
        ("hidden_size", json!(-1)),
        ("rms_norm_eps", json!("small")),
        ("quantization_config", json!({})),
        // Fields that this version has never heard of.
        ("attention_multiplier", json!(0.5)),
        ("no_rope_layers", json!([1, 0])),
        ("auto_map", json!({"AutoModel": "modeling.Model"})),
    ];
    let gpt2 = [
        ("scale_attn_by_inverse_layer_idx", json!(true)),
        ("scale_attn_weights", json!(false)),
        ("activation_function", json!("gelu")),
        ("tie_word_embeddings", json!(false)),
        ("attn_pdrop", json!(0.3)),
        ("n_head", json!(7)),
    ];
    let cases = llama
        .iter()
        .map(|c| (STORIES, c))
        .chain(gpt2.iter().map(|c| (GPT2, c)));
    for (text, (field, value)) in cases {
        let error = parse_config(&with(text, field, value.clone())).unwrap_err();
        assert!(
            error.to_string().contains(&format!("`{field}`")),
            "{field}: {error}"
        );
    }
}

#[test]
fn unknown_architectures_and_non_configs_are_refused() {
    for name in ["MixtralForCausalLM", "LlamaForTokenClassification"] {
        let error = parse_config(&with(STORIES, "architectures", json!([name]))).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with(&format!("architecture `{name}`"))
        );
    }
    assert!(matches!(parse_config("[]"), Err(HfError::NotAnObject)));
    assert!(matches!(parse_config("{"), Err(HfError::Json(_))));
    let error = parse_config("{}").unwrap_err();
    assert_eq!(error.to_string(), "field `architectures` is missing");
    let by_type = with(STORIES, "architectures", Value::Null);
    assert!(parse_config(&by_type).is_ok());
}

#[test]
fn the_newer_place_of_the_rope_base_is_read() {
    let rope = json!({"rope_type": "default", "rope_theta": 500_000.0});
    let text = with(
        &with(STORIES, "rope_theta", Value::Null),
        "rope_parameters",
        rope,
    );
    assert_eq!(parse_config(&text).unwrap().0.rope_theta, 500_000.0);
}

#[test]
fn scalings_are_read_in_every_place_and_refused_by_name() {
    let llama3 = json!({
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"
    });
    let expected = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    for place in ["rope_scaling", "rope_parameters"] {
        let (model, _) = parse_config(&with(STORIES, place, llama3.clone())).unwrap();
        assert_eq!(model.rope_scaling, Some(expected));
        let linear = json!({"type": "linear", "factor": 2.0});
        let (model, _) = parse_config(&with(STORIES, place, linear)).unwrap();
        assert_eq!(
            model.rope_scaling,
            Some(RopeScaling::Linear { factor: 2.0 })
        );
    }
    let without = |field: &str| {
        let mut rope = llama3.clone();
        rope.as_object_mut().unwrap().remove(field);
        rope
    };
    let changed = |field: &str, value: Value| {
        let mut rope = llama3.clone();
        rope[field] = value;
        rope
    };
    for (rope, named) in [
        (
            json!({"rope_type": "yarn", "factor": 4.0}),
            "rope_scaling.rope_type",
        ),
        (
            json!({"type": "dynamic", "factor": 4.0}),
            "rope_scaling.type",
        ),
        (without("low_freq_factor"), "rope_scaling.low_freq_factor"),
        (
            changed("attention_factor", json!(0.5)),
            "rope_scaling.attention_factor",
        ),
        (changed("factor", json!("8")), "rope_scaling.factor"),
        (changed("high_freq_factor", json!(0.5)), "high_freq_factor"),
        (
            changed("partial_rotary_factor", json!(0.5)),
            "rope_scaling.partial_rotary_factor",
        ),
        (json!(3), "rope_scaling"),
    ] {
        let error = parse_config(&with(STORIES, "rope_scaling", rope)).unwrap_err();
        assert!(error.to_string().contains(&format!("`{named}`")), "{error}");
    }
    let both = with(STORIES, "rope_parameters", json!({"rope_type": "default"}));
    let error = parse_config(&with(&both, "rope_scaling", llama3)).unwrap_err();
    assert!(error.to_string().contains("`rope_scaling`"), "{error}");
}

#[test]
fn special_token_texts_are_looked_up() {
    let (model, tokens) = parse_config(STORIES).unwrap();
    let tokenizer = br#"{"added_tokens": [{"id": 2, "content": "</s>"}]}"#;
    let text = tokenizer_config_json(&model, &tokens, tokenizer, None);
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["eos_token"], "</s>");
    assert!(value["bos_token"].is_null());
    assert_eq!(value.get("chat_template"), None);
}

#[test]
fn a_chat_template_is_written_as_it_is() {
    let (model, tokens) = parse_config(STORIES).unwrap();
    let template = "{{ '\\n' }}\n\"ü\"";
    let text = tokenizer_config_json(&model, &tokens, b"{}", Some(template));
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["chat_template"], template);
}
