//! From a run that may train to what the machine carries out: its plan, what it validates, what the store knows of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use cohort_common::api::{CheckpointInfo, EvalEvent, RunFacts};
use cohort_common::checkpoint::Checkpoint;
use cohort_common::cluster::{
    BASE_SPLIT, EvalSplit, EvalWork, Losses, OWN_SPLIT, RunPlan, StateSource,
};
use cohort_common::corpus::{Corpus, CorpusError, Split, baselines, share_of};
use cohort_common::hf::SpecialTokens;
use cohort_common::home::{Home, RunName};
use cohort_common::ids::RunId;
use cohort_common::layout::chunk_count;
use cohort_common::ledger::{Chain, Entry, genesis};
use cohort_common::order::Shares;
use cohort_common::spec::{MixtureConfig, RunKind, RunSpec};
use tonic::Status;

use crate::data::{blocking, open_corpus, start_directory};
use crate::driver::{Cluster, Command, now_ms};
use crate::record::{RunRecord, SplitFacts};
use crate::runs::{checkpoint_info, eval_event, under_way};
use crate::samples::Prompts;
use crate::status::{chain, failed, invalid};
use crate::store::{EvalRow, RunStatus, Store};

/// Entries at the ledger's end that can prove what a worker brings back.
const PROOFS: u64 = 8;

/// Roots that are kept at most: their commits must fit into a worker's outbox.
const MOST_RETAINED: usize = 128;

/// Bytes of roots that are kept for workers that catch up.
const RETAINED: usize = 512 << 20;

/// Hands a run to the driver, unless its status is no longer `was`: then somebody else has taken it up.
pub async fn enqueue(
    cluster: &Cluster,
    name: &RunName,
    was: RunStatus,
    expected: usize,
    spec: RunSpec,
    corpus: Corpus,
    source: StateSource,
) -> Result<(), Status> {
    let history = history(cluster, name, &spec, source).await?;
    let base = spec.base_corpus().filter(|base| *base != spec.corpus);
    let base = base.map(str::to_owned);
    let home = cluster.home().clone();
    let name = name.clone();
    let described = name.clone();
    let kept = cluster.store().call(move |s| s.facts(&described)).await;
    let kept = kept.map_err(failed)?;
    // What of its ledger is in the store already is found out at once.
    let shipped = cluster.leadership().map(|_| 0);
    let record = blocking(move || {
        let tokenizer = corpus.tokenizer_json().map_err(failed)?;
        let chat_template = chat_template(&home, &name, &spec, &corpus)?;
        let prompts = Prompts::of(&spec, &corpus, chat_template.as_deref())?;
        let lora_base = spec.lora.is_some().then(|| start_directory(&home, &name));
        let shares = Shares::of(&spec);
        let gradient_len = spec.gradient_len();
        let root = gradient_len * size_of::<f32>();
        let retain = (RETAINED / root.max(1)).clamp(3, MOST_RETAINED) as u64;
        let base = base.and_then(|fingerprint| open_corpus(&home, &fingerprint).ok());
        let mixed = spec.mixture.iter().flat_map(|mixture| &mixture.corpora);
        let mixed = mixed.map(|mixed| {
            let corpus = open_corpus(&home, &mixed.corpus)?;
            Ok((MixtureConfig::label(&mixed.name), corpus))
        });
        let mixed = mixed.collect::<Result<Vec<_>, Status>>()?;
        let (mut splits, facts) =
            eval_splits(&spec, &corpus, &mixed, base.as_ref()).map_err(invalid)?;
        // Last, so that what is written at the end is written once it is known to be the end.
        splits.extend(prompts.as_ref().map(Prompts::split));
        let epoch_samples = match spec.kind {
            RunKind::Eval => 1,
            _ => {
                let all = corpus
                    .index()
                    .samples(spec.sample_length())
                    .map_err(invalid)?;
                share_of(all, spec.train.data_share)
            }
        };
        let run_facts = kept.unwrap_or_else(|| facts_of(&spec, &corpus, Vec::new()));
        Ok(RunRecord {
            plan: RunPlan {
                run: RunId::new(name.as_str()),
                spec: Arc::new(spec),
                splits: splits.into(),
                source,
                chain: history.chain,
                recent: history.recent,
                expected,
                retain,
                chunks: chunk_count(gradient_len) as u32,
                losses: history.losses,
                history: history.steps,
                shipped,
            },
            name,
            splits: facts,
            prompts,
            epoch_samples,
            shares,
            facts: run_facts,
            tokenizer,
            chat_template,
            base: lora_base,
            tokens: SpecialTokens {
                bos: None,
                eos: vec![corpus.index().tokenizer.eos],
            },
            checkpoints: history.checkpoints,
            written: BTreeMap::new(),
            evals: history.evals,
            started: Instant::now(),
            pending: None,
            pausing: false,
            peak_flops: None,
        })
    })
    .await?;
    // Whoever follows the run from now on must see that it no longer rests.
    let claimed = record.name.clone();
    let claim = move |s: &Store| s.claim(&claimed, was, now_ms());
    if !cluster.store().call(claim).await.map_err(failed)? {
        return Err(under_way(&record.name));
    }
    cluster.command(Command::Submit(Box::new(record))).await;
    Ok(())
}

