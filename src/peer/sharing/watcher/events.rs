//! What the crate `notify` tells of the directories of a share, as [`DiskChange`]s.
//!
//! Every directory has a watch of its own, set by the scan before it lists the directory. What only reads a file is not
//! asked for: each file that a source serves would be two events, and a fast reader of a big share could fill the queue.
//!
//! Invariant: whatever is told becomes a change of the path that the directory had when the scan last met it, and a full
//! queue, the kernel's or this one, becomes [`DiskChange::Overflow`].

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use notify::event::{
    AccessKind, AccessMode, CreateKind, Event, EventKind, EventKindMask, ModifyKind, RenameMode,
};
use notify::{Config, ErrorKind, RecommendedWatcher, RecursiveMode, WatchPathConfig};
use rustix::io::Errno;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{DiskChange, MAX_PENDING, WatchError};

/// What changes a directory or a file in it.
const WATCHED: EventKindMask = EventKindMask::CORE.union(EventKindMask::ACCESS_CLOSE);

impl From<notify::Error> for WatchError {
    fn from(error: notify::Error) -> Self {
        match error.kind {
            ErrorKind::MaxFilesWatch => Self::Watches,
            ErrorKind::Io(error) if Errno::from_io_error(&error) == Some(Errno::MFILE) => {
                Self::Instances
            }
            _ => Self::Other(error.to_string()),
        }
    }
}

/// What was told and not taken yet. The thread that fills it never waits: a scan waits for that thread.
#[derive(Default)]
struct Queue {
    changes: Mutex<Vec<DiskChange>>,
    filled: Notify,
}

impl Queue {
    fn changes(&self) -> MutexGuard<'_, Vec<DiskChange>> {
        self.changes
            .lock()
            .expect("no panic while the lock is held")
    }

    fn push(&self, told: notify::Result<Event>) {
        let mut changes = self.changes();
        match told {
            Ok(event) => changes.extend(translate(event)),
            Err(_) => changes.push(DiskChange::Overflow),
        }
        if changes.len() > MAX_PENDING {
            *changes = vec![DiskChange::Overflow];
        }
        drop(changes);
        self.filled.notify_one();
    }
}

/// The watches on the directories of one share; dropping it ends them.
pub struct Watcher(RecommendedWatcher);

impl Watcher {
    /// A watcher without watches, and where its changes arrive.
    pub fn start() -> Result<(Self, DiskChanges), WatchError> {
        let (queue, ended) = (Arc::new(Queue::default()), CancellationToken::new());
        let changes = DiskChanges {
            queue: queue.clone(),
            ended: ended.clone(),
        };
        // Dropped with the handler, at the end of the thread that calls it.
        let end = ended.drop_guard();
        let handler = move |told| {
            let _ = &end;
            queue.push(told);
        };
        let config = Config::default().with_event_kinds(WATCHED);
        let watcher = <RecommendedWatcher as notify::Watcher>::new(handler, config)?;
        Ok((Self(watcher), changes))
    }

