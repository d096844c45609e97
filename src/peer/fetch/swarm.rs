//! What the sessions of a get share: its book-keeping behind one lock, those who are to be woken, the disk and the counts.
//!
//! Invariants: whatever is changed is changed in the [`Engine`] under the lock, and the lock is held across no await and no
//! disk; after a change those who look are woken, and find it by looking; a piece counts, and is offered to others, once it
//! is written.

use std::{
    collections::{HashMap, VecDeque},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio_util::task::TaskTracker;

use super::{
    contents::Position,
    disk::DiskRoom,
    engine::Engine,
    pace::{Fixed, Pace},
    picker::{Received, SourceKey},
    source_stats::SourceStats,
    stage_times::StageTimes,
    storage::Storage,
    writer::WriterPool,
};
use crate::{
    content::PieceIndex,
    identity::PeerId,
    metrics,
    peer::{limit::Limit, member::membership::Membership, sharing::library::Partial},
    safe_path::SafeName,
};

/// Lines for people that wait to be told; more are only counted.
const MAX_NOTES: usize = 256;

/// Where this peer serves what it fetches: "HOST:PORT" values, and the port.
#[derive(Clone, Debug, Default)]
pub struct Here {
    /// What is told to sources.
    pub addresses: Vec<String>,
    /// The bound port.
    pub port: u16,
}

/// The open file of a content.
pub struct OpenFile {
    /// What the content is called.
    pub name: SafeName,
    /// Its `.part`.
    pub storage: Arc<Storage>,
    /// The offer of what is here of it; none for a content of one piece.
    pub partial: Option<Partial>,
    /// It counts as open; none if it is one of those that a get may always have.
    pub _permit: Option<OwnedSemaphorePermit>,
}

/// What a source keeps from one session to the next.
pub(super) struct Acquaintance {
    /// Wakes its lanes, and no others.
    pub(super) wake: Notify,
    /// How its pieces come over its first connection.
    pace: Mutex<Arc<Mutex<Pace>>>,
}

impl Acquaintance {
    pub(super) fn pace(&self) -> Arc<Mutex<Pace>> {
        lock(&self.pace).clone()
    }

    pub(super) fn set_pace(&self, pace: &Arc<Mutex<Pace>>) {
        lock(&self.pace).clone_from(pace);
    }
}

/// The shared state of a get.
pub struct Swarm {
    pub(super) membership: Arc<Membership>,
    pub(super) here: Here,
    pub(super) limit: Limit,
    pub(super) fixed: Fixed,
    /// Those who hold what is wanted are probably at the other end of a long line.
    pub(super) is_far: bool,
    engine: Mutex<Engine<Arc<OpenFile>>>,
    acquaintances: Mutex<HashMap<PeerId, Arc<Acquaintance>>>,
    /// All lanes look again: freed pieces, sources that left, opened files, the tail and the end.
    pub(super) changed: Notify,
    /// The owner of the get looks again.
    pub news: Notify,
    is_tail: AtomicBool,
    /// Sources that are connected.
    pub(super) n_at_work: AtomicUsize,
    /// A far source was asked for pieces beside its manifests.
    pub(super) has_begun: AtomicBool,
    /// By how much the listing's sizes were wrong, bytes, wrapping.
    pub(super) bytes_corrected: AtomicU64,
    /// Others fetch the same: lines to sources are shared, and what is measured over them is mostly a wait for others.
    pub(super) in_company: AtomicBool,
    /// Bytes written that came over the network.
    fetched: AtomicU64,
    /// Bytes found on this disk.
    resumed: AtomicU64,
    /// Who waits for room on the disk.
    pub(super) room: DiskRoom,
    /// Where the time goes.
    pub(super) stage_times: Arc<StageTimes>,
    /// What has to end before the Node does.
    pub(super) tasks: TaskTracker,
    /// Who verifies and writes.
    pub(super) writers: Arc<WriterPool>,
    notes: Mutex<VecDeque<(Option<PeerId>, String)>>,
    failure: Mutex<Option<anyhow::Error>>,
}

impl Swarm {
    /// A get of what `engine` wants.
    #[must_use]
    pub fn new(
        membership: Arc<Membership>,
        here: Here,
        (limit, fixed): (Limit, Fixed),
        is_far: bool,
        engine: Engine<Arc<OpenFile>>,
        (stage_times, tasks): (Arc<StageTimes>, TaskTracker),
    ) -> Self {
        Self {
            membership,
            here,
            limit,
            fixed,
            is_far,
            engine: Mutex::new(engine),
            acquaintances: Mutex::default(),
            changed: Notify::new(),
            news: Notify::new(),
            is_tail: AtomicBool::new(false),
            n_at_work: AtomicUsize::new(0),
            has_begun: AtomicBool::new(false),
            bytes_corrected: AtomicU64::new(0),
            in_company: AtomicBool::new(false),
            fetched: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            room: DiskRoom::default(),
            stage_times,
            tasks,
            writers: WriterPool::new(),
            notes: Mutex::default(),
            failure: Mutex::default(),
        }
    }

    /// The book-keeping. Held for as long as one change takes, and never across an await.
    pub fn engine(&self) -> MutexGuard<'_, Engine<Arc<OpenFile>>> {
        lock(&self.engine)
    }

    /// What a source keeps from one session to the next.
    pub(super) fn acquaintance(&self, peer: PeerId) -> Arc<Acquaintance> {
        let new = || {
            let pace = Pace::fixed(self.engine().contents.mean_piece_len(), self.fixed);
            Arc::new(Acquaintance {
                wake: Notify::new(),
                pace: Mutex::new(Arc::new(Mutex::new(pace))),
            })
        };
        lock(&self.acquaintances)
            .entry(peer)
            .or_insert_with(new)
            .clone()
    }

    /// Bytes that came from sources, good or not.
    pub fn arrived(&self) -> u64 {
        let known = lock(&self.acquaintances);
        let bytes = known.values().map(|known| lock(&known.pace()).line_bytes());
        bytes.sum()
    }

    /// A source has more, or something of it has come: its own lanes look again.
    pub(super) fn wake(&self, peer: PeerId) {
        if let Some(known) = lock(&self.acquaintances).get(&peer) {
            known.wake.notify_waiters();
        }
    }

    /// Everybody looks again.
    pub fn wake_all(&self) {
        self.changed.notify_waiters();
        self.news.notify_one();
    }

    /// Waits until something is so, which everybody is woken for, or the lanes of this source.
    pub(super) async fn until(&self, peer: PeerId, is_so: impl Fn(&Engine<Arc<OpenFile>>) -> bool) {
        let known = self.acquaintance(peer);
        loop {
            let (mut changed, mut woken) =
                (pin!(self.changed.notified()), pin!(known.wake.notified()));
            changed.as_mut().enable();
            woken.as_mut().enable();
            if is_so(&self.engine()) {
                return;
            }
            tokio::select! { () = changed => {}, () = woken => {} }
        }
    }

    /// Changes what is noted of a source.
    pub(super) fn note_of(&self, peer: PeerId, change: impl FnOnce(&mut SourceStats)) {
        self.engine().sources.note(peer, change);
    }

    /// Is its last answer a good one?
    pub(super) fn is_proven(&self, peer: PeerId) -> bool {
        self.engine()
            .sources
            .stats_of(peer)
            .is_some_and(|stats| stats.is_proven)
    }

    /// A good piece of no use: another source had brought it.
    pub(super) fn waste(&self, peer: PeerId, bytes: u64) {
        metrics::PIECES_WASTED.one();
        metrics::BYTES_WASTED.add(bytes);
        self.note_of(peer, |stats| stats.wasted += bytes);
    }

    pub(super) fn in_company(&self) -> bool {
        self.in_company.load(Ordering::Relaxed)
    }

    /// A written piece counts, and is offered; false if it counted before or is of no use. `from`: the source, if it came
    /// over the network.
    pub(super) fn counts(
        &self,
        (key, from): (SourceKey, Option<PeerId>),
        (at, file): (Position, &Arc<OpenFile>),
        piece: PieceIndex,
    ) -> bool {
        let now = Instant::now();
        let len = u64::from(file.storage.manifest().layout().len_of(piece));
        let (is_new, is_done, is_tail, is_whole) = {
            let mut engine = self.engine();
            let is_it = |engine: &Engine<_>| {
                let open = engine.contents.opened(at);
                open.is_some_and(|open| Arc::ptr_eq(&open.handle, file))
            };
            if !is_it(&engine) {
                return false;
            }
            let is_new = engine.landed(key, (at, piece), now) == Received::New;
            if let Some(peer) = from {
                engine.sources.brought(peer, now);
                if is_new {
                    engine.sources.note(peer, |stats| stats.bytes += len);
                    self.fetched.fetch_add(len, Ordering::Relaxed);
                }
            } else if is_new {
                self.resumed.fetch_add(len, Ordering::Relaxed);
            }
            let left = engine.contents.opened(at).map_or(0, |open| open.left);
            let picker = &engine.picker;
            (is_new, picker.is_done(), picker.is_tail(), left == 0)
        };
        // Everybody looks again once when the tail begins, because then sources race, and at the end.
        if self.is_tail.swap(is_tail, Ordering::Relaxed) != is_tail || is_done {
            self.changed.notify_waiters();
        }
        if is_new {
            if let Some(partial) = &file.partial {
                partial.add_piece(piece);
            }
            if is_whole {
                self.news.notify_one();
            }
        }
        is_new
    }

    /// Bytes that were fetched, and those that were found here, since the last call.
    pub fn take_counts(&self) -> (u64, u64) {
        (
            self.fetched.swap(0, Ordering::Relaxed),
            self.resumed.swap(0, Ordering::Relaxed),
        )
    }

    /// Something a person may want to know. Never waits: what nobody reads in time is let go.
    pub fn note(&self, peer: Option<PeerId>, text: String) {
        let mut notes = lock(&self.notes);
        if notes.len() == MAX_NOTES {
            notes.pop_front();
        }
        notes.push_back((peer, text));
        drop(notes);
        self.news.notify_one();
    }

    /// What was noted since the last call.
    pub fn take_notes(&self) -> VecDeque<(Option<PeerId>, String)> {
        std::mem::take(&mut lock(&self.notes))
    }

    /// Nothing can go on, for this reason; the first one counts.
    pub fn fail(&self, why: anyhow::Error) {
        lock(&self.failure).get_or_insert(why);
        self.news.notify_one();
    }

    /// Why nothing can go on, if that is so.
    pub fn take_failure(&self) -> Option<anyhow::Error> {
        lock(&self.failure).take()
    }
}

pub(super) fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().expect("no panic while the lock is held")
}
