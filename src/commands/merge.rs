//! `cohort merge`: a base and its adapters become one model in Hugging Face layout.
//!
//! Before anything is written, the merged model is compared with the base and its adapters on tokens drawn by a counter.
//! Both compute in f32 and differ in two ways: each merged weight is rounded once more, by at most 2^-24 of itself, and
//! products are summed in another order. Together that is some 1e-6 of the largest logit for small models, and grows with
//! the root of depth and width. The bound lies far above, and far below what a wrong factor, a transposed matrix or
//! adapters of another base do.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use cohort_common::checkpoint::{check_target, merge, write_model};
use cohort_common::rng::{derive_key, philox};
use cohort_common::spec::{ModelConfig, human_bytes};
use cohort_worker::engine::{DeviceChoice, Engine};

use crate::cli::MergeArgs;
use crate::context::Context;
use crate::failure::hinted;
use crate::references::{self, Found};

/// Sequences that are compared.
const ROWS: u32 = 3;

/// Tokens in each, at most.
const ROW: usize = 256;

/// Largest difference of two logits, as a part of the largest logit.
const BOUND: f32 = 1e-3;

/// Runs the verb.
pub async fn run(args: MergeArgs) -> Result<()> {
    check_target(&args.output)?;
    let context = Context::of(&args.connect)?;
    let found = references::find_with(&context, &args.from, args.adapter.as_deref()).await?;
    let threads = args.threads.unwrap_or(0);
    let target = args.output.clone();
    let merged = tokio::task::spawn_blocking(move || merged(&found, target, threads)).await??;
    println!("{} in {}:", merged.what, args.output.display());
    for file in merged.files {
        let bytes = file.metadata()?.len();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        println!("  {name:<24} {}", human_bytes(bytes));
    }
    println!("{}", merged.likeness);
    Ok(())
}

/// What was written, and how like it is.
struct Merged {
    what: String,
    files: Vec<PathBuf>,
    likeness: Likeness,
}

fn merged(found: &Found, target: PathBuf, threads: usize) -> Result<Merged> {
    let checkpoint = found.open()?;
    let (name, model) = (&found.name, checkpoint.model());
    let Some(lora) = checkpoint.lora() else {
        return Err(hinted(
            format!("{name} has no adapters, so there is nothing to merge"),
            "name a run that trained some (`cohort finetune --lora RANK`), or give them with `--adapter RUN|DIR`",
        ));
    };
    let loaded = checkpoint.weights()?;
    if let Some(missing) = loaded.missing.first() {
        return Err(anyhow!("{name} has no tensor `{missing}`"));
    }
    // One of the two models is in memory at a time.
    let apart = {
        let mut engine = Engine::adapted(model, Some(lora), None, DeviceChoice::Cpu, threads)?;
        engine.load(&loaded.params, None)?;
        logits(&mut engine)?
    };
    let params = merge(model, lora, &loaded);
    drop(loaded);
    let together = {
        let mut engine = Engine::new(model, None, DeviceChoice::Cpu, threads)?;
        engine.load(&params, None)?;
        logits(&mut engine)?
    };
    let likeness = Likeness::of(model, &together, &apart);
    if !likeness.holds() {
        return Err(anyhow!(
            "the merged model is not the same as {name}: {likeness}, and at most {BOUND} of the largest is accepted; \
             nothing was written"
        ));
    }
    Ok(Merged {
        what: format!("{name} with its adapters ({lora})"),
        files: write_model(&target, &checkpoint, &params)?,
        likeness,
    })
}

/// The logits of all rows.
fn logits(engine: &mut Engine) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for row in 0..ROWS {
        let tokens = tokens(engine.model(), row);
        all.extend(engine.logits(&tokens)?);
    }
    Ok(all)
}

/// The tokens of a row: as many as the context takes, each as likely.
fn tokens(model: &ModelConfig, row: u32) -> Vec<u32> {
    let key = derive_key(0, "merge");
    let token = |place: usize| {
        let word = philox(key, [place as u32, row, 0, 0])[0];
        ((u64::from(word) * model.vocab_size as u64) >> 32) as u32
    };
    (0..model.context.min(ROW)).map(token).collect()
}

/// How far the logits of two models are apart.
struct Likeness {
    rows: u32,
    tokens: usize,
    /// The largest difference; not a number where one of the logits is none.
    apart: f32,
    largest: f32,
}

impl Likeness {
    fn of(model: &ModelConfig, a: &[f32], b: &[f32]) -> Self {
        // What is not a number stays once it is there.
        let worse = |worst: f32, x: f32| match worst.is_nan() || x <= worst {
            true => worst,
            false => x,
        };
        let pairs = a.iter().zip(b);
        Self {
            rows: ROWS,
            tokens: model.context.min(ROW),
            apart: pairs.map(|(a, b)| (a - b).abs()).fold(0.0, worse),
            largest: b.iter().map(|b| b.abs()).fold(0.0, worse),
        }
    }

    fn holds(&self) -> bool {
        self.largest.is_finite() && self.apart <= BOUND * self.largest
    }
}

impl std::fmt::Display for Likeness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "over {} rows of {} random tokens the logits are at most {:.1e} apart, and the largest is {:.3}",
            self.rows, self.tokens, self.apart, self.largest
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_number_is_not_alike() {
        let model: ModelConfig = serde_json::from_value(serde_json::json!({
            "architecture": "llama", "vocab_size": 10, "context": 8, "hidden_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 4, "tie_word_embeddings": true,
            "bias": false, "dropout": 0.0, "norm_eps": 1e-5, "rope_theta": 1e4, "initializer_range": 0.02
        }))
        .expect("a model");
        let holds = |a: &[f32], b: &[f32]| Likeness::of(&model, a, b).holds();
        assert!(holds(&[1.0, -8.0], &[1.0, -8.001]));
        assert!(!holds(&[1.0, -8.0], &[1.01, -8.0]));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(!holds(&[bad, 1.0], &[1.0, 1.0]));
            assert!(!holds(&[1.0, 1.0], &[bad, 1.0]));
            assert!(!holds(&[bad, 1.0], &[bad, 1.0]));
        }
        assert!((0..ROWS).all(|row| tokens(&model, row).iter().all(|&token| token < 10)));
        assert_ne!(tokens(&model, 0), tokens(&model, 1));
    }
}
