//! What a run writes while it trains, so that a person sees it learn: prompts, and how their continuations are drawn. It
//! changes no weight, so it does not belong to what a run is.

use serde::{Deserialize, Serialize};

use super::bounds::{number, real, shown, within};
use super::error::SpecError;
use super::file::SamplesTable;
use super::validate::CorpusOptions;
use crate::corpus::Objective;

/// Most prompts of a run.
pub const MAX_PROMPTS: usize = 16;

/// Longest prompt, in bytes.
pub const MAX_PROMPT_BYTES: usize = 8192;

/// Most tokens that are written after a prompt.
pub const MAX_SAMPLE_TOKENS: u64 = 1024;

/// Most validations between samples.
const MAX_BETWEEN: u64 = 1_000_000;

/// The prompts of a run, and what is written after them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleConfig {
    /// The prompts; at least one.
    pub prompts: Vec<String>,
    /// Tokens that are written after each, at most.
    pub tokens: u32,
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Draws among this many of the likeliest tokens; absent is among all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// At each so-manieth validation; always at the start and the end.
    pub every: u64,
}

impl SampleConfig {
    /// What a table says about the run that is meant; `None` where there is no prompt.
    pub(super) fn of(
        table: &SamplesTable,
        corpus: &CorpusOptions,
    ) -> Result<Option<Self>, SpecError> {
        let config = Self::changed(None, table)?;
        let objective = corpus.supervised.as_ref().map(|s| s.objective);
        match (config, objective) {
            (Some(config), Some(Objective::Classify)) => Err(config.refused_by_classifier()),
            (config, _) => Ok(config),
        }
    }

    /// What a table makes of the samples of a run that goes on. An empty list of prompts ends them.
    ///
    /// # Errors
    /// A value that no run can have, and a table without prompts for a run that has none.
    pub fn changed(before: Option<&Self>, table: &SamplesTable) -> Result<Option<Self>, SpecError> {
        if *table == SamplesTable::default() {
            return Ok(before.cloned());
        }
        let prompts = match (&table.prompts, before) {
            (Some(prompts), _) => prompts.clone(),
            (None, Some(before)) => before.prompts.clone(),
            (None, None) => {
                return Err(SpecError::Missing {
                    key: "samples.prompts".into(),
                    why: "the spec has a [samples] table".into(),
                    next: "set it, or pass `--sample-prompt TEXT`; or remove the table".into(),
                });
            }
        };
        check_prompts(&prompts)?;
        let given = |given: Option<u64>, before: Option<u64>| given.or(before);
        let tokens = given(table.tokens, before.map(|b| b.tokens.into())).unwrap_or(48);
        within(
            "samples.tokens",
            tokens,
            1..=MAX_SAMPLE_TOKENS,
            "48 is the default",
        )?;
        let temperature = table.temperature.or(before.map(|b| b.temperature));
        let temperature = temperature.unwrap_or(0.8);
        real(
            "samples.temperature",
            temperature,
            (0.0..=100.0).contains(&temperature),
            "it must be from 0 to 100",
            "0.8 is the default, and 0 always takes the likeliest token",
        )?;
        let top_k = given(table.top_k, before.and_then(|b| b.top_k).map(u64::from));
        if let Some(top_k) = top_k {
            let next = "leave it out to draw among all tokens";
            within("samples.top_k", top_k, 1..=u64::from(u32::MAX), next)?;
        }
        let every = given(table.every, before.map(|b| b.every)).unwrap_or(1);
        within(
            "samples.every",
            every,
            1..=MAX_BETWEEN,
            "1 writes at every validation",
        )?;
        Ok((!prompts.is_empty()).then_some(Self {
            prompts,
            tokens: tokens as u32,
            temperature,
            top_k: top_k.map(|k| k as u32),
            every,
        }))
    }

    /// The error of a classifier that is to write.
    pub fn refused_by_classifier(&self) -> SpecError {
        SpecError::impossible(
            "samples.prompts",
            shown(&self.prompts),
            "a classifier has no head for text and writes nothing",
            "remove the [samples] table",
        )
    }
}

impl std::fmt::Display for SampleConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let prompts = match self.prompts.len() {
            1 => "1 prompt".to_owned(),
            n => format!("{n} prompts"),
        };
        let every = match self.every {
            1 => "at every validation".to_owned(),
            n => format!("at the start, the end, and every {n} validations"),
        };
        let drawn = match self.temperature {
            0.0 => "the likeliest".to_owned(),
            temperature => format!("temperature {}", number(temperature)),
        };
        let among = self.top_k.map_or(String::new(), |k| format!(", top {k}"));
        let tokens = self.tokens;
        write!(
            f,
            "{prompts}, up to {tokens} tokens each, {drawn}{among}, {every}"
        )
    }
}

fn check_prompts(prompts: &[String]) -> Result<(), SpecError> {
    let refuse = |value: String, bound: String, next: &str| {
        Err(SpecError::impossible("samples.prompts", value, bound, next))
    };
    if prompts.len() > MAX_PROMPTS {
        return refuse(
            format!("a list of {}", prompts.len()),
            format!("there may be at most {MAX_PROMPTS}"),
            "each is written after at every validation; keep those that tell most",
        );
    }
    if let Some(long) = prompts.iter().find(|p| p.len() > MAX_PROMPT_BYTES) {
        let start: String = long.chars().take(20).collect();
        return refuse(
            format!("{start:?}... of {} bytes", long.len()),
            format!("a prompt has at most {MAX_PROMPT_BYTES}"),
            "take a shorter one",
        );
    }
    Ok(())
}
