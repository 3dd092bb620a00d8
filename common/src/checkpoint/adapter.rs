//! Adapters on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, whose tensors are those
//! of the layout behind a prefix. What would change the mathematics and is not known is refused by name.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::tensor_file::TensorFile;
use super::{ADAPTER, ADAPTER_CONFIG, CheckpointError};
use crate::layout::{Layout, SCORE, TensorSpec};
use crate::spec::{LoraConfig, ModelConfig, linear_modules};

/// What PEFT writes before the name of each tensor.
const PREFIX: &str = "base_model.model.";

/// The name of a trained tensor in an adapter's file.
pub fn file_name_of(tensor: &TensorSpec) -> String {
    format!("{PREFIX}{}", tensor.name)
}

/// A directory with an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    dir: PathBuf,
    lora: LoraConfig,
}

impl Adapter {
    /// Opens a directory; `model` is what the adapter belongs to.
    ///
    /// # Errors
    /// Files that are missing, another kind of adapter, or a field that is not supported, by name.
    pub fn open(dir: &Path, model: &ModelConfig) -> Result<Self, CheckpointError> {
        let path = dir.join(ADAPTER_CONFIG);
        let text = std::fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
        let lora = parse(&text, model).map_err(|why| CheckpointError::malformed(&path, why))?;
        Ok(Self {
            dir: dir.to_owned(),
            lora,
        })
    }

    /// Whether a directory holds one.
    pub fn is_in(dir: &Path) -> bool {
        dir.join(ADAPTER_CONFIG).exists()
    }

    /// Its shape.
    pub fn lora(&self) -> &LoraConfig {
        &self.lora
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file with its tensors.
    pub fn file(&self) -> PathBuf {
        self.dir.join(ADAPTER)
    }

    /// Reads its tensors to where `layout` has them; returns their names.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or that the layout does not train.
    pub fn read(
        &self,
        layout: &Layout,
        params: &mut [f32],
    ) -> Result<Vec<String>, CheckpointError> {
        let mut file = self.fitting(layout)?;
        let mut names = Vec::new();
        let trained = |name: &str| {
            let name = name.strip_prefix(PREFIX)?;
            layout.tensors().iter().find(|t| t.name == name)
        };
        file.read_each(|tensor, read| match trained(&tensor.name) {
            Some(spec) => {
                names.push(spec.name.clone());
                read.into_slice(&mut params[spec.range()])
            }
            None => Err(read.unexpected()),
        })?;
        Ok(names)
    }

    /// Its file, with all that `layout` trains, in the shapes that it has there.
    pub(super) fn fitting(&self, layout: &Layout) -> Result<TensorFile, CheckpointError> {
        let file = TensorFile::open(self.file())?;
        // A classifier's head may be the base's own.
        let optional = |t: &TensorSpec| t.name == SCORE && file.tensor(&file_name_of(t)).is_none();
        for tensor in layout.tensors().iter().filter(|t| !optional(t)) {
            file.check_present(&file_name_of(tensor), &tensor.shape)?;
        }
        Ok(file)
    }
}

/// `adapter_config.json`; `base` is what people know the base by.
pub fn config_json(lora: &LoraConfig, model: &ModelConfig, base: &str) -> String {
    let classifies = model.classifies();
    let config = json!({
        "peft_type": "LORA",
        "task_type": if classifies { "SEQ_CLS" } else { "CAUSAL_LM" },
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": shortest(lora.dropout),
        "use_rslora": lora.rslora,
        "target_modules": lora.target_modules,
        "fan_in_fan_out": model.architecture == crate::spec::Architecture::Gpt2,
        "bias": "none",
        "inference_mode": true,
        "modules_to_save": if classifies { json!(["score"]) } else { Value::Null },
    });
    serde_json::to_string_pretty(&config).expect("plain data") + "\n"
}

/// The shortest decimal that reads back as this f32.
fn shortest(value: f32) -> f64 {
    value
        .to_string()
        .parse()
        .expect("a float prints as a number")
}

/// Fields that must have one value, where they are there at all.
const FIXED: &[(&str, &[&str])] = &[
    ("peft_type", &["\"LORA\""]),
    ("bias", &["\"none\""]),
    ("use_dora", &["false"]),
    ("rank_pattern", &["{}", "null"]),
    ("alpha_pattern", &["{}", "null"]),
    ("layers_to_transform", &["null", "[]"]),
    ("layers_pattern", &["null", "[]"]),
    ("exclude_modules", &["null", "[]"]),
    ("target_parameters", &["null", "[]"]),
    ("trainable_token_indices", &["null", "[]"]),
    ("megatron_config", &["null"]),
    ("layer_replication", &["null"]),
    ("lora_bias", &["false"]),
    ("use_qalora", &["false"]),
    ("arrow_config", &["null"]),
    ("alora_invocation_tokens", &["null"]),
    // Other ways to begin change the base, too.
    (
        "init_lora_weights",
        &["true", "false", "\"gaussian\"", "\"orthogonal\"", "\"eva\""],
    ),
];

/// Fields that are read, or that change no number of an adapter which is there.
const HARMLESS: &[&str] = &[
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "modules_to_save",
    "fan_in_fan_out",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "ensure_weight_tying",
];

/// Whether a field says nothing: newer versions of PEFT write what they do not use.
fn says_nothing(value: &Value) -> bool {
    ["null", "false", "[]", "{}"].contains(&value.to_string().as_str())
}

fn parse(text: &str, model: &ModelConfig) -> Result<LoraConfig, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let fields = value.as_object().ok_or("it is no JSON object")?;
    for (field, values) in FIXED {
        if let Some(value) = fields.get(*field)
            && !values.contains(&value.to_string().as_str())
        {
            return Err(format!(
                "`{field}` is `{value}`; only {} can be read",
                values[0]
            ));
        }
    }
    let known =
        |field: &str| HARMLESS.contains(&field) || FIXED.iter().any(|(fixed, _)| *fixed == field);
    if let Some((field, value)) = fields
        .iter()
        .find(|(field, value)| !known(field) && !says_nothing(value))
    {
        return Err(format!(
            "`{field}` is `{value}`; this version does not know what that changes"
        ));
    }
    if let Some(saved) = fields.get("modules_to_save").filter(|v| !v.is_null())
        && !(model.classifies() && *saved == json!(["score"]))
        && *saved != json!([])
    {
        return Err(format!(
            "`modules_to_save` is `{saved}`; only the `score` of a classifier can be read"
        ));
    }
    let number = |field: &str| fields.get(field).and_then(Value::as_f64);
    let rank = number("r").filter(|r| *r >= 1.0 && *r <= 65_536.0 && r.fract() == 0.0);
    let alpha = number("lora_alpha").filter(|alpha| *alpha > 0.0);
    Ok(LoraConfig {
        rank: rank.ok_or("`r` is no whole number above 0")? as u32,
        alpha: alpha.ok_or("`lora_alpha` is no number above 0")?,
        dropout: number("lora_dropout").unwrap_or(0.0) as f32,
        rslora: fields.get("use_rslora") == Some(&Value::Bool(true)),
        target_modules: targets(fields.get("target_modules"), model)?,
    })
}

