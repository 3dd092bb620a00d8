//! `cohort eval --sft` and `--classify`: scores samples as a validation does: what is learned in training, and how well a
//! classifier tells its labels apart.

use anyhow::{Context as _, Result, bail};
use cohort_common::api::Classes;
use cohort_common::corpus::{
    BadInput, CorpusError, Event, Objective, Packer, ReadOptions, Row, Sampler, Sources,
    SupervisedConfig, expand, read_documents,
};
use cohort_worker::engine::{Batch, DeviceChoice, Engine, Scores};

use crate::cli::EvalArgs;
use crate::commands::generate::{engine_of, tokenizer_of};
use crate::context::Context;
use crate::facts;
use crate::output::Output;
use crate::references::{self, Found};

/// Longest sequence that samples are packed into.
const ROW: usize = 1024;

/// Rows that are scored at once.
const BATCH: usize = 4;

/// What samples score.
#[derive(serde::Serialize)]
struct Score {
    event: &'static str,
    from: String,
    /// Mean over the learned tokens, or over the classified samples, in nats.
    loss: f64,
    /// What the loss is averaged over.
    scored: u64,
    samples: u64,
    /// Lines that were left out.
    skipped: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    classes: Option<Classes>,
}

/// Runs the verb.
pub async fn run(args: EvalArgs) -> Result<()> {
    let device: DeviceChoice = args.device.parse()?;
    let context = Context::of(&args.connect)?;
    let found = references::find_with(&context, &args.from, args.adapter.as_deref()).await?;
    let (objective, paths) = match args.classify.is_empty() {
        true => (Objective::Sft, &args.sft),
        false => (Objective::Classify, &args.classify),
    };
    let sources = expand(paths, args.skip_bad)?;
    let out = args.json.output();
    let (threads, skip_bad) = (args.threads.unwrap_or(0), args.skip_bad);
    let scored = tokio::task::spawn_blocking(move || {
        score(
            &found,
            objective,
            &sources,
            (device, threads),
            (skip_bad, out),
        )
    });
    let score = scored.await??;
    out.line(&score)?;
    let what = match objective {
        Objective::Sft => "learned tokens",
        Objective::Classify => "samples",
    };
    out.say(format!(
        "{}\n  loss           {:.4}\n  perplexity     {:.3}\n  scored         {} {what} of {} samples",
        score.from,
        score.loss,
        score.loss.exp(),
        score.scored,
        score.samples
    ));
    if let Some(classes) = &score.classes {
        out.say(format!(
            "  accuracy       {:.2} %\n  macro-F1       {:.4}\n\n{}",
            100.0 * classes.accuracy,
            classes.macro_f1,
            facts::confusion(classes)
        ));
    }
    Ok(())
}

fn score(
    found: &Found,
    objective: Objective,
    sources: &Sources,
    (device, threads): (DeviceChoice, usize),
    (skip_bad, out): (bool, Output),
) -> Result<Score> {
    let checkpoint = found.open()?;
    let model = checkpoint.model();
    match (objective, model.classifies()) {
        (Objective::Sft, true) => bail!("{} is a classifier; pass `--classify`", found.name),
        (Objective::Classify, false) => bail!(
            "{} is a language model and has no labels; `cohort finetune --classify` gives it some",
            found.name
        ),
        _ => {}
    }
    let tokenizer = tokenizer_of(&checkpoint)?;
    let row = model.context.min(ROW);
    let config = SupervisedConfig {
        template: checkpoint.chat_template()?,
        labels: model.labels.clone(),
        ..SupervisedConfig::new(objective, row)
    };
    let mut scorer = Scorer {
        engine: engine_of(&checkpoint, device, threads)?,
        objective,
        rows: Vec::new(),
        scores: Scores::default(),
    };
    let sampler = Sampler::new(&config, &tokenizer)?;
    let mut packer = Packer::new(row, true, tokenizer.eos());
    let (mut samples, mut skipped) = (0, 0);
    for file in &sources.files {
        let options = ReadOptions {
            text_field: String::new(),
            max_file_bytes: None,
            supervised: Some(config.clone()),
        };
        let mut place = None;
        let mut failure = None;
        let read = read_documents(file, &options, &|_| {}, &mut |event| {
            let bad = match event {
                Event::Start(at) => {
                    place = at;
                    None
                }
                Event::Text(text) => match sampler.encode(text, &config.labels) {
                    Ok(Some(encoded)) => {
                        samples += 1;
                        let full = packer.push(encoded.sample);
                        failure = full.and_then(|row| scorer.take(row).err());
                        None
                    }
                    Ok(None) => None,
                    Err(problem) => Some(BadInput {
                        file: file.name.clone(),
                        place,
                        problem,
                    }),
                },
                Event::End => None,
                Event::Bad(bad) => Some(bad),
            };
            match (bad, &failure) {
                (Some(bad), _) if skip_bad => {
                    skipped += 1;
                    out.say(format!("skipped: {bad}"));
                    Ok(())
                }
                (Some(bad), _) => Err(CorpusError::BadInput(bad)),
                (None, Some(_)) => Err(CorpusError::Unknown(String::new())),
                (None, None) => Ok(()),
            }
        });
        if let Some(failure) = failure {
            return Err(failure);
        }
        read?;
    }
    for row in packer.finish() {
        scorer.take(row)?;
    }
    scorer.flush()?;
    let Scores { sums, confusion } = scorer.scores;
    if sums.weight == 0.0 {
        bail!("nothing was scored: no line could be used");
    }
    Ok(Score {
        event: "eval",
        from: found.name.clone(),
        loss: sums.loss / sums.weight,
        scored: sums.weight as u64,
        samples,
        skipped,
        classes: Classes::of(&model.labels, &confusion),
    })
}

/// Scores rows, a few at a time.
struct Scorer {
    engine: Engine,
    objective: Objective,
    rows: Vec<Row>,
    scores: Scores,
}

impl Scorer {
    fn take(&mut self, row: Row) -> Result<()> {
        self.rows.push(row);
        match self.rows.len() == BATCH {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<()> {
        let mut batch = Batch::default();
        for row in self.rows.drain(..) {
            batch.length = row.tokens.len();
            let window = row.window(self.objective);
            batch.inputs.extend(window.inputs);
            batch.targets.extend(window.targets);
            batch.weights.extend(window.weights);
            batch.starts.extend(window.starts);
            batch.samples += 1;
        }
        if batch.samples == 0 {
            return Ok(());
        }
        let found = self
            .engine
            .score(&batch)
            .context("a row cannot be scored")?;
        self.scores.sums.loss += found.sums.loss;
        self.scores.sums.weight += found.sums.weight;
        self.scores.confusion.resize(found.confusion.len(), 0);
        let counts = self.scores.confusion.iter_mut().zip(found.confusion);
        counts.for_each(|(sum, count)| *sum += count);
        Ok(())
    }
}
