//! `cohort export`: a checkpoint as a Hugging Face directory.

use anyhow::Result;
use cohort_common::checkpoint::export;
use cohort_common::spec::human_bytes;

use crate::cli::ExportArgs;
use crate::context::Context;
use crate::references;

/// Runs the verb.
pub async fn run(args: ExportArgs) -> Result<()> {
    let context = Context::of(&args.connect)?;
    let found = references::find(&context, &args.from).await?;
    let target = args.target.clone();
    let source = found.directory.clone();
    let files = tokio::task::spawn_blocking(move || export(&source, &target)).await??;
    println!("{} in {}:", found.name, args.target.display());
    for file in files {
        let bytes = file.metadata()?.len();
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        println!("  {name:<24} {}", human_bytes(bytes));
    }
    Ok(())
}
