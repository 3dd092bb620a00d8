//! The worker's part of the trace of a step: what it computes, sends, receives and updates, each as a span below the
//! coordinator's. Where a step is not traced, nothing is measured.

use std::sync::Arc;
use std::time::SystemTime;

use cohort_common::ids::{RunId, Step};
use cohort_common::traces::{Attribute, StepTrace, Traces};
use cohort_common::tree::Node;

/// The spans of a worker in one session and one run.
#[derive(Clone, Debug, Default)]
pub struct Spans(Option<Arc<Source>>);

#[derive(Debug)]
struct Source {
    traces: Traces,
    run: RunId,
    worker: String,
}

/// A span that has begun.
#[derive(Debug)]
pub struct Open {
    trace: StepTrace,
    start: SystemTime,
    worker: String,
}

impl Spans {
    /// The spans of the worker of that name, if they are wanted.
    pub fn new(traces: &Traces, run: &RunId, worker: String) -> Self {
        Self(Some(Arc::new(Source {
            traces: traces.clone(),
            run: run.clone(),
            worker,
        })))
    }

    /// Begins a span of a step; `None` where it is not traced.
    pub fn begin(&self, step: Step) -> Option<Open> {
        let source = self.0.as_ref()?;
        let trace = source.traces.step(&source.run, step)?;
        Some(Open {
            trace,
            start: SystemTime::now(),
            worker: source.worker.clone(),
        })
    }
}

impl Open {
    /// The same span, but begun earlier.
    pub fn ago(self, time: std::time::Duration) -> Self {
        let start = self.start.checked_sub(time).unwrap_or(self.start);
        Self { start, ..self }
    }

    /// Ends a span whose work was that of a node of the tree.
    pub fn end_lanes(self, name: &str, Node { first, size }: Node) {
        let name = match size {
            1 => format!("{name} {first}"),
            _ => format!("{name}s {first}-{}", first + size - 1),
        };
        let lanes = Attribute::new("cohort.lanes", i64::from(size));
        self.finish(name, vec![lanes]);
    }

    /// Ends a span.
    pub fn end(self, name: &'static str) {
        self.finish(name.into(), Vec::new());
    }

    fn finish(self, name: String, mut attributes: Vec<Attribute>) {
        attributes.push(Attribute::new("cohort.worker", self.worker));
        self.trace
            .child(name, self.start, SystemTime::now(), attributes);
    }
}
