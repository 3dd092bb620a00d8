//! Walks every position that a ledger has consumed, and marks the sample that stands there: each at most once in an
//! epoch, and each exactly once in an epoch that is complete.

use cohort_common::api::AuditReport;
use cohort_common::order::{Mixture, SampleAt};

/// The walk along a run's line of positions.
pub struct Walk {
    mixture: Mixture,
    /// The position after the last one.
    next: u64,
    /// Of each corpus, the run's own first.
    epochs: Vec<Epochs>,
    broken: bool,
}

/// The walk along the samples of one corpus.
struct Epochs {
    /// Samples in one epoch.
    all: u64,
    /// The epoch that is being walked, and which of its samples were met.
    epoch: u64,
    met: Vec<u64>,
    count: u64,
    /// Epochs of which every sample was met.
    complete: u64,
    samples: u64,
}

impl Walk {
    /// A walk that begins with the first position.
    pub fn new(mixture: Mixture) -> Self {
        let orders = mixture.orders().iter();
        Self {
            epochs: orders.map(|order| Epochs::of(order.samples())).collect(),
            mixture,
            next: 0,
            broken: false,
        }
    }

    /// Consumes the positions of a step.
    ///
    /// # Errors
    /// Which sample was met twice, or left out. Positions that do not follow end the walk without a word: the chain of
    /// the ledger says that already.
    pub fn consume(&mut self, step: u64, first: u64, samples: u64) -> Result<(), String> {
        if self.broken || first != self.next {
            self.broken = true;
            return Ok(());
        }
        let mut outcome = Ok(());
        for position in first..first + samples {
            outcome = outcome.and(self.at(step, position));
        }
        self.next = first + samples;
        outcome
    }

    fn at(&mut self, step: u64, position: u64) -> Result<(), String> {
        let (corpus, at) = self.mixture.sample(position);
        self.epochs[corpus].at(step, position, at)
    }

    /// Writes down what was walked. `others` says what the samples of the corpora besides the run's own are.
    pub fn report(self, others: &[String], report: &mut AuditReport) {
        let mut epochs = self.epochs.into_iter();
        let own = epochs.next().expect("every run has a corpus");
        let whole = own.count == own.all;
        report.samples = own.samples;
        report.epoch_samples = own.all;
        report.epochs = own.complete + u64::from(whole);
        report.partial_samples = if whole { 0 } else { own.count };
        for (walked, what) in epochs.zip(others) {
            let (samples, all) = (walked.samples, walked.all);
            report.notes.push(format!(
                "{samples} samples besides were {what}, each once in an epoch of its {all}"
            ));
        }
    }
}

impl Epochs {
    fn of(all: u64) -> Self {
        Self {
            all,
            epoch: 0,
            met: vec![0; all.div_ceil(64) as usize],
            count: 0,
            complete: 0,
            samples: 0,
        }
    }

    fn at(&mut self, step: u64, position: u64, at: SampleAt) -> Result<(), String> {
        self.samples += 1;
        let mut outcome = Ok(());
        if at.epoch != self.epoch {
            outcome = self.turn(step);
            self.epoch = at.epoch;
        }
        let (word, bit) = ((at.index / 64) as usize, 1u64 << (at.index % 64));
        match self.met.get_mut(word) {
            Some(met) if *met & bit == 0 => {
                *met |= bit;
                self.count += 1;
            }
            _ => {
                let (index, epoch) = (at.index, at.epoch);
                outcome = outcome.and(Err(format!(
                    "step {step} consumed sample {index} at position {position}, but epoch {epoch} had it already"
                )));
            }
        }
        outcome
    }

    /// Closes an epoch.
    fn turn(&mut self, step: u64) -> Result<(), String> {
        let (epoch, count, all) = (self.epoch, self.count, self.all);
        self.met.fill(0);
        self.count = 0;
        if count == all {
            self.complete += 1;
            return Ok(());
        }
        Err(format!(
            "step {step} begins another epoch, but epoch {epoch} has consumed only {count} of {all} samples"
        ))
    }
}
