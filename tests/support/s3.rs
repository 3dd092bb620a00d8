//! An object store on this machine: as much of S3's protocol as `object_store` speaks, over HTTP/1.1, with faults. Every so
//! many requests, one fails: by a status, by a body that ends early or comes slowly, by an upload that is cut off and leaves
//! nothing, or by an answer that is lost after what was asked for was done. What was answered with success is there.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::Scene;

/// The key that clients must name.
const KEY: &str = "AKIATEST";
/// What must never be shown.
pub const SECRET: &str = "hushhushhush";

/// What the store does with its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// What it is asked.
    Well,
    /// A fault every so many requests.
    Faulty(u64),
    /// Nothing: it answers 503.
    Away,
}

/// A server that answers until the test ends.
pub struct S3 {
    pub url: String,
    state: Arc<Mutex<State>>,
}

struct State {
    objects: BTreeMap<String, Vec<u8>>,
    /// Parts by upload.
    uploads: BTreeMap<String, BTreeMap<u32, Vec<u8>>>,
    mood: Mood,
    requests: u64,
    faults: u64,
    /// Methods and paths of all requests.
    log: Vec<String>,
}

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Status,
    Cut,
    Slow,
    /// What was asked for is done, and nobody is told so.
    Lost,
}

struct Request {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl S3 {
    pub fn serve() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(Mutex::new(State {
            objects: BTreeMap::new(),
            uploads: BTreeMap::new(),
            mood: Mood::Well,
            requests: 0,
            faults: 0,
            log: Vec::new(),
        }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                // A client that goes away in the middle is its own problem.
                std::thread::spawn(move || drop(serve(stream, &shared)));
            }
        });
        Self { url, state }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic in the server")
    }

    /// Lets the processes of a scene find this store.
    pub fn for_scene(&self, scene: &mut Scene) {
        for (name, value) in [
            ("AWS_ENDPOINT_URL", self.url.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", "us-east-1"),
        ] {
            scene.environment.push((name.into(), value.into()));
        }
    }

    pub fn put(&self, path: &str, content: impl Into<Vec<u8>>) {
        self.lock().objects.insert(path.into(), content.into());
    }

    /// The names of all objects, with their buckets.
    pub fn names(&self) -> Vec<String> {
        self.lock().objects.keys().cloned().collect()
    }

    pub fn mood(&self, mood: Mood) {
        self.lock().mood = mood;
    }

    /// What an object has.
    pub fn content(&self, path: &str) -> Option<Vec<u8>> {
        self.lock().objects.get(path).cloned()
    }

    /// Requests that went wrong so far.
    pub fn faults(&self) -> u64 {
        self.lock().faults
    }

    /// Methods and paths of the requests since the last call.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().log)
    }
}

fn read(stream: &TcpStream) -> std::io::Result<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ');
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let query = pairs.map(|(name, value)| (decode(name), decode(value)));
    let mut request = Request {
        path: decode(path.trim_start_matches('/')),
        query: query.collect(),
        method,
        headers: BTreeMap::new(),
        body: Vec::new(),
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else {
            break;
        };
        request
            .headers
            .insert(name.to_ascii_lowercase(), value.into());
    }
    let length = request.headers.get("content-length");
    let length: u64 = length.map_or(0, |length| length.parse().expect("a number"));
    reader.take(length).read_to_end(&mut request.body)?;
    Ok(request)
}

