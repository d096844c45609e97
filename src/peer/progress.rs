//! Where a Get stands, and what happens in it, as its watchers see it.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    account::{Account, Accounts},
    targets::Want,
};
use crate::{identity::PeerId, safe_path::SafeName};

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

/// Where a Get stands; shared with whoever watches it.
#[derive(Default)]
pub struct Progress {
    /// All sources so far.
    pub accounts: Accounts,
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
    /// Files in work: name, done, total.
    pub in_work: Mutex<Vec<(SafeName, u64, u64)>>,
}

impl Progress {
    /// Counts `n` more.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    /// The accounts as they are now.
    #[must_use]
    pub fn accounts(&self) -> HashMap<PeerId, Account> {
        self.accounts.lock().expect("no panic while the lock is held").clone()
    }
}
