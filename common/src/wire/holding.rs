//! What a worker holds, and what shows that it does.

use std::sync::Arc;

use bytes::Bytes;
use cohort_proto::v1;

use super::sharing::{keeper_from, keeper_to};
use super::{WireError, bad, hash_from, run_id};
use crate::cluster::Holding;
use crate::cluster::messages::Proof;
use crate::ledger::Entry;

/// What a worker still holds, on the wire.
pub fn holding_to(holding: Holding) -> v1::Holding {
    let (entry, brief) = proof_to(&holding.proof);
    v1::Holding {
        run: holding.run.as_str().into(),
        entry,
        brief,
        lanes: holding.lanes,
        earlier: holding.earlier.iter().map(|e| e.encode().into()).collect(),
        keeper: holding.keeper.as_ref().map(keeper_to),
    }
}

/// What a worker still holds, from the wire.
pub fn holding_from(holding: v1::Holding) -> Result<Holding, WireError> {
    let earlier = holding.earlier.iter();
    let earlier = earlier.map(|entry| entry_from("Holding", entry));
    Ok(Holding {
        run: run_id(&holding.run)?,
        proof: proof_from("Holding", &holding.entry, holding.brief)?,
        earlier: earlier.collect::<Result<_, _>>()?,
        lanes: holding.lanes,
        keeper: holding.keeper.map(keeper_from).transpose()?,
    })
}

/// The entry, or what stands for it.
pub(super) fn proof_to(proof: &Proof) -> (Bytes, Option<v1::Brief>) {
    if let Some(entry) = &proof.entry {
        return (entry.encode().into(), None);
    }
    let brief = v1::Brief {
        step: proof.step,
        hash: proof.hash.to_vec().into(),
        learning_rate: proof.learning_rate,
        skipped: proof.skipped,
    };
    (Bytes::new(), Some(brief))
}

fn entry_from(message: &'static str, entry: &[u8]) -> Result<Arc<Entry>, WireError> {
    let entry = Entry::decode(entry);
    let entry = entry.ok_or_else(|| bad(message, "its entry is no ledger entry"))?;
    Ok(Arc::new(entry))
}

pub(super) fn proof_from(
    message: &'static str,
    entry: &[u8],
    brief: Option<v1::Brief>,
) -> Result<Proof, WireError> {
    let Some(brief) = brief else {
        let entry = entry_from(message, entry)?;
        return Ok(Proof {
            entry: Some(entry.clone()),
            ..Proof::of(&entry)
        });
    };
    if !entry.is_empty() {
        return Err(bad(message, "it has an entry and what stands for one"));
    }
    Ok(Proof {
        step: brief.step,
        hash: hash_from(message, &brief.hash)?
            .ok_or_else(|| bad(message, "its brief has no hash"))?,
        learning_rate: brief.learning_rate,
        skipped: brief.skipped,
        entry: None,
    })
}
