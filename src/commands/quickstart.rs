//! `cohort quickstart`: the whole way on one machine, from raw text to generated text, without any download.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use cohort_common::api::{CorpusInfo, EvalEvent, FinishedEvent, RunEvent, RunInfo};
use cohort_common::corpus::Selection;
use cohort_common::spec::{CorpusOptions, RunSpec, SpecFile, SpecMeant, SpecSource, SplitKind};
use cohort_worker::engine::{DeviceChoice, Sampling};

use crate::cli::{LocalArgs, NotifyArgs, QuickstartArgs, SubmitArgs};
use crate::commands::finetune;
use crate::commands::generate::Writer;
use crate::context::Context;
use crate::facts::first_and_last;
use crate::output::{Output, duration, table};
use crate::prepare::{self, Material, Text};
use crate::references;
use crate::registry::{self, Kind};
use crate::submit::{Rest, Session, submission};

/// A model that two cores can train in minutes.
const SPEC: &str = r#"
[model]
architecture = "llama"
context = 128
hidden_size = 192
num_hidden_layers = 4
num_attention_heads = 4

[tokenizer]
kind = "bpe"
vocab_size = 2048

[train]
lanes = 4
micro_batch = 4
learning_rate = 3e-3
eval_samples = 128
"#;

/// Steps of the run that is only timed.
const TIMED_STEPS: u64 = 8;
/// Of those, the first that are not: they warm caches up.
const WARM_UP: usize = 2;
/// Finetuning takes this part of the steps of pretraining.
const FINETUNE_SHARE: u64 = 5;
/// Tokens of a sample.
const SAMPLE_TOKENS: usize = 120;

/// The text of one of the two runs.
struct Corpus {
    material: Material,
    /// A beginning that fits the text.
    prompt: &'static str,
}

/// A run that has finished.
struct Trained {
    info: RunInfo,
    end: FinishedEvent,
}

/// Runs the verb.
pub async fn run(args: QuickstartArgs) -> Result<ExitCode> {
    if !(args.minutes > 0.0 && args.minutes.is_finite()) {
        bail!("`--minutes` is {}, but must be above 0", args.minutes);
    }
    let first = corpus("rust-sources", &args.corpus, Kind::Rust)?;
    let second = corpus("markdown", &args.finetune_corpus, Kind::Markdown)?;
    let local = LocalArgs {
        local: match args.connect.coordinator.is_empty() {
            false => None,
            true => Some(args.workers.unwrap_or(2)),
        },
        threads: args.threads,
        ..LocalArgs::default()
    };
    let out = args.json.output();
    let mut session = Session::open(&args.connect, &local, &NotifyArgs::default(), out).await?;
    let result = train(&mut session, args.minutes, &first, &second).await;
    session.close().await;
    let (pretrained, finetuned) = match result? {
        Ok(both) => both,
        Err(code) => return Ok(code),
    };
    out.say(report(&pretrained, &finetuned, &first, &second));
    let context = Context::of(&args.connect)?;
    for (trained, corpus) in [(&pretrained, &first), (&finetuned, &second)] {
        sample(&context, trained, corpus.prompt, out).await?;
    }
    out.say(format!(
        "\nmore of it: cohort generate --from {}@best --prompt '{}'",
        finetuned.info.name, second.prompt
    ));
    Ok(ExitCode::SUCCESS)
}

/// The paths that the user names, or the text that is there anyway.
fn corpus(name: &str, paths: &[String], kind: Kind) -> Result<Corpus> {
    let options = CorpusOptions {
        paths: paths.to_vec(),
        text_field: "text".into(),
        validation: 0.1,
        split: SplitKind::Auto,
        skip_bad: false,
        supervised: None,
        selection: Selection::default(),
    };
    let material = match paths.is_empty() {
        true => Material {
            name: name.into(),
            text: Text::grouped(registry::files(kind)?),
            options: CorpusOptions {
                split: SplitKind::Document,
                ..options
            },
        },
        false => Material::find(&options)?,
    };
    let prompt = match kind {
        _ if !paths.is_empty() => "The ",
        Kind::Rust => "pub fn ",
        Kind::Markdown => "# ",
    };
    Ok(Corpus { material, prompt })
}

/// Both runs, or the exit code of one that did not finish.
async fn train(
    session: &mut Session,
    minutes: f64,
    first: &Corpus,
    second: &Corpus,
) -> Result<Result<(Trained, Trained), ExitCode>> {
    let out = session.out;
    let prepared = prepare_corpus(session, first).await?;
    let seconds = time_step(session, &prepared).await?;
    let steps = ((minutes * 60.0 / seconds).round() as u64).clamp(TIMED_STEPS, 1_000_000);
    out.say(format!(
        "timing      {seconds:.3} s per step, so {minutes} minutes are {steps} steps, and from here on the run is \
         reproducible"
    ));
    let spec = spec(session, &prepared, steps)?;
    let pretrained = match finish(session, spec, None).await? {
        Ok(trained) => trained,
        Err(code) => return Ok(Err(code)),
    };
    let base = finetune::of_run(session, &format!("{}@last", pretrained.info.name)).await?;
    let mut file = SpecFile::default();
    let tuning = (steps / FINETUNE_SHARE).max(1);
    file.train.steps = Some(tuning);
    file.train.eval_every = Some(tuning);
    file.train.eval_samples = Some(meant(steps)?.train.eval_samples);
    let planned = finetune::plan(session, &file, &second.material, &base).await?;
    let start = Some((base.name, planned.files));
    Ok(finish(session, planned.spec, start)
        .await?
        .map(|finetuned| (pretrained, finetuned)))
}

