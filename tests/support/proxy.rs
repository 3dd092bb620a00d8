//! A bad network between a worker and its coordinator: a TCP proxy in the test's process. It delays, holds, cuts and
//! damages what passes, while it passes.
//!
//! A worker has several connections: one for control, one for gradients, one for bulk data. The proxy treats them alike
//! but counts the bytes of each, so that a test can act in the middle of a gradient.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Bytes in one read.
const CHUNK: usize = 16 << 10;
/// Bytes that one direction of a connection holds while they are delayed.
const MAX_HELD: usize = 4 << 20;
/// Connections at a time; more are refused. A worker has four.
const MAX_CONNECTIONS: usize = 32;
/// How long a thread waits before it looks at the controls again.
const TICK: Duration = Duration::from_millis(20);

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the worker to the coordinator.
    Up,
    /// From the coordinator to the worker.
    Down,
}

/// What happens to the byte at the chosen place, or at its moment.
pub enum Deed {
    /// Something is called before the byte is passed on.
    Call(Box<dyn FnOnce() + Send>),
    /// Its lowest bit is flipped.
    Flip,
    /// It and so many bytes in all are left out.
    Drop(usize),
    /// Everything before it is passed on, then the connection is closed.
    Truncate,
}

/// A proxy; it ends when it is dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    port: u16,
}

struct Shared {
    upstream: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    stalled: bool,
    refusing: bool,
    delay: [Duration; 2],
    /// Bytes per second of a direction, all connections together.
    rate: [Option<u64>; 2],
    /// When the next byte of a direction may go, by its rate.
    free: [Option<Instant>; 2],
    trap: Option<Trap>,
    /// The last deed is not done yet.
    undone: bool,
    connections: HashMap<u64, Connection>,
    opened: u64,
    /// Bytes in each direction, of all connections.
    carried: [u64; 2],
    /// All that passes, while somebody listens.
    overheard: Option<Vec<u8>>,
}

/// A deed that waits for its byte. The first connection that has carried so many bytes since then has it done to it.
struct Trap {
    direction: Direction,
    after: u64,
    deed: Deed,
}

/// An open connection.
struct Connection {
    ends: [TcpStream; 2],
    /// Bytes in each direction since the trap was set.
    since_trap: [u64; 2],
}

impl Proxy {
    /// Listens on a free port and passes everything on to `upstream`, as `host:port`.
    pub fn new(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared {
            upstream: upstream.into(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || accept(&accepting, &listener));
        Self { shared, port }
    }

    /// Where a worker finds the coordinator.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Holds everything back, in both directions, and closes nothing, as a cable that is pulled.
    pub fn stall(&self) {
        self.set(|state| state.stalled = true);
    }

    /// Passes on what was held back, and everything after it, undamaged.
    pub fn pass(&self) {
        self.set(|state| {
            state.stalled = false;
            state.refusing = false;
            state.delay = [Duration::ZERO; 2];
            state.rate = [None; 2];
            state.free = [None; 2];
        });
    }

    /// A slow link: each byte comes so much later, and only so many bytes a second.
    pub fn slow(&self, delay: Duration, bytes_per_second: u64) {
        self.set(|state| {
            state.delay = [delay; 2];
            state.rate = [Some(bytes_per_second); 2];
        });
    }

    /// Closes all connections.
    pub fn cut(&self) {
        self.set(State::cut);
    }

    /// Accepts no new connection until [`pass`](Self::pass).
    pub fn refuse(&self) {
        self.set(|state| state.refusing = true);
    }

    /// Does something to the byte that comes `after` bytes from now, counted on each connection by itself: 100,000 bytes
    /// are only ever carried by a gradient, a shard or a state.
    pub fn at(&self, direction: Direction, after: u64, deed: Deed) {
        self.set(|state| {
            for connection in state.connections.values_mut() {
                connection.since_trap = [0; 2];
            }
            state.undone = true;
            state.trap = Some(Trap {
                direction,
                after,
                deed,
            });
        });
    }

    /// Bytes that have come so far from the worker, and from the coordinator.
    pub fn carried(&self) -> [u64; 2] {
        self.shared.lock().carried
    }

    /// Keeps all that passes from now on.
    pub fn eavesdrop(&self) {
        self.set(|state| state.overheard = Some(Vec::new()));
    }

    /// What has passed since.
    pub fn overheard(&self) -> Vec<u8> {
        self.shared.lock().overheard.clone().unwrap_or_default()
    }

    /// Waits until the deed is done; gives the moment at which the wait ended.
    pub fn wait_for_deed(&self, deadline: Duration) -> Instant {
        let (state, waited) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), deadline, |state| state.undone)
            .expect(POISON);
        drop(state);
        assert!(!waited.timed_out(), "the bytes never came");
        Instant::now()
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.lock());
        self.shared.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.set(|state| {
            state.closed = true;
            state.cut();
        });
        // Wakes the thread that accepts.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

