//! A Node: a running peer. This file joins its parts and owns its life: lock, load, bind, serve, announce, leave.
//!
//! Invariants: one process per state directory; whoever holds the lock serves the control socket; everything runs under
//! one token and one tracker of tasks, and stop means: leave the network, let streams finish, end.

pub mod control;
pub mod fetch;
pub mod limit;
pub mod member;
mod metrics;
pub mod serve;
pub mod sharing;

use std::{
    collections::BTreeMap,
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::{net::TcpListener, sync::watch, task::spawn_blocking};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

pub use self::control::instance::attach;
use self::{
    control::{
        Control, ControlServer,
        instance::{SOCKET, lock},
        wire::Meter,
    },
    limit::{Limit, Limits as Bandwidth},
    member::{
        announce::{Announcer, Reachable},
        membership::Membership,
        standing::TrackerStanding,
        tracker_client::TrackerClient,
    },
    serve::{ChunkServer, Served, Uncopied},
    sharing::{
        index::Index,
        library::Library,
        shares::{Shares, SharesConfig},
    },
};
pub use self::{limit::Rates, sharing::shares::ShareSpec};
use crate::{
    exit::{Exit, Failed},
    identity::PeerId,
    net::{self, Connection, Front, Listener, ListenerLimits},
    operator,
    proto::{
        self, chunk_service_server::ChunkServiceServer,
        control_service_server::ControlServiceServer,
    },
    safe_path::Root,
    tls,
};

const DRAIN: Duration = Duration::from_secs(12);
/// The port unless told otherwise; the next ones are tried if it is taken.
pub const DEFAULT_PORT: u16 = 7701;
const OPERATOR_PORT: u16 = 7791;
const SPREAD: u16 = 32;
/// Room for 32 far members behind one address that begin together, and for 32 downloads of one.
const LIMITS: ListenerLimits = ListenerLimits {
    connections: 1024,
    strangers_per_address: 256,
    per_member: 256,
    http2: net::DATA,
};
/// Longest request of this user's own commands, bytes: a Get of some hundred thousand files.
const MAX_CONTROL_MESSAGE: usize = 64 << 20;

/// How a Node runs.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Where identity, index and lock lie.
    pub state_dir: PathBuf,
    /// Folders to share.
    pub shares: Vec<ShareSpec>,
    /// Where downloads land; shared too.
    pub downloads: Option<PathBuf>,
    /// What to bind; none for a short life on any port.
    pub listen: Option<SocketAddr>,
    /// Where the operator page is; none: nowhere.
    pub operator: Option<SocketAddr>,
    /// "HOST:PORT" to offer instead of the interfaces' addresses.
    pub advertise: Vec<String>,
    /// The tracker, instead of the one joined through.
    pub tracker: Option<String>,
    /// How often shares are rescanned beside events.
    pub rescan: Duration,
    /// What it may send, to begin with.
    pub upload_limit: Rates,
    /// What it may fetch, to begin with.
    pub download_limit: Rates,
}

/// A running peer.
pub struct Node {
    control: Arc<Control>,
    connection: Connection,
    addresses: Vec<String>,
    operator: Option<SocketAddr>,
    cancel: CancellationToken,
    tasks: TaskTracker,
    lock: File,
}

impl Node {
    /// Takes the state directory, and serves.
    ///
    /// # Errors
    /// [`Exit::Auth`] if this machine has not joined; another process on the directory; a folder or port that cannot be
    /// used.
    pub async fn start(options: NodeOptions) -> Result<Self> {
        let membership = Membership::load(&options.state_dir, options.tracker.clone())?;
        Self::start_with(options, Arc::new(TrackerClient::new(membership))).await
    }

