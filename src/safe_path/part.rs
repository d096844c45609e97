//! A file on its way to its name, the journal beside it, and the folder that holds both.
//!
//! Invariant: everything happens through the open folder, on plain names in it. A name that is taken is left alone
//! unless the caller asks for it and a regular file has it. What a call says is durable is so; the rest is not before
//! [`Folder::sync`] or [`PartFile::sync`].
//!
//! The names of our own files end in `.part` and `.part.part`. No [`SafeName`] ends in `.part`, so that no two files of
//! ours meet, whatever the downloads are called.
//!
//! A file that is not worth keeping half-done has no name before it is whole, where that is as safe (`O_TMPFILE`): a kill
//! leaves nothing, nobody else can write to it, and a folder that changes once for each of thousands of files instead of twice
//! costs half the time. 10,000 x 4 KiB made by two threads and named by a third, ms of CPU on tmpfs: 245 and 150. Safe it is
//! on file systems that are known to have the bytes of such a file durable with its name (btrfs does not, before 6.16), and
//! since kernels heed the umask of whoever makes one.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Once, PoisonError},
};

use rustix::{
    fs::{
        AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, fallocate, fstatfs,
        linkat, openat, renameat, renameat_with, statat, syncfs, unlinkat,
    },
    io::{Errno, retry_on_intr},
};
use thiserror::Error;

use super::{MAX_COMPONENT_LEN, PART_SUFFIX, SafeName, cut, refuse, with_path};

const JOURNAL_SUFFIX: &str = ".journal.part.part";
const NEW_JOURNAL_SUFFIX: &str = ".journal-new.part.part";
const OWN_SUFFIX: &str = ".part.part";
const TRIAL: &str = ".room.part.part";
/// The first Linux whose `syncfs` tells of failed writes.
const SYNCFS_TELLS: (u32, u32) = (5, 8);
/// The first Linux that heeds the umask everywhere when it makes a file without a name.
const HEEDS_UMASK: (u32, u32) = (6, 0);
/// Their numbers, from linux/magic.h: ext4, XFS, tmpfs.
const CAN_NAME_LATER: [u32; 3] = [0xef53, 0x5846_5342, 0x0102_1994];

/// Once in the life of a process.
static SAID: Once = Once::new();

/// An open folder beneath a root.
#[derive(Debug)]
pub struct Folder {
    dir: File,
    device: u64,
    path: PathBuf,
    is_new: bool,
    takes_unnamed: bool,
    /// The folder that this one was made in, until that is durable.
    made_in: Mutex<Option<Arc<Self>>>,
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl Folder {
    pub(super) fn new(dir: File, path: PathBuf, made_in: Option<Arc<Self>>) -> io::Result<Self> {
        let device = dir.metadata().map_err(|e| with_path(&path, e))?.dev();
        let kind = fstatfs(&dir).map_err(|e| with_path(&path, e))?.f_type;
        let takes_unnamed =
            is_kernel(HEEDS_UMASK) && CAN_NAME_LATER.iter().any(|known| i64::from(*known) == kind);
        Ok(Self {
            dir,
            device,
            path,
            is_new: made_in.is_some(),
            takes_unnamed,
            made_in: Mutex::new(made_in),
        })
    }

    /// Whether a file without a name is as safe here as one with.
    pub(super) fn takes_unnamed(&self) -> bool {
        self.takes_unnamed
    }

    /// The file system that its files are on.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// Whether anything in it has this name, a symbolic link included.
    pub fn has(&self, file_name: &str) -> io::Result<bool> {
        match statat(self, file_name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            other => other
                .map(|_| true)
                .map_err(|e| with_path(&self.path.join(file_name), e)),
        }
    }

    /// Whether a download of a file of this name has a journal here.
    pub fn has_journal(&self, file_name: &str) -> io::Result<bool> {
        if self.is_new {
            Ok(false)
        } else {
            self.has(&own_name(file_name, JOURNAL_SUFFIX))
        }
    }

    /// Makes its entries durable, and itself if it was made for a download. File systems without such a call keep them in
    /// order by themselves.
    pub fn sync(&self) -> io::Result<()> {
        match self.dir.sync_all() {
            Err(e) if Errno::from_io_error(&e) == Some(Errno::INVAL) => {}
            other => other.map_err(|e| with_path(&self.path, e))?,
        }
        let above = self
            .made_in
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(above) = above {
            above.sync()?;
            *self.made_in.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
    }

    /// Whether a file of so many bytes can be made here now: makes one that vanishes. A quota shows in no other way.
    pub fn try_file(&self, len: u64) -> io::Result<()> {
        let path = || self.path.join(TRIAL);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let named = || {
            let made = openat(
                self,
                TRIAL,
                flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW,
                mode,
            );
            made.inspect(|_| _ = unlinkat(self, TRIAL, AtFlags::empty()))
        };
        let file: File = match openat(self, ".", flags | OFlags::TMPFILE, mode) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => match named() {
                // Somebody else tries, or was killed when it did.
                Err(Errno::EXIST) => return self.remove(TRIAL),
                made => made,
            },
            made => made,
        }
        .map_err(|e| with_path(&path(), e))?
        .into();
        match retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, len)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            done => return done.map_err(|e| with_path(&path(), e)),
        }
        let copied = io::copy(&mut io::repeat(0).take(len), &mut &file);
        copied
            .and_then(|_| file.sync_data())
            .map_err(|e| with_path(&path(), e))
    }

    /// Removes the journal that a finished download of this name left, if a crash kept it from doing so.
    pub fn remove_orphan_journal(&self, file_name: &str) -> io::Result<()> {
        if self.has(&part_name(file_name))? {
            Ok(())
        } else {
            self.remove_journal(file_name)
        }
    }

    fn remove_journal(&self, file_name: &str) -> io::Result<()> {
        self.remove(&own_name(file_name, NEW_JOURNAL_SUFFIX))?;
        self.remove(&own_name(file_name, JOURNAL_SUFFIX))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(self, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            other => other.map_err(|e| with_path(&self.path.join(name), e)),
        }
    }
}

