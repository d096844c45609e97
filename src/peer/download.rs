//! One Get from beginning to end: look at the disk, find sources, learn manifests, fetch in batches, give files their
//! names, and say what happened.
//!
//! Invariants: the tracker is asked who holds what, never for bytes, and a batch under way does not need it; every target
//! is looked at before the first byte; a Get ends with everything it was asked for, or with one error that has an exit
//! code, and what was verified by then stays for the next attempt.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    sync::mpsc,
    task::{JoinSet, spawn_blocking},
    time::interval,
};

use super::{
    account::{Account, State},
    find::{Finder, Found, learn},
    membership::Membership,
    progress::{Happening, Progress},
    source::Source,
    storage::Storage,
    swarm::{Report, Swarm},
    targets::{Disk, Existing, Target, Want, explain},
    tracker_client::TrackerClient,
};
use crate::{
    content::Manifest,
    exit::{Exit, Failed},
    identity::PeerId,
    safe_path::SafeName,
};

/// Contents in one batch: each has an open file.
const BATCH_FILES: usize = 256;
/// Pieces in one batch: each costs some bytes in the picker.
const BATCH_PIECES: u64 = 1 << 20;
/// Files synced and renamed at once.
const FINISHING: usize = 8;
/// How long to hope for a source when there is none.
const GRACE: Duration = Duration::from_secs(4);
const TICK: Duration = Duration::from_millis(100);

/// What to get.
pub struct Get {
    /// Who asks.
    pub membership: Arc<Membership>,
    /// Who knows who holds what.
    pub tracker: Arc<TrackerClient>,
    /// Where it lands.
    pub disk: Disk,
    /// The contents.
    pub wants: Vec<Want>,
    /// What to do with targets that exist.
    pub existing: Existing,
}

/// A content whose target is free.
type Job = (Want, SafeName);

impl Get {
    /// Gets everything. Dropping the future stops at once and keeps what was verified.
    ///
    /// # Errors
    /// With an exit code; a source that fails is no error while another can take over.
    pub async fn run(self, progress: Arc<Progress>, happenings: mpsc::Sender<Happening>) -> Result<()> {
        let total = self.wants.iter().map(|want| want.size).sum();
        progress.bytes_total.store(total, Ordering::Relaxed);
        progress.files_total.store(self.wants.len() as u64, Ordering::Relaxed);
        let run = Run { get: Arc::new(self), progress, happenings };
        let jobs = run.look().await?;
        if jobs.is_empty() {
            return Ok(());
        }
        let mut sources = Found::default();
        for batch in batches(jobs) {
            run.batch(batch, &mut sources).await?;
        }
        Ok(())
    }
}

fn batches(jobs: Vec<Job>) -> Vec<Vec<Job>> {
    let mut batches: Vec<Vec<Job>> = vec![];
    let mut pieces = 0;
    for job in jobs {
        // A lower bound of the piece length; the manifest will tell.
        let n = job.0.size.div_ceil(crate::content::MIN_PIECE_LEN.into()).min(crate::content::MAX_PIECES.into()).max(1);
        match batches.last_mut() {
            Some(batch) if batch.len() < BATCH_FILES && pieces + n <= BATCH_PIECES => {
                pieces += n;
                batch.push(job);
            }
            _ => {
                pieces = n;
                batches.push(vec![job]);
            }
        }
    }
    batches
}

