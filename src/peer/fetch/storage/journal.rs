//! What is written down about a `.part`: which of its pieces are durable, and whether it was left in good order.
//!
//! Invariant: a journal is read back only if it is whole, of this version, and about this content in this very file;
//! anything else is as good as none. `good` pieces were durable before the journal was written. They are to be believed only
//! if the journal is closed and the file has still the stamp it was closed with; else they are hints.
//!
//! Layout, numbers little-endian: magic with the version (8 bytes), content id (32), its size, device, inode (8 each),
//! closed (1: 0 or 1), then of the stamp mtime and ctime (16 each), the two maps, and the SHA-256 of all before it.

use ring::digest::{SHA256, digest};

use crate::{
    content::{ContentId, Layout},
    have::HaveMap,
    peer::sharing::hasher::Stamp,
};

const MAGIC: &[u8; 8] = b"spratj\x00\x01";
const HEADER_LEN: usize = 8 + 32 + 3 * 8 + 1 + 2 * 16;
const CHECKSUM_LEN: usize = 32;

/// The state of a `.part`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Journal {
    /// Pieces that were verified and are durable.
    pub(super) good: HaveMap,
    /// Pieces that may be there, and were not looked at yet.
    pub(super) doubtful: HaveMap,
    /// The file's stamp after the last write; `None` while it is being written.
    pub(super) closed: Option<Stamp>,
}

/// What a journal is about: the content, and the device and inode of the `.part`. The `.part` is as long as the content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject {
    pub(super) id: ContentId,
    pub(super) layout: Layout,
    pub(super) part: (u64, u64),
}

impl Subject {
    /// Length of a journal in bytes.
    pub(super) fn journal_len(&self) -> usize {
        HEADER_LEN + 2 * self.map_len() + CHECKSUM_LEN
    }

    fn map_len(&self) -> usize {
        self.layout.n_pieces().div_ceil(8) as usize
    }
}

impl Journal {
    pub(super) fn to_bytes(&self, subject: &Subject) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(subject.journal_len());
        bytes.extend(MAGIC);
        bytes.extend(subject.id.as_bytes());
        [subject.layout.size(), subject.part.0, subject.part.1]
            .iter()
            .for_each(|n| bytes.extend(n.to_le_bytes()));
        bytes.push(self.closed.is_some().into());
        let times = self
            .closed
            .map_or([0, 0], |stamp| [stamp.mtime_ns, stamp.ctime_ns]);
        times
            .iter()
            .for_each(|time| bytes.extend(time.to_le_bytes()));
        bytes.extend(self.good.to_bytes());
        bytes.extend(self.doubtful.to_bytes());
        let checksum = digest(&SHA256, &bytes);
        bytes.extend(checksum.as_ref());
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) made for the same subject; `None` for anything else.
    pub(super) fn from_bytes(bytes: &[u8], subject: &Subject) -> Option<Self> {
        let (body, checksum) = bytes.split_last_chunk::<CHECKSUM_LEN>()?;
        let (header, maps) = body.split_first_chunk::<HEADER_LEN>()?;
        if bytes.len() != subject.journal_len() || digest(&SHA256, body).as_ref() != checksum {
            return None;
        }
        let (good, doubtful) = maps.split_at_checked(subject.map_len())?;
        let n_pieces = subject.layout.n_pieces();
        let good = HaveMap::from_bytes(n_pieces, good).ok()?;
        let doubtful = HaveMap::from_bytes(n_pieces, doubtful).ok()?;
        let time = |at: usize| i128::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let ((dev, ino), size) = (subject.part, subject.layout.size());
        let stamp = Stamp {
            dev,
            ino,
            size,
            mtime_ns: time(HEADER_LEN - 32),
            ctime_ns: time(HEADER_LEN - 16),
        };
        let closed = (header[HEADER_LEN - 33] == 1).then_some(stamp);
        let journal = Self {
            good,
            doubtful,
            closed,
        };
        // The header is right exactly if it is what we would have written.
        (journal.to_bytes(subject) == bytes).then_some(journal)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::content::MIN_PIECE_LEN;

    fn subject(n_pieces: u32) -> Subject {
        let layout = Layout::new(u64::from(n_pieces) * u64::from(MIN_PIECE_LEN)).unwrap();
        Subject {
            id: ContentId::from_bytes([7; 32]),
            layout,
            part: (3, 4),
        }
    }

    fn map(n_pieces: u32, seed: u64) -> HaveMap {
        let mut map = HaveMap::empty(n_pieces);
        (0..n_pieces)
            .filter(|i| seed >> (i % 64) & 1 == 1)
            .for_each(|i| _ = map.insert(i));
        map
    }

    fn journal() -> impl Strategy<Value = (Subject, Journal)> {
        let times = prop::option::of((any::<i64>(), any::<i64>()));
        (5_u32..200, any::<u64>(), any::<u64>(), times).prop_map(|(n, good, doubtful, times)| {
            let subject = subject(n);
            let closed = times.map(|(mtime, ctime)| Stamp {
                dev: 3,
                ino: 4,
                size: subject.layout.size(),
                mtime_ns: mtime.into(),
                ctime_ns: ctime.into(),
            });
            (
                subject,
                Journal {
                    good: map(n, good),
                    doubtful: map(n, doubtful),
                    closed,
                },
            )
        })
    }

    proptest! {
        #[test]
        fn it_comes_back_for_its_own_subject_only((subject, journal) in journal()) {
            let bytes = journal.to_bytes(&subject);
            prop_assert_eq!(bytes.len(), subject.journal_len());
            prop_assert_eq!(Journal::from_bytes(&bytes, &subject), Some(journal));
            let other_size = Layout::new(subject.layout.size() - 1).unwrap();
            for other in [
                Subject { id: ContentId::from_bytes([8; 32]), ..subject },
                Subject { layout: other_size, ..subject },
                Subject { part: (3, 5), ..subject },
                Subject { part: (4, 4), ..subject },
            ] {
                prop_assert_eq!(Journal::from_bytes(&bytes, &other), None);
            }
        }

        #[test]
        fn a_damaged_one_is_none((subject, journal) in journal(), at in any::<prop::sample::Index>(), flip in 1_u8..) {
            let mut bytes = journal.to_bytes(&subject);
            let at = at.index(bytes.len());
            prop_assert_eq!(Journal::from_bytes(&bytes[..at], &subject), None);
            bytes[at] ^= flip;
            prop_assert_eq!(Journal::from_bytes(&bytes, &subject), None);
        }

        #[test]
        fn arbitrary_bytes_are_none(n in 5_u32..200, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(Journal::from_bytes(&bytes, &subject(n)), None);
        }
    }

    #[test]
    fn one_of_another_version_is_none_though_whole() {
        let subject = subject(9);
        let mut bytes = Journal {
            good: map(9, 5),
            doubtful: map(9, 0),
            closed: None,
        }
        .to_bytes(&subject);
        bytes[7] += 1;
        let body = bytes.len() - CHECKSUM_LEN;
        let checksum = digest(&SHA256, &bytes[..body]);
        bytes[body..].copy_from_slice(checksum.as_ref());
        assert_eq!(Journal::from_bytes(&bytes, &subject), None);
    }
}
