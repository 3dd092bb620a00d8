//! A spec as typed: the TOML tables of a file or a preset, and `--set key=value` on top. What is absent stays `None`
//! here; `validate.rs` fills the defaults and refuses what no run can have.
//!
//! A [`SpecSource`] remembers where every key was written, so that an error can name the line or the override.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use toml::{Table, Value};

use super::error::{Place, SpecError};
use super::suggest::{fields_of, nearest_key, nearest_word};
use super::{Architecture, Payload, Precision, ScheduleKind, SyncKind, WatchdogAction};
use crate::corpus::{Dedup, TooLong};

/// Everything that a spec may say. Every table and every key may be absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpecFile {
    /// The model's shape.
    pub model: ModelTable,
    /// The text.
    pub corpus: CorpusTable,
    /// How text becomes tokens.
    pub tokenizer: TokenizerTable,
    /// The optimizer steps.
    pub train: TrainTable,
    /// When checkpoints are written.
    pub checkpoint: CheckpointTable,
    /// Other corpora that are trained on, too.
    pub mixture: MixtureTable,
    /// Adapters in place of the weights.
    pub lora: LoraTable,
    /// What is written while it trains.
    pub samples: SamplesTable,
    /// Steps out of the ordinary.
    pub watchdog: WatchdogTable,
}

/// `[model]`, with the names of [`super::ModelConfig`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct ModelTable {
    /// Default `llama`.
    pub architecture: Option<Architecture>,
    /// The one dial (`llama` only): derives every size and the recipe that is not given. See `depth.rs`.
    pub depth: Option<u64>,
    /// Tokens per sample. Default 256.
    pub context: Option<u64>,
    /// Default 384.
    pub hidden_size: Option<u64>,
    /// Default 6.
    pub num_hidden_layers: Option<u64>,
    /// Default: heads of 64, or of `head_dim`.
    pub num_attention_heads: Option<u64>,
    /// Default: as many as `num_attention_heads`.
    pub num_key_value_heads: Option<u64>,
    /// `llama` only. Default: `hidden_size / num_attention_heads`.
    pub head_dim: Option<u64>,
    /// `llama` only. Default false.
    pub attention_bias: Option<bool>,
    /// `llama` only. Default false.
    pub qk_norm: Option<bool>,
    /// Default: 8/3 of `hidden_size` rounded up to a multiple of 64 for `llama`, 4 times `hidden_size` for `gpt2`.
    pub intermediate_size: Option<u64>,
    /// Default true.
    pub tie_word_embeddings: Option<bool>,
    /// `gpt2` only. Default true.
    pub bias: Option<bool>,
    /// `gpt2` only. Default 0.
    pub dropout: Option<f64>,
    /// Default 1e-5.
    pub norm_eps: Option<f64>,
    /// `llama` only. Default 10,000.
    pub rope_theta: Option<f64>,
    /// Default 0.02.
    pub initializer_range: Option<f64>,
}

/// `[corpus]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CorpusTable {
    /// Files, directories and globs; one string or a list. `coordinator:PATH` lies on the coordinator's machine.
    #[serde(deserialize_with = "one_or_many")]
    pub paths: Option<Vec<String>>,
    /// The field of a JSON object, or the column of a table, that holds the text. Default `text`.
    pub text_field: Option<String>,
    /// Share of the text that is held out, in (0, 1). Default 0.1.
    pub validation: Option<f64>,
    /// How the held-out text is chosen. Default `auto`.
    pub split: Option<SplitKind>,
    /// Skip files that cannot be read as text, and count them, in place of stopping. Default false.
    pub skip_bad: Option<bool>,
    /// What is learned. Default `text`.
    pub objective: Option<ObjectiveKind>,
    /// `sft` and `classify` only: what becomes of samples that are longer than `train.max_length`. Default `error`.
    pub too_long: Option<TooLong>,
    /// `sft` and `classify` only: whether several short samples share a sequence. Default true.
    pub packing: Option<bool>,
    /// `classify` only: the labels that may occur, in order. Default: those that occur, sorted.
    pub labels: Option<Vec<String>>,
    /// `classify` only: the field of a JSON line that holds the label. Default: `label`, or another usual name.
    pub label_field: Option<String>,
    /// Which duplicates are left out. Default: none.
    pub dedup: Option<Dedup>,
    /// `near` only: the similarity of near duplicates, from 0.5 to 1. Default 0.8.
    pub dedup_threshold: Option<f64>,
    /// Fewest characters of a document. Default: no bound, here and below.
    pub min_chars: Option<u64>,
    /// Most characters of a document.
    pub max_chars: Option<u64>,
    /// Languages that may occur; one code or a list.
    #[serde(deserialize_with = "one_or_many")]
    pub languages: Option<Vec<String>>,
    /// How sure of a document's language one must be. Default 0.5.
    pub language_confidence: Option<f64>,
    /// Largest share of lines that repeat an earlier one.
    pub max_repeated_lines: Option<f64>,
    /// Most hash signs, and most ellipses, per word.
    pub max_symbols: Option<f64>,
    /// Least and largest mean length of a word.
    pub word_length: Option<[f64; 2]>,
    /// Least share of words with a letter.
    pub min_alphabetic: Option<f64>,
}

