//! Waiting for a whole listing: after a tracker's restart some of those who were here are not back, and what they
//! offer is not listed.
//!
//! Invariant: what a command takes for absent was asked for in a round of questions whose answers were all whole.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{output::count, session::Session};
use crate::{
    catalog::Row,
    exit::{Exit, Failed},
    peer::member::tracker_client::TrackerClient,
    proto::{Completeness, ListFilesRequest},
};

/// Questions whose answers belong together.
pub(super) struct Round<'a> {
    tracker: &'a TrackerClient,
    /// As the least whole answer so far.
    told: Cell<Completeness>,
}

impl Round<'_> {
    /// All rows that the tracker has for a question.
    pub(super) async fn list(&self, request: ListFilesRequest) -> Result<Vec<Row>> {
        let listing = self.tracker.list(request).await?;
        if self.told.get().is_whole {
            self.told.set(listing.completeness);
        }
        Ok(listing.rows)
    }
}

/// Has a round of questions asked, and asked again when the listing is whole, or when this took so long as `patience`;
/// tells how whole the answers are.
pub(super) async fn patiently<T>(
    session: &Session,
    tracker: &TrackerClient,
    patience: Duration,
    ask: impl AsyncFn(&Round<'_>) -> Result<T>,
) -> Result<(T, Completeness)> {
    let until = Instant::now() + patience;
    let mut is_first = true;
    loop {
        let told = Cell::new(Completeness {
            is_whole: true,
            ..Default::default()
        });
        let round = Round { tracker, told };
        let answer = ask(&round).await?;
        let told = round.told.get();
        if told.is_whole || Instant::now() >= until {
            return Ok((answer, told));
        }
        if is_first {
            let longest = whole_within(&told).min(patience);
            session.hint(&format!(
                "{}; waiting for at most {} s",
                why(&told),
                longest.as_secs().max(1)
            ));
            is_first = false;
        }
        tracker.whole(until).await?;
    }
}

/// How a command ends whose answer is not whole.
pub(super) fn not_whole(told: &Completeness) -> anyhow::Error {
    let text = format!(
        "the listing is not whole: {}; run the same command again, in {} s at the latest it will be",
        why(told),
        whole_within(told).as_secs() + 1
    );
    Failed::new(Exit::NotWhole, text).into()
}

fn why(told: &Completeness) -> String {
    match u64::from(told.peers_missing) {
        0 => "the tracker was restarted and does not know yet who is here".into(),
        n => format!(
            "{} not back since the tracker was restarted",
            are(n, "peer")
        ),
    }
}

fn whole_within(told: &Completeness) -> Duration {
    Duration::from_millis(told.whole_within_ms.into())
}

/// What may still appear without anybody coming; none if nothing.
pub(super) fn scanning(told: &Completeness) -> Option<String> {
    let n = Some(u64::from(told.peers_scanning)).filter(|n| *n > 0)?;
    Some(format!("{} still looking through folders", are(n, "peer")))
}

/// `1 peer is`, `2 peers are`
fn are(n: u64, what: &str) -> String {
    format!("{} {}", count(n, what), if n == 1 { "is" } else { "are" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_who_is_missing_and_how_long() {
        let told = Completeness {
            is_whole: false,
            peers_missing: 2,
            whole_within_ms: 12_400,
            peers_scanning: 1,
        };
        let error = not_whole(&told);
        assert_eq!(crate::cli::exit_code(&error), 13);
        let text = "the listing is not whole: 2 peers are not back since the tracker was restarted; run the same command again, in 13 s at the latest it will be";
        assert_eq!(error.to_string(), text);
        assert_eq!(
            scanning(&told).unwrap(),
            "1 peer is still looking through folders"
        );
        let unknown = Completeness::default();
        assert!(
            not_whole(&unknown)
                .to_string()
                .contains("does not know yet")
        );
        assert_eq!(scanning(&unknown), None);
    }
}
