//! Whether a step is out of the ordinary, judged by the steps before it. Pure, and a function of the ledger alone: any
//! cluster, after any restart, and any run that goes on from a checkpoint, judges every step alike.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::ids::Step;
use crate::ledger::Entry;
use crate::spec::{WatchdogAction, WatchdogConfig};

/// The least deviation that counts as one, as a share of the mean: figures that hardly move are no measure.
const LEAST_DEVIATION: f64 = 0.01;

/// The figures of a step that are judged.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    loss: f64,
    grad_norm: f64,
}

/// What a run's ledger says of the steps so far, as far as later ones are judged by it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Of steps whose update was made.
    applied: BTreeMap<Step, Figures>,
    /// Steps that were committed without their update.
    skipped: BTreeSet<Step>,
}

/// What is out of the ordinary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// The mean loss.
    Loss,
    /// The norm of the mean gradient before clipping.
    GradNorm,
}

impl Figure {
    /// Its word, as in events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::GradNorm => "grad_norm",
        }
    }
}

/// A step out of the ordinary.
#[derive(Clone, Debug, PartialEq)]
pub struct Anomaly {
    /// The step.
    pub step: Step,
    /// Which of its figures.
    pub what: Figure,
    /// Its value.
    pub value: f64,
    /// Mean and standard deviation of the steps before; `None` where the value is no finite number, or there are none.
    pub usual: Option<(f64, f64)>,
    /// What becomes of the step.
    pub action: WatchdogAction,
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (step, value) = (self.step, self.value);
        let what = match self.what {
            Figure::Loss => "loss",
            Figure::GradNorm => "gradient norm",
        };
        match self.usual {
            Some((mean, deviation)) => write!(
                f,
                "step {step}: the {what} of {value:.4} lies {:.1} standard deviations above the mean of {mean:.4}",
                (value - mean) / deviation
            )?,
            None => write!(f, "step {step}: the {what} is not finite")?,
        }
        match self.action.skips() {
            true => f.write_str("; its update was skipped"),
            false => Ok(()),
        }
    }
}

impl History {
    /// Takes in the entry of a step. One that is there already is replaced.
    pub fn push(&mut self, entry: &Entry) {
        let step = entry.step;
        if entry.skipped {
            self.applied.remove(&step);
            self.skipped.insert(step);
            return;
        }
        self.skipped.remove(&step);
        let (loss, grad_norm) = (entry.loss(), entry.grad_norm);
        self.applied.insert(step, Figures { loss, grad_norm });
    }

    /// Takes in that a step was skipped.
    pub fn push_skipped(&mut self, step: Step) {
        self.skipped.insert(step);
    }

    /// Updates that a state has seen which stands at `step`: the optimizer's count.
    pub fn updates(&self, step: Step) -> u64 {
        step - self.skipped.range(..=step).count() as u64
    }

    /// Steps up to this one that were skipped without one between them.
    pub fn skipped_in_a_row(&self, step: Step) -> u64 {
        let back = self.skipped.range(..=step).rev().zip(0u64..);
        back.take_while(|(at, n)| **at + n == step).count() as u64
    }

    /// Whether a step is out of the ordinary. Only what was committed before it counts.
    pub fn judge(&self, watchdog: &WatchdogConfig, entry: &Entry) -> Option<Anomaly> {
        let anomaly = |what, value, usual| Anomaly {
            step: entry.step,
            what,
            value,
            usual,
            action: watchdog.action,
        };
        let figures = [
            (Figure::Loss, entry.loss()),
            (Figure::GradNorm, entry.grad_norm),
        ];
        if let Some((what, value)) = figures.into_iter().find(|(_, value)| !value.is_finite()) {
            return Some(anomaly(what, value, None));
        }
        let before = self.applied.range(..entry.step).rev();
        let mut window: Vec<Figures> = before
            .take(watchdog.window as usize)
            .map(|(_, figures)| *figures)
            .collect();
        if (window.len() as u64) < watchdog.least_history() {
            return None;
        }
        // Oldest first: one order of summation for everybody.
        window.reverse();
        figures.into_iter().find_map(|(what, value)| {
            let of = |f: &Figures| match what {
                Figure::Loss => f.loss,
                Figure::GradNorm => f.grad_norm,
            };
            let (mean, deviation) = spread(window.iter().map(of));
            let most = mean + watchdog.sigma * deviation;
            (value > most).then(|| anomaly(what, value, Some((mean, deviation))))
        })
    }

