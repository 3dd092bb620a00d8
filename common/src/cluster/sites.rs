//! Workers that are near each other, and what they add up before it goes a long way: a reduction in two levels, along the one
//! tree that a run has.
//!
//! Where the workers of a shared step are in several **sites**, each of them pushes what it has computed only to workers of its own
//! site. Those of a site that own a slice **gather** a range of chunks each: they sum the nodes of the tree that the site's lanes
//! make up, and push these to the chunks' owners, who complete the tree as ever. A root goes to the one worker of every
//! other site that gathers its chunk, who hands it on. So of m workers in each of H sites, which own a part f of a gradient of G bytes
//! together, no more than G (1 + (H − 2) f) leaves a site, instead of m times as much; and as many bytes come in.
//! No sum is another one than before.
//!
//! Workers are near if they are on one host, or if the way between their hosts is much faster than the slowest way there is; or they say
//! themselves which site they are of.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::aggregate::Duty;
use crate::cluster::coordinator::Machine;
use crate::cluster::hands::Hands;
use crate::cluster::links::{self, Link, SHORT, Whole};
use crate::cluster::messages::{Share, Shares, Site};
use crate::ids::{Lane, SessionId};
use crate::lanes;
use crate::tree::{Node, Tree};

/// A way is short if it takes this share of the time of the slowest.
const NEAR: f64 = 0.25;

/// Workers of a site that people are told by name, at most.
const MOST_NAMED: usize = 8;

/// Bytes whose time on a way, there and back included, says how long it is: a few chunks.
const YARDSTICK: f64 = (1 << 20) as f64;

impl Shares {
    /// To whom chunks of a node go: to the owners, or to those who gather them in the site whose lanes they are.
    pub fn takers(&self, node: Node) -> &[Share] {
        let within = |lanes: &Range<Lane>| lanes.start <= node.first && node.end() <= lanes.end;
        let site = self.sites.iter().find(|s| s.lanes.iter().any(within));
        site.map_or(&self.slices, |site| &site.gathers)
    }

    /// Who owns a chunk.
    pub fn owner(&self, index: usize) -> Option<SessionId> {
        let owns = |share: &&Share| share.range().contains(&index);
        Some(self.slices.iter().find(owns)?.session)
    }

    /// What a worker has to sum, if it is one of those who do: its slice, and what it gathers.
    pub fn duty(&self, session: SessionId, tree: Tree) -> Option<Duty> {
        let slice = self.slices.iter().find(|s| s.session == session)?.range();
        let Some((site, gathers)) = self.gathers_of(session) else {
            return Some(slice.into());
        };
        Some(Duty {
            chunks: gathers.range(),
            owned: slice,
            passes: site.nodes(tree),
        })
    }

    /// Of which chunks workers of other sites get the roots from this one. Everybody else gets all that it has.
    pub fn far(&self, session: SessionId) -> BTreeMap<SessionId, Range<usize>> {
        let slice = self.slices.iter().find(|s| s.session == session);
        let Some(slice) = slice.map(Share::range) else {
            return BTreeMap::new();
        };
        let others = self.sites.iter().filter(|s| !s.workers.contains(&session));
        let of = |site: &Site, worker: SessionId| {
            let gathers = site.gathers.iter().find(|share| share.session == worker);
            let gathers = gathers.map_or(0..0, Share::range);
            let first = gathers.start.max(slice.start);
            first..gathers.end.min(slice.end).max(first)
        };
        let parts = others.flat_map(|site| {
            let workers = site.workers.iter();
            workers.map(move |worker| (*worker, of(site, *worker)))
        });
        parts.collect()
    }

