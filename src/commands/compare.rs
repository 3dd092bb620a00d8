//! `cohort compare`: shows runs beside each other.

use anyhow::Result;

use crate::cli::{Axis, CompareArgs, Metric};
use crate::compare::Comparison;
use crate::curves::{self, Style};
use crate::source::Source;

/// Runs the verb.
pub async fn run(args: CompareArgs) -> Result<()> {
    if let Some(path) = &args.output {
        curves::check_extension(path)?;
    }
    let mut source = Source::of(&args.connect).await?;
    let runs = curves::load(&mut source, &args.runs, (None, None)).await?;
    let comparison = Comparison::of(&runs, args.all);
    let out = args.json.output();
    match out.json {
        true => out.line(&comparison)?,
        false => out.say(comparison.text()),
    }
    if let Some(path) = &args.output {
        let style = Style {
            axis: if comparison.by_tokens() {
                Axis::Tokens
            } else {
                Axis::Step
            },
            log: false,
            smooth: 0.0,
            baselines: false,
        };
        let chart = curves::chart(&runs, Metric::Loss, &style)?;
        curves::write(path, &[chart])?;
        eprintln!("{}", path.display());
    }
    Ok(())
}
