//! Which pieces of a content somebody holds.
//!
//! Invariant: a map has one bit for each piece of its content and the spare bits of its last byte are zero, so that
//! equal sets are equal bytes. Positions beyond the content are never held; asking about or adding one does nothing.

use std::fmt;

/// A set of pieces of one content. On the wire bit `i` of byte `i / 8`, least significant first, is piece `i`.
#[derive(Clone, Eq, PartialEq)]
pub struct HaveMap {
    n_pieces: u32,
    bits: Vec<u8>,
}

/// The bytes are not a map of a content with that many pieces.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a have map of {n_pieces} pieces is one bit a piece, spare bits zero")]
pub struct InvalidHaveMap {
    n_pieces: u32,
}

impl HaveMap {
    /// No piece of a content that has `n_pieces`.
    pub fn empty(n_pieces: u32) -> Self {
        Self {
            n_pieces,
            bits: vec![0; n_pieces.div_ceil(8) as usize],
        }
    }

    /// Every piece of a content that has `n_pieces`.
    pub fn full(n_pieces: u32) -> Self {
        let mut map = Self {
            n_pieces,
            bits: vec![u8::MAX; n_pieces.div_ceil(8) as usize],
        };
        map.clear_spare_bits();
        map
    }

    /// Reads the wire form. Fails unless `bytes` has exactly one bit for each of `n_pieces`, spare bits zero.
    pub fn from_bytes(n_pieces: u32, bytes: &[u8]) -> Result<Self, InvalidHaveMap> {
        let spare = bytes
            .last()
            .map_or(0, |last| last & !last_byte_mask(n_pieces));
        if bytes.len() != n_pieces.div_ceil(8) as usize || spare != 0 {
            return Err(InvalidHaveMap { n_pieces });
        }
        Ok(Self {
            n_pieces,
            bits: bytes.to_vec(),
        })
    }

    /// The wire form.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.bits.clone()
    }

    /// Adds piece `i`; true if it is new.
    pub fn insert(&mut self, i: u32) -> bool {
        let new = i < self.n_pieces && !self.contains(i);
        if new {
            self.bits[i as usize / 8] |= 1 << (i % 8);
        }
        new
    }

    /// Takes piece `i` out; true if it was held.
    pub fn remove(&mut self, i: u32) -> bool {
        let held = self.contains(i);
        if held {
            self.bits[i as usize / 8] &= !(1 << (i % 8));
        }
        held
    }

    /// Adds every piece that `other`, a map of the same content, holds.
    pub fn union_with(&mut self, other: &Self) {
        for (mine, theirs) in self.bits.iter_mut().zip(&other.bits) {
            *mine |= theirs;
        }
        self.clear_spare_bits();
    }

    /// Whether piece `i` is held.
    pub fn contains(&self, i: u32) -> bool {
        self.bits
            .get(i as usize / 8)
            .is_some_and(|byte| byte >> (i % 8) & 1 == 1)
    }

    /// Number of pieces held.
    pub fn count(&self) -> u32 {
        self.bits.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Number of pieces of the content, held or not.
    pub fn len(&self) -> u32 {
        self.n_pieces
    }

    /// Whether no piece is held.
    pub fn is_empty(&self) -> bool {
        self.bits.iter().all(|byte| *byte == 0)
    }

    /// Whether every piece is held; true for a content of zero pieces.
    pub fn is_complete(&self) -> bool {
        self.count() == self.n_pieces
    }

    /// The pieces held, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        (0..self.n_pieces).filter(|i| self.contains(*i))
    }

    /// The pieces not held, ascending.
    pub fn missing(&self) -> impl Iterator<Item = u32> {
        (0..self.n_pieces).filter(|i| !self.contains(*i))
    }

    /// The pieces held that `before`, a map of the same content, did not hold, ascending; none if it held others.
    pub fn added_since(&self, before: &Self) -> Option<Vec<u32>> {
        let pairs = || (0..).zip(self.bits.iter().zip(&before.bits));
        if self.n_pieces != before.n_pieces || pairs().any(|(_, (now, then))| then & !now != 0) {
            return None;
        }
        let added = |(at, (now, then)): (u32, (&u8, &u8))| {
            let new = now & !then;
            (0..8)
                .filter(move |bit| new >> bit & 1 == 1)
                .map(move |bit| 8 * at + bit)
        };
        Some(pairs().flat_map(added).collect())
    }

    fn clear_spare_bits(&mut self) {
        if let Some(last) = self.bits.last_mut() {
            *last &= last_byte_mask(self.n_pieces);
        }
    }
}

impl fmt::Debug for HaveMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HaveMap({}/{})", self.count(), self.n_pieces)
    }
}

