//! Checkpoints: a directory `step-00000100/` that `transformers` loads as it is, with the optimizer's moments, the
//! state of the run and a manifest beside it.
//!
//! | file | content |
//! | --- | --- |
//! | `model.safetensors`, `config.json`, `generation_config.json` | the model, in Hugging Face names and shapes |
//! | `tokenizer.json`, `tokenizer_config.json` | its tokenizer; the latter with its chat template, if it has one |
//! | `adapter_model.safetensors`, `adapter_config.json` | of a run that trains adapters: those, in PEFT's layout; the weights beside them are the base's |
//! | `optimizer.safetensors` | `exp_avg.<name>` and `exp_avg_sq.<name>` for each parameter |
//! | `run.json` | the run, its spec, and where it stood |
//! | `ledger.jsonl` | the run's ledger up to this step, one entry a line |
//! | `manifest.json` | size and BLAKE3 of each of these, the state hash, and a hash of itself |
//!
//! Which checkpoints are kept and which is the best is the store's business, not decided here.

pub mod adapter;
mod chat;
mod error;
mod export;
mod files;
pub mod hex;
mod manifest;
mod merge;
mod names;
mod reader;
mod state_hash;
mod tensor_file;
mod tensors;
#[cfg(test)]
mod tests;
mod whole;
mod writer;

use std::path::{Path, PathBuf};

pub use error::CheckpointError;
pub use export::export;
pub use files::{remove_checkpoint, remove_unfinished};
pub use manifest::{
    FORMAT, FileEntry, Manifest, ManifestError, RunState, directory_name, is_plain_name,
    parse_directory_name,
};
pub use merge::merge;
pub use reader::{Checkpoint, Loaded, Moments, verify_files};
pub use state_hash::{StateHasher, bytes_of, chunk_digest, combine_digests, state_hash};
pub use tensors::{TensorInfo, header_of};
pub use whole::{check_target, write_model};
pub use writer::{CheckpointMeta, CheckpointWriter, write_checkpoint};

/// The parameters.
pub const WEIGHTS: &str = "model.safetensors";
/// The index of parameters in several files; read, never written.
pub const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// Adapters, where only those are trained; [`WEIGHTS`] are what they stand beside.
pub const ADAPTER: &str = "adapter_model.safetensors";
/// The shape of the adapters.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The moments.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The model's shape.
pub const CONFIG: &str = "config.json";
/// Ids for generation.
pub const GENERATION: &str = "generation_config.json";
/// The tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// How `transformers` should take the tokenizer.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// A chat template in a file of its own; read and exported, never made.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The run's state.
pub const RUN: &str = "run.json";
/// The run's ledger up to the checkpoint's step; absent in checkpoints of earlier builds.
pub const LEDGER: &str = "ledger.jsonl";
/// Sizes and hashes.
pub const MANIFEST: &str = "manifest.json";

/// Prefix of first moments in [`OPTIMIZER`].
const EXP_AVG: &str = "exp_avg.";
/// Prefix of second moments in [`OPTIMIZER`].
const EXP_AVG_SQ: &str = "exp_avg_sq.";

/// A checkpoint that lies on disk, with its manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifested {
    /// The checkpoint's directory.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
}

/// The checkpoints in a directory, by step. A directory that is not there holds none; unfinished ones do not count.
pub fn list_checkpoints(directory: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let mut found = Vec::new();
    if !directory.exists() {
        return Ok(found);
    }
    for entry in directory
        .read_dir()
        .map_err(CheckpointError::io("list", directory))?
    {
        let entry = entry.map_err(CheckpointError::io("list", directory))?;
        if let Some(step) = entry.file_name().to_str().and_then(parse_directory_name) {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}
