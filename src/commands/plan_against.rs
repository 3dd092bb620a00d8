//! `cohort plan --against RUN`: what was planned, beside what the run has taken.

use anyhow::Result;
use cohort_common::api::{CorpusInfo, EvalEvent, History, HistoryRequest, RunInfo};
use cohort_common::corpus::Baselines;
use cohort_common::spec::{Plan, human_bytes, human_count};
use cohort_coordinator::offline;
use serde::Serialize;

use crate::commands::plan;
use crate::context::Context;
use crate::facts;
use crate::output::{Output, duration, table};
use crate::plans::{self, KeptPlan};

/// Points of the history that is asked for.
const POINTS: usize = 4096;

/// One line of JSON.
#[derive(Serialize)]
struct Comparison {
    run: String,
    status: String,
    /// Workers that trained it last.
    workers: u32,
    /// Whether the plan was made before; else it is computed now.
    kept: bool,
    /// Whether the plan's times were measured.
    measured: bool,
    planned: Figures,
    actual: Figures,
    /// The last validation loss, in nats per token.
    val_loss: Option<f64>,
    /// What that is to be compared with.
    baselines: Option<Baselines>,
}

/// What a run takes. Absent is what is not known.
#[derive(Serialize)]
struct Figures {
    steps: u64,
    tokens: u64,
    /// In a step; of a run, the median.
    tokens_per_second: Option<f64>,
    step_seconds: Option<f64>,
    /// In all, from submission to end.
    seconds: Option<f64>,
    checkpoint_bytes: u64,
}

/// Compares.
pub async fn run(context: &Context, name: &str, out: Output) -> Result<()> {
    let found = Found::of(context, name).await?;
    let info = &found.info;
    let kept = plans::find(&context.home, &info.spec);
    let comparison = Comparison {
        run: info.name.clone(),
        status: info.status.clone(),
        workers: info.workers.max(1),
        kept: kept.is_some(),
        measured: kept.as_ref().is_some_and(|kept| kept.measured.is_some()),
        planned: planned(kept, &found),
        actual: actual(&found),
        val_loss: last_validation(info).map(|eval| eval.loss),
        baselines: found.corpus.as_ref().and_then(|corpus| corpus.baselines),
    };
    out.line(&comparison)?;
    out.say(shown(&comparison));
    Ok(())
}

/// What is known of the run.
struct Found {
    info: RunInfo,
    history: History,
    /// Absent where it was removed.
    corpus: Option<CorpusInfo>,
}

impl Found {
    async fn of(context: &Context, name: &str) -> Result<Self> {
        let request = |run: &str| HistoryRequest {
            run: run.to_owned(),
            from: None,
            to: None,
            points: POINTS,
        };
        Ok(match context.connect_if_running().await? {
            Some(mut client) => {
                let info = client.run(name).await?;
                Self {
                    history: client.history(&request(&info.name)).await?,
                    corpus: client.corpus(&info.spec.corpus).await.ok(),
                    info,
                }
            }
            None => {
                let info = offline::run(&context.home, name)?;
                let corpora = offline::corpora(&context.home)?;
                Self {
                    history: offline::history(&context.home, &request(&info.name))?,
                    corpus: corpora
                        .into_iter()
                        .find(|corpus| corpus.fingerprint == info.spec.corpus),
                    info,
                }
            }
        })
    }

    /// The plan that would have been made, but for the clock.
    fn plan(&self) -> KeptPlan {
        let spec = self.info.spec.clone();
        let size = self.corpus.as_ref().and_then(|corpus| {
            let row = corpus.supervised.as_ref().map(|supervised| supervised.row);
            let (train, validation) = (corpus.train.tokens, corpus.validation.tokens);
            let length = spec.sample_length();
            plan::size(train, validation, row, length, corpus.bytes_on_disk).ok()
        });
        let plan = Plan::of(&spec, size, &[self.info.workers.max(1)]);
        KeptPlan::new(spec, plan, None, 1.0, Vec::new())
    }
}

