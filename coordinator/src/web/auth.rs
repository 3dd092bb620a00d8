//! Who may ask: whoever has the cluster's token, in a header or in the cookie that the page gets for it. Without a token
//! the coordinator listens on loopback only, and asks to be called by a loopback name: a page of a foreign name that was
//! made to point here is not answered.
//!
//! The cookie is the time at which it ends and a code that only who knows the token can make, so that nothing is kept here
//! and a coordinator that is started again still knows it. Nobody is told apart from anybody else: a cluster has one token.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::{AUTHORIZATION, COOKIE, HOST, HeaderMap, ORIGIN, RETRY_AFTER, SET_COOKIE};
use axum::http::header::{HeaderValue, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use cohort_common::net::Token;
use serde::Deserialize;
use serde_json::{Value, json};
use tonic::transport::server::TcpConnectInfo;

use super::error::{Failure, Json};
use super::{MAX_BODY, Web};
use crate::driver::now_ms;

/// The cookie's name.
const NAME: &str = "cohort_session";

/// How long a cookie is good for.
const LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Purpose of the key that codes of cookies are made with.
const CONTEXT: &str = "Cohort 2026 session cookie of the page";

/// Wrong tokens in a row from one address; one more is allowed each [`PAUSE`].
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_secs(6);

/// Addresses whose tries are remembered, at most.
const ADDRESSES: usize = 1024;

/// How long a request's body may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Every request that changes something carries this: a page of another origin cannot set it unasked.
const INTENT: &str = "x-cohort";

/// The token, and what follows from it.
pub struct Auth {
    guard: Option<Guard>,
    tries: Mutex<HashMap<IpAddr, Tries>>,
}

struct Guard {
    token: Token,
    key: [u8; 32],
}

/// Wrong tokens of an address: how many count at a moment.
struct Tries {
    wrong: u32,
    at: Instant,
}

impl Auth {
    /// What guards a cluster with this token.
    pub fn new(token: Option<Token>) -> Self {
        let guard = |token: Token| Guard {
            key: token.derive_key(CONTEXT),
            token,
        };
        Self {
            guard: token.map(guard),
            tries: Mutex::default(),
        }
    }

    /// Whether a request shows that it may.
    fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(guard) = &self.guard else {
            return true;
        };
        let bearer = headers.get(AUTHORIZATION);
        bearer.is_some_and(|value| guard.token.admits_header(value.as_bytes()))
            || cookies(headers).any(|cookie| guard.knows(cookie, now_ms()))
    }

    /// Whether an address may try another token.
    fn may_try(&self, address: IpAddr, now: Instant) -> bool {
        let mut tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        match tries.get_mut(&address) {
            None => true,
            Some(found) => found.at_moment(now) < TRIES,
        }
    }

    fn was_wrong(&self, address: IpAddr, now: Instant) {
        let mut tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        if tries.len() >= ADDRESSES {
            tries.retain(|_, found| found.at_moment(now) > 0);
        }
        if tries.len() >= ADDRESSES {
            tries.clear();
        }
        let fresh = Tries { wrong: 0, at: now };
        tries.entry(address).or_insert(fresh).wrong += 1;
    }
}

impl Tries {
    /// How many still count.
    fn at_moment(&mut self, now: Instant) -> u32 {
        let pauses = now.duration_since(self.at).as_millis() / PAUSE.as_millis();
        if pauses > 0 {
            self.wrong = self
                .wrong
                .saturating_sub(pauses.try_into().unwrap_or(u32::MAX));
            self.at = now;
        }
        self.wrong
    }
}

impl Guard {
    fn code(&self, end: u64) -> blake3::Hash {
        blake3::keyed_hash(&self.key, &end.to_le_bytes())
    }

    /// A cookie's value that is good until `end`, in milliseconds since the epoch.
    fn cookie(&self, end: u64) -> String {
        format!("{end}-{}", self.code(end).to_hex())
    }

    /// Whether a cookie's value is one of ours and still good.
    fn knows(&self, cookie: &str, now: u64) -> bool {
        let known = cookie.split_once('-').and_then(|(end, code)| {
            let end: u64 = end.parse().ok()?;
            let code = blake3::Hash::from_hex(code).ok()?;
            // Hashes compare in constant time.
            Some(code == self.code(end) && now < end)
        });
        known.unwrap_or(false)
    }
}

