//! Where a download's files go on this disk: what is there already, what may not be touched, and the `.part` of each.
//!
//! Invariant: nothing that exists is ever replaced, except under [`Existing::Overwrite`] a regular file by the complete and
//! verified one. A target that exists is looked at before the first byte is fetched, and once more when the finished file
//! gets its name. A finished file's data, name and folder are durable, in this order, before anybody hears of it.

use std::{io, path::PathBuf, sync::Arc};

use anyhow::Result;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{
    reuse::{LocalPiece, Places},
    storage::{Storage, StorageError, sync_data, sync_folders},
};
use crate::peer::sharing::{
    hasher::{HashError, Hashed, Stamp, hash_file},
    index::Index,
    library::{Library, Location, Partial},
    shares::Shares,
};
use crate::{
    content::{ContentId, MAX_SINGLE, Manifest},
    exit::{Exit, Failed},
    safe_path::{Root, SafeName, escape},
};

/// What to do with a target that exists and differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Fail before anything is fetched.
    Refuse,
    /// Take a free name: "film (2).mkv".
    Rename,
    /// Leave it and go on.
    Skip,
    /// Replace a regular file when the new one is complete; refuse anything else.
    Overwrite,
}

/// A file to get.
#[derive(Clone, Debug)]
pub struct Want {
    /// What it is called in the network.
    pub name: SafeName,
    /// What it is to be called under the root.
    pub target: SafeName,
    /// Bytes, as the listing says; only a manifest proves it.
    pub size: u64,
    /// What it is.
    pub id: ContentId,
}

/// What stands at a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing, or a file to be overwritten: to be fetched under this name.
    Free(SafeName),
    /// This very content.
    Identical(PathBuf),
    /// Something else, which is to be left alone.
    Skipped(PathBuf),
}

/// A content that is to be fetched.
pub struct Opened {
    /// Its `.part`.
    pub storage: Arc<Storage>,
    /// Missing pieces that are probably on this disk, ascending.
    pub local: Vec<LocalPiece>,
    /// It counts as open.
    pub permit: Option<OwnedSemaphorePermit>,
}

/// A complete content that is to get its name.
#[derive(Clone, Copy)]
pub struct Finishing<'a> {
    /// Its `.part`.
    pub storage: &'a Storage,
    /// What it is.
    pub want: &'a Want,
    /// The name it was opened with.
    pub target: &'a SafeName,
}

/// A file that has its name, beneath the root too.
struct Named {
    path: PathBuf,
    name: SafeName,
    is_ours: bool,
}

/// What was learnt of files, by their absolute paths.
pub type Hashes = Vec<(PathBuf, Hashed)>;

/// This peer's disk, as downloads use it.
#[derive(Clone)]
pub struct Disk {
    /// Under which everything lands.
    pub root: Root,
    /// What was hashed before.
    pub index: Arc<Index>,
    /// What is here already, and what is offered when it is finished.
    pub library: Library,
    /// Which names files have that lie in a share.
    pub shares: Arc<Shares>,
    /// Ends hashing.
    pub cancel: CancellationToken,
}

/// The most "(n)" that are tried.
const MAX_NUMBER: u32 = 999;

impl Disk {
    /// Looks at the targets of all of these, as [`look`](Self::look) does; once at a folder that is not there. What was
    /// found is in the same order.
    pub fn look_at_all(&self, wants: &[Want], existing: Existing) -> Vec<Result<Target>> {
        let mut missing = None;
        let look = |want: &Want| {
            let folder = want.target.folder();
            if Some(folder) == missing.as_deref()
                || self
                    .root
                    .folder_of(&want.target)
                    .map_err(unwritable)?
                    .is_none()
            {
                missing = Some(folder.to_owned());
                return Ok(Target::Free(want.target.clone()));
            }
            self.look(want, existing)
        };
        wants.iter().map(look).collect()
    }

