//! A run's directory for TensorBoard: what Cohort tells of it, each point once.
//!
//! Nothing is remembered beside the event files: whoever goes on with a directory reads in it what is there already. A
//! file that was cut off when its writer was killed is read up to there.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use super::format::{Item, Writer, read};
use crate::api::{EvalEvent, SampleInfo, StepMetrics};

/// The curve by which the steps that are there are known: every step has it.
const LOSS: &str = "train/loss";

/// A directory of event files of one run.
#[derive(Debug)]
pub struct Board {
    directory: PathBuf,
    host: String,
    writer: Option<Writer>,
    /// The last step that is there, and when it was committed.
    last: Option<(u64, u64)>,
    /// Validations and samples that are there: step and curve.
    once: BTreeSet<(u64, String)>,
}

impl Board {
    /// Opens a run's directory, which need not exist, and reads what is there. The first point begins a new file, whose
    /// name has the host.
    pub fn open(directory: &Path, host: &str) -> io::Result<Self> {
        let mut board = Self {
            directory: directory.to_owned(),
            host: host.to_owned(),
            writer: None,
            last: None,
            once: BTreeSet::new(),
        };
        for file in event_files(directory)? {
            read(&file, |item| board.take(item))?;
        }
        Ok(board)
    }

    /// The last step that is there, and when it was committed, in milliseconds since the epoch.
    pub fn last(&self) -> Option<(u64, u64)> {
        self.last
    }

    /// The step after which the run is to be written on; 0 for all of it. `committed` says when the run's step of the number
    /// of [`last`](Self::last) was committed, in milliseconds since the epoch. If that is another step than the one that is
    /// there, made again or of another run, nothing that is there counts any more.
    pub fn go_on(&mut self, committed: Option<u64>, now_ms: u64) -> io::Result<u64> {
        let Some((last, time)) = self.last else {
            return Ok(0);
        };
        // A time that is not known is believed: what stood there after it was taken back.
        if committed.is_some_and(|committed| committed == time || time == 0) {
            return Ok(last);
        }
        self.forget(0, now_ms)?;
        Ok(0)
    }

    /// A step. One that is there already, or comes after it, is replaced by this one and whatever follows.
    pub fn step(&mut self, row: &StepMetrics) -> io::Result<()> {
        if self.last.is_some_and(|(last, _)| row.step <= last) {
            self.forget(row.step, row.time_ms)?;
        }
        let known = [
            (LOSS, Some(row.loss.unwrap_or(f64::NAN))),
            ("train/bits_per_byte", row.bits_per_byte),
            ("train/grad_norm", row.grad_norm),
            ("train/learning_rate", row.learning_rate),
            ("train/tokens", Some(row.tokens as f64)),
            ("train/epoch", Some(row.epoch)),
            ("train/tokens_per_second", row.tokens_per_second),
            ("train/mfu", row.mfu),
        ];
        let points: Vec<(&str, f64)> = known
            .into_iter()
            .filter_map(|(tag, value)| Some((tag, value?)))
            .collect();
        self.writer(row.time_ms)?
            .scalars(row.time_ms, row.step, &points)?;
        self.last = Some((row.step, row.time_ms));
        Ok(())
    }

    /// A validation, unless it is there already.
    pub fn eval(&mut self, eval: &EvalEvent, time_ms: u64) -> io::Result<()> {
        let tag = |what: &str| format!("{}/{what}", eval.split);
        if !self.once.insert((eval.step, tag("loss"))) {
            return Ok(());
        }
        let classes = eval.classes.as_ref();
        let known = [
            (tag("loss"), Some(eval.loss)),
            (tag("bits_per_byte"), eval.bits_per_byte),
            (tag("accuracy"), classes.map(|c| c.accuracy)),
            (tag("macro_f1"), classes.map(|c| c.macro_f1)),
        ];
        let points: Vec<(&str, f64)> = known
            .iter()
            .filter_map(|(tag, value)| Some((tag.as_str(), (*value)?)))
            .collect();
        self.writer(time_ms)?.scalars(time_ms, eval.step, &points)
    }

    /// What a model wrote after a prompt, unless it is there already.
    pub fn sample(&mut self, sample: &SampleInfo, time_ms: u64) -> io::Result<()> {
        let tag = format!("samples/{}", sample.index);
        if !self.once.insert((sample.step, tag.clone())) {
            return Ok(());
        }
        let text = literal(&format!("{}{}", sample.prompt, sample.text));
        self.writer(time_ms)?
            .text(time_ms, sample.step, &tag, &text)
    }

    /// What is there from `step` on no longer counts.
    pub fn forget(&mut self, step: u64, time_ms: u64) -> io::Result<()> {
        self.writer(time_ms)?.restart(time_ms, step)?;
        self.take(Item::Restart { step });
        Ok(())
    }

