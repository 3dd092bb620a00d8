//! The binary `cohort`: parses the command line, runs one verb, and prints the chain of an error. Nothing is decided
//! here; see `commands` for the verbs.

mod cli;
mod client;
mod commands;
mod compare;
mod context;
mod curves;
mod facts;
mod failure;
mod follow;
mod hub;
mod local;
mod logs;
mod output;
mod plans;
mod prepare;
mod references;
mod registry;
mod source;
mod step_line;
mod submit;
mod traces;
mod transfer;
mod uploads;
mod watch;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

/// Training allocates and frees large buffers all the time; this allocator keeps their pages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long tasks that are still busy may take after the verb has ended.
const GRACE: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    cohort_common::process::keep_freed_memory();
    let cli = cli::Cli::parse();
    logs::start(&cli.verb);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("cohort")
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return failure::report(&anyhow::Error::new(error).context("cannot start")),
    };
    let result = runtime.block_on(commands::run(cli.verb));
    runtime.shutdown_timeout(GRACE);
    match result {
        Ok(code) => code,
        Err(error) => failure::report(&error),
    }
}
