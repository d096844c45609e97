//! GetChunks: the ranges of a claim, read ahead and sent in chunks.
//!
//! While one read is on its way to the receiver, the next is under way on the blocking pool. Payloads are not encoded but
//! sent as they were read, behind a short head (`body.rs`, `proto/framing.rs`): a copy
//! fewer, as on the receiver's side.
//!
//! Invariant: what is sent of a content was read from a file that is what was hashed, or is a verified piece; a range
//! that cannot be served is answered, and the next one goes on; a receiver that takes nothing for 30 s is dropped.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::{
    super::limit::Lane, NO_PROGRESS, Served, blocking, body::BodyPart, content_error,
    report::Reports, super_seed::Crowds,
};
use crate::peer::sharing::library::{Have, Library, Reader, ServeError};
use crate::{
    content::{ContentId, Layout},
    identity::PeerId,
    proto::{
        self, GetChunksResponse, MAX_CLAIM, MAX_RANGES, PieceRange, RangeError, Spent, WireError,
        framing, get_chunks_response,
    },
};

/// Bytes read from the disk at a time, unless a chunk is longer.
const READ: u32 = 1 << 20;
/// Bytes of the longest read that is tried without the blocking pool.
const AT_ONCE: u32 = 128 << 10;
/// The longest range that is read together with others, bytes, and how many are.
const SMALL: u64 = 16 << 10;
const GROUP: usize = 64;
/// Chunks ready for the transport; those of one read.
pub(super) const QUEUE: usize = 4;

/// A checked range: bytes `from..to` of a content whose size the caller believes to be `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) id: ContentId,
    size: u64,
    from: u64,
    to: u64,
    piece_len: u32,
}

impl Span {
    /// Is it read together with others?
    const fn is_small(self) -> bool {
        self.to - self.from <= SMALL
    }

    /// The pieces from the one that begins `at` on.
    fn pieces_from(&self, at: u64) -> Range<u32> {
        let piece = |at: u64| u32::try_from(at / u64::from(self.piece_len)).unwrap_or(u32::MAX);
        piece(at)..piece(self.to.saturating_sub(1)) + 1
    }
}

pub(super) fn ranges(ranges: &[PieceRange]) -> Result<Vec<Span>, Status> {
    if ranges.len() > MAX_RANGES {
        return Err(WireError::TooMany(MAX_RANGES, "ranges").into());
    }
    let spans = ranges
        .iter()
        .map(span)
        .collect::<Result<Vec<_>, Status>>()?;
    if spans.len() > 1 && spans.iter().map(|span| span.to - span.from).sum::<u64>() > MAX_CLAIM {
        return Err(Status::invalid_argument("more than 256 MiB in one call"));
    }
    Ok(spans)
}

fn span(range: &PieceRange) -> Result<Span, Status> {
    let id = proto::content_id_bytes(&range.content_id)?;
    let layout = Layout::new(range.size).map_err(|_| WireError::Size(range.size))?;
    let last = range
        .first_piece
        .checked_add(range.piece_count)
        .and_then(|end| end.checked_sub(1));
    let (Some(first), Some(last), true) = (
        layout.piece(range.first_piece),
        last.and_then(|last| layout.piece(last)),
        range.piece_count > 0,
    ) else {
        return Err(Status::out_of_range(
            "a range beyond the end of its content, or empty",
        ));
    };
    let to = layout.offset(last) + u64::from(layout.len_of(last));
    let from = layout.offset(first);
    if to - from > MAX_CLAIM {
        return Err(Status::invalid_argument("more than 256 MiB in one range"));
    }
    Ok(Span {
        id,
        size: range.size,
        from,
        to,
        piece_len: layout.piece_len(),
    })
}

/// One GetChunks stream.
pub(super) struct Sending {
    pub(super) library: Library,
    pub(super) served: Arc<Served>,
    pub(super) crowds: Crowds,
    pub(super) reports: Arc<Reports>,
    /// Who asks, and whether for first copies only.
    pub(super) peer: PeerId,
    pub(super) first_copies: bool,
    pub(super) lane: Lane,
    pub(super) chunk_length: u32,
    pub(super) sender: mpsc::Sender<BodyPart>,
    /// Where the time went so far.
    pub(super) spent: Spent,
}

/// The receiver has gone, or takes nothing.
struct Gone;

/// What was read ahead, or is being read.
enum Reading {
    Here(Reader, Bytes),
    Begun(AbortOnDropHandle<Result<(Reader, Bytes), ServeError>>),
}

impl Reading {
    async fn ended(self) -> Result<(Reader, Bytes), ServeError> {
        match self {
            Self::Here(reader, bytes) => Ok((reader, bytes)),
            Self::Begun(reading) => reading
                .await
                .unwrap_or_else(|e| Err(std::io::Error::other(e).into())),
        }
    }
}

