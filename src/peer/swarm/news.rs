//! What a source tells while it is worked with: what it holds, whom else it serves, and what it promised them.
//!
//! Invariant: what the source tells goes to the picker and nowhere else, but for whom else it serves.

use std::{convert::Infallible, sync::atomic::Ordering, time::Instant};

use super::{Report, Swarm};
use crate::{
    identity::PeerId,
    peer::{
        picker::SourceKey,
        source::{HaveWatch, News, Source, SourceError},
    },
    proto::MAX_CONTENTS,
};

impl Swarm {
    /// Follows what the source holds, through a watch that has `begun` if it is the right one. Ends only with an error.
    pub(super) async fn watch(
        &self,
        source: &Source,
        key: SourceKey,
        begun: Option<HaveWatch>,
    ) -> Result<Infallible, SourceError> {
        let is_open = |work: &&super::Work| !work.layout().is_single() && work.left() > 0;
        let open: Vec<_> = self.work.iter().filter(is_open).take(MAX_CONTENTS).collect();
        let contents: Vec<_> = open.iter().map(|work| (work.want.id, work.layout())).collect();
        let here = self.here.clone();
        let begun = begun.filter(|watch| watch.contents() == contents);
        let watch = match contents.is_empty() {
            _ if begun.is_some() => begun,
            true => None,
            false => source.watch_have(&contents, here.addresses, here.port).await?,
        };
        let Some(mut watch) = watch else {
            self.told(source.id);
            return std::future::pending().await;
        };
        let mut is_first = true;
        while let Some((at, news)) = watch.next().await? {
            if std::mem::take(&mut is_first) {
                self.told(source.id);
            }
            let id = contents[at].0;
            if let News::Peer(peer, addresses) = news {
                self.in_company.store(true, Ordering::Relaxed);
                self.report(Report::Met(peer, addresses, id)).await;
            } else if let Some(at) = self.position(&id) {
                self.hear(source.id, key, at, news);
            }
        }
        Err(SourceError::Broken("it ended its news".into()))
    }

    fn hear(&self, peer: PeerId, key: SourceKey, at: usize, news: News) {
        let work = &self.work[at];
        let first = work.first;
        if let News::Have(map) = &news
            && map.is_complete()
        {
            return self.holds(peer, &[work.want.id].into());
        }
        let frees = matches!(news, News::Have(_) | News::Gone);
        {
            let mut picker = self.picker();
            match news {
                News::Promised(pieces) => picker.promised(pieces.iter().map(|piece| first + piece), Instant::now()),
                News::Added(pieces) => pieces.iter().for_each(|piece| picker.add_have(key, first + piece)),
                News::Have(map) => {
                    map.iter().for_each(|piece| picker.add_have(key, first + piece));
                    map.missing().for_each(|piece| picker.remove_have(key, first + piece));
                }
                News::Gone => work.pieces().for_each(|piece| picker.remove_have(key, piece)),
                News::Peer(..) => {}
            }
        }
        if frees {
            self.known(peer, |known| known.complete.remove(&at));
            self.changed.notify_waiters();
        }
        self.wake(peer);
    }
}