/// Why a finished file did not get its name. The `.part` is still there and still locked.
#[derive(Debug, Error)]
pub enum PublishError {
    /// Something has that name; it was left alone.
    #[error("{} exists already", super::escape(&.0.to_string_lossy()))]
    Exists(PathBuf),
    /// Anything else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A file being downloaded: open for positional reads and writes, and nobody else's to write until dropped. Dropping it
/// leaves the `.part` for a later run, if there is one.
#[derive(Debug)]
pub struct PartFile {
    root: Arc<Path>,
    folder: Arc<Folder>,
    pub(super) name: SafeName,
    file: Arc<File>,
    part: Option<NamedPart>,
}

/// The `.part` of a file that has one.
#[derive(Debug)]
pub(super) struct NamedPart {
    pub(super) name: String,
    /// Device and inode.
    pub(super) id: (u64, u64),
    pub(super) existed: bool,
}

impl PartFile {
    pub(super) fn new(
        root: Arc<Path>,
        folder: Arc<Folder>,
        name: SafeName,
        file: File,
        part: Option<NamedPart>,
    ) -> Self {
        Self {
            root,
            folder,
            name,
            file: Arc::new(file),
            part,
        }
    }

    /// The open file. The lock lasts as long as a handle of it.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The folder it lies in.
    pub fn folder(&self) -> &Arc<Folder> {
        &self.folder
    }

    /// Where the `.part` lies, or the file will, for messages.
    pub fn path(&self) -> PathBuf {
        self.folder.path.join(
            self.part
                .as_ref()
                .map_or_else(|| self.name.file_name(), |part| &part.name),
        )
    }

    /// Device and inode of a `.part`; none of a file without a name.
    pub fn id(&self) -> Option<(u64, u64)> {
        self.part.as_ref().map(|part| part.id)
    }

    /// Whether it has no `.part`.
    pub fn is_unnamed(&self) -> bool {
        self.part.is_none()
    }

    /// Whether the `.part` was left by an earlier run, and may hold pieces worth verifying.
    pub fn existed(&self) -> bool {
        self.part.as_ref().is_some_and(|part| part.existed)
    }

    /// Makes the content and the length durable. After a failure the content is in doubt.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all().map_err(|e| with_path(&self.path(), e))
    }

