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
    contents::Aside, destination::Want, source_stats::SourceStats, stage_times::StageTimes,
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
    /// A file could not be had.
    FileFailed {
        /// Which.
        want: Want,
        /// Why.
        why: Aside,
        /// The same for people.
        text: String,
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
    /// What each source did, as of the last look.
    pub sources: Mutex<HashMap<PeerId, SourceStats>>,
    /// When it began.
    pub began: Began,
    /// Where the time went so far.
    pub stage_times: Arc<StageTimes>,
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
    /// Files that could not be had.
    pub files_failed: AtomicU64,
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

    /// What each source did, as of the last look.
    #[must_use]
    pub fn sources(&self) -> HashMap<PeerId, SourceStats> {
        self.sources
            .lock()
            .expect("no panic while the lock is held")
            .clone()
    }
}
