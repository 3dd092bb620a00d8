//! The shard: an immutable file of tokens and the places where documents begin, written once, read by mapping it.
//!
//! All numbers are little-endian:
//!
//! | bytes | content |
//! | --- | --- |
//! | 0..8 | magic `COHSHARD` |
//! | 8..12 | format version, 1 |
//! | 12..16 | bytes per token: 2 (vocabularies of up to 65,536) or 4 |
//! | 16..24 | tokens |
//! | 24..32 | document starts |
//! | 32..40 | index of the first token within the split |
//! | 40..44 | 1 if some tokens are trained and others are not, else 0 |
//! | 44..64 | zeros |
//! | then | the tokens, zeros up to a multiple of 4, and one u32 per document start: its position in this shard |
//! | then, after a 1 above | one bit per token, in u32 from the lowest bit on: whether it is trained |
//!
//! A document ends with the end-of-text token and may go on in the next shard. The hash in the index is over the whole
//! file. The file itself is trusted only as far as its sizes go; who got it from elsewhere calls [`verify_file`].

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::CorpusError;
use super::rows::Row;
use super::split::Split;

const MAGIC: &[u8; 8] = b"COHSHARD";
const VERSION: u32 = 1;
const HEADER: usize = 64;

/// Tokens in every shard but the last of a split, unless asked otherwise.
pub const DEFAULT_SHARD_TOKENS: u64 = 4 << 20;

/// What the index says about one shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// File name within the corpus directory.
    pub file: String,
    /// Tokens in it.
    pub tokens: u64,
    /// Index of its first token within the split.
    pub first_token: u64,
    /// Documents that begin in it.
    pub documents: u64,
    /// Size of the file.
    pub bytes: u64,
    /// BLAKE3 of the file, in hex.
    pub hash: String,
}

/// The name of a shard's file.
pub fn shard_file_name(split: Split, index: usize) -> String {
    format!("{}-{index:05}.shard", split.name())
}

/// Bytes per token for a vocabulary.
pub fn token_width(vocab_size: u32) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// The size of a shard's file in bytes; `None` if it does not fit into 64 bits.
pub(super) fn file_bytes(tokens: u64, documents: u64, width: usize, marked: bool) -> Option<u64> {
    let marks = if marked { tokens.div_ceil(32) * 4 } else { 0 };
    let tokens = tokens
        .checked_mul(width as u64)?
        .checked_next_multiple_of(4)?;
    tokens
        .checked_add(documents.checked_mul(4)?)?
        .checked_add(marks)?
        .checked_add(HEADER as u64)
}

/// Writes the shards of one split into a directory. Holds at most one shard in memory.
pub(super) struct ShardWriter<'a> {
    directory: &'a Path,
    split: Split,
    width: usize,
    shard_tokens: usize,
    tokens: Vec<u32>,
    starts: Vec<u32>,
    /// Which tokens are trained, where that is said.
    marks: Option<Vec<bool>>,
    written: Vec<ShardEntry>,
    first_token: u64,
}

impl<'a> ShardWriter<'a> {
    pub fn new(directory: &'a Path, split: Split, vocab_size: u32, shard_tokens: u64) -> Self {
        Self {
            directory,
            split,
            width: token_width(vocab_size),
            shard_tokens: shard_tokens as usize,
            tokens: Vec::new(),
            starts: Vec::new(),
            marks: None,
            written: Vec::new(),
            first_token: 0,
        }
    }

    /// A writer of rows, see [`push_row`](Self::push_row).
    pub fn of_rows(directory: &'a Path, split: Split, vocab_size: u32, shard_tokens: u64) -> Self {
        Self {
            marks: Some(Vec::new()),
            ..Self::new(directory, split, vocab_size, shard_tokens)
        }
    }

