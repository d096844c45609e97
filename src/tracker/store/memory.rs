//! The store of a single tracker: everything in this process, under one lock.
//!
//! The lock is held for one slice of work at most ([`SLICE`] entries, [`MAX_DELTA`] for a delta), never across an await; the
//! data behind it is `index.rs`. Work that a dropped call leaves behind is done by the next [`Store::sweep`].

use std::{
    collections::BTreeMap,
    iter,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::broadcast, task::yield_now};

use super::{
    Budget, Heartbeat, Held, MAX_DELTA, PAUSE, PageInMaking, Registered, Registration, Stats,
    Store, StoreError, Surveyed, check_bounds,
    index::{Phase, RowSources, SLICE, Slot, SlotIdx, StoreIndex, file_bytes, slot_bytes},
};
use crate::{
    catalog::{Announcement, Change, FileKey, Matcher, Page, PeerRecord, Row},
    content::ContentId,
    identity::PeerId,
};

/// Changes a watcher may fall behind.
const WATCH_CAPACITY: usize = 16_384;
/// More changes than this at once are told as [`Change::Resync`].
const MAX_TOLD: usize = 8_192;
/// Other names of a content that are told of a change of its sources.
const MAX_OTHER_NAMES: usize = 8;

/// Soft state in memory.
pub struct MemoryStore {
    lease: Duration,
    budget: Arc<Budget>,
    changes: broadcast::Sender<Change>,
    state: Mutex<State>,
}

struct State {
    index: StoreIndex,
    clock: Clock,
}

/// How long the tracker ran: time in which nobody asked for the time does not count.
#[derive(Default)]
struct Clock {
    last: Option<Instant>,
    ran: Duration,
}

impl Clock {
    fn tick(&mut self, now: Instant) -> Duration {
        let gap = self
            .last
            .map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        if gap < PAUSE {
            self.ran += gap;
        }
        self.last = self.last.max(Some(now));
        self.ran
    }
}

