//! Computes steps of a run again, alone, and compares each with its ledger entry, to the bit. It uses what a worker
//! uses in training: the same text, the same state, the same lanes, the same update. Nothing is recorded.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cohort_common::aggregate::totals_of;
use cohort_common::api::ReplayReport;
use cohort_common::checkpoint::hex;
use cohort_common::cluster::StateSource;
use cohort_common::cluster::messages::LaneSums;
use cohort_common::ids::{Lane, RunId};
use cohort_common::ledger::Entry;
use cohort_common::net::{self, Credentials};
use cohort_common::schedule::gradient_scale;
use cohort_common::security::Whom;
use cohort_common::spec::RunSpec;
use cohort_common::tree::Tree;

use crate::data::{DataClient, RunData};
use crate::engine::{DeviceChoice, Engine, Gradient, Update};
use crate::lanes::{Hooks, Stop, Work};
use crate::state::{self, Fetched};
use crate::{Config, Error};

/// What to do about a step that comes out differently.
const ADVICE: &str = "the run was computed by another kind of machine or build, or a machine computed wrongly; replay it on a machine like those that trained it, and if it differs there, too, go on from a checkpoint before this step";

/// Which steps of which run.
#[derive(Clone, Debug)]
pub struct Replay {
    /// The run.
    pub run: String,
    /// What it does.
    pub spec: RunSpec,
    /// The state to begin with.
    pub source: StateSource,
    /// Updates that it has seen: its step, less the steps that were skipped.
    pub updates: u64,
    /// The entries of the steps after it, in order, without a gap.
    pub entries: Vec<Entry>,
}

/// Replays steps. `config` says where the text and the state come from, what computes, and where both are cached. A
/// difference is in the report; an error is a replay that could not be done.
pub async fn replay(config: Config, replay: Replay) -> Result<ReplayReport, Error> {
    std::fs::create_dir_all(&config.cache).map_err(|source| Error::Cache {
        path: config.cache.clone(),
        source,
    })?;
    let credentials = Credentials {
        token: config.token.clone(),
        ..Credentials::default()
    };
    let trust = config.trust.as_ref();
    let channel = net::connect(config.coordinators.first(), trust, Whom::Coordinator).await?;
    let client = DataClient::new(channel, credentials);
    let run = RunId::new(&replay.run);
    let cache: &PathBuf = &config.cache;
    let data = RunData::open(&client, cache, &replay.spec, &[], Arc::default()).await;
    let data = data.map_err(Error::Replay)?;
    let state = state::fetch(&client, cache, &run, replay.source).await;
    let state = state.map_err(Error::Replay)?;
    let (device, threads) = (config.device, config.threads);
    let computed =
        tokio::task::spawn_blocking(move || compute(&replay, &data, &state, device, threads));
    match computed.await {
        Ok(report) => report.map_err(Error::Replay),
        Err(panic) => Err(Error::Replay(panic.to_string())),
    }
}

fn compute(
    replay: &Replay,
    data: &RunData,
    state: &Fetched,
    device: DeviceChoice,
    threads: usize,
) -> Result<ReplayReport, String> {
    let engine = state.engine(&replay.spec, device, threads)?;
    let mut player = Player {
        spec: &replay.spec,
        data,
        engine,
        updates: replay.updates,
        free: Vec::new(),
    };
    let from = replay.source.step();
    let mut report = ReplayReport {
        run: replay.run.clone(),
        from,
        through: from,
        ..ReplayReport::default()
    };
    let started = Instant::now();
    for entry in &replay.entries {
        let difference = match entry.step == report.through + 1 {
            true => player
                .step(entry, &mut report)
                .map_err(|stop| failed(entry.step, stop))?,
            false => {
                return Err(format!(
                    "the ledger has no entry for step {}",
                    report.through + 1
                ));
            }
        };
        report.through = entry.step;
        report.steps += 1;
        if let Some(difference) = difference {
            report.contradiction = Some(format!("step {} {difference}; {ADVICE}", entry.step));
            break;
        }
    }
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

fn failed(step: u64, stop: Stop) -> String {
    match stop {
        Stop::Failed(error) | Stop::Unable(error) => {
            format!("step {step} cannot be computed again: {error}")
        }
        Stop::Cancelled | Stop::Obsolete => format!("step {step} was cancelled"),
    }
}

/// The state of a replay.
struct Player<'a> {
    spec: &'a RunSpec,
    data: &'a RunData,
    engine: Engine,
    updates: u64,
    free: Vec<Gradient>,
}

