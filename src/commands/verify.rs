//! `cohort verify`: checks a run's ledger and checkpoints, and, with `--replay`, computes steps again.

use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use cohort_common::api::{AuditReport, ReplayReport, RunInfo};
use cohort_common::cluster::StateSource;
use cohort_common::home::Home;
use cohort_common::ledger::Entry;
use cohort_common::net::{Places, Token};
use cohort_common::spec::human_bytes;
use cohort_worker::{EntranceAddress, Replay};

use crate::cli::{OptimizerArg, VerifyArgs};
use crate::client::Client;
use crate::context::Context;
use crate::facts::short;
use crate::local::{LocalCluster, Options};
use crate::output::Output;

/// A line of `--json`.
#[derive(serde::Serialize)]
struct Line<'a, T> {
    event: &'static str,
    #[serde(flatten)]
    report: &'a T,
}

/// Runs the verb.
pub async fn run(args: VerifyArgs) -> Result<()> {
    // A device that is not there is said before anything is read.
    let _: cohort_worker::engine::DeviceChoice = args.device.parse()?;
    let context = Context::of(&args.connect)?;
    let out = args.json.output();
    let started = Instant::now();
    let mut client = context.connect_if_running().await?;
    let report = match &mut client {
        Some(client) => client.verify(&args.run).await?,
        None => {
            let (home, run) = (context.home.clone(), args.run.clone());
            let audit = move || cohort_coordinator::offline::audit(&home, &run);
            tokio::task::spawn_blocking(audit).await??
        }
    };
    if let Some(step) = args.replay
        && !(1..=report.step).contains(&step)
    {
        bail!(
            "run `{}` has {} committed steps, so step {step} cannot be computed again; --replay takes a step that the run has done",
            args.run,
            report.step
        );
    }
    out.line(&Line {
        event: "verify",
        report: &report,
    })?;
    out.say(audited(&report, started.elapsed().as_secs_f64()));
    if let Some(contradiction) = report.contradiction {
        return Err(anyhow!(contradiction));
    }
    match args.replay {
        Some(step) => replay(&args, &context, client, step, out).await,
        None => Ok(()),
    }
}

/// What was checked, in numbers.
fn audited(report: &AuditReport, seconds: f64) -> String {
    let row = |name: &str, text: String| format!("  {name:<14}{text}\n");
    let mut text = format!(
        "{}, {} at step {}\n",
        report.run, report.status, report.step
    );
    text += &row(
        "entries",
        format!("{}, the last one {}", report.entries, short(&report.head)),
    );
    let lanes = report.lanes_per_step;
    text += &row("lanes", format!("{}, {lanes} in a step", report.lanes));
    if report.epoch_samples > 0 {
        let samples = format!(
            "{}: {} complete epochs of {}, and {} of the next",
            report.samples, report.epochs, report.epoch_samples, report.partial_samples
        );
        text += &row("samples", samples);
    }
    if report.skipped > 0 {
        let skipped = format!(
            "{}, as the watchdog judges by the steps before",
            report.skipped
        );
        text += &row("skipped", skipped);
    }
    if report.earlier_horizon > 0 {
        let steps = format!(
            "{} steps were planned before the run was given more",
            report.earlier_horizon
        );
        text += &row("rates", steps);
    }
    let checkpoints = format!(
        "{} with {}; {} with their ledger, {} states named in it",
        report.checkpoints,
        human_bytes(report.checkpoint_bytes),
        report.checkpoint_ledgers,
        report.state_hashes
    );
    text += &row("checkpoints", checkpoints);
    text += &row("time", format!("{seconds:.2} s"));
    for note in &report.notes {
        text += &format!("note: {note}\n");
    }
    text += &match report.contradictions {
        0 => "no contradiction: every step once and in its chain, every lane in its sums, every sample once in an epoch,\nevery checkpoint as its hashes and the ledger say".to_owned(),
        1 => "1 contradiction".to_owned(),
        n => format!("{n} contradictions; the first one follows"),
    };
    text
}

/// Computes steps again, with the text and the state of a coordinator; of a private one if none runs.
async fn replay(
    args: &VerifyArgs,
    context: &Context,
    client: Option<Client>,
    step: u64,
    out: Output,
) -> Result<()> {
    let (client, cluster) = match client {
        Some(client) => (client, None),
        None => {
            let options = Options {
                home: context.home.clone(),
                listen: "127.0.0.1:0".into(),
                http: None,
                workers: 0,
                threads: None,
                optimizer: OptimizerArg::default(),
                secret: context.secret.clone(),
                private: true,
                tensorboard: None,
                notify: Vec::new(),
                variables: Vec::new(),
            };
            let cluster = LocalCluster::start(&options).await?;
            (context.connect_to(cluster.url()).await?, Some(cluster))
        }
    };
    let replayed = compute(args, context, client, step).await;
    if let Some(cluster) = cluster {
        cluster.end().await;
    }
    let report = replayed?;
    out.line(&Line {
        event: "replay",
        report: &report,
    })?;
    out.say(format!(
        "replayed {} steps, {} to {}, in {:.2} s",
        report.steps,
        report.from + 1,
        report.through,
        report.seconds
    ));
    match report.contradiction {
        Some(contradiction) => Err(anyhow!(contradiction)),
        None => {
            out.say(
                "each step's lanes, sums, norm and gradient are those of the ledger, to the bit",
            );
            Ok(())
        }
    }
}

async fn compute(
    args: &VerifyArgs,
    context: &Context,
    mut client: Client,
    step: u64,
) -> Result<ReplayReport> {
    let run = client.run(&args.run).await?;
    let source = source(&run, step);
    let mut entries = Vec::new();
    let mut updates = 0;
    let mut lines = client.ledger(&args.run).await?;
    while let Some(line) = lines.next_line().await? {
        let entry = Entry::from_json_line(std::str::from_utf8(&line)?)?;
        if entry.step > step {
            break;
        }
        match entry.step > source.step() {
            true => entries.push(entry),
            false => updates += u64::from(!entry.skipped),
        }
    }
    let token = context.token_for(client.url())?;
    let config = cohort_worker::Config {
        coordinators: Places::new([client.url().to_owned()]).expect("it is one"),
        trust: token.as_ref().and_then(Token::trust),
        token,
        device: args.device.parse()?,
        threads: args.threads.unwrap_or(0),
        cache: Home::open(&context.home)?.worker(),
        shared_memory: false,
        site: None,
        entrance: EntranceAddress::Nowhere,
        grace: std::time::Duration::ZERO,
        traces: cohort_common::traces::Traces::default(),
    };
    let replay = Replay {
        run: run.name,
        spec: run.spec,
        source,
        updates,
        entries,
    };
    Ok(cohort_worker::replay(config, replay).await?)
}

/// The newest state before a step.
fn source(run: &RunInfo, step: u64) -> StateSource {
    let before = run.checkpoints.iter().filter(|c| c.step < step);
    match (before.map(|c| c.step).max(), &run.spec.start) {
        (Some(step), _) => StateSource::Checkpoint(step),
        (None, Some(_)) => StateSource::Start,
        (None, None) => StateSource::Seed,
    }
}
