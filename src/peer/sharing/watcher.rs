//! Turns what the kernel says about a share into paths worth a look.
//!
//! Invariant: no change is lost in silence. Whatever cannot be told path by path (a full kernel queue, too many paths at
//! once) becomes one demand for a full rescan; where events cannot be had at all, the share is polled, and [`Mode`] says why.
//!
//! `watcher/events.rs` has the events. [`Debouncer`] is the pure core: events and the time go in, settled paths come
//! out. A file is settled [`QUIET`] after its last event, or [`AFTER_CLOSE`] after a writer closed it: that short wait folds
//! "write a temporary file, then rename it" and "append a line, again and again" into one look. What was removed or renamed
//! is settled at once.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

mod events;

pub use events::{DiskChanges, Watcher};

/// A file without events for this long is settled.
pub const QUIET: Duration = Duration::from_millis(500);
/// A file that a writer closed this long ago, without events since, is settled.
pub const AFTER_CLOSE: Duration = Duration::from_millis(100);
/// More unsettled paths than this become one rescan.
pub const MAX_PENDING: usize = 65_536;
/// How long after a failure to have events the next attempt is made.
const RETRY: Duration = Duration::from_secs(60);

/// How a share learns of changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// From the kernel, as they happen; a slow rescan is the safety net.
    Events,
    /// From a rescan every few seconds.
    Polling {
        /// Why there are no events, in words for a person.
        reason: String,
    },
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Events => f.write_str("events"),
            Self::Polling { reason } => write!(f, "polling: {reason}"),
        }
    }
}

/// One change, with absolute paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskChange {
    /// Written to, created, or its attributes changed.
    Touched(PathBuf),
    /// Closed after writing.
    Closed(PathBuf),
    /// Removed, moved in or out, or a new directory.
    Replaced(PathBuf),
    /// Moved within what is watched; a [`DiskChange::Replaced`] of either path comes before it.
    Moved(PathBuf, PathBuf),
    /// Some changes were lost.
    Overflow,
    /// There will be no more changes.
    Stopped,
}

/// Why a directory cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The user has as many watches as the kernel allows.
    #[error("the limit of inotify watches is reached")]
    Watches,
    /// The user has as many watchers as the kernel allows, or the process as many open files.
    #[error(
        "the limit of inotify instances is reached: raise it with `sysctl fs.inotify.max_user_instances=1024`"
    )]
    Instances,
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// What is worth a look now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Paths to look at: files, directories, or nothing any more.
    pub paths: Vec<PathBuf>,
    /// Moves of files that had no other event meanwhile; both ends are in `paths` too.
    pub moves: Vec<(PathBuf, PathBuf)>,
    /// Whether all of the share has to be looked at.
    pub rescan: bool,
}

/// Holds paths back until they are settled; does no I/O and is told the time.
#[derive(Debug, Default)]
pub struct Debouncer {
    pending: HashMap<PathBuf, Pending>,
    moves: Vec<(PathBuf, PathBuf)>,
    rescan: bool,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    due: Instant,
    /// Its content may have changed, so a move of it says nothing about its content.
    touched: bool,
}

impl Debouncer {
    /// Takes note of a change.
    pub fn note(&mut self, change: DiskChange, now: Instant) {
        match change {
            DiskChange::Touched(path) => self.hold(path, now + QUIET),
            DiskChange::Closed(path) => self.hold(path, now + AFTER_CLOSE),
            DiskChange::Replaced(path) => {
                self.pending
                    .entry(path)
                    .or_insert(Pending {
                        due: now,
                        touched: false,
                    })
                    .due = now;
            }
            DiskChange::Moved(from, to) => {
                if self
                    .pending
                    .get(&from)
                    .is_none_or(|pending| !pending.touched)
                {
                    self.moves.push((from, to.clone()));
                }
                self.pending.insert(
                    to,
                    Pending {
                        due: now,
                        touched: false,
                    },
                );
            }
            DiskChange::Overflow | DiskChange::Stopped => self.rescan = true,
        }
        if self.pending.len() > MAX_PENDING {
            *self = Self {
                rescan: true,
                ..Self::default()
            };
        }
    }

