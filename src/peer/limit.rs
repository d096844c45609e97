//! Limits on what a peer sends and fetches, in payload bytes a second: of all peers together, and of each.
//!
//! Who is about to move bytes takes them first, on the [`Lane`] of the peer they go to or come from, and waits until it
//! may. Bytes sent are taken chunk by chunk. Bytes fetched are taken claim by claim *before they are asked for*: what
//! was asked for arrives at the speed of the wire, whoever reads it, and cannot be held back any more.
//!
//! Invariant: without a limit, taking is one load. A waiter that is dropped charges nothing. The queue of a limit is
//! moved on by one task, which exists while somebody waits.

mod fair_queue;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep_until},
};

pub use self::fair_queue::Rates;
use self::fair_queue::{Ticket, Turn, Turns};
use crate::identity::PeerId;

/// No limit at all, as a rate.
const NONE: u64 = u64::MAX;
/// What is asked for at once under a limit, as a part of a second.
const AT_ONCE: u64 = 10;

/// The limits of both directions. Clones are the same limits.
#[derive(Clone, Default)]
pub struct Limits {
    /// On what is sent.
    pub upload: Limit,
    /// On what is fetched.
    pub download: Limit,
}

/// The limit of one direction. Clones are the same limit.
#[derive(Clone)]
pub struct Limit(Arc<Shared>);

struct Shared {
    /// The lower one of the two rates, or [`NONE`].
    lowest: AtomicU64,
    queue: Mutex<Queue>,
    /// The queue's task has to look again.
    changed: Notify,
}

#[derive(Default)]
struct Queue {
    turns: Turns,
    waiting: HashMap<Ticket, oneshot::Sender<()>>,
    /// When the queue's task looks next; none: there is no such task.
    looks_at: Option<Instant>,
}

impl Default for Limit {
    fn default() -> Self {
        Self::new(Rates::default())
    }
}

impl Limit {
    /// A limit that begins with these rates.
    #[must_use]
    pub fn new(rates: Rates) -> Self {
        let shared = Shared {
            lowest: AtomicU64::new(NONE),
            queue: Mutex::default(),
            changed: Notify::new(),
        };
        let limit = Self(Arc::new(shared));
        limit.set(rates);
        limit
    }

    /// The present rates.
    #[must_use]
    pub fn rates(&self) -> Rates {
        self.0.lock().turns.rates()
    }

    /// Changes the rates, at once and for those who wait too.
    pub fn set(&self, rates: Rates) {
        let lowest = rates
            .total
            .unwrap_or(NONE)
            .min(rates.per_peer.unwrap_or(NONE));
        self.0.lock().turns.set(rates, Instant::now().into_std());
        self.0.lowest.store(lowest, Ordering::Relaxed);
        self.0.changed.notify_one();
    }

    /// The way of bytes to or from a peer; all lanes of a peer share its rate and its turn. Cheap: one for each stream.
    #[must_use]
    pub fn lane(&self, peer: PeerId) -> Lane {
        Lane {
            shared: self.0.clone(),
            peer,
        }
    }
}

/// The way of bytes to or from one peer.
#[derive(Clone)]
pub struct Lane {
    shared: Arc<Shared>,
    peer: PeerId,
}

impl Lane {
    /// Waits until so many bytes may go, and says how long that was. More than the limit brings in 100 ms go too, and
    /// those that come after wait for it. Dropping the future gives the place in the queue back.
    pub async fn take(&self, bytes: u32) -> Duration {
        if self.rate_hint().is_none() {
            return Duration::ZERO;
        }
        let began = Instant::now();
        let Some((mut place, granted)) = self.queue_up(bytes, began) else {
            return Duration::ZERO;
        };
        // Cannot fail: the sender is dropped unused only with the place.
        let _ = granted.await;
        place.is_over = true;
        began.elapsed()
    }

