//! Low-rank adapters (Hu et al., arXiv 2106.09685): which matrices get one, and how large it is. Names are PEFT's.

use serde::{Deserialize, Serialize};

use super::bounds::{number, real, within};
use super::error::SpecError;
use super::file::LoraTable;
use super::{Architecture, ModelConfig};

/// Adapters of a run: `y = W x + scale · B A drop(x)` for each target, W frozen, A `[rank, inputs]`, B `[outputs, rank]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rows of A and columns of B.
    pub rank: u32,
    /// What the product is scaled by, before it is divided by the rank or its root.
    pub alpha: f64,
    /// Probability that an element of an adapter's input is dropped.
    pub dropout: f32,
    /// Divide by the root of the rank, not by the rank (Kalajdzievski, arXiv 2312.03732).
    pub rslora: bool,
    /// The linear layers of each block that get an adapter, by the last part of their name, in the model's order.
    pub target_modules: Vec<String>,
}

impl LoraConfig {
    /// The factor of the product: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    pub fn scale(&self) -> f32 {
        let rank = f64::from(self.rank);
        let divisor = if self.rslora { rank.sqrt() } else { rank };
        (self.alpha / divisor) as f32
    }

    /// Whether a linear layer, named as in a block, such as `self_attn.q_proj`, has an adapter.
    pub fn adapts(&self, module: &str) -> bool {
        let last = module.rsplit('.').next().unwrap_or(module);
        self.target_modules.iter().any(|target| target == last)
    }
}

/// The linear layers of a block that can have an adapter.
pub fn linear_modules(architecture: Architecture) -> &'static [&'static str] {
    match architecture {
        Architecture::Llama => &[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        Architecture::Gpt2 => &["c_attn", "c_proj", "c_fc"],
    }
}

/// The adapters that a table asks for; `None` where it asks for none.
pub(super) fn lora_of(
    table: &LoraTable,
    model: &ModelConfig,
) -> Result<Option<LoraConfig>, SpecError> {
    if *table == LoraTable::default() {
        return Ok(None);
    }
    let Some(rank) = table.rank else {
        return Err(SpecError::Missing {
            key: "lora.rank".into(),
            why: "the spec has a [lora] table".into(),
            next: "set it, or pass `--lora RANK`; 8 or 16 suits most".into(),
        });
    };
    let most = model.hidden_size.min(4096) as u64;
    within("lora.rank", rank, 1..=most, "8 or 16 suits most")?;
    let alpha = table.alpha.unwrap_or(2.0 * rank as f64);
    real(
        "lora.alpha",
        alpha,
        alpha > 0.0 && alpha <= 1e6,
        "it must be above 0, and at most 1e6",
        "twice the rank is the default",
    )?;
    let dropout = table.dropout.unwrap_or(0.0);
    real(
        "lora.dropout",
        dropout,
        (0.0..1.0).contains(&dropout),
        "it must be from 0 to below 1",
        "0 is the default",
    )?;
    let known = linear_modules(model.architecture);
    let wanted = match &table.target_modules {
        Some(wanted) if wanted.iter().any(|name| name == "all-linear") => None,
        wanted => wanted.as_deref(),
    };
    if let Some(unknown) = wanted
        .into_iter()
        .flatten()
        .find(|name| !known.contains(&name.as_str()))
    {
        return Err(SpecError::impossible(
            "lora.target_modules",
            unknown,
            format!(
                "a block of `{}` has the linear layers {}",
                model.architecture,
                known.join(", ")
            ),
            "name some of them, or \"all-linear\"",
        ));
    }
    if wanted.is_some_and(<[String]>::is_empty) {
        return Err(SpecError::impossible(
            "lora.target_modules",
            "[]",
            "an adapter of nothing learns nothing",
            "name some of them, or \"all-linear\"",
        ));
    }
    let taken = |name: &&&str| wanted.is_none_or(|wanted| wanted.iter().any(|w| w == **name));
    Ok(Some(LoraConfig {
        rank: rank as u32,
        alpha,
        dropout: dropout as f32,
        rslora: table.rslora.unwrap_or(false),
        target_modules: known
            .iter()
            .filter(taken)
            .map(|name| (*name).to_owned())
            .collect(),
    }))
}

impl std::fmt::Display for LoraConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "rank {}, alpha {}{}, dropout {}, on {}",
            self.rank,
            number(self.alpha),
            if self.rslora { " (rsLoRA)" } else { "" },
            number(f64::from(self.dropout)),
            self.target_modules.join(", ")
        )
    }
}