    fn hold(&mut self, path: PathBuf, due: Instant) {
        self.pending.insert(path, Pending { due, touched: true });
    }

    /// Asks for a look at `path` at `due`, unless events of it tell another time.
    pub fn look_again(&mut self, path: PathBuf, due: Instant) {
        self.pending
            .entry(path)
            .or_insert(Pending { due, touched: true });
    }

    /// When [`Debouncer::take`] will have something; None without new events.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        if self.rescan {
            Some(now)
        } else {
            self.pending.values().map(|pending| pending.due).min()
        }
    }

    /// Takes what is settled.
    pub fn take(&mut self, now: Instant) -> Settled {
        let settled = self.pending.extract_if(|_, pending| pending.due <= now);
        let paths: Vec<PathBuf> = settled.map(|(path, _)| path).collect();
        let moves = std::mem::take(&mut self.moves);
        let moves = moves
            .into_iter()
            .filter(|(_, to)| !self.pending.contains_key(to))
            .collect();
        Settled {
            paths,
            moves,
            rescan: std::mem::take(&mut self.rescan),
        }
    }
}

/// How one share is watched, now: its [`Watcher`], or why it has none.
pub struct Lookout {
    path: PathBuf,
    poll: bool,
    watcher: Option<Watcher>,
    failed: Option<WatchError>,
    mode: Mode,
    /// The next attempt to have events.
    retry: Option<Retry>,
}

struct Retry {
    at: Instant,
    /// Makes sense only if the kernel allows more watches than this.
    above: u64,
}

impl Lookout {
    /// Watches nothing yet. With `poll` it never will.
    pub fn new(path: PathBuf, poll: bool) -> Self {
        let mode = Mode::Polling {
            reason: "not started".into(),
        };
        Self {
            path,
            poll,
            watcher: None,
            failed: None,
            mode,
            retry: None,
        }
    }

    /// How changes are learnt of.
    pub fn mode(&self) -> &Mode {
        &self.mode
    }

