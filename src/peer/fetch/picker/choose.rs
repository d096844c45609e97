//! What a source shall do next: how much of what is free, what was promised to others, what is worth a race.
//!
//! Invariant: what is handed out is had by the source, and claimed for it before anybody else is asked.

use super::pieces::{Among, Have};
use super::{MAX_PIECE_TIME, Next, Offences, Picker, Source, SourceKey};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// A race must bring the piece in less than its owner's remaining time divided by this ...
const RACE_FACTOR: u32 = 2;
/// ... and gain more than this, or it is not worth the double bytes.
const RACE_MIN_GAIN: Duration = Duration::from_millis(100);
/// ... or than this, if a source has several connections: those share a line, and what one wins the others lose, unless
/// one is stuck.
const RACE_BESIDE_GAIN: Duration = Duration::from_millis(400);
/// Over a busy line they race nevertheless, if a piece takes less than [`RACE_MIN_GAIN`], for what one has that is so many
/// times slower: the second copy costs little of the line, which idles for long when all else is here. 64 MiB at 100 Mbit/s
/// over 50 ms waited 0.8 s for a piece that came with 0.2 Mbit/s.
const FAR_BEHIND: u32 = 8;
/// A promised piece is not asked of a complete source for so many times what one takes there, within bounds.
const HOLD_PIECES: u32 = 4;
/// All receivers together ask a complete source for one free piece in so many at once ...
const SPREAD: u32 = 16;
/// ... but for so many, and each for one: then first copies are whole soon and nobody waits for another's long claim.
const LEAST_SPREAD: u32 = 16;
const SHORTEST_HOLD: Duration = Duration::from_millis(500);
const LONGEST_HOLD: Duration = Duration::from_secs(10);

impl Picker {
    /// Work for a further connection of `source`, as [`next`](Self::next) finds it: it has what the source has, and a speed
    /// and claims of its own as `key`, so that what waits on a slow one is fetched over another. It makes nothing less rare.
    pub fn next_beside(
        &mut self,
        source: SourceKey,
        key: SourceKey,
        (max_pieces, expected): (u32, Duration),
        now: Instant,
    ) -> Next {
        if self.is_done() {
            return Next::Done;
        }
        let is_doubtful =
            |offences: &Offences| offences.on_probation || now < offences.banned_until;
        let is_doubtful = self.offences.get(&source).is_some_and(is_doubtful);
        if is_doubtful || !self.put_beside(source, key) {
            return Next::Wait(None);
        }
        self.next(key, max_pieces, expected, now)
    }

    /// Lets a further connection of `source` have what the source has. False if that is nobody.
    fn put_beside(&mut self, source: SourceKey, key: SourceKey) -> bool {
        let Some(first) = self.sources.get_mut(&source) else {
            return false;
        };
        first.has_beside = true;
        let have = first.have.clone();
        let beside = self
            .sources
            .entry(key)
            .or_insert_with(|| Source::new(source, have.clone()));
        (beside.have, beside.idle_since, beside.has_beside) = (have, None, true);
        true
    }

    /// Whether a source's line is as busy as it can be: then no connection of it races for what another one was asked for.
    pub fn set_line_busy(&mut self, source: SourceKey, is_busy: bool) {
        if let Some(first) = self.sources.get_mut(&source) {
            first.is_line_busy = is_busy;
        }
    }

    /// The source was asked for these pieces, over the connection `key`, before this picker was there to say so: they are
    /// its claim now, unless one of them is done or somebody else's. False if they are not.
    pub fn adopt(
        &mut self,
        (source, key): (SourceKey, SourceKey),
        pieces: &[u32],
        expected: Duration,
        now: Instant,
    ) -> bool {
        let is_free = |piece: &u32| !self.has(*piece) && self.owners(*piece).next().is_none();
        let n = u32::try_from(pieces.len()).unwrap_or(u32::MAX).max(1);
        let has = |source: &Source| {
            source.counted && pieces.iter().all(|piece| source.have.contains(*piece))
        };
        let fits = pieces
            .iter()
            .all(|piece| *piece < self.board.n_pieces() && is_free(piece));
        if !fits
            || !self.sources.get(&source).is_some_and(has)
            || key != source && !self.put_beside(source, key)
        {
            return false;
        }
        let Some(connection) = self.sources.get_mut(&key) else {
            return false;
        };
        connection.piece_time = (expected / n).clamp(Duration::from_nanos(1), MAX_PIECE_TIME);
        self.claim(key, pieces, now);
        true
    }

    /// What the source shall do about the free pieces that it has; none if there are none.
    pub(super) fn free_for(
        &mut self,
        key: SourceKey,
        max_pieces: u32,
        start: u32,
        now: Instant,
    ) -> Option<Next> {
        let source = &self.sources[&key];
        let order = (source.cursor, start);
        if !self.board.has_free_in(&source.have) {
            let n_freed = self.board.n_freed();
            self.sources.get_mut(&key)?.idle_since = Some(n_freed);
            return None;
        }
        let share = self.fair_share(key, now);
        // A slow connection is not to hold more at the end than it can bring while the others fetch the rest.
        if source.has_beside && share == 0 && self.board.claims().n_of(key) > 0 {
            return Some(Next::Wait(None));
        }
        if matches!(source.have, Have::Some(_)) {
            let limit = share.clamp(1, max_pieces);
            let pieces = self
                .board
                .free_in(&source.have, Among::All, order, limit as usize);
            self.claim(key, &pieces, now);
            return Some(Next::Claim(pieces));
        }
        let is_repeat = self.board.n_unpromised() == 0;
        let hold = (source.piece_time * HOLD_PIECES).clamp(SHORTEST_HOLD, LONGEST_HOLD);
        if is_repeat
            && self.can_come_from_others()
            && let Some(until) = self.board.held_until(hold, now)
        {
            return Some(Next::Wait(Some(until)));
        }
        let room = self.room(key);
        if room == 0 {
            return Some(Next::Wait(None));
        }
        let limit = share.clamp(1, max_pieces).min(room);
        let among = if is_repeat {
            Among::All
        } else {
            Among::Unpromised
        };
        let pieces = self
            .board
            .free_in(&source.have, among, order, limit as usize);
        self.claim(key, &pieces, now);
        Some(if is_repeat {
            Next::Repeat(pieces)
        } else {
            Next::Claim(pieces)
        })
    }

