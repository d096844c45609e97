//! What all connections to one source bring together: over a long line one of them can stand still for long while the others
//! have all of it.
//!
//! Pure: time is an argument. Invariant: both speeds fade from byte to byte, so what they tell is true at `counted_to`.

use std::time::Instant;

/// How many times slower than lately a line may be just now and be busy still: where loss slows each connection alone, those
/// that are left at the end are slower; with four times, and so no races then, 16 MiB over 100 ms with 0.3 % loss took 8.9 s
/// and not 8.4.
const SLOWER: f64 = 2.0;
/// Seconds over which its speed is taken: lately, and just now; of a slow line longer, as what was held up by a lost packet
/// comes at once, which is easily so many bytes.
const LATELY: f64 = 4.0;
const NOW: (f64, f64) = (0.5, 2.0);
const BURST: f64 = (512 << 10) as f64;

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) bytes: u64,
    pub(super) last_bytes: Option<Instant>,
    /// Bytes a second just now, and for a while.
    now: f64,
    lately: f64,
    counted_to: Option<Instant>,
}

impl Traffic {
    #[expect(clippy::cast_precision_loss, reason = "a speed")]
    pub(super) fn on_chunk(&mut self, bytes: u64, now: Instant) {
        self.count_to(now);
        self.bytes += bytes;
        self.last_bytes = Some(now);
        self.now += bytes as f64 / self.seconds();
        self.lately += bytes as f64 / LATELY;
    }

    /// Is as much coming as lately came, or nearly?
    pub(super) fn is_busy(&mut self, now: Instant) -> bool {
        self.count_to(now);
        self.now * SLOWER > self.lately
    }

    fn count_to(&mut self, now: Instant) {
        let before = self.counted_to.replace(now).unwrap_or(now);
        let passed = now.saturating_duration_since(before).as_secs_f64();
        self.now *= (-passed / self.seconds()).exp();
        self.lately *= (-passed / LATELY).exp();
    }

    /// How many seconds "just now" is.
    fn seconds(&self) -> f64 {
        (BURST / self.lately.max(1.0)).clamp(NOW.0, NOW.1)
    }
}
