//! `cohort completions`: the script by which a shell completes what is typed.

use std::io::Write;

use anyhow::Result;
use clap::CommandFactory;

use crate::cli::{Cli, CompletionsArgs};

/// Runs the verb.
pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "cohort", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(())
}
