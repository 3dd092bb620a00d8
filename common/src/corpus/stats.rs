//! What is in a corpus, counted: how long its documents are, which tokens occur and how often, where the text came from.
//!
//! Shards are read in parallel and once. Memory is a count for each token of the vocabulary and thread, and one for each
//! length that occurs, whatever the size of the corpus.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::CorpusError;
use super::objective::Objective;
use super::select::SelectionSummary;
use super::shard::{MappedShard, ShardEntry};
use super::split::Split;
use super::store::Corpus;
use super::tally::{SourceCounts, SourceTable, TextCounts};

/// Frequent tokens that are listed.
const FREQUENT: usize = 20;
/// Files and groups that are listed, the largest.
const LISTED: usize = 20;

/// What is in a corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusStats {
    /// For people.
    pub name: String,
    /// Hash over all that decides its tokens.
    pub fingerprint: String,
    /// The training side.
    pub train: SideStats,
    /// The validation side.
    pub validation: SideStats,
    /// Tokens that the vocabulary has.
    pub vocab_size: u64,
    /// Of these, how many occur nowhere.
    pub unused_tokens: u64,
    /// The most frequent tokens of both sides, the first at the top.
    pub frequent: Vec<FrequentToken>,
    /// Files that gave text, the largest first; absent where they were not counted.
    pub sources: Option<Shares>,
    /// Groups of files; absent where there are none.
    pub groups: Option<Shares>,
    /// What filters and the search for duplicates left out; absent where none was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selection: Option<SelectionSummary>,
    /// Files and lines that could not be used.
    pub skipped: u64,
}

/// One side of a corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SideStats {
    /// Documents; of a supervised corpus, samples.
    pub documents: u64,
    /// Their tokens, the end of each included, and what fills rows up not.
    pub tokens: u64,
    /// UTF-8 bytes of the text; of samples, of what is learned.
    pub bytes: u64,
    /// How many bytes of text a token stands for; absent for a supervised corpus.
    pub bytes_per_token: Option<f64>,
    /// Tokens per document.
    pub lengths: Lengths,
}

/// How lengths are distributed. A percentile is the least length that so many documents do not exceed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lengths {
    /// The shortest.
    pub min: u64,
    /// Of 10 %.
    pub p10: u64,
    /// Of half of them.
    pub median: u64,
    /// Of 90 %.
    pub p90: u64,
    /// Of 99 %.
    pub p99: u64,
    /// The longest.
    pub max: u64,
    /// The mean.
    pub mean: f64,
    /// How many are in each range, which begin at powers of two.
    pub histogram: Vec<LengthRange>,
}

/// Documents of some lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthRange {
    /// The least length.
    pub from: u64,
    /// The largest.
    pub to: u64,
    /// Documents.
    pub documents: u64,
}

/// How often a token occurs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FrequentToken {
    /// Its number.
    pub id: u32,
    /// What it stands for; its spelling in the vocabulary where that is no whole text.
    pub text: String,
    /// How often.
    pub count: u64,
    /// Its share of all tokens.
    pub share: f64,
}

/// Parts of a corpus by where they came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shares {
    /// How many there are.
    pub count: u64,
    /// The largest.
    pub largest: Vec<Share>,
}

/// What came from one place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// The file, or the group.
    pub name: String,
    /// How much, of both sides.
    #[serde(flatten)]
    pub counts: TextCounts,
    /// The share of all tokens.
    pub share: f64,
}

/// Counts a corpus. Runs on rayon's current pool.
///
/// # Errors
/// A shard cannot be read, or is damaged.
pub fn stats(corpus: &Corpus) -> Result<CorpusStats, CorpusError> {
    let index = corpus.index();
    let mut sides = Vec::with_capacity(2);
    let mut tokens = vec![0u64; index.tokenizer.vocab_size as usize];
    for split in Split::ALL {
        let counted = count(corpus, split)?;
        add(&mut tokens, &counted.tokens);
        sides.push(counted.side(corpus, split));
    }
    let [train, validation] = <[SideStats; 2]>::try_from(sides).expect("two sides");
    let all: u64 = tokens.iter().sum();
    let table = SourceTable::of(corpus)?;
    Ok(CorpusStats {
        name: index.name.clone(),
        fingerprint: index.fingerprint.clone(),
        train,
        validation,
        vocab_size: tokens.len() as u64,
        unused_tokens: tokens.iter().filter(|count| **count == 0).count() as u64,
        frequent: frequent(corpus, &tokens, all)?,
        sources: table.as_ref().map(|table| {
            let files = table.sources.iter();
            let mut shares = shares(files.map(|s| (s.name.as_str(), both(s))), all);
            shares.count += table.others;
            shares
        }),
        groups: table.as_ref().and_then(|table| groups(table, all)),
        selection: index.selection.clone(),
        skipped: index.skipped.count,
    })
}

fn both(source: &SourceCounts) -> TextCounts {
    source.train.plus(source.validation)
}

