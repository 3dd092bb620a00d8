//! `cohort eval`: scores a text with a model, in this process. (`eval_local` does it with several.)
//!
//! The tokens of all documents follow each other, each document with its end-of-text token, and are cut into windows of
//! the model's context, as in validation: each token but a document's first is scored once.

use std::path::Path;

use anyhow::{Result, anyhow, bail};
use cohort_common::checkpoint::Checkpoint;
use cohort_common::corpus::{
    BadInput, CorpusError, Event, ReadOptions, Tokenizer, expand, read_documents,
};
use cohort_worker::engine::{Batch, DeviceChoice, Engine, Sums};

use crate::cli::EvalArgs;
use crate::commands::generate::{engine_of, must_know_text, tokenizer_of};
use crate::commands::{eval_local, eval_samples};
use crate::context::Context;
use crate::follow::Bar;
use crate::output::Output;
use crate::references;

/// Windows that are scored at once.
const BATCH: usize = 8;

/// What a text scores.
#[derive(serde::Serialize)]
pub struct Score {
    event: &'static str,
    run: String,
    step: u64,
    split: &'static str,
    loss: f64,
    perplexity: f64,
    bits_per_byte: f64,
    tokens: u64,
    bytes: u64,
    documents: u64,
}

/// Text that was scored.
pub struct Scored {
    /// Σ weight · negative log-likelihood, in nats, and Σ weight.
    pub sums: Sums,
    /// Bytes of it.
    pub bytes: u64,
    /// Documents of it.
    pub documents: u64,
}

impl Score {
    /// The figures of a text under the model of this name.
    pub fn new(name: &str, text: &Scored) -> Result<Self> {
        let Sums { loss, weight } = text.sums;
        if weight == 0.0 {
            bail!("nothing was scored: the text has no token after the first of a document");
        }
        let mean = loss / weight;
        if !mean.is_finite() {
            return Err(anyhow!(
                "the loss is {mean}: the weights of {name} are damaged"
            ));
        }
        let (run, step) = match name.rsplit_once('@').map(|(run, step)| (run, step.parse())) {
            Some((run, Ok(step))) => (run, step),
            _ => (name, 0),
        };
        Ok(Self {
            event: "eval",
            run: run.to_owned(),
            step,
            split: "text",
            loss: mean,
            perplexity: mean.exp(),
            bits_per_byte: loss / std::f64::consts::LN_2 / text.bytes as f64,
            tokens: weight as u64,
            bytes: text.bytes,
            documents: text.documents,
        })
    }

    /// Prints it for people and for scripts.
    pub fn print(&self, name: &str, out: Output) -> Result<()> {
        out.line(self)?;
        out.say(format!(
            "{name}\n  loss           {:.4}\n  perplexity     {:.3}\n  bits per byte  {:.4}\n  scored         {} tokens of {} documents, {} bytes",
            self.loss, self.perplexity, self.bits_per_byte, self.tokens, self.documents, self.bytes
        ));
        Ok(())
    }
}

/// Runs the verb.
pub async fn run(args: EvalArgs) -> Result<()> {
    if args.text.is_empty() {
        return eval_samples::run(args).await;
    }
    if args.local.is_some() {
        return eval_local::run(args).await;
    }
    let device: DeviceChoice = args.device.parse()?;
    let sources = expand(&args.text, args.skip_bad)?;
    let mut skipped = sources.skipped.clone();
    let context = Context::of(&args.connect)?;
    let found = references::find_with(&context, &args.from, args.adapter.as_deref()).await?;
    let out = args.json.output();
    let (threads, skip_bad) = (args.threads.unwrap_or(0), args.skip_bad);
    let name = found.name.clone();
    let options = ReadOptions {
        text_field: args.text_field,
        max_file_bytes: None,
        supervised: None,
    };
    let (score, bad) = tokio::task::spawn_blocking(move || -> Result<_> {
        let checkpoint = found.open()?;
        must_know_text(&found, &checkpoint)?;
        let mut scorer = Scorer::new(&checkpoint, device, threads, skip_bad)?;
        let total = sources.files.iter().map(|f| size(&f.path)).sum();
        let bar = Bar::bytes("scoring", total);
        for file in &sources.files {
            let read = read_documents(file, &options, &|n| bar.advance(n), &mut |event| {
                scorer.hear(event)
            });
            match (read, scorer.failure.take()) {
                (_, Some(failure)) => return Err(failure),
                (Err(CorpusError::BadInput(bad)), None) if skip_bad => scorer.skip(bad),
                (read, None) => read?,
            }
        }
        bar.clear();
        scorer.finish(found.name)
    })
    .await??;
    skipped.extend(bad);
    for bad in skipped {
        out.say(format!("skipped: {bad}"));
    }
    score.print(&name, out)?;
    Ok(())
}

fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |m| m.len())
}

/// Scores documents as they come.
struct Scorer {
    engine: Engine,
    tokenizer: Tokenizer,
    context: usize,
    skip_bad: bool,
    /// The document that is being read.
    text: String,
    /// Tokens not yet scored as inputs, and whether each begins a document.
    waiting: Vec<(u32, bool)>,
    batch: Batch,
    sums: Sums,
    bytes: u64,
    documents: u64,
    skipped: Vec<BadInput>,
    /// What stopped the reading, if it was no bad input.
    failure: Option<anyhow::Error>,
}

impl Scorer {
    fn new(
        checkpoint: &Checkpoint,
        device: DeviceChoice,
        threads: usize,
        skip_bad: bool,
    ) -> Result<Self> {
        let context = checkpoint.model().context;
        Ok(Self {
            engine: engine_of(checkpoint, device, threads)?,
            tokenizer: tokenizer_of(checkpoint)?,
            context,
            skip_bad,
            text: String::new(),
            waiting: Vec::new(),
            batch: empty(context),
            sums: Sums::default(),
            bytes: 0,
            documents: 0,
            skipped: Vec::new(),
            failure: None,
        })
    }

    fn hear(&mut self, event: Event<'_>) -> Result<(), CorpusError> {
        match event {
            Event::Start(_) => self.text.clear(),
            Event::Text(text) => self.text += text,
            Event::End => {
                if let Err(failure) = self.document() {
                    self.failure = Some(failure);
                    return Err(CorpusError::Unknown(String::new()));
                }
            }
            Event::Bad(bad) if self.skip_bad => self.skipped.push(bad),
            Event::Bad(bad) => return Err(CorpusError::BadInput(bad)),
        }
        Ok(())
    }

    fn skip(&mut self, bad: BadInput) {
        self.skipped.push(bad);
    }

    fn document(&mut self) -> Result<()> {
        let text = std::mem::take(&mut self.text);
        let tokens = self.tokenizer.encode(&text)?;
        let ended = tokens.into_iter().chain([self.tokenizer.eos()]);
        self.waiting
            .extend(ended.enumerate().map(|(index, token)| (token, index == 0)));
        self.bytes += text.len() as u64;
        self.documents += 1;
        let mut used = 0;
        while self.waiting.len() - used > self.context {
            let window = used..used + self.context + 1;
            self.window(window)?;
            used += self.context;
        }
        self.waiting.drain(..used);
        Ok(())
    }

    fn window(&mut self, window: std::ops::Range<usize>) -> Result<()> {
        let length = window.len() - 1;
        if length != self.batch.length {
            self.score()?;
            self.batch = empty(length);
        }
        for pair in self.waiting[window].windows(2) {
            let [(input, _), (target, begins)] = pair else {
                continue;
            };
            self.batch.inputs.push(*input);
            self.batch.targets.push(*target);
            self.batch.weights.push(if *begins { 0.0 } else { 1.0 });
        }
        self.batch.samples += 1;
        if self.batch.samples == BATCH {
            self.score()?;
        }
        Ok(())
    }

    fn score(&mut self) -> Result<()> {
        if self.batch.samples > 0 {
            let length = self.batch.length;
            let batch = std::mem::replace(&mut self.batch, empty(length));
            let scores = self.engine.score(&batch)?;
            self.sums.loss += scores.sums.loss;
            self.sums.weight += scores.sums.weight;
        }
        Ok(())
    }

    fn finish(mut self, name: String) -> Result<(Score, Vec<BadInput>)> {
        if self.waiting.len() > 1 {
            self.window(0..self.waiting.len())?;
        }
        self.score()?;
        let scored = Scored {
            sums: self.sums,
            bytes: self.bytes,
            documents: self.documents,
        };
        let score = Score::new(&name, &scored)?;
        Ok((score, self.skipped))
    }
}

fn empty(length: usize) -> Batch {
    Batch {
        inputs: Vec::new(),
        targets: Vec::new(),
        weights: Vec::new(),
        starts: Vec::new(),
        samples: 0,
        length,
    }
}
