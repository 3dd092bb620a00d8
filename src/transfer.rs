//! What a finetuning was worth: the new task from the pretrained start against the same from scratch, the gain as data
//! get scarce, and what was lost of the old text. Measured by validations of runs; nothing is estimated.
//!
//! Pure but for [`write()`]: from runs to a report, and from that to text, JSON and a picture.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cohort_common::api::{Classes, EvalEvent, RunInfo};
use cohort_common::cluster::{BASE_SPLIT, OWN_SPLIT};
use cohort_common::report::{Chart, Level, Series};
use serde::Serialize;

use crate::output::table;

/// Pixels of the PNG for each of the chart's.
const PNG_SCALE: u32 = 2;

/// Where the weights of a run started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// From the checkpoint.
    Pretrained,
    /// From random weights.
    Scratch,
}

/// One run of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The run.
    pub run: String,
    /// Where it started.
    pub start: Start,
    /// Share of the training samples that it had.
    pub data_share: f64,
    /// Samples of one step.
    pub samples_per_step: u64,
    /// Validation losses on the task, by step.
    pub losses: Vec<(u64, f64)>,
    /// Validation losses on the base's own text, by step; empty where there is none.
    pub base_losses: Vec<(u64, f64)>,
    /// The step of the best loss.
    pub best_step: u64,
    /// The best loss, in nats.
    pub best_loss: f64,
    /// Of a classifier, how well it told labels apart at the best loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<Classes>,
}

impl Outcome {
    /// What a run's validations say; `None` where it has none.
    pub fn of(info: &RunInfo, start: Start) -> Option<Self> {
        let curve = |split: &str| -> Vec<(u64, f64)> {
            let own = info.evals.iter().filter(|eval| eval.split == split);
            own.map(|eval| (eval.step, eval.loss)).collect()
        };
        let own = |eval: &&EvalEvent| eval.split == OWN_SPLIT;
        let best = info.evals.iter().filter(own);
        let best = best.min_by(|a, b| a.loss.total_cmp(&b.loss))?;
        Some(Self {
            run: info.name.clone(),
            start,
            data_share: info.spec.train.data_share.unwrap_or(1.0),
            samples_per_step: info.spec.train.samples_per_step(),
            losses: curve(OWN_SPLIT),
            base_losses: curve(BASE_SPLIT),
            best_step: best.step,
            best_loss: best.loss,
            classes: best.classes.clone(),
        })
    }

    /// The first step at whose validation the loss was as low.
    fn reached(&self, loss: f64) -> Option<u64> {
        let reached = self.losses.iter().find(|(_, own)| *own <= loss);
        reached.map(|(step, _)| *step)
    }
}

/// What a model writes after the same words, before and after.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// The words.
    pub prompt: String,
    /// What the base makes of them.
    pub before: String,
    /// What the finetuned model makes of them.
    pub after: String,
}

/// The whole comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What the finetuning started from.
    pub base: String,
    /// The finetuning on all data first; then, if asked for, from scratch, and both on less data.
    pub runs: Vec<Outcome>,
    /// Text of both models.
    pub samples: Vec<Sample>,
}

impl Report {
    fn pretrained(&self) -> &Outcome {
        &self.runs[0]
    }

