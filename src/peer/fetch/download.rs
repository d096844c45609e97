//! One Get from beginning to end: look at the disk, find sources, learn manifests, fetch in batches, give files their
//! names, and say what happened.
//!
//! Invariants: the tracker is asked who holds what, never for bytes, and a batch under way does not need it; every target
//! is looked at before the first byte; a Get ends with everything it was asked for, or with one error that has an exit
//! code, and what was verified by then stays for the next attempt.
//!
//! **Many small files**, profiled with perf and strace: CPU seconds of sink and source for 10,000 x 4 KiB, and with
//! 1,000 x 100 KiB more.
//!
//! | | 4 KiB | both |
//! |---|---:|---:|
//! | before | 0.69 | 0.90 |
//! | batches of 4,096 files, not 1,024; the tracker asked only for what takes long; a missing folder looked for once; few commits to the index, beside the work; fewer announcements | 0.59 | 0.85 |
//! | no manifest in the index that the id and the size make up for; one change of the library for a group | 0.52 | 0.78 |
//!
//! Measured anew before the next steps, in one run with what came after them: 0.53 and 0.78, then 0.49 and 0.77, and 0.37 s
//! for 4 KiB became 0.35. Larger pages of the listing, each read while the next one is on its way; paths in the order of
//! their bytes; what happened told many at a time; batches of 16,384. Over 50 ms 2.8 s became 1.8.
//!
//! Less done before the first request, and what is to be remembered written in three commits and not in forty: CPU of the
//! sink 0.61 s and then 0.55, time 0.54 and 0.51 (medians of 15 in turn, 4 KiB). Another allocator (mimalloc, versions 2 and
//! 3) brought nothing that held in every round.
//!
//! Then no name for a file before it is whole (`safe_path/part.rs`), what happened written many lines at a time, no list for
//! others of what is fetched within a second, memory left to the kernel at the end, and a source of the listing made once
//! and not once for each row: time against an rsync daemon 1.42 and then 1.21 for 4 KiB, 1.44 and 1.33 for both (medians of 13
//! in turn). Of 425 ms for 4 KiB then 41 went to the listing, 43 from there to the first file on the disk (request and plan
//! 14, looking, batches and manifests 9, opening 9, connecting and the first answer 8), 318 to fetching, both cores busy,
//! 60 % of them with the sink and 27 with the source, and 19 came after the last file.
//!
//! At the sink, before all these steps, for both: TLS and HTTP/2 a fifth; opening, hashing and writing 18 %; names
//! 14 %; the index 12 %; lanes and picker 10 %; waking threads 7 %; the listing 4 %. rsync neither encrypts nor hashes.
//!
//! **A far file**, 256 MiB over 50 ms, seen with tcpdump: the first request for bytes left 0.57 s after the first packet,
//! and now leaves after 0.27 (strace). One connection to the tracker serves the command and the Node (2 round trips), and whom the
//! listing names is asked without waiting for the tracker's second word (1). Its news and its first pieces are asked for
//! together with the manifest (`source/begun.rs`): the first bytes are here after 0.31 s. What is left: 3 round trips for the
//! listing, 2 to connect to the source.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    sync::mpsc,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};
use tokio_util::task::TaskTracker;

mod batch;
mod manifests;

use super::{
    destination::{Disk, Existing, Finishing, Hashes, Target, Want},
    find::Found,
    pace::Fixed,
    progress::{Happening, Progress},
    source::{Begun, Source},
    stage_times::Stage,
    swarm::{Here, Swarm},
};
use crate::peer::{
    limit::Limit,
    member::{membership::Membership, tracker_client::TrackerClient},
};
use crate::{
    content::{Layout, MAX_PIECES},
    exit::{Exit, Failed},
    identity::PeerId,
    proto::MAX_CONTENTS,
    safe_path::SafeName,
};

/// Contents in one batch: between batches the sources have nothing to do, and their connections forget how fast a long line
/// is.
const BATCH_FILES: usize = 16_384;
/// Contents of several pieces in one batch: as many as one request may name, for a source is asked to tell what it has of
/// all of them.
const BATCH_LONG_FILES: usize = MAX_CONTENTS;
/// Complete contents that are made durable and named in one go.
const GROUP_FILES: usize = 1024;
/// Pieces in one batch: each costs some bytes in the picker.
const BATCH_PIECES: u32 = 1 << 20;
/// How long earlier Gets that were dropped may take to make durable what they wrote: the next one may want their files.
const ENDING: Duration = Duration::from_secs(10);
/// Groups of files that are made durable and named at once.
const FINISHING: usize = 2;
/// Files that are remembered in one go: a commit to the index costs some syncs, however few they are.
const REMEMBERED: usize = 4096;

