//! Keeps one share true to the disk: the task that waits for changes, has them looked at, and has files hashed.
//!
//! Invariant: whatever is in the share is on offer, or counted as skipped, at most two seconds after it is quiet, plus the
//! time it takes to hash it. Looking and hashing run on the blocking pool: one look at a time for each share, and for all
//! shares together one batch of small files and one big file (on all cores) at a time, so that a big file does not hold up
//! small ones. Everything ends soon after the token does.
//!
//! Beside events there is a slow rescan, for what no event tells, and every two seconds a glance at the folder itself: when
//! it goes away (a disk is unmounted) everything in it is withdrawn, and it is shared again when it is back. Rescans take at
//! most a tenth of the time, also if the kernel's queue overflows again and again.

use std::collections::BTreeSet;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

use super::file_table::Job;
use super::hasher::{HashError, Hashed, hash_file};
use super::scan::{Skipped, is_gone};
use super::share::{Looked, SharedFolder};
use super::watcher::{Debouncer, DiskChange, DiskChanges, Mode};
use crate::safe_path::open_beneath_folder;

/// How often a polled share is looked at, and the folder of any other one.
const POLL: Duration = Duration::from_secs(2);
/// A rescan is followed by a pause of this many times its duration.
pub const REST: u32 = 10;
/// What there is to know about a share.
#[derive(Clone, Debug)]
pub struct ShareState {
    /// What comes before the names of its files.
    pub name: Option<String>,
    /// Its folder, absolute.
    pub path: PathBuf,
    /// How changes are learnt of.
    pub mode: Mode,
    /// How many of its files are listed.
    pub files: u64,
    /// What is still to do, and what is not shared.
    pub progress: ShareProgress,
    /// Whether the first scan is over, so that `progress` tells all.
    pub scanned: bool,
}

/// What is still to do, and what is not shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShareProgress {
    /// Files to hash.
    pub files_to_hash: u64,
    /// Their bytes.
    pub bytes_to_hash: u64,
    /// What is there but not shared.
    pub skipped: Skipped,
}

/// The permits to hash.
#[derive(Clone)]
pub struct Lanes {
    small: Arc<Semaphore>,
    big: Arc<Semaphore>,
}

impl Default for Lanes {
    fn default() -> Self {
        Self {
            small: Arc::new(Semaphore::new(1)),
            big: Arc::new(Semaphore::new(1)),
        }
    }
}

type Outcomes = Vec<(Job, Result<Hashed, HashError>)>;

#[derive(Clone, Copy)]
enum Lane {
    Small,
    Big,
}

/// What keeps one share up to date.
pub struct ShareTask {
    /// Away while it is looking.
    share: Option<SharedFolder>,
    state: watch::Sender<ShareState>,
    suspects: mpsc::Receiver<Arc<BTreeSet<PathBuf>>>,
    changes: Option<DiskChanges>,
    debouncer: Debouncer,
    lanes: Lanes,
    hashing: JoinSet<(Lane, Outcomes)>,
    /// Whether small files are being hashed.
    small: bool,
    /// The big file that is being hashed, and what ends that.
    big: Option<(PathBuf, CancellationToken)>,
    /// What the log says about skipped files.
    told: Skipped,
    rescan: Duration,
    /// When to look at everything, and not before which time.
    next_rescan: Instant,
    rested: Instant,
    next_glance: Instant,
    cancel: CancellationToken,
}

impl ShareTask {
    /// Begins with a scan. `rescan`: how often, while there are events; `suspects`: paths of any share.
    pub fn new(
        share: SharedFolder,
        state: watch::Sender<ShareState>,
        suspects: mpsc::Receiver<Arc<BTreeSet<PathBuf>>>,
        lanes: Lanes,
        rescan: Duration,
    ) -> Self {
        let now = Instant::now();
        Self {
            cancel: share.cancel().clone(),
            share: Some(share),
            state,
            suspects,
            changes: None,
            debouncer: Debouncer::default(),
            lanes,
            hashing: JoinSet::new(),
            small: false,
            big: None,
            told: Skipped::default(),
            rescan,
            next_rescan: now,
            rested: now,
            next_glance: now + POLL,
        }
    }

