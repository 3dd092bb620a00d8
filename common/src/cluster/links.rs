//! How fast the ways between workers are, and what slices follow from it.
//!
//! In a shared step a worker that owns the part f of a gradient of G bytes sends (1 − f) G to the other owners and f (M − 1) G
//! of roots to the M − 1 other workers: G (1 + (M − 2) f) in all, and receives as much. So the step takes
//! max G (1 + (M − 2) fᵢ) / bᵢ over the owners, with bᵢ the speed of a worker's line, and is shortest where those who own
//! anything are done at the same time T: fᵢ = max(0, (T bᵢ − 1) / (M − 2)), with Σ fᵢ = 1. Where there are two workers it does not
//! matter who owns what.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::cluster::coordinator::Machine;
use crate::ids::{RunId, SessionId};

/// A way from one worker to another, as measured when it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// There and back, in microseconds.
    pub rtt_micros: u64,
    /// Bytes a second, in this direction.
    pub bytes_per_second: u64,
}

/// A worker's line, as far as the ways that use it show. A way can be slow because of its other end, so the best tells most
/// of this one. A way within a host uses no line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// There and back to the nearest of the others, in microseconds.
    pub rtt_micros: Option<u64>,
    /// Bytes a second that went out at best.
    pub sends: u64,
    /// Bytes a second that came in at best.
    pub receives: u64,
}

impl Line {
    fn goes_out(&mut self, link: Link) {
        let nearest = self.rtt_micros.unwrap_or(u64::MAX).min(link.rtt_micros);
        self.rtt_micros = Some(nearest);
        self.sends = self.sends.max(link.bytes_per_second);
    }

    fn comes_in(&mut self, link: Link) {
        self.receives = self.receives.max(link.bytes_per_second);
    }

    /// Bytes a second in its slower direction, if both are known.
    pub fn speed(&self) -> Option<u64> {
        Some(self.sends.min(self.receives)).filter(|&speed| speed > 0)
    }
}

/// Speeds that differ by less are taken for equal: measurements do.
const ALIKE: f64 = 1.5;

/// Seconds that equal slices may take on the slowest line without anything being gained by others.
pub(super) const SHORT: f64 = 0.02;

impl Machine {
    /// A way was measured.
    pub(super) fn linked(&mut self, from: SessionId, run: &RunId, to: SessionId, link: Link) {
        if self.active_as(run).is_none() {
            return;
        }
        let host = |session| self.members.get(session).map(|m| &m.info.host);
        if host(&to) == host(&from) {
            return;
        }
        if let Some(other) = self.members.get_mut(&to) {
            other.line.comes_in(link);
            let member = self.members.get_mut(&from).expect("it spoke");
            member.line.goes_out(link);
            member.ways.insert(to, link);
            let active = self.active.as_mut().expect("checked");
            active.sites = None;
        }
    }

    /// Bytes a second that each of these workers has for itself, as far as that is known: those of one host share its line.
    pub(super) fn speeds(&self, owners: &[SessionId]) -> Vec<Option<u64>> {
        let active = self.active.as_ref().expect("a run is active");
        let host = |session: &SessionId| self.members[session].info.host.as_str();
        let mut on: BTreeMap<&str, u64> = BTreeMap::new();
        for session in &active.ready {
            *on.entry(host(session)).or_default() += 1;
        }
        let speed = |owner: &SessionId| {
            let speed = self.members[owner].line.speed()?;
            Some(speed / on[host(owner)])
        };
        owners.iter().map(speed).collect()
    }
}

/// A gradient that is to be cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Whole {
    /// How many workers it is summed of.
    pub workers: usize,
    /// In chunks.
    pub chunks: u32,
    /// As it is sent.
    pub bytes: u64,
}

/// Cuts a gradient into a slice for each owner, in the order of `speeds`, so that a step takes as little time as their lines
/// allow. Two of them at least have a chunk or more; of the others, those have none that would have less than half of one.
/// Owners whose line is not known make all slices equal, and so do lines that are fast enough.
///
/// # Panics
/// If there are more owners than chunks.
pub(super) fn slices(speeds: &[Option<u64>], whole: Whole) -> Vec<Range<u32>> {
    let count = speeds.len();
    let chunks = f64::from(whole.chunks);
    assert!(count as f64 <= chunks, "{count} owners of {chunks} chunks");
    let parts = parts(speeds, whole);
    let mut largest: Vec<usize> = (0..count).collect();
    largest.sort_by(|a, b| parts[*b].total_cmp(&parts[*a]));
    let owns =
        |owner: &usize| largest[..2.min(count)].contains(owner) || chunks * parts[*owner] >= 0.5;
    let owners: Vec<usize> = (0..count).filter(owns).collect();
    let free = chunks - owners.len() as f64;
    let sum: f64 = owners.iter().map(|owner| parts[*owner]).sum();
    let (mut before, mut had, mut start) = (0.0, 0, 0);
    let slice = |owner: usize| {
        if owners.contains(&owner) {
            before += parts[owner] / sum;
            had += 1;
        }
        let end = had + (free * before).round() as u32;
        std::mem::replace(&mut start, end)..end
    };
    (0..count).map(slice).collect()
}

/// Which part of a gradient each owner should have, by the speeds of their lines. Their sum is one.
pub(super) fn parts(speeds: &[Option<u64>], whole: Whole) -> Vec<f64> {
    let known: Option<Vec<f64>> = speeds.iter().map(|s| s.map(|s| s as f64)).collect();
    match known.filter(|speeds| matter(speeds, whole)) {
        Some(speeds) => fill(&speeds, whole.workers),
        None => vec![1.0 / speeds.len() as f64; speeds.len()],
    }
}

