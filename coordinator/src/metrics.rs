//! The steps of a run for files and for other programs: each as it is kept, one page after the other, so that a long run
//! needs no memory.

use cohort_common::api::{MetricsRequest, StepMetrics};
use cohort_common::home::RunName;

use crate::store::{StepRow, Store, StoreError};

/// Steps that are read, and sent, at once: about 300 kB of JSON.
const PAGE: u32 = 1000;

/// Hands `take` the steps that are asked for, in order, for as long as it wants more.
pub fn read(
    store: &Store,
    name: &RunName,
    request: &MetricsRequest,
    mut take: impl FnMut(Vec<StepMetrics>) -> bool,
) -> Result<(), StoreError> {
    let to = request.to.unwrap_or(i64::MAX as u64).min(i64::MAX as u64);
    let mut after = request.from.unwrap_or(0).checked_sub(1);
    if let Some(last) = request.last {
        let from = store.nth_last_step(name, to, last)?;
        after = after.max(from.and_then(|from| from.checked_sub(1)));
        if from.is_none() {
            return Ok(());
        }
    }
    loop {
        let rows = store.steps(name, after, PAGE)?;
        let more = rows.len() == PAGE as usize;
        after = rows.last().map(|row| row.step);
        let wanted = rows.into_iter().filter(|row| row.step <= to);
        let page: Vec<StepMetrics> = wanted.map(StepMetrics::from).collect();
        let go_on = more && after.is_some_and(|after| after < to);
        if (!page.is_empty() && !take(page)) || !go_on {
            return Ok(());
        }
    }
}

impl From<StepRow> for StepMetrics {
    fn from(row: StepRow) -> Self {
        let finite = |value: f64| Some(value).filter(|value| value.is_finite());
        Self {
            step: row.step,
            steps: Some(row.horizon).filter(|steps| *steps > 0),
            epoch: row.epoch,
            tokens: row.tokens,
            time_ms: row.time_ms,
            loss: finite(row.loss),
            bits_per_byte: row.bits_per_byte.and_then(finite),
            grad_norm: finite(row.grad_norm),
            learning_rate: finite(row.learning_rate),
            // No speed is known of a step that another coordinator led.
            tokens_per_second: finite(row.tokens_per_second).filter(|speed| *speed > 0.0),
            mfu: row.mfu.and_then(finite),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{name, store_with_run};

    fn row(step: u64) -> StepRow {
        StepRow {
            step,
            horizon: 0,
            loss: if step == 3 { f64::NAN } else { 0.1 + 0.2 },
            grad_norm: 1.0,
            learning_rate: 0.1,
            tokens: 10 * step,
            tokens_per_second: 0.0,
            epoch: 0.0,
            bits_per_byte: None,
            mfu: None,
            skipped: false,
            time_ms: step,
        }
    }

    #[test]
    fn the_steps_that_are_asked_for_come_in_order_and_to_the_bit() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        let steps = |from, to, last| {
            let request = MetricsRequest {
                run: "tiny-1".into(),
                from,
                to,
                last,
            };
            let mut all = Vec::new();
            let take = |page: Vec<StepMetrics>| {
                all.extend(page);
                true
            };
            read(&store, &run, &request, take).unwrap();
            all
        };
        assert_eq!(steps(None, None, None), []);
        assert_eq!(steps(None, None, Some(5)), []);
        (1..=2500).for_each(|n| store.record_step(&run, &row(n)).unwrap());
        let numbers = |steps: Vec<StepMetrics>| -> (usize, u64, u64) {
            (steps.len(), steps[0].step, steps[steps.len() - 1].step)
        };
        assert_eq!(numbers(steps(None, None, None)), (2500, 1, 2500));
        assert_eq!(numbers(steps(Some(1), Some(1000), None)), (1000, 1, 1000));
        assert_eq!(numbers(steps(Some(999), Some(1001), None)), (3, 999, 1001));
        assert_eq!(numbers(steps(None, None, Some(5))), (5, 2496, 2500));
        assert_eq!(numbers(steps(None, Some(100), Some(5))), (5, 96, 100));
        assert_eq!(numbers(steps(Some(99), Some(100), Some(5))), (2, 99, 100));
        assert_eq!(numbers(steps(None, None, Some(9999))), (2500, 1, 2500));
        assert_eq!(steps(Some(9), Some(3), None), []);
        assert_eq!(steps(None, None, Some(0)), []);
        let first = &steps(None, Some(3), None);
        assert_eq!(
            (first[0].loss, first[0].steps, first[0].tokens_per_second),
            (Some(0.1 + 0.2), None, None)
        );
        assert_eq!(first[2].loss, None);
    }

    #[test]
    fn whoever_wants_no_more_gets_no_more() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        (1..=2500).for_each(|n| store.record_step(&run, &row(n)).unwrap());
        let mut pages = 0;
        let take = |_| {
            pages += 1;
            false
        };
        read(&store, &run, &MetricsRequest::default(), take).unwrap();
        assert_eq!(pages, 1);
    }
}
