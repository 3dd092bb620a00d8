//! What one worker sums of a gradient: its slice, and where workers that are near each other add up first what goes a long
//! way, nodes of chunks that others own.

use std::ops::Range;

use bytes::Bytes;

use crate::ids::Lane;
use crate::tree::Node;

/// What is summed in one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Duty {
    /// The chunks that are pushed here.
    pub chunks: Range<usize>,
    /// Those among them whose roots are summed here.
    pub owned: Range<usize>,
    /// Of the others these nodes are summed, and go to their owners. None contains another.
    pub passes: Vec<Node>,
}

/// A chunk of a node that goes to its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// The node.
    pub node: Node,
    /// The chunk.
    pub index: usize,
    /// f32, rounded as the run's payload says.
    pub sum: Bytes,
}

/// A slice, and nothing else.
impl From<Range<usize>> for Duty {
    fn from(slice: Range<usize>) -> Self {
        Self {
            chunks: slice.clone(),
            owned: slice,
            passes: Vec::new(),
        }
    }
}

impl Duty {
    pub(super) fn check(&self, chunks: usize) {
        let within = |inner: &Range<usize>, outer: Range<usize>| {
            outer.start <= inner.start && inner.start <= inner.end && inner.end <= outer.end
        };
        let pushed = &self.chunks;
        assert!(
            within(pushed, 0..chunks),
            "{pushed:?} lies outside {chunks} chunks"
        );
        let owned = &self.owned;
        assert!(
            within(owned, pushed.clone()),
            "{owned:?} lies outside {pushed:?}"
        );
    }

    /// Whether the sum of a node leaves here, of this chunk.
    pub(super) fn passes(&self, node: Node, index: usize) -> bool {
        !self.owned.contains(&index) && self.passes.contains(&node)
    }

    /// Whether a node may be pushed here, of this chunk.
    pub(super) fn takes(&self, node: Node, index: usize) -> bool {
        self.owned.contains(&index) || self.passes.iter().any(|passed| passed.contains(node))
    }

    /// How many sums a chunk ends in here.
    pub(super) fn ends_of(&self, index: usize) -> usize {
        match self.owned.contains(&index) {
            true => 1,
            false => self.passes.len(),
        }
    }

    /// For how many chunks a lane's contribution comes here.
    pub(crate) fn chunks_of(&self, lane: Lane) -> usize {
        let near = self.passes.iter().any(|node| node.lanes().contains(&lane));
        match near {
            true => self.chunks.len(),
            false => self.owned.len(),
        }
    }
}
