//! `cohort eval --local N`: the same scores from a private cluster. The text becomes a corpus of two halves; a run
//! without steps validates both, cut into units that the workers share.

use anyhow::{Result, anyhow, bail};
use cohort_common::spec::{RunKind, SpecFile, SplitKind};
use cohort_worker::engine::Sums;

use crate::cli::{EvalArgs, LocalArgs, NotifyArgs, SubmitArgs};
use crate::commands::eval::{Score, Scored};
use crate::commands::finetune;
use crate::prepare::Material;
use crate::references;
use crate::submit::{Rest, Session, submission};

/// Windows in one unit.
const UNIT: u32 = 8;

/// Runs the verb on a private cluster.
pub async fn run(args: EvalArgs) -> Result<()> {
    let mut file = SpecFile::default();
    let paths = args.text.iter().map(|path| path.display().to_string());
    file.corpus.paths = Some(paths.collect());
    file.corpus.text_field = Some(args.text_field.clone());
    file.corpus.skip_bad = Some(args.skip_bad);
    file.corpus.validation = Some(0.5);
    file.corpus.split = Some(SplitKind::Auto);
    let material = Material::find(&file.validate()?.corpus)?;
    let local = LocalArgs {
        local: args.local,
        threads: args.threads,
        ..LocalArgs::default()
    };
    let mut session = Session::open(
        &args.connect,
        &local,
        &NotifyArgs::default(),
        args.json.output(),
    )
    .await?;
    let scored = score(&mut session, &args, &file, &material).await;
    let out = session.out;
    session.close().await;
    let (name, scored) = scored?;
    Score::new(&name, &scored)?.print(&name, out)
}

async fn score(
    session: &mut Session,
    args: &EvalArgs,
    file: &SpecFile,
    material: &Material,
) -> Result<(String, Scored)> {
    let base = match references::outside(&references::parse(&args.from)?).await? {
        Some(found) => finetune::of_directory(session, &found.open()?, found.name).await?,
        None => finetune::of_run(session, &args.from).await?,
    };
    let planned = finetune::plan(session, file, material, &base).await?;
    let (mut spec, files) = (planned.spec, planned.files);
    spec.kind = RunKind::Eval;
    spec.train.steps = 0;
    spec.train.micro_batch = UNIT;
    spec.train.eval_samples = 0;
    if let Some(start) = &mut spec.start {
        start.base_corpus = None;
    }
    let corpus = session.client.corpus(&spec.corpus).await?;
    let mut submit = submission(spec, &SubmitArgs::default(), "eval".into());
    submit.fresh = true;
    submit.parent = Some(base.name.clone());
    submit.start = Some(files);
    let submitted = session.client.submit(&submit).await?;
    let rest = session.watch(&submitted.run, submitted.after, 0).await?;
    let evals = session.client.run(&submitted.run).await?.evals;
    session.client.remove_run(&submitted.run, false).await?;
    match rest {
        Rest::Finished(_) => {}
        Rest::Failed(error) => return Err(anyhow!(error)),
        _ => bail!("the evaluation was stopped"),
    }
    let sums = evals.iter().fold(Sums::default(), |sums, eval| Sums {
        loss: sums.loss + eval.loss * eval.tokens as f64,
        weight: sums.weight + eval.tokens as f64,
    });
    Ok((
        base.name,
        Scored {
            sums,
            bytes: corpus.train.bytes + corpus.validation.bytes,
            documents: corpus.train.documents + corpus.validation.documents,
        },
    ))
}