/// The modules that are adapted, in the model's order.
fn targets(given: Option<&Value>, model: &ModelConfig) -> Result<Vec<String>, String> {
    let known = linear_modules(model.architecture);
    let all = || known.iter().map(|name| (*name).to_owned()).collect();
    let names: Vec<&str> = match given {
        Some(Value::String(all_linear)) if all_linear == "all-linear" => return Ok(all()),
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        other => {
            let found = other.unwrap_or(&Value::Null);
            return Err(format!(
                "`target_modules` is `{found}`; a list of names can be read"
            ));
        }
    };
    if let Some(unknown) = names.iter().find(|name| !known.contains(name)) {
        return Err(format!(
            "`target_modules` has `{unknown}`; a block of this model has {}",
            known.join(", ")
        ));
    }
    let named = known.iter().filter(|name| names.contains(name));
    Ok(named.map(|name| (*name).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tests::llama;

    fn lora() -> LoraConfig {
        LoraConfig {
            rank: 4,
            alpha: 8.0,
            dropout: 0.25,
            rslora: true,
            target_modules: vec!["q_proj".into(), "down_proj".into()],
        }
    }

    #[test]
    fn a_config_is_read_back() {
        let model = llama();
        let text = config_json(&lora(), &model, "books@best");
        assert_eq!(parse(&text, &model).unwrap(), lora());
    }

    #[test]
    fn what_changes_the_mathematics_is_refused_by_name() {
        let model = llama();
        let with = |field: &str, value: Value| {
            let mut config: Value =
                serde_json::from_str(&config_json(&lora(), &model, "x")).unwrap();
            config[field] = value;
            parse(&config.to_string(), &model).unwrap_err()
        };
        for (field, value) in [
            ("use_dora", json!(true)),
            ("bias", json!("all")),
            ("init_lora_weights", json!("pissa")),
            ("use_bdlora", json!(true)),
            ("from_the_future", json!(1)),
            ("peft_type", json!("IA3")),
            ("rank_pattern", json!({"q_proj": 2})),
            ("modules_to_save", json!(["lm_head"])),
            ("target_modules", json!(["c_attn"])),
            ("target_modules", json!(".*proj")),
            ("r", json!(0)),
        ] {
            let error = with(field, value);
            assert!(error.contains(&format!("`{field}`")), "{field}: {error}");
        }
    }
}
