//! The verbs that are about this machine, and not about runs.

use std::path::PathBuf;

use clap::Args;
use clap_complete::Shell;

use super::common::{ConnectArgs, JsonArgs};

/// Arguments of `doctor`.
#[derive(Args, Debug)]
#[command(after_help = "\
Looks at the processor, cores, memory, open files, shared memory, GPUs, the home directory and its disk, the port, and, if
a coordinator is named or runs here, at the way to it: round trips, throughput, clocks, token. Each line is `ok`, a `note` or
a `problem`, with what to do. Nothing is changed. The exit code is 1 if there is a problem.

Examples:
  cohort doctor                                           before a coordinator is started here
  COHORT_TOKEN=cohort_worker_... cohort doctor --coordinator https://HOST:7070    before a worker is
  cohort doctor --json | jq 'select(.level != \"ok\")'")]
pub struct DoctorArgs {
    /// Where a coordinator is to listen [default: 127.0.0.1:7070, unless one is named or runs here]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// How it prints.
    #[command(flatten)]
    pub json: JsonArgs,
    /// Whom it asks.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Arguments of `completions`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort completions bash > /usr/share/bash-completion/completions/cohort
  cohort completions zsh > /usr/share/zsh/site-functions/_cohort
  cohort completions fish > ~/.config/fish/completions/cohort.fish")]
pub struct CompletionsArgs {
    /// For which shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Arguments of `man`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cohort man --out /usr/local/share/man/man1
  cohort man --out . && man ./cohort-worker.1")]
pub struct ManArgs {
    /// Directory of the pages; it is made where it does not exist
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}
