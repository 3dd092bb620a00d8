//! Opens a checkpoint or any directory in Hugging Face layout, and reads its state into flat buffers.
//!
//! Every file that a manifest names is checked against it before it is believed. Nothing is allocated because a file
//! claims it: sizes follow from `config.json`, and are compared with the file before.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::BufReader;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::adapter::Adapter;
use super::manifest::{Manifest, RunState, is_plain_name};
use super::names::{Names, Role};
use super::tensor_file::TensorFile;
use super::{
    ADAPTER, ADAPTER_CONFIG, CHAT_TEMPLATE, CONFIG, GENERATION, LEDGER, MANIFEST, OPTIMIZER, RUN,
    TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, WEIGHTS_INDEX,
};
use super::{CheckpointError, EXP_AVG, EXP_AVG_SQ, files, hex, state_hash};
use crate::hf::{self, SpecialTokens};
use crate::layout::{Layout, SCORE, TensorSpec};
use crate::spec::{LoraConfig, ModelConfig};

/// Largest `config.json`, `run.json`, index or `tokenizer.json` that is read, in bytes.
const MAX_SMALL_FILE: u64 = 256 << 20;

/// The parameters of a model, perhaps with adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// Where each of them lies.
    pub layout: Layout,
    /// All parameters, those that are frozen included.
    pub params: Vec<f32>,
    /// Trained tensors that the checkpoint does not have, which are new: adapters, or a classifier's head. They are zero.
    pub missing: Vec<String>,
}

/// AdamW's moments, in the order of the layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// First moments.
    pub exp_avg: Vec<f32>,
    /// Second moments.
    pub exp_avg_sq: Vec<f32>,
}

/// An open checkpoint. The small files are read and checked, the large ones only when asked for.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Option<Manifest>,
    model: ModelConfig,
    tokens: SpecialTokens,
    run: Option<RunState>,
    adapter: Option<Adapter>,
}