/// `[mixture]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MixtureTable {
    /// The corpora besides `[corpus]`.
    pub corpora: Option<Vec<MixedTable>>,
    /// How often samples of `[corpus]` are taken, relative to the others. Default 1.
    pub weight: Option<f64>,
    /// In place of weights: how much small corpora are favoured.
    pub temperature: Option<f64>,
    /// Other weights from some step on.
    pub schedule: Option<Vec<PhaseTable>>,
}

/// `[[mixture.corpora]]`. It is read as `[corpus]` is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MixedTable {
    /// What its validations are called. Default: the last part of the first path.
    pub name: Option<String>,
    /// Files, directories and globs; one string or a list.
    #[serde(deserialize_with = "one_or_many")]
    pub paths: Option<Vec<String>>,
    /// How often its samples are taken, relative to the others. Default 1.
    pub weight: Option<f64>,
}

/// `[[mixture.schedule]]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PhaseTable {
    /// Steps before it.
    pub step: Option<u64>,
    /// The weights from there on, that of `[corpus]` first.
    pub weights: Option<Vec<f64>>,
}

/// What is learned from a corpus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectiveKind {
    /// The next token of plain text.
    #[default]
    Text,
    /// Responses to prompts, and the assistant's turns of conversations.
    Sft,
    /// The label of a text.
    Classify,
}

/// `[lora]`, with PEFT's names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraTable {
    /// The rank of the adapters.
    pub rank: Option<u64>,
    /// Default: twice the rank.
    pub alpha: Option<f64>,
    /// Default 0.
    pub dropout: Option<f64>,
    /// Scale by the root of the rank. Default false.
    pub rslora: Option<bool>,
    /// The linear layers that get one; one name or a list, `all-linear` is all. Default: all.
    #[serde(deserialize_with = "one_or_many")]
    pub target_modules: Option<Vec<String>>,
}

/// `[samples]`, with the names of [`super::SampleConfig`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplesTable {
    /// What the model of a step writes after; one string or a list.
    #[serde(deserialize_with = "one_or_many")]
    pub prompts: Option<Vec<String>>,
    /// Tokens after each prompt, at most. Default 48.
    pub tokens: Option<u64>,
    /// Default 0.8; 0 always takes the likeliest token.
    pub temperature: Option<f64>,
    /// Default: all tokens.
    pub top_k: Option<u64>,
    /// Validations between samples. Default 1.
    pub every: Option<u64>,
}

/// How the validation text is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitKind {
    /// By document, or by the tail where there are only a few documents.
    Auto,
    /// Whole documents, chosen by a hash of their text.
    Document,
    /// The last part of the text.
    Tail,
}

impl std::fmt::Display for SplitKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Document => "document",
            Self::Tail => "tail",
        })
    }
}

/// `[tokenizer]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerTable {
    /// Default: `file` where a path is given, else `bpe`.
    pub kind: Option<TokenizerKind>,
    /// Tokens of a BPE vocabulary trained on the corpus. Default 4,096.
    pub vocab_size: Option<u64>,
    /// A `tokenizer.json` in Hugging Face's format.
    pub path: Option<String>,
}

/// The kinds of tokenizer that a spec can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// Byte-level BPE, trained on the corpus.
    Bpe,
    /// One token for each character of the corpus.
    Char,
    /// A given `tokenizer.json`.
    File,
}

/// `[train]`, with the names and units of [`super::TrainConfig`]. The defaults stand in `validate.rs`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)]
pub struct TrainTable {
    pub steps: Option<u64>,
    pub lanes: Option<u64>,
    pub micro_batch: Option<u64>,
    pub accumulate: Option<u64>,
    pub learning_rate: Option<f64>,
    pub min_learning_rate: Option<f64>,
    pub warmup_steps: Option<u64>,
    pub schedule: Option<ScheduleKind>,
    pub decay_steps: Option<u64>,
    pub beta1: Option<f64>,
    pub beta2: Option<f64>,
    pub eps: Option<f64>,
    pub weight_decay: Option<f64>,
    pub grad_clip: Option<f64>,
    pub precision: Option<Precision>,
    pub payload: Option<Payload>,
    pub sync: Option<SyncKind>,
    pub inner_steps: Option<u64>,
    pub outer_learning_rate: Option<f64>,
    pub outer_momentum: Option<f64>,
    pub gradient_checkpointing: Option<bool>,
    pub seed: Option<u64>,
    pub eval_every: Option<u64>,
    pub eval_samples: Option<u64>,
    pub freeze_layers: Option<u64>,
    pub layer_decay: Option<f64>,
    pub unfreeze_every: Option<u64>,
    pub data_share: Option<f64>,
    pub replay: Option<f64>,
    pub early_stopping_patience: Option<u64>,
    pub max_forgetting: Option<f64>,
    pub max_length: Option<u64>,
    pub min_workers: Option<u64>,
}

