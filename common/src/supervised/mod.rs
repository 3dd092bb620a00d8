//! Supervised finetuning, the text side: from a JSON line to a record, and from a record to spans of text of which some
//! are trained. **Pure.**
//!
//! In reading order: `records` (what a line says), `jinja` (templates as `transformers` renders them), `template` (a
//! chat template), `spans` (which part of a rendered conversation is trained), `tokenizer_config` (where checkpoints
//! keep their template). How spans become tokens and samples is the corpus's business.

mod jinja;
mod records;
mod spans;
mod template;
mod tokenizer_config;

pub use jinja::TODAY;
pub use records::{LABEL_FIELDS, Message, Record, RecordError, Role, TEXT_FIELDS};
pub use spans::{Span, pair_spans};
pub use template::{ChatTemplate, DEFAULT_TEMPLATE, TemplateError};
pub use tokenizer_config::{SpecialTexts, TokenizerConfigError, chat_template_of, special_texts};

#[cfg(test)]
mod tests;
