//! Where each layer finds its weights in the flat buffer: the layout's names, resolved once.

use std::ops::Range;

use cohort_common::layout::Layout;
use cohort_common::spec::{Architecture, ModelConfig};

use super::error::{EngineError, Result};
use super::ops::gemm::Precision;
use super::ops::linear::{Shape, WeightOrder};

/// Places of the dropout of adapters; those of the model are below.
pub const ADAPTER_PLACES: usize = 1 << 20;

/// A norm's weights.
#[derive(Clone, Debug)]
pub struct Norm {
    /// The factors.
    pub weight: Range<usize>,
    /// The summands, where there are any.
    pub bias: Option<Range<usize>>,
}

/// A low-rank adapter of a linear layer: `scale · B A drop(x)` is added to some columns of its output.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The columns.
    pub columns: Range<usize>,
    /// A, `[rank, inputs]`.
    pub a: (Shape, Range<usize>),
    /// B, `[outputs, rank]`.
    pub b: (Shape, Range<usize>),
    /// Where its dropout draws.
    pub place: usize,
}

/// A linear layer's weights. Adjacent layers with one input (query, key, value; gate, up) are one layer here.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Sizes and order.
    pub shape: Shape,
    /// The matrix.
    pub weight: Range<usize>,
    /// The summands, where there are any.
    pub bias: Option<Range<usize>>,
    /// Its adapters.
    pub adapters: Vec<Adapter>,
}

/// The norms of queries and keys: one weight per element of a head, shared by all heads.
#[derive(Clone, Debug)]
pub struct HeadNorms {
    /// The factors of queries, then those of keys.
    pub weights: Range<usize>,
}

/// One transformer block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Before attention.
    pub norm1: Norm,
    /// To packed rows `[Q, K, V]`.
    pub qkv: Linear,
    /// Of each query and key head, where there are any.
    pub head_norms: Option<HeadNorms>,
    /// From the heads back to the residual stream.
    pub out: Linear,
    /// Before the feed-forward layer.
    pub norm2: Norm,
    /// To the inner width; for llama to packed rows `[gate, up]`.
    pub up: Linear,
    /// Back to the residual stream.
    pub down: Linear,
}

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct Parameters {
    /// Token embedding, `[vocab, hidden]`.
    pub embedding: Range<usize>,
    /// Learned positions, `[context, hidden]`.
    pub positions: Option<Range<usize>>,
    /// The blocks, first to last.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: Norm,
    /// The head, `[outputs, hidden]`: the embedding where they are tied.
    pub head: Range<usize>,
}

impl Parameters {
    /// Resolves the names of `layout`, which must be the model's, perhaps with adapters. Refuses shapes that no model can
    /// have.
    pub fn new(model: &ModelConfig, layout: &Layout, precision: Precision) -> Result<Self> {
        validate(model)?;
        let names = Names(layout, precision);
        Ok(match model.architecture {
            Architecture::Llama => llama(model, names),
            Architecture::Gpt2 => gpt2(model, names),
        })
    }
}

fn validate(m: &ModelConfig) -> Result<()> {
    let fail = |text: String| Err(EngineError::Model(text));
    let sizes = [
        ("vocab_size", m.vocab_size),
        ("context", m.context),
        ("hidden_size", m.hidden_size),
        ("num_hidden_layers", m.num_hidden_layers),
        ("num_attention_heads", m.num_attention_heads),
        ("num_key_value_heads", m.num_key_value_heads),
        ("intermediate_size", m.intermediate_size),
    ];
    if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
        return fail(format!("`{name}` is 0"));
    }
    if m.head_dim.is_none() && !m.hidden_size.is_multiple_of(m.num_attention_heads) {
        return fail(format!(
            "`hidden_size` {} is not divisible by `num_attention_heads` {}",
            m.hidden_size, m.num_attention_heads
        ));
    }
    if !m.num_attention_heads.is_multiple_of(m.num_key_value_heads) {
        return fail(format!(
            "`num_attention_heads` {} is not divisible by `num_key_value_heads` {}",
            m.num_attention_heads, m.num_key_value_heads
        ));
    }
    if let Some(fault) = m.rope_scaling.and_then(|scaling| scaling.fault()) {
        return fail(format!("`rope_scaling`: {fault}"));
    }
    match m.architecture {
        Architecture::Gpt2
            if m.head_dim.is_some()
                || m.attention_bias
                || m.qk_norm
                || m.rope_scaling.is_some() =>
        {
            fail(
                "`gpt2` has no `head_dim`, `attention_bias`, `qk_norm` or `rope_scaling` of its own"
                    .into(),
            )
        }
        Architecture::Llama if m.head_dim() == 0 || !m.head_dim().is_multiple_of(2) => fail(format!(
            "rotary positions need an even head width, got {}",
            m.head_dim()
        )),
        Architecture::Llama if m.attention_bias && m.qk_norm => {
            fail("no family has both `attention_bias` and `qk_norm`".into())
        }
        Architecture::Gpt2 if m.num_key_value_heads != m.num_attention_heads => {
            fail("`gpt2` has as many key/value heads as query heads".into())
        }
        Architecture::Gpt2 if !m.tie_word_embeddings => {
            fail("`gpt2` ties its head to the embedding".into())
        }
        _ if !(0.0..1.0).contains(&m.dropout) => {
            fail(format!("`dropout` {} is not in [0, 1)", m.dropout))
        }
        _ => Ok(()),
    }
}

/// Looks names up in a layout that is known to have them.
struct Names<'a>(&'a Layout, Precision);

