//! Keys that matter to finetuning above all, each with its bounds: which layers learn, which samples are used, when a run
//! ends early, how the lines of a supervised corpus become samples, and which documents of a corpus stay. Like `validate.rs`, from typed to meant.

use super::bounds::{MAX_STEPS, real, shown, small, within};
use super::error::SpecError;
use super::file::{CorpusTable, ObjectiveKind, SplitKind};
use super::validate::SupervisedOptions;
use crate::corpus::{MAX_LABELS, Objective, Selection};

pub(super) fn freeze_layers(given: Option<u64>) -> Result<Option<u32>, SpecError> {
    if let Some(layers) = given {
        let next = "leave it out to train all layers";
        within("train.freeze_layers", layers, 0..=1024, next)?;
    }
    Ok(given.map(|layers| layers as u32))
}

pub(super) fn layer_decay(given: Option<f64>) -> Result<Option<f64>, SpecError> {
    let decay = given.unwrap_or(1.0);
    let holds = decay > 0.0 && decay <= 1.0;
    let next = "0.8 is usual";
    real(
        "train.layer_decay",
        decay,
        holds,
        "it must be above 0, and at most 1",
        next,
    )?;
    Ok(given)
}

pub(super) fn unfreeze_every(given: Option<u64>) -> Result<Option<u64>, SpecError> {
    if let Some(steps) = given {
        let next = "leave it out to train all layers from the first step";
        within("train.unfreeze_every", steps, 1..=MAX_STEPS, next)?;
    }
    Ok(given)
}

pub(super) fn data_share(given: Option<f64>) -> Result<Option<f64>, SpecError> {
    let share = given.unwrap_or(1.0);
    let holds = share > 0.0 && share <= 1.0;
    let next = "leave it out to use all";
    real(
        "train.data_share",
        share,
        holds,
        "it must be above 0, and at most 1",
        next,
    )?;
    Ok(given.filter(|share| *share < 1.0))
}

pub(super) fn replay(given: Option<f64>) -> Result<Option<f64>, SpecError> {
    let share = given.unwrap_or(0.5);
    let holds = share > 0.0 && share <= 0.95;
    let next = "0.05 keeps most of what was learned";
    real(
        "train.replay",
        share,
        holds,
        "it must be above 0, and at most 0.95",
        next,
    )?;
    Ok(given)
}

pub(super) fn patience(given: Option<u64>) -> Result<Option<u32>, SpecError> {
    let Some(patience) = given else {
        return Ok(None);
    };
    small("train.early_stopping_patience", Some(patience), 3).map(Some)
}

pub(super) fn forgetting(given: Option<f64>) -> Result<Option<f64>, SpecError> {
    let most = given.unwrap_or(0.0);
    let holds = (0.0..=100.0).contains(&most);
    real(
        "train.max_forgetting",
        most,
        holds,
        "it must be from 0 to 100 nats",
        "0.1 is little",
    )?;
    Ok(given)
}

pub(super) fn max_length(given: Option<u64>) -> Result<Option<usize>, SpecError> {
    let Some(length) = given else {
        return Ok(None);
    };
    within(
        "train.max_length",
        length,
        2..=1 << 20,
        "leave it out for the model's context",
    )?;
    Ok(Some(length as usize))
}

pub(super) fn selection_of(table: &CorpusTable) -> Result<Selection, SpecError> {
    let selection = Selection {
        min_chars: table.min_chars,
        max_chars: table.max_chars,
        languages: table.languages.clone().unwrap_or_default(),
        language_confidence: table.language_confidence,
        max_repeated_lines: table.max_repeated_lines,
        max_symbols: table.max_symbols,
        word_length: table.word_length,
        min_alphabetic: table.min_alphabetic,
        dedup: table.dedup,
        dedup_threshold: table.dedup_threshold,
    };
    let checked = selection.check();
    checked.map_err(|bad| {
        let key = format!("corpus.{}", bad.key);
        SpecError::impossible(&key, bad.value, bad.bound, bad.next)
    })?;
    Ok(selection)
}

pub(super) fn supervised_of(table: &CorpusTable) -> Result<Option<SupervisedOptions>, SpecError> {
    let objective = match table.objective.unwrap_or_default() {
        ObjectiveKind::Text => None,
        ObjectiveKind::Sft => Some(Objective::Sft),
        ObjectiveKind::Classify => Some(Objective::Classify),
    };
    let only = |given: bool, key: &str, of: &str| match given {
        true => Err(SpecError::impossible(
            key,
            "given",
            format!("it says something of {of} only"),
            "remove it, or set `corpus.objective`",
        )),
        false => Ok(()),
    };
    let supervised = "the objectives \"sft\" and \"classify\"";
    only(
        objective.is_none() && table.too_long.is_some(),
        "corpus.too_long",
        supervised,
    )?;
    only(
        objective.is_none() && table.packing.is_some(),
        "corpus.packing",
        supervised,
    )?;
    let (labels, other) = (
        "the objective \"classify\"",
        objective != Some(Objective::Classify),
    );
    only(other && table.labels.is_some(), "corpus.labels", labels)?;
    only(
        other && table.label_field.is_some(),
        "corpus.label_field",
        labels,
    )?;
    let Some(objective) = objective else {
        return Ok(None);
    };
    if table.split.is_some_and(|split| split == SplitKind::Tail) {
        return Err(SpecError::impossible(
            "corpus.split",
            "tail",
            "samples go to one side of the split whole",
            "remove it",
        ));
    }
    let labels = table.labels.clone().unwrap_or_default();
    let mut distinct = labels.clone();
    distinct.sort_unstable();
    distinct.dedup();
    if table.labels.is_some()
        && (distinct.len() != labels.len() || !(2..=MAX_LABELS).contains(&labels.len()))
    {
        return Err(SpecError::impossible(
            "corpus.labels",
            shown(&labels),
            format!("it must name 2 to {MAX_LABELS} labels, and none twice"),
            "leave it out for the labels that occur",
        ));
    }
    Ok(Some(SupervisedOptions {
        objective,
        too_long: table.too_long.unwrap_or_default(),
        packing: table.packing.unwrap_or(true),
        labels,
        text_field: table.text_field.clone(),
        label_field: table.label_field.clone(),
    }))
}
