//! Reads samples and validation windows out of shards, wherever those come from.
//!
//! Sample `i` of context `c` is the tokens `[i c, i c + c + 1)` of a split: inputs and, one further, targets. Neighbouring
//! samples share one token, so every token but the split's first is a target of exactly one sample; what is left over at
//! the end, less than one sample, is used in validation only.
//!
//! A supervised corpus is cut into rows when it is prepared, and a row is a sample of either side.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use super::error::CorpusError;
use super::index::{CorpusIndex, SplitIndex};
use super::objective::Objective;
use super::rows::Row;
use super::shard::{MappedShard, ShardEntry};
use super::split::Split;
use crate::order::Order;

/// Where a reader gets shards from: a directory, or a cache that fetches them.
pub trait ShardSource: Send + Sync {
    /// Shard `index` of the split, fetched if need be.
    fn shard(&self, index: usize) -> Result<Arc<MappedShard>, CorpusError>;
}

/// The shards of one split as files in one directory; some may be missing as long as nobody reads them.
pub struct LocalShards {
    directory: PathBuf,
    entries: Vec<ShardEntry>,
    mapped: Vec<OnceLock<Arc<MappedShard>>>,
}

impl LocalShards {
    /// Maps nothing yet: each shard is mapped when it is first read.
    pub fn new(directory: impl Into<PathBuf>, split: &SplitIndex) -> Self {
        Self {
            directory: directory.into(),
            entries: split.shards.clone(),
            mapped: split.shards.iter().map(|_| OnceLock::new()).collect(),
        }
    }
}

impl ShardSource for LocalShards {
    fn shard(&self, index: usize) -> Result<Arc<MappedShard>, CorpusError> {
        let (Some(entry), Some(cell)) = (self.entries.get(index), self.mapped.get(index)) else {
            return Err(CorpusError::OutOfRange {
                what: "shard",
                index: index as u64,
                len: self.entries.len() as u64,
            });
        };
        if let Some(shard) = cell.get() {
            return Ok(shard.clone());
        }
        let shard = Arc::new(MappedShard::open(&self.directory.join(&entry.file), entry)?);
        Ok(cell.get_or_init(|| shard).clone())
    }
}

/// A stretch of text: `inputs[k]` is to predict `targets[k]`, which counts `weights[k]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Window {
    /// At most `context` tokens.
    pub inputs: Vec<u32>,
    /// As many, one further on.
    pub targets: Vec<u32>,
    /// 1 for every target that counts, else 0.
    pub weights: Vec<f32>,
    /// For each input where its segment begins; empty where all of it is one segment.
    pub starts: Vec<u32>,
}

/// Samples of a split with `tokens` tokens, at `context` tokens each: what training walks over.
///
/// # Errors
/// [`CorpusError::TooShort`] if there is not one.
pub fn samples(split: Split, tokens: u64, context: usize) -> Result<u64, CorpusError> {
    let needed = (context as u64).saturating_add(1);
    if context == 0 || tokens < needed {
        return Err(CorpusError::TooShort {
            split: split.name(),
            tokens,
            context,
            needed: needed.max(2),
        });
    }
    Ok((tokens - 1) / context as u64)
}

/// The order in which a run walks the training samples of a corpus, or the first `share` of them. A block of it is about one shard, so that lanes
/// walk few shards at a time.
///
/// # Errors
/// As [`CorpusIndex::samples`].
pub fn order_of(
    index: &CorpusIndex,
    seed: u64,
    context: usize,
    share: Option<f64>,
) -> Result<Order, CorpusError> {
    let count = share_of(index.samples(context)?, share);
    let block = (index.options.shard_tokens / context as u64).max(1);
    Ok(Order::new(seed, count, block))
}

/// The first samples of a share, one at least; all without one.
pub fn share_of(samples: u64, share: Option<f64>) -> u64 {
    let some = share.map_or(samples, |share| (samples as f64 * share).round() as u64);
    some.clamp(1, samples)
}

