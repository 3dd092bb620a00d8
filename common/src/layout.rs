//! Where each parameter lies in the flat buffers. Parameters, gradients and both moments share one layout, so the
//! optimizer, the norm, the hash, the wire and the checkpoint each walk memory once, in the same order.
//!
//! The order is the one in which backward completes the gradients: the head first, the embedding last. Within a
//! block the query, key and value projections are adjacent, and so are their biases, and gate and up, so that each group
//! is one matrix (or one vector) for one product. Names and shapes are Hugging Face's, those of adapters PEFT's.
//!
//! What is trained comes first, and the frozen rest behind it: gradients, moments, wire, hash and checkpoint end where
//! that begins.

use std::ops::Range;

use crate::spec::{Architecture, LoraConfig, ModelConfig};

/// Elements in one chunk: the unit of the wire, of the gradient norm and of the state hash (256 KiB of f32).
pub const CHUNK_LEN: usize = 64 * 1024;

/// The head of a classifier.
pub const SCORE: &str = "score.weight";

/// One parameter tensor in the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
}

impl TensorSpec {
    /// Number of elements.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of the flat buffer that belong to this tensor.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }

    /// Whether weight decay applies: matrices (embeddings included) decay, vectors do not.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// The block that a tensor belongs to, by its name: `model.layers.3.…` and `transformer.h.3.…` are of block 3.
fn block_of(name: &str) -> Option<usize> {
    let mut parts = name.split('.');
    parts.find(|part| ["layers", "h"].contains(part))?;
    parts.next()?.parse().ok()
}

/// The layout of one model's flat buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<TensorSpec>,
    frozen: Vec<TensorSpec>,
    len: usize,
    total: usize,
}

impl Layout {
    /// The layout of a model that is trained whole. Depends on its shape alone.
    pub fn of(model: &ModelConfig) -> Self {
        let mut layout = Self {
            tensors: Vec::new(),
            frozen: Vec::new(),
            len: 0,
            total: 0,
        };
        match model.architecture {
            Architecture::Llama => layout.push_llama(model),
            Architecture::Gpt2 => layout.push_gpt2(model),
        }
        layout.total = layout.len;
        layout
    }

    /// The layout of a model of which only adapters are trained, and a classifier's head, which is new. Without `lora`,
    /// the whole model.
    pub fn adapted(model: &ModelConfig, lora: Option<&LoraConfig>) -> Self {
        let whole = Self::of(model);
        let Some(lora) = lora else {
            return whole;
        };
        let mut layout = Self {
            tensors: Vec::new(),
            frozen: Vec::new(),
            len: 0,
            total: 0,
        };
        let rank = lora.rank as usize;
        for tensor in &whole.tensors {
            if tensor.name == SCORE {
                layout.push(tensor.name.clone(), &tensor.shape);
            }
            let Some(module) = tensor.name.strip_suffix(".weight") else {
                continue;
            };
            if let [rows, columns] = tensor.shape[..]
                && lora.adapts(module)
            {
                let (outputs, inputs) = match model.architecture {
                    Architecture::Llama => (rows, columns),
                    Architecture::Gpt2 => (columns, rows),
                };
                layout.push(format!("{module}.lora_A.weight"), &[rank, inputs]);
                layout.push(format!("{module}.lora_B.weight"), &[outputs, rank]);
            }
        }
        layout.total = layout.len;
        for tensor in whole.tensors {
            if tensor.name != SCORE {
                let offset = layout.total;
                layout.total += tensor.len();
                layout.frozen.push(TensorSpec { offset, ..tensor });
            }
        }
        layout
    }

    /// The tensors that are trained, in the order of the flat buffer.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// The tensors that stay as they are, in the order of the flat buffer.
    pub fn frozen(&self) -> &[TensorSpec] {
        &self.frozen
    }

    /// Elements before the last tensors, as far up as all of them are `left_out`.
    pub fn len_without(&self, left_out: impl Fn(&TensorSpec) -> bool) -> usize {
        let last = self.tensors.iter().rev().take_while(|t| left_out(t)).last();
        last.map_or(self.len, |tensor| tensor.offset)
    }

    /// Elements that are trained: the length of moments, and of gradients where no layer is frozen for the whole run.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Elements of the flat buffer of parameters, those that are frozen included.
    pub fn total(&self) -> usize {
        self.total
    }

    /// The tensor of that name, trained or frozen.
    pub fn get(&self, name: &str) -> Option<&TensorSpec> {
        let mut all = self.tensors.iter().chain(&self.frozen);
        all.find(|t| t.name == name)
    }

    /// Number of chunks of [`CHUNK_LEN`] elements; the last one may be shorter.
    pub fn chunks(&self) -> usize {
        chunk_count(self.len)
    }

