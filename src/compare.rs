//! Runs beside each other: what differs in their specs, what came of them, and their losses at marks that all have
//! reached. **Pure:** from what a run's view and history say to a table and to JSON.

use std::collections::{BTreeMap, BTreeSet};

use cohort_common::api::{EvalEvent, RunView};
use cohort_common::cluster::OWN_SPLIT;
use cohort_common::spec::human_count;
use serde::Serialize;
use serde_json::Value;

use crate::curves::Curves;
use crate::facts::short;
use crate::output::{duration, table};

/// Marks at which losses are compared, at most.
const MARKS: u64 = 8;
/// Characters of a value in the table for people.
const WIDTH: usize = 40;

/// Runs beside each other. Lists have an entry for each run, in their order.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// What came of each run.
    pub runs: Vec<Figures>,
    /// The specs' values by dotted key: those that differ, or all.
    pub spec: BTreeMap<String, Vec<Option<Value>>>,
    /// What marks count: `step` or `tokens`.
    pub marks: &'static str,
    /// Training losses at marks.
    pub losses: Vec<MarkLosses>,
}

/// What came of a run. What is absent is not known, or has not happened yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// The run.
    pub run: String,
    /// Where it is in its life.
    pub status: String,
    /// Committed steps.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: Option<u64>,
    /// From the first committed step to the last, pauses included.
    pub seconds: Option<f64>,
    /// Tokens over the time of the steps alone, without what lay between them.
    pub tokens_per_second: Option<f64>,
    /// Model FLOPs utilisation in the same time.
    pub mfu: Option<f64>,
    /// Parameters of the model.
    pub parameters: u64,
    /// Training loss of the last step, in nats.
    pub loss: Option<f64>,
    /// Last validation loss, in nats.
    pub validation_loss: Option<f64>,
    /// The same in bits per byte.
    pub validation_bits_per_byte: Option<f64>,
    /// Lowest validation loss.
    pub best_validation_loss: Option<f64>,
    /// The same in bits per byte.
    pub best_validation_bits_per_byte: Option<f64>,
    /// The step of that.
    pub best_step: Option<u64>,
    /// Workers that were lost.
    pub workers_lost: u64,
    /// Step of the newest checkpoint.
    pub checkpoint_step: Option<u64>,
    /// Hash over parameters and moments in it.
    pub state_hash: Option<String>,
}

/// The training losses of all runs at a mark.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MarkLosses {
    /// Step or tokens.
    pub at: u64,
    /// Mean over the steps since the mark before.
    pub loss: Vec<Option<f64>>,
}

impl Comparison {
    /// Compares runs. `all` also keeps what is the same in all specs.
    pub fn of(runs: &[Curves], all: bool) -> Self {
        let per_step: BTreeSet<u64> = runs
            .iter()
            .map(|run| run.view.info.spec.tokens_per_step())
            .collect();
        let by_tokens = per_step.len() > 1;
        Self {
            runs: runs.iter().map(figures).collect(),
            spec: specs(runs, all),
            marks: if by_tokens { "tokens" } else { "step" },
            losses: losses(runs, by_tokens),
        }
    }

    /// Whether marks are tokens.
    pub fn by_tokens(&self) -> bool {
        self.marks == "tokens"
    }

    /// The comparison for people.
    pub fn text(&self) -> String {
        let heading = |first: &str| {
            let names = self.runs.iter().map(|run| run.run.clone());
            std::iter::once(first.to_owned()).chain(names).collect()
        };
        let mut parts = Vec::new();
        if self.spec.is_empty() {
            parts.push("the specs are the same".to_owned());
        } else {
            let mut rows: Vec<Vec<String>> = vec![heading("spec")];
            for (key, values) in &self.spec {
                let values = values.iter().map(|value| shown(key, value.as_ref()));
                rows.push(std::iter::once(key.clone()).chain(values).collect());
            }
            parts.push(table(&rows));
        }
        let mut rows = vec![heading("result")];
        rows.extend(self.results());
        parts.push(table(&rows));
        if !self.losses.is_empty() {
            let mut rows = vec![heading(match self.by_tokens() {
                true => "loss up to tokens",
                false => "loss up to step",
            })];
            for mark in &self.losses {
                let at = match self.by_tokens() {
                    true => human_count(mark.at),
                    false => mark.at.to_string(),
                };
                let losses = mark.loss.iter().map(|loss| rounded(*loss));
                rows.push(std::iter::once(at).chain(losses).collect());
            }
            parts.push(table(&rows));
        }
        parts.join("\n\n")
    }

