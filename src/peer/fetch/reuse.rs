//! Pieces of wanted contents that this disk holds already, so that they are copied instead of fetched.
//!
//! Three places are looked at: the `.part` of an earlier run, the file that lies under the wanted name, and every complete file
//! of the library. A piece's hash depends on its position, so only pieces at the same offset can be equal.
//!
//! Invariant: finding reads no file's data and proves nothing; a piece counts only after [`LocalPiece::bring`] has read it
//! and it verified.

use std::{os::unix::fs::FileExt, path::PathBuf, sync::Arc};

use bytes::Bytes;

use super::storage::{Storage, StorageError};
use crate::peer::sharing::{
    hasher::Stamp,
    index::Index,
    library::{Have, Library},
};
use crate::{
    content::{ContentId, Hash32, Manifest, PieceIndex},
    have::HaveMap,
    safe_path::{Root, SafeName},
};

/// Where to look.
pub struct Places<'a> {
    /// Everything that is offered.
    pub library: &'a Library,
    /// Under which downloads land.
    pub root: &'a Root,
    /// What was hashed before.
    pub index: &'a Index,
}

/// A missing piece that is probably on this disk.
pub struct LocalPiece {
    piece: PieceIndex,
    /// In the `.part` itself.
    is_own: bool,
    /// In the older file.
    is_older: bool,
    /// In a complete file of this content.
    held: Option<ContentId>,
    files: Arc<Files>,
}

/// What the pieces of one content are read from.
struct Files {
    library: Library,
    root: Root,
    older: PathBuf,
}

impl LocalPiece {
    /// Which piece it is.
    #[must_use]
    pub fn index(&self) -> PieceIndex {
        self.piece
    }

    /// Reads the piece, verifies it, and writes it unless it was in its place already; false if it is not there after all.
    /// Blocks. `storage` is the one it was found for.
    ///
    /// # Errors
    /// As [`Storage::write`]. That a place cannot be read is none.
    pub fn bring(&self, storage: &Storage) -> Result<bool, StorageError> {
        if storage.has(self.piece) || self.is_own && storage.check(self.piece)? {
            return Ok(true);
        }
        let layout = storage.manifest().layout();
        let (offset, len) = (layout.offset(self.piece), layout.len_of(self.piece));
        let older = || {
            self.is_older
                .then(|| self.files.read_older(offset, len))
                .flatten()
        };
        let held = || {
            self.held
                .and_then(|id| self.files.library.open(&id).ok()?.read(offset, len).ok())
        };
        let verify = |bytes: Bytes| storage.manifest().verify(self.piece, bytes).ok();
        let found = held().and_then(verify).or_else(|| older().and_then(verify));
        found.map_or(Ok(false), |good| storage.write(&good).map(|()| true))
    }
}

impl Files {
    fn read_older(&self, offset: u64, len: u32) -> Option<Bytes> {
        let file = self.root.open_file(&self.older).ok()?;
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, offset).ok()?;
        Some(bytes.into())
    }
}

