//! Who may write to a home directory: one process at a time, which says there who it is and where it listens.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Home, HomeError, unwritable};

/// The process that holds a home directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id; 0 if it cannot be told.
    pub pid: u32,
    /// Where its coordinator listens, once it does.
    pub url: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            0 => write!(f, "another coordinator")?,
            pid => write!(f, "the coordinator with process id {pid}")?,
        }
        match &self.url {
            Some(url) => write!(f, " at {url}"),
            None => Ok(()),
        }
    }
}

impl Home {
    /// Takes the home for this process until the lock is dropped or the process ends, however it ends.
    pub fn lock(&self) -> Result<HomeLock, HomeError> {
        let path = self.lock_path();
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let file = open.map_err(unwritable(&path))?;
        // A reader that asks who holds the home locks it for a moment, and a coordinator that was told to end may still
        // be busy with its last file: wait for these, not for a coordinator that goes on.
        for attempt in 0.. {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if attempt < 200 => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(HomeError::Locked {
                        path: self.root.clone(),
                        holder: self.read_holder(),
                    });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(HomeError::Unwritable { path, source });
                }
            }
        }
        let mut lock = HomeLock { file, path };
        lock.write(&Holder {
            pid: std::process::id(),
            url: None,
        })?;
        Ok(lock)
    }

    /// Who holds the home now, if anybody does.
    pub fn holder(&self) -> Option<Holder> {
        let file = File::open(self.lock_path()).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Some(self.read_holder()),
            _ => None,
        }
    }

    fn read_holder(&self) -> Holder {
        let mut text = String::new();
        let file = File::open(self.lock_path());
        let read = file.and_then(|f| f.take(4096).read_to_string(&mut text));
        match read {
            Ok(_) => serde_json::from_str(&text).unwrap_or_default(),
            Err(_) => Holder::default(),
        }
    }

    fn lock_path(&self) -> PathBuf {
        self.root.join("lock")
    }
}

/// The right to write to a home directory.
#[derive(Debug)]
pub struct HomeLock {
    file: File,
    path: PathBuf,
}

impl HomeLock {
    /// Tells others where this process's coordinator listens.
    pub fn publish(&mut self, url: &str) -> Result<(), HomeError> {
        self.write(&Holder {
            pid: std::process::id(),
            url: Some(url.to_owned()),
        })
    }

    /// Takes that back: the process is about to end. Whoever waits for the home may go on waiting.
    pub fn withdraw(&mut self) {
        // Where it cannot be written, others see an address at which nobody listens any more.
        let _ = self.write(&Holder {
            pid: std::process::id(),
            url: None,
        });
    }

    fn write(&mut self, holder: &Holder) -> Result<(), HomeError> {
        let text = serde_json::to_string(holder).expect("a holder is plain data");
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .and_then(|_| self.file.write_all(text.as_bytes()))
            .and_then(|()| self.file.flush());
        written.map_err(unwritable(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_home_names_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(dir.path()).unwrap();
        assert_eq!(home.holder(), None);
        let mut lock = home.lock().unwrap();
        lock.publish("http://127.0.0.1:7070").unwrap();
        let error = home.lock().unwrap_err().to_string();
        let pid = std::process::id();
        assert!(
            error.contains(&format!("process id {pid} at http://127.0.0.1:7070")),
            "{error}"
        );
        assert_eq!(home.holder().unwrap().pid, pid);
        assert!(Home::open_read_only(dir.path()).is_ok());
        lock.withdraw();
        let ending = home.holder().unwrap();
        assert_eq!((ending.pid, ending.url), (pid, None));
        drop(lock);
        assert_eq!(home.holder(), None);
        home.lock().unwrap();
    }
}
