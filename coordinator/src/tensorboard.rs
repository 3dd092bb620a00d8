//! Event files for TensorBoard while runs train: a sub-directory for each run that something happens to.
//!
//! It follows the store as clients do, through the record of events, but looks once a second at most, and on a connection
//! of its own. What a directory lacks is taken from the store when a run is first seen, so that neither a restart nor a
//! disk that was full for a while leaves a gap or doubles a point. An error here never harms a run.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cohort_common::api::{MetricsRequest, RunEvent, RunFacts, StepMetrics};
use cohort_common::home::RunName;
use cohort_common::tensorboard::Board;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::driver::{Cluster, Counts, now_ms};
use crate::store::{EventRow, Store, StoreError};
use crate::{metrics, view};

/// Least time between looks at the store.
const LOOK: Duration = Duration::from_secs(1);

/// Time without a look after an error.
const REST: Duration = Duration::from_secs(60);

/// Events that are read at once.
const EVENTS: u32 = 1024;

/// Why a directory cannot be kept up.
#[derive(Debug, thiserror::Error)]
enum BoardError {
    #[error("cannot write to `{0}`")]
    Io(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A task that keeps a directory up to date.
pub struct Exporter {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Exporter {
    /// Starts the task. The directory is made at once, so that one that cannot be made is known before anything trains.
    pub fn start(cluster: Cluster, directory: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        info!(directory = %directory.display(), "event files for TensorBoard");
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(keep_up(cluster, directory, stopped));
        Ok(Self { stop, task })
    }

    /// Writes what has happened until now, and ends.
    pub async fn finish(self) {
        let _ = self.stop.send(());
        let _ = self.task.await;
    }
}

async fn keep_up(cluster: Cluster, directory: PathBuf, mut stopped: oneshot::Receiver<()>) {
    let mut news = cluster.events();
    let mut boards = None;
    let mut last = false;
    loop {
        // Whatever was announced before this look is in the database when it begins.
        news.mark_unchanged();
        let _ = cluster.store().call(|_| Ok(())).await;
        let (database, directory) = (cluster.home().database(), directory.clone());
        let looked = tokio::task::spawn_blocking(move || look(boards, &database, &directory));
        // Nothing there panics on purpose, and no run depends on this task.
        let Ok(looked) = looked.await else { return };
        if last {
            return;
        }
        let (open, rest) = match looked {
            Ok(open) => (Some(open), LOOK),
            Err(error) => {
                let error = crate::status::chain(&error);
                warn!(
                    error,
                    "event files for TensorBoard; trying again in a minute"
                );
                (None, REST)
            }
        };
        boards = open;
        last = wait(&mut news, rest, &mut stopped).await;
    }
}

/// Waits at least for `rest`, and then for news. Says whether the next look is the last.
async fn wait(
    news: &mut watch::Receiver<Counts>,
    rest: Duration,
    stopped: &mut oneshot::Receiver<()>,
) -> bool {
    tokio::select! {
        () = sleep(rest) => {}
        _ = &mut *stopped => return true,
    }
    tokio::select! {
        changed = news.changed() => changed.is_err(),
        _ = stopped => true,
    }
}

/// Reads what is new and writes it.
fn look(boards: Option<Boards>, database: &Path, directory: &Path) -> Result<Boards, BoardError> {
    let mut boards = match boards {
        Some(boards) => boards,
        None => Boards::open(Store::open_read_only(database)?, directory)?,
    };
    boards.look()?;
    Ok(boards)
}

/// The directories of the runs, and how far the record of events has been read.
struct Boards {
    store: Store,
    directory: PathBuf,
    host: String,
    after: u64,
    open: BTreeMap<RunName, OpenBoard>,
}

/// The directory of a run that something happens to.
struct OpenBoard {
    board: Board,
    /// Events up to this one are in it.
    through: u64,
}

impl Boards {
    /// Begins at the end of the record. Runs that have a directory get what that lacks.
    fn open(store: Store, directory: &Path) -> Result<Self, BoardError> {
        let boards = Self {
            after: store.last_event()?,
            directory: directory.to_owned(),
            host: host(),
            open: BTreeMap::new(),
            store,
        };
        for run in boards.store.runs()? {
            if boards.path(&run.name).is_dir() {
                let mut open = boards.begin(&run.name)?;
                boards.flush(&run.name, &mut open)?;
            }
        }
        Ok(boards)
    }

    /// Writes what has happened since the last look.
    fn look(&mut self) -> Result<(), BoardError> {
        loop {
            let rows = self.store.events(None, self.after, EVENTS)?;
            for row in &rows {
                self.take(row)?;
                self.after = row.id;
            }
            if rows.len() < EVENTS as usize {
                break;
            }
        }
        let mut open = std::mem::take(&mut self.open);
        let flushed = open.iter_mut();
        let flushed = flushed.map(|(name, open)| self.flush(name, open));
        let flushed = flushed.collect();
        self.open = open;
        flushed
    }

    fn take(&mut self, row: &EventRow) -> Result<(), BoardError> {
        let name = row.run.as_deref().and_then(|run| RunName::new(run).ok());
        let Some(name) = name else { return Ok(()) };
        let mut open = match self.open.remove(&name) {
            Some(open) => open,
            None => match self.begin(&name) {
                Ok(open) => open,
                // It was deleted since.
                Err(BoardError::Store(StoreError::UnknownRun(_))) => return Ok(()),
                Err(error) => return Err(error),
            },
        };
        // An event of another version of Cohort tells nothing here.
        let event = serde_json::from_str::<RunEvent>(&row.text).ok();
        if let Some(event) = &event
            && row.id > open.through
        {
            self.tell(&name, &mut open.board, event, row.time_ms)?;
        }
        match event.is_some_and(|event| event.is_last()) {
            true => self.flush(&name, &mut open),
            false => {
                self.open.insert(name, open);
                Ok(())
            }
        }
    }

    /// Writes what an event says, if it is a point or a text.
    fn tell(
        &self,
        name: &RunName,
        board: &mut Board,
        event: &RunEvent,
        time_ms: u64,
    ) -> Result<(), BoardError> {
        let told = match event {
            RunEvent::Step(step) => {
                let rows = self.store.steps(name, step.step.checked_sub(1), 1)?;
                let rows = rows.into_iter().filter(|row| row.step == step.step);
                rows.map(StepMetrics::from)
                    .try_for_each(|row| board.step(&row))
            }
            RunEvent::Eval(eval) => board.eval(eval, time_ms),
            RunEvent::Sample(sample) => board.sample(sample, time_ms),
            _ => Ok(()),
        };
        told.map_err(|error| self.io(name, error))
    }

    /// Opens the directory of a run and writes what it lacks.
    fn begin(&self, name: &RunName) -> Result<OpenBoard, BoardError> {
        let board = Board::open(&self.path(name), &self.host);
        let mut board = board.map_err(|error| self.io(name, error))?;
        // One moment for all that is read here, and for the event up to which that goes.
        self.store.hold()?;
        let through = self.catch_up(name, &mut board);
        self.store.release()?;
        let through = through?;
        Ok(OpenBoard { board, through })
    }

    /// Writes what the store has and the directory lacks; gives the newest event that is in it.
    fn catch_up(&self, name: &RunName, board: &mut Board) -> Result<u64, BoardError> {
        let through = self.store.last_event()?;
        let view = view::run(&self.store, name, |_| RunFacts::default())?;
        let committed = match board.last() {
            Some((last, _)) => self.time_of(name, last)?,
            None => None,
        };
        let after = board.go_on(committed, now_ms());
        let after = after.map_err(|error| self.io(name, error))?;
        let request = MetricsRequest {
            from: Some(after + 1),
            ..MetricsRequest::default()
        };
        let mut written = Ok(());
        metrics::read(&self.store, name, &request, |page| {
            written = page.iter().try_for_each(|row| board.step(row));
            written.is_ok()
        })?;
        let created = view.info.created_ms;
        for eval in &view.info.evals {
            let time = self.time_of(name, eval.step)?.unwrap_or(created);
            written = written.and_then(|()| board.eval(eval, time));
        }
        for sample in &view.samples {
            let time = self.time_of(name, sample.step)?.unwrap_or(created);
            written = written.and_then(|()| board.sample(sample, time));
        }
        written.map_err(|error| self.io(name, error))?;
        Ok(through)
    }

    /// When a step was committed.
    fn time_of(&self, name: &RunName, step: u64) -> Result<Option<u64>, StoreError> {
        let row = self.store.steps(name, step.checked_sub(1), 1)?;
        let row = row.into_iter().find(|row| row.step == step);
        Ok(row.map(|row| row.time_ms))
    }

    fn flush(&self, name: &RunName, open: &mut OpenBoard) -> Result<(), BoardError> {
        let flushed = open.board.flush();
        flushed.map_err(|error| self.io(name, error))
    }

    fn path(&self, name: &RunName) -> PathBuf {
        self.directory.join(name.as_str())
    }

    fn io(&self, name: &RunName, error: io::Error) -> BoardError {
        BoardError::Io(self.path(name), error)
    }
}

/// This machine's name, for the names of files.
fn host() -> String {
    let name = hostname::get().unwrap_or_default();
    match name.is_empty() {
        true => "unknown".into(),
        false => name.to_string_lossy().into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use cohort_common::api::EvalEvent;
    use cohort_common::tensorboard::{Item, read};
    use tempfile::TempDir;

    use super::*;
    use crate::record::record_event;
    use crate::store::StepRow;
    use crate::store::tests::{name, new_run, store_with_run};

    fn commit(store: &Store, run: &str, step: u64, time_ms: u64) {
        let row = StepRow {
            step,
            horizon: 100,
            loss: step as f64,
            grad_norm: 1.0,
            learning_rate: 0.1,
            tokens: 10 * step,
            tokens_per_second: 5.0,
            epoch: 0.0,
            bits_per_byte: None,
            mfu: None,
            skipped: false,
            time_ms,
        };
        store.record_step(&name(run), &row).unwrap();
        let text = step.to_string();
        let (run, time) = (name(run), time_ms + 1);
        store.record_event(Some(&run), time, "step", &text).unwrap();
    }

    fn validate(store: &Store, step: u64) {
        let eval = EvalEvent {
            run: "tiny-1".into(),
            step,
            split: "validation".into(),
            loss: 9.0,
            bits_per_byte: None,
            tokens: 1,
            classes: None,
        };
        let row = crate::store::EvalRow {
            step,
            split: eval.split.clone(),
            loss: eval.loss,
            bits_per_byte: None,
            weight: 1.0,
            bytes: 1,
            confusion: Vec::new(),
        };
        store.record_eval(&name("tiny-1"), &row).unwrap();
        record_event(store, &name("tiny-1"), &RunEvent::Eval(eval)).unwrap();
    }

    /// Steps of a curve as the files have them, and how often points were taken back.
    fn curve(directory: &Path, run: &str, wanted: &str) -> (Vec<u64>, usize) {
        let entries = std::fs::read_dir(directory.join(run)).unwrap();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let (mut steps, mut restarts) = (Vec::new(), 0);
        for file in files {
            let take = |item| match item {
                Item::Scalar { tag, step, .. } if tag == wanted => steps.push(step),
                Item::Restart { .. } => restarts += 1,
                _ => {}
            };
            read(&file, take).unwrap();
        }
        (steps, restarts)
    }

    fn scene() -> (TempDir, Store, PathBuf) {
        let (dir, store) = store_with_run("tiny-1");
        let directory = dir.path().join("board");
        std::fs::create_dir(&directory).unwrap();
        (dir, store, directory)
    }

    #[test]
    fn a_run_is_followed_and_what_was_missed_is_caught_up_without_doubling() {
        let (_dir, store, directory) = scene();
        let open = || {
            let reader = Store::open_read_only(store.path()).unwrap();
            Boards::open(reader, &directory).unwrap()
        };
        commit(&store, "tiny-1", 1, 1000);
        validate(&store, 0);
        let mut boards = open();
        boards.look().unwrap();
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);

        commit(&store, "tiny-1", 2, 2000);
        validate(&store, 2);
        boards.look().unwrap();
        assert_eq!(curve(&directory, "tiny-1", "train/loss"), (vec![1, 2], 0));
        assert_eq!(
            curve(&directory, "tiny-1", "validation/loss"),
            (vec![0, 2], 0)
        );
        commit(&store, "tiny-1", 3, 3000);
        boards.look().unwrap();
        drop(boards);

        // The next one was not there when these steps were committed.
        commit(&store, "tiny-1", 4, 4000);
        let mut boards = open();
        boards.look().unwrap();
        commit(&store, "tiny-1", 5, 5000);
        boards.look().unwrap();
        let expected = (vec![1, 2, 3, 4, 5], 0);
        assert_eq!(curve(&directory, "tiny-1", "train/loss"), expected);
        let validations = curve(&directory, "tiny-1", "validation/loss");
        assert_eq!(validations, (vec![0, 2], 0));
    }

    #[test]
    fn steps_that_are_made_again_replace_what_was_there() {
        let (_dir, store, directory) = scene();
        let reader = Store::open_read_only(store.path()).unwrap();
        let mut boards = Boards::open(reader, &directory).unwrap();
        (1..=3).for_each(|step| commit(&store, "tiny-1", step, 1000 * step));
        boards.look().unwrap();
        store.truncate(&name("tiny-1"), 1).unwrap();
        commit(&store, "tiny-1", 2, 9000);
        boards.look().unwrap();
        let (steps, restarts) = curve(&directory, "tiny-1", "train/loss");
        assert_eq!((&steps[..], restarts), (&[1, 2, 3, 2][..], 1));

        // A run of the same name that has taken its place meanwhile.
        store.delete_run(&name("tiny-1")).unwrap();
        store.create_run(&new_run("tiny-1"), 1).unwrap();
        commit(&store, "tiny-1", 1, 20_000);
        commit(&store, "tiny-1", 2, 21_000);
        let reader = Store::open_read_only(store.path()).unwrap();
        drop(Boards::open(reader, &directory).unwrap());
        let (steps, restarts) = curve(&directory, "tiny-1", "train/loss");
        assert_eq!((&steps[4..], restarts), (&[1, 2][..], 2));
    }

    #[test]
    fn a_run_that_rests_keeps_no_file_open_and_one_that_is_gone_harms_none() {
        let (_dir, store, directory) = scene();
        let reader = Store::open_read_only(store.path()).unwrap();
        let mut boards = Boards::open(reader, &directory).unwrap();
        store.create_run(&new_run("gone"), 1).unwrap();
        commit(&store, "tiny-1", 1, 1000);
        let stopped = RunEvent::Stopped {
            run: "tiny-1".into(),
            step: 1,
        };
        record_event(&store, &name("tiny-1"), &stopped).unwrap();
        commit(&store, "gone", 1, 1000);
        boards.look().unwrap();
        assert_eq!(boards.open.len(), 1);
        commit(&store, "gone", 2, 2000);
        store.delete_run(&name("gone")).unwrap();
        boards.look().unwrap();
        assert_eq!(curve(&directory, "tiny-1", "train/loss"), (vec![1], 0));
    }
}
