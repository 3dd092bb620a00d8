//! Who computes which lanes. A fresh assignment gives each worker one contiguous range, so that most of the tree is
//! summed where the lanes are; lanes that are lost in mid-step go to the survivors in contiguous pieces.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::ids::{Lane, SessionId};

/// Splits all lanes over the workers, in the order given: contiguous, sizes differing by at most one.
/// Workers beyond the number of lanes get an empty range.
pub fn assign(lanes: u32, workers: &[SessionId]) -> BTreeMap<SessionId, Range<Lane>> {
    let n = workers.len() as u64;
    let edge = |i: u64| (u64::from(lanes) * i / n) as Lane;
    workers
        .iter()
        .zip(0u64..)
        .map(|(&worker, i)| (worker, edge(i)..edge(i + 1)))
        .collect()
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
        fn every_lane_is_assigned_once(lanes in 1u32..300, workers in 1u64..40) {
            let ids: Vec<_> = (0..workers).map(SessionId).collect();
            let all: Vec<Lane> = assign(lanes, &ids).into_values().flatten().collect();
            prop_assert_eq!(all, (0..lanes).collect::<Vec<_>>());
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
    fn ranges_join_neighbours() {
        assert_eq!(ranges(&[0, 1, 4, 6, 7]), [0..2, 4..5, 6..8]);
    }
}
