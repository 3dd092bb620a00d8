//! `cohort chat`: a conversation in the terminal, or in a pipe. Answers go to stdout as they come, everything else to
//! stderr.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context as _, Result, bail};
use cohort_common::checkpoint::Checkpoint;
use cohort_common::supervised::{ChatTemplate, Message, Role, SpecialTexts};
use cohort_worker::engine::{DeviceChoice, Sampling};

use crate::cli::ChatArgs;
use crate::commands::generate::{Writer, sampling_of};
use crate::context::Context;
use crate::references::{self, Found};

/// Old turns are forgotten so early that an answer may take this part of the context, if `--max-tokens` lets it.
const ANSWER_SHARE: usize = 4;

/// Runs the verb.
pub async fn run(args: ChatArgs) -> Result<()> {
    let device: DeviceChoice = args.device.parse()?;
    let context = Context::of(&args.connect)?;
    let found = references::find_with(&context, &args.from, args.adapter.as_deref()).await?;
    tokio::task::spawn_blocking(move || {
        let mut chat = Chat::open(&found, &args, device)?;
        chat.hold(std::io::stdin().lock())
    })
    .await?
}

/// A conversation with a model.
struct Chat {
    writer: Writer,
    template: ChatTemplate,
    context: usize,
    sampling: Sampling,
    /// What comes before the first turn.
    system: Vec<Message>,
    /// The turns that are remembered, a question first.
    turns: Vec<Message>,
    /// Answers so far, those before a reset included.
    answers: u64,
    /// Whether a person sits at the other end.
    terminal: bool,
}

impl Chat {
    fn open(found: &Found, args: &ChatArgs, device: DeviceChoice) -> Result<Self> {
        let checkpoint = found.open()?;
        let source = checkpoint.chat_template()?;
        let mut writer = Writer::of(found, &checkpoint, device, args.threads.unwrap_or(0))?;
        let specials = special_texts(&checkpoint, &writer)?;
        let template = match &source {
            Some(source) => ChatTemplate::parse(source, &specials)
                .with_context(|| format!("{} cannot be talked with", found.name))?,
            None => {
                eprintln!(
                    "{} has no chat template; turns are written as lines `User:` and `Assistant:`, which a model \
                     that was not finetuned so may not understand",
                    found.name
                );
                ChatTemplate::default_for(&specials)
            }
        };
        // A checkpoint may call another token the end of a text than the one that ends a turn.
        let end = template.end_of_turn();
        if let Some(end) = end.and_then(|end| writer.tokenizer().token_id(&end)) {
            writer.ends_with(end);
        }
        let system = args.system.iter().map(|text| says(Role::System, text));
        Ok(Self {
            writer,
            template,
            context: checkpoint.model().context,
            sampling: sampling_of(&args.sampling),
            system: system.collect(),
            turns: Vec::new(),
            answers: 0,
            terminal: std::io::stdin().is_terminal(),
        })
    }

    /// Answers line after line until the end. What a person could say otherwise is said again; in a pipe it is an error.
    fn hold(&mut self, lines: impl BufRead) -> Result<()> {
        self.ask_for_a_line();
        for line in lines.lines() {
            let line = line.context("cannot read from stdin")?;
            match line.trim() {
                "" => {}
                "/exit" => break,
                "/reset" => {
                    self.turns.clear();
                    eprintln!("(a new conversation)");
                }
                said => match self.answer(said) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) if self.terminal => eprintln!("error: {error:#}"),
                    Err(error) => return Err(error),
                },
            }
            self.ask_for_a_line();
        }
        Ok(())
    }

    fn ask_for_a_line(&self) {
        if self.terminal {
            eprint!("> ");
        }
    }

    /// Answers one turn; tells whether anybody still reads the answers. After an error the conversation is what it was.
    fn answer(&mut self, said: &str) -> Result<bool> {
        let remembered = self.turns.clone();
        self.turns.push(says(Role::User, said));
        let answered = self.prompt().and_then(|prompt| self.write(&prompt));
        if answered.is_err() {
            self.turns = remembered;
        }
        answered
    }

    /// The tokens that ask for the next answer. Forgets the oldest turns until they leave room for one.
    fn prompt(&mut self) -> Result<Vec<u32>> {
        let room = self.sampling.max_tokens.min(self.context / ANSWER_SHARE);
        let most = self.context - room.max(1);
        let mut forgotten = 0;
        let tokens = loop {
            let tokens = self.tokens()?;
            if tokens.len() <= most {
                break tokens;
            }
            // A question goes with its answer, as templates want speakers to take turns.
            let is_question = |turn: &Message| turn.role == Role::User;
            match self.turns.iter().skip(1).position(is_question) {
                Some(next) => forgotten += self.turns.drain(..next + 1).count(),
                None => bail!(
                    "this turn and what comes before every answer take {} tokens, but of the model's context of {} \
                     they may take {most}; say it in fewer words",
                    tokens.len(),
                    self.context
                ),
            }
        };
        if forgotten > 0 {
            eprintln!(
                "(the conversation is longer than the context of {} tokens: its oldest {forgotten} turns are forgotten)",
                self.context
            );
        }
        Ok(tokens)
    }

    fn tokens(&self) -> Result<Vec<u32>> {
        let messages = [self.system.as_slice(), &self.turns].concat();
        let mut tokens = Vec::new();
        for span in self.template.prompt(&messages)? {
            let encoded = self.writer.tokenizer().encode_with_special(&span.text);
            tokens.extend(encoded.context("the conversation cannot be tokenized")?);
        }
        Ok(tokens)
    }

    fn write(&mut self, prompt: &[u32]) -> Result<bool> {
        let sampling = Sampling {
            // Beyond the context the model would forget what it is answering.
            max_tokens: self.sampling.max_tokens.min(self.context - prompt.len()),
            seed: self.sampling.seed.wrapping_add(self.answers),
            ..self.sampling
        };
        let mut stdout = std::io::stdout().lock();
        let (mut answer, mut read) = (String::new(), true);
        let ended = self.writer.extend(prompt, &sampling, &mut |text| {
            // Templates put whitespace of their own before an answer.
            let text = match answer.is_empty() {
                true => text.trim_start(),
                false => text,
            };
            answer += text;
            let written = write!(stdout, "{text}").and_then(|()| stdout.flush());
            read = written.is_ok();
            read
        })?;
        read &= writeln!(stdout).and_then(|()| stdout.flush()).is_ok();
        if read && !ended {
            eprintln!("(cut after {} tokens)", sampling.max_tokens);
        }
        self.answers += 1;
        self.turns.push(says(Role::Assistant, answer.trim_end()));
        Ok(read)
    }
}

fn says(role: Role, content: &str) -> Message {
    Message {
        role,
        content: content.to_owned(),
    }
}

/// The texts that the template may use: those that the checkpoint names, else those of the tokenizer.
fn special_texts(checkpoint: &Checkpoint, writer: &Writer) -> Result<SpecialTexts> {
    let tokenizer = writer.tokenizer();
    let named = checkpoint.special_texts()?;
    Ok(SpecialTexts {
        bos: named.bos.or_else(|| tokenizer.spelling(tokenizer.bos()?)),
        eos: named.eos.or_else(|| tokenizer.spelling(tokenizer.eos())),
        ..named
    })
}