/// The values of all cookies of our name.
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let texts = headers.get_all(COOKIE).iter();
    let texts = texts.filter_map(|value| value.to_str().ok());
    let pairs = texts.flat_map(|text| text.split(';'));
    pairs.filter_map(|pair| pair.trim().strip_prefix(NAME)?.strip_prefix('='))
}

/// Lets only those pass who have the token.
pub async fn require_token(State(web): State<Arc<Web>>, request: Request, next: Next) -> Response {
    if web.auth.admits(request.headers()) {
        return next.run(request).await;
    }
    let text = "this coordinator wants its token: sign in on its page, or send the header `authorization: Bearer TOKEN`";
    let way = [(WWW_AUTHENTICATE, "Bearer")];
    (way, Failure::new(StatusCode::UNAUTHORIZED, text)).into_response()
}

/// Where there is no token, lets only those pass who call this machine by one of its own names.
pub async fn require_own_name(
    State(web): State<Arc<Web>>,
    request: Request,
    next: Next,
) -> Response {
    if web.auth.guard.is_some() {
        return next.run(request).await;
    }
    match authority(request.headers(), request.uri()) {
        Some(host) if is_loopback(host) => next.run(request).await,
        host => Failure::new(
            StatusCode::FORBIDDEN,
            format!(
                "a coordinator without a token answers to `localhost` and to loopback addresses only, not to `{}`; give it \
                 a token with `--token-file` to reach it by other names",
                host.unwrap_or_default()
            ),
        )
        .into_response(),
    }
}

/// The host, and the port if there is one, that a request is sent to.
fn authority<'a>(headers: &'a HeaderMap, uri: &'a Uri) -> Option<&'a str> {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    host.or_else(|| uri.authority().map(|authority| authority.as_str()))
}

