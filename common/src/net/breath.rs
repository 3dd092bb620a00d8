//! A line whose reader pauses: after each [`BREATH`] bytes whoever waits for what was read has his turn. What has come is then
//! checked and summed while it is still in the processor's cache; read without a pause, megabytes of it go to memory and back.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::FRAME;

/// Bytes between two pauses: about a chunk of a gradient.
const BREATH: usize = FRAME as usize;

/// A line that is read so.
#[derive(Debug)]
pub(super) struct Breathing<L> {
    line: L,
    /// Bytes since the last pause.
    read: usize,
}

impl<L> Breathing<L> {
    pub fn new(line: L) -> Self {
        Self { line, read: 0 }
    }

    pub fn line(&self) -> &L {
        &self.line
    }
}

impl<L: AsyncRead + Unpin> AsyncRead for Breathing<L> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { line, read } = self.get_mut();
        if *read >= BREATH {
            *read = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = into.filled().len();
        let polled = Pin::new(line).poll_read(context, into);
        match polled {
            Poll::Ready(_) => *read += into.filled().len() - before,
            Poll::Pending => *read = 0,
        }
        polled
    }
}

impl<L: AsyncWrite + Unpin> AsyncWrite for Breathing<L> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().line).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().line).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.line.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().line).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().line).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, repeat};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A line that never ends would otherwise never be left.
    #[test]
    fn a_reader_pauses_and_is_called_again() {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let mut context = Context::from_waker(&waker);
        let mut line = Breathing::new(repeat(7));
        for pause in 1..4 {
            let mut bytes = 0;
            loop {
                let mut memory = [0; 10_000];
                let mut into = ReadBuf::new(&mut memory);
                match Pin::new(&mut line).poll_read(&mut context, &mut into) {
                    Poll::Ready(read) => read.unwrap(),
                    Poll::Pending => break,
                }
                bytes += into.filled().len();
                assert!(into.filled().iter().all(|byte| *byte == 7));
            }
            assert!((BREATH..BREATH + 10_000).contains(&bytes), "{bytes}");
            assert_eq!(woken.0.load(Ordering::Relaxed), pause);
        }
    }

    #[tokio::test]
    async fn all_that_was_written_is_read() {
        let (mut out, line) = duplex(1000);
        let sent: Vec<u8> = (0..3 * BREATH + 5).map(|i| (i % 251) as u8).collect();
        let expected = sent.clone();
        tokio::spawn(async move { out.write_all(&sent).await });
        let mut read = Vec::new();
        Breathing::new(line).read_to_end(&mut read).await.unwrap();
        assert_eq!(read, expected);
    }
}
