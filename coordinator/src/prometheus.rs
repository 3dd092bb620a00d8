//! What the read model says, for Prometheus: its text format, version 0.0.4. **Pure.**
//!
//! Names follow Prometheus' conventions: base units (seconds, bytes, ratios from 0 to 1), `_total` for what only grows.
//! What is not known is left out, so that nobody takes it for a zero. The order is fixed: families as below, then runs and
//! workers as the read model has them. `docs/metrics.md` lists the families; a test compares them.

use std::fmt::Write;

use cohort_common::api::{ClusterView, ControlView, EvalEvent, RunView, WorkerView};

/// What a run counts even before it has happened, so that the first time is an increase.
const FAULTS: [&str; 4] = ["redone", "worker_joined", "worker_left", "worker_lost"];

/// The content type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The cluster, its workers, and these runs: those that train or wait, for example.
pub fn text(cluster: &ClusterView, runs: &[RunView]) -> String {
    let mut page = Page::default();
    coordinator(&mut page, cluster);
    control(&mut page, &cluster.system.control);
    workers(&mut page, &cluster.workers);
    lives(&mut page, runs);
    steps(&mut page, runs);
    outcomes(&mut page, runs);
    page.0
}

fn coordinator(page: &mut Page, cluster: &ClusterView) {
    let version = vec![("version", cluster.version.as_str())];
    page.gauge("cohort_build_info", "Version of the coordinator.")
        .sample(&version, 1.0);
    let mut one = |name, help, value: Option<f64>| {
        page.gauge(name, help).known(&[], value);
    };
    let system = &cluster.system;
    let bytes = |value: Option<u64>| value.map(|bytes| bytes as f64);
    one(
        "cohort_start_time_seconds",
        "When the coordinator was started, in seconds since the epoch.",
        Some(cluster.started_ms as f64 / 1000.0),
    );
    one(
        "cohort_workers",
        "Workers that are there.",
        Some(cluster.workers.len() as f64),
    );
    one(
        "cohort_queued_runs",
        "Runs that wait behind the one that trains.",
        Some(cluster.queued.len() as f64),
    );
    one(
        "cohort_process_cpu_cores",
        "Cores that the coordinator's process keeps busy.",
        system.cores,
    );
    one(
        "cohort_process_resident_memory_bytes",
        "Memory that the coordinator's process has in use.",
        bytes(system.rss_bytes),
    );
    one(
        "cohort_system_cpus",
        "Cores of the coordinator's machine.",
        system.cpus.map(f64::from),
    );
    one(
        "cohort_system_load1",
        "Processes that want a core of it, averaged over a minute.",
        system.load,
    );
    one(
        "cohort_system_memory_available_bytes",
        "Its memory that is free or can be freed.",
        bytes(system.memory_available_bytes),
    );
    one(
        "cohort_system_memory_bytes",
        "Its memory.",
        bytes(system.memory_bytes),
    );
    one(
        "cohort_home_disk_free_bytes",
        "Free bytes of the disk with the home directory.",
        bytes(system.disk_free_bytes),
    );
    one(
        "cohort_home_disk_bytes",
        "All bytes of that disk.",
        bytes(system.disk_bytes),
    );
}

fn control(page: &mut Page, control: &ControlView) {
    let mut both = |name, help, sent: u64, received: u64| {
        let mut family = page.counter(name, help);
        family.sample(&[("direction", "sent")], sent as f64);
        family.sample(&[("direction", "received")], received as f64);
    };
    both(
        "cohort_control_messages_total",
        "Messages on the workers' control connections.",
        control.messages_sent,
        control.messages_received,
    );
    both(
        "cohort_control_bytes_total",
        "Their bytes.",
        control.bytes_sent,
        control.bytes_received,
    );
}

