//! Corpora and runs in words and tables.

use cohort_common::api::{Classes, CorpusInfo, EvalEvent, RunInfo};
use cohort_common::corpus::{Baselines, Objective, SelectionSummary, Supervised};
use cohort_common::spec::{RunKind, human_bytes, human_count};

use crate::output::{ago, one_line, or_nothing, table};

/// Characters of a fingerprint that tell it apart for people.
const SHORT: usize = 12;
/// Skipped inputs that are listed.
pub const SKIPPED_SHOWN: usize = 5;
/// Labels that a confusion table shows.
const LABELS_SHOWN: usize = 12;
/// Faults that are listed.
const FAULTS_SHOWN: usize = 8;

/// Columns of what a state has written, at most.
const SAMPLE_COLUMNS: usize = 400;

/// A corpus in a few lines.
pub fn corpus(corpus: &CorpusInfo) -> String {
    let origin = match corpus.reused {
        true => "prepared before from the same text, used again",
        false => "prepared",
    };
    let mut lines = vec![
        format!(
            "corpus      {} ({}), {origin}",
            corpus.name,
            short(&corpus.fingerprint)
        ),
        format!("  training    {}", split(&corpus.train)),
        format!("  validation  {}", split(&corpus.validation)),
        format!("  tokenizer   {} tokens", corpus.vocab_size),
    ];
    if let Some(supervised) = &corpus.supervised {
        lines.extend(samples(supervised));
    }
    if let Some(baselines) = &corpus.baselines {
        lines.push(format!("  baselines   {}", losses(baselines)));
    }
    if let Some(summary) = &corpus.selection {
        lines.push(format!("  left out    {}", left_out(summary)));
    }
    if !corpus.skipped.is_empty() {
        lines.push(format!("  skipped     {} inputs:", corpus.skipped.len()));
        let shown = corpus.skipped.iter().take(SKIPPED_SHOWN);
        lines.extend(shown.map(|bad| format!("    {bad}")));
        if corpus.skipped.len() > SKIPPED_SHOWN {
            lines.push("    ...".into());
        }
    }
    lines.join("\n")
}

/// What a selection has left out, and why.
pub fn left_out(summary: &SelectionSummary) -> String {
    let bytes = summary.dropped.iter().map(|dropped| dropped.bytes).sum();
    let mut text = format!(
        "{} of {} documents, {} of {}",
        summary.dropped_documents(),
        summary.documents,
        human_bytes(bytes),
        human_bytes(summary.bytes)
    );
    for (number, dropped) in summary.dropped.iter().enumerate() {
        text += if number == 0 { ": " } else { ", " };
        text += &format!("{} ({})", dropped.reason, dropped.documents);
    }
    text
}

/// The samples of a supervised corpus, in a few lines.
pub fn samples(supervised: &Supervised) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, counts) in [
        ("training", &supervised.train),
        ("validation", &supervised.validation),
    ] {
        let mut line = format!(
            "  {name:<11} {} samples, {} tokens in rows of {}",
            counts.samples,
            human_count(counts.tokens),
            supervised.row,
        );
        if supervised.objective == Objective::Sft {
            line += &format!(", of which {} are learned", human_count(counts.trained));
        }
        for (count, what) in [(counts.truncated, "cut"), (counts.dropped, "dropped")] {
            if count > 0 {
                line += &format!("; {count} {what}, since they are longer");
            }
        }
        lines.push(line);
    }
    if !supervised.labels.is_empty() {
        lines.push(format!("  labels      {}", supervised.labels.join(", ")));
    }
    lines
}

/// What a loss is to be compared with.
pub fn losses(baselines: &Baselines) -> String {
    let mut text = format!("uniform {:.4}", baselines.uniform);
    if let Some(unigram) = baselines.unigram {
        text += &format!(", unigram {unigram:.4}");
    }
    if let Some(ngram) = &baselines.ngram {
        // With an order of 1 it is the unigram.
        if ngram.order > 1 {
            text += &format!(", {}-gram {:.4}", ngram.order, ngram.loss);
        }
        if let Some(bits) = ngram.bits_per_byte {
            text += &format!(" ({bits:.4} bits per byte)");
        }
        if ngram.counted < ngram.of {
            let (counted, of) = (human_count(ngram.counted), human_count(ngram.of));
            text += &format!(", counted on {counted} of {of} tokens");
        }
    }
    text
}

/// All that is known of a corpus.
pub fn whole_corpus(corpus: &CorpusInfo) -> String {
    let mut lines = vec![
        format!("name         {}", corpus.name),
        format!("fingerprint  {}", corpus.fingerprint),
        format!(
            "tokenizer    {} tokens, {}",
            corpus.vocab_size, corpus.tokenizer
        ),
        format!("training     {}", split(&corpus.train)),
        format!("validation   {}", split(&corpus.validation)),
        format!("on disk      {}", human_bytes(corpus.bytes_on_disk)),
    ];
    if let Some(baselines) = &corpus.baselines {
        lines.push(format!("baselines    {}", losses(baselines)));
    }
    if let Some(summary) = &corpus.selection {
        lines.push(format!("left out     {}", left_out(summary)));
    }
    for bad in &corpus.skipped {
        lines.push(format!("skipped      {bad}"));
    }
    if let Some(sample) = &corpus.sample {
        lines.push(format!("sample\n{sample}"));
    }
    lines.join("\n")
}