fn groups(table: &SourceTable, all: u64) -> Option<Shares> {
    let mut groups: BTreeMap<&str, TextCounts> = BTreeMap::new();
    for source in &table.sources {
        if let Some(group) = &source.group {
            let counts = groups.entry(group).or_default();
            *counts = counts.plus(both(source));
        }
    }
    (!groups.is_empty()).then(|| shares(groups.into_iter(), all))
}

fn shares<'a>(parts: impl Iterator<Item = (&'a str, TextCounts)>, all: u64) -> Shares {
    let mut largest: Vec<Share> = parts
        .filter(|(_, counts)| counts.documents > 0)
        .map(|(name, counts)| Share {
            name: name.to_owned(),
            counts,
            share: counts.tokens as f64 / all.max(1) as f64,
        })
        .collect();
    let count = largest.len() as u64;
    // The sort is stable: of equal ones the first in order comes first.
    largest.sort_by_key(|share| std::cmp::Reverse(share.counts.tokens));
    largest.truncate(LISTED);
    Shares { count, largest }
}

fn frequent(corpus: &Corpus, tokens: &[u64], all: u64) -> Result<Vec<FrequentToken>, CorpusError> {
    let tokenizer = corpus.tokenizer()?;
    let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
    order.sort_by_key(|id| (std::cmp::Reverse(tokens[*id as usize]), *id));
    let listed = order.into_iter().take(FREQUENT);
    let listed = listed.filter(|id| tokens[*id as usize] > 0);
    let token = |id: u32| {
        let whole = tokenizer
            .decode_with_special(&[id])
            .ok()
            .filter(|text| !text.is_empty() && !text.contains('\u{fffd}'));
        let count = tokens[id as usize];
        FrequentToken {
            id,
            text: whole.or_else(|| tokenizer.spelling(id)).unwrap_or_default(),
            count,
            share: count as f64 / all.max(1) as f64,
        }
    };
    Ok(listed.map(token).collect())
}

/// Counts of some shards of a side.
#[derive(Default)]
struct Counted {
    tokens: Vec<u64>,
    /// How many documents have each length.
    lengths: BTreeMap<u64, u64>,
    /// Of each shard, by its number, what may belong to documents of its neighbours.
    edges: Vec<(usize, Edges)>,
}

/// The ends of a shard.
struct Edges {
    /// Tokens before the first document that begins here.
    before: u64,
    /// Tokens of the last document that begins here; none where no document does.
    last: Option<u64>,
}

fn add(sum: &mut Vec<u64>, other: &[u64]) {
    sum.resize(sum.len().max(other.len()), 0);
    sum.iter_mut().zip(other).for_each(|(a, b)| *a += b);
}

impl Counted {
    fn plus(mut self, other: Self) -> Self {
        add(&mut self.tokens, &other.tokens);
        for (length, documents) in other.lengths {
            *self.lengths.entry(length).or_default() += documents;
        }
        self.edges.extend(other.edges);
        self
    }

    fn document(&mut self, length: u64) {
        *self.lengths.entry(length).or_default() += 1;
    }

    /// Puts documents together that go on from shard to shard.
    fn join(&mut self) {
        let mut edges = std::mem::take(&mut self.edges);
        edges.sort_unstable_by_key(|(shard, _)| *shard);
        let mut open = None;
        for (_, edge) in edges {
            if let Some(length) = &mut open {
                *length += edge.before;
            }
            if let Some(last) = edge.last {
                open.replace(last)
                    .into_iter()
                    .for_each(|l| self.document(l));
            }
        }
        open.into_iter().for_each(|length| self.document(length));
    }

    fn side(&self, corpus: &Corpus, split: Split) -> SideStats {
        let side = corpus.index().split(split);
        let tokens = self.tokens.iter().sum();
        let text = corpus.index().supervised.is_none();
        SideStats {
            documents: side.documents,
            tokens,
            bytes: side.bytes,
            bytes_per_token: text.then(|| side.bytes as f64 / tokens.max(1) as f64),
            lengths: Lengths::of(&self.lengths),
        }
    }
}

fn count(corpus: &Corpus, split: Split) -> Result<Counted, CorpusError> {
    let index = corpus.index();
    let shards = index.split(split).shards.par_iter().enumerate();
    let supervised = index.supervised.as_ref();
    let classifies = supervised.is_some_and(|s| s.objective == Objective::Classify);
    let empty = || Counted {
        tokens: vec![0; index.tokenizer.vocab_size as usize],
        ..Counted::default()
    };
    let add = |mut counted: Counted, (number, entry): (usize, &ShardEntry)| {
        let shard = MappedShard::open(&corpus.shard_path(&entry.file), entry)?;
        match supervised {
            None => count_text(&shard, number, &mut counted),
            Some(_) => count_samples(&shard, index.tokenizer.eos, classifies, &mut counted),
        }
        Ok::<_, CorpusError>(counted)
    };
    let mut counted = shards
        .try_fold(empty, add)
        .try_reduce(empty, |a, b| Ok(a.plus(b)))?;
    counted.join();
    Ok(counted)
}

