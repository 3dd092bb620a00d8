//! Who may call what: by a shared token, or in an initialised cluster by tokens with roles and by workers' certificates.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::Response;
use cohort_common::api::Whoami;
use cohort_common::net::{Peer, Token};
use cohort_common::protocol::{self, Mismatch, PROTOCOL_KEY, Speaker};
use cohort_common::security::{Refusal, Role, Security, TokenId};
use tonic::Status;

use crate::driver::now_ms;

/// What guards a coordinator.
#[derive(Clone, Debug)]
pub enum Access {
    /// Nothing: whoever reaches it may do everything.
    Open,
    /// One token for everybody and everything.
    Shared(Token),
    /// Tokens with roles, and certificates.
    Cluster(Arc<Security>),
}

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Whoever has the shared token, or anybody where nothing guards.
    Anybody,
    /// The bearer of a cluster's token.
    Bearer(TokenId, Role),
    /// A worker with a certificate, and the token by which it came in.
    Worker(TokenId),
}

impl Caller {
    /// Whether it may do what a role may.
    pub fn may(self, needed: Role) -> bool {
        match self {
            Self::Anybody => true,
            // A worker's token gets it a certificate, and nothing else.
            Self::Bearer(_, role) => role != Role::Worker && role.may(needed),
            Self::Worker(_) => Role::Worker.may(needed),
        }
    }

    /// This caller, if it may call that.
    fn permitted(self, path: &str) -> Result<Self, Denied> {
        let allowed = allowed(path);
        match allowed.first() {
            Some(&needed) if !allowed.iter().any(|&role| self.may(role)) => {
                let what = format!("`{}`", path.rsplit('/').next().unwrap_or(path));
                Err(self.denied(what, needed))
            }
            _ => Ok(self),
        }
    }

    /// That it may not.
    pub fn denied(self, what: String, needed: Role) -> Denied {
        Denied::Role {
            who: self.describe(),
            what,
            needed,
        }
    }

    fn describe(self) -> String {
        match self {
            Self::Anybody => "this token".into(),
            Self::Bearer(id, role) => format!("the token {id} of {}", role.phrase()),
            Self::Worker(id) => format!("the certificate of a worker (of the token {id})"),
        }
    }
}

/// Why somebody is not let in.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Denied {
    /// Nothing was shown.
    #[error(
        "the coordinator wants a token that this call does not carry; give --token-file or COHORT_TOKEN"
    )]
    Missing,
    /// Something else was shown.
    #[error("this is not the coordinator's token; check --token-file or COHORT_TOKEN")]
    Wrong,
    /// A token, or the certificate that came of it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It does not suffice.
    #[error("{who} does not allow {what}; that needs one of {}", .needed.phrase())]
    Role {
        /// Who asked.
        who: String,
        /// For what.
        what: String,
        /// What would be needed.
        needed: Role,
    },
}

impl From<Denied> for Status {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Role { .. } => Self::permission_denied(denied.to_string()),
            _ => Self::unauthenticated(denied.to_string()),
        }
    }
}

impl Access {
    /// Who calls: the worker whose certificate the connection has (of this token), or else the bearer of what `authorization`
    /// carries.
    pub fn caller(
        &self,
        certified: Option<TokenId>,
        bearer: Option<&[u8]>,
    ) -> Result<Caller, Denied> {
        let security = match self {
            Self::Open => return Ok(Caller::Anybody),
            Self::Shared(token) => {
                let bearer = bearer.ok_or(Denied::Missing)?;
                return match token.admits_header(bearer) {
                    true => Ok(Caller::Anybody),
                    false => Err(Denied::Wrong),
                };
            }
            Self::Cluster(security) => security,
        };
        if let Some(worker) = certified {
            security.keyring.still_admits(worker, now())?;
            return Ok(Caller::Worker(worker));
        }
        let token = Token::shown(bearer.ok_or(Denied::Missing)?).ok_or(Denied::Wrong)?;
        let role = security.keyring.admit(&token, now())?;
        Ok(Caller::Bearer(token.id, role))
    }

