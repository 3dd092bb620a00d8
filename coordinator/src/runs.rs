//! From a submission to a run that may train: checks, names, start weights, where to go on from. `plan.rs` makes of it what
//! the machine carries out.

use std::path::Path;

use cohort_common::api::{
    CheckpointInfo, Classes, EvalEvent, RunEvent, RunFacts, StartFiles, Submit, Submitted,
};
use cohort_common::checkpoint::{
    CHAT_TEMPLATE, CONFIG, Checkpoint, GENERATION, OPTIMIZER, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS,
    WEIGHTS_INDEX, hex, is_plain_name,
};
use cohort_common::cluster::StateSource;
use cohort_common::corpus::Corpus;
use cohort_common::home::{Home, RunName};
use cohort_common::spec::{RunKind, RunSpec};
use tonic::Status;

use crate::data::{blocking, open_corpus, start_directory, stored_file};
use crate::driver::{Cluster, now_ms};
use crate::plan::{check_prompts, enqueue, facts_of};
use crate::remote::RemoteError;
use crate::status::{chain, failed, invalid, missing, refused};
use crate::store::{CheckpointRow, EvalRow, NewRun, RunRow, RunStatus, Store, StoreError};

/// Files that a start directory may hold, besides the shards of a sharded model.
const START_FILES: &[&str] = &[
    WEIGHTS,
    WEIGHTS_INDEX,
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    GENERATION,
    CHAT_TEMPLATE,
];

/// Whether a start directory may hold the file. Moments may not come along: a run begins with its own.
fn may_start(file: &str) -> bool {
    let shard = is_plain_name(file) && file.ends_with(".safetensors") && file != OPTIMIZER;
    shard || START_FILES.contains(&file)
}

/// Takes a submission in: makes a run, or takes up an unfinished one.
pub async fn submit(cluster: &Cluster, submit: Submit) -> Result<Submitted, Status> {
    let after = last_event(cluster).await?;
    let corpus = check(cluster, &submit.spec).await?;
    if let Some(row) = find(cluster, &submit).await? {
        return resume(cluster, row, submit.spec, corpus, after).await;
    }
    let facts = facts_of(&submit.spec, &corpus, submit.notes.clone());
    let name = create(cluster, &submit, facts).await?;
    if let Err(status) = furnish(cluster, &name, &submit, &corpus).await {
        let doomed = name.clone();
        let deleted = cluster.store().call(move |s| s.delete_run(&doomed)).await;
        deleted.map_err(failed)?;
        return Err(status);
    }
    let source = first_source(&submit.spec);
    let was = RunStatus::Queued;
    enqueue(cluster, &name, was, 0, submit.spec, corpus, source).await?;
    if let Some(remote) = cluster.remote().filter(|_| cluster.leadership().is_some()) {
        // What it reads and starts from goes there now; and whoever submits it may rely on it.
        remote.changed(&name);
        remote.noted(&name).await;
    }
    Ok(Submitted {
        run: name.to_string(),
        resumed_at: None,
        after,
    })
}

/// Puts what a new run starts from in its place, and checks what can only be checked then.
async fn furnish(
    cluster: &Cluster,
    name: &RunName,
    submit: &Submit,
    corpus: &Corpus,
) -> Result<(), Status> {
    if let Some(start) = &submit.start {
        place_start(cluster, name, start, &submit.spec).await?;
    }
    check_prompts(cluster, name, &submit.spec, corpus).await
}

