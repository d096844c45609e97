//! The book-keeping of a get: what is wanted, who has it, which piece is asked of whom, joined so that they never disagree.
//!
//! Pure: no I/O, no clock; time and chance are arguments. Every change is one call under the caller's lock, so nothing is
//! half done when a future is dropped, and whoever is woken afterwards sees all of it.
//!
//! Invariants: the picker numbers the pieces of the open contents as `Contents` does; of a source it knows exactly what
//! `Sources` says of the open contents while the source is connected, and nothing else; what belongs to an earlier numbering
//! is told by its `epoch` and ignored.

mod ranges;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    time::{Duration, Instant},
};

use super::{
    contents::{Aside, Contents, Learnt, Position},
    picker::{Offer, Picker, Received, SourceKey},
    source::CONNECTIONS,
    source_stats::Standing,
    sources::{Ending, Holding, Refusal, Sources},
};
use crate::{
    content::{Manifest, PieceIndex},
    have::HaveMap,
    identity::PeerId,
    proto::MAX_CONTENTS,
};

/// This machine, as a source.
pub const LOCAL: SourceKey = SourceKey(0);
/// While nobody has told a manifest for so long, one more source is asked ...
const ASK_ANOTHER: Duration = Duration::from_millis(500);
/// ... up to so many: all that are worked with.
const MAX_ASKED: usize = 32;
/// How long to hope that somebody has a content again which those who had it do not serve.
const GRACE: Duration = Duration::from_secs(4);
/// Piece numbers after which they begin anew, when nothing is open: each costs some bytes in the picker.
const MAX_NUMBERS: u32 = 1 << 22;

/// What a wrong piece cost its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Penalty {
    /// It was known for that already.
    Known,
    /// It is not asked for this content any more.
    Content,
    /// It is asked for nothing, for a while or ever.
    Source(Standing),
}

/// All of it. `H` is what the caller keeps of an open content.
pub struct Engine<H> {
    /// What is wanted.
    pub contents: Contents<H>,
    /// Who has it.
    pub sources: Sources,
    /// Which piece is asked of whom.
    pub picker: Picker,
    epoch: u32,
    seed: u64,
    /// Who was asked for a manifest, and when.
    asked: BTreeMap<Position, Vec<(PeerId, Instant)>>,
    /// Since when nobody serves a content.
    forlorn: BTreeMap<Position, Instant>,
    /// When something useful last came, or waiting was no source's fault.
    pub last_use: Instant,
}

impl<H> Engine<H> {
    /// Nothing is open, nobody is known. Equal seeds and calls give equal answers.
    pub fn new(contents: Contents<H>, seed: u64, now: Instant) -> Self {
        Self {
            contents,
            sources: Sources::default(),
            picker: Picker::new(0, seed),
            epoch: 0,
            seed,
            asked: BTreeMap::new(),
            forlorn: BTreeMap::new(),
            last_use: now,
        }
    }

    /// Which numbering of pieces is in force.
    pub const fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The manifest of a content; see [`Contents::learn`]. The pieces of another size are nobody's business any more.
    pub fn learn(&mut self, at: Position, manifest: Manifest) -> Learnt {
        let before = self
            .contents
            .opened(at)
            .map(super::contents::OpenContent::numbers);
        let learnt = self.contents.learn(at, manifest);
        if let (Learnt::Known(..), Some(numbers)) = (learnt, before) {
            numbers.for_each(|piece| self.picker.mark_done(piece));
            self.sources.forget_refusals(at);
        }
        learnt
    }

