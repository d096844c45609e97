//! A set of piece numbers that finds its next member, and the next member of two sets, without walking over the gaps.
//!
//! Level 0 holds one bit per piece; a bit of every level above says whether the word of 64 bits below it has any bit
//! set. Invariant: a summary bit is set if and only if its word is not zero. A look-up costs one word per level (four for
//! 16 million pieces).

use crate::have::HaveMap;

/// Members of a fixed space 0..n.
#[derive(Clone, Debug)]
pub(super) struct PieceSet {
    levels: Vec<Vec<u64>>,
    n_members: u32,
}

const WORD: usize = u64::BITS as usize;

impl PieceSet {
    /// No member of 0..n. Memory is touched only where members are.
    pub(super) fn empty(n: u32) -> Self {
        let mut width = n as usize;
        let mut levels = Vec::new();
        loop {
            width = width.div_ceil(WORD).max(1);
            levels.push(vec![0; width]);
            if width == 1 {
                return Self {
                    levels,
                    n_members: 0,
                };
            }
        }
    }

    /// Makes the space larger: 0..n. Members stay.
    pub(super) fn grow(&mut self, n: u32) {
        let mut larger = Self::empty(n);
        for (level, words) in larger.levels.iter_mut().zip(&self.levels) {
            level[..words.len()].copy_from_slice(words);
        }
        // Levels that the smaller space did not need.
        for height in self.levels.len().max(1)..larger.levels.len() {
            let (below, above) = larger.levels.split_at_mut(height);
            for (at, _) in below[height - 1]
                .iter()
                .enumerate()
                .filter(|(_, word)| **word != 0)
            {
                above[0][at / WORD] |= 1 << (at % WORD);
            }
        }
        larger.n_members = self.n_members;
        *self = larger;
    }

    /// All of 0..n.
    pub(super) fn full(n: u32) -> Self {
        let mut set = Self::empty(n);
        for piece in 0..n {
            set.insert(piece);
        }
        set
    }

    /// The pieces of a map that lie below `n`.
    pub(super) fn of(map: &HaveMap, n: u32) -> Self {
        let mut set = Self::empty(n);
        for piece in map.iter().take_while(|piece| *piece < n) {
            set.insert(piece);
        }
        set
    }

    /// How many members there are.
    pub(super) fn len(&self) -> u32 {
        self.n_members
    }

    /// True without members.
    pub(super) fn is_empty(&self) -> bool {
        self.n_members == 0
    }

    /// Numbers outside the space are no members.
    pub(super) fn contains(&self, piece: u32) -> bool {
        let at = piece as usize;
        self.levels[0]
            .get(at / WORD)
            .is_some_and(|word| word >> (at % WORD) & 1 == 1)
    }

    /// Adds a piece of the space; false if it was a member.
    pub(super) fn insert(&mut self, piece: u32) -> bool {
        if self.contains(piece) {
            return false;
        }
        let mut at = piece as usize;
        for level in &mut self.levels {
            let word = &mut level[at / WORD];
            let had_members = *word != 0;
            *word |= 1 << (at % WORD);
            if had_members {
                break;
            }
            at /= WORD;
        }
        self.n_members += 1;
        true
    }

    /// Takes a piece out; false if it was no member.
    pub(super) fn remove(&mut self, piece: u32) -> bool {
        if !self.contains(piece) {
            return false;
        }
        let mut at = piece as usize;
        for level in &mut self.levels {
            let word = &mut level[at / WORD];
            *word &= !(1 << (at % WORD));
            if *word != 0 {
                break;
            }
            at /= WORD;
        }
        self.n_members -= 1;
        true
    }

    /// The first member at or after `from`.
    pub(super) fn next(&self, from: u32) -> Option<u32> {
        let mut at = from as usize;
        for (height, level) in self.levels.iter().enumerate() {
            step();
            let rest = level.get(at / WORD)? & (u64::MAX << (at % WORD));
            if rest != 0 {
                let top = at / WORD * WORD + rest.trailing_zeros() as usize;
                let below = self.levels[..height].iter().rev();
                let found = below.fold(top, |at, level| {
                    step();
                    at * WORD + level[at].trailing_zeros() as usize
                });
                return u32::try_from(found).ok();
            }
            at = at / WORD + 1;
        }
        None
    }

    /// The first member of both sets at or after `from`. Both leap over the gaps of the other; at worst, when the sets
    /// alternate within every word, this reads each word once.
    pub(super) fn next_common(&self, other: &Self, from: u32) -> Option<u32> {
        let mut from = from;
        loop {
            let piece = other.next(self.next(from)?)?;
            let word = piece / u64::BITS;
            let members = |set: &Self| set.levels[0].get(word as usize).copied().unwrap_or(0);
            let both = members(self) & members(other) & (u64::MAX << (piece % u64::BITS));
            if both != 0 {
                return Some(word * u64::BITS + both.trailing_zeros());
            }
            from = (word + 1).checked_mul(u64::BITS)?;
        }
    }

    /// All members in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.next(0), |piece| self.next(piece + 1))
    }
}

#[cfg(not(test))]
fn step() {}

#[cfg(test)]
fn step() {
    tests::STEPS.with(|steps| steps.set(steps.get() + 1));
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;
    use std::collections::BTreeSet;

    thread_local! {
        /// Words that searches on this thread have read: the cost that tests bound.
        pub(in crate::peer) static STEPS: Cell<u64> = const { Cell::new(0) };
    }

    /// Empty, single words, both sides of the borders between one, two and three levels.
    const SPACES: [u32; 10] = [0, 1, 63, 64, 65, 4095, 4096, 4097, 262_144, 262_145];

    fn set_of(n: u32, members: &BTreeSet<u32>) -> PieceSet {
        let mut set = PieceSet::empty(n);
        for &piece in members {
            assert!(set.insert(piece));
            assert!(!set.insert(piece));
        }
        set
    }

    fn some_of() -> impl Strategy<Value = (u32, BTreeSet<u32>, BTreeSet<u32>, u32)> {
        proptest::sample::select(&SPACES[1..]).prop_flat_map(|n| {
            let members = || proptest::collection::btree_set(0..n, 0..200);
            (Just(n), members(), members(), 0..n)
        })
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_set((n, mut one, two, from) in some_of()) {
            let mut a = set_of(n, &one);
            let b = set_of(n, &two);
            prop_assert_eq!(a.next(from), one.range(from..).next().copied());
            prop_assert_eq!(a.next_common(&b, from), one.intersection(&two).find(|p| **p >= from).copied());
            for piece in &two {
                prop_assert_eq!(a.remove(*piece), one.remove(piece));
            }
            prop_assert_eq!(a.len() as usize, one.len());
            prop_assert_eq!(a.next(from), one.range(from..).next().copied());
            prop_assert!(a.iter().eq(one.iter().copied()));
            prop_assert_eq!(a.contains(from), one.contains(&from));
        }
    }

    #[test]
    fn the_borders_of_every_space() {
        for n in SPACES {
            let mut set = PieceSet::empty(n);
            assert_eq!(
                (set.next(0), set.next(u32::MAX), set.is_empty()),
                (None, None, true)
            );
            if let Some(last) = n.checked_sub(1) {
                assert!(set.insert(last) && set.contains(last) && !set.contains(n));
                assert_eq!(
                    (set.next(0), set.next(last), set.next(n)),
                    (Some(last), Some(last), None)
                );
                assert!(set.remove(last) && !set.remove(last) && set.is_empty());
            }
        }
    }
}
