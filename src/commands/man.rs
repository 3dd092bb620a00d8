//! `cohort man`: a manual page for each verb, from the same text as `--help`.

use anyhow::{Context as _, Result};
use clap::CommandFactory;

use crate::cli::{Cli, ManArgs};

/// Runs the verb.
pub fn run(args: &ManArgs) -> Result<()> {
    let failed = || format!("cannot write manual pages to `{}`", args.out.display());
    std::fs::create_dir_all(&args.out).with_context(failed)?;
    clap_mangen::generate_to(Cli::command(), &args.out).with_context(failed)?;
    eprintln!("wrote a page for each verb to `{}`", args.out.display());
    Ok(())
}