    /// The files of these contents are open, with such pieces in them; what sources have of the others may be asked for
    /// from now on.
    pub fn open(&mut self, files: Vec<(Position, H, HaveMap)>) {
        let mut opened = vec![];
        for (at, handle, have) in files {
            let n_missing = have.len() - have.count();
            if let Some(numbers) = self.contents.open_up(at, handle, n_missing) {
                opened.push((self.contents.original(at), numbers, have));
            }
        }
        let sources = &self.sources;
        let offer = |key: SourceKey, i: usize| {
            let holding = sources
                .peer(key)
                .map(|peer| sources.holding(peer, opened[i].0));
            match holding {
                Some(Holding::Whole) => Offer::All,
                Some(Holding::Unknown | Holding::Pieces(_)) => Offer::Part,
                Some(Holding::Nothing) | None => Offer::Nothing,
            }
        };
        let counts: Vec<u32> = opened
            .iter()
            .map(|(_, numbers, _)| numbers.end - numbers.start)
            .collect();
        self.picker.grow(&counts, offer);
        let active: Vec<PeerId> = self.sources.active().collect();
        for (of, numbers, have) in opened {
            have.iter()
                .for_each(|piece| self.picker.mark_done(numbers.start + piece));
            for peer in &active {
                if let (Some(key), Holding::Pieces(map)) =
                    (self.sources.key(*peer), self.sources.holding(*peer, of))
                {
                    map.iter()
                        .for_each(|piece| self.picker.add_have(key, numbers.start + piece));
                }
            }
        }
    }

    /// Numbers pieces from 0 again when there are very many of them and nothing is open. True if it was done.
    pub fn renumber(&mut self) -> bool {
        if self.contents.n_pieces() < MAX_NUMBERS || self.contents.n_in_hand() > 0 {
            return false;
        }
        self.contents.renumber();
        self.epoch += 1;
        self.picker = Picker::new(0, self.seed.wrapping_add(self.epoch.into()));
        let active: Vec<PeerId> = self.sources.active().collect();
        active.into_iter().for_each(|peer| self.feed(peer));
        true
    }

    /// Is there room for the pieces of a content of so many?
    pub fn has_room(&self) -> bool {
        self.contents.n_pieces() < MAX_NUMBERS
    }

    /// Whom to connect to now, if to anybody.
    pub fn next_to_dial(&mut self, now: Instant, random: u64) -> Option<PeerId> {
        let contents = &self.contents;
        self.sources
            .next_to_dial(now, random, |at| needs(contents, at))
    }

    /// A source is connected: the picker learns what it holds.
    pub fn connected(&mut self, peer: PeerId, address: String, now: Instant) {
        self.sources.connected(peer, address, now);
        self.feed(peer);
    }

    /// Work with a source has ended. Says whether that is worth a line.
    pub fn ended(
        &mut self,
        peer: PeerId,
        ending: Ending,
        now: Instant,
        random: f64,
    ) -> Option<Standing> {
        self.withdraw(peer);
        self.sources.ended(peer, ending, now, random)
    }

    /// Everything that was asked of a source is free again, and it offers nothing.
    fn withdraw(&mut self, peer: PeerId) {
        if let Some(first) = self.sources.key(peer) {
            for connection in 0..CONNECTIONS {
                self.picker.remove_source(SourceKey(first.0 + connection));
            }
        }
        for asked in self.asked.values_mut() {
            asked.retain(|(whom, _)| *whom != peer);
        }
    }

    /// Tells the picker all that a source holds of the open contents.
    fn feed(&mut self, peer: PeerId) {
        let Some(key) = self.sources.key(peer) else {
            return;
        };
        let mut have = HaveMap::empty(self.contents.n_pieces());
        for (at, open) in self.contents.open() {
            match self.sources.holding(peer, self.contents.original(at)) {
                Holding::Whole => open.numbers().for_each(|piece| _ = have.insert(piece)),
                Holding::Pieces(map) => map
                    .iter()
                    .for_each(|piece| _ = have.insert(open.first + piece)),
                Holding::Unknown | Holding::Nothing => {}
            }
        }
        // Pieces that are done do not matter: a source that has all others is a complete one.
        let mut with_done = have.clone();
        (0..have.len())
            .filter(|piece| self.picker.has(*piece))
            .for_each(|piece| _ = with_done.insert(piece));
        let have = if with_done.is_complete() {
            with_done
        } else {
            have
        };
        self.picker.set_have(key, &have);
    }

