//! The key of a process and its certificate. Connections take them from here when they are opened, so that a certificate is
//! renewed without a restart.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use rcgen::{CertificateParams, KeyPair};
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{SignatureScheme, crypto::ring};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

use super::authority::certificate_error;
use super::files::{read, write_private};
use super::{Fingerprint, SecurityError, Subject, TokenId};

/// A key that wants a certificate.
pub struct Request {
    key: KeyPair,
    der: Vec<u8>,
}

impl Request {
    /// With a new key.
    pub fn new() -> Result<Self, SecurityError> {
        Self::of(KeyPair::generate().map_err(certificate_error)?)
    }

    fn of(key: KeyPair) -> Result<Self, SecurityError> {
        let request = CertificateParams::default()
            .serialize_request(&key)
            .map_err(certificate_error)?;
        let der = request.der().to_vec();
        Ok(Self { key, der })
    }

    /// What the authority is asked (PKCS #10, DER).
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The credential, with what the authority has answered.
    ///
    /// # Errors
    /// If the certificate is for another key, or names no worker.
    pub fn granted(
        self,
        authority: Vec<u8>,
        certificate: Vec<u8>,
        begins: u64,
        ends: u64,
    ) -> Result<Credential, SecurityError> {
        Credential::of(Stored {
            authority: pem("CERTIFICATE", &authority),
            certificate: pem("CERTIFICATE", &certificate),
            key: self.key.serialize_pem(),
            begins,
            ends,
        })
    }
}

/// A credential as it is kept in a file.
#[derive(Clone, Serialize, Deserialize)]
pub struct Stored {
    authority: String,
    certificate: String,
    key: String,
    begins: u64,
    ends: u64,
}

/// Who a process is: a key, and the certificate of the cluster's authority for it.
pub struct Credential {
    authority: CertificateDer<'static>,
    current: RwLock<(Stored, Arc<CertifiedKey>)>,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credential({:?})", self.token())
    }
}

impl Credential {
    /// Reads one from a file.
    pub fn open(path: &Path) -> Result<Self, SecurityError> {
        let damaged = |reason: String| SecurityError::Damaged {
            path: path.to_owned(),
            reason,
        };
        let stored = serde_json::from_str(&read(path)?);
        let stored = stored.map_err(|error| damaged(error.to_string()))?;
        Self::of(stored).map_err(|error| damaged(error.to_string()))
    }

    /// Keeps it in a file that only its owner may read.
    pub fn save(&self, path: &Path) -> Result<(), SecurityError> {
        let text = serde_json::to_string_pretty(&self.read().0).expect("texts and numbers");
        write_private(path, text.as_bytes())
    }

    fn of(stored: Stored) -> Result<Self, SecurityError> {
        let authority = certificate(&stored.authority)?;
        let certified = certified(&stored, &authority)?;
        Ok(Self {
            authority,
            current: RwLock::new((stored, certified)),
        })
    }

    /// The authority's certificate.
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    /// The cluster that it is for.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.authority)
    }

    /// The token by which its bearer came in.
    pub fn token(&self) -> Option<TokenId> {
        let current = self.read();
        match Subject::of(current.1.cert.first()?)? {
            Subject::Worker(token) => Some(token),
            Subject::Coordinator => None,
        }
    }

    /// When the certificate ends, in seconds since the epoch.
    pub fn ends(&self) -> u64 {
        self.read().0.ends
    }

    /// When to ask for the next one: when two thirds of its life are over.
    pub fn due(&self) -> u64 {
        let stored = &self.read().0;
        stored.begins + stored.ends.saturating_sub(stored.begins) / 3 * 2
    }

    /// What the authority is asked for the next certificate. The key stays.
    pub fn request(&self) -> Result<Vec<u8>, SecurityError> {
        let key = KeyPair::from_pem(&self.read().0.key).map_err(certificate_error)?;
        Ok(Request::of(key)?.der)
    }

    /// Takes the next certificate; connections that are opened from now on show it.
    pub fn renew(&self, der: &[u8], begins: u64, ends: u64) -> Result<(), SecurityError> {
        let stored = Stored {
            certificate: pem("CERTIFICATE", der),
            begins,
            ends,
            ..self.read().0.clone()
        };
        let certified = certified(&stored, &self.authority)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = (stored, certified);
        Ok(())
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, (Stored, Arc<CertifiedKey>)> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResolvesClientCert for Credential {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.read().1.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Credential {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.read().1.clone())
    }
}

fn certificate(pem: &str) -> Result<CertificateDer<'static>, SecurityError> {
    let read = CertificateDer::from_pem_slice(pem.as_bytes());
    read.map_err(|error| SecurityError::Certificate(error.to_string()))
}

/// The chain that is shown: the certificate, and the authority's, by which the other side knows the cluster.
fn certified(
    stored: &Stored,
    authority: &CertificateDer<'static>,
) -> Result<Arc<CertifiedKey>, SecurityError> {
    let failed = |error: String| SecurityError::Certificate(error);
    let key = PrivateKeyDer::from_pem_slice(stored.key.as_bytes());
    let key = key.map_err(|error| failed(error.to_string()))?;
    let chain = vec![certificate(&stored.certificate)?, authority.clone()];
    chain_of(chain, key)
}

/// A chain with its key, if they belong together.
pub(super) fn chain_of(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, SecurityError> {
    CertifiedKey::from_der(chain, key, &ring::default_provider())
        .map(Arc::new)
        .map_err(|error| SecurityError::Certificate(error.to_string()))
}

fn pem(label: &str, der: &[u8]) -> String {
    ::pem::encode(&::pem::Pem::new(label, der))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Authority, Security};
    use super::*;

    fn granted(authority: &Authority, token: TokenId) -> Result<Credential, SecurityError> {
        let request = Request::new()?;
        let span = (1000, Duration::from_secs(300));
        let signed = authority.certify(request.der(), token, span)?;
        let of_authority = authority.certificate().to_vec();
        request.granted(of_authority, signed.certificate.to_vec(), 1000, 1300)
    }

    #[test]
    fn a_credential_is_kept_and_renewed() {
        let directory = tempfile::tempdir().unwrap();
        let security = Security::create(&directory.path().join("security"), &[], 1000).unwrap();
        let token = "00c0ffee".parse().unwrap();
        let credential = granted(&security.authority, token).unwrap();
        let path = directory.path().join("identity.json");
        credential.save(&path).unwrap();
        let opened = Credential::open(&path).unwrap();
        assert_eq!(opened.token(), Some(token));
        assert_eq!(opened.fingerprint(), security.authority.fingerprint());
        assert_eq!((opened.due(), opened.ends()), (1200, 1300));
        let next = security.authority.certify(
            &opened.request().unwrap(),
            token,
            (1200, Duration::from_secs(300)),
        );
        let next = next.unwrap().certificate;
        opened.renew(&next, 1200, 1500).unwrap();
        assert_eq!((opened.due(), opened.ends()), (1400, 1500));
        // A certificate of another key is no use.
        let other = granted(&security.authority, token).unwrap();
        let other = other.read().1.cert[0].to_vec();
        assert!(opened.renew(&other, 1, 2).is_err());
        assert_eq!(opened.ends(), 1500);
        std::fs::write(&path, "{").unwrap();
        let error = Credential::open(&path).unwrap_err().to_string();
        assert!(error.contains("is damaged"), "{error}");
    }
}
