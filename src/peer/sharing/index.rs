//! What this machine has hashed already: a file's path and stamp → its manifest, so that a restart hashes nothing again.
//!
//! The index is a cache in one redb file of mode 0600: whoever loses it hashes again. So a file that is damaged, or written by
//! a newer sprat, is moved aside with a warning and begun anew, and a value that does not read back is as good as none. A
//! disk that failed or was full is used again as soon as it can be.
//!
//! Invariant: an entry is believed only for the exact [`Stamp`] it was made for, and a manifest is kept exactly while
//! some entry names it (`uses` counts them), in the same transaction. Manifests prove themselves again when read. That of a
//! content of one piece says no more than its id and its size do, so it is not kept.

use std::{
    io, mem,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, RwLock},
};

use redb::{
    Database, ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction,
    backends::FileBackend,
};

use super::hasher::{Hashed, Stamp};
use crate::{
    content::{ContentId, MAX_SINGLE, Manifest},
    safe_path::{create_private, set_aside},
};

/// Rises when the tables change their meaning; another number makes a file a stranger.
const FORMAT: u32 = 1;

const HELD: &str = "no panic while the lock is held";

/// Bytes of pages held in memory.
const CACHE_BYTES: usize = 16 << 20;

const META: TableDefinition<'_, &str, u32> = TableDefinition::new("meta");
/// Absolute path → [`Entry`].
const FILES: TableDefinition<'_, &[u8], &[u8; ENTRY_LEN]> = TableDefinition::new("files");
/// Content id → the manifest's storage form.
const MANIFESTS: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("manifests");
/// Content id → how many entries of `files` name it.
const USES: TableDefinition<'_, &[u8; 32], u64> = TableDefinition::new("uses");

/// Anything the database can fail with. The index is a cache: to report, not to act on.
pub type IndexError = redb::Error;

/// The open index. Calls block on the disk.
pub struct Index {
    path: PathBuf,
    /// None after a failure: the library wants a database opened again that could not be read or written.
    db: RwLock<Option<Database>>,
    queue: Mutex<Queue>,
}

/// What [`Index::insert_soon`] has to write.
#[derive(Default)]
struct Queue {
    files: Vec<(PathBuf, Hashed)>,
    /// Somebody does.
    is_written: bool,
}

impl Index {
    /// Opens or creates the index at `path`. Fails if another process has it open or the disk fails; a damaged or newer
    /// one is moved aside, to `path` with the ending `.damaged`.
    pub fn open(path: &Path) -> Result<Self, IndexError> {
        let db = match try_open(path) {
            Err(error) if is_unusable(&error) => {
                let aside = path.with_extension("damaged");
                tracing::warn!(
                    %error, moved_to = %aside.display(),
                    "the index of hashed files is unusable: begun anew, files will be hashed again"
                );
                set_aside(path, &aside).map_err(io_error)?;
                try_open(path)?
            }
            done => done?,
        };
        Ok(Self {
            path: path.to_owned(),
            db: RwLock::new(Some(db)),
            queue: Mutex::default(),
        })
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, IndexError>,
    ) -> Result<T, IndexError> {
        let slot = self.db.read().expect(HELD);
        let outcome = slot.as_ref().map_or(Err(redb::Error::PreviousIo), work);
        drop(slot);
        if let Err(redb::Error::Io(_) | redb::Error::PreviousIo) = outcome {
            *self.db.write().expect(HELD) = None;
        }
        outcome
    }

    /// What is known about this very version of the file at the absolute path `path`.
    pub fn lookup(&self, path: &Path, stamp: &Stamp) -> Option<Hashed> {
        match self.read(path, stamp) {
            Ok(known) => known,
            // Told when it happened.
            Err(redb::Error::PreviousIo) => None,
            Err(error) => {
                tracing::warn!(%error, "the index of hashed files cannot be read");
                None
            }
        }
    }