    /// As [`start`](Self::start), with a client of the network's tracker that may be connected already.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_with(options: NodeOptions, tracker: Arc<TrackerClient>) -> Result<Self> {
        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let started = Self::try_start(options, tracker, &cancel, &tasks).await;
        if started.is_err() {
            // What had begun ends, so that another attempt finds nothing taken.
            cancel.cancel();
            tasks.close();
            let _ = tokio::time::timeout(DRAIN, tasks.wait()).await;
        }
        started
    }

    async fn try_start(
        options: NodeOptions,
        tracker: Arc<TrackerClient>,
        cancel: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<Self> {
        let membership = tracker.membership().clone();
        let lock = lock(&options.state_dir).await?;
        if membership.seconds_left() <= 0 {
            member::join::renew(&membership)
                .await
                .context("the certificate has ended")?;
        }
        net::raise_descriptor_limit();
        let ending = TaskTracker::new();
        ending.close();
        let index = open_index(options.state_dir.join("index.redb")).await?;
        let library = Library::new();
        let shares = Arc::new(Shares::new(SharesConfig {
            index: index.clone(),
            library: library.clone(),
            hidden: vec![options.state_dir.clone()],
            rescan: options.rescan,
            poll: false,
            cancel: cancel.clone(),
            tasks: tasks.clone(),
        }));
        let remember = options.state_dir.join("shares.json");
        let downloads = add_shares(&options, &shares, &remember)?;
        let listener = listen(options.listen)?;
        let operator = net::bind_http(options.operator, OPERATOR_PORT)?;
        let reachable = Reachable {
            bound: listener.local_addr()?,
            advertise: options.advertise.clone(),
        };
        let (standing, standing_shown) = watch::channel(TrackerStanding::CONNECTING);
        let control = Arc::new(Control {
            membership: membership.clone(),
            tracker,
            library,
            index,
            shares,
            remember,
            downloads,
            served: Arc::default(),
            limits: Bandwidth {
                upload: Limit::new(options.upload_limit),
                download: Limit::new(options.download_limit),
            },
            reachable,
            standing: standing_shown,
            started: Instant::now(),
            cancel: cancel.clone(),
            tasks: tasks.clone(),
            ending,
            open_files: fetch::download::open_files(),
            running: Mutex::new(BTreeMap::new()),
            attached: watch::Sender::new(0),
            downloaded: AtomicU64::new(0),
        });
        let service = ControlServiceServer::new(ControlServer(control.clone()))
            .max_decoding_message_size(MAX_CONTROL_MESSAGE);
        let routes = Routes::new(service).prepare();
        let connection = net::pipe(routes.clone(), net::CONTROL, cancel.clone()).await?;
        let addresses = control.reachable.addresses();
        let page = operator.as_ref().map(TcpListener::local_addr).transpose()?;
        let (cancel, tasks) = (cancel.clone(), tasks.clone());
        let node = Self {
            control,
            connection,
            addresses,
            operator: page,
            cancel,
            tasks,
            lock,
        };
        let socket =
            net::bind_unix(&options.state_dir, SOCKET).context("binding the control socket")?;
        node.tasks.spawn(net::serve_unix(
            socket,
            routes,
            node.cancel.clone(),
            node.tasks.clone(),
        ));
        node.serve(listener, &membership).await?;
        operator
            .into_iter()
            .for_each(|listener| node.serve_operator(listener));
        node.announce(standing, options.listen.is_none());
        node.tasks
            .spawn(member::join::keep_renewed(membership, node.cancel.clone()));
        Ok(node)
    }

    async fn serve(&self, listener: TcpListener, membership: &Arc<Membership>) -> Result<()> {
        let chunks = ChunkServer::new(
            self.control.library.clone(),
            self.control.index.clone(),
            self.control.served.clone(),
            self.control.limits.upload.clone(),
            self.tasks.clone(),
        );
        let chunks =
            ChunkServiceServer::new(chunks).max_decoding_message_size(proto::MAX_CHUNK_MESSAGE);
        let chunks = Uncopied(chunks);
        let (health, health_service) = tonic_health::server::health_reporter();
        health
            .set_serving::<ChunkServiceServer<ChunkServer>>()
            .await;
        let routes = proto::with_reflection(
            Routes::new(chunks).add_service(health_service),
            "sprat.v1.ChunkService",
        )?;
        let routes = operator::beside(routes, self.control.clone()).prepare();
        let certificate = membership.certificate().clone();
        let tls = tls::member_server(membership.trust(), certificate.clone(), certificate)?;
        let listening = Listener {
            members: Front { tls, routes },
            joiners: None,
            limits: LIMITS,
            trust: membership.trust().clone(),
            cancel: self.cancel.clone(),
            tasks: self.tasks.clone(),
        };
        self.tasks.spawn(listening.run(listener));
        Ok(())
    }

    fn serve_operator(&self, listener: TcpListener) {
        let router = operator::router(self.control.clone());
        self.tasks.spawn(net::serve_http(
            listener,
            router,
            self.cancel.clone(),
            self.tasks.clone(),
        ));
    }

    /// Where the operator page is.
    #[must_use]
    pub const fn operator(&self) -> Option<SocketAddr> {
        self.operator
    }

    /// Announces until the end; `standing` shows how that goes.
    fn announce(&self, standing: watch::Sender<TrackerStanding>, is_short_lived: bool) {
        let (control, mut meter) = (self.control.clone(), Meter::default());
        let announcer = Announcer {
            library: control.library.clone(),
            shares: control.shares.clone(),
            tracker: control.tracker.clone(),
            membership: control.membership.clone(),
            reachable: control.reachable.clone(),
            attached: control.attached.subscribe(),
            is_short_lived,
            activity: Box::new(move || control.activity(&mut meter)),
            standing,
        };
        self.tasks.spawn(announcer.run(self.cancel.clone()));
    }

    /// The ControlService, without a socket in between.
    #[must_use]
    pub fn control(&self) -> Connection {
        self.connection.clone()
    }

    /// Who this is.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        self.control.membership.id()
    }

    /// Where it can be reached.
    #[must_use]
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// What it serves.
    #[must_use]
    pub fn served(&self) -> &Served {
        &self.control.served
    }

    /// Returns when no attached request runs.
    pub async fn drained(&self) {
        let mut attached = self.control.attached.subscribe();
        // Cannot fail: `self.control` holds the sender.
        let _ = attached.wait_for(|n| *n == 0).await;
    }

    /// Leaves the network, lets streams finish for up to ten seconds, and ends.
    pub async fn stop(self) {
        self.cancel.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(DRAIN, self.tasks.wait()).await;
        drop(self.lock);
    }

    /// As [`stop`](Self::stop), for a process that ends then: the kernel takes back what is known of 10,000 files in no time,
    /// and taking it apart takes 12 ms, of half a second.
    pub async fn stop_last(self) {
        std::mem::forget(self.control.library.clone());
        self.stop().await;
    }
}

