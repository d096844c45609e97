//! What a file is: its id, its division into pieces, and the proof that bytes belong to it.
//!
//! A [`ContentId`] is the BLAKE3 root hash of the file's bytes, which is what `b3sum` prints. A [`Layout`] follows from
//! the size alone. A piece hash is the BLAKE3 chaining value of the subtree over the piece: pieces are aligned powers
//! of two, so each is one subtree of the file's tree, and merging the values pair by pair (an odd one moves up) gives
//! the root. All of it is done with blake3's `hazmat` module; only this file names it.
//!
//! **The right edge.** A list of hashes that folds to the ContentId does not prove the size: the layer of nodes above
//! the pieces, or the one below, folds to the same root as the pieces of a file of another size. So a manifest carries
//! the file's last BLAKE3 chunk (1 to 1,024 bytes; not the `Chunk` of the wire) and the values of the complete subtrees
//! to the left of it inside the last piece. A chunk's value depends on its position and length, and never equals a
//! parent's value: if the chunk, hashed where the claimed size puts it and merged with those subtrees, gives the last
//! piece's value, the size is exact. Let `left` be the number of bytes of the last piece before that chunk. The lengths
//! of those subtrees are the set bits of `left`, the longest leftmost: none if the piece is a single chunk, and at most
//! 14, in a complete piece of 16 MiB.
//!
//! A file of at most one piece has no piece hashes: its bytes are hashed whole and compared with the ContentId.
//!
//! Invariant: a [`Manifest`] of several pieces exists only if this proof holds, and a [`VerifiedPiece`] only if its
//! bytes are those of the content. Nothing here does I/O, reads a clock or panics on what a stranger sent.

use std::{fmt, sync::Arc};

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use bytes::Bytes;

mod id;
mod layout;

pub use id::{ContentId, NotAContentId};

pub use layout::{
    Layout, MAX_PIECE_LEN, MAX_PIECES, MAX_SINGLE, MAX_SIZE, MIN_PIECE_LEN, PieceIndex,
};

/// A BLAKE3 chaining value: the hash of a subtree below the root.
pub type Hash32 = [u8; 32];

/// Why bytes, or a description of them, are not what they claim to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum VerifyError {
    /// The size (in bytes) is beyond [`MAX_SIZE`].
    #[error("a file of {0} bytes is larger than the limit of 1 TiB")]
    TooLarge(u64),
    /// The manifest has not the parts, in number and length, that its size calls for.
    #[error("the manifest is malformed")]
    Malformed,
    /// The right edge does not give the last piece's hash: the size is false, or the proof is.
    #[error("the manifest does not prove its size")]
    SizeNotProven,
    /// The hashes do not fold to the content id.
    #[error("the manifest does not belong to the content id")]
    WrongRoot,
    /// The bytes are not this piece (its index), by their length or by their hash.
    #[error("the bytes are not piece {0} of the content")]
    WrongPiece(u32),
}

/// The proven description of a content: id, exact size, piece hashes and the proof of the size. Cheap to clone.
#[derive(Clone)]
pub struct Manifest(Arc<Parts>);

struct Parts {
    id: ContentId,
    layout: Layout,
    /// These three are empty for a file of at most one piece.
    hashes: Vec<Hash32>,
    last_chunk: Vec<u8>,
    right_edge: Vec<Hash32>,
}

impl fmt::Debug for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manifest")
            .field("id", &self.0.id)
            .field("layout", &self.0.layout)
            .finish_non_exhaustive()
    }
}

impl Manifest {
    /// Takes a manifest from a stranger.
    ///
    /// `last_chunk` and `right_edge` (left to right) are the proof of `size`, see the head of this file; a file of at
    /// most one piece has no `hashes`, and its proof is not kept. Fails if any part has not exactly the length that `size`
    /// calls for, the proof does not hold, or the hashes do not fold to `id`.
    pub fn accept(
        id: ContentId,
        size: u64,
        hashes: Vec<Hash32>,
        last_chunk: &[u8],
        right_edge: &[Hash32],
    ) -> Result<Self, VerifyError> {
        let parts = Parts {
            id,
            layout: Layout::new(size)?,
            hashes,
            last_chunk: last_chunk.to_vec(),
            right_edge: right_edge.to_vec(),
        };
        parts.prove()?;
        if parts.layout.is_single() {
            Self::single(id, size)
        } else {
            Ok(Self(Arc::new(parts)))
        }
    }

