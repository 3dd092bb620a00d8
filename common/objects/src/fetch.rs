//! One file to this disk. What was received stays in a part file, so that a download that was cut off goes on where it ended,
//! in this process or in the next, as long as the file is still the same one. The name of the part file is the caller's; a
//! [`Download`] has a key for it that changes with the file.
//!
//! Tries without progress are counted and become rarer; what is wrong for good (no such file, no rights, another file) ends a
//! download at once.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, IF_RANGE, LAST_MODIFIED, RANGE};
use http::{HeaderMap, HeaderValue, StatusCode};
use object_store::client::HttpResponse;
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncSeekExt, AsyncWriteExt};
use tokio::time::sleep;
use tokio_stream::{Stream, StreamExt};
use url::Url;

use crate::bucket::{Bucket, Meta};
use crate::error::ObjectError;
use crate::location::{Location, shown};
use crate::patience::patiently;
use crate::web::Web;

/// Tries without progress.
const TRIES: u32 = 6;
/// The pause before the second try; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 250 });
/// Bytes of a refusal that are read.
const MAX_REFUSAL: usize = 64 << 10;

/// Something that can be downloaded.
#[derive(Clone, Debug)]
pub enum Source {
    /// An object, as a list has it.
    Object(Bucket, Meta),
    /// A file on the web.
    Web(Box<WebFile>),
}

/// A file on the web.
#[derive(Clone, Debug)]
pub struct WebFile {
    /// Who asks.
    pub web: Web,
    /// For what. Its query may be a secret.
    pub url: Url,
    /// What is sent along.
    pub headers: HeaderMap,
    /// How it is shown.
    pub shown: String,
    /// What the content depends on, where the URL says it; else what the server says counts.
    pub version: Option<String>,
}

impl WebFile {
    /// A file that a signed URL gives to whoever has it; `None` if it is no URL of the web.
    pub fn signed(web: Web, url: &str) -> Option<Self> {
        let Ok(Location::Web(url)) = Location::parse(url) else {
            return None;
        };
        Some(Self::of(web, url))
    }

    /// A file that is there for everybody.
    pub fn of(web: Web, url: Url) -> Self {
        Self {
            web,
            shown: shown(&url),
            url,
            headers: HeaderMap::new(),
            version: None,
        }
    }

    /// The content of a small file.
    pub async fn read(&self, most: u64) -> Result<Bytes, ObjectError> {
        let failed = |error| ObjectError::of_http(&self.shown, &error);
        let answer = patiently((TRIES, PAUSE), ObjectError::is_transient, || {
            ask(self, 0, None)
        })
        .await?;
        let mut pieces = answer.into_body().bytes_stream();
        let mut content = Vec::new();
        while let Some(piece) = pieces.next().await {
            content.extend_from_slice(&piece.map_err(failed)?);
            if content.len() as u64 > most {
                return Err(ObjectError::Large {
                    url: self.shown.clone(),
                    bytes: content.len() as u64,
                    most,
                });
            }
        }
        Ok(content.into())
    }
}

impl Source {
    /// How it is shown.
    pub fn url(&self) -> String {
        match self {
            Self::Object(bucket, meta) => bucket.url(&meta.name),
            Self::Web(file) => file.shown.clone(),
        }
    }
}

/// A file that was found and has still to be received.
#[derive(Debug)]
pub struct Download {
    source: Source,
    url: String,
    version: Option<String>,
    /// Whether the version is only the time of the last change.
    dated: bool,
    bytes: Option<u64>,
    /// The answer that said so, from the first byte on.
    answer: Option<HttpResponse>,
}

/// A file that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its content.
    pub hash: [u8; 32],
}

type Pieces = Pin<Box<dyn Stream<Item = Result<Bytes, ObjectError>> + Send>>;

impl Download {
    /// Finds a file, and what its version and size are.
    pub async fn find(source: Source) -> Result<Self, ObjectError> {
        let url = source.url();
        let (version, dated, bytes, answer) = match &source {
            Source::Object(_, meta) => (meta.version.clone(), false, Some(meta.bytes), None),
            Source::Web(file) => {
                let answer = patiently((TRIES, PAUSE), ObjectError::is_transient, || {
                    ask(file, 0, None)
                })
                .await?;
                let version = file.version.clone().or_else(|| version_of(&answer));
                let dated = file.version.is_none() && text(&answer, &ETAG).is_none();
                (version, dated, length_of(&answer), Some(answer))
            }
        };
        Ok(Self {
            source,
            url,
            version,
            dated,
            bytes,
            answer,
        })
    }

