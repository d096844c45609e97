//! Walks a share and says what lies in it, without opening a single file.
//!
//! Invariant: only regular files are reported, each with the name it is offered under and the stamp it had. Symbolic
//! links are never followed; FIFOs, sockets and devices are never opened, so a scan cannot block on one. Everything else
//! that is not shared is counted, by reason. Hidden, and not counted: files ending in `.part`, directories called
//! `.sprat`, and the directories named in [`Walk::hidden`] (the state directory holds private keys).
//!
//! A directory can be swapped for a symbolic link between the look at it and the listing of it. That yields names at
//! worst: files are opened only through `safe_path`, which refuses to pass a link.

use std::fmt;
use std::fs::{FileType, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::hasher::Stamp;
use crate::content::MAX_SIZE;
use crate::safe_path::{MAX_DEPTH, SafeName, escape};

/// How to walk one share.
#[derive(Clone, Debug)]
pub struct Walk {
    /// The share's directory, absolute.
    pub root: Arc<Path>,
    /// What `--share NAME=DIR` puts before every name.
    pub prefix: Option<String>,
    /// Directories that are never shared.
    pub hidden: Arc<[DirectoryId]>,
    /// Ends the walk early.
    pub cancel: CancellationToken,
}

/// Device and inode of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectoryId(u64, u64);

impl DirectoryId {
    /// The directory at a path, itself no symbolic link.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        if metadata.is_dir() {
            Ok(Self::from(&metadata))
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    }
}

impl From<&Metadata> for DirectoryId {
    fn from(metadata: &Metadata) -> Self {
        Self(metadata.dev(), metadata.ino())
    }
}

/// A file that can be offered.
#[derive(Clone, Debug)]
pub struct ScannedFile {
    /// Its path beneath the share's root.
    pub relative: PathBuf,
    /// The name it is offered under.
    pub name: SafeName,
    /// What identifies this version of it.
    pub stamp: Stamp,
}

/// What lies at one path.
#[derive(Debug)]
pub enum Look {
    /// A file that can be offered.
    File(ScannedFile),
    /// A directory to walk.
    Directory,
    /// Something that is not shared, for this reason.
    Skipped(Skip),
    /// Hidden on purpose, or not there.
    Nothing,
}

/// Why something is not shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// A symbolic link.
    Symlink,
    /// A FIFO, socket or device.
    Special,
    /// No permission, or an I/O error.
    Unreadable,
    /// Not UTF-8, refused by the rules for names, or nested too deeply.
    BadName,
    /// Another file is offered under the same name.
    Clash,
    /// Larger than 1 TiB.
    TooLarge,
}

/// How many things were not shared, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// See [`Skip::Symlink`].
    pub symlinks: u64,
    /// See [`Skip::Special`].
    pub special: u64,
    /// See [`Skip::Unreadable`].
    pub unreadable: u64,
    /// See [`Skip::BadName`].
    pub bad_names: u64,
    /// See [`Skip::Clash`].
    pub clashes: u64,
    /// See [`Skip::TooLarge`].
    pub too_large: u64,
}

impl Skipped {
    /// Counts one more.
    pub fn add(&mut self, skip: Skip) {
        match skip {
            Skip::Symlink => self.symlinks += 1,
            Skip::Special => self.special += 1,
            Skip::Unreadable => self.unreadable += 1,
            Skip::BadName => self.bad_names += 1,
            Skip::Clash => self.clashes += 1,
            Skip::TooLarge => self.too_large += 1,
        }
    }

    /// Adds another count to this one.
    pub fn merge(&mut self, other: Self) {
        self.symlinks += other.symlinks;
        self.special += other.special;
        self.unreadable += other.unreadable;
        self.bad_names += other.bad_names;
        self.clashes += other.clashes;
        self.too_large += other.too_large;
    }

