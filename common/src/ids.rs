//! The names of things: newtypes, so that a step is never taken for a lane.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A run's name, such as `tiny-1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(Arc<str>);

impl RunId {
    /// Wraps a name that was validated before.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One registration of a worker process. The high half is the coordinator's start, the low half counts, so that no
/// session is ever used again and an ended one stays fenced; people see the low half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.0 as u32)
    }
}

/// A lane of a run, below the run's number of lanes.
pub type Lane = u32;

/// An optimizer step, counted from 1. The state "at step s" is the state after s updates.
pub type Step = u64;
