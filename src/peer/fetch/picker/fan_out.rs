//! One seed and many receivers in simulated time, each receiver with a picker of its own: how long until the last one has
//! everything, and how often each piece leaves the seed. All begin at once and learn of one another a moment later.
//!
//! Links are queues of quanta: an uplink takes its streams in turn, a downlink what comes; a stream has a window.

use super::tests::{Dice, PIECE_LEN};
use super::*;
use crate::peer::fetch::pace::{Flight, Pace};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

const QUANTUM: u32 = 32 << 10;
const QUANTA: u32 = PIECE_LEN / QUANTUM;
/// Quanta of a stream on the way.
const WINDOW: u32 = 8;
const SEED: usize = 0;

#[derive(Clone, Copy, Debug)]
struct Settings {
    n_pieces: u32,
    n_receivers: usize,
    up_seed: f64,
    up: f64,
    down: f64,
    round_trip: Duration,
    /// Of what receivers tell one another, and of promises.
    news: (u32, u32),
    /// Streams at once of one source.
    lanes: usize,
    /// Of one claim.
    most_pieces: u32,
}

struct Stream {
    from: usize,
    to: usize,
    repeat: bool,
    pieces: VecDeque<u32>,
    /// Of the first piece.
    n_sent: u32,
    n_arrived: u32,
    sent: VecDeque<u32>,
    on_the_way: u32,
    flight: Option<Flight>,
    is_over: bool,
}

struct Node {
    picker: Picker,
    paces: Vec<Pace>,
    n_lanes: Vec<usize>,
    /// Whether a piece has come from each source.
    proven: Vec<bool>,
    wake_at: Vec<Option<Instant>>,
    /// Streams that it serves, the next first.
    serving: VecDeque<usize>,
    is_sending: bool,
    down_busy: Instant,
    done_at: Option<Instant>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Meet(usize, usize),
    Start(usize),
    Refused(usize, Vec<u32>),
    Sent(usize),
    Arrived(usize),
    Delivered(usize),
    Ack(usize),
    Gain(usize, usize, u32),
    Promised(usize, Vec<u32>),
    Wake(usize, usize),
}

struct FanOut {
    settings: Settings,
    nodes: Vec<Node>,
    streams: Vec<Stream>,
    promised_to: Vec<Option<usize>>,
    events: BinaryHeap<Reverse<(Instant, u64, Event)>>,
    n_events: u64,
    start: Instant,
    now: Instant,
    dice: Dice,
    seed_quanta: u64,
    n_duplicates: u32,
}

#[derive(Debug)]
struct Outcome {
    ratio: f64,
    copies: f64,
}

impl FanOut {
    fn new(settings: Settings, seed: u64) -> Self {
        let start = Instant::now();
        let n = settings.n_pieces;
        let nodes = (0..=settings.n_receivers).map(|i| {
            let mut picker = Picker::new(n, seed * 1000 + i as u64);
            picker.set_have(key(SEED), &HaveMap::full(n));
            Node {
                picker,
                paces: (0..=settings.n_receivers)
                    .map(|_| Pace::new(PIECE_LEN))
                    .collect(),
                n_lanes: vec![0; settings.n_receivers + 1],
                proven: vec![false; settings.n_receivers + 1],
                wake_at: vec![None; settings.n_receivers + 1],
                serving: VecDeque::new(),
                is_sending: false,
                down_busy: start,
                done_at: None,
            }
        });
        Self {
            settings,
            nodes: nodes.collect(),
            streams: Vec::new(),
            promised_to: vec![None; n as usize],
            events: BinaryHeap::new(),
            n_events: 0,
            start,
            now: start,
            dice: Dice(seed ^ 0xfa),
            seed_quanta: 0,
            n_duplicates: 0,
        }
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.n_events += 1;
        self.events
            .push(Reverse((self.now + delay, self.n_events, event)));
    }

    fn news(&mut self) -> Duration {
        let (least, most) = self.settings.news;
        Duration::from_millis(least.into()) + self.dice.millis(most - least + 1)
    }