/// Whether lines of these speeds are different, and not all of them fast.
fn matter(speeds: &[f64], whole: Whole) -> bool {
    let owners = speeds.len() as f64;
    let least = speeds.iter().copied().fold(f64::INFINITY, f64::min);
    let equal = whole.bytes as f64 * (1.0 + (whole.workers as f64 - 2.0) / owners);
    whole.workers > 2 && differ(speeds) && equal / least >= SHORT
}

fn differ(speeds: &[f64]) -> bool {
    let most = speeds.iter().copied().fold(0.0, f64::max);
    let least = speeds.iter().copied().fold(f64::INFINITY, f64::min);
    least > 0.0 && most / least >= ALIKE
}

/// The parts fᵢ of the head of this file.
fn fill(speeds: &[f64], workers: usize) -> Vec<f64> {
    let others = (workers - 2) as f64;
    let mut fastest: Vec<f64> = speeds.to_vec();
    fastest.sort_by(|a, b| b.total_cmp(a));
    let mut time = f64::INFINITY;
    let mut sum = 0.0;
    for (owners, &speed) in (1u32..).zip(&fastest) {
        sum += speed;
        let all_done = (others + f64::from(owners)) / sum;
        if all_done * speed < 1.0 {
            break;
        }
        time = all_done;
    }
    let part = |speed: &f64| ((time * speed - 1.0) / others).max(0.0);
    speeds.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// So long that lines matter.
    fn whole(workers: usize, chunks: u32) -> Whole {
        Whole {
            workers,
            chunks,
            bytes: 1 << 50,
        }
    }

    fn lens(speeds: &[u64], workers: usize, chunks: u32) -> Vec<u32> {
        let speeds: Vec<_> = speeds.iter().copied().map(Some).collect();
        let slices = slices(&speeds, whole(workers, chunks));
        slices.iter().map(|slice| slice.len() as u32).collect()
    }

    /// Of a step, in units of a gradient over the fastest line's speed.
    fn time(speeds: &[u64], workers: usize, lens: &[u32], chunks: u32) -> f64 {
        let most = *speeds.iter().max().unwrap() as f64;
        let one = |(&speed, &len): (&u64, &u32)| {
            let part = f64::from(len) / f64::from(chunks);
            (1.0 + (workers - 2) as f64 * part) * most / speed as f64
        };
        speeds.iter().zip(lens).map(one).fold(0.0, f64::max)
    }

    #[test]
    fn equal_lines_and_unknown_ones_have_equal_slices() {
        assert_eq!(lens(&[100, 130, 90, 105], 4, 1000), [250; 4]);
        assert_eq!(lens(&[1000, 10], 2, 1000), [500; 2]);
        let unknown = slices(&[Some(1), None, Some(9)], whole(3, 9));
        assert_eq!(unknown, [0..3, 3..6, 6..9]);
        assert_eq!(slices(&[], whole(2, 9)), []);
    }

    #[test]
    fn lines_that_are_fast_enough_have_equal_slices() {
        let of = |bytes| {
            let whole = Whole {
                bytes,
                ..whole(3, 9)
            };
            slices(&[Some(9_000_000), Some(9_000_000), Some(1_000_000)], whole)
        };
        // In equal slices, 4/3 of it go over the slowest line.
        assert_eq!(of(14_000), [0..3, 3..6, 6..9]);
        assert_eq!(of(16_000), [0..5, 5..9, 9..9]);
    }

    #[test]
    fn slow_lines_own_little() {
        // T (100 + 100 + 50) = 1 + 3, so f is 0.6, 0.6, -0.2: the slow one owns nothing, and then T (100 + 100) = 1 + 2.
        assert_eq!(lens(&[100, 100, 50], 3, 1000), [500, 500, 0]);
        // T (400) = 2 + 4: f = (T b - 1) / 2.
        assert_eq!(lens(&[120, 120, 80, 80], 4, 1004), [401, 401, 101, 101]);
        // One would do it best alone, but that is the coordinator's part.
        assert_eq!(lens(&[10, 100, 10], 3, 100), [1, 99, 0]);
    }

    proptest! {
        #[test]
        fn slices_tile_the_gradient_and_never_take_longer_than_equal_ones(
            speeds in prop::collection::vec(1u64..10_000, 1..20),
            more in 0usize..5,
            chunks in 20u32..100_000,
        ) {
            let workers = (speeds.len() + more).max(2);
            let wrapped: Vec<_> = speeds.iter().copied().map(Some).collect();
            let cut = slices(&wrapped, whole(workers, chunks));
            prop_assert_eq!(cut.first().unwrap().start, 0);
            prop_assert_eq!(cut.last().unwrap().end, chunks);
            prop_assert!(cut.windows(2).all(|w| w[0].end == w[1].start));
            prop_assert!(cut.iter().filter(|slice| !slice.is_empty()).count() >= 2.min(speeds.len()));
            let found = lens(&speeds, workers, chunks);
            let equal = vec![chunks.div_ceil(speeds.len() as u32); speeds.len()];
            // Chunks are whole, and two have one.
            let slack = 2.0 * (workers * speeds.len()) as f64 / f64::from(chunks);
            let most = *speeds.iter().max().unwrap() as f64 / *speeds.iter().min().unwrap() as f64;
            prop_assert!(time(&speeds, workers, &found, chunks) <= time(&speeds, workers, &equal, chunks) * 1.000_001 + slack * most);
        }
    }
}
