//! What a source tells while it is worked with: what it holds, whom else it serves, and what it promised them.
//!
//! Invariant: what the source tells goes to the picker and nowhere else, but for whom else it serves. What it does not serve
//! although it is said to have it, it is asked for again, but not for ever.

use std::{
    convert::Infallible,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{Report, Swarm};
use crate::{
    identity::PeerId,
    peer::fetch::{
        picker::SourceKey,
        source::{HaveWatch, News, Source, SourceError},
    },
    proto::MAX_CONTENTS,
};

/// Until a source is first asked again for what it did not serve; then twice as long each time. A file that was touched is
/// offered again when it was quiet for two seconds and is hashed.
const AGAIN: Duration = Duration::from_millis(500);
/// How often it is asked again, without a byte of it in between.
const MAX_AGAIN: u32 = 3;

/// What a source did not serve when it was asked.
#[derive(Default)]
pub(super) struct Refused {
    pieces: Vec<u32>,
    /// When to ask again; none if there is nothing to ask for.
    until: Option<Instant>,
    /// How often it was asked again, and the bytes that had come from it by then.
    n: u32,
    bytes: u64,
}

impl Swarm {
    /// A source does not serve these pieces now.
    pub(super) fn refused(&self, peer: PeerId, pieces: Vec<u32>) {
        let bytes = self.account(peer, |account| account.bytes);
        self.known(peer, |known| {
            let refused = &mut known.refused;
            if refused.bytes < bytes {
                (refused.n, refused.bytes) = (0, bytes);
            }
            if refused.n < MAX_AGAIN && !pieces.is_empty() {
                refused
                    .until
                    .get_or_insert_with(|| Instant::now() + AGAIN * 2_u32.pow(refused.n));
                refused.pieces.extend(pieces);
            }
        });
    }

    /// Lets sources be asked again for what they did not serve; to be called now and then.
    pub fn ask_again(&self) {
        let now = Instant::now();
        let mut due = vec![];
        for (peer, known) in self
            .known
            .lock()
            .expect("no panic while the lock is held")
            .iter_mut()
        {
            let refused = &mut known.refused;
            if refused.until.take_if(|until| *until <= now).is_some() {
                refused.n += 1;
                due.push((*peer, known.key, std::mem::take(&mut refused.pieces)));
            }
        }
        for (peer, key, pieces) in due {
            let mut picker = self.picker();
            pieces
                .into_iter()
                .for_each(|piece| picker.add_have(key, piece));
            drop(picker);
            self.wake(peer);
        }
    }

    /// Follows what the source holds, through a watch that has `begun` if it is the right one. Ends only with an error.
    pub(super) async fn watch(
        &self,
        source: &Source,
        key: SourceKey,
        begun: Option<HaveWatch>,
    ) -> Result<Infallible, SourceError> {
        let is_open = |work: &super::Work| !work.layout().is_single() && work.left() > 0;
        let open = self
            .work
            .iter()
            .enumerate()
            .filter(|(_, work)| is_open(work))
            .take(MAX_CONTENTS);
        let (positions, contents): (Vec<_>, Vec<_>) = open
            .map(|(at, work)| (at, (work.want.id, work.layout())))
            .unzip();
        let here = self.here.clone();
        let begun = begun.filter(|watch| watch.contents() == contents);
        let watch = match contents.is_empty() {
            _ if begun.is_some() => begun,
            true => None,
            false => {
                source
                    .watch_have(&contents, here.addresses, here.port)
                    .await?
            }
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
            if let News::Peer(peer, addresses) = news {
                self.in_company.store(true, Ordering::Relaxed);
                self.report(Report::Met(peer, addresses, contents[at].0))
                    .await;
            } else {
                self.hear(source.id, key, positions[at], news);
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
                News::Promised(pieces) => {
                    picker.promised(pieces.iter().map(|piece| first + piece), Instant::now())
                }
                News::Added(pieces) => pieces
                    .iter()
                    .for_each(|piece| picker.add_have(key, first + piece)),
                News::Have(map) => {
                    map.iter()
                        .for_each(|piece| picker.add_have(key, first + piece));
                    map.missing()
                        .for_each(|piece| picker.remove_have(key, first + piece));
                }
                News::Gone => work
                    .pieces()
                    .for_each(|piece| picker.remove_have(key, piece)),
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
