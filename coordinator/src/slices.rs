//! States that come in slices, one upload each, where the workers divide the optimizer's moments among them. A slice waits in a
//! file without a name, until those of its step are a whole state.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use cohort_common::ids::{RunId, Step};
use cohort_common::layout::{chunk_count, chunks_range};

/// Bytes of one element in each of the three buffers.
const F32: u64 = 4;

/// Bytes that are copied at a time.
const BLOCK: u64 = 1 << 20;

/// The slices that wait for others.
#[derive(Default)]
pub struct Slices(Mutex<Vec<Slice>>);

/// A slice of a state: its parameters, first and second moments.
pub struct Slice {
    run: RunId,
    step: Step,
    chunks: Range<u32>,
    file: File,
    /// Of each of the three.
    bytes: u64,
    /// Of all of them.
    written: u64,
}

impl Slice {
    /// An empty one of a state of `len` elements, whose file is in `directory`; `None` if the state has no such chunks.
    ///
    /// # Errors
    /// Of the disk.
    pub fn create(
        (run, step): (&RunId, Step),
        chunks: Range<u32>,
        len: usize,
        directory: &Path,
    ) -> io::Result<Option<Self>> {
        let Some(elements) = chunks_range(&chunks, len) else {
            return Ok(None);
        };
        // Its space is given back when it is closed, however the process ends.
        let file = tempfile::tempfile_in(directory)?;
        Ok(Some(Self {
            run: run.clone(),
            step,
            chunks,
            file,
            bytes: elements.len() as u64 * F32,
            written: 0,
        }))
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// Of the disk; or there are more than a slice has.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        if self.written > 3 * self.bytes {
            let reason = format!("a slice of {} bytes has more than that", 3 * self.bytes);
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        self.file.write_all(bytes)
    }

    /// Whether all of it is here.
    pub fn is_complete(&self) -> bool {
        self.written == 3 * self.bytes
    }

    /// Reads parameters (0), first (1) or second moments (2), piece by piece.
    fn read<E: From<io::Error>>(
        &mut self,
        buffer: u64,
        take: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.file.seek(SeekFrom::Start(buffer * self.bytes))?;
        let mut left = self.bytes;
        let mut block = vec![0; BLOCK.min(left) as usize];
        while left > 0 {
            let piece = &mut block[..BLOCK.min(left) as usize];
            self.file.read_exact(piece)?;
            take(piece)?;
            left -= piece.len() as u64;
        }
        Ok(())
    }
}

impl Slices {
    /// Takes in a complete slice of a state of `len` elements. Gives all slices of the state, in their order, if none is
    /// missing now.
    pub fn add(&self, slice: Slice, len: usize) -> Option<Vec<Slice>> {
        let (run, step) = (slice.run.clone(), slice.step);
        let mut held = self.0.lock().expect("no panic under this lock");
        // Slices of another step of this run come too late, and a slice that comes again is the same.
        let apart = |a: &Range<u32>, b: &Range<u32>| a.end <= b.start || b.end <= a.start;
        held.retain(|other| {
            other.run != run || other.step == step && apart(&other.chunks, &slice.chunks)
        });
        held.push(slice);
        let of_run = held.iter().filter(|other| other.run == run);
        let chunks: usize = of_run.map(|other| other.chunks.len()).sum();
        if chunks < chunk_count(len) {
            return None;
        }
        let mut all: Vec<Slice> = held.extract_if(.., |other| other.run == run).collect();
        all.sort_by_key(|slice| slice.chunks.start);
        Some(all)
    }
}

/// Reads a whole state as one stream: all parameters, then all first, then all second moments.
///
/// # Errors
/// Of the disk, or those of `take`.
pub fn read_all<E: From<io::Error>>(
    slices: &mut [Slice],
    mut take: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    for buffer in 0..3 {
        for slice in slices.iter_mut() {
            slice.read(buffer, &mut take)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use cohort_common::layout::CHUNK_LEN;

    use super::*;

    fn slice(step: Step, chunks: Range<u32>, len: usize, directory: &Path) -> Slice {
        let run = RunId::new("fox");
        let made = Slice::create((&run, step), chunks.clone(), len, directory);
        let mut slice = made.unwrap().unwrap();
        let elements = chunks_range(&chunks, len).unwrap();
        for buffer in 0..3 {
            assert!(!slice.is_complete());
            for element in elements.clone() {
                slice
                    .write(&((buffer * len + element) as u32).to_le_bytes())
                    .unwrap();
            }
        }
        assert!(slice.is_complete());
        assert!(slice.write(&[0]).is_err());
        slice
    }

    #[test]
    fn slices_in_any_order_are_the_state() {
        let directory = tempfile::tempdir().unwrap();
        let (at, len) = (directory.path(), 3 * CHUNK_LEN + 7);
        let slices = Slices::default();
        assert!(slices.add(slice(4, 0..1, len, at), len).is_none());
        // Of a newer step: the older one will not be whole any more.
        assert!(slices.add(slice(5, 3..4, len, at), len).is_none());
        assert!(slices.add(slice(5, 0..1, len, at), len).is_none());
        assert!(slices.add(slice(5, 0..1, len, at), len).is_none());
        let mut all = slices.add(slice(5, 1..3, len, at), len).unwrap();
        let mut found = Vec::new();
        let take = |bytes: &[u8]| {
            found.extend_from_slice(bytes);
            io::Result::Ok(())
        };
        read_all(&mut all, take).unwrap();
        let expected: Vec<u8> = (0..3 * len as u32).flat_map(u32::to_le_bytes).collect();
        assert!(found == expected);
        assert_eq!(std::fs::read_dir(at).unwrap().count(), 0);
        let run = RunId::new("fox");
        for wrong in [4..5, 3..5, 2..2] {
            let slice = Slice::create((&run, 5), wrong.clone(), len, at).unwrap();
            assert!(slice.is_none(), "{wrong:?}");
        }
    }
}
