//! What the tracker remembers about who is here and who holds what: the contract that every store keeps.
//!
//! It is soft state: lose it and the peers tell it again within a lease. Stores are dumb: parsing, permission, page tokens
//! and intervals are decided by the service; a store keeps, finds and forgets. The rules, tested by `conformance.rs`:
//!
//! - **Order.** Rows are ordered by [`FileKey`]. A row that exists from the first page to the last is listed exactly once,
//!   whatever else comes and goes.
//! - **All at once.** A full registration takes the place of the old one in one step, a delta is applied in one step, and
//!   one that is refused or abandoned changes nothing. If two full ones race, the one that ends last wins.
//! - **Incarnations.** Only the generation that is held counts: a delta on another one and the goodbye of another one change
//!   nothing, a heartbeat of another one is told so.
//! - **Leases** run on the tracker's own monotonic time (`now`), and only while it runs: when no call brought the time for
//!   [`PAUSE`], the whole gap counts against nobody. So [`Store::sweep`] must be called every [`SWEEP_INTERVAL`].
//! - **Sources** of a row are all holders of its content under whatever name. One whose every name for it is partial is
//!   partial.
//! - **Size.** The content id fixes the size, so peers that announce different sizes for one content cannot all be honest,
//!   and a store cannot tell who is. The first size stays as long as anybody holds the content; all who announce the content
//!   stay its sources. It is what the listing shows and filters by; a downloader believes only the manifest.
//! - **Bounds.** One peer: [`MAX_FILES`] and [`MAX_NAME_BYTES`]. All together, registrations that are still arriving
//!   included: a [`Budget`]. A page: its rows stay below about [`MAX_PAGE_BYTES`] on the wire.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use thiserror::Error;
use tokio::sync::broadcast;

use crate::{
    catalog::{
        Announcement, Change, FileInfo, FileKey, Matcher, Page, PeerRecord, Row, SourceInfo,
    },
    content::ContentId,
    identity::PeerId,
};

#[cfg(test)]
mod conformance;
mod index;
mod memory;

use index::RowSources;
pub use memory::MemoryStore;

/// Most files one peer may announce.
pub const MAX_FILES: usize = 1_000_000;
/// Most bytes that the names of one peer's files may have together.
pub const MAX_NAME_BYTES: usize = 256 << 20;
/// Most changes of a delta; a larger one is answered with [`Registered::Stale`], for a full library is cheaper then.
pub const MAX_DELTA: usize = 8_192;
/// Most rows that [`Store::rows_of`] gives for one content.
pub const MAX_NAMES_PER_CONTENT: usize = 64;
/// Where a page ends although more rows were asked for, in bytes on the wire: what a stream's window holds, and well below
/// what gRPC libraries take as a message.
pub const MAX_PAGE_BYTES: usize = 768 << 10;
/// How often [`Store::sweep`] is to be called.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// A silence this long between two calls means that the tracker itself did not run.
pub const PAUSE: Duration = Duration::from_secs(5);
/// Default [`Budget`] in bytes.
pub const DEFAULT_BUDGET: u64 = 2 << 30;

/// What a staged file takes beside its name: an entry of the map and the name's own allocation.
const STAGED_BYTES: u64 = 160;

/// Why a store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// A bound is reached; nothing was changed.
    #[error("{what} is used up")]
    Exhausted {
        /// Which one, in words for the caller.
        what: &'static str,
    },
    /// The store cannot be reached.
    #[error("the tracker's store is not available: {reason}")]
    Unavailable {
        /// In words for the operator.
        reason: String,
    },
}

/// What became of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// The library is what the peer says, and its lease is new.
    Accepted,
    /// The base of the delta is not held (any more), or the delta is too long: send the full library.
    Stale,
}

/// What a heartbeat met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heartbeat {
    /// This generation is held, the lease is new.
    Renewed,
    /// Another generation is held; the lease is new.
    Stale,
    /// Nothing is held.
    Unknown,
}

/// Totals, for operators. Forgotten entries count until they are cleared away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Peers that are here.
    pub n_peers: usize,
    /// Rows of the listing.
    pub n_rows: usize,
    /// Different contents.
    pub n_contents: usize,
    /// Bytes of the budget in use, an estimate.
    pub used_bytes: u64,
    /// The budget.
    pub budget_bytes: u64,
}

