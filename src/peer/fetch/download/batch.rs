//! One batch of a Get: manifests, open files, sources, and the loop that hears of all of them.
//!
//! Invariant: a batch ends when every content of it is complete or in dispute; what it leaves to the Run is only to give
//! files their names.

use std::{
    collections::{BTreeSet, HashMap},
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{interval, timeout},
};

use super::{Job, Run, blocking};
use crate::{
    content::{ContentId, MAX_SINGLE, Manifest},
    exit::{Exit, Failed},
    identity::PeerId,
    peer::fetch::{
        destination::{Opened, Want, explain},
        find::Finder,
        progress::{Happening, Progress},
        reuse::LocalPiece,
        source::Source,
        source_stats::{Account, State},
        swarm::{Report, Swarm, Work},
    },
    request::carried,
};

/// Sources worked with at once.
const MAX_SOURCES: usize = 32;
/// Files of one piece that the caller named holders of are mostly here before the tracker could tell of others, and nobody
/// gives them on before they are whole: it is asked only when they take longer.
const SOON: Duration = Duration::from_secs(1);
/// How long to hope for a source when there is none.
pub(super) const GRACE: Duration = Duration::from_secs(4);
const TICK: Duration = Duration::from_millis(100);
/// Between two looks for something that should be synced.
const SYNC: Duration = Duration::from_secs(1);
/// How long sources have to end what they do when all is here, so that their connections can be used again.
const WIND_UP: Duration = Duration::from_millis(50);

impl Run {
    /// Fetches a batch, which is the last one unless a content of it has another size than the listing says; gives those back.
    pub(super) async fn batch(&mut self, jobs: Vec<Job>, is_last: bool) -> Result<Vec<Job>> {
        let contents = jobs.iter().map(|job| job.want.id).collect();
        let is_soon = jobs.iter().all(|job| job.want.size <= MAX_SINGLE.into())
            && self.found.covers(jobs.iter().map(|job| &job.want.id));
        let pause = if is_soon { SOON } else { Duration::ZERO };
        let mut finder = Finder::start(
            self.get.tracker.clone(),
            self.get.membership.id(),
            contents,
            pause,
        );
        let manifests = self.manifests(&jobs, &mut finder).await?;
        let (work, local) = self.open(jobs, manifests).await?;
        let (reports, mut received) = mpsc::channel(1024);
        let books = (self.progress.accounts.clone(), self.progress.spent.clone());
        let (membership, here) = (self.get.membership.clone(), self.get.here.clone());
        let asking = (self.get.limit.clone(), self.get.fixed);
        let swarm = Swarm::new(membership, here, asking, work, books, reports);
        let mut fetching = Fetching {
            run: self,
            swarm: Arc::new(swarm),
            workers: JoinSet::new(),
            working: BTreeSet::new(),
            helpers: JoinSet::new(),
            disputed: vec![],
            n_over: 0,
            lonely: None,
            synced: Instant::now(),
        };
        fetching.begin(local);
        let mut ticks = interval(TICK);
        while !fetching.is_over() {
            tokio::select! {
                Some(report) = received.recv() => fetching.report(report).await?,
                news = finder.next(&mut fetching.run.found) => fetching.meet(&news),
                Some(ended) = fetching.workers.join_next() => fetching.ended(ended.ok()),
                Some(_) = fetching.helpers.join_next() => {}
                Some(finished) = fetching.run.finishing.join_next() => fetching.run.finished(finished?).await?,
                _ = ticks.tick() => fetching.tick()?,
            }
        }
        fetching.wind_up(is_last).await?;
        let works = fetching
            .disputed
            .iter()
            .map(|at| &fetching.swarm.work()[*at]);
        let again = works.map(|work| Job {
            want: work.want.clone(),
            target: work.target.clone(),
            is_disputed: true,
        });
        Ok(again.collect())
    }

