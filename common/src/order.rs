//! Which sample of the corpus stands at which place of a run.
//!
//! A run walks one endless line of positions. Position `p` belongs to epoch `p / samples`, and within an epoch the
//! samples stand in a keyed pseudo-random order. Because the order is a function, and not a shuffled list, any sample
//! of any step is found in constant memory, resuming costs nothing, and the order knows nothing of the workers.
//!
//! The order is local, so that a worker needs only the few shards that its lanes are walking. Three keyed steps lead
//! from a position `q` of an epoch to a sample:
//!
//! 1. Positions come in windows of [`WINDOW_BLOCKS`] blocks; within its window, `q` is permuted.
//! 2. The full blocks are permuted among themselves; a shorter last block stays last.
//! 3. The result is rotated along the corpus by an amount of the epoch, so that the borders of the blocks and the
//!    samples of the shorter block differ between epochs.
//!
//! Each step is a bijection, hence so is the whole: every sample stands in every epoch exactly once.
//!
//! This file does not know what a sample is, where shards begin, or who computes what.

mod mixture;

use std::ops::Range;

pub use mixture::{Mixture, Shares};

use crate::rng::{derive_key, philox};
use crate::spec::TrainConfig;

/// Blocks whose samples are mixed with each other.
pub const WINDOW_BLOCKS: u64 = 4;

/// Half-rounds of the Feistel network. Four suffice against an adversary (Luby and Rackoff, 1988), but domains of a few
/// elements, such as the blocks of a small corpus, mix slowly: with 8, some pairs are a fifth too frequent.
const HALF_ROUNDS: u32 = 12;

/// Uses of the epoch's key; each has counters of its own.
const USE_ROTATION: u32 = 0;
const USE_BLOCKS: u32 = 1;
const USE_WINDOW: u32 = 2;

/// A place in the corpus, as the order gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleAt {
    /// How many times the whole corpus has been used before.
    pub epoch: u64,
    /// Global index of the sample, below the number of samples.
    pub index: u64,
}

/// The order of one run's samples. A handful of words, whatever the size of the corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    key: u64,
    samples: u64,
    block: u64,
}

impl Order {
    /// The order of `samples` samples under `seed`, in blocks of `block` samples (about one shard).
    ///
    /// # Panics
    ///
    /// If there are no samples, or a block has none.
    pub fn new(seed: u64, samples: u64, block: u64) -> Self {
        assert!(samples >= 1, "an order needs at least one sample");
        assert!(block >= 1, "a block needs at least one sample");
        Self {
            key: derive_key(seed, "sample order"),
            samples,
            block: block.min(samples),
        }
    }

    /// Samples in one epoch.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Samples in one block.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// The sample at a position of the run. Expected constant time.
    pub fn sample(&self, position: u64) -> SampleAt {
        let epoch = position / self.samples;
        let key = pair(philox(self.key, [epoch as u32, (epoch >> 32) as u32, 0, 0])).0;
        let mixed = self.within_window(key, position % self.samples);
        let placed = self.among_blocks(key, mixed);
        let rotation = below(philox(key, [0, 0, 0, USE_ROTATION]), self.samples);
        let index = (u128::from(placed) + u128::from(rotation)) % u128::from(self.samples);
        SampleAt {
            epoch,
            index: index as u64,
        }
    }

    /// The positions that a lane consumes in a step, micro-batch after micro-batch: micro-batch `m` holds the
    /// `micro_batch` positions from `start + m * micro_batch`. `step` counts the steps before this one: the first step
    /// of a run is 0.
    ///
    /// # Panics
    ///
    /// If the run has no such lane, or the position does not fit 64 bits (no validated spec comes near).
    pub fn positions(&self, step: u64, lane: u32, train: &TrainConfig) -> Range<u64> {
        assert!(lane < train.lanes, "lane {lane} of {}", train.lanes);
        let per_lane = train.samples_per_lane();
        let start = step
            .checked_mul(train.samples_per_step())
            .and_then(|first| first.checked_add(u64::from(lane) * per_lane))
            .expect("positions of a validated spec fit 64 bits");
        start..start + per_lane
    }

    fn within_window(&self, key: u64, q: u64) -> u64 {
        let length = self.block.saturating_mul(WINDOW_BLOCKS);
        let window = q / length;
        let start = window * length;
        let size = length.min(self.samples - start);
        let of_window = philox(
            key,
            [window as u32, (window >> 32) as u32, 0, USE_WINDOW << 8],
        );
        start + permute(pair(of_window).0, USE_WINDOW, size, q - start)
    }

    fn among_blocks(&self, key: u64, q: u64) -> u64 {
        let full_blocks = self.samples / self.block;
        let (block, within) = (q / self.block, q % self.block);
        if block >= full_blocks {
            return q;
        }
        permute(key, USE_BLOCKS, full_blocks, block) * self.block + within
    }
}

/// The image of `x` under a keyed bijection of `[0, size)`: a Feistel network over pairs `(left, right)` of the
/// smallest near-square rectangle that covers the range, walked until it lands inside (Black and Rogaway, "Ciphers
/// with arbitrary finite domains", 2002). The rectangle exceeds the range by less than its square root, so a walk
/// rarely takes a second turn.
fn permute(key: u64, usage: u32, size: u64, x: u64) -> u64 {
    debug_assert!(x < size);
    let width = ceil_sqrt(size);
    let height = size.div_ceil(width);
    let mut value = u128::from(x);
    loop {
        let (mut left, mut right) = (
            (value % u128::from(width)) as u64,
            (value / u128::from(width)) as u64,
        );
        for round in 0..HALF_ROUNDS {
            let (half, other, modulus) = if round % 2 == 0 {
                (&mut left, right, width)
            } else {
                (&mut right, left, height)
            };
            let words = philox(
                key,
                [other as u32, (other >> 32) as u32, round, usage << 8 | 1],
            );
            *half = add_mod(*half, below(words, modulus), modulus);
        }
        value = u128::from(right) * u128::from(width) + u128::from(left);
        if value < u128::from(size) {
            return value as u64;
        }
    }
}

/// Two 64-bit words out of four 32-bit ones.
fn pair(words: [u32; 4]) -> (u64, u64) {
    let join = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
    (join(words[0], words[1]), join(words[2], words[3]))
}

/// A number in `[0, bound)`; biased by at most `bound / 2^64`.
fn below(words: [u32; 4], bound: u64) -> u64 {
    ((u128::from(pair(words).0) * u128::from(bound)) >> 64) as u64
}

fn add_mod(a: u64, b: u64, modulus: u64) -> u64 {
    ((u128::from(a) + u128::from(b)) % u128::from(modulus)) as u64
}

fn ceil_sqrt(n: u64) -> u64 {
    let floor = n.isqrt();
    floor + u64::from(floor * floor < n)
}

#[cfg(test)]
mod tests;
