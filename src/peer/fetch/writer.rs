//! From the network to the disk: while a claim's bytes come in, the pieces that are whole are verified and written beside
//! it, each in one go, by a pool of a thread for each core.
//!
//! Invariants: what is written counts at once, by the thread that wrote it, whoever still waits for it. A lane reads on only
//! while less than `IN_FLIGHT` is being verified or written for it (or a single piece), so memory is bounded by lanes x
//! that, plus a piece each that is being put together. Of a source that is not proven it reads on only when nothing is, so
//! one wrong piece is all that such a source can make us receive. A panic in the pool ends the get with an error.

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    time::Instant,
};

use tokio::{sync::Notify, task::spawn_blocking};

use super::{
    contents::Position,
    picker::SourceKey,
    source::{Arrived, SourceError},
    stage_times::Stage,
    storage::StorageError,
    swarm::{OpenFile, Swarm, lock},
};
use crate::{
    content::{PieceIndex, VerifiedPiece},
    identity::PeerId,
    metrics,
    safe_path::escape,
};

/// Bytes being verified or written for a lane.
const IN_FLIGHT: usize = 1 << 20;

/// Bytes that are worth a hop to the blocking pool.
const TOGETHER: usize = 128 << 10;

/// A piece on its way to the disk.
pub(super) struct Parcel {
    /// Position of its content.
    pub(super) at: Position,
    pub(super) file: Arc<OpenFile>,
    pub(super) piece: Arrived,
}

/// What became of a piece.
pub(super) struct Landed {
    pub(super) at: Position,
    pub(super) index: PieceIndex,
    len: usize,
    pub(super) outcome: Outcome,
}

/// How it ended.
pub(super) enum Outcome {
    /// Written, and it counts unless it had come before.
    Written,
    /// Not the bytes of that piece.
    Wrong(SourceError),
    /// The piece is good, but not written.
    Unwritten(Arc<OpenFile>, StorageError, VerifiedPiece),
    /// The get has failed.
    Failed,
}

/// Threads that verify and write for all lanes of a get; there are none while there is nothing to do.
pub struct WriterPool {
    most: usize,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Batch>,
    at_work: usize,
}

/// What a lane hands over in one go.
struct Batch {
    parcels: Vec<Parcel>,
    swarm: Arc<Swarm>,
    from: (SourceKey, PeerId),
    back: Arc<Returned>,
}

/// Where a lane finds what became of its pieces.
#[derive(Default)]
struct Returned {
    landed: Mutex<Vec<Landed>>,
    changed: Notify,
}

impl WriterPool {
    /// A pool without threads.
    pub(super) fn new() -> Arc<Self> {
        let cores = std::thread::available_parallelism();
        Arc::new(Self {
            most: cores.map_or(2, |cores| cores.get().max(2)),
            queue: Mutex::default(),
        })
    }

    fn take_on(self: &Arc<Self>, batch: Batch) {
        {
            let mut queue = lock(&self.queue);
            queue.waiting.push_back(batch);
            if queue.at_work == self.most {
                return;
            }
            queue.at_work += 1;
        }
        let this = self.clone();
        spawn_blocking(move || this.work());
    }

    fn work(&self) {
        loop {
            let batch = {
                let mut queue = lock(&self.queue);
                let Some(next) = queue.waiting.pop_front() else {
                    queue.at_work -= 1;
                    return;
                };
                next
            };
            let Batch {
                parcels,
                swarm,
                from,
                back,
            } = batch;
            let landed: Vec<_> = parcels
                .into_iter()
                .map(|parcel| land_safely(&swarm, from, parcel))
                .collect();
            lock(&back.landed).extend(landed);
            back.changed.notify_one();
        }
    }
}

