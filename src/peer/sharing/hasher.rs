//! Turns a file on this disk into a [`Manifest`], and says which version of the file it describes.
//!
//! Invariant: a [`Hashed`] is made only if the file had the same [`Stamp`] before the first and after the last byte was
//! read, and every byte was read exactly once. A file that grows, shrinks or is written meanwhile is refused, never
//! guessed at. Memory is one piece for each core.

use std::{
    fs::{File, Metadata},
    io,
    num::NonZero,
    os::unix::fs::{FileExt, MetadataExt},
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio_util::sync::CancellationToken;

use crate::content::{Layout, Manifest, PieceHash, PieceIndex, assemble, hash_piece};

/// A file with fewer pieces than this is hashed without further threads: starting them would take longer.
const PARALLEL_PIECES: u32 = 8;

/// How close, in nanoseconds, to a file's last change a hash may begin and still be doubted: file systems stamp changes
/// with clocks as coarse as two seconds.
const YOUNG_NS: i128 = 2_000_000_000;

/// What the file system says about one version of a file. Any change of the file's bytes, name or rights gives another
/// one, except a write within the same tick of the file system's clock.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Stamp {
    /// Device.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Last change of the bytes, in nanoseconds since the epoch. Anybody may set it.
    pub mtime_ns: i128,
    /// Last change of the bytes or the inode, in nanoseconds since the epoch. Only the kernel sets it.
    pub ctime_ns: i128,
}

impl Stamp {
    /// The stamp of an open file as it is now.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|metadata| Self::from(&metadata))
    }
}

impl From<&Metadata> for Stamp {
    fn from(metadata: &Metadata) -> Self {
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.size(),
            mtime_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The manifest of one version of a file.
#[derive(Clone, Debug)]
pub struct Hashed {
    /// What was read.
    pub manifest: Manifest,
    /// Which version of the file it was.
    pub stamp: Stamp,
    /// When reading began, in nanoseconds since the epoch.
    pub hashed_at_ns: i128,
}

impl Hashed {
    /// Whether reading began within two seconds of the file's mtime, so that a later write could have gone unseen by the
    /// stamp. To be hashed once more when the file has been quiet for that long.
    pub fn is_young(&self) -> bool {
        (self.hashed_at_ns - self.stamp.mtime_ns).abs() < YOUNG_NS
    }
}

/// Why a file has no manifest.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// It changed while it was read. Try again when it is quiet.
    #[error("the file changed while it was read")]
    Changed,
    /// It could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The caller gave up.
    #[error("hashing was stopped")]
    Cancelled,
    /// It is longer than [`crate::content::MAX_SIZE`].
    #[error("the file is larger than the limit of 1 TiB")]
    TooLarge,
}

/// Hashes an open regular file, a large one on all cores. Blocks; `cancel` is looked at before each piece.
pub fn hash_file(file: &File, cancel: &CancellationToken) -> Result<Hashed, HashError> {
    let stamp = Stamp::of(file)?;
    let hashed_at_ns = now_ns();
    let layout = Layout::new(stamp.size).map_err(|_| HashError::TooLarge)?;
    let pieces = Pieces {
        file,
        layout,
        cancel,
        next: AtomicU32::new(0),
        stop: AtomicBool::new(false),
    };
    let hashes = pieces.hash_all()?;
    // Files of some virtual file systems are longer than they say.
    if file.read_at(&mut [0], stamp.size)? != 0 || Stamp::of(file)? != stamp {
        return Err(HashError::Changed);
    }
    let manifest = assemble(layout, hashes).expect("hash_all returns every piece in order");
    Ok(Hashed {
        manifest,
        stamp,
        hashed_at_ns,
    })
}

/// Nanoseconds since the epoch.
fn now_ns() -> i128 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i128::try_from(since.as_nanos()).unwrap_or(i128::MAX)
}

/// A file's pieces, handed out one by one to the threads that read and hash them.
struct Pieces<'a> {
    file: &'a File,
    layout: Layout,
    cancel: &'a CancellationToken,
    next: AtomicU32,
    /// Set by the first thread that fails, for the others.
    stop: AtomicBool,
}

