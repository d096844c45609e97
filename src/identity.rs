//! Who somebody is: keys, certificates, and the ids that follow from them.
//!
//! Invariant: a [`PeerId`] is the hash of a public key. It is computed from the key that a certificate carries and
//! compared with the name in it, at both ends of every connection; it is never taken from a message body.
//!
//! A certificate of a network carries exactly one identity name, `<peer id>.<role>.sprat.internal`; other names (a
//! tracker's host names) do not count. Keys are ECDSA P-256, made on the machine that uses them.

use std::{fmt, path::Path, str::FromStr};

use data_encoding::BASE32_NOPAD;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SigningKey};
use ring::{
    digest,
    signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

use crate::safe_path;

/// The name under which every tracker of a network answers, beside its own identity name.
pub const TRACKER_NAME: &str = "tracker.sprat.internal";
/// The server name that asks a tracker's port for enrollment.
pub const JOIN_NAME: &str = "join.sprat.internal";
/// The same for every peer. Members look for a peer's own name; this one is for tools that insist on a name.
pub const PEER_NAME: &str = "peer.sprat.internal";
const DOMAIN: &str = ".sprat.internal";

/// SHA-256 of a public key (SPKI, DER): the identity of a member. Text form: 52 lower-case base32 characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId([u8; 32]);

impl PeerId {
    /// The id that belongs to a public key in SPKI DER form.
    #[must_use]
    pub fn from_spki(spki: &[u8]) -> Self {
        Self(sha256(spki))
    }

    /// An id from its 32 bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the hash.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first eight characters: for eyes only, never for a decision.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32(&self.0))
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({})", self.short())
    }
}

impl FromStr for PeerId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        unbase32(text).map(Self).ok_or(IdentityError::NotAPeerId)
    }
}

/// What a certificate entitles its holder to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Shares and downloads.
    Peer,
    /// Keeps the catalog.
    Tracker,
    /// A person who looks: may read, never announce.
    Operator,
}

impl Role {
    const ALL: [Self; 3] = [Self::Peer, Self::Tracker, Self::Operator];

    /// The label in the identity name.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Tracker => "tracker",
            Self::Operator => "operator",
        }
    }
}

/// Who a certificate says its holder is, after the key was checked against the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// Hash of the key.
    pub id: PeerId,
    /// What it may do.
    pub role: Role,
}

impl Subject {
    /// `<id>.<role>.sprat.internal`
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}.{}{DOMAIN}", self.id, self.role.label())
    }

    fn parse(name: &str) -> Option<Self> {
        let (id, role) = name.strip_suffix(DOMAIN)?.split_once('.')?;
        let role = Role::ALL.into_iter().find(|r| r.label() == role)?;
        Some(Self {
            id: id.parse().ok()?,
            role,
        })
    }
}

/// Why a certificate, key or id is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not 52 base32 characters of a hash.
    #[error("not a peer id (52 lower-case letters and digits 2-7)")]
    NotAPeerId,
    /// Unreadable certificate.
    #[error("not an X.509 certificate: {0}")]
    Malformed(String),
    /// No identity name, or several.
    #[error("the certificate carries {0} identity names instead of one")]
    Names(usize),
    /// The name speaks of another key.
    #[error("the certificate's name does not belong to its key")]
    KeyMismatch,
    /// Unusable private key.
    #[error("unusable private key: {0}")]
    Key(String),
    /// Files.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// What a certificate says, read without judging who signed it.
#[derive(Clone, Debug)]
pub struct CertificateFacts {
    /// Public key, SPKI DER.
    pub spki: Vec<u8>,
    /// The key's bits alone, as signature checks want them.
    pub public_key: Vec<u8>,
    /// Seconds since the epoch.
    pub not_before: i64,
    /// Seconds since the epoch.
    pub not_after: i64,
    names: Vec<String>,
}