/// Corpora, one a line.
pub fn corpora(corpora: &[CorpusInfo]) -> String {
    let mut rows = vec![words(&[
        "name",
        "fingerprint",
        "documents",
        "tokens",
        "vocabulary",
        "on disk",
    ])];
    for corpus in corpora {
        rows.push(vec![
            corpus.name.clone(),
            short(&corpus.fingerprint).into(),
            (corpus.train.documents + corpus.validation.documents).to_string(),
            human_count(corpus.train.tokens + corpus.validation.tokens),
            corpus.vocab_size.to_string(),
            human_bytes(corpus.bytes_on_disk),
        ]);
    }
    table(&rows)
}

/// Runs, one a line.
pub fn runs(runs: &[RunInfo]) -> String {
    let mut rows = vec![words(&[
        "run",
        "kind",
        "status",
        "step",
        "loss",
        "validation",
        "parameters",
        "submitted",
    ])];
    for run in runs {
        rows.push(vec![
            run.name.clone(),
            kind(run.spec.kind).into(),
            status(run),
            format!("{}/{}", run.step, run.spec.train.steps),
            loss(run.last_step.as_ref().map(|step| step.loss)),
            loss(
                run.evals
                    .iter()
                    .rev()
                    .find(|e| e.split == "validation")
                    .map(|e| e.loss),
            ),
            human_count(run.spec.parameters()),
            ago(run.created_ms),
        ]);
    }
    table(&rows)
}

/// All that is known of a run.
pub fn run(run: &RunInfo) -> String {
    let mut text = format!(
        "{}: {} at step {} of {}, submitted {}\n",
        run.name,
        status(run),
        run.step,
        run.spec.train.steps,
        ago(run.created_ms)
    );
    if let Some(error) = &run.error {
        text += &format!("error: {error}\n");
    }
    text += &run.spec.describe();
    if let Some(step) = &run.last_step {
        text += &format!(
            "last step     loss {:.4}, gradient norm {:.3}, {} tokens, {} tokens/s, epoch {:.2}\n",
            step.loss,
            step.grad_norm,
            human_count(step.tokens),
            human_count(step.tokens_per_second as u64),
            step.epoch
        );
    }
    text += &faults(run);
    text += &evals(run);
    text += &written(run);
    text += &checkpoints(run);
    text
}

/// What the newest state with samples wrote.
fn written(run: &RunInfo) -> String {
    let Some(step) = run.samples.first().map(|sample| sample.step) else {
        return String::new();
    };
    let mut text = format!("\nwritten at step {step}\n");
    for sample in &run.samples {
        let line = |text: &str| one_line(or_nothing(text), SAMPLE_COLUMNS);
        let (prompt, written) = (line(&sample.prompt), line(&sample.text));
        text += &format!("  after {prompt}\n    {written}\n");
    }
    text
}

fn evals(run: &RunInfo) -> String {
    if run.evals.is_empty() {
        return String::new();
    }
    let classifies = run.evals.iter().any(|eval| eval.classes.is_some());
    let mut head = vec!["step", "split", "loss", "bits per byte"];
    if classifies {
        head.truncate(3);
        head.extend(["accuracy", "macro-F1"]);
    }
    let mut rows = vec![words(&head)];
    for eval in &run.evals {
        if let Some(classes) = &eval.classes {
            rows.push(vec![
                eval.step.to_string(),
                eval.split.clone(),
                format!("{:.4}", eval.loss),
                format!("{:.2} %", 100.0 * classes.accuracy),
                format!("{:.4}", classes.macro_f1),
            ]);
            continue;
        }
        rows.push(vec![
            eval.step.to_string(),
            eval.split.clone(),
            format!("{:.4}", eval.loss),
            loss(eval.bits_per_byte),
        ]);
    }
    let last = run
        .evals
        .iter()
        .rev()
        .find_map(|eval| eval.classes.as_ref());
    let confusion = last.map_or(String::new(), |classes| {
        format!("\n{}\n", confusion(classes))
    });
    format!("\n{}\n{confusion}", table(&rows))
}

/// What happened to the run's workers, the newest last.
fn faults(run: &RunInfo) -> String {
    if run.faults.is_empty() {
        return String::new();
    }
    let mut rows = vec![words(&["when", "what happened to workers"])];
    let first = run.faults.len().saturating_sub(FAULTS_SHOWN);
    for fault in &run.faults[first..] {
        rows.push(vec![ago(fault.time_ms), fault.text.clone()]);
    }
    format!("\n{}\n", table(&rows))
}

