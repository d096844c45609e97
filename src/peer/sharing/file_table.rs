//! The files one share knows, and what is to be done about each. Pure: no I/O, no clock.
//!
//! Invariant: `tally` counts exactly what `files` holds, and every file that is to be hashed is in a queue. A queue may name
//! files that need no hash any more; they are passed over when their turn comes.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::path::{Path, PathBuf};

use super::hasher::Stamp;
use crate::safe_path::SafeName;

/// A file longer than this is hashed by itself, beside the small ones.
pub const BIG_BYTES: u64 = 16 << 20;
/// At most this many small files are hashed and recorded at once, and no further one after [`BATCH_BYTES`].
pub const BATCH_FILES: usize = 256;
/// See [`BATCH_FILES`].
pub const BATCH_BYTES: u64 = 64 << 20;

/// A file of a share.
#[derive(Clone, Debug)]
pub struct KnownFile {
    /// The name it is, or would be, offered under.
    pub name: SafeName,
    /// The version that was seen.
    pub stamp: Stamp,
    /// What is to be done about it.
    pub state: FileState,
    /// The last look that saw it.
    pub round: u64,
}

/// A version of a file, to be hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its path beneath the share's root.
    pub relative: PathBuf,
    /// The version.
    pub stamp: Stamp,
}

/// What is to be done about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// Being written, as far as one can tell.
    Unsettled,
    /// To be hashed.
    Queued,
    /// Listed, but hashed too soon after a change.
    Young,
    /// Listed, to be hashed once more.
    Proving,
    /// Listed.
    Listed,
    /// Hashed; another file has the name.
    Clash,
    /// Could not be opened or read.
    Unreadable,
}

impl FileState {
    /// Whether this share offers the file.
    pub fn is_listed(self) -> bool {
        matches!(self, Self::Young | Self::Proving | Self::Listed)
    }

    /// Whether the file waits to be hashed, or is being hashed.
    pub fn is_queued(self) -> bool {
        matches!(self, Self::Queued | Self::Proving)
    }
}

/// A roster in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Files listed.
    pub files: u64,
    /// Files to hash, those being hashed included.
    pub files_to_hash: u64,
    /// Their bytes.
    pub bytes_to_hash: u64,
    /// Files whose name another file has.
    pub clashes: u64,
    /// Files that could not be read.
    pub unreadable: u64,
}

/// The files of one share, by their path beneath its root.
#[derive(Debug, Default)]
pub struct Roster {
    files: BTreeMap<PathBuf, KnownFile>,
    small: VecDeque<PathBuf>,
    big: VecDeque<PathBuf>,
    tally: Tally,
}

impl Roster {
    /// The numbers.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Whether it has no files.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The file at a path.
    pub fn get(&self, relative: &Path) -> Option<&KnownFile> {
        self.files.get(relative)
    }

    /// Puts a file in; returns the one that was there.
    pub fn put(&mut self, relative: PathBuf, known: KnownFile) -> Option<KnownFile> {
        let before = self.remove(&relative);
        self.count(&known, true);
        self.enqueue(&relative, &known);
        self.files.insert(relative, known);
        before
    }

    /// Takes a file out.
    pub fn remove(&mut self, relative: &Path) -> Option<KnownFile> {
        let known = self.files.remove(relative)?;
        self.count(&known, false);
        Some(known)
    }

    /// Gives a file another state; returns what it was before, None if there is no such file.
    pub fn set(&mut self, relative: &Path, state: FileState) -> Option<KnownFile> {
        let before = self.files.get(relative)?.clone();
        self.put(
            relative.to_path_buf(),
            KnownFile {
                state,
                ..before.clone()
            },
        );
        Some(before)
    }

    /// Notes that a look saw the file.
    pub fn see(&mut self, relative: &Path, round: u64) {
        if let Some(known) = self.files.get_mut(relative) {
            known.round = round;
        }
    }

    /// The files at and beneath a path. Paths are ordered by component, so these are one range.
    pub fn beneath(&self, start: &Path) -> impl Iterator<Item = (&PathBuf, &KnownFile)> {
        let range = (Bound::Included(start), Bound::Unbounded);
        self.files
            .range::<Path, _>(range)
            .take_while(move |(relative, _)| relative.starts_with(start))
    }

    /// The small files whose turn it is to be hashed; none if nothing waits.
    pub fn next_small(&mut self) -> Vec<Job> {
        let (mut jobs, mut bytes) = (vec![], 0);
        while jobs.len() < BATCH_FILES && bytes < BATCH_BYTES {
            let Some(relative) = self.small.pop_front() else {
                break;
            };
            if let Some(stamp) = self.waiting(&relative) {
                bytes += stamp.size;
                jobs.push(Job { relative, stamp });
            }
        }
        jobs
    }