async fn prepare_corpus(session: &mut Session, corpus: &Corpus) -> Result<CorpusInfo> {
    let meant = SpecSource::parse("quickstart", SPEC)?
        .into_file()?
        .validate()?;
    let tokenizer = prepare::tokenizer(&meant.tokenizer)?;
    let material = &corpus.material;
    let prepared = material
        .prepare(tokenizer, None, &mut session.client, session.out)
        .await?;
    prepare::check_length(&prepared, meant.model.context)?;
    Ok(prepared)
}

fn meant(steps: u64) -> Result<SpecMeant> {
    let mut source = SpecSource::parse("quickstart", SPEC)?;
    source.set(&format!("train.steps={steps}"))?;
    source.set(&format!("train.eval_every={}", steps.div_ceil(4)))?;
    Ok(source.into_file()?.validate()?)
}

fn spec(session: &Session, corpus: &CorpusInfo, steps: u64) -> Result<RunSpec> {
    let mut spec = meant(steps)?.run_spec(prepare::facts_of(corpus), None)?;
    session.adapt(&mut spec);
    Ok(spec)
}

/// The time of a step, from the first steps of a run of the same spec that is thrown away.
async fn time_step(session: &mut Session, corpus: &CorpusInfo) -> Result<f64> {
    let mut spec = spec(session, corpus, TIMED_STEPS)?;
    spec.train.eval_every = 0;
    spec.train.eval_samples = 1;
    spec.checkpoint.every = 0;
    let mut submit = submission(spec, &SubmitArgs::default(), "quickstart-timing".into());
    submit.fresh = true;
    let submitted = session.client.submit(&submit).await?;
    let mut events = session
        .client
        .follow(&submitted.run, submitted.after)
        .await?;
    let mut times = Vec::new();
    while let Some(numbered) = events.next_of_run().await? {
        match numbered.event {
            RunEvent::Step(_) => times.push(Instant::now()),
            RunEvent::Failed { error, .. } => bail!("the run that was to be timed failed: {error}"),
            _ => {}
        }
    }
    session.client.remove_run(&submitted.run, false).await?;
    let mut spans: Vec<f64> = times
        .windows(2)
        .map(|t| (t[1] - t[0]).as_secs_f64())
        .collect();
    spans.drain(..WARM_UP.min(spans.len().saturating_sub(1)));
    spans.sort_by(f64::total_cmp);
    let median = spans.get(spans.len() / 2).copied();
    median.context("the run that was to be timed made no steps")
}

/// Trains until the run rests.
async fn finish(
    session: &mut Session,
    spec: RunSpec,
    start: Option<(String, cohort_common::api::StartFiles)>,
) -> Result<Result<Trained, ExitCode>> {
    session.out.say(spec.describe());
    let stem = if start.is_some() {
        "quickstart-finetune"
    } else {
        "quickstart"
    };
    let mut submit = submission(spec, &SubmitArgs::default(), stem.into());
    submit.fresh = true;
    (submit.parent, submit.start) = start.unzip();
    let submitted = session.submit(&submit).await?;
    let rest = session.watch(&submitted.run, submitted.after, 0).await?;
    if let Rest::Finished(end) = rest {
        let info = session.client.run(&submitted.run).await?;
        return Ok(Ok(Trained { info, end: *end }));
    }
    let code = session.conclude(&submitted.run, &submit.spec, rest).await?;
    Ok(Err(code))
}

/// What both runs gave.
fn report(pretrained: &Trained, finetuned: &Trained, first: &Corpus, second: &Corpus) -> String {
    let mut rows = vec![heading(&[
        "validation text",
        "loss pretrained",
        "finetuned",
        "bits per byte pretrained",
        "finetuned",
    ])];
    for (corpus, split) in [(first, "base_validation"), (second, "validation")] {
        let (before, after) = first_and_last(&finetuned.info, split);
        let cell = |eval: Option<&EvalEvent>, value: fn(&EvalEvent) -> f64| {
            eval.map_or("-".into(), |eval| format!("{:.4}", value(eval)))
        };
        rows.push(vec![
            corpus.material.name.clone(),
            cell(before, |eval| eval.loss),
            cell(after, |eval| eval.loss),
            cell(before, |eval| eval.bits_per_byte.unwrap_or(f64::NAN)),
            cell(after, |eval| eval.bits_per_byte.unwrap_or(f64::NAN)),
        ]);
    }
    let mut runs = vec![heading(&["run", "steps", "tokens/s", "time", "checkpoint"])];
    for Trained { end, .. } in [pretrained, finetuned] {
        runs.push(vec![
            end.run.clone(),
            end.step.to_string(),
            format!("{:.0}", end.tokens_per_second.unwrap_or_default()),
            duration(end.seconds),
            end.checkpoint.clone().unwrap_or_default(),
        ]);
    }
    format!("\n{}\n\n{}", table(&rows), table(&runs))
}

fn heading(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Lets a model write a little.
async fn sample(
    context: &Context,
    trained: &Trained,
    prompt: &'static str,
    out: Output,
) -> Result<()> {
    let found = references::find(context, &format!("{}@last", trained.info.name)).await?;
    let name = found.name.clone();
    let text = tokio::task::spawn_blocking(move || -> Result<String> {
        let sampling = Sampling {
            max_tokens: SAMPLE_TOKENS,
            temperature: 0.7,
            top_k: None,
            top_p: Some(0.95),
            seed: 1,
        };
        let mut text = String::new();
        let mut writer = Writer::of(&found, &found.open()?, DeviceChoice::Auto, 0)?;
        writer.write(prompt, &sampling, &mut |new| {
            text += new;
            true
        })?;
        Ok(text)
    })
    .await??;
    out.say(format!("\n--- {name} writes ---\n{text}"));
    Ok(())
}
