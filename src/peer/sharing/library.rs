//! Everything this peer can serve: complete files where they lie, and what is there of downloads in progress.
//!
//! Invariants:
//! - A name stands for one path. Of two files with one name the first is on offer, until it is withdrawn.
//! - Bytes of a file are handed out only if, after they were read, the open file still had the [`Stamp`] of the version
//!   that was hashed. A file that fails this is withdrawn at once and left for the watcher in [`Library::take_suspects`].
//! - Of a download only the pieces in its [`HaveMap`] are handed out.
//! - The version rises by one with every change of the listing and never falls.
//! - The lock is private and held neither across I/O nor an await.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::hasher::Stamp;
use crate::{
    catalog::{FileInfo, FileKey},
    content::{ContentId, Manifest, PieceIndex},
    have::HaveMap,
    safe_path::{SafeName, open_beneath_folder},
};

mod reader;
mod state;

use reader::ReadFrom;
pub use reader::Reader;
use state::{ContentPlace, LibraryState};

/// Copies of one content that are tried before a request fails.
const MAX_TRIES: usize = 16;

/// Where a complete file lies, and which version of it was hashed.
#[derive(Clone, Debug)]
pub struct Location {
    /// The share or downloads folder. Not kept open: a disk that nobody reads from can be unmounted.
    pub root: Arc<Path>,
    /// Path beneath the root.
    pub relative: PathBuf,
    /// The version that the manifest describes.
    pub stamp: Stamp,
    /// What the file is offered as.
    pub name: SafeName,
}

impl Location {
    /// The file's absolute path.
    pub fn path(&self) -> PathBuf {
        self.root.join(&self.relative)
    }
}

/// What became of a file that was offered to the library.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Published {
    /// It is listed now, or listed with its new content.
    New,
    /// It was listed with this content already.
    Same,
    /// The name belongs to the file at this path: nothing changed.
    Clash(PathBuf),
}

/// Which pieces of a content are here.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Have {
    /// All of them.
    Complete,
    /// Those of a download in progress.
    Partial(HaveMap),
}

/// How the listing came to be what it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Changes {
    /// The version that the listing has after these changes.
    pub version: u64,
    /// What to do to get there.
    pub update: Update,
}

/// The changes themselves. A row that changed and changed back does not appear.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Update {
    /// First drop `removed`, then put `added`, which may replace a row of the same key. In no particular order.
    Delta {
        /// Rows that are new or became complete.
        added: Vec<FileInfo>,
        /// Rows that are gone.
        removed: Vec<FileKey>,
    },
    /// Everything, by name. The asked version is unknown or too long ago.
    Full(Vec<FileInfo>),
}

/// Why bytes are not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The content, or this piece of it, is not here (any more).
    #[error("not held here")]
    NotFound,
    /// The file changed since it was hashed, and there is no other copy.
    #[error("content changed")]
    Changed,
    /// The range is not within the content.
    #[error("the range lies outside the content")]
    OutOfRange,
    /// Another receiver gets the first copy.
    #[error("promised to another receiver first")]
    Promised,
    /// The disk failed, or the file may not be read. The file stays listed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What this peer can serve. Cheap to clone; all clones are one library.
#[derive(Clone)]
pub struct Library(Arc<Shared>);

struct Shared {
    state: Mutex<LibraryState>,
    /// The listing's version.
    changed: watch::Sender<u64>,
    /// Rises whenever a piece of a download, or a whole content, comes or goes.
    haves: watch::Sender<u64>,
}

impl Default for Library {
    fn default() -> Self {
        Self::new()
    }
}

impl Library {
    /// An empty library, of version 1.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(LibraryState::new()),
            changed: watch::Sender::new(1),
            haves: watch::Sender::new(0),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, LibraryState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `change` and tells the watchers if the version rose.
    fn change<T>(&self, change: impl FnOnce(&mut LibraryState) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        let changed = self
            .0
            .changed
            .send_if_modified(|version| std::mem::replace(version, state.version) != state.version);
        drop(state);
        if changed {
            self.0.haves.send_modify(|n| *n += 1);
        }
        result
    }

    /// Offers a complete file. A file at the same path and name with another content or stamp is replaced; a download of
    /// the same name gives way.
    pub fn publish(&self, location: Location, manifest: Manifest) -> Published {
        self.change(|state| state.publish(Arc::new(location), manifest))
    }

