//! What is asked of a far source together with its manifest: its news and the first pieces, two round trips sooner than by
//! whoever knows the manifest, over all connections at once, each of which begins with ten packets.
//!
//! Invariant: nothing that comes of it is believed before the manifest is here, or read beyond what the transport holds
//! unread; if what was asked for turns out to be of no use, dropping it ends the streams.

use std::{
    future::ready,
    sync::{Arc, Mutex},
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio_util::task::AbortOnDropHandle;

use super::{
    super::pace::Pace,
    CONNECTIONS, Source, SourceError,
    fetch::{Fetch, Wanted},
    have::HaveWatch,
};
use crate::{
    content::{ContentId, Layout},
    identity::PeerId,
    request::carried,
};

/// Bytes asked for, over all connections together.
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
    /// Whoever holds it is probably at the other end of a long line.
    pub is_far: bool,
}

type Watched = Result<Option<HaveWatch>, SourceError>;
type Fetched = Result<Fetch, SourceError>;

/// What a source was asked for already.
pub struct Begun {
    /// Whom.
    pub peer: PeerId,
    /// How pieces come over each connection.
    pub paces: Vec<Arc<Mutex<Pace>>>,
    first: (Wanted, AbortOnDropHandle<(Watched, Fetched)>),
    further: Vec<(Wanted, AbortOnDropHandle<Fetched>)>,
}

/// Pieces that were asked for over one connection, and how they come.
pub struct Asked {
    /// Which.
    pub wanted: Wanted,
    answer: BoxFuture<'static, Option<Fetch>>,
}

impl Asked {
    /// Waits for the answer; none if it was refused.
    pub async fn answered(self) -> Option<Fetch> {
        self.answer.await
    }
}

impl Source {
    /// Asks for news and the first pieces of a content, over all connections that there are. `None` over a short line, where
    /// others may want the same at the same time and nothing is gained.
    #[must_use]
    pub fn begin(&self, opening: &Opening) -> Option<Begun> {
        let Opening {
            id,
            layout,
            here: (addresses, port),
            ..
        } = opening.clone();
        if self.connections() == 1 {
            return None;
        }
        let n = if self.is_wide() {
            CONNECTIONS.min(BYTES / layout.piece_len()).max(1)
        } else {
            1
        };
        let count = (BYTES / n / layout.piece_len()).max(1);
        let claims = (0..n).map_while(|i| {
            let first = layout.piece(i * count)?;
            Some(Wanted {
                id,
                layout,
                first,
                count: count.min(layout.n_pieces() - i * count),
            })
        });
        let pace = Pace::new(layout.piece_len());
        let mut claims = claims.map(|wanted| (wanted, Arc::new(Mutex::new(pace.fresh()))));
        let (wanted, pace) = claims.next()?;
        let (source, fetching) = (self.clone(), pace.clone());
        let asking = carried(async move {
            let contents = [(id, layout)];
            // In this order, at least here: a source promises first copies to those who watch.
            tokio::join!(
                source.watch_have(&contents, addresses, port),
                source.fetch(0, vec![wanted], true, &fetching)
            )
        });
        let first = (wanted, AbortOnDropHandle::new(tokio::spawn(asking)));
        let (mut paces, mut further) = (vec![pace], vec![]);
        for (lane, (wanted, pace)) in (1..).zip(claims) {
            let (source, fetching) = (self.clone(), pace.clone());
            let asking =
                carried(async move { source.fetch(lane, vec![wanted], true, &fetching).await });
            further.push((wanted, AbortOnDropHandle::new(tokio::spawn(asking))));
            paces.push(pace);
        }
        Some(Begun {
            peer: self.id,
            paces,
            first,
            further,
        })
    }
}

impl Begun {
    /// The news, and the pieces of each connection.
    pub async fn answered(self) -> (Option<HaveWatch>, Vec<Asked>) {
        let peer = self.peer;
        let heard = move |fetch: Fetched| {
            fetch
                .inspect_err(
                    |error| tracing::debug!(%peer, "asked for pieces beside the manifest: {error}"),
                )
                .ok()
        };
        let (wanted, asked) = self.first;
        let Ok((watch, fetch)) = asked.await else {
            return (None, vec![]);
        };
        let first = Asked {
            wanted,
            answer: ready(heard(fetch)).boxed(),
        };
        let further = self.further.into_iter().map(|(wanted, asked)| {
            let answer = async move { asked.await.ok().and_then(heard) };
            Asked {
                wanted,
                answer: answer.boxed(),
            }
        });
        (
            watch.ok().flatten(),
            std::iter::once(first).chain(further).collect(),
        )
    }
}
