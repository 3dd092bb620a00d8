//! Who may ask: whoever has a token of the cluster, in a header or in the cookie that the page gets for it; a viewer's
//! token shows, an operator's also changes. Without a token the coordinator asks to be called by a loopback name: a page of
//! a foreign name that was made to point here is not answered.
//!
//! The cookie is the time at which it ends, the token's name, and a code that only the coordinator can make, so that nothing
//! is kept here and a coordinator that is started again still knows it. A token that is revoked takes its cookies with it.

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
use cohort_common::net::Peer;
use cohort_common::security::{Role, TokenId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Failure, Json};
use super::{MAX_BODY, Web};
use crate::access::{Access, Caller, Denied};
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

/// What guards the coordinator, and what follows from it.
pub struct Auth {
    access: Access,
    /// Makes the codes of cookies; `None` where nothing guards.
    key: Option<[u8; 32]>,
    tries: Mutex<HashMap<IpAddr, Tries>>,
}

/// Wrong tokens of an address: how many count at a moment.
struct Tries {
    wrong: u32,
    at: Instant,
}

impl Auth {
    /// Of a coordinator that is guarded so.
    pub fn new(access: Access) -> Self {
        let key = match &access {
            Access::Open => None,
            Access::Shared(token) => Some(token.derive_key(CONTEXT)),
            Access::Cluster(security) => Some(security.authority.derive_key(CONTEXT)),
        };
        Self {
            access,
            key,
            tries: Mutex::default(),
        }
    }

    /// Who asks, by the header, or else by a cookie.
    fn caller(&self, headers: &HeaderMap) -> Result<Caller, Denied> {
        let bearer = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        // A browser shows no certificate of a worker, and a worker asks for no page.
        self.access.caller(None, bearer).or_else(|denied| {
            let known = cookies(headers).find_map(|cookie| self.knows(cookie, now_ms()));
            known.ok_or(denied)
        })
    }

    fn code(&self, end: u64, who: &str) -> Option<blake3::Hash> {
        let text = format!("{end}-{who}");
        Some(blake3::keyed_hash(self.key.as_ref()?, text.as_bytes()))
    }

    /// A cookie's value that is good until `end`, in milliseconds since the epoch, for somebody who has shown a token.
    fn cookie(&self, end: u64, caller: Caller) -> Option<String> {
        let who = match caller {
            Caller::Bearer(id, role) => format!("{role}.{id}"),
            Caller::Anybody | Caller::Worker(_) => String::new(),
        };
        let code = self.code(end, &who)?.to_hex();
        Some(format!("{end}-{who}-{code}"))
    }

