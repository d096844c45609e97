//! What a tracker tells its operator: members, leases, the listing, certificates.
//!
//! Invariant: a look costs as much as there are members, and no more with more files.

use std::sync::Arc;

use super::{authority::Authority, registry::Registry, store::Store};
use crate::{
    metrics::{self as counted, Exposition},
    operator::Operated,
    tls::{LiveCertificate, seconds_left},
};

/// Where a tracker's figures come from.
pub(super) struct Figures {
    /// Who is a member.
    pub(super) registry: Arc<Registry>,
    /// Who is here.
    pub(super) store: Arc<dyn Store>,
    /// Who signs.
    pub(super) authority: Arc<Authority>,
    /// What is shown to members.
    pub(super) certificate: Arc<LiveCertificate>,
}

impl Operated for Figures {
    fn ready(&self) -> Result<(), String> {
        match seconds_left(&self.certificate.leaf()) {
            1.. => Ok(()),
            _ => Err(
                "the tracker's certificate has ended; see its log for why it was not renewed"
                    .into(),
            ),
        }
    }

    async fn measure(&self, page: &mut Exposition) {
        page.process("tracker", self.ready().is_ok());
        page.connections();
        page.certificates(
            seconds_left(&self.certificate.leaf()),
            seconds_left(self.authority.certificate()),
        );
        let help = "Certificates signed for members, operators and the tracker itself.";
        page.counter("sprat_certificates_issued_total", help)
            .counts(&[], &counted::CERTIFICATES_ISSUED);
        let registry = self.registry.clone();
        let members = tokio::task::spawn_blocking(move || registry.members()).await;
        let members = members.ok().and_then(Result::ok).unwrap_or_default();
        let revoked = members.iter().filter(|(_, member)| member.revoked).count();
        // A store that fails is in the log, and here it is as empty as it is for everybody.
        let Ok(stats) = self.store.stats().await else {
            return;
        };
        let mut gauge = page.gauge(
            "sprat_members",
            "Everybody who ever joined, by how they stand.",
        );
        gauge.with(&[("state", "online")], stats.n_peers);
        gauge.with(
            &[("state", "away")],
            members.len().saturating_sub(revoked + stats.n_peers),
        );
        gauge.with(&[("state", "revoked")], revoked);
        page.gauge("sprat_leases", "Peers whose lease runs.")
            .is(stats.n_peers);
        let help = "Leases that ended without a goodbye.";
        page.counter("sprat_leases_expired_total", help)
            .counts(&[], &counted::LEASES_EXPIRED);
        page.gauge(
            "sprat_listed_files",
            "Rows of the listing: names with their contents.",
        )
        .is(stats.n_rows);
        page.gauge(
            "sprat_listed_contents",
            "Different contents in the listing.",
        )
        .is(stats.n_contents);
        page.gauge("sprat_listing_bytes", "Memory that the listing takes.")
            .is(stats.used_bytes);
        page.gauge(
            "sprat_listing_limit_bytes",
            "Memory that the listing may take.",
        )
        .is(stats.budget_bytes);
    }
}
