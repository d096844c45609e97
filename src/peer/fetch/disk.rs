//! This disk, as a get uses it: pieces that are on it already, and what becomes of pieces when it is full or fails.
//!
//! Invariant: what the disk lost counts no longer. A full disk makes everybody wait, nobody give up; whoever waits is counted
//! by a guard for as long as it waits.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{task::spawn_blocking, time::sleep};

use super::{
    claim_guard::ClaimGuard,
    contents::Position,
    destination::explain,
    engine::LOCAL,
    reuse::LocalPiece,
    storage::{Storage, StorageError},
    swarm::{OpenFile, Swarm},
};
use crate::{metrics, safe_path::escape};

/// Between two looks at a full disk.
const FULL: Duration = Duration::from_secs(1);
/// Syncs that may fail for one content before the disk is given up.
const MAX_LOSSES: u32 = 3;

/// Who waits for room on the disk.
#[derive(Default)]
pub struct DiskRoom(AtomicU32);

/// One who waits; the last one that goes says so.
struct Waiting<'a> {
    swarm: &'a Swarm,
    name: String,
}

impl<'a> Waiting<'a> {
    fn begin(swarm: &'a Swarm, file: &OpenFile) -> Self {
        let name = escape(file.name.as_str()).to_string();
        if swarm.room.0.fetch_add(1, Ordering::Relaxed) == 0 {
            let text = format!("{name}: the disk is full; waiting for room, what arrived is kept");
            swarm.note(None, text);
        }
        Self { swarm, name }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.swarm.room.0.fetch_sub(1, Ordering::Relaxed) == 1 {
            let text = format!("{}: there is room again; going on", self.name);
            self.swarm.note(None, text);
        }
    }
}

impl Swarm {
    /// Takes pieces of a content that are on this disk already; those that turn out not to be are left to the network.
    pub async fn bring(&self, at: Position, file: Arc<OpenFile>, local: Vec<LocalPiece>) {
        let held = {
            let mut engine = self.engine();
            let numbers = local
                .iter()
                .filter_map(|piece| engine.contents.number(at, piece.index()));
            let numbers: Vec<u32> = numbers.collect();
            engine.picker.claim_local(LOCAL, numbers.iter().copied());
            let (swarm, key, epoch) = (self, LOCAL, engine.epoch());
            ClaimGuard {
                swarm,
                key,
                epoch,
                pieces: Mutex::new(numbers),
            }
        };
        for piece in local {
            let index = piece.index();
            let piece = Arc::new(piece);
            let number = self.engine().contents.number(at, index);
            if self
                .with_room(at, &file, move |storage| piece.bring(storage))
                .await
            {
                self.counts((LOCAL, None), (at, &file), index);
                number.map(|number| held.settle(number));
            } else if let Some(number) = number {
                held.give_back(number);
            }
        }
    }

    /// Runs something that writes, again and again while the disk is full; false if it did not write.
    pub(super) async fn with_room<F>(&self, at: Position, file: &Arc<OpenFile>, write: F) -> bool
    where
        F: Fn(&Storage) -> Result<bool, StorageError> + Send + Sync + 'static,
    {
        let write = Arc::new(write);
        loop {
            let (storage, write) = (file.storage.clone(), write.clone());
            let written = match spawn_blocking(move || write(&storage)).await {
                Ok(written) => written,
                Err(error) => {
                    self.fail(anyhow::anyhow!(
                        "writing {}: {error}",
                        escape(file.name.as_str())
                    ));
                    return false;
                }
            };
            match written {
                Ok(written) => return written,
                Err(error) => {
                    let is_full = error.is_no_space();
                    self.disk_failed(at, file, error);
                    if !is_full {
                        return false;
                    }
                    self.wait_for_room(file).await;
                }
            }
        }
    }

    /// Takes back what the disk lost, and ends the get unless it can be helped.
    pub(super) fn disk_failed(&self, at: Position, file: &OpenFile, error: StorageError) {
        if error.is_no_space() {
            &metrics::DISK_FULL
        } else {
            &metrics::DISK_WRITE_ERRORS
        }
        .one();
        if let StorageError::Lost { pieces, .. } = &error {
            let n = self.engine().lose(at, pieces);
            if let Some(partial) = &file.partial {
                partial.lose(pieces);
            }
            self.wake_all();
            if n <= MAX_LOSSES {
                self.note(None, format!("{}: {error}", escape(file.name.as_str())));
                return;
            }
        }
        if !error.is_no_space() {
            self.fail(explain(error));
        }
    }

    pub(super) async fn wait_for_room(&self, file: &OpenFile) {
        let _waiting = Waiting::begin(self, file);
        loop {
            sleep(FULL).await;
            let storage = file.storage.clone();
            if spawn_blocking(move || storage.has_room())
                .await
                .unwrap_or(true)
            {
                return;
            }
        }
    }

    /// Does somebody wait for room on the disk?
    #[must_use]
    pub fn is_waiting_for_room(&self) -> bool {
        self.room.0.load(Ordering::Relaxed) > 0
    }

    /// Makes durable what was written some seconds ago.
    pub async fn sync_stale(&self) {
        for (at, file) in self.begun() {
            let storage = file.storage.clone();
            if let Ok(Err(error)) = spawn_blocking(move || storage.tick()).await {
                self.disk_failed(at, &file, error);
            }
        }
    }

    /// The clean stop of everything that is not complete. Blocks.
    pub fn close(&self) {
        let open: Vec<_> = {
            let engine = self.engine();
            let open = engine.contents.open();
            open.map(|(_, open)| open.handle.clone()).collect()
        };
        for file in open {
            if let Err(error) = file.storage.close() {
                tracing::warn!("{}: {error}", escape(file.name.as_str()));
            }
        }
    }

    /// Contents of which some pieces are here and some are not.
    fn begun(&self) -> Vec<(Position, Arc<OpenFile>)> {
        let engine = self.engine();
        let begun = engine
            .contents
            .open()
            .filter(|(_, open)| open.left < open.layout.n_pieces());
        begun.map(|(at, open)| (at, open.handle.clone())).collect()
    }
}