    /// Opens the `.part` of every content; corrects the totals, which the listing may have stated wrongly.
    async fn open(
        &self,
        jobs: Vec<Job>,
        mut manifests: HashMap<ContentId, Manifest>,
    ) -> Result<(Vec<Work>, Vec<Vec<LocalPiece>>)> {
        let mut manifest = |job: &Job| manifests.remove(&job.want.id).or_else(|| job.unproven());
        let with_manifest = |job: Job| Some((manifest(&job)?, job.want, job.target));
        let jobs: Vec<_> = jobs.into_iter().filter_map(with_manifest).collect();
        for (manifest, want, _) in &jobs {
            let (said, is) = (want.size, manifest.layout().size());
            self.progress
                .bytes_total
                .fetch_add(is.wrapping_sub(said), Ordering::Relaxed);
        }
        let get = self.get.clone();
        let (work, local): (Vec<_>, Vec<_>) = blocking(move || {
            let files: Vec<_> = jobs
                .iter()
                .map(|(manifest, want, target)| (want, target, manifest.clone()))
                .collect();
            let opened = get.disk.open(&files)?;
            let work = jobs.into_iter().zip(opened).map(
                |((_, want, target), Opened { storage, local })| {
                    let partial = get.disk.offer_partial(&storage, &want, &target);
                    (Work::new(want, target, storage, partial), local)
                },
            );
            Ok(work.unzip())
        })
        .await?;
        for work in &work {
            let layout = work.layout();
            if work.left() == layout.n_pieces() {
                continue;
            }
            let have = work.storage.have();
            let bytes = have
                .iter()
                .filter_map(|i| layout.piece(i))
                .map(|piece| u64::from(layout.len_of(piece)))
                .sum();
            Progress::add(&self.progress.bytes_done, bytes);
            Progress::add(&self.progress.bytes_resumed, bytes);
        }
        Ok((work, local))
    }
}

/// A batch under way.
struct Fetching<'a> {
    run: &'a mut Run,
    swarm: Arc<Swarm>,
    workers: JoinSet<(PeerId, Option<Source>)>,
    working: BTreeSet<PeerId>,
    /// What reads and syncs this disk meanwhile.
    helpers: JoinSet<()>,
    /// Positions of contents whose size is not the listed one.
    disputed: Vec<usize>,
    /// Contents that are complete or in dispute.
    n_over: usize,
    lonely: Option<Instant>,
    /// When the last look for something to sync began.
    synced: Instant,
}

impl Drop for Fetching<'_> {
    /// The clean stop, also of a Get that is dropped half-way.
    fn drop(&mut self) {
        let (swarm, ending) = (self.swarm.clone(), self.run.get.ending.token());
        self.run.get.tasks.spawn_blocking(move || {
            swarm.close();
            drop(swarm);
            drop(ending);
        });
    }
}

