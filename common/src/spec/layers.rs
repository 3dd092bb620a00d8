//! Which layers learn, and how fast: for finetuning, where the lowest layers hold what is general.
//!
//! A tensor's depth is 0 for embeddings, n + 1 for block n, and one more than the last block's for the final norm and the
//! head; a head that is tied to the embedding is the embedding. The rate of depth d is `layer_decay^(top - d)` of the
//! schedule's (discriminative finetuning, Howard and Ruder, arXiv 1801.06146; in this form Clark et al., arXiv
//! 2003.10555), and 0 where the layer is frozen.

use super::{ModelConfig, TrainConfig};
use crate::layout::Layout;

/// The rates of a model's layers.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerRates {
    top: usize,
    frozen: usize,
    decay: f64,
    unfreeze_every: Option<u64>,
}

impl LayerRates {
    /// Those that a run asks for; `None` where all layers learn alike.
    pub fn of(model: &ModelConfig, train: &TrainConfig) -> Option<Self> {
        let asked = train.freeze_layers.is_some()
            || train.layer_decay.is_some()
            || train.unfreeze_every.is_some();
        asked.then(|| Self {
            top: model.num_hidden_layers + 1,
            // Frozen blocks stand on the embeddings, which are frozen with them.
            frozen: train.freeze_layers.map_or(0, |layers| layers as usize + 1),
            decay: train.layer_decay.unwrap_or(1.0),
            unfreeze_every: train.unfreeze_every,
        })
    }

    /// Elements of the flat buffer that ever have a gradient: those before the layers that stay frozen, which stand at its end.
    pub fn gradient_len(&self, layout: &Layout) -> usize {
        layout.len_without(|tensor| self.depth(&tensor.name) < self.frozen)
    }

    /// The depth of a tensor, by its name.
    pub fn depth(&self, name: &str) -> usize {
        let parts: Vec<&str> = name.split('.').collect();
        let block = parts.windows(2).find_map(|pair| match pair {
            ["layers" | "h", number] => number.parse::<usize>().ok(),
            _ => None,
        });
        let embeds = ["embed_tokens", "wte", "wpe"];
        match block {
            Some(block) => block + 1,
            None if parts.iter().any(|part| embeds.contains(part)) => 0,
            None => self.top,
        }
    }

    /// The rate of a depth in a step, as a part of the schedule's. 0 is frozen.
    pub fn rate(&self, depth: usize, step: u64) -> f64 {
        if depth < self.frozen {
            return 0.0;
        }
        let below_top = self.top.saturating_sub(depth);
        if let Some(every) = self.unfreeze_every
            && step.saturating_sub(1) / every.max(1) < below_top as u64
        {
            return 0.0;
        }
        // Products, not powers, so that every machine finds the same bits.
        (0..below_top).fold(1.0, |rate, _| rate * self.decay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(frozen: usize, decay: f64, unfreeze_every: Option<u64>) -> LayerRates {
        LayerRates {
            top: 3,
            frozen,
            decay,
            unfreeze_every,
        }
    }

    #[test]
    fn names_have_depths() {
        let rates = rates(0, 1.0, None);
        for (name, depth) in [
            ("model.embed_tokens.weight", 0),
            ("transformer.wpe.weight", 0),
            ("model.layers.0.mlp.up_proj.weight", 1),
            ("transformer.h.1.attn.c_attn.lora_A.weight", 2),
            ("model.norm.weight", 3),
            ("transformer.ln_f.bias", 3),
            ("lm_head.weight", 3),
            ("score.weight", 3),
        ] {
            assert_eq!(rates.depth(name), depth, "{name}");
        }
    }

    #[test]
    fn lower_layers_learn_slower_or_later_or_not_at_all() {
        let decayed = rates(0, 0.5, None);
        assert_eq!(
            [0, 1, 2, 3].map(|depth| decayed.rate(depth, 1)),
            [0.125, 0.25, 0.5, 1.0]
        );
        let frozen = rates(2, 1.0, None);
        assert_eq!(
            [0, 1, 2, 3].map(|depth| frozen.rate(depth, 9)),
            [0.0, 0.0, 1.0, 1.0]
        );
        let gradual = rates(0, 1.0, Some(10));
        assert_eq!(
            [0, 1, 2, 3].map(|depth| gradual.rate(depth, 10)),
            [0.0, 0.0, 0.0, 1.0]
        );
        assert_eq!(
            [0, 1, 2, 3].map(|depth| gradual.rate(depth, 11)),
            [0.0, 0.0, 1.0, 1.0]
        );
        assert_eq!(gradual.rate(0, 31), 1.0);
    }
}
