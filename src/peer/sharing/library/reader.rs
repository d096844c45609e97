//! Reading a content, and the check that keeps a changed file from being served.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    sync::Arc,
};

use bytes::Bytes;
use rustix::{
    buffer::spare_capacity,
    io::{Errno, ReadWriteFlags},
};

use super::{Library, Location, MAX_TRIES, ServeError};
use crate::{content::Manifest, peer::sharing::hasher::Stamp};

/// An open content. Where its bytes come from may change between reads; what they are does not.
pub struct Reader {
    pub(super) library: Library,
    pub(super) manifest: Manifest,
    pub(super) source: ReadFrom,
}

pub(super) enum ReadFrom {
    File { file: File, location: Arc<Location> },
    Part { file: Arc<File>, token: u64 },
}

impl Reader {
    /// The description of the content.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Reads `len` bytes at `offset`. If the file changed, another copy is read instead, and [`ServeError::Changed`] is
    /// the answer only when there is none. Blocks.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Bytes, ServeError> {
        if !self.has(offset, len) {
            return Err(ServeError::OutOfRange);
        }
        for _ in 0..MAX_TRIES {
            match self.try_read(offset, len) {
                Err(ServeError::Changed) => {}
                done => return done,
            }
            *self = match self.library.open(&self.manifest.id()) {
                Err(ServeError::NotFound) => return Err(ServeError::Changed),
                other => other?,
            };
        }
        Err(ServeError::Changed)
    }

    /// The same of a download in progress, if the kernel has the bytes in memory; else, and if anything is wrong, none. Does
    /// not block.
    pub fn read_at_once(&self, offset: u64, len: u32) -> Option<Bytes> {
        let ReadFrom::Part { file, token } = &self.source else {
            return None;
        };
        if !self.has(offset, len) || self.holds(*token, offset, len).is_err() {
            return None;
        }
        read_cached(file, offset, len as usize).ok()
    }

    fn has(&self, offset: u64, len: u32) -> bool {
        offset
            .checked_add(len.into())
            .is_some_and(|end| end <= self.manifest.layout().size())
    }

    /// Reads from the present source; [`ServeError::Changed`] means that it is of no use any more.
    fn try_read(&self, offset: u64, len: u32) -> Result<Bytes, ServeError> {
        match &self.source {
            ReadFrom::File { file, location } => {
                let bytes = read_exact(file, offset, len as usize);
                if Stamp::of(file)? == location.stamp {
                    return Ok(bytes?);
                }
                self.library.suspect(location);
                Err(ServeError::Changed)
            }
            ReadFrom::Part { file, token } => {
                self.holds(*token, offset, len)?;
                Ok(read_exact(file, offset, len as usize)?)
            }
        }
    }

    /// Whether the download in progress has all pieces of a range.
    fn holds(&self, token: u64, offset: u64, len: u32) -> Result<(), ServeError> {
        let piece_len = u64::from(self.manifest.layout().piece_len());
        let mut pieces = offset / piece_len..(offset + u64::from(len)).div_ceil(piece_len);
        let mut state = self.library.lock();
        let part = state
            .part(&self.manifest.id(), token)
            .ok_or(ServeError::Changed)?;
        let held =
            pieces.all(|piece| u32::try_from(piece).is_ok_and(|piece| part.have.contains(piece)));
        if held {
            Ok(())
        } else {
            Err(ServeError::NotFound)
        }
    }
}

/// Reads exactly `len` bytes, unless not all of them are in the page cache or the file system cannot tell.
fn read_cached(file: &File, offset: u64, len: usize) -> io::Result<Bytes> {
    let mut bytes = vec![0; len];
    let n = rustix::io::preadv2(
        file,
        &mut [IoSliceMut::new(&mut bytes)],
        offset,
        ReadWriteFlags::NOWAIT,
    )?;
    if n == len {
        Ok(bytes.into())
    } else {
        Err(Errno::AGAIN.into())
    }
}

/// Reads exactly `len` bytes, without clearing the memory first.
fn read_exact(file: &File, offset: u64, len: usize) -> io::Result<Bytes> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = offset + bytes.len() as u64;
        match rustix::io::pread(file, spare_capacity(&mut bytes), at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bytes.truncate(len);
    Ok(bytes.into())
}
