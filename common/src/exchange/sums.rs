//! The sums of one step, and the memory that its root lies in.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::SystemTime;

use tokio::sync::watch;

use super::{POISON, Told};
use crate::aggregate::{Aggregator, Data, Duty, OfferError, Offered, Passed, RootChunk, Shape};
use crate::ids::{RunId, SessionId, Step};
use crate::segment::Segment;
use crate::tree::{Node, Tree};

/// What is done with the root of a chunk: of a step, with this index, in f32.
type Take = dyn Fn(Step, usize, &[f32]) + Send + Sync;

/// Who takes in roots.
#[derive(Clone)]
pub(super) struct Taker(pub Arc<Take>);

impl fmt::Debug for Taker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Taker").finish_non_exhaustive()
    }
}

/// The sums of one step, and how far its roots are complete.
#[derive(Debug)]
pub(super) struct StepSums {
    pub run: RunId,
    pub step: Step,
    pub root: Node,
    pub sums: Aggregator,
    /// Who is given the roots.
    take: Option<Taker>,
    /// Where more is done than to sum a slice.
    pub gathering: Option<Gathering>,
    /// Index of the first chunk that is not finished.
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
        duty: Duty,
        roots: Arc<Roots>,
        take: Option<Taker>,
    ) -> Self {
        let make_root = Box::new(move |bytes| roots.take(bytes));
        let sums = Aggregator::with_root(shape, step, duty, make_root);
        Self {
            run,
            step,
            root: Tree::new(shape.lanes).root(),
            leading: watch::Sender::new(sums.leading()),
            sums,
            take,
            gathering: None,
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

    /// The finished root of a chunk: of the slice, or one that was relayed.
    pub fn root_of(&self, index: usize) -> Option<RootChunk> {
        let gathering = self.gathering.as_ref();
        match gathering.filter(|_| !self.sums.slice().contains(&index)) {
            None => self.sums.root(index),
            Some(gathering) => gathering.lock().get(&index).cloned(),
        }
    }

    /// The roots that a worker gets from here, in the order in which it gets them.
    pub fn wanted_by(&self, session: SessionId) -> Vec<Range<usize>> {
        let slice = self.sums.slice();
        let Some(gathering) = &self.gathering else {
            return vec![slice];
        };
        match gathering.far.get(&session) {
            Some(part) => vec![part.clone()],
            None => {
                let Range { start, end } = self.sums.chunks();
                vec![start..slice.start, slice.clone(), slice.end..end]
            }
        }
    }

    /// Takes in a root that is handed on.
    pub fn relay(&self, index: usize, root: RootChunk) {
        let others = self.sums.chunks().contains(&index) && !self.sums.slice().contains(&index);
        if let Some(gathering) = self.gathering.as_ref().filter(|_| others) {
            gathering.lock().entry(index).or_insert(root);
            self.leading.send_modify(|_| ());
        }
    }

    /// Something of a chunk has gone to its owner.
    pub fn passed_on(&self, index: usize) {
        self.note(&self.sums.passed_on(index));
    }

    /// Wakes who waits for roots or credits.
    fn note(&self, offered: &Offered) {
        if !offered.chunk_complete {
            return;
        }
        let leading = self.sums.leading();
        self.leading.send_if_modified(|at| {
            let grows = leading > *at;
            *at = leading.max(*at);
            // Roots may be sent before chunks that are only passed on.
            grows || self.gathering.is_some()
        });
    }

    /// Adds a chunk of a node, and wakes who waits for its root.
    pub fn offer(
        &self,
        node: Node,
        index: usize,
        data: Data,
        from: SessionId,
    ) -> Result<Offered, OfferError> {
        let mut offered = self.sums.offer(node, index, data, from)?;
        self.note(&offered);
        if let Some(take) = self.take.as_ref().filter(|_| offered.chunk_complete)
            && let Some(root) = self.sums.values(index)
        {
            take.0(self.step, index, root.floats());
        }
        if let Some((gathering, passed)) = self.gathering.as_ref().zip(offered.passed.take()) {
            (gathering.pass)(passed);
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

/// What a worker does of a step besides its slice.
pub(super) struct Gathering {
    /// The roots that workers of other sites get.
    pub far: BTreeMap<SessionId, Range<usize>>,
    /// Who gets what is passed on.
    pub pass: Box<dyn Fn(Passed) + Send + Sync>,
    /// Roots of other owners, as they travel.
    pub relayed: Mutex<BTreeMap<usize, RootChunk>>,
}

impl Gathering {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, RootChunk>> {
        self.relayed.lock().expect(POISON)
    }
}

impl fmt::Debug for Gathering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gathering")
            .field("far", &self.far)
            .finish_non_exhaustive()
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