    fn run(&mut self) -> Outcome {
        for r in 1..=self.settings.n_receivers {
            self.ask(r, SEED);
            for other in (1..=self.settings.n_receivers).filter(|other| *other != r) {
                let delay = self.news();
                self.after(delay, Event::Meet(r, other));
            }
        }
        while self.nodes[1..].iter().any(|node| node.done_at.is_none()) {
            let Some(Reverse((now, _, event))) = self.events.pop() else {
                let left: Vec<u32> = self
                    .nodes
                    .iter()
                    .map(|node| node.picker.remaining())
                    .collect();
                panic!("stuck with {left:?}");
            };
            self.now = now;
            self.happen(event);
        }
        let s = self.settings;
        let file = f64::from(s.n_pieces) * f64::from(PIECE_LEN);
        let n = s.n_receivers as f64;
        let bound = (file / s.up_seed)
            .max(file / s.down)
            .max(n * file / (s.up_seed + n * s.up));
        Outcome {
            ratio: (self.now - self.start).as_secs_f64() / bound,
            copies: self.seed_quanta as f64 / f64::from(QUANTA) / f64::from(s.n_pieces),
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Meet(r, other) => self.nodes[r]
                .picker
                .set_have(key(other), &HaveMap::empty(self.settings.n_pieces)),
            Event::Start(stream) => self.begin(stream),
            Event::Refused(stream, pieces) => {
                let Stream { from, to, .. } = self.streams[stream];
                self.nodes[to]
                    .picker
                    .promised(pieces.first().copied(), self.now);
                self.nodes[to].picker.release(key(from), &pieces);
                if self.streams[stream].pieces.is_empty() && self.streams[stream].sent.is_empty() {
                    self.end(stream);
                }
                self.ask_all(to);
            }
            Event::Sent(node) => {
                self.nodes[node].is_sending = false;
                self.send(node);
            }
            Event::Arrived(stream) => {
                let node = &mut self.nodes[self.streams[stream].to];
                node.down_busy =
                    node.down_busy.max(self.now) + seconds(f64::from(QUANTUM) / self.settings.down);
                let delay = node.down_busy - self.now;
                self.after(delay, Event::Delivered(stream));
            }
            Event::Delivered(stream) => {
                self.after(self.settings.round_trip / 2, Event::Ack(stream));
                self.deliver(stream);
            }
            Event::Ack(stream) => {
                self.streams[stream].on_the_way -= 1;
                self.send(self.streams[stream].from);
            }
            Event::Gain(r, source, piece) => {
                self.nodes[r].picker.add_have(key(source), piece);
                self.ask(r, source);
                self.ask(r, SEED);
            }
            Event::Promised(r, pieces) => self.nodes[r].picker.promised(pieces, self.now),
            Event::Wake(r, source) => {
                self.nodes[r].wake_at[source] = None;
                self.ask(r, source);
            }
        }
    }

    fn ask_all(&mut self, r: usize) {
        for source in 0..self.nodes.len() {
            if source != r {
                self.ask(r, source);
            }
        }
    }

    fn ask(&mut self, r: usize, source: usize) {
        let s = self.settings;
        loop {
            let node = &mut self.nodes[r];
            let lanes = if node.proven[source] { s.lanes } else { 1 };
            if node.n_lanes[source] >= lanes || node.done_at.is_some() {
                return;
            }
            let pace = &mut node.paces[source];
            let n = pace.claim_pieces().min(s.most_pieces);
            let (pieces, repeat) =
                match node.picker.next(key(source), n, pace.expected(n), self.now) {
                    Next::Claim(pieces) => (pieces, false),
                    Next::Repeat(pieces) | Next::Steal(pieces) => (pieces, true),
                    Next::Wait(Some(until)) if node.wake_at[source].is_none_or(|at| until < at) => {
                        node.wake_at[source] = Some(until);
                        return self.after(
                            until.saturating_duration_since(self.now),
                            Event::Wake(r, source),
                        );
                    }
                    Next::Wait(_) | Next::Done => return,
                };
            node.n_lanes[source] += 1;
            let flight = Some(pace.begin(self.now));
            let pieces = pieces.into();
            let sent = VecDeque::new();
            self.streams.push(Stream {
                from: source,
                to: r,
                repeat,
                pieces,
                n_sent: 0,
                n_arrived: 0,
                sent,
                on_the_way: 0,
                flight,
                is_over: false,
            });
            self.after(s.round_trip / 2, Event::Start(self.streams.len() - 1));
        }
    }

    /// The request is with the source.
    fn begin(&mut self, at: usize) {
        if self.grant(at) {
            let from = self.streams[at].from;
            self.nodes[from].serving.push_back(at);
            self.send(from);
        }
    }

    /// Whether the stream may go on with its next piece, which the seed promises then, if it is a first copy.
    fn grant(&mut self, at: usize) -> bool {
        let Stream {
            from, to, repeat, ..
        } = self.streams[at];
        let Some(&piece) = self.streams[at].pieces.front() else {
            return false;
        };
        if from != SEED || repeat {
            return true;
        }
        let holder = &mut self.promised_to[piece as usize];
        let is_new = holder.is_none();
        if *holder.get_or_insert(to) != to {
            let refused = self.streams[at].pieces.drain(..).collect();
            self.after(self.settings.round_trip / 2, Event::Refused(at, refused));
            return false;
        }
        for r in (1..=self.settings.n_receivers).filter(|r| *r != to && is_new) {
            let delay = self.news();
            self.after(delay, Event::Promised(r, vec![piece]));
        }
        true
    }