    fn pairs(&self) -> impl Iterator<Item = (&Outcome, &Outcome)> {
        let from_base = self
            .runs
            .iter()
            .filter(|run| run.start == Start::Pretrained);
        from_base.filter_map(|own| {
            let same =
                |run: &&Outcome| run.start == Start::Scratch && run.data_share == own.data_share;
            Some((own, self.runs.iter().find(same)?))
        })
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let own = self.pretrained();
        let mut text = format!("transfer    {} from {}\n", own.run, self.base);
        let (first, last) = (own.losses.first(), own.losses.last());
        if let (Some((_, first)), Some((_, last))) = (first, last) {
            let _ = writeln!(
                text,
                "  task        validation loss {first:.4} before, {:.4} at its best (step {}), {last:.4} at the end",
                own.best_loss, own.best_step
            );
        }
        if let Some(classes) = &own.classes {
            let percent = 100.0 * classes.accuracy;
            let _ = writeln!(
                text,
                "  labels      accuracy {percent:.2} %, macro-F1 {:.4} at the best loss",
                classes.macro_f1
            );
        }
        if let (Some((_, before)), Some((_, after))) =
            (own.base_losses.first(), own.base_losses.last())
        {
            let _ = writeln!(
                text,
                "  base        validation loss {before:.4} before, {after:.4} after: {}",
                change(*before, *after)
            );
        }
        if let Some((own, scratch)) = self.pairs().next() {
            text += &self.worth(own, scratch);
        }
        if self.pairs().next().is_some() {
            let _ = write!(text, "\n{}\n", self.shares());
        }
        for sample in &self.samples {
            let _ = write!(
                text,
                "\n--- {} ---\nbefore: {}\nafter:  {}\n",
                one_line(&sample.prompt),
                one_line(&sample.before),
                one_line(&sample.after)
            );
        }
        text
    }

    fn worth(&self, own: &Outcome, scratch: &Outcome) -> String {
        let perplexity = (own.best_loss - scratch.best_loss).exp();
        let mut text = format!(
            "  scratch     {:.4} at its best (step {}), so the pretrained start has a perplexity {} of that\n",
            scratch.best_loss,
            scratch.best_step,
            percent(perplexity)
        );
        text += &match own.reached(scratch.best_loss) {
            None => "  speed       the pretrained start never came as low as from scratch\n".into(),
            Some(0) => format!(
                "  speed       the pretrained start is as good before its first step; from scratch that took {} steps, {} \
                 samples\n",
                scratch.best_step,
                scratch.best_step * scratch.samples_per_step
            ),
            Some(step) => format!(
                "  speed       as good after {step} steps, {} samples; from scratch that took {} steps, {} samples: {:.1} \
                 times as many\n",
                step * own.samples_per_step,
                scratch.best_step,
                scratch.best_step * scratch.samples_per_step,
                scratch.best_step as f64 / step as f64
            ),
        };
        text
    }

    /// Both starts, share by share.
    fn shares(&self) -> String {
        let classifies = self.pretrained().classes.is_some();
        let mut head = vec![
            "training data",
            "pretrained",
            "from scratch",
            "perplexity of scratch's",
        ];
        if classifies {
            head.extend(["accuracy", "from scratch", "macro-F1", "from scratch"]);
        }
        let mut rows = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        for (own, scratch) in self.pairs() {
            let mut row = vec![
                percent(own.data_share),
                format!("{:.4}", own.best_loss),
                format!("{:.4}", scratch.best_loss),
                percent((own.best_loss - scratch.best_loss).exp()),
            ];
            let both = own.classes.as_ref().zip(scratch.classes.as_ref());
            if let Some((a, b)) = both {
                row.extend([a.accuracy, b.accuracy].map(|share| format!("{:.2} %", 100.0 * share)));
                row.extend([a.macro_f1, b.macro_f1].map(|f1| format!("{f1:.4}")));
            }
            rows.push(row);
        }
        table(&rows)
    }

    /// The validation losses of all runs over their steps.
    pub fn chart(&self) -> Chart {
        let points = |losses: &[(u64, f64)]| {
            losses
                .iter()
                .map(|(step, loss)| (*step as f64, *loss))
                .collect()
        };
        let named = |run: &Outcome| {
            let start = match run.start {
                Start::Pretrained => "pretrained",
                Start::Scratch => "from scratch",
            };
            match run.data_share < 1.0 {
                true => format!("{start}, {}", percent(run.data_share)),
                false => start.to_owned(),
            }
        };
        let mut series: Vec<Series> = self
            .runs
            .iter()
            .map(|run| Series {
                name: named(run),
                points: points(&run.losses),
                ..Series::default()
            })
            .collect();
        let own = self.pretrained();
        let mut levels = Vec::new();
        if let Some((_, before)) = own.base_losses.first() {
            series.push(Series {
                name: "base's text".into(),
                points: points(&own.base_losses),
                ..Series::default()
            });
            levels.push(Level {
                name: "base's text before".into(),
                y: *before,
            });
        }
        Chart {
            title: format!("{} from {}", own.run, self.base),
            x_label: "step".into(),
            y_label: "validation loss (nats)".into(),
            series,
            levels,
            ..Chart::default()
        }
    }
}

