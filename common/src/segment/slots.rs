//! Places of one size in a segment, each filled by one holder and then read by others for a while.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Segment;

/// Slots begin at pages.
const PAGE: usize = 4096;

/// The slots of a segment. Memory is only what has been filled.
pub struct Slots {
    segment: Arc<Segment>,
    /// Elements of each.
    len: usize,
    states: Vec<State>,
}

#[derive(Default)]
struct State {
    /// Somebody has it.
    held: AtomicBool,
    /// The step until whose end others may read it; 0 is nobody.
    lent: AtomicU64,
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots")
            .field("segment", &self.segment)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Slots {
    /// Bytes that `count` slots of `len` elements take; `None` if no memory has as many.
    pub fn room(len: usize, count: usize) -> Option<usize> {
        bytes(len).checked_mul(count)
    }

    /// As many slots of `len` elements as the segment has room for.
    pub fn of(segment: Segment, len: usize) -> Arc<Self> {
        let count = segment.len() / bytes(len).max(1);
        Arc::new(Self {
            segment: Arc::new(segment),
            len,
            states: (0..count).map(|_| State::default()).collect(),
        })
    }

    /// The segment.
    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// A slot that nobody has and nobody reads, with whatever it holds.
    pub fn take(self: &Arc<Self>) -> Option<Slot> {
        let unread = |state: &State| state.lent.load(Ordering::Acquire) == 0;
        let index = self.states.iter().position(|state| {
            unread(state)
                && !state.held.swap(true, Ordering::AcqRel)
                // Whoever had it may have lent it in between.
                && (unread(state) || {
                    state.held.store(false, Ordering::Release);
                    false
                })
        })?;
        Some(Slot {
            slots: self.clone(),
            index,
        })
    }

    /// Others do not read what was lent for steps up to this one any more.
    pub fn release(&self, through: u64) {
        for state in &self.states {
            let read = state.lent.load(Ordering::Acquire);
            if read <= through {
                state.lent.store(0, Ordering::Release);
            }
        }
    }
}

/// Bytes from one slot to the next.
fn bytes(len: usize) -> usize {
    (len * 4).next_multiple_of(PAGE)
}

/// A slot that its holder may write until it is lent. Without a holder, and read by nobody, it is free again.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    index: usize,
}

impl Slot {
    /// Where it begins in its segment, in bytes.
    pub fn offset(&self) -> usize {
        self.index * bytes(self.slots.len)
    }

    /// Whether it is one of these.
    pub fn is_of(&self, slots: &Arc<Slots>) -> bool {
        Arc::ptr_eq(&self.slots, slots)
    }

    /// From now on others may read it until this step ends: nobody writes it.
    pub fn lend(&self, until: u64) {
        self.state().lent.store(until.max(1), Ordering::Release);
    }

    /// Whether others may read it.
    pub fn is_lent(&self) -> bool {
        self.state().lent.load(Ordering::Acquire) != 0
    }

    /// Elements of it, lent or not.
    ///
    /// # Safety
    /// Nobody, in any process, reads or writes these elements while the slice lives.
    ///
    /// # Panics
    /// If the range lies outside.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part_mut(&self, range: Range<usize>) -> &mut [f32] {
        let Range { start, end } = self.elements();
        assert!(range.end <= end - start, "{range:?} lies outside a slot");
        // SAFETY: the segment is this process's; the caller vouches for the rest.
        unsafe {
            let segment = &self.slots.segment;
            segment.floats_mut(start + range.start..start + range.end)
        }
    }

    fn state(&self) -> &State {
        &self.slots.states[self.index]
    }

    fn elements(&self) -> Range<usize> {
        let first = self.offset() / 4;
        first..first + self.slots.len
    }
}

impl Deref for Slot {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let Range { start, end } = self.elements();
        // SAFETY: the segment is this process's, and only the holder writes, through `deref_mut` and so not now.
        let bytes = unsafe { self.slots.segment.bytes(start * 4..end * 4) };
        bytemuck::cast_slice(bytes)
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [f32] {
        assert!(!self.is_lent(), "others read this slot");
        // SAFETY: the segment is this process's, this is the only holder, and nobody else reads it, as just checked.
        unsafe { self.slots.segment.floats_mut(self.elements()) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.state().held.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(count: usize) -> Arc<Slots> {
        let bytes = Slots::room(5000, count).expect("a size");
        Slots::of(Segment::private(bytes), 5000)
    }

    #[test]
    fn a_slot_is_free_when_nobody_has_it_and_nobody_reads_it() {
        let slots = slots(2);
        let mut first = slots.take().expect("a slot");
        let second = slots.take().expect("a slot");
        assert!(slots.take().is_none());
        assert_ne!(first.offset(), second.offset());
        first.fill(3.0);
        first[4999] = 4.0;
        assert_eq!((first.len(), first[0], first[4999]), (5000, 3.0, 4.0));
        assert!(second.iter().all(|x| *x == 0.0));
        first.lend(7);
        assert!(first.is_lent() && !second.is_lent());
        drop(first);
        assert!(slots.take().is_none(), "it is still read");
        slots.release(6);
        assert!(slots.take().is_none(), "it is still read");
        slots.release(7);
        assert_eq!(slots.take().expect("a slot")[4999], 4.0);
    }

    #[test]
    #[should_panic(expected = "others read this slot")]
    fn what_others_read_is_not_written() {
        let mut slot = slots(1).take().expect("a slot");
        slot.lend(1);
        slot[0] = 1.0;
    }

    #[test]
    fn sizes_beyond_all_memory_are_none() {
        assert_eq!(Slots::room(usize::MAX / 8, 16), None);
    }
}
