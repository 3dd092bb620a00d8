//! Corpora on the coordinator's side: prepared from files that lie here or were uploaded, listed, shown, deleted.

use std::path::{Path, PathBuf};
use std::time::Instant;

use cohort_common::api::{
    CorpusHead, CorpusInfo, CountedCorpus, HeadRequest, PrepareCorpus, PrepareEvent, Removed,
    SourceRef, SplitInfo,
};
use cohort_common::corpus::{
    self, Corpus, HeadLimits, PrepareRequest, Progress, SourceFile, Sources, Split, SplitConfig,
    SplitIndex, SplitMethod, Stage,
};
use cohort_common::home::Home;
use tonic::Status;

use crate::data::stored_file;
use crate::runs::tokenizer_config;
use crate::status::{chain, failed, invalid, missing};
use crate::tokenizing::Tokenizing;

/// Documents that `corpus head` shows at most.
const HEAD_DOCUMENTS: u64 = 1000;
/// Bytes of their text, so that they fit into one message however they are escaped.
const HEAD_BYTES: usize = 512 << 10;
/// Tokens of the sample that `corpus show` prints.
const SAMPLE_TOKENS: usize = 120;

/// Prepares a corpus, on workers as far as some take text; blocks. `tell` gets the progress and may be called often.
pub fn prepare(
    home: &Home,
    request: PrepareCorpus,
    tokenizing: &Tokenizing,
    tell: &dyn Fn(PrepareEvent),
) -> Result<CorpusInfo, Status> {
    let method = match request.split.as_str() {
        "auto" => SplitMethod::Auto,
        "document" => SplitMethod::Document,
        "tail" => SplitMethod::Tail,
        other => return Err(invalid(format!("`{other}` is no way to split a corpus"))),
    };
    let sources = gather(home, &request)?;
    let prepare = PrepareRequest {
        split: SplitConfig {
            method,
            fraction: request.validation,
        },
        text_field: request.text_field,
        skip_bad: request.skip_bad,
        supervised: request.supervised.clone(),
        selection: request.selection.clone(),
        ..PrepareRequest::new(request.name, sources, tokenizer_config(request.tokenizer))
    };
    let progress = |p: Progress| {
        tell(PrepareEvent::Progress {
            stage: stage_name(p.stage, tokenizing.workers()),
            done: p.done,
            total: p.total,
        });
    };
    let prepared = corpus::prepare_with(&home.corpora(), &prepare, tokenizing, &progress)
        .map_err(|error| invalid(chain(&error)))?;
    // Corpora of before there were baselines get theirs now.
    let index = prepared.corpus.index();
    let bytes = index.train.bytes + index.validation.bytes;
    let counting = |done, total| {
        tell(PrepareEvent::Progress {
            stage: "counting baselines".into(),
            done: bytes / total * done,
            total: bytes / total * total,
        });
    };
    corpus::keep_baselines(&prepared.corpus, &counting).map_err(failed)?;
    let mut info = describe(&prepared.corpus);
    info.reused = prepared.reused;
    Ok(info)
}

fn stage_name(stage: Stage, workers: usize) -> String {
    match (stage, workers) {
        (Stage::Hash, _) => "hashing files".into(),
        (Stage::Scan, _) => "reading text".into(),
        (Stage::Select, _) => "filtering".into(),
        (Stage::Tokenizer, _) => "training the tokenizer".into(),
        (Stage::Encode, 0) => "tokenizing".into(),
        (Stage::Encode, 1) => "tokenizing on a worker".into(),
        (Stage::Encode, many) => format!("tokenizing on {many} workers"),
    }
}

fn gather(home: &Home, request: &PrepareCorpus) -> Result<Sources, Status> {
    let mut all = Sources::default();
    for source in &request.sources {
        match source {
            SourceRef::Paths(paths) => {
                let found = corpus::expand(paths, request.skip_bad)
                    .map_err(|error| invalid(chain(&error)))?;
                all.files.extend(found.files);
                all.skipped.extend(found.skipped);
            }
            SourceRef::Uploaded { name, hash, group } => {
                let path = stored_file(home, hash)?;
                let mut file = SourceFile::new(name.as_str(), path);
                file.group.clone_from(group);
                all.files.push(file);
            }
            SourceRef::Grouped { name, path, group } => {
                let file = SourceFile::new(name.as_str(), PathBuf::from(path));
                all.files.push(file.in_group(group.as_str()));
            }
        }
    }
    Ok(all)
}