fn decode(text: &str) -> String {
    let (bytes, mut decoded, mut at) = (text.as_bytes(), Vec::new(), 0);
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| u8::from_str_radix(&text[at + 1..at + 3], 16));
        match hex {
            Some(byte) => {
                decoded.push(byte.expect("two digits"));
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).expect("a path is text")
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let request = read(&stream)?;
    let (answer, fault) = {
        let mut state = state.lock().expect("no panic in the server");
        state
            .log
            .push(format!("{} {}", request.method, request.path));
        let fault = state.fault();
        match fault {
            // An upload that is cut off leaves nothing.
            Some(Fault::Cut) if request.method != "GET" => return Ok(()),
            Some(Fault::Status) => (error("503 Service Unavailable", "SlowDown"), fault),
            _ => (state.answer(&request), fault),
        }
    };
    if fault == Some(Fault::Lost) && request.method != "GET" {
        return Ok(());
    }
    let mut head = format!(
        "HTTP/1.1 {}\r\nconnection: close\r\ncontent-length: {}\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(head.as_bytes())?;
    stream.write_all(b"\r\n")?;
    if request.method == "HEAD" {
        return Ok(());
    }
    match fault {
        Some(Fault::Cut) => stream.write_all(&answer.body[..answer.body.len() / 2]),
        Some(Fault::Slow) => {
            let piece = (answer.body.len() / 8).max(1);
            for piece in answer.body.chunks(piece) {
                stream.write_all(piece)?;
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        }
        _ => stream.write_all(&answer.body),
    }
}

fn plain(status: &'static str, body: impl Into<Vec<u8>>) -> Answer {
    Answer {
        status,
        headers: Vec::new(),
        body: body.into(),
    }
}

fn error(status: &'static str, code: &str) -> Answer {
    plain(
        status,
        format!("<Error><Code>{code}</Code><Message>as the test says</Message></Error>"),
    )
}

fn tag(content: &[u8]) -> String {
    format!("\"{}\"", &blake3::hash(content).to_hex()[..32])
}

impl State {
    fn fault(&mut self) -> Option<Fault> {
        self.requests += 1;
        let fault = match self.mood {
            Mood::Away => Some(Fault::Status),
            Mood::Faulty(every) if self.requests.is_multiple_of(every) => {
                let kinds = [Fault::Status, Fault::Cut, Fault::Slow, Fault::Lost];
                Some(kinds[(self.requests / every) as usize % kinds.len()])
            }
            _ => None,
        };
        self.faults += u64::from(fault.is_some());
        fault
    }

    fn answer(&mut self, request: &Request) -> Answer {
        let signed = request.headers.get("authorization").cloned();
        let signed = signed.or(request.query.get("X-Amz-Credential").cloned());
        if !signed.is_some_and(|signed| signed.contains(KEY)) {
            return error("403 Forbidden", "AccessDenied");
        }
        let has = |name: &str| request.query.contains_key(name);
        match request.method.as_str() {
            "GET" if has("list-type") => self.list(request),
            "GET" | "HEAD" => self.get(request),
            "PUT" if has("partNumber") => self.part(request),
            "PUT" => self.put(request),
            "POST" if has("delete") => self.delete(request),
            "POST" if has("uploads") => self.begin(request),
            "POST" if has("uploadId") => self.complete(request),
            "DELETE" if has("uploadId") => {
                self.uploads.remove(&request.query["uploadId"]);
                plain("204 No Content", "")
            }
            "DELETE" => {
                self.objects.remove(&request.path);
                plain("204 No Content", "")
            }
            _ => error("405 Method Not Allowed", "MethodNotAllowed"),
        }
    }

    fn list(&self, request: &Request) -> Answer {
        let bucket = request.path.trim_end_matches('/');
        let prefix = request.query.get("prefix").cloned().unwrap_or_default();
        let all = format!("{bucket}/{prefix}");
        let mut xml = String::from("<ListBucketResult><IsTruncated>false</IsTruncated>");
        for (name, content) in &self.objects {
            if name.starts_with(&all) {
                let key = &name[bucket.len() + 1..];
                xml += &format!(
                    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{}</ETag>\
                     <Size>{}</Size></Contents>",
                    tag(content).replace('"', "&quot;"),
                    content.len()
                );
            }
        }
        plain("200 OK", xml + "</ListBucketResult>")
    }

    fn get(&self, request: &Request) -> Answer {
        let Some(content) = self.objects.get(&request.path) else {
            return error("404 Not Found", "NoSuchKey");
        };
        let tag = tag(content);
        if request
            .headers
            .get("if-match")
            .is_some_and(|wanted| *wanted != tag)
        {
            return error("412 Precondition Failed", "PreconditionFailed");
        }
        let range = request.headers.get("range");
        let range = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let (from, to) = range.unwrap_or(("0", ""));
        let from: usize = from.parse().expect("a number");
        let to = to
            .parse()
            .map_or(content.len(), |to: usize| (to + 1).min(content.len()));
        let mut headers = vec![
            ("etag", tag),
            ("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT".into()),
        ];
        if range.is_some() {
            headers.push((
                "content-range",
                format!("bytes {from}-{}/{}", to - 1, content.len()),
            ));
        }
        Answer {
            status: if range.is_some() {
                "206 Partial Content"
            } else {
                "200 OK"
            },
            headers,
            body: content[from..to].to_vec(),
        }
    }

    fn put(&mut self, request: &Request) -> Answer {
        let new = request
            .headers
            .get("if-none-match")
            .is_some_and(|any| any == "*");
        if new && self.objects.contains_key(&request.path) {
            return error("412 Precondition Failed", "PreconditionFailed");
        }
        if let Some(wanted) = request.headers.get("if-match") {
            match self.objects.get(&request.path).map(|content| tag(content)) {
                None => return error("404 Not Found", "NoSuchKey"),
                Some(found) if found != *wanted => {
                    return error("412 Precondition Failed", "PreconditionFailed");
                }
                Some(_) => {}
            }
        }
        self.objects
            .insert(request.path.clone(), request.body.clone());
        tagged(&request.body)
    }

    fn delete(&mut self, request: &Request) -> Answer {
        let body = String::from_utf8_lossy(&request.body).into_owned();
        let bucket = request.path.trim_end_matches('/');
        let mut xml = String::from("<DeleteResult>");
        for part in body.split("<Key>").skip(1) {
            let key = part.split("</Key>").next().expect("split gives one");
            self.objects.remove(&format!("{bucket}/{key}"));
            xml += &format!("<Deleted><Key>{key}</Key></Deleted>");
        }
        plain("200 OK", xml + "</DeleteResult>")
    }

    fn begin(&mut self, request: &Request) -> Answer {
        let id = format!("upload-{}", self.requests);
        self.uploads.insert(id.clone(), BTreeMap::new());
        let (bucket, key) = request.path.split_once('/').expect("a bucket and a key");
        plain(
            "200 OK",
            format!(
                "<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{key}</Key><UploadId>{id}</UploadId>\
                 </InitiateMultipartUploadResult>"
            ),
        )
    }

    fn part(&mut self, request: &Request) -> Answer {
        let number = request.query["partNumber"].parse().expect("a number");
        let Some(parts) = self.uploads.get_mut(&request.query["uploadId"]) else {
            return error("404 Not Found", "NoSuchUpload");
        };
        parts.insert(number, request.body.clone());
        tagged(&request.body)
    }

    fn complete(&mut self, request: &Request) -> Answer {
        let Some(parts) = self.uploads.remove(&request.query["uploadId"]) else {
            return error("404 Not Found", "NoSuchUpload");
        };
        let whole: Vec<u8> = parts.into_values().flatten().collect();
        let tag = tag(&whole);
        self.objects.insert(request.path.clone(), whole);
        plain(
            "200 OK",
            format!(
                "<CompleteMultipartUploadResult><ETag>{}</ETag></CompleteMultipartUploadResult>",
                tag.replace('"', "&quot;")
            ),
        )
    }
}

fn tagged(content: &[u8]) -> Answer {
    Answer {
        headers: vec![("etag", tag(content))],
        ..plain("200 OK", "")
    }
}