    /// Appends a row: its tokens, which of them are trained, and the places where its documents begin. All rows have one
    /// length, and shards hold whole rows.
    pub fn push_row(&mut self, row: &Row) -> Result<(), CorpusError> {
        if self.tokens.len() + row.tokens.len() > self.shard_tokens && !self.tokens.is_empty() {
            self.flush()?;
        }
        let first = self.tokens.len() as u32;
        self.starts
            .extend(row.starts.iter().map(|start| first + start));
        self.tokens.extend_from_slice(&row.tokens);
        let marks = self.marks.as_mut().expect("a writer of rows");
        marks.extend_from_slice(&row.trained);
        Ok(())
    }

    /// The next token begins a document.
    pub fn start_document(&mut self) -> Result<(), CorpusError> {
        if self.tokens.len() == self.shard_tokens {
            self.flush()?;
        }
        debug_assert_ne!(
            self.starts.last(),
            Some(&(self.tokens.len() as u32)),
            "a document has a token at least"
        );
        self.starts.push(self.tokens.len() as u32);
        Ok(())
    }

    pub fn push(&mut self, mut tokens: &[u32]) -> Result<(), CorpusError> {
        while !tokens.is_empty() {
            if self.tokens.len() == self.shard_tokens {
                self.flush()?;
            }
            let room = self.shard_tokens - self.tokens.len();
            let (now, later) = tokens.split_at(room.min(tokens.len()));
            self.tokens.extend_from_slice(now);
            tokens = later;
        }
        Ok(())
    }

    pub fn tokens(&self) -> u64 {
        self.first_token + self.tokens.len() as u64
    }

    /// Writes what is left; returns all shards in order.
    pub fn finish(mut self) -> Result<Vec<ShardEntry>, CorpusError> {
        if !self.tokens.is_empty() {
            self.flush()?;
        }
        Ok(self.written)
    }

    fn flush(&mut self) -> Result<(), CorpusError> {
        let file = shard_file_name(self.split, self.written.len());
        let parts = (self.starts.as_slice(), self.marks.as_deref());
        let content = encode(&self.tokens, parts, self.first_token, self.width);
        write_durably(&self.directory.join(&file), &content)?;
        self.written.push(ShardEntry {
            file,
            tokens: self.tokens.len() as u64,
            first_token: self.first_token,
            documents: self.starts.len() as u64,
            bytes: content.len() as u64,
            hash: blake3::hash(&content).to_hex().to_string(),
        });
        self.first_token += self.tokens.len() as u64;
        self.tokens.clear();
        self.starts.clear();
        if let Some(marks) = &mut self.marks {
            marks.clear();
        }
        Ok(())
    }
}

fn encode(
    tokens: &[u32],
    (starts, marks): (&[u32], Option<&[bool]>),
    first_token: u64,
    width: usize,
) -> Vec<u8> {
    let (count, documents) = (tokens.len() as u64, starts.len() as u64);
    let size = file_bytes(count, documents, width, marks.is_some()).expect("fits into memory");
    let mut out = Vec::with_capacity(size as usize);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(width as u32).to_le_bytes());
    for number in [
        tokens.len() as u64,
        starts.len() as u64,
        first_token,
        u64::from(marks.is_some()),
        0,
        0,
    ] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    for &token in tokens {
        out.extend_from_slice(&token.to_le_bytes()[..width]);
    }
    out.resize(out.len().next_multiple_of(4), 0);
    for start in starts {
        out.extend_from_slice(&start.to_le_bytes());
    }
    for marks in marks.into_iter().flat_map(|marks| marks.chunks(32)) {
        let bits = marks
            .iter()
            .rev()
            .fold(0u32, |bits, &mark| bits << 1 | u32::from(mark));
        out.extend_from_slice(&bits.to_le_bytes());
    }
    debug_assert_eq!(out.len() as u64, size);
    out
}

/// Writes a new file and makes it durable.
pub(super) fn write_durably(path: &Path, content: &[u8]) -> Result<(), CorpusError> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(CorpusError::write(path))
}

