//! The moments that this worker keeps, where they are divided among the workers: those of its own slice in memory, and those of
//! the slice that it is the second holder of in a file. The file has no name, and is gone with the process; what of it is in
//! memory is the system's cache, which gives it back when memory is short.

use std::fs::File;
use std::io::{Read, Result, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use cohort_common::checkpoint::{bytes_of, chunk_digest};
use cohort_common::cluster::{Digests, Keeper};
use cohort_common::layout::{CHUNK_LEN, chunk_count, chunk_range, chunks_range};
use rayon::prelude::*;

use crate::engine::{Engine, EngineError, Moments, State, Update};

/// Elements of the file that are in memory at a time: a whole number of chunks.
const WINDOW: usize = 16 * CHUNK_LEN;

/// The moments of two slices, or of none.
pub struct Kept {
    /// What others update.
    others: Vec<Range<usize>>,
    slices: Option<Slices>,
}

struct Slices {
    own: Range<usize>,
    moments: Moments,
    second: Range<usize>,
    file: MomentFile,
}

/// Why moments could not be updated.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The file.
    #[error(transparent)]
    File(#[from] std::io::Error),
}

/// The elements of the slices that a worker keeps, of a buffer of so many; none, or its own and the other.
pub fn elements(keeper: &Keeper, len: usize) -> Vec<Range<usize>> {
    let kept = keeper.kept().into_iter().flatten();
    kept.filter_map(|chunks| chunks_range(&chunks, len))
        .collect()
}

impl Kept {
    /// Keeps `moments`, which are those of [`elements`]; `directory` takes the file.
    pub fn new(
        keeper: &Keeper,
        len: usize,
        moments: Vec<Moments>,
        directory: &Path,
    ) -> Result<Self> {
        let kept = elements(keeper, len);
        let chunks = 0..chunk_count(len);
        let others = chunks.filter(|index| !keeper.keeps(*index as u32));
        let others = others.map(|index| chunk_range(index, len)).collect();
        let mut both = kept.into_iter().zip(moments);
        let slices = match (both.next(), both.next()) {
            (Some((own, moments)), Some((second, seconds))) => Some(Slices {
                own,
                moments,
                second,
                file: MomentFile::create(directory, &seconds)?,
            }),
            _ => None,
        };
        Ok(Self { others, slices })
    }

    /// Updates the parameters and moments that are kept by a root of all elements, of which only these count.
    pub fn update(
        &mut self,
        engine: &mut Engine,
        root: &[f32],
        update: Update,
    ) -> std::result::Result<(), KeptError> {
        let Some(slices) = &mut self.slices else {
            return Ok(());
        };
        let own = slices.own.clone();
        engine.update_slice(own.start, &mut slices.moments, &root[own], update)?;
        for window in windows(&slices.second) {
            let at = window.start - slices.second.start;
            let mut moments = slices.file.read(at..at + window.len())?;
            engine.update_slice(window.start, &mut moments, &root[window], update)?;
            slices.file.write(at, &moments)?;
        }
        Ok(())
    }

    /// What other workers update.
    pub fn others(&self) -> &[Range<usize>] {
        &self.others
    }

    /// The elements of this worker's own slice.
    pub fn own(&self) -> Option<Range<usize>> {
        self.slices.as_ref().map(|slices| slices.own.clone())
    }

    /// What this worker has of the state.
    pub fn digests(&mut self, engine: &Engine) -> Result<Digests> {
        let params = engine.params();
        let mut kept = Vec::new();
        if let Some(slices) = &mut self.slices {
            let (own, second) = (slices.own.clone(), slices.second.clone());
            kept.extend(engine.install(|| digest(&params[own], &slices.moments)));
            for window in windows(&second) {
                let at = window.start - second.start;
                let moments = slices.file.read(at..at + window.len())?;
                kept.extend(engine.install(|| digest(&params[window], &moments)));
            }
        }
        let all = engine.install(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update_rayon(bytes_of(params));
            hasher.finalize()
        });
        Ok(Digests {
            params: all.into(),
            kept,
        })
    }

    /// A copy of the state of a slice that is kept here; `None` of another.
    pub fn copy(&mut self, engine: &Engine, slice: &Range<usize>) -> Result<Option<State>> {
        let Some(slices) = &mut self.slices else {
            return Ok(None);
        };
        let moments = if *slice == slices.own {
            Moments {
                exp_avg: slices.moments.exp_avg.clone(),
                exp_avg_sq: slices.moments.exp_avg_sq.clone(),
            }
        } else if *slice == slices.second {
            slices.file.read(0..slice.len())?
        } else {
            return Ok(None);
        };
        Ok(Some(State {
            params: engine.params()[slice.clone()].to_vec(),
            exp_avg: moments.exp_avg,
            exp_avg_sq: moments.exp_avg_sq,
        }))
    }
}

/// Digests of the chunks of a stretch, which begins with one.
fn digest(params: &[f32], moments: &Moments) -> Vec<[u8; 32]> {
    let chunks = params
        .par_chunks(CHUNK_LEN)
        .zip(moments.exp_avg.par_chunks(CHUNK_LEN))
        .zip(moments.exp_avg_sq.par_chunks(CHUNK_LEN));
    chunks.map(|((p, m), v)| chunk_digest(p, m, v)).collect()
}

