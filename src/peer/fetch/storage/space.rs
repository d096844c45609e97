//! Room on the disk: what is free beside the reserve, the reservation of a file's space, holes for zeros, and what of a file
//! was written.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
};

use rustix::{
    fs::{FallocateFlags, FsWord, SeekFrom, StatVfs, fallocate, fstatfs, seek},
    io::{Errno, retry_on_intr},
};

use super::error::Short;
use crate::{
    content::{Layout, Manifest, PieceIndex},
    have::HaveMap,
};

/// Space left free on a disk: 1 % of it, but no more than this many bytes.
pub(super) const MAX_RESERVE: u64 = 256 << 20;

/// Pieces that are tried before all of them are, to find zeros.
const SAMPLES: usize = 64;

/// The type of a file system in memory (statfs(2)).
const TMPFS: FsWord = 0x0102_1994;

/// What of `free` bytes may be used on a disk of `total` bytes.
pub(super) fn usable(free: u64, total: u64) -> u64 {
    free.saturating_sub((total / 100).min(MAX_RESERVE))
}

/// Bytes that may still be written to a disk; `None` if the file system does not know.
pub(super) fn free(disk: &rustix::io::Result<StatVfs>) -> Option<u64> {
    let disk = disk.as_ref().ok().filter(|disk| disk.f_blocks > 0)?;
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

/// Whether a disk can hold one more file, as far as it knows.
pub(super) fn has_inodes(disk: &rustix::io::Result<StatVfs>) -> bool {
    disk.as_ref()
        .map_or(true, |disk| disk.f_files == 0 || disk.f_favail > 0)
}

/// What a disk has too little of that failed like this.
pub(super) fn short(error: &io::Error, disk: &rustix::io::Result<StatVfs>, needed: u64) -> Short {
    if error.kind() == io::ErrorKind::QuotaExceeded {
        Short::Quota
    } else if has_inodes(disk) {
        let free = free(disk).unwrap_or(0);
        Short::Bytes { needed, free }
    } else {
        Short::Inodes
    }
}

/// The pieces that are all zeros. Their hashes tell, at the cost of hashing as many zeros, some seconds for each GiB; so none
/// are found in a content that has none here and there.
pub(super) fn zero_pieces(manifest: &Manifest) -> HaveMap {
    let layout = manifest.layout();
    let zeros = vec![0; layout.piece_len() as usize];
    let is_zero =
        |piece: &PieceIndex| manifest.check(*piece, &zeros[..layout.len_of(*piece) as usize]);
    let mut found = HaveMap::empty(layout.n_pieces());
    let step = layout.pieces().len().div_ceil(SAMPLES).max(1);
    if layout.pieces().step_by(step).any(|piece| is_zero(&piece)) {
        let zero = layout.pieces().filter(is_zero);
        zero.for_each(|piece| _ = found.insert(piece.get()));
    }
    found
}

/// Makes a file as long as its content, with its blocks allocated where the file system can do that cheaply, but for the
/// pieces that are `left_out`. Leaves a file that has all its blocks already as it is.
pub(super) fn reserve(file: &File, layout: Layout, left_out: &HaveMap) -> io::Result<()> {
    let (size, len) = (layout.size(), file.metadata()?.len());
    if len == size && needed(file, size) == 0 {
        return Ok(());
    }
    if len != size {
        file.set_len(size)?;
    }
    // In memory it would take every page at once, an eighth of what the whole download takes, and nothing be in order.
    let is_cheap = fstatfs(file).is_ok_and(|system| system.f_type != TMPFS);
    let mut pieces = layout.pieces().filter(|_| is_cheap).peekable();
    while let Some(first) = pieces.next() {
        if left_out.contains(first.get()) {
            continue;
        }
        let begin = layout.offset(first);
        let mut end = begin + u64::from(layout.len_of(first));
        while let Some(next) = pieces.next_if(|piece| !left_out.contains(piece.get())) {
            end += u64::from(layout.len_of(next));
        }
        match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), begin, end - begin)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
            done => done?,
        }
    }
    Ok(())
}

/// Writes bytes within a file; zeros as a hole, if the file system can have holes.
pub(super) fn put(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let len = bytes.len() as u64;
    if bytes.iter().all(|byte| *byte == 0)
        && file.metadata()?.len() >= offset + len
        && retry_on_intr(|| fallocate(file, hole, offset, len)).is_ok()
    {
        return Ok(());
    }
    file.write_all_at(bytes, offset)
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
        assert!(free(&rustix::fs::fstatvfs(&file)).is_some_and(|free| free > 0));
    }

    #[test]
    fn a_file_that_has_its_space_is_left_as_it_is() {
        let file = tempfile::tempfile().unwrap();
        let layout = Layout::new(300_000).unwrap();
        let none = HaveMap::empty(layout.n_pieces());
        reserve(&file, layout, &none).unwrap();
        let first = file.metadata().unwrap();
        reserve(&file, layout, &none).unwrap();
        let second = file.metadata().unwrap();
        assert_eq!(
            (first.len(), first.ctime_nsec()),
            (300_000, second.ctime_nsec())
        );
        reserve(&file, Layout::new(100_000).unwrap(), &none).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 100_000);
    }
}