impl Checkpoint {
    /// Opens a directory. With a manifest, all its files must be there in their sizes.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::NoDirectory(dir.to_owned()));
        }
        let manifest = read_manifest(dir)?;
        if let Some(manifest) = &manifest {
            check_sizes(dir, manifest)?;
        }
        let path = dir.join(CONFIG);
        let text = read_text(dir, CONFIG, manifest.as_ref())?;
        let (model, mut tokens) =
            hf::parse_config(&text).map_err(|source| CheckpointError::Config { path, source })?;
        if dir.join(GENERATION).exists() {
            let path = dir.join(GENERATION);
            let text = read_text(dir, GENERATION, manifest.as_ref())?;
            let generation = hf::parse_special_tokens(&text)
                .map_err(|source| CheckpointError::Config { path, source })?;
            tokens.bos = generation.bos.or(tokens.bos);
            if !generation.eos.is_empty() {
                tokens.eos = generation.eos;
            }
        }
        let run = read_run(dir, manifest.as_ref())?;
        let adapter = match Adapter::is_in(dir) {
            true => Some(Adapter::open(dir, &model)?),
            false => None,
        };
        Ok(Self {
            adapter,
            dir: dir.to_owned(),
            manifest,
            model,
            tokens,
            run,
        })
    }

    /// Puts the adapters in `dir` on this base: a directory in PEFT's layout, or a checkpoint of a run that trained
    /// adapters, of which those alone are taken. A classifier's labels come with its checkpoint, as its head does.
    ///
    /// # Errors
    /// A base that has adapters already, a directory without any, and adapters that do not fit, by tensor and shape.
    pub fn with_adapter(mut self, dir: &Path) -> Result<Self, CheckpointError> {
        if self.adapter.is_some() {
            return Err(CheckpointError::Adapted(self.dir));
        }
        if !dir.is_dir() {
            return Err(CheckpointError::NoDirectory(dir.to_owned()));
        }
        if !Adapter::is_in(dir) {
            return Err(CheckpointError::NoAdapter(dir.to_owned()));
        }
        let manifest = read_manifest(dir)?;
        for name in [ADAPTER_CONFIG, ADAPTER] {
            if let Some(entry) = manifest.as_ref().and_then(|m| m.file(name)) {
                check_file(dir, entry)?;
            }
        }
        if dir.join(CONFIG).exists() && !self.model.classifies() {
            let path = dir.join(CONFIG);
            let text = read_text(dir, CONFIG, manifest.as_ref())?;
            let (model, _) = hf::parse_config(&text)
                .map_err(|source| CheckpointError::Config { path, source })?;
            self.model.labels = model.labels;
        }
        let adapter = Adapter::open(dir, &self.model)?;
        adapter.fitting(&Layout::adapted(&self.model, Some(adapter.lora())))?;
        self.adapter = Some(adapter);
        Ok(self)
    }

    /// The directory with the files that say how the model is talked to, and its manifest: that of adapters from
    /// elsewhere which bring such files, else this one.
    pub(super) fn texts(&self) -> (&Path, Option<&Manifest>) {
        let brings = |dir: &&Path| {
            *dir != self.dir
                && [TOKENIZER_CONFIG, CHAT_TEMPLATE]
                    .iter()
                    .any(|name| dir.join(name).exists())
        };
        match self.adapter.as_ref().map(Adapter::dir).filter(brings) {
            Some(dir) => (dir, None),
            None => (&self.dir, self.manifest.as_ref()),
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest; a foreign directory has none.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The model's shape.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// The shape of the adapters that stand beside the weights, if there are any.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.adapter.as_ref().map(Adapter::lora)
    }

    /// Ids for generation; `generation_config.json` wins over `config.json`.
    pub fn tokens(&self) -> &SpecialTokens {
        &self.tokens
    }

    /// Where the run stood that wrote this; a foreign directory has none.
    pub fn run(&self) -> Option<&RunState> {
        self.run.as_ref()
    }

    /// Content of `tokenizer.json`.
    pub fn tokenizer(&self) -> Result<Vec<u8>, CheckpointError> {
        read_small(&self.dir, TOKENIZER, self.manifest.as_ref())
    }

    /// `ledger.jsonl`, compared with the manifest and open for reading; `None` where the manifest names none, as in
    /// checkpoints of earlier builds.
    pub fn ledger(&self) -> Result<Option<BufReader<fs::File>>, CheckpointError> {
        let Some(entry) = self.manifest.as_ref().and_then(|m| m.file(LEDGER)) else {
            return Ok(None);
        };
        check_file(&self.dir, entry)?;
        let path = self.dir.join(LEDGER);
        let file = fs::File::open(&path).map_err(CheckpointError::io("read", &path))?;
        Ok(Some(BufReader::new(file)))
    }

    /// BLAKE3 of the weights: of `model.safetensors`, or of the index of a sharded model and all its files.
    pub fn weights_hash(&self) -> Result<[u8; 32], CheckpointError> {
        if let Some(entry) = self.manifest.as_ref().and_then(|m| m.file(WEIGHTS)) {
            return Ok(entry.blake3);
        }
        let files = self.weight_files()?;
        if let [one] = files.as_slice() {
            return Ok(files::hash_file(one)?.1);
        }
        let mut hasher = blake3::Hasher::new();
        for file in &files {
            hasher.update(&files::hash_file(file)?.1);
        }
        Ok(hasher.finalize().into())
    }

    /// Reads the parameters, and the adapters beside them. F32, F16 and BF16 become f32.
    pub fn weights(&self) -> Result<Loaded, CheckpointError> {
        self.load(&self.model, self.lora())
    }

    /// Reads the parameters to where a model of shape `model` with the adapters `lora` has them. It may have another head
    /// than the checkpoint, and adapters that the checkpoint does not have; those are [`Loaded::missing`].
    pub fn load(
        &self,
        model: &ModelConfig,
        lora: Option<&LoraConfig>,
    ) -> Result<Loaded, CheckpointError> {
        let layout = Layout::adapted(model, lora);
        let names = Names::of(&self.model);
        let mut files = Vec::new();
        for path in self.weight_files()? {
            self.check_hash(&path)?;
            files.push(TensorFile::open(path)?);
        }
        self.check_index(&files)?;
        let mut seen = self.check_weights(&names, &files)?;
        let mut params = vec![0.0; layout.total()];
        for file in &mut files {
            file.read_each(|tensor, read| match names.role(&tensor.name) {
                Role::Parameter(spec) => match layout.get(&spec.name) {
                    Some(spec) => read.into_slice(&mut params[spec.range()]),
                    None => Ok(()),
                },
                Role::ZeroBias(_) => read.must_be_zero(),
                Role::Ignored | Role::Unexpected => Ok(()),
            })?;
        }
        if let Some(adapter) = self.adapter.as_ref().filter(|_| lora.is_some()) {
            self.check_hash(&adapter.file())?;
            seen.extend(adapter.read(&layout, &mut params)?);
        }
        let new = layout.tensors().iter().filter(|t| !seen.contains(&t.name));
        let missing = new.map(|t| t.name.clone()).collect();
        Ok(Loaded {
            layout,
            params,
            missing,
        })
    }

    /// Whether there are moments of an optimizer.
    pub fn has_moments(&self) -> bool {
        self.dir.join(OPTIMIZER).exists()
    }

    /// Reads the optimizer's moments; `None` if the directory holds none.
    pub fn moments(&self) -> Result<Option<Moments>, CheckpointError> {
        let len = Layout::adapted(&self.model, self.lora()).len();
        let whole = self.moments_of(std::slice::from_ref(&(0..len)))?;
        Ok(whole.and_then(|mut whole| whole.pop()))
    }

    /// The moments of some stretches of the layout, without the memory of the others; `None` if there are none.
    ///
    /// # Errors
    /// As [`Self::moments`].
    ///
    /// # Panics
    /// If a stretch lies outside the layout.
    pub fn moments_of(
        &self,
        stretches: &[Range<usize>],
    ) -> Result<Option<Vec<Moments>>, CheckpointError> {
        if !self.has_moments() {
            return Ok(None);
        }
        let path = self.dir.join(OPTIMIZER);
        self.check_hash(&path)?;
        let layout = Layout::adapted(&self.model, self.lora());
        let mut file = TensorFile::open(path)?;
        for prefix in [EXP_AVG, EXP_AVG_SQ] {
            for spec in layout.tensors() {
                file.check_present(&format!("{prefix}{}", spec.name), &spec.shape)?;
            }
        }
        let zeros = |stretch: &Range<usize>| Moments {
            exp_avg: vec![0.0; stretch.len()],
            exp_avg_sq: vec![0.0; stretch.len()],
        };
        let mut moments: Vec<Moments> = stretches.iter().map(zeros).collect();
        for (stretch, moments) in stretches.iter().zip(&mut moments) {
            assert!(stretch.end <= layout.len(), "{stretch:?} of the moments");
            file.read_each(|tensor, read| {
                let of = |prefix| {
                    let name = tensor.name.strip_prefix(prefix);
                    name.and_then(|name| layout.get(name))
                };
                let (spec, buffer) = match (of(EXP_AVG), of(EXP_AVG_SQ)) {
                    (Some(spec), _) => (spec, &mut moments.exp_avg),
                    (_, Some(spec)) => (spec, &mut moments.exp_avg_sq),
                    _ => return Err(read.unexpected()),
                };
                let range = spec.range();
                let (from, to) = (range.start.max(stretch.start), range.end.min(stretch.end));
                if from >= to {
                    return Ok(());
                }
                let out = &mut buffer[from - stretch.start..to - stretch.start];
                read.into_part(from - range.start, out)
            })?;
        }
        Ok(Some(moments))
    }

    /// Checks everything there is to check: every file's size and hash, and the state hash over the whole state.
    /// Needs a manifest. Returns the bytes that were checked.
    pub fn verify(&self) -> Result<u64, CheckpointError> {
        let manifest = verify_files(&self.dir)?;
        let loaded = self.weights()?;
        let params = &loaded.params[..loaded.layout.len()];
        let moments = self.moments()?;
        let moments =
            moments.ok_or_else(|| CheckpointError::MissingFile(self.dir.join(OPTIMIZER)))?;
        let found = state_hash(params, &moments.exp_avg, &moments.exp_avg_sq);
        let in_run = self.run.as_ref().map_or(found, |run| run.state_hash);
        match found == manifest.state_hash && found == in_run {
            true => Ok(manifest.bytes()),
            false => Err(CheckpointError::WrongState {
                path: self.dir.clone(),
                expected: hex::encode(&manifest.state_hash),
                found: hex::encode(&found),
            }),
        }
    }

    /// The files that hold the parameters, sorted by name.
    pub fn weight_files(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        let Some(index) = self.weight_index()? else {
            return Ok(vec![self.dir.join(WEIGHTS)]);
        };
        let names: BTreeSet<String> = index.into_values().collect();
        Ok(names.iter().map(|name| self.dir.join(name)).collect())
    }

    /// Which file holds which tensor, where the model is sharded. A single file wins over an index beside it, as it
    /// does with `transformers`.
    fn weight_index(&self) -> Result<Option<BTreeMap<String, String>>, CheckpointError> {
        let (single, index) = (self.dir.join(WEIGHTS), self.dir.join(WEIGHTS_INDEX));
        if single.exists() || !index.exists() {
            return Ok(None);
        }
        let content = read_small(&self.dir, WEIGHTS_INDEX, self.manifest.as_ref())?;
        let malformed = |reason: String| CheckpointError::malformed(&index, reason);
        let value: serde_json::Value =
            serde_json::from_slice(&content).map_err(|e| malformed(e.to_string()))?;
        let map = value["weight_map"].as_object();
        let map = map.ok_or_else(|| malformed("it has no `weight_map`".into()))?;
        let files = map.iter().map(|(tensor, file)| {
            let name = file.as_str().filter(|name| is_plain_name(name));
            let name = name.ok_or_else(|| malformed(format!("`{file}` is not a plain file name")));
            Ok((tensor.clone(), name?.to_owned()))
        });
        files.collect::<Result<_, _>>().map(Some)
    }

    /// Every tensor of the index is in the file that the index names.
    fn check_index(&self, files: &[TensorFile]) -> Result<(), CheckpointError> {
        for (tensor, name) in self.weight_index()?.unwrap_or_default() {
            let path = self.dir.join(&name);
            let file = files.iter().find(|file| file.path() == path);
            if !file.is_some_and(|file| file.tensors().iter().any(|t| t.name == tensor)) {
                let reason =
                    format!("it places tensor `{tensor}` in `{name}`, which does not hold it");
                let index = self.dir.join(WEIGHTS_INDEX);
                return Err(CheckpointError::malformed(&index, reason));
            }
        }
        Ok(())
    }

    fn check_hash(&self, path: &Path) -> Result<(), CheckpointError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match self.manifest.as_ref().and_then(|m| m.file(&name)) {
            Some(entry) => check_file(&self.dir, entry),
            None => Ok(()),
        }
    }

    /// Every tensor of the model is there once, in its shape, and no other. Returns their names. Beside an adapter, the
    /// head of a classifier may be there alone.
    fn check_weights(
        &self,
        names: &Names,
        files: &[TensorFile],
    ) -> Result<BTreeSet<String>, CheckpointError> {
        let mut seen = BTreeSet::new();
        for file in files {
            for tensor in file.tensors() {
                let (spec, parameter) = match names.role(&tensor.name) {
                    Role::Parameter(spec) => (spec, true),
                    Role::ZeroBias(spec) => (spec, false),
                    Role::Ignored => continue,
                    Role::Unexpected => return Err(file.unexpected(&tensor.name)),
                };
                file.check_present(&tensor.name, &spec.shape)?;
                if parameter && !seen.insert(spec.name.clone()) {
                    let reason = format!("tensor `{}` is there twice", spec.name);
                    return Err(CheckpointError::malformed(file.path(), reason));
                }
            }
        }
        let optional = |t: &TensorSpec| self.adapter.is_some() && t.name == SCORE;
        let mut wanted = names.layout().tensors().iter();
        match wanted.find(|t| !seen.contains(&t.name) && !optional(t)) {
            None => Ok(seen),
            Some(missing) => Err(CheckpointError::MissingTensor {
                path: match files {
                    [one] => one.path().to_owned(),
                    _ => self.dir.join(WEIGHTS_INDEX),
                },
                name: missing.name.clone(),
            }),
        }
    }
}

