//! What is wanted, and how far each content of it is: from a listed name to a file that has its name.
//!
//! Pure: no I/O, no clock. One owner: whatever changes how far a content is, changes it here, in one step.
//!
//! - A content goes `Wanted → Known → Opening → Open → Finishing → Named`; a copy of the same bytes under another name waits
//!   until the first one has its name. Each step may be tried twice; the second time does nothing.
//! - Whether something is complete, or all is over, is computed from these states and told by nobody.
//! - A content that cannot be had is set aside with the reason. It stays where it was, so that a source that comes back
//!   takes it up again.
//!
//! Invariant: a content is in exactly one of the sets that are looked at (`wanted`, `known`, `open`, `complete`), or in none
//! while somebody works on it and when it is over; `n_pieces` numbers belong to the contents of `numbers`, in order.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
};

use crate::content::{ContentId, Layout, MAX_SINGLE, Manifest, PieceIndex};

/// Position of a content among all that are wanted.
pub type Position = usize;

/// Why a content is set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aside {
    /// No source came back in time.
    Unreachable,
    /// Those who had it have it no longer.
    Gone,
    /// It changed at its source.
    Changed,
    /// Its source cannot read it.
    Unreadable,
    /// Every source sent wrong bytes.
    Bad,
    /// This disk does not take it: full, or failing.
    Disk,
    /// Something else lies at its target.
    Exists,
    /// It cannot have this name here.
    Name,
    /// There is no right to write it here.
    Denied,
}

impl Aside {
    /// Is it nothing that a source could mend?
    pub const fn is_of_this_disk(self) -> bool {
        matches!(self, Self::Disk | Self::Exists | Self::Name | Self::Denied)
    }
}

/// How far a content is.
#[derive(Debug)]
enum State<H> {
    /// The same content is fetched under another name first.
    Copy,
    /// Its manifest is not known.
    Wanted,
    /// It may be opened.
    Known(Manifest),
    /// Its file is being opened.
    Opening(Manifest),
    /// Its pieces are fetched.
    Open(OpenContent<H>),
    /// Whole; being made durable and named.
    Finishing(OpenContent<H>),
    /// Its file has its name.
    Named,
}

/// A content whose pieces are fetched.
#[derive(Debug)]
pub struct OpenContent<H> {
    /// What its owner needs to write it.
    pub handle: H,
    /// Size and pieces.
    pub layout: Layout,
    /// Number of its first piece.
    pub first: u32,
    /// Pieces that are missing.
    pub left: u32,
    /// Syncs that failed.
    n_lost: u32,
    /// Its size is proved, and not only listed.
    is_proven: bool,
    /// A source says that the size is another.
    is_disputed: bool,
}

impl<H> OpenContent<H> {
    /// Numbers of its pieces.
    pub fn numbers(&self) -> Range<u32> {
        self.first..self.first + self.layout.n_pieces()
    }
}

#[derive(Debug)]
struct Content<H> {
    id: ContentId,
    /// As listed, or proved.
    size: u64,
    state: State<H>,
    aside: Option<Aside>,
    /// The listed size is not to be believed.
    is_in_doubt: bool,
    /// Where the same content is wanted first.
    original: Option<Position>,
    /// Where it is wanted again.
    copies: Vec<Position>,
}

/// What came of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learnt {
    /// It was known.
    Nothing,
    /// The content may be opened; its size differs from the listed one by so much (new, old).
    Known(u64, u64),
    /// The size in dispute is the listed one.
    Confirmed,
}

