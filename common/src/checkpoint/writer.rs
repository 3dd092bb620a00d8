//! Writes a checkpoint from a stream of the state, in bounded memory, so that it appears whole or not at all.
//!
//! The state arrives as it lies in the flat buffers: all parameters, then all first moments, then all second moments,
//! f32 little-endian, cut anywhere. The files' headers depend on the model alone, so every byte is written, and hashed
//! for the manifest and for the state hash, when it comes.

use std::path::{Path, PathBuf};

use super::files::{HashedFile, UnfinishedDir};
use super::manifest::{FORMAT, Manifest, RunState};
use super::names::zero_biases;
use super::state_hash::{F32, StateHasher};
use super::{
    ADAPTER, ADAPTER_CONFIG, CONFIG, GENERATION, LEDGER, MANIFEST, OPTIMIZER, RUN, TOKENIZER,
    TOKENIZER_CONFIG, WEIGHTS, WEIGHTS_INDEX,
};
use super::{Checkpoint, CheckpointError, EXP_AVG, EXP_AVG_SQ, Manifested, adapter, hex, tensors};
use crate::hf::{self, SpecialTokens};
use crate::layout::{Layout, TensorSpec};
use crate::spec::ModelConfig;

/// What a checkpoint holds besides the state.
#[derive(Clone, Debug)]
pub struct CheckpointMeta {
    /// Ids for generation.
    pub tokens: SpecialTokens,
    /// Content of `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// The chat template, for a model that has learned one.
    pub chat_template: Option<String>,
    /// Where the run stands; `state_hash` is filled in by the writer. The model is `run.spec.model`.
    pub run: RunState,
    /// Content of `ledger.jsonl`: the run's ledger up to `run.step`, one entry a line.
    pub ledger: Vec<u8>,
    /// Where the weights lie that the adapters stand beside, in a run that trains adapters.
    pub base: Option<PathBuf>,
}

impl CheckpointMeta {
    /// The file of what is trained.
    fn weights_file(&self) -> &'static str {
        match self.run.spec.lora {
            Some(_) => ADAPTER,
            None => WEIGHTS,
        }
    }
}

/// A checkpoint that is being written. Dropped before [`CheckpointWriter::finish`], it leaves nothing behind.
pub struct CheckpointWriter {
    meta: CheckpointMeta,
    dir: UnfinishedDir,
    weights: HashedFile,
    optimizer: HashedFile,
    hasher: StateHasher,
    /// Bytes of the parameters alone.
    params_bytes: u64,
    /// Bytes received of parameters and both moments.
    position: u64,
    /// Bytes of zero biases that follow the parameters in the file.
    zero_bytes: u64,
}

impl CheckpointWriter {
    /// Begins a checkpoint that will appear as `target`, which must not exist when it is finished.
    pub fn create(target: &Path, meta: CheckpointMeta) -> Result<Self, CheckpointError> {
        let spec = &meta.run.spec;
        let layout = spec.layout();
        let zeros = match spec.lora {
            Some(_) => Vec::new(),
            None => zero_biases(&spec.model),
        };
        let dir = UnfinishedDir::create(target)?;
        let mut weights = HashedFile::create(dir.file(meta.weights_file()))?;
        weights.write(&match spec.lora {
            Some(_) => adapter_header(&layout),
            None => weights_header(&layout, &zeros),
        })?;
        let mut optimizer = HashedFile::create(dir.file(OPTIMIZER))?;
        optimizer.write(&optimizer_header(&layout))?;
        Ok(Self {
            meta,
            dir,
            weights,
            optimizer,
            hasher: StateHasher::new(layout.len()),
            params_bytes: layout.len() as u64 * F32,
            position: 0,
            zero_bytes: zeros.iter().map(|t| t.len() as u64 * F32).sum(),
        })
    }

    /// Bytes that [`CheckpointWriter::write`] takes in all.
    pub fn state_bytes(&self) -> u64 {
        3 * self.params_bytes
    }

