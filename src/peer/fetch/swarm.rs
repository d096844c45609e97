//! Fetching one batch of contents from everybody who holds them: sources come and go, claims are made and broken, pieces
//! are written and offered to others, until every piece is here or nobody is left to ask.
//!
//! Invariants: the picker alone decides who fetches what; a piece counts, and is offered, once it is written; what a
//! lane was promised and did not bring is given back before the lane ends.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};

mod claim_guard;
mod connections;
mod disk;
mod news;
mod session;
mod work;
mod writer;

use self::news::Refused;
pub use self::work::Work;
use super::swarm::writer::Crew;
use super::{
    pace::{Fixed, Pace},
    picker::{Picker, SourceKey},
    source::{Begun, CONNECTIONS, Source, SourceError},
    source_stats::{Account, Accounts, State},
    stage_times::Spent,
    storage::StorageError,
};
use crate::peer::{limit::Limit, member::membership::Membership};
use crate::{
    backoff::Backoff, catalog::FileKey, content::ContentId, have::HaveMap, identity::PeerId,
    metrics,
};

/// Failures in a row, without a piece between them, after which a source is given up.
const MAX_FAILURES: u32 = 4;
/// Wrong answers after which a source is given up for this download.
const MAX_LIES: u32 = 3;

/// This machine, as a source.
const LOCAL: SourceKey = SourceKey(0);

/// The key of a source from that of one of its connections, of which the first has the same.
const fn source_of(key: SourceKey) -> SourceKey {
    SourceKey(key.0 - key.0.saturating_sub(1) % CONNECTIONS)
}

/// The key of a source's connection.
fn connection_of(source: SourceKey, connection: usize) -> SourceKey {
    SourceKey(
        source
            .0
            .saturating_add(u32::try_from(connection).unwrap_or(0) % CONNECTIONS),
    )
}

/// Something that the batch's owner acts on.
pub enum Report {
    /// All pieces of this content are written.
    Complete(usize),
    /// Somebody else who fetches or holds this content.
    Met(PeerId, Vec<String>, ContentId),
    /// The listing's size of this content is not the one that a source knows.
    Disputed(usize),
    /// Something a person may want to know.
    Note(Option<PeerId>, String),
    /// The disk failed: nothing can go on.
    Disk(StorageError),
}

/// Where this peer serves what it fetches: "HOST:PORT" values, and the port.
#[derive(Clone, Debug, Default)]
pub struct Here {
    /// What is told to sources.
    pub addresses: Vec<String>,
    /// The bound port.
    pub port: u16,
}

/// A source as the batch knows it.
struct Known {
    key: SourceKey,
    /// Wakes its lanes, and no others.
    wake: Arc<Notify>,
    /// Where it was last said to be: "HOST:PORT" values, best first.
    addresses: Vec<String>,
    /// Contents, by their position, that it holds whole.
    complete: BTreeSet<usize>,
    /// Its first news has come, or it tells none.
    has_told: bool,
    refused: Refused,
}

/// The shared state of one batch.
pub struct Swarm {
    membership: Arc<Membership>,
    here: Here,
    limit: Limit,
    fixed: Fixed,
    work: Vec<Work>,
    n_pieces: u32,
    picker: Mutex<Picker>,
    changed: Notify,
    is_tail: AtomicBool,
    /// Sources that are connected.
    n_at_work: AtomicUsize,
    /// Others fetch the same: lines to sources are shared, and what is measured over them is mostly a wait for others.
    in_company: AtomicBool,
    accounts: Accounts,
    known: Mutex<HashMap<PeerId, Known>>,
    reports: mpsc::Sender<Report>,
    /// Bytes written by this batch.
    fetched: AtomicU64,
    /// Bytes found on this disk by this batch.
    resumed: AtomicU64,
    /// Who waits for room on the disk.
    waiting: AtomicU32,
    /// Where the time goes.
    spent: Arc<Spent>,
    /// Who verifies and writes.
    crew: Arc<Crew>,
}

