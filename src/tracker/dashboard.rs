//! The operator's page: one page of HTML that shows the network as it is now, and the JSON it is drawn from.
//!
//! Invariants: it reads and changes nothing; what it costs is bounded, and nothing is computed while nobody looks; names
//! and addresses leave here as JSON alone, and the page writes them as text. Pages are part of the program: no request
//! reaches the file system.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{Query, State},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{StatusCode, header};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, watch},
    time::{MissedTickBehavior, interval},
};
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;

mod files;
mod kept;
mod members;
mod now;
mod swarm;

use self::{
    files::{Files, PageRange},
    members::Members,
};
use super::{
    activity::{self, Activity, BUCKET},
    registry::Registry,
    store::{Store, StoreError},
};
use crate::{catalog::SourceInfo, proto, tls::LiveCertificate};

/// Between two events.
const INTERVAL: Duration = Duration::from_secs(1);
/// Pages that follow at once.
const WATCHERS: usize = 32;
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const PAGES: [(&str, &str, &str); 8] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_str!("dashboard/index.html"),
    ),
    (
        "/app.css",
        "text/css; charset=utf-8",
        include_str!("dashboard/app.css"),
    ),
    ("/app.js", JAVASCRIPT, include_str!("dashboard/app.js")),
    ("/draw.js", JAVASCRIPT, include_str!("dashboard/draw.js")),
    ("/table.js", JAVASCRIPT, include_str!("dashboard/table.js")),
    ("/theme.js", JAVASCRIPT, include_str!("dashboard/theme.js")),
    ("/words.js", JAVASCRIPT, include_str!("dashboard/words.js")),
    (
        "/icon.svg",
        "image/svg+xml",
        include_str!("dashboard/icon.svg"),
    ),
];

/// What the page shows of.
pub struct Parts {
    /// Who is here with what.
    pub store: Arc<dyn Store>,
    /// Who belongs here.
    pub registry: Arc<Registry>,
    /// What moves.
    pub activity: Arc<Activity>,
    /// The tracker's certificate from its own authority.
    pub issued: Arc<LiveCertificate>,
    /// What it shows to those who know no name: the same, or the operator's own.
    pub unnamed: Arc<LiveCertificate>,
    /// When the authority ends, seconds since the epoch.
    pub authority_until: i64,
    /// Where joiners are told to go.
    pub advertised: Vec<String>,
    /// Of the authority's key.
    pub fingerprint: String,
}

/// The page's side of a tracker.
pub struct Dashboard {
    parts: Parts,
    started_at: u64,
    files: Files,
    members: Members,
    watchers: Arc<Semaphore>,
    /// The newest event; empty until somebody looks.
    latest: watch::Sender<Bytes>,
}

/// Why there is no answer.
#[derive(Debug)]
enum Trouble {
    /// The question makes no sense.
    Asked(String),
    /// Nothing is known by that name.
    Unknown,
    /// It is ours.
    Ours(String),
}

impl Trouble {
    fn asked(error: impl std::fmt::Display) -> Self {
        Self::Asked(error.to_string())
    }

    fn ours(error: impl std::fmt::Display) -> Self {
        Self::Ours(format!("{error:#}"))
    }
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self::ours(error)
    }
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::ours(error)
    }
}

impl From<tokio::task::JoinError> for Trouble {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::ours(error)
    }
}

impl IntoResponse for Trouble {
    fn into_response(self) -> Response {
        match self {
            Self::Asked(why) => (StatusCode::BAD_REQUEST, why + "\n").into_response(),
            Self::Unknown => (StatusCode::NOT_FOUND, "nobody offers that\n").into_response(),
            Self::Ours(why) => {
                tracing::error!("operator page: {why}");
                (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response()
            }
        }
    }
}

/// A value as a JSON answer.
fn json(value: &impl Serialize) -> Result<Response, Trouble> {
    let text = serde_json::to_string(value).map_err(Trouble::ours)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

impl Dashboard {
    /// A page of these parts.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        let files = Files::new(parts.store.clone());
        let members = Members::new(
            parts.store.clone(),
            parts.registry.clone(),
            parts.activity.clone(),
        );
        let (watchers, started_at) = (Arc::new(Semaphore::new(WATCHERS)), activity::unix_seconds());
        Arc::new(Self {
            parts,
            started_at,
            files,
            members,
            watchers,
            latest: watch::Sender::default(),
        })
    }

    /// The page, its scripts, its JSON and its events.
    pub fn router(self: Arc<Self>) -> Router {
        let pages = PAGES
            .into_iter()
            .fold(Router::new(), |router, (path, kind, text)| {
                router.route(
                    path,
                    get(move || async move { ([(header::CONTENT_TYPE, kind)], text) }),
                )
            });
        let answers = pages
            .route("/api/now", get(now))
            .route("/api/events", get(events))
            .route("/api/history", get(history))
            .route("/api/files", get(files))
            .route("/api/file", get(file))
            .route("/api/members", get(members));
        answers.with_state(self)
    }

    /// Computes what all watchers see, until cancelled.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while cancel.run_until_cancelled(ticks.tick()).await.is_some() {
            self.tick().await;
        }
    }

    async fn tick(&self) {
        if self.latest.receiver_count() == 0 {
            self.files.rest();
            self.members.rest();
            return;
        }
        match self.event().await {
            Ok(event) => drop(self.latest.send_replace(event)),
            Err(trouble) => tracing::error!("operator page: {trouble:?}"),
        }
    }

    async fn event(&self) -> Result<Bytes, Trouble> {
        let now = serde_json::to_string(&self.now().await?).map_err(Trouble::ours)?;
        Ok(format!("data: {now}\n\n").into())
    }
}