impl CertificateFacts {
    /// Reads a DER certificate.
    ///
    /// # Errors
    /// [`IdentityError::Malformed`]
    pub fn read(der: &[u8]) -> Result<Self, IdentityError> {
        let (rest, cert) =
            X509Certificate::from_der(der).map_err(|e| IdentityError::Malformed(e.to_string()))?;
        if !rest.is_empty() {
            return Err(IdentityError::Malformed("trailing bytes".into()));
        }
        let names =
            cert.extensions()
                .iter()
                .filter_map(|extension| match extension.parsed_extension() {
                    ParsedExtension::SubjectAlternativeName(san) => Some(&san.general_names),
                    _ => None,
                });
        let names = names.flatten().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        });
        Ok(Self {
            spki: cert.public_key().raw.to_vec(),
            public_key: cert.public_key().subject_public_key.data.to_vec(),
            not_before: cert.validity().not_before.timestamp(),
            not_after: cert.validity().not_after.timestamp(),
            names: names.collect(),
        })
    }

    /// SHA-256 of the public key: what pins are made of.
    #[must_use]
    pub fn pin(&self) -> [u8; 32] {
        sha256(&self.spki)
    }

    /// The one identity name, if it belongs to the key.
    ///
    /// # Errors
    /// [`IdentityError::Names`], [`IdentityError::KeyMismatch`]
    pub fn subject(&self) -> Result<Subject, IdentityError> {
        let mut subjects = self.names.iter().filter_map(|name| Subject::parse(name));
        let (first, others) = (subjects.next(), subjects.count());
        match first {
            Some(subject) if others == 0 => {
                if subject.id == PeerId::from_spki(&self.spki) {
                    Ok(subject)
                } else {
                    Err(IdentityError::KeyMismatch)
                }
            }
            found => Err(IdentityError::Names(usize::from(found.is_some()) + others)),
        }
    }
}

/// A private key of ours.
pub struct Key(KeyPair);

impl Key {
    /// A new ECDSA P-256 key.
    ///
    /// # Errors
    /// If the machine's random generator fails.
    pub fn generate() -> Result<Self, IdentityError> {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(|e| IdentityError::Key(e.to_string()))
    }

    /// Reads a PKCS #8 PEM key.
    ///
    /// # Errors
    /// [`IdentityError::Key`]
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        let key = KeyPair::from_pem(pem).map_err(|e| IdentityError::Key(e.to_string()))?;
        if key.algorithm() == &PKCS_ECDSA_P256_SHA256 {
            Ok(Self(key))
        } else {
            Err(IdentityError::Key("not an ECDSA P-256 key".into()))
        }
    }

    /// PKCS #8 PEM.
    #[must_use]
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// PKCS #8 DER, as the TLS library takes it.
    #[must_use]
    pub fn to_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.0.serialize_der()).into()
    }

    /// The id of whoever holds this key.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        PeerId::from_spki(&rcgen::PublicKeyData::subject_public_key_info(&self.0))
    }

    /// A PKCS #10 request for this key, DER. It names nobody: the authority decides the name.
    ///
    /// # Errors
    /// If signing fails.
    pub fn request(&self) -> Result<Vec<u8>, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params
            .serialize_request(&self.0)
            .map_err(|e| IdentityError::Key(e.to_string()))?;
        Ok(request.der().to_vec())
    }

    /// Signs with ECDSA P-256 and SHA-256; ASN.1 DER.
    ///
    /// # Errors
    /// If the machine's random generator fails.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IdentityError> {
        self.0
            .sign(message)
            .map_err(|e| IdentityError::Key(e.to_string()))
    }

    /// The pair in the form certificate making takes.
    #[must_use]
    pub const fn pair(&self) -> &KeyPair {
        &self.0
    }
}

/// Checks a signature made by [`Key::sign`]; `public_key` is [`CertificateFacts::public_key`].
#[must_use]
pub fn signed_by(public_key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, public_key)
        .verify(message, signature)
        .is_ok()
}

/// The bytes that a request to renew signs: a context, the caller's clock in seconds, and the signing request.
#[must_use]
pub fn renew_message(signed_at: u64, csr: &[u8]) -> Vec<u8> {
    [&b"sprat renew v1"[..], &signed_at.to_be_bytes(), csr].concat()
}