fn checkpoints(run: &RunInfo) -> String {
    if run.checkpoints.is_empty() {
        return String::new();
    }
    let mut rows = vec![words(&[
        "checkpoint",
        "validation",
        "size",
        "state",
        "path",
    ])];
    for checkpoint in &run.checkpoints {
        rows.push(vec![
            format!("{}@{}", run.name, checkpoint.step),
            loss(checkpoint.val_loss),
            human_bytes(checkpoint.bytes),
            short(&checkpoint.state_hash).into(),
            checkpoint.path.clone(),
        ]);
    }
    format!("\n{}\n{}", table(&rows), stored(run))
}

/// What of a run is in the coordinator's object store.
fn stored(run: &RunInfo) -> String {
    let Some(stored) = &run.stored else {
        return String::new();
    };
    let steps: Vec<String> = stored.steps.iter().map(u64::to_string).collect();
    let mut text = match steps.is_empty() {
        true => "in the store    nothing yet".to_owned(),
        false => format!("in the store    steps {}", steps.join(", ")),
    };
    if stored.waiting > 0 {
        text += &format!("; {} still to be copied", stored.waiting);
    }
    if let Some(problem) = &stored.problem {
        text += &format!("; {problem}");
    }
    text + "\n"
}

/// What finetuning has changed: the loss on the new and on the old validation text, before and after; of a classifier,
/// how well it tells its labels apart.
pub fn gained_and_lost(run: &RunInfo) -> String {
    if let (Some(before), Some(after)) = first_and_last(run, "validation")
        && let (Some(old), Some(new)) = (&before.classes, &after.classes)
    {
        return told_apart((before.loss, old), (after.loss, new));
    }
    let heading = [
        "validation text",
        "loss before",
        "after",
        "bits per byte before",
        "after",
    ];
    let mut rows = vec![words(&heading)];
    for (name, split) in [("new", "validation"), ("old", "base_validation")] {
        let (before, after) = first_and_last(run, split);
        if let (Some(before), Some(after)) = (before, after) {
            rows.push(vec![
                name.into(),
                format!("{:.4}", before.loss),
                format!("{:.4}", after.loss),
                loss(before.bits_per_byte),
                loss(after.bits_per_byte),
            ]);
        }
    }
    table(&rows)
}

/// A classifier before and after, and what it took its samples for in the end.
fn told_apart(before: (f64, &Classes), after: (f64, &Classes)) -> String {
    let mut rows = vec![words(&["validation", "loss", "accuracy", "macro-F1"])];
    for (name, (loss, classes)) in [("before", before), ("after", after)] {
        rows.push(vec![
            name.into(),
            format!("{loss:.4}"),
            format!("{:.2} %", 100.0 * classes.accuracy),
            format!("{:.4}", classes.macro_f1),
        ]);
    }
    format!("{}\n\n{}", table(&rows), confusion(after.1))
}

/// For each label, what its samples were taken for.
pub fn confusion(classes: &Classes) -> String {
    let shown = classes.labels.len().min(LABELS_SHOWN);
    let mut head = vec!["label".to_owned()];
    head.extend(
        classes.labels[..shown]
            .iter()
            .map(|label| format!("as {label}")),
    );
    let mut rows = vec![head];
    for (label, counts) in classes.labels.iter().zip(&classes.confusion).take(shown) {
        let mut row = vec![label.clone()];
        row.extend(counts[..shown].iter().map(u64::to_string));
        rows.push(row);
    }
    let mut text = table(&rows);
    if shown < classes.labels.len() {
        text += &format!("\n({} labels in all)", classes.labels.len());
    }
    text
}

/// The first and the last validation of a split; none if there is only one.
pub fn first_and_last<'a>(
    run: &'a RunInfo,
    split: &str,
) -> (Option<&'a EvalEvent>, Option<&'a EvalEvent>) {
    let mut evals = run.evals.iter().filter(|eval| eval.split == split);
    (evals.next(), evals.next_back())
}

/// What a kind of run is called.
pub fn kind(kind: RunKind) -> &'static str {
    match kind {
        RunKind::Pretrain => "pretrain",
        RunKind::Finetune => "finetune",
        RunKind::Eval => "eval",
    }
}

fn status(run: &RunInfo) -> String {
    match run.queue_place {
        Some(place) => format!("{} ({place})", run.status),
        None => run.status.clone(),
    }
}

fn split(split: &cohort_common::api::SplitInfo) -> String {
    format!(
        "{} documents, {}, {} tokens in {} shards",
        split.documents,
        human_bytes(split.bytes),
        human_count(split.tokens),
        split.shards
    )
}

fn loss(loss: Option<f64>) -> String {
    loss.map_or("-".into(), |loss| format!("{loss:.4}"))
}

/// The beginning of a fingerprint.
pub fn short(fingerprint: &str) -> &str {
    fingerprint.get(..SHORT).unwrap_or(fingerprint)
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