    /// The numbers of a content that is open, once for each name under which it is wanted.
    fn numbers(&self, of: Position) -> Vec<Range<u32>> {
        let open = self
            .contents
            .same(of)
            .filter_map(|at| self.contents.opened(at));
        open.map(super::contents::OpenContent::numbers).collect()
    }

    /// A source has more of a content than was known.
    fn heard(&mut self, peer: PeerId, of: Position) {
        self.take_up(of);
        let Some(key) = self
            .sources
            .key(peer)
            .filter(|_| self.sources.is_active(peer))
        else {
            return;
        };
        let holding = self.sources.holding(peer, of);
        for numbers in self.numbers(of) {
            for (piece, number) in (0..).zip(numbers) {
                let has = match &holding {
                    Holding::Whole => true,
                    Holding::Pieces(map) => map.contains(piece),
                    Holding::Unknown | Holding::Nothing => false,
                };
                if has {
                    self.picker.add_have(key, number);
                }
            }
        }
    }

    fn take_up(&mut self, of: Position) {
        self.forlorn.remove(&of);
        self.contents.take_up(of);
    }

    /// The tracker, or whoever asked for the get, says that a peer holds a content. True if that is news.
    pub fn listed(
        &mut self,
        peer: PeerId,
        addresses: &[String],
        of: Position,
        whole: bool,
    ) -> bool {
        let is_back = self.sources.listed_again(peer, of);
        let is_news = self.sources.listed(peer, addresses, of, whole) || is_back;
        if is_news && self.sources.may_have(peer, of) {
            self.heard(peer, of);
        }
        is_news
    }

    /// A source says that somebody else has something of a content. True if that is news.
    pub fn hinted(&mut self, by: PeerId, peer: PeerId, addresses: &[String], of: Position) -> bool {
        let is_news = self.sources.hinted(by, peer, addresses, of);
        if is_news && self.sources.may_have(peer, of) {
            self.heard(peer, of);
        }
        is_news
    }

    /// The source has all of a content.
    pub fn has_whole(&mut self, peer: PeerId, of: Position) {
        if self.sources.has_whole(peer, of) {
            self.heard(peer, of);
        }
    }

    /// The source has exactly these pieces of a content.
    pub fn has_pieces(&mut self, peer: PeerId, of: Position, map: HaveMap) {
        if self.sources.was_wrong(peer, of) {
            return;
        }
        let Some(key) = self.sources.key(peer) else {
            return;
        };
        for numbers in self.numbers(of) {
            for piece in map.iter() {
                self.picker.add_have(key, numbers.start + piece);
            }
            for piece in map.missing() {
                self.picker.remove_have(key, numbers.start + piece);
            }
        }
        let is_empty = map.is_empty();
        self.sources.has_pieces(peer, of, map);
        if !is_empty {
            self.take_up(of);
        }
    }

    /// The source has more pieces of a content.
    pub fn has_more(&mut self, peer: PeerId, of: Position, pieces: &[u32]) {
        if self.sources.was_wrong(peer, of) {
            return;
        }
        let Some(key) = self.sources.key(peer) else {
            return;
        };
        let Some(n_pieces) = self.contents.opened(of).map(|open| open.layout.n_pieces()) else {
            return;
        };
        for numbers in self.numbers(of) {
            for piece in pieces {
                self.picker.add_have(key, numbers.start + piece);
            }
        }
        self.sources.has_more(peer, of, pieces, n_pieces);
        self.take_up(of);
    }

    /// The source has promised first copies of these pieces to others.
    pub fn promised(&mut self, of: Position, pieces: &[u32], now: Instant) {
        for numbers in self.numbers(of) {
            self.picker
                .promised(pieces.iter().map(|piece| numbers.start + piece), now);
        }
    }

