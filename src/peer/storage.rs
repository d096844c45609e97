//! One content on its way to the disk: space, positional writes of whole pieces, and the final name.
//!
//! Invariant: a byte gets here only as a [`VerifiedPiece`], and a file gets its name only when every piece was written by
//! this `Storage` or read back and verified by it. [`Storage::have`] is the one record of that. The order at the end is
//! the file's data, its name, the folder's entry, each durable before the next; any prefix of it is a `.part` from which
//! a later run recovers. A failed sync voids every claim, because the kernel may have dropped what it could not write.
//!
//! All methods block on the disk; callers run them on a bounded pool. Reads and writes carry their offset, so a `Storage`
//! may be shared between threads.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use rustix::{
    fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, fstatvfs, seek},
    io::{Errno, retry_on_intr},
};
use thiserror::Error;

use crate::{
    content::{Manifest, PieceIndex, VerifiedPiece},
    have::HaveMap,
    safe_path::{PartFile, PublishError, Root, SafeName, escape, with_path},
};

/// Space left free on a disk: 1 % of it, but no more than this many bytes.
const MAX_RESERVE: u64 = 256 << 20;

/// Why a download cannot be stored.
#[derive(Debug, Error)]
pub enum StorageError {
    /// The disk is too full; what is verified stays. Bytes.
    #[error(
        "{}: not enough space: needs {needed} bytes, {free} free beside the reserve of 1 % (256 MiB at most)",
        escape(&.path.to_string_lossy())
    )]
    NoSpace {
        /// What is still to be written.
        needed: u64,
        /// What may still be written, without the reserve.
        free: u64,
        /// The `.part`.
        path: PathBuf,
    },
    /// The target's name is taken. [`Storage::finish_as`] can take another.
    #[error("{} exists already", escape(&.0.to_string_lossy()))]
    Exists(PathBuf),
    /// Another download is writing this target.
    #[error("{} is being downloaded already", escape(.0.as_str()))]
    Busy(SafeName),
    /// Pieces are missing, or were lost by a failed sync: [`Storage::recover`] tells which.
    #[error("{n_missing} pieces are missing")]
    Incomplete {
        /// Number of pieces.
        n_missing: u32,
    },
    /// Anything else, with the path.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Bytes between two syncs while a download runs.
const SYNC_BYTES: u64 = 64 << 20;

/// The `.part` of one content. Dropping it keeps the `.part` for a later run, unless it is new and holds nothing.
#[derive(Debug)]
pub struct Storage {
    part: PartFile,
    manifest: Manifest,
    have: Mutex<HaveMap>,
    /// Bytes written since the last sync began.
    unsynced: AtomicU64,
}

impl Drop for Storage {
    fn drop(&mut self) {
        if !self.part.existed()
            && self.lock_have().is_empty()
            && let Err(error) = self.part.discard()
        {
            tracing::warn!("removing an empty download: {error}");
        }
    }
}