    /// Looks at the target of `want`. Blocks: a file of the right size is hashed, unless its hash is known.
    ///
    /// # Errors
    /// [`Exit::Exists`] under [`Existing::Refuse`] and for what cannot be overwritten, or as the disk answers.
    pub fn look(&self, want: &Want, existing: Existing) -> Result<Target> {
        let root = self.root.path();
        let shown = |name: &SafeName| escape(&root.join(name.as_path()).display().to_string());
        if !self.root.exists(&want.target).map_err(unwritable)? {
            return Ok(Target::Free(want.target.clone()));
        }
        if self.is_identical(want)? {
            if want.size > MAX_SINGLE.into()
                && let Some(folder) = self.root.folder_of(&want.target).map_err(unwritable)?
            {
                folder
                    .remove_orphan_journal(want.target.file_name())
                    .map_err(unwritable)?;
            }
            return Ok(Target::Identical(root.join(want.target.as_path())));
        }
        match existing {
            Existing::Skip => Ok(Target::Skipped(root.join(want.target.as_path()))),
            Existing::Refuse => {
                let text = format!(
                    "{} exists and differs; it was left alone (use --overwrite, --rename or --skip, or another -o)",
                    shown(&want.target)
                );
                Err(Failed::new(Exit::Exists, text).into())
            }
            Existing::Overwrite if self.root.open_file(want.target.as_path()).is_ok() => {
                Ok(Target::Free(want.target.clone()))
            }
            Existing::Overwrite => {
                let text = format!(
                    "{} exists and is not a regular file; it was left alone",
                    shown(&want.target)
                );
                Err(Failed::new(Exit::Exists, text).into())
            }
            Existing::Rename => {
                for n in 2..=MAX_NUMBER {
                    let name = want.target.numbered(n)?;
                    if !self.root.exists(&name).map_err(unwritable)? {
                        return Ok(Target::Free(name));
                    }
                }
                Err(Failed::new(
                    Exit::Exists,
                    format!("{} and all its numbered names exist", shown(&want.target)),
                )
                .into())
            }
        }
    }

