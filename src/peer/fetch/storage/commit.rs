//! When and how what was written becomes durable and is journaled.
//!
//! Invariant: one sync runs at a time, in the thread that found it due. The journal names a piece only after the sync that
//! began after the piece was written; it says "closed" only while nothing was written since.

use std::{io, sync::atomic::Ordering, time::Instant};

use rustix::fs::{Advice, fadvise};

use super::{Journal, Ledger, Storage, StorageError};
use crate::{
    peer::sharing::hasher::Stamp,
    safe_path::{PartFile, with_path},
};

impl Storage {
    /// Makes durable what was written some seconds ago. To be called every second or so while pieces come.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn tick(&self) -> Result<(), StorageError> {
        let now = Instant::now();
        match self.opened() {
            Some(part) if !self.is_single() && self.lock().is_stale(now) => {
                self.sync(&part, |ledger| ledger.is_stale(now))
            }
            _ => Ok(()),
        }
    }

    /// The clean stop: makes everything durable, and the next [`open`](Self::open) believe it without reading. Writing may go
    /// on afterwards; then it has to be closed again. Does nothing to a file that has its name.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn close(&self) -> Result<(), StorageError> {
        let Some(part) = self.opened().filter(|_| !self.is_single()) else {
            return Ok(());
        };
        let ledger = self.wait(self.lock(), Ledger::is_idle);
        if ledger.named.is_some() || ledger.have.is_empty() && !part.existed() {
            return Ok(());
        }
        let is_durable = ledger.is_durable();
        drop(ledger);
        let stamp = || Stamp::of(part.file()).map_err(|e| self.failed(e));
        if is_durable && *self.lock_closed() == Some(stamp()?) {
            return Ok(());
        }
        if !self.begin_sync(|_| true) {
            return Ok(());
        }
        let mut journal = self.data_synced(&part, self.sync_file(&part))?;
        // Nothing is written before the sync is over, if callers keep to what they are told.
        let closed = stamp().and_then(|stamp| {
            journal.closed = Some(stamp);
            self.write_journal(&part, &journal)
        });
        self.end_sync(closed.is_ok());
        closed
    }

    /// Before the first write: a journal that says "closed" shall not outlive it.
    pub(super) fn reopen(&self, part: &PartFile) -> Result<(), StorageError> {
        if !self.is_closed.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut closed = self.lock_closed();
        if closed.is_none() {
            return Ok(());
        }
        let journal = {
            let ledger = self.lock();
            Journal {
                good: ledger.have.clone(),
                doubtful: ledger.doubtful.clone(),
                closed: None,
            }
        };
        self.put_journal(part, &journal, &mut closed)
    }

    pub(super) fn write_journal(
        &self,
        part: &PartFile,
        journal: &Journal,
    ) -> Result<(), StorageError> {
        self.put_journal(part, journal, &mut self.lock_closed())
    }

    fn put_journal(
        &self,
        part: &PartFile,
        journal: &Journal,
        closed: &mut Option<Stamp>,
    ) -> Result<(), StorageError> {
        part.write_journal(&journal.to_bytes(&self.subject(part)))
            .map_err(|e| self.failed(e))?;
        *closed = journal.closed;
        self.is_closed.store(closed.is_some(), Ordering::Release);
        Ok(())
    }

    /// Makes what was written durable and journals it, if it is still `due` when no other sync runs.
    pub(super) fn sync(
        &self,
        part: &PartFile,
        due: impl Fn(&Ledger) -> bool,
    ) -> Result<(), StorageError> {
        if !self.begin_sync(due) {
            return Ok(());
        }
        let journal = self.data_synced(part, self.sync_file_data(part))?;
        let journaled = self.write_journal(part, &journal);
        self.end_sync(journaled.is_ok());
        journaled
    }

    /// Begins a sync when no other runs; false if it is not `due` then.
    pub(super) fn begin_sync(&self, due: impl Fn(&Ledger) -> bool) -> bool {
        let mut ledger = self.wait(self.lock(), |ledger| !ledger.is_syncing);
        let is_due = due(&ledger) && ledger.named.is_none();
        if is_due {
            ledger.begin_sync();
        }
        is_due
    }

    /// Takes the outcome of syncing the data; what is to be journaled. After a failure the sync is over.
    pub(super) fn data_synced(
        &self,
        part: &PartFile,
        outcome: io::Result<()>,
    ) -> Result<Journal, StorageError> {
        let mut ledger = self.lock();
        let Err(error) = outcome else {
            return Ok(ledger.data_synced());
        };
        let pieces = ledger.sync_failed();
        self.tell(ledger);
        // So that reading asks the disk, not the kernel's memory of what it failed to write.
        let _ = fadvise(part.file(), 0, None, Advice::DontNeed);
        Err(StorageError::Lost {
            pieces,
            error: with_path(&part.path(), error),
        })
    }

    pub(super) fn end_sync(&self, is_journaled: bool) {
        let mut ledger = self.lock();
        ledger.end_sync(is_journaled);
        self.tell(ledger);
    }

    fn sync_file_data(&self, part: &PartFile) -> io::Result<()> {
        self.may_sync()?;
        part.file().sync_data()
    }

    /// With its length and times.
    pub(super) fn sync_file(&self, part: &PartFile) -> io::Result<()> {
        self.may_sync()?;
        part.file().sync_all()
    }

    pub(super) fn may_sync(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.fails_to_sync.load(Ordering::Relaxed) {
            return Err(rustix::io::Errno::IO.into());
        }
        Ok(())
    }
}