    /// The source serves nothing of a content now, for this reason.
    pub fn refuses(&mut self, peer: PeerId, of: Position, why: Refusal, now: Instant) {
        self.sources.refuses(peer, (of, None), why, now);
        self.strike(peer, of);
    }

    /// The picker asks the source for nothing of this content.
    fn strike(&mut self, peer: PeerId, of: Position) {
        let Some(key) = self.sources.key(peer) else {
            return;
        };
        for number in self.numbers(of).into_iter().flatten() {
            self.picker.remove_have(key, number);
            for connection in 1..CONNECTIONS {
                let key = SourceKey(key.0 + connection);
                self.picker.release(key, &[number]);
            }
        }
    }

    /// The source does not serve a piece that it was asked for.
    pub fn refuses_piece(
        &mut self,
        peer: PeerId,
        (at, piece): (Position, PieceIndex),
        why: Refusal,
        now: Instant,
    ) {
        let of = self.contents.original(at);
        let (Some(key), Some(number)) = (self.sources.key(peer), self.contents.number(at, piece))
        else {
            return;
        };
        self.picker.remove_have(key, number);
        let is_asked_again = self
            .sources
            .refuses(peer, (of, Some(piece.get())), why, now);
        if !is_asked_again {
            self.strike(peer, of);
        }
    }

    /// Lets sources be asked again for what they did not serve, when its time has come. True if there is something.
    pub fn ask_again(&mut self, now: Instant) -> bool {
        let due = self.sources.ask_again(now);
        for (peer, of, piece) in &due {
            if self.sources.was_wrong(*peer, *of) {
                continue;
            }
            let Some(key) = self
                .sources
                .key(*peer)
                .filter(|_| self.sources.is_active(*peer))
            else {
                continue;
            };
            match piece {
                Some(piece) => {
                    for numbers in self.numbers(*of) {
                        self.picker.add_have(key, numbers.start + piece);
                    }
                }
                None => self.heard(*peer, *of),
            }
        }
        !due.is_empty()
    }

    /// A piece is written, which came from this connection of a source, or from this disk.
    pub fn landed(
        &mut self,
        key: SourceKey,
        (at, piece): (Position, PieceIndex),
        now: Instant,
    ) -> Received {
        let Some(number) = self.contents.number(at, piece) else {
            return Received::Duplicate;
        };
        let received = self.picker.received(key, number);
        if received == Received::New {
            self.last_use = now;
            self.contents.piece_came(at);
            self.forlorn.remove(&self.contents.original(at));
        }
        received
    }

    /// The disk lost these pieces; how often that happened to this content.
    pub fn lose(&mut self, at: Position, pieces: &[u32]) -> u32 {
        let Some(first) = self.contents.opened(at).map(|open| open.first) else {
            return 0;
        };
        let numbers = || pieces.iter().map(|piece| first + piece);
        let n = numbers().filter(|piece| self.picker.has(*piece)).count();
        self.picker.lose(numbers());
        self.contents.lose(at, u32::try_from(n).unwrap_or(u32::MAX))
    }

    /// The source sent something wrong of a content. That content is not asked of it any more; on the second, nothing is.
    pub fn is_wrong(&mut self, peer: PeerId, at: Position, why: &str, now: Instant) -> Penalty {
        let of = self.contents.original(at);
        // Also of what was asked for since: nobody else gives it back.
        self.strike(peer, of);
        if self.sources.was_wrong(peer, of) {
            return Penalty::Known;
        }
        // One that has nothing else is of no use at all.
        if !self.sources.is_wrong(peer, of) && self.is_of_use(peer) {
            return Penalty::Content;
        }
        let until = match self.sources.key(peer) {
            Some(key) => self.picker.bad_piece(key, now),
            None => now,
        };
        Penalty::Source(self.sources.ban(peer, until, why.to_owned()))
    }

