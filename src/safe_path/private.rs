//! Our own state on disk: keys, databases, locks.
//!
//! Invariant: what is written here can be read by its owner alone (folders 0700, files 0600, whatever the umask allows
//! beyond), appears whole or not at all, and is durable when the call returns. Looser state is refused with the command
//! that tightens it, never silently used.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{Access, AtFlags, CWD, FlockOperation, OFlags, accessat, flock, statvfs},
    io::Errno,
};

use super::{refuse, with_path};

/// Largest key, certificate or token file that is read, in bytes.
const MAX_PRIVATE_LEN: u64 = 1 << 20;
const OTHERS: u32 = 0o077;
/// Less room than this is none: a database grows by more.
const ROOM: u64 = 1 << 20;

/// Makes a folder for our state, with its parents, all 0700. A folder that exists must be the caller's own and closed to
/// others; an empty one is closed.
pub fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| with_path(path, e))?;
    let dir = open(OpenOptions::new().read(true), path, OFlags::DIRECTORY)?;
    let metadata = dir.metadata().map_err(|e| with_path(path, e))?;
    if metadata.mode() & OTHERS != 0
        && metadata.uid() == rustix::process::geteuid().as_raw()
        && fs::read_dir(path)
            .map_err(|e| with_path(path, e))?
            .next()
            .is_none()
    {
        dir.set_permissions(PermissionsExt::from_mode(0o700))
            .map_err(|e| with_path(path, e))?;
        return Ok(());
    }
    must_be_private(&metadata, path, "700")
}

/// Puts a whole file in place, 0600, replacing an older one; after a crash there is the old one or the new one.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(refuse(io::ErrorKind::InvalidInput, path, "not a file name"));
    };
    let (mut file, temporary) = loop {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(
            ".{}.{}.{n}.tmp",
            name.to_string_lossy(),
            std::process::id()
        ));
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
        {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => break (other.map_err(|e| with_path(&temporary, e))?, temporary),
        }
    };
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(e) = written {
        let _ = fs::remove_file(&temporary); // the write's own error says more
        return Err(with_path(path, e));
    }
    let dir = if dir.as_os_str().is_empty() {
        Path::new(".")
    } else {
        dir
    };
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| with_path(dir, e))
}

/// Opens a file for a database that writes in place, creating it 0600; what it holds stays.
pub fn create_private(path: &Path) -> io::Result<File> {
    let options = &mut OpenOptions::new();
    let file = open(
        options.read(true).write(true).create(true).mode(0o600),
        path,
        OFlags::NOFOLLOW,
    )?;
    must_be_private_file(&file, path)?;
    Ok(file)
}

/// Reads a key or token file of at most 1 MiB that nobody but its owner can read. It may be reached through a link.
pub fn read_private(path: &Path) -> io::Result<Vec<u8>> {
    let file = open(OpenOptions::new().read(true), path, OFlags::empty())?;
    must_be_private_file(&file, path)?;
    let mut bytes = Vec::new();
    let n_read = file
        .take(MAX_PRIVATE_LEN + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| with_path(path, e))?;
    if n_read as u64 > MAX_PRIVATE_LEN {
        return Err(refuse(
            io::ErrorKind::InvalidData,
            path,
            "too long for a key, certificate or token",
        ));
    }
    Ok(bytes)
}

/// Takes a lock that lasts until the returned file is dropped or the process ends, however it ends. `None`: somebody
/// else has it.
pub fn lock(path: &Path) -> io::Result<Option<File>> {
    let file = create_private(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(None),
        other => other.map(|()| Some(file)).map_err(|e| with_path(path, e)),
    }
}

/// Can files be written in this folder now?
///
/// # Errors
/// It is not there, somebody else's, on a read-only disk, or its disk is full; with the path.
pub fn writable(folder: &Path) -> io::Result<()> {
    let access = Access::WRITE_OK | Access::EXEC_OK;
    accessat(CWD, folder, access, AtFlags::EACCESS).map_err(|e| with_path(folder, e))?;
    let disk = statvfs(folder).map_err(|e| with_path(folder, e))?;
    if disk.f_blocks > 0 && disk.f_bavail.saturating_mul(disk.f_frsize) < ROOM {
        return Err(refuse(
            io::ErrorKind::StorageFull,
            folder,
            "no room left on its disk",
        ));
    }
    Ok(())
}

/// Opens without ever waiting for the other end of a FIFO.
fn open(options: &mut OpenOptions, path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = (flags | OFlags::NONBLOCK).bits().cast_signed();
    options
        .custom_flags(flags)
        .open(path)
        .map_err(|e| with_path(path, e))
}

fn must_be_private_file(file: &File, path: &Path) -> io::Result<()> {
    let metadata = file.metadata().map_err(|e| with_path(path, e))?;
    if !metadata.is_file() {
        return Err(refuse(
            io::ErrorKind::InvalidInput,
            path,
            "not a regular file",
        ));
    }
    must_be_private(&metadata, path, "600")
}