    /// Why the run is to pause where its state stands at `step`: that step was skipped and the spec wants it so, or as
    /// many as the window has were, one after another. Each further window of them is a reason again.
    pub fn pause(&self, watchdog: &WatchdogConfig, step: Step) -> Option<Pause> {
        let row = self.skipped_in_a_row(step);
        match watchdog.action {
            WatchdogAction::Pause if row > 0 => Some(Pause::Anomaly { step }),
            WatchdogAction::Skip if row > 0 && row.is_multiple_of(watchdog.window) => {
                Some(Pause::InARow { step, row })
            }
            _ => None,
        }
    }

    /// Steps after this one count no more.
    pub fn withdraw(&mut self, after: Step) {
        self.applied.retain(|step, _| *step <= after);
        self.skipped.retain(|step| *step <= after);
    }

    /// Forgets the figures that no step is judged by any more, if the run goes on from the state of `durable` or from any
    /// after `floor`.
    pub fn forget(&mut self, watchdog: &WatchdogConfig, durable: Step, floor: Step) {
        let begin = |end: Step| {
            let mut back = self.applied.range(..=end).rev();
            back.nth(watchdog.window as usize - 1)
                .map_or(0, |(s, _)| *s)
        };
        let (old, new) = (begin(durable), begin(floor));
        self.applied
            .retain(|step, _| *step >= new || (*step >= old && *step <= durable));
    }
}

/// Mean and standard deviation, the latter not below its least.
fn spread(values: impl ExactSizeIterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let squares: f64 = values.map(|v| (v - mean) * (v - mean)).sum();
    let least = (LEAST_DEVIATION * mean.abs()).max(f64::MIN_POSITIVE);
    (mean, (squares / count).sqrt().max(least))
}