    /// Before a scan of everything: starts a watcher if there is none and there can be one.
    pub fn open(&mut self) -> Option<DiskChanges> {
        let wait = |retry: &Retry| Instant::now() < retry.at || watch_limit().1 <= retry.above;
        if self.watcher.is_some() || self.retry.as_ref().is_some_and(wait) {
            return None;
        }
        if let Some(reason) = if self.poll {
            Some("asked for".into())
        } else {
            must_poll(&self.path)
        } {
            self.mode = Mode::Polling { reason };
            return None;
        }
        match Watcher::start() {
            Ok((watcher, changes)) => {
                self.watcher = Some(watcher);
                Some(changes)
            }
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }

    /// During a scan: watches one more directory.
    pub fn enter(&mut self, directory: &Path) {
        if let Some(Err(error)) = self
            .watcher
            .as_mut()
            .map(|watcher| watcher.watch(directory))
        {
            // Polling sees all there is to see: the watches are given back to those who can use them.
            self.watcher = None;
            self.failed = Some(error);
        }
    }

    /// After a scan: settles the mode. `directories`: how many the share has, if all were counted.
    pub fn settle(&mut self, directories: Option<u64>) {
        if self.watcher.is_some() {
            self.mode = Mode::Events;
            self.retry = None;
        }
        if let Some(error) = self.failed.take() {
            let limited = matches!(error, WatchError::Watches);
            self.retry = Some(Retry {
                at: Instant::now() + RETRY,
                above: if limited { watch_limit().1 } else { 0 },
            });
            let reason = if limited {
                too_many_directories(directories)
            } else {
                error.to_string()
            };
            self.mode = Mode::Polling { reason };
        }
    }

    /// Its [`DiskChanges`] have stopped. A watcher that was given up before has told why.
    pub fn ended(&mut self) {
        if self.watcher.is_some() {
            self.lose("the events ended".into());
        }
    }

    /// Ends the watching.
    pub fn lose(&mut self, reason: String) {
        self.watcher = None;
        self.retry = None;
        self.mode = Mode::Polling { reason };
    }
}

/// Why a share at `path` can only be polled, or None if the kernel reports all changes there.
fn must_poll(path: &Path) -> Option<String> {
    let kind = match rustix::fs::statfs(path).ok()?.f_type & 0xFFFF_FFFF {
        0x6969 => "NFS",
        0x517B | 0xFF53_4D42 | 0xFE53_4D42 => "SMB",
        0x6573_5546 => "FUSE",
        0x0102_1997 => "9p",
        0x00C3_6400 => "Ceph",
        0x5346_414F | 0x6B41_4653 => "AFS",
        0x0BD0_0BD0 => "Lustre",
        0x4750_4653 => "GPFS",
        0x1983_0326 => "BeeGFS",
        0x0116_1970 => "GFS2",
        0x7461_636F => "OCFS2",
        0x7375_7245 => "Coda",
        _ => return None,
    };
    Some(format!("{kind} does not report what other machines change"))
}

/// What to tell a person who has more directories than the kernel lets him watch.
fn too_many_directories(directories: Option<u64>) -> String {
    let (setting, limit) = watch_limit();
    let needed = directories.unwrap_or(limit);
    let enough = limit
        .saturating_add(needed)
        .max(524_288)
        .next_power_of_two();
    let share = directories.map_or_else(String::new, |n| {
        format!(", this share alone has {n} directories")
    });
    format!(
        "the limit of inotify watches is reached ({setting} is {limit}{share}): raise it with `sysctl {setting}={enough}`"
    )
}

/// How many directories this user may watch, all processes together, and the setting that says so; 0 if none does. A user
/// namespace (a rootless container) may have a smaller limit of its own.
fn watch_limit() -> (&'static str, u64) {
    let settings = ["fs.inotify.max_user_watches", "user.max_inotify_watches"];
    let limits = settings.into_iter().filter_map(|setting| {
        let file = format!("/proc/sys/{}", setting.replace('.', "/"));
        let text = std::fs::read_to_string(file).ok()?;
        Some((setting, text.trim().parse().ok()?))
    });
    limits
        .min_by_key(|(_, limit)| *limit)
        .unwrap_or((settings[0], 0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn path(name: &str) -> PathBuf {
        PathBuf::from(name)
    }

    #[test]
    fn a_file_settles_when_it_is_quiet_or_closed() {
        let (mut debouncer, start) = (Debouncer::default(), Instant::now());
        debouncer.note(DiskChange::Touched(path("a")), start);
        debouncer.note(DiskChange::Touched(path("a")), start + QUIET / 2);
        debouncer.note(DiskChange::Touched(path("b")), start + QUIET / 2);
        debouncer.note(DiskChange::Closed(path("b")), start + QUIET / 2);
        assert_eq!(
            debouncer.take(start + QUIET),
            Settled {
                paths: vec![path("b")],
                ..Settled::default()
            }
        );
        let due = debouncer.due(start).unwrap();
        assert_eq!(due, start + QUIET / 2 + QUIET);
        assert_eq!(
            debouncer.take(due),
            Settled {
                paths: vec![path("a")],
                ..Settled::default()
            }
        );
        assert_eq!(debouncer.due(start), None);
    }

    #[test]
    fn what_is_removed_or_moved_settles_at_once() {
        let (mut debouncer, now) = (Debouncer::default(), Instant::now());
        debouncer.note(DiskChange::Touched(path("a")), now);
        debouncer.note(DiskChange::Replaced(path("a")), now);
        assert_eq!(debouncer.take(now).paths, [path("a")]);
    }

    #[test]
    fn a_move_counts_only_without_other_events() {
        let now = Instant::now();
        let moved = |before: Option<DiskChange>, after: Option<DiskChange>| {
            let mut debouncer = Debouncer::default();
            let between = [
                DiskChange::Replaced(path("a")),
                DiskChange::Replaced(path("b")),
                DiskChange::Moved(path("a"), path("b")),
            ];
            for change in before.into_iter().chain(between).chain(after) {
                debouncer.note(change, now);
            }
            debouncer.take(now).moves
        };
        assert_eq!(moved(None, None), [(path("a"), path("b"))]);
        assert_eq!(
            moved(Some(DiskChange::Touched(path("b"))), None),
            [(path("a"), path("b"))]
        );
        assert!(moved(Some(DiskChange::Touched(path("a"))), None).is_empty());
        assert!(moved(None, Some(DiskChange::Touched(path("b")))).is_empty());
    }

    #[test]
    fn too_many_paths_become_one_rescan() {
        let (mut debouncer, now) = (Debouncer::default(), Instant::now());
        for n in 0..=MAX_PENDING {
            debouncer.note(DiskChange::Replaced(path(&n.to_string())), now);
        }
        assert_eq!(debouncer.due(now), Some(now));
        assert_eq!(
            debouncer.take(now),
            Settled {
                rescan: true,
                ..Settled::default()
            }
        );
    }

    #[test]
    fn looking_again_waits_for_later_events_only() {
        let (mut debouncer, now) = (Debouncer::default(), Instant::now());
        debouncer.note(DiskChange::Closed(path("a")), now);
        debouncer.look_again(path("a"), now + LONG);
        assert_eq!(debouncer.due(now), Some(now + AFTER_CLOSE));
        debouncer.look_again(path("b"), now + LONG);
        debouncer.note(DiskChange::Touched(path("b")), now);
        assert_eq!(debouncer.take(now + QUIET).paths.len(), 2);
    }

    proptest! {
        #[test]
        fn no_path_is_lost_or_early(
            steps in prop::collection::vec((0..4_u8, "[ab]", "[ab]", 0_u64..400), 1..40),
        ) {
            let (mut debouncer, mut now) = (Debouncer::default(), Instant::now());
            let mut last: HashMap<PathBuf, (Instant, Duration)> = HashMap::new();
            for (kind, one, other, wait) in steps {
                let (change, quiet) = match kind {
                    0 => (DiskChange::Touched(path(&one)), QUIET),
                    1 => (DiskChange::Closed(path(&one)), AFTER_CLOSE),
                    2 => (DiskChange::Replaced(path(&one)), Duration::ZERO),
                    _ => (DiskChange::Moved(path(&other), path(&one)), Duration::ZERO),
                };
                debouncer.note(change, now);
                last.insert(path(&one), (now, quiet));
                now += Duration::from_millis(wait);
                for path in debouncer.take(now).paths {
                    let (then, quiet) = last.remove(&path).expect("taken once");
                    prop_assert!(now >= then + quiet);
                }
            }
            let rest = debouncer.take(now + LONG).paths;
            prop_assert_eq!(rest.len(), last.len());
            prop_assert_eq!(debouncer.due(now), None);
        }
    }

    #[test]
    fn the_limit_is_told_with_the_exact_setting() {
        let text = too_many_directories(Some(300_000));
        assert!(text.contains("300000 directories"), "{text}");
        let (_, value) = text.split_once("_watches=").expect("names the setting");
        let value: u64 = value.trim_end_matches('`').parse().unwrap();
        assert!(value >= watch_limit().1 + 300_000);
        assert!(must_poll(&std::env::temp_dir()).is_none_or(|reason| !reason.is_empty()));
    }

    #[tokio::test]
    async fn a_lookout_polls_when_told_so_and_after_the_limit() {
        let dir = TempDir::new().unwrap();
        let mut polling = Lookout::new(dir.path().to_path_buf(), true);
        assert!(polling.open().is_none());
        polling.settle(Some(1));
        assert_eq!(polling.mode().to_string(), "polling: asked for");

        let mut limited = Lookout::new(dir.path().to_path_buf(), false);
        let Some(_changes) = limited.open() else {
            return;
        };
        limited.enter(dir.path());
        limited.settle(Some(1));
        assert_eq!(*limited.mode(), Mode::Events);
        (limited.watcher, limited.failed) = (None, Some(WatchError::Watches));
        limited.settle(Some(1));
        let reason = limited.mode().to_string();
        assert!(reason.contains("_watches="), "{reason}");
        limited.ended();
        assert_eq!(limited.mode().to_string(), reason);
        assert!(
            limited.open().is_none(),
            "tried again only when the limit was raised"
        );
    }
}
