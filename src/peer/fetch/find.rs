//! Who holds what we want: the tracker's word, kept up to date.
//!
//! Invariant: what the tracker says only decides whom to ask. At most `MAX_STREAMS` streams are open, each for as long as
//! something that it follows is pending.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::peer::member::tracker_client::TrackerClient;
use crate::{
    catalog::Row,
    content::ContentId,
    proto::{MAX_CONTENTS, watch_files_response::Change},
    request::carried,
};

/// Streams to the tracker at once.
const MAX_STREAMS: usize = 4;
const QUEUE: usize = 1024;
/// How long contents are followed while others wait for the stream.
const TURN: Duration = Duration::from_secs(10);
/// Between two questions to a tracker that does not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// Contents that are followed over one stream.
struct Following {
    contents: Vec<ContentId>,
    since: Instant,
    _task: AbortOnDropHandle<()>,
}

/// Follows the tracker's rows of some contents for as long as it lives.
pub struct Finder {
    tracker: Arc<TrackerClient>,
    rows: mpsc::Receiver<Row>,
    sender: mpsc::Sender<Row>,
    /// Contents that are not followed yet.
    later: VecDeque<Vec<ContentId>>,
    streams: Vec<Following>,
}

impl Finder {
    /// Will follow these contents from the first [`advance`](Self::advance) on.
    #[must_use]
    pub fn new(tracker: Arc<TrackerClient>, contents: &[ContentId]) -> Self {
        let (sender, rows) = mpsc::channel(QUEUE);
        let later = contents.chunks(MAX_CONTENTS).map(<[_]>::to_vec).collect();
        Self {
            tracker,
            rows,
            sender,
            later,
            streams: vec![],
        }
    }

    /// Ends what follows nothing that is pending, and begins with others in its place.
    pub fn advance(&mut self, is_pending: impl Fn(&ContentId) -> bool) {
        self.streams
            .retain(|following| following.contents.iter().any(&is_pending));
        // Those that wait get a turn, so that nothing stays unasked for.
        let has_waiting = self
            .later
            .iter()
            .any(|contents| contents.iter().any(&is_pending));
        if has_waiting
            && self.streams.len() == MAX_STREAMS
            && let Some(oldest) = self
                .streams
                .iter()
                .position(|one| one.since.elapsed() >= TURN)
        {
            self.later.push_back(self.streams.remove(oldest).contents);
        }
        while self.streams.len() < MAX_STREAMS
            && let Some(mut contents) = self.later.pop_front()
        {
            contents.retain(&is_pending);
            if contents.is_empty() {
                continue;
            }
            let following = follow(self.tracker.clone(), contents.clone(), self.sender.clone());
            self.streams.push(Following {
                contents,
                since: Instant::now(),
                _task: AbortOnDropHandle::new(tokio::spawn(carried(following))),
            });
        }
    }

    /// Waits for rows; those that came together are told together. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Vec<Row> {
        let mut rows = vec![];
        self.rows.recv_many(&mut rows, QUEUE).await;
        rows
    }
}

async fn follow(tracker: Arc<TrackerClient>, contents: Vec<ContentId>, rows: mpsc::Sender<Row>) {
    while !rows.is_closed() {
        if let Err(error) = follow_once(&tracker, &contents, &rows).await {
            tracing::debug!("following the tracker: {error:#}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow_once(
    tracker: &TrackerClient,
    contents: &[ContentId],
    rows: &mpsc::Sender<Row>,
) -> Result<()> {
    let mut stream = tracker.watch(contents).await?;
    while let Some(message) = stream.message().await? {
        match message.change {
            Some(Change::Changed(row)) => rows.send(row.try_into()?).await?,
            Some(Change::Resync(_)) => return Ok(()),
            Some(Change::Current(_) | Change::Removed(_)) | None => {}
        }
    }
    Ok(())
}
