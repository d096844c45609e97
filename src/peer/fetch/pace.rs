//! How much to ask of one source at a time: chunk length and claim length from its measured goodput and round trip.
//!
//! Pure: time is an argument. One `Pace` per connection, and those to one source share a line; one `Flight` per request
//! under way.
//!
//! - **Goodput** is bytes over the time in which at least one request was under way, waiting for the first byte
//!   included: what requests cost shows in it. Samples of at least 100 ms fade with a half-second constant.
//! - **Claims** aim at a second of work (so 0.5–2 s while goodput moves) and at twice bandwidth × round trip, start
//!   small, grow fourfold at most from one to the next, and follow goodput down at once.
//! - **Chunks** last from 5 ms to 50 ms at the measured goodput: shorter ones cost both ends time (a third of what a core
//!   moves at 16 KiB), and of one that takes longer than a request may be silent, nothing is heard in time. In between
//!   they are tried at double length after a while and kept so unless goodput fell, since longer chunks are less work; a
//!   length that did not help is not tried again for a while that grows. The first measurement, a small request on a
//!   cold connection, often says too little, so the 5 ms are looked at with every one.
//!
//! Invariant: chunk length within 16 KiB..1 MiB, claims within 1..=1,024 pieces and, from two pieces up, 256 MiB.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

mod traffic;

use traffic::Traffic;

/// Bounds of a chunk's length, bytes.
pub const MIN_CHUNK_LEN: u32 = 16 << 10;
/// See [`MIN_CHUNK_LEN`].
pub const MAX_CHUNK_LEN: u32 = 1 << 20;
/// The most pieces one request may name, and thereby the most ranges.
pub const MAX_CLAIM_PIECES: u32 = 1024;
/// The most bytes one request may ask for, unless a single piece is longer.
pub const MAX_CLAIM_BYTES: u64 = 256 << 20;

/// What a source is given to show its speed, and what is expected of it until it has.
const FIRST_CHUNK_LEN: u32 = MIN_CHUNK_LEN;
const FIRST_CLAIM_BYTES: u64 = 1 << 20;
const ASSUMED_GOODPUT: f64 = (1 << 20) as f64;
const ASSUMED_ROUND_TRIP: Duration = Duration::from_millis(50);

const CLAIM_WORK: Duration = Duration::from_secs(1);
const MAX_CLAIM_GROWTH: u64 = 4;
const MIN_CHUNK_TIME: Duration = Duration::from_millis(5);
const MAX_CHUNK_TIME: Duration = Duration::from_millis(50);
const SAMPLE: Duration = Duration::from_millis(100);
const FADE: Duration = Duration::from_millis(500);

/// Samples that a chunk length is judged by.
const TRIAL_SAMPLES: u32 = 4;
/// A trial at less than this part of the goodput before it has failed; less than this is noise.
const TRIAL_FLOOR: f64 = 0.97;
const FIRST_REST: u32 = 20;
const LONGEST_REST: u32 = 640;

const FIRST_BYTE_LIMIT: Duration = Duration::from_secs(10);
const PROGRESS_LIMIT: Duration = Duration::from_secs(20);
/// Bytes that a request must bring in each [`PROGRESS_LIMIT`].
const FLOOR_BYTES: u64 = 16 << 10;

/// Sizes that follow nothing, where they are given: what adaptive ones are measured against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// A chunk's length, bytes.
    pub chunk_len: Option<u32>,
    /// A claim's length, bytes; at least one piece.
    pub claim_bytes: Option<u64>,
}

/// The measured speed of one connection to a source, and the sizes that follow from it.
#[derive(Debug)]
pub struct Pace {
    piece_len: u32,
    fixed: Fixed,
    line: Arc<Mutex<Traffic>>,
    goodput: Option<f64>,
    round_trip: Option<Duration>,
    n_flights: u32,
    /// Time with a request under way, and the bytes that came in it, since the last sample.
    active: Duration,
    active_bytes: u64,
    counted_to: Option<Instant>,
    /// Bytes that came in all.
    bytes: u64,
    claim_bytes: u64,
    chunk_len: u32,
    /// Bytes in the present sample came in chunks of another length, asked for earlier.
    is_mixed: bool,
    trial: Trial,
}

/// How the present chunk length is judged.
#[derive(Clone, Copy, Debug)]
enum Trial {
    /// Settled; a longer one is tried after so many samples more.
    Rest { samples: u32, next_rest: u32 },
    /// Doubled; `before` is the goodput of the shorter one, the rest is what the longer one has shown.
    Running {
        before: f64,
        samples: u32,
        sum: f64,
        next_rest: u32,
    },
}