/// Checks a shard's file against the index, content included.
///
/// # Errors
/// [`CorpusError::Damaged`] names the file.
pub fn verify_file(path: &Path, entry: &ShardEntry) -> Result<(), CorpusError> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(CorpusError::read(path))?;
    hasher
        .update_reader(file)
        .map_err(CorpusError::read(path))?;
    let hash = hasher.finalize().to_hex();
    if hash.as_str() != entry.hash {
        let reason = format!("its hash is `{hash}`, but the index says `{}`", entry.hash);
        return Err(CorpusError::damaged(path, reason));
    }
    Ok(())
}

/// A shard, mapped into memory. Reading it touches only the pages that are read.
pub struct MappedShard {
    map: memmap2::Mmap,
    width: usize,
    tokens: usize,
    documents: usize,
    marked: bool,
}

impl MappedShard {
    /// Maps the file at `path`, which the index describes by `entry`.
    ///
    /// # Errors
    /// [`CorpusError::Damaged`] if sizes or header do not fit; the content is not hashed here.
    pub fn open(path: &Path, entry: &ShardEntry) -> Result<Self, CorpusError> {
        let damaged = |reason: String| CorpusError::damaged(path, reason);
        let file = File::open(path).map_err(CorpusError::read(path))?;
        let size = file.metadata().map_err(CorpusError::read(path))?.len();
        if size != entry.bytes || size < HEADER as u64 {
            return Err(damaged(format!(
                "it has {size} bytes, but the index says {}",
                entry.bytes
            )));
        }
        // SAFETY: the mapping is read-only, and shards are never written again once they have their name: they are made
        // in a directory of another name, and are removed by unlinking, which leaves a mapping valid.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(CorpusError::read(path))?;
        let u32_at =
            |at: usize| u32::from_le_bytes(map[at..at + 4].try_into().expect("four bytes"));
        let u64_at =
            |at: usize| u64::from_le_bytes(map[at..at + 8].try_into().expect("eight bytes"));
        if &map[..8] != MAGIC {
            return Err(damaged("it does not begin like a shard".to_string()));
        }
        if u32_at(8) != VERSION {
            return Err(damaged(format!(
                "its format version is `{}`, but must be `{VERSION}`",
                u32_at(8)
            )));
        }
        let width = u32_at(12) as usize;
        let marked = u32_at(40) == 1;
        let (tokens, documents, first) = (u64_at(16), u64_at(24), u64_at(32));
        if (tokens, documents, first) != (entry.tokens, entry.documents, entry.first_token)
            || !matches!(width, 2 | 4)
            || file_bytes(tokens, documents, width, marked) != Some(size)
        {
            return Err(damaged(
                "its header does not fit its size or the index".to_string(),
            ));
        }
        Ok(Self {
            width,
            tokens: tokens as usize,
            documents: documents as usize,
            marked,
            map,
        })
    }

