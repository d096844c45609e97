//! The memory store's data: rows, contents, and the libraries they come from. No lock, no clock, no waiting.
//!
//! A library lives in a **slot**. A slot is filled while it is [`Phase::Pending`], counts once it is live, and counts no more
//! from the moment it is retired, although its entries are cleared away piecemeal later. So a library of any length comes
//! and goes in one step, and no step is long.
//!
//! Invariants: slot `s` has file `k` exactly if `s` is in `rows[k]`; `rows` and `names` have the same keys; a holder in
//! `contents` counts the slot's names for that content; a row exists for readers if one of its slots is live; each peer has
//! at most one live slot, the one in `peers`. All vectors of slots are sorted.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque, btree_map::Entry},
    iter,
    ops::{Bound, Range},
    sync::Arc,
    time::Duration,
};

use rand::seq::IteratorRandom;

use super::{Budget, Held, MAX_NAMES_PER_CONTENT, PageInMaking, source_bytes};
use crate::{
    catalog::{Announcement, ContentPrefix, FileKey, MAX_SOURCES, Matcher, Row},
    content::ContentId,
    identity::PeerId,
    safe_path::SafeName,
};

mod sources;
mod survey;

pub(super) use sources::RowSources;

/// Entries worked on while the lock is held once.
pub(super) const SLICE: usize = 2048;
/// More contents than this with one prefix are found by looking at every row.
const MAX_CONTENTS_OF_PREFIX: usize = 64;
/// Where a row's list of sources ends although there are more, in bytes on the wire.
const MAX_ROW_BYTES: usize = 64 << 10;

/// What an entry takes, measured as resident memory over a million of them: a row beside its name, a content, and a file of
/// a library (its entry there, and as a holder of row and content).
const ROW_BYTES: u64 = 272;
const CONTENT_BYTES: u64 = 160;
const FILE_BYTES: u64 = 128;
const SLOT_BYTES: u64 = 1024;

pub(super) type SlotIdx = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Free,
    Pending,
    Live,
    Retired,
}

#[derive(Debug)]
pub(super) struct Slot {
    /// Tells this use of the slot from earlier and later ones.
    pub(super) serial: u64,
    pub(super) phase: Phase,
    pub(super) announcement: Announcement,
    /// On the store's clock.
    pub(super) deadline: Duration,
    /// Whether each is partial.
    pub(super) files: BTreeMap<FileKey, bool>,
    pub(super) name_bytes: usize,
}

#[derive(Debug)]
struct Content {
    size: u64,
    holders: Vec<Holder>,
}

#[derive(Debug)]
struct Holder {
    slot: SlotIdx,
    n_names: u32,
    n_complete: u32,
}

#[derive(Debug)]
pub(super) struct StoreIndex {
    budget: Arc<Budget>,
    rows: BTreeMap<FileKey, Vec<SlotIdx>>,
    contents: BTreeMap<ContentId, Content>,
    /// The keys of `rows` by content; `None` stands before every name and is never stored.
    names: BTreeSet<(ContentId, Option<SafeName>)>,
    pub(super) slots: Vec<Slot>,
    free: Vec<SlotIdx>,
    pub(super) peers: HashMap<PeerId, SlotIdx>,
    retired: VecDeque<SlotIdx>,
    serial: u64,
}

