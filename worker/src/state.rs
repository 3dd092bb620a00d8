//! Gets the state that a run starts or goes on from: files over gRPC, verified by hash, read once and deleted.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use cohort_common::checkpoint::{Checkpoint, CheckpointError, Loaded};
use cohort_common::cluster::StateSource;
use cohort_common::ids::RunId;
use cohort_common::layout::TensorSpec;
use cohort_common::spec::{RunKind, RunSpec};
use cohort_common::wire;

use crate::data::DataClient;
use crate::engine::{DeviceChoice, Engine, EngineError, Moments};

/// Where the engine's state comes from.
pub enum Fetched {
    /// The spec's seed.
    Seed,
    /// A directory that is deleted when this is dropped.
    Files(TempState),
}

impl Fetched {
    /// An engine that holds this state; blocks.
    pub fn engine(
        &self,
        spec: &RunSpec,
        device: DeviceChoice,
        threads: usize,
    ) -> Result<Engine, String> {
        let train = (spec.kind != RunKind::Eval).then_some(&spec.train);
        let mut engine = self.params(spec, device, threads)?;
        if let Self::Files(files) = self {
            let moments = files.moments(|checkpoint| checkpoint.moments())?;
            if let Some(moments) = moments.filter(|_| train.is_some()) {
                engine.take_moments(moments.into()).map_err(describe)?;
            }
        }
        Ok(engine)
    }

    /// An engine with the parameters, and the moments of these stretches alone; blocks.
    pub fn divided(
        &self,
        spec: &RunSpec,
        device: DeviceChoice,
        threads: usize,
        stretches: &[Range<usize>],
    ) -> Result<(Engine, Vec<Moments>), String> {
        let mut engine = self.params(spec, device, threads)?;
        engine.give_moments_away();
        let found = match self {
            Self::Seed => None,
            Self::Files(files) => files.moments(|checkpoint| checkpoint.moments_of(stretches))?,
        };
        let moments = match found {
            Some(found) => found.into_iter().map(Moments::from).collect(),
            None => stretches.iter().map(|s| Moments::zeros(s.len())).collect(),
        };
        Ok((engine, moments))
    }

    /// An engine with the parameters, and moments of zero.
    fn params(
        &self,
        spec: &RunSpec,
        device: DeviceChoice,
        threads: usize,
    ) -> Result<Engine, String> {
        let train = (spec.kind != RunKind::Eval).then_some(&spec.train);
        let lora = spec.lora.as_ref();
        let engine = Engine::adapted(&spec.model, lora, train, device, threads);
        let mut engine = engine.map_err(describe)?;
        match self {
            Self::Seed => engine.init(spec.train.seed).map_err(describe)?,
            Self::Files(files) => {
                let loaded = files.read(spec)?;
                engine.load(&loaded.params, None).map_err(describe)?;
                if !loaded.missing.is_empty() {
                    let new = |t: &TensorSpec| loaded.missing.contains(&t.name);
                    engine.init_where(spec.train.seed, &new).map_err(describe)?;
                }
            }
        }
        Ok(engine)
    }
}

fn describe(error: EngineError) -> String {
    error.to_string()
}

/// A downloaded state.
pub struct TempState(PathBuf);

impl Drop for TempState {
    fn drop(&mut self) {
        // What stays behind is only a cache: the next download replaces it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl TempState {
    /// Reads the parameters; blocks. What is new in the run is missing at its start only.
    fn read(&self, spec: &RunSpec) -> Result<Loaded, String> {
        let read = || {
            let checkpoint = Checkpoint::open(&self.0)?;
            let loaded = checkpoint.load(&spec.model, spec.lora.as_ref())?;
            Ok::<_, CheckpointError>((loaded, checkpoint.has_moments()))
        };
        let (loaded, later) = read().map_err(|error| error.to_string())?;
        match (later, loaded.missing.first()) {
            (true, Some(name)) => Err(format!("the state has no tensor `{name}`")),
            _ => Ok(loaded),
        }
    }

    /// Reads moments; blocks.
    fn moments<T>(
        &self,
        read: impl FnOnce(&Checkpoint) -> Result<T, CheckpointError>,
    ) -> Result<T, String> {
        let read = Checkpoint::open(&self.0).and_then(|checkpoint| read(&checkpoint));
        read.map_err(|error| error.to_string())
    }
}

/// Downloads a state.
pub async fn fetch(
    client: &DataClient,
    cache: &Path,
    run: &RunId,
    source: StateSource,
) -> Result<Fetched, String> {
    if source == StateSource::Seed {
        return Ok(Fetched::Seed);
    }
    // Another fetch may still be under way, and deletes its own when it is given up.
    static FETCHES: AtomicU64 = AtomicU64::new(0);
    let number = FETCHES.fetch_add(1, Ordering::Relaxed);
    let directory = cache.join(format!("state-{run}-{}-{number}", std::process::id()));
    let state = TempState(directory.clone());
    let source = wire::source_to(run, source);
    client.state(source, &directory).await?;
    Ok(Fetched::Files(state))
}