/// What to get.
pub struct Get {
    /// Who asks.
    pub membership: Arc<Membership>,
    /// Who knows who holds what.
    pub tracker: Arc<TrackerClient>,
    /// Where this peer serves what it fetches.
    pub here: Here,
    /// How much may come a second.
    pub limit: Limit,
    /// Sizes that do not follow a source's speed: none, unless that is what is measured.
    pub fixed: Fixed,
    /// Where it lands.
    pub disk: Disk,
    /// The contents.
    pub wants: Vec<Want>,
    /// Who holds them, as far as whoever asks knows.
    pub found: Found,
    /// What to do with targets that exist.
    pub existing: Existing,
    /// What has to end before the Node does.
    pub tasks: TaskTracker,
    /// Closed; what winds up earlier Gets that were dropped.
    pub ending: TaskTracker,
}

/// A content whose target is free.
struct Job {
    want: Want,
    target: SafeName,
    /// The size that the listing states is in doubt, even if it is small.
    is_disputed: bool,
}

impl Get {
    /// Gets everything. Dropping the future stops at once and keeps what was verified.
    ///
    /// # Errors
    /// With an exit code; a source that fails is no error while another can take over.
    pub async fn run(
        mut self,
        progress: Arc<Progress>,
        happenings: mpsc::Sender<Happening>,
    ) -> Result<()> {
        let total = self.wants.iter().map(|want| want.size).sum();
        progress.bytes_total.store(total, Ordering::Relaxed);
        progress
            .files_total
            .store(self.wants.len() as u64, Ordering::Relaxed);
        let _ = timeout(ENDING, self.ending.wait()).await;
        let found = std::mem::take(&mut self.found);
        let mut run = Run {
            get: Arc::new(self),
            progress,
            happenings,
            found,
            connected: HashMap::new(),
            begun: None,
            to_finish: vec![],
            finishing: JoinSet::new(),
            hashes: vec![],
        };
        let mut batches: VecDeque<_> = batches(run.look().await?).into();
        let mut begun = HashSet::new();
        while let Some(batch) = batches.pop_front() {
            let n_again = batch
                .iter()
                .filter(|job| !begun.insert(job.want.id))
                .count();
            if n_again > 0 {
                // They are copied from the names they have, so they must have them.
                run.finish_rest().await?;
            }
            let disputed = run.batch(batch, batches.is_empty()).await?;
            if !disputed.is_empty() {
                batches.push_back(disputed);
            }
        }
        run.finish_rest().await
    }
}

/// Jobs in batches of different contents; of one content under several names the first is fetched, and copied for the
/// others.
fn batches(jobs: Vec<Job>) -> Vec<Vec<Job>> {
    let mut batches: Vec<Vec<Job>> = vec![];
    let (mut pieces, mut long, mut seen, mut again) = (0, 0, HashSet::new(), vec![]);
    for job in jobs {
        if !seen.insert(job.want.id) {
            again.push(job);
            continue;
        }
        // As the listing says; the manifest will tell.
        let n = Layout::new(job.want.size)
            .map_or(MAX_PIECES, |layout| layout.n_pieces())
            .max(1);
        pieces += n;
        long += usize::from(n > 1);
        match batches.last_mut() {
            Some(batch)
                if batch.len() < BATCH_FILES
                    && long <= BATCH_LONG_FILES
                    && pieces <= BATCH_PIECES =>
            {
                batch.push(job);
            }
            _ => {
                (pieces, long) = (n, usize::from(n > 1));
                batches.push(vec![job]);
            }
        }
    }
    if !again.is_empty() {
        batches.extend(self::batches(again));
    }
    batches
}

struct Run {
    get: Arc<Get>,
    progress: Arc<Progress>,
    happenings: mpsc::Sender<Happening>,
    found: Found,
    /// Connections that no batch uses now.
    connected: HashMap<PeerId, Source>,
    /// What one of them was asked for beside the manifests of the batch.
    begun: Option<Begun>,
    /// Complete contents that wait for their names, by their position in a batch.
    to_finish: Vec<(Arc<Swarm>, usize)>,
    finishing: JoinSet<Finished>,
    /// What later runs need not hash.
    hashes: Hashes,
}

