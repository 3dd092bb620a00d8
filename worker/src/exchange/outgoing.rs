//! What waits to be sent: chunks of nodes, each at the way out to whoever owns them, some before their node is whole.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use cohort_common::floats::bytes_of;
use cohort_common::ids::{SessionId, Step};
use cohort_common::layout::{CHUNK_LEN, chunk_range};
use cohort_common::tree::Node;
use tokio::sync::Notify;
use tracing::error;

use super::memory::Place;
use super::owner::Owner;
use super::{Shared, State};
use crate::engine::Gradient;
use crate::trace::Open;

/// Chunks that are handed out before the rest of their node, at least: fewer are not worth the waking.
pub(super) const EARLY: usize = 8;

/// What is pushed of a node.
#[derive(Clone)]
pub(super) enum Content {
    /// All of it.
    Whole(Arc<Gradient>),
    /// What there was of it early.
    Part(Part),
    /// One chunk of a node that was gathered here.
    Gathered(Bytes),
    /// It lies where the owner reads it.
    Lent,
}

/// Some chunks of a node, copied before it was whole.
#[derive(Clone)]
pub(super) struct Part {
    /// Index of the first.
    pub first: usize,
    pub data: Arc<Vec<f32>>,
}

/// The node that is being computed.
pub(super) struct Early {
    pub step: Step,
    pub node: Node,
    /// Chunks that were handed out, from the first on.
    pub chunks: usize,
}

/// A way out.
#[derive(Default)]
pub(super) struct Outlet {
    /// Nodes that are not yet pushed whole.
    pub pending: Vec<Pending>,
    /// Chunks below this index may be pushed, by step.
    pub credits: BTreeMap<Step, usize>,
    /// Something can be sent.
    pub sendable: Arc<Notify>,
}

pub(super) struct Pending {
    pub step: Step,
    pub node: Node,
    pub data: Content,
    /// What is left to be pushed.
    pub chunks: Range<usize>,
    /// The span from here until it is sent.
    pub span: Option<Open>,
    /// Where the owner reads it, if it does.
    pub place: Option<Place>,
}

impl Shared {
    /// Lets chunks of a node wait at a way out. One that is closed has been told to the coordinator, which will collect.
    pub(super) fn hand_out(
        &self,
        state: &mut State,
        to: Option<SessionId>,
        pushed: (Step, Node, Content),
        chunks: Range<usize>,
    ) {
        self.hand_out_at(state, to, pushed, chunks, None);
    }

    /// The same of chunks that lie where the owner reads them, if a place is given.
    fn hand_out_at(
        &self,
        state: &mut State,
        to: Option<SessionId>,
        (step, node, data): (Step, Node, Content),
        chunks: Range<usize>,
        place: Option<Place>,
    ) {
        let Some(outlet) = state.outlets.get_mut(&to).filter(|_| !chunks.is_empty()) else {
            return;
        };
        let whole = matches!(data, Content::Whole(_));
        outlet.pending.push(Pending {
            step,
            node,
            data,
            chunks,
            span: whole.then(|| self.observer.spans.begin(step)).flatten(),
            place,
        });
        outlet.sendable.notify_one();
    }

    /// Lets chunks of a node wait for whoever owns or gathers them.
    pub(super) fn hand_round(
        self: &Arc<Self>,
        state: &mut State,
        (step, node, data): (Step, Node, Content),
        chunks: Range<usize>,
        place: Option<Place>,
    ) {
        let Some(shares) = state.shares.get(&step).cloned() else {
            return self.hand_out_at(state, None, (step, node, data), chunks, place);
        };
        for share in shares.takers(node) {
            let slice = share.range();
            let part = slice.start.max(chunks.start)..slice.end.min(chunks.end);
            let pushed = (step, node, data.clone());
            if part.is_empty() {
                continue;
            }
            if share.session == self.owner.session {
                let shared = self.clone();
                self.runtime
                    .spawn_blocking(move || shared.add_own(pushed, part));
            } else {
                self.hand_out(state, Some(share.session), pushed, part);
            }
        }
    }

    /// Adds chunks that this worker owns or gathers of a node that it has computed.
    fn add_own(&self, (step, node, data): (Step, Node, Content), chunks: Range<usize>) {
        let Owner {
            exchange,
            run,
            session,
            ..
        } = &*self.owner;
        for index in chunks {
            let Some(bytes) = data.floats(chunk_range(index, self.shape.len)) else {
                return;
            };
            match exchange.offer_here(run, step, node, index, bytes, *session) {
                Ok(Some(told)) => told.into_iter().for_each(|told| self.owner.told(told)),
                Ok(None) => return,
                Err(error) => return error!(%error, "a node of this worker fits no slice"),
            }
        }
    }

    /// How many chunks of a node were handed out already, and where the coordinator reads it, if it does. `None` if nobody
    /// wants it.
    pub(super) fn early(
        &self,
        step: Step,
        node: Node,
        gradient: &Gradient,
    ) -> Option<(usize, Option<Place>)> {
        let state = self.lock();
        if state.closed || step <= state.applied {
            return None;
        }
        let shared = state.shares.contains_key(&step);
        let lent = state.memory.as_ref().filter(|_| state.lends && !shared);
        let place = lent.and_then(|memory| memory.lies(gradient));
        Some((state.early_chunks(step, node), place))
    }

    /// Copies chunks of a gradient that is not whole, rounded as a node is that goes alone.
    pub(super) fn copy(
        &self,
        (step, node): (Step, Node),
        gradient: &Gradient,
        chunks: Range<usize>,
    ) -> Part {
        let elements = chunks.start * CHUNK_LEN..chunks.end * CHUNK_LEN;
        let mut data = gradient[elements.clone()].to_vec();
        let rounding = self.shape.rounding(step).of(node);
        rounding.round(&mut data, elements.start);
        Part {
            first: chunks.start,
            data: Arc::new(data),
        }
    }
}

impl Content {
    /// Some elements as the bytes of f32, where they lie; `None` where only the owner reads them.
    pub(super) fn floats(&self, elements: Range<usize>) -> Option<Bytes> {
        match self {
            Self::Whole(node) => Some(Bytes::from_owner(ChunkBytes(node.clone(), elements))),
            Self::Part(part) => {
                let before = part.first * CHUNK_LEN;
                let elements = elements.start - before..elements.end - before;
                Some(Bytes::from_owner(PartBytes(part.data.clone(), elements)))
            }
            Self::Gathered(chunk) => Some(chunk.clone()),
            Self::Lent => None,
        }
    }
}

impl State {
    /// Chunks of a node that were handed out before it was whole.
    pub(super) fn early_chunks(&self, step: Step, node: Node) -> usize {
        let early = self.early.as_ref();
        let same = early.filter(|early| (early.step, early.node) == (step, node));
        same.map_or(0, |early| early.chunks)
    }
}

/// A chunk of a node, as bytes.
pub(super) struct ChunkBytes(Arc<Gradient>, Range<usize>);

impl AsRef<[u8]> for ChunkBytes {
    fn as_ref(&self) -> &[u8] {
        bytes_of(&self.0[self.1.clone()])
    }
}

/// A chunk of a part, as bytes.
pub(super) struct PartBytes(Arc<Vec<f32>>, Range<usize>);

impl AsRef<[u8]> for PartBytes {
    fn as_ref(&self) -> &[u8] {
        bytes_of(&self.0[self.1.clone()])
    }
}
