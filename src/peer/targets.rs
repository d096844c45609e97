//! Where a download's files go on this disk: what is there already, what may not be touched, and the `.part` of each.
//!
//! Invariant: nothing that exists is ever replaced. A target that exists is looked at before the first byte is fetched,
//! and once more by the kernel when the finished file gets its name.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Result;
use tokio_util::sync::CancellationToken;

use super::{
    hasher::{HashError, Hashed, Stamp, hash_file},
    index::Index,
    library::{Library, Location},
    shares::Shares,
    storage::{Storage, StorageError},
};
use crate::{
    content::{ContentId, Manifest},
    exit::{Exit, Failed},
    safe_path::{Root, SafeName, escape},
};

/// What to do with a target that exists and differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Fail before anything is fetched.
    Refuse,
    /// Take a free name: "film (2).mkv".
    Rename,
    /// Leave it and go on.
    Skip,
}

/// A file to get.
#[derive(Clone, Debug)]
pub struct Want {
    /// What it is called in the network.
    pub name: SafeName,
    /// What it is to be called under the root.
    pub target: SafeName,
    /// Bytes, as the listing says; only a manifest proves it.
    pub size: u64,
    /// What it is.
    pub id: ContentId,
}

/// What stands at a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing: to be fetched under this name.
    Free(SafeName),
    /// This very content.
    Identical(PathBuf),
    /// Something else, which is to be left alone.
    Skipped(PathBuf),
}

/// This peer's disk, as downloads use it.
#[derive(Clone)]
pub struct Disk {
    /// Under which everything lands.
    pub root: Root,
    /// What was hashed before.
    pub index: Arc<Index>,
    /// What is here already, and what is offered when it is finished.
    pub library: Library,
    /// Which names files have that lie in a share.
    pub shares: Arc<Shares>,
    /// Ends hashing.
    pub cancel: CancellationToken,
}

/// The most "(n)" that are tried.
const MAX_NUMBER: u32 = 999;

impl Disk {
    /// Looks at the target of `want`. Blocks: a file of the right size is hashed, unless its hash is known.
    ///
    /// # Errors
    /// [`Exit::Exists`] under [`Existing::Refuse`], or as the disk answers.
    pub fn look(&self, want: &Want, existing: Existing) -> Result<Target> {
        let root = self.root.path();
        let shown = |name: &SafeName| escape(&root.join(name.as_path()).display().to_string());
        if !self.root.exists(&want.target).map_err(unwritable)? {
            return Ok(Target::Free(want.target.clone()));
        }
        if self.is_identical(want)? {
            return Ok(Target::Identical(root.join(want.target.as_path())));
        }
        match existing {
            Existing::Skip => Ok(Target::Skipped(root.join(want.target.as_path()))),
            Existing::Refuse => {
                let text = format!(
                    "{} exists and differs; it was left alone (use --rename or --skip, or another -o)",
                    shown(&want.target)
                );
                Err(Failed::new(Exit::Exists, text).into())
            }
            Existing::Rename => {
                for n in 2..=MAX_NUMBER {
                    let name = want.target.numbered(n)?;
                    if !self.root.exists(&name).map_err(unwritable)? {
                        return Ok(Target::Free(name));
                    }
                }
                Err(Failed::new(Exit::Exists, format!("{} and all its numbered names exist", shown(&want.target)))
                    .into())
            }
        }
    }

    fn is_identical(&self, want: &Want) -> Result<bool> {
        // A folder, a link, a device: whatever it is, it is not this content.
        let Ok(file) = self.root.open_file(want.target.as_path()) else { return Ok(false) };
        let stamp = Stamp::of(&file)?;
        if stamp.size != want.size {
            return Ok(false);
        }
        let path = self.root.path().join(want.target.as_path());
        if let Some(known) = self.index.lookup(&path, &stamp) {
            return Ok(known.manifest.id() == want.id);
        }
        match hash_file(&file, &self.cancel) {
            Ok(hashed) => {
                let identical = hashed.manifest.id() == want.id;
                if identical {
                    self.offer(&path, &want.target, &want.name, hashed)?;
                }
                Ok(identical)
            }
            Err(HashError::Changed | HashError::TooLarge) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the `.part`, keeps what an earlier run left in it, and copies what this peer holds elsewhere. Blocks.
    ///
    /// # Errors
    /// [`Exit::NoSpace`] and the like, see [`explain`].
    pub fn open(&self, name: &SafeName, manifest: &Manifest) -> Result<Storage> {
        let storage = Storage::open(&self.root, name, manifest.clone()).map_err(explain)?;
        storage.recover().map_err(explain)?;
        if let Ok(mut copy) = self.library.open(&manifest.id()) {
            let have = storage.have();
            for i in have.missing() {
                let layout = manifest.layout();
                let Some(piece) = layout.piece(i) else { break };
                let Ok(bytes) = copy.read(layout.offset(piece), layout.len_of(piece)) else { continue };
                if let Ok(good) = manifest.verify(piece, bytes) {
                    storage.write(&good).map_err(explain)?;
                }
            }
        }
        Ok(storage)
    }

    /// Gives a complete file its name and offers it to others under `shared_as`. Blocks (fsync).
    ///
    /// # Errors
    /// As [`explain`].
    pub fn finish(&self, storage: &Storage, want: &Want, target: &SafeName, existing: Existing) -> Result<PathBuf> {
        let mut name = target.clone();
        let mut n = 1;
        let path = loop {
            let finished = if n == 1 { storage.finish() } else { storage.finish_as(&name) };
            match finished {
                Err(StorageError::Exists(_)) if existing == Existing::Rename && n < MAX_NUMBER => {
                    n += 1;
                    name = target.numbered(n)?;
                }
                finished => break finished.map_err(explain)?,
            }
        };
        let file = self.root.open_file(name.as_path())?;
        let hashed_at_ns = i128::MAX;
        let hashed = Hashed { manifest: storage.manifest().clone(), stamp: Stamp::of(&file)?, hashed_at_ns };
        self.offer(&path, &name, &want.name, hashed)?;
        Ok(path)
    }

    fn offer(&self, path: &Path, relative: &SafeName, shared_as: &SafeName, hashed: Hashed) -> Result<()> {
        let location = Location {
            root: self.root.clone(),
            relative: relative.as_path().to_owned(),
            stamp: hashed.stamp,
            name: self.shares.name_of(path).unwrap_or_else(|| shared_as.clone()),
        };
        let manifest = hashed.manifest.clone();
        if let Err(error) = self.index.insert_batch(&[(path.to_owned(), hashed)]) {
            tracing::warn!("remembering {}: {error}", escape(&path.display().to_string()));
        }
        self.library.publish(location, manifest);
        Ok(())
    }
}

fn unwritable(error: io::Error) -> anyhow::Error {
    Failed::new(Exit::NoSpace, error.to_string()).into()
}

/// A storage error with its exit code and the next step.
#[must_use]
pub fn explain(error: StorageError) -> anyhow::Error {
    let exit = match &error {
        StorageError::NoSpace { .. } => Exit::NoSpace,
        StorageError::Exists(_) => Exit::Exists,
        StorageError::Io(_) => Exit::NoSpace,
        _ => Exit::Failure,
    };
    Failed::new(exit, escape(&error.to_string())).into()
}