    /// As [`publish`](Self::publish), many at once.
    pub fn publish_all(&self, files: impl IntoIterator<Item = (Location, Manifest)>) {
        self.change(|state| {
            for (location, manifest) in files {
                state.publish(Arc::new(location), manifest);
            }
        });
    }

    /// Stops offering the file at this absolute path, or all files beneath it. Returns how many names went.
    pub fn withdraw(&self, path: &Path) -> usize {
        self.change(|state| {
            let names: Vec<_> = state
                .under(path)
                .flat_map(|(_, names)| names.iter().cloned())
                .collect();
            names.iter().for_each(|name| state.unlist(name));
            names.len()
        })
    }

    /// Stops offering the complete file of this name; false if there is none.
    pub fn withdraw_name(&self, name: &SafeName) -> bool {
        self.change(|state| {
            let found = state
                .names
                .get(name)
                .is_some_and(|listed| listed.location.is_some());
            if found {
                state.unlist(name);
            }
            found
        })
    }

    /// Offers what a download in progress holds, read from `file`, until the guard is dropped. It is listed as partial
    /// if its name is free. A content is served from one download at a time: of a second one nothing is offered.
    pub fn start_partial(
        &self,
        manifest: Manifest,
        name: SafeName,
        file: Arc<File>,
        have: HaveMap,
    ) -> Partial {
        let id = manifest.id();
        let token = self.change(|state| state.start_part(manifest, &name, Arc::clone(&file), have));
        Partial {
            library: self.clone(),
            id,
            name,
            token,
            _file: file,
        }
    }

    /// The manifest of a content that is here, complete or in part.
    pub fn manifest(&self, id: &ContentId) -> Option<Manifest> {
        self.lock()
            .contents
            .get(id)
            .map(|entry| entry.manifest.clone())
    }

    /// The manifests of the complete contents of more than one piece, in no particular order.
    pub fn long_contents(&self) -> Vec<Manifest> {
        let state = self.lock();
        let long = state
            .contents
            .values()
            .filter(|entry| !entry.files.is_empty() && !entry.manifest.hashes().is_empty());
        long.map(|entry| entry.manifest.clone()).collect()
    }

    /// Which pieces of a content are here; `None` if it is unknown.
    pub fn have(&self, id: &ContentId) -> Option<Have> {
        let state = self.lock();
        let entry = state.contents.get(id)?;
        match &entry.part {
            Some(part) if entry.files.is_empty() => Some(Have::Partial(part.have.clone())),
            _ => Some(Have::Complete),
        }
    }

    /// The absolute paths of the complete files with this content, sorted. What lies there must be verified.
    pub fn find(&self, id: &ContentId) -> Vec<PathBuf> {
        let state = self.lock();
        let files = state
            .contents
            .get(id)
            .into_iter()
            .flat_map(|entry| entry.files.values());
        let mut paths: Vec<_> = files.map(|location| location.path()).collect();
        paths.sort_unstable();
        paths
    }

    /// The complete files at or beneath a path, each with the version that is offered.
    pub fn known_under(&self, path: &Path) -> Vec<(PathBuf, Stamp)> {
        let state = self.lock();
        let files = state
            .under(path)
            .filter_map(|(path, names)| Some((path, state.location(names.first()?)?)));
        files
            .map(|(path, location)| (path.to_owned(), location.stamp))
            .collect()
    }

    /// Where all complete files lie, in no particular order.
    pub fn locations(&self) -> Vec<Arc<Location>> {
        let state = self.lock();
        let files = state.contents.values();
        files
            .flat_map(|entry| entry.files.values().cloned())
            .collect()
    }

    /// Is some download in progress on offer?
    pub fn has_partial(&self) -> bool {
        self.lock().n_parts > 0
    }

    /// The listing, by name.
    pub fn files(&self) -> Vec<FileInfo> {
        self.lock().files()
    }

    /// How many complete files are listed, and their bytes.
    pub fn totals(&self) -> (u64, u64) {
        let state = self.lock();
        (state.n_files, state.n_bytes)
    }

    /// The listing's version: changes when the listing does, not with the pieces of a download.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// Changes whenever [`Library::have`] may answer anew for some content.
    pub fn haves(&self) -> watch::Receiver<u64> {
        self.0.haves.subscribe()
    }

    /// What happened to the listing since `version`, all changes of a row merged into one.
    pub fn changes_since(&self, version: u64) -> Changes {
        self.lock().changes_since(version)
    }