    /// All reasons together.
    pub fn total(&self) -> u64 {
        self.symlinks
            + self.special
            + self.unreadable
            + self.bad_names
            + self.clashes
            + self.too_large
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "skipped {}", self.total())?;
        let reasons = [
            (self.symlinks, "symbolic link", "symbolic links"),
            (self.special, "special file", "special files"),
            (self.unreadable, "unreadable", "unreadable"),
            (self.bad_names, "unusable name", "unusable names"),
            (
                self.clashes,
                "name taken by another file",
                "names taken by other files",
            ),
            (self.too_large, "larger than 1 TiB", "larger than 1 TiB"),
        ];
        let mut separator = ": ";
        for (n, one, many) in reasons {
            if n > 0 {
                write!(f, "{separator}{n} {}", if n == 1 { one } else { many })?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

/// What a walk found.
#[derive(Debug, Default)]
pub struct Scan {
    /// The files that can be offered, in no particular order.
    pub files: Vec<ScannedFile>,
    /// What is there but not shared.
    pub skipped: Skipped,
    /// How many directories were listed, the first included.
    pub directories: u64,
}

impl Walk {
    /// Walks everything at and beneath `start` (relative to the root; empty for all of it).
    ///
    /// `enter` is called with the absolute path of each directory before it is listed, so that a watch set there misses
    /// nothing. Errors beneath `start` are counted; an error at `start` itself, or the end by [`Walk::cancel`]
    /// (`Interrupted`), is returned.
    pub fn scan(&self, start: &Path, enter: &mut dyn FnMut(&Path)) -> io::Result<Scan> {
        let mut scan = Scan::default();
        let mut directories = vec![start.to_path_buf()];
        while let Some(relative) = directories.pop() {
            if self.cancel.is_cancelled() {
                return Err(io::Error::new(
                    io::ErrorKind::Interrupted,
                    "the scan was stopped",
                ));
            }
            let path = self.root.join(&relative);
            enter(&path);
            match self.list(&relative, &path, &mut scan, &mut directories) {
                Ok(()) => scan.directories += 1,
                Err(error) if relative == start => return Err(error),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::debug!(path = %shown(&path), %error, "skipped a directory");
                    scan.skipped.add(Skip::Unreadable);
                }
            }
        }
        Ok(scan)
    }

    fn list(
        &self,
        relative: &Path,
        path: &Path,
        scan: &mut Scan,
        directories: &mut Vec<PathBuf>,
    ) -> io::Result<()> {
        for entry in std::fs::read_dir(path)? {
            let child = relative.join(entry?.file_name());
            match self.look(&child) {
                Look::File(found) => scan.files.push(found),
                Look::Directory => directories.push(child),
                Look::Skipped(skip) => {
                    tracing::debug!(path = %shown(&child), reason = ?skip, "skipped");
                    scan.skipped.add(skip);
                }
                Look::Nothing => {}
            }
            if self.cancel.is_cancelled() {
                break;
            }
        }
        Ok(())
    }

    /// Says what lies at one path beneath the root.
    pub fn look(&self, relative: &Path) -> Look {
        if in_state_directory(relative) {
            return Look::Nothing;
        }
        let metadata = match std::fs::symlink_metadata(self.root.join(relative)) {
            Ok(metadata) => metadata,
            Err(error) if is_gone(&error) => return Look::Nothing,
            Err(_) => return Look::Skipped(Skip::Unreadable),
        };
        if metadata.is_dir() {
            return self.look_at_directory(relative, &metadata);
        }
        if relative.as_os_str().as_encoded_bytes().ends_with(b".part") {
            return Look::Nothing;
        }
        match self.judge(relative, &metadata) {
            Ok(found) => Look::File(found),
            Err(skip) => Look::Skipped(skip),
        }
    }

    fn look_at_directory(&self, relative: &Path, metadata: &Metadata) -> Look {
        if relative.file_name().is_some_and(|name| name == ".sprat")
            || self.hidden.contains(&DirectoryId::from(metadata))
        {
            Look::Nothing
        } else if relative.components().count() >= MAX_DEPTH {
            Look::Skipped(Skip::BadName)
        } else {
            Look::Directory
        }
    }

    fn judge(&self, relative: &Path, metadata: &Metadata) -> Result<ScannedFile, Skip> {
        check_type(metadata.file_type())?;
        if metadata.len() > MAX_SIZE {
            return Err(Skip::TooLarge);
        }
        let name = self.name(relative).ok_or(Skip::BadName)?;
        Ok(ScannedFile {
            relative: relative.to_path_buf(),
            name,
            stamp: Stamp::from(metadata),
        })
    }

    /// Whether a file that can be offered under this name lies where the name says.
    pub fn has(&self, name: &SafeName) -> bool {
        let prefix = self.prefix.as_ref().map_or(Some(name.as_path()), |prefix| {
            name.as_path().strip_prefix(prefix).ok()
        });
        prefix.is_some_and(
            |relative| matches!(self.look(relative), Look::File(found) if found.name == *name),
        )
    }

    /// The name that a file at this path beneath the root is offered under; None if the path is no name.
    pub fn name(&self, relative: &Path) -> Option<SafeName> {
        let name = SafeName::from_path(relative).ok()?;
        match &self.prefix {
            Some(prefix) => name.under(prefix).ok(),
            None => Some(name),
        }
    }
}

fn check_type(kind: FileType) -> Result<(), Skip> {
    match kind {
        kind if kind.is_file() => Ok(()),
        kind if kind.is_symlink() => Err(Skip::Symlink),
        _ => Err(Skip::Special),
    }
}

fn in_state_directory(relative: &Path) -> bool {
    relative
        .parent()
        .is_some_and(|parent| parent.components().any(|part| is_state(&part)))
}

fn is_state(part: &Component<'_>) -> bool {
    matches!(part, Component::Normal(name) if *name == ".sprat")
}

/// Whether an error says that nothing lies at a path any more.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// A path as it may be shown on a terminal or in a log.
pub fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, FileType as Kind, Mode, mknodat};
    use tempfile::TempDir;

