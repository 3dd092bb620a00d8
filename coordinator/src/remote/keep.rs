//! What the store does not keep: checkpoints that their run does not keep either, then contents that no checkpoint of the run
//! refers to; and all that is of a run or a corpus that a person deletes.
//!
//! Manifests go first, so that none is ever there without its contents. One task copies and deletes, and only the owner of a
//! run does either, so no content goes that a copy under way refers to.

use std::collections::{BTreeMap, BTreeSet};

use cohort_common::home::RunName;
use tracing::info;

use super::layout::{self, StoredCheckpoint};
use super::restore::note;
use super::{MAX_MANIFEST, Remote, RemoteError};
use crate::store::CheckpointRow;

impl Remote {
    /// Deletes what a run does not keep, as long as the newest that it keeps is there.
    pub(super) async fn keep(
        &self,
        run: &RunName,
        rows: &[CheckpointRow],
    ) -> Result<(), RemoteError> {
        let there = self.known(run, |known| known.steps.clone().unwrap_or_default());
        let kept: BTreeSet<u64> = rows.iter().map(|row| row.step).collect();
        let safe = kept.last().is_some_and(|newest| there.contains(newest));
        let surplus: Vec<u64> = there.difference(&kept).copied().collect();
        if !safe || surplus.is_empty() {
            return Ok(());
        }
        self.own(run).await?;
        for step in &surplus {
            self.bucket()
                .delete(&layout::checkpoint(run, *step))
                .await?;
            self.known(run, |known| {
                known.steps.get_or_insert_default().remove(step)
            });
            // A note that stays is of no consequence: nobody asks for that checkpoint.
            drop(std::fs::remove_file(note(&self.home().run(run), *step)));
        }
        let freed = self.sweep(run).await?;
        info!(%run, ?surplus, freed, "deleted old checkpoints from the store");
        Ok(())
    }

    /// Deletes the contents of a run that none of its checkpoints needs. Says how many bytes that were.
    async fn sweep(&self, run: &RunName) -> Result<u64, RemoteError> {
        let mut needed = BTreeSet::new();
        for meta in self.bucket().list(&layout::checkpoints(run)).await? {
            let stored = self.checkpoint_manifest(&meta.name).await?;
            needed.extend(
                stored
                    .objects()
                    .map(|file| layout::object(run, &file.blake3)),
            );
        }
        let listed = self.bucket().list(&layout::objects(run)).await?;
        let (mut objects, mut freed) = (BTreeMap::new(), 0);
        for meta in listed {
            if needed.contains(&meta.name) {
                objects.insert(meta.name, meta.bytes);
            } else {
                self.bucket().delete(&meta.name).await?;
                freed += meta.bytes;
            }
        }
        self.known(run, |known| known.objects = Some(objects));
        Ok(freed)
    }

    /// Reads a manifest of a checkpoint.
    pub(super) async fn checkpoint_manifest(
        &self,
        name: &str,
    ) -> Result<StoredCheckpoint, RemoteError> {
        let json = self.bucket().read(name, MAX_MANIFEST).await?;
        StoredCheckpoint::parse(&json).map_err(|source| self.unusable(name, source))
    }

    /// Deletes all that is of a run, unless another home writes it.
    pub async fn remove_run(&self, run: &RunName) -> Result<(), RemoteError> {
        if self.owner(run).await?.is_some() {
            self.own(run).await?;
        }
        self.remove_below(&layout::checkpoints(run)).await?;
        self.remove_below(&layout::run(run)).await?;
        self.state().runs.remove(run);
        Ok(())
    }

    /// Deletes a corpus.
    pub async fn remove_corpus(&self, fingerprint: &str) -> Result<(), RemoteError> {
        self.bucket()
            .delete(&layout::corpus_manifest(fingerprint))
            .await?;
        self.remove_below(&layout::corpus(fingerprint)).await?;
        self.state().corpora.remove(fingerprint);
        Ok(())
    }

    async fn remove_below(&self, prefix: &str) -> Result<(), RemoteError> {
        for meta in self.bucket().list(prefix).await? {
            self.bucket().delete(&meta.name).await?;
        }
        Ok(())
    }
}