    /// Tokens in the shard.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether it has no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Appends the tokens at the positions `range` of this shard to `out`.
    ///
    /// # Panics
    /// If the range reaches beyond [`len`](Self::len).
    pub fn copy(&self, range: Range<usize>, out: &mut Vec<u32>) {
        assert!(
            range.start <= range.end && range.end <= self.tokens,
            "{range:?} of {}",
            self.tokens
        );
        let bytes = &self.map[HEADER + range.start * self.width..HEADER + range.end * self.width];
        match self.width {
            2 => out.extend(
                bytes
                    .chunks_exact(2)
                    .map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))),
            ),
            _ => out.extend(
                bytes
                    .chunks_exact(4)
                    .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            ),
        }
    }

    /// Whether the token at `position` is trained; all are where nothing else is said.
    ///
    /// # Panics
    /// If there is no such token.
    pub fn is_trained(&self, position: usize) -> bool {
        assert!(
            position < self.tokens,
            "token {position} of {}",
            self.tokens
        );
        let tokens = (self.tokens * self.width).next_multiple_of(4);
        let marks = HEADER + tokens + 4 * self.documents;
        !self.marked || self.map[marks + position / 8] >> (position % 8) & 1 == 1
    }

    /// Documents that begin in this shard.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// Position in this shard where its document `index` begins.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn start(&self, index: usize) -> usize {
        assert!(
            index < self.documents,
            "document {index} of {}",
            self.documents
        );
        let at = HEADER + (self.tokens * self.width).next_multiple_of(4) + 4 * index;
        u32::from_le_bytes(self.map[at..at + 4].try_into().expect("four bytes")) as usize
    }

    /// The positions in `range` where documents begin, in order.
    pub fn starts_in(&self, range: Range<usize>) -> impl Iterator<Item = usize> + '_ {
        let (mut low, mut high) = (0, self.documents);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.start(middle) < range.start {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low..self.documents)
            .map(|index| self.start(index))
            .take_while(move |&start| start < range.end)
            .filter(move |&start| start >= range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(
        documents: &[Vec<u32>],
        vocab: u32,
        shard_tokens: u64,
    ) -> (tempfile::TempDir, Vec<ShardEntry>) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut writer = ShardWriter::new(dir.path(), Split::Train, vocab, shard_tokens);
        for document in documents {
            writer.start_document().expect("start");
            writer.push(document).expect("push");
        }
        let entries = writer.finish().expect("finish");
        (dir, entries)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn what_is_written_is_read(
            documents in prop::collection::vec(prop::collection::vec(0u32..65_536, 1..20), 1..12),
            wide in any::<bool>(),
            shard_tokens in 1u64..30,
        ) {
            let vocab = if wide { 65_537 } else { 65_536 };
            let (dir, entries) = write(&documents, vocab, shard_tokens);
            let (mut tokens, mut starts) = (Vec::new(), Vec::new());
            for entry in &entries {
                let path = dir.path().join(&entry.file);
                verify_file(&path, entry).expect("verify");
                let shard = MappedShard::open(&path, entry).expect("open");
                prop_assert_eq!(entry.first_token, tokens.len() as u64);
                starts.extend(shard.starts_in(0..shard.len()).map(|start| tokens.len() + start));
                shard.copy(0..shard.len(), &mut tokens);
            }
            let mut expected = vec![0];
            expected.extend(documents.iter().scan(0, |at, d| { *at += d.len(); Some(*at) }));
            expected.pop();
            prop_assert_eq!(starts, expected);
            prop_assert_eq!(tokens, documents.concat());
        }
    }

    #[test]
    fn damage_is_found_and_named() {
        let (dir, entries) = write(&[vec![1, 2, 3], vec![4, 5]], 10, 100);
        let path = dir.path().join(&entries[0].file);
        let good = std::fs::read(&path).expect("read");
        for at in 0..good.len() {
            let mut flipped = good.clone();
            flipped[at] ^= 0x10;
            std::fs::write(&path, flipped).expect("write");
            let error = verify_file(&path, &entries[0]).expect_err("flipped");
            assert!(
                error.to_string().contains("train-00000.shard` is damaged"),
                "{error}"
            );
        }
        for size in 0..good.len() {
            std::fs::write(&path, &good[..size]).expect("write");
            assert!(matches!(
                MappedShard::open(&path, &entries[0]),
                Err(CorpusError::Damaged { .. })
            ));
        }
    }

    #[test]
    fn random_headers_never_panic() {
        let (dir, mut entries) = write(&[vec![1, 2, 3]], 10, 100);
        let path = dir.path().join(&entries[0].file);
        let good = std::fs::read(&path).expect("read");
        for at in 8..40 {
            let mut bad = good.clone();
            bad[at] = 0xff;
            std::fs::write(&path, bad).expect("write");
            assert!(MappedShard::open(&path, &entries[0]).is_err(), "byte {at}");
        }
        std::fs::write(&path, &good).expect("write");
        entries[0].tokens = u64::MAX;
        assert!(MappedShard::open(&path, &entries[0]).is_err());
    }
}
