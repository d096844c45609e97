//! Whole Downloads in simulated time: sources with speeds, round trips, lies, deaths, joins and leaves.

use super::tests::{Dice, PIECE_LEN, SECOND, map};
use super::*;
use crate::peer::fetch::pace::{Flight, Pace};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Sends wrong bytes in so many percent of pieces.
    Lies(u32),
    /// Falls silent after so many pieces, with its connection open.
    Silent(u32),
    /// Says it has what it has not, in so many percent of pieces.
    Lacks(u32),
}

struct Peer {
    bytes_per_second: u32,
    round_trip: Duration,
    fault: Fault,
    have: HaveMap,
    online: bool,
    pace: Pace,
    /// Requests under way in the order they are answered.
    flights: VecDeque<(Flight, VecDeque<u32>)>,
    /// Raised when the flights are gone, so that events for them are void.
    life: u32,
    wake_at: Option<Instant>,
    n_sent: u32,
    n_new: u32,
}

impl Peer {
    fn new(bytes_per_second: u32, have: HaveMap) -> Self {
        Self {
            bytes_per_second,
            round_trip: Duration::from_millis(5),
            fault: Fault::None,
            have,
            online: false,
            pace: Pace::new(PIECE_LEN),
            flights: VecDeque::new(),
            life: 0,
            wake_at: None,
            n_sent: 0,
            n_new: 0,
        }
    }

    fn bytes_to_come(&self) -> u64 {
        self.flights
            .iter()
            .map(|(_, pieces)| pieces.len() as u64 * u64::from(PIECE_LEN))
            .sum()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Join(usize),
    Leave(usize),
    Gain(usize, u32),
    Wake(usize),
    Deliver(usize, u32),
    Stall(usize, u32),
    /// This machine brings the piece itself, or (not true) fails to.
    Local(u32, bool),
    Lose(u32),
    Promised(u32),
}

/// Who brings local pieces.
const LOCAL: SourceKey = SourceKey(1000);

struct Simulation {
    picker: Picker,
    peers: Vec<Peer>,
    events: BinaryHeap<Reverse<(Instant, u32, Event)>>,
    n_events: u32,
    dice: Dice,
    start: Instant,
    now: Instant,
    n_duplicates: u32,
    n_wrong: u32,
}

impl Simulation {
    fn new(n_pieces: u32, seed: u64) -> Self {
        let start = Instant::now();
        Self {
            picker: Picker::new(n_pieces, seed),
            peers: Vec::new(),
            events: BinaryHeap::new(),
            n_events: 0,
            dice: Dice(seed ^ 0x5eed),
            start,
            now: start,
            n_duplicates: 0,
            n_wrong: 0,
        }
    }

    fn add(&mut self, peer: Peer, joins_after: Duration) -> usize {
        self.peers.push(peer);
        self.at(self.start + joins_after, Event::Join(self.peers.len() - 1));
        self.peers.len() - 1
    }

    fn at(&mut self, when: Instant, event: Event) {
        self.n_events += 1;
        self.events.push(Reverse((when, self.n_events, event)));
    }

