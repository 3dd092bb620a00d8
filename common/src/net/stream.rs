//! A connection as it was accepted: plain, or private by TLS; and who is at its other end.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::security::{Subject, TokenId};

/// A connection that was accepted.
#[derive(Debug)]
pub enum Stream {
    /// Everybody on the way can read and change it.
    Plain(TcpStream),
    /// TLS.
    Private(Box<TlsStream<TcpStream>>),
}

/// Who is at the other end. Handlers find it among a request's extensions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Where it calls from.
    pub address: Option<SocketAddr>,
    /// Of a worker with a certificate, the token by which it came in.
    pub worker: Option<TokenId>,
    /// Whether nobody on the way can read what is said.
    pub private: bool,
}

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Private(stream) => stream.get_ref().0,
        }
    }
}

impl Connected for Stream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let worker = match self {
            Self::Plain(_) => None,
            // The handshake has checked who signed it.
            Self::Private(stream) => {
                let shown = stream.get_ref().1.peer_certificates();
                match shown.and_then(|chain| Subject::of(chain.first()?)) {
                    Some(Subject::Worker(token)) => Some(token),
                    _ => None,
                }
            }
        };
        Peer {
            address: self.tcp().peer_addr().ok(),
            worker,
            private: matches!(self, Self::Private(_)),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, into),
            Self::Private(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Private(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
            Self::Private(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Private(stream) => stream.is_write_vectored(),
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
