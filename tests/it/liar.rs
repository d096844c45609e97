//! A member that lies: it joined like any other, says that it holds a whole file, and gives wrong bytes, a wrong manifest,
//! next to nothing, or nothing. The product has no switch for that, so it is played here, with the product's own library.

use std::{
    fs,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use rustls::ServerConfig;
use sprat::{
    content::{Hash32, Layout, Manifest, assemble, hash_piece},
    identity::{Identity, PEER_FILES},
    net::{self, Front, Limits, Listener},
    proto::{
        self, Chunk, ContentError, GetChunksRequest, GetChunksResponse, GetManifestRequest,
        GetManifestResponse, HaveDelta, HaveMap, ManifestHeader, RangeError, RegisterBatch,
        RegisterHeader, RegisterRequest, WatchHaveRequest, WatchHaveResponse,
        chunk_service_server::{ChunkService, ChunkServiceServer},
        content_error::Code,
        get_chunks_response, get_manifest_response, register_request,
        watch_have_response::Change,
    },
    tls::{self, Expect, LiveCertificate},
    trust::Trust,
};
use tokio::{net::TcpListener, runtime::Runtime, task::JoinSet};
use tokio_rustls::TlsAcceptor;
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
    /// What it holds: nothing, although it says that it has all and has promised all to others. A piece that it is asked
    /// for ends half-way.
    Have,
    /// What it holds: whatever it is asked for, it does not have.
    Denial,
    /// That it does not have what it is asked for, the first two times; then it gives true bytes.
    Delay,
    /// That it is of use: true bytes, one a second.
    Trickle,
    /// That it is of use: it takes a request, and says no more.
    Silence,
    /// That it is of use: it says no more after the handshake.
    SilentTls,
    /// That it is of use: it accepts connections, and says nothing.
    SilentTcp,
}

/// A running liar; it ends when dropped.
pub struct Liar {
    /// Who it is.
    pub peer_id: String,
    asked: Arc<AtomicUsize>,
    sent: Arc<AtomicU64>,
    _runtime: Runtime,
}

impl Liar {
    /// Joins, listens, and registers the file of the swarm at `path` under `name`.
    pub fn start(swarm: &Swarm, path: &str, name: &str, lie: Lie) -> Self {
        let folder = format!("liar-{}", lie as u8);
        swarm
            .run("", ["join", &swarm.link(1), "--identity-only", &folder])
            .ok();
        let identity = Identity::load(&swarm.path(&folder), PEER_FILES)
            .unwrap()
            .unwrap();
        let bytes = Bytes::from(fs::read(swarm.path(path)).unwrap());
        let manifest = manifest(&bytes);
        let (asked, sent) = (Arc::default(), Arc::default());
        let described = AtomicUsize::new(0);
        let lies = Lies {
            lie,
            bytes,
            manifest,
            described,
            asked: Arc::clone(&asked),
            sent: Arc::clone(&sent),
        };
        let runtime = Runtime::new().unwrap();
        let peer_id = identity.key.peer_id().to_string();
        runtime.block_on(begin(identity, swarm.address(), name, lies));
        Self {
            peer_id,
            asked,
            sent,
            _runtime: runtime,
        }
    }

