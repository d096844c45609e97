//! The network's authority: its key, and every certificate and list it signs.
//!
//! Invariants: the key never leaves its 0600 file and is never overwritten; of a signing request only the public key is
//! used (names and extensions in it are ignored); a certificate names exactly the hash of its key.

use std::{net::IpAddr, path::Path, time::Duration};

use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer};

use crate::{
    identity::{
        CertificateFacts, IdentityError, JOIN_NAME, Key, PEER_NAME, PeerId, Role, Subject,
        TRACKER_NAME, pem, read_certificate,
    },
    metrics::CERTIFICATES_ISSUED,
    proto, safe_path,
    trust::TrustList,
};

/// How far back a certificate begins, for clocks that are behind.
pub const BACKDATE: Duration = Duration::from_secs(3600);
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// What a key is allowed to look like in a request, bytes; P-256 takes about 200.
const MAX_REQUEST: usize = 8 << 10;

/// Signs for the network.
pub struct Authority {
    key: Key,
    certificate: CertificateDer<'static>,
}

/// A public key out of a signing request whose own signature holds.
pub struct Applicant {
    key: SubjectPublicKeyInfo,
    /// Whose key it is.
    pub id: PeerId,
    /// The key's bits, for checking signatures by it.
    pub public_key: Vec<u8>,
}

impl Applicant {
    /// Reads a PKCS #10 request from a stranger.
    ///
    /// # Errors
    /// If it is malformed, its signature does not hold, or the key is not ECDSA P-256.
    pub fn read(der: &[u8]) -> Result<Self, IdentityError> {
        let malformed = |what: &str| IdentityError::Malformed(what.into());
        if der.len() > MAX_REQUEST {
            return Err(malformed("signing request too long"));
        }
        let (_, request) = X509CertificationRequest::from_der(der)
            .map_err(|_| malformed("not a PKCS #10 request"))?;
        request
            .verify_signature()
            .map_err(|_| malformed("the request's signature does not hold"))?;
        let spki = &request.certification_request_info.subject_pki;
        let key =
            SubjectPublicKeyInfo::from_der(spki.raw).map_err(|_| malformed("unsupported key"))?;
        if key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(malformed("only ECDSA P-256 keys are certified"));
        }
        let public_key = spki.subject_public_key.data.to_vec();
        Ok(Self {
            id: PeerId::from_spki(spki.raw),
            key,
            public_key,
        })
    }
}

/// What a certificate is to say beside the identity name.
#[derive(Default)]
pub struct Names {
    /// Host names.
    pub hosts: Vec<String>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
}

impl Authority {
    /// Makes a new authority in `folder`, which must not hold one.
    ///
    /// # Errors
    /// If there is one already, or as the file system answers.
    pub fn create(folder: &Path) -> Result<Self, IdentityError> {
        if folder.join("ca.key").exists() || folder.join("ca.crt").exists() {
            let message = format!(
                "{} already holds an authority; it is never overwritten",
                folder.display()
            );
            return Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, message).into());
        }
        let key = Key::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(
            DnType::CommonName,
            format!("sprat authority {}", key.peer_id().short()),
        );
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        dated(&mut params, AUTHORITY_LIFE)?;
        let certificate = params
            .self_signed(key.pair())
            .map_err(|e| IdentityError::Key(e.to_string()))?
            .der()
            .clone();
        safe_path::private_dir(folder)?;
        safe_path::write_private(&folder.join("ca.key"), key.to_pem().as_bytes())?;
        safe_path::write_private(
            &folder.join("ca.crt"),
            pem("CERTIFICATE", &certificate).as_bytes(),
        )?;
        Ok(Self { key, certificate })
    }

    /// Loads what [`Authority::create`] made; `None` if there is none.
    ///
    /// # Errors
    /// If a file is missing, unreadable, readable by others, or the key does not belong to the certificate.
    pub fn load(folder: &Path) -> Result<Option<Self>, IdentityError> {
        if !folder.join("ca.crt").exists() && !folder.join("ca.key").exists() {
            return Ok(None);
        }
        let key = Key::from_pem(&String::from_utf8_lossy(&safe_path::read_private(
            &folder.join("ca.key"),
        )?))?;
        let certificate = read_certificate(&folder.join("ca.crt"))?;
        if PeerId::from_spki(&CertificateFacts::read(&certificate)?.spki) != key.peer_id() {
            return Err(IdentityError::KeyMismatch);
        }
        Ok(Some(Self { key, certificate }))
    }

    /// The certificate everybody trusts.
    #[must_use]
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Certifies a peer's key for `life` from now.
    ///
    /// # Errors
    /// If signing fails.
    pub fn certify_peer(
        &self,
        applicant: &Applicant,
        life: Duration,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let both = [
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        // The identity name is what members look for; this one is for tools that insist on a name, as Prometheus does.
        let names = Names {
            hosts: vec![PEER_NAME.to_owned()],
            ..Names::default()
        };
        self.certify(applicant, Role::Peer, names, &both, life)
    }

    /// Certifies an operator's key: a client and nothing else.
    ///
    /// # Errors
    /// If signing fails.
    pub fn certify_operator(
        &self,
        applicant: &Applicant,
        life: Duration,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let client = [ExtendedKeyUsagePurpose::ClientAuth];
        self.certify(applicant, Role::Operator, Names::default(), &client, life)
    }

    /// Certifies the tracker's own key under the names of the service and of this machine.
    ///
    /// # Errors
    /// If signing fails.
    pub fn certify_tracker(
        &self,
        key: &Key,
        mut names: Names,
        life: Duration,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        names
            .hosts
            .extend([TRACKER_NAME.to_owned(), JOIN_NAME.to_owned()]);
        let both = [
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        self.certify(
            &Applicant::read(&key.request()?)?,
            Role::Tracker,
            names,
            &both,
            life,
        )
    }

    fn certify(
        &self,
        applicant: &Applicant,
        role: Role,
        names: Names,
        usages: &[ExtendedKeyUsagePurpose],
        life: Duration,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let failed = |e: rcgen::Error| IdentityError::Key(e.to_string());
        let identity = Subject {
            id: applicant.id,
            role,
        }
        .name();
        let mut params = CertificateParams::new(vec![identity]).map_err(failed)?;
        for host in names.hosts {
            // A host name that is no DNS name cannot be in a certificate, and nobody could dial it either.
            if let Ok(host) = host.try_into() {
                params.subject_alt_names.push(SanType::DnsName(host));
            }
        }
        params
            .subject_alt_names
            .extend(names.addresses.into_iter().map(SanType::IpAddress));
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("sprat {}", role.label()));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages.to_vec();
        params.use_authority_key_identifier_extension = true;
        dated(&mut params, life)?;
        let issuer =
            Issuer::from_ca_cert_der(&self.certificate, self.key.pair()).map_err(failed)?;
        let signed = params.signed_by(&applicant.key, &issuer).map_err(failed)?;
        CERTIFICATES_ISSUED.one();
        Ok(signed.der().clone())
    }

    /// Signs a trust list for the wire.
    ///
    /// # Errors
    /// If signing fails.
    pub fn sign(&self, list: &TrustList) -> Result<proto::SignedTrustList, IdentityError> {
        let body = proto::TrustList::from(list).encode_to_vec();
        let signature = self.key.sign(&body)?;
        Ok(proto::SignedTrustList {
            body: body.into(),
            signature: signature.into(),
        })
    }
}

