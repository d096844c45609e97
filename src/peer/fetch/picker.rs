//! Which pieces to ask of which source.
//!
//! Pure: no I/O, no clock; time is an argument and chance comes from a seed. The pieces of a Download are numbered 0..n
//! across all of its contents; the caller maps numbers to contents.
//!
//! - **Rarest first.** Of equally rare pieces a source goes on where its last claim ended, else starts anywhere: random
//!   ties, but long runs, so that a claim is few ranges and disks read forward.
//! - **Fair share.** A claim is cut to what the source can do while the others finish the rest, so that all end together.
//! - **Tail.** While a source has a free piece to fetch, no piece gets a second owner. With none left it may join the
//!   owner of a late piece; and once nothing is free for anyone it races for pieces that it will have in less than half
//!   the time their owner still needs. Two owners at most: that bounds the waste. Connections to one source do not race
//!   with one another while their line is busy, unless one is far behind and a piece costs little of it.
//! - **Promises.** A complete source that serves others tells what it promised them. Such pieces soon come from the
//!   others as well, so of complete sources they are asked last, and only when the first copies had their time. While
//!   there are other receivers, a complete source is asked for few pieces at once: simulated with 1 to 16 receivers on
//!   equal links, the last one is then done within 1.13 of the bound, and the seed sends each piece once.
//! - **Local pieces.** What this machine itself is about to bring is nobody's to fetch, until that fails.
//! - **Bans.** A source that sent wrong bytes loses its claims and offers nothing for a time that doubles with each
//!   offence; then it gets single pieces until one is good. So it wastes one piece per ban.
//!
//! Invariant: a claimed piece is had by each of its owners, and none of them is banned. `pieces.rs` keeps the pieces and
//! says what a step costs; adding, replacing or banning a partial source walks over the pieces it has.

mod choose;
mod claims;
#[cfg(test)]
mod fan_out;
mod piece_set;
mod pieces;
mod promises;
#[cfg(test)]
mod simulation;

use crate::have::HaveMap;
use claims::LATE_SLACK;
use piece_set::PieceSet;
use pieces::{Board, Have};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The ban after the first wrong piece; each further one doubles it.
const FIRST_BAN: Duration = Duration::from_secs(30);
const LONGEST_BAN: Duration = Duration::from_secs(3600);
/// Bounds a claim's arithmetic, whatever the caller expects.
const MAX_PIECE_TIME: Duration = Duration::from_secs(3600);

/// A source as the caller numbers it. Bans go by it: a peer that comes back must get its old key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceKey(pub u32);

/// What a source shall do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Fetch these pieces, which nobody else fetches. In the order to ask for them: mostly one run.
    Claim(Vec<u32>),
    /// Fetch these second copies, which nobody else fetches, but which this complete source promised to other receivers as
    /// well. In the order to ask for them.
    Repeat(Vec<u32>),
    /// Fetch these, although another source was asked for them. Ascending.
    Steal(Vec<u32>),
    /// Nothing for this source. Ask again when any source's pieces, claims or presence changed, and at this instant.
    Wait(Option<Instant>),
    /// Every piece is done.
    Done,
}

impl Next {
    /// The pieces to fetch; none while there is nothing to do.
    #[must_use]
    pub fn pieces(&self) -> &[u32] {
        match self {
            Self::Claim(pieces) | Self::Repeat(pieces) | Self::Steal(pieces) => pieces,
            Self::Wait(_) | Self::Done => &[],
        }
    }
}

/// What a source has of a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Every piece.
    All,
    /// It fetches the content as well; which pieces it has comes piece by piece.
    Part,
    /// No piece.
    Nothing,
}

/// What a verified piece was good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// It was missing.
    New,
    /// It had come before.
    Duplicate,
}

/// The pieces of one Download and its sources, of which there are at most 65,535.
#[derive(Debug)]
pub struct Picker {
    board: Board,
    sources: BTreeMap<SourceKey, Source>,
    offences: BTreeMap<SourceKey, Offences>,
    random: u64,
}

#[derive(Debug)]
struct Source {
    have: Have,
    /// Whether the board counts its pieces as offered: false while it is banned.
    counted: bool,
    /// At its present pace.
    piece_time: Duration,
    /// When all it was asked for is expected; means nothing while it owns no piece.
    busy_until: Option<Instant>,
    /// It fetches as well: its map was empty, or has grown.
    is_receiver: bool,
    /// The piece after its last claim.
    cursor: Option<u32>,
    /// The source whose connection it is; of a first connection, and of one alone, itself.
    first: SourceKey,
    /// There are other connections to the same source.
    has_beside: bool,
    /// What one of its connections wins, the others lose.
    is_line_busy: bool,
    /// It had none of the free pieces when the board had freed so many, and got none since.
    idle_since: Option<u64>,
}

#[derive(Debug)]
struct Offences {
    n: u32,
    banned_until: Instant,
    /// No good piece since the ban.
    on_probation: bool,
}

