//! All runs as rows of a list, put together by the database: a list of a thousand long runs is read within
//! milliseconds, without a look at their histories.

use cohort_common::api::RunSummary;
use cohort_common::spec::RunSpec;
use rusqlite::Row;

use super::{Store, StoreError};

const SUMMARIES: &str = "
    SELECT r.name, r.status, r.kind, r.step, json_extract(r.spec_json, '$.train.steps'), s.loss,
           (SELECT loss FROM evals WHERE run = r.name AND split = 'validation' ORDER BY step DESC LIMIT 1),
           nullif(s.tokens_per_second, 0.0), json_extract(r.facts_json, '$.parameters'), r.created_ms, r.finished_ms,
           r.parent, r.error
    FROM runs r
    LEFT JOIN steps s ON s.run = r.name AND s.step = (SELECT max(step) FROM steps WHERE run = r.name)
    ORDER BY r.created_ms DESC, r.rowid DESC";

impl Store {
    /// All runs, the newest first. Places in the queue are not known here.
    pub fn summaries(&self) -> Result<Vec<RunSummary>, StoreError> {
        let mut summaries = self.query(SUMMARIES, [], read)?;
        for summary in &mut summaries {
            if summary.parameters.is_none() {
                summary.parameters = Some(self.parameters(&summary.name)?);
            }
        }
        Ok(summaries)
    }

    /// Parameters of a run whose facts were not kept.
    fn parameters(&self, run: &str) -> Result<u64, StoreError> {
        let sql = "SELECT spec_json FROM runs WHERE name = ?1";
        let json: String = self.query_one(sql, [run], |row| row.get(0))?;
        let spec: RunSpec = serde_json::from_str(&json)
            .map_err(|error| self.unreadable(format!("a run `{run}`"), error))?;
        Ok(spec.parameters())
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<RunSummary> {
    Ok(RunSummary {
        name: row.get(0)?,
        status: row.get(1)?,
        kind: row.get(2)?,
        step: row.get::<_, i64>(3)? as u64,
        steps: row.get::<_, i64>(4)? as u64,
        loss: row.get(5)?,
        val_loss: row.get(6)?,
        tokens_per_second: row.get(7)?,
        parameters: row.get::<_, Option<i64>>(8)?.map(|count| count as u64),
        created_ms: row.get::<_, i64>(9)? as u64,
        finished_ms: row.get::<_, Option<i64>>(10)?.map(|time| time as u64),
        queue_place: None,
        parent: row.get(11)?,
        error: row.get(12)?,
    })
}

#[cfg(test)]
mod tests {
    use cohort_common::api::RunFacts;

    use super::super::tests::{name, new_run, spec, store_with_run};
    use super::super::{EvalRow, NewRun, RunStatus, StepRow};
    use super::*;

    #[test]
    fn runs_are_listed_with_their_last_figures() {
        let (_dir, store) = store_with_run("tiny-1");
        let facts = RunFacts {
            parameters: 77,
            ..RunFacts::default()
        };
        let second = NewRun {
            facts: Some(facts),
            ..new_run("tiny-2")
        };
        store.create_run(&second, 2000).unwrap();
        let run = name("tiny-2");
        for step in 1..=3 {
            let row = StepRow {
                step,
                horizon: 200,
                loss: 4.0 - step as f64,
                grad_norm: 1.0,
                learning_rate: 0.1,
                tokens: 10 * step,
                tokens_per_second: 20.0,
                epoch: 0.5,
                bits_per_byte: None,
                mfu: None,
                skipped: false,
                time_ms: step,
            };
            store.record_step(&run, &row).unwrap();
            for split in ["other", "validation"] {
                let eval = EvalRow {
                    step,
                    split: split.into(),
                    loss: 10.0 - step as f64,
                    bits_per_byte: None,
                    confusion: Vec::new(),
                    weight: 1.0,
                    bytes: 1,
                };
                store.record_eval(&run, &eval).unwrap();
            }
        }
        store.set_progress(&run, 3).unwrap();
        store
            .set_status(&run, RunStatus::Failed, Some("NaN"), 9)
            .unwrap();
        let listed = store.summaries().unwrap();
        let newest = RunSummary {
            name: "tiny-2".into(),
            status: "failed".into(),
            kind: "pretrain".into(),
            step: 3,
            steps: 200,
            loss: Some(1.0),
            val_loss: Some(7.0),
            tokens_per_second: Some(20.0),
            parameters: Some(77),
            created_ms: 2000,
            finished_ms: Some(9),
            queue_place: None,
            parent: None,
            error: Some("NaN".into()),
        };
        assert_eq!(listed[0], newest);
        assert_eq!(listed[1].name, "tiny-1");
        assert_eq!(listed[1].parameters, Some(spec().parameters()));
        assert_eq!(
            (listed[1].loss, listed[1].val_loss, listed[1].finished_ms),
            (None, None, None)
        );
    }
}