/// `[checkpoint]`, with the names of [`super::CheckpointConfig`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointTable {
    /// Steps between checkpoints; 0 writes one only at the end. Default: `train.eval_every`.
    pub every: Option<u64>,
    /// How many of the newest stay. Default 3.
    pub keep: Option<u64>,
}

/// `[watchdog]`, with the names of [`super::WatchdogConfig`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchdogTable {
    /// Standard deviations above the mean that are still ordinary. Default 6.
    pub sigma: Option<f64>,
    /// Applied steps that mean and deviation are taken over. Default 100.
    pub window: Option<u64>,
    /// What becomes of a step out of the ordinary. Default `tell`.
    pub action: Option<WatchdogAction>,
}

fn one_or_many<'de, D: Deserializer<'de>>(de: D) -> Result<Option<Vec<String>>, D::Error> {
    match Value::deserialize(de)? {
        Value::String(one) => Ok(Some(vec![one])),
        Value::Array(items) if items.iter().all(Value::is_str) => Ok(Some(
            items
                .iter()
                .filter_map(Value::as_str)
                .map(String::from)
                .collect(),
        )),
        _ => Err(serde::de::Error::custom(
            "expected a string or a list of strings",
        )),
    }
}

/// A spec being put together: a file or a preset, then overrides in the order they were typed.
#[derive(Clone, Debug, Default)]
pub struct SpecSource {
    table: Table,
    places: BTreeMap<String, Place>,
}

impl SpecSource {
    /// A spec that says nothing, so that every default holds.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Reads TOML. `file` is what errors call it.
    pub fn parse(file: &str, text: &str) -> Result<Self, SpecError> {
        let line_of = |offset: usize| Place::Line {
            file: file.into(),
            line: text.as_bytes()[..offset.min(text.len())]
                .iter()
                .filter(|&&b| b == b'\n')
                .count()
                + 1,
        };
        let syntax = |error: toml::de::Error| SpecError::Syntax {
            place: line_of(error.span().map_or(0, |s| s.start)),
            message: error.message().trim().replace('\n', ", "),
        };
        let spanned = toml::de::DeTable::parse(text).map_err(syntax)?;
        let table: Table = toml::from_str(text).map_err(syntax)?;
        let mut places = BTreeMap::new();
        for (name, value) in spanned.get_ref() {
            places.insert(name.get_ref().to_string(), line_of(name.span().start));
            for (key, _) in value.get_ref().as_table().into_iter().flatten() {
                let dotted = format!("{}.{}", name.get_ref(), key.get_ref());
                places.insert(dotted, line_of(key.span().start));
            }
        }
        Ok(Self { table, places })
    }

    /// Applies one `--set key=value`: the key is dotted, the value is TOML, and what is no TOML is a bare string.
    pub fn set(&mut self, assignment: &str) -> Result<(), SpecError> {
        let bad = |problem: &str| SpecError::BadSet {
            assignment: assignment.into(),
            problem: problem.into(),
        };
        let (key, text) = assignment
            .split_once('=')
            .ok_or_else(|| bad("there is no `=`"))?;
        let (key, text) = (key.trim(), text.trim());
        if key.is_empty() {
            return Err(bad("there is no key before `=`"));
        }
        if text.is_empty() {
            return Err(bad("there is no value after `=`"));
        }
        let value = text.parse().unwrap_or_else(|_| Value::String(text.into()));
        let place = Place::Set(assignment.into());
        let Some((name, inner)) = key.split_once('.') else {
            // A table at once, such as `corpus={paths="x"}`; anything else is found unknown by `into_file`.
            if let Some(table) = value.as_table() {
                for inner in table.keys() {
                    self.places.insert(format!("{key}.{inner}"), place.clone());
                }
            }
            self.places.insert(key.into(), place);
            self.table.insert(key.into(), value);
            return Ok(());
        };
        let entry = self
            .table
            .entry(name)
            .or_insert_with(|| Value::Table(Table::new()));
        match entry.as_table_mut() {
            Some(table) => table.insert(inner.into(), value),
            None => return Err(bad(&format!("`{name}` is not a table"))),
        };
        self.places
            .entry(name.into())
            .or_insert_with(|| place.clone());
        self.places.insert(key.into(), place);
        Ok(())
    }