    /// What is to be said of it to people, if anything is.
    pub(super) fn how_cut(&self, chunks: u32) -> String {
        if !self.sites.is_empty() {
            let workers = |site: &Site| {
                let all: Vec<_> = site.workers.iter().map(SessionId::to_string).collect();
                match all.len() > MOST_NAMED {
                    true => format!("{} workers", all.len()),
                    false => all.join(" "),
                }
            };
            let sites: Vec<String> = self.sites.iter().map(workers).collect();
            return format!(
                "; they are in {} sites ({}), and what goes from one to another is added up first",
                sites.len(),
                sites.join(", ")
            );
        }
        let lens = || self.slices.iter().map(|share| share.chunks.len());
        match lens().min().zip(lens().max()) {
            Some((least, most)) if most - least > 1 => {
                let percent = |len: usize| 100 * len / chunks.max(1) as usize;
                let (least, most) = (percent(least), percent(most));
                format!(", as their lines allow: {least} to {most} % of it")
            }
            _ => String::new(),
        }
    }

    fn gathers_of(&self, session: SessionId) -> Option<(&Site, &Share)> {
        let found = |site: &Site| site.gathers.iter().position(|s| s.session == session);
        let mut sites = self.sites.iter();
        sites.find_map(|site| Some((site, &site.gathers[found(site)?])))
    }
}

impl Site {
    /// The largest nodes that its lanes make up.
    fn nodes(&self, tree: Tree) -> Vec<Node> {
        let ranges = self.lanes.iter().cloned();
        ranges.flat_map(|lanes| tree.cover(lanes)).collect()
    }
}

impl Machine {
    /// Finds out which of the ready workers are near each other, if that is not known.
    pub(super) fn find_sites(&mut self) {
        let active = self.active.as_ref().expect("a run is at a boundary");
        let apart = !active.introduced.is_empty() && active.division.is_none();
        let sites = match apart {
            true if active.sites.is_some() => return,
            true => self.near_each_other(&active.ready),
            false => vec![active.ready.iter().copied().collect()],
        };
        let active = self.active.as_mut().expect("a run is at a boundary");
        active.sites = Some(sites);
    }

    /// Of each site the workers. There is one site where nothing is said of any, and no way is slow.
    fn near_each_other(&self, ready: &BTreeSet<SessionId>) -> Vec<Vec<SessionId>> {
        let info = |session: &SessionId| &self.members[session].info;
        let named = ready.iter().any(|session| info(session).site.is_some());
        let mut places: BTreeMap<&str, Vec<SessionId>> = BTreeMap::new();
        for session in ready {
            let site = info(session).site.as_ref().filter(|_| named);
            let place = site.unwrap_or(&info(session).host);
            places.entry(place).or_default().push(*session);
        }
        let places: Vec<Vec<SessionId>> = places.into_values().collect();
        if named {
            return places;
        }
        let mut ways: BTreeMap<(usize, usize), Link> = BTreeMap::new();
        for (a, b, link) in self.ways_between(&places) {
            let best = ways.entry((a.min(b), a.max(b))).or_insert(link);
            if length(link, YARDSTICK) < length(*best, YARDSTICK) {
                *best = link;
            }
        }
        let active = self.active.as_ref().expect("a run is active");
        let bytes = active.plan.gradient_bytes() as f64;
        let takes = |link: &Link| length(*link, bytes);
        if ways.values().map(takes).fold(0.0, f64::max) < SHORT {
            return vec![ready.iter().copied().collect()];
        }
        let mut sites: BTreeMap<usize, Vec<SessionId>> = BTreeMap::new();
        for (group, workers) in groups(places.len(), &ways).into_iter().zip(places) {
            sites.entry(group).or_default().extend(workers);
        }
        sites.into_values().collect()
    }

    /// The measured ways from one of these groups of workers to another.
    fn ways_between(&self, groups: &[Vec<SessionId>]) -> Vec<(usize, usize, Link)> {
        let numbered = (0..).zip(groups);
        let each = numbered.flat_map(|(n, workers)| workers.iter().map(move |w| (*w, n)));
        let group_of: BTreeMap<SessionId, usize> = each.collect();
        let mut ways = Vec::new();
        for (from, &a) in &group_of {
            let links = self.members[from].ways.iter();
            let to = links.filter_map(|(to, link)| Some((a, *group_of.get(to)?, *link)));
            ways.extend(to.filter(|(a, b, _)| a != b));
        }
        ways
    }

    /// The ready workers, those of a site one after the other, so that the lanes of a site are neighbours.
    pub(super) fn by_site(&self) -> Vec<SessionId> {
        let active = self.active.as_ref().expect("a run is at a boundary");
        let sites = active.sites.as_ref().expect("they were found");
        sites.iter().flatten().copied().collect()
    }

