//! The four golden signals of each RPC that this process answers: how many, how many failed, how long, how much at once.
//!
//! Invariant: a method that no `.proto` file knows is counted as `other`, so a caller cannot make series.

use std::{
    sync::{LazyLock, atomic::Ordering},
    time::Instant,
};

use super::{Counter, Entered, Exposition, Histogram, Level};

include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// Methods of others that we serve.
const STANDARD: [&str; 4] = [
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];
const OTHER: &str = "other";

/// Status codes by their numbers.
const CODES: [&str; 17] = [
    "ok",
    "cancelled",
    "unknown",
    "invalid_argument",
    "deadline_exceeded",
    "not_found",
    "already_exists",
    "permission_denied",
    "resource_exhausted",
    "failed_precondition",
    "aborted",
    "out_of_range",
    "unimplemented",
    "internal",
    "unavailable",
    "data_loss",
    "unauthenticated",
];
const CANCELLED: usize = 1;
const UNKNOWN: usize = 2;

/// Microseconds.
const DURATIONS: &[u64] = &[
    1_000,
    3_000,
    10_000,
    30_000,
    100_000,
    300_000,
    1_000_000,
    3_000_000,
    10_000_000,
    30_000_000,
    100_000_000,
];

/// One RPC.
#[derive(Debug)]
pub struct Method {
    /// `package.Service/Method`, or `other`.
    pub name: &'static str,
    ended: [Counter; CODES.len()],
    in_flight: Level,
    durations: Histogram,
    /// Bytes of requests.
    pub received: Counter,
    /// Bytes of answers.
    pub sent: Counter,
}

/// In the order of their names, and `other` last.
static ALL: LazyLock<Vec<Method>> = LazyLock::new(|| {
    let mut names: Vec<_> = METHODS.iter().copied().chain(STANDARD).collect();
    names.sort_unstable();
    names.push(OTHER);
    let method = |name| Method {
        name,
        ended: [const { Counter::new() }; CODES.len()],
        in_flight: Level::new(),
        durations: Histogram::new(DURATIONS),
        received: Counter::new(),
        sent: Counter::new(),
    };
    names.into_iter().map(method).collect()
});

/// A call that is being answered; dropped without an [`end`](Self::end) it was cancelled.
#[derive(Debug)]
pub struct Call {
    /// Which RPC.
    pub method: &'static Method,
    began: Instant,
    ended: Option<usize>,
    _in_flight: Entered,
}

impl Call {
    /// Counts a call of the method behind `path`.
    #[must_use]
    pub fn begin(path: &str) -> Self {
        let known = &ALL[..ALL.len() - 1];
        let found = path
            .strip_prefix('/')
            .and_then(|name| known.binary_search_by_key(&name, |m| m.name).ok());
        let method = &ALL[found.unwrap_or(known.len())];
        Self {
            method,
            began: Instant::now(),
            ended: None,
            _in_flight: method.in_flight.enter(),
        }
    }

    /// It ends with this status, as the wire says it.
    pub fn end(&mut self, status: &[u8]) {
        let code = std::str::from_utf8(status)
            .ok()
            .and_then(|text| text.parse().ok());
        self.ended = Some(code.filter(|code| *code < CODES.len()).unwrap_or(UNKNOWN));
    }

    /// It ends well, unless something was said before.
    pub fn end_well(&mut self) {
        self.ended.get_or_insert(0);
    }

    /// Its status so far.
    #[must_use]
    pub fn code(&self) -> &'static str {
        CODES[self.ended.unwrap_or(CANCELLED)]
    }

    /// How long it has taken.
    #[must_use]
    pub fn micros(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.method.ended[self.ended.unwrap_or(CANCELLED)].one();
        self.method.durations.observe(self.micros());
    }
}

/// Writes what was counted; of methods that were never called, nothing.
pub(super) fn measure(page: &mut Exposition) {
    let is_used = |m: &&Method| {
        m.in_flight.0.load(Ordering::Relaxed) > 0 || m.ended.iter().any(|code| code.get() > 0)
    };
    let used: Vec<_> = ALL.iter().filter(is_used).collect();
    let mut requests = page.counter(
        "sprat_rpc_requests_total",
        "Calls that ended, by gRPC status code.",
    );
    for method in &used {
        for (code, count) in CODES
            .iter()
            .zip(&method.ended)
            .filter(|(code, count)| **code == "ok" || count.get() > 0)
        {
            requests.with(&[("method", method.name), ("code", code)], count.get());
        }
    }
    let mut durations = page.histogram(
        "sprat_rpc_duration_seconds",
        "From the call to the end of its answer.",
    );
    used.iter()
        .for_each(|method| durations.spread(&[("method", method.name)], &method.durations, 1e6));
    let mut in_flight = page.gauge("sprat_rpc_in_flight", "Calls being answered.");
    used.iter()
        .for_each(|m| in_flight.with(&[("method", m.name)], m.in_flight.0.load(Ordering::Relaxed)));
    let mut bytes = page.counter(
        "sprat_rpc_bytes_total",
        "Bytes of requests (received) and of answers (sent).",
    );
    for method in &used {
        bytes.with(
            &[("method", method.name), ("direction", "received")],
            method.received.get(),
        );
        bytes.with(
            &[("method", method.name), ("direction", "sent")],
            method.sent.get(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_ours_is_known_and_no_other_makes_a_series() {
        for name in [
            "sprat.v1.ChunkService/GetChunks",
            "sprat.v1.AdminService/Revoke",
            STANDARD[0],
        ] {
            assert_eq!(Call::begin(&format!("/{name}")).method.name, name);
        }
        for path in [
            "/x/y",
            "",
            "/",
            "/other",
            "sprat.v1.ChunkService/GetChunks",
            "/sprat.v1.ChunkService/getchunks",
        ] {
            assert_eq!(Call::begin(path).method.name, OTHER, "{path}");
        }
    }

    #[test]
    fn a_call_ends_with_what_was_said_or_was_cancelled() {
        let code = |end: &dyn Fn(&mut Call)| {
            let mut call = Call::begin("/x");
            end(&mut call);
            call.code()
        };
        assert_eq!(code(&|_| {}), "cancelled");
        assert_eq!(code(&|call| call.end(b"8")), "resource_exhausted");
        assert_eq!(code(&|call| call.end(b"17")), "unknown");
        assert_eq!(code(&|call| call.end(b"\xff")), "unknown");
        assert_eq!(code(&Call::end_well), "ok");
    }
}
