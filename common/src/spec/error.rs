//! What can be wrong with a spec, said for a person: what, which value, which bound, where, and what to do next.

use std::fmt;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line (from 1) of a spec file or a preset.
    Line {
        /// The file, as the user named it, or `preset NAME`.
        file: String,
        /// Line, from 1.
        line: usize,
    },
    /// An override on the command line, as typed.
    Set(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line } => write!(f, "{file}, line {line}"),
            Self::Set(assignment) => write!(f, "--set {assignment}"),
        }
    }
}

/// Why a spec was refused. Nothing has been done when one of these is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The text is no TOML.
    #[error("{place}: {message}; the file must be TOML")]
    Syntax {
        /// Where the parser stopped.
        place: Place,
        /// What the parser says.
        message: String,
    },
    /// A key or a table that no spec has.
    #[error("unknown {what} ({place}); {hint}")]
    Unknown {
        /// The key with its table, or the table.
        what: String,
        /// Where it is written.
        place: Place,
        /// The nearest known key, or all keys of the table.
        hint: String,
    },
    /// A value of another type than its key takes.
    #[error("`{key}` must be {expected}, but it is {found} ({place})")]
    WrongType {
        /// The dotted key.
        key: String,
        /// What the key takes.
        expected: String,
        /// What was written.
        found: String,
        /// Where it is written.
        place: Place,
    },
    /// A `--set` that is no assignment.
    #[error("`--set {assignment}`: {problem}; write it as `--set train.steps=500`")]
    BadSet {
        /// As typed.
        assignment: String,
        /// What is missing.
        problem: String,
    },
    /// A value that no run can have.
    #[error("`{key}` is {value}, but {bound}; {next}")]
    Impossible {
        /// The dotted key.
        key: String,
        /// The value, as understood.
        value: String,
        /// The bound it breaks.
        bound: String,
        /// What to do next.
        next: String,
    },
    /// Something that the run cannot do without.
    #[error("`{key}` is missing: {why}; {next}")]
    Missing {
        /// The dotted key.
        key: String,
        /// Why it is needed.
        why: String,
        /// What to do next.
        next: String,
    },
    /// Something that a finetuning run takes from its checkpoint and may not change.
    #[error("`{key}` is {given}, but {base} has {inherited}; {next}")]
    Inherited {
        /// The dotted key.
        key: String,
        /// What the spec says.
        given: String,
        /// The checkpoint.
        base: String,
        /// What the checkpoint says.
        inherited: String,
        /// What to do next.
        next: String,
    },
    /// No preset of that name.
    #[error("there is no preset `{name}`; {hint}")]
    UnknownPreset {
        /// As typed.
        name: String,
        /// The nearest or all presets.
        hint: String,
    },
}

impl SpecError {
    pub(crate) fn impossible(
        key: &str,
        value: impl fmt::Display,
        bound: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self::Impossible {
            key: key.into(),
            value: value.to_string(),
            bound: bound.into(),
            next: next.into(),
        }
    }
}