    /// Runs until it is cancelled, and until what it started has ended.
    pub async fn run(mut self) {
        while self.step().await.is_some() {}
        while self.hashing.join_next().await.is_some() {}
    }

    /// Waits for something to happen and acts on it; None at the end.
    async fn step(&mut self) -> Option<()> {
        self.start_hashing()?;
        let now = Instant::now();
        let due = [
            Some(self.next_rescan),
            Some(self.next_glance),
            self.debouncer.due(now),
        ];
        let due = due
            .into_iter()
            .flatten()
            .min()
            .expect("the first two are given");
        let cancel = self.cancel.clone();
        let mut changes = vec![];
        tokio::select! {
            biased;
            () = cancel.cancelled() => return None,
            Some(hashed) = self.hashing.join_next() => {
                let (lane, outcomes) = unwrap_join(hashed)?;
                self.accept(lane, outcomes).await?;
            }
            Some(suspects) = self.suspects.recv() => {
                let looked = self.with_share(move |share| share.doubt(&suspects)).await?;
                self.follow_up(looked);
            }
            () = next_changes(&mut self.changes, &mut changes) => self.note(changes),
            () = tokio::time::sleep_until(due.into()) => {}
        }
        self.act().await
    }

    fn note(&mut self, changes: Vec<DiskChange>) {
        let now = Instant::now();
        for change in changes {
            match (&change, &self.big) {
                (DiskChange::Touched(path), Some((hashing, cancel))) if path == hashing => {
                    cancel.cancel()
                }
                (DiskChange::Stopped, _) => {
                    self.changes = None;
                    self.share.as_mut().map(SharedFolder::lose_events);
                }
                _ => {}
            }
            self.debouncer.note(change, now);
        }
    }

    /// Does what is due.
    async fn act(&mut self) -> Option<()> {
        let settled = self.debouncer.take(Instant::now());
        if settled.rescan || !settled.paths.is_empty() {
            let looked = self.with_share(move |share| share.look(&settled)).await?;
            self.follow_up(looked);
        }
        let now = Instant::now();
        if now >= self.next_glance {
            self.next_glance = now + POLL;
            if self.with_share(|share| share.has_moved()).await? {
                self.next_rescan = self.next_rescan.min(self.rested);
            }
        }
        if now >= self.next_rescan {
            self.rescan().await?;
        }
        self.report();
        Some(())
    }

    async fn rescan(&mut self) -> Option<()> {
        let began = Instant::now();
        // The folder is the one thing without a parent that tells of it: its absence is a state, not an error.
        match self.with_share(SharedFolder::rescan).await? {
            Ok(looked) => self.follow_up(looked),
            Err(error) if is_gone(&error) => self.changes = None,
            Err(error) => {
                self.changes = None;
                tracing::debug!(%error, "the scan failed");
            }
        }
        let took = began.elapsed();
        let interval = if *self.share.as_ref()?.mode() == Mode::Events {
            self.rescan
        } else {
            POLL
        };
        let now = Instant::now();
        self.rested = now + took * REST;
        self.next_rescan = self.rested.max(now + interval);
        self.next_glance = now + POLL;
        self.state
            .send_if_modified(|state| !std::mem::replace(&mut state.scanned, true));
        self.tell_skipped();
        Some(())
    }

    fn follow_up(&mut self, looked: Looked) {
        let now = Instant::now();
        for (path, wait) in looked.again {
            self.debouncer.look_again(path, now + wait);
        }
        if looked.changes.is_some() {
            self.changes = looked.changes;
        }
        if looked.rescan {
            self.next_rescan = self.next_rescan.min(self.rested);
        }
    }

    /// Logs what is not shared, if that is news.
    fn tell_skipped(&mut self) {
        let Some(skipped) = self.share.as_ref().map(SharedFolder::skipped) else {
            return;
        };
        if std::mem::replace(&mut self.told, skipped) != skipped && skipped.total() > 0 {
            tracing::warn!("{skipped}");
        }
    }