/// Shares what was asked for and what was remembered, and the downloads folder; gives the latter's real path.
async fn open_index(path: PathBuf) -> Result<Arc<Index>> {
    let opening = spawn_blocking(move || {
        Index::open(&path).with_context(|| format!("opening {}", path.display()))
    });
    Ok(Arc::new(opening.await??))
}

fn add_shares(options: &NodeOptions, shares: &Shares, remember: &Path) -> Result<Option<PathBuf>> {
    for spec in &options.shares {
        shares
            .add(spec.clone())
            .map_err(|error| Failed::new(Exit::Usage, format!("{error:#}")))?;
    }
    let shared = |path: &Path| {
        shares
            .status()
            .iter()
            .any(|share| path.starts_with(&share.path))
    };
    // A folder that went away since it was remembered must not keep a peer from starting.
    for spec in if options.listen.is_some() {
        sharing::saved_shares::load(remember)?
    } else {
        vec![]
    } {
        if !spec.path.canonicalize().is_ok_and(|path| shared(&path))
            && let Err(error) = shares.add(spec)
        {
            tracing::warn!("{error:#}");
        }
    }
    let Some(downloads) = &options.downloads else {
        return Ok(None);
    };
    let unusable =
        |error: std::io::Error| Failed::new(Exit::NoSpace, format!("downloads folder: {error}"));
    Root::open_or_create(downloads).map_err(unusable)?;
    let downloads = downloads
        .canonicalize()
        .with_context(|| downloads.display().to_string())?;
    writable(&downloads)?;
    if options.listen.is_some() && !shared(&downloads) {
        shares.add(ShareSpec {
            name: None,
            path: downloads.clone(),
        })?;
    }
    Ok(Some(downloads))
}

fn writable(folder: &Path) -> Result<()> {
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::accessat(
        rustix::fs::CWD,
        folder,
        access,
        rustix::fs::AtFlags::EACCESS,
    )
    .map_err(|error| {
        let text = format!(
            "downloads folder {}: cannot be written ({error}); choose another --downloads",
            folder.display()
        );
        Failed::new(Exit::NoSpace, text).into()
    })
}

fn listen(address: Option<SocketAddr>) -> Result<TcpListener> {
    let address = address.unwrap_or_else(|| SocketAddr::from(([0_u16; 8], 0)));
    let spread = if address.port() == DEFAULT_PORT {
        SPREAD
    } else {
        0
    };
    net::bind(address, spread).map_err(|error| Failed::new(Exit::Failure, error.to_string()).into())
}
