//! Whose bytes may go next, and when: token buckets under a fair queue of peers.
//!
//! Pure: time is an argument.
//!
//! - **Rate.** A bucket fills with its rate up to what that brings in 100 ms; a grant takes its bytes out. A grant needs
//!   its bytes in the bucket, or 50 ms worth if that is less, and may leave a debt: so bytes that no bucket could hold
//!   are granted too, and who looks up to 50 ms late loses nothing. In any time t goes at most rate × (t + 100 ms), or
//!   rate × (t + 50 ms) and one grant if that is more.
//! - **Fairness** is start-time fair queueing: of the peers whose own bucket allows it, the one that has had the fewest
//!   bytes goes first. Of two peers that keep asking, neither is ahead by more than the longest grant of each. Who comes
//!   back after a pause, or was held up by its own bucket, begins where the others are: nothing is saved up.
//! - Within a peer, first come, first served.
//!
//! Invariant: memory is that of the waiting, and of the peers whose last grant still counts.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::identity::PeerId;

/// What a bucket holds at most, as a time at its rate.
const BURST: f64 = 0.1;
/// What a grant needs at most, as a time at the bucket's rate.
const NEED: f64 = 0.05;

/// The limits of one direction, payload bytes a second; none: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of all peers together.
    pub total: Option<u64>,
    /// Of each peer.
    pub per_peer: Option<u64>,
}

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Ticket(u64);

/// What can be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// These bytes may go; they are charged.
    Granted(Ticket),
    /// Nobody's may; look again then.
    At(Instant),
    /// Nobody waits.
    Idle,
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Turns {
    rates: Rates,
    total: Option<Bucket>,
    peers: HashMap<PeerId, Peer>,
    /// Where the latest grant began, on the scale of [`Peer::start`].
    now_at: u64,
    n_tickets: u64,
}

#[derive(Debug, Default)]
struct Peer {
    bucket: Option<Bucket>,
    waiting: VecDeque<(Ticket, u32)>,
    /// Bytes this peer has had, on a scale that all share: a pause counts as if it had gone on.
    start: u64,
}

impl Turns {
    pub(super) const fn rates(&self) -> Rates {
        self.rates
    }

    /// Queues up for so many bytes.
    pub(super) fn ask(&mut self, id: PeerId, bytes: u32, now: Instant) -> Ticket {
        if !self.peers.contains_key(&id) {
            let latest = self.now_at;
            self.peers.retain(|_, peer| peer.counts(latest, now));
            let bucket = self.rates.per_peer.map(|rate| Bucket::full(rate, now));
            self.peers.insert(
                id,
                Peer {
                    bucket,
                    ..Peer::default()
                },
            );
        }
        self.n_tickets += 1;
        let ticket = Ticket(self.n_tickets);
        let peer = self.peers.entry(id).or_default();
        if peer.waiting.is_empty() {
            peer.start = peer.start.max(self.now_at);
        }
        peer.waiting.push_back((ticket, bytes));
        ticket
    }

    /// Grants the next one's bytes if they may go now.
    pub(super) fn next(&mut self, now: Instant) -> Turn {
        let mut first: Option<((u64, Ticket), PeerId, u32)> = None;
        let mut soonest: Option<Instant> = None;
        for (id, peer) in &self.peers {
            let Some(&(ticket, bytes)) = peer.waiting.front() else {
                continue;
            };
            let at = peer
                .bucket
                .as_ref()
                .map_or(now, |bucket| bucket.ready_at(bytes));
            if at > now {
                soonest = Some(soonest.map_or(at, |soonest| soonest.min(at)));
            } else if first.is_none_or(|(order, ..)| (peer.start, ticket) < order) {
                first = Some(((peer.start, ticket), *id, bytes));
            }
        }
        let Some(((_, ticket), id, bytes)) = first else {
            if let Some(at) = soonest {
                return Turn::At(at);
            }
            // Nobody was kept waiting for what another had: all are even.
            self.now_at = self
                .peers
                .values()
                .map(|peer| peer.start)
                .max()
                .unwrap_or(self.now_at);
            return Turn::Idle;
        };
        if let Some(total) = &mut self.total {
            let at = total.ready_at(bytes);
            if at > now {
                return Turn::At(at);
            }
            total.take(bytes.into(), now);
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.waiting.pop_front();
            if let Some(bucket) = &mut peer.bucket {
                bucket.take(bytes.into(), now);
            }
            self.now_at = self.now_at.max(peer.start);
            peer.start = (peer.start + u64::from(bytes)).max(self.now_at);
        }
        Turn::Granted(ticket)
    }

