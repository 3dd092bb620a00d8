//! The model as candle's graph of differentiable operations, with one variable per parameter: what runs on CUDA, with
//! kernels of our own for what is more than a product (`cuda`), and what the fused path is compared with on the CPU, by
//! formulas that are slow and plain on purpose (`plain`).

#[cfg(feature = "cuda")]
mod cuda;
mod operations;
mod plain;
mod transfer;

use candle_core::{D, DType, Device, Tensor, Var};
use cohort_common::layout::{Layout, TensorSpec};
use cohort_common::spec::{Architecture, LoraConfig, ModelConfig, Precision};
use cohort_common::tree::Node;

use self::transfer::Transfer;
use super::fused::{count, empty_confusion};
use super::ops::{dropout::Mask, norm, position, rope};
use super::parameters::ADAPTER_PLACES;
use super::{Batch, Scores, Site, Sums};

#[cfg(feature = "cuda")]
pub use self::cuda::{fingerprint as gpu_fingerprint, prepare as prepare_gpu};

type Result<T> = candle_core::Result<T>;

/// Lanes whose gradients are added up on the device, at most: whoever waits for one waits for all.
const LANES: usize = 8;

/// The parameters as variables on a device.
pub struct Composite {
    model: ModelConfig,
    layout: Layout,
    gradient_len: usize,
    device: Device,
    lora: Option<LoraConfig>,
    /// What is trained.
    weights: Vec<Var>,
    /// What is not; no gradient goes there.
    frozen: Vec<Var>,
    precision: Precision,
    table: Table,
    transfer: Transfer,
}

/// Cosines and sines of the rotary embedding, `[context, head_dim / 2]` each.
pub struct Table {
    cos: Tensor,
    sin: Tensor,
}

impl Composite {
    /// All-zero parameters on `device`. Parameters beyond `gradient_len` have no gradient.
    pub fn new(
        (model, layout, gradient_len): (&ModelConfig, &Layout, usize),
        lora: Option<&LoraConfig>,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        let zeros = |t: &TensorSpec| Var::zeros(t.shape.as_slice(), DType::F32, device);
        let half = model.head_dim() / 2;
        let table = rope::Table::of(model);
        let rows: (Vec<_>, Vec<_>) = (0..model.context)
            .map(|position| table.at(position))
            .unzip();
        let upload =
            |rows: Vec<&[f32]>| Tensor::from_vec(rows.concat(), (model.context, half), device);
        Ok(Self {
            model: model.clone(),
            layout: layout.clone(),
            gradient_len,
            device: device.clone(),
            lora: lora.cloned(),
            weights: layout.tensors().iter().map(zeros).collect::<Result<_>>()?,
            frozen: layout.frozen().iter().map(zeros).collect::<Result<_>>()?,
            precision,
            transfer: Transfer::new(device)?,
            table: Table {
                cos: upload(rows.0)?,
                sin: upload(rows.1)?,
            },
        })
    }

    /// Copies the flat parameters to the device.
    pub fn upload(&self, params: &[f32]) -> Result<()> {
        let trained = self.layout.tensors().iter().zip(&self.weights);
        for (spec, var) in trained.chain(self.layout.frozen().iter().zip(&self.frozen)) {
            self.transfer.write(&params[spec.range()], var)?;
        }
        Ok(())
    }

    /// Whether it adds up the lanes of a node where they are computed, so that only their sum leaves the device.
    pub fn adds(&self, lanes: usize) -> bool {
        self.device.is_cuda() && lanes <= LANES
    }

    /// The gradient of `Σ w·nll` of each micro-batch, summed along the tree of `node`, in `gradient`; the sums of each.
    pub fn gradient(
        &self,
        node: Node,
        micro_batches: &[(&Batch, Site)],
        gradient: &mut [f32],
    ) -> Result<Vec<Sums>> {
        let mut found = Vec::new();
        let sum = self.node(node, &mut micro_batches.iter(), &mut found)?;
        self.transfer
            .read(&sum, gradient, |out, values| out.copy_from_slice(values))?;
        Ok(found)
    }

