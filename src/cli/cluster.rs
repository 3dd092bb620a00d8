//! The verbs that are processes of a cluster.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cohort_coordinator::{FailoverConfig, Topology};
use cohort_worker::EntranceAddress;

use super::common::{HomeArgs, NotifyArgs, ObserveArgs, OptimizerArg, TokenArgs, grace, threads};

/// Arguments of `coordinator`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort coordinator                                             for this machine only
  cohort init                                                    makes a cluster of this home: authority and tokens
  cohort coordinator --listen 0.0.0.0:7070                       for others too, encrypted
  cohort coordinator --store s3://BUCKET/cohort                  what it keeps outlives this machine
  cohort coordinator --store s3://BUCKET/cohort --failover       one of several, which take over from each other
  cohort coordinator --notify-command 'cat >> events.jsonl'      notes what becomes of runs; see docs/json-events.md")]
pub struct CoordinatorArgs {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    pub listen: String,
    /// Serve the page, JSON and metrics there too (they are at the address of --listen in any case)
    #[arg(long, value_name = "ADDR")]
    pub http: Option<String>,
    /// Keep event files for TensorBoard in this directory, a sub-directory for each run that trains
    #[arg(long, value_name = "DIR")]
    pub tensorboard: Option<PathBuf>,
    /// Copy checkpoints and corpora to this object store (s3, gs, az) while runs train, and take up runs from it that this
    /// home does not know; its credentials are in the environment; when it is asked to end, what is due may take 20 s after
    /// `--grace` [or COHORT_STORE]
    #[arg(long, value_name = "URL", env = "COHORT_STORE", hide_env = true)]
    pub store: Option<String>,
    /// Be one of several coordinators with the same --store (s3, gs, az): one leads, by a lease in the store, the others stand
    /// by and follow it, and one of them takes over when its lease has run out; all of them have this flag
    #[arg(long, requires = "store", help_heading = "Failover")]
    pub failover: bool,
    /// Seconds that the lease lasts after each renewal: a leader that is lost is missed for so long, and one that cannot reach
    /// the store for two thirds of it stops committing [default: 10]
    #[arg(long, value_name = "SECONDS", requires = "failover", value_parser = lease, help_heading = "Failover")]
    pub lease: Option<f64>,
    /// Where workers, clients and the other coordinators reach this one [default: the address of --listen, where that names a
    /// machine; else this machine's name]
    #[arg(long, value_name = "URL", requires = "failover", value_parser = advertised, help_heading = "Failover")]
    pub advertise: Option<String>,
    /// The lease and the address that this process had before it was fenced.
    #[arg(long, hide = true, num_args = 2, requires = "failover")]
    pub again: Option<Vec<String>>,
    /// Who sums gradients; the result is the same
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    pub exchange: ExchangeArg,
    /// Who keeps the optimizer's moments; the result is the same. `sharded` needs workers that reach each other, and no
    /// `--exchange star`
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    pub optimizer: OptimizerArg,
    /// Hours that certificates last; they are renewed when two thirds are over, without a restart
    #[arg(long, value_name = "HOURS", default_value_t = 168.0, value_parser = certificate_hours)]
    pub certificate_hours: f64,
    /// Seconds that a checkpoint of the run that trains may take when it is asked to end (SIGTERM, Ctrl-C); a second time
    /// ends it at once
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0, value_parser = grace)]
    pub grace: f64,
    /// Do without what guards a cluster, even beyond this machine: `plaintext` has a shared token (--token-file) but no
    /// TLS, `open` has neither. For networks that you trust, or that encrypt by themselves
    #[arg(long, value_enum, value_name = "HOW", hide_possible_values = true)]
    pub insecure: Option<Insecure>,
    /// A token that all share.
    #[command(flatten)]
    pub token: TokenArgs,
    /// Whom it tells.
    #[command(flatten)]
    pub notify: NotifyArgs,
    /// Its home.
    #[command(flatten)]
    pub home: HomeArgs,
    /// What it tells.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// End when stdin is closed.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

/// What a coordinator does without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Insecure {
    /// TLS.
    Plaintext,
    /// TLS and tokens.
    Open,
}

fn lease(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (1.0..=FailoverConfig::LONGEST.as_secs_f64()).contains(&seconds) => {
            Ok(seconds)
        }
        _ => Err("expected seconds from 1 to 600".into()),
    }
}

fn advertised(text: &str) -> Result<String, String> {
    let url = text.trim_end_matches('/');
    match url.split_once("://") {
        Some(("http" | "https", host)) if !host.is_empty() && !host.contains('/') => Ok(url.into()),
        _ => Err("expected an address of this coordinator such as `https://HOST:7070`".into()),
    }
}

