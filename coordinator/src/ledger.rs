//! A run's ledger as lines of JSON: for clients, and for the checkpoints that carry it.

use cohort_common::home::RunName;
use tonic::Status;

use crate::driver::Cluster;
use crate::status::{failed, invalid};
use crate::store::{Store, StoreError};

/// Entries that are read at once.
const PAGE: u32 = 512;

/// The ledger up to a step.
pub struct Written {
    /// Hash of the last entry.
    pub head: [u8; 32],
    /// The entries, one a line.
    pub lines: Vec<u8>,
}

/// Hands each entry of a run to `take`, as a line of JSON without a line break, for as long as it wants more.
pub fn read(
    store: &Store,
    run: &RunName,
    mut take: impl FnMut(String) -> bool,
) -> Result<(), StoreError> {
    store.run(run)?;
    let mut next = 1;
    loop {
        let page = store.entries(run, next, PAGE)?;
        for entry in &page {
            next = entry.step.saturating_add(1);
            if !take(entry.to_json_line()) {
                return Ok(());
            }
        }
        if page.len() < PAGE as usize {
            return Ok(());
        }
    }
}

/// The ledger of a run up to the entry of `step`, which must be there. Read in pages, between which the store's thread
/// has time for steps.
pub async fn through(cluster: &Cluster, run: &RunName, step: u64) -> Result<Written, Status> {
    let mut lines = Vec::new();
    let mut next = 1;
    let mut last = None;
    while next <= step {
        let wanted = run.clone();
        let limit = u64::from(PAGE).min(step - next + 1) as u32;
        let page = cluster.store().call(move |store| {
            let entries = store.entries(&wanted, next, limit)?;
            let lines = entries.iter().map(|e| e.to_json_line() + "\n");
            Ok((lines.collect::<String>(), entries.into_iter().next_back()))
        });
        let (text, end) = page.await.map_err(failed)?;
        let Some(end) = end.filter(|e| e.step <= step) else {
            break;
        };
        lines.extend_from_slice(text.as_bytes());
        next = end.step + 1;
        last = Some(end);
    }
    match last {
        Some(entry) if entry.step == step => Ok(Written {
            head: entry.hash(),
            lines,
        }),
        _ => Err(invalid(format!("step {step} is not committed"))),
    }
}
