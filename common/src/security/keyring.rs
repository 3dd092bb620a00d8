//! The tokens that a coordinator knows. The file is read again whenever it has changed, so that a token that is made or
//! revoked on the coordinator's machine counts at once, whether a coordinator runs or not. Secrets are kept as hashes.

use std::fs::{self, File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::files::{at, read, write_private};
use super::{ClusterToken, Fingerprint, Role, SecurityError, TokenId, check_version};

/// The version of the file.
const VERSION: u32 = 1;

/// Why somebody is not let in, as a sentence for them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Never heard of.
    #[error(
        "the coordinator does not know the token {0}: it was deleted, or this is another cluster than the one that made it"
    )]
    Unknown(TokenId),
    /// Over.
    #[error("the token {id} has expired {}; ask for a new one", ago(*.seconds))]
    Expired {
        /// Which.
        id: TokenId,
        /// Since when.
        seconds: u64,
    },
    /// Taken back.
    #[error("the token {id} was revoked {}; ask for a new one", ago(*.seconds))]
    Revoked {
        /// Which.
        id: TokenId,
        /// Since when.
        seconds: u64,
    },
}

/// A token without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its name.
    pub id: String,
    /// What its bearer is.
    pub role: Role,
    /// What the user noted.
    #[serde(default)]
    pub note: String,
    /// When it was made, in seconds since the epoch.
    pub created: u64,
    /// When it ends, if it does.
    pub expires: Option<u64>,
    /// When it was revoked, if it was.
    pub revoked: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    listed: Listed,
    /// BLAKE3 of the secret.
    hash: String,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    version: u32,
    tokens: Vec<Entry>,
}

/// By what a file is known to be the one that was read.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    inode: u64,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(metadata);
        #[cfg(not(unix))]
        let inode = 0;
        Self {
            modified: metadata.modified().ok(),
            len: metadata.len(),
            inode,
        }
    }
}

/// The tokens of a cluster.
#[derive(Debug)]
pub struct Keyring {
    path: PathBuf,
    known: Mutex<(Option<Stamp>, Vec<Entry>)>,
}

impl Keyring {
    /// The tokens that are kept in a directory; there need not be any.
    pub fn at(directory: &Path) -> Self {
        Self {
            path: directory.join("tokens.json"),
            known: Mutex::default(),
        }
    }

    /// Makes a token. `life` is in seconds; none is forever.
    pub fn create(
        &self,
        role: Role,
        authority: Fingerprint,
        note: &str,
        now: u64,
        life: Option<u64>,
    ) -> Result<ClusterToken, SecurityError> {
        let token = ClusterToken::new(role, authority);
        let entry = Entry {
            listed: Listed {
                id: token.id.to_string(),
                role,
                note: note.into(),
                created: now,
                expires: life.map(|life| now.saturating_add(life)),
                revoked: None,
            },
            hash: token.hash(),
        };
        self.change(|tokens| {
            tokens.push(entry);
            Ok(())
        })?;
        Ok(token)
    }

    /// Takes a token back: its bearers are refused, and so are workers that came in by it. Once more changes nothing.
    pub fn revoke(&self, id: &str, now: u64) -> Result<Listed, SecurityError> {
        self.change(|tokens| {
            let found = tokens.iter_mut().find(|token| token.listed.id == id);
            let token = found.ok_or_else(|| SecurityError::NoToken(id.into()))?;
            token.listed.revoked.get_or_insert(now);
            Ok(token.listed.clone())
        })
    }

    /// All tokens, the oldest first.
    pub fn list(&self) -> Result<Vec<Listed>, SecurityError> {
        let entries = self.entries(|tokens| tokens.to_vec())?;
        Ok(entries.into_iter().map(|entry| entry.listed).collect())
    }