    /// Leaves the queue; false if the bytes were granted.
    pub(super) fn cancel(&mut self, id: PeerId, ticket: Ticket) -> bool {
        let Some(peer) = self.peers.get_mut(&id) else {
            return false;
        };
        let place = peer
            .waiting
            .iter()
            .position(|(waiting, _)| *waiting == ticket);
        place.and_then(|place| peer.waiting.remove(place)).is_some()
    }

    /// `used` bytes went instead of the `granted` ones: the difference is given back, or becomes a debt.
    pub(super) fn correct(&mut self, id: PeerId, granted: u32, used: u32, now: Instant) {
        let more = f64::from(used) - f64::from(granted);
        if let Some(total) = &mut self.total {
            total.take(more, now);
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            if let Some(bucket) = &mut peer.bucket {
                bucket.take(more, now);
            }
            peer.start = (peer.start + u64::from(used)).saturating_sub(granted.into());
        }
    }

    /// Changes the limits, for those who wait too.
    pub(super) fn set(&mut self, rates: Rates, now: Instant) {
        self.rates = rates;
        Bucket::change(&mut self.total, rates.total, now);
        for peer in self.peers.values_mut() {
            Bucket::change(&mut peer.bucket, rates.per_peer, now);
        }
    }
}

impl Peer {
    /// Must it be remembered?
    fn counts(&self, latest: u64, now: Instant) -> bool {
        !self.waiting.is_empty()
            || self.start > latest
            || self
                .bucket
                .as_ref()
                .is_some_and(|bucket| !bucket.is_full(now))
    }
}

/// Bytes that may go: the level at a time, which rises with the rate. A negative level is a debt.
#[derive(Debug)]
struct Bucket {
    rate: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(rate: u64, now: Instant) -> Self {
        let rate = rate.max(1) as f64;
        Self {
            rate,
            level: rate * BURST,
            at: now,
        }
    }

    fn level(&self, now: Instant) -> f64 {
        let filled = self.level + self.rate * now.saturating_duration_since(self.at).as_secs_f64();
        filled.min(self.rate * BURST)
    }

    fn is_full(&self, now: Instant) -> bool {
        self.level(now) >= self.rate * BURST
    }

    /// When a grant of so many bytes is possible; in the past if it has been for a while.
    fn ready_at(&self, bytes: u32) -> Instant {
        let missing = f64::from(bytes).min(self.rate * NEED) - self.level;
        self.at + Duration::try_from_secs_f64(missing / self.rate).unwrap_or_default()
    }

    fn take(&mut self, bytes: f64, now: Instant) {
        self.level = (self.level(now) - bytes).min(self.rate * BURST);
        self.at = self.at.max(now);
    }