    /// `used` bytes went instead of the `taken` ones: the difference is given back, or makes the next ones wait.
    pub fn correct(&self, taken: u32, used: u32) {
        if taken != used && self.rate_hint().is_some() {
            self.shared
                .lock()
                .turns
                .correct(self.peer, taken, used, Instant::now().into_std());
            self.shared.changed.notify_one();
        }
    }

    /// Bytes a second that this peer may expect at most; none: no limit.
    #[must_use]
    pub fn rate_hint(&self) -> Option<u64> {
        Some(self.shared.lowest.load(Ordering::Relaxed)).filter(|rate| *rate != NONE)
    }

    /// As many of `n` things of `len` bytes as may be asked for at once: 100 ms worth, at least one.
    #[must_use]
    pub fn at_once(&self, n: u32, len: u32) -> u32 {
        let Some(rate) = self.rate_hint() else {
            return n;
        };
        let most = rate / AT_ONCE / u64::from(len.max(1));
        n.min(u32::try_from(most).unwrap_or(u32::MAX).max(1))
    }

    /// A place in the queue; none if the bytes may go now.
    fn queue_up(&self, bytes: u32, now: Instant) -> Option<(Place<'_>, oneshot::Receiver<()>)> {
        let (grant, granted) = oneshot::channel();
        let mut queue = self.shared.lock();
        let ticket = queue.turns.ask(self.peer, bytes, now.into_std());
        queue.waiting.insert(ticket, grant);
        let next = queue.grant(now);
        if !queue.waiting.contains_key(&ticket) {
            return None;
        }
        match (next, queue.looks_at) {
            (Some(at), Some(looks_at)) if at < looks_at => self.shared.changed.notify_one(),
            (Some(at), None) => {
                queue.looks_at = Some(at);
                tokio::spawn(self.shared.clone().run());
            }
            _ => {}
        }
        Some((
            Place {
                lane: self,
                bytes,
                ticket,
                is_over: false,
            },
            granted,
        ))
    }
}

/// Somebody's place in the queue.
struct Place<'a> {
    lane: &'a Lane,
    bytes: u32,
    ticket: Ticket,
    is_over: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let Lane { shared, peer } = self.lane;
        let mut queue = shared.lock();
        queue.waiting.remove(&self.ticket);
        if !queue.turns.cancel(*peer, self.ticket) {
            queue
                .turns
                .correct(*peer, self.bytes, 0, Instant::now().into_std());
        }
        drop(queue);
        shared.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no panic while the lock is held")
    }

    /// Grants what may go when it may, until nobody waits.
    async fn run(self: Arc<Self>) {
        while let Some(at) = self.look() {
            tokio::select! { () = sleep_until(at) => {}, () = self.changed.notified() => {} }
        }
    }

    fn look(&self) -> Option<Instant> {
        let mut queue = self.lock();
        queue.looks_at = queue.grant(Instant::now());
        queue.looks_at
    }
}