    /// Lets the bearer of a token in, or says why not. A file that cannot be read lets nobody in.
    pub fn admit(&self, token: &ClusterToken, now: u64) -> Result<Role, Refusal> {
        let found = self.find(token.id);
        // Hashes compare in constant time.
        let same = |entry: &Entry| {
            let kept = blake3::Hash::from_hex(&entry.hash);
            let shown = blake3::Hash::from_hex(token.hash());
            matches!((kept, shown), (Ok(kept), Ok(shown)) if kept == shown)
        };
        let entry = found.filter(same).ok_or(Refusal::Unknown(token.id))?;
        not_revoked(token.id, &entry.listed, now)?;
        match entry.listed.expires {
            Some(end) if end <= now => Err(Refusal::Expired {
                id: token.id,
                seconds: now - end,
            }),
            _ => Ok(entry.listed.role),
        }
    }

    /// Whether who once came in by a token, and has a certificate since, may still be there. That a token ends only keeps
    /// others from coming.
    pub fn still_admits(&self, id: TokenId, now: u64) -> Result<(), Refusal> {
        let entry = self.find(id).ok_or(Refusal::Unknown(id))?;
        not_revoked(id, &entry.listed, now)
    }

    fn find(&self, id: TokenId) -> Option<Entry> {
        let id = id.to_string();
        let find = |tokens: &[Entry]| tokens.iter().find(|t| t.listed.id == id).cloned();
        match self.entries(find) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "nobody is let in");
                None
            }
        }
    }

    /// What `look` sees in the newest list.
    fn entries<T>(&self, look: impl FnOnce(&[Entry]) -> T) -> Result<T, SecurityError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (stamp, tokens) = &mut *known;
        match fs::metadata(&self.path) {
            Ok(metadata) => {
                let now = Stamp::of(&metadata);
                if stamp.as_ref() != Some(&now) {
                    *tokens = self.read()?;
                    *stamp = Some(now);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => tokens.clear(),
            Err(error) => return Err(at(&self.path)(error)),
        }
        Ok(look(tokens))
    }

    fn read(&self) -> Result<Vec<Entry>, SecurityError> {
        let damaged = |reason: String| SecurityError::Damaged {
            path: self.path.clone(),
            reason,
        };
        let text = read(&self.path)?;
        let damaged = |error: serde_json::Error| damaged(error.to_string());
        // What else is there may be of another form.
        let Versioned { version } = serde_json::from_str(&text).map_err(damaged)?;
        check_version(&self.path, version, VERSION)?;
        let kept: Kept = serde_json::from_str(&text).map_err(damaged)?;
        Ok(kept.tokens)
    }

    /// Changes the list; one process at a time.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut Vec<Entry>) -> Result<T, SecurityError>,
    ) -> Result<T, SecurityError> {
        let lock_path = self.path.with_extension("lock");
        let lock = File::create(&lock_path).map_err(at(&lock_path))?;
        lock.lock().map_err(at(&lock_path))?;
        let mut tokens = self.entries(|tokens| tokens.to_vec())?;
        let done = change(&mut tokens)?;
        let kept = Kept {
            version: VERSION,
            tokens,
        };
        let text = serde_json::to_string_pretty(&kept).expect("tokens are plain data");
        write_private(&self.path, text.as_bytes())?;
        Ok(done)
    }
}

fn not_revoked(id: TokenId, listed: &Listed, now: u64) -> Result<(), Refusal> {
    match listed.revoked {
        Some(since) => Err(Refusal::Revoked {
            id,
            seconds: now.saturating_sub(since),
        }),
        None => Ok(()),
    }
}

