//! TrackerService: parse, authorise, one store verb, reply.
//!
//! Invariant: a call acts for the identity in the caller's certificate; an id in a message is only ever compared with
//! it. Peers announce; peers and operators read.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::Stream;
use tokio::{
    sync::{Semaphore, broadcast, mpsc},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use super::{
    activity::{Activity, ActivityReport},
    authority::Authority,
    presence::{PresenceKeeper, PresenceStanding},
    store::{Heartbeat, Registered, Registration, SWEEP_INTERVAL, Store, StoreError},
};
use crate::{
    catalog::{Announcement, Change, FileKey, Matcher, Query},
    content::ContentId,
    identity::{PeerId, Role},
    metrics::LEASES_EXPIRED,
    net::Caller,
    proto::{
        self, Completeness, HeartbeatRequest, HeartbeatResponse, ListFilesRequest,
        ListFilesResponse, RegisterHeader, RegisterRequest, RegisterResponse, SignedTrustList,
        WatchFilesRequest, WatchFilesResponse, heartbeat_response, register_request::Part,
        watch_files_response::Change as Told,
    },
    request::carried,
    trust::Trust,
};

/// Rows in a page when the caller names no number, and at most.
const PAGE: (u32, u32) = (500, 4000);
/// A Register stream that says nothing for this long is given up.
const IDLE: Duration = Duration::from_secs(30);
/// WatchFiles streams at once, in all.
const WATCHERS: usize = 4096;
/// Listings computed at once.
const LISTINGS: usize = 16;
const MAX_WATCHED: usize = 1024;
/// Changes queued for one watcher.
const WATCH_QUEUE: usize = 256;

/// The tracker's answers.
pub struct TrackerServer {
    store: Arc<dyn Store>,
    authority: Arc<Authority>,
    trust: Arc<Trust>,
    activity: Arc<Activity>,
    presence: Arc<PresenceKeeper>,
    watchers: Arc<Semaphore>,
    listings: Semaphore,
    tasks: TaskTracker,
}

impl TrackerServer {
    /// Answers from `store`; what peers move, and the intervals that they are told, are in `activity`, and how whole
    /// the listing is in `presence`; streams run in `tasks`.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        authority: Arc<Authority>,
        trust: Arc<Trust>,
        activity: Arc<Activity>,
        presence: Arc<PresenceKeeper>,
        tasks: TaskTracker,
    ) -> Self {
        let watchers = Arc::new(Semaphore::new(WATCHERS));
        Self {
            store,
            authority,
            trust,
            activity,
            presence,
            watchers,
            listings: Semaphore::new(LISTINGS),
            tasks,
        }
    }

    fn trust_list_after(&self, epoch: u64) -> Result<Option<SignedTrustList>, Status> {
        let list = self.trust.list();
        if list.epoch <= epoch {
            return Ok(None);
        }
        self.authority
            .sign(&list)
            .map(Some)
            .map_err(|e| Status::internal(e.to_string()))
    }

    fn announcement(
        &self,
        peer: PeerId,
        header: &RegisterHeader,
        caller: &Caller,
    ) -> Result<Announcement, Status> {
        own_id(&header.peer_id, peer)?;
        if header.generation == 0 || header.generation <= header.base_generation {
            return Err(Status::invalid_argument(
                "generation must be above 0 and above base_generation",
            ));
        }
        if header.addresses.len() > proto::MAX_ADDRESSES {
            return Err(proto::WireError::TooMany(proto::MAX_ADDRESSES, "addresses").into());
        }
        let port = u16::try_from(header.port)
            .map_err(|_| Status::invalid_argument("port is above 65,535"))?;
        let announcement = proto::announcement(peer, &header.addresses, port, caller);
        Ok(Announcement {
            generation: header.generation,
            ..announcement
        })
    }

    async fn collect(
        &self,
        mut stream: Streaming<RegisterRequest>,
        peer: PeerId,
        caller: &Caller,
    ) -> Result<(Registration, PresenceStanding), Status> {
        let Some(Part::Header(header)) = next(&mut stream).await?.and_then(|message| message.part)
        else {
            return Err(Status::invalid_argument(
                "the first message must be the header",
            ));
        };
        let announcement = self.announcement(peer, &header, caller)?;
        let standing = PresenceStanding {
            is_scanning: header.is_scanning,
            is_short_lived: header.is_short_lived,
        };
        let base = (header.base_generation != 0).then_some(header.base_generation);
        let mut registration = Registration::new(announcement, base, self.store.budget());
        while let Some(message) = next(&mut stream).await? {
            let Some(Part::Batch(batch)) = message.part else {
                return Err(Status::invalid_argument(
                    "after the header only batches may come",
                ));
            };
            for key in batch.removed {
                registration
                    .remove(FileKey::try_from(key)?)
                    .map_err(exhausted)?;
            }
            for entry in batch.added {
                registration.add(entry.try_into()?).map_err(exhausted)?;
            }
        }
        Ok((registration, standing))
    }
}

