//! Runs that walk several corpora: which of them a position of the run belongs to, and which place it is in the walk along
//! that corpus. Each corpus is walked in its own order, every sample once in an epoch of its own, however its share of the
//! positions changes.
//!
//! A share is a number of parts, and stands at evenly spaced positions: of the first `n` positions, `floor(n * parts / of)`
//! belong to it (Bresenham's line). With several corpora, one takes its share of all positions, the next takes its share of
//! those that are left, and so on; the run's own corpus has what is left at last. So everything is a function of the
//! position, and knows nothing of the workers.

use std::ops::Range;

use super::{Order, SampleAt};
use crate::spec::{MixtureConfig, RunSpec, TrainConfig};

/// Parts of the share of samples that are replayed.
const REPLAY_PARTS: u32 = 1_000_000;

/// A corpus takes `parts` of `of` of the positions that those before it have left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share {
    corpus: usize,
    parts: u32,
    of: u32,
}

impl Share {
    /// How many of the first `n` positions it takes.
    fn of_first(self, n: u64) -> u64 {
        (u128::from(n) * u128::from(self.parts) / u128::from(self.of)) as u64
    }
}

/// Positions from `from` on, up to the next phase.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Phase {
    from: u64,
    /// The corpora that take their share one after the other. The run's own is none of them.
    shares: Vec<Share>,
    /// Positions of each corpus before this phase.
    before: Vec<u64>,
}

impl Phase {
    /// Adds the positions of each corpus among the first `n` of the phase.
    fn count(&self, n: u64, counts: &mut [u64]) {
        let mut left = n;
        for share in &self.shares {
            let taken = share.of_first(left);
            counts[share.corpus] += taken;
            left -= taken;
        }
        counts[0] += left;
    }
}

/// Which corpus each position of a run belongs to. The run's own corpus has number 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    corpora: usize,
    /// In order; the first begins with position 0.
    phases: Vec<Phase>,
}

impl Shares {
    /// Those of a run, whose corpora are numbered as in [`RunSpec::training_corpora`].
    pub fn of(spec: &RunSpec) -> Self {
        let corpora = spec.training_corpora().len();
        let replayed = spec
            .train
            .replay
            .filter(|_| spec.replayed_corpus().is_some());
        let parts = |share: f64| (share * f64::from(REPLAY_PARTS)).round() as u32;
        let replayed = replayed.map(|share| Share {
            corpus: corpora - 1,
            parts: parts(share).min(REPLAY_PARTS),
            of: REPLAY_PARTS,
        });
        let per_step = spec.train.samples_per_step();
        let mixed = spec.mixture.as_ref().map(|MixtureConfig { phases, .. }| {
            let phases = phases.iter();
            let phase = |phase: &crate::spec::MixturePhase| {
                (phase.from.saturating_mul(per_step), mixed(&phase.parts))
            };
            phases.map(phase).collect::<Vec<_>>()
        });
        let phases = mixed.unwrap_or_else(|| vec![(0, Vec::new())]);
        let with_replay = |(from, shares): (u64, Vec<Share>)| {
            (from, replayed.into_iter().chain(shares).collect())
        };
        Self::new(corpora, phases.into_iter().map(with_replay))
    }

    fn new(corpora: usize, given: impl Iterator<Item = (u64, Vec<Share>)>) -> Self {
        let mut phases: Vec<Phase> = Vec::new();
        for (from, shares) in given {
            let mut before = vec![0; corpora];
            if let Some(last) = phases.last() {
                before.clone_from(&last.before);
                last.count(from - last.from, &mut before);
            }
            phases.push(Phase {
                from,
                shares,
                before,
            });
        }
        Self { corpora, phases }
    }

    fn phase(&self, position: u64) -> &Phase {
        let after = self.phases.partition_point(|phase| phase.from <= position);
        &self.phases[after - 1]
    }

    /// The corpus of a position, and how many positions before it belong to the same.
    pub fn at(&self, position: u64) -> (usize, u64) {
        let phase = self.phase(position);
        let mut at = position - phase.from;
        for share in &phase.shares {
            let before = share.of_first(at);
            if share.of_first(at + 1) > before {
                return (share.corpus, phase.before[share.corpus] + before);
            }
            at -= before;
        }
        (0, phase.before[0] + at)
    }

    /// Positions of each corpus among the first `n` of the run.
    pub fn of_first(&self, n: u64) -> Vec<u64> {
        // A position that begins a phase counts none of it yet.
        let phase = self.phase(n);
        let mut counts = phase.before.clone();
        phase.count(n - phase.from, &mut counts);
        counts
    }
}

/// The shares of corpora of which each has so many parts, the run's own first.
fn mixed(parts: &[u32]) -> Vec<Share> {
    let mut left: u32 = parts.iter().sum();
    let mut shares = Vec::new();
    for (corpus, &parts) in parts.iter().enumerate().skip(1).rev() {
        if parts > 0 {
            shares.push(Share {
                corpus,
                parts,
                of: left,
            });
            left -= parts;
        }
    }
    shares
}

