//! The owner's side of the gradient exchange. Workers push tree nodes under credits; each finished root chunk goes back
//! to all of them at once. What is held is what waits for a sibling, within the window of credits, and the roots of the
//! newest steps. An owner has a slice of the gradient, which is a contiguous range of its chunks: all of them where
//! there is one owner.
//!
//! A worker on the same host need not send its gradients: it says where they lie in its memory, and reads the root where
//! it lies here. Order, numbers and sums are the same. An owner that is itself a worker adds its own nodes from where
//! they lie ([`Exchange::offer_here`]). It may gather what goes to other owners, and hand their roots on
//! ([`Exchange::open_gathering`]). Where it keeps the moments of its slice, parameters go back in the place of roots
//! (`params.rs`). `sums.rs` is one step, `stream.rs` is what comes from a worker, `roots.rs` what
//! goes to it. `call.rs` and `body.rs` are the call itself, at both of its ends.
//!
//! What the exchange needs of the process around it is the trait [`Host`].

mod body;
mod call;
mod host;
mod params;
mod roots;
mod stream;
mod sums;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use cohort_proto::v1;
use tokio::sync::{mpsc, watch};
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::aggregate::{Data, Duty, OfferError, Passed, RootChunk, Shape};
use crate::ids::{RunId, SessionId, Step};
use crate::tree::Node;
use crate::wire::{RUN_KEY, run_id};
use params::Divided;
use stream::Stream;
use sums::{Gathering, Roots, StepSums, Taker};

pub use body::Incoming;
pub use call::{ExchangeServer, PushPull, push_pull};
pub use host::{Host, Told, session_of};

/// Chunks that workers may be ahead of the slowest, at most.
const WINDOW: usize = 32;

/// Messages that wait for one slow receiver.
const OUTBOX: usize = 4;

/// Segments for roots that wait to be used again, at most.
const IDLE: usize = 3;

/// The steps whose sums are held.
#[derive(Debug)]
pub struct Exchange {
    steps: Mutex<BTreeMap<(RunId, Step), Arc<StepSums>>>,
    opened: watch::Sender<()>,
    /// The newest stream of each session: a worker that loads a state anew opens another, and what is still on its way
    /// in the one before is of a state that counts no more.
    streams: Mutex<BTreeMap<SessionId, u64>>,
    roots: Arc<Roots>,
    /// Who is given the roots here, besides those to whom they are sent.
    take: OnceLock<Taker>,
    /// Held by the stream that is being measured: two at a time would each find half of the line's speed.
    measuring: Arc<tokio::sync::Mutex<()>>,
    /// Where moments are divided: who gets roots, and what goes to the others.
    divided: Option<Divided>,
}

impl Default for Exchange {
    fn default() -> Self {
        Self::new(true)
    }
}

/// How long a way between two workers may take to be measured, waiting included.
pub const MEASURING: Duration = Duration::from_secs(5);

const POISON: &str = "no thread panics while it holds this lock";

impl Exchange {
    /// No step yet. `shares` says whether workers on this host may leave their gradients in their own memory; an owner of
    /// a part of the gradient has to be sent them.
    pub fn new(shares: bool) -> Self {
        Self {
            steps: Mutex::default(),
            opened: watch::Sender::new(()),
            streams: Mutex::default(),
            roots: Arc::new(Roots::new(shares)),
            take: OnceLock::new(),
            measuring: Arc::default(),
            divided: None,
        }
    }

    /// The same of an owner that updates its slice by itself: only the `second` holder gets roots, if there is one, and what is
    /// [published](Self::publish) goes to the others.
    pub fn divided(second: Option<SessionId>) -> Self {
        Self {
            divided: Some(Divided::new(second)),
            ..Self::new(false)
        }
    }

    /// Gets ready to sum a slice of the gradients of a step. `shape` is of the whole gradient.
    ///
    /// # Panics
    /// If the slice lies outside the gradient, or if memory is shared and it is not the whole of it.
    pub fn open(&self, run: &RunId, step: Step, shape: Shape, slice: Range<usize>) {
        let whole = 0..shape.chunks();
        let possible = !self.roots.shares || slice == whole;
        assert!(possible, "{slice:?} of {whole:?}: who shares owns all");
        self.hold(self.sums(run, step, shape, slice.into()));
    }

    /// The same of a worker that gathers, besides its slice, what goes to other owners. `far` says which roots of its slice go to
    /// workers of other sites; everybody else gets the roots of all its chunks, those of others as they are
    /// [relayed](Self::relay). What is to be passed on is given to `pass`, once for each chunk of a node, on whatever thread made
    /// it; and then waits until it [has gone](Self::passed_on).
    ///
    /// # Panics
    /// If the chunks lie outside the gradient, or if memory is shared.
    pub fn open_gathering(
        &self,
        run: &RunId,
        step: Step,
        shape: Shape,
        duty: Duty,
        far: BTreeMap<SessionId, Range<usize>>,
        pass: impl Fn(Passed) + Send + Sync + 'static,
    ) {
        assert!(!self.roots.shares, "who shares owns all");
        let mut sums = self.sums(run, step, shape, duty);
        sums.gathering = Some(Gathering {
            far,
            pass: Box::new(pass),
            relayed: Mutex::default(),
        });
        self.hold(sums);
    }

