//! Answers that are dear to compute, kept for a while.
//!
//! Invariant: computing takes at most a twentieth of the time, however many ask, and one computation runs at a time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

const FRESH: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;
/// An answer that nobody asked for this long is given up.
const UNUSED: Duration = Duration::from_secs(60);

/// One kept answer.
pub(super) struct Kept<T>(Mutex<Option<Answer<T>>>);

struct Answer<T> {
    value: Arc<T>,
    made: Instant,
    took: Duration,
    asked: Instant,
}

impl<T> Kept<T> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The kept answer, or a new one if it is no longer fresh.
    pub(super) async fn get<E>(
        &self,
        make: impl Future<Output = Result<T, E>>,
    ) -> Result<Arc<T>, E> {
        let mut kept = self.0.lock().await;
        let asked = Instant::now();
        if let Some(answer) = kept
            .as_mut()
            .filter(|answer| answer.made.elapsed() < FRESH.max(answer.took * SHARE))
        {
            answer.asked = asked;
            return Ok(answer.value.clone());
        }
        let value = Arc::new(make.await?);
        *kept = Some(Answer {
            value: value.clone(),
            made: Instant::now(),
            took: asked.elapsed(),
            asked,
        });
        Ok(value)
    }

    /// Gives up what nobody asked for; true if nothing is kept then.
    pub(super) fn rest(&self) -> bool {
        // Somebody is asking if it is locked.
        let Ok(mut kept) = self.0.try_lock() else {
            return false;
        };
        if kept
            .as_ref()
            .is_some_and(|answer| answer.asked.elapsed() > UNUSED)
        {
            *kept = None;
        }
        kept.is_none()
    }
}
