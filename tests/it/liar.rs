//! Members that lie: they joined like any other, say that they hold whole files, and serve them honestly but for what
//! they are told to lie about. The product has no switch for that, so they are played here, with the product's own library.
//!
//! Invariant: a liar is cheap: all of them share the threads of one runtime and the bytes of the files, so that dozens may
//! run beside one another. It ends when it is dropped.

use std::{
    collections::HashMap,
    fs,
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    sync::{Arc, LazyLock, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use rustls::ServerConfig;
use sprat::{
    content::{Layout, Manifest, assemble, hash_piece},
    identity::{Identity, PEER_FILES},
    net::{self, Front, Listener, ListenerLimits},
    peer::member::join::join_identity_only,
    proto::{
        self, GetChunksRequest, GetChunksResponse, GetManifestRequest, GetManifestResponse,
        HeartbeatRequest, RegisterBatch, RegisterHeader, RegisterRequest, ReportPieceRequest,
        ReportPieceResponse, WatchHaveRequest, WatchHaveResponse,
        chunk_service_server::{ChunkService, ChunkServiceServer},
        register_request,
        tracker_service_client::TrackerServiceClient,
    },
    tls::{self, Expect, LiveCertificate},
    trust::Trust,
};
use tokio::{net::TcpListener, runtime::Runtime, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, service::Routes};

mod answers;

use self::answers::{Answers, Counts, Served, no_manifest};
use crate::swarm::Swarm;

/// Well below the lease.
const HEARTBEAT: Duration = Duration::from_secs(3);
const GENERATION: u64 = 1;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
});

/// What it is that a liar does not tell truly. A content may have several lies: for each call the first that concerns it
/// counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// The bytes of every piece.
    Bytes,
    /// The hash of one piece, and the bytes.
    Hash,
    /// The size, so that hashes of half as many pieces, which fold to the same content id, would do; and the bytes.
    Size,
    /// What it holds: nothing, although it says that it has all and has promised all to others. A piece that it is asked
    /// for ends half-way.
    Have,
    /// What it holds: whatever bytes it is asked for, it does not have.
    Denial,
    /// What it holds: it knows nothing of a content that it registered, neither manifest nor news nor bytes.
    Unknown,
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
    /// Where it is: nobody listens there.
    Closed,
    /// Where it is: what is sent there is dropped, as by a firewall.
    Deaf,

    /// Nothing comes of a manifest.
    ManifestNever,
    /// A manifest ends after its header.
    ManifestEnds,
    /// A hash each half second, and no end.
    ManifestTrickle,
    /// Hashes without end, as fast as they are taken.
    ManifestFlood,
    /// Messages without content, and no end.
    ManifestEmpty,
    HeaderTwice,
    HashesFirst,
    ManifestTwice,
    /// A manifest at a position that was not asked for.
    ManifestOfOther,

    NewsNever,
    /// The news end at once.
    NewsEnd,
    NewsRefused,
    /// News of a position that was not asked for.
    NewsOfOther,
    /// News of pieces that the content does not have.
    NewsOfNoPiece,
    NewsTwice,
    NewsOfOtherSize,
    /// It has all, and then nothing; if it is asked, it serves all the same.
    GoneAfterAll,
    /// All is promised to others, again and again.
    Promises,
    /// Others who have it, too: random ones, without end.
    Hints,

    /// The range is outside of the content, it says.
    OutOfRange,
    /// Every piece is promised to somebody else, it says.
    Promised,
    RefusedTwice,
    /// A range that was not asked for is refused.
    RefusedOther,
    /// Too many streams, always.
    Busy,
    Failure,
    /// Chunks without bytes, and no end.
    EmptyChunks,
    /// Messages without content, and no end.
    EmptyMessages,
    /// Where its time went, and no end.
    EndlessSpent,
    /// A chunk without bytes, and then the truth.
    EmptyFirst,
    /// The last chunk first.
    Backwards,
    HalfOfIt,
    /// All of it, twice.
    TooMuch,
    /// The chunks of a range that was not asked for.
    OtherRange,
    /// Chunks that are longer than their piece.
    LongChunk,
}

