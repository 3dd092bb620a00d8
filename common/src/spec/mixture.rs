//! Several corpora in one run: what a spec says of them, and what a run is told.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::bounds::{real, within};
use super::error::SpecError;
use super::file::{MixedTable, MixtureTable};
use crate::corpus::name_of;

/// Corpora besides a run's own, at most.
const MAX_CORPORA: usize = 64;

/// Changes of the weights, at most.
const MAX_PHASES: usize = 1024;

/// What shares are expressed in where they are no whole numbers.
const PARTS: u32 = 1_000_000;

/// Names that validations have otherwise.
const TAKEN: [&str; 2] = ["base", "train"];

/// Characters of a name.
const MAX_NAME: usize = 40;

/// A corpus besides a run's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MixedOptions {
    /// What its validations are called.
    pub name: String,
    /// Files, directories and globs.
    pub paths: Vec<String>,
}

/// How much of each corpus is taken, the run's own first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MixtureWeights {
    /// In these proportions, from these steps on.
    Given(Vec<(u64, Vec<f64>)>),
    /// In proportion to tokens^(1 / temperature): 1 takes each as often as any other, more favours small ones.
    Temperature(f64),
}

/// The corpora of a run besides its own, as meant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MixtureOptions {
    /// The others.
    pub corpora: Vec<MixedOptions>,
    /// How much of each.
    pub weights: MixtureWeights,
}

/// A corpus that a run trains on besides its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixedCorpus {
    /// What its validations are called.
    pub name: String,
    /// Its fingerprint.
    pub corpus: String,
}

/// Weights from a step on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixturePhase {
    /// Steps before it.
    pub from: u64,
    /// Parts of each corpus, the run's own first.
    pub parts: Vec<u32>,
}

/// The corpora of a run besides its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MixtureConfig {
    /// The others.
    pub corpora: Vec<MixedCorpus>,
    /// In order; the first begins with step 0.
    pub phases: Vec<MixturePhase>,
}

impl MixtureConfig {
    /// How the validations of one of its corpora are called.
    pub fn label(name: &str) -> String {
        format!("{name}_validation")
    }
}

impl std::fmt::Display for MixtureConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, phase) in self.phases.iter().enumerate() {
            let sum: u32 = phase.parts.iter().sum();
            let percent = |parts: u32| f64::from(parts) / f64::from(sum) * 100.0;
            match (number, phase.from) {
                (0, _) => {}
                (_, from) => write!(f, "; from step {from} on ")?,
            }
            write!(f, "{:.1} % own", percent(phase.parts[0]))?;
            for (corpus, parts) in self.corpora.iter().zip(&phase.parts[1..]) {
                write!(f, ", {:.1} % {}", percent(*parts), corpus.name)?;
            }
        }
        Ok(())
    }
}

impl MixtureOptions {
    /// What a run will be told, before any corpus is known: they count as equal in size.
    pub fn assumed(&self) -> MixtureConfig {
        let unknown = vec![String::new(); self.corpora.len()];
        self.resolve(unknown, &vec![1; self.corpora.len() + 1])
    }

    /// What a run is told, once the corpora are prepared: their fingerprints, and the training tokens of each, the run's
    /// own first.
    pub fn resolve(&self, fingerprints: Vec<String>, tokens: &[u64]) -> MixtureConfig {
        let corpora = self.corpora.iter().zip(fingerprints);
        let corpora = corpora.map(|(options, corpus)| MixedCorpus {
            name: options.name.clone(),
            corpus,
        });
        let phases = match &self.weights {
            MixtureWeights::Given(phases) => {
                let phase = |(from, weights): &(u64, Vec<f64>)| MixturePhase {
                    from: *from,
                    parts: parts_of(weights),
                };
                phases.iter().map(phase).collect()
            }
            MixtureWeights::Temperature(temperature) => {
                let weight = |tokens: &u64| libm::pow(*tokens as f64, 1.0 / temperature);
                let weights: Vec<f64> = tokens.iter().map(weight).collect();
                vec![MixturePhase {
                    from: 0,
                    parts: parts_of(&weights),
                }]
            }
        };
        MixtureConfig {
            corpora: corpora.collect(),
            phases,
        }
    }
}

/// Whole parts in these proportions, exactly where the weights are whole; a weight above 0 has at least one.
fn parts_of(weights: &[f64]) -> Vec<u32> {
    let sum: f64 = weights.iter().sum();
    if weights.iter().all(|weight| weight.fract() == 0.0) && sum <= f64::from(u32::MAX) {
        let parts = weights.iter().map(|weight| *weight as u32);
        let common = parts.clone().fold(0, greatest_common_divisor);
        return parts.map(|parts| parts / common).collect();
    }
    let part = |weight: &f64| match (weight / sum * f64::from(PARTS)).round() as u32 {
        0 if *weight > 0.0 => 1,
        parts => parts,
    };
    weights.iter().map(part).collect()
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    match b {
        0 => a,
        _ => greatest_common_divisor(b, a % b),
    }
}

