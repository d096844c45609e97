//! Group commit: the data of many files made durable together, and the folders that hold their names.
//!
//! Invariant: the order of each file stays: its data is durable before it gets its name, its folder after that. A failure is
//! that of every file it may concern.

use std::{collections::HashMap, io, os::unix::fs::FileExt, path::PathBuf, sync::Arc};

use super::{Ledger, Storage, StorageError};
use crate::{
    peer::sharing::hasher::Stamp,
    safe_path::{Folder, PartFile, PublishError, Root, SafeName, with_path},
};

/// From so many files on one file system on, the whole file system is synced at once instead of one file after the other.
const MIN_GROUP: usize = 8;

/// Makes the data of complete contents durable, so that they may get their names. The outcomes are in the same order. Waits
/// for writes under way.
pub fn sync_data(storages: &[&Storage]) -> Vec<Result<(), StorageError>> {
    let parts: Vec<_> = storages.iter().map(|storage| storage.settle()).collect();
    let mut devices: HashMap<u64, Vec<&PartFile>> = HashMap::new();
    for part in parts.iter().flatten() {
        devices
            .entry(part.folder().device())
            .or_default()
            .push(part);
    }
    devices.retain(|_, parts| parts.len() >= MIN_GROUP);
    let outcomes = devices
        .into_iter()
        .filter_map(|(device, parts)| Some((device, parts[0].sync_file_system()?)));
    let outcomes: HashMap<u64, io::Result<()>> = outcomes.collect();
    let end = |(storage, part): (&&Storage, Result<Arc<PartFile>, StorageError>)| {
        let part = part?;
        let outcome = match outcomes.get(&part.folder().device()) {
            Some(outcome) => again(outcome).and_then(|()| storage.may_sync()),
            None => storage.sync_file(&part),
        };
        storage.data_synced(&part, outcome)?;
        storage.end_sync(true);
        Ok(())
    };
    storages.iter().zip(parts).map(end).collect()
}

/// Makes the names durable that these storages were given, each folder once. The outcomes are in the same order.
pub fn sync_folders(storages: &[&Storage]) -> Vec<Result<(), StorageError>> {
    let mut synced: HashMap<*const Folder, (Arc<Folder>, io::Result<()>)> = HashMap::new();
    let sync = |storage: &&Storage| {
        let part = storage.part()?;
        let folder = part.folder();
        let (_, outcome) = synced
            .entry(Arc::as_ptr(folder))
            .or_insert_with(|| (folder.clone(), folder.sync()));
        again(outcome).map_err(StorageError::Io)
    };
    storages.iter().map(sync).collect()
}

/// One outcome for many.
fn again(outcome: &io::Result<()>) -> io::Result<()> {
    match outcome {
        Ok(()) => Ok(()),
        Err(e) => Err(io::Error::new(e.kind(), e.to_string())),
    }
}

/// Gives a file its name. The stamp is that of the version that was complete before: the name changes the inode's own time
/// and nothing else, so whatever else changed meanwhile makes it the stamp of no version that is there.
fn publish(
    part: &PartFile,
    name: &SafeName,
    replace: bool,
) -> Result<(PathBuf, Stamp), PublishError> {
    let before = Stamp::of(part.file())?;
    let path = if replace {
        part.rename_over(name)
    } else {
        part.rename_to(name)
    }?;
    let ctime_ns = Stamp::of(part.file()).map_or(before.ctime_ns, |after| after.ctime_ns);
    Ok((path, Stamp { ctime_ns, ..before }))
}

impl Storage {
    /// Gives the complete file, whose data [`sync_data`] made durable, its name, which has to be free, or, to `replace`, that of a
    /// regular file in the same folder. Returns the absolute path. Durable after [`sync_folders`].
    pub fn name(&self, name: &SafeName, replace: bool) -> Result<PathBuf, StorageError> {
        let part = self.part()?;
        if part.is_unnamed() {
            self.remove_left_over(&part)?;
        }
        let named = match publish(&part, name, replace) {
            Err(PublishError::Io(error)) if part.is_unnamed() => {
                tracing::debug!("a file without a name is written anew: {error}");
                publish(&*self.write_anew(&part)?, name, replace)
            }
            named => named,
        };
        let (path, stamp) = named.map_err(|e| match e {
            PublishError::Exists(path) => StorageError::Exists(path),
            PublishError::Io(e) => StorageError::Io(e),
        })?;
        self.lock().named = Some(stamp);
        Ok(path)
    }

    /// Ends what [`name`](Self::name) and [`sync_folders`] began: the journal goes. The stamp of the version that got the name:
    /// if somebody has changed the file since, it has another one now.
    pub fn end(&self) -> Result<Stamp, StorageError> {
        let part = self.part()?;
        let named = self.lock().named;
        // Another get of the same content was first: nobody asks for the stamp of this file.
        let stamp = named.map_or_else(|| Stamp::of(part.file()), Ok);
        let stamp = stamp.map_err(|e| self.failed(e))?;
        if self.is_single() {
            // Thousands of these may be kept; their descriptors are not.
            self.lock_part().take();
        } else if let Err(error) = part.remove_journal() {
            tracing::warn!("removing a journal: {error}");
        }
        Ok(stamp)
    }

    /// What an earlier, larger version of the file left half-done goes. One that is still being written keeps the name.
    fn remove_left_over(&self, part: &PartFile) -> Result<(), StorageError> {
        if !part.folder().has_journal(self.name.file_name())? {
            return Ok(());
        }
        match self.root.create_part(&self.name) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(StorageError::Busy(self.name.clone()));
            }
            left_over => {
                if let Err(error) =
                    left_over.and_then(|old| old.discard().and_then(|()| old.remove_journal()))
                {
                    tracing::warn!("removing what an earlier download left: {error}");
                }
            }
        }
        Ok(())
    }

    /// A `.part`, which can get its name, for a file that could not: where a sandbox forbids it, or the folder was removed
    /// meanwhile.
    fn write_anew(&self, unnamed: &PartFile) -> Result<Arc<PartFile>, StorageError> {
        let mut bytes = vec![0; usize::try_from(self.manifest.layout().size()).unwrap_or(0)];
        unnamed.file().read_exact_at(&mut bytes, 0)?;
        let part = self.create(Root::create_part)?;
        part.file()
            .write_all_at(&bytes, 0)
            .map_err(|e| self.failed(e))?;
        part.sync()?;
        *self.lock_part() = Some(part.clone());
        Ok(part)
    }

    /// The `.part` of a complete content, with its sync begun.
    fn settle(&self) -> Result<Arc<PartFile>, StorageError> {
        let part = self.part()?;
        drop(self.wait(self.lock(), Ledger::is_idle));
        if self.begin_sync(|ledger| ledger.have.is_complete()) {
            return Ok(part);
        }
        match self.manifest.layout().n_pieces() - self.lock().have.count() {
            0 => Err(with_path(&part.path(), io::Error::other("has its name already")).into()),
            n_missing => Err(StorageError::Incomplete { n_missing }),
        }
    }
}
