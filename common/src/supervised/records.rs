//! One line of a JSONL file as people have them: a conversation, a pair of prompt and response, or a labelled text.
//! **Pure.**
//!
//! The shape is told by the keys. What would change what is said or trained, and is not understood, is refused by name;
//! other keys (`id`, `source`, …) are ignored.

use serde_json::{Map, Value};

/// Fields that are taken for the text of a labelled line.
pub const TEXT_FIELDS: &[&str] = &["text", "sentence", "message", "content"];

/// Fields that are taken for the label of a labelled line.
pub const LABEL_FIELDS: &[&str] = &["label", "labels", "category", "class"];

/// Keys of a list of messages.
const CHAT_KEYS: &[&str] = &["messages", "conversations"];

/// Keys of a prompt and of its response. An `instruction` may have an `input` beside it.
const PROMPT_KEYS: &[&str] = &["prompt", "instruction"];
const RESPONSE_KEYS: &[&str] = &["response", "completion", "output"];

/// Fields of a message that change what is said, and are not understood.
const REFUSED_FIELDS: &[&str] = &[
    "tool_calls",
    "function_call",
    "reasoning_content",
    "thinking",
];

/// What one line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Turns of a conversation; the assistant has at least one.
    Conversation(Vec<Message>),
    /// A prompt and what should follow it.
    Pair {
        /// What is given; may be empty.
        prompt: String,
        /// What is learned; not blank.
        response: String,
    },
    /// A text and its class.
    Labelled {
        /// The text; not blank.
        text: String,
        /// The label as text: `true`, `3`, `spam`.
        label: String,
    },
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// Who speaks in a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Whoever sets the rules.
    System,
    /// Whoever asks.
    User,
    /// The model: the only one whose turns are trained.
    Assistant,
    /// What a tool gave back.
    Tool,
}

impl Role {
    /// The name that templates know.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    /// Understands `user` and `assistant` as well as ShareGPT's `human` and `gpt`.
    fn parse(name: &str) -> Option<Self> {
        match name {
            "system" => Some(Self::System),
            "user" | "human" => Some(Self::User),
            "assistant" | "gpt" => Some(Self::Assistant),
            "tool" => Some(Self::Tool),
            _ => None,
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What is wrong with a line; completes a sentence that starts with the line's place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not JSON.
    #[error("is not valid JSON: {0}")]
    Json(String),
    /// JSON, but no object.
    #[error("is {0}, not a JSON object")]
    NotAnObject(&'static str),
    /// An object of no known shape.
    #[error(
        "has the keys {present}; a line needs `messages` or `conversations` (a list of turns), or \
         `prompt` or `instruction` (perhaps with `input`) and with it `response`, `completion` or `output`"
    )]
    UnknownShape {
        /// The keys that are there.
        present: String,
    },
    /// An object of two shapes.
    #[error(
        "has both `{first}` and `{second}`, so it is not clear which one is meant; leave one out"
    )]
    Ambiguous {
        /// One key.
        first: String,
        /// Another key of the same meaning.
        second: String,
    },
    /// No field for the text or the label.
    #[error("has no `{wanted}`; its keys are {present}")]
    NoField {
        /// The fields that were looked for.
        wanted: String,
        /// The keys that are there.
        present: String,
    },
    /// A value of the wrong type.
    #[error("has {found} as `{key}`, where {expected} belongs")]
    WrongType {
        /// The key, as a path.
        key: String,
        /// What is there.
        found: &'static str,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A text that must say something says nothing.
    #[error("has a blank `{key}`, so there is nothing to learn from it")]
    Blank {
        /// The key, as a path.
        key: String,
    },
    /// A conversation without a turn that could be trained.
    #[error("has no turn of `assistant` or `gpt` in `{key}`, so there is nothing to learn from it")]
    NoAssistant {
        /// The key of the list.
        key: &'static str,
    },
    /// A speaker that is not known.
    #[error(
        "has `{found}` as `{key}`; a turn is one of system, user (or human), assistant (or gpt), tool"
    )]
    UnknownRole {
        /// The key, as a path.
        key: String,
        /// The role that is there.
        found: String,
    },
    /// Something that would change what is trained, and that is not understood.
    #[error("has `{key}`, which is not supported; {advice}")]
    Unsupported {
        /// The key, as a path.
        key: String,
        /// What to do instead.
        advice: &'static str,
    },
}

