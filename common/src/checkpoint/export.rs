//! Copies the part of a checkpoint that others read into a directory of its own.

use std::path::{Path, PathBuf};

use super::files::UnfinishedDir;
use super::{
    ADAPTER, ADAPTER_CONFIG, CHAT_TEMPLATE, CONFIG, Checkpoint, CheckpointError, GENERATION,
    TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, WEIGHTS_INDEX, check_target, hex,
};

/// Copies weights, config and tokenizer of `checkpoint` to `target`, which must not exist or be empty; of a checkpoint
/// with adapters those alone, in PEFT's layout. The copy is compared with the manifest and appears whole or not at all.
/// Returns the files that were written.
pub fn export(checkpoint: &Path, target: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let opened = Checkpoint::open(checkpoint)?;
    check_target(target)?;
    if !checkpoint.join(WEIGHTS).exists() && checkpoint.join(WEIGHTS_INDEX).exists() {
        let reason = "a sharded model of another program is in Hugging Face layout already";
        return Err(CheckpointError::malformed(checkpoint, reason));
    }
    let dir = UnfinishedDir::create(target)?;
    let mut names = Vec::new();
    let (weights, config) = match opened.lora() {
        Some(_) => (ADAPTER, ADAPTER_CONFIG),
        None => (WEIGHTS, CONFIG),
    };
    let mut wanted = vec![weights, config, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE];
    if opened.lora().is_none() {
        wanted.push(GENERATION);
    }
    for name in wanted {
        let from = checkpoint.join(name);
        let required = name == weights || name == config;
        if !required && !from.exists() {
            continue;
        }
        let copy = dir.copy_file(&from, name)?;
        if let Some(entry) = opened.manifest().and_then(|m| m.file(name))
            && entry.blake3 != copy.blake3
        {
            return Err(CheckpointError::WrongHash {
                path: from,
                expected: hex::encode(&entry.blake3),
                found: hex::encode(&copy.blake3),
            });
        }
        names.push(name);
    }
    let target = dir.publish()?;
    Ok(names.into_iter().map(|name| target.join(name)).collect())
}
