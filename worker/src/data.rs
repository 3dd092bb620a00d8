//! A run's text on the worker: shards come when a lane needs them, from the coordinator's object store or over gRPC, are
//! verified, and stay on disk by content hash; the next ones are fetched ahead.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cohort_common::cluster::{EvalSplit, EvalWork, Prompt};
use cohort_common::corpus::{
    CorpusError, CorpusIndex, MappedShard, SampleReader, ShardEntry, ShardSource, Split, Window,
    order_of, verify_file,
};
use cohort_common::ids::{Lane, Step};
use cohort_common::net::Credentials;
use cohort_common::order::Mixture;
use cohort_common::spec::{RunKind, RunSpec, TrainConfig};
use cohort_common::wire::MAX_MESSAGE;
use cohort_proto::v1;
use cohort_proto::v1::data_client::DataClient as GrpcClient;
use tokio::runtime::Handle;
use tokio_stream::StreamExt;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::elsewhere::Elsewhere;
use crate::engine::Batch;
use crate::figures::{Doing, Meter};

/// Steps that shards are fetched ahead of their use.
const AHEAD: Step = 16;

/// Shards that stay mapped.
const MAPPED: usize = 16;

/// The connection for bulk data. Cheap to clone.
#[derive(Clone)]
pub struct DataClient {
    inner: Inner,
    elsewhere: Arc<Elsewhere>,
    runtime: Handle,
}

/// The service behind it.
pub(crate) type Inner = GrpcClient<InterceptedService<Channel, Credentials>>;

impl DataClient {
    /// Over this connection, from this runtime.
    pub fn new(channel: Channel, credentials: Credentials) -> Self {
        let inner = GrpcClient::with_interceptor(channel, credentials)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        Self {
            inner,
            elsewhere: Arc::default(),
            runtime: Handle::current(),
        }
    }

    /// The runtime that this connection lives on.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    async fn corpus(&self, fingerprint: &str) -> Result<CorpusIndex, String> {
        let request = v1::CorpusRequest {
            fingerprint: fingerprint.into(),
        };
        let reply = self.inner.clone().corpus(request).await.map_err(text)?;
        let index = CorpusIndex::from_json(&reply.into_inner().index);
        index.map_err(|error| error.to_string())
    }

    /// Downloads all files of a state and checks their hashes.
    pub async fn state(&self, source: v1::StateSource, directory: &Path) -> Result<(), String> {
        let mut client = self.inner.clone();
        let listed = client.state_files(source.clone()).await.map_err(text)?;
        let describe = |error: std::io::Error| format!("{}: {error}", directory.display());
        std::fs::create_dir_all(directory).map_err(describe)?;
        for info in listed.into_inner().files {
            if !cohort_common::checkpoint::is_plain_name(&info.name) {
                return Err(format!("`{}` is no file name", info.name));
            }
            let path = directory.join(&info.name);
            let request = v1::StateFileRequest {
                source: Some(source.clone()),
                name: info.name.clone(),
            };
            let pieces = client.state_file(request).await.map_err(text)?;
            let hash = save(pieces.into_inner(), &path).await?;
            if hash != info.hash {
                return Err(format!(
                    "`{}` arrived with the hash {hash}, not {}",
                    info.name, info.hash
                ));
            }
        }
        Ok(())
    }

    /// Uploads a snapshot.
    pub async fn upload(
        &self,
        pieces: impl tokio_stream::Stream<Item = v1::StatePiece> + Send + 'static,
    ) -> Result<(), String> {
        let sent = self.inner.clone().upload_state(pieces).await;
        sent.map(|_| ()).map_err(text)
    }
}

fn text(status: Status) -> String {
    status.message().to_owned()
}

/// Writes a stream of pieces to a file and returns their hash.
async fn save(mut pieces: Streaming<v1::Piece>, path: &Path) -> Result<String, String> {
    let describe = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut file = File::create(path).map_err(describe)?;
    let mut hasher = blake3::Hasher::new();
    while let Some(piece) = pieces.next().await {
        let data = piece.map_err(text)?.data;
        hasher.update(&data);
        file.write_all(&data).map_err(describe)?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The shards of one side of a corpus, wherever they are.
struct CachedShards {
    client: DataClient,
    cache: PathBuf,
    fingerprint: String,
    split: Split,
    entries: Vec<ShardEntry>,
    mapped: Mutex<HashMap<usize, Slot>>,
}

/// A shard that is mapped, or that one thread is getting while others wait.
type Slot = Arc<Mutex<Option<Arc<MappedShard>>>>;

impl ShardSource for CachedShards {
    fn shard(&self, index: usize) -> Result<Arc<MappedShard>, CorpusError> {
        let slot = {
            let mut mapped = self.mapped.lock().expect("no panic under this lock");
            if mapped.len() > MAPPED {
                // Mapping again is cheap, so there is no need to find out which were used last.
                mapped.retain(|held, slot| *held == index || Arc::strong_count(slot) > 1);
            }
            mapped.entry(index).or_default().clone()
        };
        let mut slot = slot.lock().expect("no panic under this lock");
        if let Some(shard) = &*slot {
            return Ok(shard.clone());
        }
        let entry = &self.entries[index];
        let path = self.cache.join(format!("{}.shard", entry.hash));
        // Read whole once per mapping: a cache that lies would change the result without a sound.
        let sound = path.exists()
            && match verify_file(&path, entry) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(%error, "fetching this shard again");
                    false
                }
            };
        if !sound {
            self.download(index, entry, &path)?;
        }
        let shard = Arc::new(MappedShard::open(&path, entry)?);
        *slot = Some(shard.clone());
        Ok(shard)
    }
}

