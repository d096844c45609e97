//! All folders that a Node shares.
//!
//! Invariant: no task outlives the token and the tracker that were given, and no folder is shared twice. What keeps a
//! share true to the disk is in `share_task`, what a look at the disk means in `share`, and how changes are learnt of in
//! `watcher`.

use std::collections::BTreeSet;
use std::fs::symlink_metadata;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::hasher::Stamp;
use super::index::Index;
use super::library::Library;
use super::scan::{DirectoryId, Walk, is_gone, shown};
use super::share::SharedFolder;
use super::share_task::{Lanes, REST, ShareProgress, ShareState, ShareTask};
use super::watcher::Lookout;
use crate::safe_path::{Root, SafeName};

/// Sets of suspects on their way to a share.
const SUSPECTS_LEN: usize = 16;

/// A folder to share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareSpec {
    /// What comes before the names of its files (`--share NAME=DIR`).
    pub name: Option<String>,
    /// The folder.
    pub path: PathBuf,
}

/// What a Node gives to its shares.
pub struct SharesConfig {
    /// Where manifests are kept.
    pub index: Arc<Index>,
    /// Where files are offered.
    pub library: Library,
    /// Directories that are never shared, such as the one with the private key.
    pub hidden: Vec<PathBuf>,
    /// How often a share with events is rescanned all the same.
    pub rescan: Duration,
    /// Poll, even where events can be had.
    pub poll: bool,
    /// Ends everything.
    pub cancel: CancellationToken,
    /// Knows what still runs.
    pub tasks: TaskTracker,
}

/// The shares of a Node. Its tasks end with the token, not with this.
pub struct Shares {
    index: Arc<Index>,
    library: Library,
    hidden: Arc<[DirectoryId]>,
    rescan: Duration,
    poll: bool,
    cancel: CancellationToken,
    tasks: TaskTracker,
    lanes: Lanes,
    list: Arc<Mutex<Vec<Entry>>>,
}

struct Entry {
    walk: Walk,
    state: watch::Receiver<ShareState>,
    suspects: mpsc::Sender<Arc<BTreeSet<PathBuf>>>,
}

impl Shares {
    /// No shares yet. Must be called within a runtime.
    pub fn new(config: SharesConfig) -> Self {
        let hidden = config
            .hidden
            .iter()
            .filter_map(|path| DirectoryId::of(&path.canonicalize().ok()?).ok());
        let shares = Self {
            index: config.index,
            library: config.library,
            hidden: hidden.collect(),
            rescan: config.rescan,
            poll: config.poll,
            cancel: config.cancel,
            tasks: config.tasks,
            lanes: Lanes::default(),
            list: Arc::default(),
        };
        let hand_on = hand_on_suspects(shares.library.clone(), Arc::clone(&shares.list));
        let cancel = shares.cancel.clone();
        shares
            .tasks
            .spawn(async move { cancel.run_until_cancelled(hand_on).await });
        let outside = Outside {
            index: shares.index.clone(),
            library: shares.library.clone(),
            list: shares.list.clone(),
        };
        let (cancel, rescan) = (shares.cancel.clone(), shares.rescan);
        shares
            .tasks
            .spawn(async move { cancel.run_until_cancelled(outside.keep_true(rescan)).await });
        shares
    }

    /// Shares a folder. Returns when the folder has been checked; its files appear as they are hashed. Blocks for a moment.
    /// Errors name the path and say what is wrong with it.
    pub fn add(&self, spec: ShareSpec) -> anyhow::Result<()> {
        let walk = self.check(&spec)?;
        let path = walk.root.to_path_buf();
        let mut list = lock(&self.list);
        if list.iter().any(|entry| *entry.walk.root == *path) {
            bail!("{} is shared already", shown(&path));
        }
        let earlier = list.iter().map(|entry| entry.walk.clone()).collect();
        let lookout = Lookout::new(path.clone(), self.poll);
        let share = SharedFolder::new(
            walk.clone(),
            earlier,
            Arc::clone(&self.index),
            self.library.clone(),
            lookout,
        );
        let initial = ShareState {
            name: walk.prefix.clone(),
            mode: share.mode().clone(),
            files: 0,
            progress: ShareProgress::default(),
            scanned: false,
            path,
        };
        let span = tracing::info_span!("share", path = %shown(&initial.path));
        let (state, state_receiver) = watch::channel(initial);
        let (suspects, suspects_receiver) = mpsc::channel(SUSPECTS_LEN);
        let task = ShareTask::new(
            share,
            state,
            suspects_receiver,
            self.lanes.clone(),
            self.rescan,
        );
        list.push(Entry {
            walk,
            state: state_receiver,
            suspects,
        });
        self.tasks.spawn(task.run().instrument(span));
        Ok(())
    }