/// One request under way.
#[derive(Clone, Debug)]
pub struct Flight {
    since: Instant,
    chunk_len: u32,
    /// No other request was under way at its start, so its first byte tells the round trip.
    alone: bool,
    answered: bool,
    bytes: u64,
    stretch: Stretch,
    last_bytes: Instant,
}

/// In which a request must make progress, unless others do: its start, and the bytes of the request and of the line then.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    since: Instant,
    bytes: u64,
    line: u64,
}

impl Pace {
    /// For pieces of about `piece_len` bytes: the mean over the Download.
    pub fn new(piece_len: u32) -> Self {
        Self {
            piece_len: piece_len.max(1),
            fixed: Fixed::default(),
            line: Arc::default(),
            goodput: None,
            round_trip: None,
            n_flights: 0,
            active: Duration::ZERO,
            active_bytes: 0,
            counted_to: None,
            bytes: 0,
            claim_bytes: FIRST_CLAIM_BYTES,
            chunk_len: FIRST_CHUNK_LEN,
            is_mixed: false,
            trial: Trial::Rest {
                samples: TRIAL_SAMPLES,
                next_rest: FIRST_REST,
            },
        }
    }

    /// The mean length of pieces is another by now, bytes.
    pub fn set_piece_len(&mut self, piece_len: u32) {
        self.piece_len = piece_len.max(1);
    }

    /// As [`Self::new`], with some sizes fixed.
    pub fn fixed(piece_len: u32, fixed: Fixed) -> Self {
        Self {
            fixed,
            ..Self::new(piece_len)
        }
    }

    /// That of another connection to the same source, of which nothing is known.
    pub fn fresh(&self) -> Self {
        Self {
            line: self.line.clone(),
            ..Self::fixed(self.piece_len, self.fixed)
        }
    }

    /// A request goes out. Give what it returns to [`Self::on_chunk`], and in the end, however it ends, to [`Self::end`].
    pub fn begin(&mut self, now: Instant) -> Flight {
        self.count_to(now);
        let alone = self.n_flights == 0;
        self.n_flights += 1;
        self.counted_to = Some(now);
        let chunk_len = self.chunk_len;
        let stretch = Stretch {
            since: now,
            bytes: 0,
            line: self.line_bytes(),
        };
        Flight {
            since: now,
            chunk_len,
            alone,
            answered: false,
            bytes: 0,
            stretch,
            last_bytes: now,
        }
    }

    /// Bytes of a piece came. Empty chunks are no progress.
    pub fn on_chunk(&mut self, flight: &mut Flight, bytes: u64, now: Instant) {
        if bytes == 0 {
            return;
        }
        if !flight.answered {
            flight.answered = true;
            self.on_first_byte(now.saturating_duration_since(flight.since), flight.alone);
        }
        flight.bytes += bytes;
        flight.last_bytes = now;
        self.line().on_chunk(bytes, now);
        if now.saturating_duration_since(flight.stretch.since) >= PROGRESS_LIMIT
            && !flight.is_too_slow(now)
        {
            flight.begin_stretch(self.line_bytes(), now);
        }
        self.is_mixed |= flight.chunk_len != self.chunk_len;
        self.active_bytes += bytes;
        self.bytes += bytes;
        self.count_to(now);
        if self.active >= SAMPLE {
            self.sample();
        }
    }

    /// A request is over, with all that was asked for or not.
    pub fn end(&mut self, flight: Flight, now: Instant) {
        self.count_to(now);
        self.n_flights = self.n_flights.saturating_sub(1);
        if self.n_flights == 0 {
            self.counted_to = None;
        }
        if self.active >= SAMPLE || self.goodput.is_none() && flight.answered {
            self.sample();
        }
        if self.goodput.is_some() && flight.bytes > 0 {
            let grown = flight
                .bytes
                .max(FIRST_CLAIM_BYTES)
                .saturating_mul(MAX_CLAIM_GROWTH);
            self.claim_bytes = self.claim_bytes.max(grown).min(self.wanted_claim());
        }
    }