    fn read(&self, path: &Path, stamp: &Stamp) -> Result<Option<Hashed>, IndexError> {
        let known = self.with(|db| {
            let txn = db.begin_read()?;
            let entry = txn
                .open_table(FILES)?
                .get(path_key(path))?
                .map(|e| Entry::from_bytes(e.value()));
            let Some(entry) = entry.filter(|entry| entry.stamp == *stamp) else {
                return Ok(None);
            };
            let manifest = match is_short(&entry.stamp) {
                true => Manifest::single(entry.id, entry.stamp.size).ok(),
                false => {
                    let bytes = txn.open_table(MANIFESTS)?.get(entry.id.as_bytes())?;
                    bytes.and_then(|bytes| Manifest::from_bytes(bytes.value()).ok())
                }
            };
            Ok(manifest.map(|manifest| (entry, manifest)))
        })?;
        let Some((entry, manifest)) = known else {
            return Ok(None);
        };
        Ok(Some(manifest)
            .filter(|m| m.id() == entry.id && m.layout().size() == stamp.size)
            .map(|manifest| Hashed {
                manifest,
                stamp: entry.stamp,
                hashed_at_ns: entry.hashed_at_ns,
            }))
    }

    /// Records files under their absolute paths, all in one commit; what was known about those paths is replaced.
    pub fn insert_batch(&self, files: &[(PathBuf, Hashed)]) -> Result<(), IndexError> {
        if files.is_empty() {
            return Ok(());
        }
        self.write(|txn| {
            let mut tables = Tables::open(txn)?;
            files
                .iter()
                .try_for_each(|(path, hashed)| tables.insert(path, hashed))
        })
    }

    /// As [`insert_batch`](Self::insert_batch), in as few commits as will do: while another call writes, this one only
    /// leaves its files to that.
    pub fn insert_soon(&self, files: Vec<(PathBuf, Hashed)>) -> Result<(), IndexError> {
        let mut queue = self.lock_queue();
        queue.files.extend(files);
        if mem::replace(&mut queue.is_written, true) {
            return Ok(());
        }
        let mut outcome = Ok(());
        while outcome.is_ok() && !queue.files.is_empty() {
            let files = mem::take(&mut queue.files);
            drop(queue);
            outcome = self.insert_batch(&files);
            queue = self.lock_queue();
        }
        queue.is_written = false;
        outcome
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops what is known about these paths, all in one commit.
    pub fn forget<P: AsRef<Path>>(&self, paths: &[P]) -> Result<(), IndexError> {
        if paths.is_empty() {
            return Ok(());
        }
        self.write(|txn| {
            let mut tables = Tables::open(txn)?;
            paths
                .iter()
                .try_for_each(|path| tables.forget(path.as_ref()))
        })
    }

    /// Drops every path that `keep` does not want: those of files that went away while nobody looked. Returns how many.
    pub fn retain(&self, keep: impl Fn(&Path) -> bool) -> Result<usize, IndexError> {
        let mut gone = vec![];
        self.with(|db| {
            for entry in db.begin_read()?.open_table(FILES)?.range::<&[u8]>(..)? {
                let path = PathBuf::from(std::ffi::OsString::from_vec(entry?.0.value().to_vec()));
                if !keep(&path) {
                    gone.push(path);
                }
            }
            Ok(())
        })?;
        self.forget(&gone)?;
        Ok(gone.len())
    }

    /// One transaction, durable and in two phases when this returns `Ok`; without effect otherwise.
    fn write(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<(), IndexError>,
    ) -> Result<(), IndexError> {
        if self.db.read().expect(HELD).is_none() {
            let mut slot = self.db.write().expect(HELD);
            // Unless somebody else was faster: a file is opened once only.
            if slot.is_none() {
                *slot = Some(try_open(&self.path)?);
            }
        }
        self.with(|db| write(db, change))
    }
}

fn try_open(path: &Path) -> Result<Database, IndexError> {
    let file = create_private(path).map_err(io_error)?;
    let backend = FileBackend::new(file)?;
    // Without the check, redb may panic on a file that something else has damaged.
    let db = Database::builder()
        .set_cache_size(CACHE_BYTES)
        .set_check_integrity_on_open(true)
        .create_with_backend(backend)?;
    write(&db, |txn| {
        let mut meta = txn.open_table(META)?;
        let format = meta.get("format")?.map_or(FORMAT, |format| format.value());
        if format != FORMAT {
            return Err(redb::Error::Corrupted(format!(
                "format {format}, this sprat knows {FORMAT}"
            )));
        }
        meta.insert("format", FORMAT)?;
        Tables::open(txn).map(drop)
    })?;
    Ok(db)
}

fn write(
    db: &Database,
    change: impl FnOnce(&WriteTransaction) -> Result<(), IndexError>,
) -> Result<(), IndexError> {
    let mut txn = db.begin_write()?;
    txn.set_two_phase_commit(true);
    change(&txn)?;
    Ok(txn.commit()?)
}

/// Whether the file itself is at fault, rather than the disk or another process that has it open.
fn is_unusable(error: &IndexError) -> bool {
    use redb::Error as E;
    match error {
        E::Io(error) => matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
        ),
        E::Corrupted(_) | E::UpgradeRequired(_) | E::RepairAborted | E::TableIsMultimap(_) => true,
        E::TableTypeMismatch { .. } | E::TypeDefinitionChanged { .. } => true,
        _ => false,
    }
}

