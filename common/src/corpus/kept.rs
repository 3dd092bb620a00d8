//! Tokens that are kept until a corpus is complete, so that a preparation that was cut off goes on where it was. A piece of
//! text is known by its hash, so what is kept can be of use or not, but never wrong.
//!
//! The file has one record a piece, in order: 16 bytes of the text's BLAKE3, the number of tokens (u32), the tokens (u32
//! each), and the CRC-32 of all that, little-endian. What follows a record that is not whole does not count.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tracing::{debug, info};

/// Before the key of a preparation.
const PREFIX: &str = ".kept-";

/// Files of that kind that are left for later, at most.
const FILES: usize = 4;

/// Bytes of a text's hash.
const HASH: usize = 16;

/// More tokens are no record: a piece has 64 KiB of text, or is a document that cannot be cut.
const MAX_TOKENS: usize = 1 << 28;

/// By what a text is known: the beginning of its BLAKE3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TextHash([u8; HASH]);

impl TextHash {
    pub fn of(text: &str) -> Self {
        let hash = blake3::hash(text.as_bytes());
        Self(hash.as_bytes()[..HASH].try_into().expect("it is longer"))
    }
}

/// The tokens of one preparation.
pub(super) struct Kept {
    path: PathBuf,
    /// What was kept, until it ends or does not fit.
    old: Option<BufReader<File>>,
    /// Bytes of records that fit.
    good: u64,
    /// Pieces that were found.
    found: u64,
    /// Where more is written; nothing is kept where that fails, as it is not needed.
    new: Option<BufWriter<File>>,
    /// Nothing stays unless the process ends before this is dropped.
    goes: bool,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.goes && (self.old.is_some() || self.new.is_some()) {
            // One that stays is of no harm.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Kept {
    /// What there is of the preparation `key`, which names request and tokenizer; nothing is kept while another one of it is
    /// under way.
    pub fn open(directory: &Path, key: &str) -> Self {
        let path = directory.join(format!("{PREFIX}{key}"));
        let open = || -> io::Result<File> {
            std::fs::create_dir_all(directory)?;
            let options = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            options.try_lock()?;
            Ok(options)
        };
        let opened = open().and_then(|file| Ok((file.try_clone()?, file)));
        let (old, new) = match opened {
            Ok((old, new)) => (Some(BufReader::new(old)), Some(BufWriter::new(new))),
            Err(error) => {
                debug!(%error, path = %path.display(), "tokens are not kept for later");
                (None, None)
            }
        };
        Self {
            path,
            old,
            good: 0,
            found: 0,
            new,
            goes: true,
        }
    }

    /// The tokens of the next piece, if they were kept. After the first that were not, none are.
    pub fn next(&mut self, text: TextHash) -> Option<Vec<u32>> {
        let record = read_record(self.old.as_mut()?).ok();
        if let Some((hash, tokens, bytes)) = record
            && hash == text
        {
            self.good += bytes;
            self.found += 1;
            return Some(tokens);
        }
        self.old = None;
        if self.found > 0 {
            info!(
                pieces = self.found,
                "went on where a preparation was cut off"
            );
        }
        let cut = self.new.as_mut().map(|new| {
            new.get_ref().set_len(self.good)?;
            new.seek(SeekFrom::Start(self.good))
        });
        if let Some(Err(error)) = cut {
            debug!(%error, "tokens are not kept for later");
            self.new = None;
        }
        None
    }

    /// Keeps the tokens of a piece that was not found.
    pub fn add(&mut self, text: TextHash, tokens: &[u32]) {
        if let Some(new) = &mut self.new
            && let Err(error) = write_record(new, text, tokens)
        {
            debug!(%error, "tokens are not kept for later");
            self.new = None;
        }
    }
}

fn write_record(out: &mut impl Write, text: TextHash, tokens: &[u32]) -> io::Result<()> {
    let mut record = Vec::with_capacity(HASH + 4 * tokens.len() + 8);
    record.extend(text.0);
    record.extend((tokens.len() as u32).to_le_bytes());
    tokens
        .iter()
        .for_each(|token| record.extend(token.to_le_bytes()));
    let check = crc32fast::hash(&record);
    record.extend(check.to_le_bytes());
    out.write_all(&record)
}

/// A record: hash, tokens, and how long it is.
fn read_record(input: &mut impl Read) -> io::Result<(TextHash, Vec<u32>, u64)> {
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    let mut head = [0; HASH + 4];
    input.read_exact(&mut head)?;
    let count = number(&head[HASH..]) as usize;
    if count > MAX_TOKENS {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // No memory is taken for what is not there.
    let mut rest = Vec::new();
    let bytes = 4 * count + 4;
    input.take(bytes as u64).read_to_end(&mut rest)?;
    if rest.len() < bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (tokens, check) = rest.split_at(4 * count);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head);
    hasher.update(tokens);
    if hasher.finalize() != number(check) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let hash = TextHash(head[..HASH].try_into().expect("it begins with it"));
    let tokens = tokens.chunks_exact(4).map(number).collect();
    Ok((hash, tokens, (head.len() + bytes) as u64))
}

/// Deletes what was kept of all preparations but the last few that were cut off.
pub(super) fn tidy(directory: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            files.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    files.sort();
    let old = files.len().saturating_sub(FILES);
    files[..old]
        .iter()
        .try_for_each(|(_, path)| std::fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    /// As of a process that is killed.
    fn left_behind(directory: &Path, key: &str) -> Kept {
        let mut kept = Kept::open(directory, key);
        kept.goes = false;
        kept
    }

    fn keep(directory: &Path, texts: &[&str]) -> usize {
        let mut kept = left_behind(directory, "key");
        let mut found = 0;
        for text in texts {
            match kept.next(TextHash::of(text)) {
                Some(known) => {
                    assert_eq!(known, tokens(text));
                    found += 1;
                }
                None => kept.add(TextHash::of(text), &tokens(text)),
            }
        }
        found
    }

    #[test]
    fn what_was_kept_is_found_up_to_the_first_difference() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(keep(directory.path(), &["one", "two", "", "four"]), 0);
        assert_eq!(
            keep(directory.path(), &["one", "two", "", "four", "five"]),
            4
        );
        assert_eq!(keep(directory.path(), &["one", "TWO", "", "four"]), 1);
        assert_eq!(keep(directory.path(), &["one", "TWO", "", "four"]), 4);
        drop(Kept::open(directory.path(), "key"));
        assert_eq!(keep(directory.path(), &["one"]), 0);
    }

    #[test]
    fn a_record_that_was_cut_or_damaged_does_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".kept-key");
        let texts = ["one", "two", "three"];
        for at in [0, 5, 30, 40, 60] {
            let _ = std::fs::remove_file(&path);
            keep(directory.path(), &texts);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert!(keep(directory.path(), &texts) < 3, "{at}");
            assert_eq!(keep(directory.path(), &texts), 3, "mended");
            std::fs::write(&path, &bytes[..at]).unwrap();
            assert!(keep(directory.path(), &texts) < 3, "cut at {at}");
            assert_eq!(keep(directory.path(), &texts), 3, "mended");
        }
    }

    #[test]
    fn two_preparations_do_not_write_to_one_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = left_behind(directory.path(), "key");
        let mut second = Kept::open(directory.path(), "key");
        let a = TextHash::of("a");
        assert!(first.next(a).is_none() && second.next(a).is_none());
        second.add(a, &[7]);
        first.add(a, &[8]);
        drop(second);
        drop(first);
        assert_eq!(Kept::open(directory.path(), "key").next(a), Some(vec![8]));
    }

    #[test]
    fn only_the_newest_stay() {
        let directory = tempfile::tempdir().unwrap();
        for key in 0..7 {
            drop(left_behind(directory.path(), &key.to_string()));
        }
        tidy(directory.path()).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), FILES);
    }
}