/// What is known of a run before its first step.
pub fn facts_of(spec: &RunSpec, corpus: &Corpus, notes: Vec<String>) -> RunFacts {
    let index = corpus.index();
    let layout = spec.layout();
    let bytes = index.scored_bytes(Split::Train);
    let scored = index.scored(Split::Train);
    let samples = index.samples(spec.sample_length()).unwrap_or(0);
    let kept = baselines(corpus).unwrap_or_else(|error| {
        tracing::warn!(corpus = index.name, %error, "the baselines of a corpus cannot be read");
        None
    });
    RunFacts {
        notes,
        baselines: kept,
        parameters: spec.parameters(),
        trained: layout.len() as u64,
        flops_per_token: spec.flops_per_token(),
        corpus: index.name.clone(),
        train_tokens: index.split(Split::Train).tokens,
        epoch_samples: share_of(samples, spec.train.data_share),
        bytes_per_token: bytes
            .filter(|_| scored > 0)
            .map(|bytes| bytes as f64 / scored as f64),
    }
}

/// The validations of a run: its own corpus, and, at both ends, that of the run it started from.
fn eval_splits(
    spec: &RunSpec,
    corpus: &Corpus,
    mixed: &[(String, Corpus)],
    base: Option<&Corpus>,
) -> Result<(Vec<EvalSplit>, Vec<SplitFacts>), CorpusError> {
    let mut parts = vec![(corpus, Split::Validation, OWN_SPLIT)];
    if spec.kind == RunKind::Eval {
        parts.insert(0, (corpus, Split::Train, "train"));
    }
    let mixed = mixed.iter();
    parts.extend(mixed.map(|(label, corpus)| (corpus, Split::Validation, label.as_str())));
    // A classifier has no loss on text, and rows of another length cannot be scored.
    let comparable = |base: &&Corpus| {
        let index = base.index();
        let windows = index.windows(Split::Validation, spec.sample_length());
        windows.is_ok() && !spec.model.classifies()
    };
    if let Some(base) = base.filter(comparable) {
        parts.push((base, Split::Validation, BASE_SPLIT));
    }
    parts
        .into_iter()
        .map(|(corpus, split_of, label)| {
            let index = corpus.index();
            let windows = spec.train.micro_batch;
            let all = index.windows(split_of, spec.sample_length())?;
            let bound = match spec.train.eval_samples {
                0 => all,
                bound => all.min(bound),
            };
            let split = EvalSplit {
                label: label.into(),
                units: bound.div_ceil(u64::from(windows)) as u32,
                every: 1,
                work: EvalWork::Score {
                    corpus: index.fingerprint.clone(),
                    split: split_of.name().into(),
                    windows,
                },
            };
            let facts = SplitFacts {
                scored: index.scored(split_of),
                bytes: index.scored_bytes(split_of),
            };
            Ok((split, facts))
        })
        .collect::<Result<Vec<_>, _>>()
        .map(|parts| parts.into_iter().unzip())
}

