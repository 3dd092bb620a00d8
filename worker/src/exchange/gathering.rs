//! What this worker gathers for its site: nodes of chunks that others own, which go to the owners as they are complete, and the
//! roots of these chunks, which it hands on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use cohort_common::aggregate::{Duty, Passed, RootChunk};
use cohort_common::ids::{SessionId, Step};
use cohort_proto::v1;

use super::outgoing::Content;
use super::{Shared, State};

impl Shared {
    /// Gets ready for a step.
    pub(super) fn gather(
        self: &Arc<Self>,
        step: Step,
        duty: Duty,
        far: BTreeMap<SessionId, Range<usize>>,
    ) {
        // The exchange is a part of this.
        let shared = Arc::downgrade(self);
        let pass = move |passed| {
            if let Some(shared) = shared.upgrade() {
                shared.pass_on(step, passed);
            }
        };
        let owner = &self.owner;
        let exchange = &owner.exchange;
        exchange.open_gathering(&owner.run, step, self.shape, duty, far, pass);
    }

    /// Lets what was gathered wait for its owner.
    fn pass_on(&self, step: Step, Passed { node, index, sum }: Passed) {
        let mut state = self.lock();
        // The coordinator may have collected the step meanwhile.
        let shares = state.shares.get(&step).filter(|_| !state.closed);
        if let Some(owner) = shares.and_then(|shares| shares.owner(index)) {
            let chunk = (step, node, Content::Gathered(sum));
            self.hand_out(&mut state, Some(owner), chunk, index..index + 1);
        }
    }

    /// Hands a chunk of a root on that a peer has sent, or keeps it until it is known whether to do so.
    pub(super) fn relay(&self, chunk: v1::NodeChunk) {
        let (step, index) = (chunk.step, chunk.index as usize);
        let root = RootChunk {
            data: chunk.data,
            check: chunk.check,
        };
        let mut state = self.lock();
        if state.shares.contains_key(&step) {
            drop(state);
            self.owner
                .exchange
                .relay(&self.owner.run, step, index, root);
        } else if step > state.applied && !state.closed {
            state.unasked.push((step, index, root));
        }
    }

    /// It is known now.
    pub(super) fn relay_unasked(&self, state: &mut State, step: Step) {
        for (of, index, root) in std::mem::take(&mut state.unasked) {
            match of == step {
                true => self
                    .owner
                    .exchange
                    .relay(&self.owner.run, step, index, root),
                false => state.unasked.push((of, index, root)),
            }
        }
    }
}