/// A row as an overview needs it: how many hold its content, but not who.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surveyed {
    /// Which row.
    pub key: FileKey,
    /// Bytes, as announced.
    pub size: u64,
    /// Peers that hold the whole content, under whatever name.
    pub n_complete: u32,
    /// Peers that hold some of it.
    pub n_partial: u32,
}

/// Keeps the soft state. Safe to call from many tasks; a call that is dropped half-way leaves the store sound.
#[tonic::async_trait]
pub trait Store: Send + Sync {
    /// Takes over a full library or a delta, and renews the lease.
    async fn register(
        &self,
        registration: Registration,
        now: Instant,
    ) -> Result<Registered, StoreError>;

    /// Renews the lease of a peer.
    async fn heartbeat(
        &self,
        peer: PeerId,
        generation: u64,
        now: Instant,
    ) -> Result<Heartbeat, StoreError>;

    /// Forgets a peer that says goodbye, unless it is here with another generation. True if it was here.
    async fn leave(&self, peer: PeerId, generation: u64) -> Result<bool, StoreError>;

    /// Forgets a peer whatever it holds, and ends a registration of it that is under way. True if it was here.
    async fn evict(&self, peer: PeerId) -> Result<bool, StoreError>;

    /// At most `limit` rows after a key, perhaps fewer; the last page is the one without `next`.
    async fn list(
        &self,
        matcher: &Matcher,
        after: Option<&FileKey>,
        limit: usize,
        caller_is_loopback: bool,
    ) -> Result<Page, StoreError>;

    /// The rows of these contents, at most [`MAX_NAMES_PER_CONTENT`] for each.
    async fn rows_of(
        &self,
        contents: &[ContentId],
        caller_is_loopback: bool,
    ) -> Result<Vec<Row>, StoreError>;

    /// Those of these rows that exist.
    async fn rows_at(
        &self,
        keys: &[FileKey],
        caller_is_loopback: bool,
    ) -> Result<Vec<Row>, StoreError>;

    /// The ids of everybody who is here.
    async fn ids(&self) -> Result<Vec<PeerId>, StoreError>;

    /// Everybody who is here, with what it announced.
    async fn peers(&self) -> Result<Vec<PeerRecord>, StoreError>;

    /// Every row with the number of its holders, in order. What changes meanwhile is told as before or as after.
    async fn survey(&self) -> Result<Vec<Surveyed>, StoreError>;

    /// Forgets peers whose lease is over, in slices that let other calls through, and says whom.
    async fn sweep(&self, now: Instant) -> Result<Vec<PeerId>, StoreError>;

    /// Totals.
    async fn stats(&self) -> Result<Stats, StoreError>;

    /// Changes from now on. A receiver that lags has lost some and lists again, as after [`Change::Resync`]. A change of
    /// sources is told for the row announced and for some other names of its content, not for every one of thousands.
    fn watch(&self) -> broadcast::Receiver<Change>;

    /// The bound that registrations on their way to this store share with it.
    fn budget(&self) -> Arc<Budget>;
}

/// A total of bytes that several owners share.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU64::new(0),
        })
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The budget in bytes.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes bytes if they are there. To be given back with [`give`](Self::give).
    fn take(&self, bytes: u64) -> Result<(), StoreError> {
        let fits = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.limit);
        match self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
        {
            Ok(_) => Ok(()),
            Err(_) => Err(StoreError::Exhausted {
                what: "the tracker's memory budget",
            }),
        }
    }

    /// Counts bytes that something larger was taken for before.
    fn charge(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What is announced of one file beside its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    size: u64,
    partial: bool,
}

/// A full library or a delta, collected message by message and bounded from the first. Dropping it changes nothing.
#[derive(Debug)]
pub struct Registration {
    announcement: Announcement,
    base: Option<u64>,
    /// The last word on each key; `None` removes it.
    changes: BTreeMap<FileKey, Option<Held>>,
    name_bytes: usize,
    budget: Arc<Budget>,
}