    /// Contents whose manifests this source is to be asked for now; noted as asked until [`answered`](Self::answered).
    pub fn next_manifests(&mut self, peer: PeerId, now: Instant) -> Vec<Position> {
        let mut chosen = vec![];
        for at in self.contents.wanted() {
            if !self.sources.may_have(peer, self.contents.original(at)) {
                continue;
            }
            let asked = self.asked.get(&at).map_or(&[][..], Vec::as_slice);
            let is_soon = asked
                .last()
                .is_some_and(|(_, when)| now.saturating_duration_since(*when) < ASK_ANOTHER);
            let is_asked = asked.iter().any(|(whom, _)| *whom == peer);
            if is_soon || is_asked || asked.len() >= MAX_ASKED {
                continue;
            }
            chosen.push(at);
            if chosen.len() == MAX_CONTENTS {
                break;
            }
        }
        for at in &chosen {
            self.asked.entry(*at).or_default().push((peer, now));
        }
        chosen
    }

    /// The source was asked for these manifests, and will say no more.
    pub fn answered(&mut self, peer: PeerId, contents: &[Position]) {
        for at in contents {
            if let Some(asked) = self.asked.get_mut(at) {
                asked.retain(|(whom, _)| *whom != peer);
                if asked.is_empty() {
                    self.asked.remove(at);
                }
            }
        }
    }

    /// Are all places taken, while somebody who may be of use waits for one?
    pub fn is_crowded(&self, now: Instant) -> bool {
        self.sources.is_crowded(now, |at| needs(&self.contents, at))
    }

    /// Is a content of use that this source may have?
    pub fn is_of_use(&self, peer: PeerId) -> bool {
        let mut needed = self.contents.needed();
        needed.any(|at| self.sources.may_have(peer, self.contents.original(at)))
    }

    /// Sets aside what those who had it do not serve, and everything if nothing useful came for `patience`. To be called now
    /// and then.
    pub fn give_up(&mut self, now: Instant, patience: Option<Duration>) {
        let needed: BTreeSet<Position> = self
            .contents
            .needed()
            .map(|at| self.contents.original(at))
            .collect();
        self.forlorn.retain(|at, _| needed.contains(at));
        let is_late = patience
            .is_some_and(|patience| now.saturating_duration_since(self.last_use) >= patience);
        let asked_again = self.sources.asked_again();
        for at in needed {
            if is_late {
                let why = self.sources.why_not(at);
                self.set_aside(at, why.map_or(Aside::Unreachable, Aside::from));
                continue;
            }
            let is_hoped_for = asked_again.contains(&at) || self.sources.is_hoped_for(at);
            let why = if is_hoped_for {
                None
            } else {
                self.sources.why_not(at)
            };
            let Some(why) = why else {
                self.forlorn.remove(&at);
                continue;
            };
            let since = *self.forlorn.entry(at).or_insert(now);
            if now.saturating_duration_since(since) >= GRACE {
                self.set_aside(at, why.into());
            }
        }
    }

    /// Sets a content aside; nobody fetches its pieces any more.
    pub fn set_aside(&mut self, at: Position, why: Aside) {
        if why.is_of_this_disk()
            && let Some(open) = self.contents.opened(at)
        {
            open.numbers()
                .for_each(|piece| self.picker.mark_done(piece));
        }
        self.contents.set_aside(at, why);
        self.forlorn.remove(&at);
    }

    /// Is somebody at work who has something that is missing?
    pub fn is_anybody_of_use(&self) -> bool {
        self.sources
            .is_anybody_of_use(|at| needs(&self.contents, at))
    }
}

/// Is the content at this position, or a copy of it, of use?
fn needs<H>(contents: &Contents<H>, of: Position) -> bool {
    contents.needs(of) || contents.is_wanted_again(of)
}

impl From<Refusal> for Aside {
    fn from(why: Refusal) -> Self {
        match why {
            Refusal::Gone => Self::Gone,
            Refusal::Changed => Self::Changed,
            Refusal::Unreadable => Self::Unreadable,
            Refusal::Wrong => Self::Bad,
        }
    }
}
