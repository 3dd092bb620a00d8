//! Arguments that several verbs share.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::output::Output;

/// Seconds without progress after which a run has stalled.
const STALL_AFTER: f64 = 300.0;

/// Where Cohort keeps things.
#[derive(Args, Clone, Debug, Default)]
pub struct HomeArgs {
    /// Directory of everything that Cohort writes [default: the platform's data directory]
    #[arg(
        long,
        value_name = "DIR",
        env = "COHORT_HOME",
        hide_env_values = true,
        help_heading = "Place"
    )]
    pub home: Option<PathBuf>,
}

/// The cluster's secret.
#[derive(Args, Clone, Debug, Default)]
pub struct TokenArgs {
    /// File with the cluster's token [or the token itself in COHORT_TOKEN]
    #[arg(long, value_name = "FILE", help_heading = "Place")]
    pub token_file: Option<PathBuf>,
}

/// Which coordinator a client talks to.
#[derive(Args, Clone, Debug, Default)]
pub struct ConnectArgs {
    /// The coordinator, or several with commas between them, of which one leads [or COHORT_COORDINATOR; default: the one of
    /// the home directory, else http://127.0.0.1:7070]
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        help_heading = "Place"
    )]
    pub coordinator: Vec<String>,
    /// Its token.
    #[command(flatten)]
    pub token: TokenArgs,
    /// Its home.
    #[command(flatten)]
    pub home: HomeArgs,
}

/// A cluster for one command.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct LocalArgs {
    /// Start a private coordinator and N worker processes for this command, and end them with it
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "coordinator",
        value_parser = clap::value_parser!(u32).range(1..=1024),
        help_heading = "Place"
    )]
    pub local: Option<u32>,
    /// Compute threads of each local worker [default: its share of the cores]
    #[arg(long, value_name = "T", requires = "local", value_parser = threads, help_heading = "Place")]
    pub threads: Option<usize>,
    /// Who keeps the optimizer's moments; the result is the same
    #[arg(
        long,
        value_enum,
        value_name = "HOW",
        default_value_t,
        requires = "local",
        help_heading = "Place"
    )]
    pub optimizer: OptimizerArg,
}

/// Who keeps the optimizer's moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OptimizerArg {
    /// Each worker all of them
    #[default]
    Whole,
    /// Each worker a slice in memory, and another's on its disk, where all of them reach each other; for models that are
    /// large for the workers' memory
    Sharded,
}

impl OptimizerArg {
    /// As it is typed.
    pub fn word(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Sharded => "sharded",
        }
    }
}

/// Who is told what becomes of runs.
#[derive(Args, Clone, Debug, Default)]
pub struct NotifyArgs {
    /// Call this with `sh -c` when a run finishes, fails, is paused by its watchdog, stalls or moves on; the event is JSON
    /// on stdin
    #[arg(
        long,
        value_name = "CMD",
        group = "notified",
        help_heading = "Notification"
    )]
    pub notify_command: Option<String>,
    /// Send the same JSON there in an HTTP POST
    #[arg(long, value_name = "URL", group = "notified", value_parser = webhook, help_heading = "Notification")]
    pub notify_webhook: Option<String>,
    /// Seconds without progress after which an active run has stalled [default: 300]
    #[arg(long, value_name = "SECONDS", requires = "notified", value_parser = stall, help_heading = "Notification")]
    pub stall_after: Option<f64>,
}

/// How the log of a process is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

impl LogFormat {
    /// As it is typed.
    pub fn word(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// What the processes of a cluster tell about themselves.
#[derive(Args, Clone, Debug)]
pub struct ObserveArgs {
    /// How the log is written: lines for people, or a JSON object a line
    #[arg(
        long,
        value_name = "FORMAT",
        env = "COHORT_LOG_FORMAT",
        hide_env_values = true,
        hide_possible_values = true,
        value_enum,
        default_value_t = LogFormat::Text,
        help_heading = "Observation"
    )]
    pub log_format: LogFormat,
    /// Send traces of steps to the OpenTelemetry collector there, by OTLP over gRPC, such as `http://127.0.0.1:4317`
    #[arg(
        long,
        value_name = "URL",
        env = "COHORT_OTLP",
        hide_env_values = true,
        help_heading = "Observation"
    )]
    pub otlp: Option<String>,
    /// Trace one step out of N; the same for coordinator and workers
    #[arg(
        long,
        value_name = "N",
        env = "COHORT_OTLP_EVERY",
        hide_env_values = true,
        default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..),
        help_heading = "Observation"
    )]
    pub otlp_every: u64,
}

/// How results are printed.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct JsonArgs {
    /// Print JSON lines on stdout; text for people goes to stderr
    #[arg(long)]
    pub json: bool,
}

/// A number of compute threads.
pub fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads @ 1..=4096) => Ok(threads),
        _ => Err("expected a number from 1 to 4096".into()),
    }
}

/// A time in seconds.
pub fn grace(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds from 0 to 86400".into()),
    }
}

/// Where a webhook is.
fn webhook(text: &str) -> Result<String, String> {
    let rest = text
        .strip_prefix("http://")
        .or(text.strip_prefix("https://"));
    match rest.is_some_and(|rest| !rest.is_empty()) {
        true => Ok(text.into()),
        false => Err("expected an address that begins with http:// or https://".into()),
    }
}

/// A time without progress.
fn stall(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (1.0..=604_800.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected seconds from 1 to 604800".into()),
    }
}

impl NotifyArgs {
    /// Whether anybody is told.
    pub fn is_given(&self) -> bool {
        self.notify_command.is_some() || self.notify_webhook.is_some()
    }

    /// What the coordinator is set up with.
    pub fn config(&self) -> cohort_coordinator::NotifyConfig {
        cohort_coordinator::NotifyConfig {
            command: self.notify_command.clone(),
            webhook: self.notify_webhook.clone(),
            stall_after: Duration::from_secs_f64(self.stall_after.unwrap_or(STALL_AFTER)),
        }
    }

    /// The same as arguments of a coordinator that is started.
    pub fn arguments(&self) -> Vec<String> {
        let Self {
            notify_command,
            notify_webhook,
            stall_after,
        } = self;
        let flags = [
            ("--notify-command", notify_command.clone()),
            ("--notify-webhook", notify_webhook.clone()),
            ("--stall-after", stall_after.map(|s| s.to_string())),
        ];
        // With `=`, a value may begin with a dash.
        let given = |(flag, value): (&str, Option<String>)| Some(format!("{flag}={}", value?));
        flags.into_iter().filter_map(given).collect()
    }
}

impl JsonArgs {
    /// Where text goes.
    pub fn output(self) -> Output {
        Output { json: self.json }
    }
}
