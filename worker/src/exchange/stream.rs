//! The traffic of an exchange: what goes out as credits allow, and what comes in.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use cohort_common::aggregate::Shape;
use cohort_common::cluster::worker::Report;
use cohort_common::exchange::Incoming;
use cohort_common::ids::{SessionId, Step};
use cohort_common::layout::chunk_range;
use cohort_common::net::EXCHANGE_BEAT;
use cohort_common::seal::{Opener, Sealer, checksum};
use cohort_common::spec::Payload;
use cohort_common::tree::Node;
use cohort_common::wire;
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use tokio::sync::mpsc;

use super::memory::{Arriving, Place};
use super::outgoing::Content;
use super::{Shared, State};
use crate::trace::Open;

/// Messages in which a node is shared, at most: few, as each wakes somebody up, but enough for the owner to begin early.
const BATCHES: usize = 24;

/// Chunks that such a message has room for, at least: to sum fewer is not worth another waking.
const ROOM: usize = 32;

/// What is to be sent next.
enum Next {
    /// That steps are applied.
    Done(Step),
    /// Chunks of a node.
    Chunks(Box<Chunks>),
}

struct Chunks {
    step: Step,
    node: Node,
    data: Content,
    /// Elements of a gradient.
    len: usize,
    range: Range<usize>,
    /// Where the owner reads them, if they are not to be sent.
    place: Option<Place>,
    /// The span that ends when these are sent.
    span: Option<Open>,
}

impl Chunks {
    fn are_copied(&self) -> bool {
        self.place
            .as_ref()
            .is_some_and(|place| place.copy.is_some())
    }

    /// What was gathered here, if it is that: its step, and which chunk it is.
    fn gathered(&self) -> Option<(Step, usize)> {
        let gathered = matches!(self.data, Content::Gathered(_));
        gathered.then_some((self.step, self.range.start))
    }

    fn message(self, payload: Payload) -> Kind {
        let Self {
            step,
            node: Node { first, size },
            data,
            len,
            range,
            place,
            span: _,
        } = self;
        let index = range.start as u32;
        if let Some(place) = place {
            let below = range.end as u32;
            if let Content::Whole(data) = &data {
                place.publish(data, range);
            }
            return Kind::SharedNode(v1::SharedNode {
                step,
                first,
                size,
                index,
                offset: place.offset as u64,
                below,
            });
        }
        let elements = chunk_range(range.start, len);
        let floats = data.floats(elements).expect("what is lent has a place");
        let data: Bytes = match payload {
            Payload::F32 => floats,
            payload => payload.to_wire(bytemuck::cast_slice(&floats)).into(),
        };
        Kind::Node(v1::NodeChunk {
            step,
            first,
            size,
            index,
            check: checksum(&data),
            data,
        })
    }
}

impl State {
    /// Whether something waits to be sent.
    fn is_sending(&self) -> bool {
        self.outlets
            .values()
            .any(|outlet| !outlet.pending.is_empty())
    }

    /// The next chunks that may be sent, lowest index first: redone lanes catch up before anything else goes on.
    fn next(&mut self, to: Option<SessionId>, shape: Shape) -> Option<Next> {
        if to.is_none() && std::mem::take(&mut self.done) {
            return Some(Next::Done(self.applied));
        }
        let outlet = self.outlets.get_mut(&to)?;
        let credits = &outlet.credits;
        let below = |step: &Step| credits.get(step).copied().unwrap_or(0);
        let pending = outlet.pending.iter_mut();
        let ready = pending.filter(|p| p.chunks.start < below(&p.step));
        let best = ready.min_by_key(|p| (p.step, p.chunks.start))?;
        let memory = self.memory.as_ref().filter(|_| self.lends && to.is_none());
        let place = memory.and_then(|memory| {
            let place = || match &best.data {
                Content::Whole(node) => memory.place(best.step, node),
                Content::Part(..) | Content::Gathered(_) | Content::Lent => None,
            };
            best.place = best.place.take().or_else(place);
            best.place.clone()
        });
        let count = match place {
            Some(_) => shape.chunks().div_ceil(BATCHES).max(ROOM),
            None => 1,
        };
        let end = best.chunks.start + count;
        let end = end.min(below(&best.step)).min(best.chunks.end);
        let next = Chunks {
            step: best.step,
            node: best.node,
            data: best.data.clone(),
            len: shape.len,
            range: best.chunks.start..end,
            place,
            span: best.span.take_if(|_| end == best.chunks.end),
        };
        best.chunks.start = end;
        outlet.pending.retain(|p| !p.chunks.is_empty());
        Some(Next::Chunks(Box::new(next)))
    }
}

/// Sends what waits at a way out, until it is closed.
pub(super) async fn send(
    shared: Arc<Shared>,
    to: Option<SessionId>,
    mut sealer: Sealer,
    out: mpsc::Sender<v1::Chunk>,
) {
    loop {
        let (next, sendable) = {
            let mut state = shared.lock();
            let Some(outlet) = state.outlets.get(&to).filter(|_| !state.closed) else {
                return;
            };
            let sendable = outlet.sendable.clone();
            (state.next(to, shared.shape), sendable)
        };
        let payload = shared.shape.payload;
        let meter = &shared.observer.meter;
        let (mut ends, mut gathered) = (None, None);
        let kind = match next {
            Some(Next::Done(through)) => Kind::Done(v1::Done { through }),
            Some(Next::Chunks(mut chunks)) if chunks.are_copied() => {
                meter.sending(true);
                ends = chunks.span.take().map(|span| (span, chunks.node));
                // Copying megabytes takes too long for a thread that others wait for.
                let copying = tokio::task::spawn_blocking(move || chunks.message(payload));
                copying.await.expect("copying does not panic")
            }
            Some(Next::Chunks(mut chunks)) => {
                meter.sending(true);
                ends = chunks.span.take().map(|span| (span, chunks.node));
                gathered = chunks.gathered();
                chunks.message(payload)
            }
            None => {
                meter.sending(shared.lock().is_sending());
                tokio::select! {
                    () = sendable.notified() => continue,
                    () = tokio::time::sleep(EXCHANGE_BEAT) => Kind::Alive(v1::Empty {}),
                }
            }
        };
        if let Kind::Node(node) = &kind {
            meter.sent(node.data.len());
        }
        // A connection that is gone is noticed at the other end of the stream.
        if out.send(sealer.chunk(kind)).await.is_err() {
            return;
        }
        if let Some((step, index)) = gathered {
            let owner = &shared.owner;
            owner.exchange.passed_on(&owner.run, step, index);
        }
        if let Some((span, node)) = ends {
            span.end_lanes("send lane", node);
        }
    }
}

