//! `--resume RUN`: goes on with a run, perhaps for more steps than were planned.

use std::process::ExitCode;

use anyhow::{Result, bail};
use cohort_common::api::Submit;
use cohort_common::spec::{CheckpointTable, RunSpec, SpecFile, SpecSource, TrainTable};

use crate::cli::SubmitArgs;
use crate::submit::Session;

/// Keys that no weight of a finished step depends on.
const CHANGEABLE: &str = "`train.steps`, `train.eval_every`, `train.eval_samples`, `train.min_workers`, \
                          `checkpoint.every` and `checkpoint.keep`";

/// Goes on with a run.
pub async fn run(run: &str, set: &[String], args: &SubmitArgs) -> Result<ExitCode> {
    let mut source = SpecSource::empty();
    for assignment in set {
        source.set(assignment)?;
    }
    let changes = source.into_file()?;
    refuse_others(&changes)?;
    let mut session = Session::open(&args.connect, &args.local, args.json.output()).await?;
    let result = go_on(&mut session, run, &changes, args).await;
    session.close().await;
    result
}

async fn go_on(
    session: &mut Session,
    run: &str,
    changes: &SpecFile,
    args: &SubmitArgs,
) -> Result<ExitCode> {
    let info = session.client.run(run).await?;
    let mut spec = info.spec;
    session.adapt(&mut spec);
    apply(&mut spec, changes)?;
    if spec.train.steps < info.step {
        bail!(
            "`train.steps` is {}, but {run} has made {} steps; give it at least as many",
            spec.train.steps,
            info.step
        );
    }
    let submit = Submit {
        stem: info.name.clone(),
        resume: Some(info.name),
        spec,
        name: None,
        fresh: false,
        parent: info.parent,
        start: None,
    };
    session.launch(submit, args.detach).await
}

fn refuse_others(changes: &SpecFile) -> Result<()> {
    let SpecFile {
        model,
        corpus,
        tokenizer,
        train,
        checkpoint: _,
    } = changes;
    let allowed = TrainTable {
        steps: train.steps,
        eval_every: train.eval_every,
        eval_samples: train.eval_samples,
        min_workers: train.min_workers,
        ..TrainTable::default()
    };
    let kept = SpecFile {
        train: allowed,
        checkpoint: changes.checkpoint.clone(),
        ..SpecFile::default()
    };
    let others = [
        ("model", *model != kept.model),
        ("corpus", *corpus != kept.corpus),
        ("tokenizer", *tokenizer != kept.tokenizer),
        ("train", *train != kept.train),
    ];
    if let Some((table, _)) = others.iter().find(|(_, changed)| *changed) {
        bail!(
            "a run that is resumed keeps its `{table}` values; only {CHANGEABLE} may change; leave `--resume` out for \
             another run"
        );
    }
    Ok(())
}

fn apply(spec: &mut RunSpec, changes: &SpecFile) -> Result<()> {
    let TrainTable {
        steps,
        eval_every,
        eval_samples,
        min_workers,
        ..
    } = changes.train;
    let CheckpointTable { every, keep } = changes.checkpoint;
    let train = &mut spec.train;
    train.steps = steps.unwrap_or(train.steps);
    train.eval_every = eval_every.unwrap_or(train.eval_every);
    train.eval_samples = eval_samples.unwrap_or(train.eval_samples);
    spec.checkpoint.every = every.unwrap_or(spec.checkpoint.every);
    if let Some(keep) = keep {
        spec.checkpoint.keep = u32::try_from(keep)?;
    }
    if let Some(workers) = min_workers {
        train.min_workers = u32::try_from(workers)?;
    }
    if train.min_workers > train.lanes {
        bail!(
            "`train.min_workers` is {}, but the run has only {} lanes to share",
            train.min_workers,
            train.lanes
        );
    }
    Ok(())
}
