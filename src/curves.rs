//! The curves of runs as charts, for `plot` and `compare`. **Pure** but for [`load`] and [`fn@write`].

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use cohort_common::api::{Band, EvalEvent, History, HistoryRequest, RunView, TimelineEntry};
use cohort_common::cluster::OWN_SPLIT;
use cohort_common::report::{self, Chart, Level, Moment, Series};

use crate::cli::{Axis, Metric};
use crate::failure::hinted;
use crate::source::Source;

/// Points of a curve, at most: about as many as the picture has columns.
const POINTS: usize = 1000;
/// Pixels of a PNG for each of the chart's.
const PNG_SCALE: u32 = 2;

/// A run with the steps that are shown.
pub struct Curves {
    /// The run.
    pub view: RunView,
    /// Its steps.
    pub history: History,
}

/// How curves are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Over what.
    pub axis: Axis,
    /// Whether the vertical axis is logarithmic.
    pub log: bool,
    /// Weight of the past in a moving average.
    pub smooth: f64,
    /// Whether what counting alone would lose is drawn.
    pub baselines: bool,
}

/// The steps `from` to `to` of each run. At least one must have some.
pub async fn load(
    source: &mut Source,
    runs: &[String],
    (from, to): (Option<u64>, Option<u64>),
) -> Result<Vec<Curves>> {
    let mut all = Vec::new();
    for run in runs {
        let mut view = source.view(run).await?;
        let request = HistoryRequest {
            run: view.info.name.clone(),
            from,
            to,
            points: POINTS,
        };
        let history = source.history(&request).await?;
        let shown = |eval: &EvalEvent| {
            from.is_none_or(|from| eval.step >= from) && to.is_none_or(|to| eval.step <= to)
        };
        view.info.evals.retain(shown);
        all.push(Curves { view, history });
    }
    Ok(all)
}

/// The chart of a metric; an error where no run has it.
pub fn chart(runs: &[Curves], metric: Metric, style: &Style) -> Result<Chart> {
    let unit = Unit::of(runs, style.axis);
    let alone = runs.len() == 1;
    let mut series = Vec::new();
    for (place, run) in runs.iter().enumerate() {
        let name = match alone && metric == Metric::Loss {
            true => "training".to_owned(),
            false => run.view.info.name.clone(),
        };
        series.push(run.curve(metric, name, place, style, &unit));
    }
    if metric == Metric::Loss {
        for (place, run) in runs.iter().enumerate() {
            series.extend(run.validations(place, alone, style.axis, &unit));
        }
    }
    if series
        .iter()
        .all(|series| series.points.iter().all(|p| !p.1.is_finite()))
    {
        bail!(
            "there is no {} to draw: {} {} no step that has it between the first and the last that are shown",
            words(metric),
            names(runs),
            if alone { "has" } else { "have" }
        );
    }
    let levels = match metric {
        Metric::Loss if style.baselines => baselines(&runs[0].view),
        _ => Vec::new(),
    };
    Ok(Chart {
        title: names(runs),
        x_label: unit.label,
        y_label: label(metric).into(),
        series,
        levels,
        moments: runs
            .iter()
            .flat_map(|run| run.moments(alone, style.axis, unit.divisor))
            .collect(),
        log: style.log,
    })
}

/// Whether a file's name says what is to be drawn into it.
pub fn check_extension(path: &Path) -> Result<()> {
    match kind(path) {
        Some(_) => Ok(()),
        None => Err(hinted(
            format!(
                "`{}` does not say which kind of picture it is to be",
                path.display()
            ),
            "give it the ending `.svg` or `.png`",
        )),
    }
}

/// Draws charts below each other into a file whose extension was checked.
pub fn write(path: &Path, charts: &[Chart]) -> Result<()> {
    let bytes = match kind(path) {
        Some(Kind::Png) => report::stacked_png(charts, PNG_SCALE),
        _ => report::stacked_svg(charts).into_bytes(),
    };
    std::fs::write(path, bytes).with_context(|| format!("cannot write `{}`", path.display()))
}

enum Kind {
    Svg,
    Png,
}

fn kind(path: &Path) -> Option<Kind> {
    let extension = path.extension()?.to_str()?.to_lowercase();
    match extension.as_str() {
        "svg" => Some(Kind::Svg),
        "png" => Some(Kind::Png),
        _ => None,
    }
}

/// What the horizontal axis counts, and in which unit.
struct Unit {
    divisor: f64,
    label: String,
}