    /// The typed tables. An unknown key or a value of a wrong type is an error that says where it is written.
    pub fn into_file(self) -> Result<SpecFile, SpecError> {
        for (name, value) in &self.table {
            self.check_table(name, value)?;
        }
        // Every single key has been accepted above, so the whole is too.
        SpecFile::deserialize(self.table.clone()).map_err(|e| SpecError::WrongType {
            key: "spec".into(),
            expected: "a table of known keys".into(),
            found: e.message().trim().into(),
            place: self.place(""),
        })
    }

    fn check_table(&self, name: &str, value: &Value) -> Result<(), SpecError> {
        let Some(keys) = table_keys(name) else {
            return Err(self.unknown_table(name, value));
        };
        let Some(table) = value.as_table() else {
            return Err(SpecError::WrongType {
                key: name.into(),
                expected: format!("a table, as in `[{name}]`"),
                found: describe(value),
                place: self.place(name),
            });
        };
        for (key, value) in table {
            let dotted = format!("{name}.{key}");
            if !keys.contains(&key.as_str()) {
                return Err(self.unknown_key(name, key, keys));
            }
            let single = Table::from_iter([(key.clone(), value.clone())]);
            let whole = Table::from_iter([(name.to_string(), Value::Table(single))]);
            if let Err(error) = SpecFile::deserialize(whole) {
                return Err(SpecError::WrongType {
                    expected: expectation(error.message()),
                    found: describe(value),
                    place: self.place(&dotted),
                    key: dotted,
                });
            }
        }
        Ok(())
    }

    fn unknown_key(&self, table: &str, key: &str, keys: &[&str]) -> SpecError {
        let dotted = format!("{table}.{key}");
        SpecError::Unknown {
            what: format!("key `{dotted}` in table [{table}]"),
            place: self.place(&dotted),
            hint: match nearest_key(table, key, &known_keys()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("[{table}] takes {}", keys.join(", ")),
            },
        }
    }

    fn unknown_table(&self, name: &str, value: &Value) -> SpecError {
        let tables = fields_of::<SpecFile>();
        let (what, near) = match value {
            Value::Table(_) => (
                format!("table [{name}]"),
                nearest_word(name, tables).map(|near| format!("did you mean [{near}]?")),
            ),
            _ => (
                format!("key `{name}` outside any table"),
                nearest_key("", name, &known_keys()).map(|near| format!("did you mean `{near}`?")),
            ),
        };
        SpecError::Unknown {
            what,
            place: self.place(name),
            hint: near.unwrap_or_else(|| format!("a spec has the tables {}", tables.join(", "))),
        }
    }

    fn place(&self, key: &str) -> Place {
        self.places.get(key).cloned().unwrap_or(Place::Line {
            file: "spec".into(),
            line: 1,
        })
    }
}

/// All dotted keys that a spec may have.
pub(crate) fn known_keys() -> Vec<String> {
    fields_of::<SpecFile>()
        .iter()
        .flat_map(|table| {
            let keys = table_keys(table).unwrap_or_default();
            keys.iter().map(move |key| format!("{table}.{key}"))
        })
        .collect()
}

fn table_keys(table: &str) -> Option<&'static [&'static str]> {
    Some(match table {
        "model" => fields_of::<ModelTable>(),
        "corpus" => fields_of::<CorpusTable>(),
        "tokenizer" => fields_of::<TokenizerTable>(),
        "train" => fields_of::<TrainTable>(),
        "checkpoint" => fields_of::<CheckpointTable>(),
        "mixture" => fields_of::<MixtureTable>(),
        "lora" => fields_of::<LoraTable>(),
        "samples" => fields_of::<SamplesTable>(),
        "watchdog" => fields_of::<WatchdogTable>(),
        _ => return None,
    })
}

/// A value with its type, for a person; long ones are cut.
fn describe(value: &Value) -> String {
    let kind = match value {
        Value::String(_) => "the string",
        Value::Integer(_) | Value::Float(_) => "the number",
        Value::Boolean(_) => "the boolean",
        Value::Datetime(_) => "the date",
        Value::Array(_) => "the list",
        Value::Table(_) => "the table",
    };
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{kind} {}...", &text[..cut]),
        None => format!("{kind} {text}"),
    }
}

/// What serde expected, in the words of a spec.
fn expectation(message: &str) -> String {
    let first = message.lines().next().unwrap_or_default().trim();
    let expected = first.rsplit_once("expected ").map_or(first, |(_, e)| e);
    match expected {
        "u64" => "a whole number, 0 or more".into(),
        "f64" => "a number".into(),
        "a boolean" => "true or false".into(),
        other => other
            .strip_prefix("one of ")
            .map_or(other.into(), |words| format!("one of {words}")),
    }
}
