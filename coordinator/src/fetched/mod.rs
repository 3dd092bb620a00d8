//! Text that lies elsewhere, brought into the home: what a request names by URLs becomes files of the content store. What was
//! fetched before, and has not changed since, is not fetched again; what was cut off goes on.
//!
//! ```text
//! fetched/KEY.part    a download under way, or cut off; the key changes with the content
//! fetched/KEY.json    what that was, where it was whole: its URL, its size, its hash
//! files/HASH          the content
//! ```
//!
//! `listing.rs` says which files a URL means, `hub.rs` which a dataset has. The transfer itself is
//! `cohort_objects`.

mod hub;
mod listing;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use cohort_common::checkpoint::hex;
use cohort_common::corpus::SourceFile;
use cohort_common::home::Home;
use cohort_objects::{Download, Fetched, ObjectError, Reach};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::interval;

pub use listing::{Found, Named, find};

/// Downloads at a time.
const AT_A_TIME: usize = 4;
/// Between looks at how far they are.
const LOOK: Duration = Duration::from_millis(200);

/// How far fetching is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are here.
    pub done: u64,
    /// Bytes of all that is wanted; 0 while that is not known.
    pub total: u64,
}

/// What `fetched/KEY.json` says.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    url: String,
    bytes: u64,
    #[serde(with = "hex")]
    blake3: [u8; 32],
}

/// Brings files here, in the order given.
pub async fn bring(
    home: &Home,
    named: Vec<Named>,
    tell: &dyn Fn(Progress),
) -> Result<Vec<SourceFile>, ObjectError> {
    let directory = home.fetched();
    fs::create_dir_all(&directory).map_err(|source| ObjectError::Disk {
        path: directory,
        source,
    })?;
    let known: Option<u64> = named.iter().map(|named| named.bytes).sum();
    let counts: Vec<Arc<AtomicU64>> = named.iter().map(|_| Arc::default()).collect();
    let progress = || Progress {
        done: counts.iter().map(|c| c.load(Ordering::Relaxed)).sum(),
        total: known.unwrap_or(0),
    };
    let mut files: Vec<Option<SourceFile>> = vec![None; named.len()];
    let mut waiting = named.into_iter().zip(&counts).enumerate();
    let mut under_way = JoinSet::new();
    let mut look = interval(LOOK);
    loop {
        while under_way.len() < AT_A_TIME
            && let Some((index, (named, count))) = waiting.next()
        {
            let (home, count) = (home.clone(), count.clone());
            under_way.spawn(async move { (index, bring_one(&home, named, &count).await) });
        }
        tokio::select! {
            done = under_way.join_next() => match done {
                // Those that are under way end with the set; what they have stays.
                Some(done) => {
                    let (index, file) = done.expect("a download neither panics nor is stopped");
                    files[index] = Some(file?);
                }
                None => break,
            },
            _ = look.tick() => tell(progress()),
        }
    }
    tell(progress());
    Ok(files.into_iter().flatten().collect())
}

async fn bring_one(
    home: &Home,
    named: Named,
    count: &AtomicU64,
) -> Result<SourceFile, ObjectError> {
    let source = match named.found {
        Found::Here(path) => return Ok(SourceFile::new(named.name, path)),
        Found::There(source) => source,
    };
    let download = Download::find(source).await?;
    // Where nobody says when the content changes, it is fetched each time, under a name of its own.
    let lasting = download.key();
    let key = lasting.clone().unwrap_or_else(|| once(download.url()));
    let directory = home.fetched();
    let (note, part) = (
        directory.join(format!("{key}.json")),
        directory.join(format!("{key}.part")),
    );
    let _alone = alone(&part).await;
    let _passing = lasting.is_none().then(|| Passing(&part));
    if lasting.is_some()
        && let Some((path, bytes)) = known(home, &note)
    {
        count.store(bytes, Ordering::Relaxed);
        return Ok(SourceFile::new(named.name, path));
    }
    let url = download.url().to_owned();
    let tell = |bytes| count.store(bytes, Ordering::Relaxed);
    let fetched = download.to_file(&part, &tell).await?;
    let path = keep(home, &part, &fetched)?;
    if lasting.is_some() {
        remember(&note, url, &fetched)?;
    }
    tracing::info!(url = named.name, bytes = fetched.bytes, "fetched");
    Ok(SourceFile::new(named.name, path))
}

/// A part that nobody can go on with: it does not outlast its download, however that ends.
struct Passing<'a>(&'a Path);

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        // It is not there any more where all of it came.
        drop(fs::remove_file(self.0));
    }
}

/// The content that a note speaks of, if it is still here.
fn known(home: &Home, note: &Path) -> Option<(PathBuf, u64)> {
    let note: Note = serde_json::from_slice(&fs::read(note).ok()?).ok()?;
    let path = home.file(&note.blake3);
    let meta = path.metadata().ok()?;
    (meta.len() == note.bytes).then_some((path, note.bytes))
}

/// Puts what was received into the content store.
fn keep(home: &Home, part: &Path, fetched: &Fetched) -> Result<PathBuf, ObjectError> {
    let path = home.file(&fetched.hash);
    let disk = |source| ObjectError::Disk {
        path: path.clone(),
        source,
    };
    fs::create_dir_all(home.files()).map_err(disk)?;
    fs::rename(part, &path).map_err(disk)?;
    Ok(path)
}

fn remember(note: &Path, url: String, fetched: &Fetched) -> Result<(), ObjectError> {
    let content = Note {
        url,
        bytes: fetched.bytes,
        blake3: fetched.hash,
    };
    let json = serde_json::to_vec(&content).expect("a note is plain data");
    // One that is torn is not understood, and then the file is fetched again.
    fs::write(note, json).map_err(|source| ObjectError::Disk {
        path: note.to_owned(),
        source,
    })
}

/// A key for one download.
fn once(url: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let hash = blake3::hash(url.as_bytes()).to_hex();
    format!("{}-{}-{count}", &hash[..16], std::process::id())
}

/// Waits until nobody else of this process writes that file or directory.
pub(crate) async fn alone(part: &Path) -> tokio::sync::OwnedMutexGuard<()> {
    static PARTS: LazyLock<Mutex<HashMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>> =
        LazyLock::new(Mutex::default);
    let lock = {
        let mut parts = PARTS.lock().expect("no panic under this lock");
        parts.retain(|_, lock| Arc::strong_count(lock) > 1);
        parts.entry(part.to_owned()).or_default().clone()
    };
    lock.lock_owned().await
}

/// How far a call may reach for whoever asks from there.
pub fn reach_of(caller: Option<SocketAddr>) -> Reach {
    match caller {
        Some(address) if address.ip().to_canonical().is_loopback() => Reach::ThisMachine,
        _ => Reach::Network,
    }
}
