//! Both ends of a connection: TLS 1.3, in which each side knows the other by a certificate of the cluster's authority.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rcgen::KeyPair;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::authority::{COORDINATOR, WORKER, certificate_error};
use super::credential::{Credential, chain_of};
use super::{Fingerprint, Security, SecurityError};

/// Gives the seconds since the epoch.
pub type Clock = fn() -> u64;

/// Whom a client expects at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whom {
    /// The cluster's coordinator.
    Coordinator,
    /// Any of its workers.
    Worker,
}

/// How a client knows the cluster, and how the cluster knows it.
#[derive(Clone)]
pub struct Trust {
    config: Arc<ClientConfig>,
    credential: Option<Arc<Credential>>,
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Trust({:?})", self.credential)
    }
}

impl Trust {
    /// Of somebody without a certificate, who knows the authority's fingerprint.
    pub fn in_authority(authority: Fingerprint) -> Self {
        let config = client_config(authority).with_no_client_auth();
        Self::of(config, None)
    }

    /// Of a process that has a certificate.
    pub fn with(credential: Arc<Credential>) -> Self {
        let config = client_config(credential.fingerprint());
        Self::of(
            config.with_client_cert_resolver(credential.clone()),
            Some(credential),
        )
    }

    fn of(mut config: ClientConfig, credential: Option<Arc<Credential>>) -> Self {
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A session that is resumed would be known by an older certificate.
        config.resumption = rustls::client::Resumption::disabled();
        Self {
            config: Arc::new(config),
            credential,
        }
    }

    /// What its bearer shows, if anything.
    pub fn credential(&self) -> Option<&Arc<Credential>> {
        self.credential.as_ref()
    }

    /// Makes a connection private.
    pub async fn connect(
        &self,
        stream: TcpStream,
        whom: Whom,
    ) -> io::Result<client::TlsStream<TcpStream>> {
        let name = match whom {
            Whom::Coordinator => COORDINATOR,
            Whom::Worker => WORKER,
        };
        let name = ServerName::try_from(name).expect("a name");
        TlsConnector::from(self.config.clone())
            .connect(name, stream)
            .await
    }
}

/// The server's end of connections.
#[derive(Clone)]
pub struct Gate(TlsAcceptor);

impl Gate {
    /// The coordinator's: workers show a certificate, others need not. Its own certificate lasts for `life`, and is renewed
    /// when two thirds of that are over.
    pub fn of_coordinator(
        security: Arc<Security>,
        life: Duration,
        clock: Clock,
    ) -> Result<Self, SecurityError> {
        let authority = security.authority.certificate().clone();
        let issuing = Issuing {
            key: KeyPair::generate().map_err(certificate_error)?,
            security,
            life,
            clock,
            current: Mutex::default(),
        };
        // What cannot be issued now is better known now.
        issuing.current()?;
        Ok(Self::new(authority, true, Arc::new(issuing)))
    }

    /// A worker's: only other workers are let in.
    pub fn of_worker(credential: Arc<Credential>) -> Self {
        Self::new(credential.authority().clone(), false, credential)
    }

    fn new(
        authority: CertificateDer<'static>,
        anybody: bool,
        resolver: Arc<dyn ResolvesServerCert>,
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(authority).expect("an authority's certificate");
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let verifier = match anybody {
            true => verifier.allow_unauthenticated(),
            false => verifier,
        };
        let verifier: Arc<dyn ClientCertVerifier> = verifier.build().expect("there is a root");
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has TLS 1.3")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.send_tls13_tickets = 0;
        Self(TlsAcceptor::from(Arc::new(config)))
    }

    /// Makes a connection private.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<server::TlsStream<TcpStream>> {
        self.0.accept(stream).await
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn client_config(
    authority: Fingerprint,
) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let verifier = Pinned {
        authority,
        algorithms: ring::default_provider().signature_verification_algorithms,
    };
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
}

