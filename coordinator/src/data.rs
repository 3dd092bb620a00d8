//! Bulk data: corpora and states to workers and clients, snapshots and files from them. Files are read and written
//! on blocking threads; memory holds a few pieces of each transfer.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cohort_common::api::CheckpointInfo;
use cohort_common::checkpoint::{
    CheckpointError, CheckpointMeta, CheckpointWriter, Manifested, hex,
};
use cohort_common::cluster::{Event, StateSource};
use cohort_common::corpus::{Corpus, ShardEntry, Split};
use cohort_common::exchange::session_of;
use cohort_common::home::{Home, RunName};
use cohort_common::ids::RunId;
use cohort_common::net::Peer;
use cohort_common::wire::{self, MAX_PIECE};
use cohort_proto::v1;
use cohort_proto::v1::data_server::Data;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::driver::{Cluster, Command};
use crate::record::CheckpointDone;
use crate::slices::{self, Slice, Slices};
use crate::status::{chain, failed, invalid};

/// Pieces that wait for a slow receiver or a slow disk.
const PIECES: usize = 4;

/// Files in one question.
const MAX_FILES: usize = 100_000;

/// Bytes that come back to whoever measures a connection, at most.
const MAX_ECHO: usize = 64 << 20;

/// Serves [`Data`].
pub struct DataService {
    /// The cluster.
    pub cluster: Cluster,
    /// Slices of states.
    pub slices: Arc<Slices>,
}

type PieceStream = ReceiverStream<Result<v1::Piece, Status>>;

#[tonic::async_trait]
impl Data for DataService {
    async fn corpus(
        &self,
        request: Request<v1::CorpusRequest>,
    ) -> Result<Response<v1::CorpusReply>, Status> {
        let fingerprint = request.into_inner().fingerprint;
        let home = self.cluster.home().clone();
        blocking(move || {
            let corpus = open_corpus(&home, &fingerprint)?;
            Ok(Response::new(v1::CorpusReply {
                index: corpus.index().to_json().into(),
                tokenizer: corpus.tokenizer_json().map_err(failed)?.into(),
            }))
        })
        .await
    }

    type ShardStream = PieceStream;

    async fn shard(
        &self,
        request: Request<v1::ShardRequest>,
    ) -> Result<Response<PieceStream>, Status> {
        let request = request.into_inner();
        let home = self.cluster.home().clone();
        let path = blocking(move || {
            let corpus = open_corpus(&home, &request.fingerprint)?;
            Ok(corpus.shard_path(&shard_entry(&corpus, &request)?.file))
        })
        .await?;
        Ok(Response::new(send_file(path)))
    }

    async fn shard_place(
        &self,
        request: Request<v1::ShardRequest>,
    ) -> Result<Response<v1::Place>, Status> {
        let peer = request.extensions().get::<Peer>();
        let address = peer.and_then(|peer| peer.address);
        let near = address.is_some_and(|address| address.ip().to_canonical().is_loopback());
        let request = request.into_inner();
        let url = match self.cluster.remote() {
            // To a worker of this machine the coordinator's disk is nearer.
            Some(remote) if !near => {
                let home = self.cluster.home().clone();
                let fingerprint = request.fingerprint.clone();
                let hash = blocking(move || {
                    let corpus = open_corpus(&home, &request.fingerprint)?;
                    Ok(shard_entry(&corpus, &request)?.hash.clone())
                });
                remote.place(&fingerprint, &hash.await?).await
            }
            _ => None,
        };
        let url = url.unwrap_or_default();
        Ok(Response::new(v1::Place { url }))
    }

    async fn state_files(
        &self,
        request: Request<v1::StateSource>,
    ) -> Result<Response<v1::FileList>, Status> {
        let directory = self.state_directory(&request.into_inner())?;
        let files = blocking(move || list_files(&directory)).await?;
        Ok(Response::new(v1::FileList { files }))
    }

    type StateFileStream = PieceStream;

