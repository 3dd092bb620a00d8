//! A hub of models on this machine: as much of the protocol as downloading a model takes, over HTTP/1.1.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// The commit that every model is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A model of the hub.
#[derive(Clone, Default)]
pub struct Model {
    /// Content by file name.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Who does not send this token is told nothing.
    pub token: Option<String>,
}

impl Model {
    /// All files of a directory.
    pub fn of(directory: &Path) -> Self {
        let entries = std::fs::read_dir(directory).expect("the directory is there");
        let files = entries.map(|entry| {
            let entry = entry.expect("an entry");
            let content = std::fs::read(entry.path()).expect("a file");
            (entry.file_name().to_string_lossy().into_owned(), content)
        });
        Self {
            files: files.collect(),
            token: None,
        }
    }
}

/// A server that answers until the test ends.
pub struct Hub {
    /// Its address, as `HF_ENDPOINT` takes it.
    pub url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Serves models by `OWNER/NAME`.
    pub fn serve(models: impl IntoIterator<Item = (&'static str, Model)>) -> Self {
        let models: BTreeMap<String, Model> = models
            .into_iter()
            .map(|(name, model)| (name.to_owned(), model))
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let requests = Arc::new(Mutex::default());
        let (log, own) = (Arc::clone(&requests), url.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away in the middle is its own problem.
                let _ = answer(stream, &models, &own, &log);
            }
        });
        Self { url, requests }
    }

    /// The paths that were asked for since the last call.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.requests.lock().expect("no panic in the server"))
    }
}

struct Request {
    path: String,
    range: Option<(usize, Option<usize>)>,
    token: Option<String>,
}

fn read(stream: &TcpStream) -> std::io::Result<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut request = Request {
        path: first.split(' ').nth(1).unwrap_or_default().to_owned(),
        range: None,
        token: None,
    };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.token = value.strip_prefix("Bearer ").map(str::to_owned),
            "range" => {
                let range = value.strip_prefix("bytes=").and_then(|r| r.split_once('-'));
                let (from, to) = range.expect("a range of bytes");
                request.range = Some((from.parse().expect("a number"), to.parse().ok()));
            }
            _ => {}
        }
    }
    Ok(request)
}

fn answer(
    stream: TcpStream,
    models: &BTreeMap<String, Model>,
    url: &str,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let request = read(&stream)?;
    let log_line = request.path.clone();
    log.lock().expect("no panic in the server").push(log_line);
    let path = request
        .path
        .split('?')
        .next()
        .unwrap_or_default()
        .trim_start_matches("/cdn")
        .trim_start_matches("/api/models")
        .trim_start_matches("/api/datasets")
        .trim_start_matches("/datasets");
    let mut parts = path.trim_start_matches('/').splitn(5, '/');
    let name = [parts.next(), parts.next()]
        .map(Option::unwrap_or_default)
        .join("/");
    let rest: Vec<&str> = parts.collect();
    let Some(model) = models.get(&name) else {
        return respond(stream, "404 Not Found", &[], b"no such model");
    };
    if model.token.is_some() && model.token != request.token {
        return respond(stream, "401 Unauthorized", &[], b"who are you?");
    }
    match rest.as_slice() {
        [] | ["revision", "main" | "v1" | COMMIT] => {
            let files = model.files.keys();
            let siblings: Vec<_> = files
                .map(|file| serde_json::json!({ "rfilename": file }))
                .collect();
            let info = serde_json::json!({ "sha": COMMIT, "siblings": siblings });
            respond(stream, "200 OK", &[], info.to_string().as_bytes())
        }
        ["resolve", "main" | "v1" | COMMIT, file] => match model.files.get(*file) {
            None => respond(stream, "404 Not Found", &[], b"no such file"),
            Some(content) => send(stream, &request, &name, (*file, content), url),
        },
        _ => respond(stream, "404 Not Found", &[], b"no such revision"),
    }
}

/// Large files lie elsewhere, as on the real hub: their place redirects.
fn send(
    stream: TcpStream,
    request: &Request,
    name: &str,
    (file, content): (&str, &[u8]),
    url: &str,
) -> std::io::Result<()> {
    let etag = format!("{file}-{}", content.len());
    let commit = ("x-repo-commit", COMMIT.to_owned());
    if file.ends_with(".safetensors") && !request.path.starts_with("/cdn") {
        let place = format!("{url}/cdn/{name}/resolve/{COMMIT}/{file}");
        let headers = [
            commit,
            ("x-linked-etag", format!("\"{etag}\"")),
            ("location", place),
        ];
        return respond(stream, "302 Found", &headers, b"");
    }
    let (from, to) = request.range.unwrap_or((0, None));
    let to = to.unwrap_or(content.len().saturating_sub(1));
    let range = format!("bytes {from}-{to}/{}", content.len());
    let headers = [
        commit,
        ("etag", format!("\"{etag}\"")),
        ("content-range", range),
    ];
    respond(stream, "206 Partial Content", &headers, &content[from..=to])
}

fn respond(
    mut stream: TcpStream,
    status: &str,
    headers: &[(&str, String)],
    body: &[u8],
) -> std::io::Result<()> {
    let mut head = format!(
        "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(head.as_bytes())?;
    stream.write_all(b"\r\n")?;
    stream.write_all(body)
}
