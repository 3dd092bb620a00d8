//! What a run writes while it trains: its prompts become tokens here, and what workers have written becomes text. The
//! model itself is the workers' business.

use cohort_common::api::SampleInfo;
use cohort_common::cluster::{EvalSplit, EvalWork, Prompt, SAMPLES_SPLIT};
use cohort_common::corpus::{Corpus, Objective, StreamDecoder, Tokenizer, TokenizerError};
use cohort_common::home::RunName;
use cohort_common::spec::{RunKind, RunSpec, SampleConfig};
use cohort_common::supervised::{ChatTemplate, Message, Role, SpecialTexts};
use tonic::Status;

use crate::status::{chain, failed, invalid};
use crate::store::SampleRow;

/// Tokens of a prompt before which nothing changes how what follows it is spelled.
const DECODED_BEFORE: usize = 64;

/// The prompts of a run, as tokens, and the way back to text.
pub struct Prompts {
    texts: Vec<String>,
    prompts: Vec<Prompt>,
    ends: Vec<u32>,
    every: u64,
    /// Whether the prompts are turns of a conversation.
    chat: bool,
    tokenizer: Tokenizer,
}

impl Prompts {
    /// Those of a run; `None` where it has none. `template` is the run's chat template.
    ///
    /// # Errors
    /// A prompt that the run's model cannot be asked.
    pub fn of(
        spec: &RunSpec,
        corpus: &Corpus,
        template: Option<&str>,
    ) -> Result<Option<Self>, Status> {
        let Some(config) = spec.samples.as_ref().filter(|_| spec.kind != RunKind::Eval) else {
            return Ok(None);
        };
        if spec.model.classifies() {
            return Err(invalid(config.refused_by_classifier()));
        }
        let tokenizer = corpus.tokenizer().map_err(failed)?;
        let supervised = corpus.index().supervised.as_ref();
        let chat = supervised.is_some_and(|s| s.objective == Objective::Sft);
        let template = match chat {
            true => Some(template_of(template, &tokenizer)?),
            false => None,
        };
        let mut ends = vec![corpus.index().tokenizer.eos];
        let end = template.as_ref().and_then(ChatTemplate::end_of_turn);
        ends.extend(end.and_then(|end| tokenizer.token_id(&end)));
        ends.dedup();
        let prompts = config.prompts.iter().enumerate().map(|(index, text)| {
            let tokens = tokens_of(text, &tokenizer, template.as_ref());
            let tokens = tokens.map_err(|problem| impossible(index, text, &problem))?;
            let context = spec.model.context;
            if tokens.len() >= context {
                let problem = format!(
                    "it takes {} tokens, and the model's context is {context}; take a shorter one",
                    tokens.len()
                );
                return Err(impossible(index, text, &problem));
            }
            Ok(Prompt {
                most: most(config, context - tokens.len(), chat),
                tokens,
            })
        });
        Ok(Some(Self {
            prompts: prompts.collect::<Result<_, _>>()?,
            texts: config.prompts.clone(),
            ends,
            every: config.every,
            chat,
            tokenizer,
        }))
    }

    /// What validations do with them.
    pub fn split(&self) -> EvalSplit {
        EvalSplit {
            label: SAMPLES_SPLIT.into(),
            units: self.prompts.len() as u32,
            every: self.every,
            work: EvalWork::Write {
                prompts: self.prompts.clone(),
                ends: self.ends.clone(),
            },
        }
    }

    /// What was written after each prompt, as text, with the prompt before it.
    ///
    /// # Errors
    /// Tokens that the tokenizer does not have.
    pub fn texts(&self, written: &[Vec<u32>]) -> Result<Vec<(String, String)>, TokenizerError> {
        let text = |((prompt, text), written): ((&Prompt, &String), &Vec<u32>)| {
            Ok((text.clone(), self.text(prompt, written)?))
        };
        let prompts = self.prompts.iter().zip(&self.texts);
        prompts.zip(written).map(text).collect()
    }

    fn text(&self, prompt: &Prompt, written: &[u32]) -> Result<String, TokenizerError> {
        // Decoded after the prompt: some tokenizers drop the space of a text's first token.
        // A decoder looks no further back than this.
        let before = prompt.tokens.len().saturating_sub(DECODED_BEFORE);
        let mut decoder = StreamDecoder::new();
        for &token in &prompt.tokens[before..] {
            decoder.push(&self.tokenizer, token)?;
        }
        let mut text = String::new();
        for &token in written {
            // Published models embed more tokens than they have.
            match token < self.tokenizer.vocab_size() {
                true => text += &decoder.push(&self.tokenizer, token)?,
                false => text.push(char::REPLACEMENT_CHARACTER),
            }
        }
        text += &decoder.finish(&self.tokenizer)?;
        Ok(match self.chat {
            // Templates put whitespace of their own around an answer.
            true => text.trim().to_owned(),
            false => text,
        })
    }
}

/// Tokens that are written at most. An answer ends with the context, beyond which the model would forget the question.
fn most(config: &SampleConfig, room: usize, chat: bool) -> u32 {
    match chat {
        true => (config.tokens as usize).min(room) as u32,
        false => config.tokens,
    }
}

fn template_of(source: Option<&str>, tokenizer: &Tokenizer) -> Result<ChatTemplate, Status> {
    let spelled = |id: u32| tokenizer.spelling(id);
    let specials = SpecialTexts {
        bos: tokenizer.bos().and_then(spelled),
        eos: spelled(tokenizer.eos()),
        ..SpecialTexts::default()
    };
    match source {
        Some(source) => {
            ChatTemplate::parse(source, &specials).map_err(|error| invalid(chain(&error)))
        }
        None => Ok(ChatTemplate::default_for(&specials)),
    }
}

/// The tokens that ask for what follows: as a text that goes on, or as a turn that is answered.
fn tokens_of(
    text: &str,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<Vec<u32>, String> {
    let Some(template) = template else {
        return tokenizer.prompt(text).map_err(|error| error.to_string());
    };
    let turn = Message {
        role: Role::User,
        content: text.to_owned(),
    };
    let spans = template
        .prompt(&[turn])
        .map_err(|error| error.to_string())?;
    let mut tokens = Vec::new();
    for span in spans {
        let encoded = tokenizer.encode_with_special(&span.text);
        tokens.extend(encoded.map_err(|error| error.to_string())?);
    }
    match tokens.is_empty() {
        true => Err("the chat template makes nothing of it".into()),
        false => Ok(tokens),
    }
}

fn impossible(index: usize, text: &str, problem: &str) -> Status {
    let start: String = text.chars().take(40).collect();
    invalid(format!(
        "prompt {} of `samples.prompts`, {start:?}, cannot be written after: {problem}",
        index + 1
    ))
}

/// What was written, as it is kept.
pub fn sample_row(sample: &SampleInfo) -> SampleRow {
    SampleRow {
        step: sample.step,
        prompt: sample.index,
        prompt_text: sample.prompt.clone(),
        text: sample.text.clone(),
    }
}

/// What was written, as clients see it.
pub fn sample_info(run: &RunName, row: SampleRow) -> SampleInfo {
    SampleInfo {
        run: run.to_string(),
        step: row.step,
        index: row.prompt,
        prompt: row.prompt_text,
        text: row.text,
    }
}
