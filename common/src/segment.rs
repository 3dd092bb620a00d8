//! Memory that a process of the same user on the same host can read: gradients of one host need not travel.
//!
//! On Linux a segment is a memfd. It has no name in any file system, so nothing stays behind when its processes die,
//! and it is found as `/proc/PID/fd/FD`, which the kernel opens only for those who could debug the process. Whoever
//! opens one reads: it must be a sealed memfd of its own user that cannot shrink (so that no access can fault) and that
//! begins with the expected nonce (so that it is not another host's process of the same number). Elsewhere a segment
//! is plain memory that nobody else finds.

mod slots;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memmap2::{MmapMut, MmapRaw};

pub use slots::{Slot, Slots};

/// The first page: the nonce, and nothing else.
const HEADER: usize = 4096;

/// Bytes of a nonce.
const NONCE: usize = 16;

/// How another process finds a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The process.
    pub pid: u32,
    /// Its descriptor.
    pub fd: u32,
    /// The first bytes.
    pub nonce: [u8; NONCE],
    /// Bytes behind the first page.
    pub bytes: u64,
}

/// Private segments of fewer bytes come from the allocator: to map and to unmap costs more than to fill them.
const MAPPED: usize = 64 << 10;

/// Where a segment's bytes lie.
enum Memory {
    /// Behind the first page of a mapping.
    Mapped(MmapRaw),
    /// Atomics, because they are written through shared references.
    Plain(Box<[AtomicU64]>),
}

impl Memory {
    fn first(&self) -> *mut u8 {
        match self {
            // SAFETY: every mapping here is longer than the first page, or ends with it.
            Self::Mapped(memory) => unsafe { memory.as_mut_ptr().add(HEADER) },
            Self::Plain(memory) => memory.as_ptr().cast_mut().cast(),
        }
    }
}

/// Memory for gradients, aligned to eight bytes (a large or shared one: to a page) and zero at first.
pub struct Segment {
    memory: Memory,
    address: Option<Address>,
    /// Keeps the descriptor open that the address names.
    _file: Option<std::fs::File>,
    bytes: usize,
    burnt: AtomicBool,
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("address", &self.address)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Segment {
    /// Memory of this process alone.
    ///
    /// # Panics
    /// If there is no memory.
    pub fn private(bytes: usize) -> Self {
        let memory = if bytes < MAPPED {
            Memory::Plain((0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect())
        } else {
            Memory::Mapped(
                MmapMut::map_anon(HEADER + bytes)
                    .expect("there is memory")
                    .into(),
            )
        };
        Self::of(memory, None, None, bytes)
    }

    fn of(
        memory: Memory,
        address: Option<Address>,
        file: Option<std::fs::File>,
        bytes: usize,
    ) -> Self {
        Self {
            memory,
            address,
            _file: file,
            bytes,
            burnt: AtomicBool::new(false),
        }
    }

    /// Memory that can be shared, where the system has such a thing. Pages are taken when they are first touched.
    pub fn shared(bytes: usize) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        return linux::create(bytes);
        #[cfg(not(target_os = "linux"))]
        return Err(io::Error::from(io::ErrorKind::Unsupported)).map(|()| Self::private(bytes));
    }

    /// The segment at an address, to be read only. `at_most` bounds what is mapped.
    pub fn open(address: &Address, at_most: u64) -> io::Result<Self> {
        if address.bytes > at_most {
            let text = format!("it claims {} bytes", address.bytes);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        #[cfg(target_os = "linux")]
        return linux::open(address);
        #[cfg(not(target_os = "linux"))]
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }

    /// Where others find it; `None` if it cannot be shared.
    pub fn address(&self) -> Option<&Address> {
        self.address.as_ref()
    }

    /// Bytes that it holds.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Says that somebody may go on reading it, nobody knows how long: it must not be written again.
    pub fn burn(&self) {
        self.burnt.store(true, Ordering::Release);
    }

    /// Whether it must not be written again.
    pub fn is_burnt(&self) -> bool {
        self.burnt.load(Ordering::Acquire)
    }

    fn start(&self, range: &Range<usize>) -> *mut u8 {
        let inside = range.start <= range.end && range.end <= self.bytes;
        assert!(inside, "{range:?} lies outside {} bytes", self.bytes);
        // SAFETY: `bytes` bytes lie behind the first, and the range lies in them.
        unsafe { self.memory.first().add(range.start) }
    }

    /// Bytes of it.
    ///
    /// # Safety
    /// Nobody, in any process, writes them while the slice lives.
    ///
    /// # Panics
    /// If the range lies outside.
    pub unsafe fn bytes(&self, range: Range<usize>) -> &[u8] {
        let start = self.start(&range);
        // SAFETY: `start` checks the bounds; the memory is readable and lives as long as `self`; the caller vouches for
        // the rest.
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }

    /// Elements of it, to be written. `range` counts elements.
    ///
    /// # Safety
    /// It is a segment of this process, and nobody, in any process, reads or writes these elements while the slice lives.
    ///
    /// # Panics
    /// If the range lies outside.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn floats_mut(&self, range: Range<usize>) -> &mut [f32] {
        let start = self.start(&(range.start * 4..range.end * 4));
        // SAFETY: as above; aligned to eight bytes plus a multiple of four is aligned, and any bytes are floats.
        unsafe { std::slice::from_raw_parts_mut(start.cast(), range.len()) }
    }
}

/// A part of a segment that nobody writes as long as its peer keeps to the protocol: until the step that it belongs to
/// is applied (nodes), or until the reader says that it is done (roots). A peer that breaks this gets wrong sums, as it
/// would if it sent wrong numbers; any bytes are floats, and nothing is addressed by what is read.
#[derive(Clone, Debug)]
pub struct Part {
    segment: Arc<Segment>,
    start: usize,
    len: usize,
}

impl Part {
    /// `len` bytes from `start` on; `None` if they lie outside or are not aligned.
    pub fn new(segment: &Arc<Segment>, start: u64, len: usize) -> Option<Self> {
        let start = usize::try_from(start).ok()?;
        let end = start.checked_add(len)?;
        (end <= segment.bytes && start.is_multiple_of(4)).then(|| Self {
            segment: segment.clone(),
            start,
            len,
        })
    }