fn io_error(error: io::Error) -> IndexError {
    IndexError::Io(error)
}

fn path_key(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// At most one piece.
const fn is_short(stamp: &Stamp) -> bool {
    stamp.size <= MAX_SINGLE as u64
}

/// The tables of one write transaction.
struct Tables<'t> {
    files: Table<'t, &'static [u8], &'static [u8; ENTRY_LEN]>,
    manifests: Table<'t, &'static [u8; 32], &'static [u8]>,
    uses: Table<'t, &'static [u8; 32], u64>,
}

impl<'t> Tables<'t> {
    fn open(txn: &'t WriteTransaction) -> Result<Self, IndexError> {
        Ok(Self {
            files: txn.open_table(FILES)?,
            manifests: txn.open_table(MANIFESTS)?,
            uses: txn.open_table(USES)?,
        })
    }

    fn insert(&mut self, path: &Path, hashed: &Hashed) -> Result<(), IndexError> {
        let id = hashed.manifest.id();
        let entry = Entry {
            stamp: hashed.stamp,
            hashed_at_ns: hashed.hashed_at_ns,
            id,
        };
        let before = self
            .files
            .insert(path_key(path), &entry.to_bytes())?
            .map(|old| Entry::from_bytes(old.value()));
        let is_same = before.as_ref().is_some_and(|before| before.id == id);
        if !is_short(&entry.stamp) {
            // The same content under the same path is written again all the same: it heals a damaged manifest.
            self.manifests
                .insert(id.as_bytes(), &*hashed.manifest.to_bytes())?;
            if !is_same {
                let uses = self.uses.get(id.as_bytes())?.map_or(0, |uses| uses.value());
                self.uses.insert(id.as_bytes(), uses + 1)?;
            }
        }
        before
            .filter(|_| !is_same)
            .map_or(Ok(()), |before| self.release(&before))
    }

    fn forget(&mut self, path: &Path) -> Result<(), IndexError> {
        let before = self
            .files
            .remove(path_key(path))?
            .map(|old| Entry::from_bytes(old.value()));
        before.map_or(Ok(()), |before| self.release(&before))
    }

    /// One entry fewer names the content; the last one takes the manifest along.
    fn release(&mut self, Entry { stamp, id, .. }: &Entry) -> Result<(), IndexError> {
        if is_short(stamp) {
            return Ok(());
        }
        let uses = self.uses.get(id.as_bytes())?.map_or(0, |uses| uses.value());
        if uses > 1 {
            self.uses.insert(id.as_bytes(), uses - 1)?;
        } else {
            self.uses.remove(id.as_bytes())?;
            self.manifests.remove(id.as_bytes())?;
        }
        Ok(())
    }
}

/// Device, inode, size (8 bytes each), mtime, ctime, time of hashing (16 each), content id (32); little-endian.
const ENTRY_LEN: usize = 3 * 8 + 3 * 16 + 32;

/// What `files` holds about a path.
struct Entry {
    stamp: Stamp,
    hashed_at_ns: i128,
    id: ContentId,
}

impl Entry {
    fn to_bytes(&self) -> [u8; ENTRY_LEN] {
        let Stamp {
            dev,
            ino,
            size,
            mtime_ns,
            ctime_ns,
        } = self.stamp;
        let mut bytes = [0; ENTRY_LEN];
        let (words, rest) = bytes.split_at_mut(3 * 8);
        let (times, id) = rest.split_at_mut(3 * 16);
        words
            .as_chunks_mut()
            .0
            .copy_from_slice(&[dev, ino, size].map(u64::to_le_bytes));
        times
            .as_chunks_mut()
            .0
            .copy_from_slice(&[mtime_ns, ctime_ns, self.hashed_at_ns].map(i128::to_le_bytes));
        id.copy_from_slice(self.id.as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; ENTRY_LEN]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let time = |at: usize| i128::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            stamp: Stamp {
                dev: word(0),
                ino: word(8),
                size: word(16),
                mtime_ns: time(24),
                ctime_ns: time(40),
            },
            hashed_at_ns: time(56),
            id: ContentId::from_bytes(std::array::from_fn(|i| bytes[72 + i])),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        fs::{self, File},
        io::Write,
        os::unix::fs::{FileExt, MetadataExt},
    };