    /// Tells what the share has come to.
    fn report(&mut self) {
        let Some(share) = &self.share else { return };
        let tally = share.tally();
        let (files_to_hash, bytes_to_hash) = (tally.files_to_hash, tally.bytes_to_hash);
        let progress = ShareProgress {
            files_to_hash,
            bytes_to_hash,
            skipped: share.skipped(),
        };
        let polls = *share.mode() != Mode::Events;
        self.state.send_if_modified(|state| {
            let same_mode = state.mode == *share.mode();
            if !same_mode {
                state.mode = share.mode().clone();
                match polls {
                    true => tracing::warn!("changes are found by {}", state.mode),
                    false => tracing::info!("changes are found by {}", state.mode),
                }
            }
            let changed = !same_mode || (state.files, state.progress) != (tally.files, progress);
            (state.files, state.progress) = (tally.files, progress);
            changed
        });
        if tally.files_to_hash == 0 {
            self.tell_skipped();
        }
        if polls {
            self.next_rescan = self.next_rescan.min(self.rested.max(Instant::now() + POLL));
        }
    }

    /// Runs on the blocking pool; None if the runtime is shutting down.
    async fn with_share<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut SharedFolder) -> T + Send + 'static,
    ) -> Option<T> {
        let mut share = self.share.take()?;
        let done = spawn_blocking(move || {
            let result = work(&mut share);
            (share, result)
        });
        let (share, result) = unwrap_join(done.await)?;
        self.share = Some(share);
        Some(result)
    }

    /// Starts to hash what waits, as far as a lane is free.
    fn start_hashing(&mut self) -> Option<()> {
        let share = self.share.as_mut()?;
        if !self.small
            && let Some((root, jobs)) = share.next_small()
        {
            self.small = true;
            let hashed = hash_all(
                Arc::clone(&self.lanes.small),
                root,
                jobs,
                self.cancel.clone(),
            );
            self.hashing.spawn(async { (Lane::Small, hashed.await) });
        }
        if self.big.is_none()
            && let Some((root, job)) = share.next_big()
        {
            let cancel = self.cancel.child_token();
            self.big = Some((share.path().join(&job.relative), cancel.clone()));
            let hashed = hash_all(Arc::clone(&self.lanes.big), root, vec![job], cancel);
            self.hashing.spawn(async { (Lane::Big, hashed.await) });
        }
        Some(())
    }

    async fn accept(&mut self, lane: Lane, outcomes: Outcomes) -> Option<()> {
        match lane {
            Lane::Small => self.small = false,
            Lane::Big => self.big = None,
        }
        let looked = self.with_share(move |share| share.accept(outcomes)).await?;
        self.follow_up(looked);
        Some(())
    }
}

/// Hashes files one after the other, when it has the permit; ends soon after `cancel`.
async fn hash_all(
    lane: Arc<Semaphore>,
    root: Arc<Path>,
    jobs: Vec<Job>,
    cancel: CancellationToken,
) -> Outcomes {
    let permit = cancel.run_until_cancelled(lane.acquire_owned()).await;
    let hash = move || {
        let _permit = permit;
        let hash = |job: &Job| hash_file(&open_beneath_folder(&root, &job.relative)?.0, &cancel);
        jobs.into_iter()
            .map(|job| {
                let outcome = hash(&job);
                (job, outcome)
            })
            .collect()
    };
    unwrap_join(spawn_blocking(hash).await).unwrap_or_default()
}

/// Waits for changes, for ever if there is no watcher.
async fn next_changes(changes: &mut Option<DiskChanges>, into: &mut Vec<DiskChange>) {
    match changes {
        Some(changes) => changes.next(into).await,
        None => pending().await,
    }
}

/// A panic goes on where it is noticed; a task that the runtime dropped has no result.
fn unwrap_join<T>(joined: Result<T, tokio::task::JoinError>) -> Option<T> {
    joined
        .map_err(|error| {
            if let Ok(panic) = error.try_into_panic() {
                std::panic::resume_unwind(panic)
            }
        })
        .ok()
}