fn planned(kept: Option<KeptPlan>, found: &Found) -> Figures {
    let kept = kept.unwrap_or_else(|| found.plan());
    let time = kept.estimate(found.info.workers.max(1));
    Figures {
        steps: kept.plan.steps,
        tokens: kept.plan.tokens,
        tokens_per_second: time.map(|time| time.tokens_per_second),
        step_seconds: time.map(|time| time.step_seconds),
        seconds: time.map(|time| time.seconds),
        checkpoint_bytes: kept.plan.checkpoints.total,
    }
}

fn actual(found: &Found) -> Figures {
    let info = &found.info;
    let speeds = found.history.tokens_per_second.mean.iter().flatten();
    let mut speeds: Vec<f32> = speeds.copied().collect();
    speeds.sort_by(f32::total_cmp);
    let speed = speeds.get(speeds.len() / 2).map(|speed| f64::from(*speed));
    let last = found.history.time_ms.last().copied();
    let end = info.finished_ms.or(last);
    let per_step = info.spec.tokens_per_step();
    Figures {
        steps: info.step,
        tokens: info.step * per_step,
        tokens_per_second: speed,
        step_seconds: speed.map(|speed| per_step as f64 / speed),
        seconds: end.map(|end| end.saturating_sub(info.created_ms) as f64 / 1e3),
        checkpoint_bytes: info.checkpoints.iter().map(|c| c.bytes).sum(),
    }
}

fn last_validation(info: &RunInfo) -> Option<&EvalEvent> {
    info.evals
        .iter()
        .rev()
        .find(|eval| eval.split == "validation")
}

fn shown(found: &Comparison) -> String {
    let (planned, actual) = (&found.planned, &found.actual);
    let mut rows = vec![["", "planned", "actual", "actual / planned"].map(String::from)];
    let mut row = |what: &str, pair: [Option<f64>; 2], text: &dyn Fn(f64) -> String| {
        let ratio = match pair {
            [Some(planned), Some(actual)] if planned > 0.0 => format!("{:.2}", actual / planned),
            _ => "-".into(),
        };
        let [planned, actual] = pair.map(|value| value.map_or("-".into(), text));
        rows.push([what.into(), planned, actual, ratio]);
    };
    let counts = [
        ("steps", planned.steps, actual.steps),
        ("tokens", planned.tokens, actual.tokens),
    ];
    for (what, planned, actual) in counts {
        row(what, [planned, actual].map(|n| Some(n as f64)), &|n| {
            human_count(n as u64)
        });
    }
    row(
        "tokens/s",
        [planned.tokens_per_second, actual.tokens_per_second],
        &|n| human_count(n as u64),
    );
    row(
        "step",
        [planned.step_seconds, actual.step_seconds],
        &|seconds| format!("{:.1} ms", 1e3 * seconds),
    );
    row("time", [planned.seconds, actual.seconds], &duration);
    let bytes = [planned.checkpoint_bytes, actual.checkpoint_bytes];
    row("checkpoints", bytes.map(|n| Some(n as f64)), &|n| {
        human_bytes(n as u64)
    });
    let rows: Vec<Vec<String>> = rows.into_iter().map(Vec::from).collect();
    let mut text = format!(
        "{}: {}, workers: {}\n",
        found.run, found.status, found.workers
    );
    if !found.kept {
        text += "no plan was kept for this run; what can be is computed now\n";
    } else if !found.measured {
        text += "the plan was made without measuring\n";
    }
    text += &format!("\n{}\n", table(&rows));
    if let Some(loss) = found.val_loss {
        text += &format!("\nvalidation loss {loss:.4}");
        if let Some(baselines) = &found.baselines {
            text += &format!("; by counting alone: {}", facts::losses(baselines));
        }
    }
    text
}
