//! The sums of one step, and the memory that its root lies in.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::SystemTime;

use tokio::sync::watch;

use super::{POISON, Told};
use crate::aggregate::{Aggregator, Data, OfferError, Offered, Shape};
use crate::ids::{RunId, SessionId, Step};
use crate::segment::Segment;
use crate::tree::{Node, Tree};

/// The sums of one step, and how far its roots are complete.
#[derive(Debug)]
pub(super) struct StepSums {
    run: RunId,
    pub step: Step,
    pub root: Node,
    pub sums: Aggregator,
    /// Index of the first chunk of the slice whose root is not complete.
    pub leading: watch::Sender<usize>,
    /// When its first chunk came from a worker's stream.
    pub began: OnceLock<SystemTime>,
    /// Nobody wants its roots any more.
    over: AtomicBool,
}

impl StepSums {
    pub fn new(
        run: RunId,
        step: Step,
        shape: Shape,
        slice: Range<usize>,
        roots: Arc<Roots>,
    ) -> Self {
        Self {
            run,
            step,
            root: Tree::new(shape.lanes).root(),
            leading: watch::Sender::new(slice.start),
            sums: Aggregator::with_root(
                shape,
                step,
                slice,
                Box::new(move |bytes| roots.take(bytes)),
            ),
            began: OnceLock::new(),
            over: AtomicBool::new(false),
        }
    }

    /// Tells whoever waits for roots that no more will come.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.leading.send_modify(|_| ());
    }

    /// Whether it is released. What is complete of it may still be sent.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Adds a chunk of a node, and wakes who waits for its root.
    pub fn offer(
        &self,
        node: Node,
        index: usize,
        data: Data,
        from: SessionId,
    ) -> Result<Offered, OfferError> {
        let offered = self.sums.offer(node, index, data, from)?;
        if offered.chunk_complete {
            let leading = self.sums.leading();
            self.leading.send_if_modified(|at| {
                let grows = leading > *at;
                *at = leading.max(*at);
                grows
            });
        }
        Ok(offered)
    }

    /// What the host is to be told of a push, in this order. An error is the fault of the one who pushed.
    pub fn told(&self, offered: Result<Offered, OfferError>) -> Result<Vec<Told>, OfferError> {
        let (run, step) = (&self.run, self.step);
        let offered = match offered {
            Ok(offered) => offered,
            Err(error @ OfferError::Mismatch { .. }) => {
                let run = run.clone();
                return Ok(vec![Told::Mismatch { run, step, error }]);
            }
            Err(error) => return Err(error),
        };
        let mut told = Vec::new();
        if !offered.delivered.is_empty() {
            let (run, lanes) = (run.clone(), offered.delivered);
            told.push(Told::Delivered { run, step, lanes });
        }
        if offered.all_complete {
            let run = run.clone();
            let digests = self.sums.digests().expect("every root is complete");
            told.push(Told::Complete { run, step, digests });
        }
        Ok(told)
    }
}

/// Segments for roots. Fresh memory is slow, so those that nobody reads any more are used again.
#[derive(Debug)]
pub(super) struct Roots {
    held: Mutex<Vec<Arc<Segment>>>,
    /// Whether workers on this host may read them where they lie.
    pub shares: bool,
}

impl Roots {
    pub fn new(shares: bool) -> Self {
        Self {
            held: Mutex::default(),
            shares,
        }
    }

    fn take(&self, bytes: usize) -> Arc<Segment> {
        let mut held = self.held.lock().expect(POISON);
        let idle = |segment: &Arc<Segment>| Arc::strong_count(segment) == 1;
        held.retain(|segment| !idle(segment) || !segment.is_burnt() && segment.len() == bytes);
        if let Some(found) = held.iter().find(|segment| idle(segment)) {
            return found.clone();
        }
        // Where memory cannot be shared, the root is sent to everybody.
        let shared = self.shares.then(|| Segment::shared(bytes).ok()).flatten();
        let fresh = Arc::new(shared.unwrap_or_else(|| Segment::private(bytes)));
        held.push(fresh.clone());
        fresh
    }

    /// Gives memory back: most of what is idle, or all of it.
    pub fn trim(&self, keep: usize) {
        let mut kept = 0;
        self.held.lock().expect(POISON).retain(|segment| {
            let idle = Arc::strong_count(segment) == 1;
            kept += usize::from(idle);
            !idle || kept <= keep
        });
    }
}