/// Checks size and hash of every file that the manifest in `dir` names.
pub fn verify_files(dir: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(dir)?;
    let manifest = manifest.ok_or_else(|| CheckpointError::MissingFile(dir.join(MANIFEST)))?;
    check_sizes(dir, &manifest)?;
    for entry in &manifest.files {
        check_file(dir, entry)?;
    }
    Ok(manifest)
}

fn read_manifest(dir: &Path) -> Result<Option<Manifest>, CheckpointError> {
    let path = dir.join(MANIFEST);
    if !path.exists() {
        // Our own weights without their manifest are half a checkpoint, not a foreign directory.
        return match dir.join(RUN).exists() {
            true => Err(CheckpointError::MissingFile(path)),
            false => Ok(None),
        };
    }
    let text = read_text(dir, MANIFEST, None)?;
    let manifest = Manifest::parse(&text).map_err(|e| CheckpointError::malformed(&path, e))?;
    Ok(Some(manifest))
}

fn check_sizes(dir: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    for entry in &manifest.files {
        let path = dir.join(&entry.name);
        let found = fs::metadata(&path)
            .map_err(CheckpointError::io("read", &path))?
            .len();
        if found != entry.bytes {
            return Err(CheckpointError::WrongSize {
                path,
                expected: entry.bytes,
                found,
            });
        }
    }
    Ok(())
}