impl Record {
    /// Reads a conversation or a pair.
    ///
    /// # Errors
    /// Anything that is not exactly one of the shapes, or has nothing to train in it.
    pub fn supervised(line: &str) -> Result<Self, RecordError> {
        let fields = object(line)?;
        let chat = only_one(&fields, CHAT_KEYS)?;
        let prompt = only_one(&fields, PROMPT_KEYS);
        let response = only_one(&fields, RESPONSE_KEYS);
        match (chat, prompt, response) {
            // A prompt alone beside messages repeats their beginning in many collections.
            (Some(key), _, Ok(None)) => conversation(&fields, key),
            (Some(first), _, Ok(Some(second))) => Err(RecordError::Ambiguous {
                first: first.into(),
                second: second.into(),
            }),
            (_, Ok(Some(prompt)), Ok(Some(response))) => pair(&fields, prompt, response),
            (_, Err(error), _) | (_, _, Err(error)) => Err(error),
            (None, Ok(_), Ok(_)) => Err(RecordError::UnknownShape {
                present: keys_of(&fields),
            }),
        }
    }

    /// Reads a labelled text. Fields that are not named are looked for among [`TEXT_FIELDS`] and [`LABEL_FIELDS`].
    ///
    /// # Errors
    /// A field that is missing, there under two names, blank, or of the wrong type.
    pub fn labelled(
        line: &str,
        text_field: Option<&str>,
        label_field: Option<&str>,
    ) -> Result<Self, RecordError> {
        let fields = object(line)?;
        let find = |named: Option<&str>, known: &[&str]| {
            let wanted = named.map_or(known.to_vec(), |name| vec![name]);
            match only_one(&fields, &wanted)? {
                Some(key) => Ok(key.to_owned()),
                None => Err(RecordError::NoField {
                    wanted: wanted.join("`, `"),
                    present: keys_of(&fields),
                }),
            }
        };
        let text_key = find(text_field, TEXT_FIELDS)?;
        let label_key = find(label_field, LABEL_FIELDS)?;
        let text = not_blank(&text_key, string(&text_key, &fields[&text_key])?)?;
        let label = match &fields[&label_key] {
            Value::Bool(label) => label.to_string(),
            Value::Number(label) if label.is_i64() || label.is_u64() => label.to_string(),
            Value::String(label) => not_blank(&label_key, label.clone())?,
            other => {
                return Err(RecordError::WrongType {
                    key: label_key,
                    found: kind(other),
                    expected: "a string, a whole number, true or false",
                });
            }
        };
        Ok(Self::Labelled { text, label })
    }
}

fn object(line: &str) -> Result<Map<String, Value>, RecordError> {
    match serde_json::from_str(line) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(RecordError::NotAnObject(kind(&other))),
        Err(error) => Err(RecordError::Json(error.to_string())),
    }
}

/// The one of `keys` that is there and not null.
fn only_one<'a>(
    fields: &Map<String, Value>,
    keys: &[&'a str],
) -> Result<Option<&'a str>, RecordError> {
    let there = |key: &&&str| fields.get(**key).is_some_and(|value| !value.is_null());
    let mut found = keys.iter().filter(there);
    match (found.next(), found.next()) {
        (Some(first), Some(second)) => Err(RecordError::Ambiguous {
            first: (*first).into(),
            second: (*second).into(),
        }),
        (found, _) => Ok(found.copied()),
    }
}