/// Writes the report as `transfer.txt`, `.json`, `.svg` and `.png` into a directory; returns the files.
pub fn write(report: &Report, directory: &Path) -> Result<Vec<PathBuf>> {
    let cannot = || format!("cannot write the report to `{}`", directory.display());
    std::fs::create_dir_all(directory).with_context(cannot)?;
    let chart = report.chart();
    let json = serde_json::to_string_pretty(report)? + "\n";
    let files = [
        ("transfer.txt", report.text().into_bytes()),
        ("transfer.json", json.into_bytes()),
        ("transfer.svg", chart.svg().into_bytes()),
        ("transfer.png", chart.png(PNG_SCALE)),
    ];
    let mut paths = Vec::new();
    for (name, content) in files {
        let path = directory.join(name);
        std::fs::write(&path, content).with_context(cannot)?;
        paths.push(path);
    }
    Ok(paths)
}

fn change(before: f64, after: f64) -> String {
    let ratio = (after - before).exp();
    match after > before {
        true => format!(
            "its perplexity is {} of what it was, so that much was forgotten",
            percent(ratio)
        ),
        false => format!(
            "its perplexity is {} of what it was; nothing was forgotten",
            percent(ratio)
        ),
    }
}

fn percent(share: f64) -> String {
    match 100.0 * share {
        percent if percent < 10.0 => format!("{percent:.1} %"),
        percent => format!("{percent:.0} %"),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(start: Start, data_share: f64, losses: &[f64]) -> Outcome {
        let losses: Vec<(u64, f64)> = (0..).step_by(10).zip(losses.iter().copied()).collect();
        let best = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1)).copied();
        let (best_step, best_loss) = best.expect("a loss");
        Outcome {
            run: format!("{start:?}-{data_share}").to_lowercase(),
            start,
            data_share,
            samples_per_step: 8,
            base_losses: match start {
                Start::Pretrained => vec![(0, 4.0), (40, 4.1)],
                Start::Scratch => Vec::new(),
            },
            losses,
            best_step,
            best_loss,
            classes: None,
        }
    }

    #[test]
    fn the_report_says_what_the_start_was_worth() {
        let report = Report {
            base: "books@best".into(),
            runs: vec![
                outcome(Start::Pretrained, 1.0, &[4.1, 3.9, 3.8, 3.75, 3.7]),
                outcome(Start::Scratch, 1.0, &[7.6, 5.0, 4.4, 4.2, 4.0]),
                outcome(Start::Pretrained, 0.1, &[4.1, 3.95, 3.9, 3.9, 3.95]),
                outcome(Start::Scratch, 0.1, &[7.6, 5.5, 5.1, 5.2, 5.4]),
            ],
            samples: vec![Sample {
                prompt: "Once".into(),
                before: "upon a\n\ntime".into(),
                after: "there was".into(),
            }],
        };
        insta::assert_snapshot!(report.text(), @"
        transfer    pretrained-1 from books@best
          task        validation loss 4.1000 before, 3.7000 at its best (step 40), 3.7000 at the end
          base        validation loss 4.0000 before, 4.1000 after: its perplexity is 111 % of what it was, so that much was forgotten
          scratch     4.0000 at its best (step 40), so the pretrained start has a perplexity 74 % of that
          speed       as good after 10 steps, 80 samples; from scratch that took 40 steps, 320 samples: 4.0 times as many

        training data  pretrained  from scratch  perplexity of scratch's
                100 %      3.7000        4.0000                     74 %
                 10 %      3.9000        5.1000                     30 %

        --- Once ---
        before: upon a time
        after:  there was
        ");
        let chart = report.chart();
        assert_eq!(chart.series.len(), 5);
        let alone = Report {
            runs: report.runs[..1].to_vec(),
            ..report
        };
        assert!(!alone.text().contains("scratch"));
    }
}
