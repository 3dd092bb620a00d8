//! The ledger of a run: one entry per committed step, chained by hash. **Pure**: the coordinator's store keeps it.
//!
//! An entry says which samples went into a step and what came out of it, and nothing about who computed it or when:
//! two clusters' ledgers of the same run are equal entry by entry.

use serde::{Deserialize, Serialize};

use crate::checkpoint::hex;
use crate::cluster::messages::LaneSums;

/// Updates between two state hashes in a ledger. A constant, so that the ledgers of all clusters agree.
pub const STATE_HASH_EVERY: u64 = 25;

/// Whether the entry of `step` carries the hash of the state before it.
pub fn state_hash_due(step: u64) -> bool {
    step > 1 && (step - 1).is_multiple_of(STATE_HASH_EVERY)
}

/// One committed step. Two are equal if they are so to the bit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// The step that this entry commits.
    pub step: u64,
    /// Position in the run's order of samples of the step's first sample.
    pub first_position: u64,
    /// Samples that the step consumed: positions `first_position..first_position + samples`, in equal ranges for the
    /// lanes, in their order.
    pub samples: u64,
    /// What each lane found, in the order of lanes.
    #[serde(with = "exact_sums")]
    pub lanes: Vec<LaneSums>,
    /// Sum of the loss over the supervised tokens, in nats.
    #[serde(with = "exact")]
    pub loss_sum: f64,
    /// Supervised tokens (samples in classification).
    #[serde(with = "exact")]
    pub weight: f64,
    /// Global gradient norm before clipping.
    #[serde(with = "exact")]
    pub grad_norm: f64,
    /// Learning rate of the update.
    #[serde(with = "exact")]
    pub learning_rate: f64,
    /// Hash of the root of the reduction tree: the step's summed gradient.
    #[serde(with = "hex")]
    pub root_hash: [u8; 32],
    /// State hash before the step's update, at the steps where one is due.
    #[serde(with = "hex::option")]
    pub state_hash_before: Option<[u8; 32]>,
    /// Whether the watchdog kept the update from the weights: parameters, moments and the optimizer's count of updates
    /// stayed as they were.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Hash of the entry before; the run's genesis for the first.
    #[serde(with = "hex")]
    pub previous: [u8; 32],
}

/// Bits of the byte of flags.
const HAS_STATE_HASH: u8 = 1;
const SKIPPED: u8 = 2;

/// Bytes of an encoded entry without its lanes.
const FIXED_LEN: usize = 8 * 7 + 32 + 33 + 32;

/// Bytes of one encoded lane.
const LANE_LEN: usize = 16;

/// The first field in which two entries differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Name of the field.
    pub field: &'static str,
    /// Value in the first entry, printed.
    pub ours: String,
    /// Value in the second entry, printed.
    pub theirs: String,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.encode() == other.encode()
    }
}

