//! One content on its way to the disk: space, positional writes of whole pieces, the journal, and the final name.
//!
//! Invariant: a byte gets here only as a [`VerifiedPiece`], and a file gets its name only when every piece was written by
//! this `Storage`, or read back and verified, or journaled by one that stopped cleanly and untouched since.
//! [`Storage::have`] is the one record of that; what may be there besides is [`Storage::doubtful`].
//!
//! Write order: data, then the journal that names it, each durable before the next; at the end the file's data, its name,
//! the folder's entry, and only then the journal goes. Any prefix of that is a `.part` from which a later run goes on. A
//! journal that says "closed" is made to say otherwise before anything is written. At most 64 MiB or about 5 s of pieces
//! are not journaled. A failed sync voids every claim since the last good one, because the kernel may have dropped what
//! it could not write; such a piece has to be written again.
//!
//! A content of at most one piece has no journal, and no `.part` either, unless the file system can keep no file without a
//! name; then it has one from its piece on, and an earlier one counts for nothing and is overwritten.
//!
//! An open `Storage` holds one descriptor, that of the `.part`; one of a content of one piece none before its piece comes and
//! none after [`Storage::end`]. It keeps its folder open, too: one descriptor for all of a folder that were opened while
//! the root remembered it. While a journal is written there is one more.
//!
//! All methods block on the disk; callers run them on a bounded pool. Reads and writes carry their offset, so a `Storage`
//! may be shared between threads.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
};

use bytes::Bytes;
use rustix::fs::{fstatvfs, statvfs};

mod commit;
mod error;
mod group;
mod journal;
mod ledger;
mod space;

use self::{
    error::is_full,
    journal::{Journal, Subject},
    ledger::Ledger,
};
pub use self::{
    error::{Short, StorageError},
    group::{sync_data, sync_folders},
};
use crate::peer::sharing::hasher::Stamp;
use crate::{
    content::{Manifest, PieceIndex, VerifiedPiece},
    have::HaveMap,
    safe_path::{PartFile, Root, SafeName, with_path},
};

/// The `.part` of one content and its journal. Dropping it is what a kill would be: the `.part` stays for a later run,
/// which has to read it; [`close`](Self::close) spares it that. A `.part` that is new and holds nothing goes, and so does that
/// of a content of one piece.
#[derive(Debug)]
pub struct Storage {
    root: Root,
    name: SafeName,
    manifest: Manifest,
    part: Mutex<Option<Arc<PartFile>>>,
    ledger: Mutex<Ledger>,
    /// Held while a piece is written.
    turn: Mutex<()>,
    /// Something ended that somebody may wait for.
    ended: Condvar,
    /// What the journal on disk was closed with. Held while the journal is written.
    closed: Mutex<Option<Stamp>>,
    /// Whether the journal on disk is closed. False only after it was made so.
    is_closed: AtomicBool,
    #[cfg(test)]
    fails_to_sync: AtomicBool,
}

impl Drop for Storage {
    fn drop(&mut self) {
        let Some(part) = self
            .part
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        else {
            return;
        };
        let ledger = self.lock();
        let is_worthless = self.is_single() || !part.existed() && ledger.have.is_empty();
        if ledger.named.is_none() && is_worthless && !part.is_unnamed() {
            drop(ledger);
            if let Err(error) = part.discard().and_then(|()| part.remove_journal()) {
                tracing::warn!("removing an empty download: {error}");
            }
        }
    }
}

impl Storage {
    /// Opens or creates the `.part` of `name` and reserves the space of the whole content, without writing to it; where there
    /// is not so much, that of all pieces that are not all zeros. Reads no data: what an earlier run left is in
    /// [`have`](Self::have) if that run ended with [`close`](Self::close) and the `.part` was not touched since, else in
    /// [`doubtful`](Self::doubtful).
    ///
    /// Fails with [`StorageError::NoSpace`] before the first byte if the disk cannot take the rest.
    pub fn open(root: &Root, name: &SafeName, manifest: Manifest) -> Result<Self, StorageError> {
        let n_pieces = manifest.layout().n_pieces();
        let nothing = HaveMap::empty(n_pieces);
        let mut storage = Self {
            root: root.clone(),
            name: name.clone(),
            manifest,
            part: Mutex::default(),
            ledger: Mutex::new(Ledger::new(nothing.clone(), nothing.clone())),
            turn: Mutex::default(),
            ended: Condvar::new(),
            closed: Mutex::default(),
            is_closed: AtomicBool::new(false),
            #[cfg(test)]
            fails_to_sync: AtomicBool::new(false),
        };
        if storage.is_single() {
            return Ok(storage);
        }
        let part = storage.part()?;
        let subject = storage.subject(&part);
        let journal = if part.existed() {
            part.read_journal(subject.journal_len())
                .and_then(|bytes| Journal::from_bytes(&bytes, &subject))
        } else {
            // What one of that name says is about a file that is gone.
            part.remove_journal()?;
            None
        };
        let stamp = Stamp::of(part.file()).map_err(|e| storage.failed(e))?;
        let (have, doubtful) = match journal {
            Some(journal) if journal.closed == Some(stamp) => {
                storage.closed = Mutex::new(Some(stamp));
                storage.is_closed = AtomicBool::new(true);
                (journal.good, journal.doubtful)
            }
            Some(mut journal) => {
                journal.good.union_with(&journal.doubtful);
                (nothing, journal.good)
            }
            None if part.existed() => (
                nothing,
                space::pieces_with_data(part.file(), storage.manifest.layout()),
            ),
            None => (nothing.clone(), nothing),
        };
        storage.ledger = Mutex::new(Ledger::new(have, doubtful));
        storage.reserve(&part)?;
        Ok(storage)
    }

