//! How both ends of a connection are set up: limits, windows, keepalive, TLS, and the token that every call carries.

mod listen;
mod strangers;
mod stream;

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tonic::{Request, Status};

use crate::security::{ClusterToken, Trust, Whom};
use crate::wire::{RUN_KEY, SESSION_KEY};

pub use listen::connections;
pub use stream::{Peer, Stream};

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

/// Calls at a time on one connection.
const STREAMS: u32 = 256;

/// Time between signs of life on an exchange that has nothing to say.
pub const EXCHANGE_BEAT: Duration = Duration::from_millis(500);

/// Where a coordinator listens if nothing is said.
const DEFAULT_PORT: u16 = 7070;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a coordinator cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is no address.
    #[error(
        "`{url}` is not an address of a coordinator; expected something like `https://host:7070`, or `http://` where it is \
         not encrypted"
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
    /// Somebody answers, but not as one of the cluster.
    #[error("no private connection to {url}: {reason}")]
    NotPrivate {
        /// Where.
        url: String,
        /// Why.
        reason: String,
    },
    /// Nothing says by what the cluster is known.
    #[error(
        "{0} is encrypted, and nothing here says by which authority that cluster is known; give a token that `cohort init` \
         or `cohort token create` printed there, with --token-file or COHORT_TOKEN"
    )]
    Stranger(String),
    /// A token that must not be seen would be.
    #[error("this token is for an encrypted connection; use `https://` instead of {0}")]
    Unencrypted(String),
}

/// Opens a connection of its own: the window of a connection is shared by its streams, so control and bulk traffic
/// should not share one.
pub async fn connect(
    url: &str,
    trust: Option<&Trust>,
    whom: Whom,
) -> Result<Channel, ConnectError> {
    let wrong = || ConnectError::Url { url: url.into() };
    let private = match url.split_once("://") {
        Some(("http", _)) => false,
        Some(("https", _)) => true,
        _ => return Err(wrong()),
    };
    let trust = match (private, trust) {
        (true, None) => return Err(ConnectError::Stranger(url.into())),
        (false, Some(_)) => return Err(ConnectError::Unencrypted(url.into())),
        (_, trust) => trust.cloned(),
    };
    // TLS is the connector's affair; the channel above it need not know.
    let endpoint = Endpoint::from_shared(url.replacen("https://", "http://", 1))
        .map_err(|_| wrong())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    let connected = match trust {
        None => endpoint.connect().await,
        Some(trust) => {
            let connector = move |uri: Uri| connect_privately(uri, trust.clone(), whom);
            endpoint
                .connect_with_connector(tower::service_fn(connector))
                .await
        }
    };
    connected.map_err(|error| {
        let mut source: &(dyn std::error::Error + 'static) = &error;
        loop {
            if let Some(error) = of_handshake(source) {
                return ConnectError::NotPrivate {
                    url: url.into(),
                    reason: in_words(error),
                };
            }
            match source.source() {
                Some(inner) => source = inner,
                None => break,
            }
        }
        ConnectError::Unreachable {
            url: url.into(),
            reason: source.to_string(),
        }
    })
}

/// What TLS says, which comes within an error of input and output.
fn of_handshake<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let inner = error.downcast_ref::<io::Error>()?.get_ref()?;
    inner.downcast_ref()
}

/// Why a handshake failed, and what to do.
fn in_words(error: &rustls::Error) -> String {
    use rustls::{AlertDescription, CertificateError, Error};
    match error {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "it belongs to another cluster than this token or certificate; ask for a token of that cluster".into()
        }
        Error::InvalidCertificate(
            CertificateError::ExpiredContext { .. } | CertificateError::NotValidYetContext { .. },
        ) => format!("{error}; compare the clocks of both machines"),
        Error::InvalidMessage(_) => "it does not speak TLS; use `http://`".into(),
        Error::AlertReceived(
            AlertDescription::CertificateExpired
            | AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError,
        ) => format!("{error}: it does not accept this machine's certificate; join again with a token"),
        _ => error.to_string(),
    }
}

async fn connect_privately(
    uri: Uri,
    trust: Trust,
    whom: Whom,
) -> io::Result<TokioIo<client::TlsStream<TcpStream>>> {
    let port = uri.port_u16().unwrap_or(DEFAULT_PORT);
    let host = uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let private = async {
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        trust.connect(stream, whom).await
    };
    let private = timeout(CONNECT_TIMEOUT, private).await;
    private
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map(TokioIo::new)
}

/// The other end of such a connection.
pub fn server() -> Server {
    Server::builder()
        .max_frame_size(FRAME)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS)
}

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
