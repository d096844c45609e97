//! From the network to the disk: while a claim's bytes come in, the pieces that are whole are verified and written beside
//! it, each in one go, by a crew of a thread for each core.
//!
//! Invariant: a lane reads on only while less than [`IN_FLIGHT`] is being verified or written for it (or a single piece),
//! so memory is bounded by lanes x that, plus a piece each that is being put together. Of a source that is not proven it
//! reads on only when nothing is, so one wrong piece is all that such a source can make us receive. A piece is struck off
//! what the lane holds once it is written, so one that was under way when the lane ended is given back.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{sync::Notify, task::spawn_blocking};

use super::{Swarm, claim_guard::Held};
use crate::{
    content::{PieceIndex, VerifiedPiece},
    metrics,
    peer::fetch::{
        pace::Pace,
        source::{Arrived, Event, Fetch, Source, SourceError, Wanted},
        stage_times::{Spent, Stage},
        storage::{Storage, StorageError},
    },
};

/// Bytes being verified or written for a lane.
const IN_FLIGHT: usize = 1 << 20;

/// Bytes that are worth a hop to the blocking pool.
const TOGETHER: usize = 128 << 10;

/// A piece that is on its way to the disk.
struct Landed {
    /// Position of its content in the batch.
    at: usize,
    index: PieceIndex,
    len: usize,
    done: Result<(), Failed>,
}

enum Failed {
    Source(SourceError),
    /// The piece is good, but not written.
    Disk(StorageError, VerifiedPiece),
}

/// Pieces to be verified and written, each with its content and that content's position in the batch.
type Cargo = Vec<(usize, Arc<Storage>, Arrived)>;

/// Threads that verify and write for all lanes of a batch; there are none while there is nothing to do.
pub(super) struct Crew {
    spent: Arc<Spent>,
    most: usize,
    work: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(Cargo, Arc<Quay>)>,
    at_work: usize,
}

/// Where a lane finds what became of its pieces.
#[derive(Default)]
struct Quay {
    landed: Mutex<Vec<Landed>>,
    changed: Notify,
}

impl Crew {
    pub(super) fn new(spent: Arc<Spent>) -> Arc<Self> {
        let most = std::thread::available_parallelism().map_or(2, |cores| cores.get().max(2));
        Arc::new(Self {
            spent,
            most,
            work: Mutex::default(),
        })
    }

    fn take_on(self: &Arc<Self>, cargo: Cargo, quay: Arc<Quay>) {
        {
            let mut work = lock(&self.work);
            work.waiting.push_back((cargo, quay));
            if work.at_work == self.most {
                return;
            }
            work.at_work += 1;
        }
        let this = self.clone();
        spawn_blocking(move || this.work());
    }

    fn work(&self) {
        loop {
            let (cargo, quay) = {
                let mut work = lock(&self.work);
                let Some(next) = work.waiting.pop_front() else {
                    work.at_work -= 1;
                    return;
                };
                next
            };
            let land = |(at, storage, piece): (usize, Arc<Storage>, Arrived)| {
                let (len, index) = (piece.size(), piece.piece());
                Landed {
                    at,
                    index,
                    len,
                    done: land(&storage, piece, &self.spent),
                }
            };
            let landed: Vec<_> = cargo.into_iter().map(land).collect();
            lock(&quay.landed).extend(landed);
            quay.changed.notify_one();
        }
    }
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().expect("no panic while the lock is held")
}

/// The pieces of a lane that are on their way.
struct Landing {
    crew: Arc<Crew>,
    quay: Arc<Quay>,
    /// The source has sent a good piece.
    is_proven: bool,
    /// Small pieces that wait for company: one hop for each would cost more than hashing them.
    waiting: Cargo,
    waiting_bytes: usize,
    /// Of all that have not landed.
    bytes: usize,
}

impl Landing {
    fn new(crew: &Arc<Crew>, is_proven: bool) -> Self {
        let (crew, quay) = (crew.clone(), Arc::default());
        Self {
            crew,
            quay,
            is_proven,
            waiting: vec![],
            waiting_bytes: 0,
            bytes: 0,
        }
    }

    const fn has_room(&self) -> bool {
        self.bytes < if self.is_proven { IN_FLIGHT } else { 1 }
    }

    fn add(&mut self, at: usize, storage: Arc<Storage>, piece: Arrived) {
        self.bytes += piece.size();
        self.waiting_bytes += piece.size();
        self.waiting.push((at, storage, piece));
        if self.waiting_bytes >= TOGETHER {
            self.start();
        }
    }

    /// Nothing more comes at once: whatever waits begins.
    fn start(&mut self) {
        self.waiting_bytes = 0;
        self.crew
            .take_on(std::mem::take(&mut self.waiting), self.quay.clone());
    }

    /// What has landed; `None` if nothing is on its way. Dropping the future loses nothing.
    async fn next(&mut self) -> Option<Vec<Landed>> {
        while self.bytes > self.waiting_bytes {
            let landed = std::mem::take(&mut *lock(&self.quay.landed));
            if !landed.is_empty() {
                self.bytes -= landed.iter().map(|landed| landed.len).sum::<usize>();
                return Some(landed);
            }
            self.quay.changed.notified().await;
        }
        None
    }
}

