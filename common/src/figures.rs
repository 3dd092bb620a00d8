//! What a worker says of its own work: counters that only grow while a session lasts. The worker counts, the coordinator
//! takes differences; nothing that a run computes depends on them. No clock is read here.

use crate::ids::{RunId, Step};
use crate::process::Usage;

/// A worker's counters at a moment, and the run that it has in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// The run that the worker has in memory or is loading, and the step of its state.
    pub run: Option<(RunId, Step)>,
    /// What it did since its session began.
    pub counters: Counters,
    /// What its process uses, where the platform tells.
    pub usage: Option<Usage>,
}

/// What a worker did since its session began. The first four are microseconds; each moment counts in one of them, so that
/// their sum is the time that has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// It computed: lanes, sums, updates, validations.
    pub compute_us: u64,
    /// It computed nothing while its sums were sent or a root was received.
    pub exchange_us: u64,
    /// It had nothing to do.
    pub wait_us: u64,
    /// It waited for text.
    pub data_us: u64,
    /// Tokens of the lanes that it computed.
    pub tokens: u64,
    /// Updates that it made.
    pub steps: u64,
    /// Lanes that it computed.
    pub lanes: u64,
    /// Microseconds from each lane's beginning to its end, text included.
    pub lanes_us: u64,
    /// Bytes of gradients that it sent; none where memory is shared.
    pub sent_bytes: u64,
    /// Bytes of roots that it received; none where memory is shared.
    pub received_bytes: u64,
}

impl Counters {
    /// What happened after `earlier`. A counter that has shrunk, which a sound worker's never does, counts as unchanged.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            compute_us: self.compute_us.saturating_sub(earlier.compute_us),
            exchange_us: self.exchange_us.saturating_sub(earlier.exchange_us),
            wait_us: self.wait_us.saturating_sub(earlier.wait_us),
            data_us: self.data_us.saturating_sub(earlier.data_us),
            tokens: self.tokens.saturating_sub(earlier.tokens),
            steps: self.steps.saturating_sub(earlier.steps),
            lanes: self.lanes.saturating_sub(earlier.lanes),
            lanes_us: self.lanes_us.saturating_sub(earlier.lanes_us),
            sent_bytes: self.sent_bytes.saturating_sub(earlier.sent_bytes),
            received_bytes: self.received_bytes.saturating_sub(earlier.received_bytes),
        }
    }

    /// The time that has passed, in microseconds.
    pub fn wall_us(&self) -> u64 {
        let times = [
            self.compute_us,
            self.exchange_us,
            self.wait_us,
            self.data_us,
        ];
        times.into_iter().fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_never_wraps() {
        let early = Counters {
            compute_us: 10,
            wait_us: 5,
            tokens: 100,
            ..Counters::default()
        };
        let late = Counters {
            compute_us: 25,
            wait_us: 4,
            tokens: 300,
            ..Counters::default()
        };
        let since = late.since(&early);
        assert_eq!(
            (since.compute_us, since.wait_us, since.tokens),
            (15, 0, 200)
        );
        assert_eq!(since.wall_us(), 15);
    }
}