impl Names<'_> {
    fn range(&self, name: &str) -> Range<usize> {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("the layout has no `{name}`"))
            .range()
    }

    /// The range from the first to the last of tensors that must be adjacent.
    fn adjacent(&self, names: &[String]) -> Range<usize> {
        let ranges: Vec<_> = names.iter().map(|name| self.range(name)).collect();
        assert!(
            ranges.windows(2).all(|w| w[0].end == w[1].start),
            "{names:?} are not adjacent"
        );
        ranges[0].start..ranges[ranges.len() - 1].end
    }

    fn norm(&self, name: &str) -> Norm {
        Norm {
            weight: self.range(&format!("{name}.weight")),
            bias: self.0.get(&format!("{name}.bias")).map(|t| t.range()),
        }
    }

    /// One of `torch.nn.Linear`'s, or several adjacent ones with the same input.
    fn linear(&self, prefix: &str, names: &[&str], inputs: usize) -> Linear {
        let names: Vec<String> = names
            .iter()
            .map(|name| format!("{prefix}.{name}.weight"))
            .collect();
        let weight = self.adjacent(&names);
        let shape = Shape {
            inputs,
            outputs: weight.len() / inputs,
            order: WeightOrder::OutputsFirst,
            precision: self.1,
        };
        // Layers that are one have biases all or none.
        let biases: Vec<String> = names
            .iter()
            .map(|name| name.replace(".weight", ".bias"))
            .filter(|name| self.0.get(name).is_some())
            .collect();
        let mut column = 0;
        let adapters = names.iter().filter_map(|name| {
            let outputs = self.range(name).len() / inputs;
            column += outputs;
            self.adapter(
                name.strip_suffix(".weight")?,
                inputs,
                column - outputs..column,
            )
        });
        Linear {
            shape,
            weight,
            adapters: adapters.collect(),
            bias: (!biases.is_empty()).then(|| self.adjacent(&biases)),
        }
    }

    /// The adapter of a layer, if it has one.
    fn adapter(&self, module: &str, inputs: usize, columns: Range<usize>) -> Option<Adapter> {
        let tensor = |part: &str| self.0.get(&format!("{module}.lora_{part}.weight"));
        let (a, b) = (tensor("A")?, tensor("B")?);
        let rank = a.shape[0];
        let shape = |inputs, outputs| Shape {
            inputs,
            outputs,
            order: WeightOrder::OutputsFirst,
            precision: Precision::F32,
        };
        let index = self.0.tensors().iter().position(|t| t.name == a.name);
        Some(Adapter {
            a: (shape(inputs, rank), a.range()),
            b: (shape(rank, columns.len()), b.range()),
            columns,
            place: ADAPTER_PLACES + index.expect("adapters are trained"),
        })
    }

    /// One of GPT-2's `Conv1D`.
    fn conv1d(&self, name: String, inputs: usize) -> Linear {
        let Norm { weight, bias } = self.norm(&name);
        let shape = Shape {
            inputs,
            outputs: weight.len() / inputs,
            order: WeightOrder::InputsFirst,
            precision: self.1,
        };
        let adapter = self.adapter(&name, inputs, 0..shape.outputs);
        Linear {
            shape,
            weight,
            bias,
            adapters: adapter.into_iter().collect(),
        }
    }
}

fn llama(m: &ModelConfig, names: Names) -> Parameters {
    let (hidden, inner) = (m.hidden_size, m.intermediate_size);
    let block = |layer: usize| {
        let p = format!("model.layers.{layer}");
        Block {
            norm1: names.norm(&format!("{p}.input_layernorm")),
            qkv: names.linear(
                &format!("{p}.self_attn"),
                &["q_proj", "k_proj", "v_proj"],
                hidden,
            ),
            head_norms: m.qk_norm.then(|| HeadNorms {
                weights: names.adjacent(
                    &["q_norm", "k_norm"].map(|name| format!("{p}.self_attn.{name}.weight")),
                ),
            }),
            out: names.linear(&format!("{p}.self_attn"), &["o_proj"], m.attention_width()),
            norm2: names.norm(&format!("{p}.post_attention_layernorm")),
            up: names.linear(&format!("{p}.mlp"), &["gate_proj", "up_proj"], hidden),
            down: names.linear(&format!("{p}.mlp"), &["down_proj"], inner),
        }
    };
    let embedding = names.range("model.embed_tokens.weight");
    let head = if m.classifies() {
        names.range("score.weight")
    } else if m.tie_word_embeddings {
        embedding.clone()
    } else {
        names.range("lm_head.weight")
    };
    Parameters {
        embedding,
        positions: None,
        blocks: (0..m.num_hidden_layers).map(block).collect(),
        norm: names.norm("model.norm"),
        head,
    }
}

fn gpt2(m: &ModelConfig, names: Names) -> Parameters {
    let (hidden, inner) = (m.hidden_size, m.intermediate_size);
    let block = |layer: usize| {
        let p = format!("transformer.h.{layer}");
        Block {
            norm1: names.norm(&format!("{p}.ln_1")),
            qkv: names.conv1d(format!("{p}.attn.c_attn"), hidden),
            head_norms: None,
            out: names.conv1d(format!("{p}.attn.c_proj"), hidden),
            norm2: names.norm(&format!("{p}.ln_2")),
            up: names.conv1d(format!("{p}.mlp.c_fc"), hidden),
            down: names.conv1d(format!("{p}.mlp.c_proj"), inner),
        }
    };
    let embedding = names.range("transformer.wte.weight");
    Parameters {
        head: match m.classifies() {
            true => names.range("score.weight"),
            false => embedding.clone(),
        },
        embedding,
        positions: Some(names.range("transformer.wpe.weight")),
        blocks: (0..m.num_hidden_layers).map(block).collect(),
        norm: names.norm("transformer.ln_f"),
    }
}