    /// Who owns and who gathers what, where that is worth the detour: several sites, one of them of more than one worker,
    /// and somebody in each who can own a slice.
    pub(super) fn two_levels(&self, owners: &[SessionId], hands: &Hands) -> Option<Shares> {
        let active = self.active.as_ref().expect("a run is at a boundary");
        let sites = active.sites.as_ref().expect("they were found");
        let chunks = active.plan.chunks;
        let several = sites.len() > 1 && sites.iter().any(|site| site.len() > 1);
        if !several || owners.len() > chunks as usize {
            return None;
        }
        let owns = |session: &&SessionId| owners.binary_search(session).is_ok();
        let gatherers: Vec<Vec<SessionId>> = sites
            .iter()
            .map(|site| site.iter().filter(owns).copied().collect())
            .collect();
        if gatherers.iter().any(Vec::is_empty) {
            return None;
        }
        let parts = match sites.len() {
            // Who owns how much makes no difference to the lines: everybody sums as much.
            2 => {
                let count = |site: &Vec<SessionId>| site.len() as f64 / owners.len() as f64;
                gatherers.iter().map(count).collect()
            }
            workers => {
                let whole = Whole {
                    workers,
                    chunks,
                    bytes: active.plan.gradient_bytes(),
                };
                links::parts(&self.speeds_of_sites(sites), whole)
            }
        };
        let (slices, gathers) = lay_out(&gatherers, &parts, chunks);
        let site = |(workers, gathers): (&Vec<SessionId>, Vec<Share>)| {
            let of = workers.iter().flat_map(|session| hands.all_of(*session));
            let mut pieces: Vec<Lane> = of.collect();
            pieces.sort_unstable();
            Site {
                workers: workers.clone(),
                lanes: lanes::ranges(&pieces),
                gathers,
            }
        };
        Some(Shares {
            slices: slices.into(),
            sites: sites.iter().zip(gathers).map(site).collect(),
        })
    }

    /// Bytes a second between each site and the others, as far as that is known.
    fn speeds_of_sites(&self, sites: &[Vec<SessionId>]) -> Vec<Option<u64>> {
        let (mut sends, mut receives) = (vec![0; sites.len()], vec![0; sites.len()]);
        for (a, b, link) in self.ways_between(sites) {
            sends[a] = link.bytes_per_second.max(sends[a]);
            receives[b] = link.bytes_per_second.max(receives[b]);
        }
        let speed = |(sends, receives): (u64, u64)| Some(sends.min(receives)).filter(|s| *s > 0);
        sends.into_iter().zip(receives).map(speed).collect()
    }
}

/// Seconds that so many bytes take on a way.
fn length(link: Link, bytes: f64) -> f64 {
    link.rtt_micros as f64 / 1e6 + bytes / (link.bytes_per_second.max(1)) as f64
}

/// Puts places together between which the way is short, or between which there are others that are near each other in turn. Each
/// gets the number of its group, which is that of one of them.
fn groups(places: usize, ways: &BTreeMap<(usize, usize), Link>) -> Vec<usize> {
    let length = |link: &Link| length(*link, YARDSTICK);
    let far = ways.values().map(length).fold(0.0, f64::max);
    let mut group: Vec<usize> = (0..places).collect();
    for ((a, b), link) in ways {
        let (a, b) = (group[*a], group[*b]);
        if length(link) <= far * NEAR {
            group
                .iter_mut()
                .filter(|g| **g == b)
                .for_each(|group| *group = a);
        }
    }
    group
}

