//! From documents to shards: sends each stretch of text to its side of the split, cuts it into pieces, has the pieces
//! encoded in batches and appends the tokens in order.
//!
//! The text in flight is bounded by the batches that are under way, in number and in bytes; the result does not depend on who
//! encodes them.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use super::batches::{BatchEncoder, PendingBatch};
use super::error::{CorpusError, Place};
use super::index::SplitIndex;
use super::kept::{Kept, TextHash};
use super::pieces::Cutter;
use super::shard::ShardWriter;
use super::split::{Split, SplitPlan};
use super::tally::Tally;
use super::text::Event;
use super::tokenizer::{Tokenizer, TokenizerError};

/// What a piece weighs in memory besides its text, so that a million tiny documents do not make a batch without bound.
const PIECE_OVERHEAD: usize = 96;

/// Text of the batches that are under way, at most: documents that cannot be cut may be long.
const MAX_UNDER_WAY: usize = 256 << 20;

/// A stretch of text on one side of the split. Each document is `Begin`, any number of `Text`, `End`.
pub(super) enum Routed<'a> {
    Begin(Split, Option<Place>),
    Text(&'a str),
    End,
}

/// Takes the documents of a corpus in order and says on which side each stretch of text lies. A document that the tail
/// split cuts becomes two.
pub(super) struct Router<'a> {
    plan: SplitPlan,
    keys: &'a [u64],
    /// Which documents are left out; empty is none.
    dropped: &'a [bool],
    /// Whether the document that is being read is left out.
    skips: bool,
    document: usize,
    chars: u64,
    place: Option<Place>,
    open: Option<Split>,
}

/// The documents do not follow the scan: a file has changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Changed;

impl<'a> Router<'a> {
    /// A router for documents whose split keys are `keys`, in order.
    pub fn new(plan: SplitPlan, keys: &'a [u64]) -> Self {
        Self {
            plan,
            keys,
            dropped: &[],
            skips: false,
            document: 0,
            chars: 0,
            place: None,
            open: None,
        }
    }

    /// The same, but those of `dropped` are left out, as if they were not there.
    pub fn without(mut self, dropped: &'a [bool]) -> Self {
        self.dropped = dropped;
        self
    }

    /// Passes `event` on to `sink`. The outer error is the router's own.
    pub fn route<E>(
        &mut self,
        event: Event<'_>,
        sink: &mut dyn FnMut(Routed<'_>) -> Result<(), E>,
    ) -> Result<Result<(), E>, Changed> {
        match event {
            Event::Start(place) => {
                self.place = place;
                let key = *self.keys.get(self.document).ok_or(Changed)?;
                self.skips = self.dropped.get(self.document) == Some(&true);
                self.document += 1;
                if self.skips {
                    return Ok(Ok(()));
                }
                Ok(match self.plan.of_document(key) {
                    Some(split) => self.open(split, sink),
                    None => Ok(()),
                })
            }
            Event::Text(_) if self.skips => Ok(Ok(())),
            Event::Text(text) => Ok(self.text(text, sink)),
            Event::End => Ok(match self.open.take() {
                Some(_) => sink(Routed::End),
                None => Ok(()),
            }),
            Event::Bad(_) => Ok(Ok(())), // the scan has reported it
        }
    }

    /// Whether all documents of the scan have come.
    pub fn is_complete(&self) -> bool {
        self.document == self.keys.len()
    }

    fn text<E>(
        &mut self,
        text: &str,
        sink: &mut dyn FnMut(Routed<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(train) = self.plan.train_chars_left(self.chars) else {
            return sink(Routed::Text(text));
        };
        let cut = match text.char_indices().nth(train as usize) {
            Some((at, _)) => at,
            None => text.len(),
        };
        let (head, tail) = text.split_at(cut);
        self.chars += text.chars().count() as u64;
        for (split, part) in [(Split::Train, head), (Split::Validation, tail)] {
            if !part.is_empty() {
                self.open(split, sink)?;
                sink(Routed::Text(part))?;
            }
        }
        Ok(())
    }

    fn open<E>(
        &mut self,
        split: Split,
        sink: &mut dyn FnMut(Routed<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.open == Some(split) {
            return Ok(());
        }
        if self.open.replace(split).is_some() {
            sink(Routed::End)?;
        }
        sink(Routed::Begin(split, self.place))
    }
}

struct Piece {
    side: usize,
    begins: bool,
    ends: bool,
    file: usize,
    place: Option<Place>,
    text: TextHash,
    /// If they were kept.
    tokens: Option<Vec<u32>>,
}

#[derive(Default)]
struct Counts {
    documents: u64,
    bytes: u64,
    unknown: u64,
}

/// Pieces whose tokens are on their way, unless they were kept.
struct UnderWay<'a> {
    pieces: Vec<Piece>,
    bytes: usize,
    batch: Box<dyn PendingBatch + 'a>,
}

/// Encodes routed text into the shards of both sides.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Arc<Tokenizer>,
    batches: &'a dyn BatchEncoder,
    kept: Kept,
    file_name: &'a (dyn Fn(usize) -> String + 'a),
    writers: [ShardWriter<'a>; 2],
    counts: [Counts; 2],
    sources: Tally,
    cutter: Cutter,
    batch: Vec<Piece>,
    /// The texts of those whose tokens were not kept.
    texts: Vec<String>,
    batch_bytes: usize,
    under_way: VecDeque<UnderWay<'a>>,
    under_way_bytes: usize,
    current: (Split, Option<Place>),
    begins: bool,
}

impl<'a> Encoder<'a> {
    /// An encoder that has `batches` encode what is not in `kept`, and writes shards of `shard_tokens` tokens into
    /// `directory`; `file_name` names files in messages.
    pub fn new(
        tokenizer: &'a Arc<Tokenizer>,
        (batches, kept): (&'a dyn BatchEncoder, Kept),
        directory: &'a Path,
        shard_tokens: u64,
        file_name: &'a (dyn Fn(usize) -> String + 'a),
    ) -> Self {
        Self {
            tokenizer,
            batches,
            kept,
            file_name,
            writers: Split::ALL.map(|split| {
                ShardWriter::new(directory, split, tokenizer.vocab_size(), shard_tokens)
            }),
            counts: Default::default(),
            sources: Tally::default(),
            cutter: Cutter::new(tokenizer.cut()),
            batch: Vec::new(),
            texts: Vec::new(),
            batch_bytes: 0,
            under_way: VecDeque::new(),
            under_way_bytes: 0,
            current: (Split::Train, None),
            begins: false,
        }
    }

