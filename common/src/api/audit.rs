//! What an audit of a run has found, and what a replay has.

use serde::{Deserialize, Serialize};

/// An audit of a run: what was checked, in numbers, and the first contradiction, if there is one. `cohort verify --json`
/// prints it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AuditReport {
    /// The run.
    pub run: String,
    /// A word, as in [`RunInfo`](super::RunInfo).
    pub status: String,
    /// Committed steps, as the run's row has them.
    pub step: u64,
    /// Ledger entries that were read.
    pub entries: u64,
    /// Hash of the last entry, or what the first one would follow, in hex.
    pub head: String,
    /// Sums of lanes in these entries.
    pub lanes: u64,
    /// Lanes of the run.
    pub lanes_per_step: u64,
    /// Samples that were walked.
    pub samples: u64,
    /// Samples in one epoch; 0 if the corpus is not here.
    pub epoch_samples: u64,
    /// Epochs that are complete.
    pub epochs: u64,
    /// Samples of the epoch that is not.
    pub partial_samples: u64,
    /// Steps that the watchdog kept from the weights.
    #[serde(default)]
    pub skipped: u64,
    /// Steps whose learning rate was planned for another number of steps than the run has now.
    pub earlier_horizon: u64,
    /// Checkpoints that were read in full.
    pub checkpoints: u64,
    /// Bytes in their files.
    pub checkpoint_bytes: u64,
    /// How many of them carry the ledger up to their step.
    pub checkpoint_ledgers: u64,
    /// Checkpoints whose state hash an entry names, too.
    pub state_hashes: u64,
    /// What could not be checked, and why.
    pub notes: Vec<String>,
    /// How many contradictions there are.
    pub contradictions: u64,
    /// The first of them: what, where, which values, and what to do.
    pub contradiction: Option<String>,
}

/// Steps that were computed again and compared with the ledger. `cohort verify --replay --json` prints it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplayReport {
    /// The run.
    pub run: String,
    /// Updates that the state had seen from which the replay started.
    pub from: u64,
    /// The last step that was computed.
    pub through: u64,
    /// Steps that were computed.
    pub steps: u64,
    /// State hashes that were compared on the way.
    pub state_hashes: u64,
    /// Time that the steps took, without fetching the state.
    pub seconds: f64,
    /// The first difference, if there is one: the step, the field, both values, and what to do.
    pub contradiction: Option<String>,
}
