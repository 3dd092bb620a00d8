//! The steps of a run as columns in memory, so that the history of a long run is put together for a screen in
//! milliseconds. The database has each step once; what is here is read from it, once in full and then only what is new.
//!
//! Where more steps are asked for than there are points, each point has the mean of its steps and their lowest and
//! highest value, so that no spike is lost.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use cohort_common::api::{Band, History, HistoryRequest};
use cohort_common::home::RunName;

use crate::store::{PointRow, Store, StoreError};

/// Runs whose steps are kept in memory; a million steps are 44 MB.
const KEPT: usize = 8;

/// Steps from which on two connections read beside each other.
const MANY: u64 = 1 << 17;

/// Points of an answer, at most.
const MOST_POINTS: usize = 4096;

/// The steps of the runs that somebody looks at.
#[derive(Default)]
pub struct Histories(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    runs: HashMap<RunName, (u64, Arc<Mutex<Columns>>)>,
    uses: u64,
}

impl Histories {
    /// The history that is asked for. Reads what the database has got since the last time.
    pub fn history(
        &self,
        store: &Store,
        name: &RunName,
        request: &HistoryRequest,
    ) -> Result<History, StoreError> {
        let columns = self.columns(name);
        // Whoever panicked with it had at most appended less than a page; the check below finds what does not fit.
        let mut columns = columns.lock().unwrap_or_else(PoisonError::into_inner);
        columns.refresh(store, name)?;
        Ok(columns.history(request))
    }

    fn columns(&self, name: &RunName) -> Arc<Mutex<Columns>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.uses += 1;
        let now = kept.uses;
        if !kept.runs.contains_key(name) && kept.runs.len() >= KEPT {
            let oldest = kept.runs.iter().min_by_key(|(_, (used, _))| *used);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                kept.runs.remove(&oldest);
            }
        }
        let (used, columns) = kept.runs.entry(name.clone()).or_default();
        *used = now;
        columns.clone()
    }
}

/// The steps of one run, in order. Metrics are rounded to 32 bits: they are drawn, not compared.
#[derive(Debug, Default)]
pub struct Columns {
    step: Vec<u64>,
    tokens: Vec<u64>,
    time_ms: Vec<u64>,
    loss: Vec<f32>,
    grad_norm: Vec<f32>,
    learning_rate: Vec<f32>,
    tokens_per_second: Vec<f32>,
    mfu: Vec<f32>,
}

impl Columns {
    /// All steps of a run.
    pub fn read(store: &Store, name: &RunName) -> Result<Self, StoreError> {
        let mut columns = Self::default();
        columns.refresh(store, name)?;
        Ok(columns)
    }

    /// Reads what is new. Steps that were taken back or made again since are noticed by the last one that is known.
    fn refresh(&mut self, store: &Store, name: &RunName) -> Result<(), StoreError> {
        if let (Some(&step), Some(&time)) = (self.step.last(), self.time_ms.last()) {
            let known = store.steps(name, step.checked_sub(1), 1)?;
            if known.first().map(|row| (row.step, row.time_ms)) != Some((step, time)) {
                *self = Self::default();
            }
        }
        let after = self.step.last().copied();
        let newest = store.last_step(name)?.map_or(0, |row| row.step);
        let first = after.unwrap_or(0);
        if newest.saturating_sub(first) < MANY {
            return store.each_point(name, after, None, |row| self.push(row));
        }
        // A second connection reads the second half meanwhile.
        let middle = Some(first + (newest - first) / 2);
        let path = store.path().to_owned();
        let half = || {
            let mut half = Self::default();
            let store = Store::open_read_only(&path)?;
            store.each_point(name, middle, None, |row| half.push(row))?;
            Ok::<_, StoreError>(half)
        };
        let half = thread::scope(|scope| {
            let half = scope.spawn(half);
            store.each_point(name, after, middle, |row| self.push(row))?;
            half.join().expect("rows are read without a panic")
        });
        self.append(half?);
        Ok(())
    }

    fn append(&mut self, mut later: Self) {
        self.step.append(&mut later.step);
        self.tokens.append(&mut later.tokens);
        self.time_ms.append(&mut later.time_ms);
        self.loss.append(&mut later.loss);
        self.grad_norm.append(&mut later.grad_norm);
        self.learning_rate.append(&mut later.learning_rate);
        self.tokens_per_second.append(&mut later.tokens_per_second);
        self.mfu.append(&mut later.mfu);
    }

    fn push(&mut self, row: PointRow) {
        self.step.push(row.step);
        self.tokens.push(row.tokens);
        self.time_ms.push(row.time_ms);
        self.loss.push(row.loss as f32);
        self.grad_norm.push(row.grad_norm as f32);
        self.learning_rate.push(row.learning_rate as f32);
        // No speed is known of a step that another coordinator led.
        let speed = Some(row.tokens_per_second).filter(|speed| *speed > 0.0);
        self.tokens_per_second
            .push(speed.map_or(f32::NAN, |speed| speed as f32));
        self.mfu.push(row.mfu as f32);
    }