impl Unit {
    fn of(runs: &[Curves], axis: Axis) -> Self {
        let last = runs.iter().map(|run| run.end(axis)).fold(0.0, f64::max);
        let (divisor, label) = match axis {
            Axis::Step => (1.0, "step"),
            Axis::Tokens if last >= 2e9 => (1e9, "billions of tokens"),
            Axis::Tokens if last >= 2e6 => (1e6, "millions of tokens"),
            Axis::Tokens if last >= 2e4 => (1e3, "thousands of tokens"),
            Axis::Tokens => (1.0, "tokens"),
            Axis::Time if last >= 7200.0 => (3600.0, "hours"),
            Axis::Time if last >= 120.0 => (60.0, "minutes"),
            Axis::Time => (1.0, "seconds"),
        };
        Self {
            divisor,
            label: label.into(),
        }
    }
}

impl Curves {
    fn band(&self, metric: Metric) -> &Band {
        match metric {
            Metric::Loss => &self.history.loss,
            Metric::GradNorm => &self.history.grad_norm,
            Metric::LearningRate => &self.history.learning_rate,
            Metric::TokensPerSecond => &self.history.tokens_per_second,
            Metric::Mfu => &self.history.mfu,
        }
    }

    /// Where a point stands: step, tokens or seconds.
    fn x(&self, point: usize, axis: Axis) -> f64 {
        let history = &self.history;
        match axis {
            Axis::Step => history.step[point] as f64,
            Axis::Tokens => history.tokens[point] as f64,
            Axis::Time => history.time_ms[point].saturating_sub(history.time_ms[0]) as f64 / 1000.0,
        }
    }

    fn end(&self, axis: Axis) -> f64 {
        let last = self.history.step.len().checked_sub(1);
        last.map_or(0.0, |last| self.x(last, axis))
    }

    /// Where a step stands, between the points that are known.
    fn x_of(&self, step: u64, axis: Axis) -> f64 {
        let steps = &self.history.step;
        let next = steps.partition_point(|known| *known < step);
        let place = |point: usize| (steps[point] as f64, self.x(point, axis));
        let (before, after) = match (next, steps.len()) {
            _ if axis == Axis::Step => return step as f64,
            (_, 0) => return f64::NAN,
            // Tokens begin at 0, and so does time where the first step is shown.
            (0, _) => ((0.0, 0.0), place(0)),
            (next, all) if next == all => return place(all - 1).1,
            (next, _) => (place(next - 1), place(next)),
        };
        let part = (step as f64 - before.0) / (after.0 - before.0).max(1.0);
        before.1 + part * (after.1 - before.1)
    }

    fn curve(
        &self,
        metric: Metric,
        name: String,
        place: usize,
        style: &Style,
        unit: &Unit,
    ) -> Series {
        let band = self.band(metric);
        let x = |point: usize| self.x(point, style.axis) / unit.divisor;
        let means = smoothed(&band.mean, style.smooth);
        let bounds = band.min.iter().zip(&band.max).enumerate();
        let bounds = bounds.filter_map(|(point, (low, high))| {
            Some((x(point), f64::from((*low)?), f64::from((*high)?)))
        });
        Series {
            name,
            band: bounds.collect(),
            points: means
                .into_iter()
                .enumerate()
                .map(|(point, y)| (x(point), y))
                .collect(),
            color: Some(place),
            dashed: false,
        }
    }

    /// A dashed curve for each validation; of several runs, only that of their own text.
    fn validations(&self, place: usize, alone: bool, axis: Axis, unit: &Unit) -> Vec<Series> {
        let evals = &self.view.info.evals;
        let mut splits: Vec<&str> = Vec::new();
        for eval in evals {
            let wanted = alone || eval.split == OWN_SPLIT;
            if wanted && !splits.contains(&eval.split.as_str()) {
                splits.push(&eval.split);
            }
        }
        let series = |(other, split): (usize, &&str)| {
            let own = evals.iter().filter(|eval| eval.split == **split);
            let point = |eval: &EvalEvent| (self.x_of(eval.step, axis) / unit.divisor, eval.loss);
            Series {
                name: match alone {
                    true => split.replace('_', " "),
                    false => format!("{} {split}", self.view.info.name),
                },
                points: own.map(point).collect(),
                band: Vec::new(),
                // Another text has a colour of its own.
                color: Some(place + other),
                dashed: true,
            }
        };
        splits.iter().enumerate().map(series).collect()
    }