    /// The big file whose turn it is.
    pub fn next_big(&mut self) -> Option<Job> {
        while let Some(relative) = self.big.pop_front() {
            if let Some(stamp) = self.waiting(&relative) {
                return Some(Job { relative, stamp });
            }
        }
        None
    }

    fn waiting(&self, relative: &Path) -> Option<Stamp> {
        self.files
            .get(relative)
            .filter(|known| known.state.is_queued())
            .map(|known| known.stamp)
    }

    fn enqueue(&mut self, relative: &Path, known: &KnownFile) {
        if known.state.is_queued() {
            let queue = if known.stamp.size > BIG_BYTES {
                &mut self.big
            } else {
                &mut self.small
            };
            queue.push_back(relative.to_path_buf());
        }
    }

    fn count(&mut self, known: &KnownFile, up: bool) {
        let add =
            |counter: &mut u64, n: u64| *counter = if up { *counter + n } else { *counter - n };
        match known.state {
            FileState::Clash => add(&mut self.tally.clashes, 1),
            FileState::Unreadable => add(&mut self.tally.unreadable, 1),
            _ => {}
        }
        if known.state.is_listed() {
            add(&mut self.tally.files, 1);
        }
        if known.state.is_queued() {
            add(&mut self.tally.files_to_hash, 1);
            add(&mut self.tally.bytes_to_hash, known.stamp.size);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATES: [FileState; 7] = [
        FileState::Unsettled,
        FileState::Queued,
        FileState::Young,
        FileState::Proving,
        FileState::Listed,
        FileState::Clash,
        FileState::Unreadable,
    ];

    fn known(size: u64, state: FileState) -> KnownFile {
        let stamp = Stamp {
            dev: 1,
            ino: 1,
            size,
            mtime_ns: 0,
            ctime_ns: 0,
        };
        KnownFile {
            name: SafeName::parse("name").unwrap(),
            stamp,
            state,
            round: 0,
        }
    }

    fn recount(roster: &Roster) -> Tally {
        let count = |is: &dyn Fn(FileState) -> bool| {
            roster.files.values().filter(|k| is(k.state)).count() as u64
        };
        Tally {
            files: count(&FileState::is_listed),
            files_to_hash: count(&FileState::is_queued),
            bytes_to_hash: roster
                .files
                .values()
                .filter(|k| k.state.is_queued())
                .map(|k| k.stamp.size)
                .sum(),
            clashes: count(&|state| state == FileState::Clash),
            unreadable: count(&|state| state == FileState::Unreadable),
        }
    }

    #[test]
    fn batches_are_bounded_and_big_files_are_alone() {
        let mut roster = Roster::default();
        for n in 0..BATCH_FILES + 1 {
            roster.put(format!("{n}").into(), known(1, FileState::Queued));
        }
        roster.put("big".into(), known(BIG_BYTES + 1, FileState::Queued));
        assert_eq!(roster.next_small().len(), BATCH_FILES);
        assert_eq!(roster.next_small().len(), 1);
        assert!(roster.next_small().is_empty());
        assert_eq!(roster.next_big().unwrap().relative, Path::new("big"));
        for n in 0..10 {
            roster.put(format!("{n}").into(), known(BIG_BYTES, FileState::Queued));
        }
        assert_eq!(roster.next_small().len() as u64, BATCH_BYTES / BIG_BYTES);
    }

    proptest! {
        #[test]
        fn counts_and_queues_what_it_holds(
            steps in prop::collection::vec(("[a!]/[ab]{0,1}", 0_u64..2 * BIG_BYTES, 0..STATES.len(), any::<bool>()), 0..60),
        ) {
            let mut roster = Roster::default();
            for (path, size, state, put) in steps {
                if put {
                    roster.put(path.into(), known(size, STATES[state]));
                } else if state == 0 {
                    roster.remove(Path::new(&path));
                } else {
                    roster.set(Path::new(&path), STATES[state]);
                }
                prop_assert_eq!(roster.tally(), recount(&roster));
            }
            let start = Path::new("a");
            let expected: Vec<_> = roster.files.keys().filter(|path| path.starts_with(start)).collect();
            prop_assert_eq!(roster.beneath(start).map(|(path, _)| path).collect::<Vec<_>>(), expected);
            let queued: Vec<_> =
                roster.files.iter().filter(|(_, k)| k.state.is_queued()).map(|(path, _)| path.clone()).collect();
            let mut jobs = vec![];
            loop {
                let batch: Vec<_> = roster.next_small().into_iter().chain(roster.next_big()).collect();
                if batch.is_empty() {
                    break;
                }
                jobs.extend(batch.into_iter().map(|job| job.relative));
            }
            jobs.sort();
            jobs.dedup();
            prop_assert_eq!(jobs, queued);
        }
    }
}
