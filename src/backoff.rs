//! How long to wait before trying again: exponential with jitter, so that many peers do not come back at once.
//!
//! Pure: the caller brings the random number and does the waiting.

use std::time::Duration;

/// The delays of one thing that is tried again and again.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    n_failures: u32,
}

impl Backoff {
    /// Delays that start around `first` and double up to `longest`.
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            n_failures: 0,
        }
    }

    /// Counts a failure and says how long to wait: between half and the whole of the current step. `random` is uniform
    /// in 0..1; anything outside is moved to the nearest bound.
    pub fn delay(&mut self, random: f64) -> Duration {
        let doubled = 2u32
            .checked_pow(self.n_failures)
            .and_then(|factor| self.first.checked_mul(factor));
        let step = doubled.unwrap_or(self.longest).min(self.longest);
        self.n_failures = self.n_failures.saturating_add(1);
        let random = if random.is_nan() {
            1.0
        } else {
            random.clamp(0.0, 1.0)
        };
        step.mul_f64(0.5 + random / 2.0)
    }

    /// Failures since the last success.
    pub fn n_failures(&self) -> u32 {
        self.n_failures
    }

    /// It worked: the next failure starts from the first delay again.
    pub fn reset(&mut self) {
        self.n_failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(10);

    #[test]
    fn doubles_to_the_longest_and_starts_over_after_a_success() {
        let mut backoff = Backoff::new(FIRST, LONGEST);
        let whole: Vec<u128> = (0..9).map(|_| backoff.delay(1.0).as_millis()).collect();
        assert_eq!(
            whole,
            [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]
        );
        assert_eq!(backoff.n_failures(), 9);
        backoff.reset();
        assert_eq!(backoff.delay(0.0), FIRST / 2);
    }

    proptest! {
        #[test]
        fn stays_between_half_a_step_and_the_longest(n in 0u32..200, random in any::<f64>()) {
            let mut backoff = Backoff::new(FIRST, LONGEST);
            for _ in 0..n {
                backoff.delay(0.5);
            }
            let delay = backoff.delay(random);
            prop_assert!(delay >= FIRST / 2 && delay <= LONGEST);
        }
    }
}
