//! A connection as it was accepted: plain, or private by TLS; and who is at its other end. It ends by itself where nobody is
//! let in on it for a while.

use std::future::Future;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::breath::Breathing;
use super::strangers::Standing;
use crate::security::{Subject, TokenId};

/// How long a connection may go on on which nobody is let in.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection that was accepted.
#[derive(Debug)]
pub struct Stream {
    line: Line,
    standing: Arc<Standing>,
    /// When a stranger has to go.
    end: Pin<Box<Sleep>>,
}

/// What carries the bytes.
#[derive(Debug)]
pub(super) enum Line {
    /// Everybody on the way can read and change it.
    Plain(Breathing<TcpStream>),
    /// TLS.
    Private(Box<Breathing<TlsStream<TcpStream>>>),
}

/// Who is at the other end. Handlers find it among a request's extensions.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Where it calls from.
    pub address: Option<SocketAddr>,
    /// Of a worker with a certificate, the token by which it came in.
    pub worker: Option<TokenId>,
    /// Whether nobody on the way can read what is said.
    pub private: bool,
    standing: Option<Arc<Standing>>,
}

impl Peer {
    /// Somebody has shown on this connection that he may come in: it may stay.
    pub fn let_in(&self) {
        if let Some(standing) = &self.standing {
            standing.let_in();
        }
    }
}

impl Stream {
    pub(super) fn new(line: Line, standing: Arc<Standing>) -> Self {
        Self {
            line,
            standing,
            end: Box::pin(sleep(PATIENCE)),
        }
    }

    fn tcp(&self) -> &TcpStream {
        match &self.line {
            Line::Plain(stream) => stream.line(),
            Line::Private(stream) => stream.line().get_ref().0,
        }
    }

    /// Whether a stranger has to go; if not, the task is woken when that changes.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.standing.is_known() {
            return Ok(());
        }
        if self.standing.is_unwanted(context) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        match self.end.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Stream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let worker = match &self.line {
            Line::Plain(_) => None,
            // The handshake has checked who signed it.
            Line::Private(stream) => {
                let shown = stream.line().get_ref().1.peer_certificates();
                match shown.and_then(|chain| Subject::of(chain.first()?)) {
                    Some(Subject::Worker(token)) => Some(token),
                    _ => None,
                }
            }
        };
        Peer {
            address: self.tcp().peer_addr().ok(),
            worker,
            private: matches!(self.line, Line::Private(_)),
            standing: Some(self.standing.clone()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        stream.check(context)?;
        match &mut stream.line {
            Line::Plain(stream) => Pin::new(stream).poll_read(context, into),
            Line::Private(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().line {
            Line::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Line::Private(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().line {
            Line::Plain(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
            Line::Private(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.line {
            Line::Plain(stream) => stream.is_write_vectored(),
            Line::Private(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().line {
            Line::Plain(stream) => Pin::new(stream).poll_flush(context),
            Line::Private(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().line {
            Line::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Line::Private(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
