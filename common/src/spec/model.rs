//! The shape of a model: everything that decides the names and sizes of its tensors, and nothing about training.

use serde::{Deserialize, Serialize};

/// A family of models that the engine can build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al., arXiv 2302.13971).
    Llama,
    /// LayerNorm before each sub-layer, learned positions, GELU (Radford et al., 2019).
    Gpt2,
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Llama => "llama",
            Self::Gpt2 => "gpt2",
        })
    }
}

/// How the frequencies of rotary positions are stretched for contexts longer than those of pretraining. Names and
/// formulas are those of `transformers` (`modeling_rope_utils.py`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies are divided by `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// Llama 3.1: long waves are divided by `factor`, short ones are kept, those between are interpolated.
    Llama3 {
        /// At least 1.
        factor: f32,
        /// Waves longer than `original_max_position_embeddings` over this are long.
        low_freq_factor: f32,
        /// Waves shorter than `original_max_position_embeddings` over this are short. Above `low_freq_factor`.
        high_freq_factor: f32,
        /// The context of pretraining.
        original_max_position_embeddings: u32,
    },
}

impl RopeScaling {
    /// Why no model can have it; `None` if all is well.
    pub fn fault(&self) -> Option<String> {
        let positive = |x: f32| x.is_finite() && x > 0.0;
        let (Self::Linear { factor } | Self::Llama3 { factor, .. }) = *self;
        if !(factor.is_finite() && factor >= 1.0) {
            return Some(format!("`factor` is {factor}, must be 1 or above"));
        }
        match *self {
            Self::Linear { .. } => None,
            Self::Llama3 {
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
                ..
            } => {
                if !(positive(low) && positive(high) && low < high) {
                    return Some(format!(
                        "`low_freq_factor` is {low} and `high_freq_factor` is {high}; both must be above 0, and the second the larger"
                    ));
                }
                (original == 0).then(|| "`original_max_position_embeddings` is 0".into())
            }
        }
    }
}

impl std::fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Linear { factor } => write!(f, "linear, factor {factor}"),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => write!(
                f,
                "llama3, factor {factor}, low {low_freq_factor}, high {high_freq_factor}, from {original_max_position_embeddings}"
            ),
        }
    }
}

/// A complete, validated model shape. Field names follow Hugging Face's `LlamaConfig` where they have one. What only
/// some models have is left out of the JSON where a model does not have it, so that older runs keep their identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Rows of the embedding; every token id is below it.
    pub vocab_size: usize,
    /// Tokens in one training sample, and the longest sequence the model attends over.
    pub context: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Transformer blocks.
    pub num_hidden_layers: usize,
    /// Query heads; without `head_dim`, `hidden_size` is divisible by it.
    pub num_attention_heads: usize,
    /// Key/value heads; divides `num_attention_heads`. Equal to it for `gpt2`.
    pub num_key_value_heads: usize,
    /// Width of one head where it is not `hidden_size / num_attention_heads` (`llama` only); else `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Biases of the query, key and value projections, as in Qwen2 (`llama` only).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attention_bias: bool,
    /// RMSNorm over each query and key head before it is rotated, as in Qwen3 (`llama` only).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub qk_norm: bool,
    /// Inner width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Whether the output projection is the embedding. Always true for `gpt2`.
    pub tie_word_embeddings: bool,
    /// Biases in all linear layers and LayerNorm (`gpt2` only; false for `llama`).
    pub bias: bool,
    /// Dropout probability after the embedding, on attention weights and before each residual add (`gpt2` only).
    pub dropout: f32,
    /// Epsilon of RMSNorm or LayerNorm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies (`llama` only).
    pub rope_theta: f32,
    /// How the rotary frequencies are stretched (`llama` only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Standard deviation of the initial weights.
    pub initializer_range: f32,
    /// The labels of a sequence classifier, in the order of its outputs. Empty for a language model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
}

impl ModelConfig {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// Width of all query heads together: what attention gives to its output projection.
    pub fn attention_width(&self) -> usize {
        self.num_attention_heads * self.head_dim()
    }

    /// Whether the model scores whole sequences with a `score` head, as Hugging Face's `ForSequenceClassification`
    /// does, and has no language-model head.
    pub fn classifies(&self) -> bool {
        !self.labels.is_empty()
    }

    /// Logits of one row: labels of a classifier, else tokens.
    pub fn outputs(&self) -> usize {
        match self.classifies() {
            true => self.labels.len(),
            false => self.vocab_size,
        }
    }

    /// Whether weights of this shape can start a run with a model of shape `other`: they differ at most in dropout, and
    /// in the head, where `other` is a classifier and this is a language model.
    pub fn can_become(&self, other: &Self) -> bool {
        let same = Self {
            dropout: other.dropout,
            labels: other.labels.clone(),
            ..self.clone()
        };
        same == *other && (!self.classifies() || self.labels == other.labels)
    }

    /// Floating-point operations of forward and backward for one token: `6 N + 12 layers * width * context`, with N
    /// the parameters that take part in matrix products and the width of all query heads together (Chowdhery et al.,
    /// arXiv 2204.02311, appendix B).
    pub fn flops_per_token(&self) -> f64 {
        let layout = crate::layout::Layout::of(self);
        let matrices: usize = layout
            .tensors()
            .iter()
            .filter(|t| t.shape.len() == 2 && !t.name.ends_with("wpe.weight"))
            .filter(|t| {
                let head = self.tie_word_embeddings && !self.classifies();
                head || !t.name.ends_with("embed_tokens.weight")
            })
            .map(|t| t.len())
            .sum();
        6.0 * matrices as f64
            + 12.0 * (self.num_hidden_layers * self.attention_width() * self.context) as f64
    }
}