impl CachedShards {
    /// Fetches a shard; blocks. It appears under its name only when its hash is right.
    fn download(&self, index: usize, entry: &ShardEntry, path: &Path) -> Result<(), CorpusError> {
        // Others may fetch the same shard to the same cache: from other containers even as a process of the same number.
        let random = RandomState::new().build_hasher().finish();
        let part = path.with_extension(format!("part-{random:016x}"));
        let request = v1::ShardRequest {
            fingerprint: self.fingerprint.clone(),
            split: self.split.name().into(),
            index: index as u32,
        };
        let mut client = self.client.inner.clone();
        let elsewhere = &self.client.elsewhere;
        let found = elsewhere.fetch(&mut client, &request, &part, entry.bytes);
        if self.client.runtime.block_on(found) {
            match verify_file(&part, entry) {
                Ok(()) => return publish(&part, path),
                Err(error) => {
                    tracing::warn!(%error, "the store gave another shard; the coordinator is asked for it")
                }
            }
        }
        let fetched = self.client.runtime.block_on(async {
            let pieces = client.shard(request).await.map_err(text)?;
            save(pieces.into_inner(), &part).await
        });
        let broken = |reason: String| CorpusError::Damaged {
            path: path.to_owned(),
            reason,
        };
        fetched.map_err(|error| broken(format!("it cannot be fetched: {error}")))?;
        verify_file(&part, entry)?;
        publish(&part, path)
    }
}