/// Everything that is wanted. `H` is what the owner keeps of an open content.
#[derive(Debug)]
pub struct Contents<H> {
    all: Vec<Content<H>>,
    positions: HashMap<ContentId, Position>,
    wanted: BTreeSet<Position>,
    known: BTreeSet<Position>,
    open: BTreeSet<Position>,
    complete: BTreeSet<Position>,
    /// Contents that are not over: neither named nor set aside.
    pending: BTreeSet<Position>,
    /// Those of them that are not whole.
    needed: BTreeSet<Position>,
    /// Contents that have or will soon have an open file.
    in_hand: BTreeSet<Position>,
    /// Open contents of several pieces that are wanted here first and not whole.
    long: BTreeSet<Position>,
    /// Those that are in hand and set aside.
    idle: BTreeSet<Position>,
    aside: BTreeSet<Position>,
    /// First numbers with their contents, ascending. Contents of no pieces have none.
    numbers: Vec<(u32, Position)>,
    n_pieces: u32,
    /// Bytes of the pieces that have numbers.
    bytes: u64,
}

impl<H> Contents<H> {
    /// All of these, by their listed sizes; a small content needs no manifest, for its id proves its bytes.
    pub fn new(wants: impl IntoIterator<Item = (ContentId, u64)>) -> Self {
        let mut this = Self {
            all: vec![],
            positions: HashMap::new(),
            wanted: BTreeSet::new(),
            known: BTreeSet::new(),
            open: BTreeSet::new(),
            complete: BTreeSet::new(),
            pending: BTreeSet::new(),
            needed: BTreeSet::new(),
            in_hand: BTreeSet::new(),
            long: BTreeSet::new(),
            idle: BTreeSet::new(),
            aside: BTreeSet::new(),
            numbers: vec![],
            n_pieces: 0,
            bytes: 0,
        };
        for (id, size) in wants {
            let at = this.all.len();
            let original = this.positions.get(&id).copied();
            this.all.push(Content {
                id,
                size,
                state: State::Copy,
                aside: None,
                is_in_doubt: false,
                original,
                copies: vec![],
            });
            match original {
                Some(original) => this.all[original].copies.push(at),
                None => {
                    this.positions.insert(id, at);
                    this.all[at].state = this.all[at].begin();
                }
            }
            this.place(at);
        }
        this
    }

    /// Where this content is wanted first.
    pub fn position(&self, id: &ContentId) -> Option<Position> {
        self.positions.get(id).copied()
    }

    /// What it is.
    pub fn id(&self, at: Position) -> ContentId {
        self.all[at].id
    }

    /// Bytes, as far as is known.
    pub fn size(&self, at: Position) -> u64 {
        self.all[at].size
    }

    /// Where sources are known for this content: where it is wanted first.
    pub fn original(&self, at: Position) -> Position {
        self.all[at].original.unwrap_or(at)
    }