impl Fetching<'_> {
    /// The report of the last piece may still be on its way when all pieces are here.
    fn is_over(&self) -> bool {
        self.n_over == self.swarm.work().len()
    }

    fn begin(&mut self, local: Vec<Vec<LocalPiece>>) {
        // Before anything is brought: what becomes complete then is reported.
        for at in 0..self.swarm.work().len() {
            if self.swarm.work()[at].left() == 0 {
                self.complete(at);
            }
        }
        for (at, mut pieces) in local
            .into_iter()
            .enumerate()
            .filter(|(_, pieces)| !pieces.is_empty())
        {
            self.swarm.keep_for_local(at, &pieces);
            let other_half = pieces.split_off(pieces.len() / 2);
            for pieces in [pieces, other_half] {
                let swarm = self.swarm.clone();
                self.helpers
                    .spawn(async move { swarm.bring(at, pieces).await });
            }
        }
        let all: Vec<PeerId> = self.run.found.peers().collect();
        self.meet(&all);
    }

    fn complete(&mut self, at: usize) {
        self.n_over += 1;
        self.run.to_finish.push((self.swarm.clone(), at));
        self.run.finish_more();
    }

    /// New sources, or new contents of known ones.
    fn meet(&mut self, peers: &[PeerId]) {
        for &peer in peers {
            let Some(candidate) = self.run.found.of(peer) else {
                continue;
            };
            let of_use = |id| candidate.complete.contains(id) || candidate.partial.contains(id);
            let is_me = peer == self.run.get.membership.id();
            if is_me || !self.swarm.work().iter().any(|work| of_use(&work.want.id)) {
                continue;
            }
            self.swarm.is_at(peer, &candidate.addresses);
            self.swarm.holds(peer, &candidate.complete);
            let gone = self
                .accounts()
                .get(&peer)
                .is_some_and(|known| known.lies > 0 && known.state == State::Gone);
            if gone || self.working.len() >= MAX_SOURCES || !self.working.insert(peer) {
                continue;
            }
            let connected = self
                .run
                .connected
                .remove(&peer)
                .filter(|source| !source.is_closed());
            let connected = connected
                .map(|source| (source, self.run.begun.take_if(|begun| begun.peer == peer)));
            let swarm = self.swarm.clone();
            self.workers.spawn(carried(async move {
                (peer, swarm.work_with(peer, connected).await)
            }));
        }
    }

    fn ended(&mut self, ended: Option<(PeerId, Option<Source>)>) {
        let Some((peer, source)) = ended else { return };
        self.working.remove(&peer);
        if let Some(source) = source {
            self.run.connected.insert(peer, source);
        }
    }

    /// Keeps connections for the next batch. After the last one nobody waits for them longer than for the disk.
    async fn wind_up(&mut self, is_last: bool) -> Result<()> {
        self.publish();
        self.run.begun = None;
        self.run
            .progress
            .in_work
            .lock()
            .expect("no panic while the lock is held")
            .clear();
        let (workers, run) = (&mut self.workers, &mut self.run);
        let mut idle = vec![];
        let resting = timeout(WIND_UP, async {
            while let Some(ended) = workers.join_next().await {
                idle.extend(ended.ok());
            }
        });
        if is_last && self.disputed.is_empty() {
            let mut finished = pin!(run.finish_rest());
            tokio::select! {
                finished = &mut finished => return finished,
                _ = resting => return finished.await,
            }
        }
        let _ = resting.await;
        idle.into_iter().for_each(|ended| self.ended(Some(ended)));
        Ok(())
    }

    fn accounts(&self) -> HashMap<PeerId, Account> {
        self.run.progress.accounts()
    }

    async fn report(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Complete(at) => self.complete(at),
            Report::Met(peer, addresses, id) => {
                if self.run.found.hint(peer, addresses, id) {
                    self.meet(&[peer]);
                }
            }
            Report::Disputed(at) => {
                if !self.disputed.contains(&at) {
                    self.swarm.leave_out(at);
                    self.disputed.push(at);
                    self.n_over += 1;
                }
            }
            Report::Note(peer, text) => self.run.tell(Happening::Note(peer, text)).await,
            Report::Disk(error) => return Err(explain(error)),
        }
        Ok(())
    }

    fn publish(&self) {
        let progress = &self.run.progress;
        let (fetched, resumed) = self.swarm.take_counts();
        Progress::add(&progress.bytes_done, fetched + resumed);
        Progress::add(&progress.bytes_resumed, resumed);
        *progress
            .in_work
            .lock()
            .expect("no panic while the lock is held") = self.swarm.in_work();
    }

    /// Publishes progress, and gives up when nobody is left to ask.
    fn tick(&mut self) -> Result<()> {
        self.publish();
        self.swarm.ask_again();
        if self.synced.elapsed() > SYNC && self.swarm.has_begun() {
            self.synced = Instant::now();
            let swarm = self.swarm.clone();
            self.helpers.spawn(async move { swarm.sync_stale().await });
        }
        let accounts = self.accounts();
        let is_alive = |peer: &PeerId| {
            accounts
                .get(peer)
                .is_none_or(|account| !matches!(account.state, State::Banned | State::Gone))
        };
        let alive = self.working.iter().any(is_alive) && self.swarm.unavailable() == 0;
        let alive = alive || self.swarm.is_waiting();
        if alive || self.swarm.is_done() {
            self.lonely = None;
            return Ok(());
        }
        if self.lonely.get_or_insert_with(Instant::now).elapsed() < GRACE {
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
        let text =
            format!("{what}: every source ({liars}) sent wrong bytes; nothing wrong was kept");
        return Failed::new(Exit::Integrity, text).into();
    }
    let trouble = accounts
        .iter()
        .find(|(_, account)| !account.trouble.is_empty());
    let why = trouble
        .map(|(peer, account)| format!(" (source {}: {})", peer.short(), account.trouble))
        .unwrap_or_default();
    let text = format!(
        "{what}: no source is left to fetch from{why}; what arrived is kept, run the same command to continue"
    );
    Failed::new(Exit::NoSource, text).into()
}