impl MemoryStore {
    /// An empty store whose leases last this long.
    pub fn new(lease: Duration, budget: Arc<Budget>) -> Self {
        let state = State {
            index: StoreIndex::new(budget.clone()),
            clock: Clock::default(),
        };
        Self {
            lease,
            budget,
            changes: broadcast::Sender::new(WATCH_CAPACITY),
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn replace(
        &self,
        mut registration: Registration,
        now: Instant,
    ) -> Result<Registered, StoreError> {
        let library = Building::open(self, registration.announcement.clone())?;
        loop {
            let batch: Vec<_> = iter::from_fn(|| registration.pop()).take(SLICE).collect();
            if batch.is_empty() {
                return Ok(library.publish(now));
            }
            let most = batch.iter().map(|(key, _)| file_bytes(key)).sum();
            self.budget.take(most)?;
            library.fill(batch);
            self.budget.give(most);
            yield_now().await;
        }
    }

    fn amend(
        &self,
        mut delta: Registration,
        base: u64,
        now: Instant,
    ) -> Result<Registered, StoreError> {
        let mut guard = self.lock();
        let State { index, clock } = &mut *guard;
        let idx = index.peers.get(&delta.announcement.peer).copied();
        let Some(idx) = idx.filter(|idx| index.slot(*idx).announcement.generation == base) else {
            return Ok(Registered::Stale);
        };
        if delta.changes.len() > MAX_DELTA {
            return Ok(Registered::Stale);
        }
        let slot = index.slot(idx);
        check_delta(&slot.files, slot.name_bytes, &delta)?;
        let added = delta.changes.iter().filter(|(_, held)| held.is_some());
        let most = added.map(|(key, _)| file_bytes(key)).sum();
        self.budget.take(most)?;
        let mut told: Vec<FileKey> = delta.changes.keys().cloned().collect();
        while let Some((key, held)) = delta.pop() {
            index.unlink(idx, &key);
            if let Some(held) = held {
                index.link(idx, key, held);
            }
        }
        self.budget.give(most);
        let slot = index.slot_mut(idx);
        slot.deadline = clock.tick(now) + self.lease;
        if slot.announcement.addresses != delta.announcement.addresses {
            told.extend(slot.files.keys().take(MAX_TOLD + 1).cloned());
        }
        slot.announcement = delta.announcement.clone();
        self.tell(index, &told);
        Ok(Registered::Accepted)
    }

    /// Forgets a library, live or pending; gives the number of its files.
    fn retire(&self, index: &mut StoreIndex, idx: SlotIdx) -> usize {
        let was_live = index.slot(idx).phase == Phase::Live;
        index.retire(idx);
        if was_live {
            self.tell_difference(index, Some(idx), None);
        }
        index.slot(idx).files.len()
    }

    /// Forgets the peers in the slots from `from` on whose lease is over, until that is enough for holding the lock once;
    /// gives the slot to go on with.
    fn expire_some(&self, from: SlotIdx, now: Instant, gone: &mut Vec<PeerId>) -> Option<SlotIdx> {
        let mut guard = self.lock();
        let State { index, clock } = &mut *guard;
        let ran = clock.tick(now);
        let mut n_files = 0;
        for (n, idx) in index.slot_indexes().skip(from as usize).enumerate() {
            if n >= SLICE || n_files > MAX_TOLD {
                return Some(idx);
            }
            let slot = index.slot(idx);
            if slot.phase == Phase::Live && slot.deadline <= ran {
                gone.push(slot.announcement.peer);
                n_files += self.retire(index, idx);
            }
        }
        None
    }

    /// Tells watchers what differs between two libraries of a peer.
    fn tell_difference(&self, index: &StoreIndex, old: Option<SlotIdx>, new: Option<SlotIdx>) {
        if self.changes.receiver_count() == 0 {
            return;
        }
        let [old, new] = [old, new].map(|idx| idx.map(|idx| index.slot(idx)));
        let none = BTreeMap::new();
        let [before, after] = [old, new].map(|slot| slot.map_or(&none, |slot| &slot.files));
        if before.len() + after.len() > MAX_TOLD {
            let _ = self.changes.send(Change::Resync);
            return;
        }
        let moved = old
            .zip(new)
            .is_some_and(|(old, new)| old.announcement.addresses != new.announcement.addresses);
        let changed = after
            .iter()
            .filter(|(key, partial)| moved || before.get(*key) != Some(*partial));
        let gone = before.keys().filter(|key| !after.contains_key(*key));
        let told: Vec<FileKey> = changed.map(|(key, _)| key).chain(gone).cloned().collect();
        self.tell(index, &told);
    }

    fn tell(&self, index: &StoreIndex, keys: &[FileKey]) {
        if self.changes.receiver_count() == 0 {
            return;
        }
        if keys.len() > MAX_TOLD {
            let _ = self.changes.send(Change::Resync);
            return;
        }
        for key in keys {
            let own = if index.has_row(key) {
                Change::Changed
            } else {
                Change::Removed
            };
            let others = index
                .names_of(key.content_id)
                .filter(|other| other != key)
                .take(MAX_OTHER_NAMES);
            for change in iter::once(own(key.clone())).chain(others.map(Change::Changed)) {
                // fails only if the last watcher has just gone
                let _ = self.changes.send(change);
            }
        }
    }

    async fn clear(&self) {
        while self.lock().index.clear_some() {
            yield_now().await;
        }
    }
}

/// Whether the peer stays within its bounds.
fn check_delta(
    files: &BTreeMap<FileKey, bool>,
    name_bytes: usize,
    delta: &Registration,
) -> Result<(), StoreError> {
    let (mut n_files, mut name_bytes) = (files.len(), name_bytes);
    for (key, held) in &delta.changes {
        let name_len = key.name.as_str().len();
        match (files.contains_key(key), held.is_some()) {
            (false, true) => (n_files, name_bytes) = (n_files + 1, name_bytes + name_len),
            (true, false) => (n_files, name_bytes) = (n_files - 1, name_bytes - name_len),
            _ => {}
        }
    }
    check_bounds(n_files, name_bytes)
}

/// A library that is being taken over; dropped before it is published, it is put away.
struct Building<'a> {
    store: &'a MemoryStore,
    slot: SlotIdx,
    serial: u64,
}

impl<'a> Building<'a> {
    fn open(store: &'a MemoryStore, announcement: Announcement) -> Result<Self, StoreError> {
        store.budget.take(slot_bytes())?;
        let (slot, serial) = store.lock().index.open(announcement);
        store.budget.give(slot_bytes());
        Ok(Self {
            store,
            slot,
            serial,
        })
    }

    /// False once the peer was evicted.
    fn is_open(&self, state: &State) -> bool {
        let slot = state.index.slot(self.slot);
        slot.serial == self.serial && slot.phase == Phase::Pending
    }

    /// Adds files; without effect once the peer was evicted.
    fn fill(&self, batch: Vec<(FileKey, Option<Held>)>) {
        let mut state = self.store.lock();
        if self.is_open(&state) {
            for (key, held) in batch {
                state.index.link(
                    self.slot,
                    key,
                    held.expect("a full library holds no removals"),
                );
            }
        }
    }

    fn publish(&self, now: Instant) -> Registered {
        let mut guard = self.store.lock();
        if !self.is_open(&guard) {
            return Registered::Stale;
        }
        let State { index, clock } = &mut *guard;
        index.slot_mut(self.slot).deadline = clock.tick(now) + self.store.lease;
        let old = index.go_live(self.slot);
        self.store.tell_difference(index, old, Some(self.slot));
        Registered::Accepted
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        let mut state = self.store.lock();
        if self.is_open(&state) {
            state.index.retire(self.slot);
        }
    }
}

#[tonic::async_trait]
impl Store for MemoryStore {
    async fn register(
        &self,
        registration: Registration,
        now: Instant,
    ) -> Result<Registered, StoreError> {
        let outcome = match registration.base {
            Some(base) => self.amend(registration, base, now),
            None => self.replace(registration, now).await,
        };
        self.clear().await;
        outcome
    }