    /// Watches one directory, not what is beneath it; blocks for a moment. A directory that is gone, or may not be read,
    /// is no error.
    pub fn watch(&mut self, directory: &Path) -> Result<(), WatchError> {
        let alone = WatchPathConfig::new(RecursiveMode::NonRecursive);
        let alone = alone.with_dereference_symlinks(false);
        let watched = notify::Watcher::watch_with(&mut self.0, directory, alone);
        match watched {
            Err(error) if !is_skipped(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Whether the directory was gone, is none any more, or may not be read.
fn is_skipped(error: &notify::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    match &error.kind {
        ErrorKind::PathNotFound => true,
        ErrorKind::Io(error) => {
            matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
        }
        _ => false,
    }
}

/// Where the changes of one [`Watcher`] arrive.
pub struct DiskChanges {
    queue: Arc<Queue>,
    ended: CancellationToken,
}

impl DiskChanges {
    /// Waits for changes and appends them, at least one. Cancel safe.
    pub async fn next(&mut self, into: &mut Vec<DiskChange>) {
        loop {
            if self.ended.is_cancelled() {
                return into.push(DiskChange::Stopped);
            }
            let mut changes = std::mem::take(&mut *self.queue.changes());
            if !changes.is_empty() {
                return into.append(&mut changes);
            }
            tokio::select! {
                () = self.ended.cancelled() => {}
                () = self.queue.filled.notified() => {}
            }
        }
    }
}

/// What an event says; of a move both ends are told of before the move itself.
fn translate(event: Event) -> Vec<DiskChange> {
    if event.need_rescan() {
        return vec![DiskChange::Overflow];
    }
    let mut paths = event.paths.into_iter();
    if event.kind == EventKind::Modify(ModifyKind::Name(RenameMode::Both))
        && let (Some(from), Some(to)) = (paths.next(), paths.next())
    {
        return vec![DiskChange::Moved(from, to)];
    }
    let change = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => DiskChange::Closed,
        EventKind::Modify(ModifyKind::Name(_))
        | EventKind::Create(CreateKind::Folder)
        | EventKind::Remove(_) => DiskChange::Replaced,
        _ => DiskChange::Touched,
    };
    paths.map(change).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use tempfile::TempDir;
    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// Changes until one satisfies `end`.
    async fn until(
        changes: &mut DiskChanges,
        end: impl Fn(&DiskChange) -> bool,
    ) -> Vec<DiskChange> {
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
        until(&mut changes, |change| {
            *change == DiskChange::Closed(a.clone())
        })
        .await;
        fs::read(&a).unwrap();
        fs::rename(&a, &b).unwrap();
        let seen = until(&mut changes, |change| {
            matches!(change, DiskChange::Moved(..))
        })
        .await;
        let moved = [
            DiskChange::Replaced(a.clone()),
            DiskChange::Replaced(b.clone()),
            DiskChange::Moved(a, b.clone()),
        ];
        assert_eq!(seen, moved);
        fs::remove_file(&b).unwrap();
        fs::create_dir(&sub).unwrap();
        let seen = until(&mut changes, |change| {
            *change == DiskChange::Replaced(sub.clone())
        })
        .await;
        assert!(seen.contains(&DiskChange::Replaced(b)));
        fs::remove_dir_all(dir.path()).unwrap();
        until(&mut changes, |change| {
            *change == DiskChange::Replaced(dir.path().to_path_buf())
        })
        .await;
        drop(watcher);
        until(&mut changes, |change| *change == DiskChange::Stopped).await;
    }

    fn n_watches(watcher: &Watcher) -> usize {
        notify::Watcher::watched_paths(&watcher.0).unwrap().len()
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
            *change == DiskChange::Closed(deep.join("file"))
        })
        .await;
        assert_eq!(n_watches(&watcher), 3);

        let away = elsewhere.path().join("away");
        fs::rename(&new, &away).unwrap();
        symlink(&away, &new).unwrap();
        until(&mut changes, |change| {
            *change == DiskChange::Replaced(new.clone())
        })
        .await;
        fs::write(dir.path().join("end"), "x").unwrap();
        until(&mut changes, |change| {
            *change == DiskChange::Closed(dir.path().join("end"))
        })
        .await;
        assert_eq!(n_watches(&watcher), 1);
    }

    #[test]
    fn a_full_queue_is_an_overflow() {
        let queue = Queue::default();
        for n in 0..=MAX_PENDING {
            let created = Event::new(EventKind::Create(CreateKind::File));
            queue.push(Ok(created.add_path(n.to_string().into())));
        }
        assert_eq!(*queue.changes(), [DiskChange::Overflow]);
        let lost = Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan);
        assert_eq!(translate(lost), [DiskChange::Overflow]);
    }

    #[tokio::test]
    async fn directories_that_cannot_be_watched_are_no_error() {
        let dir = TempDir::new().unwrap();
        let (mut watcher, _changes) = Watcher::start().unwrap();
        watcher.watch(&dir.path().join("gone")).unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        watcher.watch(&dir.path().join("file/inside")).unwrap();
        assert_eq!(n_watches(&watcher), 0);
    }
}