    /// Whether to give the request up: nothing for 10 s at its start or 20 s later on, or less than 16 KiB in 20 s, and no
    /// more from the source's other requests. While those have the line, this one waits for its turn.
    pub fn stalled(&self, flight: &mut Flight, now: Instant) -> bool {
        let limit = if flight.answered {
            PROGRESS_LIMIT
        } else {
            FIRST_BYTE_LIMIT
        };
        let line = self.line();
        let last_bytes = line
            .last_bytes
            .map_or(flight.last_bytes, |at| at.max(flight.last_bytes));
        if now.saturating_duration_since(last_bytes) >= limit {
            return true;
        }
        if !flight.is_too_slow(now) {
            return false;
        }
        let (own, all) = (
            flight.bytes - flight.stretch.bytes,
            line.bytes - flight.stretch.line,
        );
        flight.begin_stretch(line.bytes, now);
        all.saturating_sub(own) < FLOOR_BYTES
    }

    /// Bytes a chunk shall have: a power of two.
    pub fn chunk_length(&self) -> u32 {
        self.fixed
            .chunk_len
            .unwrap_or(self.chunk_len)
            .clamp(MIN_CHUNK_LEN, MAX_CHUNK_LEN)
    }

    /// Bytes the next claim should be about.
    pub fn claim_bytes(&self) -> u64 {
        u64::from(self.claim_pieces()) * u64::from(self.piece_len)
    }

    /// Pieces the next claim should have at most; at least one.
    pub fn claim_pieces(&self) -> u32 {
        let bytes = self.fixed.claim_bytes.unwrap_or(self.claim_bytes);
        let pieces = bytes.min(MAX_CLAIM_BYTES) / u64::from(self.piece_len);
        u32::try_from(pieces)
            .unwrap_or(u32::MAX)
            .clamp(1, MAX_CLAIM_PIECES)
    }

    /// Make the next claim when fewer bytes than this are still to come, so that the source never idles: twice what is on
    /// the way in one round trip.
    pub fn lead_bytes(&self) -> u64 {
        2 * self.bytes_in(self.round_trip()) + u64::from(self.chunk_len)
    }

    /// Bytes that came so far.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that came so far over all connections to the source.
    pub fn line_bytes(&self) -> u64 {
        self.line().bytes
    }

