//! Connections that are opened: plain, or private to whoever is known by a certificate of the cluster's authority; and why one
//! cannot be opened, as a sentence.

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client;
use tonic::transport::{Channel, Endpoint, Uri};

use super::breath::Breathing;
use super::{CONNECTION_WINDOW, FRAME, KEEPALIVE, STREAM_WINDOW};
use crate::security::{Trust, Whom};

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
    /// All that answer stand by.
    #[error("no coordinator leads now: {}; one of them takes over when the lease of the one before has run out", sayings(.0))]
    NobodyLeads(Vec<(String, String)>),
    /// A token that must not be seen would be.
    #[error("this token is for an encrypted connection; use `https://` instead of {0}")]
    Unencrypted(String),
}

/// What those say who stand by.
fn sayings(of: &[(String, String)]) -> String {
    let sayings: Vec<String> = of
        .iter()
        .map(|(url, says)| format!("{url}: {says}"))
        .collect();
    sayings.join("; ")
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
    let endpoint = Endpoint::from_shared(url.replacen("https://", "http://", 1))
        .map_err(|_| wrong())?
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    // TLS is the connector's affair; the channel above it need not know.
    let connected = match trust {
        None => {
            let connector = tower::service_fn(|uri| within(open(uri)));
            endpoint.connect_with_connector(connector).await
        }
        Some(trust) => {
            let connector = move |uri: Uri| within(open_privately(uri, trust.clone(), whom));
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

/// A line, unless opening it takes too long; ready to carry HTTP.
async fn within<L>(
    opening: impl Future<Output = io::Result<L>>,
) -> io::Result<TokioIo<Breathing<L>>> {
    let opened = timeout(CONNECT_TIMEOUT, opening).await;
    let line = opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    Ok(TokioIo::new(Breathing::new(line)))
}

async fn open(uri: Uri) -> io::Result<TcpStream> {
    let port = uri.port_u16().unwrap_or(DEFAULT_PORT);
    let host = uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn open_privately(
    uri: Uri,
    trust: Trust,
    whom: Whom,
) -> io::Result<client::TlsStream<TcpStream>> {
    trust.connect(open(uri).await?, whom).await
}
