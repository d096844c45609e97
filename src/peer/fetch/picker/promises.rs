//! Which pieces complete sources have promised to other receivers, and since when.
//!
//! Costs four bytes a piece from the first promise on, nothing before.

use std::time::{Duration, Instant};

/// A moment as milliseconds since the first promise.
pub(super) type Moment = u32;

#[derive(Debug, Default)]
pub(super) struct Promises {
    first: Option<Instant>,
    /// One more than the moment, or 0; empty before the first promise.
    since: Vec<u32>,
}

impl Promises {
    /// When the piece was promised.
    pub(super) fn since(&self, piece: u32) -> Option<Moment> {
        self.since.get(piece as usize)?.checked_sub(1)
    }

    /// Notes a promise, of `n_pieces` in all.
    pub(super) fn note(&mut self, piece: u32, n_pieces: u32, now: Instant) {
        let first = *self.first.get_or_insert(now);
        if self.since.is_empty() {
            self.since = vec![0; n_pieces as usize];
        }
        let millis = now.saturating_duration_since(first).as_millis();
        self.since[piece as usize] = u32::try_from(millis).unwrap_or(u32::MAX).saturating_add(1);
    }

    /// There are so many pieces from now on.
    pub(super) fn grow(&mut self, n_pieces: u32) {
        if !self.since.is_empty() {
            self.since.resize(n_pieces as usize, 0);
        }
    }

    pub(super) fn forget(&mut self, piece: u32) {
        if let Some(since) = self.since.get_mut(piece as usize) {
            *since = 0;
        }
    }

    /// The first moment that is less than `ago` before `now`.
    pub(super) fn within(&self, ago: Duration, now: Instant) -> Moment {
        let reached = self
            .first
            .and_then(|first| now.saturating_duration_since(first).checked_sub(ago));
        reached.map_or(0, |before| {
            u32::try_from(before.as_millis())
                .unwrap_or(u32::MAX)
                .saturating_add(1)
        })
    }

    /// The moment as time; none before the first promise.
    pub(super) fn instant(&self, moment: Moment) -> Option<Instant> {
        Some(self.first? + Duration::from_millis(moment.into()))
    }
}