    /// Adds the gradient of `Σ w·nll` to `gradient`.
    pub fn accumulate(&self, batch: &Batch, site: Site, gradient: &mut [f32]) -> Result<Sums> {
        let (sums, found) = self.lane(batch, site)?;
        self.transfer
            .read(&found, gradient, super::ops::simd::add)?;
        Ok(sums)
    }

    fn node<'a>(
        &self,
        node: Node,
        micro_batches: &mut impl Iterator<Item = &'a (&'a Batch, Site)>,
        found: &mut Vec<Sums>,
    ) -> Result<Tensor> {
        if let Some((left, right)) = node.children() {
            let left = self.node(left, micro_batches, found)?;
            return left + self.node(right, micro_batches, found)?;
        }
        let (batch, site) = micro_batches.next().expect("a micro-batch for each lane");
        let (sums, gradient) = self.lane(batch, *site)?;
        found.push(sums);
        Ok(gradient)
    }

    /// The sums of a micro-batch, and its gradient in the layout's order.
    fn lane(&self, batch: &Batch, site: Site) -> Result<(Sums, Tensor)> {
        let losses = self.losses(&self.forward(batch, Some(site))?, batch)?;
        let mut gradients = losses.sum_all()?.backward()?;
        let part = |(spec, var): (&TensorSpec, &Var)| match gradients.remove(var) {
            Some(part) => part.flatten_all(),
            None => candle_core::bail!("`{}` has no gradient: the graph is cut", spec.name),
        };
        let has_gradient = |(spec, _): &(&TensorSpec, &Var)| spec.range().end <= self.gradient_len;
        let tensors = self.layout.tensors().iter().zip(&self.weights);
        let parts = tensors.take_while(has_gradient).map(part);
        let gradient = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
        Ok((sums(&losses, batch)?, gradient))
    }

    /// The sums of a batch, without dropout.
    pub fn score(&self, batch: &Batch) -> Result<Scores> {
        let logits = self.forward(batch, None)?;
        let sums = sums(&self.losses(&logits, batch)?, batch)?;
        let mut confusion = empty_confusion(&self.model);
        if self.model.classifies() {
            let logits = logits.flatten_all()?.to_vec1()?;
            count(&mut confusion, &logits, &batch.targets, &batch.weights);
        }
        Ok(Scores { sums, confusion })
    }

    /// Logits of one sequence, `[tokens, vocab]`.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let one = Batch {
            inputs: tokens.to_vec(),
            samples: 1,
            length: tokens.len(),
            ..Batch::default()
        };
        self.forward(&one, None)?.flatten_all()?.to_vec1()
    }

    /// `w·nll` of each token.
    fn losses(&self, logits: &Tensor, batch: &Batch) -> Result<Tensor> {
        // The target of an unscored token may be anything; its loss is multiplied by zero.
        let scored = batch
            .targets
            .iter()
            .zip(&batch.weights)
            .map(|(&t, &w)| if w == 0.0 { 0 } else { t });
        let targets = Tensor::from_iter(scored, &self.device)?;
        let weights = Tensor::from_slice(&batch.weights, batch.weights.len(), &self.device)?;
        operations::losses(logits, &targets, &weights)
    }

    /// Logits, `[samples * length, vocab]`.
    fn forward(&self, batch: &Batch, site: Option<Site>) -> Result<Tensor> {
        let (samples, length) = (batch.samples, batch.length);
        let ids = Tensor::from_slice(&batch.inputs, batch.inputs.len(), &self.device)?;
        let places = Places::of(batch, &self.device)?;
        let m = &self.model;
        let llama = m.architecture == Architecture::Llama;
        let table = self.weight(if llama {
            "model.embed_tokens.weight"
        } else {
            "transformer.wte.weight"
        });
        let mut x = operations::embedding(&table, &ids, &batch.inputs)?;
        if !llama {
            let rows = self.weight("transformer.wpe.weight");
            let rows = operations::embedding(&rows, &places.positions, &places.of_rows)?;
            x = (x + rows)?;
        }
        x = x.reshape((samples, length, m.hidden_size))?;
        x = self.dropout(x, site, 0)?;
        for layer in 0..m.num_hidden_layers {
            x = if llama {
                self.llama_block(layer, x, &places, site)?
            } else {
                self.gpt2_block(layer, x, &places, site)?
            };
        }
        let x = self.norm(
            if llama {
                "model.norm"
            } else {
                "transformer.ln_f"
            },
            &x,
        )?;
        let head = match (m.classifies(), m.tie_word_embeddings) {
            (true, _) => self.weight("score.weight"),
            (false, true) => table,
            (false, false) => self.weight("lm_head.weight"),
        };
        let x = x.reshape((samples * length, m.hidden_size))?;
        operations::product(&x, &head, true, self.precision)
    }

    fn llama_block(
        &self,
        layer: usize,
        x: Tensor,
        places: &Places,
        site: Option<Site>,
    ) -> Result<Tensor> {
        let p = format!("model.layers.{layer}");
        let h = self.norm(&format!("{p}.input_layernorm"), &x)?;
        let project = |name: &str| self.linear(&format!("{p}.self_attn.{name}_proj"), &h, site);
        let heads = (
            self.model.num_attention_heads,
            self.model.num_key_value_heads,
        );
        let (q, k) = (
            self.heads(project("q")?, heads.0)?,
            self.heads(project("k")?, heads.1)?,
        );
        let v = self.heads(project("v")?, heads.1)?;
        let (q, k) = match self.model.qk_norm {
            true => (
                self.norm(&format!("{p}.self_attn.q_norm"), &q)?,
                self.norm(&format!("{p}.self_attn.k_norm"), &k)?,
            ),
            false => (q, k),
        };
        let turned = |x: &Tensor| operations::rotate(x, places, &self.table);
        let (q, k) = (turned(&q)?, turned(&k)?);
        let attended = self.attention(q, k, v, places, None, layer)?;
        let x = (x + self.linear(&format!("{p}.self_attn.o_proj"), &attended, site)?)?;
        let h = self.norm(&format!("{p}.post_attention_layernorm"), &x)?;
        let gate = self.linear(&format!("{p}.mlp.gate_proj"), &h, site)?;
        let up = self.linear(&format!("{p}.mlp.up_proj"), &h, site)?;
        let inner = operations::swiglu(&gate, &up)?;
        x + self.linear(&format!("{p}.mlp.down_proj"), &inner, site)?
    }

    fn gpt2_block(
        &self,
        layer: usize,
        x: Tensor,
        places: &Places,
        site: Option<Site>,
    ) -> Result<Tensor> {
        let p = format!("transformer.h.{layer}");
        let h = self.norm(&format!("{p}.ln_1"), &x)?;
        let qkv = self.conv1d(&format!("{p}.attn.c_attn"), &h, site)?;
        let part = |i| {
            let hidden = self.model.hidden_size;
            self.heads(
                qkv.narrow(D::Minus1, i * hidden, hidden)?.contiguous()?,
                self.model.num_attention_heads,
            )
        };
        let attended = self.attention(part(0)?, part(1)?, part(2)?, places, site, layer)?;
        let out = self.conv1d(&format!("{p}.attn.c_proj"), &attended, site)?;
        let x = (x + self.dropout(out, site, 2 + 3 * layer)?)?;
        let h = self.norm(&format!("{p}.ln_2"), &x)?;
        let u = self.conv1d(&format!("{p}.mlp.c_fc"), &h, site)?;
        let inner = operations::gelu(&u)?;
        let out = self.conv1d(&format!("{p}.mlp.c_proj"), &inner, site)?;
        x + self.dropout(out, site, 3 + 3 * layer)?
    }

    fn weight(&self, name: &str) -> Tensor {
        let named = |tensors: &[TensorSpec]| tensors.iter().position(|t| t.name == name);
        match (named(self.layout.tensors()), named(self.layout.frozen())) {
            (Some(index), _) => self.weights[index].as_tensor().clone(),
            (_, Some(index)) => self.frozen[index].as_detached_tensor(),
            _ => panic!("the layout has no `{name}`"),
        }
    }

    /// Adds what the adapter of a layer makes of x, if it has one.
    fn add_adapter(&self, name: &str, y: Tensor, x: &Tensor, site: Option<Site>) -> Result<Tensor> {
        let a = format!("{name}.lora_A.weight");
        let place = self.layout.tensors().iter().position(|t| t.name == a);
        let (Some(place), Some(lora)) = (place, &self.lora) else {
            return Ok(y);
        };
        let masks = site.and_then(|site| Mask::new(site, ADAPTER_PLACES + place, lora.dropout));
        let x = match masks {
            None => x.clone(),
            Some(mask) => {
                let mut factors = vec![1.0; x.elem_count()];
                mask.apply(&mut factors, 0);
                (x * Tensor::from_vec(factors, x.shape(), &self.device)?)?
            }
        };
        let narrow = self.product(&x, &self.weight(&a), true)?;
        let b = self.weight(&format!("{name}.lora_B.weight"));
        let wide = self.product(&narrow, &b, true)?;
        y + (wide * f64::from(lora.scale()))?
    }

    fn bias(&self, name: &str) -> Option<Tensor> {
        let name = format!("{name}.bias");
        self.layout.get(&name).map(|t| self.weight(&t.name))
    }

    /// `x Wᵀ + b` with W `[outputs, inputs]`.
    fn linear(&self, name: &str, x: &Tensor, site: Option<Site>) -> Result<Tensor> {
        let w = self.weight(&format!("{name}.weight"));
        let y = self.product(x, &w, true)?;
        self.add_adapter(name, self.add_bias(name, y)?, x, site)
    }

    /// `x W + b` with W `[inputs, outputs]`.
    fn conv1d(&self, name: &str, x: &Tensor, site: Option<Site>) -> Result<Tensor> {
        let w = self.weight(&format!("{name}.weight"));
        let y = self.product(x, &w, false)?;
        self.add_adapter(name, self.add_bias(name, y)?, x, site)
    }

    /// The product of each token's row of `[samples, length, inputs]`.
    fn product(&self, x: &Tensor, w: &Tensor, transposed: bool) -> Result<Tensor> {
        let (samples, length, inputs) = x.dims3()?;
        let rows = x.reshape((samples * length, inputs))?;
        let y = operations::product(&rows, w, transposed, self.precision)?;
        y.reshape((samples, length, ()))
    }

    fn add_bias(&self, name: &str, y: Tensor) -> Result<Tensor> {
        match self.bias(name) {
            Some(bias) => operations::bias(&y, &bias),
            None => Ok(y),
        }
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let kind = match self.model.architecture {
            Architecture::Llama => norm::Kind::Rms,
            Architecture::Gpt2 => norm::Kind::Layer,
        };
        let weight = self.weight(&format!("{name}.weight"));
        let y = operations::norm(x, &weight, kind, self.model.norm_eps)?;
        self.add_bias(name, y)
    }

    /// `[samples, length, heads * dim]` to `[samples, heads, length, dim]`.
    fn heads(&self, x: Tensor, heads: usize) -> Result<Tensor> {
        let (samples, length, _) = x.dims3()?;
        x.reshape((samples, length, heads, self.model.head_dim()))?
            .transpose(1, 2)?
            .contiguous()
    }

    fn attention(
        &self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        places: &Places,
        site: Option<Site>,
        layer: usize,
    ) -> Result<Tensor> {
        let (samples, heads, length, dim) = q.dims4()?;
        let (k, v) = (self.repeat(k)?, self.repeat(v)?);
        let scale = 1.0 / (dim as f32).sqrt();
        let mut factors = None;
        if let Some(mask) = site.and_then(|site| Mask::new(site, 1 + 3 * layer, self.model.dropout))
        {
            let mut kept = vec![0.0; samples * heads * length * length];
            for (row, kept) in kept.chunks_exact_mut(length).enumerate() {
                mask.factors((row * length.next_multiple_of(4)) as u64, kept);
            }
            let shape = (samples, heads, length, length);
            factors = Some(Tensor::from_vec(kept, shape, &self.device)?);
        }
        operations::attention(&q, &k, &v, places, scale, factors.as_ref())?
            .transpose(1, 2)?
            .reshape((samples, length, heads * dim))
    }

    /// Each key/value head once per query head of its group.
    fn repeat(&self, x: Tensor) -> Result<Tensor> {
        let (samples, kv_heads, length, dim) = x.dims4()?;
        let group = self.model.num_attention_heads / kv_heads;
        if group == 1 {
            return Ok(x);
        }
        x.unsqueeze(2)?
            .broadcast_as((samples, kv_heads, group, length, dim))?
            .reshape((samples, kv_heads * group, length, dim))
    }

    fn dropout(&self, x: Tensor, site: Option<Site>, place: usize) -> Result<Tensor> {
        let Some(mask) = site.and_then(|site| Mask::new(site, place, self.model.dropout)) else {
            return Ok(x);
        };
        let mut factors = vec![1.0; x.elem_count()];
        mask.apply(&mut factors, 0);
        let factors = Tensor::from_vec(factors, x.shape(), &self.device)?;
        x * factors
    }
}

