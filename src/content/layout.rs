//! How a file is divided into pieces: a plain function of its size, and all arithmetic on it.
//!
//! A swarm of N loses about the time of N pieces at its start, until each receiver has one to pass on, and again at its end,
//! until the last of the seed's have gone around. So small files have shorter pieces; each costs time, so large ones have
//! not.
//!
//! Invariant: a [`Layout`] has at most [`MAX_PIECES`] pieces, all of them [`Layout::piece_len`] long but the last,
//! which has at least one byte.

use super::VerifyError;

/// The longest file, in bytes, that is one piece and has no piece hashes.
pub const MAX_SINGLE: u32 = 256 << 10;

/// Length in bytes of the shortest pieces but a last one.
pub const MIN_PIECE_LEN: u32 = 64 << 10;

/// Length in bytes of a piece of all but small and very large files.
const COMMON_PIECE_LEN: u32 = 256 << 10;

/// Pieces that a file shall have before they are made longer, up to [`COMMON_PIECE_LEN`].
const ENOUGH_PIECES: u64 = 1024;

/// Length in bytes of a piece of the largest files.
pub const MAX_PIECE_LEN: u32 = 16 << 20;

/// Most pieces a file can have.
pub const MAX_PIECES: u32 = 65_536;

/// Longest file, in bytes (1 TiB): [`MAX_PIECES`] of [`MAX_PIECE_LEN`].
pub const MAX_SIZE: u64 = 1 << 40;

/// Length in bytes of BLAKE3's own chunk, a leaf of the tree.
const BLAKE3_CHUNK_LEN: u32 = 1024;

/// The position of a piece, counted from 0. Only a [`Layout`] makes one.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PieceIndex(u32);

impl PieceIndex {
    /// The position as a number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// How a file of some size is divided into pieces.
///
/// A file of at most [`MAX_SINGLE`] bytes is one piece. Pieces of others are 64 KiB long, or 128 KiB, if there are more than
/// 1,024 of them, or 256 KiB, and doubled from there until there are at most [`MAX_PIECES`]; the last may be shorter. A
/// [`PieceIndex`] that another layout made is harmless: beyond the end of this one, a piece has length 0.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout {
    size: u64,
    piece_len: u32,
}

impl Layout {
    /// The layout of a file of `size` bytes. Fails with [`VerifyError::TooLarge`] beyond [`MAX_SIZE`].
    pub fn new(size: u64) -> Result<Self, VerifyError> {
        if size > MAX_SIZE {
            return Err(VerifyError::TooLarge(size));
        }
        let mut piece_len = if size <= MAX_SINGLE.into() {
            MAX_SINGLE
        } else {
            MIN_PIECE_LEN
        };
        let n_pieces = |len: u32| size.div_ceil(len.into());
        while piece_len < COMMON_PIECE_LEN && n_pieces(piece_len) > ENOUGH_PIECES
            || n_pieces(piece_len) > MAX_PIECES.into()
        {
            piece_len *= 2;
        }
        Ok(Self { size, piece_len })
    }

    /// A layout with the long pieces of a huge file at a size that a test can hash.
    #[cfg(test)]
    pub(super) const fn with_piece_len(size: u64, piece_len: u32) -> Self {
        Self { size, piece_len }
    }

    /// Length of the file in bytes.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Length in bytes of every piece but the last.
    pub const fn piece_len(self) -> u32 {
        self.piece_len
    }

    /// Number of pieces; 0 for a file of zero bytes.
    pub fn n_pieces(self) -> u32 {
        u32::try_from(self.size.div_ceil(self.piece_len.into()))
            .expect("a layout has at most MAX_PIECES")
    }

    /// The piece at position `i`, if there is one.
    pub fn piece(self, i: u32) -> Option<PieceIndex> {
        (i < self.n_pieces()).then_some(PieceIndex(i))
    }

