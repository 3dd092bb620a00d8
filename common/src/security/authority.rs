//! The authority of a cluster, who signs the certificates of its processes, and what a certificate says.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::files::{read, write_private};
use super::{Fingerprint, SecurityError, TokenId, check_version, random};

/// The file with the private key.
pub const KEY: &str = "authority.key";
const CERTIFICATE: &str = "authority.pem";
const CLUSTER: &str = "cluster.json";

/// The version of what is known of a cluster.
const VERSION: u32 = 1;

/// How long an authority lasts.
const LIFE: Duration = Duration::from_secs(20 * 365 * 86_400);

/// How far a peer's clock may be behind.
const SKEW: Duration = Duration::from_secs(600);

// Names that only mean something within a cluster; `internal` is reserved for such use.
pub(super) const COORDINATOR: &str = "coordinator.cohort.internal";
pub(super) const WORKER: &str = "worker.cohort.internal";
/// What follows a token's name in the certificates of those that came in by it.
const OF_TOKEN: &str = ".token.cohort.internal";

/// Whom a certificate names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The coordinator.
    Coordinator,
    /// A worker that came in by this token.
    Worker(TokenId),
}

impl Subject {
    /// The name that all of its kind have.
    fn kind(self) -> &'static str {
        match self {
            Self::Coordinator => COORDINATOR,
            Self::Worker(_) => WORKER,
        }
    }

    fn names(self) -> Vec<String> {
        let kind = self.kind().to_owned();
        match self {
            Self::Coordinator => vec![kind],
            Self::Worker(id) => vec![kind, format!("{id}{OF_TOKEN}")],
        }
    }

    /// Whom a certificate names that the authority has signed.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
        let names: Vec<&str> = certificate.valid_dns_names().collect();
        if names.contains(&COORDINATOR) {
            return Some(Self::Coordinator);
        }
        let token = names.iter().find_map(|name| name.strip_suffix(OF_TOKEN));
        Some(Self::Worker(token?.parse().ok()?))
    }
}

/// A certificate, and when it ends.
#[derive(Clone, Debug)]
pub struct Certified {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// When it ends, in seconds since the epoch.
    pub ends: u64,
}

/// Who signs for a cluster.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    names: Vec<String>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({})", self.fingerprint())
    }
}

/// What else is known of a cluster.
#[derive(Serialize, Deserialize)]
struct Cluster {
    version: u32,
    /// Names and addresses of the coordinator, for browsers.
    names: Vec<String>,
}

impl Authority {
    /// Makes an authority and keeps it in a directory.
    pub(super) fn create(
        directory: &Path,
        names: &[String],
        now: u64,
    ) -> Result<Self, SecurityError> {
        for name in names {
            host(name)?;
        }
        let key = KeyPair::generate().map_err(certificate_error)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named("Cohort cluster authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = span(now, LIFE)?;
        let certificate = params.self_signed(&key).map_err(certificate_error)?;
        let cluster = Cluster {
            version: VERSION,
            names: names.to_vec(),
        };
        let cluster = serde_json::to_string_pretty(&cluster).expect("names are plain data");
        write_private(&directory.join(CERTIFICATE), certificate.pem().as_bytes())?;
        write_private(&directory.join(CLUSTER), cluster.as_bytes())?;
        // Last: with it the cluster is there.
        write_private(&directory.join(KEY), key.serialize_pem().as_bytes())?;
        Self::open(directory)
    }

    /// Opens an authority.
    pub(super) fn open(directory: &Path) -> Result<Self, SecurityError> {
        let damaged = |name: &str, reason: &dyn std::fmt::Display| SecurityError::Damaged {
            path: directory.join(name),
            reason: reason.to_string(),
        };
        let pem = read(&directory.join(CERTIFICATE))?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| damaged(CERTIFICATE, &error))?;
        let key = KeyPair::from_pem(&read(&directory.join(KEY))?)
            .map_err(|error| damaged(KEY, &error))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| damaged(CERTIFICATE, &error))?;
        let path = directory.join(CLUSTER);
        let cluster: Cluster =
            serde_json::from_str(&read(&path)?).map_err(|error| damaged(CLUSTER, &error))?;
        check_version(&path, cluster.version, VERSION)?;
        Ok(Self {
            issuer,
            certificate,
            names: cluster.names,
        })
    }

    /// By what the cluster is known.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// A key that follows from the authority's own, for one purpose, which `context` names.
    pub fn derive_key(&self, context: &str) -> [u8; 32] {
        blake3::derive_key(context, self.issuer.key().serialized_der())
    }

    /// Signs a request of a worker that came in by a token, from now on for a while. Of the request only the public key
    /// counts.
    pub fn certify(
        &self,
        request: &[u8],
        token: TokenId,
        (now, life): (u64, Duration),
    ) -> Result<Certified, SecurityError> {
        let request = CertificateSigningRequestDer::from(request);
        let request =
            CertificateSigningRequestParams::from_der(&request).map_err(certificate_error)?;
        self.sign(
            &request.public_key,
            Subject::Worker(token),
            &[],
            (now, life),
        )
    }

    /// A certificate for the coordinator, whose key is here.
    pub(super) fn certify_coordinator(
        &self,
        key: &KeyPair,
        span: (u64, Duration),
    ) -> Result<Certified, SecurityError> {
        self.sign(key, Subject::Coordinator, &self.names, span)
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        subject: Subject,
        hosts: &[String],
        (now, life): (u64, Duration),
    ) -> Result<Certified, SecurityError> {
        let mut params = CertificateParams::new(subject.names()).map_err(certificate_error)?;
        for name in hosts {
            params.subject_alt_names.push(host(name)?);
        }
        params.distinguished_name = named(subject.kind());
        params.serial_number = Some(rcgen::SerialNumber::from_slice(&random::<16>()));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = span(now, life)?;
        let ends = params.not_after.unix_timestamp() as u64;
        let certificate = params
            .signed_by(key, &self.issuer)
            .map_err(certificate_error)?;
        Ok(Certified {
            certificate: certificate.der().clone(),
            ends,
        })
    }
}