impl Registration {
    /// Begins a full library, or a delta on the generation `base`. The budget is the store's own.
    pub fn new(announcement: Announcement, base: Option<u64>, budget: Arc<Budget>) -> Self {
        Self {
            announcement,
            base,
            changes: BTreeMap::new(),
            name_bytes: 0,
            budget,
        }
    }

    /// Adds a file, or announces it anew.
    pub fn add(&mut self, file: FileInfo) -> Result<(), StoreError> {
        let held = Held {
            size: file.size,
            partial: file.partial,
        };
        self.set(
            FileKey {
                name: file.name,
                content_id: file.content_id,
            },
            Some(held),
        )
    }

    /// Takes a file out, also one that was added before.
    pub fn remove(&mut self, key: FileKey) -> Result<(), StoreError> {
        if self.base.is_some() {
            return self.set(key, None);
        }
        if self.changes.remove(&key).is_some() {
            self.forget(&key);
        }
        Ok(())
    }

    fn set(&mut self, key: FileKey, held: Option<Held>) -> Result<(), StoreError> {
        if let Some(change) = self.changes.get_mut(&key) {
            *change = held;
            return Ok(());
        }
        let name_len = key.name.as_str().len();
        check_bounds(self.changes.len() + 1, self.name_bytes + name_len)?;
        self.budget.take(staged_bytes(&key))?;
        self.name_bytes += name_len;
        self.changes.insert(key, held);
        Ok(())
    }

    /// The smallest key that is left, with its change.
    fn pop(&mut self) -> Option<(FileKey, Option<Held>)> {
        let (key, held) = self.changes.pop_first()?;
        self.forget(&key);
        Some((key, held))
    }

    fn forget(&mut self, key: &FileKey) {
        self.name_bytes -= key.name.as_str().len();
        self.budget.give(staged_bytes(key));
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.budget
            .give(self.changes.keys().map(staged_bytes).sum());
    }
}

fn staged_bytes(key: &FileKey) -> u64 {
    STAGED_BYTES + key.name.as_str().len() as u64
}

/// Whether one peer may have so many files with so many bytes of names.
fn check_bounds(n_files: usize, name_bytes: usize) -> Result<(), StoreError> {
    if n_files > MAX_FILES {
        return Err(StoreError::Exhausted {
            what: "the limit of 1,000,000 files for one peer",
        });
    }
    if name_bytes > MAX_NAME_BYTES {
        return Err(StoreError::Exhausted {
            what: "the limit of 256 MiB of names for one peer",
        });
    }
    Ok(())
}

/// A page that fills up.
struct PageInMaking {
    page: Page,
    sources: RowSources,
    n_rows_left: usize,
    bytes_left: usize,
}

impl PageInMaking {
    fn new(limit: usize, caller_is_loopback: bool) -> Self {
        let (n_rows_left, bytes_left) = (limit.max(1), MAX_PAGE_BYTES);
        Self {
            page: Page::default(),
            sources: RowSources::new(caller_is_loopback),
            n_rows_left,
            bytes_left,
        }
    }

    /// False if there is no room for the row; the page then says where to go on. The first row always has room.
    fn push(&mut self, row: Row) -> bool {
        let bytes = 128
            + row.name.as_str().len()
            + row
                .sources
                .iter()
                .map(|source| source_bytes(source))
                .sum::<usize>();
        if let Some(last) = self.page.rows.last()
            && (self.n_rows_left == 0 || self.bytes_left < bytes)
        {
            self.page.next = Some(last.key());
            return false;
        }
        self.n_rows_left -= 1;
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
        self.page.rows.push(row);
        true
    }
}

/// About what a source takes on the wire.
fn source_bytes(source: &SourceInfo) -> usize {
    64 + source
        .addresses
        .iter()
        .map(|address| address.len() + 4)
        .sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_is_bounded() {
        assert_eq!(check_bounds(MAX_FILES, MAX_NAME_BYTES), Ok(()));
        assert!(
            check_bounds(MAX_FILES + 1, 0).is_err() && check_bounds(0, MAX_NAME_BYTES + 1).is_err()
        );
    }
}