    /// A row for each figure that some run has.
    fn results(&self) -> Vec<Vec<String>> {
        let count = |count: Option<u64>| count.map_or("-".into(), human_count);
        let plain = |count: Option<u64>| count.map_or("-".into(), |count| count.to_string());
        type Cell<'a> = &'a dyn Fn(&Figures) -> String;
        let rows: [(&str, Cell<'_>); 16] = [
            ("status", &|f| f.status.clone()),
            ("steps", &|f| f.steps.to_string()),
            ("tokens", &|f| count(f.tokens)),
            ("time", &|f| f.seconds.map_or("-".into(), duration)),
            ("tokens/s", &|f| {
                count(f.tokens_per_second.map(|speed| speed as u64))
            }),
            ("MFU", &|f| {
                f.mfu
                    .map_or("-".into(), |mfu| format!("{:.1} %", 100.0 * mfu))
            }),
            ("parameters", &|f| human_count(f.parameters)),
            ("loss", &|f| rounded(f.loss)),
            ("validation loss", &|f| rounded(f.validation_loss)),
            ("validation bits per byte", &|f| {
                rounded(f.validation_bits_per_byte)
            }),
            ("best validation loss", &|f| rounded(f.best_validation_loss)),
            ("best bits per byte", &|f| {
                rounded(f.best_validation_bits_per_byte)
            }),
            ("best at step", &|f| plain(f.best_step)),
            ("workers lost", &|f| f.workers_lost.to_string()),
            ("checkpoint at step", &|f| plain(f.checkpoint_step)),
            ("state", &|f| {
                f.state_hash.as_deref().map_or("-", short).to_owned()
            }),
        ];
        let known = rows.iter().map(|(name, cell)| {
            let cells = self.runs.iter().map(cell);
            std::iter::once((*name).to_owned()).chain(cells).collect()
        });
        let said = |row: &Vec<String>| row[1..].iter().any(|cell| cell != "-");
        known.filter(said).collect()
    }
}

fn figures(run: &Curves) -> Figures {
    let (info, history) = (&run.view.info, &run.history);
    let own = info.evals.iter().filter(|eval| eval.split == OWN_SPLIT);
    let last = own.clone().next_back();
    let best = own.min_by(|a, b| a.loss.total_cmp(&b.loss));
    let bits = |eval: Option<&EvalEvent>| eval.and_then(|eval| eval.bits_per_byte);
    let checkpoint = info.checkpoints.last();
    let times = history.time_ms.first().zip(history.time_ms.last());
    Figures {
        run: info.name.clone(),
        status: info.status.clone(),
        steps: info.step,
        tokens: history.tokens.last().copied(),
        seconds: times.map(|(first, last)| last.saturating_sub(*first) as f64 / 1000.0),
        tokens_per_second: mean_rate(&history.tokens_per_second.mean),
        mfu: mean_rate(&history.mfu.mean),
        parameters: run.view.facts.parameters,
        loss: info.last_step.as_ref().map(|step| step.loss),
        validation_loss: last.map(|eval| eval.loss),
        validation_bits_per_byte: bits(last),
        best_validation_loss: best.map(|eval| eval.loss),
        best_validation_bits_per_byte: bits(best),
        best_step: best.map(|eval| eval.step),
        workers_lost: count_of(&run.view, "worker_lost"),
        checkpoint_step: checkpoint.map(|checkpoint| checkpoint.step),
        state_hash: checkpoint.map(|checkpoint| checkpoint.state_hash.clone()),
    }
}

fn count_of(view: &RunView, kind: &str) -> u64 {
    let totals = view.fault_totals.iter();
    totals
        .filter(|total| total.kind == kind)
        .map(|total| total.count)
        .sum()
}

fn mean(values: impl Iterator<Item = Option<f32>>) -> Option<f64> {
    let (sum, count) = values
        .flatten()
        .fold((0.0, 0u32), |(sum, n), v| (sum + f64::from(v), n + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// The rate of all steps together: the harmonic mean, as each has the same tokens and its own time.
fn mean_rate(rates: &[Option<f32>]) -> Option<f64> {
    let times = rates.iter().map(|rate| Some(1.0 / (*rate)?));
    mean(times).map(|time| 1.0 / time)
}

/// The specs by dotted key, and what belongs to them outside.
fn specs(runs: &[Curves], all: bool) -> BTreeMap<String, Vec<Option<Value>>> {
    let flat: Vec<BTreeMap<String, Value>> = runs
        .iter()
        .map(|run| {
            let mut values = BTreeMap::new();
            let spec = serde_json::to_value(&run.view.info.spec).unwrap_or_default();
            flatten("", spec, &mut values);
            let names = [
                ("corpus.name", Some(run.view.facts.corpus.clone())),
                ("start.named", run.view.info.parent.clone()),
            ];
            for (key, name) in names {
                if let Some(name) = name.filter(|name| !name.is_empty()) {
                    values.insert(key.into(), name.into());
                }
            }
            values
        })
        .collect();
    let keys: BTreeSet<&String> = flat.iter().flat_map(BTreeMap::keys).collect();
    let row = |key: &String| flat.iter().map(|values| values.get(key).cloned()).collect();
    let rows = keys.into_iter().map(|key| (key.clone(), row(key)));
    let differs = |values: &Vec<Option<Value>>| values.iter().any(|value| *value != values[0]);
    rows.filter(|(_, values)| all || differs(values)).collect()
}

fn flatten(key: &str, value: Value, out: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let dot = if key.is_empty() { "" } else { "." };
                flatten(&format!("{key}{dot}{name}"), value, out);
            }
        }
        // What is not set is not there.
        Value::Null => {}
        value => drop(out.insert(key.to_owned(), value)),
    }
}

/// A value for people.
fn shown(key: &str, value: Option<&Value>) -> String {
    let text = match value {
        None => "-".into(),
        Some(Value::String(text)) if key == "corpus" || key == "start.weights" => {
            short(text).into()
        }
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    };
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Losses at marks up to where the run that is the least far has come.
fn losses(runs: &[Curves], by_tokens: bool) -> Vec<MarkLosses> {
    let places = |run: &Curves| -> Vec<u64> {
        match by_tokens {
            true => run.history.tokens.clone(),
            false => run.history.step.clone(),
        }
    };
    let places: Vec<Vec<u64>> = runs.iter().map(places).collect();
    let ends = places
        .iter()
        .map(|places| places.last().copied().unwrap_or(0));
    let end = ends.min().unwrap_or(0);
    let marks: BTreeSet<u64> = (1..=MARKS).map(|i| end * i / MARKS).collect();
    let mut before = 0;
    let mut rows = Vec::new();
    for at in marks.into_iter().filter(|mark| *mark > 0) {
        let loss = |(run, places): (&Curves, &Vec<u64>)| {
            let range =
                places.partition_point(|p| *p <= before)..places.partition_point(|p| *p <= at);
            mean(run.history.loss.mean[range].iter().copied())
        };
        rows.push(MarkLosses {
            at,
            loss: runs.iter().zip(&places).map(loss).collect(),
        });
        before = at;
    }
    rows
}

fn rounded(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{value:.4}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::curves::tests::run;

    #[test]
    fn runs_of_one_batch_are_compared_step_by_step() {
        let (a, mut b) = (run("a", 16, 128), run("b", 32, 128));
        b.view.info.spec.train.learning_rate = 0.002;
        b.view.info.spec.train.layer_decay = Some(0.9);
        let comparison = Comparison::of(&[a, b], false);
        insta::assert_snapshot!(comparison.text(), @"
        spec                     a      b
        train.layer_decay        -    0.9
        train.learning_rate  0.001  0.002
        train.steps             16     32

        result                    a         b
        status                    finished  finished
        steps                     16        32
        tokens                    2.0k      4.1k
        time                      8 s       16 s
        tokens/s                  256       256
        parameters                1.0k      1.0k
        validation loss           7.0000    7.0000
        validation bits per byte  2.0000    2.0000
        best validation loss      7.0000    7.0000
        best bits per byte        2.0000    2.0000
        best at step              16        32
        workers lost              0         0
        checkpoint at step        16        32
        state                     ab12      ab12

        loss up to step       a       b
                      2  7.6250  7.8125
                      4  7.1250  7.5625
                      6  6.6250  7.3125
                      8  6.1250  7.0625
                     10  5.6250  6.8125
                     12  5.1250  6.5625
                     14  4.6250  6.3125
                     16  4.1250  6.0625
        ");
        let whole = Comparison::of(&[run("a", 16, 128), run("b", 16, 128)], true);
        assert_eq!(
            whole.spec["model.context"],
            [Some(64.into()), Some(64.into())]
        );
        let same = Comparison::of(&[run("a", 16, 128), run("b", 16, 128)], false);
        assert!(same.text().starts_with("the specs are the same\n"));
    }

    #[test]
    fn runs_of_other_batches_are_compared_token_by_token() {
        let comparison = Comparison::of(&[run("a", 16, 128), run("b", 32, 256)], false);
        assert!(comparison.by_tokens());
        let rate = mean_rate(&[Some(100.0), None, Some(300.0)]).expect("two are known");
        assert!((rate - 150.0).abs() < 1e-3, "{rate}");
        assert_eq!(mean_rate(&[None]), None);
        let last = comparison.losses.last().expect("marks");
        assert_eq!(last.at, 16 * 128);
        // Two steps of `a`, one of `b`.
        assert_eq!(last.loss, [Some(4.125), Some(7.0)]);
        let empty = Comparison::of(&[run("a", 0, 128), run("b", 32, 128)], false);
        assert_eq!(empty.losses, []);
        assert!(
            empty.text().contains("tokens                    -"),
            "{}",
            empty.text()
        );
    }
}