const POISON: &str = "no thread panics while it holds this lock";

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(POISON)
    }
}

impl State {
    fn cut(&mut self) {
        for connection in self.connections.values() {
            for end in &connection.ends {
                // It may be closed already.
                let _ = end.shutdown(Shutdown::Both);
            }
        }
        self.connections.clear();
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    loop {
        let Ok((worker, _)) = listener.accept() else {
            return;
        };
        let mut state = shared.lock();
        if state.closed {
            return;
        }
        if state.refusing || state.connections.len() >= MAX_CONNECTIONS {
            continue;
        }
        // The coordinator may be dead; then the worker's connection is closed, as its own would be refused.
        let Ok(coordinator) = TcpStream::connect(&shared.upstream) else {
            continue;
        };
        for stream in [&worker, &coordinator] {
            stream.set_nodelay(true).expect("a socket's option");
        }
        let clone = |stream: &TcpStream| stream.try_clone().expect("a socket can be cloned");
        let id = state.opened;
        state.opened += 1;
        let connection = Connection {
            ends: [clone(&worker), clone(&coordinator)],
            since_trap: [0; 2],
        };
        state.connections.insert(id, connection);
        drop(state);
        let ways = [
            (Direction::Up, clone(&worker), clone(&coordinator)),
            (Direction::Down, coordinator, worker),
        ];
        for (direction, from, to) in ways {
            let pump = Pump {
                shared: shared.clone(),
                id,
                direction,
                held: VecDeque::new(),
                held_bytes: 0,
                dropping: 0,
            };
            std::thread::spawn(move || pump.run(from, to));
        }
    }
}

/// One direction of a connection.
struct Pump {
    shared: Arc<Shared>,
    id: u64,
    direction: Direction,
    held: VecDeque<(Instant, Vec<u8>)>,
    held_bytes: usize,
    /// Bytes that are still to be left out.
    dropping: usize,
}

impl Pump {
    fn run(mut self, mut from: TcpStream, mut to: TcpStream) {
        // Whatever ends it, both ends are closed: that is what the endpoints of a broken connection see.
        let _ = self.carry(&mut from, &mut to);
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
        self.shared.lock().connections.remove(&self.id);
    }

