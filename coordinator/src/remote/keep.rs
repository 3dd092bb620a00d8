//! What the store does not keep: checkpoints that their run does not keep either, then contents that no checkpoint of the run
//! refers to; and all that is of a run or a corpus that a person deletes.
//!
//! Manifests go first, so that none is ever there without its contents. One task copies and deletes, only the owner of a run
//! does either, and whoever deletes for a person stops that task meanwhile ([`Remote::alone`]); so no content goes that a copy
//! under way refers to.

use std::collections::{BTreeMap, BTreeSet};

use cohort_common::home::RunName;
use tracing::info;

use super::layout::{self, StoredCheckpoint};
use super::restore::note;
use super::{InStore, MAX_MANIFEST, Remote, RemoteError};
use crate::store::CheckpointRow;

impl Remote {
    /// Deletes what a run does not keep, as long as the newest that it keeps is there.
    pub(super) async fn keep(
        &self,
        run: &RunName,
        rows: &[CheckpointRow],
    ) -> Result<(), RemoteError> {
        let known = |known: &mut InStore| (known.steps.clone().unwrap_or_default(), known.unswept);
        let (there, unswept) = self.known(run, known);
        let kept: BTreeSet<u64> = rows.iter().map(|row| row.step).collect();
        let safe = kept.last().is_some_and(|newest| there.contains(newest));
        let surplus: Vec<u64> = there.difference(&kept).copied().collect();
        if !safe || (surplus.is_empty() && !unswept) {
            return Ok(());
        }
        self.own(run).await?;
        self.known(run, |known| known.unswept = true);
        for step in &surplus {
            self.check_lead()?;
            self.bucket()
                .delete(&layout::checkpoint(run, *step))
                .await?;
            self.known(run, |known| {
                known.steps.as_mut().map(|steps| steps.remove(step))
            });
            // A note that stays is of no consequence: nobody asks for that checkpoint.
            drop(std::fs::remove_file(note(&self.home().run(run), *step)));
        }
        let freed = self.sweep(run).await?;
        self.known(run, |known| known.unswept = false);
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
        // What is there is not known any more if this ends in the middle.
        self.known(run, |known| known.objects = None);
        let (mut objects, mut freed) = (BTreeMap::new(), 0);
        for (object, bytes) in self.listed_objects(&layout::objects(run)).await? {
            if needed.contains(&object) {
                objects.insert(object, bytes);
            } else {
                self.check_lead()?;
                self.bucket().delete(&object).await?;
                freed += bytes;
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

    /// Deletes all that is of a run, unless another home writes it. Whoever calls is [`Remote::alone`], until the run is not at
    /// home any more either.
    pub async fn remove_run(&self, run: &RunName) -> Result<(), RemoteError> {
        if self.owner(run).await?.is_some() {
            self.own(run).await?;
        }
        self.forget_journal(run);
        // However far the deletion comes: what is there is found out anew.
        self.state().runs.remove(run);
        self.remove_below(&layout::checkpoints(run)).await?;
        self.remove_below(&layout::run(run)).await
    }

    /// Deletes a corpus. Whoever calls is [`Remote::alone`], until it is not at home any more either.
    pub async fn remove_corpus(&self, fingerprint: &str) -> Result<(), RemoteError> {
        self.state().corpora.remove(fingerprint);
        self.bucket()
            .delete(&layout::corpus_manifest(fingerprint))
            .await?;
        self.remove_below(&layout::corpus(fingerprint)).await
    }

    async fn remove_below(&self, prefix: &str) -> Result<(), RemoteError> {
        for meta in self.bucket().list(prefix).await? {
            self.check_lead()?;
            self.bucket().delete(&meta.name).await?;
        }
        Ok(())
    }
}