/// Collects what lanes find.
struct Found<'a>(&'a mut [LaneSums]);

impl Hooks for Found<'_> {
    fn done(&mut self, lanes: &[(Lane, LaneSums)], _: Duration) {
        for &(lane, sums) in lanes {
            self.0[lane as usize] = sums;
        }
    }
}

impl Player<'_> {
    /// Computes a step, says how it differs from its entry, and applies it if it does not.
    fn step(&mut self, entry: &Entry, report: &mut ReplayReport) -> Result<Option<String>, Stop> {
        if let Some(recorded) = entry.state_hash_before {
            let found = self
                .engine
                .state_hash()
                .expect("a run that is replayed trains");
            if found != recorded {
                let (found, recorded) = (hex::encode(&found), hex::encode(&recorded));
                return Ok(Some(differs("state_hash_before", &recorded, &found)));
            }
            report.state_hashes += 1;
        }
        let train = &self.spec.train;
        let tree = Tree::new(train.lanes);
        let mut lanes = vec![LaneSums::default(); train.lanes as usize];
        let mut work = Work {
            train,
            tolerant: self.spec.skips(),
            data: self.data,
            engine: &mut self.engine,
            free: &mut self.free,
            hooks: &mut Found(&mut lanes),
        };
        let root = work.node(entry.step, tree.root())?;
        let root = root.expect("nothing is skipped");
        let mut totals = self.engine.install(|| totals_of(&root));
        if totals.hash != entry.root_hash {
            // Earlier versions also hashed the zeros of layers that are frozen for the whole run.
            let mut whole = root.to_vec();
            whole.resize(self.spec.layout().len(), 0.0);
            let of_whole = self.engine.install(|| totals_of(&whole));
            if of_whole.hash == entry.root_hash {
                totals = of_whole;
            }
        }
        let sum = |of: fn(&LaneSums) -> f64| tree.sum(&lanes.iter().map(of).collect::<Vec<_>>());
        let weight = sum(|l| l.weight);
        let found = Entry {
            loss_sum: sum(|l| l.loss),
            weight,
            grad_norm: totals.sum_of_squares.sqrt() / weight,
            root_hash: totals.hash,
            lanes,
            ..entry.clone()
        }
        .canonical();
        if let Some(difference) = difference(entry, &found) {
            return Ok(Some(difference));
        }
        if !entry.skipped {
            self.updates += 1;
            let update = Update {
                step: entry.step,
                count: self.updates,
                scale: gradient_scale(train, found.grad_norm, weight),
                learning_rate: entry.learning_rate,
            };
            self.engine.update(&root, update)?;
        }
        self.free.push(root);
        Ok(None)
    }
}

/// The first field that differs: lanes before their sums, as those follow from them.
fn difference(recorded: &Entry, found: &Entry) -> Option<String> {
    let float = |x: f64| format!("{x:?} (bits {:016x})", x.to_bits());
    let lanes = recorded.lanes.iter().zip(&found.lanes);
    for (lane, (r, f)) in lanes.enumerate() {
        for (what, r, f) in [("loss", r.loss, f.loss), ("weight", r.weight, f.weight)] {
            if r.to_bits() != f.to_bits() {
                let field = format!("{what} of lane {lane}");
                return Some(differs(&field, &float(r), &float(f)));
            }
        }
    }
    let difference = recorded.difference(found)?;
    Some(differs(
        difference.field,
        &difference.ours,
        &difference.theirs,
    ))
}

fn differs(field: &str, recorded: &str, found: &str) -> String {
    format!("was committed with the {field} {recorded}, and comes out as {found}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lane_that_differs_is_named_before_its_sum() {
        let lane = LaneSums {
            loss: 1.0,
            weight: 2.0,
        };
        let recorded = Entry {
            step: 3,
            first_position: 0,
            samples: 2,
            lanes: vec![lane; 2],
            loss_sum: 2.0,
            weight: 4.0,
            grad_norm: 1.0,
            learning_rate: 0.1,
            root_hash: [1; 32],
            state_hash_before: None,
            skipped: false,
            previous: [0; 32],
        };
        let mut found = recorded.clone();
        assert_eq!(difference(&recorded, &found), None);
        found.root_hash = [2; 32];
        assert!(
            difference(&recorded, &found)
                .unwrap()
                .contains("root_hash 0101")
        );
        found.loss_sum = 3.0;
        found.lanes[1].loss = 2.0;
        let text = difference(&recorded, &found).unwrap();
        assert!(text.contains("loss of lane 1 1.0 (bits"), "{text}");
    }
}