impl Picker {
    /// All of 0..`n_pieces` free, no source. Equal seeds and calls give equal answers.
    pub fn new(n_pieces: u32, seed: u64) -> Self {
        Self {
            board: Board::new(n_pieces),
            sources: BTreeMap::new(),
            offences: BTreeMap::new(),
            random: seed,
        }
    }

    /// Pieces there are.
    pub fn n_pieces(&self) -> u32 {
        self.board.n_pieces()
    }

    /// The pieces of further contents follow the last one, so many of each, free; `offer` says what a source, by its first
    /// connection, has of each of these contents.
    pub fn grow(&mut self, counts: &[u32], offer: impl Fn(SourceKey, usize) -> Offer) {
        let first = self.board.n_pieces();
        self.board.grow(counts.iter().sum());
        let end = self.board.n_pieces();
        for source in self.sources.values_mut() {
            source.idle_since = None;
            let offers: Vec<_> = (0..counts.len()).map(|i| offer(source.first, i)).collect();
            source.is_receiver |= offers.contains(&Offer::Part);
            let has_all = offers.iter().all(|offer| *offer == Offer::All);
            if matches!(source.have, Have::All) {
                if has_all {
                    continue;
                }
                let mut pieces = PieceSet::full(first);
                pieces.grow(end);
                let partial = Have::Some(pieces);
                if source.counted {
                    self.board.count(&partial, true);
                    self.board.count(&Have::All, false);
                }
                source.have = partial;
            } else if let Have::Some(pieces) = &mut source.have {
                pieces.grow(end);
            }
            let Have::Some(pieces) = &mut source.have else {
                continue;
            };
            let mut next = first;
            for (offer, count) in offers.iter().zip(counts) {
                for piece in (next..next + count).filter(|_| *offer == Offer::All) {
                    pieces.insert(piece);
                    if source.counted {
                        self.board.count_piece(piece, true);
                    }
                }
                next += count;
            }
        }
    }

    /// A piece that is on this disk already.
    pub fn mark_done(&mut self, piece: u32) {
        self.board.settle(piece);
    }

    /// A source and what it offers; of a known key, its new map. What it was asked for and no longer has is free again. One
    /// that was a receiver stays partial: promises are not about what it has.
    pub fn set_have(&mut self, key: SourceKey, map: &HaveMap) {
        // One that was banned counts from its next request on, which knows the time.
        let counts = match self.sources.get(&key) {
            Some(source) => source.counted,
            None => !self.offences.contains_key(&key),
        };
        self.set_counted(key, false);
        let have = match self.sources.get(&key) {
            Some(Source {
                is_receiver: true, ..
            }) => Have::Some(PieceSet::of(map, self.board.n_pieces())),
            _ => Have::new(map, self.board.n_pieces()),
        };
        for piece in self.board.claims().of(key) {
            if !have.contains(piece) {
                self.board.disown(key, piece);
            }
        }
        match self.sources.get_mut(&key) {
            Some(source) => (source.have, source.idle_since) = (have, None),
            None => drop(self.sources.insert(key, Source::new(key, have))),
        }
        if let Some(source) = self.sources.get_mut(&key) {
            // Of no pieces there are no receivers.
            source.is_receiver |= map.count() == 0 && self.board.n_pieces() > 0;
        }
        self.set_counted(key, counts);
    }

    /// The source has one piece more. Pieces that are none and unknown sources are ignored.
    pub fn add_have(&mut self, key: SourceKey, piece: u32) {
        let Some(source) = self.sources.get_mut(&key) else {
            return;
        };
        if let Have::Some(pieces) = &mut source.have
            && piece < self.board.n_pieces()
            && pieces.insert(piece)
        {
            (source.is_receiver, source.idle_since) = (true, None);
            if source.counted {
                self.board.count_piece(piece, true);
            }
        }
    }

    /// The source does not have this piece (any more); its claim on it ends.
    pub fn remove_have(&mut self, key: SourceKey, piece: u32) {
        self.board.disown(key, piece);
        let Some(source) = self.sources.get_mut(&key) else {
            return;
        };
        if matches!(source.have, Have::All) {
            let partial = Have::Some(PieceSet::full(self.board.n_pieces()));
            if source.counted {
                self.board.count(&partial, true);
                self.board.count(&source.have, false);
            }
            source.have = partial;
        }
        if let Have::Some(pieces) = &mut source.have
            && pieces.remove(piece)
            && source.counted
        {
            self.board.count_piece(piece, false);
        }
    }

    /// The source is gone; what it was asked for is free again.
    pub fn remove_source(&mut self, key: SourceKey) {
        self.drop_claims(key);
        self.set_counted(key, false);
        self.sources.remove(&key);
    }

    /// This machine itself is about to bring these pieces, as `key`, which names no source: they are nobody's to fetch until
    /// [`received`](Self::received) or [`release`](Self::release) says how that ended. Those that are done, claimed or
    /// none are ignored.
    pub fn claim_local(&mut self, key: SourceKey, pieces: impl IntoIterator<Item = u32>) {
        for piece in pieces {
            self.board.claim_local(key, piece);
        }
    }

