//! The audit of a run: reads its ledger and its checkpoints in full and looks for a contradiction. It computes no model
//! (a replay does, on a worker), changes nothing, and stops at nothing: the report has the first contradiction, and how
//! many there are.

mod checkpoints;
mod samples;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use cohort_common::api::AuditReport;
use cohort_common::checkpoint::hex;
use cohort_common::cluster::History;
use cohort_common::cluster::messages::LaneSums;
use cohort_common::corpus::order_of;
use cohort_common::home::{Home, RunName};
use cohort_common::ledger::{Chain, Entry};
use cohort_common::order::Mixture;
use cohort_common::schedule::learning_rate;
use cohort_common::spec::{RunKind, RunSpec};
use cohort_common::tree::Tree;

use crate::data::open_corpus;
use crate::plan::first_chain;
use crate::store::{RunRow, Store, StoreError};
use samples::Walk;

/// Entries and events that are read at once.
const PAGE: u32 = 512;

/// What to do about a ledger that contradicts itself.
const RESTORE: &str =
    "the database was changed or damaged; restore it from a backup, or train the run again";

/// What is kept of an entry that was read.
struct Known {
    hash: [u8; 32],
    state_hash_before: Option<[u8; 32]>,
}

/// An audit in the making.
struct Audit<'a> {
    store: &'a Store,
    home: &'a Home,
    run: &'a RunName,
    spec: RunSpec,
    /// Whether a coordinator may be working on the run meanwhile.
    live: bool,
    report: AuditReport,
    known: BTreeMap<u64, Known>,
    /// What the steps so far were like; `None` after one that cannot be read.
    history: Option<History>,
    /// Steps that were planned as part of another number of steps than the run has now. Read when it is needed.
    horizons: Option<BTreeMap<u64, u64>>,
}

/// Audits a run. `live` says that a coordinator may be working on it meanwhile. An error is one of reading at all; what
/// is wrong with the run is in the report.
pub fn audit(
    store: &Store,
    home: &Home,
    run: &RunName,
    live: bool,
) -> Result<AuditReport, StoreError> {
    let spec = store.run(run)?.spec;
    let mixture = match spec.kind {
        RunKind::Eval => Err("the run does not train".to_owned()),
        _ => mixture_of(home, &spec),
    };
    with_samples(store, home, run, live, mixture)
}

/// Which samples the run walks, and in which order.
fn mixture_of(home: &Home, spec: &RunSpec) -> Result<Mixture, String> {
    let order = |fingerprint: &str, share: Option<f64>| {
        let corpus = open_corpus(home, fingerprint);
        let corpus = corpus.map_err(|status| status.message().to_owned())?;
        let order = order_of(corpus.index(), spec.train.seed, spec.sample_length(), share);
        order.map_err(|error| error.to_string())
    };
    Mixture::of(spec, order)
}

/// What the samples are that a run takes from corpora besides its own.
fn others_of(spec: &RunSpec) -> Vec<String> {
    let mixed = spec.mixture.iter().flat_map(|mixture| &mixture.corpora);
    let mixed = mixed.map(|mixed| format!("of the corpus `{}`", mixed.name));
    let replayed = spec.replayed_corpus();
    mixed
        .chain(replayed.map(|_| "replayed from the base's corpus".to_owned()))
        .collect()
}

/// [`audit`], with the samples that the run walks, or why they are not known.
fn with_samples(
    store: &Store,
    home: &Home,
    run: &RunName,
    live: bool,
    mixture: Result<Mixture, String>,
) -> Result<AuditReport, StoreError> {
    // One moment of the database for all that is in it; files are looked at afterwards.
    store.hold()?;
    let row = store.run(run)?;
    let mut audit = Audit {
        store,
        home,
        run,
        spec: row.spec.clone(),
        live,
        report: AuditReport {
            run: run.to_string(),
            status: row.status.to_string(),
            step: row.step,
            lanes_per_step: u64::from(row.spec.train.lanes),
            ..AuditReport::default()
        },
        known: BTreeMap::new(),
        history: Some(History::default()),
        horizons: None,
    };
    let walk = match mixture {
        Ok(mixture) => Some(Walk::new(mixture)),
        Err(_) if row.spec.kind == RunKind::Eval => None,
        Err(reason) => {
            let note = format!("the order of the samples was not checked: {reason}");
            audit.report.notes.push(note);
            None
        }
    };
    audit.ledger(&row, walk)?;
    let rows = store.checkpoints(run)?;
    store.release()?;
    audit.checkpoints(rows)?;
    Ok(audit.report)
}

