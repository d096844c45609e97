//! One share: what it has listed, and what a look at the disk makes of that. Blocks; spawns nothing.
//!
//! Invariant: whoever finds another stamp than the listed one takes the file off, and it comes back only with a manifest
//! made for the new stamp. The index is told before the Library, in batches.
//!
//! A renamed file need not be read again. The kernel stamps a rename as a change of the inode (ctime), so the stamp alone
//! cannot tell it from an edit with the times set back. A manifest follows a file to its new path only if the kernel
//! reported the move, no other event of the file came between its hash and the move, and device, inode, size and mtime
//! are the same. Files beneath a moved directory keep their ctime, and all of their stamp must match. After an unreported
//! rename (sprat was not running, or polls) the file is hashed again.
//!
//! The index forgets a file that is seen to go away and, after the first scan, those that went away before. A rescan
//! that misses files forgets nothing: a disk that was unmounted may come back.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::file_table::{FileState, Job, KnownFile, Tally};
use super::hasher::{HashError, Hashed, Stamp};
use super::index::{Index, IndexError};
use super::library::Library;
use super::scan::{DirectoryId, Look, ScannedFile, Skipped, Walk, is_gone, shown};
use super::watcher::{DiskChanges, Lookout, Mode, QUIET, Settled};

mod offers;

use offers::{Again, Offers, PROOF_AGE, age, until_proof};

/// One share.
pub struct SharedFolder {
    walk: Walk,
    lookout: Lookout,
    /// The directory that was there at the last rescan. It is not kept open.
    seen: Option<DirectoryId>,
    offers: Offers,
    skipped: Skipped,
}

/// What a look leaves to do.
#[derive(Default)]
pub struct Looked {
    /// Absolute paths to look at again after some time.
    pub again: Again,
    /// Where changes arrive from now on, if that is news.
    pub changes: Option<DiskChanges>,
    /// All of the share has to be looked at.
    pub rescan: bool,
}

impl SharedFolder {
    /// A share of what `walk` finds beneath its root (canonical); nothing is looked at yet. `lookout` is for that root.
    pub fn new(
        walk: Walk,
        earlier: Vec<Walk>,
        index: Arc<Index>,
        library: Library,
        lookout: Lookout,
    ) -> Self {
        let offers = Offers::new(walk.root.clone(), earlier, index, library);
        Self {
            walk,
            lookout,
            seen: None,
            offers,
            skipped: Skipped::default(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.walk.root
    }

    /// What ends it.
    pub fn cancel(&self) -> &CancellationToken {
        &self.walk.cancel
    }

    /// What it has.
    pub fn tally(&self) -> Tally {
        self.offers.roster.tally()
    }

    /// What is there but not shared, as of the last rescan; names and permissions as of now.
    pub fn skipped(&self) -> Skipped {
        let Tally {
            clashes,
            unreadable,
            ..
        } = self.tally();
        Skipped {
            clashes,
            unreadable: self.skipped.unreadable + unreadable,
            ..self.skipped
        }
    }

    /// How changes are learnt of.
    pub fn mode(&self) -> &Mode {
        self.lookout.mode()
    }

    /// Whether another directory, or none, lies at the share's path than at the last rescan.
    pub fn has_moved(&self) -> bool {
        DirectoryId::of(self.path()).ok() != self.seen
    }

    /// There will be no more changes from where they arrived.
    pub fn lose_events(&mut self) {
        self.lookout.ended();
    }

    /// Looks at all of the share. If its directory is not there or cannot be read, everything is withdrawn.
    pub fn rescan(&mut self) -> io::Result<Looked> {
        self.try_rescan().inspect_err(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                self.seen = None;
                self.offers.withdraw_all();
                self.lookout.lose(if is_gone(error) {
                    "the folder is not there".into()
                } else {
                    error.to_string()
                });
            }
        })
    }

