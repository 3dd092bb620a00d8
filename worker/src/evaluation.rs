//! What validations do with the state in memory: text is scored, and the model writes after the run's prompts. What it
//! writes is a function of the run's seed, the step, the prompt and the weights: the same on any worker. Neither changes
//! the state.

use cohort_common::cluster::Prompt;
use cohort_common::cluster::messages::{LaneSums, Scores};
use cohort_common::ids::Step;
use cohort_common::rng::{derive_key, philox};
use cohort_common::spec::SampleConfig;

use crate::engine::{Batch, Engine, Sampling, generate};
use crate::lanes::Stop;

/// The scores of a unit.
pub fn score(engine: &mut Engine, batches: &[Batch]) -> Result<Scores, Stop> {
    let mut scores = Scores::default();
    for batch in batches {
        let found = engine.score(batch)?;
        let (loss, weight) = (found.sums.loss, found.sums.weight);
        scores.add(&Scores {
            sums: LaneSums { loss, weight },
            confusion: found.confusion,
        });
    }
    Ok(scores)
}

/// The tokens that follow a prompt, up to one of `ends`. `go_on` is asked after each: an error ends the work.
pub fn write(
    engine: &mut Engine,
    config: &SampleConfig,
    seed: u64,
    prompt: &Prompt,
    ends: &[u32],
    go_on: &mut dyn FnMut() -> Result<(), Stop>,
) -> Result<Vec<u32>, Stop> {
    let sampling = Sampling {
        max_tokens: prompt.most as usize,
        temperature: config.temperature as f32,
        top_k: config.top_k.map(|k| k as usize),
        top_p: None,
        seed,
    };
    let mut stopped = Ok(());
    let mut written = generate(engine, &prompt.tokens, &sampling, None, &mut |token| {
        stopped = go_on();
        stopped.is_ok() && !ends.contains(&token)
    })?;
    stopped?;
    if written.last().is_some_and(|last| ends.contains(last)) {
        written.pop();
    }
    Ok(written)
}

/// The seed of the draws after a prompt: other numbers at each step and for each prompt.
pub fn seed_of(run: u64, step: Step, prompt: u32) -> u64 {
    let key = derive_key(run, "samples");
    let words = philox(key, [step as u32, (step >> 32) as u32, prompt, 0]);
    u64::from(words[0]) << 32 | u64::from(words[1])
}

#[cfg(test)]
mod tests {
    use cohort_common::spec::{Architecture, ModelConfig};

    use super::*;
    use crate::engine::DeviceChoice;

    fn engine(threads: usize) -> Engine {
        let model = ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 40,
            context: 16,
            hidden_size: 32,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            intermediate_size: 64,
            tie_word_embeddings: true,
            bias: false,
            dropout: 0.0,
            norm_eps: 1e-5,
            head_dim: None,
            attention_bias: false,
            qk_norm: false,
            rope_theta: 10_000.0,
            rope_scaling: None,
            initializer_range: 0.2,
            labels: Vec::new(),
        };
        let mut engine = Engine::new(&model, None, DeviceChoice::Cpu, threads).expect("an engine");
        engine.init(3).expect("weights");
        engine
    }

    fn config(temperature: f64) -> SampleConfig {
        SampleConfig {
            prompts: vec!["a".into()],
            tokens: 24,
            temperature,
            top_k: None,
            every: 1,
        }
    }

    fn prompt() -> Prompt {
        Prompt {
            tokens: vec![1, 2, 3],
            most: 24,
        }
    }

    fn written(threads: usize, temperature: f64, seed: u64, ends: &[u32]) -> Vec<u32> {
        let (config, prompt) = (config(temperature), prompt());
        let mut engine = engine(threads);
        match write(&mut engine, &config, seed, &prompt, ends, &mut || Ok(())) {
            Ok(written) => written,
            Err(_) => panic!("it writes"),
        }
    }

    #[test]
    fn the_same_weights_and_seed_write_the_same_beyond_the_context() {
        let once = written(1, 1.0, seed_of(7, 10, 0), &[]);
        assert_eq!(once.len(), 24);
        assert_eq!(written(3, 1.0, seed_of(7, 10, 0), &[]), once);
        for (step, prompt) in [(11, 0), (10, 1), (10 + (1 << 32), 0)] {
            assert_ne!(written(1, 1.0, seed_of(7, step, prompt), &[]), once);
        }
        assert_eq!(written(1, 0.0, 1, &[]), written(1, 0.0, 2, &[]));
    }

    #[test]
    fn a_text_ends_where_the_model_ends_it() {
        let whole = written(1, 1.0, 5, &[]);
        let end = whole[6];
        let until = whole.iter().position(|t| *t == end).expect("it is there");
        assert_eq!(written(1, 1.0, 5, &[end]), whole[..until]);
        assert!(written(1, 1.0, 5, &[whole[0]]).is_empty());
    }

    #[test]
    fn nobody_waits_for_a_text_that_nobody_wants() {
        let mut asked = 0;
        let stopped = write(&mut engine(1), &config(1.0), 5, &prompt(), &[], &mut || {
            asked += 1;
            match asked {
                3 => Err(Stop::Cancelled),
                _ => Ok(()),
            }
        });
        assert!(matches!(stopped, Err(Stop::Cancelled)));
        assert_eq!(asked, 3);
    }
}
