//! Where a Get stands, and what happens in it, as its watchers see it.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::{
    destination::Want,
    source_stats::{Account, Accounts},
    stage_times::Spent,
};
use crate::{catalog::FileKey, identity::PeerId};

/// Something that happened, for whoever asked for the Get.
#[derive(Clone, Debug)]
pub enum Happening {
    /// A file has its name.
    FileDone {
        /// Which.
        want: Want,
        /// Where it is.
        path: PathBuf,
        /// It was there before.
        already_there: bool,
    },
    /// Worth a line.
    Note(Option<PeerId>, String),
}

/// An instant that defaults to now.
#[derive(Clone, Copy, Debug)]
pub struct Began(pub Instant);

impl Default for Began {
    fn default() -> Self {
        Self(Instant::now())
    }
}

/// Where a Get stands; shared with whoever watches it.
#[derive(Default)]
pub struct Progress {
    /// All sources so far.
    pub accounts: Accounts,
    /// When it began.
    pub began: Began,
    /// Where the time went so far.
    pub spent: Arc<Spent>,
    /// Bytes of all files.
    pub bytes_total: AtomicU64,
    /// Verified bytes that are on the disk.
    pub bytes_done: AtomicU64,
    /// Of these, bytes that did not come over the network.
    pub bytes_resumed: AtomicU64,
    /// Files.
    pub files_total: AtomicU64,
    /// Files that have their names.
    pub files_done: AtomicU64,
    /// Files that were not fetched, because the target is identical, or differs and was left alone; the latter do not
    /// count as done.
    pub files_skipped: AtomicU64,
    /// Bytes a second over the network, for those who look now and then.
    pub rate: AtomicU64,
    /// Files in work: which, bytes done, bytes in all.
    pub in_work: Mutex<Vec<(FileKey, u64, u64)>>,
}

impl Progress {
    /// Counts `n` more.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    /// The accounts as they are now.
    #[must_use]
    pub fn accounts(&self) -> HashMap<PeerId, Account> {
        self.accounts
            .lock()
            .expect("no panic while the lock is held")
            .clone()
    }
}
