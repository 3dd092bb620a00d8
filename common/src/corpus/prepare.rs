//! Prepares a corpus: hash the files (and stop if the same request was met before), scan the text, select documents where
//! that is asked for, decide the split, make the tokenizer, encode into shards, publish.
//!
//! Each stage streams over the files anew, so memory does not grow with the corpus, but for 16 bytes per document (the
//! split key, and a copy that is sorted), what a selection needs (see `select/`) and the bounded sample for BPE.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rayon::prelude::*;

use super::batches::{BatchEncoder, Here};
use super::encode::{Encoder, Routed, Router};
use super::error::{BadInput, CorpusError, Problem};
use super::index::{CorpusIndex, FORMAT_VERSION, OptionsSummary, SourceSummary, TokenizerSummary};
use super::kept::Kept;
use super::objective::{Objective, SupervisedConfig, texts_of};
use super::scan::{FileScan, Scan};
use super::select::{SELECTION_VERSION, Selection, Selector};
use super::shard::DEFAULT_SHARD_TOKENS;
use super::source::{SourceFile, Sources};
use super::split::{Split, SplitConfig, SplitMethod, SplitPlan, plan};
use super::store::{Corpus, Unfinished, by_request};
use super::supervise::{Sampler, Supervisor, labels_of};
use super::text::{Event, ReadOptions, read_documents};
use super::tokenizer::{Tokenizer, TokenizerConfig};
use super::train::{BpeTraining, char_tokenizer};
use crate::supervised::{DEFAULT_TEMPLATE, Record};

/// Text that BPE is trained on at most, unless asked otherwise.
pub const DEFAULT_SAMPLE_BYTES: u64 = 32 << 20;
const MAX_SHARD_TOKENS: u64 = 1 << 30;
const LISTED_SOURCES: usize = 20;

/// What a corpus is to be made of, and how.
#[derive(Clone, Debug)]
pub struct PrepareRequest {
    /// What people will call it.
    pub name: String,
    /// The files, in order.
    pub sources: Sources,
    /// The tokenizer.
    pub tokenizer: TokenizerConfig,
    /// The split into train and validation.
    pub split: SplitConfig,
    /// The field of `.jsonl` lines that holds the text.
    pub text_field: String,
    /// Leave out files and lines that cannot be used, and report them, instead of failing.
    pub skip_bad: bool,
    /// Bytes of training text that BPE is trained on at most.
    pub sample_bytes: u64,
    /// Tokens per shard.
    pub shard_tokens: u64,
    /// Bound on the unpacked bytes of one file.
    pub max_file_bytes: Option<u64>,
    /// Read lines as supervised samples; `None` is plain text.
    pub supervised: Option<SupervisedConfig>,
    /// Which documents stay.
    pub selection: Selection,
}

impl PrepareRequest {
    /// A request with the default options.
    pub fn new(
        name: impl Into<String>,
        sources: impl Into<Sources>,
        tokenizer: TokenizerConfig,
    ) -> Self {
        Self {
            name: name.into(),
            sources: sources.into(),
            tokenizer,
            split: SplitConfig::default(),
            text_field: "text".to_string(),
            skip_bad: false,
            sample_bytes: DEFAULT_SAMPLE_BYTES,
            shard_tokens: DEFAULT_SHARD_TOKENS,
            max_file_bytes: None,
            supervised: None,
            selection: Selection::default(),
        }
    }

    /// Samples go to one side whole.
    fn split_of_samples(&self) -> SplitConfig {
        match self.supervised {
            Some(_) => SplitConfig {
                method: SplitMethod::Document,
                ..self.split
            },
            None => self.split,
        }
    }
}

/// A stage of the preparation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Hashing the files.
    Hash,
    /// Reading and checking the text.
    Scan,
    /// Filtering, and looking for duplicates.
    Select,
    /// Making the tokenizer.
    Tokenizer,
    /// Encoding and writing shards.
    Encode,
}

/// How far the preparation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The stage.
    pub stage: Stage,
    /// Bytes of the source files, as they are, that the stage has passed.
    pub done: u64,
    /// Bytes of the source files.
    pub total: u64,
}

/// The outcome.
#[derive(Debug)]
pub struct Prepared {
    /// The corpus.
    pub corpus: Corpus,
    /// Whether it was there before, of this request or of another one that gives the same tokens.
    pub reused: bool,
}

