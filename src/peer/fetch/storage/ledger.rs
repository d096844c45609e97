//! What is known of each piece of a `.part`: seen good, doubtful, durable or not. No I/O.
//!
//! Invariant: a piece of `have` is either durable, or in `dirty` or `in_sync`, which a failed sync takes out again. A write
//! that was under way while a sync failed does not count, for its bytes may have been among those that were lost.

use std::time::{Duration, Instant};

use super::journal::Journal;
use crate::{have::HaveMap, peer::sharing::hasher::Stamp};

/// Bytes written after which they should be synced.
pub(super) const SYNC_BYTES: u64 = 32 << 20;
/// Bytes written that may be lost in a crash.
pub(super) const MAX_UNJOURNALED: u64 = 64 << 20;
/// How long a piece may lie before it is synced.
pub(super) const MAX_AGE: Duration = Duration::from_secs(4);

#[derive(Debug)]
pub(super) struct Ledger {
    /// Pieces seen good.
    pub(super) have: HaveMap,
    /// Pieces that may be there.
    pub(super) doubtful: HaveMap,
    /// Seen good since the last sync began, and their bytes if they were written.
    dirty: Vec<u32>,
    dirty_bytes: u64,
    /// What the running sync is for, and bytes that wait for the journal.
    in_sync: Vec<u32>,
    in_sync_bytes: u64,
    pub(super) is_syncing: bool,
    /// Writes under way.
    pub(super) n_writing: u32,
    writing_bytes: u64,
    /// When the first of `dirty` came.
    since: Option<Instant>,
    /// Syncs that failed.
    pub(super) n_failed: u64,
    /// Threads that wait for a change.
    pub(super) n_waiting: u32,
    /// The version of the file that got its name.
    pub(super) named: Option<Stamp>,
}