/// Windows of a split with `tokens` tokens: as many as samples, and a shorter one at the end where something is left.
pub fn windows(tokens: u64, context: usize) -> u64 {
    tokens.saturating_sub(1).div_ceil((context as u64).max(1))
}

/// The tokens of a sample of text.
fn sample_range(index: u64, context: usize) -> Range<u64> {
    let start = index.saturating_mul(context as u64);
    start..start.saturating_add(context as u64).saturating_add(1)
}

/// The tokens of a row.
fn row_range(index: u64, length: usize) -> Range<u64> {
    let start = index.saturating_mul(length as u64);
    start..start.saturating_add(length as u64)
}

/// Reads samples of one split. Shared freely between threads.
#[derive(Clone)]
pub struct SampleReader {
    split: Split,
    first_tokens: Arc<[u64]>, // of each shard, and the number of tokens at the end
    source: Arc<dyn ShardSource>,
    /// What the rows of a supervised corpus hold.
    objective: Option<Objective>,
}

impl SampleReader {
    /// A reader of one side of `index`, over shards from `source`.
    pub fn new(split: Split, index: &CorpusIndex, source: Arc<dyn ShardSource>) -> Self {
        let objective = index.supervised.as_ref().map(|s| s.objective);
        Self {
            objective,
            ..Self::of_text(split, index.split(split), source)
        }
    }

    /// A reader of plain text.
    fn of_text(split: Split, index: &SplitIndex, source: Arc<dyn ShardSource>) -> Self {
        let firsts = index.shards.iter().map(|shard| shard.first_token);
        Self {
            split,
            first_tokens: firsts.chain([index.tokens]).collect(),
            source,
            objective: None,
        }
    }

    /// Tokens in the split.
    pub fn tokens(&self) -> u64 {
        self.first_tokens.last().copied().unwrap_or(0)
    }

    /// Samples of this split.
    ///
    /// # Errors
    /// [`CorpusError::TooShort`] if there is not one.
    pub fn samples(&self, context: usize) -> Result<u64, CorpusError> {
        match self.objective {
            Some(_) => Ok(self.tokens() / context as u64),
            None => samples(self.split, self.tokens(), context),
        }
    }

    /// Windows of this split.
    pub fn windows(&self, context: usize) -> u64 {
        match self.objective {
            Some(_) => self.tokens() / context as u64,
            None => windows(self.tokens(), context),
        }
    }

    /// The tokens of a training sample.
    pub fn range(&self, index: u64, context: usize) -> Range<u64> {
        match self.objective {
            Some(_) => row_range(index, context),
            None => sample_range(index, context),
        }
    }

    /// The shards that hold the tokens of `range`, so that they can be fetched ahead.
    pub fn shards_for(&self, range: Range<u64>) -> Range<usize> {
        let shards = self.first_tokens.len() - 1;
        let range = range.start..range.end.min(self.tokens());
        if range.is_empty() {
            return 0..0;
        }
        let firsts = &self.first_tokens[..shards];
        let begin = firsts.partition_point(|&first| first <= range.start) - 1;
        begin..firsts.partition_point(|&first| first < range.end)
    }

    /// Sample `index`: `context` inputs and their targets. In plain text all of them count.
    pub fn sample(&self, index: u64, context: usize) -> Result<Window, CorpusError> {
        let len = self.samples(context)?;
        if index >= len {
            return Err(CorpusError::OutOfRange {
                what: "sample",
                index,
                len,
            });
        }
        if let Some(objective) = self.objective {
            return self.row(index, context, objective);
        }
        let mut inputs = Vec::with_capacity(context + 1);
        self.copy(sample_range(index, context), &mut inputs)?;
        let targets = inputs[1..].to_vec();
        inputs.pop();
        Ok(Window {
            weights: vec![1.0; targets.len()],
            inputs,
            targets,
            starts: Vec::new(),
        })
    }

