//! Checkpoints and corpora: what lies on disk, by name.

use cohort_common::home::{RunName, Which};
use rusqlite::{Row, params};

use super::metrics::unsigned;
use super::{CheckpointRow, CorpusRow, Store, StoreError};

const CHECKPOINT: &str =
    "SELECT step, path, bytes, val_loss, state_hash, time_ms FROM checkpoints WHERE run = ?1";

impl Store {
    /// Records a checkpoint; one of the same step is replaced.
    pub fn record_checkpoint(&self, run: &RunName, row: &CheckpointRow) -> Result<(), StoreError> {
        self.execute(
            "INSERT OR REPLACE INTO checkpoints (run, step, path, bytes, val_loss, state_hash, time_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                run.as_str(),
                row.step as i64,
                row.path,
                row.bytes as i64,
                row.val_loss,
                row.state_hash,
                row.time_ms as i64
            ],
        )?;
        Ok(())
    }

    /// The checkpoints of a run, by step.
    pub fn checkpoints(&self, run: &RunName) -> Result<Vec<CheckpointRow>, StoreError> {
        self.query(
            &format!("{CHECKPOINT} ORDER BY step"),
            [run.as_str()],
            read_checkpoint,
        )
    }

    /// One checkpoint of a run: the newest, the one with the lowest validation loss (the earliest of equals), or the
    /// one of a step.
    pub fn checkpoint(
        &self,
        run: &RunName,
        which: Which,
    ) -> Result<Option<CheckpointRow>, StoreError> {
        let run = run.as_str();
        match which {
            Which::Last => {
                let sql = format!("{CHECKPOINT} ORDER BY step DESC LIMIT 1");
                self.query_maybe(&sql, [run], read_checkpoint)
            }
            Which::Best => {
                let sql = format!(
                    "{CHECKPOINT} AND val_loss IS NOT NULL ORDER BY val_loss, step LIMIT 1"
                );
                self.query_maybe(&sql, [run], read_checkpoint)
            }
            Which::Step(step) => {
                let sql = format!("{CHECKPOINT} AND step = ?2");
                self.query_maybe(&sql, params![run, step as i64], read_checkpoint)
            }
        }
    }

    /// Forgets a checkpoint, whether it was there or not. Its files are the caller's.
    pub fn delete_checkpoint(&self, run: &RunName, step: u64) -> Result<(), StoreError> {
        let sql = "DELETE FROM checkpoints WHERE run = ?1 AND step = ?2";
        self.execute(sql, params![run.as_str(), step as i64])?;
        Ok(())
    }

    /// Records a corpus; one of the same fingerprint is replaced.
    pub fn record_corpus(&self, row: &CorpusRow) -> Result<(), StoreError> {
        self.execute(
            "INSERT OR REPLACE INTO corpora (fingerprint, name, json, time_ms) VALUES (?1, ?2, ?3, ?4)",
            params![row.fingerprint, row.name, row.json, row.time_ms as i64],
        )?;
        Ok(())
    }

    /// All corpora, the oldest first.
    pub fn corpora(&self) -> Result<Vec<CorpusRow>, StoreError> {
        let sql =
            "SELECT fingerprint, name, json, time_ms FROM corpora ORDER BY time_ms, fingerprint";
        self.query(sql, [], read_corpus)
    }

    /// One corpus.
    pub fn corpus(&self, fingerprint: &str) -> Result<Option<CorpusRow>, StoreError> {
        let sql = "SELECT fingerprint, name, json, time_ms FROM corpora WHERE fingerprint = ?1";
        self.query_maybe(sql, [fingerprint], read_corpus)
    }

    /// Forgets a corpus, whether it was there or not. Its files are the caller's.
    pub fn delete_corpus(&self, fingerprint: &str) -> Result<(), StoreError> {
        self.execute("DELETE FROM corpora WHERE fingerprint = ?1", [fingerprint])?;
        Ok(())
    }
}

fn read_checkpoint(row: &Row<'_>) -> rusqlite::Result<CheckpointRow> {
    Ok(CheckpointRow {
        step: unsigned(row, 0)?,
        path: row.get(1)?,
        bytes: unsigned(row, 2)?,
        val_loss: row.get(3)?,
        state_hash: row.get(4)?,
        time_ms: unsigned(row, 5)?,
    })
}

fn read_corpus(row: &Row<'_>) -> rusqlite::Result<CorpusRow> {
    Ok(CorpusRow {
        fingerprint: row.get(0)?,
        name: row.get(1)?,
        json: row.get(2)?,
        time_ms: unsigned(row, 3)?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{name, store_with_run};
    use super::*;

    #[test]
    fn the_last_the_best_and_any_checkpoint_are_found() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        let row = |step: u64, val_loss: Option<f64>| CheckpointRow {
            step,
            path: format!("runs/tiny-1/checkpoints/step-{step:08}"),
            bytes: 1 << 40,
            val_loss,
            state_hash: [step as u8; 32],
            time_ms: step,
        };
        assert_eq!(store.checkpoint(&run, Which::Last).unwrap(), None);
        let rows = [
            row(10, Some(2.0)),
            row(20, Some(1.5)),
            row(30, Some(1.5)),
            row(40, None),
        ];
        for row in &rows {
            store.record_checkpoint(&run, row).unwrap();
        }
        let step = |which| store.checkpoint(&run, which).unwrap().map(|c| c.step);
        assert_eq!(store.checkpoints(&run).unwrap(), rows);
        assert_eq!(step(Which::Last), Some(40));
        assert_eq!(step(Which::Best), Some(20));
        assert_eq!(step(Which::Step(30)), Some(30));
        assert_eq!(step(Which::Step(35)), None);
        store.delete_checkpoint(&run, 20).unwrap();
        assert_eq!(step(Which::Best), Some(30));
    }

    #[test]
    fn corpora_are_kept_by_fingerprint() {
        let (_dir, store) = store_with_run("tiny-1");
        let row = CorpusRow {
            fingerprint: "c0ffee".into(),
            name: "books".into(),
            json: "{}".into(),
            time_ms: 5,
        };
        store.record_corpus(&row).unwrap();
        store.record_corpus(&row).unwrap();
        assert_eq!(store.corpora().unwrap().len(), 1);
        assert_eq!(store.corpus("c0ffee").unwrap(), Some(row));
        store.delete_corpus("c0ffee").unwrap();
        assert_eq!(store.corpus("c0ffee").unwrap(), None);
    }
}
