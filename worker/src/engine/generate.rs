//! Text, one token at a time, with a cache of keys and values. The random numbers are the engine's own: the same
//! seed, prompt and weights give the same text. Runs on the CPU, from the host's copy of the parameters, whatever device
//! trains them.

use cohort_common::rng::{derive_key, philox};

use super::ops::cross_entropy::softmax;
use super::{Engine, EngineError, Result};

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// At most this many new tokens.
    pub max_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Draws among this many of the likeliest tokens.
    pub top_k: Option<usize>,
    /// Draws among the fewest likeliest tokens that have this probability together.
    pub top_p: Option<f32>,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    fn validate(&self) -> Result<()> {
        let fail = |text: String| Err(EngineError::Sampling(text));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return fail(format!(
                "`temperature` is {}, must be 0 or above",
                self.temperature
            ));
        }
        if self.top_k == Some(0) {
            return fail("`top_k` is 0, must be at least 1".into());
        }
        match self.top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => fail(format!("`top_p` is {p}, must be in (0, 1]")),
            _ => Ok(()),
        }
    }
}

/// Continues `prompt` and returns the new tokens, the end-of-text token excluded. `on_token` sees each one as it
/// comes and returns whether to go on. When the context is full, its older half is forgotten.
pub fn generate(
    engine: &mut Engine,
    prompt: &[u32],
    sampling: &Sampling,
    eos: Option<u32>,
    on_token: &mut dyn FnMut(u32) -> bool,
) -> Result<Vec<u32>> {
    sampling.validate()?;
    engine.check_tokens(prompt)?;
    if prompt.is_empty() {
        return Err(EngineError::Sampling(
            "the prompt is empty; give at least one token".into(),
        ));
    }
    let context = engine.model.context;
    let mut text = prompt.to_vec();
    let mut cache = engine.fused.cache();
    let mut sampler = Sampler::new(sampling);
    while text.len() < prompt.len() + sampling.max_tokens {
        let seen = window(text.len(), context);
        let cached = cache.len();
        // Either everything but the last token is cached, or the window has just moved and the cache starts again.
        let fed = match cached > 0 && cached + 1 == seen {
            true => 1,
            false => {
                cache = engine.fused.cache();
                seen
            }
        };
        let new = &text[text.len() - fed..];
        let logits = engine
            .pool
            .install(|| engine.fused.extend(&engine.params, &mut cache, new));
        let token = sampler.draw(logits);
        if Some(token) == eos {
            break;
        }
        text.push(token);
        if !on_token(token) {
            break;
        }
    }
    Ok(text.split_off(prompt.len()))
}

/// How many of the last tokens the model sees after `len` tokens: all of them up to the context, then between half of
/// it and all of it.
fn window(len: usize, context: usize) -> usize {
    if len <= context {
        return len;
    }
    let kept = (context / 2).max(1);
    let span = context - kept + 1;
    kept + (len - context - 1) % span
}

/// Draws tokens from logits.
struct Sampler<'a> {
    sampling: &'a Sampling,
    key: u64,
    drawn: u64,
}

impl<'a> Sampler<'a> {
    fn new(sampling: &'a Sampling) -> Self {
        Self {
            sampling,
            key: derive_key(sampling.seed, "sample"),
            drawn: 0,
        }
    }

    fn draw(&mut self, mut logits: Vec<f32>) -> u32 {
        let Sampling {
            temperature,
            top_k,
            top_p,
            ..
        } = *self.sampling;
        let number = self.uniform();
        if temperature == 0.0 {
            return likeliest(&logits);
        }
        logits.iter_mut().for_each(|logit| *logit /= temperature);
        softmax(&mut logits);
        let mut candidates: Vec<(u32, f64)> =
            (0..).zip(logits.iter().map(|&p| f64::from(p))).collect();
        if top_k.is_some() || top_p.is_some() {
            candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            candidates.truncate(top_k.unwrap_or(usize::MAX));
            candidates.truncate(nucleus(&candidates, top_p));
        }
        let total: f64 = candidates.iter().map(|(_, p)| p).sum();
        let mut left = number * total;
        for &(token, p) in &candidates {
            left -= p;
            if left < 0.0 {
                return token;
            }
        }
        // Rounding may leave a crumb: the last candidate that can be drawn takes it.
        candidates
            .iter()
            .rev()
            .find(|(_, p)| *p > 0.0)
            .map_or(0, |(token, _)| *token)
    }

    /// A number in [0, 1) with 53 random bits.
    fn uniform(&mut self) -> f64 {
        let words = philox(
            self.key,
            [self.drawn as u32, (self.drawn >> 32) as u32, 0, 0],
        );
        self.drawn += 1;
        let bits = (u64::from(words[0]) << 32 | u64::from(words[1])) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }
}

/// How many of the sorted candidates reach the share `top_p` of their total together.
fn nucleus(candidates: &[(u32, f64)], top_p: Option<f32>) -> usize {
    let Some(top_p) = top_p else {
        return candidates.len();
    };
    let total: f64 = candidates.iter().map(|(_, p)| p).sum();
    let mut sum = 0.0;
    let reached = candidates.iter().position(|(_, p)| {
        sum += p;
        sum >= f64::from(top_p) * total
    });
    reached.map_or(candidates.len(), |index| index + 1)
}

/// The index of the largest logit, the first of equals.
fn likeliest(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling() -> Sampling {
        Sampling {
            max_tokens: 1,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            seed: 1,
        }
    }

    fn counts(sampling: &Sampling) -> [u32; 4] {
        let mut sampler = Sampler::new(sampling);
        let mut counts = [0; 4];
        for _ in 0..10_000 {
            counts[sampler.draw([0.1f32, 0.2, 0.3, 0.4].map(f32::ln).to_vec()) as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        for (count, expected) in counts(&sampling())
            .into_iter()
            .zip([1000, 2000, 3000, 4000])
        {
            assert!(
                (i64::from(count) - expected).abs() < 200,
                "{count} {expected}"
            );
        }
    }

    #[test]
    fn top_k_and_top_p_leave_the_unlikely_out() {
        let [a, b, c, d] = counts(&Sampling {
            top_k: Some(2),
            ..sampling()
        });
        assert!(a == 0 && b == 0 && c > 4000 && d > 5400);
        let [a, b, c, d] = counts(&Sampling {
            top_p: Some(0.75),
            ..sampling()
        });
        assert!(a == 0 && b > 0 && c > 0 && d > 0);
        let [a, b, c, d] = counts(&Sampling {
            temperature: 0.0,
            ..sampling()
        });
        assert_eq!([a, b, c, d], [0, 0, 0, 10_000]);
    }

    #[test]
    fn the_window_never_exceeds_the_context_and_moves_rarely() {
        for context in [1, 2, 7, 8] {
            for len in 1..60 {
                let seen = window(len, context);
                assert!(
                    seen >= 1 && seen <= context && seen <= len,
                    "{len} {context} {seen}"
                );
            }
        }
        let moves = (9..200)
            .filter(|&len| window(len, 8) != window(len - 1, 8) + 1)
            .count();
        assert!(moves <= 200 / 5 + 1, "{moves}");
    }

    #[test]
    fn impossible_requests_are_refused() {
        for bad in [
            Sampling {
                temperature: -1.0,
                ..sampling()
            },
            Sampling {
                temperature: f32::NAN,
                ..sampling()
            },
            Sampling {
                top_k: Some(0),
                ..sampling()
            },
            Sampling {
                top_p: Some(1.5),
                ..sampling()
            },
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }
}