/// A slice, in parts that fit into memory.
fn windows(slice: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = slice.end;
    slice
        .clone()
        .step_by(WINDOW)
        .map(move |first| first..(first + WINDOW).min(end))
}

/// Moments in a file: all first ones, then all second ones.
struct MomentFile {
    file: File,
    len: usize,
}

impl MomentFile {
    fn create(directory: &Path, moments: &Moments) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        // Its space is given back when it is closed, however the process ends.
        let file = tempfile::tempfile_in(directory)?;
        let len = moments.exp_avg.len();
        let mut file = Self { file, len };
        file.write(0, moments)?;
        Ok(file)
    }

    fn seek(&mut self, element: usize) -> Result<()> {
        self.file
            .seek(SeekFrom::Start(4 * element as u64))
            .map(drop)
    }

    fn read(&mut self, part: Range<usize>) -> Result<Moments> {
        let mut moments = Moments::zeros(part.len());
        self.seek(part.start)?;
        self.file
            .read_exact(bytemuck::cast_slice_mut(&mut moments.exp_avg))?;
        self.seek(self.len + part.start)?;
        self.file
            .read_exact(bytemuck::cast_slice_mut(&mut moments.exp_avg_sq))?;
        Ok(moments)
    }

    fn write(&mut self, first: usize, moments: &Moments) -> Result<()> {
        self.seek(first)?;
        self.file.write_all(bytes_of(&moments.exp_avg))?;
        self.seek(self.len + first)?;
        self.file.write_all(bytes_of(&moments.exp_avg_sq))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cohort_common::checkpoint::state_hash;
    use cohort_common::cluster::Division;
    use cohort_common::ids::SessionId;
    use cohort_common::rng::philox;
    use cohort_common::spec::{Architecture, ModelConfig};

    use super::*;
    use crate::engine::DeviceChoice;
    use crate::engine::tests::{model, train};

    /// An engine of some chunks, and a gradient of each step.
    fn engine() -> (Engine, impl Fn(u32) -> Vec<f32>) {
        let model = ModelConfig {
            vocab_size: 6000,
            ..model(Architecture::Llama)
        };
        let engine = Engine::new(&model, Some(&train()), DeviceChoice::Cpu, 2);
        let mut engine = engine.expect("an engine");
        engine.init(3).expect("weights");
        let len = engine.params().len();
        assert!(chunk_count(len) > 4, "{len}");
        let gradient = move |step| {
            let value = |i| philox(5, [i, step, 0, 0])[0] as f32 / 1e9 - 2.0;
            (0..len as u32).map(value).collect()
        };
        (engine, gradient)
    }

    #[test]
    fn slices_are_updated_to_the_bits_of_the_whole() {
        let (mut whole, gradient) = engine();
        let len = whole.params().len();
        let sessions: BTreeSet<SessionId> = (1..=3).map(SessionId).collect();
        let chunks = chunk_count(len) as u32;
        let division = Division::among(&sessions, chunks, 64).expect("several chunks");
        let directory = tempfile::tempdir().expect("a directory");
        let mut workers: Vec<(SessionId, Engine, Kept)> = Vec::new();
        for session in sessions {
            let (mut engine, _) = engine();
            engine.give_moments_away();
            let keeper = Keeper {
                division: division.clone(),
                session,
            };
            let moments = elements(&keeper, len).into_iter();
            let moments = moments.map(|part| Moments::zeros(part.len())).collect();
            let kept = Kept::new(&keeper, len, moments, directory.path()).expect("a file");
            workers.push((session, engine, kept));
        }
        for step in 1..=3 {
            let root = gradient(step);
            let update = Update {
                step: u64::from(step),
                count: u64::from(step),
                scale: 0.5,
                learning_rate: 1e-3,
            };
            whole.update(&root, update).expect("an update");
            let mut sent = vec![0.0; len];
            for (_, engine, kept) in &mut workers {
                assert!(kept.update(engine, &root, update).is_ok());
                let own = kept.own().expect("a slice");
                sent[own.clone()].copy_from_slice(&engine.params()[own]);
            }
            for (_, engine, kept) in &mut workers {
                engine
                    .take_params(kept.others(), &sent)
                    .expect("parameters");
                assert!(engine.params() == whole.params());
            }
        }
        let digests = |(session, engine, kept): &mut (SessionId, Engine, Kept)| {
            (*session, kept.digests(engine).expect("the file"))
        };
        let votes = division.votes(&workers.iter_mut().map(digests).collect());
        let votes = votes.expect("of all chunks");
        let hash = whole.state_hash().expect("moments");
        assert!(votes.values().all(|vote| *vote == hash));
        // What they upload is the state.
        let mut state = State {
            params: Vec::new(),
            exp_avg: Vec::new(),
            exp_avg_sq: Vec::new(),
        };
        for (session, engine, kept) in &mut workers {
            let own = kept.own().expect("a slice");
            let copy = kept.copy(engine, &own).expect("the file").expect("a slice");
            state.params.extend(copy.params);
            state.exp_avg.extend(copy.exp_avg);
            state.exp_avg_sq.extend(copy.exp_avg_sq);
            assert!(
                kept.copy(engine, &(0..len)).expect("the file").is_none(),
                "{session}"
            );
        }
        let uploaded = state_hash(&state.params, &state.exp_avg, &state.exp_avg_sq);
        assert_eq!(uploaded, hash);
        assert_eq!(std::fs::read_dir(directory.path()).expect("it").count(), 0);
    }
}
