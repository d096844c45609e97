//! What one share has listed.
//!
//! Invariant: a file that this share listed is in the Library exactly while its [`FileState::is_listed`], with the stamp
//! the roster has.
//!
//! Names: of two files with one name in two shares, that of the share added first is listed, of two in one share (names
//! are compared in NFC) the one that was there first. The other waits as [`FileState::Clash`] and is tried again at
//! every rescan.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::peer::sharing::file_table::{FileState, KnownFile, Roster};
use crate::peer::sharing::hasher::{Hashed, Stamp};
use crate::peer::sharing::index::Index;
use crate::peer::sharing::library::{Library, Location, Published};
use crate::peer::sharing::scan::Walk;

/// How long after its mtime a young file is hashed once more; see [`Hashed::is_young`].
pub(super) const PROOF_AGE: Duration = Duration::from_secs(2);

/// Absolute paths to look at again after some time.
pub(super) type Again = Vec<(PathBuf, Duration)>;

/// The files of one share, and which of them are in the Library.
pub(super) struct Offers {
    path: Arc<Path>,
    /// The shares before this one: their files come first.
    pub(super) earlier: Vec<Walk>,
    pub(super) index: Arc<Index>,
    pub(super) library: Library,
    pub(super) roster: Roster,
    /// Rises with every look.
    pub(super) round: u64,
}

impl Offers {
    /// Nothing yet, of the share at `path`.
    pub(super) fn new(
        path: Arc<Path>,
        earlier: Vec<Walk>,
        index: Arc<Index>,
        library: Library,
    ) -> Self {
        Self {
            path,
            earlier,
            index,
            library,
            roster: Roster::default(),
            round: 0,
        }
    }

    /// Lists a file if its manifest is in the index.
    pub(super) fn offer(&mut self, relative: PathBuf, again: &mut Again) -> bool {
        let Some(stamp) = self.roster.get(&relative).map(|known| known.stamp) else {
            return false;
        };
        let Some(hashed) = self.index.lookup(&self.path.join(&relative), &stamp) else {
            return false;
        };
        self.list(&relative, hashed, again);
        true
    }

    /// Lists a file with its manifest, unless another file has its name.
    pub(super) fn list(&mut self, relative: &Path, hashed: Hashed, again: &mut Again) {
        let Some(known) = self.roster.get(relative) else {
            return;
        };
        let (stamp, is_young) = (hashed.stamp, hashed.is_young());
        let (root, name) = (self.path.clone(), known.name.clone());
        let state = if self.earlier.iter().any(|walk| walk.has(&name)) {
            FileState::Clash
        } else {
            let location = Location {
                root,
                relative: relative.to_path_buf(),
                stamp,
                name,
            };
            match self.library.publish(location, hashed.manifest) {
                Published::Clash(_) => FileState::Clash,
                Published::New | Published::Same if is_young => FileState::Young,
                Published::New | Published::Same => FileState::Listed,
            }
        };
        if state == FileState::Young {
            again.push((self.path.join(relative), until_proof(&stamp)));
        }
        self.set(relative, state);
    }

    /// Replaces what was known of a file: it is listed if its manifest is in the index, else taken off. Returns whether it is
    /// listed, and what was known before.
    pub(super) fn replace(
        &mut self,
        relative: PathBuf,
        known: KnownFile,
        again: &mut Again,
    ) -> (bool, Option<KnownFile>) {
        let before = self.roster.put(relative.clone(), known);
        if self.offer(relative, again) {
            return (true, before);
        }
        if let Some(known) = before.as_ref().filter(|known| known.state.is_listed()) {
            self.library.withdraw_name(&known.name);
        }
        (false, before)
    }

    /// Gives a file another state, and takes it off the Library if that is what it means.
    pub(super) fn set(&mut self, relative: &Path, state: FileState) {
        if let Some(before) = self.roster.set(relative, state)
            && before.state.is_listed()
            && !state.is_listed()
        {
            self.library.withdraw_name(&before.name);
        }
    }

    /// Withdraws one file.
    pub(super) fn withdraw(&mut self, relative: &Path) {
        if let Some(known) = self
            .roster
            .remove(relative)
            .filter(|known| known.state.is_listed())
        {
            self.library.withdraw_name(&known.name);
        }
    }

    /// Withdraws what lies at and beneath a path, but was not seen by the present round.
    pub(super) fn withdraw_unseen(&mut self, start: &Path) {
        let unseen = self
            .roster
            .beneath(start)
            .filter(|(_, known)| known.round != self.round);
        for relative in unseen
            .map(|(relative, _)| relative.clone())
            .collect::<Vec<_>>()
        {
            self.withdraw(&relative);
        }
    }

    /// Withdraws what lies at and beneath a path.
    pub(super) fn withdraw_beneath(&mut self, start: &Path) {
        self.round += 1;
        self.withdraw_unseen(start);
    }

    /// Withdraws everything.
    pub(super) fn withdraw_all(&mut self) {
        if !self.roster.is_empty() {
            self.withdraw_beneath(Path::new(""));
        }
    }
}

/// How long ago a time stamp is; zero if it lies ahead.
pub(super) fn age(time_ns: i128) -> Duration {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let then = u64::try_from(time_ns.max(0)).map_or(Duration::MAX, Duration::from_nanos);
    now.saturating_sub(then)
}

/// How long until a young file can be proved, and a moment for clocks that disagree.
pub(super) fn until_proof(stamp: &Stamp) -> Duration {
    PROOF_AGE.saturating_sub(age(stamp.mtime_ns)) + Duration::from_millis(50)
}
