//! Whether a run ends before its last step, by what its validations have found. Pure, and a function of the losses alone:
//! any cluster, and any run that goes on from a checkpoint, decides the same at the same step.

use std::collections::BTreeMap;

use crate::ids::Step;
use crate::spec::TrainConfig;

/// The losses of a run's validations so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Losses {
    /// On the run's own validation text.
    pub own: BTreeMap<Step, f64>,
    /// On that of the run it started from.
    pub base: BTreeMap<Step, f64>,
}

/// Why a run ends before its last step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// No validation was better than the best for too long.
    Patience {
        /// The step of the best.
        best: Step,
        /// Its loss.
        loss: f64,
        /// Validations since.
        since: u32,
    },
    /// Too much of the base was forgotten.
    Forgetting {
        /// The base's loss at the start.
        before: f64,
        /// And now.
        now: f64,
        /// How much it may rise.
        most: f64,
    },
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Patience { best, loss, since } => write!(
                f,
                "the run ends early: none of the last {since} validations was better than {loss:.4} at step {best}"
            ),
            Self::Forgetting { before, now, most } => write!(
                f,
                "the run ends early: the loss on the base's validation text has risen from {before:.4} to {now:.4}, by more \
                 than `train.max_forgetting` = {most}; less steps, a lower rate, `--replay 0.05` or `--lora` forget less"
            ),
        }
    }
}

impl Losses {
    /// Whether a run whose state stands at `step` ends there.
    pub fn verdict(&self, train: &TrainConfig, step: Step) -> Option<Verdict> {
        self.forgotten(train, step)
            .or_else(|| self.waited(train, step))
    }

    fn waited(&self, train: &TrainConfig, step: Step) -> Option<Verdict> {
        let patience = train.early_stopping_patience?;
        let so_far = || self.own.range(..=step);
        // The first of equals: an equal loss is no progress.
        let best = so_far().reduce(|best, next| if next.1 < best.1 { next } else { best });
        let (&best, &loss) = best?;
        let since = so_far().filter(|(at, _)| **at > best).count() as u32;
        let here = self.own.contains_key(&step);
        (here && since >= patience).then_some(Verdict::Patience { best, loss, since })
    }

    fn forgotten(&self, train: &TrainConfig, step: Step) -> Option<Verdict> {
        let most = train.max_forgetting?;
        let (&before, &now) = (self.base.get(&0)?, self.base.get(&step)?);
        let over = step > 0 && now - before > most;
        over.then_some(Verdict::Forgetting { before, now, most })
    }
}

/// Whether validations can end the run early.
pub fn may_end_early(train: &TrainConfig) -> bool {
    train.early_stopping_patience.is_some() || train.max_forgetting.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::simulation::plan;

    fn losses(own: &[f64], base: &[f64]) -> Losses {
        let steps = |losses: &[f64]| (0..).step_by(10).zip(losses.iter().copied()).collect();
        Losses {
            own: steps(own),
            base: steps(base),
        }
    }

    fn train(patience: Option<u32>, most: Option<f64>) -> TrainConfig {
        TrainConfig {
            early_stopping_patience: patience,
            max_forgetting: most,
            ..plan(4, 100).spec.train.clone()
        }
    }

    #[test]
    fn a_run_ends_after_as_many_validations_without_a_new_best_as_it_has_patience() {
        let losses = losses(&[5.0, 4.0, 4.5, 4.0, 3.0, 3.5, 3.1], &[]);
        let patient = train(Some(2), None);
        assert_eq!(losses.verdict(&patient, 20), None);
        let ends = Verdict::Patience {
            best: 10,
            loss: 4.0,
            since: 2,
        };
        assert_eq!(losses.verdict(&patient, 30), Some(ends));
        assert_eq!(losses.verdict(&train(Some(3), None), 30), None);
        assert_eq!(losses.verdict(&patient, 35), None);
        assert!(losses.verdict(&patient, 60).is_some());
        assert_eq!(losses.verdict(&train(None, None), 60), None);
    }

    #[test]
    fn a_run_ends_where_the_base_has_got_too_much_worse() {
        let losses = losses(&[5.0, 4.0, 3.0], &[4.0, 4.1, 4.3]);
        let most = train(None, Some(0.2));
        assert_eq!(losses.verdict(&most, 0), None);
        assert_eq!(losses.verdict(&most, 10), None);
        assert!(matches!(
            losses.verdict(&most, 20),
            Some(Verdict::Forgetting { .. })
        ));
    }
}
