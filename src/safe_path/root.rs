//! Files beneath an open folder: opened for reading, or made as the `.part` of a download.
//!
//! Invariant: every open and rename goes through a descriptor of a folder that was reached from the root without
//! following a link. Names are resolved by `openat2` with "beneath, no symbolic links, no magic links"; where that call
//! is missing (kernels before 5.6, old sandboxes) the same is done one component at a time. A `.part` belongs to one
//! writer, who holds an exclusive lock on it; a `.part` of an earlier run is handed out again, and its bytes count for
//! nothing until the caller has verified them.
//!
//! A root keeps some of the folders beneath it open, so that the files of a tree do not walk to theirs again and again. Like the
//! root itself they are the folders they were when they were opened, wherever they may have moved since.

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::{
        AtFlags, FlockOperation, Mode, OFlags, ResolveFlags, flock, mkdirat, openat, openat2,
        statat,
    },
    io::{Errno, retry_on_intr},
};

use super::{
    SafeName, absolute,
    part::{Folder, NamedPart, PartFile, part_name},
    refuse, with_path,
};

/// How often a `.part` is opened anew when another process publishes or removes it between our open and our lock.
const PART_ATTEMPTS: u32 = 8;
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);
/// Never waits for the other end of a FIFO; means nothing to regular files.
const NO_WAIT: OFlags = OFlags::NONBLOCK;

