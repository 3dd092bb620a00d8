//! Arguments that several verbs share.

use std::path::PathBuf;

use clap::Args;

use crate::output::Output;

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
    /// The coordinator [or COHORT_COORDINATOR; default: the one of the home directory, else http://127.0.0.1:7070]
    #[arg(long, value_name = "URL", help_heading = "Place")]
    pub coordinator: Option<String>,
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

impl JsonArgs {
    /// Where text goes.
    pub fn output(self) -> Output {
        Output { json: self.json }
    }
}