impl Storage {
    /// Opens or creates the `.part` of `name` and reserves the space of the whole content, without writing to it.
    ///
    /// Holds nothing at first; [`recover`](Self::recover) finds what an earlier run has left. Fails with
    /// [`StorageError::NoSpace`] before the first byte if the disk cannot take the rest.
    pub fn open(root: &Root, name: &SafeName, manifest: Manifest) -> Result<Self, StorageError> {
        let part = root.create_part(name).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => StorageError::Busy(name.clone()),
            _ => StorageError::Io(e),
        })?;
        let have = Mutex::new(HaveMap::empty(manifest.layout().n_pieces()));
        let storage = Self { part, manifest, have, unsynced: AtomicU64::new(0) };
        match storage.reserve() {
            Ok(()) => Ok(storage),
            Err(e) => {
                if !storage.part.existed() {
                    storage.discard()?;
                }
                Err(e)
            }
        }
    }

    /// The content being stored.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The pieces known to be good, by verification before writing or by [`recover`](Self::recover).
    pub fn have(&self) -> HaveMap {
        self.lock_have().clone()
    }

    /// Reads back what the `.part` holds and keeps the pieces that verify; the record begins anew with them. Parts never
    /// written cost no reading where the file system can tell. Not to be called while pieces are being written.
    pub fn recover(&self) -> Result<HaveMap, StorageError> {
        let (file, layout) = (self.part.file(), self.manifest.layout());
        let mut have = HaveMap::empty(layout.n_pieces());
        let mut buffer = vec![0; usize::try_from(layout.size().min(layout.piece_len().into())).unwrap_or(0)];
        let mut next_data = 0;
        for piece in layout.pieces() {
            let (begin, len) = (layout.offset(piece), layout.len_of(piece));
            if next_data <= begin {
                next_data = data_from(file, begin);
            }
            if next_data >= begin + u64::from(len) {
                continue;
            }
            let bytes = &mut buffer[..len as usize];
            match file.read_exact_at(bytes, begin) {
                Ok(()) if self.manifest.check(piece, bytes) => _ = have.insert(piece.get()),
                Err(e) if e.kind() != io::ErrorKind::UnexpectedEof => return Err(self.failed(e)),
                _ => {}
            }
        }
        *self.lock_have() = have.clone();
        Ok(have)
    }

    /// Writes one piece at its place. It is not durable before [`finish`](Self::finish).
    pub fn write(&self, piece: &VerifiedPiece) -> Result<(), StorageError> {
        if piece.content() != self.manifest.id() {
            return Err(self.failed(io::Error::new(io::ErrorKind::InvalidInput, "a piece of another content")));
        }
        self.part.file().write_all_at(piece.bytes(), piece.offset()).map_err(|e| self.failed(e))?;
        self.unsynced.fetch_add(piece.bytes().len() as u64, Ordering::Relaxed);
        self.lock_have().insert(piece.index().get());
        Ok(())
    }

    /// Whether so much was written that it should be synced now, while more is coming, so that [`finish`](Self::finish)
    /// has little left to wait for. Says so once for each 64 MiB.
    pub fn wants_sync(&self) -> bool {
        let full = |unsynced: u64| (unsynced >= SYNC_BYTES).then_some(0);
        self.unsynced.fetch_update(Ordering::Relaxed, Ordering::Relaxed, full).is_ok()
    }

    /// Makes what was written durable. If that fails, everything counts as missing until [`recover`](Self::recover).
    pub fn sync(&self) -> Result<(), StorageError> {
        self.part.file().sync_data().map_err(|e| self.void(e))
    }

    /// Reads one piece that [`have`](Self::have) names, to serve it while the rest is still missing.
    pub fn read(&self, piece: PieceIndex) -> Result<Bytes, StorageError> {
        if !self.lock_have().contains(piece.get()) {
            return Err(self.failed(io::Error::new(io::ErrorKind::NotFound, "the piece is not here yet")));
        }
        let layout = self.manifest.layout();
        let mut bytes = vec![0; layout.len_of(piece) as usize];
        self.part.file().read_exact_at(&mut bytes, layout.offset(piece)).map_err(|e| self.failed(e))?;
        Ok(bytes.into())
    }

    /// Gives the complete file its name and returns its absolute path. Nothing is ever replaced.
    pub fn finish(&self) -> Result<PathBuf, StorageError> {
        self.publish(PartFile::publish)
    }

    /// Like [`finish`](Self::finish), under another name in the same folder.
    pub fn finish_as(&self, name: &SafeName) -> Result<PathBuf, StorageError> {
        self.publish(|part| part.publish_as(name))
    }

    /// Removes the `.part`.
    pub fn discard(self) -> io::Result<()> {
        self.part.discard()
    }

    fn publish(
        &self,
        publish: impl FnOnce(&PartFile) -> Result<PathBuf, PublishError>,
    ) -> Result<PathBuf, StorageError> {
        let n_missing = self.manifest.layout().n_pieces() - self.lock_have().count();
        if n_missing > 0 {
            return Err(StorageError::Incomplete { n_missing });
        }
        publish(&self.part).map_err(|e| match e {
            PublishError::Exists(path) => StorageError::Exists(path),
            PublishError::Io(e) => self.void(e),
        })
    }

    /// After a failed sync nothing that was written is known to be there.
    fn void(&self, error: io::Error) -> StorageError {
        *self.lock_have() = HaveMap::empty(self.manifest.layout().n_pieces());
        // So that recovery reads the disk, not the kernel's memory of what it failed to write.
        let _ = fadvise(self.part.file(), 0, None, Advice::DontNeed);
        self.failed(error)
    }

    /// Makes the file as long as the content, with its blocks allocated where the file system can do that cheaply.
    fn reserve(&self) -> Result<(), StorageError> {
        let (file, size) = (self.part.file(), self.manifest.layout().size());
        if file.metadata().map_err(|e| self.failed(e))?.len() > size {
            file.set_len(size).map_err(|e| self.failed(e))?;
        }
        let needed = self.needed();
        if let Some(free) = self.free()
            && needed > free
        {
            return Err(StorageError::NoSpace { needed, free, path: self.part.path().to_path_buf() });
        }
        if size == 0 {
            return Ok(());
        }
        match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, size)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(size).map_err(|e| self.failed(e)),
            other => other.map_err(|e| self.failed(e.into())),
        }
    }

    /// Bytes that the disk must still find room for.
    fn needed(&self) -> u64 {
        let allocated = self.part.file().metadata().map_or(0, |m| m.blocks().saturating_mul(512));
        self.manifest.layout().size().saturating_sub(allocated)
    }

    /// Bytes that may still be written to this disk; `None` if the file system does not know.
    fn free(&self) -> Option<u64> {
        let disk = fstatvfs(self.part.file()).ok().filter(|disk| disk.f_blocks > 0)?;
        Some(usable(disk.f_bavail.saturating_mul(disk.f_frsize), disk.f_blocks.saturating_mul(disk.f_frsize)))
    }

    fn failed(&self, error: io::Error) -> StorageError {
        let path = self.part.path();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StorageError::NoSpace {
                needed: self.needed(),
                free: self.free().unwrap_or(0),
                path: path.to_path_buf(),
            },
            _ => with_path(path, error).into(),
        }
    }

    fn lock_have(&self) -> MutexGuard<'_, HaveMap> {
        self.have.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What of `free` bytes may be used on a disk of `total` bytes.
