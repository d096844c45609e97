//! What makes this machine a member: its identity, whom it trusts, and where the tracker is. Owns `identity/`,
//! `network.json` and `trust.bin` in the state directory.
//!
//! Invariant: a certificate is replaced by a newer one of the same key and network only; a trust list by one with a
//! higher epoch that the authority signed.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use prost::Message;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use crate::{
    exit::{Exit, Failed},
    identity::{CertificateFacts, Identity, Key, PEER_FILES, PeerId, Subject, pem},
    proto::SignedTrustList,
    safe_path,
    tls::{LiveCertificate, seconds_left},
    trust::Trust,
};

const IDENTITY: &str = "identity";
const NETWORK: &str = "network.json";
const TRUST: &str = "trust.bin";

/// What is remembered of the network.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Network {
    /// "HOST:PORT", best first.
    trackers: Vec<String>,
}

/// A member's standing.
pub struct Membership {
    state_dir: PathBuf,
    subject: Subject,
    key: Key,
    certificate: Arc<LiveCertificate>,
    trust: Arc<Trust>,
    trackers: Vec<String>,
}

impl Membership {
    /// Loads what joining left in `state_dir`. `tracker` replaces the remembered addresses.
    ///
    /// # Errors
    /// [`Exit::Auth`] if this machine has not joined; else what is wrong with which file.
    pub fn load(state_dir: &Path, tracker: Option<String>) -> Result<Arc<Self>> {
        let folder = state_dir.join(IDENTITY);
        let named = || format!("reading the identity in {}", folder.display());
        if let Err(error) = folder.try_exists() {
            let error = io::Error::new(error.kind(), format!("{}: {error}", folder.display()));
            return Err(Failed::state_dir(&error).into());
        }
        let Some(identity) = Identity::load(&folder, PEER_FILES).with_context(named)? else {
            let text = format!(
                "{} has not joined a network: run `sprat join LINK` with a link from the tracker",
                state_dir.display()
            );
            return Err(Failed::new(Exit::Auth, text).into());
        };
        let network = state_dir.join(NETWORK);
        let trackers = match tracker {
            Some(tracker) => vec![tracker],
            None => {
                let text = std::fs::read(&network)
                    .with_context(|| format!("reading {}", network.display()))?;
                serde_json::from_slice::<Network>(&text)
                    .with_context(|| format!("reading {}", network.display()))?
                    .trackers
            }
        };
        let subject = identity.subject().with_context(named)?;
        let certificate = LiveCertificate::new(
            vec![identity.certificate, identity.authority.clone()],
            identity.key.to_der(),
        )?;
        let trust = Trust::new(identity.authority)?;
        let stored = std::fs::read(state_dir.join(TRUST))
            .ok()
            .and_then(|bytes| SignedTrustList::decode(&bytes[..]).ok());
        if let Some(list) = stored.and_then(|signed| signed.open(&trust).ok()) {
            trust.adopt(list);
        }
        Ok(Arc::new(Self {
            state_dir: state_dir.to_owned(),
            subject,
            key: identity.key,
            certificate,
            trust,
            trackers,
        }))
    }

    /// Has this machine joined a network from this directory?
    #[must_use]
    pub fn is_in(state_dir: &Path) -> bool {
        state_dir.join(IDENTITY).join(PEER_FILES[1]).exists()
    }

    /// Writes what a join brought.
    ///
    /// # Errors
    /// As the file system answers.
    pub fn save(
        state_dir: &Path,
        identity: &Identity,
        trackers: &[String],
        list: &SignedTrustList,
    ) -> Result<()> {
        safe_path::private_dir(state_dir)?;
        Self::save_trackers(state_dir, trackers)?;
        safe_path::write_private(&state_dir.join(TRUST), &list.encode_to_vec())?;
        identity.save(&state_dir.join(IDENTITY), PEER_FILES)?;
        Ok(())
    }

    /// Remembers where trackers are.
    ///
    /// # Errors
    /// As the file system answers.
    pub fn save_trackers(state_dir: &Path, trackers: &[String]) -> Result<()> {
        let network = Network {
            trackers: trackers.to_vec(),
        };
        Ok(safe_path::write_private(
            &state_dir.join(NETWORK),
            &serde_json::to_vec_pretty(&network)?,
        )?)
    }

    /// The key that an earlier, unfinished join left, or a new one, written before it is used.
    ///
    /// # Errors
    /// As the file system answers.
    pub fn key_for_join(folder: &Path) -> Result<Key> {
        safe_path::private_dir(folder)?;
        let path = folder.join(PEER_FILES[2]);
        if path.exists() {
            return Ok(Key::from_pem(&String::from_utf8_lossy(
                &safe_path::read_private(&path)?,
            ))?);
        }
        let key = Key::generate()?;
        safe_path::write_private(&path, key.to_pem().as_bytes())?;
        Ok(key)
    }

    /// Where a joining peer keeps its identity.
    #[must_use]
    pub fn identity_folder(state_dir: &Path) -> PathBuf {
        state_dir.join(IDENTITY)
    }

    /// Our own id.
    #[must_use]
    pub const fn id(&self) -> PeerId {
        self.subject.id
    }

    /// Our key.
    #[must_use]
    pub const fn key(&self) -> &Key {
        &self.key
    }

    /// The certificate in use.
    #[must_use]
    pub const fn certificate(&self) -> &Arc<LiveCertificate> {
        &self.certificate
    }

    /// Whom we believe.
    #[must_use]
    pub const fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// Where trackers are.
    #[must_use]
    pub fn trackers(&self) -> &[String] {
        &self.trackers
    }

    /// Seconds until the certificate in use ends; negative if it has.
    #[must_use]
    pub fn seconds_left(&self) -> i64 {
        seconds_left(&self.certificate.leaf())
    }

    /// Takes over a list from the tracker if the authority signed it and it is newer, and remembers it.
    ///
    /// # Errors
    /// If the signature does not hold or the file cannot be written.
    pub fn adopt(&self, signed: &SignedTrustList) -> Result<()> {
        let list = signed.open(&self.trust)?;
        if self.trust.adopt(list) {
            safe_path::write_private(&self.state_dir.join(TRUST), &signed.encode_to_vec())?;
        }
        Ok(())
    }

    /// Takes a renewed certificate into use and remembers it.
    ///
    /// # Errors
    /// If it is not ours, or cannot be written; the old one stays in use.
    pub fn renewed(&self, certificate: &CertificateDer<'static>) -> Result<()> {
        anyhow::ensure!(
            CertificateFacts::read(certificate)?.subject()? == self.subject,
            "the renewed certificate is somebody else's"
        );
        let key: PrivateKeyDer<'static> =
            PrivatePkcs8KeyDer::from(self.key.pair().serialize_der()).into();
        self.certificate.replace(
            vec![certificate.clone(), self.trust.authority().clone()],
            key,
        )?;
        let path = self.state_dir.join(IDENTITY).join(PEER_FILES[1]);
        safe_path::write_private(&path, pem("CERTIFICATE", certificate).as_bytes())?;
        Ok(())
    }
}