    /// Whether it tells callers apart by what they show.
    pub fn is_guarded(&self) -> bool {
        !matches!(self, Self::Open)
    }

    /// What a caller is told of itself.
    pub fn whoami(&self, caller: Option<Caller>) -> Whoami {
        let (role, token) = match caller {
            Some(Caller::Bearer(token, role)) => (Some(role), Some(token)),
            Some(Caller::Worker(token)) => (Some(Role::Worker), Some(token)),
            Some(Caller::Anybody) | None => (None, None),
        };
        let token = token.map(|token| token.to_string());
        let listed = match self {
            Self::Cluster(security) => security.keyring.list().unwrap_or_default(),
            Self::Open | Self::Shared(_) => Vec::new(),
        };
        let kept = listed
            .into_iter()
            .find(|kept| Some(&kept.id) == token.as_ref());
        Whoami {
            version: env!("CARGO_PKG_VERSION").into(),
            time_ms: now_ms(),
            role,
            token,
            expires: kept.and_then(|kept| kept.expires),
        }
    }

    /// Whether who was let in by a token may stay.
    pub fn still_admits(&self, token: TokenId) -> Result<(), Refusal> {
        match self {
            Self::Cluster(security) => security.keyring.still_admits(token, now()),
            Self::Open | Self::Shared(_) => Ok(()),
        }
    }
}

/// The roles that may call something of gRPC. Where there is none, the call itself decides. What is not named here changes
/// something.
fn allowed(path: &str) -> &'static [Role] {
    let (service, method) = path.rsplit_once('/').unwrap_or((path, ""));
    let service = service.rsplit_once('.').map_or(service, |(_, name)| name);
    match (service, method) {
        ("Join", _) | ("Client", "Whoami") | ("Data", "Echo") => &[],
        ("Workers" | "Exchange" | "Tokenize", _) | ("Data", "UploadState") => &[Role::Worker],
        ("Data", "MissingFiles" | "UploadFile") => &[Role::Operator],
        ("Data", _) => &[Role::Viewer, Role::Worker],
        (
            "Client",
            "Cluster" | "ViewCluster" | "ViewRun" | "History" | "Metrics" | "ListCorpora"
            | "ShowCorpus" | "HeadCorpus" | "CountCorpus" | "ListRuns" | "GetRun" | "Follow"
            | "Resolve" | "Ledger" | "Verify",
        ) => &[Role::Viewer],
        _ => &[Role::Operator],
    }
}

/// Whether anybody may call that: who watches over processes has no token.
fn is_open(path: &str) -> bool {
    path.starts_with("/grpc.health.v1.Health/")
}

/// Whether a caller speaks the coordinator's protocol. Workers must say what they speak.
fn speaks(request: &Request) -> Result<(), Mismatch> {
    let here = Speaker::here();
    let said = request.headers().get(PROTOCOL_KEY);
    let said = said.map(|said| String::from_utf8_lossy(said.as_bytes()));
    let caller = protocol::admit(said.as_deref(), &here)?;
    let must_say = request.uri().path().starts_with("/cohort.v1.Workers/");
    match caller {
        None if must_say => Err(Mismatch::Silent(here)),
        _ => Ok(()),
    }
}