/// Opens a relative path of plain components beneath a folder, without following any link.
type OpenBeneath = fn(BorrowedFd<'_>, &Path, OFlags, Mode) -> rustix::io::Result<OwnedFd>;

/// Folders beneath a root that are kept open.
const MAX_FOLDERS: usize = 128;

/// An open folder, and the only way to reach files beneath it. Cheap to clone; keeps to the folder it opened, even if
/// another one takes its path.
#[derive(Clone, Debug)]
pub struct Root {
    top: Arc<Folder>,
    path: Arc<Path>,
    open: OpenBeneath,
    /// By path relative to the root.
    folders: Arc<Mutex<HashMap<PathBuf, Arc<Folder>>>>,
}

impl Root {
    /// Opens an existing folder. The path of the folder itself may lead through symbolic links.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = absolute(path)?;
        let dir = rustix::fs::open(&path, FOLDER | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| with_path(&path, e))?;
        let top = Arc::new(Folder::new(dir.into(), path.clone(), None)?);
        Ok(Self {
            top,
            path: path.into(),
            open: open_beneath,
            folders: Arc::default(),
        })
    }

    /// Opens a folder and makes it first if it does not exist, with its parents.
    pub fn open_or_create(path: &Path) -> io::Result<Self> {
        let is_file = |e: &io::Error| e.kind() == io::ErrorKind::AlreadyExists;
        fs::create_dir_all(path)
            .map_err(|e| with_path(path, if is_file(&e) { Errno::NOTDIR.into() } else { e }))?;
        Self::open(path)
    }

    /// The folder's absolute path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same, to be kept.
    pub fn shared_path(&self) -> Arc<Path> {
        self.path.clone()
    }

    /// Opens a regular file beneath the folder for reading, without following links and without ever waiting. Fails for
    /// anything else: a FIFO, socket, device or folder, and a path that is absolute or has `..` in it.
    pub fn open_file(&self, relative: &Path) -> io::Result<File> {
        self.open_described(relative).map(|(file, _)| file)
    }

    /// As [`open_file`](Self::open_file), with what the file system says of it.
    pub fn open_described(&self, relative: &Path) -> io::Result<(File, Metadata)> {
        open_regular(self.open, self.top.as_fd(), &self.path, relative)
    }

    /// Opens the folder that holds, or would hold, the file of this name; `None` if there is none. Fails if one on the way
    /// is a link or not a folder.
    pub fn folder_of(&self, name: &SafeName) -> io::Result<Option<Arc<Folder>>> {
        let relative = parent(name);
        if relative == Path::new("") {
            return Ok(Some(self.top.clone()));
        }
        if let Some(known) = self.lock_folders().get(relative) {
            return Ok(Some(known.clone()));
        }
        let path = self.path.join(relative);
        match (self.open)(self.top.as_fd(), relative, FOLDER, Mode::empty()) {
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(with_path(&path, e)),
            Ok(dir) => Ok(Some(
                self.keep(relative, Folder::new(dir.into(), path, None)?),
            )),
        }
    }

    /// The folder that holds, or would hold, the file of this name; if there is none, that of the root.
    pub fn nearest_folder(&self, name: &SafeName) -> Arc<Folder> {
        let found = self.folder_of(name).ok().flatten();
        found.unwrap_or_else(|| self.top.clone())
    }

    /// Whether anything has this name, a symbolic link included. Fails if a parent is a link or not a folder.
    pub fn exists(&self, name: &SafeName) -> io::Result<bool> {
        self.folder_of(name)?
            .map_or(Ok(false), |folder| folder.has(name.file_name()))
    }

    /// Opens or creates the `.part` of a file to be, making its parent folders beneath the root, and locks it. Neither is
    /// durable before [`Folder::sync`].
    ///
    /// `WouldBlock` means that another download, of this or another process, is writing it. A `.part` that is a link,
    /// not a regular file, or known under another name too, is refused. Whether the target exists matters only when it
    /// gets its name.
    pub fn create_part(&self, name: &SafeName) -> io::Result<PartFile> {
        let mut folder = self.make_folder(parent(name))?;
        let part = part_name(name.file_name());
        let path = || self.path.join(name.as_path()).with_file_name(&part);
        let mut is_fresh = false;
        for _ in 0..PART_ATTEMPTS {
            let (file, existed) = match self.open_or_create_at(&folder, &part) {
                Err(Errno::EXIST) => continue,
                // A folder that was kept open may have been removed.
                Err(Errno::NOENT) if !is_fresh => {
                    self.lock_folders().clear();
                    folder = self.make_folder(parent(name))?;
                    is_fresh = true;
                    continue;
                }
                other => other.map_err(|e| with_path(&path(), e))?,
            };
            if existed {
                must_be_ours_alone(&file, path)?;
            }
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    return Err(refuse(
                        io::ErrorKind::WouldBlock,
                        &path(),
                        "another download is writing it",
                    ));
                }
                other => other.map_err(|e| with_path(&path(), e))?,
            }
            let found = statat(&folder, &part, AtFlags::SYMLINK_NOFOLLOW);
            let id = must_be_ours_alone(&file, path)?;
            match found {
                Ok(found) if (found.st_dev, found.st_ino) == id => {
                    let part = Some(NamedPart {
                        name: part,
                        id,
                        existed,
                    });
                    return Ok(PartFile::new(
                        self.path.clone(),
                        folder,
                        name.clone(),
                        file,
                        part,
                    ));
                }
                Ok(_) | Err(Errno::NOENT) => {}
                Err(e) => return Err(with_path(&path(), e)),
            }
        }
        Err(refuse(
            io::ErrorKind::WouldBlock,
            &path(),
            "another process keeps replacing it",
        ))
    }

    /// As [`create_part`](Self::create_part), but where that is as safe the file has no `.part`, and vanishes unless it gets
    /// its name.
    pub fn create_unnamed(&self, name: &SafeName) -> io::Result<PartFile> {
        let folder = self.make_folder(parent(name))?;
        let (flags, mode) = (OFlags::RDWR | OFlags::TMPFILE, Mode::from_raw_mode(0o666));
        let open = || (self.open)(folder.as_fd(), Path::new("."), flags, mode).ok();
        match folder.takes_unnamed().then(open).flatten() {
            Some(file) => Ok(PartFile::new(
                self.path.clone(),
                folder,
                name.clone(),
                file.into(),
                None,
            )),
            // If nothing can be made at all, this says why.
            None => self.create_part(name),
        }
    }

    /// The folder of this path, made if it is missing, with those above it.
    fn make_folder(&self, relative: &Path) -> io::Result<Arc<Folder>> {
        let Some(name) = relative.file_name() else {
            return Ok(self.top.clone());
        };
        if let Some(known) = self.lock_folders().get(relative) {
            return Ok(known.clone());
        }
        let above = self.make_folder(relative.parent().unwrap_or_else(|| Path::new("")))?;
        let path = self.path.join(relative);
        let open = || (self.open)(above.as_fd(), Path::new(name), FOLDER, Mode::empty());
        let (mut found, mut made_in) = (open(), None);
        if let Err(Errno::NOENT) = found {
            match mkdirat(&above, name, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(with_path(&path, e)),
            }
            (found, made_in) = (open(), Some(above.clone()));
        }
        let dir = found.map_err(|e| with_path(&path, e))?;
        Ok(self.keep(relative, Folder::new(dir.into(), path, made_in)?))
    }

    fn keep(&self, relative: &Path, folder: Folder) -> Arc<Folder> {
        let mut folders = self.lock_folders();
        if folders.len() >= MAX_FOLDERS {
            folders.clear();
        }
        folders
            .entry(relative.to_path_buf())
            .or_insert_with(|| Arc::new(folder))
            .clone()
    }

    fn lock_folders(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<Folder>>> {
        self.folders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of this name, and whether it was there before. EXIST: somebody was quicker, try again.
    fn open_or_create_at(&self, folder: &Folder, name: &str) -> rustix::io::Result<(File, bool)> {
        let (name, flags) = (Path::new(name), OFlags::RDWR | NO_WAIT);
        let create = flags | OFlags::CREATE | OFlags::EXCL;
        match (self.open)(folder.as_fd(), name, create, Mode::from_raw_mode(0o666)) {
            Err(Errno::EXIST) => {}
            other => return other.map(|fd| (fd.into(), false)),
        }
        match (self.open)(folder.as_fd(), name, flags, Mode::empty()) {
            Err(Errno::NOENT) => Err(Errno::EXIST),
            other => other.map(|fd| (fd.into(), true)),
        }
    }
}

/// Opens a regular file beneath a folder as [`Root::open_described`] does, and keeps neither the folder nor one on the way
/// open.
pub fn open_beneath_folder(folder: &Path, relative: &Path) -> io::Result<(File, Metadata)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = retry_on_intr(|| rustix::fs::open(folder, flags, Mode::empty()))
        .map_err(|e| with_path(folder, e))?;
    open_regular(open_beneath, dir.as_fd(), folder, relative)
}