impl Lie {
    /// Those that need no service.
    pub const ABOUT_THE_LINE: &[Self] =
        &[Self::SilentTls, Self::SilentTcp, Self::Closed, Self::Deaf];
    /// Those that concern GetManifest.
    pub const ABOUT_MANIFESTS: &[Self] = &[
        Self::Hash,
        Self::Size,
        Self::Unknown,
        Self::Delay,
        Self::ManifestNever,
        Self::ManifestEnds,
        Self::ManifestTrickle,
        Self::ManifestFlood,
        Self::ManifestEmpty,
        Self::HeaderTwice,
        Self::HashesFirst,
        Self::ManifestTwice,
        Self::ManifestOfOther,
    ];
    /// Those that concern WatchHave.
    pub const ABOUT_NEWS: &[Self] = &[
        Self::Unknown,
        Self::Have,
        Self::NewsNever,
        Self::NewsEnd,
        Self::NewsRefused,
        Self::NewsOfOther,
        Self::NewsOfNoPiece,
        Self::NewsTwice,
        Self::NewsOfOtherSize,
        Self::GoneAfterAll,
        Self::Promises,
        Self::Hints,
    ];
    /// Those that concern GetChunks.
    pub const ABOUT_BYTES: &[Self] = &[
        Self::Bytes,
        Self::Hash,
        Self::Size,
        Self::Denial,
        Self::Unknown,
        Self::Delay,
        Self::Have,
        Self::Trickle,
        Self::Silence,
        Self::OutOfRange,
        Self::Promised,
        Self::RefusedTwice,
        Self::RefusedOther,
        Self::Busy,
        Self::Failure,
        Self::EmptyChunks,
        Self::EmptyMessages,
        Self::EndlessSpent,
        Self::EmptyFirst,
        Self::Backwards,
        Self::HalfOfIt,
        Self::TooMuch,
        Self::OtherRange,
        Self::LongChunk,
    ];

    /// Each once.
    pub fn all() -> Vec<Self> {
        let mut all: Vec<Self> = vec![];
        let kinds = [
            Self::ABOUT_THE_LINE,
            Self::ABOUT_MANIFESTS,
            Self::ABOUT_NEWS,
            Self::ABOUT_BYTES,
        ];
        for lie in kinds.into_iter().flatten() {
            if !all.contains(lie) {
                all.push(*lie);
            }
        }
        all
    }
}

/// A file as it is.
#[derive(Clone)]
pub struct Truth {
    bytes: Bytes,
    manifest: Arc<Manifest>,
}

impl Truth {
    pub fn of(swarm: &Swarm, path: &str) -> Self {
        let bytes = Bytes::from(fs::read(swarm.path(path)).unwrap());
        let layout = Layout::new(bytes.len() as u64).unwrap();
        let pieces = layout.pieces().map(|piece| {
            let at = usize::try_from(layout.offset(piece)).unwrap();
            let end = at + layout.len_of(piece) as usize;
            hash_piece(layout, piece, &bytes[at..end]).unwrap()
        });
        let manifest = Arc::new(assemble(layout, pieces.collect()).unwrap());
        Self { bytes, manifest }
    }

    /// What a liar registers.
    pub fn offer(&self, name: &str, lies: &[Lie]) -> Offer {
        Offer {
            truth: self.clone(),
            name: name.into(),
            lies: lies.into(),
        }
    }
}

/// A file that a liar registers, and what it lies about it.
pub struct Offer {
    truth: Truth,
    name: String,
    lies: Vec<Lie>,
}

/// A running liar; it ends when dropped.
pub struct Liar {
    /// Who it is.
    pub peer_id: String,
    counts: Arc<Counts>,
    cancel: CancellationToken,
}

impl Liar {
    /// One that registers the file of the swarm at `path` under `name`.
    pub fn start(swarm: &Swarm, path: &str, name: &str, lie: Lie) -> Self {
        Self::serving(
            swarm,
            &swarm.link(1),
            vec![Truth::of(swarm, path).offer(name, &[lie])],
        )
    }

    /// As many as there are lists of offers, side by side.
    pub fn all(swarm: &Swarm, offers: Vec<Vec<Offer>>) -> Vec<Self> {
        let link = swarm.link(u32::try_from(offers.len()).unwrap());
        offers
            .into_iter()
            .map(|offers| Self::serving(swarm, &link, offers))
            .collect()
    }