    /// A row of a supervised corpus.
    fn row(&self, index: u64, length: usize, objective: Objective) -> Result<Window, CorpusError> {
        let range = row_range(index, length);
        let mut row = Row::default();
        self.copy(range.clone(), &mut row.tokens)?;
        self.for_each_start(range.clone(), &mut |start| {
            row.starts.push((start - range.start) as u32);
        })?;
        self.for_each_part(range.clone(), &mut |shard, _, part| {
            row.trained
                .extend(part.map(|token| shard.is_trained(token)));
        })?;
        Ok(row.window(objective))
    }

    /// Window `index` of the validation text. Every token of the split is a target exactly once, but for its first; those
    /// that begin a document do not count, since nothing before them can predict them.
    pub fn window(&self, index: u64, context: usize) -> Result<Window, CorpusError> {
        let len = self.windows(context);
        if index >= len {
            return Err(CorpusError::OutOfRange {
                what: "window",
                index,
                len,
            });
        }
        if let Some(objective) = self.objective {
            return self.row(index, context, objective);
        }
        let range = sample_range(index, context);
        let range = range.start..range.end.min(self.tokens());
        let mut tokens = Vec::with_capacity((range.end - range.start) as usize);
        self.copy(range.clone(), &mut tokens)?;
        let mut weights = vec![1.0; tokens.len() - 1];
        self.for_each_start(range.start + 1..range.end, &mut |start| {
            weights[(start - range.start - 1) as usize] = 0.0;
        })?;
        let targets = tokens[1..].to_vec();
        tokens.pop();
        Ok(Window {
            inputs: tokens,
            targets,
            weights,
            starts: Vec::new(),
        })
    }

    /// Appends the tokens of `range` to `out`.
    pub fn copy(&self, range: Range<u64>, out: &mut Vec<u32>) -> Result<(), CorpusError> {
        if range.end > self.tokens() {
            return Err(CorpusError::OutOfRange {
                what: "token",
                index: range.end.saturating_sub(1),
                len: self.tokens(),
            });
        }
        self.for_each_part(range, &mut |shard, _, part| shard.copy(part, out))
    }

    /// For each token of `range` whether it is learned: of plain text, all are.
    pub(super) fn learned(&self, range: Range<u64>) -> Result<Vec<bool>, CorpusError> {
        let mut learned = Vec::with_capacity((range.end - range.start) as usize);
        self.for_each_part(range, &mut |shard, _, part| {
            learned.extend(part.map(|token| shard.is_trained(token)));
        })?;
        Ok(learned)
    }

    /// Calls `each` with the token positions in `range` where documents begin, in order.
    pub fn for_each_start(
        &self,
        range: Range<u64>,
        each: &mut dyn FnMut(u64),
    ) -> Result<(), CorpusError> {
        self.for_each_part(range, &mut |shard, first, part| {
            shard
                .starts_in(part)
                .for_each(|start| each(first + start as u64));
        })
    }

