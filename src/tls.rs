//! The TLS rules of a network, and the only place where a certificate is judged.
//!
//! Invariants: TLS 1.3 alone; no session is ever resumed, so every connection proves a certificate anew; certificates
//! are judged by webpki against the network's own authority (never the system's), and the hash of the presented key
//! must be the name in the certificate. Clients send no server name except to enroll, so ids do not cross the wire in
//! clear.
//!
//! The custom verifiers only add to webpki's judgement, with one exception: a tracker's self-signed certificate, which
//! is believed when the hash of its key is in the signed [`crate::trust::TrustList`] (or in a join token), and whose dates and
//! handshake signature are still checked.

use std::{
    sync::{Arc, RwLock},
    time::Duration,
};

use crate::{
    identity::{CertificateFacts, PeerId, Role, Subject, TRACKER_NAME},
    token::Pin,
    trust::Trust,
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring::cipher_suite, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};

const ALPN: &[u8] = b"h2";

/// Ciphers in our order: AES-128-GCM first where the CPU has AES, else ChaCha20.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    #[cfg(target_arch = "x86_64")]
    let aes = std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    let aes = std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let aes = false;
    let mut cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    if !aes {
        cipher_suites.rotate_right(1);
    }
    Arc::new(CryptoProvider {
        cipher_suites,
        ..rustls::crypto::ring::default_provider()
    })
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(Arc::new(roots))
}

/// Seconds until a certificate ends; negative if it has.
#[must_use]
pub fn seconds_left(certificate: &CertificateDer<'_>) -> i64 {
    let now = i64::try_from(UnixTime::now().as_secs()).unwrap_or(i64::MAX);
    CertificateFacts::read(certificate).map_or(0, |facts| facts.not_after) - now
}

/// A certificate in use, replaceable while connections come and go.
#[derive(Debug)]
pub struct LiveCertificate(RwLock<Arc<CertifiedKey>>);

impl LiveCertificate {
    /// Shows `chain`, which must belong to `key`.
    ///
    /// # Errors
    /// If the key is of an unsupported kind or does not match.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self(RwLock::new(certified(chain, key)?))))
    }

    /// Shows another certificate from the next handshake on.
    ///
    /// # Errors
    /// As [`LiveCertificate::new`]; the old one stays.
    pub fn replace(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), Error> {
        let fresh = certified(chain, key)?;
        *self.0.write().expect("no panic while the lock is held") = fresh;
        Ok(())
    }

    /// The certificate shown now.
    #[must_use]
    pub fn leaf(&self) -> CertificateDer<'static> {
        self.current().cert[0].clone()
    }

    fn current(&self) -> Arc<CertifiedKey> {
        self.0
            .read()
            .expect("no panic while the lock is held")
            .clone()
    }
}

fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, Error> {
    if chain.is_empty() {
        return Err(Error::NoCertificatesPresented);
    }
    CertifiedKey::from_der(chain, key, &provider()).map(Arc::new)
}

impl ResolvesClientCert for LiveCertificate {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Which certificate a listener shows: the authority's under [`TRACKER_NAME`], and `unnamed` to those who name nothing.
#[derive(Debug)]
struct Shown {
    named: Arc<LiveCertificate>,
    unnamed: Arc<LiveCertificate>,
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(
            if hello.server_name() == Some(TRACKER_NAME) {
                &self.named
            } else {
                &self.unnamed
            }
            .current(),
        )
    }
}

/// The rules of a listener that requires a member's certificate. `named` is what the authority certified; `unnamed`
/// is shown to clients that ask for no name (the same, unless the operator brought a certificate of their own).
///
/// # Errors
/// If the authority's certificate is unusable.
pub fn member_server(
    trust: &Arc<Trust>,
    named: Arc<LiveCertificate>,
    unnamed: Arc<LiveCertificate>,
) -> Result<Arc<ServerConfig>, Error> {
    let webpki = WebPkiClientVerifier::builder_with_provider(roots(trust.authority())?, provider())
        .build()
        .map_err(|e| Error::General(e.to_string()))?;
    let verifier = MemberVerifier {
        webpki,
        trust: trust.clone(),
    };
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier));
    Ok(server(
        builder.with_cert_resolver(Arc::new(Shown { named, unnamed })),
    ))
}

/// The rules of the enrollment listener: nobody has a certificate yet.
///
/// # Errors
/// If the library refuses its own defaults.
pub fn join_server(certificate: Arc<LiveCertificate>) -> Result<Arc<ServerConfig>, Error> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth();
    let shown = Shown {
        named: certificate.clone(),
        unnamed: certificate,
    };
    Ok(server(builder.with_cert_resolver(Arc::new(shown))))
}

fn server(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.ignore_client_order = true;
    config.max_early_data_size = 0;
    Arc::new(config)
}

/// Whom a dialler means to meet.
#[derive(Clone, Debug)]
pub enum Expect {
    /// Exactly this peer.
    Peer(PeerId),
    /// A tracker of our network.
    Tracker,
}

/// The rules for dialling a member or the tracker.
///
/// # Errors
/// If the authority's certificate is unusable.
pub fn member_client(
    trust: &Arc<Trust>,
    identity: &Arc<LiveCertificate>,
    expect: Expect,
) -> Result<Arc<ClientConfig>, Error> {
    let webpki = WebPkiServerVerifier::builder_with_provider(roots(trust.authority())?, provider())
        .build()
        .map_err(|e| Error::General(e.to_string()))?;
    let verifier = PeerVerifier {
        webpki,
        trust: trust.clone(),
        expect,
    };
    let mut config = client(Arc::new(verifier))?.with_client_cert_resolver(identity.clone());
    config.enable_sni = false;
    Ok(client_defaults(config))
}