/// The bits of the last byte that stand for pieces.
fn last_byte_mask(n_pieces: u32) -> u8 {
    match n_pieces % 8 {
        0 => u8::MAX,
        used => (1 << used) - 1,
    }
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the numbers here are small"
)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn map(n_pieces: u32, held: &BTreeSet<u32>) -> HaveMap {
        let mut map = HaveMap::empty(n_pieces);
        for i in held {
            assert!(map.insert(*i));
        }
        map
    }

    /// A content's number of pieces, around the edges of a byte, and three sets of them.
    fn three_sets() -> impl Strategy<Value = (u32, [BTreeSet<u32>; 3])> {
        (1_u32..70).prop_flat_map(|n| {
            let set = || prop::collection::btree_set(0..n, 0..=n as usize);
            (Just(n), [set(), set(), set()])
        })
    }

    fn union(a: &HaveMap, b: &HaveMap) -> HaveMap {
        let mut sum = a.clone();
        sum.union_with(b);
        sum
    }

    proptest! {
        #[test]
        fn union_is_that_of_sets((n, [x, y, z]) in three_sets()) {
            let (a, b, c) = (map(n, &x), map(n, &y), map(n, &z));
            prop_assert_eq!(union(&a, &b), map(n, &(&x | &y)));
            prop_assert_eq!(union(&a, &b), union(&b, &a));
            prop_assert_eq!(union(&a, &union(&b, &c)), union(&union(&a, &b), &c));
            prop_assert_eq!(union(&a, &a), a.clone());
            prop_assert_eq!(union(&a, &HaveMap::empty(n)), a.clone());
            prop_assert_eq!(union(&a, &HaveMap::full(n)), HaveMap::full(n));
        }

        #[test]
        fn what_was_added_is_the_difference((n, [x, y, _]) in three_sets()) {
            let (a, both) = (map(n, &x), map(n, &(&x | &y)));
            prop_assert_eq!(both.added_since(&a), Some((&y - &x).into_iter().collect()));
            prop_assert_eq!(a.added_since(&both).is_some(), y.is_subset(&x));
            prop_assert_eq!(a.added_since(&HaveMap::full(n + 1)), None);
        }

        #[test]
        fn a_map_is_a_set((n, [x, y, _]) in three_sets()) {
            let mut a = map(n, &x);
            prop_assert_eq!(a.iter().collect::<BTreeSet<_>>(), x.clone());
            prop_assert_eq!(a.count() as usize, x.len());
            prop_assert_eq!(a.is_empty(), x.is_empty());
            prop_assert_eq!(a.is_complete(), x.len() == n as usize);
            prop_assert_eq!(a.len(), n);
            prop_assert!(a.iter().chain(a.missing()).collect::<BTreeSet<_>>().into_iter().eq(0..n));
            prop_assert_eq!(a.missing().count() as u32, n - a.count());
            for i in &y {
                prop_assert_eq!(a.contains(*i), x.contains(i));
                prop_assert_eq!(a.remove(*i), x.contains(i));
                prop_assert!(!a.remove(*i));
            }
            prop_assert_eq!(&a, &map(n, &(&x - &y)));
            for i in &y {
                prop_assert!(a.insert(*i));
                prop_assert!(!a.insert(*i));
            }
            prop_assert_eq!(a, map(n, &(&x | &y)));
        }

        #[test]
        fn the_wire_form_comes_back((n, [x, ..]) in three_sets()) {
            let a = map(n, &x);
            prop_assert_eq!(HaveMap::from_bytes(n, &a.to_bytes()), Ok(a));
        }

        #[test]
        fn what_is_read_is_what_was_sent(n in 0_u32..40, bytes in prop::collection::vec(any::<u8>(), 0..7)) {
            match HaveMap::from_bytes(n, &bytes) {
                Ok(map) => {
                    prop_assert_eq!(map.iter().count() as u32, map.count());
                    prop_assert_eq!(map.to_bytes(), bytes);
                }
                Err(_) => prop_assert!(
                    bytes.len() != n.div_ceil(8) as usize || n % 8 != 0 && bytes[bytes.len() - 1] >> (n % 8) != 0
                ),
            }
        }
    }

    #[test]
    fn bits_are_least_significant_first() {
        assert_eq!(
            map(11, &[0, 3, 9].into()).to_bytes(),
            [0b0000_1001, 0b0000_0010]
        );
        assert_eq!(HaveMap::full(11).to_bytes(), [0xff, 0b0000_0111]);
    }

    #[test]
    fn positions_beyond_the_content_do_nothing() {
        let mut a = HaveMap::empty(3);
        for i in [3, 7, 8, u32::MAX] {
            assert!(!a.insert(i) && !a.contains(i) && !a.remove(i));
        }
        a.union_with(&HaveMap::full(100));
        assert_eq!(a, HaveMap::full(3));
    }

    #[test]
    fn a_content_of_zero_pieces_is_empty_and_complete() {
        let a = HaveMap::from_bytes(0, &[]).unwrap();
        assert!(a.is_empty() && a.is_complete() && a == HaveMap::full(0));
    }
}