impl Sending {
    pub(super) async fn run(mut self, spans: Vec<Span>) {
        if self.all(&spans).await.is_ok() {
            let _ = self
                .message(get_chunks_response::Part::Spent(self.spent))
                .await;
        }
    }

    async fn all(&mut self, spans: &[Span]) -> Result<(), Gone> {
        let (mut groups, mut range, mut ahead) = (groups(spans).peekable(), 0, None);
        while let Some(group) = groups.next() {
            if group[0].is_small() {
                let reading = ahead
                    .take()
                    .unwrap_or_else(|| read_small(&self.library, group));
                let waiting = Instant::now();
                let read = reading.await.unwrap_or_default();
                self.spent.disk += micros(waiting);
                ahead = groups
                    .peek()
                    .filter(|next| next[0].is_small())
                    .map(|next| read_small(&self.library, next));
                // Nothing is left out: the pool only fails when it shuts down, and we with it.
                for (span, bytes) in group.iter().zip(read) {
                    let ended = match bytes {
                        Ok(_) if self.granted(span.from, *span).is_none() => {
                            Err(ServeError::Promised)
                        }
                        Ok(bytes) => self.chunks(range, span.from, *span, bytes).await.map(Ok)?,
                        Err(error) => Err(error),
                    };
                    self.end(range, ended).await?;
                    range += 1;
                }
            } else {
                let ended = self.range(range, group[0]).await?;
                self.end(range, ended).await?;
                range += 1;
            }
        }
        Ok(())
    }

    /// Says so if a range was not sent, or not all of it.
    async fn end(&mut self, range: u32, ended: Result<(), ServeError>) -> Result<(), Gone> {
        let Err(error) = ended else { return Ok(()) };
        let error = RangeError {
            range,
            error: Some(content_error(&error)),
        };
        self.message(get_chunks_response::Part::Error(error)).await
    }

    async fn range(&mut self, range: u32, span: Span) -> Result<Result<(), ServeError>, Gone> {
        let library = self.library.clone();
        let opened = Instant::now();
        let reader = match library.open_part(&span.id) {
            Some(reader) => Ok(reader),
            None => blocking(move || library.open(&span.id)).await,
        };
        self.spent.disk += micros(opened);
        let reader = match reader {
            Ok(reader) if reader.manifest().layout().size() == span.size => reader,
            Ok(_) => return Ok(Err(ServeError::OutOfRange)),
            Err(error) => return Ok(Err(error)),
        };
        let Some(mut granted) = self.granted(span.from, span) else {
            return Ok(Err(ServeError::Promised));
        };
        let (mut at, mut ahead) = (
            span.from,
            read(reader, span.from, self.read_length(span.from, granted)),
        );
        loop {
            let waiting = Instant::now();
            let done = ahead.ended().await;
            self.spent.disk += micros(waiting);
            let (reader, bytes) = match done {
                Ok(read) => read,
                Err(error) => return Ok(Err(error)),
            };
            let end = at + bytes.len() as u64;
            if end < granted {
                ahead = read(reader, end, self.read_length(end, granted));
                self.chunks(range, at, span, bytes).await?;
            } else {
                self.chunks(range, at, span, bytes).await?;
                if end == span.to {
                    return Ok(Ok(()));
                }
                match self.granted(end, span) {
                    Some(further) => granted = further,
                    None => return Ok(Err(ServeError::Promised)),
                }
                ahead = read(reader, end, self.read_length(end, granted));
            }
            at = end;
        }
    }

    /// How far the receiver may have a range that was sent up to `at`; none if the next piece is another's. In a crowd one
    /// piece at a time, and asked when the one before is on its way: of two who ask at once for the same long range, each
    /// gets half.
    fn granted(&self, at: u64, span: Span) -> Option<u64> {
        if self.library.have(&span.id) != Some(Have::Complete) {
            return Some(span.to);
        }
        let n_sent = span.pieces_from(span.from).len() - span.pieces_from(at).len();
        let n_sent = u32::try_from(n_sent).unwrap_or(u32::MAX);
        match self.crowds.promise(
            span.id,
            span.pieces_from(at),
            self.peer,
            self.first_copies,
            n_sent,
        ) {
            0 => None,
            n => Some(span.to.min(at + u64::from(n) * u64::from(span.piece_len))),
        }
    }

    /// Sends bytes of a content, which begin `at`, in chunks.
    async fn chunks(
        &mut self,
        range: u32,
        mut at: u64,
        span: Span,
        mut bytes: Bytes,
    ) -> Result<(), Gone> {
        self.reports.sent(self.peer, span.id);
        while !bytes.is_empty() {
            let data = bytes.split_to(self.chunk_at(at, span).min(bytes.len()));
            let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
            self.pay(len).await?;
            self.send(BodyPart {
                head: framing::chunk_head(range, at, len),
                data,
            })
            .await?;
            self.served.bytes.fetch_add(len.into(), Ordering::Relaxed);
            at += u64::from(len);
        }
        Ok(())
    }