fn workers(page: &mut Page, workers: &[WorkerView]) {
    let mut info = page.gauge(
        "cohort_worker_info",
        "A worker, its host and what computes there.",
    );
    for worker in workers {
        let pid = worker.pid.to_string();
        let labels = [
            ("worker", worker.name.as_str()),
            ("host", &worker.host),
            ("pid", &pid),
            ("device", &worker.device),
        ];
        info.sample(&labels, 1.0);
    }
    let mut each = |name, help, value: &dyn Fn(&WorkerView) -> Option<f64>| {
        let mut family = page.gauge(name, help);
        for worker in workers {
            family.known(&[("worker", &worker.name)], value(worker));
        }
    };
    each(
        "cohort_worker_joined_time_seconds",
        "When it joined, in seconds since the epoch.",
        &|w| Some(w.joined_ms as f64 / 1000.0),
    );
    each("cohort_worker_threads", "Threads that compute.", &|w| {
        Some(f64::from(w.threads))
    });
    each(
        "cohort_worker_lanes",
        "Lanes that it holds in the step in flight.",
        &|w| Some(w.lanes as f64),
    );
    each(
        "cohort_worker_tokens_per_second",
        "Tokens that it computes in a second.",
        &|w| w.tokens_per_second,
    );
    each(
        "cohort_worker_mfu_ratio",
        "Part of its processor's speed that goes into the model.",
        &|w| w.mfu,
    );
    each(
        "cohort_worker_peak_flops_per_second",
        "Floating-point operations that its processor does in a second, as it measured.",
        &|w| w.peak_flops,
    );
    each(
        "cohort_worker_straggler",
        "1 if the others wait for it.",
        &|w| Some(f64::from(u8::from(w.straggler.is_some()))),
    );
    each(
        "cohort_worker_resident_memory_bytes",
        "Memory that its process has in use.",
        &|w| w.rss_bytes.map(|bytes| bytes as f64),
    );
    each(
        "cohort_worker_cpu_cores",
        "Cores that its process keeps busy.",
        &|w| w.cores,
    );
    each(
        "cohort_worker_sent_bytes_per_second",
        "Bytes of gradients and roots that it sends in a second.",
        &|w| w.sent_per_second,
    );
    each(
        "cohort_worker_received_bytes_per_second",
        "The same, received.",
        &|w| w.received_per_second,
    );
    each(
        "cohort_worker_line_bytes_per_second",
        "Bytes that its line takes in a second in its slower direction, as measured with the other workers.",
        &|w| w.line_bytes_per_second.map(|speed| speed as f64),
    );
    each(
        "cohort_worker_line_rtt_seconds",
        "Time there and back to the nearest of the other workers.",
        &|w| w.line_rtt_ms.map(|ms| ms / 1000.0),
    );
    let mut times = page.gauge(
        "cohort_worker_time_ratio",
        "Shares of its time: compute, exchange, wait, data.",
    );
    for worker in workers {
        let Some(split) = worker.times else { continue };
        for (what, share) in [
            ("compute", split.compute),
            ("exchange", split.exchange),
            ("wait", split.wait),
            ("data", split.data),
        ] {
            times.sample(&[("worker", &worker.name), ("kind", what)], share);
        }
    }
}

/// Which runs there are, and how far they are.
fn lives(page: &mut Page, runs: &[RunView]) {
    let mut info = page.gauge(
        "cohort_run_info",
        "A run, where it is in its life, and what it trains on.",
    );
    for run in runs {
        let kind = serde_json::to_value(run.info.spec.kind).unwrap_or_default();
        let labels = [
            ("run", run.info.name.as_str()),
            ("status", &run.info.status),
            ("kind", kind.as_str().unwrap_or_default()),
            ("corpus", &run.facts.corpus),
        ];
        info.sample(&labels, 1.0);
    }
    page.each_run(
        runs,
        "cohort_run_queue_place",
        "Its place in the queue; 1 is next.",
        |r| r.info.queue_place.map(|place| place as f64),
    );
    page.each_run(
        runs,
        "cohort_run_parameters",
        "Parameters of its model.",
        |r| Some(r.facts.parameters as f64).filter(|count| *count > 0.0),
    );
    page.each_run(runs, "cohort_run_step", "Steps that are committed.", |r| {
        Some(r.info.step as f64)
    });
    page.each_run(runs, "cohort_run_steps", "Steps that are planned.", |r| {
        Some(r.info.spec.train.steps as f64)
    });
    page.each_run(
        runs,
        "cohort_run_eta_seconds",
        "Time until its last step, at the present speed.",
        |r| r.eta_seconds,
    );
}

/// What its newest step says.
fn steps(page: &mut Page, runs: &[RunView]) {
    let last = |r: &RunView| r.info.last_step.clone();
    page.each_run(
        runs,
        "cohort_run_loss",
        "Mean training loss of the newest step, in nats.",
        |r| last(r).map(|s| s.loss),
    );
    page.each_run(
        runs,
        "cohort_run_bits_per_byte",
        "The same per byte of text, in bits.",
        |r| last(r)?.bits_per_byte,
    );
    page.each_run(
        runs,
        "cohort_run_grad_norm",
        "Gradient norm of the newest step, before clipping.",
        |r| last(r).map(|s| s.grad_norm),
    );
    page.each_run(
        runs,
        "cohort_run_learning_rate",
        "Learning rate of the newest step.",
        |r| last(r).map(|s| s.learning_rate),
    );
    page.each_run(
        runs,
        "cohort_run_epochs",
        "Passes over the training split.",
        |r| last(r).map(|s| s.epoch),
    );
    page.each_run(
        runs,
        "cohort_run_tokens_per_second",
        "Speed of the newest step.",
        |r| {
            last(r)
                .map(|s| s.tokens_per_second)
                .filter(|speed| *speed > 0.0)
        },
    );
    page.each_run(
        runs,
        "cohort_run_mfu_ratio",
        "Part of the processors' speed that goes into the model.",
        |r| last(r)?.mfu,
    );
    let mut tokens = page.counter("cohort_run_tokens_total", "Tokens of the whole run.");
    for run in runs {
        let trained = run.info.last_step.as_ref().map_or(0, |step| step.tokens);
        tokens.sample(&[("run", &run.info.name)], trained as f64);
    }
}