    /// The manifest of a file of at most [`MAX_SINGLE`] bytes. Its size is only a claim until they are verified.
    ///
    /// Fails if the file is longer than that, or if just one of "zero bytes" and "the id of zero bytes" is true.
    pub fn single(id: ContentId, size: u64) -> Result<Self, VerifyError> {
        let layout = Layout::new(size)?;
        if !layout.is_single() {
            return Err(VerifyError::Malformed);
        }
        if (size == 0) != (id == ContentId::EMPTY) {
            return Err(VerifyError::WrongRoot);
        }
        Ok(Self(Arc::new(Parts {
            id,
            layout,
            hashes: vec![],
            last_chunk: vec![],
            right_edge: vec![],
        })))
    }

    /// The content described.
    pub fn id(&self) -> ContentId {
        self.0.id
    }

    /// Size and pieces of the content.
    pub fn layout(&self) -> Layout {
        self.0.layout
    }

    /// The piece hashes in order; none for a file of at most one piece.
    pub fn hashes(&self) -> &[Hash32] {
        &self.0.hashes
    }

    /// The file's last BLAKE3 chunk; empty for a file of at most one piece.
    pub fn last_chunk(&self) -> &[u8] {
        &self.0.last_chunk
    }

    /// The complete subtrees before the last BLAKE3 chunk inside the last piece, left to right.
    pub fn right_edge(&self) -> &[Hash32] {
        &self.0.right_edge
    }

    /// Turns bytes that are exactly this piece of the content into a [`VerifiedPiece`]; any others are refused.
    pub fn verify(&self, piece: PieceIndex, bytes: Bytes) -> Result<VerifiedPiece, VerifyError> {
        if !self.check(piece, &bytes) {
            return Err(VerifyError::WrongPiece(piece.get()));
        }
        Ok(VerifiedPiece {
            content: self.id(),
            index: piece,
            offset: self.layout().offset(piece),
            bytes,
        })
    }

    /// Whether bytes (already on this disk) are exactly this piece of the content.
    pub fn check(&self, piece: PieceIndex, bytes: &[u8]) -> bool {
        let layout = self.layout();
        if !layout.fits(piece, bytes) {
            return false;
        }
        if layout.is_single() {
            return blake3::hash(bytes) == self.0.id.0;
        }
        self.hashes().get(piece.get() as usize) == Some(&subtree(layout.offset(piece), bytes))
    }

    /// The storage form: id, size as 8 bytes little-endian, last chunk, right edge, piece hashes. The size tells the
    /// lengths of the rest.
    pub fn to_bytes(&self) -> Vec<u8> {
        let parts = &*self.0;
        let size = parts.layout.size().to_le_bytes();
        let (edge, hashes) = (parts.right_edge.as_flattened(), parts.hashes.as_flattened());
        [&parts.id.0[..], &size, &parts.last_chunk, edge, hashes].concat()
    }

    /// Reads the storage form and proves it again; never panics, whatever the bytes are.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, VerifyError> {
        let (&id, rest) = bytes.split_first_chunk().ok_or(VerifyError::Malformed)?;
        let (&size, rest) = rest.split_first_chunk().ok_or(VerifyError::Malformed)?;
        let (id, layout) = (ContentId(id), Layout::new(u64::from_le_bytes(size))?);
        if layout.is_single() {
            return if rest.is_empty() {
                Self::single(id, layout.size())
            } else {
                Err(VerifyError::Malformed)
            };
        }
        let (left, chunk_len) = layout.right_edge();
        let (last_chunk, rest) = rest
            .split_at_checked(chunk_len as usize)
            .ok_or(VerifyError::Malformed)?;
        let (nodes, []) = rest.as_chunks() else {
            return Err(VerifyError::Malformed);
        };
        let (right_edge, hashes) = nodes
            .split_at_checked(left.count_ones() as usize)
            .ok_or(VerifyError::Malformed)?;
        Self::accept(id, layout.size(), hashes.to_vec(), last_chunk, right_edge)
    }
}

impl Parts {
    /// The proof at the head of this file. Lengths are checked before anything is hashed.
    fn prove(&self) -> Result<(), VerifyError> {
        let layout = self.layout;
        if layout.size() == 0 {
            let bare =
                self.hashes.is_empty() && self.last_chunk.is_empty() && self.right_edge.is_empty();
            return if bare {
                Ok(())
            } else {
                Err(VerifyError::Malformed)
            };
        }
        let (left, chunk_len) = layout.right_edge();
        let n_hashes = if layout.is_single() {
            0
        } else {
            layout.n_pieces()
        };
        let claimed = [n_hashes, chunk_len, left.count_ones()].map(|n| n as usize);
        if [
            self.hashes.len(),
            self.last_chunk.len(),
            self.right_edge.len(),
        ] != claimed
        {
            return Err(VerifyError::Malformed);
        }
        let last_offset = layout.size() - u64::from(chunk_len);
        if layout.is_single() {
            let root = merge_edge_to_root(&self.right_edge, last_offset, &self.last_chunk);
            return if root == self.id {
                Ok(())
            } else {
                Err(VerifyError::SizeNotProven)
            };
        }
        let last_chunk = subtree(last_offset, &self.last_chunk);
        if self.hashes.last() != Some(&merge_edge(&self.right_edge, last_chunk)) {
            return Err(VerifyError::SizeNotProven);
        }
        if fold(&self.hashes) != self.id {
            Err(VerifyError::WrongRoot)
        } else {
            Ok(())
        }
    }
}