fn open_regular(
    open: OpenBeneath,
    dir: BorrowedFd<'_>,
    root: &Path,
    relative: &Path,
) -> io::Result<(File, Metadata)> {
    let path = || root.join(relative);
    let is_plain = |c: Component<'_>| matches!(c, Component::Normal(_));
    if relative.as_os_str().is_empty() || !relative.components().all(is_plain) {
        return Err(refuse(
            io::ErrorKind::InvalidInput,
            &path(),
            "not a path inside the folder",
        ));
    }
    let file: File = open(dir, relative, OFlags::RDONLY | NO_WAIT, Mode::empty())
        .map_err(|e| with_path(&path(), e))?
        .into();
    let metadata = file.metadata().map_err(|e| with_path(&path(), e))?;
    if !metadata.is_file() {
        return Err(refuse(
            io::ErrorKind::InvalidInput,
            &path(),
            "not a regular file",
        ));
    }
    Ok((file, metadata))
}

/// The folder part of a name; empty for a file at the top.
fn parent(name: &SafeName) -> &Path {
    Path::new(name.folder())
}

/// Refuses what must not be written to: a FIFO, a device, a file that has another name elsewhere. Returns device and inode.
fn must_be_ours_alone(file: &File, path: impl Fn() -> PathBuf) -> io::Result<(u64, u64)> {
    let metadata = file.metadata().map_err(|e| with_path(&path(), e))?;
    if !metadata.is_file() {
        return Err(refuse(
            io::ErrorKind::InvalidInput,
            &path(),
            "in the way, and not a regular file",
        ));
    }
    if metadata.nlink() > 1 {
        return Err(refuse(
            io::ErrorKind::InvalidInput,
            &path(),
            "in the way, and a hard link to another file",
        ));
    }
    Ok((metadata.dev(), metadata.ino()))
}

/// Opens through `openat2`, or component by component where that call does not exist. EPERM is what older container
/// sandboxes answer to calls they do not know; a file that is truly forbidden stays forbidden on the second way.
fn open_beneath(
    dir: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: Mode,
) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match retry_on_intr(|| openat2(dir, path, flags, mode, resolve)) {
        Err(Errno::NOSYS | Errno::PERM) => open_stepwise(dir, path, flags, mode),
        other => other,
    }
}

