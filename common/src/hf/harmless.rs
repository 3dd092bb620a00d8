//! Fields of published configs that change no number which the model computes.

/// Fields that are ignored, sorted within each group.
const HARMLESS: &[&[&str]] = &[
    // Who wrote the file, in which types, and what to load it with.
    &[
        "_name_or_path",
        "dtype",
        "name_or_path",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
    ],
    // How it is computed, not what.
    &[
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "pretraining_tp",
        "reorder_and_upcast_attn",
        "torchscript",
        "use_cache",
    ],
    // What is returned.
    &[
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
    ],
    // Heads of other tasks.
    &[
        "_num_labels",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
    ],
    // Tokens and generation.
    &[
        "bad_words_ids",
        "begin_suppress_tokens",
        "cls_token_id",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "pad_token_id",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "sep_token_id",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    ],
    // What others call the shape again, or what nothing reads any more.
    &[
        "is_decoder",
        "is_llama_config",
        "n_ctx",
        "tf_legacy_loss",
        "tie_encoder_decoder",
    ],
];

/// Whether the field may be ignored.
pub fn is_harmless(field: &str) -> bool {
    HARMLESS.iter().any(|group| group.contains(&field))
}
