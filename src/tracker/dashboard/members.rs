//! Who belongs to the network, and how each stands: what the registry remembers, what the store holds and what peers say,
//! joined by peer id.
//!
//! Invariant: a member is in exactly one state; a peer that is here but not in the registry (which was restored from an
//! older copy, say) is shown too.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::{Trouble, files::PageRange, kept::Kept};
use crate::{
    catalog::PeerRecord,
    identity::PeerId,
    tracker::{
        activity::{Activity, Heard, unix_seconds},
        registry::{MemberRecord, Registry},
        store::Store,
    },
};

const DAY: u64 = 86_400;

/// How a member stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// Has a lease.
    Online,
    /// Was here since the tracker started, and is not now.
    Away,
    /// Was not here since the tracker started.
    Unseen,
    /// Its certificate has ended; it renews it when it comes back, within 30 days.
    Expired,
    /// Thrown out.
    Revoked,
}

#[derive(Clone, Debug, Serialize)]
struct Member {
    peer_id: String,
    state: State,
    /// Seconds since the epoch, as all times here.
    joined_at: Option<u64>,
    certified_until: Option<u64>,
    seen_at: Option<u64>,
    addresses: Vec<String>,
    files: usize,
    lease_seconds_left: Option<u64>,
    send_rate: u64,
    receive_rate: u64,
    /// Since it started; none if it does not say.
    bytes_sent: Option<u64>,
    bytes_received: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Sort {
    #[default]
    State,
    Files,
    Sent,
    Received,
    Certificate,
    Lease,
}

/// Which members in which order.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct MembersQuery {
    /// Part of the peer id or of an address.
    text: String,
    state: Option<State>,
    sort: Sort,
    descending: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct MembersPage {
    total: usize,
    matching: usize,
    offset: usize,
    rows: Vec<Member>,
}

/// All members in a few numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct MembersSummary {
    online: usize,
    away: usize,
    unseen: usize,
    expired: usize,
    revoked: usize,
    /// Online peers whose last heartbeat is overdue.
    late: usize,
    /// Online peers whose certificate ends within a day: past the time to renew it.
    ending: usize,
    /// When the first certificate of an online peer ends.
    first_end: Option<u64>,
}

/// The members at a moment.
pub(super) struct Roll {
    members: Vec<Member>,
    pub(super) summary: MembersSummary,
    /// Who is here, with the number of files.
    pub(super) online: HashMap<PeerId, usize>,
}

/// What a [`Roll`] is made of.
struct Known {
    records: HashMap<PeerId, MemberRecord>,
    here: HashMap<PeerId, PeerRecord>,
    heard: HashMap<PeerId, Heard>,
    seen: HashMap<PeerId, u64>,
    lease_seconds: u64,
}

impl Known {
    fn member(&self, peer: PeerId, now: (Instant, u64)) -> Member {
        let (record, here) = (self.records.get(&peer), self.here.get(&peer));
        let seen_at = self.seen.get(&peer).copied();
        let state = match record {
            Some(record) if record.revoked => State::Revoked,
            _ if here.is_some() => State::Online,
            Some(record) if record.certified_until <= now.1 => State::Expired,
            _ if seen_at.is_some() => State::Away,
            _ => State::Unseen,
        };
        let heard = self.heard.get(&peer).filter(|_| here.is_some());
        let age = heard.map(|heard| now.0.saturating_duration_since(heard.at).as_secs());
        let said = heard.and_then(|heard| heard.report.as_ref());
        Member {
            peer_id: peer.to_string(),
            state,
            joined_at: record.map(|record| record.joined_at),
            certified_until: record.map(|record| record.certified_until),
            seen_at,
            addresses: here
                .map(|here| here.announcement.addresses.clone())
                .unwrap_or_default(),
            files: here.map_or(0, |here| here.n_files),
            lease_seconds_left: age.map(|age| self.lease_seconds.saturating_sub(age)),
            send_rate: said.map_or(0, |said| said.send_rate),
            receive_rate: said.map_or(0, |said| said.receive_rate),
            bytes_sent: said.map(|said| said.sent),
            bytes_received: said.map(|said| said.received),
        }
    }

