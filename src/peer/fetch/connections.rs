//! The connections to one source, which share a line: what they carry together, and which of them are of no use.
//!
//! Invariant: one that gets next to nothing while the others have all of the line is let go, and what it was asked for is
//! free again; never the first one, by which the source is judged, and none while the source is not proven, when one lane
//! reads alone.
//!
//! Why: over a line that several connections fill, loss falls on this and now on that one, and some never recover. At 100
//! Mbit/s and 50 ms, of eight connections three carried everything, and the others held the pieces they were first asked
//! for until the end, where all of them were fetched once more.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    pace::Pace, picker::SourceKey, session::SourceSession, source::CONNECTIONS, swarm::lock,
};

/// Next to nothing is less than so many bytes in that time.
const SILENCE: Duration = Duration::from_secs(2);
const NEXT_TO_NOTHING: u64 = 16 << 10;
/// ... and if the source has several connections, less than one's share of all that came, divided by this.
const FAR_BEHIND: u64 = 4;

/// One connection.
pub(super) struct Link {
    pub(super) key: SourceKey,
    pub(super) pace: Arc<Mutex<Pace>>,
    gone: CancellationToken,
}

impl Link {
    pub(super) fn pace(&self) -> MutexGuard<'_, Pace> {
        lock(&self.pace)
    }

    /// Is it let go?
    pub(super) fn is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }
}

/// All of them, the first one first.
pub(super) struct Line(Vec<Link>);

impl Line {
    /// Each with its pace.
    pub(super) fn new(source: SourceKey, paces: impl Iterator<Item = Arc<Mutex<Pace>>>) -> Self {
        let link = |(i, pace)| Link {
            key: connection_of(source, i),
            pace,
            gone: CancellationToken::new(),
        };
        Self(paces.enumerate().map(link).collect())
    }

    pub(super) fn links(&self) -> &[Link] {
        &self.0
    }

    fn live(&self) -> impl Iterator<Item = &Link> {
        self.0.iter().filter(|link| !link.is_gone())
    }

    /// Bytes a second.
    pub(super) fn goodput(&self) -> u64 {
        self.live().filter_map(|link| link.pace().goodput()).sum()
    }
}

/// The key of a source's connection.
fn connection_of(source: SourceKey, connection: usize) -> SourceKey {
    let connection = u32::try_from(connection).unwrap_or(0) % CONNECTIONS;
    SourceKey(source.0.saturating_add(connection))
}

impl SourceSession {
    /// While next to nothing comes over a connection, what it was promised is there for those who have nothing else to fetch.
    /// Ends if the others leave it nothing: then it is let go.
    pub(super) async fn look_on(&self, connection: usize) {
        let (swarm, line) = (&self.swarm, &self.line);
        let link = &line.0[connection];
        let bytes = || {
            let pace = link.pace();
            (pace.bytes(), pace.line_bytes())
        };
        loop {
            let before = bytes();
            tokio::select! { () = link.gone.cancelled() => return, () = sleep(SILENCE) => {} }
            let now = bytes();
            let (own, all) = (now.0 - before.0, now.1 - before.1);
            let n = line.live().count() as u64;
            let is_behind = all >= NEXT_TO_NOTHING && own.saturating_mul(FAR_BEHIND * n) <= all;
            if connection > 0 && is_behind && !swarm.in_company() && swarm.is_proven(self.peer()) {
                tracing::debug!(peer = %self.peer(), connection, own, all, "a connection gets nothing beside the others");
                self.source.let_go(connection);
                link.gone.cancel();
                return;
            }
            // All of a slow line is next to nothing for each of many connections.
            if own < NEXT_TO_NOTHING && (all < NEXT_TO_NOTHING || is_behind) {
                swarm.engine().picker.hurry(link.key, Instant::now());
                swarm.changed.notify_waiters();
            }
        }
    }
}