    use proptest::prelude::*;
    use redb::ReadableTableMetadata;
    use tempfile::TempDir;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::peer::sharing::hasher::hash_file;

    fn hashed(bytes: &[u8]) -> Hashed {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        hash_file(&file, &CancellationToken::new()).unwrap()
    }

    fn place() -> (TempDir, PathBuf) {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("index.redb");
        (dir, path)
    }

    fn known(index: &Index, path: &str, hashed: &Hashed) -> Option<ContentId> {
        index
            .lookup(Path::new(path), &hashed.stamp)
            .map(|h| h.manifest.id())
    }

    fn n_manifests(index: &Index) -> u64 {
        index
            .db
            .read()
            .unwrap()
            .as_ref()
            .unwrap()
            .begin_read()
            .unwrap()
            .open_table(MANIFESTS)
            .unwrap()
            .len()
            .unwrap()
    }

    #[test]
    fn a_restart_knows_everything_and_only_for_the_exact_stamp() {
        let (_dir, path) = place();
        let files: Vec<_> = [&b""[..], b"one", &[7; 300_000]]
            .iter()
            .map(|bytes| hashed(bytes))
            .collect();
        let batch: Vec<_> = files
            .iter()
            .enumerate()
            .map(|(i, h)| (PathBuf::from(format!("/s/{i}")), h.clone()))
            .collect();
        Index::open(&path).unwrap().insert_batch(&batch).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);

