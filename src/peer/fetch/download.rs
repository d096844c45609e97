//! One get from beginning to end: looks at the disk, opens files, works with sources, gives files their names, and says what
//! happened.
//!
//! Invariants:
//! - The loop here *looks* at the state of the [`Engine`] and starts what can be started. It is woken when something may have
//!   changed; what a wake says is nothing, so none can be lost, and none may be waited for in vain.
//! - A get ends well only if every file that was wanted has its name. What could not be had is told, each with its reason.
//! - Nothing that somebody else may hold up is awaited in the loop: neither the disk, nor a source, nor who reads what happens.
//! - The tracker is asked who holds what, never for bytes; a get under way does not need it.
//! - What is open is bounded by permits that all gets share, so that many files need few descriptors.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::{StreamExt, future::ready, stream};
use tokio::{
    sync::{Semaphore, mpsc},
    task::{JoinSet, spawn_blocking},
    time::{interval, timeout},
};
use tokio_util::task::TaskTracker;

mod idle;
mod naming;
mod opening;
mod outcome;

use self::{idle::IdleClock, outcome::Unfinished};
use super::{
    contents::{Aside, Contents, Position},
    destination::{Disk, Existing, Hashes, Opened, Target, Want},
    engine::Engine,
    find::Finder,
    pace::Fixed,
    progress::{Happening, Progress},
    session::work_with,
    storage::StorageError,
    swarm::{Here, OpenFile, Swarm},
    writer::panic_text,
};
use crate::{
    catalog::{FileKey, Row, SourceInfo},
    content::MAX_SINGLE,
    identity::PeerId,
    net::descriptor_limit,
    peer::{
        limit::Limit,
        member::{membership::Membership, tracker_client::TrackerClient},
    },
    proto::{ListFilesRequest, MAX_CONTENTS},
    request::carried,
    safe_path::{SafeName, escape},
};

/// Contents that are opened, or made durable and named, in one go.
const GROUP_FILES: usize = 1024;
/// Groups of files that are made durable and named at once.
const FINISHING: usize = 2;
/// Pieces that are open and missing, beyond which nothing more is opened: each costs some bytes in the picker.
const OPEN_PIECES: u32 = 1 << 20;
/// Contents of several pieces that are open at once: as many as one request may name, for a source is asked to tell what it
/// has of all of them.
const OPEN_LONG: usize = MAX_CONTENTS;
/// Files that a get may have open whatever other gets have.
const OPEN_AT_LEAST: usize = 8;
/// How long earlier gets that were dropped may take to make durable what they wrote: the next one may want their files.
const ENDING: Duration = Duration::from_secs(10);
/// Files that are remembered in one go: a commit to the index costs some syncs, however few they are.
const REMEMBERED: usize = 4096;
/// Files of one piece that the caller named holders of are mostly here before the tracker could tell of others, and nobody
/// gives them on before they are whole: it is asked only when they take longer.
const SOON: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(100);
/// Between two looks for something that should be synced, given up, or asked the tracker for.
const SLOW_TICK: Duration = Duration::from_secs(1);
/// Names that are looked up at the end, to tell what changed from what is gone; so many at once, each for so long.
const MOST_LOOKED_UP: usize = 256;
const LOOK_UPS: usize = 8;
const LOOK_UP: Duration = Duration::from_secs(5);
/// Happenings that are told in one go.
const TOLD: usize = 256;

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
    /// Who holds them, as far as whoever asks knows: each with positions in `wants`.
    pub holders: Vec<(SourceInfo, Vec<usize>)>,
    /// What to do with targets that exist.
    pub existing: Existing,
    /// How long to wait while nothing useful comes; none: for ever.
    pub patience: Option<Duration>,
    /// Permits for files that are open, of all gets.
    pub open_files: Arc<Semaphore>,
    /// What has to end before the Node does.
    pub tasks: TaskTracker,
    /// Closed; what winds up earlier gets that were dropped.
    pub ending: TaskTracker,
}

