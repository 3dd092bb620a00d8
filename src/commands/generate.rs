//! `cohort generate`: continues a prompt. Only the text goes to stdout, as it comes.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context as _, Result, bail};
use cohort_common::checkpoint::Checkpoint;
use cohort_common::corpus::{StreamDecoder, Tokenizer};
use cohort_worker::engine::{DeviceChoice, Engine, Sampling, generate};

use crate::cli::{GenerateArgs, SamplingArgs};
use crate::context::Context;
use crate::failure::hinted;
use crate::references::{self, Found};

/// Runs the verb.
pub async fn run(args: GenerateArgs) -> Result<()> {
    let device: DeviceChoice = args.device.parse()?;
    let context = Context::of(&args.connect)?;
    let found = references::find_with(&context, &args.from, args.adapter.as_deref()).await?;
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None => stdin_prompt()?,
    };
    let sampling = sampling_of(&args.sampling);
    let threads = args.threads.unwrap_or(0);
    tokio::task::spawn_blocking(move || {
        let mut writer = Writer::of(&found, &found.open()?, device, threads)?;
        let mut stdout = std::io::stdout().lock();
        writer.write(&prompt, &sampling, &mut |text| {
            // A reader that has gone away ends the text.
            write!(stdout, "{text}")
                .and_then(|()| stdout.flush())
                .is_ok()
        })?;
        let _ = writeln!(stdout);
        Ok(())
    })
    .await?
}

/// What was typed, as the engine takes it.
pub fn sampling_of(args: &SamplingArgs) -> Sampling {
    Sampling {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    }
}

fn stdin_prompt() -> Result<String> {
    let mut stdin = std::io::stdin();
    let mut prompt = String::new();
    if !stdin.is_terminal() {
        stdin
            .read_to_string(&mut prompt)
            .context("cannot read the prompt from stdin")?;
    }
    // The newline with which a shell's `echo` ends belongs to nobody's prompt.
    Ok(prompt
        .strip_suffix('\n')
        .map(str::to_owned)
        .unwrap_or(prompt))
}

/// A model that writes.
pub struct Writer {
    engine: Engine,
    tokenizer: Tokenizer,
    ends: Vec<u32>,
}

impl Writer {
    /// Loads what was found, which is open.
    pub fn of(
        found: &Found,
        checkpoint: &Checkpoint,
        device: DeviceChoice,
        threads: usize,
    ) -> Result<Self> {
        must_know_text(found, checkpoint)?;
        let ends = checkpoint.tokens().eos.clone();
        let tokenizer = tokenizer_of(checkpoint)?;
        Ok(Self {
            engine: engine_of(checkpoint, device, threads)?,
            ends: if ends.is_empty() {
                vec![tokenizer.eos()]
            } else {
                ends
            },
            tokenizer,
        })
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Takes one more token for an end of the text.
    pub fn ends_with(&mut self, token: u32) {
        if !self.ends.contains(&token) {
            self.ends.push(token);
        }
    }

    /// Writes the prompt and its continuation to `out`, which says whether to go on.
    pub fn write(
        &mut self,
        prompt: &str,
        sampling: &Sampling,
        out: &mut dyn FnMut(&str) -> bool,
    ) -> Result<()> {
        let tokens = self
            .tokenizer
            .prompt(prompt)
            .context("the prompt cannot be tokenized")?;
        if !out(prompt) {
            return Ok(());
        }
        self.extend(&tokens, sampling, out)?;
        Ok(())
    }

    /// Writes what follows `tokens` to `out`, which says whether to go on. Tells whether the model ended the text
    /// itself.
    pub fn extend(
        &mut self,
        tokens: &[u32],
        sampling: &Sampling,
        out: &mut dyn FnMut(&str) -> bool,
    ) -> Result<bool> {
        let (tokenizer, ends) = (&self.tokenizer, &self.ends);
        // What follows is decoded after the prompt: some tokenizers drop the space of a text's first token.
        let mut decoder = StreamDecoder::new();
        for &token in tokens {
            decoder.push(tokenizer, token)?;
        }
        let mut failure = None;
        let mut ended = false;
        generate(&mut self.engine, tokens, sampling, None, &mut |token| {
            if ends.contains(&token) {
                ended = true;
                return false;
            }
            match decoder.push(tokenizer, token) {
                Ok(text) => text.is_empty() || out(&text),
                Err(error) => {
                    failure = Some(error);
                    false
                }
            }
        })?;
        if let Some(error) = failure {
            return Err(error.into());
        }
        out(&decoder.finish(tokenizer)?);
        Ok(ended)
    }
}

/// The tokenizer of a checkpoint.
pub fn tokenizer_of(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let json = checkpoint.tokenizer()?;
    let tokenizer = match checkpoint.tokens().eos.first() {
        Some(&eos) => Tokenizer::from_json_with_eos_id(&json, eos),
        None => Tokenizer::from_json(&json, None),
    };
    tokenizer.with_context(|| {
        format!(
            "the tokenizer in `{}` cannot be used",
            checkpoint.dir().display()
        )
    })
}

/// A classifier has a head for labels in the place of one for text.
pub fn must_know_text(found: &Found, checkpoint: &Checkpoint) -> Result<()> {
    let labels = &checkpoint.model().labels;
    match labels.is_empty() {
        true => Ok(()),
        false => Err(hinted(
            format!(
                "{} is a classifier of {} labels ({}); it neither writes nor scores text",
                found.name,
                labels.len(),
                labels.join(", ")
            ),
            "name a language model; `cohort eval --classify FILE` scores a classifier, and `cohort export` writes one for \
             `transformers`",
        )),
    }
}

/// An engine with the weights of a checkpoint.
pub fn engine_of(checkpoint: &Checkpoint, device: DeviceChoice, threads: usize) -> Result<Engine> {
    let weights = checkpoint.weights()?;
    if let Some(missing) = weights.missing.first() {
        bail!("`{}` has no tensor `{missing}`", checkpoint.dir().display());
    }
    let lora = checkpoint.lora();
    let mut engine = Engine::adapted(checkpoint.model(), lora, None, device, threads)?;
    engine.load(&weights.params, None)?;
    Ok(engine)
}
