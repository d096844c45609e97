//! The state of every piece of a Download.
//!
//! Invariant: every piece is in exactly one state: done; claimed, with one or two owners; or free, in the one set of
//! `free` that its rarity names. A claimed piece was asked of each of its owners and has come from none.
//!
//! A piece changes hands in constant time (and the logarithm of what is under way), a search leaps over gaps.

use super::SourceKey;
use super::piece_set::PieceSet;
use crate::have::HaveMap;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Sets of free pieces by rarity; the last holds all that this many partial sources or more have.
const RARITY_CLASSES: usize = 16;
/// A piece is late when its owner has taken twice the time it was expected in, and at least this much longer.
pub(super) const LATE_SLACK: Duration = Duration::from_secs(1);
/// Each further owner doubles the patience with the next, up to this many times: should all sources be slower than
/// expected, pieces do not fly between them.
const MAX_PATIENCE_DOUBLINGS: u32 = 6;
/// More owners than two do not bring a piece any faster, only more often.
const MAX_OWNERS: usize = 2;

/// What a source has.
#[derive(Debug)]
pub(super) enum Have {
    /// Every piece; without a set, because most sources are complete.
    All,
    /// These pieces.
    Some(PieceSet),
}

/// A piece that is under way.
#[derive(Debug, Default)]
pub(super) struct Claimed {
    /// One or two, the first to be asked first.
    pub(super) owners: Vec<Owner>,
    n_takeovers: u32,
}

/// A source that was asked for a piece.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) key: SourceKey,
    /// When the piece is expected.
    pub(super) due: Instant,
    /// How long it was to take.
    pub(super) expected: Duration,
    /// When others may take it.
    pub(super) late: Instant,
}

#[derive(Debug)]
pub(super) struct Board {
    n_pieces: u32,
    done: PieceSet,
    claimed: BTreeMap<u32, Claimed>,
    n_claimed_by: BTreeMap<SourceKey, u32>,
    /// By how many partial sources have it; complete ones raise all pieces alike and do not matter.
    free: Vec<PieceSet>,
    n_partial: Vec<u16>,
    n_complete: u32,
    /// Pieces that are not done and that no partial source has.
    n_without_partial: u32,
}

impl Board {
    pub(super) fn new(n_pieces: u32) -> Self {
        let mut free = vec![PieceSet::empty(n_pieces); RARITY_CLASSES];
        free[0] = PieceSet::full(n_pieces);
        Self {
            n_pieces,
            done: PieceSet::empty(n_pieces),
            claimed: BTreeMap::new(),
            n_claimed_by: BTreeMap::new(),
            free,
            n_partial: vec![0; n_pieces as usize],
            n_complete: 0,
            n_without_partial: n_pieces,
        }
    }

    pub(super) fn n_pieces(&self) -> u32 {
        self.n_pieces
    }

    pub(super) fn is_done(&self, piece: u32) -> bool {
        self.done.contains(piece)
    }

    /// Pieces that are not done.
    pub(super) fn remaining(&self) -> u32 {
        self.n_pieces - self.done.len()
    }

    /// Pieces that are not done and that no counted source has.
    pub(super) fn unavailable(&self) -> u32 {
        if self.n_complete > 0 { 0 } else { self.n_without_partial }
    }

    /// True if every piece that some source has is done or claimed.
    pub(super) fn is_tail(&self) -> bool {
        self.free.iter().map(PieceSet::len).sum::<u32>() == self.unavailable()
    }

    /// The piece is done, whoever was asked for it; false if it was already, or is none.
    pub(super) fn settle(&mut self, piece: u32) -> bool {
        if piece >= self.n_pieces || !self.done.insert(piece) {
            return false;
        }
        let rarity = self.rarity(piece);
        self.free[rarity].remove(piece);
        if self.n_partial[piece as usize] == 0 {
            self.n_without_partial -= 1;
        }
        for owner in self.claimed.remove(&piece).into_iter().flat_map(|claimed| claimed.owners) {
            self.unload(owner.key);
        }
        true
    }

    /// Makes `key`, which owns it not yet, an owner of a piece that is not done. Of two owners the one that is late for
    /// longer gives way.
    pub(super) fn claim(&mut self, key: SourceKey, piece: u32, due: Instant, now: Instant) {
        let rarity = self.rarity(piece);
        self.free[rarity].remove(piece);
        let claimed = self.claimed.entry(piece).or_default();
        claimed.n_takeovers += u32::from(!claimed.owners.is_empty());
        let mut displaced = None;
        if claimed.owners.len() == MAX_OWNERS {
            let first = usize::from(claimed.owners[1].late < claimed.owners[0].late);
            displaced = Some(claimed.owners.remove(first).key);
        }
        let patience = 1 << claimed.n_takeovers.min(MAX_PATIENCE_DOUBLINGS);
        let expected = due.saturating_duration_since(now);
        let late = due + LATE_SLACK.max(expected) * patience;
        claimed.owners.push(Owner { key, due, expected, late });
        *self.n_claimed_by.entry(key).or_default() += 1;
        if let Some(displaced) = displaced {
            self.unload(displaced);
        }
    }

    /// `key` no longer owns the piece, if it did; without another owner the piece is free.
    pub(super) fn disown(&mut self, key: SourceKey, piece: u32) {
        let Some(claimed) = self.claimed.get_mut(&piece) else { return };
        let Some(at) = claimed.owners.iter().position(|owner| owner.key == key) else { return };
        claimed.owners.remove(at);
        if claimed.owners.is_empty() {
            self.claimed.remove(&piece);
            let rarity = self.rarity(piece);
            self.free[rarity].insert(piece);
        }
        self.unload(key);
    }