/// Prepares the corpus that `request` describes in `directory`, or finds the one that the same request has given before.
/// Runs on the calling thread and on rayon's current pool, and calls `progress` often, from the calling thread.
///
/// The same request (contents, order, groups, options, tokenizer; names and places do not matter) always gives the same
/// fingerprint, for any number of threads. A corpus that is there is called by the request's name, too. Nothing is left
/// behind in `directory` after an error.
pub fn prepare(
    directory: &Path,
    request: &PrepareRequest,
    progress: &dyn Fn(Progress),
) -> Result<Prepared, CorpusError> {
    prepare_with(directory, request, &Here, progress)
}

/// The same, where plain text is encoded by `batches`. Supervised samples are encoded here.
pub fn prepare_with(
    directory: &Path,
    request: &PrepareRequest,
    batches: &dyn BatchEncoder,
    progress: &dyn Fn(Progress),
) -> Result<Prepared, CorpusError> {
    check_options(request)?;
    let job = Job::new(request, progress)?;
    let key = job.request_key()?;
    if let Some(mut corpus) = by_request(directory, &key) {
        corpus.call(&request.name)?;
        return Ok(Prepared {
            corpus,
            reused: true,
        });
    }
    let mut scan = job.scan()?;
    if !request.selection.is_empty() {
        job.select(directory, &mut scan)?;
    }
    let plan = plan(&request.split_of_samples(), &scan.kept_keys(), scan.chars)?;
    let tokenizer = Arc::new(job.make_tokenizer(&scan, plan)?);
    let unfinished = Unfinished::create(directory)?;
    // A tokenizer that is trained may come out otherwise in another version.
    let kept = || {
        let tokenizer = &tokenizer.fingerprint()[..16];
        Kept::open(directory, &format!("{key}-{tokenizer}"))
    };
    let batches = (batches, &kept as &dyn Fn() -> Kept);
    let index = job.encode(&scan, plan, &tokenizer, batches, unfinished.path())?;
    job.check_unchanged()?;
    let (mut corpus, reused) = unfinished.publish(&index, &tokenizer, &key)?;
    corpus.call(&request.name)?;
    Ok(Prepared { corpus, reused })
}

/// The corpus that the same request has given before in `directory`, if there is one. Reads the files, to hash them, and
/// writes nothing.
pub fn prepared(directory: &Path, request: &PrepareRequest) -> Result<Option<Corpus>, CorpusError> {
    check_options(request)?;
    let key = Job::new(request, &|_| ())?.request_key()?;
    Ok(by_request(directory, &key))
}

fn check_options(request: &PrepareRequest) -> Result<(), CorpusError> {
    if request.shard_tokens == 0 || request.shard_tokens > MAX_SHARD_TOKENS {
        return Err(CorpusError::BadOption {
            option: "corpus.shard_tokens",
            value: request.shard_tokens.to_string(),
            bound: "from 1 to 1073741824",
        });
    }
    if let Some(supervised) = &request.supervised
        && !(2..=request.shard_tokens as usize).contains(&supervised.row)
    {
        return Err(CorpusError::BadOption {
            option: "model.context",
            value: supervised.row.to_string(),
            bound: "at least 2, and at most the tokens of a shard",
        });
    }
    if request.sample_bytes == 0 {
        return Err(CorpusError::BadOption {
            option: "tokenizer.sample_bytes",
            value: "0".to_string(),
            bound: "at least 1",
        });
    }
    request.selection.check()?;
    if let TokenizerConfig::Bpe { vocab_size } = request.tokenizer {
        BpeTraining::new(vocab_size)?;
    }
    if let TokenizerConfig::File { json, eos } = &request.tokenizer {
        Tokenizer::from_json(json, eos.as_deref())?;
    }
    Ok(())
}

/// Size and time of change: what tells that a file is still the one that was hashed.
type Stamp = Option<(u64, Option<SystemTime>)>;

fn stamp(file: &SourceFile) -> Stamp {
    let metadata = file.path.metadata().ok()?;
    Some((metadata.len(), metadata.modified().ok()))
}

/// One preparation under way.
struct Job<'a> {
    request: &'a PrepareRequest,
    options: ReadOptions,
    stamps: Vec<Stamp>,
    total: u64,
    progress: &'a dyn Fn(Progress),
}

