//! A browser's side of HTTP, as far as tests need it: JSON in, JSON out, and the live stream with the moment at which each
//! message came.

use std::io::{BufRead, BufReader};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::Agent;

use super::DEADLINE;

/// One server.
pub struct Http {
    url: String,
    agent: Agent,
    headers: Vec<(&'static str, String)>,
}

/// What was answered.
pub struct Answer {
    pub status: u16,
    pub text: String,
    /// The value of `set-cookie` up to the first semicolon.
    pub cookie: Option<String>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }

    /// The sentence of a refusal.
    pub fn error(&self) -> String {
        self.json()["error"].as_str().expect("an error").to_owned()
    }
}

impl Http {
    pub fn new(url: &str) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(DEADLINE));
        Self {
            url: url.trim_end_matches('/').to_owned(),
            agent: config.build().into(),
            headers: vec![("x-cohort", "1".into())],
        }
    }

    /// The same with one more header.
    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn get(&self, path: &str) -> Answer {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        answer(request.call())
    }

    pub fn post(&self, path: &str, body: &str) -> Answer {
        let mut request = self.agent.post(format!("{}{path}", self.url));
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        answer(request.send(body))
    }

    /// Watches runs; goes on after an event, if one is given.
    pub fn live(&self, query: &str, last: Option<u64>) -> Live {
        let mut request = self.agent.get(format!("{}/api/live{query}", self.url));
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        if let Some(last) = last {
            request = request.header("last-event-id", last.to_string());
        }
        let response = request.call().expect("the server answers");
        assert_eq!(response.status(), 200);
        let (sender, messages) = channel();
        std::thread::spawn(move || {
            let mut message = Message::default();
            let lines = BufReader::new(response.into_body().into_reader()).lines();
            for line in lines.map_while(Result::ok) {
                if !message.take(&line) && sender.send(std::mem::take(&mut message)).is_err() {
                    return;
                }
            }
        });
        Live { messages, last }
    }
}

fn answer(sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
    let mut response = sent.expect("the server answers");
    let cookie = response.headers().get("set-cookie");
    let cookie = cookie.and_then(|cookie| cookie.to_str().ok()?.split(';').next());
    Answer {
        cookie: cookie.map(str::to_owned),
        status: response.status().as_u16(),
        text: response.body_mut().read_to_string().expect("a body"),
    }
}

/// A message of a live stream.
#[derive(Debug, Default)]
struct Message {
    name: String,
    data: Value,
    id: Option<u64>,
}

impl Message {
    /// Takes a line; says whether more belongs to this message.
    fn take(&mut self, line: &str) -> bool {
        match line.split_once(": ") {
            Some(("event", name)) => self.name = name.into(),
            Some(("data", data)) => self.data = serde_json::from_str(data).expect("JSON"),
            Some(("id", id)) => self.id = id.parse().ok(),
            _ => {}
        }
        !line.is_empty()
    }
}

/// A live stream.
pub struct Live {
    messages: Receiver<Message>,
    /// The newest event that was told.
    pub last: Option<u64>,
}

impl Live {
    /// Waits for a message of a name that satisfies `wanted`; gives when it came and what it says.
    pub fn wait_for(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> (Instant, Value) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = match self.messages.recv_timeout(left) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => panic!("no `{name}` in time"),
                Err(RecvTimeoutError::Disconnected) => panic!("the stream ended before `{name}`"),
            };
            self.last = message.id.or(self.last);
            if message.name == name && wanted(&message.data) {
                return (Instant::now(), message.data);
            }
        }
    }

    /// Reads until the stream ends, which it must within the deadline.
    pub fn wait_for_end(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.messages.recv_timeout(left) {
                Ok(message) => self.last = message.id.or(self.last),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => panic!("the stream does not end"),
            }
        }
    }
}

/// Sends bytes as they are; gives what comes back until the server closes, or falls silent for a moment.
pub fn raw(url: &str, bytes: &[u8]) -> String {
    use std::io::{Read, Write};
    let address = url.trim_start_matches("http://");
    let mut stream = std::net::TcpStream::connect(address).expect("the server listens");
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("a timeout");
    stream.write_all(bytes).expect("the server reads");
    let mut seen = Vec::new();
    // A server that keeps the connection open has said all.
    let _ = stream.read_to_end(&mut seen);
    super::text(&seen)
}