/// Why the watchdog pauses a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// A step was skipped, and the spec wants a pause then.
    Anomaly {
        /// The step.
        step: Step,
    },
    /// Many steps were skipped without one between them.
    InARow {
        /// The last one.
        step: Step,
        /// How many.
        row: u64,
    },
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anomaly { step } => write!(
                f,
                "the watchdog paused the run: step {step} was out of the ordinary and was committed without its update"
            ),
            Self::InARow { step, row } => write!(
                f,
                "the watchdog paused the run: the last {row} steps up to step {step} were out of the ordinary, and all of them were committed without their updates"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::messages::LaneSums;

    fn entry(step: Step, loss: f64, grad_norm: f64) -> Entry {
        let sums = LaneSums { loss, weight: 1.0 };
        Entry {
            step,
            first_position: step - 1,
            samples: 1,
            lanes: vec![sums],
            loss_sum: loss,
            weight: 1.0,
            grad_norm,
            learning_rate: 0.1,
            root_hash: [0; 32],
            state_hash_before: None,
            skipped: false,
            previous: [0; 32],
        }
    }

    fn skipped(step: Step) -> Entry {
        Entry {
            skipped: true,
            ..entry(step, 99.0, 1.0)
        }
    }

    /// Steps 1 to `last`: losses go between 2 and 4, norms between 0.5 and 1.5.
    fn history(last: Step) -> History {
        let mut history = History::default();
        for step in 1..=last {
            let sign = if step % 2 == 0 { 1.0 } else { -1.0 };
            history.push(&entry(step, 3.0 + sign, 1.0 + sign / 2.0));
        }
        history
    }

    fn watchdog(window: u64, action: WatchdogAction) -> WatchdogConfig {
        WatchdogConfig {
            sigma: 3.0,
            window,
            action,
        }
    }

    #[test]
    fn a_figure_far_above_the_mean_of_the_window_is_out_of_the_ordinary() {
        let tell = watchdog(40, WatchdogAction::Tell);
        let history = history(40);
        // Mean 3 and deviation 1; mean 1 and deviation 0.5.
        assert_eq!(history.judge(&tell, &entry(41, 6.0, 2.5)), None);
        let loss = history.judge(&tell, &entry(41, 6.001, 2.5)).unwrap();
        assert_eq!((loss.what, loss.usual), (Figure::Loss, Some((3.0, 1.0))));
        let norm = history.judge(&tell, &entry(41, 6.0, 2.6)).unwrap();
        assert_eq!(
            norm.to_string(),
            "step 41: the gradient norm of 2.6000 lies 3.2 standard deviations above the mean of 1.0000"
        );
        // Far below is no harm.
        assert_eq!(history.judge(&tell, &entry(41, -90.0, 0.0)), None);
    }

    #[test]
    fn nothing_is_judged_by_too_few_steps_but_what_is_not_finite() {
        let tell = watchdog(60, WatchdogAction::Skip);
        let absurd = entry(30, 1e9, 1.0);
        assert_eq!(history(29).judge(&tell, &absurd), None);
        let absurd = entry(31, 1e9, 1.0);
        assert!(history(30).judge(&tell, &absurd).is_some());
        assert_eq!(watchdog(20, WatchdogAction::Skip).least_history(), 20);
        let infinite = entry(1, 1.0, f64::INFINITY);
        let found = history(0).judge(&tell, &infinite).unwrap();
        assert_eq!(
            found.to_string(),
            "step 1: the gradient norm is not finite; its update was skipped"
        );
    }

    #[test]
    fn figures_that_hardly_move_are_no_measure() {
        let mut history = History::default();
        (1..=30).for_each(|step| history.push(&entry(step, 2.0, 0.0)));
        let tell = watchdog(30, WatchdogAction::Tell);
        assert_eq!(history.judge(&tell, &entry(31, 2.05, 0.0)), None);
        assert!(history.judge(&tell, &entry(31, 2.07, 0.0)).is_some());
    }

    #[test]
    fn skipped_steps_count_as_steps_but_not_as_updates_and_are_no_measure() {
        let mut history = history(30);
        let same = history.clone();
        history.push(&skipped(31));
        history.push(&skipped(32));
        assert_eq!((history.updates(30), history.updates(32)), (30, 30));
        assert_eq!(history.skipped_in_a_row(32), 2);
        assert_eq!(history.skipped_in_a_row(30), 0);
        let tell = watchdog(20, WatchdogAction::Tell);
        let next = entry(33, 7.0, 1.0);
        assert_eq!(history.judge(&tell, &next), same.judge(&tell, &next));
        history.withdraw(31);
        assert_eq!(history.updates(32), 31);
        // A step that is made again may come out otherwise.
        history.push(&entry(31, 3.0, 1.0));
        assert_eq!(history.updates(31), 31);
    }

    #[test]
    fn a_run_pauses_where_the_spec_wants_it_or_where_a_window_was_skipped() {
        let (pause, skip) = (
            watchdog(20, WatchdogAction::Pause),
            watchdog(20, WatchdogAction::Skip),
        );
        let mut history = history(30);
        assert_eq!(history.pause(&pause, 30), None);
        for step in 31..=70 {
            history.push(&skipped(step));
            let row = step - 30;
            assert_eq!(history.pause(&pause, step), Some(Pause::Anomaly { step }));
            let due = (row == 20 || row == 40).then_some(Pause::InARow { step, row });
            assert_eq!(history.pause(&skip, step), due);
        }
        assert_eq!(history.pause(&watchdog(20, WatchdogAction::Tell), 70), None);
    }

    #[test]
    fn what_is_forgotten_changes_no_judgement() {
        let skip = watchdog(20, WatchdogAction::Skip);
        let whole = history(200);
        let mut short = whole.clone();
        short.forget(&skip, 50, 190);
        assert_eq!(short.applied.len(), 20 + 20 + 10);
        for step in [51, 191, 195, 201] {
            let next = entry(step, 7.0, 1.0);
            assert_eq!(short.judge(&skip, &next), whole.judge(&skip, &next));
        }
        // Steps that are made again after a loss fill the gap.
        for step in 51..=190 {
            short.push(&entry(step, 3.0, 1.0));
            short.forget(&skip, 50, step - 8);
            let next = entry(step + 1, 1e3, 1.0);
            assert!(short.judge(&skip, &next).is_some());
        }
    }
}