    fn carry(&mut self, from: &mut TcpStream, to: &mut TcpStream) -> std::io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            self.while_stalled()?;
            let wait = self.deliver(to)?;
            if self.held_bytes >= MAX_HELD {
                std::thread::sleep(wait);
                continue;
            }
            from.set_read_timeout(Some(wait))?;
            match from.read(&mut buffer) {
                Ok(0) => return self.finish(to),
                Ok(bytes) => {
                    let mut state = self.shared.lock();
                    state.carried[self.direction as usize] += bytes as u64;
                    let delay = state.delay[self.direction as usize];
                    if let Some(overheard) = &mut state.overheard {
                        overheard.extend_from_slice(&buffer[..bytes]);
                    }
                    drop(state);
                    self.held_bytes += bytes;
                    let bytes = buffer[..bytes].to_vec();
                    self.held.push_back((Instant::now() + delay, bytes));
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits as long as nothing passes.
    fn while_stalled(&self) -> std::io::Result<()> {
        let state = self
            .shared
            .changed
            .wait_while(self.shared.lock(), |state| {
                state.stalled && state.connections.contains_key(&self.id)
            })
            .expect(POISON);
        match state.connections.contains_key(&self.id) {
            true => Ok(()),
            false => Err(ErrorKind::ConnectionAborted.into()),
        }
    }

    /// Passes on what is due; gives the time for which nothing else will be.
    fn deliver(&mut self, to: &mut TcpStream) -> std::io::Result<Duration> {
        while let Some((due, _)) = self.held.front() {
            let now = Instant::now();
            if *due > now {
                return Ok((*due - now).clamp(Duration::from_millis(1), TICK));
            }
            let (_, bytes) = self.held.pop_front().expect("just seen");
            self.held_bytes -= bytes.len();
            self.pay(bytes.len());
            self.pass(bytes, to)?;
            // A stall may have begun meanwhile.
            self.while_stalled()?;
        }
        Ok(TICK)
    }

    /// The sender has closed: delivers the rest.
    fn finish(&mut self, to: &mut TcpStream) -> std::io::Result<()> {
        while !self.held.is_empty() {
            self.while_stalled()?;
            let wait = self.deliver(to)?;
            std::thread::sleep(wait.min(TICK));
        }
        // A cable that is pulled does not tell that the other side is gone, either.
        self.while_stalled()
    }

    /// Waits until the rate allows so many bytes.
    fn pay(&self, bytes: usize) {
        let until = {
            let mut state = self.shared.lock();
            let Some(rate) = state.rate[self.direction as usize] else {
                return;
            };
            let now = Instant::now();
            let free = state.free[self.direction as usize].map_or(now, |free| free.max(now));
            let until = free + Duration::from_secs_f64(bytes as f64 / rate as f64);
            state.free[self.direction as usize] = Some(until);
            until
        };
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }

    /// Passes bytes on, damaged if the trap is among them.
    fn pass(&mut self, mut bytes: Vec<u8>, to: &mut TcpStream) -> std::io::Result<()> {
        let dropped = self.dropping.min(bytes.len());
        bytes.drain(..dropped);
        self.dropping -= dropped;
        let Some((deed, place)) = self.sprung(bytes.len()) else {
            return to.write_all(&bytes);
        };
        let mut truncated = false;
        match deed {
            Deed::Call(call) => call(),
            Deed::Flip => bytes[place] ^= 1,
            Deed::Drop(count) => {
                let here = count.min(bytes.len() - place);
                bytes.drain(place..place + here);
                self.dropping = count - here;
            }
            Deed::Truncate => {
                bytes.truncate(place);
                truncated = true;
            }
        }
        self.shared.lock().undone = false;
        self.shared.changed.notify_all();
        to.write_all(&bytes)?;
        match truncated {
            true => Err(ErrorKind::ConnectionAborted.into()),
            false => Ok(()),
        }
    }

    /// The deed whose byte is among the next `bytes`, and where.
    fn sprung(&self, bytes: usize) -> Option<(Deed, usize)> {
        let mut state = self.shared.lock();
        let connection = state.connections.get_mut(&self.id)?;
        let before = connection.since_trap[self.direction as usize];
        connection.since_trap[self.direction as usize] += bytes as u64;
        let hit = |trap: &mut Trap| {
            trap.direction == self.direction
                && (before..before + bytes as u64).contains(&trap.after)
        };
        let trap = state.trap.take_if(hit)?;
        Some((trap.deed, (trap.after - before) as usize))
    }
}

#[test]
fn what_passes_is_what_was_sent_until_it_is_damaged() {
    let server = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let proxy = Proxy::new(&server.local_addr().expect("bound").to_string());
    let connect = || {
        let client = TcpStream::connect(("127.0.0.1", proxy.port)).expect("the proxy listens");
        let (peer, _) = server.accept().expect("the proxy connects");
        peer.set_read_timeout(Some(Duration::from_secs(20)))
            .expect("an option");
        (client, peer)
    };
    let sent: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
    let (mut client, mut peer) = connect();
    let mut through = |client: &mut TcpStream, bytes: usize| {
        client.write_all(&sent).expect("the proxy reads");
        let mut got = vec![0; bytes];
        peer.read_exact(&mut got).expect("the proxy passes on");
        got
    };
    assert!(through(&mut client, sent.len()) == sent);
    proxy.at(Direction::Up, 40_000, Deed::Flip);
    let got = through(&mut client, sent.len());
    let wrong: Vec<usize> = (0..sent.len()).filter(|&at| got[at] != sent[at]).collect();
    assert_eq!(wrong, [40_000]);
    proxy.at(Direction::Up, 40_000, Deed::Drop(10));
    let got = through(&mut client, sent.len() - 10);
    assert!(got[..40_000] == sent[..40_000] && got[40_000..] == sent[40_010..]);
    proxy.slow(Duration::from_millis(100), 1_000_000);
    let begin = Instant::now();
    assert!(through(&mut client, sent.len()) == sent);
    assert!(
        begin.elapsed() >= Duration::from_millis(190),
        "{:?}",
        begin.elapsed()
    );
    proxy.pass();

    // Nothing passes, and nothing is closed.
    proxy.stall();
    peer.set_read_timeout(Some(Duration::from_millis(100)))
        .expect("an option");
    client.write_all(b"held").expect("the proxy is there");
    assert!(
        peer.read(&mut [0])
            .is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    );
    proxy.pass();
    peer.set_read_timeout(Some(Duration::from_secs(20)))
        .expect("an option");
    let mut held = [0; 4];
    peer.read_exact(&mut held).expect("what was held comes");
    assert_eq!(&held, b"held");

    proxy.at(Direction::Up, 40_000, Deed::Truncate);
    client.write_all(&sent).expect("the proxy reads");
    let mut rest = Vec::new();
    // It may end with a reset.
    let _ = peer.read_to_end(&mut rest);
    assert_eq!(rest.len(), 40_000);
    let (_client, mut peer) = connect();
    proxy.cut();
    assert!(!peer.read(&mut [0]).is_ok_and(|bytes| bytes > 0));
    proxy.refuse();
    let mut refused = TcpStream::connect(("127.0.0.1", proxy.port)).expect("it listens");
    assert!(!refused.read(&mut [0]).is_ok_and(|bytes| bytes > 0));
}
