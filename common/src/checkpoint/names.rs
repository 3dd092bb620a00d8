//! What a tensor of a weights file is to a model: one of its parameters, a bias that must be zero, or a leftover of the
//! framework that wrote it. **Pure.**

use crate::layout::{Layout, SCORE, TensorSpec};
use crate::spec::{Architecture, ModelConfig};

/// The tensors of a model, and what `transformers` expects besides.
pub struct Names {
    architecture: Architecture,
    /// Whether a language model's head means nothing: it is the embedding, or a classifier has another.
    headless: bool,
    layout: Layout,
    zero_biases: Vec<TensorSpec>,
}

/// What to do with a tensor.
#[derive(Debug, PartialEq, Eq)]
pub enum Role<'a> {
    /// A parameter of the model.
    Parameter(&'a TensorSpec),
    /// A bias of a model without biases.
    ZeroBias(&'a TensorSpec),
    /// A buffer or a copy that carries nothing.
    Ignored,
    /// Not of this model.
    Unexpected,
}

impl Names {
    /// The names of a model.
    pub fn of(model: &ModelConfig) -> Self {
        Self {
            architecture: model.architecture,
            headless: model.tie_word_embeddings || model.classifies(),
            layout: Layout::of(model),
            zero_biases: zero_biases(model),
        }
    }

    /// The model's parameters.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The tensor called `name` in a file. Knows the spellings that are found in the wild: `gpt2` without the prefix
    /// `transformer.`, the head of a tied model, attention masks and rotary frequencies saved as buffers.
    pub fn role(&self, name: &str) -> Role<'_> {
        let buffers = [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"];
        if buffers.iter().any(|b| name.ends_with(b)) || (self.headless && name == "lm_head.weight")
        {
            return Role::Ignored;
        }
        let prefixed = match self.architecture {
            Architecture::Gpt2 if !name.starts_with("transformer.") && name != SCORE => {
                format!("transformer.{name}")
            }
            _ => name.to_owned(),
        };
        if let Some(spec) = self.layout.get(&prefixed) {
            return Role::Parameter(spec);
        }
        match self.zero_biases.iter().find(|t| t.name == prefixed) {
            Some(spec) => Role::ZeroBias(spec),
            None => Role::Unexpected,
        }
    }
}

/// The biases that `transformers` expects of a `gpt2` and that a model without biases does not have, in a fixed order.
pub fn zero_biases(model: &ModelConfig) -> Vec<TensorSpec> {
    if model.architecture != Architecture::Gpt2 || model.bias {
        return Vec::new();
    }
    let own = Layout::of(model);
    let full = Layout::of(&ModelConfig {
        bias: true,
        ..model.clone()
    });
    let missing = full.tensors().iter().filter(|t| own.get(&t.name).is_none());
    missing.cloned().collect()
}