fn must_be_private(metadata: &fs::Metadata, path: &Path, mode: &str) -> io::Result<()> {
    let (owner, me) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != me {
        let why = format!(
            "belongs to user {owner}, and this runs as user {me}: run it as that user, or chown -R {me} {}",
            super::escape(&path.to_string_lossy())
        );
        return Err(refuse(io::ErrorKind::PermissionDenied, path, &why));
    }
    if metadata.mode() & OTHERS != 0 {
        let why = format!(
            "open to other users; close it with: chmod {mode} {}",
            super::escape(&path.to_string_lossy())
        );
        return Err(refuse(io::ErrorKind::PermissionDenied, path, &why));
    }
    Ok(())
}

/// Renames a file of ours that is of no use any more, so that a new one can take its place; an older one that was set
/// aside is replaced.
///
/// # Errors
/// As the file system answers, with the path.
pub fn set_aside(path: &Path, aside: &Path) -> io::Result<()> {
    fs::rename(path, aside).map_err(|error| with_path(path, error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    #[test]
    fn folders_are_made_closed_and_open_ones_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("a/b/state");
        private_dir(&dir).unwrap();
        private_dir(&dir).unwrap();
        assert_eq!((mode(&dir), mode(&temp.path().join("a"))), (0o700, 0o700));

        set_mode(&dir, 0o755);
        private_dir(&dir).unwrap();
        assert_eq!(mode(&dir), 0o700, "an empty folder is closed");

        fs::write(dir.join("x"), "x").unwrap();
        set_mode(&dir, 0o750);
        let error = private_dir(&dir).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("chmod 700"), "{error}");

        let file = dir.join("x");
        assert!(
            private_dir(&file)
                .unwrap_err()
                .to_string()
                .contains("state/x")
        );
    }

    #[test]
    fn f01_written_files_are_0600_whole_and_leave_no_temporary() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("peer.key");
        fs::write(&path, "older and longer than the new one").unwrap();
        set_mode(&path, 0o644);
        write_private(&path, b"secret").unwrap();
        assert_eq!(
            (mode(&path), read_private(&path).unwrap()),
            (0o600, b"secret".to_vec())
        );
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);

        let error = write_private(&temp.path().join("missing/x"), b"").unwrap_err();
        assert!(
            error.kind() == io::ErrorKind::NotFound && error.to_string().contains("missing"),
            "{error}"
        );
        assert!(write_private(Path::new("/"), b"").is_err());
        fs::create_dir(temp.path().join("dir")).unwrap();
        assert!(write_private(&temp.path().join("dir"), b"").is_err());
        assert_eq!(
            fs::read_dir(temp.path()).unwrap().count(),
            2,
            "a failed write leaves nothing"
        );
    }

    #[test]
    fn a_link_is_replaced_not_written_through() {
        let temp = tempfile::tempdir().unwrap();
        let (target, link) = (temp.path().join("target"), temp.path().join("link"));
        fs::write(&target, "untouched").unwrap();
        symlink(&target, &link).unwrap();
        assert!(create_private(&link).is_err());
        write_private(&link, b"new").unwrap();
        assert_eq!(
            (fs::read(&target).unwrap(), fs::read(&link).unwrap()),
            (b"untouched".to_vec(), b"new".to_vec())
        );
    }

    #[test]
    fn open_odd_or_endless_files_are_no_keys() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("key");
        write_private(&path, &vec![0; 1 << 20]).unwrap();
        assert_eq!(read_private(&path).unwrap().len(), 1 << 20);
        for bits in [0o604, 0o640, 0o602, 0o610] {
            set_mode(&path, bits);
            assert!(
                read_private(&path)
                    .unwrap_err()
                    .to_string()
                    .contains("chmod 600"),
                "{bits:o}"
            );
            assert!(create_private(&path).is_err(), "{bits:o}");
        }
        write_private(&path, &vec![0; (1 << 20) + 1]).unwrap();
        assert_eq!(
            read_private(&path).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert!(read_private(temp.path()).is_err());
        assert!(read_private(Path::new("/dev/zero")).is_err());
        let fifo = temp.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(
            read_private(&fifo).is_err() && create_private(&fifo).is_err(),
            "and neither waits"
        );
    }

    #[test]
    fn j17_j18_a_lock_has_one_holder_and_ends_with_it() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let held = lock(&path).unwrap().unwrap();
        assert!(lock(&path).unwrap().is_none());
        drop(held);
        assert!(lock(&path).unwrap().is_some());
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_database_file_keeps_what_it_holds() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("db");
        create_private(&path).unwrap().write_all(b"kept").unwrap();
        assert_eq!(mode(&path), 0o600);
        let mut held = String::new();
        create_private(&path)
            .unwrap()
            .read_to_string(&mut held)
            .unwrap();
        assert_eq!(held, "kept");
    }
}