fn land_safely(swarm: &Swarm, from: (SourceKey, PeerId), parcel: Parcel) -> Landed {
    let (at, index, len) = (parcel.at, parcel.piece.piece(), parcel.piece.size());
    let name = parcel.file.name.clone();
    let landed = catch_unwind(AssertUnwindSafe(|| land(swarm, from, parcel)));
    let outcome = landed.unwrap_or_else(|panic| {
        let name = escape(name.as_str()).to_string();
        swarm.fail(anyhow::anyhow!(
            "writing piece {} of {name}: {}",
            index.get(),
            panic_text(&*panic)
        ));
        Outcome::Failed
    });
    Landed {
        at,
        index,
        len,
        outcome,
    }
}

/// What a panic says.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("internal error: {}", text.unwrap_or_default())
}

fn land(swarm: &Swarm, (key, peer): (SourceKey, PeerId), parcel: Parcel) -> Outcome {
    let Parcel { at, file, piece } = parcel;
    let (index, len) = (piece.piece(), piece.size() as u64);
    let start = Instant::now();
    let verified = piece.verify(file.storage.manifest());
    let hashed = Instant::now();
    swarm.stage_times.add(Stage::Hashing, hashed - start);
    let piece = match verified {
        Ok(piece) => piece,
        Err(error) => return Outcome::Wrong(error),
    };
    let written = file.storage.write(&piece);
    swarm.stage_times.add(Stage::Disk, hashed.elapsed());
    match written {
        Ok(()) => {
            received(swarm, (key, peer), (at, &file), index, len);
            Outcome::Written
        }
        Err(error) => Outcome::Unwritten(file, error, piece),
    }
}

/// A piece of a source is verified and written.
pub(super) fn received(
    swarm: &Swarm,
    (key, peer): (SourceKey, PeerId),
    (at, file): (Position, &Arc<OpenFile>),
    piece: PieceIndex,
    len: u64,
) {
    if swarm.counts((key, Some(peer)), (at, file), piece) {
        metrics::PIECES_VERIFIED.one();
        metrics::BYTES_RECEIVED.add(len);
    } else {
        swarm.waste(peer, len);
    }
    swarm.wake(peer);
}

/// The pieces of a lane that are on their way.
pub(super) struct Landing {
    swarm: Arc<Swarm>,
    from: (SourceKey, PeerId),
    back: Arc<Returned>,
    /// The source has sent a good piece.
    pub(super) is_proven: bool,
    /// Small pieces that wait for company: one hop for each would cost more than hashing them.
    waiting: Vec<Parcel>,
    waiting_bytes: usize,
    /// Of all that have not landed.
    bytes: usize,
}

impl Landing {
    pub(super) fn new(swarm: &Arc<Swarm>, from: (SourceKey, PeerId), is_proven: bool) -> Self {
        Self {
            swarm: swarm.clone(),
            from,
            back: Arc::default(),
            is_proven,
            waiting: vec![],
            waiting_bytes: 0,
            bytes: 0,
        }
    }

    /// May the lane read on?
    pub(super) const fn has_room(&self) -> bool {
        self.bytes < if self.is_proven { IN_FLIGHT } else { 1 }
    }

    /// Do small pieces wait?
    pub(super) const fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn add(&mut self, parcel: Parcel) {
        self.bytes += parcel.piece.size();
        self.waiting_bytes += parcel.piece.size();
        self.waiting.push(parcel);
        if self.waiting_bytes >= TOGETHER {
            self.start();
        }
    }

    /// Nothing more comes at once: whatever waits begins.
    pub(super) fn start(&mut self) {
        self.waiting_bytes = 0;
        self.swarm.writers.take_on(Batch {
            parcels: std::mem::take(&mut self.waiting),
            swarm: self.swarm.clone(),
            from: self.from,
            back: self.back.clone(),
        });
    }

    /// What has landed; `None` if nothing is on its way. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Option<Vec<Landed>> {
        while self.bytes > self.waiting_bytes {
            let landed = std::mem::take(&mut *lock(&self.back.landed));
            if !landed.is_empty() {
                self.bytes -= landed.iter().map(|landed| landed.len).sum::<usize>();
                return Some(landed);
            }
            self.back.changed.notified().await;
        }
        None
    }
}