/// Takes up the runs that were under way when a coordinator ended.
pub async fn take_up(cluster: &Cluster) {
    let listed = cluster.store().call(|s| s.runs()).await;
    let rows = listed.unwrap_or_default();
    let was_under_way = |r: &RunRow| matches!(r.status, RunStatus::Queued | RunStatus::Running);
    for row in rows.into_iter().filter(was_under_way) {
        let name = row.name.clone();
        let failed = name.clone();
        if let Err(status) = take_up_one(cluster, row, false).await {
            if !cluster.may_commit() {
                // It is not the run's fault: this process leads no more.
                return;
            }
            let error = status.message().to_owned();
            tracing::error!(run = %name, error, "cannot go on with this run");
            cluster.notices().event(&RunEvent::Failed {
                run: name.to_string(),
                error: error.clone(),
            });
            let mark =
                move |s: &Store| s.set_status(&name, RunStatus::Failed, Some(&error), now_ms());
            if let Err(error) = cluster.store().call(mark).await {
                tracing::error!(%error, "cannot record that");
            }
            cluster.note(&failed);
        }
    }
}

/// Takes a run up; with `take_over` even if another coordinator has written it to the object store last.
async fn take_up_one(cluster: &Cluster, row: RunRow, take_over: bool) -> Result<(), Status> {
    let spec = row.spec.clone();
    bring_back(cluster, &row.name, &spec, take_over).await?;
    let corpus = check(cluster, &spec).await?;
    let source = newest_state(cluster, &row.name, &spec).await?;
    // Workers of a run that rests have forgotten its state.
    let expected = match row.status {
        RunStatus::Running => row.workers as usize,
        _ => 0,
    };
    enqueue(
        cluster, &row.name, row.status, expected, spec, corpus, source,
    )
    .await
}

/// Goes on with a run that rests, as it is, from its newest checkpoint.
pub async fn resume_as_it_is(cluster: &Cluster, name: &RunName) -> Result<(), Status> {
    let wanted = name.clone();
    let row = cluster.store().call(move |s| s.run(&wanted)).await;
    let row = row.map_err(missing)?;
    match row.status {
        RunStatus::Finished => Err(finished(&row)),
        RunStatus::Queued => Err(refused(format!(
            "run `{name}` waits in the queue already; `cohort follow {name}` shows it"
        ))),
        RunStatus::Running => Err(under_way(name)),
        RunStatus::Paused | RunStatus::Interrupted | RunStatus::Failed | RunStatus::Cancelled => {
            take_up_one(cluster, row, true).await
        }
    }
}

/// The error of taking up a run that somebody works on.
pub fn under_way(name: &RunName) -> Status {
    refused(format!(
        "run `{name}` is under way already; `cohort follow {name}` shows it"
    ))
}

fn first_source(spec: &RunSpec) -> StateSource {
    match spec.start {
        Some(_) => StateSource::Start,
        None => StateSource::Seed,
    }
}

async fn last_event(cluster: &Cluster) -> Result<u64, Status> {
    let last = |s: &Store| s.last_event();
    cluster.store().call(last).await.map_err(failed)
}

/// Checks that the run's corpus is here and fits.
async fn check(cluster: &Cluster, spec: &RunSpec) -> Result<Corpus, Status> {
    if let Some(remote) = cluster.remote()
        && let Err(error) = remote.bring_corpora(spec).await
    {
        let error = chain(&error);
        tracing::warn!(error, "cannot bring a corpus back from the store");
    }
    let home = cluster.home().clone();
    let spec = spec.clone();
    blocking(move || {
        let corpus = open_corpus(&home, &spec.corpus)?;
        let index = corpus.index();
        let vocab = index.tokenizer.vocab_size as usize;
        if vocab > spec.model.vocab_size {
            return Err(invalid(format!(
                "the tokenizer has {vocab} tokens, but the model's vocabulary has {}; a tokenizer must be the one that the checkpoint was trained with",
                spec.model.vocab_size
            )));
        }
        if spec.kind != RunKind::Eval {
            index.samples(spec.sample_length()).map_err(invalid)?;
        }
        if spec.train.replay.is_some() {
            check_replay(&spec)?;
        }
        for other in &spec.training_corpora()[1..] {
            check_other(&home, &spec, &corpus, other)?;
        }
        let labels = index.supervised.as_ref().map_or(&[][..], |s| &s.labels);
        if labels != spec.model.labels {
            return Err(invalid(format!(
                "the corpus has the labels {labels:?}, but the model {:?}; a classifier is trained on the labels of its head",
                spec.model.labels
            )));
        }
        Ok(corpus)
    })
    .await
}