type Shown = State<Arc<Dashboard>>;

async fn now(State(dashboard): Shown) -> Result<Response, Trouble> {
    json(&dashboard.now().await?)
}

/// Server-sent events. Whoever is slow misses some, for only the newest is kept; the connection of one who takes nothing
/// ends by itself.
async fn events(State(dashboard): Shown) -> Result<Response, Trouble> {
    let Ok(place) = dashboard.watchers.clone().try_acquire_owned() else {
        let text = format!("{WATCHERS} pages follow already: close one\n");
        return Ok((
            StatusCode::SERVICE_UNAVAILABLE,
            [(header::RETRY_AFTER, "5")],
            text,
        )
            .into_response());
    };
    let coming = WatchStream::from_changes(dashboard.latest.subscribe());
    let first = dashboard.event().await?;
    let all = stream::once(async { first })
        .chain(coming)
        .map(move |event| {
            // Held for as long as the stream is.
            let _ = &place;
            Ok::<_, Infallible>(event)
        });
    Ok((
        [(header::CONTENT_TYPE, "text/event-stream")],
        Body::from_stream(all),
    )
        .into_response())
}

#[derive(Serialize)]
struct History {
    bucket_seconds: u64,
    /// Number of the first bucket since the tracker started.
    first: u64,
    /// Bytes delivered in each; the last one is still filling.
    bytes: Vec<u64>,
}

async fn history(State(dashboard): Shown) -> Result<Response, Trouble> {
    let (first, bytes) = dashboard.parts.activity.history(Instant::now());
    json(&History {
        bucket_seconds: BUCKET.as_secs(),
        first,
        bytes,
    })
}

async fn files(
    State(dashboard): Shown,
    Query(wanted): Query<files::FilesQuery>,
    Query(part): Query<PageRange>,
) -> Result<Response, Trouble> {
    json(&dashboard.files.page(wanted, part).await?)
}

async fn members(
    State(dashboard): Shown,
    Query(wanted): Query<members::MembersQuery>,
    Query(part): Query<PageRange>,
) -> Result<Response, Trouble> {
    json(&dashboard.members.page(&wanted, part).await?)
}

#[derive(Deserialize)]
struct Content {
    content_id: String,
}

#[derive(Serialize)]
struct Held {
    names: Vec<String>,
    /// How many hold it; of many, some are named.
    n_sources: u32,
    sources: Vec<Holder>,
}

#[derive(Serialize)]
struct Holder {
    peer_id: String,
    addresses: Vec<String>,
    partial: bool,
}

impl From<&SourceInfo> for Holder {
    fn from(source: &SourceInfo) -> Self {
        Self {
            peer_id: source.peer.to_string(),
            addresses: source.addresses.clone(),
            partial: source.partial,
        }
    }
}

async fn file(State(dashboard): Shown, Query(asked): Query<Content>) -> Result<Response, Trouble> {
    let content = proto::content_id(&asked.content_id).map_err(Trouble::asked)?;
    let rows = dashboard.parts.store.rows_of(&[content], true).await?;
    let names = rows.iter().map(|row| row.name.to_string()).collect();
    let row = rows.into_iter().next().ok_or(Trouble::Unknown)?;
    let sources = row
        .sources
        .iter()
        .map(|source| (&**source).into())
        .collect();
    json(&Held {
        names,
        n_sources: row.source_count,
        sources,
    })
}
