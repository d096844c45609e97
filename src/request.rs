//! The id of a request: whoever calls first makes it, and it goes along with every call that follows from that one, on
//! this machine and on others, so that one search through all logs tells the whole story.
//!
//! Invariant: an id is 1 to 64 letters, digits, `.`, `_` and `-`. What a stranger sends beside that is replaced by an id
//! of our own, so nothing can be written into a log by it.

use std::{fmt, sync::Arc};

use tracing::{Instrument, Span};

/// The name of its header, and its field in the log.
pub const HEADER: &str = "x-request-id";
const MAX_LEN: usize = 64;

tokio::task_local! {
    static CURRENT: RequestId;
}

/// An id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// One that nobody had.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("{:016x}", rand::random::<u64>()).into())
    }

    /// One that somebody sent.
    #[must_use]
    pub fn read(text: &[u8]) -> Option<Self> {
        let fine = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
        let text = std::str::from_utf8(text).ok()?;
        ((1..=MAX_LEN).contains(&text.len()) && text.bytes().all(|byte| fine(&byte)))
            .then(|| Self(text.into()))
    }

    /// That of the call which this task works for; a new one, if it works for none.
    #[must_use]
    pub fn current() -> Self {
        CURRENT
            .try_with(Clone::clone)
            .unwrap_or_else(|_| Self::random())
    }

    /// What `work` calls, it calls under this id.
    pub async fn over<T>(self, work: impl Future<Output = T>) -> T {
        CURRENT.scope(self, work).await
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Lets `work`, which becomes a task of its own, go on under the id and in the span of this one.
pub fn carried<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    let id = CURRENT.try_with(Clone::clone).ok();
    let work = work.instrument(Span::current());
    async move {
        match id {
            Some(id) => id.over(work).await,
            None => work.await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_short_plain_words_are_ids() {
        for good in ["a", "0f9c", "a.b_c-D", &"x".repeat(64)] {
            assert_eq!(RequestId::read(good.as_bytes()).unwrap().to_string(), good);
        }
        let hostile: [&[u8]; 7] = [
            b"",
            b"a b",
            b"a\nb",
            b"\x1b[2J",
            b"a\"b",
            b"\xff",
            &[b'x'; 65],
        ];
        for bad in hostile {
            assert_eq!(RequestId::read(bad), None, "{bad:?}");
        }
        assert!(RequestId::read(RequestId::random().to_string().as_bytes()).is_some());
    }

    #[tokio::test]
    async fn a_task_goes_on_under_the_id_it_was_begun_under() {
        let id = RequestId::random();
        let seen = id.clone().over(async {
            tokio::spawn(carried(async { RequestId::current() }))
                .await
                .unwrap()
        });
        assert_eq!(seen.await, id);
        assert_ne!(RequestId::current(), RequestId::current());
    }
}
