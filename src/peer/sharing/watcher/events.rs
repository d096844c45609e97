//! What inotify(7) says of the directories of a share, as [`Change`]s.
//!
//! Every directory has a watch of its own, set by the scan before it lists the directory. What only reads a file is not
//! asked for: each file that a source serves would be two events, and a fast reader of a big share could fill the queue. The
//! crate `notify` always asks, which cost the source of 10,000 files of 4 KiB a fifth of its CPU time.
//!
//! Invariant: whatever the kernel tells becomes a change of the path that the directory had when the scan last met it, and
//! a full queue becomes [`Change::Overflow`].

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::inotify::{self, CreateFlags, Event, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Change, WatchError};

/// Bytes of events that are taken from the kernel at once.
const BUFFER_LEN: usize = 16 << 10;
/// What changes a directory or a file in it.
const WATCHED: WatchFlags = WatchFlags::ATTRIB
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW);

impl From<Errno> for WatchError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NOSPC => Self::Watches,
            Errno::MFILE => Self::Instances,
            _ => Self::Other(error.to_string()),
        }
    }
}

/// An inotify instance: its queue of events, and the directory behind each watch descriptor.
struct Kernel {
    queue: AsyncFd<OwnedFd>,
    directories: Mutex<HashMap<i32, PathBuf>>,
}

impl Kernel {
    fn directories(&self) -> MutexGuard<'_, HashMap<i32, PathBuf>> {
        self.directories
            .lock()
            .expect("no panic while the lock is held")
    }
}

/// The kernel's watches on the directories of one share; dropping it ends them.
pub struct Watcher {
    kernel: Arc<Kernel>,
    _stop: DropGuard,
}

