//! Walks every position that a ledger has consumed, and marks the sample that stands there: each at most once in an
//! epoch, and each exactly once in an epoch that is complete.

use cohort_common::api::AuditReport;
use cohort_common::order::Order;

/// The walk along a run's line of positions.
pub struct Walk {
    order: Order,
    /// The position after the last one.
    next: u64,
    /// The epoch that is being walked, and which of its samples were met.
    epoch: u64,
    met: Vec<u64>,
    count: u64,
    /// Epochs of which every sample was met.
    complete: u64,
    samples: u64,
    broken: bool,
}

impl Walk {
    /// A walk that begins with the first position.
    pub fn new(order: Order) -> Self {
        let words = order.samples().div_ceil(64) as usize;
        Self {
            order,
            next: 0,
            epoch: 0,
            met: vec![0; words],
            count: 0,
            complete: 0,
            samples: 0,
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
        let at = self.order.sample(position);
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
        let (epoch, count, all) = (self.epoch, self.count, self.order.samples());
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

    /// Writes down what was walked.
    pub fn report(self, report: &mut AuditReport) {
        let whole = self.count == self.order.samples();
        report.samples = self.samples;
        report.epoch_samples = self.order.samples();
        report.epochs = self.complete + u64::from(whole);
        report.partial_samples = if whole { 0 } else { self.count };
    }
}