    fn try_rescan(&mut self) -> io::Result<Looked> {
        let id = DirectoryId::of(self.path())?;
        if self.seen != Some(id) {
            self.offers.withdraw_all();
            self.lookout.lose("the folder was replaced".into());
            self.seen = Some(id);
        }
        let mut looked = Looked {
            changes: self.lookout.open(),
            ..Looked::default()
        };
        let (skipped, directories) = self.walk_beneath(Path::new(""), &mut looked)?;
        self.lookout.settle(Some(directories));
        self.skipped = skipped;
        if self.offers.round == 1 && !self.offers.roster.is_empty() {
            let keep = |path: &Path| {
                path.strip_prefix(self.path())
                    .map_or(true, |path| self.offers.roster.get(path).is_some())
            };
            let _ = self.offers.index.retain(keep).inspect_err(report);
        }
        Ok(looked)
    }

    /// Looks at what has settled.
    pub fn look(&mut self, settled: &Settled) -> Looked {
        let mut looked = Looked {
            rescan: settled.rescan,
            ..Looked::default()
        };
        for (from, to) in &settled.moves {
            if let (Ok(from), Ok(to)) =
                (from.strip_prefix(self.path()), to.strip_prefix(self.path()))
            {
                self.follow(from, to);
            }
        }
        let mut gone = vec![];
        for path in &settled.paths {
            match path.strip_prefix(self.path()) {
                Ok(relative) if relative.as_os_str().is_empty() => looked.rescan = true,
                Ok(relative) => self.look_at(relative, &mut looked, &mut gone),
                Err(_) => {}
            }
        }
        let _ = self.offers.index.forget(&gone).inspect_err(report);
        looked
    }

    fn look_at(&mut self, relative: &Path, looked: &mut Looked, gone: &mut Vec<PathBuf>) {
        match self.walk.look(relative) {
            Look::File(found) => {
                self.offers.round += 1;
                self.consider(found, true, looked);
                self.offers.withdraw_unseen(relative);
            }
            Look::Directory => {
                // What cannot be walked now is met again by the next rescan.
                let _ = self.walk_beneath(relative, looked);
                self.lookout.settle(None);
            }
            Look::Skipped(_) => self.offers.withdraw_beneath(relative),
            Look::Nothing => {
                gone.extend(
                    self.offers
                        .roster
                        .beneath(relative)
                        .map(|(relative, _)| self.path().join(relative)),
                );
                self.offers.withdraw_beneath(relative);
            }
        }
    }

    /// Looks at everything beneath `start`; returns what was skipped and how many directories there are.
    fn walk_beneath(&mut self, start: &Path, looked: &mut Looked) -> io::Result<(Skipped, u64)> {
        let scan = self
            .walk
            .scan(start, &mut |directory| self.lookout.enter(directory))?;
        self.offers.round += 1;
        for found in scan.files {
            if self.walk.cancel.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            self.consider(found, false, looked);
        }
        self.offers.withdraw_unseen(start);
        Ok((scan.skipped, scan.directories))
    }

    /// Decides what to do about a file that is there. `settled`: its last event is long enough ago.
    fn consider(&mut self, found: ScannedFile, settled: bool, looked: &mut Looked) {
        let ScannedFile {
            relative,
            name,
            stamp,
        } = found;
        let settled = settled || age(stamp.ctime_ns) >= QUIET;
        let before = self
            .offers
            .roster
            .get(&relative)
            .map(|known| (known.state, known.stamp == stamp));
        if let Some((state, true)) = before {
            self.offers.roster.see(&relative, self.offers.round);
            match state {
                FileState::Unsettled
                    if settled && !self.offers.offer(relative.clone(), &mut looked.again) =>
                {
                    self.offers.set(&relative, FileState::Queued);
                }
                FileState::Young if age(stamp.mtime_ns) >= PROOF_AGE => {
                    self.offers.set(&relative, FileState::Proving)
                }
                FileState::Young => looked
                    .again
                    .push((self.path().join(relative), until_proof(&stamp))),
                FileState::Clash => drop(self.offers.offer(relative, &mut looked.again)),
                _ => {}
            }
            return;
        }
        let known = KnownFile {
            name,
            stamp,
            state: FileState::Unsettled,
            round: self.offers.round,
        };
        let (listed, before) = self
            .offers
            .replace(relative.clone(), known, &mut looked.again);
        if listed {
            return;
        }
        let was_settled = before.is_none_or(|known| known.state != FileState::Unsettled);
        if settled && (was_settled || age(stamp.ctime_ns) >= QUIET) {
            self.offers.set(&relative, FileState::Queued);
        } else {
            looked.again.push((self.path().join(relative), QUIET));
        }
    }

