//! ChunkService: manifests and bytes for members.
//!
//! Invariants: a request names contents, never paths; what is not held, or not verified, is not served; memory is
//! bounded by streams × (two reads + the transport's send buffer); a receiver that takes nothing for 30 s is dropped.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::library::{Library, Reader, ServeError};
use crate::{
    content::{ContentId, Layout, prove_single},
    identity::Role,
    net::Caller,
    proto::{
        self, CHUNK_LENGTHS, Chunk, ContentError, GetChunksRequest, GetChunksResponse, GetManifestRequest,
        GetManifestResponse, HASHES_PER_MESSAGE, MAX_CLAIM, MAX_CONTENTS, MAX_RANGES, ManifestHeader, PieceRange,
        RangeError, WatchHaveRequest, WatchHaveResponse, WireError, content_error, get_chunks_response,
        get_manifest_response,
    },
};

/// Streams served at once, over all connections.
const STREAMS: usize = 128;
/// Messages ready for a receiver that is busy.
const QUEUE: usize = 4;
/// Bytes read from the disk at a time, unless a chunk is longer.
const READ: u32 = 1 << 20;
const NO_PROGRESS: Duration = Duration::from_secs(30);

/// What was served since the start.
#[derive(Debug, Default)]
pub struct Served {
    /// Bytes handed to the transport.
    pub bytes: AtomicU64,
    /// Streams under way.
    pub streams: AtomicU32,
}

/// A peer's answers.
pub struct ChunkServer {
    library: Library,
    served: Arc<Served>,
    streams: Arc<Semaphore>,
}

impl ChunkServer {
    /// Serves from `library` and counts in `served`.
    #[must_use]
    pub fn new(library: Library, served: Arc<Served>) -> Self {
        Self { library, served, streams: Arc::new(Semaphore::new(STREAMS)) }
    }

    fn admit(&self) -> Result<OwnedSemaphorePermit, Status> {
        let busy = |_| Status::resource_exhausted("too many streams here now: come back later");
        self.streams.clone().try_acquire_owned().map_err(busy)
    }
}

type Reply<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn member<T>(request: &Request<T>) -> Result<(), Status> {
    match request.extensions().get::<Caller>().and_then(|caller| caller.subject) {
        Some(subject) if matches!(subject.role, Role::Peer | Role::Operator) => Ok(()),
        _ => Err(Status::unauthenticated("a client certificate of this network is required")),
    }
}

fn contents(ids: &[Bytes]) -> Result<Vec<ContentId>, WireError> {
    if ids.len() > MAX_CONTENTS {
        return Err(WireError::TooMany(MAX_CONTENTS, "contents"));
    }
    ids.iter().map(|id| proto::content_id_bytes(id)).collect()
}

fn content_error(error: &ServeError) -> ContentError {
    let code = match error {
        ServeError::NotFound => content_error::Code::NotFound,
        ServeError::Changed => content_error::Code::Changed,
        ServeError::OutOfRange => content_error::Code::OutOfRange,
        ServeError::Io(error) => {
            tracing::warn!("reading a shared file: {error}");
            content_error::Code::Io
        }
    };
    // What exactly failed on this disk is this peer's own business.
    let message = if matches!(error, ServeError::Io(_)) { "the disk failed".into() } else { error.to_string() };
    ContentError { code: code.into(), message }
}

#[tonic::async_trait]
impl proto::chunk_service_server::ChunkService for ChunkServer {
    type GetManifestStream = Reply<GetManifestResponse>;

