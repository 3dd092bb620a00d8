//! One file to a store: in one request if it is small, else in parts, some of which are on their way at a time. The object
//! appears when all of it is there and is what it should be, and not before.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use tokio::task::{JoinSet, spawn_blocking};

use crate::bucket::Bucket;
use crate::error::ObjectError;

/// The least size of a part, in bytes; what is smaller than two goes as a whole.
const PART: u64 = 16 << 20;
/// Parts that an object may have, a few fewer than stores allow.
const MAX_PARTS: u64 = 9_000;
/// Parts on their way at a time.
const AT_A_TIME: usize = 3;

/// Copies a file, open at its beginning, whose BLAKE3 is given. Of a file that is another one nothing appears. `path` is
/// where it lies, for who has to look at it.
pub async fn put(
    bucket: &Bucket,
    name: &str,
    (path, file): (&Path, File),
    expected: &[u8; 32],
) -> Result<(), ObjectError> {
    let disk = ObjectError::disk(path);
    let bytes = file.metadata().map_err(&disk)?.len();
    let mut reader = Reader::new(file, PART.max(bytes.div_ceil(MAX_PARTS)));
    let key = bucket.key(name)?;
    if bytes < 2 * PART {
        reader.part = 2 * PART;
        let whole = reader.next().await.map_err(&disk)?;
        reader.next().await.map_err(&disk)?;
        reader.check(path, expected)?;
        let put = bucket.store.put(&key, PutPayload::from(whole));
        return put.await.map(|_| ()).map_err(bucket.failed(name));
    }
    let upload = bucket.store.put_multipart(&key).await;
    let mut upload = upload.map_err(bucket.failed(name))?;
    let sent = send(bucket, name, path, &mut reader, &mut *upload).await;
    match sent.and_then(|()| reader.check(path, expected)) {
        Ok(()) => {
            let complete = upload.complete().await;
            complete.map(|_| ()).map_err(bucket.failed(name))
        }
        Err(error) => {
            // Parts of an upload that is never completed are invisible; who cannot abort it leaves them to the bucket's rules.
            drop(upload.abort().await);
            Err(error)
        }
    }
}

async fn send(
    bucket: &Bucket,
    name: &str,
    path: &Path,
    reader: &mut Reader,
    upload: &mut dyn MultipartUpload,
) -> Result<(), ObjectError> {
    let mut under_way = JoinSet::new();
    let settle = |done: Result<object_store::Result<()>, tokio::task::JoinError>| {
        let done = done.expect("a part neither panics nor is stopped");
        done.map_err(bucket.failed(name))
    };
    loop {
        let part = reader.next().await.map_err(ObjectError::disk(path))?;
        if part.is_empty() {
            break;
        }
        if under_way.len() >= AT_A_TIME
            && let Some(done) = under_way.join_next().await
        {
            settle(done)?;
        }
        under_way.spawn(upload.put_part(PutPayload::from(part)));
    }
    while let Some(done) = under_way.join_next().await {
        settle(done)?;
    }
    Ok(())
}

/// Reads a file part by part, and hashes it.
struct Reader {
    inner: Option<(File, blake3::Hasher)>,
    part: u64,
}

impl Reader {
    fn new(file: File, part: u64) -> Self {
        Self {
            inner: Some((file, blake3::Hasher::new())),
            part,
        }
    }

    /// The next part; empty at the end.
    async fn next(&mut self) -> std::io::Result<Vec<u8>> {
        let (mut file, mut hasher) = self.inner.take().expect("one reads at a time");
        let part = self.part;
        let read = spawn_blocking(move || {
            let mut content = Vec::new();
            let read = (&mut file).take(part).read_to_end(&mut content);
            hasher.update(&content);
            (read.map(|_| content), (file, hasher))
        });
        let (read, inner) = read.await.expect("reading a file does not panic");
        self.inner = Some(inner);
        read
    }

    /// Whether what was read is what was expected.
    fn check(&self, path: &Path, expected: &[u8; 32]) -> Result<(), ObjectError> {
        let (_, hasher) = self.inner.as_ref().expect("nobody reads now");
        let found = hasher.finalize();
        match found.as_bytes() == expected {
            true => Ok(()),
            false => Err(ObjectError::Damaged {
                url: path.display().to_string(),
                found: found.to_hex().to_string(),
                expected: blake3::Hash::from(*expected).to_hex().to_string(),
            }),
        }
    }
}
