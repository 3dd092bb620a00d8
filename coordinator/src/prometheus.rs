//! The figures of a cluster in the text format of Prometheus.

use std::fmt::Write;

use cohort_common::api::{ClusterView, RunView};

/// All figures.
pub fn text(cluster: &ClusterView, runs: &[RunView]) -> String {
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, labels: &str, value: usize| {
        writeln!(
            out,
            "# HELP {name} {help}\n# TYPE {name} gauge\n{name}{labels} {value}"
        )
        .expect("a string takes all");
    };
    let build = format!("{{version=\"{}\"}}", cluster.version);
    gauge("cohort_build_info", "The coordinator's build.", &build, 1);
    let workers = cluster.workers.len();
    gauge("cohort_workers", "Workers that have joined.", "", workers);
    gauge(
        "cohort_runs_under_way",
        "Runs that train or wait.",
        "",
        runs.len(),
    );
    out
}