    fn is_identical(&self, want: &Want) -> Result<bool> {
        // A folder, a link, a device: whatever it is, it is not this content.
        let Ok(file) = self.root.open_file(want.target.as_path()) else {
            return Ok(false);
        };
        let stamp = Stamp::of(&file)?;
        if stamp.size != want.size {
            return Ok(false);
        }
        let path = self.root.path().join(want.target.as_path());
        if let Some(known) = self.index.lookup(&path, &stamp) {
            return Ok(known.manifest.id() == want.id);
        }
        match hash_file(&file, &self.cancel) {
            Ok(hashed) => {
                let identical = hashed.manifest.id() == want.id;
                if identical {
                    self.remember(self.offer(vec![(
                        path,
                        want.target.clone(),
                        &want.name,
                        hashed,
                    )]));
                }
                Ok(identical)
            }
            Err(HashError::Changed | HashError::TooLarge) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the `.part` of each content, under the name given beside it, and finds what is on this disk already. Reads no
    /// data. The outcomes are in the same order, and each concerns its own content.
    pub fn open(
        &self,
        files: &[(&Want, &SafeName, Manifest)],
    ) -> Vec<Result<Opened, StorageError>> {
        let open = |(_, name, manifest): &(_, &SafeName, Manifest)| {
            Storage::open(&self.root, name, manifest.clone())
        };
        let storages: Vec<_> = files.iter().map(open).collect();
        let opened = storages.iter().zip(files);
        let wanted: Vec<_> = opened
            .filter_map(|(storage, (want, ..))| Some((storage.as_ref().ok()?, &want.target)))
            .collect();
        let local = Places {
            library: &self.library,
            root: &self.root,
            index: &self.index,
        }
        .find(&wanted);
        let mut local = local.into_iter();
        let opened = |storage: Storage| Opened {
            storage: Arc::new(storage),
            local: local.next().unwrap_or_default(),
            permit: None,
        };
        let mut opened = opened;
        storages
            .into_iter()
            .map(|storage| storage.map(&mut opened))
            .collect()
    }

    /// Offers to others what a download holds and will hold, until the guard is dropped; nothing of a content of one
    /// piece, which is whole as soon as it is anything.
    pub fn offer_partial(
        &self,
        storage: &Storage,
        want: &Want,
        target: &SafeName,
    ) -> Option<Partial> {
        let manifest = storage.manifest();
        let file = storage.file().filter(|_| !manifest.layout().is_single())?;
        let path = self.root.path().join(target.as_path());
        let name = self
            .shares
            .name_of(&path)
            .unwrap_or_else(|| want.name.clone());
        Some(
            self.library
                .start_partial(manifest.clone(), name, file, storage.have()),
        )
    }

    /// Gives complete files their names, all in one go, and offers them to others. The outcomes are in the same order; one
    /// that fails concerns no other, unless the disk does. What there is to [`remember`](Self::remember) comes with them.
    /// Blocks (fsync).
    pub fn finish(
        &self,
        files: &[Finishing<'_>],
        existing: Existing,
    ) -> (Vec<Result<PathBuf>>, Hashes) {
        let storages: Vec<_> = files.iter().map(|file| file.storage).collect();
        let synced = sync_data(&storages);
        let mut outcomes: Vec<Result<Named>> = files
            .iter()
            .zip(synced)
            .map(|(file, synced)| {
                synced
                    .map_err(explain)
                    .and_then(|()| self.name(file, existing))
            })
            .collect();
        let named: Vec<_> = (0..files.len()).filter(|i| outcomes[*i].is_ok()).collect();
        let folders = sync_folders(&named.iter().map(|i| files[*i].storage).collect::<Vec<_>>());
        let mut offers = vec![];
        for (i, durable) in named.into_iter().zip(folders) {
            let Finishing { storage, want, .. } = files[i];
            match (durable.and_then(|()| storage.end()), &outcomes[i]) {
                (
                    Ok(stamp),
                    Ok(Named {
                        path,
                        name,
                        is_ours: true,
                    }),
                ) => {
                    let hashed = Hashed {
                        manifest: storage.manifest().clone(),
                        stamp,
                        hashed_at_ns: i128::MAX,
                    };
                    offers.push((path.clone(), name.clone(), &want.name, hashed));
                }
                (Err(error), _) => outcomes[i] = Err(explain(error)),
                _ => {}
            }
        }
        let hashes = self.offer(offers);
        (
            outcomes
                .into_iter()
                .map(|outcome| outcome.map(|named| named.path))
                .collect(),
            hashes,
        )
    }

    /// Gives a durable file its name. If another download of the same small file was first, that one will do: nothing keeps
    /// the two apart before.
    fn name(&self, file: &Finishing<'_>, existing: Existing) -> Result<Named> {
        let mut name = file.target.clone();
        let mut n = 1;
        loop {
            match file.storage.name(&name, existing == Existing::Overwrite) {
                Err(StorageError::Exists(path))
                    if name == file.want.target
                        && file.storage.manifest().layout().is_single()
                        && self.is_identical(file.want)? =>
                {
                    return Ok(Named {
                        path,
                        name,
                        is_ours: false,
                    });
                }
                Err(StorageError::Exists(_)) if existing == Existing::Rename && n < MAX_NUMBER => {
                    n += 1;
                    name = file.target.numbered(n)?;
                }
                named => {
                    return Ok(Named {
                        path: named.map_err(explain)?,
                        name,
                        is_ours: true,
                    });
                }
            }
        }
    }

    /// Offers files: path, path beneath the root, and what they are offered as outside of shares. Gives what there is to
    /// remember of them.
    fn offer(&self, files: Vec<(PathBuf, SafeName, &SafeName, Hashed)>) -> Hashes {
        let mut offers = Vec::with_capacity(files.len());
        let mut hashes = Vec::with_capacity(files.len());
        for (path, relative, shared_as, hashed) in files {
            let location = Location {
                root: self.root.shared_path(),
                relative: relative.as_path().to_owned(),
                stamp: hashed.stamp,
                name: self
                    .shares
                    .name_of(&path)
                    .unwrap_or_else(|| shared_as.clone()),
            };
            offers.push((location, hashed.manifest.clone()));
            hashes.push((path, hashed));
        }
        self.library.publish_all(offers);
        hashes
    }

    /// Spares later runs to hash these files. Blocks.
    pub fn remember(&self, hashes: Hashes) {
        let (n, first) = (
            hashes.len(),
            hashes.first().map(|(path, _)| path.display().to_string()),
        );
        if let Err(error) = self.index.insert_soon(hashes) {
            tracing::warn!(
                "remembering {n} files, {} the first: {error}",
                escape(&first.unwrap_or_default())
            );
        }
    }
}

fn unwritable(error: io::Error) -> anyhow::Error {
    let text = escape(&error.to_string());
    anyhow::Error::new(error).context(Failed::new(Exit::NoSpace, text))
}

/// A storage error with its exit code and the next step; the error itself is its cause.
#[must_use]
pub fn explain(error: StorageError) -> anyhow::Error {
    let exit = match &error {
        StorageError::NoSpace { .. } => Exit::NoSpace,
        StorageError::Exists(_) => Exit::Exists,
        StorageError::Io(_) | StorageError::Lost { .. } => Exit::NoSpace,
        _ => Exit::Failure,
    };
    let text = escape(&error.to_string());
    anyhow::Error::new(error).context(Failed::new(exit, text))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::FileExt,
        time::Duration,
    };

    use bytes::Bytes;
    use tempfile::TempDir;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::peer::sharing::{library::Have, shares::SharesConfig};

    const PIECE: usize = crate::content::MIN_PIECE_LEN as usize;

    struct Bench {
        temp: TempDir,
        disk: Disk,
    }

    impl Bench {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            fs::create_dir(temp.path().join("downloads")).unwrap();
            let (library, cancel) = (Library::new(), CancellationToken::new());
            let index = Arc::new(Index::open(&temp.path().join("index")).unwrap());
            let shares = Shares::new(SharesConfig {
                index: index.clone(),
                library: library.clone(),
                hidden: vec![],
                rescan: Duration::from_secs(3_600),
                poll: true,
                cancel: cancel.clone(),
                tasks: TaskTracker::new(),
            });
            let root = Root::open(&temp.path().join("downloads")).unwrap();
            Self {
                disk: Disk {
                    root,
                    index,
                    library,
                    shares: Arc::new(shares),
                    cancel,
                },
                temp,
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.disk.root.path().join(name)
        }

        /// Puts a file into the library, by getting it.
        fn put(&self, name: &str, bytes: &Bytes) {
            let (want, manifest) = wanted(name, bytes);
            let opened = self.open(&want, &want.target, &manifest);
            fetch(&opened.storage, bytes);
            self.finish(&opened.storage, &want, Existing::Refuse)
                .unwrap();
        }

        fn open(&self, want: &Want, target: &SafeName, manifest: &Manifest) -> Opened {
            self.disk
                .open(&[(want, target, manifest.clone())])
                .remove(0)
                .unwrap()
        }

        fn finish(&self, storage: &Storage, want: &Want, existing: Existing) -> Result<PathBuf> {
            let (mut paths, hashes) = self.disk.finish(
                &[Finishing {
                    storage,
                    want,
                    target: &want.target,
                }],
                existing,
            );
            self.disk.remember(hashes);
            paths.remove(0)
        }
    }

    fn content(len: usize, seed: u8) -> Bytes {
        (0..len)
            .map(|i| (i / 7 + i / PIECE).to_le_bytes()[0] ^ seed)
            .collect()
    }

    fn wanted(name: &str, bytes: &Bytes) -> (Want, Manifest) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let manifest = hash_file(&file, &CancellationToken::new())
            .unwrap()
            .manifest;
        let name = SafeName::parse(name).unwrap();
        (
            Want {
                target: name.clone(),
                name,
                size: bytes.len() as u64,
                id: manifest.id(),
            },
            manifest,
        )
    }

    /// Writes what is missing, as if it came over the network; how many pieces that were.
    fn fetch(storage: &Storage, bytes: &Bytes) -> u32 {
        let (manifest, have) = (storage.manifest(), storage.have());
        let layout = manifest.layout();
        let missing = layout.pieces().filter(|piece| !have.contains(piece.get()));
        let fetch = missing.map(|piece| {
            let begin = usize::try_from(layout.offset(piece)).unwrap();
            let bytes = bytes.slice(begin..begin + layout.len_of(piece) as usize);
            storage
                .write(&manifest.verify(piece, bytes).unwrap())
                .unwrap();
        });
        u32::try_from(fetch.count()).unwrap()
    }

    fn bring(opened: &Opened) -> usize {
        opened
            .local
            .iter()
            .filter(|piece| piece.bring(&opened.storage).unwrap())
            .count()
    }

    /// The same bytes with one in ten pieces changed, and some more at the end.
    fn newer(old: &Bytes) -> Bytes {
        let mut bytes = old.to_vec();
        bytes.chunks_mut(10 * PIECE).for_each(|chunk| chunk[3] ^= 1);
        bytes.extend([9; 1000]);
        bytes.into()
    }

    #[tokio::test]
    async fn an_older_version_under_the_same_name_is_reused_and_overwritten() {
        for was_hashed in [true, false] {
            let bench = Bench::new();
            let old = content(40 * PIECE, 0);
            let (new, changed) = (newer(&old), 5);
            if was_hashed {
                bench.put("a/f", &old);
            } else {
                fs::create_dir(bench.path("a")).unwrap();
                fs::write(bench.path("a/f"), &old).unwrap();
            }
            let (want, manifest) = wanted("a/f", &new);
            assert!(bench.disk.look(&want, Existing::Refuse).is_err());
            assert_eq!(
                bench.disk.look(&want, Existing::Overwrite).unwrap(),
                Target::Free(want.target.clone())
            );
            let opened = bench.open(&want, &want.target, &manifest);
            assert_eq!(opened.local.len(), if was_hashed { 36 } else { 40 });
            assert!(opened.local.is_sorted_by_key(LocalPiece::index));
            assert_eq!(bring(&opened), 36);
            assert_eq!(fs::read(bench.path("a/f")).unwrap(), old, "still there");
            assert_eq!(fetch(&opened.storage, &new), changed);
            let path = bench
                .finish(&opened.storage, &want, Existing::Overwrite)
                .unwrap();
            assert!(fs::read(path).unwrap() == new);
            assert_eq!(bench.disk.library.have(&want.id), Some(Have::Complete));
            assert_eq!(fs::read_dir(bench.path("a")).unwrap().count(), 1);
        }
    }

    #[tokio::test]
    async fn pieces_of_any_file_in_the_library_are_reused() {
        let bench = Bench::new();
        let (one, other) = (content(20 * PIECE, 0), content(30 * PIECE + 5, 4));
        bench.put("one", &one);
        bench.put("other", &other);
        let mixed: Bytes = [&one[..10 * PIECE], &other[10 * PIECE..]].concat().into();
        let wants = [
            wanted("x/mixed", &mixed),
            wanted("x/copy", &one),
            wanted("x/small", &content(99, 1)),
        ];
        bench.put("small", &content(99, 1));
        let files: Vec<_> = wants
            .iter()
            .map(|(want, manifest)| (want, &want.target, manifest.clone()))
            .collect();
        let opened = bench.disk.open(&files).into_iter();
        let opened: Vec<_> = opened.map(Result::unwrap).collect();
        assert_eq!(opened.iter().map(bring).collect::<Vec<_>>(), [31, 20, 1]);
        for ((want, _), bytes) in wants.iter().zip([mixed, one, content(99, 1)]) {
            let storage = &opened
                .iter()
                .find(|opened| opened.storage.manifest().id() == want.id)
                .unwrap()
                .storage;
            assert!(
                fs::read(bench.finish(storage, want, Existing::Refuse).unwrap()).unwrap() == bytes
            );
        }
    }

    #[tokio::test]
    async fn a_library_file_that_changed_costs_its_pieces_and_nothing_else() {
        let bench = Bench::new();
        let old = content(5 * PIECE, 0);
        bench.put("old", &old);
        let (want, manifest) = wanted("copy", &old);
        let opened = bench.open(&want, &want.target, &manifest);
        File::options()
            .write(true)
            .open(bench.path("old"))
            .unwrap()
            .write_all_at(b"?", 5)
            .unwrap();
        assert!(bring(&opened) < 5);
        fetch(&opened.storage, &old);
        assert!(
            fs::read(
                bench
                    .finish(&opened.storage, &want, Existing::Refuse)
                    .unwrap()
            )
            .unwrap()
                == old
        );
    }

    #[tokio::test]
    async fn what_an_interrupted_run_left_is_reused() {
        let bench = Bench::new();
        let bytes = content(6 * PIECE, 0);
        let (want, manifest) = wanted("f", &bytes);
        let opened = bench.open(&want, &want.target, &manifest);
        fetch(&opened.storage, &bytes);
        drop(opened);
        let opened = bench.open(&want, &want.target, &manifest);
        assert!(opened.storage.have().is_empty());
        assert_eq!(bring(&opened), 6);
    }

    #[tokio::test]
    async fn a_clash_in_a_group_concerns_the_one_file() {
        let bench = Bench::new();
        let contents: Vec<_> = (0..20).map(|i| content(100 + i, 0)).collect();
        let wants: Vec<_> = contents
            .iter()
            .enumerate()
            .map(|(i, bytes)| wanted(&format!("d{}/{i}", i % 2), bytes))
            .collect();
        let files: Vec<_> = wants
            .iter()
            .map(|(want, manifest)| (want, &want.target, manifest.clone()))
            .collect();
        let opened = bench.disk.open(&files).into_iter();
        let opened: Vec<_> = opened.map(Result::unwrap).collect();
        opened
            .iter()
            .zip(&contents)
            .for_each(|(opened, bytes)| _ = fetch(&opened.storage, bytes));
        fs::write(bench.path("d1/7"), "in the way").unwrap();
        let finishing = opened.iter().zip(&wants);
        let finishing: Vec<_> = finishing
            .map(|(opened, (want, _))| Finishing {
                storage: &opened.storage,
                want,
                target: &want.target,
            })
            .collect();
        let (outcomes, _) = bench.disk.finish(&finishing, Existing::Refuse);
        for (i, outcome) in outcomes.iter().enumerate() {
            match outcome {
                Ok(path) => assert!(i != 7 && fs::read(path).unwrap() == contents[i]),
                Err(error) => assert!(
                    i == 7 && format!("{error:#}").contains("d1/7 exists already"),
                    "{error:#}"
                ),
            }
        }
        assert_eq!(bench.disk.library.totals().0, 19);
        let again = bench
            .disk
            .finish(&finishing[7..8], Existing::Rename)
            .0
            .remove(0)
            .unwrap();
        assert_eq!(again, bench.path("d1/7 (2)"));
        for (want, _) in &wants {
            let known = bench.disk.library.have(&want.id);
            assert_eq!(known, Some(Have::Complete));
        }
        drop(bench.temp);
    }

    #[tokio::test]
    async fn only_a_regular_file_is_overwritten() {
        let bench = Bench::new();
        let bytes = content(5 * PIECE, 0);
        let (want, manifest) = wanted("f", &bytes);
        fs::create_dir(bench.path("f")).unwrap();
        assert!(bench.disk.look(&want, Existing::Overwrite).is_err());
        let opened = bench.open(&want, &want.target, &manifest);
        fetch(&opened.storage, &bytes);
        assert!(
            bench
                .finish(&opened.storage, &want, Existing::Overwrite)
                .is_err(),
            "it changed its type meanwhile"
        );
        fs::remove_dir(bench.path("f")).unwrap();
        bench
            .finish(&opened.storage, &want, Existing::Overwrite)
            .unwrap();
    }

    #[tokio::test]
    async fn a_journal_that_a_crash_left_behind_goes() {
        let bench = Bench::new();
        let bytes = content(5 * PIECE, 0);
        bench.put("f", &bytes);
        fs::write(bench.path("f.journal.part.part"), "left").unwrap();
        let (want, _) = wanted("f", &bytes);
        assert_eq!(
            bench.disk.look(&want, Existing::Refuse).unwrap(),
            Target::Identical(bench.path("f"))
        );
        assert_eq!(fs::read_dir(bench.path("")).unwrap().count(), 1);
    }
}