    /// Where this content is wanted: first, and again.
    pub fn same(&self, of: Position) -> impl Iterator<Item = Position> + '_ {
        std::iter::once(of).chain(self.all[of].copies.iter().copied())
    }

    /// Contents whose manifest is asked for.
    pub fn wanted(&self) -> impl Iterator<Item = Position> + '_ {
        self.wanted.iter().copied()
    }

    /// Whether the manifest of this one is asked for.
    pub fn is_wanted(&self, at: Position) -> bool {
        self.wanted.contains(&at)
    }

    /// Contents that may be opened, with their manifests.
    pub fn known(&self) -> impl Iterator<Item = (Position, &Manifest)> + '_ {
        self.known
            .iter()
            .filter_map(|at| match &self.all[*at].state {
                State::Known(manifest) => Some((*at, manifest)),
                _ => None,
            })
    }

    /// Contents whose pieces are missing, with what is known of them.
    pub fn open(&self) -> impl Iterator<Item = (Position, &OpenContent<H>)> + '_ {
        self.open
            .iter()
            .filter_map(|at| Some((*at, self.opened(*at)?)))
    }

    /// Open contents of several pieces that are not whole; of one that is wanted under several names the first.
    pub fn long(&self) -> impl Iterator<Item = Position> + '_ {
        self.long.iter().copied()
    }

    /// How many those are.
    pub fn n_long(&self) -> usize {
        self.long.len()
    }

    /// Contents that have or will soon have an open file.
    pub fn n_in_hand(&self) -> usize {
        self.in_hand.len()
    }

    /// How many of them are worked on, and not set aside.
    pub fn n_busy(&self) -> usize {
        self.in_hand.len() - self.idle.len()
    }

    /// Those that are set aside, with the reasons.
    pub fn aside(&self) -> impl Iterator<Item = (Position, Aside)> + '_ {
        self.aside
            .iter()
            .filter_map(|at| Some((*at, self.all[*at].aside?)))
    }

    /// Those that do not have their names, with the reasons.
    pub fn unnamed(&self) -> impl Iterator<Item = (Position, Aside)> + '_ {
        let unnamed = |(at, content): (Position, &Content<H>)| {
            let is_named = matches!(content.state, State::Named);
            (!is_named).then_some((at, content.aside.unwrap_or(Aside::Unreachable)))
        };
        self.all.iter().enumerate().filter_map(unnamed)
    }

    /// Is nothing to be done any more?
    pub fn are_over(&self) -> bool {
        self.pending.is_empty()
    }

    /// Those that a source could bring something of, now or when their files are open.
    pub fn needed(&self) -> impl Iterator<Item = Position> + '_ {
        self.needed.iter().copied()
    }

    /// Could a source that has this content bring something?
    pub fn needs(&self, at: Position) -> bool {
        self.needed.contains(&at)
    }

    /// Is one of the copies of this content needed?
    pub fn is_wanted_again(&self, of: Position) -> bool {
        self.all[of].copies.iter().any(|at| self.needs(*at))
    }

    /// Could no source bring anything any more?
    pub fn need_nobody(&self) -> bool {
        self.needed.is_empty()
    }

    /// Pieces are numbered 0 to this.
    pub fn n_pieces(&self) -> u32 {
        self.n_pieces
    }

    /// Mean length of the pieces that have numbers, bytes; at least 1.
    pub fn mean_piece_len(&self) -> u32 {
        let mean = self.bytes / u64::from(self.n_pieces).max(1);
        u32::try_from(mean).unwrap_or(u32::MAX).max(1)
    }

    /// An open content; none before and after.
    pub fn opened(&self, at: Position) -> Option<&OpenContent<H>> {
        match &self.all[at].state {
            State::Open(open) | State::Finishing(open) => Some(open),
            _ => None,
        }
    }

    fn opened_mut(&mut self, at: Position) -> Option<&mut OpenContent<H>> {
        match &mut self.all[at].state {
            State::Open(open) => Some(open),
            _ => None,
        }
    }

    /// The number of a piece of an open content.
    pub fn number(&self, at: Position, piece: PieceIndex) -> Option<u32> {
        let open = self.opened(at)?;
        (piece.get() < open.layout.n_pieces()).then(|| open.first + piece.get())
    }

    /// The content and the piece of a number; none if that content is not open any more.
    pub fn locate(&self, number: u32) -> Option<(Position, PieceIndex)> {
        let next = self.numbers.partition_point(|(first, _)| *first <= number);
        let (first, at) = *self.numbers.get(next.checked_sub(1)?)?;
        let open = self.opened(at).filter(|open| open.first == first)?;
        Some((at, open.layout.piece(number - first)?))
    }

    /// A source proved a manifest of this content.
    pub fn learn(&mut self, at: Position, manifest: Manifest) -> Learnt {
        let content = &mut self.all[at];
        let (size, before) = (manifest.layout().size(), content.size);
        match &mut content.state {
            State::Wanted => {}
            State::Open(open) if open.is_disputed && open.layout == manifest.layout() => {
                (open.is_proven, open.is_disputed) = (true, false);
                self.place(at);
                return Learnt::Confirmed;
            }
            // Its pieces were those of another size: nothing that fits them was or will be found.
            State::Open(open) if open.is_disputed => {}
            _ => return Learnt::Nothing,
        }
        (content.size, content.is_in_doubt) = (size, false);
        content.state = State::Known(manifest);
        self.place(at);
        Learnt::Known(size, before)
    }

    /// A source knows this content by another size. Only a listed size can be in doubt. True if it is now.
    pub fn dispute(&mut self, at: Position) -> bool {
        let Some(open) = self
            .opened_mut(at)
            .filter(|open| !open.is_proven && open.left > 0)
        else {
            return false;
        };
        open.is_disputed = true;
        self.all[at].is_in_doubt = true;
        self.place(at);
        true
    }

    /// Somebody opens its file now.
    pub fn begin_opening(&mut self, at: Position) -> Option<Manifest> {
        let State::Known(manifest) = &self.all[at].state else {
            return None;
        };
        let manifest = manifest.clone();
        self.all[at].state = State::Opening(manifest.clone());
        self.place(at);
        Some(manifest)
    }

    /// Its file is open, and `n_missing` of its pieces are not there. Gives the numbers of its pieces.
    pub fn open_up(&mut self, at: Position, handle: H, n_missing: u32) -> Option<Range<u32>> {
        let State::Opening(manifest) = &self.all[at].state else {
            return None;
        };
        let layout = manifest.layout();
        let is_proven = !layout.is_single() || manifest.id() == ContentId::EMPTY;
        let first = self.n_pieces;
        if layout.n_pieces() > 0 {
            self.numbers.push((first, at));
        }
        self.n_pieces += layout.n_pieces();
        self.bytes += layout.size();
        self.all[at].state = State::Open(OpenContent {
            handle,
            layout,
            first,
            left: n_missing,
            n_lost: 0,
            is_proven,
            is_disputed: false,
        });
        self.place(at);
        Some(first..self.n_pieces)
    }

    /// A piece is written that was missing.
    pub fn piece_came(&mut self, at: Position) {
        if let Some(open) = self.opened_mut(at) {
            open.left = open.left.saturating_sub(1);
            if open.left == 0 {
                (open.is_proven, open.is_disputed) = (true, false);
                self.place(at);
                self.take_up(at);
            }
        }
    }

    /// The disk lost pieces that had come; how often that happened to this content.
    pub fn lose(&mut self, at: Position, n: u32) -> u32 {
        // One that is being named is found out not to be whole.
        let (State::Open(open) | State::Finishing(open)) = &mut self.all[at].state else {
            return 0;
        };
        (open.left, open.n_lost) = (open.left + n, open.n_lost + u32::from(n > 0));
        let n_lost = open.n_lost;
        self.place(at);
        n_lost
    }

    /// Its file could not be opened now, or what was whole is not: it goes on from before that.
    pub fn step_back(&mut self, at: Position) {
        let content = &mut self.all[at];
        content.state = match std::mem::replace(&mut content.state, State::Named) {
            State::Opening(manifest) => State::Known(manifest),
            State::Finishing(open) => State::Open(open),
            other => other,
        };
        self.place(at);
    }

    /// Up to `most` whole contents, which the caller makes durable and names now.
    pub fn take_complete(&mut self, most: usize) -> Vec<Position> {
        let taken: Vec<Position> = self.complete.iter().take(most).copied().collect();
        for at in &taken {
            let content = &mut self.all[*at];
            content.state = match std::mem::replace(&mut content.state, State::Named) {
                State::Open(open) => State::Finishing(open),
                other => other,
            };
            self.place(*at);
        }
        taken
    }

    /// It has its name, or had it before. Copies of it may begin; gives those.
    pub fn named(&mut self, at: Position) -> Vec<Position> {
        self.all[at].state = State::Named;
        self.all[at].aside = None;
        self.place(at);
        self.release_copies(at)
    }

    fn release_copies(&mut self, at: Position) -> Vec<Position> {
        let copies = self.all[at].copies.clone();
        for copy in &copies {
            if matches!(self.all[*copy].state, State::Copy) {
                let is_ours = self.all[*copy].aside.is_some_and(Aside::is_of_this_disk);
                self.all[*copy].aside = self.all[*copy].aside.filter(|_| is_ours);
                self.all[*copy].size = self.all[at].size;
                self.all[*copy].state = self.all[*copy].begin();
                self.place(*copy);
            }
        }
        copies
    }

    /// Sets a content aside. For what is wrong on this disk that concerns this name alone, and what was open of it is let go;
    /// other names of the same bytes begin without it. For want of a source it concerns all names that need one, and each
    /// stays where it was; what is whole needs none.
    pub fn set_aside(&mut self, at: Position, why: Aside) {
        if why.is_of_this_disk() {
            if self.pending.contains(&at) {
                self.all[at].aside = Some(why);
                self.all[at].state = self.all[at].begin();
                self.place(at);
                self.release_copies(at);
            }
            return;
        }
        for same in self.same(at).collect::<Vec<_>>() {
            // One that waits for the first name shares its fate.
            let waits = matches!(self.all[same].state, State::Copy) && self.all[at].aside.is_none();
            if self.needs(same) && !waits {
                self.all[same].aside = Some(why);
                self.place(same);
            }
        }
    }

    /// A source has this content again: it goes on where it was, under each name. True if it was set aside for want of a
    /// source.
    pub fn take_up(&mut self, at: Position) -> bool {
        let mut is_taken_up = false;
        for same in self.same(at).collect::<Vec<_>>() {
            if self.all[same]
                .aside
                .is_some_and(|why| !why.is_of_this_disk())
            {
                self.all[same].aside = None;
                self.place(same);
                is_taken_up = true;
            }
        }
        is_taken_up
    }

    /// Numbers pieces from 0 again. Only while nothing is open.
    pub fn renumber(&mut self) {
        debug_assert!(self.open.is_empty() && self.complete.is_empty());
        self.numbers.clear();
        (self.n_pieces, self.bytes) = (0, 0);
    }

    /// Puts a content into the sets where it is looked for.
    fn place(&mut self, at: Position) {
        let content = &self.all[at];
        let is_aside = content.aside.is_some();
        let is_over = is_aside || matches!(content.state, State::Named);
        let is_finishing = matches!(content.state, State::Finishing(_));
        let (is_complete, is_disputed, is_long) = match &content.state {
            State::Open(open) => (open.left == 0, open.is_disputed, !open.layout.is_single()),
            _ => (false, false, false),
        };
        let is_original = content.original.is_none();
        let is_held = is_finishing || matches!(content.state, State::Open(_) | State::Opening(_));
        let states = [
            (
                &mut self.wanted,
                !is_aside && (matches!(content.state, State::Wanted) || is_disputed),
            ),
            (
                &mut self.known,
                !is_aside && matches!(content.state, State::Known(_)),
            ),
            (
                &mut self.open,
                matches!(content.state, State::Open(_)) && !is_complete,
            ),
            (&mut self.complete, is_complete),
            (&mut self.pending, !is_over),
            (&mut self.needed, !is_over && !is_complete && !is_finishing),
            (
                &mut self.in_hand,
                is_finishing || matches!(content.state, State::Open(_) | State::Opening(_)),
            ),
            (
                &mut self.long,
                is_long && is_original && !is_complete && !is_aside,
            ),
            (&mut self.idle, is_aside && is_held),
            (&mut self.aside, is_aside),
        ];
        for (set, is_in) in states {
            if is_in {
                set.insert(at);
            } else {
                set.remove(&at);
            }
        }
    }
}

impl<H> Content<H> {
    /// The first state of a content: a small one needs no manifest.
    fn begin(&self) -> State<H> {
        let single = match self.id == ContentId::EMPTY {
            true => Manifest::single(self.id, 0).ok(),
            false if self.is_in_doubt || self.size > MAX_SINGLE.into() => None,
            false => Manifest::single(self.id, self.size).ok(),
        };
        single.map_or(State::Wanted, State::Known)
    }
}