    /// The content being stored.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The pieces known to be good.
    pub fn have(&self) -> HaveMap {
        self.lock().have.clone()
    }

    /// Whether this piece is known to be good.
    pub fn has(&self, piece: PieceIndex) -> bool {
        self.lock().have.contains(piece.get())
    }

    /// The pieces that may be there and count for nothing before [`check`](Self::check). None of them is in
    /// [`have`](Self::have).
    pub fn doubtful(&self) -> HaveMap {
        self.lock().doubtful.clone()
    }

    /// The open `.part`, to serve from; `None` for a content of one piece that is not written yet or has its name.
    pub fn file(&self) -> Option<Arc<File>> {
        self.lock_part().as_ref().map(|part| part.file().clone())
    }

    /// Reads a doubtful piece back; if it verifies, it is in [`have`](Self::have) from now on. Says whether it is there. A
    /// piece that cannot be read is not.
    pub fn check(&self, piece: PieceIndex) -> Result<bool, StorageError> {
        let n_failed = {
            let ledger = self.lock();
            if !ledger.doubtful.contains(piece.get()) {
                return Ok(ledger.have.contains(piece.get()));
            }
            ledger.n_failed
        };
        let is_good = self
            .read_back(piece)?
            .is_some_and(|bytes| self.manifest.check(piece, &bytes));
        let mut ledger = self.lock();
        ledger.checked(piece.get(), n_failed, is_good);
        Ok(ledger.have.contains(piece.get()))
    }

