//! The pieces that a lane was promised.
//!
//! Invariant: what is left of them is given back when the lane ends, however it ends.

use std::sync::Mutex;

use super::Swarm;
use crate::peer::fetch::picker::SourceKey;

pub(super) struct Held<'a> {
    pub(super) swarm: &'a Swarm,
    pub(super) key: SourceKey,
    pub(super) pieces: Mutex<Vec<u32>>,
}

impl Held<'_> {
    /// Strikes a piece off; false if it was not promised (any more).
    pub(super) fn settle(&self, piece: u32) -> bool {
        let mut pieces = self.pieces.lock().expect("no panic while the lock is held");
        let at = pieces.iter().position(|held| *held == piece);
        at.map(|at| pieces.remove(at)).is_some()
    }

    /// Is anything that is still to come of use? The end of a stream is.
    pub(super) fn is_wanted(&self) -> bool {
        let pieces = self.pieces.lock().expect("no panic while the lock is held");
        let picker = self.swarm.picker();
        pieces.is_empty() || pieces.iter().any(|piece| !picker.has(*piece))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let pieces = self
            .pieces
            .lock()
            .map(|mut pieces| std::mem::take(&mut *pieces))
            .unwrap_or_default();
        if !pieces.is_empty() {
            self.swarm.picker().release(self.key, &pieces);
            self.swarm.changed.notify_waiters();
        }
    }
}