/// Lets only those pass who may, and tells the handlers who that is.
pub async fn guard(State(access): State<Access>, mut request: Request, next: Next) -> Response {
    if let Err(mismatch) = speaks(&request) {
        return Status::failed_precondition(mismatch.to_string()).into_http::<Body>();
    }
    let bearer = request.headers().get(AUTHORIZATION);
    let peer = request.extensions().get::<Peer>();
    let path = request.uri().path();
    let caller = access
        .caller(
            peer.and_then(|peer| peer.worker),
            bearer.map(|value| value.as_bytes()),
        )
        .and_then(|caller| caller.permitted(path));
    match caller {
        Ok(caller) => {
            if let Some(peer) = peer {
                peer.let_in();
            }
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        // A stranger stays one.
        Err(_) if is_open(request.uri().path()) => next.run(request).await,
        Err(denied) => Status::from(denied).into_http::<Body>(),
    }
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    now_ms() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(call: &str) -> String {
        format!("/cohort.v1.{call}")
    }

    #[test]
    fn each_role_has_its_calls() {
        let id = "00000001".parse().unwrap();
        let bearer = |role| Caller::Bearer(id, role);
        let callers = [
            bearer(Role::Viewer),
            bearer(Role::Operator),
            bearer(Role::Worker),
            Caller::Worker(id),
            Caller::Anybody,
        ];
        for (call, expected) in [
            ("Client/Follow", [true, true, false, false, true]),
            ("Client/Submit", [false, true, false, false, true]),
            ("Client/RemoveRun", [false, true, false, false, true]),
            ("Client/SomethingNew", [false, true, false, false, true]),
            ("Data/Shard", [true, true, false, true, true]),
            ("Data/UploadFile", [false, true, false, false, true]),
            ("Data/UploadState", [false, false, false, true, true]),
            ("Tokenize/Batches", [false, false, false, true, true]),
            ("Workers/Session", [false, false, false, true, true]),
            ("Exchange/PushPull", [false, false, false, true, true]),
            // The call itself looks at whom it certifies.
            ("Join/Certify", [true; 5]),
            // Whoever is let in may see as whom, and how good the connection is.
            ("Client/Whoami", [true; 5]),
            ("Data/Echo", [true; 5]),
        ] {
            let may = callers.map(|caller| caller.permitted(&path(call)).is_ok());
            assert_eq!(may, expected, "{call}");
        }
        let denied = bearer(Role::Viewer).permitted(&path("Client/Cancel"));
        assert_eq!(
            denied.unwrap_err().to_string(),
            "the token 00000001 of a viewer does not allow `Cancel`; that needs one of an operator"
        );
    }

    #[test]
    fn a_shared_token_is_the_only_one() {
        let access = Access::Shared(Token::new("0123456789abcdef").unwrap());
        let caller = |bearer: Option<&str>| access.caller(None, bearer.map(str::as_bytes));
        assert!(matches!(caller(None), Err(Denied::Missing)));
        assert!(matches!(
            caller(Some("Bearer 0123456789abcdeg")),
            Err(Denied::Wrong)
        ));
        assert_eq!(
            caller(Some("Bearer 0123456789abcdef")).unwrap(),
            Caller::Anybody
        );
    }

    #[test]
    fn a_certificate_counts_before_a_token_and_only_while_nobody_revokes_it() {
        let directory = tempfile::tempdir().unwrap();
        let security = Security::create(&directory.path().join("s"), &[], now()).unwrap();
        let authority = security.authority.fingerprint();
        let token = security
            .keyring
            .create(Role::Worker, authority, "", now(), None);
        let token = token.unwrap();
        let access = Access::Cluster(Arc::new(security));
        let caller = access.caller(Some(token.id), Some(b"Bearer nonsense"));
        assert_eq!(caller.unwrap(), Caller::Worker(token.id));
        let bearer = format!("Bearer {token}");
        let caller = access.caller(None, Some(bearer.as_bytes()));
        assert_eq!(caller.unwrap(), Caller::Bearer(token.id, Role::Worker));
        let Access::Cluster(security) = &access else {
            panic!("just made");
        };
        security
            .keyring
            .revoke(&token.id.to_string(), now())
            .unwrap();
        let refused = access.caller(Some(token.id), None);
        assert!(matches!(
            refused,
            Err(Denied::Refused(Refusal::Revoked { .. }))
        ));
        assert!(
            access
                .caller(None, Some(b"Bearer 0123456789abcdef"))
                .is_err()
        );
    }
}