    /// The part as floats.
    pub fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(self.as_ref())
    }
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: nobody writes it, as the type says.
        unsafe { self.segment.bytes(self.start..self.start + self.len) }
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::{File, OpenOptions};
    use std::io::{Error, ErrorKind, Read, Result};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

    use memmap2::MmapOptions;
    use rustix::fs::{MemfdFlags, OFlags, SealFlags};

    use super::{Address, HEADER, Memory, NONCE, Segment};

    /// What the kernel calls a memfd of ours.
    const NAME: &str = "cohort-gradients";

    pub(super) fn create(bytes: usize) -> Result<Segment> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create(NAME, flags)?);
        let mut nonce = [0; NONCE];
        File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        file.set_len((HEADER + bytes) as u64)?;
        file.write_all_at(&nonce, 0)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let memory = MmapOptions::new().len(HEADER + bytes).map_raw(&file)?;
        let address = Address {
            pid: std::process::id(),
            fd: file.as_raw_fd() as u32,
            nonce,
            bytes: bytes as u64,
        };
        Ok(Segment::of(
            Memory::Mapped(memory),
            Some(address),
            Some(file),
            bytes,
        ))
    }

    pub(super) fn open(address: &Address) -> Result<Segment> {
        let wrong = |text: &str| Error::new(ErrorKind::InvalidData, text);
        let path = format!("/proc/{}/fd/{}", address.pid, address.fd);
        // Asked before it is opened, as opening some devices does something.
        if !std::fs::read_link(&path)?.starts_with(format!("/memfd:{NAME} (deleted)")) {
            return Err(wrong("it is no segment"));
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
            .open(&path)?;
        if !rustix::fs::fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(wrong("it can shrink"));
        }
        let metadata = file.metadata()?;
        if metadata.uid() != std::fs::metadata("/proc/self")?.uid() {
            return Err(wrong("it is another user's"));
        }
        if metadata.len() < HEADER as u64 + address.bytes {
            return Err(wrong("it is smaller than was said"));
        }
        let mut nonce = [0; NONCE];
        file.read_exact_at(&mut nonce, 0)?;
        if nonce != address.nonce {
            return Err(wrong("it is another process's"));
        }
        let bytes = usize::try_from(address.bytes).map_err(|_| wrong("it is too large"))?;
        let options = MmapOptions::new().len(HEADER + bytes).clone();
        let memory = options.map_raw_read_only(&file)?;
        Ok(Segment::of(Memory::Mapped(memory), None, None, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_segment_does_not_hold_is_no_part_of_it() {
        let segment = Arc::new(Segment::private(64));
        assert!(Part::new(&segment, 0, 64).is_some());
        assert!(Part::new(&segment, 4, 64).is_none());
        assert!(Part::new(&segment, 2, 4).is_none());
        assert!(Part::new(&segment, u64::MAX - 3, 8).is_none());
        assert!(segment.address().is_none());
    }

    #[cfg(target_os = "linux")]
    mod linux {
        use super::*;

        #[test]
        fn what_one_writes_the_other_reads() {
            let segment = Segment::shared(4096).unwrap();
            // SAFETY: nobody else knows the segment yet.
            unsafe { segment.floats_mut(1..3) }.copy_from_slice(&[1.5, -2.0]);
            let found = Arc::new(Segment::open(segment.address().unwrap(), 4096).unwrap());
            assert_eq!(Part::new(&found, 4, 8).unwrap().floats(), [1.5, -2.0]);
        }

        #[test]
        fn only_the_right_segment_is_opened() {
            let segment = Segment::shared(4096).unwrap();
            let right = segment.address().unwrap().clone();
            let refused = |address: Address| Segment::open(&address, 8192).unwrap_err().to_string();
            let mut other = right.clone();
            other.nonce[3] ^= 1;
            assert_eq!(refused(other), "it is another process's");
            let longer = Address {
                bytes: 4100,
                ..right.clone()
            };
            assert_eq!(refused(longer), "it is smaller than was said");
            let huge = Address {
                bytes: 1 << 40,
                ..right.clone()
            };
            assert!(refused(huge).contains("claims"));
            // Standard output, whatever it is.
            assert!(Segment::open(&Address { fd: 1, ..right }, 8192).is_err());
        }

        #[test]
        fn a_memfd_that_can_shrink_is_refused() {
            use std::os::fd::AsRawFd;
            let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
            let file = rustix::fs::memfd_create("cohort-gradients", flags).unwrap();
            let file = std::fs::File::from(file);
            file.set_len(8192).unwrap();
            let address = Address {
                pid: std::process::id(),
                fd: file.as_raw_fd() as u32,
                nonce: [0; NONCE],
                bytes: 4096,
            };
            let error = Segment::open(&address, 4096).unwrap_err();
            assert_eq!(error.to_string(), "it can shrink");
        }
    }
}
