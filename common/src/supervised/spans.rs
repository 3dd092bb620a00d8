//! Which part of a rendered conversation is trained: what the assistant says, up to and including what ends its turn.
//! **Pure.**
//!
//! Templates do not mark it, so it is found by rendering: the conversation before a turn, as it asks for that turn, must
//! be the beginning of the conversation with it, and the rest of that is the turn.

use super::records::{Message, Role};
use super::template::{ChatTemplate, TemplateError};

/// A piece of text of which all is trained, or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The text; never empty.
    pub text: String,
    /// Whether its tokens count in the loss.
    pub trained: bool,
}

impl ChatTemplate {
    /// The whole conversation, cut into spans. Each turn of the assistant has one span that is trained; together the
    /// spans are what [`render`](Self::render) gives without a prompt for the next turn.
    ///
    /// # Errors
    /// A template that changes earlier text as turns are added, or changes what the assistant says.
    pub fn spans(&self, messages: &[Message]) -> Result<Vec<Span>, TemplateError> {
        let whole = self.render(messages, false)?;
        self.cut(messages, &whole)
    }

    /// What asks for the assistant's next turn, cut where training cuts it, so that earlier turns have the tokens that
    /// they had there. A text that training would refuse is one span.
    ///
    /// # Errors
    /// A template that does not take the conversation.
    pub fn prompt(&self, messages: &[Message]) -> Result<Vec<Span>, TemplateError> {
        let whole = self.render(messages, true)?;
        Ok(self.cut(messages, &whole).unwrap_or_else(|_| {
            let mut spans = Vec::new();
            push(&mut spans, &whole, false);
            spans
        }))
    }

    /// Cuts what the template makes of a conversation.
    fn cut(&self, messages: &[Message], whole: &str) -> Result<Vec<Span>, TemplateError> {
        let mut spans = Vec::new();
        let mut done = 0;
        for (index, message) in messages.iter().enumerate() {
            let role = message.role;
            if role != Role::Assistant {
                continue;
            }
            let before = self.render(&messages[..index], true)?;
            let with = self.render(&messages[..=index], false)?;
            let Some(turn) = with.strip_prefix(&before) else {
                return Err(TemplateError::NotAPrefix { index, role });
            };
            if !whole.starts_with(&with) {
                return Err(TemplateError::Rewritten { index, role });
            }
            let Some(length) = trained_length(turn, &message.content) else {
                return Err(TemplateError::ContentChanged { index, role });
            };
            let start = before.len();
            push(&mut spans, &whole[done..start], false);
            push(&mut spans, &whole[start..start + length], true);
            done = start + length;
        }
        push(&mut spans, &whole[done..], false);
        Ok(spans)
    }
}

/// Bytes of a turn that are trained; `None` if the content is not in it. Whitespace behind a mark that ends the turn is
/// not trained, as nobody asks the model for it; whitespace that is itself the end of the turn is.
fn trained_length(turn: &str, content: &str) -> Option<usize> {
    let content = content.trim();
    let end = turn.find(content)? + content.len();
    match turn[end..].trim().is_empty() {
        true => Some(turn.len()),
        false => Some(turn.trim_end().len()),
    }
}

fn push(spans: &mut Vec<Span>, text: &str, trained: bool) {
    if !text.is_empty() {
        spans.push(Span {
            text: text.to_owned(),
            trained,
        });
    }
}

/// A prompt, which is not trained, and its response with the text `eos`, which are. A newline parts them where the prompt
/// does not end in whitespace already.
pub fn pair_spans(prompt: &str, response: &str, eos: &str) -> Vec<Span> {
    let mut given = prompt.to_owned();
    if given
        .chars()
        .next_back()
        .is_some_and(|c| !c.is_whitespace())
    {
        given.push('\n');
    }
    let mut spans = Vec::new();
    push(&mut spans, &given, false);
    push(&mut spans, &format!("{response}{eos}"), true);
    spans
}
