//! The pieces that a lane was promised.
//!
//! Invariant: what is left of them is given back when the lane ends, however it ends.

use std::sync::Mutex;

use super::{
    picker::SourceKey,
    swarm::{Swarm, lock},
};

/// Pieces that are claimed for `key`, by their numbers in the numbering `epoch`.
pub(super) struct ClaimGuard<'a> {
    pub(super) swarm: &'a Swarm,
    pub(super) key: SourceKey,
    pub(super) epoch: u32,
    pub(super) pieces: Mutex<Vec<u32>>,
}

impl ClaimGuard<'_> {
    /// Strikes a piece off; false if it was not promised (any more).
    pub(super) fn settle(&self, piece: u32) -> bool {
        let mut pieces = lock(&self.pieces);
        let at = pieces.iter().position(|held| *held == piece);
        at.map(|at| pieces.remove(at)).is_some()
    }

    /// Strikes a piece off that will not come; others may have it.
    pub(super) fn give_back(&self, piece: u32) {
        if self.settle(piece) {
            self.release(&[piece]);
        }
    }

    /// Is anything that is still to come of use? The end of a stream is.
    pub(super) fn is_wanted(&self) -> bool {
        let pieces = lock(&self.pieces);
        let engine = self.swarm.engine();
        let is_wanted = |piece: &u32| !engine.picker.has(*piece);
        engine.epoch() == self.epoch && (pieces.is_empty() || pieces.iter().any(is_wanted))
    }

    fn release(&self, pieces: &[u32]) {
        {
            let mut engine = self.swarm.engine();
            if engine.epoch() == self.epoch {
                engine.picker.release(self.key, pieces);
            }
        }
        self.swarm.changed.notify_waiters();
    }
}

impl Drop for ClaimGuard<'_> {
    fn drop(&mut self) {
        let pieces = std::mem::take(&mut *lock(&self.pieces));
        if !pieces.is_empty() {
            self.release(&pieces);
        }
    }
}
