//! The tracker's own certificates: the one the authority issues, and one that the operator brings.
//!
//! Invariant: what is loaded is checked before anything listens: the key belongs to the certificate, the dates hold,
//! and an error names the file. `openssl req -x509 -newkey rsa:4096 -keyout key.pem -out cert.pem -days 365` works as it
//! comes (CA:TRUE, no names, an encrypted key); such a certificate is believed by the hash of its key.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use pkcs8::{EncryptedPrivateKeyInfoRef, der::SecretDocument};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};

use super::authority::{Authority, Names};
use crate::{
    identity::{CertificateFacts, Key},
    net, safe_path,
    tls::LiveCertificate,
};

/// A certificate from elsewhere, as the operator names it.
#[derive(Clone, Debug)]
pub struct OwnCertificate {
    /// PEM, the leaf first.
    pub certificate: PathBuf,
    /// PEM, encrypted or not.
    pub key: PathBuf,
    /// For an encrypted key.
    pub passphrase: Option<String>,
}

/// Is the key in this file encrypted, so that a passphrase is needed?
///
/// # Errors
/// If the file cannot be read.
pub fn needs_passphrase(key: &Path) -> Result<bool> {
    Ok(read(key)?.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----"))
}

impl OwnCertificate {
    /// Loads and checks the pair; also gives the hash of its key.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(&self) -> Result<(Arc<LiveCertificate>, [u8; 32])> {
        let (cert, key) = (self.certificate.display(), self.key.display());
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(read(&self.certificate)?.as_bytes())
                .collect::<Result<_, _>>()
                .with_context(|| format!("{cert} is not a PEM certificate"))?;
        let Some(leaf) = chain.first() else {
            bail!("{cert} holds no PEM certificate")
        };
        let facts = CertificateFacts::read(leaf).with_context(|| format!("reading {cert}"))?;
        let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
        ensure!(now <= facts.not_after, "{cert} has expired; make a new one");
        ensure!(
            now >= facts.not_before,
            "{cert} is not valid yet; is this machine's clock behind?"
        );
        let key_der = self.private_key()?;
        let live = LiveCertificate::new(chain, key_der).with_context(|| {
            format!("{key} does not belong to {cert}, or is of an unsupported kind")
        })?;
        Ok((live, facts.pin()))
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>> {
        let path = self.key.display();
        let pem = read(&self.key)?;
        if !needs_passphrase(&self.key)? {
            return PrivateKeyDer::from_pem_slice(pem.as_bytes())
                .with_context(|| format!("{path} holds no PEM private key"));
        }
        let Some(passphrase) = &self.passphrase else {
            bail!(
                "{path} is encrypted: give its passphrase with --key-passphrase-file or SPRAT_KEY_PASSPHRASE"
            );
        };
        let (_, document) = SecretDocument::from_pem(&pem)
            .map_err(|e| anyhow::anyhow!("{path} is not a PEM private key: {e}"))?;
        let encrypted = EncryptedPrivateKeyInfoRef::try_from(document.as_bytes())
            .map_err(|e| anyhow::anyhow!("{path} is encrypted in an unknown way: {e}"))?;
        let key = encrypted.decrypt(passphrase).map_err(|_| {
            anyhow::anyhow!("the passphrase does not open {path}, or its cipher is not supported")
        })?;
        Ok(PrivatePkcs8KeyDer::from(key.as_bytes().to_vec()).into())
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// The certificate that the authority issues to its own tracker, with every name and address of this machine.
pub struct IssuedCertificate {
    key: Key,
    names: Vec<String>,
    life: Duration,
}

impl IssuedCertificate {
    /// Loads or makes the tracker's key in `folder`. `advertised` are "HOST:PORT" names to be carried too.
    ///
    /// # Errors
    /// If the key cannot be read or written.
    pub fn open(folder: &Path, advertised: &[String], life: Duration) -> Result<Self> {
        safe_path::private_dir(folder)?;
        let path = folder.join("tracker.key");
        let key = if path.exists() {
            Key::from_pem(&String::from_utf8_lossy(&safe_path::read_private(&path)?))
                .with_context(|| format!("reading {}", path.display()))?
        } else {
            let key = Key::generate()?;
            safe_path::write_private(&path, key.to_pem().as_bytes())?;
            key
        };
        let host = |address: &String| {
            address
                .rsplit_once(':')
                .map(|(host, _)| host.trim_matches(['[', ']']).to_owned())
        };
        Ok(Self {
            key,
            names: advertised.iter().filter_map(host).collect(),
            life,
        })
    }

    /// Signs a fresh certificate; the chain ends with the authority, so that a joiner can check its pin.
    ///
    /// # Errors
    /// If signing fails.
    pub fn issue(
        &self,
        authority: &Authority,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let mut names = Names {
            hosts: vec!["localhost".into()],
            addresses: vec![],
        };
        for bound in ["0.0.0.0:1", "[::]:1"].map(|any| any.parse()) {
            names.addresses.extend(
                net::reachable_at(bound?)?
                    .iter()
                    .map(std::net::SocketAddr::ip),
            );
        }
        names.hosts.extend(
            rustix::system::uname()
                .nodename()
                .to_str()
                .ok()
                .map(str::to_owned),
        );
        for name in &self.names {
            match name.parse::<IpAddr>() {
                Ok(address) => names.addresses.push(address),
                Err(_) => names.hosts.push(name.clone()),
            }
        }
        names.addresses.sort();
        names.addresses.dedup();
        names.hosts.sort();
        names.hosts.dedup();
        let certificate = authority.certify_tracker(&self.key, names, self.life)?;
        Ok((
            vec![certificate, authority.certificate().clone()],
            self.key.to_der(),
        ))
    }

    /// How long after issuing it the next one is due.
    #[must_use]
    pub fn renew_after(&self) -> Duration {
        self.life / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_openssl_writes_works_and_mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, extra) in [
            ("a", &["-passout", "pass:secret"][..]),
            ("b", &["-nodes"][..]),
        ] {
            let made = std::process::Command::new("openssl")
                .args([
                    "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=x", "-days", "365",
                ])
                .args(["-keyout", at(&format!("{name}.key")).to_str().unwrap()])
                .args(["-out", at(&format!("{name}.crt")).to_str().unwrap()])
                .args(extra)
                .output()
                .unwrap();
            assert!(
                made.status.success(),
                "{}",
                String::from_utf8_lossy(&made.stderr)
            );
        }
        let own = |cert: &str, key: &str, passphrase: Option<&str>| OwnCertificate {
            certificate: at(cert),
            key: at(key),
            passphrase: passphrase.map(str::to_owned),
        };
        assert!(
            needs_passphrase(&at("a.key")).unwrap() && !needs_passphrase(&at("b.key")).unwrap()
        );
        let (_, pin) = own("a.crt", "a.key", Some("secret")).load().unwrap();
        assert_ne!(pin, own("b.crt", "b.key", None).load().unwrap().1);
        std::fs::write(at("empty"), "").unwrap();
        for (own, says) in [
            (
                own("a.crt", "a.key", Some("wrong")),
                "passphrase does not open",
            ),
            (own("a.crt", "a.key", None), "--key-passphrase-file"),
            (own("a.crt", "b.key", None), "does not belong"),
            (own("empty", "b.key", None), "holds no PEM certificate"),
            (own("b.crt", "empty", None), "holds no PEM private key"),
            (own("b.crt", "missing", None), "missing"),
        ] {
            let error = format!("{:#}", own.load().unwrap_err());
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn the_issued_chain_ends_with_the_authority_and_keeps_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("authority")).unwrap();
        let advertised = [
            "tracker.lab.example:7700".to_owned(),
            "[fd00::7]:7700".to_owned(),
        ];
        let open = || {
            IssuedCertificate::open(&dir.path().join("t"), &advertised, Duration::from_secs(60))
                .unwrap()
        };
        let (first, _) = open().issue(&authority).unwrap();
        let (second, _) = open().issue(&authority).unwrap();
        assert_eq!(first[1], *authority.certificate());
        let spki = |chain: &[CertificateDer<'_>]| CertificateFacts::read(&chain[0]).unwrap().spki;
        assert_eq!(spki(&first), spki(&second));
        assert!(String::from_utf8_lossy(&first[0]).contains("tracker.lab.example"));
    }
}