    /// How often it was believed enough to be asked for bytes; of one without a service, connected to.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// Wrong bytes that it could send before nobody listened any more.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

async fn begin(identity: Identity, tracker: &str, name: &str, lies: Lies) {
    let trust = Trust::new(identity.authority.clone()).unwrap();
    let chain = vec![identity.certificate.clone(), identity.authority.clone()];
    let certificate = LiveCertificate::new(chain, identity.key.to_der()).unwrap();
    let socket = net::bind("127.0.0.1:0".parse().unwrap(), 0).unwrap();
    let address = socket.local_addr().unwrap();
    let register = register(address, name, &lies.manifest);
    let tls = tls::member_server(&trust, certificate.clone(), certificate.clone()).unwrap();
    match lies.lie {
        Lie::SilentTcp => drop(tokio::spawn(say_nothing(socket, None, lies.asked))),
        Lie::SilentTls => drop(tokio::spawn(say_nothing(
            socket,
            Some(tls.into()),
            lies.asked,
        ))),
        _ => drop(tokio::spawn(serve(socket, tls, lies, trust.clone()))),
    }
    let config = tls::member_client(&trust, &certificate, Expect::Tracker).unwrap();
    let connection = net::dial(
        &[tracker.to_owned()],
        config,
        "tracker.sprat.internal",
        net::CONTROL,
    )
    .await
    .unwrap();
    let origin = connection.origin();
    let mut client =
        proto::tracker_service_client::TrackerServiceClient::with_origin(connection, origin);
    client.register(stream::iter(register)).await.unwrap();
}

/// Accepts whoever comes, shakes hands if it has something for it, and holds the line.
async fn say_nothing(socket: TcpListener, tls: Option<TlsAcceptor>, met: Arc<AtomicUsize>) {
    let mut held = JoinSet::new();
    while let Ok((stream, _)) = socket.accept().await {
        let (tls, met) = (tls.clone(), met.clone());
        held.spawn(async move {
            let Some(tls) = tls else {
                met.fetch_add(1, Ordering::Relaxed);
                return std::future::pending::<()>().await;
            };
            let Ok(_stream) = tls.accept(stream).await else {
                return;
            };
            met.fetch_add(1, Ordering::Relaxed);
            std::future::pending().await
        });
    }
}

async fn serve(socket: TcpListener, tls: Arc<ServerConfig>, lies: Lies, trust: Arc<Trust>) {
    let service = ChunkServiceServer::new(lies).max_encoding_message_size(proto::MAX_CHUNK_MESSAGE);
    let listener = Listener {
        members: Front {
            tls,
            routes: Routes::new(service),
        },
        joiners: None,
        limits: Limits {
            connections: 64,
            strangers_per_address: 64,
            per_member: 8,
            http2: net::DATA,
        },
        trust,
        cancel: CancellationToken::new(),
        tasks: TaskTracker::new(),
    };
    listener.run(socket).await;
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
    let batch = RegisterBatch {
        added: vec![file],
        removed: vec![],
    };
    let parts = [
        register_request::Part::Header(header),
        register_request::Part::Batch(batch),
    ];
    parts
        .map(|part| RegisterRequest { part: Some(part) })
        .into()
}

fn manifest(bytes: &[u8]) -> Manifest {
    let layout = Layout::new(bytes.len() as u64).unwrap();
    let pieces = layout.pieces().map(|piece| {
        let at = usize::try_from(layout.offset(piece)).unwrap();
        hash_piece(
            layout,
            piece,
            &bytes[at..at + layout.len_of(piece) as usize],
        )
        .unwrap()
    });
    assemble(layout, pieces.collect()).unwrap()
}

struct Lies {
    lie: Lie,
    bytes: Bytes,
    manifest: Manifest,
    /// How often it was asked for the manifest.
    described: AtomicUsize,
    asked: Arc<AtomicUsize>,
    sent: Arc<AtomicU64>,
}

impl Lies {
    /// The piece hashes, and the size that they are said to be of.
    fn hashes(&self) -> (u64, Vec<Hash32>) {
        let (size, mut hashes) = (
            self.manifest.layout().size(),
            self.manifest.hashes().to_vec(),
        );
        match self.lie {
            Lie::Hash => hashes[0][0] ^= 1,
            Lie::Size => {
                hashes = hashes
                    .chunks(2)
                    .map(|pair| merge(pair[0], pair[1]))
                    .collect();
                return (size / 2, hashes);
            }
            _ => {}
        }
        (size, hashes)
    }

    /// The bytes of the first piece, one by one.
    fn trickle(
        &self,
        request: &GetChunksRequest,
    ) -> impl Stream<Item = Result<GetChunksResponse, Status>> + use<> {
        let start = u64::from(request.ranges[0].first_piece)
            * u64::from(self.manifest.layout().piece_len());
        let bytes = self.bytes.slice(usize::try_from(start).unwrap()..);
        stream::unfold(0, move |n| {
            let data = bytes.slice(n..=n);
            async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let chunk = Chunk {
                    range: 0,
                    offset: start + n as u64,
                    data,
                };
                Some((
                    Ok(GetChunksResponse {
                        part: Some(get_chunks_response::Part::Chunk(chunk)),
                    }),
                    n + 1,
                ))
            }
        })
    }
}

