//! Writes a model that is in memory as a directory in Hugging Face layout, whole or not at all.

use std::path::{Path, PathBuf};

use super::files::{HashedFile, UnfinishedDir};
use super::names::zero_biases;
use super::writer::weights_header;
use super::{
    CHAT_TEMPLATE, CONFIG, Checkpoint, CheckpointError, GENERATION, TOKENIZER, TOKENIZER_CONFIG,
    WEIGHTS, bytes_of,
};
use crate::hf;
use crate::layout::Layout;

/// Nothing lies at `target` that a new directory would have to replace: it does not exist, or is an empty directory.
///
/// # Errors
/// [`CheckpointError::Exists`].
pub fn check_target(target: &Path) -> Result<(), CheckpointError> {
    match target.read_dir().is_ok_and(|mut d| d.next().is_some()) || target.is_file() {
        true => Err(CheckpointError::Exists(target.to_owned())),
        false => Ok(()),
    }
}

/// Writes `params`, the parameters of the model of `source` in the order of [`Layout::of`], as f32 to `target`, with the
/// tokenizer, chat template and ids of `source`. Returns the files that were written.
///
/// # Errors
/// What the file system says, and a `target` that exists and is not empty.
///
/// # Panics
/// If `params` has another length than the model.
pub fn write_model(
    target: &Path,
    source: &Checkpoint,
    params: &[f32],
) -> Result<Vec<PathBuf>, CheckpointError> {
    let (model, tokens) = (source.model(), source.tokens());
    let layout = Layout::of(model);
    assert_eq!(params.len(), layout.len(), "parameters of another model");
    check_target(target)?;
    let dir = UnfinishedDir::create(target)?;
    let zeros = zero_biases(model);
    let mut weights = HashedFile::create(dir.file(WEIGHTS))?;
    weights.write(&weights_header(&layout, &zeros))?;
    weights.write(bytes_of(params))?;
    let zero_bytes = zeros.iter().map(|t| 4 * t.len() as u64);
    weights.write_zeros(zero_bytes.sum())?;
    weights.finish(WEIGHTS)?;
    dir.write_file(CONFIG, hf::config_json(model, tokens).as_bytes())?;
    let mut names = vec![WEIGHTS, CONFIG, GENERATION];
    let generation = source.dir().join(GENERATION);
    match generation.exists() {
        true => dir.copy_file(&generation, GENERATION)?,
        false => dir.write_file(GENERATION, hf::generation_config_json(tokens).as_bytes())?,
    };
    let (texts, _) = source.texts();
    let others = [
        (source.dir(), TOKENIZER),
        (texts, TOKENIZER_CONFIG),
        (texts, CHAT_TEMPLATE),
    ];
    for (from, name) in others {
        let from = from.join(name);
        if from.exists() {
            dir.copy_file(&from, name)?;
            names.push(name);
        }
    }
    let target = dir.publish()?;
    Ok(names.into_iter().map(|name| target.join(name)).collect())
}
