//! Which documents are near duplicates of each other: signatures on disk, band by band, and sets of documents that hang
//! together.
//!
//! Two documents whose signatures agree on a band are a candidate pair; a pair whose signatures agree on as many values as
//! the threshold asks for is a pair of near duplicates; what pairs hang together is a cluster, and of a cluster the first
//! document in order stays. Which pairs are compared does not depend on the order of comparison, and so neither do the
//! clusters, for any number of threads.
//!
//! A document takes at most 512 bytes in the files. In memory it takes 20 bytes, while one band after the other is sorted.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use bytemuck::cast_slice;
use memmap2::Mmap;
use rayon::prelude::*;

use super::minhash::{Bands, Signature};
use crate::corpus::CorpusError;

/// Of documents that agree on one band, each is compared with the first so many: with all in any ordinary bucket, and not
/// with every other one where a template has filled a hundred thousand pages.
const COMPARED: usize = 128;

/// A document with a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signed {
    /// Its number.
    pub document: u64,
    /// Its characters.
    pub chars: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// Signatures as they are written, in the order of the documents.
pub struct Signatures {
    bands: Bands,
    /// Values on which near duplicates agree at least.
    needed: usize,
    files: Vec<Spill>,
    documents: Spill,
    count: u64,
}

/// A file of values of one size. Its directory is removed by whoever made it.
struct Spill {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Spill {
    fn create(path: PathBuf) -> Result<Self, CorpusError> {
        let file = File::create_new(&path).map_err(CorpusError::write(&path))?;
        let file = BufWriter::new(file);
        Ok(Self { path, file })
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), CorpusError> {
        self.file
            .write_all(bytes)
            .map_err(CorpusError::write(&self.path))
    }

    /// What was written, mapped into memory.
    fn map(mut self) -> Result<Mmap, CorpusError> {
        self.file.flush().map_err(CorpusError::write(&self.path))?;
        let file = File::open(&self.path).map_err(CorpusError::read(&self.path))?;
        // SAFETY: the file was made by this process under a name that no other has, and nobody writes to it any more.
        unsafe { Mmap::map(&file) }.map_err(CorpusError::read(&self.path))
    }
}

impl Signatures {
    /// None yet; files go into `directory`.
    pub fn create(directory: &Path, threshold: f64) -> Result<Self, CorpusError> {
        let bands = Bands::for_threshold(threshold);
        let spill = |name: String| Spill::create(directory.join(name));
        let files = (0..bands.bands).map(|band| spill(format!("band-{band}")));
        Ok(Self {
            bands,
            needed: (threshold * bands.values() as f64).ceil() as usize,
            files: files.collect::<Result<_, _>>()?,
            documents: spill("documents".into())?,
            count: 0,
        })
    }

    /// Takes the next document.
    pub fn push(&mut self, signed: Signed, signature: &Signature) -> Result<(), CorpusError> {
        if self.count == u64::from(u32::MAX) {
            return Err(CorpusError::BadOption {
                option: "corpus.dedup",
                value: "near".into(),
                bound: "\"exact\" for more than 4294967295 documents",
            });
        }
        let parts = signature.0.chunks_exact(self.bands.rows);
        for (file, part) in self.files.iter_mut().zip(parts) {
            file.push(cast_slice(part))?;
        }
        let numbers = [signed.document, signed.chars, signed.bytes];
        self.documents.push(cast_slice(&numbers))?;
        self.count += 1;
        Ok(())
    }

    /// The documents that are near duplicates of an earlier one, in order.
    pub fn near_duplicates(self) -> Result<Vec<Signed>, CorpusError> {
        if self.count < 2 {
            return Ok(Vec::new());
        }
        let maps = self.files.into_iter().map(Spill::map);
        let bands = MappedBands {
            bands: self.bands,
            needed: self.needed,
            maps: maps.collect::<Result<_, _>>()?,
        };
        let firsts = bands.clusters(self.count as u32);
        let documents = self.documents.map()?;
        let documents: &[[u64; 3]] = cast_slice(&documents);
        let repeated = firsts
            .iter()
            .zip(0..)
            .zip(documents)
            .filter(|((first, own), _)| *first != own);
        Ok(repeated
            .map(|(_, &[document, chars, bytes])| Signed {
                document,
                chars,
                bytes,
            })
            .collect())
    }
}

/// All signatures, for comparing.
struct MappedBands {
    bands: Bands,
    needed: usize,
    maps: Vec<Mmap>,
}

impl MappedBands {
    /// For each of `count` documents the first of its cluster.
    fn clusters(&self, count: u32) -> Vec<u32> {
        let mut sets = Sets::new(count);
        for band in 0..self.bands.bands {
            // Pairs that hang together already need no comparison; that cannot change what hangs together in the end.
            for (a, b) in self.pairs_of_band(band, &sets) {
                sets.unite(a, b);
            }
            sets.flatten();
        }
        sets.parents
    }

