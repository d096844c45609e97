//! An hour of throughput. Pure: time comes as an argument.
//!
//! Invariant: bytes are counted in the time in which they came, and leave after an hour; the memory is fixed.

use std::time::{Duration, Instant};

/// The time that one number stands for.
pub const BUCKET: Duration = Duration::from_secs(5);
const N_BUCKETS: u64 = 720;

/// Bytes for each bucket of the last hour.
#[derive(Debug)]
pub struct History {
    start: Instant,
    /// The bucket of time `n` is at `n % N_BUCKETS`.
    bytes: Vec<u64>,
    newest: u64,
}

impl History {
    /// Nothing yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            start: now,
            bytes: vec![0; usize::try_from(N_BUCKETS).unwrap_or_default()],
            newest: 0,
        }
    }

    fn bucket(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.start).as_secs() / BUCKET.as_secs()
    }

    fn slot(&mut self, bucket: u64) -> &mut u64 {
        let n = self.bytes.len();
        &mut self.bytes[usize::try_from(bucket).unwrap_or_default() % n]
    }

    fn advance(&mut self, now: Instant) {
        let newest = self.bucket(now);
        for bucket in (self.newest + 1).max(newest.saturating_sub(N_BUCKETS - 1))..=newest {
            *self.slot(bucket) = 0;
        }
        self.newest = self.newest.max(newest);
    }

    /// Counts bytes that came between two times, spread evenly over them.
    pub fn add(&mut self, bytes: u64, from: Instant, to: Instant) {
        self.advance(to);
        let last = self.bucket(to);
        let first = self
            .bucket(from)
            .clamp(last.saturating_sub(N_BUCKETS - 1), last);
        let whole = u128::from(last - first + 1);
        for (n, bucket) in (0..whole).zip(first..=last) {
            let part = |n: u128| u64::try_from(u128::from(bytes) * n / whole).unwrap_or(u64::MAX);
            let slot = self.slot(bucket);
            *slot = slot.saturating_add(part(n + 1) - part(n));
        }
    }

    /// The buckets of the last hour, or of the time since the start, the oldest first, whose number comes with them.
    pub fn buckets(&mut self, now: Instant) -> (u64, Vec<u64>) {
        self.advance(now);
        let oldest = self.newest.saturating_sub(N_BUCKETS - 1);
        (
            oldest,
            (oldest..=self.newest)
                .map(|bucket| *self.slot(bucket))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_where_they_came_and_leave_after_an_hour() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut history = History::new(start);
        let total = |history: &mut History, now| history.buckets(now).1.iter().sum::<u64>();
        history.add(30, at(0), at(14));
        assert_eq!(history.buckets(at(14)), (0, vec![10, 10, 10]));
        history.add(5, at(14), at(15));
        assert_eq!(history.buckets(at(19)), (0, vec![10, 10, 12, 3]));
        assert_eq!(history.buckets(at(3_599)).1.len(), 720);
        assert_eq!(total(&mut history, at(3_599)), 35);
        assert_eq!(
            (history.buckets(at(3_609)).0, total(&mut history, at(3_609))),
            (2, 15)
        );
        assert_eq!(total(&mut history, at(100_000)), 0);
        history.add(7_200, at(0), at(100_000));
        assert_eq!(total(&mut history, at(100_000)), 7_200);
        history.add(1, at(100_000), at(99_000));
        assert_eq!(total(&mut history, at(100_000)), 7_201);
    }
}