    /// The steps that are asked for, as points.
    pub fn history(&self, request: &HistoryRequest) -> History {
        let begin = request
            .from
            .map_or(0, |from| self.step.partition_point(|step| *step < from));
        let end = request.to.map_or(self.step.len(), |to| {
            self.step.partition_point(|step| *step <= to)
        });
        let range = begin..end.max(begin);
        let points = request.points.clamp(1, MOST_POINTS);
        let buckets = buckets(range.clone(), points);
        let last = |column: &[u64]| buckets.iter().map(|b| column[b.end - 1]).collect();
        let single = buckets.len() == range.len();
        let band = |column: &[f32]| Band {
            mean: buckets.iter().map(|b| mean(&column[b.clone()])).collect(),
            min: extremes(column, &buckets, single, f32::min),
            max: extremes(column, &buckets, single, f32::max),
        };
        History {
            run: request.run.clone(),
            rows: range.len() as u64,
            step: last(&self.step),
            tokens: last(&self.tokens),
            time_ms: last(&self.time_ms),
            loss: band(&self.loss),
            grad_norm: band(&self.grad_norm),
            learning_rate: band(&self.learning_rate),
            tokens_per_second: band(&self.tokens_per_second),
            mfu: band(&self.mfu),
        }
    }
}

/// At most `points` ranges of nearly the same length that cover `range`, none of them empty.
fn buckets(range: Range<usize>, points: usize) -> Vec<Range<usize>> {
    let (len, points) = (range.len(), points.min(range.len()));
    let edge = |i: usize| range.start + i * len / points;
    (0..points).map(|i| edge(i)..edge(i + 1)).collect()
}

fn mean(values: &[f32]) -> Option<f32> {
    let finite = values.iter().filter(|value| value.is_finite());
    let (sum, count) = finite.fold((0.0, 0u32), |(sum, n), value| {
        (sum + f64::from(*value), n + 1)
    });
    (count > 0).then(|| (sum / f64::from(count)) as f32)
}

fn extremes(
    column: &[f32],
    buckets: &[Range<usize>],
    single: bool,
    pick: fn(f32, f32) -> f32,
) -> Vec<Option<f32>> {
    if single {
        return Vec::new();
    }
    let extreme = |bucket: &Range<usize>| {
        let values = column[bucket.clone()].iter().copied();
        values.filter(|value| value.is_finite()).reduce(pick)
    };
    buckets.iter().map(extreme).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StepRow;
    use crate::store::tests::{name, store_with_run};

    fn row(step: u64) -> StepRow {
        StepRow {
            step,
            horizon: 100,
            loss: if step == 7 { 90.0 } else { step as f64 },
            grad_norm: 1.0,
            learning_rate: 0.1,
            tokens: 10 * step,
            tokens_per_second: if step == 1 { 0.0 } else { 500.0 },
            epoch: 0.0,
            bits_per_byte: None,
            mfu: None,
            time_ms: 1000 + step,
            skipped: false,
        }
    }

    fn request(from: Option<u64>, to: Option<u64>, points: usize) -> HistoryRequest {
        HistoryRequest {
            run: "tiny-1".into(),
            from,
            to,
            points,
        }
    }

    #[test]
    fn few_steps_are_points_and_many_are_put_together_without_losing_a_spike() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        (1..=10).for_each(|step| store.record_step(&run, &row(step)).unwrap());
        let columns = Columns::read(&store, &run).unwrap();
        let all = columns.history(&request(None, None, 100));
        assert_eq!((all.rows, all.step.len()), (10, 10));
        assert_eq!(all.loss.min, []);
        assert_eq!(all.tokens_per_second.mean[..2], [None, Some(500.0)]);
        assert_eq!(all.mfu.mean, [None; 10]);

        let few = columns.history(&request(Some(3), Some(9), 3));
        assert_eq!((few.rows, &few.step[..]), (7, &[4, 6, 9][..]));
        assert_eq!(few.tokens, [40, 60, 90]);
        assert_eq!(few.loss.mean[0], Some(3.5));
        assert_eq!(few.loss.max, [Some(4.0), Some(6.0), Some(90.0)]);
        assert_eq!(few.loss.min[2], Some(8.0));
        let none = columns.history(&request(Some(50), None, 3));
        assert_eq!((none.rows, none.step.len()), (0, 0));
    }

    #[test]
    fn many_steps_are_read_by_two_and_are_in_order() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        store.hold().unwrap();
        (1..=MANY + 3).for_each(|step| store.record_step(&run, &row(step)).unwrap());
        store.release().unwrap();
        let columns = Columns::read(&store, &run).unwrap();
        assert!(columns.step.iter().copied().eq(1..=MANY + 3));
        let tokens = columns.tokens.iter().copied();
        assert!(tokens.eq((1..=MANY + 3).map(|step| 10 * step)));
        assert_eq!(columns.mfu.len(), columns.loss.len());
    }

    #[test]
    fn what_is_new_is_read_and_what_was_taken_back_is_forgotten() {
        let (_dir, store) = store_with_run("tiny-1");
        let run = name("tiny-1");
        let histories = Histories::default();
        let look = || {
            let history = histories.history(&store, &run, &request(None, None, 100));
            history.unwrap().step
        };
        assert!(look().is_empty());
        (1..=4).for_each(|step| store.record_step(&run, &row(step)).unwrap());
        assert_eq!(look(), [1, 2, 3, 4]);
        store.record_step(&run, &row(5)).unwrap();
        assert_eq!(look(), [1, 2, 3, 4, 5]);
        store.truncate(&run, 3).unwrap();
        assert_eq!(look(), [1, 2, 3]);
        let again = StepRow {
            time_ms: 9999,
            ..row(3)
        };
        store.record_step(&run, &again).unwrap();
        assert_eq!(look(), [1, 2, 3]);
    }
}
