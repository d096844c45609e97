//! The state of every piece of a Download.
//!
//! Invariant: every piece is in exactly one state: done; local, brought by this machine itself; claimed, with one or two
//! owners; or free, in the one set of `free` that its rarity and promise name.
//!
//! A piece changes hands in constant time (and the logarithm of what is under way), a search leaps over gaps.

use super::SourceKey;
use super::claims::Claims;
use super::piece_set::PieceSet;
use super::promises::{Moment, Promises};
use crate::have::HaveMap;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Sets of free pieces by rarity; the last holds all that this many partial sources or more have.
const RARITY_CLASSES: usize = 16;

/// What a source has.
#[derive(Clone, Debug)]
pub(super) enum Have {
    /// Every piece; without a set, because most sources are complete.
    All,
    /// These pieces.
    Some(PieceSet),
}

/// Which free pieces a search may find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Among {
    /// All of them.
    All,
    /// Those that are promised to nobody else.
    Unpromised,
}

#[derive(Debug)]
pub(super) struct Board {
    n_pieces: u32,
    done: PieceSet,
    local: BTreeMap<u32, SourceKey>,
    claims: Claims,
    /// By how many partial sources have it; complete ones raise all pieces alike and do not matter. First those that are
    /// promised to nobody else, then the same for those that are.
    free: Vec<PieceSet>,
    n_free: u32,
    /// How often a piece became free.
    n_freed: u64,
    promises: Promises,
    /// The promised ones of `free`.
    promised: BTreeSet<(Moment, u32)>,
    n_partial: Vec<u16>,
    n_complete: u32,
    /// Pieces that are neither done nor local and that no partial source has.
    n_without_partial: u32,
}

impl Board {
    pub(super) fn new(n_pieces: u32) -> Self {
        let mut free = vec![PieceSet::empty(n_pieces); 2 * RARITY_CLASSES];
        free[0] = PieceSet::full(n_pieces);
        Self {
            n_pieces,
            done: PieceSet::empty(n_pieces),
            local: BTreeMap::new(),
            claims: Claims::default(),
            free,
            n_free: n_pieces,
            n_freed: 0,
            promises: Promises::default(),
            promised: BTreeSet::new(),
            n_partial: vec![0; n_pieces as usize],
            n_complete: 0,
            n_without_partial: n_pieces,
        }
    }

    pub(super) fn n_pieces(&self) -> u32 {
        self.n_pieces
    }

    /// `more` pieces follow the last one, free and had by nobody that is partial; complete sources have them.
    pub(super) fn grow(&mut self, more: u32) {
        let (first, n_pieces) = (self.n_pieces, self.n_pieces + more);
        self.n_pieces = n_pieces;
        self.done.grow(n_pieces);
        self.free.iter_mut().for_each(|class| class.grow(n_pieces));
        self.n_partial.resize(n_pieces as usize, 0);
        self.promises.grow(n_pieces);
        self.n_without_partial += more;
        (first..n_pieces).for_each(|piece| self.put_free(piece));
    }

    pub(super) fn claims(&self) -> &Claims {
        &self.claims
    }

    pub(super) fn is_done(&self, piece: u32) -> bool {
        self.done.contains(piece)
    }

    /// Pieces that are not done.
    pub(super) fn remaining(&self) -> u32 {
        self.n_pieces - self.done.len()
    }

    /// Pieces that are neither done nor local and that no counted source has.
    pub(super) fn unavailable(&self) -> u32 {
        if self.n_complete > 0 {
            0
        } else {
            self.n_without_partial
        }
    }

    /// Pieces that sources shall bring and can.
    pub(super) fn wanted(&self) -> u32 {
        self.remaining() - u32::try_from(self.local.len()).unwrap_or(u32::MAX) - self.unavailable()
    }

    /// True if every piece that some source has is done, local or claimed.
    pub(super) fn is_tail(&self) -> bool {
        self.n_free == self.unavailable()
    }

    pub(super) fn n_free(&self) -> u32 {
        self.n_free
    }

