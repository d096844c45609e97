//! A member that lies: it joined like any other, says that it holds a whole file, and gives wrong bytes, or a wrong
//! manifest. The product has no switch for that, so it is played here, with the product's own library.

use std::{
    fs,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures_util::{Stream, stream};
use sprat::{
    content::{Hash32, Layout, Manifest, assemble, hash_piece},
    identity::{Identity, PEER_FILES},
    net::{self, Front, Limits, Listener},
    proto::{
        self, Chunk, GetChunksRequest, GetChunksResponse, GetManifestRequest, GetManifestResponse, ManifestHeader,
        RegisterBatch, RegisterHeader, RegisterRequest, WatchHaveRequest, WatchHaveResponse,
        chunk_service_server::{ChunkService, ChunkServiceServer},
        get_chunks_response, get_manifest_response, register_request,
    },
    tls::{self, Expect, LiveCertificate},
    trust::Trust,
};
use tokio::runtime::Runtime;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, service::Routes};

use crate::swarm::Swarm;

/// What it is that a liar does not tell truly.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// The bytes of every piece.
    Bytes,
    /// The hash of one piece.
    Hash,
    /// The size, so that hashes of half as many pieces, which fold to the same content id, would do.
    Size,
}

/// A running liar; it ends when dropped.
pub struct Liar {
    /// Who it is.
    pub peer_id: String,
    asked: Arc<AtomicUsize>,
    _runtime: Runtime,
}

impl Liar {
    /// Joins, listens, and registers the file of the swarm at `path` under `name`.
    pub fn start(swarm: &Swarm, path: &str, name: &str, lie: Lie) -> Self {
        let folder = format!("liar-{}", lie as u8);
        swarm.run("", ["join", &swarm.link(1), "--identity-only", &folder]).ok();
        let identity = Identity::load(&swarm.path(&folder), PEER_FILES).unwrap().unwrap();
        let manifest = manifest(&fs::read(swarm.path(path)).unwrap());
        let asked = Arc::default();
        let runtime = Runtime::new().unwrap();
        let peer_id = identity.key.peer_id().to_string();
        runtime.block_on(begin(identity, swarm.address(), name, Lies { lie, manifest, asked: Arc::clone(&asked) }));
        Self { peer_id, asked, _runtime: runtime }
    }

