//! `cohort pretrain`: a run from random weights.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use cohort_common::spec::{MixedTable, ObjectiveKind, Preset, SpecFile, SpecMeant, SpecSource};

use crate::cli::{PretrainArgs, SpecArgs, SubmitArgs};
use crate::commands::resume;
use crate::failure::hinted;
use crate::prepare::{self, Material, Mixed};
use crate::submit::{Session, submission};

/// Runs the verb.
pub async fn run(args: PretrainArgs) -> Result<ExitCode> {
    if let Some(run) = &args.resume {
        return resume::run(run, &args.text.set, &args.submit).await;
    }
    let source = match (&args.spec, &args.preset) {
        (Some(path), _) => read_spec(path)?,
        (None, Some(name)) => Preset::find(name)?.source()?,
        (None, None) => SpecSource::empty(),
    };
    let stem = match (&args.spec, &args.preset) {
        (Some(path), _) => prepare::name_of(&[path.display().to_string()]),
        (None, Some(name)) => name.clone(),
        (None, None) => "pretrain".into(),
    };
    let mut file = spec_file(source, &args.text)?;
    take_prompts(&mut file, &args.submit);
    let meant = file.validate()?;
    let material = Material::find(&meant.corpus)?;
    let mixed = Mixed::find(meant.mixture.as_ref(), &meant.corpus)?;
    let mut session = open(&args).await?;
    let result = train(&mut session, &args, meant, (&material, mixed), stem).await;
    session.close().await;
    result
}

async fn open(args: &PretrainArgs) -> Result<Session> {
    let submit = &args.submit;
    Session::open(
        &submit.connect,
        &submit.local,
        &submit.notify,
        submit.json.output(),
    )
    .await
}

async fn train(
    session: &mut Session,
    args: &PretrainArgs,
    meant: SpecMeant,
    (material, mixed): (&Material, Option<Mixed>),
    stem: String,
) -> Result<ExitCode> {
    let tokenizer = prepare::tokenizer(&meant.tokenizer)?;
    let supervised = material.supervised(meant.sample_length(), None);
    let corpus = material
        .prepare(
            tokenizer,
            supervised.clone(),
            &mut session.client,
            session.out,
        )
        .await?;
    prepare::check_length(&corpus, meant.sample_length())?;
    for note in &meant.notes {
        session.out.say(note);
    }
    let notes = meant.notes.clone();
    let mut spec = meant.run_spec(prepare::facts_of(&corpus), None)?;
    if let Some(mixed) = mixed {
        let (client, out) = (&mut session.client, session.out);
        let mixture = mixed.prepare(&corpus, supervised.as_ref(), client, out);
        spec.mixture = Some(mixture.await?);
    }
    session.adapt(&mut spec);
    let mut submit = submission(spec, &args.submit, stem);
    submit.notes = notes;
    let launched = session.launch(submit, args.submit.detach).await?;
    Ok(launched.code)
}

/// Reads a spec file.
pub fn read_spec(path: &Path) -> Result<SpecSource> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the spec `{}`", path.display()))?;
    Ok(SpecSource::parse(&path.display().to_string(), &text)?)
}

/// Applies what the command line says about the spec.
pub fn spec_file(mut source: SpecSource, args: &SpecArgs) -> Result<SpecFile> {
    for assignment in &args.set {
        source.set(assignment)?;
    }
    let mut file = source.into_file()?;
    let objectives = [
        (&args.corpus, None),
        (&args.sft, Some(ObjectiveKind::Sft)),
        (&args.classify, Some(ObjectiveKind::Classify)),
    ];
    for (paths, objective) in objectives {
        if !paths.is_empty() {
            file.corpus.paths = Some(paths.clone());
            file.corpus.objective = objective.or(file.corpus.objective);
        }
    }
    if args.skip_bad {
        file.corpus.skip_bad = Some(true);
    }
    for mix in &args.mix {
        let corpora = file.mixture.corpora.get_or_insert_default();
        corpora.push(mixed_of(mix)?);
    }
    Ok(file)
}

/// What is mixed in, and how much of it: `PATH=WEIGHT`.
fn mixed_of(text: &str) -> Result<MixedTable> {
    let (path, weight) = text.rsplit_once('=').unwrap_or((text, ""));
    let weight: f64 = weight.parse().map_err(|_| {
        hinted(
            format!("`--mix {text}` is no path with a weight"),
            "write `--mix PATH=WEIGHT`, such as `--mix tales/=0.5`",
        )
    })?;
    Ok(MixedTable {
        name: None,
        paths: Some(vec![path.to_owned()]),
        weight: Some(weight),
    })
}

/// Puts the prompts that were typed in the place of the spec's.
pub fn take_prompts(file: &mut SpecFile, args: &SubmitArgs) {
    if !args.sample_prompt.is_empty() {
        file.samples.prompts = Some(args.sample_prompt.clone());
    }
}