/// Permits for open files under this process's limit of descriptors, with room left for connections and all else.
#[must_use]
pub fn open_files() -> Arc<Semaphore> {
    const RESERVED: usize = 256;
    /// A `.part`, its journal while that is written, and its folder.
    const EACH: usize = 3;
    const MOST: usize = 16_384;
    let permits = descriptor_limit().saturating_sub(RESERVED) / EACH;
    Arc::new(Semaphore::new(permits.clamp(OPEN_AT_LEAST, MOST)))
}

/// A content whose target is free.
#[derive(Clone)]
struct Job {
    want: Want,
    target: SafeName,
}

impl Get {
    /// Gets everything that can be had. Dropping the future stops at once and keeps what was verified.
    ///
    /// # Errors
    /// With an exit code, if a file that was wanted does not have its name. A source that fails is no error while another
    /// can take over, and a file that cannot be had is none while others can.
    pub async fn run(
        self,
        progress: Arc<Progress>,
        happenings: mpsc::Sender<Happening>,
    ) -> Result<()> {
        let total = self.wants.iter().map(|want| want.size).sum();
        progress.bytes_total.store(total, Ordering::Relaxed);
        let n_files = self.wants.len() as u64;
        progress.files_total.store(n_files, Ordering::Relaxed);
        let _ = timeout(ENDING, self.ending.wait()).await;
        let mut run = Run::begin(Arc::new(self), progress, happenings).await?;
        run.work().await?;
        // What was under way may have taken up again what was set aside.
        while run.settle().await {
            run.work().await?;
        }
        run.end().await
    }
}

/// What a task on the blocking pool brought back.
enum DiskDone {
    Opened(Vec<(Position, OpenedFile)>),
    Named(Vec<(Position, Arc<OpenFile>, Result<PathBuf>)>, Hashes),
    /// Pieces were brought from this disk, or what was stale was synced.
    Other,
    Synced,
}

type OpenedFile = Result<Opened, StorageError>;

/// A get under way.
struct Run {
    get: Arc<Get>,
    jobs: Arc<[Job]>,
    swarm: Arc<Swarm>,
    progress: Arc<Progress>,
    happenings: mpsc::Sender<Happening>,
    /// What happened and was not told yet.
    untold: VecDeque<Happening>,
    finder: Finder,
    sessions: JoinSet<()>,
    disk: JoinSet<DiskDone>,
    n_finishing: usize,
    is_opening: bool,
    is_syncing: bool,
    /// Nothing is opened before: there were no descriptors.
    open_from: Option<Instant>,
    clock: IdleClock,
    unfinished: Unfinished,
    /// What later runs need not hash.
    hashes: Hashes,
}

impl Drop for Run {
    /// The clean stop, also of a get that is dropped half-way.
    fn drop(&mut self) {
        self.publish();
        self.remember();
        self.sessions.abort_all();
        let (swarm, ending) = (self.swarm.clone(), self.get.ending.token());
        self.get.tasks.spawn_blocking(move || {
            swarm.close();
            drop(swarm);
            drop(ending);
        });
    }
}

