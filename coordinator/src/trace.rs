//! The coordinator's part of the trace of a step: the step itself, its sum, its commit and its way to the database. One
//! step is in flight at a time, so one is open here. Where a step is not traced, nothing is measured.

use std::time::SystemTime;

use cohort_common::cluster::events::StepRecord;
use cohort_common::ids::{RunId, Step};
use cohort_common::traces::{Attribute, StepTrace, Traces};

/// The spans of the step in flight.
#[derive(Debug, Default)]
pub struct StepSpans {
    traces: Traces,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    run: RunId,
    step: Step,
    trace: StepTrace,
    started: SystemTime,
    /// When the event came that is being handled.
    event: SystemTime,
}

impl StepSpans {
    /// Where the spans go.
    pub fn new(traces: Traces) -> Self {
        Self { traces, open: None }
    }

    /// A worker is told to compute lanes of a step; the first time is the step's beginning.
    pub fn computing(&mut self, run: &RunId, step: Step) {
        if self.is_open(run, step) {
            return;
        }
        self.open = self.traces.step(run, step).map(|trace| {
            let now = SystemTime::now();
            Open {
                run: run.clone(),
                step,
                trace,
                started: now,
                event: now,
            }
        });
    }

    fn is_open(&self, run: &RunId, step: Step) -> bool {
        let same = |open: &Open| open.step == step && open.run == *run;
        self.open.as_ref().is_some_and(same)
    }

    /// An event is about to be handled: the last one of a step is what commits it.
    pub fn event(&mut self) {
        if let Some(open) = &mut self.open {
            open.event = SystemTime::now();
        }
    }

    /// The root of a step is complete. `began` says when its first chunk came.
    pub fn summed(&self, run: &RunId, step: Step, began: impl FnOnce() -> Option<SystemTime>) {
        if let Some(open) = &self.open
            && self.is_open(run, step)
            && let Some(began) = began()
        {
            open.trace
                .child("sum", began, SystemTime::now(), Vec::new());
        }
    }

    /// A step is committed. Gives its trace, for what is still to be written of it.
    pub fn committed(&mut self, record: &StepRecord) -> Option<StepTrace> {
        let open = self.open.take()?;
        if open.step != record.entry.step || open.run != record.run {
            // A step that was made again, or that another coordinator has led.
            return None;
        }
        let now = SystemTime::now();
        let number = |name: &'static str, count: usize| Attribute::new(name, count as i64);
        let attributes = vec![
            number("cohort.workers", record.workers),
            number("cohort.lanes", record.entry.lanes.len()),
        ];
        open.trace.child("commit", open.event, now, Vec::new());
        open.trace.root(open.started, now, attributes);
        Some(open.trace)
    }
}