    /// Until all is done or nothing more will happen; the time that took.
    fn run(&mut self) -> Duration {
        while !self.picker.is_done()
            && let Some(Reverse((now, _, event))) = self.events.pop()
        {
            self.now = now;
            self.happen(event);
            for i in 0..self.peers.len() {
                self.ask(i);
            }
            if self.n_events.is_multiple_of(256) {
                self.picker.board.check();
            }
            assert!(
                self.n_events < 500_000,
                "{:?} and still {}",
                self.now - self.start,
                self.picker.remaining()
            );
        }
        self.now - self.start
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Join(i) => {
                self.peers[i].online = true;
                self.picker.set_have(key(i), &self.peers[i].have);
            }
            Event::Leave(i) => {
                self.hang_up(i);
                self.peers[i].online = false;
                self.picker.remove_source(key(i));
            }
            Event::Gain(i, piece) => {
                self.peers[i].have.insert(piece);
                self.picker.add_have(key(i), piece);
            }
            Event::Wake(i) => self.peers[i].wake_at = None,
            Event::Deliver(i, life) if life == self.peers[i].life => self.deliver(i),
            Event::Stall(i, life) if life == self.peers[i].life => {
                let peer = &mut self.peers[i];
                assert!(peer.pace.stalled(&mut peer.flights[0].0, self.now));
                self.happen(Event::Leave(i));
            }
            Event::Deliver(..) | Event::Stall(..) => {}
            Event::Local(piece, true) => _ = self.picker.received(LOCAL, piece),
            Event::Local(piece, false) => self.picker.release(LOCAL, &[piece]),
            Event::Lose(piece) => self.picker.lose([piece]),
            Event::Promised(piece) => self.picker.promised([piece], self.now),
        }
    }

    fn hang_up(&mut self, i: usize) {
        let peer = &mut self.peers[i];
        peer.life += 1;
        for (flight, pieces) in std::mem::take(&mut peer.flights) {
            peer.pace.end(flight, self.now);
            self.picker.release(key(i), pieces.as_slices().0);
            self.picker.release(key(i), pieces.as_slices().1);
        }
    }

    /// As a caller does: a second request before the first runs dry.
    fn ask(&mut self, i: usize) {
        let peer = &self.peers[i];
        let wants = peer.flights.is_empty() || peer.bytes_to_come() < peer.pace.lead_bytes();
        if !peer.online || !wants || peer.flights.len() > 1 {
            return;
        }
        let max_pieces = peer.pace.claim_pieces();
        let expected = peer.pace.expected(max_pieces);
        let n_pieces = self.picker.board.n_pieces();
        let pieces = match self.picker.next(key(i), max_pieces, expected, self.now) {
            Next::Claim(pieces) | Next::Repeat(pieces) => {
                for piece in &pieces {
                    assert!(
                        self.picker.owners(*piece).eq([key(i)]),
                        "owned twice outside the tail"
                    );
                }
                pieces
            }
            Next::Steal(pieces) => {
                let is_free =
                    |piece| !self.picker.has(piece) && self.picker.owners(piece).count() == 0;
                assert!(
                    !(0..n_pieces).any(|piece| peer.have.contains(piece) && is_free(piece)),
                    "not the tail"
                );
                pieces
            }
            Next::Wait(Some(until)) if peer.wake_at.is_none_or(|at| until < at) => {
                self.peers[i].wake_at = Some(until);
                return self.at(until.max(self.now), Event::Wake(i));
            }
            Next::Wait(_) | Next::Done => return,
        };
        assert!(pieces.len() <= max_pieces as usize);
        assert!(
            pieces
                .iter()
                .all(|piece| peer.have.contains(*piece) && !self.picker.has(*piece))
        );
        let peer = &mut self.peers[i];
        let flight = peer.pace.begin(self.now);
        let was_idle = peer.flights.is_empty();
        peer.flights.push_back((flight, pieces.into()));
        if was_idle {
            self.plan_delivery(i, self.peers[i].round_trip);
        }
    }

    fn plan_delivery(&mut self, i: usize, delay: Duration) {
        let peer = &self.peers[i];
        let life = peer.life;
        if matches!(peer.fault, Fault::Silent(after) if peer.n_sent >= after) {
            return self.at(self.now + 20 * SECOND, Event::Stall(i, life));
        }
        let usual = f64::from(PIECE_LEN) / f64::from(peer.bytes_per_second);
        let jitter = 0.8 + f64::from(self.dice.below(400)) / 1000.0;
        self.at(
            self.now + delay + Duration::from_secs_f64(usual * jitter),
            Event::Deliver(i, life),
        );
    }