impl Run {
    async fn begin(
        get: Arc<Get>,
        progress: Arc<Progress>,
        happenings: mpsc::Sender<Happening>,
    ) -> Result<Self> {
        let looking = get.clone();
        let targets =
            spawn_blocking(move || looking.disk.look_at_all(&looking.wants, looking.existing))
                .await?;
        let (mut jobs, mut untold) = (vec![], VecDeque::new());
        let mut unfinished = Unfinished::default();
        // Of each want the position of its job.
        let mut positions = vec![None; get.wants.len()];
        let mut taken = HashSet::new();
        for (i, (want, target)) in get.wants.iter().cloned().zip(targets).enumerate() {
            match target {
                Ok(Target::Free(target)) if taken.insert(target.clone()) => {
                    positions[i] = Some(jobs.len());
                    jobs.push(Job { want, target });
                }
                Ok(Target::Free(target)) => {
                    let text = format!(
                        "two of the files would become {}: get them one by one",
                        escape(target.as_str())
                    );
                    unfinished.failed(want, Aside::Exists, text);
                }
                Ok(Target::Identical(path)) => {
                    Progress::add(&progress.bytes_done, want.size);
                    Progress::add(&progress.bytes_resumed, want.size);
                    Progress::add(&progress.files_skipped, 1);
                    Progress::add(&progress.files_done, 1);
                    untold.push_back(Happening::FileDone {
                        want,
                        path,
                        already_there: true,
                    });
                }
                Ok(Target::Skipped(path)) => {
                    progress.bytes_total.fetch_sub(want.size, Ordering::Relaxed);
                    progress.files_total.fetch_sub(1, Ordering::Relaxed);
                    Progress::add(&progress.files_skipped, 1);
                    let path = escape(&path.display().to_string());
                    let text = format!("{path} exists and differs: left alone");
                    untold.push_back(Happening::Note(None, text));
                }
                Err(error) => unfinished.failed(want, outcome::why(&error), format!("{error}")),
            }
        }
        let now = Instant::now();
        let wants = jobs.iter().map(|job| (job.want.id, job.want.size));
        let mut engine = Engine::new(Contents::new(wants), rand::random(), now);
        told_already(&get, &jobs, &positions, &mut engine);
        let is_soon = jobs.iter().enumerate().all(|(at, job)| {
            let of = engine.contents.original(at);
            job.want.size <= MAX_SINGLE.into() && engine.sources.is_hoped_for(of)
        });
        let mut ids: Vec<_> = jobs.iter().map(|job| job.want.id).collect();
        let mut seen = HashSet::new();
        ids.retain(|id| seen.insert(*id));
        let (tracker, patience) = (get.tracker.clone(), get.patience);
        let is_far = tracker.is_far();
        let swarm = Swarm::new(
            get.membership.clone(),
            get.here.clone(),
            (get.limit.clone(), get.fixed),
            is_far,
            engine,
            (progress.stage_times.clone(), get.tasks.clone()),
        );
        let ask_tracker_from = if is_soon { now + SOON } else { now };
        Ok(Self {
            get,
            jobs: jobs.into(),
            swarm: Arc::new(swarm),
            progress,
            happenings,
            untold,
            finder: Finder::new(tracker, &ids),
            sessions: JoinSet::new(),
            disk: JoinSet::new(),
            n_finishing: 0,
            is_opening: false,
            is_syncing: false,
            open_from: None,
            clock: IdleClock::new(patience, ask_tracker_from, now),
            unfinished,
            hashes: vec![],
        })
    }

    /// Until nothing is to be done any more.
    async fn work(&mut self) -> Result<()> {
        let mut ticks = interval(TICK);
        let happenings = self.happenings.clone();
        self.ask_tracker(Instant::now());
        self.dial();
        loop {
            self.look()?;
            if self.swarm.engine().contents.are_over() && self.n_finishing == 0 {
                return Ok(());
            }
            let n_told = self.untold.len().min(TOLD);
            tokio::select! {
                () = self.swarm.news.notified() => {}
                rows = self.finder.next() => self.heard(rows),
                Some(ended) = self.sessions.join_next() => {
                    ended.map_err(internal)?;
                    self.dial();
                }
                Some(done) = self.disk.join_next() => self.disk_done(done.map_err(internal)?),
                permits = happenings.reserve_many(n_told), if n_told > 0 => match permits {
                    Ok(permits) => permits
                        .zip(self.untold.drain(..n_told))
                        .for_each(|(permit, happening)| permit.send(happening)),
                    // Whoever asked has gone; then this future is about to be dropped.
                    Err(_) => self.untold.clear(),
                },
                _ = ticks.tick() => self.tick(),
            }
        }
    }

    /// Ends the work with sources. True if something is to be done after all.
    async fn settle(&mut self) -> bool {
        self.sessions.shutdown().await;
        !self.swarm.engine().contents.are_over()
    }