impl Watcher {
    /// A watcher without watches, and where its changes arrive. Within a tokio runtime.
    pub fn start() -> Result<(Self, Changes), WatchError> {
        let queue = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        #[expect(
            deprecated,
            reason = "its fault is what another type than OwnedFd may do, and what replaces it is unsafe"
        )]
        let queue = AsyncFd::with_interest(queue, Interest::READABLE);
        let queue = queue.map_err(|error| WatchError::Other(error.to_string()))?;
        let kernel = Arc::new(Kernel {
            queue,
            directories: Mutex::default(),
        });
        let stopped = CancellationToken::new();
        let watcher = Self {
            kernel: kernel.clone(),
            _stop: stopped.clone().drop_guard(),
        };
        Ok((
            watcher,
            Changes {
                kernel,
                stopped,
                left: None,
            },
        ))
    }

    /// Watches one directory, not what is beneath it; blocks for a moment. A directory that is gone, or may not be read,
    /// is no error.
    pub fn watch(&mut self, directory: &Path) -> Result<(), WatchError> {
        // Locked before the watch is set, so that its events wait until it has a path.
        let mut directories = self.kernel.directories();
        match inotify::add_watch(self.kernel.queue.get_ref(), directory, WATCHED) {
            Ok(watch) => {
                directories.insert(watch, directory.to_path_buf());
                Ok(())
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Where the changes of one [`Watcher`] arrive.
pub struct Changes {
    kernel: Arc<Kernel>,
    stopped: CancellationToken,
    /// What was moved away last, with the cookie of that move: its other half follows at once, or never.
    left: Option<(u32, PathBuf)>,
}

impl Changes {
    /// Waits for changes and appends them, at least one. Cancel safe.
    pub async fn next(&mut self, into: &mut Vec<Change>) {
        let before = into.len();
        while into.len() == before {
            let ready = tokio::select! {
                biased;
                () = self.stopped.cancelled() => None,
                ready = self.kernel.queue.readable() => ready.ok(),
            };
            let Some(mut ready) = ready else {
                return into.push(Change::Stopped);
            };
            if let Ok(Err(_)) = ready.try_io(|_| read(&self.kernel, &mut self.left, into)) {
                into.push(Change::Stopped);
            }
        }
    }
}

/// Appends what a buffer's worth of events tells; an error if there are none.
fn read(
    kernel: &Kernel,
    left: &mut Option<(u32, PathBuf)>,
    into: &mut Vec<Change>,
) -> io::Result<()> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER_LEN];
    let mut reader = inotify::Reader::new(kernel.queue.get_ref(), &mut buffer);
    loop {
        let event = reader.next()?;
        translate(kernel, left, &event, into);
        if reader.is_buffer_empty() {
            return Ok(());
        }
    }
}

fn translate(
    kernel: &Kernel,
    left: &mut Option<(u32, PathBuf)>,
    event: &Event<'_>,
    into: &mut Vec<Change>,
) {
    let events = event.events();
    if events.contains(ReadFlags::QUEUE_OVERFLOW) {
        return into.push(Change::Overflow);
    }
    let mut directories = kernel.directories();
    let Some(directory) = directories.get(&event.wd()) else {
        return;
    };
    let name = event
        .file_name()
        .map(|name| OsStr::from_bytes(name.to_bytes()));
    let path = name.map_or_else(|| directory.clone(), |name| directory.join(name));
    if events.contains(ReadFlags::IGNORED) {
        directories.remove(&event.wd());
    } else if events.contains(ReadFlags::CLOSE_WRITE) {
        into.push(Change::Closed(path));
    } else if events.contains(ReadFlags::MOVED_FROM) {
        *left = Some((event.cookie(), path.clone()));
        into.push(Change::Replaced(path));
    } else if events.contains(ReadFlags::MOVED_TO) {
        into.push(Change::Replaced(path.clone()));
        if let Some((_, from)) = left.take_if(|(cookie, _)| *cookie == event.cookie()) {
            into.push(Change::Moved(from, path));
        }
    } else if events.contains(ReadFlags::MOVE_SELF) {
        // If the scan has met it at its new place already, that is the path it has here.
        if !path.symlink_metadata().is_ok_and(|there| there.is_dir()) {
            directories.retain(|&watch, directory| {
                let stays = !directory.starts_with(&path);
                // An error means that it is gone.
                let _ = if stays {
                    Ok(())
                } else {
                    inotify::remove_watch(kernel.queue.get_ref(), watch)
                };
                stays
            });
        }
        into.push(Change::Replaced(path));
    } else if events.intersects(ReadFlags::DELETE | ReadFlags::DELETE_SELF | ReadFlags::UNMOUNT)
        || events.contains(ReadFlags::CREATE | ReadFlags::ISDIR)
    {
        into.push(Change::Replaced(path));
    } else {
        into.push(Change::Touched(path));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// Changes until one satisfies `end`.
    async fn until(changes: &mut Changes, end: impl Fn(&Change) -> bool) -> Vec<Change> {
        let mut seen = vec![];
        while !seen.iter().any(&end) {
            timeout(LONG, changes.next(&mut seen))
                .await
                .unwrap_or_else(|_| panic!("only {seen:?}"));
        }
        seen
    }

    #[tokio::test]
    async fn the_kernel_tells_what_happens() {
        let dir = TempDir::new().unwrap();
        let (mut watcher, mut changes) = Watcher::start().unwrap();
        watcher.watch(dir.path()).unwrap();
        let [a, b, sub] = ["a", "b", "sub"].map(|name| dir.path().join(name));
        fs::write(&a, "x").unwrap();
        until(&mut changes, |change| *change == Change::Closed(a.clone())).await;
        fs::read(&a).unwrap();
        fs::rename(&a, &b).unwrap();
        let seen = until(&mut changes, |change| matches!(change, Change::Moved(..))).await;
        let moved = [
            Change::Replaced(a.clone()),
            Change::Replaced(b.clone()),
            Change::Moved(a, b.clone()),
        ];
        assert_eq!(seen, moved);
        fs::remove_file(&b).unwrap();
        fs::create_dir(&sub).unwrap();
        let seen = until(&mut changes, |change| {
            *change == Change::Replaced(sub.clone())
        })
        .await;
        assert!(seen.contains(&Change::Replaced(b)));
        fs::remove_dir_all(dir.path()).unwrap();
        until(&mut changes, |change| {
            *change == Change::Replaced(dir.path().to_path_buf())
        })
        .await;
        drop(watcher);
        until(&mut changes, |change| *change == Change::Stopped).await;
    }

    /// How many watches a watcher has, as the kernel counts them (proc(5)).
    fn n_watches(watcher: &Watcher) -> usize {
        let fd = watcher.kernel.queue.get_ref().as_raw_fd();
        let told = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let n = told
            .lines()
            .filter(|line| line.starts_with("inotify wd:"))
            .count();
        assert_eq!(watcher.kernel.directories().len(), n);
        n
    }

    #[tokio::test]
    async fn a_moved_directory_is_watched_where_it_is_or_no_more() {
        let (dir, elsewhere) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let (mut watcher, mut changes) = Watcher::start().unwrap();
        let [old, new, deep] = ["old", "new", "new/deep"].map(|name| dir.path().join(name));
        fs::create_dir_all(old.join("deep")).unwrap();
        for path in [dir.path(), &old, &old.join("deep")] {
            watcher.watch(path).unwrap();
        }
        fs::rename(&old, &new).unwrap();
        for path in [&new, &deep] {
            watcher.watch(path).unwrap();
        }
        fs::write(deep.join("file"), "x").unwrap();
        until(&mut changes, |change| {
            *change == Change::Closed(deep.join("file"))
        })
        .await;
        assert_eq!(n_watches(&watcher), 3);

        let away = elsewhere.path().join("away");
        fs::rename(&new, &away).unwrap();
        symlink(&away, &new).unwrap();
        until(&mut changes, |change| {
            *change == Change::Replaced(new.clone())
        })
        .await;
        fs::write(dir.path().join("end"), "x").unwrap();
        until(&mut changes, |change| {
            *change == Change::Closed(dir.path().join("end"))
        })
        .await;
        assert_eq!(n_watches(&watcher), 1);
    }

    #[tokio::test]
    async fn a_full_queue_is_an_overflow() {
        let longest: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let dir = TempDir::new().unwrap();
        let (mut watcher, mut changes) = Watcher::start().unwrap();
        watcher.watch(dir.path()).unwrap();
        for n in 0..longest {
            fs::create_dir(dir.path().join(n.to_string())).unwrap();
            fs::remove_dir(dir.path().join(n.to_string())).unwrap();
        }
        until(&mut changes, |change| *change == Change::Overflow).await;
    }

    #[tokio::test]
    async fn directories_that_cannot_be_watched_are_no_error() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        let (mut watcher, _changes) = Watcher::start().unwrap();
        watcher.watch(Path::new("/nonexistent")).unwrap();
        watcher.watch(&dir.path().join("file")).unwrap();
        assert_eq!(n_watches(&watcher), 0);
    }
}
