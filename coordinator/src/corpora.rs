//! Corpora on the coordinator's side: prepared from files that lie here or were uploaded, listed, shown, deleted.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use cohort_common::api::{
    CorpusHead, CorpusInfo, CountedCorpus, HeadRequest, PrepareCorpus, PrepareEvent, Removed,
    SourceRef, SplitInfo, TokenizerRef,
};
use cohort_common::corpus::{
    self, BadInput, Corpus, CorpusError, HeadLimits, PrepareRequest, Problem, Progress, SourceFile,
    Sources, Split, SplitConfig, SplitIndex, SplitMethod, Stage, TokenizerConfig,
};
use cohort_common::home::Home;
use cohort_objects::{Location, ObjectError, Reach};
use tonic::Status;

use crate::data::{open_corpus, stored_file};
use crate::fetched;
use crate::status::{chain, failed, invalid, missing};
use crate::tokenizing::Tokenizing;

/// Documents that `corpus head` shows at most.
const HEAD_DOCUMENTS: u64 = 1000;
/// Bytes of their text, so that they fit into one message however they are escaped.
const HEAD_BYTES: usize = 512 << 10;
/// Tokens of the sample that `corpus show` prints.
const SAMPLE_TOKENS: usize = 120;

/// Prepares a corpus, on workers as far as some take text; blocks. What URLs name is fetched as far as whoever asks may reach.
/// `tell` gets the progress and may be called often.
pub fn prepare(
    home: &Home,
    request: PrepareCorpus,
    reach: Reach,
    tokenizing: &Tokenizing,
    tell: &dyn Fn(PrepareEvent),
) -> Result<CorpusInfo, Status> {
    let method = match request.split.as_str() {
        "auto" => SplitMethod::Auto,
        "document" => SplitMethod::Document,
        "tail" => SplitMethod::Tail,
        other => return Err(invalid(format!("`{other}` is no way to split a corpus"))),
    };
    let sources = gather(home, &request, reach, tell)?;
    let prepare = PrepareRequest {
        split: SplitConfig {
            method,
            fraction: request.validation,
        },
        text_field: request.text_field,
        skip_bad: request.skip_bad,
        supervised: request.supervised.clone(),
        selection: request.selection.clone(),
        ..PrepareRequest::new(
            request.name,
            sources,
            tokenizer_config(home, request.tokenizer)?,
        )
    };
    // Samples are encoded here alone.
    let workers = || match prepare.supervised {
        Some(_) => 0,
        None => tokenizing.workers(),
    };
    let progress = |p: Progress| {
        tell(PrepareEvent::Progress {
            stage: stage_name(p.stage, workers()),
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

/// The tokenizer that a request means.
fn tokenizer_config(home: &Home, tokenizer: TokenizerRef) -> Result<TokenizerConfig, Status> {
    let (json, eos) = match tokenizer {
        TokenizerRef::Bpe { vocab_size } => return Ok(TokenizerConfig::Bpe { vocab_size }),
        TokenizerRef::Char => return Ok(TokenizerConfig::Char),
        TokenizerRef::Json(json) => (json.into_bytes(), None),
        TokenizerRef::Known { json, eos } => (json.into_bytes(), Some(eos)),
        TokenizerRef::Corpus(fingerprint) => {
            let corpus = open_corpus(home, &fingerprint)?;
            let tokenizer = corpus.tokenizer().map_err(failed)?;
            let eos = tokenizer.spelling(tokenizer.eos());
            (tokenizer.to_json().into(), eos)
        }
    };
    Ok(TokenizerConfig::File { json, eos })
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

/// The files of a request in its order; one that several paths stand for counts once.
fn gather(
    home: &Home,
    request: &PrepareCorpus,
    reach: Reach,
    tell: &dyn Fn(PrepareEvent),
) -> Result<Sources, Status> {
    let mut all = Sources::default();
    let mut seen = HashSet::new();
    let mut brought = bring(home, request, reach, tell)?.into_iter();
    for source in &request.sources {
        match source {
            SourceRef::Paths(paths) => {
                let mut found = corpus::expand(paths, request.skip_bad)
                    .map_err(|error| invalid(chain(&error)))?;
                found.leave_out(&mut seen);
                all.files.extend(found.files);
                all.skipped.extend(found.skipped);
            }
            SourceRef::Url(_) => {
                let found = brought.next().expect("each URL was looked at");
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

/// Fetches what the URLs of a request name; for each of them the files, or that there are none where that is skipped. A file
/// that several of them name counts once.
fn bring(
    home: &Home,
    request: &PrepareCorpus,
    reach: Reach,
    tell: &dyn Fn(PrepareEvent),
) -> Result<Vec<Sources>, Status> {
    let unusable = |error: ObjectError| invalid(chain(&error));
    let telling = |progress: fetched::Progress| {
        tell(PrepareEvent::Progress {
            stage: "fetching".into(),
            done: progress.done,
            total: progress.total,
        });
    };
    let fetching = async {
        let (mut found, mut seen, mut wanted) = (Vec::new(), HashSet::new(), Vec::new());
        for source in &request.sources {
            let SourceRef::Url(url) = source else {
                continue;
            };
            let location = Location::parse(url).map_err(invalid)?;
            let mut sources = Sources::default();
            let mut count = 0;
            match fetched::find(&location, reach).await {
                Ok(named) => {
                    let new = named
                        .into_iter()
                        .filter(|n| seen.insert(n.identity().to_owned()));
                    let new: Vec<_> = new.collect();
                    count = new.len();
                    wanted.extend(new);
                }
                Err(error) if request.skip_bad && error.is_missing() => {
                    sources.skipped.push(BadInput {
                        file: location.to_string(),
                        place: None,
                        problem: Problem::Missing,
                    });
                }
                Err(error) => return Err(unusable(error)),
            }
            found.push((sources, count));
        }
        let files = fetched::bring(home, wanted, &telling).await;
        let mut files = files.map_err(unusable)?.into_iter();
        let filled = found.into_iter().map(|(mut sources, count)| {
            sources.files.extend(files.by_ref().take(count));
            sources
        });
        Ok(filled.collect())
    };
    tokio::runtime::Handle::current().block_on(fetching)
}

/// All corpora of a home.
pub fn list(home: &Path) -> Result<Vec<CorpusInfo>, Status> {
    let listing = corpus::list(home).map_err(failed)?;
    Ok(listing.corpora.iter().map(describe).collect())
}

/// One corpus, by name, fingerprint, or the beginning of the fingerprint. See [`corpus::find`].
pub fn find(directory: &Path, wanted: &str) -> Result<Corpus, Status> {
    corpus::find(directory, wanted).map_err(|error| match error {
        CorpusError::Unknown(_) => missing(error),
        CorpusError::Ambiguous { .. } => invalid(error),
        _ => failed(chain(&error)),
    })
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