/// Cuts a gradient into a slice for each of the workers of all sites, a part of it for each site, and into ranges that the workers
/// of each site gather. Slices are laid so that each lies within what its owner gathers, and that these are of nearly equal
/// length. Both come in index order.
///
/// # Panics
/// If there are more workers than chunks, or a site without any.
fn lay_out(sites: &[Vec<SessionId>], parts: &[f64], chunks: u32) -> (Vec<Share>, Vec<Vec<Share>>) {
    let mut places: Vec<(f64, usize, usize)> = Vec::new();
    for (site, workers) in sites.iter().enumerate() {
        let count = workers.len() as f64;
        places.extend((0..workers.len()).map(|i| ((i as f64 + 0.5) / count, site, i)));
    }
    assert!(places.len() <= chunks as usize, "too few chunks");
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    let free = f64::from(chunks) - places.len() as f64;
    let sum: f64 = parts.iter().sum();
    let (mut before, mut start) = (0.0, 0);
    let mut slices = Vec::new();
    for (had, &(_, site, worker)) in (1u32..).zip(&places) {
        before += parts[site] / sum / sites[site].len() as f64;
        let end = match had as usize == places.len() {
            true => chunks,
            false => had + (free * before).round() as u32,
        };
        let session = sites[site][worker];
        slices.push(Share {
            session,
            chunks: std::mem::replace(&mut start, end)..end,
        });
    }
    let gathers = |workers: &Vec<SessionId>| {
        let own = |session: &SessionId| {
            let of = slices.iter().find(|s: &&Share| s.session == *session);
            of.expect("each has one").chunks.clone()
        };
        let count = workers.len() as u32;
        let mut start = 0;
        let share = |(i, session): (u32, &SessionId)| {
            let end = match workers.get(i as usize + 1) {
                None => chunks,
                Some(next) => {
                    let middle = u64::from(chunks) * u64::from(i + 1) / u64::from(count);
                    (middle as u32).clamp(own(session).end, own(next).start)
                }
            };
            Share {
                session: *session,
                chunks: std::mem::replace(&mut start, end)..end,
            }
        };
        (0..).zip(workers).map(share).collect()
    };
    let gathers = sites.iter().map(gathers).collect();
    (slices, gathers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(rtt_micros: u64, bytes_per_second: u64) -> Link {
        Link {
            rtt_micros,
            bytes_per_second,
        }
    }

    #[test]
    fn hosts_are_near_each_other_by_the_slowest_way_there_is() {
        let (short, long) = (link(300, 1 << 30), link(50_000, 12_500_000));
        let ways = |ways: &[(usize, usize, Link)]| -> BTreeMap<(usize, usize), Link> {
            ways.iter().map(|&(a, b, link)| ((a, b), link)).collect()
        };
        // Two offices.
        let offices = ways(&[
            (0, 1, short),
            (2, 3, short),
            (0, 2, long),
            (0, 3, long),
            (1, 2, long),
            (1, 3, long),
        ]);
        assert_eq!(groups(4, &offices), [0, 0, 2, 2]);
        // One network, whose ways were measured as they are: not quite alike.
        let alike = ways(&[(0, 1, short), (1, 2, link(500, 1 << 29))]);
        assert_eq!(groups(3, &alike), [0, 1, 2]);
        // The same bandwidth, but one of them is far away; and the same distance, but one has a slow line.
        for slow in [link(80_000, 1 << 30), link(300, 1 << 20)] {
            let ways = ways(&[(0, 1, short), (0, 2, slow), (1, 2, slow)]);
            assert_eq!(groups(3, &ways), [0, 0, 2]);
        }
        // Nothing is known of any.
        assert_eq!(groups(2, &ways(&[])), [0, 1]);
    }

    /// Sites with so many workers, each of which owns a part. A worker's number has its site in the hundreds.
    fn shares(workers: &[usize], parts: &[f64], chunks: u32) -> Shares {
        let session = |site: usize, i: usize| SessionId((100 * site + i) as u64);
        let sites: Vec<Vec<SessionId>> = workers
            .iter()
            .enumerate()
            .map(|(site, count)| (0..*count).map(|i| session(site, i)).collect())
            .collect();
        let (slices, gathers) = lay_out(&sites, parts, chunks);
        let site = |(i, (workers, gathers)): (u32, (Vec<SessionId>, Vec<Share>))| Site {
            workers,
            lanes: lanes::ranges(&Vec::from_iter(4 * i..4 * i + 4)),
            gathers,
        };
        Shares {
            slices: slices.into(),
            sites: (0..)
                .zip(sites.into_iter().zip(gathers))
                .map(site)
                .collect(),
        }
    }

    fn tiles(shares: &[Share], chunks: u32) -> bool {
        let follows = |w: &[Share]| w[0].chunks.end == w[1].chunks.start;
        shares[0].chunks.start == 0
            && shares.iter().all(|share| !share.chunks.is_empty())
            && shares.windows(2).all(follows)
            && shares.last().unwrap().chunks.end == chunks
    }

    #[test]
    fn two_sites_of_two_gather_halves_and_own_quarters() {
        let shares = shares(&[2, 2], &[0.5, 0.5], 100);
        let ranges = |shares: &[Share]| -> Vec<(u64, Range<u32>)> {
            let range = |share: &Share| (share.session.0, share.chunks.clone());
            shares.iter().map(range).collect()
        };
        let slices = ranges(&shares.slices);
        assert_eq!(
            slices,
            [(0, 0..25), (100, 25..50), (1, 50..75), (101, 75..100)]
        );
        assert_eq!(ranges(&shares.sites[0].gathers), [(0, 0..50), (1, 50..100)]);
        let node = |first, size| Node { first, size };
        let takers = |of| ranges(shares.takers(of))[0].0;
        assert_eq!([takers(node(0, 4)), takers(node(5, 1))], [0, 100]);
        // What is of two sites goes to the owners.
        assert_eq!(ranges(shares.takers(node(0, 8))), slices);
        let duty = shares.duty(SessionId(101), Tree::new(8)).unwrap();
        let expected = Duty {
            chunks: 50..100,
            owned: 75..100,
            passes: vec![node(4, 4)],
        };
        assert_eq!(duty, expected);
        assert_eq!(shares.duty(SessionId(7), Tree::new(8)), None);
        assert_eq!(shares.owner(75), Some(SessionId(101)));
        assert_eq!(shares.owner(100), None);
        // Half a gradient of sums that go out of a site, and half a gradient of roots.
        let far = shares.far(SessionId(101));
        let expected = [(SessionId(0), 75..75), (SessionId(1), 75..100)];
        assert!(far.into_iter().eq(expected));
    }

    proptest! {
        #[test]
        fn each_root_comes_to_each_worker_once_and_crosses_each_line_once(
            workers in prop::collection::vec(1usize..5, 2..5),
            parts in prop::collection::vec(0.0f64..1.0, 4),
            chunks in 20u32..3000,
        ) {
            let shares = shares(&workers, &parts[..workers.len()], chunks);
            prop_assert!(tiles(&shares.slices, chunks));
            let tree = Tree::new(4 * workers.len() as u32);
            // Where the sites' numbers say how often each chunk's root came.
            let mut came: BTreeMap<SessionId, Vec<u32>> = BTreeMap::new();
            let mut count = |session: SessionId, chunks_of: Range<usize>| {
                let all = came.entry(session).or_insert_with(|| vec![0; chunks as usize]);
                all[chunks_of].iter_mut().for_each(|n| *n += 1);
            };
            for site in shares.sites.iter() {
                prop_assert!(tiles(&site.gathers, chunks));
                let (mut sums, mut roots, mut owned) = (0, 0, 0);
                for &session in &site.workers {
                    let duty = shares.duty(session, tree).unwrap();
                    prop_assert!(duty.chunks.start <= duty.owned.start && duty.owned.end <= duty.chunks.end);
                    owned += duty.owned.len();
                    sums += (duty.chunks.len() - duty.owned.len()) * duty.passes.len();
                    for (to, part) in shares.far(session) {
                        roots += part.len();
                        count(to, part);
                    }
                    // And those near it, and itself, get all that it has.
                    for &near in &site.workers {
                        match near == session {
                            true => count(near, duty.owned.clone()),
                            false => count(near, duty.chunks.clone()),
                        }
                    }
                }
                prop_assert_eq!(sums, chunks as usize - owned);
                prop_assert_eq!(roots, (workers.len() - 1) * owned);
            }
            prop_assert!(came.values().flatten().all(|n| *n == 1));
            prop_assert_eq!(came.len(), workers.iter().sum::<usize>());
        }
    }
}