fn certificate_hours(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(hours) if (0.001..=87_600.0).contains(&hours) => Ok(hours),
        _ => Err("expected hours from 0.001 to 87600".into()),
    }
}

/// Who sums gradients.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum ExchangeArg {
    /// The workers, a slice each, where all of them reach each other and none is on the coordinator's host; else the
    /// coordinator
    #[default]
    Auto,
    /// The coordinator
    Star,
    /// The workers, a slice each, where all of them reach each other; else the coordinator, without shared memory
    Sharded,
}

impl From<ExchangeArg> for Topology {
    fn from(how: ExchangeArg) -> Self {
        match how {
            ExchangeArg::Auto => Self::Auto,
            ExchangeArg::Star => Self::Star,
            ExchangeArg::Sharded => Self::Sharded,
        }
    }
}

/// Arguments of `worker`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort worker                                         for the coordinator of this machine
  COHORT_TOKEN=cohort_worker_... cohort worker --coordinator https://HOST:7070    as `cohort init` printed it
  cohort worker --coordinator https://HOST:7070 --device cuda:0                     later; it has a certificate then")]
pub struct WorkerArgs {
    /// The coordinator, or several with commas between them, of which one leads [or COHORT_COORDINATOR; default: the one of
    /// the home directory, else http://127.0.0.1:7070]
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub coordinator: Vec<String>,
    /// What computes: `auto`, `cpu` or `cuda:N`
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Compute threads [default: one per core]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub threads: Option<usize>,
    /// Send gradients even if the coordinator is on this host, instead of leaving them in memory that both see
    #[arg(long)]
    pub no_shared_memory: bool,
    /// Where other workers can push gradients to this one: an address and port, or `none`; `auto` is the address by which
    /// this machine reaches the coordinator, at a free port
    #[arg(long, value_name = "ADDR", default_value = "auto", value_parser = entrance)]
    pub exchange_listen: EntranceAddress,
    /// The site that it is of, by a name of your choice: workers of one site are near each other, and add up first what goes to
    /// other sites; without it, what is near is measured
    #[arg(long, value_name = "NAME", value_parser = site)]
    pub site: Option<String>,
    /// Seconds that handing over may take when it is asked to end (SIGTERM, Ctrl-C); a second time ends it at once
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0, value_parser = grace)]
    pub grace: f64,
    /// The coordinator's token.
    #[command(flatten)]
    pub token: TokenArgs,
    /// Where it caches.
    #[command(flatten)]
    pub home: HomeArgs,
    /// What it tells.
    #[command(flatten)]
    pub observe: ObserveArgs,
    /// End when stdin is closed.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

fn site(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match (1..=63).contains(&text.len()) && text.chars().all(plain) {
        true => Ok(text.into()),
        false => Err("expected 1 to 63 letters, digits, `-`, `_` or `.`".into()),
    }
}

fn entrance(text: &str) -> Result<EntranceAddress, String> {
    match text {
        "auto" => Ok(EntranceAddress::Auto),
        "none" => Ok(EntranceAddress::Nowhere),
        address => address.parse().map(EntranceAddress::At).map_err(|_| {
            "expected `auto`, `none`, or an address and port such as `10.0.0.7:7071`".into()
        }),
    }
}

/// Arguments of `local`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort local --workers 4                      then, in another terminal:
  cohort pretrain --preset small --corpus books/

Logs and process ids lie under HOME/logs. Ctrl-C ends the cluster; an unfinished run can be resumed later.")]
pub struct LocalClusterArgs {
    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: u32,
    /// Compute threads of each worker [default: its share of the cores]
    #[arg(long, value_name = "T", value_parser = threads)]
    pub threads: Option<usize>,
    /// Who keeps the optimizer's moments; the result is the same
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    pub optimizer: OptimizerArg,
    /// Address and port of the coordinator; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    pub listen: String,
    /// Serve the page, JSON and metrics there too (they are at the address of --listen in any case)
    #[arg(long, value_name = "ADDR")]
    pub http: Option<String>,
    /// Keep event files for TensorBoard in this directory, a sub-directory for each run that trains
    #[arg(long, value_name = "DIR")]
    pub tensorboard: Option<PathBuf>,
    /// The cluster's token.
    #[command(flatten)]
    pub token: TokenArgs,
    /// Whom it tells.
    #[command(flatten)]
    pub notify: NotifyArgs,
    /// Its home.
    #[command(flatten)]
    pub home: HomeArgs,
    /// What its processes tell.
    #[command(flatten)]
    pub observe: ObserveArgs,
}