    /// These pieces were done and are free again: the disk lost them. Others are ignored.
    pub fn lose(&mut self, pieces: impl IntoIterator<Item = u32>) {
        for piece in pieces {
            self.board.lose(piece);
        }
    }

    /// Is it known that a complete source promised this piece to others?
    pub fn is_promised(&self, piece: u32) -> bool {
        self.board.is_promised(piece)
    }

    /// A complete source promised these pieces to other receivers, or knows that they have them. It holds for all complete
    /// sources, until the piece is done; a repetition changes nothing.
    pub fn promised(&mut self, pieces: impl IntoIterator<Item = u32>, now: Instant) {
        for piece in pieces {
            self.board.promise(piece, now);
        }
    }

    /// Work for a source that can take some: at most `max_pieces`, which at its pace would last `expected`. May be asked
    /// while earlier claims of the source are under way. An unknown source waits.
    pub fn next(
        &mut self,
        key: SourceKey,
        max_pieces: u32,
        expected: Duration,
        now: Instant,
    ) -> Next {
        if self.is_done() {
            return Next::Done;
        }
        let mut max_pieces = max_pieces.max(1);
        let piece_time = (expected / max_pieces).clamp(Duration::from_nanos(1), MAX_PIECE_TIME);
        if let Some(offences) = self.offences.get(&key) {
            if now < offences.banned_until {
                return Next::Wait(Some(offences.banned_until));
            }
            if offences.on_probation && self.board.claims().n_of(key) > 0 {
                return Next::Wait(None);
            }
            if offences.on_probation {
                max_pieces = 1;
            }
            self.set_counted(key, true);
        }
        let start = self.random_piece();
        let Some(source) = self.sources.get_mut(&key) else {
            return Next::Wait(None);
        };
        source.piece_time = piece_time;
        if source.idle_since != Some(self.board.n_freed())
            && let Some(next) = self.free_for(key, max_pieces, start, now)
        {
            return next;
        }
        let stolen = self.worth_stealing(key, max_pieces as usize, now);
        if !stolen.is_empty() {
            self.claim(key, &stolen, now);
            return Next::Steal(stolen);
        }
        let have = &self.sources[&key].have;
        Next::Wait(
            self.board
                .claims()
                .next_late(now, |piece| self.is_others(key, have, piece)),
        )
    }

    /// A piece came from the source, verified and written. It counts, whoever was asked for it.
    pub fn received(&mut self, key: SourceKey, piece: u32) -> Received {
        if let Some(offences) = self.offences.get_mut(&key) {
            offences.on_probation = false;
        }
        if self.board.settle(piece) {
            Received::New
        } else {
            Received::Duplicate
        }
    }

    /// The source will not send these after all: its stream ended, stalled or said so. What it does not own is ignored.
    pub fn release(&mut self, key: SourceKey, pieces: &[u32]) {
        for &piece in pieces {
            self.board.disown(key, piece);
        }
    }

    /// Nothing comes from the source: what it was asked for is late now, so that one without other work fetches it as well.
    pub fn hurry(&mut self, key: SourceKey, now: Instant) {
        self.board.hurry(key, now);
    }

    /// The source sent wrong bytes: everything it was asked for is free again, and it gets and counts for nothing until
    /// the returned instant, later with each offence. End its streams.
    pub fn bad_piece(&mut self, key: SourceKey, now: Instant) -> Instant {
        self.drop_claims(key);
        self.set_counted(key, false);
        let n = self.offences.get(&key).map_or(0, |offences| offences.n);
        let banned_until = now
            + FIRST_BAN
                .saturating_mul(2u32.saturating_pow(n))
                .min(LONGEST_BAN);
        self.offences.insert(
            key,
            Offences {
                n: n.saturating_add(1),
                banned_until,
                on_probation: true,
            },
        );
        banned_until
    }

    /// The end of the source's last ban, which may be over; none if it never sent wrong bytes.
    pub fn banned_until(&self, key: SourceKey) -> Option<Instant> {
        self.offences
            .get(&key)
            .map(|offences| offences.banned_until)
    }

    /// True if every piece is done.
    pub fn is_done(&self) -> bool {
        self.remaining() == 0
    }

    /// True if this piece is done: bytes of it that still come are not needed.
    pub fn has(&self, piece: u32) -> bool {
        self.board.is_done(piece)
    }

    /// True if every piece that can be had is done or on its way: from here on sources race.
    pub fn is_tail(&self) -> bool {
        self.board.is_tail()
    }

    /// Pieces that are not done.
    pub fn remaining(&self) -> u32 {
        self.board.remaining()
    }

    /// Pieces that are not done and that no source offers. A banned source offers nothing before its first request after
    /// the ban.
    pub fn unavailable(&self) -> u32 {
        self.board.unavailable()
    }

    /// The sources that were asked for this piece and have not sent it, at most two; of a local piece its key.
    pub fn owners(&self, piece: u32) -> impl Iterator<Item = SourceKey> {
        self.board.owners(piece)
    }

