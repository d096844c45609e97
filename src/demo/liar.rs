//! A member that answers properly for a while, and then with wrong bytes.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use futures_util::{Stream, stream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, service::Routes};

use crate::{
    content::Manifest,
    net::{self, Front, Listener, ListenerLimits},
    peer::{
        member::{membership::Membership, tracker_client::TrackerClient},
        sharing::hasher::hash_file,
    },
    proto::{
        Chunk, FileEntry, GetChunksRequest, GetChunksResponse, GetManifestRequest,
        GetManifestResponse, HeartbeatRequest, ManifestHeader, RegisterBatch, RegisterHeader,
        RegisterRequest, ReportPieceRequest, ReportPieceResponse, WatchHaveRequest,
        WatchHaveResponse,
        chunk_service_server::{ChunkService, ChunkServiceServer},
        get_chunks_response, get_manifest_response,
        register_request::Part,
    },
    tls,
};

const LIMITS: ListenerLimits = ListenerLimits {
    connections: 64,
    strangers_per_address: 64,
    per_member: 8,
    http2: net::DATA,
};
const HEARTBEAT: Duration = Duration::from_secs(1);
const GENERATION: u64 = 1;

/// A running liar.
pub(super) struct Liar {
    knows: Arc<Knows>,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

struct Knows {
    file: File,
    manifest: Manifest,
    /// Bytes that are served truly.
    honest: u64,
    served: AtomicU64,
    lies: AtomicU64,
}

impl Liar {
    /// Offers `file` under the identity in `state`; the first `honest` bytes it serves are right.
    ///
    /// # Errors
    /// If the file cannot be read, the port not bound, or the tracker not reached.
    pub(super) async fn start(state: &Path, file: &Path, honest: u64) -> Result<Self> {
        let opened = File::open(file)?;
        let manifest = hash_file(&opened, &CancellationToken::new())?.manifest;
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let entry = FileEntry {
            name,
            size: manifest.layout().size(),
            content_id: manifest.id().to_string(),
            partial: false,
        };
        let knows = Knows {
            file: opened,
            manifest,
            honest,
            served: AtomicU64::new(0),
            lies: AtomicU64::new(0),
        };
        let liar = Self {
            knows: Arc::new(knows),
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let membership = Membership::load(state, None)?;
        let listener = net::bind("127.0.0.1:0".parse()?, 0)?;
        let port = listener.local_addr()?.port();
        let certificate = membership.certificate().clone();
        let front = Front {
            tls: tls::member_server(membership.trust(), certificate.clone(), certificate)?,
            routes: Routes::new(ChunkServiceServer::new(Service(liar.knows.clone()))).prepare(),
        };
        let listening = Listener {
            members: front,
            joiners: None,
            limits: LIMITS,
            trust: membership.trust().clone(),
            cancel: liar.cancel.clone(),
            tasks: liar.tasks.clone(),
        };
        liar.tasks.spawn(listening.run(listener));
        let tracker = TrackerClient::new(membership);
        let header = RegisterHeader {
            generation: GENERATION,
            addresses: vec![format!("127.0.0.1:{port}")],
            port: port.into(),
            ..Default::default()
        };
        let parts = [
            Part::Header(header),
            Part::Batch(RegisterBatch {
                added: vec![entry],
                removed: vec![],
            }),
        ];
        tracker
            .register(stream::iter(
                parts.map(|part| RegisterRequest { part: Some(part) }),
            ))
            .await?;
        let cancel = liar.cancel.clone();
        liar.tasks.spawn(async move {
            while cancel
                .run_until_cancelled(tokio::time::sleep(HEARTBEAT))
                .await
                .is_some()
            {
                let request = HeartbeatRequest {
                    generation: GENERATION,
                    ..Default::default()
                };
                let _ = tracker.heartbeat(request).await;
            }
        });
        Ok(liar)
    }

    /// How many wrong pieces were sent.
    pub(super) fn lies(&self) -> u64 {
        self.knows.lies.load(Ordering::Relaxed)
    }

    /// Ends it.
    pub(super) async fn stop(self) {
        self.cancel.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(2), self.tasks.wait()).await;
    }
}

impl Knows {
    /// A whole piece, right or wrong.
    fn piece(&self, index: u32, range: u32) -> Result<GetChunksResponse, Status> {
        let layout = self.manifest.layout();
        let piece = layout
            .piece(index)
            .ok_or_else(|| Status::out_of_range("no such piece"))?;
        let mut data = vec![0; layout.len_of(piece) as usize];
        self.file
            .read_exact_at(&mut data, layout.offset(piece))
            .map_err(|e| Status::internal(e.to_string()))?;
        if self.served.fetch_add(data.len() as u64, Ordering::Relaxed) >= self.honest {
            data[0] ^= 1;
            self.lies.fetch_add(1, Ordering::Relaxed);
        }
        let chunk = Chunk {
            range,
            offset: layout.offset(piece),
            data: data.into(),
        };
        Ok(GetChunksResponse {
            part: Some(get_chunks_response::Part::Chunk(chunk)),
        })
    }
}

struct Service(Arc<Knows>);

type Reply<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl ChunkService for Service {
    type GetManifestStream = Reply<GetManifestResponse>;

    async fn get_manifest(
        &self,
        _: Request<GetManifestRequest>,
    ) -> Result<Response<Self::GetManifestStream>, Status> {
        let header = ManifestHeader {
            size: self.0.manifest.layout().size(),
            last_chunk: Bytes::copy_from_slice(self.0.manifest.last_chunk()),
            right_edge: self.0.manifest.right_edge().concat().into(),
        };
        let hashes = self.0.manifest.hashes().chunks(4096);
        let hashes =
            hashes.map(|run| get_manifest_response::Part::PieceHashes(run.concat().into()));
        let parts: Vec<_> = std::iter::once(get_manifest_response::Part::Header(header))
            .chain(hashes)
            .collect();
        let parts = parts.into_iter().map(|part| {
            Ok(GetManifestResponse {
                index: 0,
                part: Some(part),
            })
        });
        Ok(Response::new(Box::pin(stream::iter(parts))))
    }

    type WatchHaveStream = Reply<WatchHaveResponse>;

    async fn watch_have(
        &self,
        _: Request<WatchHaveRequest>,
    ) -> Result<Response<Self::WatchHaveStream>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn report_piece(
        &self,
        _: Request<ReportPieceRequest>,
    ) -> Result<Response<ReportPieceResponse>, Status> {
        Ok(Response::new(ReportPieceResponse {}))
    }

    type GetChunksStream = Reply<GetChunksResponse>;

    async fn get_chunks(
        &self,
        request: Request<GetChunksRequest>,
    ) -> Result<Response<Self::GetChunksStream>, Status> {
        let ranges = request.into_inner().ranges;
        let pieces = (0..).zip(ranges).flat_map(|(at, range)| {
            (range.first_piece..range.first_piece.saturating_add(range.piece_count))
                .map(move |piece| (at, piece))
        });
        let knows = self.0.clone();
        // Read on the spot: a liar need not be fast, and the demo's file is in memory.
        Ok(Response::new(Box::pin(stream::iter(
            pieces.map(move |(at, piece)| knows.piece(piece, at)),
        ))))
    }
}