impl<'a> Job<'a> {
    fn new(
        request: &'a PrepareRequest,
        progress: &'a dyn Fn(Progress),
    ) -> Result<Self, CorpusError> {
        let stamps: Vec<Stamp> = request.sources.files.iter().map(stamp).collect();
        Ok(Self {
            request,
            options: ReadOptions {
                text_field: request.text_field.clone(),
                max_file_bytes: request.max_file_bytes,
                supervised: request.supervised.clone(),
            },
            total: stamps.iter().flatten().map(|(bytes, _)| bytes).sum(),
            stamps,
            progress,
        })
    }

    fn files(&self) -> &'a [SourceFile] {
        &self.request.sources.files
    }

    fn report(&self, stage: Stage, done: u64) {
        (self.progress)(Progress {
            stage,
            done,
            total: self.total,
        });
    }

    /// A key that is the same for requests that give the same tokens: a hash of the files' contents and of the options.
    fn request_key(&self) -> Result<String, CorpusError> {
        const FILES_AT_A_TIME: usize = 64;
        let request = self.request;
        let mut hasher = blake3::Hasher::new_derive_key("cohort corpus request");
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(&FORMAT_VERSION.to_le_bytes());
        match &request.tokenizer {
            TokenizerConfig::Bpe { vocab_size } => {
                part(format!("bpe {vocab_size} {}", request.sample_bytes).as_bytes())
            }
            TokenizerConfig::Char => part(b"char"),
            TokenizerConfig::File { json, eos } => {
                part(json);
                part(format!("{eos:?}").as_bytes());
            }
        }
        let split = format!(
            "{:?} {:016x}",
            request.split.method,
            request.split.fraction.to_bits()
        );
        part(split.as_bytes());
        part(request.text_field.as_bytes());
        if let Some(supervised) = &request.supervised {
            part(format!("{supervised:?}").as_bytes());
        }
        if !request.selection.is_empty() {
            part(format!("{SELECTION_VERSION} {:?}", request.selection).as_bytes());
        }
        part(
            format!(
                "{} {} {:?}",
                request.skip_bad, request.shard_tokens, request.max_file_bytes
            )
            .as_bytes(),
        );
        let mut done = 0;
        for (files, stamps) in self
            .files()
            .chunks(FILES_AT_A_TIME)
            .zip(self.stamps.chunks(FILES_AT_A_TIME))
        {
            let hashes: Vec<_> = files.par_iter().map(hash_file).collect();
            for (file, hash) in files.iter().zip(hashes) {
                part(format!("{:?} {:?} {:?}", file.kind, file.compression, file.group).as_bytes());
                match hash {
                    Ok(hash) => part(hash.as_bytes()),
                    Err(_) if request.skip_bad => part(b"unreadable"),
                    Err(problem) => return Err(bad_file(file, problem)),
                }
            }
            done += stamps.iter().flatten().map(|(bytes, _)| bytes).sum::<u64>();
            self.report(Stage::Hash, done);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Reads everything once: keys for the split, lengths, distinct characters, and what cannot be used.
    fn scan(&self) -> Result<Scan, CorpusError> {
        let mut scan = Scan::default();
        self.request
            .sources
            .skipped
            .iter()
            .for_each(|bad| scan.skipped.add(bad));
        let read = Cell::new(0);
        for file in self.files() {
            let mut found = FileScan::new(self.request, file);
            let on_read = |bytes| {
                read.set(read.get() + bytes);
                self.report(Stage::Scan, read.get().min(self.total));
            };
            let result = read_documents(file, &self.options, &on_read, &mut |event| {
                found.take(event)
            });
            match result {
                Ok(()) => scan.merge(found),
                Err(CorpusError::BadInput(bad)) if self.request.skip_bad => {
                    scan.skipped.add(&bad);
                    scan.usable.push(false);
                }
                Err(error) => return Err(error),
            }
        }
        if scan.keys.is_empty() {
            return Err(CorpusError::Empty {
                skipped: scan.skipped.count,
                first: scan
                    .skipped
                    .first
                    .first()
                    .cloned()
                    .unwrap_or_else(|| "no file was given".to_string()),
            });
        }
        Ok(scan)
    }

    /// Decides which documents stay, and leaves the others out of what the scan has found.
    fn select(&self, directory: &Path, scan: &mut Scan) -> Result<(), CorpusError> {
        let files = Unfinished::create(directory)?;
        let request = self.request;
        let supervised = request.supervised.as_ref();
        let mut selector = Selector::new(&request.selection, supervised, files.path())?;
        // Any plan that keeps documents whole will do.
        let whole = SplitPlan::Document { last_key: 0 };
        self.walk(Stage::Select, scan, whole, &mut |_, routed| {
            selector.push(routed)
        })?;
        scan.select(selector.finish()?)
    }

    /// Reads everything again, for `stage`, and sends each stretch of text with its side and file number to `sink`.
    fn walk(
        &self,
        stage: Stage,
        scan: &Scan,
        plan: SplitPlan,
        sink: &mut dyn FnMut(usize, Routed<'_>) -> Result<(), CorpusError>,
    ) -> Result<(), CorpusError> {
        let mut router = Router::new(plan, &scan.keys).without(&scan.dropped);
        let read = Cell::new(0);
        let on_read = |bytes| {
            read.set(read.get() + bytes);
            self.report(stage, read.get().min(self.total));
        };
        for (number, file) in self.files().iter().enumerate() {
            if !scan.usable[number] {
                continue;
            }
            let changed = || CorpusError::SourceChanged(file.name.clone());
            // The scan has read everything: what cannot be read now has changed. What the sink finds is another matter.
            let mut found = Ok(());
            let mut take = |event: Event<'_>| {
                let routed = router.route(event, &mut |routed| sink(number, routed));
                match routed {
                    Err(_) => Err(changed()),
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(error)) => {
                        found = Err(error);
                        Err(changed())
                    }
                }
            };
            let read = read_documents(file, &self.options, &on_read, &mut take);
            found?;
            match read {
                Err(CorpusError::BadInput(_)) => return Err(changed()),
                result => result?,
            }
        }
        match self.files().last() {
            Some(file) if !router.is_complete() => {
                Err(CorpusError::SourceChanged(file.name.clone()))
            }
            _ => Ok(()),
        }
    }

    /// The texts of a corpus, in order, each with its side; of supervised samples what they say, without JSON around it.
    fn walk_texts(
        &self,
        scan: &Scan,
        plan: SplitPlan,
        sink: &mut dyn FnMut(Split, Option<&str>),
    ) -> Result<(), CorpusError> {
        let mut side = Split::Train;
        self.walk(Stage::Tokenizer, scan, plan, &mut |_, routed| {
            match (routed, &self.request.supervised) {
                (Routed::Begin(split, _), _) => side = split,
                (Routed::Text(text), None) => sink(side, Some(text)),
                (Routed::Text(line), Some(supervised)) => {
                    if let Ok(record) = supervised.record(line) {
                        texts_of(&record).for_each(|text| sink(side, Some(text)));
                    }
                }
                (Routed::End, _) => sink(side, None),
            }
            Ok(())
        })
    }

    /// The labels that may occur.
    fn labels(
        &self,
        scan: &Scan,
        plan: SplitPlan,
        config: &SupervisedConfig,
    ) -> Result<Vec<String>, CorpusError> {
        let mut found = BTreeSet::new();
        if config.objective == Objective::Classify && config.labels.is_empty() {
            self.walk(Stage::Tokenizer, scan, plan, &mut |_, routed| {
                if let Routed::Text(line) = routed
                    && let Ok(Record::Labelled { label, .. }) = config.record(line)
                {
                    found.insert(label);
                }
                Ok(())
            })?;
        }
        labels_of(config, found)
    }

    fn make_tokenizer(&self, scan: &Scan, plan: SplitPlan) -> Result<Tokenizer, CorpusError> {
        let supervised = self.request.supervised.is_some();
        match &self.request.tokenizer {
            TokenizerConfig::File { json, eos } => Ok(Tokenizer::from_json(json, eos.as_deref())?),
            // What the scan has seen is more than what is to be learned.
            TokenizerConfig::Char if supervised || scan.selection.is_some() => {
                let mut characters = BTreeSet::new();
                self.walk_texts(scan, plan, &mut |_, text| {
                    characters.extend(text.unwrap_or_default().chars());
                })?;
                if supervised {
                    // What parts a prompt from its response, and the default template's own words.
                    characters.extend(DEFAULT_TEMPLATE.chars().chain(['\n']));
                }
                Ok(char_tokenizer(characters))
            }
            TokenizerConfig::Char => Ok(char_tokenizer(scan.characters.iter().copied())),
            TokenizerConfig::Bpe { vocab_size } => {
                let mut training =
                    BpeTraining::on_sample(*vocab_size, self.request.sample_bytes, scan.bytes)?;
                self.walk_texts(scan, plan, &mut |side, text| match text {
                    Some(text) if side == Split::Train => training.add(text),
                    Some(_) => {}
                    None => training.end_document(),
                })?;
                Ok(training.finish()?)
            }
        }
    }

    fn encode(
        &self,
        scan: &Scan,
        plan: SplitPlan,
        tokenizer: &Arc<Tokenizer>,
        (batches, kept): (&dyn BatchEncoder, &dyn Fn() -> Kept),
        directory: &Path,
    ) -> Result<CorpusIndex, CorpusError> {
        let file_name = |number: usize| self.files()[number].name.clone();
        let shard_tokens = self.request.shard_tokens;
        let ([train, validation], supervised, skipped, sources) = match &self.request.supervised {
            None => {
                let batches = (batches, kept());
                let mut encoder =
                    Encoder::new(tokenizer, batches, directory, shard_tokens, &file_name);
                self.walk(Stage::Encode, scan, plan, &mut |number, routed| {
                    encoder.push(number, routed)
                })?;
                let (sides, sources) = encoder.finish()?;
                (sides, None, scan.skipped.clone(), sources)
            }
            Some(config) => {
                let labels = self.labels(scan, plan, config)?;
                let sampler = Sampler::new(config, tokenizer)?;
                let left_out = (self.request.skip_bad, scan.skipped.clone());
                let place = (directory, shard_tokens);
                let mut encoder = Supervisor::new(sampler, labels, place, &file_name, left_out);
                self.walk(Stage::Encode, scan, plan, &mut |number, routed| {
                    encoder.push(number, routed)
                })?;
                let done = encoder.finish()?;
                (
                    done.sides,
                    Some(done.supervised),
                    done.skipped,
                    done.sources,
                )
            }
        };
        // Rows mix the samples of several files.
        sources.write(directory, self.files(), supervised.is_none())?;
        let usable = || {
            self.files()
                .iter()
                .zip(&scan.usable)
                .filter(|(_, usable)| **usable)
        };
        let mut index = CorpusIndex {
            format: FORMAT_VERSION,
            fingerprint: String::new(),
            name: self.request.name.clone(),
            tokenizer: TokenizerSummary {
                fingerprint: tokenizer.fingerprint().to_string(),
                vocab_size: tokenizer.vocab_size(),
                eos: tokenizer.eos(),
            },
            train,
            validation,
            options: OptionsSummary {
                tokenizer: match self.request.tokenizer {
                    TokenizerConfig::Bpe { .. } => "bpe".to_string(),
                    TokenizerConfig::Char => "char".to_string(),
                    TokenizerConfig::File { .. } => "file".to_string(),
                },
                text_field: self.request.text_field.clone(),
                split: self.request.split_of_samples(),
                plan,
                shard_tokens: self.request.shard_tokens,
            },
            sources: SourceSummary {
                files: usable().count() as u64,
                bytes: self.total,
                names: usable()
                    .take(LISTED_SOURCES)
                    .map(|(file, _)| file.name.clone())
                    .collect(),
            },
            skipped,
            selection: scan.selection.clone(),
            supervised,
        };
        index.fingerprint = index.compute_fingerprint();
        Ok(index)
    }

    fn check_unchanged(&self) -> Result<(), CorpusError> {
        match self
            .files()
            .iter()
            .zip(&self.stamps)
            .find(|(file, before)| stamp(file) != **before)
        {
            Some((file, _)) => Err(CorpusError::SourceChanged(file.name.clone())),
            None => Ok(()),
        }
    }
}

fn hash_file(file: &SourceFile) -> Result<blake3::Hash, Problem> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open(&file.path)?)?;
    Ok(hasher.finalize())
}

fn bad_file(file: &SourceFile, problem: Problem) -> CorpusError {
    CorpusError::BadInput(BadInput {
        file: file.name.clone(),
        place: None,
        problem,
    })
}