/// Where the tokens of a batch stand.
pub struct Places {
    /// The position of each within its segment.
    of_rows: Vec<u32>,
    /// The same on the device, `[samples * length]`.
    positions: Tensor,
    /// The place within its row where its segment begins, `[samples * length]`; for the GPU's kernels alone.
    #[cfg(feature = "cuda")]
    starts: Tensor,
    /// 0 where a row may see a key, else minus infinity, `[samples, 1, length, length]`; empty on a GPU.
    hidden: Tensor,
}

impl Places {
    fn of(batch: &Batch, device: &Device) -> Result<Self> {
        let (samples, length) = (batch.samples, batch.length);
        let rows = samples * length;
        let of_row = |r: usize| position(r, length, &batch.starts);
        let of_rows: Vec<u32> = (0..rows).map(|r| of_row(r) as u32).collect();
        let positions = Tensor::from_slice(&of_rows, rows, device)?;
        let first = |r: usize| r % length - of_row(r);
        let rows_hidden = if device.is_cuda() { 0 } else { rows };
        let hidden = (0..rows_hidden).flat_map(|r| {
            let seen = first(r)..=r % length;
            (0..length).map(move |key| match seen.contains(&key) {
                true => 0.0,
                false => f32::NEG_INFINITY,
            })
        });
        let hidden = Tensor::from_iter(hidden, device)?;
        Ok(Self {
            of_rows,
            positions,
            #[cfg(feature = "cuda")]
            starts: Tensor::from_iter((0..rows).map(|r| first(r) as u32), device)?,
            hidden: hidden.reshape((rows_hidden / length, 1, length, length))?,
        })
    }
}

fn sums(losses: &Tensor, batch: &Batch) -> Result<Sums> {
    let losses = losses.flatten_all()?.to_vec1::<f32>()?;
    Ok(Sums {
        loss: losses.iter().map(|&x| f64::from(x)).sum(),
        weight: batch.weights.iter().map(|&x| f64::from(x)).sum(),
    })
}
