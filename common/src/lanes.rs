//! Who computes which lanes. A fresh assignment gives each worker one contiguous range, so that most of the tree is
//! summed where the lanes are; lanes that are lost in mid-step go to the survivors in contiguous pieces.

use std::collections::BTreeMap;
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
    for _ in 0..lanes {
        let end = |i: &usize| f64::from(counts[*i] + 1) * times[*i];
        let best = (0..workers.len()).min_by(|a, b| end(a).total_cmp(&end(b)));
        counts[best.expect("there are workers")] += 1;
    }
    let mut first = 0;
    let range = |((session, _), count): (&(SessionId, Option<f64>), u32)| {
        let range = first..first + count;
        first = range.end;
        (*session, range)
    };
    workers.iter().zip(counts).map(range).collect()
}

/// Splits the lost lanes over the survivors, those with the least work first, in contiguous pieces.
///
/// `loads` holds each survivor and the lanes it still has to deliver.
pub fn reassign(lost: &[Lane], loads: &[(SessionId, usize)]) -> BTreeMap<SessionId, Vec<Lane>> {
    let mut order = loads.to_vec();
    order.sort_by_key(|&(session, load)| (load, session));
    let mut out = BTreeMap::new();
    let takers = order.len().min(lost.len());
    for (i, (session, _)) in order.into_iter().take(takers).enumerate() {
        let piece = &lost[lost.len() * i / takers..lost.len() * (i + 1) / takers];
        out.insert(session, piece.to_vec());
    }
    out
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
            loads in proptest::collection::vec(0usize..9, 1..12),
        ) {
            let lost: Vec<Lane> = lost.into_iter().collect();
            let loads: Vec<_> = loads.into_iter().enumerate().map(|(i, l)| (SessionId(i as u64), l)).collect();
            let mut all: Vec<Lane> = reassign(&lost, &loads).into_values().flatten().collect();
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