/// A time that has passed, for people.
fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring() -> (tempfile::TempDir, Keyring, Fingerprint) {
        let directory = tempfile::tempdir().unwrap();
        let keyring = Keyring::at(directory.path());
        (directory, keyring, Fingerprint::of(b"authority"))
    }

    #[test]
    fn a_token_is_good_until_it_ends_or_is_revoked() {
        let (_directory, keyring, authority) = keyring();
        let token = keyring.create(Role::Worker, authority, "", 100, Some(50));
        let token = token.unwrap();
        assert_eq!(keyring.admit(&token, 149), Ok(Role::Worker));
        let refusal = keyring.admit(&token, 150).unwrap_err().to_string();
        assert_eq!(
            refusal,
            format!(
                "the token {} has expired 0 s ago; ask for a new one",
                token.id
            )
        );
        // Who is in stays in.
        assert_eq!(keyring.still_admits(token.id, 1000), Ok(()));
        keyring.revoke(&token.id.to_string(), 200).unwrap();
        keyring.revoke(&token.id.to_string(), 300).unwrap();
        let refusal = keyring.still_admits(token.id, 400).unwrap_err().to_string();
        assert_eq!(
            refusal,
            format!(
                "the token {} was revoked 3 min ago; ask for a new one",
                token.id
            )
        );
        assert!(matches!(
            keyring.admit(&token, 120),
            Err(Refusal::Revoked { .. })
        ));
    }

    #[test]
    fn what_another_process_changes_counts_at_once() {
        let (directory, keyring, authority) = keyring();
        let other = Keyring::at(directory.path());
        assert_eq!(keyring.list().unwrap(), []);
        let token = other
            .create(Role::Viewer, authority, "for Ada", 1, None)
            .unwrap();
        assert_eq!(keyring.admit(&token, 2), Ok(Role::Viewer));
        other.revoke(&token.id.to_string(), 2).unwrap();
        assert!(keyring.admit(&token, 3).is_err());
        let listed = keyring.list().unwrap();
        assert_eq!(
            (listed[0].note.as_str(), listed[0].revoked),
            ("for Ada", Some(2))
        );
    }

    #[test]
    fn a_wrong_secret_an_unknown_token_and_a_damaged_file_let_nobody_in() {
        let (directory, keyring, authority) = keyring();
        let token = keyring
            .create(Role::Operator, authority, "", 1, None)
            .unwrap();
        let mut forged = ClusterToken::new(Role::Operator, authority);
        forged.id = token.id;
        assert_eq!(keyring.admit(&forged, 2), Err(Refusal::Unknown(token.id)));
        let unknown = ClusterToken::new(Role::Operator, authority);
        assert_eq!(
            keyring.admit(&unknown, 2),
            Err(Refusal::Unknown(unknown.id))
        );
        let file = directory.path().join("tokens.json");
        let text = fs::read_to_string(&file).unwrap();
        let secret = token.to_string();
        let secret = secret.split('_').nth(3).unwrap();
        assert!(!text.contains(secret), "secrets are not kept");
        fs::write(&file, &text[..text.len() / 2]).unwrap();
        assert!(keyring.admit(&token, 2).is_err());
        assert!(keyring.revoke(&token.id.to_string(), 3).is_err());
        let error = keyring.list().unwrap_err().to_string();
        assert!(error.contains("is damaged"), "{error}");
    }

    #[test]
    fn the_file_of_a_newer_build_lets_nobody_in_and_stays_as_it_is() {
        let (directory, keyring, authority) = keyring();
        let token = keyring
            .create(Role::Viewer, authority, "", 1, None)
            .unwrap();
        let file = directory.path().join("tokens.json");
        let newer = r#"{"version":2,"tokens":{"of":"another form"}}"#;
        fs::write(&file, newer).unwrap();
        let error = keyring.list().unwrap_err().to_string();
        assert!(
            error.contains("has version 2, this build of cohort knows up to 1; update cohort"),
            "{error}"
        );
        assert!(keyring.admit(&token, 2).is_err());
        assert!(
            keyring
                .create(Role::Viewer, authority, "", 1, None)
                .is_err()
        );
        assert_eq!(fs::read_to_string(&file).unwrap(), newer);
    }

    #[test]
    fn a_role_that_is_written_into_a_token_changes_nothing() {
        let (_directory, keyring, authority) = keyring();
        let token = keyring
            .create(Role::Viewer, authority, "", 1, None)
            .unwrap();
        let mut forged = token;
        forged.role = Role::Operator;
        assert_eq!(keyring.admit(&forged, 2), Ok(Role::Viewer));
    }
}
