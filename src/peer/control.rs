//! ControlService: what the menu and the command line ask of this peer, over its Unix socket or a pipe.
//!
//! Invariant: a Get lives as long as the stream of whoever asked for it; paths are absolute; an answer names the folder
//! or file that was the trouble.

pub mod instance;
pub mod wire;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures_util::Stream;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::interval,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use tonic::{Request, Response, Status};

use self::wire::{Meter, Speed};
use super::{
    limit::{Limit, Limits as Bandwidth, Rates},
    serve::Served,
};
use crate::peer::{
    fetch::{
        destination::{Disk, Existing, Want},
        download::Get,
        pace::Fixed,
        progress::Progress,
        swarm::Here,
    },
    member::{
        announce::Reachable, membership::Membership, standing::TrackerStanding,
        tracker_client::TrackerClient,
    },
    sharing::{
        index::Index,
        library::Library,
        shares::{ShareSpec, Shares},
    },
};
use crate::{
    catalog::SourceInfo,
    exit::{Exit, Failed},
    metrics,
    proto::*,
    request::carried,
    safe_path::{Root, SafeName},
    telemetry,
    units::RATES,
};

/// Events that wait for whoever asked: many small files end at once.
const QUEUE: usize = 1024;
/// How long a Get waits for something useful unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two progress events.
const PROGRESS: Duration = Duration::from_millis(100);
/// How long a first scan may take before a Share is answered without its counts.
const SCAN: Duration = Duration::from_secs(10);

/// The parts of a Node that control speaks for.
pub struct Control {
    /// Who we are.
    pub membership: Arc<Membership>,
    /// The network's tracker.
    pub tracker: Arc<TrackerClient>,
    /// What we serve.
    pub library: Library,
    /// What was hashed.
    pub index: Arc<Index>,
    /// The folders.
    pub shares: Arc<Shares>,
    /// Where shares are remembered.
    pub remember: PathBuf,
    /// Where downloads land unless told otherwise.
    pub downloads: Option<PathBuf>,
    /// What was served.
    pub served: Arc<Served>,
    /// What may be sent and fetched a second.
    pub limits: Bandwidth,
    /// Where we listen.
    pub reachable: Reachable,
    /// How we stand with the tracker.
    pub standing: watch::Receiver<TrackerStanding>,
    /// When the Node began.
    pub started: Instant,
    /// Ends everything.
    pub cancel: CancellationToken,
    /// What has to end before the Node does.
    pub tasks: TaskTracker,
    /// Closed; holds what winds up a Get that was dropped.
    pub ending: TaskTracker,
    /// Permits for files that Gets have open.
    pub open_files: Arc<Semaphore>,
    /// Gets under way, by number.
    pub running: Mutex<BTreeMap<u64, Arc<Progress>>>,
    /// How many requests are attached.
    pub attached: watch::Sender<usize>,
    /// Bytes that came over the network.
    pub downloaded: AtomicU64,
}

/// A request that keeps a short-lived Node alive.
struct Attached {
    control: Arc<Control>,
    id: u64,
    progress: Arc<Progress>,
    /// None while it runs, and if it is dropped half-way.
    went_well: Option<bool>,
}

