//! Files that are hashed on the way and are on disk when they say so, and directories that appear whole or not at all.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::CheckpointError;
use super::manifest::FileEntry;

/// Beginning of the name of a directory that is being written.
const UNFINISHED: &str = ".unfinished-";

/// Bytes in one read or write.
const BLOCK: usize = 1 << 20;

/// Slices from this size on are hashed by several threads.
const PARALLEL: usize = 256 << 10;

/// A file that is hashed while it is written.
pub(super) struct HashedFile {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl HashedFile {
    pub fn create(path: PathBuf) -> Result<Self, CheckpointError> {
        let file = File::create_new(&path).map_err(CheckpointError::io("create", &path))?;
        Ok(Self {
            path,
            file,
            hasher: blake3::Hasher::new(),
            bytes: 0,
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        update(&mut self.hasher, bytes);
        self.bytes += bytes.len() as u64;
        let written = self.file.write_all(bytes);
        written.map_err(CheckpointError::io("write", &self.path))
    }

    pub fn write_zeros(&mut self, mut bytes: u64) -> Result<(), CheckpointError> {
        let zeros = [0u8; 16 << 10];
        while bytes > 0 {
            let take = bytes.min(zeros.len() as u64);
            self.write(&zeros[..take as usize])?;
            bytes -= take;
        }
        Ok(())
    }

    /// Flushes to the disk.
    pub fn finish(self, name: &str) -> Result<FileEntry, CheckpointError> {
        self.file
            .sync_all()
            .map_err(CheckpointError::io("flush", &self.path))?;
        Ok(FileEntry {
            name: name.to_owned(),
            bytes: self.bytes,
            blake3: self.hasher.finalize().into(),
        })
    }
}

/// A directory under a temporary name beside its final one. Dropped before [`UnfinishedDir::publish`], it is removed.
pub(super) struct UnfinishedDir {
    temporary: PathBuf,
    target: PathBuf,
    published: bool,
}

impl UnfinishedDir {
    pub fn create(target: &Path) -> Result<Self, CheckpointError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = target.with_file_name(format!(
            "{UNFINISHED}{name}-{}-{unique}",
            std::process::id()
        ));
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(CheckpointError::io("create", parent))?;
        }
        fs::create_dir(&temporary).map_err(CheckpointError::io("create", &temporary))?;
        Ok(Self {
            temporary,
            target: target.to_owned(),
            published: false,
        })
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.temporary.join(name)
    }

    pub fn target(&self) -> &Path {
        &self.target
    }

    pub fn write_file(&self, name: &str, content: &[u8]) -> Result<FileEntry, CheckpointError> {
        let mut file = HashedFile::create(self.file(name))?;
        file.write(content)?;
        file.finish(name)
    }

    /// Copies a file; the copy is hashed and on disk.
    pub fn copy_file(&self, from: &Path, name: &str) -> Result<FileEntry, CheckpointError> {
        let mut source = File::open(from).map_err(CheckpointError::io("read", from))?;
        let mut copy = HashedFile::create(self.file(name))?;
        let mut block = vec![0; BLOCK];
        loop {
            match source
                .read(&mut block)
                .map_err(CheckpointError::io("read", from))?
            {
                0 => return copy.finish(name),
                n => copy.write(&block[..n])?,
            }
        }
    }

    /// Takes in a file that nobody will change, under its own name: as a second name of the same content where the file
    /// system can, else as a copy.
    pub fn link_file(&self, from: &Path) -> Result<FileEntry, CheckpointError> {
        let name = from.file_name().unwrap_or_default().to_string_lossy();
        if fs::hard_link(from, self.file(&name)).is_err() {
            return self.copy_file(from, &name);
        }
        let (bytes, blake3) = hash_file(from)?;
        Ok(FileEntry {
            name: name.into_owned(),
            bytes,
            blake3,
        })
    }

    /// Gives the directory its final name, durably. An existing directory that is not empty is an error.
    pub fn publish(mut self) -> Result<PathBuf, CheckpointError> {
        sync_dir(&self.temporary)?;
        if fs::read_dir(&self.target).is_ok_and(|mut d| d.next().is_none()) {
            fs::remove_dir(&self.target).map_err(CheckpointError::io("replace", &self.target))?;
        }
        if self.target.symlink_metadata().is_ok() {
            return Err(CheckpointError::Exists(self.target.clone()));
        }
        fs::rename(&self.temporary, &self.target).map_err(|error| match error.kind() {
            // Since it was looked for.
            ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists => {
                CheckpointError::Exists(self.target.clone())
            }
            _ => CheckpointError::io("rename to", &self.target)(error),
        })?;
        self.published = true;
        if let Some(parent) = self.target.parent() {
            sync_dir(parent)?;
        }
        Ok(self.target.clone())
    }
}

impl Drop for UnfinishedDir {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = fs::remove_dir_all(&self.temporary)
        {
            tracing::warn!(path = %self.temporary.display(), %error, "cannot remove an unfinished directory");
        }
    }
}

/// Deletes a checkpoint so that it is there whole or not at all at any moment: it loses its name first.
///
/// # Errors
/// What the file system says; a checkpoint that is not there is none.
pub fn remove_checkpoint(path: &Path) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let doomed = path.with_file_name(format!("{UNFINISHED}deleted-{}-{name}", std::process::id()));
    match fs::rename(path, &doomed) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => fs::remove_dir_all(&doomed),
    }
}

/// Removes what writers that died left in `directory`. Nobody may be writing there. Returns how many were removed.
pub fn remove_unfinished(directory: &Path) -> Result<usize, CheckpointError> {
    let mut removed = 0;
    let Ok(entries) = fs::read_dir(directory) else {
        return Ok(0);
    };
    for entry in entries {
        let entry = entry.map_err(CheckpointError::io("list", directory))?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let path = entry.path();
            fs::remove_dir_all(&path).map_err(CheckpointError::io("remove", &path))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Size and BLAKE3 of a file, in bounded memory.
pub(super) fn hash_file(path: &Path) -> Result<(u64, [u8; 32]), CheckpointError> {
    let mut file = File::open(path).map_err(CheckpointError::io("read", path))?;
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK];
    loop {
        match file
            .read(&mut block)
            .map_err(CheckpointError::io("read", path))?
        {
            0 => return Ok((hasher.count(), hasher.finalize().into())),
            n => update(&mut hasher, &block[..n]),
        }
    }
}

fn update(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    match bytes.len() >= PARALLEL {
        true => hasher.update_rayon(bytes),
        false => hasher.update(bytes),
    };
}

/// Makes names in a directory durable. Not every system can do this to a directory; those do it by themselves.
fn sync_dir(path: &Path) -> Result<(), CheckpointError> {
    if cfg!(unix) {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let synced = File::open(path).and_then(|d| d.sync_all());
        synced.map_err(CheckpointError::io("flush", path))?;
    }
    Ok(())
}