    /// Starts whatever can be started.
    fn look(&mut self) -> Result<()> {
        if let Some(error) = self.swarm.take_failure() {
            return Err(error);
        }
        // They wait where they are bounded while nobody hears them.
        if self.untold.len() < TOLD {
            let notes = self.swarm.take_notes().into_iter();
            let notes = notes.map(|(peer, text)| Happening::Note(peer, text));
            self.untold.extend(notes);
        }
        self.finish_more();
        self.open_more();
        Ok(())
    }

    /// Connects to whom it is of use to connect to.
    fn dial(&mut self) {
        let now = Instant::now();
        loop {
            let next = self.swarm.engine().next_to_dial(now, rand::random());
            let Some(peer) = next else { return };
            self.sessions
                .spawn(carried(work_with(self.swarm.clone(), peer)));
        }
    }

    /// The tracker's word.
    fn heard(&mut self, rows: Vec<Row>) {
        let me = self.get.membership.id();
        let news: Vec<PeerId> = {
            let mut engine = self.swarm.engine();
            let mut news = vec![];
            for row in &rows {
                let Some(at) = engine.contents.position(&row.content_id) else {
                    continue;
                };
                for source in row.sources.iter().filter(|source| source.peer != me) {
                    if engine.listed(source.peer, &source.addresses, at, !source.partial) {
                        news.push(source.peer);
                    }
                }
            }
            news
        };
        news.into_iter().for_each(|peer| self.swarm.wake(peer));
        if !rows.is_empty() {
            self.swarm.changed.notify_waiters();
        }
        self.dial();
    }

    fn set_aside(&mut self, at: Position, why: Aside, text: String) {
        self.unfinished.texts.insert(at, text);
        self.swarm.engine().set_aside(at, why);
    }

    fn disk_done(&mut self, done: DiskDone) {
        match done {
            DiskDone::Opened(files) => self.opened(files),
            DiskDone::Named(named, hashes) => self.named(named, hashes),
            DiskDone::Synced => self.is_syncing = false,
            DiskDone::Other => {}
        }
    }

    /// Has what is to be remembered written down, beside everything else.
    fn remember(&mut self) {
        let (disk, hashes) = (self.get.disk.clone(), std::mem::take(&mut self.hashes));
        if !hashes.is_empty() {
            self.get.tasks.spawn_blocking(move || disk.remember(hashes));
        }
    }

    /// What is to be done now and then.
    fn tick(&mut self) {
        let now = Instant::now();
        self.publish();
        if self.swarm.engine().ask_again(now) {
            self.swarm.changed.notify_waiters();
        }
        self.dial();
        if !self.clock.is_slow_tick(now, SLOW_TICK) {
            return;
        }
        self.ask_tracker(now);
        if !self.is_syncing {
            self.is_syncing = true;
            let swarm = self.swarm.clone();
            self.disk.spawn(async move {
                swarm.sync_stale().await;
                DiskDone::Synced
            });
        }
        let jobs = &self.jobs;
        let note = self
            .clock
            .look(&self.swarm, now, |at| escape(jobs[at].want.name.as_str()));
        if let Some(text) = note {
            self.swarm.note(None, text);
        }
        // What was given up now holds up nobody.
        self.swarm.changed.notify_waiters();
    }

    /// Follows at the tracker what is pending, once that may take long enough.
    fn ask_tracker(&mut self, now: Instant) {
        if self.clock.may_ask_tracker(now) {
            let engine = self.swarm.engine();
            self.finder.advance(|id| {
                let of = engine.contents.position(id);
                of.is_some_and(|of| engine.contents.same(of).any(|at| engine.contents.needs(at)))
            });
        }
    }