impl Pieces<'_> {
    /// The hashes of all pieces in order.
    fn hash_all(&self) -> Result<Vec<PieceHash>, HashError> {
        let n_pieces = self.layout.n_pieces();
        if n_pieces < PARALLEL_PIECES {
            return Ok(self.work()?.into_iter().map(|(_, hash)| hash).collect());
        }
        let n_cores = thread::available_parallelism().map_or(1, NonZero::get);
        let n_helpers = n_cores.min(n_pieces as usize) - 1;
        let mut hashes = thread::scope(|scope| {
            // A thread that cannot be started is one fewer: this one does the work as well.
            let helpers: Vec<_> = (0..n_helpers)
                .map_while(|_| {
                    thread::Builder::new()
                        .name("hash".into())
                        .spawn_scoped(scope, || self.work())
                        .ok()
                })
                .collect();
            let mut all = self.work();
            for helper in helpers {
                let part = helper
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                all = match (all, part) {
                    (Ok(mut all), Ok(part)) => {
                        all.extend(part);
                        Ok(all)
                    }
                    (Err(error), _) | (_, Err(error)) => Err(error),
                };
            }
            all
        })?;
        hashes.sort_unstable_by_key(|(piece, _)| *piece);
        Ok(hashes.into_iter().map(|(_, hash)| hash).collect())
    }

    /// Takes pieces until none is left or some thread failed.
    fn work(&self) -> Result<Vec<(PieceIndex, PieceHash)>, HashError> {
        let longest = self.layout.size().min(self.layout.piece_len().into());
        let mut buffer = vec![0; usize::try_from(longest).expect("a piece fits into memory")];
        let mut hashes = vec![];
        while let Some(piece) = self.layout.piece(self.next.fetch_add(1, Relaxed)) {
            if self.stop.load(Relaxed) {
                break;
            }
            let hash = self
                .hash(piece, &mut buffer)
                .inspect_err(|_| self.stop.store(true, Relaxed))?;
            hashes.push((piece, hash));
        }
        Ok(hashes)
    }

    fn hash(&self, piece: PieceIndex, buffer: &mut [u8]) -> Result<PieceHash, HashError> {
        if self.cancel.is_cancelled() {
            return Err(HashError::Cancelled);
        }
        let bytes = &mut buffer[..self.layout.len_of(piece) as usize];
        self.file
            .read_exact_at(bytes, self.layout.offset(piece))
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => HashError::Changed,
                _ => HashError::Io(error),
            })?;
        Ok(hash_piece(self.layout, piece, bytes).expect("the buffer was cut to the piece"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;
    use crate::content::MAX_SIZE;

    /// 0; one byte; BLAKE3 chunk ±1; piece ±1; a few pieces without threads; with threads, exact and off by one.
    const SIZES: [u64; 15] = [
        0, 1, 1023, 1024, 1025, 262_143, 262_144, 262_145, 786_432, 1_835_007, 2_097_151,
        2_097_152, 2_097_153, 5_000_000, 9_437_185,
    ];

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn noise(n: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(n).unwrap()];
        blake3::Hasher::new()
            .update(&n.to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    #[test]
    fn the_id_is_the_blake3_of_the_whole() {
        for size in SIZES {
            let bytes = noise(size);
            let hashed = hash_file(&file_of(&bytes), &CancellationToken::new()).unwrap();
            assert_eq!(
                hashed.manifest.id().as_bytes(),
                blake3::hash(&bytes).as_bytes(),
                "{size}"
            );
            assert_eq!(hashed.manifest.layout().size(), size);
            assert_eq!(hashed.stamp.size, size);
            assert!(hashed.is_young());
            let again = Manifest::from_bytes(&hashed.manifest.to_bytes()).unwrap();
            assert_eq!(again.hashes(), hashed.manifest.hashes());
        }
    }

    #[test]
    fn a_stamp_tells_versions_apart() {
        let mut file = file_of(b"one");
        let stamp = Stamp::of(&file).unwrap();
        assert_eq!(stamp, Stamp::of(&file).unwrap());
        file.rewind().unwrap();
        file.write_all(b"two!").unwrap();
        assert_ne!(stamp, Stamp::of(&file).unwrap());
    }

    #[test]
    fn a_file_that_shrank_is_changed() {
        let file = file_of(&noise(9_000_000));
        let cancel = CancellationToken::new();
        let layout = Layout::new(10_000_000).unwrap();
        let pieces = Pieces {
            file: &file,
            layout,
            cancel: &cancel,
            next: AtomicU32::new(0),
            stop: AtomicBool::new(false),
        };
        assert!(matches!(pieces.hash_all(), Err(HashError::Changed)));
    }

    #[test]
    fn a_file_longer_than_it_says_is_changed() {
        let virtual_file = File::open("/proc/self/status").unwrap();
        assert!(matches!(
            hash_file(&virtual_file, &CancellationToken::new()),
            Err(HashError::Changed)
        ));
    }

    #[test]
    fn cancelled_and_too_large() {
        let cancel = CancellationToken::new();
        cancel.cancel();
        assert!(matches!(
            hash_file(&file_of(&noise(5_000_000)), &cancel),
            Err(HashError::Cancelled)
        ));
        let sparse = tempfile::tempfile().unwrap();
        if sparse.set_len(MAX_SIZE + 1).is_ok() {
            assert!(matches!(
                hash_file(&sparse, &CancellationToken::new()),
                Err(HashError::TooLarge)
            ));
        }
    }

    #[test]
    fn young_is_within_two_seconds_on_either_side() {
        let mut hashed = hash_file(&file_of(b"x"), &CancellationToken::new()).unwrap();
        for (age_ns, young) in [
            (0, true),
            (1_999_999_999, true),
            (2_000_000_000, false),
            (-1_999_999_999, true),
        ] {
            hashed.hashed_at_ns = hashed.stamp.mtime_ns + age_ns;
            assert_eq!(hashed.is_young(), young, "{age_ns}");
        }
        hashed.hashed_at_ns = hashed.stamp.mtime_ns - 86_400_000_000_000;
        assert!(
            !hashed.is_young(),
            "a write now would move an mtime of tomorrow"
        );
    }
}
