//! Who wants which content of this peer, and to whom the first copy of each piece was promised.
//!
//! A seed that sends every piece once before any twice gives a swarm its whole uplink: what one receiver got, it passes
//! on. So a claim with `first_copies` is cut at the first piece that was promised to another receiver who is still here
//! and can be reached, and all watchers hear of promises, so that they need not ask in vain.
//!
//! Invariant: a promise lives no longer than its receiver's last watch; what is remembered is bounded by the pieces of
//! the contents that are watched, and by the watchers.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::watch;

use crate::{catalog::Announcement, content::ContentId, identity::PeerId};

/// Promises that are told to those who watch; who lags further behind misses some and asks in vain.
const MAX_LOG: usize = 1 << 17;
/// First copies that a crowd gets in one round of claims, at the least. Who came before the others has long claims.
const LEAST_SHARED: usize = 16;

/// The crowds of all contents.
#[derive(Clone, Default)]
pub(super) struct Crowds(Arc<Shared>);

struct Shared {
    crowds: Mutex<HashMap<ContentId, Crowd>>,
    changed: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            crowds: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }
}

/// Those who watch one content.
#[derive(Default)]
struct Crowd {
    /// By a number for each watch.
    watchers: BTreeMap<u64, Arc<Announcement>>,
    promised: HashMap<u32, PeerId>,
    log: Vec<(u32, PeerId)>,
    /// Entries that were dropped from the log.
    forgotten: usize,
}

/// One watch of some contents; ends when dropped.
pub(super) struct Watch {
    crowds: Crowds,
    number: u64,
    pub(super) announcement: Arc<Announcement>,
    contents: Vec<ContentId>,
}

impl Crowds {
    fn lock(&self) -> MutexGuard<'_, HashMap<ContentId, Crowd>> {
        self.0
            .crowds
            .lock()
            .expect("no panic while the lock is held")
    }

    /// Changes when a crowd does.
    pub(super) fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    fn tell(&self) {
        self.0.changed.send_modify(|n| *n += 1);
    }

    /// Joins the crowds of these contents.
    pub(super) fn join(&self, contents: Vec<ContentId>, announcement: Announcement) -> Watch {
        let announcement = Arc::new(announcement);
        let mut crowds = self.lock();
        let number = {
            let mut next = 0;
            self.0.changed.send_modify(|n| {
                *n += 1;
                next = *n;
            });
            next
        };
        for id in &contents {
            crowds
                .entry(*id)
                .or_default()
                .watchers
                .insert(number, announcement.clone());
        }
        drop(crowds);
        Watch {
            crowds: self.clone(),
            number,
            announcement,
            contents,
        }
    }

    /// Does anybody but `peer` watch one of these contents?
    pub(super) fn has_others(
        &self,
        contents: impl IntoIterator<Item = ContentId>,
        peer: PeerId,
    ) -> bool {
        let crowds = self.lock();
        let mut watchers = contents
            .into_iter()
            .filter_map(|id| crowds.get(&id))
            .flat_map(|crowd| crowd.watchers.values());
        watchers.any(|other| other.peer != peer)
    }

    /// How many of these pieces, from the first on, `peer` may have now, after `n_sent` in the same range. All of them,
    /// unless it wants `first_copies` only and there are others who watch: then one, or none if that is another's or `peer`
    /// had its share for once. They are promised to it if it is in the crowd and others can reach it.
    pub(super) fn promise(
        &self,
        id: ContentId,
        pieces: std::ops::Range<u32>,
        peer: PeerId,
        first_copies: bool,
        n_sent: u32,
    ) -> u32 {
        let mut crowds = self.lock();
        let Some(crowd) = crowds.get_mut(&id) else {
            return pieces.end - pieces.start;
        };
        let passes_on = crowd
            .watchers
            .values()
            .any(|other| other.peer == peer && !other.addresses.is_empty());
        let has_others = crowd.watchers.values().any(|other| other.peer != peer);
        let share = (LEAST_SHARED / crowd.watchers.len().max(1)).max(1);
        let most = match first_copies && has_others {
            true if n_sent as usize >= share => 0,
            true => 1,
            false => usize::MAX,
        };
        let mut told = false;
        let mut n = 0;
        for piece in pieces.take(most) {
            match crowd.promised.get(&piece) {
                Some(other) if *other != peer && first_copies => break,
                Some(_) => {}
                None if passes_on => {
                    crowd.promised.insert(piece, peer);
                    crowd.log.push((piece, peer));
                    told = true;
                }
                None => {}
            }
            n += 1;
        }
        if crowd.log.len() > MAX_LOG {
            crowd.log.drain(..MAX_LOG / 2);
            crowd.forgotten += MAX_LOG / 2;
        }
        drop(crowds);
        if told && has_others {
            self.tell();
        }
        n
    }
}

