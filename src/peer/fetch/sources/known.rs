//! One source, as it is known: where it is, what it holds, how it stands.
//!
//! Invariant: what it was wrong about, and what it does not serve, it is not taken to have, whatever it says it holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use crate::{
    backoff::Backoff,
    have::HaveMap,
    peer::fetch::{contents::Position, picker::SourceKey, source_stats::SourceStats},
};

/// What a source holds of a content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holding {
    /// Nothing is known, or nothing is there.
    Nothing,
    /// It fetches the content itself; which pieces it has is not known.
    Unknown,
    /// These pieces.
    Pieces(HaveMap),
    /// All of it.
    Whole,
}

/// Why a source did not serve something it was said to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// The file changed there.
    Changed,
    /// It has it not, or no longer.
    Gone,
    /// It cannot read it.
    Unreadable,
    /// It sent something wrong.
    Wrong,
}

/// What it stands for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Candidate,
    Connecting(Instant),
    Active,
    Resting(Instant),
    Banned(Instant),
    /// Asked no more.
    Gone,
}

/// What was refused, until it is asked for again.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// Pieces; `None`: the whole content.
    pub(super) pieces: Vec<(Position, Option<u32>)>,
    pub(super) until: Option<Instant>,
    /// How often it was asked again, and the bytes that had come from it by then.
    pub(super) n: u32,
    pub(super) bytes: u64,
}

#[derive(Debug)]
pub(super) struct KnownSource {
    pub(super) key: SourceKey,
    pub(super) state: State,
    /// "HOST:PORT", best first.
    pub(super) addresses: Vec<String>,
    /// Contents that it has whole.
    pub(super) whole: BTreeSet<Position>,
    /// Contents that it has or may have in part.
    pub(super) part: BTreeMap<Position, Option<HaveMap>>,
    /// What it does not serve although it was said to, and why.
    pub(super) refusals: BTreeMap<Position, Refusal>,
    pub(super) refused: Refused,
    /// Contents that it said had changed, since it last said that it has them.
    pub(super) changed: BTreeSet<Position>,
    /// Contents of which it sent something wrong.
    pub(super) wrong: BTreeSet<Position>,
    pub(super) backoff: Backoff,
    /// When it last was here.
    pub(super) last_here: Option<Instant>,
    /// How many it told of.
    pub(super) n_hints: usize,
    /// Only other sources told of it.
    pub(super) is_hint: bool,
    /// Its first news has come, or it tells none.
    pub(super) has_told: bool,
    pub(super) stats: SourceStats,
}

impl KnownSource {
    pub(super) fn holding(&self, at: Position) -> Holding {
        if self.wrong.contains(&at) || self.refusals.contains_key(&at) {
            return Holding::Nothing;
        }
        match (self.whole.contains(&at), self.part.get(&at)) {
            (true, _) => Holding::Whole,
            (_, Some(Some(map))) => Holding::Pieces(map.clone()),
            (_, Some(None)) => Holding::Unknown,
            _ => Holding::Nothing,
        }
    }

    pub(super) fn may_have(&self, at: Position) -> bool {
        (self.whole.contains(&at) || self.part.contains_key(&at))
            && !self.wrong.contains(&at)
            && !self.refusals.contains_key(&at)
    }

    pub(super) fn is_of_use(&self, needs: impl Fn(Position) -> bool) -> bool {
        let may = |at: &&Position| self.may_have(**at) && needs(**at);
        self.whole.iter().find(may).is_some() || self.part.keys().find(may).is_some()
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        match self.state {
            State::Candidate => true,
            State::Resting(until) | State::Banned(until) => until <= now,
            _ => false,
        }
    }

    pub(super) const fn is_live(&self) -> bool {
        matches!(self.state, State::Active | State::Connecting(_))
    }
}