fn dated(params: &mut CertificateParams, life: Duration) -> Result<(), IdentityError> {
    let now = OffsetDateTime::now_utc();
    let mut serial = [0; 16];
    SystemRandom::new()
        .fill(&mut serial)
        .map_err(|_| IdentityError::Key("no random numbers".into()))?;
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = now - BACKDATE;
    params.not_after = now + life;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn authority() -> (tempfile::TempDir, Authority) {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("authority")).unwrap();
        (dir, authority)
    }

    #[test]
    fn an_authority_is_made_once_and_loaded_afterwards() {
        let (dir, made) = authority();
        let folder = dir.path().join("authority");
        assert!(Authority::create(&folder).is_err());
        assert_eq!(
            Authority::load(&folder).unwrap().unwrap().certificate(),
            made.certificate()
        );
        safe_path::write_private(
            &folder.join("ca.key"),
            Key::generate().unwrap().to_pem().as_bytes(),
        )
        .unwrap();
        assert!(matches!(
            Authority::load(&folder),
            Err(IdentityError::KeyMismatch)
        ));
        assert!(Authority::load(&dir.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn of_a_request_only_the_key_is_used() {
        let (_dir, authority) = authority();
        let key = Key::generate().unwrap();
        let mut greedy = CertificateParams::new(vec![
            TRACKER_NAME.to_owned(),
            Subject {
                id: key.peer_id(),
                role: Role::Tracker,
            }
            .name(),
        ])
        .unwrap();
        greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        greedy.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(
            &[1, 3, 6, 1, 4, 1, 9],
            vec![5, 0],
        )];
        let request = greedy.serialize_request(key.pair()).unwrap();
        let applicant = Applicant::read(request.der()).unwrap();
        let facts =
            CertificateFacts::read(&authority.certify_peer(&applicant, DAY).unwrap()).unwrap();
        assert_eq!(
            facts.subject().unwrap(),
            Subject {
                id: key.peer_id(),
                role: Role::Peer
            }
        );
        let text =
            String::from_utf8_lossy(&authority.certify_peer(&applicant, DAY).unwrap()).into_owned();
        assert!(!text.contains(TRACKER_NAME));
    }

    #[test]
    fn weak_foreign_or_broken_requests_are_refused() {
        let good = Key::generate().unwrap().request().unwrap();
        assert!(Applicant::read(&good).is_ok());
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let other = CertificateParams::default()
            .serialize_request(&ed25519)
            .unwrap();
        for bad in [
            &forged[..],
            other.der(),
            &good[..40],
            b"",
            &vec![0x30; 1 << 20][..],
        ] {
            assert!(Applicant::read(bad).is_err());
        }
    }

    #[test]
    fn names_that_are_no_dns_names_are_left_out() {
        let (_dir, authority) = authority();
        let names = Names {
            hosts: vec!["my_höst".into(), "ok.example".into()],
            addresses: vec![[10, 0, 0, 1].into()],
        };
        let der = authority
            .certify_tracker(&Key::generate().unwrap(), names, DAY)
            .unwrap();
        assert_eq!(
            CertificateFacts::read(&der)
                .unwrap()
                .subject()
                .unwrap()
                .role,
            Role::Tracker
        );
        assert!(String::from_utf8_lossy(&der).contains("ok.example"));
    }

    proptest! {
        #[test]
        fn arbitrary_requests_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Applicant::read(&bytes);
        }
    }
}
