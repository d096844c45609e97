//! Everybody who may have something of what is wanted: where they are, what they hold, how they stand, whom to work with.
//!
//! Pure: time and chance are arguments. One owner: nobody else keeps what a source holds or how it stands.
//!
//! - What is known of a source adds up. Only a full map replaces what was known, and only of its own content.
//! - `Candidate → Connecting → Active → Resting(until) → ... → Banned(until)`: nobody is given up for being away; a rest gets longer
//!   up to `LONGEST_REST`. Whoever lied about three contents is not asked again.
//! - A wrong piece costs the source that content; the second content costs it a ban.
//!
//! Bounds: `MAX_CANDIDATES` sources, of which `MAX_HINTS` come from the hints of any one of them; `MAX_LIVE` at work, of
//! which those that are being dialled for longer than `HEDGE` take no place, up to `MAX_DIALLED` in all.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    time::{Duration, Instant},
};

mod known;

pub use self::known::{Holding, Refusal};
use self::known::{KnownSource, Refused, State};
use super::{
    contents::Position,
    picker::SourceKey,
    source::CONNECTIONS,
    source_stats::{SourceStats, Standing},
};
use crate::{backoff::Backoff, have::HaveMap, identity::PeerId};

/// Sources worked with at once.
const MAX_LIVE: usize = 32;
/// Sources worked with or dialled at once.
const MAX_DIALLED: usize = 96;
/// Sources that are known of.
const MAX_CANDIDATES: usize = 1024;
/// Sources that one of them may tell of.
const MAX_HINTS: usize = 64;
/// How long a source may take to answer before another one is dialled in its place.
const HEDGE: Duration = Duration::from_secs(1);
const FIRST_REST: Duration = Duration::from_millis(250);
/// The longest that a source is left alone which cannot be reached.
const LONGEST_REST: Duration = Duration::from_secs(8);
/// Until a source is first asked again for what it did not serve; then twice as long each time. A file that was touched is
/// offered again when it was quiet for two seconds and is hashed.
const AGAIN: Duration = Duration::from_millis(500);
/// How often it is asked again, without a byte of it in between.
const MAX_AGAIN: u32 = 3;
/// Contents of which a source may have sent something wrong before it is asked no more.
const MAX_LIES: u32 = 3;

/// How a piece of work with a source ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// There was nothing (more) to do.
    Idle,
    /// It was of no use, and others wait for its place.
    MadeRoom,
    /// It could not be reached, or broke off.
    Failed(String),
    /// It broke the rules, in a way that has to do with no one content.
    Lied(String),
}

/// All of them.
#[derive(Debug, Default)]
pub struct Sources {
    known: HashMap<PeerId, KnownSource>,
    keys: HashMap<SourceKey, PeerId>,
    /// Keys that were given.
    n_keys: u32,
}

impl Sources {
    /// What each did that was tried, for people.
    pub fn stats(&self) -> impl Iterator<Item = (PeerId, &SourceStats)> {
        let was_tried = |known: &KnownSource| {
            known.state != State::Candidate
                || known.last_here.is_some()
                || !known.stats.trouble.is_empty()
        };
        let tried = self.known.iter().filter(move |(_, known)| was_tried(known));
        tried.map(|(peer, known)| (*peer, &known.stats))
    }

    /// How long nothing useful has come from a source that is connected.
    pub fn idle_for(&self, peer: PeerId, now: Instant) -> Duration {
        let last_here = self.known.get(&peer).and_then(|known| known.last_here);
        last_here.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }

    /// Are all places taken, while somebody who may be of use waits for one?
    pub fn is_crowded(&self, now: Instant, needs: impl Fn(Position) -> bool) -> bool {
        self.n_live() >= MAX_LIVE
            && self
                .known
                .values()
                .any(|known| known.is_due(now) && known.is_of_use(&needs))
    }

    /// Changes what is noted of a source, if it is known.
    pub fn note(&mut self, peer: PeerId, change: impl FnOnce(&mut SourceStats)) {
        if let Some(known) = self.known.get_mut(&peer) {
            change(&mut known.stats);
        }
    }