    /// How often it was believed enough to be asked for bytes.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

async fn begin(identity: Identity, tracker: &str, name: &str, lies: Lies) {
    let trust = Trust::new(identity.authority.clone()).unwrap();
    let chain = vec![identity.certificate.clone(), identity.authority.clone()];
    let certificate = LiveCertificate::new(chain, identity.key.to_der()).unwrap();
    let socket = net::bind("127.0.0.1:0".parse().unwrap(), 0).unwrap();
    let address = socket.local_addr().unwrap();
    let register = register(address, name, &lies.manifest);
    let service = ChunkServiceServer::new(lies).max_encoding_message_size(proto::MAX_CHUNK_MESSAGE);
    let listener = Listener {
        members: Front {
            tls: tls::member_server(&trust, certificate.clone(), certificate.clone()).unwrap(),
            routes: Routes::new(service),
        },
        joiners: None,
        limits: Limits { connections: 64, strangers_per_address: 64, per_member: 8, http2: net::DATA },
        trust: trust.clone(),
        cancel: CancellationToken::new(),
        tasks: TaskTracker::new(),
    };
    tokio::spawn(listener.run(socket));
    let config = tls::member_client(&trust, &certificate, Expect::Tracker).unwrap();
    let connection = net::dial(&[tracker.to_owned()], config, "tracker.sprat.internal", net::CONTROL).await.unwrap();
    let origin = connection.origin();
    let mut client = proto::tracker_service_client::TrackerServiceClient::with_origin(connection, origin);
    client.register(stream::iter(register)).await.unwrap();
}

fn register(address: SocketAddr, name: &str, manifest: &Manifest) -> Vec<RegisterRequest> {
    let header = RegisterHeader {
        generation: 1,
        addresses: vec![address.to_string()],
        port: address.port().into(),
        ..<_>::default()
    };
    let file = proto::FileEntry {
        name: name.into(),
        size: manifest.layout().size(),
        content_id: manifest.id().to_string(),
        partial: false,
    };
    let batch = RegisterBatch { added: vec![file], removed: vec![] };
    let parts = [register_request::Part::Header(header), register_request::Part::Batch(batch)];
    parts.map(|part| RegisterRequest { part: Some(part) }).into()
}

fn manifest(bytes: &[u8]) -> Manifest {
    let layout = Layout::new(bytes.len() as u64).unwrap();
    let pieces = layout.pieces().map(|piece| {
        let at = usize::try_from(layout.offset(piece)).unwrap();
        hash_piece(layout, piece, &bytes[at..at + layout.len_of(piece) as usize]).unwrap()
    });
    assemble(layout, pieces.collect()).unwrap()
}

struct Lies {
    lie: Lie,
    manifest: Manifest,
    asked: Arc<AtomicUsize>,
}

impl Lies {
    /// The piece hashes, and the size that they are said to be of.
    fn hashes(&self) -> (u64, Vec<Hash32>) {
        let (size, mut hashes) = (self.manifest.layout().size(), self.manifest.hashes().to_vec());
        match self.lie {
            Lie::Bytes => {}
            Lie::Hash => hashes[0][0] ^= 1,
            Lie::Size => {
                hashes = hashes.chunks(2).map(|pair| merge(pair[0], pair[1])).collect();
                return (size / 2, hashes);
            }
        }
        (size, hashes)
    }
}

/// The chaining value of a tree's node over those of its two halves.
fn merge(left: Hash32, right: Hash32) -> Hash32 {
    blake3::hazmat::merge_subtrees_non_root(&left, &right, blake3::hazmat::Mode::Hash)
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl ChunkService for Lies {
    type GetManifestStream = Answers<GetManifestResponse>;
    type WatchHaveStream = Answers<WatchHaveResponse>;
    type GetChunksStream = Answers<GetChunksResponse>;

    async fn get_manifest(
        &self,
        _: Request<GetManifestRequest>,
    ) -> Result<Response<Answers<GetManifestResponse>>, Status> {
        use get_manifest_response::Part;
        let (size, hashes) = self.hashes();
        let header = ManifestHeader {
            size,
            last_chunk: Bytes::copy_from_slice(self.manifest.last_chunk()),
            right_edge: self.manifest.right_edge().concat().into(),
        };
        let hashes = hashes.chunks(proto::HASHES_PER_MESSAGE).map(|some| Part::PieceHashes(some.concat().into()));
        let parts: Vec<_> = std::iter::once(Part::Header(header)).chain(hashes).collect();
        let answer = parts.into_iter().map(|part| Ok(GetManifestResponse { index: 0, part: Some(part) }));
        Ok(Response::new(Box::pin(stream::iter(answer))))
    }

    async fn watch_have(&self, _: Request<WatchHaveRequest>) -> Result<Response<Answers<WatchHaveResponse>>, Status> {
        Err(Status::unimplemented("it says it has everything"))
    }

    async fn get_chunks(
        &self,
        request: Request<GetChunksRequest>,
    ) -> Result<Response<Answers<GetChunksResponse>>, Status> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let request = request.into_inner();
        let (layout, chunk_length) = (self.manifest.layout(), u64::from(request.chunk_length.clamp(16 << 10, 1 << 20)));
        let lies = request.ranges.into_iter().zip(0..).flat_map(move |(range, index)| {
            let pieces =
                (range.first_piece..range.first_piece + range.piece_count).filter_map(move |i| layout.piece(i));
            pieces.flat_map(move |piece| {
                let (start, end) = (layout.offset(piece), layout.offset(piece) + u64::from(layout.len_of(piece)));
                (start..end).step_by(usize::try_from(chunk_length).unwrap()).map(move |offset| {
                    let length = usize::try_from(chunk_length.min(end - offset)).unwrap();
                    let chunk = Chunk { range: index, offset, data: vec![0x5a; length].into() };
                    Ok(GetChunksResponse { part: Some(get_chunks_response::Part::Chunk(chunk)) })
                })
            })
        });
        Ok(Response::new(Box::pin(stream::iter(lies))))
    }
}