impl Ledger {
    pub(super) fn new(have: HaveMap, doubtful: HaveMap) -> Self {
        Self {
            have,
            doubtful,
            dirty: vec![],
            dirty_bytes: 0,
            in_sync: vec![],
            in_sync_bytes: 0,
            is_syncing: false,
            n_writing: 0,
            writing_bytes: 0,
            since: None,
            n_failed: 0,
            n_waiting: 0,
            named: None,
        }
    }

    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        !self.is_syncing && self.n_writing == 0
    }

    /// Whether so many more bytes may be written before some are journaled. One piece always may.
    pub(super) fn has_room(&self, len: u64) -> bool {
        let unjournaled = self.dirty_bytes + self.in_sync_bytes + self.writing_bytes;
        unjournaled == 0 || unjournaled + len <= MAX_UNJOURNALED
    }

    /// Whether a sync is due, by volume. The last piece leaves that to the end, which is near.
    pub(super) fn is_full(&self) -> bool {
        !self.is_syncing && self.dirty_bytes >= SYNC_BYTES && !self.have.is_complete()
    }

    /// Whether a sync is due, by age.
    pub(super) fn is_stale(&self, now: Instant) -> bool {
        !self.is_syncing
            && self
                .since
                .is_some_and(|since| now.duration_since(since) >= MAX_AGE)
    }

    pub(super) fn is_durable(&self) -> bool {
        self.dirty.is_empty() && self.in_sync.is_empty()
    }

    /// A write begins; the answer is for its end.
    pub(super) fn begin_write(&mut self, len: u64) -> u64 {
        self.n_writing += 1;
        self.writing_bytes += len;
        self.n_failed
    }

    /// A write of piece `i` ended; false if it does not count.
    pub(super) fn end_write(&mut self, i: u32, len: u64, n_failed: u64, is_written: bool) -> bool {
        self.n_writing -= 1;
        self.writing_bytes -= len;
        let counts = is_written && n_failed == self.n_failed;
        if counts {
            self.doubtful.remove(i);
            self.saw_good(i, len);
        }
        counts
    }

    /// A doubtful piece was read back.
    pub(super) fn checked(&mut self, i: u32, n_failed: u64, is_good: bool) {
        if self.doubtful.remove(i) && is_good && n_failed == self.n_failed {
            self.saw_good(i, 0);
        }
    }

    fn saw_good(&mut self, i: u32, bytes: u64) {
        if self.have.insert(i) {
            self.dirty.push(i);
            self.dirty_bytes += bytes;
            self.since.get_or_insert_with(Instant::now);
        }
    }

    pub(super) fn begin_sync(&mut self) {
        self.is_syncing = true;
        self.in_sync = std::mem::take(&mut self.dirty);
        self.in_sync_bytes = std::mem::take(&mut self.dirty_bytes);
        self.since = None;
    }

    /// The sync failed: what it was for is lost, and what came meanwhile with it.
    pub(super) fn sync_failed(&mut self) -> Vec<u32> {
        let mut lost = std::mem::take(&mut self.in_sync);
        lost.append(&mut self.dirty);
        lost.iter().for_each(|i| _ = self.have.remove(*i));
        (
            self.dirty_bytes,
            self.in_sync_bytes,
            self.since,
            self.is_syncing,
        ) = (0, 0, None, false);
        self.n_failed += 1;
        lost
    }

    /// The data is durable. What is to be journaled now.
    pub(super) fn data_synced(&mut self) -> Journal {
        self.in_sync.clear();
        let mut good = self.have.clone();
        self.dirty.iter().for_each(|i| _ = good.remove(*i));
        Journal {
            good,
            doubtful: self.doubtful.clone(),
            closed: None,
        }
    }

    /// The sync is over. What could not be journaled waits for the next one.
    pub(super) fn end_sync(&mut self, is_journaled: bool) {
        let bytes = std::mem::take(&mut self.in_sync_bytes);
        if !is_journaled {
            self.dirty_bytes += bytes;
            self.since.get_or_insert_with(Instant::now);
        }
        self.is_syncing = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ledger() -> Ledger {
        Ledger::new(HaveMap::empty(100), HaveMap::empty(100))
    }

    fn write(ledger: &mut Ledger, i: u32) {
        let n_failed = ledger.begin_write(16 * MIB);
        assert!(ledger.end_write(i, 16 * MIB, n_failed, true));
    }

    fn held(map: &HaveMap) -> Vec<u32> {
        map.iter().collect()
    }

    #[test]
    fn j11_a_failed_sync_loses_what_came_since_the_last_good_one_and_no_more() {
        let mut ledger = ledger();
        write(&mut ledger, 0);
        ledger.begin_sync();
        write(&mut ledger, 1);
        assert_eq!(
            held(&ledger.data_synced().good),
            [0],
            "1 came after the sync began"
        );
        ledger.end_sync(true);
        ledger.begin_sync();
        write(&mut ledger, 2);
        let under_way = ledger.begin_write(MIB);
        assert_eq!(ledger.sync_failed(), [1, 2]);
        assert!(
            !ledger.end_write(3, MIB, under_way, true),
            "its bytes may be among the lost"
        );
        assert_eq!(held(&ledger.have), [0]);
        assert!(ledger.is_idle() && ledger.is_durable());
        write(&mut ledger, 1);
        assert_eq!(held(&ledger.have), [0, 1]);
    }

    #[test]
    fn no_more_than_64_mib_are_at_stake() {
        let mut ledger = ledger();
        write(&mut ledger, 0);
        assert!(!ledger.is_full());
        write(&mut ledger, 1);
        assert!(ledger.is_full());
        ledger.begin_sync();
        write(&mut ledger, 2);
        let n_failed = ledger.begin_write(16 * MIB);
        assert!(!ledger.has_room(1) && !ledger.is_full(), "a sync runs");
        let _ = ledger.data_synced();
        ledger.end_sync(false);
        assert!(!ledger.has_room(1), "durable, and not journaled");
        ledger.begin_sync();
        let _ = ledger.data_synced();
        ledger.end_sync(true);
        assert!(ledger.has_room(48 * MIB) && !ledger.has_room(48 * MIB + 1));
        ledger.end_write(3, 16 * MIB, n_failed, false);
        assert!(
            ledger.has_room(64 * MIB) && ledger.has_room(u64::MAX),
            "one write always may"
        );
    }

    #[test]
    fn a_piece_grows_stale_once() {
        let mut ledger = ledger();
        let later = Instant::now() + 2 * MAX_AGE;
        assert!(!ledger.is_stale(later));
        ledger.doubtful.insert(5);
        ledger.checked(5, 0, true);
        assert!(ledger.is_stale(later) && !ledger.is_stale(Instant::now()));
        ledger.begin_sync();
        assert_eq!(held(&ledger.data_synced().good), [5]);
        ledger.end_sync(true);
        assert!(!ledger.is_stale(later) && ledger.doubtful.is_empty());
    }
}