/// A member's key, its certificate and the authority that signed it; kept as plain PEM, usable by any gRPC client.
pub struct Identity {
    /// Ours alone.
    pub key: Key,
    /// Our certificate.
    pub certificate: CertificateDer<'static>,
    /// The network's authority.
    pub authority: CertificateDer<'static>,
}

/// File names of an identity: authority, certificate, key.
pub const PEER_FILES: [&str; 3] = ["ca.crt", "peer.crt", "peer.key"];
/// The same for an operator.
pub const OPERATOR_FILES: [&str; 3] = ["ca.crt", "operator.crt", "operator.key"];

impl Identity {
    /// Who this is.
    ///
    /// # Errors
    /// If the certificate does not belong to the key.
    pub fn subject(&self) -> Result<Subject, IdentityError> {
        let subject = CertificateFacts::read(&self.certificate)?.subject()?;
        if subject.id == self.key.peer_id() {
            Ok(subject)
        } else {
            Err(IdentityError::KeyMismatch)
        }
    }

    /// Writes the three files into `folder` (made 0700 if missing), each 0600 and whole or not at all.
    ///
    /// # Errors
    /// As the file system answers.
    pub fn save(&self, folder: &Path, files: [&str; 3]) -> Result<(), IdentityError> {
        safe_path::private_dir(folder)?;
        let [authority, certificate, key] = files.map(|name| folder.join(name));
        safe_path::write_private(&key, self.key.to_pem().as_bytes())?;
        safe_path::write_private(&authority, pem("CERTIFICATE", &self.authority).as_bytes())?;
        safe_path::write_private(
            &certificate,
            pem("CERTIFICATE", &self.certificate).as_bytes(),
        )?;
        Ok(())
    }

    /// Reads what [`Identity::save`] wrote; `None` if there is no certificate yet.
    ///
    /// # Errors
    /// If a file is unreadable, malformed, or the key is readable by others.
    pub fn load(folder: &Path, files: [&str; 3]) -> Result<Option<Self>, IdentityError> {
        let [authority, certificate, key] = files.map(|name| folder.join(name));
        if !certificate.exists() {
            return Ok(None);
        }
        let key = Key::from_pem(&String::from_utf8_lossy(&safe_path::read_private(&key)?))?;
        let identity = Self {
            key,
            certificate: read_certificate(&certificate)?,
            authority: read_certificate(&authority)?,
        };
        identity.subject()?;
        Ok(Some(identity))
    }
}