fn count_tokens(tokens: &[u32], counts: &mut [u64]) {
    for &token in tokens {
        // A token that is not in the vocabulary is what verifying finds.
        if let Some(count) = counts.get_mut(token as usize) {
            *count += 1;
        }
    }
}

fn count_text(shard: &MappedShard, number: usize, counted: &mut Counted) {
    const AT_A_TIME: usize = 1 << 16;
    let mut tokens = Vec::with_capacity(AT_A_TIME);
    for begin in (0..shard.len()).step_by(AT_A_TIME) {
        tokens.clear();
        shard.copy(begin..(begin + AT_A_TIME).min(shard.len()), &mut tokens);
        count_tokens(&tokens, &mut counted.tokens);
    }
    let starts = shard.documents();
    let start = |document: usize| match document < starts {
        true => shard.start(document),
        false => shard.len(),
    };
    for document in 1..starts {
        counted.document((start(document) - start(document - 1)) as u64);
    }
    let last = (starts > 0).then(|| (shard.len() - start(starts - 1)) as u64);
    let before = start(0) as u64;
    counted.edges.push((number, Edges { before, last }));
}

/// Samples end within their shard. What fills a row up is the end of text, repeated, and is not counted; nor is the
/// number of a label, which is no token.
fn count_samples(shard: &MappedShard, eos: u32, classifies: bool, counted: &mut Counted) {
    let mut tokens = Vec::new();
    for document in 0..shard.documents() {
        let begin = shard.start(document);
        let next = document + 1;
        let end = match next < shard.documents() {
            true => shard.start(next),
            false => shard.len(),
        };
        tokens.clear();
        shard.copy(begin..end, &mut tokens);
        let length = match classifies {
            true => (begin..end)
                .position(|at| shard.is_trained(at))
                .unwrap_or(0),
            false => {
                let said = tokens.iter().rposition(|&token| token != eos);
                tokens.len().min(said.map_or(0, |last| last + 2))
            }
        };
        count_tokens(&tokens[..length], &mut counted.tokens);
        counted.document(length as u64);
    }
}

impl Lengths {
    /// From how many documents have each length.
    fn of(lengths: &BTreeMap<u64, u64>) -> Self {
        let documents: u64 = lengths.values().sum();
        if documents == 0 {
            return Self::default();
        }
        let percentile = |percent: u64| {
            let rank = (documents * percent).div_ceil(100).max(1);
            let mut seen = 0;
            let mut lengths = lengths.iter();
            let found = lengths.find(|(_, documents)| {
                seen += **documents;
                seen >= rank
            });
            *found.expect("the last has all of them").0
        };
        let tokens: u64 = lengths.iter().map(|(length, count)| length * count).sum();
        Self {
            min: percentile(0),
            p10: percentile(10),
            median: percentile(50),
            p90: percentile(90),
            p99: percentile(99),
            max: percentile(100),
            mean: tokens as f64 / documents as f64,
            histogram: histogram(lengths),
        }
    }
}

/// Ranges from the first to the last that is not empty.
fn histogram(lengths: &BTreeMap<u64, u64>) -> Vec<LengthRange> {
    let range = |length: u64| length.max(1).ilog2();
    let (Some(first), Some(last)) = (lengths.keys().next(), lengths.keys().next_back()) else {
        return Vec::new();
    };
    let bounds = |power: u32| (1u64 << power, (1u64 << power << 1).wrapping_sub(1));
    let ranges = (range(*first)..=range(*last)).map(|power| {
        let (from, to) = bounds(power);
        let inside = lengths
            .iter()
            .filter(|(length, _)| range(**length) == power);
        LengthRange {
            from,
            to,
            documents: inside.map(|(_, documents)| documents).sum(),
        }
    });
    ranges.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_hand() {
        let lengths: BTreeMap<u64, u64> = [(1, 5), (3, 4), (100, 1)].into();
        let found = Lengths::of(&lengths);
        assert_eq!((found.min, found.p10, found.median), (1, 1, 1));
        assert_eq!((found.p90, found.p99, found.max), (3, 100, 100));
        assert_eq!(found.mean, 11.7);
        let bars: Vec<_> = found
            .histogram
            .iter()
            .map(|r| (r.from, r.to, r.documents))
            .collect();
        let mut expected = vec![(1, 1, 5), (2, 3, 4)];
        expected.extend([
            (4, 7, 0),
            (8, 15, 0),
            (16, 31, 0),
            (32, 63, 0),
            (64, 127, 1),
        ]);
        assert_eq!(bars, expected);
        assert_eq!(Lengths::of(&BTreeMap::new()), Lengths::default());
    }

    #[test]
    fn documents_go_on_from_shard_to_shard() {
        let mut counted = Counted::default();
        let edge = |before, last| Edges { before, last };
        counted.edges = vec![
            (3, edge(2, Some(1))),
            (0, edge(0, Some(4))),
            (1, edge(5, None)),
            (2, edge(5, None)),
        ];
        counted.join();
        assert_eq!(counted.lengths, [(1, 1), (16, 1)].into());
    }
}
