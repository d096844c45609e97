//! ReportPiece: a receiver says that a piece it was sent is wrong. If it is, so is the file: a change that neither size nor
//! times told of, such as that of a page of a mapped file.
//!
//! Invariant: a report costs one piece of reading and hashing, one at a time. Heard is only who was sent bytes of the
//! content lately, once a minute each, and a content once a minute. What is remembered is bounded.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;

use super::blocking;
use crate::{
    content::ContentId,
    identity::PeerId,
    metrics,
    peer::sharing::{index::Index, library::Library},
    safe_path::escape,
};

/// Between two reports of a member, and between two about a content, that are heard.
const PAUSE: Duration = Duration::from_secs(60);
/// How long ago somebody may have been sent something.
const LATELY: Duration = Duration::from_secs(600);
/// Members who are remembered: as many as may be served at once.
const MAX_MEMBERS: usize = super::STREAMS;
/// Contents sent to a member that are remembered at the least, and half of those at the most: those of a claim.
const MAX_CONTENTS: usize = crate::proto::MAX_RANGES;
/// Contents that are looked at within a [`PAUSE`].
const MAX_LOOKED: usize = 128;

/// Hears reports.
pub(super) struct Reports {
    library: Library,
    index: Arc<Index>,
    book: Mutex<Book>,
    /// Reading and hashing.
    look: Semaphore,
}

impl Reports {
    pub(super) fn new(library: Library, index: Arc<Index>) -> Self {
        Self {
            library,
            index,
            book: Mutex::default(),
            look: Semaphore::new(1),
        }
    }

    /// Notes that bytes of a content are sent to a member.
    pub(super) fn sent(&self, peer: PeerId, id: ContentId) {
        let mut book = self.book.lock().expect("no panic while the lock is held");
        book.sent(peer, id, Instant::now());
    }

    /// Looks at what a report is about, if it is heard.
    pub(super) async fn hear(self: Arc<Self>, peer: PeerId, id: ContentId, piece: u32) {
        let is_heard = {
            let mut book = self.book.lock().expect("no panic while the lock is held");
            book.hears(peer, id, Instant::now())
        };
        let Some(_permit) = (match is_heard {
            true => self.look.acquire().await.ok(),
            false => None,
        }) else {
            metrics::REPORTS_IGNORED.one();
            return tracing::debug!(%peer, %id, piece, "a report of a wrong piece is not heard");
        };
        let this = self.clone();
        let looked = blocking(move || {
            let manifest = this.library.manifest(&id);
            let index = manifest.and_then(|manifest| manifest.layout().piece(piece));
            let Some(index) = index else {
                return Ok(None);
            };
            let wrong = this.library.disproved(&id, index)?;
            let paths: Vec<_> = wrong.iter().map(|location| location.path()).collect();
            // Before they are withdrawn: the share that looks at them again must not find them there.
            if let Err(error) = this.index.forget(&paths) {
                tracing::warn!(%error, "the index of hashed files cannot be written");
            }
            for location in &wrong {
                this.library.suspect(location);
                let (name, path) = (location.name.as_str(), location.path());
                tracing::warn!(
                    name = %escape(name), path = %escape(&path.to_string_lossy()), piece, told_by = %peer,
                    "a shared file changed unseen: it is withdrawn and hashed again"
                );
            }
            Ok(Some(!wrong.is_empty()))
        });
        let counter = match looked.await {
            Ok(Some(true)) => &metrics::REPORTS_TRUE,
            Ok(Some(false)) => &metrics::REPORTS_FALSE,
            Ok(None) | Err(_) => &metrics::REPORTS_IGNORED,
        };
        counter.one();
    }
}

/// Who was sent what, and when whom was listened to. No clock.
#[derive(Default)]
struct Book {
    members: HashMap<PeerId, Member>,
    /// When a content was last looked at, if that is less than a [`PAUSE`] ago.
    looked: HashMap<ContentId, Instant>,
}

struct Member {
    /// The contents sent last, and those before them.
    latest: HashSet<ContentId>,
    before: HashSet<ContentId>,
    served: Instant,
    heard: Option<Instant>,
}