/// Trusts whoever shows a certificate of the authority with this fingerprint, together with the authority's own.
#[derive(Debug)]
struct Pinned {
    authority: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let known = |der: &&CertificateDer<'_>| Fingerprint::of(der) == self.authority;
        let Some(authority) = intermediates.iter().find(known) else {
            return Err(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &roots, &[], now, algorithms)?;
        verify_server_name(&certificate, name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

/// The coordinator's certificate, from the authority that is here.
struct Issuing {
    security: Arc<Security>,
    key: KeyPair,
    life: Duration,
    clock: Clock,
    /// The newest, and when it is to be renewed.
    current: Mutex<Option<(Arc<CertifiedKey>, u64)>>,
}

impl std::fmt::Debug for Issuing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Issuing({:?})", self.security.authority)
    }
}

impl Issuing {
    fn current(&self) -> Result<Arc<CertifiedKey>, SecurityError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.clock)();
        if let Some((certified, due)) = &*current
            && now < *due
        {
            return Ok(certified.clone());
        }
        let authority = &self.security.authority;
        let signed = authority.certify_coordinator(&self.key, (now, self.life))?;
        let key = PrivateKeyDer::Pkcs8(self.key.serialize_der().into());
        let chain = vec![signed.certificate, authority.certificate().clone()];
        let certified = chain_of(chain, key)?;
        let due = now + signed.ends.saturating_sub(now) / 3 * 2;
        *current = Some((certified.clone(), due));
        Ok(certified)
    }
}

impl ResolvesServerCert for Issuing {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.current();
        current
            .inspect_err(|error| tracing::error!(%error, "no certificate"))
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::super::Request;
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A cluster in a directory of its own.
    fn cluster() -> (tempfile::TempDir, Arc<Security>) {
        let directory = tempfile::tempdir().unwrap();
        let made = Security::create(
            &directory.path().join("security"),
            &[],
            now_of_the_machine(),
        );
        (directory, Arc::new(made.unwrap()))
    }

    fn worker(security: &Security) -> Arc<Credential> {
        let (request, token) = (Request::new().unwrap(), "00000007".parse().unwrap());
        let span = (now_of_the_machine(), HOUR);
        let signed = security.authority.certify(request.der(), token, span);
        let authority = security.authority.certificate().to_vec();
        let certificate = signed.unwrap().certificate.to_vec();
        let granted = request.granted(authority, certificate, span.0, span.0 + 3600);
        Arc::new(granted.unwrap())
    }

    /// rustls asks the machine what time it is.
    #[allow(clippy::disallowed_methods)]
    fn now_of_the_machine() -> u64 {
        let now = std::time::SystemTime::now();
        now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
    }

    fn coordinator(security: &Arc<Security>) -> Gate {
        Gate::of_coordinator(security.clone(), HOUR, now_of_the_machine).unwrap()
    }

    /// Whether a byte gets from the server to the client, who each trust what they see.
    async fn meet(gate: Gate, trust: Trust, whom: Whom) -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let serving = async {
            let (stream, _) = listener.accept().await?;
            let mut stream = gate.accept(stream).await?;
            stream.write_all(b"x").await?;
            stream.shutdown().await
        };
        let calling = async {
            let stream = TcpStream::connect(address).await?;
            let mut stream = trust.connect(stream, whom).await?;
            stream.read_exact(&mut [0]).await
        };
        let (served, called) = tokio::join!(serving, calling);
        called?;
        served
    }

    #[tokio::test]
    async fn those_of_one_cluster_trust_each_other() {
        let (_directory, security) = cluster();
        let stranger = Trust::in_authority(security.authority.fingerprint());
        let member = Trust::with(worker(&security));
        let gate = coordinator(&security);
        meet(gate.clone(), stranger, Whom::Coordinator)
            .await
            .unwrap();
        meet(gate, member.clone(), Whom::Coordinator).await.unwrap();
        let gate = Gate::of_worker(worker(&security));
        meet(gate, member, Whom::Worker).await.unwrap();
    }

    #[tokio::test]
    async fn nobody_poses_as_somebody_else() {
        let ((_one, ours), (_two, theirs)) = (cluster(), cluster());
        let refused = async |gate: Gate, trust: &Trust, whom: Whom| {
            assert!(meet(gate, trust.clone(), whom).await.is_err());
        };
        let stranger = Trust::in_authority(ours.authority.fingerprint());
        let (member, foreign) = (worker(&ours), worker(&theirs));
        // Another cluster's coordinator; a worker as the coordinator; the coordinator as a worker.
        refused(coordinator(&theirs), &stranger, Whom::Coordinator).await;
        let as_worker = Gate::of_worker(member.clone());
        let trust = Trust::with(member.clone());
        refused(as_worker.clone(), &trust, Whom::Coordinator).await;
        refused(coordinator(&ours), &trust, Whom::Worker).await;
        // Who has no certificate, or one of another cluster, at a worker's gate, and at the coordinator's.
        refused(as_worker, &stranger, Whom::Worker).await;
        refused(Gate::of_worker(foreign.clone()), &trust, Whom::Worker).await;
        refused(coordinator(&ours), &Trust::with(foreign), Whom::Coordinator).await;
    }
}