    /// Whose a cookie's value is, if it is one of ours and still good.
    fn knows(&self, cookie: &str, now: u64) -> Option<Caller> {
        let mut parts = cookie.splitn(3, '-');
        let (end, who, code) = (parts.next()?, parts.next()?, parts.next()?);
        let end: u64 = end.parse().ok()?;
        let code = blake3::Hash::from_hex(code).ok()?;
        // Hashes compare in constant time.
        if Some(code) != self.code(end, who) || now >= end {
            return None;
        }
        let Some((role, id)) = who.split_once('.') else {
            return Some(Caller::Anybody);
        };
        let (role, id): (Role, TokenId) = (role.parse().ok()?, id.parse().ok()?);
        self.access.still_admits(id).ok()?;
        Some(Caller::Bearer(id, role))
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

/// The values of all cookies of our name.
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let texts = headers.get_all(COOKIE).iter();
    let texts = texts.filter_map(|value| value.to_str().ok());
    let pairs = texts.flat_map(|text| text.split(';'));
    pairs.filter_map(|pair| pair.trim().strip_prefix(NAME)?.strip_prefix('='))
}

/// Lets only those pass who have a token that allows it.
pub async fn require_token(State(web): State<Arc<Web>>, request: Request, next: Next) -> Response {
    let needed = match request.method().is_safe() {
        true => Role::Viewer,
        false => Role::Operator,
    };
    let denied = match web.auth.caller(request.headers()) {
        Ok(caller) if caller.may(needed) => {
            if let Some(peer) = request.extensions().get::<Peer>() {
                peer.let_in();
            }
            return next.run(request).await;
        }
        Ok(caller) => {
            let what = format!("{} {}", request.method(), request.uri().path());
            let text = caller.denied(what, needed).to_string();
            return Failure::new(StatusCode::FORBIDDEN, text).into_response();
        }
        Err(denied) => denied,
    };
    let text = match denied {
        Denied::Missing | Denied::Wrong => {
            "this coordinator wants its token: sign in on its page, or send the header `authorization: Bearer TOKEN`".into()
        }
        other => other.to_string(),
    };
    let way = [(WWW_AUTHENTICATE, "Bearer")];
    (way, Failure::new(StatusCode::UNAUTHORIZED, text)).into_response()
}

/// Where there is no token, lets only those pass who call this machine by one of its own names.
pub async fn require_own_name(
    State(web): State<Arc<Web>>,
    request: Request,
    next: Next,
) -> Response {
    if web.auth.access.is_guarded() {
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
    let caller = web.auth.caller(&headers).ok();
    let may = |role: Role| caller.is_some_and(|caller| caller.may(role));
    Json(json!({
        "required": web.auth.access.is_guarded(),
        "signed_in": may(Role::Viewer),
        "may_act": may(Role::Operator),
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
    if !web.auth.access.is_guarded() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let peer = request
        .extensions()
        .get::<Peer>()
        .cloned()
        .unwrap_or_default();
    let address = peer
        .address
        .map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.ip());
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
    let caller = match web.auth.access.caller(None, Some(shown.as_bytes())) {
        Ok(caller) if caller.may(Role::Viewer) => caller,
        Ok(caller) => {
            let text = caller.denied("the page".into(), Role::Viewer).to_string();
            return Err(Failure::new(StatusCode::FORBIDDEN, text));
        }
        Err(denied) => {
            web.auth.was_wrong(address, Instant::now());
            let text = match denied {
                Denied::Missing | Denied::Wrong => "this is not the coordinator's token".into(),
                other => other.to_string(),
            };
            return Err(Failure::new(StatusCode::UNAUTHORIZED, text));
        }
    };
    let value = web.auth.cookie(now_ms() + LIFE.as_millis() as u64, caller);
    Ok(set_cookie(&value.unwrap_or_default(), LIFE, peer.private))
}

/// `DELETE /api/session`: the browser forgets its cookie.
pub async fn sign_out(_: Deliberate) -> Response {
    set_cookie("", Duration::ZERO, false)
}

fn set_cookie(value: &str, life: Duration, private: bool) -> Response {
    let (age, only) = (life.as_secs(), if private { "; Secure" } else { "" });
    let cookie = format!("{NAME}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={age}{only}");
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
    use cohort_common::net::Token;
    use cohort_common::security::Security;

    use super::*;

    fn shared(token: &str) -> Auth {
        Auth::new(Access::Shared(Token::new(token).unwrap()))
    }

    #[test]
    fn a_cookie_is_good_until_its_end_and_cannot_be_made_up() {
        let auth = shared("0123456789abcdef");
        let cookie = auth.cookie(1000, Caller::Anybody).unwrap();
        assert_eq!(auth.knows(&cookie, 999), Some(Caller::Anybody));
        assert_eq!(auth.knows(&cookie, 1000), None);
        let longer = cookie.replacen("1000", "9000", 1);
        assert_eq!(auth.knows(&longer, 999), None);
        for made_up in [
            "",
            "-",
            "--",
            "1000",
            "1000-",
            "1000--",
            "x--00",
            &cookie[..cookie.len() - 1],
        ] {
            assert_eq!(auth.knows(made_up, 0), None, "{made_up}");
        }
        assert_eq!(shared("another-token-of-16").knows(&cookie, 999), None);
    }

    #[test]
    fn a_cookie_has_the_role_of_its_token_and_ends_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let security = Security::create(&directory.path().join("s"), &[], 1).unwrap();
        let (authority, keyring) = (security.authority.fingerprint(), &security.keyring);
        let token = keyring
            .create(Role::Viewer, authority, "", 1, None)
            .unwrap();
        let security = Arc::new(security);
        let auth = Auth::new(Access::Cluster(security.clone()));
        let caller = Caller::Bearer(token.id, Role::Viewer);
        let cookie = auth.cookie(1000, caller).unwrap();
        assert_eq!(auth.knows(&cookie, 1), Some(caller));
        assert_eq!(auth.knows(&cookie.replace("viewer", "operator"), 1), None);
        security.keyring.revoke(&token.id.to_string(), 2).unwrap();
        assert_eq!(auth.knows(&cookie, 1), None);
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
        let auth = Auth::new(Access::Open);
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
