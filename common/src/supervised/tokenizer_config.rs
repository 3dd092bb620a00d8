//! Hugging Face's `tokenizer_config.json`, as far as conversations need it: the chat template and the texts of special
//! tokens. **Pure.**

use serde_json::{Map, Value};

/// Name of the template that is taken from a list of several.
const DEFAULT: &str = "default";

/// Texts of special tokens, under the names that templates know them by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTexts {
    /// Begins a text: `bos_token`.
    pub bos: Option<String>,
    /// Ends a text: `eos_token`.
    pub eos: Option<String>,
    /// Fills up what is too short: `pad_token`.
    pub pad: Option<String>,
    /// Stands for what the vocabulary does not have: `unk_token`.
    pub unk: Option<String>,
}

impl SpecialTexts {
    /// The variables of a template.
    pub(super) fn variables(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all = [
            ("bos_token", &self.bos),
            ("eos_token", &self.eos),
            ("pad_token", &self.pad),
            ("unk_token", &self.unk),
        ];
        all.into_iter()
            .filter_map(|(name, text)| Some((name, text.as_deref()?)))
    }
}

/// Why a `tokenizer_config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerConfigError {
    /// Not JSON.
    #[error("not valid JSON")]
    Json(#[from] serde_json::Error),
    /// JSON, but no object.
    #[error("not a JSON object")]
    NotAnObject,
    /// A key with something unexpected.
    #[error("`{key}` is `{value}`; expected {expected}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// Its value, as JSON.
        value: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// Several templates, and none of them is the usual one.
    #[error("`chat_template` has no template named `default`; it has {0}")]
    NoDefault(String),
}

/// The chat template in the text of a `tokenizer_config.json`: its one, or of several the one named `default`.
pub fn chat_template_of(config: &str) -> Result<Option<String>, TokenizerConfigError> {
    let fields = object(config)?;
    let expected = "a template, or a list of templates with `name` and `template`";
    let invalid = |value: &Value| TokenizerConfigError::Invalid {
        key: "chat_template",
        value: value.to_string(),
        expected,
    };
    let listed = match fields.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(template)) => return Ok(Some(template.clone())),
        Some(Value::Array(listed)) => listed,
        Some(other) => return Err(invalid(other)),
    };
    let mut names = Vec::new();
    for entry in listed {
        match (entry["name"].as_str(), entry["template"].as_str()) {
            (Some(DEFAULT), Some(template)) => return Ok(Some(template.to_owned())),
            (Some(name), Some(_)) => names.push(format!("`{name}`")),
            _ => return Err(invalid(entry)),
        }
    }
    match names.is_empty() {
        true => Ok(None),
        false => Err(TokenizerConfigError::NoDefault(names.join(", "))),
    }
}

/// The special tokens' texts in the text of a `tokenizer_config.json`.
pub fn special_texts(config: &str) -> Result<SpecialTexts, TokenizerConfigError> {
    let fields = object(config)?;
    let text = |key: &'static str| match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(token) => match token["content"].as_str() {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(TokenizerConfigError::Invalid {
                key,
                value: token.to_string(),
                expected: "a text, or an object with `content`",
            }),
        },
    };
    Ok(SpecialTexts {
        bos: text("bos_token")?,
        eos: text("eos_token")?,
        pad: text("pad_token")?,
        unk: text("unk_token")?,
    })
}

fn object(config: &str) -> Result<Map<String, Value>, TokenizerConfigError> {
    match serde_json::from_str(config)? {
        Value::Object(fields) => Ok(fields),
        _ => Err(TokenizerConfigError::NotAnObject),
    }
}