impl StoreIndex {
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            rows: BTreeMap::new(),
            contents: BTreeMap::new(),
            names: BTreeSet::new(),
            slots: Vec::new(),
            free: Vec::new(),
            peers: HashMap::new(),
            retired: VecDeque::new(),
            serial: 0,
        }
    }

    /// A pending slot and its serial. The caller has room for [`slot_bytes`].
    pub(super) fn open(&mut self, announcement: Announcement) -> (SlotIdx, u64) {
        self.serial += 1;
        self.budget.charge(slot_bytes());
        let slot = Slot {
            serial: self.serial,
            phase: Phase::Pending,
            announcement,
            deadline: Duration::ZERO,
            files: BTreeMap::new(),
            name_bytes: 0,
        };
        let idx = match self.free.pop() {
            Some(idx) => {
                self.slots[idx as usize] = slot;
                idx
            }
            None => {
                self.slots.push(slot);
                SlotIdx::try_from(self.slots.len() - 1).expect("the budget is used up long before")
            }
        };
        (idx, self.serial)
    }

    pub(super) fn slot(&self, idx: SlotIdx) -> &Slot {
        &self.slots[idx as usize]
    }

    pub(super) fn slot_mut(&mut self, idx: SlotIdx) -> &mut Slot {
        &mut self.slots[idx as usize]
    }

    pub(super) fn slot_indexes(&self) -> Range<SlotIdx> {
        0..SlotIdx::try_from(self.slots.len()).expect("open() keeps the slots countable")
    }

    fn is_live(&self, idx: SlotIdx) -> bool {
        self.slot(idx).phase == Phase::Live
    }

    /// Makes a pending slot the peer's library; gives the one it replaces, which is retired.
    pub(super) fn go_live(&mut self, idx: SlotIdx) -> Option<SlotIdx> {
        self.slot_mut(idx).phase = Phase::Live;
        let old = self.peers.insert(self.slot(idx).announcement.peer, idx);
        if let Some(old) = old {
            self.put_away(old);
        }
        old
    }

    /// Ends a slot: its files count no more.
    pub(super) fn retire(&mut self, idx: SlotIdx) {
        let peer = self.slot(idx).announcement.peer;
        if self.peers.get(&peer) == Some(&idx) {
            self.peers.remove(&peer);
        }
        self.put_away(idx);
    }

    fn put_away(&mut self, idx: SlotIdx) {
        self.slot_mut(idx).phase = Phase::Retired;
        self.retired.push_back(idx);
    }

    /// Clears away at most [`SLICE`] files of retired slots; false if there were none.
    pub(super) fn clear_some(&mut self) -> bool {
        let Some(&idx) = self.retired.front() else {
            return false;
        };
        for _ in 0..SLICE {
            let Some((key, partial)) = self.slot_mut(idx).files.pop_first() else {
                self.retired.pop_front();
                self.slot_mut(idx).phase = Phase::Free;
                self.free.push(idx);
                self.budget.give(slot_bytes());
                return true;
            };
            self.disconnect(idx, &key, partial);
        }
        true
    }

    /// Adds a file that the slot does not have. The caller has room for [`file_bytes`].
    pub(super) fn link(&mut self, idx: SlotIdx, key: FileKey, held: Held) {
        let mut bytes = FILE_BYTES;
        let key = match self.rows.entry(key) {
            Entry::Occupied(mut row) => {
                let at = row.get().partition_point(|slot| *slot < idx);
                row.get_mut().insert(at, idx);
                row.key().clone()
            }
            Entry::Vacant(row) => {
                let key = row.key().clone();
                row.insert(vec![idx]);
                self.names.insert((key.content_id, Some(key.name.clone())));
                bytes += row_bytes(&key);
                key
            }
        };
        let content = self.contents.entry(key.content_id).or_insert_with(|| {
            bytes += CONTENT_BYTES;
            Content {
                size: held.size,
                holders: Vec::new(),
            }
        });
        let at = content
            .holders
            .binary_search_by_key(&idx, |holder| holder.slot)
            .unwrap_or_else(|at| {
                content.holders.insert(
                    at,
                    Holder {
                        slot: idx,
                        n_names: 0,
                        n_complete: 0,
                    },
                );
                at
            });
        content.holders[at].n_names += 1;
        content.holders[at].n_complete += u32::from(!held.partial);
        self.budget.charge(bytes);
        let slot = self.slot_mut(idx);
        slot.name_bytes += key.name.as_str().len();
        slot.files.insert(key, held.partial);
    }

    /// Takes a file out, if the slot has it.
    pub(super) fn unlink(&mut self, idx: SlotIdx, key: &FileKey) {
        let slot = self.slot_mut(idx);
        if let Some(partial) = slot.files.remove(key) {
            slot.name_bytes -= key.name.as_str().len();
            self.disconnect(idx, key, partial);
        }
    }

    /// Takes the slot out of the row and the content of a file that is no longer in its library.
    fn disconnect(&mut self, idx: SlotIdx, key: &FileKey, partial: bool) {
        let mut bytes = FILE_BYTES;
        if let Some(row) = self.rows.get_mut(key) {
            row.retain(|slot| *slot != idx);
            if row.is_empty() {
                self.rows.remove(key);
                self.names.remove(&(key.content_id, Some(key.name.clone())));
                bytes += row_bytes(key);
            }
        }
        if let Some(content) = self.contents.get_mut(&key.content_id)
            && let Ok(at) = content
                .holders
                .binary_search_by_key(&idx, |holder| holder.slot)
        {
            content.holders[at].n_names -= 1;
            content.holders[at].n_complete -= u32::from(!partial);
            if content.holders[at].n_names == 0 {
                content.holders.remove(at);
            }
            if content.holders.is_empty() {
                self.contents.remove(&key.content_id);
                bytes += CONTENT_BYTES;
            }
        }
        self.budget.give(bytes);
    }

    /// Whether a row exists for readers.
    pub(super) fn has_row(&self, key: &FileKey) -> bool {
        self.rows
            .get(key)
            .is_some_and(|row| row.iter().any(|slot| self.is_live(*slot)))
    }

    /// A row as a reader sees it.
    pub(super) fn row(&self, key: &FileKey, sources: &mut RowSources) -> Option<Row> {
        self.row_of(key, self.contents.get(&key.content_id)?, sources)
    }

    fn row_of(&self, key: &FileKey, content: &Content, sources: &mut RowSources) -> Option<Row> {
        if !self.has_row(key) {
            return None;
        }
        let live = || {
            content
                .holders
                .iter()
                .filter(|holder| self.is_live(holder.slot))
        };
        let n_live = live().count();
        let source_count = u32::try_from(n_live).expect("slots are counted in 32 bits");
        let mut room = MAX_ROW_BYTES;
        let mut source = |holder: &Holder| {
            let source = sources.of(self.slot(holder.slot), holder.n_complete == 0);
            room = room.checked_sub(source_bytes(&source))?;
            Some(source)
        };
        let sources = match n_live > MAX_SOURCES {
            true => live()
                .sample(&mut rand::rng(), MAX_SOURCES)
                .into_iter()
                .map_while(source)
                .collect(),
            false => live().map_while(&mut source).collect(),
        };
        Some(Row {
            name: key.name.clone(),
            size: content.size,
            content_id: key.content_id,
            sources,
            source_count,
        })
    }

    /// The keys of a content that readers see, in order.
    pub(super) fn names_of(&self, id: ContentId) -> impl Iterator<Item = FileKey> + '_ {
        self.keys_from(id, None)
            .filter(|key| self.has_row(key))
            .take(MAX_NAMES_PER_CONTENT)
    }

    /// Goes through at most [`SLICE`] rows after the cursor and moves it; true once the page is full or the rows are at
    /// their end.
    pub(super) fn scan(
        &self,
        matcher: &Matcher,
        cursor: &mut Option<FileKey>,
        page: &mut PageInMaking,
    ) -> bool {
        for (n, key) in self.candidates(matcher, cursor.as_ref()).enumerate() {
            if matcher.is_past(&key.name) {
                return true;
            }
            if n == SLICE {
                return false;
            }
            if let Some(content) = self.contents.get(&key.content_id)
                && self.is_wanted(matcher, &key, content)
                && let Some(row) = self.row_of(&key, content, &mut page.sources)
                && !page.push(row)
            {
                return true;
            }
            *cursor = Some(key);
        }
        true
    }

    fn is_wanted(&self, matcher: &Matcher, key: &FileKey, content: &Content) -> bool {
        matcher.matches_key(key)
            && matcher.matches_size(content.size)
            && matcher.peer().is_none_or(|peer| {
                self.peers
                    .get(&peer)
                    .is_some_and(|slot| self.slot(*slot).files.contains_key(key))
            })
    }

    /// Rows that may match, in order, from the shortest list that has them all. Good for [`SLICE`] of them.
    fn candidates<'a>(
        &'a self,
        matcher: &Matcher,
        after: Option<&FileKey>,
    ) -> Box<dyn Iterator<Item = FileKey> + 'a> {
        if let Some(prefix) = matcher.content()
            && let Some(keys) = self.keys_with(prefix, after)
        {
            return Box::new(keys.into_iter());
        }
        let first = matcher.start().map(|name| FileKey {
            name: name.clone(),
            content_id: ContentId::from_bytes([0; 32]),
        });
        let from = match (after, first) {
            (Some(after), first) if first.as_ref().is_none_or(|first| first <= after) => {
                Bound::Excluded(after.clone())
            }
            (_, Some(first)) => Bound::Included(first),
            (_, None) => Bound::Unbounded,
        };
        let range = (from, Bound::Unbounded);
        match matcher.peer().map(|peer| self.peers.get(&peer)) {
            None => Box::new(self.rows.range(range).map(|(key, _)| key.clone())),
            Some(None) => Box::new(iter::empty()),
            Some(Some(idx)) => Box::new(
                self.slot(*idx)
                    .files
                    .range(range)
                    .map(|(key, _)| key.clone()),
            ),
        }
    }

    /// The first keys after `after` whose content has the prefix; `None` if too many contents have it.
    fn keys_with(&self, prefix: ContentPrefix, after: Option<&FileKey>) -> Option<Vec<FileKey>> {
        let (first, last) = prefix.bounds();
        let ids: Vec<ContentId> = self
            .contents
            .range(first..=last)
            .map(|(id, _)| *id)
            .take(MAX_CONTENTS_OF_PREFIX + 1)
            .collect();
        if ids.len() > MAX_CONTENTS_OF_PREFIX {
            return None;
        }
        let mut keys: Vec<FileKey> = ids
            .into_iter()
            .flat_map(|id| self.keys_from(id, after).take(SLICE + 1))
            .collect();
        keys.sort_unstable();
        Some(keys)
    }

    fn keys_from<'a>(
        &'a self,
        id: ContentId,
        after: Option<&FileKey>,
    ) -> impl Iterator<Item = FileKey> + 'a {
        let after = after.cloned();
        self.names
            .range((id, after.as_ref().map(|key| key.name.clone()))..)
            .take_while(move |(content_id, _)| *content_id == id)
            .filter_map(move |(_, name)| {
                Some(FileKey {
                    name: name.clone()?,
                    content_id: id,
                })
            })
            .filter(move |key| after.as_ref().is_none_or(|after| key > after))
    }

    pub(super) fn n_rows(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn n_contents(&self) -> usize {
        self.contents.len()
    }
}

/// What a slot takes before it has files.
pub(super) fn slot_bytes() -> u64 {
    SLOT_BYTES
}

/// What adding a file takes at most.
pub(super) fn file_bytes(key: &FileKey) -> u64 {
    FILE_BYTES + CONTENT_BYTES + row_bytes(key)
}

fn row_bytes(key: &FileKey) -> u64 {
    ROW_BYTES + key.name.as_str().len() as u64
}
