//! Room on the disk: what is free beside the reserve, the reservation of a file's space, and what of it was written.

use std::{fs::File, io, os::unix::fs::MetadataExt};

use rustix::{
    fs::{FallocateFlags, FsWord, SeekFrom, StatVfs, fallocate, fstatfs, seek},
    io::{Errno, retry_on_intr},
};

use crate::{content::Layout, have::HaveMap};

/// Space left free on a disk: 1 % of it, but no more than this many bytes.
pub(super) const MAX_RESERVE: u64 = 256 << 20;

/// The type of a file system in memory (statfs(2)).
const TMPFS: FsWord = 0x0102_1994;

/// What of `free` bytes may be used on a disk of `total` bytes.
pub(super) fn usable(free: u64, total: u64) -> u64 {
    free.saturating_sub((total / 100).min(MAX_RESERVE))
}

/// Bytes that may still be written to a disk; `None` if the file system does not know.
pub(super) fn free(disk: rustix::io::Result<StatVfs>) -> Option<u64> {
    let disk = disk.ok().filter(|disk| disk.f_blocks > 0)?;
    Some(usable(
        disk.f_bavail.saturating_mul(disk.f_frsize),
        disk.f_blocks.saturating_mul(disk.f_frsize),
    ))
}

/// Bytes for which a file that will have `size` has no blocks yet.
pub(super) fn needed(file: &File, size: u64) -> u64 {
    size.saturating_sub(
        file.metadata()
            .map_or(0, |m| m.blocks().saturating_mul(512)),
    )
}

/// Makes a file `size` bytes long, with its blocks allocated where the file system can do that cheaply. Leaves a file that
/// is so already as it is.
pub(super) fn reserve(file: &File, size: u64) -> io::Result<()> {
    let len = file.metadata()?.len();
    if len > size {
        file.set_len(size)?;
    }
    if len == size && needed(file, size) == 0 {
        return Ok(());
    }
    // In memory it would take every page at once, an eighth of what the whole download takes, and nothing be in order.
    let is_cheap = fstatfs(file).is_ok_and(|system| system.f_type != TMPFS);
    if is_cheap {
        match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, size)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            other => return Ok(other?),
        }
    }
    if len < size {
        file.set_len(size)
    } else {
        Ok(())
    }
}

/// The pieces of which something may have been written.
pub(super) fn pieces_with_data(file: &File, layout: Layout) -> HaveMap {
    let mut found = HaveMap::empty(layout.n_pieces());
    let mut next_data = 0;
    for piece in layout.pieces() {
        let begin = layout.offset(piece);
        if next_data <= begin {
            next_data = data_from(file, begin);
        }
        if next_data < begin + u64::from(layout.len_of(piece)) {
            found.insert(piece.get());
        }
    }
    found
}

/// Where the first written byte at or after `offset` may be.
fn data_from(file: &File, offset: u64) -> u64 {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data,
        Err(Errno::NXIO) => u64::MAX,
        Err(_) => offset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn j08_a_reserve_is_left_free() {
        assert_eq!(usable(500, 10_000), 400);
        assert_eq!(usable(1 << 40, 1 << 42), (1 << 40) - MAX_RESERVE);
        assert_eq!(usable(50, 10_000), 0);
        let file = tempfile::tempfile().unwrap();
        assert!(free(rustix::fs::fstatvfs(&file)).is_some_and(|free| free > 0));
    }

    #[test]
    fn a_file_that_has_its_space_is_left_as_it_is() {
        let file = tempfile::tempfile().unwrap();
        reserve(&file, 300_000).unwrap();
        let first = file.metadata().unwrap();
        reserve(&file, 300_000).unwrap();
        let second = file.metadata().unwrap();
        assert_eq!(
            (first.len(), first.ctime_nsec()),
            (300_000, second.ctime_nsec())
        );
        reserve(&file, 100_000).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 100_000);
    }
}
