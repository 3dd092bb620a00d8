//! Certificates for workers: for a token when they come in, and for the certificate that they have when it will soon end.

use std::time::Duration;

use cohort_common::net::Peer;
use cohort_common::security::{Role, SecurityError, TokenId};
use cohort_proto::v1;
use cohort_proto::v1::join_server::Join;
use tonic::{Request, Response, Status};
use tracing::info;

use crate::access::{Access, Caller, now};

/// Bytes of a request for a certificate, at most. One is about 200.
const MAX_REQUEST: usize = 4096;

/// Serves [`Join`].
pub struct JoinService {
    /// Who may.
    pub access: Access,
    /// How long a certificate lasts.
    pub life: Duration,
}

#[tonic::async_trait]
impl Join for JoinService {
    async fn certify(
        &self,
        request: Request<v1::CertifyRequest>,
    ) -> Result<Response<v1::CertifyReply>, Status> {
        let Access::Cluster(security) = &self.access else {
            return Err(Status::failed_precondition(
                "this coordinator has no authority that could sign a certificate; `cohort init` makes one",
            ));
        };
        let caller = request.extensions().get::<Caller>().copied();
        let token = who(caller)?;
        let address = request
            .extensions()
            .get::<Peer>()
            .and_then(|peer| peer.address);
        let request = request.into_inner().request;
        if request.len() > MAX_REQUEST {
            return Err(Status::invalid_argument(format!(
                "the request has {} bytes, more than {MAX_REQUEST}",
                request.len()
            )));
        }
        let begins = now();
        let signed = security
            .authority
            .certify(&request, token, (begins, self.life));
        let signed =
            signed.map_err(|error: SecurityError| Status::invalid_argument(error.to_string()))?;
        info!(%token, ?address, ends_in_s = self.life.as_secs(), "certified a worker");
        Ok(Response::new(v1::CertifyReply {
            certificate: signed.certificate.to_vec().into(),
            authority: security.authority.certificate().to_vec().into(),
            begins,
            ends: signed.ends,
        }))
    }
}

/// The token by which the caller comes in as a worker.
fn who(caller: Option<Caller>) -> Result<TokenId, Status> {
    match caller {
        Some(Caller::Worker(token) | Caller::Bearer(token, Role::Worker)) => Ok(token),
        Some(other) => {
            let denied = other.denied("joining as a worker".into(), Role::Worker);
            Err(denied.into())
        }
        None => Err(Status::internal("nobody has asked who calls")),
    }
}