    fn line(&self) -> MutexGuard<'_, Traffic> {
        self.line.lock().expect("no panic while the lock is held")
    }

    /// Whether the line carries as much as it lately did, or nearly: what one connection wins then, the others lose.
    pub fn is_line_busy(&self, now: Instant) -> bool {
        self.line().is_busy(now)
    }

    /// Bytes a second; none before the first measurement.
    pub fn goodput(&self) -> Option<u64> {
        self.goodput.map(whole)
    }

    /// From a request to its first byte, on an otherwise idle source.
    pub fn round_trip(&self) -> Duration {
        self.round_trip.unwrap_or(ASSUMED_ROUND_TRIP)
    }

    /// How long so many pieces will take.
    pub fn expected(&self, pieces: u32) -> Duration {
        let bytes = f64::from(pieces) * f64::from(self.piece_len);
        let seconds = bytes / self.goodput.unwrap_or(ASSUMED_GOODPUT).max(1.0);
        self.round_trip() + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 2)
    }

    fn count_to(&mut self, now: Instant) {
        if let Some(before) = self.counted_to {
            self.active += now.saturating_duration_since(before);
            self.counted_to = Some(now);
        }
    }

    fn on_first_byte(&mut self, took: Duration, alone: bool) {
        // Behind another request's bytes it may only have taken longer, so then only a shorter time is news.
        let known = self.round_trip.unwrap_or(took);
        if took <= known || alone {
            self.round_trip = Some(if took <= known {
                took
            } else {
                (known * 7 + took) / 8
            });
        } else if self.round_trip.is_none() {
            self.round_trip = Some(took);
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a ratio of speeds")]
    fn sample(&mut self) {
        let seconds = self.active.as_secs_f64().max(1e-6);
        let rate = self.active_bytes as f64 / seconds;
        let weight = seconds / (seconds + FADE.as_secs_f64());
        self.goodput = Some(
            self.goodput
                .map_or(rate, |known| known + weight * (rate - known)),
        );
        (self.active, self.active_bytes) = (Duration::ZERO, 0);
        self.claim_bytes = self.claim_bytes.min(self.wanted_claim());
        self.judge_chunk_length(rate);
        self.is_mixed = false;
    }

    fn judge_chunk_length(&mut self, rate: f64) {
        let shortest = chunk_len_within(self.bytes_in(MIN_CHUNK_TIME));
        let longest = chunk_len_within(self.bytes_in(MAX_CHUNK_TIME));
        if self.chunk_len < shortest || self.chunk_len > longest {
            self.chunk_len = shortest.max(self.chunk_len / 2);
            self.trial = Trial::Rest {
                samples: TRIAL_SAMPLES,
                next_rest: FIRST_REST,
            };
            return;
        }
        self.trial = match self.trial {
            Trial::Rest {
                samples: 0,
                next_rest,
            } => {
                if self.chunk_len * 2 > longest {
                    return;
                }
                self.chunk_len *= 2;
                Trial::Running {
                    before: self.goodput.unwrap_or(rate),
                    samples: 0,
                    sum: 0.0,
                    next_rest,
                }
            }
            Trial::Rest { samples, next_rest } => Trial::Rest {
                samples: samples - 1,
                next_rest,
            },
            Trial::Running {
                samples: 0,
                sum,
                next_rest,
                ..
            } if self.is_mixed => Trial::Running {
                before: self.goodput.unwrap_or(rate),
                samples: 0,
                sum,
                next_rest,
            },
            running @ Trial::Running { .. } if self.is_mixed => running,
            Trial::Running {
                before,
                samples,
                sum,
                next_rest,
            } if samples + 1 < TRIAL_SAMPLES => {
                // The first holds the wait for the first byte, which longer chunks are not to blame for.
                let sum = if samples == 0 { 0.0 } else { sum + rate };
                Trial::Running {
                    before,
                    samples: samples + 1,
                    sum,
                    next_rest,
                }
            }
            Trial::Running {
                before,
                sum,
                next_rest,
                ..
            } => {
                if (sum + rate) / f64::from(TRIAL_SAMPLES - 1) >= before * TRIAL_FLOOR {
                    Trial::Rest {
                        samples: 0,
                        next_rest: FIRST_REST,
                    }
                } else {
                    self.chunk_len /= 2;
                    Trial::Rest {
                        samples: next_rest,
                        next_rest: (next_rest * 2).min(LONGEST_REST),
                    }
                }
            }
        };
    }

    fn wanted_claim(&self) -> u64 {
        let work = self
            .bytes_in(CLAIM_WORK)
            .max(2 * self.bytes_in(self.round_trip()));
        work.clamp(u64::from(MIN_CHUNK_LEN), MAX_CLAIM_BYTES)
    }

    fn bytes_in(&self, time: Duration) -> u64 {
        whole(self.goodput.unwrap_or(ASSUMED_GOODPUT) * time.as_secs_f64())
    }
}

impl Flight {
    fn is_too_slow(&self, now: Instant) -> bool {
        let Stretch { since, bytes, .. } = self.stretch;
        now.saturating_duration_since(since) >= PROGRESS_LIMIT && self.bytes - bytes < FLOOR_BYTES
    }

    fn begin_stretch(&mut self, line: u64, now: Instant) {
        self.stretch = Stretch {
            since: now,
            bytes: self.bytes,
            line,
        };
    }
}

/// The longest chunk length that is not longer than `bytes`, within the bounds.
fn chunk_len_within(bytes: u64) -> u32 {
    let bytes = u32::try_from(bytes)
        .unwrap_or(u32::MAX)
        .clamp(MIN_CHUNK_LEN, MAX_CHUNK_LEN);
    1 << bytes.ilog2()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` stops at the bounds of the type"
)]
fn whole(number: f64) -> u64 {
    number as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PIECE_LEN: u32 = 256 << 10;
    const KB: f64 = 1e3;
    const MB: f64 = 1e6;

    fn millis(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// One claim after the other over a link; `speed` may depend on the chunk length. Returns the end.
    fn fetch(
        pace: &mut Pace,
        speed: impl Fn(u32) -> f64,
        round_trip: Duration,
        time: Duration,
        start: Instant,
    ) -> Instant {
        let mut now = start;
        while now < start + time {
            let mut left = pace.claim_bytes();
            let chunk_len = pace.chunk_length();
            let mut flight = pace.begin(now);
            now += round_trip;
            while left > 0 {
                let bytes = left.min(chunk_len.into());
                now += Duration::from_secs_f64(bytes as f64 / speed(chunk_len));
                pace.on_chunk(&mut flight, bytes, now);
                assert!(!pace.stalled(&mut flight, now));
                left -= bytes;
            }
            pace.end(flight, now);
        }
        now
    }

    fn assert_near(is: u64, wanted: f64) {
        assert!(
            (is as f64 / wanted - 1.0).abs() < 0.15,
            "{is} is not near {wanted}"
        );
    }

    #[test]
    fn a_fast_link_gets_long_chunks_and_claims_within_two_seconds() {
        let mut pace = Pace::new(PIECE_LEN);
        assert!(pace.claim_bytes() <= 1 << 20, "unknown sources start small");
        fetch(
            &mut pace,
            |_| 600.0 * MB,
            millis(1),
            millis(2000),
            Instant::now(),
        );
        assert_eq!(
            (pace.chunk_length(), pace.claim_bytes()),
            (MAX_CHUNK_LEN, MAX_CLAIM_BYTES)
        );
        assert_near(pace.goodput().unwrap_or(0), 600.0 * MB);
    }

    #[test]
    fn a_slow_start_is_made_up_for_at_once() {
        let mut pace = Pace::new(PIECE_LEN);
        let now = fetch(
            &mut pace,
            |_| 10.0 * MB,
            millis(20),
            millis(100),
            Instant::now(),
        );
        assert!(pace.chunk_length() <= 64 << 10);
        fetch(&mut pace, |_| 600.0 * MB, millis(1), millis(250), now);
        assert!(pace.chunk_length() >= 512 << 10, "{}", pace.chunk_length());
    }

    #[test]
    fn fixed_sizes_follow_nothing() {
        let fixed = Fixed {
            chunk_len: Some(32 << 10),
            claim_bytes: Some(4 << 20),
        };
        let mut pace = Pace::fixed(PIECE_LEN, fixed);
        fetch(
            &mut pace,
            |_| 600.0 * MB,
            millis(1),
            millis(2000),
            Instant::now(),
        );
        assert_eq!(
            (pace.chunk_length(), pace.claim_bytes()),
            (32 << 10, 4 << 20)
        );
    }

    #[test]
    fn a_slow_link_gets_single_pieces_in_short_chunks() {
        let mut pace = Pace::new(PIECE_LEN);
        fetch(
            &mut pace,
            |_| 50.0 * KB,
            millis(100),
            millis(60_000),
            Instant::now(),
        );
        assert_eq!(
            (pace.chunk_length(), pace.claim_pieces()),
            (MIN_CHUNK_LEN, 1)
        );
        assert!(
            pace.expected(1) > millis(4500) && pace.expected(1) < millis(6500),
            "{:?}",
            pace.expected(1)
        );
    }

    #[test]
    fn a_long_link_is_kept_full() {
        let mut pace = Pace::new(PIECE_LEN);
        fetch(
            &mut pace,
            |_| 125.0 * MB,
            millis(50),
            millis(5000),
            Instant::now(),
        );
        assert!(pace.round_trip() >= millis(50) && pace.round_trip() < millis(55));
        assert!(pace.lead_bytes() as f64 > 2.0 * 0.05 * 100.0 * MB);
        assert!(pace.claim_bytes() as f64 > 100.0 * MB);
    }

    #[test]
    fn sizes_follow_a_link_that_changes() {
        let mut pace = Pace::new(PIECE_LEN);
        let now = fetch(
            &mut pace,
            |_| 100.0 * MB,
            millis(5),
            millis(3000),
            Instant::now(),
        );
        assert_near(pace.claim_bytes(), 100.0 * MB);
        let now = fetch(&mut pace, |_| 2.0 * MB, millis(5), millis(3000), now);
        assert_near(pace.claim_bytes(), 2.0 * MB);
        assert!(pace.chunk_length() <= 64 << 10, "at most 50 ms");
        fetch(&mut pace, |_| 100.0 * MB, millis(5), millis(3000), now);
        assert_near(pace.claim_bytes(), 100.0 * MB);
    }

    #[test]
    fn longer_chunks_that_hurt_are_given_up() {
        let mut pace = Pace::new(PIECE_LEN);
        let best_at_128k = |chunk_len: u32| {
            if chunk_len <= 128 << 10 {
                30.0 * MB
            } else {
                15.0 * MB
            }
        };
        let mut now = fetch(
            &mut pace,
            best_at_128k,
            millis(1),
            millis(10_000),
            Instant::now(),
        );
        let mut n_too_long = 0;
        for _ in 0..100 {
            now = fetch(&mut pace, best_at_128k, millis(1), millis(500), now);
            n_too_long += u32::from(pace.chunk_length() > 128 << 10);
        }
        assert!(n_too_long < 10, "{n_too_long} of 100 looks");
        assert!(pace.chunk_length() >= 64 << 10);
    }

    #[test]
    fn two_requests_at_once_do_not_count_time_twice() {
        let mut pace = Pace::new(PIECE_LEN);
        let mut now = Instant::now();
        let mut first = pace.begin(now);
        for _ in 0..100 {
            let mut second = pace.begin(now);
            for _ in 0..10 {
                now += millis(10);
                pace.on_chunk(&mut first, 50_000, now);
                pace.on_chunk(&mut second, 50_000, now);
            }
            pace.end(std::mem::replace(&mut first, second), now);
        }
        assert_near(pace.goodput().unwrap_or(0), 10.0 * MB);
        pace.end(first, now);
        pace.begin(now + Duration::from_secs(3600));
        assert_near(pace.goodput().unwrap_or(0), 10.0 * MB);
    }

    #[test]
    fn silence_and_trickles_are_stalls() {
        let start = Instant::now();
        let mut pace = Pace::new(PIECE_LEN);
        let mut flight = pace.begin(start);
        assert!(!pace.stalled(&mut flight, start + millis(9_999)));
        assert!(pace.stalled(&mut flight, start + millis(10_000)));
        pace.on_chunk(&mut flight, 0, start + millis(9_000));
        assert!(
            pace.stalled(&mut flight, start + millis(10_000)),
            "an empty chunk is no answer"
        );
        pace.on_chunk(&mut flight, 100_000, start + millis(9_000));
        assert!(!pace.stalled(&mut flight, start + millis(28_999)));
        assert!(pace.stalled(&mut flight, start + millis(29_000)));
        let mut trickle = pace.begin(start);
        for second in 1..20 {
            pace.on_chunk(&mut trickle, 1, start + millis(second * 1000));
            assert!(!pace.stalled(&mut trickle, start + millis(second * 1000)));
        }
        pace.on_chunk(&mut trickle, 1, start + millis(20_000));
        assert!(pace.stalled(&mut trickle, start + millis(20_000)));
    }

    #[test]
    fn one_that_waits_while_another_has_the_line_is_not_stalled() {
        let start = Instant::now();
        let mut pace = Pace::new(PIECE_LEN);
        let mut beside = pace.fresh();
        let (mut starved, mut fed) = (pace.begin(start), beside.begin(start));
        for second in 1..60 {
            let now = start + millis(second * 1000);
            beside.on_chunk(&mut fed, 2_000, now);
            assert!(!pace.stalled(&mut starved, now), "after {second} s");
            assert!(pace.is_line_busy(now));
        }
        assert_eq!((pace.bytes(), pace.line_bytes()), (0, 59 * 2_000));
        let end = start + millis(59_000);
        assert!(
            !pace.is_line_busy(end + millis(5_000)),
            "nothing comes any more"
        );
        assert!(!pace.stalled(&mut starved, end + millis(9_999)));
        assert!(pace.stalled(&mut starved, end + FIRST_BYTE_LIMIT));
        assert!(beside.stalled(&mut fed, end + PROGRESS_LIMIT));
    }

    proptest! {
        #[test]
        fn sizes_stay_within_their_bounds(
            piece_len in prop_oneof![Just(0), Just(1), Just(4096), Just(PIECE_LEN), Just(16 << 20), any::<u32>()],
            steps in proptest::collection::vec((0u8..4, 0u64..1 << 40, 0u64..100_000_000), 1..200),
        ) {
            let mut pace = Pace::new(piece_len);
            let mut now = Instant::now();
            let mut flights = Vec::new();
            for (what, bytes, micros) in steps {
                now += Duration::from_micros(micros);
                match (what, flights.pop()) {
                    (0, Some(flight)) => pace.end(flight, now),
                    (1, flight) => {
                        flights.extend(flight);
                        flights.push(pace.begin(now));
                    }
                    (_, Some(mut flight)) => {
                        pace.on_chunk(&mut flight, bytes, now);
                        pace.stalled(&mut flight, now);
                        flights.push(flight);
                    }
                    (_, None) => {}
                }
                prop_assert!((MIN_CHUNK_LEN..=MAX_CHUNK_LEN).contains(&pace.chunk_length()));
                prop_assert!(pace.chunk_length().is_power_of_two());
                prop_assert!((1..=MAX_CLAIM_PIECES).contains(&pace.claim_pieces()));
                prop_assert!(pace.claim_pieces() == 1 || pace.claim_bytes() <= MAX_CLAIM_BYTES);
                prop_assert!(pace.expected(pace.claim_pieces()) > Duration::ZERO || pace.goodput().is_some());
                pace.lead_bytes();
            }
        }
    }
}