impl Attached {
    fn begin(control: &Arc<Control>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let (id, progress) = (
            NEXT.fetch_add(1, Ordering::Relaxed),
            Arc::new(Progress::default()),
        );
        control
            .running
            .lock()
            .expect("no panic while the lock is held")
            .insert(id, progress.clone());
        control.attached.send_modify(|n| *n += 1);
        Self {
            control: control.clone(),
            id,
            progress,
            went_well: None,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        {
            // Under the lock, so that what it fetched is counted in one of both, and never in none or both.
            let mut running = self
                .control
                .running
                .lock()
                .expect("no panic while the lock is held");
            running.remove(&self.id);
            self.control
                .downloaded
                .fetch_add(wire::fetched(&self.progress), Ordering::Relaxed);
        }
        let ended = match self.went_well {
            Some(true) => &metrics::TRANSFERS_DONE,
            Some(false) => &metrics::TRANSFERS_FAILED,
            None => &metrics::TRANSFERS_STOPPED,
        };
        ended.one();
        self.control.attached.send_modify(|n| *n -= 1);
    }
}

/// The service; a newtype, because a Get outlives the call that began it.
pub struct ControlServer(pub Arc<Control>);

impl Control {
    /// Where a Get writes, and under which name if the caller named a file.
    fn output(&self, output: &str) -> Result<(PathBuf, Option<SafeName>)> {
        if output.is_empty() {
            let none = || {
                Failed::new(
                    Exit::Usage,
                    "no downloads folder: start the peer with --downloads DIR, or name a target with -o",
                )
            };
            return Ok((self.downloads.clone().ok_or_else(none)?, None));
        }
        let path = Path::new(output);
        anyhow::ensure!(
            path.is_absolute(),
            Failed::new(Exit::Usage, format!("{output} is not an absolute path"))
        );
        if output.ends_with('/') {
            return Ok((path.to_owned(), None));
        }
        let (Some(parent), Some(file)) = (path.parent(), path.file_name()) else {
            return Err(
                Failed::new(Exit::Usage, format!("{output} is not the name of a file")).into(),
            );
        };
        let name = SafeName::from_path(Path::new(file));
        let name = name.map_err(|e| {
            Failed::new(
                Exit::Usage,
                format!("{output} cannot be the name of a download: {e}"),
            )
        })?;
        Ok((parent.to_owned(), Some(name)))
    }

    fn open_root(&self, folder: &Path) -> Result<Root> {
        let unusable = |error: std::io::Error| {
            let hint = match &self.downloads {
                Some(downloads) => {
                    format!(
                        "choose another -o, or the running peer's downloads folder {}",
                        downloads.display()
                    )
                }
                None => "choose another -o".into(),
            };
            Failed::new(Exit::NoSpace, format!("cannot write to {error}; {hint}"))
        };
        Root::open_or_create(folder).map_err(unusable)?;
        let folder = folder
            .canonicalize()
            .with_context(|| folder.display().to_string())?;
        Ok(Root::open(&folder).map_err(unusable)?)
    }

    fn plan(&self, request: &GetRequest) -> Result<Get> {
        let (folder, file) = self.output(&request.output)?;
        let root = self.open_root(&folder)?;
        let wants = request.wanted.iter().map(|wanted| {
            let name = name(&wanted.name)?;
            let target = file.clone().unwrap_or_else(|| name.clone());
            Ok(Want {
                target,
                name,
                size: wanted.size,
                id: content_id(&wanted.content_id)?,
            })
        });
        let wants = wants.collect::<Result<Vec<_>>>()?;
        let holders = Self::holders(request)?;
        if file.is_some() && wants.len() != 1 {
            return Err(
                Failed::new(Exit::Usage, "several files need a folder: end -o with /").into(),
            );
        }
        let disk = Disk {
            root,
            index: self.index.clone(),
            library: self.library.clone(),
            shares: self.shares.clone(),
            cancel: self.cancel.child_token(),
        };
        let existing = match request.existing() {
            get_request::Existing::Rename => Existing::Rename,
            get_request::Existing::Skip => Existing::Skip,
            get_request::Existing::Overwrite => Existing::Overwrite,
            get_request::Existing::Unspecified | get_request::Existing::Refuse => Existing::Refuse,
        };
        let here = Here {
            addresses: self.reachable.addresses(),
            port: self.reachable.bound.port(),
        };
        let (membership, tracker) = (self.membership.clone(), self.tracker.clone());
        let (limit, tasks, ending) = (
            self.limits.download.clone(),
            self.tasks.clone(),
            self.ending.clone(),
        );
        let fixed = Fixed::default();
        let patience = match (request.no_timeout, request.timeout_seconds) {
            (true, _) => None,
            (_, 0) => Some(PATIENCE),
            (_, seconds) => Some(Duration::from_secs(seconds.into())),
        };
        Ok(Get {
            membership,
            tracker,
            here,
            limit,
            fixed,
            disk,
            wants,
            holders,
            existing,
            patience,
            open_files: self.open_files.clone(),
            tasks,
            ending,
        })
    }