    /// Gives each chunk of a root to `take` as soon as it is summed, on the thread that has summed it. Only what is opened after
    /// this, and only the first `take` counts.
    pub fn give_roots_to(&self, take: impl Fn(Step, usize, &[f32]) + Send + Sync + 'static) {
        let _ = self.take.set(Taker(Arc::new(take)));
    }

    fn sums(&self, run: &RunId, step: Step, shape: Shape, duty: Duty) -> StepSums {
        let (roots, take) = (self.roots.clone(), self.take.get().cloned());
        StepSums::new(run.clone(), step, shape, duty, roots, take)
    }

    fn hold(&self, sums: StepSums) {
        let key = (sums.run.clone(), sums.step);
        self.lock().insert(key, Arc::new(sums));
        self.opened.send_replace(());
    }

    /// Hands on a chunk of a root that another owner has sent, if it is one that is gathered here.
    pub fn relay(&self, run: &RunId, step: Step, index: usize, root: RootChunk) {
        if let Some(held) = self.get(run, step) {
            held.relay(index, root);
        }
    }

    /// A chunk of a node that was given to `pass` need not be held up any longer.
    pub fn passed_on(&self, run: &RunId, step: Step, index: usize) {
        if let Some(held) = self.get(run, step) {
            held.passed_on(index);
        }
    }

    /// Forgets the steps of a run up to and including `through`.
    pub fn release(&self, run: &RunId, through: Step) {
        let mut steps = self.lock();
        steps.retain(|(held, step), sums| {
            let wanted = held != run || *step > through;
            if !wanted {
                sums.end();
            }
            wanted
        });
        let keep = if steps.is_empty() { 0 } else { IDLE };
        drop(steps);
        self.roots.trim(keep);
    }

    /// When the first chunk of a step that is held came from a worker's stream.
    pub fn began(&self, run: &RunId, step: Step) -> Option<SystemTime> {
        self.get(run, step)?.began.get().copied()
    }

    /// Adds a chunk of a node that the owner has computed itself: its f32, in memory that does not change while it is
    /// held. Sums on this thread. Gives what the host is to be told, or `None` if the step is not held.
    ///
    /// # Errors
    /// If there is no such node or chunk, or if its length is wrong. A copy that differs is no error but is told.
    pub fn offer_here(
        &self,
        run: &RunId,
        step: Step,
        node: Node,
        index: usize,
        data: Bytes,
        from: SessionId,
    ) -> Result<Option<Vec<Told>>, OfferError> {
        let Some(held) = self.get(run, step) else {
            return Ok(None);
        };
        let offered = held.offer(node, index, Data::Here(data), from);
        held.told(offered).map(Some)
    }

    fn get(&self, run: &RunId, step: Step) -> Option<Arc<StepSums>> {
        self.lock().get(&(run.clone(), step)).cloned()
    }

    fn next_after(&self, run: &RunId, step: Step) -> Option<Arc<StepSums>> {
        let from = (run.clone(), step + 1);
        let to = (run.clone(), Step::MAX);
        self.lock().range(from..=to).next().map(|(_, s)| s.clone())
    }

    /// Makes a stream the newest of its session.
    fn enter(&self, session: SessionId) -> u64 {
        let mut streams = self.streams.lock().expect(POISON);
        let number = streams.entry(session).or_default();
        *number += 1;
        *number
    }

    fn is_newest(&self, session: SessionId, number: u64) -> bool {
        let streams = self.streams.lock().expect(POISON);
        streams.get(&session) == Some(&number)
    }

    /// Forgets a session that has ended.
    pub fn forget(&self, session: SessionId) {
        self.streams.lock().expect(POISON).remove(&session);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(RunId, Step), Arc<StepSums>>> {
        self.steps.lock().expect(POISON)
    }
}

/// What an owner does with what is pushed to it.
pub struct ExchangeService {
    /// The sums.
    pub exchange: Arc<Exchange>,
    /// Who is told of them.
    pub host: Arc<dyn Host>,
}

#[tonic::async_trait]
impl PushPull for ExchangeService {
    /// What a worker pushes is summed; finished roots are sent to it.
    async fn push_pull(
        &self,
        metadata: &MetadataMap,
        incoming: Incoming,
    ) -> Result<mpsc::Receiver<Result<v1::Chunk, Status>>, Status> {
        let session = session_of(&*self.host, metadata)?;
        let run = metadata.get(RUN_KEY);
        let run = run.and_then(|v| v.to_str().ok()).unwrap_or_default();
        let (out, outgoing) = mpsc::channel(OUTBOX);
        let mut stream = Stream {
            number: self.exchange.enter(session),
            exchange: self.exchange.clone(),
            host: self.host.clone(),
            run: run_id(run).map_err(stream::invalid)?,
            session,
            shared: None,
        };
        tokio::spawn(async move {
            if let Err(status) = stream.receive(incoming, &out).await {
                // The receiver is gone if the worker is: then nobody needs the reason.
                let _ = out.send(Err(status)).await;
            }
        });
        Ok(outgoing)
    }
}
