//! The first documents of a corpus, decoded, for people who look at data.

use serde::{Deserialize, Serialize};

use super::error::CorpusError;
use super::objective::Objective;
use super::reader::SampleReader;
use super::shard::MappedShard;
use super::split::Split;
use super::store::Corpus;
use super::tally::SourceTable;
use super::tokenizer::Tokenizer;

/// Bytes that a character takes at most, hence tokens that are enough for it.
const TOKENS_PER_CHAR: usize = 4;

/// A document that is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadDocument {
    /// Its number on its side, from 0.
    pub document: u64,
    /// The file that it came from, where that is known.
    pub source: Option<String>,
    /// Its tokens, the end included.
    pub tokens: u64,
    /// Its text, or the beginning of it, without what ends it.
    pub text: String,
    /// Whether there is more of it.
    pub cut: bool,
    /// Its label, in a corpus of labelled texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// Documents.
    pub documents: u64,
    /// Characters of each.
    pub chars: usize,
    /// Bytes of text of all of them.
    pub bytes: usize,
}

/// The first documents of a side. Those for which nothing is left of `limits.bytes` come without text.
///
/// # Errors
/// A shard or the tokenizer cannot be read, or is damaged.
pub fn head(
    corpus: &Corpus,
    split: Split,
    limits: HeadLimits,
) -> Result<Vec<HeadDocument>, CorpusError> {
    let ranges = ranges(corpus, split, limits.documents)?;
    let table = SourceTable::of(corpus)?;
    let names = &corpus.index().sources.names;
    let only = (corpus.index().sources.files == 1)
        .then(|| names.first())
        .flatten();
    let mut files = table
        .iter()
        .flat_map(|table| table.files_of_documents(split));
    let look = Look {
        corpus,
        tokenizer: corpus.tokenizer()?,
        reader: corpus.reader(split),
    };
    let mut left = limits.bytes;
    let mut documents = Vec::with_capacity(ranges.len());
    for (document, range) in (0..).zip(ranges) {
        let source = files.next().or(only.map(String::as_str));
        let found = look.at(range, limits.chars, left)?;
        left -= found.text.len();
        documents.push(HeadDocument {
            document,
            source: source.map(str::to_owned),
            ..found
        });
    }
    Ok(documents)
}

/// The tokens of the first documents.
fn ranges(
    corpus: &Corpus,
    split: Split,
    documents: u64,
) -> Result<Vec<std::ops::Range<u64>>, CorpusError> {
    let side = corpus.index().split(split);
    let wanted = documents.min(side.documents) as usize;
    let mut starts = Vec::with_capacity(wanted + 1);
    for entry in &side.shards {
        let shard = MappedShard::open(&corpus.shard_path(&entry.file), entry)?;
        let rest = wanted + 1 - starts.len();
        let here = (0..shard.documents()).take(rest);
        starts.extend(here.map(|document| entry.first_token + shard.start(document) as u64));
        if starts.len() > wanted {
            break;
        }
    }
    if starts.len() == wanted {
        starts.push(side.tokens);
    }
    Ok(starts.windows(2).map(|pair| pair[0]..pair[1]).collect())
}

/// What one looks at documents with.
struct Look<'a> {
    corpus: &'a Corpus,
    tokenizer: Tokenizer,
    reader: SampleReader,
}

impl Look<'_> {
    /// The document whose tokens are in `range`.
    fn at(
        &self,
        range: std::ops::Range<u64>,
        chars: usize,
        bytes: usize,
    ) -> Result<HeadDocument, CorpusError> {
        let index = self.corpus.index();
        let enough = chars.min(bytes).saturating_mul(TOKENS_PER_CHAR) as u64 + 1;
        let reader = &self.reader;
        let mut tokens = Vec::new();
        let mut length = range.end - range.start;
        let mut label = None;
        let supervised = index.supervised.as_ref();
        if let Some(supervised) = supervised {
            // A sample fits into a row, and a row into memory.
            reader.copy(range.clone(), &mut tokens)?;
            if supervised.objective == Objective::Classify {
                let learned = reader.learned(range.clone())?;
                let place = learned.iter().position(|learned| *learned);
                let number = place.and_then(|place| tokens.get(place));
                label = number.and_then(|number| supervised.labels.get(*number as usize).cloned());
                tokens.truncate(place.unwrap_or(tokens.len()));
            } else {
                let said = tokens.iter().rposition(|&t| t != index.tokenizer.eos);
                tokens.truncate(said.map_or(0, |last| last + 2));
            }
            length = tokens.len() as u64;
            tokens.truncate(enough as usize);
        } else {
            reader.copy(
                range.start..range.end.min(range.start + enough),
                &mut tokens,
            )?;
        }
        let whole = tokens.len() as u64 == length;
        if whole && tokens.last() == Some(&index.tokenizer.eos) {
            tokens.pop();
        }
        let mut text = self.tokenizer.decode_with_special(&tokens)?;
        let end = text.char_indices().map(|(at, _)| at).chain([text.len()]);
        let end = end.take(chars + 1).take_while(|at| *at <= bytes).last();
        let cut = !whole || end.is_some_and(|end| end < text.len());
        text.truncate(end.unwrap_or(0));
        Ok(HeadDocument {
            document: 0,
            source: None,
            tokens: length,
            text,
            cut,
            label,
        })
    }
}