    /// Lets manifests follow a file, or all files of a directory, from one path to another.
    fn follow(&mut self, from: &Path, to: &Path) {
        let is_file = match self.walk.look(to) {
            Look::File(_) => true,
            Look::Directory => false,
            Look::Skipped(_) | Look::Nothing => return,
        };
        let (mut old, mut new) = (vec![], vec![]);
        for (path, known) in self
            .offers
            .roster
            .beneath(from)
            .filter(|(_, known)| known.state == FileState::Listed)
        {
            let rest = path.strip_prefix(from).expect("lies at or beneath `from`");
            let Look::File(found) = self.walk.look(&if is_file {
                to.to_path_buf()
            } else {
                to.join(rest)
            }) else {
                continue;
            };
            let ctime_ns = if is_file {
                found.stamp.ctime_ns
            } else {
                known.stamp.ctime_ns
            };
            if found.stamp
                != (Stamp {
                    ctime_ns,
                    ..known.stamp
                })
            {
                continue;
            }
            if let Some(hashed) = self
                .offers
                .index
                .lookup(&self.path().join(path), &known.stamp)
            {
                old.push(path.clone());
                new.push((
                    found.clone(),
                    Hashed {
                        stamp: found.stamp,
                        ..hashed
                    },
                ));
            }
        }
        let new_paths: Vec<_> = new
            .iter()
            .map(|(f, hashed)| (self.path().join(&f.relative), hashed.clone()))
            .collect();
        let old_paths: Vec<_> = old.iter().map(|path| self.path().join(path)).collect();
        let _ = self
            .offers
            .index
            .insert_batch(&new_paths)
            .inspect_err(report);
        let _ = self.offers.index.forget(&old_paths).inspect_err(report);
        for (
            old,
            (
                ScannedFile {
                    relative,
                    name,
                    stamp,
                },
                hashed,
            ),
        ) in old.iter().zip(new)
        {
            self.offers.withdraw(old);
            self.offers.withdraw(&relative);
            let known = KnownFile {
                name,
                stamp,
                state: FileState::Unsettled,
                round: self.offers.round,
            };
            self.offers.roster.put(relative.clone(), known);
            self.offers.list(&relative, hashed, &mut vec![]);
        }
    }

    /// Looks again at files that were found changed while they were served, which took them off the Library.
    pub fn doubt(&mut self, suspects: &BTreeSet<PathBuf>) -> Looked {
        let mut looked = Looked::default();
        for path in suspects {
            let Ok(relative) = path.strip_prefix(self.path()) else {
                continue;
            };
            if self
                .offers
                .roster
                .get(relative)
                .is_some_and(|known| known.state.is_listed())
            {
                self.offers.set(relative, FileState::Unsettled);
                looked.again.push((path.clone(), QUIET));
            }
        }
        looked
    }

    /// Small files to hash now, and where they are; none if nothing waits.
    pub fn next_small(&mut self) -> Option<(Arc<Path>, Vec<Job>)> {
        let jobs = self.offers.roster.next_small();
        (!jobs.is_empty()).then(|| (self.walk.root.clone(), jobs))
    }

    /// A big file to hash now, and where it is.
    pub fn next_big(&mut self) -> Option<(Arc<Path>, Job)> {
        Some((self.walk.root.clone(), self.offers.roster.next_big()?))
    }

    /// Takes in what was hashed. A file that changed meanwhile is looked at again when it is quiet.
    pub fn accept(&mut self, done: Vec<(Job, Result<Hashed, HashError>)>) -> Looked {
        let (mut looked, mut hashes) = (Looked::default(), vec![]);
        for (Job { relative, stamp }, outcome) in done {
            if !self
                .offers
                .roster
                .get(&relative)
                .is_some_and(|known| known.stamp == stamp && known.state.is_queued())
            {
                continue;
            }
            let again = match outcome {
                Ok(hashed) if hashed.stamp == stamp => {
                    hashes.push((self.path().join(relative), hashed));
                    continue;
                }
                Ok(_) | Err(HashError::Changed | HashError::Cancelled) => QUIET,
                Err(HashError::Io(error)) if is_gone(&error) => Duration::ZERO,
                Err(error) => {
                    tracing::debug!(path = %shown(&relative), %error, "skipped");
                    self.offers.set(&relative, FileState::Unreadable);
                    continue;
                }
            };
            self.offers.set(&relative, FileState::Unsettled);
            looked.again.push((self.path().join(&relative), again));
        }
        let _ = self.offers.index.insert_batch(&hashes).inspect_err(report);
        for (path, hashed) in hashes {
            let relative = path
                .strip_prefix(self.path())
                .expect("joined to it above")
                .to_path_buf();
            self.offers.list(&relative, hashed, &mut looked.again);
        }
        looked
    }
}

