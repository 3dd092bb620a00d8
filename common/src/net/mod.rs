//! How both ends of a connection are set up: limits, windows, keepalive, and the token that every call carries.
//! TLS will be decided here too.

use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Status};

use crate::wire::{RUN_KEY, SESSION_KEY};

/// HTTP/2 frame size, on both ends: the setting that matters most for throughput. A chunk and what is said of it fit into
/// one frame; where they do not, the rest is another frame, for which the receiver moves the whole chunk once more.
pub const FRAME: u32 = (256 + 4) << 10;
/// HTTP/2 window of one stream.
pub const STREAM_WINDOW: u32 = 4 << 20;
/// HTTP/2 window of a connection.
pub const CONNECTION_WINDOW: u32 = 8 << 20;
/// Time between keepalive pings, and how long an answer may take: a connection that is cut without a word is given up
/// within the sum of both.
pub const KEEPALIVE: Duration = Duration::from_secs(5);

/// Time between signs of life on an exchange that has nothing to say.
pub const EXCHANGE_BEAT: Duration = Duration::from_millis(500);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a coordinator cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is no address.
    #[error(
        "`{url}` is not an address of a coordinator; expected something like `http://host:7070`"
    )]
    Url {
        /// What was given.
        url: String,
    },
    /// Nobody answers.
    #[error(
        "no coordinator answers at {url}: {reason}; start one with `cohort coordinator`, or name another with `--coordinator`"
    )]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        reason: String,
    },
}

/// Opens a connection of its own: the window of a connection is shared by its streams, so control and bulk traffic
/// should not share one.
pub async fn connect(url: &str) -> Result<Channel, ConnectError> {
    let wrong = || ConnectError::Url { url: url.into() };
    if !url.starts_with("http://") {
        return Err(wrong());
    }
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|_| wrong())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    endpoint.connect().await.map_err(|error| {
        let mut source: &dyn std::error::Error = &error;
        while let Some(inner) = source.source() {
            source = inner;
        }
        ConnectError::Unreachable {
            url: url.into(),
            reason: source.to_string(),
        }
    })
}

/// The other end of such a connection.
pub fn server() -> Server {
    Server::builder()
        .max_frame_size(FRAME)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
}

/// A cluster's shared secret, as the metadata value that calls carry.
#[derive(Clone, Debug)]
pub struct Token(MetadataValue<Ascii>);

impl Token {
    /// Checks a token as read from a file or a variable; surrounding white space does not count.
    pub fn new(text: &str) -> Result<Self, String> {
        let text = text.trim();
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
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
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
