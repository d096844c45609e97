//! Fetching one batch of contents from everybody who holds them: sources come and go, claims are made and broken, pieces
//! are written, until every piece is here or nobody is left to ask.
//!
//! Invariants: the picker alone decides who fetches what; a piece counts once it is written; what a lane was promised and
//! did not bring is given back before the lane ends.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, mpsc},
    time::sleep,
};

mod work;

pub use self::work::Work;
use super::{
    account::{Account, Accounts, State},
    membership::Membership,
    pace::Pace,
    picker::{Next, Picker, Received, SourceKey},
    source::{Event, Source, SourceError, Wanted},
    storage::{Storage, StorageError},
    targets::Want,
};
use crate::{
    backoff::Backoff,
    content::{ContentId, VerifiedPiece},
    have::HaveMap,
    identity::PeerId,
    safe_path::SafeName,
};

/// Claims under way per source: while one ends, the next is on its way.
const LANES: usize = 2;
/// Failures in a row, without a piece between them, after which a source is given up.
const MAX_FAILURES: u32 = 4;
/// Wrong answers after which a source is given up for this download.
const MAX_LIES: u32 = 3;

/// Something that the batch's owner acts on.
pub enum Report {
    /// All pieces of this content are written.
    Complete(usize),
    /// Something a person may want to know.
    Note(PeerId, String),
    /// The disk failed: nothing can go on.
    Disk(StorageError),
}

/// The shared state of one batch.
pub struct Swarm {
    membership: Arc<Membership>,
    work: Vec<Work>,
    picker: Mutex<Picker>,
    changed: Notify,
    accounts: Accounts,
    keys: Mutex<HashMap<PeerId, SourceKey>>,
    reports: mpsc::Sender<Report>,
    /// Bytes written by this batch.
    pub fetched: AtomicU64,
}

impl Swarm {
    /// A batch of contents with their open storages; what these hold already is not fetched. Complete ones are reported
    /// by the caller, not here.
    #[must_use]
    pub fn new(
        membership: Arc<Membership>,
        files: Vec<(Want, SafeName, Arc<Storage>)>,
        accounts: Accounts,
        reports: mpsc::Sender<Report>,
    ) -> Self {
        let (work, n_pieces) = work::number(files);
        let mut picker = Picker::new(n_pieces, rand::random());
        for work in &work {
            let have = work.storage.have();
            have.iter().for_each(|piece| picker.mark_done(work.first + piece));
        }
        let (picker, keys) = (Mutex::new(picker), Mutex::default());
        Self { membership, work, picker, changed: Notify::new(), accounts, keys, reports, fetched: AtomicU64::new(0) }
    }

    /// The contents.
    #[must_use]
    pub fn work(&self) -> &[Work] {
        &self.work
    }

    /// Pieces of a content that are missing.
    #[must_use]
    pub fn left(&self, work: usize) -> u32 {
        self.work[work].left()
    }