    fn check(&self, spec: &ShareSpec) -> anyhow::Result<Walk> {
        let subject = || format!("cannot share {}", shown(&spec.path));
        let root = spec.path.canonicalize().with_context(subject)?;
        if !root.is_dir() {
            bail!("{}: it is not a folder", subject());
        }
        std::fs::read_dir(&root)
            .and_then(|_| Root::open(&root))
            .with_context(subject)?;
        let is_hidden =
            |path: &Path| DirectoryId::of(path).is_ok_and(|id| self.hidden.contains(&id));
        if root.ancestors().any(is_hidden) {
            bail!("{}: sprat keeps its own state there", subject());
        }
        let name = spec.name.as_deref().map(SafeName::parse).transpose();
        let name = name.with_context(|| format!("{} under that name", subject()))?;
        let (hidden, cancel) = (Arc::clone(&self.hidden), self.cancel.clone());
        Ok(Walk {
            root: root.into(),
            prefix: name.map(|name| name.to_string()),
            hidden,
            cancel,
        })
    }

    /// All shares, in the order they were added.
    pub fn status(&self) -> Vec<ShareState> {
        lock(&self.list)
            .iter()
            .map(|entry| entry.state.borrow().clone())
            .collect()
    }

    /// Is the first scan of a folder not over?
    pub fn is_scanning(&self) -> bool {
        self.unscanned().is_some()
    }

    fn unscanned(&self) -> Option<watch::Receiver<ShareState>> {
        let list = lock(&self.list);
        let entry = list.iter().find(|entry| !entry.state.borrow().scanned);
        entry.map(|entry| entry.state.clone())
    }

    /// Returns when the first scan of every folder is over.
    pub async fn scanned(&self) {
        while let Some(mut state) = self.unscanned() {
            if state.wait_for(|state| state.scanned).await.is_err() {
                // The task has ended, and the peer with it.
                return pending().await;
            }
        }
    }

    /// All shares together.
    pub fn progress(&self) -> ShareProgress {
        self.status().into_iter().fold(
            ShareProgress::default(),
            |mut sum, ShareState { progress, .. }| {
                sum.files_to_hash += progress.files_to_hash;
                sum.bytes_to_hash += progress.bytes_to_hash;
                sum.skipped.merge(progress.skipped);
                sum
            },
        )
    }

    /// The name that the file at this absolute path (its folder canonical) has as part of a share; None if it lies in
    /// none. A download into a share is published under this name, so that it is listed once.
    pub fn name_of(&self, path: &Path) -> Option<SafeName> {
        lock(&self.list)
            .iter()
            .find_map(|entry| entry.walk.name(path.strip_prefix(&entry.walk.root).ok()?))
    }
}

fn lock(list: &Mutex<Vec<Entry>>) -> MutexGuard<'_, Vec<Entry>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the shares of files that were found changed while they were served.
async fn hand_on_suspects(library: Library, list: Arc<Mutex<Vec<Entry>>>) {
    let mut changed = library.changed();
    while changed.changed().await.is_ok() {
        let suspects = Arc::new(library.take_suspects());
        if suspects.is_empty() {
            continue;
        }
        let shares: Vec<_> = lock(&list)
            .iter()
            .map(|entry| entry.suspects.clone())
            .collect();
        for share in shares {
            // Without its task a share needs no news.
            let _ = share.send(Arc::clone(&suspects)).await;
        }
    }
}

/// Files on offer that lie in no share, such as downloads into other folders. No event tells of them.
#[derive(Clone)]
struct Outside {
    index: Arc<Index>,
    library: Library,
    list: Arc<Mutex<Vec<Entry>>>,
}