impl Watch {
    /// Everybody else who watches a content, with addresses for whoever holds this watch.
    pub(super) fn others(&self, id: &ContentId) -> Vec<Arc<Announcement>> {
        let crowds = self.crowds.lock();
        let watchers = crowds
            .get(id)
            .into_iter()
            .flat_map(|crowd| crowd.watchers.values());
        watchers
            .filter(|other| other.peer != self.announcement.peer)
            .cloned()
            .collect()
    }

    /// Pieces that were promised to others since `seen`, a place in the log that moves on.
    pub(super) fn promised(&self, id: &ContentId, seen: &mut usize) -> Vec<u32> {
        let crowds = self.crowds.lock();
        let Some(crowd) = crowds.get(id) else {
            return vec![];
        };
        let news = crowd
            .log
            .get(seen.saturating_sub(crowd.forgotten)..)
            .unwrap_or_default();
        *seen = crowd.forgotten + crowd.log.len();
        let me = self.announcement.peer;
        let still =
            |(piece, peer): &&(u32, PeerId)| *peer != me && crowd.promised.get(piece) == Some(peer);
        news.iter().filter(still).map(|(piece, _)| *piece).collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut crowds = self.crowds.lock();
        for id in &self.contents {
            let Some(crowd) = crowds.get_mut(id) else {
                continue;
            };
            crowd.watchers.remove(&self.number);
            let peer = self.announcement.peer;
            if !crowd.watchers.values().any(|other| other.peer == peer) {
                crowd.promised.retain(|_, to| *to != peer);
            }
            if crowd.watchers.is_empty() {
                crowds.remove(id);
            }
        }
        drop(crowds);
        self.crowds.tell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ContentId = ContentId::EMPTY;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn join(crowds: &Crowds, n: u8) -> Watch {
        let addresses = if n == 0 {
            vec![]
        } else {
            vec![format!("10.0.0.{n}:7701")]
        };
        let announcement = Announcement {
            peer: peer(n),
            generation: 0,
            addresses,
            seen_over_loopback: false,
        };
        crowds.join(vec![ID], announcement)
    }

    #[test]
    fn a_first_copy_goes_to_one_receiver() {
        let crowds = Crowds::default();
        let a = join(&crowds, 1);
        assert_eq!(
            crowds.promise(ID, 0..4, peer(1), true, 0),
            4,
            "alone it may have all at once"
        );
        let b = join(&crowds, 2);
        assert_eq!(crowds.promise(ID, 2..8, peer(2), true, 0), 0);
        for piece in 4..8 {
            assert_eq!(
                crowds.promise(ID, piece..8, peer(2), true, 0),
                1,
                "one at a time"
            );
        }
        assert_eq!(
            crowds.promise(ID, 3..8, peer(1), true, 0),
            1,
            "its own piece again"
        );
        assert_eq!(
            crowds.promise(ID, 4..8, peer(1), true, 0),
            0,
            "not the other's"
        );
        assert_eq!(
            crowds.promise(ID, 0..8, peer(2), false, 0),
            8,
            "a second copy when it is asked for"
        );
        let (mut seen, mut twice) = (0, 0);
        assert_eq!(b.promised(&ID, &mut seen), [0, 1, 2, 3]);
        assert!(b.promised(&ID, &mut seen).is_empty());
        assert_eq!(a.promised(&ID, &mut twice), [4, 5, 6, 7]);
        assert_eq!(a.others(&ID).len(), 1);
        assert!(crowds.has_others([ID], peer(1)) && crowds.has_others([ID], peer(2)));
        assert_eq!(
            crowds.promise(ID, 8..99, peer(1), true, 8),
            0,
            "half of a round is the most for one of two"
        );
        drop(a);
        assert!(!crowds.has_others([ID], peer(2)));
        assert_eq!(
            crowds.promise(ID, 0..4, peer(2), true, 0),
            4,
            "promises end with their receiver"
        );
        drop(b);
        assert!(crowds.lock().is_empty());
    }

    #[test]
    fn who_passes_nothing_on_is_promised_nothing() {
        let crowds = Crowds::default();
        let (_mute, _other) = (join(&crowds, 0), join(&crowds, 2));
        assert_eq!(crowds.promise(ID, 0..4, peer(0), true, 0), 1);
        assert_eq!(
            crowds.promise(ID, 0..4, peer(9), true, 0),
            1,
            "nor who does not watch"
        );
        assert_eq!(crowds.promise(ID, 0..4, peer(2), true, 0), 1);
        assert_eq!(crowds.promise(ID, 0..4, peer(9), true, 0), 0);
    }
}
