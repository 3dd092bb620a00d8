//! Plans that are kept in the home directory, one file for each run that was planned: `plans/IDENTITY.json`.
//!
//! A run is found again by its spec's identity. A plan that was made before the corpus was prepared has another one, as
//! neither corpus nor vocabulary were known: then the newest plan counts whose model and training are the run's.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cohort_common::spec::{Estimate, Plan, RunSpec, Speed};
use serde::{Deserialize, Serialize};

use crate::output::now_ms;

/// The directory below the home.
const DIRECTORY: &str = "plans";
/// The version of the file. Those of another version are passed over.
const VERSION: u32 = 1;

/// A plan as it is kept and printed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptPlan {
    version: u32,
    /// When it was made, in milliseconds since the epoch.
    pub made_ms: u64,
    /// What had to be assumed, in words.
    pub assumed: Vec<String>,
    /// What is to be done.
    #[serde(flatten)]
    pub plan: Plan,
    /// The speed of this machine; absent where it was not measured.
    pub measured: Option<Speed>,
    /// What the coordinator's link carries, in gigabits per second.
    pub bandwidth_gbit: f64,
    /// Times by number of workers; none where nothing was measured.
    pub estimates: Vec<Estimate>,
    /// The run's spec, as far as it is known.
    pub spec: RunSpec,
}

/// Gigabits per second in bytes per second.
const BYTES_PER_GIGABIT: f64 = 1e9 / 8.0;

impl KeptPlan {
    /// Puts a plan together.
    pub fn new(
        spec: RunSpec,
        plan: Plan,
        measured: Option<Speed>,
        bandwidth_gbit: f64,
        assumed: Vec<String>,
    ) -> Self {
        let mut kept = Self {
            version: VERSION,
            made_ms: now_ms(),
            assumed,
            plan,
            measured,
            bandwidth_gbit,
            estimates: Vec::new(),
            spec,
        };
        kept.estimates = kept.times(&kept.plan);
        kept
    }

    fn times(&self, plan: &Plan) -> Vec<Estimate> {
        let bandwidth = self.bandwidth_gbit * BYTES_PER_GIGABIT;
        let times = |speed: &Speed| plan.estimates(&self.spec, speed, bandwidth);
        self.measured.as_ref().map_or(Vec::new(), times)
    }

    /// The time on so many workers; `None` where nothing was measured.
    pub fn estimate(&self, workers: u32) -> Option<Estimate> {
        let plan = Plan::of(&self.spec, self.plan.corpus.clone(), &[workers]);
        self.times(&plan).pop()
    }

    /// Writes it into the home directory, in the place of an older one for the same run.
    pub fn keep(&self, home: &Path) -> Result<()> {
        let directory = home.join(DIRECTORY);
        let path = directory.join(format!("{}.json", self.spec.identity()));
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(&directory)?;
            let temporary = tempfile::NamedTempFile::new_in(&directory)?;
            std::fs::write(temporary.path(), serde_json::to_vec_pretty(self)?)?;
            temporary.persist(&path)?;
            Ok(())
        };
        write().with_context(|| {
            format!(
                "cannot keep the plan as `{}`; choose another home with `--home` or COHORT_HOME",
                path.display()
            )
        })
    }
}

/// The plan that was kept for a run of this spec, if there is one.
pub fn find(home: &Path, spec: &RunSpec) -> Option<KeptPlan> {
    let directory = home.join(DIRECTORY);
    let exact = directory.join(format!("{}.json", spec.identity()));
    if let Some(plan) = read(exact) {
        return Some(plan);
    }
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    files
        .filter_map(|file| read(file.path()))
        .filter(|kept| alike(&kept.spec, spec))
        .max_by_key(|kept| kept.made_ms)
}

/// What cannot be read is no plan.
fn read(path: PathBuf) -> Option<KeptPlan> {
    let json = std::fs::read(path).ok()?;
    let plan: KeptPlan = serde_json::from_slice(&json).ok()?;
    (plan.version == VERSION).then_some(plan)
}

/// Whether two specs differ at most in what a corpus decides, in where they start, and in how many workers they wait for.
fn alike(planned: &RunSpec, run: &RunSpec) -> bool {
    let mut other = planned.clone();
    other.model.vocab_size = run.model.vocab_size;
    other.model.labels.clone_from(&run.model.labels);
    other.train.min_workers = run.train.min_workers;
    let known = planned.corpus.is_empty() || planned.corpus == run.corpus;
    known
        && other.kind == run.kind
        && other.model == run.model
        && other.train == run.train
        && other.lora == run.lora
}

#[cfg(test)]
mod tests {
    use super::*;
    use cohort_common::spec::{CorpusFacts, Preset};

    fn spec(corpus: &str, vocab_size: usize, steps: u64) -> RunSpec {
        let source = Preset::find("tiny").and_then(|preset| preset.source());
        let meant = source.and_then(|source| source.into_file()?.validate());
        let facts = CorpusFacts {
            vocab_size,
            fingerprint: corpus.into(),
            labels: Vec::new(),
        };
        let mut spec = meant
            .and_then(|meant| meant.run_spec(facts, None))
            .expect("a spec");
        spec.train.steps = steps;
        spec
    }

    fn kept(spec: RunSpec) -> KeptPlan {
        let plan = Plan::of(&spec, None, &[1]);
        KeptPlan::new(spec, plan, None, 1.0, Vec::new())
    }

    #[test]
    fn a_run_finds_its_plan_by_identity_else_by_what_is_trained() {
        let home = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(find(home.path(), &spec("c", 300, 5)), None);
        let early = kept(spec("", 65, 5));
        early.keep(home.path()).expect("kept");
        assert_eq!(find(home.path(), &spec("c", 300, 5)), Some(early.clone()));
        assert_eq!(find(home.path(), &spec("c", 300, 6)), None);
        let exact = kept(spec("c", 300, 5));
        exact.keep(home.path()).expect("kept");
        let mut waits = spec("c", 300, 5);
        waits.train.min_workers = 3;
        assert_eq!(find(home.path(), &waits), Some(exact));
        assert_eq!(find(home.path(), &spec("d", 300, 5)), Some(early));
    }

    #[test]
    fn what_is_no_plan_is_passed_over() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let plan = kept(spec("c", 300, 5));
        plan.keep(home.path()).expect("kept");
        let file = std::fs::read_dir(home.path().join(DIRECTORY))
            .expect("the directory")
            .next();
        let file = file.expect("one file").expect("a file").path();
        std::fs::write(&file, "{}").expect("a file is written");
        assert_eq!(find(home.path(), &plan.spec), None);
    }
}
