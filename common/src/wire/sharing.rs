//! Who owns what of a gradient, and whom a worker can reach.

use cohort_proto::v1;

use super::{WireError, bad};
use crate::aggregate::ChunkDigest;
use crate::cluster::{Owners, Peer, Share};
use crate::ids::SessionId;

pub(super) fn owners_to(owners: &Owners) -> v1::Owners {
    use v1::owners::Kind;
    let share = |share: &Share| v1::Share {
        session: share.session.0,
        first: share.chunks.start,
        below: share.chunks.end,
    };
    let kind = match owners {
        Owners::Coordinator => Kind::Coordinator(v1::Empty {}),
        Owners::Alone => Kind::Alone(v1::Empty {}),
        Owners::Shares(shares) => Kind::Shares(v1::Shares {
            shares: shares.iter().map(share).collect(),
        }),
    };
    v1::Owners { kind: Some(kind) }
}

/// Slices follow each other without a gap, from the first chunk on.
pub(super) fn owners_from(owners: Option<v1::Owners>) -> Result<Owners, WireError> {
    use v1::owners::Kind;
    let kind = owners.and_then(|owners| owners.kind);
    let shares = match kind.ok_or_else(|| bad("Compute", "it names no owner"))? {
        Kind::Coordinator(_) => return Ok(Owners::Coordinator),
        Kind::Alone(_) => return Ok(Owners::Alone),
        Kind::Shares(shares) => shares.shares,
    };
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
    Ok(Owners::Shares(shares.into_iter().map(share).collect()))
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
