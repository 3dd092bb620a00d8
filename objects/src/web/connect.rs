//! Opens connections: names are resolved here, each address passes the guard, and TLS stands around what is not plain.
//!
//! Authorities are those that browsers trust, and in addition whoever the file in SSL_CERT_FILE names, for stores of one's own.
//! Proxies are not used.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tower::Service;

use crate::guard::Reach;

/// More certificate authorities, as PEM.
const AUTHORITIES: &str = "SSL_CERT_FILE";
/// Addresses of a name that are tried.
const ADDRESSES: usize = 4;

/// Opens connections.
#[derive(Clone, Debug)]
pub struct Connector {
    reach: Reach,
    plaintext: bool,
    patience: Duration,
}

/// That a connection is not opened, and never will be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

impl Connector {
    pub fn new(reach: Reach, plaintext: bool, patience: Duration) -> Self {
        Self {
            reach,
            plaintext,
            patience,
        }
    }

    async fn open(self, uri: Uri) -> io::Result<Line> {
        let host = uri.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let private = uri.scheme_str() == Some("https");
        if !private && !self.plaintext {
            return Err(refused(format!(
                "`{host}` would be called without TLS, where everybody on the way could read and change what is said; \
                 AWS_ALLOW_HTTP=true, or AZURE_ALLOW_HTTP=true, allows it"
            )));
        }
        let port = uri.port_u16().unwrap_or(if private { 443 } else { 80 });
        let stream = self.dial(host, port).await?;
        // Requests are small and wait for their answers.
        stream.set_nodelay(true)?;
        if !private {
            return Ok(Line::Plain(stream));
        }
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| refused(format!("`{host}` is no name that a certificate could have")))?;
        let handshake = TlsConnector::from(config()?).connect(name, stream);
        let stream = timeout(self.patience, handshake).await;
        Ok(Line::Private(Box::new(stream.map_err(|_| late())??)))
    }

    async fn dial(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let found = timeout(self.patience, lookup_host((host, port))).await;
        let found: Vec<SocketAddr> = found.map_err(|_| late())??.collect();
        let mut last = io::Error::new(io::ErrorKind::NotFound, format!("`{host}` has no address"));
        for address in found.into_iter().take(ADDRESSES) {
            if let Some(why) = self.reach.refusal(address.ip()) {
                return Err(refused(format!(
                    "`{host}` leads to {}, which is not called for others: {why}",
                    address.ip()
                )));
            }
            match timeout(self.patience, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = error,
                Err(_) => last = late(),
            }
        }
        Err(last)
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no connection came about in time")
}

fn refused(why: String) -> io::Error {
    io::Error::other(Refused(why))
}

/// How TLS is spoken, found out once.
fn config() -> io::Result<Arc<ClientConfig>> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(config.clone());
    }
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    if let Some(file) = std::env::var_os(AUTHORITIES).filter(|file| !file.is_empty()) {
        let unusable = |why: &dyn std::fmt::Display| {
            let file = file.to_string_lossy();
            refused(format!(
                "{AUTHORITIES} names `{file}`, which cannot be used: {why}"
            ))
        };
        let pem = std::fs::read(&file).map_err(|error| unusable(&error))?;
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| unusable(&error))?;
            roots.add(certificate).map_err(|error| unusable(&error))?;
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has the versions of TLS")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(CONFIG.get_or_init(|| Arc::new(config)).clone())
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Line>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TokioIo<Line>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.open(uri).await.map(TokioIo::new) })
    }
}

/// An open connection.
#[derive(Debug)]
pub enum Line {
    /// Everybody on the way can read and change it.
    Plain(TcpStream),
    /// TLS.
    Private(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Connection for Line {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Line {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Private(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, data),
            Self::Private(stream) => Pin::new(stream).poll_write(context, data),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Private(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Private(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
