//! Sends files to a coordinator on another machine: by content hash, so that nothing is sent twice, and from where an
//! earlier upload stopped.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cohort_common::wire::MAX_PIECE;
use cohort_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::client::{Client, Data};
use crate::follow::Bar;

/// Pieces that wait for a slow connection.
const PIECES: usize = 4;
/// Files in one question about what is missing.
const QUESTION: usize = 10_000;

/// A file to be sent.
pub struct Upload {
    /// Its name in messages.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// BLAKE3 of its content, in hex.
    pub hash: String,
    bytes: u64,
}

/// Hashes files.
pub async fn hash(files: Vec<(String, PathBuf)>) -> Result<Vec<Upload>> {
    let mut sizes = Vec::new();
    for (_, path) in &files {
        sizes.push(path.metadata().with_context(|| cannot_read(path))?.len());
    }
    let bar = Bar::bytes("hashing", sizes.iter().sum());
    tokio::task::spawn_blocking(move || {
        let mut uploads = Vec::new();
        for ((name, path), bytes) in files.into_iter().zip(sizes) {
            let mut hasher = blake3::Hasher::new();
            let mut file = File::open(&path).with_context(|| cannot_read(&path))?;
            let mut buffer = vec![0; 1 << 20];
            loop {
                let read = file.read(&mut buffer).with_context(|| cannot_read(&path))?;
                if read == 0 {
                    break;
                }
                hasher.update_rayon(&buffer[..read]);
                bar.advance(read as u64);
            }
            let hash = hasher.finalize().to_hex().to_string();
            uploads.push(Upload {
                name,
                path,
                hash,
                bytes,
            });
        }
        bar.clear();
        Ok(uploads)
    })
    .await?
}

/// Sends what the coordinator lacks. Returns how many bytes that were.
pub async fn send(client: &Client, uploads: &[Upload]) -> Result<u64> {
    let mut data = client.data().await?;
    let mut missing = Vec::new();
    for part in uploads.chunks(QUESTION) {
        let hashes = part.iter().map(|upload| upload.hash.clone()).collect();
        missing.extend(data.missing(hashes).await?);
    }
    // Equal files are sent once.
    let by_hash: HashMap<&str, &Upload> = uploads.iter().map(|u| (u.hash.as_str(), u)).collect();
    let mut asked = HashSet::new();
    missing.retain(|file| asked.insert(file.hash.clone()));
    let mut todo = Vec::new();
    for file in &missing {
        if let Some(&upload) = by_hash.get(file.hash.as_str()) {
            todo.push((upload, file.offset.min(upload.bytes)));
        }
    }
    let total = todo
        .iter()
        .map(|(upload, offset)| upload.bytes - offset)
        .sum();
    let bar = Bar::bytes("sending", total);
    for (upload, offset) in todo {
        send_one(&mut data, upload, offset, &bar).await?;
    }
    bar.clear();
    Ok(total)
}

async fn send_one(data: &mut Data, upload: &Upload, offset: u64, bar: &Bar) -> Result<()> {
    let (out, pieces) = mpsc::channel(PIECES);
    let header = v1::FileHeader {
        hash: upload.hash.clone(),
        bytes: upload.bytes,
        offset,
    };
    let (path, bar) = (upload.path.clone(), bar.clone());
    let reader = tokio::task::spawn_blocking(move || {
        let header = v1::file_piece::Kind::Header(header);
        if out
            .blocking_send(v1::FilePiece { kind: Some(header) })
            .is_err()
        {
            return Ok(());
        }
        let read = read_pieces(&path, offset, |data| {
            bar.advance(data.len() as u64);
            let kind = Some(v1::file_piece::Kind::Data(data.into()));
            out.blocking_send(v1::FilePiece { kind }).is_ok()
        });
        read.with_context(|| cannot_read(&path))
    });
    let sent = data.upload(ReceiverStream::new(pieces)).await;
    // If the file could not be read, the coordinator only sees that something is missing.
    reader.await??;
    sent.with_context(|| format!("cannot send `{}`", upload.name))
}

fn read_pieces(
    path: &Path,
    offset: u64,
    mut take: impl FnMut(Vec<u8>) -> bool,
) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    loop {
        let mut piece = Vec::with_capacity(MAX_PIECE);
        file.by_ref()
            .take(MAX_PIECE as u64)
            .read_to_end(&mut piece)?;
        if piece.is_empty() || !take(piece) {
            return Ok(());
        }
    }
}

fn cannot_read(path: &Path) -> String {
    format!("cannot read `{}`", path.display())
}
