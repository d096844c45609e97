//! WatchHave, the receiving end: what a source holds as it changes, whom it serves, and what it promised to them.
//!
//! Invariant: pieces are within their content's layout and addresses are such as may be dialled; all of it is hearsay
//! that only decides whom to ask for what.

use bytes::Bytes;
use tokio::time::timeout;
use tonic::{Code, Streaming};

use super::{FIRST_ANSWER, Source, SourceError};
use crate::{
    content::{ContentId, Layout},
    have::HaveMap,
    identity::PeerId,
    proto::{self, HaveDelta, WatchHaveRequest, WatchHaveResponse, watch_have_response::Change},
};

/// News about one of the watched contents, by its position in the request.
#[derive(Debug)]
pub enum News {
    /// What it holds, all told.
    Have(HaveMap),
    /// Pieces that it holds now, too.
    Added(Vec<u32>),
    /// It holds nothing of it (any more).
    Gone,
    /// Pieces whose first copy it promised to others.
    Promised(Vec<u32>),
    /// Somebody else who fetches or holds it.
    Peer(PeerId, Vec<String>),
}

/// A WatchHave stream. Dropping it ends it.
pub struct HaveWatch {
    contents: Vec<(ContentId, Layout)>,
    stream: Streaming<WatchHaveResponse>,
}

impl Source {
    /// Begins to watch these contents, at most 1,024; `addresses` and `port` say where the caller serves them itself.
    /// `None`: the source knows no such call.
    ///
    /// # Errors
    /// If it does not answer, or refuses.
    pub async fn watch_have(
        &self,
        contents: &[(ContentId, Layout)],
        addresses: Vec<String>,
        port: u16,
    ) -> Result<Option<HaveWatch>, SourceError> {
        let content_ids = contents
            .iter()
            .map(|(id, _)| Bytes::copy_from_slice(id.as_bytes()))
            .collect();
        let request = WatchHaveRequest {
            content_ids,
            addresses,
            port: port.into(),
        };
        let mut client = self.client();
        let stream = match timeout(FIRST_ANSWER, client.watch_have(request))
            .await
            .map_err(|_| SourceError::Stalled)?
        {
            Err(status) if status.code() == Code::Unimplemented => return Ok(None),
            answer => answer?.into_inner(),
        };
        Ok(Some(HaveWatch {
            contents: contents.to_vec(),
            stream,
        }))
    }
}

impl HaveWatch {
    /// What is watched.
    #[must_use]
    pub fn contents(&self) -> &[(ContentId, Layout)] {
        &self.contents
    }

    /// Waits for news: the position of a content, and what is new about it. `None`: the source ended the stream.
    ///
    /// # Errors
    /// If the stream breaks, or says what cannot be.
    pub async fn next(&mut self) -> Result<Option<(usize, News)>, SourceError> {
        loop {
            let Some(message) = self.stream.message().await? else {
                return Ok(None);
            };
            let at = message.index as usize;
            let lied = || SourceError::Lied("news of something else".into());
            let layout = self.contents.get(at).ok_or_else(lied)?.1;
            let news = match message.change {
                Some(Change::Have(map)) if map.complete || map.size == layout.size() => {
                    News::Have(map.read(layout).map_err(|_| lied())?)
                }
                Some(Change::Added(delta)) => News::Added(pieces(delta, layout).ok_or_else(lied)?),
                Some(Change::Promised(delta)) => {
                    News::Promised(pieces(delta, layout).ok_or_else(lied)?)
                }
                Some(Change::Have(_) | Change::Error(_)) => News::Gone,
                Some(Change::Peer(hint)) => match hint.peer_id.parse() {
                    Ok(peer) => News::Peer(peer, proto::offered_addresses(&hint.addresses)),
                    Err(_) => return Err(lied()),
                },
                None => continue,
            };
            return Ok(Some((at, news)));
        }
    }
}

fn pieces(delta: HaveDelta, layout: Layout) -> Option<Vec<u32>> {
    delta
        .pieces
        .iter()
        .all(|piece| *piece < layout.n_pieces())
        .then_some(delta.pieces)
}
