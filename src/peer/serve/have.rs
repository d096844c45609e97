//! WatchHave: which pieces are here, as they come; who else wants the content; which first copies were promised.
//!
//! Invariant: a piece is told only after it was verified and written; news is late by [`GATHER`] and one message at most;
//! a watcher that takes nothing for 30 s is dropped.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::sleep};
use tonic::Status;

use super::{
    NO_PROGRESS, content_error,
    super_seed::{Crowds, Watch},
};
use crate::peer::sharing::library::{Have, Library, ServeError};
use crate::{
    catalog::Announcement,
    content::ContentId,
    identity::PeerId,
    proto::{HaveDelta, HaveMap, PeerHint, WatchHaveResponse, watch_have_response::Change},
};

/// News within this time travels together.
const GATHER: Duration = Duration::from_millis(30);
/// Pieces in one message.
const PIECES: usize = 8192;
/// Other peers told of one content.
const HINTS: usize = 256;

/// One WatchHave stream.
pub(super) struct Watching {
    pub(super) library: Library,
    pub(super) crowds: Crowds,
    pub(super) watch: Watch,
    pub(super) sender: mpsc::Sender<Result<WatchHaveResponse, Status>>,
}

/// What the watcher knows of one content.
#[derive(Default)]
struct Told {
    have: Option<Option<Have>>,
    peers: BTreeMap<PeerId, Arc<Announcement>>,
    promised: usize,
}

impl Watching {
    pub(super) async fn run(self, contents: Vec<ContentId>) {
        let (mut haves, mut crowd) = (self.library.haves(), self.crowds.changed());
        let mut told: Vec<Told> = contents.iter().map(|_| Told::default()).collect();
        let mut is_other_crowd = true;
        loop {
            haves.mark_unchanged();
            crowd.mark_unchanged();
            for ((index, id), told) in (0..).zip(&contents).zip(&mut told) {
                for change in self.news(id, told, is_other_crowd) {
                    let message = WatchHaveResponse {
                        index,
                        change: Some(change),
                    };
                    if self
                        .sender
                        .send_timeout(Ok(message), NO_PROGRESS)
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
            }
            tokio::select! {
                Ok(()) = haves.changed() => {}
                Ok(()) = crowd.changed() => {}
                () = self.sender.closed() => return,
            }
            sleep(GATHER).await;
            is_other_crowd = crowd.has_changed().unwrap_or(true);
        }
    }

    fn news(&self, id: &ContentId, told: &mut Told, is_other_crowd: bool) -> Vec<Change> {
        let mut news = vec![];
        let have = self.library.have(id);
        if told.have.as_ref() != Some(&have) {
            let size = self
                .library
                .manifest(id)
                .map_or(0, |manifest| manifest.layout().size());
            match (&have, told.have.take().flatten()) {
                (None, _) => news.push(Change::Error(content_error(&ServeError::NotFound))),
                (Some(Have::Partial(now)), before) => {
                    let before = before.and_then(|before| {
                        if let Have::Partial(map) = before {
                            Some(map)
                        } else {
                            None
                        }
                    });
                    match before.and_then(|before| now.added_since(&before)) {
                        Some(added) => news.extend(deltas(&added).map(Change::Added)),
                        None => news.push(Change::Have(HaveMap { size, ..now.into() })),
                    }
                }
                (Some(Have::Complete), _) => {
                    news.push(Change::Have(HaveMap {
                        size,
                        complete: true,
                        ..HaveMap::default()
                    }));
                }
            }
            told.have = Some(have);
        }
        if !is_other_crowd {
            return news;
        }
        for other in self.watch.others(id) {
            let is_known = told
                .peers
                .get(&other.peer)
                .is_some_and(|known| known.addresses == other.addresses);
            let addresses = other.addresses_for(self.watch.announcement.seen_over_loopback);
            if !is_known && !addresses.is_empty() && told.peers.len() < HINTS {
                news.push(Change::Peer(PeerHint {
                    peer_id: other.peer.to_string(),
                    addresses,
                }));
                told.peers.insert(other.peer, other);
            }
        }
        let promised = self.watch.promised(id, &mut told.promised);
        news.extend(deltas(&promised).map(Change::Promised));
        news
    }
}

fn deltas(pieces: &[u32]) -> impl Iterator<Item = HaveDelta> {
    pieces.chunks(PIECES).map(|pieces| HaveDelta {
        pieces: pieces.to_vec(),
    })
}