    /// Takes the next stretch of text, of file number `file`.
    pub fn push(&mut self, file: usize, routed: Routed<'_>) -> Result<(), CorpusError> {
        match routed {
            Routed::Begin(split, place) => {
                self.current = (split, place);
                self.begins = true;
                self.counts[split as usize].documents += 1;
                self.sources.of(file, split as usize).documents += 1;
                Ok(())
            }
            Routed::Text(text) => {
                let side = self.current.0 as usize;
                self.counts[side].bytes += text.len() as u64;
                self.sources.of(file, side).bytes += text.len() as u64;
                let mut pieces = Vec::new();
                self.cutter.push(text, &mut |piece| pieces.push(piece));
                pieces
                    .into_iter()
                    .try_for_each(|piece| self.add(file, piece, false))
            }
            Routed::End => {
                let rest = self.cutter.finish().unwrap_or_default();
                self.add(file, rest, true)
            }
        }
    }

    fn add(&mut self, file: usize, text: String, ends: bool) -> Result<(), CorpusError> {
        self.batch_bytes += text.len() + PIECE_OVERHEAD;
        let hash = TextHash::of(&text);
        let tokens = self.kept.next(hash);
        if tokens.is_none() {
            self.texts.push(text);
        }
        self.batch.push(Piece {
            side: self.current.0 as usize,
            begins: std::mem::take(&mut self.begins),
            ends,
            file,
            place: self.current.1,
            text: hash,
            tokens,
        });
        if self.batch_bytes >= self.batches.batch_bytes() {
            self.begin();
            while self.under_way.len() > self.batches.width()
                || self.under_way_bytes > MAX_UNDER_WAY
            {
                self.settle()?;
            }
        }
        Ok(())
    }

    /// Gives a batch away.
    fn begin(&mut self) {
        let pieces = std::mem::take(&mut self.batch);
        let texts = std::mem::take(&mut self.texts);
        let batch = self.batches.begin(self.tokenizer, texts);
        let bytes = std::mem::take(&mut self.batch_bytes);
        self.under_way_bytes += bytes;
        self.under_way.push_back(UnderWay {
            pieces,
            bytes,
            batch,
        });
    }

    /// Waits for the oldest batch, and writes its tokens.
    fn settle(&mut self) -> Result<(), CorpusError> {
        let Some(UnderWay {
            pieces,
            bytes,
            batch,
        }) = self.under_way.pop_front()
        else {
            return Ok(());
        };
        self.under_way_bytes -= bytes;
        let tokenizer = self.tokenizer;
        let unknown = |piece: &&Piece| piece.tokens.is_none();
        let encoded = batch.wait().map_err(|(number, source)| {
            let piece = pieces.iter().filter(unknown).nth(number);
            self.fault(piece.expect("it was sent"), source)
        })?;
        let mut encoded = encoded.into_iter();
        for mut piece in pieces {
            let tokens = piece.tokens.take().unwrap_or_else(|| {
                let tokens = encoded.next().expect("each text has tokens");
                self.kept.add(piece.text, &tokens);
                tokens
            });
            let writer = &mut self.writers[piece.side];
            if piece.begins {
                writer.start_document()?;
            }
            self.sources.of(piece.file, piece.side).tokens +=
                tokens.len() as u64 + u64::from(piece.ends);
            writer.push(&tokens)?;
            if piece.ends {
                writer.push(&[tokenizer.eos()])?;
            }
            if let Some(unknown) = tokenizer.unknown() {
                self.counts[piece.side].unknown +=
                    tokens.iter().filter(|&&id| id == unknown).count() as u64;
            }
        }
        Ok(())
    }