async fn next(stream: &mut Streaming<RegisterRequest>) -> Result<Option<RegisterRequest>, Status> {
    timeout(IDLE, stream.message())
        .await
        .map_err(|_| Status::deadline_exceeded("nothing came for 30 s"))?
}

/// The caller's id, if its certificate has one of these roles.
fn require(caller: &Caller, roles: &[Role]) -> Result<PeerId, Status> {
    match caller.subject {
        Some(subject) if roles.contains(&subject.role) => Ok(subject.id),
        Some(subject) => {
            tracing::warn!(id = %subject.id, role = subject.role.label(), "call refused: wrong role");
            Err(Status::permission_denied(format!(
                "this is not for {} certificates",
                subject.role.label()
            )))
        }
        None => Err(Status::unauthenticated(
            "a client certificate of this network is required",
        )),
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    request
        .extensions()
        .get::<Caller>()
        .cloned()
        .ok_or_else(|| Status::internal("a request without a caller"))
}

fn own_id(claimed: &str, peer: PeerId) -> Result<(), Status> {
    if claimed.is_empty() || proto::peer_id(claimed)? == peer {
        return Ok(());
    }
    tracing::warn!(%peer, "call refused: it names somebody else");
    Err(Status::permission_denied("peer_id is not the caller's own"))
}

fn exhausted(error: StoreError) -> Status {
    match error {
        StoreError::Exhausted { .. } => Status::resource_exhausted(error.to_string()),
        StoreError::Unavailable { .. } => {
            tracing::error!("{error}");
            Status::unavailable(error.to_string())
        }
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Forgets peers whose lease is over, until cancelled.
pub(super) async fn sweep(
    store: Arc<dyn Store>,
    activity: Arc<Activity>,
    cancel: CancellationToken,
) {
    let mut ticks = interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while cancel.run_until_cancelled(ticks.tick()).await.is_some() {
        activity.expire(Instant::now());
        match store.sweep(Instant::now()).await {
            Ok(gone) => gone.iter().for_each(|peer| {
                LEASES_EXPIRED.one();
                tracing::info!(%peer, "lease expired");
            }),
            Err(error) => tracing::error!("{error}"),
        }
    }
}

#[tonic::async_trait]
impl proto::tracker_service_server::TrackerService for TrackerServer {
    async fn register(
        &self,
        request: Request<Streaming<RegisterRequest>>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let caller = caller(&request)?;
        let peer = require(&caller, &[Role::Peer])?;
        let (registration, standing) = self.collect(request.into_inner(), peer, &caller).await?;
        let arrival = self.presence.arrive(peer, standing).await;
        match self
            .store
            .register(registration, Instant::now())
            .await
            .map_err(exhausted)?
        {
            Registered::Accepted => {
                arrival.accepted();
                self.activity.heard(peer, None, Instant::now());
                let (heartbeat, lease) = self.activity.intervals();
                Ok(Response::new(RegisterResponse {
                    heartbeat_interval_ms: millis(heartbeat),
                    lease_ms: millis(lease),
                    trust_list: self.trust_list_after(0)?,
                }))
            }
            Registered::Stale => Err(Status::failed_precondition(
                "base_generation is not held here: send the full library",
            )),
        }
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        let peer = require(&caller(&request)?, &[Role::Peer])?;
        let request = request.into_inner();
        own_id(&request.peer_id, peer)?;
        let report = request.activity.map(ActivityReport::try_from).transpose()?;
        let state = if request.leaving {
            self.presence.left(peer);
            if self
                .store
                .leave(peer, request.generation)
                .await
                .map_err(exhausted)?
            {
                self.activity.left(peer);
            }
            heartbeat_response::State::Left
        } else {
            let met = self
                .store
                .heartbeat(peer, request.generation, Instant::now())
                .await
                .map_err(exhausted)?;
            if met != Heartbeat::Unknown {
                self.activity.heard(peer, report, Instant::now());
            }
            match met {
                Heartbeat::Renewed => heartbeat_response::State::Renewed,
                Heartbeat::Stale => heartbeat_response::State::Stale,
                Heartbeat::Unknown => heartbeat_response::State::Unknown,
            }
        };
        let (heartbeat, lease) = self.activity.intervals();
        Ok(Response::new(HeartbeatResponse {
            state: state.into(),
            heartbeat_interval_ms: millis(heartbeat),
            busy_interval_ms: millis(self.activity.busy_interval()),
            lease_ms: millis(lease),
            trust_list: self.trust_list_after(request.trust_epoch)?,
        }))
    }

    async fn list_files(
        &self,
        request: Request<ListFilesRequest>,
    ) -> Result<Response<ListFilesResponse>, Status> {
        let caller = caller(&request)?;
        require(&caller, &[Role::Peer, Role::Operator])?;
        let request = request.into_inner();
        let matcher: Matcher = Query::try_from(&request)?
            .compile()
            .map_err(proto::WireError::from)?;
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(FileKey::from_page_token(token).ok_or(proto::WireError::PageToken)?),
        };
        let limit = if request.page_size == 0 {
            PAGE.0
        } else {
            request.page_size.min(PAGE.1)
        };
        let _turn = self
            .listings
            .acquire()
            .await
            .map_err(|e| Status::internal(e.to_string()))?;
        let completeness = self.presence.completeness();
        let page = self
            .store
            .list(
                &matcher,
                after.as_ref(),
                limit as usize,
                caller.is_loopback(),
            )
            .await;
        let page = page.map_err(exhausted)?;
        Ok(Response::new(ListFilesResponse {
            files: page.rows.into_iter().map(Into::into).collect(),
            next_page_token: page.next.map(|key| key.page_token()).unwrap_or_default(),
            completeness: Some(completeness),
        }))
    }

    type WatchFilesStream = Pin<Box<dyn Stream<Item = Result<WatchFilesResponse, Status>> + Send>>;

    async fn watch_files(
        &self,
        request: Request<WatchFilesRequest>,
    ) -> Result<Response<Self::WatchFilesStream>, Status> {
        let caller = caller(&request)?;
        require(&caller, &[Role::Peer, Role::Operator])?;
        let request = request.into_inner();
        if request.content_ids.len() > MAX_WATCHED {
            return Err(proto::WireError::TooMany(MAX_WATCHED, "contents").into());
        }
        let contents = request
            .content_ids
            .iter()
            .map(|id| proto::content_id(id))
            .collect::<Result<Vec<_>, _>>()?;
        let place = self.watchers.clone().try_acquire_owned();
        let place = place.map_err(|_| Status::resource_exhausted("too many watchers"))?;
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        let watch = Watch {
            store: self.store.clone(),
            changes: self.store.watch(),
            presence: self.presence.clone(),
            contents,
            loopback: caller.is_loopback(),
            sender,
        };
        self.tasks.spawn(carried(async move {
            let _place = place;
            // The stream ends when the receiver has gone; there is nobody left to tell why.
            if let Err(status) = watch.run(request.skip_current).await {
                tracing::debug!("watch ended: {status}");
            }
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// One WatchFiles stream.
struct Watch {
    store: Arc<dyn Store>,
    changes: broadcast::Receiver<Change>,
    presence: Arc<PresenceKeeper>,
    contents: Vec<ContentId>,
    loopback: bool,
    sender: mpsc::Sender<Result<WatchFilesResponse, Status>>,
}

impl Watch {
    async fn run(mut self, skip_current: bool) -> Result<(), Status> {
        let mut whole = pin!(self.presence.whole());
        let completeness = self.presence.completeness();
        if !skip_current {
            self.current().await?;
        }
        self.send(Some(Told::Current(true)), Some(completeness))
            .await?;
        let mut waits = !completeness.is_whole;
        loop {
            let change = tokio::select! {
                // What made the listing whole is told before it is called so.
                biased;
                change = self.changes.recv() => change,
                () = whole.as_mut(), if waits => {
                    waits = false;
                    self.send(None, Some(self.presence.completeness())).await?;
                    continue;
                }
                () = self.sender.closed() => return Ok(()),
            };
            match change {
                Ok(Change::Changed(key)) if self.wants(&key) => {
                    let rows = self
                        .store
                        .rows_at(std::slice::from_ref(&key), self.loopback)
                        .await
                        .map_err(exhausted)?;
                    match rows.into_iter().next() {
                        Some(row) => self.tell(Told::Changed(row.into())).await?,
                        None => self.tell(Told::Removed((&key).into())).await?,
                    }
                }
                Ok(Change::Removed(key)) if self.wants(&key) => {
                    self.tell(Told::Removed((&key).into())).await?
                }
                Ok(Change::Changed(_) | Change::Removed(_)) => {}
                Ok(Change::Resync) | Err(broadcast::error::RecvError::Lagged(_)) => {
                    self.tell(Told::Resync(true)).await?;
                }
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            }
        }
    }

    fn wants(&self, key: &FileKey) -> bool {
        self.contents.is_empty() || self.contents.contains(&key.content_id)
    }

    async fn current(&self) -> Result<(), Status> {
        if !self.contents.is_empty() {
            for row in self
                .store
                .rows_of(&self.contents, self.loopback)
                .await
                .map_err(exhausted)?
            {
                self.tell(Told::Changed(row.into())).await?;
            }
            return Ok(());
        }
        let all = Query::default().compile().map_err(proto::WireError::from)?;
        let mut after: Option<FileKey> = None;
        loop {
            let page = self
                .store
                .list(&all, after.as_ref(), PAGE.1 as usize, self.loopback)
                .await
                .map_err(exhausted)?;
            for row in page.rows {
                self.tell(Told::Changed(row.into())).await?;
            }
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(()),
            }
        }
    }

    async fn tell(&self, change: Told) -> Result<(), Status> {
        self.send(Some(change), None).await
    }

    async fn send(
        &self,
        change: Option<Told>,
        completeness: Option<Completeness>,
    ) -> Result<(), Status> {
        let message = WatchFilesResponse {
            change,
            completeness,
        };
        self.sender
            .send(Ok(message))
            .await
            .map_err(|_| Status::cancelled("the watcher has gone"))
    }
}