    /// Who holds what, as the caller says: each holder with positions of what is wanted.
    fn holders(request: &GetRequest) -> Result<Vec<(SourceInfo, Vec<usize>)>> {
        let sources = request.sources.iter().cloned();
        let sources = sources.map(|source| Ok((SourceInfo::try_from(source)?, vec![])));
        let mut holders = sources.collect::<Result<Vec<_>>>()?;
        for (want, wanted) in request.wanted.iter().enumerate() {
            for at in &wanted.sources {
                if let Some((_, wants)) = holders.get_mut(*at as usize) {
                    wants.push(want);
                }
            }
        }
        Ok(holders)
    }

    /// Gets under way, and the bytes that came over the network so far.
    fn received(&self) -> (BTreeMap<u64, Arc<Progress>>, u64) {
        let running = self
            .running
            .lock()
            .expect("no panic while the lock is held");
        let in_flight: u64 = running
            .values()
            .map(|progress| wire::fetched(progress))
            .sum();
        (
            running.clone(),
            self.downloaded.load(Ordering::Relaxed) + in_flight,
        )
    }

    /// What moves now, for the tracker; and whether anything does.
    pub fn activity(&self, meter: &mut Meter) -> (Activity, bool) {
        let (running, received) = self.received();
        let activity = meter.activity(
            &running,
            self.served.bytes.load(Ordering::Relaxed),
            received,
        );
        let is_busy = !running.is_empty()
            || activity.send_rate > 0
            || self.served.streams.load(Ordering::Relaxed) > 0;
        (activity, is_busy)
    }

