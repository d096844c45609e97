//! What is asked of a far source together with its manifest: its news and the first pieces, two round trips sooner than by
//! whoever knows the manifest.
//!
//! Invariant: nothing that comes of it is believed before the manifest is here, or read beyond what the transport holds
//! unread; if what was asked for turns out to be of no use, dropping it ends the streams.

use std::sync::{Arc, Mutex};

use tokio_util::task::AbortOnDropHandle;

use super::{
    super::pace::Pace,
    Source, SourceError,
    fetch::{Fetch, Wanted},
    have::HaveWatch,
};
use crate::{
    content::{ContentId, Layout},
    identity::PeerId,
    request::carried,
};

/// Bytes asked for: what a first claim over a long line has.
const BYTES: u32 = 4 << 20;

/// What may be asked for before the manifest is here.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The content.
    pub id: ContentId,
    /// Its size and pieces, as listed.
    pub layout: Layout,
    /// Where the caller serves it itself: "HOST:PORT" values, and the port.
    pub here: (Vec<String>, u16),
}

type Watched = Result<Option<HaveWatch>, SourceError>;

/// What a source was asked for already.
pub struct Begun {
    /// Whom.
    pub peer: PeerId,
    /// Which pieces.
    pub wanted: Wanted,
    /// How they come.
    pub pace: Arc<Mutex<Pace>>,
    asked: AbortOnDropHandle<(Watched, Result<Fetch, SourceError>)>,
}

impl Source {
    /// Asks for news and the first pieces of a content. `None` over a short line, where others may want the same at the same
    /// time and nothing is gained.
    #[must_use]
    pub fn begin(&self, opening: &Opening) -> Option<Begun> {
        let Opening { id, layout, here: (addresses, port) } = opening.clone();
        let first = layout.piece(0).filter(|_| self.connections() > 1)?;
        let count = (BYTES / layout.piece_len()).clamp(1, layout.n_pieces());
        let wanted = Wanted { id, layout, first, count };
        let pace = Arc::new(Mutex::new(Pace::new(layout.piece_len())));
        let (source, fetching) = (self.clone(), pace.clone());
        let asking = carried(async move {
            let contents = [(id, layout)];
            // In this order: a source promises first copies to those who watch.
            tokio::join!(source.watch_have(&contents, addresses, port), source.fetch(0, vec![wanted], true, &fetching))
        });
        Some(Begun { peer: self.id, wanted, pace, asked: AbortOnDropHandle::new(tokio::spawn(asking)) })
    }
}

impl Begun {
    /// The news and the pieces; none of what was refused.
    pub async fn answered(self) -> (Option<HaveWatch>, Option<(Wanted, Fetch)>) {
        let Ok((watch, fetch)) = self.asked.await else { return (None, None) };
        if let Err(error) = &fetch {
            tracing::debug!(peer = %self.peer, "asked for pieces beside the manifest: {error}");
        }
        (watch.ok().flatten(), fetch.ok().map(|fetch| (self.wanted, fetch)))
    }
}