    /// The paths of files that were withdrawn because serving found them changed; each is told once. They may be good
    /// files with a new stamp.
    pub fn take_suspects(&self) -> BTreeSet<PathBuf> {
        std::mem::take(&mut self.lock().suspects)
    }

    /// Opens a content for reading; the first copy that is still the file that was hashed, else the download in
    /// progress. Blocks.
    pub fn open(&self, id: &ContentId) -> Result<Reader, ServeError> {
        let mut failure = ServeError::NotFound;
        let mut tried = Vec::new();
        loop {
            let found = self.lock().held(id, &tried);
            let (manifest, source) = match found {
                Some((manifest, ContentPlace::File(location))) => match self.open_file(&location) {
                    Ok(file) => (manifest, ReadFrom::File { file, location }),
                    Err(error) if tried.len() + 1 == MAX_TRIES => return Err(error),
                    Err(error) => {
                        failure = error;
                        tried.push(location.name.clone());
                        continue;
                    }
                },
                Some((manifest, ContentPlace::Part { file, token })) => {
                    (manifest, ReadFrom::Part { file, token })
                }
                None => return Err(failure),
            };
            return Ok(Reader {
                library: self.clone(),
                manifest,
                source,
            });
        }
    }

    /// The download in progress of a content of which there is no file; does not block.
    pub fn open_part(&self, id: &ContentId) -> Option<Reader> {
        let (manifest, ContentPlace::Part { file, token }) = self.lock().held(id, &[])? else {
            return None;
        };
        Some(Reader {
            library: self.clone(),
            manifest,
            source: ReadFrom::Part { file, token },
        })
    }

    fn open_file(&self, location: &Arc<Location>) -> Result<File, ServeError> {
        let error = match open_beneath_folder(&location.root, &location.relative) {
            Ok((file, metadata)) if Stamp::from(&metadata) == location.stamp => return Ok(file),
            Ok(_) => ServeError::Changed,
            Err(error) => match fs::symlink_metadata(location.path()) {
                // The file is as it was: too many open files, no permission, a failing disk.
                Ok(metadata) if Stamp::from(&metadata) == location.stamp => {
                    return Err(error.into());
                }
                Ok(_) => ServeError::Changed,
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) =>
                {
                    ServeError::NotFound
                }
                Err(_) => return Err(error.into()),
            },
        };
        self.suspect(location);
        Err(error)
    }

    /// Reads a piece of a content as [`open`](Self::open) would have it served. If its bytes are wrong, although the file seems
    /// to be the version that was hashed: where that file lies, under all the names it has for this content. Blocks.
    pub fn disproved(
        &self,
        id: &ContentId,
        piece: PieceIndex,
    ) -> Result<Vec<Arc<Location>>, ServeError> {
        let mut reader = self.open(id)?;
        let (manifest, layout) = (reader.manifest().clone(), reader.manifest().layout());
        let bytes = reader.read(layout.offset(piece), layout.len_of(piece))?;
        let ReadFrom::File { location, .. } = &reader.source else {
            return Ok(vec![]);
        };
        if manifest.check(piece, &bytes) {
            return Ok(vec![]);
        }
        let inode = |location: &Location| (location.stamp.dev, location.stamp.ino);
        let state = self.lock();
        let files = state
            .contents
            .get(id)
            .into_iter()
            .flat_map(|entry| entry.files.values());
        Ok(files
            .filter(|other| inode(other) == inode(location))
            .cloned()
            .collect())
    }

    /// Withdraws a file that is no longer what was hashed, unless it was published anew meanwhile; it is one of
    /// [`take_suspects`](Self::take_suspects) then.
    pub fn suspect(&self, location: &Arc<Location>) {
        self.change(|state| {
            if state
                .location(&location.name)
                .is_some_and(|current| Arc::ptr_eq(current, location))
            {
                state.unlist(&location.name);
                state.suspects.insert(location.path());
            }
        });
    }
}

/// The offer of a download in progress; ends when dropped.
pub struct Partial {
    library: Library,
    id: ContentId,
    name: SafeName,
    token: u64,
    /// Keeps the library's handle from being the last, so that the file is not closed under the lock.
    _file: Arc<File>,
}

impl Partial {
    /// Offers one more piece, which must be verified and written.
    pub fn add_piece(&self, piece: PieceIndex) {
        if let Some(part) = self.library.lock().part(&self.id, self.token) {
            part.have.insert(piece.get());
        }
        self.library.0.haves.send_modify(|n| *n += 1);
    }