/// Gives a shard its name.
fn publish(part: &Path, path: &Path) -> Result<(), CorpusError> {
    std::fs::rename(part, path).map_err(|error| CorpusError::Damaged {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// Everything a run reads.
pub struct RunData {
    train: Option<Train>,
    splits: Vec<EvalData>,
    context: usize,
    /// Waiting for text is told apart from computing.
    meter: Arc<Meter>,
}

/// What a split is made of.
enum EvalData {
    Text(EvalReader),
    Prompts(Vec<Prompt>, Vec<u32>),
}

/// What is to be done with a unit.
pub enum Unit<'a> {
    /// These batches are scored.
    Score(Vec<Batch>),
    /// The model writes after a prompt, up to one of these tokens.
    Write(&'a Prompt, &'a [u32]),
}

struct Train {
    mixture: Mixture,
    /// Where the samples of each corpus lie.
    texts: Vec<Text>,
}

/// One side of a corpus.
struct Text {
    reader: SampleReader,
    shards: Arc<CachedShards>,
}

struct EvalReader {
    reader: SampleReader,
    windows: u64,
    per_unit: u64,
}

impl RunData {
    /// Gets the indices of a run's corpora. Shards come later.
    pub async fn open(
        client: &DataClient,
        cache: &Path,
        spec: &RunSpec,
        splits: &[EvalSplit],
        meter: Arc<Meter>,
    ) -> Result<Self, String> {
        let cache = cache.join("shards");
        std::fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;
        let mut indices = HashMap::new();
        let scored = splits.iter().filter_map(|split| match &split.work {
            EvalWork::Score { corpus, .. } => Some(corpus.as_str()),
            EvalWork::Write { .. } => None,
        });
        for fingerprint in scored.chain(spec.training_corpora()) {
            if !indices.contains_key(fingerprint) {
                indices.insert(fingerprint.to_owned(), client.corpus(fingerprint).await?);
            }
        }
        let open = |fingerprint: &str, split: Split| {
            let index = &indices[fingerprint];
            let side = index.split(split);
            let shards = Arc::new(CachedShards {
                client: client.clone(),
                cache: cache.clone(),
                fingerprint: fingerprint.into(),
                split,
                entries: side.shards.clone(),
                mapped: Mutex::default(),
            });
            (SampleReader::new(split, index, shards.clone()), shards)
        };
        let context = spec.sample_length();
        let train = match spec.kind {
            RunKind::Eval => None,
            _ => {
                let order = |fingerprint: &str, share: Option<f64>| {
                    let index = &indices[fingerprint];
                    let order = order_of(index, spec.train.seed, context, share);
                    order.map_err(|error| error.to_string())
                };
                let text = |fingerprint: &str| {
                    let (reader, shards) = open(fingerprint, Split::Train);
                    Text { reader, shards }
                };
                Some(Train {
                    mixture: Mixture::of(spec, order)?,
                    texts: spec.training_corpora().into_iter().map(text).collect(),
                })
            }
        };
        let splits = splits.iter().map(|s| match &s.work {
            EvalWork::Write { prompts, ends } => {
                Ok(EvalData::Prompts(prompts.clone(), ends.clone()))
            }
            EvalWork::Score {
                corpus,
                split: name,
                windows,
            } => {
                let split = Split::ALL.into_iter().find(|x| x.name() == name);
                let split = split.ok_or_else(|| format!("`{name}` is no split"))?;
                let (reader, _) = open(corpus, split);
                let all = reader.windows(context);
                Ok(EvalData::Text(EvalReader {
                    windows: match spec.train.eval_samples {
                        0 => all,
                        bound => all.min(bound),
                    },
                    per_unit: u64::from(*windows),
                    reader,
                }))
            }
        });
        Ok(Self {
            train,
            splits: splits.collect::<Result<_, String>>()?,
            context,
            meter,
        })
    }

    /// The micro-batches of a lane in a step, in order, each with the samples in it.
    pub fn lane(
        &self,
        train: &TrainConfig,
        step: Step,
        lane: Lane,
    ) -> Result<Vec<(Batch, Vec<u64>)>, String> {
        self.meter
            .during(Doing::Text, || self.read_lane(train, step, lane))
    }

    fn read_lane(
        &self,
        train: &TrainConfig,
        step: Step,
        lane: Lane,
    ) -> Result<Vec<(Batch, Vec<u64>)>, String> {
        let data = self.train.as_ref().ok_or("this run does not train")?;
        let positions: Vec<u64> = data.mixture.positions(step - 1, lane, train).collect();
        positions
            .chunks(train.micro_batch as usize)
            .map(|positions| {
                let mut batch = Batch {
                    length: self.context,
                    ..Batch::default()
                };
                let mut samples = Vec::with_capacity(positions.len());
                for &position in positions {
                    let (corpus, at) = data.mixture.sample(position);
                    let window = data.texts[corpus].reader.sample(at.index, self.context);
                    append(&mut batch, window.map_err(|error| error.to_string())?);
                    samples.push(at.index);
                }
                Ok((batch, samples))
            })
            .collect()
    }

    /// Fetches the shards that a lane needs some steps later, in the background.
    pub fn prefetch(&self, train: &TrainConfig, step: Step, lane: Lane) {
        let Some(data) = &self.train else { return };
        let later = data.mixture.positions(step - 1 + AHEAD, lane, train).start;
        let (corpus, at) = data.mixture.sample(later);
        let Text { reader, shards } = &data.texts[corpus];
        for index in reader.shards_for(reader.range(at.index, self.context)) {
            let entry = &shards.entries[index];
            let here = shards.cache.join(format!("{}.shard", entry.hash));
            if !here.exists() {
                let source = shards.clone();
                // An error shows up again when the shard is needed.
                let fetch = move || drop(source.shard(index));
                shards.client.runtime.spawn_blocking(fetch);
            }
        }
    }

    /// What is to be done with a unit of a split.
    pub fn unit(&self, split: u32, unit: u32) -> Result<Unit<'_>, String> {
        match self.splits.get(split as usize) {
            Some(EvalData::Text(text)) => {
                let read = || self.windows(text, unit).map(Unit::Score);
                self.meter.during(Doing::Text, read)
            }
            Some(EvalData::Prompts(prompts, ends)) => match prompts.get(unit as usize) {
                Some(prompt) => Ok(Unit::Write(prompt, ends)),
                None => Err(format!("split {split} has no prompt {unit}")),
            },
            None => Err(format!("there is no split {split}")),
        }
    }

    /// The windows of a unit as batches: full windows together, a short last one by itself.
    fn windows(&self, data: &EvalReader, unit: u32) -> Result<Vec<Batch>, String> {
        let first = u64::from(unit) * data.per_unit;
        let last = (first + data.per_unit).min(data.windows);
        let mut batches: Vec<Batch> = Vec::new();
        for index in first..last {
            let window = data.reader.window(index, self.context);
            let window = window.map_err(|error| error.to_string())?;
            let length = window.inputs.len();
            match batches.last_mut().filter(|b| b.length == length) {
                Some(batch) => append(batch, window),
                None => {
                    let mut batch = Batch {
                        length,
                        ..Batch::default()
                    };
                    append(&mut batch, window);
                    batches.push(batch);
                }
            }
        }
        Ok(batches)
    }
}

/// One more sample. Where one is cut into segments, those that are not are one segment each.
fn append(batch: &mut Batch, window: Window) {
    if !window.starts.is_empty() || !batch.starts.is_empty() {
        batch.starts.resize(batch.inputs.len(), 0);
        let whole = vec![0; window.inputs.len()];
        let cut = !window.starts.is_empty();
        batch
            .starts
            .extend(if cut { &window.starts } else { &whole });
    }
    batch.inputs.extend(window.inputs);
    batch.targets.extend(window.targets);
    batch.weights.extend(window.weights);
    batch.samples += 1;
}
