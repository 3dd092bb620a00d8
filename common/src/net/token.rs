//! What calls carry: the version of the protocol, the cluster's token, the session, the run.

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::protocol::{PROTOCOL_KEY, Speaker};
use crate::security::{ClusterToken, Trust};
use crate::wire::{RUN_KEY, SESSION_KEY};

/// A cluster's shared secret, as the metadata value that calls carry.
#[derive(Clone, Debug)]
pub struct Token(MetadataValue<Ascii>);

impl Token {
    /// Checks a token as read from a file or a variable; surrounding white space does not count.
    pub fn new(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if ClusterToken::is_meant(text) {
            let token = text.parse::<ClusterToken>();
            token.map_err(|error| error.to_string())?;
        }
        if text.len() < 16 {
            return Err(format!(
                "the token has {} characters; use at least 16, for example from `openssl rand -hex 32`",
                text.len()
            ));
        }
        let value = format!("Bearer {text}").parse().map_err(|_| {
            "the token has characters that a header cannot carry; use letters and digits".to_owned()
        })?;
        let mut value: MetadataValue<Ascii> = value;
        value.set_sensitive(true);
        Ok(Self(value))
    }

    /// The token of an initialised cluster that it is, if it is one.
    pub fn of_cluster(&self) -> Option<ClusterToken> {
        Self::shown(self.0.as_encoded_bytes())
    }

    /// How its bearer knows the cluster, if it is a token of an initialised one.
    pub fn trust(&self) -> Option<Trust> {
        let token = self.of_cluster()?;
        Some(Trust::in_authority(token.authority))
    }

    /// The token of an initialised cluster in the bytes of a header.
    pub fn shown(header: &[u8]) -> Option<ClusterToken> {
        let text = std::str::from_utf8(header).ok()?.strip_prefix("Bearer ")?;
        text.parse().ok()
    }

    /// Whether a request's `authorization` carries this token. Takes the same time wherever they differ.
    pub fn admits(&self, found: Option<&MetadataValue<Ascii>>) -> bool {
        self.admits_header(found.map_or(&[][..], |v| v.as_encoded_bytes()))
    }

    /// The same for the bytes of a header.
    pub fn admits_header(&self, found: &[u8]) -> bool {
        blake3::hash(found) == blake3::hash(self.0.as_encoded_bytes())
    }

    /// A key that only those who have the token can make, for one purpose, which `context` names.
    pub fn derive_key(&self, context: &str) -> [u8; 32] {
        blake3::derive_key(context, self.0.as_encoded_bytes())
    }
}

/// Adds to each request who is asking.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// The cluster's token, if it has one.
    pub token: Option<Token>,
    /// The worker's session.
    pub session: Option<u64>,
    /// The run of an exchange stream.
    pub run: Option<String>,
    /// By what the cluster is known, and the caller to it, where connections are private. Not part of a request.
    pub trust: Option<Trust>,
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        let version = Speaker::here().header();
        metadata.insert(
            PROTOCOL_KEY,
            version.parse().expect("digits, dots and letters"),
        );
        if let Some(Token(value)) = &self.token {
            metadata.insert("authorization", value.clone());
        }
        if let Some(session) = self.session {
            metadata.insert(SESSION_KEY, session.into());
        }
        if let Some(run) = &self.run {
            let run = run
                .parse()
                .map_err(|_| Status::invalid_argument("the run's name is no header value"))?;
            metadata.insert(RUN_KEY, run);
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_is_admitted() {
        let token = Token::new(" 0123456789abcdef\n").unwrap();
        let same: MetadataValue<Ascii> = "Bearer 0123456789abcdef".parse().unwrap();
        let other: MetadataValue<Ascii> = "Bearer 0123456789abcdeg".parse().unwrap();
        assert!(token.admits(Some(&same)));
        assert!(!token.admits(Some(&other)));
        assert!(!token.admits(None));
    }

    #[test]
    fn short_tokens_are_refused() {
        assert!(Token::new("secret").unwrap_err().contains("6 characters"));
    }
}
