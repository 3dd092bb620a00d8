//! `cohort metrics`: prints every step of a run, or its validations, or writes them for TensorBoard.

use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;

use anyhow::{Context as _, Result};
use cohort_common::api::{EvalEvent, MetricsRequest, StepMetrics};
use cohort_common::tensorboard::Board;

use crate::cli::MetricsArgs;
use crate::output::{now_ms, table};
use crate::source::Source;

/// Steps that people are shown.
const SHOWN: u64 = 20;

const STEP_COLUMNS: [&str; 11] = [
    "step",
    "steps",
    "epoch",
    "tokens",
    "time_ms",
    "loss",
    "bits_per_byte",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "mfu",
];

const EVAL_COLUMNS: [&str; 7] = [
    "step",
    "split",
    "loss",
    "bits_per_byte",
    "tokens",
    "accuracy",
    "macro_f1",
];

/// Runs the verb.
pub async fn run(args: MetricsArgs) -> Result<()> {
    let mut source = Source::of(&args.connect).await?;
    if let Some(directory) = &args.tensorboard {
        return tensorboard(&mut source, &args.run, directory).await;
    }
    let printed = match args.evals {
        true => evals(&mut source, &args).await?,
        false => steps(&mut source, &args).await?,
    };
    match printed {
        // A reader that has gone away, such as `head`, is no error.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed.context("cannot print the metrics"),
    }
}

async fn steps(source: &mut Source, args: &MetricsArgs) -> Result<io::Result<()>> {
    let for_people = !args.csv && !args.json.json;
    let request = MetricsRequest {
        run: args.run.clone(),
        from: args.from,
        to: args.to,
        last: args.last.or(for_people.then_some(SHOWN)),
    };
    if for_people {
        let mut rows = vec![words(&STEP_COLUMNS)];
        let take = |row: &StepMetrics| {
            rows.push(shown(row));
            Ok(())
        };
        let taken = source.metrics(&request, take).await?;
        return Ok(taken.and_then(|()| match rows.len() {
            1 => writeln!(io::stdout(), "run `{}` has no such steps yet", args.run),
            _ => writeln!(io::stdout(), "{}", table(&rows)),
        }));
    }
    let mut out = BufWriter::new(io::stdout());
    if args.csv {
        // A heading that cannot be written is followed by rows that cannot.
        let _ = writeln!(out, "{}", STEP_COLUMNS.join(","));
    }
    let write = |row: &StepMetrics| match args.csv {
        true => writeln!(out, "{}", csv(row)),
        false => json_line(&mut out, row),
    };
    let written = source.metrics(&request, write).await?;
    Ok(written.and_then(|()| out.flush()))
}

async fn evals(source: &mut Source, args: &MetricsArgs) -> Result<io::Result<()>> {
    let view = source.view(&args.run).await?;
    let wanted = |eval: &&EvalEvent| {
        args.from.is_none_or(|from| eval.step >= from) && args.to.is_none_or(|to| eval.step <= to)
    };
    let evals: Vec<&EvalEvent> = view.info.evals.iter().filter(wanted).collect();
    let last = args.last.map_or(evals.len(), |last| {
        usize::try_from(last).unwrap_or(usize::MAX).min(evals.len())
    });
    let evals = &evals[evals.len() - last..];
    let mut out = BufWriter::new(io::stdout());
    let rows = evals.iter().map(|eval| eval_cells(eval));
    let written = if args.json.json {
        evals.iter().try_for_each(|eval| json_line(&mut out, eval))
    } else if args.csv {
        let rows = std::iter::once(words(&EVAL_COLUMNS)).chain(rows);
        rows.map(|row| row.join(","))
            .try_for_each(|row| writeln!(out, "{row}"))
    } else {
        let rows = std::iter::once(words(&EVAL_COLUMNS)).chain(rows);
        writeln!(out, "{}", table(&rows.collect::<Vec<_>>()))
    };
    Ok(written.and_then(|()| out.flush()))
}