/// None of it is there.
fn deny(request: &GetChunksRequest) -> Vec<Result<GetChunksResponse, Status>> {
    let ranges = 0..u32::try_from(request.ranges.len()).unwrap();
    let error = |range| RangeError {
        range,
        error: Some(ContentError {
            code: Code::NotFound.into(),
            ..<_>::default()
        }),
    };
    ranges
        .map(|range| {
            Ok(GetChunksResponse {
                part: Some(get_chunks_response::Part::Error(error(range))),
            })
        })
        .collect()
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
        if self.lie == Lie::Delay && self.described.fetch_add(1, Ordering::Relaxed) < 2 {
            let error = Part::Error(ContentError {
                code: Code::NotFound.into(),
                ..<_>::default()
            });
            let answer = [Ok(GetManifestResponse {
                index: 0,
                part: Some(error),
            })];
            return Ok(Response::new(Box::pin(stream::iter(answer))));
        }
        let (size, hashes) = self.hashes();
        let header = ManifestHeader {
            size,
            last_chunk: Bytes::copy_from_slice(self.manifest.last_chunk()),
            right_edge: self.manifest.right_edge().concat().into(),
        };
        let hashes = hashes
            .chunks(proto::HASHES_PER_MESSAGE)
            .map(|some| Part::PieceHashes(some.concat().into()));
        let parts: Vec<_> = std::iter::once(Part::Header(header))
            .chain(hashes)
            .collect();
        let answer = parts.into_iter().map(|part| {
            Ok(GetManifestResponse {
                index: 0,
                part: Some(part),
            })
        });
        Ok(Response::new(Box::pin(stream::iter(answer))))
    }

    async fn watch_have(
        &self,
        _: Request<WatchHaveRequest>,
    ) -> Result<Response<Answers<WatchHaveResponse>>, Status> {
        if self.lie != Lie::Have {
            return Err(Status::unimplemented("it says it has everything"));
        }
        let layout = self.manifest.layout();
        let all = HaveMap {
            size: layout.size(),
            complete: true,
            ..<_>::default()
        };
        let promised = HaveDelta {
            pieces: (0..layout.n_pieces()).collect(),
        };
        let news = [Change::Have(all), Change::Promised(promised)];
        let news = news.map(|change| {
            Ok(WatchHaveResponse {
                index: 0,
                change: Some(change),
            })
        });
        Ok(Response::new(Box::pin(
            stream::iter(news).chain(stream::pending()),
        )))
    }

    async fn get_chunks(
        &self,
        request: Request<GetChunksRequest>,
    ) -> Result<Response<Answers<GetChunksResponse>>, Status> {
        let n_before = self.asked.fetch_add(1, Ordering::Relaxed);
        let request = request.into_inner();
        match self.lie {
            Lie::Silence => return Ok(Response::new(Box::pin(stream::pending()))),
            Lie::Trickle => return Ok(Response::new(Box::pin(self.trickle(&request)))),
            Lie::Delay if n_before < 2 => {
                return Ok(Response::new(Box::pin(stream::iter(deny(&request)))));
            }
            Lie::Denial => return Ok(Response::new(Box::pin(stream::iter(deny(&request))))),
            _ => {}
        }
        let (layout, chunk_length) = (
            self.manifest.layout(),
            u64::from(request.chunk_length.clamp(16 << 10, 1 << 20)),
        );
        let (sent, truth) = (
            self.sent.clone(),
            (self.lie == Lie::Delay).then(|| self.bytes.clone()),
        );
        let lies = request
            .ranges
            .into_iter()
            .zip(0..)
            .flat_map(move |(range, index)| {
                let pieces = (range.first_piece..range.first_piece + range.piece_count)
                    .filter_map(move |i| layout.piece(i));
                let (sent, truth) = (sent.clone(), truth.clone());
                pieces.flat_map(move |piece| {
                    let (sent, truth) = (sent.clone(), truth.clone());
                    let (start, end) = (
                        layout.offset(piece),
                        layout.offset(piece) + u64::from(layout.len_of(piece)),
                    );
                    (start..end)
                        .step_by(usize::try_from(chunk_length).unwrap())
                        .map(move |offset| {
                            let length = usize::try_from(chunk_length.min(end - offset)).unwrap();
                            sent.fetch_add(length as u64, Ordering::Relaxed);
                            let from = usize::try_from(offset).unwrap();
                            let wrong = || vec![0x5a; length].into();
                            let data = truth
                                .as_ref()
                                .map_or_else(wrong, |bytes| bytes.slice(from..from + length));
                            let chunk = Chunk {
                                range: index,
                                offset,
                                data,
                            };
                            Ok(GetChunksResponse {
                                part: Some(get_chunks_response::Part::Chunk(chunk)),
                            })
                        })
                })
            });
        let most = if self.lie == Lie::Have {
            u64::from(layout.piece_len()) / 2 / chunk_length
        } else {
            u64::MAX
        };
        let lies = lies.take(usize::try_from(most).unwrap());
        Ok(Response::new(Box::pin(stream::iter(lies))))
    }
}
