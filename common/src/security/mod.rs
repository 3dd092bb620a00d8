//! Who is who in a cluster that reaches beyond one machine: a certificate authority of its own, tokens with roles, and TLS
//! between all of its processes.
//!
//! In reading order: `role` (what somebody may do), `token` (how somebody is let in for the first time), `keyring` (the
//! tokens that a coordinator knows), `authority` (who signs certificates, and what they say), `credential` (the key and
//! the certificate of a process, and their renewal), `tls` (both ends of a connection).
//!
//! A process is known by a certificate of the cluster's authority, never by its address or host name: certificates carry
//! names of the cluster's own, such as `coordinator.cohort.internal`. A machine may move, and nothing has to be issued
//! again. The authority itself is known by the SHA-256 of its certificate, which every token carries.
//!
//! ```text
//! security/authority.pem       the authority's certificate
//! security/authority.key       its private key; whoever has it is the cluster
//! security/cluster.json        names of the coordinator for browsers
//! security/tokens.json         the tokens' hashes, roles and ends
//! security/operator.token      a token for clients on this machine
//! security/worker.token        a token for workers on this machine
//! ```

mod authority;
mod credential;
mod files;
mod keyring;
mod role;
mod tls;
mod token;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::checkpoint::hex;

pub use authority::{Authority, Certified, Subject};
pub use credential::{Credential, Request};
pub use keyring::{Keyring, Listed, Refusal};
pub use role::Role;
pub use tls::{Gate, Trust, Whom};
pub use token::{ClusterToken, TokenId};

/// What can go wrong with keys, certificates and tokens.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    /// A file.
    #[error("cannot use `{}`: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("`{}` is damaged: {reason}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file is of a newer build.
    #[error(
        "`{}` has version {found}, this build of cohort knows up to {known}; update cohort",
        path.display()
    )]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version of this build.
        known: u32,
    },
    /// There is an authority already.
    #[error(
        "`{}` holds the authority of a cluster already; `cohort token create` makes tokens of it",
        .0.display()
    )]
    Initialised(PathBuf),
    /// A name that no certificate can carry.
    #[error("`{0}` is no host name and no address that a certificate can carry")]
    Name(String),
    /// A certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(String),
    /// A text is no token of a cluster.
    #[error("this is no token of a cluster: {0}")]
    Token(&'static str),
    /// There is no such token.
    #[error("there is no token `{0}`; `cohort token ls` lists them")]
    NoToken(String),
}

/// The SHA-256 of an authority's certificate, by which a cluster is known.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a certificate in DER.
    pub fn of(certificate: &[u8]) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        Self(digest.as_ref().try_into().expect("32 bytes"))
    }

    fn parse(text: &str) -> Option<Self> {
        hex::decode(text).map(Self)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Everything that a coordinator of an initialised home needs to know who is who.
#[derive(Debug)]
pub struct Security {
    /// Who signs.
    pub authority: Authority,
    /// Who is let in.
    pub keyring: Keyring,
}

impl Security {
    /// Whether a directory holds the authority of a cluster.
    pub fn is_in(directory: &Path) -> bool {
        directory.join(authority::KEY).exists()
    }

    /// Opens what [`Security::create`] made.
    pub fn open(directory: &Path) -> Result<Self, SecurityError> {
        Ok(Self {
            authority: Authority::open(directory)?,
            keyring: Keyring::at(directory),
        })
    }

    /// Makes an authority whose coordinator is also known to browsers by `names`, without any token. `now` is in seconds
    /// since the epoch, as all times here.
    ///
    /// # Errors
    /// [`SecurityError::Initialised`] where there is one already; names that are none.
    pub fn create(directory: &Path, names: &[String], now: u64) -> Result<Self, SecurityError> {
        if Self::is_in(directory) {
            return Err(SecurityError::Initialised(directory.to_owned()));
        }
        files::make_private(directory)?;
        Ok(Self {
            authority: Authority::create(directory, names, now)?,
            keyring: Keyring::at(directory),
        })
    }
}

/// Refuses a file of a newer build.
fn check_version(path: &Path, found: u32, known: u32) -> Result<(), SecurityError> {
    match found <= known {
        true => Ok(()),
        false => Err(SecurityError::Newer {
            path: path.to_owned(),
            found,
            known,
        }),
    }
}

/// Random bytes that nobody can guess.
fn random<const N: usize>() -> [u8; N] {
    use ring::rand::SecureRandom;
    let mut bytes = [0; N];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .expect("the system has random numbers");
    bytes
}