        let index = Index::open(&path).unwrap();
        for (path, hashed) in &batch {
            let again = index
                .lookup(path, &hashed.stamp)
                .expect("a restart hashes nothing again");
            assert_eq!(again.manifest.to_bytes(), hashed.manifest.to_bytes());
            assert_eq!(again.hashed_at_ns, hashed.hashed_at_ns);
            assert!(again.is_young());
            let stamp = hashed.stamp;
            for other in [
                Stamp {
                    dev: stamp.dev + 1,
                    ..stamp
                },
                Stamp {
                    ino: stamp.ino + 1,
                    ..stamp
                },
                Stamp {
                    size: stamp.size + 1,
                    ..stamp
                },
                Stamp {
                    mtime_ns: stamp.mtime_ns + 1,
                    ..stamp
                },
                Stamp {
                    ctime_ns: -stamp.ctime_ns,
                    ..stamp
                },
            ] {
                assert!(index.lookup(path, &other).is_none());
            }
        }
        assert!(index.lookup(Path::new("/s"), &files[0].stamp).is_none());
    }

    #[test]
    fn files_of_many_callers_are_all_written() {
        let (_dir, path) = place();
        let index = Index::open(&path).unwrap();
        let files: Vec<_> = (0..8u8)
            .map(|i| (format!("/{i}"), hashed(&[i; 9])))
            .collect();
        std::thread::scope(|scope| {
            for (path, file) in &files {
                scope.spawn(|| {
                    index
                        .insert_soon(vec![(path.into(), file.clone())])
                        .unwrap()
                });
            }
        });
        for (path, file) in &files {
            assert_eq!(
                known(&index, path, file),
                Some(file.manifest.id()),
                "{path}"
            );
        }
        assert_eq!(
            n_manifests(&index),
            0,
            "one piece says nothing that the entry does not"
        );
    }

    #[test]
    fn a_second_opener_is_refused_and_harms_nothing() {
        let (_dir, path) = place();
        let one = hashed(b"one");
        let first = Index::open(&path).unwrap();
        first.insert_batch(&[("/a".into(), one.clone())]).unwrap();
        assert!(matches!(
            Index::open(&path).err().unwrap(),
            IndexError::DatabaseAlreadyOpen
        ));
        assert_eq!(known(&first, "/a", &one), Some(one.manifest.id()));
    }

    #[test]
    fn a_damaged_index_is_moved_aside() {
        let one = hashed(&[1; 600_000]);
        let damages: [fn(&File); 4] = [
            |file| file.write_all_at(&[0xa5; 4096], 0).unwrap(),
            |file| file.set_len(5000).unwrap(),
            |file| file.set_len(1).unwrap(),
            |file| {
                let len = file.metadata().unwrap().len();
                for at in (4096..len).step_by(512) {
                    file.write_all_at(b"damage", at).unwrap();
                }
            },
        ];
        for damage in damages {
            let (_dir, path) = place();
            Index::open(&path)
                .unwrap()
                .insert_batch(&[("/a".into(), one.clone())])
                .unwrap();
            damage(&File::options().write(true).open(&path).unwrap());
            let index = Index::open(&path).unwrap();
            assert_eq!(known(&index, "/a", &one), None);
            index.insert_batch(&[("/a".into(), one.clone())]).unwrap();
            assert_eq!(known(&index, "/a", &one), Some(one.manifest.id()));
            assert!(path.with_extension("damaged").exists());
        }
    }

    #[test]
    fn an_index_of_a_newer_sprat_is_moved_aside() {
        let (_dir, path) = place();
        Index::open(&path)
            .unwrap()
            .write(|txn| {
                txn.open_table(META)?.insert("format", FORMAT + 1)?;
                Ok(())
            })
            .unwrap();
        drop(Index::open(&path).unwrap());
        assert!(path.with_extension("damaged").exists());
    }

    #[test]
    fn a_manifest_that_does_not_read_back_is_none_until_it_is_written_again() {
        let (_dir, path) = place();
        let index = Index::open(&path).unwrap();
        let one = hashed(&[1; 600_000]);
        let batch = [(PathBuf::from("/a"), one.clone())];
        index.insert_batch(&batch).unwrap();
        index
            .write(|txn| {
                txn.open_table(MANIFESTS)?
                    .insert(one.manifest.id().as_bytes(), &b"rot"[..])?;
                Ok(())
            })
            .unwrap();
        assert_eq!(known(&index, "/a", &one), None);
        index.insert_batch(&batch).unwrap();
        assert_eq!(known(&index, "/a", &one), Some(one.manifest.id()));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Vec<(u8, u8)>),
        Forget(Vec<u8>),
        Retain(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => prop::collection::vec((0..6u8, 0..4u8), 0..4).prop_map(Step::Insert),
            2 => prop::collection::vec(0..6u8, 0..3).prop_map(Step::Forget),
            1 => (0..6u8).prop_map(Step::Retain),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn like_a_map_and_no_manifest_too_many(steps in prop::collection::vec(step(), 1..12)) {
            let contents: Vec<_> = (0..4u8).map(|i| hashed(&[i; 300_000])).collect();
            let path_of = |p: u8| PathBuf::from(format!("/dir/{p}"));
            let (_dir, path) = place();
            let mut index = Index::open(&path).unwrap();
            let mut model = HashMap::new();
            for step in steps {
                match step {
                    Step::Insert(files) => {
                        let batch: Vec<_> = files.iter().map(|(p, c)| (path_of(*p), contents[*c as usize].clone())).collect();
                        index.insert_batch(&batch).unwrap();
                        model.extend(files);
                    }
                    Step::Forget(paths) => {
                        index.forget(&paths.iter().map(|p| path_of(*p)).collect::<Vec<_>>()).unwrap();
                        model.retain(|p, _| !paths.contains(p));
                    }
                    Step::Retain(bound) => {
                        let gone = index.retain(|path| path < path_of(bound).as_path()).unwrap();
                        prop_assert_eq!(gone, model.keys().filter(|p| **p >= bound).count());
                        model.retain(|p, _| *p < bound);
                        drop(index);
                        index = Index::open(&path).unwrap();
                    }
                }
                for p in 0..6u8 {
                    for c in &contents {
                        let expected = model.get(&p).map(|c| &contents[*c as usize]).filter(|e| e.stamp == c.stamp);
                        let found = index.lookup(&path_of(p), &c.stamp).map(|h| h.manifest.id());
                        prop_assert_eq!(found, expected.map(|e| e.manifest.id()));
                    }
                }
                let held: std::collections::HashSet<_> = model.values().collect();
                prop_assert_eq!(n_manifests(&index), held.len() as u64);
            }
        }
    }
}
