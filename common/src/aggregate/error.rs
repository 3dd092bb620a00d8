//! Why a push is refused.

use std::ops::Range;

use thiserror::Error;

use crate::ids::SessionId;
use crate::tree::Node;

/// Why a push was refused. Each means a broken or hostile peer; the state is unchanged.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum OfferError {
    /// The node is not part of the run's tree.
    #[error("{node} is not a node of the tree over {lanes} lanes")]
    NoSuchNode {
        /// What was pushed.
        node: Node,
        /// Lanes of the run.
        lanes: u32,
    },
    /// The chunk lies outside the gradient.
    #[error("chunk {index} lies outside the {chunks} chunks of this gradient")]
    NoSuchChunk {
        /// What was pushed.
        index: usize,
        /// Chunks of the gradient.
        chunks: usize,
    },
    /// The chunk lies outside the slice.
    #[error("chunk {index} belongs to another owner; this one has chunks {slice:?}")]
    NotOwned {
        /// What was pushed.
        index: usize,
        /// Chunks of this owner.
        slice: Range<usize>,
    },
    /// The chunk is another owner's, and the node is none that is passed on to it from here.
    #[error("chunk {index} of {node} belongs to another owner, and is not to be passed on here")]
    NotNear {
        /// What was pushed.
        index: usize,
        /// The node.
        node: Node,
    },
    /// The payload has the wrong size.
    #[error("chunk {index} has {found} bytes where {expected} were expected")]
    WrongLength {
        /// The chunk.
        index: usize,
        /// Bytes that were pushed.
        found: usize,
        /// Bytes of this chunk.
        expected: usize,
    },
    /// The chunk lies outside the memory that was shared.
    #[error("chunk {index} of {node} does not lie in the memory that is shared")]
    Outside {
        /// The chunk.
        index: usize,
        /// The node.
        node: Node,
    },
    /// Two workers computed different bits for the same node.
    #[error(
        "workers {first} and {second} disagree on the gradient of {node} (chunk {index}); one of the two machines computes wrongly"
    )]
    Mismatch {
        /// The chunk.
        index: usize,
        /// The node.
        node: Node,
        /// Who pushed it first.
        first: SessionId,
        /// Who pushed it again.
        second: SessionId,
    },
}