/// The files that have their names now, and what there is to remember of them.
type Finished = (Result<Vec<(Want, PathBuf)>>, Hashes);

impl Drop for Run {
    fn drop(&mut self) {
        self.remember();
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    spawn_blocking(work).await?
}

impl Run {
    async fn tell(&self, happening: Happening) {
        // Whoever asked may have gone; then this future is about to be dropped.
        let _ = self.happenings.send(happening).await;
    }

    /// Looks at every target before anything is fetched.
    async fn look(&self) -> Result<Vec<Job>> {
        let get = self.get.clone();
        let targets = blocking(move || get.disk.look_at_all(&get.wants, get.existing)).await?;
        let mut jobs = vec![];
        let mut taken = HashSet::new();
        for (want, target) in self.get.wants.iter().cloned().zip(targets) {
            match target {
                Target::Free(name) if taken.insert(name.clone()) => jobs.push(Job {
                    want,
                    target: name,
                    is_disputed: false,
                }),
                Target::Free(name) => {
                    let text = format!(
                        "two different files would become {}: get them one by one",
                        crate::safe_path::escape(name.as_str())
                    );
                    return Err(Failed::new(Exit::Exists, text).into());
                }
                Target::Identical(path) => {
                    Progress::add(&self.progress.bytes_done, want.size);
                    Progress::add(&self.progress.bytes_resumed, want.size);
                    Progress::add(&self.progress.files_skipped, 1);
                    self.done(want, path, true).await;
                }
                Target::Skipped(path) => {
                    self.progress
                        .bytes_total
                        .fetch_sub(want.size, Ordering::Relaxed);
                    self.progress.files_total.fetch_sub(1, Ordering::Relaxed);
                    Progress::add(&self.progress.files_skipped, 1);
                    let path = crate::safe_path::escape(&path.display().to_string());
                    self.tell(Happening::Note(
                        None,
                        format!("{path} exists and differs: left alone"),
                    ))
                    .await;
                }
            }
        }
        Ok(jobs)
    }

    async fn done(&self, want: Want, path: PathBuf, already_there: bool) {
        Progress::add(&self.progress.files_done, 1);
        self.tell(Happening::FileDone {
            want,
            path,
            already_there,
        })
        .await;
    }

    /// Gives names to complete contents, a group at a time: what came while one group is synced is the next.
    fn finish_more(&mut self) {
        if self.to_finish.is_empty() || self.finishing.len() >= FINISHING {
            return;
        }
        let n = self.to_finish.len().min(GROUP_FILES);
        let group: Vec<_> = self.to_finish.drain(..n).collect();
        let get = self.get.clone();
        self.finishing.spawn_blocking(move || {
            let works = group.iter().map(|(swarm, at)| &swarm.work()[*at]);
            let files: Vec<_> = works
                .map(|work| Finishing {
                    storage: &work.storage,
                    want: &work.want,
                    target: &work.target,
                })
                .collect();
            let (paths, hashes) = get.disk.finish(&files, get.existing);
            let named = files
                .iter()
                .zip(paths)
                .map(|(file, path)| Ok((file.want.clone(), path?)))
                .collect();
            (named, hashes)
        });
    }

    /// Has what is to be remembered written down, beside everything else.
    fn remember(&mut self) {
        let (disk, hashes) = (self.get.disk.clone(), std::mem::take(&mut self.hashes));
        if !hashes.is_empty() {
            self.get.tasks.spawn_blocking(move || disk.remember(hashes));
        }
    }

    async fn finished(&mut self, (named, hashes): Finished) -> Result<()> {
        self.hashes.extend(hashes);
        if self.hashes.len() >= REMEMBERED {
            self.remember();
        }
        let named = named?;
        self.finish_more();
        for (want, path) in named {
            self.done(want, path, false).await;
        }
        Ok(())
    }

    async fn finish_rest(&mut self) -> Result<()> {
        let began = Instant::now();
        self.finish_more();
        while let Some(finished) = self.finishing.join_next().await {
            self.finished(finished?).await?;
        }
        self.progress.spent.add(Stage::Full, began.elapsed());
        self.progress.spent.add(Stage::Disk, began.elapsed());
        Ok(())
    }
}