impl Swarm {
    /// A batch of different contents with their open storages; what these hold already is not fetched. Complete ones are
    /// reported by the caller, not here.
    #[must_use]
    pub fn new(
        membership: Arc<Membership>,
        here: Here,
        (limit, fixed): (Limit, Fixed),
        mut work: Vec<Work>,
        (accounts, spent): (Accounts, Arc<Spent>),
        reports: mpsc::Sender<Report>,
    ) -> Self {
        let n_pieces = work::number(&mut work);
        let mut picker = Picker::new(n_pieces, rand::random());
        for work in &work {
            work.storage
                .have()
                .iter()
                .for_each(|piece| picker.mark_done(work.first + piece));
        }
        let (picker, known) = (Mutex::new(picker), Mutex::default());
        let (fetched, resumed, waiting) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU32::new(0));
        let changed = Notify::new();
        Self {
            membership,
            here,
            limit,
            fixed,
            work,
            n_pieces,
            picker,
            changed,
            is_tail: AtomicBool::new(false),
            n_at_work: AtomicUsize::new(0),
            in_company: AtomicBool::new(false),
            accounts,
            known,
            reports,
            fetched,
            resumed,
            waiting,
            crew: Crew::new(spent.clone()),
            spent,
        }
    }

    /// The contents.
    #[must_use]
    pub fn work(&self) -> &[Work] {
        &self.work
    }

    /// Is every piece here?
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.picker().is_done()
    }

    fn picker(&self) -> MutexGuard<'_, Picker> {
        self.picker.lock().expect("no panic while the lock is held")
    }

    /// A good piece of no use: another source had brought it.
    fn waste(&self, peer: PeerId, bytes: u64) {
        metrics::PIECES_WASTED.one();
        metrics::BYTES_WASTED.add(bytes);
        self.account(peer, |account| account.wasted += bytes);
    }

    /// Changes a source's account.
    fn account<T>(&self, peer: PeerId, change: impl FnOnce(&mut Account) -> T) -> T {
        change(
            self.accounts
                .lock()
                .expect("no panic while the lock is held")
                .entry(peer)
                .or_default(),
        )
    }

    fn known<T>(&self, peer: PeerId, change: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.known.lock().expect("no panic while the lock is held");
        // The first key is that of this machine; those that follow one are for further connections.
        let next = SourceKey(
            u32::try_from(known.len())
                .unwrap_or(u32::MAX)
                .saturating_mul(CONNECTIONS)
                .saturating_add(1),
        );
        change(known.entry(peer).or_insert_with(|| Known {
            key: next,
            wake: Arc::default(),
            addresses: vec![],
            complete: BTreeSet::new(),
            has_told: false,
            refused: Refused::default(),
        }))
    }

    fn position(&self, id: &ContentId) -> Option<usize> {
        self.work.iter().position(|work| work.want.id == *id)
    }

    /// Where a source is.
    pub fn is_at(&self, peer: PeerId, addresses: &[String]) {
        self.known(peer, |known| addresses.clone_into(&mut known.addresses));
        self.wake(peer);
    }

    /// A source that holds these contents whole; what else it may hold in part, it will tell itself.
    pub fn holds(&self, peer: PeerId, contents: &HashSet<ContentId>) {
        let whole = self
            .work
            .iter()
            .enumerate()
            .filter(|(_, work)| contents.contains(&work.want.id));
        let mut have = HaveMap::empty(self.n_pieces);
        let key = self.known(peer, |known| {
            known.complete.extend(whole.map(|(at, _)| at));
            let pieces = known.complete.iter().flat_map(|at| self.work[*at].pieces());
            pieces.for_each(|piece| _ = have.insert(piece));
            known.key
        });
        self.picker().set_have(key, &have);
        self.wake(peer);
    }

    /// A source has more, or something of it has come: its own lanes look again. What concerns all goes through
    /// `changed`: freed pieces, sources that left, the tail and the end.
    fn wake(&self, peer: PeerId) {
        self.known(peer, |known| known.wake.notify_waiters());
    }

    /// Works with one source until the batch is done or the source is of no more use; gives back the connection if it is
    /// good. `connected` saves a handshake, and what it was asked for already two round trips. One that went away is looked
    /// for where [`is_at`](Self::is_at) says that it is by then.
    pub async fn work_with(
        &self,
        peer: PeerId,
        mut connected: Option<(Source, Option<Begun>)>,
    ) -> Option<Source> {
        let key = self.known(peer, |known| known.key);
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(8));
        let begun = connected
            .as_ref()
            .and_then(|(_, begun)| begun.as_ref()?.paces.first().cloned());
        let pace = begun.unwrap_or_else(|| {
            Arc::new(Mutex::new(Pace::fixed(self.mean_piece_len(), self.fixed)))
        });
        loop {
            let before = self.account(peer, |account| account.bytes);
            let addresses = self.known(peer, |known| known.addresses.clone());
            let outcome = self
                .session(peer, key, &addresses, connected.take(), &pace)
                .await;
            let error = match outcome {
                Ok(source) => {
                    self.account(peer, |account| account.state = State::Resting);
                    return Some(source);
                }
                Err(error) => error,
            };
            if self.account(peer, |account| account.bytes) > before
                || self.known(peer, |k| k.addresses != addresses)
            {
                backoff.reset();
            }
            let mut wait = backoff.delay(rand::random());
            let bad_bytes = if let SourceError::BadPiece(_, bytes) = error {
                bytes
            } else {
                0
            };
            let lied = bad_bytes > 0 || matches!(error, SourceError::Lied(_));
            if lied {
                metrics::PIECES_BAD.one();
                metrics::BYTES_WASTED.add(bad_bytes);
                metrics::BANS.one();
                let banned_until = self.picker().bad_piece(key, Instant::now());
                self.account(peer, |account| {
                    account.lies += 1;
                    account.wasted += bad_bytes;
                    account.is_proven = false;
                });
                wait = banned_until.saturating_duration_since(Instant::now());
            }
            self.changed.notify_waiters();
            let lies = self.account(peer, |account| account.lies);
            let state = match &error {
                _ if lied && lies < MAX_LIES => State::Banned,
                _ if lied => State::Gone,
                SourceError::Setup(_) => State::Gone,
                _ if backoff.n_failures() >= MAX_FAILURES => State::Gone,
                _ => State::Resting,
            };
            let text = format!("{error}");
            self.account(peer, |account| {
                (account.state, account.trouble) = (state, text.clone())
            });
            self.note(peer, state, &text).await;
            if state == State::Gone {
                self.picker().remove_source(key);
                self.changed.notify_waiters();
                return None;
            }
            if lied {
                sleep(wait).await;
            } else {
                let _ = timeout(wait, self.until(peer, |known| known.addresses != addresses)).await;
            }
        }
    }

    /// Waits until something is known of a source, which its lanes are woken for.
    async fn until(&self, peer: PeerId, is_so: impl Fn(&Known) -> bool) {
        let wake = self.known(peer, |known| known.wake.clone());
        loop {
            let mut woken = pin!(wake.notified());
            woken.as_mut().enable();
            if self.known(peer, |known| is_so(known)) {
                return;
            }
            woken.await;
        }
    }

    async fn note(&self, peer: PeerId, state: State, why: &str) {
        let what = match state {
            State::Gone => "given up",
            State::Banned => "banned for a while",
            _ => "lost, trying again",
        };
        self.report(Report::Note(
            Some(peer),
            format!("source {}: {what}: {why}", peer.short()),
        ))
        .await;
    }

    async fn report(&self, report: Report) {
        // Whoever owns the batch may have gone; then this future is about to be dropped.
        let _ = self.reports.send(report).await;
    }

    fn mean_piece_len(&self) -> u32 {
        let bytes: u64 = self.work.iter().map(|work| work.layout().size()).sum();
        u32::try_from(bytes / u64::from(self.n_pieces).max(1))
            .unwrap_or(u32::MAX)
            .max(1)
    }

    /// Contents that are begun and not complete: which, bytes done, bytes in all; at most eight.
    #[must_use]
    pub fn in_work(&self) -> Vec<(FileKey, u64, u64)> {
        self.work.iter().filter_map(Work::begun).take(8).collect()
    }

    /// Pieces that nobody offers.
    #[must_use]
    pub fn unavailable(&self) -> u32 {
        self.picker().unavailable()
    }

    /// Is some content begun and not complete?
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.work.iter().any(Work::is_begun)
    }

    /// Does somebody wait for room on the disk?
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Leaves a content out: its pieces count as done.
    pub fn leave_out(&self, at: usize) {
        let mut picker = self.picker();
        self.work[at]
            .pieces()
            .for_each(|piece| picker.mark_done(piece));
        drop(picker);
        self.changed.notify_waiters();
    }

    /// Bytes that were fetched, and those that were found here, since the last call.
    pub fn take_counts(&self) -> (u64, u64) {
        (
            self.fetched.swap(0, Ordering::Relaxed),
            self.resumed.swap(0, Ordering::Relaxed),
        )
    }
}