struct Run {
    get: Arc<Get>,
    progress: Arc<Progress>,
    happenings: mpsc::Sender<Happening>,
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
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
        let targets = blocking(move || {
            get.wants.iter().map(|want| get.disk.look(want, get.existing)).collect::<Result<Vec<_>>>()
        })
        .await?;
        let mut jobs = vec![];
        let mut taken = BTreeSet::new();
        for (want, target) in self.get.wants.iter().cloned().zip(targets) {
            match target {
                Target::Free(name) if taken.insert(name.clone()) => jobs.push((want, name)),
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
                    self.progress.bytes_total.fetch_sub(want.size, Ordering::Relaxed);
                    self.progress.files_total.fetch_sub(1, Ordering::Relaxed);
                    Progress::add(&self.progress.files_skipped, 1);
                    let path = crate::safe_path::escape(&path.display().to_string());
                    self.tell(Happening::Note(None, format!("{path} exists and differs: left alone"))).await;
                }
            }
        }
        Ok(jobs)
    }

    async fn done(&self, want: Want, path: PathBuf, already_there: bool) {
        Progress::add(&self.progress.files_done, 1);
        self.tell(Happening::FileDone { want, path, already_there }).await;
    }

    async fn batch(&self, jobs: Vec<Job>, sources: &mut Found) -> Result<()> {
        let contents: Vec<_> = jobs.iter().map(|(want, _)| want.id).collect::<BTreeSet<_>>().into_iter().collect();
        let mut finder = Finder::start(self.get.tracker.clone(), self.get.membership.id(), contents.clone());
        let held = contents.iter().filter_map(|id| Some((*id, self.get.disk.library.manifest(id)?)));
        let mut manifests: HashMap<_, _> = held.collect();
        let unknown: Vec<_> = contents.into_iter().filter(|id| !manifests.contains_key(id)).collect();
        let mut connected = HashMap::new();
        if !unknown.is_empty() {
            finder.current(sources).await?;
            let learnt = learn(&self.get.membership, &unknown, sources, &self.progress.accounts).await?;
            manifests.extend(learnt.0);
            connected = learnt.1;
        }
        let files = self.open(jobs, &manifests).await?;
        let (reports, mut received) = mpsc::channel(64);
        let swarm = Swarm::new(self.get.membership.clone(), files, self.progress.accounts.clone(), reports);
        let mut fetching = Fetching {
            run: self,
            swarm: Arc::new(swarm),
            workers: JoinSet::new(),
            working: BTreeSet::new(),
            finishing: JoinSet::new(),
            to_finish: vec![],
            connected,
            lonely_since: None,
        };
        fetching.begin(sources);
        let mut ticks = interval(TICK);
        while !fetching.is_over() {
            tokio::select! {
                Some(report) = received.recv() => fetching.report(report).await?,
                news = finder.next(sources) => fetching.meet(&news, sources),
                Some(ended) = fetching.workers.join_next() => fetching.ended(ended.ok()),
                Some(finished) = fetching.finishing.join_next() => fetching.finished(finished?).await?,
                _ = ticks.tick() => fetching.tick()?,
            }
        }
        self.progress.in_work.lock().expect("no panic while the lock is held").clear();
        Ok(())
    }

    /// Opens the `.part` of every content; corrects the totals, which the listing may have stated wrongly.
    async fn open(
        &self,
        jobs: Vec<Job>,
        manifests: &HashMap<crate::content::ContentId, Manifest>,
    ) -> Result<Vec<(Want, SafeName, Arc<Storage>)>> {
        let jobs: Vec<_> = jobs.into_iter().filter_map(|job| Some((manifests.get(&job.0.id)?.clone(), job))).collect();
        for (manifest, (want, _)) in &jobs {
            let (said, is) = (want.size, manifest.layout().size());
            self.progress.bytes_total.fetch_add(is.wrapping_sub(said), Ordering::Relaxed);
        }
        let get = self.get.clone();
        let files = blocking(move || {
            let open = jobs.into_iter().map(|(manifest, (want, target))| {
                let storage = get.disk.open(&target, &manifest)?;
                Ok((want, target, Arc::new(storage)))
            });
            open.collect::<Result<Vec<_>>>()
        })
        .await?;
        for (_, _, storage) in &files {
            let layout = storage.manifest().layout();
            let have = storage.have();
            let bytes = have.iter().filter_map(|i| layout.piece(i)).map(|piece| u64::from(layout.len_of(piece))).sum();
            Progress::add(&self.progress.bytes_done, bytes);
            Progress::add(&self.progress.bytes_resumed, bytes);
        }
        Ok(files)
    }
}

/// A batch under way.
struct Fetching<'a> {
    run: &'a Run,
    swarm: Arc<Swarm>,
    workers: JoinSet<PeerId>,
    working: BTreeSet<PeerId>,
    finishing: JoinSet<Result<(Want, PathBuf)>>,
    /// Positions of complete contents that wait for their turn.
    to_finish: Vec<usize>,
    connected: HashMap<PeerId, Source>,
    lonely_since: Option<Instant>,
}

