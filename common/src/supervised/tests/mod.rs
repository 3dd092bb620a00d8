//! Tests of the text side of supervised finetuning.

mod config;
mod golden;
mod jinja;
mod records;
mod spans;

use super::{Message, Role};

fn says(role: Role, content: &str) -> Message {
    Message {
        role,
        content: content.into(),
    }
}
