//! Who owns what of a gradient, and whom a worker can reach.

use std::ops::Range;
use std::sync::Arc;

use cohort_proto::v1;

use super::{WireError, bad};
use crate::aggregate::ChunkDigest;
use crate::cluster::{Digests, Division, Keeper, Owners, Peer, Share, Shares, Site};
use crate::ids::SessionId;

pub(super) fn owners_to(owners: &Owners) -> v1::Owners {
    use v1::owners::Kind;
    let kind = match owners {
        Owners::Coordinator => Kind::Coordinator(v1::Empty {}),
        Owners::Alone => Kind::Alone(v1::Empty {}),
        Owners::Shares(shares) => Kind::Shares(v1::Shares {
            shares: shares_to(&shares.slices),
            sites: shares.sites.iter().map(site_to).collect(),
        }),
    };
    v1::Owners { kind: Some(kind) }
}

fn shares_to(shares: &[Share]) -> Vec<v1::Share> {
    let share = |share: &Share| v1::Share {
        session: share.session.0,
        first: share.chunks.start,
        below: share.chunks.end,
    };
    shares.iter().map(share).collect()
}

fn site_to(site: &Site) -> v1::Site {
    v1::Site {
        workers: site.workers.iter().map(|session| session.0).collect(),
        lanes: site.lanes.iter().map(lanes_to).collect(),
        gathers: shares_to(&site.gathers),
    }
}

fn lanes_to(lanes: &Range<u32>) -> v1::LaneRange {
    v1::LaneRange {
        first: lanes.start,
        below: lanes.end,
    }
}

pub(super) fn owners_from(owners: Option<v1::Owners>) -> Result<Owners, WireError> {
    use v1::owners::Kind;
    let kind = owners.and_then(|owners| owners.kind);
    match kind.ok_or_else(|| bad("Compute", "it names no owner"))? {
        Kind::Coordinator(_) => Ok(Owners::Coordinator),
        Kind::Alone(_) => Ok(Owners::Alone),
        Kind::Shares(shares) => {
            let slices = shares_from(shares.shares)?;
            let sites: Result<Vec<Site>, WireError> = shares
                .sites
                .into_iter()
                .map(|site| site_from(site, &slices))
                .collect();
            let sites = sites?.into();
            Ok(Owners::Shares(Shares { slices, sites }))
        }
    }
}

/// A site gathers as much as there is, and whoever gathers what it owns.
fn site_from(site: v1::Site, slices: &[Share]) -> Result<Site, WireError> {
    let lanes: Vec<Range<u32>> = site.lanes.iter().map(|l| l.first..l.below).collect();
    let ordered = lanes.windows(2).all(|pair| pair[0].end < pair[1].start);
    if !ordered || lanes.iter().any(Range::is_empty) {
        return Err(bad("Site", format!("the lanes {lanes:?} are in disorder")));
    }
    let gathers = shares_from(site.gathers)?.to_vec();
    if gathers.last().map(|g| g.chunks.end) != slices.last().map(|s| s.chunks.end) {
        return Err(bad("Site", "it does not gather the whole gradient"));
    }
    for Share { session, chunks } in &gathers {
        let within = |s: &Share| chunks.start <= s.chunks.start && s.chunks.end <= chunks.end;
        let owns = slices.iter().find(|slice| slice.session == *session);
        if !owns.is_some_and(within) {
            let problem = format!("worker {session} gathers {chunks:?}, but not what it owns");
            return Err(bad("Site", problem));
        }
    }
    Ok(Site {
        workers: site.workers.into_iter().map(SessionId).collect(),
        lanes,
        gathers,
    })
}

/// Slices follow each other without a gap, from the first chunk on.
fn shares_from(shares: Vec<v1::Share>) -> Result<Arc<[Share]>, WireError> {
    let mut next = 0;
    for share in &shares {
        if share.first != next || share.below <= share.first {
            let (first, below) = (share.first, share.below);
            let problem = format!("a slice of the chunks {first}..{below}, where {next}.. is due");
            return Err(bad("Shares", problem));
        }
        next = share.below;
    }
    if shares.is_empty() {
        return Err(bad("Shares", "no slice"));
    }
    let share = |share: v1::Share| Share {
        session: SessionId(share.session),
        chunks: share.first..share.below,
    };
    Ok(shares.into_iter().map(share).collect())
}

pub(super) fn keeper_to(keeper: &Keeper) -> v1::Keeper {
    v1::Keeper {
        division: shares_to(keeper.division.shares()),
        session: keeper.session.0,
    }
}

pub(super) fn keeper_from(keeper: v1::Keeper) -> Result<Keeper, WireError> {
    let shares = shares_from(keeper.division)?;
    if shares.len() < 2 {
        return Err(bad("Keeper", "one slice is no division"));
    }
    Ok(Keeper {
        division: Division::of(shares),
        session: SessionId(keeper.session),
    })
}

pub(super) fn slice_to(slice: &Range<u32>) -> v1::Slice {
    v1::Slice {
        first: slice.start,
        below: slice.end,
    }
}

pub(super) fn slice_from(slice: v1::Slice) -> Result<Range<u32>, WireError> {
    match slice.first < slice.below {
        true => Ok(slice.first..slice.below),
        false => {
            let problem = format!("the chunks {}..{} are none", slice.first, slice.below);
            Err(bad("Slice", problem))
        }
    }
}

pub(super) fn kept_from(digested: &v1::Digested) -> Result<Digests, WireError> {
    let (kept, rest) = digested.kept.as_chunks::<32>();
    let params = digested.params.as_ref().try_into();
    match (params, rest.is_empty()) {
        (Ok(params), true) => Ok(Digests {
            params,
            kept: kept.to_vec(),
        }),
        _ => {
            let (params, kept) = (digested.params.len(), digested.kept.len());
            let problem = format!("{params} and {kept} bytes of digests of 32 each");
            Err(bad("Digested", problem))
        }
    }
}

pub(super) fn peer_to(peer: &Peer) -> v1::Peer {
    v1::Peer {
        session: peer.session.0,
        address: peer.address.clone().unwrap_or_default(),
    }
}

pub(super) fn peer_from(peer: v1::Peer) -> Peer {
    Peer {
        session: SessionId(peer.session),
        address: Some(peer.address).filter(|address| !address.is_empty()),
    }
}

pub(super) fn digests_from(slice: &v1::SliceReady) -> Result<Vec<ChunkDigest>, WireError> {
    let (hashes, rest) = slice.hashes.as_chunks::<32>();
    if !rest.is_empty() || hashes.len() != slice.sums_of_squares.len() {
        let (sums, bytes) = (slice.sums_of_squares.len(), slice.hashes.len());
        let problem = format!("{sums} sums of squares, but {bytes} bytes of hashes of 32 each");
        return Err(bad("SliceReady", problem));
    }
    let digests = hashes.iter().zip(&slice.sums_of_squares);
    let digest = |(hash, sum): (&[u8; 32], &f64)| ChunkDigest {
        sum_of_squares: *sum,
        hash: *hash,
    };
    Ok(digests.map(digest).collect())
}