impl Fetching<'_> {
    fn is_over(&self) -> bool {
        self.swarm.is_done() && self.finishing.is_empty() && self.to_finish.is_empty() && self.all_named()
    }

    /// The report of the last piece may still be on its way.
    fn all_named(&self) -> bool {
        self.swarm.work().iter().all(|work| work.is_named())
    }

    fn begin(&mut self, sources: &Found) {
        self.to_finish = (0..self.swarm.work().len()).filter(|i| self.swarm.left(*i) == 0).collect();
        self.finish_more();
        let all: Vec<PeerId> = sources.peers().collect();
        self.meet(&all, sources);
    }

    /// New sources, or new contents of known ones.
    fn meet(&mut self, peers: &[PeerId], sources: &Found) {
        for &peer in peers {
            let Some((addresses, contents)) = sources.of(peer) else { continue };
            if !self.swarm.work().iter().any(|work| contents.contains(&work.want.id)) {
                continue;
            }
            self.swarm.holds(peer, contents);
            let gone =
                self.accounts().get(&peer).is_some_and(|account| account.lies > 0 && account.state == State::Gone);
            if gone || !self.working.insert(peer) {
                continue;
            }
            let (swarm, addresses, connected) = (self.swarm.clone(), addresses.to_vec(), self.connected.remove(&peer));
            self.workers.spawn(async move {
                swarm.work_with(peer, addresses, connected).await;
                peer
            });
        }
    }

    fn ended(&mut self, peer: Option<PeerId>) {
        if let Some(peer) = peer {
            self.working.remove(&peer);
        }
    }

    fn accounts(&self) -> HashMap<PeerId, Account> {
        self.run.progress.accounts()
    }

    async fn report(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Complete(at) => {
                self.to_finish.push(at);
                self.finish_more();
            }
            Report::Note(peer, text) => self.run.tell(Happening::Note(Some(peer), text)).await,
            Report::Disk(error) => return Err(explain(error)),
        }
        Ok(())
    }

    fn finish_more(&mut self) {
        while self.finishing.len() < FINISHING
            && let Some(at) = self.to_finish.pop()
        {
            let (get, swarm) = (self.run.get.clone(), self.swarm.clone());
            self.finishing.spawn(blocking(move || {
                let work = &swarm.work()[at];
                let path = get.disk.finish(&work.storage, &work.want, &work.target, get.existing)?;
                work.name();
                Ok((work.want.clone(), path))
            }));
        }
    }

    async fn finished(&mut self, finished: Result<(Want, PathBuf)>) -> Result<()> {
        let (want, path) = finished?;
        self.finish_more();
        self.run.done(want, path, false).await;
        Ok(())
    }

    /// Publishes progress, and gives up when nobody is left to ask.
    fn tick(&mut self) -> Result<()> {
        let progress = &self.run.progress;
        let fetched = self.swarm.fetched.swap(0, Ordering::Relaxed);
        Progress::add(&progress.bytes_done, fetched);
        *progress.in_work.lock().expect("no panic while the lock is held") = self.swarm.in_work();
        let accounts = self.accounts();
        let is_alive = |peer: &PeerId| {
            accounts.get(peer).is_none_or(|account| !matches!(account.state, State::Banned | State::Gone))
        };
        let alive = self.working.iter().any(is_alive) && self.swarm.unavailable() == 0;
        let hopeless = !alive && !self.swarm.is_done() && self.finishing.is_empty();
        if !hopeless {
            self.lonely_since = None;
            return Ok(());
        }
        if self.lonely_since.get_or_insert_with(Instant::now).elapsed() < GRACE {
            return Ok(());
        }
        Err(nobody(&accounts, &self.run.get.wants))
    }
}

/// Why nobody is left, in one line.
fn nobody(accounts: &HashMap<PeerId, Account>, wants: &[Want]) -> anyhow::Error {
    let what = match wants {
        [want] => crate::safe_path::escape(want.name.as_str()),
        wants => format!("{} files", wants.len()),
    };
    let liars = accounts.values().filter(|account| account.lies > 0).count();
    if liars > 0 && liars == accounts.len() {
        let text = format!("{what}: every source ({liars}) sent wrong bytes; nothing wrong was kept");
        return Failed::new(Exit::Integrity, text).into();
    }
    let trouble = accounts.iter().find(|(_, account)| !account.trouble.is_empty());
    let why =
        trouble.map(|(peer, account)| format!(" (source {}: {})", peer.short(), account.trouble)).unwrap_or_default();
    let text =
        format!("{what}: no source is left to fetch from{why}; what arrived is kept, run the same command to continue");
    Failed::new(Exit::NoSource, text).into()
}