    /// Joins by the link, listens, and registers what it offers. Lies about the line are those of the first offer.
    pub fn serving(swarm: &Swarm, link: &str, offers: Vec<Offer>) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("liar-")
            .tempdir_in(swarm.path(""))
            .unwrap();
        let token = link.trim().parse().unwrap();
        RUNTIME
            .block_on(join_identity_only(&token, folder.path()))
            .unwrap();
        let identity = Identity::load(folder.path(), PEER_FILES).unwrap().unwrap();
        let liar = Self {
            peer_id: identity.key.peer_id().to_string(),
            counts: Arc::default(),
            cancel: CancellationToken::new(),
        };
        RUNTIME.block_on(liar.begin(identity, swarm.address(), offers));
        liar
    }

    /// Calls of any kind that it got; of one without a service, connections.
    pub fn calls(&self) -> usize {
        self.counts.calls.load(Ordering::Relaxed)
    }

    /// How often it was believed enough to be asked for bytes; of one without a service, connected to.
    pub fn asked(&self) -> usize {
        self.counts.asked.load(Ordering::Relaxed)
    }

    /// How often it told a lie; each hint is one.
    pub fn lied(&self) -> usize {
        self.counts.lied.load(Ordering::Relaxed)
    }

    /// Bytes that it could send before nobody listened any more.
    pub fn sent(&self) -> u64 {
        self.counts.sent.load(Ordering::Relaxed)
    }

    async fn begin(&self, identity: Identity, tracker: &str, offers: Vec<Offer>) {
        let trust = Trust::new(identity.authority.clone()).unwrap();
        let chain = vec![identity.certificate.clone(), identity.authority.clone()];
        let certificate = LiveCertificate::new(chain, identity.key.to_der()).unwrap();
        let tls = tls::member_server(&trust, certificate.clone(), certificate.clone()).unwrap();
        let on_line = offers.first().and_then(|offer| offer.lies.first().copied());
        let register = |address| register(address, &offers);
        let register = match on_line {
            Some(Lie::Deaf) => {
                let deaf = Deaf::listen();
                let register = register(deaf.address);
                self.spawn(async move {
                    std::future::pending::<()>().await;
                    drop(deaf);
                });
                register
            }
            line => {
                let socket = net::bind("127.0.0.1:0".parse().unwrap(), 0).unwrap();
                let register = register(socket.local_addr().unwrap());
                let counts = self.counts.clone();
                match line {
                    Some(Lie::Closed) => drop(socket),
                    Some(Lie::SilentTcp) => self.spawn(say_nothing(socket, None, counts)),
                    Some(Lie::SilentTls) => {
                        self.spawn(say_nothing(socket, Some(tls.into()), counts));
                    }
                    _ => {
                        let server = self.server(offers);
                        let cancel = self.cancel.clone();
                        tokio::spawn(serve(socket, tls, server, (trust.clone(), cancel)));
                    }
                }
                register
            }
        };
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
        let mut client = TrackerServiceClient::with_origin(connection, origin);
        client.register(stream::iter(register)).await.unwrap();
        self.spawn(async move {
            loop {
                tokio::time::sleep(HEARTBEAT).await;
                let here = HeartbeatRequest {
                    generation: GENERATION,
                    ..<_>::default()
                };
                // A tracker that ends is no news to a liar.
                let _ = client.heartbeat(here).await;
            }
        });
    }

    fn server(&self, offers: Vec<Offer>) -> Server {
        let served = |offer: Offer| {
            let id = Bytes::copy_from_slice(offer.truth.manifest.id().as_bytes());
            let served = Served {
                truth: offer.truth,
                lies: offer.lies,
                counts: self.counts.clone(),
            };
            (id, Arc::new(served))
        };
        Server {
            contents: offers.into_iter().map(served).collect(),
            counts: self.counts.clone(),
        }
    }

    /// Runs something until the liar is dropped.
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let cancel = self.cancel.clone();
        tokio::spawn(async move { cancel.run_until_cancelled(work).await });
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// A port that drops what is sent to it: its queue of connections that nobody takes is full.
struct Deaf {
    address: SocketAddr,
    _listener: rustix::fd::OwnedFd,
    _queue: Vec<TcpStream>,
}

impl Deaf {
    fn listen() -> Self {
        use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&listener, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        listen(&listener, 0).unwrap();
        let address: SocketAddr = getsockname(&listener).unwrap().try_into().unwrap();
        let mut queue = vec![];
        loop {
            match TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
                Ok(stream) => queue.push(stream),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
                    break;
                }
            }
        }
        Self {
            address,
            _listener: listener,
            _queue: queue,
        }
    }
}