    async fn state_file(
        &self,
        request: Request<v1::StateFileRequest>,
    ) -> Result<Response<PieceStream>, Status> {
        let request = request.into_inner();
        let source = request
            .source
            .ok_or_else(|| invalid("no source is named"))?;
        let directory = self.state_directory(&source)?;
        if !cohort_common::checkpoint::is_plain_name(&request.name) {
            return Err(invalid(format!("`{}` is no file name", request.name)));
        }
        Ok(Response::new(send_file(directory.join(request.name))))
    }

    async fn upload_state(
        &self,
        request: Request<Streaming<v1::StatePiece>>,
    ) -> Result<Response<v1::Empty>, Status> {
        // Only that the session exists matters here: a snapshot of a worker that is lost meanwhile is still good.
        session_of(&self.cluster, request.metadata())?;
        let mut incoming = request.into_inner();
        let first = incoming.next().await.transpose()?.and_then(|p| p.kind);
        let Some(v1::state_piece::Kind::Header(header)) = first else {
            return Err(invalid("the first message must be the header"));
        };
        let run = wire::run_id(&header.run).map_err(invalid)?;
        let step = header.step;
        let written = match header.below {
            0 => self.write_checkpoint(&run, step, incoming).await.map(Some),
            below => {
                let chunks = header.first..below;
                self.write_slice(&run, step, chunks, incoming).await
            }
        };
        match written {
            // Others are still to come.
            Ok(None) => Ok(Response::new(v1::Empty {})),
            Ok(Some((info, state_hash))) => {
                let done = CheckpointDone {
                    run,
                    info,
                    state_hash,
                };
                let done = Command::CheckpointDone(Box::new(done));
                self.cluster.command(done).await;
                Ok(Response::new(v1::Empty {}))
            }
            Err(WriteError::Stream(status)) => {
                self.cluster.send(Event::CheckpointLost { run, step }).await;
                Err(status)
            }
            Err(WriteError::Disk(error)) => {
                let status = Status::internal(error.clone());
                let event = Event::CheckpointFailed { run, step, error };
                self.cluster.send(event).await;
                Err(status)
            }
        }
    }

    async fn missing_files(
        &self,
        request: Request<v1::MissingRequest>,
    ) -> Result<Response<v1::MissingReply>, Status> {
        let hashes = request.into_inner().hashes;
        if hashes.len() > MAX_FILES {
            let count = hashes.len();
            return Err(invalid(format!(
                "{count} files in one question; at most {MAX_FILES}"
            )));
        }
        let home = self.cluster.home().clone();
        blocking(move || {
            let mut files = Vec::new();
            for hash in hashes {
                let path = stored_file(&home, &hash)?;
                if !path.exists() {
                    let offset = partial(&path).metadata().map_or(0, |m| m.len());
                    files.push(v1::MissingFile { hash, offset });
                }
            }
            Ok(Response::new(v1::MissingReply { files }))
        })
        .await
    }

    async fn upload_file(
        &self,
        request: Request<Streaming<v1::FilePiece>>,
    ) -> Result<Response<v1::Empty>, Status> {
        let mut incoming = request.into_inner();
        let first = incoming.next().await.transpose()?.and_then(|p| p.kind);
        let Some(v1::file_piece::Kind::Header(header)) = first else {
            return Err(invalid("the first message must be the header"));
        };
        let path = stored_file(self.cluster.home(), &header.hash)?;
        let (pieces, mut received) = mpsc::channel::<bytes::Bytes>(PIECES);
        let writer = tokio::task::spawn_blocking(move || {
            store_file(&path, &header, || received.blocking_recv())
        });
        while let Some(piece) = incoming.next().await {
            let Some(v1::file_piece::Kind::Data(data)) = piece?.kind else {
                return Err(invalid("a second header"));
            };
            if pieces.send(data).await.is_err() {
                break;
            }
        }
        drop(pieces);
        writer.await.map_err(failed)??;
        Ok(Response::new(v1::Empty {}))
    }

    type EchoStream = PieceStream;