fn is_loopback(authority: &str) -> bool {
    let name = match authority.strip_prefix('[') {
        Some(address) => address.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    let name = name.to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || name
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

/// A request that is meant to change something, and does not come from a page of another origin.
pub struct Deliberate;

impl<S: Sync> FromRequestParts<S> for Deliberate {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        let refuse = |text: String| Err(Failure::new(StatusCode::FORBIDDEN, text));
        if parts.headers.get(INTENT).is_none_or(|value| value != "1") {
            return refuse(format!(
                "what changes something needs the header `{INTENT}: 1`, which pages of others cannot send"
            ));
        }
        let host = authority(&parts.headers, &parts.uri).unwrap_or_default();
        let Some(origin) = parts.headers.get(ORIGIN) else {
            return Ok(Self);
        };
        let origin = origin.to_str().unwrap_or("?");
        let own = origin.split_once("://").map(|(_, authority)| authority);
        match own.is_some_and(|own| own.eq_ignore_ascii_case(host)) {
            true => Ok(Self),
            false => refuse(format!(
                "this request comes from a page of `{origin}`, but it is sent to `{host}`"
            )),
        }
    }
}

/// `GET /api/session`.
pub async fn session(State(web): State<Arc<Web>>, headers: HeaderMap) -> Json<Value> {
    Json(json!({
        "required": web.auth.guard.is_some(),
        "signed_in": web.auth.admits(&headers),
        "version": env!("CARGO_PKG_VERSION"),
    }))
}

#[derive(Deserialize)]
struct SignIn {
    token: String,
}

/// `POST /api/session`: a cookie for a token.
pub async fn sign_in(
    _: Deliberate,
    State(web): State<Arc<Web>>,
    request: Request,
) -> Result<Response, Failure> {
    let Some(guard) = &web.auth.guard else {
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    let peer = request.extensions().get::<TcpConnectInfo>();
    let peer = peer.and_then(TcpConnectInfo::remote_addr);
    let address = peer.map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.ip());
    if !web.auth.may_try(address, Instant::now()) {
        let text = format!(
            "too many wrong tokens from {address}; try again in {} s",
            PAUSE.as_secs()
        );
        let pause = [(RETRY_AFTER, HeaderValue::from(PAUSE.as_secs()))];
        return Ok((pause, Failure::new(StatusCode::TOO_MANY_REQUESTS, text)).into_response());
    }
    let SignIn { token } = read(request.into_body()).await?;
    let shown = format!("Bearer {}", token.trim());
    if !guard.token.admits_header(shown.as_bytes()) {
        web.auth.was_wrong(address, Instant::now());
        let text = "this is not the coordinator's token";
        return Err(Failure::new(StatusCode::UNAUTHORIZED, text));
    }
    let value = guard.cookie(now_ms() + LIFE.as_millis() as u64);
    Ok(set_cookie(&value, LIFE))
}

/// `DELETE /api/session`: the browser forgets its cookie.
pub async fn sign_out(_: Deliberate) -> Response {
    set_cookie("", Duration::ZERO)
}

fn set_cookie(value: &str, life: Duration) -> Response {
    let age = life.as_secs();
    let cookie = format!("{NAME}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={age}");
    (StatusCode::NO_CONTENT, [(SET_COOKIE, cookie)]).into_response()
}

async fn read<T: serde::de::DeserializeOwned>(body: Body) -> Result<T, Failure> {
    let bytes = tokio::time::timeout(PATIENCE, to_bytes(body, MAX_BODY)).await;
    let bytes = bytes.map_err(|_| {
        let text = format!("the request did not arrive within {} s", PATIENCE.as_secs());
        Failure::new(StatusCode::REQUEST_TIMEOUT, text)
    })?;
    let bytes = bytes.map_err(|_| {
        let text = format!("the request is larger than {MAX_BODY} bytes, or it broke off");
        Failure::new(StatusCode::PAYLOAD_TOO_LARGE, text)
    })?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::invalid(format!(
            "expected JSON such as `{{\"token\":\"…\"}}`: {error}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        let token = Token::new("0123456789abcdef").unwrap();
        Auth::new(Some(token)).guard.unwrap()
    }

    #[test]
    fn a_cookie_is_good_until_its_end_and_cannot_be_made_up() {
        let guard = guard();
        let cookie = guard.cookie(1000);
        assert!(guard.knows(&cookie, 999));
        assert!(!guard.knows(&cookie, 1000));
        let longer = cookie.replacen("1000", "9000", 1);
        assert!(!guard.knows(&longer, 999));
        for made_up in [
            "",
            "-",
            "1000",
            "1000-",
            "x-00",
            &cookie[..cookie.len() - 1],
        ] {
            assert!(!guard.knows(made_up, 0), "{made_up}");
        }
        let token = Token::new("another-token-of-16").unwrap();
        let other = Auth::new(Some(token)).guard.unwrap();
        assert!(!other.knows(&cookie, 999));
    }

    #[test]
    fn cookies_of_others_are_passed_over() {
        let mut headers = HeaderMap::new();
        headers.append(COOKIE, "a=b; cohort_session=one".parse().unwrap());
        headers.append(
            COOKIE,
            "cohort_session_x=no;cohort_session=two".parse().unwrap(),
        );
        assert_eq!(cookies(&headers).collect::<Vec<_>>(), ["one", "two"]);
    }

    #[test]
    fn wrong_tokens_are_limited_and_forgiven() {
        let auth = Auth::new(None);
        let (here, there) = (IpAddr::from([1, 2, 3, 4]), IpAddr::from([1, 2, 3, 5]));
        let start = Instant::now();
        for _ in 0..TRIES {
            assert!(auth.may_try(here, start));
            auth.was_wrong(here, start);
        }
        assert!(!auth.may_try(here, start));
        assert!(auth.may_try(there, start));
        assert!(auth.may_try(here, start + PAUSE));
        auth.was_wrong(here, start + PAUSE);
        assert!(!auth.may_try(here, start + PAUSE));
    }

    #[test]
    fn loopback_names() {
        for name in [
            "localhost",
            "LOCALHOST:7070",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]:7070",
            "a.localhost",
        ] {
            assert!(is_loopback(name), "{name}");
        }
        for name in [
            "",
            "example.org",
            "localhost.example.org",
            "10.0.0.1:7070",
            "[::2]",
            "127.0.0.1.example.org",
        ] {
            assert!(!is_loopback(name), "{name}");
        }
    }
}
