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
//!   the time their owner still needs. Two owners at most: that bounds the waste.
//! - **Bans.** A source that sent wrong bytes loses its claims and offers nothing for a time that doubles with each
//!   offence; then it gets single pieces until one is good. So it wastes one piece per ban.
//!
//! Invariant: a claimed piece is had by each of its owners, and none of them is banned. `board.rs` keeps the pieces and
//! says what a step costs; adding, replacing or banning a partial source walks over the pieces it has.

mod board;
mod piece_set;

use crate::have::HaveMap;
use board::{Board, Claimed, Have, LATE_SLACK};
use piece_set::PieceSet;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A race must bring the piece in less than its owner's remaining time divided by this ...
const RACE_FACTOR: u32 = 2;
/// ... and gain more than this, or it is not worth the double bytes.
const RACE_MIN_GAIN: Duration = Duration::from_millis(100);
/// An owner is taken to need still at least its whole time divided by this: no speed is known better.
const DOUBT: u32 = 8;
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
    /// Fetch these, although another source was asked for them. Ascending.
    Steal(Vec<u32>),
    /// Nothing for this source. Ask again when any source's pieces, claims or presence changed, and at this instant.
    Wait(Option<Instant>),
    /// Every piece is done.
    Done,
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
    /// The piece after its last claim.
    cursor: Option<u32>,
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
        Self { board: Board::new(n_pieces), sources: BTreeMap::new(), offences: BTreeMap::new(), random: seed }
    }

    /// A piece that is on this disk already.
    pub fn mark_done(&mut self, piece: u32) {
        self.board.settle(piece);
    }

    /// A source and what it offers; of a known key, its new map. What it was asked for and no longer has is free again.
    pub fn set_have(&mut self, key: SourceKey, map: &HaveMap) {
        // One that was banned counts from its next request on, which knows the time.
        let counts = match self.sources.get(&key) {
            Some(source) => source.counted,
            None => !self.offences.contains_key(&key),
        };
        self.set_counted(key, false);
        let have = Have::new(map, self.board.n_pieces());
        for piece in self.board.claims_of(key) {
            if !have.contains(piece) {
                self.board.disown(key, piece);
            }
        }
        match self.sources.get_mut(&key) {
            Some(source) => source.have = have,
            None => drop(self.sources.insert(key, Source::new(have))),
        }
        self.set_counted(key, counts);
    }

    /// The source has one piece more. Pieces that are none and unknown sources are ignored.
    pub fn add_have(&mut self, key: SourceKey, piece: u32) {
        if let Some(Source { have: Have::Some(pieces), counted, .. }) = self.sources.get_mut(&key)
            && piece < self.board.n_pieces()
            && pieces.insert(piece)
            && *counted
        {
            self.board.count_piece(piece, true);
        }
    }

    /// The source does not have this piece (any more); its claim on it ends.
    pub fn remove_have(&mut self, key: SourceKey, piece: u32) {
        self.board.disown(key, piece);
        let Some(source) = self.sources.get_mut(&key) else { return };
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

    /// Work for a source that can take some: at most `max_pieces`, which at its pace would last `expected`. May be asked
    /// while earlier claims of the source are under way. An unknown source waits.
    pub fn next(&mut self, key: SourceKey, max_pieces: u32, expected: Duration, now: Instant) -> Next {
        if self.is_done() {
            return Next::Done;
        }
        let mut max_pieces = max_pieces.max(1);
        let piece_time = (expected / max_pieces).clamp(Duration::from_nanos(1), MAX_PIECE_TIME);
        if let Some(offences) = self.offences.get(&key) {
            if now < offences.banned_until {
                return Next::Wait(Some(offences.banned_until));
            }
            if offences.on_probation && self.board.n_claimed(key) > 0 {
                return Next::Wait(None);
            }
            if offences.on_probation {
                max_pieces = 1;
            }
            self.set_counted(key, true);
        }
        let start = self.random_piece();
        let Some(source) = self.sources.get_mut(&key) else { return Next::Wait(None) };
        source.piece_time = piece_time;
        let limit = self.fair_share(key, now).clamp(1, max_pieces) as usize;
        let source = &self.sources[&key];
        let free = self.board.free_in(&source.have, source.cursor, start, limit);
        if !free.is_empty() {
            self.claim(key, &free, now);
            return Next::Claim(free);
        }
        let stolen = self.worth_stealing(key, limit, now);
        if !stolen.is_empty() {
            self.claim(key, &stolen, now);
            return Next::Steal(stolen);
        }
        let claimed = self.board.claimed_by_others(key, &source.have);
        Next::Wait(claimed.flat_map(|(_, claimed)| claimed.owners.iter().map(|owner| owner.late)).min())
    }

    /// A piece came from the source, verified and written. It counts, whoever was asked for it.
    pub fn received(&mut self, key: SourceKey, piece: u32) -> Received {
        if let Some(offences) = self.offences.get_mut(&key) {
            offences.on_probation = false;
        }
        if self.board.settle(piece) { Received::New } else { Received::Duplicate }
    }

    /// The source will not send these after all: its stream ended, stalled or said so. What it does not own is ignored.
    pub fn release(&mut self, key: SourceKey, pieces: &[u32]) {
        for &piece in pieces {
            self.board.disown(key, piece);
        }
    }

    /// The source sent wrong bytes: everything it was asked for is free again, and it gets and counts for nothing until
    /// the returned instant, later with each offence. End its streams.
    pub fn bad_piece(&mut self, key: SourceKey, now: Instant) -> Instant {
        self.drop_claims(key);
        self.set_counted(key, false);
        let n = self.offences.get(&key).map_or(0, |offences| offences.n);
        let banned_until = now + FIRST_BAN.saturating_mul(2u32.saturating_pow(n)).min(LONGEST_BAN);
        self.offences.insert(key, Offences { n: n.saturating_add(1), banned_until, on_probation: true });
        banned_until
    }

    /// The end of the source's last ban, which may be over; none if it never sent wrong bytes.
    pub fn banned_until(&self, key: SourceKey) -> Option<Instant> {
        self.offences.get(&key).map(|offences| offences.banned_until)
    }

    /// True if every piece is done.
    pub fn is_done(&self) -> bool {
        self.remaining() == 0
    }

    /// True if this piece is done: bytes of it that still come are not needed.
    pub fn has(&self, piece: u32) -> bool {
        self.board.is_done(piece)
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

    /// The sources that were asked for this piece and have not sent it, at most two.
    pub fn owners(&self, piece: u32) -> impl Iterator<Item = SourceKey> {
        self.board.claimed(piece).into_iter().flat_map(|claimed| claimed.owners.iter().map(|owner| owner.key))
    }

    fn claim(&mut self, key: SourceKey, pieces: &[u32], now: Instant) {
        let n_claimed = self.board.n_claimed(key);
        let source = self.sources.get_mut(&key).expect("only a known source claims");
        let mut due = source.free_at(n_claimed, now);
        for &piece in pieces {
            due += source.piece_time;
            self.board.claim(key, piece, due, now);
        }
        source.busy_until = Some(due);
        source.cursor = pieces.last().map(|last| last + 1);
    }

    fn drop_claims(&mut self, key: SourceKey) {
        for piece in self.board.claims_of(key) {
            self.board.disown(key, piece);
        }
    }

    fn set_counted(&mut self, key: SourceKey, counted: bool) {
        if let Some(source) = self.sources.get_mut(&key).filter(|source| source.counted != counted) {
            source.counted = counted;
            self.board.count(&source.have, counted);
        }
    }

    /// How many pieces more the source can do until all sources at work, itself included, are through with what can be
    /// fetched.
    fn fair_share(&self, key: SourceKey, now: Instant) -> u32 {
        let at_work = |other: SourceKey, source: &Source| {
            other == key || self.board.n_claimed(other) > 0 && !source.is_behind(now)
        };
        let rates = self.sources.iter().filter(|(other, source)| at_work(**other, source));
        let all: u64 = rates.map(|(_, source)| source.pieces_per_hour()).sum();
        let work = u64::from(self.remaining() - self.unavailable());
        let share = (work * self.sources[&key].pieces_per_hour()).div_ceil(all);
        u32::try_from(share).unwrap_or(u32::MAX).saturating_sub(self.board.n_claimed(key))
    }

    /// Pieces that others were asked for and that the source should fetch as well: the late ones first, then those whose
    /// owner needs longest.
    fn worth_stealing(&self, key: SourceKey, limit: usize, now: Instant) -> Vec<u32> {
        let source = &self.sources[&key];
        let is_tail = self.board.is_tail();
        let left = |claimed: &Claimed| match &claimed.owners[..] {
            owners if owners.iter().any(|owner| owner.late <= now) => Some(Duration::MAX),
            [owner] if is_tail => Some(owner.due.saturating_duration_since(now).max(owner.expected / DOUBT)),
            _ => None,
        };
        let mut candidates: Vec<(Reverse<Duration>, u32)> = self
            .board
            .claimed_by_others(key, &source.have)
            .filter_map(|(piece, claimed)| Some((Reverse(left(claimed)?), piece)))
            .collect();
        candidates.sort_unstable();
        let mut needs = source.free_at(self.board.n_claimed(key), now) - now;
        let mut picked = Vec::new();
        for (Reverse(left), piece) in candidates.into_iter().take(limit) {
            needs += source.piece_time;
            if left <= needs * RACE_FACTOR + RACE_MIN_GAIN {
                break;
            }
            picked.push(piece);
        }
        picked.sort_unstable();
        picked
    }

    fn random_piece(&mut self) -> u32 {
        let scaled = ((splitmix64(&mut self.random) >> 32) * u64::from(self.board.n_pieces())) >> 32;
        u32::try_from(scaled).expect("a fraction of n_pieces is below n_pieces")
    }
}

impl Source {
    fn new(have: Have) -> Self {
        Self { have, counted: false, piece_time: MAX_PIECE_TIME, busy_until: None, cursor: None }
    }

    /// When it can start on something more, given how many pieces it owns.
    fn free_at(&self, n_claimed: u32, now: Instant) -> Instant {
        self.busy_until.filter(|until| n_claimed > 0 && *until > now).unwrap_or(now)
    }

    /// Whether all it was asked for should have come a while ago.
    fn is_behind(&self, now: Instant) -> bool {
        self.busy_until.is_some_and(|until| until + LATE_SLACK < now)
    }

    /// At least one.
    fn pieces_per_hour(&self) -> u64 {
        let per_hour = Duration::from_secs(3600).as_nanos() / self.piece_time.as_nanos().max(1);
        u64::try_from(per_hour).unwrap_or(u64::MAX).clamp(1, u64::from(u32::MAX))
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
    use crate::peer::pace::{Flight, Pace};
    use piece_set::tests::STEPS;
    use std::collections::{BinaryHeap, VecDeque};

    const PIECE_LEN: u32 = 256 << 10;
    const SECOND: Duration = Duration::from_secs(1);
    const A: SourceKey = SourceKey(0);
    const B: SourceKey = SourceKey(1);
    const C: SourceKey = SourceKey(2);

    fn map(n: u32, pieces: impl IntoIterator<Item = u32>) -> HaveMap {
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
        1 + pieces.windows(2).filter(|pair| pair[1] != pair[0] + 1).count()
    }

    struct Dice(u64);

    impl Dice {
        fn below(&mut self, n: u32) -> u32 {
            u32::try_from(splitmix64(&mut self.0) % u64::from(n)).expect("below n")
        }

        fn chance(&mut self, percent: u32) -> bool {
            self.below(100) < percent
        }

        fn millis(&mut self, up_to: u32) -> Duration {
            Duration::from_millis(self.below(up_to).into())
        }
    }

    #[test]
    fn the_rarest_come_first_and_ties_are_random() {
        let now = Instant::now();
        let mut firsts = std::collections::BTreeSet::new();
        for seed in 0..20 {
            let mut picker = Picker::new(100, seed);
            picker.set_have(A, &HaveMap::full(100));
            picker.set_have(B, &map(100, 0..90));
            picker.set_have(C, &map(100, 0..80));
            let mut rarest = claim(&mut picker, A, 10, now);
            rarest.sort_unstable();
            assert!(rarest.into_iter().eq(90..100), "only the complete source has these");
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
        assert_eq!(n_runs(&order), 2, "from anywhere to the end, then from the start");
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
        assert_eq!(picker.owners(3).collect::<Vec<_>>(), [B], "only an owner can release");
        assert_eq!(next(&mut picker, B, 10, now), Next::Claim(vec![4]));
        picker.set_have(A, &map(10, 0..9));
        assert_eq!((picker.unavailable(), picker.owners(9).count()), (1, 0));
        picker.remove_source(A);
        assert_eq!(picker.unavailable(), 5);
        assert_eq!(next(&mut picker, A, 10, now), Next::Wait(None), "unknown by now");
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
            assert_eq!(next(&mut picker, A, 10, now), Next::Wait(Some(until)), "nor when it comes back");
            now = until;
        }
        let one = claim(&mut picker, A, 10, now);
        assert_eq!((one.len(), picker.unavailable()), (1, 0));
        assert_eq!(next(&mut picker, A, 10, now), Next::Wait(None), "one at a time");
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
        let Next::Wait(Some(late)) = picker.next(B, 1, SECOND, start) else { panic!("too slow to race") };
        assert!(late > start + SECOND);
        assert!(matches!(next(&mut picker, B, 4, late), Next::Steal(_)));
        assert!(matches!(next(&mut picker, C, 4, start + SECOND * 60), Next::Steal(_)));
        assert!((0..4).any(|piece| !picker.owners(piece).any(|key| key == A)), "the latest gives way");
        for piece in 0..4 {
            assert_eq!(picker.received(A, piece), Received::New, "but may still deliver");
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
        let Next::Steal(mut pieces) = next(&mut picker, B, 8, now) else { panic!() };
        pieces.sort_unstable();
        assert_eq!(pieces, slow);
        assert_eq!(next(&mut picker, B, 8, now), Next::Wait(None), "no third source, none twice");
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
                Next::Claim(pieces) => asked.push_back((key, pieces)),
                Next::Steal(_) | Next::Wait(_) | Next::Done => {}
            }
            most = STEPS.get().max(most);
            all += STEPS.get();
        }
        assert!(picker.is_done());
        (most, all)
    }

    #[test]
    fn a_million_pieces_cost_a_few_steps_each() {
        let n = 1 << 20;
        let (most, all) = most_steps_of_a_next(n, [(); 4].map(|()| HaveMap::full(n)));
        assert!(most < 1000 && all < u64::from(n) * 6, "seeds: at most {most} in one call, {all} in all");
        let n = 1 << 18;
        let half = |which: u32| map(n, (0..n).filter(|piece| piece % 2 == which));
        let (most, all) = most_steps_of_a_next(n, [half(0), half(1), half(0), half(1)]);
        assert!(most < 3000 && all < u64::from(n) * 12, "halves: at most {most} in one call, {all} in all");
        // The worst: a source of which every last piece is done looks once at each word.
        let mut picker = Picker::new(n, 5);
        picker.set_have(A, &half(0));
        picker.set_have(B, &half(1));
        (0..n).step_by(2).for_each(|piece| picker.mark_done(piece));
        STEPS.set(0);
        assert_eq!(picker.next(A, 64, SECOND, Instant::now()), Next::Wait(None));
        assert!(STEPS.get() < u64::from(n) / 8, "{}", STEPS.get());
    }

    // ---- simulation ----

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        None,
        /// Sends wrong bytes in so many percent of pieces.
        Lies(u32),
        /// Falls silent after so many pieces, with its connection open.
        Silent(u32),
        /// Says it has what it has not, in so many percent of pieces.
        Lacks(u32),
    }

    struct Peer {
        bytes_per_second: u32,
        round_trip: Duration,
        fault: Fault,
        have: HaveMap,
        online: bool,
        pace: Pace,
        /// Requests under way in the order they are answered.
        flights: VecDeque<(Flight, VecDeque<u32>)>,
        /// Raised when the flights are gone, so that events for them are void.
        life: u32,
        wake_at: Option<Instant>,
        n_sent: u32,
        n_new: u32,
    }

    impl Peer {
        fn new(bytes_per_second: u32, have: HaveMap) -> Self {
            Self {
                bytes_per_second,
                round_trip: Duration::from_millis(5),
                fault: Fault::None,
                have,
                online: false,
                pace: Pace::new(PIECE_LEN),
                flights: VecDeque::new(),
                life: 0,
                wake_at: None,
                n_sent: 0,
                n_new: 0,
            }
        }

        fn bytes_to_come(&self) -> u64 {
            self.flights.iter().map(|(_, pieces)| pieces.len() as u64 * u64::from(PIECE_LEN)).sum()
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Event {
        Join(usize),
        Leave(usize),
        Gain(usize, u32),
        Wake(usize),
        Deliver(usize, u32),
        Stall(usize, u32),
    }

    struct Simulation {
        picker: Picker,
        peers: Vec<Peer>,
        events: BinaryHeap<Reverse<(Instant, u32, Event)>>,
        n_events: u32,
        dice: Dice,
        start: Instant,
        now: Instant,
        n_duplicates: u32,
        n_wrong: u32,
    }

    impl Simulation {
        fn new(n_pieces: u32, seed: u64) -> Self {
            let start = Instant::now();
            Self {
                picker: Picker::new(n_pieces, seed),
                peers: Vec::new(),
                events: BinaryHeap::new(),
                n_events: 0,
                dice: Dice(seed ^ 0x5eed),
                start,
                now: start,
                n_duplicates: 0,
                n_wrong: 0,
            }
        }

        fn add(&mut self, peer: Peer, joins_after: Duration) -> usize {
            self.peers.push(peer);
            self.at(self.start + joins_after, Event::Join(self.peers.len() - 1));
            self.peers.len() - 1
        }

        fn at(&mut self, when: Instant, event: Event) {
            self.n_events += 1;
            self.events.push(Reverse((when, self.n_events, event)));
        }

        /// Until all is done or nothing more will happen; the time that took.
        fn run(&mut self) -> Duration {
            while !self.picker.is_done()
                && let Some(Reverse((now, _, event))) = self.events.pop()
            {
                self.now = now;
                self.happen(event);
                for i in 0..self.peers.len() {
                    self.ask(i);
                }
                if self.n_events.is_multiple_of(64) {
                    self.picker.board.check();
                }
                assert!(self.n_events < 500_000, "{:?} and still {}", self.now - self.start, self.picker.remaining());
            }
            self.now - self.start
        }

        fn happen(&mut self, event: Event) {
            match event {
                Event::Join(i) => {
                    self.peers[i].online = true;
                    self.picker.set_have(key(i), &self.peers[i].have);
                }
                Event::Leave(i) => {
                    self.hang_up(i);
                    self.peers[i].online = false;
                    self.picker.remove_source(key(i));
                }
                Event::Gain(i, piece) => {
                    self.peers[i].have.insert(piece);
                    self.picker.add_have(key(i), piece);
                }
                Event::Wake(i) => self.peers[i].wake_at = None,
                Event::Deliver(i, life) if life == self.peers[i].life => self.deliver(i),
                Event::Stall(i, life) if life == self.peers[i].life => {
                    let peer = &self.peers[i];
                    assert!(peer.pace.stalled(&peer.flights[0].0, self.now));
                    self.happen(Event::Leave(i));
                }
                Event::Deliver(..) | Event::Stall(..) => {}
            }
        }

        fn hang_up(&mut self, i: usize) {
            let peer = &mut self.peers[i];
            peer.life += 1;
            for (flight, pieces) in std::mem::take(&mut peer.flights) {
                peer.pace.end(flight, self.now);
                self.picker.release(key(i), pieces.as_slices().0);
                self.picker.release(key(i), pieces.as_slices().1);
            }
        }

        /// As a caller does: a second request before the first runs dry.
        fn ask(&mut self, i: usize) {
            let peer = &self.peers[i];
            let wants = peer.flights.is_empty() || peer.bytes_to_come() < peer.pace.lead_bytes();
            if !peer.online || !wants || peer.flights.len() > 1 {
                return;
            }
            let max_pieces = peer.pace.claim_pieces();
            let expected = peer.pace.expected(max_pieces);
            let n_pieces = self.picker.board.n_pieces();
            let pieces = match self.picker.next(key(i), max_pieces, expected, self.now) {
                Next::Claim(pieces) => {
                    for piece in &pieces {
                        assert!(self.picker.owners(*piece).eq([key(i)]), "owned twice outside the tail");
                    }
                    pieces
                }
                Next::Steal(pieces) => {
                    let is_free = |piece| !self.picker.has(piece) && self.picker.owners(piece).count() == 0;
                    assert!(!(0..n_pieces).any(|piece| peer.have.contains(piece) && is_free(piece)), "not the tail");
                    pieces
                }
                Next::Wait(Some(until)) if peer.wake_at.is_none_or(|at| until < at) => {
                    self.peers[i].wake_at = Some(until);
                    return self.at(until.max(self.now), Event::Wake(i));
                }
                Next::Wait(_) | Next::Done => return,
            };
            assert!(pieces.len() <= max_pieces as usize);
            assert!(pieces.iter().all(|piece| peer.have.contains(*piece) && !self.picker.has(*piece)));
            let peer = &mut self.peers[i];
            let flight = peer.pace.begin(self.now);
            let was_idle = peer.flights.is_empty();
            peer.flights.push_back((flight, pieces.into()));
            if was_idle {
                self.plan_delivery(i, self.peers[i].round_trip);
            }
        }

        fn plan_delivery(&mut self, i: usize, delay: Duration) {
            let peer = &self.peers[i];
            let life = peer.life;
            if matches!(peer.fault, Fault::Silent(after) if peer.n_sent >= after) {
                return self.at(self.now + 20 * SECOND, Event::Stall(i, life));
            }
            let usual = f64::from(PIECE_LEN) / f64::from(peer.bytes_per_second);
            let jitter = 0.8 + f64::from(self.dice.below(400)) / 1000.0;
            self.at(self.now + delay + Duration::from_secs_f64(usual * jitter), Event::Deliver(i, life));
        }

        fn deliver(&mut self, i: usize) {
            let dice = self.dice.below(100);
            let peer = &mut self.peers[i];
            let (flight, pieces) = peer.flights.front_mut().expect("void without flights");
            let piece = pieces.pop_front().expect("flights end with their last piece");
            match peer.fault {
                Fault::Lies(percent) if dice < percent => {
                    self.n_wrong += 1;
                    let until = self.picker.bad_piece(key(i), self.now);
                    self.hang_up(i);
                    return self.at(until, Event::Wake(i));
                }
                Fault::Lacks(percent) if piece % 100 < percent => self.picker.remove_have(key(i), piece),
                _ => {
                    peer.pace.on_chunk(flight, PIECE_LEN.into(), self.now);
                    peer.n_sent += 1;
                    match self.picker.received(key(i), piece) {
                        Received::New => peer.n_new += 1,
                        Received::Duplicate => self.n_duplicates += 1,
                    }
                }
            }
            if matches!(peer.fault, Fault::Lacks(_)) && !self.picker.has(piece) {
                peer.have.remove(piece);
            }
            let is_last = pieces.is_empty();
            if is_last && let Some((flight, _)) = peer.flights.pop_front() {
                peer.pace.end(flight, self.now);
            }
            if !peer.flights.is_empty() {
                self.plan_delivery(i, Duration::ZERO);
            }
        }
    }

    fn key(i: usize) -> SourceKey {
        SourceKey(u32::try_from(i).expect("a handful"))
    }

    /// 50 kB/s to 50 MB/s, evenly in the exponent.
    fn some_speed(dice: &mut Dice) -> u32 {
        50_000 * 10u32.pow(dice.below(3)) * (1 + dice.below(10))
    }

    #[test]
    fn whatever_sources_do_it_ends_when_every_piece_has_an_honest_one() {
        for seed in 0..300 {
            let mut dice = Dice(seed);
            let n = 1 + dice.below(300);
            let mut simulation = Simulation::new(n, seed);
            // Two honest halves, or a third of it each and all of it in the middle, or one seed.
            let (left, right) = (dice.below(n + 1), dice.below(n + 1));
            let slowest = [map(n, 0..left.max(right)), map(n, left.min(right)..n)].map(|have| {
                let speed = some_speed(&mut dice);
                simulation.add(Peer::new(speed, have), dice.millis(3000));
                speed
            });
            for _ in 0..dice.below(9) {
                let have = match dice.below(3) {
                    0 => HaveMap::full(n),
                    1 => map(n, (0..n).filter(|_| dice.chance(50))),
                    _ => HaveMap::empty(n),
                };
                let mut peer = Peer::new(some_speed(&mut dice), have);
                peer.round_trip = dice.millis(300);
                peer.fault = match dice.below(6) {
                    0 => Fault::Lies(100),
                    1 => Fault::Lies(20),
                    2 => Fault::Silent(dice.below(50)),
                    3 => Fault::Lacks(dice.below(101)),
                    _ => Fault::None,
                };
                let joins = dice.millis(20_000);
                let i = simulation.add(peer, joins);
                for _ in 0..dice.below(n) {
                    let gain = Event::Gain(i, dice.below(n));
                    let when = simulation.start + dice.millis(30_000);
                    simulation.at(when, gain);
                }
                if dice.chance(40) {
                    let leaves = simulation.start + joins + dice.millis(10_000);
                    simulation.at(leaves, Event::Leave(i));
                    if dice.chance(50) {
                        simulation.at(leaves + dice.millis(10_000), Event::Join(i));
                    }
                }
            }
            let took = simulation.run();
            simulation.picker.board.check();
            assert!(simulation.picker.is_done(), "seed {seed}: stuck with {}", simulation.picker.remaining());
            // The slower honest half alone, the time until the last one joins, and a stall or two on the way.
            let alone = f64::from(n) * f64::from(PIECE_LEN) / f64::from(slowest[0].min(slowest[1]));
            let bound = alone * 1.3 + 30.0;
            assert!(took.as_secs_f64() < bound, "seed {seed}: {took:?} of at most {bound}");
            let n_peers = u32::try_from(simulation.peers.len()).expect("a handful");
            let n_bans = took.as_secs().div_ceil(30).max(1).ilog2() + 2;
            assert!(simulation.n_wrong <= n_bans * n_peers, "seed {seed}: {} wrong", simulation.n_wrong);
        }
    }

    #[test]
    fn sources_share_the_work_by_speed_and_waste_little() {
        let (mut n_all, mut n_duplicates) = (0, 0);
        for seed in 0..60 {
            let mut dice = Dice(seed);
            let n = 1500 + dice.below(500);
            let mut simulation = Simulation::new(n, seed);
            let speeds: Vec<u32> = (0..2 + dice.below(5)).map(|_| some_speed(&mut dice)).collect();
            for speed in &speeds {
                let mut peer = Peer::new(*speed, HaveMap::full(n));
                peer.round_trip = dice.millis(50);
                simulation.add(peer, Duration::ZERO);
            }
            let took = simulation.run().as_secs_f64();
            assert!(simulation.picker.is_done());
            let all: f64 = speeds.iter().map(|speed| f64::from(*speed)).sum();
            let ideal = f64::from(n) * f64::from(PIECE_LEN) / all;
            assert!(took < ideal * 1.1 + 0.1, "seed {seed}: {took} instead of {ideal}");
            for (peer, speed) in simulation.peers.iter().zip(&speeds) {
                let share = f64::from(n) * f64::from(*speed) / all;
                let off = (f64::from(peer.n_new) - share).abs();
                assert!(off < share * 0.1 + 5.0, "seed {seed}: {} instead of {share} at {speed}", peer.n_new);
            }
            assert!(simulation.n_duplicates as usize <= 4 * speeds.len(), "seed {seed}: {}", simulation.n_duplicates);
            n_all += n;
            n_duplicates += simulation.n_duplicates;
        }
        assert!(n_duplicates * 200 < n_all, "{n_duplicates} of {n_all}");
    }

    #[test]
    fn complementary_halves_complete_one_another() {
        let n = 400;
        let mut simulation = Simulation::new(n, 3);
        for which in 0..2 {
            let half = map(n, (0..n).filter(|piece| piece % 2 == which));
            simulation.add(Peer::new(10_000_000, half), Duration::ZERO);
        }
        let took = simulation.run();
        assert!(simulation.picker.is_done() && simulation.n_duplicates == 0);
        assert!(took.as_secs_f64() < f64::from(n) * f64::from(PIECE_LEN) / 20e6 * 1.1, "{took:?}");
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
                match dice.below(12) {
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
                    _ => drop(picker.next(key, dice.below(9), dice.millis(5000), now)),
                }
                picker.board.check();
                let owners: Vec<_> =
                    (0..n).flat_map(|piece| picker.owners(piece).map(move |key| (piece, key))).collect();
                for (piece, key) in owners {
                    let source = &picker.sources[&key];
                    assert!(source.counted && source.have.contains(piece), "seed {seed}");
                }
            }
        }
    }
}
