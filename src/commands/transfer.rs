//! The end of `cohort finetune`: the same from scratch and on less data, where that is asked for, and the report.

use std::process::ExitCode;

use anyhow::Result;
use cohort_common::api::RunInfo;
use cohort_common::spec::{RunKind, RunSpec, TrainConfig};
use cohort_worker::engine::{DeviceChoice, Sampling};

use crate::cli::FinetuneArgs;
use crate::commands::finetune::Base;
use crate::commands::generate::Writer;
use crate::context::Context;
use crate::references::{self, Found};
use crate::submit::{Rest, Session, submission};
use crate::transfer::{self, Outcome, Report, Sample, Start};

/// The peak rate from scratch where that of the base is not known: the default of pretraining.
const SCRATCH_RATE: f64 = 1e-3;

/// Words of the text that both models go on from.
const PROMPT_WORDS: usize = 8;

/// Tokens that each of them writes.
const SAMPLE_TOKENS: usize = 40;

/// The report as an event.
#[derive(serde::Serialize)]
struct Line<'a> {
    event: &'static str,
    run: &'a str,
    #[serde(flatten)]
    report: &'a Report,
}

/// Trains what the finished run is compared with, and reports. `Err` in the result is the exit code of a comparison that
/// was stopped.
pub async fn conclude(
    session: &mut Session,
    args: &FinetuneArgs,
    base: &Base,
    run: &str,
    spec: &RunSpec,
) -> Result<Result<(), ExitCode>> {
    let info = session.client.run(run).await?;
    let Some(own) = Outcome::of(&info, Start::Pretrained) else {
        return Ok(Ok(()));
    };
    let mut runs = vec![own];
    let mut shares: Vec<f64> = args.shares.clone();
    if args.against_scratch && !shares.contains(&1.0) {
        shares.insert(0, 1.0);
    }
    for share in shares {
        for start in [Start::Pretrained, Start::Scratch] {
            if start == Start::Pretrained && share == 1.0 {
                continue;
            }
            match compared(session, args, base, (run, spec), (share, start)).await? {
                Ok(info) => runs.extend(Outcome::of(&info, start)),
                Err(code) => return Ok(Err(code)),
            }
        }
    }
    let context = Context::of(&args.submit.connect)?;
    let report = Report {
        base: base.name.clone(),
        samples: samples(session, &context, args, base, run, spec).await?,
        runs,
    };
    let directory = match &args.report {
        Some(directory) => directory.clone(),
        None => context.home.join("reports").join(run),
    };
    let written = tokio::task::block_in_place(|| transfer::write(&report, &directory))?;
    session.out.say(format!("\n{}", report.text()));
    for path in written {
        session.out.say(format!("report      {}", path.display()));
    }
    session.out.line(&Line {
        event: "transfer",
        run,
        report: &report,
    })?;
    Ok(Ok(()))
}

/// A run to compare with, trained now or found finished.
async fn compared(
    session: &mut Session,
    args: &FinetuneArgs,
    base: &Base,
    (run, spec): (&str, &RunSpec),
    (share, start): (f64, Start),
) -> Result<Result<RunInfo, ExitCode>> {
    let mut other = spec.clone();
    other.train.data_share = (share < 1.0).then_some(share);
    // The report has what both write at the end.
    other.samples = None;
    let mut name = run.to_owned();
    if start == Start::Scratch {
        from_scratch(&mut other, base.train.as_ref());
        name += "-scratch";
    }
    if share < 1.0 {
        name += &format!("-{}", (1000.0 * share).round() / 10.0).replace('.', "p");
    }
    if let Ok(found) = session.client.run(&name).await
        && found.status == "finished"
        && found.spec.identity() == other.identity()
    {
        return Ok(Ok(found));
    }
    let mut submit = submission(other, &args.submit, name.clone());
    submit.name = Some(name);
    submit.fresh = false;
    if start == Start::Pretrained {
        submit.parent = Some(base.name.clone());
        submit.start = Some(base.files.clone());
    }
    session.out.say(format!("\n{}", submit.spec.describe()));
    let submitted = session.submit(&submit).await?;
    let rest = session.watch(&submitted.run, submitted.after, 0).await?;
    match rest {
        Rest::Finished(_) => Ok(Ok(session.client.run(&submitted.run).await?)),
        rest => Ok(Err(session
            .conclude(&submitted.run, &submit.spec, rest)
            .await?)),
    }
}

/// The same model on the same data with the same budget, but from random weights, at the rate that suits those.
fn from_scratch(spec: &mut RunSpec, base: Option<&TrainConfig>) {
    spec.kind = RunKind::Pretrain;
    spec.start = None;
    spec.lora = None;
    let train = &mut spec.train;
    let peak = base.map_or(SCRATCH_RATE, |base| base.learning_rate);
    let floor = train.min_learning_rate / train.learning_rate;
    train.learning_rate = peak;
    train.min_learning_rate = peak * floor;
    train.weight_decay = base.map_or(0.1, |base| base.weight_decay);
    train.replay = None;
    train.max_forgetting = None;
    train.early_stopping_patience = None;
}

/// What both models write after the same words. A classifier writes nothing.
async fn samples(
    session: &mut Session,
    context: &Context,
    args: &FinetuneArgs,
    base: &Base,
    run: &str,
    spec: &RunSpec,
) -> Result<Vec<Sample>> {
    if spec.model.classifies() {
        return Ok(Vec::new());
    }
    let prompts = match args.prompt.is_empty() {
        false => args.prompt.clone(),
        true => {
            let corpus = session.client.corpus(&spec.corpus).await?;
            let sample = corpus.sample.unwrap_or_default();
            let line = sample.lines().find(|line| !line.trim().is_empty());
            let line = line.unwrap_or_default();
            vec![match corpus.supervised {
                // The prompt, as it stands before its response.
                Some(_) => format!("{line}\n"),
                None => line
                    .split(' ')
                    .take(PROMPT_WORDS)
                    .collect::<Vec<_>>()
                    .join(" "),
            }]
        }
    };
    let before = references::find(context, &base.name).await?;
    let after = references::find(context, &format!("{run}@best")).await?;
    let written = tokio::task::spawn_blocking(move || -> Result<Vec<Sample>> {
        let write = |found: &Found| -> Result<Vec<String>> {
            let mut writer = Writer::of(found, &found.open()?, DeviceChoice::Auto, 0)?;
            let texts = prompts.iter().map(|prompt| continued(&mut writer, prompt));
            texts.collect()
        };
        let (before, after) = (write(&before)?, write(&after)?);
        let texts = prompts.iter().zip(before).zip(after);
        Ok(texts
            .map(|((prompt, before), after)| Sample {
                prompt: prompt.clone(),
                before,
                after,
            })
            .collect())
    });
    written.await?
}

/// The likeliest continuation of a prompt, without it.
fn continued(writer: &mut Writer, prompt: &str) -> Result<String> {
    let sampling = Sampling {
        max_tokens: SAMPLE_TOKENS,
        temperature: 0.0,
        top_k: None,
        top_p: None,
        seed: 0,
    };
    let mut text = String::new();
    writer.write(prompt, &sampling, &mut |new| {
        text += new;
        true
    })?;
    Ok(text.strip_prefix(prompt).unwrap_or(&text).to_owned())
}