/// All corpora of a home.
pub fn list(home: &Path) -> Result<Vec<CorpusInfo>, Status> {
    let listing = corpus::list(home).map_err(failed)?;
    Ok(listing.corpora.iter().map(describe).collect())
}

/// One corpus, by name, fingerprint, or the beginning of the fingerprint.
pub fn find(directory: &Path, wanted: &str) -> Result<Corpus, Status> {
    let listing = corpus::list(directory).map_err(failed)?;
    let mut found: Vec<Corpus> = listing
        .corpora
        .into_iter()
        .filter(|c| c.index().fingerprint.starts_with(wanted) || c.index().name == wanted)
        .collect();
    match found.len() {
        0 => Err(missing(format!(
            "there is no corpus `{wanted}`; `cohort corpus ls` lists them"
        ))),
        1 => Ok(found.remove(0)),
        n => Err(invalid(format!(
            "`{wanted}` fits {n} corpora; give more of the fingerprint"
        ))),
    }
}

/// One corpus with the beginning of its text.
pub fn show(directory: &Path, wanted: &str) -> Result<CorpusInfo, Status> {
    let corpus = find(directory, wanted)?;
    let mut info = describe(&corpus);
    let sample = corpus.preview(Split::Train, 0, SAMPLE_TOKENS);
    info.sample = Some(sample.map_err(failed)?);
    Ok(info)
}

/// The first documents of one corpus.
pub fn head(directory: &Path, request: &HeadRequest) -> Result<CorpusHead, Status> {
    let corpus = find(directory, &request.corpus)?;
    let limits = HeadLimits {
        documents: request.documents.min(HEAD_DOCUMENTS),
        chars: usize::try_from(request.chars)
            .unwrap_or(usize::MAX)
            .min(HEAD_BYTES),
        bytes: HEAD_BYTES,
    };
    let index = corpus.index();
    Ok(CorpusHead {
        name: index.name.clone(),
        fingerprint: index.fingerprint.clone(),
        split: request.split,
        of: index.split(request.split).documents,
        documents: corpus::head(&corpus, request.split, limits).map_err(failed)?,
    })
}

/// What is in one corpus.
pub fn count(directory: &Path, wanted: &str) -> Result<CountedCorpus, Status> {
    let corpus = find(directory, wanted)?;
    let begun = Instant::now();
    Ok(CountedCorpus {
        stats: corpus::stats(&corpus).map_err(failed)?,
        read_bytes: corpus.index().shard_bytes(),
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Deletes a corpus.
pub fn remove(directory: &Path, wanted: &str) -> Result<Removed, Status> {
    let corpus = find(directory, wanted)?;
    let removed = Removed {
        name: corpus.index().fingerprint.clone(),
        bytes: corpus.index().shard_bytes(),
        files: std::fs::read_dir(corpus.directory())
            .map_err(failed)?
            .count() as u64,
    };
    corpus::remove(directory, &removed.name).map_err(failed)?;
    Ok(removed)
}

fn describe(corpus: &Corpus) -> CorpusInfo {
    let index = corpus.index();
    let side = |split: &SplitIndex| SplitInfo {
        documents: split.documents,
        tokens: split.tokens,
        bytes: split.bytes,
        shards: split.shards.len(),
    };
    CorpusInfo {
        fingerprint: index.fingerprint.clone(),
        name: index.name.clone(),
        vocab_size: index.tokenizer.vocab_size as usize,
        tokenizer: index.tokenizer.fingerprint.clone(),
        train: side(&index.train),
        validation: side(&index.validation),
        bytes_on_disk: index.shard_bytes(),
        skipped: index.skipped.first.clone(),
        reused: false,
        sample: None,
        supervised: index.supervised.clone(),
        selection: index.selection.clone(),
        // Only for people, who can do without.
        baselines: corpus::baselines(corpus).unwrap_or_default(),
    }
}
