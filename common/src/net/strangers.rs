//! Connections on which nobody has been let in yet. They have a while, and there are only so many: whoever opens many,
//! and says nothing, little, or nonsense, pushes out his own, and holds up nobody who shows that he may come in.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Waker};

/// Strangers at a time, at most, and at most for half of the files that may be open. The oldest goes when another comes: who
/// may come in has done so long before.
const MOST: usize = 1024;

const STRANGE: u8 = 0;
const KNOWN: u8 = 1;
const UNWANTED: u8 = 2;

/// Whether somebody was let in on a connection.
#[derive(Debug, Default)]
pub(super) struct Standing {
    state: AtomicU8,
    waker: Mutex<Option<Waker>>,
}

impl Standing {
    /// Somebody was let in: the connection may stay.
    pub(super) fn let_in(&self) {
        // One that was just pushed out stays out.
        let _ = self.change(KNOWN);
    }

    pub(super) fn is_known(&self) -> bool {
        self.state.load(Ordering::Acquire) == KNOWN
    }

    /// Whether it has to go; if not, the task is woken when that changes.
    pub(super) fn is_unwanted(&self, context: &Context<'_>) -> bool {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(context.waker().clone());
        self.state.load(Ordering::Acquire) == UNWANTED
    }

    /// Makes a stranger something else; `false` if it was none any more.
    fn change(&self, to: u8) -> bool {
        let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
        self.state
            .compare_exchange(STRANGE, to, success, failure)
            .is_ok()
    }

    fn push_out(&self) {
        if self.change(UNWANTED) {
            let waker = self
                .waker
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

/// The strangers of a listener, the oldest first. Those that left or became known are still among them until it is their turn.
#[derive(Debug)]
pub(super) struct Strangers {
    all: VecDeque<Weak<Standing>>,
    most: usize,
}

impl Strangers {
    /// None yet; `files` may be open.
    pub(super) fn new(files: usize) -> Self {
        Self {
            all: VecDeque::new(),
            most: (files / 2).clamp(1, MOST),
        }
    }

    /// One more comes.
    pub(super) fn add(&mut self) -> Arc<Standing> {
        if self.all.len() >= self.most {
            let is_strange = |standing: &Weak<Standing>| {
                let standing = standing.upgrade();
                standing.is_some_and(|standing| !standing.is_known())
            };
            self.all.retain(is_strange);
        }
        while self.all.len() >= self.most {
            let oldest = self.all.pop_front().and_then(|oldest| oldest.upgrade());
            if let Some(oldest) = oldest {
                oldest.push_out();
            }
        }
        let standing = Arc::new(Standing::default());
        self.all.push_back(Arc::downgrade(&standing));
        standing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_stranger_goes_and_who_is_known_stays() {
        let context = &Context::from_waker(Waker::noop());
        let mut strangers = Strangers::new(usize::MAX);
        let all: Vec<_> = (0..MOST).map(|_| strangers.add()).collect();
        all[0].let_in();
        let gone = |standing: &Arc<Standing>| standing.is_unwanted(context);
        let next = strangers.add();
        assert_eq!(
            all.iter().filter(|s| gone(s)).count(),
            0,
            "the first has made room"
        );
        let last = strangers.add();
        assert!(gone(&all[1]) && !gone(&all[0]) && !gone(&all[2]));
        all[1].let_in();
        assert!(gone(&all[1]), "too late");
        assert!(!gone(&next) && !gone(&last));
        drop(all);
        strangers.add();
        assert!(strangers.all.len() < MOST, "who has left takes no place");
    }

    #[test]
    fn where_few_files_may_be_open_there_are_few_strangers() {
        let mut strangers = Strangers::new(6);
        let all: Vec<_> = (0..5).map(|_| strangers.add()).collect();
        let context = &Context::from_waker(Waker::noop());
        let gone = all.iter().filter(|standing| standing.is_unwanted(context));
        assert_eq!(gone.count(), 2);
    }
}