impl Outside {
    /// Looks at them as often as shares are rescanned.
    async fn keep_true(self, rescan: Duration) {
        let mut pause = rescan;
        loop {
            tokio::time::sleep(pause).await;
            let (outside, began) = (self.clone(), Instant::now());
            // It fails only when the pool shuts down, and we with it.
            let _ = spawn_blocking(move || outside.look()).await;
            pause = rescan.max(began.elapsed() * REST);
        }
    }

    /// Withdraws those that are gone or changed.
    fn look(&self) {
        let shares: Vec<_> = lock(&self.list)
            .iter()
            .map(|entry| entry.walk.root.clone())
            .collect();
        let mut gone = vec![];
        for location in self.library.locations() {
            let path = location.path();
            if shares.iter().any(|share| path.starts_with(share)) {
                continue;
            }
            match symlink_metadata(&path) {
                Ok(found) if Stamp::from(&found) == location.stamp => {}
                Ok(_) => self.library.suspect(&location),
                Err(error) if is_gone(&error) => {
                    self.library.suspect(&location);
                    gone.push(path);
                }
                // Whether it is there will be seen another time.
                Err(_) => {}
            }
        }
        if let Err(error) = self.index.forget(&gone) {
            tracing::warn!(%error, "the index of hashed files cannot be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs::{self, File};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::time::SystemTime;

    use rustix::fs::{CWD, FileType, Mode as Bits, mknodat};
    use tempfile::TempDir;
    use tokio::time::timeout;

    use crate::content::{ContentId, Layout, assemble, hash_piece};
    use crate::peer::sharing::library::ServeError;
    use crate::peer::sharing::scan::Skipped;
    use crate::peer::sharing::watcher::Mode;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    struct Bench {
        dir: TempDir,
        shares: Shares,
        library: Library,
    }

    impl Bench {
        fn new(poll: bool) -> Self {
            Self::on(TempDir::new().unwrap(), poll)
        }

        fn on(dir: TempDir, poll: bool) -> Self {
            fs::create_dir_all(dir.path().join("state")).unwrap();
            fs::create_dir_all(dir.path().join("share")).unwrap();
            let library = Library::new();
            let shares = Shares::new(SharesConfig {
                index: Arc::new(Index::open(&dir.path().join("state/index")).unwrap()),
                library: library.clone(),
                hidden: vec![dir.path().join("state")],
                rescan: Duration::from_secs(3_600),
                poll,
                cancel: CancellationToken::new(),
                tasks: TaskTracker::new(),
            });
            Self {
                dir,
                shares,
                library,
            }
        }

        async fn started(poll: bool) -> Self {
            let bench = Self::new(poll);
            bench.add(None, "share").unwrap();
            bench.until_state(|state| state.scanned).await;
            bench
        }

        fn add(&self, name: Option<&str>, folder: &str) -> anyhow::Result<()> {
            self.shares.add(ShareSpec {
                name: name.map(Into::into),
                path: self.dir.path().join(folder),
            })
        }

        fn path(&self, relative: &str) -> PathBuf {
            self.dir
                .path()
                .canonicalize()
                .unwrap()
                .join("share")
                .join(relative)
        }

        fn put(&self, relative: &str, bytes: impl AsRef<[u8]>) {
            let path = self.path(relative);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }

        fn listed(&self) -> BTreeMap<String, ContentId> {
            self.library
                .files()
                .into_iter()
                .map(|file| (file.name.to_string(), file.content_id))
                .collect()
        }

        /// Waits until exactly these names are listed, with the content of these texts.
        async fn until_listed(&self, expected: &[(&str, &str)]) {
            let expected: BTreeMap<_, _> = expected
                .iter()
                .map(|(name, text)| ((*name).into(), id_of(text)))
                .collect();
            self.until(|listed| *listed == expected).await;
        }

        async fn until(&self, is_so: impl Fn(&BTreeMap<String, ContentId>) -> bool) {
            let mut changed = self.library.changed();
            let wait = async {
                while !is_so(&self.listed()) {
                    changed.changed().await.unwrap();
                }
            };
            assert!(
                timeout(LONG, wait).await.is_ok(),
                "{:?}",
                self.listed().keys()
            );
        }

        async fn until_state(&self, is_so: impl Fn(&ShareState) -> bool) -> ShareState {
            let mut state = lock(&self.shares.list)[0].state.clone();
            let reached = timeout(LONG, state.wait_for(|state| is_so(state))).await;
            let reached = reached.map(|state| state.unwrap().clone());
            reached.unwrap_or_else(|_| panic!("{:?}", self.shares.status()))
        }

        async fn stop(self) -> TempDir {
            self.shares.cancel.cancel();
            self.shares.tasks.close();
            timeout(LONG, self.shares.tasks.wait())
                .await
                .expect("stops");
            self.dir
        }
    }

    fn id_of(text: &str) -> ContentId {
        let layout = Layout::new(text.len() as u64).unwrap();
        let hashes = layout
            .pieces()
            .map(|piece| hash_piece(layout, piece, text.as_bytes()).unwrap())
            .collect();
        assemble(layout, hashes).unwrap().id()
    }

    #[tokio::test]
    async fn follows_create_edit_rename_and_delete() {
        let bench = Bench::started(false).await;
        assert_eq!(bench.shares.status()[0].mode, Mode::Events);
        bench.put("a", "one");
        bench.until_listed(&[("a", "one")]).await;
        bench.put("a", "two");
        bench.until_listed(&[("a", "two")]).await;
        bench.put("dir/sub/b", "three");
        bench
            .until_listed(&[("a", "two"), ("dir/sub/b", "three")])
            .await;
        fs::rename(bench.path("a"), bench.path("c")).unwrap();
        bench
            .until_listed(&[("c", "two"), ("dir/sub/b", "three")])
            .await;
        fs::rename(bench.path("dir/sub"), bench.path("sub")).unwrap();
        bench
            .until_listed(&[("c", "two"), ("sub/b", "three")])
            .await;
        bench.put("sub/b", "after the move");
        bench
            .until_listed(&[("c", "two"), ("sub/b", "after the move")])
            .await;
        fs::rename(bench.path("sub"), bench.dir.path().join("moved out")).unwrap();
        bench.until_listed(&[("c", "two")]).await;
        fs::rename(bench.dir.path().join("moved out"), bench.path("in")).unwrap();
        bench
            .until_listed(&[("c", "two"), ("in/b", "after the move")])
            .await;
        bench.put("in/e", "in a folder that was moved in");
        fs::remove_file(bench.path("c")).unwrap();
        bench
            .until_listed(&[
                ("in/b", "after the move"),
                ("in/e", "in a folder that was moved in"),
            ])
            .await;
        fs::remove_dir_all(bench.path("in")).unwrap();
        bench.until_listed(&[]).await;
        bench.stop().await;
    }

    #[tokio::test]
    async fn a_download_into_the_share_appears_when_it_is_finished() {
        let bench = Bench::started(false).await;
        bench.put("film.part", "half");
        bench.put("film.part", "whole");
        bench.put("other", "x");
        bench.until_listed(&[("other", "x")]).await;
        fs::rename(bench.path("film.part"), bench.path("film")).unwrap();
        bench
            .until_listed(&[("film", "whole"), ("other", "x")])
            .await;
        assert_eq!(
            bench
                .shares
                .name_of(&bench.path("sub/film"))
                .unwrap()
                .as_str(),
            "sub/film"
        );
        assert_eq!(bench.shares.name_of(bench.dir.path()), None);
        bench.stop().await;
    }

    #[tokio::test]
    async fn a_file_still_being_written_is_not_listed_wrong() {
        let bench = Bench::started(false).await;
        let mut file = File::create(bench.path("log")).unwrap();
        let mut text = String::new();
        for n in 0..300 {
            let line = format!("line {n}\n");
            std::io::Write::write_all(&mut file, line.as_bytes()).unwrap();
            text += &line;
            tokio::task::yield_now().await;
        }
        bench.until_listed(&[("log", &text)]).await;
        bench.stop().await;
    }

    #[tokio::test]
    async fn a_thousand_small_files_and_a_restart_that_hashes_none() {
        let bench = Bench::new(false);
        let names: Vec<String> = (0..1_000)
            .map(|n| format!("{}/{}/{n}", n % 10, n % 7))
            .collect();
        for name in &names {
            bench.put(name, name);
            let file = File::options().append(true).open(bench.path(name)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        }
        bench.add(None, "share").unwrap();
        let expected: Vec<_> = names
            .iter()
            .map(|name| (name.as_str(), name.as_str()))
            .collect();
        bench.until_listed(&expected).await;
        bench
            .until_state(|state| state.files == 1_000 && state.progress == ShareProgress::default())
            .await;

        let again = Bench::on(bench.stop().await, false);
        again.add(None, "share").unwrap();
        let state = again
            .until_state(|state| state.scanned || state.progress.files_to_hash > 0)
            .await;
        assert!(
            state.scanned && state.progress.files_to_hash == 0,
            "{state:?}"
        );
        again.until_listed(&expected).await;
        again.stop().await;
    }

    #[tokio::test]
    async fn many_files_at_once_are_all_found() {
        let bench = Bench::started(false).await;
        for n in 0..5_000 {
            bench.put(&format!("{n}"), "");
        }
        for n in 0..2_500 {
            fs::rename(
                bench.path(&format!("{n}")),
                bench.path(&format!("renamed {n}")),
            )
            .unwrap();
        }
        let is_right = |name: &String| {
            name.starts_with("renamed") != name.parse().is_ok_and(|n: u32| n >= 2_500)
        };
        bench
            .until(|listed| listed.len() == 5_000 && listed.keys().all(is_right))
            .await;
        bench.stop().await;
    }

    #[tokio::test]
    async fn links_and_special_files_are_counted() {
        let bench = Bench::new(false);
        bench.put("good", "x");
        symlink("/etc/passwd", bench.path("out")).unwrap();
        symlink(".", bench.path("loop")).unwrap();
        mknodat(
            CWD,
            bench.path("fifo"),
            FileType::Fifo,
            Bits::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        bench.add(Some("pre"), "share").unwrap();
        bench.until_listed(&[("pre/good", "x")]).await;
        let skipped = Skipped {
            symlinks: 2,
            special: 1,
            ..Skipped::default()
        };
        bench
            .until_state(|state| {
                state.scanned && state.progress.skipped == skipped && state.files == 1
            })
            .await;
        assert_eq!(bench.shares.progress().skipped, skipped);
        bench.stop().await;
    }

    #[tokio::test]
    #[expect(clippy::print_stderr, reason = "a test that cannot run says so")]
    async fn unreadable_files_are_counted() {
        if rustix::process::geteuid().is_root() {
            eprintln!("NOT RUN: root may read everything, so nothing is unreadable");
            return;
        }
        let bench = Bench::new(false);
        bench.put("good", "x");
        bench.put("secret", "x");
        bench.put("closed/inside", "x");
        fs::set_permissions(bench.path("secret"), PermissionsExt::from_mode(0o000)).unwrap();
        fs::set_permissions(bench.path("closed"), PermissionsExt::from_mode(0o000)).unwrap();
        bench.add(None, "share").unwrap();
        bench.until_listed(&[("good", "x")]).await;
        bench
            .until_state(|state| state.progress.skipped.unreadable == 2)
            .await;
        fs::set_permissions(bench.path("closed"), PermissionsExt::from_mode(0o755)).unwrap();
        bench
            .until_listed(&[("closed/inside", "x"), ("good", "x")])
            .await;
        bench.stop().await;
    }

    #[tokio::test]
    async fn a_share_that_goes_away_comes_back() {
        let bench = Bench::started(false).await;
        bench.put("a", "one");
        bench.until_listed(&[("a", "one")]).await;
        let aside = bench.dir.path().join("aside");
        fs::rename(bench.path(""), &aside).unwrap();
        bench.until_listed(&[]).await;
        let gone = bench.until_state(|state| state.mode != Mode::Events).await;
        assert_eq!(gone.mode.to_string(), "polling: the folder is not there");
        fs::rename(&aside, bench.path("")).unwrap();
        bench.until_listed(&[("a", "one")]).await;
        bench.until_state(|state| state.mode == Mode::Events).await;
        bench.put("b", "two");
        bench.until_listed(&[("a", "one"), ("b", "two")]).await;
        bench.stop().await;
    }

    #[tokio::test]
    async fn polling_finds_the_same() {
        let bench = Bench::started(true).await;
        assert!(matches!(
            bench.shares.status()[0].mode,
            Mode::Polling { .. }
        ));
        bench.put("a", "one");
        bench.put("dir/b", "two");
        bench.until_listed(&[("a", "one"), ("dir/b", "two")]).await;
        fs::rename(bench.path("dir"), bench.path("sub")).unwrap();
        bench.put("a", "three");
        bench
            .until_listed(&[("a", "three"), ("sub/b", "two")])
            .await;
        fs::remove_dir_all(bench.path("sub")).unwrap();
        bench.until_listed(&[("a", "three")]).await;
        bench.stop().await;
    }

    #[tokio::test]
    async fn a_file_found_changed_while_served_comes_back_with_its_new_content() {
        let bench = Bench::started(true).await;
        bench.put("a", "one");
        bench.until_listed(&[("a", "one")]).await;
        bench.put("a", "two");
        let failed = bench.library.open(&id_of("one")).err();
        assert!(
            matches!(failed, Some(ServeError::Changed | ServeError::NotFound)),
            "{failed:?}"
        );
        bench.until_listed(&[("a", "two")]).await;
        bench.stop().await;
    }

    #[tokio::test]
    async fn the_first_of_two_shares_has_the_name() {
        let bench = Bench::new(false);
        fs::create_dir(bench.dir.path().join("second")).unwrap();
        fs::write(bench.dir.path().join("second/a"), "second").unwrap();
        fs::write(bench.dir.path().join("second/b"), "second").unwrap();
        bench.put("a", "first");
        bench.add(None, "share").unwrap();
        bench.add(None, "second").unwrap();
        bench.until_listed(&[("a", "first"), ("b", "second")]).await;
        let states = bench.shares.status();
        assert_eq!(states.len(), 2);
        bench.stop().await;
    }

    #[tokio::test]
    async fn what_cannot_be_shared_is_refused_by_name() {
        let bench = Bench::started(false).await;
        bench.put("file", "x");
        let refused = |name: Option<&str>, folder: &str| {
            format!("{:#}", bench.add(name, folder).unwrap_err())
        };
        for (name, folder, reason) in [
            (None, "nothing", "No such file or directory"),
            (None, "share/file", "it is not a folder"),
            (None, "share", "is shared already"),
            (None, "share/../share/.", "is shared already"),
            (None, "state", "sprat keeps its own state there"),
        ] {
            let error = refused(name, folder);
            assert!(
                error.contains(reason) && error.contains(folder.rsplit('/').next().unwrap()),
                "{error}"
            );
        }
        fs::create_dir(bench.dir.path().join("other")).unwrap();
        let error = refused(Some("../up"), "other");
        assert!(error.contains("other"), "{error}");
        assert_eq!(bench.shares.status().len(), 1);
        bench.stop().await;
    }

    #[tokio::test]
    async fn the_state_directory_is_not_shared() {
        let bench = Bench::new(false);
        fs::write(bench.dir.path().join("state/key"), "secret").unwrap();
        bench.put("a", "x");
        bench.add(None, "").unwrap();
        bench.until_listed(&[("share/a", "x")]).await;
        bench
            .until_state(|state| state.scanned && state.progress == ShareProgress::default())
            .await;
        fs::write(bench.dir.path().join("state/key2"), "secret").unwrap();
        bench.put("b", "x");
        bench
            .until_listed(&[("share/a", "x"), ("share/b", "x")])
            .await;
        bench.stop().await;
    }

    #[tokio::test]
    async fn a_big_file_does_not_hold_up_small_ones_nor_the_end() {
        let bench = Bench::new(false);
        File::create(bench.path("big"))
            .unwrap()
            .set_len(64 << 30)
            .unwrap();
        bench.put("small", "x");
        bench.add(None, "share").unwrap();
        bench.until_listed(&[("small", "x")]).await;
        bench
            .until_state(|state| state.progress.bytes_to_hash == 64 << 30)
            .await;
        bench.put("later", "y");
        bench.until_listed(&[("later", "y"), ("small", "x")]).await;
        let began = Instant::now();
        bench.stop().await;
        assert!(
            began.elapsed() < Duration::from_secs(3),
            "{:?}",
            began.elapsed()
        );
    }
}
