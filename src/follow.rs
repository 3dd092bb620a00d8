//! Shows what happens while something takes long: a bar for bytes, and the progress of a run from its events.
//!
//! Everything here goes to stderr. Where stderr is no terminal, a run becomes plain lines, now and then.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use cohort_common::api::{Classes, FinishedEvent, RunEvent, SampleInfo, StepEvent};
use cohort_common::spec::{counted, human_bytes, human_count};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ratatui::crossterm::terminal::size;

use crate::output::{duration, one_line, or_nothing};
use crate::step_line;

/// Least and most time between plain lines of steps; in between it is [`PLAIN_SHARE`] of the time so far.
const PLAIN_EVERY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// See [`PLAIN_EVERY`].
const PLAIN_SHARE: u32 = 20;
/// Columns of a sample where there is no terminal.
const PLAIN_COLUMNS: usize = 100;
/// Weight of the newest step in the smoothed time per step.
const SMOOTHING: f64 = 0.1;
/// Columns of a run's bar with the space behind it.
const BAR: usize = 20;
/// Terminals that are narrower have no room for the bar.
const BAR_FROM: usize = 90;
/// The width where the terminal does not tell its own.
const USUAL_WIDTH: usize = 80;

/// A bar that counts bytes; invisible where stderr is no terminal.
#[derive(Clone)]
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar of that many bytes; 0 means that nobody knows.
    pub fn bytes(what: &str, total: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let template = "{msg:<11} {bar:24} {percent:>3} %  {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        Self(bar)
    }

    /// So many more.
    pub fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// So many of so many.
    pub fn set(&self, done: u64, total: u64) {
        self.0.set_length(total.max(done));
        self.0.set_position(done);
    }

    /// Takes it away.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// Shows the progress of a run.
pub struct Progress {
    bar: Option<StepBar>,
    /// Steps up to here are old and are not shown one by one.
    old: u64,
    last: Option<StepEvent>,
    seconds_per_step: Option<f64>,
    begun: Instant,
    last_line: Option<Instant>,
}

impl Progress {
    /// Shows a run whose first `old` steps are history.
    pub fn new(old: u64) -> Self {
        Self {
            bar: std::io::stderr().is_terminal().then(StepBar::new),
            old,
            last: None,
            seconds_per_step: None,
            begun: Instant::now(),
            last_line: None,
        }
    }

    /// Shows an event.
    pub fn show(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Step(step) => self.step(step),
            RunEvent::Finished(_)
            | RunEvent::Stopped { .. }
            | RunEvent::Paused { .. }
            | RunEvent::Cancelled { .. }
            | RunEvent::Failed { .. } => self.clear(),
            _ => {
                if let Some(line) = describe(event) {
                    self.print(&line);
                }
            }
        }
    }

    /// Prints a line above the bar.
    pub fn print(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.bar.finish_and_clear();
        }
    }

    fn step(&mut self, step: &StepEvent) {
        self.measure(step);
        let left = step.steps.saturating_sub(step.step) as f64;
        let eta = self.seconds_per_step.map(|seconds| seconds * left);
        let fresh = step.step > self.old;
        if let Some(bar) = &mut self.bar {
            bar.show(step, eta);
        } else if fresh && (step.step == step.steps || self.line_due()) {
            eprintln!("{}", step_line::line(step, eta, usize::MAX));
            self.last_line = Some(Instant::now());
        }
        self.last = Some(step.clone());
    }

    fn line_due(&self) -> bool {
        let due = self.begun.elapsed() / PLAIN_SHARE;
        let due = due.clamp(PLAIN_EVERY.0, PLAIN_EVERY.1);
        self.last_line.is_none_or(|at| at.elapsed() >= due)
    }

    fn measure(&mut self, step: &StepEvent) {
        let before = self.last.as_ref().filter(|last| last.step + 1 == step.step);
        let tokens = match before {
            Some(last) => step.tokens.saturating_sub(last.tokens),
            None => step.tokens / step.step.max(1),
        };
        if step.tokens_per_second > 0.0 {
            let seconds = tokens as f64 / step.tokens_per_second;
            let smooth = |old: f64| old + SMOOTHING * (seconds - old);
            self.seconds_per_step = Some(self.seconds_per_step.map_or(seconds, smooth));
        }
    }
}

/// The bar of a run, with the line of its newest step behind it.
struct StepBar {
    bar: ProgressBar,
    /// The terminal's width that the bar was last drawn for.
    width: usize,
}