fn check_file(dir: &Path, entry: &super::FileEntry) -> Result<(), CheckpointError> {
    let path = dir.join(&entry.name);
    let (_, found) = files::hash_file(&path)?;
    match found == entry.blake3 {
        true => Ok(()),
        false => Err(CheckpointError::WrongHash {
            path,
            expected: hex::encode(&entry.blake3),
            found: hex::encode(&found),
        }),
    }
}

fn read_run(dir: &Path, manifest: Option<&Manifest>) -> Result<Option<RunState>, CheckpointError> {
    if manifest.is_none_or(|m| m.file(RUN).is_none()) {
        return Ok(None);
    }
    let content = read_small(dir, RUN, manifest)?;
    let run = serde_json::from_slice(&content);
    run.map(Some)
        .map_err(|e| CheckpointError::malformed(&dir.join(RUN), e))
}

pub(super) fn read_text(
    dir: &Path,
    name: &str,
    manifest: Option<&Manifest>,
) -> Result<String, CheckpointError> {
    let content = read_small(dir, name, manifest)?;
    String::from_utf8(content).map_err(|e| CheckpointError::malformed(&dir.join(name), e))
}

/// Reads a file that fits into memory, and checks it against the manifest.
fn read_small(
    dir: &Path,
    name: &str,
    manifest: Option<&Manifest>,
) -> Result<Vec<u8>, CheckpointError> {
    let path = dir.join(name);
    let bytes = fs::metadata(&path)
        .map_err(CheckpointError::io("read", &path))?
        .len();
    if bytes > MAX_SMALL_FILE {
        let reason = format!("it has {bytes} bytes; at most {MAX_SMALL_FILE} are read");
        return Err(CheckpointError::malformed(&path, reason));
    }
    let content = fs::read(&path).map_err(CheckpointError::io("read", &path))?;
    if let Some(entry) = manifest.and_then(|m| m.file(name)) {
        let found = blake3::hash(&content);
        if *found.as_bytes() != entry.blake3 {
            return Err(CheckpointError::WrongHash {
                path,
                expected: hex::encode(&entry.blake3),
                found: found.to_hex().to_string(),
            });
        }
    }
    Ok(content)
}