    /// Hands what was written to the operating system.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.as_mut().map_or(Ok(()), Writer::flush)
    }

    fn writer(&mut self, time_ms: u64) -> io::Result<&mut Writer> {
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => {
                std::fs::create_dir_all(&self.directory)?;
                Writer::create(&self.directory, &self.host, time_ms)?
            }
        };
        Ok(self.writer.insert(writer))
    }

    fn take(&mut self, item: Item) {
        match item {
            Item::Scalar {
                tag, step, time_ms, ..
            } if tag.starts_with("train/") => {
                if tag == LOSS {
                    self.last = Some((step, time_ms));
                }
            }
            Item::Scalar { tag, step, .. } | Item::Text { tag, step, .. } => {
                self.once.insert((step, tag));
            }
            Item::Restart { step } => {
                self.once.retain(|(at, _)| *at < step);
                // When the step before was committed is not asked for: nobody replaces a step that still counts.
                self.last = self
                    .last
                    .map(|(last, time)| match last < step {
                        true => (last, time),
                        false => (step.saturating_sub(1), 0),
                    })
                    .filter(|(last, _)| *last > 0);
            }
        }
    }
}

/// The event files of a directory, in the order in which TensorBoard reads them; none where it does not exist.
fn event_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains("tfevents") {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Text as Markdown that shows it as it is.
fn literal(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| format!("    {line}")).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, loss: f64) -> StepMetrics {
        StepMetrics {
            step,
            tokens: 100 * step,
            time_ms: 1_700_000_000_000 + 10 * step,
            loss: Some(loss),
            ..StepMetrics::default()
        }
    }

    fn eval(step: u64) -> EvalEvent {
        EvalEvent {
            run: "r".into(),
            step,
            split: "validation".into(),
            loss: 3.0,
            bits_per_byte: None,
            tokens: 9,
            classes: None,
        }
    }

    /// The points of a curve that count, as TensorBoard finds them.
    fn curve(directory: &Path, wanted: &str) -> Vec<(u64, f32)> {
        let mut points = Vec::new();
        for file in event_files(directory).unwrap() {
            let take = |item| match item {
                Item::Scalar {
                    tag, step, value, ..
                } if tag == wanted => points.push((step, value)),
                Item::Restart { step } => points.retain(|(at, _)| *at < step),
                _ => {}
            };
            read(&file, take).unwrap();
        }
        points
    }

    #[test]
    fn whoever_goes_on_doubles_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("deep").join("run");
        let sample = SampleInfo {
            run: "r".into(),
            step: 2,
            index: 0,
            prompt: "Once".into(),
            text: " upon\n# a".into(),
        };
        for last in [2, 4] {
            let mut board = Board::open(&runs, "host").unwrap();
            let from = board.last().map_or(1, |(step, _)| step + 1);
            (from..=last).for_each(|n| board.step(&step(n, 5.0)).unwrap());
            board.eval(&eval(0), 1).unwrap();
            board.eval(&eval(2), 1).unwrap();
            board.sample(&sample, 1).unwrap();
            board.flush().unwrap();
        }
        let board = Board::open(&runs, "host").unwrap();
        assert_eq!(board.last(), Some((4, 1_700_000_000_040)));
        assert_eq!(event_files(&runs).unwrap().len(), 2);
        let steps: Vec<u64> = curve(&runs, LOSS).iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert_eq!(curve(&runs, "validation/loss"), [(0, 3.0), (2, 3.0)]);
        assert_eq!(literal("Once upon\n# a"), "    Once upon\n    # a");
        drop(board);
        assert_eq!(event_files(&runs).unwrap().len(), 2, "nothing was written");
    }

    #[test]
    fn a_step_that_is_made_again_takes_the_place_of_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = Board::open(dir.path(), "host").unwrap();
        (1..=4).for_each(|n| board.step(&step(n, 5.0)).unwrap());
        board.eval(&eval(4), 1).unwrap();
        board.step(&step(3, 6.0)).unwrap();
        assert_eq!(board.last().map(|(step, _)| step), Some(3));
        board.step(&step(4, 7.0)).unwrap();
        board.eval(&eval(4), 1).unwrap();
        board.flush().unwrap();
        assert_eq!(
            curve(dir.path(), LOSS),
            [(1, 5.0), (2, 5.0), (3, 6.0), (4, 7.0)]
        );
        assert_eq!(curve(dir.path(), "validation/loss"), [(4, 3.0)]);
        let mut again = Board::open(dir.path(), "host").unwrap();
        assert_eq!(again.last(), board.last());
        let time = step(4, 0.0).time_ms;
        assert_eq!(again.go_on(Some(time), 1).unwrap(), 4);
        assert_eq!(again.go_on(Some(time + 1), 1).unwrap(), 0);
        assert_eq!(again.last(), None);
        board.forget(4, 1).unwrap();
        assert_eq!(board.go_on(Some(time - 10), 1).unwrap(), 3);
        assert_eq!(board.go_on(None, 1).unwrap(), 0);
    }
}
