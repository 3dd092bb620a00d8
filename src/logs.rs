//! Logging to stderr: chosen by `COHORT_LOG`, quiet for clients, informative for the processes of a cluster. As text, or as
//! JSON for what collects logs: an object a line, with the event's fields beside `timestamp`, `level` and `target`.

use tracing_subscriber::EnvFilter;

use crate::cli::{LogFormat, Verb};

/// Name of the variable with the filter, such as `debug` or `cohort_worker=trace`.
pub const VARIABLE: &str = "COHORT_LOG";

/// Sets logging up for a verb.
pub fn start(verb: &Verb) {
    let default = match verb {
        Verb::Coordinator(_) | Verb::Worker(_) => "info",
        _ => "off",
    };
    let filter = std::env::var(VARIABLE).unwrap_or_else(|_| default.into());
    let filter = EnvFilter::try_new(&filter).unwrap_or_else(|error| {
        eprintln!("warning: {VARIABLE} is `{filter}`, which is no filter: {error}");
        EnvFilter::new(default)
    });
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format(verb) {
        LogFormat::Text => log
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .init(),
        LogFormat::Json => log
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .init(),
    }
}

/// What the verb's arguments say. Clients have none: they log only if `COHORT_LOG` says so, and then as text.
fn format(verb: &Verb) -> LogFormat {
    match verb {
        Verb::Coordinator(args) => args.observe.log_format,
        Verb::Worker(args) => args.observe.log_format,
        Verb::Local(args) => args.observe.log_format,
        _ => LogFormat::Text,
    }
}
