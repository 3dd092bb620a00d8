//! The body of an answer, which ends with an error where its next piece does not come in time.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

/// Any error.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body that is waited for, but not for ever.
#[derive(Debug)]
pub struct Patient<B> {
    body: B,
    idle: Duration,
    /// When it is too late, while something is waited for. Who reads slowly is not held against the server.
    late: Option<Pin<Box<Sleep>>>,
}

impl<B> Patient<B> {
    /// Waits as long as that for each piece.
    pub fn new(body: B, idle: Duration) -> Self {
        Self {
            body,
            idle,
            late: None,
        }
    }
}

impl<B> Body for Patient<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            self.late = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let idle = self.idle;
        let late = self.late.get_or_insert_with(|| Box::pin(sleep(idle)));
        match late.as_mut().poll(context) {
            Poll::Ready(()) => {
                let text = format!("nothing came for {} s", idle.as_secs_f64());
                let error = io::Error::new(io::ErrorKind::TimedOut, text);
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
