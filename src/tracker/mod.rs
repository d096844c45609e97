//! A tracker: who is a member, who is here, who holds what. This file joins its parts and owns its life: make what is
//! missing, bind, serve, drain.
//!
//! Invariant: nothing listens before authority, database and certificates are checked; one process per state directory.

pub mod activity;
pub mod admin;
pub mod authority;
pub mod certificate;
pub mod dashboard;
pub mod enroll;
pub mod keep;
mod metrics;
pub mod presence;
pub mod registry;
pub mod service;
pub mod store;

use std::{
    fs::File,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

pub use self::keep::Keep;
use self::{
    activity::Activity,
    admin::Admin,
    authority::Authority,
    certificate::{IssuedCertificate, OwnCertificate},
    dashboard::{Dashboard, Parts},
    enroll::Enrollment,
    keep::Keeper,
    metrics::Figures,
    presence::PresenceKeeper,
    registry::Registry,
    service::TrackerServer,
    store::{Budget, MemoryStore, Store},
};
use crate::{
    exit::{Exit, Failed},
    identity::{CertificateFacts, base32},
    net::{self, Connection, Front, Listener, ListenerLimits},
    operator,
    proto::{
        self, admin_service_server::AdminServiceServer,
        enrollment_service_server::EnrollmentServiceServer,
        tracker_service_server::TrackerServiceServer,
    },
    safe_path,
    tls::{self, LiveCertificate},
    token::Pin,
    trust::Trust,
};

const AUTHORITY: &str = "authority";
const DATABASE: &str = "tracker.redb";
const LOCK: &str = "lock";
/// The admin socket in the state directory.
pub const SOCKET: &str = "admin.sock";
const DRAIN: Duration = Duration::from_secs(12);
const LIMITS: ListenerLimits = ListenerLimits {
    connections: 20_000,
    strangers_per_address: 128,
    per_member: 64,
    http2: net::CONTROL,
};

/// How a tracker runs.
#[derive(Clone, Debug)]
pub struct TrackerOptions {
    /// Where authority, database and lock lie.
    pub state_dir: PathBuf,
    /// What to bind.
    pub listen: SocketAddr,
    /// Where the operator page is; none: nowhere.
    pub operator: Option<SocketAddr>,
    /// "HOST:PORT" for join links; empty: the address of the interface that leads out.
    pub advertise: Vec<String>,
    /// A certificate from elsewhere.
    pub own: Option<OwnCertificate>,
    /// How long issued certificates live.
    pub leaf_life: Duration,
    /// What peers are told.
    pub heartbeat: Duration,
    /// When a silent peer is forgotten.
    pub lease: Duration,
    /// Bytes that presence and listings may take.
    pub memory_budget: u64,
    /// Files to keep fresh for others.
    pub keep: Keep,
}

/// A running tracker.
pub struct Tracker {
    address: SocketAddr,
    operator: Option<SocketAddr>,
    advertised: Vec<String>,
    fingerprint: String,
    admin: Arc<Admin>,
    figures: Arc<Figures>,
    cancel: CancellationToken,
    tasks: TaskTracker,
    _lock: File,
}

/// The certificates that a tracker shows, and the pin that goes into its tokens.
struct Shown {
    issued: Arc<LiveCertificate>,
    unnamed: Arc<LiveCertificate>,
    pin: Pin,
    renewal: IssuedCertificate,
}

impl Tracker {
    /// Makes the authority and the database; the text is the authority's fingerprint.
    ///
    /// # Errors
    /// [`Exit::Exists`] if there is one already.
    pub fn init(state_dir: &Path) -> Result<String> {
        let _lock = take(state_dir)?;
        if state_dir.join(AUTHORITY).join("ca.crt").exists() {
            let text = format!(
                "{} already holds a tracker; it is never overwritten",
                state_dir.display()
            );
            return Err(Failed::new(Exit::Exists, text).into());
        }
        let authority = Authority::create(&state_dir.join(AUTHORITY))?;
        Registry::open(&state_dir.join(DATABASE))?;
        fingerprint(&authority)
    }

    /// Makes what is missing and serves.
    ///
    /// # Errors
    /// Another process on the directory, a port in use, a damaged database, an unusable certificate.
    pub async fn start(options: TrackerOptions) -> Result<Self> {
        let state = &options.state_dir;
        let lock = take(state)?;
        net::raise_descriptor_limit();
        let authority = match Authority::load(&state.join(AUTHORITY))? {
            Some(authority) => authority,
            None => Authority::create(&state.join(AUTHORITY))?,
        };
        let registry = Arc::new(Registry::open(&state.join(DATABASE))?);
        let listener =
            net::bind(options.listen, 0).map_err(|e| Failed::new(Exit::Failure, e.to_string()))?;
        let operator = net::bind_http(options.operator, OPERATOR_PORT)?;
        let address = listener.local_addr()?;
        let advertised = advertised(&options, address, &registry).await?;
        let shown = show(&options, &advertised, &authority, &registry)?;
        let trust = Trust::new(authority.certificate().clone())?;
        trust.adopt(registry.trust_list()?);
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new(
            options.lease,
            Budget::new(options.memory_budget),
        ));
        let authority = Arc::new(authority);
        let admin = Arc::new(Admin {
            authority: authority.clone(),
            registry: registry.clone(),
            pin: shown.pin,
            address: advertised[0].clone(),
            live: Some((store.clone(), trust.clone())),
            _lock: None,
        });
        let keeper = Keeper::start(options.keep, admin.clone())?;
        let tracker = Self {
            address,
            operator: operator.as_ref().map(TcpListener::local_addr).transpose()?,
            fingerprint: fingerprint(&authority)?,
            advertised,
            admin,
            figures: Arc::new(Figures {
                registry: registry.clone(),
                store: store.clone(),
                authority: authority.clone(),
                certificate: shown.issued.clone(),
            }),
            cancel: CancellationToken::new(),
            tasks: TaskTracker::new(),
            _lock: lock,
        };
        let now = Instant::now();
        let activity = Arc::new(Activity::new(options.heartbeat, options.lease, now));
        let presence = PresenceKeeper::open(state, options.lease, now);
        let service = TrackerServer::new(
            store.clone(),
            authority.clone(),
            trust.clone(),
            activity.clone(),
            presence.clone(),
            tracker.tasks.clone(),
        );
        let enrollment = Enrollment::new(authority.clone(), registry.clone(), options.leaf_life);
        tracker
            .serve(listener, &shown, &trust, (service, enrollment))
            .await?;
        if let Err(error) = tracker.serve_admin(state) {
            tracker.stop().await;
            return Err(error);
        }
        tracker.tasks.spawn(keeper.run(tracker.cancel.clone()));
        if let Some(operator) = operator {
            let dashboard = tracker.dashboard(
                &shown,
                &authority,
                (store.clone(), registry, activity.clone()),
            )?;
            tracker.serve_operator(operator, dashboard);
        }
        tracker
            .tasks
            .spawn(presence.run(store.clone(), trust, tracker.cancel.clone()));
        tracker
            .tasks
            .spawn(service::sweep(store, activity, tracker.cancel.clone()));
        tracker
            .tasks
            .spawn(renew(shown, authority, tracker.cancel.clone()));
        Ok(tracker)
    }

    async fn serve(
        &self,
        listener: TcpListener,
        shown: &Shown,
        trust: &Arc<Trust>,
        (service, enrollment): (TrackerServer, Enrollment),
    ) -> Result<()> {
        let service = TrackerServiceServer::new(service)
            .max_decoding_message_size(proto::MAX_TRACKER_MESSAGE);
        let (health, health_service) = tonic_health::server::health_reporter();
        health
            .set_serving::<TrackerServiceServer<TrackerServer>>()
            .await;
        let members = proto::with_reflection(
            Routes::new(service).add_service(health_service),
            "sprat.v1.TrackerService",
        )?;
        let members = operator::beside(members, self.figures.clone());
        let enrollment = EnrollmentServiceServer::new(enrollment)
            .max_decoding_message_size(proto::MAX_JOIN_MESSAGE);
        let listening = Listener {
            members: Front {
                tls: tls::member_server(trust, shown.issued.clone(), shown.unnamed.clone())?,
                routes: members.prepare(),
            },
            joiners: Some(Front {
                tls: tls::join_server(shown.unnamed.clone())?,
                routes: Routes::new(enrollment).prepare(),
            }),
            limits: LIMITS,
            trust: trust.clone(),
            cancel: self.cancel.clone(),
            tasks: self.tasks.clone(),
        };
        self.tasks.spawn(listening.run(listener));
        Ok(())
    }

    fn serve_admin(&self, state: &Path) -> Result<()> {
        let socket = net::bind_unix(state, SOCKET)
            .with_context(|| format!("binding {}", state.join(SOCKET).display()))?;
        let routes = Routes::new(AdminServiceServer::from_arc(self.admin.clone())).prepare();
        self.tasks.spawn(net::serve_unix(
            socket,
            routes,
            self.cancel.clone(),
            self.tasks.clone(),
        ));
        Ok(())
    }

    fn dashboard(
        &self,
        shown: &Shown,
        authority: &Authority,
        (store, registry, activity): (Arc<dyn Store>, Arc<Registry>, Arc<Activity>),
    ) -> Result<Arc<Dashboard>> {
        Ok(Dashboard::new(Parts {
            store,
            registry,
            activity,
            issued: shown.issued.clone(),
            unnamed: shown.unnamed.clone(),
            authority_until: CertificateFacts::read(authority.certificate())?.not_after,
            advertised: self.advertised.clone(),
            fingerprint: self.fingerprint.clone(),
        }))
    }

    /// The operator port: every page of a tracker is merged here.
    fn serve_operator(&self, listener: TcpListener, dashboard: Arc<Dashboard>) {
        let router = operator::router(self.figures.clone()).merge(dashboard.clone().router());
        self.tasks.spawn(dashboard.run(self.cancel.clone()));
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

    /// The bound address.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where joiners are told to go, the first being the one in join links.
    #[must_use]
    pub fn advertised(&self) -> &[String] {
        &self.advertised
    }

    /// SHA-256 of the authority's key.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Makes a token; the text is its link.
    ///
    /// # Errors
    /// If the database fails.
    pub fn join_link(&self, uses: u32, ttl: Duration) -> Result<String> {
        self.admin
            .create_token(uses, ttl)
            .map(|token| token.to_string())
    }

    /// Stops accepting, lets calls finish for up to ten seconds, and ends.
    pub async fn stop(self) {
        self.cancel.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(DRAIN, self.tasks.wait()).await;
    }
}

/// A connection to the AdminService of the tracker in `state_dir`: the running one's, or one on its store alone.
///
/// # Errors
/// [`Exit::NotFound`] if there is no tracker there.
pub async fn attach(state_dir: &Path) -> Result<Connection> {
    let absent = || {
        let text = format!(
            "no tracker in {}; run `sprat tracker init` there, or name it with --state-dir",
            state_dir.display()
        );
        Failed::new(Exit::NotFound, text)
    };
    let certificate = state_dir.join(AUTHORITY).join("ca.crt");
    let named = |e: io::Error| {
        Failed::state_dir(&io::Error::new(
            e.kind(),
            format!("{}: {e}", certificate.display()),
        ))
    };
    if !certificate.try_exists().map_err(named)? {
        return Err(absent().into());
    }
    let Some(lock) = safe_path::lock(&state_dir.join(LOCK))? else {
        return net::dial_unix(state_dir, SOCKET, net::CONTROL)
            .await
            .with_context(|| {
                format!(
                    "a tracker runs in {}, but its admin socket does not answer",
                    state_dir.display()
                )
            });
    };
    let authority = Authority::load(&state_dir.join(AUTHORITY))?.ok_or_else(absent)?;
    let registry = Arc::new(Registry::open(&state_dir.join(DATABASE))?);
    let address = registry.advertised()?.into_iter().next();
    let address = match address {
        Some(address) => address,
        None => SocketAddr::new(net::default_address().await, DEFAULT_PORT).to_string(),
    };
    let pin = match registry.own_pin()? {
        Some(pin) => Pin::Tracker(pin),
        None => Pin::Authority(CertificateFacts::read(authority.certificate())?.pin()),
    };
    let admin = Admin {
        authority: Arc::new(authority),
        registry,
        pin,
        address,
        live: None,
        _lock: Some(lock),
    };
    let cancel = CancellationToken::new();
    let routes = Routes::new(AdminServiceServer::new(admin)).prepare();
    let connection = net::pipe(routes, net::CONTROL, cancel).await?;
    Ok(connection)
}

/// The tracker's port unless told otherwise.
pub const DEFAULT_PORT: u16 = 7700;
/// The operator page's port unless told otherwise; the next ones are tried if it is taken.
const OPERATOR_PORT: u16 = 7790;

/// Makes the state directory if need be, and takes its lock.
fn take(state_dir: &Path) -> Result<File> {
    let lock =
        safe_path::private_dir(state_dir).and_then(|()| safe_path::lock(&state_dir.join(LOCK)));
    lock.map_err(|error| Failed::state_dir(&error))?
        .ok_or_else(|| {
            let text = format!("another tracker already runs in {}", state_dir.display());
            Failed::new(Exit::Failure, text).into()
        })
}

fn fingerprint(authority: &Authority) -> Result<String> {
    Ok(base32(
        &CertificateFacts::read(authority.certificate())?.pin(),
    ))
}

async fn advertised(
    options: &TrackerOptions,
    bound: SocketAddr,
    registry: &Registry,
) -> Result<Vec<String>> {
    let advertised = if !options.advertise.is_empty() {
        options.advertise.clone()
    } else if bound.ip().is_unspecified() {
        vec![SocketAddr::new(net::default_address().await, bound.port()).to_string()]
    } else {
        vec![bound.to_string()]
    };
    registry.set_advertised(&advertised)?;
    Ok(advertised)
}

fn show(
    options: &TrackerOptions,
    advertised: &[String],
    authority: &Authority,
    registry: &Registry,
) -> Result<Shown> {
    let renewal = IssuedCertificate::open(
        &options.state_dir.join("identity"),
        advertised,
        options.leaf_life,
    )?;
    let (chain, key) = renewal.issue(authority)?;
    let issued = LiveCertificate::new(chain, key)?;
    let own = options.own.as_ref().map(OwnCertificate::load).transpose()?;
    registry.set_own_pin(own.as_ref().map(|(_, pin)| *pin))?;
    Ok(match own {
        Some((unnamed, pin)) => {
            registry.add_pin(pin)?;
            Shown {
                issued,
                unnamed,
                pin: Pin::Tracker(pin),
                renewal,
            }
        }
        None => {
            let pin = Pin::Authority(CertificateFacts::read(authority.certificate())?.pin());
            Shown {
                unnamed: issued.clone(),
                issued,
                pin,
                renewal,
            }
        }
    })
}

async fn renew(shown: Shown, authority: Arc<Authority>, cancel: CancellationToken) {
    while cancel
        .run_until_cancelled(tokio::time::sleep(shown.renewal.renew_after()))
        .await
        .is_some()
    {
        let renewed = shown
            .renewal
            .issue(&authority)
            .and_then(|(chain, key)| Ok(shown.issued.replace(chain, key)?));
        match renewed {
            Ok(()) => tracing::info!("the tracker's certificate was renewed"),
            Err(error) => tracing::error!("renewing the tracker's certificate: {error:#}"),
        }
    }
}
