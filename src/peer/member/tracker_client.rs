//! Calls to the tracker: one connection, dialled again when it broke, typed answers.
//!
//! Invariant: every call ends within its deadline, and an error says which tracker and what to do.

use std::{
    future::pending,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::sync::Mutex;
use tonic::{Code, Request, Status, Streaming};

use super::{join, membership::Membership, standing};
use crate::{
    catalog::Row,
    content::ContentId,
    exit::{Exit, Failed},
    net::{self, Connection, DialError, DialRefusal},
    proto::{
        self, Completeness, FileRow, HeartbeatRequest, HeartbeatResponse, ListFilesRequest,
        ListFilesResponse, RegisterRequest, RegisterResponse, RowReader, WatchFilesRequest,
        WatchFilesResponse, WireError, tracker_service_client::TrackerServiceClient,
    },
    tls::{self, Expect},
};

const DEADLINE: Duration = Duration::from_secs(10);
/// A full library of a million names takes a while.
const REGISTER_DEADLINE: Duration = Duration::from_secs(110);
/// About how long after an answer that is not whole the tracker is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(300);
/// Rows of a listing that are asked for at once: as many as a tracker gives.
const PAGE: u32 = 4000;
/// The TLS library wants a name; with SNI off it is not sent, and the verifier looks for the tracker's own.
const UNSENT_NAME: &str = "tracker.sprat.internal";

/// Talks to the network's tracker.
pub struct TrackerClient {
    membership: Arc<Membership>,
    connection: Mutex<Option<Connection>>,
}

/// What a tracker lists, and whether that is all.
#[derive(Clone, Debug, Default)]
pub struct FileListing {
    /// Its rows, ordered by name and content.
    pub rows: Vec<Row>,
    /// Whether they tell of everybody who is here: as the least whole of its pages.
    pub completeness: Completeness,
}

type Client = TrackerServiceClient<Connection>;

impl TrackerClient {
    /// A client for a member; dials at its first call.
    #[must_use]
    pub fn new(membership: Arc<Membership>) -> Self {
        Self {
            membership,
            connection: Mutex::new(None),
        }
    }

    /// A client from a state directory, for commands that only read: no lock, no Node. A certificate past half of its
    /// life is renewed first if it has ended.
    ///
    /// # Errors
    /// [`Exit::Auth`] if this machine has not joined.
    pub async fn open(state_dir: &Path, tracker: Option<String>) -> Result<Self> {
        let membership = Membership::load(state_dir, tracker)?;
        if membership.seconds_left() <= 0 {
            join::renew(&membership).await?;
        }
        Ok(Self::new(membership))
    }

    /// In whose name it asks.
    #[must_use]
    pub const fn membership(&self) -> &Arc<Membership> {
        &self.membership
    }

    /// Where the tracker is.
    #[must_use]
    pub fn address(&self) -> String {
        self.membership.trackers().join(", ")
    }

    /// Is it known to be at the other end of a long line? Does not wait for a connection that is being made.
    #[must_use]
    pub fn is_far(&self) -> bool {
        let is_long = |connection: &Connection| connection.round_trip() >= net::LONG;
        self.connection
            .try_lock()
            .is_ok_and(|connection| connection.as_ref().is_some_and(is_long))
    }

    async fn connection(&self) -> Result<Connection> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok(connection.clone());
        }
        let config = tls::member_client(
            self.membership.trust(),
            self.membership.certificate(),
            Expect::Tracker,
        )?;
        let fresh = net::dial(
            self.membership.trackers(),
            config,
            UNSENT_NAME,
            net::CONTROL,
        )
        .await
        .map_err(standing::failed)?;
        *slot = Some(fresh.clone());
        Ok(fresh)
    }

    /// Returns when the connection has ended that the last call used; never if there is none.
    pub async fn broken(&self) {
        let ended = self.connection.lock().await.as_ref().map(Connection::ended);
        match ended {
            Some(ended) => ended.await,
            None => pending().await,
        }
    }

    /// Forgets the connection, so that the next call dials: after a certificate was renewed.
    pub async fn reconnect(&self) {
        *self.connection.lock().await = None;
    }

    fn client(connection: &Connection) -> Client {
        Client::with_origin(connection.clone(), connection.origin())
    }

    async fn failed(&self, connection: &Connection, status: Status) -> anyhow::Error {
        let tracker = self.address();
        // A status without a cause came from the tracker itself.
        if std::error::Error::source(&status).is_some() || connection.is_closed() {
            let refusal = connection
                .why_ended()
                .await
                .unwrap_or_else(|| DialRefusal::Broken("the connection broke".into()));
            return standing::failed(DialError::Refused(tracker, refusal));
        }
        let exit = match status.code() {
            Code::PermissionDenied | Code::Unauthenticated => Exit::Auth,
            Code::InvalidArgument => Exit::Usage,
            Code::DeadlineExceeded => Exit::Timeout,
            Code::Unavailable | Code::Unimplemented => Exit::Tracker,
            _ => Exit::Failure,
        };
        anyhow::Error::from(status.clone()).context(Failed::new(
            exit,
            format!("tracker {tracker}: {}", status.message()),
        ))
    }

    /// Announces a library; the stream is sent as it is made.
    ///
    /// # Errors
    /// The tracker's status can be found in the error.
    pub async fn register<S>(&self, parts: S) -> Result<RegisterResponse>
    where
        S: futures_util::Stream<Item = RegisterRequest> + Send + 'static,
    {
        let connection = self.connection().await?;
        let mut request = Request::new(parts);
        request.set_timeout(REGISTER_DEADLINE);
        let answer = within(
            REGISTER_DEADLINE,
            Self::client(&connection).register(request),
        )
        .await;
        self.settle(&connection, answer).await
    }

    /// Renews the lease.
    ///
    /// # Errors
    /// As [`TrackerClient::register`].
    pub async fn heartbeat(&self, request: HeartbeatRequest) -> Result<HeartbeatResponse> {
        let connection = self.connection().await?;
        let mut request = Request::new(request);
        request.set_timeout(DEADLINE);
        let answer = within(DEADLINE, Self::client(&connection).heartbeat(request)).await;
        self.settle(&connection, answer).await
    }

    /// All rows of a listing, page after page.
    ///
    /// # Errors
    /// As [`TrackerClient::register`].
    pub async fn list(&self, mut query: ListFilesRequest) -> Result<FileListing> {
        let (mut rows, mut reader) = (Vec::new(), RowReader::default());
        let mut read = |files: Vec<FileRow>| -> Result<(), WireError> {
            for row in files {
                rows.push(reader.row(row)?);
            }
            Ok(())
        };
        query.page_size = PAGE;
        let mut page = self.page(&query).await?;
        let mut completeness = page.completeness.unwrap_or_default();
        while !page.next_page_token.is_empty() {
            query.page_token = page.next_page_token;
            // Rows are read while the next ones are on their way.
            let (next, done) = tokio::join!(self.page(&query), async { read(page.files) });
            done?;
            page = next?;
            let told = page.completeness.unwrap_or_default();
            if completeness.is_whole {
                completeness = told;
            }
        }
        read(page.files)?;
        Ok(FileListing { rows, completeness })
    }

    /// Asks the tracker again and again whether its listing is whole, until it is or the time is over; tells how it is
    /// then.
    ///
    /// # Errors
    /// As [`TrackerClient::register`].
    pub async fn whole(&self, until: Instant) -> Result<Completeness> {
        // Answered without a look at the listing.
        let question = ListFilesRequest {
            content_id: ContentId::EMPTY.to_string(),
            page_size: 1,
            ..Default::default()
        };
        loop {
            let told = self.page(&question).await?.completeness;
            let told = told.unwrap_or_default();
            let left = until.saturating_duration_since(Instant::now());
            if told.is_whole || left.is_zero() {
                return Ok(told);
            }
            let pause = ASK_AGAIN.mul_f64(0.5 + rand::random::<f64>());
            tokio::time::sleep(pause.min(left)).await;
        }
    }

    async fn page(&self, query: &ListFilesRequest) -> Result<ListFilesResponse> {
        let connection = self.connection().await?;
        let mut request = Request::new(query.clone());
        request.set_timeout(DEADLINE);
        let answer = within(DEADLINE, Self::client(&connection).list_files(request)).await;
        self.settle(&connection, answer).await
    }

    /// Follows the rows of these contents, the current ones first; at most 1,024 contents.
    ///
    /// # Errors
    /// As [`TrackerClient::register`].
    pub async fn watch(&self, contents: &[ContentId]) -> Result<Streaming<WatchFilesResponse>> {
        let connection = self.connection().await?;
        let content_ids = contents.iter().map(ToString::to_string).collect();
        let request = WatchFilesRequest {
            content_ids,
            skip_current: false,
        };
        let answer = within(DEADLINE, Self::client(&connection).watch_files(request)).await;
        self.settle(&connection, answer).await
    }

    async fn settle<T>(
        &self,
        connection: &Connection,
        answer: Result<tonic::Response<T>, Status>,
    ) -> Result<T> {
        match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(self.failed(connection, status).await),
        }
    }
}