/// Checks that the base's corpus can be mixed into the run's.
fn check_replay(spec: &RunSpec) -> Result<(), Status> {
    if spec.replayed_corpus().is_none() {
        return Err(invalid(
            "`train.replay` needs the corpus that the checkpoint was trained on, and it is not here",
        ));
    }
    if spec.model.classifies() {
        return Err(invalid(
            "`train.replay` mixes text in, and a classifier has no head for text",
        ));
    }
    Ok(())
}

/// Checks that another corpus can be mixed into the run's.
fn check_other(home: &Home, spec: &RunSpec, own: &Corpus, other: &str) -> Result<(), Status> {
    let other = open_corpus(home, other)?;
    let (index, own) = (other.index(), own.index());
    if index.tokenizer.fingerprint != own.tokenizer.fingerprint {
        return Err(invalid(format!(
            "the corpora `{}` and `{}` have different tokenizers; only texts of one tokenizer can be mixed or replayed",
            own.name, index.name
        )));
    }
    index.samples(spec.sample_length()).map_err(invalid)?;
    Ok(())
}

/// The unfinished run that this submission means, if any.
async fn find(cluster: &Cluster, submit: &Submit) -> Result<Option<RunRow>, Status> {
    if let Some(resume) = &submit.resume {
        let name = RunName::new(resume).map_err(invalid)?;
        let row = cluster.store().call(move |s| s.run(&name)).await;
        let row = row.map_err(missing)?;
        check_same(&row, &submit.spec)?;
        return Ok(Some(row));
    }
    if let Some(name) = &submit.name {
        let name = RunName::new(name).map_err(invalid)?;
        let row = cluster.store().call(move |s| s.run(&name)).await;
        return match row {
            Ok(row) if row.identity == submit.spec.identity() && !submit.fresh => {
                if row.status == RunStatus::Finished {
                    return Err(finished(&row));
                }
                Ok(Some(row))
            }
            Ok(row) => Err(refused(format!(
                "there is a run `{}` already, of another spec or corpus; choose another --name",
                row.name
            ))),
            Err(StoreError::UnknownRun(_)) => Ok(None),
            Err(error) => Err(failed(error)),
        };
    }
    if submit.fresh {
        return Ok(None);
    }
    let identity = submit.spec.identity();
    let found = cluster.store().call(move |s| s.find_unfinished(&identity));
    found.await.map_err(failed)
}

fn finished(row: &RunRow) -> Status {
    refused(format!(
        "run `{}` has finished its {} steps; raise them with `--resume {} --set train.steps=N`, or make another run with --new",
        row.name, row.step, row.name
    ))
}

fn check_same(row: &RunRow, spec: &RunSpec) -> Result<(), Status> {
    let mut recorded = row.spec.clone();
    recorded.train.steps = spec.train.steps;
    if recorded.identity() != spec.identity() {
        return Err(refused(format!(
            "run `{}` has another spec; only train.steps, validation, checkpoint and worker settings can change when it is resumed",
            row.name
        )));
    }
    let done = row.status == RunStatus::Finished;
    if done && spec.train.steps <= row.step {
        return Err(finished(row));
    }
    Ok(())
}

