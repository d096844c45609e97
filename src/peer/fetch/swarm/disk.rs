//! This disk, as a batch uses it: pieces that are on it already, pieces that were written and count now, and what
//! becomes of them when it is full or fails.
//!
//! Invariant: a piece is counted and offered only after it was written; what the disk lost counts no longer. A full disk
//! makes everybody wait, nobody give up.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{task::spawn_blocking, time::sleep};

use super::{LOCAL, Report, Swarm, work::Work};
use crate::{
    content::PieceIndex,
    metrics,
    peer::fetch::{
        picker::{Received, SourceKey},
        reuse::LocalPiece,
        storage::{Storage, StorageError},
    },
};

/// Between two looks at a full disk.
const FULL: Duration = Duration::from_secs(1);
/// Syncs that may fail for one content before the disk is given up.
const MAX_LOSSES: u32 = 3;

impl Swarm {
    /// Takes pieces of a content that are on this disk already; those that turn out not to be are left to the network.
    pub async fn bring(&self, at: usize, pieces: Vec<LocalPiece>) {
        let work = &self.work[at];
        for piece in pieces {
            let index = piece.index();
            let piece = Arc::new(piece);
            if self
                .with_room(at, move |storage| piece.bring(storage))
                .await
            {
                self.counts(LOCAL, at, index, |len| {
                    _ = self.resumed.fetch_add(len, Ordering::Relaxed)
                })
                .await;
            } else {
                self.picker().release(LOCAL, &[work.first + index.get()]);
                self.changed.notify_waiters();
            }
        }
    }

    /// Keeps these pieces of a content from the network until [`bring`](Self::bring) has tried them.
    pub fn keep_for_local(&self, at: usize, pieces: &[LocalPiece]) {
        let first = self.work[at].first;
        self.picker().claim_local(
            LOCAL,
            pieces.iter().map(|piece| first + piece.index().get()),
        );
    }

    /// Counts a written piece, and offers it; false if it was counted before. `count` gets its bytes before anybody hears
    /// that its content is complete: that may be the end of the batch.
    pub(super) async fn counts(
        &self,
        key: SourceKey,
        at: usize,
        index: PieceIndex,
        count: impl FnOnce(u64) + Send,
    ) -> bool {
        let work = &self.work[at];
        let (received, is_done, is_tail) = {
            let mut picker = self.picker();
            (
                picker.received(key, work.first + index.get()),
                picker.is_done(),
                picker.is_tail(),
            )
        };
        if received == Received::New {
            count(work.layout().len_of(index).into());
        }
        // Everybody looks again once when the tail begins, because then sources race, and at the end.
        if self.is_tail.swap(is_tail, Ordering::Relaxed) != is_tail || is_done {
            self.changed.notify_waiters();
        }
        if received == Received::Duplicate {
            return false;
        }
        work.offer(index);
        if work.piece_came() == 0 {
            self.report(Report::Complete(at)).await;
        }
        true
    }

    /// Runs something that writes, again and again while the disk is full; false if it did not write.
    pub(super) async fn with_room<F>(&self, at: usize, write: F) -> bool
    where
        F: Fn(&Storage) -> Result<bool, StorageError> + Send + Sync + 'static,
    {
        let (work, write) = (&self.work[at], Arc::new(write));
        loop {
            let (storage, write) = (work.storage.clone(), write.clone());
            // It fails only when the pool shuts down, and we with it.
            let Ok(written) = spawn_blocking(move || write(&storage)).await else {
                return false;
            };
            match written {
                Ok(written) => return written,
                Err(error) => {
                    let is_full = error.is_no_space();
                    self.failed(at, error).await;
                    if !is_full {
                        return false;
                    }
                    self.wait_for_room(work).await;
                }
            }
        }
    }

    /// Takes back what the disk lost, and tells what went wrong unless it can be helped.
    pub(super) async fn failed(&self, at: usize, error: StorageError) {
        let work = &self.work[at];
        if error.is_no_space() {
            &metrics::DISK_FULL
        } else {
            &metrics::DISK_WRITE_ERRORS
        }
        .one();
        if let StorageError::Lost { pieces, .. } = &error {
            let n = work.lose(pieces);
            self.picker()
                .lose(pieces.iter().map(|piece| work.first + piece));
            self.changed.notify_waiters();
            if n <= MAX_LOSSES {
                let text = format!(
                    "{}: {error}",
                    crate::safe_path::escape(work.want.name.as_str())
                );
                return self.report(Report::Note(None, text)).await;
            }
        }
        if !error.is_no_space() {
            self.report(Report::Disk(error)).await;
        }
    }

    pub(super) async fn wait_for_room(&self, work: &Work) {
        let name = crate::safe_path::escape(work.want.name.as_str());
        let is_first = self.waiting.fetch_add(1, Ordering::Relaxed) == 0;
        if is_first {
            let text = format!("{name}: the disk is full; waiting for room, what arrived is kept");
            self.report(Report::Note(None, text)).await;
        }
        loop {
            sleep(FULL).await;
            let storage = work.storage.clone();
            if spawn_blocking(move || storage.has_room())
                .await
                .unwrap_or(true)
            {
                break;
            }
        }
        if self.waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.report(Report::Note(
                None,
                format!("{name}: there is room again; going on"),
            ))
            .await;
        }
    }

    /// Makes durable what was written some seconds ago.
    pub async fn sync_stale(&self) {
        for at in (0..self.work.len()).filter(|at| self.work[*at].is_begun()) {
            let storage = self.work[at].storage.clone();
            if let Ok(Err(error)) = spawn_blocking(move || storage.tick()).await {
                self.failed(at, error).await;
            }
        }
    }

    /// The clean stop of everything that is not complete. Blocks.
    pub fn close(&self) {
        for work in self.work.iter().filter(|work| work.left() > 0) {
            if let Err(error) = work.storage.close() {
                tracing::warn!(
                    "{}: {error}",
                    crate::safe_path::escape(work.want.name.as_str())
                );
            }
        }
    }
}