    /// Its size, if that is known.
    pub fn bytes(&self) -> Option<u64> {
        self.bytes
    }

    /// How it is shown.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A plain word that is another one for another file, or another content of the same; `None` where nobody says when the
    /// content changes.
    pub fn key(&self) -> Option<String> {
        let version = self.version.as_deref()?;
        let url = match &self.source {
            // Files that one program makes for many queries may all be of one time, and of one size.
            Source::Web(file) if self.dated => file.url.as_str(),
            _ => self.url.as_str(),
        };
        let bytes = format!("{:?}", self.bytes);
        let mut hasher = blake3::Hasher::new();
        for part in [url, version, bytes.as_str()] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Some(hasher.finalize().to_hex()[..32].to_owned())
    }

    /// Receives what `part` does not have yet. `tell` is told how many bytes are there.
    pub async fn to_file(
        mut self,
        part: &Path,
        tell: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Fetched, ObjectError> {
        let disk = ObjectError::disk(part);
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).read(true).write(true);
        let mut file = options.open(part).await.map_err(&disk)?;
        let mut have = file.metadata().await.map_err(&disk)?.len();
        if self.key().is_none() || self.bytes.is_some_and(|bytes| have > bytes) {
            have = 0;
        }
        // Who begins anew each time, and is cut off each time, gets nowhere: only what was never had is progress.
        let (mut vain, mut pause, mut most) = (0, PAUSE, have);
        while self.bytes != Some(have) || have == 0 {
            match self.receive(&mut file, part, &mut have, tell).await {
                Ok(()) => break,
                Err(error) if !error.is_transient() => return Err(error),
                Err(error) => {
                    if have > most {
                        (vain, pause, most) = (0, PAUSE, have);
                    }
                    if self.version.is_none() {
                        have = 0;
                    }
                    vain += 1;
                    if vain == TRIES {
                        return Err(error);
                    }
                    tracing::info!(%error, have, "the download goes on in a moment");
                    sleep(pause).await;
                    pause *= 2;
                }
            }
        }
        if self.bytes.is_some_and(|bytes| bytes != have) {
            return Err(ObjectError::Changed { url: self.url });
        }
        file.set_len(have).await.map_err(&disk)?;
        file.sync_all().await.map_err(&disk)?;
        drop(file);
        let hash = hash(part).await.map_err(&disk)?;
        Ok(Fetched { bytes: have, hash })
    }

    /// Receives until the end or an error; `have` is what is in the file.
    async fn receive(
        &mut self,
        file: &mut File,
        part: &Path,
        have: &mut u64,
        tell: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), ObjectError> {
        let mut pieces = self.pieces(have).await?;
        let disk = |error| self.full(part, error);
        file.seek(io::SeekFrom::Start(*have)).await.map_err(disk)?;
        loop {
            let piece = match pieces.next().await {
                Some(Ok(piece)) => piece,
                Some(Err(error)) => {
                    file.flush().await.map_err(|e| self.full(part, e))?;
                    return Err(error);
                }
                None => break,
            };
            file.write_all(&piece)
                .await
                .map_err(|e| self.full(part, e))?;
            *have += piece.len() as u64;
            if self.bytes.is_some_and(|bytes| *have > bytes) {
                return Err(ObjectError::Changed {
                    url: self.url.clone(),
                });
            }
            tell(*have);
        }
        file.flush().await.map_err(|e| self.full(part, e))
    }

    /// The content from `have` on, or from 0 on where nobody gives less; then `have` becomes 0.
    async fn pieces(&mut self, have: &mut u64) -> Result<Pieces, ObjectError> {
        let url = self.url.clone();
        match &self.source {
            Source::Object(bucket, meta) => {
                let version = self.version.as_deref();
                let found = bucket.read_from(&meta.name, *have, version).await?;
                *have = found.range.start;
                let failed = move |error| ObjectError::of_store(&url, error);
                let pieces = found.into_stream().map(move |piece| piece.map_err(&failed));
                Ok(Box::pin(pieces))
            }
            Source::Web(file) => {
                let first = self.answer.take().filter(|_| *have == 0);
                let answer = match first {
                    Some(answer) => answer,
                    None => ask(file, *have, self.version.as_deref()).await?,
                };
                if *have > 0 && answer.status() != StatusCode::PARTIAL_CONTENT {
                    *have = 0;
                }
                if !self.is_same(&answer, *have) {
                    return Err(ObjectError::Changed { url });
                }
                let failed = move |error| ObjectError::of_http(&url, &error);
                let pieces = answer.into_body().bytes_stream();
                Ok(Box::pin(pieces.map(move |piece| piece.map_err(&failed))))
            }
        }
    }

