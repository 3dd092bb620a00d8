//! Traces of steps, as the command line asks for them. What they hold is decided in `cohort_common::traces` and by those who
//! make them.

use anyhow::Result;
use cohort_common::traces::Traces;

use crate::cli::ObserveArgs;

/// The way to the collector that the user names, or none.
pub fn open(args: &ObserveArgs, service: &'static str) -> Result<Traces> {
    match args.otlp.as_deref().filter(|url| !url.is_empty()) {
        None => Ok(Traces::default()),
        Some(url) => {
            let process = u64::from(std::process::id());
            Ok(Traces::to(url, args.otlp_every, service, process)?)
        }
    }
}

/// Sends what is left before the process ends.
pub async fn finish(traces: Traces) {
    // It fails only where a panic was reported.
    let _ = tokio::task::spawn_blocking(move || traces.finish()).await;
}