    /// Elements of chunk `index`.
    pub fn chunk(&self, index: usize) -> Range<usize> {
        chunk_range(index, self.len)
    }

    /// Elements whose gradients are complete once backward has passed this block: those of the head, of this block and of
    /// the blocks behind it.
    pub fn complete_after(&self, block: usize) -> usize {
        let of_block = |tensor: &&TensorSpec| block_of(&tensor.name).is_some_and(|b| b >= block);
        let last = self.tensors.iter().rev().find(of_block);
        last.map_or(0, |tensor| tensor.range().end)
    }

    fn push(&mut self, name: String, shape: &[usize]) {
        let spec = TensorSpec {
            name,
            shape: shape.to_vec(),
            offset: self.len,
        };
        self.len += spec.len();
        self.tensors.push(spec);
    }

    fn push_llama(&mut self, m: &ModelConfig) {
        let (hidden, inner) = (m.hidden_size, m.intermediate_size);
        let (dim, q) = (m.head_dim(), m.attention_width());
        let kv = m.num_key_value_heads * dim;
        let qkv = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        if m.classifies() {
            self.push(SCORE.into(), &[m.outputs(), hidden]);
        } else if !m.tie_word_embeddings {
            self.push("lm_head.weight".into(), &[m.vocab_size, hidden]);
        }
        self.push("model.norm.weight".into(), &[hidden]);
        for layer in (0..m.num_hidden_layers).rev() {
            let p = format!("model.layers.{layer}");
            self.push(format!("{p}.mlp.down_proj.weight"), &[hidden, inner]);
            self.push(format!("{p}.mlp.gate_proj.weight"), &[inner, hidden]);
            self.push(format!("{p}.mlp.up_proj.weight"), &[inner, hidden]);
            self.push(format!("{p}.post_attention_layernorm.weight"), &[hidden]);
            self.push(format!("{p}.self_attn.o_proj.weight"), &[hidden, q]);
            if m.qk_norm {
                self.push(format!("{p}.self_attn.q_norm.weight"), &[dim]);
                self.push(format!("{p}.self_attn.k_norm.weight"), &[dim]);
            }
            if m.attention_bias {
                for (name, outputs) in qkv {
                    self.push(format!("{p}.self_attn.{name}.bias"), &[outputs]);
                }
            }
            for (name, outputs) in qkv {
                self.push(format!("{p}.self_attn.{name}.weight"), &[outputs, hidden]);
            }
            self.push(format!("{p}.input_layernorm.weight"), &[hidden]);
        }
        self.push("model.embed_tokens.weight".into(), &[m.vocab_size, hidden]);
    }

    fn push_gpt2(&mut self, m: &ModelConfig) {
        let (hidden, inner) = (m.hidden_size, m.intermediate_size);
        if m.classifies() {
            self.push(SCORE.into(), &[m.outputs(), hidden]);
        }
        self.push_affine("transformer.ln_f", &[hidden], hidden, m.bias);
        for layer in (0..m.num_hidden_layers).rev() {
            let p = format!("transformer.h.{layer}");
            self.push_affine(&format!("{p}.mlp.c_proj"), &[inner, hidden], hidden, m.bias);
            self.push_affine(&format!("{p}.mlp.c_fc"), &[hidden, inner], inner, m.bias);
            self.push_affine(&format!("{p}.ln_2"), &[hidden], hidden, m.bias);
            self.push_affine(
                &format!("{p}.attn.c_proj"),
                &[hidden, hidden],
                hidden,
                m.bias,
            );
            self.push_affine(
                &format!("{p}.attn.c_attn"),
                &[hidden, 3 * hidden],
                3 * hidden,
                m.bias,
            );
            self.push_affine(&format!("{p}.ln_1"), &[hidden], hidden, m.bias);
        }
        self.push("transformer.wpe.weight".into(), &[m.context, hidden]);
        self.push("transformer.wte.weight".into(), &[m.vocab_size, hidden]);
    }

    fn push_affine(&mut self, name: &str, weight: &[usize], out: usize, bias: bool) {
        if bias {
            self.push(format!("{name}.bias"), &[out]);
        }
        self.push(format!("{name}.weight"), weight);
    }
}

/// Number of chunks that cover `len` elements.
pub fn chunk_count(len: usize) -> usize {
    len.div_ceil(CHUNK_LEN)
}

/// Elements of some chunks of a buffer of `len` elements; `None` where there are no such chunks, or they are none.
pub fn chunks_range(chunks: &Range<u32>, len: usize) -> Option<Range<usize>> {
    let (first, below) = (chunks.start as usize, chunks.end as usize);
    let there = first < below && below <= chunk_count(len);
    there.then(|| first * CHUNK_LEN..(below * CHUNK_LEN).min(len))
}