/// What came of its validations, checkpoints and faults.
fn outcomes(page: &mut Page, runs: &[RunView]) {
    let mut of_evals = |name, help, value: &dyn Fn(&EvalEvent) -> Option<f64>| {
        let mut family = page.gauge(name, help);
        for run in runs {
            for eval in newest_evals(&run.info.evals) {
                family.known(
                    &[("run", &run.info.name), ("split", &eval.split)],
                    value(eval),
                );
            }
        }
    };
    of_evals(
        "cohort_run_validation_loss",
        "Mean loss of the newest validation, in nats.",
        &|e| Some(e.loss),
    );
    of_evals(
        "cohort_run_validation_bits_per_byte",
        "The same per byte of text, in bits.",
        &|e| e.bits_per_byte,
    );
    of_evals(
        "cohort_run_validation_accuracy_ratio",
        "Samples of a classifier with their own label.",
        &|e| Some(e.classes.as_ref()?.accuracy),
    );
    page.each_run(
        runs,
        "cohort_run_checkpoints",
        "Checkpoints that are kept.",
        |r| Some(r.info.checkpoints.len() as f64),
    );
    page.each_run(
        runs,
        "cohort_run_checkpoint_step",
        "Step of the newest of them.",
        |r| {
            r.info
                .checkpoints
                .last()
                .map(|checkpoint| checkpoint.step as f64)
        },
    );
    page.each_run(
        runs,
        "cohort_run_checkpoint_bytes",
        "Size of all of them.",
        |r| Some(r.info.checkpoints.iter().map(|c| c.bytes as f64).sum()),
    );
    let mut faults = page.counter(
        "cohort_run_faults_total",
        "What happened to its workers, by kind.",
    );
    for run in runs {
        let mut counts: Vec<(&str, u64)> = FAULTS.iter().map(|kind| (*kind, 0)).collect();
        for total in &run.fault_totals {
            match counts.iter_mut().find(|(kind, _)| *kind == total.kind) {
                Some((_, count)) => *count = total.count,
                None => counts.push((&total.kind, total.count)),
            }
        }
        for (kind, count) in counts {
            faults.sample(&[("run", &run.info.name), ("kind", kind)], count as f64);
        }
    }
    let help = "How much later steps were committed because lanes had to be computed again.";
    let mut delays = page.counter("cohort_run_fault_delay_seconds_total", help);
    for run in runs {
        let delay: u64 = run.fault_totals.iter().map(|total| total.delay_ms).sum();
        delays.sample(&[("run", &run.info.name)], delay as f64 / 1000.0);
    }
}

/// The newest validation of each split, in the order of the splits.
fn newest_evals(evals: &[EvalEvent]) -> Vec<&EvalEvent> {
    let mut newest: Vec<&EvalEvent> = Vec::new();
    for eval in evals.iter().rev() {
        if newest.iter().all(|known| known.split != eval.split) {
            newest.push(eval);
        }
    }
    newest.sort_by(|a, b| a.split.cmp(&b.split));
    newest
}

/// The text so far.
#[derive(Default)]
struct Page(String);

/// Samples of one name. Its head is written with the first of them.
struct Family<'a> {
    page: &'a mut Page,
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    begun: bool,
}

impl Page {
    fn gauge(&mut self, name: &'static str, help: &'static str) -> Family<'_> {
        self.family(name, "gauge", help)
    }

    /// A gauge of one value for each run.
    fn each_run(
        &mut self,
        runs: &[RunView],
        name: &'static str,
        help: &'static str,
        value: impl Fn(&RunView) -> Option<f64>,
    ) {
        let mut family = self.gauge(name, help);
        for run in runs {
            family.known(&[("run", &run.info.name)], value(run));
        }
    }

    fn counter(&mut self, name: &'static str, help: &'static str) -> Family<'_> {
        self.family(name, "counter", help)
    }

    fn family(&mut self, name: &'static str, kind: &'static str, help: &'static str) -> Family<'_> {
        Family {
            page: self,
            name,
            kind,
            help,
            begun: false,
        }
    }
}

impl Family<'_> {
    /// A sample, where its value is known.
    fn known(&mut self, labels: &[(&str, &str)], value: Option<f64>) {
        if let Some(value) = value {
            self.sample(labels, value);
        }
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        let (name, out) = (self.name, &mut self.page.0);
        if !std::mem::replace(&mut self.begun, true) {
            let (kind, help) = (self.kind, self.help);
            let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        }
        out.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let open = if i == 0 { '{' } else { ',' };
            let _ = write!(out, "{open}{label}=\"{}\"", escaped(text));
        }
        if !labels.is_empty() {
            out.push('}');
        }
        let _ = writeln!(out, " {}", number(value));
    }
}

/// A label's text between quotes.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".into(),
        f64::INFINITY => "+Inf".into(),
        f64::NEG_INFINITY => "-Inf".into(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests;