fn pair(fields: &Map<String, Value>, prompt: &str, response: &str) -> Result<Record, RecordError> {
    let mut said = string(prompt, &fields[prompt])?;
    let input = fields.get("input").filter(|input| !input.is_null());
    if let ("instruction", Some(input)) = (prompt, input) {
        let input = string("input", input)?;
        if !input.trim().is_empty() {
            said = format!("{}\n\n{input}", said.trim_end());
        }
    }
    Ok(Record::Pair {
        prompt: said,
        response: not_blank(response, string(response, &fields[response])?)?,
    })
}

fn conversation(fields: &Map<String, Value>, key: &'static str) -> Result<Record, RecordError> {
    let expected = "a list of turns";
    let turns = fields[key].as_array().ok_or(RecordError::WrongType {
        key: key.into(),
        found: kind(&fields[key]),
        expected,
    })?;
    if fields.get("tools").is_some_and(is_something) {
        return Err(RecordError::Unsupported {
            key: "tools".into(),
            advice: "write what the model should know of its tools into the system's turn",
        });
    }
    let mut messages = Vec::with_capacity(turns.len() + 1);
    // Some collections keep the system's turn beside the list.
    if let Some(system) = fields.get("system").filter(|system| is_something(system)) {
        messages.push(Message {
            role: Role::System,
            content: string("system", system)?,
        });
    }
    for (index, turn) in turns.iter().enumerate() {
        messages.push(message(&format!("{key}[{index}]"), turn)?);
    }
    match messages.iter().any(|m| m.role == Role::Assistant) {
        true => Ok(Record::Conversation(messages)),
        false => Err(RecordError::NoAssistant { key }),
    }
}

fn message(path: &str, turn: &Value) -> Result<Message, RecordError> {
    let turn = turn.as_object().ok_or_else(|| RecordError::WrongType {
        key: path.into(),
        found: kind(turn),
        expected: "an object with `role` and `content`, or with `from` and `value`",
    })?;
    let at = |key: &str| format!("{path}.{key}");
    for key in REFUSED_FIELDS {
        if turn.get(*key).is_some_and(is_something) {
            return Err(RecordError::Unsupported {
                key: at(key),
                advice: "write it as text into the turn, or leave the line out",
            });
        }
    }
    if turn.get("weight").is_some_and(|w| w.as_f64() != Some(1.0)) {
        return Err(RecordError::Unsupported {
            key: at("weight"),
            advice: "every turn of the assistant is trained alike",
        });
    }
    let field = |keys: &[&str]| match only_one(turn, keys) {
        Ok(Some(key)) => Ok((at(key), string(&at(key), &turn[key])?)),
        Ok(None) => Err(RecordError::NoField {
            wanted: at(&keys.join("` or `")),
            present: keys_of(turn),
        }),
        Err(_) => Err(RecordError::Ambiguous {
            first: at(keys[0]),
            second: at(keys[1]),
        }),
    };
    let (key, name) = field(&["role", "from"])?;
    let role = Role::parse(&name).ok_or(RecordError::UnknownRole { key, found: name })?;
    let (key, content) = field(&["content", "value"])?;
    let content = match role {
        Role::Assistant => not_blank(&key, content)?,
        _ => content,
    };
    Ok(Message { role, content })
}

fn string(key: &str, value: &Value) -> Result<String, RecordError> {
    let text = value.as_str().ok_or_else(|| RecordError::WrongType {
        key: key.into(),
        found: kind(value),
        expected: "a string",
    })?;
    Ok(text.to_owned())
}

fn not_blank(key: &str, text: String) -> Result<String, RecordError> {
    match text.trim().is_empty() {
        true => Err(RecordError::Blank { key: key.into() }),
        false => Ok(text),
    }
}

/// Whether a value says anything: null and what is empty do not.
fn is_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The keys of an object, for a person; null is as good as absent, so it is shown.
fn keys_of(fields: &Map<String, Value>) -> String {
    let shown = |(key, value): (&String, &Value)| match value {
        Value::Null => format!("`{key}` (null)"),
        _ => format!("`{key}`"),
    };
    match fields.is_empty() {
        true => "none".into(),
        false => fields.iter().map(shown).collect::<Vec<_>>().join(", "),
    }
}
