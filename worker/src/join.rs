//! How a worker gets into a cluster that is encrypted: for its token it gets a certificate, which it keeps and renews. Only
//! the certificate is shown from then on, to the coordinator and to other workers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cohort_common::home::IDENTITY;
use cohort_common::net::{ConnectError, Credentials, Places, Token};
use cohort_common::security::{ClusterToken, Credential, Request, Role, SecurityError, Trust};
use cohort_proto::v1;
use cohort_proto::v1::join_client::JoinClient;
use tracing::{info, warn};

use crate::{BACKOFF, Config, Error};

/// The longest wait between looks at the clock: it may be set, and machines sleep.
const LOOK: Duration = Duration::from_secs(60);

/// Makes the worker one that the cluster knows, if the cluster is encrypted: with the certificate that it has, or with one
/// that it gets for its token.
///
/// # Errors
/// If it has neither a certificate that is still good nor a token, or if the token gets it none.
pub async fn enter(config: &mut Config) -> Result<(), Error> {
    let wanted = config.token.as_ref().and_then(Token::of_cluster);
    if !config.coordinators.are_private()? {
        return match wanted {
            // It would be read by everybody on the way.
            Some(_) => Err(ConnectError::Unencrypted(config.coordinators.to_string()).into()),
            None => Ok(()),
        };
    }
    let token = config.token.take();
    let file = identity_file(&config.cache);
    let kept = kept(&file, wanted.as_ref())?;
    let credential = match (kept, wanted, token) {
        (Some(kept), ..) => kept,
        (None, Some(wanted), Some(token)) => {
            let credential = join(&config.coordinators, &wanted, token).await?;
            credential.save(&file)?;
            info!(token = %wanted.id, "this worker has a certificate now");
            credential
        }
        _ => return Err(Error::NoIdentity(config.coordinators.to_string())),
    };
    let trust = Trust::with(Arc::new(credential));
    let places = config.coordinators.clone();
    tokio::spawn(keep_good(places, trust.clone(), file));
    config.trust = Some(trust);
    Ok(())
}

/// Whether the worker's certificate, if it has one, is still good.
///
/// # Errors
/// If it ended before it could be renewed.
pub fn still_good(config: &Config) -> Result<(), Error> {
    let credential = config.trust.as_ref().and_then(Trust::credential);
    match credential.map(|credential| now().saturating_sub(credential.ends())) {
        None | Some(0) => Ok(()),
        Some(over) => Err(ended(over)),
    }
}

fn ended(seconds: u64) -> Error {
    Error::Refused(format!(
        "this worker's certificate ended {} min ago; start it with a token of `cohort token create --role worker`",
        seconds / 60
    ))
}

fn identity_file(cache: &Path) -> PathBuf {
    cache.join(IDENTITY)
}

/// The credential of an earlier time, if it is still good and came of the token that is given, if one is.
fn kept(file: &Path, wanted: Option<&ClusterToken>) -> Result<Option<Credential>, Error> {
    if !file.exists() {
        return Ok(None);
    }
    let kept = match Credential::open(file) {
        Ok(kept) => kept,
        // With a token there will be another.
        Err(_) if wanted.is_some() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let is_meant = |wanted: &ClusterToken| {
        kept.token() == Some(wanted.id) && kept.fingerprint() == wanted.authority
    };
    if !wanted.is_none_or(is_meant) {
        return Ok(None);
    }
    let over = now().saturating_sub(kept.ends());
    match (over, wanted) {
        (0, _) => Ok(Some(kept)),
        (_, Some(_)) => Ok(None),
        (over, None) => Err(ended(over)),
    }
}

async fn join(places: &Places, wanted: &ClusterToken, token: Token) -> Result<Credential, Error> {
    if wanted.role != Role::Worker {
        return Err(Error::Refused(format!(
            "the token {} is one of {}, and this is a worker: it needs one of `cohort token create --role worker`",
            wanted.id,
            wanted.role.phrase()
        )));
    }
    let request = Request::new()?;
    let trust = Trust::in_authority(wanted.authority);
    let reply = loop {
        match certify(places, &trust, Some(token.clone()), request.der().to_vec()).await {
            // They are there, and one of them will lead.
            Err(Error::Connect(error @ ConnectError::NobodyLeads(_))) => {
                info!(%error, "waiting for a coordinator that leads");
                tokio::time::sleep(BACKOFF.1).await;
            }
            reply => break reply?,
        }
    };
    let credential = request.granted(
        reply.authority.to_vec(),
        reply.certificate.to_vec(),
        reply.begins,
        reply.ends,
    )?;
    match credential.fingerprint() == wanted.authority {
        true => Ok(credential),
        false => Err(Error::Refused("the answer is of another authority".into())),
    }
}

async fn certify(
    places: &Places,
    trust: &Trust,
    token: Option<Token>,
    request: Vec<u8>,
) -> Result<v1::CertifyReply, Error> {
    let credentials = Credentials {
        token,
        trust: Some(trust.clone()),
        ..Credentials::default()
    };
    let found = places.leader(&credentials).await?;
    let mut client = JoinClient::with_interceptor(found.channel, credentials);
    let request = v1::CertifyRequest {
        request: request.into(),
    };
    let reply = client.certify(request).await;
    let reply = reply.map_err(|status| Error::Refused(status.message().to_owned()))?;
    Ok(reply.into_inner())
}

/// Renews the certificate whenever it is due, for as long as the process lives.
async fn keep_good(places: Places, trust: Trust, file: PathBuf) {
    let credential = trust.credential().expect("it has just got one").clone();
    loop {
        let left = Duration::from_secs(credential.due().saturating_sub(now()));
        if !left.is_zero() {
            tokio::time::sleep(left.min(LOOK)).await;
            continue;
        }
        match renew(&places, &trust, &credential).await {
            Ok(()) => {
                info!(ends = credential.ends(), "the certificate is renewed");
                if let Err(error) = credential.save(&file) {
                    warn!(%error, "the renewed certificate cannot be kept");
                }
            }
            Err(error) => {
                let left = credential.ends().saturating_sub(now());
                warn!(%error, left_s = left, "the certificate is not renewed");
                let pause = Duration::from_secs(left / 10);
                tokio::time::sleep(pause.clamp(Duration::from_secs(1), LOOK)).await;
            }
        }
    }
}

async fn renew(places: &Places, trust: &Trust, credential: &Credential) -> Result<(), Error> {
    let request = credential.request()?;
    let reply = certify(places, trust, None, request).await?;
    credential.renew(&reply.certificate, reply.begins, reply.ends)?;
    Ok(())
}

/// Seconds since the epoch.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

impl From<SecurityError> for Error {
    fn from(error: SecurityError) -> Self {
        Self::Security(error)
    }
}