    fn for_each_part(
        &self,
        range: Range<u64>,
        each: &mut dyn FnMut(&MappedShard, u64, Range<usize>),
    ) -> Result<(), CorpusError> {
        for index in self.shards_for(range.clone()) {
            let first = self.first_tokens[index];
            let begin = range.start.max(first) - first;
            let end = range.end.min(self.first_tokens[index + 1]) - first;
            each(
                &*self.source.shard(index)?,
                first,
                begin as usize..end as usize,
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::shard::ShardWriter;
    use proptest::prelude::*;

    fn reader(
        documents: &[Vec<u32>],
        shard_tokens: u64,
    ) -> (tempfile::TempDir, SampleReader, SplitIndex) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut writer = ShardWriter::new(dir.path(), Split::Validation, 1000, shard_tokens);
        for document in documents {
            writer.start_document().expect("start");
            writer.push(document).expect("push");
        }
        let index = SplitIndex {
            tokens: writer.tokens(),
            documents: documents.len() as u64,
            bytes: 0,
            unknown_tokens: 0,
            shards: writer.finish().expect("finish"),
        };
        let source = Arc::new(LocalShards::new(dir.path(), &index));
        let reader = SampleReader::of_text(Split::Validation, &index, source);
        (dir, reader, index)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn samples_and_windows_cover_the_split_exactly_once(
            lengths in prop::collection::vec(1usize..15, 1..10),
            shard_tokens in 1u64..20,
            context in 1usize..12,
        ) {
            let mut next = 0;
            let documents: Vec<Vec<u32>> = lengths
                .iter()
                .map(|&len| { next += len as u32; (next - len as u32..next).collect() })
                .collect();
            let (_dir, reader, _) = reader(&documents, shard_tokens);
            let all = documents.concat();
            prop_assert_eq!(reader.tokens(), all.len() as u64);
            if let Ok(samples) = reader.samples(context) {
                for index in 0..samples {
                    let sample = reader.sample(index, context).expect("sample");
                    let at = index as usize * context;
                    prop_assert_eq!(&sample.inputs[..], &all[at..at + context]);
                    prop_assert_eq!(&sample.targets[..], &all[at + 1..=at + context]);
                }
                prop_assert!(all.len() as u64 - 1 - samples * (context as u64) < context as u64);
                prop_assert!(reader.sample(samples, context).is_err());
            } else {
                prop_assert!(all.len() <= context);
            }
            let (mut targets, mut weighed) = (Vec::new(), 0.0);
            for index in 0..reader.windows(context) {
                let window = reader.window(index, context).expect("window");
                prop_assert_eq!(window.inputs.len(), window.targets.len());
                prop_assert_eq!(window.inputs.len(), window.weights.len());
                prop_assert_eq!(&window.inputs[1..], &window.targets[..window.targets.len() - 1]);
                weighed += window.weights.iter().sum::<f32>();
                for (target, weight) in window.targets.iter().zip(&window.weights) {
                    let first = documents.iter().any(|document| document[0] == *target);
                    prop_assert_eq!(*weight == 0.0, first);
                }
                targets.extend(window.targets);
            }
            prop_assert_eq!(&targets[..], &all[1..]);
            prop_assert_eq!(weighed as usize, all.len() - documents.len());
        }

        #[test]
        fn the_shards_of_a_range_are_those_that_hold_it(
            tokens in 1u64..60, shard_tokens in 1u64..20, start in 0u64..70, len in 0u64..30,
        ) {
            let (_dir, reader, index) = reader(&[(0..tokens as u32).collect()], shard_tokens);
            let expected: Vec<usize> = (0..index.shards.len())
                .filter(|&i| {
                    let shard = &index.shards[i];
                    shard.first_token < start + len && start < shard.first_token + shard.tokens && len > 0
                })
                .collect();
            prop_assert_eq!(reader.shards_for(start..start + len).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn only_the_shards_that_are_read_must_be_there() {
        let (dir, reader, index) = reader(&[(0..40).collect()], 10);
        std::fs::remove_file(dir.path().join(&index.shards[2].file)).expect("remove");
        let sample = reader.sample(1, 9).expect("sample");
        assert_eq!(sample.inputs, (9..18).collect::<Vec<u32>>());
        let error = reader.sample(2, 9).expect_err("missing");
        assert!(
            error.to_string().contains("validation-00002.shard"),
            "{error}"
        );
    }

    #[test]
    fn a_corpus_shorter_than_a_sample_says_so_with_numbers() {
        let (_dir, reader, _) = reader(&[vec![1, 2, 3]], 10);
        let error = reader.samples(3).expect_err("too short");
        assert_eq!(
            error.to_string(),
            "the validation split has 3 tokens, but one sample of context 3 takes 4; give more text or a shorter context"
        );
        assert_eq!(reader.samples(2).expect("one"), 1);
    }
}