async fn resume(
    cluster: &Cluster,
    row: RunRow,
    spec: RunSpec,
    corpus: Corpus,
    after: u64,
) -> Result<Submitted, Status> {
    let submitted = |step| Submitted {
        run: row.name.to_string(),
        resumed_at: Some(step),
        after,
    };
    if matches!(row.status, RunStatus::Queued | RunStatus::Running) {
        // It is under way: whoever asks is to follow it from its beginning.
        return Ok(Submitted {
            after: 0,
            ..submitted(row.step)
        });
    }
    bring_back(cluster, &row.name, &spec, true).await?;
    check_prompts(cluster, &row.name, &spec, &corpus).await?;
    let source = newest_state(cluster, &row.name, &spec).await?;
    let (name, new) = (row.name.clone(), spec.clone());
    let from = source.step();
    let moved = new.train.steps != row.spec.train.steps;
    let updated = move |s: &Store| {
        if moved {
            // Another horizon means other learning rates: what was committed after the checkpoint is another run's.
            s.truncate(&name, from)?;
        }
        s.set_spec(&name, &new, &new.identity())
    };
    cluster.store().call(updated).await.map_err(failed)?;
    enqueue(cluster, &row.name, row.status, 0, spec, corpus, source).await?;
    Ok(submitted(source.step()))
}

/// Brings back from the object store what a run needs to go on and this home lacks.
async fn bring_back(
    cluster: &Cluster,
    name: &RunName,
    spec: &RunSpec,
    take_over: bool,
) -> Result<(), Status> {
    let Some(remote) = cluster.remote() else {
        return Ok(());
    };
    let run = name.clone();
    let recorded = cluster.store().call(move |s| s.checkpoints(&run)).await;
    let newest = recorded.map_err(failed)?.last().map(|row| row.step);
    let brought = remote.bring_back(name, spec, newest, take_over).await;
    let Err(error) = brought else {
        return Ok(());
    };
    let here = |step| cluster.home().checkpoint(name, step).is_dir();
    match &error {
        // Training does not wait for the store where everything is here.
        RemoteError::Object(away) if away.is_transient() && newest.is_none_or(here) => {
            let error = chain(&error);
            tracing::warn!(run = %name, error, "the store cannot be asked; the run goes on with what is here");
            Ok(())
        }
        _ => Err(refused(chain(&error))),
    }
}

/// The newest state of a run on disk. A damaged checkpoint is an error, not a reason to go further back unasked.
async fn newest_state(
    cluster: &Cluster,
    name: &RunName,
    spec: &RunSpec,
) -> Result<StateSource, Status> {
    let first = first_source(spec);
    let directory = cluster.home().checkpoints(name);
    let (run, of) = (name.clone(), name.clone());
    let recorded = cluster.store().call(move |s| s.checkpoints(&of)).await;
    let recorded = recorded.map_err(failed)?;
    blocking(move || {
        let listed = cohort_common::checkpoint::list_checkpoints(&directory).map_err(failed)?;
        // One that was written just when a coordinator was killed: no worker has vouched for it.
        let (found, unvouched): (Vec<_>, Vec<_>) = listed
            .into_iter()
            .partition(|(step, _)| recorded.iter().any(|row| row.step == *step));
        for (_, path) in unvouched {
            tracing::warn!(path = %path.display(), "deleted a checkpoint that nobody vouches for");
            cohort_common::checkpoint::remove_checkpoint(&path)
                .map_err(|error| failed(format!("{}: {error}", path.display())))?;
        }
        let newest = recorded.iter().map(|row| row.step).max();
        if let Some(recorded) = newest.filter(|step| found.iter().all(|(found, _)| found < step)) {
            let from = found.last().map_or(0, |(step, _)| *step);
            tracing::warn!(
                run = %run,
                "the checkpoint of step {recorded} is gone; the steps after {from} are computed again, to the same bits"
            );
        }
        let Some((step, path)) = found.into_iter().next_back() else {
            return Ok(first);
        };
        let verified = Checkpoint::open(&path).and_then(|c| c.verify());
        verified.map_err(|error| {
            refused(format!(
                "the newest checkpoint is damaged: {error}; delete {} to go on from the one before",
                path.display()
            ))
        })?;
        Ok(StateSource::Checkpoint(step))
    })
    .await
}