    fn roll(&self, late_below: u64) -> Roll {
        let now = (Instant::now(), unix_seconds());
        let peers: BTreeSet<&PeerId> = self.records.keys().chain(self.here.keys()).collect();
        let members: Vec<Member> = peers
            .into_iter()
            .map(|peer| self.member(*peer, now))
            .collect();
        let mut summary = MembersSummary::default();
        for member in &members {
            *match member.state {
                State::Online => &mut summary.online,
                State::Away => &mut summary.away,
                State::Unseen => &mut summary.unseen,
                State::Expired => &mut summary.expired,
                State::Revoked => &mut summary.revoked,
            } += 1;
            if member.state == State::Online {
                summary.late += usize::from(
                    member
                        .lease_seconds_left
                        .is_some_and(|left| left < late_below),
                );
                summary.ending += usize::from(
                    member
                        .certified_until
                        .is_some_and(|until| until < now.1 + DAY),
                );
                summary.first_end = summary
                    .first_end
                    .into_iter()
                    .chain(member.certified_until)
                    .min();
            }
        }
        let online = self
            .here
            .iter()
            .map(|(peer, here)| (*peer, here.n_files))
            .collect();
        Roll {
            members,
            summary,
            online,
        }
    }
}

/// The members, kept for a moment.
pub(super) struct Members {
    store: Arc<dyn Store>,
    registry: Arc<Registry>,
    activity: Arc<Activity>,
    roll: Kept<Roll>,
}

impl Members {
    pub(super) fn new(
        store: Arc<dyn Store>,
        registry: Arc<Registry>,
        activity: Arc<Activity>,
    ) -> Self {
        Self {
            store,
            registry,
            activity,
            roll: Kept::new(),
        }
    }

    pub(super) async fn roll(&self) -> Result<Arc<Roll>, Trouble> {
        let call = async {
            let here = self.store.peers().await?;
            let registry = self.registry.clone();
            let records = spawn_blocking(move || registry.members()).await??;
            let (heartbeat, lease) = self.activity.intervals();
            let known = Known {
                records: records.into_iter().collect(),
                here: here
                    .into_iter()
                    .map(|record| (record.announcement.peer, record))
                    .collect(),
                heard: self.activity.peers(),
                seen: self.activity.seen(),
                lease_seconds: lease.as_secs(),
            };
            // One heartbeat may be lost on the way.
            let late_below = lease.saturating_sub(heartbeat * 2).as_secs();
            Ok(spawn_blocking(move || known.roll(late_below)).await?)
        };
        self.roll.get(call).await
    }

    pub(super) async fn page(
        &self,
        wanted: &MembersQuery,
        part: PageRange,
    ) -> Result<MembersPage, Trouble> {
        let roll = self.roll().await?;
        let text = wanted.text.trim().to_lowercase();
        let is_wanted = |member: &&Member| {
            wanted.state.is_none_or(|state| state == member.state)
                && (member.peer_id.contains(&text)
                    || member
                        .addresses
                        .iter()
                        .any(|address| address.contains(&text)))
        };
        let mut found: Vec<&Member> = roll.members.iter().filter(is_wanted).collect();
        match wanted.sort {
            Sort::State => found.sort_by_key(|member| member.state),
            Sort::Files => found.sort_by_key(|member| member.files),
            Sort::Sent => found.sort_by_key(|member| (member.send_rate, member.bytes_sent)),
            Sort::Received => {
                found.sort_by_key(|member| (member.receive_rate, member.bytes_received))
            }
            Sort::Certificate => {
                found.sort_by_key(|member| member.certified_until.unwrap_or(u64::MAX))
            }
            Sort::Lease => {
                found.sort_by_key(|member| member.lease_seconds_left.unwrap_or(u64::MAX))
            }
        }
        if wanted.descending {
            found.reverse();
        }
        let (offset, rows) = part.of(&found);
        let rows = rows.iter().map(|member| (*member).clone()).collect();
        Ok(MembersPage {
            total: roll.members.len(),
            matching: found.len(),
            offset,
            rows,
        })
    }

    pub(super) fn rest(&self) {
        self.roll.rest();
    }
}
