//! Parameters that go back in the place of roots: where moments are divided, the owner of a slice updates it, and sends what
//! comes of that to everybody who does not do the same.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use cohort_proto::v1;
use cohort_proto::v1::chunk::Kind;
use tokio::sync::watch;

use super::Exchange;
use super::roots::Way;
use crate::floats::bytes_of;
use crate::ids::{SessionId, Step};
use crate::layout::CHUNK_LEN;
use crate::seal::checksum;

/// Who gets what of an owner that updates its slice by itself.
#[derive(Debug)]
pub(super) struct Divided {
    /// Who makes the same updates, and gets roots for that.
    second: Option<SessionId>,
    /// Parameters after the newest step. A step is committed only when everybody has those of the one before, so that nobody
    /// needs older ones; a stream that opens anew begins with these.
    newest: watch::Sender<Arc<[Publication]>>,
}

/// New parameters of a slice.
#[derive(Clone, Debug)]
struct Publication {
    step: Step,
    /// Index of the first chunk.
    first: usize,
    /// f32, little-endian.
    params: Bytes,
    /// Who has them.
    not_to: Option<SessionId>,
}

impl Divided {
    pub fn new(second: Option<SessionId>) -> Self {
        Self {
            second,
            newest: watch::Sender::new(Arc::new([])),
        }
    }

    /// Whether a worker gets roots.
    pub fn sends_roots(&self, to: SessionId) -> bool {
        self.second == Some(to)
    }
}

impl Publication {
    /// The chunks, as they are sent.
    fn chunks(&self) -> impl Iterator<Item = Kind> {
        let count = self.params.len().div_ceil(CHUNK_LEN * 4);
        (0..count).map(move |place| {
            let start = place * CHUNK_LEN * 4;
            let end = (start + CHUNK_LEN * 4).min(self.params.len());
            let data = self.params.slice(start..end);
            Kind::Params(v1::NodeChunk {
                step: self.step,
                first: 0,
                size: 0,
                index: (self.first + place) as u32,
                check: checksum(&data),
                data,
            })
        })
    }
}

impl Exchange {
    /// Sends new parameters of a slice that begins with this chunk to all peers but one.
    pub fn publish(&self, step: Step, first: usize, params: &[f32], not_to: Option<SessionId>) {
        let Some(divided) = &self.divided else { return };
        let fresh = Publication {
            step,
            first,
            params: Bytes::copy_from_slice(bytes_of(params)),
            not_to,
        };
        divided.newest.send_modify(|newest| {
            let same = newest.iter().filter(|other| other.step == step).cloned();
            *newest = same.chain([fresh]).collect();
        });
    }
}

/// Sends the parameters of steps after `after`, as they are published.
pub(super) async fn send_params(
    exchange: Arc<Exchange>,
    session: SessionId,
    after: Step,
    way: Way,
) {
    let Some(divided) = &exchange.divided else {
        return;
    };
    let mut newest = divided.newest.subscribe();
    let mut sent = BTreeSet::new();
    loop {
        let published = newest.borrow_and_update().clone();
        sent.retain(|(step, _)| published.iter().any(|p| p.step == *step));
        for slice in published.iter() {
            let wanted = slice.step > after && slice.not_to != Some(session);
            if !wanted || !sent.insert((slice.step, slice.first)) {
                continue;
            }
            for chunk in slice.chunks() {
                if way.send(chunk).await.is_none() {
                    return;
                }
            }
        }
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = way.closed() => return,
        }
    }
}
