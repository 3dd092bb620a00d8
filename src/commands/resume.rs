//! Going on with a run: `cohort resume RUN` as it is, on a coordinator that stands; `--resume RUN` perhaps for more steps
//! than were planned, and on a private cluster, too.

use std::process::ExitCode;

use anyhow::{Result, bail};
use cohort_common::api::Submit;
use cohort_common::spec::{
    CheckpointTable, RunKind, RunSpec, SampleConfig, SpecFile, SpecSource, TrainTable,
};

use crate::cli::{ResumeArgs, SubmitArgs};
use crate::commands::pretrain::take_prompts;
use crate::context::Context;
use crate::facts;
use crate::failure::hinted;
use crate::submit::Session;

/// Keys that no weight of a finished step depends on.
const CHANGEABLE: &str = "`train.steps`, `train.eval_every`, `train.eval_samples`, `train.min_workers`, \
                          `checkpoint.every`, `checkpoint.keep` and the table `samples`";

/// Runs the verb `resume`.
pub async fn verb(args: ResumeArgs) -> Result<()> {
    let out = args.json.output();
    let context = Context::of(&args.connect)?;
    let mut client = match context.connect().await {
        Ok(client) => client,
        Err(error) => return Err(without_coordinator(&context, &args.run).unwrap_or(error)),
    };
    let run = client.resume(&args.run).await?;
    out.line(&run)?;
    let place = match run.queue_place {
        Some(place) => format!("waits in the queue, place {place}"),
        None => "goes on".into(),
    };
    out.say(format!(
        "{} {place}, from step {}; `cohort follow {}` shows it",
        run.name,
        run.checkpoints.last().map_or(0, |c| c.step),
        run.name
    ));
    Ok(())
}

/// Where no coordinator answers and none was named: how the run of the home directory goes on.
fn without_coordinator(context: &Context, run: &str) -> Option<anyhow::Error> {
    if context.running().is_some() {
        return None;
    }
    let info = cohort_coordinator::offline::run(&context.home, run).ok()?;
    let verb = match info.spec.kind {
        RunKind::Eval => return None,
        kind => facts::kind(kind),
    };
    Some(hinted(
        format!(
            "no coordinator runs that could go on with `{run}`, which is {}",
            info.status
        ),
        format!(
            "`cohort {verb} --resume {run} --local N` goes on with it on this machine; or start `cohort coordinator` and \
             workers first"
        ),
    ))
}

/// Goes on with a run.
pub async fn run(run: &str, set: &[String], args: &SubmitArgs) -> Result<ExitCode> {
    let mut source = SpecSource::empty();
    for assignment in set {
        source.set(assignment)?;
    }
    let mut changes = source.into_file()?;
    take_prompts(&mut changes, args);
    refuse_others(&changes)?;
    let mut session =
        Session::open(&args.connect, &args.local, &args.notify, args.json.output()).await?;
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
        notes: Vec::new(),
    };
    Ok(session.launch(submit, args.detach).await?.code)
}

fn refuse_others(changes: &SpecFile) -> Result<()> {
    let SpecFile {
        model,
        corpus,
        tokenizer,
        train,
        checkpoint: _,
        mixture,
        lora,
        samples: _,
        watchdog,
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
        ("mixture", *mixture != kept.mixture),
        ("lora", *lora != kept.lora),
        ("watchdog", *watchdog != kept.watchdog),
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
    spec.samples = SampleConfig::changed(spec.samples.as_ref(), &changes.samples)?;
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