    async fn get_manifest(
        &self,
        request: Request<GetManifestRequest>,
    ) -> Result<Response<Self::GetManifestStream>, Status> {
        member(&request)?;
        let ids = contents(&request.get_ref().content_ids)?;
        let (permit, library) = (self.admit()?, self.library.clone());
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let _permit = permit;
            for (index, id) in (0..).zip(ids) {
                let asked = library.clone();
                let parts = blocking(move || manifest_parts(&asked, &id)).await;
                for part in
                    parts.unwrap_or_else(|error| vec![get_manifest_response::Part::Error(content_error(&error))])
                {
                    let message = GetManifestResponse { index, part: Some(part) };
                    if sender.send_timeout(Ok(message), NO_PROGRESS).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type WatchHaveStream = Reply<WatchHaveResponse>;

    async fn watch_have(&self, request: Request<WatchHaveRequest>) -> Result<Response<Self::WatchHaveStream>, Status> {
        member(&request)?;
        Err(Status::unimplemented("this version offers complete files only"))
    }

    type GetChunksStream = Reply<GetChunksResponse>;

    async fn get_chunks(&self, request: Request<GetChunksRequest>) -> Result<Response<Self::GetChunksStream>, Status> {
        member(&request)?;
        let request = request.into_inner();
        let ranges = ranges(&request.ranges)?;
        let chunk_length = request.chunk_length.clamp(*CHUNK_LENGTHS.start(), *CHUNK_LENGTHS.end());
        let permit = self.admit()?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let sending = Sending { library: self.library.clone(), served: self.served.clone(), chunk_length, sender };
        tokio::spawn(async move {
            let _permit = permit;
            sending.served.streams.fetch_add(1, Ordering::Relaxed);
            sending.run(ranges).await;
            sending.served.streams.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

fn manifest_parts(library: &Library, id: &ContentId) -> Result<Vec<get_manifest_response::Part>, ServeError> {
    let manifest = library.manifest(id).ok_or(ServeError::NotFound)?;
    let size = manifest.layout().size();
    let (last_chunk, right_edge) = if manifest.layout().n_pieces() == 1 {
        // Kept proofs would take more memory than the names of small files; made anew they cost one short read.
        let len = u32::try_from(size).map_err(|_| ServeError::OutOfRange)?;
        let bytes = library.open(id)?.read(0, len)?;
        let (last_chunk, right_edge) = prove_single(&bytes).ok_or(ServeError::Changed)?;
        (Bytes::copy_from_slice(last_chunk), right_edge)
    } else {
        (Bytes::copy_from_slice(manifest.last_chunk()), manifest.right_edge().to_vec())
    };
    let header = ManifestHeader { size, last_chunk, right_edge: right_edge.concat().into() };
    let hashes = manifest.hashes().chunks(HASHES_PER_MESSAGE);
    let hashes = hashes.map(|run| get_manifest_response::Part::PieceHashes(run.concat().into()));
    Ok(std::iter::once(get_manifest_response::Part::Header(header)).chain(hashes).collect())
}

/// A checked range: bytes `from..to` of a content whose size the caller believes to be `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    id: ContentId,
    size: u64,
    from: u64,
    to: u64,
    piece_len: u32,
}

fn ranges(ranges: &[PieceRange]) -> Result<Vec<Span>, Status> {
    if ranges.len() > MAX_RANGES {
        return Err(WireError::TooMany(MAX_RANGES, "ranges").into());
    }
    let spans = ranges.iter().map(span).collect::<Result<Vec<_>, Status>>()?;
    if spans.len() > 1 && spans.iter().map(|span| span.to - span.from).sum::<u64>() > MAX_CLAIM {
        return Err(Status::invalid_argument("more than 256 MiB in one call"));
    }
    Ok(spans)
}

fn span(range: &PieceRange) -> Result<Span, Status> {
    let id = proto::content_id_bytes(&range.content_id)?;
    let layout = Layout::new(range.size).map_err(|_| WireError::Size(range.size))?;
    let last = range.first_piece.checked_add(range.piece_count).and_then(|end| end.checked_sub(1));
    let (Some(first), Some(last), true) =
        (layout.piece(range.first_piece), last.and_then(|last| layout.piece(last)), range.piece_count > 0)
    else {
        return Err(Status::out_of_range("a range beyond the end of its content, or empty"));
    };
    let to = layout.offset(last) + u64::from(layout.len_of(last));
    let from = layout.offset(first);
    if to - from > MAX_CLAIM {
        return Err(Status::invalid_argument("more than 256 MiB in one range"));
    }
    Ok(Span { id, size: range.size, from, to, piece_len: layout.piece_len() })
}

/// One GetChunks stream.
struct Sending {
    library: Library,
    served: Arc<Served>,
    chunk_length: u32,
    sender: mpsc::Sender<Result<GetChunksResponse, Status>>,
}

/// The receiver has gone, or takes nothing.
struct Gone;

impl Sending {
    async fn run(&self, spans: Vec<Span>) {
        for (range, span) in (0..).zip(spans) {
            match self.range(range, span).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let error = RangeError { range, error: Some(content_error(&error)) };
                    if self.send(get_chunks_response::Part::Error(error)).await.is_err() {
                        return;
                    }
                }
                Err(Gone) => return,
            }
        }
    }

    async fn range(&self, range: u32, span: Span) -> Result<Result<(), ServeError>, Gone> {
        let library = self.library.clone();
        let mut reader = match blocking(move || library.open(&span.id)).await {
            Ok(reader) if reader.manifest().layout().size() == span.size => reader,
            Ok(_) => return Ok(Err(ServeError::OutOfRange)),
            Err(error) => return Ok(Err(error)),
        };
        let mut at = span.from;
        while at < span.to {
            let bytes = match read(reader, at, self.read_length(at, span)).await {
                Ok((used, bytes)) => {
                    reader = used;
                    bytes
                }
                Err(error) => return Ok(Err(error)),
            };
            let end = at + bytes.len() as u64;
            let mut rest = bytes;
            while !rest.is_empty() {
                let data = rest.split_to(self.chunk_at(at, span).min(rest.len()));
                let len = data.len() as u64;
                self.send(get_chunks_response::Part::Chunk(Chunk { range, offset: at, data })).await?;
                self.served.bytes.fetch_add(len, Ordering::Relaxed);
                at += len;
            }
            debug_assert_eq!(at, end);
        }
        Ok(Ok(()))
    }

    /// As much as is worth one read, in whole chunks.
    fn read_length(&self, at: u64, span: Span) -> u32 {
        u32::try_from((span.to - at).min(READ.max(self.chunk_length).into())).unwrap_or(READ)
    }

    /// The chunk that begins here ends with its piece at the latest.
    fn chunk_at(&self, at: u64, span: Span) -> usize {
        let left = u64::from(span.piece_len) - at % u64::from(span.piece_len);
        usize::try_from(left).unwrap_or(usize::MAX).min(self.chunk_length as usize)
    }

    async fn send(&self, part: get_chunks_response::Part) -> Result<(), Gone> {
        let message = GetChunksResponse { part: Some(part) };
        self.sender.send_timeout(Ok(message), NO_PROGRESS).await.map_err(|_| Gone)
    }
}

async fn read(mut reader: Reader, offset: u64, len: u32) -> Result<(Reader, Bytes), ServeError> {
    blocking(move || reader.read(offset, len).map(|bytes| (reader, bytes))).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ServeError> + Send + 'static,
) -> Result<T, ServeError> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|error| Err(ServeError::Io(std::io::Error::other(error))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(size: u64, first_piece: u32, piece_count: u32) -> PieceRange {
        PieceRange { content_id: vec![1; 32].into(), size, first_piece, piece_count }
    }

    #[test]
    fn ranges_are_checked_against_the_claimed_size() {
        let size = 3 * 262_144 + 1;
        let whole = span(&range(size, 0, 4)).unwrap();
        assert_eq!((whole.from, whole.to, whole.piece_len), (0, size, 262_144));
        assert_eq!(span(&range(size, 3, 1)).unwrap().to, size);
        for bad in [range(size, 4, 1), range(size, 0, 5), range(size, 0, 0), range(0, 0, 1), range(size, u32::MAX, 2)] {
            assert_eq!(span(&bad).unwrap_err().code(), tonic::Code::OutOfRange, "{bad:?}");
        }
        assert!(span(&range(u64::MAX, 0, 1)).is_err());
        assert!(span(&PieceRange { content_id: vec![1; 31].into(), ..range(size, 0, 1) }).is_err());
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