    async fn heartbeat(
        &self,
        peer: PeerId,
        generation: u64,
        now: Instant,
    ) -> Result<Heartbeat, StoreError> {
        let mut guard = self.lock();
        let State { index, clock } = &mut *guard;
        let deadline = clock.tick(now) + self.lease;
        let Some(idx) = index.peers.get(&peer).copied() else {
            return Ok(Heartbeat::Unknown);
        };
        let slot = index.slot_mut(idx);
        slot.deadline = deadline;
        Ok(if slot.announcement.generation == generation {
            Heartbeat::Renewed
        } else {
            Heartbeat::Stale
        })
    }

    async fn leave(&self, peer: PeerId, generation: u64) -> Result<bool, StoreError> {
        {
            let index = &mut self.lock().index;
            let idx = index.peers.get(&peer).copied();
            let Some(idx) =
                idx.filter(|idx| index.slot(*idx).announcement.generation == generation)
            else {
                return Ok(false);
            };
            self.retire(index, idx);
        }
        self.clear().await;
        Ok(true)
    }

    async fn evict(&self, peer: PeerId) -> Result<bool, StoreError> {
        let was_here = {
            let index = &mut self.lock().index;
            let of_peer = |idx: &SlotIdx| {
                let slot = index.slot(*idx);
                slot.announcement.peer == peer && matches!(slot.phase, Phase::Pending | Phase::Live)
            };
            let slots: Vec<SlotIdx> = index.slot_indexes().filter(of_peer).collect();
            let was_here = index.peers.contains_key(&peer);
            for idx in slots {
                self.retire(index, idx);
            }
            was_here
        };
        self.clear().await;
        Ok(was_here)
    }

    async fn list(
        &self,
        matcher: &Matcher,
        after: Option<&FileKey>,
        limit: usize,
        caller_is_loopback: bool,
    ) -> Result<Page, StoreError> {
        let mut page = PageInMaking::new(limit, caller_is_loopback);
        let mut cursor = after.cloned();
        while !self.lock().index.scan(matcher, &mut cursor, &mut page) {
            yield_now().await;
        }
        Ok(page.page)
    }

    async fn rows_of(
        &self,
        contents: &[ContentId],
        caller_is_loopback: bool,
    ) -> Result<Vec<Row>, StoreError> {
        let (mut rows, mut sources) = (Vec::new(), RowSources::new(caller_is_loopback));
        for id in contents {
            {
                let index = &self.lock().index;
                rows.extend(
                    index
                        .names_of(*id)
                        .filter_map(|key| index.row(&key, &mut sources)),
                );
            }
            yield_now().await;
        }
        Ok(rows)
    }

    async fn rows_at(
        &self,
        keys: &[FileKey],
        caller_is_loopback: bool,
    ) -> Result<Vec<Row>, StoreError> {
        let (mut rows, mut sources) = (Vec::new(), RowSources::new(caller_is_loopback));
        for keys in keys.chunks(64) {
            {
                let index = &self.lock().index;
                rows.extend(keys.iter().filter_map(|key| index.row(key, &mut sources)));
            }
            yield_now().await;
        }
        Ok(rows)
    }

    async fn ids(&self) -> Result<Vec<PeerId>, StoreError> {
        Ok(self.lock().index.peers.keys().copied().collect())
    }

    async fn peers(&self) -> Result<Vec<PeerRecord>, StoreError> {
        let index = &self.lock().index;
        let slots = index.peers.values().map(|idx| index.slot(*idx));
        let record = |slot: &Slot| PeerRecord {
            announcement: slot.announcement.clone(),
            n_files: slot.files.len(),
        };
        Ok(slots.map(record).collect())
    }

    async fn survey(&self) -> Result<Vec<Surveyed>, StoreError> {
        let (mut surveyed, mut after) = (Vec::new(), None);
        while self.lock().index.survey(&mut surveyed, &mut after) {
            yield_now().await;
        }
        Ok(surveyed)
    }

    async fn sweep(&self, now: Instant) -> Result<Vec<PeerId>, StoreError> {
        let mut gone = Vec::new();
        let mut from = Some(0);
        while let Some(idx) = from {
            from = self.expire_some(idx, now, &mut gone);
            yield_now().await;
        }
        self.clear().await;
        Ok(gone)
    }

    async fn stats(&self) -> Result<Stats, StoreError> {
        let index = &self.lock().index;
        Ok(Stats {
            n_peers: index.peers.len(),
            n_rows: index.n_rows(),
            n_contents: index.n_contents(),
            used_bytes: self.budget.used(),
            budget_bytes: self.budget.limit(),
        })
    }

    fn watch(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    fn budget(&self) -> Arc<Budget> {
        self.budget.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::conformance, *};

    async fn open(budget: Arc<Budget>) -> Arc<dyn Store> {
        Arc::new(MemoryStore::new(conformance::LEASE, budget))
    }

    #[tokio::test]
    async fn conforms() {
        conformance::suite(open).await;
    }

    #[tokio::test]
    async fn keeps_leases() {
        conformance::leases(open).await;
    }
}