/// Of the first elements of a buffer of `len`, so many as are complete: those in chunks that are.
pub fn in_complete_chunks(complete: usize, len: usize) -> usize {
    match complete == len {
        true => len,
        false => complete / CHUNK_LEN * CHUNK_LEN,
    }
}

/// Elements of chunk `index` of a buffer of `len` elements.
pub fn chunk_range(index: usize, len: usize) -> Range<usize> {
    let start = index * CHUNK_LEN;
    assert!(start < len, "chunk {index} lies outside {len} elements");
    start..(start + CHUNK_LEN).min(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 512,
            context: 64,
            hidden_size: 64,
            num_hidden_layers: 5,
            num_attention_heads: 8,
            num_key_value_heads: 4,
            intermediate_size: 172,
            tie_word_embeddings: true,
            bias: false,
            dropout: 0.0,
            norm_eps: 1e-5,
            head_dim: None,
            attention_bias: false,
            qk_norm: false,
            rope_theta: 10_000.0,
            rope_scaling: None,
            initializer_range: 0.02,
            labels: Vec::new(),
        }
    }

    #[test]
    fn tensors_tile_the_buffer_without_a_gap() {
        for architecture in [Architecture::Llama, Architecture::Gpt2] {
            for (bias, head_dim) in [(false, None), (true, None), (true, Some(24))] {
                let layout = Layout::of(&ModelConfig {
                    architecture,
                    bias,
                    head_dim,
                    attention_bias: bias,
                    qk_norm: head_dim.is_some(),
                    ..llama()
                });
                let mut end = 0;
                for t in layout.tensors() {
                    assert_eq!(t.offset, end, "{}", t.name);
                    end = t.range().end;
                }
                assert_eq!(end, layout.len());
            }
        }
    }

    #[test]
    fn adapters_come_first_and_the_model_behind_them() {
        for (architecture, targets, labels) in [
            (Architecture::Llama, &["q_proj", "down_proj"][..], vec![]),
            (
                Architecture::Gpt2,
                &["c_attn", "c_proj"],
                vec!["no".to_owned(), "yes".to_owned()],
            ),
        ] {
            let model = ModelConfig {
                architecture,
                labels,
                ..llama()
            };
            let lora = LoraConfig {
                rank: 4,
                alpha: 8.0,
                dropout: 0.0,
                rslora: false,
                target_modules: targets.iter().map(|t| (*t).to_owned()).collect(),
            };
            let (layout, whole) = (Layout::adapted(&model, Some(&lora)), Layout::of(&model));
            let mut end = 0;
            for t in layout.tensors().iter().chain(layout.frozen()) {
                assert_eq!(t.offset, end, "{}", t.name);
                end = t.range().end;
                assert_eq!(layout.get(&t.name), Some(t));
            }
            assert_eq!(end, layout.total());
            assert_eq!(layout.len(), layout.frozen()[0].offset);
            let frozen: usize = layout.frozen().iter().map(TensorSpec::len).sum();
            let head = whole.get(SCORE).map_or(0, TensorSpec::len);
            assert_eq!(frozen + head, whole.len());
            let inner = match architecture {
                Architecture::Llama => "model.layers.1.mlp.down_proj.lora_A.weight",
                Architecture::Gpt2 => "transformer.h.1.mlp.c_proj.lora_A.weight",
            };
            assert_eq!(layout.get(inner).expect("adapted").shape, [4, 172]);
        }
    }

    #[test]
    fn stories260k_has_its_published_size() {
        assert_eq!(Layout::of(&llama()).len(), 260_032);
    }

    #[test]
    fn qwen_has_its_published_sizes() {
        let qwen2 = ModelConfig {
            vocab_size: 151_936,
            hidden_size: 896,
            num_hidden_layers: 24,
            num_attention_heads: 14,
            num_key_value_heads: 2,
            attention_bias: true,
            intermediate_size: 4864,
            ..llama()
        };
        assert_eq!(Layout::of(&qwen2).len(), 494_032_768);
        let qwen3 = ModelConfig {
            hidden_size: 1024,
            num_hidden_layers: 28,
            num_attention_heads: 16,
            num_key_value_heads: 8,
            head_dim: Some(128),
            attention_bias: false,
            qk_norm: true,
            intermediate_size: 3072,
            ..qwen2
        };
        assert_eq!(Layout::of(&qwen3).len(), 596_049_920);
    }

    #[test]
    fn gpt2_has_its_published_size() {
        let gpt2 = ModelConfig {
            architecture: Architecture::Gpt2,
            vocab_size: 50_257,
            context: 1024,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_key_value_heads: 12,
            intermediate_size: 3072,
            bias: true,
            ..llama()
        };
        assert_eq!(Layout::of(&gpt2).len(), 124_439_808);
    }
}
