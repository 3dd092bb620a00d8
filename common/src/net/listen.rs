//! The connections of a listener, set up, and only those that say something: one that is opened and then silent is closed
//! after a while and never takes a place among those that are served. Where there is a gate, only those that come through.

use std::io;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, warn};

use super::Stream;
use crate::security::Gate;

/// How long a new connection may be silent, and how long it may take to become private.
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
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = out.closed() => return,
            };
            match accepted {
                Ok((stream, _)) => drop(tokio::spawn(hand_over(stream, gate.clone(), out.clone()))),
                Err(error) => {
                    warn!(%error, "cannot take a connection");
                    sleep(PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

async fn hand_over(stream: TcpStream, gate: Option<Gate>, out: mpsc::Sender<io::Result<Stream>>) {
    // A look that takes nothing: `readable` alone may be wrong.
    let mut first = [0];
    let word = timeout(SILENT, stream.peek(&mut first));
    // One that is gone already has no options any more.
    if set_up(&stream).is_err() || !matches!(word.await, Ok(Ok(1))) {
        return;
    }
    let stream = match gate {
        None => Stream::Plain(stream),
        Some(gate) => match timeout(SILENT, gate.accept(stream)).await {
            Ok(Ok(stream)) => Stream::Private(Box::new(stream)),
            Ok(Err(error)) => return debug!(%error, "a connection did not become private"),
            Err(_) => return debug!("a connection took too long to become private"),
        },
    };
    // After the server has ended nobody takes it.
    let _ = out.send(Ok(stream)).await;
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
        let Stream::Plain(served) = served.unwrap().unwrap() else {
            panic!("there is no gate");
        };
        assert_eq!(served.peer_addr().unwrap(), loud.local_addr().unwrap());
        assert!(served.nodelay().unwrap());
    }
}
