//! Why a download cannot be stored.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::safe_path::{SafeName, escape};

/// Why a download cannot be stored.
#[derive(Debug, Error)]
pub enum StorageError {
    /// The disk takes no more; what is verified stays.
    #[error("{}: not enough space: {short}", escape(&.path.to_string_lossy()))]
    NoSpace {
        /// What of.
        short: Short,
        /// The `.part`.
        path: Box<Path>,
    },
    /// The disk failed to keep what was written: these pieces are missing again, in no particular order. What
    /// `Storage::have` still names is safe.
    #[error("{error}; {} pieces have to be fetched again", pieces.len())]
    Lost {
        /// Positions of the pieces.
        pieces: Vec<u32>,
        /// What the disk said, with the path.
        error: io::Error,
    },
    /// The target's name is taken. `Storage::name` can try another.
    #[error("{} exists already", escape(&.0.to_string_lossy()))]
    Exists(PathBuf),
    /// Another download is writing this target.
    #[error("{} is being downloaded already", escape(.0.as_str()))]
    Busy(SafeName),
    /// Pieces are missing.
    #[error("{n_missing} pieces are missing")]
    Incomplete {
        /// Number of pieces.
        n_missing: u32,
    },
    /// Anything else, with the path.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a disk has too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Short {
    /// Bytes.
    #[error("needs {needed} bytes, {free} free beside the reserve of 1 % (256 MiB at most)")]
    Bytes {
        /// What is still to be written.
        needed: u64,
        /// What may still be written, without the reserve.
        free: u64,
    },
    /// Inodes.
    #[error("the file system can hold no more files (no inodes are left); remove some")]
    Inodes,
    /// What this user may still use.
    #[error("the quota of this user or folder is used up")]
    Quota,
}

impl StorageError {
    /// Whether the same can be tried again when there is room, see `Storage::has_room`.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Lost { error, .. } | Self::Io(error) => is_full(error),
            _ => false,
        }
    }

    /// Whether this process, or this machine, has as many files open as it may.
    pub fn is_no_descriptor(&self) -> bool {
        let Self::Io(error) = self else { return false };
        let errno = rustix::io::Errno::from_io_error(error);
        matches!(
            errno,
            Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)
        )
    }
}

/// Whether the disk says that it has no room.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
