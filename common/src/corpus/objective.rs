//! What is learned from a corpus that is not just text: responses to prompts, or labels. **Pure.**

use serde::{Deserialize, Serialize};

use crate::supervised::{Record, RecordError};

/// What is learned from the lines of a supervised corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// What the assistant says, or the response to a prompt.
    Sft,
    /// The label of a text.
    Classify,
}

/// What becomes of a sample that is longer than a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// The preparation fails and names it.
    #[default]
    Error,
    /// It is left out and counted.
    Drop,
    /// It is cut and counted: a conversation at its end, a text that is classified at its end.
    Truncate,
}

/// How a supervised corpus is read and cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisedConfig {
    /// What is learned.
    pub objective: Objective,
    /// Tokens of a row: the longest sample, and what several short ones are packed into.
    pub row: usize,
    /// Whether several samples share a row.
    pub packing: bool,
    /// What becomes of samples that are longer.
    pub too_long: TooLong,
    /// The chat template of `messages`; `None` is our own.
    pub template: Option<String>,
    /// The labels that may occur, in order; empty takes those that do occur, sorted.
    pub labels: Vec<String>,
    /// The field of the text that is classified; `None` looks for the usual names.
    pub text_field: Option<String>,
    /// The field of the label; `None` looks for the usual names.
    pub label_field: Option<String>,
}

impl SupervisedConfig {
    /// With the default options.
    pub fn new(objective: Objective, row: usize) -> Self {
        Self {
            objective,
            row,
            packing: true,
            too_long: TooLong::Error,
            template: None,
            labels: Vec::new(),
            text_field: None,
            label_field: None,
        }
    }

    /// What one line says.
    ///
    /// # Errors
    /// A line of another shape, or one with nothing to learn.
    pub fn record(&self, line: &str) -> Result<Record, RecordError> {
        match self.objective {
            Objective::Sft => Record::supervised(line),
            Objective::Classify => Record::labelled(
                line,
                self.text_field.as_deref(),
                self.label_field.as_deref(),
            ),
        }
    }
}

/// What a record says, in order.
pub(super) fn texts_of(record: &Record) -> Box<dyn Iterator<Item = &str> + '_> {
    match record {
        Record::Conversation(messages) => Box::new(messages.iter().map(|m| m.content.as_str())),
        Record::Pair { prompt, response } => {
            Box::new([prompt.as_str(), response.as_str()].into_iter())
        }
        Record::Labelled { text, .. } => Box::new([text.as_str()].into_iter()),
    }
}
