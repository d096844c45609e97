//! The contents of a batch, whose pieces are numbered one after the other.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    catalog::FileKey,
    content::{Layout, PieceIndex},
    peer::{
        fetch::{destination::Want, source::Wanted, storage::Storage},
        sharing::library::Partial,
    },
    proto,
    safe_path::SafeName,
};

/// One content of a batch.
pub struct Work {
    /// What it is.
    pub want: Want,
    /// What it will be called.
    pub target: SafeName,
    /// Its `.part`.
    pub storage: Arc<Storage>,
    /// The offer of what is here of it; none for a content of one piece.
    partial: Option<Partial>,
    /// Number of its first piece in the batch.
    pub first: u32,
    /// Pieces that are missing.
    left: AtomicU32,
    losses: AtomicU32,
}

impl Work {
    /// A content with its open storage, and the offer of what that holds.
    #[must_use]
    pub fn new(
        want: Want,
        target: SafeName,
        storage: Arc<Storage>,
        partial: Option<Partial>,
    ) -> Self {
        let left = AtomicU32::new(storage.manifest().layout().n_pieces() - storage.have().count());
        Self {
            want,
            target,
            storage,
            partial,
            first: 0,
            left,
            losses: AtomicU32::new(0),
        }
    }

    /// Size and pieces.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.storage.manifest().layout()
    }

    /// Its pieces' numbers in the batch.
    #[must_use]
    pub fn pieces(&self) -> Range<u32> {
        self.first..self.first + self.layout().n_pieces()
    }

    /// Pieces that are missing.
    #[must_use]
    pub fn left(&self) -> u32 {
        self.left.load(Ordering::Relaxed)
    }

    /// One more piece is written; how many are missing now.
    pub(super) fn piece_came(&self) -> u32 {
        self.left.fetch_sub(1, Ordering::Relaxed) - 1
    }

    /// The disk lost these pieces; how often that happened.
    pub(super) fn lose(&self, pieces: &[u32]) -> u32 {
        self.left.fetch_add(
            u32::try_from(pieces.len()).unwrap_or(u32::MAX),
            Ordering::Relaxed,
        );
        if let Some(partial) = &self.partial {
            partial.lose(pieces);
        }
        self.losses.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Is some of it here, and some not?
    pub(super) fn is_begun(&self) -> bool {
        (1..self.layout().n_pieces()).contains(&self.left())
    }

    /// Offers a piece to others.
    pub(super) fn offer(&self, piece: PieceIndex) {
        if let Some(partial) = &self.partial {
            partial.add_piece(piece);
        }
    }

    /// What it is, bytes done and bytes in all, if it is begun and not complete.
    pub(super) fn begun(&self) -> Option<(FileKey, u64, u64)> {
        let layout = self.layout();
        let done = layout
            .size()
            .min(u64::from(layout.n_pieces() - self.left()) * u64::from(layout.piece_len()));
        let key = || FileKey {
            name: self.want.name.clone(),
            content_id: self.want.id,
        };
        (self.left() > 0 && done > 0).then(|| (key(), done, layout.size()))
    }
}

/// Numbers the pieces of these contents; gives how many there are.
pub(super) fn number(work: &mut [Work]) -> u32 {
    let mut n_pieces = 0;
    for work in work {
        work.first = n_pieces;
        n_pieces += work.layout().n_pieces();
    }
    n_pieces
}

/// Bytes of these pieces together.
pub(super) fn bytes(work: &[Work], pieces: &[u32]) -> u32 {
    let of = |&piece: &u32| {
        let work = &work[work.partition_point(|work| work.first <= piece) - 1];
        let layout = work.storage.manifest().layout();
        layout
            .piece(piece - work.first)
            .map_or(0, |index| u64::from(layout.len_of(index)))
    };
    u32::try_from(pieces.iter().map(of).sum::<u64>()).unwrap_or(u32::MAX)
}

/// Piece numbers as ranges of contents, each with the content's position in the batch; the last one says how many of the
/// pieces fit into one request.
pub(super) fn ranges(work: &[Work], pieces: &[u32]) -> (Vec<Wanted>, Vec<usize>, usize) {
    let (mut claim, mut works): (Vec<Wanted>, Vec<usize>) = (vec![], vec![]);
    let (mut bytes, mut taken) = (0, 0);
    for &piece in pieces {
        // Contents of no pieces share their number with the one that follows.
        let at = work.partition_point(|work| work.first <= piece) - 1;
        let manifest = work[at].storage.manifest();
        let Some(index) = manifest.layout().piece(piece - work[at].first) else {
            break;
        };
        bytes += u64::from(manifest.layout().len_of(index));
        if taken > 0 && (bytes > proto::MAX_CLAIM || claim.len() == proto::MAX_RANGES) {
            break;
        }
        taken += 1;
        match (claim.last_mut(), works.last()) {
            (Some(last), Some(&same))
                if same == at && last.first.get() + last.count == index.get() =>
            {
                last.count += 1
            }
            _ => {
                claim.push(Wanted {
                    id: manifest.id(),
                    layout: manifest.layout(),
                    first: index,
                    count: 1,
                });
                works.push(at);
            }
        }
    }
    (claim, works, taken)
}