    /// A lower rate scales the level down with it, so that a debt does not get longer; a higher one leaves it.
    fn change(bucket: &mut Option<Self>, rate: Option<u64>, now: Instant) {
        *bucket = rate.map(|rate| {
            let new = Self::full(rate, now);
            match bucket.take() {
                None => new,
                Some(old) => Self {
                    level: old.level(now) * (new.rate / old.rate).min(1.0),
                    ..new
                },
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const SECOND: Duration = Duration::from_secs(1);

    fn peer(n: usize) -> PeerId {
        PeerId::from_bytes([u8::try_from(n).unwrap(); 32])
    }

    fn rates(total: impl Into<Option<u64>>, per_peer: impl Into<Option<u64>>) -> Rates {
        Rates {
            total: total.into(),
            per_peer: per_peer.into(),
        }
    }

    /// A peer that asks for so many bytes at a time, over some streams; each asks again when it was granted, after a
    /// pause.
    #[derive(Clone, Debug)]
    struct Demand {
        bytes: u32,
        streams: usize,
        pause: Duration,
    }

    fn greedy(bytes: u32) -> Demand {
        Demand {
            bytes,
            streams: 2,
            pause: Duration::ZERO,
        }
    }

    /// What was granted: when, to whom, how much.
    type Log = Vec<(Duration, usize, u64)>;

    /// Plays demands against limits that change at times; the driver always looks late by `late`.
    fn play(
        demands: &[Demand],
        changes: &[(Duration, Rates)],
        late: Duration,
        end: Duration,
    ) -> Log {
        let start = Instant::now();
        let (mut turns, mut log, mut now) = (Turns::default(), Log::new(), start);
        let mut owners: HashMap<Ticket, usize> = HashMap::new();
        // Who asks when.
        let mut asking: Vec<(Instant, usize)> = demands
            .iter()
            .enumerate()
            .flat_map(|(i, demand)| vec![(start, i); demand.streams])
            .collect();
        let mut changes = changes.iter();
        let mut change = changes.next();
        while now < start + end {
            if let Some((_, rates)) = change.filter(|(at, _)| start + *at <= now) {
                turns.set(*rates, now);
                change = changes.next();
                continue;
            }
            asking.retain(|(at, i)| {
                let due = *at <= now;
                if due {
                    owners.insert(turns.ask(peer(*i), demands[*i].bytes, now), *i);
                }
                !due
            });
            let wake = match turns.next(now) {
                Turn::Granted(ticket) => {
                    let i = owners.remove(&ticket).unwrap();
                    log.push((now - start, i, demands[i].bytes.into()));
                    asking.push((now + demands[i].pause, i));
                    continue;
                }
                Turn::At(at) => {
                    assert!(at > now, "a time to come");
                    Some(at + late)
                }
                Turn::Idle => None,
            };
            let news = asking
                .iter()
                .map(|(at, _)| *at)
                .chain(change.map(|(at, _)| start + *at))
                .min();
            now = wake
                .into_iter()
                .chain(news)
                .min()
                .unwrap()
                .max(now + Duration::from_nanos(1));
        }
        log
    }

    fn sum(log: &[(Duration, usize, u64)], of: impl Fn(Duration, usize) -> bool) -> u64 {
        log.iter()
            .filter(|(at, i, _)| of(*at, *i))
            .map(|(.., bytes)| bytes)
            .sum()
    }

    fn assert_near(is: u64, wanted: u64, percent: f64) {
        let off = (is as f64 / wanted as f64 - 1.0).abs() * 100.0;
        assert!(off <= percent, "{is} is {off:.2} % from {wanted}");
    }

    #[test]
    fn without_limits_everything_goes_at_once() {
        let now = Instant::now();
        let mut turns = Turns::default();
        let tickets: Vec<_> = (0..100)
            .map(|i| turns.ask(peer(i % 7), u32::MAX, now))
            .collect();
        let granted: Vec<_> = std::iter::from_fn(|| match turns.next(now) {
            Turn::Granted(ticket) => Some(ticket),
            _ => None,
        })
        .collect();
        assert_eq!(granted.len(), tickets.len());
        assert_eq!(turns.next(now), Turn::Idle);
    }

    #[test]
    fn more_than_a_bucket_holds_is_debt() {
        let log = play(
            &[greedy(1 << 20)],
            &[(Duration::ZERO, rates(50_000, None))],
            Duration::ZERO,
            210 * SECOND,
        );
        assert_eq!(log[0].0, Duration::ZERO);
        assert_near(sum(&log, |at, _| at > Duration::ZERO), 210 * 50_000, 10.0);
        for pair in log.windows(2).skip(1) {
            assert_near(
                u64::try_from((pair[1].0 - pair[0].0).as_millis()).unwrap(),
                MIB / 50,
                0.1,
            );
        }
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let slow = rates(50_000, None);
        let fast = rates(50_000_000, None);
        let none = rates(None, None);
        let s = Duration::from_secs;
        let changes = [(s(0), slow), (s(1), fast), (s(2), slow), (s(32), none)];
        // Without a limit only the pause makes time pass.
        let demand = Demand {
            pause: Duration::from_micros(1),
            ..greedy(1 << 20)
        };
        let log = play(
            &[demand],
            &changes,
            Duration::ZERO,
            s(32) + Duration::from_millis(1),
        );
        assert_eq!(sum(&log, |at, _| at < s(1)), MIB, "in debt");
        assert_near(sum(&log, |at, _| at >= s(1) && at < s(2)), 50_000_000, 4.0);
        let crawl = sum(&log, |at, _| at >= s(2) && at < s(32));
        assert!(
            (MIB..=3 * MIB).contains(&crawl),
            "the fast one's debt was scaled: {crawl}"
        );
        assert!(sum(&log, |at, _| at >= s(32)) >= 100 * MIB, "released");
    }

    #[test]
    fn what_is_not_used_goes_to_the_others() {
        // The second asks for 64 KiB five times a second and gets them; the others share the rest.
        let modest = Demand {
            bytes: 64 << 10,
            streams: 1,
            pause: Duration::from_millis(200),
        };
        let demands = [greedy(64 << 10), modest, greedy(64 << 10)];
        let log = play(
            &demands,
            &[(Duration::ZERO, rates(10 * MIB, None))],
            Duration::ZERO,
            10 * SECOND,
        );
        let of = |i| sum(&log, |_, of| of == i);
        assert!(of(1) >= 45 * 64 * KIB, "{}", of(1));
        assert_near(of(0), (100 * MIB - of(1)) / 2, 2.0);
        assert_near(of(0) + of(1) + of(2), 100 * MIB, 2.0);
    }

    #[test]
    fn both_limits_hold() {
        let demands = vec![greedy(64 << 10); 3];
        let log = play(
            &demands,
            &[(Duration::ZERO, rates(10 * MIB, 2 * MIB))],
            Duration::ZERO,
            10 * SECOND,
        );
        (0..3).for_each(|i| assert_near(sum(&log, |_, of| of == i), 20 * MIB, 2.0));
        let demands = vec![greedy(64 << 10); 10];
        let log = play(
            &demands,
            &[(Duration::ZERO, rates(10 * MIB, 2 * MIB))],
            Duration::ZERO,
            10 * SECOND,
        );
        assert_near(sum(&log, |_, _| true), 100 * MIB, 2.0);
    }

    #[test]
    fn who_leaves_gives_its_place_back() {
        let now = Instant::now();
        let mut turns = Turns::default();
        turns.set(rates(100_000, None), now);
        let first = turns.ask(peer(1), 1_000_000, now);
        assert_eq!(turns.next(now), Turn::Granted(first));
        let (second, third) = (turns.ask(peer(1), 5, now), turns.ask(peer(1), 7, now));
        assert!(matches!(turns.next(now), Turn::At(at) if at > now + 9 * SECOND));
        assert!(
            turns.cancel(peer(1), second)
                && !turns.cancel(peer(1), second)
                && !turns.cancel(peer(2), third)
        );
        // The long one went unused.
        turns.correct(peer(1), 1_000_000, 0, now);
        assert_eq!(turns.next(now), Turn::Granted(third));
        assert_eq!(turns.next(now), Turn::Idle);
        turns.correct(peer(1), 0, 1_000_000, now);
        turns.ask(peer(1), 5, now);
        assert!(matches!(turns.next(now), Turn::At(at) if at > now + 9 * SECOND));
    }

    #[test]
    fn peers_of_the_past_are_forgotten() {
        let start = Instant::now();
        let mut turns = Turns::default();
        turns.set(rates(10 * MIB, MIB), start);
        for i in 0..10_000_usize {
            let now = start + SECOND * u32::try_from(i).unwrap();
            turns.ask(peer(i % 250), 1000, now);
            assert!(matches!(turns.next(now), Turn::Granted(_)) && turns.next(now) == Turn::Idle);
            assert!(turns.peers.len() < 8, "{}", turns.peers.len());
        }
    }

    fn demand() -> impl Strategy<Value = Demand> {
        (
            prop_oneof![Just(16_u32 << 10), 1_u32..=300_000],
            1_usize..4,
            0_u64..30,
        )
            .prop_map(|(bytes, streams, pause)| Demand {
                bytes,
                streams,
                pause: Duration::from_millis(pause),
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever they ask for, ten seconds of any part of it bring no more than the rate, and a steady demand all of it.
        #[test]
        fn the_rate_is_true_over_ten_seconds(
            mut demands in proptest::collection::vec(demand(), 1..8),
            total in 4 * MIB..100 * MIB,
            per_peer in prop_oneof![Just(None), (2 * MIB..50 * MIB).prop_map(Some)],
            late in 0_u64..25,
        ) {
            demands.iter_mut().for_each(|demand| demand.bytes = demand.bytes.min(u32::try_from(total / 20).unwrap()));
            demands[0] = greedy(demands[0].bytes);
            let late = Duration::from_millis(late);
            let log = play(&demands, &[(Duration::ZERO, rates(total, per_peer))], late, 12 * SECOND);
            for begin in [0, 137, 1_000, 1_999].map(Duration::from_millis) {
                let window = |at: Duration| at >= begin && at < begin + 10 * SECOND;
                prop_assert!(sum(&log, |at, _| window(at)) as f64 <= total as f64 * 10.2);
                for (i, demand) in demands.iter().enumerate() {
                    let most = per_peer.unwrap_or(u64::MAX) as f64 * 10.0 + demand.bytes as f64
                        + per_peer.unwrap_or(0) as f64 / 10.0;
                    prop_assert!(sum(&log, |at, of| window(at) && of == i) as f64 <= most);
                }
                if per_peer.is_none() {
                    prop_assert!(sum(&log, |at, _| window(at)) as f64 >= total as f64 * 9.8);
                }
            }
        }

        /// No two that always ask are apart by more than what each is granted at once; so nobody starves.
        #[test]
        fn peers_that_keep_asking_get_the_same(
            sizes in proptest::collection::vec(1_000_u32..200_000, 2..8),
            streams in 2_usize..5,
            total in MIB..50 * MIB,
            per_peer in prop_oneof![Just(None), Just(Some(20 * MIB))],
            late in 0_u64..25,
        ) {
            let demands: Vec<_> = sizes.iter().map(|size| Demand { bytes: *size, streams, pause: Duration::ZERO }).collect();
            let log = play(&demands, &[(Duration::ZERO, rates(total, per_peer))], Duration::from_millis(late), 5 * SECOND);
            let had: Vec<u64> = (0..demands.len()).map(|i| sum(&log, |_, of| of == i)).collect();
            let most = u64::from(*sizes.iter().max().unwrap());
            for (i, a) in had.iter().enumerate() {
                for (j, b) in had.iter().enumerate() {
                    prop_assert!(a.abs_diff(*b) <= u64::from(sizes[i]) + u64::from(sizes[j]) + most, "{:?}", had);
                }
            }
        }

        /// Whatever happens, every request is granted in the end, in the peer's own order.
        #[test]
        fn nobody_waits_forever(
            steps in proptest::collection::vec((0_u8..6, 0_usize..4, 1_u32..1 << 20, 16 * KIB..MIB, 0_u64..500), 1..120),
        ) {
            let mut now = Instant::now();
            let mut turns = Turns::default();
            let mut waiting: HashMap<usize, VecDeque<Ticket>> = HashMap::new();
            for (what, i, bytes, rate, millis) in steps {
                now += Duration::from_millis(millis);
                match what {
                    0 => turns.set(rates(rate, None), now),
                    1 => turns.set(rates(rate * 4, rate), now),
                    2 => {
                        if let Some(ticket) = waiting.entry(i).or_default().pop_back() {
                            prop_assert!(turns.cancel(peer(i), ticket));
                        }
                    }
                    3 => turns.correct(peer(i), bytes, 0, now),
                    _ => waiting.entry(i).or_default().push_back(turns.ask(peer(i), bytes, now)),
                }
            }
            for _ in 0..1000 {
                match turns.next(now) {
                    Turn::Granted(ticket) => {
                        let owner = waiting.values_mut().find(|queue| queue.front() == Some(&ticket));
                        prop_assert!(owner.is_some(), "out of order");
                        owner.unwrap().pop_front();
                    }
                    Turn::At(at) => {
                        prop_assert!(at > now && at < now + 200 * SECOND, "{:?}", at - now);
                        now = at;
                    }
                    Turn::Idle => break,
                }
            }
            prop_assert!(waiting.values().all(VecDeque::is_empty));
        }
    }
}
