//! `cohort plot`: draws the curves of runs.

use anyhow::Result;

use crate::cli::PlotArgs;
use crate::curves::{self, Style};
use crate::source::Source;

/// Runs the verb.
pub async fn run(args: PlotArgs) -> Result<()> {
    curves::check_extension(&args.output)?;
    let mut source = Source::of(&args.connect).await?;
    let runs = curves::load(&mut source, &args.runs, (args.from, args.to)).await?;
    let style = Style {
        axis: args.axis,
        log: args.log,
        smooth: args.smooth,
        baselines: args.baselines,
    };
    let charts = args.metric.iter();
    let charts = charts.map(|metric| curves::chart(&runs, *metric, &style));
    let charts = charts.collect::<Result<Vec<_>>>()?;
    curves::write(&args.output, &charts)?;
    println!("{}", args.output.display());
    Ok(())
}