    /// What happened to the run among the steps that are shown.
    fn moments(&self, alone: bool, axis: Axis, divisor: f64) -> Vec<Moment> {
        let (first, last) = (self.history.step.first(), self.history.step.last());
        let Some((first, last)) = first.zip(last) else {
            return Vec::new();
        };
        let told = |entry: &TimelineEntry| {
            let step = entry.step.filter(|step| (*first..=*last).contains(step))?;
            let what = match (entry.kind.as_str(), &entry.worker) {
                ("worker_lost", Some(worker)) => format!("{worker} lost"),
                ("loading", _) if step > 0 => "taken up".to_owned(),
                _ => return None,
            };
            Some(Moment {
                name: match alone {
                    true => what,
                    false => format!("{}: {what}", self.view.info.name),
                },
                x: self.x_of(step, axis) / divisor,
            })
        };
        self.view.timeline.iter().filter_map(told).collect()
    }
}

/// An exponential moving average, corrected for its beginning (Kingma and Ba, arXiv 1412.6980, section 3). A value that is
/// not known leaves a gap.
fn smoothed(values: &[Option<f32>], weight: f64) -> Vec<f64> {
    let (mut sum, mut whole) = (0.0, 0.0);
    let next = |value: &Option<f32>| match value {
        None => f64::NAN,
        Some(value) => {
            sum = weight * sum + (1.0 - weight) * f64::from(*value);
            whole = weight * whole + (1.0 - weight);
            sum / whole
        }
    };
    values.iter().map(next).collect()
}

/// What counting alone would lose on the text that a run trains on.
fn baselines(view: &RunView) -> Vec<Level> {
    if let Some(known) = &view.facts.baselines {
        let level = |name: String, y: f64| Level { name, y };
        let unigram = known.unigram.map(|loss| level("unigram".into(), loss));
        let ngram = known.ngram.as_ref();
        let ngram = ngram.map(|ngram| level(format!("{}-gram", ngram.order), ngram.loss));
        let uniform = level("uniform".into(), known.uniform);
        return [Some(uniform), unigram, ngram]
            .into_iter()
            .flatten()
            .collect();
    }
    let outputs = view.info.spec.model.outputs();
    let what = match view.info.spec.model.classifies() {
        true => "labels",
        false => "tokens",
    };
    vec![Level {
        name: format!("all {outputs} {what} alike"),
        y: (outputs as f64).ln(),
    }]
}

fn names(runs: &[Curves]) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.view.info.name.as_str()).collect();
    names.join(", ")
}

fn words(metric: Metric) -> &'static str {
    match metric {
        Metric::Loss => "loss",
        Metric::GradNorm => "gradient norm",
        Metric::LearningRate => "learning rate",
        Metric::TokensPerSecond => "speed",
        Metric::Mfu => "model FLOPs utilisation",
    }
}