    /// Is anybody known who could have been promised a piece? Else the promise is a lie, or was made to one who left.
    fn can_come_from_others(&self) -> bool {
        self.sources
            .values()
            .any(|source| source.counted && matches!(source.have, Have::Some(_)))
    }

    /// Sources that fetch the same themselves.
    fn n_receivers(&self) -> u32 {
        let receivers = self
            .sources
            .values()
            .filter(|source| source.counted && source.is_receiver)
            .count();
        u32::try_from(receivers).unwrap_or(u32::MAX)
    }

    /// How many pieces more a complete source may be asked for, so that the other receivers get theirs.
    fn room(&self, key: SourceKey) -> u32 {
        let receivers = self.n_receivers();
        if receivers == 0 {
            return u32::MAX;
        }
        let free = match self.board.n_unpromised() {
            0 => self.board.n_free(),
            unpromised => unpromised,
        };
        let most = (free / SPREAD).max(LEAST_SPREAD) / receivers.saturating_add(1);
        most.max(1).saturating_sub(self.board.claims().n_of(key))
    }

    pub(super) fn claim(&mut self, key: SourceKey, pieces: &[u32], now: Instant) {
        let n_claimed = self.board.claims().n_of(key);
        let source = self
            .sources
            .get_mut(&key)
            .expect("only a known source claims");
        let mut due = source.free_at(n_claimed, now);
        for &piece in pieces {
            due += source.piece_time;
            self.board.claim(key, piece, due, now);
        }
        source.busy_until = Some(due);
        source.cursor = pieces.last().map(|last| last + 1);
    }

    /// How many pieces more the source can do until all sources at work, itself included, are through with what can be
    /// fetched.
    fn fair_share(&self, key: SourceKey, now: Instant) -> u32 {
        let at_work = |other: SourceKey, source: &Source| {
            other == key || self.board.claims().n_of(other) > 0 && !source.is_behind(now)
        };
        let rates = self
            .sources
            .iter()
            .filter(|(other, source)| at_work(**other, source));
        let all: u64 = rates.map(|(_, source)| source.pieces_per_hour()).sum();
        let work = u64::from(self.board.wanted());
        let share = (work * self.sources[&key].pieces_per_hour()).div_ceil(all);
        u32::try_from(share)
            .unwrap_or(u32::MAX)
            .saturating_sub(self.board.claims().n_of(key))
    }

    /// Pieces that others were asked for and that the source should fetch as well: the late ones first, then those whose
    /// owner needs longest.
    pub(super) fn worth_stealing(&self, key: SourceKey, limit: usize, now: Instant) -> Vec<u32> {
        let source = &self.sources[&key];
        let race_gain = if source.has_beside {
            RACE_BESIDE_GAIN
        } else {
            RACE_MIN_GAIN
        };
        let is_line_busy = self
            .sources
            .get(&source.first)
            .is_some_and(|first| first.is_line_busy);
        let is_cheap = source.piece_time < RACE_MIN_GAIN;
        let keeps_up =
            |owner: &Source| !is_cheap || owner.piece_time <= source.piece_time * FAR_BEHIND;
        let is_beside = |owner: &Source| owner.first == source.first && keeps_up(owner);
        let is_beside = |owner| self.sources.get(&owner).is_some_and(is_beside);
        let fits = |piece| {
            self.is_others(key, &source.have, piece)
                && !(is_line_busy && self.board.claims().owners(piece).any(is_beside))
        };
        let late = self
            .board
            .claims()
            .late(now)
            .filter(|piece| fits(*piece))
            .take(limit);
        let mut candidates: BTreeSet<(Reverse<Duration>, u32)> =
            late.map(|piece| (Reverse(Duration::MAX), piece)).collect();
        let mut needs = source.free_at(self.board.claims().n_of(key), now) - now;
        // The uplink of a source that many receivers want is worth more than a piece sooner for one of them.
        let is_wanted_by_many = matches!(source.have, Have::All) && self.n_receivers() > 0;
        if self.board.is_tail() && !is_wanted_by_many {
            let more_than = (needs + source.piece_time) * RACE_FACTOR + race_gain;
            let slow = self
                .board
                .claims()
                .slow(now, more_than, limit, fits)
                .into_iter();
            candidates.extend(slow.map(|(left, piece)| (Reverse(left), piece)));
        }
        if candidates.is_empty() {
            return Vec::new();
        }
        let mut picked = Vec::new();
        let share = self.fair_share(key, now).max(1) as usize;
        for (Reverse(left), piece) in candidates.into_iter().take(limit.min(share)) {
            needs += source.piece_time;
            if left <= needs * RACE_FACTOR + race_gain {
                break;
            }
            picked.push(piece);
        }
        picked.sort_unstable();
        picked
    }

    /// Whether sources other than `key` own the piece, which `have` has.
    pub(super) fn is_others(&self, key: SourceKey, have: &Have, piece: u32) -> bool {
        have.contains(piece) && self.board.claims().owners(piece).all(|owner| owner != key)
    }
}
