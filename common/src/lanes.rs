//! Who computes which lanes. A fresh assignment gives each worker one contiguous range, so that most of the tree is
//! summed where the lanes are; lanes that are lost in mid-step go to the survivors in contiguous pieces.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;

use crate::ids::{Lane, SessionId};

/// Splits all lanes over the workers, in the order given: contiguous ranges, so that the slowest is done as soon as
/// possible. A worker comes with the time it takes for a lane; where that is not known yet it is taken to be the mean of
/// those that are. Equal workers get numbers of lanes that differ by at most one.
pub fn assign(
    lanes: u32,
    workers: &[(SessionId, Option<f64>)],
) -> BTreeMap<SessionId, Range<Lane>> {
    let known: Vec<f64> = workers.iter().filter_map(|(_, time)| *time).collect();
    let usual = match known.len() {
        0 => 1.0,
        n => known.iter().sum::<f64>() / n as f64,
    };
    let times: Vec<f64> = workers.iter().map(|(_, t)| t.unwrap_or(usual)).collect();
    let mut counts = vec![0u32; workers.len()];
    // The next lane goes to whoever would be done with it first.
    let turn =
        |worker: usize, count: u32| Reverse(Turn(f64::from(count + 1) * times[worker], worker));
    let mut turns: BinaryHeap<_> = (0..workers.len()).map(|worker| turn(worker, 0)).collect();
    for _ in 0..lanes {
        let Reverse(Turn(_, best)) = turns.pop().expect("there are workers");
        counts[best] += 1;
        turns.push(turn(best, counts[best]));
    }
    let mut first = 0;
    let range = |((session, _), count): (&(SessionId, Option<f64>), u32)| {
        let range = first..first + count;
        first = range.end;
        (*session, range)
    };
    workers.iter().zip(counts).map(range).collect()
}

/// When a worker would be done with one more lane, and which one it is.
#[derive(PartialEq)]
struct Turn(f64, usize);

impl Eq for Turn {}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Turn {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

/// Splits the lost lanes over the survivors, who come in order, those with the least work first, in contiguous pieces. No
/// more of them are looked at than there are lanes.
pub fn reassign(
    lost: &[Lane],
    survivors: impl IntoIterator<Item = SessionId>,
) -> BTreeMap<SessionId, Vec<Lane>> {
    let takers: Vec<SessionId> = survivors.into_iter().take(lost.len()).collect();
    let count = takers.len();
    let piece = |i: usize| lost[lost.len() * i / count..lost.len() * (i + 1) / count].to_vec();
    takers
        .into_iter()
        .enumerate()
        .map(|(i, session)| (session, piece(i)))
        .collect()
}

/// Joins a sorted list of lanes into contiguous ranges.
pub fn ranges(lanes: &[Lane]) -> Vec<Range<Lane>> {
    let mut out: Vec<Range<Lane>> = Vec::new();
    for &lane in lanes {
        match out.last_mut() {
            Some(last) if last.end == lane => last.end += 1,
            _ => out.push(lane..lane + 1),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_lane_is_assigned_once(
            lanes in 1u32..300,
            times in proptest::collection::vec(proptest::option::of(1.0f64..1e9), 1..40),
        ) {
            let workers: Vec<_> = (0..).map(SessionId).zip(times).collect();
            let all: Vec<Lane> = assign(lanes, &workers).into_values().flatten().collect();
            prop_assert_eq!(all, (0..lanes).collect::<Vec<_>>());
        }

        #[test]
        fn equal_workers_get_equal_shares(lanes in 1u32..300, workers in 1u64..40, time: Option<bool>) {
            let time = time.map(|_| 3.5);
            let workers: Vec<_> = (0..workers).map(|i| (SessionId(i), time)).collect();
            let counts: Vec<usize> = assign(lanes, &workers).into_values().map(|r| r.len()).collect();
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{:?}", counts);
        }

        #[test]
        fn lost_lanes_are_reassigned_once(
            lost in proptest::collection::btree_set(0u32..100, 1..50),
            survivors in 1u64..12,
        ) {
            let lost: Vec<Lane> = lost.into_iter().collect();
            let mut all: Vec<Lane> = reassign(&lost, (0..survivors).map(SessionId)).into_values().flatten().collect();
            all.sort_unstable();
            prop_assert_eq!(all, lost);
        }
    }

    #[test]
    fn a_worker_that_is_three_times_as_fast_gets_three_times_as_much() {
        let workers = [(SessionId(1), Some(100.0)), (SessionId(2), Some(300.0))];
        let shares: Vec<Range<Lane>> = assign(8, &workers).into_values().collect();
        assert_eq!(shares, [0..6, 6..8]);
    }

    #[test]
    fn ranges_join_neighbours() {
        assert_eq!(ranges(&[0, 1, 4, 6, 7]), [0..2, 4..5, 6..8]);
    }
}