/// What `open_beneath` does, for kernels without `openat2`: no component may be a link, so none leads outside.
fn open_stepwise(
    dir: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: Mode,
) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut components = path.components().peekable();
    let mut parent: Option<OwnedFd> = None;
    while let Some(component) = components.next() {
        let Component::Normal(name) = component else {
            return Err(Errno::XDEV);
        };
        let at = parent.as_ref().map_or(dir, AsFd::as_fd);
        if components.peek().is_none() {
            return retry_on_intr(|| openat(at, name, flags, mode));
        }
        let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        parent = Some(retry_on_intr(|| openat(at, name, step, Mode::empty()))?);
    }
    Err(Errno::NOENT)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{
            fs::{FileExt, symlink},
            net::UnixListener,
        },
        sync::atomic::{AtomicBool, AtomicU32, Ordering},
        thread,
    };

    use rustix::fs::{CWD, FileType, RenameFlags, mknodat, renameat_with};
    use tempfile::TempDir;

    use super::{
        super::{
            MAX_COMPONENT_LEN, PART_SUFFIX,
            part::{PublishError, link_to_free_name, rename_to_claimed_name},
        },
        *,
    };

    /// A downloads folder beside a folder that must stay empty.
    struct World {
        _temp: TempDir,
        downloads: PathBuf,
        outside: PathBuf,
    }

    impl World {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            let (downloads, outside) = (temp.path().join("downloads"), temp.path().join("outside"));
            fs::create_dir(&downloads).unwrap();
            fs::create_dir(&outside).unwrap();
            Self {
                _temp: temp,
                downloads,
                outside,
            }
        }

        fn assert_nothing_outside(&self) {
            assert_eq!(fs::read_dir(&self.outside).unwrap().count(), 0);
        }
    }

    fn name(text: &str) -> SafeName {
        SafeName::parse(text).unwrap()
    }

    fn fifo(path: &Path) {
        mknodat(CWD, path, FileType::Fifo, 0o600.into(), 0).unwrap();
    }

    /// Runs a test in a fresh world on both ways of opening: `openat2`, and the one for kernels without it.
    fn on_both_ways(test: impl Fn(&World, &Root)) {
        for open in [open_beneath as OpenBeneath, open_stepwise] {
            let world = World::new();
            let root = Root {
                open,
                ..Root::open(&world.downloads).unwrap()
            };
            test(&world, &root);
            world.assert_nothing_outside();
        }
    }

    impl PartFile {
        fn publish(&self) -> Result<PathBuf, PublishError> {
            self.publish_as(&self.name)
        }

        fn publish_as(&self, name: &SafeName) -> Result<PathBuf, PublishError> {
            self.sync()?;
            let path = self.rename_to(name)?;
            self.folder().sync()?;
            Ok(path)
        }
    }

    fn download(root: &Root, text: &str, bytes: &[u8]) -> Result<PathBuf, PublishError> {
        let part = root.create_part(&name(text))?;
        part.file().write_all_at(bytes, 0)?;
        part.publish()
    }

    #[test]
    fn a_file_is_made_locked_and_published_with_its_folders() {
        on_both_ways(|world, root| {
            let part = root.create_part(&name("a/b/c.bin")).unwrap();
            assert!(!part.existed() && !root.exists(&name("a/b/c.bin")).unwrap());
            assert!(world.downloads.join("a/b/c.bin.part").is_file());
            let busy = root.create_part(&name("a/b/c.bin")).unwrap_err();
            assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
            part.file().write_all_at(b"bytes", 0).unwrap();
            let path = part.publish().unwrap();
            assert_eq!(path, world.downloads.join("a/b/c.bin"));
            assert_eq!(fs::read(&path).unwrap(), b"bytes");
            assert!(root.exists(&name("a/b/c.bin")).unwrap());
            assert_eq!(
                fs::read_dir(path.parent().unwrap()).unwrap().count(),
                1,
                "no .part is left"
            );
            assert!(!root.exists(&name("a/no/such")).unwrap());
        });
    }

    #[test]
    fn a_file_without_a_name_gets_one_that_is_free_or_vanishes() {
        on_both_ways(|world, root| {
            let at = |text: &str| world.downloads.join(text);
            let n_files = || fs::read_dir(&world.downloads).unwrap().count();
            let make = |bytes: &[u8]| {
                let part = root.create_unnamed(&name("x")).unwrap();
                part.file().write_all_at(bytes, 0).unwrap();
                part
            };
            let part = make(b"gone");
            assert_eq!(
                n_files(),
                usize::from(!part.is_unnamed()),
                "no name, or a .part"
            );
            part.discard().unwrap();
            drop(part);
            assert_eq!(n_files(), 0);
            let part = make(b"first");
            assert_eq!(part.publish().unwrap(), at("x"));
            assert!(
                part.publish_as(&name("folder/x")).is_err(),
                "another folder"
            );
            let second = make(b"second");
            assert!(matches!(second.publish(), Err(PublishError::Exists(path)) if path == at("x")));
            assert_eq!(fs::read(at("x")).unwrap(), b"first");
            assert_eq!(second.rename_over(&name("x")).unwrap(), at("x"));
            assert_eq!(
                (fs::read(at("x")).unwrap(), n_files()),
                (b"second".to_vec(), 1)
            );
            let third = make(b"third");
            assert_eq!(
                third.publish_as(&name("x").numbered(2).unwrap()).unwrap(),
                at("x (2)")
            );
        });
        let world = World::new();
        let root = Root::open(&world.downloads).unwrap();
        assert_eq!(
            root.create_unnamed(&name("x")).unwrap().is_unnamed(),
            root.top.takes_unnamed()
        );
    }

    /// As after one that was written under a name of its own and renamed.
    #[test]
    fn who_watches_a_folder_hears_of_a_file_that_had_no_name() {
        use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
        let world = World::new();
        let queue = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(
            &queue,
            &world.downloads,
            WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO,
        )
        .unwrap();
        let root = Root::open(&world.downloads).unwrap();
        let part = root.create_unnamed(&name("x")).unwrap();
        part.file().write_all_at(b"bytes", 0).unwrap();
        part.publish().unwrap();
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&queue, &mut buffer);
        let event = events.next().unwrap();
        assert_eq!(
            event.file_name().map(|name| name.to_bytes()),
            Some(&b"x"[..])
        );
        assert!(
            event
                .events()
                .intersects(ReadFlags::CLOSE_WRITE | ReadFlags::MOVED_TO)
        );
    }

    #[test]
    fn a_part_of_an_earlier_run_is_handed_out_again_and_can_be_discarded() {
        on_both_ways(|world, root| {
            let part = root.create_part(&name("x")).unwrap();
            part.file().write_all_at(b"half", 0).unwrap();
            drop(part);
            let part = root.create_part(&name("x")).unwrap();
            assert!(part.existed());
            assert_eq!(part.file().metadata().unwrap().len(), 4);
            part.discard().unwrap();
            assert_eq!(fs::read_dir(&world.downloads).unwrap().count(), 0);
        });
    }

    #[test]
    fn a11_a22_nothing_is_ever_replaced() {
        on_both_ways(|world, root| {
            let at = |text: &str| world.downloads.join(text);
            fs::write(at("file"), "old").unwrap();
            fs::create_dir(at("folder")).unwrap();
            symlink(world.outside.join("target"), at("link")).unwrap();
            symlink(at("nowhere"), at("dangling")).unwrap();
            fifo(&at("fifo"));
            for taken in ["file", "folder", "link", "dangling", "fifo"] {
                assert!(root.exists(&name(taken)).unwrap(), "{taken}");
                let kind = fs::symlink_metadata(at(taken)).unwrap().file_type();
                let part = root.create_part(&name(taken)).unwrap();
                part.file().write_all_at(b"new", 0).unwrap();
                match part.publish() {
                    Err(PublishError::Exists(path)) => assert_eq!(path, at(taken)),
                    other => panic!("{taken}: {other:?}"),
                }
                assert_eq!(fs::symlink_metadata(at(taken)).unwrap().file_type(), kind);
                let second = part.publish_as(&name(taken).numbered(2).unwrap()).unwrap();
                assert_eq!(
                    (fs::read(&second).unwrap(), second),
                    (b"new".to_vec(), at(&format!("{taken} (2)")))
                );
            }
            assert_eq!(fs::read(at("file")).unwrap(), b"old");
            let part = root.create_part(&name("y")).unwrap();
            assert!(
                matches!(part.publish_as(&name("folder/y")), Err(PublishError::Io(_))),
                "another folder"
            );
        });
    }

    #[test]
    fn a22_a23_a_part_that_is_not_a_file_of_ours_is_refused() {
        on_both_ways(|world, root| {
            let at = |text: &str| world.downloads.join(text);
            fs::write(at("other"), "precious").unwrap();
            fs::hard_link(at("other"), at("hard.part")).unwrap();
            symlink(at("other"), at("soft.part")).unwrap();
            symlink(world.outside.join("new"), at("away.part")).unwrap();
            fs::create_dir(at("folder.part")).unwrap();
            fifo(&at("fifo.part"));
            let _socket = UnixListener::bind(at("socket.part")).unwrap();
            for odd in ["hard", "soft", "away", "folder", "fifo", "socket"] {
                let error = root.create_part(&name(odd)).unwrap_err().to_string();
                assert!(error.contains(&format!("{odd}.part")), "{error}");
            }
            assert_eq!(fs::read(at("other")).unwrap(), b"precious");
        });
    }

    #[test]
    fn a21_a23_a_parent_that_is_a_link_or_a_file() {
        on_both_ways(|world, root| {
            symlink(&world.outside, world.downloads.join("link")).unwrap();
            symlink(&world.downloads, world.downloads.join("round")).unwrap();
            fs::write(world.downloads.join("file"), "old").unwrap();
            for parent in ["link", "round", "file"] {
                for text in [format!("{parent}/x"), format!("{parent}/new/x")] {
                    let error = root.create_part(&name(&text)).unwrap_err().to_string();
                    assert!(error.contains(&format!("downloads/{parent}: ")), "{error}");
                    assert!(root.exists(&name(&text)).is_err());
                    assert!(root.open_file(Path::new(&text)).is_err());
                }
            }
            assert_eq!(fs::read(world.downloads.join("file")).unwrap(), b"old");
            download(root, "other/x", b"goes on").unwrap();
        });
    }

    #[test]
    fn a24_a_parent_swapped_with_a_link_while_writing() {
        on_both_ways(|world, root| {
            let (real, link) = (world.downloads.join("a"), world.downloads.join("b"));
            fs::create_dir_all(real.join("deep")).unwrap();
            symlink(&world.outside, &link).unwrap();
            let (stop, n_swaps) = (AtomicBool::new(false), AtomicU32::new(0));
            let mut n_written = 0;
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        renameat_with(CWD, &real, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                        n_swaps.fetch_add(1, Ordering::Relaxed);
                    }
                });
                let mut n_tried = 0;
                while n_tried < 400 || n_written == 0 || n_swaps.load(Ordering::Relaxed) < 500 {
                    n_tried += 1;
                    for text in [
                        format!("a/f{n_tried}"),
                        format!("a/deep/f{n_tried}"),
                        format!("a/new{n_tried}/f"),
                    ] {
                        let Ok(part) = root.create_part(&name(&text)) else {
                            continue;
                        };
                        part.file().write_all_at(b"bytes", 0).unwrap();
                        n_written += 1;
                        if n_tried % 16 == 0 {
                            part.publish().unwrap();
                        }
                    }
                }
                stop.store(true, Ordering::Relaxed);
            });
        });
    }

    #[test]
    fn a25_the_downloads_folder_itself_is_replaced() {
        on_both_ways(|world, root| {
            let part = root.create_part(&name("a/x")).unwrap();
            let moved = world.downloads.with_file_name("moved");
            fs::rename(&world.downloads, &moved).unwrap();
            symlink(&world.outside, &world.downloads).unwrap();
            part.file().write_all_at(b"bytes", 0).unwrap();
            part.publish().unwrap();
            download(root, "b/y", b"more").unwrap();
            assert!(moved.join("a/x").is_file() && moved.join("b/y").is_file());
        });
    }

    #[test]
    fn a26_both_ways_agree_on_links_and_dots() {
        let world = World::new();
        fs::create_dir_all(world.downloads.join("a/b")).unwrap();
        fs::write(world.downloads.join("a/b/f"), "x").unwrap();
        symlink("b", world.downloads.join("a/l")).unwrap();
        symlink("b/f", world.downloads.join("a/lf")).unwrap();
        let dir = File::open(&world.downloads).unwrap();
        for path in [
            "a/b/f",
            "a/b",
            "a",
            "a/l/f",
            "a/l",
            "a/lf",
            "../outside",
            "a/../../outside",
            "/etc/passwd",
            "a/x",
            "",
        ] {
            let open =
                |way: OpenBeneath| way(dir.as_fd(), Path::new(path), OFlags::RDONLY, Mode::empty());
            assert_eq!(
                open(open_beneath).is_ok(),
                open(open_stepwise).is_ok(),
                "{path}"
            );
        }
    }

    #[test]
    fn a27_magic_links_are_not_followed() {
        for open in [open_beneath as OpenBeneath, open_stepwise] {
            let secret = File::open("/proc/self/exe").unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&secret);
            let root = Root {
                open,
                ..Root::open(Path::new("/proc")).unwrap()
            };
            for text in [
                format!("self/fd/{fd}"),
                format!("{}/fd/{fd}", std::process::id()),
                "self/root/etc/passwd".into(),
            ] {
                assert!(root.open_file(Path::new(&text)).is_err(), "{text}");
                assert!(root.create_part(&name(&text)).is_err(), "{text}");
            }
            assert!(root.open_file(Path::new("version")).is_ok());
        }
    }

    #[test]
    fn i01_to_i06_only_regular_files_are_read_and_nothing_waits() {
        on_both_ways(|world, root| {
            let at = |text: &str| world.downloads.join(text);
            fs::create_dir_all(at("a/b")).unwrap();
            fs::write(at("a/b/f"), "x").unwrap();
            fs::write(world.downloads.with_file_name("secret"), "s").unwrap();
            assert!(root.open_file(Path::new("a/b/f")).is_ok());
            symlink(world.downloads.with_file_name("secret"), at("out")).unwrap();
            symlink("b/f", at("a/in")).unwrap();
            symlink("self", at("self")).unwrap();
            fifo(&at("fifo"));
            let _socket = UnixListener::bind(at("socket")).unwrap();
            for path in [
                "out",
                "a/in",
                "self",
                "fifo",
                "socket",
                "a",
                "",
                ".",
                "..",
                "../secret",
                "a/../../secret",
                "none",
            ] {
                assert!(root.open_file(Path::new(path)).is_err(), "{path}");
            }
            assert!(
                root.open_file(&world.downloads.with_file_name("secret"))
                    .is_err(),
                "absolute"
            );
            let kind = |path: &str| root.open_file(Path::new(path)).unwrap_err().kind();
            assert_eq!(
                (kind("none"), kind("fifo")),
                (io::ErrorKind::NotFound, io::ErrorKind::InvalidInput)
            );

            fs::rename(at("a/b"), at("a/c")).unwrap();
            symlink("c", at("a/b")).unwrap();
            assert!(
                root.open_file(Path::new("a/b/f")).is_err(),
                "I-02, I-04: swapped in after indexing"
            );
            fs::remove_file(at("a/c/f")).unwrap();
            fifo(&at("a/c/f"));
            assert!(root.open_file(Path::new("a/c/f")).is_err(), "I-06");
        });
    }

    #[test]
    fn a_part_that_was_moved_away_is_not_published() {
        on_both_ways(|world, root| {
            let part = root.create_part(&name("x")).unwrap();
            fs::rename(
                world.downloads.join("x.part"),
                world.downloads.join("elsewhere"),
            )
            .unwrap();
            fs::write(world.downloads.join("x.part"), "planted").unwrap();
            assert!(matches!(part.publish(), Err(PublishError::Io(_))));
            part.discard().unwrap();
            assert_eq!(
                fs::read(world.downloads.join("x.part")).unwrap(),
                b"planted",
                "not ours to remove"
            );
            assert!(!world.downloads.join("x").exists());
        });
    }

    #[test]
    fn of_many_writers_of_one_name_one_publishes() {
        on_both_ways(|world, root| {
            let n_published = AtomicU32::new(0);
            thread::scope(|scope| {
                for writer in 0..8_u8 {
                    let n_published = &n_published;
                    scope.spawn(move || {
                        for _ in 0..50 {
                            match download(root, "x", &[writer; 64]) {
                                Ok(_) => _ = n_published.fetch_add(1, Ordering::Relaxed),
                                Err(PublishError::Exists(_)) => {}
                                Err(PublishError::Io(e)) => {
                                    assert_eq!(e.kind(), io::ErrorKind::WouldBlock, "{e}")
                                }
                            }
                        }
                    });
                }
            });
            let bytes = fs::read(world.downloads.join("x")).unwrap();
            assert!(n_published.into_inner() == 1 && bytes == [bytes[0]; 64]);
        });
    }

    #[test]
    fn j23_the_rename_for_network_file_systems_replaces_nothing_either() {
        let world = World::new();
        let root = Root::open(&world.downloads).unwrap();
        fs::write(world.downloads.join("from"), "new").unwrap();
        fs::write(world.downloads.join("taken"), "old").unwrap();
        assert_eq!(
            link_to_free_name(&root.top, "from", "taken"),
            Err(Errno::EXIST)
        );
        link_to_free_name(&root.top, "from", "free").unwrap();
        assert_eq!(fs::read(world.downloads.join("taken")).unwrap(), b"old");
        assert!(!world.downloads.join("from").exists() && world.downloads.join("free").exists());
    }

    #[test]
    fn a_name_can_be_claimed_without_links_and_flags() {
        let world = World::new();
        let root = Root::open(&world.downloads).unwrap();
        let at = |text: &str| world.downloads.join(text);
        fs::write(at("from"), "new").unwrap();
        fs::write(at("taken"), "old").unwrap();
        fs::create_dir(at("folder")).unwrap();
        symlink(at("nowhere"), at("link")).unwrap();
        for taken in ["taken", "folder", "link"] {
            assert_eq!(
                rename_to_claimed_name(&root.top, "from", taken),
                Err(Errno::EXIST),
                "{taken}"
            );
        }
        assert_eq!(fs::read(at("taken")).unwrap(), b"old");
        assert_eq!(
            rename_to_claimed_name(&root.top, "not there", "free"),
            Err(Errno::NOENT)
        );
        assert!(!at("free").exists(), "the claim is given up");
        rename_to_claimed_name(&root.top, "from", "free").unwrap();
        assert_eq!(fs::read(at("free")).unwrap(), b"new");
        assert!(!at("from").exists());
    }

    #[test]
    fn a_trial_leaves_nothing_behind() {
        let world = World::new();
        let root = Root::open(&world.downloads).unwrap();
        root.nearest_folder(&name("not/there"))
            .try_file(100_000)
            .unwrap();
        assert_eq!(fs::read_dir(&world.downloads).unwrap().count(), 0);
    }

    #[test]
    fn only_a_regular_file_is_replaced_and_only_when_asked() {
        on_both_ways(|world, root| {
            let at = |text: &str| world.downloads.join(text);
            fs::write(at("file"), "old").unwrap();
            fs::hard_link(at("file"), at("other")).unwrap();
            fs::create_dir(at("folder")).unwrap();
            symlink(at("other"), at("link")).unwrap();
            fifo(&at("fifo"));
            for taken in ["folder", "link", "fifo"] {
                let kind = fs::symlink_metadata(at(taken)).unwrap().file_type();
                let part = root.create_part(&name(taken)).unwrap();
                assert!(
                    matches!(part.rename_over(&name(taken)), Err(PublishError::Exists(path)) if path == at(taken))
                );
                assert_eq!(fs::symlink_metadata(at(taken)).unwrap().file_type(), kind);
                part.discard().unwrap();
            }
            for text in ["file", "free"] {
                let part = root.create_part(&name(text)).unwrap();
                part.file().write_all_at(b"new", 0).unwrap();
                assert_eq!(part.rename_over(&name(text)).unwrap(), at(text));
                assert_eq!(fs::read(at(text)).unwrap(), b"new");
                assert!(!at(&format!("{text}.part")).exists());
            }
            assert_eq!(
                fs::read(at("other")).unwrap(),
                b"old",
                "another name of the old file keeps it"
            );
        });
    }

    #[test]
    fn a_journal_is_replaced_as_a_whole_and_nothing_else_is_taken_for_one() {
        on_both_ways(|world, root| {
            let journal = world.downloads.join("x.journal.part.part");
            let part = root.create_part(&name("x")).unwrap();
            assert_eq!(part.read_journal(10), None);
            part.write_journal(b"one").unwrap();
            part.write_journal(b"second").unwrap();
            assert_eq!(part.read_journal(6), Some(b"second".to_vec()));
            assert_eq!(part.read_journal(5), None, "too long");
            assert_eq!(fs::read_dir(&world.downloads).unwrap().count(), 2);
            assert!(
                SafeName::parse("x.journal.part.part").is_err(),
                "hidden, and nobody's name"
            );
            part.remove_journal().unwrap();
            part.remove_journal().unwrap();
            for plant in [
                |at: &Path| fifo(at),
                |at: &Path| symlink("/etc/passwd", at).unwrap(),
            ] {
                plant(&journal);
                assert_eq!(part.read_journal(10_000), None);
                part.write_journal(b"third").unwrap();
                assert!(fs::symlink_metadata(&journal).unwrap().is_file());
                part.remove_journal().unwrap();
            }
            fs::create_dir(&journal).unwrap();
            assert!(part.write_journal(b"fourth").is_err());
            assert_eq!(
                fs::read_dir(&world.downloads).unwrap().count(),
                2,
                "nothing half is left"
            );
            let long = root.create_part(&name(&"x".repeat(255))).unwrap();
            long.write_journal(b"long").unwrap();
            assert_eq!(long.read_journal(4), Some(b"long".to_vec()));
        });
    }

    #[test]
    fn a_folder_that_was_removed_meanwhile_is_made_again() {
        on_both_ways(|world, root| {
            download(root, "a/b/x", b"1").unwrap();
            fs::remove_dir_all(world.downloads.join("a")).unwrap();
            let path = download(root, "a/b/x", b"2").unwrap();
            assert_eq!(fs::read(path).unwrap(), b"2");
        });
    }

    #[test]
    fn folders_kept_open_are_few() {
        let world = World::new();
        let root = Root::open(&world.downloads).unwrap();
        for i in 0..3 * MAX_FOLDERS {
            download(&root, &format!("d{i}/x"), b"x").unwrap();
            assert!(root.lock_folders().len() <= MAX_FOLDERS);
        }
    }

    #[test]
    fn a12_the_longest_names_have_parts_of_their_own() {
        on_both_ways(|_, root| {
            let (one, other) = ("x".repeat(254) + "1", "x".repeat(254) + "2");
            let held = root.create_part(&name(&one)).unwrap();
            download(root, &other, b"2").unwrap();
            held.publish().unwrap();
            let wide = "é".repeat(127);
            assert!(
                part_name(&wide).len() <= MAX_COMPONENT_LEN
                    && part_name(&wide).ends_with(PART_SUFFIX)
            );
            download(root, &wide, b"3").unwrap();
            download(root, &[wide.as_str(); 4].join("/"), b"4").unwrap_err();
        });
    }

    #[test]
    fn a_root_must_be_a_folder_and_may_be_made() {
        let world = World::new();
        let missing = world.downloads.join("new/deeper");
        let error = Root::open(&missing).unwrap_err();
        assert!(
            error.kind() == io::ErrorKind::NotFound && error.to_string().contains("new/deeper"),
            "{error}"
        );
        assert_eq!(Root::open_or_create(&missing).unwrap().path(), missing);
        fs::write(world.downloads.join("file"), "").unwrap();
        assert!(Root::open(&world.downloads.join("file")).is_err());
        let error = Root::open_or_create(&world.downloads.join("file"))
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("/file: a file or link is where a folder is needed"),
            "{error}"
        );
        symlink(&world.outside, world.downloads.join("link")).unwrap();
        assert!(
            Root::open(&world.downloads.join("link")).is_ok(),
            "the root's own path is the user's choice"
        );
    }
}