impl Audit<'_> {
    /// Takes a contradiction down.
    fn contradiction(&mut self, text: String) {
        self.report.contradictions += 1;
        self.report.contradiction.get_or_insert(text);
    }

    fn ledger(&mut self, row: &RunRow, mut walk: Option<Walk>) -> Result<(), StoreError> {
        let mut chain = first_chain(&self.spec);
        let mut next = 1;
        loop {
            let page = self.store.entries_one_by_one(self.run, next, PAGE)?;
            let full = page.len() == PAGE as usize;
            for (step, entry) in page {
                next = step.saturating_add(1);
                match entry {
                    Ok(entry) => self.entry(&entry, &mut chain, &mut walk)?,
                    Err(error) => {
                        self.history = None;
                        self.contradiction(format!("{error}; {RESTORE}"));
                    }
                }
            }
            if !full {
                break;
            }
        }
        self.report.head = hex::encode(&chain.head());
        if let Some(walk) = walk {
            walk.report(&others_of(&self.spec), &mut self.report);
        }
        let last = chain.next_step() - 1;
        if row.step != last {
            let (run, step) = (self.run, row.step);
            self.contradiction(format!(
                "run `{run}` has committed {step} steps by its row in the database, but its ledger ends with step {last}; {RESTORE}"
            ));
        }
        Ok(())
    }

    fn entry(
        &mut self,
        entry: &Entry,
        chain: &mut Chain,
        walk: &mut Option<Walk>,
    ) -> Result<(), StoreError> {
        self.report.entries += 1;
        self.report.lanes += entry.lanes.len() as u64;
        if let Err(error) = chain.push(entry) {
            self.contradiction(format!("{error}; {RESTORE}"));
            // What follows is compared with this entry: one break is one contradiction.
            *chain = Chain::after(entry);
        }
        self.known.insert(
            entry.step,
            Known {
                hash: entry.hash(),
                state_hash_before: entry.state_hash_before,
            },
        );
        let (step, expected) = (entry.step, self.spec.train.samples_per_step());
        if entry.samples != expected {
            let found = entry.samples;
            self.contradiction(format!(
                "step {step} consumed {found} samples, but the run's spec has {expected} in a step; {RESTORE}"
            ));
        } else if let Some(walk) = walk
            && let Err(error) = walk.consume(step, entry.first_position, entry.samples)
        {
            self.contradiction(format!("{error}; {RESTORE}"));
        }
        self.sums(entry);
        self.watch(entry);
        self.rate(entry)
    }

    /// The step's sums are those of its lanes, along the tree.
    fn sums(&mut self, entry: &Entry) {
        let (step, lanes) = (entry.step, self.spec.train.lanes);
        let found = entry.lanes.len();
        if found != lanes as usize {
            self.contradiction(format!(
                "the entry of step {step} has {found} lanes, but the run has {lanes}; {RESTORE}"
            ));
            return;
        }
        let tree = Tree::new(lanes);
        let sum =
            |of: fn(&LaneSums) -> f64| tree.sum(&entry.lanes.iter().map(of).collect::<Vec<_>>());
        for (field, recorded, summed) in [
            ("loss_sum", entry.loss_sum, sum(|l| l.loss)),
            ("weight", entry.weight, sum(|l| l.weight)),
        ] {
            // One NaN is as good as another.
            let same =
                recorded.to_bits() == summed.to_bits() || (recorded.is_nan() && summed.is_nan());
            if !same {
                self.contradiction(format!(
                    "step {step} has the {field} {}, but its lanes sum to {}; {RESTORE}",
                    float(recorded),
                    float(summed)
                ));
            }
        }
    }

    /// A step was committed without its update exactly where the watchdog says so, by the steps before it.
    fn watch(&mut self, entry: &Entry) {
        self.report.skipped += u64::from(entry.skipped);
        let watchdog = self.spec.watched().filter(|w| w.action.skips()).cloned();
        let (Some(history), step) = (&mut self.history, entry.step) else {
            return;
        };
        let judged = watchdog.as_ref().and_then(|w| history.judge(w, entry));
        if let Some(watchdog) = &watchdog {
            history.push(entry);
            history.forget(watchdog, step, step);
        }
        let text = match (entry.skipped, judged) {
            (true, None) => format!(
                "step {step} was committed without its update, but by the steps before it there is no reason for that; {RESTORE}"
            ),
            (false, Some(anomaly)) => format!(
                "{anomaly} by the run's spec, but the ledger says that it was made; {RESTORE}"
            ),
            _ => return,
        };
        self.contradiction(text);
    }

    /// The rate is the schedule's, for the number of steps that was planned when the step was committed.
    fn rate(&mut self, entry: &Entry) -> Result<(), StoreError> {
        let (step, found) = (entry.step, entry.learning_rate);
        if step == 0 {
            return Ok(());
        }
        let planned = learning_rate(&self.spec.train, step);
        if planned.to_bits() == found.to_bits() {
            return Ok(());
        }
        if let Some(&steps) = self.horizons()?.get(&step) {
            let mut train = self.spec.train.clone();
            train.steps = steps;
            if learning_rate(&train, step).to_bits() == found.to_bits() {
                self.report.earlier_horizon += 1;
                return Ok(());
            }
        }
        self.contradiction(format!(
            "step {step} was committed with the learning_rate {}, but the run's schedule has {}; {RESTORE}",
            float(found),
            float(planned)
        ));
        Ok(())
    }

    /// A run that went on to more steps than planned has earlier rates before; its metrics tell what was planned then.
    fn horizons(&mut self) -> Result<&BTreeMap<u64, u64>, StoreError> {
        if self.horizons.is_none() {
            self.horizons = Some(self.store.horizons(self.run)?);
        }
        Ok(self.horizons.get_or_insert_default())
    }
}

/// A float with its bits, as in the ledger's own messages.
fn float(x: f64) -> String {
    format!("{x:?} (bits {:016x})", x.to_bits())
}