    fn values(&self, band: usize) -> &[u32] {
        cast_slice(&self.maps[band])
    }

    /// Near duplicates that agree on a band, as far as they do not hang together yet.
    fn pairs_of_band(&self, band: usize, sets: &Sets) -> Vec<(u32, u32)> {
        let values = self.values(band).par_chunks_exact(self.bands.rows);
        let mut keyed: Vec<(u64, u32)> = values
            .enumerate()
            .map(|(document, values)| (key(values), document as u32))
            .collect();
        keyed.par_sort_unstable();
        let buckets = keyed.par_chunk_by(|a, b| a.0 == b.0);
        buckets
            .filter(|bucket| bucket.len() > 1)
            .flat_map_iter(|bucket| self.pairs_of_bucket(bucket, sets))
            .collect()
    }

    fn pairs_of_bucket(&self, bucket: &[(u64, u32)], sets: &Sets) -> Vec<(u32, u32)> {
        let mut pairs = Vec::new();
        let mut here = Sets::new(bucket.len() as u32);
        for (later, &(_, b)) in bucket.iter().enumerate() {
            for (earlier, &(_, a)) in bucket[..later.min(COMPARED)].iter().enumerate() {
                let (earlier, later) = (earlier as u32, later as u32);
                let known = sets.parents[a as usize] == sets.parents[b as usize]
                    || here.first(earlier) == here.first(later);
                if !known && self.are_near(a as usize, b as usize) {
                    here.unite(earlier, later);
                    pairs.push((a, b));
                }
            }
        }
        pairs
    }

    fn are_near(&self, a: usize, b: usize) -> bool {
        let rows = self.bands.rows;
        let mut may_differ = self.bands.values() - self.needed;
        for band in 0..self.bands.bands {
            let values = self.values(band);
            let of = |document: usize| &values[document * rows..(document + 1) * rows];
            let differ = of(a).iter().zip(of(b)).filter(|(a, b)| a != b).count();
            match may_differ.checked_sub(differ) {
                Some(left) => may_differ = left,
                None => return false,
            }
        }
        true
    }
}

/// One number for the values of a band.
fn key(values: &[u32]) -> u64 {
    let hash = blake3::hash(cast_slice(values));
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
}

/// Disjoint sets of numbers, each named by its least (Galler and Fischer 1964).
struct Sets {
    /// A number of the same set that is not larger; its own where it is the least.
    parents: Vec<u32>,
}

impl Sets {
    fn new(count: u32) -> Self {
        Self {
            parents: (0..count).collect(),
        }
    }

    fn first(&mut self, mut of: u32) -> u32 {
        loop {
            let parent = self.parents[of as usize];
            if parent == of {
                return of;
            }
            let above = self.parents[parent as usize];
            self.parents[of as usize] = above;
            of = above;
        }
    }

    fn unite(&mut self, a: u32, b: u32) {
        let (a, b) = (self.first(a), self.first(b));
        self.parents[a.max(b) as usize] = a.min(b);
    }

    /// Afterwards every parent is the least of its set.
    fn flatten(&mut self) {
        for of in 0..self.parents.len() {
            self.parents[of] = self.parents[self.parents[of] as usize];
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sets_are_named_by_their_least() {
        let mut sets = Sets::new(6);
        for (a, b) in [(4, 5), (1, 4), (2, 3)] {
            sets.unite(a, b);
        }
        sets.flatten();
        assert_eq!(sets.parents, [0, 1, 2, 2, 1, 1]);
    }

    proptest! {
        #[test]
        fn sets_do_not_depend_on_the_order_of_pairs(pairs in prop::collection::vec((0u32..30, 0u32..30), 0..40)) {
            let sets = |pairs: &mut dyn Iterator<Item = &(u32, u32)>| {
                let mut sets = Sets::new(30);
                pairs.for_each(|(a, b)| sets.unite(*a, *b));
                sets.flatten();
                sets.parents
            };
            let forward = sets(&mut pairs.iter());
            prop_assert_eq!(&forward, &sets(&mut pairs.iter().rev()));
            for (a, b) in &pairs {
                prop_assert_eq!(forward[*a as usize], forward[*b as usize]);
            }
        }
    }
}
