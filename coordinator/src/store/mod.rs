//! The coordinator's memory: runs, ledgers, metrics, events, checkpoints and corpora in one SQLite file.
//!
//! [`Store`] is synchronous and owned by one thread; [`StoreHandle`] is what everybody else has. Several queued writes
//! become one transaction, so that a step never waits for a flush of its own. Times are arguments, in milliseconds
//! since the epoch: no clock is read here. Files of checkpoints and corpora are not touched here.

#[cfg(test)]
mod documented;
mod error;
mod faults;
mod handle;
mod ledger;
mod metrics;
mod rows;
mod runs;
mod schema;
mod summaries;
mod things;

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, Params, Row};

pub use error::StoreError;
pub use handle::{Receipt, StoreHandle};
pub use ledger::Appended;
pub use rows::{
    AssignmentRow, AttemptRow, CheckpointRow, CorpusRow, EvalRow, EventRow, FaultRow, NewRun,
    PointRow, RunRow, RunStatus, SampleRow, StepRow, WorkerTimesRow,
};
pub use schema::SCHEMA_VERSION;

/// The open database.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
}

impl Store {
    /// The database file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on all reads of a read-only store see the same moment, until [`Store::release`].
    pub fn hold(&self) -> Result<(), StoreError> {
        self.execute_batch("BEGIN")
    }

    /// Ends what [`Store::hold`] began.
    pub fn release(&self) -> Result<(), StoreError> {
        self.execute_batch("COMMIT")
    }

    fn execute(&self, sql: &str, params: impl Params) -> Result<usize, StoreError> {
        let done = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut s| s.execute(params));
        done.map_err(StoreError::sql(&self.path))
    }

    fn execute_batch(&self, sql: &str) -> Result<(), StoreError> {
        self.connection
            .execute_batch(sql)
            .map_err(StoreError::sql(&self.path))
    }

    fn query<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let rows = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut s| s.query_map(params, read)?.collect());
        rows.map_err(StoreError::sql(&self.path))
    }

    fn query_one<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let row = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut s| s.query_row(params, read));
        row.map_err(StoreError::sql(&self.path))
    }

    fn query_maybe<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>, StoreError> {
        let row = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut s| s.query_row(params, read).optional());
        row.map_err(StoreError::sql(&self.path))
    }

    fn unreadable(&self, what: impl Into<String>, reason: impl std::fmt::Display) -> StoreError {
        StoreError::Unreadable {
            path: self.path.clone(),
            what: what.into(),
            reason: reason.to_string(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use cohort_common::home::RunName;
    use cohort_common::spec::*;
    use tempfile::TempDir;

    use super::*;

    pub fn name(text: &str) -> RunName {
        RunName::new(text).unwrap()
    }

    pub fn spec() -> RunSpec {
        RunSpec {
            kind: RunKind::Pretrain,
            model: ModelConfig {
                architecture: Architecture::Llama,
                vocab_size: 512,
                context: 64,
                hidden_size: 64,
                num_hidden_layers: 2,
                num_attention_heads: 8,
                num_key_value_heads: 4,
                intermediate_size: 172,
                tie_word_embeddings: true,
                bias: false,
                dropout: 0.0,
                norm_eps: 1e-5,
                head_dim: None,
                attention_bias: false,
                qk_norm: false,
                rope_theta: 10_000.0,
                rope_scaling: None,
                initializer_range: 0.02,
                labels: Vec::new(),
            },
            train: TrainConfig {
                steps: 200,
                lanes: 8,
                micro_batch: 2,
                accumulate: 1,
                learning_rate: 0.1 + 0.2,
                min_learning_rate: 1e-4,
                warmup_steps: 10,
                schedule: ScheduleKind::Cosine,
                decay_steps: 0,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                grad_clip: 1.0,
                precision: Default::default(),
                payload: Payload::F32,
                diloco: None,
                gradient_checkpointing: false,
                seed: u64::MAX,
                eval_every: 50,
                eval_samples: 0,
                freeze_layers: None,
                layer_decay: None,
                unfreeze_every: None,
                data_share: None,
                replay: None,
                early_stopping_patience: None,
                max_forgetting: None,
                max_length: None,
                min_workers: 1,
            },
            checkpoint: CheckpointConfig {
                every: 100,
                keep: 2,
            },
            corpus: "c0ffee".into(),
            mixture: None,
            start: None,
            lora: None,
            samples: None,
            watchdog: None,
        }
    }

    pub fn new_run(text: &str) -> NewRun {
        NewRun {
            name: name(text),
            spec: spec(),
            identity: "identity".into(),
            parent: None,
            facts: None,
        }
    }

    pub fn store_with_run(text: &str) -> (TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("cohort.db")).unwrap();
        store.create_run(&new_run(text), 1000).unwrap();
        (dir, store)
    }
}
