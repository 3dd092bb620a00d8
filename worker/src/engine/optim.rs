//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) in place over the flat buffers, one pass over memory, in the order
//! of operations of `torch.optim.AdamW`:
//!
//! p -= lr·decay·p (matrices only),   m += (1 - β1)(g - m),   v = β2 v + (1 - β2) g²,
//! p -= lr/(1 - β1^t) · m / (sqrt(v)/sqrt(1 - β2^t) + eps),   with g = scale · root gradient

use cohort_common::layout::{Layout, TensorSpec};
use cohort_common::spec::{LayerRates, ModelConfig, TrainConfig};
use rayon::prelude::*;

use super::Update;
use super::ops::cut;
use super::ops::simd::{fma, simd_fn};

/// Elements in one task.
const BLOCK: usize = 64 * 1024;

/// Running means of the gradient and of its square.
pub struct Moments {
    /// First moment.
    pub exp_avg: Vec<f32>,
    /// Second moment.
    pub exp_avg_sq: Vec<f32>,
}

impl Moments {
    /// Moments of a run that has not begun.
    pub fn zeros(len: usize) -> Self {
        Self {
            exp_avg: vec![0.0; len],
            exp_avg_sq: vec![0.0; len],
        }
    }
}

impl From<cohort_common::checkpoint::Moments> for Moments {
    fn from(moments: cohort_common::checkpoint::Moments) -> Self {
        Self {
            exp_avg: moments.exp_avg,
            exp_avg_sq: moments.exp_avg_sq,
        }
    }
}

/// A stretch of the flat buffer that one task updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    len: usize,
    decays: bool,
    /// Of its layer, where layers have rates of their own; else 0.
    depth: usize,
}

/// The optimizer's constants and its partition of the flat buffer.
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    pieces: Vec<Piece>,
    rates: Option<LayerRates>,
}

/// The factors of one step, in the optimizer's arithmetic.
#[derive(Clone, Copy)]
struct Factors {
    scale: f32,
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    inverse_sqrt_correction: f32,
    eps: f32,
}

impl AdamW {
    /// Partitions what of `layout` has a gradient.
    pub fn new(train: &TrainConfig, model: &ModelConfig, layout: &Layout) -> Self {
        let rates = LayerRates::of(model, train);
        Self {
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            weight_decay: train.weight_decay,
            pieces: pieces(layout, rates.as_ref()),
            rates,
        }
    }

    /// A partition of `len` elements that all decay.
    #[cfg(test)]
    pub fn whole(train: &TrainConfig, len: usize) -> Self {
        let pieces = vec![Piece {
            len,
            decays: true,
            depth: 0,
        }];
        Self {
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            weight_decay: train.weight_decay,
            pieces,
            rates: None,
        }
    }

    /// Elements of a gradient. What is behind them stays as it is.
    pub fn gradient_len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len).sum()
    }

    /// The rates of layers, where they have some of their own.
    pub fn rates(&self) -> Option<&LayerRates> {
        self.rates.as_ref()
    }

    /// One update of `params` and `moments` by the gradient `root`, all of them from the element `first` on.
    pub fn update(
        &self,
        params: &mut [f32],
        moments: &mut Moments,
        root: &[f32],
        first: usize,
        update: Update,
    ) {
        let t = update.count as f64;
        let (correction1, correction2) = (
            1.0 - libm::pow(self.beta1, t),
            1.0 - libm::pow(self.beta2, t),
        );
        let rate = |depth: usize| {
            let part = self
                .rates
                .as_ref()
                .map_or(1.0, |rates| rates.rate(depth, update.step));
            update.learning_rate * part
        };
        let factors = |decays: bool, depth: usize| Factors {
            scale: update.scale as f32,
            keep: if decays {
                (1.0 - rate(depth) * self.weight_decay) as f32
            } else {
                1.0
            },
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            step_size: (rate(depth) / correction1) as f32,
            inverse_sqrt_correction: (1.0 / correction2.sqrt()) as f32,
            eps: self.eps as f32,
        };
        let (mut p, mut m, mut v, mut g) = (
            params,
            &mut moments.exp_avg[..],
            &mut moments.exp_avg_sq[..],
            root,
        );
        let mut tasks = Vec::with_capacity(self.pieces.len());
        let (mut begins, end) = (0, first + root.len());
        for piece in &self.pieces {
            // What of it lies within.
            let within = begins.max(first)..(begins + piece.len).min(end);
            begins += piece.len;
            if within.is_empty() {
                continue;
            }
            let parts = (
                cut(&mut p, within.len()),
                cut(&mut m, within.len()),
                cut(&mut v, within.len()),
            );
            let (gradient, rest) = g.split_at(within.len());
            g = rest;
            tasks.push((parts, gradient, factors(piece.decays, piece.depth)));
        }
        tasks
            .into_par_iter()
            .for_each(|((p, m, v), g, factors)| update_piece(p, m, v, g, factors));
    }
}

fn pieces(layout: &Layout, rates: Option<&LayerRates>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let end = rates.map_or(layout.len(), |rates| rates.gradient_len(layout));
    let with_gradient = |tensor: &&TensorSpec| tensor.range().end <= end;
    for tensor in layout.tensors().iter().filter(with_gradient) {
        let (mut left, decays) = (tensor.len(), tensor.decays());
        let depth = rates.map_or(0, |rates| rates.depth(&tensor.name));
        let alike = |last: &&mut Piece| last.decays == decays && last.depth == depth;
        if let Some(last) = pieces.last_mut().filter(alike) {
            let more = left.min(BLOCK - last.len);
            last.len += more;
            left -= more;
        }
        while left > 0 {
            let len = left.min(BLOCK);
            pieces.push(Piece { len, decays, depth });
            left -= len;
        }
    }
    pieces
}

simd_fn! {
    fn update_piece(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], f: Factors) {
        for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * f.scale;
            let first = fma::<FMA>(g - *m, f.one_minus_beta1, *m);
            let second = fma::<FMA>(f.one_minus_beta2 * g, g, f.beta2 * *v);
            let denominator = fma::<FMA>(second.sqrt(), f.inverse_sqrt_correction, f.eps);
            *p = *p * f.keep - f.step_size * (first / denominator);
            *m = first;
            *v = second;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cohort_common::spec::Architecture;

    #[test]
    fn pieces_tile_the_layout_and_decay_what_decays() {
        let model = ModelConfig {
            architecture: Architecture::Gpt2,
            vocab_size: 3000,
            context: 64,
            hidden_size: 96,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 4,
            intermediate_size: 384,
            tie_word_embeddings: true,
            bias: true,
            dropout: 0.0,
            norm_eps: 1e-5,
            head_dim: None,
            attention_bias: false,
            qk_norm: false,
            rope_theta: 10_000.0,
            rope_scaling: None,
            initializer_range: 0.02,
            labels: Vec::new(),
        };
        let layout = Layout::of(&model);
        let decays: Vec<bool> = pieces(&layout, None)
            .iter()
            .inspect(|piece| assert!(piece.len > 0 && piece.len <= BLOCK))
            .flat_map(|piece| std::iter::repeat_n(piece.decays, piece.len))
            .collect();
        let expected = layout.tensors().iter();
        let expected: Vec<bool> = expected
            .flat_map(|t| std::iter::repeat_n(t.decays(), t.len()))
            .collect();
        assert!(decays == expected);
    }
}