    fn deliver(&mut self, i: usize) {
        let dice = self.dice.below(100);
        let peer = &mut self.peers[i];
        let (flight, pieces) = peer.flights.front_mut().expect("void without flights");
        let piece = pieces
            .pop_front()
            .expect("flights end with their last piece");
        match peer.fault {
            Fault::Lies(percent) if dice < percent => {
                self.n_wrong += 1;
                let until = self.picker.bad_piece(key(i), self.now);
                self.hang_up(i);
                return self.at(until, Event::Wake(i));
            }
            Fault::Lacks(percent) if piece % 100 < percent => {
                self.picker.remove_have(key(i), piece)
            }
            _ => {
                peer.pace.on_chunk(flight, PIECE_LEN.into(), self.now);
                peer.n_sent += 1;
                match self.picker.received(key(i), piece) {
                    Received::New => peer.n_new += 1,
                    Received::Duplicate => self.n_duplicates += 1,
                }
            }
        }
        if matches!(peer.fault, Fault::Lacks(_)) && !self.picker.has(piece) {
            peer.have.remove(piece);
        }
        let is_last = pieces.is_empty();
        if is_last && let Some((flight, _)) = peer.flights.pop_front() {
            peer.pace.end(flight, self.now);
        }
        if !peer.flights.is_empty() {
            self.plan_delivery(i, Duration::ZERO);
        }
    }
}

fn key(i: usize) -> SourceKey {
    SourceKey(u32::try_from(i).expect("a handful"))
}

/// 50 kB/s to 50 MB/s, evenly in the exponent.
fn some_speed(dice: &mut Dice) -> u32 {
    50_000 * 10u32.pow(dice.below(3)) * (1 + dice.below(10))
}

/// Some pieces come from this disk, or not; some are lost again; some are promised to others.
fn disturb(simulation: &mut Simulation, dice: &mut Dice, n: u32) {
    let first = dice.below(n);
    let local = first..n.min(first + dice.below(n));
    simulation.picker.claim_local(LOCAL, local.clone());
    let fails = dice.below(101);
    for piece in local {
        let event = Event::Local(piece, !dice.chance(fails));
        simulation.at(simulation.start + dice.millis(10_000), event);
    }
    for _ in 0..dice.below(20) {
        let lost = Event::Lose(dice.below(n));
        simulation.at(simulation.start + dice.millis(20_000), lost);
        let promised = Event::Promised(dice.below(n));
        simulation.at(simulation.start + dice.millis(10_000), promised);
    }
}