    /// Makes everything on this file system durable; `None` if a failure might go untold.
    pub fn sync_file_system(&self) -> Option<io::Result<()>> {
        is_kernel(SYNCFS_TELLS).then(|| syncfs(&self.file).map_err(|e| with_path(&self.path(), e)))
    }

    /// Gives the file its final name, which must be free and in the same folder. Returns the absolute path. The caller has
    /// made the content durable, and syncs the folder afterwards.
    pub fn rename_to(&self, name: &SafeName) -> Result<PathBuf, PublishError> {
        let target = self.begin_rename(name)?;
        let named = match &self.part {
            Some(part) => rename_to_free_name(&self.folder, &part.name, name.file_name()),
            None => link_unnamed(&self.file, &self.folder, name.file_name()),
        };
        match named {
            Err(Errno::EXIST) => Err(PublishError::Exists(target)),
            other => Ok(other
                .map(|()| target)
                .map_err(|e| with_path(&self.path(), e))?),
        }
    }

    /// Like [`rename_to`](Self::rename_to), but a regular file of this name is replaced. Anything else in its place is
    /// [`PublishError::Exists`].
    pub fn rename_over(&self, name: &SafeName) -> Result<PathBuf, PublishError> {
        let target = self.begin_rename(name)?;
        match statat(&self.folder, name.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return self.rename_to(name),
            Err(e) => return Err(with_path(&target, e).into()),
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile => {}
            Ok(_) => return Err(PublishError::Exists(target)),
        }
        let rename = |from: &str| renameat(&self.folder, from, &self.folder, name.file_name());
        let replaced = match &self.part {
            Some(part) => rename(&part.name),
            None => {
                // A name that no other file can have.
                let own = own_name(
                    name.file_name(),
                    &format!(".{}{OWN_SUFFIX}", self.file.metadata()?.ino()),
                );
                link_unnamed(&self.file, &self.folder, &own)
                    .and_then(|()| rename(&own).inspect_err(|_| drop(self.folder.remove(&own))))
            }
        };
        Ok(replaced
            .map(|()| target.clone())
            .map_err(|e| with_path(&target, e))?)
    }

    fn begin_rename(&self, name: &SafeName) -> io::Result<PathBuf> {
        let target = self.root.join(name.as_path());
        if name.folder() != self.name.folder() {
            return Err(refuse(
                io::ErrorKind::InvalidInput,
                &target,
                "not in the folder of its .part",
            ));
        }
        match &self.part {
            Some(part) if !self.is_at(part)? => Err(refuse(
                io::ErrorKind::NotFound,
                &self.path(),
                "moved or replaced while it was written",
            )),
            _ => Ok(target),
        }
    }

    /// Removes the `.part`, if there is one, unless something else has taken its name.
    pub fn discard(&self) -> io::Result<()> {
        match &self.part {
            Some(part) if self.is_at(part)? => self.folder.remove(&part.name),
            _ => Ok(()),
        }
    }

    /// Whether the name of the `.part` is still this very file.
    fn is_at(&self, part: &NamedPart) -> io::Result<bool> {
        match statat(&self.folder, &part.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            other => other
                .map(|found| (found.st_dev, found.st_ino) == part.id)
                .map_err(|e| with_path(&self.path(), e)),
        }
    }