    /// Offers these pieces no longer: the disk lost them.
    pub fn lose(&self, pieces: &[u32]) {
        if let Some(part) = self.library.lock().part(&self.id, self.token) {
            pieces.iter().for_each(|piece| _ = part.have.remove(*piece));
        }
        self.library.0.haves.send_modify(|n| *n += 1);
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.library
            .change(|state| state.end_part(&self.id, self.token, &self.name));
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Write, os::unix::fs::FileExt};

    use proptest::prelude::*;
    use tempfile::TempDir;
    use tokio_util::sync::CancellationToken;

    use super::{state::MAX_LOG, *};
    use crate::{catalog::FileKey, content::MIN_PIECE_LEN, peer::sharing::hasher::hash_file};

    fn name(text: &str) -> SafeName {
        SafeName::parse(text).unwrap()
    }

    fn manifest(bytes: &[u8]) -> Manifest {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        hash_file(&file, &CancellationToken::new())
            .unwrap()
            .manifest
    }

    fn piece(manifest: &Manifest, i: u32) -> PieceIndex {
        manifest.layout().piece(i).unwrap()
    }

    /// A library and a folder whose files it offers.
    struct Shelf {
        dir: TempDir,
        root: Arc<Path>,
        library: Library,
    }

    impl Shelf {
        fn new() -> Self {
            let dir = TempDir::new().unwrap();
            Self {
                root: dir.path().into(),
                dir,
                library: Library::new(),
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        /// Writes a file and offers it.
        fn put(&self, text: &str, bytes: &[u8]) -> ContentId {
            fs::write(self.path(text), bytes).unwrap();
            let file = File::open(self.path(text)).unwrap();
            let hashed = hash_file(&file, &CancellationToken::new()).unwrap();
            let location = Location {
                root: self.root.clone(),
                relative: text.into(),
                stamp: hashed.stamp,
                name: name(text),
            };
            let id = hashed.manifest.id();
            assert_eq!(
                self.library.publish(location, hashed.manifest),
                Published::New
            );
            id
        }

        /// Changes the inode's ctime for certain, also within one tick of a coarse clock.
        fn write(&self, text: &str, bytes: &[u8], offset: u64) {
            let file = File::options().write(true).open(self.path(text)).unwrap();
            let before = Stamp::of(&file).unwrap();
            while Stamp::of(&file).unwrap() == before {
                file.write_all_at(bytes, offset).unwrap();
            }
        }

        fn assert_withdrawn(&self, text: &str) {
            assert_eq!(self.library.files(), []);
            assert_eq!(self.library.totals(), (0, 0));
            assert_eq!(
                self.library.take_suspects(),
                BTreeSet::from([self.path(text)])
            );
            assert_eq!(self.library.take_suspects(), BTreeSet::new());
        }
    }

    fn reason<T>(result: Result<T, ServeError>) -> ServeError {
        result.err().expect("it must not be served")
    }

    #[test]
    fn what_was_published_is_read() {
        let shelf = Shelf::new();
        let bytes: Vec<u8> = (0..700_000_u32).map(|i| (i % 251) as u8).collect();
        let id = shelf.put("a", &bytes);
        let mut reader = shelf.library.open(&id).unwrap();
        assert_eq!(reader.read(0, 700_000).unwrap(), bytes);
        assert_eq!(reader.read(262_100, 100).unwrap(), bytes[262_100..262_200]);
        assert_eq!(reader.read(700_000, 0).unwrap(), b""[..]);
        for (offset, len) in [(0, 700_001), (700_000, 1), (u64::MAX, 1)] {
            assert!(matches!(
                reason(reader.read(offset, len)),
                ServeError::OutOfRange
            ));
        }
        let empty = shelf.put("empty", b"");
        assert_eq!(
            shelf.library.open(&empty).unwrap().read(0, 0).unwrap(),
            b""[..]
        );
        assert_eq!(shelf.library.totals(), (2, 700_000));
        assert_eq!(shelf.library.find(&id), [shelf.path("a")]);
        assert_eq!(shelf.library.have(&id), Some(Have::Complete));
    }

    #[test]
    fn a_file_edited_while_served_is_withdrawn() {
        let shelf = Shelf::new();
        let id = shelf.put("a", &[1; 1000]);
        let mut reader = shelf.library.open(&id).unwrap();
        assert_eq!(reader.read(0, 10).unwrap(), [1; 10][..]);
        shelf.write("a", &[2], 500);
        assert!(matches!(reason(reader.read(0, 10)), ServeError::Changed));
        shelf.assert_withdrawn("a");
        assert!(matches!(
            reason(shelf.library.open(&id)),
            ServeError::NotFound
        ));
    }

    #[test]
    fn a_file_edited_before_it_is_opened_is_withdrawn() {
        let shelf = Shelf::new();
        let id = shelf.put("a", &[1; 1000]);
        shelf.write("a", &[2], 0);
        assert!(matches!(
            reason(shelf.library.open(&id)),
            ServeError::Changed
        ));
        shelf.assert_withdrawn("a");
    }

    #[test]
    fn a_truncated_file_is_changed_and_never_filled_up() {
        let shelf = Shelf::new();
        let id = shelf.put("a", &[1; 1000]);
        let mut reader = shelf.library.open(&id).unwrap();
        File::options()
            .write(true)
            .open(shelf.path("a"))
            .unwrap()
            .set_len(10)
            .unwrap();
        assert!(matches!(reason(reader.read(5, 100)), ServeError::Changed));
        shelf.assert_withdrawn("a");
    }

    #[test]
    fn another_copy_takes_over() {
        let shelf = Shelf::new();
        let id = shelf.put("a", &[1; 1000]);
        assert_eq!(shelf.put("b", &[1; 1000]), id);
        let mut reader = shelf.library.open(&id).unwrap();
        shelf.write("a", &[2], 0);
        assert_eq!(reader.read(0, 1000).unwrap(), [1; 1000][..]);
        let mut reader = shelf.library.open(&id).unwrap();
        assert_eq!(reader.read(0, 1000).unwrap(), [1; 1000][..]);
        shelf.write("b", &[2], 0);
        assert!(matches!(reason(reader.read(0, 1000)), ServeError::Changed));
    }

    #[test]
    fn a_file_replaced_by_rename_is_withdrawn() {
        let shelf = Shelf::new();
        let id = shelf.put("a", &[1; 1000]);
        fs::write(shelf.path("new"), [2; 1000]).unwrap();
        fs::rename(shelf.path("new"), shelf.path("a")).unwrap();
        assert!(matches!(
            reason(shelf.library.open(&id)),
            ServeError::Changed
        ));
        shelf.assert_withdrawn("a");
    }

    #[test]
    fn what_is_no_file_any_more_is_withdrawn_without_waiting() {
        let swaps: [fn(&Shelf); 4] = [
            |_| {},
            |shelf| {
                rustix::fs::mknodat(
                    rustix::fs::CWD,
                    shelf.path("a"),
                    rustix::fs::FileType::Fifo,
                    rustix::fs::Mode::RWXU,
                    0,
                )
                .unwrap()
            },
            |shelf| std::os::unix::fs::symlink("/etc/passwd", shelf.path("a")).unwrap(),
            |shelf| fs::create_dir(shelf.path("a")).unwrap(),
        ];
        for swap in swaps {
            let shelf = Shelf::new();
            let id = shelf.put("a", &[1; 1000]);
            fs::remove_file(shelf.path("a")).unwrap();
            swap(&shelf);
            assert!(matches!(
                reason(shelf.library.open(&id)),
                ServeError::NotFound | ServeError::Changed
            ));
            shelf.assert_withdrawn("a");
        }
    }

    #[test]
    fn a_file_that_cannot_be_opened_now_stays_listed() {
        let shelf = Shelf::new();
        fs::create_dir(shelf.path("d")).unwrap();
        let id = shelf.put("d/a", &[1; 1000]);
        fs::rename(shelf.path("d"), shelf.path("e")).unwrap();
        std::os::unix::fs::symlink("e", shelf.path("d")).unwrap();
        assert!(matches!(reason(shelf.library.open(&id)), ServeError::Io(_)));
        assert_eq!(shelf.library.totals(), (1, 1000));
    }

    #[test]
    fn the_first_of_one_name_wins() {
        let (shelf, other) = (Shelf::new(), Shelf::new());
        let id = shelf.put("a", b"one");
        fs::write(other.path("a"), b"two").unwrap();
        let hashed = hash_file(
            &File::open(other.path("a")).unwrap(),
            &CancellationToken::new(),
        )
        .unwrap();
        let location = Location {
            root: other.root.clone(),
            relative: "a".into(),
            stamp: hashed.stamp,
            name: name("a"),
        };
        let version = shelf.library.changes_since(0).version;
        let publish = || {
            shelf
                .library
                .publish(location.clone(), hashed.manifest.clone())
        };
        assert_eq!(publish(), Published::Clash(shelf.path("a")));
        assert_eq!(shelf.library.files()[0].content_id, id);
        assert_eq!(shelf.library.changes_since(0).version, version);
        assert!(shelf.library.withdraw_name(&name("a")));
        assert_eq!(publish(), Published::New);
        assert_eq!(publish(), Published::Same);
        assert_eq!(
            shelf.library.known_under(other.dir.path()),
            [(other.path("a"), hashed.stamp)]
        );
    }

    #[test]
    fn a_folder_is_withdrawn_with_all_beneath() {
        let shelf = Shelf::new();
        fs::create_dir_all(shelf.path("d/e")).unwrap();
        for file in ["d/1", "d/e/2", "d-1", "d.1", "e"] {
            shelf.put(file, file.as_bytes());
        }
        assert_eq!(shelf.library.known_under(&shelf.path("d")).len(), 2);
        assert_eq!(shelf.library.withdraw(&shelf.path("d")), 2);
        assert_eq!(shelf.library.withdraw(&shelf.path("d")), 0);
        let left: Vec<_> = shelf
            .library
            .files()
            .iter()
            .map(|file| file.name.to_string())
            .collect();
        assert_eq!(left, ["d-1", "d.1", "e"]);
    }

    #[test]
    fn a_download_serves_the_pieces_it_has() {
        let shelf = Shelf::new();
        let bytes = vec![7; 5 * MIN_PIECE_LEN as usize - 5];
        let manifest = manifest(&bytes);
        let id = manifest.id();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let have = HaveMap::empty(manifest.layout().n_pieces());
        let partial =
            shelf
                .library
                .start_partial(manifest.clone(), name("a"), Arc::new(file), have.clone());
        let second = File::open("/dev/null").unwrap();
        let second = shelf.library.start_partial(
            manifest.clone(),
            name("b"),
            Arc::new(second),
            have.clone(),
        );
        assert_eq!(shelf.library.have(&id), Some(Have::Partial(have)));

        let mut reader = shelf.library.open(&id).unwrap();
        assert!(matches!(reason(reader.read(0, 1)), ServeError::NotFound));
        assert_eq!(
            shelf.library.open_part(&id).unwrap().read_at_once(0, 1),
            None
        );
        second.add_piece(piece(&manifest, 0));
        partial.add_piece(piece(&manifest, 1));
        let len = MIN_PIECE_LEN;
        assert_eq!(reader.read(len.into(), len).unwrap(), bytes[..len as usize]);
        assert!(
            reader
                .read_at_once(len.into(), len)
                .is_none_or(|read| read == bytes[..len as usize])
        );
        for (offset, len) in [(len - 1, 2), (2 * len - 1, 2), (2 * len, 1)] {
            assert!(matches!(
                reason(reader.read(offset.into(), len)),
                ServeError::NotFound
            ));
            assert_eq!(reader.read_at_once(offset.into(), len), None);
        }
        let row = FileInfo {
            name: name("a"),
            size: bytes.len() as u64,
            content_id: id,
            partial: true,
        };
        assert_eq!(shelf.library.files(), std::slice::from_ref(&row));
        assert_eq!(shelf.library.totals(), (0, 0));

        let version = shelf.library.changes_since(0).version;
        assert_eq!(shelf.put("a", &bytes), id);
        assert!(shelf.library.open_part(&id).is_none());
        let update = Update::Delta {
            added: vec![FileInfo {
                partial: false,
                ..row
            }],
            removed: vec![],
        };
        assert_eq!(shelf.library.changes_since(version).update, update);
        drop((partial, second));
        assert_eq!(reader.read(0, 1).unwrap(), bytes[..1]);
        assert_eq!(shelf.library.have(&id), Some(Have::Complete));
    }

    #[test]
    fn a_download_given_up_is_gone() {
        let shelf = Shelf::new();
        let manifest = manifest(&[7; 10]);
        let file = Arc::new(tempfile::tempfile().unwrap());
        let partial =
            shelf
                .library
                .start_partial(manifest.clone(), name("a"), file, HaveMap::full(1));
        let mut reader = shelf.library.open(&manifest.id()).unwrap();
        drop(partial);
        assert!(matches!(reason(reader.read(0, 1)), ServeError::Changed));
        assert_eq!(shelf.library.files(), []);
        assert!(shelf.library.manifest(&manifest.id()).is_none());
    }

    #[test]
    fn a_folder_is_withdrawn_without_its_neighbours() {
        let shelf = Shelf::new();
        fs::create_dir_all(shelf.path("a/c")).unwrap();
        for name in ["a-b", "a.b", "a/b", "a/c/d", "ab"] {
            shelf.put(name, name.as_bytes());
        }
        let known = |name| shelf.library.known_under(&shelf.path(name)).len();
        assert_eq!((known("a"), known("ab")), (2, 1));
        assert_eq!(shelf.library.withdraw(&shelf.path("a")), 2);
        let left = shelf
            .library
            .files()
            .into_iter()
            .map(|file| file.name.to_string());
        assert_eq!(left.collect::<Vec<_>>(), ["a-b", "a.b", "ab"]);
    }

    #[tokio::test]
    async fn watchers_are_told_once_a_change() {
        let shelf = Shelf::new();
        let mut changed = shelf.library.changed();
        assert!(!changed.has_changed().unwrap());
        shelf.put("a", b"one");
        changed.changed().await.unwrap();
        assert_eq!(*changed.borrow_and_update(), 2);
        assert_eq!(shelf.library.withdraw(&shelf.path("b")), 0);
        assert!(!changed.has_changed().unwrap());
    }

    #[test]
    fn the_log_is_bounded_and_full_beyond_it() {
        let shelf = Shelf::new();
        let manifest = manifest(b"x");
        let stamp = Stamp::of(&tempfile::tempfile().unwrap()).unwrap();
        let n_rows = 100_000;
        for i in 0..n_rows {
            let text = i.to_string();
            let (relative, name) = (PathBuf::from(&text), name(&text));
            shelf.library.publish(
                Location {
                    root: shelf.root.clone(),
                    relative,
                    stamp,
                    name,
                },
                manifest.clone(),
            );
        }
        let version = 1 + n_rows;
        assert_eq!(shelf.library.totals(), (n_rows, n_rows));
        let n_changes = |since: u64| {
            let changes = shelf.library.changes_since(since);
            assert_eq!(changes.version, version);
            match changes.update {
                Update::Delta { added, .. } => Ok(added.len()),
                Update::Full(rows) => Err(rows.len()),
            }
        };
        assert_eq!(n_changes(version), Ok(0));
        assert_eq!(n_changes(version - MAX_LOG as u64), Ok(MAX_LOG));
        assert_eq!(n_changes(version - MAX_LOG as u64 - 1), Err(100_000));
        assert_eq!(n_changes(0), Err(100_000));
        assert_eq!(n_changes(version + 1), Err(100_000));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Publish {
            folder: bool,
            name: usize,
            content: usize,
        },
        Withdraw {
            folder: bool,
            name: usize,
        },
        WithdrawFolder(bool),
        WithdrawName(usize),
        Start {
            name: usize,
            content: usize,
        },
        End(usize),
        Follow,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (any::<bool>(), 0..4usize, 0..3usize)
                .prop_map(|(folder, name, content)| Step::Publish { folder, name, content }),
            2 => (any::<bool>(), 0..4usize).prop_map(|(folder, name)| Step::Withdraw { folder, name }),
            1 => any::<bool>().prop_map(Step::WithdrawFolder),
            1 => (0..4usize).prop_map(Step::WithdrawName),
            2 => (0..4usize, 0..3usize).prop_map(|(name, content)| Step::Start { name, content }),
            2 => (0..4usize).prop_map(Step::End),
            2 => Just(Step::Follow),
        ]
    }