    async fn echo(
        &self,
        request: Request<Streaming<v1::Piece>>,
    ) -> Result<Response<PieceStream>, Status> {
        let mut incoming = request.into_inner();
        let (out, outgoing) = mpsc::channel(PIECES);
        tokio::spawn(async move {
            let mut left = MAX_ECHO;
            while let Some(Ok(piece)) = incoming.next().await {
                let Some(rest) = left.checked_sub(piece.data.len()) else {
                    let most = MAX_ECHO >> 20;
                    let refusal = invalid(format!("an echo has at most {most} MiB"));
                    // Nobody reads it where the connection is gone.
                    let _ = out.send(Err(refusal)).await;
                    return;
                };
                left = rest;
                if out.send(Ok(piece)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

enum WriteError {
    /// The worker went away or sent nonsense: another can be asked.
    Stream(Status),
    /// The checkpoint cannot be written.
    Disk(String),
}

impl DataService {
    fn state_directory(&self, source: &v1::StateSource) -> Result<PathBuf, Status> {
        let (run, source) = wire::source_from(source).map_err(invalid)?;
        let name = RunName::new(run.as_str()).map_err(invalid)?;
        match source {
            StateSource::Seed | StateSource::Held(_) => Err(invalid("that state has no files")),
            StateSource::Start => Ok(start_directory(self.cluster.home(), &name)),
            StateSource::Checkpoint(step) => Ok(self.cluster.home().checkpoint(&name, step)),
        }
    }

    async fn write_checkpoint(
        &self,
        run: &RunId,
        step: u64,
        mut incoming: Streaming<v1::StatePiece>,
    ) -> Result<(CheckpointInfo, [u8; 32]), WriteError> {
        let meta = self.meta(run, step).await.map_err(WriteError::Stream)?;
        let val_loss = meta.run.val_loss;
        let name = RunName::new(run.as_str()).expect("checked on arrival");
        let target = self.cluster.home().checkpoint(&name, step);
        let (pieces, mut received) = mpsc::channel::<Option<bytes::Bytes>>(PIECES);
        let writer = tokio::task::spawn_blocking(move || {
            let mut writer = CheckpointWriter::create(&target, meta)?;
            while let Some(piece) = received.blocking_recv() {
                match piece {
                    Some(data) => writer.write(&data)?,
                    None => return writer.finish(None).map(Some),
                }
            }
            // The stream broke: dropping the writer leaves nothing behind.
            Ok(None)
        });
        while let Some(data) = next_piece(&mut incoming).await? {
            if pieces.send(Some(data)).await.is_err() {
                break;
            }
        }
        let _ = pieces.send(None).await;
        drop(pieces);
        let broken = |error: String| WriteError::Disk(error);
        let written: Result<_, CheckpointError> =
            writer.await.map_err(|e| broken(e.to_string()))?;
        let done = written.map_err(|e| broken(chain(&e)))?;
        let done = done.ok_or_else(|| broken("the upload ended early".into()))?;
        Ok(info_of(&done, step, val_loss))
    }

    /// Takes in a slice of a state. Once no other is missing, the state is written.
    async fn write_slice(
        &self,
        run: &RunId,
        step: u64,
        chunks: Range<u32>,
        mut incoming: Streaming<v1::StatePiece>,
    ) -> Result<Option<(CheckpointInfo, [u8; 32])>, WriteError> {
        let meta = self.meta(run, step).await.map_err(WriteError::Stream)?;
        let val_loss = meta.run.val_loss;
        let len = meta.run.spec.layout().len();
        let directory = self.cluster.home().runs();
        let disk = |error: std::io::Error| {
            let at = self.cluster.home().runs();
            WriteError::Disk(format!("{}: {error}", at.display()))
        };
        let slice = Slice::create((run, step), chunks.clone(), len, &directory).map_err(disk)?;
        let none = || WriteError::Stream(invalid(format!("no state has the chunks {chunks:?}")));
        let mut slice = slice.ok_or_else(none)?;
        let (pieces, mut received) = mpsc::channel::<bytes::Bytes>(PIECES);
        let writer = tokio::task::spawn_blocking(move || {
            while let Some(data) = received.blocking_recv() {
                slice.write(&data)?;
            }
            Ok(slice.is_complete().then_some(slice))
        });
        while let Some(data) = next_piece(&mut incoming).await? {
            if pieces.send(data).await.is_err() {
                break;
            }
        }
        drop(pieces);
        let broken = |error: String| WriteError::Disk(error);
        let slice = writer.await.map_err(|e| broken(e.to_string()))?;
        let slice = slice.map_err(disk)?;
        let early = || WriteError::Stream(invalid("a slice has another size"));
        let Some(mut all) = self.slices.add(slice.ok_or_else(early)?, len) else {
            return Ok(None);
        };
        let name = RunName::new(run.as_str()).expect("checked on arrival");
        let target = self.cluster.home().checkpoint(&name, step);
        let writing = tokio::task::spawn_blocking(move || {
            let mut writer = CheckpointWriter::create(&target, meta).map_err(|e| chain(&e))?;
            slices::read_all(&mut all, |bytes| {
                writer.write(bytes).map_err(std::io::Error::other)
            })
            .map_err(|e| chain(&e))?;
            writer.finish(None).map_err(|e| chain(&e))
        });
        let done = writing.await.map_err(|e| broken(e.to_string()))?;
        Ok(Some(info_of(&done.map_err(broken)?, step, val_loss)))
    }

    async fn meta(&self, run: &RunId, step: u64) -> Result<CheckpointMeta, Status> {
        let ask = |reply| Command::CheckpointMeta {
            run: run.clone(),
            step,
            reply,
        };
        let meta = self.cluster.ask(ask).await?;
        let mut meta = meta.ok_or_else(|| Status::failed_precondition("the run has ended"))?;
        let name = RunName::new(run.as_str()).map_err(invalid)?;
        let written = crate::ledger::through(&self.cluster, &name, step).await?;
        meta.run.ledger_head = written.head;
        meta.ledger = written.lines;
        Ok(meta)
    }
}

/// The next piece of a state; `None` at its end.
async fn next_piece(
    incoming: &mut Streaming<v1::StatePiece>,
) -> Result<Option<bytes::Bytes>, WriteError> {
    let Some(piece) = incoming.next().await else {
        return Ok(None);
    };
    match piece.map_err(WriteError::Stream)?.kind {
        Some(v1::state_piece::Kind::Data(data)) => Ok(Some(data)),
        _ => Err(WriteError::Stream(invalid("a second header"))),
    }
}

/// What is known of a checkpoint that is on disk.
fn info_of(done: &Manifested, step: u64, val_loss: Option<f64>) -> (CheckpointInfo, [u8; 32]) {
    let state_hash = done.manifest.state_hash;
    let info = CheckpointInfo {
        step,
        path: done.path.display().to_string(),
        bytes: done.manifest.bytes(),
        val_loss,
        state_hash: hex::encode(&state_hash),
    };
    (info, state_hash)
}

/// Where the weights that a run starts from lie.
pub fn start_directory(home: &Home, run: &RunName) -> PathBuf {
    home.run(run).join("start")
}

/// Opens a corpus by its whole fingerprint.
pub fn open_corpus(home: &Home, fingerprint: &str) -> Result<Corpus, Status> {
    let hexadecimal = fingerprint.bytes().all(|b| b.is_ascii_hexdigit());
    if !hexadecimal || fingerprint.is_empty() {
        return Err(invalid(format!("`{fingerprint}` is no fingerprint")));
    }
    Corpus::open(&home.corpora().join(fingerprint)).map_err(failed)
}

/// What the index says of a shard.
fn shard_entry<'a>(
    corpus: &'a Corpus,
    request: &v1::ShardRequest,
) -> Result<&'a ShardEntry, Status> {
    let split = Split::ALL
        .into_iter()
        .find(|s| s.name() == request.split)
        .ok_or_else(|| invalid(format!("`{}` is no split", request.split)))?;
    let shards = &corpus.index().split(split).shards;
    shards.get(request.index as usize).ok_or_else(|| {
        let (index, count) = (request.index, shards.len());
        invalid(format!("shard {index} of {count} does not exist"))
    })
}

/// Where a file of the content store lies.
pub fn stored_file(home: &Home, hash: &str) -> Result<PathBuf, Status> {
    let hash = hex::decode(hash).ok_or_else(|| invalid(format!("`{hash}` is no BLAKE3 hash")))?;
    Ok(home.file(&hash))
}

fn partial(path: &Path) -> PathBuf {
    path.with_extension("part")
}

/// Runs file work on a blocking thread.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

fn list_files(directory: &Path) -> Result<Vec<v1::FileInfo>, Status> {
    let mut files = Vec::new();
    let entries = std::fs::read_dir(directory)
        .map_err(|error| failed(format!("{}: {error}", directory.display())))?;
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !cohort_common::checkpoint::is_plain_name(&name) {
            continue;
        }
        let mut hasher = blake3::Hasher::new();
        let file = File::open(entry.path()).map_err(failed)?;
        hasher.update_reader(file).map_err(failed)?;
        files.push(v1::FileInfo {
            name,
            bytes: entry.metadata().map_err(failed)?.len(),
            hash: hasher.finalize().to_hex().to_string(),
        });
    }
    Ok(files)
}

fn send_file(path: PathBuf) -> PieceStream {
    let (out, pieces) = mpsc::channel(PIECES);
    tokio::task::spawn_blocking(move || {
        let sent = read_pieces(&path, |data| {
            out.blocking_send(Ok(v1::Piece { data })).is_ok()
        });
        if let Err(error) = sent {
            let _ = out.blocking_send(Err(failed(format!("{}: {error}", path.display()))));
        }
    });
    ReceiverStream::new(pieces)
}

/// Reads a file piece by piece for as long as `take` wants more.
fn read_pieces(path: &Path, mut take: impl FnMut(bytes::Bytes) -> bool) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    loop {
        let mut piece = vec![0; MAX_PIECE];
        let mut filled = 0;
        while filled < piece.len() {
            match file.read(&mut piece[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        piece.truncate(filled);
        if piece.is_empty() || !take(piece.into()) {
            return Ok(());
        }
    }
}

/// Takes an upload up where it stopped, and publishes it once its hash is right.
fn store_file(
    path: &Path,
    header: &v1::FileHeader,
    mut next: impl FnMut() -> Option<bytes::Bytes>,
) -> Result<(), Status> {
    let part = partial(path);
    let describe = |error: std::io::Error| failed(format!("{}: {error}", part.display()));
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(describe)?;
    }
    let mut options = File::options();
    options.create(true).truncate(false).read(true).write(true);
    let mut file = options.open(&part).map_err(describe)?;
    let held = file.metadata().map_err(describe)?.len();
    if header.offset > held {
        return Err(invalid(format!(
            "the upload starts at byte {}, but only {held} are here; ask again which files are missing",
            header.offset
        )));
    }
    file.set_len(header.offset).map_err(describe)?;
    file.seek(SeekFrom::Start(header.offset))
        .map_err(describe)?;
    let mut size = header.offset;
    while let Some(data) = next() {
        size += data.len() as u64;
        if size > header.bytes {
            return Err(invalid(format!(
                "more than the {} bytes announced",
                header.bytes
            )));
        }
        file.write_all(&data).map_err(describe)?;
    }
    if size < header.bytes {
        // What came stays, so that the next try goes on from here.
        return Err(invalid(format!("{size} of {} bytes came", header.bytes)));
    }
    file.sync_all().map_err(describe)?;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(File::open(&part).map_err(describe)?)
        .map_err(describe)?;
    let found = hasher.finalize().to_hex();
    if found.as_str() != header.hash {
        std::fs::remove_file(&part).map_err(describe)?;
        return Err(invalid(format!(
            "the file's hash is {found}, not {}; it changed while it was sent",
            header.hash
        )));
    }
    std::fs::rename(&part, path).map_err(describe)
}