/// Writes a whole run into its sub-directory, without what is there already.
async fn tensorboard(source: &mut Source, run: &str, directory: &Path) -> Result<()> {
    let view = source.view(run).await?;
    let own = directory.join(&view.info.name);
    let cannot = || format!("cannot write event files to `{}`", own.display());
    let host = hostname::get().unwrap_or_default();
    let mut board = Board::open(&own, &host.to_string_lossy()).with_context(cannot)?;
    let mut committed = None;
    if let Some((last, _)) = board.last() {
        let request = MetricsRequest {
            run: run.to_owned(),
            from: Some(last),
            to: Some(last),
            last: None,
        };
        let take = |row: &StepMetrics| {
            committed = Some(row.time_ms);
            Ok(())
        };
        source.metrics(&request, take).await??;
    }
    let after = board.go_on(committed, now_ms()).with_context(cannot)?;
    let mut evals = view.info.evals.iter().peekable();
    let mut steps = 0;
    let request = MetricsRequest {
        run: run.to_owned(),
        from: Some(after + 1),
        ..MetricsRequest::default()
    };
    let take = |row: &StepMetrics| {
        steps += 1;
        // Validations of the state before this step.
        while let Some(eval) = evals.next_if(|eval| eval.step < row.step) {
            board.eval(eval, row.time_ms)?;
        }
        board.step(row)
    };
    let taken = source.metrics(&request, take).await?;
    taken.with_context(cannot)?;
    let time = board.last().map_or(view.info.created_ms, |(_, time)| time);
    let rest = evals.try_for_each(|eval| board.eval(eval, time));
    let samples = view.samples.iter();
    rest.and_then(|()| {
        samples
            .map(|sample| (sample, time))
            .try_for_each(|(s, t)| board.sample(s, t))
    })
    .and_then(|()| board.flush())
    .with_context(cannot)?;
    println!(
        "{steps} new steps in {}; `tensorboard --logdir {}` shows them",
        own.display(),
        directory.display()
    );
    Ok(())
}

fn json_line(out: &mut impl Write, value: &impl serde::Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A number that reads back to the same bits; nothing where it is not known.
fn exact(value: Option<f64>) -> String {
    let finite = value.filter(|value| value.is_finite());
    finite.map_or(String::new(), |value| value.to_string())
}

/// A step in the order of [`STEP_COLUMNS`].
fn csv(row: &StepMetrics) -> String {
    [
        row.step.to_string(),
        row.steps.map_or(String::new(), |steps| steps.to_string()),
        exact(Some(row.epoch)),
        row.tokens.to_string(),
        row.time_ms.to_string(),
        exact(row.loss),
        exact(row.bits_per_byte),
        exact(row.grad_norm),
        exact(row.learning_rate),
        exact(row.tokens_per_second),
        exact(row.mfu),
    ]
    .join(",")
}

/// The same, rounded for people.
fn shown(row: &StepMetrics) -> Vec<String> {
    let rounded = |value: Option<f64>, digits: usize| {
        value.map_or("-".into(), |value| format!("{value:.digits$}"))
    };
    let steps = row.steps.map_or("-".into(), |steps| steps.to_string());
    let rate = row.learning_rate;
    vec![
        row.step.to_string(),
        steps,
        rounded(Some(row.epoch), 3),
        row.tokens.to_string(),
        row.time_ms.to_string(),
        rounded(row.loss, 4),
        rounded(row.bits_per_byte, 4),
        rounded(row.grad_norm, 4),
        rate.map_or("-".into(), |rate| format!("{rate:.3e}")),
        rounded(row.tokens_per_second, 0),
        rounded(row.mfu, 3),
    ]
}

/// A validation in the order of [`EVAL_COLUMNS`].
fn eval_cells(eval: &EvalEvent) -> Vec<String> {
    let classes = eval.classes.as_ref();
    vec![
        eval.step.to_string(),
        eval.split.clone(),
        exact(Some(eval.loss)),
        exact(eval.bits_per_byte),
        eval.tokens.to_string(),
        exact(classes.map(|c| c.accuracy)),
        exact(classes.map(|c| c.macro_f1)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_csv_reads_back_to_the_same_bits() {
        let row = StepMetrics {
            step: 3,
            epoch: 0.1 + 0.2,
            tokens: 99,
            time_ms: 1_700_000_000_123,
            loss: Some(f64::NAN),
            learning_rate: Some(1.0 / 3e7),
            ..StepMetrics::default()
        };
        let line = csv(&row);
        let cells: Vec<&str> = line.split(',').collect();
        assert_eq!(cells.len(), STEP_COLUMNS.len());
        assert_eq!(cells[2].parse::<f64>().unwrap(), 0.1 + 0.2);
        assert_eq!(cells[5], "");
        assert_eq!(cells[8].parse::<f64>().unwrap(), 1.0 / 3e7);
    }
}