/// What the store knows of a run that goes on.
struct History {
    chain: Chain,
    recent: Vec<Arc<Entry>>,
    checkpoints: Vec<CheckpointInfo>,
    evals: BTreeMap<String, EvalEvent>,
    losses: Losses,
    steps: cohort_common::cluster::History,
}

/// A run's ledger before its first entry. It begins with the run's identity, but for the horizon, which a resumed run
/// may move.
pub fn first_chain(spec: &RunSpec) -> Chain {
    let mut first = spec.clone();
    first.train.steps = 0;
    Chain::new(1, 0, genesis(first.identity().as_bytes()))
}

async fn history(
    cluster: &Cluster,
    name: &RunName,
    spec: &RunSpec,
    source: StateSource,
) -> Result<History, Status> {
    let step = source.step();
    let name = name.clone();
    let watchdog = spec.watched().cloned();
    let read = move |store: &Store| {
        let entry = store.entry(&name, step)?;
        let last = store.last_entry(&name)?.map_or(0, |e| e.step);
        let from = last.saturating_sub(PROOFS);
        let recent = store.entries(&name, from + 1, PROOFS as u32)?;
        let checkpoints = store.checkpoints(&name)?;
        let evals = store.evals(&name, None)?;
        let steps = match watchdog {
            Some(watchdog) => store.history(&name, &watchdog, [step, from])?,
            None => Default::default(),
        };
        Ok((name, entry, recent, checkpoints, evals, steps))
    };
    let read = cluster.store().call(read).await;
    let (name, entry, recent, checkpoints, evals, steps) = read.map_err(failed)?;
    let chain = match (step, entry) {
        (0, _) => first_chain(spec),
        (_, Some(entry)) => Chain::after(&entry),
        (step, None) => {
            return Err(failed(format!(
                "run `{name}` has a checkpoint of step {step}, but its ledger in the database has no such entry, so it cannot go on from there; its checkpoints can be used: `cohort finetune --from {name}`"
            )));
        }
    };
    let labels = &spec.model.labels;
    let of = |split: &str| {
        let own = evals.iter().filter(|e| e.split == split);
        own.map(|e| (e.step, e.loss)).collect()
    };
    let losses = Losses {
        own: of(OWN_SPLIT),
        base: of(BASE_SPLIT),
    };
    let recorded = |row: EvalRow| (row.split.clone(), eval_event(&name, labels, row));
    Ok(History {
        chain,
        recent: recent.into_iter().map(Arc::new).collect(),
        checkpoints: checkpoints.into_iter().map(checkpoint_info).collect(),
        evals: evals
            .into_iter()
            .filter(|e| e.step <= step)
            .map(recorded)
            .collect(),
        losses,
        steps,
    })
}

/// Checks that a run can write after its prompts. Its start weights lie where they belong, if it has some.
pub async fn check_prompts(
    cluster: &Cluster,
    name: &RunName,
    spec: &RunSpec,
    corpus: &Corpus,
) -> Result<(), Status> {
    if spec.samples.is_none() {
        return Ok(());
    }
    let (home, name) = (cluster.home().clone(), name.clone());
    let (spec, corpus) = (spec.clone(), corpus.clone());
    blocking(move || {
        let template = chat_template(&home, &name, &spec, &corpus)?;
        Prompts::of(&spec, &corpus, template.as_deref()).map(|_| ())
    })
    .await
}

/// The chat template that a run's checkpoints carry: the one that its text was rendered with, else that of its start.
fn chat_template(
    home: &Home,
    name: &RunName,
    spec: &RunSpec,
    corpus: &Corpus,
) -> Result<Option<String>, Status> {
    let supervised = corpus.index().supervised.as_ref();
    match supervised.and_then(|supervised| supervised.template.clone()) {
        Some(template) => Ok(Some(template)),
        None => start_template(home, name, spec),
    }
}

/// The chat template of the checkpoint that a run started from: its own checkpoints carry it on.
fn start_template(home: &Home, name: &RunName, spec: &RunSpec) -> Result<Option<String>, Status> {
    let start = start_directory(home, name);
    match spec.start.is_some() && start.is_dir() {
        true => Checkpoint::open(&start)
            .and_then(|checkpoint| checkpoint.chat_template())
            .map_err(|error| failed(chain(&error))),
        false => Ok(None),
    }
}
