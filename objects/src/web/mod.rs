//! HTTP to servers elsewhere: one client, over rustls, on which object stores, the web and the hub stand. `connect.rs` opens
//! connections, and has the last word on where to; `body.rs` ends answers that stand still.
//!
//! Nobody waits for ever: connecting, the head of an answer and each piece of its body have deadlines. What failed is tried
//! again by others: by `object_store` for requests to stores, by `fetch.rs` for downloads.

mod body;
mod connect;

use std::error::Error;
use std::io;
use std::time::Duration;

use http::header::{ACCEPT_ENCODING, AUTHORIZATION, LOCATION, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Uri};
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::ClientOptions;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest,
    HttpRequestBody, HttpResponse, HttpResponseBody, HttpService,
};
use url::Url;

use self::body::Patient;
use self::connect::{Connector, Refused};
use crate::guard::Reach;

/// Redirects that are followed.
const REDIRECTS: usize = 8;
/// Idle connections that are kept for a host.
const IDLE: usize = 8;
/// The slowest upload that is waited for, in bytes a second.
const SLOWEST: u64 = 64 << 10;
/// What servers are told.
const AGENT: &str = concat!("cohort/", env!("CARGO_PKG_VERSION"));

/// How long others may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Until a connection is open.
    pub connect: Duration,
    /// Until an answer begins, beside the time for sending the request.
    pub head: Duration,
    /// Until the next piece of an answer.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            head: Duration::from_secs(60),
            idle: Duration::from_secs(30),
        }
    }
}

/// A client for HTTP. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Web {
    client: Client<Connector, HttpRequestBody>,
    patience: Patience,
}

impl Web {
    /// One that calls as far as that, without TLS only where `plaintext` is allowed.
    pub fn new(reach: Reach, plaintext: bool) -> Self {
        Self::with_patience(reach, plaintext, Patience::default())
    }

    /// One with other deadlines.
    pub fn with_patience(reach: Reach, plaintext: bool, patience: Patience) -> Self {
        let connector = Connector::new(reach, plaintext, patience.connect);
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(IDLE)
            .build(connector);
        Self { client, patience }
    }

    /// Asks for a file, and follows redirects. Whom the first URL names gets the `Authorization` among the headers, and
    /// nobody else.
    pub async fn get(&self, url: &Url, headers: HeaderMap) -> Result<HttpResponse, HttpError> {
        let (mut url, mut headers) = (url.clone(), headers);
        // The bytes of the file, not of some packing of them.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        for _ in 0..=REDIRECTS {
            let mut request = HttpRequest::new(HttpRequestBody::empty());
            *request.method_mut() = Method::GET;
            *request.uri_mut() = uri(&url)?;
            *request.headers_mut() = headers.clone();
            let answer = self.ask(request).await?;
            let location = answer.headers().get(LOCATION).cloned();
            let (true, Some(location)) = (answer.status().is_redirection(), location) else {
                return Ok(answer);
            };
            let next = location.to_str().ok().and_then(|to| url.join(to).ok());
            let next = next.ok_or_else(|| refused("it redirects to what is no URL"))?;
            if url.scheme() == "https" && next.scheme() != "https" {
                return Err(refused("it redirects from https to plain http"));
            }
            if next.origin() != url.origin() {
                headers.remove(AUTHORIZATION);
            }
            url = next;
        }
        Err(refused(&format!(
            "it redirects more than {REDIRECTS} times"
        )))
    }

    /// Sends one request.
    async fn ask(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let agent = HeaderValue::from_static(AGENT);
        request.headers_mut().entry(USER_AGENT).or_insert(agent);
        let sending = request.body().content_length() as u64 / SLOWEST;
        let patience = self.patience.head + Duration::from_secs(sending);
        let answer = tokio::time::timeout(patience, self.client.request(request)).await;
        let late = || {
            let text = format!("no answer within {} s", patience.as_secs());
            HttpError::new(HttpErrorKind::Timeout, io::Error::other(text))
        };
        let answer = answer.map_err(|_| late())?.map_err(|error| {
            let kind = match is_refusal(&error) {
                true => HttpErrorKind::Unknown,
                false if error.is_connect() => HttpErrorKind::Connect,
                false => HttpErrorKind::Interrupted,
            };
            HttpError::new(kind, error)
        })?;
        let idle = self.patience.idle;
        let body = |body| HttpResponseBody::new(Patient::new(body, idle).map_err(broken));
        Ok(answer.map(body))
    }
}

/// That a body ended before its end.
fn broken(error: body::BoxError) -> HttpError {
    HttpError::new_boxed(HttpErrorKind::Interrupted, error)
}

fn refused(why: &str) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, io::Error::other(why.to_owned()))
}

fn uri(url: &Url) -> Result<Uri, HttpError> {
    let uri = url.as_str().parse();
    uri.map_err(|_| refused("it is no URL that can be asked for"))
}

/// Whether another try would end in the same way.
fn is_refusal(error: &(dyn Error + 'static)) -> bool {
    let mut source = Some(error);
    while let Some(error) = source {
        let inner = error.downcast_ref::<io::Error>().and_then(|e| e.get_ref());
        let certificate = inner.is_some_and(|inner| inner.is::<rustls::Error>());
        if certificate || inner.is_some_and(|inner| inner.is::<Refused>()) {
            return true;
        }
        source = error.source();
    }
    false
}

#[async_trait::async_trait]
impl HttpService for Web {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        self.ask(request).await
    }
}

/// Gives `object_store` its clients.
#[derive(Clone, Copy, Debug)]
pub struct Dialer;

impl HttpConnector for Dialer {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let plaintext = options.get_config_value(&ClientConfigKey::AllowHttp);
        let plaintext = plaintext.is_some_and(|allowed| allowed == "true");
        // Where stores are is said by the environment of this process, not by who asks for something in them.
        Ok(HttpClient::new(Web::new(Reach::Everywhere, plaintext)))
    }
}