/// From when to when something is good that is made now, in seconds since the epoch.
fn span(now: u64, life: Duration) -> Result<(OffsetDateTime, OffsetDateTime), SecurityError> {
    let at = i64::try_from(now)
        .ok()
        .and_then(|now| OffsetDateTime::from_unix_timestamp(now).ok());
    let at =
        at.ok_or_else(|| SecurityError::Certificate("the clock is out of any range".into()))?;
    Ok((at - SKEW, at + life))
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// A host name or an address, as certificates carry it.
fn host(name: &str) -> Result<SanType, SecurityError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let wrong = || SecurityError::Name(name.into());
    if rustls_pki_types::DnsName::try_from(name).is_err() {
        return Err(wrong());
    }
    Ok(SanType::DnsName(name.try_into().map_err(|_| wrong())?))
}

pub(super) fn certificate_error(error: rcgen::Error) -> SecurityError {
    SecurityError::Certificate(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_790_000_000;

    #[test]
    fn an_authority_is_opened_as_it_was_made_and_certificates_say_whom_they_name() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["trainer.example.org".to_owned(), "10.0.0.7".to_owned()];
        let made = Authority::create(directory.path(), &names, NOW).unwrap();
        let opened = Authority::open(directory.path()).unwrap();
        assert_eq!(opened.fingerprint(), made.fingerprint());
        assert_eq!(opened.derive_key("a"), made.derive_key("a"));
        let key = KeyPair::generate().unwrap();
        let life = (NOW, Duration::from_secs(60));
        let coordinator = opened.certify_coordinator(&key, life).unwrap();
        assert_eq!(
            Subject::of(&coordinator.certificate),
            Some(Subject::Coordinator)
        );
        let request = CertificateParams::new(["coordinator.cohort.internal".to_owned()]).unwrap();
        let request = request.serialize_request(&key).unwrap();
        let token = "0a1b2c3d".parse().unwrap();
        // What a worker asks to be named changes nothing.
        let worker = opened.certify(request.der(), token, life).unwrap();
        assert_eq!(
            Subject::of(&worker.certificate),
            Some(Subject::Worker(token))
        );
        assert!(opened.certify(&request.der()[..50], token, life).is_err());
        let mut forged = request.der().to_vec();
        *forged.last_mut().unwrap() ^= 1;
        assert!(opened.certify(&forged, token, life).is_err());
    }

    #[test]
    fn names_that_are_none_are_refused_before_anything_is_written() {
        for name in ["", "a b", "-", "http://x"] {
            let directory = tempfile::tempdir().unwrap();
            let made = Authority::create(directory.path(), &[name.to_owned()], NOW);
            assert!(
                made.unwrap_err().to_string().contains("no host name"),
                "{name}"
            );
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }
}