    /// All pieces, in order.
    pub fn pieces(self) -> impl DoubleEndedIterator<Item = PieceIndex> + ExactSizeIterator {
        (0..self.n_pieces()).map(PieceIndex)
    }

    /// Where the piece begins in the file, in bytes.
    pub fn offset(self, piece: PieceIndex) -> u64 {
        u64::from(piece.0) * u64::from(self.piece_len)
    }

    /// Length of the piece in bytes.
    pub fn len_of(self, piece: PieceIndex) -> u32 {
        let rest = self.size.saturating_sub(self.offset(piece));
        u32::try_from(rest).map_or(self.piece_len, |rest| rest.min(self.piece_len))
    }

    /// Whether there are no piece hashes: at most one piece, which is hashed whole.
    pub fn is_single(self) -> bool {
        self.n_pieces() <= 1
    }

    /// Whether the piece is where the file ends.
    pub(super) fn is_last(self, piece: PieceIndex) -> bool {
        piece.0 + 1 == self.n_pieces()
    }

    /// Whether `bytes` can be this piece; if not, hazmat must not see them: it panics on empty or overlong input.
    pub(super) fn fits(self, piece: PieceIndex, bytes: &[u8]) -> bool {
        !bytes.is_empty() && bytes.len() == self.len_of(piece) as usize
    }

    /// The right edge's shape: how many bytes of the last piece lie before its last BLAKE3 chunk, and that chunk's
    /// length. Only for a file that is not empty.
    pub(super) fn right_edge(self) -> (u32, u32) {
        let last_piece = self.len_of(PieceIndex(self.n_pieces() - 1));
        let left = (last_piece - 1) / BLAKE3_CHUNK_LEN * BLAKE3_CHUNK_LEN;
        (left, last_piece - left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(size: u64) -> (u32, u32) {
        let layout = Layout::new(size).unwrap();
        (layout.piece_len(), layout.n_pieces())
    }

    #[test]
    fn a_layout_follows_from_the_size() {
        let (kib, single) = (1 << 10, u64::from(MAX_SINGLE));
        assert_eq!((shape(1), shape(single)), ((256 << 10, 1), (256 << 10, 1)));
        assert_eq!(
            (shape(single + 1), shape(64 << 20)),
            ((64 << 10, 5), (64 << 10, 1024))
        );
        assert_eq!(
            (shape((64 << 20) + 1), shape(128 << 20)),
            ((128 << 10, 513), (128 << 10, 1024))
        );
        assert_eq!(
            (shape((128 << 20) + 1), shape(4 << 30)),
            ((256 * kib, 513), (256 * kib, 16_384))
        );
        let longest_with =
            |doubling| (u64::from(COMMON_PIECE_LEN) << doubling) * u64::from(MAX_PIECES);
        for doubling in 0..=6 {
            let full = Layout::new(longest_with(doubling)).unwrap();
            assert_eq!(
                (full.piece_len(), full.n_pieces()),
                (COMMON_PIECE_LEN << doubling, MAX_PIECES)
            );
            let last = full.piece(MAX_PIECES - 1).unwrap();
            assert_eq!(
                full.offset(last) + u64::from(full.len_of(last)),
                full.size()
            );
            if doubling < 6 {
                let next = Layout::new(longest_with(doubling) + 1).unwrap();
                assert_eq!(
                    (next.piece_len(), next.n_pieces()),
                    (COMMON_PIECE_LEN << (doubling + 1), MAX_PIECES / 2 + 1)
                );
                assert_eq!(next.len_of(next.piece(MAX_PIECES / 2).unwrap()), 1);
            }
        }
        assert_eq!(longest_with(6), MAX_SIZE);
        assert_eq!(
            Layout::new(MAX_SIZE + 1),
            Err(VerifyError::TooLarge(MAX_SIZE + 1))
        );
        let empty = Layout::new(0).unwrap();
        assert_eq!(
            (empty.n_pieces(), empty.piece(0), empty.pieces().len()),
            (0, None, 0)
        );
    }
}