impl Queue {
    /// Grants what may go now; gives the time to look again, if somebody waits.
    fn grant(&mut self, now: Instant) -> Option<Instant> {
        loop {
            match self.turns.next(now.into_std()) {
                Turn::Granted(ticket) => {
                    if let Some(grant) = self.waiting.remove(&ticket) {
                        // Who is gone by now gives the bytes back.
                        let _ = grant.send(());
                    }
                }
                Turn::At(at) => return Some(Instant::from_std(at)),
                Turn::Idle => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, future::join_all};

    use super::*;

    const KIB: u32 = 1 << 10;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn limit(total: impl Into<Option<u64>>, per_peer: impl Into<Option<u64>>) -> Limit {
        Limit::new(Rates {
            total: total.into(),
            per_peer: per_peer.into(),
        })
    }

    /// Takes bytes on so many lanes of each peer until the time is over; gives what each peer got.
    async fn greedy(
        limit: &Limit,
        peers: u8,
        lanes: usize,
        bytes: u32,
        time: Duration,
    ) -> Vec<u64> {
        let end = Instant::now() + time;
        let work = |n: u8| {
            let lanes = (0..lanes).map(move |_| {
                let lane = limit.lane(peer(n));
                async move {
                    let mut had = 0;
                    while tokio::time::timeout_at(end, lane.take(bytes)).await.is_ok() {
                        had += u64::from(bytes);
                    }
                    had
                }
            });
            async { join_all(lanes).await.iter().sum() }
        };
        join_all((0..peers).map(work)).await
    }

    #[track_caller]
    fn assert_near(is: u64, wanted: u64) {
        assert!(
            is.abs_diff(wanted) * 50 <= wanted,
            "{is} is not within 2 % of {wanted}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn ten_seconds_bring_ten_times_the_rate_shared_alike() {
        let limit = limit(20_000_000, None);
        // What has gathered is for who comes first.
        limit.lane(peer(9)).take(2_000_000).await;
        let had = greedy(&limit, 4, 3, 64 * KIB, Duration::from_secs(10)).await;
        assert_near(had.iter().sum(), 200_000_000);
        had.iter().for_each(|had| assert_near(*had, 50_000_000));
        let slow = self::limit(None, 1_000_000);
        let had = greedy(&slow, 3, 2, 32 * KIB, Duration::from_secs(10)).await;
        had.iter().for_each(|had| assert_near(*had, 10_000_000));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nobody_waits() {
        let limit = limit(None, None);
        let lane = limit.lane(peer(1));
        for _ in 0..1000 {
            assert_eq!(lane.take(u32::MAX).now_or_never(), Some(Duration::ZERO));
        }
        assert_eq!(
            (lane.rate_hint(), lane.at_once(1024, 1 << 20)),
            (None, 1024)
        );
        limit.set(Rates {
            total: Some(10 << 20),
            per_peer: Some(5 << 20),
        });
        assert_eq!(
            (
                lane.rate_hint(),
                lane.at_once(1024, 1 << 18),
                lane.at_once(9, 1 << 24)
            ),
            (Some(5 << 20), 2, 1)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_held_back_is_told() {
        let lane = limit(1_000_000, None).lane(peer(1));
        assert_eq!(lane.take(1_100_000).await, Duration::ZERO);
        let held = lane.take(10_000).await;
        assert!((1_005..=1_015).contains(&held.as_millis()), "{held:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_rate_frees_those_who_wait() {
        let limit = limit(16 << 10, None);
        let lane = limit.lane(peer(1));
        lane.take(1 << 30).await;
        let began = Instant::now();
        let waiting = tokio::spawn({
            let lane = lane.clone();
            async move { lane.take(1 << 20).await }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        limit.set(Rates {
            total: Some(1 << 30),
            per_peer: None,
        });
        waiting.await.unwrap();
        assert!(
            began.elapsed() < Duration::from_millis(6_100),
            "{:?}",
            began.elapsed()
        );
        lane.take(1 << 30).await;
        lane.take(1 << 30).await;
        let waiting = tokio::spawn(async move { lane.take(1 << 20).await });
        tokio::task::yield_now().await;
        limit.set(Rates::default());
        assert!(waiting.await.unwrap() < Duration::from_millis(10));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_dropped_gives_its_place_and_its_bytes_back() {
        let limit = limit(1_000_000, None);
        let lane = limit.lane(peer(1));
        lane.take(1_000_000).await;
        for _ in 0..10 {
            assert!(lane.take(50_000_000).now_or_never().is_none());
        }
        let mut dropped = Box::pin(lane.take(900_000));
        assert!(dropped.as_mut().now_or_never().is_none());
        // It is granted, and dropped before it knows.
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(limit.0.lock().waiting.is_empty());
        drop(dropped);
        assert_eq!(
            limit.lane(peer(2)).take(90_000).await,
            Duration::ZERO,
            "the bucket is full again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_used_is_not_charged() {
        let limit = limit(1_000_000, None);
        let lane = limit.lane(peer(1));
        for _ in 0..100 {
            assert_eq!(lane.take(50_000_000).await, Duration::ZERO);
            lane.correct(50_000_000, 0);
        }
        lane.correct(0, 1_000_000);
        assert!(lane.take(1).await >= Duration::from_millis(800));
    }
}