    /// Free pieces that are promised to nobody else.
    pub(super) fn n_unpromised(&self) -> u32 {
        self.n_free - u32::try_from(self.promised.len()).unwrap_or(u32::MAX)
    }

    /// How often a piece became free: who found none finds none as long as this stays and it gets no new piece.
    pub(super) fn n_freed(&self) -> u64 {
        self.n_freed
    }

    /// Who is to bring this piece.
    pub(super) fn owners(&self, piece: u32) -> impl Iterator<Item = SourceKey> {
        self.local
            .get(&piece)
            .copied()
            .into_iter()
            .chain(self.claims.owners(piece))
    }

    /// The piece is done, whoever was asked for it; false if it was already, or is none.
    pub(super) fn settle(&mut self, piece: u32) -> bool {
        if piece >= self.n_pieces || self.is_done(piece) {
            return false;
        }
        if self.local.remove(&piece).is_none() {
            self.take_free(piece);
            self.claims.clear(piece);
            self.n_without_partial -= u32::from(self.n_partial[piece as usize] == 0);
        }
        self.promises.forget(piece);
        self.done.insert(piece)
    }

    /// The piece is free again if it was done.
    pub(super) fn lose(&mut self, piece: u32) {
        if self.done.remove(piece) {
            self.n_without_partial += u32::from(self.n_partial[piece as usize] == 0);
            self.put_free(piece);
        }
    }

    /// This machine itself brings the piece, if it is free.
    pub(super) fn claim_local(&mut self, key: SourceKey, piece: u32) {
        if piece < self.n_pieces && self.take_free(piece) {
            self.n_without_partial -= u32::from(self.n_partial[piece as usize] == 0);
            self.local.insert(piece, key);
        }
    }

    /// Makes `key`, which owns it not yet, an owner of a piece that is free or claimed. Of two owners the one that is late
    /// for longer gives way.
    pub(super) fn claim(&mut self, key: SourceKey, piece: u32, due: Instant, now: Instant) {
        self.take_free(piece);
        self.claims.add(key, piece, due, now);
    }

    /// `key` no longer owns the piece, if it did; without another owner the piece is free.
    pub(super) fn disown(&mut self, key: SourceKey, piece: u32) {
        if self.local.get(&piece) == Some(&key) {
            self.local.remove(&piece);
            self.n_without_partial += u32::from(self.n_partial[piece as usize] == 0);
            self.put_free(piece);
        } else if self.claims.remove(key, piece) {
            self.put_free(piece);
        }
    }

    /// What `key` owns is late now.
    pub(super) fn hurry(&mut self, key: SourceKey, now: Instant) {
        self.claims.hurry(key, now);
    }

    pub(super) fn is_promised(&self, piece: u32) -> bool {
        self.promises.since(piece).is_some()
    }

    /// A complete source promised the piece to another receiver. The first promise counts.
    pub(super) fn promise(&mut self, piece: u32, now: Instant) {
        if piece >= self.n_pieces || self.is_done(piece) || self.promises.since(piece).is_some() {
            return;
        }
        let was_free = self.take_free(piece);
        self.promises.note(piece, self.n_pieces, now);
        if was_free {
            self.insert_free(piece);
        }
    }

    /// When the first of the free pieces that were promised less than `hold` ago will have been promised that long ago.
    pub(super) fn held_until(&self, hold: Duration, now: Instant) -> Option<Instant> {
        let mut young = self.promised.range((self.promises.within(hold, now), 0)..);
        Some(self.promises.instant(young.next()?.0)? + hold)
    }

    /// Whether any piece of `have` is free.
    pub(super) fn has_free_in(&self, have: &Have) -> bool {
        self.n_free > 0
            && self
                .free
                .iter()
                .any(|class| !class.is_empty() && have.next_in(class, 0).is_some())
    }