    use super::*;

    fn walk(root: &Path) -> Walk {
        Walk {
            root: root.into(),
            prefix: None,
            hidden: Arc::new([]),
            cancel: CancellationToken::new(),
        }
    }

    fn names(scan: &Scan) -> Vec<&str> {
        let mut names: Vec<_> = scan.files.iter().map(|found| found.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    fn put(root: &Path, relative: impl AsRef<Path>) {
        let path = root.join(relative);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }

    #[test]
    fn finds_files_and_counts_the_rest() {
        let dir = TempDir::new().unwrap();
        let root = dir.path().join("share");
        for file in [
            "a",
            "b/c",
            "b/d.part",
            "b/e.part/f",
            ".sprat/key",
            "b/.sprat/key",
            ".sprat.txt",
            "state/key",
        ] {
            put(&root, file);
        }
        put(dir.path(), "outside/secret");
        symlink(dir.path().join("outside"), root.join("out")).unwrap();
        symlink("..", root.join("b/up")).unwrap();
        symlink("self", root.join("self")).unwrap();
        mknodat(
            CWD,
            root.join("fifo"),
            Kind::Fifo,
            Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        let _socket = UnixListener::bind(root.join("socket")).unwrap();
        put(&root, OsStr::from_bytes(b"caf\xe9"));
        put(&root, "b/line\nbreak");

        let hidden = DirectoryId::of(&root.join("state")).unwrap();
        let walk = Walk {
            hidden: Arc::new([hidden]),
            ..walk(&root)
        };
        let mut entered = vec![];
        let scan = walk
            .scan(Path::new(""), &mut |path| entered.push(path.to_path_buf()))
            .unwrap();
        assert_eq!(names(&scan), [".sprat.txt", "a", "b/c", "b/e.part/f"]);
        let expected = Skipped {
            symlinks: 3,
            special: 2,
            bad_names: 2,
            ..Skipped::default()
        };
        assert_eq!(scan.skipped, expected);
        assert_eq!(
            expected.to_string(),
            "skipped 7: 3 symbolic links, 2 special files, 2 unusable names"
        );
        assert_eq!((scan.directories, entered.len()), (3, 3));

        let below = Walk {
            prefix: Some("pre/fix".into()),
            ..walk
        }
        .scan(Path::new("b"), &mut |_| {})
        .unwrap();
        assert_eq!(names(&below), ["pre/fix/b/c", "pre/fix/b/e.part/f"]);
    }

    #[test]
    fn looks_at_single_paths() {
        let dir = TempDir::new().unwrap();
        put(dir.path(), "a/b");
        let walk = Walk {
            prefix: Some("pre".into()),
            ..walk(dir.path())
        };
        assert!(matches!(walk.look(Path::new("a")), Look::Directory));
        assert!(
            matches!(walk.look(Path::new("a/b")), Look::File(found) if found.name.as_str() == "pre/a/b")
        );
        for nothing in ["c", "a/b/c", ".sprat/x", "a/b.part"] {
            assert!(
                matches!(walk.look(Path::new(nothing)), Look::Nothing),
                "{nothing}"
            );
        }
        assert!(walk.has(&SafeName::parse("pre/a/b").unwrap()));
        assert!(!walk.has(&SafeName::parse("a/b").unwrap()));
        assert!(!walk.has(&SafeName::parse("pre/a").unwrap()));
    }

    #[test]
    fn does_not_descend_for_ever() {
        let dir = TempDir::new().unwrap();
        let deepest: PathBuf = (0..MAX_DEPTH - 1).map(|_| "d").collect();
        put(dir.path(), deepest.join("last"));
        put(dir.path(), deepest.join("d/too_deep"));
        let scan = walk(dir.path()).scan(Path::new(""), &mut |_| {}).unwrap();
        assert_eq!(scan.files.len(), 1);
        assert_eq!(
            scan.skipped,
            Skipped {
                bad_names: 1,
                ..Skipped::default()
            }
        );
    }

    #[test]
    fn ends_when_cancelled_or_gone() {
        let dir = TempDir::new().unwrap();
        let walk = walk(dir.path());
        let gone = walk.scan(Path::new("nothing"), &mut |_| {}).unwrap_err();
        assert!(is_gone(&gone));
        walk.cancel.cancel();
        let stopped = walk.scan(Path::new(""), &mut |_| {}).unwrap_err();
        assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
    }
}