    fn drop_claims(&mut self, key: SourceKey) {
        for piece in self.board.claims().of(key) {
            self.board.disown(key, piece);
        }
    }

    fn set_counted(&mut self, key: SourceKey, counted: bool) {
        if let Some(source) = self
            .sources
            .get_mut(&key)
            .filter(|source| source.counted != counted)
        {
            source.counted = counted;
            self.board.count(&source.have, counted);
        }
    }

    fn random_piece(&mut self) -> u32 {
        let scaled =
            ((splitmix64(&mut self.random) >> 32) * u64::from(self.board.n_pieces())) >> 32;
        u32::try_from(scaled).expect("a fraction of n_pieces is below n_pieces")
    }
}

impl Source {
    fn new(first: SourceKey, have: Have) -> Self {
        Self {
            have,
            first,
            has_beside: false,
            is_line_busy: false,
            counted: false,
            piece_time: MAX_PIECE_TIME,
            busy_until: None,
            is_receiver: false,
            cursor: None,
            idle_since: None,
        }
    }

    /// When it can start on something more, given how many pieces it owns: sooner than it was once thought, if it has been
    /// faster since.
    fn free_at(&self, n_claimed: u32, now: Instant) -> Instant {
        let at_most = now + self.piece_time * n_claimed;
        self.busy_until
            .filter(|until| n_claimed > 0 && *until > now)
            .unwrap_or(now)
            .min(at_most)
    }

    /// Whether all it was asked for should have come a while ago.
    fn is_behind(&self, now: Instant) -> bool {
        self.busy_until
            .is_some_and(|until| until + LATE_SLACK < now)
    }

    /// At least one.
    fn pieces_per_hour(&self) -> u64 {
        let per_hour = Duration::from_secs(3600).as_nanos() / self.piece_time.as_nanos().max(1);
        u64::try_from(per_hour)
            .unwrap_or(u64::MAX)
            .clamp(1, u64::from(u32::MAX))
    }
}

fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use piece_set::tests::STEPS;
    use std::collections::BTreeSet;
    use std::collections::VecDeque;

    pub(super) const PIECE_LEN: u32 = 256 << 10;
    pub(super) const SECOND: Duration = Duration::from_secs(1);
    const A: SourceKey = SourceKey(0);
    const B: SourceKey = SourceKey(1);
    const C: SourceKey = SourceKey(2);

    pub(super) fn map(n: u32, pieces: impl IntoIterator<Item = u32>) -> HaveMap {
        let mut map = HaveMap::empty(n);
        for piece in pieces {
            map.insert(piece);
        }
        map
    }

    /// A claim of at most `max_pieces` by a source that does one piece in 100 ms.
    fn next(picker: &mut Picker, key: SourceKey, max_pieces: u32, now: Instant) -> Next {
        let next = picker.next(key, max_pieces, SECOND / 10 * max_pieces, now);
        picker.board.check();
        next
    }

    fn claim(picker: &mut Picker, key: SourceKey, max_pieces: u32, now: Instant) -> Vec<u32> {
        match next(picker, key, max_pieces, now) {
            Next::Claim(pieces) => pieces,
            other => panic!("{other:?}"),
        }
    }

    fn n_runs(pieces: &[u32]) -> usize {
        1 + pieces
            .windows(2)
            .filter(|pair| pair[1] != pair[0] + 1)
            .count()
    }

    pub(super) struct Dice(pub(super) u64);

    impl Dice {
        pub(super) fn below(&mut self, n: u32) -> u32 {
            u32::try_from(splitmix64(&mut self.0) % u64::from(n)).expect("below n")
        }

        pub(super) fn chance(&mut self, percent: u32) -> bool {
            self.below(100) < percent
        }

        pub(super) fn millis(&mut self, up_to: u32) -> Duration {
            Duration::from_millis(self.below(up_to).into())
        }
    }

    #[test]
    fn what_was_asked_for_before_becomes_a_claim_if_it_is_free() {
        let now = Instant::now();
        let mut picker = Picker::new(10, 1);
        picker.set_have(A, &HaveMap::full(10));
        picker.set_have(B, &map(10, [0]));
        picker.mark_done(9);
        assert!(!picker.adopt((A, A), &[8, 9], SECOND, now), "one is done");
        assert!(!picker.adopt((A, A), &[9, 10], SECOND, now), "one is none");
        assert!(
            !picker.adopt((B, B), &[0, 1], SECOND, now),
            "one it has not"
        );
        assert!(!picker.adopt((C, C), &[0], SECOND, now), "nobody knows it");
        assert!(picker.adopt((A, A), &[0, 1], SECOND, now));
        assert!(!picker.adopt((B, B), &[0], SECOND, now), "somebody else's");
        assert!(
            !picker.adopt((B, SourceKey(9)), &[2], SECOND, now),
            "the source has it not, nor have its connections"
        );
        assert!(
            picker.adopt((A, SourceKey(9)), &[4], SECOND, now),
            "another connection of it"
        );
        picker.release(SourceKey(9), &[4]);
        picker.board.check();
        assert_eq!(
            claim(&mut picker, A, 2, now),
            [2, 3],
            "it goes on from there"
        );
        picker.release(A, &[0]);
        assert_eq!(claim(&mut picker, B, 1, now), [0]);
    }

    #[test]
    fn a_connection_that_is_stuck_is_helped_by_the_one_beside_it() {
        let mut now = Instant::now();
        let beside = |picker: &mut Picker, now| picker.next_beside(A, B, (4, SECOND / 10 * 4), now);
        let mut picker = Picker::new(8, 1);
        assert_eq!(beside(&mut picker, now), Next::Wait(None), "of nobody");
        picker.set_have(A, &HaveMap::full(8));
        let first = claim(&mut picker, A, 4, now);
        let Next::Claim(second) = beside(&mut picker, now) else {
            panic!("there are four more")
        };
        assert_eq!(
            first.iter().chain(&second).collect::<BTreeSet<_>>().len(),
            8
        );
        second
            .iter()
            .for_each(|piece| _ = picker.received(B, *piece));
        assert!(
            matches!(beside(&mut picker, now), Next::Wait(_)),
            "they share a line: no race for little"
        );
        now += 10 * SECOND;
        picker.set_line_busy(A, true);
        assert!(
            matches!(beside(&mut picker, now), Next::Wait(_)),
            "while the line is busy, they only win from one another"
        );
        let far_ahead = picker.next_beside(A, B, (4, SECOND / 100 * 4), now);
        let Next::Steal(pieces) = far_ahead else {
            panic!("unless one is far behind: {far_ahead:?}")
        };
        picker.release(B, &pieces);
        picker.set_have(C, &HaveMap::full(8));
        assert!(
            matches!(next(&mut picker, C, 1, now), Next::Steal(_)),
            "another source may win"
        );
        picker.remove_source(C);
        picker.set_line_busy(A, false);
        assert!(matches!(beside(&mut picker, now), Next::Steal(_)));
        picker.board.check();
        picker.release(B, &first);
        let until = picker.bad_piece(A, now);
        assert_eq!(
            beside(&mut picker, now),
            Next::Wait(None),
            "a ban is the source's"
        );
        now = until;
        assert!(matches!(next(&mut picker, A, 4, now), Next::Claim(_)));
        assert_eq!(
            beside(&mut picker, now),
            Next::Wait(None),
            "and so is its probation"
        );
        picker.remove_source(A);
        assert_eq!(beside(&mut picker, now), Next::Wait(None));
    }

    #[test]
    fn what_waits_behind_a_source_that_became_faster_is_not_raced_for() {
        let mut now = Instant::now();
        let mut picker = Picker::new(14, 1);
        for key in [A, B] {
            picker.set_have(key, &HaveMap::full(14));
        }
        let Next::Claim(slow) = picker.next(A, 10, 10 * SECOND, now) else {
            panic!("all are free")
        };
        now += SECOND;
        slow[..5]
            .iter()
            .for_each(|piece| _ = picker.received(A, *piece));
        let Next::Claim(fast) = picker.next(A, 4, SECOND / 25, now) else {
            panic!("four are free")
        };
        slow[5..]
            .iter()
            .for_each(|piece| _ = picker.received(A, *piece));
        assert_eq!((slow.len(), fast.len()), (10, 4));
        assert!(
            matches!(picker.next(B, 4, SECOND / 25, now), Next::Wait(_)),
            "they are here in a moment"
        );
        now += 10 * SECOND;
        assert!(
            matches!(picker.next(B, 4, SECOND / 25, now), Next::Steal(_)),
            "and are not"
        );
    }

    #[test]
    fn the_rarest_come_first_and_ties_are_random() {
        let now = Instant::now();
        let mut firsts = BTreeSet::new();
        for seed in 0..20 {
            let mut picker = Picker::new(100, seed);
            picker.set_have(A, &HaveMap::full(100));
            picker.set_have(B, &map(100, 0..90));
            picker.set_have(C, &map(100, 0..80));
            let mut rarest = claim(&mut picker, A, 10, now);
            rarest.sort_unstable();
            assert!(
                rarest.into_iter().eq(90..100),
                "only the complete source has these"
            );
            let mut second = claim(&mut picker, A, 10, now);
            second.sort_unstable();
            assert!(second.into_iter().eq(80..90));
            firsts.insert(claim(&mut picker, A, 1, now)[0]);
        }
        assert!(firsts.len() > 10, "{firsts:?}");
    }

    #[test]
    fn one_source_reads_forward() {
        let now = Instant::now();
        let mut picker = Picker::new(1000, 7);
        picker.set_have(A, &HaveMap::full(1000));
        let mut order = Vec::new();
        while !picker.is_done() {
            for piece in claim(&mut picker, A, 30, now) {
                order.push(piece);
                assert_eq!(picker.received(A, piece), Received::New);
                assert_eq!(picker.received(A, piece), Received::Duplicate);
            }
        }
        assert_eq!(
            n_runs(&order),
            2,
            "from anywhere to the end, then from the start"
        );
        assert_eq!(next(&mut picker, A, 30, now), Next::Done);
    }

    #[test]
    fn what_a_source_loses_is_free_again() {
        let now = Instant::now();
        let mut picker = Picker::new(10, 1);
        picker.set_have(A, &HaveMap::full(10));
        picker.set_have(B, &map(10, 0..5));
        assert_eq!(claim(&mut picker, A, 10, now).len(), 10);
        picker.remove_have(A, 3);
        assert_eq!(next(&mut picker, B, 10, now), Next::Claim(vec![3]));
        picker.release(A, &[4, 3]);
        assert_eq!(
            picker.owners(3).collect::<Vec<_>>(),
            [B],
            "only an owner can release"
        );
        assert_eq!(next(&mut picker, B, 10, now), Next::Claim(vec![4]));
        picker.set_have(A, &map(10, 0..9));
        assert_eq!((picker.unavailable(), picker.owners(9).count()), (1, 0));
        picker.remove_source(A);
        assert_eq!(picker.unavailable(), 5);
        assert_eq!(
            next(&mut picker, A, 10, now),
            Next::Wait(None),
            "unknown by now"
        );
        let mut rest = claim(&mut picker, B, 10, now);
        rest.sort_unstable();
        assert_eq!(rest, [0, 1, 2]);
        for piece in 0..5 {
            picker.mark_done(piece);
        }
        picker.board.check();
        assert_eq!((picker.remaining(), picker.unavailable()), (5, 5));
        picker.add_have(B, 7);
        picker.add_have(B, 10);
        assert_eq!(next(&mut picker, B, 10, now), Next::Claim(vec![7]));
    }

    #[test]
    fn bans_grow_and_end_with_single_pieces() {
        let mut now = Instant::now();
        let mut picker = Picker::new(100, 1);
        picker.set_have(A, &HaveMap::full(100));
        for expected in [30, 60, 120] {
            claim(&mut picker, A, 10, now);
            let until = picker.bad_piece(A, now);
            picker.board.check();
            assert_eq!(until - now, SECOND * expected);
            assert_eq!(picker.unavailable(), 100, "a liar offers nothing");
            picker.remove_source(A);
            picker.set_have(A, &HaveMap::full(100));
            assert_eq!(
                next(&mut picker, A, 10, now),
                Next::Wait(Some(until)),
                "nor when it comes back"
            );
            now = until;
        }
        let one = claim(&mut picker, A, 10, now);
        assert_eq!((one.len(), picker.unavailable()), (1, 0));
        assert_eq!(
            next(&mut picker, A, 10, now),
            Next::Wait(None),
            "one at a time"
        );
        picker.received(A, one[0]);
        assert_eq!(claim(&mut picker, A, 10, now).len(), 10);
    }

    #[test]
    fn late_pieces_are_taken_over_by_at_most_one_more_at_a_time() {
        let start = Instant::now();
        let mut picker = Picker::new(4, 1);
        for key in [A, B, C] {
            picker.set_have(key, &HaveMap::full(4));
        }
        assert_eq!(claim(&mut picker, A, 4, start).len(), 4);
        let Next::Wait(Some(late)) = picker.next(B, 1, SECOND, start) else {
            panic!("too slow to race")
        };
        assert!(late > start + SECOND);
        picker.hurry(C, start);
        assert!(
            matches!(picker.next(B, 1, SECOND, start), Next::Wait(_)),
            "that is nobody's"
        );
        picker.hurry(A, start);
        assert!(
            matches!(picker.next(B, 1, SECOND, start), Next::Steal(_)),
            "nothing comes from it"
        );
        assert!(matches!(next(&mut picker, B, 4, late), Next::Steal(_)));
        assert!(matches!(
            next(&mut picker, C, 4, start + SECOND * 60),
            Next::Steal(_)
        ));
        assert!(
            (0..4).any(|piece| !picker.owners(piece).any(|key| key == A)),
            "the latest gives way"
        );
        for piece in 0..4 {
            assert_eq!(
                picker.received(A, piece),
                Received::New,
                "but may still deliver"
            );
        }
        assert!(picker.is_done());
    }

    #[test]
    fn a_fast_source_races_a_slow_one_only_at_the_end() {
        let now = Instant::now();
        let mut picker = Picker::new(40, 1);
        picker.set_have(A, &HaveMap::full(40));
        picker.set_have(B, &HaveMap::full(40));
        let slow = match picker.next(A, 3, SECOND * 30, now) {
            Next::Claim(pieces) => pieces,
            other => panic!("{other:?}"),
        };
        while picker.remaining() > 3 {
            for piece in claim(&mut picker, B, 8, now) {
                assert!(!slow.contains(&piece));
                picker.received(B, piece);
            }
        }
        let Next::Steal(mut pieces) = next(&mut picker, B, 8, now) else {
            panic!()
        };
        pieces.sort_unstable();
        assert_eq!(pieces, slow);
        assert_eq!(
            next(&mut picker, B, 8, now),
            Next::Wait(None),
            "no third source, none twice"
        );
    }

    // ---- cost ----

    fn most_steps_of_a_next(n: u32, have: [HaveMap; 4]) -> (u64, u64) {
        let now = Instant::now();
        let mut picker = Picker::new(n, 5);
        let keys = [A, B, C, SourceKey(3)];
        for (key, have) in keys.iter().zip(&have) {
            picker.set_have(*key, have);
        }
        let mut asked = VecDeque::from(keys.map(|key| (key, Vec::new())));
        let (mut most, mut all) = (0, 0);
        while let Some((key, pieces)) = asked.pop_front() {
            for piece in pieces {
                picker.received(key, piece);
            }
            STEPS.set(0);
            match picker.next(key, 64, SECOND, now) {
                Next::Claim(pieces) | Next::Repeat(pieces) => asked.push_back((key, pieces)),
                Next::Steal(_) | Next::Wait(_) | Next::Done => {}
            }
            most = STEPS.get().max(most);
            all += STEPS.get();
        }
        assert!(picker.is_done());
        (most, all)
    }

    #[test]
    fn each_of_many_pieces_costs_a_few_steps() {
        let n = 1 << 18;
        let (most, all) = most_steps_of_a_next(n, [(); 4].map(|()| HaveMap::full(n)));
        assert!(
            most < 1000 && all < u64::from(n) * 6,
            "seeds: at most {most} in one call, {all} in all"
        );
        let half = |which: u32| map(n, (0..n).filter(|piece| piece % 2 == which));
        let (most, all) = most_steps_of_a_next(n, [half(0), half(1), half(0), half(1)]);
        assert!(
            most < 3000 && all < u64::from(n) * 12,
            "halves: at most {most} in one call, {all} in all"
        );
        // The worst: a source of which every last piece is done looks once at each word.
        let mut picker = Picker::new(n, 5);
        picker.set_have(A, &half(0));
        picker.set_have(B, &half(1));
        (0..n).step_by(2).for_each(|piece| picker.mark_done(piece));
        STEPS.set(0);
        assert_eq!(picker.next(A, 64, SECOND, Instant::now()), Next::Wait(None));
        assert!(STEPS.get() < u64::from(n) / 8, "{}", STEPS.get());
    }

    #[test]
    fn local_pieces_are_nobodys_until_they_fail() {
        let now = Instant::now();
        let local = SourceKey(9);
        let mut picker = Picker::new(10, 1);
        assert_eq!(picker.unavailable(), 10);
        picker.claim_local(local, [0, 1, 2, 99]);
        assert_eq!(
            (picker.unavailable(), picker.owners(1).collect::<Vec<_>>()),
            (7, vec![local]),
            "available"
        );
        picker.set_have(A, &HaveMap::full(10));
        picker.set_have(B, &map(10, 0..5));
        let mut claimed = claim(&mut picker, A, 9, now);
        claimed.sort_unstable();
        assert!(
            claimed.into_iter().eq(3..10),
            "all the rest: local work is no rival"
        );
        picker.claim_local(local, [3, 2]);
        assert_eq!(picker.owners(3).collect::<Vec<_>>(), [A], "too late");
        assert!(
            matches!(picker.next(B, 1, SECOND / 1000, now), Next::Steal(_)),
            "the tail, but for local pieces"
        );
        assert_eq!(next(&mut picker, C, 9, now), Next::Wait(None));
        assert_eq!(picker.received(local, 0), Received::New);
        picker.release(local, &[0, 1]);
        assert_eq!(
            next(&mut picker, B, 9, now),
            Next::Claim(vec![1]),
            "0 is done, 2 still local"
        );
        for piece in [1, 3, 4, 5, 6, 7, 8, 9] {
            picker.received(A, piece);
        }
        let ages = now + SECOND * 1000;
        assert_eq!(
            (next(&mut picker, A, 9, ages), picker.remaining()),
            (Next::Wait(None), 1),
            "never late"
        );
        assert_eq!(
            picker.received(A, 2),
            Received::New,
            "should it come nevertheless"
        );
        assert_eq!(picker.received(local, 2), Received::Duplicate);
        picker.board.check();
    }

    #[test]
    fn lost_pieces_are_fetched_again() {
        let now = Instant::now();
        let mut picker = Picker::new(4, 1);
        (0..4).for_each(|piece| picker.mark_done(piece));
        for _ in 0..2 {
            picker.lose([1, 3, 9]);
            assert_eq!((picker.remaining(), picker.unavailable()), (2, 2));
        }
        picker.set_have(A, &map(4, 0..3));
        assert_eq!(next(&mut picker, A, 4, now), Next::Claim(vec![1]));
        picker.lose([1]);
        assert_eq!(
            picker.owners(1).collect::<Vec<_>>(),
            [A],
            "under way, not done"
        );
    }

    #[test]
    fn promised_pieces_come_last_and_after_a_while() {
        let start = Instant::now();
        let mut picker = Picker::new(6, 1);
        picker.set_have(A, &HaveMap::full(6));
        picker.set_have(B, &map(6, [3]));
        picker.mark_done(0);
        picker.promised([0, 2, 3, 4, 99], start);
        let mut first = claim(&mut picker, A, 6, start);
        first.sort_unstable();
        assert_eq!(first, [1, 5], "what is promised to nobody");
        let later = start + SECOND / 4;
        picker.promised([2, 4], later);
        assert_eq!(
            next(&mut picker, A, 6, later),
            Next::Wait(Some(start + SECOND / 2)),
            "the first promise counts"
        );
        assert_eq!(
            next(&mut picker, B, 6, later),
            Next::Claim(vec![3]),
            "partial sources offer what they have"
        );
        picker.release(A, &[1]);
        assert_eq!(next(&mut picker, A, 6, later), Next::Claim(vec![1]));
        let mut second = BTreeSet::new();
        for _ in 0..2 {
            let Next::Repeat(pieces) = next(&mut picker, A, 1, start + SECOND / 2) else {
                panic!()
            };
            second.extend(pieces);
        }
        assert!(second.into_iter().eq([2, 4]));
        for piece in 0..6 {
            picker.received(A, piece);
        }
        picker.lose([2]);
        assert_eq!(
            next(&mut picker, A, 6, later),
            Next::Claim(vec![2]),
            "done, so the promise was dropped"
        );
        picker.lose(0..6);
        picker.promised(0..6, later);
        assert!(matches!(next(&mut picker, A, 6, later), Next::Wait(_)));
        picker.remove_source(B);
        assert_eq!(
            next(&mut picker, A, 6, later).pieces().len(),
            5,
            "nobody is left whom they were promised to"
        );
    }

    #[test]
    fn receivers_share_a_complete_source() {
        let now = Instant::now();
        let mut picker = Picker::new(1600, 1);
        picker.set_have(A, &HaveMap::full(1600));
        picker.set_have(B, &map(1600, 0..9));
        assert_eq!(
            claim(&mut picker, A, 1000, now).len(),
            1000,
            "one that holds a part is no receiver"
        );
        picker.remove_source(A);
        picker.set_have(A, &HaveMap::full(1600));
        picker.add_have(B, 10);
        picker.set_have(C, &HaveMap::empty(1600));
        picker.set_have(SourceKey(3), &HaveMap::empty(1600));
        let few = claim(&mut picker, A, 1000, now);
        assert_eq!(few.len(), 1600 / 16 / 4);
        assert_eq!(
            next(&mut picker, A, 1000, now),
            Next::Wait(None),
            "in all, not in each claim"
        );
        few.iter().for_each(|piece| _ = picker.received(A, *piece));
        assert_eq!(
            claim(&mut picker, A, 1000, now).len(),
            (1600 - few.len()) / 16 / 4
        );
        picker.set_have(C, &HaveMap::full(1600));
        picker.promised(0..1600, now);
        assert!(
            matches!(next(&mut picker, C, 9, now), Next::Claim(_)),
            "it was a receiver: nothing to hold back for"
        );
    }

    #[test]
    fn any_calls_in_any_order_keep_the_books() {
        for seed in 0..100 {
            let mut dice = Dice(seed);
            let n = dice.below(130);
            let mut picker = Picker::new(n, seed);
            let mut now = Instant::now();
            for _ in 0..300 {
                let key = SourceKey(dice.below(4));
                let piece = dice.below(n + 2);
                match dice.below(15) {
                    0 => picker.set_have(key, &map(n, (0..n).filter(|_| dice.chance(70)))),
                    1 => picker.set_have(key, &HaveMap::full(n)),
                    2 => picker.remove_source(key),
                    3 => picker.add_have(key, piece),
                    4 => picker.remove_have(key, piece),
                    5 => picker.mark_done(piece),
                    6 => picker.release(key, &[piece, piece]),
                    7 if dice.chance(20) => assert!(picker.bad_piece(key, now) > now),
                    8 => drop(picker.received(key, piece)),
                    9 => now += dice.millis(20_000),
                    10 => picker
                        .claim_local(SourceKey(4 + dice.below(2)), piece..piece + dice.below(9)),
                    11 => picker.release(SourceKey(4), &[piece]),
                    12 => picker.promised(piece..piece + dice.below(9), now),
                    13 if dice.chance(30) => picker.lose(piece..piece + dice.below(9)),
                    _ => drop(picker.next(key, dice.below(9), dice.millis(5000), now)),
                }
                picker.board.check();
                let owners: Vec<_> = (0..n)
                    .flat_map(|piece| picker.owners(piece).map(move |key| (piece, key)))
                    .collect();
                for (piece, key) in owners.into_iter().filter(|(_, key)| key.0 < 4) {
                    let source = &picker.sources[&key];
                    assert!(source.counted && source.have.contains(piece), "seed {seed}");
                }
            }
        }
    }
}
