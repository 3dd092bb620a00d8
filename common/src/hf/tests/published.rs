//! Configs as they are published, and as `transformers` 5 writes them.

use super::*;
use crate::layout::Layout;

/// Name, config, and the number of parameters (a tied head counted once).
pub const READ: &[(&str, &str, usize)] = &[
    ("Llama 2 7B", LLAMA_2, 6_738_415_616),
    ("Llama 3.1 8B", LLAMA_3_1, 8_030_261_248),
    ("Llama 3.2 1B", LLAMA_3_2, 1_235_814_400),
    ("Mistral 7B v0.3", MISTRAL, 7_248_023_552),
    ("Qwen2.5 0.5B", QWEN_2_5, 494_032_768),
    ("Qwen3 0.6B", QWEN_3, 596_049_920),
    ("SmolLM 135M Instruct", SMOLLM, 134_515_008),
    ("SmolLM2 135M", SMOLLM_2, 134_515_008),
    ("GPT-2", GPT_2, 124_439_808),
    ("Qwen3 of transformers 5", QWEN_3_OF_5, 1_984),
    ("GPT-2 of transformers 5", GPT_2_OF_5, 124_439_808),
];

const LLAMA_2: &str = r#"{
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000
}"#;

const LLAMA_3_1: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256
}"#;

const LLAMA_3_2: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
    "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256
}"#;

const MISTRAL: &str = r#"{
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
    "use_cache": true, "vocab_size": 32768
}"#;

const QWEN_2_5: &str = r#"{
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
    "vocab_size": 151936
}"#;

const QWEN_3: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
    "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936
}"#;

const SMOLLM: &str = r#"{
    "_name_or_path": "HuggingFaceTB/SmolLM-135M", "architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.02, "intermediate_size": 1536, "max_position_embeddings": 2048, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers.js_config": {"dtype": "q4"},
    "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152
}"#;

const SMOLLM_2: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
    "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": true, "vocab_size": 49152
}"#;

const GPT_2: &str = r#"{
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
    "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
    "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257
}"#;

const QWEN_3_OF_5: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": null,
    "dtype": "float32", "eos_token_id": null, "head_dim": 8, "hidden_act": "silu", "hidden_size": 16,
    "initializer_range": 0.02, "intermediate_size": 8, "layer_types": ["full_attention"],
    "max_position_embeddings": 32, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 4,
    "num_hidden_layers": 1, "num_key_value_heads": 1, "pad_token_id": null, "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "sliding_window": null,
    "tie_word_embeddings": true, "transformers_version": "5.24.0", "use_cache": true, "use_sliding_window": false,
    "vocab_size": 16
}"#;

const GPT_2_OF_5: &str = r#"{
    "activation_function": "gelu_new", "add_cross_attention": false, "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1, "bos_token_id": 50256, "dtype": "float32", "embd_pdrop": 0.1, "eos_token_id": 50256,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": 768, "n_head": 12,
    "n_inner": null, "n_layer": 12, "n_positions": 1024, "pad_token_id": null, "reorder_and_upcast_attn": false,
    "resid_pdrop": 0.1, "scale_attn_by_inverse_layer_idx": false, "scale_attn_weights": true,
    "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
    "summary_type": "cls_index", "summary_use_proj": true, "tie_word_embeddings": true,
    "transformers_version": "5.24.0", "use_cache": true, "vocab_size": 50257
}"#;

#[test]
fn published_configs_are_read_and_have_their_sizes() {
    for (name, text, parameters) in READ {
        let (model, _) = parse_config(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(Layout::of(&model).len(), *parameters, "{name}");
    }
}

#[test]
fn what_each_family_has_is_told_apart() {
    let model = |text| parse_config(text).unwrap().0;
    let (qwen2, qwen3) = (model(QWEN_2_5), model(QWEN_3));
    assert!(qwen2.attention_bias && !qwen2.qk_norm);
    assert!(qwen3.qk_norm && !qwen3.attention_bias);
    assert_eq!((qwen3.head_dim, qwen3.head_dim()), (Some(128), 128));
    assert_eq!(model(LLAMA_3_2).head_dim, None);
    assert_eq!(model(MISTRAL).rope_theta, 1e6);
    for (text, class) in [
        (QWEN_2_5, "Qwen2ForCausalLM"),
        (QWEN_3, "Qwen3ForCausalLM"),
        (MISTRAL, "LlamaForCausalLM"),
    ] {
        let written = config_json(&model(text), &SpecialTokens::default());
        let written: Value = serde_json::from_str(&written).unwrap();
        assert_eq!(written["architectures"], json!([class]));
    }
}

#[test]
fn a_field_that_is_absent_means_what_it_means_to_its_class() {
    let without = |text: &str, field: &str| {
        let mut config: Value = serde_json::from_str(text).unwrap();
        config.as_object_mut().unwrap().remove(field);
        parse_config(&config.to_string()).map(|(model, _)| model)
    };
    let kv = "num_key_value_heads";
    assert_eq!(without(LLAMA_2, kv).unwrap().num_key_value_heads, 32);
    assert_eq!(without(MISTRAL, kv).unwrap().num_key_value_heads, 8);
    assert_eq!(without(QWEN_3, "head_dim").unwrap().head_dim(), 128);
    let error = without(QWEN_3, kv).unwrap_err().to_string();
    assert!(error.contains("`num_key_value_heads`"), "{error}");
    let error = without(MISTRAL, "sliding_window").unwrap_err();
    assert_eq!(error.to_string(), "field `sliding_window` is missing");
}

#[test]
fn windows_are_refused_where_they_would_hide_a_token() {
    // As published for Mistral 7B v0.1.
    let error = parse_config(&with(MISTRAL, "sliding_window", json!(4096))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "field `sliding_window` is `4096`, which changes the model in a way that is not supported; \
         only null, or at least max_position_embeddings (32768), is"
    );
    assert!(parse_config(&with(MISTRAL, "sliding_window", json!(32768))).is_ok());
    let error = parse_config(&with(QWEN_2_5, "use_sliding_window", json!(true))).unwrap_err();
    assert!(
        error.to_string().contains("`use_sliding_window`"),
        "{error}"
    );
}
