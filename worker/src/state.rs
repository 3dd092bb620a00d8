//! Gets the state that a run starts or goes on from: files over gRPC, verified by hash, read once and deleted.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use cohort_common::checkpoint::Checkpoint;
use cohort_common::cluster::StateSource;
use cohort_common::ids::RunId;
use cohort_common::spec::{RunKind, RunSpec};
use cohort_common::wire;

use crate::data::DataClient;
use crate::engine::{DeviceChoice, Engine, EngineError};

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
        let describe = |error: EngineError| error.to_string();
        let mut engine = Engine::new(&spec.model, train, device, threads).map_err(describe)?;
        match self {
            Self::Seed => engine.init(spec.train.seed).map_err(describe)?,
            Self::Files(files) => {
                let flat = files.read()?;
                let moments = flat.moments.as_ref().filter(|_| train.is_some());
                let moments = moments.map(|(m, v)| (m.as_slice(), v.as_slice()));
                engine.load(&flat.params, moments).map_err(describe)?;
            }
        }
        Ok(engine)
    }
}

/// A downloaded state.
pub struct TempState(PathBuf);

impl Drop for TempState {
    fn drop(&mut self) {
        // What stays behind is only a cache: the next download replaces it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Parameters and moments, flat.
pub struct Flat {
    /// Parameters.
    pub params: Vec<f32>,
    /// First and second moments, where there are any.
    pub moments: Option<(Vec<f32>, Vec<f32>)>,
}

impl TempState {
    /// Reads the state; blocks.
    pub fn read(&self) -> Result<Flat, String> {
        let read = || {
            let checkpoint = Checkpoint::open(&self.0)?;
            let params = checkpoint.weights()?.params;
            let moments = checkpoint.moments()?.map(|m| (m.exp_avg, m.exp_avg_sq));
            Ok::<_, cohort_common::checkpoint::CheckpointError>(Flat { params, moments })
        };
        read().map_err(|error| error.to_string())
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