    /// What is noted of a source.
    pub fn stats_of(&self, peer: PeerId) -> Option<&SourceStats> {
        self.known.get(&peer).map(|known| &known.stats)
    }

    /// The picker's key of a source.
    pub fn key(&self, peer: PeerId) -> Option<SourceKey> {
        self.known.get(&peer).map(|known| known.key)
    }

    /// Who has this key.
    pub fn peer(&self, key: SourceKey) -> Option<PeerId> {
        self.keys.get(&key).copied()
    }

    /// Where a source is, best address first.
    pub fn addresses(&self, peer: PeerId) -> &[String] {
        self.known
            .get(&peer)
            .map_or(&[], |known| known.addresses.as_slice())
    }

    /// What a source holds of a content.
    pub fn holding(&self, peer: PeerId, at: Position) -> Holding {
        self.known
            .get(&peer)
            .map_or(Holding::Nothing, |known| known.holding(at))
    }

    /// Could it have something of this content?
    pub fn may_have(&self, peer: PeerId, at: Position) -> bool {
        self.known
            .get(&peer)
            .is_some_and(|known| known.may_have(at))
    }

    /// Is it connected?
    pub fn is_active(&self, peer: PeerId) -> bool {
        self.known
            .get(&peer)
            .is_some_and(|known| known.state == State::Active)
    }

