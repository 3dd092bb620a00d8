//! `cohort ledger`: prints a run's ledger.

use std::io::{BufWriter, ErrorKind, Write};

use anyhow::{Context as _, Result};

use crate::cli::LedgerArgs;
use crate::context::Context;

/// Runs the verb.
pub async fn run(args: LedgerArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let mut out = BufWriter::new(std::io::stdout());
    let mut written = Ok(());
    let mut print = |line: &[u8]| {
        written = out.write_all(line).and_then(|()| out.write_all(b"\n"));
        written.is_ok()
    };
    match context.connect_if_running().await? {
        Some(mut client) => {
            let mut lines = client.ledger(&args.run).await?;
            while let Some(line) = lines.next_line().await? {
                if !print(&line) {
                    break;
                }
            }
        }
        None => {
            let (home, run) = (context.home.clone(), args.run.clone());
            let print = |line: String| print(line.as_bytes());
            cohort_coordinator::offline::ledger(&home, &run, print)?;
        }
    }
    match written.and_then(|()| out.flush()) {
        // A reader that has gone away, such as `head`, is no error.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        flushed => flushed.context("cannot print the ledger"),
    }
}