    /// What a reader of the changes makes of them.
    #[derive(Default)]
    struct Follower {
        version: u64,
        rows: BTreeMap<FileKey, FileInfo>,
    }

    impl Follower {
        fn follow(&mut self, library: &Library) {
            let Changes { version, update } = library.changes_since(self.version);
            self.version = version;
            let added = match update {
                Update::Full(rows) => {
                    self.rows.clear();
                    rows
                }
                Update::Delta { added, removed } => {
                    for key in removed {
                        assert!(
                            self.rows.remove(&key).is_some(),
                            "only rows that were there are removed"
                        );
                    }
                    added
                }
            };
            for row in added {
                let key = FileKey {
                    name: row.name.clone(),
                    content_id: row.content_id,
                };
                assert_ne!(
                    self.rows.insert(key, row.clone()),
                    Some(row),
                    "only changes are told"
                );
            }
            assert_eq!(
                self.rows.values().cloned().collect::<Vec<_>>(),
                library.files()
            );
        }
    }

    proptest! {
        #[test]
        fn like_the_model(steps in prop::collection::vec(step(), 1..40)) {
            let dir = TempDir::new().unwrap();
            let folders = [false, true].map(|folder| dir.path().join(folder.to_string()));
            folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
            let roots: [Arc<Path>; 2] = folders.each_ref().map(|folder| Arc::from(folder.as_path()));
            let contents = [b"", &b"1"[..], b"22"].map(manifest);
            let stamp = Stamp::of(&tempfile::tempfile().unwrap()).unwrap();
            let names = ["a", "b", "c", "d"].map(name);
            let library = Library::new();
            let mut follower = Follower::default();
            // Name → folder and content; downloads on offer: content → guard, and the name if it was free.
            let mut files: BTreeMap<usize, (bool, usize)> = BTreeMap::new();
            let mut parts: BTreeMap<usize, (Partial, Option<usize>)> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Publish { folder, name, content } => {
                        let root = roots[usize::from(folder)].clone();
                        let location = Location { root, relative: names[name].as_path().into(), stamp, name: names[name].clone() };
                        let expected = match files.get(&name) {
                            Some((other, _)) if *other != folder => {
                                Published::Clash(folders[usize::from(*other)].join(names[name].as_path()))
                            }
                            Some((_, old)) if *old == content => Published::Same,
                            _ => Published::New,
                        };
                        if !matches!(expected, Published::Clash(_)) {
                            files.insert(name, (folder, content));
                            parts.values_mut().filter(|part| part.1 == Some(name)).for_each(|part| part.1 = None);
                        }
                        prop_assert_eq!(library.publish(location, contents[content].clone()), expected);
                    }
                    Step::Withdraw { folder, name } => {
                        let n_gone = library.withdraw(&folders[usize::from(folder)].join(names[name].as_path()));
                        prop_assert_eq!(n_gone == 1, files.get(&name).is_some_and(|file| file.0 == folder));
                        if n_gone == 1 {
                            files.remove(&name);
                        }
                    }
                    Step::WithdrawFolder(folder) => {
                        let n_before = files.len();
                        files.retain(|_, file| file.0 != folder);
                        prop_assert_eq!(library.withdraw(&folders[usize::from(folder)]), n_before - files.len());
                    }
                    Step::WithdrawName(name) => {
                        prop_assert_eq!(library.withdraw_name(&names[name]), files.remove(&name).is_some());
                    }
                    Step::Start { name, content } => {
                        let file = Arc::new(tempfile::tempfile().unwrap());
                        let have = HaveMap::empty(contents[content].layout().n_pieces());
                        let partial = library.start_partial(contents[content].clone(), names[name].clone(), file, have);
                        let taken = files.contains_key(&name) || parts.values().any(|part| part.1 == Some(name));
                        parts.entry(content).or_insert_with(|| (partial, (!taken).then_some(name)));
                    }
                    Step::End(content) => drop(parts.remove(&content)),
                    Step::Follow => follower.follow(&library),
                }
                let mut rows: BTreeMap<usize, (usize, bool)> = files.iter().map(|(n, (_, c))| (*n, (*c, false))).collect();
                rows.extend(parts.iter().filter_map(|(c, (_, name))| Some(((*name)?, (*c, true)))));
                let listed = library.files();
                let info = |(n, (c, partial)): (usize, (usize, bool))| FileInfo {
                    name: names[n].clone(), size: c as u64, content_id: contents[c].id(), partial,
                };
                prop_assert_eq!(listed, rows.into_iter().map(info).collect::<Vec<_>>());
                let n_bytes: usize = files.values().map(|file| file.1).sum();
                prop_assert_eq!(library.totals(), (files.len() as u64, n_bytes as u64));
                for (c, content) in contents.iter().enumerate() {
                    let n_copies = files.values().filter(|file| file.1 == c).count();
                    prop_assert_eq!(library.find(&content.id()).len(), n_copies);
                    prop_assert_eq!(library.manifest(&content.id()).is_some(), n_copies > 0 || parts.contains_key(&c));
                }
            }
            follower.follow(&library);
        }
    }
}