    /// As much as is worth one read, in whole chunks.
    fn read_length(&self, at: u64, to: u64) -> u32 {
        u32::try_from((to - at).min(READ.max(self.chunk_length).into())).unwrap_or(READ)
    }

    /// The chunk that begins here ends with its piece at the latest.
    fn chunk_at(&self, at: u64, span: Span) -> usize {
        let left = u64::from(span.piece_len) - at % u64::from(span.piece_len);
        usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(self.chunk_length as usize)
    }

    /// Waits until the limit lets so many bytes go.
    async fn pay(&mut self, bytes: u32) -> Result<(), Gone> {
        let held_back = tokio::select! {
            biased;
            held_back = self.lane.take(bytes) => held_back,
            () = self.sender.closed() => return Err(Gone),
        };
        self.spent.limit += u64::try_from(held_back.as_micros()).unwrap_or(u64::MAX);
        Ok(())
    }

    async fn message(&mut self, part: get_chunks_response::Part) -> Result<(), Gone> {
        let head = framing::framed(&GetChunksResponse { part: Some(part) });
        self.send(BodyPart {
            head,
            data: Bytes::new(),
        })
        .await
    }

    async fn send(&mut self, part: BodyPart) -> Result<(), Gone> {
        let waiting = Instant::now();
        let sent = self.sender.send_timeout(part, NO_PROGRESS).await;
        self.spent.network += micros(waiting);
        sent.map_err(|_| Gone)
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Ranges in the groups they are read in: small ones together, each other one alone.
fn groups(spans: &[Span]) -> impl Iterator<Item = &[Span]> {
    let runs = spans.chunk_by(|a, b| a.is_small() && b.is_small());
    runs.flat_map(|run| run.chunks(GROUP))
}

/// Reads small ranges in one go on the blocking pool.
fn read_small(
    library: &Library,
    spans: &[Span],
) -> AbortOnDropHandle<Vec<Result<Bytes, ServeError>>> {
    let (library, spans) = (library.clone(), spans.to_vec());
    let read = move |span: &Span| {
        let mut reader = library.open(&span.id)?;
        let fits = reader.manifest().layout().size() == span.size;
        let len = u32::try_from(span.to - span.from).map_err(|_| ServeError::OutOfRange)?;
        if fits {
            reader.read(span.from, len)
        } else {
            Err(ServeError::OutOfRange)
        }
    };
    AbortOnDropHandle::new(tokio::task::spawn_blocking(move || {
        spans.iter().map(read).collect()
    }))
}

/// A short read of what was written a moment ago is not worth a hop to another thread, which takes five system calls: half
/// of all that 16 peers made who passed pieces of 64 KiB on to one another.
fn read(mut reader: Reader, offset: u64, len: u32) -> Reading {
    if len <= AT_ONCE
        && let Some(bytes) = reader.read_at_once(offset, len)
    {
        return Reading::Here(reader, bytes);
    }
    let read = move || reader.read(offset, len).map(|bytes| (reader, bytes));
    Reading::Begun(AbortOnDropHandle::new(tokio::task::spawn_blocking(read)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(size: u64, first_piece: u32, piece_count: u32) -> PieceRange {
        PieceRange {
            content_id: vec![1; 32].into(),
            size,
            first_piece,
            piece_count,
        }
    }

    #[test]
    fn ranges_are_checked_against_the_claimed_size() {
        let size = 4 * 65_536 + 1;
        let whole = span(&range(size, 0, 5)).unwrap();
        assert_eq!((whole.from, whole.to, whole.piece_len), (0, size, 65_536));
        assert_eq!(span(&range(size, 4, 1)).unwrap().to, size);
        for bad in [
            range(size, 5, 1),
            range(size, 0, 6),
            range(size, 0, 0),
            range(0, 0, 1),
            range(size, u32::MAX, 2),
        ] {
            assert_eq!(
                span(&bad).unwrap_err().code(),
                tonic::Code::OutOfRange,
                "{bad:?}"
            );
        }
        assert!(span(&range(u64::MAX, 0, 1)).is_err());
        assert!(
            span(&PieceRange {
                content_id: vec![1; 31].into(),
                ..range(size, 0, 1)
            })
            .is_err()
        );
        assert!(ranges(&vec![range(size, 0, 4); MAX_RANGES + 1]).is_err());
    }

    proptest! {
        #[test]
        fn any_range_is_inside_its_content_or_refused(size: u64, first: u32, count: u32) {
            if let Ok(span) = span(&range(size, first, count)) {
                prop_assert!(span.from < span.to && span.to <= size && span.to - span.from <= MAX_CLAIM);
            }
        }
    }
}