impl Book {
    fn sent(&mut self, peer: PeerId, id: ContentId, now: Instant) {
        if self.members.len() == MAX_MEMBERS
            && !self.members.contains_key(&peer)
            && let Some(oldest) = self.members.iter().min_by_key(|(_, member)| member.served)
        {
            let oldest = *oldest.0;
            self.members.remove(&oldest);
        }
        let member = self.members.entry(peer).or_insert_with(|| Member {
            latest: HashSet::new(),
            before: HashSet::new(),
            served: now,
            heard: None,
        });
        member.served = now;
        if !member.latest.contains(&id) && member.latest.len() == MAX_CONTENTS {
            member.before = mem::take(&mut member.latest);
        }
        member.latest.insert(id);
    }

    /// Whether a report is to be looked at; says so once in a while only.
    fn hears(&mut self, peer: PeerId, id: ContentId, now: Instant) -> bool {
        let is_over = |then: Instant| now.duration_since(then) >= PAUSE;
        self.looked.retain(|_, then| !is_over(*then));
        let Some(member) = self.members.get_mut(&peer) else {
            return false;
        };
        let was_sent = (member.latest.contains(&id) || member.before.contains(&id))
            && now.duration_since(member.served) < LATELY;
        let is_due = member.heard.is_none_or(is_over)
            && !self.looked.contains_key(&id)
            && self.looked.len() < MAX_LOOKED;
        if was_sent && is_due {
            member.heard = Some(now);
            self.looked.insert(id, now);
        }
        was_sent && is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn content(n: usize) -> ContentId {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        ContentId::from_bytes(bytes)
    }

    #[test]
    fn who_was_sent_nothing_is_not_heard() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.sent(peer(1), content(1), now);
        assert!(!book.hears(peer(2), content(1), now));
        assert!(!book.hears(peer(1), content(2), now));
        assert!(!book.hears(peer(1), content(1), now + LATELY));
        assert!(book.hears(peer(1), content(1), now));
    }

    #[test]
    fn a_flood_is_heard_once_a_minute_from_each_and_about_each() {
        let (mut book, now) = (Book::default(), Instant::now());
        for n in 1..=3 {
            book.sent(peer(n), content(1), now);
            book.sent(peer(n), content(2), now);
        }
        assert!(book.hears(peer(1), content(1), now));
        for n in 1..=3 {
            assert!(!book.hears(peer(n), content(1), now + PAUSE / 2));
        }
        assert!(
            !book.hears(peer(1), content(2), now + PAUSE / 2),
            "a member"
        );
        assert!(book.hears(peer(2), content(2), now + PAUSE / 2));
        assert!(book.hears(peer(1), content(1), now + PAUSE));
        assert!(!book.hears(peer(2), content(2), now + PAUSE));
    }

    #[test]
    fn memory_is_bounded_and_the_latest_are_remembered() {
        let (mut book, mut now) = (Book::default(), Instant::now());
        for n in 0..5 * MAX_CONTENTS {
            book.sent(peer(1), content(n), now);
        }
        let member = &book.members[&peer(1)];
        assert!(member.latest.len() + member.before.len() <= 2 * MAX_CONTENTS);
        assert!(!book.hears(peer(1), content(0), now));
        assert!(book.hears(peer(1), content(4 * MAX_CONTENTS), now));
        for n in 0..200 {
            now += Duration::from_millis(1);
            book.sent(peer(n), content(1), now);
        }
        assert_eq!(book.members.len(), MAX_MEMBERS);
        assert!(book.members.contains_key(&peer(199)) && !book.members.contains_key(&peer(1)));
        for n in 72..200 {
            book.sent(peer(n), content(n.into()), now);
            book.hears(peer(n), content(n.into()), now);
        }
        assert_eq!(book.looked.len(), MAX_LOOKED);
        assert!(book.hears(peer(100), content(100), now + PAUSE));
        assert_eq!(book.looked.len(), 1);
    }
}