    /// What the journal holds, at most `max` bytes; `None` if there is no regular file of that name and length, or it cannot
    /// be read.
    pub fn read_journal(&self, max: usize) -> Option<Vec<u8>> {
        let name = own_name(self.name.file_name(), JOURNAL_SUFFIX);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File = openat(&self.folder, &name, flags, Mode::empty())
            .ok()?
            .into();
        let len = file
            .metadata()
            .ok()
            .filter(|metadata| metadata.is_file())?
            .len();
        if len > max as u64 {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(len).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Replaces the journal as a whole; durable when this returns.
    pub fn write_journal(&self, bytes: &[u8]) -> io::Result<()> {
        let new = own_name(self.name.file_name(), NEW_JOURNAL_SUFFIX);
        let journal = own_name(self.name.file_name(), JOURNAL_SUFFIX);
        self.folder.remove(&new)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let write = || {
            let mut file: File =
                openat(&self.folder, &new, flags, Mode::from_raw_mode(0o666))?.into();
            file.write_all(bytes)?;
            file.sync_all()?;
            Ok::<_, io::Error>(renameat(&self.folder, &new, &self.folder, &journal)?)
        };
        if let Err(error) = write() {
            let _ = self.folder.remove(&new);
            return Err(with_path(&self.folder.path.join(journal), error));
        }
        self.folder.sync()
    }

    /// Removes the journal; nothing if there is none.
    pub fn remove_journal(&self) -> io::Result<()> {
        self.folder.remove_journal(self.name.file_name())
    }
}

/// Renames within a folder; EXIST if the new name is taken by anything. Network file systems that cannot promise this
/// in a rename can in a link; some in user space can do neither.
fn rename_to_free_name(folder: &Folder, from: &str, to: &str) -> rustix::io::Result<()> {
    match renameat_with(folder, from, folder, to, RenameFlags::NOREPLACE) {
        Err(error) if is_unable(error) => {}
        done => return done,
    }
    match link_to_free_name(folder, from, to) {
        Err(error) if is_unable(error) => {}
        done => return done,
    }
    SAID.call_once(|| {
        let folder = super::escape(&folder.path.to_string_lossy());
        tracing::warn!(%folder, "the file system can neither rename to a free name nor link: finished files replace an empty one");
    });
    rename_to_claimed_name(folder, from, to)
}

/// What file systems answer to a call that they do not have, besides what else it may mean.
fn is_unable(error: Errno) -> bool {
    matches!(
        error,
        Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM | Errno::IO
    )
}

/// Takes the name with an empty file, which is then replaced. A kill in between leaves that.
pub(super) fn rename_to_claimed_name(
    folder: &Folder,
    from: &str,
    to: &str,
) -> rustix::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(folder, to, flags, Mode::from_raw_mode(0o666))?;
    renameat(folder, from, folder, to).inspect_err(|_| _ = unlinkat(folder, to, AtFlags::empty()))
}

pub(super) fn link_to_free_name(folder: &Folder, from: &str, to: &str) -> rustix::io::Result<()> {
    linkat(folder, from, folder, to, AtFlags::empty())?;
    unlinkat(folder, from, AtFlags::empty())
}

/// Is it this Linux, or a later one?
fn is_kernel(version: (u32, u32)) -> bool {
    let release = rustix::system::uname();
    let mut numbers = release
        .release()
        .to_str()
        .unwrap_or("")
        .split('.')
        .map_while(|n| n.parse::<u32>().ok());
    numbers
        .next()
        .zip(numbers.next())
        .is_some_and(|this| this >= version)
}

/// Gives a file without a name its first one; EXIST if anything has that. Some sandboxes forbid it.
fn link_unnamed(file: &File, folder: &Folder, to: &str) -> rustix::io::Result<()> {
    match linkat(file, "", folder, to, AtFlags::EMPTY_PATH) {
        // Kernels before 6.10 allow it to root alone; this way takes half as long again.
        Err(Errno::NOENT) => {
            let shown = format!("/proc/self/fd/{}", file.as_raw_fd());
            linkat(CWD, shown, folder, to, AtFlags::SYMLINK_FOLLOW)?;
        }
        other => other?,
    }
    // Who watches the folder for files that were written and closed did not hear of this one.
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let _ = openat(folder, to, flags, Mode::empty());
    Ok(())
}

/// The name of a file while it is being downloaded: `name.part`.
pub(super) fn part_name(file_name: &str) -> String {
    own_name(file_name, PART_SUFFIX)
}

/// A file's name with our ending. A name too long for that is cut, and told apart from its like by a fingerprint (FNV-1a;
/// a chance or forged meeting costs a wait or a re-download, never a wrong byte).
fn own_name(file_name: &str, suffix: &str) -> String {
    if file_name.len() + suffix.len() <= MAX_COMPONENT_LEN {
        return format!("{file_name}{suffix}");
    }
    let fingerprint = file_name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| {
            (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
    let tail = format!("~{fingerprint:016x}{suffix}");
    format!("{}{tail}", cut(file_name, MAX_COMPONENT_LEN - tail.len()))
}