/// Accepts whoever comes, shakes hands if it has something for it, and holds the line.
async fn say_nothing(socket: TcpListener, tls: Option<TlsAcceptor>, counts: Arc<Counts>) {
    let met = |counts: &Counts| {
        counts.calls.fetch_add(1, Ordering::Relaxed);
        counts.asked.fetch_add(1, Ordering::Relaxed);
        counts.lied.fetch_add(1, Ordering::Relaxed);
    };
    let mut held = JoinSet::new();
    while let Ok((stream, _)) = socket.accept().await {
        let (tls, counts) = (tls.clone(), counts.clone());
        held.spawn(async move {
            let Some(tls) = tls else {
                met(&counts);
                return std::future::pending::<()>().await;
            };
            let Ok(_stream) = tls.accept(stream).await else {
                return;
            };
            met(&counts);
            std::future::pending().await
        });
    }
}

async fn serve(
    socket: TcpListener,
    tls: Arc<ServerConfig>,
    server: Server,
    (trust, cancel): (Arc<Trust>, CancellationToken),
) {
    let service =
        ChunkServiceServer::new(server).max_encoding_message_size(proto::MAX_CHUNK_MESSAGE);
    let listener = Listener {
        members: Front {
            tls,
            routes: Routes::new(service),
        },
        joiners: None,
        limits: ListenerLimits {
            connections: 64,
            strangers_per_address: 64,
            per_member: 8,
            http2: net::DATA,
        },
        trust,
        cancel,
        tasks: TaskTracker::new(),
    };
    listener.run(socket).await;
}

fn register(address: SocketAddr, offers: &[Offer]) -> Vec<RegisterRequest> {
    let header = RegisterHeader {
        generation: GENERATION,
        addresses: vec![address.to_string()],
        port: address.port().into(),
        ..<_>::default()
    };
    let file = |offer: &Offer| proto::FileEntry {
        name: offer.name.clone(),
        size: offer.truth.manifest.layout().size(),
        content_id: offer.truth.manifest.id().to_string(),
        partial: false,
    };
    let batch = RegisterBatch {
        added: offers.iter().map(file).collect(),
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

struct Server {
    /// By id.
    contents: HashMap<Bytes, Arc<Served>>,
    counts: Arc<Counts>,
}

#[tonic::async_trait]
impl ChunkService for Server {
    type GetManifestStream = Answers<GetManifestResponse>;
    type WatchHaveStream = Answers<WatchHaveResponse>;
    type GetChunksStream = Answers<GetChunksResponse>;

    async fn report_piece(
        &self,
        _: Request<ReportPieceRequest>,
    ) -> Result<Response<ReportPieceResponse>, Status> {
        Ok(Response::new(ReportPieceResponse {}))
    }

    async fn get_manifest(
        &self,
        request: Request<GetManifestRequest>,
    ) -> Result<Response<Answers<GetManifestResponse>>, Status> {
        self.counts.calls.fetch_add(1, Ordering::Relaxed);
        let ids = request.into_inner().content_ids.into_iter().zip(0..);
        let asked: Vec<_> = ids
            .map(|(id, index)| (self.contents.get(&id).cloned(), index))
            .collect();
        let answers = stream::iter(asked).flat_map(|(content, index)| match content {
            Some(content) => content.manifest(index),
            None => Box::pin(stream::iter([Ok(no_manifest(index))])),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn watch_have(
        &self,
        request: Request<WatchHaveRequest>,
    ) -> Result<Response<Answers<WatchHaveResponse>>, Status> {
        self.counts.calls.fetch_add(1, Ordering::Relaxed);
        let ids = request.into_inner().content_ids.into_iter().zip(0..);
        let news = ids.filter_map(|(id, index)| Some(self.contents.get(&id)?.have(index)));
        Ok(Response::new(Box::pin(stream::select_all(news))))
    }

    async fn get_chunks(
        &self,
        request: Request<GetChunksRequest>,
    ) -> Result<Response<Answers<GetChunksResponse>>, Status> {
        self.counts.calls.fetch_add(1, Ordering::Relaxed);
        self.counts.asked.fetch_add(1, Ordering::Relaxed);
        let request = request.into_inner();
        let chunk_length = request.chunk_length.clamp(16 << 10, 1 << 20) as usize;
        let asked = request.ranges.into_iter().zip(0..);
        let asked: Vec<_> = asked
            .filter_map(|(range, at)| {
                Some((self.contents.get(&range.content_id)?.clone(), range, at))
            })
            .collect();
        let answers = stream::iter(asked)
            .flat_map(move |(content, range, at)| content.chunks(&range, at, chunk_length));
        Ok(Response::new(Box::pin(answers)))
    }
}
