//! What a checkpoint says about itself: the manifest (sizes and hashes of its files) and the state of the run that
//! wrote it. **Pure**: types and their JSON, no file is touched here.

use serde::{Deserialize, Serialize};

use super::hex;
use crate::spec::RunSpec;

/// Version of the checkpoint format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// Name of a checkpoint's directory: `step-00000100`.
pub fn directory_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Reads what [`directory_name`] wrote.
pub fn parse_directory_name(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let step = digits.parse().ok()?;
    (directory_name(step) == name).then_some(step)
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Plain name inside the checkpoint's directory.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 of the content.
    #[serde(with = "hex")]
    pub blake3: [u8; 32],
}

/// `manifest.json`: what must lie beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    /// Committed optimizer steps in this state.
    pub step: u64,
    /// Hash over all parameters and moments.
    #[serde(with = "hex")]
    pub state_hash: [u8; 32],
    /// Every file but the manifest.
    pub files: Vec<FileEntry>,
}

/// The manifest as it lies on disk, with a hash of itself.
#[derive(Serialize, Deserialize)]
struct Sealed {
    #[serde(flatten)]
    manifest: Manifest,
    #[serde(with = "hex")]
    seal: [u8; 32],
}

/// Why a manifest cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not of this form.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// From a newer build.
    #[error(
        "format `{0}` is newer than this build of cohort, which reads up to `{FORMAT}`; update cohort"
    )]
    Newer(u64),
    /// Its content does not match its own hash.
    #[error("its content does not match its own hash: it was changed or damaged")]
    Seal,
    /// A name that could lead out of the directory.
    #[error("`{0}` is not a plain file name")]
    Name(String),
}

impl Manifest {
    /// Canonical JSON, sealed with a hash of itself.
    pub fn to_json(&self) -> String {
        let seal =
            blake3::hash(&serde_json::to_vec(self).expect("a manifest is plain data")).into();
        let sealed = Sealed {
            manifest: self.clone(),
            seal,
        };
        serde_json::to_string_pretty(&sealed).expect("a manifest is plain data") + "\n"
    }

    /// Reads what [`Manifest::to_json`] wrote; refuses any change, down to white space.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let value: serde_json::Value = serde_json::from_str(text)?;
        if let Some(format) = value["format"].as_u64().filter(|f| *f > u64::from(FORMAT)) {
            return Err(ManifestError::Newer(format));
        }
        let Sealed { manifest, .. } = serde_json::from_value(value)?;
        if manifest.to_json() != text {
            return Err(ManifestError::Seal);
        }
        match manifest.files.iter().find(|f| !is_plain_name(&f.name)) {
            Some(file) => Err(ManifestError::Name(file.name.clone())),
            None => Ok(manifest),
        }
    }

    /// The entry of a file.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|f| f.name == name)
    }

    /// Bytes of all files but the manifest.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }
}

/// Whether `name` names a file in a directory and nothing else: no separator, no parent, no drive.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// `run.json`: where the run that wrote the checkpoint stood. Enough to go on from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Name of the run.
    pub run: String,
    /// What the run does.
    pub spec: RunSpec,
    /// Committed optimizer steps.
    pub step: u64,
    /// Training samples consumed.
    pub samples: u64,
    /// Training tokens consumed.
    pub tokens: u64,
    /// The last validation loss, in nats per token, if there was a validation.
    pub val_loss: Option<f64>,
    /// Hash of the ledger's entry of this step; the ledger's genesis at step 0.
    #[serde(with = "hex")]
    pub ledger_head: [u8; 32],
    /// Hash over all parameters and moments. The writer fills it in.
    #[serde(with = "hex")]
    pub state_hash: [u8; 32],
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            step: 100,
            state_hash: [7; 32],
            files: vec![FileEntry {
                name: "model.safetensors".into(),
                bytes: 12,
                blake3: [9; 32],
            }],
        }
    }

    #[test]
    fn directory_names_are_read_back_and_nothing_else() {
        for step in [0, 100, 99_999_999, 100_000_000] {
            assert_eq!(parse_directory_name(&directory_name(step)), Some(step));
        }
        for name in [
            "step-100",
            "step-+0000100",
            "step-",
            ".unfinished-step-00000100",
            "x",
        ] {
            assert_eq!(parse_directory_name(name), None, "{name}");
        }
    }

    #[test]
    fn a_manifest_is_read_back() {
        assert_eq!(Manifest::parse(&manifest().to_json()).unwrap(), manifest());
    }

    #[test]
    fn a_newer_format_and_a_path_are_refused() {
        let newer = manifest()
            .to_json()
            .replace("\"format\": 1", "\"format\": 2");
        assert!(matches!(
            Manifest::parse(&newer),
            Err(ManifestError::Newer(2))
        ));
        let mut tricky = manifest();
        tricky.files[0].name = "../../etc/passwd".into();
        assert!(matches!(
            Manifest::parse(&tricky.to_json()),
            Err(ManifestError::Name(_))
        ));
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(at in 0usize..400, to in 0u8..128) {
            let mut text = manifest().to_json().into_bytes();
            let at = at % text.len();
            prop_assume!(text[at] != to);
            text[at] = to;
            let text = String::from_utf8(text).unwrap();
            prop_assert!(Manifest::parse(&text).is_err());
        }
    }
}