/// What a spec means by its table `[mixture]`.
pub(super) fn mixture_of(table: &MixtureTable) -> Result<Option<MixtureOptions>, SpecError> {
    let given = table.corpora.as_deref().unwrap_or_default();
    if given.is_empty() {
        return match *table == MixtureTable::default() {
            true => Ok(None),
            false => Err(SpecError::Missing {
                key: "mixture.corpora".into(),
                why: "there is nothing to mix with the run's own corpus".into(),
                next: "add `[[mixture.corpora]]` with `paths`, or pass `--mix PATH=WEIGHT`".into(),
            }),
        };
    }
    let next = "put some of them together into one corpus";
    within(
        "mixture.corpora",
        given.len() as u64,
        1..=MAX_CORPORA as u64,
        next,
    )?;
    let corpora = given.iter().map(mixed_of).collect::<Result<Vec<_>, _>>()?;
    let mut names: BTreeSet<&str> = TAKEN.into();
    if let Some(twice) = corpora.iter().find(|corpus| !names.insert(&corpus.name)) {
        return Err(SpecError::impossible(
            "mixture.corpora.name",
            format!("\"{}\"", twice.name),
            "its validations could not be told from others",
            "give each corpus another `name`",
        ));
    }
    let weights = weights_of(table, given)?;
    Ok(Some(MixtureOptions { corpora, weights }))
}

fn mixed_of(table: &MixedTable) -> Result<MixedOptions, SpecError> {
    let paths = table.paths.clone().unwrap_or_default();
    let Some(first) = paths.first() else {
        return Err(SpecError::Missing {
            key: "mixture.corpora.paths".into(),
            why: "one of the corpora has no text".into(),
            next: "give each `[[mixture.corpora]]` its `paths`".into(),
        });
    };
    let name = table.name.clone().unwrap_or_else(|| {
        let mut name = name_of(first);
        name.truncate(MAX_NAME);
        name.trim_end_matches('-').to_owned()
    });
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
        return Err(SpecError::impossible(
            "mixture.corpora.name",
            format!("\"{name}\""),
            "a name has 1 to 40 letters, digits and `-`",
            "give the corpus a `name`",
        ));
    }
    Ok(MixedOptions { name, paths })
}

fn weights_of(table: &MixtureTable, given: &[MixedTable]) -> Result<MixtureWeights, SpecError> {
    let any_weight = table
        .weight
        .or(given.iter().find_map(|corpus| corpus.weight));
    if let Some(temperature) = table.temperature {
        let holds = (1.0..=100.0).contains(&temperature);
        let bound = "it must be from 1 to 100";
        real(
            "mixture.temperature",
            temperature,
            holds,
            bound,
            "2 is usual",
        )?;
        if any_weight.is_some() || table.schedule.is_some() {
            return Err(SpecError::impossible(
                "mixture.temperature",
                temperature,
                "there are weights, too",
                "remove either",
            ));
        }
        return Ok(MixtureWeights::Temperature(temperature));
    }
    let own = table.weight.unwrap_or(1.0);
    let others = given.iter().map(|corpus| corpus.weight.unwrap_or(1.0));
    let first: Vec<f64> = std::iter::once(own).chain(others).collect();
    check_weights("mixture.weight", &first)?;
    let mut phases = vec![(0, first)];
    let schedule = table.schedule.as_deref().unwrap_or_default();
    within(
        "mixture.schedule",
        schedule.len() as u64,
        0..=MAX_PHASES as u64,
        "leave some out",
    )?;
    for phase in schedule {
        let (Some(step), Some(weights)) = (phase.step, &phase.weights) else {
            return Err(SpecError::Missing {
                key: "mixture.schedule.weights".into(),
                why: "a change of the weights needs the step and the weights".into(),
                next: "give each `[[mixture.schedule]]` its `step` and `weights`".into(),
            });
        };
        if weights.len() != given.len() + 1 {
            return Err(SpecError::impossible(
                "mixture.schedule.weights",
                format!("{weights:?}"),
                format!("there are {} corpora", given.len() + 1),
                "give one weight for each, that of the run's own corpus first",
            ));
        }
        check_weights("mixture.schedule.weights", weights)?;
        let last = phases.last().map_or(0, |(from, _)| *from);
        if step <= last {
            return Err(SpecError::impossible(
                "mixture.schedule.step",
                step,
                format!("the weights before it hold from step {last} on"),
                "let the steps rise from 1 on",
            ));
        }
        phases.push((step, weights.clone()));
    }
    Ok(MixtureWeights::Given(phases))
}