fn label(metric: Metric) -> &'static str {
    match metric {
        Metric::Loss => "loss (nats)",
        Metric::GradNorm => "gradient norm before clipping",
        Metric::LearningRate => "learning rate",
        Metric::TokensPerSecond => "tokens per second",
        Metric::Mfu => "model FLOPs utilisation",
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A run of `last` steps with so many tokens each, whose loss falls from 8.
    pub fn run(name: &str, last: u64, tokens: u64) -> Curves {
        let spec: cohort_common::spec::RunSpec = serde_json::from_value(serde_json::json!({
            "kind": "pretrain",
            "model": {
                "architecture": "llama", "vocab_size": 512, "context": 64, "hidden_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
                "intermediate_size": 172, "tie_word_embeddings": true, "bias": false, "dropout": 0.0,
                "norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.02
            },
            "train": {
                "steps": last, "lanes": tokens / 64, "micro_batch": 1, "accumulate": 1, "learning_rate": 0.001,
                "min_learning_rate": 0.0001, "warmup_steps": 10, "schedule": "cosine", "decay_steps": 0,
                "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0,
                "seed": 1, "eval_every": 50, "eval_samples": 0, "min_workers": 1
            },
            "checkpoint": { "every": 100, "keep": 2 },
            "corpus": "c0ffee",
            "start": null
        }))
        .expect("a spec");
        let steps: Vec<u64> = (1..=last).collect();
        let band = |value: &dyn Fn(u64) -> Option<f32>| Band {
            mean: steps.iter().map(|step| value(*step)).collect(),
            ..Band::default()
        };
        let eval = |step: u64| EvalEvent {
            run: name.into(),
            step,
            split: OWN_SPLIT.into(),
            loss: 8.0 - step as f64 / last.max(1) as f64,
            bits_per_byte: Some(2.0),
            tokens: 100,
            classes: None,
        };
        let info = serde_json::json!({
            "name": name, "status": "finished", "step": last, "spec": spec, "parent": null, "error": null,
            "created_ms": 1, "finished_ms": 2, "queue_place": null, "last_step": null,
            "evals": [eval(0), eval(last / 2), eval(last)],
            "checkpoints": [{"step": last, "path": "there", "bytes": 9, "val_loss": 1.0, "state_hash": "ab12"}]
        });
        let view = serde_json::json!({
            "info": info, "facts": {"parameters": 1000, "corpus": "books"}, "timeline": [
                {"id": 1, "time_ms": 1, "step": 3, "kind": "worker_lost", "text": "t", "worker": "w2", "cost_ms": null},
                {"id": 2, "time_ms": 1, "step": 0, "kind": "loading", "text": "t", "worker": null, "cost_ms": null},
                {"id": 3, "time_ms": 1, "step": 4, "kind": "note", "text": "t", "worker": null, "cost_ms": null}
            ], "samples": [], "eta_seconds": null
        });
        let history = History {
            run: name.into(),
            rows: last,
            tokens: steps.iter().map(|step| step * tokens).collect(),
            time_ms: steps.iter().map(|step| 1000 + step * 500).collect(),
            loss: band(&|step| Some(8.0 - 4.0 * step as f32 / last as f32)),
            grad_norm: band(&|_| Some(1.0)),
            learning_rate: band(&|_| Some(0.001)),
            tokens_per_second: band(&|step| (step > 1).then_some(2.0 * tokens as f32)),
            mfu: band(&|_| None),
            step: steps,
        };
        Curves {
            view: serde_json::from_value(view).expect("a run"),
            history,
        }
    }

    const STYLE: Style = Style {
        axis: Axis::Step,
        log: false,
        smooth: 0.0,
        baselines: false,
    };

    #[test]
    fn one_run_is_drawn_with_its_validations_and_what_happened() {
        let runs = [run("books-1", 10, 128)];
        let style = Style {
            baselines: true,
            ..STYLE
        };
        let chart = chart(&runs, Metric::Loss, &style).unwrap();
        let names: Vec<&str> = chart.series.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["training", "validation"]);
        assert_eq!(
            chart.series[1].points,
            [(0.0, 8.0), (5.0, 7.5), (10.0, 7.0)]
        );
        assert_eq!(chart.levels[0].y, 512f64.ln());
        let moments: Vec<_> = chart
            .moments
            .iter()
            .map(|m| (m.name.as_str(), m.x))
            .collect();
        assert_eq!(moments, [("w2 lost", 3.0)]);
    }

    #[test]
    fn runs_are_overlaid_on_any_axis() {
        let runs = [run("a", 10, 128), run("b", 20, 25_600)];
        let over = |axis| chart(&runs, Metric::Loss, &Style { axis, ..STYLE }).unwrap();
        let tokens = over(Axis::Tokens);
        assert_eq!(tokens.x_label, "thousands of tokens");
        assert_eq!(tokens.series[1].points[19].0, 512.0);
        assert_eq!(tokens.series[3].name, "b validation");
        assert_eq!(tokens.series[3].points[1].0, 256.0);
        assert_eq!(tokens.series[3].color, tokens.series[1].color);
        let time = over(Axis::Time);
        assert_eq!(
            (time.x_label.as_str(), time.series[0].points[9].0),
            ("seconds", 4.5)
        );
        assert_eq!(time.moments[1].name, "b: w2 lost");
    }

    #[test]
    fn what_no_run_has_is_not_drawn() {
        let runs = [run("a", 10, 128), run("b", 5, 128)];
        let error = chart(&runs, Metric::Mfu, &STYLE).unwrap_err().to_string();
        assert!(
            error.starts_with("there is no model FLOPs utilisation to draw: a, b have"),
            "{error}"
        );
        let speed = chart(&runs, Metric::TokensPerSecond, &STYLE).unwrap();
        assert!(speed.series[0].points[0].1.is_nan());
        for (name, right) in [
            ("a.svg", true),
            ("a.PNG", true),
            ("a.pdf", false),
            ("a", false),
        ] {
            assert_eq!(check_extension(Path::new(name)).is_ok(), right, "{name}");
        }
    }

    #[test]
    fn smoothing_begins_with_the_first_value_and_keeps_gaps() {
        let values = [Some(1.0), Some(3.0), None, Some(3.0)];
        assert_eq!(smoothed(&values, 0.0)[..2], [1.0, 3.0]);
        let smooth = smoothed(&values, 0.5);
        assert_eq!(smooth[0], 1.0);
        assert!((smooth[1] - 7.0 / 3.0).abs() < 1e-9 && smooth[2].is_nan());
        assert!(smooth[3] > smooth[1] && smooth[3] < 3.0);
    }
}
