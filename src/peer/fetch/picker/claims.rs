//! Who was asked for which piece, and when it is expected.
//!
//! Invariant: a claimed piece has one or two owners, and every index holds exactly what follows from the owners. A piece
//! changes hands in the logarithm of what is under way; the searches look only at what can answer them.

use super::SourceKey;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// A piece is late when its owner has taken twice the time it was expected in, and at least this much longer.
pub(super) const LATE_SLACK: Duration = Duration::from_secs(1);
/// How many times longer than expected it may take: a source's speed halves when one more receiver comes, and where
/// many share a line the next piece easily takes thrice as long as the last.
const LATE_FACTOR: u32 = 3;
/// An owner is taken to need still at least its whole time divided by this: no speed is known better.
const DOUBT: u32 = 8;
/// Each further owner doubles the patience with the next, up to this many times: should all sources be slower than
/// expected, pieces do not fly between them.
const MAX_PATIENCE_DOUBLINGS: u32 = 6;
/// More owners than two do not bring a piece any faster, only more often.
pub(super) const MAX_OWNERS: usize = 2;
/// How many claims are looked at for the next instant at which a source may have work. More only make it exact.
const LATE_LOOKS: usize = 64;

/// A piece that is under way.
#[derive(Debug, Default)]
struct Claimed {
    /// The first to be asked first.
    owners: Vec<Owner>,
    n_takeovers: u32,
}

/// A source that was asked for a piece.
#[derive(Clone, Copy, Debug)]
struct Owner {
    key: SourceKey,
    /// When the piece is expected.
    due: Instant,
    /// How long it was to take.
    expected: Duration,
    /// When others may take it.
    late: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Claims {
    pieces: BTreeMap<u32, Claimed>,
    by_owner: BTreeMap<SourceKey, BTreeSet<u32>>,
    by_late: BTreeSet<(Instant, u32, SourceKey)>,
    /// Of pieces with one owner.
    by_due: BTreeSet<(Instant, u32)>,
    /// Of pieces with one owner.
    by_expected: BTreeSet<(Duration, u32)>,
}

impl Claims {
    pub(super) fn contains(&self, piece: u32) -> bool {
        self.pieces.contains_key(&piece)
    }

    pub(super) fn owners(&self, piece: u32) -> impl Iterator<Item = SourceKey> {
        self.pieces
            .get(&piece)
            .into_iter()
            .flat_map(|claimed| claimed.owners.iter().map(|owner| owner.key))
    }

    /// Makes `key`, which owns it not yet, an owner of the piece. Of two owners the one that is late for longer gives way.
    pub(super) fn add(&mut self, key: SourceKey, piece: u32, due: Instant, now: Instant) {
        self.change(piece, |claimed| {
            claimed.n_takeovers += u32::from(!claimed.owners.is_empty());
            if claimed.owners.len() == MAX_OWNERS {
                let first = usize::from(claimed.owners[1].late < claimed.owners[0].late);
                claimed.owners.remove(first);
            }
            let patience = 1 << claimed.n_takeovers.min(MAX_PATIENCE_DOUBLINGS);
            let expected = due.saturating_duration_since(now);
            let late = due + LATE_SLACK.max(expected * LATE_FACTOR) * patience;
            claimed.owners.push(Owner {
                key,
                due,
                expected,
                late,
            });
        });
    }

    /// `key` no longer owns the piece; true if it did and was the last.
    pub(super) fn remove(&mut self, key: SourceKey, piece: u32) -> bool {
        if !self.owners(piece).any(|owner| owner == key) {
            return false;
        }
        self.change(piece, |claimed| {
            claimed.owners.retain(|owner| owner.key != key)
        });
        !self.contains(piece)
    }

    /// What `key` owns is late now.
    pub(super) fn hurry(&mut self, key: SourceKey, now: Instant) {
        for piece in self.of(key) {
            self.change(piece, |claimed| {
                let of_key = claimed.owners.iter_mut().filter(|owner| owner.key == key);
                of_key.for_each(|owner| owner.late = owner.late.min(now));
            });
        }
    }

    /// Nobody owns the piece.
    pub(super) fn clear(&mut self, piece: u32) {
        if self.contains(piece) {
            self.change(piece, |claimed| claimed.owners.clear());
        }
    }

    /// How many pieces `key` owns.
    pub(super) fn n_of(&self, key: SourceKey) -> u32 {
        self.by_owner
            .get(&key)
            .map_or(0, |pieces| u32::try_from(pieces.len()).unwrap_or(u32::MAX))
    }