    /// Writes one piece at its place, one that is all zeros as a hole; one that is there already is not written again. Now
    /// and then this makes what was written durable, which takes its time.
    ///
    /// After an error [`have`](Self::have) tells whether the piece counts. After [`StorageError::NoSpace`] the same call may
    /// be tried again; [`StorageError::Lost`] names what else must be fetched again.
    pub fn write(&self, piece: &VerifiedPiece) -> Result<(), StorageError> {
        if piece.content() != self.manifest.id() {
            return Err(self.failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a piece of another content",
            )));
        }
        if self.has(piece.index()) {
            return Ok(());
        }
        let (i, len) = (piece.index().get(), piece.bytes().len() as u64);
        let part = self.part()?;
        self.reopen(&part)?;
        let Some(n_failed) = self.admit(&part, i, len)? else {
            return Ok(());
        };
        let written = {
            // The kernel lets one write to a file at a time and has the others spin.
            let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
            space::put(part.file(), piece.bytes(), piece.offset())
        };
        let mut ledger = self.lock();
        let counts = ledger.end_write(i, len, n_failed, written.is_ok());
        let is_full = ledger.is_full();
        self.tell(ledger);
        written.map_err(|e| self.failed(e))?;
        if !counts {
            let error = with_path(&part.path(), io::Error::other("a sync failed meanwhile"));
            return Err(StorageError::Lost {
                pieces: vec![i],
                error,
            });
        }
        if is_full && !self.is_single() {
            self.sync(&part, Ledger::is_full)
        } else {
            Ok(())
        }
    }

    /// Whether the disk has room for one more piece beside the reserve, and its journal: by its own numbers, and then by
    /// trying it, because quotas and some file systems are not in the numbers. To be asked after an error that
    /// [is for want of space](StorageError::is_no_space), once in a while.
    pub fn has_room(&self) -> bool {
        let layout = self.manifest.layout();
        let (needed, folder) = match self.opened() {
            Some(part) => (
                space::needed(part.file(), layout.size()),
                part.folder().clone(),
            ),
            None => (layout.size(), self.root.nearest_folder(&self.name)),
        };
        let journal = 2 * u64::from(layout.n_pieces()) / 8 + 4096;
        let wanted = needed.min(layout.piece_len().into()) + journal;
        let disk = fstatvfs(&folder);
        if space::free(&disk).is_some_and(|free| free < wanted) || !space::has_inodes(&disk) {
            return false;
        }
        // What else is wrong is for those to find who really write.
        !matches!(folder.try_file(wanted), Err(error) if is_full(&error))
    }

    /// Reads one piece that [`have`](Self::have) names, to serve it while the rest is still missing.
    pub fn read(&self, piece: PieceIndex) -> Result<Bytes, StorageError> {
        let not_here = || {
            self.failed(io::Error::new(
                io::ErrorKind::NotFound,
                "the piece is not here yet",
            ))
        };
        if !self.has(piece) {
            return Err(not_here());
        }
        let layout = self.manifest.layout();
        let mut bytes = vec![0; layout.len_of(piece) as usize];
        let part = self.opened().ok_or_else(not_here)?;
        part.file()
            .read_exact_at(&mut bytes, layout.offset(piece))
            .map_err(|e| self.failed(e))?;
        Ok(bytes.into())
    }

    /// Removes the `.part` and its journal.
    pub fn discard(self) -> io::Result<()> {
        match self.opened() {
            Some(part) if !part.is_unnamed() => part.discard().and_then(|()| part.remove_journal()),
            _ => Ok(()),
        }
    }

    fn is_single(&self) -> bool {
        self.manifest.hashes().is_empty()
    }

    fn subject(&self, part: &PartFile) -> Subject {
        // What may have no `.part` has no journal either.
        let part = part.id().unwrap_or_default();
        Subject {
            id: self.manifest.id(),
            layout: self.manifest.layout(),
            part,
        }
    }

    /// The `.part`, made now if it is not open.
    fn part(&self) -> Result<Arc<PartFile>, StorageError> {
        let mut held = self.lock_part();
        if let Some(part) = &*held {
            return Ok(part.clone());
        }
        if self.lock().named.is_some() {
            let path = self.root.path().join(self.name.as_path());
            return Err(
                with_path(&path, io::Error::other("the download has its name already")).into(),
            );
        }
        let created = if self.is_single() {
            Root::create_unnamed
        } else {
            Root::create_part
        };
        Ok(held.insert(self.create(created)?).clone())
    }

    fn create(
        &self,
        create: fn(&Root, &SafeName) -> io::Result<PartFile>,
    ) -> Result<Arc<PartFile>, StorageError> {
        let part = create(&self.root, &self.name).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => StorageError::Busy(self.name.clone()),
            _ if is_full(&e) => StorageError::NoSpace {
                short: space::short(
                    &e,
                    &statvfs(self.root.path()),
                    self.manifest.layout().size(),
                ),
                path: self.root.path().join(self.name.as_path()).into(),
            },
            _ => StorageError::Io(e),
        })?;
        if self.is_single() && part.existed() {
            part.file()
                .set_len(0)
                .map_err(|e| with_path(&part.path(), e))?;
        }
        Ok(Arc::new(part))
    }

    fn opened(&self) -> Option<Arc<PartFile>> {
        self.lock_part().clone()
    }

    /// The whole piece as it lies on the disk; `None` if it cannot be read.
    fn read_back(&self, piece: PieceIndex) -> Result<Option<Vec<u8>>, StorageError> {
        let layout = self.manifest.layout();
        let mut bytes = vec![0; layout.len_of(piece) as usize];
        let read = self
            .part()?
            .file()
            .read_exact_at(&mut bytes, layout.offset(piece));
        if let Err(error) = &read {
            tracing::debug!(piece = piece.get(), %error, "a piece of an earlier run cannot be read");
        }
        Ok(read.is_ok().then_some(bytes))
    }

    fn reserve(&self, part: &PartFile) -> Result<(), StorageError> {
        let (file, layout) = (part.file(), self.manifest.layout());
        let needed = space::needed(file, layout.size());
        let free = space::free(&fstatvfs(file)).unwrap_or(u64::MAX);
        // What is there may have holes, too.
        let mut left_out = {
            let ledger = self.lock();
            let mut there = ledger.have.clone();
            there.union_with(&ledger.doubtful);
            there
        };
        if needed > free {
            let zeros = space::zero_pieces(&self.manifest);
            let n_zeros = zeros.iter().filter_map(|i| layout.piece(i));
            let n_zeros: u64 = n_zeros.map(|piece| u64::from(layout.len_of(piece))).sum();
            let needed = space::needed(file, layout.size() - n_zeros);
            left_out.union_with(&zeros);
            if needed > free {
                let short = Short::Bytes { needed, free };
                let path = part.path().into();
                return Err(StorageError::NoSpace { short, path });
            }
        }
        space::reserve(file, layout, &left_out).map_err(|e| self.failed(e))
    }

    /// Lets a write begin when not too much is at stake; `None` if the piece is there.
    fn admit(&self, part: &PartFile, i: u32, len: u64) -> Result<Option<u64>, StorageError> {
        loop {
            let mut ledger = self.lock();
            if ledger.have.contains(i) {
                return Ok(None);
            }
            if self.is_single() || ledger.has_room(len) {
                return Ok(Some(ledger.begin_write(len)));
            }
            if ledger.is_full() {
                drop(ledger);
                self.sync(part, Ledger::is_full)?;
            } else {
                drop(self.wait(ledger, |ledger| ledger.has_room(len) || ledger.is_full()));
            }
        }
    }

    fn failed(&self, error: io::Error) -> StorageError {
        let part = self.opened();
        let path = part.as_ref().map_or_else(
            || self.root.path().join(self.name.as_path()),
            |part| part.path(),
        );
        if !is_full(&error) {
            return with_path(&path, error).into();
        }
        let size = self.manifest.layout().size();
        let (needed, disk) = match part {
            Some(part) => (space::needed(part.file(), size), fstatvfs(part.file())),
            None => (size, statvfs(self.root.path())),
        };
        StorageError::NoSpace {
            short: space::short(&error, &disk, needed),
            path: path.into(),
        }
    }

    /// Waits until something is so.
    fn wait<'a>(
        &self,
        mut ledger: MutexGuard<'a, Ledger>,
        is_so: impl Fn(&Ledger) -> bool,
    ) -> MutexGuard<'a, Ledger> {
        ledger.n_waiting += 1;
        let mut ledger = self
            .ended
            .wait_while(ledger, |ledger| !is_so(ledger))
            .unwrap_or_else(PoisonError::into_inner);
        ledger.n_waiting -= 1;
        ledger
    }

    /// Lets those look again who wait.
    fn tell(&self, ledger: MutexGuard<'_, Ledger>) {
        let is_awaited = ledger.n_waiting > 0;
        drop(ledger);
        if is_awaited {
            self.ended.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_part(&self) -> MutexGuard<'_, Option<Arc<PartFile>>> {
        self.part.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_closed(&self) -> MutexGuard<'_, Option<Stamp>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
        sync::atomic::Ordering,
        thread,
        time::Duration,
    };

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::content::{Layout, MAX_SINGLE, MIN_PIECE_LEN, assemble, hash_piece};

    const PIECE: usize = MIN_PIECE_LEN as usize;
    const SINGLE: usize = MAX_SINGLE as usize;

    /// Bytes that differ from piece to piece.
    fn content(len: usize) -> Bytes {
        (0..len)
            .map(|i| (i / 7 + i / PIECE).to_le_bytes()[0] | 1)
            .collect()
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
            Self {
                temp,
                root,
                manifest: manifest(&bytes),
                bytes,
            }
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

        fn journal(&self) -> PathBuf {
            self.temp.path().join("a/file.bin.journal.part.part")
        }

        /// What the `.part` and its journal are on the disk now, as a crash would leave them if no write was lost.
        fn snapshot(&self) -> Self {
            let temp = tempfile::tempdir().unwrap();
            fs::create_dir(temp.path().join("a")).unwrap();
            for entry in fs::read_dir(self.temp.path().join("a")).unwrap() {
                let entry = entry.unwrap();
                fs::copy(entry.path(), temp.path().join("a").join(entry.file_name())).unwrap();
            }
            let root = Root::open(temp.path()).unwrap();
            Self {
                temp,
                root,
                bytes: self.bytes.clone(),
                manifest: self.manifest.clone(),
            }
        }
    }

    impl Storage {
        fn finish(&self) -> Result<PathBuf, StorageError> {
            self.finish_as(&self.name, false)
        }

        fn finish_as(&self, name: &SafeName, replace: bool) -> Result<PathBuf, StorageError> {
            sync_data(&[self]).remove(0)?;
            let path = self.name(name, replace)?;
            sync_folders(&[self]).remove(0)?;
            self.end()?;
            Ok(path)
        }

        /// Looks at everything that is doubtful.
        fn recover(&self) -> HaveMap {
            let layout = self.manifest.layout();
            self.doubtful()
                .iter()
                .for_each(|i| _ = self.check(layout.piece(i).unwrap()).unwrap());
            assert!(self.doubtful().is_empty());
            self.have()
        }

        /// What a sync that is due by volume does.
        fn sync_now(&self) -> Result<(), StorageError> {
            self.sync(&self.part().unwrap(), |_| true)
        }

        fn fail_to_sync(&self, fails: bool) {
            self.fails_to_sync.store(fails, Ordering::Relaxed);
        }
    }

    fn name(text: &str) -> SafeName {
        SafeName::parse(text).unwrap()
    }

    /// Until the file system's clock, which may be coarse, says that it is later than the last change of this file.
    fn wait_for_the_clock(file: &File) {
        let changed = Stamp::of(file).unwrap().ctime_ns;
        while Stamp::of(&tempfile::tempfile().unwrap()).unwrap().ctime_ns <= changed {
            thread::yield_now();
        }
    }

    fn held(map: &HaveMap) -> Vec<u32> {
        map.iter().collect()
    }

    #[test]
    fn a_file_of_any_size_is_stored_and_named() {
        for len in [
            0,
            1,
            1023,
            1024,
            SINGLE - 1,
            SINGLE,
            SINGLE + 1,
            6 * PIECE - 1,
            6 * PIECE,
            6 * PIECE + 1025,
        ] {
            let world = World::new(len);
            let storage = world.open();
            if len > SINGLE {
                assert_eq!(
                    fs::metadata(world.part()).unwrap().len(),
                    len as u64,
                    "the length is reserved"
                );
            } else {
                assert!(!world.part().exists(), "nothing to keep");
            }
            assert!(storage.have().is_empty() && storage.doubtful().is_empty());
            world.write_all(&storage);
            let path = storage.finish().unwrap();
            assert_eq!(path, world.temp.path().join("a/file.bin"));
            assert!(fs::read(&path).unwrap() == world.bytes, "{len}");
            assert_eq!(
                fs::read_dir(world.temp.path().join("a")).unwrap().count(),
                1,
                "no .part, no journal"
            );
            assert!(storage.finish().is_err() && !world.part().exists(), "once");
        }
    }

    #[test]
    fn what_is_edited_between_its_name_and_the_end_is_not_taken_for_the_original() {
        for len in [99, 6 * PIECE] {
            for sets_the_time_back in [false, true] {
                let world = World::new(len);
                let storage = world.open();
                world.write_all(&storage);
                sync_data(&[&storage]).remove(0).unwrap();
                let path = storage.name(&name("a/file.bin"), false).unwrap();
                let edited = File::options().write(true).open(&path).unwrap();
                wait_for_the_clock(&edited);
                let written = edited.metadata().unwrap().modified().unwrap();
                edited.write_all_at(b"?", 5).unwrap();
                if sets_the_time_back {
                    edited.set_modified(written).unwrap();
                }
                sync_folders(&[&storage]).remove(0).unwrap();
                let stamp = storage.end().unwrap();
                assert_ne!(stamp, Stamp::of(&edited).unwrap(), "{sets_the_time_back}");
            }
            let world = World::new(len);
            let storage = world.open();
            world.write_all(&storage);
            sync_data(&[&storage]).remove(0).unwrap();
            let path = storage.name(&name("a/file.bin"), false).unwrap();
            let stamp = storage.end().unwrap();
            assert_eq!(stamp, Stamp::of(&File::open(path).unwrap()).unwrap());
        }
    }

    #[test]
    fn pieces_of_zeros_are_left_as_holes() {
        let mut world = World::new(20 * PIECE);
        let mut bytes = world.bytes.to_vec();
        bytes[PIECE..19 * PIECE].fill(0);
        world.manifest = manifest(&bytes);
        world.bytes = bytes.into();
        let zeros = space::zero_pieces(&world.manifest);
        assert_eq!(held(&zeros), (1..19).collect::<Vec<_>>());
        let storage = world.open();
        // What an earlier version left there.
        storage
            .file()
            .unwrap()
            .write_all_at(&[7; PIECE], 3 * PIECE as u64)
            .unwrap();
        for i in 0..10 {
            storage.write(&world.piece(i)).unwrap();
        }
        storage.close().unwrap();
        drop(storage);
        let storage = world.open();
        assert_eq!(storage.have().count(), 10);
        world.write_all(&storage);
        let path = storage.finish().unwrap();
        assert!(fs::read(&path).unwrap() == world.bytes);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap());
        assert!(blocks * 512 < 3 * PIECE as u64, "{blocks} blocks");
    }

    #[test]
    fn after_a_clean_stop_nothing_is_read_again() {
        let world = World::new(5 * PIECE + 100);
        let storage = world.open();
        [1, 3, 5]
            .iter()
            .for_each(|i| storage.write(&world.piece(*i)).unwrap());
        storage.close().unwrap();
        drop(storage);
        for _ in 0..2 {
            let storage = world.open();
            assert_eq!(
                (held(&storage.have()), held(&storage.doubtful())),
                (vec![1, 3, 5], vec![])
            );
            storage.close().unwrap();
        }
        let storage = world.open();
        storage.write(&world.piece(0)).unwrap();
        drop(storage);
        let storage = world.open();
        assert!(storage.have().is_empty(), "written to and not closed");
        assert_eq!(
            held(&storage.doubtful()),
            [1, 3, 5],
            "0 was never journaled"
        );
        assert_eq!(held(&storage.recover()), [1, 3, 5]);
        storage.close().unwrap();
        drop(storage);
        let storage = world.open();
        assert_eq!(held(&storage.have()), [1, 3, 5]);
        world.write_all(&storage);
        assert!(fs::read(storage.finish().unwrap()).unwrap() == world.bytes);
        assert!(!world.journal().exists());
    }

    #[test]
    fn what_was_not_looked_at_before_a_clean_stop_stays_doubtful() {
        let world = World::new(5 * PIECE);
        let storage = world.open();
        [0, 1]
            .iter()
            .for_each(|i| storage.write(&world.piece(*i)).unwrap());
        drop(storage);
        let storage = world.open();
        assert_eq!(
            held(&storage.doubtful()),
            [0, 1],
            "there is no journal, and data"
        );
        let layout = world.manifest.layout();
        assert!(storage.check(layout.piece(1).unwrap()).unwrap());
        assert!(!storage.check(layout.piece(2).unwrap()).unwrap());
        storage.close().unwrap();
        drop(storage);
        let storage = world.open();
        assert_eq!(
            (held(&storage.have()), held(&storage.doubtful())),
            (vec![1], vec![0])
        );
    }

    #[test]
    fn j19_an_edited_part_costs_the_edited_pieces() {
        let world = World::new(5 * PIECE + 100);
        let storage = world.open();
        [1, 3, 5]
            .iter()
            .for_each(|i| storage.write(&world.piece(*i)).unwrap());
        storage.close().unwrap();
        drop(storage);
        let file = File::options().write(true).open(world.part()).unwrap();
        let before = Stamp::of(&file).unwrap();
        while Stamp::of(&file).unwrap() == before {
            file.write_all_at(b"?", 3 * PIECE as u64 + 7).unwrap();
        }
        file.set_len(9 * PIECE as u64).unwrap();
        let storage = world.open();
        assert!(
            storage.have().is_empty(),
            "nothing is believed before it is read"
        );
        assert_eq!(held(&storage.doubtful()), [1, 3, 5]);
        assert_eq!(held(&storage.recover()), [1, 5]);
        assert_eq!(
            fs::metadata(world.part()).unwrap().len(),
            world.bytes.len() as u64,
            "excess is cut"
        );
        world.write_all(&storage);
        assert!(fs::read(storage.finish().unwrap()).unwrap() == world.bytes);
    }

    #[test]
    fn j20_a_part_cut_short_is_missing_pieces() {
        let world = World::new(5 * PIECE);
        let storage = world.open();
        world.write_all(&storage);
        storage.sync_now().unwrap();
        drop(storage);
        File::options()
            .write(true)
            .open(world.part())
            .unwrap()
            .set_len(2 * PIECE as u64 - 1)
            .unwrap();
        let storage = world.open();
        assert_eq!(held(&storage.recover()), [0]);
        assert!(matches!(
            storage.finish(),
            Err(StorageError::Incomplete { n_missing: 4 })
        ));
    }

    #[test]
    fn a_journal_that_lies_makes_nobody_believe_it() {
        let world = World::new(5 * PIECE);
        let storage = world.open();
        storage.write(&world.piece(1)).unwrap();
        let part = storage.part().unwrap();
        let good = HaveMap::full(5);
        let stamp = Stamp {
            ctime_ns: 1,
            ..Stamp::of(part.file()).unwrap()
        };
        storage
            .write_journal(
                &part,
                &Journal {
                    good,
                    doubtful: HaveMap::empty(5),
                    closed: Some(stamp),
                },
            )
            .unwrap();
        drop((storage, part));
        let storage = world.open();
        assert!(storage.have().is_empty());
        assert_eq!(held(&storage.recover()), [1]);
        drop(storage);
        for junk in [&b""[..], b"spratj", &[0xff; 4096]] {
            fs::write(world.journal(), junk).unwrap();
            let storage = world.open();
            assert!(
                storage.have().is_empty() && storage.doubtful().contains(1),
                "where there is data"
            );
            assert_eq!(held(&storage.recover()), [1]);
        }
        let other = World::new(6 * PIECE);
        fs::copy(world.part(), other.temp.path().join("file.bin.part")).unwrap();
        let storage =
            Storage::open(&other.root, &name("file.bin"), other.manifest.clone()).unwrap();
        assert!(
            storage.have().is_empty() && storage.recover().count() <= 1,
            "journal and bytes of another content"
        );
    }

    #[test]
    fn a_journal_without_its_part_is_cleaned_away() {
        let world = World::new(5 * PIECE);
        let storage = world.open();
        world.write_all(&storage);
        storage.close().unwrap();
        drop(storage);
        fs::remove_file(world.part()).unwrap();
        let storage = world.open();
        assert!(
            storage.have().is_empty() && storage.doubtful().is_empty() && !world.journal().exists()
        );
        drop(storage);
        assert_eq!(
            fs::read_dir(world.temp.path().join("a")).unwrap().count(),
            0,
            "new and empty: gone"
        );
    }

    #[test]
    fn j11_a_failed_sync_costs_what_came_since_the_last_good_one() {
        let world = World::new(6 * PIECE);
        let storage = world.open();
        storage.write(&world.piece(0)).unwrap();
        storage.sync_now().unwrap();
        [1, 2]
            .iter()
            .for_each(|i| storage.write(&world.piece(*i)).unwrap());
        storage.fail_to_sync(true);
        let Err(StorageError::Lost { pieces, error }) = storage.sync_now() else {
            panic!("the sync failed")
        };
        assert_eq!(pieces, [1, 2]);
        assert!(error.to_string().contains("a/file.bin.part"), "{error}");
        assert_eq!(held(&storage.have()), [0]);
        storage.fail_to_sync(false);
        assert!(matches!(
            storage.finish(),
            Err(StorageError::Incomplete { n_missing: 5 })
        ));
        world.write_all(&storage);
        storage.fail_to_sync(true);
        assert!(
            matches!(storage.finish(), Err(StorageError::Lost { pieces, .. }) if pieces.len() == 5)
        );
        assert!(!world.temp.path().join("a/file.bin").exists());
        storage.fail_to_sync(false);
        world.write_all(&storage);
        assert!(fs::read(storage.finish().unwrap()).unwrap() == world.bytes);
    }

    #[test]
    fn the_end_of_a_part_that_was_moved_away_is_an_error() {
        let world = World::new(5 * PIECE);
        let storage = world.open();
        world.write_all(&storage);
        let away = world.temp.path().join("away");
        fs::rename(world.part(), &away).unwrap();
        assert!(matches!(storage.finish(), Err(StorageError::Io(_))));
        fs::rename(&away, world.part()).unwrap();
        storage.finish().unwrap();
    }

    #[test]
    fn what_lies_for_seconds_is_journaled() {
        let world = World::new(5 * PIECE);
        let storage = world.open();
        storage.write(&world.piece(2)).unwrap();
        storage.tick().unwrap();
        assert!(!world.journal().exists(), "too early");
        thread::sleep(ledger::MAX_AGE + Duration::from_millis(50));
        storage.tick().unwrap();
        assert!(world.journal().exists());
        drop(storage);
        let storage = world.open();
        assert_eq!(
            (held(&storage.have()), held(&storage.doubtful())),
            (vec![], vec![2])
        );
    }

    #[test]
    fn a_long_download_is_journaled_as_it_goes() {
        let world = World::new(100 * PIECE);
        let storage = world.open();
        (0..99).for_each(|i| storage.write(&world.piece(i)).unwrap());
        assert!(!world.journal().exists());
        let world = World::new(75 << 20);
        let storage = world.open();
        thread::scope(|scope| {
            for part in 0..4 {
                let (world, storage) = (&world, &storage);
                scope.spawn(move || {
                    (0..599)
                        .filter(|i| i % 4 == part)
                        .for_each(|i| storage.write(&world.piece(i)).unwrap())
                });
            }
        });
        drop(storage);
        let storage = world.open();
        let n = storage.doubtful().count();
        assert!(
            (599 - 512..=599).contains(&n) && storage.have().is_empty(),
            "{n} of 599, 64 MiB are 512 pieces"
        );
        assert_eq!(storage.recover().count(), n);
    }

    #[test]
    fn an_incomplete_file_gets_no_name() {
        let world = World::new(5 * PIECE);
        let storage = world.open();
        storage.write(&world.piece(0)).unwrap();
        assert!(matches!(
            storage.finish(),
            Err(StorageError::Incomplete { n_missing: 4 })
        ));
        assert!(world.part().exists() && !world.temp.path().join("a/file.bin").exists());
        storage.discard().unwrap();
        assert!(!world.part().exists());
    }

    #[test]
    fn only_pieces_of_this_content_are_written_and_only_held_ones_read() {
        let (world, other) = (World::new(5 * PIECE), World::new(6 * PIECE));
        let storage = world.open();
        assert!(matches!(
            storage.write(&other.piece(5)),
            Err(StorageError::Io(_))
        ));
        storage.write(&world.piece(1)).unwrap();
        let layout = world.manifest.layout();
        assert_eq!(
            storage.read(layout.piece(1).unwrap()).unwrap(),
            world.bytes.slice(PIECE..2 * PIECE)
        );
        let error = storage
            .read(layout.piece(0).unwrap())
            .unwrap_err()
            .to_string();
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
        let path = storage
            .finish_as(&name("a/file.bin").numbered(2).unwrap(), false)
            .unwrap();
        assert_eq!(path, world.temp.path().join("a/file (2).bin"));
        assert_eq!(
            (fs::read(&taken).unwrap(), fs::read(path).unwrap()),
            (b"old".to_vec(), world.bytes.to_vec())
        );
        let storage = world.open();
        world.write_all(&storage);
        storage.finish_as(&name("a/file.bin"), true).unwrap();
        assert_eq!(
            fs::read(&taken).unwrap(),
            world.bytes,
            "replaced when asked"
        );
    }

    #[test]
    fn one_target_has_one_writer() {
        let small = World::new(10);
        let first = small.open();
        let second = small.open();
        first.write(&small.piece(0)).unwrap();
        second.write(&small.piece(0)).unwrap();
        first.finish().unwrap();
        assert!(
            matches!(second.finish(), Err(StorageError::Exists(_))),
            "each has a file of its own"
        );
        let world = World::new(5 * PIECE);
        let _held = world.open();
        let second = Storage::open(&world.root, &name("a/file.bin"), world.manifest.clone());
        assert!(matches!(second, Err(StorageError::Busy(_))));
    }

    #[test]
    fn j08_a_full_disk_is_told_from_other_errors() {
        let storage = World::new(10).open();
        let full = storage.failed(io::ErrorKind::StorageFull.into());
        assert!(
            full.to_string().contains("file.bin: not enough space") && full.is_no_space(),
            "{full}"
        );
        assert!(matches!(
            storage.failed(io::ErrorKind::QuotaExceeded.into()),
            StorageError::NoSpace {
                short: Short::Quota,
                ..
            }
        ));
        assert!(matches!(
            storage.failed(io::ErrorKind::BrokenPipe.into()),
            StorageError::Io(_)
        ));
        assert!(storage.has_room());
    }

    #[test]
    fn a_small_content_takes_away_what_a_larger_one_left() {
        let (world, larger) = (World::new(10), World::new(5 * PIECE));
        let larger = Storage::open(&world.root, &name("a/file.bin"), larger.manifest).unwrap();
        larger.write(&World::new(5 * PIECE).piece(1)).unwrap();
        larger.sync_now().unwrap();
        assert!(world.part().exists() && world.journal().exists());
        let storage = world.open();
        world.write_all(&storage);
        drop(storage);
        assert!(
            world.part().exists() && world.journal().exists(),
            "it is not whole"
        );
        let fetch = || {
            // As another life finds the folder.
            let root = Root::open(world.temp.path()).unwrap();
            let storage =
                Storage::open(&root, &name("a/file.bin"), world.manifest.clone()).unwrap();
            world.write_all(&storage);
            storage.finish()
        };
        assert!(
            matches!(fetch(), Err(StorageError::Busy(_))),
            "somebody is writing it"
        );
        assert!(world.part().exists() && world.journal().exists());
        drop(larger);
        fetch().unwrap();
        assert_eq!(
            fs::read_dir(world.temp.path().join("a")).unwrap().count(),
            1
        );
    }

    #[test]
    fn a_small_file_whose_folder_was_removed_meanwhile_gets_its_name() {
        for replace in [false, true] {
            let world = World::new(10);
            let storage = world.open();
            world.write_all(&storage);
            fs::remove_dir(world.temp.path().join("a")).unwrap();
            let path = storage.finish_as(&name("a/file.bin"), replace).unwrap();
            assert_eq!(fs::read(path).unwrap(), world.bytes);
            assert_eq!(
                fs::read_dir(world.temp.path().join("a")).unwrap().count(),
                1
            );
        }
    }

    #[test]
    fn a_link_in_the_place_of_a_part_is_left_alone() {
        let world = World::new(10);
        fs::create_dir(world.temp.path().join("a")).unwrap();
        let target = world.temp.path().join("precious");
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, world.part()).unwrap();
        let storage = world.open();
        world.write_all(&storage);
        storage.finish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"old");
        assert!(world.part().is_symlink());
        let larger = Storage::open(
            &world.root,
            &name("a/file.bin"),
            manifest(&content(5 * PIECE)),
        );
        assert!(matches!(larger, Err(StorageError::Io(_))));
    }

    #[test]
    fn many_files_are_committed_together() {
        let worlds: Vec<_> = (0..12)
            .map(|i| World::new(if i == 5 { 5 * PIECE } else { 10 + i }))
            .collect();
        let root = &worlds[0].root;
        let open = |(i, world): (usize, &World)| {
            let storage = Storage::open(
                root,
                &name(&format!("d{}/f{i}", i % 3)),
                world.manifest.clone(),
            )
            .unwrap();
            if i != 7 {
                world.write_all(&storage);
            }
            storage
        };
        let storages: Vec<_> = worlds.iter().enumerate().map(open).collect();
        storages[9].fail_to_sync(true);
        let all: Vec<_> = storages.iter().collect();
        let synced = sync_data(&all);
        assert!(matches!(
            synced[7],
            Err(StorageError::Incomplete { n_missing: 1 })
        ));
        assert!(
            matches!(synced[9], Err(StorageError::Lost { .. })) && storages[9].have().is_empty()
        );
        assert_eq!(synced.iter().filter(|outcome| outcome.is_ok()).count(), 10);
        let good: Vec<_> = all
            .iter()
            .zip(synced)
            .filter_map(|(storage, synced)| synced.ok().map(|()| *storage))
            .collect();
        good.iter()
            .for_each(|storage| _ = storage.name(&storage.name, false).unwrap());
        assert!(sync_folders(&good).iter().all(Result::is_ok));
        good.iter().for_each(|storage| _ = storage.end().unwrap());
        drop(storages);
        for (i, world) in worlds
            .iter()
            .enumerate()
            .filter(|(i, _)| ![7, 9].contains(i))
        {
            assert_eq!(
                fs::read(root.path().join(format!("d{}/f{i}", i % 3))).unwrap(),
                world.bytes
            );
        }
        assert_eq!(
            fs::read_dir(root.path().join("d0")).unwrap().count(),
            3,
            "no .part"
        );
    }

    #[test]
    fn pieces_are_written_from_many_threads() {
        let world = World::new(16 * PIECE);
        let storage = world.open();
        thread::scope(|scope| {
            for part in 0..4 {
                let (world, storage) = (&world, &storage);
                scope.spawn(move || {
                    (part * 4..part * 4 + 4).for_each(|i| storage.write(&world.piece(i)).unwrap())
                });
            }
        });
        assert!(fs::read(storage.finish().unwrap()).unwrap() == world.bytes);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever happens in whatever order, a crash at any point leaves a state from which only good pieces are believed, and
        /// all that was journaled are found again.
        #[test]
        fn j01_a_crash_at_any_point(steps in prop::collection::vec((0_u8..6, 0_u32..6), 1..14), short in 0..PIECE) {
            let world = World::new(6 * PIECE - short);
            let mut storage = world.open();
            let mut journaled = HaveMap::empty(6);
            for (what, i) in steps {
                let piece = world.manifest.layout().piece(i).unwrap();
                match what {
                    0 | 1 => storage.write(&world.piece(i)).unwrap(),
                    2 => _ = storage.check(piece).unwrap(),
                    3 => {
                        storage.sync_now().unwrap();
                        journaled.union_with(&storage.have());
                    }
                    4 => {
                        storage.close().unwrap();
                        journaled.union_with(&storage.have());
                    }
                    _ => {
                        drop(storage);
                        storage = world.open();
                        let mut known = storage.have();
                        known.union_with(&storage.doubtful());
                        prop_assert!(journaled.iter().all(|i| known.contains(i)), "{:?} {:?}", journaled, known);
                    }
                }
                for i in storage.have().iter() {
                    prop_assert!(storage.read_back(world.manifest.layout().piece(i).unwrap()).unwrap().is_some_and(
                        |bytes| bytes == *world.piece(i).bytes()));
                }
                let crashed = world.snapshot();
                let after = crashed.open();
                prop_assert!(after.have().is_empty(), "another inode: nothing is believed");
                let found = after.recover();
                prop_assert!(journaled.iter().all(|i| found.contains(i)), "{:?} {:?}", journaled, found);
            }
        }

        /// Whatever was written and damaged between runs, looking finds exactly the good pieces.
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
                storage.file().unwrap().write_all_at(&[0], u64::from(i) * PIECE as u64).unwrap();
            }
            drop(storage);
            let mut good: Vec<_> = written.difference(&damaged).copied().collect();
            good.sort_unstable();
            let storage = world.open();
            prop_assert_eq!(held(&storage.recover()), good);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let root = Root::open(Path::new("/proc")).unwrap();
        let error = Storage::open(&root, &name("file"), World::new(5 * PIECE).manifest)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("/proc/file.part: "), "{error}");
    }
}