    /// Up to `limit` free pieces of `have`, the rarest first; of equal ones those from `preferred` on if that is free,
    /// else those from `start` on, around the end.
    pub(super) fn free_in(
        &self,
        have: &Have,
        among: Among,
        (preferred, start): (Option<u32>, u32),
        limit: usize,
    ) -> Vec<u32> {
        let (unpromised, promised) = self.free.split_at(RARITY_CLASSES);
        let classes = unpromised
            .iter()
            .zip(promised)
            .flat_map(|(one, other)| [(one, true), (other, among == Among::All)]);
        let mut found = Vec::new();
        for (class, _) in classes.filter(|(class, allowed)| *allowed && !class.is_empty()) {
            let from = preferred
                .filter(|at| class.contains(*at) && have.contains(*at))
                .unwrap_or(start);
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
            Have::Some(pieces) => pieces
                .iter()
                .for_each(|piece| self.count_piece(piece, more)),
        }
    }

    /// A partial source offers the piece, or (not `more`) does so no longer.
    pub(super) fn count_piece(&mut self, piece: u32, more: bool) {
        let before = self.class(piece);
        let n = &mut self.n_partial[piece as usize];
        *n = if more { *n + 1 } else { *n - 1 };
        match (more, *n) {
            _ if self.done.contains(piece) || self.local.contains_key(&piece) => {}
            (true, 1) => self.n_without_partial -= 1,
            (false, 0) => self.n_without_partial += 1,
            _ => {}
        }
        let after = self.class(piece);
        if before != after && self.free[before].remove(piece) {
            self.free[after].insert(piece);
        }
    }

    fn class(&self, piece: u32) -> usize {
        let rarity = usize::from(self.n_partial[piece as usize]).min(RARITY_CLASSES - 1);
        if self.promises.since(piece).is_some() {
            RARITY_CLASSES + rarity
        } else {
            rarity
        }
    }

    fn put_free(&mut self, piece: u32) {
        self.n_freed += 1;
        self.insert_free(piece);
    }

    fn insert_free(&mut self, piece: u32) {
        let class = self.class(piece);
        self.free[class].insert(piece);
        self.n_free += 1;
        if let Some(since) = self.promises.since(piece) {
            self.promised.insert((since, piece));
        }
    }

    /// True if it was free.
    fn take_free(&mut self, piece: u32) -> bool {
        let class = self.class(piece);
        let was_free = self.free[class].remove(piece);
        self.n_free -= u32::from(was_free);
        if let Some(since) = self.promises.since(piece).filter(|_| was_free) {
            self.promised.remove(&(since, piece));
        }
        was_free
    }

    /// Panics unless the counts agree with the pieces. Walks over everything.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let (mut n_without_partial, mut n_free, mut promised) = (0, 0, BTreeSet::new());
        for piece in 0..self.n_pieces {
            let is_free = self.free[self.class(piece)].contains(piece);
            let is_local = self.local.contains_key(&piece);
            let states = [
                self.is_done(piece),
                is_local,
                self.claims.contains(piece),
                is_free,
            ];
            assert_eq!(
                states.into_iter().filter(|is| *is).count(),
                1,
                "piece {piece} is in one state: {states:?}"
            );
            n_free += u32::from(is_free);
            let is_bare = !self.is_done(piece) && !is_local && self.n_partial[piece as usize] == 0;
            n_without_partial += u32::from(is_bare);
            if let Some(since) = self.promises.since(piece) {
                assert!(!self.is_done(piece));
                promised.extend(is_free.then_some((since, piece)));
            }
        }
        assert_eq!(
            (n_free, n_free),
            (self.n_free, self.free.iter().map(PieceSet::len).sum()),
            "free in one set only"
        );
        assert_eq!(n_without_partial, self.n_without_partial);
        assert_eq!(promised, self.promised);
        self.claims.check();
    }
}

impl Have {
    /// The pieces of a map that lie below `n_pieces`.
    pub(super) fn new(map: &HaveMap, n_pieces: u32) -> Self {
        if map.is_complete() && map.len() == n_pieces {
            return Self::All;
        }
        Self::Some(PieceSet::of(map, n_pieces))
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