    /// Takes the next bytes of the state, cut anywhere.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let found = self.position + bytes.len() as u64;
        if found > self.state_bytes() {
            return Err(self.wrong_length(found));
        }
        self.hasher.update(bytes);
        let split = bytes
            .len()
            .min(self.params_bytes.saturating_sub(self.position) as usize);
        let (params, moments) = bytes.split_at(split);
        self.weights.write(params)?;
        self.optimizer.write(moments)?;
        self.position = found;
        Ok(())
    }

    /// Completes the checkpoint: verifies the state against `expected`, where it is known, writes the small files and
    /// the manifest, flushes everything and gives the directory its name.
    ///
    /// A whole checkpoint of the same state that is already there stays and is returned, so that steps replayed after
    /// a resume write the same again; a damaged one is replaced; any other is an error.
    pub fn finish(mut self, expected: Option<[u8; 32]>) -> Result<Manifested, CheckpointError> {
        if self.position != self.state_bytes() {
            return Err(self.wrong_length(self.position));
        }
        let state_hash = self.hasher.finish();
        let path = self.dir.target().to_owned();
        if let Some(expected) = expected.filter(|e| *e != state_hash) {
            return Err(CheckpointError::WrongState {
                path,
                expected: hex::encode(&expected),
                found: hex::encode(&state_hash),
            });
        }
        if let Some(existing) = existing_checkpoint(&path, state_hash)? {
            return Ok(existing);
        }
        self.weights.write_zeros(self.zero_bytes)?;
        self.meta.run.state_hash = state_hash;
        let mut files = vec![
            self.weights.finish(self.meta.weights_file())?,
            self.optimizer.finish(OPTIMIZER)?,
        ];
        for (name, content) in small_files(&self.meta) {
            files.push(self.dir.write_file(name, &content)?);
        }
        if let Some(base) = &self.meta.base {
            for file in Checkpoint::open(base)?.weight_files()? {
                files.push(self.dir.link_file(&file)?);
            }
            let index = base.join(WEIGHTS_INDEX);
            if !base.join(WEIGHTS).exists() && index.exists() {
                files.push(self.dir.link_file(&index)?);
            }
        }
        let manifest = Manifest {
            format: FORMAT,
            step: self.meta.run.step,
            state_hash,
            files,
        };
        self.dir
            .write_file(MANIFEST, manifest.to_json().as_bytes())?;
        match self.dir.publish() {
            Ok(path) => Ok(Manifested { path, manifest }),
            // Somebody else wrote the same meanwhile: a worker that was given up after all of its state had come, say.
            Err(CheckpointError::Exists(path)) => {
                existing_checkpoint(&path, state_hash)?.ok_or(CheckpointError::Exists(path))
            }
            Err(error) => Err(error),
        }
    }

    fn wrong_length(&self, found: u64) -> CheckpointError {
        CheckpointError::WrongLength {
            path: self.dir.target().to_owned(),
            expected: self.state_bytes(),
            found,
        }
    }
}

/// The checkpoint at `path`, if it is whole and of this state. A damaged one is removed.
fn existing_checkpoint(
    path: &Path,
    state_hash: [u8; 32],
) -> Result<Option<Manifested>, CheckpointError> {
    if !path.join(MANIFEST).exists() {
        return Ok(None);
    }
    match super::verify_files(path) {
        Ok(manifest) if manifest.state_hash == state_hash => Ok(Some(Manifested {
            path: path.to_owned(),
            manifest,
        })),
        Ok(_) => Err(CheckpointError::Exists(path.to_owned())),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "replacing a damaged checkpoint");
            let removed = std::fs::remove_dir_all(path);
            removed.map_err(CheckpointError::io("replace", path))?;
            Ok(None)
        }
    }
}

/// The files of a checkpoint that fit into memory.
fn small_files(meta: &CheckpointMeta) -> Vec<(&'static str, Vec<u8>)> {
    let model: &ModelConfig = &meta.run.spec.model;
    let run = serde_json::to_string_pretty(&meta.run).expect("a run state is plain data") + "\n";
    let template = meta.chat_template.as_deref();
    let tokenizer_config =
        hf::tokenizer_config_json(model, &meta.tokens, &meta.tokenizer, template);
    let mut files = vec![
        (CONFIG, hf::config_json(model, &meta.tokens).into_bytes()),
        (
            GENERATION,
            hf::generation_config_json(&meta.tokens).into_bytes(),
        ),
        (TOKENIZER, meta.tokenizer.clone()),
        (TOKENIZER_CONFIG, tokenizer_config.into_bytes()),
        (RUN, run.into_bytes()),
        (LEDGER, meta.ledger.clone()),
    ];
    if let Some(lora) = &meta.run.spec.lora {
        let base = meta.run.spec.start.as_ref();
        let base = base.map_or("", |start| start.source.as_str());
        let config = adapter::config_json(lora, model, base);
        files.push((ADAPTER_CONFIG, config.into_bytes()));
    }
    files
}

/// The header of a file of adapters.
fn adapter_header(layout: &Layout) -> Vec<u8> {
    let tensors = layout.tensors().iter();
    tensors::header(tensors.map(|t| (adapter::file_name_of(t), t.shape.as_slice())))
}

/// The header of a file of weights.
pub(super) fn weights_header(layout: &Layout, zeros: &[TensorSpec]) -> Vec<u8> {
    let tensors = layout.tensors().iter().chain(zeros);
    tensors::header(tensors.map(|t| (t.name.clone(), t.shape.as_slice())))
}

fn optimizer_header(layout: &Layout) -> Vec<u8> {
    let moments = [EXP_AVG, EXP_AVG_SQ].into_iter();
    tensors::header(moments.flat_map(|moment| {
        let named = move |t: &TensorSpec| format!("{moment}{}", t.name);
        layout
            .tensors()
            .iter()
            .map(move |t| (named(t), t.shape.as_slice()))
    }))
}

/// Writes a whole state that is in memory. The three slices are flat buffers of the model in `meta`.
pub fn write_checkpoint(
    target: &Path,
    meta: CheckpointMeta,
    params: &[f32],
    exp_avg: &[f32],
    exp_avg_sq: &[f32],
) -> Result<PathBuf, CheckpointError> {
    let mut writer = CheckpointWriter::create(target, meta)?;
    for buffer in [params, exp_avg, exp_avg_sq] {
        writer.write(super::bytes_of(buffer))?;
    }
    Ok(writer.finish(None)?.path)
}
