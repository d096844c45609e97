//! ChunkService: manifests and bytes for members.
//!
//! Invariants: a request names contents, never paths; what is not held, or not verified, is not served; memory is
//! bounded by streams × (two reads, the chunks that wait, and the transport's send buffer), some 4 MiB each; a receiver
//! that takes nothing for 30 s is dropped.

use std::{
    num::NonZeroU32,
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
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

mod body;
mod chunks;
mod have;
mod report;
mod super_seed;

pub use self::body::Uncopied;
use self::{
    body::BodyParts,
    chunks::{Sending, ranges},
    have::Watching,
    report::Reports,
    super_seed::Crowds,
};
use super::limit::Limit;
use crate::peer::sharing::{
    index::Index,
    library::{Library, ServeError},
};
use crate::{
    content::{ContentId, prove_single},
    identity::{PeerId, Role},
    metrics,
    net::Caller,
    proto::{
        self, CHUNK_LENGTHS, ContentError, GetChunksRequest, GetChunksResponse, GetManifestRequest,
        GetManifestResponse, HASHES_PER_MESSAGE, MAX_CONTENTS, ManifestHeader, ReportPieceRequest,
        ReportPieceResponse, Spent, WatchHaveRequest, WatchHaveResponse, WireError, content_error,
        get_manifest_response,
    },
    request::carried,
};

/// GetChunks streams served at once over all connections, and as many of GetManifest.
pub(super) const STREAMS: usize = 128;
/// WatchHave streams at once, over all connections.
const WATCHES: usize = 1024;
/// Messages ready for a receiver that is busy.
const QUEUE: usize = 4;
/// Addresses that a watcher may name.
const MAX_WATCHER_ADDRESSES: usize = 32;
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
    upload: Limit,
    streams: Arc<Semaphore>,
    manifests: Arc<Semaphore>,
    watches: Arc<Semaphore>,
    crowds: Crowds,
    reports: Arc<Reports>,
    tasks: TaskTracker,
}

impl ChunkServer {
    /// Serves from `library`, as fast as `upload` allows, and counts in `served`; streams run in `tasks`. What turns out to be
    /// wrong is forgotten in `index`, too.
    #[must_use]
    pub fn new(
        library: Library,
        index: Arc<Index>,
        served: Arc<Served>,
        upload: Limit,
        tasks: TaskTracker,
    ) -> Self {
        let [streams, manifests, watches] =
            [STREAMS, STREAMS, WATCHES].map(|n| Arc::new(Semaphore::new(n)));
        Self {
            reports: Arc::new(Reports::new(library.clone(), index)),
            library,
            served,
            upload,
            streams,
            manifests,
            watches,
            crowds: Crowds::default(),
            tasks,
        }
    }

    fn admit(permits: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Status> {
        let busy = |_| Status::resource_exhausted("too many streams here now: come back later");
        permits.clone().try_acquire_owned().map_err(busy)
    }
}

type Reply<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn member<T>(request: &Request<T>) -> Result<(PeerId, &Caller), Status> {
    let caller = request.extensions().get::<Caller>();
    match caller.and_then(|caller| Some((caller.subject?, caller))) {
        Some((subject, caller)) if matches!(subject.role, Role::Peer | Role::Operator) => {
            Ok((subject.id, caller))
        }
        _ => Err(Status::unauthenticated(
            "a client certificate of this network is required",
        )),
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
        ServeError::Promised => content_error::Code::Promised,
        ServeError::Io(error) => {
            metrics::DISK_READ_ERRORS.one();
            tracing::warn!("reading a shared file: {error}");
            content_error::Code::Io
        }
    };
    // What exactly failed on this disk is this peer's own business.
    let message = if matches!(error, ServeError::Io(_)) {
        "the disk failed".into()
    } else {
        error.to_string()
    };
    ContentError {
        code: code.into(),
        message,
    }
}

#[tonic::async_trait]
impl proto::chunk_service_server::ChunkService for ChunkServer {
    type GetManifestStream = Reply<GetManifestResponse>;