impl Places<'_> {
    /// The pieces that are probably here, for each storage with the name under which an older version may lie; ascending.
    #[must_use]
    pub fn find(&self, wanted: &[(&Storage, &SafeName)]) -> Vec<Vec<LocalPiece>> {
        let mut held: Vec<Vec<(u32, ContentId)>> = wanted.iter().map(|_| vec![]).collect();
        let is_whole =
            |storage: &Storage| self.library.have(&storage.manifest().id()) == Some(Have::Complete);
        let whole: Vec<bool> = wanted
            .iter()
            .map(|(storage, _)| is_whole(storage))
            .collect();
        let partial = || wanted.iter().enumerate().filter(|(file, _)| !whole[*file]);
        let keys = Keys::new(partial().map(|(file, (storage, _))| (file, storage.manifest())));
        if !keys.0.is_empty() {
            self.library
                .long_contents()
                .iter()
                .for_each(|manifest| keys.search(manifest, &mut held));
        }
        let found = wanted.iter().zip(whole).zip(held);
        found
            .map(|(((storage, name), whole), held)| self.pieces(storage, name, whole, held))
            .collect()
    }

    fn pieces(
        &self,
        storage: &Storage,
        name: &SafeName,
        is_whole: bool,
        mut held: Vec<(u32, ContentId)>,
    ) -> Vec<LocalPiece> {
        let manifest = storage.manifest();
        if !is_whole && manifest.hashes().is_empty() {
            return vec![];
        }
        let (layout, have, own) = (manifest.layout(), storage.have(), storage.doubtful());
        let older = self.older(name, manifest);
        if own.is_empty() && older.is_none() && held.is_empty() && !is_whole {
            return vec![];
        }
        held.sort_unstable();
        held.dedup_by_key(|(piece, _)| *piece);
        let held_by = |piece: PieceIndex| {
            let at = held
                .binary_search_by_key(&piece.get(), |(piece, _)| *piece)
                .ok()?;
            Some(held[at].1)
        };
        let files = Files {
            library: self.library.clone(),
            root: self.root.clone(),
            older: name.as_path().into(),
        };
        let files = Arc::new(files);
        let missing = layout.pieces().filter(|piece| !have.contains(piece.get()));
        let pieces = missing.map(|piece| LocalPiece {
            piece,
            is_own: own.contains(piece.get()),
            is_older: older
                .as_ref()
                .is_some_and(|older| older.contains(piece.get())),
            held: if is_whole {
                Some(manifest.id())
            } else {
                held_by(piece)
            },
            files: files.clone(),
        });
        pieces
            .filter(|local| local.is_own || local.is_older || local.held.is_some())
            .collect()
    }

    /// Pieces that the file under this name may have: all it is long enough for, or, if it was hashed, those that are equal.
    fn older(&self, name: &SafeName, manifest: &Manifest) -> Option<HaveMap> {
        let layout = manifest.layout();
        if manifest.hashes().is_empty() {
            return None;
        }
        let file = self.root.open_file(name.as_path()).ok()?;
        let stamp = Stamp::of(&file).ok()?;
        let known = self
            .index
            .lookup(&self.root.path().join(name.as_path()), &stamp)
            .map(|known| known.manifest);
        let known = known.filter(|known| known.layout().piece_len() == layout.piece_len());
        let hashes = known
            .as_ref()
            .map(|known| known.hashes())
            .filter(|hashes| !hashes.is_empty());
        let mut map = HaveMap::empty(layout.n_pieces());
        for (piece, hash) in layout.pieces().zip(manifest.hashes()) {
            let is_within = layout.offset(piece) + u64::from(layout.len_of(piece)) <= stamp.size;
            if is_within
                && hashes.is_none_or(|hashes| hashes.get(piece.get() as usize) == Some(hash))
            {
                map.insert(piece.get());
            }
        }
        (!map.is_empty()).then_some(map)
    }
}

/// The pieces of several wanted contents: (first bytes of the hash, position, file), sorted. Contents with pieces of another
/// length have other hashes.
struct Keys(Vec<(u64, u32, usize)>);

impl Keys {
    fn new<'a>(wanted: impl Iterator<Item = (usize, &'a Manifest)>) -> Self {
        let keys = wanted.flat_map(|(file, manifest)| {
            (0..)
                .zip(manifest.hashes())
                .map(move |(i, h)| (first(h), i, file))
        });
        let mut keys: Vec<_> = keys.collect();
        keys.sort_unstable();
        Self(keys)
    }

    /// Adds to each file of `held` what a content has of it.
    fn search(&self, manifest: &Manifest, held: &mut [Vec<(u32, ContentId)>]) {
        for (i, hash) in (0..).zip(manifest.hashes()) {
            let key = (first(hash), i, 0);
            let at = self.0.partition_point(|found| *found < key);
            let equal = self.0[at..]
                .iter()
                .take_while(|found| (found.0, found.1) == (key.0, key.1));
            equal.for_each(|found| held[found.2].push((i, manifest.id())));
        }
    }
}

fn first(hash: &Hash32) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| hash[i]))
}
