//! The network at this moment, as one object: what every page that follows is sent each second.

use std::{sync::Arc, time::Instant};

use serde::Serialize;
use tokio::task::spawn_blocking;

use super::{Dashboard, Trouble, files, members, swarm::SwarmView};
use crate::{identity::CertificateFacts, tls::LiveCertificate, tracker::activity::unix_seconds};

/// Buckets of the history that come with each event: the one that fills, and those that may have changed since the last
/// heartbeats.
const RECENT: usize = 4;
/// Tokens that are named: those that end first.
const INVITATIONS: usize = 20;

#[derive(Serialize)]
pub(super) struct Now {
    /// Seconds since the epoch, as all times here.
    time: u64,
    network: Network,
    files: files::FilesSummary,
    members: members::MembersSummary,
    health: Health,
    swarm: SwarmView,
    history: Recent,
}

#[derive(Serialize)]
struct Network {
    version: &'static str,
    started_at: u64,
    advertised: Vec<String>,
    fingerprint: String,
}

#[derive(Serialize)]
struct Health {
    heartbeat_seconds: f64,
    lease_seconds: f64,
    authority_until: i64,
    certificates: Vec<Certificate>,
    trust_epoch: u64,
    memory_used: u64,
    memory_budget: u64,
    /// Join tokens that are still good for somebody.
    invitations: Vec<Invitation>,
    n_invitations: usize,
}

#[derive(Serialize)]
struct Certificate {
    what: &'static str,
    until: Option<i64>,
}

#[derive(Serialize)]
struct Invitation {
    token_id: String,
    uses_left: usize,
    expires_at: u64,
}

#[derive(Serialize)]
struct Recent {
    first: u64,
    bytes: Vec<u64>,
}

impl Dashboard {
    pub(super) async fn now(&self) -> Result<Now, Trouble> {
        let listing = self.files.listing().await?;
        let roll = self.members.roll().await?;
        let heard = self.parts.activity.peers();
        let (files, members) = (listing.summary.clone(), roll.summary.clone());
        let swarm = spawn_blocking(move || SwarmView::new(&heard, &roll.online, &listing)).await?;
        let (first, mut bytes) = self.parts.activity.history(Instant::now());
        let older = bytes.len().saturating_sub(RECENT);
        Ok(Now {
            time: unix_seconds(),
            network: Network {
                version: env!("CARGO_PKG_VERSION"),
                started_at: self.started_at,
                advertised: self.parts.advertised.clone(),
                fingerprint: self.parts.fingerprint.clone(),
            },
            files,
            members,
            health: self.health().await?,
            swarm,
            history: Recent {
                first: first + older as u64,
                bytes: bytes.split_off(older),
            },
        })
    }

    async fn health(&self) -> Result<Health, Trouble> {
        let stats = self.parts.store.stats().await?;
        let registry = self.parts.registry.clone();
        let read = move || Ok::<_, Trouble>((registry.tokens()?, registry.trust_list()?.epoch));
        let (tokens, trust_epoch) = spawn_blocking(read).await??;
        let now = unix_seconds();
        let mut invitations: Vec<Invitation> = tokens
            .into_iter()
            .map(|(token_id, token)| Invitation {
                token_id,
                uses_left: (token.uses as usize).saturating_sub(token.redeemed_by.len()),
                expires_at: token.expires_at,
            })
            .filter(|token| token.uses_left > 0 && token.expires_at > now)
            .collect();
        invitations.sort_by_key(|token| token.expires_at);
        let n_invitations = invitations.len();
        invitations.truncate(INVITATIONS);
        let (heartbeat, lease) = self.parts.activity.intervals();
        let (issued, unnamed) = (&self.parts.issued, &self.parts.unnamed);
        let own = (!Arc::ptr_eq(issued, unnamed)).then_some(("own", unnamed));
        let certificates = [("issued", issued)].into_iter().chain(own);
        Ok(Health {
            heartbeat_seconds: heartbeat.as_secs_f64(),
            lease_seconds: lease.as_secs_f64(),
            authority_until: self.parts.authority_until,
            certificates: certificates
                .map(|(what, live)| Certificate {
                    what,
                    until: end(live),
                })
                .collect(),
            trust_epoch,
            memory_used: stats.used_bytes,
            memory_budget: stats.budget_bytes,
            invitations,
            n_invitations,
        })
    }
}

fn end(certificate: &LiveCertificate) -> Option<i64> {
    CertificateFacts::read(&certificate.leaf())
        .ok()
        .map(|facts| facts.not_after)
}