    fn publish(&self) {
        let progress = &self.progress;
        let (fetched, resumed) = self.swarm.take_counts();
        Progress::add(&progress.bytes_done, fetched + resumed);
        Progress::add(&progress.bytes_resumed, resumed);
        let corrected = self.swarm.bytes_corrected.swap(0, Ordering::Relaxed);
        progress.bytes_total.fetch_add(corrected, Ordering::Relaxed);
        let (sources, in_work) = {
            let engine = self.swarm.engine();
            let sources: HashMap<_, _> = engine
                .sources
                .stats()
                .map(|(peer, stats)| (peer, stats.clone()))
                .collect();
            let begun = engine.contents.long().filter_map(|at| {
                let open = engine.contents.opened(at)?;
                let layout = open.layout;
                let n_done = u64::from(layout.n_pieces() - open.left);
                let done = layout.size().min(n_done * u64::from(layout.piece_len()));
                let file = FileKey {
                    name: self.jobs[at].want.name.clone(),
                    content_id: self.jobs[at].want.id,
                };
                (done > 0).then_some((file, done, layout.size()))
            });
            let in_work = begun.take(8).collect();
            (sources, in_work)
        };
        const UNLOCKED: &str = "no panic while the lock is held";
        *progress.sources.lock().expect(UNLOCKED) = sources;
        *progress.in_work.lock().expect(UNLOCKED) = in_work;
    }

    /// Of what is gone, that which is listed with other bytes under its name: it changed.
    async fn replaced(&self) -> HashSet<Position> {
        let gone: Vec<Position> = {
            let engine = self.swarm.engine();
            let gone = engine
                .contents
                .aside()
                .filter(|(_, why)| *why == Aside::Gone);
            gone.map(|(at, _)| at).take(MOST_LOOKED_UP).collect()
        };
        let look_up = async |at: Position| {
            let want = &self.jobs[at].want;
            let query = ListFilesRequest {
                name: want.name.to_string(),
                ..Default::default()
            };
            let listing = timeout(LOOK_UP, self.get.tracker.list(query))
                .await
                .ok()?
                .ok()?;
            let has_changed = listing.rows.iter().any(|row| row.content_id != want.id);
            has_changed.then_some(at)
        };
        let looked_up = stream::iter(gone).map(look_up).buffer_unordered(LOOK_UPS);
        looked_up.filter_map(ready).collect().await
    }

    /// Tells what is untold, and what could not be had.
    async fn end(mut self) -> Result<()> {
        self.publish();
        for (peer, text) in self.swarm.take_notes() {
            self.untold.push_back(Happening::Note(peer, text));
        }
        let replaced = self.replaced().await;
        let sources = self.progress.sources();
        let fetched = sources.values().map(|stats| stats.bytes).sum();
        let n_done = self.progress.files_done.load(Ordering::Relaxed);
        let (failed, error) = {
            let engine = self.swarm.engine();
            let jobs = &self.jobs;
            let unfinished = std::mem::take(&mut self.unfinished);
            unfinished.settle(
                &engine,
                &replaced,
                |at| jobs[at].want.clone(),
                (n_done, fetched),
            )
        };
        let n_failed = failed.len() as u64;
        self.progress
            .files_failed
            .store(n_failed, Ordering::Relaxed);
        self.untold.extend(failed);
        for happening in std::mem::take(&mut self.untold) {
            // Whoever asked may have gone; then this future is about to be dropped.
            let _ = self.happenings.send(happening).await;
        }
        error.map_or(Ok(()), Err)
    }
}

/// What is known before anybody is asked: manifests of this peer's library, and the holders that the caller named.
fn told_already(
    get: &Get,
    jobs: &[Job],
    positions: &[Option<Position>],
    engine: &mut Engine<Arc<OpenFile>>,
) {
    for (at, job) in jobs.iter().enumerate() {
        if engine.contents.is_wanted(at)
            && let Some(manifest) = get.disk.library.manifest(&job.want.id)
        {
            engine.learn(at, manifest);
        }
    }
    let me = get.membership.id();
    for (holder, wants) in get.holders.iter().filter(|(holder, _)| holder.peer != me) {
        for at in wants.iter().filter_map(|want| *positions.get(*want)?) {
            let of = engine.contents.original(at);
            engine.listed(holder.peer, &holder.addresses, of, !holder.partial);
        }
    }
}

/// A task of ours ended in a way that it must not.
fn internal(error: tokio::task::JoinError) -> anyhow::Error {
    match error.try_into_panic() {
        Ok(panic) => anyhow::anyhow!(panic_text(&*panic)),
        Err(error) => anyhow::anyhow!("internal error: {error}"),
    }
}
