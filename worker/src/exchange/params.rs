//! New parameters, where moments are divided among the workers: those of this worker's slice go to the others, and the others'
//! come in.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use cohort_common::ids::Step;
use cohort_common::layout::chunk_range;
use cohort_common::spec::Payload;
use cohort_proto::v1;

use super::memory::Arriving;
use super::{ExchangeClient, POISON, Shared};

/// How long parameters may take. The links are opened again when they break, so that this is for a network that lets some
/// workers talk and others not.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an exchange has of parameters.
#[derive(Default)]
pub(super) struct Params {
    /// On their way, by step.
    arriving: BTreeMap<Step, Arriving>,
    /// A buffer to be used again. Those of roots are others: there, other chunks are in use.
    spare: Option<Vec<f32>>,
    /// Slices whose owner is lost, and whose parameters this worker has.
    serves: Vec<(Step, Range<u32>)>,
}

impl Params {
    pub fn applied(&mut self, step: Step) {
        self.arriving.retain(|s, _| *s > step);
    }
}

/// What was waited for.
#[derive(Debug)]
pub enum Arrived {
    /// All chunks that are not kept here, in a buffer of all; the rest of it is anything.
    All(Vec<f32>),
    /// Somebody needs these first.
    Serve(Step, Range<u32>),
    /// The exchange ended.
    Closed,
    /// Nothing, for too long.
    Late(Duration),
}

impl ExchangeClient {
    /// Sends new parameters of a slice, which begins with this chunk: this worker's own to all but its second holder.
    pub fn publish(&self, step: Step, first: u32, params: &[f32]) {
        let shared = self.shared();
        let Some(keeper) = &shared.keeper else { return };
        let own = keeper.kept().is_some_and(|[own, _]| own.start == first);
        let second = keeper.division.second_of(keeper.session).filter(|_| own);
        let exchange = &shared.owner.exchange;
        exchange.publish(step, first as usize, params, second);
    }

    /// Lets whoever has these parameters send them.
    pub fn serve(&self, step: Step, chunks: Range<u32>) {
        self.shared().lock().params.serves.push((step, chunks));
        self.shared().received.notify_all();
    }

    /// A slice that is to be sent.
    pub fn next_serve(&self) -> Option<(Step, Range<u32>)> {
        self.shared().lock().params.serves.pop()
    }

    /// Waits for the parameters of a step that are not kept here; blocks the thread.
    pub fn params(&self, step: Step) -> Arrived {
        let shared = self.shared();
        let begun = Instant::now();
        let mut state = shared.lock();
        loop {
            if let Some((step, chunks)) = state.params.serves.pop() {
                return Arrived::Serve(step, chunks);
            }
            let arriving = shared.arriving_params(&mut state.params, step);
            if arriving.is_whole() {
                let arriving = state.params.arriving.remove(&step);
                return match arriving {
                    Some(Arriving::Sent { data, .. }) => Arrived::All(data),
                    _ => unreachable!("parameters are sent"),
                };
            }
            if state.closed {
                return Arrived::Closed;
            }
            let left = PATIENCE.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Arrived::Late(PATIENCE);
            }
            (state, _) = shared.received.wait_timeout(state, left).expect(POISON);
        }
    }

    /// Takes a buffer back, to use it again.
    pub fn reuse_params(&self, buffer: Vec<f32>) {
        self.shared().lock().params.spare = Some(buffer);
    }
}

impl Shared {
    /// Where parameters of a step go.
    fn arriving_params<'a>(&self, params: &'a mut Params, step: Step) -> &'a mut Arriving {
        let Params {
            arriving, spare, ..
        } = params;
        let due = |index: usize| {
            let keeper = self.keeper.as_ref();
            keeper.is_some_and(|keeper| !keeper.keeps(index as u32))
        };
        let fresh = || Arriving::sent(spare.take(), self.shape, due);
        arriving.entry(step).or_insert_with(fresh)
    }

    /// A chunk of parameters.
    pub(super) fn take_params(&self, chunk: &v1::NodeChunk) -> Result<(), String> {
        let index = chunk.index as usize;
        if self.keeper.is_none() || index >= self.chunks {
            return Err(format!("chunk {index} of parameters is not wanted"));
        }
        let bytes = chunk.data.len();
        if bytes != 4 * chunk_range(index, self.shape.len).len() {
            return Err(format!("chunk {index} of parameters has {bytes} bytes"));
        }
        let mut state = self.lock();
        // Only one step can be under way.
        if chunk.step != state.applied + 1 || state.closed {
            return Ok(());
        }
        let arriving = self.arriving_params(&mut state.params, chunk.step);
        if arriving.take(Payload::F32, index, &chunk.data) {
            self.received.notify_all();
        }
        self.observer.meter.received(bytes);
        Ok(())
    }
}