    /// Everything that `status` shows.
    fn status(&self) -> StatusResponse {
        let (files, bytes) = self.library.totals();
        let to_do = self.shares.progress();
        let (running, bytes_downloaded) = self.received();
        let standing = self.standing.borrow().clone();
        StatusResponse {
            peer_id: self.membership.id().to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            addresses: self.reachable.addresses(),
            tracker: self.tracker.address(),
            tracker_state: standing.state.into(),
            tracker_error: standing.error,
            shares: self.shares.status().iter().map(wire::share).collect(),
            downloads: self
                .downloads
                .as_ref()
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
            files,
            bytes,
            files_to_hash: to_do.files_to_hash,
            bytes_to_hash: to_do.bytes_to_hash,
            files_skipped: to_do.skipped.total(),
            bytes_uploaded: self.served.bytes.load(Ordering::Relaxed),
            bytes_downloaded,
            downloads_running: running
                .iter()
                .map(|(id, running)| DownloadStatus {
                    id: *id,
                    progress: Some(wire::running(running, running.rate.load(Ordering::Relaxed))),
                })
                .collect(),
            certificate_seconds_left: self.membership.seconds_left(),
            uptime_seconds: self.started.elapsed().as_secs(),
            uploads_running: self.served.streams.load(Ordering::Relaxed),
            limits: Some(wire::limits(&self.limits)),
        }
    }
}

/// Changes the limit of one direction where something is said.
fn change(limit: &Limit, total: Option<u64>, per_peer: Option<u64>) {
    let said = |now: Option<u64>, said: Option<u64>| {
        said.map_or(now, |rate| Some(rate).filter(|rate| *rate > 0))
    };
    let now = limit.rates();
    limit.set(Rates {
        total: said(now.total, total),
        per_peer: said(now.per_peer, per_peer),
    });
}

/// Runs one Get and tells its story to `events`.
async fn tell(
    mut attached: Attached,
    request: GetRequest,
    events: mpsc::Sender<Result<GetEvent, Status>>,
) {
    let began = Instant::now();
    let progress = attached.progress.clone();
    let send = |event: get_event::Event| events.send(Ok(GetEvent { event: Some(event) }));
    let control = attached.control.clone();
    let planned = tokio::task::spawn_blocking(move || control.plan(&request)).await;
    let outcome = async {
        let get = planned??;
        let bytes_total = get.wants.iter().map(|want| want.size).sum();
        let started = Started { bytes_total, files_total: get.wants.len() as u64 };
        let _ = send(get_event::Event::Started(started)).await;
        let (happenings, mut happened) = mpsc::channel(QUEUE);
        // A task of its own, so that a slow reader of its story holds up nothing else.
        let run = carried(get.run(progress.clone(), happenings));
        let mut run = AbortOnDropHandle::new(tokio::spawn(run));
        let mut ticks = interval(PROGRESS);
        let (mut speed, mut heard) = (Speed::default(), vec![]);
        let outcome = loop {
            tokio::select! {
                outcome = &mut run => break outcome?,
                // All that there are, for each turn of this loop asks the whole Get how it is.
                1.. = happened.recv_many(&mut heard, QUEUE) => {
                    for happening in heard.drain(..) {
                        let _ = send(wire::event(happening)).await;
                    }
                }
                _ = ticks.tick() => drop(send(get_event::Event::Progress(wire::progress(&progress, &mut speed))).await),
                () = events.closed() => return Ok(()),
            }
        };
        while let Ok(happening) = happened.try_recv() {
            let _ = send(wire::event(happening)).await;
        }
        outcome
    }
    .await;
    let summary = wire::summary(&progress, began.elapsed());
    attached.went_well = (!events.is_closed()).then_some(outcome.is_ok());
    let last = match outcome {
        Ok(()) => get_event::Event::Done(summary),
        Err(error) => get_event::Event::Failed(wire::failure(&error, summary)),
    };
    // Detached before the last word, so that a Node that waits for its requests may end when it is heard.
    drop(attached);
    let _ = send(last).await;
}

#[tonic::async_trait]
impl control_service_server::ControlService for ControlServer {
    type GetStream = Pin<Box<dyn Stream<Item = Result<GetEvent, Status>> + Send>>;

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (attached, cancel) = (Attached::begin(&self.0), self.0.cancel.clone());
        let telling = async move {
            cancel
                .run_until_cancelled(tell(attached, request.into_inner(), sender))
                .await
        };
        self.0.tasks.spawn(carried(telling));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.0.status()))
    }

    async fn limit(
        &self,
        request: Request<LimitRequest>,
    ) -> Result<Response<LimitResponse>, Status> {
        let wanted = request.into_inner();
        let rates = [
            wanted.upload,
            wanted.download,
            wanted.upload_per_peer,
            wanted.download_per_peer,
        ];
        if let Some(rate) = rates
            .iter()
            .flatten()
            .find(|rate| **rate != 0 && !RATES.contains(rate))
        {
            let text = format!(
                "{rate} is no limit: from {} to {} bytes a second, or 0",
                RATES.start(),
                RATES.end()
            );
            return Err(Status::invalid_argument(text));
        }
        change(&self.0.limits.upload, wanted.upload, wanted.upload_per_peer);
        change(
            &self.0.limits.download,
            wanted.download,
            wanted.download_per_peer,
        );
        Ok(Response::new(LimitResponse {
            limits: Some(wire::limits(&self.0.limits)),
        }))
    }

    async fn log_level(
        &self,
        request: Request<LogLevelRequest>,
    ) -> Result<Response<LogLevelResponse>, Status> {
        let level = telemetry::level(&request.into_inner().level)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Response::new(LogLevelResponse { level }))
    }

    async fn share(
        &self,
        request: Request<ShareRequest>,
    ) -> Result<Response<ShareResponse>, Status> {
        let ShareRequest { path, name } = request.into_inner();
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(Status::invalid_argument("an absolute path is wanted"));
        }
        let spec = ShareSpec {
            name: (!name.is_empty()).then_some(name),
            path: path.clone(),
        };
        let (shares, adding) = (self.0.shares.clone(), spec.clone());
        let added = tokio::task::spawn_blocking(move || shares.add(adding));
        added
            .await
            .map_err(|e| Status::internal(e.to_string()))?
            .map_err(|error| Status::invalid_argument(format!("{error:#}")))?;
        crate::peer::sharing::saved_shares::add(&self.0.remember, &spec)
            .map_err(|error| Status::internal(format!("{error:#}")))?;
        let path = path.canonicalize().unwrap_or(path);
        let deadline = Instant::now() + SCAN;
        loop {
            let state = self
                .0
                .shares
                .status()
                .into_iter()
                .find(|state| state.path == path);
            match state {
                Some(state) if state.scanned || Instant::now() > deadline => {
                    return Ok(Response::new(ShareResponse {
                        files_to_hash: state.progress.files_to_hash,
                        bytes_to_hash: state.progress.bytes_to_hash,
                        share: Some(wire::share(&state)),
                    }));
                }
                None => return Err(Status::internal("the share is gone")),
                Some(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}