#[test]
fn whatever_sources_do_it_ends_when_every_piece_has_an_honest_one() {
    let (mut n_duplicates, mut n_needed) = (0, 0);
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let n = 1 + dice.below(300);
        let mut simulation = Simulation::new(n, seed);
        // Two honest halves, or a third of it each and all of it in the middle, or one seed.
        let (left, right) = (dice.below(n + 1), dice.below(n + 1));
        let slowest = [map(n, 0..left.max(right)), map(n, left.min(right)..n)].map(|have| {
            let speed = some_speed(&mut dice);
            simulation.add(Peer::new(speed, have), dice.millis(3000));
            speed
        });
        for _ in 0..dice.below(9) {
            let have = match dice.below(3) {
                0 => HaveMap::full(n),
                1 => map(n, (0..n).filter(|_| dice.chance(50))),
                _ => HaveMap::empty(n),
            };
            let mut peer = Peer::new(some_speed(&mut dice), have);
            peer.round_trip = dice.millis(300);
            peer.fault = match dice.below(6) {
                0 => Fault::Lies(100),
                1 => Fault::Lies(20),
                2 => Fault::Silent(dice.below(50)),
                3 => Fault::Lacks(dice.below(101)),
                _ => Fault::None,
            };
            let joins = dice.millis(20_000);
            let i = simulation.add(peer, joins);
            for _ in 0..dice.below(n) {
                let gain = Event::Gain(i, dice.below(n));
                let when = simulation.start + dice.millis(30_000);
                simulation.at(when, gain);
            }
            if dice.chance(40) {
                let leaves = simulation.start + joins + dice.millis(10_000);
                simulation.at(leaves, Event::Leave(i));
                if dice.chance(50) {
                    simulation.at(leaves + dice.millis(10_000), Event::Join(i));
                }
            }
        }
        if dice.chance(50) {
            disturb(&mut simulation, &mut dice, n);
        }
        let took = simulation.run();
        simulation.picker.board.check();
        assert!(
            simulation.picker.is_done(),
            "seed {seed}: stuck with {}",
            simulation.picker.remaining()
        );
        // The slower honest half alone, the time until the last one joins, and a stall or two on the way.
        let alone = f64::from(n) * f64::from(PIECE_LEN) / f64::from(slowest[0].min(slowest[1]));
        let bound = alone * 1.3 + 30.0;
        assert!(
            took.as_secs_f64() < bound,
            "seed {seed}: {took:?} of at most {bound}"
        );
        let n_peers = u32::try_from(simulation.peers.len()).expect("a handful");
        let n_bans = took.as_secs().div_ceil(30).max(1).ilog2() + 2;
        assert!(
            simulation.n_wrong <= n_bans * n_peers,
            "seed {seed}: {} wrong",
            simulation.n_wrong
        );
        n_duplicates += simulation.n_duplicates;
        n_needed += n;
    }
    assert!(n_duplicates * 50 < n_needed, "{n_duplicates} of {n_needed}");
}

#[test]
fn sources_share_the_work_by_speed_and_waste_little() {
    let (mut n_all, mut n_duplicates) = (0, 0);
    for seed in 0..60 {
        let mut dice = Dice(seed);
        let n = 1500 + dice.below(500);
        let mut simulation = Simulation::new(n, seed);
        let speeds: Vec<u32> = (0..2 + dice.below(5))
            .map(|_| some_speed(&mut dice))
            .collect();
        for speed in &speeds {
            let mut peer = Peer::new(*speed, HaveMap::full(n));
            peer.round_trip = dice.millis(50);
            simulation.add(peer, Duration::ZERO);
        }
        let took = simulation.run().as_secs_f64();
        assert!(simulation.picker.is_done());
        let all: f64 = speeds.iter().map(|speed| f64::from(*speed)).sum();
        let ideal = f64::from(n) * f64::from(PIECE_LEN) / all;
        assert!(
            took < ideal * 1.1 + 0.1,
            "seed {seed}: {took} instead of {ideal}"
        );
        for (peer, speed) in simulation.peers.iter().zip(&speeds) {
            let share = f64::from(n) * f64::from(*speed) / all;
            let off = (f64::from(peer.n_new) - share).abs();
            assert!(
                off < share * 0.1 + 5.0,
                "seed {seed}: {} instead of {share} at {speed}",
                peer.n_new
            );
        }
        assert!(
            simulation.n_duplicates as usize <= 4 * speeds.len(),
            "seed {seed}: {}",
            simulation.n_duplicates
        );
        n_all += n;
        n_duplicates += simulation.n_duplicates;
    }
    assert!(n_duplicates * 200 < n_all, "{n_duplicates} of {n_all}");
}

#[test]
fn complementary_halves_complete_one_another() {
    let n = 400;
    let mut simulation = Simulation::new(n, 3);
    for which in 0..2 {
        let half = map(n, (0..n).filter(|piece| piece % 2 == which));
        simulation.add(Peer::new(10_000_000, half), Duration::ZERO);
    }
    let took = simulation.run();
    assert!(simulation.picker.is_done() && simulation.n_duplicates == 0);
    assert!(
        took.as_secs_f64() < f64::from(n) * f64::from(PIECE_LEN) / 20e6 * 1.1,
        "{took:?}"
    );
}