impl Entry {
    /// Canonical bytes: the fields in order, the lanes last, little-endian, floats by their bits.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED_LEN + LANE_LEN * self.lanes.len());
        for number in [
            self.step,
            self.first_position,
            self.samples,
            self.loss_sum.to_bits(),
            self.weight.to_bits(),
            self.grad_norm.to_bits(),
            self.learning_rate.to_bits(),
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.root_hash);
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        bytes.push(
            flag(self.state_hash_before.is_some(), HAS_STATE_HASH) | flag(self.skipped, SKIPPED),
        );
        bytes.extend_from_slice(&self.state_hash_before.unwrap_or_default());
        bytes.extend_from_slice(&self.previous);
        for lane in &self.lanes {
            bytes.extend_from_slice(&lane.loss.to_bits().to_le_bytes());
            bytes.extend_from_slice(&lane.weight.to_bits().to_le_bytes());
        }
        bytes
    }

    /// Bytes of [`Entry::encode`].
    pub fn encoded_len(&self) -> usize {
        FIXED_LEN + LANE_LEN * self.lanes.len()
    }

    /// Reads what [`Entry::encode`] wrote; `None` if it is anything else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let lanes = bytes.get(FIXED_LEN..)?;
        if !lanes.len().is_multiple_of(LANE_LEN) {
            return None;
        }
        let word = |b: &[u8]| u64::from_le_bytes(b[..8].try_into().expect("8 bytes"));
        let number = |i: usize| word(&bytes[8 * i..]);
        let hash = |at: usize| -> [u8; 32] { bytes[at..at + 32].try_into().expect("32 bytes") };
        let lane = |b: &[u8]| LaneSums {
            loss: f64::from_bits(word(b)),
            weight: f64::from_bits(word(&b[8..])),
        };
        let entry = Self {
            step: number(0),
            first_position: number(1),
            samples: number(2),
            lanes: lanes.chunks_exact(LANE_LEN).map(lane).collect(),
            loss_sum: f64::from_bits(number(3)),
            weight: f64::from_bits(number(4)),
            grad_norm: f64::from_bits(number(5)),
            learning_rate: f64::from_bits(number(6)),
            root_hash: hash(56),
            state_hash_before: (bytes[88] & HAS_STATE_HASH != 0).then(|| hash(89)),
            skipped: bytes[88] & SKIPPED != 0,
            previous: hash(121),
        };
        // Only one encoding of an entry is valid.
        (entry.encode() == bytes).then_some(entry)
    }

    /// The entry's hash, which the next entry names as `previous`.
    pub fn hash(&self) -> [u8; 32] {
        blake3::hash(&self.encode()).into()
    }

    /// Whether loss and gradient are numbers that an update can be made of.
    pub fn is_finite(&self) -> bool {
        self.grad_norm.is_finite() && self.loss_sum.is_finite()
    }

    /// The entry with one bit pattern for all that is not finite. Which NaN comes out of a sum, and whether it or an
    /// infinity does, depends on the order of operands in machine code; a gradient that is not finite has no hash.
    pub fn canonical(mut self) -> Self {
        let one = |x: &mut f64| *x = if x.is_finite() { *x } else { f64::NAN };
        self.lanes.iter_mut().for_each(|lane| one(&mut lane.loss));
        one(&mut self.loss_sum);
        one(&mut self.grad_norm);
        if !self.grad_norm.is_finite() {
            self.root_hash = [0; 32];
        }
        self
    }

    /// Mean loss of the step, in nats per supervised token.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.weight
    }

    /// The first field in which `other` differs; `None` if the two are the same to the bit.
    pub fn difference(&self, other: &Self) -> Option<Difference> {
        let float = |x: f64| format!("{x:?} (bits {:016x})", x.to_bits());
        let optional = |h: &Option<[u8; 32]>| h.as_ref().map_or("none".into(), hex::encode);
        let lanes = |lanes: &[LaneSums]| -> String {
            let sums = lanes
                .iter()
                .map(|l| format!("{} / {}", float(l.loss), float(l.weight)));
            sums.collect::<Vec<_>>().join(", ")
        };
        let fields = |e: &Self| {
            [
                ("step", e.step.to_string()),
                ("first_position", e.first_position.to_string()),
                ("samples", e.samples.to_string()),
                ("loss_sum", float(e.loss_sum)),
                ("weight", float(e.weight)),
                ("grad_norm", float(e.grad_norm)),
                ("learning_rate", float(e.learning_rate)),
                ("root_hash", hex::encode(&e.root_hash)),
                ("state_hash_before", optional(&e.state_hash_before)),
                ("skipped", e.skipped.to_string()),
                ("previous", hex::encode(&e.previous)),
                ("lanes", lanes(&e.lanes)),
            ]
        };
        if self == other {
            return None;
        }
        let mut pairs = fields(self).into_iter().zip(fields(other));
        let ((field, ours), (_, theirs)) = pairs.find(|(a, b)| a.1 != b.1)?;
        Some(Difference {
            field,
            ours,
            theirs,
        })
    }

    /// One line of JSON, hashes in hex, without a line break.
    pub fn to_json_line(&self) -> String {
        serde_json::to_string(self).expect("an entry is plain data")
    }

    /// Reads what [`Entry::to_json_line`] wrote, to the bit.
    pub fn from_json_line(line: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(line)
    }
}

/// What the first entry of a run names as `previous`. `identity` is whatever tells runs of different results apart:
/// the spec and the corpus.
pub fn genesis(identity: &[u8]) -> [u8; 32] {
    blake3::derive_key("cohort ledger genesis v1", identity)
}