fn check_weights(key: &str, weights: &[f64]) -> Result<(), SpecError> {
    let bound = "weights must be from 0 to 1,000,000";
    for weight in weights {
        let holds = (0.0..=1e6).contains(weight);
        real(
            key,
            *weight,
            holds,
            bound,
            "give proportions, such as 3 and 1",
        )?;
    }
    if weights.iter().all(|weight| *weight == 0.0) {
        return Err(SpecError::impossible(
            key,
            0,
            "nothing would be trained on",
            "give at least one corpus a weight above 0",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{SpecFile, SpecSource};
    use super::*;

    fn meant(text: &str) -> Result<Option<MixtureOptions>, String> {
        let text = format!("[corpus]\npaths = \"own.txt\"\n{text}");
        let source = SpecSource::parse("spec.toml", &text).map_err(|error| error.to_string())?;
        let file: SpecFile = source.into_file().map_err(|error| error.to_string())?;
        let meant = file.validate().map_err(|error| error.to_string())?;
        Ok(meant.mixture)
    }

    const TWO: &str = "[[mixture.corpora]]\npaths = \"tales/\"\nweight = 2\n[[mixture.corpora]]\n\
                       name = \"b\"\npaths = [\"x.txt\", \"y.txt\"]\n";

    #[test]
    fn weights_become_parts() {
        let options = meant(TWO).unwrap().unwrap();
        assert_eq!(options.corpora[0].name, "tales");
        let config = options.resolve(vec!["t".into(), "b".into()], &[1, 1, 1]);
        assert_eq!(config.phases[0].parts, [1, 2, 1]);
        assert_eq!(config.to_string(), "25.0 % own, 50.0 % tales, 25.0 % b");
    }

    #[test]
    fn a_temperature_favours_what_is_small() {
        let url = "[[mixture.corpora]]\npaths = \"https://host/tales-of-old.txt?key=secret\"\n";
        let options = meant(url).expect("valid").expect("a mixture");
        assert_eq!(options.corpora[0].name, "tales-of-old");
        let text = "[mixture]\ntemperature = 2\n[[mixture.corpora]]\npaths = \"tales/\"\n";
        let options = meant(text).unwrap().unwrap();
        let config = options.resolve(vec!["t".into()], &[9_000, 1_000]);
        assert_eq!(config.phases[0].parts, [750_000, 250_000]);
    }

    #[test]
    fn the_weights_may_change() {
        let text = format!("{TWO}[[mixture.schedule]]\nstep = 7\nweights = [1, 0, 3]\n");
        let options = meant(&text).unwrap().unwrap();
        let config = options.resolve(vec!["t".into(), "b".into()], &[1, 1, 1]);
        assert_eq!(config.phases[1].from, 7);
        assert_eq!(config.phases[1].parts, [1, 0, 3]);
        assert_eq!(
            config.to_string(),
            "25.0 % own, 50.0 % tales, 25.0 % b; from step 7 on 25.0 % own, 0.0 % tales, 75.0 % b"
        );
    }

    #[test]
    fn what_cannot_be_mixed_is_said() {
        let fails = |text: &str| meant(text).unwrap_err();
        insta::assert_snapshot!(
            [
                fails("[mixture]\nweight = 2\n"),
                fails("[[mixture.corpora]]\nweight = 2\n"),
                fails("[[mixture.corpora]]\npaths = \"a/x.txt\"\n[[mixture.corpora]]\npaths = \"b/x.txt\"\n"),
                fails("[[mixture.corpora]]\npaths = \"x\"\nname = \"a b\"\n"),
                fails("[mixture]\nweight = 0\n[[mixture.corpora]]\npaths = \"x\"\nweight = 0\n"),
                fails("[[mixture.corpora]]\npaths = \"x\"\nweight = -1\n"),
                fails("[mixture]\ntemperature = 2\n[[mixture.corpora]]\npaths = \"x\"\nweight = 2\n"),
                fails(&format!("{TWO}[[mixture.schedule]]\nstep = 7\nweights = [1]\n")),
                fails(&format!("{TWO}[[mixture.schedule]]\nstep = 0\nweights = [1, 1, 1]\n")),
            ]
            .join("\n"),
            @r#"
            `mixture.corpora` is missing: there is nothing to mix with the run's own corpus; add `[[mixture.corpora]]` with `paths`, or pass `--mix PATH=WEIGHT`
            `mixture.corpora.paths` is missing: one of the corpora has no text; give each `[[mixture.corpora]]` its `paths`
            `mixture.corpora.name` is "x", but its validations could not be told from others; give each corpus another `name`
            `mixture.corpora.name` is "a b", but a name has 1 to 40 letters, digits and `-`; give the corpus a `name`
            `mixture.weight` is 0, but nothing would be trained on; give at least one corpus a weight above 0
            `mixture.weight` is -1, but weights must be from 0 to 1,000,000; give proportions, such as 3 and 1
            `mixture.temperature` is 2, but there are weights, too; remove either
            `mixture.schedule.weights` is [1.0], but there are 3 corpora; give one weight for each, that of the run's own corpus first
            `mixture.schedule.step` is 0, but the weights before it hold from step 0 on; let the steps rise from 1 on
            "#
        );
    }
}
