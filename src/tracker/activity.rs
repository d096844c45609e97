//! What peers say they move: the newest report of each, when each was last heard, and an hour of throughput.
//!
//! Invariants: only the operator's page looks at it, nothing is decided by it; a report is as old as its lease at most,
//! and whatever it says costs bounded memory; numbers are cut to what a browser can count with.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    content::ContentId,
    identity::PeerId,
    proto::{self, MAX_TRANSFER_SOURCES, MAX_TRANSFERS, WireError},
};

mod history;

pub use self::history::{BUCKET, History};

/// Transfers and sources of all reports together; who reports when there is no room for more shows totals alone.
const MAX_KEPT: usize = 1 << 18;
/// Heartbeats a second of all peers together, should all of them move bytes at once.
const BUSY_HEARTBEATS: u32 = 500;
const SOONEST: Duration = Duration::from_secs(1);
/// Numbers above this are no longer exact in JavaScript.
const MAX_NUMBER: u64 = (1 << 53) - 1;
/// No peer is faster, bytes a second.
const MAX_RATE: u64 = 1 << 40;

/// What a peer said last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActivityReport {
    /// Bytes since it started.
    pub sent: u64,
    /// Bytes since it started.
    pub received: u64,
    /// Bytes a second.
    pub send_rate: u64,
    /// Bytes a second.
    pub receive_rate: u64,
    /// Its downloads.
    pub transfers: Vec<Transfer>,
}

/// A download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// One of its contents.
    pub content: Option<ContentId>,
    /// Of the whole download.
    pub bytes_total: u64,
    /// At most `bytes_total`.
    pub bytes_done: u64,
    /// Of the whole download.
    pub files_total: u64,
    /// At most `files_total`.
    pub files_done: u64,
    /// Bytes a second.
    pub rate: u64,
    /// Who sends, and how many bytes a second.
    pub sources: Vec<(PeerId, u64)>,
}

impl TryFrom<proto::Activity> for ActivityReport {
    type Error = WireError;

