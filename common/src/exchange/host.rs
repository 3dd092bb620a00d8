//! Who stands around the exchange: what it is asked, and what it is told.

use std::time::SystemTime;

use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::aggregate::{ChunkDigest, OfferError};
use crate::ids::{Lane, RunId, SessionId, Step};
use crate::wire::SESSION_KEY;

/// What became of the slice of the one who owns it.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// The owner holds every chunk of its slice of these lanes.
    Delivered {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// The lanes.
        lanes: Vec<Lane>,
    },
    /// Every root of the slice is complete.
    Complete {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// Of the slice's chunks, in index order.
        digests: Vec<ChunkDigest>,
    },
    /// What a session pushes cannot be relied on.
    Broken {
        /// Whose.
        session: SessionId,
        /// For people.
        what: String,
    },
    /// Two workers computed different bits for the same node.
    Mismatch {
        /// The run.
        run: RunId,
        /// The step.
        step: Step,
        /// Who, and of what.
        error: OfferError,
    },
}

/// What the exchange asks and tells the process around it.
#[tonic::async_trait]
pub trait Host: Send + Sync {
    /// Whether a session is open.
    fn is_open(&self, session: SessionId) -> bool;

    /// The time.
    fn now(&self) -> SystemTime;

    /// Something happened.
    async fn tell(&self, told: Told);
}

/// The session that a worker's call belongs to, and whether it is still open.
pub fn session_of(host: &dyn Host, metadata: &MetadataMap) -> Result<SessionId, Status> {
    let session = metadata
        .get(SESSION_KEY)
        .and_then(|v| v.to_str().ok()?.parse().ok())
        .map(SessionId)
        .ok_or_else(|| Status::unauthenticated("only workers in a session may call this"))?;
    check_open(host, session)?;
    Ok(session)
}

/// An error if a session has ended.
pub(super) fn check_open(host: &dyn Host, session: SessionId) -> Result<(), Status> {
    match host.is_open(session) {
        true => Ok(()),
        false => Err(Status::failed_precondition(
            "this session has ended; register again",
        )),
    }
}
