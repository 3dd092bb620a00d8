//! A chat template: Jinja that makes one text of a conversation, as checkpoints of the Hugging Face kind carry it.
//! **Pure.**

use minijinja::{Environment, Error, Value, context};

use super::jinja::{self, Raised};
use super::records::{Message, Role};
use super::tokenizer_config::SpecialTexts;

/// The template of models that bring none. It needs no token but the one that ends texts, so any base model can learn
/// it: each turn is a line with the speaker's name and the content below; the assistant's content ends with that token.
pub const DEFAULT_TEMPLATE: &str = include_str!("default.jinja");

/// The template's name in its environment.
const NAME: &str = "chat";

/// Why a template cannot be used, or not for this conversation.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Not Jinja, or Jinja that is not understood.
    #[error("the chat template does not parse: {reason}{}", at(*line))]
    Syntax {
        /// The line, counted from 1.
        line: Option<usize>,
        /// What the parser says.
        reason: String,
    },
    /// The template itself says that it does not take such a conversation.
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template cannot be evaluated.
    #[error("the chat template cannot render the conversation: {reason}{}", at(*line))]
    Render {
        /// The line, counted from 1.
        line: Option<usize>,
        /// What went wrong.
        reason: String,
    },
    /// With the answer in place, what comes before it is another text than the one that asks for it.
    #[error(
        "the chat template renders what comes before {turn} differently once that turn is there, so what the model \
         will have seen before it is not known; take another template, or leave such conversations out",
        turn = turn(*index, *role)
    )]
    NotAPrefix {
        /// The number of the turn, counted from 0.
        index: usize,
        /// Who speaks in it.
        role: Role,
    },
    /// Later turns change how an earlier one is rendered.
    #[error(
        "the chat template renders {turn} differently once more turns follow (some templates take reasoning out of \
         earlier turns); take another template, or end the conversation there",
        turn = turn(*index, *role)
    )]
    Rewritten {
        /// The number of the turn, counted from 0.
        index: usize,
        /// Who speaks in it.
        role: Role,
    },
    /// What the assistant says is not in the rendered text.
    #[error(
        "the chat template does not render the content of {turn} as it is, so that turn cannot be trained; take \
         another template, or leave such conversations out",
        turn = turn(*index, *role)
    )]
    ContentChanged {
        /// The number of the turn, counted from 0.
        index: usize,
        /// Who speaks in it.
        role: Role,
    },
}

fn at(line: Option<usize>) -> String {
    line.map(|line| format!(" (line {line} of the template)"))
        .unwrap_or_default()
}

fn turn(index: usize, role: Role) -> String {
    format!("turn {} ({role})", index + 1)
}

/// A template that is ready to render.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    specials: SpecialTexts,
}

impl ChatTemplate {
    /// Takes the text of a template. `specials` are the texts that it knows as `bos_token`, `eos_token` and so on.
    pub fn parse(source: &str, specials: &SpecialTexts) -> Result<Self, TemplateError> {
        let environment =
            jinja::environment(NAME, source).map_err(|error| TemplateError::Syntax {
                line: error.line(),
                reason: said(&error),
            })?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            specials: specials.clone(),
        })
    }

    /// Our own template, for a model whose texts end with `specials.eos`.
    pub fn default_for(specials: &SpecialTexts) -> Self {
        Self::parse(DEFAULT_TEMPLATE, specials).expect("our own template parses")
    }

    /// The template's text, as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as one text; with `add_generation_prompt`, up to where the assistant's next turn begins.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| context! { role => m.role.name(), content => m.content.as_str() })
            .collect();
        let specials = self.specials.variables();
        let specials = specials.map(|(name, text)| (name, Value::from(text)));
        let variables = context! {
            messages,
            add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from_pairs(specials)
        };
        let template = self.environment.get_template(NAME);
        let template = template.expect("the environment was made with it");
        template.render(variables).map_err(|error| why(&error))
    }

    /// What ends a turn of the assistant, such as `<|im_end|>`; `None` if it is only whitespace, or cannot be told.
    pub fn end_of_turn(&self) -> Option<String> {
        const QUESTION: &str = "a question";
        const ANSWER: &str = "an answer";
        let said = |role, content: &str| Message {
            role,
            content: content.into(),
        };
        let turns = [said(Role::User, QUESTION), said(Role::Assistant, ANSWER)];
        let text = self.render(&turns, false).ok()?;
        let (_, end) = text.rsplit_once(ANSWER)?;
        Some(end.trim().to_owned()).filter(|end| !end.is_empty())
    }
}

/// An error of rendering, told apart by who raised it.
fn why(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        cause = error.source();
    }
    TemplateError::Render {
        line: error.line(),
        reason: said(error),
    }
}

/// What an error says, without the place, which is told apart from it.
fn said(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