impl StepBar {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        Self { bar, width: 0 }
    }

    fn show(&mut self, step: &StepEvent, eta: Option<f64>) {
        let width = size().map_or(0, |(columns, _)| usize::from(columns));
        let width = if width == 0 { USUAL_WIDTH } else { width };
        let bar = if width >= BAR_FROM { BAR } else { 0 };
        if width != self.width {
            self.width = width;
            let template = match bar {
                0 => "{wide_msg}",
                _ => "{bar:18}  {wide_msg}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.bar.set_style(style.progress_chars("=> "));
            }
        }
        self.bar.set_length(step.steps);
        self.bar.set_position(step.step);
        self.bar
            .set_message(step_line::line(step, eta, width - bar));
    }
}

/// An event in words; `None` for those that are shown in another way.
fn describe(event: &RunEvent) -> Option<String> {
    Some(match event {
        RunEvent::Queued { run, place } => match place {
            1 => format!("{run} waits in the queue; it is next"),
            _ => format!("{run} waits in the queue, place {place}"),
        },
        RunEvent::Waiting { run, have, need } => {
            format!("{run} waits for workers: {have} of {need} are there")
        }
        RunEvent::Loading { workers, step, .. } => {
            let workers = counted(*workers, "worker");
            format!("loading the state of step {step} on {workers}")
        }
        RunEvent::Training { run, workers } => {
            format!("{run} trains on {}", counted(*workers, "worker"))
        }
        RunEvent::Eval(eval) => {
            let split = eval.split.replace('_', " ");
            let bits = eval.bits_per_byte;
            let bits = bits.map_or(String::new(), |bits| format!(", {bits:.4} bits per byte"));
            let told = |c: &Classes| {
                let percent = 100.0 * c.accuracy;
                format!(", accuracy {percent:.2} %, macro-F1 {:.4}", c.macro_f1)
            };
            let told = eval.classes.as_ref().map_or(String::new(), told);
            format!(
                "step {}: {split} loss {:.4}{bits}{told}",
                eval.step, eval.loss
            )
        }
        RunEvent::Checkpoint { checkpoint, .. } => format!(
            "step {}: checkpoint of {} in {}",
            checkpoint.step,
            human_bytes(checkpoint.bytes),
            checkpoint.path
        ),
        RunEvent::Anomaly(anomaly) => anomaly.text.clone(),
        RunEvent::Note { text, .. } => text.clone(),
        RunEvent::Sample(sample) => written(sample, columns()),
        RunEvent::WorkerLost { .. }
        | RunEvent::Redone { .. }
        | RunEvent::WorkerJoined { .. }
        | RunEvent::WorkerLeft { .. } => event.membership()?,
        RunEvent::Step(_)
        | RunEvent::Finished(_)
        | RunEvent::Stopped { .. }
        | RunEvent::Paused { .. }
        | RunEvent::Cancelled { .. }
        | RunEvent::Failed { .. } => return None,
    })
}

/// What the model of a step writes after a prompt, in two lines.
fn written(sample: &SampleInfo, columns: usize) -> String {
    let step = sample.step;
    let prompt = one_line(
        &format!("step {step}: after {}", or_nothing(&sample.prompt)),
        columns,
    );
    let text = one_line(&format!("  {}", or_nothing(&sample.text)), columns);
    format!("{prompt}\n{text}")
}

/// Columns of the terminal, or those of a plain line.
fn columns() -> usize {
    match console::Term::stderr().size_checked() {
        Some((_, columns)) if columns > 0 => columns.into(),
        _ => PLAIN_COLUMNS,
    }
}

/// The end of a run, for people.
pub fn summary(end: &FinishedEvent) -> String {
    let mut lines = vec![format!("finished    {} after step {}", end.run, end.step)];
    if let Some(loss) = end.train_loss {
        lines.push(format!("training    loss {loss:.4} in the last step"));
    }
    if let (Some(loss), Some(bits)) = (end.val_loss, end.val_bits_per_byte) {
        lines.push(format!(
            "validation  loss {loss:.4}, {bits:.4} bits per byte"
        ));
    }
    let mut time = format!(
        "time        {} since it was taken up",
        duration(end.seconds)
    );
    if let Some(speed) = end.tokens_per_second {
        time += &format!(", {} tokens/s", human_count(speed as u64));
    }
    time += &format!("; {} tokens in all", human_count(end.tokens));
    lines.push(time);
    if let Some(hash) = &end.state_hash {
        lines.push(format!("state       {hash}"));
    }
    if let Some(path) = &end.checkpoint {
        lines.push(format!("checkpoint  {path}"));
    }
    lines.join("\n")
}