fn land(storage: &Storage, piece: Arrived, spent: &Spent) -> Result<(), Failed> {
    let start = Instant::now();
    let verified = piece.verify(storage.manifest());
    let hashed = Instant::now();
    spent.add(Stage::Hashing, hashed - start);
    let piece = verified.map_err(Failed::Source)?;
    let written = storage.write(&piece);
    spent.add(Stage::Disk, hashed.elapsed());
    written.map_err(|error| Failed::Disk(error, piece))
}

impl Swarm {
    /// Fetches what a lane was promised.
    pub(super) async fn fetch(
        &self,
        source: &Source,
        lane: usize,
        held: &Held<'_>,
        first_copies: bool,
        pace: &Arc<Mutex<Pace>>,
    ) -> Result<(), SourceError> {
        let (claim, works) = self.claim(held);
        let fetch = source
            .fetch(lane, claim.clone(), first_copies, pace)
            .await?;
        if lane > 0 {
            self.until_proven(source.id).await;
        }
        self.take_in(source, fetch, (&claim, &works), held).await
    }

    /// Takes in what was asked for: ranges, each with its content's position in the batch. The first wrong piece ends it,
    /// after the good ones before and after it that had come have been written.
    pub(super) async fn take_in(
        &self,
        source: &Source,
        mut fetch: Fetch,
        (claim, works): (&[Wanted], &[usize]),
        held: &Held<'_>,
    ) -> Result<(), SourceError> {
        let is_proven = self.account(source.id, |account| account.is_proven);
        let mut landing = Landing::new(&self.crew, is_proven);
        let mut ended = None;
        loop {
            let (waiting, stage) = (
                Instant::now(),
                if landing.has_room() {
                    Stage::Network
                } else {
                    Stage::Full
                },
            );
            let event = tokio::select! {
                biased;
                Some(landed) = landing.next() => {
                    self.spent.add(stage, waiting.elapsed());
                    for piece in landed {
                        match self.landed(source, held, piece).await {
                            Ok(()) => landing.is_proven = true,
                            Err(error) => ended = Some(worst(ended, error)),
                        }
                    }
                    if ended.is_none() && !held.is_wanted() {
                        ended = Some(Ok(()));
                    }
                    continue;
                }
                event = fetch.next(), if ended.is_none() && landing.has_room() => event,
                () = std::future::ready(()), if !landing.waiting.is_empty() => {
                    landing.start();
                    continue;
                }
                else => break,
            };
            self.spent.add(stage, waiting.elapsed());
            match event {
                Ok(Some(Event::Piece(piece))) => {
                    let at = works[piece.range];
                    let number = self.work[at].first + piece.piece().get();
                    if landing.is_proven && self.picker().has(number) {
                        held.settle(number);
                        self.waste(source.id, piece.size() as u64);
                    } else {
                        landing.add(at, self.work[at].storage.clone(), piece);
                    }
                }
                Ok(Some(Event::Missing(range, done, why))) => {
                    let (first, end) = (
                        claim[range].first.get(),
                        claim[range].first.get() + claim[range].count,
                    );
                    self.missing(source.id, held, works[range], (first + done..end, why))
                        .await;
                }
                Ok(None) => ended = Some(Ok(())),
                Err(error) => ended = Some(Err(error)),
            }
        }
        let [disk, limit, network] = fetch.at_source().map(Duration::from_micros);
        self.spent.add(Stage::SourceDisk, disk);
        self.spent.add(Stage::SourceLimit, limit);
        self.spent.add(Stage::SourceNetwork, network);
        self.spent.add(Stage::Tls, source.take_tls_time());
        ended.unwrap_or(Ok(()))
    }

    async fn landed(
        &self,
        source: &Source,
        held: &Held<'_>,
        landed: Landed,
    ) -> Result<(), SourceError> {
        let Landed {
            at,
            index,
            len,
            done,
        } = landed;
        let unwritten = match done {
            Ok(()) => None,
            Err(Failed::Source(error)) => return Err(error),
            Err(Failed::Disk(error, piece)) => Some((error, piece)),
        };
        self.account(source.id, |account| account.is_proven = true);
        if let Some((error, piece)) = unwritten {
            let is_full = error.is_no_space();
            self.failed(at, error).await;
            if !is_full {
                return Ok(());
            }
            self.wait_for_room(&self.work[at]).await;
            if !self
                .with_room(at, move |storage| storage.write(&piece).map(|()| true))
                .await
            {
                return Ok(());
            }
        }
        held.settle(self.work[at].first + index.get());
        self.wake(source.id);
        let count = |len| {
            metrics::PIECES_VERIFIED.one();
            metrics::BYTES_RECEIVED.add(len);
            self.fetched.fetch_add(len, Ordering::Relaxed);
            self.account(source.id, |account| account.bytes += len);
        };
        if !self.counts(held.key, at, index, count).await {
            self.waste(source.id, len as u64);
        }
        Ok(())
    }
}

/// A wrong piece tells more of a source than whatever else ended the claim; the bytes of several add up.
fn worst(before: Option<Result<(), SourceError>>, error: SourceError) -> Result<(), SourceError> {
    Err(match (before, error) {
        (Some(Err(SourceError::BadPiece(text, bytes))), SourceError::BadPiece(_, more)) => {
            SourceError::BadPiece(text, bytes + more)
        }
        (_, error) => error,
    })
}