    /// Sources that are connected.
    pub fn active(&self) -> impl Iterator<Item = PeerId> + '_ {
        let active = |(peer, known): (&PeerId, &KnownSource)| {
            (known.state == State::Active).then_some(*peer)
        };
        self.known.iter().filter_map(active)
    }

    /// The tracker, or whoever asked for the get, says where a source is and that it holds a content; true if that is news.
    pub fn listed(
        &mut self,
        peer: PeerId,
        addresses: &[String],
        at: Position,
        whole: bool,
    ) -> bool {
        self.told_of(peer, addresses, (at, whole), false)
    }

    /// `is_hint`: another source says so.
    fn told_of(
        &mut self,
        peer: PeerId,
        addresses: &[String],
        (at, whole): (Position, bool),
        is_hint: bool,
    ) -> bool {
        if addresses.is_empty() {
            return false;
        }
        let Some(known) = self.entry(peer, is_hint) else {
            return false;
        };
        known.is_hint &= is_hint;
        let mut is_news = known.addresses != addresses;
        if is_news {
            addresses.clone_into(&mut known.addresses);
            known.backoff.reset();
            if let State::Resting(_) = known.state {
                known.state = State::Candidate;
            }
        }
        if known.whole.contains(&at) {
            return is_news;
        }
        if whole {
            is_news |= known.whole.insert(at);
            known.part.remove(&at);
        } else if let Entry::Vacant(unknown) = known.part.entry(at) {
            unknown.insert(None);
            is_news = true;
        }
        is_news
    }

    /// The tracker changed a row: whoever refused this content and is listed with it may be asked once more.
    pub fn listed_again(&mut self, peer: PeerId, at: Position) -> bool {
        let Some(known) = self.known.get_mut(&peer) else {
            return false;
        };
        known.refusals.remove(&at).is_some()
    }

    /// A source says that somebody else has something of a content; true if that is news.
    pub fn hinted(&mut self, by: PeerId, peer: PeerId, addresses: &[String], at: Position) -> bool {
        if addresses.is_empty() {
            return false;
        }
        let is_new = !self.known.contains_key(&peer);
        let Some(teller) = self.known.get_mut(&by) else {
            return false;
        };
        if is_new {
            if teller.n_hints >= MAX_HINTS {
                return false;
            }
            teller.n_hints += 1;
            return self.told_of(peer, addresses, (at, false), true);
        }
        // Where somebody known is, others do not say.
        let own = self.addresses(peer).to_vec();
        self.told_of(peer, &own, (at, false), true)
    }

    fn entry(&mut self, peer: PeerId, is_hint: bool) -> Option<&mut KnownSource> {
        if !self.known.contains_key(&peer) {
            if self.known.len() >= MAX_CANDIDATES && (is_hint || !self.forget_a_hint()) {
                return None;
            }
            // The first key is that of this machine; those that follow one are for further connections.
            let n = self.n_keys;
            self.n_keys += 1;
            let key = SourceKey(n.saturating_mul(CONNECTIONS).saturating_add(1));
            self.keys.insert(key, peer);
            let known = KnownSource {
                key,
                state: State::Candidate,
                addresses: vec![],
                whole: BTreeSet::new(),
                part: BTreeMap::new(),
                refusals: BTreeMap::new(),
                refused: Refused::default(),
                changed: BTreeSet::new(),
                wrong: BTreeSet::new(),
                backoff: Backoff::new(FIRST_REST, LONGEST_REST),
                last_here: None,
                n_hints: 0,
                is_hint,
                has_told: false,
                stats: SourceStats::default(),
            };
            self.known.insert(peer, known);
        }
        self.known.get_mut(&peer)
    }

    /// Makes room for somebody whom the tracker lists: hearsay that came to nothing goes first. True if there is room.
    fn forget_a_hint(&mut self) -> bool {
        let is_idle =
            |known: &KnownSource| known.is_hint && known.last_here.is_none() && !known.is_live();
        let idle = self.known.iter().find(|(_, known)| is_idle(known));
        let Some((peer, key)) = idle.map(|(peer, known)| (*peer, known.key)) else {
            return false;
        };
        self.known.remove(&peer);
        self.keys.remove(&key);
        true
    }

    /// The source holds all of a content, by its own word. True if that is news.
    pub fn has_whole(&mut self, peer: PeerId, at: Position) -> bool {
        self.hear(peer, at, |known| {
            known.part.remove(&at);
            known.whole.insert(at)
        })
    }

    /// The source holds exactly these pieces of a content.
    pub fn has_pieces(&mut self, peer: PeerId, at: Position, map: HaveMap) {
        self.hear(peer, at, |known| {
            known.whole.remove(&at);
            known.part.insert(at, Some(map));
            true
        });
    }

    /// The source holds these pieces of a content, too.
    pub fn has_more(&mut self, peer: PeerId, at: Position, pieces: &[u32], n_pieces: u32) {
        self.hear(peer, at, |known| {
            if known.whole.contains(&at) {
                return false;
            }
            let map = known.part.entry(at).or_default();
            let map = map.get_or_insert_with(|| HaveMap::empty(n_pieces));
            pieces.iter().for_each(|piece| _ = map.insert(*piece));
            true
        });
    }

    fn hear(
        &mut self,
        peer: PeerId,
        at: Position,
        change: impl FnOnce(&mut KnownSource) -> bool,
    ) -> bool {
        let Some(known) = self.known.get_mut(&peer) else {
            return false;
        };
        let was_refused = known.refusals.remove(&at).is_some();
        known.changed.remove(&at);
        change(known) || was_refused
    }

    /// The source does not serve this content, or a piece of it, now. It is asked again, but not for ever; true if it will be.
    pub fn refuses(
        &mut self,
        peer: PeerId,
        (at, piece): (Position, Option<u32>),
        why: Refusal,
        now: Instant,
    ) -> bool {
        let Some(known) = self.known.get_mut(&peer) else {
            return false;
        };
        // What changed is gone soon after.
        let why = match known.changed.contains(&at) {
            true => Refusal::Changed,
            false => why,
        };
        if why == Refusal::Changed {
            known.changed.insert(at);
        }
        let refused = &mut known.refused;
        if refused.bytes < known.stats.bytes {
            (refused.n, refused.bytes) = (0, known.stats.bytes);
        }
        if refused.n < MAX_AGAIN {
            let pause = AGAIN * 2_u32.pow(refused.n);
            refused.until.get_or_insert(now + pause);
            refused.pieces.push((at, piece));
            if piece.is_none() {
                known.refusals.insert(at, why);
            }
            return true;
        }
        known.refusals.insert(at, why);
        false
    }

    /// What was refused of a content no longer counts: it is not what it was taken for.
    pub fn forget_refusals(&mut self, at: Position) {
        for known in self.known.values_mut() {
            known.refusals.remove(&at);
            known.refused.pieces.retain(|(of, _)| *of != at);
        }
    }

    /// What may be asked for again by now: pieces, or whole contents.
    pub fn ask_again(&mut self, now: Instant) -> Vec<(PeerId, Position, Option<u32>)> {
        let mut due = vec![];
        for (peer, known) in &mut self.known {
            if known.refused.until.take_if(|until| *until <= now).is_none() {
                continue;
            }
            known.refused.n += 1;
            for (at, piece) in std::mem::take(&mut known.refused.pieces) {
                if piece.is_none() {
                    known.refusals.remove(&at);
                }
                due.push((*peer, at, piece));
            }
        }
        due
    }

    /// Contents that are refused for now, in part or whole, and will be asked for again.
    pub fn asked_again(&self) -> BTreeSet<Position> {
        let waiting = self
            .known
            .values()
            .filter(|known| known.refused.until.is_some());
        let pieces = waiting.flat_map(|known| &known.refused.pieces);
        pieces.map(|(at, _)| *at).collect()
    }

    /// The source sent something wrong of this content, which it is not asked for again. True if that is the second content,
    /// and more than a mistake.
    pub fn is_wrong(&mut self, peer: PeerId, at: Position) -> bool {
        let Some(known) = self.known.get_mut(&peer) else {
            return false;
        };
        known.stats.lies += u32::from(known.wrong.insert(at));
        known.stats.is_proven = false;
        known.wrong.len() > 1
    }

    /// Did it send something wrong of this content?
    pub fn was_wrong(&self, peer: PeerId, at: Position) -> bool {
        self.known
            .get(&peer)
            .is_some_and(|known| known.wrong.contains(&at))
    }

    /// Whom to connect to now, if to anybody: of those who have something that `needs` says is of use, whoever was here
    /// before, else anyone.
    pub fn next_to_dial(
        &mut self,
        now: Instant,
        random: u64,
        needs: impl Fn(Position) -> bool,
    ) -> Option<PeerId> {
        let (mut n_live, mut n_dialled) = (0, 0);
        for known in self.known.values() {
            match known.state {
                State::Active => n_live += 1,
                State::Connecting(since) if now.saturating_duration_since(since) < HEDGE => {
                    n_live += 1
                }
                State::Connecting(_) => n_dialled += 1,
                _ => {}
            }
        }
        if n_live >= MAX_LIVE || n_live + n_dialled >= MAX_DIALLED {
            return None;
        }
        let due = self
            .known
            .iter()
            .filter(|(_, known)| known.is_due(now) && known.is_of_use(&needs));
        // Whoever was never tried comes before those that failed.
        let rank = |known: &KnownSource| (known.backoff.n_failures(), known.last_here.is_none());
        let best = due.min_by_key(|(_, known)| (rank(known), shuffled(random, known.key)))?;
        let peer = *best.0;
        let known = self.known.get_mut(&peer)?;
        known.state = State::Connecting(now);
        known.stats.standing = Standing::Connecting;
        Some(peer)
    }

    /// It is connected, at this address.
    pub fn connected(&mut self, peer: PeerId, address: String, now: Instant) {
        if let Some(known) = self.known.get_mut(&peer) {
            (known.state, known.last_here, known.has_told) = (State::Active, Some(now), false);
            (known.stats.standing, known.stats.address) = (Standing::Active, address);
        }
    }

    /// A good piece came from it.
    pub fn brought(&mut self, peer: PeerId, now: Instant) {
        if let Some(known) = self.known.get_mut(&peer) {
            known.last_here = Some(now);
            known.backoff.reset();
            known.stats.is_proven = true;
        }
    }

    /// Work with it has ended; it is asked again later, unless it is asked no more. `random` is in 0..1. Says whether that
    /// is worth a line: its first failure in a row, or its ban.
    pub fn ended(
        &mut self,
        peer: PeerId,
        ending: Ending,
        now: Instant,
        random: f64,
    ) -> Option<Standing> {
        let known = self.known.get_mut(&peer)?;
        if known.state == State::Active {
            known.last_here = Some(now);
        }
        let is_banned = matches!(known.state, State::Banned(_) | State::Gone);
        let (state, text, is_worth_a_line) = match ending {
            _ if is_banned => return None,
            Ending::Idle => (State::Resting(now + FIRST_REST), String::new(), false),
            Ending::MadeRoom => (State::Resting(now + LONGEST_REST), String::new(), false),
            Ending::Failed(text) => {
                let rest = known.backoff.delay(random);
                let is_first = known.backoff.n_failures() == 1;
                (State::Resting(now + rest), text, is_first)
            }
            Ending::Lied(text) => {
                known.stats.lies = known.stats.lies.saturating_add(1);
                known.stats.is_proven = false;
                let rest = known.backoff.delay(random);
                return Some(self.ban(peer, now + rest, text));
            }
        };
        (known.state, known.stats.standing, known.stats.trouble) = (state, Standing::Resting, text);
        is_worth_a_line.then_some(Standing::Resting)
    }

    /// It lied: nothing is asked of it until then, or ever, if it has lied too often.
    pub fn ban(&mut self, peer: PeerId, until: Instant, why: String) -> Standing {
        let Some(known) = self.known.get_mut(&peer) else {
            return Standing::Gone;
        };
        let is_over = known.stats.lies >= MAX_LIES;
        known.state = if is_over {
            State::Gone
        } else {
            State::Banned(until)
        };
        known.stats.trouble = why;
        known.stats.standing = if is_over {
            Standing::Gone
        } else {
            Standing::Banned
        };
        known.stats.standing
    }

    /// Its news have begun to come, or it has none.
    pub fn told(&mut self, peer: PeerId) {
        if let Some(known) = self.known.get_mut(&peer) {
            known.has_told = true;
        }
    }

    /// Whether [`told`](Self::told) was said since it was connected.
    pub fn has_told(&self, peer: PeerId) -> bool {
        self.known.get(&peer).is_none_or(|known| known.has_told)
    }

    /// When somebody who held this content was last here.
    pub fn last_here(&self, at: Position) -> Option<Instant> {
        let held = |known: &&KnownSource| known.whole.contains(&at) || known.part.contains_key(&at);
        self.known
            .values()
            .filter(held)
            .filter_map(|known| known.last_here)
            .max()
    }

    /// Is there anybody who may have this content and may be asked for it, now or later?
    pub fn is_hoped_for(&self, at: Position) -> bool {
        let may = |known: &KnownSource| known.state != State::Gone && known.may_have(at);
        self.known.values().any(may)
    }

    /// Why nobody serves this content who had it: the strongest of the reasons that are known.
    pub fn why_not(&self, at: Position) -> Option<Refusal> {
        let why = |known: &KnownSource| {
            let had = known.whole.contains(&at) || known.part.contains_key(&at);
            let is_out = matches!(known.state, State::Gone | State::Banned(_));
            match known.wrong.contains(&at) || is_out && had {
                true => Some(Refusal::Wrong),
                false => known.refusals.get(&at).copied(),
            }
        };
        // That somebody honest has it no more tells more than that somebody lied.
        self.known.values().filter_map(why).min()
    }

    /// What last went wrong with somebody who holds this content.
    pub fn trouble(&self, at: Position) -> Option<(PeerId, &str)> {
        let held = |known: &KnownSource| known.whole.contains(&at) || known.part.contains_key(&at);
        let mut known = self.known.iter();
        let (peer, known) = known.find(|(_, k)| held(k) && !k.stats.trouble.is_empty())?;
        Some((*peer, &known.stats.trouble))
    }

    /// Is somebody at work who has something of use?
    pub fn is_anybody_of_use(&self, needs: impl Fn(Position) -> bool) -> bool {
        self.known
            .values()
            .any(|known| known.state == State::Active && known.is_of_use(&needs))
    }

    /// Sources at work, and those that are being dialled.
    pub fn n_live(&self) -> usize {
        self.known.values().filter(|known| known.is_live()).count()
    }
}

/// A number for a source that differs from one `random` to the next.
fn shuffled(random: u64, key: SourceKey) -> u64 {
    (u64::from(key.0) ^ random)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(31)
}