    fn try_from(said: proto::Activity) -> Result<Self, WireError> {
        if said.transfers.len() > MAX_TRANSFERS {
            return Err(WireError::TooMany(MAX_TRANSFERS, "transfers"));
        }
        if said
            .transfers
            .iter()
            .map(|transfer| transfer.sources.len())
            .sum::<usize>()
            > MAX_TRANSFER_SOURCES
        {
            return Err(WireError::TooMany(
                MAX_TRANSFER_SOURCES,
                "sources of transfers",
            ));
        }
        Ok(Self {
            sent: said.bytes_sent.min(MAX_NUMBER),
            received: said.bytes_received.min(MAX_NUMBER),
            send_rate: said.send_rate.min(MAX_RATE),
            receive_rate: said.receive_rate.min(MAX_RATE),
            transfers: said
                .transfers
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<proto::Transfer> for Transfer {
    type Error = WireError;

    fn try_from(said: proto::Transfer) -> Result<Self, WireError> {
        let id = &said.content_id;
        let (bytes_total, files_total) = (
            said.bytes_total.min(MAX_NUMBER),
            said.files_total.min(MAX_NUMBER),
        );
        let source = |source: &proto::TransferSource| {
            Ok((
                proto::peer_id(&source.peer_id)?,
                source.bytes_per_second.min(MAX_RATE),
            ))
        };
        Ok(Self {
            content: (!id.is_empty())
                .then(|| proto::content_id(id))
                .transpose()?,
            bytes_total,
            bytes_done: said.bytes_done.min(bytes_total),
            files_total,
            files_done: said.files_done.min(files_total),
            rate: said.bytes_per_second.min(MAX_RATE),
            sources: said
                .sources
                .iter()
                .map(source)
                .collect::<Result<_, WireError>>()?,
        })
    }
}

impl ActivityReport {
    fn entries(&self) -> usize {
        self.transfers
            .iter()
            .map(|transfer| 1 + transfer.sources.len())
            .sum()
    }
}

/// A peer with a lease.
#[derive(Clone, Debug)]
pub struct Heard {
    /// When its lease was last renewed.
    pub at: Instant,
    /// None until its first heartbeat with a report.
    pub report: Option<Arc<ActivityReport>>,
}

/// What all peers say.
pub struct Activity {
    heartbeat: Duration,
    lease: Duration,
    state: Mutex<State>,
}

struct State {
    peers: HashMap<PeerId, Heard>,
    /// Seconds since the epoch; of everybody who was here in this process's life, so at most one for each member.
    seen: HashMap<PeerId, u64>,
    n_kept: usize,
    history: History,
}

impl Activity {
    /// Nobody yet. `heartbeat` and `lease` are what peers are told.
    #[must_use]
    pub fn new(heartbeat: Duration, lease: Duration, now: Instant) -> Self {
        let state = State {
            peers: HashMap::new(),
            seen: HashMap::new(),
            n_kept: 0,
            history: History::new(now),
        };
        Self {
            heartbeat,
            lease,
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A peer's lease was renewed; a heartbeat brings what it moves.
    pub fn heard(&self, peer: PeerId, report: Option<ActivityReport>, now: Instant) {
        let state = &mut *self.lock();
        state.seen.insert(peer, unix_seconds());
        let before = state.forget(peer);
        let was = before.as_ref().and_then(|heard| heard.report.clone());
        if let (Some(before), Some(was), Some(is)) = (&before, &was, &report) {
            // Less than before: the peer began anew.
            let came = is.received.saturating_sub(was.received);
            state.history.add(
                came.min(most_in(now.saturating_duration_since(before.at))),
                before.at,
                now,
            );
        }
        state.keep(
            peer,
            Heard {
                at: now,
                report: report.map(Arc::new).or(was),
            },
        );
    }

    /// A peer said goodbye.
    pub fn left(&self, peer: PeerId) {
        self.lock().forget(peer);
    }

    /// Forgets whose lease is over.
    pub fn expire(&self, now: Instant) {
        let mut state = self.lock();
        let is_over = |heard: &Heard| now.saturating_duration_since(heard.at) > self.lease;
        let over: Vec<PeerId> = state
            .peers
            .iter()
            .filter(|(_, heard)| is_over(heard))
            .map(|(peer, _)| *peer)
            .collect();
        for peer in over {
            state.forget(peer);
        }
    }

    /// How often a peer that moves bytes is to call.
    #[must_use]
    pub fn busy_interval(&self) -> Duration {
        let n_peers = u32::try_from(self.lock().peers.len()).unwrap_or(u32::MAX);
        (SOONEST * n_peers / BUSY_HEARTBEATS).clamp(SOONEST, self.heartbeat.max(SOONEST))
    }

    /// Everybody with a lease.
    #[must_use]
    pub fn peers(&self) -> HashMap<PeerId, Heard> {
        self.lock().peers.clone()
    }

    /// When each peer was last heard in this process's life, in seconds since the epoch.
    #[must_use]
    pub fn seen(&self) -> HashMap<PeerId, u64> {
        self.lock().seen.clone()
    }

    /// Bytes delivered in each [`BUCKET`] of the last hour, and the number of the oldest; the last one is still filling.
    #[must_use]
    pub fn history(&self, now: Instant) -> (u64, Vec<u64>) {
        self.lock().history.buckets(now)
    }

    /// What peers are told: heartbeat and lease.
    #[must_use]
    pub const fn intervals(&self) -> (Duration, Duration) {
        (self.heartbeat, self.lease)
    }
}

impl Heard {
    fn entries(&self) -> usize {
        self.report.as_ref().map_or(0, |report| report.entries())
    }
}

impl State {
    fn keep(&mut self, peer: PeerId, mut heard: Heard) {
        if self.n_kept + heard.entries() > MAX_KEPT
            && let Some(report) = &mut heard.report
        {
            Arc::make_mut(report).transfers.clear();
        }
        self.n_kept += heard.entries();
        self.peers.insert(peer, heard);
    }

    fn forget(&mut self, peer: PeerId) -> Option<Heard> {
        let heard = self.peers.remove(&peer)?;
        self.n_kept -= heard.entries();
        Some(heard)
    }
}

fn most_in(time: Duration) -> u64 {
    MAX_RATE.saturating_mul(time.as_secs() + 1)
}

/// The wall clock.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEARTBEAT: Duration = Duration::from_secs(10);
    const LEASE: Duration = Duration::from_secs(30);

    fn peer(n: u32) -> PeerId {
        PeerId::from_spki(&n.to_be_bytes())
    }

    fn transfer(n_sources: u32) -> proto::Transfer {
        let source = |n| proto::TransferSource {
            peer_id: peer(n).to_string(),
            bytes_per_second: u64::MAX,
        };
        proto::Transfer {
            content_id: ContentId::from_bytes([1; 32]).to_string(),
            bytes_total: 10,
            bytes_done: 11,
            files_total: u64::MAX,
            files_done: u64::MAX,
            bytes_per_second: u64::MAX,
            sources: (0..n_sources).map(source).collect(),
        }
    }

    fn received(bytes: u64) -> Option<ActivityReport> {
        Some(ActivityReport {
            received: bytes,
            ..ActivityReport::default()
        })
    }

    #[test]
    fn what_peers_say_is_checked_and_cut() {
        let said = |transfers| proto::Activity {
            bytes_sent: u64::MAX,
            transfers,
            ..Default::default()
        };
        let report = ActivityReport::try_from(said(vec![transfer(256)])).unwrap();
        let shown = &report.transfers[0];
        assert_eq!(
            (report.sent, shown.bytes_done, shown.rate),
            (MAX_NUMBER, 10, MAX_RATE)
        );
        assert!(
            (shown.files_done, shown.sources.len()) == (MAX_NUMBER, 256)
                && shown.sources[9].1 == MAX_RATE
        );
        assert!(ActivityReport::try_from(said(vec![transfer(3); 64])).is_ok());
        for bad in [
            vec![transfer(0); 65],
            vec![transfer(129); 2],
            vec![proto::Transfer {
                content_id: "<b>".into(),
                ..Default::default()
            }],
            vec![proto::Transfer {
                sources: vec![proto::TransferSource::default()],
                ..Default::default()
            }],
        ] {
            assert!(ActivityReport::try_from(said(bad)).is_err());
        }
    }

    #[test]
    fn a_report_lives_as_long_as_the_lease() {
        let start = Instant::now();
        let activity = Activity::new(HEARTBEAT, LEASE, start);
        activity.heard(peer(1), received(5), start);
        activity.heard(peer(2), None, start);
        activity.heard(peer(1), None, start + LEASE);
        activity.expire(start + LEASE + SOONEST);
        let here = activity.peers();
        assert_eq!(here.keys().collect::<Vec<_>>(), [&peer(1)]);
        assert_eq!(
            here[&peer(1)].report.as_ref().unwrap().received,
            5,
            "a registration brings none and takes none"
        );
        activity.left(peer(1));
        assert!(activity.peers().is_empty() && activity.seen().len() == 2);
    }

    #[test]
    fn many_reports_take_no_more_memory_than_is_set() {
        let start = Instant::now();
        let activity = Activity::new(HEARTBEAT, LEASE, start);
        let said = proto::Activity {
            transfers: vec![transfer(256)],
            bytes_sent: 7,
            ..Default::default()
        };
        let report = ActivityReport::try_from(said).unwrap();
        for n in 0..1_500 {
            activity.heard(peer(n), Some(report.clone()), start);
        }
        let kept = || activity.peers().values().map(Heard::entries).sum::<usize>();
        assert!(kept() <= MAX_KEPT && kept() > MAX_KEPT - 300);
        assert!(
            activity
                .peers()
                .values()
                .all(|heard| heard.report.as_ref().unwrap().sent == 7)
        );
        (0..1_500).for_each(|n| activity.left(peer(n)));
        assert_eq!(activity.lock().n_kept, 0);
    }

    #[test]
    fn the_more_peers_the_slower_their_heartbeats() {
        let start = Instant::now();
        let activity = Activity::new(HEARTBEAT, LEASE, start);
        assert_eq!(activity.busy_interval(), SOONEST);
        (0..1_000).for_each(|n| activity.heard(peer(n), None, start));
        assert_eq!(activity.busy_interval(), Duration::from_secs(2));
        (0..9_000).for_each(|n| activity.heard(peer(n), None, start));
        assert_eq!(activity.busy_interval(), HEARTBEAT);
    }

    #[test]
    fn deliveries_are_counted_from_one_report_to_the_next() {
        let start = Instant::now();
        let activity = Activity::new(HEARTBEAT, LEASE, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        let total = |now| activity.history(now).1.iter().sum::<u64>();
        activity.heard(peer(1), received(1 << 40), at(1));
        assert_eq!(
            total(at(1)),
            0,
            "what came before this tracker is not its history"
        );
        activity.heard(peer(1), received((1 << 40) + 500), at(2));
        activity.heard(peer(1), received(100), at(3));
        activity.heard(peer(1), received(400), at(4));
        assert_eq!(total(at(4)), 800);
        activity.heard(peer(1), received(MAX_NUMBER), at(5));
        assert_eq!(
            total(at(5)),
            800 + 2 * MAX_RATE,
            "no faster than anybody can be"
        );
    }
}