/// A contradiction in a ledger.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// An entry that is already there.
    #[error("step {step} is in the ledger twice")]
    Duplicate {
        /// The step.
        step: u64,
    },
    /// One or more entries are missing.
    #[error("the ledger has no entry for step {expected}; the next one is for step {found}")]
    Gap {
        /// The first missing step.
        expected: u64,
        /// The step that was found.
        found: u64,
    },
    /// An entry that does not follow from the one before it.
    #[error(
        "step {step} follows an entry with hash `{}`, but the entry before it has `{}`: the ledger was changed",
        hex::encode(found),
        hex::encode(expected)
    )]
    BrokenLink {
        /// The step.
        step: u64,
        /// Hash of the entry before.
        expected: [u8; 32],
        /// What the entry names.
        found: [u8; 32],
    },
    /// Samples skipped or counted twice.
    #[error("step {step} begins at sample position {found}, the step before it ends at {expected}")]
    Position {
        /// The step.
        step: u64,
        /// First position not yet consumed.
        expected: u64,
        /// The entry's first position.
        found: u64,
    },
}

/// Checks entries one by one: steps without gap or repetition, samples likewise, links unbroken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    next_step: u64,
    next_position: u64,
    head: [u8; 32],
}

impl Chain {
    /// A chain whose next entry must be for `next_step`, begin at `next_position` and name `head` as previous.
    pub fn new(next_step: u64, next_position: u64, head: [u8; 32]) -> Self {
        Self {
            next_step,
            next_position,
            head,
        }
    }

    /// The chain after `entry`, which is trusted.
    pub fn after(entry: &Entry) -> Self {
        Self {
            next_step: entry.step.saturating_add(1),
            next_position: entry.first_position.saturating_add(entry.samples),
            head: entry.hash(),
        }
    }

    /// The step that the next entry must commit.
    pub fn next_step(&self) -> u64 {
        self.next_step
    }

    /// The position at which the next entry must begin.
    pub fn next_position(&self) -> u64 {
        self.next_position
    }

    /// Hash of the last entry; the genesis if there is none.
    pub fn head(&self) -> [u8; 32] {
        self.head
    }

    /// Adds an entry. After an error the chain is what it was.
    pub fn push(&mut self, entry: &Entry) -> Result<(), ChainError> {
        let (step, expected) = (entry.step, self.next_step);
        if step < expected {
            return Err(ChainError::Duplicate { step });
        }
        if step > expected {
            return Err(ChainError::Gap {
                expected,
                found: step,
            });
        }
        if entry.previous != self.head {
            return Err(ChainError::BrokenLink {
                step,
                expected: self.head,
                found: entry.previous,
            });
        }
        if entry.first_position != self.next_position {
            return Err(ChainError::Position {
                step,
                expected: self.next_position,
                found: entry.first_position,
            });
        }
        *self = Self::after(entry);
        Ok(())
    }
}

/// Floats as JSON numbers that read back to the bit; infinities and NaN, which JSON lacks, as their bits in hex.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Float {
        Number(f64),
        Bits(String),
    }

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        match value.is_finite() {
            true => serializer.serialize_f64(*value),
            false => serializer.serialize_str(&format!("{:016x}", value.to_bits())),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        match Float::deserialize(deserializer)? {
            Float::Number(value) => Ok(value),
            Float::Bits(text) => u64::from_str_radix(&text, 16)
                .map(f64::from_bits)
                .map_err(|_| D::Error::custom(format!("`{text}` is not a number"))),
        }
    }
}

/// Lanes as pairs of [`exact`] floats: `[[loss, weight], …]`.
mod exact_sums {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::LaneSums;

    #[derive(Serialize, Deserialize)]
    struct Exact(#[serde(with = "super::exact")] f64);

    pub fn serialize<S: Serializer>(lanes: &[LaneSums], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(lanes.iter().map(|l| (Exact(l.loss), Exact(l.weight))))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<LaneSums>, D::Error> {
        let pairs = Vec::<(Exact, Exact)>::deserialize(deserializer)?;
        let sums = |(loss, weight): (Exact, Exact)| LaneSums {
            loss: loss.0,
            weight: weight.0,
        };
        Ok(pairs.into_iter().map(sums).collect())
    }
}

#[cfg(test)]
mod tests;