    /// The pieces that `key` owns, ascending.
    pub(super) fn of(&self, key: SourceKey) -> Vec<u32> {
        self.by_owner
            .get(&key)
            .into_iter()
            .flatten()
            .copied()
            .collect()
    }

    /// Pieces with an owner that is late, the longest first; those with two such owners twice.
    pub(super) fn late(&self, now: Instant) -> impl Iterator<Item = u32> {
        self.by_late
            .range(..=(now, u32::MAX, SourceKey(u32::MAX)))
            .map(|(_, piece, _)| *piece)
    }

    /// The next instant at which one of the pieces that `fits` becomes late, or one somewhat before it.
    pub(super) fn next_late(&self, now: Instant, fits: impl Fn(u32) -> bool) -> Option<Instant> {
        let coming = self
            .by_late
            .range((now, u32::MAX, SourceKey(u32::MAX))..)
            .enumerate();
        let mut found = coming.filter(|(i, (_, piece, _))| *i == LATE_LOOKS || fits(*piece));
        found.next().map(|(_, (late, ..))| *late)
    }

    /// Of the pieces that `fits` and that have one owner, those `limit` that it will need longest for, if that is longer
    /// than `more_than`; with that time, and some twice.
    pub(super) fn slow(
        &self,
        now: Instant,
        more_than: Duration,
        limit: usize,
        fits: impl Fn(u32) -> bool,
    ) -> Vec<(Duration, u32)> {
        let by_due = self
            .by_due
            .range((now + more_than, u32::MAX)..)
            .rev()
            .map(|(_, piece)| *piece);
        let by_doubt = self
            .by_expected
            .range((more_than * DOUBT, u32::MAX)..)
            .rev()
            .map(|(_, piece)| *piece);
        let pieces = by_due.filter(|piece| fits(*piece)).take(limit);
        let pieces = pieces.chain(by_doubt.filter(|piece| fits(*piece)).take(limit));
        let left = |owner: &Owner| {
            owner
                .due
                .saturating_duration_since(now)
                .max(owner.expected / DOUBT)
        };
        pieces
            .map(|piece| (left(&self.pieces[&piece].owners[0]), piece))
            .collect()
    }

    fn change(&mut self, piece: u32, change: impl FnOnce(&mut Claimed)) {
        let mut claimed = self.pieces.remove(&piece).unwrap_or_default();
        for owner in &claimed.owners {
            self.by_late.remove(&(owner.late, piece, owner.key));
            if let Some(pieces) = self.by_owner.get_mut(&owner.key) {
                pieces.remove(&piece);
                if pieces.is_empty() {
                    self.by_owner.remove(&owner.key);
                }
            }
        }
        if let [owner] = claimed.owners[..] {
            self.by_due.remove(&(owner.due, piece));
            self.by_expected.remove(&(owner.expected, piece));
        }
        change(&mut claimed);
        for owner in &claimed.owners {
            self.by_late.insert((owner.late, piece, owner.key));
            self.by_owner.entry(owner.key).or_default().insert(piece);
        }
        if let [owner] = claimed.owners[..] {
            self.by_due.insert((owner.due, piece));
            self.by_expected.insert((owner.expected, piece));
        }
        if !claimed.owners.is_empty() {
            self.pieces.insert(piece, claimed);
        }
    }

    /// Panics unless the indexes agree with the owners. Walks over everything.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let owners = || {
            self.pieces
                .iter()
                .flat_map(|(piece, claimed)| claimed.owners.iter().map(|o| (*piece, *o)))
        };
        let single = || {
            self.pieces
                .iter()
                .filter(|(_, claimed)| claimed.owners.len() == 1)
        };
        assert!(
            self.pieces
                .values()
                .all(|claimed| (1..=MAX_OWNERS).contains(&claimed.owners.len()))
        );
        assert!(
            self.by_late
                == owners()
                    .map(|(piece, owner)| (owner.late, piece, owner.key))
                    .collect()
        );
        assert!(
            self.by_due
                == single()
                    .map(|(piece, claimed)| (claimed.owners[0].due, *piece))
                    .collect()
        );
        assert!(
            self.by_expected
                == single()
                    .map(|(piece, claimed)| (claimed.owners[0].expected, *piece))
                    .collect()
        );
        let mut by_owner: BTreeMap<SourceKey, BTreeSet<u32>> = BTreeMap::new();
        owners()
            .for_each(|(piece, owner)| _ = by_owner.entry(owner.key).or_default().insert(piece));
        assert_eq!(self.by_owner, by_owner);
    }
}