    /// How many pieces `key` owns.
    pub(super) fn n_claimed(&self, key: SourceKey) -> u32 {
        self.n_claimed_by.get(&key).copied().unwrap_or(0)
    }

    /// The pieces that `key` owns, ascending.
    pub(super) fn claims_of(&self, key: SourceKey) -> Vec<u32> {
        let owned = |claimed: &Claimed| claimed.owners.iter().any(|owner| owner.key == key);
        self.claimed.iter().filter(|(_, claimed)| owned(claimed)).map(|(piece, _)| *piece).collect()
    }

    pub(super) fn claimed(&self, piece: u32) -> Option<&Claimed> {
        self.claimed.get(&piece)
    }

    /// Claimed pieces of `have` that `key` does not own, ascending.
    pub(super) fn claimed_by_others(&self, key: SourceKey, have: &Have) -> impl Iterator<Item = (u32, &Claimed)> {
        let by_others = move |claimed: &Claimed| claimed.owners.iter().all(|owner| owner.key != key);
        let pieces = self.claimed.iter().map(|(piece, claimed)| (*piece, claimed));
        pieces.filter(move |(piece, claimed)| have.contains(*piece) && by_others(claimed))
    }

    /// Up to `limit` free pieces of `have`, the rarest first; of equal ones those from `preferred` on if that is free,
    /// else those from `start` on, around the end.
    pub(super) fn free_in(&self, have: &Have, preferred: Option<u32>, start: u32, limit: usize) -> Vec<u32> {
        let mut found = Vec::new();
        for class in self.free.iter().filter(|class| !class.is_empty()) {
            let from = preferred.filter(|at| class.contains(*at) && have.contains(*at)).unwrap_or(start);
            for (mut at, end) in [(from, self.n_pieces), (0, from)] {
                while found.len() < limit
                    && let Some(piece) = have.next_in(class, at)
                    && piece < end
                {
                    found.push(piece);
                    at = piece + 1;
                }
            }
        }
        found
    }

    /// A source offers all of `have`, or (not `more`) does so no longer.
    pub(super) fn count(&mut self, have: &Have, more: bool) {
        match have {
            Have::All if more => self.n_complete += 1,
            Have::All => self.n_complete -= 1,
            Have::Some(pieces) => pieces.iter().for_each(|piece| self.count_piece(piece, more)),
        }
    }

    /// A partial source offers the piece, or (not `more`) does so no longer.
    pub(super) fn count_piece(&mut self, piece: u32, more: bool) {
        let before = self.rarity(piece);
        let n = &mut self.n_partial[piece as usize];
        *n = if more { *n + 1 } else { *n - 1 };
        match (more, *n) {
            _ if self.done.contains(piece) => {}
            (true, 1) => self.n_without_partial -= 1,
            (false, 0) => self.n_without_partial += 1,
            _ => {}
        }
        let after = self.rarity(piece);
        if before != after && self.free[before].remove(piece) {
            self.free[after].insert(piece);
        }
    }

    fn rarity(&self, piece: u32) -> usize {
        usize::from(self.n_partial[piece as usize]).min(RARITY_CLASSES - 1)
    }

    fn unload(&mut self, key: SourceKey) {
        if let Some(n) = self.n_claimed_by.get_mut(&key) {
            *n -= 1;
            if *n == 0 {
                self.n_claimed_by.remove(&key);
            }
        }
    }

    /// Panics unless the counts agree with the pieces. Walks over everything.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let (mut n_without_partial, mut n_claims, mut n_free) = (0, 0, 0);
        for piece in 0..self.n_pieces {
            let owners = self.claimed.get(&piece).map(|claimed| claimed.owners.len());
            match (self.is_done(piece), owners, self.free[self.rarity(piece)].contains(piece)) {
                (true, None, false) | (false, Some(1..=MAX_OWNERS), false) => {}
                (false, None, true) => n_free += 1,
                state => panic!("piece {piece} is in no state, or in several: {state:?}"),
            }
            n_claims += owners.unwrap_or(0);
            n_without_partial += u32::from(!self.is_done(piece) && self.n_partial[piece as usize] == 0);
        }
        assert_eq!(n_free, self.free.iter().map(PieceSet::len).sum::<u32>(), "free in one set only");
        assert_eq!(n_without_partial, self.n_without_partial);
        assert_eq!(n_claims, self.n_claimed_by.values().map(|n| *n as usize).sum::<usize>());
    }
}

impl Have {
    /// The pieces of a map that lie below `n_pieces`.
    pub(super) fn new(map: &HaveMap, n_pieces: u32) -> Self {
        if map.is_complete() && map.len() == n_pieces {
            return Self::All;
        }
        let mut pieces = PieceSet::empty(n_pieces);
        for piece in map.iter().take_while(|piece| *piece < n_pieces) {
            pieces.insert(piece);
        }
        Self::Some(pieces)
    }

    pub(super) fn contains(&self, piece: u32) -> bool {
        match self {
            Self::All => true,
            Self::Some(pieces) => pieces.contains(piece),
        }
    }

    fn next_in(&self, wanted: &PieceSet, from: u32) -> Option<u32> {
        match self {
            Self::All => wanted.next(from),
            Self::Some(pieces) => wanted.next_common(pieces, from),
        }
    }
}