    /// Whether an answer is of the file that was found, from that byte on.
    fn is_same(&self, answer: &HttpResponse, from: u64) -> bool {
        let Source::Web(file) = &self.source else {
            return true;
        };
        let version = version_of(answer);
        let other = file.version.is_none() && version.is_some() && version != self.version;
        let size = match answer.status() {
            StatusCode::PARTIAL_CONTENT => match range_of(answer) {
                Some((start, total)) if start == from => total,
                _ => return false,
            },
            _ => length_of(answer),
        };
        !other && (size.is_none() || self.bytes.is_none() || size == self.bytes)
    }

    fn full(&self, part: &Path, error: io::Error) -> ObjectError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let there = part.metadata().map_or(0, |meta| meta.len());
                ObjectError::Full {
                    url: self.url.clone(),
                    path: part.to_owned(),
                    missing: self.bytes.unwrap_or(there).saturating_sub(there),
                }
            }
            _ => ObjectError::disk(part)(error),
        }
    }
}

/// Asks for what is behind that many bytes of a file.
async fn ask(
    file: &WebFile,
    from: u64,
    version: Option<&str>,
) -> Result<HttpResponse, ObjectError> {
    let mut headers = file.headers.clone();
    if from > 0 {
        let range = HeaderValue::from_str(&format!("bytes={from}-")).expect("digits");
        headers.insert(RANGE, range);
        // A weak tag must not be sent; then the answer's is compared.
        let strong = version.filter(|v| file.version.is_none() && !v.starts_with("W/"));
        if let Some(version) = strong.and_then(|version| HeaderValue::from_str(version).ok()) {
            headers.insert(IF_RANGE, version);
        }
    }
    let answer = file.web.get(&file.url, headers).await;
    let answer = answer.map_err(|error| ObjectError::of_http(&file.shown, &error))?;
    match answer.status().is_success() {
        true => Ok(answer),
        false => Err(refusal(file, answer).await),
    }
}

/// What a refusal says. The hub says why in a header.
async fn refusal(file: &WebFile, answer: HttpResponse) -> ObjectError {
    let status = answer.status();
    let said = answer.headers().get("x-error-message");
    let said = said.and_then(|said| said.to_str().ok()).unwrap_or_default();
    let said = said.to_owned();
    // Read to its end, so that the connection can be used again; a long one is not worth it.
    if length_of(&answer).is_some_and(|bytes| bytes <= MAX_REFUSAL as u64) {
        drop(answer.into_body().bytes().await);
    }
    ObjectError::of_status(&file.shown, status, said)
}

fn text<'a>(answer: &'a HttpResponse, name: &http::HeaderName) -> Option<&'a str> {
    answer.headers().get(name)?.to_str().ok()
}

fn version_of(answer: &HttpResponse) -> Option<String> {
    let version = text(answer, &ETAG).or_else(|| text(answer, &LAST_MODIFIED));
    version.map(str::to_owned)
}

fn length_of(answer: &HttpResponse) -> Option<u64> {
    text(answer, &CONTENT_LENGTH)?.parse().ok()
}

/// The first byte of a partial answer, and the size of the whole if that is known.
fn range_of(answer: &HttpResponse) -> Option<(u64, Option<u64>)> {
    let range = text(answer, &CONTENT_RANGE)?.strip_prefix("bytes ")?;
    let (range, total) = range.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.parse().ok()?, total.parse().ok()))
}

/// BLAKE3 of a file.
async fn hash(path: &Path) -> io::Result<[u8; 32]> {
    let path = path.to_owned();
    let hashing = tokio::task::spawn_blocking(move || {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(std::fs::File::open(path)?)?;
        Ok(*hasher.finalize().as_bytes())
    });
    hashing.await.map_err(io::Error::other)?
}