/// The samples of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    orders: Vec<Order>,
    shares: Shares,
}

impl Mixture {
    /// Those of a run. `order` gives the order of a corpus, of which a share of the samples counts if one is given.
    ///
    /// # Errors
    /// Those of `order`.
    pub fn of<E>(
        spec: &RunSpec,
        order: impl Fn(&str, Option<f64>) -> Result<Order, E>,
    ) -> Result<Self, E> {
        let corpora = spec.training_corpora().into_iter().enumerate();
        let orders = corpora.map(|(number, corpus)| {
            let share = spec.train.data_share.filter(|_| number == 0);
            order(corpus, share)
        });
        Ok(Self {
            orders: orders.collect::<Result<_, _>>()?,
            shares: Shares::of(spec),
        })
    }

    /// The samples of one corpus in their own order, that of the run itself.
    pub fn alone(own: Order) -> Self {
        Self {
            orders: vec![own],
            shares: Shares::new(1, std::iter::once((0, Vec::new()))),
        }
    }

    /// The order of each corpus.
    pub fn orders(&self) -> &[Order] {
        &self.orders
    }

    /// The sample at a position of the run, and the number of its corpus.
    pub fn sample(&self, position: u64) -> (usize, SampleAt) {
        let (corpus, nth) = self.shares.at(position);
        (corpus, self.orders[corpus].sample(nth))
    }

    /// See [`Order::positions`].
    pub fn positions(&self, step: u64, lane: u32, train: &TrainConfig) -> Range<u64> {
        self.orders[0].positions(step, lane, train)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn phases() -> impl Strategy<Value = (usize, Vec<(u64, Vec<u32>)>)> {
        let weights = |corpora| {
            let parts = prop::collection::vec(0u32..1000, corpora);
            parts.prop_filter("somebody has parts", |parts| parts.iter().any(|p| *p > 0))
        };
        (1usize..5).prop_flat_map(move |corpora| {
            let later = prop::collection::vec((1u64..200, weights(corpora)), 0..4);
            (Just(corpora), weights(corpora), later).prop_map(|(corpora, first, later)| {
                let mut phases = vec![(0, first)];
                for (length, parts) in later {
                    let from = phases.last().map_or(0, |(from, _)| from + length);
                    phases.push((from, parts));
                }
                (corpora, phases)
            })
        })
    }

    #[test]
    fn replayed_samples_stand_evenly_and_have_an_order_of_their_own() {
        let (own, old) = (Order::new(1, 60, 10), Order::new(2, 7, 3));
        for (parts, expected) in [(0, 0), (50_000, 10), (333_000, 66), (REPLAY_PARTS, 200)] {
            let share = Share {
                corpus: 1,
                parts,
                of: REPLAY_PARTS,
            };
            let mixture = Mixture {
                orders: vec![own.clone(), old.clone()],
                shares: Shares::new(2, std::iter::once((0, vec![share]))),
            };
            let mut next = [0, 0];
            for position in 0..200 {
                let (corpus, at) = mixture.sample(position);
                assert_eq!(at, mixture.orders()[corpus].sample(next[corpus]));
                next[corpus] += 1;
                let exact = (position + 1) * u64::from(parts) / u64::from(REPLAY_PARTS);
                assert_eq!(next[1], exact, "{parts} {position}");
            }
            assert_eq!(next[1], expected);
        }
        assert_eq!(Mixture::alone(own.clone()).sample(77), (0, own.sample(77)));
    }

    proptest! {
        #[test]
        fn each_corpus_is_walked_without_a_gap_and_has_its_share(
            (corpora, phases) in phases(),
            replay in prop::option::of(1u32..900_000),
        ) {
            let replayed = replay.map(|parts| Share { corpus: corpora, parts, of: REPLAY_PARTS });
            let all = corpora + usize::from(replay.is_some());
            let given = phases.iter().map(|(from, parts)| {
                (*from, replayed.into_iter().chain(mixed(parts)).collect())
            });
            let shares = Shares::new(all, given);
            let mut next = vec![0u64; all];
            for position in 0..1500 {
                prop_assert_eq!(&shares.of_first(position), &next, "{}", position);
                let (corpus, nth) = shares.at(position);
                prop_assert_eq!(nth, next[corpus]);
                next[corpus] += 1;
            }
            // The last phase is long enough to see its shares.
            let (from, parts) = phases.last().unwrap();
            let (before, length) = (shares.of_first(*from), 1500 - from);
            let own = f64::from(REPLAY_PARTS - replay.unwrap_or(0)) / f64::from(REPLAY_PARTS);
            let sum: u32 = parts.iter().sum();
            for (corpus, parts) in parts.iter().enumerate() {
                let expected = length as f64 * own * f64::from(*parts) / f64::from(sum);
                let found = (next[corpus] - before[corpus]) as f64;
                prop_assert!((found - expected).abs() < 1.0 + corpora as f64, "{} {}", found, expected);
            }
        }
    }
}
