//! A token of a cluster: one word that says who may come in as what, and by which authority the cluster is known.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::files::write_private;
use super::{Fingerprint, Role, SecurityError, random};
use crate::checkpoint::hex;

/// What every token begins with.
const PREFIX: &str = "cohort";

/// By what a token is named in lists and certificates. It is no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(u32);

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl FromStr for TokenId {
    type Err = SecurityError;

    fn from_str(text: &str) -> Result<Self, SecurityError> {
        let id = (text.len() == 8).then(|| u32::from_str_radix(text, 16).ok());
        let wrong = || SecurityError::NoToken(text.into());
        id.flatten().map(Self).ok_or_else(wrong)
    }
}

/// A token as it is printed: `cohort_ROLE_ID_SECRET_FINGERPRINT`.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterToken {
    /// What its bearer is.
    pub role: Role,
    /// Its name.
    pub id: TokenId,
    /// The authority of the cluster.
    pub authority: Fingerprint,
    secret: [u8; 32],
}

impl ClusterToken {
    /// A new one.
    pub fn new(role: Role, authority: Fingerprint) -> Self {
        Self {
            role,
            id: TokenId(u32::from_le_bytes(random())),
            authority,
            secret: random(),
        }
    }

    /// Whether a text means to be such a token.
    pub fn is_meant(text: &str) -> bool {
        text.strip_prefix(PREFIX)
            .is_some_and(|rest| rest.starts_with('_'))
    }

    /// Keeps it in a file that only its owner may read.
    pub fn save(&self, path: &Path) -> Result<(), SecurityError> {
        write_private(path, format!("{self}\n").as_bytes())
    }

    /// What a keyring keeps instead of the secret. The secret has 256 random bits: there is nothing to guess.
    pub(super) fn hash(&self) -> String {
        blake3::hash(&self.secret).to_hex().to_string()
    }
}

impl fmt::Display for ClusterToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secret = hex::encode(&self.secret);
        write!(
            f,
            "{PREFIX}_{}_{}_{secret}_{}",
            self.role, self.id, self.authority
        )
    }
}

// A log must not have the secret.
impl fmt::Debug for ClusterToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterToken({} {})", self.role, self.id)
    }
}

impl FromStr for ClusterToken {
    type Err = SecurityError;

    fn from_str(text: &str) -> Result<Self, SecurityError> {
        let parts: Vec<&str> = text.trim().split('_').collect();
        let [PREFIX, role, id, secret, authority] = parts[..] else {
            return Err(SecurityError::Token(
                "it is not `cohort_ROLE_ID_SECRET_FINGERPRINT`",
            ));
        };
        let damaged =
            || SecurityError::Token("a part of it is missing or changed; copy it again, whole");
        Ok(Self {
            role: role.parse().map_err(|_| damaged())?,
            id: id.parse().map_err(|_| damaged())?,
            authority: Fingerprint::parse(authority).ok_or_else(damaged)?,
            secret: hex::decode(secret).ok_or_else(damaged)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_is_printed_and_keeps_its_secret() {
        let token = ClusterToken::new(Role::Worker, Fingerprint::of(b"a"));
        let text = token.to_string();
        assert!(ClusterToken::is_meant(&text));
        assert_eq!(format!(" {text}\n").parse::<ClusterToken>().unwrap(), token);
        let secret = hex::encode(&token.secret);
        assert!(text.contains(&secret) && !format!("{token:?}").contains(&secret));
        assert_ne!(
            token.hash(),
            ClusterToken::new(Role::Worker, Fingerprint::of(b"a")).hash()
        );
    }

    #[test]
    fn what_is_cut_or_made_up_is_refused() {
        let text = ClusterToken::new(Role::Viewer, Fingerprint::of(b"a")).to_string();
        for end in 0..text.len() {
            assert!(text[..end].parse::<ClusterToken>().is_err(), "{end}");
        }
        assert!(
            text.replace("viewer", "owner")
                .parse::<ClusterToken>()
                .is_err()
        );
        assert!(text.replace("_", "-").parse::<ClusterToken>().is_err());
        assert!("0123456789abcdef".parse::<ClusterToken>().is_err());
    }
}