fn report(error: &IndexError) {
    tracing::warn!(%error, "the index of hashed files cannot be written: files will be hashed again after a restart");
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use tempfile::TempDir;

    use crate::content::ContentId;
    use crate::peer::sharing::hasher::hash_file;
    use crate::safe_path::open_beneath_folder;

    use std::time::SystemTime;

    use super::*;

    struct Bench {
        dir: TempDir,
        share: SharedFolder,
    }

    impl Bench {
        fn new() -> Self {
            let dir = TempDir::new().unwrap();
            let root = dir.path().canonicalize().unwrap().join("share");
            fs::create_dir(&root).unwrap();
            let index = Arc::new(Index::open(&dir.path().join("index")).unwrap());
            let lookout = Lookout::new(root.clone(), true);
            let walk = Walk {
                root: root.into(),
                prefix: None,
                hidden: Arc::new([]),
                cancel: CancellationToken::new(),
            };
            let mut share = SharedFolder::new(walk, vec![], index, Library::new(), lookout);
            share.rescan().unwrap();
            Self { dir, share }
        }

        fn path(&self, relative: &str) -> PathBuf {
            self.share.path().join(relative)
        }

        /// Writes a file that looks old.
        fn put(&self, relative: &str, text: &str) {
            let path = self.path(relative);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            make_old(&path);
        }

        fn look(&mut self, paths: &[&str], moves: &[(&str, &str)]) -> Looked {
            let paths = paths.iter().map(|path| self.path(path)).collect();
            let moves = moves
                .iter()
                .map(|(from, to)| (self.path(from), self.path(to)))
                .collect();
            self.share.look(&Settled {
                paths,
                moves,
                rescan: false,
            })
        }

        /// Hashes what waits; returns how many files.
        fn hash(&mut self) -> usize {
            let Some((root, jobs)) = self.share.next_small() else {
                return 0;
            };
            let n = jobs.len();
            let hash = |job: &Job| {
                hash_file(
                    &open_beneath_folder(&root, &job.relative)?.0,
                    &CancellationToken::new(),
                )
            };
            let done = jobs
                .into_iter()
                .map(|job| (job.clone(), hash(&job)))
                .collect();
            self.share.accept(done);
            n
        }

        fn names(&self) -> Vec<String> {
            self.share
                .offers
                .library
                .files()
                .into_iter()
                .map(|file| file.name.to_string())
                .collect()
        }

        fn id_of(&self, name: &str) -> Option<ContentId> {
            self.share
                .offers
                .library
                .files()
                .into_iter()
                .find(|file| file.name.as_str() == name)
                .map(|file| file.content_id)
        }
    }

    fn make_old(path: &Path) {
        File::options()
            .append(true)
            .open(path)
            .unwrap()
            .set_modified(SystemTime::UNIX_EPOCH)
            .unwrap();
    }

    #[test]
    fn a_file_is_listed_when_settled_and_hashed_once() {
        let mut bench = Bench::new();
        bench.put("a", "text");
        let looked = bench.share.rescan().unwrap();
        assert_eq!(
            looked.again,
            [(bench.path("a"), QUIET)],
            "its ctime is young"
        );
        assert_eq!(bench.hash(), 0);
        bench.look(&["a"], &[]);
        assert_eq!(bench.share.tally().files_to_hash, 1);
        assert_eq!(bench.hash(), 1);
        assert_eq!(bench.names(), ["a"]);
        assert_eq!(bench.share.tally().files, 1);
        bench.look(&["a"], &[]);
        bench.share.rescan().unwrap();
        assert_eq!(bench.hash(), 0);
    }

    #[test]
    fn a_young_file_is_proved_later() {
        let mut bench = Bench::new();
        bench.put("a", "text");
        let path = bench.path("a");
        let now = SystemTime::now();
        File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .set_modified(now)
            .unwrap();
        bench.look(&["a"], &[]);
        bench.hash();
        assert_eq!(bench.names(), ["a"], "it is listed meanwhile");
        let again = bench.look(&["a"], &[]).again;
        assert!(
            matches!(&*again, [(again, wait)] if *again == path && *wait <= PROOF_AGE + QUIET),
            "{again:?}"
        );
        // As if the time had passed: the stamp is the same, but the mtime in it is old.
        let mut known = bench.share.offers.roster.remove(Path::new("a")).unwrap();
        make_old(&path);
        known.stamp = Stamp::from(&fs::metadata(&path).unwrap());
        bench.share.offers.roster.put("a".into(), known);
        bench.look(&["a"], &[]);
        assert_eq!(bench.share.tally().files_to_hash, 1);
        assert_eq!(bench.share.tally().files, 1);
        assert_eq!(bench.hash(), 1);
        bench.look(&["a"], &[]);
        assert_eq!((bench.hash(), bench.names().len()), (0, 1));
    }

    #[test]
    fn a_changed_file_is_off_until_hashed_again() {
        let mut bench = Bench::new();
        bench.put("a", "text");
        bench.look(&["a"], &[]);
        bench.hash();
        let before = bench.id_of("a");
        bench.put("a", "TEXT");
        bench.look(&["a"], &[]);
        assert_eq!(bench.names().len(), 0);
        bench.put("a", "changed while it is in the queue");
        bench.hash();
        assert_eq!(
            bench.names().len(),
            0,
            "the hash is of another version than was seen"
        );
        bench.look(&["a"], &[]);
        bench.look(&["a"], &[]);
        bench.hash();
        assert!(bench.id_of("a").is_some_and(|id| Some(id) != before));
    }

    #[test]
    fn a_reported_move_needs_no_hash() {
        let mut bench = Bench::new();
        bench.put("a", "text");
        bench.put("d/e/f", "text too");
        bench.look(&["a", "d"], &[]);
        bench.look(&["d/e/f"], &[]);
        assert_eq!(bench.hash(), 2);
        fs::rename(bench.path("a"), bench.path("b")).unwrap();
        fs::rename(bench.path("d"), bench.path("g")).unwrap();
        bench.look(&["a", "b", "d", "g"], &[("a", "b"), ("d", "g")]);
        assert_eq!(bench.names(), ["b", "g/e/f"]);
        assert_eq!(bench.hash(), 0);
        bench.share.rescan().unwrap();
        assert_eq!((bench.hash(), bench.names().len()), (0, 2));
    }

    #[test]
    fn a_move_with_an_edit_or_without_a_report_is_hashed() {
        let mut bench = Bench::new();
        for name in ["a", "b"] {
            bench.put(name, "text");
        }
        bench.look(&["a", "b"], &[]);
        bench.hash();
        fs::rename(bench.path("a"), bench.path("c")).unwrap();
        bench.put("c", "an edit and its time set back");
        fs::rename(bench.path("b"), bench.path("d")).unwrap();
        bench.look(&["a", "b", "c", "d"], &[("a", "c")]);
        assert_eq!(bench.names().len(), 0);
        assert_eq!(bench.hash(), 2);
        assert_eq!(bench.names(), ["c", "d"]);
    }

    #[test]
    fn what_is_gone_is_withdrawn_with_all_beneath() {
        let mut bench = Bench::new();
        for name in ["a/b", "a/c/d", "a.txt"] {
            bench.put(name, "text");
        }
        bench.look(&["a", "a.txt"], &[]);
        bench.look(&["a/b", "a/c/d"], &[]);
        bench.hash();
        assert_eq!(bench.names().len(), 3);
        fs::remove_dir_all(bench.path("a")).unwrap();
        bench.look(&["a"], &[]);
        assert_eq!(bench.names(), ["a.txt"]);
        fs::remove_file(bench.path("a.txt")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", bench.path("a.txt")).unwrap();
        bench.look(&["a.txt"], &[]);
        assert_eq!(bench.names().len(), 0);
        assert_eq!(bench.share.tally(), Tally::default());
    }

    #[test]
    fn a_missing_folder_withdraws_but_the_index_remembers() {
        let mut bench = Bench::new();
        bench.put("a", "text");
        bench.share.rescan().unwrap();
        bench.look(&["a"], &[]);
        bench.hash();
        let aside = bench.dir.path().join("aside");
        fs::rename(bench.share.path(), &aside).unwrap();
        assert!(bench.share.has_moved());
        assert!(is_gone(&bench.share.rescan().err().unwrap()));
        assert_eq!(bench.names().len(), 0);
        assert!(!bench.share.has_moved());
        // An empty folder in its place, as of a disk that is not mounted.
        fs::create_dir(bench.share.path()).unwrap();
        assert!(bench.share.has_moved());
        bench.share.rescan().unwrap();
        fs::remove_dir(bench.share.path()).unwrap();
        fs::rename(&aside, bench.share.path()).unwrap();
        bench.share.rescan().unwrap();
        assert_eq!(bench.names(), ["a"]);
        assert_eq!(bench.hash(), 0);
    }

    #[test]
    fn files_that_went_away_unseen_are_forgotten_at_the_first_scan() {
        let mut bench = Bench::new();
        bench.put("a", "text");
        bench.put("b", "text");
        bench.look(&["a", "b"], &[]);
        bench.hash();
        let Bench { dir, share } = bench;
        let stamp = Stamp::from(&fs::metadata(share.path().join("b")).unwrap());
        fs::remove_file(share.path().join("b")).unwrap();
        let lookout = Lookout::new(share.path().to_path_buf(), true);
        let SharedFolder { walk, offers, .. } = share;
        let index = offers.index;
        let gone = walk.root.join("b");
        assert!(index.lookup(&gone, &stamp).is_some());
        let mut again = Bench {
            dir,
            share: SharedFolder::new(walk, vec![], Arc::clone(&index), Library::new(), lookout),
        };
        again.share.rescan().unwrap();
        assert_eq!(again.names(), ["a"], "known from before, so without a hash");
        assert!(index.lookup(&gone, &stamp).is_none());
    }

    #[test]
    fn a_doubted_file_comes_back_when_it_is_good() {
        let mut bench = Bench::new();
        bench.put("a", "text");
        bench.look(&["a"], &[]);
        bench.hash();
        let looked = bench.share.doubt(&BTreeSet::from([
            bench.path("a"),
            PathBuf::from("/elsewhere"),
        ]));
        assert_eq!(looked.again, [(bench.path("a"), QUIET)]);
        assert_eq!(bench.names().len(), 0);
        bench.look(&["a"], &[]);
        assert_eq!(bench.names(), ["a"]);
    }

    #[test]
    fn an_earlier_share_has_the_name() {
        let mut bench = Bench::new();
        let earlier = bench.dir.path().join("earlier");
        fs::create_dir(&earlier).unwrap();
        fs::write(earlier.join("a"), "first").unwrap();
        bench.share.offers.earlier.push(Walk {
            root: earlier.as_path().into(),
            ..bench.share.walk.clone()
        });
        bench.put("a", "second");
        bench.look(&["a"], &[]);
        bench.hash();
        assert_eq!(bench.names().len(), 0);
        assert_eq!(
            bench.share.skipped(),
            Skipped {
                clashes: 1,
                ..Skipped::default()
            }
        );
        fs::remove_file(earlier.join("a")).unwrap();
        bench.share.rescan().unwrap();
        assert_eq!(bench.names(), ["a"]);
        assert_eq!(bench.share.skipped(), Skipped::default());
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_counted() {
        let mut bench = Bench::new();
        bench.put("a", "text");
        bench.look(&["a"], &[]);
        let (_, jobs) = bench.share.next_small().unwrap();
        let denied = || HashError::Io(io::ErrorKind::PermissionDenied.into());
        bench
            .share
            .accept(jobs.into_iter().map(|job| (job, Err(denied()))).collect());
        assert_eq!(
            bench.share.skipped(),
            Skipped {
                unreadable: 1,
                ..Skipped::default()
            }
        );
        bench.put("a", "readable");
        bench.look(&["a"], &[]);
        bench.hash();
        assert_eq!(bench.names(), ["a"]);
    }
}