    /// Is every piece here?
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.picker().is_done()
    }

    fn picker(&self) -> MutexGuard<'_, Picker> {
        self.picker.lock().expect("no panic while the lock is held")
    }

    /// Changes a source's account.
    fn account(&self, peer: PeerId, change: impl FnOnce(&mut Account)) {
        change(self.accounts.lock().expect("no panic while the lock is held").entry(peer).or_default());
    }

    fn key(&self, peer: PeerId) -> SourceKey {
        let mut keys = self.keys.lock().expect("no panic while the lock is held");
        let next = SourceKey(u32::try_from(keys.len()).unwrap_or(u32::MAX));
        *keys.entry(peer).or_insert(next)
    }

    /// Tells the picker what a source holds, all of each named content.
    pub fn holds(&self, peer: PeerId, contents: &BTreeSet<ContentId>) {
        let n_pieces = self.work.last().map_or(0, |work| work.first + work.storage.manifest().layout().n_pieces());
        let held = self.work.iter().filter(|work| contents.contains(&work.want.id));
        let mut have = HaveMap::empty(n_pieces);
        for work in held {
            let n = work.storage.manifest().layout().n_pieces();
            (work.first..work.first + n).for_each(|piece| _ = have.insert(piece));
        }
        let have = if have.is_complete() { HaveMap::full(n_pieces) } else { have };
        let key = self.key(peer);
        self.picker().set_have(key, &have);
        self.changed.notify_waiters();
    }

    /// Works with one source until the batch is done or the source is of no more use. `connected` saves a handshake.
    pub async fn work_with(&self, peer: PeerId, addresses: Vec<String>, mut connected: Option<Source>) {
        let key = self.key(peer);
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(8));
        let pace = Mutex::new(Pace::new(self.mean_piece_len()));
        loop {
            let before = self.bytes_of(peer);
            let outcome = self.session(peer, key, &addresses, connected.take(), &pace).await;
            let Err(error) = outcome else { return self.account(peer, |account| account.state = State::Resting) };
            if self.bytes_of(peer) > before {
                backoff.reset();
            }
            let mut wait = backoff.delay(rand::random());
            let bad_bytes = if let SourceError::BadPiece(_, bytes) = error { bytes } else { 0 };
            let lied = bad_bytes > 0 || matches!(error, SourceError::Lied(_));
            if lied {
                let banned_until = self.picker().bad_piece(key, Instant::now());
                self.account(peer, |account| {
                    account.lies += 1;
                    account.wasted += bad_bytes;
                });
                wait = banned_until.saturating_duration_since(Instant::now());
            }
            self.changed.notify_waiters();
            let lies = self.lies_of(peer);
            let state = match &error {
                _ if lied && lies < MAX_LIES => State::Banned,
                _ if lied => State::Gone,
                SourceError::Setup(_) => State::Gone,
                _ if backoff.n_failures() >= MAX_FAILURES => State::Gone,
                _ => State::Resting,
            };
            let text = format!("{error}");
            self.account(peer, |account| (account.state, account.trouble) = (state, text.clone()));
            self.note(peer, state, &text).await;
            if state == State::Gone {
                self.picker().remove_source(key);
                self.changed.notify_waiters();
                return;
            }
            sleep(wait).await;
        }
    }

    async fn note(&self, peer: PeerId, state: State, why: &str) {
        let what = match state {
            State::Gone => "given up",
            State::Banned => "banned for a while",
            _ => "lost, trying again",
        };
        let _ = self.reports.send(Report::Note(peer, format!("source {}: {what}: {why}", peer.short()))).await;
    }

    fn bytes_of(&self, peer: PeerId) -> u64 {
        self.accounts.lock().expect("no panic while the lock is held").get(&peer).map_or(0, |account| account.bytes)
    }

    fn lies_of(&self, peer: PeerId) -> u32 {
        self.accounts.lock().expect("no panic while the lock is held").get(&peer).map_or(0, |account| account.lies)
    }

    fn mean_piece_len(&self) -> u32 {
        let (mut bytes, mut pieces) = (0, 0);
        for work in &self.work {
            let layout = work.storage.manifest().layout();
            bytes += layout.size();
            pieces += u64::from(layout.n_pieces());
        }
        u32::try_from(bytes / pieces.max(1)).unwrap_or(u32::MAX).max(1)
    }

    /// Connects and runs the lanes; the first that fails ends the others.
    async fn session(
        &self,
        peer: PeerId,
        key: SourceKey,
        addresses: &[String],
        connected: Option<Source>,
        pace: &Mutex<Pace>,
    ) -> Result<(), SourceError> {
        let source = match connected {
            Some(source) => source,
            None => {
                self.account(peer, |account| account.state = State::Connecting);
                Source::connect(&self.membership, peer, addresses).await?
            }
        };
        let address = source.address();
        self.account(peer, |account| (account.state, account.address) = (State::Active, address));
        let lanes = (0..LANES).map(|_| self.lane(&source, key, pace));
        futures_util::future::try_join_all(lanes).await.map(drop)
    }

    async fn lane(&self, source: &Source, key: SourceKey, pace: &Mutex<Pace>) -> Result<(), SourceError> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let next = {
                let pace = pace.lock().expect("no panic while the lock is held");
                let pieces = pace.claim_pieces();
                let (sizes, goodput) = ((pace.chunk_length(), pieces), pace.goodput().unwrap_or(0));
                self.account(source.id, |account| (account.sizes, account.goodput) = (sizes, goodput));
                self.picker().next(key, pieces, pace.expected(pieces), Instant::now())
            };
            match next {
                Next::Done => return Ok(()),
                Next::Wait(_) if source.is_closed() => return Err(SourceError::Broken("it hung up".into())),
                Next::Wait(until) => {
                    // A look now and then also notices a source that hung up while it had nothing to do.
                    let until = until.map_or(Duration::from_secs(1), |at| at.saturating_duration_since(Instant::now()));
                    let until = until.clamp(Duration::from_millis(5), Duration::from_secs(1));
                    tokio::select! { () = changed => {}, () = sleep(until) => {} }
                }
                Next::Claim(pieces) | Next::Steal(pieces) => {
                    let held = Held { swarm: self, key, pieces: Mutex::new(pieces) };
                    self.fetch(source, &held, pace).await?;
                }
            }
        }
    }

    async fn fetch(&self, source: &Source, held: &Held<'_>, pace: &Mutex<Pace>) -> Result<(), SourceError> {
        let (claim, works) = self.claim(held);
        let mut fetch = source.fetch(&claim, pace).await?;
        while let Some(event) = fetch.next().await? {
            match event {
                Event::Piece(range, piece) => self.arrived(source.id, held, works[range], piece).await,
                Event::Missing(range) => {
                    let first = self.work[works[range]].first + claim[range].first.get();
                    self.missing(held, first..first + claim[range].count);
                }
            }
            if !held.is_wanted() {
                break;
            }
        }
        Ok(())
    }

    /// Turns the promised pieces into ranges of contents, and gives back what would be too long for one request.
    fn claim(&self, held: &Held<'_>) -> (Vec<Wanted>, Vec<usize>) {
        let mut pieces = held.pieces.lock().expect("no panic while the lock is held");
        let (claim, works, taken) = work::ranges(&self.work, &pieces);
        let rest = pieces.split_off(taken);
        if !rest.is_empty() {
            self.picker().release(held.key, &rest);
            self.changed.notify_waiters();
        }
        (claim, works)
    }

    async fn arrived(&self, peer: PeerId, held: &Held<'_>, at: usize, piece: VerifiedPiece) {
        let work = &self.work[at];
        let number = work.first + piece.index().get();
        let len = piece.bytes().len() as u64;
        held.settle(number);
        if self.picker().has(number) {
            return self.account(peer, |account| account.wasted += len);
        }
        let storage = work.storage.clone();
        let written = tokio::task::spawn_blocking(move || storage.write(&piece)).await;
        match written {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let _ = self.reports.send(Report::Disk(error)).await;
                return;
            }
            // The pool is shutting down, and we with it.
            Err(_) => return,
        }
        if work.storage.wants_sync() {
            let (storage, reports) = (work.storage.clone(), self.reports.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = storage.sync() {
                    let _ = reports.blocking_send(Report::Disk(error));
                }
            });
        }
        match self.picker().received(held.key, number) {
            Received::Duplicate => return self.account(peer, |account| account.wasted += len),
            Received::New => {}
        }
        self.fetched.fetch_add(len, Ordering::Relaxed);
        self.account(peer, |account| account.bytes += len);
        if work.piece_came() == 0 {
            let _ = self.reports.send(Report::Complete(at)).await;
        }
        self.changed.notify_waiters();
    }

    fn missing(&self, held: &Held<'_>, pieces: std::ops::Range<u32>) {
        let mut picker = self.picker();
        for piece in pieces {
            if held.settle(piece) {
                picker.remove_have(held.key, piece);
            }
        }
        drop(picker);
        self.changed.notify_waiters();
    }

    /// Contents that are begun and not complete: name, bytes done, bytes in all; at most eight.
    #[must_use]
    pub fn in_work(&self) -> Vec<(SafeName, u64, u64)> {
        let begun = self.work.iter().filter_map(Work::begun);
        begun.take(8).collect()
    }

    /// Pieces that nobody offers.
    #[must_use]
    pub fn unavailable(&self) -> u32 {
        self.picker().unavailable()
    }
}

/// The pieces a lane was promised; what is left is given back when it ends, however it ends.
struct Held<'a> {
    swarm: &'a Swarm,
    key: SourceKey,
    pieces: Mutex<Vec<u32>>,
}

impl Held<'_> {
    /// Strikes a piece off; false if it was not promised (any more).
    fn settle(&self, piece: u32) -> bool {
        let mut pieces = self.pieces.lock().expect("no panic while the lock is held");
        let at = pieces.iter().position(|held| *held == piece);
        at.map(|at| pieces.remove(at)).is_some()
    }

    /// Is anything that is still to come of use?
    fn is_wanted(&self) -> bool {
        let pieces = self.pieces.lock().expect("no panic while the lock is held");
        let picker = self.swarm.picker();
        pieces.iter().any(|piece| !picker.has(*piece))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let pieces = self.pieces.lock().map(|mut pieces| std::mem::take(&mut *pieces)).unwrap_or_default();
        if !pieces.is_empty() {
            self.swarm.picker().release(self.key, &pieces);
            self.swarm.changed.notify_waiters();
        }
    }
}
