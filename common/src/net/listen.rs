//! The connections of a listener, set up, and only those that say something: one that is opened and then silent is closed
//! after a while and never takes a place among those that are served. Where there is a gate, only those that come through.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, warn};

use super::Stream;
use super::breath::Breathing;
use super::strangers::{Standing, Strangers};
use super::stream::Line;
use crate::process;
use crate::security::Gate;

/// How long a new connection may take to say its first word and to become private.
const SILENT: Duration = Duration::from_secs(30);

/// How long a connection may take nothing of what is sent to it.
#[cfg(target_os = "linux")]
const STUCK: Duration = Duration::from_secs(30);

/// Time until the next try where no connection can be taken: all files that a process may open are open, for example.
const PAUSE: Duration = Duration::from_millis(100);

/// Connections that wait to be served.
const WAITING: usize = 64;

/// The connections of a listener, until nobody takes them any more. With a gate they are private.
pub fn connections(
    listener: TcpListener,
    gate: Option<Gate>,
) -> ReceiverStream<io::Result<Stream>> {
    let (out, connections) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let mut strangers = Strangers::new(process::open_files());
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = out.closed() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let handing = hand_over(stream, gate.clone(), strangers.add(), out.clone());
                    drop(tokio::spawn(handing));
                }
                Err(error) => {
                    warn!(%error, "cannot take a connection");
                    sleep(PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

async fn hand_over(
    stream: TcpStream,
    gate: Option<Gate>,
    standing: Arc<Standing>,
    out: mpsc::Sender<io::Result<Stream>>,
) {
    let unwanted = poll_fn(|context| match standing.is_unwanted(context) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    });
    let line = tokio::select! {
        line = timeout(SILENT, enter(stream, gate)) => line,
        () = unwanted => return debug!("a connection made room for others"),
    };
    match line {
        // After the server has ended nobody takes it.
        Ok(Ok(line)) => drop(out.send(Ok(Stream::new(line, standing))).await),
        Ok(Err(error)) => debug!(%error, "a connection was not opened"),
        Err(_) => debug!("a connection took too long to be opened"),
    }
}

/// Waits for the first word, and makes the connection private where there is a gate.
async fn enter(stream: TcpStream, gate: Option<Gate>) -> io::Result<Line> {
    set_up(&stream)?;
    // A look that takes nothing: `readable` alone may be wrong.
    if stream.peek(&mut [0]).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match gate {
        None => Ok(Line::Plain(Breathing::new(stream))),
        Some(gate) => {
            let private = gate.accept(stream).await?;
            Ok(Line::Private(Box::new(Breathing::new(private))))
        }
    }
}

fn set_up(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // A peer that takes nothing for so long is gone or hangs; whoever speaks HTTP/2 is noticed earlier.
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(STUCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio_stream::StreamExt;
    use tonic::transport::server::Connected;

    use super::*;

    #[tokio::test]
    async fn a_connection_that_is_silent_holds_nobody_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut connections = connections(listener, None);
        let _silent = TcpStream::connect(address).await.unwrap();
        let mut loud = TcpStream::connect(address).await.unwrap();
        loud.write_all(b"x").await.unwrap();
        let served = timeout(SILENT / 2, connections.next()).await.unwrap();
        let served = served.unwrap().unwrap().connect_info();
        assert_eq!(served.address, loud.local_addr().ok());
        assert!(!served.private);
    }
}
