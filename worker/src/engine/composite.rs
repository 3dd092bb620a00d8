//! The model in candle's own differentiable operations, with one variable per parameter: what runs on CUDA, and what
//! the fused path is compared with on the CPU. Slow and plain on purpose; every operation here has a backward.

use candle_core::{D, DType, Device, Tensor, Var};
use cohort_common::layout::{Layout, TensorSpec};
use cohort_common::spec::{Architecture, LoraConfig, ModelConfig};

use super::fused::{count, empty_confusion};
use super::ops::{dropout::Mask, position, rope};
use super::parameters::ADAPTER_PLACES;
use super::{Batch, Scores, Site, Sums};

type Result<T> = candle_core::Result<T>;

/// The parameters as variables on a device.
pub struct Composite {
    model: ModelConfig,
    layout: Layout,
    device: Device,
    lora: Option<LoraConfig>,
    /// What is trained.
    weights: Vec<Var>,
    /// What is not; no gradient goes there.
    frozen: Vec<Var>,
    cos: Tensor,
    sin: Tensor,
}

impl Composite {
    /// All-zero parameters on `device`.
    pub fn new(
        model: &ModelConfig,
        layout: &Layout,
        lora: Option<&LoraConfig>,
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
            device: device.clone(),
            lora: lora.cloned(),
            weights: layout.tensors().iter().map(zeros).collect::<Result<_>>()?,
            frozen: layout.frozen().iter().map(zeros).collect::<Result<_>>()?,
            cos: upload(rows.0)?,
            sin: upload(rows.1)?,
        })
    }

    /// Copies the flat parameters to the device.
    pub fn upload(&self, params: &[f32]) -> Result<()> {
        let trained = self.layout.tensors().iter().zip(&self.weights);
        for (spec, var) in trained.chain(self.layout.frozen().iter().zip(&self.frozen)) {
            var.set(&Tensor::from_slice(
                &params[spec.range()],
                spec.shape.as_slice(),
                &self.device,
            )?)?;
        }
        Ok(())
    }

    /// Adds the gradient of `Σ w·nll` to `gradient`.
    pub fn accumulate(&self, batch: &Batch, site: Site, gradient: &mut [f32]) -> Result<Sums> {
        let losses = self.losses(&self.forward(batch, Some(site))?, batch)?;
        let gradients = losses.sum_all()?.backward()?;
        let parts = self.weights.iter().map(|var| match gradients.get(var) {
            Some(gradient) => gradient.flatten_all()?.to_vec1::<f32>(),
            None => candle_core::bail!("a parameter has no gradient: the graph is cut"),
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        for (spec, part) in self.layout.tensors().iter().zip(parts) {
            super::ops::simd::add(&mut gradient[spec.range()], &part);
        }
        sums(&losses, batch)
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
        let rows = batch.inputs.len();
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_sums = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        // The target of an unscored token may be anything; its loss is multiplied by zero.
        let scored = batch
            .targets
            .iter()
            .zip(&batch.weights)
            .map(|(&t, &w)| if w == 0.0 { 0 } else { t });
        let targets = Tensor::from_iter(scored, &self.device)?.reshape((rows, 1))?;
        let weights = Tensor::from_slice(&batch.weights, (rows, 1), &self.device)?;
        (log_sums - shifted.gather(&targets, 1)?)?.mul(&weights)
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
        let mut x = table
            .index_select(&ids, 0)?
            .reshape((samples, length, m.hidden_size))?;
        if !llama {
            let rows = self.weight("transformer.wpe.weight");
            let rows = rows.index_select(&places.positions, 0)?;
            x = (x + rows.reshape((samples, length, m.hidden_size))?)?;
        }
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
        x.reshape((samples * length, m.hidden_size))?
            .matmul(&head.t()?)
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
        let (q, k) = (self.rotate(&q, places)?, self.rotate(&k, places)?);
        let attended = self.attention(q, k, v, places, None, layer)?;
        let x = (x + self.linear(&format!("{p}.self_attn.o_proj"), &attended, site)?)?;
        let h = self.norm(&format!("{p}.post_attention_layernorm"), &x)?;
        let gate = self.linear(&format!("{p}.mlp.gate_proj"), &h, site)?;
        let silu = (&gate / (gate.neg()?.exp()? + 1.0)?)?;
        let inner = (silu * self.linear(&format!("{p}.mlp.up_proj"), &h, site)?)?;
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
        let z = ((&u + (u.powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
        let gelu = ((&u * 0.5)? * (z.tanh()? + 1.0)?)?;
        let out = self.conv1d(&format!("{p}.mlp.c_proj"), &gelu, site)?;
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
        let narrow = x.broadcast_matmul(&self.weight(&a).t()?)?;
        let b = self.weight(&format!("{name}.lora_B.weight"));
        let wide = narrow.broadcast_matmul(&b.t()?)?;
        y + (wide * f64::from(lora.scale()))?
    }

    fn bias(&self, name: &str) -> Option<Tensor> {
        let name = format!("{name}.bias");
        self.layout.get(&name).map(|t| self.weight(&t.name))
    }

    /// `x Wᵀ + b` with W `[outputs, inputs]`.
    fn linear(&self, name: &str, x: &Tensor, site: Option<Site>) -> Result<Tensor> {
        let w = self.weight(&format!("{name}.weight"));
        let y = x.broadcast_matmul(&w.t()?)?;
        self.add_adapter(name, self.add_bias(name, y)?, x, site)
    }

    /// `x W + b` with W `[inputs, outputs]`.
    fn conv1d(&self, name: &str, x: &Tensor, site: Option<Site>) -> Result<Tensor> {
        let y = x.broadcast_matmul(&self.weight(&format!("{name}.weight")))?;
        self.add_adapter(name, self.add_bias(name, y)?, x, site)
    }

    fn add_bias(&self, name: &str, y: Tensor) -> Result<Tensor> {
        match self.bias(name) {
            Some(bias) => y.broadcast_add(&bias),
            None => Ok(y),
        }
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let centred = match self.model.architecture {
            Architecture::Llama => x.clone(),
            Architecture::Gpt2 => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let square = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = centred.broadcast_div(&(square + f64::from(self.model.norm_eps))?.sqrt()?)?;
        let y = normal.broadcast_mul(&self.weight(&format!("{name}.weight")))?;
        self.add_bias(name, y)
    }

    /// `[samples, length, heads * dim]` to `[samples, heads, length, dim]`.
    fn heads(&self, x: Tensor, heads: usize) -> Result<Tensor> {
        let (samples, length, _) = x.dims3()?;
        x.reshape((samples, length, heads, self.model.head_dim()))?
            .transpose(1, 2)?
            .contiguous()
    }

    fn rotate(&self, x: &Tensor, places: &Places) -> Result<Tensor> {
        let (samples, _, length, dim) = x.dims4()?;
        let half = dim / 2;
        let turns = |table: &Tensor| {
            let rows = table.index_select(&places.positions, 0)?;
            rows.reshape((samples, 1, length, half))
        };
        let (cos, sin) = (turns(&self.cos)?, turns(&self.sin)?);
        let (a, b) = (
            x.narrow(D::Minus1, 0, half)?,
            x.narrow(D::Minus1, half, half)?,
        );
        let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[low, high], D::Minus1)?.contiguous()
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
        let scores = (q.matmul(&k.t()?)? * (1.0 / (dim as f64).sqrt()))?;
        let scores = scores.broadcast_add(&places.hidden)?;
        let exps = scores
            .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
            .exp()?;
        let mut p = exps.broadcast_div(&exps.sum_keepdim(D::Minus1)?)?;
        if let Some(mask) = site.and_then(|site| Mask::new(site, 1 + 3 * layer, self.model.dropout))
        {
            let mut factors = vec![0.0; samples * heads * length * length];
            for (row, factors) in factors.chunks_exact_mut(length).enumerate() {
                mask.factors((row * length.next_multiple_of(4)) as u64, factors);
            }
            p = (p * Tensor::from_vec(factors, (samples, heads, length, length), &self.device)?)?;
        }
        p.matmul(&v)?
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
struct Places {
    /// The position of each within its segment, `[samples * length]`.
    positions: Tensor,
    /// 0 where a row may see a key, else minus infinity, `[samples, 1, length, length]`.
    hidden: Tensor,
}

impl Places {
    fn of(batch: &Batch, device: &Device) -> Result<Self> {
        let (samples, length) = (batch.samples, batch.length);
        let rows = samples * length;
        let of_row = |r: usize| position(r, length, &batch.starts);
        let positions = Tensor::from_iter((0..rows).map(|r| of_row(r) as u32), device)?;
        let hidden = (0..rows).flat_map(|r| {
            let last = r % length;
            let seen = last - of_row(r)..=last;
            (0..length).map(move |key| match seen.contains(&key) {
                true => 0.0,
                false => f32::NEG_INFINITY,
            })
        });
        let hidden = Tensor::from_iter(hidden, device)?;
        Ok(Self {
            positions,
            hidden: hidden.reshape((samples, 1, length, length))?,
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
