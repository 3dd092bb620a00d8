//! What is seen of a worker's work from outside: counters always, spans where somebody wants traces. Handed to whatever
//! works; it changes nothing of what that does.

use std::sync::Arc;

use crate::figures::Meter;
use crate::trace::Spans;

/// Counters of the process, and the spans of this session and run. Clones share both.
#[derive(Clone, Debug, Default)]
pub struct Observer {
    /// How the time goes.
    pub(crate) meter: Arc<Meter>,
    /// Traces of steps.
    pub(crate) spans: Spans,
}