/// The rules for renewing: the tracker must be one of our network, and sees no certificate of ours.
///
/// # Errors
/// If the authority's certificate is unusable.
pub fn renew_client(trust: &Arc<Trust>) -> Result<Arc<ClientConfig>, Error> {
    let webpki = WebPkiServerVerifier::builder_with_provider(roots(trust.authority())?, provider())
        .build()
        .map_err(|e| Error::General(e.to_string()))?;
    let verifier = PeerVerifier {
        webpki,
        trust: trust.clone(),
        expect: Expect::Tracker,
    };
    Ok(client_defaults(
        client(Arc::new(verifier))?.with_no_client_auth(),
    ))
}

/// The rules for redeeming a token: only the pinned key will do. This alone sends a server name.
///
/// # Errors
/// If the library refuses its own defaults.
pub fn join_client(pin: Pin) -> Result<Arc<ClientConfig>, Error> {
    Ok(client_defaults(
        client(Arc::new(PinVerifier { pin }))?.with_no_client_auth(),
    ))
}

type ClientBuilder = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn client(verifier: Arc<dyn ServerCertVerifier>) -> Result<ClientBuilder, Error> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

fn client_defaults(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

fn refuse(reason: impl std::fmt::Display) -> Error {
    Error::General(reason.to_string())
}

/// The identity of a certificate that webpki accepted.
fn member(
    end_entity: &CertificateDer<'_>,
    trust: &Trust,
    roles: &[Role],
) -> Result<Subject, Error> {
    let subject = CertificateFacts::read(end_entity)
        .and_then(|facts| facts.subject())
        .map_err(refuse)?;
    if !roles.contains(&subject.role) {
        return Err(refuse(format!(
            "this is not for {} certificates",
            subject.role.label()
        )));
    }
    if trust.list().denied.contains(&subject.id) {
        return Err(Error::InvalidCertificate(CertificateError::Revoked));
    }
    Ok(subject)
}

fn in_date(facts: &CertificateFacts, now: UnixTime) -> Result<(), Error> {
    let unix = |seconds: i64| {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds.try_into().unwrap_or_default()))
    };
    let (not_before, not_after) = (unix(facts.not_before), unix(facts.not_after));
    if now < not_before {
        return Err(Error::InvalidCertificate(
            CertificateError::NotValidYetContext {
                time: now,
                not_before,
            },
        ));
    }
    if now > not_after {
        return Err(Error::InvalidCertificate(
            CertificateError::ExpiredContext {
                time: now,
                not_after,
            },
        ));
    }
    Ok(())
}

macro_rules! tls13_signatures_only {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(refuse("TLS 1.2 is not spoken here"))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(
                message,
                cert,
                signed,
                &provider().signature_verification_algorithms,
            )
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            provider()
                .signature_verification_algorithms
                .supported_schemes()
        }
    };
}

#[derive(Debug)]
struct MemberVerifier {
    webpki: Arc<dyn ClientCertVerifier>,
    trust: Arc<Trust>,
}

impl ClientCertVerifier for MemberVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .webpki
            .verify_client_cert(end_entity, intermediates, now)?;
        member(end_entity, &self.trust, &[Role::Peer, Role::Operator])?;
        Ok(verified)
    }

    tls13_signatures_only!();
}

#[derive(Debug)]
struct PeerVerifier {
    webpki: Arc<WebPkiServerVerifier>,
    trust: Arc<Trust>,
    expect: Expect,
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _asked: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let (name, role) = match self.expect {
            Expect::Peer(id) => (
                Subject {
                    id,
                    role: Role::Peer,
                }
                .name(),
                Role::Peer,
            ),
            Expect::Tracker => {
                let facts = CertificateFacts::read(end_entity).map_err(refuse)?;
                if self.trust.list().tracker_pins.contains(&facts.pin()) {
                    in_date(&facts, now)?;
                    return Ok(ServerCertVerified::assertion());
                }
                (TRACKER_NAME.to_owned(), Role::Tracker)
            }
        };
        let name = ServerName::try_from(name).map_err(refuse)?;
        let verified =
            self.webpki
                .verify_server_cert(end_entity, intermediates, &name, ocsp, now)?;
        member(end_entity, &self.trust, &[role])?;
        Ok(verified)
    }

    tls13_signatures_only!();
}

#[derive(Debug)]
struct PinVerifier {
    pin: Pin,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _asked: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let wrong = || Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let pinned = |cert: &CertificateDer<'_>, pin: [u8; 32]| match CertificateFacts::read(cert) {
            Ok(facts) if facts.pin() == pin => Ok(facts),
            _ => Err(wrong()),
        };
        match self.pin {
            Pin::Tracker(pin) => in_date(&pinned(end_entity, pin)?, now)?,
            Pin::Authority(pin) => {
                let authority = intermediates.last().ok_or_else(wrong)?;
                pinned(authority, pin)?;
                let trust = Trust::new(authority.clone().into_owned()).map_err(refuse)?;
                let name = ServerName::try_from(TRACKER_NAME).map_err(refuse)?;
                WebPkiServerVerifier::builder_with_provider(roots(trust.authority())?, provider())
                    .build()
                    .map_err(refuse)?
                    .verify_server_cert(end_entity, intermediates, &name, ocsp, now)?;
                member(end_entity, &trust, &[Role::Tracker])?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures_only!();
}