/// Bytes that are one piece of a content: the only thing that may be written to a download. Only
/// [`Manifest::verify`] makes one.
#[derive(Debug)]
pub struct VerifiedPiece {
    content: ContentId,
    index: PieceIndex,
    offset: u64,
    bytes: Bytes,
}

impl VerifiedPiece {
    /// The content the piece belongs to.
    pub fn content(&self) -> ContentId {
        self.content
    }

    /// Which piece it is.
    pub fn index(&self) -> PieceIndex {
        self.index
    }

    /// Where it begins in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The whole piece.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

/// The hash of one piece of a local file, made by [`hash_piece`] for [`assemble`].
#[derive(Debug)]
pub struct PieceHash {
    layout: Layout,
    piece: PieceIndex,
    /// The chaining value; of a file's only piece the root.
    value: Hash32,
    /// These two are empty but in the last of several pieces.
    last_chunk: Vec<u8>,
    right_edge: Vec<Hash32>,
}

/// Hashes one piece of a local file; in any order, on any thread. Fails only if `bytes` has not the piece's length.
pub fn hash_piece(
    layout: Layout,
    piece: PieceIndex,
    bytes: &[u8],
) -> Result<PieceHash, VerifyError> {
    if !layout.fits(piece, bytes) {
        return Err(VerifyError::WrongPiece(piece.get()));
    }
    let mut offset = layout.offset(piece);
    let mut hash = PieceHash {
        layout,
        piece,
        value: [0; 32],
        last_chunk: vec![],
        right_edge: vec![],
    };
    if layout.is_single() {
        hash.value = *blake3::hash(bytes).as_bytes();
    } else if !layout.is_last(piece) {
        hash.value = subtree(offset, bytes);
    } else {
        let (right_edge, last_chunk) = split_edge(layout, offset, bytes);
        offset += (bytes.len() - last_chunk.len()) as u64;
        (hash.right_edge, hash.last_chunk) = (right_edge, last_chunk.to_vec());
        hash.value = merge_edge(&hash.right_edge, subtree(offset, last_chunk));
    }
    Ok(hash)
}

/// The proof of the size of a file of one piece, whose bytes these are: last chunk and right edge, for
/// [`Manifest::accept`]. It is not part of a [`Manifest`], which it would make longer than some files. `None` unless
/// there is exactly one piece.
pub fn prove_single(bytes: &[u8]) -> Option<(&[u8], Vec<Hash32>)> {
    let layout = Layout::new(bytes.len() as u64)
        .ok()
        .filter(|layout| layout.is_single() && layout.n_pieces() == 1)?;
    let (right_edge, last_chunk) = split_edge(layout, 0, bytes);
    Some((last_chunk, right_edge))
}

/// Splits the last piece, which begins at `offset`, into the values of its complete subtrees and its last chunk.
fn split_edge(layout: Layout, mut offset: u64, bytes: &[u8]) -> (Vec<Hash32>, &[u8]) {
    let ((mut left, _), mut rest, mut edge) = (layout.right_edge(), bytes, vec![]);
    while left != 0 {
        let len = 1 << left.ilog2();
        let (complete, right) = rest.split_at(len as usize);
        edge.push(subtree(offset, complete));
        (rest, offset, left) = (right, offset + u64::from(len), left - len);
    }
    (edge, rest)
}

/// The manifest of a local file from the hashes of all its pieces in order (none for a file of zero bytes).
///
/// Fails if a piece is missing, out of order or from another layout.
pub fn assemble(layout: Layout, mut pieces: Vec<PieceHash>) -> Result<Manifest, VerifyError> {
    if !pieces
        .iter()
        .map(|hash| (hash.layout, hash.piece))
        .eq(layout.pieces().map(|piece| (layout, piece)))
    {
        return Err(VerifyError::Malformed);
    }
    let mut hashes: Vec<_> = pieces.iter().map(|hash| hash.value).collect();
    let id = fold(&hashes);
    if layout.is_single() {
        hashes.clear();
    }
    let (last_chunk, right_edge) = pieces
        .pop()
        .map(|last| (last.last_chunk, last.right_edge))
        .unwrap_or_default();
    Ok(Manifest(Arc::new(Parts {
        id,
        layout,
        hashes,
        last_chunk,
        right_edge,
    })))
}

/// The value of the subtree over `bytes`, which begins at `offset`. Panics, by hazmat, if `bytes` is empty or longer
/// than a subtree at `offset` can be.
fn subtree(offset: u64, bytes: &[u8]) -> Hash32 {
    blake3::Hasher::new()
        .set_input_offset(offset)
        .update(bytes)
        .finalize_non_root()
}

/// The value of the last piece from its complete subtrees, left to right, and its last chunk's value.
fn merge_edge(right_edge: &[Hash32], last_chunk: Hash32) -> Hash32 {
    right_edge.iter().rev().fold(last_chunk, |right, left| {
        merge_subtrees_non_root(left, &right, Mode::Hash)
    })
}

/// The id of a content of one piece from its complete subtrees, left to right, and its last chunk at `offset`.
fn merge_edge_to_root(right_edge: &[Hash32], offset: u64, last_chunk: &[u8]) -> ContentId {
    let root = match right_edge.split_first() {
        None => blake3::hash(last_chunk),
        Some((first, others)) => merge_subtrees_root(
            first,
            &merge_edge(others, subtree(offset, last_chunk)),
            Mode::Hash,
        ),
    };
    ContentId(*root.as_bytes())
}

/// The id of the content whose piece hashes these are. A sole hash is the root already.
fn fold(hashes: &[Hash32]) -> ContentId {
    match hashes {
        [] => ContentId::EMPTY,
        [root] => ContentId(*root),
        [left, right] => ContentId(*merge_subtrees_root(left, right, Mode::Hash).as_bytes()),
        _ => {
            let pairs = hashes.chunks(2).map(|pair| match pair {
                [left, right] => merge_subtrees_non_root(left, right, Mode::Hash),
                odd => odd[0],
            });
            fold(&pairs.collect::<Vec<_>>())
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the numbers here are small"
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PIECE: u64 = MIN_PIECE_LEN as u64;

    const SINGLE: u64 = MAX_SINGLE as u64;

    /// Sizes at which something changes.
    const AWKWARD_SIZES: &[u64] = &[
        0,                     // the empty root; no piece
        1,                     // the shortest chunk
        1023,                  // one byte short of a chunk
        1024,                  // one complete chunk
        1025,                  // two chunks: the first parent
        PIECE + 1,             // one piece, longer than others
        SINGLE - 1,            // one piece, not full
        SINGLE,                // one full piece: the last size without hashes
        SINGLE + 1, // five pieces; the last is one chunk of one byte, so its right edge is empty
        SINGLE + 1024, // the last piece is one complete chunk
        SINGLE + 1025, // the last piece has two chunks, so one subtree on the edge
        5 * PIECE - 1024, // the last piece lacks one chunk
        5 * PIECE - 1, // the last piece is complete but for a byte: the edge is at its longest
        5 * PIECE,  // the last piece is complete
        6 * PIECE + 1, // seven pieces, the odd one moves up
        7 * PIECE + 1, // eight pieces, a full tree of pieces
        5 * PIECE + PIECE / 2, // the last piece is one complete subtree of half its length
        5 * PIECE + 17_777, // six pieces; nothing is round
        8 * PIECE,  // a complete tree
        9 * PIECE - 1023, // nine pieces: the last moves up three times; its last chunk is one byte
    ];

    /// Bytes that differ from chunk to chunk and from piece to piece.
    fn content(size: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(size).unwrap()];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    fn piece_of(layout: Layout, piece: PieceIndex, bytes: &[u8]) -> &[u8] {
        &bytes[usize::try_from(layout.offset(piece)).unwrap()..][..layout.len_of(piece) as usize]
    }

    fn manifest_with(layout: Layout, bytes: &[u8]) -> Manifest {
        let hashes = layout
            .pieces()
            .map(|piece| hash_piece(layout, piece, piece_of(layout, piece, bytes)).unwrap());
        assemble(layout, hashes.collect()).unwrap()
    }

    fn manifest(bytes: &[u8]) -> Manifest {
        manifest_with(Layout::new(bytes.len() as u64).unwrap(), bytes)
    }

    fn accept(honest: &Manifest, size: u64) -> Result<Manifest, VerifyError> {
        Manifest::accept(
            honest.id(),
            size,
            honest.hashes().to_vec(),
            honest.last_chunk(),
            honest.right_edge(),
        )
    }

    /// A manifest that lies about its size may carry whatever the liar can make: the hashes fold to the real id, and
    /// the liar tries every chunk and edge given.
    fn assert_lie_refused(
        id: ContentId,
        size: u64,
        hashes: &[Hash32],
        proofs: &[(&[u8], &[Hash32])],
    ) {
        assert_eq!(
            fold(hashes),
            id,
            "the attack is alive: without the proof this would pass"
        );
        assert_eq!(Layout::new(size).unwrap().n_pieces() as usize, hashes.len());
        for (last_chunk, right_edge) in proofs {
            let lie = Manifest::accept(id, size, hashes.to_vec(), last_chunk, right_edge);
            assert_eq!(lie.map(|_| ()), Err(VerifyError::SizeNotProven));
        }
    }

    fn parents(nodes: &[Hash32]) -> Vec<Hash32> {
        nodes
            .chunks(2)
            .map(|p| merge_subtrees_non_root(&p[0], &p[1], Mode::Hash))
            .collect()
    }

    #[test]
    fn the_size_of_a_single_piece_is_proven_too() {
        let bytes: Vec<u8> = (0..SINGLE).map(|i| (i % 251) as u8).collect();
        for size in [
            1,
            2,
            1023,
            1024,
            1025,
            2048,
            3000,
            4096,
            5000,
            65_536,
            SINGLE - 1,
            SINGLE,
        ] {
            let bytes = &bytes[..size as usize];
            let id = ContentId(*blake3::hash(bytes).as_bytes());
            let (last_chunk, right_edge) = prove_single(bytes).unwrap();
            let claim = |size| {
                Manifest::accept(id, size, vec![], last_chunk, &right_edge)
                    .map(|m| m.layout().size())
            };
            assert_eq!(claim(size), Ok(size));
            for lie in [
                0,
                1,
                size - 1,
                size + 1,
                size * 2,
                size / 2,
                size + 1024,
                SINGLE,
                SINGLE + 1,
                SINGLE * 2,
            ] {
                assert!(
                    lie == size || claim(lie).is_err(),
                    "{size} passed for {lie}"
                );
            }
            let mut bent = last_chunk.to_vec();
            bent[0] ^= 1;
            assert!(Manifest::accept(id, size, vec![], &bent, &right_edge).is_err());
            assert!(Manifest::accept(id, size, vec![[0; 32]], last_chunk, &right_edge).is_err());
        }
        assert!(
            prove_single(&[]).is_none() && prove_single(&vec![0; SINGLE as usize + 1]).is_none()
        );
        assert!(Manifest::accept(ContentId::EMPTY, 0, vec![], &[], &[]).is_ok());
    }

    #[test]
    fn the_id_is_plain_blake3_and_every_piece_verifies() {
        for &size in AWKWARD_SIZES {
            let bytes = content(size);
            let manifest = manifest(&bytes);
            let layout = manifest.layout();
            assert_eq!(
                manifest.id().as_bytes(),
                blake3::hash(&bytes).as_bytes(),
                "size {size}"
            );
            let mut whole = vec![];
            for piece in layout.pieces() {
                let bytes = Bytes::copy_from_slice(piece_of(layout, piece, &bytes));
                assert!(manifest.check(piece, &bytes));
                let verified = manifest.verify(piece, bytes).unwrap();
                assert_eq!(
                    (verified.content(), verified.index()),
                    (manifest.id(), piece)
                );
                assert_eq!(verified.offset(), whole.len() as u64);
                whole.extend_from_slice(verified.bytes());
            }
            assert_eq!(whole, bytes);
            let stored = manifest.to_bytes();
            assert_eq!(
                Manifest::from_bytes(&stored).unwrap().to_bytes(),
                stored,
                "size {size}"
            );
            if size > SINGLE {
                assert_eq!(
                    manifest.last_chunk(),
                    &bytes[bytes.len() - ((bytes.len() - 1) % 1024 + 1)..]
                );
                assert!(accept(&manifest, size).is_ok());
            } else {
                assert_eq!(stored.len(), 40);
                // A single piece's manifest keeps no proof, so it proves nothing to others; zero bytes need none.
                assert_eq!(accept(&manifest, size).is_ok(), size == 0);
            }
        }
    }

    #[test]
    fn longer_pieces_have_longer_edges() {
        // Layouts of files of up to 1 TiB, at sizes that can be hashed here.
        for (doubling, edge) in (1..=8).zip(7..) {
            let piece_len = MIN_PIECE_LEN << doubling;
            for size in [u64::from(piece_len) * 2, u64::from(piece_len) + 1] {
                let bytes = content(size);
                let manifest = manifest_with(Layout::with_piece_len(size, piece_len), &bytes);
                assert_eq!(manifest.id().as_bytes(), blake3::hash(&bytes).as_bytes());
                assert_eq!(
                    manifest.right_edge().len(),
                    if size % 2 == 0 { edge } else { 0 }
                );
                assert_eq!(manifest.0.prove(), Ok(()));
            }
        }
        assert_eq!(MIN_PIECE_LEN << 8, MAX_PIECE_LEN);
    }

    #[test]
    fn four_gibibytes_and_more() {
        // What `head -c 4295045120 /dev/zero | b3sum` prints: 4 GiB and 76 KiB.
        const SIZE: u64 = (1 << 32) + 77_824;
        const ID: &str = "8fbaf398f24611abbbd7d6ad645c77ed4f905cdec6e5a5da5f535ce0480ba98b";
        let layout = Layout::new(SIZE).unwrap();
        let zeros = vec![0; layout.piece_len() as usize];
        let hash =
            |piece| hash_piece(layout, piece, &zeros[..layout.len_of(piece) as usize]).unwrap();
        let manifest = assemble(layout, layout.pieces().map(hash).collect()).unwrap();
        assert_eq!(manifest.id().to_string(), ID);
        assert_eq!(
            Manifest::from_bytes(&manifest.to_bytes()).unwrap().layout(),
            layout
        );
        let last = layout.pieces().next_back().unwrap();
        assert!(manifest.check(last, &zeros[..77_824]));
    }

    #[test]
    fn the_empty_file_is_the_empty_root() {
        assert_eq!(ContentId::EMPTY.as_bytes(), blake3::hash(b"").as_bytes());
        let other = manifest(b"x").id();
        assert!(Manifest::single(ContentId::EMPTY, 0).is_ok());
        assert_eq!(
            Manifest::single(other, 0).map(|_| ()),
            Err(VerifyError::WrongRoot)
        );
        assert_eq!(
            Manifest::single(ContentId::EMPTY, 1).map(|_| ()),
            Err(VerifyError::WrongRoot)
        );
        assert!(Manifest::single(other, SINGLE).is_ok());
        assert!(Manifest::single(other, SINGLE + 1).is_err());
        assert!(Manifest::single(other, u64::MAX).is_err());
    }

    #[test]
    fn an_id_is_64_lower_case_hex_digits() {
        let text = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(text.parse(), Ok(ContentId::EMPTY));
        assert_eq!(ContentId::EMPTY.to_string(), text);
        assert_eq!(format!("{:?}", ContentId::EMPTY), "ContentId(af1349b9)");
        let bad = [
            &text.to_uppercase(),
            &text[1..],
            &format!("{text}0"),
            &format!(" {}", &text[1..]),
            "",
            "é",
        ];
        for text in bad.into_iter().chain([&*"g".repeat(64), &*"é".repeat(32)]) {
            assert_eq!(text.parse::<ContentId>(), Err(NotAContentId), "{text:?}");
        }
        assert_eq!(
            ContentId::try_from(&ContentId::EMPTY.0[..]),
            Ok(ContentId::EMPTY)
        );
        assert_eq!(ContentId::try_from(&[0; 33][..]), Err(NotAContentId));
    }

    #[test]
    fn the_layer_above_is_refused_as_a_file_of_half_the_size() {
        let honest = manifest(&content(16 * PIECE));
        let (hashes, chunk, edge) = (honest.hashes(), honest.last_chunk(), honest.right_edge());
        // One subtree more on the edge, and one step less at its end.
        let deeper: Vec<_> = [&hashes[14..15], &edge[..5]].concat();
        assert_lie_refused(
            honest.id(),
            8 * PIECE,
            &parents(hashes),
            &[(chunk, edge), (chunk, &deeper)],
        );

        // The same with the last parent's two children passed off as a chunk of 64 bytes.
        let bytes = content(16 * PIECE);
        let two_chunks = &bytes[bytes.len() - 2048..];
        let children = [
            subtree(16 * PIECE - 2048, &two_chunks[..1024]),
            subtree(16 * PIECE - 1024, &two_chunks[1024..]),
        ];
        assert_eq!(
            merge_edge(&deeper, parents(&children)[0]),
            parents(hashes)[7]
        );
        assert_lie_refused(
            honest.id(),
            8 * PIECE - 1024 + 64,
            &parents(hashes),
            &[
                (children.as_flattened(), &deeper),
                (children.as_flattened(), edge),
            ],
        );

        // A last piece of one chunk: everything about the last node is true but the chunk's place.
        let honest = manifest(&content(15 * PIECE + 900));
        let (hashes, chunk) = (honest.hashes(), honest.last_chunk());
        assert_eq!(merge_edge(&hashes[14..15], hashes[15]), parents(hashes)[7]);
        assert_lie_refused(
            honest.id(),
            7 * PIECE + 1024 + 900,
            &parents(hashes),
            &[(chunk, &hashes[14..15])],
        );
    }

    #[test]
    fn the_layer_below_is_refused_as_a_file_of_double_the_size() {
        let bytes = content(8 * PIECE);
        let honest = manifest(&bytes);
        let half = PIECE / 2;
        let halves: Vec<_> = (0..16)
            .zip(bytes.chunks(PIECE as usize / 2))
            .map(|(i, b)| subtree(i * half, b))
            .collect();
        let (chunk, edge) = (honest.last_chunk(), honest.right_edge());
        // Everything about the last node is true but its place.
        assert_lie_refused(
            honest.id(),
            15 * PIECE + half,
            &halves,
            &[(chunk, &edge[1..])],
        );
        assert_lie_refused(honest.id(), 16 * PIECE, &halves, &[(chunk, edge)]);
    }

    #[test]
    fn a_part_of_a_layer_is_refused_as_a_piece() {
        // The parents of all pairs stand as pieces; the last piece is the real one.
        let honest = manifest(&content(14 * PIECE + 5000));
        let merged = [&parents(&honest.hashes()[..14])[..], &honest.hashes()[14..]].concat();
        assert_lie_refused(
            honest.id(),
            7 * PIECE + 5000,
            &merged,
            &[(honest.last_chunk(), honest.right_edge())],
        );
    }

    #[test]
    fn padded_and_cut_manifests_are_refused() {
        let honest = manifest(&content(5 * PIECE + 5000));
        let (id, size, hashes) = (honest.id(), honest.layout().size(), honest.hashes());
        let (chunk, edge) = (honest.last_chunk(), honest.right_edge());
        let refused = |hashes: &[Hash32], chunk: &[u8], edge: &[Hash32]| {
            matches!(
                Manifest::accept(id, size, hashes.to_vec(), chunk, edge),
                Err(VerifyError::Malformed)
            )
        };
        let longer = |nodes: &[Hash32]| [nodes, &[[0; 32]]].concat();
        assert!(
            refused(&[], chunk, edge)
                && refused(&hashes[..5], chunk, edge)
                && refused(&hashes[1..], chunk, edge)
        );
        assert!(refused(&longer(hashes), chunk, edge));
        assert!(refused(hashes, &[], edge) && refused(hashes, &chunk[1..], edge));
        assert!(
            refused(hashes, &[chunk, b"x"].concat(), edge)
                && refused(hashes, &content(2 * PIECE), edge)
        );
        assert!(refused(hashes, chunk, &[]) && refused(hashes, chunk, &longer(edge)));
        let stored = honest.to_bytes();
        assert!((0..stored.len()).all(|len| Manifest::from_bytes(&stored[..len]).is_err()));
        for padding in [1, 31, 32, 33] {
            assert!(Manifest::from_bytes(&[&stored[..], &[0; 64][..padding]].concat()).is_err());
        }
    }

    #[test]
    fn a_manifest_of_another_file_is_refused() {
        let (mine, other) = (
            manifest(&content(5 * PIECE)),
            manifest(&content(5 * PIECE + 1)[1..]),
        );
        let (hashes, chunk, edge) = (
            other.hashes().to_vec(),
            other.last_chunk(),
            other.right_edge(),
        );
        let lie = Manifest::accept(mine.id(), 5 * PIECE, hashes, chunk, edge);
        assert_eq!(lie.map(|_| ()), Err(VerifyError::WrongRoot));
    }

    #[test]
    fn a_piece_is_refused_elsewhere_and_at_another_length() {
        // All pieces are alike but for their place.
        let bytes = vec![7; 5 * PIECE as usize];
        let manifest = manifest(&bytes);
        let piece = |i| manifest.layout().piece(i).unwrap();
        let swapped = [1, 0, 2, 3, 4].map(|i| manifest.hashes()[i]);
        let lie = Manifest::accept(
            manifest.id(),
            5 * PIECE,
            swapped.into(),
            manifest.last_chunk(),
            manifest.right_edge(),
        );
        assert_eq!(lie.map(|_| ()), Err(VerifyError::WrongRoot));

        let other = manifest_with(
            manifest.layout(),
            &[vec![7; PIECE as usize], content(4 * PIECE)].concat(),
        );
        assert!(other.check(piece(0), &bytes[..PIECE as usize]));
        let refused = |i, len: u64| {
            other
                .verify(piece(i), Bytes::copy_from_slice(&bytes[..len as usize]))
                .map(|_| ())
                .unwrap_err()
        };
        assert_eq!(refused(1, PIECE), VerifyError::WrongPiece(1));
        for actual in [0, 1, PIECE as usize - 1, PIECE as usize + 1, bytes.len()] {
            assert_eq!(refused(1, actual as u64), VerifyError::WrongPiece(1));
        }
    }

    #[test]
    fn a_piece_index_of_another_layout_is_harmless() {
        let small = manifest(&content(SINGLE + 1));
        let far = Layout::new(MAX_SIZE)
            .unwrap()
            .piece(MAX_PIECES - 1)
            .unwrap();
        assert_eq!(small.layout().len_of(far), 0);
        for bytes in [vec![], content(PIECE)] {
            assert!(hash_piece(small.layout(), far, &bytes).is_err());
            let refused = small.verify(far, bytes.into()).map(|_| ());
            assert_eq!(refused, Err(VerifyError::WrongPiece(MAX_PIECES - 1)));
        }
    }

    #[test]
    fn pieces_are_assembled_in_order_and_all() {
        let layout = Layout::new(5 * PIECE).unwrap();
        let bytes = content(PIECE);
        let hashes = |layout: Layout, order: &[u32]| {
            order
                .iter()
                .map(|i| hash_piece(layout, layout.piece(*i).unwrap(), &bytes).unwrap())
                .collect::<Vec<_>>()
        };
        assert!(assemble(layout, hashes(layout, &[0, 1, 2, 3, 4])).is_ok());
        for wrong in [
            &[][..],
            &[0, 1, 2, 3],
            &[0, 2, 1, 3, 4],
            &[0, 1, 1, 3, 4],
            &[0, 1, 2, 3, 4, 4],
        ] {
            assert!(assemble(layout, hashes(layout, wrong)).is_err());
        }
        assert!(
            assemble(
                layout,
                hashes(Layout::new(6 * PIECE).unwrap(), &[0, 1, 2, 3, 4])
            )
            .is_err()
        );
    }

    /// Sizes of a few pieces, the awkward ones included.
    fn multi_piece_size() -> impl Strategy<Value = u64> {
        let awkward: Vec<_> = AWKWARD_SIZES
            .iter()
            .copied()
            .filter(|size| *size > SINGLE)
            .collect();
        prop_oneof![prop::sample::select(awkward), SINGLE + 1..9 * PIECE]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_size_is_plain_blake3(size in 0..12 * PIECE) {
            let bytes = content(size);
            let manifest = manifest(&bytes);
            prop_assert_eq!(manifest.id().0, *blake3::hash(&bytes).as_bytes());
            prop_assert!(Manifest::from_bytes(&manifest.to_bytes()).is_ok());
        }

        #[test]
        fn any_flipped_bit_of_a_manifest_is_refused(
            size in multi_piece_size(),
            bits in prop::collection::vec(any::<prop::sample::Index>(), 64),
        ) {
            let mut stored = manifest(&content(size)).to_bytes();
            // The bits of the size are few and the most interesting.
            let anywhere = bits.into_iter().map(|bit| bit.index(stored.len() * 8)).collect::<Vec<_>>();
            for bit in (32 * 8..40 * 8).chain(anywhere) {
                stored[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(Manifest::from_bytes(&stored).is_err());
                stored[bit / 8] ^= 1 << (bit % 8);
            }
        }

        #[test]
        fn any_flipped_bit_of_a_piece_is_refused(size in 1..9 * PIECE, bit in any::<prop::sample::Index>()) {
            let mut bytes = content(size);
            let manifest = manifest(&bytes);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            for piece in manifest.layout().pieces() {
                let hit = u64::from(piece.get()) == bit as u64 / 8 / u64::from(manifest.layout().piece_len());
                prop_assert_eq!(manifest.check(piece, piece_of(manifest.layout(), piece, &bytes)), !hit);
            }
        }

        #[test]
        fn any_other_size_is_refused(size in multi_piece_size(), near in -3000_i64..3000, far in any::<u64>()) {
            let honest = manifest(&content(size));
            // Whole pieces away the lengths of all parts but the hashes are right.
            let pieces_away = (-4..=4).map(|n| size.wrapping_add_signed(n * PIECE as i64));
            for other in pieces_away.chain([size.wrapping_add_signed(near), far]).filter(|other| *other != size) {
                prop_assert!(accept(&honest, other).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            prop_assert!(Manifest::from_bytes(&bytes).is_err());
        }

        #[test]
        fn arbitrary_storage_of_true_shape_is_refused(size in multi_piece_size(), seed: [u8; 32]) {
            let len = manifest(&content(size)).to_bytes().len();
            let mut stored = vec![0; len];
            blake3::Hasher::new_keyed(&seed).finalize_xof().fill(&mut stored);
            stored[32..40].copy_from_slice(&size.to_le_bytes());
            prop_assert_eq!(Manifest::from_bytes(&stored).map(|_| ()), Err(VerifyError::SizeNotProven));
        }

        #[test]
        fn arbitrary_manifests_are_refused(
            id: [u8; 32],
            size in prop_oneof![any::<u64>(), 0..=MAX_SIZE, 0..9 * PIECE],
            hashes in prop::collection::vec(any::<Hash32>(), 0..6),
            last_chunk in prop::collection::vec(any::<u8>(), 0..2050),
            right_edge in prop::collection::vec(any::<Hash32>(), 0..16),
        ) {
            prop_assert!(Manifest::accept(ContentId(id), size, hashes, &last_chunk, &right_edge).is_err());
        }
    }
}