/// Reads the first certificate of a PEM file.
///
/// # Errors
/// Names the file.
pub fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, IdentityError> {
    let bytes = std::fs::read(path)
        .map_err(|e| std::io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    CertificateDer::from_pem_slice(&bytes)
        .map_err(|e| IdentityError::Malformed(format!("{}: {e}", path.display())))
}

/// PEM text of `der` under `label`.
#[must_use]
pub fn pem(label: &str, der: &[u8]) -> String {
    let body = data_encoding::BASE64.encode(der);
    let lines = body
        .as_bytes()
        .chunks(64)
        .map(|line| String::from_utf8_lossy(line).into_owned() + "\n");
    format!(
        "-----BEGIN {label}-----\n{}-----END {label}-----\n",
        lines.collect::<String>()
    )
}

/// SHA-256.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

/// Lower-case base32 without padding (RFC 4648 alphabet).
#[must_use]
pub fn base32(bytes: &[u8]) -> String {
    BASE32_NOPAD.encode(bytes).to_ascii_lowercase()
}

/// The reverse of [`base32`] for exactly `N` bytes; upper case is refused, so that one id has one spelling.
#[must_use]
pub fn unbase32<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    BASE32_NOPAD
        .decode(text.to_ascii_uppercase().as_bytes())
        .ok()?
        .try_into()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_id_has_one_spelling() {
        let id = Key::generate().unwrap().peer_id();
        let text = id.to_string();
        assert_eq!((text.len(), text.parse::<PeerId>().unwrap()), (52, id));
        for bad in [
            text.to_uppercase(),
            text[1..].to_owned(),
            format!("{text}a"),
            "ü".repeat(26),
            String::new(),
        ] {
            assert!(bad.parse::<PeerId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn signatures_bind_key_and_message() {
        let (key, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let signature = key.sign(b"message").unwrap();
        assert!(signed_by(
            key.pair().public_key_raw(),
            b"message",
            &signature
        ));
        assert!(!signed_by(
            key.pair().public_key_raw(),
            b"massage",
            &signature
        ));
        assert!(!signed_by(
            other.pair().public_key_raw(),
            b"message",
            &signature
        ));
        assert!(!signed_by(b"", b"message", b""));
    }

    fn certified(names: Vec<String>, key: &Key) -> Vec<u8> {
        CertificateParams::new(names)
            .unwrap()
            .self_signed(key.pair())
            .unwrap()
            .der()
            .to_vec()
    }

    #[test]
    fn exactly_one_identity_name_that_belongs_to_the_key() {
        let key = Key::generate().unwrap();
        let name = |role| {
            Subject {
                id: key.peer_id(),
                role,
            }
            .name()
        };
        let read = |names: Vec<String>| {
            CertificateFacts::read(&certified(names, &key))
                .unwrap()
                .subject()
        };
        assert_eq!(
            read(vec![TRACKER_NAME.into(), name(Role::Tracker)])
                .unwrap()
                .role,
            Role::Tracker
        );
        assert!(matches!(
            read(vec![TRACKER_NAME.into(), JOIN_NAME.into()]),
            Err(IdentityError::Names(0))
        ));
        assert_eq!(
            read(vec![PEER_NAME.into(), name(Role::Peer)]).unwrap().id,
            key.peer_id()
        );
        assert!(matches!(
            read(vec![PEER_NAME.into()]),
            Err(IdentityError::Names(0))
        ));
        assert!(matches!(
            read(vec![name(Role::Peer), name(Role::Tracker)]),
            Err(IdentityError::Names(2))
        ));
        let stolen = Subject {
            id: Key::generate().unwrap().peer_id(),
            role: Role::Peer,
        }
        .name();
        assert!(matches!(
            read(vec![stolen]),
            Err(IdentityError::KeyMismatch)
        ));
        for odd in [
            name(Role::Peer).to_uppercase(),
            format!("x.{}", name(Role::Peer)),
            "*.peer.sprat.internal".into(),
        ] {
            assert!(read(vec![odd]).is_err());
        }
    }

    #[test]
    fn arbitrary_certificates_never_panic() {
        let key = Key::generate().unwrap();
        let good = certified(vec!["a.example".into()], &key);
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x55;
            let _ = CertificateFacts::read(&bad).map(|facts| facts.subject());
            let _ = CertificateFacts::read(&good[..i]);
        }
    }

    #[test]
    fn saved_identity_loads_again_and_a_loose_key_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let key = Key::generate().unwrap();
        let name = Subject {
            id: key.peer_id(),
            role: Role::Peer,
        }
        .name();
        let der = CertificateDer::from(certified(vec![name], &key));
        let folder = dir.path().join("identity");
        Identity {
            key,
            certificate: der.clone(),
            authority: der.clone(),
        }
        .save(&folder, PEER_FILES)
        .unwrap();
        let loaded = Identity::load(&folder, PEER_FILES).unwrap().unwrap();
        assert_eq!(
            (loaded.subject().unwrap().role, &loaded.certificate),
            (Role::Peer, &der)
        );
        std::fs::set_permissions(
            folder.join("peer.key"),
            std::fs::Permissions::from_mode(0o644),
        )
        .unwrap();
        assert!(Identity::load(&folder, PEER_FILES).is_err());
        assert!(
            Identity::load(&dir.path().join("none"), PEER_FILES)
                .unwrap()
                .is_none()
        );
    }
}