pub(super) async fn receive(
    shared: Arc<Shared>,
    mut incoming: Incoming,
    broken: mpsc::Sender<String>,
) {
    let reason = tokio::select! {
        reason = shared.receive(&mut incoming) => reason,
        () = shared.closing.notified() => return,
    };
    if !shared.lock().closed {
        // If nobody listens the session has ended, too.
        let _ = broken.try_send(reason);
    }
    // Where moments are divided, a commit may still be under way between the peers.
    if shared.keeper.is_none() {
        shared.close();
    }
}

impl Shared {
    /// Takes in what comes; ends with the reason why no more will.
    async fn receive(self: &Arc<Self>, incoming: &mut Incoming) -> String {
        let mut opener = Opener::default();
        loop {
            let chunk = match incoming.next().await {
                None => return "the owner closed the exchange".into(),
                Some(Err(status)) => return status.message().to_owned(),
                Some(Ok(chunk)) => chunk,
            };
            let taken = match opener.chunk(chunk) {
                Ok(Some(Kind::Credit(credit))) => {
                    self.settle_sharing();
                    self.credit(None, &credit);
                    Ok(())
                }
                Ok(Some(Kind::Node(node))) => self.take(&node),
                Ok(Some(Kind::SharedRoot(root))) => self.take_shared(&root),
                Ok(Some(Kind::Shares(_))) => {
                    self.lock().lends = true;
                    Ok(())
                }
                Ok(Some(_) | None) => Ok(()),
                Err(error) => return error.to_string(),
            };
            if let Err(error) = taken {
                return format!("the owner sent nonsense: {error}");
            }
        }
    }

    pub(super) fn credit(&self, from: Option<SessionId>, credit: &v1::Credit) {
        let mut state = self.lock();
        let wanted = credit.step > state.applied;
        if let Some(outlet) = state.outlets.get_mut(&from).filter(|_| wanted) {
            let held = outlet.credits.entry(credit.step).or_default();
            *held = (*held).max(credit.below as usize);
            outlet.sendable.notify_one();
        }
    }

    /// A chunk of a root.
    pub(super) fn take(&self, chunk: &v1::NodeChunk) -> Result<(), String> {
        let node = Node {
            first: chunk.first,
            size: chunk.size,
        };
        let index = chunk.index as usize;
        if node != self.root || index >= self.chunks {
            return Err(format!("chunk {index} of {node} is not a part of the root"));
        }
        let elements = chunk_range(index, self.shape.len).len();
        if chunk.data.len() != self.shape.payload.bytes(elements) {
            let bytes = chunk.data.len();
            return Err(format!("chunk {index} of the root has {bytes} bytes"));
        }
        self.observer.meter.received(chunk.data.len());
        self.keep(chunk.step, index, self.shape.payload, &chunk.data);
        Ok(())
    }

    /// Puts a chunk of a root, which comes in this form, where it belongs.
    pub(super) fn keep(&self, step: Step, index: usize, form: Payload, chunk: &[u8]) {
        let mut state = self.lock();
        if step <= state.applied || state.closed {
            return;
        }
        let State {
            roots,
            spare,
            shares,
            ..
        } = &mut *state;
        let spans = &self.observer.spans;
        let fresh = || (self.arriving_root(spare.pop()), spans.begin(step));
        let (root, span) = roots.entry(step).or_insert_with(fresh);
        if root.take(form, index, chunk) {
            self.received.notify_all();
            if let Some(span) = span.take() {
                span.end("receive root");
            }
            if shares.contains_key(&step) {
                self.owner.note(Report::RootHeld { step });
            }
        }
        self.observe_roots(&state);
    }

    /// A root that the owner shares.
    fn take_shared(&self, root: &v1::SharedRoot) -> Result<(), String> {
        let mut state = self.lock();
        if root.step <= state.applied {
            return Ok(());
        }
        let memory = state.memory.as_mut();
        let memory = memory.ok_or("a root is shared, but no memory is")?;
        let segment = root.segment.as_ref().ok_or("a root lies nowhere")?;
        let address = wire::segment_from(segment).map_err(|error| error.to_string())?;
        if address.bytes < self.shape.bytes() as u64 {
            return Err(format!("a root has {} bytes", address.bytes));
        }
        let segment = memory.owners(address).map_err(|error| {
            self.sharing.give_up();
            format!("its memory cannot be read ({error}); from now on gradients are sent")
        })?;
        state
            .roots
            .insert(root.step, (Arriving::Lent(segment), None));
        self.received.notify_all();
        // It is read where it lies: this span has no length.
        if let Some(span) = self.observer.spans.begin(root.step) {
            span.end("receive root");
        }
        Ok(())
    }
}
