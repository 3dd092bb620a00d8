//! Downloads from a server that does what a test says, and buckets in memory and on disk.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use object_store::memory::InMemory;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use url::Url;

use super::{Bucket, Download, Fetched, Location, ObjectError, Reach, Source, WebFile};
use crate::web::{Patience, Web};

/// What a server does with its next request.
#[derive(Clone, Debug)]
enum Next {
    Status(u16),
    /// Closes the connection after that many bytes of the body.
    Cut(usize),
    /// Sends that many bytes of the body, and then nothing.
    Stall(usize),
    /// Sends all of it, whatever was asked for.
    Whole,
    Redirect(String),
}

/// A server with one file.
struct Server {
    url: Url,
    state: Arc<Mutex<State>>,
}

struct State {
    content: Vec<u8>,
    /// The line that says which version it is, if there is one.
    version: &'static str,
    next: VecDeque<Next>,
    /// The ranges that were asked for; empty for all of it.
    ranges: Vec<String>,
    /// The authorization of the last request.
    authorization: Option<String>,
}

impl Server {
    async fn start(content: &[u8], next: impl IntoIterator<Item = Next>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/a.txt?secret", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            content: content.into(),
            version: "etag: \"1\"\r\n",
            next: next.into_iter().collect(),
            ranges: Vec::new(),
            authorization: None,
        }));
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = shared.clone();
                tokio::spawn(async move { answer(stream, &shared).await });
            }
        });
        Self {
            url: url.parse().unwrap(),
            state,
        }
    }

    fn file(&self, web: Web) -> Source {
        Source::Web(Box::new(WebFile {
            web,
            url: self.url.clone(),
            headers: HeaderMap::new(),
            shown: "http://host/a.txt".into(),
            version: None,
        }))
    }

    fn ranges(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().ranges)
    }
}

/// Answers one request.
async fn answer(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut range, mut authorization) = (String::new(), None);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? <= 2 {
            break;
        }
        match line.trim().split_once(": ") {
            Some(("range", value)) => range = value.into(),
            Some(("authorization", value)) => authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let (next, content, version) = {
        let mut state = state.lock().unwrap();
        state.ranges.push(range.clone());
        state.authorization = authorization;
        (state.next.pop_front(), state.content.clone(), state.version)
    };
    let from = range.trim_start_matches("bytes=").trim_end_matches('-');
    let from: usize = match next {
        Some(Next::Whole) => 0,
        _ => from.parse().unwrap_or(0),
    };
    let body = &content[from..];
    let mut head = match from {
        0 => "HTTP/1.1 200 OK\r\n".to_owned(),
        _ => format!(
            "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {from}-{}/{}\r\n",
            content.len() - 1,
            content.len()
        ),
    };
    match &next {
        Some(Next::Status(status)) => {
            let head = format!(
                "HTTP/1.1 {status} X\r\nx-error-message: busy\r\ncontent-length: 0\r\n\r\n"
            );
            return stream.write_all(head.as_bytes()).await;
        }
        Some(Next::Redirect(to)) => {
            let head = format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n");
            return stream.write_all(head.as_bytes()).await;
        }
        _ => head.push_str(&format!(
            "{version}content-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        )),
    }
    stream.write_all(head.as_bytes()).await?;
    match next {
        Some(Next::Cut(bytes)) => stream.write_all(&body[..bytes]).await,
        Some(Next::Stall(bytes)) => {
            stream.write_all(&body[..bytes]).await?;
            // Ends when the other side goes.
            stream.read_line(&mut String::new()).await.map(drop)
        }
        _ => stream.write_all(body).await,
    }
}

fn web(reach: Reach) -> Web {
    let patience = Patience {
        idle: Duration::from_millis(100),
        ..Patience::default()
    };
    Web::with_patience(reach, true, patience)
}

fn content() -> Vec<u8> {
    (0..100_000_u32).flat_map(u32::to_le_bytes).collect()
}

async fn fetch(source: Source, part: &Path) -> Result<Fetched, ObjectError> {
    Download::find(source).await?.to_file(part, &|_| {}).await
}

#[tokio::test]
async fn a_download_that_breaks_goes_on_where_it_ended() {
    let directory = tempfile::tempdir().unwrap();
    let part = directory.path().join("x.part");
    let content = content();
    let faults = [
        Next::Status(503),
        Next::Cut(1000),
        Next::Status(500),
        Next::Stall(2000),
    ];
    let server = Server::start(&content, faults).await;
    let fetched = fetch(server.file(web(Reach::ThisMachine)), &part)
        .await
        .unwrap();
    assert_eq!(fetched.bytes, content.len() as u64);
    assert_eq!(fetched.hash, *blake3::hash(&content).as_bytes());
    assert_eq!(std::fs::read(&part).unwrap(), content);
    let asked = ["", "", "bytes=1000-", "bytes=1000-", "bytes=3000-"];
    assert_eq!(server.ranges(), asked);
}

#[tokio::test]
async fn what_an_earlier_process_left_is_not_fetched_again() {
    let directory = tempfile::tempdir().unwrap();
    let part = directory.path().join("x.part");
    let content = content();
    std::fs::write(&part, &content[..7000]).unwrap();
    let server = Server::start(&content, []).await;
    fetch(server.file(web(Reach::ThisMachine)), &part)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&part).unwrap(), content);
    assert_eq!(server.ranges(), ["", "bytes=7000-"]);
    // A server that gives no parts begins anew.
    std::fs::write(&part, vec![0; 7000]).unwrap();
    let server = Server::start(&content, [Next::Whole, Next::Whole]).await;
    fetch(server.file(web(Reach::ThisMachine)), &part)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&part).unwrap(), content);
}

