//! How both ends of a connection are set up: limits, windows, keepalive, TLS, and the token that every call carries.

mod breath;
mod connect;
mod listen;
mod places;
mod strangers;
mod stream;
mod token;

use std::time::Duration;

use tonic::transport::Server;

pub use connect::{ConnectError, connect};
pub use listen::connections;
pub use places::{Found, LEADER_KEY, Places, StandsBy, standing_by};
pub use stream::{Peer, Stream};
pub use token::{Credentials, Token};

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
