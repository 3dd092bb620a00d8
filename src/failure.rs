//! How a failure looks: `error:` with the message, `Caused by:` with the chain below it, `hint:` with a next step where
//! the message does not name one itself.

use std::fmt;
use std::process::ExitCode;

/// An error that knows what to do next.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// An error with a hint.
pub fn hinted(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Failure {
        message: message.into(),
        hint: hint.into(),
    })
}

/// Prints an error for a person.
pub fn report(error: &anyhow::Error) -> ExitCode {
    eprint!("{}", render(error));
    ExitCode::FAILURE
}

fn render(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}\n");
    let mut last = error.to_string();
    let mut causes = Vec::new();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // A library may have put its cause into its own message already.
        if !last.ends_with(&cause) {
            causes.push(cause.clone());
        }
        last = cause;
    }
    if !causes.is_empty() {
        text += "\nCaused by:\n";
        for cause in causes {
            text += &format!("  {}\n", cause.replace('\n', "\n  "));
        }
    }
    if let Some(failure) = error.downcast_ref::<Failure>() {
        text += &format!("\nhint: {}\n", failure.hint);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_printed_once_with_its_hint() {
        let error = hinted("the disk is full", "make room").context("cannot write `x`");
        assert_eq!(
            render(&error),
            "error: cannot write `x`\n\nCaused by:\n  the disk is full\n\nhint: make room\n"
        );
        let error = anyhow::anyhow!("no room").context("cannot write: no room");
        assert_eq!(render(&error), "error: cannot write: no room\n");
    }
}