#[tokio::test]
async fn a_file_that_changes_meanwhile_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let part = directory.path().join("x.part");
    let server = Server::start(&content(), [Next::Cut(1000)]).await;
    let download = Download::find(server.file(web(Reach::ThisMachine)))
        .await
        .unwrap();
    let key = download.key().unwrap();
    server.state.lock().unwrap().version = "etag: \"2\"\r\n";
    let error = download.to_file(&part, &|_| {}).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "`http://host/a.txt` changed while it was read; try again when it rests"
    );
    let again = Download::find(server.file(web(Reach::ThisMachine)))
        .await
        .unwrap();
    assert_ne!(again.key().unwrap(), key);
}

#[tokio::test]
async fn a_server_that_always_begins_anew_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let part = directory.path().join("x.part");
    let server = Server::start(&content(), vec![Next::Cut(1000); 9]).await;
    server.state.lock().unwrap().version = "";
    let error = fetch(server.file(web(Reach::ThisMachine)), &part)
        .await
        .unwrap_err();
    assert!(matches!(error, ObjectError::Unreachable { .. }), "{error}");
    // All but the first brought nothing new.
    assert_eq!(server.ranges(), [""; 6]);
}

#[tokio::test]
async fn queries_of_one_path_are_files_of_their_own_where_only_a_time_is_known() {
    let mut server = Server::start(&content(), []).await;
    let mut keys = async |version: &'static str| {
        server.state.lock().unwrap().version = version;
        let mut keys = Vec::new();
        for query in ["id=1", "id=2"] {
            server.url.set_query(Some(query));
            let source = server.file(web(Reach::ThisMachine));
            keys.push(Download::find(source).await.unwrap().key());
        }
        keys
    };
    let dated = keys("last-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n").await;
    assert!(dated[0].is_some() && dated[0] != dated[1], "{dated:?}");
    // With a tag, the query is a signature that changes while the file stays.
    let tagged = keys("etag: \"1\"\r\n").await;
    assert!(tagged[0].is_some() && tagged[0] == tagged[1], "{tagged:?}");
    assert_eq!(keys("").await, [None, None]);
}

#[tokio::test]
async fn what_is_wrong_for_good_ends_at_once_and_without_secrets() {
    let directory = tempfile::tempdir().unwrap();
    let part = directory.path().join("x.part");
    let server = Server::start(b"x", [Next::Status(403)]).await;
    let source = server.file(web(Reach::ThisMachine));
    let error = fetch(source, &part).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "`http://host/a.txt` is refused (busy); check the credentials in the coordinator's environment, and what they allow"
    );
    assert_eq!(server.ranges().len(), 1);
}

#[tokio::test]
async fn nobody_is_sent_where_he_may_not_go() {
    let directory = tempfile::tempdir().unwrap();
    let part = directory.path().join("x.part");
    let server = Server::start(b"x", []).await;
    let error = fetch(server.file(web(Reach::Network)), &part)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "`http://host/a.txt` is not fetched: `127.0.0.1` leads to 127.0.0.1, which is not called for others: it is the \
         coordinator's own machine"
    );
    assert!(server.ranges().is_empty());
    // Nor by a redirect.
    let away = Next::Redirect("http://169.254.169.254/latest/meta-data".into());
    let server = Server::start(b"x", [away]).await;
    let error = fetch(server.file(web(Reach::ThisMachine)), &part)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("leads to 169.254.169.254"),
        "{error}"
    );
}