fn usable(free: u64, total: u64) -> u64 {
    free.saturating_sub((total / 100).min(MAX_RESERVE))
}

/// Where the first written byte at or after `offset` may be.
fn data_from(file: &File, offset: u64) -> u64 {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data,
        Err(Errno::NXIO) => u64::MAX,
        Err(_) => offset,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, thread};

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::content::{Layout, MIN_PIECE_LEN, assemble, hash_piece};

    const PIECE: usize = MIN_PIECE_LEN as usize;

    /// Bytes that differ from piece to piece.
    fn content(len: usize) -> Bytes {
        (0..len).map(|i| (i / 7 + i / PIECE).to_le_bytes()[0] | 1).collect()
    }

    fn manifest(bytes: &[u8]) -> Manifest {
        let layout = Layout::new(bytes.len() as u64).unwrap();
        let hash = |piece| hash_piece(layout, piece, slice(bytes, layout, piece)).unwrap();
        assemble(layout, layout.pieces().map(hash).collect()).unwrap()
    }

    fn slice(bytes: &[u8], layout: Layout, piece: PieceIndex) -> &[u8] {
        let begin = usize::try_from(layout.offset(piece)).unwrap();
        &bytes[begin..begin + layout.len_of(piece) as usize]
    }

    struct World {
        temp: TempDir,
        root: Root,
        bytes: Bytes,
        manifest: Manifest,
    }

    impl World {
        fn new(len: usize) -> Self {
            let temp = tempfile::tempdir().unwrap();
            let (root, bytes) = (Root::open(temp.path()).unwrap(), content(len));
            Self { temp, root, manifest: manifest(&bytes), bytes }
        }

        fn open(&self) -> Storage {
            Storage::open(&self.root, &name("a/file.bin"), self.manifest.clone()).unwrap()
        }

        fn piece(&self, i: u32) -> VerifiedPiece {
            let piece = self.manifest.layout().piece(i).unwrap();
            let bytes = Bytes::copy_from_slice(slice(&self.bytes, self.manifest.layout(), piece));
            self.manifest.verify(piece, bytes).unwrap()
        }

        fn write_all(&self, storage: &Storage) {
            for piece in self.manifest.layout().pieces().rev() {
                storage.write(&self.piece(piece.get())).unwrap();
            }
        }

        fn part(&self) -> PathBuf {
            self.temp.path().join("a/file.bin.part")
        }
    }

    fn name(text: &str) -> SafeName {
        SafeName::parse(text).unwrap()
    }

    fn held(map: &HaveMap) -> Vec<u32> {
        map.iter().collect()
    }

    #[test]
    fn a_file_of_any_size_is_stored_and_named() {
        for len in [0, 1, 1023, 1024, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE - 1, 3 * PIECE, 3 * PIECE + 1025] {
            let world = World::new(len);
            let storage = world.open();
            assert_eq!(fs::metadata(world.part()).unwrap().len(), len as u64, "the length is reserved");
            assert!(storage.recover().unwrap().is_empty());
            world.write_all(&storage);
            let path = storage.finish().unwrap();
            assert_eq!(path, world.temp.path().join("a/file.bin"));
            assert!(fs::read(&path).unwrap() == world.bytes, "{len}");
            assert!(!world.part().exists());
        }
    }

    #[test]
    fn j19_recovery_keeps_what_verifies_and_nothing_else() {
        let world = World::new(5 * PIECE + 100);
        let storage = world.open();
        for i in [1, 3, 5] {
            storage.write(&world.piece(i)).unwrap();
        }
        assert_eq!(held(&storage.have()), [1, 3, 5]);
        drop(storage);
        let file = File::options().write(true).open(world.part()).unwrap();
        file.write_all_at(b"?", 3 * PIECE as u64 + 7).unwrap();
        file.write_all_at(b"?", 0).unwrap();
        file.set_len(9 * PIECE as u64).unwrap();

        let storage = world.open();
        assert!(storage.have().is_empty(), "nothing is believed before it is read");
        assert_eq!(held(&storage.recover().unwrap()), [1, 5]);
        assert_eq!(fs::metadata(world.part()).unwrap().len(), world.bytes.len() as u64, "excess is cut");
        world.write_all(&storage);
        assert!(fs::read(storage.finish().unwrap()).unwrap() == world.bytes);
    }

    #[test]
    fn j20_a_part_cut_short_under_our_hands_is_missing_pieces() {
        let world = World::new(3 * PIECE);
        let storage = world.open();
        world.write_all(&storage);
        File::options().write(true).open(world.part()).unwrap().set_len(2 * PIECE as u64 - 1).unwrap();
        assert_eq!(held(&storage.recover().unwrap()), [0]);
        assert!(matches!(storage.finish(), Err(StorageError::Incomplete { n_missing: 2 })));
    }

    #[test]
    fn an_incomplete_file_gets_no_name() {
        let world = World::new(2 * PIECE);
        let storage = world.open();
        storage.write(&world.piece(0)).unwrap();
        assert!(matches!(storage.finish(), Err(StorageError::Incomplete { n_missing: 1 })));
        assert!(world.part().exists() && !world.temp.path().join("a/file.bin").exists());
        storage.discard().unwrap();
        assert!(!world.part().exists());
    }

    #[test]
    fn only_pieces_of_this_content_are_written_and_only_held_ones_read() {
        let (world, other) = (World::new(2 * PIECE), World::new(3 * PIECE));
        let storage = world.open();
        assert!(matches!(storage.write(&other.piece(2)), Err(StorageError::Io(_))));
        storage.write(&world.piece(1)).unwrap();
        let layout = world.manifest.layout();
        assert_eq!(storage.read(layout.piece(1).unwrap()).unwrap(), world.bytes.slice(PIECE..));
        let error = storage.read(layout.piece(0).unwrap()).unwrap_err().to_string();
        assert!(error.contains("a/file.bin.part"), "{error}");
    }

    #[test]
    fn a22_a_taken_name_is_reported_and_another_can_be_used() {
        let world = World::new(10);
        let storage = world.open();
        world.write_all(&storage);
        let taken = world.temp.path().join("a/file.bin");
        fs::write(&taken, "old").unwrap();
        assert!(matches!(storage.finish(), Err(StorageError::Exists(path)) if path == taken));
        let path = storage.finish_as(&name("a/file.bin").numbered(2).unwrap()).unwrap();
        assert_eq!(path, world.temp.path().join("a/file (2).bin"));
        assert_eq!((fs::read(taken).unwrap(), fs::read(path).unwrap()), (b"old".to_vec(), world.bytes.to_vec()));
    }

    #[test]
    fn one_target_has_one_writer() {
        let world = World::new(10);
        let _held = world.open();
        let second = Storage::open(&world.root, &name("a/file.bin"), world.manifest.clone());
        assert!(matches!(second, Err(StorageError::Busy(_))));
    }

    #[test]
    fn j11_a_failed_end_voids_every_claim_until_the_disk_is_read() {
        let world = World::new(2 * PIECE);
        let storage = world.open();
        world.write_all(&storage);
        let away = world.temp.path().join("away");
        fs::rename(world.part(), &away).unwrap();
        assert!(matches!(storage.finish(), Err(StorageError::Io(_))));
        assert!(matches!(storage.finish(), Err(StorageError::Incomplete { n_missing: 2 })));
        fs::rename(&away, world.part()).unwrap();
        assert!(storage.recover().unwrap().is_complete());
        storage.finish().unwrap();
    }

    #[test]
    fn a_sync_is_wanted_once_for_each_64_mib() {
        let world = World::new(2 * PIECE);
        let storage = world.open();
        storage.unsynced.store(SYNC_BYTES - PIECE as u64, Ordering::Relaxed);
        assert!(!storage.wants_sync());
        storage.write(&world.piece(0)).unwrap();
        assert!(storage.wants_sync() && !storage.wants_sync());
        storage.sync().unwrap();
        storage.write(&world.piece(1)).unwrap();
        assert!(!storage.wants_sync() && storage.have().is_complete());
    }

    #[test]
    fn j08_a_full_disk_is_told_from_other_errors() {
        assert_eq!(usable(500, 10_000), 400);
        assert_eq!(usable(1 << 40, 1 << 42), (1 << 40) - MAX_RESERVE);
        assert_eq!(usable(50, 10_000), 0);
        let storage = World::new(10).open();
        assert!(storage.free().is_some_and(|free| free > 0));
        let full = storage.failed(io::ErrorKind::StorageFull.into());
        assert!(full.to_string().contains("file.bin.part: not enough space"), "{full}");
        assert!(matches!(storage.failed(io::ErrorKind::QuotaExceeded.into()), StorageError::NoSpace { .. }));
        assert!(matches!(storage.failed(io::ErrorKind::BrokenPipe.into()), StorageError::Io(_)));
    }

    #[test]
    fn pieces_are_written_from_many_threads() {
        let world = World::new(16 * PIECE);
        let storage = world.open();
        thread::scope(|scope| {
            for part in 0..4 {
                let (world, storage) = (&world, &storage);
                scope.spawn(move || (part * 4..part * 4 + 4).for_each(|i| storage.write(&world.piece(i)).unwrap()));
            }
        });
        assert!(fs::read(storage.finish().unwrap()).unwrap() == world.bytes);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever was written and damaged between runs, recovery finds exactly the good pieces.
        #[test]
        fn recovery_is_exact(
            written in prop::collection::hash_set(0_u32..6, 0..6),
            damaged in prop::collection::hash_set(0_u32..6, 0..4),
            short in 0_usize..PIECE,
        ) {
            let world = World::new(6 * PIECE - short);
            let storage = world.open();
            for &i in &written {
                storage.write(&world.piece(i)).unwrap();
            }
            for &i in &damaged {
                storage.part.file().write_all_at(&[0], u64::from(i) * PIECE as u64).unwrap();
            }
            drop(storage);
            let mut good: Vec<_> = written.difference(&damaged).copied().collect();
            good.sort_unstable();
            let storage = world.open();
            prop_assert_eq!(held(&storage.recover().unwrap()), good);
            prop_assert_eq!(storage.part.existed(), !written.is_empty());
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let root = Root::open(Path::new("/proc")).unwrap();
        let error = Storage::open(&root, &name("file"), manifest(b"x")).unwrap_err().to_string();
        assert!(error.starts_with("/proc/file.part: "), "{error}");
    }
}