async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    tokio::time::timeout(deadline, call)
        .await
        .unwrap_or_else(|_| {
            Err(Status::deadline_exceeded(format!(
                "no answer within {} s",
                deadline.as_secs()
            )))
        })
}

/// The tracker's own status in an error of this client, if that is what went wrong.
#[must_use]
pub fn status_of(error: &anyhow::Error) -> Option<Code> {
    error.downcast_ref::<Status>().map(Status::code)
}

/// Splits announcements into messages that stay below the tracker's limit.
#[must_use]
pub fn batches(added: Vec<proto::FileEntry>, removed: Vec<proto::FileKey>) -> Vec<RegisterRequest> {
    use prost::Message;
    const ROOM: usize = proto::MAX_TRACKER_MESSAGE / 2;
    let mut messages = vec![];
    let mut batch = proto::RegisterBatch::default();
    let mut room = ROOM;
    let mut push = |batch: &mut proto::RegisterBatch, room: &mut usize, size: usize| {
        if size + 8 > *room {
            messages.push(proto::register_request::Part::Batch(std::mem::take(batch)));
            *room = ROOM;
        }
        *room = room.saturating_sub(size + 8);
    };
    for key in removed {
        push(&mut batch, &mut room, key.encoded_len());
        batch.removed.push(key);
    }
    for entry in added {
        push(&mut batch, &mut room, entry.encoded_len());
        batch.added.push(entry);
    }
    messages.push(proto::register_request::Part::Batch(batch));
    messages
        .into_iter()
        .map(|part| RegisterRequest { part: Some(part) })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn batches_hold_everything_in_order_and_stay_small() {
        let entry = |i: usize| proto::FileEntry {
            name: format!("{i}{}", "x".repeat(900)),
            size: 1,
            content_id: "c".repeat(64),
            partial: false,
        };
        let key = |i: usize| proto::FileKey {
            name: format!("{i}"),
            content_id: "c".repeat(64),
        };
        let (added, removed): (Vec<_>, Vec<_>) =
            ((0..2000).map(entry).collect(), (0..3000).map(key).collect());
        let messages = batches(added.clone(), removed.clone());
        assert!(
            messages
                .iter()
                .all(|message| message.encoded_len() < proto::MAX_TRACKER_MESSAGE)
        );
        let parts = messages
            .into_iter()
            .filter_map(|message| match message.part {
                Some(proto::register_request::Part::Batch(batch)) => Some(batch),
                _ => None,
            });
        let all = parts.fold(proto::RegisterBatch::default(), |mut all, batch| {
            assert!(
                all.added.is_empty() || batch.removed.is_empty(),
                "removals come before additions"
            );
            all.added.extend(batch.added);
            all.removed.extend(batch.removed);
            all
        });
        assert_eq!((all.added, all.removed), (added, removed));
    }
}