#[tokio::test]
async fn a_token_goes_to_nobody_else() {
    let directory = tempfile::tempdir().unwrap();
    let other = Server::start(b"x", []).await;
    let here = Next::Redirect("/b.txt".into());
    let there = Next::Redirect(other.url.to_string());
    let server = Server::start(b"x", [here, there]).await;
    let Source::Web(mut file) = server.file(web(Reach::ThisMachine)) else {
        panic!("a file of the web");
    };
    file.headers
        .insert(AUTHORIZATION, "Bearer secret".parse().unwrap());
    let part = directory.path().join("x.part");
    fetch(Source::Web(file), &part).await.unwrap();
    let authorization = |server: &Server| server.state.lock().unwrap().authorization.clone();
    assert_eq!(authorization(&server).as_deref(), Some("Bearer secret"));
    assert_eq!(authorization(&other), None);
}

#[tokio::test]
async fn objects_are_written_listed_read_and_deleted() {
    let bucket = Bucket::over(InMemory::new(), "a/");
    for name in ["x/1", "x/2", "xy"] {
        bucket.write(name, name.into()).await.unwrap();
    }
    let names = |prefix: &'static str| async {
        let listed = bucket.list(prefix).await.unwrap();
        listed.into_iter().map(|meta| meta.name).collect::<Vec<_>>()
    };
    assert_eq!(names("").await, ["x/1", "x/2", "xy"]);
    assert_eq!(names("x/").await, ["x/1", "x/2"]);
    assert_eq!(bucket.read("x/1", 3).await.unwrap(), "x/1");
    assert!(matches!(
        bucket.read("x/1", 2).await,
        Err(ObjectError::Large { .. })
    ));
    assert!(!bucket.create("x/1", b"other".to_vec()).await.unwrap());
    assert!(bucket.create("x/3", b"new".to_vec()).await.unwrap());
    bucket.delete("x/1").await.unwrap();
    bucket.delete("x/1").await.unwrap();
    assert_eq!(bucket.head("x/1").await.unwrap(), None);
    let missing = bucket.read("x/1", 9).await.unwrap_err();
    assert!(
        missing.is_missing()
            && missing
                .to_string()
                .starts_with("there is no `memory://a/x/1`")
    );
}

#[tokio::test]
async fn large_files_go_in_parts_and_only_what_is_right_appears() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = Bucket::over(InMemory::new(), "");
    for bytes in [5, 33 << 20] {
        let path = directory.path().join("file");
        let content: Vec<u8> = (0..bytes).map(|i| (i >> 8) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let hash = *blake3::hash(&content).as_bytes();
        let open = || std::fs::File::open(&path).unwrap();
        let refused = bucket.put("o", (&path, open()), &[0; 32]).await;
        // It is the file here that is not what it should be.
        let (error, here) = (refused.unwrap_err(), path.display());
        assert!(
            error
                .to_string()
                .starts_with(&format!("`{here}` is damaged")),
            "{error}"
        );
        assert_eq!(bucket.head("o").await.unwrap(), None);
        bucket.put("o", (&path, open()), &hash).await.unwrap();
        assert!(bucket.read("o", 1 << 30).await.unwrap() == content);
        bucket.delete("o").await.unwrap();
    }
}

#[tokio::test]
async fn a_directory_stands_in_for_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("file://{}/store", directory.path().display());
    let bucket = Bucket::open(&Location::parse(&url).unwrap()).unwrap();
    assert!(bucket.list("").await.unwrap().is_empty());
    let content = content();
    bucket.write("a/b.txt", content.clone()).await.unwrap();
    let [meta] = bucket.list("a/").await.unwrap().try_into().unwrap();
    let part = directory.path().join("x.part");
    std::fs::write(&part, &content[..1234]).unwrap();
    let source = Source::Object(bucket.clone(), meta.clone());
    let fetched = fetch(source, &part).await.unwrap();
    assert_eq!(fetched.hash, *blake3::hash(&content).as_bytes());
    // The object that was listed is not there any more.
    bucket.write("a/b.txt", b"other".to_vec()).await.unwrap();
    std::fs::remove_file(&part).unwrap();
    let error = fetch(Source::Object(bucket, meta), &part)
        .await
        .unwrap_err();
    assert!(matches!(error, ObjectError::Changed { .. }), "{error}");
}
