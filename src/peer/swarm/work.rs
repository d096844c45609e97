//! The contents of a batch, whose pieces are numbered one after the other.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use crate::{
    peer::{source::Wanted, storage::Storage, targets::Want},
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
    /// Number of its first piece in the batch.
    pub first: u32,
    /// Pieces that are missing.
    left: AtomicU32,
    named: AtomicBool,
}

impl Work {
    /// Pieces that are missing.
    #[must_use]
    pub fn left(&self) -> u32 {
        self.left.load(Ordering::Relaxed)
    }

    /// One more piece is written; how many are missing now.
    pub fn piece_came(&self) -> u32 {
        self.left.fetch_sub(1, Ordering::Relaxed) - 1
    }

    /// Name, bytes done and bytes in all, if it is begun and not complete.
    pub(super) fn begun(&self) -> Option<(SafeName, u64, u64)> {
        let layout = self.storage.manifest().layout();
        let done = layout.size().min(u64::from(layout.n_pieces() - self.left()) * u64::from(layout.piece_len()));
        (self.left() > 0 && done > 0).then(|| (self.want.name.clone(), done, layout.size()))
    }

    /// The file has its name.
    pub fn name(&self) {
        self.named.store(true, Ordering::Release);
    }

    /// Has it?
    #[must_use]
    pub fn is_named(&self) -> bool {
        self.named.load(Ordering::Acquire)
    }
}

/// Numbers the pieces of these contents; what a storage holds is not missing. Also gives how many there are.
pub(super) fn number(files: Vec<(Want, SafeName, Arc<Storage>)>) -> (Vec<Work>, u32) {
    let mut work = Vec::with_capacity(files.len());
    let mut first = 0;
    for (want, target, storage) in files {
        let n_pieces = storage.manifest().layout().n_pieces();
        let left = AtomicU32::new(n_pieces - storage.have().count());
        work.push(Work { want, target, storage, first, left, named: AtomicBool::new(false) });
        first += n_pieces;
    }
    (work, first)
}

/// Piece numbers as ranges of contents, each with the content's position in the batch; the last one says how many of the
/// pieces fit into one request.
pub(super) fn ranges(work: &[Work], pieces: &[u32]) -> (Vec<Wanted>, Vec<usize>, usize) {
    let (mut claim, mut works): (Vec<Wanted>, Vec<usize>) = (vec![], vec![]);
    let (mut bytes, mut taken) = (0, 0);
    for &piece in pieces {
        let at = work.partition_point(|work| work.first <= piece) - 1;
        let manifest = work[at].storage.manifest();
        let Some(index) = manifest.layout().piece(piece - work[at].first) else { break };
        bytes += u64::from(manifest.layout().len_of(index));
        if taken > 0 && (bytes > proto::MAX_CLAIM || claim.len() == proto::MAX_RANGES) {
            break;
        }
        taken += 1;
        match (claim.last_mut(), works.last()) {
            (Some(last), Some(&same)) if same == at && last.first.get() + last.count == index.get() => last.count += 1,
            _ => {
                claim.push(Wanted { manifest: manifest.clone(), first: index, count: 1 });
                works.push(at);
            }
        }
    }
    (claim, works, taken)
}