    fn send(&mut self, from: usize) {
        if self.nodes[from].is_sending {
            return;
        }
        let ready = |at: &usize| self.streams[*at].on_the_way < WINDOW;
        let Some(place) = self.nodes[from].serving.iter().position(ready) else {
            return;
        };
        let at = self.nodes[from].serving.remove(place).expect("found");
        let stream = &mut self.streams[at];
        stream.on_the_way += 1;
        stream.n_sent += 1;
        if stream.n_sent == QUANTA {
            stream.n_sent = 0;
            let piece = stream.pieces.pop_front().expect("sent");
            stream.sent.push_back(piece);
        }
        if stream.n_sent > 0 || self.grant(at) {
            self.nodes[from].serving.push_back(at);
        }
        let up = if from == SEED {
            self.settings.up_seed
        } else {
            self.settings.up
        };
        self.seed_quanta += u64::from(from == SEED);
        self.nodes[from].is_sending = true;
        let takes = seconds(f64::from(QUANTUM) / up);
        self.after(takes, Event::Sent(from));
        self.after(takes + self.settings.round_trip / 2, Event::Arrived(at));
    }

    fn deliver(&mut self, at: usize) {
        let Stream { from, to, .. } = self.streams[at];
        let stream = &mut self.streams[at];
        if stream.is_over {
            return;
        }
        if let Some(flight) = &mut stream.flight {
            self.nodes[to].paces[from].on_chunk(flight, QUANTUM.into(), self.now);
        }
        stream.n_arrived += 1;
        if stream.n_arrived < QUANTA {
            return;
        }
        stream.n_arrived = 0;
        let piece = stream.sent.pop_front().expect("sent before it came");
        let node = &mut self.nodes[to];
        node.proven[from] = true;
        match node.picker.received(key(from), piece) {
            Received::New => {
                if node.picker.is_done() {
                    node.done_at = Some(self.now);
                }
                for r in 1..=self.settings.n_receivers {
                    if r != to {
                        let delay = self.news();
                        self.after(delay, Event::Gain(r, to, piece));
                    }
                }
            }
            Received::Duplicate => self.n_duplicates += 1,
        }
        let stream = &self.streams[at];
        let picker = &self.nodes[to].picker;
        if stream
            .pieces
            .iter()
            .chain(&stream.sent)
            .all(|piece| picker.has(*piece))
        {
            self.end(at);
        }
    }

    fn end(&mut self, at: usize) {
        let stream = &mut self.streams[at];
        if stream.is_over {
            return;
        }
        stream.is_over = true;
        let (from, to) = (stream.from, stream.to);
        stream.pieces.clear();
        if let Some(flight) = stream.flight.take() {
            self.nodes[to].paces[from].end(flight, self.now);
        }
        self.nodes[from].serving.retain(|other| *other != at);
        self.nodes[to].n_lanes[from] -= 1;
        self.ask(to, from);
        if from != SEED {
            self.ask_all(to);
        }
    }
}

fn key(i: usize) -> SourceKey {
    SourceKey(u32::try_from(i).expect("a handful"))
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// Equal links of 100 Mbit/s, a file of 64 MiB.
fn equal_links(n_receivers: usize) -> Settings {
    let link = 12.5e6;
    Settings {
        n_pieces: 256,
        n_receivers,
        up_seed: link,
        up: link,
        down: link,
        round_trip: Duration::from_millis(2),
        news: (50, 250),
        lanes: 2,
        most_pieces: 4,
    }
}

#[expect(
    clippy::print_stdout,
    reason = "the numbers, for who wants to see them"
)]
fn run(settings: Settings, seed: u64) -> Outcome {
    let mut fan_out = FanOut::new(settings, seed);
    let outcome = fan_out.run();
    let n = settings.n_receivers;
    println!(
        "N = {n}, seed {seed}: {:.3} of the bound, {:.3} copies",
        outcome.ratio, outcome.copies
    );
    let n_duplicates = fan_out.n_duplicates as usize;
    assert!(
        n_duplicates <= n * 2 + n * 256 / 50,
        "{n_duplicates} duplicates among {n} receivers"
    );
    outcome
}

#[test]
fn the_last_receiver_is_near_the_bound_and_the_seed_sends_each_piece_once() {
    for n_receivers in [1, 2, 4, 8, 16] {
        for seed in 0..if n_receivers == 16 { 1 } else { 3 } {
            let Outcome { ratio, copies } = run(equal_links(n_receivers), seed);
            assert!(ratio < 1.15, "{n_receivers} receivers: {ratio}");
            assert!(copies <= 1.03, "{n_receivers} receivers: {copies} copies");
        }
    }
}

#[test]
fn claims_of_any_length_and_long_round_trips_fan_out_as_well() {
    for n_receivers in [2, 8] {
        let settings = Settings {
            most_pieces: 1000,
            ..equal_links(n_receivers)
        };
        assert!(run(settings, 7).ratio < 1.15);
        let settings = Settings {
            round_trip: Duration::from_millis(20),
            ..equal_links(n_receivers)
        };
        assert!(run(settings, 7).ratio < 1.15);
    }
}

#[test]
fn a_seed_with_more_to_give_than_the_others_gives_it() {
    let slow = equal_links(8);
    let settings = Settings {
        up_seed: slow.up_seed * 4.0,
        down: slow.down * 4.0,
        ..slow
    };
    let outcome = run(settings, 1);
    assert!(outcome.ratio < 1.2 && outcome.copies > 2.0, "{outcome:?}");
}
