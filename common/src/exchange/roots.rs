//! What goes to a worker: credits, and roots as they are completed, as bytes or as places in this process's memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use tokio::sync::mpsc;
use tonic::Status;

use super::{Exchange, POISON, StepSums, WINDOW};
use crate::ids::{RunId, SessionId, Step};
use crate::net::EXCHANGE_BEAT;
use crate::seal::Sealer;
use crate::segment::Segment;
use crate::wire;

/// Roots that a worker reads where they lie.
#[derive(Debug, Default)]
pub(super) struct Lent(Mutex<BTreeMap<Step, Lease>>);

/// A root that is lent.
#[derive(Debug)]
struct Lease {
    segment: Arc<Segment>,
    returned: bool,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.returned {
            // The stream has ended, and its worker may still read. Memory that it keeps mapped stays its own.
            self.segment.burn();
        }
    }
}

impl Lent {
    fn lend(&self, step: Step, segment: &Arc<Segment>) {
        let lease = Lease {
            segment: segment.clone(),
            returned: false,
        };
        self.0.lock().expect(POISON).insert(step, lease);
    }

    /// The worker is done with everything up to this step.
    pub(super) fn give_back(&self, through: Step) {
        let mut lent = self.0.lock().expect(POISON);
        while let Some(mut lease) = lent.first_entry().filter(|lease| *lease.key() <= through) {
            lease.get_mut().returned = true;
            lease.remove();
        }
    }
}

/// The way to a worker, on which nothing was sent but what `sealer` has numbered. Clones share it.
#[derive(Clone)]
pub(super) struct Way {
    session: SessionId,
    sealer: Arc<tokio::sync::Mutex<Sealer>>,
    /// Where memory is shared: what is read.
    lent: Option<Arc<Lent>>,
    out: mpsc::Sender<Result<v1::Chunk, Status>>,
}

/// Sends the roots of the steps after `after`, or where others get them only the credits.
pub(super) async fn send_roots(exchange: Arc<Exchange>, run: RunId, after: Step, way: Way) {
    let mut opened = exchange.opened.subscribe();
    let mut done = after;
    let divided = exchange.divided.as_ref();
    let roots = divided.is_none_or(|divided| divided.sends_roots(way.session));
    if way.lent.is_some() && way.send(Kind::Shares(v1::Empty {})).await.is_none() {
        return;
    }
    loop {
        opened.mark_unchanged();
        while let Some(held) = exchange.next_after(&run, done) {
            done = held.step;
            if way.send_step(&held, roots).await.is_none() {
                return;
            }
        }
        tokio::select! {
            changed = opened.changed() => if changed.is_err() { return },
            () = way.out.closed() => return,
            () = tokio::time::sleep(EXCHANGE_BEAT) => if way.alive().await.is_none() { return },
        }
    }
}

impl Way {
    pub fn new(
        session: SessionId,
        lent: Option<Arc<Lent>>,
        sealer: Sealer,
        out: mpsc::Sender<Result<v1::Chunk, Status>>,
    ) -> Self {
        Self {
            session,
            sealer: Arc::new(tokio::sync::Mutex::new(sealer)),
            lent,
            out,
        }
    }

    /// Sends one step's credits and, if it gets them, `roots` as they are completed. `None` when the receiver is gone.
    async fn send_step(&self, held: &StepSums, roots: bool) -> Option<()> {
        let mut leading = held.leading.subscribe();
        let chunks = held.sums.chunks();
        let mut granted = chunks.start;
        let mut wanted = match roots {
            true => held.wanted_by(self.session),
            false => Vec::new(),
        };
        loop {
            let over = held.is_over();
            let ready = *leading.borrow_and_update();
            let below = match self.lent {
                Some(_) => chunks.end,
                None => (ready + WINDOW).min(chunks.end),
            };
            if below > granted {
                granted = below;
                let credit = v1::Credit {
                    step: held.step,
                    below: below as u32,
                };
                self.send(Kind::Credit(credit)).await?;
            }
            match self.lends(held) {
                // Nobody updates anything before the root is whole, so that is what is told.
                true if ready == chunks.end => {
                    self.lend(held).await?;
                    wanted.clear();
                }
                true => {}
                false => {
                    for part in &mut wanted {
                        self.send_part(held, part).await?;
                    }
                }
            }
            let sent = wanted.iter().all(Range::is_empty);
            if over || sent && ready == chunks.end {
                return Some(());
            }
            tokio::select! {
                changed = leading.changed() => changed.ok()?,
                () = self.out.closed() => return None,
                () = tokio::time::sleep(EXCHANGE_BEAT) => self.alive().await?,
            }
        }
    }

    /// Whether this worker reads the root where it lies.
    fn lends(&self, held: &StepSums) -> bool {
        self.lent.is_some() && held.sums.is_shared()
    }

    /// Says where the root is.
    async fn lend(&self, held: &StepSums) -> Option<()> {
        let segment = held.sums.segment();
        let address = segment.address().expect("it is shared");
        if let Some(lent) = &self.lent {
            lent.lend(held.step, segment);
        }
        let root = v1::SharedRoot {
            step: held.step,
            segment: Some(wire::segment_to(address)),
        };
        self.send(Kind::SharedRoot(root)).await
    }

    /// Sends the roots of these chunks, as far as they are there.
    async fn send_part(&self, held: &StepSums, part: &mut Range<usize>) -> Option<()> {
        while part.start < part.end {
            let Some(chunk) = held.root_of(part.start) else {
                break;
            };
            let node = v1::NodeChunk {
                step: held.step,
                first: held.root.first,
                size: held.root.size,
                index: part.start as u32,
                check: chunk.check,
                data: chunk.data,
            };
            self.send(Kind::Node(node)).await?;
            part.start += 1;
        }
        Some(())
    }

    async fn alive(&self) -> Option<()> {
        self.send(Kind::Alive(v1::Empty {})).await
    }

    pub async fn send(&self, kind: Kind) -> Option<()> {
        // Held while it is sent, so that numbers arrive in their order.
        let mut sealer = self.sealer.lock().await;
        let chunk = sealer.chunk(kind);
        self.out.send(Ok(chunk)).await.ok()
    }

    /// Ends when the receiver is gone.
    pub async fn closed(&self) {
        self.out.closed().await;
    }
}