    async fn get_manifest(
        &self,
        request: Request<GetManifestRequest>,
    ) -> Result<Response<Self::GetManifestStream>, Status> {
        let (peer, _) = member(&request)?;
        let ids = contents(&request.get_ref().content_ids)?;
        let (permit, library) = (Self::admit(&self.manifests)?, self.library.clone());
        let reports = self.reports.clone();
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.tasks.spawn(carried(async move {
            let _permit = permit;
            for (index, id) in (0..).zip(ids) {
                let asked = library.clone();
                // Its proof is made of its bytes.
                if library
                    .manifest(&id)
                    .is_some_and(|manifest| manifest.layout().is_single())
                {
                    reports.sent(peer, id);
                }
                let parts = blocking(move || manifest_parts(&asked, &id)).await;
                for part in parts.unwrap_or_else(|error| {
                    vec![get_manifest_response::Part::Error(content_error(&error))]
                }) {
                    let message = GetManifestResponse {
                        index,
                        part: Some(part),
                    };
                    if sender.send_timeout(Ok(message), NO_PROGRESS).await.is_err() {
                        return;
                    }
                }
            }
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type WatchHaveStream = Reply<WatchHaveResponse>;

    async fn watch_have(
        &self,
        request: Request<WatchHaveRequest>,
    ) -> Result<Response<Self::WatchHaveStream>, Status> {
        let (peer, caller) = member(&request)?;
        let WatchHaveRequest {
            content_ids,
            addresses,
            port,
        } = request.get_ref();
        let contents = contents(content_ids)?;
        if addresses.len() > MAX_WATCHER_ADDRESSES {
            return Err(WireError::TooMany(MAX_WATCHER_ADDRESSES, "addresses").into());
        }
        let port =
            u16::try_from(*port).map_err(|_| Status::invalid_argument("port is above 65,535"))?;
        let announcement = proto::announcement(peer, addresses, port, caller);
        let permit = Self::admit(&self.watches)?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let watch = self.crowds.join(contents.clone(), announcement);
        let watching = Watching {
            library: self.library.clone(),
            crowds: self.crowds.clone(),
            watch,
            sender,
        };
        self.tasks.spawn(carried(async move {
            let _permit = permit;
            watching.run(contents).await;
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type GetChunksStream = Reply<GetChunksResponse>;

    async fn get_chunks(
        &self,
        request: Request<GetChunksRequest>,
    ) -> Result<Response<Self::GetChunksStream>, Status> {
        let (peer, caller) = member(&request)?;
        let ranges = ranges(&request.get_ref().ranges)?;
        if let Some(round_trip) = NonZeroU32::new(request.get_ref().round_trip_us) {
            match self
                .crowds
                .has_others(ranges.iter().map(|span| span.id), peer)
            {
                // What it measured is mostly the wait behind the others; and of two kinds one takes from the other.
                true => caller.line.shared(),
                false => caller
                    .line
                    .measured(Duration::from_micros(round_trip.get().into())),
            }
        }
        let lane = self.upload.lane(peer);
        let request = request.into_inner();
        let chunk_length = request
            .chunk_length
            .clamp(*CHUNK_LENGTHS.start(), *CHUNK_LENGTHS.end());
        let permit = Self::admit(&self.streams)?;
        metrics::CHUNKS_SENT.observe(chunk_length.into());
        let (sender, receiver) = mpsc::channel(chunks::QUEUE);
        let sending = Sending {
            library: self.library.clone(),
            served: self.served.clone(),
            crowds: self.crowds.clone(),
            reports: self.reports.clone(),
            peer,
            first_copies: request.first_copies,
            lane,
            chunk_length,
            sender,
            spent: Spent::default(),
        };
        self.tasks.spawn(carried(async move {
            let _permit = permit;
            let served = sending.served.clone();
            served.streams.fetch_add(1, Ordering::Relaxed);
            sending.run(ranges).await;
            served.streams.fetch_sub(1, Ordering::Relaxed);
        }));
        let mut answer =
            Response::new(Box::pin(futures_util::stream::empty()) as Self::GetChunksStream);
        answer.extensions_mut().insert(BodyParts::new(receiver));
        Ok(answer)
    }

    async fn report_piece(
        &self,
        request: Request<ReportPieceRequest>,
    ) -> Result<Response<ReportPieceResponse>, Status> {
        let (peer, _) = member(&request)?;
        let ReportPieceRequest { content_id, piece } = request.into_inner();
        let id = proto::content_id_bytes(&content_id)?;
        let reports = self.reports.clone();
        // Goes on when the caller does not wait for it.
        let looking = tokio::spawn(carried(async move { reports.hear(peer, id, piece).await }));
        let _ = looking.await;
        Ok(Response::new(ReportPieceResponse {}))
    }
}

fn manifest_parts(
    library: &Library,
    id: &ContentId,
) -> Result<Vec<get_manifest_response::Part>, ServeError> {
    let manifest = library.manifest(id).ok_or(ServeError::NotFound)?;
    let size = manifest.layout().size();
    let (last_chunk, right_edge) = if manifest.layout().n_pieces() == 1 {
        // Kept proofs would take more memory than the names of small files; made anew they cost one short read.
        let len = u32::try_from(size).map_err(|_| ServeError::OutOfRange)?;
        let bytes = library.open(id)?.read(0, len)?;
        let (last_chunk, right_edge) = prove_single(&bytes).ok_or(ServeError::Changed)?;
        (Bytes::copy_from_slice(last_chunk), right_edge)
    } else {
        (
            Bytes::copy_from_slice(manifest.last_chunk()),
            manifest.right_edge().to_vec(),
        )
    };
    let header = ManifestHeader {
        size,
        last_chunk,
        right_edge: right_edge.concat().into(),
    };
    let hashes = manifest.hashes().chunks(HASHES_PER_MESSAGE);
    let hashes = hashes.map(|run| get_manifest_response::Part::PieceHashes(run.concat().into()));
    Ok(std::iter::once(get_manifest_response::Part::Header(header))
        .chain(hashes)
        .collect())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ServeError> + Send + 'static,
) -> Result<T, ServeError> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|error| Err(ServeError::Io(std::io::Error::other(error))))
}