    fn fault(&self, piece: &Piece, source: TokenizerError) -> CorpusError {
        let file = (self.file_name)(piece.file);
        let place = piece.place.map(|place| format!(":{}", place.number()));
        CorpusError::Tokenize {
            document: format!("{file}{}", place.unwrap_or_default()),
            source,
        }
    }

    /// Encodes and writes what is left; returns the training and the validation side, and what came from which file.
    pub fn finish(mut self) -> Result<([SplitIndex; 2], Tally), CorpusError> {
        self.begin();
        while !self.under_way.is_empty() {
            self.settle()?;
        }
        let mut sides = Vec::with_capacity(2);
        for (writer, counts) in self.writers.into_iter().zip(self.counts) {
            sides.push(SplitIndex {
                tokens: writer.tokens(),
                documents: counts.documents,
                bytes: counts.bytes,
                unknown_tokens: counts.unknown,
                shards: writer.finish()?,
            });
        }
        Ok((sides.try_into().expect("two sides"), self.sources))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn route(plan: SplitPlan, keys: &[u64], documents: &[Vec<String>]) -> [Vec<String>; 2] {
        let mut sides: [Vec<String>; 2] = Default::default();
        let mut side = 0;
        let mut router = Router::new(plan, keys);
        let mut sink = |routed: Routed<'_>| -> Result<(), ()> {
            match routed {
                Routed::Begin(split, _) => {
                    side = split as usize;
                    sides[side].push(String::new());
                }
                Routed::Text(text) => sides[side].last_mut().expect("begun").push_str(text),
                Routed::End => {}
            }
            Ok(())
        };
        for document in documents {
            router
                .route(Event::Start(None), &mut sink)
                .expect("known")
                .expect("taken");
            for text in document {
                router
                    .route(Event::Text(text), &mut sink)
                    .expect("known")
                    .expect("taken");
            }
            router
                .route(Event::End, &mut sink)
                .expect("known")
                .expect("taken");
        }
        assert!(router.is_complete());
        sides
    }

    proptest! {
        #[test]
        fn the_tail_takes_every_character_once_and_in_order(
            documents in prop::collection::vec(prop::collection::vec("[a€😀]{1,6}", 1..4), 1..5),
            share in 0.0f64..1.0,
        ) {
            let whole: String = documents.iter().flatten().map(String::as_str).collect();
            let train_chars = (whole.chars().count() as f64 * share) as u64;
            let keys = vec![0; documents.len()];
            let [train, validation] = route(SplitPlan::Tail { train_chars }, &keys, &documents);
            prop_assert_eq!(train.concat().chars().count() as u64, train_chars);
            prop_assert_eq!(train.concat() + &validation.concat(), whole);
            prop_assert!(train.iter().chain(&validation).all(|document| !document.is_empty()));
            prop_assert!((documents.len()..=documents.len() + 1).contains(&(train.len() + validation.len())));
        }

        #[test]
        fn documents_go_whole_to_one_side(keys in prop::collection::vec(0u64..10, 1..10), last_key in 0u64..10) {
            let documents: Vec<Vec<String>> = (0..keys.len()).map(|i| vec![format!("{i} "), "x".into()]).collect();
            let sides = route(SplitPlan::Document { last_key }, &keys, &documents);
            for (index, key) in keys.iter().enumerate() {
                prop_assert!(sides[usize::from(*key <= last_key)].contains(&documents[index].concat()));
            }
            prop_assert_eq!(sides[0].len() + sides[1].len(), keys.len());
        }
    }

    #[test]
    fn more_documents_than_were_scanned_are_noticed() {
        let mut router = Router::new(SplitPlan::Document { last_key: 5 }, &[1]);
        let mut sink = |_: Routed<'_>| -> Result<(), ()> { Ok(()) };
        assert!(router.route(Event::Start(None), &mut sink).is_ok());
        assert!(!Router::new(SplitPlan::Document { last_key: 5 }, &[1]).is_complete());
        assert_eq!(router.route(Event::Start(None), &mut sink), Err(Changed));
    }
}
