//! Whom a process believes: the network's authority, and the list it signs.
//!
//! Invariant: a list is adopted only if it is newer than the one held, so a revocation that was seen once cannot be
//! rolled back by replaying an older list. Signatures are checked where lists are read from the wire or from disk.

use std::{collections::HashSet, sync::Arc};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use crate::identity::{CertificateFacts, IdentityError, PeerId, signed_by};

/// What the authority has signed beside certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustList {
    /// Rises with every change.
    pub epoch: u64,
    /// SHA-256 of the keys of tracker certificates from elsewhere.
    pub tracker_pins: HashSet<[u8; 32]>,
    /// Members no longer.
    pub denied: HashSet<PeerId>,
}

/// Whom this process believes: the authority's certificate and its newest [`TrustList`]. Shared by every connection.
#[derive(Debug)]
pub struct Trust {
    authority: CertificateDer<'static>,
    public_key: Vec<u8>,
    list: watch::Sender<Arc<TrustList>>,
}

impl Trust {
    /// Trusts `authority` and, to begin with, an empty list.
    ///
    /// # Errors
    /// If the certificate is unreadable.
    pub fn new(authority: CertificateDer<'static>) -> Result<Arc<Self>, IdentityError> {
        let public_key = CertificateFacts::read(&authority)?.public_key;
        Ok(Arc::new(Self {
            authority,
            public_key,
            list: watch::Sender::new(Arc::default()),
        }))
    }

    /// The authority's certificate.
    #[must_use]
    pub const fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    /// Did the authority sign this?
    #[must_use]
    pub fn signed(&self, body: &[u8], signature: &[u8]) -> bool {
        signed_by(&self.public_key, body, signature)
    }

    /// Takes over a list whose signature was checked, if it is newer; says whether it was.
    pub fn adopt(&self, list: TrustList) -> bool {
        self.list.send_if_modified(|current| {
            let newer = list.epoch > current.epoch;
            if newer {
                *current = Arc::new(list);
            }
            newer
        })
    }

    /// The newest list.
    #[must_use]
    pub fn list(&self) -> Arc<TrustList> {
        self.list.borrow().clone()
    }

    /// Follows the list; connections close themselves when their peer is denied.
    #[must_use]
    pub fn follow(&self) -> watch::Receiver<Arc<TrustList>> {
        self.list.subscribe()
    }
}