async fn create(cluster: &Cluster, submit: &Submit, facts: RunFacts) -> Result<RunName, Status> {
    let stem = RunName::new(&submit.stem).map_err(invalid)?;
    let wanted = submit.name.as_deref().map(RunName::new).transpose();
    let wanted = wanted.map_err(invalid)?;
    let spec = submit.spec.clone();
    let parent = submit.parent.clone();
    let created = move |store: &Store| {
        let name = match wanted {
            Some(name) => name,
            None => store.next_run_name(&stem)?,
        };
        let run = NewRun {
            name: name.clone(),
            identity: spec.identity(),
            spec,
            parent,
            facts: Some(facts),
        };
        store.create_run(&run, now_ms())?;
        Ok(name)
    };
    cluster.store().call(created).await.map_err(refused)
}

/// Copies the weights that a run starts from into the run, so that it does not depend on anything else any more.
async fn place_start(
    cluster: &Cluster,
    name: &RunName,
    start: &StartFiles,
    spec: &RunSpec,
) -> Result<(), Status> {
    let home = cluster.home().clone();
    let target = start_directory(&home, name);
    let start = start.clone();
    let spec = spec.clone();
    let from = match &start {
        StartFiles::Checkpoint(reference) => Some(crate::query::resolve(cluster, reference).await?),
        StartFiles::Uploaded(_) => None,
    };
    blocking(move || {
        std::fs::create_dir_all(&target).map_err(failed)?;
        let copy = |from: &Path, file: &str| -> Result<(), Status> {
            std::fs::copy(from, target.join(file))
                .map(|_| ())
                .map_err(|error| failed(format!("{}: {error}", from.display())))
        };
        match (&start, from) {
            (StartFiles::Uploaded(files), _) => {
                for (file, hash) in files {
                    if !may_start(file) {
                        return Err(invalid(format!("`{file}` is no file of a checkpoint")));
                    }
                    copy(&stored_file(&home, hash)?, file)?;
                }
            }
            (StartFiles::Checkpoint(_), from) => {
                let from = from.expect("resolved above").checkpoint.path;
                for file in START_FILES {
                    let path = Path::new(&from).join(file);
                    if path.exists() {
                        copy(&path, file)?;
                    }
                }
            }
        }
        check_start(&target, &spec)
    })
    .await
}

fn check_start(target: &Path, spec: &RunSpec) -> Result<(), Status> {
    let checkpoint = Checkpoint::open(target).map_err(invalid)?;
    if !checkpoint.model().can_become(&spec.model) {
        return Err(invalid(format!(
            "the start weights are of another shape than the spec's model: {:?} against {:?}",
            checkpoint.model(),
            spec.model
        )));
    }
    let template = checkpoint.chat_template();
    template.map_err(|error| invalid(chain(&error)))?;
    let found = hex::encode(&checkpoint.weights_hash().map_err(failed)?);
    let expected = spec.start.as_ref().map(|s| s.weights.clone());
    if expected.as_ref() != Some(&found) {
        return Err(invalid(format!(
            "the start weights have the hash {found}, but the spec names {}",
            expected.unwrap_or_else(|| "none".into())
        )));
    }
    Ok(())
}

/// A validation, as clients see it.
pub fn eval_event(run: &RunName, labels: &[String], row: EvalRow) -> EvalEvent {
    EvalEvent {
        run: run.to_string(),
        step: row.step,
        split: row.split,
        loss: row.loss,
        bits_per_byte: row.bits_per_byte,
        tokens: row.weight as u64,
        classes: Classes::of(labels, &row.confusion),
    }
}

/// A checkpoint, as clients see it.
pub fn checkpoint_info(row: CheckpointRow) -> CheckpointInfo {
    CheckpointInfo {
        step: row.step,
        path: row.path,
        bytes: row.bytes,
        val_loss: row.val_loss,
        state_hash: hex::encode(&row.state_hash),
    }
}
